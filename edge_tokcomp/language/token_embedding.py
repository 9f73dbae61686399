"""Token ids to embedding rows, read from the language model's own file.

Feeding looked-up rows gives the logits of the tokens, to 1e-6, so text and image rows can share a batch, and generated
tokens go without rows where nothing else is in it (``bare_rows``); but for models that look at the tokens themselves
(``LanguageModel.takes_tokens``), for which rows carry them along.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType
from numpy.typing import ArrayLike, NDArray

from ..errors import TokcompError
from ..tokens import Rows
from .gguf_header import GgufHeader, TensorInfo, read_header, split_files
from .model import LanguageModel

_TABLE = "token_embd.weight"
_TOKENS_ONLY = ("granite-switch",)
"""Architectures of which llama.cpp takes tokens and nothing else; it would end the process over rows."""
_SCALED_TOKENS = ("gemma3", "gemma3n", "gemma4", "gemma-embedding")
"""Their graphs multiply token inputs by sqrt(n_embd), but not embedding inputs; gemma and gemma2 multiply both."""


class TokenEmbedding:
    """Rows of ``token_embd.weight``, dequantised on demand from a memory map; memory stays flat.

    ``lookup`` returns what llama.cpp would compute from the token itself, scaling and zero padding included.
    """

    def __init__(self, path: str | os.PathLike[str], *, row_width: int | None = None) -> None:
        """``row_width``: the decoder's ``n_embd_inp``; rows are padded with zeros to it (deepstack models).

        Raises ``TokcompError`` for architectures that take no rows at all and for tables that gguf cannot dequantise.
        """
        header = read_header(path)
        architecture = header.text("general.architecture")
        if architecture in _TOKENS_ONLY:
            raise TokcompError(
                f"{header.path}: {architecture} models take no image rows in llama.cpp; use another language model"
            )
        part, table = _find_table(header)
        self.n_embd, self.n_vocab = table.shape[0], table.shape[1]
        self.row_width = self.n_embd if row_width is None else row_width
        if self.row_width < self.n_embd:
            raise ValueError(f"row_width {self.row_width} is less than the table's n_embd {self.n_embd}")
        if table.n_bytes is None:
            raise TokcompError(f"{part.path}: {_TABLE} has {table.type_name}, unknown to gguf; update the gguf package")
        self._type = GGMLQuantizationType(table.type_id)
        self._raw = np.memmap(part.path, np.uint8, "r", table.offset, (self.n_vocab, table.n_bytes // self.n_vocab))
        # float32, as llama.cpp multiplies: a factor rounded otherwise would change the last bit.
        self._scale = np.float32(_scale(header, self.n_embd, self.row_width))
        try:
            self.lookup([0])
        except NotImplementedError as fault:
            raise TokcompError(f"{part.path}: gguf cannot read a {table.type_name} token table ({fault})") from fault

    @classmethod
    def of(cls, model: LanguageModel) -> TokenEmbedding:
        """The table of an open model, at its input width."""
        return cls(model.path, row_width=model.n_embd_inp)

    def lookup(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """``(n, row_width) float32`` for ``n`` token ids; ``ValueError`` names an id outside the vocabulary."""
        ids = np.atleast_1d(np.asarray(tokens))
        if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
            raise ValueError(f"token ids must be one row of integers, got {ids.shape} {ids.dtype}")
        outside = (ids < 0) | (ids >= self.n_vocab)
        if outside.any():
            raise ValueError(f"token {int(ids[outside][0])} is outside the vocabulary 0..{self.n_vocab - 1}")
        rows = np.zeros((len(ids), self.row_width), np.float32)
        if len(ids):
            rows[:, : self.n_embd] = quants.dequantize(np.asarray(self._raw[ids.astype(np.int64)]), self._type)
            rows[:, : self.n_embd] *= self._scale
        return rows

    def rows(self, tokens: ArrayLike, start: int, sequence: int = 0) -> Rows:
        """Text as ``Rows`` at positions ``start, start + 1, ...`` of ``sequence``."""
        embeddings = self.lookup(tokens)
        return Rows(
            embeddings, np.arange(start, start + len(embeddings), dtype=np.int32), sequence,
            tokens=np.atleast_1d(np.asarray(tokens)).astype(np.int32),
        )  # fmt: skip


def bare_rows(tokens: Sequence[int], start: int, sequence: int = 0) -> Rows:
    """Text at positions ``start, start + 1, ...`` of ``sequence`` for decoders that look tokens up themselves."""
    count = len(tokens)
    return Rows(
        np.empty((count, 0), np.float32), np.arange(start, start + count, dtype=np.int32), sequence,
        tokens=np.array(tokens, np.int32),
    )  # fmt: skip


def _find_table(header: GgufHeader) -> tuple[GgufHeader, TensorInfo]:
    for path in split_files(header):
        part = header if path == header.path else read_header(path)
        table = part.tensors.get(_TABLE)
        if table is not None and len(table.shape) == 2:
            return part, table
    raise TokcompError(f"{header.path}: has no {_TABLE} matrix, so it is not a language model")


def _scale(header: GgufHeader, n_embd: int, row_width: int) -> float:
    architecture = header.text("general.architecture")
    if architecture in _SCALED_TOKENS:
        return math.sqrt(n_embd)
    if row_width > n_embd:
        # Granite with deepstack: embedding_scale is applied to tokens only; without deepstack the graph applies it.
        return header.number(f"{architecture}.embedding_scale", 1.0)
    return 1.0
