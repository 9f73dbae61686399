"""The two files of every family, and of models that only llama.cpp has a tower for; pictures to show them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import hf_vlms
from hf_language import write_language
from hf_mmproj import write_mmproj_of
from hf_processors import CHAT_TEMPLATES, make_tokenizer
from mtmd_towers import write_glm4v, write_marked, write_minicpmv

Picture = NDArray[np.uint8]
FAMILIES = (*hf_vlms.FAMILIES, "minicpmv", "glm4v")


def noise(height: int, width: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@dataclass
class Files:
    """The two files of each family, made when first asked for."""

    folder: Path
    made: dict[str, tuple[Path, Path]] = field(default_factory=dict)

    def of(self, family: str) -> tuple[Path, Path]:
        lm, mmproj = self.folder / f"{family}.gguf", self.folder / f"{family}.mmproj.gguf"
        if family in self.made:
            return self.made[family]
        if family == "minicpmv":
            markers = ("<image>", "</image>", "<slice>", "</slice>")
            self.made[family] = write_marked(lm, "llama", 128, markers), write_minicpmv(mmproj)
        elif family == "glm4v":
            markers = ("<|begin_of_image|>", "<|end_of_image|>")
            self.made[family] = write_marked(lm, "qwen2vl", 64, markers), write_glm4v(mmproj)
        else:
            model, tokenizer = hf_vlms.build(family), make_tokenizer(family)
            write_language(model, family, lm, tokenizer, CHAT_TEMPLATES[family])
            self.made[family] = lm, write_mmproj_of(model, family, mmproj)
        return self.made[family]
