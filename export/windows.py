"""Windowed attention in a graph: patches in square windows, those at the right and lower edge filled up."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from .graph import Graph
from .patches import Grid


class Windows:
    """Windows of ``side`` patches over the ``grid`` of a picture, as Qwen2.5-VL has them: from its upper left corner,
    smaller ones at the other edges. Here those are filled with patches that nobody attends to."""

    def __init__(self, graph: Graph, grid: Grid, side: int, width: int) -> None:
        self._graph, self._grid, self._side, self._width = graph, grid, side, width
        length = graph.ints(side)
        lengths = (grid.rows, grid.columns)
        self._spare = [graph.node("Mod", graph.node("Neg", own), length) for own in lengths]
        filled = [graph.node("Add", own, more) for own, more in zip(lengths, self._spare, strict=True)]
        self._count = [graph.node("Div", whole, length) for whole in filled]
        self._filled = filled

    def split(self, x: str) -> str:
        """``x (B, P, D)`` in raster order to ``(B * windows, side * side, D)``."""
        return self._split(x, self._width)

    def join(self, x: str) -> str:
        """The reverse of ``split``."""
        graph, side = self._graph, self._side
        batch, (rows, columns) = self._grid.batch, self._count
        x = graph.node("Reshape", x, graph.shape(batch, rows, columns, side, side, self._width))
        x = graph.node("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
        x = graph.node("Reshape", x, graph.shape(batch, *self._filled, self._width))
        ends = graph.node("Concat", self._grid.rows, self._grid.columns, axis=0)
        x = graph.node("Slice", x, graph.ints(0, 0), ends, graph.ints(1, 2))
        return graph.node("Reshape", x, graph.shape(batch, -1, self._width))

    @cached_property
    def mask(self) -> str:
        """``(B * windows, side * side) int32``: 1 for patches of the picture."""
        graph = self._graph
        ones = graph.node("Expand", graph.constant(np.ones((1, 1, 1), np.float32)), graph.shape(*self._all, 1))
        return graph.node("Cast", graph.node("Squeeze", self._split(ones, 1), graph.ints(2)), to=6)

    @cached_property
    def places(self) -> str:
        """``(B * windows, side * side) int64``: the raster number of each patch in its picture."""
        graph = self._graph
        numbers = graph.node("Cast", graph.node("Unsqueeze", self._grid.places, graph.ints(2)), to=1)
        return graph.node("Cast", graph.node("Squeeze", self._split(numbers, 1), graph.ints(2)), to=7)

    @cached_property
    def _all(self) -> tuple[str, str]:
        return self._grid.batch, self._graph.node("Mul", self._grid.rows, self._grid.columns)

    def _split(self, x: str, width: int) -> str:
        graph, grid, side = self._graph, self._grid, self._side
        x = graph.node("Reshape", x, graph.shape(grid.batch, grid.rows, grid.columns, width))
        pads = graph.node("Concat", graph.ints(0, 0), *self._spare, axis=0)
        x = graph.node("Pad", x, pads, "", graph.ints(1, 2))
        rows, columns = self._count
        x = graph.node("Reshape", x, graph.shape(grid.batch, rows, side, columns, side, width))
        x = graph.node("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
        return graph.node("Reshape", x, graph.ints(-1, side * side, width))
