"""A vision tower and its projector as ONNX graphs, from a ``TowerSpec`` and an mmproj's tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import numpy as np
from onnx import TensorProto

from edge_tokcomp.families.base import TowerSpec
from edge_tokcomp.variant import PLAIN, TowerVariant

from .attention import Attention, Sizes
from .graph import Floats, Graph, Weight
from .mmproj import Mmproj, projector_shapes, tower_shapes
from .oim import Merger


def key_block(spec: TowerSpec) -> int:
    """The block whose keys, and CLS attention where there is a CLS, the tower returns."""
    return spec.blocks - 1 if spec.attention_block is None else spec.attention_block


def picture_size(spec: TowerSpec, variant: TowerVariant) -> tuple[int, int]:
    """Height and width in pixels of the pictures a variant of the tower is meant for."""
    if variant.grid is None:
        return spec.image_size, spec.image_size
    return variant.grid[0] * spec.patch_size, variant.grid[1] * spec.patch_size


def write_tower(
    spec: TowerSpec,
    mmproj: Mmproj,
    path: Path,
    int8: Collection[str] = (),
    variant: TowerVariant = PLAIN,
    weights: Path | None = None,
) -> None:
    """Write the graph ``pixels (B, 3, H, W) float32`` -> ``features (B, rows, D)``, ``cls_attention (B, heads, rows)``,
    ``keys (B, rows, D)``, all float32.

    ``features`` are the output of block ``spec.blocks - 1``, CLS row first; ``cls_attention``, only of towers with a
    CLS, holds the softmax weights of the CLS query in block ``key_block``; ``keys`` its keys of all heads.
    H and W are any multiples of the patch size; the positions are stretched to them as transformers does.

    With the merges of ``variant``, which its ``final_grid`` has accepted, H and W are fixed, and ``owner_0``,
    ``owner_1``, ... ``(B, N) int64`` say after each merge which cell every patch of the picture is in. ``weights``: the
    path of the plain tower's graph, whose data file then serves this one.
    """
    shapes = tower_shapes(spec)

    def weight(name: str) -> Weight:
        return partial(mmproj.tensor, name, shapes[name])

    with Graph(path, weights) as graph:

        def norm(x: str, name: str) -> str:
            return graph.layer_norm(x, name, weight(f"{name}.weight"), weight(f"{name}.bias"), spec.eps)

        def linear(x: str, name: str) -> str:
            return graph.linear(
                x, name, weight(f"{name}.weight"), weight(f"{name}.bias"), name.rpartition(".")[2] in int8
            )

        merger = Merger(graph, variant.grid or spec.grid, int(spec.class_token), variant.sharing)
        owners: list[str] = []
        sizes: Sizes | None = None
        x = _embedded(graph, spec, weight, picture_size(spec, variant) if variant.merges else ("height", "width"))
        if spec.pre_norm:
            x = norm(x, "v.pre_ln")
        for block in range(spec.blocks):
            name = f"v.blk.{block}"
            inner = norm(x, f"{name}.ln1")
            query, key, value = (linear(inner, f"{name}.attn_{part}") for part in ("q", "k", "v"))
            attention = Attention(graph, query, key, value, spec.heads, spec.width, sizes)
            if block == key_block(spec):
                rows = spec.class_token + math.prod(merger.grid) if variant.merges else "rows"
                # Averaged over heads only when asked for: ONNX Runtime computes all outputs, whichever it returns.
                graph.output(key, "keys", ("batch", rows, spec.width))
                if spec.class_token:
                    graph.output(attention.first_row(), "cls_attention", ("batch", spec.heads, rows))
            x = graph.node("Add", x, linear(attention.attend(), f"{name}.attn_out"))
            inner = graph.activation(linear(norm(x, f"{name}.ln2"), f"{name}.ffn_up"), spec.activation)
            x = graph.node("Add", x, linear(inner, f"{name}.ffn_down"))
            if merges := [merge for merge in variant.merges if merge.block == block]:
                x, after_each = merger.merge(x, attention.mean_key(), merges)
                owners += after_each
                if variant.proportional:
                    sizes = Sizes.of(graph, merger.sizes, spec.heads, spec.width)
        graph.output(x, "features", ("batch", rows, spec.width))
        for number, owner in enumerate(owners):
            graph.output(owner, f"owner_{number}", ("batch", math.prod(variant.grid or spec.grid)), TensorProto.INT64)
        graph.save({name: str(getattr(spec, name)) for name in ("image_size", "patch_size", "heads")})


def _embedded(graph: Graph, spec: TowerSpec, weight: Callable[[str], Weight], size: tuple[int | str, ...]) -> str:
    """``(B, rows, D)``: pixels to patches, with positions and the CLS row.

    Patches are a convolution whose stride is its kernel. The table of positions is stretched by Keys' bicubic kernel
    with a = -0.75, pixel centres at halves, as torch does; at the tower's own size that is the table itself.
    """

    def positions() -> Floats:
        return weight("v.position_embd.weight")()

    def table() -> Floats:
        return np.reshape(positions()[int(spec.class_token) :].T, (1, spec.width, *spec.grid))

    patch = [spec.patch_size, spec.patch_size]
    inputs = [graph.input("pixels", ("batch", 3, *size)), graph.weight("v.patch_embd", weight("v.patch_embd.weight"))]
    if spec.patch_bias:
        inputs.append(graph.weight("v.patch_embd.bias", weight("v.patch_embd.bias")))
    x = graph.node("Conv", *inputs, kernel_shape=patch, strides=patch)
    grid = graph.node("Concat", graph.ints(1, spec.width), graph.node("Shape", x, start=2, end=4), axis=0)
    stretched = graph.node(
        "Resize", graph.weight("v.position_embd", table), "", "", grid, mode="cubic",
        coordinate_transformation_mode="half_pixel", cubic_coeff_a=-0.75,
    )  # fmt: skip
    x = graph.node("Reshape", graph.node("Add", x, stretched), graph.ints(0, 0, -1))
    x = graph.node("Transpose", x, perm=[0, 2, 1])
    if not spec.class_token:
        return x
    lead = graph.weight("v.class_embd", lambda: (weight("v.class_embd")() + positions()[0])[None, None])
    batch = graph.node("Concat", graph.node("Shape", x, start=0, end=1), graph.ints(1, 1), axis=0)
    return graph.node("Concat", graph.node("Expand", lead, batch), x, axis=1)


def write_projector(spec: TowerSpec, mmproj: Mmproj, path: Path) -> None:
    """Write the graph ``rows (n, D) float32`` -> ``embeddings (n, d)``: linears with an exact GELU between them."""
    shapes = projector_shapes(spec, mmproj)
    with Graph(path) as graph:
        x = graph.input("rows", ("n", spec.width))
        for step, prefix in enumerate(spec.projector_prefixes):
            weight, bias = (
                partial(mmproj.tensor, name, shapes[name]) for name in (f"{prefix}.weight", f"{prefix}.bias")
            )
            x = graph.linear(graph.activation(x, "gelu") if step else x, prefix, weight, bias)
        graph.output(x, "embeddings", ("n", shapes[f"{prefix}.bias"][0]))
        graph.save()
