"""The benchmark: contenders in processes of their own, every sample kept, figures that follow from the samples."""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Pair

import edge_tokcomp.bench.run as run_module
from edge_tokcomp import tower_engine
from edge_tokcomp.bench.contenders import BASELINE, Ours, Setting
from edge_tokcomp.bench.pictures import picture
from edge_tokcomp.bench.process import Worker
from edge_tokcomp.bench.report import summary, table
from edge_tokcomp.bench.run import OURS, Plan, run
from edge_tokcomp.bench.worker import _answer
from edge_tokcomp.cli import main
from edge_tokcomp.errors import TokcompError
from edge_tokcomp.images import open_image
from edge_tokcomp.models import DEMO_LM, DEMO_MMPROJ
from edge_tokcomp.tower import Tower
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
    plan = Plan("uniform 9", ("none", "uniform 9"), ("uniform 9",), (64, 48), rounds=2, batches=1, images=3)
    *_, whole = run(setting_of(pair), plan)
    return whole


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
    behind = document["singles"]["uniform 9"][0]["prompt"] + 2
    assert (document["steps_rows_wanted"], document["steps_rows"]) == (behind, {"1": behind, "2": behind})
    assert (document["complete"], document["reason"]) == (True, None)
    assert set(document["peak_bytes"]) == {"none", "uniform 9", BASELINE, "uniform 9, 2 at once"}
    assert all(peak > 2**20 for peak in document["peak_bytes"].values())
    json.dumps(document)


def made_up() -> dict[str, Any]:
    """Samples from which figures can be told by hand."""

    def sample(first: float, whole: float, prefill: float = 0.0, rows: int = 0, kept: int = 0) -> dict[str, Any]:
        stages = {"encode": 100.0, "compress": 10.0, "prefill": prefill} if rows else {}
        return {"first": first, "whole": whole, "stages_ms": stages, "prompt": rows, "tokens": [400, kept]}

    return {
        "setting": {"tokens": 11, "threads": 2, "parallel": 4}, "plan": {"images": 8, "subject": "mosaic 64"},
        "singles": {
            "none": [sample(4.2, 5.2, 4000.0, 420, 400)] * 3, "mosaic 64": [sample(1.0, 2.0, 840.0, 84, 64)] * 3,
            BASELINE: [sample(4.0, 5.0), sample(5.0, 6.0), sample(9.0, 10.0)],
        },
        "batches": {"mosaic 64": [{"seconds": 8.0, "threads": "in turns"}, {"seconds": 4.0, "threads": "in turns"}]},
        "steps_s": {"1": 0.1, "4": 0.2}, "steps_rows": {"1": 89, "4": 89}, "steps_rows_wanted": 89,
        "peak_bytes": {"none": 3 << 20, "mosaic 64": 2 << 20, BASELINE: 4 << 20, "mosaic 64, 4 at once": 5 << 20},
    }  # fmt: skip


def test_figures_follow_from_the_samples() -> None:
    found = summary(made_up())
    assert found["ratios"] == {"ttft": 5.0, "images_per_second": pytest.approx((8 / 6) / (1 / 6))}
    own = found["arms"]["mosaic 64"]
    assert (own["ttft_ms"], own["decode_tokens_per_second"]) == (1000, 10)
    assert (own["at_once"], own["peak_bytes_batch"]) == (4, 5 << 20)
    assert found["arms"]["none"]["images_per_second"] == pytest.approx(1 / 5.2)
    assert own["sharing"] == {
        "images_per_second_alone": 0.5, "speed_up": pytest.approx(8 / 6 / 0.5),
        "bound": pytest.approx(2000 / (940 + 11 * 50)),
    }  # fmt: skip
    assert "sharing" not in found["arms"]["none"]
    ceilings = found["ceilings"]
    assert ceilings["prefill_rows_per_second"] == pytest.approx(105)
    assert ceilings["generated_tokens_per_second"] == pytest.approx(20)
    assert ceilings["ttft"] == pytest.approx(5000 / (100 + 84 / 0.105))
    assert ceilings["images_per_second"] == pytest.approx(6000 / (100 + 84 / 0.105 + 11 * 50))
    assert ceilings["ttft_if_encoding_stayed"] == pytest.approx(5000 / (5000 - 400 / 0.105))


def test_the_table_says_what_stands_beside_what() -> None:
    lines = table(summary(made_up())).splitlines()
    row = next(line for line in lines if line.startswith("| `mosaic 64`"))
    assert re.split(r" *\| *", row)[1:-1] == [
        "`mosaic 64`", "400 → 64", "100", "10", "840", "1000", "5.00", "10.0", "1.333", "8.00", "4", "2.67", "1.34",
        "5",
    ]  # fmt: skip
    assert any(line.startswith(f"| `{BASELINE}` | all |") for line in lines)
    assert "first token 5.00 times as fast" in "\n".join(lines)
    assert lines[-1].startswith(f"Amdahl: had encoding stayed {BASELINE}'s")


