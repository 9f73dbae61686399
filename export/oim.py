"""LUVC's Orthogonal Iterative Merger as part of a graph; ``edge_tokcomp/methods/oim.py`` says what it does.

What decides (cosines) and what later decisions rest on (merged keys) is computed in float64, step by step as there, so
that both choose the same pairs by the same float32 keys. The rows themselves stay in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from edge_tokcomp.variant import Merge, Sharing

from .graph import Graph

_SETTLED = 2.0**36
# Added to cosines times 2**36, which keeps them whole numbers: what is taken, and its neighbours, never come up again.
_TAKEN, _BESIDE = -(2.0**45), -(2.0**38)


class Merger:
    """The merger between the blocks of ``graph``.

    ``grid``: rows and columns by now. ``sizes (B, rows) float32``: patches each row stands for. ``owner (B, N) int64``:
    the cell, in raster order, that each patch of the picture is in. The last two are empty before the first merge.
    ``lead``: 1 with a CLS row before the patches, which is never merged, else 0.
    """

    def __init__(self, graph: Graph, grid: tuple[int, int], lead: int, sharing: Sharing) -> None:
        self.grid, self.sizes, self.owner = grid, "", ""
        self._graph, self._lead, self._sharing = graph, lead, sharing

    def merge(self, x: str, keys: str, merges: Sequence[Merge]) -> tuple[str, list[str]]:
        """``x (B, rows, D)`` after ``merges`` by ``keys (B, rows, Dk)``, and the ``owner`` after each of them."""
        if not self.owner:
            cells = self.grid[0] * self.grid[1]
            self.sizes = self._for_each_picture(x, np.ones((1, self._lead + cells), np.float32))
            self.owner = self._for_each_picture(x, np.arange(cells, dtype=np.int64)[None])
        to_come = sum(bool(pairs) for merge in merges for pairs in (merge.rows, merge.columns))
        owners = []
        for merge in merges:
            for pairs, turned in ((merge.rows, False), (merge.columns, True)):
                if pairs:
                    to_come -= 1
                    x, keys = self._pass(x, keys, pairs, turned, to_come > 0)
            owners.append(self.owner)
        return x, owners

    def _pass(self, x: str, keys: str, pairs: int, turned: bool, more: bool) -> tuple[str, str]:
        """``x`` and, if there is ``more`` to come, ``keys`` after a pass along rows, or columns when ``turned``."""
        node, constant, ints = self._graph.node, self._graph.constant, self._graph.ints
        height, width = self.grid
        lines, length = (width, height) if turned else (height, width)
        line = np.arange(lines, dtype=np.int64)[:, None]
        joined = self._joined(keys, pairs, length, turned)
        into = node("Sub", ints(*range(length)), node("CumSum", joined, ints(2)))  # (B, lines, length)
        left, right = self._members(into, line, length - pairs, turned)
        size, other = (node("GatherND", self.sizes, cells, batch_dims=1) for cells in (left, right))
        two = node("Cast", node("Greater", right, left), to=TensorProto.FLOAT)
        other = node("Mul", other, node("Squeeze", two, ints(2)))
        self.sizes = node("Add", size, other)
        # Written so that two equal rows stay what they are, to the bit.
        share = node("Unsqueeze", node("Div", other, self.sizes), ints(2))
        row, with_row = (node("GatherND", x, cells, batch_dims=1) for cells in (left, right))
        x = node("Add", row, node("Mul", node("Sub", with_row, row), share))
        if more:
            # Written as NumPy writes it, for the same bits.
            sums = [
                node("Mul", self._float64(node("GatherND", keys, cells, batch_dims=1)), self._float64(weight, True))
                for cells, weight in ((left, size), (right, other))
            ]
            keys = node("Div", node("Add", *sums), self._float64(self.sizes, True))
            keys = node("Cast", keys, to=TensorProto.FLOAT)
        if turned:
            cell, self.grid = node("Add", node("Mul", into, ints(width)), constant(line)), (height - pairs, width)
        else:
            cell, self.grid = node("Add", into, constant(line * (width - pairs))), (height, width - pairs)
        self.owner = node("GatherElements", self._raster(cell, height * width, turned), self.owner, axis=1)
        return x, keys

    def _members(self, into: str, line: NDArray[np.int64], count: int, turned: bool) -> tuple[str, str]:
        """``(B, rows, 1)`` twice: the first and the last of the rows that make up each new one, the same for most.

        ``into (B, lines, length)``: which of its line's ``count`` new cells a cell goes into.
        """
        node, ints, width = self._graph.node, self._graph.ints, self.grid[1]
        stride, step = (width, 1) if turned else (1, width)
        slots = self._graph.constant(np.arange(count, dtype=np.int64)[:, None])
        parts = node("Cast", node("Equal", node("Unsqueeze", into, ints(2)), slots), to=TensorProto.FLOAT)
        first = node("ArgMax", parts, axis=3, keepdims=0)
        how_many = node("Cast", node("ReduceSum", parts, ints(3), keepdims=0), to=TensorProto.INT64)
        left = node("Add", node("Mul", first, ints(stride)), self._graph.constant(self._lead + line * step))
        right = node("Add", left, node("Mul", node("Sub", how_many, ints(1)), ints(stride)))
        members = []
        for cells in (left, right):
            cells = self._raster(cells, len(line) * count, turned)
            if self._lead:
                cells = node("Pad", cells, ints(0, self._lead, 0, 0))  # Row 0, the CLS, stays row 0.
            members.append(node("Unsqueeze", cells, ints(2)))
        return members[0], members[1]

    def _joined(self, keys: str, pairs: int, length: int, turned: bool) -> str:
        """``(B, lines, length) int64``, one line for all of them when shared: 1 for cells that join the one before."""
        node, ints = self._graph.node, self._graph.ints
        height, width = self.grid
        cells = node("Slice", keys, ints(self._lead), ints(self._lead + height * width), ints(1))
        cells = self._float64(node("Reshape", cells, ints(0, height, width, -1)))
        if turned:
            cells = node("Transpose", cells, perm=[0, 2, 1, 3])
        norm = node("Sqrt", node("ReduceSum", node("Mul", cells, cells), ints(3), keepdims=1))
        unit = node("Div", cells, node("Max", norm, self._graph.constant(np.array(1e-300))))
        before, after = (node("Slice", unit, ints(start), ints(start + length - 1), ints(2)) for start in (0, 1))
        alike = node("ReduceSum", node("Mul", before, after), ints(3), keepdims=0)
        if self._sharing == "shared":
            alike = node("ReduceMean", alike, ints(1), keepdims=1)
        alike = node("Round", node("Mul", alike, self._graph.constant(np.array(_SETTLED))))
        distance = np.abs(np.arange(length - 1)[:, None] - np.arange(length - 1))
        after_each = self._graph.constant(np.select([distance == 0, distance == 1], [_TAKEN, _BESIDE], 0.0))
        for _ in range(pairs):
            best = node("ArgMax", alike, axis=2, keepdims=0)
            alike = node("Add", alike, node("Gather", after_each, best))
        taken = node("Less", alike, self._graph.constant(np.array(_TAKEN / 2)))
        return node("Pad", node("Cast", taken, to=TensorProto.INT64), ints(0, 0, 1, 0, 0, 0))

    def _raster(self, values: str, count: int, turned: bool) -> str:
        """``(B, lines, n)`` to ``(B, count)`` in the grid's raster order."""
        if turned:
            values = self._graph.node("Transpose", values, perm=[0, 2, 1])
        return self._graph.node("Reshape", values, self._graph.ints(0, count))

    def _for_each_picture(self, x: str, values: NDArray[np.float32] | NDArray[np.int64]) -> str:
        """``values (1, n)`` as often as ``x`` has pictures."""
        node = self._graph.node
        shape = node("Concat", node("Shape", x, start=0, end=1), self._graph.ints(1), axis=0)
        return node("Expand", self._graph.constant(values), shape)

    def _float64(self, values: str, as_column: bool = False) -> str:
        if as_column:
            values = self._graph.node("Unsqueeze", values, self._graph.ints(2))
        return self._graph.node("Cast", values, to=TensorProto.DOUBLE)
