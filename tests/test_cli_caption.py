"""The `caption` verb: what it tells, refuses and locks before and after the batch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Pair
from PIL import Image

from edge_tokcomp import commands
from edge_tokcomp.cli import main
from edge_tokcomp.errors import TokcompError
from edge_tokcomp.records import JsonLines
from edge_tokcomp.resume import Done
from picture_files import noise, pictures

FEW = ["--max-tokens", "4"]

Captured = pytest.CaptureFixture[str]


def test_the_summary_tells_the_first_failures_only(pair: Pair, tmp_path: Path, capsys: Captured) -> None:
    folder = pictures(tmp_path / "p", 1)
    for number in range(7):
        (folder / f"bad{number}.png").write_text("text")
    assert main(["caption", str(folder), *pair.options, *FEW, "--out", str(tmp_path / "o.jsonl")]) == 1
    said = capsys.readouterr().err
    assert said.count("  failed: bad") == 5
    assert said.endswith("  and 2 more\n")
    for number in range(7):
        assert f"\nbad{number}.png: not a picture" in said


def test_captions_that_may_not_fit_the_context_are_told_at_the_start(
    pair: Pair, tmp_path: Path, capsys: Captured
) -> None:
    folder = pictures(tmp_path / "p", 1)
    command = ["caption", str(folder), *pair.options, "--ctx", "256", "--max-tokens"]
    assert main([*command, "400"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert re.search(r"take \d+ rows of context, a caption up to 400, there are 256: .* raise --ctx", told[1])
    assert main([*command, "4"]) == 0
    assert "rows of context" not in capsys.readouterr().err


def test_pictures_of_two_folders_are_not_mixed_up_in_one_file(pair: Pair, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "o.jsonl"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(noise(9, 9, seed=ord(name))).save(tmp_path / name / "x.png")
    assert main(["caption", str(tmp_path / "a"), *pair.options, *FEW, "--out", str(out)]) == 0
    before = out.read_bytes()
    for more in ([], ["--dry-run"]):
        capsys.readouterr()
        assert main(["caption", str(tmp_path / "b"), *pair.options, *FEW, "--out", str(out), *more]) == 2
        streams = capsys.readouterr()
        assert streams.err.count("\n") == 1
        for folder in ("a", "b"):
            assert str((tmp_path / folder).resolve()) in streams.err
        assert "use another --out" in streams.err
        assert out.read_bytes() == before
    assert main(["caption", str(tmp_path / "b"), *pair.options, *FEW, "--out", str(out), "--overwrite"]) == 0


def test_the_output_is_locked_before_it_is_read(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fcntl")
    plain, reads = Done.read, []

    def read(path: Path) -> Done:
        with pytest.raises(TokcompError, match="another run is writing it"):
            JsonLines(path)
        reads.append(path)
        return plain(path)

    monkeypatch.setattr(Done, "read", read)
    out = tmp_path / "o.jsonl"
    assert main(["caption", str(pictures(tmp_path / "p", 1)), *pair.options, *FEW, "--out", str(out)]) == 0
    assert reads == [out]


def test_an_interrupt_while_the_model_loads_is_told(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edge_tokcomp.vlm.load", interrupted)
    out = tmp_path / "o.jsonl"
    assert main(["caption", str(pictures(tmp_path / "p", 1)), "--out", str(out)]) == 130
    assert capsys.readouterr().err == "edge-tokcomp: interrupted; run the same command again to go on\n"
    assert not out.exists()


def test_many_pictures_have_the_threads_divided_by_measuring_unless_they_are_named(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(commands, "_MANY", 3)
    folder, out = pictures(tmp_path / "p", 3), tmp_path / "o.jsonl"
    (folder / "0.png").write_bytes(b"no picture")  # the first that can be read is measured on
    call = ["caption", str(folder), "--lm", str(pair.lm), "--mmproj", str(pair.mmproj), "--max-tokens", "3"]
    assert main([*call, "--threads", "2", "--out", "-"]) == 1
    assert "threads:" not in capsys.readouterr().err
    assert main([*call, "--threads", "auto", "--out", str(out)]) == 1
    told = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("threads:"))
    record = next(row for row in map(json.loads, out.read_text().splitlines()) if row["status"] == "ok")
    assert told == f"threads: {record['choices']['division']}"
    assert main([*call, "--out", str(out)]) == 1  # nothing but the broken one is left
    assert "threads:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--threads", "many", "'many' is neither a number nor auto"),
        ("--threads", "0", "--threads 0 is not a positive number"),
        ("--parallel", "0", "--parallel 0 is not a positive number"),
        ("--image-cache", "much", "image cache of 'much': write a size such as 500MB or 4GB"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_in_one_line(
    flag: str, value: str, reason: str, tmp_path: Path, capsys: Captured
) -> None:
    pictures(tmp_path / "p", 1)
    try:
        code = main(["caption", str(tmp_path / "p"), flag, value])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2
    assert reason in capsys.readouterr().err
