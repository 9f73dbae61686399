"""Token merging (ToMe, ICLR 2023) as a baseline: like tokens become their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from .base import Candidates, Merges, Method
from .kernels import settle, to_numpy, unit_rows


@dataclass(frozen=True)
class ToMe(Method):
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
        metric = to_numpy(rows.features if rows.keys is None else rows.keys).astype(np.float64)
        owner, place = np.arange(len(rows)), np.arange(len(rows))
        size: NDArray[np.float64] = np.ones(len(rows))
        while len(place) > k:
            unit = to_numpy(unit_rows(metric, centred=self.centred))
            source, target = np.arange(0, len(place), 2), np.arange(1, len(place), 2)
            cosine = settle(unit[source] @ unit[target].T)
            best = np.argmax(cosine, axis=1)
            merged = np.argsort(-np.max(cosine, axis=1), kind="stable")[: len(place) - k]
            into = np.arange(len(place))
            into[source[merged]] = target[best[merged]]
            mass, total = np.zeros_like(size), np.zeros_like(metric)
            np.add.at(mass, into, size)
            np.add.at(total, into, metric * size[:, None])
            stay = np.unique(into)
            metric, size = total[stay] / mass[stay, None], mass[stay]
            owner = np.searchsorted(stay, into)[owner]
            place = place[stay]
        weight = 1 / size[owner]
        return Merges(place, owner, weight.astype(np.float32))
