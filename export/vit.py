"""A vision tower and its projector as ONNX graphs, from a ``TowerSpec`` and a source's tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from onnx import TensorProto

from edge_tokcomp.families.tower_spec import Step, TowerSpec
from edge_tokcomp.variant import PLAIN, TowerKind

from .attention import Attention, Sizes
from .graph import Floats, Graph, Weight
from .lines import Pieces
from .oim import Merger, Pairs
from .patches import Grid, RotaryTables, embedded
from .shapes import Shapes, language_width, projector_shapes, tower_shapes
from .source import Source
from .windows import Windows

_TRIAL = (12, 42)
"""Patches of the picture that a tower is tried on which takes any size, or is too large to be tried in NumPy at its
own: more in one direction than a table of positions has, fewer in the other, and no whole number of windows."""
_LARGE = 1024
"""Patches."""


def picture_size(spec: TowerSpec) -> tuple[int, int]:
    """Height and width in pixels of the picture that the tower is tried on."""
    if not spec.dynamic and math.prod(spec.table_grid) <= _LARGE:
        return spec.image_size, spec.image_size
    return _TRIAL[0] // spec.merge * spec.unit, _TRIAL[1] // spec.merge * spec.unit


def write_tower(
    spec: TowerSpec,
    source: Source,
    path: Path,
    int8: Collection[str] = (),
    kind: TowerKind = PLAIN.kind,
    weights: Path | None = None,
    half: bool = False,
) -> None:
    """Write the graph ``pixels (B, 3, H, W) float32`` -> ``features (B, rows, token_width)``, with deepstack
    ``deepstack (B, rows, levels * token_width)``, and of the block of ``kind``, if it names one, ``keys (B, P, D)``,
    with a CLS ``cls_attention (B, heads, rows)``, without ``queries (B, P, D)``, all float32.

    ``features`` are the output of block ``spec.blocks - 1``, normalised where the spec says so, a row a token, a CLS
    row first where patches are tokens; ``cls_attention`` holds the softmax weights of the CLS query, summed over the
    patches of a token; ``keys`` and ``queries`` are those of all heads, a row a patch, a CLS row first where patches
    are tokens. (A graph of its own for methods that look at them: ONNX Runtime computes all outputs of a graph,
    whichever it returns.)
    H and W are any multiples of ``spec.unit``; the positions are stretched to them as transformers does.

    A ``kind`` that merges takes ``Pairs`` too, and ``owners (merges, B, N) int64`` say after each merge which cell each
    patch of the picture is in. What was taken for deepstack before a merge is averaged in it as the rows are, so that
    each row has all its levels.

    ``weights``: the path of the plain tower's graph, whose data file, beside ``path`` too, then serves this one.
    ``int8``: the blocks' linears that multiply 8-bit integers; ``half``: all is computed in 16 bits.
    """
    with Graph(path, weights, half) as graph:
        pixels = graph.input("pixels", ("batch", 3, "height", "width"))
        _Tower(graph, spec, _Weights(source, tower_shapes(spec)), int8, kind).write(pixels)
        facts = ("image_size", "patch_size", "heads", "unit", "class_token")
        graph.save({name: str(getattr(spec, name)) for name in facts} | {"window": str(spec.window_patches or 0)})


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


@dataclass(frozen=True)
class _Stage:
    """The rows of the tower by now: their ``grid``; ``rotary`` tables and each row's ``places (B, S)`` in them;
    ``windows``; ``sizes (B, S)`` that count in attention. Empty where there is none."""

    grid: Grid
    rotary: RotaryTables | None
    places: str
    windows: Windows | None
    sizes: str


class _Tower:
    """The blocks of one tower, under construction."""

    def __init__(
        self, graph: Graph, spec: TowerSpec, weights: _Weights, int8: Collection[str], kind: TowerKind
    ) -> None:
        self.graph, self.spec, self.weights, self.int8, self.kind = graph, spec, weights, int8, kind

    def write(self, pixels: str) -> None:
        """Write the graph from its pixels on."""
        graph, spec, kind = self.graph, self.spec, self.kind
        x, grid = embedded(graph, spec, self.weights, pixels)
        if spec.pre_norm:
            x = self.norm(x, "v.pre_ln")
        merger = None
        if kind.merging:
            pairs = Pairs.of(graph, spec.blocks)
            merger = Merger(graph, grid, int(spec.class_token), kind.sharing, spec.window_patches, pairs)
        stage = self.stage(grid, merger)
        stacked: list[str] = []
        split = False  # whether rows are in windows rather than in raster order
        for block in range(spec.blocks):
            if split != (stage.windows is not None and block not in spec.whole_blocks):
                split, x = not split, self.arranged(x, stage, split)
            windows = stage.windows if split else None
            name = f"v.blk.{block}"
            inner = self.norm(x, f"{name}.ln1")
            query, key, value = (self.linear(inner, f"{name}.attn_{part}") for part in ("q", "k", "v"))
            if spec.qk_norm:
                query = self.norm(query, f"{name}.attn_q_norm", kind="rms")
                key = self.norm(key, f"{name}.attn_k_norm", kind="rms")
            if stage.rotary:
                places = windows.split(stage.places) if windows else stage.places
                query, key = (stage.rotary.turned(y, places, spec.heads) for y in (query, key))
            sizes = None
            if stage.sizes:
                sizes = Sizes.of(graph, windows.split(stage.sizes) if windows else stage.sizes, spec.heads, spec.width)
            mask = windows.mask if windows else None
            attention = Attention(graph, query, key, value, spec.heads, spec.width, sizes, mask)
            if block == kind.block:
                self.describe(attention, stage.grid, windows)
            x = self.added(x, self.linear(attention.attend(), f"{name}.attn_out"), f"{name}.ls1")
            x = self.added(x, self.feed_forward(self.norm(x, f"{name}.ln2"), name), f"{name}.ls2")
            level = any(stack.block == block for stack in spec.deepstack)
            if split and (level or merger or block == spec.blocks - 1):
                split, x = False, self.arranged(x, stage, split)
            if level:
                stacked.append(x)
            if merger and block < spec.blocks - 1:
                keys = attention.mean_key()
                if windows:
                    keys = windows.join(keys, spec.width // spec.heads)
                x, *stacked = merger.merge(block, keys, [x, *stacked])
                stage = self.stage(grid, merger)
        self.finish(x, stage.grid, stacked)
        if merger:
            graph.output(merger.state.owners, "owners", ("all", "batch", "patches"), TensorProto.INT64)

    def stage(self, grid: Grid, merger: Merger | None) -> _Stage:
        """What holds for the blocks to come; ``grid``: of the picture."""
        graph, spec = self.graph, self.spec
        if merger is None:
            down, across = (Pieces.of(graph, length, spec.window_patches) for length in (grid.rows, grid.columns))
            positions, places, sizes = grid.positions if spec.rotary else "", grid.places if spec.rotary else "", ""
        else:
            down, across = merger.pieces
            grid = replace(grid, rows=down.total, columns=across.total)
            sizes = merger.state.sizes if self.kind.proportional else ""
            positions = places = ""
            if spec.rotary:  # Pictures of a batch merge each in its own way: each has its own places in one table.
                positions = graph.node("Reshape", merger.positions, graph.ints(-1, 2))
                numbers = Pieces(graph, graph.node("Shape", positions, start=0, end=1)).numbers
                places = graph.node("Reshape", numbers, graph.shape(grid.batch, -1))
        rotary = RotaryTables.of(graph, spec, positions) if spec.rotary else None
        windows = Windows(graph, grid.batch, down, across) if spec.window else None
        return _Stage(grid, rotary, places, windows, sizes)

    def arranged(self, x: str, stage: _Stage, split: bool) -> str:
        """Rows from windows to raster order if they are ``split``, else the other way."""
        if stage.windows is None:
            raise ValueError(f"{self.spec.family} has no windows")
        return stage.windows.join(x, self.spec.width) if split else stage.windows.split(x, self.spec.width)

    def finish(self, x: str, grid: Grid, stacked: Sequence[str]) -> None:
        """``features`` of the last block, and ``deepstack`` of those before."""
        graph, spec = self.graph, self.spec
        if spec.post_norm:
            x = self.norm(x, spec.last_norm)
        if spec.merge > 1:
            x = grid.tokens(self.without_cls(x), spec.width, pool=spec.pool)
        graph.output(x, "features", ("batch", "rows", spec.token_width))
        if stacked:
            levels = [grid.tokens(level, spec.width, pool=spec.pool) for level in stacked]
            deepstack = levels[0] if len(levels) == 1 else graph.node("Concat", *levels, axis=2)
            graph.output(deepstack, "deepstack", ("batch", "rows", spec.token_width * len(levels)))

    def describe(self, attention: Attention, grid: Grid, windows: Windows | None) -> None:
        """``keys``, and ``cls_attention`` or ``queries``, of one block."""
        graph, spec = self.graph, self.spec
        query, key = attention.query, attention.key
        if windows:
            query, key = (windows.join(x, spec.width) for x in (query, key))
        # As they are, not averaged over heads and squares: attention is taken of them.
        graph.output(self.without_cls(key) if spec.merge > 1 else key, "keys", ("batch", "patches", spec.width))
        if not spec.class_token:
            graph.output(query, "queries", ("batch", "patches", spec.width))
        else:
            weights = attention.first_row()
            if spec.merge > 1:
                patches = graph.node("Slice", weights, graph.ints(1), graph.ints(_END), graph.ints(2))
                weights = grid.sums(patches, spec.heads)
            graph.output(weights, "cls_attention", ("batch", spec.heads, "rows"))

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
