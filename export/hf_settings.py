"""The JSON files of a Hugging Face checkpoint, read with suspicion: they come from outside."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_tokcomp.errors import TokcompError, UnsupportedError

_MOST_BYTES = 1 << 26
"""Of one file; a tokenizer of 131 000 tokens has 17 MB."""


@dataclass(frozen=True)
class Settings:
    """A JSON object. ``usual``: what transformers takes where it says nothing, or null. ``inside``: what leads to it.

    Everything raises ``TokcompError`` for a value that is missing or something else, ``UnsupportedError`` for one that
    is well but not dealt with here.
    """

    file: Path
    values: Mapping[str, Any]
    usual: Mapping[str, Any] = field(default_factory=dict)
    inside: str = ""

    def get(self, key: str) -> Any:
        """Any value, None where there is none."""
        value = self.values.get(key)
        return self.usual.get(key) if value is None else value

    def part(self, key: str, usual: Mapping[str, Any] | None = None) -> Settings:
        """An object in this one, empty where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._fault(key, "an object")
        return replace(self, values=value or {}, usual=usual or {}, inside=f"{self.inside}{key}.")

    def integer(self, key: str) -> int:
        """An integer."""
        value = self.get(key)
        if type(value) is not int:
            raise self._fault(key, "an integer")
        return value

    def number(self, key: str) -> float:
        """A number."""
        value = self.get(key)
        if not _is_number(value):
            raise self._fault(key, "a number")
        return float(value)

    def numbers(self, key: str) -> list[float]:
        """A list of numbers."""
        value = self.get(key)
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise self._fault(key, "a list of numbers")
        return [float(number) for number in value]

    def side(self, key: str) -> int:
        """The side of a square, given once or as height and width."""
        value = self.get(key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is not int:
            raise self._fault(key, "the side of a square")
        return value

    def one_of(self, key: str, known: Sequence[Any]) -> Any:
        """A value that is among ``known``, the first of them where it says nothing."""
        value = self.get(key)
        if value is None:
            return known[0]
        if value not in known:
            text = " or ".join(str(one) for one in known)
            raise UnsupportedError(f"{self.file}: {self.inside}{key} {value!r:.80} is not supported, {text} is")
        return value

    def _fault(self, key: str, kind: str) -> TokcompError:
        value = self.get(key)
        found = "missing" if value is None else f"{value!r:.80}, not {kind}"
        return TokcompError(f"{self.file}: {self.inside}{key} is {found}; download the checkpoint again")


def read_settings(path: Path) -> Settings:
    """The object in a JSON file; raises ``TokcompError`` for a file that is missing, too large or damaged."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise TokcompError(f"{path}: more than {_MOST_BYTES >> 20} MiB have no place in such a file")
        values = json.loads(text)
    except OSError as fault:
        raise TokcompError(f"{path}: cannot be read ({fault.strerror}); name a checkpoint's folder") from fault
    except (ValueError, RecursionError) as fault:
        raise TokcompError(f"{path}: not a JSON file ({fault}); download the checkpoint again") from fault
    if not isinstance(values, dict):
        raise TokcompError(f"{path}: holds no JSON object; download the checkpoint again")
    return Settings(path, values)


def read_pixels(folder: Path) -> Settings:
    """What a checkpoint says of its image processor, empty where it says nothing.

    ``processor_config.json`` of transformers 5 holds it; where it does not, ``preprocessor_config.json`` does.
    """
    both = folder / "processor_config.json"
    if both.exists() and (nested := read_settings(both).part("image_processor")).values:
        return nested
    alone = folder / "preprocessor_config.json"
    return read_settings(alone) if alone.exists() else Settings(alone, {})


def token_id(folder: Path, text: str) -> int:
    """The id of a special token; raises ``TokcompError`` where no tokenizer file of the checkpoint has it."""
    for name, entries in (("tokenizer_config.json", _decoder), ("tokenizer.json", _added), ("tekken.json", _tekken)):
        if (folder / name).exists():
            for content, number in entries(read_settings(folder / name)):
                if content == text and type(number) is int and number >= 0:
                    return number
    raise TokcompError(f"{folder}: none of its tokenizer files has the token {text}; download the checkpoint again")


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 1 << 53) or (type(value) is float and math.isfinite(value))


def _decoder(tokenizer: Settings) -> list[tuple[Any, Any]]:
    entries = tokenizer.part("added_tokens_decoder").values
    return [
        (entry.get("content"), int(number))
        for number, entry in entries.items()
        if isinstance(entry, dict) and number.isdecimal()
    ]


def _added(tokenizer: Settings) -> list[tuple[Any, Any]]:
    return _listed(tokenizer.get("added_tokens"), "content", "id")


def _tekken(tokenizer: Settings) -> list[tuple[Any, Any]]:
    return _listed(tokenizer.get("special_tokens"), "token_str", "rank")


def _listed(entries: Any, text: str, number: str) -> list[tuple[Any, Any]]:
    entries = entries if isinstance(entries, list) else []
    return [(entry.get(text), entry.get(number)) for entry in entries if isinstance(entry, dict)]
