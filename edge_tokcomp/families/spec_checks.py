"""Checks of the values of a ``TowerSpec``: they come from files of others.

All raise ``TokcompError`` with one line that names the field and its value. Numbers are compared, never converted:
JSON holds integers beyond any float.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_tokcomp.errors import TokcompError

_ADVICE = "is the file damaged?"


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    """An integer within ``least`` to ``most``, and no bool."""
    if type(value) is not int or not least <= value <= most:
        raise TokcompError(f"{name} {value!r:.80} is not an integer within {least}..{most}; {_ADVICE}")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """A number within ``least`` to ``most``."""
    if type(value) not in (int, float) or not least <= value <= most:
        raise TokcompError(f"{name} {value!r:.80} is not a number within {least:g}..{most:g}; {_ADVICE}")


def check_numbers(name: str, values: Any, least: float, most: float) -> None:
    """Three numbers within ``least`` to ``most``, one for each channel."""
    if not isinstance(values, tuple) or len(values) != 3:
        raise TokcompError(f"{name} {values!r:.80} is not three numbers; {_ADVICE}")
    for value in values:
        check_number(name, value, least, most)


def check_epsilon(name: str, value: Any) -> None:
    """A number between 0 and 1."""
    if type(value) is not float or not 0 < value < 1:
        raise TokcompError(f"{name} {value!r:.80} is not a number between 0 and 1; {_ADVICE}")


def check_flags(owner: Any, names: Sequence[str], prefix: str = "") -> None:
    """Fields of ``owner`` that are bools."""
    for name in names:
        if type(value := getattr(owner, name)) is not bool:
            raise TokcompError(f"{prefix}{name} {value!r:.80} is not true or false; {_ADVICE}")


def check_text(name: str, value: Any, empty: bool = False) -> None:
    """A string of one line, which may be ``empty``."""
    if not isinstance(value, str) or not (value or empty) or not value.isprintable() or len(value) > 200:
        raise TokcompError(f"{name} {value!r:.80} is not a name; {_ADVICE}")


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """One of the values ``allowed``."""
    if value not in allowed:
        raise TokcompError(f"{name} {value!r:.80} is none of {', '.join(map(str, allowed))}")


def check_kind(name: str, value: Any, kind: type) -> None:
    """A value of a class."""
    if not isinstance(value, kind):
        raise TokcompError(f"{name} {value!r:.80} is not a {kind.__name__}; {_ADVICE}")


def check_blocks(name: str, blocks: Any, count: int) -> None:
    """Block numbers below ``count``, strictly ascending."""
    last = -1
    for block in blocks:
        check_integer(name, block, 0, count - 1)
        if block <= last:
            raise TokcompError(
                f"{name} {block} comes after {last}: blocks are named once, in ascending order; {_ADVICE}"
            )
        last = block


def check_range(name: str, least: int | None, most: int | None, bottom: int, top: int) -> None:
    """Two limits of what ``name`` counts, within ``bottom`` to ``top`` and in order; or none."""
    if least is None and most is None:
        return
    if least is None or most is None or not bottom <= least <= most <= top:
        raise TokcompError(
            f"{least!r:.80} to {most!r:.80} {name} of a picture are not within {bottom}..{top}; {_ADVICE}"
        )
