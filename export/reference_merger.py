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
    """Merges the patches of ``batch`` pictures of ``own`` patches between the blocks of a tower; ``lead`` rows before
    them stay, and ``window`` is a window's side, None without.

    ``owners``: ``(B, N) int64`` after each merge so far. ``found``: the same of an export that ran on these pictures: a
    pair it merged counts as more alike by ``slack``, and one it did not as less, so that it is followed where noise
    below ``slack`` can have decided, and nowhere else.
    """

    def __init__(
        self, variant: TowerVariant, batch: int, own: tuple[int, int], lead: int, window: int | None,
        found: tuple[Ints, ...], slack: float,
    ) -> None:  # fmt: skip
        self.owners: tuple[Ints, ...] = ()
        self.grid = own
        """Rows and columns by now."""
        self._variant, self._own, self._lead, self._window = variant, own, lead, window
        self._found, self._slack = found, slack
        self._grids: list[MergedGrid] = []
        self._owner: Ints = np.tile(np.arange(own[0] * own[1]), (batch, 1))

    @property
    def log_sizes(self) -> Floats:
        """``(B, rows)``, or ``(1, 1)`` as long as nothing is merged or sizes do not count."""
        if not (self._grids and self._variant.proportional):
            return np.zeros((1, 1), np.float32)
        logs = np.log([grid.size.ravel() for grid in self._grids])
        return np.pad(logs, ((0, 0), (self._lead, 0))).astype(np.float32)

    @property
    def positions(self) -> Floats:
        """``(B, cells, 2)``: mean row and column of the patches that each cell stands for."""
        places = np.stack(np.divmod(np.arange(self._own[0] * self._own[1]), self._own[1]), axis=1)
        return self.means(np.tile(places, (len(self._owner), 1, 1)).astype(np.float32))

    @property
    def near(self) -> NDArray[np.bool_]:
        """``(B, cells, cells)``: whether two cells stand for patches of one window."""
        if self._window is None:
            raise ValueError("attention is not windowed")
        row, column = np.divmod(np.arange(self._own[0] * self._own[1]), self._own[1])
        window = row // self._window * self._own[1] + column // self._window
        cells = np.full((len(self._owner), self.grid[0] * self.grid[1]), -1)
        np.put_along_axis(cells, self._owner, np.broadcast_to(window, self._owner.shape), axis=1)
        return np.asarray(cells[:, :, None] == cells[:, None])

    def spread(self, rows: Floats) -> Floats:
        """``rows (B, cells, D)`` of the cells by now to the patches they stand for, ``(B, N, D)``."""
        return np.take_along_axis(rows, self._owner[..., None], axis=1)

    def means(self, patches: Floats) -> Floats:
        """``patches (B, N, D)`` averaged over what each cell stands for by now, ``(B, cells, D)``."""
        summed = np.zeros((len(patches), self.grid[0] * self.grid[1], patches.shape[2]))
        for picture, owner in enumerate(self._owner):
            np.add.at(summed[picture], owner, patches[picture])
        sizes = np.stack([np.bincount(owner, minlength=summed.shape[1]) for owner in self._owner])
        return (summed / sizes[..., None]).astype(np.float32)

    def after(self, block: int, x: Floats, keys: Floats) -> Floats:
        """``x (B, rows, D)`` after the merges that follow ``block``, by ``keys (B, rows, Dk)``."""
        merges = [merge for merge in self._variant.merges if merge.block == block]
        if not merges:
            return x
        cells, cell_keys = (rows[:, self._lead :].reshape(len(x), *self.grid, -1) for rows in (x, keys))
        now = [MergedGrid.of(*pair, self._window) for pair in zip(cells, cell_keys, strict=True)]
        if self._grids:
            now = [
                replace(new, size=old.size, owner=old.owner, down=old.down, across=old.across)
                for new, old in zip(now, self._grids, strict=True)
            ]
        for merge in merges:
            now = [self._merged(each, merge, number) for number, each in enumerate(now)]
            self._owner = np.stack([each.owner for each in now])
            self.owners = (*self.owners, self._owner)
        self._grids, self.grid = now, now[0].size.shape
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
