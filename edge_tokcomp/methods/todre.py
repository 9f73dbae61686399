"""ToDRE stage I (arXiv 2505.18757): tokens that are as different from each other as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..tokens import Array
from .base import AttentionMethod, Candidates, Picks
from .kernels import like, settle, to_numpy, unit_rows
from .selection import Cosines, farthest


@dataclass(frozen=True)
class ToDRE(AttentionMethod):
    """Greedy diversity at language width, over all crops: begin with a pivot, then add the token

    * ``max_sum`` (v2): whose summed cosine to those chosen is smallest;
    * ``k_center`` (v1): whose largest cosine to those chosen is smallest (farthest first).

    The pivot is the token with most CLS attention (mean of heads), looked for in the overview only where there is one,
    else everywhere. In a video that is the paper's rule too: the best of each frame, then the frame whose best is
    largest, each frame's weights being a softmax of their own. A tower without CLS attention gives the token nearest
    the mean direction of the same tokens instead: the paper draws one at random there, and finds 0.4 points between
    the best and worst rule of four.
    ``stats`` says which it was (``pivot_by_attention``).
    ``O(N k d)`` at most; a smaller budget's choice is the beginning of a larger one's.
    """

    form: Literal["max_sum", "k_center"] = "max_sum"

    name: ClassVar[str] = "todre"
    title: ClassVar[str] = "ToDRE stage I"
    source: ClassVar[str] = "arXiv 2505.18757, section 3 (v2: max-sum; v1: k-center)"
    wants: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    @property
    def needs(self) -> frozenset[str]:
        """Rows at language width."""
        return frozenset({"embeddings"})

    def choose(self, rows: Candidates, k: int) -> Picks:
        """The pivot and ``k - 1`` more, in greedy order."""
        unit = unit_rows(rows.embeddings)
        measure: Literal["max_sum", "max_min"] = "max_sum" if self.form == "max_sum" else "max_min"
        order = farthest(Cosines(unit, k), k, self._pivot(rows, unit), measure)
        return Picks(order, {"pivot_by_attention": float(rows.cls_attention is not None)})

    def _pivot(self, rows: Candidates, unit: Array) -> int:
        xp = rows.xp
        searched = np.ones(len(rows), np.bool_) if rows.overview is None else rows.crop == rows.overview
        if rows.cls_attention is not None:
            merit = to_numpy(xp.sum(rows.cls_attention, axis=0, dtype=xp.float64))
        else:
            inside = xp.take(unit, like(np.flatnonzero(searched), unit), axis=0)
            merit = to_numpy(settle(unit @ xp.mean(inside, axis=0)))
        return int(np.argmax(np.where(searched, merit, -np.inf)))
