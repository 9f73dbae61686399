"""The batch job: every picture accounted for, nothing done twice, stoppable at any moment."""

from __future__ import annotations

import hashlib
import logging
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from types import FrameType
from typing import Protocol

from . import __version__
from .errors import TokcompError
from .images import open_image, read_bytes
from .parameters import Parameters, automatic_choices, hash_of_model, params_hash
from .records import Earlier, Record, Sink
from .resume import Done
from .scoring import Key, Scored, share_pictures
from .sidecars import SidecarError, holds, is_filled, sidecar_path, write_sidecar
from .sources import Source
from .text import encodable
from .vlm import VLM

logger = logging.getLogger(__name__)

_FAILURES_SHOWN = 5


class Progress(Protocol):
    """Told of every picture; prints or stays quiet."""

    def scored(self, count: int) -> None:
        """So many pictures have been looked at, ahead of their captions, to share a budget among them."""

    def done(self, record: Record, skipped: bool) -> None:
        """One picture is finished, or was found finished (``skipped``)."""


@dataclass(eq=False)
class Summary:
    """Counts of a run, and the failures with their reasons. Of the ``ok``, ``copied`` had bytes captioned before."""

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
        if self.first_token_ms:
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

    An interrupt (SIGINT, SIGTERM) calls ``on_stop`` and lets the current picture finish; a second one raises
    ``KeyboardInterrupt``. Raises ``TokcompError`` when the output cannot be written.
    """
    job = _Job(vlm, parameters, done, sidecar, overwrite)
    summary, started = Summary(), time.perf_counter()
    if vlm.sharing:
        vlm.sharing.restart()
    try:
        with _interruptible(on_stop) as interrupted:
            if job.batch:
                told = progress.scored if progress else None
                job.scored = share_pictures(vlm, sources, job.due, told, interrupted.is_set)
            for source in sources:
                if interrupted.is_set():
                    summary.interrupted = True
                    break
                record, skipped = job.caption(source)
                outcome = job.deliver(source, record, skipped, sink)
                summary.count(outcome, skipped)
                if progress:
                    progress.done(outcome, skipped)
    finally:
        summary.seconds = time.perf_counter() - started
    return summary


def count_done(
    vlm: VLM, sources: Sequence[Source], parameters: Parameters, done: Done | None, sidecar: str | None = None,
    overwrite: bool = False,
) -> int:  # fmt: skip
    """How many of ``sources`` ``caption_all`` would skip."""
    job = _Job(vlm, parameters, done, sidecar, overwrite)
    return sum(job.is_done(source) for source in sources)


class _Job:
    """What stays the same from picture to picture."""

    def __init__(
        self, vlm: VLM, parameters: Parameters, done: Done | None, sidecar: str | None, overwrite: bool
    ) -> None:
        self.vlm, self.parameters, self.vlm_hash = vlm, parameters, hash_of_model(vlm)
        self.done = Done() if done is None or overwrite else done
        self.sidecar, self.overwrite = sidecar, overwrite
        self.sidecar_decides = done is None and sidecar is not None and not overwrite
        self.made: dict[Key, Earlier] = {}
        self.batch = vlm.sharing is not None and vlm.sharing.by == "batch"
        self.scored: dict[Key, Scored] = {}
        self.noted: set[Key] = set()
        self.choices = lru_cache(maxsize=1)(partial(automatic_choices, vlm))

    def is_done(self, source: Source) -> bool:
        """Whether nothing is left to compute or to write for a picture."""
        try:
            if self._has_sidecar(source):
                return True
            if not self.done.captions:
                return False
            digest = hashlib.sha256(read_bytes(source.path)).hexdigest()
        except TokcompError:
            return False
        return self.done.has(source.id, digest, params_hash(self.vlm_hash, self.parameters.for_source(source)))

    def due(self, source: Source) -> tuple[Key, bytes] | None:
        """Key and bytes of a picture that is to be computed, if it is; raises ``TokcompError``."""
        if self._has_sidecar(source):
            return None
        data = read_bytes(source.path)
        key = hashlib.sha256(data).hexdigest(), params_hash(self.vlm_hash, self.parameters.for_source(source))
        return None if key in self.done.captions else (key, data)

    def caption(self, source: Source) -> tuple[Record, bool]:
        """The record of one picture, and whether it was skipped."""
        parameters = self.parameters.for_source(source)
        record = Record(
            id=source.id, sha256="", status="ok", error="", caption="", width=0, height=0, tokens_before=0,
            tokens_after=0, method=str(self.vlm.method), keep=self.vlm.keep, model=encodable(self.vlm.name),
            seed=self.vlm.seed, timings_ms={}, version=__version__,
            params_hash=params_hash(self.vlm_hash, parameters), root=source.root,
        )  # fmt: skip
        try:
            if self._has_sidecar(source):
                return record, True
            started = time.perf_counter()
            data = read_bytes(source.path)
            record = replace(record, sha256=hashlib.sha256(data).hexdigest())
            key = record.sha256, record.params_hash
            if earlier := self.made.get(key) or self.done.captions.get(key):
                self._note(key, earlier.information)
                return _again(record, earlier), self.done.has(record.id, *key)
            return self._new(record, parameters, data, started), False
        except TokcompError as fault:
            return _failed(record, str(fault)), False
        except Exception as fault:
            # A fault of ours must not keep an overnight run from the pictures behind this one.
            logger.exception("%s: internal error, please report it", source.id)
            reason = " ".join(str(fault).split())
            return _failed(record, f"internal error ({type(fault).__name__}: {reason})"), False

    def deliver(self, source: Source, record: Record, skipped: bool, sink: Sink) -> Record:
        """Write what is due, and return what is to be told: the record, or its failure where the sidecar failed.

        The sidecar first: so its failure stands in the row, whose caption the next run tries to write again. A run
        that ends in between makes the same caption again and finds it there.
        """
        if record.status == "error":
            if not self.done.says(record):
                sink.write(record)
            return record
        note = reason = ""
        if self.sidecar and not (skipped and not record.sha256):
            try:
                note = self._write_sidecar(sidecar_path(source, self.sidecar), record, skipped)
            except SidecarError as fault:
                note = reason = encodable(str(fault))
        if not skipped:
            record = replace(record, notes=[*record.notes, note]) if note else record
            sink.write(record)
            self.made[record.sha256, record.params_hash] = Earlier(
                record.id, record.sha256, record.params_hash, "", record.caption, record.width, record.height,
                record.tokens_before, record.tokens_after, record.finish_reason, record.root, ok=True,
            )  # fmt: skip
        return _failed(record, reason) if reason else record

    def _note(self, key: Key, information: float | None) -> None:
        """Count a picture that an earlier run has captioned in the running mean, once, as that run did."""
        if self.vlm.sharing and information is not None and key not in self.noted:
            self.vlm.sharing.note(information)
            self.noted.add(key)

    def _has_sidecar(self, source: Source) -> bool:
        return self.sidecar_decides and self.sidecar is not None and is_filled(sidecar_path(source, self.sidecar))

    def _write_sidecar(self, beside: Path, record: Record, skipped: bool) -> str:
        """Write it unless there is one that must stay; a note when that is another than ours."""
        if self.overwrite or not is_filled(beside):
            write_sidecar(beside, record.caption)
        elif not skipped and not holds(beside, record.caption):
            earlier = self.done.last.get(record.sha256)
            if earlier is None or not holds(beside, earlier.caption):
                return "the sidecar that was there is kept"
            write_sidecar(beside, record.caption)
        return ""

    def _new(self, record: Record, parameters: Parameters, data: bytes, started: float) -> Record:
        image = open_image(data, max_pixels=self.vlm.encoder.max_pixels)
        reading = (time.perf_counter() - started) * 1e3
        scored = self.scored.get((record.sha256, record.params_hash))
        if self.batch and scored is None:
            raise TokcompError("changed, or could not be read, while the pictures were scored; run the same again")
        encoded = self.vlm.encode(image, parameters.prompt, share=scored.share if scored else None)
        encoded.timings_ms["decode"] += reading
        encoded.timings_ms["compress"] += scored.milliseconds if scored else 0.0
        answer = self.vlm.answer(encoded, parameters.prompt, max_tokens=parameters.max_tokens)
        stats, share = answer.images[0].plan.stats, answer.images[0].share
        shared: dict[str, str | float] = {}
        if share:
            shared = {"dynamic": share.by, "information": share.information, "information_mean": share.mean}
        if self.vlm.layer_steps:
            shared["layer_tokens"] = round(answer.layer_tokens, 1)
        raised = {name: int(stats[name]) for name in ("keep_asked", "keep_raised") if name in stats}
        cut = _cut_short(answer.finish_reason)
        return replace(
            record, caption=answer.text, width=image.width, height=image.height, tokens_before=answer.tokens_before,
            tokens_after=answer.tokens_after, finish_reason=answer.finish_reason, notes=[*image.notes, *cut],
            timings_ms={name: round(value, 3) for name, value in answer.timings_ms.items()},
            choices={**self.choices(parameters.prompt), **raised, **shared},
        )  # fmt: skip


def _again(record: Record, earlier: Earlier) -> Record:
    return replace(
        record, caption=earlier.caption, width=earlier.width, height=earlier.height,
        tokens_before=earlier.tokens_before, tokens_after=earlier.tokens_after, finish_reason=earlier.finish_reason,
        notes=[
            "as captioned before" if earlier.id == record.id else f"same bytes as {earlier.id}",
            *_cut_short(earlier.finish_reason),
        ],
    )  # fmt: skip


def _cut_short(finish_reason: str) -> list[str]:
    return ["cut short: the context was full; raise --ctx"] if finish_reason == "context" else []


def _failed(record: Record, reason: str) -> Record:
    return replace(record, status="error", error=encodable(reason))


@contextmanager
def _interruptible(on_stop: Callable[[], None] | None) -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a flag. In other threads than the main one signals are left alone."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        if on_stop:
            on_stop()

    # A signal that is ignored (nohup, a job in the background) stays so.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
