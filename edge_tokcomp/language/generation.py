"""Text from one sequence: prompt rows in, pieces of text out as they are generated."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ..tokens import Rows
from .continuation import Continuation, FinishReason
from .decoder import Decoder
from .model import LanguageModel
from .sampling import Sampling
from .token_embedding import TokenEmbedding, bare_rows

logger = logging.getLogger(__name__)


class Generation(Iterator[str]):
    """Iterate for the text, piece by piece; what is known of the run stands in the attributes of ``Continuation``.

    The sequence then holds the prompt and all tokens but the last; ``decoder.drop`` it when it is not needed.
    """

    def __init__(self, pieces: Iterator[str], growth: Continuation) -> None:
        self._pieces, self._growth = pieces, growth

    @property
    def tokens(self) -> list[int]:
        """Ids generated so far, the end token included."""
        return self._growth.tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended, ``None`` before that."""
        return self._growth.finish_reason

    @property
    def first_token_s(self) -> float:
        """Seconds from the first ``next`` to the first token, prompt included."""
        return self._growth.first_token_s

    @property
    def generate_s(self) -> float:
        """Seconds from there to the last token."""
        return self._growth.generate_s

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
    causal: bool = True,
) -> Generation:
    """Stream the continuation of ``prompt``, whose ``Rows`` follow one another in one sequence.

    ``sampling``: greedy by default. ``stop``: strings that end the text, themselves left out. ``causal``: see
    ``Decoder.decode``. Nothing is computed before the first ``next``.

    Raises ``UsageError`` for bad options, ``ValueError`` for an empty prompt or one of several sequences, and while
    iterating what ``decoder.decode`` raises.
    """
    if not prompt or len({rows.sequence for rows in prompt}) > 1:
        raise ValueError(f"a prompt is one or more Rows of one sequence, got {[rows.sequence for rows in prompt]}")
    growth = Continuation(model, sampling, max_tokens=max_tokens, stop=stop)
    return Generation(_run(growth, decoder, embedding, prompt, causal), growth)


def _run(
    growth: Continuation, decoder: Decoder, embedding: TokenEmbedding, prompt: Sequence[Rows], causal: bool
) -> Iterator[str]:
    sequence = prompt[-1].sequence
    text = bare_rows if decoder.takes_bare else embedding.rows
    growth.start()
    # Only the last row's logits are needed; asking for less saves the output layer.
    silent = [replace(rows, want_logits=np.zeros(len(rows), np.bool_)) for rows in prompt[:-1]]
    logits = decoder.decode([*silent, replace(prompt[-1], want_logits=None)], causal=causal)[-1][-1]
    try:
        while True:
            shown = growth.take(logits)
            if not growth.finish_reason and decoder.room < 1:
                growth.end("context")
                shown += growth.rest()
                logger.info("generation ends after %d tokens: the context is full", len(growth.tokens))
            if shown:
                yield shown
            if growth.finish_reason:
                return
            row = text([growth.tokens[-1]], decoder.length(sequence), sequence)
            logits = decoder.decode([row])[0][-1]
    finally:
        growth.close()
