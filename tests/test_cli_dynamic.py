"""The command with `--dynamic`, and `calibrate`."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Pair
from test_dynamic_run import KEEP, folder_of, keeps, scores_of

from batch import rows
from edge_tokcomp.budget import dynamic_keep
from edge_tokcomp.cli import main

FEW = ["--max-tokens", "4"]

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def scores(pair: Pair) -> list[float]:
    """Of scenes 0 to 6."""
    return scores_of(pair)


def test_caption_shares_the_budget_of_the_run(
    pair: Pair, tmp_path: Path, capsys: Captured, scores: list[float]
) -> None:
    folder, out = folder_of(tmp_path / "p", range(7)), tmp_path / "o.jsonl"
    command = ["caption", str(folder), *pair.options, *FEW, "--out", str(out), "--keep", str(KEEP), "--dynamic"]
    assert main([*command, "batch", "--dry-run"]) == 0
    assert "36 → 12 (33.3 %) a picture on average, 6 to 24 by what there is to see (dynamic batch)" in (
        capsys.readouterr().out
    )
    assert not out.exists()
    assert main([*command, "batch"]) == 0
    said = capsys.readouterr().err
    assert "every picture is scored first, then captioned; the tower runs twice" in said
    assert f"image tokens {7 * 36} → {7 * KEEP}" in said
    assert "image tokens 36 →" not in said
    assert [row["tokens_after"] for row in rows(out)] == keeps(scores)
    assert {row["keep"] for row in rows(out)} == {KEEP}
    assert main([*command, "running"]) == 0
    assert len(rows(out)) == 14
    assert main([*command, "batch"]) == 0
    assert "0 captioned, 7 skipped" in capsys.readouterr().err
    hashes = {row["params_hash"] for row in rows(out)}
    assert main(command[:-1]) == 0
    assert len(hashes) == 2
    assert len({row["params_hash"] for row in rows(out)}) == 3


def test_calibrate_then_ask_inspect_and_caption(
    pair: Pair, tmp_path: Path, capsys: Captured, scores: list[float]
) -> None:
    folder = folder_of(tmp_path / "p", range(7))
    picture, out = str(folder / "06.png"), tmp_path / "o.jsonl"
    shared = [*pair.options, "--keep", str(KEEP), "--dynamic"]
    asked = {
        "ask": ["ask", picture, "what is this", *FEW, *shared],
        "inspect": ["inspect", picture, "--out", str(tmp_path / "kept.png"), *shared],
        "caption": ["caption", str(folder), *FEW, "--out", str(out), *shared],
    }
    for command in asked.values():
        assert main([*command, "calibrated"]) == 2
        streams = capsys.readouterr()
        assert streams.err.count("\n") == 1
        assert "run: edge-tokcomp calibrate PICTURES" in streams.err
    for mode in ("batch", "running"):
        for verb in ("ask", "inspect"):
            assert main([*asked[verb], mode]) == 2
            assert f"--dynamic {mode}: one picture has no others" in capsys.readouterr().err
    assert main(["calibrate", str(folder), *pair.options]) == 0
    streams = capsys.readouterr()
    assert streams.out == ""
    mean = sum(scores) / 7
    last = streams.err.strip().splitlines()[-1]
    path = last.partition(": ")[0]
    assert f"mean information {mean:.3f} of 7 pictures ({min(scores):.3f} to {max(scores):.3f})" in last
    try:
        keep = dynamic_keep(KEEP, scores[6], round(mean, 6), 36)
        told = f"36 → {keep} ({100 * keep / 36:.1f} %), method mosaic, information {scores[6]:.3f}, mean {mean:.3f}"
        for verb in ("ask", "inspect"):
            assert main([*asked[verb], "calibrated"]) == 0
            assert told in capsys.readouterr().err
        assert main([*asked["caption"], "calibrated", "--dry-run"]) == 0
        assert f"(dynamic calibrated, mean information {mean:.3f})" in capsys.readouterr().out
        assert main([*asked["caption"], "calibrated"]) == 0
        assert rows(out)[6]["tokens_after"] == keep
        assert rows(out)[6]["choices"]["dynamic"] == "calibrated"
        (folder / "bad.png").write_text("text")
        assert main(["calibrate", str(folder), "--recursive", *pair.options]) == 1
        assert "bad.png: not a picture" in capsys.readouterr().err
        assert main([*asked["caption"], "calibrated"]) == 1
        assert len(rows(out)) == 8  # the same mean: nothing but the bad one is due
        for seed in range(3, 7):
            (folder / f"{seed:02}.png").unlink()
        assert main(["calibrate", str(folder), *pair.options]) == 1
        main([*asked["caption"], "calibrated"])
        assert len(rows(out)) == 8 + 3  # another one: all are
    finally:
        Path(path).unlink()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "bad.png").write_text("text")
    assert main(["calibrate", str(tmp_path / "none"), *pair.options]) == 2
    assert "no picture to calibrate on" in capsys.readouterr().err


def test_usage_that_cannot_be_meant_is_refused(pair: Pair, tmp_path: Path, capsys: Captured) -> None:
    folder = str(folder_of(tmp_path / "p", range(1)))
    cases = {
        "keep is not given": ["caption", folder, *pair.options, "--dynamic", "batch"],
        "method none keeps every token": ["caption", folder, *pair.options, "--dynamic", "running", "--method", "none",
                                          "--keep", "4"],
        "the scenes are one batch": ["eval", "--keep", "64", "--dynamic", "running"],
        "--wrong-image and --json do not go": ["eval", "--dynamic", "batch", "--matrix", str(tmp_path)],
    }  # fmt: skip
    for reason, command in cases.items():
        assert main(command) == 2, command
        assert reason in capsys.readouterr().err
