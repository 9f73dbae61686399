"""The merger of the NumPy reference, which grants an export the choices that rounding decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.methods.oim import MergedGrid
from edge_tokcomp.tokens import Ints
from edge_tokcomp.variant import Merge, TowerVariant

Floats = NDArray[np.float32]


class ReferenceMerger:
    """Merges the patches of several pictures between the blocks of a tower; ``lead`` rows before them stay.

    ``owners``: ``(B, N) int64`` after each merge so far. ``found``: the same of an export that ran on these pictures: a
    pair it merged counts as more alike by ``slack``, and one it did not as less, so that it is followed where noise
    below ``slack`` can have decided, and nowhere else.
    """

    def __init__(self, variant: TowerVariant, lead: int, found: tuple[Ints, ...], slack: float) -> None:
        self.owners: tuple[Ints, ...] = ()
        self._variant, self._lead, self._found, self._slack = variant, lead, found, slack
        self._grids: list[MergedGrid] = []

    @property
    def log_sizes(self) -> Floats:
        """``(B, rows)``, or ``(1, 1)`` as long as nothing is merged or sizes do not count."""
        if not (self._grids and self._variant.proportional):
            return np.zeros((1, 1), np.float32)
        logs = np.log([grid.size.ravel() for grid in self._grids])
        return np.pad(logs, ((0, 0), (self._lead, 0))).astype(np.float32)

    def grid(self, own: tuple[int, int]) -> tuple[int, int]:
        """The patches by now of pictures that had ``own``."""
        return self._grids[0].size.shape if self._grids else own

    def after(self, block: int, x: Floats, keys: Floats, grid: tuple[int, int]) -> Floats:
        """``x (B, rows, D)`` after the merges that follow ``block``; ``grid``: of the picture."""
        merges = [merge for merge in self._variant.merges if merge.block == block]
        if not merges:
            return x
        shape = self._grids[0].size.shape if self._grids else grid
        cells, cell_keys = (rows[:, self._lead :].reshape(len(x), *shape, -1) for rows in (x, keys))
        now = [MergedGrid.of(*pair) for pair in zip(cells, cell_keys, strict=True)]
        if self._grids:
            pairs = zip(now, self._grids, strict=True)
            now = [replace(new, size=old.size, owner=old.owner) for new, old in pairs]
        for merge in merges:
            now = [self._merged(each, merge, number) for number, each in enumerate(now)]
            self.owners = (*self.owners, np.stack([each.owner for each in now]))
        self._grids = now
        patches = np.stack([each.features.reshape(-1, x.shape[2]) for each in now])
        return np.concatenate([x[:, : self._lead], patches], axis=1)

    def _merged(self, grid: MergedGrid, merge: Merge, picture: int) -> MergedGrid:
        sharing, number = self._variant.sharing, len(self.owners)
        if number >= len(self._found):
            return grid.merge_rows(merge.rows, sharing).merge_columns(merge.columns, sharing)
        height, width = grid.size.shape
        cell = np.zeros(height * width, np.int64)
        cell[grid.owner] = self._found[number][picture]
        # Merging columns leaves every cell in its column: that is the one it came to when rows were merged.
        row, column = (place.reshape(height, width) for place in np.divmod(cell, width - merge.rows))
        grid = grid.merge_rows(merge.rows, sharing, self._nudge(column))
        row_of_merged = np.zeros(grid.size.shape, np.int64)
        np.put_along_axis(row_of_merged, column, row, axis=1)
        return grid.merge_columns(merge.columns, sharing, self._nudge(row_of_merged.T))

    def _nudge(self, into: Ints) -> NDArray[np.float64]:
        """For lines of cells that go ``into`` one place or another."""
        return np.where(into[:, 1:] == into[:, :-1], self._slack, -self._slack)
