"""Records in files: nothing lost, nothing half, nothing of other programs touched."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.records import (
    STAGES,
    Csv,
    Earlier,
    JsonLines,
    JsonStream,
    Record,
    csv_columns,
    read_earlier,
)

CAPTIONS = ["a red circle", 'he said "no",\nthen\r\nleft; ', "Grüße 猫\t", ""]


def record(number: int = 0, **changes: object) -> Record:
    values = {
        "id": f"photos/{number}.jpg", "sha256": f"{number:064x}", "status": "ok", "error": "",
        "caption": CAPTIONS[number % len(CAPTIONS)], "width": 640, "height": 480, "tokens_before": 576,
        "tokens_after": 64, "method": "prunesid:centre=token,score=projection", "keep": 64, "model": "m.gguf",
        "seed": 0, "timings_ms": dict.fromkeys(STAGES, 1.5), "version": "1", "params_hash": "ab",
        "finish_reason": "stop", "notes": ["one", "two, three"], "choices": {"n_ctx": 4096, "provider": 'cpu: "a", b'},
        "root": "/data/photos",
    }  # fmt: skip
    return Record(**(values | changes))  # type: ignore[arg-type]


def summary(one: Record) -> Earlier:
    return Earlier(
        one.id, one.sha256, one.params_hash, one.error, one.caption, one.width, one.height, one.tokens_before,
        one.tokens_after, one.finish_reason, one.root, one.status == "ok",
    )  # fmt: skip


KINDS = pytest.mark.parametrize(("kind", "name"), [(JsonLines, "out.jsonl"), (Csv, "out.csv")])
Kind = type[JsonLines]


def fill(kind: Kind, path: Path, records: list[Record]) -> None:
    sink = kind(path)
    for one in records:
        sink.write(one)
    sink.close()


@KINDS
def test_records_come_back_as_they_were_written(tmp_path: Path, kind: Kind, name: str) -> None:
    path = tmp_path / name
    records = [record(n) for n in range(4)] + [record(9, status="error", error='damaged ("x", y)', caption="")]
    fill(kind, path, records[:2])
    fill(kind, path, records[2:])
    assert list(read_earlier(path)) == [summary(one) for one in records]


def test_json_lines_are_plain_json(tmp_path: Path) -> None:
    fill(JsonLines, tmp_path / "a.jsonl", [record(1), record(2)])
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines[-1] == ""
    assert [json.loads(line)["caption"] for line in lines[:-1]] == CAPTIONS[1:3]
    assert "Grüße 猫" in lines[1]


def test_csv_is_read_by_the_csv_module(tmp_path: Path) -> None:
    fill(Csv, tmp_path / "a.csv", [record(0), record(1)])
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as stream:
        first, second = csv.DictReader(stream)
    assert list(first) == csv_columns()
    assert (first["notes"], first["decode_ms"], second["caption"]) == ("one; two, three", "1.5", CAPTIONS[1])
    assert json.loads(first["choices"]) == record(0).choices


@KINDS
def test_a_file_cut_at_any_byte_keeps_its_whole_records(tmp_path: Path, kind: Kind, name: str) -> None:
    """As after a crash; the next run ends up with the file that an undisturbed one writes."""
    path = tmp_path / name
    records = [record(n) for n in range(4)]
    fill(kind, path, records)
    whole = path.read_bytes()
    for cut in (*range(0, len(whole), 3), len(whole) - 1):
        path.write_bytes(whole[:cut])
        left = list(read_earlier(path))
        assert left == [summary(one) for one in records[: len(left)]]
        assert path.stat().st_size == cut  # reading alone, as a dry run does, changes nothing
        fill(kind, path, records[len(left) :])
        assert path.read_bytes() == whole, cut


@KINDS
def test_files_of_other_programs_are_refused_and_left_alone(tmp_path: Path, kind: Kind, name: str) -> None:
    path = tmp_path / name
    others = [
        b"my notes, with no line end", b'{"image": "a.jpg", "text": "x"}\n', b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        b"id,caption\n1,x\n", b"[1, 2]\n", b"7\n", b"null\n", b'{"id": "a", "status": "ok"}\n', b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
    ]  # fmt: skip
    for other in others:
        path.write_bytes(other)
        with pytest.raises(TokcompError, match=name) as caught:
            list(read_earlier(path))
        assert "--out" in str(caught.value)
        assert path.read_bytes() == other
    for other in others[:1]:
        path.write_bytes(other)
        with pytest.raises(TokcompError):
            kind(path)
        assert path.read_bytes() == other


@pytest.mark.parametrize("kind", [JsonLines, Csv])
def test_the_information_of_a_picture_is_read_back(tmp_path: Path, kind: type[JsonLines]) -> None:
    path = tmp_path / ("a.csv" if kind is Csv else "a.jsonl")
    fill(kind, path, [record(0), record(1, choices={"information": 0.25, "dynamic": "running"})])
    assert [earlier.information for earlier in read_earlier(path)] == [None, 0.25]


def test_a_lost_quotation_mark_does_not_cost_the_rows_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    fill(Csv, path, [record(4 * n) for n in range(5)])
    damaged = path.read_bytes().replace(b"a red circle", b'"a red circle', 1)
    path.write_bytes(damaged)
    for attempt in (lambda: list(read_earlier(path)), lambda: Csv(path)):
        with pytest.raises(TokcompError, match="mend it"):
            attempt()
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("change", [{"width": "wide"}, {"caption": None}, {"status": "maybe"}, {"sha256": 7},
                                    {"choices": 3}, {"choices": {"information": "much"}},
                                    {"choices": {"information": float("nan")}}, {"choices": {"information": True}},
                                    {"choices": "{}}"}])  # fmt: skip
def test_records_that_were_edited_badly_are_named_by_their_number(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "a.jsonl"
    good = record(0).to_json()
    path.write_text(f"{good}\n\n{json.dumps(json.loads(good) | change)}\n")
    with pytest.raises(TokcompError, match="row 2 is not a caption record"):
        list(read_earlier(path))


@KINDS
def test_overwrite_begins_anew(tmp_path: Path, kind: Kind, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"anything")
    sink = kind(path, overwrite=True)
    sink.write(record(3))
    sink.close()
    assert list(read_earlier(path)) == [summary(record(3))]


def test_a_file_is_written_by_one_run_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first = JsonLines(tmp_path / "a.jsonl")
    with pytest.raises(TokcompError, match="another run is writing it"):
        JsonLines(tmp_path / "a.jsonl")
    first.close()
    JsonLines(tmp_path / "a.jsonl").close()


def test_a_file_of_one_endless_line_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.truncate(1 << 34)  # no disk is taken: a hole
    with pytest.raises(TokcompError, match="is no caption record"):
        JsonLines(path)
    with pytest.raises(TokcompError, match="not a regular file"):
        JsonLines(Path(os.devnull))


FILL_UP = """
import resource, signal, sys
from pathlib import Path
from test_records import record
from edge_tokcomp.errors import TokcompError
from edge_tokcomp.records import JsonLines
path = Path(sys.argv[1])
sink = JsonLines(path)
sink.write(record(0))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, limits[1]))
try:
    sink.write(record(1))
except TokcompError as fault:
    print(fault)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
sink.write(record(2))
"""


def test_a_disk_that_fills_up_leaves_whole_records_only(tmp_path: Path) -> None:
    """In a process of its own: the limit that stands for the disk would hold for pytest's own output too."""
    pytest.importorskip("resource")
    path = tmp_path / "a.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FILL_UP, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    assert "cannot be written (File too large); the records in it are whole" in done.stdout
    assert list(read_earlier(path)) == [summary(record(0)), summary(record(2))]


def test_json_lines_on_a_stream_escape_what_cannot_be_encoded() -> None:
    """Its error handler is for the encoding that it had before."""
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, "ascii", errors="backslashreplace")
    JsonStream(stream).write(record(2, caption="Grüße \ud800"))
    assert json.loads(data.getvalue().decode("utf-8"))["caption"] == "Grüße \ud800"
