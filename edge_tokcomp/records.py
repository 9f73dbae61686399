"""The record of one captioned picture, and the files records go to and are read back from."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, TextIO

from .errors import TokcompError

STAGES = ("decode", "preprocess", "encode", "compress", "prefill", "first_token", "generate")


@dataclass(frozen=True)
class Record:
    """One line of output. ``status`` is ``ok`` or ``error``; ``timings_ms`` has the names of ``STAGES``."""

    id: str
    sha256: str
    status: str
    error: str
    caption: str
    width: int
    height: int
    tokens_before: int
    tokens_after: int
    method: str
    keep: int | float
    model: str
    seed: int
    timings_ms: dict[str, float]
    version: str
    params_hash: str
    finish_reason: str = ""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """One line of JSON, without the newline."""
        return json.dumps(asdict(self), ensure_ascii=False)


class Sink(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None:
        """Take one record; it is on disk (or passed on) when this returns."""

    def close(self) -> None:
        """No more records."""


class JsonLines:
    """Appends to a ``.jsonl`` file, or writes to an open stream; one flushed line a record."""

    def __init__(self, target: Path | TextIO) -> None:
        self._own = isinstance(target, Path)
        self._stream = target.open("a", encoding="utf-8") if isinstance(target, Path) else target

    def write(self, record: Record) -> None:
        self._stream.write(record.to_json() + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._own:
            self._stream.close()


class Csv:
    """Appends to a ``.csv`` file; stages become columns ``decode_ms`` and so on."""

    def __init__(self, target: Path) -> None:
        new = not target.exists() or target.stat().st_size == 0
        self._stream = target.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._stream, csv_columns())
        if new:
            self._writer.writeheader()

    def write(self, record: Record) -> None:
        row: dict[str, Any] = asdict(record)
        timings = row.pop("timings_ms")
        row["notes"] = "; ".join(row["notes"])
        self._writer.writerow(row | {f"{stage}_ms": timings.get(stage, "") for stage in STAGES})
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def csv_columns() -> list[str]:
    """Column names of the CSV form."""
    plain = [f.name for f in fields(Record) if f.name != "timings_ms"]
    return [*plain, *(f"{stage}_ms" for stage in STAGES)]


def read_done(path: Path) -> Iterator[dict[str, Any]]:
    """Records of an earlier run, as mappings with at least ``id, sha256, status, error, caption, params_hash``.

    A last line that was cut short by a crash is removed from the file. Raises ``TokcompError`` for a file that holds
    something else.
    """
    if not path.exists():
        return
    repair_tail(path)
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            if reader.fieldnames is not None and list(reader.fieldnames) != csv_columns():
                raise TokcompError(
                    f"{path}: its columns are not those of a caption file; use another --out or --overwrite"
                )
            yield from reader
        return
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or not {"id", "sha256", "status", "params_hash"} <= record.keys():
                raise TokcompError(f"{path}: line {number} is not a caption record; use another --out or --overwrite")
            yield record


def repair_tail(path: Path) -> None:
    """Cut off a last line without its newline: the rest of it was never written."""
    with path.open("rb+") as stream:
        end = stream.seek(0, io.SEEK_END)
        at = end
        while at > 0:
            step = min(65536, at)
            stream.seek(at - step)
            newline = stream.read(step).rfind(b"\n")
            if newline >= 0:
                at = at - step + newline + 1
                break
            at -= step
        if at < end:
            stream.truncate(at)


def write_sidecar(path: Path, text: str) -> None:
    """Write ``text`` and a newline to ``path``, whole or not at all."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text + "\n")
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
