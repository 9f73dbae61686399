"""Tiny language models whose text enters as token ids (CogVLM, Gemma-3n, Gemma-4 E2B, DeepSeek-V4), and HunyuanVL's and
the larger Gemma-4's, which take rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

import tiny_models
from mtmd_towers import write_marked

Weights = dict[str, NDArray[np.float32]]
Matrix = Callable[..., NDArray[np.float32]]

LAYERS, HEADS, HEAD, INSIDE = 2, 4, 16, 64
ALTERNATIVES, FURTHER, RANK = 4, 256, 64
"""Gemma-3n's streams beside one another, width of its further embeddings and LAuReL's rank: fixed in llama.cpp."""
SMALLER = 32
"""Width of Gemma-4's further embeddings."""
TAKING_TOKENS = ("cogvlm", "gemma3n", "gemma4_e2b", "deepseek4")

_STREAMS, _EXPERTS, _GROUPS, _LOW, _KEY = 4, 4, 2, 16, 64
"""DeepSeek-V4's streams beside one another (fixed in llama.cpp), experts, output groups, ranks and width of keys."""
_RATIOS = (0, 4, 128)
"""Rows that become one for the attention of each of its layers; of the first, experts go by token."""


def write_token_model(path: Path, name: str, markers: tuple[str, ...] = ()) -> Path:
    """``cogvlm``, ``gemma3n``, ``gemma4``, ``gemma4_e2b``, ``deepseek4`` or ``hunyuan_vl``, with ``markers`` in its
    vocabulary."""
    architecture = name.removesuffix("_e2b")
    # Of this width are E2B's rows, by which libmtmd tells that its images are causal.
    n_embd = 1536 if name == "gemma4_e2b" else HEADS * HEAD
    sizes: dict[str, Any] = {
        "feed_forward_length": INSIDE, "attention.key_length": HEAD, "attention.value_length": HEAD,
        "rope.dimension_count": HEAD,
    }  # fmt: skip
    if architecture == "gemma4":
        sizes |= {
            "attention.sliding_window_pattern": [True, False], "attention.key_length_swa": HEAD,
            "attention.value_length_swa": HEAD, "rope.dimension_count_swa": HEAD,
            "embedding_length_per_layer_input": SMALLER if name == "gemma4_e2b" else 0,
        }  # fmt: skip
    if architecture == "deepseek4":
        sizes |= _DEEPSEEK4
    if architecture == "hunyuan_vl":
        sizes["rope.dimension_sections"] = [2, 2, 2, 2]

    def weights(_name: str, width: int, layers: int, _heads: int, _kv: int, n_vocab: int, seed: int) -> Weights:
        random = np.random.default_rng(seed)

        def matrix(*shape: int) -> NDArray[np.float32]:
            """Rows last but one, columns last; a single number makes a norm's weight."""
            values = random.standard_normal(shape)
            return (values / np.sqrt(shape[-1]) if len(shape) > 1 else 1 + 0.1 * values).astype(np.float32)

        made = {"token_embd.weight": matrix(n_vocab, width), "output_norm.weight": matrix(width)}
        made["token_embd.weight"] *= np.float32(np.sqrt(width) if "gemma" not in name else 1)
        for layer in range(layers):
            block = _deepseek4(matrix, width, layer, random, n_vocab) if name == "deepseek4" else _llama(matrix, width)
            block |= _FURTHER[name](matrix, width)
            if name == "cogvlm":
                for part in ("attn_q", "attn_k", "attn_v"):
                    del block[f"{part}.weight"]
            made |= {f"blk.{layer}.{part}": weight for part, weight in block.items()}
        if name == "gemma3n":
            made |= {f"altup_{part}.weight": matrix(ALTERNATIVES - 1, width, width) for part in ("proj", "unembd_proj")}
        if further := {"gemma3n": FURTHER, "gemma4_e2b": SMALLER}.get(name):
            made |= {
                "per_layer_token_embd.weight": matrix(n_vocab, further * layers),
                "per_layer_model_proj.weight": matrix(further * layers, width),
                "per_layer_proj_norm.weight": matrix(further),
            }
        if architecture == "gemma4":
            made["rope_freqs.weight"] = np.linspace(1, 4, HEAD // 2, dtype=np.float32)
        if architecture == "deepseek4":
            made |= {
                "output_hc_fn.weight": matrix(_STREAMS, _STREAMS * width), "output_hc_base.weight": matrix(_STREAMS),
                "output_hc_scale.weight": matrix(1),
            }  # fmt: skip
        if architecture in ("cogvlm", "hunyuan_vl", "deepseek4"):
            made["output.weight"] = 4 * matrix(n_vocab, width)
        return made

    layers = len(_RATIOS) if architecture == "deepseek4" else LAYERS
    with mock.patch.object(tiny_models, "_weights", weights):
        return write_marked(path, architecture, n_embd, markers, n_layer=layers, n_head=HEADS, extra=sizes)


def _llama(matrix: Matrix, width: int) -> Weights:
    inner = HEADS * HEAD
    return {
        "attn_norm.weight": matrix(width), "ffn_norm.weight": matrix(width), "attn_output.weight": matrix(width, inner),
        **{f"attn_{part}.weight": matrix(inner, width) for part in "qkv"},
        "ffn_gate.weight": matrix(INSIDE, width), "ffn_up.weight": matrix(INSIDE, width),
        "ffn_down.weight": matrix(width, INSIDE),
    }  # fmt: skip


def _cogvlm(matrix: Matrix, width: int) -> Weights:
    """Queries, keys and values in one, and everything once more for images."""
    inner = HEADS * HEAD
    return {
        "attn_qkv.weight": matrix(3 * inner, width), "vis_attn_qkv.weight": matrix(3 * inner, width),
        "vis_attn_output.weight": matrix(width, inner), "vis_gate.weight": matrix(INSIDE, width),
        "vis_up.weight": matrix(INSIDE, width), "vis_down.weight": matrix(width, INSIDE),
    }  # fmt: skip


def _query_norms(matrix: Matrix, _width: int) -> Weights:
    return {f"attn_{part}_norm.weight": matrix(HEAD) for part in "qk"}


def _gemma(matrix: Matrix, width: int) -> Weights:
    norms = {f"post_{part}_norm.weight": matrix(width) for part in ("attention", "ffw")}
    return norms | _query_norms(matrix, width)


def _per_layer(matrix: Matrix, width: int, further: int) -> Weights:
    return {
        "inp_gate.weight": matrix(further, width), "proj.weight": matrix(width, further),
        "post_norm.weight": matrix(width),
    }  # fmt: skip


def _gemma3n(matrix: Matrix, width: int) -> Weights:
    return _gemma(matrix, width) | _per_layer(matrix, width, FURTHER) | {
        "altup_correct_coef.weight": matrix(ALTERNATIVES, ALTERNATIVES), "altup_correct_scale.weight": matrix(width),
        "altup_predict_coef.weight": matrix(ALTERNATIVES**2, ALTERNATIVES),
        "altup_router.weight": matrix(ALTERNATIVES, width), "altup_router_norm.weight": matrix(width),
        "laurel_l.weight": matrix(RANK, width), "laurel_r.weight": matrix(width, RANK),
        "laurel_post_norm.weight": matrix(width),
    }  # fmt: skip


def _deepseek4(matrix: Matrix, width: int, layer: int, random: np.random.Generator, n_vocab: int) -> Weights:
    ratio, mix = _RATIOS[layer], (2 + _STREAMS) * _STREAMS
    block = {
        "attn_norm.weight": matrix(width), "attn_sinks.weight": matrix(HEADS), "attn_q_a.weight": matrix(_LOW, width),
        "attn_q_a_norm.weight": matrix(_LOW), "attn_q_b.weight": matrix(HEADS * _KEY, _LOW),
        "attn_kv.weight": matrix(_KEY, width), "attn_kv_a_norm.weight": matrix(_KEY),
        "attn_output_a.weight": matrix(_GROUPS * _LOW, HEADS * _KEY // _GROUPS),
        "attn_output_b.weight": matrix(width, _GROUPS * _LOW), "ffn_norm.weight": matrix(width),
        "ffn_gate_inp.weight": matrix(_EXPERTS, width), "exp_probs_b_vl.bias": matrix(_EXPERTS) - 1,
        "ffn_gate_shexp.weight": matrix(INSIDE, width), "ffn_up_shexp.weight": matrix(INSIDE, width),
        "ffn_down_shexp.weight": matrix(width, INSIDE), "ffn_gate_exps.weight": matrix(_EXPERTS, INSIDE, width),
        "ffn_up_exps.weight": matrix(_EXPERTS, INSIDE, width), "ffn_down_exps.weight": matrix(_EXPERTS, width, INSIDE),
    }  # fmt: skip
    for part in ("attn", "ffn"):
        block |= {f"hc_{part}_fn.weight": matrix(mix, _STREAMS * width), f"hc_{part}_base.weight": matrix(mix)}
        block[f"hc_{part}_scale.weight"] = matrix(3)
    if layer:
        block["exp_probs_b.bias"] = matrix(_EXPERTS) - 1
    else:
        block["ffn_gate_tid2eid.weight"] = random.integers(0, _EXPERTS, (n_vocab, 2)).astype(np.int32)
    for part in {0: (), 4: ("attn", "indexer"), 128: ("attn",)}[ratio]:
        wide = _KEY * (2 if ratio == 4 else 1)
        block |= {f"{part}_compressor_{end}.weight": matrix(wide, width) for end in ("kv", "gate")}
        block |= {
            f"{part}_compressor_ape.weight": matrix(ratio, wide), f"{part}_compressor_norm.weight": matrix(_KEY)
        }  # fmt: skip
    if ratio == 4:
        block |= {"indexer.proj.weight": matrix(2, width), "indexer.attn_q_b.weight": matrix(2 * _KEY, _LOW)}
    return block


_DEEPSEEK4: dict[str, Any] = {
    "attention.key_length": _KEY, "attention.value_length": _KEY, "attention.head_count_kv": 1,
    "attention.q_lora_rank": _LOW, "attention.sliding_window": 64, "attention.indexer.head_count": 2,
    "attention.indexer.key_length": _KEY, "attention.indexer.top_k": 16, "attention.output_group_count": _GROUPS,
    "attention.output_lora_rank": _LOW, "attention.compress_rope_freq_base": 160000.0,
    "attention.compress_ratios": list(_RATIOS), "expert_feed_forward_length": INSIDE, "expert_shared_count": 1,
    "expert_weights_scale": 1.5, "expert_weights_norm": True, "expert_gating_func": 4, "expert_count": _EXPERTS,
    "expert_used_count": 2, "swiglu_clamp_exp": 10.0, "hyper_connection.count": _STREAMS,
    "hyper_connection.sinkhorn_iterations": 3, "hyper_connection.epsilon": 1e-6, "hash_layer_count": 1,
}  # fmt: skip

_FURTHER: dict[str, Callable[[Matrix, int], Weights]] = {
    "cogvlm": _cogvlm, "deepseek4": lambda _matrix, _width: {}, "gemma3n": _gemma3n, "gemma4": _gemma,
    "hunyuan_vl": _query_norms,
    "gemma4_e2b": lambda matrix, width: _gemma(matrix, width) | _per_layer(matrix, width, SMALLER),
}  # fmt: skip
