"""Pictures scored ahead of their captions: to share a budget among them exactly, or to calibrate a model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .dynamic import Calibration, Claim, Share, share_batch
from .errors import TokcompError
from .images import open_image
from .sources import Source
from .vlm import VLM

logger = logging.getLogger(__name__)

Key = tuple[str, str]
"""Hash of a picture's bytes, hash of the parameters it is captioned with."""


@dataclass(frozen=True)
class Scored:
    """What a picture was given of a batch's budget, and the ``milliseconds`` that scoring it took, tower included."""

    share: Share
    milliseconds: float


def share_pictures(
    vlm: VLM,
    sources: Sequence[Source],
    due: Callable[[Source], tuple[Key, bytes] | None],
    told: Callable[[int], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[Key, Scored]:
    """The shares of the pictures that are ``due``, each scored once; of nothing when it was ``stopped``.

    A picture that cannot be read has none. The same bytes under two names, asked the same, have one share.
    """
    claims: dict[Key, Claim] = {}
    times: list[float] = []
    for count, source in enumerate(sources, start=1):
        if stopped():
            return {}
        try:
            found = due(source)
            if found and found[0] not in claims:
                started = time.perf_counter()
                claims[found[0]] = vlm.claim(open_image(found[1], max_pixels=vlm.encoder.max_pixels))
                times.append((time.perf_counter() - started) * 1e3)
        except TokcompError:
            pass  # its caption fails for the same reason
        except Exception:
            # A fault of ours must not keep an overnight run from the other pictures.
            logger.exception("%s: internal error, please report it", source.id)
        if told:
            told(count)
    shares = share_batch(list(claims.values()))
    if shares:
        keeps = [share.keep for share in shares]
        logger.info(
            "%d pictures share %d image tokens, %d to %d each, mean information %.3f",
            len(keeps), sum(keeps), min(keeps), max(keeps), shares[0].mean,
        )  # fmt: skip
    return {key: Scored(*found) for key, found in zip(claims, zip(shares, times, strict=True), strict=True)}


def calibrate_on(vlm: VLM, sources: Sequence[Source], told: Callable[[Source, str], None]) -> Calibration:
    """The calibration that ``sources`` give, without those that cannot be read.

    ``told`` of every picture, with the reason if it cannot be read, else ``""``.
    Raises ``UsageError`` where none can be read.
    """
    scores = []
    for source in sources:
        reason = ""
        try:
            scores.append(vlm.claim(source.path).information)
        except TokcompError as fault:
            reason = str(fault)
        told(source, reason)
    return Calibration.of(scores)
