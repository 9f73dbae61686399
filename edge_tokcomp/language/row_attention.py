"""Attention as the language model computes it, from the queries and keys it computed: flash attention keeps no map."""

from __future__ import annotations

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from ..errors import TokcompError
from .gguf_header import GgufHeader, layer_count

Floats = NDArray[np.float32]

_FINAL_NORM = "output_norm.weight"


WINDOW, WINDOW_PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
TELLING_DEPTH = {"gemma3": 62}
"""Architectures, and of how many layers their models are whose scores llama.cpp scales by the width over the heads."""

_WINDOW_PERIOD = {"gemma3": 6}
"""Architectures whose layers have a sliding window but for every so many, where the file does not say which."""


def text_attention(queries: Floats, keys: Floats, scale: float, window: int = 0) -> Floats:
    """``(t, m) float32``: softmax attention, mean of heads, of the last ``t`` rows of a sequence of ``m``, causal.

    ``queries (t, heads, d)``, ``keys (m, key_heads, d)``, both rotated; a key head serves ``heads / key_heads`` heads.
    ``window``: how many rows, its own the last, a row sees; 0 for all.
    """
    count, heads, width = queries.shape
    length, groups = keys.shape[:2]
    shared = queries.reshape(count, groups, heads // groups, width).transpose(1, 2, 0, 3)
    scores = shared.reshape(groups, -1, width) @ keys.transpose(1, 2, 0) * np.float32(scale)
    scores = scores.reshape(heads, count, length)
    before = np.arange(length - count, length)[:, None] - np.arange(length)[None, :]
    seen = (before >= 0) & (before < (window or length))
    scores = np.where(seen, scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray((weights / weights.sum(axis=-1, keepdims=True)).mean(axis=0), np.float32)


def head_scale(header: GgufHeader, head_dim: int) -> float:
    """What scores are multiplied by."""
    architecture = header.text("general.architecture")
    if layer_count(header) == TELLING_DEPTH.get(architecture):
        width, heads = (
            header.integer(f"{architecture}.{key}", 1) for key in ("embedding_length", "attention.head_count")
        )
        head_dim = width // heads
    return header.number(f"{architecture}.attention.scale", 0.0) or head_dim**-0.5


def layer_windows(header: GgufHeader) -> list[int]:
    """Of each layer, how many rows a row sees, its own the last, 0 for all; as llama.cpp decides it. Empty for models
    without windows."""
    architecture = header.text("general.architecture")
    window, period = header.integer(f"{architecture}.{WINDOW}", 0), _WINDOW_PERIOD.get(architecture, 0)
    if not window or not period:
        return []
    key = f"{architecture}.{WINDOW_PATTERN}"
    if key in header.arrays:
        return [window if value else 0 for value in header.numbers(key)]
    period = header.integer(key, period)
    return [window if period == 0 or layer % period < period - 1 else 0 for layer in range(layer_count(header))]


def final_norm(header: GgufHeader) -> Floats:
    """``(n_embd,)``: weight of the norm before the model's head; raises ``TokcompError`` where there is none."""
    tensor = header.tensors.get(_FINAL_NORM)
    if tensor is None or tensor.n_bytes is None:
        raise TokcompError(f"{header.path}: has no {_FINAL_NORM}, which the layer step needs; use another step")
    raw = np.fromfile(header.path, np.uint8, tensor.n_bytes, offset=tensor.offset)
    return np.asarray(quants.dequantize(raw, GGMLQuantizationType(tensor.type_id)), np.float32)
