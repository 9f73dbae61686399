"""What a Hugging Face checkpoint's configuration says of its tower, as the metadata of an mmproj GGUF.

Keys and values are those that llama.cpp's converter writes, and those it leaves out although our families read them:
how small and large pictures may get (Qwen-VL, LFM2-VL), how many tiles (InternVL, LFM2-VL), the base of rotary
positions (Pixtral). A setting that makes another tower than our families build is refused, not passed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edge_tokcomp.errors import TokcompError, UnsupportedError
from edge_tokcomp.families.pixtral import HALVES

from .hf_defaults import CLIP, IMAGENET, MODELS, TANH, TOWERS
from .hf_settings import Settings

Metadata = dict[str, Any]

_NO_TABLE = 560
"""Pixels; the converter's ``image_size`` of towers that have no table of positions."""
_ROTARY_BASE = 10_000.0


def metadata_of(config: Settings, pixels: Settings) -> Metadata:
    """From ``config.json`` and the settings of the image processor; raises ``TokcompError``."""
    name, kind = _kind(config)
    config = replace(config, usual=MODELS[name])
    vision = config.part("vision_config", TOWERS[kind.tower])
    pixels = replace(pixels, usual=kind.pixels)
    flag = kind.activations[vision.one_of("hidden_act", list(kind.activations))]
    return {
        "clip.has_vision_encoder": True, "clip.projector_type": kind.projector,
        "clip.vision.patch_size": vision.side("patch_size"),
        "clip.vision.attention.layer_norm_epsilon": vision.number("layer_norm_eps"),
        "clip.vision.image_mean": pixels.numbers("image_mean"), "clip.vision.image_std": pixels.numbers("image_std"),
        **({flag: True} if flag else {}), **kind.own(config, vision, pixels),
    }  # fmt: skip


def _kind(config: Settings) -> tuple[str, _Kind]:
    """The name of the type of model, and what it is."""
    name, tower = str(config.get("model_type")), config.part("vision_config").get("model_type")
    kind = _PIXTRAL if (name, tower) == ("llava", "pixtral") else _KINDS.get(name)
    if kind is None:
        raise UnsupportedError(
            f"{config.file}: model type {name!r:.80} has no tower here; those that have: {', '.join(sorted(_KINDS))}"
        )
    if kind.tower in ("clip_vision_model", "pixtral"):  # Such models come with other towers too.
        config.part("vision_config").one_of("model_type", [kind.tower])
    return name, kind


def _llava(config: Settings, vision: Settings, pixels: Settings) -> Metadata:
    config.one_of("vision_feature_select_strategy", ["default"])
    config.one_of("projector_hidden_act", ["gelu"])
    return _usual(vision) | _up_to(config, "vision_feature_layer", vision)


def _llava_next(config: Settings, vision: Settings, pixels: Settings) -> Metadata:
    pairs = config.get("image_grid_pinpoints")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise TokcompError(f"{config.file}: image_grid_pinpoints {pairs!r:.80} are not heights and widths")
    return _llava(config, vision, pixels) | {
        "clip.vision.image_grid_pinpoints": [side for pair in pairs for side in pair],
        "clip.vision.mm_patch_merge_type": "spatial_unpad",
    }


def _idefics3(config: Settings, vision: Settings, pixels: Settings) -> Metadata:
    keys = _usual(vision) | {"clip.vision.projector.scale_factor": config.integer("scale_factor")}
    pixels.one_of("do_image_splitting", [True])
    pixels.part("max_image_size").one_of("longest_edge", [keys["clip.vision.image_size"]])
    return keys | _given("preproc_image_size", pixels.part("size"), "longest_edge")


