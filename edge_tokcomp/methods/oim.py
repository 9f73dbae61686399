"""LUVC's Orthogonal Iterative Merger: neighbours on the grid merge, along rows and then along columns, and again.

From the paper (arXiv 2512.09010, abstract): merging inside the vision tower, iterative, orthogonal in the spatial axes,
a two-dimensional structure kept. Ours, since the full text was not to be had: only adjacent cells merge; every line
merges the same number of pairs, so that the grid stays a rectangle; pairs are taken greedily by the cosine of their
attention keys; a merged cell is the mean of all it stands for, and where positions are rotary it stands at their mean
position. Turning by a position is linear in it: of two patches that show the same, the mean of their turned keys points
where the key turned by the mean position does. Where attention is windowed, each window merges its own patches, and its
share of a line's pairs: every window then holds the patches it holds unmerged, and no others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..tokens import Ints
from ..variant import Lengths, Sharing, pieces, room, shrunk, spread
from .kernels import settle

Nudge = NDArray[np.float64]
"""``(lines, length - 1)``: added to the cosine of each cell of a line with the next."""


@dataclass(frozen=True, eq=False)
class MergedGrid:
    """A grid of tokens on the way through the merger.

    ``features (H, W, D)``, ``keys (H, W, Dk)``: what is merged, and what pairs are judged by. ``size (H, W) int64``:
    original cells each stands for. ``owner (N,) int64``: the cell, in raster order, that each original cell is now in.
    ``down``, ``across``: the pieces of columns and of rows between which nothing merges.
    """

    features: NDArray[np.float32]
    keys: NDArray[np.float32]
    size: Ints
    owner: Ints
    down: Lengths
    across: Lengths

    @classmethod
    def of(cls, features: NDArray[np.float32], keys: NDArray[np.float32], window: int | None = None) -> MergedGrid:
        """Nothing merged yet, in windows of ``window`` cells a side; raises ``ValueError`` unless both are
        ``(H, W, ...)`` of one grid."""
        if features.ndim != 3 or keys.ndim != 3 or features.shape[:2] != keys.shape[:2]:
            raise ValueError(f"features {features.shape} and keys {keys.shape} must be (H, W, D) of one grid")
        height, width = features.shape[:2]
        return cls(
            features, keys, np.ones((height, width), np.int64), np.arange(height * width), pieces(height, window),
            pieces(width, window),
        )  # fmt: skip

    def merge_rows(self, pairs: int, sharing: Sharing = "per-line", nudge: Nudge | None = None) -> MergedGrid:
        """Merge ``pairs`` disjoint neighbours in every row: width shrinks by ``pairs``.

        ``per-line``: each row its own pairs, which shears columns by up to ``pairs`` cells. ``shared``: the same pairs
        of columns in all rows, by their summed cosine. At most ``most_pairs`` of a line can be asked for, what greedy
        choice is sure to find; ``ValueError`` for more. ``nudge``: favours pairs that are nearly as alike as others.
        """
        height, width = self.size.shape
        if not 0 <= pairs <= room(self.across):
            raise ValueError(f"{pairs} pairs of a line of {width}: 0 to {room(self.across)} can be merged")
        joined = _joined(self.keys, spread(pairs, self.across), self.across, sharing, nudge)
        into = np.arange(width) - np.cumsum(joined, axis=1)  # (H, W): the new column of each cell
        cell = np.arange(height)[:, None] * (width - pairs) + into
        size = np.bincount(cell.ravel(), self.size.ravel(), height * (width - pairs)).astype(np.int64)
        shape = (height, width - pairs)
        return MergedGrid(
            _means(self.features, self.size, cell, size).reshape(*shape, -1),
            _means(self.keys, self.size, cell, size).reshape(*shape, -1),
            size.reshape(shape),
            cell.ravel()[self.owner],
            self.down,
            shrunk(self.across, pairs),
        )

    def merge_columns(self, pairs: int, sharing: Sharing = "per-line", nudge: Nudge | None = None) -> MergedGrid:
        """The same along columns: height shrinks by ``pairs``."""
        return self._turned().merge_rows(pairs, sharing, nudge)._turned()

    def _turned(self) -> MergedGrid:
        """Rows for columns; ``owner`` still speaks of the original cells in their order."""
        height, width = self.size.shape
        row, column = np.divmod(self.owner, width)
        return MergedGrid(
            self.features.swapaxes(0, 1), self.keys.swapaxes(0, 1), self.size.T, column * height + row, self.across,
            self.down,
        )  # fmt: skip


def _joined(
    keys: NDArray[np.float32], pairs: Lengths, across: Lengths, sharing: Sharing, nudge: Nudge | None
) -> NDArray[np.int64]:
    """``(H, W)``: 1 for the cells that join the one to their left, as many as there are ``pairs`` in each piece of a
    row."""
    height, width = keys.shape[:2]
    rows = keys.astype(np.float64)
    length = np.linalg.norm(rows, axis=2, keepdims=True)
    unit = rows / np.where(length > 0, length, 1)
    alike = np.sum(unit[:, :-1] * unit[:, 1:], axis=2) + (0 if nudge is None else nudge)
    if sharing == "shared":
        alike = np.mean(alike, axis=0, keepdims=True)
    alike = settle(alike)
    joined = np.zeros((len(alike), width), np.int64)
    lines, start = np.arange(len(alike)), 0
    for length, count in zip(across, pairs, strict=True):
        left = alike[:, start : start + length - 1]
        offsets = np.arange(length - 1)
        for _ in range(count):
            best = np.argmax(left, axis=1)
            joined[lines, start + best + 1] = 1
            left = np.where(np.abs(offsets - best[:, None]) <= 1, -np.inf, left)
        start += length
    return np.broadcast_to(joined, (height, width))


def _means(values: NDArray[np.float32], size: Ints, cell: Ints, total: Ints) -> NDArray[np.float32]:
    """``(cells, D)``: size-weighted means of ``values (H, W, D)`` by their new ``cell (H, W)``."""
    summed = np.zeros((len(total), values.shape[2]))
    np.add.at(summed, cell.ravel(), values.reshape(-1, values.shape[2]) * size.reshape(-1, 1).astype(np.float64))
    return (summed / total[:, None]).astype(np.float32)
