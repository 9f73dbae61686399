"""HoloV (NeurIPS 2025): a share of the budget for every stretch of the picture, by what is going on in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..budget import share
from ..errors import UsageError
from .base import AttentionMethod, Candidates, Picks
from .kernels import gram, to_numpy, top_k, unit_rows

_ATTENTION, _CONTEXT = 1e3, 0.09


@dataclass(frozen=True)
class HoloV(AttentionMethod):
    """Each crop's tokens, in raster order, fall into ``chunks`` runs of equal length. A chunk's quota goes by its mean
    score; inside it the tokens of most CLS attention are taken.

    The score is 1000 a + 0.09 v: a is CLS attention (mean of heads), v the variance of a token's cosines to its chunk
    at language width, scaled over the crop to the mean of 1000 a. What a chunk cannot take goes to the others (the
    release fills up with rows of zeros).
    """

    chunks: int = 16

    name: ClassVar[str] = "holov"
    title: ClassVar[str] = "HoloV"
    source: ClassVar[str] = "NeurIPS 2025, released code"
    scope: ClassVar[Literal["image", "crop"]] = "crop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunks < 1:
            raise UsageError(f"holov: chunks must be 1 or more, got {self.chunks}")

    @property
    def needs(self) -> frozenset[str]:
        """CLS attention and rows at language width."""
        return frozenset({"cls_attention", "embeddings"})

    def choose(self, rows: Candidates, k: int) -> Picks:
        """Chunk by chunk, by attention."""
        xp, count = rows.xp, len(rows)
        attention = _ATTENTION * to_numpy(xp.mean(xp.astype(rows.cls_attention, xp.float64), axis=0))
        unit = unit_rows(rows.embeddings)
        edges = [count * i // self.chunks for i in range(self.chunks + 1)]
        chunks = [np.arange(a, b) for a, b in pairwise(edges) if b > a]
        context = np.concatenate([_spread(to_numpy(gram(unit[c[0] : c[-1] + 1, :]))) for c in chunks])
        typical = np.abs(context).mean()
        context = context * (np.abs(attention).mean() / typical if typical > 0 else 0.0)
        score = np.round(attention + _CONTEXT * context, 9)
        quotas = chunk_quotas(k, [float(score[c].mean()) for c in chunks], [len(c) for c in chunks])
        return Picks(np.concatenate([c[top_k(attention[c], n)] for c, n in zip(chunks, quotas, strict=True)]))


def chunk_quotas(k: int, scores: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """``k`` in proportion to ``scores``, rounded down, one more for the highest scores until all is given out.

    What a chunk has no room for is shared among the others by their room.
    """
    mass = np.maximum(np.asarray(scores), 0.0)
    mass = mass / mass.sum() if mass.sum() > 0 else np.full(len(mass), 1 / len(mass))
    quotas = np.floor(np.round(mass * k, 9)).astype(np.int64)
    quotas[top_k(mass, k - int(quotas.sum()))] += 1
    room = np.asarray(sizes) - quotas
    surplus = -int(room[room < 0].sum())
    room = np.maximum(room, 0)
    more = share(surplus, room.tolist(), room.tolist())
    return [int(quota) for quota in np.minimum(quotas, sizes) + more]


def _spread(cosine: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(n,)``: variance of each row of ``cosine (n, n)``, its own place as a zero, divisor n - 1."""
    count = len(cosine)
    if count == 1:
        return np.zeros(1)
    cosine = cosine * (1 - np.eye(count))
    return np.asarray(np.var(cosine, axis=1, ddof=1))
