"""Rows to feed decoders in tests, and decoders that round nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.language.decoder import PlainDecoder
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.tokens import Rows

Floats = NDArray[np.float32]
N_EMBD = 64


def exact(model: LanguageModel, **options: Any) -> PlainDecoder:
    """A decoder whose cache rounds nothing, so that different ways to the same logits agree closely."""
    return PlainDecoder(model, n_ctx=256, kv_type="f32", **options)


def random_rows(count: int, start: int = 0, sequence: int = 0, *, seed: int = 0, width: int = N_EMBD) -> Rows:
    """``count`` random rows at ``start, start + 1, ...``; equal for equal ``seed``."""
    values = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return Rows(values, np.arange(start, start + count, dtype=np.int32), sequence)


def wanting_all(rows: Rows) -> Rows:
    """The same rows, with the logits of each asked for."""
    return replace(rows, want_logits=np.ones(len(rows), np.bool_))


def image_prompt() -> tuple[Floats, NDArray[np.int32]]:
    """For M-RoPE models: 3 text rows, the kept rows of a 4x5 grid, 4 text rows; positions ``(4, n)``."""
    text, grid = np.arange(3), np.arange(20)[np.arange(20) % 3 != 0]
    after = np.arange(3 + 5, 3 + 5 + 4)
    image = np.stack([np.full(len(grid), 3), 3 + grid // 5, 3 + grid % 5, np.zeros_like(grid)])
    lead = [np.stack([where, where, where, np.zeros_like(where)]) for where in (text, after)]
    positions = np.concatenate([lead[0], image, lead[1]], axis=1).astype(np.int32)
    return random_rows(positions.shape[1], seed=5).embeddings, positions
