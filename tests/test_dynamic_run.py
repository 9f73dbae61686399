"""A shared budget at work: in requests, and in batches that are interrupted and taken up again."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from numpy.typing import NDArray
from PIL import Image

from batch import Told, into, rows, run
from edge_tokcomp.budget import dynamic_keep, dynamic_keeps
from edge_tokcomp.dynamic import calibration_path
from edge_tokcomp.errors import ImageError, TokcompError, UsageError
from edge_tokcomp.evaluation import Arm, score_arms
from edge_tokcomp.methods import get_method
from edge_tokcomp.parameters import Parameters, check_context, prompt_rows
from edge_tokcomp.vlm import VLM, load

KEEP = 12


def scene(seed: int) -> NDArray[np.uint8]:
    """Noise in a frame of grey, the wider the frame the less there is to see."""
    grey = np.full((48, 48, 3), 128, np.uint8)
    side = 6 + 7 * (seed % 7)
    grey[:side, :side] = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return grey


def folder_of(path: Path, seeds: range) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        Image.fromarray(scene(seed)).save(path / f"{number:02}.png")
    return path


def opened(pair: Pair, dynamic: Any, keep: Any = KEEP, **options: Any) -> VLM:
    return load(pair.lm, pair.mmproj, threads=1, provider="cpu", keep=keep, dynamic=dynamic, **options)


def scores_of(pair: Pair) -> list[float]:
    with opened(pair, None) as plain:
        return [plain.claim(scene(seed)).information for seed in range(7)]


@pytest.fixture(scope="module")
def scores(pair: Pair) -> list[float]:
    """Of scenes 0 to 6."""
    return scores_of(pair)


def keeps(scores: list[float], keep: int = KEEP) -> list[int]:
    return dynamic_keeps([keep] * len(scores), scores, [36] * len(scores))


def test_the_scenes_differ_in_what_there_is_to_see(scores: list[float]) -> None:
    assert len(set(scores)) == 7
    assert len(set(keeps(scores))) > 3


def test_several_pictures_of_one_request_share_its_budget_exactly(pair: Pair, scores: list[float]) -> None:
    scenes = [scene(seed) for seed in range(7)]
    for mode in ("batch", "running", 0.2):
        with opened(pair, mode) as vlm:
            encoded = vlm.encode_all(scenes)
            assert [len(each.plan) for each in encoded] == [each.keep for each in encoded] == keeps(scores)
            assert [each.share.information for each in encoded if each.share] == scores
            answer = vlm.answer(scenes[:3], "what is this", max_tokens=3)
            assert answer.tokens_after == 3 * KEEP
            assert [len(each.plan) for each in answer.images] == keeps(scores[:3])


def test_what_comes_encoded_stays_as_it_is(pair: Pair, scores: list[float]) -> None:
    with opened(pair, 0.3) as vlm:
        one = vlm.encode(scene(0))
        both = vlm.answer([scene(2), one, scene(5)], "what is this", max_tokens=3).images
        assert both[1] is one
        assert [both[0].keep, both[2].keep] == keeps([scores[2], scores[5]])


def test_the_order_of_a_batch_decides_nothing(pair: Pair, scores: list[float]) -> None:
    order = [3, 6, 0, 5, 1, 4, 2]
    with opened(pair, "batch") as vlm:
        shuffled = vlm.encode_all([scene(seed) for seed in order])
        assert [each.keep for each in shuffled] == [keeps(scores)[seed] for seed in order]


def test_a_picture_by_itself(pair: Pair, scores: list[float]) -> None:
    with opened(pair, 0.3) as vlm:
        for seed in (0, 3, 6):
            encoded = vlm.encode(scene(seed))
            assert len(encoded.plan) == dynamic_keep(KEEP, scores[seed], 0.3, 36)
            assert vlm.answer(encoded, "what is this", max_tokens=3).tokens_after == len(encoded.plan)
    with opened(pair, "running") as vlm:
        seen = [vlm.encode(scene(seed)) for seed in range(7)]
        for count, each in enumerate(seen, start=1):
            mean = round(sum(scores[:count]) / count, 6)
            assert len(each.plan) == dynamic_keep(KEEP, scores[count - 1], mean, 36)
    with opened(pair, "batch") as vlm:
        for ask in (vlm.encode, vlm.caption, lambda picture: vlm.caption(picture, stream=True)):
            with pytest.raises(UsageError, match="by itself has none to share"):
                ask(scene(0))
        assert len(vlm.encode_all([scene(0)])[0].plan) == KEEP


def test_a_further_question_neither_scores_nor_counts_again(
    pair: Pair, scores: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(pair, "running", method="cdpruner") as vlm:
        towers: list[int] = []
        plain = vlm.engine.tower.encode
        monkeypatch.setattr(vlm.engine.tower, "encode", lambda *a, **b: (towers.append(1), plain(*a, **b))[1])
        vlm.encode(scene(0), "what is this")
        one = vlm.encode(scene(6), "what is this")
        for question in ("is it red", "is it a cat"):
            again = vlm.answer(one, question, max_tokens=3).images[0]
            assert (again.share, again.keep) == (one.share, one.keep)
            assert again.question == question
        assert vlm.encode(scene(3)).share.mean == round((scores[0] + scores[6] + scores[3]) / 3, 6)  # type: ignore[union-attr]
        assert len(towers) == 3


def test_scoring_counts_as_compression_in_the_timings(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(pair, 0.3) as vlm:
        plain = vlm.claim
        monkeypatch.setattr(vlm, "claim", lambda seen: (time.sleep(0.05), plain(seen))[1])
        timings = vlm.encode(scene(0)).timings_ms
        assert timings["compress"] >= 50
        assert list(timings) == ["decode", "preprocess", "encode", "compress"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dynamic": "batch", "keep": None}, "keep is not given"),
        ({"dynamic": 0.3, "method": "none"}, "method none keeps every token"),
        ({"dynamic": "often"}, "unknown dynamic 'often'; one of batch, running, calibrated"),
        ({"dynamic": 0}, "no mean information score"),
    ],
)
def test_options_without_a_budget_to_share_are_refused_before_files_are_read(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        load("none.gguf", "none.gguf", **{"keep": KEEP, **options})


def test_a_calibration_is_stored_with_the_model_and_measured_against(pair: Pair, scores: list[float]) -> None:
    with opened(pair, None, keep=None) as vlm:
        path = calibration_path(vlm.engine.tower.directory)
        assert path.parent == Path(os.environ["EDGE_TOKCOMP_CACHE"])
        with pytest.raises(TokcompError, match="nothing is stored for this model; run: edge-tokcomp calibrate"):
            opened(pair, "calibrated")
        with pytest.raises(UsageError, match="no picture to calibrate on"):
            vlm.calibrate([])
        with pytest.raises(ImageError, match=r"no\.png"):
            vlm.calibrate([scene(0), "no.png"])
        assert not path.exists()
        mean = vlm.calibrate([scene(seed) for seed in range(7)])
        assert mean == pytest.approx(sum(scores) / 7, abs=1e-6)
    try:
        with opened(pair, "calibrated") as vlm:
            for seed in (0, 6):
                share = vlm.encode(scene(seed)).share
                assert share is not None
                assert (share.mean, share.by) == (mean, "calibrated")
                assert share.keep == dynamic_keep(KEEP, scores[seed], mean, 36)
        path.write_text("{}")
        with pytest.raises(TokcompError, match="not a calibration"):
            opened(pair, "calibrated")
    finally:
        path.unlink()


def test_scoring_ahead_of_a_batch_stands_in_the_records_too(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "p", range(2))
    with opened(pair, "batch") as vlm:
        plain = vlm.claim
        monkeypatch.setattr(vlm, "claim", lambda picture: (time.sleep(0.05), plain(picture))[1])
        _, records = run(vlm, folder)
    assert all(record.timings_ms["compress"] >= 50 for record in records)
    assert all(record.timings_ms["first_token"] >= record.timings_ms["compress"] for record in records)


def test_a_batch_sums_exactly_and_every_row_says_why(
    pair: Pair, tmp_path: Path, scores: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "p", range(7))
    (folder / "bad.png").write_text("text")
    (folder / "copy.png").write_bytes((folder / "03.png").read_bytes())
    with opened(pair, "batch") as vlm:
        told, claimed, plain = Told(), [], vlm.claim
        monkeypatch.setattr(vlm, "claim", lambda picture: (claimed.append(picture), plain(picture))[1])
        summary, records = run(vlm, folder, progress=told)
        assert len(claimed) == 7
        assert (summary.ok, summary.copied, len(summary.failures)) == (8, 1, 1)
        assert told.counts == list(range(1, 10))
        made = {record.id: record for record in records if record.computed}
        assert [made[f"{seed:02}.png"].tokens_after for seed in range(7)] == keeps(scores)
        assert sum(record.tokens_after for record in made.values()) == 7 * KEEP
        for seed in range(7):
            choices = made[f"{seed:02}.png"].choices
            assert choices["dynamic"] == "batch"
            assert choices["information"] == scores[seed]
            assert choices["information_mean"] == pytest.approx(sum(scores) / 7, abs=1e-6)
        copy = next(record for record in records if record.id == "copy.png")
        assert (copy.tokens_after, copy.choices) == (made["03.png"].tokens_after, {})
        assert records[-2].id == "bad.png"
        assert "not a picture" in records[-2].error


def test_pictures_that_are_done_take_no_part_in_a_batch(pair: Pair, tmp_path: Path, scores: list[float]) -> None:
    folder, out = folder_of(tmp_path / "p", range(4)), tmp_path / "o.jsonl"
    with opened(pair, "batch") as vlm:
        assert into(vlm, folder, out).ok == 4
        folder_of(folder, range(7))
        summary = into(vlm, folder, out)
        assert (summary.ok, summary.skipped) == (3, 4)
        assert [row["tokens_after"] for row in rows(out)] == keeps(scores[:4]) + keeps(scores[4:])
        before = out.read_bytes()
        assert into(vlm, folder, out).skipped == 7
        assert out.read_bytes() == before


def test_a_batch_may_be_interrupted_while_it_is_scored_and_while_it_is_captioned(pair: Pair, tmp_path: Path) -> None:
    folder, out = folder_of(tmp_path / "p", range(7)), tmp_path / "o.jsonl"

    class Stopping(Told):
        def scored(self, count: int) -> None:
            super().scored(count)
            if count == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    with opened(pair, "batch", parallel=1) as vlm:
        stopping = Stopping()
        summary = into(vlm, folder, out, progress=stopping)
        assert (summary.interrupted, summary.ok, stopping.counts) == (True, 0, [1, 2, 3])
        assert out.read_bytes() == b""
        summary = into(vlm, folder, out, progress=Told(lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert (summary.interrupted, summary.ok) == (True, 1)
        summary = into(vlm, folder, out)
        assert (summary.skipped, summary.ok) == (1, 6)
        assert sum(row["tokens_after"] for row in rows(out)[1:]) == 6 * KEEP


def test_a_picture_that_changes_while_others_are_scored_is_due_again(pair: Pair, tmp_path: Path) -> None:
    folder, out = folder_of(tmp_path / "p", range(3)), tmp_path / "o.jsonl"

    class Changing(Told):
        def scored(self, count: int) -> None:
            super().scored(count)
            if count == 3:
                Image.fromarray(scene(9)).save(folder / "02.png")

    told = Changing()
    with opened(pair, "batch") as vlm:
        summary = into(vlm, folder, out, progress=told)
        assert [name for name, _ in summary.failures] == ["02.png"]
        assert "changed, or could not be read" in summary.failures[0][1]
        assert into(vlm, folder, out).ok == 1


def test_a_fault_of_ours_in_scoring_costs_one_picture(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path / "p", range(3))
    with opened(pair, "batch") as vlm:
        plain, calls = vlm.claim, iter(range(9))

        def claim(picture: Any) -> Any:
            if next(calls) == 1:
                raise ZeroDivisionError("on the second")
            return plain(picture)

        monkeypatch.setattr(vlm, "claim", claim)
        summary, records = run(vlm, folder)
    assert [record.status for record in records] == ["ok", "error", "ok"]
    assert sum(record.tokens_after for record in records) == 2 * KEEP
    assert "ZeroDivisionError" in caplog.text
    assert summary.ok == 2


class OneAtATime(Told):
    """Interrupts after every picture that was computed."""

    def done(self, record: Any, skipped: bool) -> None:
        super().done(record, skipped)
        if record.computed and not skipped:
            os.kill(os.getpid(), signal.SIGTERM)


def by_id(out: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    if out.suffix == ".jsonl":
        return {row["id"]: (row["tokens_after"], row["choices"]) for row in rows(out)}
    with out.open(encoding="utf-8", newline="") as stream:
        return {row["id"]: (int(row["tokens_after"]), json.loads(row["choices"])) for row in csv.DictReader(stream)}


@pytest.mark.parametrize("name", ["o.jsonl", "o.csv"])
def test_a_stream_taken_up_again_goes_on_as_if_it_had_not_been_interrupted(
    pair: Pair, tmp_path: Path, name: str, scores: list[float]
) -> None:
    folder, out = folder_of(tmp_path / "p", range(7)), tmp_path / name
    (folder / "01copy.png").write_bytes((folder / "01.png").read_bytes())
    (folder / "bad.png").write_text("text")
    with opened(pair, "running", parallel=1) as vlm:
        _, whole = run(vlm, folder)
        again = run(vlm, folder)[1]
        assert [(r.id, r.tokens_after, r.choices) for r in whole] == [(r.id, r.tokens_after, r.choices) for r in again]
        for done in range(7):
            summary = into(vlm, folder, out, progress=OneAtATime())
            assert (summary.interrupted, summary.ok - summary.copied) == (True, 1), done
        into(vlm, folder, out)
    assert by_id(out) == {record.id: (record.tokens_after, record.choices) for record in whole}
    for count in range(1, 8):
        tokens, choices = by_id(out)[f"{count - 1:02}.png"]
        mean = round(sum(scores[:count]) / count, 6)
        assert choices["information_mean"] == pytest.approx(mean, abs=2e-6)
        assert tokens == dynamic_keep(KEEP, scores[count - 1], choices["information_mean"], 36)


def test_the_context_must_hold_the_mean_and_is_warned_of_for_the_largest_share(pair: Pair) -> None:
    parameters = Parameters("what is this", 6)
    with opened(pair, "running", keep=10) as vlm, opened(pair, None, keep=10) as plain:
        assert prompt_rows(vlm, parameters) == prompt_rows(plain, parameters)
        assert prompt_rows(vlm, parameters, most=True) == prompt_rows(plain, parameters) + 10
        asked, n_ctx = prompt_rows(plain, parameters), vlm.decoder.n_ctx
        longest = Parameters("what is this", n_ctx - asked - 5)
        assert check_context(plain, longest) == ""
        assert f"take up to {asked + 10} rows of context" in check_context(vlm, longest)
    with opened(pair, 0.3, keep=30) as vlm:
        assert prompt_rows(vlm, parameters, most=True) == prompt_rows(vlm, parameters) + 6


def test_scenes_share_a_budget_as_one_batch_and_arms_stay_apart() -> None:
    with load(threads=1, provider="cpu") as vlm:
        arms = [Arm(get_method("uniform"), 64), Arm(get_method("uniform"), 64, True), Arm(get_method("pool"), 9, True)]
        given: list[tuple[str, int]] = []
        plain = vlm.compress

        def compress(seen: Any, method: Any, keep: Any, *more: Any) -> Any:
            given.append((str(method), keep))
            return plain(seen, method, keep, *more)

        vlm.compress = compress  # type: ignore[method-assign]
        tokens = [scored.tokens for scored in score_arms(vlm, arms, scenes=3, seed=5)]
        assert tokens == [64, 64, 9]
        uniform = [keep for name, keep in given if name == "uniform"]
        assert uniform[::2] == [64] * 3
        assert len(set(uniform[1::2])) > 1
        assert sum(uniform[1::2]) == 3 * 64
        assert sum(keep for name, keep in given if name == "pool") == 3 * 9
