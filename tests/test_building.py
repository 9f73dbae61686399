"""What a builder that was killed leaves behind, and what one that still works must find in its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.export import building, tower_files
from edge_tokcomp.export.building import ABANDONED_S, folder_aside
from edge_tokcomp.export.check import Reference
from edge_tokcomp.export.mmproj import Mmproj
from edge_tokcomp.export.tower_files import cached_tower, export_tower
from edge_tokcomp.families.tower_spec import TowerSpec
from tiny_mmproj import write_mmproj

BUILDER = """
import sys
from pathlib import Path
from edge_tokcomp.export.building import folder_aside
with folder_aside(Path(sys.argv[1])) as folder:
    (folder / "tower.onnx.data").write_bytes(b"half")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_builder(home: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that is at work on a folder in ``home`` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process, home / process.stdout.readline().strip()
    finally:
        process.communicate(timeout=120)


def age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in (*folder.iterdir(), folder):
        os.utime(path, (then, then))


@pytest.fixture(scope="module")
def mmproj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mmproj(tmp_path_factory.mktemp("mmproj") / "m.gguf", blocks=1, width=32, heads=2, ffn=64).path


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_build_removes_what_a_killed_one_left(tmp_path: Path, mmproj: Path, stop: signal.Signals) -> None:
    with another_builder(tmp_path) as (process, folder):
        process.send_signal(stop)
    assert (folder / "tower.onnx.data").read_bytes() == b"half"
    tower = cached_tower(mmproj, cache=tmp_path)
    assert list(tmp_path.iterdir()) == [tower.directory]


def test_a_folder_is_never_removed_while_another_process_builds_in_it(tmp_path: Path, mmproj: Path) -> None:
    with another_builder(tmp_path) as (process, folder):
        age(folder, 100 * ABANDONED_S)
        tower = cached_tower(mmproj, cache=tmp_path)
        assert (folder / "tower.onnx.data").read_bytes() == b"half"
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == [tower.directory]


def test_without_locks_a_folder_is_abandoned_after_an_hour_without_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "_take", lambda lock: None)
    old, busy, new = (tmp_path / f".building-{digit * 32}" for digit in "123")
    for folder in (old, busy, new):
        folder.mkdir()
        (folder / "tower.onnx.data").write_bytes(b"half")
    age(old, ABANDONED_S + 60)
    age(busy, ABANDONED_S + 60)
    os.utime(busy / "tower.onnx.data")
    with folder_aside(tmp_path) as mine:
        assert {path.name for path in tmp_path.iterdir()} == {busy.name, new.name, mine.name}
    assert {path.name for path in tmp_path.iterdir()} == {busy.name, new.name}


def test_the_remains_of_a_damaged_tower_are_removed_and_nothing_that_is_not_ours(tmp_path: Path) -> None:
    grave = tmp_path / f".damaged-{'a' * 32}"
    others = [tmp_path / ".building-notes", tmp_path / "building", tmp_path / f".damaged-{'z' * 32}"]
    for folder in (grave, *others):
        folder.mkdir()
        (folder / "file").write_text("")
        age(folder, 100 * ABANDONED_S)
    with folder_aside(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_a_sweep_between_opening_and_locking_costs_a_builder_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, swept = building._take, []

    def removed_once(lock: BinaryIO) -> bool | None:
        if not swept:
            swept.append(Path(lock.name))
            swept[0].unlink()
        return take(lock)

    monkeypatch.setattr(building, "_take", removed_once)
    with folder_aside(tmp_path) as folder:
        assert folder.name != swept[0].name.removesuffix(".lock")
        with folder_aside(tmp_path):
            assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_blas_keeps_to_its_threads_while_a_tower_is_built(
    tmp_path: Path, mmproj: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    make = Reference.of

    def counting(spec: TowerSpec, source: Mmproj) -> Reference:
        seen.append(max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"))
        return make(spec, source)

    monkeypatch.setattr(tower_files.Reference, "of", counting)
    with threadpool_limits(2, "blas"):
        cached_tower(mmproj, cache=tmp_path / "two")
        cached_tower(mmproj, cache=tmp_path / "one", threads=1)
    assert seen == [2, 1]


def test_a_name_that_cannot_be_is_refused_before_a_tower_is_built(
    tmp_path: Path, mmproj: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower_files, "_write_graphs", None)
    with pytest.raises(TokcompError, match=r"x: cannot be written \(File name too long\)") as fault:
        export_tower(mmproj, tmp_path / ("x" * 300))
    assert "\n" not in str(fault.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(TokcompError, match=r"cannot be written \(Not a directory\)"):
        export_tower(mmproj, tmp_path / "file" / "tower")
    with pytest.raises(TokcompError, match=r"EDGE_TOKCOMP_CACHE"):
        cached_tower(mmproj, cache=tmp_path / ("x" * 300))
