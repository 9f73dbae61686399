"""The batch job: every picture accounted for, nothing done twice, stoppable at any moment."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from .caption_job import CaptionJob
from .parameters import Parameters
from .records import Record, Sink
from .resume import Done
from .scoring import share_pictures
from .signals import interrupts_to
from .sources import Source
from .vlm import VLM

_FAILURES_SHOWN = 5


class Progress(Protocol):
    """Told of every picture; prints or stays quiet."""

    def scored(self, count: int) -> None:
        """So many pictures have been looked at, ahead of their captions, to share a budget among them."""

    def done(self, record: Record, skipped: bool) -> None:
        """One picture is finished, or was found finished (``skipped``)."""


@dataclass(eq=False)
class Summary:
    """Counts of a run, and the failures with their reasons. Of the ``ok``, ``copied`` had bytes captioned before.

    ``at_once``: captions that may have been generated together; a first token then waits for others, too.
    """

    at_once: int = 1
    ok: int = 0
    copied: int = 0
    skipped: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0
    first_token_ms: list[float] = field(default_factory=list)
    tokens_before: int = 0
    tokens_after: int = 0
    layer_tokens: float = 0.0

    def count(self, record: Record, skipped: bool) -> None:
        """One more picture."""
        if record.status == "error":
            self.failures.append((record.id, record.error))
        elif skipped:
            self.skipped += 1
        else:
            self.ok += 1
            if record.computed:
                self.first_token_ms.append(record.timings_ms["first_token"])
                self.tokens_before += record.tokens_before
                self.tokens_after += record.tokens_after
                self.layer_tokens += float(record.choices.get("layer_tokens", 0))
            else:
                self.copied += 1

    def lines(self) -> list[str]:
        """The counts in one line, then the first failures, a line each: all of them were told when they happened."""
        lines = [str(self), *(f"  failed: {name}: {reason}" for name, reason in self.failures[:_FAILURES_SHOWN])]
        if (more := len(self.failures) - _FAILURES_SHOWN) > 0:
            lines.append(f"  and {more:,} more")
        return lines

    def __str__(self) -> str:
        copies = f" ({self.copied} copied)" if self.copied else ""
        parts = [f"{self.ok} captioned{copies}", f"{self.skipped} skipped", f"{len(self.failures)} failed"]
        if self.seconds and self.ok > self.copied:
            parts.append(f"{(self.ok - self.copied) / self.seconds:.2f} images/s")
        if self.first_token_ms and 1 in (self.at_once, len(self.first_token_ms)):
            parts.append(f"median time to first token {statistics.median(self.first_token_ms):.0f} ms")
        if self.tokens_before:
            inside = f", {self.layer_tokens:,.0f} in a layer" if self.layer_tokens else ""
            parts.append(f"image tokens {self.tokens_before:,} → {self.tokens_after:,}{inside}")
        return ", ".join(parts)


def caption_all(
    vlm: VLM,
    sources: Sequence[Source],
    sink: Sink,
    parameters: Parameters,
    *,
    done: Done | None = None,
    sidecar: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_stop: Callable[[], None] | None = None,
) -> Summary:
    """Caption ``sources`` into ``sink``.

    ``check_context``, ``check_sidecars`` and ``check_ids`` refuse what would fail for every picture or spoil a file; it
    is for the caller to ask them first.

    With ``dynamic`` batch every picture that is due is scored first, which takes a run of the tower of its own, and
    their tokens sum to what they would be without. With ``running`` the mean goes on where ``done`` left it.

    A picture whose bytes and parameters stand in ``done`` is skipped; its ``sidecar`` (an extension such as ``.txt``)
    is written from the record if it is missing. Without ``done``, where nothing but sidecars is written, a picture is
    skipped when its sidecar is there and not empty. A sidecar that says something else than an earlier record is
    replaced only with ``overwrite``. The same bytes under another name get a row of their own without being computed
    again. A picture that fails gives an error row, unless its last row says the same, and is tried again by the next
    run. A sidecar that cannot be written is a failure too, but its caption is kept in the record and tried from there.

    Pictures are captioned several at once (``VLM.parallel``); records are written in the order of ``sources``.
    An interrupt (SIGINT, SIGTERM) calls ``on_stop`` and lets the captions finish that are being generated; a second one
    raises ``KeyboardInterrupt``. Raises ``TokcompError`` when the output cannot be written.
    """
    job = CaptionJob(vlm, parameters, done, sidecar, overwrite)
    summary, started = Summary(at_once=vlm.parallel), time.perf_counter()
    if vlm.sharing:
        vlm.sharing.restart()
    try:
        with _interruptible(on_stop) as interrupted:
            if job.batch:
                told = progress.scored if progress else None
                job.scored = share_pictures(vlm, sources, job.due, told, interrupted.is_set)
            asks = (job.ask(source) for source in sources)
            answers = vlm.answer_each(asks, max_tokens=parameters.max_tokens, stopped=interrupted.is_set)
            with closing(answers):
                given = 0
                for ask, outcome in answers:
                    record = job.deliver(ask.tag, job.record(ask.tag, outcome), sink)
                    given += 1
                    summary.count(record, ask.tag.skipped)
                    if progress:
                        progress.done(record, ask.tag.skipped)
            summary.interrupted = given < len(sources)
    finally:
        summary.seconds = time.perf_counter() - started
    return summary


def count_done(
    vlm: VLM, sources: Sequence[Source], parameters: Parameters, done: Done | None, sidecar: str | None = None,
    overwrite: bool = False,
) -> int:  # fmt: skip
    """How many of ``sources`` ``caption_all`` would skip."""
    job = CaptionJob(vlm, parameters, done, sidecar, overwrite)
    return sum(job.is_done(source) for source in sources)


@contextmanager
def _interruptible(on_stop: Callable[[], None] | None) -> Iterator[threading.Event]:
    """Turn the first interrupt into a flag."""
    flag = threading.Event()

    def note(_number: int, _frame: FrameType | None) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        if on_stop:
            on_stop()

    with interrupts_to(note):
        yield flag
