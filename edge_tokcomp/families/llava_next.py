"""LLaVA-NeXT (LLaVA-1.6): the whole picture as one crop and again in tiles, CLIP tower with CLS, two-layer MLP.

**Pictures.** As the Hugging Face processor does. The base crop is the picture squeezed into a square. For the tiles one
of the ``image_grid_pinpoints`` is chosen, the one that shows most of the picture's pixels and of these wastes least;
the picture is brought into it in proportion, between black bars, and cut. Every picture is cut, small ones too.

**Rows.** ``pack_image_features`` of transformers: the base crop, then all tiles as one large grid read row by row, a
newline behind each row. Rows and columns of the grid that the bars fill are left out: these cells are no rows at all,
so that a tile may have fewer rows than its grid has cells, or none. CLS rows stand before the base crop and, of tiles,
after everything, where the released codes of methods that keep them put them.

**Newlines** are rows of ``model.image_newline``, as llama.cpp's legacy converter calls it (``v.image_newline`` in newer
files). A file without it, made by the surgery script of LLaVA-1.5, gets none: its grid is fed row by row all the same.

**Pinpoints** are height and width, as transformers reads them; LLaVA's own code and llama.cpp read width and height.
The published lists hold each size both ways. Where two of them do as well, as for square pictures smaller than a tile,
the first is taken: transformers then lays two tiles side by side, LLaVA's own code one upon the other.

**llama.cpp** feeds other rows: tiles one after another, each in full, bars included, and the overview behind them
(since pull request 24769); no newlines (never used, says pull request 23545); of a picture that fits into one tile the
overview alone. Its tower is wrong as well, see ``llava15``. Issue 8457, closed as stale, tells of its worse answers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from edge_tokcomp.errors import TokcompError, UnsupportedError
from edge_tokcomp.families.base import Metadata, Part, Pixels, TensorShapes, projector_type
from edge_tokcomp.families.llava15 import clip_tower
from edge_tokcomp.families.pictures import BICUBIC, check_picture, cut, normalised, resized
from edge_tokcomp.families.tower_spec import Limits, TowerSpec
from edge_tokcomp.tokens import Ints, Layout, Role

_PINPOINTS, _MERGE_TYPE = "clip.vision.image_grid_pinpoints", "clip.vision.mm_patch_merge_type"
_NEWLINES = ("v.image_newline", "model.image_newline")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LlavaNext:
    """See the module's text."""

    name: str = "llava_next"
    models: str = "LLaVA-1.6 (LLaVA-NeXT) with a CLIP tower"
    projectors: tuple[str, ...] = ("mlp",)
    causal: bool = True
    positions: Literal["line", "grid"] = "line"
    markers: tuple[str, ...] = ("<image>",)
    written: str = "<image>\n"

    def matches(self, metadata: Metadata) -> bool:
        return projector_type(metadata) == "mlp" and _PINPOINTS in metadata

    def spec(self, metadata: Metadata, shapes: TensorShapes) -> TowerSpec:
        tower = clip_tower(self.name, metadata, shapes)
        merge_type = metadata.get(_MERGE_TYPE, "spatial_unpad")
        if merge_type != "spatial_unpad":
            raise UnsupportedError(f"{_MERGE_TYPE} {merge_type!r:.80} is not spatial_unpad and is not supported")
        limits = Limits(pinpoints=_pinpoints(metadata))
        separator = next((name for name in _NEWLINES if name in shapes), "")
        if not separator:
            _log.warning("the mmproj holds no image_newline: rows of tiles are fed one after another without newlines")
        return replace(tower, separator=separator, limits=limits)

    def preprocess(self, image: Image.Image, spec: TowerSpec, grid: tuple[int, int] | None = None) -> Pixels:
        check_picture(image)
        tall, wide = _best(image.height, image.width, spec.limits.pinpoints)
        rows, columns = tall // spec.image_size, wide // spec.image_size
        height, width = (spec.image_size,) * 2 if grid is None else (side * spec.patch_size for side in grid)
        base = resized(image, height, width, BICUBIC)
        tiles = [resized(tile, height, width, BICUBIC) for tile in cut(_between_bars(image, tall, wide), rows, columns)]
        return Pixels(
            tuple(normalised(crop, spec) for crop in (base, *tiles)), (grid or spec.grid,) * (1 + len(tiles)),
            (image.height, image.width), (rows, columns),
        )  # fmt: skip

    def layout(self, pixels: Pixels, spec: TowerSpec) -> Layout:
        base = Layout.of_grids(pixels.grids[0], cls_rows=True)
        crop, cell = _large_grid(pixels, spec)
        role = np.where(cell < 0, Role.SEPARATOR, Role.PATCH)
        tiles = np.arange(1, len(pixels.grids))
        return Layout(
            pixels.grids,
            np.concatenate([base.crop, crop, tiles]),
            np.concatenate([base.cell, cell, np.full(len(tiles), -1)]),
            np.concatenate([base.role, role, np.full(len(tiles), Role.CLS)]).astype(np.int8),
            overview=0,
        )

    def prompt(self, pixels: Pixels) -> tuple[Part, ...]:
        return (0,), tuple(range(1, len(pixels.crops)))


