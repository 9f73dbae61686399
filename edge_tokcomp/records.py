"""The record of one captioned picture, and the files records go to and are read back from."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from .errors import TokcompError

STAGES = ("decode", "preprocess", "encode", "compress", "prefill", "first_token", "generate")

_OTHER = "use another --out, or --overwrite"
_LONGEST_LINE = 16 << 20
_RECORD_START = b'{"id": "'


@dataclass(frozen=True)
class Record:
    """One line of output. ``status`` is ``ok`` or ``error``; ``timings_ms`` has the names of ``STAGES``.

    ``finish_reason``: ``stop``, ``length`` (``max_tokens``) or ``context`` (no room left). ``choices``: what was chosen
    for the user, and why (``provider``, ``n_ctx``, ``prompt_form`` ...), in rows that were computed; where a budget is
    shared among pictures also ``dynamic`` (whose mean), ``information`` (the picture's score) and ``information_mean``,
    and where image tokens are dropped inside the language model ``layer_steps``, ``positions`` (``original`` or
    ``renumbered`` there) and ``layer_tokens`` (image tokens a layer held, on average).
    ``root``: the absolute folder that ``id`` is relative to.

    A picture that failed in one run and went well in a later one has a line of each; the last line of an id counts.
    """

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
    choices: dict[str, str | int | float] = field(default_factory=dict)
    root: str = ""

    @property
    def computed(self) -> bool:
        """Whether the caption was made for this row, and not taken from another one."""
        return bool(self.timings_ms)

    def to_json(self) -> str:
        """One line of JSON, without the newline."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def to_csv(self) -> str:
        """One row, with its line end; its columns are ``csv_columns()``, notes joined by semicolons, choices JSON."""
        row: dict[str, Any] = asdict(self)
        timings = row.pop("timings_ms")
        row["notes"] = "; ".join(row["notes"])
        row["choices"] = json.dumps(row["choices"], ensure_ascii=False)
        return _csv_row([*row.values(), *(timings.get(stage, "") for stage in STAGES)])


class Earlier(NamedTuple):
    """What is needed of an earlier record, in little memory: there may be a million.

    ``information``: the picture's score, in rows that were computed and shared a budget.
    """

    id: str
    sha256: str
    params_hash: str
    error: str
    caption: str
    width: int
    height: int
    tokens_before: int
    tokens_after: int
    finish_reason: str
    root: str
    ok: bool
    information: float | None = None


class Sink(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None:
        """Take one record; it is on disk (or passed on) when this returns."""

    def close(self) -> None:
        """No more records."""


class JsonLines:
    """Appends to a ``.jsonl`` file, one write a record, so that every line in it is whole whenever the run ends.

    A last line that a crash cut short is removed first; ``overwrite`` empties the file. Raises ``TokcompError`` when
    the file holds something else, cannot be written, or is being written by another run.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise TokcompError(f"{path}: not a regular file")
        try:
            self._stream = path.open("ab", buffering=0)
        except OSError as fault:
            raise TokcompError(f"{path}: cannot be written ({fault.strerror})") from fault
        try:
            _lock(self._stream, path)
            whole = 0 if overwrite else _whole_bytes(path)
            if whole < os.fstat(self._stream.fileno()).st_size:
                self._stream.truncate(whole)
        except BaseException:
            self._stream.close()
            raise

    def write(self, record: Record) -> None:
        """Append a line; raises ``TokcompError`` if it does not fit, and then leaves nothing of it."""
        self._append(record.to_json() + "\n")

    def close(self) -> None:
        """Let go of the file."""
        self._stream.close()

    def _append(self, text: str) -> None:
        before = os.fstat(self._stream.fileno()).st_size
        rest = memoryview(text.encode())
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
        except OSError as fault:
            with suppress(OSError):
                self._stream.truncate(before)
            raise TokcompError(
                f"{self.path}: cannot be written ({fault.strerror}); the records in it are whole, "
                "the same command goes on from there"
            ) from fault


class Csv(JsonLines):
    """The same for a ``.csv`` file; stages become columns ``decode_ms`` and so on."""

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        super().__init__(path, overwrite=overwrite)
        if not os.fstat(self._stream.fileno()).st_size:
            self._append(_csv_row(csv_columns()))

    def write(self, record: Record) -> None:
        """Append a row; raises ``TokcompError`` if it does not fit, and then leaves nothing of it."""
        self._append(record.to_csv())


class JsonStream:
    """JSON lines on an open text stream, in UTF-8, each passed on at once."""

    def __init__(self, stream: TextIO) -> None:
        if isinstance(stream, io.TextIOWrapper):
            # An encoding alone would make characters that it does not know an error again.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")
        self._stream = stream

    def write(self, record: Record) -> None:
        """Print a line."""
        self._stream.write(record.to_json() + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing: the stream is not ours."""


def csv_columns() -> list[str]:
    """Column names of the CSV form."""
    plain = [f.name for f in fields(Record) if f.name != "timings_ms"]
    return [*plain, *(f"{stage}_ms" for stage in STAGES)]


def read_earlier(path: Path) -> Iterator[Earlier]:
    """The records of an earlier run, without a last line that was cut short; nothing if there is no file.

    Only reads. Raises ``TokcompError`` for a file that holds something else.
    """
    if not path.exists():
        return
    count = 0
    try:
        for row in _rows(path):
            yield _earlier(row)
            count += 1
    except (csv.Error, ValueError, KeyError, TypeError, RecursionError) as fault:
        raise TokcompError(f"{path}: row {count + 1} is not a caption record; {_OTHER}") from fault


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    lines = _whole_lines(path, _whole_bytes(path))
    if path.suffix.lower() == ".csv":
        yield from csv.DictReader(lines)
    else:
        yield from (json.loads(line) for line in lines if line.strip())


def _earlier(row: Mapping[str, Any]) -> Earlier:
    if row["status"] not in ("ok", "error"):
        raise ValueError(f"status {row['status']!r}")
    names = ("id", "sha256", "params_hash", "error", "caption", "finish_reason", "root")
    if not all(isinstance(row[name], str) for name in names):
        raise TypeError(f"one of {', '.join(names)} is not text")
    return Earlier(
        row["id"], row["sha256"], sys.intern(row["params_hash"]), row["error"], row["caption"], int(row["width"]),
        int(row["height"]), int(row["tokens_before"]), int(row["tokens_after"]), sys.intern(row["finish_reason"]),
        sys.intern(row["root"]), ok=row["status"] == "ok", information=_information(row["choices"]),
    )  # fmt: skip


def _information(choices: Any) -> float | None:
    """Of the choices of a row, which CSV holds as JSON."""
    found = dict(json.loads(choices) if isinstance(choices, str) else choices).get("information")
    if found is None or (type(found) in (int, float) and 0 <= found <= 2):
        return found
    raise TypeError(f"information {found!r}")


def _whole_bytes(path: Path) -> int:
    """Bytes up to the end of the last whole record.

    Raises ``TokcompError`` when the first line, or what would be cut off at the end, is not ours to touch.
    """
    is_csv = path.suffix.lower() == ".csv"
    header = _csv_row(csv_columns()).encode()
    end = at = quotes = 0
    tail: list[bytes] = []
    try:
        for line in _lines(path):
            if is_csv and not at and not header.startswith(line):
                raise TokcompError(f"{path}: its columns are not those of a caption file; {_OTHER}")
            at += len(line)
            quotes += line.count(b'"') if is_csv else 0
            tail.append(line)
            if line.endswith(b"\n") and quotes % 2 == 0:  # A line end within quotes belongs to a caption.
                end, tail = at, []
    except OSError as fault:
        raise TokcompError(f"{path}: cannot be read ({fault.strerror})") from fault
    if is_csv:
        # A quotation mark without its fellow makes rows look like text of a caption.
        ours = not any(line.count(b",") + 1 >= len(csv_columns()) for line in tail if line.endswith(b"\n"))
    else:
        ours = not tail or _RECORD_START.startswith(tail[0][: len(_RECORD_START)])
    if not ours:
        raise TokcompError(f"{path}: its end is neither a caption record nor the start of one; mend it, or {_OTHER}")
    return end


def _whole_lines(path: Path, end: int) -> Iterator[str]:
    at = 0
    for line in _lines(path):
        at += len(line)
        if at > end:
            return
        yield line.decode("utf-8")


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while line := stream.readline(_LONGEST_LINE):
            if len(line) == _LONGEST_LINE:
                raise TokcompError(f"{path}: a line of {_LONGEST_LINE:,} bytes or more is no caption record; {_OTHER}")
            yield line


def _csv_row(values: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text).writerow(values)
    return text.getvalue()


def _lock(stream: io.FileIO, path: Path) -> None:
    """One run at a time on a file, where the system knows such locks (not Windows, not every network disk)."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as fault:
        raise TokcompError(f"{path}: another run is writing it; wait for it, or use another --out") from fault
    except OSError:
        return
