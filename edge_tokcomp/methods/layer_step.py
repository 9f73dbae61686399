"""The contract of a method that prunes inside the language model: at a decoder layer, which image rows live on.

A step is a decision on arrays. Running it, between two ranges of layers, is the decoder's business.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..layer_state import LayerState
from ..tokens import Ints
from .options import check_options, spell


@dataclass(frozen=True)
class LayerStep(ABC):
    """A pruning rule and where it acts.

    ``at``: pairs of layer and amount, ascending. A layer is an int, counted from 0: rows dropped at l never reach it;
    or a fraction of the depth, rounded down. What the amount means is the step's.
    ``attention``: whether it looks at that of the layer before the cut (``previous``) or after it (``next``).
    ``looks_from_all``: whether that of all text rows after the image is wanted, or of the last one alone.
    ``looks_at_keys``: whether it needs the parts of the state that say so.
    """

    at: tuple[tuple[int | float, float], ...]

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    amount: ClassVar[str]
    """What the amount means, for the message that refuses one out of bounds."""
    attention: ClassVar[Literal["none", "previous", "next"]] = "none"
    looks_from_all: ClassVar[bool] = False
    looks_at_keys: ClassVar[bool] = False
    most: ClassVar[float] = 1.0
    """The largest amount that makes sense; 0 is the smallest."""

    def __post_init__(self) -> None:
        check_options(self)
        if not self.at:
            raise UsageError(f"{self.name}: name at least one layer, as {self.name}@LAYER:AMOUNT")
        for layer, amount in self.at:
            if layer < 0 or (isinstance(layer, float) and layer >= 1):
                raise UsageError(f"{self.name}: layer {layer} is neither a number of 0 or more nor a fraction below 1")
            if not 0 <= amount <= self.most:
                raise UsageError(f"{self.name}: amount {amount} must lie between 0 and {self.most:g}: {self.amount}")

    def __str__(self) -> str:
        """The text that ``read_layer_step`` reads back."""
        settings = "".join(f",{name}={spell(value)}" for name, value in self._settings())
        return f"{self.name}@" + ",".join(f"{layer}:{_spelt(amount)}" for layer, amount in self.at) + settings

    def _settings(self) -> Iterator[tuple[str, Any]]:
        for name, field in self.__dataclass_fields__.items():
            if name != "at" and getattr(self, name) != field.default:
                yield name, getattr(self, name)

    def layers(self, depth: int) -> dict[int, float]:
        """Layer to amount in a model of ``depth`` layers; raises ``UsageError`` for layers it does not have.

        Of fractions that come to the same layer in a shallow model the last one counts.
        """
        found: dict[int, float] = {}
        fractions: set[int] = set()
        for layer, amount in self.at:
            number = math.floor(layer * depth) if isinstance(layer, float) else layer
            if number >= depth:
                raise UsageError(f"{self.name}: layer {layer} of a model of {depth} layers (0 to {depth - 1})")
            if number == 0 and (self.attention == "previous" or self.looks_at_keys):
                raise UsageError(f"{self.name}: it looks at the layer before, and layer 0 has none; begin at layer 1")
            if number in found and not (isinstance(layer, float) and number in fractions):
                raise UsageError(f"{self.name}: layer {number} is named twice")
            if found and number < max(found):
                raise UsageError(f"{self.name}: layers must ascend, {number} stands after {max(found)}")
            found[number] = amount
            fractions |= {number} if isinstance(layer, float) else set()
        return found

    def survivors(self, state: LayerState, amount: float) -> Ints:
        """Which of the n image rows live on: ascending indices ``(<= n,) int64``."""
        if not len(state):
            return np.zeros(0, np.int64)
        if self.attention != "none" and state.attention is None:
            raise ValueError(f"{self.name} needs attention")
        if self.looks_at_keys and any(part is None for part in (state.keys, state.words, state.final_norm)):
            raise ValueError(f"{self.name} needs keys, words and final_norm")
        kept = np.asarray(self.choose(state, amount), np.int64)
        if len(kept) and (kept[0] < 0 or kept[-1] >= len(state) or np.any(np.diff(kept) <= 0)):
            raise ValueError(f"{self.name} must return ascending indices below {len(state)}, got {kept.tolist()}")
        return kept

    @abstractmethod
    def choose(self, state: LayerState, amount: float) -> Ints:
        """The decision, on one image row or more."""


def _spelt(amount: float) -> str:
    short = f"{amount:g}"
    return short if float(short) == amount else repr(amount)


def spell_steps(steps: Sequence[LayerStep]) -> str:
    """The text that ``read_layer_steps`` reads back."""
    return "+".join(map(str, steps))


def highest(scores: NDArray[np.floating[Any]], count: int) -> Ints:
    """Ascending indices of the ``count`` highest ``scores (n,)``, ties to the lower index."""
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)


def rows_of(amount: float, whole: int) -> int:
    """``amount`` of ``whole`` rows, halves rounded up."""
    return math.floor(amount * whole + 0.5)
