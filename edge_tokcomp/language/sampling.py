"""Choosing the next token from logits, with llama.cpp's own sampler chain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import TokcompError, UsageError
from .binding import SamplerChain

if TYPE_CHECKING:
    from .model import LanguageModel

_PENALTY_WINDOW = 64
_RANDOM_SEED = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. ``temperature`` 0 is greedy: always the most probable token.

    ``top_k``: the k most probable only, 0 for all. ``top_p``: the smallest set with that probability in sum.
    ``min_p``: those with at least that fraction of the best one's probability. ``repeat_penalty``: above 1, the last 64
    generated tokens become less probable. ``seed``: the same seed gives the same text on the same logits. ``grammar``:
    a grammar in llama.cpp's GBNF whose rule ``root`` the text must follow. ``ignore_end``: tokens that end a text are
    never chosen, so that it is as long as it may be.

    Raises ``UsageError`` for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int = 0
    grammar: str = ""
    ignore_end: bool = False

    def __post_init__(self) -> None:
        rules = {
            "temperature": (math.isfinite(self.temperature) and self.temperature >= 0, "0 (greedy) or above"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or above"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "repeat_penalty": (math.isfinite(self.repeat_penalty) and self.repeat_penalty > 0, "above 0; 1 is none"),
            "seed": (0 <= self.seed < _RANDOM_SEED, f"at least 0 and below {_RANDOM_SEED}"),
        }
        for name, (good, range_text) in rules.items():
            if not good:
                raise UsageError(f"{name} {getattr(self, name)} is out of range: it must be {range_text}")


class Sampler:
    """The sampler chain of one sequence: it remembers what it chose (``repeat_penalty``, ``grammar``) and its random
    state."""

    def __init__(self, sampling: Sampling, model: LanguageModel) -> None:
        """Raises ``UsageError`` for a grammar that cannot be read."""
        n_vocab = self._n_vocab = model.n_vocab
        self._ends = model.end_tokens.tolist() if sampling.ignore_end else None
        chain = self._chain = SamplerChain(n_vocab)
        # llama.cpp's greedy sampler takes the first of the highest logits, as argmax does; the candidates that a chain
        # works on take ten times as long to lay out.
        self._plain = sampling.temperature == 0 and sampling.repeat_penalty == 1 and not sampling.grammar
        if sampling.grammar and not chain.add_grammar(model.handle.vocab, sampling.grammar):
            chain.close()
            raise UsageError("the grammar cannot be read; write GBNF with a rule root (see llama.cpp's grammars)")
        if sampling.repeat_penalty != 1:
            chain.add("penalties", n_vocab, _PENALTY_WINDOW, sampling.repeat_penalty, 0.0, 0.0)
        if sampling.temperature == 0:
            chain.add("greedy")
            return
        # The order of llama.cpp's own programs: cut the tail first, then heat what is left.
        if sampling.top_k:
            chain.add("top_k", sampling.top_k)
        if sampling.top_p < 1:
            chain.add("top_p", sampling.top_p, 1)
        if sampling.min_p > 0:
            chain.add("min_p", sampling.min_p, 1)
        chain.add("temp", sampling.temperature)
        chain.add("dist", sampling.seed)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """A token id from ``logits (n_vocab,) float32``; the chain takes note of it.

        Raises ``TokcompError`` when the model returned no usable logits (NaN or infinity), ``ValueError`` for a wrong
        shape.
        """
        if logits.shape != (self._n_vocab,):
            raise ValueError(f"logits {logits.shape} must be ({self._n_vocab},)")
        best = int(logits.argmax())  # the first that is not a number, where there is one
        if not math.isfinite(logits[best]):
            raise TokcompError(
                "the language model returned logits that are not numbers; the file may be damaged, "
                "or its values overflow in the key-value cache (try kv_type f32)"
            )
        _ = self._chain.pointer  # a closed chain says so
        if self._ends is not None and (not self._plain or best in self._ends):
            logits = logits.copy()
            logits[self._ends] = -np.inf
            best = int(logits.argmax())
        return best if self._plain else self._chain.sample(logits)

    def close(self) -> None:
        """Free the chain; a second call does nothing."""
        self._chain.close()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_fault: object) -> None:
        self.close()
