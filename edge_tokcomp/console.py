"""What people see of a batch run: a progress bar on a terminal, quiet lines otherwise. All of it on stderr."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from tqdm import tqdm

from .budget import describe
from .records import Record
from .text import printable, unheard

QUIET_SECONDS = 10.0

_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} images [{elapsed}<{remaining}, {rate_noinv_fmt}]"


class Console:
    """Progress of ``total`` pictures on ``stream`` (stderr): a bar where that is a terminal, lines elsewhere."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.total, self.made, self.seen = total, 0, 0
        self.started = self.last = time.monotonic()
        self.tokens = (0, 0)
        self.bar = None
        with unheard(self.stream):
            if self.stream.isatty():
                self.bar = tqdm(
                    total=total, unit=" images", file=self.stream, smoothing=0.1, dynamic_ncols=True, bar_format=_BAR
                )

    def done(self, record: Record, skipped: bool) -> None:
        """One more picture; failures are told at once, and so is a change of the token count but for shared budgets."""
        self.seen += 1
        if record.status == "error":
            self.say(f"{record.id}: {record.error}")
        elif record.computed:
            self.made += 1
            if (record.tokens_before, record.tokens_after) != self.tokens and "information" not in record.choices:
                self.tokens = record.tokens_before, record.tokens_after
                self.say(f"image tokens {describe(*self.tokens)}, method {record.method}")
        if self.bar is not None:
            with unheard(self.stream):
                if record.computed or record.status == "error":
                    self.bar.update()
                else:  # skipped and copied pictures would make the rate, and so the time left, a fiction
                    self.bar.total -= 1
                    self.bar.refresh()
        elif time.monotonic() - self.last > QUIET_SECONDS:
            self.last = time.monotonic()
            self.say(self._line())

    def scored(self, count: int) -> None:
        """So many pictures are scored, ahead of their captions: the rate of those begins after it."""
        now = time.monotonic()
        if now - self.last > QUIET_SECONDS:
            self.last = now
            self.say(f"{count}/{self.total} images scored")
        self.started = now
        if self.bar is not None:
            self.bar.unpause()

    def say(self, text: str) -> None:
        """A line for people, if they still read."""
        with unheard(self.stream):
            if self.bar is not None:
                self.bar.write(printable(text), file=self.stream)
            else:
                print(printable(text), file=self.stream, flush=True)

    def stopping(self) -> None:
        """Say that the run ends soon. Called from a signal handler, hence past Python's buffers and the bar's lock."""
        with unheard(self.stream):
            os.write(self.stream.fileno(), b"\nstopping after the captions that are begun; once more to stop at once\n")

    def close(self) -> None:
        """No more pictures."""
        if self.bar is not None:
            with unheard(self.stream):
                self.bar.close()

    def _line(self) -> str:
        rate = max(self.made, 1) / (self.last - self.started)
        left = int((self.total - self.seen) / rate)
        clock = (
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}" if left >= 3600 else f"{left // 60}:{left % 60:02}"
        )
        return f"{self.seen}/{self.total} images, {rate:.2f} images/s, {clock} left"


class TextLines:
    """The sink used when no file is named: ``id``, a tab, the caption, on stdout; a line a picture.

    ``console``: whose bar must not be broken by them.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def write(self, record: Record) -> None:
        """Print a caption; errors are the console's to tell."""
        if record.status != "ok":
            return
        line = f"{printable(record.id)}\t{printable(' '.join(record.caption.split()))}"
        if self.console.bar is not None and sys.stdout.isatty():
            self.console.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)  # noqa: T201

    def close(self) -> None:
        """Nothing to close."""
