"""A vision tower and its projector as ONNX graphs, from a ``TowerSpec`` and a source's tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from onnx import TensorProto

from edge_tokcomp.families.tower_spec import Step, TowerSpec
from edge_tokcomp.variant import PLAIN, TowerVariant

from .attention import Attention, Sizes
from .graph import Floats, Graph, Weight
from .oim import Merger
from .patches import Grid, embedded, rotary_tables
from .shapes import Shapes, language_width, projector_shapes, tower_shapes
from .source import Source
from .windows import Windows

_TRIAL = (12, 42)
"""Patches of the picture that a tower is tried on which takes any size, or is too large to be tried in NumPy at its
own: more in one direction than a table of positions has, fewer in the other, and no whole number of windows."""
_LARGE = 1024
"""Patches."""


def key_block(spec: TowerSpec) -> int:
    """The block whose keys, and CLS attention where there is a CLS, the tower returns."""
    return spec.blocks - 1 if spec.attention_block is None else spec.attention_block


def picture_size(spec: TowerSpec, variant: TowerVariant) -> tuple[int, int]:
    """Height and width in pixels of the pictures a variant of the tower is meant for."""
    if variant.grid is not None:
        return variant.grid[0] * spec.unit, variant.grid[1] * spec.unit
    if not spec.dynamic and (variant.merges or math.prod(spec.table_grid) <= _LARGE):
        return spec.image_size, spec.image_size
    return _TRIAL[0] // spec.merge * spec.unit, _TRIAL[1] // spec.merge * spec.unit


def write_tower(
    spec: TowerSpec,
    source: Source,
    path: Path,
    int8: Collection[str] = (),
    variant: TowerVariant = PLAIN,
    weights: Path | None = None,
    half: bool = False,
) -> None:
    """Write the graph ``pixels (B, 3, H, W) float32`` -> ``features (B, rows, token_width)``, ``keys (B, P, D)``, with
    a CLS ``cls_attention (B, heads, rows)``, without ``queries (B, P, D)``, and with deepstack ``deepstack (B, rows,
    levels * token_width)``, all float32.

    ``features`` are the output of block ``spec.blocks - 1``, normalised where the spec says so, a row a token, a CLS
    row first where patches are tokens; ``cls_attention`` holds the softmax weights of the CLS query in block
    ``key_block``, summed over the patches of a token; ``keys`` and ``queries`` those of all heads of that block, a row
    a patch, a CLS row first where patches are tokens.
    H and W are any multiples of ``spec.unit``; the positions are stretched to them as transformers does.

    With the merges of ``variant``, which its ``final_grid`` has accepted, H and W are fixed, and ``owner_0``,
    ``owner_1``, ... ``(B, N) int64`` say after each merge which cell every patch of the picture is in. ``weights``: the
    path of the plain tower's graph, whose data file then serves this one. ``int8``: the blocks' linears that multiply
    8-bit integers; ``half``: all is computed in 16 bits.
    """
    with Graph(path, weights, half) as graph:
        size = picture_size(spec, variant) if variant.merges else ("height", "width")
        pixels = graph.input("pixels", ("batch", 3, *size))
        left = _Tower(graph, spec, _Weights(source, tower_shapes(spec)), int8, variant).write(pixels)
        facts = {name: str(getattr(spec, name)) for name in ("image_size", "patch_size", "heads", "unit")}
        graph.save(facts | ({"merged": f"{left[0]} {left[1]}"} if variant.merges else {}))


def write_projector(spec: TowerSpec, source: Source, path: Path, half: bool = False) -> None:
    """Write the graph ``rows (n, token_width) float32`` -> ``embeddings (n, d)``; with deepstack both are as many times
    as wide as there are levels and one, the usual features first."""
    shapes = projector_shapes(spec, source)
    weights = _Weights(source, shapes)
    stacks = [spec.projector, *(stack.projector for stack in spec.deepstack)]
    with Graph(path, half=half) as graph:
        rows = graph.rows(graph.input("rows", ("n", spec.token_width * len(stacks))))
        parts = [rows]
        if spec.deepstack:
            lengths = graph.ints(*[spec.token_width] * len(stacks))
            parts = graph.split(rows, lengths, len(stacks), axis=1)
        made = [_projected(graph, part, steps, weights, spec) for part, steps in zip(parts, stacks, strict=True)]
        width = language_width(spec, source) * len(stacks)
        graph.output(made[0] if len(made) == 1 else graph.node("Concat", *made, axis=1), "embeddings", ("n", width))
        graph.save()


def _projected(graph: Graph, x: str, steps: Sequence[Step], weights: _Weights, spec: TowerSpec) -> str:
    for step in steps:
        if step.kind == "linear":
            weight = partial(_by_patch, weights(f"{step.name}.weight"), step, spec.merge**2)
            x = graph.linear(x, step.name, weight, weights.bias(step.name, step.bias))
        elif step.kind in ("layer_norm", "rms_norm"):
            scale, shift = weights(f"{step.name}.weight"), weights.bias(step.name, step.bias)
            x = graph.norm(x, step.name, scale, shift, step.eps, step.kind)
        else:
            x = graph.activation(x, step.kind)
    return x


@dataclass(frozen=True)
class _Weights:
    """Reads tensors of the file by name, when they are to be written."""

    source: Source
    shapes: Shapes

    def __call__(self, name: str) -> Weight:
        return partial(self.source.tensor, name, self.shapes[name])

    def bias(self, name: str, there: bool = True) -> Weight | None:
        return self(f"{name}.bias") if there and f"{name}.bias" in self.shapes else None


class _Tower:
    """The blocks of one tower, under construction."""

    def __init__(
        self, graph: Graph, spec: TowerSpec, weights: _Weights, int8: Collection[str], variant: TowerVariant
    ) -> None:
        self.graph, self.spec, self.weights, self.int8, self.variant = graph, spec, weights, int8, variant

    def write(self, pixels: str) -> tuple[int, int]:
        """Write the graph from its pixels on; the grid of patches that merges leave."""
        graph, spec, variant = self.graph, self.spec, self.variant
        x, grid = embedded(graph, spec, self.weights, pixels)
        if spec.pre_norm:
            x = self.norm(x, "v.pre_ln")
        rows, columns = variant.grid or spec.grid
        patches = (rows * spec.merge, columns * spec.merge)
        merger = Merger(graph, patches, int(spec.class_token), variant.sharing)
        rotary = rotary_tables(graph, spec, grid) if spec.rotary else None
        windows = Windows(graph, grid, spec.window.side * spec.merge, spec.width) if spec.window else None
        whole = spec.window.whole if spec.window else range(spec.blocks)
        owners: list[str] = []
        stacked: list[str] = []
        sizes: Sizes | None = None
        split = False  # whether rows are in windows rather than in raster order
        for block in range(spec.blocks):
            if windows and split != (block not in whole):
                split = not split
                x = windows.split(x) if split else windows.join(x)
            name = f"v.blk.{block}"
            inner = self.norm(x, f"{name}.ln1")
            query, key, value = (self.linear(inner, f"{name}.attn_{part}") for part in ("q", "k", "v"))
            if spec.qk_norm:
                query = self.norm(query, f"{name}.attn_q_norm", kind="rms")
                key = self.norm(key, f"{name}.attn_k_norm", kind="rms")
            if rotary:
                places = windows.places if windows and split else grid.places
                query, key = (rotary.turned(y, places, spec.heads) for y in (query, key))
            mask = windows.mask if windows and split else None
            attention = Attention(graph, query, key, value, spec.heads, spec.width, sizes, mask)
            if block == key_block(spec):
                self.describe(attention, self.left(grid, merger), merger, windows.join if windows and split else None)
            x = self.added(x, self.linear(attention.attend(), f"{name}.attn_out"), f"{name}.ls1")
            x = self.added(x, self.feed_forward(self.norm(x, f"{name}.ln2"), name), f"{name}.ls2")
            if any(stack.block == block for stack in spec.deepstack):
                stacked.append(grid.tokens(windows.join(x) if windows and split else x, spec.width, pool=spec.pool))
            if merges := [merge for merge in variant.merges if merge.block == block]:
                x, after_each = merger.merge(x, attention.mean_key(), merges)
                owners += after_each
                if variant.proportional:
                    sizes = Sizes.of(graph, merger.sizes, spec.heads, spec.width)
        if windows and split:
            x = windows.join(x)
        self.finish(x, self.left(grid, merger), self.rows(merger), stacked)
        for number, owner in enumerate(owners):
            graph.output(owner, f"owner_{number}", ("batch", math.prod(patches)), TensorProto.INT64)
        return merger.grid

    def finish(self, x: str, grid: Grid, rows: int | str, stacked: Sequence[str]) -> None:
        """``features`` of the last block, and ``deepstack`` of those before."""
        graph, spec = self.graph, self.spec
        if spec.post_norm:
            x = self.norm(x, spec.last_norm)
        if spec.merge > 1:
            x = grid.tokens(self.without_cls(x), spec.width, pool=spec.pool)
        graph.output(x, "features", ("batch", rows, spec.token_width))
        if stacked:
            deepstack = stacked[0] if len(stacked) == 1 else graph.node("Concat", *stacked, axis=2)
            graph.output(deepstack, "deepstack", ("batch", rows, spec.token_width * len(stacked)))

    def describe(self, attention: Attention, grid: Grid, merger: Merger, join: Callable[[str], str] | None) -> None:
        """``keys``, and ``cls_attention`` or ``queries``, of one block."""
        graph, spec, rows = self.graph, self.spec, self.rows(merger)
        query, key = (x if join is None else join(x) for x in (attention.query, attention.key))
        # Averaged over heads and squares only when asked for, as attention is taken of queries and keys: ONNX Runtime
        # computes all outputs, whichever it returns.
        patches = "patches" if spec.merge > 1 else rows
        graph.output(self.without_cls(key) if spec.merge > 1 else key, "keys", ("batch", patches, spec.width))
        if not spec.class_token:
            graph.output(query, "queries", ("batch", patches, spec.width))
        else:
            weights = attention.first_row()
            if spec.merge > 1:
                patches = graph.node("Slice", weights, graph.ints(1), graph.ints(_END), graph.ints(2))
                weights = grid.sums(patches, spec.heads)
            graph.output(weights, "cls_attention", ("batch", spec.heads, rows))

    def left(self, grid: Grid, merger: Merger) -> Grid:
        """The patches of a picture by now."""
        if not self.variant.merges:
            return grid
        rows, columns = (self.graph.ints(length) for length in merger.grid)
        return replace(grid, rows=rows, columns=columns)

    def rows(self, merger: Merger) -> int | str:
        """How many rows the tower returns, where that is known."""
        tokens = math.prod(merger.grid) // self.spec.merge**2
        return self.spec.cls_rows + tokens if self.variant.merges else "rows"

    def without_cls(self, x: str) -> str:
        graph = self.graph
        return graph.node("Slice", x, graph.ints(1), graph.ints(_END), graph.ints(1)) if self.spec.class_token else x

    def norm(self, x: str, name: str, kind: str = "") -> str:
        shape = self.weights.bias(name)
        return self.graph.norm(x, name, self.weights(f"{name}.weight"), shape, self.spec.eps, kind or self.spec.norm)

    def linear(self, x: str, name: str) -> str:
        weight, bias = self.weights(f"{name}.weight"), self.weights.bias(name)
        last = name.rpartition(".")[2]
        if self.spec.rotary and self.spec.rotary.adjacent and last in ("attn_q", "attn_k"):
            order = halves(self.spec.width, self.spec.heads)
            weight, bias = partial(_ordered, weight, order), bias and partial(_ordered, bias, order)
        return self.graph.linear(x, name, weight, bias, last in self.int8)

    def feed_forward(self, x: str, name: str) -> str:
        """The linears between which a block's rows are wider."""
        up = self.linear(x, f"{name}.ffn_up")
        if self.spec.gated:
            gate = self.graph.activation(self.linear(x, f"{name}.ffn_gate"), self.spec.activation)
            up = self.graph.node("Mul", gate, up)
        else:
            up = self.graph.activation(up, self.spec.activation)
        return self.linear(up, f"{name}.ffn_down")

    def added(self, x: str, more: str, scale: str) -> str:
        if self.spec.layer_scale:
            more = self.graph.node("Mul", more, self.graph.weight(scale, self.weights(f"{scale}.weight")))
        return self.graph.node("Add", x, more)


_END = np.iinfo(np.int64).max


def halves(width: int, heads: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """For each channel of queries or keys whose rotated pairs lie half a head apart, its number where they lie side by
    side: llama.cpp's converter stores some models so."""
    size = width // heads
    within = np.arange(size).reshape(size // 2, 2).T.ravel()
    return np.asarray((np.arange(heads)[:, None] * size + within).ravel())


def _by_patch(read: Weight, step: Step, patches: int) -> Floats:
    """A projector's weight ``(out, in)`` for rows that hold the ``patches`` of a square one after another."""
    weight = read().T if step.transposed else read()
    if step.by_channel:
        weight = weight.reshape(len(weight), -1, patches).transpose(0, 2, 1).reshape(weight.shape)
    return weight


def _ordered(read: Weight, order: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Floats:
    return read()[order]
