"""LLaVA-1.5 and its kin (BakLLaVA, ShareGPT4V, the bundled demo): one square crop, CLIP tower with CLS, two-layer MLP.

**Padding.** LLaVA-1.5 was trained on, and llama.cpp feeds, pictures padded to a square with the mean colour. The
Hugging Face checkpoint's processor crops the centre by default, which loses the edges of every picture that is not
square; its ``do_pad=True`` gives what is done here.

**Feature layer.** LLaVA takes the next to last hidden state of CLIP: all blocks but the last, no ``post_ln``. Files
say how many blocks that is in one of two ways. llama.cpp's legacy converter, the only writer of ``mlp`` files in its
tree, drops the last block and writes ``block_count`` = blocks present (23 for the 24 of ViT-L); when the checkpoint's
config names a layer it also writes ``feature_layer``, an index into the hidden states: n means the first n blocks.
Hence ``feature_layer`` where there is one, else ``block_count``, and never one less. (llama.cpp's own tower runs one
block less than the file counts and puts the CLS row behind the patches; it is no reference.) Blocks beyond the count
are not run; a count beyond the blocks present is an error.

**GELU.** ``clip.use_gelu`` stands for the ``gelu`` of the checkpoint's config, the exact one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from edge_tokcomp.errors import TokcompError, UnsupportedError
from edge_tokcomp.families.base import (
    Metadata,
    Part,
    Pixels,
    TensorShapes,
    check_blocks,
    projector_type,
    read_integer,
    vit_values,
)
from edge_tokcomp.families.pictures import check_picture, normalised
from edge_tokcomp.families.tower_spec import Activation, Step, TowerSpec
from edge_tokcomp.tokens import Layout

_STRIP_PIXELS = 1 << 24


@dataclass(frozen=True)
class Llava15:
    """See the module's text."""

    name: str = "llava15"
    models: str = "LLaVA-1.5, BakLLaVA, ShareGPT4V, the bundled demo model"
    projectors: tuple[str, ...] = ("mlp",)
    causal: bool = True
    positions: Literal["line", "grid"] = "line"
    markers: tuple[str, ...] = ("<image>",)
    written: str = "<image>\n"

    def matches(self, metadata: Metadata) -> bool:
        # LLaVA-1.6 is an mlp file too, but one picture is several crops there.
        return projector_type(metadata) == "mlp" and "clip.vision.image_grid_pinpoints" not in metadata

    def spec(self, metadata: Metadata, shapes: TensorShapes) -> TowerSpec:
        return clip_tower(self.name, metadata, shapes)

    def preprocess(self, image: Image.Image, spec: TowerSpec, grid: tuple[int, int] | None = None) -> Pixels:
        size = (spec.image_size, spec.image_size)
        if grid is not None:
            size = (grid[1] * spec.patch_size, grid[0] * spec.patch_size)
        crop = normalised(_pad_and_resize(image, spec, size), spec)
        return Pixels((crop,), (grid or spec.grid,), (image.height, image.width))

    def layout(self, pixels: Pixels, spec: TowerSpec) -> Layout:
        return Layout.of_grids(*pixels.grids, cls_rows=True)

    def prompt(self, pixels: Pixels) -> tuple[Part, ...]:
        return ((0,),)


def clip_tower(family: str, metadata: Metadata, shapes: TensorShapes) -> TowerSpec:
    """CLIP and a two-layer MLP, as every LLaVA on CLIP has them; raises ``TokcompError`` for another file."""
    if "v.class_embd" not in shapes:
        raise UnsupportedError(
            "no class token (v.class_embd), so its tower is not CLIP; LLaVA with another tower is not supported"
        )
    if "mm.2.weight" not in shapes:
        raise UnsupportedError("no mm.2.weight, so its projector is not LLaVA-1.5's two-layer MLP and is not supported")
    blocks = _feature_layer(metadata)
    check_blocks(blocks, shapes)
    return TowerSpec(
        family=family,
        blocks=blocks,
        activation=_activation(metadata),
        projector=(Step("linear", "mm.0"), Step("gelu"), Step("linear", "mm.2")),
        class_token=True,
        attention_block=blocks - 1,
        pre_norm="v.pre_ln.weight" in shapes,
        **vit_values(metadata, shapes, without=("blocks",)),
    )


def _feature_layer(metadata: Metadata) -> int:
    layers = metadata.get("clip.vision.feature_layer")
    if layers is None:
        return read_integer(metadata, "clip.vision.block_count")
    if not isinstance(layers, list) or len(layers) != 1 or type(layers[0]) is not int or layers[0] < 1:
        raise UnsupportedError(
            f"clip.vision.feature_layer {layers!r:.80} is not one block; towers that stack several are not supported"
        )
    return layers[0]


def _activation(metadata: Metadata) -> Activation:
    gelu, silu = (metadata.get(f"clip.use_{name}") is True for name in ("gelu", "silu"))
    if gelu and silu:
        raise TokcompError("both clip.use_gelu and clip.use_silu are set; convert the model again")
    return "gelu" if gelu else "silu" if silu else "quick_gelu"


def _pad_and_resize(image: Image.Image, spec: TowerSpec, size: tuple[int, int]) -> Image.Image:
    """Centre on a square of the mean colour, then bicubic to ``size``, width and height.

    Pillow resizes along rows first, then along columns, rounding in between. Doing the two passes apart, the first on
    strips, gives the same pixels without the padded square ever existing: of a 1 x 60000 picture it is 10 GB.
    """
    check_picture(image)
    width, height = image.size
    side, (target, last_height) = max(width, height), size
    colour = tuple(min(max(int(mean * 255), 0), 255) for mean in spec.image_mean)
    left, top = (side - width) // 2, (side - height) // 2
    (first, last), (begin, end) = _columns(left, width, side, target)
    scale = side / target
    narrow = Image.new("RGB", (target, side), colour)
    step = max(1, _STRIP_PIXELS // (end - begin))
    for upper in range(0, height, step):
        lower = min(upper + step, height)
        strip = Image.new("RGB", (end - begin, lower - upper), colour)
        strip.paste(image.crop((0, upper, width, lower)), (left - begin, 0))
        box = (first * scale - begin, 0, last * scale - begin, lower - upper)
        narrow.paste(strip.resize((last - first, lower - upper), Image.Resampling.BICUBIC, box), (first, top + upper))
    return narrow.resize((target, last_height), Image.Resampling.BICUBIC)


def _columns(left: int, width: int, side: int, target: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The resized columns that a picture at ``left`` touches, and the padded columns those are made of.

    All of them, unless the picture is so narrow that most would be padding made of padding.
    """
    if 4 * width > side:
        return (0, target), (0, side)
    scale = side / target
    reach = 2 * max(scale, 1)  # Of the bicubic filter, in padded columns.
    first = max(0, math.floor((left - reach) / scale) - 1)
    last = min(target, math.ceil((left + width + reach) / scale) + 1)
    begin = max(0, math.floor(first * scale - reach) - 1)
    end = min(side, math.ceil(last * scale + reach) + 1)
    return (first, last), (begin, end)
