"""Lower input resolution: the baseline that costs the tower less, too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..variant import TowerVariant
from .base import TowerMethod


@dataclass(frozen=True)
class Resolution(TowerMethod):
    """Every crop is shrunk before the tower to a grid of at most K patches, its sides equal or one apart."""

    name: ClassVar[str] = "resolution"
    title: ClassVar[str] = "Lower input resolution"
    source: ClassVar[str] = "baseline"

    def variant(self, wanted: int, grid: tuple[int, int], blocks: int) -> TowerVariant:
        """The largest such grid within the tower's own."""
        return TowerVariant(grid=nearly_square(wanted, grid))


def nearly_square(wanted: int, most: tuple[int, int]) -> tuple[int, int]:
    """``(rows, columns)``, equal or one more column, of the largest product up to ``wanted`` and within ``most``."""
    side = math.isqrt(wanted)
    rows = min(side, most[0])
    return rows, min(max(1, side + 1 if side * (side + 1) <= wanted else side), most[1])
