"""The batch job: every picture accounted for, nothing done twice, stoppable at any moment."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from . import __version__
from .errors import TokcompError, UsageError
from .images import open_image, read_bytes
from .records import Record, Sink, read_done, write_sidecar
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
        prompt = self.prompt.replace("{stem}", source.path.stem).replace("{parent}", source.path.parent.name)
        return replace(self, prompt=prompt)


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

    def __str__(self) -> str:
        made = self.ok + len(self.failures)
        parts = [f"{self.ok} captioned", f"{self.skipped} skipped", f"{len(self.failures)} failed"]
        if made and self.seconds:
            parts.append(f"{made / self.seconds:.2f} images/s")
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
    """What an earlier run left: records by (file hash, parameters), which of them under which id, and error rows."""

    captions: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    ids: frozenset[tuple[str, str, str]] = frozenset()
    errors: frozenset[tuple[str, str, str]] = frozenset()

    @classmethod
    def read(cls, path: Path | None) -> Done:
        captions, ids, errors = {}, set(), set()
        for record in read_done(path) if path else ():
            if record["status"] == "ok":
                captions[record["sha256"], record["params_hash"]] = record
                ids.add((record["id"], record["sha256"], record["params_hash"]))
            else:
                errors.add((record["id"], record["sha256"], record.get("error", "")))
        return cls(captions, frozenset(ids), frozenset(errors))


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
) -> Summary:
    """Caption ``sources`` into ``sink``.

    A picture whose bytes and parameters stand in ``done`` is skipped; its ``sidecar`` (an extension such as ``.txt``)
    is written from the record if it is missing. Without ``done``, where nothing but sidecars is written, a picture is
    skipped when its sidecar is there and not empty. The same bytes under another name get a
    row of their own without being computed again. A picture that fails gives an error row, once, and is tried again by
    the next run. An interrupt (SIGINT, SIGTERM) lets the current picture finish; a second
    one raises ``KeyboardInterrupt``.
    """
    job = _Job(vlm, parameters, done, sidecar, overwrite)
    summary, started = Summary(), time.perf_counter()
    with _interruptible() as interrupted:
        for source in sources:
            if interrupted.is_set():
                summary.interrupted = True
                break
            record, skipped = job.caption(source)
            if record.status == "error":
                summary.failures.append((record.id, record.error))
                if (record.id, record.sha256, record.error) not in job.done.errors:
                    sink.write(record)
            elif skipped:
                summary.skipped += 1
            else:
                sink.write(record)
                summary.ok += 1
                if "first_token" in record.timings_ms:
                    summary.first_token_ms.append(record.timings_ms["first_token"])
                summary.tokens_before += record.tokens_before
                summary.tokens_after += record.tokens_after
            if progress:
                progress.done(record, skipped)
    summary.seconds = time.perf_counter() - started
    return summary


def count_done(vlm: VLM, sources: Sequence[Source], parameters: Parameters, done: Done) -> int:
    """How many of ``sources`` stand in ``done`` as they are, by content."""
    vlm_hash, count = _vlm_hash(vlm), 0
    for source in sources:
        try:
            digest = hashlib.sha256(read_bytes(source.path)).hexdigest()
        except TokcompError:
            continue
        count += (source.id, digest, params_hash(vlm_hash, parameters.for_source(source))) in done.ids
    return count


class _Job:
    """What stays the same from picture to picture."""

    def __init__(
        self, vlm: VLM, parameters: Parameters, done: Done | None, sidecar: str | None, overwrite: bool
    ) -> None:
        self.vlm, self.parameters, self.vlm_hash = vlm, parameters, _vlm_hash(vlm)
        self.done = Done() if done is None or overwrite else done
        self.sidecar, self.overwrite = sidecar, overwrite
        self.only_sidecars = done is None
        self.known = dict(self.done.captions)

    def caption(self, source: Source) -> tuple[Record, bool]:
        """The record of one picture, and whether it was skipped."""
        parameters = self.parameters.for_source(source)
        blank = Record(
            id=source.id, sha256="", status="error", error="", caption="", width=0, height=0, tokens_before=0,
            tokens_after=0, method=str(self.vlm.method), keep=self.vlm.keep, model=self.vlm.lm.name, seed=self.vlm.seed,
            timings_ms={}, version=__version__, params_hash=params_hash(self.vlm_hash, parameters),
        )  # fmt: skip
        beside = source.path.with_suffix(self.sidecar) if self.sidecar else None
        try:
            started = time.perf_counter()
            data = read_bytes(source.path)
            blank = replace(blank, sha256=hashlib.sha256(data).hexdigest())
            if found := self._earlier(blank, beside):
                return found
            record = self._new(blank, parameters, data, started)
        except UsageError:
            raise
        except TokcompError as fault:
            return replace(blank, error=str(fault)), False
        if beside is not None:
            _write_beside(beside, record.caption)
        self.known[record.sha256, record.params_hash] = asdict(record)
        return record, False

    def _earlier(self, blank: Record, beside: Path | None) -> tuple[Record, bool] | None:
        """What an earlier run, or an earlier copy in this one, already says of these bytes."""
        earlier = self.known.get((blank.sha256, blank.params_hash))
        if earlier is not None:
            if beside is not None and (self.overwrite or not _filled(beside)):
                _write_beside(beside, earlier["caption"])
            same = replace(
                blank, status="ok", caption=earlier["caption"],
                width=int(earlier["width"]), height=int(earlier["height"]),
                tokens_before=int(earlier["tokens_before"]), tokens_after=int(earlier["tokens_after"]),
                notes=[f"same bytes as {earlier['id']}"],
            )  # fmt: skip
            return same, (blank.id, blank.sha256, blank.params_hash) in self.done.ids
        if beside is not None and self.only_sidecars and not self.overwrite and _filled(beside):
            return replace(blank, status="ok", caption=beside.read_text(encoding="utf-8").strip()), True
        return None

    def _new(self, blank: Record, parameters: Parameters, data: bytes, started: float) -> Record:
        image = open_image(data, max_pixels=self.vlm.max_pixels)
        reading = (time.perf_counter() - started) * 1e3
        encoded = self.vlm.encode(image)
        encoded.timings_ms["decode"] += reading
        answer = self.vlm.answer(encoded, parameters.prompt, max_tokens=parameters.max_tokens)
        return replace(
            blank, status="ok", caption=answer.text, width=image.width, height=image.height,
            tokens_before=answer.tokens_before, tokens_after=answer.tokens_after, finish_reason=answer.finish_reason,
            timings_ms={name: round(value, 3) for name, value in answer.timings_ms.items()}, notes=list(image.notes),
        )  # fmt: skip


def _write_beside(path: Path, text: str) -> None:
    try:
        write_sidecar(path, text)
    except OSError as fault:
        raise UsageError(f"{path}: cannot be written ({fault.strerror or fault})") from fault


def _filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a flag. In other threads than the main one signals are left alone."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        logger.warning("stopping after the current picture; once more to stop at once")

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
