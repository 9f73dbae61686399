"""Lower input resolution: the baseline that costs the tower less, too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..variant import TowerVariant
from .tower_method import TowerMethod


@dataclass(frozen=True)
class Resolution(TowerMethod):
    """Every crop is shrunk before the tower to a grid of at most K patches, its sides equal or one apart."""

    name: ClassVar[str] = "resolution"
    title: ClassVar[str] = "Lower input resolution"
    source: ClassVar[str] = "baseline"

    def variant(
        self, wanted: int, grid: tuple[int, int], blocks: int, side: int = 1, window: int | None = None
    ) -> TowerVariant:
        """The largest such grid within the tower's own."""
        return TowerVariant(grid=in_proportion(wanted, grid))


def in_proportion(wanted: int, most: tuple[int, int]) -> tuple[int, int]:
    """``(rows, columns)`` in the proportions of ``most`` but for a column, of the largest product up to ``wanted``."""
    rows = max(1, min(most[0], wanted, math.isqrt(wanted * most[0] // most[1])))
    return rows, max(1, min(wanted // rows, rows * most[1] // most[0] + 1, most[1]))
