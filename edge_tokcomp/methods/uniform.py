"""Evenly spread tokens: what sampling the picture's plane without looking at it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .base import Candidates, Method, Picks
from .regions import regions


@dataclass(frozen=True)
class Uniform(Method):
    """The centre cells of ``k`` nearly square, nearly equal regions of each crop's grid."""

    name: ClassVar[str] = "uniform"
    title: ClassVar[str] = "Uniform grid"
    source: ClassVar[str] = "baseline"
    scope: ClassVar[Literal["image", "crop"]] = "crop"

    @property
    def needs(self) -> frozenset[str]:
        """The grid of each crop."""
        return frozenset({"grid"})

    def choose(self, rows: Candidates, k: int) -> Picks:
        """Centres in raster order of their regions."""
        centres, _ = regions(rows, k)
        return Picks(centres)
