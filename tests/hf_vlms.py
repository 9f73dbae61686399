"""Vision-language models of every supported family, by transformers' own classes, tiny and with random weights.

Sizes are small; the rules stay those of the published models (merge factors, windows, tiles, deepstack levels, whether
heads fill the width, whether embeddings are tied). In the weights everything matters: attention is far from uniform,
norms are away from one and biases from zero, so that a tensor left out or in the wrong order shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3VisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMVisionConfig,
)

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PINPOINTS = [[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]]
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}


@dataclass(frozen=True)
class Ids:
    """Special tokens of the models made here; each family takes those it has."""

    image: int = 300
    start: int = 301
    end: int = 302
    video: int = 303
    row_break: int = 304


@dataclass(frozen=True)
class Family:
    """How a family is made, and what its preprocessor_config.json says at these sizes."""

    model: Callable[[PreTrainedConfig], PreTrainedModel]
    config: Callable[[Ids], PreTrainedConfig]
    preprocessor: dict[str, Any]


def build(family: str, seed: int = 0, ids: Ids | None = None) -> PreTrainedModel:
    """The family's ``...ForConditionalGeneration`` in eval mode, ``float32``, eager attention, all weights random."""
    entry = FAMILIES[family]
    config = entry.config(ids or Ids())
    for part in (config, config.vision_config, config.text_config):
        part._attn_implementation = "eager"
    model = entry.model(config).float().eval()
    _fill(model, seed)
    return model


def _fill(model: PreTrainedModel, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    gemma = model.config.model_type == "gemma3"
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=random)
            if value.ndim == 1:
                added = gemma and "norm" in name and ("language_model" in name or "soft_emb" in name)  # to one
                value.copy_(_mean(name) - float(added) + 0.2 * noise)
            elif "embed_tokens" in name:
                value.copy_(noise)
            elif "pos" in name or "cls_token" in name:  # tables of positions
                value.copy_(0.5 * noise)
            else:
                gain = torch.ones(len(value), *[1] * (value.ndim - 1))
                if "q_proj" in name or "k_proj" in name:
                    gain *= 2
                if "lm_head" in name:
                    gain *= 4
                if "qkv" in name:
                    gain[: len(value) * 2 // 3] = 2
                value.copy_(gain * noise * value[0].numel() ** -0.5)


def _mean(name: str) -> float:
    if name.endswith(("q_norm.weight", "k_norm.weight", "q_layernorm.weight", "k_layernorm.weight")):
        return 2.0  # normalised queries and keys get their gain here
    norm = any(part in name for part in ("norm", "layrnorm", "ln_pre", "ln_q")) and name.endswith("weight")
    return 1.0 if norm else 0.5 if "lambda" in name else 0.0


def _text(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 416, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "rms_norm_eps": 1e-5,
    } | changes  # fmt: skip


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(**TOWER | {"num_hidden_layers": 4}, image_size=48, patch_size=8)


def _llava15(ids: Ids) -> LlavaConfig:
    text = LlamaConfig(**_text(num_key_value_heads=4))
    return LlavaConfig(vision_config=_clip(), text_config=text, image_token_index=ids.image, image_seq_length=36)


def _llava_next(ids: Ids) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=_clip(), text_config=LlamaConfig(**_text()), image_token_index=ids.image,
        image_grid_pinpoints=PINPOINTS, image_seq_length=36,
    )  # fmt: skip


def _idefics3(ids: Ids) -> Idefics3Config:
    vision = Idefics3VisionConfig(**TOWER, image_size=32, patch_size=4)
    return Idefics3Config(
        vision_config=vision, text_config=LlamaConfig(**_text()), image_token_id=ids.image, scale_factor=2,
        pad_token_id=0,
    )  # fmt: skip


