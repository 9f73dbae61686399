"""Metadata of a transformers model's mmproj GGUF, by llama.cpp's converter, as ``hf_mmproj`` writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from hf_vlms import FAMILIES


def metadata_of(model: PreTrainedModel, family: str) -> dict[str, Any]:
    """The keys of the file but for the file type; those of the processor come from the family's ``preprocessor``."""
    vision, pixels = model.config.vision_config, FAMILIES[family].preprocessor
    metadata: dict[str, Any] = {
        "general.type": "mmproj", "general.name": "tiny", "clip.has_vision_encoder": True,
        "clip.vision.image_size": _side(getattr(vision, "image_size", None)),
        "clip.vision.patch_size": _side(vision.patch_size), "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": getattr(vision, "intermediate_size", None),
        "clip.vision.projection_dim": model.config.text_config.hidden_size,
        "clip.vision.block_count": vision.num_hidden_layers,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.image_mean": pixels["image_mean"], "clip.vision.image_std": pixels["image_std"],
    }  # fmt: skip
    return metadata | _OF_FAMILY[family](model.config, pixels)


def _llava(config: Any, pixels: dict[str, Any]) -> dict[str, Any]:
    vision = config.vision_config
    keys: dict[str, Any] = {
        "general.type": None, "general.description": "image encoder for LLaVA", "clip.has_text_encoder": False,
        "clip.has_llava_projector": True, "clip.projector_type": "mlp", "clip.use_gelu": vision.hidden_act == "gelu",
        "clip.vision.projection_dim": vision.projection_dim, "clip.vision.block_count": vision.num_hidden_layers - 1,
        "clip.vision.attention.layer_norm_epsilon": vision.layer_norm_eps,
    }  # fmt: skip
    if "image_grid_pinpoints" in pixels:
        keys |= {
            "clip.vision.image_grid_pinpoints": [side for pair in pixels["image_grid_pinpoints"] for side in pair],
            "clip.vision.image_aspect_ratio": "anyres", "clip.vision.mm_patch_merge_type": "spatial_unpad",
            "clip.vision.mm_projector_type": "mlp2x_gelu", "clip.vision.image_crop_resolution": vision.image_size,
        }  # fmt: skip
    return keys


def _idefics3(config: Any, pixels: dict[str, Any]) -> dict[str, Any]:
    return {
        "clip.projector_type": "idefics3", "clip.use_gelu": True,
        "clip.vision.attention.layer_norm_epsilon": config.vision_config.layer_norm_eps,
        "clip.vision.projector.scale_factor": config.scale_factor,
        "clip.vision.preproc_image_size": pixels["size"]["longest_edge"],
    }  # fmt: skip


def _qwen2vl(config: Any, pixels: dict[str, Any]) -> dict[str, Any]:
    # The configuration has no image size, and what the converter takes for the feed-forward width is the projector's.
    return {
        "clip.projector_type": "qwen2vl_merger", "clip.vision.image_size": 560,
        "clip.vision.embedding_length": config.vision_config.embed_dim,
        "clip.vision.feed_forward_length": config.vision_config.hidden_size,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
    }  # fmt: skip


def _qwen25vl(config: Any, pixels: dict[str, Any]) -> dict[str, Any]:
    return {
        "clip.projector_type": "qwen2.5vl_merger", "clip.use_silu": True, "clip.vision.image_size": 560,
        "clip.vision.n_wa_pattern": config.vision_config.fullatt_block_indexes[0] + 1,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
    }  # fmt: skip


def _qwen3vl(config: Any, pixels: dict[str, Any]) -> dict[str, Any]:
    vision = config.vision_config
    return {
        "clip.projector_type": "qwen3vl_merger", "clip.use_gelu": True,
        "clip.vision.image_size": int(vision.num_position_embeddings**0.5 * vision.patch_size),
        "clip.vision.spatial_merge_size": vision.spatial_merge_size,
        "clip.vision.attention.layer_norm_epsilon": config.text_config.rms_norm_eps,
        "clip.vision.is_deepstack_layers": [
            block in vision.deepstack_visual_indexes for block in range(vision.num_hidden_layers)
        ],
    }  # fmt: skip


def _internvl(config: Any, pixels: dict[str, Any]) -> dict[str, Any]:
    return {
        "clip.projector_type": "internvl", "clip.use_gelu": True,
        "clip.vision.attention.layer_norm_epsilon": config.vision_config.layer_norm_eps,
        "clip.vision.projector.scale_factor": int(1 / config.downsample_ratio),
        "clip.vision.preproc_min_tiles": pixels["min_patches"], "clip.vision.preproc_max_tiles": pixels["max_patches"],
    }  # fmt: skip


def _gemma3(config: Any, pixels: dict[str, Any]) -> dict[str, Any]:
    vision = config.vision_config
    pooled = vision.image_size // vision.patch_size // int(pixels["image_seq_length"] ** 0.5)
    return {
        "clip.projector_type": "gemma3", "clip.use_gelu": True,
        "clip.vision.attention.layer_norm_epsilon": vision.layer_norm_eps,
        "clip.vision.projector.scale_factor": None if pooled == 4 else pooled,
    }  # fmt: skip


def _lfm2vl(config: Any, pixels: dict[str, Any]) -> dict[str, Any]:
    return {
        "clip.projector_type": "lfm2", "clip.use_gelu": True, "clip.vision.image_size": 256,
        "clip.vision.attention.layer_norm_epsilon": config.vision_config.layer_norm_eps,
        "clip.vision.projector.scale_factor": config.downsample_factor,
    }  # fmt: skip


def _pixtral(config: Any, pixels: dict[str, Any]) -> dict[str, Any]:
    return {
        "clip.projector_type": "pixtral", "clip.use_silu": True, "clip.vision.attention.layer_norm_epsilon": 1e-5,
        "clip.vision.spatial_merge_size": getattr(config, "spatial_merge_size", None),
    }  # fmt: skip


_OF_FAMILY: dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {
    "llava15": _llava, "llava_next": _llava, "idefics3": _idefics3, "smolvlm": _idefics3, "qwen2vl": _qwen2vl,
    "qwen25vl": _qwen25vl, "qwen3vl": _qwen3vl, "internvl_qwen2": _internvl, "internvl_qwen3": _internvl,
    "gemma3": _gemma3, "lfm2vl": _lfm2vl, "pixtral": _pixtral, "mistral3": _pixtral,
}  # fmt: skip


def _side(size: Any) -> Any:
    return size[0] if isinstance(size, (list, tuple)) else size
