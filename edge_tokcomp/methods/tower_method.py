"""The contract of a method that acts in the tower or before it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

from ..errors import TokcompError
from ..variant import TowerVariant
from .base import Candidates, Choice, Method


@dataclass(frozen=True)
class TowerMethod(Method):
    """A method that acts before the tower's output, by having the tower run otherwise."""

    @property
    def behind(self) -> Method | None:
        """What chooses among the rows that come out; None where all of them are kept."""
        return None

    def leaves(self, keep: int | float, before: int) -> int | float:
        """The budget of what comes out, in a picture of ``before`` tokens of which ``keep`` are to be kept."""
        return keep

    @abstractmethod
    def variant(
        self, wanted: int, grid: tuple[int, int], blocks: int, side: int = 1, window: int | None = None
    ) -> TowerVariant:
        """How a tower of ``blocks`` blocks is to be run for at most ``wanted`` tokens of a crop of ``grid``; ``side``:
        patches a side of one token, ``window``: of a window of attention, None where it is whole."""

    @final
    def choose(self, rows: Candidates, k: int) -> Choice:
        """There is nothing to choose among; raises ``TokcompError``."""
        raise TokcompError(
            f"method {self.name} acts in the tower or before it, and these {len(rows)} rows have left it; "
            "it needs a picture, or choose another method (edge-tokcomp methods)"
        )
