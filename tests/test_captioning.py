"""The batch job: every picture accounted for, nothing done twice, nothing of the user's overwritten."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Pair

from batch import PARAMETERS, Told, into, rows, run
from edge_tokcomp.captioning import Summary
from edge_tokcomp.errors import UsageError
from edge_tokcomp.language.prompt import chat_prompt
from edge_tokcomp.parameters import Parameters, check_context, hash_of_model, prompt_rows
from edge_tokcomp.records import STAGES
from edge_tokcomp.vlm import VLM, load
from picture_files import BAD, mixed, pictures


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
    assert record.root == str((tmp_path / "p").resolve())


def test_prompts_may_name_the_picture(vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures(tmp_path / "cats", 2)
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes((folder / "0.png").read_bytes())
    (folder / "<image>.png").write_bytes((folder / "0.png").read_bytes())
    asked: list[str] = []
    plain = vlm.asker.request
    monkeypatch.setattr(vlm.asker, "request", lambda e, q, *o: (asked.append(q), plain(e, q, *o))[1])
    monkeypatch.chdir(folder)
    summary, records = run(vlm, Path(), parameters=Parameters("{parent}/{stem}", 3))
    assert asked[0] == "cats/0"
    assert asked[1] == "cats/1"
    # A name that cannot be asked about costs its own picture, not the run.
    assert summary.ok == 2
    assert {record.id for record in records if record.status == "error"} == {"caf\\xe9.png", "<image>.png"}


@pytest.mark.parametrize("beside", ["", "{stem} ", "{parent}/{stem} "])
def test_a_prompt_that_cannot_be_asked_is_refused_before_the_first_picture(vlm: VLM, beside: str) -> None:
    for prompt, reason in {"see <image>": "stands for an image", "zq " * 5000: "rows of context"}.items():
        with pytest.raises(UsageError, match=reason):
            check_context(vlm, Parameters(beside + prompt, 6))
    assert check_context(vlm, Parameters(beside + "what is this", 6)) == ""


def test_a_caption_cut_short_by_the_context_says_so(pair: Pair, vlm: VLM, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "p", 1), tmp_path / "o.jsonl"
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    with load(pair.lm, pair.mmproj, threads=1, provider="cpu", n_ctx=256) as small:
        n_ctx, prompt = small.decoder.n_ctx, "what is this"
        while prompt_rows(small, Parameters(prompt)) < n_ctx - 4:
            prompt += " a"
        asked = prompt_rows(small, Parameters(prompt))
        warning = check_context(small, Parameters(prompt, 99))
        assert f"take {asked} rows of context, a caption up to 99, there are {n_ctx}" in warning
        assert "--ctx" in warning
        assert check_context(small, Parameters(prompt, n_ctx - asked)) == ""
        into(small, folder, out, parameters=Parameters(prompt, 99))
        assert hash_of_model(small) != hash_of_model(vlm)  # a larger context makes such captions due again
    for row in rows(out):
        assert row["finish_reason"] == "context"
        assert "cut short: the context was full; raise --ctx" in row["notes"]


def test_a_record_says_what_was_chosen_and_why(vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (record,) = run(vlm, pictures(tmp_path / "p", 1))
    written = chat_prompt(vlm.model, PARAMETERS.prompt, 1)
    assert record.choices == {
        "engine": "onnx", "provider": vlm.engine.reason, "precision": "fp32", "n_ctx": vlm.decoder.n_ctx, "threads": 1,
        "division": "tower 1, language model 1, in turns: as it was loaded", "parallel": 16,
        "prompt_form": written.form, "prompt_reason": written.reason,
    }  # fmt: skip
    plain = vlm.asker.request

    def raised(*arguments: Any) -> Any:
        request, facts = plain(*arguments)
        plan = replace(facts.plans[0], stats={"keep_asked": 1.0, "keep_raised": 3.0, "groups": 2.0})
        return request, replace(facts, plans=(plan,))

    monkeypatch.setattr(vlm.asker, "request", raised)
    _, (record,) = run(vlm, tmp_path / "p")
    assert (record.choices["keep_asked"], record.choices["keep_raised"]) == (1, 3)
    assert "groups" not in record.choices


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
@pytest.mark.parametrize("name", ["o.jsonl", "o.csv"])
def test_a_model_file_whose_name_is_no_utf8_is_named_in_the_record(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    shutil.copy(vlm.lm, model)
    monkeypatch.setattr(vlm, "lm", model)
    monkeypatch.setattr(vlm, "name", model.name)
    assert into(vlm, pictures(tmp_path / os.fsdecode(b"p\xe9"), 1), tmp_path / name).ok == 1
    said = (tmp_path / name).read_text(encoding="utf-8").replace("\\\\", "\\")
    assert "caf\\xe9.gguf" in said
    assert f"{tmp_path}/p\\xe9" in said


def test_a_fault_of_ours_becomes_an_error_row_and_the_run_goes_on(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pictures(tmp_path / "p", 3)
    plain, calls = vlm.asker.request, iter(range(9))

    def request(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise ZeroDivisionError("on the\nsecond")
        return plain(*arguments)

    monkeypatch.setattr(vlm.asker, "request", request)
    summary, records = run(vlm, folder)
    assert [record.status for record in records] == ["ok", "error", "ok"]
    assert records[1].error == "internal error (ZeroDivisionError: on the second)"
    assert "Traceback" in caplog.text
    assert summary.ok == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_what_is_generated_finish_and_a_later_run_goes_on(
    pair: Pair, tmp_path: Path, number: int
) -> None:
    with load(pair.lm, pair.mmproj, threads=1, parallel=1) as vlm:
        _interrupted_and_resumed(vlm, tmp_path, number, 1)
    with load(pair.lm, pair.mmproj, threads=1, parallel=2) as vlm:
        _interrupted_and_resumed(vlm, tmp_path / "two", number, 2)


def _interrupted_and_resumed(vlm: VLM, tmp_path: Path, number: int, finished: int) -> None:
    tmp_path.mkdir(exist_ok=True)
    folder, out = pictures(tmp_path / "p", 4), tmp_path / "o.jsonl"
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    said: list[int] = []
    told = Told(lambda: os.kill(os.getpid(), number))
    summary = into(vlm, folder, out, progress=told, on_stop=lambda: said.append(1))
    assert (summary.interrupted, summary.ok, said) == (True, finished, [1])
    assert [row["id"] for row in rows(out)] == [f"{number}.png" for number in range(finished)]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    summary = into(vlm, folder, out)
    assert (summary.interrupted, summary.skipped, summary.ok) == (False, finished, 4 - finished)
    assert [row["id"] for row in rows(out)] == ["0.png", "1.png", "2.png", "3.png"]


def test_a_second_interrupt_stops_at_once(vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = pictures(tmp_path / "p", 3), tmp_path / "o.jsonl"

    def twice(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(vlm.decoder, "decode", twice)
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


def test_the_summary_is_one_line_with_all_counts_and_the_first_failures() -> None:
    summary = Summary(ok=2, skipped=1, failures=[("a", "b")], seconds=2.0, first_token_ms=[10.0, 30.0],
                      tokens_before=1152, tokens_after=128)  # fmt: skip
    assert str(summary) == (
        "2 captioned, 1 skipped, 1 failed, 1.00 images/s, median time to first token 20 ms, image tokens 1,152 → 128"
    )
    assert summary.lines() == [str(summary), "  failed: a: b"]
    summary.failures *= 1005
    assert summary.lines() == [str(summary), *["  failed: a: b"] * 5, "  and 1,000 more"]


def test_the_rate_is_of_the_captions_that_were_made(vlm: VLM, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 2)
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    summary, _ = run(vlm, folder)
    summary.seconds = 1.0
    assert (summary.ok, summary.copied, len(summary.first_token_ms)) == (3, 1, 2)
    assert str(summary).startswith("3 captioned (1 copied), 0 skipped, 0 failed, 2.00 images/s, ")
