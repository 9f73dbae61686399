"""Text made fit for a terminal, which may be gone, and for files in UTF-8."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_JOINERS = "\u200c\u200d"
_SURROGATE = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` on one line, without characters that steer a terminal: those stand as ``\\n``, ``\\x1b``.

    Joiners and wide spaces stay: they belong to the spelling of names and captions.
    """
    return "".join(c if c.isprintable() or c in _JOINERS or _is_space(c) else ascii(c)[1:-1] for c in text)


def encodable(text: str) -> str:
    """``text`` with bytes of file names that are no UTF-8 as ``\\xe9``, so that it can be written anywhere."""
    return _SURROGATE.sub(lambda found: _escaped(ord(found[0])), text)


@contextmanager
def unheard(stream: TextIO) -> Iterator[None]:
    """Let writing to ``stream`` fail: nobody reading what is said must never end a run."""
    with suppress(OSError):
        try:
            yield
        except ValueError:
            if not stream.closed:
                raise


def _is_space(character: str) -> bool:
    return unicodedata.category(character) == "Zs"


def _escaped(surrogate: int) -> str:
    # Python reads byte 0xe9 of such a name as U+DCE9.
    return f"\\x{surrogate - 0xDC00:02x}" if 0xDC80 <= surrogate <= 0xDCFF else f"\\u{surrogate:04x}"
