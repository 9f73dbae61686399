"""VisionZip (CVPR 2025): the tokens CLS looks at, and a few that stand for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..errors import UsageError
from .base import AttentionMethod, Candidates, Merges
from .kernels import like, settle, to_numpy, top_k, unit_rows


@dataclass(frozen=True)
class VisionZip(AttentionMethod):
    """In each crop, ``dominant`` tokens of most CLS attention stay as they are. Of the others, evenly spaced targets
    take in the rest, each the ones most like it.

    ``contextual``: share of the budget that goes to targets (the published 10 of 64, 20 of 128, 30 of 192).
    ``aggregate``: a target becomes itself plus the mean of what it took in (``sum``, the released code: rows about
    twice as long as others) or the mean of all of them (``mean``, the paper).
    Likeness is the cosine of attention keys averaged over heads, of features where the tower gives no keys; ``stats``
    says which (``by_keys``). ``centred``: without their mean (Cen-Prune). The release puts targets last; here all rows
    stand in raster order.
    """

    contextual: float = 10 / 64
    aggregate: Literal["sum", "mean"] = "sum"
    centred: bool = False
    keep_cls: bool = False

    name: ClassVar[str] = "visionzip"
    title: ClassVar[str] = "VisionZip"
    source: ClassVar[str] = "CVPR 2025, released code; the paper's average with aggregate=mean"
    scope: ClassVar[Literal["image", "crop"]] = "crop"
    wants: ClassVar[frozenset[str]] = frozenset({"keys"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise UsageError(f"visionzip: contextual must be 0 or more and below 1, got {self.contextual}")

    @property
    def needs(self) -> frozenset[str]:
        """CLS attention."""
        return frozenset({"cls_attention"})

    def choose(self, rows: Candidates, k: int) -> Merges:
        """Dominant tokens by attention, then targets in raster order."""
        xp = rows.xp
        attention = to_numpy(xp.sum(rows.cls_attention, axis=0, dtype=xp.float64))
        targets = min(round(self.contextual * rows.budget), k)
        dominant = top_k(attention, k - targets)
        rest = np.setdiff1d(np.arange(len(rows)), dominant)
        chosen = rest[np.arange(targets) * max(1, len(rest) // max(targets, 1))]
        assign = np.full(len(rows), -1, np.int64)
        assign[dominant] = np.arange(len(dominant))
        weight = np.zeros(len(rows), np.float32)
        weight[dominant] = 1
        others = np.setdiff1d(rest, chosen)
        if targets:
            unit = unit_rows(rows.features if rows.keys is None else rows.keys, centred=self.centred)
            cosine = to_numpy(settle(unit @ xp.matrix_transpose(xp.take(unit, like(chosen, unit), axis=0))))
            own = np.argmax(cosine[others], axis=1)
            assign[chosen] = len(dominant) + np.arange(targets)
            assign[others] = len(dominant) + own
            taken = np.bincount(own, minlength=targets)
            if self.aggregate == "sum":
                weight[chosen] = 1
                weight[others] = 1 / taken[own]
            else:
                weight[chosen] = 1 / (1 + taken)
                weight[others] = 1 / (1 + taken[own])
        return Merges(np.concatenate([dominant, chosen]), assign, weight, {"by_keys": float(rows.keys is not None)})
