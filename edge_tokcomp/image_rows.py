"""What of a picture enters the language model: its kept rows, the family's text between crops, and where they stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .families.base import Part, Tokens
from .tokens import Ints, Layout, Plan

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ImageRows:
    """``embeddings (n, width) float32``; ``crop (n,) int64``: the crop each row is of, -1 for text.

    ``positions``: from the picture's first, ``(n,) int32``, or ``(4, n)`` for M-RoPE; ``advance``: how far behind that
    first one the text after the picture stands.
    """

    embeddings: Floats
    crop: Ints
    positions: NDArray[np.int32]
    advance: int

    def __len__(self) -> int:
        return len(self.embeddings)


def image_rows(
    parts: Sequence[Part],
    kept: Floats,
    plan: Plan,
    layout: Layout,
    embed: Callable[[str | Tokens], Floats],
    *,
    on_grid: bool,
) -> ImageRows:
    """``kept (n, width)``: the rows of ``plan``, put where ``parts`` say.

    ``on_grid``: rows stand at their row and column of the uncompressed crop's grid, all at one time, and what follows
    where that grid ends (M-RoPE); else they are counted.
    """
    order = plan.keep if plan.order is None else plan.order
    crop = layout.crop[order]
    pieces: list[tuple[Floats, Ints, NDArray[np.int32]]] = []
    start = 0
    for part in parts:
        if isinstance(part, tuple):
            inside = np.isin(crop, part)
            rows, owners = kept[inside], crop[inside]
            places, length = _counted(start, len(rows)), len(rows)
            if on_grid:
                (grid,) = (layout.grids[number] for number in part)
                row, column = np.divmod(layout.cell[order][inside], grid[1])
                places = np.stack([start + 0 * row, start + row, start + column, 0 * row]).astype(np.int32)
                length = max(grid)
        else:
            rows = embed(part)
            owners, length = np.full(len(rows), -1, np.int64), len(rows)
            places = _counted(start, length)
            if on_grid:
                places = np.stack([places, places, places, np.zeros_like(places)])
        pieces.append((rows, owners, places))
        start += length
    return ImageRows(
        np.concatenate([rows for rows, _, _ in pieces]), np.concatenate([owners for _, owners, _ in pieces]),
        np.concatenate([places for _, _, places in pieces], axis=-1), start,
    )  # fmt: skip


def _counted(start: int, count: int) -> NDArray[np.int32]:
    return np.arange(start, start + count, dtype=np.int32)
