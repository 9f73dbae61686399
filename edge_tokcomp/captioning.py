"""The batch job: every picture accounted for, nothing done twice, stoppable at any moment."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

from . import __version__
from .errors import TokcompError, UsageError
from .images import open_image, read_bytes
from .records import Earlier, Record, Sink, read_earlier, write_sidecar
from .sources import Source
from .vlm import CAPTION_PROMPT, VLM

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Told of every picture; prints or stays quiet."""

    def done(self, record: Record, skipped: bool) -> None:
        """One picture is finished, or was found finished (``skipped``)."""


@dataclass(frozen=True)
class Parameters:
    """Everything that decides a caption, apart from the picture. ``prompt`` may hold ``{stem}`` and ``{parent}``."""

    prompt: str = CAPTION_PROMPT
    max_tokens: int = 256

    def for_source(self, source: Source) -> Parameters:
        """With the placeholders of the prompt filled in."""
        if not self.varies:
            return self
        parent = source.path.absolute().parent.name
        return replace(self, prompt=self.prompt.replace("{stem}", source.path.stem).replace("{parent}", parent))

    @property
    def varies(self) -> bool:
        """Whether the prompt is another for every picture."""
        return "{stem}" in self.prompt or "{parent}" in self.prompt


@dataclass(eq=False)
class Summary:
    """Counts of a run, and the failures with their reasons."""

    ok: int = 0
    skipped: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0
    first_token_ms: list[float] = field(default_factory=list)
    tokens_before: int = 0
    tokens_after: int = 0

    def count(self, record: Record, skipped: bool) -> None:
        """One more picture."""
        if record.status == "error":
            self.failures.append((record.id, record.error))
        elif skipped:
            self.skipped += 1
        else:
            self.ok += 1
            if "first_token" in record.timings_ms:
                self.first_token_ms.append(record.timings_ms["first_token"])
                self.tokens_before += record.tokens_before
                self.tokens_after += record.tokens_after

    def __str__(self) -> str:
        parts = [f"{self.ok} captioned", f"{self.skipped} skipped", f"{len(self.failures)} failed"]
        if self.ok and self.seconds:
            parts.append(f"{self.ok / self.seconds:.2f} images/s")
        if self.first_token_ms:
            parts.append(f"median time to first token {statistics.median(self.first_token_ms):.0f} ms")
        if self.tokens_before:
            parts.append(f"image tokens {self.tokens_before:,} → {self.tokens_after:,}")
        return ", ".join(parts)


def params_hash(vlm_hash: str, parameters: Parameters) -> str:
    """Identifies model files, method, budget, prompt and sampling: a change of any makes pictures due again."""
    return hashlib.sha256(json.dumps([vlm_hash, asdict(parameters)]).encode()).hexdigest()[:16]


