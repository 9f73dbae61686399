"""Mosaic, this project's own method: every patch is covered by a kept one near it in looks and in place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import array_api_compat
import numpy as np
from array_api_compat import array_namespace

from ..errors import UsageError
from ..tokens import Array
from .base import AttentionMethod, Candidates, Merges
from .kernels import blocks, directions, gram, like, settle, to_numpy
from .selection import Cover, coverage

_LEAST = 0.05


@dataclass(frozen=True)
class Mosaic(AttentionMethod):
    """In each crop, greedy coverage by likeness in looks and place; what is dropped goes into what covers it.

    1. *Likeness* of two patches: ``exp(-(1 - cosine) / temperature) * exp(-distance ** 2 / (2 r ** 2))``. The cosine is
       that of features without their mean (Cen-Prune's centring); the distance is in cells, and r is ``reach`` times
       the spacing of an even grid of as many tokens as are kept. Looks alone (SCOPE, MMTok) leave out where things
       are, place alone is the even grid.
    2. *Importance* of a patch for coverage: ``|feature - mean| ** a * (CLS attention) ** b``. Up to ``plenty`` halvings
       of N, a and b are 0: with tokens to spare all of the picture counts alike, and the share of tokens a thing gets
       says how large it is, which counting lives on. Over the next halving a rises to ``stand_out``: what is unlike
       the picture as a whole counts more. With every halving beyond, b rises by ``attended``. A tower without CLS
       attention goes by the first factor alone.
    3. Greedy facility location: again and again the patch that adds most to the summed importance of patches times
       the likeness of what covers them best.
    4. Every patch merges into the one that covers it: means, weighted by likeness (a bilateral filter).

    The parts are known, their combination is ours; its constants were chosen on tuning scenes of the demo tasks.
    """

    temperature: float = 0.3
    reach: float = 1.5
    plenty: float = 2.0
    stand_out: float = 0.5
    attended: float = 0.125

    name: ClassVar[str] = "mosaic"
    title: ClassVar[str] = "Mosaic"
    source: ClassVar[str] = "ours"
    scope: ClassVar[Literal["image", "crop"]] = "crop"
    wants: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature < _LEAST or self.reach < _LEAST:
            raise UsageError(
                f"mosaic: temperature {self.temperature} and reach {self.reach} must be {_LEAST} or more: below that "
                "no patch is like another"
            )
        if min(self.plenty, self.stand_out, self.attended) < 0:
            raise UsageError("mosaic: plenty, stand_out and attended must be 0 or more")

    @property
    def needs(self) -> frozenset[str]:
        """The grid of each crop."""
        return frozenset({"grid"})

    def choose(self, rows: Candidates, k: int) -> Merges:
        """The covering rows in greedy order, and what each stands for."""
        xp = rows.xp
        unit, lengths = directions(rows.features)
        alike = self.likeness(rows, unit, k)
        picks = coverage([Cover(alike, self.importance(rows, lengths, k), symmetric=True)], k)
        covers = xp.take(alike, like(picks, alike), axis=1)
        assign = to_numpy(xp.argmax(settle(covers), axis=1)).astype(np.int64)
        assign[picks] = np.arange(k)
        share = to_numpy(covers)[np.arange(len(rows)), assign]
        mass = np.bincount(assign, share, minlength=k)
        return Merges(picks, assign, (share / mass[assign]).astype(np.float32))

    def likeness(self, rows: Candidates, unit: Array, k: int) -> Array:
        """``(N, N)`` in 0..1, from the directions ``unit (N, D)``."""
        xp = rows.xp
        height, width = rows.grids[0]
        cells = like(np.stack(np.divmod(rows.cell, width), axis=1) / (self.reach * math.sqrt(height * width / k)), unit)
        ones = xp.ones_like(cells[:, :1])
        apart = xp.sum(cells * cells, axis=1, keepdims=True) / 2
        # Products of these are what is added to the cosines over the temperature: minus half the squared distances,
        # minus what makes likeness to oneself 1.
        left = xp.concat([cells, -apart - 1 / self.temperature, ones], axis=1)
        right = xp.matrix_transpose(xp.concat([cells, ones, -apart], axis=1))
        alike = gram(unit)
        for block in blocks(len(rows), len(rows), alike):
            alike[block, :] = xp.exp(alike[block, :] / self.temperature + left[block, :] @ right)
        return alike

    def importance(self, rows: Candidates, lengths: Array, k: int) -> Array:
        """``(N,)``: what covering a patch is worth; 1 for all where tokens are plenty."""
        scarce = max(0.0, math.log2(len(rows) / k) - self.plenty)
        worth = relative(lengths) ** (self.stand_out * min(scarce, 1.0))
        if rows.cls_attention is not None and scarce > 1:
            attention = rows.xp.sum(rows.cls_attention, axis=0, dtype=rows.xp.float64)
            worth = worth * relative(attention) ** (self.attended * (scarce - 1))
        return worth


def relative(values: Array) -> Array:
    """``values (N,)`` of 0 or more as multiples of their mean; all 1 where they are nothing but 0."""
    xp = array_namespace(values)
    mean = xp.mean(values)
    some = mean > 0
    ones = xp.ones_like(values, device=array_api_compat.device(values))
    return xp.where(some, values / xp.where(some, mean, xp.ones_like(mean)), ones)
