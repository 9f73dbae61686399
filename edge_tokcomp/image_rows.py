"""What of a picture enters the language model: its kept rows, the family's text between crops, and where they stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .families.base import Part
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
    parts: Sequence[Part], kept: Floats, plan: Plan, layout: Layout, embed: Callable[[str], Floats], *, on_grid: bool
) -> ImageRows:
    """``kept (n, width)``: the rows of ``plan``, put where ``parts`` say.

    ``on_grid``: rows stand at their row and column of the uncompressed picture's grid, which is one crop (M-RoPE), and
    the text after it where that grid ends; else they are counted.
    """
    order = plan.keep if plan.order is None else plan.order
    crop = layout.crop[order]
    if on_grid:
        (grid,) = layout.grids
        if parts != ((0,),):
            raise ValueError(f"rows on a grid stand by themselves, not as {parts}")
        row, column = np.divmod(layout.cell[order], grid[1])
        nothing = np.zeros_like(row)
        return ImageRows(kept, crop, np.stack([nothing, row, column, nothing]).astype(np.int32), max(grid))
    pieces, owners = [kept[:0]], [crop[:0]]
    for part in parts:
        if isinstance(part, str):
            pieces.append(embed(part))
            owners.append(np.full(len(pieces[-1]), -1, np.int64))
        else:
            inside = np.isin(crop, part)
            pieces.append(kept[inside])
            owners.append(crop[inside])
    rows = np.concatenate(pieces)
    return ImageRows(rows, np.concatenate(owners), np.arange(len(rows), dtype=np.int32), len(rows))
