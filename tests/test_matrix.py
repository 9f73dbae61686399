"""The matrix of methods and budgets: its numbers on the bundled model, its table, verdicts and figure."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from edge_tokcomp import matrix
from edge_tokcomp.cli import main
from edge_tokcomp.evaluation import Arm, evaluate, score_arms
from edge_tokcomp.methods import get_method
from edge_tokcomp.vlm import load


def arm(method: str, keep: int | float, mean: float, low: float, high: float) -> dict[str, Any]:
    tokens = float(keep) if keep != 1.0 else 576.0
    row: dict[str, Any] = {"method": method, "keep": keep, "tokens": tokens, "layer_tokens": tokens, "layer_steps": ""}
    row["tasks"] = {"digit": {"score": mean, "low": 0, "high": 1, "n": 9}}
    for name, value in (("mean", mean), ("difference", mean - 0.9), ("retention", mean / 0.9)):
        row |= {name: value, f"{name}_low": value - 0.01, f"{name}_high": value + 0.01}
    if method == "none":
        return row
    best = {"method": "good", "low": mean - 0.9, "high": mean - 0.84}
    return row | {"baseline": {"method": "uniform", "low": low, "high": high}, "best": best}


def document() -> dict[str, Any]:
    rows = [arm("none", 1.0, 0.9, 0, 0), arm("uniform", 64, 0.8, 0, 0), arm("random", 64, 0.7, -0.12, -0.08)]
    rows += [arm("good", 64, 0.85, 0.02, 0.08), arm("same", 64, 0.8, -0.02, 0.02), arm("bad", 64, 0.6, -0.3, -0.1)]
    rows.append(arm("near", 64, 0.845, 0.01, 0.08))
    about = {"model": "m", "precision": "fp32", "scenes": 9, "tuning": False, "seed": 0, "seconds": 1.0, "version": "0"}
    return about | {"arms": rows}


def test_verdicts_name_what_lies_beyond_the_best_baselines_interval() -> None:
    said = matrix.verdicts(document())
    assert said == (
        "- **64** tokens: best `good` 85.0, not told apart from it: `near`. Best baseline `uniform` 80.0. "
        "Above it: `good`, `near`. Below it: `bad`."
    )


def test_without_baselines_the_best_is_still_named() -> None:
    rows = [{name: value for name, value in row.items() if name != "baseline"} for row in document()["arms"][3:]]
    said = matrix.verdicts(document() | {"arms": rows})
    assert said == "- **64** tokens: best `good` 85.0, not told apart from it: `near`."


def test_the_table_has_a_row_an_arm_in_per_cent() -> None:
    lines = matrix.table(document()).splitlines()
    assert lines[0] == "| method | tokens | digit | mean | retention | against `none` |"
    assert lines[2] == "| `none` | 576 | 90.0 | 90.0 |  |  |"
    assert lines[5] == "| `good` | 64 | 85.0 | 85.0 | 94.4 | -5.0 [-6.0, -4.0] |"
    assert len(lines) == 2 + 7


def test_the_report_is_a_page_a_figure_and_the_numbers(tmp_path: Path) -> None:
    page, figure, numbers = matrix.write_report(document(), "COMMAND", tmp_path / "new")
    assert json.loads(numbers.read_text()) == document()
    assert "`COMMAND`" in page.read_text()
    assert "(matrix.png)" in page.read_text()
    picture = np.asarray(Image.open(figure).convert("RGB"))
    assert picture.shape[1] > 900
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def drawn(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The canvas of the figure, not written."""
    canvases: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda canvas, *_, **__: canvases.append(canvas))
    matrix.figure(given, Path("unused.png"))
    return canvases[0]


