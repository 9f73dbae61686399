"""The command: what goes to which stream, what is refused, and exit codes."""

from __future__ import annotations

import csv
import json
import os
import shlex
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from PIL import Image

from edge_tokcomp.cli import build_parser, main
from edge_tokcomp.tokens import Plan
from picture_files import BAD, mixed, noise, pictures, saved

FEW = ["--max-tokens", "4"]


Captured = pytest.CaptureFixture[str]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_a_folder_of_good_and_bad_files(pair: Pair, tmp_path: Path, capsys: Captured) -> None:
    wanted = mixed(tmp_path / "photos")
    out = tmp_path / "captions.jsonl"
    command = ["caption", str(tmp_path / "photos"), *pair.options, "--keep", "25%", "--out", str(out), *FEW]
    assert main(command) == 1
    first = capsys.readouterr()
    assert first.out == ""
    assert sorted(row["id"] for row in rows(out)) == sorted(wanted)
    assert f"{len(wanted) - len(BAD)} captioned, 0 skipped, {len(BAD)} failed" in first.err
    for name in BAD:
        assert f"  failed: {name}: " in first.err
    assert "image tokens 36 → 9 (25.0 %), method mosaic" in first.err
    assert main(command) == 1
    assert f"0 captioned, {len(wanted) - len(BAD)} skipped, {len(BAD)} failed" in capsys.readouterr().err
    assert len(rows(out)) == len(wanted)
    for name in BAD:
        (tmp_path / "photos" / name).unlink()
    assert main(command) == 0


def test_without_out_captions_go_to_stdout_a_line_each(pair: Pair, tmp_path: Path, capsys: Captured) -> None:
    folder = pictures(tmp_path / "p", 1)
    (folder / "two\nlines\x1b[2J.png").write_bytes((folder / "0.png").read_bytes())
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes((folder / "0.png").read_bytes())
    (folder / "bad\n.png").write_text("text")
    assert main(["caption", str(folder), *pair.options, *FEW]) == 1
    streams = capsys.readouterr()
    lines = streams.out.split("\n")
    assert [line.split("\t")[0] for line in lines] == ["0.png", "caf\\xe9.png", "two\\nlines\\x1b[2J.png", ""]
    assert len({line.split("\t")[1] for line in lines[:-1]}) == 1
    assert all(line == "" or line.isprintable() for line in streams.err.split("\n"))
    assert "bad\\n.png: not a picture" in streams.err


def test_json_lines_on_stdout(pair: Pair, tmp_path: Path, capsys: Captured) -> None:
    folder = pictures(tmp_path / "p", 2)
    assert main(["caption", str(folder), *pair.options, *FEW, "--out", "-", "--prompt", "what is this"]) == 0
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == ["0.png", "1.png"]


def test_csv_and_json_lines_say_the_same(pair: Pair, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 2)
    for name in ("o.csv", "o.jsonl"):
        assert main(["caption", str(folder), *pair.options, *FEW, "--out", str(tmp_path / name)]) == 0
    with (tmp_path / "o.csv").open(encoding="utf-8", newline="") as stream:
        for row, record in zip(csv.DictReader(stream), rows(tmp_path / "o.jsonl"), strict=True):
            for name in ("id", "sha256", "caption", "method", "model", "params_hash"):
                assert row[name] == record[name]