def _smolvlm(ids: Ids) -> SmolVLMConfig:
    vision = SmolVLMVisionConfig(**TOWER, image_size=64, patch_size=4)
    return SmolVLMConfig(
        vision_config=vision, text_config=LlamaConfig(**_text(tie_word_embeddings=True)), image_token_id=ids.image,
        scale_factor=4, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip


def _qwen_ids(ids: Ids) -> dict[str, Any]:
    return {
        "image_token_id": ids.image, "video_token_id": ids.video, "vision_start_token_id": ids.start,
        "vision_end_token_id": ids.end, "tie_word_embeddings": True,
    }  # fmt: skip


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections), **more}


def _qwen2vl(ids: Ids) -> Qwen2VLConfig:
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 3, "num_heads": 2, "patch_size": 8}
    text = _text(rope_parameters=_mrope(2, 3, 3), tie_word_embeddings=True, rms_norm_eps=1e-6)
    return Qwen2VLConfig(vision_config=vision, text_config=text, **_qwen_ids(ids))


def _qwen25vl(ids: Ids) -> Qwen2_5_VLConfig:
    # llama.cpp fixes the window at 112 pixels, so patches of 14 keep it at four merged tokens a side.
    vision = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 96, "num_heads": 2, "patch_size": 14, "window_size": 112,
        "out_hidden_size": 64, "fullatt_block_indexes": [1, 3],
    }  # fmt: skip
    text = _text(rope_parameters=_mrope(2, 3, 3), tie_word_embeddings=True, rms_norm_eps=1e-6)
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_qwen_ids(ids))


def _qwen3vl(ids: Ids) -> Qwen3VLConfig:
    vision = {
        "depth": 5, "hidden_size": 32, "intermediate_size": 96, "num_heads": 2, "patch_size": 8, "out_hidden_size": 64,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [1, 2, 4],
    }  # fmt: skip
    text = _text(
        num_hidden_layers=5, head_dim=32, rope_parameters=_mrope(6, 5, 5, mrope_interleaved=True), rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3VLConfig(vision_config=vision, text_config=text, **_qwen_ids(ids))


def _internvl(ids: Ids, text: PreTrainedConfig) -> InternVLConfig:
    vision = InternVLVisionConfig(
        **TOWER | {"num_hidden_layers": 4}, image_size=[32, 32], patch_size=[4, 4], attention_bias=True
    )
    return InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=ids.image, image_seq_length=16, downsample_ratio=0.5,
        tie_word_embeddings=True,
    )  # fmt: skip


def _internvl_qwen2(ids: Ids) -> InternVLConfig:
    return _internvl(ids, Qwen2Config(**_text(tie_word_embeddings=True)))


def _internvl_qwen3(ids: Ids) -> InternVLConfig:
    return _internvl(ids, Qwen3Config(**_text(head_dim=32, tie_word_embeddings=True)))


def _gemma3(ids: Ids) -> Gemma3Config:
    vision = SiglipVisionConfig(**TOWER, image_size=64, patch_size=4, vision_use_head=False)
    text = Gemma3TextConfig(**_text(
        num_hidden_layers=6, head_dim=32, query_pre_attn_scalar=32, sliding_window=32, bos_token_id=1, eos_token_id=2,
        rms_norm_eps=1e-6, rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ))  # fmt: skip
    return Gemma3Config(
        vision_config=vision, text_config=text, mm_tokens_per_image=16, image_token_index=ids.image,
        boi_token_index=ids.start, eoi_token_index=ids.end,
    )  # fmt: skip


def _lfm2vl(ids: Ids) -> Lfm2VlConfig:
    # llama.cpp's converter knows patches of 16 only, and its preprocessing tiles of 512 and 64 to 256 tokens.
    vision = Siglip2VisionConfig(**TOWER, patch_size=16, num_patches=256, vision_use_head=False)
    text = _text(
        num_hidden_layers=4, layer_types=["conv", "full_attention", "conv", "full_attention"], norm_eps=1e-5,
        conv_L_cache=3, block_auto_adjust_ff_dim=False, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )  # fmt: skip
    del text["rms_norm_eps"]
    return Lfm2VlConfig(
        vision_config=vision, text_config=Lfm2Config(**text), image_token_id=ids.image, projector_hidden_size=80,
        downsample_factor=2,
    )  # fmt: skip