def _pinpoints(metadata: Metadata) -> tuple[tuple[int, int], ...]:
    """The sizes that tiles make up; raises ``TokcompError`` for what are no pairs of integers."""
    values = metadata[_PINPOINTS]
    if not isinstance(values, list) or not values or len(values) % 2 or not all(type(v) is int for v in values):
        raise TokcompError(f"{_PINPOINTS} {values!r:.80} are not heights and widths; convert the model again")
    return tuple(zip(values[::2], values[1::2], strict=True))


def _best(height: int, width: int, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The pinpoint that shows most of a picture's pixels, of these the one that wastes least, the first of several."""
    best, most, least = pinpoints[0], 0, math.inf
    for tall, wide in pinpoints:
        scale = min(wide / width, tall / height)
        shown = min(int(width * scale) * int(height * scale), height * width)
        wasted = tall * wide - shown
        if shown > most or (shown == most and wasted < least):
            best, most, least = (tall, wide), shown, wasted
    return best


def _between_bars(image: Image.Image, tall: int, wide: int) -> Image.Image:
    """The picture in proportion in the middle of a black one of ``wide`` by ``tall``."""
    across, down = wide / image.width, tall / image.height
    height, width = tall, min(math.ceil(image.width * down), wide)
    if across < down:
        height, width = min(math.ceil(image.height * across), tall), wide
    canvas = Image.new("RGB", (wide, tall))
    canvas.paste(resized(image, height, width, BICUBIC), ((wide - width) // 2, (tall - height) // 2))
    return canvas


def _large_grid(pixels: Pixels, spec: TowerSpec) -> tuple[Ints, Ints]:
    """Crop and cell of each row of the tiles' large grid, read row by row; the cell of a newline is -1."""
    (rows, columns), (down, across) = pixels.grids[1], pixels.tiles
    top, left = _bars(pixels.size, spec.grid[0] * down, spec.grid[1] * across)
    top, left = top * rows // spec.grid[0], left * columns // spec.grid[1]  # Of crops of fewer cells, whole ones.
    y, x = np.mgrid[top : rows * down - top, left : columns * across - left]
    crop = 1 + y // rows * across + x // columns
    cell = y % rows * columns + x % columns
    if spec.separator:
        lines = np.arange(top, rows * down - top)[:, None]
        crop = np.concatenate([crop, across + lines // rows * across], axis=1)
        cell = np.concatenate([cell, np.full_like(lines, -1)], axis=1)
    return crop.ravel(), cell.ravel()


def _bars(size: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """Cells of a grid that are cut off at its top and bottom, and at its left and right."""
    height, width = size
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2
