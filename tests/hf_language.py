"""The language half of a transformers model as a GGUF: the tensors and metadata that llama.cpp's converter writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from tiny_models import pair_order

F32 = GGMLQuantizationType.F32
_ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen2_vl_text": "qwen2vl",
    "qwen2_5_vl_text": "qwen2vl", "qwen3_vl_text": "qwen3vl", "gemma3_text": "gemma3", "lfm2": "lfm2",
}  # fmt: skip
_PAIRED = ("llama", "mistral3")
"""Architectures whose rotary embedding turns neighbouring components, where transformers turns the two halves."""
_GELU = "gelu_pytorch_tanh"
_GEMMA_PERIOD = 6
"""llama.cpp takes every sixth layer of gemma3 for a global one unless the file says otherwise."""


def write_language(
    model: Any,
    family: str,
    path: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str | None,
    kind: GGMLQuantizationType = F32,
) -> Path:
    """Write the text model and output matrix of ``model``, a ``...ForConditionalGeneration`` or ``...ForCausalLM``.

    ``kind``: the type of the matrices. Raises ``ValueError`` for a setting that a GGUF of its architecture cannot say.
    """
    text = text_model(model)
    config = text.config
    arch = architecture(family, config.model_type)
    path = Path(path)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"tiny {family}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tensors = _tensors(model, text, arch)
    _write_sizes(writer, arch, config, tensors)
    _write_rotation(writer, arch, config)
    if arch == "gemma3":
        _write_gemma(writer, config)
    if arch == "lfm2":
        writer.add_shortconv_l_cache(config.conv_L_cache)
    if arch == "qwen3vl":
        vision = getattr(model.config, "vision_config", None)
        writer.add_num_deepstack_layers(len(vision.deepstack_visual_indexes) if vision is not None else 0)
    _write_tokenizer(writer, tokenizer, config.vocab_size, chat_template)
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or kind == F32 or "shortconv.conv" in name:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text_model(model: Any) -> Any:
    """The stack of layers with token table and last norm, of a vision-language model or a causal language model."""
    inner = model.model
    for name in ("language_model", "text_model"):  # Idefics3 and SmolVLM say the latter
        if hasattr(inner, name):
            return getattr(inner, name)
    return inner


def round_gelu(model: Any) -> None:
    """Round where llama.cpp does: on the CPU it looks GELU up in a table of half floats. Other activations stay."""
    text = text_model(model)
    if _activation(text.config) == _GELU:
        for layer in text.layers:
            layer.mlp.act_fn = _Gelu()


class _Gelu(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The table reaches from -10 to 10; beyond it GELU is 0 or ``x``."""
        looked_up = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x.abs() < 10, looked_up, x.relu())


def architecture(family: str, model_type: str) -> str:
    """llama.cpp's name for a text model; Mistral 3 is the one family that goes by the whole model's class."""
    if family == "mistral3":
        return "mistral3"
    if model_type not in _ARCHITECTURES:
        raise ValueError(f"a text model of type {model_type!r} is none of {', '.join(_ARCHITECTURES)}")
    return _ARCHITECTURES[model_type]


def _tensors(model: Any, text: Any, arch: str) -> dict[str, NDArray[np.float32]]:
    """Every tensor ``float32`` by GGUF name, in llama.cpp's order of rows."""
    config = text.config
    key = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    state = {f"model.{name}": tensor for name, tensor in text.state_dict().items()}
    if model.lm_head.weight.data_ptr() != text.embed_tokens.weight.data_ptr():
        state["lm_head.weight"] = model.lm_head.weight
    tensors = {}
    for name, tensor in state.items():
        short = names.get_name(name, (".weight", ".bias"))
        if short is None:
            raise ValueError(f"{arch} has no tensor for {name}")
        values = tensor.detach().float().numpy()
        if arch in _PAIRED and ".attn_q." in short:
            values = values[pair_order(len(values), config.num_attention_heads)]
        if arch in _PAIRED and ".attn_k." in short:
            values = values[pair_order(len(values), config.num_key_value_heads)]
        if arch == "gemma3" and short.endswith("norm.weight"):
            values = values + np.float32(1)  # transformers adds the 1 on every call
        if "shortconv.conv" in short:
            values = values[:, 0]
        tensors[short] = np.ascontiguousarray(values, np.float32)
    return tensors


def _write_sizes(writer: gguf.GGUFWriter, arch: str, config: Any, tensors: dict[str, NDArray[np.float32]]) -> None:
    expected = _GELU if arch == "gemma3" else "silu"
    if _activation(config) != expected:
        raise ValueError(f"{arch} in llama.cpp computes {expected}, not {_activation(config)}")
    if arch != "gemma3" and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(f"llama.cpp knows no sliding window for {arch}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    # LFM2's intermediate_size is not its width: other settings adjust it.
    writer.add_feed_forward_length(len(tensors["blk.0.ffn_gate.weight"]))
    writer.add_head_count(config.num_attention_heads)
    if arch == "lfm2":  # a layer without heads is a convolution
        writer.add_head_count_kv([
            config.num_key_value_heads * (layer != "conv") for layer in config.layer_types
        ])  # fmt: skip
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
    if arch in (*_PAIRED, "lfm2"):
        writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.norm_eps if arch == "lfm2" else config.rms_norm_eps)
    if head := getattr(config, "head_dim", None):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if arch in _PAIRED:
        writer.add_rope_dimension_count(_head(config))


def _write_rotation(writer: gguf.GGUFWriter, arch: str, config: Any) -> None:
    """Rotary base, scaling and sections; what llama.cpp knows of transformers' ``rope_parameters``."""
    rope = config.rope_parameters
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if sections := rope.get("mrope_section"):
        writer.add_rope_dimension_sections([*sections, *[0] * (4 - len(sections))])
    scaling = rope.get("rope_type", "default")
    if scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif scaling == "llama3" and arch == "llama":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, _head(config)))
    elif scaling != "default":
        raise ValueError(f"rope_type {scaling!r} of {arch} is not written here")


def _llama3_factors(rope: dict[str, Any], head: int) -> NDArray[np.float32]:
    """What Llama 3.1 divides each frequency by: 1 for short waves, ``factor`` for long ones, a blend between."""
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head, 2) / head)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / rope["factor"] + blend)).astype(np.float32)


def _write_gemma(writer: gguf.GGUFWriter, config: Any) -> None:
    if config.query_pre_attn_scalar != _head(config):
        raise ValueError(
            f"llama.cpp scales gemma3's attention by head_dim {_head(config)}, not {config.query_pre_attn_scalar}"
        )
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)
    sliding = [layer == "sliding_attention" for layer in config.layer_types]
    if sliding != [(layer + 1) % _GEMMA_PERIOD > 0 for layer in range(len(sliding))]:
        writer.add_sliding_window_pattern(sliding)


def _write_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, n_vocab: int, chat_template: str | None
) -> None:
    """The byte-level vocabulary of ``hf_processors.make_tokenizer``."""
    kind = gguf.TokenType
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    types = [kind.NORMAL] * n_vocab
    for number, token in added.items():
        control = token.special or (token.content.startswith("<|") and token.content.endswith("|>"))
        types[number] = kind.CONTROL if control else kind.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([texts[number] for number in range(n_vocab)])
    writer.add_token_types(types)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        writer.add_add_bos_token(True)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _activation(config: Any) -> str:
    """LFM2 names none: it is always SiLU."""
    return str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", "silu"))


def _head(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
