"""LFM2-VL and LFM2.5-VL: one crop of the picture's own shape, or tiles and such a crop as thumbnail; SigLIP2 NaFlex.

**Pictures.** A picture of up to twice the pixels of ``max_pixels`` (256 tokens) is resized in proportion to sides of
whole tokens, within ``min_pixels`` (64 tokens) and ``max_pixels``: one crop. A larger one is stretched to that grid of
2 to 10 tiles of 512 pixels whose shape is nearest, and the crop it would have been comes last, as thumbnail. All
bilinear. Files say nothing of this; the numbers are those of the present Hugging Face processor and of the LFM2.5-VL
checkpoints. (The first processor files of LFM2-VL-450M leave the thumbnail out, those of 1.6B begin to tile at 1.5
times, those of 3B resize bicubically.)

**Tower.** The table of positions, 16 by 16, is stretched to each crop's patches. The projector's norm is there in
LFM2-VL only. Its GELU is exact; llama.cpp computes the approximation by tanh, which is what the tower's blocks have.

**Text.** ``<|image_start|>`` and ``<|image_end|>`` around all, ``<|img_row_1_col_1|>`` before each tile and
``<|img_thumbnail|>`` before the thumbnail; a crop alone has none.

**llama.cpp** cuts and marks tiles likewise since pull requests 19454, 27057 and 27246, but keeps the picture's
proportions on black where the Hugging Face processor stretches it (pull request 17577 mended that for single crops
only), so that tiles of most pictures look otherwise. It rounds half a token up, where Python takes the even number
(272 pixels are 9 tokens, not 8), and compares proportions in single precision: of two grids that are as near it may
take the other.

**Language model.** Its layers of convolutions keep a state that can be copied whole, not cut back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from edge_tokcomp.errors import ImageError, TokcompError, UsageError
from edge_tokcomp.families.base import (
    Metadata,
    Part,
    Pixels,
    TensorShapes,
    first_side,
    projector_type,
    read_integer,
    read_optional_integer,
    vit_values,
)
from edge_tokcomp.families.pictures import BILINEAR, check_picture, cut, fit_area, normalised, resized
from edge_tokcomp.families.tower_spec import Limits, Step, TowerSpec
from edge_tokcomp.tokens import Layout

_TILE = 512
_LEAST_TOKENS, _MOST_TOKENS = 64, 256
_LEAST_TILES, _MOST_TILES = 2, 10
_TOLERANCE = 2.0
"""Times ``max_pixels`` that a picture may have and still be one crop."""
_NORM_EPS = 1e-5
"""torch's own; configurations name none."""


