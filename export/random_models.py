"""Language models of the published sizes with random weights: what speed and memory are measured on.

Laid out as llama-quantize lays out the real files (``Q4_0``: all matrices but the head, which is ``Q6_K``, or ``Q8_0``
where its rows are no multiple of 256; ``Q8_0``: all matrices; norms and biases ``F32``). Values have the standard
deviation 1 / sqrt(columns), so that activations stay of order one through all layers. The vocabulary has the real
number of tokens and a few words; most of it is filler. There is no chat template: prompts take LLaVA-1.5's form.

Files are written in pieces of a few megabytes, whole or not at all, and are the same every time.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.language.gguf_header import read_header

from .building import folder_aside
from .tower_files import cache_directory

_SEED = 0
_PIECE_BYTES = 4 << 20
_ALIGNMENT = 32
_HEADER_BYTES = 32 << 20
"""More than metadata and vocabulary take."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageShape:
    """Sizes of one language model; ``tied``: the token table is the head, too."""

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


@dataclass(frozen=True)
class _Tensor:
    """``extent`` rows first."""

    extent: tuple[int, ...]
    kind: GGMLQuantizationType = GGMLQuantizationType.F32

    @property
    def n_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        if self.extent[-1] % block:
            raise ValueError(f"rows of {self.extent[-1]} are no whole blocks of {block} ({self.kind.name})")
        return math.prod(self.extent) // int(block) * int(block_bytes)


# From the checkpoints' config.json, held against published files: LLaVA-1.5's GGUFs come from the original checkpoint,
# whose vocabulary is 32 000 (llava-hf's is padded to 32 064); the Qwen file's log says 3.09 B parameters, which is
# tied; SmolVLM's Q8_0 file has 436 806 912 bytes, which is untied.
LANGUAGE_SHAPES = {
    shape.name: shape
    for shape in (
        LanguageShape("llava-1.5-7b", "llama", 32, 4096, 11008, 32, 32, 128, 32000, 1e4, 4096, 1e-5, False),
        LanguageShape("qwen2.5-vl-3b", "qwen2vl", 36, 2048, 11008, 16, 2, 128, 151936, 1e6, 128000, 1e-6, True),
        LanguageShape("smolvlm-500m", "llama", 32, 960, 2560, 15, 5, 64, 49280, 1e5, 8192, 1e-5, False),
    )
}

