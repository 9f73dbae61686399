"""The benchmark: contenders in processes of their own, every sample kept, figures that follow from the samples."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Pair

from edge_tokcomp.bench.contenders import BASELINE, Setting
from edge_tokcomp.bench.pictures import picture
from edge_tokcomp.bench.process import Worker
from edge_tokcomp.bench.report import summary, table
from edge_tokcomp.bench.run import OURS, Plan, run
from edge_tokcomp.cli import main
from edge_tokcomp.errors import TokcompError
from edge_tokcomp.images import open_image
from tiny_models import write_tiny_llama

TEMPLATE = (
    "{% for message in messages %}USER: {% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}{% endfor %} ASSISTANT:"
)
"""What llama-cpp-python's handler needs the file to have."""


@pytest.fixture(scope="module")
def pair(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The session's, with a template."""
    lm = write_tiny_llama(tmp_path_factory.mktemp("bench") / "lm.gguf", chat_template=TEMPLATE)
    return Pair(lm.path, pair.mmproj)


def setting_of(pair: Pair, **changes: Any) -> Setting:
    values = {
        "lm": str(pair.lm), "mmproj": str(pair.mmproj), "prompt": "what is this", "tokens": 4, "threads": 1,
        "n_ctx": 512, "precision": "fp32", "parallel": 2,
    }  # fmt: skip
    return Setting(**(values | changes))


@pytest.fixture(scope="module")
def document(pair: Pair, home: Path) -> dict[str, Any]:
    """A whole run on a tiny model."""
    plan = Plan(("none", "uniform 9"), ("uniform 9",), (64, 48), rounds=2, batches=1, images=3)
    return run(setting_of(pair), plan)


def test_every_contender_is_measured_in_every_round(document: dict[str, Any]) -> None:
    assert {arm: len(samples) for arm, samples in document["singles"].items()} == {
        "none": 2, "uniform 9": 2, BASELINE: 2,
    }  # fmt: skip
    for samples in document["singles"].values():
        assert all(0 < sample["first"] < sample["whole"] for sample in samples)
    assert document["singles"]["uniform 9"][0]["tokens"] == [36, 9]
    assert document["singles"]["none"][0]["prompt"] - document["singles"]["uniform 9"][0]["prompt"] == 27
    (batch,) = document["batches"]["uniform 9"]
    assert batch["seconds"] > 0
    assert batch["threads"].startswith("tower 1, language model 1")
    assert set(document["steps_s"]) == {"1", "2"}
    assert set(document["peak_bytes"]) == {"none", "uniform 9", BASELINE, "uniform 9, 2 at once"}
    assert all(peak > 2**20 for peak in document["peak_bytes"].values())
    json.dumps(document)


def made_up() -> dict[str, Any]:
    """Samples from which figures can be told by hand."""

    def sample(first: float, whole: float, prefill: float = 0.0, rows: int = 0, kept: int = 0) -> dict[str, Any]:
        stages = {"encode": 100.0, "compress": 10.0, "prefill": prefill} if rows else {}
        return {"first": first, "whole": whole, "stages_ms": stages, "prompt": rows, "tokens": [400, kept]}

    return {
        "setting": {"tokens": 11, "threads": 2, "parallel": 4}, "plan": {"images": 8},
        "singles": {
            "none": [sample(4.2, 5.2, 4000.0, 420, 400)] * 3, "mosaic 64": [sample(1.0, 2.0, 840.0, 84, 64)] * 3,
            BASELINE: [sample(4.0, 5.0), sample(5.0, 6.0), sample(9.0, 10.0)],
        },
        "batches": {"mosaic 64": [{"seconds": 8.0, "threads": "in turns"}, {"seconds": 4.0, "threads": "in turns"}]},
        "steps_s": {"1": 0.1, "4": 0.2},
        "peak_bytes": {"none": 3 << 20, "mosaic 64": 2 << 20, BASELINE: 4 << 20, "mosaic 64, 4 at once": 5 << 20},
    }  # fmt: skip


def test_figures_follow_from_the_samples() -> None:
    found = summary(made_up(), "mosaic 64")
    assert found["ratios"] == {"ttft": 5.0, "images_per_second": pytest.approx((8 / 6) / (1 / 6))}
    own = found["arms"]["mosaic 64"]
    assert (own["ttft_ms"], own["decode_tokens_per_second"]) == (1000, 10)
    assert (own["at_once"], own["peak_bytes_batch"]) == (4, 5 << 20)
    assert found["arms"]["none"]["images_per_second"] == pytest.approx(1 / 5.2)
    ceilings = found["ceilings"]
    assert ceilings["prefill_rows_per_second"] == pytest.approx(105)
    assert ceilings["generated_tokens_per_second"] == pytest.approx(20)
    assert ceilings["ttft"] == pytest.approx(5000 / (100 + 84 / 0.105))
    assert ceilings["images_per_second"] == pytest.approx(6000 / (100 + 84 / 0.105 + 11 * 50))
    assert ceilings["ttft_if_encoding_stayed"] == pytest.approx(5000 / (5000 - 400 / 0.105))


def test_the_table_says_what_stands_beside_what() -> None:
    lines = table(summary(made_up(), "mosaic 64")).splitlines()
    row = next(line for line in lines if line.startswith("| `mosaic 64`"))
    assert re.split(r" *\| *", row)[1:-1] == [
        "`mosaic 64`", "400 → 64", "100", "10", "840", "1000", "5.00", "10.0", "1.333", "8.00", "4", "5"
    ]  # fmt: skip
    assert any(line.startswith(f"| `{BASELINE}` | all |") for line in lines)
    assert "first token 5.00 times as fast" in "\n".join(lines)
    assert lines[-1].startswith(f"Amdahl: had encoding stayed {BASELINE}'s")


def test_without_the_baseline_there_are_no_ratios() -> None:
    document = made_up()
    del document["singles"][BASELINE]
    found = summary(document, "mosaic 64")
    assert "ratios" not in found
    assert table(found).count("\n") == 3


def test_a_contender_that_fails_says_so_in_one_line(pair: Pair, tmp_path: Path, home: Path) -> None:
    with pytest.raises(TokcompError, match=r"edge-tokcomp: .*nowhere.gguf: cannot be read"):
        Worker(OURS, setting_of(pair, lm=str(tmp_path / "nowhere.gguf")))
    with pytest.raises(TokcompError, match=f"{BASELINE}: "):
        Worker(BASELINE, setting_of(pair, lm=str(tmp_path / "nowhere.gguf")))
    with Worker(OURS, setting_of(pair)) as worker:
        worker._process.kill()
        with pytest.raises(TokcompError, match=r"edge-tokcomp: its process ended \(exit code -9\)"):
            worker.ask("peak")


def test_pictures_are_all_different_and_the_same_every_time() -> None:
    made = [picture(number, 70, 50) for number in range(4)]
    assert len(set(made)) == 4
    assert made[2] == picture(2, 70, 50)
    assert (open_image(made[0]).width, open_image(made[0]).height) == (70, 50)


def test_the_command_prints_a_table_and_ends_with_the_document(
    pair: Pair, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.json"
    code = main([
        "bench", "--lm", str(pair.lm), "--mmproj", str(pair.mmproj), "--method", "uniform", "random", "--keep", "9",
        "--rounds", "1", "--batches", "1", "--images", "2", "--parallel", "2", "--tokens", "3", "--size", "60x40",
        "--precision", "fp32", "--threads", "1", "--without", "none", "--out", str(out),
    ])  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0
    assert printed.out.startswith("| contender |")
    found = json.loads(printed.out.splitlines()[-1])
    assert json.loads(out.read_text()) == found
    assert set(found["arms"]) == {"pool 9", "uniform 9", "random 9", BASELINE}
    assert found["subject"] == "uniform 9"
    assert set(found["ratios"]) == {"ttft", "images_per_second"}
    assert "round 1 of 1" in printed.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--shape", "gpt-5"], "unknown shape 'gpt-5'"),
        (["--size", "big"], "--size big: write WIDTHxHEIGHT"),
        (["--tokens", "1"], "--tokens 1 has no rate"),
        (["--method", "mosaic", "none"], "--method none keeps every token"),
        (["--batches", "11"], "--batches 11 do not fit"),
        (["--lm", "a.gguf"], "--lm and --mmproj come together"),
        (["--rounds", "0"], "--rounds 0 is not a positive number"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert reason in capsys.readouterr().err
