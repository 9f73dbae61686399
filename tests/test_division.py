"""Threads divided between tower and language model by measuring both."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from conftest import Pair

from batch import run
from edge_tokcomp.division import Division, Halves, divide
from edge_tokcomp.vlm import VLM, load
from picture_files import pictures


class Fake:
    """Two halves that take as long as they are told, and note the threads they are given."""

    def __init__(self, encode_s: float, generate_s: float, *, alone: bool = False) -> None:
        self.encode_s, self.generate_s = encode_s, generate_s
        self.lock = threading.Lock() if alone else None
        self.given: list[tuple[int, int]] = []

    def work(self, seconds: float) -> None:
        if self.lock:
            with self.lock:
                time.sleep(seconds)
        else:
            time.sleep(seconds)

    @property
    def halves(self) -> Halves:
        return Halves(
            lambda: self.work(self.encode_s), lambda: self.work(self.generate_s),
            lambda tower, language: self.given.append((tower, language)),
        )  # fmt: skip


def test_halves_that_do_not_hinder_one_another_run_beside_each_other() -> None:
    fake = Fake(0.02, 0.06)
    division = divide(fake.halves, 8)
    assert (division.tower, division.language, division.beside) == (2, 6, True)
    assert fake.given == [(8, 8), (2, 6)]
    assert "ms a picture in turns" in str(division)
    assert str(division).startswith("tower 2, language model 6, beside each other: ")


def test_halves_that_wait_for_one_another_take_turns() -> None:
    fake = Fake(0.02, 0.02, alone=True)
    division = divide(fake.halves, 4)
    assert (division.tower, division.language, division.beside) == (4, 4, False)
    assert fake.given == [(4, 4), (2, 2), (4, 4)]


def test_each_half_has_a_thread_at_least() -> None:
    fake = Fake(0.0, 0.05)
    divide(fake.halves, 2)
    assert fake.given[1] == (1, 1)


def test_one_thread_is_not_divided() -> None:
    fake = Fake(0.01, 0.01)
    assert divide(fake.halves, 1) == Division(1, 1, False, "there is one thread")


def test_a_fault_of_the_tower_beside_is_raised() -> None:
    calls = iter(range(9))

    def encode() -> None:
        if next(calls) > 2:
            raise OSError("tower fell")

    with pytest.raises(OSError, match="tower fell"):
        divide(Halves(encode, lambda: time.sleep(0.01), lambda *_: None), 2)


@pytest.mark.parametrize("beside", [False, True])
def test_captions_are_the_same_in_turns_and_beside_each_other(pair: Pair, tmp_path: Path, beside: bool) -> None:
    folder = pictures(tmp_path / "p", 9)
    with load(pair.lm, pair.mmproj, threads=2, parallel=3) as vlm:
        _, expected = run(vlm, folder)
        vlm.division = Division(1, 1, beside, "for this test")
        vlm.engine.set_threads(1)
        vlm.decoder.set_threads(1)
        _, records = run(vlm, folder)
    assert [record.caption for record in records] == [record.caption for record in expected]
    assert [record.id for record in records] == sorted(record.id for record in records)
    assert records[0].choices["division"] == str(Division(1, 1, beside, "for this test"))


def test_a_model_measures_itself_and_answers_afterwards_as_before(pair: Pair, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 3)
    with load(pair.lm, pair.mmproj, threads=2, parallel=2, keep=9) as vlm:
        expected = vlm.caption(folder / "0.png", max_tokens=5)
        division = vlm.divide_threads(folder / "1.png", max_tokens=5)
        assert vlm.division is division
        assert division.tower + division.language == (2 if division.beside else 4)
        assert vlm.decoder.room == vlm.decoder.n_ctx
        assert vlm.caption(folder / "0.png", max_tokens=5) == expected


def test_what_is_measured_leaves_a_running_mean_alone(pair: Pair, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 3)
    options = {"threads": 1, "keep": 9, "dynamic": "running"}
    with load(pair.lm, pair.mmproj, **options) as vlm:  # type: ignore[arg-type]
        expected = [vlm.encode(folder / f"{number}.png").share for number in range(3)]
    with load(pair.lm, pair.mmproj, **options) as vlm:  # type: ignore[arg-type]
        vlm.divide_threads(folder / "2.png")
        assert [vlm.encode(folder / f"{number}.png").share for number in range(3)] == expected


def test_a_vlm_without_measuring_takes_turns(vlm: VLM) -> None:
    assert vlm.division == Division(1, 1, False, "as it was loaded")
