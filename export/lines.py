"""Lines of a grid cut into pieces, in a graph: the windows that attention stays in, and one piece where it does not."""

from __future__ import annotations

from functools import cached_property

from onnx import TensorProto

from .graph import Graph


class Pieces:
    """A line of patches in ``K`` pieces of ``lengths (K,) int64``, one after another, and a table ``(K, longest)``
    that has a piece a row and is empty behind the shorter ones."""

    def __init__(self, graph: Graph, lengths: str) -> None:
        self._graph, self.lengths = graph, lengths

    @classmethod
    def of(cls, graph: Graph, length: str, side: int | None) -> Pieces:
        """A line of ``length (1,) int64`` in pieces of ``side``, the last one what is left; whole without."""
        if side is None:
            return cls(graph, length)
        sides = graph.ints(side)
        count = graph.node("Div", graph.node("Add", length, graph.ints(side - 1)), sides)
        left = graph.node("Sub", length, graph.node("Mul", _range(graph, count), sides))
        return cls(graph, graph.node("Min", left, sides))

    @cached_property
    def total(self) -> str:
        """``(1,) int64``."""
        return self._graph.node("ReduceSum", self.lengths, self._graph.ints(0), keepdims=1)

    @cached_property
    def longest(self) -> str:
        """``(1,) int64``."""
        return self._graph.node("ReduceMax", self.lengths, self._graph.ints(0), keepdims=1)

    @cached_property
    def count(self) -> str:
        """``(1,) int64``."""
        return self._graph.node("Shape", self.lengths)

    @cached_property
    def numbers(self) -> str:
        """``(total,) int64``: 0, 1, 2, ..."""
        return _range(self._graph, self.total)

    @cached_property
    def there(self) -> str:
        """``(K, longest) bool``: what of the table is not empty."""
        return self._graph.node("Less", self._across, self._graph.node("Unsqueeze", self.lengths, self._graph.ints(1)))

    @cached_property
    def places(self) -> str:
        """``(K, longest) int64``: the number in the line of what is in the table, 0 where that is empty."""
        graph = self._graph
        starts = graph.node("Unsqueeze", self._starts, graph.ints(1))
        return graph.node("Where", self.there, graph.node("Add", starts, self._across), graph.scalar(0))

    @cached_property
    def piece(self) -> str:
        """``(total,) int64``: the piece that each of the line is in."""
        graph = self._graph
        begun = graph.node("GreaterOrEqual", graph.node("Unsqueeze", self.numbers, graph.ints(1)), self._starts)
        begun = graph.node("ReduceSum", graph.node("Cast", begun, to=TensorProto.INT64), graph.ints(1), keepdims=0)
        return graph.node("Sub", begun, graph.scalar(1))

    @cached_property
    def within(self) -> str:
        """``(total,) int64``: the place of each in its piece."""
        return self._graph.node("Sub", self.numbers, self._graph.node("Gather", self._starts, self.piece))

    @cached_property
    def _starts(self) -> str:
        return self._graph.node("CumSum", self.lengths, self._graph.scalar(0), exclusive=1)

    @cached_property
    def _across(self) -> str:
        return self._graph.node("Unsqueeze", _range(self._graph, self.longest), self._graph.ints(0))


def _range(graph: Graph, count: str) -> str:
    """``(count,) int64``: 0, 1, 2, ... of ``count (1,) int64``."""
    return graph.node("Range", graph.scalar(0), graph.node("Squeeze", count), graph.scalar(1))
