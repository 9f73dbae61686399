"""SCOPE (NeurIPS 2025): salient tokens that cover the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import UsageError
from .base import AttentionMethod, Candidates, Picks
from .kernels import blocks, gram, unit_rows
from .selection import Cover, coverage


@dataclass(frozen=True)
class SCOPE(AttentionMethod):
    """In each crop, again and again the token of highest saliency ** ``alpha`` times gain in coverage.

    Saliency is CLS attention summed over heads. A token covers another as well as their features' cosine says,
    negative ones as 0; coverage is the sum over all tokens of the best among those taken.
    ``centred``: cosines of the rows without their mean (Cen-Prune).
    """

    alpha: float = 1.0
    centred: bool = False

    name: ClassVar[str] = "scope"
    title: ClassVar[str] = "SCOPE"
    source: ClassVar[str] = "NeurIPS 2025, released code"
    scope: ClassVar[Literal["image", "crop"]] = "crop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise UsageError(f"scope: alpha must be 0 or more, got {self.alpha}")

    @property
    def needs(self) -> frozenset[str]:
        """CLS attention, unless saliency does not count."""
        return frozenset({"cls_attention"}) if self.alpha else frozenset()

    def choose(self, rows: Candidates, k: int) -> Picks:
        """``k`` rows in greedy order."""
        xp = rows.xp
        table = gram(unit_rows(rows.features, centred=self.centred))
        none = xp.zeros_like(table[:1, :1])
        for block in blocks(len(rows), len(rows), table):
            table[block, :] = xp.maximum(table[block, :], none)
        worth = None
        if rows.cls_attention is not None:
            saliency = xp.sum(rows.cls_attention, axis=0, dtype=xp.float64)
            peak = xp.max(saliency)
            worth = (saliency / xp.where(peak > 0, peak, xp.ones_like(peak))) ** self.alpha
        return Picks(coverage([Cover(table, xp.ones_like(table[0, :]), symmetric=True)], k, worth))
