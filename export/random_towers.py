"""Towers and projectors of the published sizes with random weights, as the mmproj GGUFs that go with ``random_models``.

Matrices are F16, norms and biases F32, as llama.cpp's converters write them by default. The legacy one, of LLaVA, also
has the table of positions in F16; the present one has it in F32, and SigLIP's patch embedding too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType

from edge_tokcomp.families.tower_spec import Limits, Rotary, Step, TowerSpec, Window

from .random_files import Tensor, cached_file
from .shapes import projector_shapes, tower_shapes

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_MLP = (Step("linear", "mm.0"), Step("gelu"), Step("linear", "mm.2"))
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_LAYER_SCALE = 0.1
"""InternViT's before training."""


@dataclass(frozen=True)
class TowerShape:
    """A ``tower``, the ``widths`` of the rows that its projector's linears write, and what else its file says."""

    name: str
    tower: TowerSpec
    projector_type: str
    widths: Mapping[str, int]
    metadata: Mapping[str, Any]

    def shape(self, name: str) -> tuple[int, ...]:
        """Both sides of a linear's weight as long as the rows that it writes."""
        return (self.widths[name.removesuffix(".weight")],) * 2


_LLAVA = TowerSpec(
    "llava15", 336, 14, 1024, 16, 4096, 23, "quick_gelu", 1e-5, *_CLIP, _MLP, class_token=True, attention_block=22,
    pre_norm=True,
)  # fmt: skip
_LLAVA_WIDTHS = {"mm.0": 4096, "mm.2": 4096}
_LLAVA_METADATA = {"clip.has_text_encoder": False, "clip.has_llava_projector": True, "clip.use_gelu": False}
_SMOLVLM = TowerSpec(
    "idefics3", 512, 16, 768, 12, 3072, 12, "gelu_tanh", 1e-6, *_HALF, (Step("linear", "mm.model.fc", bias=False),),
    class_token=False, attention_block=None, patch_bias=True, post_norm=True, merge=4,
    limits=Limits(longest_edge=2048),
)  # fmt: skip
_SMOLVLM_METADATA = {
    "clip.use_gelu": True, "clip.vision.projector.scale_factor": 4, "clip.vision.preproc_image_size": 2048,
}  # fmt: skip