_FILE_TYPES = {"Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}

# A block of each type as it lies in the file, and the bits of one value.
_BLOCKS = {
    GGMLQuantizationType.Q4_0: (np.dtype([("d", "<u2"), ("quants", "u1", 16)]), 4),
    GGMLQuantizationType.Q8_0: (np.dtype([("d", "<u2"), ("quants", "u1", 32)]), 8),
    GGMLQuantizationType.Q6_K: (np.dtype([("quants", "u1", 192), ("scales", "i1", 16), ("d", "<u2")]), 6),
}
_SIGN = 0x8000
_INNER_SCALE = 8
"""Of Q6_K's sixteenths of a block; with 1, the block's own scale would be a subnormal float16."""

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
    home = Path(cache) if cache is not None else cache_directory()
    tensors = _tensors(shape, quantization)
    digest = hashlib.sha256(f"{_SEED} {shape} {tensors}".encode()).hexdigest()[:12]
    target = home / f"random-{shape.name}-{quantization}-{digest}.gguf"
    if target.exists():
        try:
            read_header(target)
            return target
        except TokcompError as fault:
            _log.warning("%s; writing it again", fault)
    needed = sum(tensor.n_bytes for tensor in tensors.values()) + _HEADER_BYTES
    with folder_aside(home) as partial:
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise TokcompError(
                f"{home}: {shape.name} in {quantization} takes {needed / 1e9:.1f} GB and the disk has "
                f"{free / 1e9:.1f} GB free; make room or set EDGE_TOKCOMP_CACHE to a folder on another disk"
            )
        _log.info("writing random weights of %s in %s (%.1f GB) to %s", shape.name, quantization, needed / 1e9, target)
        try:
            _write(partial / target.name, shape, quantization, tensors)
            os.replace(partial / target.name, target)
        except OSError as fault:
            raise TokcompError(f"{target}: cannot be written ({fault.strerror})") from fault
    return target


def _tensors(shape: LanguageShape, quantization: str) -> dict[str, _Tensor]:
    """Every tensor, in the order of published files."""
    usual = GGMLQuantizationType[quantization]
    head = usual
    if quantization == "Q4_0":
        head = GGMLQuantizationType.Q8_0 if shape.n_embd % 256 else GGMLQuantizationType.Q6_K
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    block = {
        "attn_norm.weight": _Tensor((shape.n_embd,)),
        "attn_q.weight": _Tensor((queries, shape.n_embd), usual),
        "attn_k.weight": _Tensor((keys, shape.n_embd), usual),
        "attn_v.weight": _Tensor((keys, shape.n_embd), usual),
        "attn_output.weight": _Tensor((shape.n_embd, queries), usual),
        "ffn_norm.weight": _Tensor((shape.n_embd,)),
        "ffn_gate.weight": _Tensor((shape.n_ff, shape.n_embd), usual),
        "ffn_up.weight": _Tensor((shape.n_ff, shape.n_embd), usual),
        "ffn_down.weight": _Tensor((shape.n_embd, shape.n_ff), usual),
    }
    if shape.architecture == "qwen2vl":
        block |= {f"attn_{part}.bias": _Tensor((size,)) for part, size in (("q", queries), ("k", keys), ("v", keys))}
    tensors = {"token_embd.weight": _Tensor((shape.vocab, shape.n_embd), head if shape.tied else usual)}
    for layer in range(shape.layers):
        tensors |= {f"blk.{layer}.{name}": tensor for name, tensor in block.items()}
    tensors["output_norm.weight"] = _Tensor((shape.n_embd,))
    if not shape.tied:
        tensors["output.weight"] = _Tensor((shape.vocab, shape.n_embd), head)
    return tensors


def _write(path: Path, shape: LanguageShape, quantization: str, tensors: dict[str, _Tensor]) -> None:
    writer = gguf.GGUFWriter(path, shape.architecture)
    _add_metadata(writer, shape)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_FILE_TYPES[quantization])
    for name, tensor in tensors.items():
        writer.add_tensor_info(name, tensor.extent, np.dtype(np.float32), tensor.n_bytes, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    rng = np.random.default_rng(_SEED)
    with path.open("ab") as stream:
        stream.write(bytes(-stream.tell() % _ALIGNMENT))
        for name, tensor in tensors.items():
            for piece in _pieces(rng, tensor, centre=float(name.endswith("norm.weight"))):
                stream.write(piece)
            stream.write(bytes(-stream.tell() % _ALIGNMENT))


def _pieces(rng: np.random.Generator, tensor: _Tensor, centre: float) -> Iterator[bytes]:
    """The tensor as it lies in the file, a few megabytes at a time; ``centre``: the mean of one that is F32."""
    if tensor.kind == GGMLQuantizationType.F32:
        yield (centre + 0.1 * rng.standard_normal(tensor.extent)).astype("<f4").tobytes()
        return
    layout, bits = _BLOCKS[tensor.kind]
    levels = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    scale = 1 / np.sqrt(tensor.extent[-1]) / np.sqrt(np.mean(levels**2.0))
    left, step = tensor.n_bytes // layout.itemsize, _PIECE_BYTES // layout.itemsize
    while left:
        blocks = np.frombuffer(bytearray(rng.bytes(min(left, step) * layout.itemsize)), layout)
        left -= len(blocks)
        # Levels reach one further down than up. Scales of either sign, as in real files, make the mean 0; it would
        # otherwise grow from matrix to matrix.
        if tensor.kind == GGMLQuantizationType.Q6_K:
            blocks["scales"] = np.where(blocks["scales"] < 0, -_INNER_SCALE, _INNER_SCALE)
            blocks["d"] = np.float16(scale / _INNER_SCALE).view(np.uint16)
        else:
            blocks["d"] = (blocks["d"] & _SIGN) | np.float16(scale).view(np.uint16)
        yield blocks.tobytes()


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
    tokens, scores, types = _vocabulary(shape.vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)


def _vocabulary(count: int) -> tuple[list[bytes], list[float], list[int]]:
    """``count`` tokens, scores and types: specials, bytes, ASCII, some words with all their starts, filler."""
    kind = gguf.TokenType
    entries = [("<unk>", 0.0, kind.UNKNOWN), ("<s>", 0.0, kind.CONTROL), ("</s>", 0.0, kind.CONTROL)]
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
