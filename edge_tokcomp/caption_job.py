"""One picture of the batch job: whether it is due, what is asked about it, and the record of what came of it."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from . import __version__
from .answers import Answer
from .errors import TokcompError
from .images import Image, open_image, read_bytes
from .parameters import Parameters, automatic_choices, hash_of_model, params_hash
from .pipeline import Ask, Outcome
from .records import Earlier, Record, Sink
from .resume import Done
from .scoring import Key, Scored
from .sidecars import SidecarError, holds, is_filled, sidecar_path, write_sidecar
from .sources import Source
from .text import encodable
from .vlm import VLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Due:
    """A picture as far as it is known before its turn in the model.

    ``record``: what its row says whatever comes, whole if it failed or was ``skipped``. ``earlier``: the record whose
    caption it takes. ``copies``: the picture of this run that it has the bytes and parameters of. Of one that is to be
    captioned: ``size``, ``notes`` on how it was read, the time that took, and what scoring gave it before.
    """

    source: Source
    record: Record
    prompt: str
    skipped: bool = False
    earlier: Earlier | None = None
    copies: Key | None = None
    size: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    reading_ms: float = 0.0
    scored: Scored | None = None


class CaptionJob:
    """What stays the same from picture to picture. ``due`` and ``ask`` may run in a thread of their own."""

    def __init__(
        self, vlm: VLM, parameters: Parameters, done: Done | None, sidecar: str | None, overwrite: bool
    ) -> None:
        self.vlm, self.parameters, self.vlm_hash = vlm, parameters, hash_of_model(vlm)
        self.done = Done() if done is None or overwrite else done
        self.sidecar, self.overwrite = sidecar, overwrite
        self.sidecar_decides = done is None and sidecar is not None and not overwrite
        self.made: dict[Key, Earlier] = {}
        self.failed: dict[Key, str] = {}
        self.asked: set[Key] = set()
        self.batch = vlm.sharing is not None and vlm.sharing.by == "batch"
        self.scored: Mapping[Key, Scored] = {}
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

    def ask(self, source: Source) -> Ask[Due]:
        """Read a picture, and decode it if it is to be captioned."""
        due, image = self._read(source)
        share = due.scored.share if due.scored else None
        return Ask(due, image, due.prompt, share, self._score(due))

    def record(self, due: Due, outcome: Outcome) -> Record:
        """What is written of a picture."""
        record = due.record
        if isinstance(outcome, Answer):
            return self._captioned(due, outcome)
        if isinstance(outcome, Exception):
            return _failed(record, self._reason(due.source, outcome))
        earlier = due.earlier
        if due.copies:
            earlier = self.made.get(due.copies)
            if earlier is None:
                return _failed(record, self.failed[due.copies])
        return _again(record, earlier) if earlier else record

    def deliver(self, due: Due, record: Record, sink: Sink) -> Record:
        """Write what is due, and return what is to be told: the record, or its failure where the sidecar failed.

        The sidecar first: so its failure stands in the row, whose caption the next run tries to write again. A run
        that ends in between makes the same caption again and finds it there.
        """
        key = record.sha256, record.params_hash
        if record.status == "error":
            self.failed[key] = record.error
            if not self.done.says(record):
                sink.write(record)
            return record
        note = reason = ""
        if self.sidecar and not (due.skipped and not record.sha256):
            try:
                note = self._write_sidecar(sidecar_path(due.source, self.sidecar), record, due.skipped)
            except SidecarError as fault:
                note = reason = encodable(str(fault))
        if not due.skipped:
            record = replace(record, notes=[*record.notes, note]) if note else record
            sink.write(record)
            self.made[key] = Earlier(
                record.id, record.sha256, record.params_hash, "", record.caption, record.width, record.height,
                record.tokens_before, record.tokens_after, record.finish_reason, record.root, ok=True,
            )  # fmt: skip
        return _failed(record, reason) if reason else record

    def _read(self, source: Source) -> tuple[Due, Image | None]:
        parameters = self.parameters.for_source(source)
        record = Record(
            id=source.id, sha256="", status="ok", error="", caption="", width=0, height=0, tokens_before=0,
            tokens_after=0, method=str(self.vlm.method), keep=self.vlm.keep, model=encodable(self.vlm.name),
            seed=self.vlm.seed, timings_ms={}, version=__version__,
            params_hash=params_hash(self.vlm_hash, parameters), root=source.root,
        )  # fmt: skip
        due = Due(source, record, parameters.prompt)
        try:
            if self._has_sidecar(source):
                return replace(due, skipped=True), None
            started = time.perf_counter()
            data = read_bytes(source.path)
            record = replace(record, sha256=hashlib.sha256(data).hexdigest())
            due, key = replace(due, record=record), (record.sha256, record.params_hash)
            if earlier := self.done.captions.get(key):
                return replace(due, earlier=earlier, skipped=self.done.has(record.id, *key)), None
            if key in self.asked:
                return replace(due, copies=key), None
            image = open_image(data, max_pixels=self.vlm.encoder.max_pixels)
            scored = self.scored.get(key)
            if self.batch and scored is None:
                raise TokcompError("changed, or could not be read, while the pictures were scored; run the same again")
            self.asked.add(key)
            reading_ms = (time.perf_counter() - started) * 1e3
            size = image.width, image.height
            return replace(due, size=size, notes=image.notes, reading_ms=reading_ms, scored=scored), image
        except Exception as fault:  # noqa: BLE001 -- it fails this picture only
            return replace(due, record=_failed(due.record, self._reason(source, fault))), None

    def _reason(self, source: Source, fault: Exception) -> str:
        if isinstance(fault, TokcompError):
            return str(fault)
        # A fault of ours must not keep an overnight run from the pictures behind this one.
        logger.error("%s: internal error, please report it", source.id, exc_info=fault)
        return f"internal error ({type(fault).__name__}: {' '.join(str(fault).split())})"

    def _score(self, due: Due) -> float | None:
        """That of a picture that an earlier run has captioned, to be counted in the running mean once, as that run
        did."""
        key = due.record.sha256, due.record.params_hash
        if due.earlier is None or due.earlier.information is None or key in self.noted:
            return None
        self.noted.add(key)
        return due.earlier.information

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

    def _captioned(self, due: Due, answer: Answer) -> Record:
        timings = dict(answer.timings_ms)
        scoring = due.scored.milliseconds if due.scored else 0.0
        for stage, more in (("decode", due.reading_ms), ("compress", scoring)):
            timings[stage] += more
            timings["first_token"] += more
        stats, share = answer.plans[0].stats, answer.shares[0]
        shared: dict[str, str | float] = {}
        if share:
            shared = {"dynamic": share.by, "information": share.information, "information_mean": share.mean}
        if self.vlm.layer_steps:
            shared["layer_tokens"] = round(answer.layer_tokens, 1)
        raised = {name: int(stats[name]) for name in ("keep_asked", "keep_raised") if name in stats}
        return replace(
            due.record, caption=answer.text, width=due.size[0], height=due.size[1],
            tokens_before=answer.tokens_before, tokens_after=answer.tokens_after,
            finish_reason=answer.finish_reason, notes=[*due.notes, *_cut_short(answer.finish_reason)],
            timings_ms={name: round(value, 3) for name, value in timings.items()},
            choices={**self.choices(due.prompt), **raised, **shared},
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
