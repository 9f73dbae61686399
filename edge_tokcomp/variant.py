"""What a tower can be asked to do otherwise: take smaller pictures, and merge patches on the way (LUVC's OIM).

Values only; the exporter turns them into graphs, ``methods/oim.py`` says what a merge is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .errors import UsageError

Sharing = Literal["per-line", "shared"]
"""Whether every line chooses its own pairs, or all lines merge the same ones."""

_LONGEST_SIDE = 1024
"""Patches; what nobody means to ask for is refused before memory is."""


def most_pairs(length: int) -> int:
    """Disjoint neighbours that greedy choice finds for certain in a line of ``length``."""
    return -(-(length - 1) // 3)


@dataclass(frozen=True)
class Merge:
    """After block ``block`` (from 0): merge ``rows`` pairs in every row of the grid, then ``columns`` in every column.

    The grid loses ``rows`` in width and ``columns`` in height. Raises ``UsageError`` for numbers that say nothing.
    """

    block: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        for name in ("block", "rows", "columns"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise UsageError(f"merge: {name} must be an integer from 0, got {value!r}")
        if not self.rows + self.columns:
            raise UsageError(f"merge after block {self.block}: no pairs asked for; name 1 or more a row or a column")

    def shrink(self, grid: tuple[int, int]) -> tuple[int, int]:
        """``(rows, columns)`` that are left of ``grid``; raises ``UsageError`` for more pairs than it surely has."""
        height, width = grid
        for pairs, length, line in ((self.rows, width, "row"), (self.columns, height, "column")):
            if pairs > most_pairs(length):
                raise UsageError(
                    f"merge after block {self.block}: {pairs} pairs in a {line} of {length} patches; "
                    f"at most {most_pairs(length)} can be merged at once"
                )
        return height - self.columns, width - self.rows


@dataclass(frozen=True)
class TowerVariant:
    """A way to run a tower.

    ``grid``: rows and columns of tokens a picture is resized to, None for the tower's own. ``merges``: of patches, in
    the order they are done, several after one block allowed. ``sharing``: see ``Sharing``. ``proportional``: later
    blocks attend to a merged patch as to all it stands for (ToMe's proportional attention). ``str`` gives a short text
    that is the same for the same variant, for cache keys. Raises ``UsageError`` for values that cannot be meant.
    """

    grid: tuple[int, int] | None = None
    merges: tuple[Merge, ...] = ()
    sharing: Sharing = "per-line"
    proportional: bool = True

    def __post_init__(self) -> None:
        if self.grid is not None and (
            len(self.grid) != 2 or not all(type(side) is int and 1 <= side <= _LONGEST_SIDE for side in self.grid)
        ):
            raise UsageError(f"grid must be rows and columns of patches, each 1 to {_LONGEST_SIDE}, got {self.grid!r}")
        blocks = [merge.block for merge in self.merges]
        if blocks != sorted(blocks):
            raise UsageError(f"merges must be in the order of their blocks, got {', '.join(map(str, blocks))}")
        if self.sharing not in get_args(Sharing):
            raise UsageError(f"unknown sharing {self.sharing!r}; one of {', '.join(get_args(Sharing))}")

    def final_grid(self, own: tuple[int, int], blocks: int, side: int = 1) -> tuple[int, int]:
        """``(H', W')``: the grid of the tokens of a tower of ``blocks`` blocks whose own is ``own``; each token is of
        ``side`` patches a side.

        Raises ``UsageError`` for a merge that asks for too many pairs or leaves no whole tokens, or that comes after a
        block that is not there or is the last: no block would be the faster for it.
        """
        rows, columns = self.grid or own
        grid = rows * side, columns * side
        for merge in self.merges:
            if merge.block > blocks - 2:
                raise UsageError(
                    f"merge after block {merge.block}: of {blocks} blocks, "
                    + (f"0 to {blocks - 2} have one after them" if blocks > 1 else "none has one after it")
                )
            grid = merge.shrink(grid)
        if grid[0] % side or grid[1] % side:
            raise UsageError(
                f"merges that leave {grid[0]} x {grid[1]} patches leave no whole tokens of {side} x {side}"
            )
        return grid[0] // side, grid[1] // side

    def __str__(self) -> str:
        parts = ["own" if self.grid is None else f"{self.grid[0]}x{self.grid[1]}"]
        if self.merges:
            parts += [f"{merge.block}:{merge.rows}x{merge.columns}" for merge in self.merges]
            parts += ["shared"] * (self.sharing == "shared") + ["unweighted"] * (not self.proportional)
        return "+".join(parts)


PLAIN = TowerVariant()
"""The tower as it is."""
