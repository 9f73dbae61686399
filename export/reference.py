"""The tower and the projector in plain NumPy: what an export is checked against, independent of ONNX.

Slow and small on purpose; every step is the textbook's (Dosovitskiy et al. 2021; Radford et al. 2021 for the CLS, the
norm before the first block and ``quick_gelu``).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.families.base import TowerSpec

from .mmproj import Mmproj, projector_shapes, tower_shapes

Floats = NDArray[np.float32]


def reference_tower(spec: TowerSpec, mmproj: Mmproj, pixels: Floats) -> tuple[Floats, Floats | None]:
    """``pixels (B, 3, H, W)`` to ``features (B, rows, D)`` and ``cls_attention (B, heads, rows)`` if there is a CLS."""
    shapes = tower_shapes(spec)

    def weight(name: str) -> Floats:
        return mmproj.tensor(name, shapes[name])

    def linear(x: Floats, name: str) -> Floats:
        return np.asarray(x @ weight(f"{name}.weight").T + weight(f"{name}.bias"))

    def norm(x: Floats, name: str) -> Floats:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + spec.eps)
        return np.asarray(scaled * weight(f"{name}.weight") + weight(f"{name}.bias"))

    batch, size = len(pixels), spec.patch_size
    rows, columns = spec.grid
    patches = (
        pixels[:, :, : rows * size, : columns * size]
        .reshape(batch, 3, rows, size, columns, size)
        .transpose(0, 2, 4, 1, 3, 5)
        .reshape(batch, rows * columns, -1)
    )
    x = patches @ weight("v.patch_embd.weight").reshape(spec.width, -1).T
    if spec.patch_bias:
        x = x + weight("v.patch_embd.bias")
    if spec.class_token:
        x = np.concatenate([np.broadcast_to(weight("v.class_embd"), (batch, 1, spec.width)), x], axis=1)
    x = x + weight("v.position_embd.weight")
    if spec.pre_norm:
        x = norm(x, "v.pre_ln")
    cls_attention = None
    for block in range(spec.blocks):
        name = f"v.blk.{block}"
        inner = norm(x, f"{name}.ln1")
        query, key, value = (
            linear(inner, f"{name}.attn_{part}").reshape(batch, spec.rows, spec.heads, -1).transpose(0, 2, 1, 3)
            for part in ("q", "k", "v")
        )
        scores = query @ key.transpose(0, 1, 3, 2) / np.float32(math.sqrt(query.shape[-1]))
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        if block == spec.attention_block:
            cls_attention = attention[:, :, 0]
        x = x + linear((attention @ value).transpose(0, 2, 1, 3).reshape(x.shape), f"{name}.attn_out")
        inner = linear(norm(x, f"{name}.ln2"), f"{name}.ffn_up")
        x = x + linear(ACTIVATIONS[spec.activation](inner), f"{name}.ffn_down")
    return x, cls_attention


def reference_projector(spec: TowerSpec, mmproj: Mmproj, rows: Floats) -> Floats:
    """``rows (n, D)`` to ``(n, d)``: linears with an exact GELU between them."""
    shapes = projector_shapes(spec, mmproj)
    for step, prefix in enumerate(spec.projector_prefixes):
        weight, bias = (mmproj.tensor(f"{prefix}.{part}", shapes[f"{prefix}.{part}"]) for part in ("weight", "bias"))
        rows = (gelu(rows) if step else rows) @ weight.T + bias
    return rows


def gelu(x: Floats) -> Floats:
    """The exact GELU, ``x * Phi(x)``; erf by Abramowitz and Stegun 7.1.26, within 1.5e-7."""
    size = np.abs(x) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * size)
    series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    return np.asarray(x * 0.5 * (1 + np.sign(x) * (1 - series * np.exp(-(size**2)))), dtype=np.float32)


def sigmoid_times(x: Floats, slope: float) -> Floats:
    """``x * sigmoid(slope * x)``."""
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-np.float32(slope) * x)))


ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "gelu": gelu,
    "quick_gelu": lambda x: sigmoid_times(x, 1.702),
    "silu": lambda x: sigmoid_times(x, 1.0),
}
