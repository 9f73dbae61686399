"""What transformers takes where a checkpoint's configuration says nothing; held against transformers by a test.

Published configurations say little of their tower. Only what a tower's metadata is made of stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TANH = "gelu_pytorch_tanh"


def _vit(
    width: int, ffn: int, blocks: int, heads: int, act: str, image: int, patch: int, eps: float = 1e-6
) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "hidden_act": act, "image_size": image, "patch_size": patch, "layer_norm_eps": eps,
    }  # fmt: skip


# Epsilons of Pixtral and of Qwen-VL are fixed in transformers' code. SigLIP2's pictures have any size: what its
# image_size is here, llama.cpp's converter writes. InternViT-6B's are those of OpenGVLab's own code.
TOWERS: Mapping[str, Mapping[str, Any]] = {
    "clip_vision_model": _vit(768, 3072, 12, 12, "quick_gelu", 224, 32, 1e-5),
    "pixtral": _vit(1024, 4096, 24, 16, "gelu", 1024, 16, 1e-5) | {"rope_theta": 1e4},
    "idefics3_vision": _vit(1152, 3072, 12, 16, TANH, 224, 32),
    "siglip_vision_model": _vit(768, 3072, 12, 12, TANH, 224, 16),
    "siglip2_vision_model": _vit(768, 3072, 12, 12, TANH, 256, 16),
    "internvl_vision": _vit(1024, 4096, 24, 16, "gelu", 448, 14),
    "intern_vit_6b": _vit(3200, 12_800, 48, 25, "gelu", 224, 14),
    "qwen2_vl_vision": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_act": "quick_gelu", "patch_size": 14,
        "spatial_merge_size": 2, "layer_norm_eps": 1e-6, "rope_theta": 1e4,
    },
    "qwen2_5_vl_vision": {
        "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "hidden_act": "silu",
        "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        "layer_norm_eps": 1e-6, "rope_theta": 1e4,
    },
    "qwen3_vl_vision": {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "hidden_act": TANH,
        "patch_size": 16, "spatial_merge_size": 2, "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24], "layer_norm_eps": 1e-6, "rope_theta": 1e4,
    },
}  # fmt: skip
"""Of ``vision_config``, by its type."""

MODELS: Mapping[str, Mapping[str, Any]] = {
    "llava": {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"},
    "llava_next": {
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    "idefics3": {"scale_factor": 2},
    "smolvlm": {"scale_factor": 2},
    "qwen2_vl": {},
    "qwen2_5_vl": {},
    "qwen3_vl": {},
    "qwen3_vl_moe": {},
    "internvl": {
        "downsample_ratio": 0.5, "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    },
    "internvl_chat": {
        "downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v1", "use_thumbnail": False,
        "dynamic_image_size": False, "min_dynamic_patch": 1, "max_dynamic_patch": 6,
    },
    "gemma3": {"mm_tokens_per_image": 256},
    "lfm2_vl": {"downsample_factor": 2, "projector_hidden_act": "gelu"},
    "lfm2-vl": {"downsample_factor": 2, "projector_hidden_act": "gelu"},
    "mistral3": {"spatial_merge_size": 2, "vision_feature_layer": -1, "projector_hidden_act": "gelu"},
}  # fmt: skip
"""Of ``config.json``, by the type of model."""

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