def test_the_figure_draws_baselines_in_every_panel_each_in_a_style_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    styles = set()
    plot = Axes.plot

    def watched(axis: Axes, *data: Any, **how: Any) -> Any:
        if "label" in how:
            styles.add((how["label"], how["linestyle"]))
        return plot(axis, *data, **how)

    monkeypatch.setattr(Axes, "plot", watched)
    rows = [*document()["arms"], arm("pool", 64, 0.75, 0, 0), arm("resolution", 64, 0.5, 0, 0)]
    canvas = drawn(document() | {"arms": rows}, monkeypatch)
    panels = [axis for axis in canvas.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["good", "same", "bad", "near"]
    for axis in panels:
        names = {line.get_label() for line in axis.lines if not line.get_label().startswith("_")}
        assert names == {"random", "uniform", "pool", "resolution"}
    assert len(styles) == len({style for _, style in styles}) == 4
    assert len(panels[0].get_legend().get_texts()) == 4


def test_without_baselines_the_figure_has_no_legend_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row for row in document()["arms"] if row["method"] not in ("uniform", "random")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas = drawn(document() | {"arms": rows}, monkeypatch)
    assert [axis.get_legend() for axis in canvas.axes] == [None] * len(canvas.axes)
    assert not caplog.records


def test_lower_resolution_is_a_baseline_in_the_verdicts() -> None:
    rows = [*document()["arms"], arm("resolution", 64, 0.5, -0.4, -0.2)]
    assert matrix.verdicts(document() | {"arms": rows}) == matrix.verdicts(document())


def test_the_mean_of_tasks_is_resampled_scene_by_scene() -> None:
    rng = np.random.default_rng(0)
    scores = {"a": (rng.random(40) < 0.5).astype(float), "b": np.where(rng.random(40) < 0.5, np.nan, rng.random(40))}
    draws = rng.integers(40, size=(30, 40))
    found = matrix._task_mean(scores, draws)
    slow = [np.mean([np.nanmean(v) for v in scores.values()])]
    slow += [np.mean([np.nanmean(v[draw]) for v in scores.values()]) for draw in draws]
    np.testing.assert_allclose(found, slow)


@pytest.mark.slow
def test_every_arm_of_a_run_equals_that_arm_scored_alone() -> None:
    with load(threads=1) as vlm:
        found = matrix.run_matrix(vlm, ["uniform", "cdpruner", "tome"], [64], scenes=4, seed=3)
        for row in found["arms"][1:]:
            ((alone, *tokens),) = score_arms(vlm, [Arm(get_method(row["method"]), row["keep"])], scenes=4, seed=3)
            assert tokens == [row["tokens"], row["layer_tokens"]] == [64.0, 64.0]
            for task, values in alone.items():
                if not np.isnan(values).all():
                    assert row["tasks"][task]["score"] == pytest.approx(np.nanmean(values), abs=1e-4)
    for row in found["arms"][1:]:
        other = next(r for r in found["arms"] if r["method"] == row["best"]["method"])
        assert other["mean"] == max(r["mean"] for r in found["arms"][1:])
        assert row["best"]["low"] <= row["mean"] - other["mean"] + 1e-4
        assert row["best"]["high"] >= row["mean"] - other["mean"] - 1e-4
        assert row["baseline"]["method"] == "uniform"
    with load(threads=1, method="uniform", keep=64) as vlm:
        tasks = evaluate(vlm, scenes=4, seed=3)["tasks"]
    assert {task: found["arms"][1]["tasks"][task] for task in tasks} == {
        task: {name: row[name] for name in ("score", "low", "high", "n")} for task, row in tasks.items()
    }


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--matrix", "x", "--keep", "64"], "--matrix DIR takes --methods, --keeps and --steps"),
        (["--matrix", "x", "--json"], "--matrix DIR takes --methods, --keeps and --steps"),
        (["--matrix", "x", "--keeps", "0"], "--keeps 0 leaves no token"),
        (["--matrix", "x", "--methods", "nothing"], "unknown method 'nothing'"),
        (["--methods", "pool"], "belong to --matrix"),
    ],
)
def test_options_that_do_not_go_together_are_refused(more: list[str], says: str, capsys: Any) -> None:
    assert main(["eval", *more]) == 2
    assert says in capsys.readouterr().err
