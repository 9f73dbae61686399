"""Idefics3, SmolVLM and SmolVLM2: square tiles and an overview, SigLIP tower, pixel shuffle and one linear.

**Pictures.** As their Hugging Face processor does: the longer side is brought to ``longest_edge``, small pictures
enlarged; both sides are stretched to whole tiles, which are cut out; the overview, one tile, is that stretched picture
made small. All by Lanczos, each from the one before. A picture of one tile is the overview alone.

**Tokens.** Squares of ``merge`` patches a side are laid end to end (pixel shuffle). A tower of 384 pixels in patches
of 14 leaves the last 6 out.

**Text.** ``<fake_token_around_image><row_1_col_1>`` before a tile, a newline after each row of tiles, an empty line
and ``<fake_token_around_image><global-img>`` before the overview, ``<fake_token_around_image>`` after it.

**llama.cpp** reads the same tiles since pull request 28273 (issue 16776). Where a picture is one tile it writes that
one with ``<row_1_col_1>`` and then the overview, the same pixels again. Files from before pull request 16206 do not say
how long the longer side is; it then stretches a picture to the nearest whole tiles. All published checkpoints say four
tiles.

**Norms.** The converter writes an epsilon of 1e-5 where the checkpoint's configuration names none, as that of SmolVLM2;
transformers then takes SigLIP's, 1e-6.
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
from edge_tokcomp.families.pictures import LANCZOS, check_picture, cut, normalised, resized
from edge_tokcomp.families.tower_spec import Limits, Step, TowerSpec
from edge_tokcomp.tokens import Layout

_LONGEST_TILES = 4
"""Tiles along the longer side, of a file that does not say how long that is."""
_LONGEST_EDGE = 4096
"""Pixels; what the Hugging Face processors limit it to."""
_CONVERTERS_EPS, _SIGLIPS_EPS = 1e-5, 1e-6
_AROUND = "<fake_token_around_image>"


@dataclass(frozen=True)
class Idefics3:
    """See the module's text."""

    name: str = "idefics3"
    models: str = "SmolVLM, SmolVLM2, Idefics3"
    projectors: tuple[str, ...] = ("idefics3",)
    causal: bool = True
    positions: Literal["line", "grid"] = "line"
    markers: tuple[str, ...] = ("<image>",)
    written: str = "<image>"

    def matches(self, metadata: Metadata) -> bool:
        return projector_type(metadata) == "idefics3"

    def spec(self, metadata: Metadata, shapes: TensorShapes) -> TowerSpec:
        values = vit_values(metadata, shapes)
        if math.isclose(values["eps"], _CONVERTERS_EPS, rel_tol=1e-3):
            values["eps"] = _SIGLIPS_EPS
        usual = _LONGEST_TILES * values["image_size"]
        longest = read_optional_integer(metadata, "clip.vision.preproc_image_size", usual)
        return TowerSpec(
            family=self.name,
            activation="gelu_tanh",
            projector=(Step("linear", "mm.model.fc", bias=False),),
            class_token=False,
            attention_block=None,
            post_norm=True,
            merge=read_integer(metadata, "clip.vision.projector.scale_factor"),
            limits=Limits(longest_edge=min(longest, _LONGEST_EDGE)),
            **values,
        )

    def preprocess(self, image: Image.Image, spec: TowerSpec, grid: tuple[int, int] | None = None) -> Pixels:
        check_picture(image)
        if spec.limits.longest_edge is None:
            raise TokcompError("the tower's description is without a longest edge; export the tower again")
        height, width = _to_longest(image.height, image.width, spec.limits.longest_edge)
        rows, columns = _tiles(height, width, spec.image_size)
        tall, wide = (spec.image_size,) * 2 if grid is None else (side * spec.unit for side in grid)
        whole = resized(resized(image, height, width, LANCZOS), rows * tall, columns * wide, LANCZOS)
        crops = [*cut(whole, rows, columns), resized(whole, tall, wide, LANCZOS)] if rows * columns > 1 else [whole]
        return Pixels(
            tuple(normalised(crop, spec) for crop in crops), (grid or spec.grid,) * len(crops),
            (image.height, image.width), (rows, columns),
        )  # fmt: skip

    def layout(self, pixels: Pixels, spec: TowerSpec) -> Layout:
        last = len(pixels.grids) - 1
        return Layout.of_grids(*pixels.grids, overview=last or None)

    def prompt(self, pixels: Pixels) -> tuple[Part, ...]:
        columns, last = pixels.tiles[1], len(pixels.crops) - 1
        parts: list[Part] = []
        for number in range(last):
            row, column = divmod(number, columns)
            line_end = "\n" if row and not column else ""
            parts += [f"{line_end}{_AROUND}<row_{row + 1}_col_{column + 1}>", (number,)]
        empty_line = "\n\n" if last else ""
        return *parts, f"{empty_line}{_AROUND}<global-img>", (last,), _AROUND


def _to_longest(height: int, width: int, longest: int) -> tuple[int, int]:
    """Height and width in proportion, the longer one ``longest``, the other even or 1."""
    ratio = width / height
    if width >= height:
        return _even(int(longest / ratio)), longest
    return longest, _even(int(longest * ratio))


def _even(length: int) -> int:
    return max(length + length % 2, 1)


def _tiles(height: int, width: int, side: int) -> tuple[int, int]:
    """Rows and columns of tiles; the shorter side is counted after the longer one has grown to whole tiles."""
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / side)
        return math.ceil(int(columns * side / ratio) / side), columns
    rows = math.ceil(height / side)
    return rows, math.ceil(int(rows * side * ratio) / side)
