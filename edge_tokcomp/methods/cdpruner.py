"""CDPruner (NeurIPS 2025): tokens that are different from each other and matter to the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from array_api_compat import array_namespace

from ..tokens import Array
from .base import Candidates, Method, Picks
from .divprune import distinctiveness
from .kernels import settle, stretched, unit_rows
from .selection import Cosines, log_det

_FLOOR = 1e-6
"""Added to relevance, so that the least relevant token is last and not equal to nothing."""


@dataclass(frozen=True)
class CDPruner(Method):
    """In each crop, greedy MAP of the determinantal point process with kernel r_i cos_ij r_j at language width.

    r is a token's relevance to the question: its mean cosine to the question's tokens in the language model's own
    embeddings (the release uses CLIP's text tower, which the model's two files do not hold). ``relevance``: whether it
    counts as it is or with its sign turned, as the release does because CLIP's patches point away from their text;
    ``off`` leaves the question out. ``normalise``: ``stretch`` to 0..1 (release) or ``mean``, divided by its mean after
    moving the lowest to 0.
    ``centred``, ``distinctive``: Cen-Prune's plug-in: cosines of the rows without their mean, and r times how unlike
    the image as a whole a token is.
    """

    relevance: Literal["positive", "negative", "off"] = "positive"
    normalise: Literal["stretch", "mean"] = "stretch"
    centred: bool = False
    distinctive: bool = False

    name: ClassVar[str] = "cdpruner"
    title: ClassVar[str] = "CDPruner"
    source: ClassVar[str] = "NeurIPS 2025, released code; relevance from the language model's embeddings"
    scope: ClassVar[Literal["image", "crop"]] = "crop"
    instead: ClassVar[str] = "write cdpruner:relevance=off"

    @property
    def needs(self) -> frozenset[str]:
        """Rows at language width, and the question unless relevance is off."""
        return frozenset({"embeddings"} if self.relevance == "off" else {"embeddings", "query"})

    def choose(self, rows: Candidates, k: int) -> Picks:
        """``k`` rows in greedy order."""
        xp = rows.xp
        unit = unit_rows(rows.embeddings, centred=self.centred)
        worth = xp.ones_like(unit[:, 0])
        if self.relevance != "off":
            worth = self._relevance(unit_rows(rows.embeddings) if self.centred else unit, rows.query)
        if self.distinctive:
            worth = worth * distinctiveness(unit)
        cosines = Cosines(unit, k)
        own = xp.linalg.vecdot(unit, unit)

        def kernel(chosen: Array) -> Array:
            return worth * cosines.to(chosen) * xp.take(worth, chosen)

        return Picks(log_det(kernel, own * worth * worth, k))

    def _relevance(self, unit: Array, query: Array | None) -> Array:
        """``(n,) float64``, 0 or more."""
        xp = array_namespace(unit)
        likeness = settle(unit @ xp.mean(unit_rows(query), axis=0))
        stretch = stretched(-likeness if self.relevance == "negative" else likeness) + _FLOOR
        return stretch / (xp.max(stretch) if self.normalise == "stretch" else xp.mean(stretch))
