"""Token merging (ToMe, ICLR 2023) as a baseline: like tokens become their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from .base import AttentionMethod, Candidates, Merges
from .kernels import settle, to_numpy, top_k, unit_rows


@dataclass(frozen=True)
class ToMe(AttentionMethod):
    """In each crop, pass after pass: tokens in raster order fall alternately into two sets, each of the first finds the
    one most like it in the second, and the pairs most alike merge, weighted by how many tokens each stands for. A pass
    merges at most half of the tokens; the last merges what is over.

    The paper does this inside the tower, some tokens a block; here it is done to the tower's output, on its attention
    keys where it gives them and on features otherwise. ``centred``: cosines without the mean row (Cen-Prune).
    """

    centred: bool = False

    name: ClassVar[str] = "tome"
    title: ClassVar[str] = "ToMe-style merging"
    source: ClassVar[str] = "ICLR 2023, its bipartite matching on the tower's output"
    scope: ClassVar[Literal["image", "crop"]] = "crop"
    wants: ClassVar[frozenset[str]] = frozenset({"keys"})

    def choose(self, rows: Candidates, k: int) -> Merges:
        """A merged token stands at the place of the one its last partner was added to."""
        total = to_numpy(rows.features if rows.keys is None else rows.keys).astype(np.float64)
        owner, place = np.arange(len(rows)), np.arange(len(rows))
        size: NDArray[np.float64] = np.ones(len(rows))
        while len(place) > k:
            # without centring only directions count, and a sum has its mean's
            unit = to_numpy(unit_rows(total / size[:, None] if self.centred else total, centred=self.centred))
            cosine = settle(unit[0::2] @ unit[1::2].T)
            merged = top_k(np.max(cosine, axis=1), len(place) - k)
            merged = merged[np.argsort(np.argmax(cosine[merged], axis=1), kind="stable")]
            source, target = 2 * merged, 2 * np.argmax(cosine[merged], axis=1) + 1
            joined, starts = np.unique(target, return_index=True)
            total[joined] += np.add.reduceat(total[source], starts)
            size[joined] += np.add.reduceat(size[source], starts)
            into = np.arange(len(place))
            into[source] = target
            stay = np.delete(np.arange(len(place)), source)
            total, size, place = total[stay], size[stay], place[stay]
            owner = np.searchsorted(stay, into)[owner]
        weight = 1 / size[owner]
        return Merges(place, owner, weight.astype(np.float32))
