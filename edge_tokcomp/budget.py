"""How many tokens to keep: reading what the user wrote, sharing it out, and saying it back.

A *keep* is an ``int`` (that many tokens) or a ``float`` in (0, 1] (that fraction of them).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real

from .errors import UsageError

_COUNT = re.compile(r"[0-9]{1,12}", re.ASCII)
_PERCENT = re.compile(r"([0-9]{1,12}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})\s*%", re.ASCII)
_FRACTION = re.compile(r"(?:[0-9]{0,12}\.[0-9]{1,18}|[0-9]{1,12}\.)(?:[eE][+-]?[0-9]{1,3})?", re.ASCII)
_HELP = "write a number of tokens (64), a fraction (0.25) or a percentage (25%)"


def parse_keep(keep: str | int | float) -> int | float:
    """The keep meant by ``64``, ``0.25``, ``"64"``, ``"0.25"`` or ``"25%"``; ``1`` is one token, ``1.0`` everything.

    Raises ``UsageError`` for zero, negative or non-finite values, fractions above 1 and anything that is no number.
    """
    value: int | float
    if isinstance(keep, str):
        text = keep.strip()
        if _COUNT.fullmatch(text):
            value = int(text)
        elif percent := _PERCENT.fullmatch(text):
            value = float(percent[1]) / 100
        elif _FRACTION.fullmatch(text):
            value = float(text)
        else:
            raise UsageError(f"keep {keep!r} is not an amount: {_HELP}")
    elif isinstance(keep, bool) or not isinstance(keep, Real):
        raise UsageError(f"keep {keep!r} is not an amount: {_HELP}")
    else:
        value = int(keep) if isinstance(keep, Integral) else float(keep)
    if isinstance(value, int):
        if value < 1:
            raise UsageError(f"keep {keep!r} leaves no token: {_HELP}")
    elif not 0 < value <= 1:
        raise UsageError(f"keep {keep!r} is not a fraction above 0 and at most 1: {_HELP}")
    return value


def tokens_to_keep(keep: str | int | float, before: int) -> int:
    """The number of tokens that ``keep`` leaves of ``before``: at least 1, at most ``before``, halves rounded up."""
    if before < 1:
        raise ValueError(f"an image of {before} tokens has nothing to keep")
    amount = parse_keep(keep)
    wanted = amount if isinstance(amount, int) else math.floor(amount * before + 0.5)
    return min(max(wanted, 1), before)


def share(total: int, weights: Sequence[int | float | Fraction], caps: Sequence[int] | None = None) -> list[int]:
    """Split ``total`` into whole parts in proportion to ``weights``, none above its cap; the parts sum to ``total``.

    Largest remainder method: a part at its cap leaves the rest to the others, equal remainders go to the lower index.
    Exact arithmetic, so the same on every machine. Weights that are all zero count as equal.
    """
    caps = [total] * len(weights) if caps is None else caps
    if len(caps) != len(weights) or any(not weight >= 0 or math.isinf(weight) for weight in weights):
        raise ValueError(f"weights {list(weights)} must be finite, not negative, and one for each of {len(caps)} caps")
    if not 0 <= total <= sum(caps):
        raise ValueError(f"cannot share {total} over caps {list(caps)}")
    exact = [Fraction(weight) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    mass = [int(weight * scale) for weight in exact]
    parts = [0] * len(mass)
    left, free = total, list(range(len(mass)))
    while free:
        if not any(mass[i] for i in free):
            mass = [1] * len(mass)
        whole = sum(mass[i] for i in free)
        full = {i for i in free if left * mass[i] > caps[i] * whole}
        if not full:
            for i in free:
                parts[i] = left * mass[i] // whole
            short = left - sum(parts[i] for i in free)
            for i in sorted(free, key=lambda i: (-(left * mass[i] % whole), i))[:short]:
                parts[i] += 1
            break
        for i in full:
            parts[i] = caps[i]
        left -= sum(caps[i] for i in full)
        free = [i for i in free if i not in full]
    return parts


def dynamic_keeps(keeps: Sequence[int], scores: Sequence[float], most: Sequence[int]) -> list[int]:
    """``keeps`` shared anew among pictures by their information ``scores``; the parts sum to ``sum(keeps)``.

    Each part is in proportion to ``keep * score``, none below half its keep (rounded up), above twice its keep, or
    above ``most``. Exact arithmetic; pictures whose keep, score and most agree get parts that differ by 1 at most, and
    the order of the pictures decides nothing else. Equal scores leave every keep as it is.

    PruneSID (arXiv 2603.09480) says that tokens go by score and that their mean holds. Normaliser, rounding and clamp
    are ours: it says nothing of them.
    """
    if not len(keeps) == len(scores) == len(most):
        raise ValueError(f"{len(keeps)} keeps, {len(scores)} scores and {len(most)} limits must be as many")
    weights = [keep * _weight(score) for keep, score in zip(keeps, scores, strict=True)]
    bounds = [_bounds(keep, top) for keep, top in zip(keeps, most, strict=True)]
    # Shares that come out equal are told apart by what they are shares of, not by where they stand in the list.
    free = sorted(range(len(keeps)), key=lambda i: (-weights[i], -keeps[i], -most[i], i))
    parts = [low for low, _ in bounds]
    left = sum(keeps)
    while free:
        shares = share(left, [weights[i] for i in free], [bounds[i][1] for i in free])
        low = {i for i, part in zip(free, shares, strict=True) if part < bounds[i][0]}
        if not low:
            for i, part in zip(free, shares, strict=True):
                parts[i] = part
            break
        # Those stay at their least, which leaves less to the others: none that is at its least comes off it again.
        left -= sum(parts[i] for i in low)
        free = [i for i in free if i not in low]
    return parts


def dynamic_keep(keep: int, score: float, mean: float, most: int) -> int:
    """``keep * score / mean`` in whole tokens, halves rounded up, within the bounds of ``dynamic_keeps``.

    For a picture by itself, ``mean`` being the mean score of the pictures it is one of.
    """
    low, high = _bounds(keep, most)
    return min(max(math.floor(keep * _weight(score) / _weight(mean) + Fraction(1, 2)), low), high)


def smallest_share(keep: int) -> int:
    """The least that a picture of that ``keep`` is left with."""
    return -(-keep // 2)


def largest_share(keep: int, most: int) -> int:
    """The most that a picture of that ``keep`` can get, of the ``most`` tokens it has."""
    return min(2 * keep, most)


@dataclass
class RunningMean:
    """The mean of what was added so far."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> float:
        """The mean with one more ``value``."""
        self.total += value
        self.count += 1
        return self.total / self.count


_LEAST_SCORE = 1e-6
"""A picture of one colour scores 0 up to rounding; a lower score than this one would only say how it was rounded."""


def _weight(score: float) -> Fraction:
    if not math.isfinite(score):
        raise ValueError(f"information score {score} is not finite")
    return Fraction(max(score, _LEAST_SCORE))


def _bounds(keep: int, most: int) -> tuple[int, int]:
    if not 1 <= keep <= most:
        raise ValueError(f"a keep of {keep} does not lie within 1..{most}")
    return smallest_share(keep), largest_share(keep, most)


def describe(before: int, after: int) -> str:
    """``576 → 64 (11.1 %)``."""
    if before < 1:
        raise ValueError(f"an image of {before} tokens cannot be described")
    return f"{before} → {after} ({100 * after / before:.1f} %)"
