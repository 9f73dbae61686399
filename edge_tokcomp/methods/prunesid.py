"""PruneSID (arXiv 2603.09480, ICLR 2026): group tokens by principal component, suppress near-duplicates in each group.

Three forms: what the released LLaVA code does, what the paper says, what the released Qwen2-VL code does. The random
low-rank decomposition of the release is replaced by the exact one it approximates, so results are reproducible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import ClassVar, Literal

import array_api_compat
import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from ..budget import share
from ..errors import UsageError
from ..tokens import Array, Ints
from .base import AttentionMethod, Candidates, Picks
from .eigenvectors import leading_eigenvectors
from .kernels import blocks, gram, like, settle, to_numpy, unit_rows

_EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class PruneSID(AttentionMethod):
    """The released LLaVA code. With K the crop's budget, a kept CLS included:

    1. Tokens join the principal component (of ``groups``, K // 4) on which they project longest.
    2. In each group, by descending score, a token survives if its cosine to every earlier survivor is at most
       tau = ``lambda_`` * rho: ``lambda_`` is K / 32, rho the mean cosine of the crop.
    3. Groups get quotas in proportion to their survivors; a group short of survivors falls back on its best others.

    ``centre``: subtract each token's mean over its ``feature`` values (code) or the mean ``token`` (paper).
    ``score``: the ``cls`` attention summed over heads (code) or the ``projection`` length (paper).
    ``rho_mode``: mean over distinct pairs, or the Qwen code's, which is about half of it.
    ``quota``: by survivors within ``bounds`` of 1 and ``upper_mult`` * ceil(K / 64) (code), or by ``survivors``.
    ``order``: tokens enter the language model in ``raster`` order, or as ``released``: group by group, which is the
    plan's ``rank``; of several crops the release fills each one's places in that order, and so do we.
    """

    centre: Literal["feature", "token"] = "feature"
    score: Literal["cls", "projection"] = "cls"
    rho_mode: Literal["strict_upper", "qwen"] = "strict_upper"
    quota: Literal["bounds", "survivors"] = "bounds"
    groups: int | None = None
    lambda_: float | None = None
    upper_mult: int = 5
    keep_cls: bool = False
    order: Literal["raster", "released"] = "raster"

    name: ClassVar[str] = "prunesid"
    title: ClassVar[str] = "PruneSID (released LLaVA code)"
    source: ClassVar[str] = "arXiv 2603.09480, released LLaVA code"
    scope: ClassVar[Literal["image", "crop"]] = "crop"
    instead: ClassVar[str] = "use prunesid-paper, or write prunesid:score=projection"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("groups", "upper_mult"):
            if (value := getattr(self, option)) is not None and value < 1:
                raise UsageError(f"{self.name}: {option} must be 1 or more, got {value}")
        if self.lambda_ is not None and self.lambda_ <= 0:
            raise UsageError(f"{self.name}: lambda must be above 0, got {self.lambda_}")

    @property
    def needs(self) -> frozenset[str]:
        """CLS attention when it is the score."""
        return frozenset({"cls_attention"}) if self.score == "cls" else frozenset()

    def default_groups(self, budget: int) -> int:
        """Number of groups where ``groups`` is None."""
        return max(1, budget // 4)

    def default_lambda(self, budget: int, count: int) -> float:
        """Factor of rho where ``lambda_`` is None, for ``count`` tokens."""
        return budget / 32

    def released_in_groups(self, k: int) -> bool:
        """Whether the release leaves ``k`` tokens in the order of its groups."""
        return True

    def choose(self, rows: Candidates, k: int) -> Picks:
        """Steps 1 to 3 of the class docstring; N-length vectors and one group's pairs at a time go to the host."""
        wanted_groups = self.default_groups(rows.budget) if self.groups is None else self.groups
        lambda_ = self.default_lambda(rows.budget, len(rows)) if self.lambda_ is None else self.lambda_
        lengths = to_numpy(projections(rows.features, min(wanted_groups, k), self.centre))
        member_of = np.argmax(lengths, axis=1)
        if self.score == "cls":
            score = to_numpy(rows.xp.sum(rows.cls_attention, axis=0, dtype=rows.xp.float64))
        else:
            score = np.max(lengths, axis=1)
        groups = [np.flatnonzero(member_of == group) for group in range(lengths.shape[1])]
        groups = [members[np.argsort(-score[members], kind="stable")] for members in groups]
        # Group by group: its rows fit the cache, all of them at once do not.
        parts = (rows.xp.take(rows.features, like(members, rows.features), axis=0) for members in groups)
        sums, cosines = zip(*map(_compared, parts), strict=True)
        rho = _mean_cosine(sums, len(rows), self.rho_mode)
        tau = float(np.round(lambda_ * rho, 10))

        survivors: list[Ints] = []
        suppressed: list[Ints] = []
        for members, cosine in zip(groups, cosines, strict=True):
            alive = survive(cosine > tau, score[members] > 0)
            survivors.append(members[alive])
            suppressed.append(members[~alive])

        counts = [len(group) for group in survivors]
        if self.quota == "bounds":
            sizes = [len(a) + len(b) for a, b in zip(survivors, suppressed, strict=True)]
            quotas = bounded_quotas(sizes, counts, k, self.upper_mult * math.ceil(rows.budget / 64), rows.budget)
            ordered = [np.concatenate(pair) for pair in zip(survivors, suppressed, strict=True)]
        else:
            quotas, ordered = share(min(k, sum(counts)), counts, counts), survivors
        picks = np.concatenate([group[:n] for group, n in zip(ordered, quotas, strict=True)])
        spare = np.sort(np.concatenate(suppressed))
        spare = spare[np.argsort(-score[spare], kind="stable")]
        picks = np.concatenate([picks, spare[: k - len(picks)]])
        stats = {"groups": lengths.shape[1], "rho": rho, "tau": tau, "survivors": sum(counts)}
        return Picks(picks, stats, in_order=self.order == "released" and self.released_in_groups(k))


@dataclass(frozen=True)
class PruneSIDPaper(PruneSID):
    """The paper (sections on PSCA and intra-group NMS): no CLS attention, no bounds, survivors only.

    Where fewer tokens survive than the budget asks for, which the paper leaves open, the best of the others fill it.
    """

    centre: Literal["feature", "token"] = "token"
    score: Literal["cls", "projection"] = "projection"
    quota: Literal["bounds", "survivors"] = "survivors"

    name: ClassVar[str] = "prunesid-paper"
    title: ClassVar[str] = "PruneSID (paper)"
    source: ClassVar[str] = "arXiv 2603.09480, paper"


@dataclass(frozen=True)
class PruneSIDQwen(PruneSID):
    """The released Qwen2-VL code, made for merged tokens: projection scores, half the rho, at least 4 groups.

    The release never goes below 16 tokens an image; here the budget is the caller's.
    """

    score: Literal["cls", "projection"] = "projection"
    rho_mode: Literal["strict_upper", "qwen"] = "qwen"

    name: ClassVar[str] = "prunesid-qwen"
    title: ClassVar[str] = "PruneSID (released Qwen2-VL code)"
    source: ClassVar[str] = "arXiv 2603.09480, released Qwen2-VL code"

    def default_groups(self, budget: int) -> int:
        """``max(K // 4, 4)``."""
        return max(4, budget // 4)

    def default_lambda(self, budget: int, count: int) -> float:
        """``max(18 K / N, 1)``."""
        return max(18 * budget / count, 1.0)

    def released_in_groups(self, k: int) -> bool:
        """More than 150 are sorted."""
        return k <= 150


def information_score(features: Array) -> float:
    """How varied the tokens ``features (N, D)`` of one image are: 1 - rho, with rho their mean cosine over pairs."""
    return 1.0 - mean_cosine(unit_rows(features), "strict_upper")


def mean_cosine(unit: Array, rho_mode: str) -> float:
    """rho of the unit rows ``(N, D)`` without the N x N matrix; 0 for a single row.

    ``strict_upper``: mean over pairs i < j. ``qwen``: sum over i <= j divided by N * N.
    """
    return _mean_cosine([_sums(unit)], unit.shape[0], rho_mode)


def _compared(features: Array) -> tuple[tuple[Array, float], NDArray[np.float64]]:
    """``_sums`` of the directions of ``features (c, D)``, and the cosines ``(c, c)`` between them, by one product."""
    xp = array_namespace(features)
    rows = xp.astype(features, xp.float64)
    products = gram(rows)
    length = xp.sqrt(xp.linalg.diagonal(products))
    some = xp.astype(length > 0, xp.float64)
    factor = some / (length + (1 - some))
    cosines = settle(products * factor[:, None] * factor)
    return (factor @ rows, float(xp.sum(some))), to_numpy(cosines)


def _sums(unit: Array) -> tuple[Array, float]:
    """The sum ``(D,)`` of unit rows and that of their squared lengths."""
    xp = array_namespace(unit)
    return xp.sum(unit, axis=0), float(xp.sum(xp.linalg.vecdot(unit, unit)))


def _mean_cosine(sums: Sequence[tuple[Array, float]], count: int, rho_mode: str) -> float:
    """rho of ``count`` rows from the ``_sums`` of the parts they are in."""
    total, own = sums[0]
    for more, length in sums[1:]:
        total, own = total + more, own + length
    xp = array_namespace(total)
    every = float(xp.sum(total * total))
    if rho_mode == "qwen":
        return (every + own) / float(2 * count**2)
    return (every - own) / float(max(count * (count - 1), 1))


def projections(features: Array, groups: int, centre: str) -> Array:
    """``(N, groups) float64``: length of each token of ``features (N, D)`` on each of the first principal components.

    That is |V| of the singular value decomposition of the centred sigmoid of the features, from the leading
    eigenvectors of their N x N Gram matrix, or of the D x D one where that is smaller. Components that hold nothing but
    rounding noise are zero.
    """
    xp = array_namespace(features)
    # sigmoid(x) = 1/2 + tanh(x/2) / 2: centring takes away the shift and eigenvectors do not see the scale.
    count, width = features.shape
    squashed = xp.empty((count, width), dtype=xp.float64, device=array_api_compat.device(features))
    for block in blocks(count, width, features):
        rows = xp.tanh(xp.astype(features[block, :], xp.float64) / 2)
        squashed[block, :] = rows - xp.mean(rows, axis=1, keepdims=True) if centre == "feature" else rows
    if centre == "token":
        squashed -= xp.mean(squashed, axis=0, keepdims=True)
    narrow = width < count
    products = gram(xp.matrix_transpose(squashed) if narrow else squashed)
    if not narrow:
        del squashed  # the largest array: the less is held at once, the less the next picture has to be given anew
    energy, vectors = leading_eigenvectors(products, groups)
    noise = count * _EPSILON * energy[0]
    real = energy > noise
    if narrow:
        vectors = (squashed @ vectors) / xp.sqrt(xp.where(real, energy, xp.ones_like(energy)))
    lengths = settle(xp.where(real, xp.abs(vectors), xp.zeros_like(vectors)))
    missing = xp.zeros((count, groups - lengths.shape[1]), dtype=lengths.dtype, device=array_api_compat.device(lengths))
    return xp.concat([lengths, missing], axis=1)


def survive(near: NDArray[np.bool_], eligible: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """``(c,) bool``: greedy non-maximum suppression down a list in order of score.

    ``near (c, c)``: pairs too alike to keep both; ``eligible (c,)``: tokens with any score at all.
    """
    alive: NDArray[np.bool_] = eligible.copy()
    for i in range(len(alive)):
        if alive[i]:
            alive[i + 1 :] &= ~near[i, i + 1 :]
    return alive


def bounded_quotas(sizes: Sequence[int], survivors: Sequence[int], k: int, upper: int, budget: int) -> list[int]:
    """Tokens of each group: one each, the rest in proportion to survivors by cumulative rounding, none above its bound.

    A group's bound is ``upper``, its survivors or its size, the least of them; bounds grow together until ``budget``
    fits. What bounds cut off goes to the groups with most survivors. Sums to ``k``.
    """
    lower = [min(1, size) for size in sizes]
    bound = [min(upper, *pair) for pair in zip(sizes, survivors, strict=True)]
    while sum(bound) < min(budget, sum(sizes)):
        bound = [min(b + 1, size) for b, size in zip(bound, sizes, strict=True)]
    mass = survivors if any(survivors) else sizes
    rest = max(0, k - sum(lower))
    edges = [round(Fraction(part * rest, sum(mass))) for part in accumulate(mass, initial=0)]
    extra = [b - a for a, b in pairwise(edges)]
    quotas = [min(low + more, most) for low, more, most in zip(lower, extra, bound, strict=True)]
    for group in sorted(range(len(sizes)), key=lambda g: -survivors[g]):
        quotas[group] += min(bound[group] - quotas[group], k - sum(quotas))
    return quotas
