"""The one exception whose message is meant for the person at the keyboard.

Everything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations


class TokcompError(Exception):
    """A fault the user can mend: one line with the value at fault and what to do about it."""


class UsageError(TokcompError):
    """The command or call itself is wrong (exit code 2)."""


class ImageError(TokcompError):
    """One picture cannot be read; the run goes on with an error row."""