def _gemma3(config: Settings, vision: Settings, pixels: Settings) -> Metadata:
    keys = _usual(vision)
    patches = keys["clip.vision.image_size"] // max(vision.side("patch_size"), 1)
    tokens = max(math.isqrt(max(config.integer("mm_tokens_per_image"), 0)), 1)
    return keys | {"clip.vision.projector.scale_factor": patches // tokens}


def _lfm2vl(config: Settings, vision: Settings, pixels: Settings) -> Metadata:
    config.one_of("vision_feature_layer", [-1])
    config.one_of("projector_hidden_act", ["gelu"])
    # The first checkpoints, published with code of their own, say these in config.json as well.
    pixels = replace(pixels, values={**config.values, **_set(pixels.values)})
    pixels.one_of("tile_size", [512])
    merge = config.integer("downsample_factor")
    area = (vision.side("patch_size") * merge) ** 2
    return {
        **_usual(vision), "clip.vision.projector.scale_factor": merge,
        **_given("image_min_pixels", pixels, "min_image_tokens", area),
        **_given("image_max_pixels", pixels, "max_image_tokens", area),
        **_tiles(pixels, "do_image_splitting", "min_tiles", "max_tiles"),
    }  # fmt: skip


def _internvl(config: Settings, vision: Settings, pixels: Settings) -> Metadata:
    vision.one_of("use_mean_pooling", [True])
    config.one_of("vision_feature_select_strategy", ["default"])
    config.one_of("projector_hidden_act", ["gelu"])
    return {
        **_usual(vision), **_shuffle(config), **_up_to(config, "vision_feature_layer", vision),
        **_given("preproc_min_tiles", pixels, "min_patches"), **_given("preproc_max_tiles", pixels, "max_patches"),
    }  # fmt: skip


def _internvl_chat(config: Settings, vision: Settings, pixels: Settings) -> Metadata:
    """InternVL as OpenGVLab publishes it, with code of its own: tiles are the model's settings."""
    config.one_of("ps_version", ["v2"])
    keys = _usual(vision)
    config.one_of("force_image_size", [keys["clip.vision.image_size"]])
    if config.get("dynamic_image_size"):
        config.one_of("use_thumbnail", [True])
    tiles = _tiles(config, "dynamic_image_size", "min_dynamic_patch", "max_dynamic_patch")
    return {**keys, **_shuffle(config), **_up_to(config, "select_layer", vision), **tiles}


def _pixtral(config: Settings, vision: Settings, pixels: Settings) -> Metadata:
    config = replace(config, usual={})  # Of LLaVA, that it came to be a case of, nothing else holds.
    config.one_of("vision_feature_select_strategy", ["full"])
    config.one_of("projector_hidden_act", ["gelu"])
    config.one_of("vision_feature_layer", [-1, [-1]])
    keys = _usual(vision)
    heads = max(keys["clip.vision.attention.head_count"], 1)
    vision.one_of("head_dim", [keys["clip.vision.embedding_length"] // heads])
    return keys | {"clip.rope.freq_base": _rotary_base(vision), HALVES: True}


def _mistral3(config: Settings, vision: Settings, pixels: Settings) -> Metadata:
    # Of the norm before patches are joined, which is built with the tower's epsilon.
    config.part("text_config").one_of("rms_norm_eps", [vision.number("layer_norm_eps")])
    merge = config.integer("spatial_merge_size")
    return _pixtral(config, vision, pixels) | {"clip.vision.spatial_merge_size": merge}


def _qwen2vl(config: Settings, vision: Settings, pixels: Settings) -> Metadata:
    ffn = vision.integer("mlp_ratio") * vision.integer("embed_dim")
    return {
        **_sizes(vision, "embed_dim", "depth", "num_heads"), **_qwen(vision, pixels),
        "clip.vision.feed_forward_length": ffn, "clip.vision.image_size": _NO_TABLE,
    }  # fmt: skip


def _qwen25vl(config: Settings, vision: Settings, pixels: Settings) -> Metadata:
    whole, blocks = vision.get("fullatt_block_indexes"), vision.integer("depth")
    every = whole[0] + 1 if isinstance(whole, list) and whole and type(whole[0]) is int and whole[0] >= 0 else 1
    if blocks > _MOST_BLOCKS or whole != list(range(every - 1, blocks, every)):
        raise UnsupportedError(
            f"{config.file}: vision_config.fullatt_block_indexes {whole!r:.80} is not every n-th of {blocks} blocks "
            "and is not supported"
        )
    return {
        **_sizes(vision, "hidden_size", "depth", "num_heads"), **_qwen(vision, pixels),
        "clip.vision.feed_forward_length": vision.integer("intermediate_size"), "clip.vision.n_wa_pattern": every,
        "clip.vision.window_size": vision.integer("window_size"), "clip.vision.image_size": _NO_TABLE,
    }  # fmt: skip


def _qwen3vl(config: Settings, vision: Settings, pixels: Settings) -> Metadata:
    levels, blocks = vision.get("deepstack_visual_indexes"), vision.integer("depth")
    inside = isinstance(levels, list) and all(type(level) is int and 0 <= level < blocks for level in levels)
    if blocks > _MOST_BLOCKS or not inside or levels != sorted(set(levels)):
        raise UnsupportedError(
            f"{config.file}: vision_config.deepstack_visual_indexes {levels!r:.80} does not name some of {blocks} "
            "blocks in order and is not supported"
        )
    side = math.isqrt(max(vision.integer("num_position_embeddings"), 0))
    return {
        **_sizes(vision, "hidden_size", "depth", "num_heads"), **_qwen(vision, pixels),
        "clip.vision.feed_forward_length": vision.integer("intermediate_size"),
        "clip.vision.image_size": side * vision.side("patch_size"),
        "clip.vision.is_deepstack_layers": [block in levels for block in range(blocks)],
    }  # fmt: skip


def _qwen(vision: Settings, pixels: Settings) -> Metadata:
    """What the three have in common."""
    vision.one_of("temporal_patch_size", [2])
    if _rotary_base(vision) != _ROTARY_BASE:
        raise UnsupportedError(f"{vision.file}: rope_theta of its tower is not {_ROTARY_BASE:g} and is not supported")
    size = pixels.get("size") if isinstance(pixels.get("size"), dict) else {}
    edges = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    pixels = replace(pixels, values={**_set(edges), **_set(size), **_set(pixels.values)})
    return {
        "clip.vision.spatial_merge_size": vision.integer("spatial_merge_size"),
        **_given("image_min_pixels", pixels, "min_pixels"), **_given("image_max_pixels", pixels, "max_pixels"),
    }  # fmt: skip


def _sizes(
    vision: Settings, width: str = "hidden_size", blocks: str = "num_hidden_layers", heads: str = "num_attention_heads"
) -> Metadata:
    return {
        "clip.vision.embedding_length": vision.integer(width), "clip.vision.block_count": vision.integer(blocks),
        "clip.vision.attention.head_count": vision.integer(heads),
    }  # fmt: skip


def _usual(vision: Settings) -> Metadata:
    """Of towers whose configuration is like most."""
    return _sizes(vision) | {
        "clip.vision.image_size": vision.side("image_size"),
        "clip.vision.feed_forward_length": vision.integer("intermediate_size"),
    }


def _up_to(config: Settings, key: str, vision: Settings) -> Metadata:
    """How many blocks are run, from the number of a hidden state: 0 before all of them, -1 after the last."""
    blocks, layer = vision.integer("num_hidden_layers"), config.get(key)
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if type(layer) is not int or not -blocks <= layer <= blocks or not layer:
        raise UnsupportedError(f"{config.file}: {key} {layer!r:.80} is not one of {blocks} blocks and is not supported")
    return {"clip.vision.block_count": layer if layer > 0 else blocks + 1 + layer}


def _shuffle(config: Settings) -> Metadata:
    ratio = config.number("downsample_ratio")
    if not 0 < ratio <= 1 or not (1 / ratio).is_integer():
        raise UnsupportedError(f"{config.file}: downsample_ratio {ratio!r} is not one in so many and is not supported")
    return {"clip.vision.projector.scale_factor": int(1 / ratio)}


def _tiles(settings: Settings, cuts: str, least: str, most: str) -> Metadata:
    """How many tiles a picture is cut into; one where ``cuts`` says that none is cut."""
    if settings.one_of(cuts, [True, False]):
        return _given("preproc_min_tiles", settings, least) | _given("preproc_max_tiles", settings, most)
    return {"clip.vision.preproc_min_tiles": 1, "clip.vision.preproc_max_tiles": 1}


def _rotary_base(vision: Settings) -> float:
    nested = vision.part("rope_parameters")
    return (nested if nested.get("rope_theta") is not None else vision).number("rope_theta")


def _given(name: str, settings: Settings, key: str, times: int = 1) -> Metadata:
    """An integer where there is one."""
    return {} if settings.get(key) is None else {f"clip.vision.{name}": settings.integer(key) * times}


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


_MOST_BLOCKS = 1024


@dataclass(frozen=True)
class _Kind:
    """A type of model. ``projector``: its name in an mmproj. ``tower``: in ``TOWERS``.

    ``activations``: those supported, with the key that says so (none for quick_gelu). ``own``: the keys that differ,
    from the settings of model, tower and image processor. ``pixels``: mean and deviation of all published checkpoints,
    where some of these have no file that says them.
    """

    projector: str
    tower: str
    activations: Mapping[str, str]
    own: Callable[[Settings, Settings, Settings], Metadata]
    pixels: Mapping[str, Any] = field(default_factory=dict)


_GELU, _SILU = "clip.use_gelu", "clip.use_silu"
_EITHER_GELU, _TANH, _GATED = {"quick_gelu": "", "gelu": _GELU}, {TANH: _GELU}, {"silu": _SILU, "gelu": _GELU}
_PIXTRAL = _Kind("pixtral", "pixtral", _GATED, _pixtral, CLIP)
_QWEN3 = _Kind("qwen3vl_merger", "qwen3_vl_vision", _TANH, _qwen3vl)
_LFM2 = _Kind("lfm2", "siglip2_vision_model", _TANH, _lfm2vl)
_KINDS = {
    "llava": _Kind("mlp", "clip_vision_model", _EITHER_GELU, _llava),
    "llava_next": _Kind("mlp", "clip_vision_model", _EITHER_GELU, _llava_next),
    "idefics3": _Kind("idefics3", "idefics3_vision", _TANH, _idefics3),
    "smolvlm": _Kind("idefics3", "idefics3_vision", _TANH, _idefics3),
    "qwen2_vl": _Kind("qwen2vl_merger", "qwen2_vl_vision", {"quick_gelu": ""}, _qwen2vl),
    "qwen2_5_vl": _Kind("qwen2.5vl_merger", "qwen2_5_vl_vision", {"silu": _SILU}, _qwen25vl),
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "internvl": _Kind("internvl", "internvl_vision", {"gelu": _GELU}, _internvl),
    "internvl_chat": _Kind("internvl", "intern_vit_6b", {"gelu": _GELU}, _internvl_chat, IMAGENET),
    "gemma3": _Kind("gemma3", "siglip_vision_model", _TANH, _gemma3),
    "lfm2_vl": _LFM2,
    "lfm2-vl": _LFM2,
    "mistral3": replace(_PIXTRAL, own=_mistral3),
}