def _mistral() -> MistralConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return MistralConfig(**_text(head_dim=32, sliding_window=None, rope_parameters=rope))


def _pixtral_tower() -> PixtralVisionConfig:
    rope = {"rope_type": "axial", "rope_theta": 1e4}
    return PixtralVisionConfig(**TOWER, image_size=128, patch_size=8, hidden_act="silu", rope_parameters=rope)


def _pixtral(ids: Ids) -> LlavaConfig:
    return LlavaConfig(
        vision_config=_pixtral_tower(), text_config=_mistral(), image_token_index=ids.image, image_seq_length=1,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip


def _mistral3(ids: Ids) -> Mistral3Config:
    return Mistral3Config(
        vision_config=_pixtral_tower(), text_config=_mistral(), image_token_index=ids.image, spatial_merge_size=2,
        tie_word_embeddings=False,
    )  # fmt: skip


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def _qwen_pixels(patch: int, **more: Any) -> dict[str, Any]:
    unit = (2 * patch) ** 2  # pixels of a merged token
    return {
        "patch_size": patch, "merge_size": 2, "temporal_patch_size": 2,
        "size": {"shortest_edge": 8 * unit, "longest_edge": 4096 * unit}, **more,
    }  # fmt: skip


_CLIP_PIXELS: dict[str, Any] = {**CLIP, "size": {"shortest_edge": 48}, "crop_size": _square(48)}
_TILES = {"crop_to_patches": True, "min_patches": 1, "max_patches": 12, "size": _square(32), **IMAGENET}
_LFM2_PIXELS = {
    "downsample_factor": 2, "do_image_splitting": True, "min_tiles": 2, "max_tiles": 10, "use_thumbnail": True,
    "min_image_tokens": 64, "max_image_tokens": 256, "encoder_patch_size": 16, "tile_size": 512,
    "max_pixels_tolerance": 2.0, **HALF,
}  # fmt: skip
_PIXTRAL_PIXELS: dict[str, Any] = {**CLIP, "size": {"longest_edge": 128}, "patch_size": _square(8)}

FAMILIES = {
    "llava15": Family(LlavaForConditionalGeneration, _llava15, _CLIP_PIXELS),
    "llava_next": Family(
        LlavaNextForConditionalGeneration, _llava_next, _CLIP_PIXELS | {"image_grid_pinpoints": PINPOINTS}
    ),
    "idefics3": Family(
        Idefics3ForConditionalGeneration, _idefics3,
        {**HALF, "size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}},
    ),
    "smolvlm": Family(
        SmolVLMForConditionalGeneration, _smolvlm,
        {**HALF, "size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}},
    ),
    "qwen2vl": Family(Qwen2VLForConditionalGeneration, _qwen2vl, _qwen_pixels(8, **CLIP)),
    "qwen25vl": Family(Qwen2_5_VLForConditionalGeneration, _qwen25vl, _qwen_pixels(14, **CLIP)),
    "qwen3vl": Family(Qwen3VLForConditionalGeneration, _qwen3vl, _qwen_pixels(8, **HALF)),
    "internvl_qwen2": Family(InternVLForConditionalGeneration, _internvl_qwen2, _TILES),
    "internvl_qwen3": Family(InternVLForConditionalGeneration, _internvl_qwen3, _TILES),
    "gemma3": Family(
        Gemma3ForConditionalGeneration, _gemma3, {**HALF, "size": _square(64), "image_seq_length": 16}
    ),
    "lfm2vl": Family(Lfm2VlForConditionalGeneration, _lfm2vl, _LFM2_PIXELS),
    "pixtral": Family(LlavaForConditionalGeneration, _pixtral, _PIXTRAL_PIXELS),
    "mistral3": Family(Mistral3ForConditionalGeneration, _mistral3, _PIXTRAL_PIXELS | {"spatial_merge_size": 2}),
}  # fmt: skip
