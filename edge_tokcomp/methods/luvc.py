"""LUVC's vision half (arXiv 2512.09010): patches merge with their neighbours inside the tower, row by row, then column
by column, until as few are left as asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import UsageError
from ..variant import Merge, Sharing, TowerVariant, most_pairs
from .base import TowerMethod
from .resolution import in_proportion


@dataclass(frozen=True)
class LUVC(TowerMethod):
    """The Orthogonal Iterative Merger between the tower's blocks; what a merge is stands in ``oim.py``.

    From the paper (abstract): merging inside the tower, iterative, orthogonal in the spatial axes. Ours, since its full
    text was not to be had: the grid shrinks to one of at most K cells in the proportions of its own, by the same factor
    in every pass, in as few passes as greedy pairing allows or ``passes``; passes follow blocks spread evenly from
    ``first`` to ``last``, as fractions of the depth. ``sharing``: whether every line merges its own pairs.
    ``proportional``: later blocks attend to a merged patch as to all it stands for (ToMe).

    The defaults were chosen on tuning scenes of the demo tasks (docs/luvc): pairs of each line's own are worth 3 points
    at 256 tokens and 15 at 64, proportional attention 2 and 3, more passes than needed cost 1. The later the passes the
    better the answers and the slower the tower; the middle of the depth is the compromise.
    Its language half is the layer step ``spectrum``.
    """

    first: float = 0.5
    last: float = 1.0
    passes: int | None = None
    sharing: Sharing = "per-line"
    proportional: bool = True

    name: ClassVar[str] = "luvc"
    title: ClassVar[str] = "LUVC-style merging in the tower (OIM)"
    source: ClassVar[str] = "arXiv 2512.09010, abstract; the schedule is a reconstruction"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first <= self.last <= 1:
            raise UsageError(f"luvc: first {self.first} and last {self.last} must ascend between 0 and 1")
        if self.passes is not None and self.passes < 1:
            raise UsageError(f"luvc: passes must be 1 or more, got {self.passes}")

    def variant(self, wanted: int, grid: tuple[int, int], blocks: int, side: int = 1) -> TowerVariant:
        """The merges that lead from the patches of ``grid`` to those of the grid wanted.

        Raises ``UsageError`` for a tower of one block, and more passes than there are lines.
        """
        if blocks < 2:
            raise UsageError(f"luvc merges between blocks, and this tower has {blocks}; choose another method")
        target = tuple(length * side for length in in_proportion(wanted, grid))
        grid = grid[0] * side, grid[1] * side
        if self.passes is not None and self.passes > sum(grid):
            raise UsageError(f"luvc: {self.passes} passes over {grid[0]} x {grid[1]} patches; name {sum(grid)} at most")
        least = max(fewest_passes(a, b) for a, b in zip(grid, target, strict=True))
        passes = max(least, self.passes or 1)
        rows, columns = (-np.diff(steps(grid[axis], target[axis], passes)) for axis in (1, 0))
        places = np.linspace(self.first * (blocks - 2), self.last * (blocks - 2), passes)
        merges = tuple(
            Merge(int(place + 0.5), int(across), int(down))
            for place, across, down in zip(places, rows, columns, strict=True)
            if across + down
        )
        return TowerVariant(merges=merges, sharing=self.sharing, proportional=self.proportional)


def fewest_passes(length: int, target: int) -> int:
    """Passes of greedy pairing that a line of ``length`` cells needs at least to shrink to ``target``."""
    count = 0
    while length > target:
        length, count = max(target, length - most_pairs(length)), count + 1
    return count


def steps(length: int, target: int, passes: int) -> list[int]:
    """``passes + 1`` lengths from ``length`` to ``target``, each about the same share of the one before it, and never
    fewer than one pass of greedy pairing leaves of it."""
    found = [length]
    for left in range(passes, 0, -1):
        now = found[-1]
        even = math.floor(now * (target / now) ** (1 / left) + 0.5)
        found.append(max(target, min(now, even), now - most_pairs(now)))
    return found
