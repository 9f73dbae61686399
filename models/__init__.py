"""The bundled demo model: two GGUF files, as a user would bring, and sample images."""

from __future__ import annotations

from pathlib import Path

DEMO = Path(__file__).parent / "demo"
"""Folder of ``demo-lm.gguf``, ``demo-mmproj.gguf`` and ``samples/``."""

DEMO_LM = DEMO / "demo-lm.gguf"
DEMO_MMPROJ = DEMO / "demo-mmproj.gguf"
