"""The same weights in transformers: its names for a GGUF's tensors, and the CLIP and Llama they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tiny_models import TinyModel, pair_order

_CLIP_ENDS = {
    "v.class_embd": "embeddings.class_embedding", "v.patch_embd.weight": "embeddings.patch_embedding.weight",
    "v.position_embd.weight": "embeddings.position_embedding.weight",
    "v.pre_ln.weight": "pre_layrnorm.weight", "v.pre_ln.bias": "pre_layrnorm.bias",
}  # fmt: skip
_CLIP_PARTS = {
    "ln1": "layer_norm1", "ln2": "layer_norm2", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
}  # fmt: skip
_LLAMA_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}  # fmt: skip
_LLAMA_PARTS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def clip_names(blocks: int) -> dict[str, str]:
    """GGUF name to transformers', without its ``vision_model.``, of every tensor of a tower of ``blocks`` blocks."""
    return _CLIP_ENDS | {
        f"v.blk.{block}.{short}.{end}": f"encoder.layers.{block}.{part}.{end}"
        for block in range(blocks)
        for short, part in _CLIP_PARTS.items()
        for end in ("weight", "bias")
    }


def llama_name(name: str) -> str:
    """transformers' name for a tensor of a llama or qwen2vl GGUF."""
    if name in _LLAMA_ENDS:
        return _LLAMA_ENDS[name]
    _, block, part, end = name.split(".")
    return f"model.layers.{block}.{_LLAMA_PARTS[part]}.{end}"


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many blocks ``PREFIX.0``, ``PREFIX.1``, ... the names tell of."""
    return 1 + max(int(name.removeprefix(f"{prefix}.").split(".")[0]) for name in names if name.startswith(prefix))


def clip_of(mmproj: Mapping[str, torch.Tensor], heads: int, side: int, patch: int) -> CLIPVisionModel:
    """CLIP with the file's weights and one more block after the feature layer, as LLaVA's CLIP has."""
    blocks = count_blocks(mmproj, "v.blk")
    width, hidden = mmproj["v.class_embd"].numel(), mmproj["v.blk.0.ffn_up.weight"].shape[0]
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=blocks + 1, num_attention_heads=heads,
        image_size=side, patch_size=patch, hidden_act="gelu", layer_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    model = CLIPVisionModel(config).eval()
    state = model.state_dict()
    prefix = next(iter(state)).split("embeddings")[0]
    model.load_state_dict(state | {prefix + name: mmproj[short] for short, name in clip_names(blocks).items()})
    return model


def llama_of(lm: Mapping[str, torch.Tensor], heads: int) -> LlamaForCausalLM:
    """Llama with the dequantised weights of a file, query and key rows back in transformers' order."""
    vocab, width = lm["token_embd.weight"].shape
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=lm["blk.0.ffn_up.weight"].shape[0],
        num_hidden_layers=count_blocks(lm, "blk"), num_attention_heads=heads, rms_norm_eps=1e-5,
        max_position_embeddings=2048,
    )  # fmt: skip
    back = torch.from_numpy(pair_order(width, heads)).argsort()
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({
        llama_name(name): tensor[back] if ".attn_q." in name or ".attn_k." in name else tensor
        for name, tensor in lm.items()
    })  # fmt: skip
    return model


def torch_llama(tiny: TinyModel) -> Any:
    """What ``tiny`` was written from: a Llama, or for ``qwen2vl`` the text model of Qwen2-VL, which has no output."""
    sizes: dict[str, Any] = {
        "vocab_size": tiny.n_vocab, "hidden_size": tiny.n_embd, "intermediate_size": tiny.n_ff,
        "num_hidden_layers": tiny.n_layer, "num_attention_heads": tiny.n_head, "num_key_value_heads": tiny.n_head,
        "max_position_embeddings": tiny.n_ctx_train, "rms_norm_eps": tiny.norm_eps, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": tiny.rope_base},
    }  # fmt: skip
    state = {llama_name(name): torch.from_numpy(weight) for name, weight in tiny.weights.items()}
    if tiny.architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

        sizes["rope_parameters"]["mrope_section"] = [2, 3, 3]
        model = Qwen2VLTextModel(Qwen2VLTextConfig(**sizes))
        state = {name.removeprefix("model."): weight for name, weight in state.items() if name != "lm_head.weight"}
    model.load_state_dict(state)
    return model.eval()
