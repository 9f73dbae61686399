"""LUVC's vision half (arXiv 2512.09010): patches merge with their neighbours inside the tower, row by row, then column
by column, until as few are left as asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import UsageError
from ..variant import Lengths, Merge, Sharing, TowerVariant, pieces, room, shrunk
from .resolution import in_proportion
from .tower_method import TowerMethod


@dataclass(frozen=True)
class LUVC(TowerMethod):
    """The Orthogonal Iterative Merger between the tower's blocks; what a merge is stands in ``oim.py``.

    From the paper (abstract): merging inside the tower, iterative, orthogonal in the spatial axes. Ours, since its full
    text was not to be had: the grid shrinks to one of at most K cells in the proportions of its own, by the same factor
    in every pass, in as few passes as greedy pairing allows or ``passes``; passes follow blocks spread evenly from
    ``first`` to ``last``, as fractions of the depth. ``sharing``: whether every line merges its own pairs.
    ``proportional``: later blocks attend to a merged patch as to all it stands for (ToMe).

    Any tower will do. With rotary positions a merged patch stands at the mean of those it stands for; windows of
    attention (Qwen2.5-VL) merge each their own patches, of which one at least is left, so that very small budgets are
    raised; levels taken on the way (Qwen3-VL) are averaged over what merges later.

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

    def variant(
        self, wanted: int, grid: tuple[int, int], blocks: int, side: int = 1, window: int | None = None
    ) -> TowerVariant:
        """The merges that lead from the patches of ``grid`` to those of the grid wanted, or the smallest that leaves a
        patch in every window.

        Raises ``UsageError`` for a tower of one block, and more passes than there are lines.
        """
        if blocks < 2:
            raise UsageError(f"luvc merges between blocks, and this tower has {blocks}; choose another method")
        lines = [pieces(length * side, window) for length in grid]
        if self.passes is not None and self.passes > sum(map(sum, lines)):
            height, width = map(sum, lines)
            most = height + width
            raise UsageError(f"luvc: {self.passes} passes over {height} x {width} patches; name {most} at most")
        least = [-(-len(line) // side) for line in lines]
        target = [max(a, b) * side for a, b in zip(in_proportion(wanted, grid), least, strict=True)]
        passes = max(self.passes or 1, *map(fewest_passes, lines, target))
        columns, rows = (-np.diff(steps(line, length, passes)) for line, length in zip(lines, target, strict=True))
        places = np.linspace(self.first * (blocks - 2), self.last * (blocks - 2), passes)
        merges = tuple(
            Merge(int(place + 0.5), int(across), int(down))
            for place, across, down in zip(places, rows, columns, strict=True)
            if across + down
        )
        return TowerVariant(merges=merges, sharing=self.sharing, proportional=self.proportional)


def fewest_passes(line: Lengths, target: int) -> int:
    """Passes of greedy pairing that a line of such pieces needs at least to shrink to ``target`` cells."""
    count = 0
    while sum(line) > target:
        line, count = shrunk(line, min(sum(line) - target, room(line))), count + 1
    return count


def steps(line: Lengths, target: int, passes: int) -> list[int]:
    """``passes + 1`` lengths from that of ``line`` to ``target``, each about the same share of the one before it, and
    never fewer than one pass of greedy pairing leaves of it, nor so many that the passes left cannot reach it."""
    found = [sum(line)]
    for left in range(passes, 0, -1):
        now = found[-1]
        even = math.floor(now * (target / now) ** (1 / left) + 0.5)
        pairs = min(now - max(target, min(now, even)), room(line))
        while fewest_passes(shrunk(line, pairs), target) > left - 1:
            pairs += 1
        line = shrunk(line, pairs)
        found.append(sum(line))
    return found
