"""A budget of image tokens shared among pictures by how much there is to see in each (PruneSID-Dyn, arXiv 2603.09480).

The information score of a picture is 1 - rho, rho the mean cosine over pairs of its patches. Its tokens go by that
score, and their mean over the pictures holds: exactly for a batch, on average for a stream. What is shared is the
budget, so this goes with every method that compresses. Separators, which every plan keeps, are not shared.

How scores become whole tokens is ``budget.dynamic_keeps`` and ``dynamic_keep``; where a mean comes from is here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from . import __version__
from .budget import RunningMean, dynamic_keep, dynamic_keeps, tokens_to_keep
from .errors import TokcompError, UsageError
from .files import write_whole
from .methods import Method, TowerMethod, information_score
from .methods.base import finite_float32
from .methods.kernels import like
from .tokens import VisionTokens

Mode = Literal["batch", "running", "calibrated"]

_LARGEST_SCORE = 2.0
_MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class Claim:
    """What one picture brings to the sharing: its score, the tokens it would have by itself, and what bounds them.

    ``information``: to 6 decimals, so that what is reported is what decided. ``keep``: tokens it would be left with,
    ``fixed`` of them separators; ``most``: all its tokens.
    """

    information: float
    keep: int
    fixed: int
    most: int

    @classmethod
    def of(cls, tokens: VisionTokens, keep: int | float) -> Claim:
        """Score ``tokens`` under ``keep``; raises ``TokcompError`` for features that are not finite."""
        layout = tokens.layout
        features = finite_float32("features", tokens.features)
        score = information_score(features[like(layout.patches, features)])
        fixed, most = int(np.sum(layout.protected)), len(layout.uncompressed)
        own = min(tokens_to_keep(keep, layout.before), most)
        return cls(round(max(score, 0.0), 6), max(own, fixed + 1), fixed, most)


@dataclass(frozen=True)
class Share:
    """What one picture was given: ``keep`` tokens, for its ``information`` against the ``mean`` score.

    ``by``: whose mean that is: ``batch``, ``running``, ``calibrated``, or ``given`` as a number.
    """

    keep: int
    information: float
    mean: float
    by: str

    def __str__(self) -> str:
        return f"information {self.information:.3f}, mean {self.mean:.3f} ({self.by})"


def share_batch(claims: Sequence[Claim]) -> list[Share]:
    """The budget of ``claims`` shared among them: the tokens sum to exactly what they would be without.

    The mean is that of the scores, weighted by the budgets where these differ.
    """
    own, scores = [claim.keep - claim.fixed for claim in claims], [claim.information for claim in claims]
    keeps = dynamic_keeps(own, scores, [claim.most - claim.fixed for claim in claims])
    mean = math.fsum(keep * score for keep, score in zip(own, scores, strict=True)) / max(sum(own), 1)
    return [
        Share(claim.fixed + keep, claim.information, round(mean, 6), "batch")
        for claim, keep in zip(claims, keeps, strict=True)
    ]


def share_alone(claim: Claim, mean: float, by: str) -> Share:
    """The share of one picture, against a ``mean`` that is known."""
    mean = round(mean, 6)
    keep = dynamic_keep(claim.keep - claim.fixed, claim.information, mean, claim.most - claim.fixed)
    return Share(claim.fixed + keep, claim.information, mean, by)


class Sharing:
    """How a loaded model shares its budget: ``mode``, or the ``mean`` score of its pictures as a number.

    Raises ``UsageError`` for anything else.
    """

    def __init__(self, mode: Mode | float) -> None:
        self.mean: float | None = None
        if isinstance(mode, str):
            if mode not in get_args(Mode):
                raise UsageError(f"unknown dynamic {mode!r}; one of {', '.join(get_args(Mode))}, or a mean score")
            self.by: str = mode
        else:
            if isinstance(mode, bool) or not isinstance(mode, Real) or not 0 < mode <= _LARGEST_SCORE:
                raise UsageError(f"dynamic {mode!r} is no mean information score: a number above 0, up to 2")
            self.by, self.mean = "given", round(float(mode), 6)
        self._seen = RunningMean()

    def __str__(self) -> str:
        return self.by if self.mean is None else f"{self.by}, mean information {self.mean:.3f}"

    @property
    def key(self) -> str | float:
        """What of it decides a picture's tokens, apart from the other pictures."""
        return self.by if self.mean is None else self.mean

    def shares(self, claims: Sequence[Claim]) -> list[Share]:
        """The shares of the pictures of one request: among themselves where they are several, else by the mode."""
        means = [self._seen.add(claim.information) for claim in claims]
        if len(claims) != 1 or self.by == "batch":
            return share_batch(claims)
        return [share_alone(claims[0], means[0] if self.mean is None else self.mean, self.by)]

    def note(self, information: float) -> None:
        """Count a picture in the running mean that an earlier run has captioned."""
        self._seen.add(information)

    def restart(self) -> None:
        """Begin the running mean anew."""
        self._seen = RunningMean()


