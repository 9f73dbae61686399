"""DivPrune (CVPR 2025): tokens no two of which are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace

from ..tokens import Array
from .base import Candidates, Method, Picks
from .kernels import settle, stretched, to_numpy, unit_rows
from .selection import Cosines, farthest


@dataclass(frozen=True)
class DivPrune(Method):
    """Max-min diversity at language width, over all crops: begin with the token whose nearest other is farthest, then
    add the token whose nearest chosen one is farthest (distance 1 - cosine).

    ``centred``: cosines of the rows without their mean. ``distinctive``: a distance counts in proportion to how
    unlike the image as a whole a token is (minus its mean cosine, stretched to 0..1). Both together are Cen-Prune's
    plug-in; its rule for the first token is not published, here it is the same product.
    """

    centred: bool = False
    distinctive: bool = False

    name: ClassVar[str] = "divprune"
    title: ClassVar[str] = "DivPrune"
    source: ClassVar[str] = "CVPR 2025, released code; Cen-Prune (2026) for the options"

    @property
    def needs(self) -> frozenset[str]:
        """Rows at language width."""
        return frozenset({"embeddings"})

    def choose(self, rows: Candidates, k: int) -> Picks:
        """``k`` rows, farthest first."""
        unit = unit_rows(rows.embeddings, centred=self.centred)
        cosines = Cosines(unit, len(rows))  # the first token alone takes every pair
        weight = distinctiveness(unit) if self.distinctive else rows.xp.ones_like(unit[:, 0])
        first = int(np.argmax(to_numpy(settle(weight * (1 - cosines.nearest())))))
        return Picks(farthest(cosines, k, first, "max_min", lambda distance: weight * distance))


def distinctiveness(unit: Array) -> Array:
    """``(N,)`` in 0..1: how little each of ``unit (N, D)`` resembles all of them (Cen-Prune)."""
    return stretched(settle(-(unit @ array_namespace(unit).mean(unit, axis=0))))
