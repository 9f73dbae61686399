"""What a tower can be asked to do otherwise: take smaller pictures, merge patches on the way (LUVC's OIM), and say what
a block's attention looks at.

Values only; the exporter turns them into graphs, ``methods/oim.py`` says what a merge is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from .budget import share
from .errors import UsageError

Sharing = Literal["per-line", "shared"]
"""Whether every line chooses its own pairs, or all lines merge the same ones."""

Lengths = tuple[int, ...]
"""Of the pieces of a line of patches, between which nothing merges: the windows of towers whose attention has such, so
that each holds the patches it always holds; else one."""

_LONGEST_SIDE = 1024
"""Patches; what nobody means to ask for is refused before memory is."""


def pieces(length: int, side: int | None) -> Lengths:
    """A line of ``length`` in windows of ``side``, the last one what is left; whole without."""
    if side is None:
        return (length,)
    return tuple(min(side, length - start) for start in range(0, length, side))


def most_pairs(length: int) -> int:
    """Disjoint neighbours that greedy choice finds for certain in a line of ``length``."""
    return -(-(length - 1) // 3)


def room(lengths: Sequence[int]) -> int:
    """The same of a line in pieces."""
    return sum(map(most_pairs, lengths))


def spread(pairs: int, lengths: Sequence[int]) -> Lengths:
    """How many of a line's pairs each of its pieces merges: in proportion to their lengths, as far as they go."""
    return tuple(share(pairs, lengths, list(map(most_pairs, lengths))))


def shrunk(lengths: Lengths, pairs: int) -> Lengths:
    """What ``pairs`` leave of a line of such pieces."""
    return tuple(length - fewer for length, fewer in zip(lengths, spread(pairs, lengths), strict=True))


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

    def shrink(self, down: Lengths, across: Lengths) -> tuple[Lengths, Lengths]:
        """What is left of a grid of such columns and rows; raises ``UsageError`` for more pairs than it surely has."""
        for pairs, lengths, line in ((self.rows, across, "row"), (self.columns, down, "column")):
            if pairs > room(lengths):
                windows = f" in {len(lengths)} windows" * (len(lengths) > 1)
                raise UsageError(
                    f"merge after block {self.block}: {pairs} pairs in a {line} of {sum(lengths)} patches{windows}; "
                    f"at most {room(lengths)} can be merged at once"
                )
        return shrunk(down, self.columns), shrunk(across, self.rows)


def shrinking(merges: Sequence[Merge], grid: tuple[int, int], window: int | None) -> Iterator[tuple[Lengths, Lengths]]:
    """The pieces of the columns and of the rows of a ``grid`` of patches before each of ``merges``, and after the last;
    ``window``: patches a side of a window, None without."""
    down, across = (pieces(length, window) for length in grid)
    yield down, across
    for merge in merges:
        down, across = merge.shrink(down, across)
        yield down, across


@dataclass(frozen=True)
class TowerKind:
    """What tells the graphs of one tower apart.

    ``merging``: it merges patches, as many pairs after each block as it is told. ``sharing``, ``proportional``,
    ``block``: as ``TowerVariant``. ``str``: a short text for cache keys.
    """

    merging: bool = False
    sharing: Sharing = "per-line"
    proportional: bool = True
    block: int | None = None

    def serves(self, other: TowerKind) -> bool:
        """Whether it can run what ``other`` runs; it may return more."""
        alike = self.sharing == other.sharing and self.proportional == other.proportional
        return other.block in (None, self.block) and (not other.merging or (self.merging and alike))

    def __str__(self) -> str:
        parts = ["merging" if self.merging else "plain"]
        parts += ["shared"] * (self.sharing == "shared") + ["unweighted"] * (not self.proportional)
        return "+".join(parts + [f"block{self.block}"] * (self.block is not None))


@dataclass(frozen=True)
class TowerVariant:
    """A way to run a tower on a picture.

    ``grid``: rows and columns of tokens a picture is resized to, None for the tower's own. ``merges``: of patches, in
    the order they are done, several after one block allowed. ``further``: those of the crops after the first, where
    they are others. ``sharing``: see ``Sharing``. ``proportional``: later blocks attend to a merged patch as to all it
    stands for (ToMe's proportional attention). ``block``: the one whose attention and keys are returned besides the
    features, None for none: what is not asked for is not computed. Raises ``UsageError`` for values that cannot be
    meant.
    """

    grid: tuple[int, int] | None = None
    merges: tuple[Merge, ...] = ()
    sharing: Sharing = "per-line"
    proportional: bool = True
    block: int | None = None
    further: tuple[tuple[Merge, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.grid is not None and (
            len(self.grid) != 2 or not all(type(side) is int and 1 <= side <= _LONGEST_SIDE for side in self.grid)
        ):
            raise UsageError(f"grid must be rows and columns of patches, each 1 to {_LONGEST_SIDE}, got {self.grid!r}")
        for merges in (self.merges, *self.further):
            blocks = [merge.block for merge in merges]
            if blocks != sorted(blocks):
                raise UsageError(f"merges must be in the order of their blocks, got {', '.join(map(str, blocks))}")
        if self.sharing not in get_args(Sharing):
            raise UsageError(f"unknown sharing {self.sharing!r}; one of {', '.join(get_args(Sharing))}")

    @property
    def usual(self) -> bool:
        """Whether all patches of pictures of usual size come out."""
        return self.grid is None and not self.merges and not self.further

    @property
    def kind(self) -> TowerKind:
        """Of the graph that runs it."""
        if not self.merges and not self.further:
            return TowerKind(block=self.block)
        return TowerKind(True, self.sharing, self.proportional, self.block)

    def of_crop(self, number: int) -> TowerVariant:
        """The same of one crop."""
        return replace(self, merges=self.further[number - 1] if self.further and number else self.merges, further=())

    def serves(self, other: TowerVariant) -> bool:
        """Whether what comes out is what ``other`` returns, or more."""
        return replace(self, block=other.block) == other and other.block in (None, self.block)

    def final_grid(
        self, own: tuple[int, int], blocks: int, side: int = 1, window: int | None = None
    ) -> tuple[int, int]:
        """``(H', W')``: the grid of the tokens that come of a crop of ``own`` tokens in a tower of ``blocks`` blocks;
        each token is of ``side`` patches a side, ``window``: patches a side of a window.

        Raises ``UsageError`` for a merge that asks for too many pairs or leaves no whole tokens, or that comes after a
        block that is not there or is the last: no block would be the faster for it; and for a block described that has
        other patches than the last.
        """
        rows, columns = self.grid or own
        for merge in self.merges:
            if merge.block > blocks - 2:
                raise UsageError(
                    f"merge after block {merge.block}: of {blocks} blocks, "
                    + (f"0 to {blocks - 2} have one after them" if blocks > 1 else "none has one after it")
                )
            if self.block is not None and merge.block >= self.block:
                raise UsageError(
                    f"merge after block {merge.block}: attention is looked at in block {self.block}, which has more "
                    "patches then than the last"
                )
        *_, left = shrinking(self.merges, (rows * side, columns * side), window)
        height, width = map(sum, left)
        if height % side or width % side:
            raise UsageError(f"merges that leave {height} x {width} patches leave no whole tokens of {side} x {side}")
        return height // side, width // side


PLAIN = TowerVariant()
"""The tower as it is."""
