"""MMTok (ICLR 2026): tokens that cover both the question and the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from array_api_compat import array_namespace

from ..errors import UsageError
from ..tokens import Array
from .base import Candidates, Method, Picks
from .kernels import blocks, gram, unit_rows
from .selection import Cover, coverage


@dataclass(frozen=True)
class MMTok(Method):
    """Greedy coverage, over all crops, of the rows of two tables whose columns are the image's tokens.

    The question's: for each of its tokens the softmax of its cosines to the image's at language width, over
    ``text_temperature``. The picture's: the same of each token's features, over ``image_temperature``, times
    ``alpha``. Each table's rows are divided by their number. Without a question the picture covers itself.
    ``centred``: cosines of the image's rows without their mean (Cen-Prune).
    """

    alpha: float = 0.5
    text_temperature: float = 0.02
    image_temperature: float = 0.2
    centred: bool = False

    name: ClassVar[str] = "mmtok"
    title: ClassVar[str] = "MMTok"
    source: ClassVar[str] = "ICLR 2026; the question's tokens as the language model embeds them"
    wants: ClassVar[frozenset[str]] = frozenset({"query"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0 or min(self.text_temperature, self.image_temperature) <= 0:
            raise UsageError("mmtok: alpha must be 0 or more and temperatures above 0")

    @property
    def needs(self) -> frozenset[str]:
        """Rows at language width."""
        return frozenset({"embeddings"})

    def choose(self, rows: Candidates, k: int) -> Picks:
        """``k`` rows in greedy order."""
        xp = rows.xp
        unit = unit_rows(rows.features, centred=self.centred)
        asked = 0 if rows.query is None else rows.query.shape[0]
        covers = []
        if asked:
            wide = unit if rows.project is None else unit_rows(rows.embeddings, centred=self.centred)
            likeness = unit_rows(rows.query) @ xp.matrix_transpose(wide)
            powers = xp.exp((likeness - xp.max(likeness, axis=1, keepdims=True)) / self.text_temperature)
            covers.append(Cover(powers, 1 / (asked * xp.sum(powers, axis=1))))
        if self.alpha or not asked:
            covers.append(self._picture(unit, self.alpha if asked else 1.0))
        return Picks(coverage(covers, k))

    def _picture(self, unit: Array, weight: float) -> Cover:
        """The picture's table, as powers that are alike both ways; what a softmax divides by goes into the weight."""
        xp = array_namespace(unit)
        powers, sums = gram(unit), []
        for block in blocks(powers.shape[0], powers.shape[1], powers):
            powers[block, :] = xp.exp((powers[block, :] - 1) / self.image_temperature)
            sums.append(xp.sum(powers[block, :], axis=1))
        total = xp.concat(sums)
        # A row of zeros is like none, all alike: covered by whatever is chosen, it decides nothing.
        some = xp.linalg.vecdot(unit, unit) > 0
        share = xp.where(
            some, weight / (total.shape[0] * xp.where(some, total, xp.ones_like(total))), xp.zeros_like(total)
        )
        return Cover(powers, share, symmetric=True)
