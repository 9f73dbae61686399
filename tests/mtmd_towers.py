"""Files of random weights for models that only llama.cpp has a tower for: MiniCPM-V and GLM-4V."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np

import tiny_models

WIDTH, HEADS, FFN, BLOCKS, PATCH = 32, 2, 96, 2, 8
TOWER: dict[str, Any] = {
    "clip.has_vision_encoder": True, "clip.vision.patch_size": PATCH, "clip.vision.embedding_length": WIDTH,
    "clip.vision.feed_forward_length": FFN, "clip.vision.block_count": BLOCKS,
    "clip.vision.attention.head_count": HEADS, "clip.vision.attention.layer_norm_epsilon": 1e-6,
    "clip.vision.projection_dim": 64, "clip.vision.image_mean": [0.5] * 3, "clip.vision.image_std": [0.5] * 3,
}  # fmt: skip
PATCHES = {"v.patch_embd.weight": (WIDTH, 3, PATCH, PATCH), "v.patch_embd.bias": (WIDTH,)}


def write_marked(path: Path, architecture: str, n_embd: int, markers: tuple[str, ...], **options: Any) -> Path:
    """A tiny language model whose vocabulary ends with ``markers``; ``options`` as for ``write_tiny_model``."""
    usual = tiny_models.tiny_vocabulary

    def marked(n_vocab: int) -> tuple[list[bytes], list[float], list[int]]:
        texts, scores, types = usual(n_vocab - len(markers))
        ends = [marker.encode() for marker in markers]
        return texts + ends, scores + [0.0] * len(ends), types + [int(gguf.TokenType.CONTROL)] * len(ends)

    with mock.patch.object(tiny_models, "tiny_vocabulary", marked):
        return tiny_models.write_tiny_model(path, architecture, n_embd=n_embd, **options).path


def write_minicpmv(path: Path, out: int = 128) -> Path:
    """MiniCPM-V 2.6: a resampler of 16 queries, slices of 64 pixels; its heads are 128 wide, so ``out`` is as well."""
    shapes = {**PATCHES, "v.position_embd.weight": (4900, WIDTH), **norms_of("v.post_ln")}
    for block in range(BLOCKS):
        shapes |= block_of(block, ("q", "k", "v"))
    shapes |= {
        "resampler.pos_embed_k": (4900, out), "resampler.query": (16, out), "resampler.proj.weight": (out, out),
        "resampler.kv.weight": (out, WIDTH),
        **norms_of("resampler.ln_q", "resampler.ln_kv", "resampler.ln_post", size=out),
    }  # fmt: skip
    for part in ("q", "k", "v", "out"):
        shapes |= {f"resampler.attn.{part}.weight": (out, out), f"resampler.attn.{part}.bias": (out,)}
    keys = {
        "clip.projector_type": "resampler", "clip.use_gelu": True, "clip.vision.image_size": 64,
        "clip.minicpmv_query_num": 16,
    }  # fmt: skip
    return write(path, TOWER | keys, shapes, version=3)


def write_glm4v(path: Path, out: int = 64) -> Path:
    """GLM-4.1V: RMS norms, fused queries, a convolution that merges two by two patches, a gated projector."""
    shapes = {**PATCHES, "v.patch_embd.weight.1": (WIDTH, 3, PATCH, PATCH), "v.norm_embd.weight": (WIDTH,)}
    shapes |= {"v.position_embd.weight": (64, WIDTH), "v.post_ln.weight": (WIDTH,)}
    for block in range(BLOCKS):
        one = {name: shape for name, shape in block_of(block, ("qkv",)).items() if name.endswith("weight")}
        shapes |= one | {f"v.blk.{block}.ffn_gate.weight": (FFN, WIDTH)}
    shapes |= {
        "mm.patch_merger.weight": (48, WIDTH, 2, 2), "mm.patch_merger.bias": (48,), "mm.model.fc.weight": (48, 48),
        **norms_of("mm.post_norm", size=48), "mm.up.weight": (FFN, 48), "mm.gate.weight": (FFN, 48),
        "mm.down.weight": (out, FFN),
    }  # fmt: skip
    keys = {"clip.projector_type": "glm4v", "clip.use_silu": True, "clip.vision.image_size": 64}
    return write(path, TOWER | keys, shapes)


def block_of(number: int, queries: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of a block with biases."""
    linears = {"attn_out": (WIDTH, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
    linears |= {f"attn_{part}": (WIDTH * len(part), WIDTH) for part in queries}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        shapes |= {f"v.blk.{number}.{name}.weight": shape, f"v.blk.{number}.{name}.bias": shape[:1]}
    return shapes | norms_of(f"v.blk.{number}.ln1", f"v.blk.{number}.ln2")


def norms_of(*names: str, size: int = WIDTH) -> dict[str, tuple[int, ...]]:
    """Weight and bias of each."""
    return {f"{name}.{part}": (size,) for name in names for part in ("weight", "bias")}


def write(
    path: Path, keys: dict[str, Any], shapes: dict[str, tuple[int, ...]], version: int | None = None,
    half: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """An mmproj of random tensors, 32-bit floats but for those with one of ``half`` in their names."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch="clip")
    for key, value in keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    if version is not None:
        writer.add_int32("clip.minicpmv_version", version)
    for name, shape in shapes.items():
        values = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else None
        if values is None:
            values = ("norm" in name or "ln" in name) * name.endswith("weight") + 0.2 * random.standard_normal(shape)
        writer.add_tensor(name, values.astype(np.float16 if any(part in name for part in half) else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