def test_without_the_baseline_there_are_no_ratios() -> None:
    document = made_up()
    del document["singles"][BASELINE]
    found = summary(document)
    assert "ratios" not in found
    assert table(found).splitlines()[-1].startswith("By sharing: images a second of 4 captions at once, against one")


def test_what_a_run_had_not_come_to_is_left_empty() -> None:
    document = made_up()
    document["peak_bytes"], document["batches"] = {"none": 3 << 20}, {"mosaic 64": []}
    lines = table(summary(json.loads(json.dumps(document)))).splitlines()
    rows = {cells[1]: cells[-5:-1] for cells in (re.split(r" *\| *", line) for line in lines[2:5])}
    assert rows == {"`none`": ["1", "", "", "3"], "`mosaic 64`": ["1", "", "", ""], f"`{BASELINE}`": ["1", "", "", ""]}
    assert not any(line.startswith("By sharing") for line in lines)


def test_rows_that_the_context_does_not_hold_are_said(pair: Pair, home: Path) -> None:
    with Worker(OURS, setting_of(pair)) as worker:
        assert worker.ask("steps", count=2, rows=300)["rows"] == 512 // 2 - 6
        assert worker.ask("steps", count=1, rows=300)["rows"] == 300
        with pytest.raises(TokcompError, match="100 captions at once do not fit 512 rows of context; ask for fewer"):
            worker.ask("steps", count=100, rows=300)
    short = made_up()
    short["steps_rows"]["4"] = 60
    assert "behind 60 rows (not 89, of which the context does not hold as many) where" in table(summary(short))


def test_a_contender_that_fails_says_so_in_one_line(pair: Pair, tmp_path: Path, home: Path) -> None:
    with pytest.raises(TokcompError, match=r"ours: .*nowhere.gguf: cannot be read"):
        Worker(OURS, setting_of(pair, lm=str(tmp_path / "nowhere.gguf")))
    with pytest.raises(TokcompError, match=f"{BASELINE}: "):
        Worker(BASELINE, setting_of(pair, lm=str(tmp_path / "nowhere.gguf")))
    with Worker(OURS, setting_of(pair)) as worker:
        worker._process.kill()
        with pytest.raises(TokcompError, match=r"ours: its process ended \(exit code -9\)"):
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


