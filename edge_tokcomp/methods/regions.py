"""Even splits of a grid into any number of regions, shared by ``uniform`` and ``pool``."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np

from ..budget import share
from ..tokens import Ints
from .base import Candidates


def regions(rows: Candidates, k: int) -> tuple[Ints, Ints]:
    """Split one crop into ``k`` regions: ``(centres (k,), region of each row (n,))``, both int64.

    A crop whose rows fill its grid is split in two dimensions; one with holes is cut into even runs of raster order.
    """
    (height, width), order = rows.grids[0], np.argsort(rows.cell, kind="stable")
    label = np.empty(len(rows), np.int64)
    if np.array_equal(rows.cell[order], np.arange(height * width)):
        centres, labels = split(height, width, k)
        label[order] = labels
        return order[list(centres)], label
    edges = np.arange(k + 1) * len(rows) // k
    label[order] = np.repeat(np.arange(k), np.diff(edges))
    return order[(edges[:-1] + edges[1:] - 1) // 2], label


@lru_cache(maxsize=64)
def split(height: int, width: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``k`` rectangles that tile a ``height x width`` grid: the raster index of each centre, each cell's rectangle.

    The grid is cut into r bands of rows and each band into about k/r columns. Of all r, the one with the smallest mean
    squared distance from a cell to its rectangle's centre wins: that favours rectangles both square and equal.
    """
    tilings = (_bands(height, width, k, r) for r in range(-(-k // width), min(height, k) + 1))
    best = min(tilings, key=_spread)
    label = np.empty((height, width), np.int64)
    for number, (top, bottom, left, right) in enumerate(best):
        label[top:bottom, left:right] = number
    centres = tuple((top + bottom - 1) // 2 * width + (left + right - 1) // 2 for top, bottom, left, right in best)
    return centres, tuple(label.ravel().tolist())


def _bands(height: int, width: int, k: int, r: int) -> list[tuple[int, int, int, int]]:
    """``(top, bottom, left, right)`` of the rectangles of ``r`` bands.

    Band heights differ by one row at most and ``r <= k``, so largest remainders leave no band without a rectangle.
    """
    edges = [i * height // r for i in range(r + 1)]
    columns = share(k, [bottom - top for top, bottom in pairwise(edges)], [width] * r)
    return [
        (edges[band], edges[band + 1], j * width // count, (j + 1) * width // count)
        for band, count in enumerate(columns)
        for j in range(count)
    ]


def _spread(tiles: list[tuple[int, int, int, int]]) -> int:
    """12 times the summed squared distance of cells to their rectangle's centre (an exact integer)."""
    total = 0
    for top, bottom, left, right in tiles:
        h, w = bottom - top, right - left
        total += h * w * (h * h + w * w - 2)
    return total
