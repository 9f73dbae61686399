"""The text of one sequence as it grows: a token chosen from each row of logits, until something ends it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .model import LanguageModel
from .sampling import Sampler, Sampling
from .text_stream import TextStream

FinishReason = Literal["stop", "length", "context"]


class Continuation:
    """What has been generated after one prompt.

    ``tokens``: ids so far, the end token included. ``finish_reason``: ``"stop"`` (end token or stop string),
    ``"length"`` (``max_tokens``), ``"context"`` (no room left), ``None`` before the end. ``first_token_s``: seconds
    from ``start`` to the first token; ``generate_s``: from there to the last.

    Raises ``UsageError`` for bad options.
    """

    def __init__(
        self, model: LanguageModel, sampling: Sampling | None = None, *, max_tokens: int, stop: Sequence[str] = ()
    ) -> None:
        if max_tokens < 1:
            raise UsageError(f"max_tokens {max_tokens} is not a positive number")
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.first_token_s = self.generate_s = 0.0
        self._model, self._max_tokens, self._stream = model, max_tokens, TextStream(stop)
        self._sampling = sampling or Sampling()
        self._sampler: Sampler | None = None
        self._started = 0.0

    def start(self) -> None:
        """The clock of ``first_token_s`` begins."""
        self._started = time.perf_counter()

    def take(self, logits: NDArray[np.float32]) -> str:
        """Choose a token from ``logits (n_vocab,) float32``; the text that may be shown now.

        Raises ``TokcompError`` for logits that are not numbers.
        """
        if self._sampler is None:
            self._sampler = Sampler(self._sampling, self._model)
        token = self._sampler.sample(logits)
        self.tokens.append(token)
        now = time.perf_counter()
        if len(self.tokens) == 1:
            self.first_token_s = now - self._started
        self.generate_s = now - self._started - self.first_token_s
        if self._model.is_end(token):
            self.end("stop")
            return self._stream.finish()
        shown = self._stream.push(self._model.piece(token))
        if self._stream.stopped:
            self.end("stop")
        elif len(self.tokens) == self._max_tokens:
            self.end("length")
            shown += self._stream.finish()
        return shown

    def end(self, reason: FinishReason) -> None:
        """No more tokens."""
        self.finish_reason = reason
        self.close()

    def rest(self) -> str:
        """What was held back, after an ``end`` from outside."""
        return self._stream.finish()

    def close(self) -> None:
        """Free the sampler; a second call does nothing."""
        if self._sampler is not None:
            self._sampler.close()
