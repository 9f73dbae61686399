"""Language models of the published sizes with random weights: what speed and memory are measured on.

Laid out as llama-quantize lays out the real files (``Q4_0``: all matrices but the head, which is ``Q6_K``, or ``Q8_0``
where its rows are no multiple of 256; ``Q8_0``: all matrices; norms and biases ``F32``). The vocabulary has the real
number of tokens and a few words; most of it is filler. The chat template writes LLaVA-1.5's form.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType

from edge_tokcomp.errors import UsageError

from .random_files import Tensor, cached_file


@dataclass(frozen=True)
class LanguageShape:
    """Sizes of one language model; ``tied``: the token table is the head, too. ``specials``: control tokens that stand
    around pictures; ``image``: what the chat template writes for one. ``window``: rows that most layers look back on, 0
    where all see everything; ``stretch``: what positions of the others are divided by."""

    name: str
    architecture: str
    layers: int
    n_embd: int
    n_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_base: float
    context: int
    norm_eps: float
    tied: bool
    specials: tuple[str, ...] = ()
    image: str = "<image>"
    window: int = 0
    stretch: float = 1.0


_IDEFICS3 = (
    "\n", "\n\n", "<fake_token_around_image>", "<global-img>", "<image>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)  # fmt: skip

# From the checkpoints' config.json, held against published files. LLaVA-1.5 and 1.6 are one language model here, both
# Vicuna 7B: their GGUFs come from the original checkpoints, whose vocabulary is 32 000 (llava-hf's is padded to
# 32 064). The Qwen file's log says 3.09 B parameters, which is tied. SmolVLM's Q8_0 files have 175 054 528 and
# 436 806 912 bytes, which is untied, as is InternVL3-1B's of 675 206 560 (the dynamic NTK scaling of
# its configuration begins beyond 32 768 rows and is left out). Gemma's log says 3.88 B parameters, its Q8_0 file has
# 4 130 226 336 bytes; the first files had 262 144 tokens, later ones all 262 208.
LANGUAGE_SHAPES = {
    shape.name: shape
    for shape in (
        LanguageShape("llava-1.5-7b", "llama", 32, 4096, 11008, 32, 32, 128, 32000, 1e4, 4096, 1e-5, False),
        LanguageShape(
            "qwen2.5-vl-3b", "qwen2vl", 36, 2048, 11008, 16, 2, 128, 151936, 1e6, 128000, 1e-6, True,
            ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>"), "<|vision_start|><|image_pad|><|vision_end|>",
        ),
        LanguageShape("smolvlm-256m", "llama", 30, 576, 1536, 9, 3, 64, 49280, 1e5, 8192, 1e-5, False, _IDEFICS3),
        LanguageShape("smolvlm-500m", "llama", 32, 960, 2560, 15, 5, 64, 49280, 1e5, 8192, 1e-5, False, _IDEFICS3),
        LanguageShape(
            "internvl3-1b", "qwen2", 24, 896, 4864, 14, 2, 64, 151674, 1e6, 32768, 1e-6, False,
            ("<img>", "</img>", "<IMG_CONTEXT>"),
        ),
        LanguageShape(
            "gemma3-4b", "gemma3", 34, 2560, 10240, 8, 4, 256, 262208, 1e6, 131072, 1e-6, True,
            ("\n\n", "<start_of_image>", "<end_of_image>", "<image_soft_token>"), "<start_of_image>", 1024, 8.0,
        ),
    )
}  # fmt: skip

_FILE_TYPES = {"Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}

# A question with pictures comes as parts, one of them an image, or all of them text where a marker stands for it
# (llama-cpp-python's MTMDChatHandler), or as one string.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | upper }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ '' if loop.first else '\\n' }}{{ 'IMAGE' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

_WORDS = (
    "USER: ASSISTANT: A chat between a curious human and an artificial intelligence assistant. The gives helpful, "
    "detailed, polite answers to the human's questions. Describe the image briefly. in detail. What is this are of on "
    "with two left right red green blue"
)


def cached_language_model(
    shape: LanguageShape, quantization: str = "Q4_0", cache: str | os.PathLike[str] | None = None
) -> Path:
    """The GGUF of ``shape`` in ``cache`` (by default that of the towers), written there when it is missing or damaged.

    Raises ``UsageError`` for a quantisation other than ``Q4_0`` and ``Q8_0``, ``TokcompError`` when the disk has no
    room for it or cannot be written.
    """
    if quantization not in _FILE_TYPES:
        raise UsageError(f"quantization {quantization!r} is unknown; choose {' or '.join(_FILE_TYPES)}")

    def describe(writer: gguf.GGUFWriter) -> None:
        _add_metadata(writer, shape)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_FILE_TYPES[quantization])

    facts = f"{shape} {_CHAT_TEMPLATE}"
    return cached_file(
        f"{shape.name}-{quantization}", shape.architecture, _tensors(shape, quantization), facts, describe, cache
    )


def _tensors(shape: LanguageShape, quantization: str) -> dict[str, Tensor]:
    """Every tensor, in the order of published files."""
    usual = GGMLQuantizationType[quantization]
    head = usual
    if quantization == "Q4_0":
        head = GGMLQuantizationType.Q8_0 if shape.n_embd % 256 else GGMLQuantizationType.Q6_K
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    block = {
        "attn_norm.weight": Tensor((shape.n_embd,), centre=1.0),
        "attn_q.weight": Tensor((queries, shape.n_embd), usual),
        "attn_k.weight": Tensor((keys, shape.n_embd), usual),
        "attn_v.weight": Tensor((keys, shape.n_embd), usual),
        "attn_output.weight": Tensor((shape.n_embd, queries), usual),
        "ffn_norm.weight": Tensor((shape.n_embd,), centre=1.0),
        "ffn_gate.weight": Tensor((shape.n_ff, shape.n_embd), usual),
        "ffn_up.weight": Tensor((shape.n_ff, shape.n_embd), usual),
        "ffn_down.weight": Tensor((shape.n_embd, shape.n_ff), usual),
    }
    if shape.architecture in ("qwen2", "qwen2vl"):
        block |= {f"attn_{part}.bias": Tensor((size,)) for part, size in (("q", queries), ("k", keys), ("v", keys))}
    if shape.architecture == "gemma3":
        block |= {f"attn_{part}_norm.weight": Tensor((shape.head_dim,), centre=1.0) for part in "qk"}
        block |= {f"post_{part}_norm.weight": Tensor((shape.n_embd,), centre=1.0) for part in ("attention", "ffw")}
    tensors = {"token_embd.weight": Tensor((shape.vocab, shape.n_embd), head if shape.tied else usual)}
    for layer in range(shape.layers):
        tensors |= {f"blk.{layer}.{name}": tensor for name, tensor in block.items()}
    tensors["output_norm.weight"] = Tensor((shape.n_embd,), centre=1.0)
    if not shape.tied:
        tensors["output.weight"] = Tensor((shape.vocab, shape.n_embd), head)
    return tensors


def _add_metadata(writer: gguf.GGUFWriter, shape: LanguageShape) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"random weights, {shape.name}")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab)
    if shape.architecture == "qwen2vl":
        # Qwen2-VL's 16, 24 and 24 of 64 pairs.
        eighth = shape.head_dim // 16
        writer.add_rope_dimension_sections([2 * eighth, 3 * eighth, 3 * eighth, 0])
    if shape.window:
        writer.add_sliding_window(shape.window)
    if shape.stretch != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(shape.stretch)
    writer.add_chat_template(_CHAT_TEMPLATE.replace("IMAGE", shape.image))
    tokens, scores, types = _vocabulary(shape.vocab, shape.specials)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)


def _vocabulary(count: int, specials: tuple[str, ...]) -> tuple[list[bytes], list[float], list[int]]:
    """``count`` tokens, scores and types: the usual specials, further ``specials``, bytes, ASCII, some words with all
    their starts, filler."""
    kind = gguf.TokenType
    entries = [("<unk>", 0.0, kind.UNKNOWN), ("<s>", 0.0, kind.CONTROL), ("</s>", 0.0, kind.CONTROL)]
    # Before the bytes: libmtmd takes the first token that is written as a line break for the one between tiles.
    entries += [(text, 0.0, kind.CONTROL) for text in specials]
    entries += [(f"<0x{value:02X}>", 0.0, kind.BYTE) for value in range(256)]
    texts = ["▁", *(chr(code) for code in range(33, 127))]
    # Pieces are merged two at a time, so a word needs all its starts; longer ones go first.
    words = [space + word for space in ("▁", "") for word in _WORDS.split()]
    texts += [word[:end] for word in words for end in range(1, len(word) + 1)]
    texts = list(dict.fromkeys(texts))
    texts += [f"▁filler{number}" for number in range(count - len(entries) - len(texts))]
    entries += [(text, float(len(text)) - 100.0, kind.NORMAL) for text in texts]
    if len(entries) > count:
        raise ValueError(f"a vocabulary of {count} is too small; it needs {len(entries)}")
    return [text.encode() for text, _, _ in entries], [score for _, score, _ in entries], [t.value for *_, t in entries]
