"""DART (EMNLP 2025), before the language model: drop what repeats a few pivots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from ..budget import share
from ..errors import UsageError
from ..tokens import Array, Ints
from .base import Candidates, Method, Picks
from .kernels import settle, to_numpy, top_k, unit_rows


@dataclass(frozen=True)
class DART(Method):
    """Kept are ``image_pivots`` tokens, those of the largest L1 norm, and for each pivot in turn an equal share of the
    tokens least like it (cosine) that no pivot before it took. ``text_pivots`` of the question's tokens, where there is
    a question, choose too.

    The paper works on keys and hidden states of the language model's second layer; this is its form on embeddings,
    over all crops. ``centred``: cosines of the rows without their mean (Cen-Prune).
    """

    image_pivots: int = 4
    text_pivots: int = 4
    centred: bool = False

    name: ClassVar[str] = "dart"
    title: ClassVar[str] = "DART (on embeddings)"
    source: ClassVar[str] = "EMNLP 2025; embeddings in place of layer-2 keys and states"
    wants: ClassVar[frozenset[str]] = frozenset({"query"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_pivots < 1 or self.text_pivots < 0:
            raise UsageError("dart: image_pivots must be 1 or more and text_pivots 0 or more")

    @property
    def needs(self) -> frozenset[str]:
        """Rows at language width."""
        return frozenset({"embeddings"})

    def choose(self, rows: Candidates, k: int) -> Picks:
        """Pivots, then what they chose, pivot by pivot."""
        xp = rows.xp
        unit = unit_rows(rows.embeddings, centred=self.centred)
        pivots = top_k(lengths(rows.embeddings), min(self.image_pivots, k))
        chosen_by = [unit[int(pivot), :] for pivot in pivots]
        if rows.query is not None:
            words = unit_rows(rows.query)
            chosen_by += [words[int(word), :] for word in top_k(lengths(rows.query), self.text_pivots)]
        return Picks(take_turns(to_numpy(settle(unit @ xp.matrix_transpose(xp.stack(chosen_by)))), pivots, k))


def take_turns(alike: NDArray[np.float64], pivots: Ints, k: int) -> Ints:
    """``pivots``, and up to ``k`` rows in all that the columns of ``alike (N, P)`` take in turn, an equal share each:
    those of smallest value that are still free."""
    free = np.ones(len(alike), bool)
    free[pivots] = False
    picks: list[Ints] = [pivots]
    for column, number in enumerate(share(k - len(pivots), [1] * alike.shape[1])):
        taken = top_k(np.where(free, -alike[:, column], -np.inf), number)
        free[taken] = False
        picks.append(taken)
    return np.concatenate(picks)


def lengths(rows: Array) -> NDArray[np.float64]:
    """``(N,)``: L1 norm of each of ``rows (N, D)``, as a share of the largest."""
    xp = array_namespace(rows)
    norm = to_numpy(xp.sum(xp.abs(rows), axis=1, dtype=xp.float64))
    return np.asarray(settle(norm / max(norm.max(), np.finfo(np.float64).tiny)))
