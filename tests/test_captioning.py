"""The batch job: every picture accounted for, nothing done twice, nothing of the user's overwritten."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edge_tokcomp.captioning import (
    Done,
    Parameters,
    Summary,
    caption_all,
    check_context,
    check_sidecars,
    count_done,
    params_hash,
)
from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.records import STAGES, Csv, JsonLines, Record
from edge_tokcomp.sources import find_sources
from edge_tokcomp.vlm import VLM
from picture_files import BAD, mixed, pictures

PARAMETERS = Parameters("what is this", max_tokens=6)


class Collected:
    """A sink that keeps its records."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


class Told:
    """A progress that notes what it is told, and calls ``then`` after the first picture."""

    def __init__(self, then: Any = None) -> None:
        self.seen: list[tuple[str, str, bool]] = []
        self.then = then

    def done(self, record: Record, skipped: bool) -> None:
        self.seen.append((record.id, record.status, skipped))
        if self.then and len(self.seen) == 1:
            self.then()


def run(vlm: VLM, folder: Path, **options: Any) -> tuple[Summary, list[Record]]:
    sink = Collected()
    parameters = options.pop("parameters", PARAMETERS)
    return caption_all(vlm, find_sources([str(folder)]), sink, parameters, **options), sink.records


def into(vlm: VLM, folder: Path, out: Path, **options: Any) -> Summary:
    """As the command does it: what ``out`` holds is not done again."""
    parameters = options.pop("parameters", PARAMETERS)
    done = Done.read(out)
    sink = (Csv if out.suffix == ".csv" else JsonLines)(out)
    try:
        return caption_all(vlm, find_sources([str(folder)]), sink, parameters, done=done, **options)
    finally:
        sink.close()


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_every_file_has_its_row_and_bad_ones_their_reason(vlm: VLM, tmp_path: Path) -> None:
    wanted = mixed(tmp_path / "photos")
    summary, records = run(vlm, tmp_path / "photos")
    assert [record.id for record in records] == sorted(wanted)
    assert {record.id for record in records if record.status == "error"} == BAD
    assert {name for name, _ in summary.failures} == BAD
    assert (summary.ok, summary.skipped) == (len(wanted) - len(BAD), 0)
    for record in records:
        said = record.error if record.status == "error" else "; ".join(record.notes)
        assert wanted[record.id] in said
        assert bool(said) == bool(wanted[record.id])
        assert "\n" not in record.error


def test_a_record_says_all_that_is_promised(vlm: VLM, tmp_path: Path) -> None:
    pictures(tmp_path / "p", 1)
    _, (record,) = run(vlm, tmp_path / "p")
    data = (tmp_path / "p" / "0.png").read_bytes()
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert record.caption == vlm.ask(tmp_path / "p" / "0.png", "what is this", max_tokens=6)
    assert (record.width, record.height, record.tokens_before, record.tokens_after) == (50, 40, 36, 36)
    assert (record.method, record.keep, record.seed, record.model) == ("none", 1.0, 0, "tiny-lm.gguf")
    assert tuple(record.timings_ms) == STAGES
    assert record.timings_ms["decode"] > 0
    assert record.finish_reason == "length"


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_a_second_run_skips_what_is_done_and_tries_failures_again(vlm: VLM, tmp_path: Path, name: str) -> None:
    mixed(tmp_path / "photos")
    out = tmp_path / name
    first = into(vlm, tmp_path / "photos", out)
    before = out.read_bytes()
    again = into(vlm, tmp_path / "photos", out)
    assert (again.ok, again.skipped, len(again.failures)) == (0, first.ok, len(first.failures))
    assert out.read_bytes() == before  # the same failure needs no second row
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "empty.jpg")
    mended = into(vlm, tmp_path / "photos", out)
    assert (mended.ok, mended.skipped) == (1, first.ok)
    assert into(vlm, tmp_path / "photos", out).ok == 0


def test_changed_pictures_and_changed_parameters_are_due_again(vlm: VLM, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "p", 3), tmp_path / "o.jsonl"
    assert into(vlm, folder, out).ok == 3
    Image.new("RGB", (5, 5)).save(folder / "1.png")
    assert into(vlm, folder, out).ok == 1
    assert into(vlm, folder, out, parameters=Parameters("is this red", 6)).ok == 3
    assert into(vlm, folder, out, parameters=Parameters("what is this", 7)).ok == 3
    assert into(vlm, folder, out).skipped == 3


