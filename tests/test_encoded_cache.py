"""What a tower said of a picture, kept: in memory and on disk, within bounds, trusted no further than it reads."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from numpy.typing import NDArray

from edge_tokcomp.answers import Answer
from edge_tokcomp.cli import main
from edge_tokcomp.encoded_cache import EncodedCache, disk_cache
from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.tower import Tower
from edge_tokcomp.vlm import VLM, load
from picture_files import pictures


@dataclass(frozen=True, eq=False)
class Inner:
    array: NDArray[Any]
    count: int


@dataclass(frozen=True, eq=False)
class Value:
    rows: NDArray[np.float32]
    parts: tuple[NDArray[np.int64], ...] = ()
    inner: Inner | None = None
    name: str = ""


KINDS = (Value, Inner)


def value(seed: int, rows: int = 4) -> Value:
    rng = np.random.default_rng(seed)
    made = rng.standard_normal((rows, 8)).astype(np.float32)
    return Value(made, (np.arange(seed), np.arange(3)), Inner(rng.integers(0, 9, 5), seed), f"picture {seed}")


def same(one: Any, other: Any) -> bool:
    return (
        np.array_equal(one.rows, other.rows) and one.rows.dtype == other.rows.dtype and one.name == other.name
        and all(map(np.array_equal, one.parts, other.parts)) and len(one.parts) == len(other.parts)
        and np.array_equal(one.inner.array, other.inner.array) and one.inner.count == other.inner.count
    )  # fmt: skip


def test_what_was_put_comes_back_from_memory_and_from_disk(tmp_path: Path) -> None:
    first = EncodedCache(10_000, tmp_path, 10**6)
    first.put("a", [value(1), value(2)])
    for cache in (first, EncodedCache(0, tmp_path, 10**6), EncodedCache(10_000, tmp_path, 10**6)):
        found = cache.get("a", KINDS)
        assert found is not None
        assert len(found) == 2
        assert same(found[0], value(1))
        assert same(found[1], value(2))
        assert cache.get("b", KINDS) is None


def test_memory_lets_go_of_what_was_used_longest_ago() -> None:
    size = sum(array.nbytes for array in (value(5).rows, *value(5).parts, value(5).inner.array))  # type: ignore[union-attr]
    cache = EncodedCache(3 * size + 200)
    for seed in (5, 5, 6, 7):
        cache.put(str(seed), [value(seed)])
    cache.get("5", KINDS)
    cache.put("8", [value(8)])
    assert [cache.get(str(seed), KINDS) is None for seed in (5, 6, 7, 8)] == [False, True, False, False]
    cache.put("large", [value(1, rows=1000)])  # larger than all memory: nothing is dropped for it
    assert cache.get("large", KINDS) is None
    assert cache.get("5", KINDS) is not None
    cache.forget()
    assert cache.get("5", KINDS) is None


def test_the_disk_lets_go_of_what_was_used_longest_ago(tmp_path: Path) -> None:
    EncodedCache(0, tmp_path, 10**6).put("0", [value(0)])
    (only,) = tmp_path.iterdir()
    cache = EncodedCache(0, tmp_path, int(only.stat().st_size * 3.5))
    for seed in (1, 2):
        cache.put(str(seed), [value(seed)])
    for number, path in enumerate(sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, ns=(number, time.time_ns() - 10**12 + number))
    assert cache.get("0", KINDS) is not None  # used now
    cache.put("3", [value(3)])
    assert [cache.get(str(seed), KINDS) is None for seed in range(4)] == [False, True, False, False]
    cache.put("large", [value(1, rows=5000)])
    assert cache.get("large", KINDS) is None
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"no archive", None, "structure"])
def test_a_damaged_file_is_nothing_and_is_removed(
    tmp_path: Path, damage: bytes | str | None, caplog: pytest.LogCaptureFixture
) -> None:
    cache = EncodedCache(0, tmp_path, 10**6)
    cache.put("a", [value(1)])
    (path,) = tmp_path.iterdir()
    if damage is None:
        path.write_bytes(path.read_bytes()[:-100])
    elif isinstance(damage, str):
        np.savez(path, structure=np.frombuffer(b'[{"kind": "Popen", "fields": {}}]', np.uint8))
    else:
        path.write_bytes(damage)
    assert cache.get("a", KINDS) is None
    assert "damaged, the picture is encoded again" in caplog.text
    assert not path.exists()


def test_a_disk_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = EncodedCache(10_000, tmp_path / "c", 10**6)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edge_tokcomp.encoded_cache.write_whole", full)
    cache.put("a", [value(1)])
    assert "No space left" in caplog.text
    assert cache.get("a", KINDS) is not None
    (tmp_path / "file").write_text("")
    with pytest.raises(TokcompError, match="cannot be written"):
        EncodedCache(0, tmp_path / "file" / "c", 1)


@pytest.mark.parametrize(("text", "size"), [("500MB", 5 * 10**8), ("4GB", 4 * 10**9), (" 2 gib ", 2 * 10**9)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert disk_cache(text).disk_bytes == size


@pytest.mark.parametrize("text", ["", "much", "0GB", "-1GB", "5", "1.5GB", "5TB"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write a size such as 500MB or 4GB"):
        disk_cache(text)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes every run of a tower."""
    noted: list[int] = []
    plain = Tower.encode

    def encode(self: Tower, *arguments: Any, **options: Any) -> Any:
        noted.append(1)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Tower, "encode", encode)
    return noted


def test_asking_again_costs_no_encode_whatever_the_method(pair: Pair, runs: list[int]) -> None:
    picture = np.random.default_rng(3).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    with load(pair.lm, pair.mmproj, threads=1, keep=9) as vlm:
        first = vlm.answer(picture, "what is this", max_tokens=4)
        before = len(runs)
        again = vlm.answer(picture, "what is this", max_tokens=4)
        (batch,) = vlm.answer_all([picture], "what is this", max_tokens=4)
        other = vlm.compress(vlm.see(picture), vlm.method, 12)
        assert len(runs) == before
        assert isinstance(batch, Answer)
        assert first.text == again.text == batch.text
        assert again.timings_ms["encode"] < first.timings_ms["encode"]
        assert len(other.plan) == 12
        vlm.answer(picture[:, :40], "what is this", max_tokens=4)
        assert len(runs) == before + 1
    with load(pair.lm, pair.mmproj, threads=1, keep=9, cache=EncodedCache(0)) as vlm:
        before = len(runs)
        vlm.answer(picture, max_tokens=2)
        vlm.answer(picture, max_tokens=2)
        assert len(runs) == before + 2


def test_a_folder_captioned_again_with_another_budget_runs_no_tower(
    pair: Pair, tmp_path: Path, home: Path, runs: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "p", 3)
    common = ["caption", str(folder), *pair.options, "--max-tokens", "4", "--image-cache", "10MB"]
    assert main([*common, "--keep", "9"]) == 0
    first = capsys.readouterr().out
    assert runs
    runs.clear()
    assert main([*common, "--keep", "12", "--method", "uniform"]) == 0
    assert main([*common, "--keep", "9"]) == 0
    assert runs == []
    assert capsys.readouterr().out.endswith(first)
    assert main([*common, "--keep", "9", "--precision", "int8"]) == 0
    assert runs


def test_what_is_measured_of_threads_is_not_the_cache(vlm: VLM, runs: list[int]) -> None:
    picture = np.zeros((40, 50, 3), np.uint8)
    vlm.answer(picture, max_tokens=2)
    runs.clear()
    vlm.divide_threads(picture, max_tokens=2)
    assert runs
