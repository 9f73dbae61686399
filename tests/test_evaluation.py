from __future__ import annotations

import numpy as np

from edge_tokcomp.evaluation import paired, report, summarise


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
        {"method": "pool", "tokens": 64.0, "scenes": 10, "seconds": 1.0, "wrong_image": False, "tasks": {"digit": task}}
    )
    assert "pool, 64 image tokens" in text
    assert "digit" in text
    assert "-10.0 [-20.0,  +0.0]" in text
