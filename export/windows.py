"""Windowed attention in a graph: rows of a grid's windows together, smaller windows filled up."""

from __future__ import annotations

from functools import cached_property

from onnx import TensorProto

from .graph import Graph
from .lines import Pieces


class Windows:
    """The windows between the pieces of a grid's columns, ``down``, and of its rows, ``across``; ``batch (1,)``
    pictures. Smaller ones are filled with rows that nobody attends to."""

    def __init__(self, graph: Graph, batch: str, down: Pieces, across: Pieces) -> None:
        self._graph, self._batch, self._down, self._across = graph, batch, down, across

    def split(self, x: str, *width: int) -> str:
        """``x (B, P, *width)`` in raster order to ``(B * windows, longest, *width)``."""
        x = self._graph.node("Gather", x, self._places, axis=1)
        return self._graph.node("Reshape", x, self._graph.shape(-1, self._longest, *width))

    def join(self, x: str, width: int) -> str:
        """The reverse of ``split``."""
        graph = self._graph
        rows = graph.node("Reshape", x, graph.shape(self._batch, -1, width))
        return graph.node("Gather", rows, self._slots, axis=1)

    @cached_property
    def mask(self) -> str:
        """``(B * windows, longest) int32``: 1 for patches of the picture."""
        graph = self._graph
        there = graph.node("And", *self._crossed(self._down.there, self._across.there))
        there = graph.node("Reshape", graph.node("Cast", there, to=TensorProto.INT32), graph.ints(1, -1))
        every = graph.node("Expand", there, graph.shape(self._batch, 1))
        return graph.node("Reshape", every, graph.shape(-1, self._longest))

    @cached_property
    def _longest(self) -> str:
        return self._graph.node("Mul", self._down.longest, self._across.longest)

    @cached_property
    def _places(self) -> str:
        """``(windows * longest,)``: the raster number of what is there."""
        graph = self._graph
        row, column = self._crossed(self._down.places, self._across.places)
        places = graph.node("Add", graph.node("Mul", row, self._across.total), column)
        return graph.node("Reshape", places, graph.ints(-1))

    @cached_property
    def _slots(self) -> str:
        """``(P,)``: where each patch is among all that is in windows."""
        graph = self._graph
        (row, down), (column, across) = ((axis.piece, axis.within) for axis in (self._down, self._across))
        row, down = (graph.node("Unsqueeze", x, graph.ints(1)) for x in (row, down))
        slots = graph.node("Add", graph.node("Mul", row, self._across.count), column)
        for length, inside in ((self._down.longest, down), (self._across.longest, across)):
            slots = graph.node("Add", graph.node("Mul", slots, length), inside)
        return graph.node("Reshape", slots, graph.ints(-1))

    def _crossed(self, down: str, across: str) -> tuple[str, str]:
        """Tables of the pieces of columns and rows, to be broadcast over each other, a window after another."""
        graph = self._graph
        return graph.node("Unsqueeze", down, graph.ints(1, 3)), graph.node("Unsqueeze", across, graph.ints(0, 2))
