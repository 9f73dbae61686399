"""MMTok (ICLR 2026): tokens that cover both the question and the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import array_api_compat
from array_api_compat import array_namespace

from ..errors import UsageError
from ..tokens import Array
from .base import Candidates, Method, Picks
from .kernels import blocks, gram, unit_rows
from .selection import coverage


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
        asked, seen = 0 if rows.query is None else rows.query.shape[0], len(rows)
        weight = self.alpha if asked else 1.0
        shape = (asked + (seen if weight else 0), seen)
        table = xp.empty(shape, dtype=xp.float64, device=array_api_compat.device(rows.features))
        unit = unit_rows(rows.features, centred=self.centred)
        if asked:
            wide = unit if rows.project is None else unit_rows(rows.embeddings, centred=self.centred)
            likeness = unit_rows(rows.query) @ xp.matrix_transpose(wide)
            table[:asked, :] = softmax_rows(likeness / self.text_temperature) / asked
        if weight:
            likeness = gram(unit)
            for block in blocks(seen, seen, likeness):
                into = slice(asked + block.start, asked + block.stop)
                table[into, :] = softmax_rows(likeness[block, :] / self.image_temperature) * (weight / seen)
        return Picks(coverage(table, k))


def softmax_rows(logits: Array) -> Array:
    """Softmax along each row of ``logits (R, N)``."""
    xp = array_namespace(logits)
    powers = xp.exp(logits - xp.max(logits, axis=1, keepdims=True))
    return powers / xp.sum(powers, axis=1, keepdims=True)
