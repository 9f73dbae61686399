"""A vision tower and its projector as ONNX graphs, from a ``TowerSpec`` and an mmproj's tensors."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from edge_tokcomp.families.base import TowerSpec

from .graph import Floats, Graph
from .mmproj import Mmproj, projector_shapes, tower_shapes


def write_tower(spec: TowerSpec, mmproj: Mmproj, path: Path, int8: Collection[str] = ()) -> None:
    """Write the graph ``pixels (B, 3, H, W) float32`` -> ``features (B, rows, D)``, ``cls_attention (B, heads, rows)``.

    ``features`` are the output of block ``spec.blocks - 1``, CLS row first; ``cls_attention`` holds the softmax weights
    of the CLS query in block ``spec.attention_block`` and is there only for towers with a CLS.
    """
    shapes = tower_shapes(spec)

    def weight(name: str) -> Floats:
        return mmproj.tensor(name, shapes[name])

    with Graph(path) as graph:

        def norm(x: str, name: str) -> str:
            return graph.layer_norm(x, name, weight(f"{name}.weight"), weight(f"{name}.bias"), spec.eps)

        def linear(x: str, name: str) -> str:
            return graph.linear(
                x, name, weight(f"{name}.weight"), weight(f"{name}.bias"), name.rpartition(".")[2] in int8
            )

        pixels = graph.input("pixels", ("batch", 3, spec.image_size, spec.image_size))
        bias = weight("v.patch_embd.bias") if spec.patch_bias else None
        x = graph.patches(pixels, "v.patch_embd", weight("v.patch_embd.weight"), bias)
        positions = weight("v.position_embd.weight")
        if spec.class_token:
            # The CLS row is the same for every picture: it joins the positions, and zeros make room for it.
            x = graph.leading_row(x)
            positions[0] += weight("v.class_embd")
        x = graph.node("Add", x, graph.weight("v.position_embd", positions))
        if spec.pre_norm:
            x = norm(x, "v.pre_ln")
        for block in range(spec.blocks):
            name = f"v.blk.{block}"
            inner = norm(x, f"{name}.ln1")
            query, key, value = (linear(inner, f"{name}.attn_{part}") for part in ("q", "k", "v"))
            if block == spec.attention_block:
                cls_attention = graph.first_row_attention(query, key, spec.heads, spec.width)
                graph.output(cls_attention, "cls_attention", ("batch", spec.heads, spec.rows))
            attended = linear(graph.attention(query, key, value, spec.heads), f"{name}.attn_out")
            x = graph.node("Add", x, attended)
            inner = graph.activation(linear(norm(x, f"{name}.ln2"), f"{name}.ffn_up"), spec.activation)
            x = graph.node("Add", x, linear(inner, f"{name}.ffn_down"))
        graph.output(x, "features", ("batch", spec.rows, spec.width))
        graph.save()


def write_projector(spec: TowerSpec, mmproj: Mmproj, path: Path) -> None:
    """Write the graph ``rows (n, D) float32`` -> ``embeddings (n, d)``: linears with an exact GELU between them."""
    shapes = projector_shapes(spec, mmproj)
    with Graph(path) as graph:
        x = graph.input("rows", ("n", spec.width))
        for step, prefix in enumerate(spec.projector_prefixes):
            weight, bias = (
                mmproj.tensor(f"{prefix}.{part}", shapes[f"{prefix}.{part}"]) for part in ("weight", "bias")
            )
            x = graph.linear(graph.activation(x, "gelu") if step else x, prefix, weight, bias)
        graph.output(x, "embeddings", ("n", len(bias)))
        graph.save()
