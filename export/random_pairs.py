"""Pairs of language model and mmproj with random weights: the shapes that speed is measured on, by name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .random_models import LANGUAGE_SHAPES, LanguageShape, cached_language_model
from .random_towers import TOWER_SHAPES, TowerShape, cached_mmproj


@dataclass(frozen=True)
class BenchShape:
    """The two halves of a model, and the ``quantization`` that its language model is mostly run in."""

    language: LanguageShape
    tower: TowerShape
    quantization: str


BENCH_SHAPES = {
    name: BenchShape(LANGUAGE_SHAPES[language], TOWER_SHAPES[name], quantization)
    for name, language, quantization in (
        ("llava-1.5-7b", "llava-1.5-7b", "Q4_0"),
        ("llava-next-7b", "llava-1.5-7b", "Q4_0"),
        ("smolvlm-256m", "smolvlm-256m", "Q8_0"),
        ("smolvlm-500m", "smolvlm-500m", "Q8_0"),
        ("qwen2.5-vl-3b", "qwen2.5-vl-3b", "Q4_0"),
        ("internvl3-1b", "internvl3-1b", "Q8_0"),
        ("gemma3-4b", "gemma3-4b", "Q4_0"),
    )
}


def cached_pair(shape: BenchShape, cache: str | os.PathLike[str] | None = None) -> tuple[Path, Path]:
    """Language model and mmproj of ``shape`` in ``cache`` (by default that of the towers), written there when they are
    missing or damaged. Raises ``TokcompError`` when the disk has no room for them or cannot be written.
    """
    return cached_language_model(shape.language, shape.quantization, cache), cached_mmproj(shape.tower, cache)
