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
