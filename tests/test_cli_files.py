"""``inspect``, ``compress`` and ``export``: what they read, and that what they write is whole or not there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from PIL import Image

from edge_tokcomp.cli import build_parser, main
from edge_tokcomp.tokens import Plan
from picture_files import pictures

Captured = pytest.CaptureFixture[str]

LONG = "x" * 300


def inspect_command(folder: Path, pair: Pair, out: Path) -> list[str]:
    return ["inspect", str(folder / "0.png"), *pair.options, "--keep", "9", "--out", str(out)]


def test_a_full_disk_costs_inspect_neither_the_old_picture_nor_leaves_half_a_new_one(
    pair: Pair, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = pictures(tmp_path / "p", 1), tmp_path / "o.png"
    out.write_bytes(b"the old one")

    def full(_picture: Image.Image, target: Any, form: str | None = None) -> None:
        stream = open(target, "wb") if isinstance(target, str | Path) else target  # noqa: SIM115
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert main(inspect_command(folder, pair, out)) == 2
    assert capsys.readouterr().err.endswith(f"--out {out}: cannot be written (No space left on device)\n")
    assert out.read_bytes() == b"the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.png", "p"]


def test_inspect_refuses_a_name_it_cannot_write_before_the_model_is_loaded(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(tmp_path / "p", 1)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "sealed").mkdir()
    sealed, access = str(tmp_path / "sealed"), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != sealed and access(path, mode))  # root may write
    missing = Pair(tmp_path / "no-lm.gguf", tmp_path / "no-mmproj.gguf")
    for name, reason in (
        ("nodir/o.png", f"there is no folder {tmp_path / 'nodir'}"),
        (f"{LONG}.png", "cannot be written (File name too long)"),
        ("file/o.png", "cannot be written (Not a directory)"),
        ("folder.png", "not a regular file"),
        ("sealed/o.png", "cannot be written (permission denied)"),
        ("o.gguf", "name a .png or .jpg file"),
    ):
        out = tmp_path / name
        assert main(inspect_command(folder, missing, out)) == 2
        assert capsys.readouterr().err == f"edge-tokcomp: --out {out}: {reason}\n"


def test_inspect_writes_a_jpeg_through_a_link(pair: Pair, tmp_path: Path) -> None:
    folder, link, there = pictures(tmp_path / "p", 1), tmp_path / "o.jpg", tmp_path / "there.jpg"
    link.symlink_to(there)
    assert main(inspect_command(folder, pair, link)) == 0
    assert link.is_symlink()
    with Image.open(there) as picture:
        assert picture.format == "JPEG"


def test_export_refuses_a_name_that_is_too_long_in_one_line(pair: Pair, tmp_path: Path, capsys: Captured) -> None:
    assert main(["export", str(pair.mmproj), "--out", str(tmp_path / LONG)]) == 2
    assert capsys.readouterr().err.endswith(f"{LONG}: cannot be written (File name too long); name another directory\n")


def compress(tmp_path: Path, arrays: dict[str, Any], keep: int, *more: str) -> int:
    np.savez(tmp_path / "f.npz", **arrays)
    return main(["compress", str(tmp_path / "f.npz"), "--keep", str(keep), "--out", str(tmp_path / "plan.npz"), *more])


@pytest.mark.parametrize("count", [2, 5, 10, 17, 577])
def test_row_0_is_a_cls_row_only_if_the_grid_says_so(tmp_path: Path, capsys: Captured, count: int) -> None:
    features = np.random.default_rng(0).standard_normal((count, 4)).astype(np.float32)
    assert compress(tmp_path, {"features": features}, count, "--method", "pool") == 0
    assert Plan.load(tmp_path / "plan.npz").keep.tolist() == list(range(count))
    assert f"{count} → {count}" in capsys.readouterr().err
    side = round((count - 1) ** 0.5)
    grid = np.array([side, side])
    assert compress(tmp_path, {"features": features, "grid": grid}, count, "--method", "pool") == 0
    assert Plan.load(tmp_path / "plan.npz").keep.tolist() == list(range(1, count))
    assert f"{count - 1} → {count - 1}" in capsys.readouterr().err


def test_without_a_grid_a_square_number_of_rows_is_a_square_and_any_other_a_line(tmp_path: Path) -> None:
    for count, grid in ((36, (6, 6)), (37, (1, 37)), (35, (1, 35))):
        features = np.random.default_rng(0).standard_normal((count, 4)).astype(np.float32)
        plans = []
        for arrays in ({"features": features}, {"features": features, "grid": np.array(grid)}):
            assert compress(tmp_path, arrays, 9, "--method", "uniform") == 0
            plans.append(Plan.load(tmp_path / "plan.npz").keep.tolist())
        assert plans[0] == plans[1]


def test_the_help_says_how_a_cls_row_is_given(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["compress", "--help"])
    assert "N - 1 cells mean that row 0 is a CLS row" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["features", "embeddings"])
def test_values_beyond_float32_are_refused_without_a_warning(tmp_path: Path, name: str) -> None:
    arrays = {"features": np.ones((36, 8)), name: np.ones((36, 8))}
    arrays[name][3, 2] = 1e300
    np.savez(tmp_path / "f.npz", **arrays)
    command = ["compress", str(tmp_path / "f.npz"), "--keep", "9", "--method", "todre", "--out", str(tmp_path / "p")]
    if name == "embeddings":
        np.savez(tmp_path / "f.npz", **arrays, query=np.ones((2, 8)))
        command[5] = "cdpruner"
    done = subprocess.run([sys.executable, "-m", "edge_tokcomp", *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"edge-tokcomp: {name}, row 3: not finite")
    assert done.stderr.count("\n") == 1