def test_the_parameters_hash_depends_on_all_that_decides_a_caption() -> None:
    base = params_hash("vlm", PARAMETERS)
    assert base == params_hash("vlm", replace(PARAMETERS))
    others = [("other", PARAMETERS), ("vlm", Parameters("x", 6)), ("vlm", Parameters("what is this", 7))]
    assert len({base, *(params_hash(*other) for other in others)}) == 4


def test_the_same_bytes_under_another_name_get_a_row_without_being_computed(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = pictures(tmp_path / "p", 2), tmp_path / "o.jsonl"
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    calls: list[str] = []
    plain = vlm.answer
    monkeypatch.setattr(vlm, "answer", lambda e, q, **o: (calls.append(q), plain(e, q, **o))[1])
    assert into(vlm, folder, out).ok == 3
    assert len(calls) == 2
    by_id = {row["id"]: row for row in rows(out)}
    assert by_id["copy.png"]["caption"] == by_id["0.png"]["caption"]
    assert by_id["copy.png"]["notes"] == ["same bytes as 0.png"]
    (folder / "moved.png").write_bytes((folder / "1.png").read_bytes())
    assert into(vlm, folder, out).ok == 1
    assert len(calls) == 2
    (folder / "again.png").write_bytes((folder / "0.png").read_bytes())
    assert into(vlm, folder, out).ok == 1
    assert into(vlm, folder, out).skipped == 5


def test_overwrite_computes_again(vlm: VLM, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "p", 2), tmp_path / "o.jsonl"
    into(vlm, folder, out)
    assert into(vlm, folder, out, overwrite=True).ok == 2


def test_prompts_may_name_the_picture(vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures(tmp_path / "cats", 2)
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes((folder / "0.png").read_bytes())
    (folder / "<image>.png").write_bytes((folder / "0.png").read_bytes())
    asked: list[str] = []
    plain = vlm.answer
    monkeypatch.setattr(vlm, "answer", lambda e, q, **o: (asked.append(q), plain(e, q, **o))[1])
    monkeypatch.chdir(folder)
    summary, records = run(vlm, Path(), parameters=Parameters("{parent}/{stem}", 3))
    assert asked[0] == "cats/0"
    assert asked[1] == "cats/1"
    # A name that cannot be asked about costs its own picture, not the run.
    assert summary.ok == 2
    assert {record.id for record in records if record.status == "error"} == {"caf\\xe9.png", "<image>.png"}


def test_a_prompt_that_cannot_be_asked_is_refused_before_the_first_picture(vlm: VLM, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 2)
    told = Told()
    for prompt, reason in {"see <image>": "stands for an image", "zq " * 5000: "rows of context"}.items():
        with pytest.raises(UsageError, match=reason):
            run(vlm, folder, parameters=Parameters(prompt, 6), progress=told)
    assert told.seen == []
    check_context(vlm, PARAMETERS)


def test_a_fault_of_ours_becomes_an_error_row_and_the_run_goes_on(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pictures(tmp_path / "p", 3)
    plain, calls = vlm.answer, iter(range(9))

    def answer(*args: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise ZeroDivisionError("on the\nsecond")
        return plain(*args, **options)

    monkeypatch.setattr(vlm, "answer", answer)
    summary, records = run(vlm, folder)
    assert [record.status for record in records] == ["ok", "error", "ok"]
    assert records[1].error == "internal error (ZeroDivisionError: on the second)"
    assert "Traceback" in caplog.text
    assert summary.ok == 2


def test_sidecars_are_written_and_decide_where_there_is_no_record(vlm: VLM, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 3)
    (folder / "1.txt").write_bytes(b"caf\xe9, by hand\n")
    (folder / "2.txt").write_bytes(b"")
    summary, records = run(vlm, folder, sidecar=".txt")
    assert (summary.ok, summary.skipped) == (2, 1)
    assert (folder / "0.txt").read_text(encoding="utf-8") == records[0].caption + "\n"
    assert (folder / "1.txt").read_bytes() == b"caf\xe9, by hand\n"
    assert (folder / "2.txt").read_text(encoding="utf-8") == records[1].caption + "\n"
    assert run(vlm, folder, sidecar=".txt")[0].skipped == 3
    assert run(vlm, folder, sidecar=".txt", overwrite=True)[0].ok == 3
    assert (folder / "1.txt").read_bytes() != b"caf\xe9, by hand\n"


def test_a_sidecar_by_hand_stays_and_one_of_ours_follows_the_record(vlm: VLM, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "p", 2), tmp_path / "o.jsonl"
    (folder / "1.txt").write_text("by hand")
    into(vlm, folder, out, sidecar=".txt")
    assert (folder / "1.txt").read_text() == "by hand"
    first, second = rows(out)
    assert first["notes"] == []
    assert second["notes"] == ["the sidecar that was there is kept"]
    (folder / "0.txt").unlink()
    assert into(vlm, folder, out, sidecar=".txt").skipped == 2
    assert (folder / "0.txt").read_text(encoding="utf-8") == first["caption"] + "\n"
    other = Parameters("what is this", 3)
    assert into(vlm, folder, out, sidecar=".txt", parameters=other).ok == 2
    latest = rows(out)[-2]
    assert latest["caption"] != first["caption"]
    assert (folder / "0.txt").read_text(encoding="utf-8") == latest["caption"] + "\n"
    assert (folder / "1.txt").read_text() == "by hand"


def test_sidecars_that_would_collide_are_refused(vlm: VLM, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 1)
    Image.new("RGB", (4, 4)).save(folder / "0.jpg")
    with pytest.raises(UsageError, match=r"0\.jpg and 0\.png would share the sidecar 0\.txt"):
        run(vlm, folder, sidecar=".txt")
    with pytest.raises(UsageError, match="written over the picture"):
        check_sidecars(find_sources([str(folder)]), ".png")
    assert not (folder / "0.txt").exists()


def test_a_sidecar_that_cannot_be_written_ends_the_run_with_its_name(vlm: VLM, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "p", 2), tmp_path / "o.jsonl"
    (folder / "0.txt").mkdir()
    with pytest.raises(TokcompError, match=r"0\.txt: cannot be written"):
        into(vlm, folder, out, sidecar=".txt")
    (folder / "0.txt").rmdir()
    summary = into(vlm, folder, out, sidecar=".txt")
    assert (summary.ok, summary.skipped) == (1, 1)
    assert (folder / "0.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_the_picture_finish_and_a_later_run_goes_on(vlm: VLM, tmp_path: Path, number: int) -> None:
    folder, out = pictures(tmp_path / "p", 4), tmp_path / "o.jsonl"
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    said: list[int] = []
    told = Told(lambda: os.kill(os.getpid(), number))
    summary = into(vlm, folder, out, progress=told, on_stop=lambda: said.append(1))
    assert (summary.interrupted, summary.ok, said) == (True, 1, [1])
    assert [row["id"] for row in rows(out)] == ["0.png"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    summary = into(vlm, folder, out)
    assert (summary.interrupted, summary.skipped, summary.ok) == (False, 1, 3)
    assert [row["id"] for row in rows(out)] == ["0.png", "1.png", "2.png", "3.png"]


def test_a_second_interrupt_stops_at_once(vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = pictures(tmp_path / "p", 3), tmp_path / "o.jsonl"

    def twice(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(vlm, "answer", twice)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        into(vlm, folder, out)
    assert signal.getsignal(signal.SIGINT) == before
    assert out.read_bytes() == b""


def test_an_ignored_signal_stays_ignored(vlm: VLM, tmp_path: Path) -> None:
    """As under nohup, or in the background of a shell script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        told = Told(lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run(vlm, pictures(tmp_path / "p", 2), progress=told)[0].ok == 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_runs_in_another_thread_too(vlm: VLM, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 2)
    answers: list[Summary] = []
    thread = threading.Thread(target=lambda: answers.append(run(vlm, folder)[0]))
    thread.start()
    thread.join()
    assert answers[0].ok == 2


def test_a_dry_run_counts_what_would_be_skipped(vlm: VLM, tmp_path: Path) -> None:
    mixed(tmp_path / "photos")
    out = tmp_path / "o.jsonl"
    sources = find_sources([str(tmp_path / "photos")])
    assert count_done(vlm, sources, PARAMETERS, Done.read(out)) == 0
    summary = into(vlm, tmp_path / "photos", out)
    assert count_done(vlm, sources, PARAMETERS, Done.read(out)) == summary.ok
    assert count_done(vlm, sources, PARAMETERS, Done.read(out), overwrite=True) == 0
    assert count_done(vlm, sources, Parameters("x", 6), Done.read(out)) == 0
    (tmp_path / "photos" / "good.txt").write_text("x")
    assert count_done(vlm, sources, PARAMETERS, None, ".txt") == 1


def test_the_summary_is_one_line_with_all_counts() -> None:
    summary = Summary(ok=2, skipped=1, failures=[("a", "b")], seconds=2.0, first_token_ms=[10.0, 30.0],
                      tokens_before=1152, tokens_after=128)  # fmt: skip
    assert str(summary) == (
        "2 captioned, 1 skipped, 1 failed, 1.00 images/s, median time to first token 20 ms, image tokens 1,152 → 128"
    )
