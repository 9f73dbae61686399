"""Attention in a graph: the fused operator, the CLS row's weights, the keys, and sizes that count.

A row that stands for several has a size; its key counts that many times, as if the rows were there: ``log size`` is
added to its logits (ToMe's proportional attention).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .graph import Graph


@dataclass(frozen=True)
class Sizes:
    """Values of a graph that make its attention count rows by size.

    ``logs (B, S)``: log size. ``ones``, ``keys (B, S, heads, 1)``: what queries and keys are widened by.
    """

    logs: str
    ones: str
    keys: str

    @classmethod
    def of(cls, graph: Graph, sizes: str, heads: int, width: int) -> Sizes:
        """From ``sizes (B, S) float32``."""
        logs = graph.node("Log", sizes)
        root = graph.constant(np.full((1, 1, heads, 1), (width / heads) ** 0.5, np.float32))
        keys = graph.node("Mul", graph.node("Unsqueeze", logs, graph.ints(2, 3)), root)
        one = graph.constant(np.ones((1, 1, heads, 1), np.float32))
        return cls(logs, graph.node("Expand", one, graph.node("Shape", keys)), keys)


@dataclass(frozen=True)
class Attention:
    """``query``, ``key``, ``value (B, S, D)`` of one block in ``graph``, in ``heads`` heads of ``width`` together.

    ``mask (B, S) int32``: 0 for rows that nobody attends to.
    """

    graph: Graph
    query: str
    key: str
    value: str
    heads: int
    width: int
    sizes: Sizes | None = None
    mask: str | None = None

    def attend(self) -> str:
        """``(B, S, D)``: one fused operator, as fast as MatMul and Softmax apart or faster, and without their
        ``(heads, S, S)``.

        Sizes go in as one more column of every head: 1 in the queries, the log (times the root that the operator
        divides by) in the keys. Of a ViT-L's attention on 257 rows and one thread that takes 3 to 6 % over no sizes at
        all with ONNX Runtime 1.31 and 1.18; as the operator's ``attention_bias`` it is 13 to 19 % (and 50 % on 577
        rows), with MatMul and Softmax apart 6 to 12 %.
        """
        query, key, options = self.query, self.key, {}
        if self.sizes is not None:
            query, key = self._widened(query, self.sizes.ones), self._widened(key, self.sizes.keys)
            options = {"scale": self._size**-0.5}
        inputs = [query, key, self.value] + ([] if self.mask is None else ["", self.mask])
        return self.graph.node("MultiHeadAttention", *inputs, domain="com.microsoft", num_heads=self.heads, **options)

    def first_row(self) -> str:
        """``(B, heads, S)``: the softmax weights of row 0's query over all rows."""
        graph = self.graph
        first = graph.node("Slice", self.query, graph.ints(0), graph.ints(1), graph.ints(1))
        first = graph.node("Transpose", self._in_heads(first), perm=[0, 2, 1, 3])
        keys = graph.node("Transpose", self._in_heads(self.key), perm=[0, 2, 3, 1])
        scale = graph.rows(graph.constant(np.array(self._size**-0.5, dtype=np.float32)))
        scores = graph.node("MatMul", graph.node("Mul", first, scale), keys)
        if self.sizes is not None:
            scores = graph.node("Add", scores, graph.node("Unsqueeze", self.sizes.logs, graph.ints(1, 2)))
        return graph.node("Reshape", graph.node("Softmax", scores, axis=-1), graph.ints(0, self.heads, -1))

    def mean_key(self) -> str:
        """``(B, S, D / heads)``: keys averaged over heads, what ToMe and VisionZip compare tokens by."""
        return self.graph.node("ReduceMean", self._in_heads(self.key), self.graph.ints(2), keepdims=0)

    @property
    def _size(self) -> int:
        return self.width // self.heads

    def _in_heads(self, x: str) -> str:
        return self.graph.node("Reshape", x, self.graph.ints(0, 0, self.heads, self._size))

    def _widened(self, x: str, column: str) -> str:
        wide = self.graph.node("Concat", self._in_heads(x), column, axis=3)
        return self.graph.node("Reshape", wide, self.graph.ints(0, 0, self.heads * (self._size + 1)))
