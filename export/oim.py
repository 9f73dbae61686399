"""LUVC's Orthogonal Iterative Merger as part of a graph; ``edge_tokcomp/methods/oim.py`` says what it does.

How many pairs are merged after which block is an input of the graph, so that one serves pictures of all sizes and all
budgets. What decides (cosines) and what later decisions rest on (merged keys) is computed in float64, step by step as
there, so that both choose the same pairs by the same float32 keys. The rows themselves stay in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import TensorProto

from edge_tokcomp.variant import Sharing

from .graph import Graph
from .lines import Pieces
from .patches import Grid

_SETTLED = 2.0**36
# Added to cosines times 2**36, which keeps them whole numbers: what is taken, and its neighbours, never come up again.
# What is no pair of one piece is put between, so that it neither comes up nor counts as taken.
_TAKEN, _APART, _BESIDE = -(2.0**45), -(2.0**42), -(2.0**38)
_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Pairs:
    """What is to be merged, inputs of a graph: ``merges (blocks,)``: how many merges come after each block; ``across
    (merges, Kc)``, ``down (merges, Kr)``: pairs in each piece of a row, and of a column. All int64."""

    merges: str
    across: str
    down: str

    @classmethod
    def of(cls, graph: Graph, blocks: int) -> Pairs:
        """Declare them as inputs, by the names that ``edge_tokcomp.tower`` feeds."""
        kind = TensorProto.INT64
        return cls(
            graph.input("merges", (blocks,), kind),
            graph.input("pairs_across", ("all", "pieces_across"), kind),
            graph.input("pairs_down", ("all", "pieces_down"), kind),
        )


@dataclass(frozen=True)
class State:
    """What a merge changes, as values of a graph.

    ``rows``: all ``(B, S, D)``, the rows of the tower and what else is a row a patch. ``sizes (B, S) float32``: patches
    each stands for. ``sums (B, S, 2) float32``: their rows and columns on the picture's grid, added up. ``owner (B, N)
    int64``: the cell, in raster order, that each patch of the picture is in; ``owners (merges, B, N) int64``: the same
    after each merge. ``down``, ``across (K,) int64``: lengths of the pieces of columns and of rows, in cells.
    """

    rows: tuple[str, ...]
    sizes: str
    sums: str
    owner: str
    owners: str
    down: str
    across: str

    def listed(self) -> list[tuple[str, int]]:
        """All values with their kinds."""
        real, whole = TensorProto.FLOAT, TensorProto.INT64
        reals = [*self.rows, self.sizes, self.sums]
        return [(x, real) for x in reals] + [(x, whole) for x in (self.owner, self.owners, self.down, self.across)]

    @classmethod
    def read(cls, values: Sequence[str]) -> State:
        """The reverse of ``listed``."""
        *rows, sizes, sums, owner, owners, down, across = values
        return cls(tuple(rows), sizes, sums, owner, owners, down, across)


class Merger:
    """The merger between the blocks of ``graph``, of pictures of ``grid`` whose lines are in pieces of ``side`` patches
    that are not merged across (None: whole). ``lead``: 1 with a CLS row before the patches, which is never merged, else
    0. ``state``: by now, without rows."""

    def __init__(self, graph: Graph, grid: Grid, lead: int, sharing: Sharing, side: int | None, pairs: Pairs) -> None:
        self._graph, self._batch, self._lead, self._sharing, self._pairs = graph, grid.batch, lead, sharing, pairs
        self._first = graph.node("CumSum", pairs.merges, graph.scalar(0), exclusive=1)
        positions = graph.node("Unsqueeze", grid.positions, graph.ints(0))
        if lead:
            positions = graph.node("Pad", positions, graph.ints(0, lead, 0, 0, 0, 0))
        sums = graph.node("Expand", positions, graph.shape(grid.batch, 1, 1))
        one = graph.constant(np.ones((1, 1), np.float32))
        count = graph.node("Shape", sums, start=1, end=2)
        pieces = [Pieces.of(graph, length, side).lengths for length in (grid.rows, grid.columns)]
        places = grid.places
        none = graph.node("Slice", graph.node("Unsqueeze", places, graph.ints(0)), graph.ints(0), graph.ints(0))
        sizes = graph.node("Expand", one, graph.shape(grid.batch, count))
        self.state = State((), sizes, sums, places, none, pieces[0], pieces[1])

    @property
    def positions(self) -> str:
        """``(B, S, 2) float32``: the mean row and column of what each row stands for."""
        graph = self._graph
        return graph.node("Div", self.state.sums, graph.node("Unsqueeze", self.state.sizes, graph.ints(2)))

    @property
    def pieces(self) -> tuple[Pieces, Pieces]:
        """Of columns and of rows, by now."""
        return Pieces(self._graph, self.state.down), Pieces(self._graph, self.state.across)

    def merge(self, block: int, keys: str, rows: Sequence[str]) -> list[str]:
        """``rows``, all ``(B, S, D)``, after the merges that follow ``block``, by ``keys (B, S, Dk)``."""
        graph = self._graph
        number = graph.scalar(block)
        count, first = (graph.node("Gather", x, number) for x in (self._pairs.merges, self._first))

        def step(done: str, values: list[str]) -> list[str]:
            state, keys = State.read(values[1:]), values[0]
            place = graph.node("Add", first, done)
            across, down = (graph.node("Gather", x, place, axis=0) for x in (self._pairs.across, self._pairs.down))
            state, keys = self._pass(state, keys, across, turned=False)
            state, keys = self._pass(state, keys, down, turned=True)
            owner = graph.node("Unsqueeze", state.owner, graph.ints(0))
            state = replace(state, owners=graph.node("Concat", state.owners, owner, axis=0))
            return [keys, *(value for value, _ in state.listed())]

        state = replace(self.state, rows=tuple(rows))
        _, *values = graph.loop(count, [(keys, TensorProto.FLOAT), *state.listed()], step)
        merged = State.read(values)
        self.state = replace(merged, rows=())
        return list(merged.rows)

    def _pass(self, state: State, keys: str, pairs: str, *, turned: bool) -> tuple[State, str]:
        """After a pass along rows, or columns when ``turned``."""
        node, ints = self._graph.node, self._graph.ints
        down, across = Pieces(self._graph, state.down), Pieces(self._graph, state.across)
        lines, along = (across, down) if turned else (down, across)
        line = node("Unsqueeze", lines.numbers, ints(1))
        joined = self._joined(keys, pairs, down, across, turned)
        into = node("Sub", along.numbers, node("CumSum", joined, ints(2)))  # (B, lines, length)
        left_over = node("Sub", along.total, node("ReduceSum", pairs, ints(0), keepdims=1))
        left, right = self._members(into, line, left_over, across.total, turned)
        size, other = (node("GatherND", state.sizes, cells, batch_dims=1) for cells in (left, right))
        two = node("Cast", node("Greater", right, left), to=TensorProto.FLOAT)
        other = node("Mul", other, node("Squeeze", two, ints(2)))
        sizes = node("Add", size, other)
        # Written so that two equal rows stay what they are, to the bit.
        share = node("Unsqueeze", node("Div", other, sizes), ints(2))
        rows = []
        for x in state.rows:
            row, with_row = (node("GatherND", x, cells, batch_dims=1) for cells in (left, right))
            rows.append(node("Add", row, node("Mul", node("Sub", with_row, row), share)))
        first, second = (node("GatherND", state.sums, cells, batch_dims=1) for cells in (left, right))
        sums = node("Add", first, node("Mul", second, two))
        # Written as NumPy writes it, for the same bits.
        parts = [
            node("Mul", self._float64(node("GatherND", keys, cells, batch_dims=1)), self._float64(weight, True))
            for cells, weight in ((left, size), (right, other))
        ]
        keys = node("Cast", node("Div", node("Add", *parts), self._float64(sizes, True)), to=TensorProto.FLOAT)
        if turned:
            cell = node("Add", node("Mul", into, across.total), line)
        else:
            cell = node("Add", into, node("Mul", line, left_over))
        owner = node("GatherElements", self._raster(cell, turned), state.owner, axis=1)
        shorter = node("Sub", along.lengths, pairs)
        down_left, across_left = (shorter, state.across) if turned else (state.down, shorter)
        return State(tuple(rows), sizes, sums, owner, state.owners, down_left, across_left), keys

    def _members(self, into: str, line: str, count: str, width: str, turned: bool) -> tuple[str, str]:
        """``(B, S, 1)`` twice: the first and the last of the rows that make up each new one, the same for most.

        ``into (B, lines, length)``: which of its line's ``count`` new cells a cell goes into; ``width``: of the grid.
        """
        node, ints = self._graph.node, self._graph.ints
        stride, step = (width, ints(1)) if turned else (ints(1), width)
        slots = node("Unsqueeze", Pieces(self._graph, count).numbers, ints(1))
        parts = node("Cast", node("Equal", node("Unsqueeze", into, ints(2)), slots), to=TensorProto.FLOAT)
        first = node("ArgMax", parts, axis=3, keepdims=0)
        how_many = node("Cast", node("ReduceSum", parts, ints(3), keepdims=0), to=TensorProto.INT64)
        start = node("Add", node("Mul", line, step), ints(self._lead))
        left = node("Add", node("Mul", first, stride), start)
        right = node("Add", left, node("Mul", node("Sub", how_many, ints(1)), stride))
        members = []
        for cells in (left, right):
            cells = self._raster(cells, turned)
            if self._lead:
                cells = node("Pad", cells, ints(0, self._lead, 0, 0))  # Row 0, the CLS, stays row 0.
            members.append(node("Unsqueeze", cells, ints(2)))
        return members[0], members[1]

    def _joined(self, keys: str, pairs: str, down: Pieces, across: Pieces, turned: bool) -> str:
        """``(B, lines, length) int64``, one line for all of them when shared: 1 for cells that join the one before."""
        graph = self._graph
        node, ints = graph.node, graph.ints
        along = down if turned else across
        cells = node("Slice", keys, ints(self._lead), ints(_END), ints(1))
        cells = self._float64(node("Reshape", cells, graph.shape(self._batch, down.total, across.total, -1)))
        if turned:
            cells = node("Transpose", cells, perm=[0, 2, 1, 3])
        norm = node("Sqrt", node("ReduceSum", node("Mul", cells, cells), ints(3), keepdims=1))
        unit = node("Div", cells, node("Max", norm, graph.constant(np.array(1e-300))))
        before, after = (node("Slice", unit, ints(a), ints(b), ints(2)) for a, b in ((0, -1), (1, _END)))
        alike = node("ReduceSum", node("Mul", before, after), ints(3), keepdims=0)
        if self._sharing == "shared":
            alike = node("ReduceMean", alike, ints(1), keepdims=1)
        alike = node("Round", node("Mul", alike, graph.constant(np.array(_SETTLED))))
        # The last of a line has none after it: with it, a line is as long as its pieces together.
        alike = node("Pad", alike, ints(0, 0, 0, 0, 0, 1))
        alike = node("Gather", alike, along.places, axis=2)  # (B, lines, pieces, longest)
        pieces = Pieces(graph, node("Sub", along.lengths, ints(1)))
        has_next = node("Less", Pieces(graph, along.longest).numbers, node("Unsqueeze", pieces.lengths, ints(1)))
        alike = node("Where", has_next, alike, graph.constant(np.array(_APART)))
        taken = node("Less", self._taken(alike, pairs, along.longest), graph.constant(np.array(_TAKEN / 2)))
        taken = node("Reshape", node("Cast", taken, to=TensorProto.INT64), ints(0, 0, -1))
        slots = node("Add", node("Mul", along.piece, along.longest), along.within)
        taken = node("Slice", node("Gather", taken, slots, axis=2), ints(0), ints(-1), ints(2))
        return node("Pad", taken, ints(0, 0, 1, 0, 0, 0))

    def _taken(self, alike: str, pairs: str, longest: str) -> str:
        """``alike (B, lines, pieces, longest)`` with what the greedy choice takes far below all else: in every piece of
        every line again and again the best of what is left, as often as ``pairs (pieces,)`` say."""
        graph = self._graph
        node = graph.node
        numbers = Pieces(graph, longest).numbers
        distance = node("Abs", node("Sub", node("Unsqueeze", numbers, graph.ints(1)), numbers))
        marks = [
            node("Where", node("Equal", distance, graph.scalar(away)), graph.constant(np.array(mark)), _zero(graph))
            for away, mark in ((0, _TAKEN), (1, _BESIDE))
        ]
        after_each = node("Add", *marks)
        most = node("Squeeze", node("ReduceMax", pairs, graph.ints(0), keepdims=1))

        def step(done: str, values: list[str]) -> list[str]:
            best = node("ArgMax", values[0], axis=3, keepdims=0)
            still = node("Unsqueeze", node("Less", done, pairs), graph.ints(1))
            marked = node("Where", still, node("Gather", after_each, best), _zero(graph))
            return [node("Add", values[0], marked)]

        return graph.loop(most, [(alike, TensorProto.DOUBLE)], step)[0]

    def _raster(self, values: str, turned: bool) -> str:
        """``(B, lines, n)`` to ``(B, lines * n)`` in the grid's raster order."""
        if turned:
            values = self._graph.node("Transpose", values, perm=[0, 2, 1])
        return self._graph.node("Reshape", values, self._graph.ints(0, -1))

    def _float64(self, values: str, as_column: bool = False) -> str:
        if as_column:
            values = self._graph.node("Unsqueeze", values, self._graph.ints(2))
        return self._graph.node("Cast", values, to=TensorProto.DOUBLE)


def _zero(graph: Graph) -> str:
    return graph.constant(np.array(0.0))
