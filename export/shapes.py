"""Name and shape of every tensor that a tower and its projector are made of, as an mmproj GGUF names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edge_tokcomp.families.tower_spec import Step, TowerSpec

Shapes = dict[str, tuple[int, ...]]


class Shaped(Protocol):
    """What tells how wide the rows are that a linear writes: a ``Source``."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, slowest axis first."""


def tower_shapes(spec: TowerSpec) -> Shapes:
    """Of the tower, its last norm included."""
    width, ffn = spec.width, spec.ffn_width
    shapes: Shapes = dict.fromkeys(patch_weights(spec), (width, 3, spec.patch_size, spec.patch_size))
    if spec.positions is not None:
        rows, columns = spec.table_grid
        shapes["v.position_embd.weight"] = (spec.class_token + rows * columns, width)
    if spec.patch_bias:
        shapes["v.patch_embd.bias"] = (width,)
    if spec.class_token:
        shapes["v.class_embd"] = (width,)
    norms = ["v.pre_ln"] * spec.pre_norm + [spec.last_norm] * spec.post_norm
    linears: dict[str, tuple[int, int]] = {}
    for block in range(spec.blocks):
        name = f"v.blk.{block}"
        norms += [f"{name}.ln1", f"{name}.ln2"]
        linears |= {f"{name}.attn_{part}": (width, width) for part in ("q", "k", "v", "out")}
        linears |= {f"{name}.ffn_{part}": (ffn, width) for part in (["gate", "up"] if spec.gated else ["up"])}
        linears[f"{name}.ffn_down"] = (width, ffn)
        if spec.qk_norm:
            shapes |= {f"{name}.attn_{part}_norm.weight": (width,) for part in "qk"}
        if spec.layer_scale:
            shapes |= {f"{name}.ls{number}.weight": (width,) for number in (1, 2)}
    for name in norms:
        shapes |= _with_bias(name, (width,), spec.bias and spec.norm == "layer")
    for name, shape in linears.items():
        shapes |= _with_bias(name, shape, spec.bias and (spec.qkv_bias or not name.endswith(("_q", "_k", "_v"))))
    return shapes


def patch_weights(spec: TowerSpec) -> list[str]:
    """The patch embedding's convolutions, of which a still picture passes the sum."""
    return ["v.patch_embd.weight"] + [f"v.patch_embd.weight.{number}" for number in range(1, spec.patch_slices)]


def projector_shapes(spec: TowerSpec, source: Shaped) -> Shapes:
    """Of the projector, and of those of the deepstack features: linears, each as wide as the one before it ends."""
    shapes = _step_shapes(spec.projector, spec.token_width, source)
    for stack in spec.deepstack:
        shapes |= _step_shapes(stack.projector, spec.token_width, source)
    if spec.separator:
        shapes[spec.separator] = (language_width(spec, source),)
    return shapes


def language_width(spec: TowerSpec, source: Shaped) -> int:
    """Width of the rows that the projector writes, deepstack features not counted."""
    last = [step for step in spec.projector if step.kind == "linear"][-1]
    return _into(last, source)


def _step_shapes(steps: Sequence[Step], width: int, source: Shaped) -> Shapes:
    shapes: Shapes = {}
    for step in steps:
        if step.kind == "linear":
            into = _into(step, source)
            shapes[f"{step.name}.weight"] = (width, into) if step.transposed else (into, width)
            if step.bias:
                shapes[f"{step.name}.bias"] = (into,)
            width = into
        elif step.name:
            shapes |= _with_bias(step.name, (width,), step.bias)
    return shapes


def _into(step: Step, source: Shaped) -> int:
    """What a linear widens or narrows its rows to."""
    return source.shape(f"{step.name}.weight")[-1 if step.transposed else 0]


def _with_bias(name: str, shape: tuple[int, ...], bias: bool) -> Shapes:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})
