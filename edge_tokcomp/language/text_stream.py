"""Bytes of tokens to text that may be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ..errors import UsageError


class TextStream:
    """Collects the bytes of one sequence's tokens.

    Holds back the bytes of an unfinished character and any text that may turn out to be the start of a stop string.
    Bytes that are no UTF-8 become U+FFFD. The text before a stop string is shown, the stop string and what follows not.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str):
            raise UsageError(f"stop {stop!r} must be a list of strings; write [{stop!r}]")
        if not all(stop):
            raise UsageError("an empty stop string would stop at once; leave it out")
        self.stopped = False
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, piece: bytes) -> str:
        """Add a token's bytes; returns the text that may be shown now, ``""`` once ``stopped``."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(piece)
        found = [place for place in (self._held.find(text) for text in self._stop) if place >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, text) for text in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """No more tokens: the text still held back; an unfinished character is left out."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