@dataclass(frozen=True)
class Lfm2VL:
    """See the module's text."""

    name: str = "lfm2vl"
    models: str = "LFM2-VL, LFM2.5-VL"
    projectors: tuple[str, ...] = ("lfm2",)
    causal: bool = True
    positions: Literal["line", "grid"] = "line"
    markers: tuple[str, ...] = ("<image>",)
    written: str = "<image>"

    def matches(self, metadata: Metadata) -> bool:
        return projector_type(metadata) == "lfm2"

    def spec(self, metadata: Metadata, shapes: TensorShapes) -> TowerSpec:
        patch = read_integer(metadata, "clip.vision.patch_size")
        merge = read_integer(metadata, "clip.vision.projector.scale_factor")
        unit = patch * merge
        if _TILE % unit:
            raise TokcompError(
                f"{merge} by {merge} patches of {patch} do not divide a tile of {_TILE} pixels; convert the model again"
            )
        limits = Limits(
            min_pixels=read_optional_integer(metadata, "clip.vision.image_min_pixels", _LEAST_TOKENS * unit**2),
            max_pixels=read_optional_integer(metadata, "clip.vision.image_max_pixels", _MOST_TOKENS * unit**2),
            min_tiles=read_optional_integer(metadata, "clip.vision.preproc_min_tiles", _LEAST_TILES),
            max_tiles=read_optional_integer(metadata, "clip.vision.preproc_max_tiles", _MOST_TILES),
        )
        side = math.isqrt(first_side(shapes, "v.position_embd.weight"))
        norm = (Step("layer_norm", "mm.input_norm", eps=_NORM_EPS),) if "mm.input_norm.weight" in shapes else ()
        return TowerSpec(
            family=self.name,
            image_size=side * patch,
            activation="gelu_tanh",
            projector=(*norm, Step("linear", "mm.1"), Step("gelu"), Step("linear", "mm.2")),
            class_token=False,
            attention_block=None,
            dynamic=True,
            post_norm="v.post_ln.weight" in shapes,
            positions="bilinear",
            merge=merge,
            limits=limits,
            **vit_values(metadata, shapes, without=("image_size",)),
        )

    def preprocess(self, image: Image.Image, spec: TowerSpec, grid: tuple[int, int] | None = None) -> Pixels:
        check_picture(image)
        if grid is not None:
            raise UsageError(f"{self.name} sizes pictures itself; choose another method than a lower resolution")
        least, most = spec.limits.min_pixels, spec.limits.max_pixels
        if least is None or most is None:
            raise TokcompError("the tower's description is without limits of pixels; export the tower again")
        unit = spec.unit
        height, width = fit_area(image.height, image.width, unit, least, most, shortest=unit)
        if height * width > most:
            raise ImageError(
                f"picture of {image.width}x{image.height} pixels: so narrow a one takes {height * width // unit**2} "
                f"tokens, {self.name} at most {most // unit**2}; cut it"
            )
        crops, (rows, columns) = [resized(image, height, width, BILINEAR)], (1, 1)
        if _is_large(image, spec):
            rows, columns = _nearest_grid(image.height, image.width, spec.limits)
        if rows * columns > 1:
            crops[:0] = cut(resized(image, rows * _TILE, columns * _TILE, BILINEAR), rows, columns)
        return Pixels(
            tuple(normalised(crop, spec) for crop in crops),
            tuple((crop.height // unit, crop.width // unit) for crop in crops),
            (image.height, image.width), (rows, columns),
        )  # fmt: skip

    def layout(self, pixels: Pixels, spec: TowerSpec) -> Layout:
        last = len(pixels.grids) - 1
        return Layout.of_grids(*pixels.grids, overview=last or None)

    def prompt(self, pixels: Pixels) -> tuple[Part, ...]:
        columns, last = pixels.tiles[1], len(pixels.crops) - 1
        if not last:
            return "<|image_start|>", (0,), "<|image_end|>"
        parts: list[Part] = []
        for number in range(last):
            row, column = divmod(number, columns)
            start = "" if number else "<|image_start|>"
            parts += [f"{start}<|img_row_{row + 1}_col_{column + 1}|>", (number,)]
        return *parts, "<|img_thumbnail|>", (last,), "<|image_end|>"


def _is_large(image: Image.Image, spec: TowerSpec) -> bool:
    """Whether a picture is cut into tiles."""
    tall, wide = (max(spec.patch_size, round(side / spec.unit) * spec.unit) for side in (image.height, image.width))
    return spec.limits.max_pixels is not None and tall * wide > spec.limits.max_pixels * _TOLERANCE


def _nearest_grid(height: int, width: int, limits: Limits) -> tuple[int, int]:
    """Rows and columns of tiles, of all allowed numbers those whose proportion is nearest to the picture's.

    Of two that are as near, and of the same proportion in more tiles, the larger one where the picture has more than
    half its pixels.
    """
    least, most = limits.min_tiles or 1, limits.max_tiles or 1
    sizes = sorted(
        ((columns, rows) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)
         if columns * rows >= least),
        key=math.prod,
    )  # fmt: skip
    best, distance = (1, 1), math.inf
    for columns, rows in sizes:
        off = abs(width / height - columns / rows)
        if off < distance or (off == distance and height * width > 0.5 * _TILE**2 * columns * rows):
            best, distance = (rows, columns), off
    return best
