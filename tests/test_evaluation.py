from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_tokcomp.cli import main
from edge_tokcomp.evaluation import ASK_SEED, EVAL_SEED, evaluate, paired, report, summarise
from edge_tokcomp.export.demo import scenes
from edge_tokcomp.export.demo.questions import ask_all
from edge_tokcomp.export.demo.scenes import draw_scene
from edge_tokcomp.methods import get_method
from edge_tokcomp.variant import PLAIN


class Scripted:
    """Answers by the book from the plain picture, and always "yes" from a compressed one."""

    def __init__(self, method: str, keep: int | float, *, talkative: bool = False) -> None:
        self.method, self.keep, self.talkative = get_method(method), keep, talkative
        self.name, self.engine = "scripted", SimpleNamespace(precision="fp32")
        self.shown, self.sharing, self.layer_steps = -1, None, ()

    def set_layer_steps(self, steps: tuple[()]) -> None:
        assert steps == ()

    def see(self, image: np.ndarray) -> Any:
        self.shown += 1
        return SimpleNamespace(index=self.shown, variant=PLAIN)

    def compress(self, seen: Any, method: Any, keep: Any) -> Any:
        rows = 576 if not method.compresses else keep
        return SimpleNamespace(plan=range(rows), index=seen.index, plain=not method.compresses, variant=PLAIN)

    def answer(self, encoded: Any, question: str, max_tokens: int) -> Any:
        if not encoded.plain:
            return SimpleNamespace(text="yes", layer_tokens=64.0)
        scene = draw_scene((EVAL_SEED, 0, encoded.index), "test")
        asked = ask_all(scene, np.random.default_rng((ASK_SEED, 0, encoded.index)), vary=False)
        right = next(q for q in asked if q.text == question)
        said = right.answer if right.task == "caption" else f" {right.answer.upper()}."
        return SimpleNamespace(text=f"well, {right.answer}" if self.talkative else said, layer_tokens=576.0)


def test_a_model_that_is_always_right_scores_one_and_its_compressed_self_what_it_says() -> None:
    result = evaluate(Scripted("uniform", 64), scenes=60)
    assert (result["tokens"], result["layer_tokens"], result["layer_steps"]) == (64, 64, "")
    for task, row in result["tasks"].items():
        assert row["none"] == 1, task
        assert row["difference"] == pytest.approx(row["score"] - 1, abs=1e-4)
    assert 0.3 < result["tasks"]["existence"]["score"] < 0.7
    assert all(result["tasks"][task]["score"] == 0 for task in ("digit", "relation", "counting", "caption", "place"))
    alone = evaluate(Scripted("none", 1.0), scenes=20)
    assert {row["score"] for row in alone["tasks"].values()} == {1}
    assert "none" not in alone["tasks"]["digit"]


def test_the_answer_alone_counts_not_a_sentence_that_holds_it() -> None:
    tasks = evaluate(Scripted("none", 1.0, talkative=True), scenes=20)["tasks"]
    assert {tasks[task]["score"] for task in ("existence", "digit", "counting", "place")} == {0}
    assert tasks["caption"]["score"] == tasks["placed caption"]["score"] == 1


def test_answers_do_not_follow_from_the_brightness_of_the_scene() -> None:
    bright, yes = [], []
    for index in range(300):
        scene = draw_scene((EVAL_SEED, 0, index), "test")
        questions = ask_all(scene, np.random.default_rng((ASK_SEED, 0, index)), vary=False)
        bright.append(scene.image.mean())
        yes.append(next(q.answer for q in questions if q.task == "existence") == "yes")
    assert abs(np.corrcoef(bright, yes)[0, 1]) < 0.15


def test_tuning_scenes_are_others_than_test_scenes_with_digits_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, str]] = []
    plain = scenes.draw_scene

    def draw(seed: Any, split: Any) -> scenes.Scene:
        drawn.append((seed, split))
        return plain(seed, split)

    monkeypatch.setattr(scenes, "draw_scene", draw)
    monkeypatch.setattr(Scripted, "answer", lambda *_args, **_options: SimpleNamespace(text="yes", layer_tokens=1))
    found = evaluate(Scripted("none", 1.0), scenes=3, tuning=True)
    assert found["tuning"] is True
    assert {split for seed, split in drawn if seed[0] != EVAL_SEED} == {"validation"}
    assert {seed for seed, split in drawn if split == "validation"} == {(7000, 0, index) for index in range(3)}
    drawn.clear()
    evaluate(Scripted("none", 1.0), scenes=3)
    assert {split for _, split in drawn} == {"test"}


@pytest.mark.slow
def test_eval_prints_one_object_with_every_task_and_its_difference_to_none(capsys: Any) -> None:
    assert main(["eval", "--scenes", "6", "--keep", "64", "--method", "uniform", "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "uniform"
    assert found["tokens"] == 64
    assert {"existence", "counting", "caption", "placed caption"} <= set(found["tasks"])
    for row in found["tasks"].values():
        assert {"score", "low", "high", "n", "none", "difference"} <= set(row)


def test_all_right_and_all_wrong_have_wilsons_interval() -> None:
    row = summarise(np.ones(20))
    assert (row["low"], row["high"]) == (pytest.approx(0.8389, abs=1e-4), 1)
    row = summarise(np.zeros(20))
    assert (row["low"], row["high"]) == (0, pytest.approx(0.1611, abs=1e-4))


def test_a_score_is_the_mean_over_scenes_that_were_asked() -> None:
    row = summarise(np.array([1.0, 0.0, np.nan, 1.0, 1.0]))
    assert row["score"] == 0.75
    assert row["n"] == 4
    assert row["low"] <= 0.75 <= row["high"]


def test_the_interval_is_about_two_standard_errors_to_each_side() -> None:
    values = (np.random.default_rng(0).random(400) < 0.8).astype(float)
    row = summarise(values)
    error = values.std() / 20
    assert abs((row["high"] - row["low"]) / (2 * 1.96 * error) - 1) < 0.15


def test_a_task_that_was_never_asked_has_no_score() -> None:
    assert summarise(np.array([np.nan]))["n"] == 0
    assert np.isnan(summarise(np.array([np.nan]))["score"])


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    rng = np.random.default_rng(1)
    plain = (rng.random(500) < 0.5).astype(float)
    scores = plain.copy()
    scores[:10] = 0
    row = paired(scores, plain)
    lost = plain[:10].sum() / 500
    assert row["difference"] == round(-lost, 4)
    assert row["difference_low"] >= -0.03
    assert row["difference_high"] <= 0
    assert row["none"] == round(float(plain.mean()), 4)


def test_the_report_shows_every_task_with_its_interval() -> None:
    task = {"score": 0.5, "low": 0.4, "high": 0.6, "n": 10, "none": 0.6, "difference": -0.1, "difference_low": -0.2,
            "difference_high": 0.0}  # fmt: skip
    text = report(
        {"method": "pool", "tokens": 64.0, "scenes": 10, "seconds": 1.0, "wrong_image": False, "dynamic": False,
         "layer_steps": "", "tasks": {"digit": task}}
    )  # fmt: skip
    assert "pool, 64 image tokens" in text
    assert "digit" in text
    assert "-10.0 [-20.0,  +0.0]" in text
