"""The tower and the projector in plain NumPy: what an export is checked against, independent of ONNX.

Slow and small on purpose; every step is the textbook's (Dosovitskiy et al. 2021; Radford et al. 2021 for the CLS, the
norm before the first block and ``quick_gelu``; Bolya et al. 2023 for attention by size; Su et al. 2021 for rotary
positions; Qwen2.5-VL for windows).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.families.tower_spec import Step, TowerSpec
from edge_tokcomp.tokens import Ints
from edge_tokcomp.tower import Patches, TowerOutput
from edge_tokcomp.variant import PLAIN, TowerVariant

from .reference_merger import ReferenceMerger
from .shapes import projector_shapes, tower_shapes
from .source import Source

Floats = NDArray[np.float32]
Read = Callable[[str], Floats]


def reference_tower(
    spec: TowerSpec,
    source: Source,
    pixels: Floats,
    variant: TowerVariant = PLAIN,
    found: tuple[Ints, ...] = (),
    slack: float = 0.0,
) -> TowerOutput:
    """What the tower says of ``pixels (B, 3, H, W)``; ``found`` and ``slack``: see ``ReferenceMerger``."""
    shapes = tower_shapes(spec)

    def weight(name: str) -> Floats:
        return source.tensor(name, shapes[name])

    def linear(x: Floats, name: str) -> Floats:
        x = x @ weight(f"{name}.weight").T
        return np.asarray(x + weight(f"{name}.bias") if f"{name}.bias" in shapes else x)

    def norm(x: Floats, name: str) -> Floats:
        if spec.norm == "rms":
            return rms_norm(x, weight(f"{name}.weight"), spec.eps)
        shift = weight(f"{name}.bias") if spec.bias else np.float32(0)
        return layer_norm(x, weight(f"{name}.weight"), shift, spec.eps)

    batch, lead = len(pixels), int(spec.class_token)
    grid = (pixels.shape[2] // spec.patch_size, pixels.shape[3] // spec.patch_size)
    x = _embedded(spec, weight, pixels, grid)
    if spec.pre_norm:
        x = norm(x, "v.pre_ln")
    merger = ReferenceMerger(variant, batch, grid, lead, spec.window_patches, found, slack)
    stacked: dict[int, Floats] = {}
    cls_attention = looked_keys = patches = None
    for block in range(spec.blocks):
        name = f"v.blk.{block}"
        inner = norm(x, f"{name}.ln1")
        query, key, value = (linear(inner, f"{name}.attn_{part}") for part in ("q", "k", "v"))
        if spec.qk_norm:
            query = rms_norm(query, weight(f"{name}.attn_q_norm.weight"), spec.eps)
            key = rms_norm(key, weight(f"{name}.attn_k_norm.weight"), spec.eps)
        query, key, value = (y.reshape(*x.shape[:2], spec.heads, -1).transpose(0, 2, 1, 3) for y in (query, key, value))
        if spec.rotary is not None:
            turns = _turns(spec, merger.positions)
            query, key = (_turned(y, turns, spec.rotary.adjacent) for y in (query, key))
        windowed = spec.window is not None and block not in spec.window.whole
        taken, first = _attention(query, key, value, merger.log_sizes, merger.near if windowed else None)
        keys = key.mean(axis=1)
        if block == variant.block:
            cls_attention, looked_keys = first if spec.class_token else None, keys
            if not spec.class_token:
                rows = [y.transpose(0, 2, 1, 3).reshape(x.shape) for y in (query, key)]
                patches = Patches(rows[0], rows[1], spec.heads, merger.grid, spec.merge)
        more = linear(taken.transpose(0, 2, 1, 3).reshape(x.shape), f"{name}.attn_out")
        x = x + (more * weight(f"{name}.ls1.weight") if spec.layer_scale else more)
        inner = norm(x, f"{name}.ln2")
        wide = ACTIVATIONS[spec.activation](linear(inner, f"{name}.ffn_gate" if spec.gated else f"{name}.ffn_up"))
        if spec.gated:
            wide = wide * linear(inner, f"{name}.ffn_up")
        more = linear(wide, f"{name}.ffn_down")
        x = x + (more * weight(f"{name}.ls2.weight") if spec.layer_scale else more)
        if any(stack.block == block for stack in spec.deepstack):
            stacked[block] = merger.spread(x)
        x = merger.after(block, x, keys)
    if spec.post_norm:
        x = norm(x, spec.last_norm)
    grid = merger.grid
    stacks = [_squares(merger.means(stacked[stack.block]), grid, spec.merge, spec.pool) for stack in spec.deepstack]
    if spec.merge > 1:
        x = _squares(x[:, lead:], grid, spec.merge, spec.pool)
        if looked_keys is not None:
            looked_keys = _squares(looked_keys[:, lead:], grid, spec.merge, True)
        if cls_attention is not None:
            cells = _squares(cls_attention[:, :, lead:].reshape(-1, grid[0] * grid[1], 1), grid, spec.merge, False)
            cls_attention = cells.sum(axis=-1).reshape(batch, spec.heads, -1)
    deepstack = np.concatenate(stacks, axis=-1) if stacks else None
    return TowerOutput(x, cls_attention, looked_keys, merger.owners, deepstack, patches)


def _attention(
    query: Floats, key: Floats, value: Floats, log_sizes: Floats, near: NDArray[np.bool_] | None
) -> tuple[Floats, Floats]:
    """What rows take in, ``(B, heads, S, d)`` as the arguments, and what row 0 attends to, ``(B, heads, S)``.

    One head at a time and in place: the weights of all heads of a large picture are gigabytes.
    """
    taken, first = np.empty_like(value), np.empty(value.shape[:3], np.float32)
    for head in range(value.shape[1]):
        scores = query[:, head] @ key[:, head].transpose(0, 2, 1) / np.float32(math.sqrt(query.shape[-1]))
        scores += log_sizes[:, None]
        if near is not None:
            scores[~near] = -np.inf
        scores -= scores.max(-1, keepdims=True)
        weights = np.exp(scores, out=scores)
        weights /= weights.sum(-1, keepdims=True)
        taken[:, head], first[:, head] = weights @ value[:, head], weights[:, 0]
    return taken, first


def _embedded(spec: TowerSpec, weight: Read, pixels: Floats, grid: tuple[int, int]) -> Floats:
    """Patches with their positions, after the CLS row where there is one."""
    (rows, columns), size, lead = grid, spec.patch_size, int(spec.class_token)
    patches = (
        pixels[:, :, : rows * size, : columns * size]
        .reshape(len(pixels), 3, rows, size, columns, size)
        .transpose(0, 2, 4, 1, 3, 5)
        .reshape(len(pixels), rows * columns, -1)
    )
    x = patches @ weight("v.patch_embd.weight").reshape(spec.width, -1).T
    if spec.patch_slices == 2:
        x = x + patches @ weight("v.patch_embd.weight.1").reshape(spec.width, -1).T
    if spec.patch_bias:
        x = x + weight("v.patch_embd.bias")
    if spec.positions is not None:
        positions = weight("v.position_embd.weight")
        x = x + stretched(positions[lead:], spec.table_grid, grid, spec.positions)
    if spec.class_token:
        first = np.broadcast_to(weight("v.class_embd") + positions[0], (len(pixels), 1, spec.width))
        x = np.concatenate([first, x], axis=1)
    return np.asarray(x)


def _turns(spec: TowerSpec, positions: Floats) -> NDArray[np.complex128]:
    """``(B, 1, P, head / 2)``: what each pair of channels of a place at ``positions (B, P, 2)`` is multiplied by, as a
    complex number."""
    if spec.rotary is None:
        raise ValueError(f"{spec.family} has no rotary positions")
    size = spec.width // spec.heads
    frequencies = spec.rotary.theta ** (-np.arange(0, size, 2) / size)
    of_column = frequencies[1::2] if spec.rotary.alternating else frequencies[::2]
    row, column = np.moveaxis(positions[:, None, :, :, None].astype(np.float64), 3, 0)
    return np.exp(1j * np.concatenate([row * frequencies[::2], column * of_column], axis=-1))


def _turned(x: Floats, turns: NDArray[np.complex128], adjacent: bool) -> Floats:
    """Rotate the pairs of ``x (..., P, head)``: neighbours, or channels half a head apart."""
    half = x.shape[-1] // 2
    first, second = (x[..., ::2], x[..., 1::2]) if adjacent else (x[..., :half], x[..., half:])
    turned = (first + 1j * second) * turns
    return np.concatenate([turned.real, turned.imag], axis=-1).astype(np.float32)


def _squares(x: Floats, grid: tuple[int, int], side: int, pool: bool) -> Floats:
    """``(B, P, D)``: the patches of each square end to end, or their mean."""
    tokens = np.array([
        [row * grid[1] + column for row in range(top, top + side) for column in range(left, left + side)]
        for top in range(0, grid[0], side) for left in range(0, grid[1], side)
    ])  # fmt: skip
    squares = x[:, tokens]
    return np.asarray(squares.mean(axis=2) if pool else squares.reshape(len(x), len(tokens), -1))


def layer_norm(x: Floats, scale: Floats, shift: Floats | np.float32, eps: float) -> Floats:
    """The last axis to mean 0 and variance 1, scaled and shifted."""
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(eps)) * scale + shift)


def rms_norm(x: Floats, scale: Floats, eps: float) -> Floats:
    """The last axis to mean square 1, scaled."""
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + np.float32(eps)) * scale)


def stretched(table: Floats, own: tuple[int, int], grid: tuple[int, int], way: str = "bicubic") -> Floats:
    """``table`` of positions, one for each cell of ``own``, for the cells of ``grid``, as torch does it.

    ``way``: as ``TowerSpec.positions``.
    """
    if own == grid:
        return table
    down, across = (_WAYS[way](before, after) for before, after in zip(own, grid, strict=True))
    cells = np.einsum("hi,wj,ijd->hwd", down, across, table.reshape(*own, -1), optimize=True)
    return np.asarray(cells.reshape(-1, table.shape[1]), dtype=np.float32)


def _cubic(before: int, after: int) -> NDArray[np.float64]:
    """``(after, before)``: how much each sample counts in each new one: Keys' kernel with a = -0.75, sampled at the
    centres of cells, the edge repeated."""
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


def _triangle(before: int, after: int) -> NDArray[np.float64]:
    """The same of a triangle as wide as what it samples, cut off at the edges."""
    scale = max(before / after, 1.0)
    places = (np.arange(after)[:, None] + 0.5) * before / after - 0.5
    weights = np.maximum(0.0, 1 - abs(np.arange(before) - places) / scale)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _corners(before: int, after: int) -> NDArray[np.float64]:
    """The same between neighbours, first on first and last on last."""
    places = np.linspace(0, before - 1, after)
    return np.maximum(0.0, 1 - abs(np.arange(before) - places[:, None]))


_WAYS = {"bicubic": _cubic, "bilinear": _triangle, "corners": _corners}


def reference_projector(spec: TowerSpec, source: Source, rows: Floats) -> Floats:
    """``rows (n, token_width)``, deepstack features beside them, to language width."""
    shapes = projector_shapes(spec, source)

    def projected(rows: Floats, steps: Sequence[Step]) -> Floats:
        for step in steps:
            weight, bias = (
                source.tensor(name, shapes[name]) if name in shapes else np.float32(0)
                for name in (f"{step.name}.weight", f"{step.name}.bias")
            )
            if step.kind == "linear":
                if step.by_channel:
                    rows = rows.reshape(len(rows), spec.merge**2, -1).swapaxes(1, 2).reshape(rows.shape)
                rows = np.asarray(rows @ (np.asarray(weight) if step.transposed else np.asarray(weight).T) + bias)
            elif step.kind == "layer_norm":
                rows = layer_norm(rows, np.asarray(weight), np.asarray(bias), step.eps)
            elif step.kind == "rms_norm":
                rows = rms_norm(rows, np.asarray(weight), step.eps)
            else:
                rows = ACTIVATIONS[step.kind](rows)
        return rows

    stacks = [spec.projector, *(stack.projector for stack in spec.deepstack)]
    parts = np.split(rows, len(stacks), axis=1)
    return np.concatenate([projected(part, steps) for part, steps in zip(parts, stacks, strict=True)], axis=1)


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


def gelu_tanh(x: Floats) -> Floats:
    """The usual approximation of GELU (Hendrycks and Gimpel 2016)."""
    return np.asarray(x * 0.5 * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3))))


ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda x: sigmoid_times(x, 1.702),
    "silu": lambda x: sigmoid_times(x, 1.0),
}
