"""A mirror of the key-value cache: which cells are taken, and where every sequence stands.

llama.cpp answers a full cache with an error in the middle of a batch; the mirror answers before. Plain lists: most
calls are about one row, for which arrays take longer.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray


class Cells:
    """``n_cells`` cells shared by ``n_sequences`` sequences; a forked cell is taken once, whoever shares it."""

    def __init__(self, n_cells: int, n_sequences: int) -> None:
        self.n_cells = n_cells
        self._free = list(range(n_cells))
        self._uses = [0] * n_cells
        self._position = [0] * n_cells
        # The highest position of any section up to and including this row: where following text may start.
        self._reach = [0] * n_cells
        self._members: list[list[int]] = [[] for _ in range(n_sequences)]

    @property
    def room(self) -> int:
        """Cells that nobody uses."""
        return len(self._free)

    def rows(self, sequence: int) -> int:
        """Rows held by ``sequence``."""
        return len(self._members[sequence])

    def last(self, sequence: int) -> int:
        """The last row's (temporal) position, -1 for an empty sequence."""
        members = self._members[sequence]
        return self._position[members[-1]] if members else -1

    def length(self, sequence: int) -> int:
        """The position at which text may follow."""
        members = self._members[sequence]
        return self._reach[members[-1]] + 1 if members else 0

    def add(self, sequence: int, positions: NDArray[np.int32]) -> None:
        """Take cells for rows at ``positions``, ``(n,)`` or ``(4, n)``; there must be room."""
        times: list[int] = (positions if positions.ndim == 1 else positions[0]).tolist()
        highest: list[int] = times if positions.ndim == 1 else positions.max(axis=0).tolist()
        if len(times) > len(self._free):
            raise ValueError(f"{len(times)} rows do not fit into {len(self._free)} free cells")
        reach = self.length(sequence) - 1
        for time, most in zip(times, highest, strict=True):
            cell = self._free.pop()
            reach = max(reach, most)
            self._position[cell], self._reach[cell], self._uses[cell] = time, reach, 1
            self._members[sequence].append(cell)

    def fork(self, source: int, target: int) -> None:
        """Let ``target`` share every row of ``source``."""
        self._members[target] = list(self._members[source])
        for cell in self._members[target]:
            self._uses[cell] += 1

    def drop(self, sequence: int, start: int = 0) -> None:
        """Release rows whose (temporal) position is ``start`` or later."""
        members = self._members[sequence]
        kept = bisect_left(members, start, key=self._position.__getitem__)
        for cell in members[kept:]:
            self._uses[cell] -= 1
            if not self._uses[cell]:
                self._free.append(cell)
        del members[kept:]

    def clear(self) -> None:
        """Release everything."""
        for sequence in range(len(self._members)):
            self.drop(sequence)
