"""What entered a sequence, and which of it every layer segment still holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..tokens import Ints
from .batches import Stand


@dataclass(frozen=True, eq=False)
class History:
    """Of the rows that entered a sequence, in order: ``time (m,)``, their (temporal) positions as given; ``reach
    (m,)``, the highest position of any section up to here; ``image (m,) bool``.

    ``held``: for each segment the ascending numbers of the rows it holds.
    """

    time: Ints
    reach: Ints
    image: NDArray[np.bool_]
    held: tuple[Ints, ...]

    @classmethod
    def empty(cls, n_segments: int) -> History:
        """Of a sequence that nothing has entered."""
        nothing = np.zeros(0, np.int64)
        return cls(nothing, nothing, np.zeros(0, np.bool_), (nothing,) * n_segments)

    @property
    def stand(self) -> Stand:
        """The last row's position and the highest of all."""
        return (int(self.time[-1]), int(self.reach[-1])) if len(self.time) else (-1, -1)

    @property
    def layer_counts(self) -> list[int]:
        """Image rows that each segment holds."""
        return [int(self.image[rows].sum()) for rows in self.held]

    def add(self, positions: NDArray[np.int32], image: NDArray[np.bool_], kept: Sequence[Ints]) -> History:
        """With rows at ``positions``, ``(n,)`` or ``(4, n)``; ``kept``: those of them that each segment holds."""
        sections = np.atleast_2d(positions).astype(np.int64)
        reach = np.maximum(np.maximum.accumulate(sections.max(axis=0)), self.stand[1])
        return History(
            np.concatenate([self.time, sections[0]]), np.concatenate([self.reach, reach]),
            np.concatenate([self.image, image]),
            tuple(np.concatenate([rows, len(self.time) + new]) for rows, new in zip(self.held, kept, strict=True)),
        )  # fmt: skip

    def until(self, start: int) -> History:
        """Without the rows at position ``start`` and later."""
        count = int(np.searchsorted(self.time, start))
        held = tuple(rows[: np.searchsorted(rows, count)] for rows in self.held)
        return History(self.time[:count], self.reach[:count], self.image[:count], held)