def test_sidecars_leave_stdout_to_the_captions_and_come_back_as_no_source(
    pair: Pair, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(tmp_path / "p", 2)
    monkeypatch.chdir(folder)
    command = ["caption", "*", *pair.options, *FEW, "--sidecar", "txt", "--out", "captions.jsonl"]
    assert main(command) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["0.png", "0.txt", "1.png", "1.txt", "captions.jsonl"]
    assert (folder / "0.txt").read_text(encoding="utf-8") == rows(folder / "captions.jsonl")[0]["caption"] + "\n"
    capsys.readouterr()
    assert main(command) == 0
    assert "3 output files among the sources are left out" in capsys.readouterr().err
    assert len(rows(folder / "captions.jsonl")) == 2


def test_a_dry_run_changes_nothing(pair: Pair, tmp_path: Path, capsys: Captured) -> None:
    folder, out = pictures(tmp_path / "p", 2), tmp_path / "o.jsonl"
    command = ["caption", str(folder), *pair.options, *FEW, "--keep", "9", "--out", str(out)]
    assert main([*command, "--dry-run"]) == 0
    assert not out.exists()
    said = capsys.readouterr().out
    for line in ("2 found, 0 done, 2 to do", "36 → 9 (25.0 %) a picture, method mosaic", "4096 rows", "llava15"):
        assert line in said
    assert main(command) == 0
    cut = out.read_bytes()[:-5]
    out.write_bytes(cut)
    capsys.readouterr()
    assert main([*command, "--dry-run", "--overwrite"]) == 0
    assert "2 found, 0 done, 2 to do" in capsys.readouterr().out
    assert main([*command, "--dry-run"]) == 0
    assert "2 found, 1 done, 1 to do" in capsys.readouterr().out
    assert out.read_bytes() == cut


def test_overwrite_keeps_the_old_file_until_the_model_is_there(pair: Pair, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "p", 1), tmp_path / "o.jsonl"
    command = ["caption", str(folder), *pair.options, *FEW, "--out", str(out)]
    assert main(command) == 0
    before = out.read_bytes()
    assert main([*command, "--overwrite", "--lm", str(tmp_path / "no.gguf")]) == 2
    assert out.read_bytes() == before
    assert main([*command, "--overwrite"]) == 0
    assert len(rows(out)) == 1


def usage_errors(folder: Path, pair: Pair) -> dict[str, list[str]]:
    photos, options = str(folder / "p"), pair.options
    other = folder / "other.jsonl"
    other.write_text('{"image": "a.jpg"}\n')
    (folder / "dir.jsonl").mkdir()
    (folder / "e").mkdir()
    return {
        "no such file or folder": ["caption", "nowhere.png", *options],
        "no pictures in this folder": ["caption", str(folder / "e"), *options],
        "write FILE.jsonl, FILE.csv or -": ["caption", photos, *options, "--out", "captions.txt"],
        "there is no folder": ["caption", photos, *options, "--out", "no/such/captions.jsonl"],
        "not a regular file": ["caption", photos, *options, "--out", str(folder / "dir.jsonl")],
        "is not a caption record": ["caption", photos, *options, "--out", str(other)],
        "captions over pictures": ["caption", photos, *options, "--sidecar", "png"],
        "name an extension": ["caption", photos, *options, "--sidecar", "../x"],
        "--max-tokens 0": ["caption", photos, *options, "--max-tokens", "0"],
        "--threads 0": ["caption", photos, *options, "--threads", "0"],
        "threads 100000 is more than": ["caption", photos, *options, "--threads", "100000"],
        "--ctx -1": ["caption", photos, *options, "--ctx", "-1"],
        "--ctx 0": ["caption", photos, *options, "--ctx", "0"],
        "File name too long": ["caption", photos, *options, "--out", str(folder / ("x" * 300 + ".jsonl"))],
        "would be written over --out": ["caption", photos, *options, "--sidecar", "jsonl", "--overwrite", "--out",
                                        str(folder / "p" / "0.jsonl")],
        "seed -1": ["caption", photos, *options, "--seed", "-1"],
        "is not an amount": ["caption", photos, *options, "--keep", "some"],
        "did you mean 'todre'": ["caption", photos, *options, "--method", "todr", "--keep", "3"],
        "mmproj is not given": ["caption", photos, "--lm", str(pair.lm)],
        "rows of context": ["caption", photos, *options, "--ctx", "256", "--prompt", "zq " * 300],
        "stands for an image": ["caption", photos, *options, "--prompt", "<image>"],
        "no.gguf": ["ask", str(folder / "p" / "0.png"), "what", "--lm", "no.gguf", "--mmproj", str(pair.mmproj)],
        "not an .npz": ["compress", str(other), "--method", "pool", "--keep", "2", "--out", str(folder / "x.npz")],
        "already exists": ["export", str(pair.mmproj), "--out", str(folder / "e")],
        "the question contains '<image>'": ["caption", photos, *options, "--prompt", "{stem} <image>"],
    }  # fmt: skip


def test_faults_of_usage_are_one_line_and_exit_2(pair: Pair, tmp_path: Path, capsys: Captured) -> None:
    pictures(tmp_path / "p", 1)
    for reason, command in usage_errors(tmp_path, pair).items():
        assert main(command) == 2, command
        streams = capsys.readouterr()
        assert streams.out == ""
        assert streams.err.startswith("edge-tokcomp: ")
        assert streams.err.count("\n") == 1
        assert reason in streams.err
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["0.png"]


def test_what_argparse_refuses_exits_2_as_well(capsys: Captured) -> None:
    for command in (
        ["caption"],
        ["nonsense"],
        ["caption", "x", "--over"],
        ["ask", "x"],
        ["caption", "x", "--seed", "a"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 2
    assert main([]) == 2
    assert capsys.readouterr().out == ""


def test_ask_streams_the_answer_to_stdout(pair: Pair, tmp_path: Path, capsys: Captured) -> None:
    folder = pictures(tmp_path / "p", 1)
    assert main(["ask", str(folder / "0.png"), "what is this", *pair.options, "--keep", "9", "--max-tokens", "8"]) == 0
    streams = capsys.readouterr()
    assert streams.out.endswith("\n")
    assert streams.out.strip()
    assert "36 → 9 (25.0 %), method mosaic" in streams.err
    assert main(["ask", str(folder / "no.png"), "what", *pair.options]) == 1
    assert "no.png: no such file" in capsys.readouterr().err


def test_inspect_draws_what_is_kept(pair: Pair, tmp_path: Path, capsys: Captured) -> None:
    folder, out = pictures(tmp_path / "p", 1), tmp_path / "kept.png"
    picture = folder / "0.png"
    command = ["inspect", str(picture), *pair.options, "--method", "uniform", "--keep", "9", "--out"]
    assert main([*command, str(out)]) == 0
    with Image.open(out) as drawn:
        assert min(drawn.size) >= 672
        yellow = (np.asarray(drawn) == (255, 196, 0)).all(axis=-1)
    assert 9 * 4 * 100 < yellow.sum() < 9 * 4 * 112 + 1  # nine outlines of 112 pixels a side
    assert "36 → 9" in capsys.readouterr().err
    before = picture.read_bytes()
    assert main([*command, str(picture)]) == 2
    assert main([*command, str(tmp_path / "no" / "x.png")]) == 2
    assert main([*command, str(tmp_path / "x.nonsense")]) == 2
    assert picture.read_bytes() == before
    assert "is the picture itself" in capsys.readouterr().err


def test_methods_as_a_table_and_as_json(capsys: Captured) -> None:
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    methods, steps, joined = listed["methods"], listed["layer_steps"], listed["joined"]
    assert {"none", "random", "uniform", "pool", "prunesid", "todre"} <= {row["name"] for row in methods}
    assert {row["name"] for row in steps} == {"spectrum", "todre", "fastv", "pyramid", "dart"}
    assert all(row["name"] in table and row["source"] in table for row in [*methods, *steps])
    assert "pyramid@0.25:0.5,0.5:0.5,0.75:0.5\n" in table
    assert f"{joined['name']}    {joined['title']}, as in {joined['example']}\n" in table
    assert (joined["first"], joined["options"]["leave"]["default"]) == (["resolution", "luvc"], 0.75)


def compress(tmp_path: Path, arrays: dict[str, Any], *more: str) -> int:
    np.savez(tmp_path / "f.npz", **arrays)
    return main(["compress", str(tmp_path / "f.npz"), "--keep", "9", "--out", str(tmp_path / "plan.npz"), *more])


def test_compress_runs_a_method_on_arrays(tmp_path: Path, capsys: Captured) -> None:
    features = np.random.default_rng(0).standard_normal((36, 8)).astype(np.float32)
    attention = np.random.default_rng(1).random((4, 37)).astype(np.float32)
    with_cls = np.concatenate([features[:1], features])
    cases: list[tuple[dict[str, Any], int]] = [
        ({"features": features}, 36), ({"features": np.asfortranarray(features)}, 36),
        ({"features": features.astype(np.float16), "grid": np.array([4, 9])}, 36),
        ({"features": with_cls, "cls_attention": attention, "grid": np.array([6, 6])}, 37),
        ({"features": features, "embeddings": features * 2, "keys": features[:, :3]}, 36),
        ({"features": features, "embeddings": features[:, :5], "query": features[:3, :5]}, 36),
    ]  # fmt: skip
    for arrays, total in cases:
        if "query" in arrays:
            assert compress(tmp_path, arrays, "--method", "cdpruner") == 0
        for method in ("prunesid" if "cls_attention" in arrays else "prunesid-paper", "todre", "uniform", "pool"):
            assert compress(tmp_path, arrays, "--method", method) == 0
            plan = Plan.load(tmp_path / "plan.npz")
            assert (len(plan), plan.total, plan.before) == (9, total, 36)
    assert "36 → 9 (25.0 %)" in capsys.readouterr().err


def test_compress_refuses_arrays_that_do_not_fit(tmp_path: Path, capsys: Captured) -> None:
    good = np.ones((36, 8), np.float32)
    cases = {
        "no array 'features'": {"x": good},
        "must be a matrix of floating-point numbers": {"features": good.astype(int)},
        "features (36,) float32": {"features": good[:, 0]},
        "grid (1,) int64": {"features": good, "grid": np.array([36])},
        "grid (2,) float64": {"features": good, "grid": np.array([6.0, 6.0])},
        "grid 5 x 5 does not hold 36 rows": {"features": good, "grid": np.array([5, 5])},
        "embeddings (35, 8)": {"features": good, "embeddings": good[:35]},
        "cls_attention (4, 35)": {"features": good, "cls_attention": np.ones((4, 35), np.float32)},
        "query (36, 8) must be (m, 5)": {"features": good, "embeddings": good[:, :5], "query": good},
        "has the wrong type": {"features": np.array([[object()]])},
        "not finite": {"features": good * np.nan},
    }
    for reason, arrays in cases.items():
        assert compress(tmp_path, arrays, "--method", "prunesid") == 2
        assert reason in capsys.readouterr().err
    (tmp_path / "f.npz").write_bytes(b"PK\x03\x04 cut")
    command = ["compress", str(tmp_path / "f.npz"), "--keep", "9", "--method", "pool", "--out"]
    assert main([*command, str(tmp_path / "p.npz")]) == 2
    huge = (
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }".ljust(117)
        + b"\n"
    )
    with zipfile.ZipFile(tmp_path / "f.npz", "w") as archive:
        archive.writestr("features.npy", huge)
    assert main([*command, str(tmp_path / "p.npz")]) == 2
    assert "wrong type or size" in capsys.readouterr().err
    np.savez(tmp_path / "f.npz", features=good)
    assert main([*command, str(tmp_path / "no" / "p.npz")]) == 2


def test_export_writes_a_tower_once(pair: Pair, tmp_path: Path, capsys: Captured) -> None:
    assert main(["export", str(pair.mmproj), "--out", str(tmp_path / "tower")]) == 0
    assert (tmp_path / "tower" / "tower.onnx").exists()
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "llava15 tower, fp32" in streams.err


def test_every_option_of_the_specification_is_there() -> None:
    options = build_parser().parse_args(
        shlex.split(
            "caption a b --lm l --mmproj m --method x --keep 64 --prompt p --out o.jsonl --sidecar .txt --recursive "
            "--overwrite --max-tokens 9 --provider cpu --threads 2 --seed 3 --dry-run"
        )
    )
    assert (options.sources, options.keep, options.seed, options.dry_run) == (["a", "b"], "64", 3, True)


def test_pictures_larger_than_allowed_are_refused_and_may_be_allowed(
    pair: Pair, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(noise(20, 20)), "PNG"))
    command = ["ask", str(tmp_path / "a.png"), "what", *pair.options, *FEW, "--max-pixels"]
    assert main([*command, "399"]) == 1
    assert "400 pixels, more than the limit of 399" in capsys.readouterr().err
    assert main([*command, "400"]) == 0
