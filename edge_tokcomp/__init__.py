"""Vision-language models on small machines with a fraction of their image tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .vlm import VLM as VLM
    from .vlm import load as load

__version__ = "0.1.0"
__all__ = ["VLM", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """``load`` and ``VLM`` on first use: importing the package must not import ONNX Runtime or llama.cpp."""
    if name in ("VLM", "load"):
        from . import vlm

        return getattr(vlm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
