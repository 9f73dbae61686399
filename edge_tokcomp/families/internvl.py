"""InternVL 2, 2.5, 3 and 3.5: square tiles and a thumbnail, InternViT, pixel shuffle and a two-layer MLP.

**Pictures.** As the Hugging Face processor and OpenGVLab's own code do: of all grids of ``min_tiles`` to ``max_tiles``
tiles the one whose proportions are nearest to the picture's is taken, the larger of two as near if the picture has more
than half its pixels; the picture is stretched to it and cut. A thumbnail comes last, unless there is one tile only.
Where several grids of as many tiles are as near, the two codes go through them in another order; ours is transformers'.

**Towers.** The 300M InternViT has layer norms, the 6B one (InternVL 2.5 and 3 from 26B on) RMS norms, normalised
queries and keys, and no biases on these and the values; all scale what a block adds. Files do not say so, the tensors
do. The CLS row is dropped before squares of ``merge`` patches are laid end to end, so that no method can keep it; what
it attends to is summed over each square. There is no norm after the last block.

**Text.** ``<img>`` before the first tile, ``</img>`` behind the thumbnail, nothing between. OpenGVLab's templates take
strings, an image in them being ``<image>``; those of the ``-hf`` checkpoints write ``<IMG_CONTEXT>``.

**llama.cpp** treats pictures as LLaVA-1.6's: the grid that shows most of their pixels, the picture in it in proportion
between black bars, none of it if one tile holds the picture, a thumbnail beside a single tile too. It puts the CLS row
behind the patches and leaves the table of positions as it is, so that each patch has the position of the one before it
(issue 25814 says so of LLaVA; of InternVL none is known, 15528, closed as stale, tells of such symptoms).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.families.base import (
    Metadata,
    Part,
    Pixels,
    TensorShapes,
    projector_type,
    read_integer,
    read_optional_integer,
    vit_values,
)
from edge_tokcomp.families.pictures import BICUBIC, check_picture, cut, normalised, resized
from edge_tokcomp.families.tower_spec import Limits, Step, TowerSpec
from edge_tokcomp.tokens import Layout

_LEAST_TILES, _MOST_TILES = 1, 12
"""Of a file that does not say, as those of InternVL 2."""


@dataclass(frozen=True)
class InternVL:
    """See the module's text."""

    name: str = "internvl"
    models: str = "InternVL 2, 2.5, 3 and 3.5"
    projectors: tuple[str, ...] = ("internvl",)
    causal: bool = True
    positions: Literal["line", "grid"] = "line"
    markers: tuple[str, ...] = ("<image>", "<IMG_CONTEXT>")
    written: str = "<image>\n"

    def matches(self, metadata: Metadata) -> bool:
        return projector_type(metadata) == "internvl"

    def spec(self, metadata: Metadata, shapes: TensorShapes) -> TowerSpec:
        values = vit_values(metadata, shapes)
        return TowerSpec(
            family=self.name,
            activation="silu" if metadata.get("clip.use_silu") is True else "gelu",
            projector=(
                Step("layer_norm", "mm.model.mlp.0"), Step("linear", "mm.model.mlp.1"), Step("gelu"),
                Step("linear", "mm.model.mlp.3"),
            ),
            class_token=True,
            attention_block=values["blocks"] - 1,
            norm="layer" if "v.blk.0.ln1.bias" in shapes else "rms",
            qkv_bias="v.blk.0.attn_q.bias" in shapes or "v.blk.0.attn_qkv.bias" in shapes,
            qk_norm="v.blk.0.attn_q_norm.weight" in shapes,
            layer_scale="v.blk.0.ls1.weight" in shapes,
            merge=read_integer(metadata, "clip.vision.projector.scale_factor"),
            limits=Limits(
                min_tiles=read_optional_integer(metadata, "clip.vision.preproc_min_tiles", _LEAST_TILES),
                max_tiles=read_optional_integer(metadata, "clip.vision.preproc_max_tiles", _MOST_TILES),
            ),
            **values,
        )  # fmt: skip

    def preprocess(self, image: Image.Image, spec: TowerSpec, grid: tuple[int, int] | None = None) -> Pixels:
        check_picture(image)
        if spec.limits.min_tiles is None or spec.limits.max_tiles is None:
            raise TokcompError("the tower's description is without limits of tiles; export the tower again")
        rows, columns = _tiles(image.height, image.width, spec.image_size, spec.limits.min_tiles, spec.limits.max_tiles)
        tall, wide = (spec.image_size,) * 2 if grid is None else (side * spec.unit for side in grid)
        crops = cut(resized(image, rows * tall, columns * wide, BICUBIC), rows, columns)
        if len(crops) > 1:
            crops.append(resized(image, tall, wide, BICUBIC))
        return Pixels(
            tuple(normalised(crop, spec) for crop in crops), (grid or spec.grid,) * len(crops),
            (image.height, image.width), (rows, columns),
        )  # fmt: skip

    def layout(self, pixels: Pixels, spec: TowerSpec) -> Layout:
        return Layout.of_grids(*pixels.grids, overview=len(pixels.grids) - 1 or None)

    def prompt(self, pixels: Pixels) -> tuple[Part, ...]:
        return "<img>", tuple(range(len(pixels.crops))), "</img>"


def _tiles(height: int, width: int, side: int, least: int, most: int) -> tuple[int, int]:
    """Rows and columns of tiles of ``side`` pixels."""
    grids = [(r, c) for c in range(1, most + 1) for r in range(1, most + 1) if least <= r * c <= most]
    best, nearest = (1, 1), math.inf
    for rows, columns in sorted(grids, key=math.prod):
        apart = abs(width / height - columns / rows)
        more = apart == nearest and height * width > 0.5 * side * side * rows * columns
        if apart < nearest or more:
            best, nearest = (rows, columns), apart
    return best
