"""Average pooling: every region of the picture becomes one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from .base import Candidates, Merges, Method
from .regions import regions


@dataclass(frozen=True)
class Pool(Method):
    """The mean of each of ``k`` nearly square, nearly equal regions of each crop, at the place of its centre cell."""

    name: ClassVar[str] = "pool"
    title: ClassVar[str] = "Average pooling"
    source: ClassVar[str] = "baseline"
    scope: ClassVar[Literal["image", "crop"]] = "crop"

    @property
    def needs(self) -> frozenset[str]:
        """The grid of each crop."""
        return frozenset({"grid"})

    def choose(self, rows: Candidates, k: int) -> Merges:
        """Weights of a region sum to 1."""
        centres, label = regions(rows, k)
        size = np.bincount(label, minlength=k)
        return Merges(centres, label, (1.0 / size[label]).astype(np.float32))