# From the checkpoints' config.json and preprocessor_config.json; block counts as llama.cpp's converters write them.
# Held against published F16 files, of whose size some 60 bytes a tensor are metadata: LLaVA-1.6's 624 451 168 (with
# Mistral, of the same widths; LLaVA-1.5's lacks the newline), SmolVLM's 190 031 616 and 199 468 800, Qwen2.5-VL-3B's
# 1 338 428 128, Gemma 3 4B's 851 251 104. Of InternVL3-1B none was found, but a Q8_0 file of 332 567 840 bytes and the
# checkpoint's printed modules; its mean and deviation, not found either, are those of OpenGVLab's code.
TOWER_SHAPES = {
    shape.name: shape
    for shape in (
        TowerShape("llava-1.5-7b", _LLAVA, "mlp", _LLAVA_WIDTHS, _LLAVA_METADATA),
        TowerShape(
            "llava-next-7b",
            replace(
                _LLAVA, family="llava_next", separator="model.image_newline", limits=Limits(pinpoints=_PINPOINTS)
            ),
            "mlp", _LLAVA_WIDTHS,
            _LLAVA_METADATA | {
                "clip.vision.image_grid_pinpoints": [side for pair in _PINPOINTS for side in pair],
                "clip.vision.image_crop_resolution": 224, "clip.vision.image_aspect_ratio": "anyres",
                "clip.vision.image_split_resolution": 224, "clip.vision.mm_patch_merge_type": "spatial_unpad",
                "clip.vision.mm_projector_type": "mlp2x_gelu",
            },
        ),
        TowerShape("smolvlm-256m", _SMOLVLM, "idefics3", {"mm.model.fc": 576}, _SMOLVLM_METADATA),
        TowerShape("smolvlm-500m", _SMOLVLM, "idefics3", {"mm.model.fc": 960}, _SMOLVLM_METADATA),
        TowerShape(
            "qwen2.5-vl-3b",
            TowerSpec(
                "qwen2.5vl", 560, 14, 1280, 16, 3420, 32, "silu", 1e-6, *_CLIP, _MLP, class_token=False,
                attention_block=None, dynamic=True, patch_slices=2, norm="rms", gated=True, post_norm=True,
                positions=None, rotary=Rotary(), window=Window(4, (7, 15, 23, 31)), merge=2,
                limits=Limits(min_pixels=4 * 28**2, max_pixels=4096 * 28**2),
            ),
            "qwen2.5vl_merger", {"mm.0": 5120, "mm.2": 2048},
            {"clip.use_silu": True, "clip.vision.n_wa_pattern": 8},
        ),
        TowerShape(
            "internvl3-1b",
            TowerSpec(
                "internvl", 448, 14, 1024, 16, 4096, 24, "gelu", 1e-6, *_IMAGENET,
                (
                    Step("layer_norm", "mm.model.mlp.0"), Step("linear", "mm.model.mlp.1"), Step("gelu"),
                    Step("linear", "mm.model.mlp.3"),
                ),
                class_token=True, attention_block=23, patch_bias=True, layer_scale=True, merge=2,
                limits=Limits(min_tiles=1, max_tiles=12),
            ),
            "internvl", {"mm.model.mlp.1": 896, "mm.model.mlp.3": 896},
            {
                "clip.use_gelu": True, "clip.vision.projector.scale_factor": 2, "clip.vision.preproc_min_tiles": 1,
                "clip.vision.preproc_max_tiles": 12,
            },
        ),
        TowerShape(
            "gemma3-4b",
            TowerSpec(
                "gemma3", 896, 14, 1152, 16, 4304, 27, "gelu_tanh", 1e-6, *_HALF,
                (
                    Step("rms_norm", "mm.soft_emb_norm", bias=False, eps=1e-6),
                    Step("linear", "mm.input_projection", bias=False, transposed=True),
                ),
                class_token=False, attention_block=None, patch_bias=True, post_norm=True, merge=4, pool=True,
            ),
            "gemma3", {"mm.input_projection": 2560}, {"clip.use_gelu": True},
        ),
    )
}  # fmt: skip


def cached_mmproj(shape: TowerShape, cache: str | os.PathLike[str] | None = None) -> Path:
    """The mmproj GGUF of ``shape`` in ``cache`` (by default that of the towers), written there when it is missing or
    damaged. Raises ``TokcompError`` when the disk has no room for it or cannot be written.
    """
    return cached_file(
        f"{shape.name}-mmproj-F16", "clip", _tensors(shape), shape, lambda writer: _describe(writer, shape), cache
    )


def _tensors(shape: TowerShape) -> dict[str, Tensor]:
    shapes = tower_shapes(shape.tower) | projector_shapes(shape.tower, shape)
    return {name: _tensor(shape, name, extent) for name, extent in shapes.items()}


def _tensor(shape: TowerShape, name: str, extent: tuple[int, ...]) -> Tensor:
    if len(extent) == 1:
        return Tensor(extent, centre=_centre(shape.tower, name))
    full = "position_embd" in name and shape.projector_type != "mlp"
    full |= "patch_embd" in name and shape.projector_type in ("idefics3", "gemma3")
    return Tensor(extent, GGMLQuantizationType.F32 if full else GGMLQuantizationType.F16)


def _centre(tower: TowerSpec, name: str) -> float:
    """The mean of a vector: norms scale, biases and the class token do not."""
    module, _, kind = name.rpartition(".")
    if module.endswith((".ls1", ".ls2")):
        return _LAYER_SCALE
    norms = {"v.pre_ln", tower.last_norm, *(step.name for step in tower.projector if step.kind.endswith("norm"))}
    return float(kind == "weight" and (module in norms or module.endswith((".ln1", ".ln2"))))


def _describe(writer: gguf.GGUFWriter, shape: TowerShape) -> None:
    tower = shape.tower
    writer.add_type("mmproj")
    writer.add_name(f"random weights, {shape.name}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(shape.projector_type)
    writer.add_vision_projection_dim(list(shape.widths.values())[-1])
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
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(key, value)
