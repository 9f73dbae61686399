"""Pictures to patches in a graph: the patch embedding, positions learned and rotary, squares of patches as tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_tokcomp.families.tower_spec import TowerSpec

from .graph import Floats, Graph, Weight
from .shapes import patch_weights

_STRETCHES: dict[str, dict[str, Any]] = {
    "bicubic": {"mode": "cubic", "coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75},
    # Without exclude_outside the edges are mixed with themselves where the table shrinks (pytorch issue 183546).
    "bilinear": {
        "mode": "linear", "coordinate_transformation_mode": "half_pixel", "antialias": 1, "exclude_outside": 1,
    },
    "corners": {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """The patches of the pictures in a batch, as values of ``graph``: ``batch``, ``rows``, ``columns (1,) int64``.

    ``merge``: patches a side of one token.
    """

    graph: Graph
    batch: str
    rows: str
    columns: str
    merge: int

    @property
    def positions(self) -> str:
        """``(P, 2) float32``: row and column of each patch."""
        graph = self.graph
        lines = []
        for length, shape in ((self.rows, (-1, 1, 1)), (self.columns, (1, -1, 1))):
            numbers = graph.node("Range", graph.scalar(0), graph.node("Squeeze", length), graph.scalar(1))
            numbers = graph.node("Reshape", graph.node("Cast", numbers, to=1), graph.ints(*shape))
            lines.append(graph.node("Expand", numbers, graph.shape(self.rows, self.columns, 1)))
        return graph.node("Reshape", graph.node("Concat", *lines, axis=2), graph.ints(-1, 2))

    @property
    def places(self) -> str:
        """``(B, P) int64``: the raster number of each patch."""
        graph = self.graph
        count = graph.node("Squeeze", graph.node("Mul", self.rows, self.columns))
        numbers = graph.node("Range", graph.scalar(0), count, graph.scalar(1))
        return graph.node("Expand", numbers, graph.shape(self.batch, 1))

    def tokens(self, x: str, width: int, *, pool: bool) -> str:
        """``x (B, P, width)`` in raster order to ``(B, N, merge * merge * width)``, or with ``pool`` to the means of
        the squares, ``(B, N, width)``."""
        if self.merge == 1:
            return x
        graph = self.graph
        side = graph.ints(self.merge)
        across = [graph.node("Div", length, side) for length in (self.rows, self.columns)]
        x = graph.node("Reshape", x, graph.shape(self.batch, across[0], side, across[1], side, width))
        if pool:
            x = graph.node("ReduceMean", x, graph.ints(2, 4), keepdims=0)
            return graph.node("Reshape", x, graph.shape(self.batch, -1, width))
        x = graph.node("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
        return graph.node("Reshape", x, graph.shape(self.batch, -1, self.merge**2 * width))

    def sums(self, x: str, heads: int) -> str:
        """``x (B, heads, P)`` to its sums over squares, ``(B, heads, N)``."""
        graph = self.graph
        side = graph.ints(self.merge)
        across = [graph.node("Div", length, side) for length in (self.rows, self.columns)]
        x = graph.node("Reshape", x, graph.shape(self.batch, heads, across[0], side, across[1], side))
        return graph.node("Reshape", graph.node("ReduceSum", x, graph.ints(3, 5), keepdims=0), graph.ints(0, 0, -1))


def embedded(graph: Graph, spec: TowerSpec, weights: Callable[[str], Weight], pixels: str) -> tuple[str, Grid]:
    """``(B, rows, D)``: pixels to patches, with positions and the CLS row.

    Patches are a convolution whose stride is its kernel. The table of positions is stretched by ``spec.positions``, as
    torch does; at the tower's own size that is the table itself.
    """

    def positions() -> Floats:
        return weights("v.position_embd.weight")()

    def table() -> Floats:
        return np.reshape(positions()[int(spec.class_token) :].T, (1, spec.width, *spec.table_grid))

    def kernel() -> Floats:
        # Both frames of a pair are the same still picture.
        return np.asarray(np.sum([weights(name)() for name in patch_weights(spec)], axis=0, dtype=np.float32))

    patch = [spec.patch_size, spec.patch_size]
    inputs = [graph.rows(pixels), graph.weight("v.patch_embd", kernel)]
    if spec.patch_bias:
        inputs.append(graph.weight("v.patch_embd.bias", weights("v.patch_embd.bias")))
    x = graph.node("Conv", *inputs, kernel_shape=patch, strides=patch)
    batch, rows, columns = (graph.node("Shape", x, start=axis, end=axis + 1) for axis in (0, 2, 3))
    grid = Grid(graph, batch, rows, columns, spec.merge)
    if spec.positions is not None:
        stretched = graph.node(
            "Resize", graph.weight("v.position_embd", table, exact=True), "", "",
            graph.shape(1, spec.width, rows, columns), **_STRETCHES[spec.positions],
        )  # fmt: skip
        x = graph.node("Add", x, graph.rows(stretched))
    x = graph.node("Transpose", graph.node("Reshape", x, graph.ints(0, 0, -1)), perm=[0, 2, 1])
    if not spec.class_token:
        return x, grid
    lead = graph.weight("v.class_embd", lambda: (weights("v.class_embd")() + positions()[0])[None, None])
    return graph.node("Concat", graph.node("Expand", lead, graph.shape(batch, 1, 1)), x, axis=1), grid


@dataclass(frozen=True)
class RotaryTables:
    """``cosines``, ``sines (n, head / 2)``: of n places' angles, as values of ``graph``."""

    graph: Graph
    cosines: str
    sines: str

    @classmethod
    def of(cls, graph: Graph, spec: TowerSpec, positions: str) -> RotaryTables:
        """Of places at ``positions (n, 2) float32``, row and column, which may be fractions."""
        if spec.rotary is None:
            raise ValueError(f"{spec.family} has no rotary positions")
        quarter = spec.width // spec.heads // 4
        by_row = spec.rotary.theta ** (-np.arange(quarter) / quarter)
        by_column = by_row * (spec.rotary.theta ** (-0.5 / quarter) if spec.rotary.alternating else 1.0)
        angles = [
            graph.node("Mul", position, graph.constant(frequencies.astype(np.float32)))
            for position, frequencies in zip(
                graph.split(positions, graph.ints(1, 1), 2, axis=1), (by_row, by_column), strict=True
            )
        ]
        table = graph.node("Concat", *angles, axis=1)
        return cls(graph, *(graph.rows(graph.node(wave, table)) for wave in ("Cos", "Sin")))

    def turned(self, x: str, places: str, heads: int) -> str:
        """Queries or keys ``x (B, S, D)`` of the places numbered ``places (B, S) int64``."""
        return self.graph.node(
            "RotaryEmbedding", x, places, self.cosines, self.sines, domain="com.microsoft", num_heads=heads
        )
