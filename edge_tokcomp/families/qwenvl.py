"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size as one crop, rows at their row and column (M-RoPE).

A picture is resized in proportion to multiples of two patches; each square of four patches becomes a token. Files do
not say how small and large pictures may get: the smallest is that of the Hugging Face checkpoints, the largest 4096
tokens, llama.cpp's. (Their processors allow 16 384, minutes of prefill on the machines meant here.)

**Towers.** A still picture passes both convolutions of a pair of frames. Qwen2-VL and 2.5 have rotary positions only,
Qwen3-VL a learned table as well, stretched with its corners in place. Qwen2.5-VL attends within windows of 112 pixels
but for every ``n_wa_pattern``-th block, its norms are RMS norms and its feed-forward is gated. Files call the norm of
the merger ``v.post_ln``: it comes before patches are joined. What they say of the feed-forward's width is wrong for
Qwen2-VL; the tensor tells.

**Deepstack.** Qwen3-VL feeds features of three blocks on the way into the first layers of the language model, where
llama.cpp takes them as further columns of each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from edge_tokcomp.errors import ImageError, TokcompError
from edge_tokcomp.families.base import (
    Metadata,
    Part,
    Pixels,
    TensorShapes,
    first_side,
    projector_type,
    read_integer,
    read_number,
    read_optional_integer,
    vit_values,
)
from edge_tokcomp.families.pictures import BICUBIC, check_picture, fit_area, normalised, resized
from edge_tokcomp.families.tower_spec import Deepstack, Limits, Rotary, Step, TowerSpec, Window
from edge_tokcomp.tokens import Layout

_MOST_TOKENS = 4096
_WINDOW_PIXELS = 112
_MOST_STRETCHED = 200
"""Times that one side may be as long as the other; beyond, the Hugging Face processor refuses."""


@dataclass(frozen=True)
class QwenVL:
    """What the three have in common; ``projectors``: how their files call themselves."""

    name: str
    models: str
    projectors: tuple[str, ...]
    least_tokens: int
    causal: bool = True
    positions: Literal["line", "grid"] = "grid"
    markers: tuple[str, ...] = ("<|image_pad|>",)
    written: str = "<|vision_start|><|image_pad|><|vision_end|>"

    def matches(self, metadata: Metadata) -> bool:
        return projector_type(metadata) in self.projectors

    def spec(self, metadata: Metadata, shapes: TensorShapes) -> TowerSpec:
        values = vit_values(metadata, shapes, without=("ffn_width",))
        merge = read_optional_integer(metadata, "clip.vision.spatial_merge_size", 2)
        unit = values["patch_size"] * merge
        values |= {
            "family": self.name, "ffn_width": first_side(shapes, "v.blk.0.ffn_up.bias"), "activation": "quick_gelu",
            "projector": (Step("linear", "mm.0"), Step("gelu"), Step("linear", "mm.2")),
            "class_token": False, "attention_block": None, "dynamic": True, "patch_slices": 2,
            "post_norm": True, "positions": None, "rotary": Rotary(), "merge": merge,
            "limits": Limits(
                read_optional_integer(metadata, "clip.vision.image_min_pixels", self.least_tokens * unit**2),
                read_optional_integer(metadata, "clip.vision.image_max_pixels", _MOST_TOKENS * unit**2),
            ),
        }  # fmt: skip
        return TowerSpec(**values | self.own(metadata, unit, values["blocks"]))

    def own(self, metadata: Metadata, unit: int, blocks: int) -> dict[str, Any]:
        """What of the spec is the model's own."""
        return {}

    def preprocess(self, image: Image.Image, spec: TowerSpec, grid: tuple[int, int] | None = None) -> Pixels:
        check_picture(image)
        if max(image.size) > _MOST_STRETCHED * min(image.size):
            raise ImageError(
                f"picture of {image.width}x{image.height} pixels: {self.name} takes one side to be at most "
                f"{_MOST_STRETCHED} times the other; cut it"
            )
        if spec.limits.min_pixels is None or spec.limits.max_pixels is None:
            raise TokcompError("the tower's description is without limits of pixels; export the tower again")
        height, width = fit_area(image.height, image.width, spec.unit, spec.limits.min_pixels, spec.limits.max_pixels)
        if grid is not None:
            height, width = grid[0] * spec.unit, grid[1] * spec.unit
        crop = normalised(resized(image, height, width, BICUBIC), spec)
        return Pixels((crop,), ((height // spec.unit, width // spec.unit),), (image.height, image.width))

    def layout(self, pixels: Pixels, spec: TowerSpec) -> Layout:
        return Layout.of_grids(*pixels.grids)

    def prompt(self, pixels: Pixels) -> tuple[Part, ...]:
        return ((0,),)


@dataclass(frozen=True)
class Qwen2VL(QwenVL):
    """See the module's text."""

    name: str = "qwen2vl"
    models: str = "Qwen2-VL"
    projectors: tuple[str, ...] = ("qwen2vl_merger",)
    least_tokens: int = 4


@dataclass(frozen=True)
class Qwen25VL(QwenVL):
    """See the module's text."""

    name: str = "qwen2.5vl"
    models: str = "Qwen2.5-VL"
    projectors: tuple[str, ...] = ("qwen2.5vl_merger",)
    least_tokens: int = 4

    def own(self, metadata: Metadata, unit: int, blocks: int) -> dict[str, Any]:
        every = read_integer(metadata, "clip.vision.n_wa_pattern")
        side = read_optional_integer(metadata, "clip.vision.window_size", _WINDOW_PIXELS) // unit
        return {
            "activation": "silu", "norm": "rms", "gated": True,
            "window": Window(side, tuple(range(every - 1, blocks, every))),
        }  # fmt: skip


@dataclass(frozen=True)
class Qwen3VL(QwenVL):
    """See the module's text."""

    name: str = "qwen3vl"
    models: str = "Qwen3-VL"
    projectors: tuple[str, ...] = ("qwen3vl_merger",)
    least_tokens: int = 64

    def own(self, metadata: Metadata, unit: int, blocks: int) -> dict[str, Any]:
        levels = metadata.get("clip.vision.is_deepstack_layers", [])
        if not isinstance(levels, list) or len(levels) > blocks or not all(type(on) is bool for on in levels):
            raise TokcompError(f"clip.vision.is_deepstack_layers {levels!r:.80} does not say which of {blocks} blocks")
        eps = read_number(metadata, "clip.vision.attention.layer_norm_epsilon")

        def merger(prefix: str) -> tuple[Step, ...]:
            norm = Step("layer_norm", f"{prefix}.norm", eps=eps)
            return norm, Step("linear", f"{prefix}.fc1"), Step("gelu"), Step("linear", f"{prefix}.fc2")

        deepstack = tuple(Deepstack(block, merger(f"v.deepstack.{block}")) for block, on in enumerate(levels) if on)
        return {"activation": "gelu_tanh", "positions": "corners", "deepstack": deepstack}
