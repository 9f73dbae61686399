"""The `caption` verb: what it tells, refuses and locks before and after the batch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Pair
from PIL import Image

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
