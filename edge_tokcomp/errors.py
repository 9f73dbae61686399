"""The one exception whose message is meant for the person at the keyboard.

Everything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations


class TokcompError(Exception):
    """A fault the user can mend: one line with the value at fault and what to do about it."""


class UsageError(TokcompError):
    """The command or call itself is wrong (exit code 2)."""


class UnsupportedError(TokcompError):
    """A model that is well but has no tower here; llama.cpp's own may do."""


class ImageError(TokcompError):
    """One picture cannot be read; the run goes on with an error row."""


def check_positive(name: str, value: int | None) -> int | None:
    """``value``; raises ``UsageError`` for a number below 1."""
    if value is not None and value < 1:
        raise UsageError(f"{name} {value} is not a positive number")
    return value
