"""Items made in a thread ahead of their taker: in order, no more than asked for, faults and ends passed on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from edge_tokcomp.ahead import Ahead, AtOnce


def wait_until(condition: object, seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > until:
            raise TimeoutError("it did not come true")
        time.sleep(0.001)


def test_items_come_in_order_and_no_further_ahead_than_asked() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    supply = Ahead(items(), depth=3, name="test")
    wait_until(lambda: len(made) == 4)  # three wait, the fourth is made and finds no place
    time.sleep(0.02)
    assert len(made) == 4
    assert list(supply) == list(range(50))
    supply.close()


def test_a_taker_that_does_not_wait_gets_nothing_before_it_is_made() -> None:
    gate = threading.Event()

    def items() -> Iterator[str]:
        gate.wait()
        yield "late"

    supply = Ahead(items(), depth=1, name="test")
    assert supply.take(wait=False) is None
    gate.set()
    assert supply.take(wait=True) == "late"
    with pytest.raises(StopIteration):
        supply.take(wait=True)
    with pytest.raises(StopIteration):
        supply.take(wait=False)


def test_what_making_raises_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("disk on fire")

    supply = Ahead(items(), depth=4, name="test")
    assert supply.take(wait=True) == 1
    with pytest.raises(OSError, match="disk on fire"):
        supply.take(wait=True)
    with pytest.raises(StopIteration):
        supply.take(wait=True)


def test_closing_ends_the_thread_and_what_feeds_it() -> None:
    ended: list[str] = []

    def source() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            ended.append("source")

    first = Ahead(source(), depth=2, name="first")

    def doubled() -> Iterator[int]:
        try:
            for number in first:
                yield 2 * number
        finally:
            ended.append("doubled")
            first.close()

    second = Ahead(doubled(), depth=2, name="second")
    assert [second.take(wait=True) for _ in range(3)] == [0, 2, 4]
    before = threading.active_count()
    second.close()
    wait_until(lambda: threading.active_count() == before - 2)
    assert sorted(ended) == ["doubled", "source"]
    second.close()


def test_at_once_makes_an_item_only_when_it_is_taken() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number

    supply = AtOnce(items())
    assert made == []
    assert supply.take(wait=False) == 0
    assert made == [0]
    supply.close()
    with pytest.raises(StopIteration):
        supply.take(wait=True)


def test_a_depth_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="depth must be 1 or more, got 0"):
        Ahead([1], depth=0, name="test")
