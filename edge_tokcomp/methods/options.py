"""Hyper-parameters of a method: its dataclass fields, checked against their type hints, read from text, listed."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UsageError


def check_options(instance: Any) -> None:
    """Raise ``UsageError`` for the first field whose value does not fit its type hint."""
    hints = get_type_hints(type(instance))
    for field in fields(instance):
        value = getattr(instance, field.name)
        if not _fits(value, hints[field.name]):
            label = f"{instance.name}: {field.name.rstrip('_')}"
            raise UsageError(f"{label} must be {_wording(hints[field.name])}, got {value!r}")


def read_options(method: str, text: str) -> dict[str, Any]:
    """``"centre=token,groups=8"`` as keyword arguments; numbers, true, false and none are read as such."""
    options: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise UsageError(f"method option {part.strip()!r} is not NAME=VALUE; write {method}:NAME=VALUE,NAME=VALUE")
        if name in options:
            raise UsageError(f"method option {name!r} stands twice in {method}:{text}")
        options[name] = read_value(value)
    return options


def match_options(cls: type[Any], method: str, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` of ``method`` under the names of ``cls``'s fields (``lambda`` finds ``lambda_``); unknown ones are
    refused."""
    known = {field.name.rstrip("_"): field.name for field in options_of(cls)}
    for name in options:
        if name.rstrip("_") not in known:
            valid = ", ".join(known) if known else "none"
            raise UsageError(f"method {method} has no option {name!r}{suggest(name, known)}; its options: {valid}")
    return {known[name.rstrip("_")]: value for name, value in options.items()}


def describe_options(cls: type[Any]) -> dict[str, dict[str, Any]]:
    """``{option: {"default": value, "accepts": words}}`` of every field of ``cls``."""
    hints = get_type_hints(cls)
    return {
        field.name.rstrip("_"): {
            "default": field.default,
            "accepts": _wording(hints[field.name]),
        }
        for field in options_of(cls)
    }


def options_of(method: Any) -> list[Field[Any]]:
    """The fields of a method or its class that have a default, its own before those that all of its kind have."""
    options = [field for field in fields(method) if field.default is not MISSING]
    return sorted(options, key=lambda field: field.kw_only is True)


def suggest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'pool'?)"``, or nothing when no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def read_value(text: str) -> Any:
    """``text`` as the number, truth value or None it spells, else itself."""
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def spell(value: Any) -> str:
    """``value`` as ``read_value`` reads it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = get_args(hint)
        kinds = each[:1] * len(value) if each[1:] == (...,) else each
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint)


def _wording(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return " or ".join(get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(_wording(one) for one in get_args(hint))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
