"""No compression: the baseline every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import Candidates, Method, Picks


@dataclass(frozen=True)
class NoCompression(Method):
    """Keeps every token, whatever the budget says."""

    name: ClassVar[str] = "none"
    title: ClassVar[str] = "No compression"
    source: ClassVar[str] = "baseline"
    compresses: ClassVar[bool] = False

    def choose(self, rows: Candidates, k: int) -> Picks:
        """Every row."""
        return Picks(np.arange(len(rows)))
