"""The tower and the projector in plain NumPy: what an export is checked against, independent of ONNX.

Slow and small on purpose; every step is the textbook's (Dosovitskiy et al. 2021; Radford et al. 2021 for the CLS, the
norm before the first block and ``quick_gelu``; Bolya et al. 2023 for attention by size).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.families.base import TowerSpec
from edge_tokcomp.tokens import Ints
from edge_tokcomp.tower import TowerOutput
from edge_tokcomp.variant import PLAIN, TowerVariant

from .mmproj import Mmproj, projector_shapes, tower_shapes
from .reference_merger import ReferenceMerger
from .vit import key_block

Floats = NDArray[np.float32]


def reference_tower(
    spec: TowerSpec,
    mmproj: Mmproj,
    pixels: Floats,
    variant: TowerVariant = PLAIN,
    found: tuple[Ints, ...] = (),
    slack: float = 0.0,
) -> TowerOutput:
    """Everything the tower says of ``pixels (B, 3, H, W)``; ``found`` and ``slack``: see ``ReferenceMerger``."""
    shapes = tower_shapes(spec)

    def weight(name: str) -> Floats:
        return mmproj.tensor(name, shapes[name])

    def linear(x: Floats, name: str) -> Floats:
        return np.asarray(x @ weight(f"{name}.weight").T + weight(f"{name}.bias"))

    def norm(x: Floats, name: str) -> Floats:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + spec.eps)
        return np.asarray(scaled * weight(f"{name}.weight") + weight(f"{name}.bias"))

    batch, size, lead = len(pixels), spec.patch_size, int(spec.class_token)
    rows, columns = pixels.shape[2] // size, pixels.shape[3] // size
    patches = (
        pixels[:, :, : rows * size, : columns * size]
        .reshape(batch, 3, rows, size, columns, size)
        .transpose(0, 2, 4, 1, 3, 5)
        .reshape(batch, rows * columns, -1)
    )
    x = patches @ weight("v.patch_embd.weight").reshape(spec.width, -1).T
    if spec.patch_bias:
        x = x + weight("v.patch_embd.bias")
    positions = weight("v.position_embd.weight")
    x = x + stretched(positions[lead:], spec.grid, (rows, columns))
    if spec.class_token:
        x = np.concatenate([np.broadcast_to(weight("v.class_embd") + positions[0], (batch, 1, spec.width)), x], axis=1)
    if spec.pre_norm:
        x = norm(x, "v.pre_ln")
    merger = ReferenceMerger(variant, lead, found, slack)
    for block in range(spec.blocks):
        name = f"v.blk.{block}"
        inner = norm(x, f"{name}.ln1")
        query, key, value = (
            linear(inner, f"{name}.attn_{part}").reshape(*x.shape[:2], spec.heads, -1).transpose(0, 2, 1, 3)
            for part in ("q", "k", "v")
        )
        scores = query @ key.transpose(0, 1, 3, 2) / np.float32(math.sqrt(query.shape[-1]))
        scores += merger.log_sizes[:, None, None]
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        keys = key.mean(axis=1)
        if block == key_block(spec):
            cls_attention, last_keys = attention[:, :, 0] if spec.class_token else None, keys
        x = x + linear((attention @ value).transpose(0, 2, 1, 3).reshape(x.shape), f"{name}.attn_out")
        inner = linear(norm(x, f"{name}.ln2"), f"{name}.ffn_up")
        x = x + linear(ACTIVATIONS[spec.activation](inner), f"{name}.ffn_down")
        x = merger.after(block, x, keys, (rows, columns))
    return TowerOutput(x, cls_attention, last_keys, merger.owners)


def stretched(table: Floats, own: tuple[int, int], grid: tuple[int, int]) -> Floats:
    """``table`` of positions, one for each cell of ``own``, for the cells of ``grid``.

    Bicubic as torch does it: Keys' kernel with a = -0.75, sampled at the centres of cells, the edge repeated.
    """
    if own == grid:
        return table
    down, across = (_cubic(before, after) for before, after in zip(own, grid, strict=True))
    cells = np.einsum("hi,wj,ijd->hwd", down, across, table.reshape(*own, -1), optimize=True)
    return np.asarray(cells.reshape(-1, table.shape[1]), dtype=np.float32)


def _cubic(before: int, after: int) -> NDArray[np.float64]:
    """``(after, before)``: how much each sample counts in each new one."""
    a = -0.75
    weights = np.zeros((after, before))
    for new in range(after):
        place = (new + 0.5) * before / after - 0.5
        for sample in range(math.floor(place) - 1, math.floor(place) + 3):
            x = abs(place - sample)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[new, min(max(sample, 0), before - 1)] += near if x <= 1 else far if x < 2 else 0
    return weights


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
