"""Prompts that wait for a scheduler, are run by it, and have come to their end."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..tokens import Rows
from .continuation import Continuation, FinishReason
from .sampling import Sampling

AHEAD = 32
"""Rows that are left for what each sequence generates next when a prompt is admitted."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how it is to be continued.

    ``prefix``: what it begins with, at positions from 0; ``key``: the same for equal prefixes, so that it is decoded
    once. ``rows``: what follows, one row or more. The sequence ids of both are set by the scheduler, and which logits
    are wanted.
    """

    prefix: Sequence[Rows]
    key: Hashable
    rows: Sequence[Rows]
    sampling: Sampling
    max_tokens: int
    stop: Sequence[str] = ()

    @property
    def length(self) -> int:
        """Rows of the whole prompt."""
        return sum(map(len, self.prefix)) + sum(map(len, self.rows))


@dataclass(frozen=True)
class Completion:
    """What became of the request numbered ``ticket``.

    ``tokens``: ids, the end token included. ``first_token_s``: seconds from its admission to its first token, other
    sequences' work included; ``generate_s``: from there to the last. ``layer_share``: see ``Decoder``. ``fault``: why
    it failed, ``""`` if it did not; then ``finish_reason`` is None.
    """

    ticket: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None
    first_token_s: float
    generate_s: float
    layer_share: float
    fault: str = ""


class Run:
    """A request on its way: ``sequence``: where, ``waiting``: rows not yet decoded, ``text``: pieces so far."""

    def __init__(self, ticket: int, request: Request, growth: Continuation) -> None:
        self.ticket, self.request, self.growth = ticket, request, growth
        self.sequence = -1
        self.waiting: deque[Rows] = deque(request.rows)
        self.text: list[str] = []

    @property
    def generates(self) -> bool:
        """Whether its next row is that of a token."""
        return not self.waiting

    @property
    def owed(self) -> int:
        """Rows it will take before long."""
        left = self.request.max_tokens - len(self.growth.tokens)
        return sum(map(len, self.waiting)) + min(AHEAD, left)

    def some(self, count: int) -> Rows:
        """The next rows, ``count`` at most, of one part of the prompt; the logits of the prompt's last are wanted."""
        rows = self.waiting.popleft()
        if len(rows) > count:
            self.waiting.appendleft(_part(rows, count, len(rows)))
            rows = _part(rows, 0, count)
        return marked(rows, self.sequence, last=not self.waiting)

    def prompt(self) -> list[Rows]:
        """All that waits of the prompt; tokens that are computed again wait on."""
        taken = []
        while self.waiting:
            final = self.waiting[0] is self.request.rows[-1]
            taken.append(self.some(len(self.waiting[0])))
            if final:
                break
        return taken

    def begin_again(self, tokens: Rows | None) -> None:
        """From the prompt on, with the ``tokens`` chosen so far behind it."""
        self.waiting = deque(self.request.rows)
        if tokens is not None:
            self.waiting.append(tokens)

    def completion(self, layer_share: float, fault: str = "") -> Completion:
        """What it came to."""
        growth = self.growth
        return Completion(
            self.ticket, "".join(self.text), tuple(growth.tokens), growth.finish_reason, growth.first_token_s,
            growth.generate_s, layer_share, fault,
        )  # fmt: skip


def marked(rows: Rows, sequence: int, *, last: bool = False) -> Rows:
    """``rows`` of that sequence; the logits of the ``last`` one are wanted, else none."""
    want = np.zeros(len(rows), np.bool_)
    want[-1:] = last
    return replace(rows, sequence=sequence, want_logits=want)


def _part(rows: Rows, start: int, stop: int) -> Rows:
    part = slice(start, stop)
    return replace(
        rows, embeddings=rows.embeddings[part], positions=rows.positions[..., part], want_logits=None,
        crop=None if rows.crop is None else rows.crop[part], tokens=None if rows.tokens is None else rows.tokens[part],
    )  # fmt: skip
