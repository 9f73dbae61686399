"""Random tokens: a baseline that published methods lose to surprisingly often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Candidates, Method, Picks


@dataclass(frozen=True)
class RandomTokens(Method):
    """``k`` tokens drawn without replacement from all crops: others for another picture or seed, the same on every
    backend; a smaller budget draws a part of a larger one's."""

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "Random tokens"
    source: ClassVar[str] = "baseline"

    def choose(self, rows: Candidates, k: int) -> Picks:
        """The first ``k`` of a random permutation."""
        return Picks(rows.random.permutation(len(rows))[:k])