def _vlm_hash(vlm: VLM) -> str:
    values = {
        "lm": _fingerprint(vlm.lm), "mmproj": _fingerprint(vlm.mmproj), "method": repr(vlm.method),
        "keep": vlm.keep, "seed": vlm.seed, "precision": vlm.precision,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> str:
    """Size, head and 64 samples of a model file: hashing gigabytes would delay every start."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(1 << 20))
        for part in range(64):
            stream.seek(size * part // 64)
            digest.update(stream.read(1 << 14))
    return digest.hexdigest()


@dataclass(frozen=True)
class Done:
    """What an earlier run left.

    ``captions`` by (file hash, parameters); ``copies``: the ids of those that stand there under several;
    ``errors`` rows; ``last`` caption of a file hash.
    """

    captions: dict[tuple[str, str], Earlier] = field(default_factory=dict)
    copies: frozenset[tuple[str, str, str]] = frozenset()
    errors: frozenset[tuple[str, str, str]] = frozenset()
    last: dict[str, Earlier] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> Done:
        """From an output file; empty without one. Raises ``TokcompError`` if the file holds something else."""
        captions: dict[tuple[str, str], Earlier] = {}
        copies, errors, last = set(), set(), {}
        for earlier in read_earlier(path) if path else ():
            key = earlier.sha256, earlier.params_hash
            if not earlier.ok:
                errors.add((earlier.id, earlier.sha256, earlier.error))
                continue
            if key in captions:
                copies |= {(captions[key].id, *key), (earlier.id, *key)}
            captions[key] = last[earlier.sha256] = earlier
        return cls(captions, frozenset(copies), frozenset(errors), last)

    def has(self, name: str, sha256: str, parameters: str) -> bool:
        """Whether the picture of that id, with those bytes, is done with those parameters."""
        earlier = self.captions.get((sha256, parameters))
        return earlier is not None and (earlier.id == name or (name, sha256, parameters) in self.copies)


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

    A picture whose bytes and parameters stand in ``done`` is skipped; its ``sidecar`` (an extension such as ``.txt``)
    is written from the record if it is missing. Without ``done``, where nothing but sidecars is written, a picture is
    skipped when its sidecar is there and not empty. A sidecar that says something else than an earlier record is
    replaced only with ``overwrite``. The same bytes under another name get a row of their own without being computed
    again. A picture that fails gives an error row, once, and is tried again by the next run.

    An interrupt (SIGINT, SIGTERM) calls ``on_stop`` and lets the current picture finish; a second one raises
    ``KeyboardInterrupt``. Raises ``UsageError`` when no picture could be captioned so, ``TokcompError`` when output
    cannot be written.
    """
    check_context(vlm, parameters)
    if sidecar:
        check_sidecars(sources, sidecar)
    job = _Job(vlm, parameters, done, sidecar, overwrite)
    summary, started = Summary(), time.perf_counter()
    try:
        with _interruptible(on_stop) as interrupted:
            for source in sources:
                if interrupted.is_set():
                    summary.interrupted = True
                    break
                record, skipped = job.caption(source)
                job.deliver(source, record, skipped, sink)
                summary.count(record, skipped)
                if progress:
                    progress.done(record, skipped)
    finally:
        summary.seconds = time.perf_counter() - started
    return summary


def check_context(vlm: VLM, parameters: Parameters) -> None:
    """Raise ``UsageError`` when the context has not the rows that a picture and the prompt take at least."""
    needed = vlm.rows_needed(Parameters.prompt if parameters.varies else parameters.prompt)
    if needed > vlm.decoder.n_ctx:
        raise UsageError(
            f"image and prompt need {needed} rows of context, there are {vlm.decoder.n_ctx}; "
            "shorten --prompt, keep fewer image tokens or raise --ctx"
        )


def sidecar_path(source: Source, extension: str) -> Path:
    """Where the caption of ``source`` goes: ``a.jpg`` to ``a.txt``."""
    return source.path.with_suffix(extension)


def check_sidecars(sources: Sequence[Source], extension: str) -> None:
    """Raise ``UsageError`` when two pictures would share a sidecar, or one would be written over a picture."""
    pictures = {os.path.normcase(os.path.abspath(source.path)): source for source in sources}
    owners: dict[str, Source] = {}
    for source in sources:
        beside = sidecar_path(source, extension)
        key = os.path.normcase(os.path.abspath(beside))
        if key in pictures:
            raise UsageError(f"the sidecar of {source.id} would be written over the picture {pictures[key].id}")
        if key in owners:
            raise UsageError(
                f"{owners[key].id} and {source.id} would share the sidecar {beside.name}; "
                "rename one, or write to --out instead"
            )
        owners[key] = source


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
        self.vlm, self.parameters, self.vlm_hash = vlm, parameters, _vlm_hash(vlm)
        self.done = Done() if done is None or overwrite else done
        self.sidecar, self.overwrite = sidecar, overwrite
        self.sidecar_decides = done is None and sidecar is not None and not overwrite
        self.made: dict[tuple[str, str], Earlier] = {}

    def is_done(self, source: Source) -> bool:
        """Whether nothing is left to compute or to write for a picture."""
        if self._has_sidecar(source):
            return True
        if not self.done.captions:
            return False
        try:
            digest = hashlib.sha256(read_bytes(source.path)).hexdigest()
        except TokcompError:
            return False
        return self.done.has(source.id, digest, params_hash(self.vlm_hash, self.parameters.for_source(source)))

    def caption(self, source: Source) -> tuple[Record, bool]:
        """The record of one picture, and whether it was skipped."""
        parameters = self.parameters.for_source(source)
        record = Record(
            id=source.id, sha256="", status="ok", error="", caption="", width=0, height=0, tokens_before=0,
            tokens_after=0, method=str(self.vlm.method), keep=self.vlm.keep, model=self.vlm.lm.name, seed=self.vlm.seed,
            timings_ms={}, version=__version__, params_hash=params_hash(self.vlm_hash, parameters),
        )  # fmt: skip
        try:
            if self._has_sidecar(source):
                return record, True
            started = time.perf_counter()
            data = read_bytes(source.path)
            record = replace(record, sha256=hashlib.sha256(data).hexdigest())
            key = record.sha256, record.params_hash
            if earlier := self.made.get(key) or self.done.captions.get(key):
                return _again(record, earlier), self.done.has(record.id, *key)
            return self._new(record, parameters, data, started), False
        except TokcompError as fault:
            return replace(record, status="error", error=str(fault)), False
        except Exception as fault:
            # A fault of ours must not keep an overnight run from the pictures behind this one.
            logger.exception("%s: internal error, please report it", source.id)
            reason = " ".join(str(fault).split())
            return replace(record, status="error", error=f"internal error ({type(fault).__name__}: {reason})"), False

    def deliver(self, source: Source, record: Record, skipped: bool, sink: Sink) -> None:
        """Record first, then sidecar: a run that ends in between is put right by the next."""
        if record.status == "error":
            if (record.id, record.sha256, record.error) not in self.done.errors:
                sink.write(record)
            return
        beside = self._sidecar_due(source, record, skipped)
        if not skipped:
            if self.sidecar and beside is None:
                record = replace(record, notes=[*record.notes, "the sidecar that was there is kept"])
            sink.write(record)
            self.made[record.sha256, record.params_hash] = Earlier(
                record.id, record.sha256, record.params_hash, "", record.caption, record.width, record.height,
                record.tokens_before, record.tokens_after, ok=True,
            )  # fmt: skip
        if beside is not None:
            write_sidecar(beside, record.caption)

    def _has_sidecar(self, source: Source) -> bool:
        return self.sidecar_decides and self.sidecar is not None and _filled(sidecar_path(source, self.sidecar))

    def _sidecar_due(self, source: Source, record: Record, skipped: bool) -> Path | None:
        """The sidecar to write, unless there is one that must stay."""
        if not self.sidecar or (skipped and not record.sha256):
            return None
        beside = sidecar_path(source, self.sidecar)
        if self.overwrite or not _filled(beside):
            return beside
        earlier = self.done.last.get(record.sha256)
        if skipped or earlier is None:
            return None
        try:
            return beside if beside.read_bytes() == f"{earlier.caption}\n".encode() else None
        except OSError:
            return None

    def _new(self, record: Record, parameters: Parameters, data: bytes, started: float) -> Record:
        image = open_image(data, max_pixels=self.vlm.max_pixels)
        reading = (time.perf_counter() - started) * 1e3
        encoded = self.vlm.encode(image, parameters.prompt)
        encoded.timings_ms["decode"] += reading
        answer = self.vlm.answer(encoded, parameters.prompt, max_tokens=parameters.max_tokens)
        return replace(
            record, caption=answer.text, width=image.width, height=image.height, tokens_before=answer.tokens_before,
            tokens_after=answer.tokens_after, finish_reason=answer.finish_reason, notes=list(image.notes),
            timings_ms={name: round(value, 3) for name, value in answer.timings_ms.items()},
        )  # fmt: skip


def _again(record: Record, earlier: Earlier) -> Record:
    return replace(
        record, caption=earlier.caption, width=earlier.width, height=earlier.height,
        tokens_before=earlier.tokens_before, tokens_after=earlier.tokens_after, notes=[f"same bytes as {earlier.id}"],
    )  # fmt: skip


def _filled(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError as fault:
        raise TokcompError(f"{path}: cannot be read ({fault.strerror})") from fault


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
