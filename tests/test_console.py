"""Progress: told while somebody reads, and never the end of a run."""

from __future__ import annotations

import errno
import io
from typing import Any

import pytest
from test_records import record

from edge_tokcomp.console import Console
from edge_tokcomp.records import Record


class Gone(io.StringIO):
    """A terminal that was closed."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def outcomes() -> list[tuple[Record, bool]]:
    return [
        (record(0), False), (record(1, status="error", error="bad", timings_ms={}), False),
        (record(2, timings_ms={}), False), (record(3, timings_ms={}), True),
    ]  # fmt: skip


@pytest.mark.parametrize("bar", [True, False])
def test_a_terminal_that_is_gone_ends_no_run(bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream: Any = Gone()
    if not bar:
        monkeypatch.setattr(stream, "isatty", lambda: False)
    console = Console(4, stream)
    for one, skipped in outcomes():
        console.done(one, skipped)
    console.say("what")
    console.stopping()
    console.close()
    stream.close()
    console.say("what")


@pytest.mark.parametrize("tty", [False, True])
def test_scoring_is_told_now_and_then_and_slows_no_rate(tty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return tty

    stream, now = Stream(), [1000.0]
    monkeypatch.setattr("edge_tokcomp.console.time.monotonic", lambda: now[0])
    console = Console(90, stream)
    for count in range(1, 31):
        now[0] += 1
        console.scored(count)
    assert ("11/90 images scored" in stream.getvalue(), "12/90" in stream.getvalue()) == (True, False)
    assert "22/90 images scored" in stream.getvalue()
    now[0] += 4
    shared = {"information": 0.3, "dynamic": "batch"}
    for number in range(8):
        console.done(record(number, tokens_after=60 + number, choices=shared), False)
    now[0] += 60
    console.done(record(9, tokens_after=9, choices=shared), False)
    assert "image tokens" not in stream.getvalue()
    if not tty:
        assert f"9/90 images, {9 / 64:.2f} images/s" in stream.getvalue()
    console.close()


def test_the_bar_counts_captions_made_and_failures() -> None:
    """Skipped pictures and copies take no time: with them the time left would be a fiction."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    console = Console(4, Terminal())
    for one, skipped in outcomes():
        console.done(one, skipped)
    assert (console.bar.n, console.bar.total) == (2, 2)
    assert (console.made, console.seen) == (1, 4)
    console.close()
