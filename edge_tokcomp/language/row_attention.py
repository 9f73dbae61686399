"""Attention as the language model computes it, from the queries and keys it computed: flash attention keeps no map."""

from __future__ import annotations

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from ..errors import TokcompError
from .gguf_header import GgufHeader

Floats = NDArray[np.float32]

_FINAL_NORM = "output_norm.weight"


def text_attention(queries: Floats, keys: Floats, scale: float) -> Floats:
    """``(t, m) float32``: softmax attention, mean of heads, of the last ``t`` rows of a sequence of ``m``, causal.

    ``queries (t, heads, d)``, ``keys (m, key_heads, d)``, both rotated; a key head serves ``heads / key_heads`` heads.
    Sliding windows are not applied.
    """
    count, heads, width = queries.shape
    length, groups = keys.shape[:2]
    shared = queries.reshape(count, groups, heads // groups, width).transpose(1, 2, 0, 3)
    scores = shared.reshape(groups, -1, width) @ keys.transpose(1, 2, 0) * np.float32(scale)
    scores = scores.reshape(heads, count, length)
    later = np.arange(length)[None, :] > np.arange(length - count, length)[:, None]
    scores = np.where(later, np.float32(-np.inf), scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray((weights / weights.sum(axis=-1, keepdims=True)).mean(axis=0), np.float32)


def head_scale(header: GgufHeader, head_dim: int) -> float:
    """What scores are multiplied by."""
    named = header.number(f"{header.text('general.architecture')}.attention.scale", 0.0)
    return named or head_dim**-0.5


def final_norm(header: GgufHeader) -> Floats:
    """``(n_embd,)``: weight of the norm before the model's head; raises ``TokcompError`` where there is none."""
    tensor = header.tensors.get(_FINAL_NORM)
    if tensor is None or tensor.n_bytes is None:
        raise TokcompError(f"{header.path}: has no {_FINAL_NORM}, which the layer step needs; use another step")
    raw = np.fromfile(header.path, np.uint8, tensor.n_bytes, offset=tensor.offset)
    return np.asarray(quants.dequantize(raw, GGMLQuantizationType(tensor.type_id)), np.float32)