def sharing_of(mode: Mode | float | None, method: Method, keep: object) -> Sharing | None:
    """The ``Sharing`` asked for; raises ``UsageError`` where there is no budget to share."""
    if mode is None:
        return None
    if keep is None or not method.compresses:
        reason = "keep is not given" if keep is None else f"method {method.name} keeps every token"
        raise UsageError(f"dynamic shares a budget of image tokens, but {reason}; say keep (64, 0.25) and a method")
    if isinstance(method, TowerMethod):
        raise UsageError(f"dynamic goes by what the tower sees, and method {method.name} acts before; choose another")
    return Sharing(mode)


@dataclass(frozen=True)
class Calibration:
    """The mean information score of ``pictures`` pictures in one tower, with the ``lowest`` and ``highest``."""

    mean: float
    pictures: int
    lowest: float
    highest: float

    def __str__(self) -> str:
        pictures = "1 picture" if self.pictures == 1 else f"{self.pictures} pictures"
        return f"mean information {self.mean:.3f} of {pictures} ({self.lowest:.3f} to {self.highest:.3f})"

    @classmethod
    def of(cls, scores: Sequence[float]) -> Calibration:
        """Of one score or more; raises ``UsageError`` for none, and for pictures that are all of one colour."""
        if not scores:
            raise UsageError("no picture to calibrate on; name pictures such as those to be captioned")
        mean = round(math.fsum(scores) / len(scores), 6)
        if not mean:
            raise UsageError("pictures of a single colour say nothing of others; name some like those to be captioned")
        return cls(mean, len(scores), min(scores), max(scores))

    def save(self, tower: Path) -> Path:
        """Store it for the tower in the folder ``tower``; returns where. Raises ``TokcompError``."""
        path, text = calibration_path(tower), json.dumps(asdict(self) | {"version": __version__})
        try:
            write_whole(path, lambda stream: stream.write(f"{text}\n".encode()))
        except OSError as fault:
            raise TokcompError(f"{path}: cannot be written ({fault.strerror}); set EDGE_TOKCOMP_CACHE") from fault
        return path

    @classmethod
    def stored(cls, tower: Path, mmproj: Path) -> Calibration:
        """What ``save`` stored; raises ``TokcompError`` where there is none, or it is damaged."""
        path = calibration_path(tower)
        advice = f"run: edge-tokcomp calibrate PICTURES, with the same --mmproj and --precision ({mmproj.name})"
        try:
            with path.open("rb") as stream:
                values: Any = json.loads(stream.read(_MOST_BYTES))
            numbers = [float(values[name]) for name in ("mean", "lowest", "highest")]
            if not (numbers[0] > 0 and all(0 <= number <= _LARGEST_SCORE for number in numbers)):
                raise ValueError(f"mean {numbers[0]}")
            return cls(numbers[0], int(values["pictures"]), *numbers[1:])
        except FileNotFoundError as fault:
            raise TokcompError(f"dynamic calibrated: nothing is stored for this model; {advice}") from fault
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as fault:
            raise TokcompError(f"{path}: not a calibration ({fault}); {advice}") from fault


def calibration_path(tower: Path) -> Path:
    """Beside the tower's folder, whose name is made of the mmproj's content and the precision."""
    return tower.with_name(f"{tower.name}.calibration.json")
