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
from mtmd_further_towers import write_cogvlm, write_deepseek4v, write_gemma3n, write_gemma4, write_hunyuanvl
from mtmd_towers import write_glm4v, write_marked, write_minicpmv
from tiny_models import ARCHITECTURES
from tiny_token_models import write_token_model

Picture = NDArray[np.uint8]
_OTHERS = {
    "minicpmv": ("llama", 128, write_minicpmv, ("<image>", "</image>", "<slice>", "</slice>")),
    "glm4v": ("qwen2vl", 64, write_glm4v, ("<|begin_of_image|>", "<|end_of_image|>")),
    "cogvlm": ("cogvlm", 64, write_cogvlm, ()),
    "gemma3n": ("gemma3n", 64, write_gemma3n, ("<start_of_image>", "<end_of_image>")),
    "gemma4": ("gemma4", 64, write_gemma4, ("<|image>", "<image|>")),
    "gemma4_e2b": ("gemma4_e2b", 1536, write_gemma4, ("<|image>", "<image|>")),
    "deepseek4v": ("deepseek4", 64, write_deepseek4v, ()),
    "hunyuanvl": (
        "hunyuan_vl", 64, write_hunyuanvl, ("<｜hy_place▁holder▁no▁100｜>", "<｜hy_place▁holder▁no▁101｜>")
    ),
}  # fmt: skip
"""Architecture and width of the language model, its tower, and the markers that its vocabulary has."""
FAMILIES = (*hf_vlms.FAMILIES, *_OTHERS)


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
        if family in _OTHERS:
            architecture, width, tower, markers = _OTHERS[family]
            if architecture in ARCHITECTURES:
                write_marked(lm, architecture, width, markers)
            else:
                write_token_model(lm, architecture, markers)
            self.made[family] = lm, tower(mmproj, width)
        else:
            model, tokenizer = hf_vlms.build(family), make_tokenizer(family)
            write_language(model, family, lm, tokenizer, CHAT_TEMPLATES[family])
            self.made[family] = lm, write_mmproj_of(model, family, mmproj)
        return self.made[family]
