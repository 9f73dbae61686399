"""Text from one sequence: prompt rows in, pieces of text out as they are generated."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from ..errors import UsageError
from ..tokens import Rows
from .decoder import Decoder
from .model import LanguageModel
from .sampling import Sampler, Sampling
from .text_stream import TextStream
from .token_embedding import TokenEmbedding

logger = logging.getLogger(__name__)


class Generation(Iterator[str]):
    """Iterate for the text, piece by piece; what is known of the run stands in the attributes.

    ``tokens``: ids generated so far, the end token included. ``finish_reason``: ``"stop"`` (end token or stop string),
    ``"length"`` (``max_tokens``), ``"context"`` (no room left), ``None`` before the end. ``first_token_s``: seconds
    from the first ``next`` to the first token, prompt included. ``generate_s``: from there to the last token.

    The sequence then holds the prompt and all tokens but the last; ``decoder.drop`` it when it is not needed.
    """

    def __init__(self, pieces: Iterator[str]) -> None:
        self.tokens: list[int] = []
        self.finish_reason: Literal["stop", "length", "context"] | None = None
        self.first_token_s = 0.0
        self.generate_s = 0.0
        self._pieces = pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def text(self) -> str:
        """Generate to the end; the text not yet taken by iteration."""
        return "".join(self)


def generate(
    decoder: Decoder,
    model: LanguageModel,
    embedding: TokenEmbedding,
    prompt: Sequence[Rows],
    sampling: Sampling | None = None,
    *,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
) -> Generation:
    """Stream the continuation of ``prompt``, whose ``Rows`` follow one another in one sequence.

    ``sampling``: greedy by default. ``stop``: strings that end the text, themselves left out. Nothing is computed
    before the first ``next``.

    Raises ``UsageError`` for bad options, ``ValueError`` for an empty prompt or one of several sequences, and while
    iterating what ``decoder.decode`` raises.
    """
    if max_tokens < 1:
        raise UsageError(f"max_tokens {max_tokens} is not a positive number")
    if not prompt or len({rows.sequence for rows in prompt}) > 1:
        raise ValueError(f"a prompt is one or more Rows of one sequence, got {[rows.sequence for rows in prompt]}")
    stream = TextStream(stop)
    generation = Generation(iter(()))
    generation._pieces = _run(generation, decoder, model, embedding, prompt, sampling or Sampling(), max_tokens, stream)
    return generation


def _run(
    generation: Generation,
    decoder: Decoder,
    model: LanguageModel,
    embedding: TokenEmbedding,
    prompt: Sequence[Rows],
    sampling: Sampling,
    max_tokens: int,
    stream: TextStream,
) -> Iterator[str]:
    sequence = prompt[-1].sequence
    started = time.perf_counter()
    # Only the last row's logits are needed; asking for less saves the output layer.
    silent = [replace(rows, want_logits=np.zeros(len(rows), np.bool_)) for rows in prompt[:-1]]
    logits = decoder.decode([*silent, replace(prompt[-1], want_logits=None)])[-1][-1]
    with Sampler(sampling, decoder.n_vocab) as sampler:
        while True:
            token = sampler.sample(logits)
            generation.tokens.append(token)
            now = time.perf_counter()
            if len(generation.tokens) == 1:
                generation.first_token_s = now - started
            generation.generate_s = now - started - generation.first_token_s
            if model.is_end(token):
                generation.finish_reason = "stop"
                break
            shown = stream.push(model.piece(token))
            if stream.stopped:
                generation.finish_reason = "stop"
            elif len(generation.tokens) == max_tokens:
                generation.finish_reason = "length"
            elif decoder.room < 1:
                generation.finish_reason = "context"
                logger.info("generation ends after %d tokens: the context is full", len(generation.tokens))
            if shown:
                yield shown
            if generation.finish_reason:
                break
            logits = decoder.decode([embedding.rows([token], decoder.length(sequence), sequence)])[0][-1]
    if rest := stream.finish():
        yield rest
