"""A language model file: checked, opened, and asked for its facts and its tokenizer."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import TokcompError, UsageError
from . import binding
from .gguf_header import GgufHeader, layer_count, read_header, split_files

_BY_TOKEN = ("cogvlm", "gemma3n", "deepseek4")
"""Architectures whose graphs tell text from images by whether they are given tokens: CogVLM has weights for each,
Gemma-3n looks up a further embedding in every layer, DeepSeek-V4's first layers choose experts by token."""
_FURTHER_EMBEDDING = "embedding_length_per_layer_input"
"""Of Gemma-4 E2B and E4B, which do as Gemma-3n does, and Qwen4's hashes of neighbouring tokens."""

_MULTI_POSITION_ROPE = (8, 40)
"""llama_rope_type MROPE (Qwen2-VL) and IMROPE (Qwen3-VL): four positions a row."""


class LanguageModel:
    """Weights and tokenizer of one GGUF. Use as a context manager, or ``close``.

    Closing it closes the decoders made from it.
    """

    def __init__(self, handle: binding.Model, header: GgufHeader, threads: int | None) -> None:
        self.handle = handle
        self.header = header
        self.path: Path = header.path
        self.threads = threads
        self.architecture = header.text("general.architecture")
        self.n_embd = handle.fact("n_embd")
        self.n_embd_inp = handle.fact("n_embd_inp")
        self.n_layer = handle.fact("n_layer")
        self.n_ctx_train = handle.fact("n_ctx_train")
        self.n_vocab = handle.n_vocab
        self.rope_type = handle.fact("rope_type")
        self.recurrent = bool(handle.fact("is_recurrent") or handle.fact("is_hybrid"))
        self.chat_template = handle.chat_template()
        self.bos = handle.special_token("bos")
        self.eos = handle.special_token("eos")

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        gpu_layers: int = 0,
        threads: int | None = None,
        use_mmap: bool = True,
    ) -> LanguageModel:
        """Check and load a GGUF language model.

        ``gpu_layers``: layers on the GPU, -1 for all. ``threads``: what decoders of this model use unless told
        otherwise; ``None`` means every core this process may run on.

        Raises ``TokcompError`` for a file that is missing, damaged, truncated or not a language model.
        """
        if gpu_layers < -1:
            raise UsageError(f"gpu_layers {gpu_layers} is below -1; -1 means all layers, 0 none")
        if threads is not None and threads < 1:
            raise UsageError(f"threads {threads} is not a positive number")
        header = check_language_model(path)
        handle = binding.Model(header.path, gpu_layers=gpu_layers, use_mmap=use_mmap)
        model = cls(handle, header, threads)
        if fault := model._unusable():
            model.close()
            raise TokcompError(f"{header.path}: {fault}")
        return model

    @property
    def multi_position(self) -> bool:
        """True for M-RoPE models, whose image rows carry four positions ``(t, y, x, 0)``."""
        return self.rope_type in _MULTI_POSITION_ROPE

    @property
    def takes_tokens(self) -> bool:
        """Whether text enters as token ids, in calls of its own, and only images as rows."""
        further = self.header.number(f"{self.architecture}.{_FURTHER_EMBEDDING}", 0)
        return self.architecture in _BY_TOKEN or further > 0

    @property
    def logits_of_all_or_none(self) -> bool:
        """Whether a call must want the logits of all its rows or of none: CogVLM's graph computes all of them, and for
        those that are wanted llama.cpp (llama-cpp-python 0.3.36) takes the first."""
        return self.architecture == "cogvlm"

    def kv_bytes_per_row(self, kv_type: str = "f16") -> int:
        """Bytes that one row takes in the key-value cache, estimated from the first layer's heads."""
        heads = self.handle.fact("n_head_kv")
        usual = self.n_embd / max(self.handle.fact("n_head"), 1)
        width = sum(
            self.header.number(f"{self.architecture}.attention.{part}_length", usual) for part in ("key", "value")
        )
        return int(width) * heads * self.n_layer * (4 if kv_type == "f32" else 2)

    @property
    def bos_text(self) -> str:
        """How the vocabulary writes the begin-of-sequence token, ``""`` where there is none."""
        return "" if self.bos is None else self.piece(self.bos, special=True).decode("utf-8", errors="replace")

    @property
    def eos_text(self) -> str:
        """How the vocabulary writes the end-of-sequence token, ``""`` where there is none."""
        return "" if self.eos is None else self.piece(self.eos, special=True).decode("utf-8", errors="replace")

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> NDArray[np.int32]:
        """Token ids ``(n,) int32``.

        ``add_special``: add BOS (and EOS) where the model is configured so. ``parse_special``: read control tokens
        such as ``<|im_start|>`` as tokens instead of text.
        """
        self._need_tokenizer()
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as fault:
            raise UsageError(f"the text {text!r} cannot be written as UTF-8 ({fault.reason})") from fault
        return self.handle.tokenize(data, add_special, parse_special)

    def detokenize(self, tokens: NDArray[np.int32], *, special: bool = False) -> str:
        """The text of ``tokens (n,) int32``; control tokens are left out unless ``special``."""
        self._need_tokenizer()
        for token in tokens:
            self._check(int(token))
        return self.handle.detokenize(tokens, special).decode("utf-8", errors="replace")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes ``token`` adds to the text, possibly part of a character; ``b""`` for a control token."""
        self._need_tokenizer()
        self._check(token)
        return self.handle.piece(token, special)

    def is_end(self, token: int) -> bool:
        """True for tokens that end the generation (EOS, end of turn, ...)."""
        self._check(token)
        return self.handle.is_end(token)

    @cached_property
    def end_tokens(self) -> NDArray[np.int32]:
        """All tokens that end the generation, ``(n,) int32``."""
        ends = [token for token in range(self.n_vocab) if self.handle.is_end(token)]
        return np.array(ends, np.int32)

    def close(self) -> None:
        """Free the model and every decoder made from it; a second call does nothing."""
        self.handle.close()

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(self, *_fault: object) -> None:
        self.close()

    def _unusable(self) -> str:
        """Why this model cannot be fed rows, ``""`` if it can."""
        if self.handle.fact("has_encoder") or not self.handle.fact("has_decoder"):
            return f"a {self.architecture} model has an encoder; only decoder-only language models can be used"
        slices = self.n_embd_inp // self.n_embd - 1
        if slices >= self.n_layer:
            # llama.cpp aborts on adding a slice after the last layer, where only the output rows are left.
            return f"{self.n_layer} layers cannot take {slices} deepstack slices; it needs {slices + 1} or more"
        return ""

    def _check(self, token: int) -> None:
        if not 0 <= token < self.n_vocab:
            raise ValueError(f"token {token} is outside the vocabulary 0..{self.n_vocab - 1}")

    def _need_tokenizer(self) -> None:
        # llama.cpp aborts the process when asked to tokenize without a vocabulary.
        if not self.handle.has_tokenizer:
            raise ValueError(f"{self.path}: this file carries no tokenizer")


def check_language_model(path: str | os.PathLike[str]) -> GgufHeader:
    """Read the header of a language model GGUF (of its first part, if split) and check all parts.

    Raises ``TokcompError`` in one line when the file is damaged, truncated or something else than a language model.
    """
    header = read_header(path)
    parts = split_files(header)
    kind, architecture = header.text("general.type"), header.text("general.architecture")
    if architecture == "clip" or kind == "mmproj":
        raise TokcompError(
            f"{header.path}: a vision tower (mmproj), not a language model; pass it as --mmproj and the model as --lm"
        )
    if kind not in ("", "model"):
        raise TokcompError(f"{header.path}: a GGUF of type {kind!r}, not a language model; pass the model's own file")
    if not architecture:
        raise TokcompError(f"{header.path}: names no general.architecture, so it is not a language model")
    if f"{architecture}.block_count" in header.metadata:
        layer_count(header)
    for part in parts[1:]:
        read_header(part)
    return header