class Canned:
    """A worker that needs no model: its captions take a second, and the ``fatal`` request raises ``fault``."""

    asked: int
    fatal: tuple[int, BaseException] | None
    files: list[dict[str, Any] | None]
    out: Path

    def __init__(self, who: str, setting: Setting) -> None:
        self.stages = {} if who == BASELINE else {"encode": 1.0, "compress": 1.0, "prefill": 1.0}

    def ask(self, do: str, pictures: Sequence[bytes] = (), **more: Any) -> dict[str, Any]:
        Canned.files.append(json.loads(Canned.out.read_text()) if Canned.out.exists() else None)
        Canned.asked += 1
        if Canned.fatal and Canned.asked == Canned.fatal[0]:
            raise Canned.fatal[1]
        if do == "caption":
            return {"first": 0.5, "whole": 1.0, "stages_ms": self.stages, "prompt": 80, "tokens": [576, 64]}
        return {"batch": {"seconds": 1.0, "threads": "1"}, "steps": {"seconds": 0.1, "rows": more.get("rows")},
                "peak": {"bytes": 1 << 20}}[do]  # fmt: skip

    def __enter__(self) -> Canned:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A command of three rounds of two contenders and a batch after two: asked are the round that does not count (2),
    2 measures of steps, 2 rounds (4), a batch, a round (2), and two peaks."""
    monkeypatch.setattr(run_module, "Worker", Canned)
    Canned.asked, Canned.fatal, Canned.files, Canned.out = 0, None, [], tmp_path / "o.json"
    files = ["--lm", "a.gguf", "--mmproj", "b.gguf", "--out", str(Canned.out)]
    return ["bench", *files, "--without", "none", "pool", "--rounds", "3", "--batches", "1", "--images", "2"]


@pytest.mark.parametrize(
    ("fatal", "rounds", "batches", "peaks"),
    [(8, 1, 0, 0), (9, 2, 0, 0), (11, 2, 1, 0), (12, 3, 1, 0), (15, 3, 1, 1)],
)
@pytest.mark.parametrize(("fault", "code"), [(TokcompError("it broke"), 1), (KeyboardInterrupt(), 130)])
def test_a_run_that_stops_shows_what_it_measured(
    canned: list[str], fatal: int, rounds: int, batches: int, peaks: int, fault: BaseException, code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Canned.fatal = (fatal, fault)
    assert main(canned) == code
    printed = capsys.readouterr()
    assert printed.out.startswith("| contender |")
    found = json.loads(printed.out.splitlines()[-1])
    assert json.loads(Canned.out.read_text()) == found
    reason = str(fault) or "interrupted"
    assert (found["complete"], found["reason"]) == (False, reason)
    assert {arm: len(samples) for arm, samples in found["singles"].items()} == {"mosaic 64": rounds, BASELINE: rounds}
    assert (len(found["batches"]["mosaic 64"]), len(found["peak_bytes"])) == (batches, peaks)
    assert printed.err.splitlines()[-1] == f"edge-tokcomp: {reason}; whole rounds: {rounds} of 3"


@pytest.mark.parametrize(("fault", "code"), [(TokcompError("it broke"), 1), (KeyboardInterrupt(), 130)])
def test_a_run_without_a_whole_round_says_so_and_shows_nothing(
    canned: list[str], fault: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    Canned.fatal = (6, fault)
    assert main(canned) == code
    printed = capsys.readouterr()
    assert (printed.out, Canned.out.exists()) == ("", False)
    reason = str(fault) or "interrupted"
    assert printed.err.splitlines()[-1] == f"edge-tokcomp: {reason}; whole rounds: 0 of 3, so nothing is shown"


def test_the_file_is_written_anew_after_every_round(canned: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(canned) == 0
    seen = [None if file is None else len(file["singles"][BASELINE]) for file in Canned.files]
    assert seen == [None] * 6 + [1, 1] + [2] * 3 + [3] * 8
    assert all(not file["complete"] and file["reason"] == "the run has not ended" for file in Canned.files if file)
    assert json.loads(Canned.out.read_text()) == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(Canned.out.read_text())["complete"]


def test_a_file_that_cannot_be_written_is_refused_at_once(
    canned: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for bad in (tmp_path, tmp_path / "no" / "o.json", tmp_path / ("x" * 300) / "o.json"):
        assert main([*canned, "--out", str(bad)]) == 2
        assert f"--out {bad}: cannot be written; name a file in a folder that can be" in capsys.readouterr().err
    assert Canned.asked == 0


def test_a_file_that_cannot_be_written_any_more_costs_no_sample(
    canned: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("x" * 300)  # no system takes as long a name
    assert main([*canned, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if "cannot be written" in line] == [
        f"edge-tokcomp: --out {out}: cannot be written (File name too long); measuring goes on"
    ]
    assert json.loads(printed.out.splitlines()[-1])["complete"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_stops_its_workers_and_shows_its_rounds(
    pair: Pair, home: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [
            sys.executable, "-m", "edge_tokcomp", "bench", "--lm", str(pair.lm), "--mmproj", str(pair.mmproj),
            "--method", "uniform", "--keep", "9", "--rounds", "1000", "--batches", "0", "--tokens", "3", "--size",
            "60x40", "--precision", "fp32", "--threads", "1", "--parallel", "2", "--without", "none", "pool",
            "baseline",
        ], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert any("round 3 of 1000" in line for line in process.stderr)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [Path("/proc", child) for child in children.read_text().split()] if children.exists() else []
    assert not children.exists() or workers
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    found = json.loads(stdout.splitlines()[-1])
    done = len(found["singles"]["uniform 9"])
    assert 2 <= done < 1000
    assert stderr.splitlines()[-1] == f"edge-tokcomp: interrupted; whole rounds: {done} of 1000"
    assert not any(worker.exists() for worker in workers)


class Here:
    """A worker of ours in this process."""

    def __init__(self, who: str, setting: Setting) -> None:
        self.contender = Ours(setting)

    def ask(self, do: str, pictures: Sequence[bytes] = (), **more: Any) -> dict[str, Any]:
        encoded = [base64.b64encode(picture).decode() for picture in pictures]
        return json.loads(json.dumps(_answer(self.contender, {"do": do, "pictures": encoded, **more})))

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        self.contender.vlm.close()


def test_a_tower_is_opened_once_and_not_in_every_round(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    opened: list[str] = []

    class Counted(Tower):
        def __init__(self, directory: Path, **options: Any) -> None:
            opened.append(f"{directory.name} {options['graph']}")
            super().__init__(directory, **options)

    monkeypatch.setattr(tower_engine, "Tower", Counted)
    monkeypatch.setattr(run_module, "Worker", Here)
    plan = Plan(
        "luvc:first=0.0 64", ("none", "pool 64", "luvc:first=0.0 64", "mosaic 64"), ("luvc:first=0.0 64", "mosaic 64"),
        (96, 64), rounds=3, batches=2, images=2, baseline=False, apart=("mosaic 64",),
    )  # fmt: skip
    setting = setting_of(Pair(DEMO_LM, DEMO_MMPROJ), n_ctx=1024, tokens=2)
    rounds = run(setting, plan)
    next(rounds)
    assert len(opened) == 2  # the plain tower, by each worker
    for document in rounds:
        if len(document["singles"]["none"]) == 3:
            break
    rounds.close()
    further = Counter(opened[2:])
    assert set(further.values()) == {1}
    assert len(further) == 2  # one that merges for the subject, one that tells its attention for the other
