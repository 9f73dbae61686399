"""Towers and projectors of the published sizes with random weights, as the mmproj GGUFs that go with ``random_models``.

Matrices are F16, norms and biases F32, as llama.cpp's converters write them by default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType

from edge_tokcomp.families.tower_spec import Rotary, Step, TowerSpec, Window

from .random_files import Tensor, cached_file
from .shapes import tower_shapes

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_MLP = (Step("linear", "mm.0"), Step("gelu"), Step("linear", "mm.2"))


@dataclass(frozen=True)
class TowerShape:
    """A ``tower``, the ``widths`` that its projector's linears end with, and what else its file says."""

    tower: TowerSpec
    projector_type: str
    widths: tuple[int, ...]
    metadata: Mapping[str, Any]


# From the checkpoints' config.json and preprocessor_config.json; block counts as llama.cpp's converters write them.
TOWER_SHAPES = {
    "llava-1.5-7b": TowerShape(
        TowerSpec(
            "llava15", 336, 14, 1024, 16, 4096, 23, "quick_gelu", 1e-5, *_CLIP, _MLP, class_token=True,
            attention_block=22, pre_norm=True,
        ),
        "mlp", (4096, 4096), {"clip.has_llava_projector": True},
    ),
    "smolvlm-500m": TowerShape(
        TowerSpec(
            "idefics3", 512, 16, 768, 12, 3072, 12, "gelu_tanh", 1e-6, *_HALF,
            (Step("linear", "mm.model.fc", bias=False),), class_token=False, attention_block=None, patch_bias=True,
            post_norm=True, merge=4,
        ),
        "idefics3", (960,),
        {"clip.use_gelu": True, "clip.vision.projector.scale_factor": 4, "clip.vision.preproc_image_size": 2048},
    ),
    "qwen2.5-vl-3b": TowerShape(
        TowerSpec(
            "qwen2.5vl", 560, 14, 1280, 16, 3420, 32, "silu", 1e-6, *_CLIP, _MLP, class_token=False,
            attention_block=None, dynamic=True, patch_slices=2, norm="rms", gated=True, post_norm=True, positions=None,
            rotary=Rotary(), window=Window(4, (7, 15, 23, 31)), merge=2,
        ),
        "qwen2.5vl_merger", (5120, 2048), {"clip.use_silu": True, "clip.vision.n_wa_pattern": 8},
    ),
}  # fmt: skip


def cached_mmproj(name: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """The mmproj GGUF of ``TOWER_SHAPES[name]`` in ``cache`` (by default that of the towers), written there when it is
    missing or damaged. Raises ``TokcompError`` when the disk has no room for it or cannot be written.
    """
    shape = TOWER_SHAPES[name]
    return cached_file(
        f"{name}-mmproj-F16", "clip", _tensors(shape), shape, lambda writer: _describe(writer, name, shape), cache
    )


def _tensors(shape: TowerShape) -> dict[str, Tensor]:
    shapes = dict(tower_shapes(shape.tower))
    width, linears = shape.tower.token_width, iter(shape.widths)
    for step in shape.tower.projector:
        if step.kind == "linear":
            into = next(linears)
            shapes[f"{step.name}.weight"] = (into, width)
            if step.bias:
                shapes[f"{step.name}.bias"] = (into,)
            width = into
    return {name: _tensor(name, extent) for name, extent in shapes.items()}


def _tensor(name: str, extent: tuple[int, ...]) -> Tensor:
    norm = name.endswith("weight") and (".ln" in name or name.startswith(("v.pre_ln", "v.post_ln")))
    plain = len(extent) == 1 or "position_embd" in name
    return Tensor(extent, GGMLQuantizationType.F32 if plain else GGMLQuantizationType.F16, centre=float(norm))


def _describe(writer: gguf.GGUFWriter, name: str, shape: TowerShape) -> None:
    tower = shape.tower
    writer.add_type("mmproj")
    writer.add_name(f"random weights, {name}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(shape.projector_type)
    writer.add_vision_projection_dim(shape.widths[-1])
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.width)
    writer.add_vision_feed_forward_length(tower.ffn_width)
    writer.add_vision_block_count(tower.blocks)
    writer.add_vision_head_count(tower.heads)
    writer.add_vision_attention_layernorm_eps(tower.eps)
    writer.add_vision_image_mean(list(tower.image_mean))
    writer.add_vision_image_std(list(tower.image_std))
    for key, value in shape.metadata.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(key, value)
