"""Language models small enough to make on the spot: random weights, a real tokenizer, every shape llama.cpp wants.

The vocabulary is SentencePiece-like, with all byte tokens, so any text has tokens and any text comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

BOS, EOS, IM_START, IM_END = 1, 2, 259, 260
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = "a the of in on and is are red green blue small large cat dog bird square circle left right two what this"
_SECTIONS = (2, 3, 3, 0)
ARCHITECTURES = (
    "llama", "mistral3", "internlm2", "phi3", "granite", "qwen2", "qwen3", "qwen2vl", "qwen3vl", "gemma2", "gemma3",
    "lfm2",
)  # fmt: skip


@dataclass(frozen=True)
class TinyModel:
    """What was written: ``weights`` by GGUF tensor name, ``float32``, before quantisation and rotary permutation."""

    path: Path
    architecture: str
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    rope_base: float
    norm_eps: float
    weights: dict[str, NDArray[np.float32]]


def byte_token(value: int) -> int:
    """The token that stands for one byte."""
    return 3 + value


def tiny_vocabulary(n_vocab: int) -> tuple[list[bytes], list[float], list[int]]:
    """Tokens, scores and types: special, 256 bytes, two chat marks, characters, words with their prefixes, filler."""
    kind = gguf.TokenType
    entries = [("<unk>", 0.0, kind.UNKNOWN), ("<s>", 0.0, kind.CONTROL), ("</s>", 0.0, kind.CONTROL)]
    entries += [(f"<0x{value:02X}>", 0.0, kind.BYTE) for value in range(256)]
    entries += [("<|im_start|>", 0.0, kind.CONTROL), ("<|im_end|>", 0.0, kind.CONTROL)]
    seen: list[str] = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    for word in _WORDS.split():
        seen += [f"▁{word[:end]}" for end in range(1, len(word) + 1)]
    texts = list(dict.fromkeys(seen))
    texts += [f"▁zq{number}" for number in range(n_vocab - len(entries) - len(texts))]
    # A longer piece merges first, as frequent words do in a trained vocabulary.
    entries += [(text, float(len(text)) - 100.0, kind.NORMAL) for text in texts]
    entries = entries[:n_vocab]
    if len(entries) < IM_END + 28:
        raise ValueError(f"n_vocab {n_vocab} leaves no room for the letters; use 288 or more")
    return [text.encode() for text, _, _ in entries], [score for _, score, _ in entries], [t.value for *_, t in entries]


def write_tiny_llama(
    path: str | Path,
    *,
    n_embd: int = 64,
    n_layer: int = 2,
    n_head: int = 4,
    n_vocab: int = 416,
    quantization: str = "F32",
    chat_template: str | None = None,
    seed: int = 0,
) -> TinyModel:
    """A random llama-architecture GGUF; ``quantization`` is that of all matrices (``F32``, ``F16``, ``Q8_0``, ...)."""
    return write_tiny_model(
        path, "llama", n_embd=n_embd, n_layer=n_layer, n_head=n_head, n_vocab=n_vocab, quantization=quantization,
        chat_template=chat_template, seed=seed,
    )  # fmt: skip


def write_tiny_model(
    path: str | Path,
    architecture: str,
    *,
    n_embd: int = 64,
    n_layer: int = 2,
    n_head: int = 4,
    n_vocab: int = 416,
    quantization: str = "F32",
    chat_template: str | None = None,
    seed: int = 0,
    n_head_kv: int | None = None,
    tied: bool = False,
    rope_freqs: bool = False,
    extra: Mapping[str, Any] | None = None,
    tensors_per_file: int = 0,
) -> TinyModel:
    """As ``write_tiny_llama`` for ``ARCHITECTURES``.

    ``qwen3vl`` takes three deepstack slices, so it needs four layers or more; in ``lfm2`` every other layer, from the
    first, is a convolution. ``n_head_kv``: heads of keys and values, as many as of queries by default.
    ``tied``: without an output matrix. ``rope_freqs``: with factors for rotary frequencies.
    ``extra``: metadata of the architecture, over what is written otherwise (``None`` leaves a key out).
    ``tensors_per_file``: in several files, named as ``model-00001-of-00003.gguf`` for ``model.gguf``.
    """
    n_head_kv = n_head_kv or n_head
    weights = _weights(architecture, n_embd, n_layer, n_head, n_head_kv, n_vocab, seed)
    if tied:
        del weights["output.weight"]
    if rope_freqs:
        weights["rope_freqs.weight"] = np.linspace(1, 4, n_embd // n_head // 2, dtype=np.float32)
    path = Path(path)
    writer = gguf.GGUFWriter(str(path), architecture, split_max_tensors=tensors_per_file)
    if tensors_per_file:
        path = path.with_name(f"{path.stem}-00001-of-{-(-len(weights) // tensors_per_file):05}.gguf")
    model = TinyModel(
        path, architecture, n_embd, n_layer, n_head, n_head_kv, 2 * n_embd, n_vocab, 8192, 10000.0, 1e-5, weights
    )  # fmt: skip
    _write_metadata(writer, model, chat_template, extra or {})
    kind = GGMLQuantizationType[quantization]
    for name, weight in weights.items():
        if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = weight[pair_order(len(weight), len(weight) * n_head // n_embd)]
        if weight.ndim == 1 or kind == GGMLQuantizationType.F32 or "shortconv.conv" in name:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _write_metadata(
    writer: gguf.GGUFWriter, model: TinyModel, chat_template: str | None, extra: Mapping[str, Any]
) -> None:
    head = model.n_embd // model.n_head
    values: dict[str, Any] = {
        "context_length": model.n_ctx_train, "embedding_length": model.n_embd, "block_count": model.n_layer,
        "feed_forward_length": model.n_ff, "attention.head_count": model.n_head,
        "attention.head_count_kv": model.n_head_kv, "attention.key_length": head, "attention.value_length": head,
        "rope.dimension_count": head, "rope.freq_base": model.rope_base,
        "attention.layer_norm_rms_epsilon": model.norm_eps, "vocab_size": model.n_vocab,
    }  # fmt: skip
    if model.architecture == "lfm2":
        values["attention.head_count_kv"] = [model.n_head_kv * (layer % 2) for layer in range(model.n_layer)]
        values["shortconv.l_cache"] = 3
    if model.architecture.startswith("gemma"):
        values["attention.sliding_window"] = 32
    if model.architecture.endswith("vl"):
        values["rope.dimension_sections"] = list(_SECTIONS)
    if model.architecture == "qwen3vl":
        values["n_deepstack_layers"] = 3
    if model.architecture == "granite":
        values |= {"embedding_scale": 12.0, "residual_scale": 0.25, "logit_scale": 8.0, "attention.scale": 0.1}
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("tiny")  # llama.cpp asks more of the vocabulary where the name says phi3
    for key, value in (values | extra).items():
        _write_value(writer, f"{model.architecture}.{key}", value)
    tokens, scores, types = tiny_vocabulary(model.n_vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _write_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _weights(
    architecture: str, n_embd: int, n_layer: int, n_head: int, n_head_kv: int, n_vocab: int, seed: int
) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    n_ff, head = 2 * n_embd, n_embd // n_head
    n_kv = n_head_kv * head

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def norm(size: int) -> NDArray[np.float32]:
        return (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    weights = {"token_embd.weight": rng.standard_normal((n_vocab, n_embd)).astype(np.float32)}
    for layer in range(n_layer):
        block = {
            "attn_norm.weight": norm(n_embd),
            "attn_q.weight": matrix(n_embd, n_embd),
            "attn_k.weight": matrix(n_kv, n_embd),
            "attn_v.weight": matrix(n_kv, n_embd),
            "attn_output.weight": matrix(n_embd, n_embd),
            "ffn_norm.weight": norm(n_embd),
            "ffn_gate.weight": matrix(n_ff, n_embd),
            "ffn_up.weight": matrix(n_ff, n_embd),
            "ffn_down.weight": matrix(n_embd, n_ff),
        }
        if architecture in ("qwen2", "qwen2vl"):
            block |= {f"attn_{part}.bias": 0.1 * matrix(1, len(block[f"attn_{part}.weight"]))[0] for part in "qkv"}
        if architecture in ("gemma3", "qwen3", "qwen3vl", "lfm2"):
            block |= {f"attn_{part}_norm.weight": norm(head) for part in "qk"}
        if architecture.startswith("gemma"):
            block |= {"post_attention_norm.weight": norm(n_embd), "post_ffw_norm.weight": norm(n_embd)}
        if architecture == "phi3":  # one matrix for queries, keys and values, one for gate and up
            block = {
                name: weight for name, weight in block.items() if not name.startswith(("attn_q", "attn_k", "attn_v"))
            }
            block |= {"attn_qkv.weight": matrix(n_embd + 2 * n_kv, n_embd), "ffn_up.weight": matrix(2 * n_ff, n_embd)}
            del block["ffn_gate.weight"]
        if architecture == "lfm2" and layer % 2 == 0:
            block = {name: weight for name, weight in block.items() if name.startswith(("ffn", "attn_norm"))}
            block |= {
                "shortconv.conv.weight": matrix(n_embd, 3),
                "shortconv.in_proj.weight": matrix(3 * n_embd, n_embd),
            }
            block["shortconv.out_proj.weight"] = matrix(n_embd, n_embd)
        weights |= {f"blk.{layer}.{name}": weight for name, weight in block.items()}
    weights["token_embd_norm.weight" if architecture == "lfm2" else "output_norm.weight"] = norm(n_embd)
    if not architecture.startswith("gemma"):  # gemma's output is its token table
        weights["output.weight"] = matrix(n_vocab, n_embd) * 4
    return weights


def pair_order(rows: int, n_head: int) -> NDArray[np.int64]:
    """For each row of a query or key matrix in llama.cpp's order (pairs), its number in Hugging Face's (halves)."""
    head = rows // n_head
    return np.array([
        start + pair + half
        for start in range(0, rows, head) for pair in range(head // 2) for half in (0, head // 2)
    ])  # fmt: skip
