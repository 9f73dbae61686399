"""A mirror of the key-value cache: which cells are taken, and where every sequence stands.

llama.cpp answers a full cache with an error in the middle of a batch; the mirror answers before.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Cells:
    """``n_cells`` cells shared by ``n_sequences`` sequences; a forked cell is taken once, whoever shares it."""

    def __init__(self, n_cells: int, n_sequences: int) -> None:
        self.n_cells = n_cells
        self._uses = np.zeros(n_cells, np.int32)
        self._position = np.zeros(n_cells, np.int64)
        # The highest position of any section up to and including this row: where following text may start.
        self._reach = np.zeros(n_cells, np.int64)
        self._members: list[Ints] = [np.empty(0, np.int64) for _ in range(n_sequences)]

    @property
    def room(self) -> int:
        """Cells that nobody uses."""
        return int(self.n_cells - np.count_nonzero(self._uses))

    def rows(self, sequence: int) -> int:
        """Rows held by ``sequence``."""
        return len(self._members[sequence])

    def last(self, sequence: int) -> int:
        """The last row's (temporal) position, -1 for an empty sequence."""
        members = self._members[sequence]
        return int(self._position[members[-1]]) if len(members) else -1

    def length(self, sequence: int) -> int:
        """The position at which text may follow."""
        members = self._members[sequence]
        return int(self._reach[members[-1]]) + 1 if len(members) else 0

    def add(self, sequence: int, positions: NDArray[np.int32]) -> None:
        """Take cells for rows at ``positions``, ``(n,)`` or ``(4, n)``; there must be room."""
        sections = np.atleast_2d(positions).astype(np.int64)
        free = np.flatnonzero(self._uses == 0)[: sections.shape[1]]
        if len(free) < sections.shape[1]:
            raise ValueError(f"{sections.shape[1]} rows do not fit into {len(free)} free cells")
        reach = np.maximum(np.maximum.accumulate(sections.max(axis=0)), self.length(sequence) - 1)
        self._position[free], self._reach[free], self._uses[free] = sections[0], reach, 1
        self._members[sequence] = np.concatenate([self._members[sequence], free])

    def fork(self, source: int, target: int) -> None:
        """Let ``target`` share every row of ``source``."""
        self._members[target] = self._members[source].copy()
        self._uses[self._members[target]] += 1

    def drop(self, sequence: int, start: int = 0) -> None:
        """Release rows whose (temporal) position is ``start`` or later."""
        members = self._members[sequence]
        kept = int(np.searchsorted(self._position[members], start))
        self._uses[members[kept:]] -= 1
        self._members[sequence] = members[:kept].copy()

    def clear(self) -> None:
        """Release everything."""
        for sequence in range(len(self._members)):
            self.drop(sequence)
