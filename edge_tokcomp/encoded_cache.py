"""What towers said of pictures, kept so that asking again costs no encoding: in memory, and on disk if wanted.

Kept are the values an engine makes of a picture, dataclasses over arrays, by a key that holds the picture's content,
the tower and how it was run. Both places are bounded; what was used longest ago goes first.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import TokcompError, UsageError
from .files import read_npz, write_whole

logger = logging.getLogger(__name__)

MEMORY_BYTES = 64 << 20
"""By default: some 25 pictures of LLaVA-1.5."""

_MOST_ARRAYS = 4096
_LARGEST_FILE = 1 << 30
_SUFFIX = ".picture.npz"


class EncodedCache:
    """``memory_bytes``: in memory. ``folder``, ``disk_bytes``: on disk, in files named by the keys' digests."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES, folder: Path | None = None, disk_bytes: int = 0) -> None:
        """Raises ``TokcompError`` for a folder that cannot be made."""
        self.memory_bytes, self.folder, self.disk_bytes = memory_bytes, folder, disk_bytes
        self._held: OrderedDict[str, tuple[list[Any], int]] = OrderedDict()
        self._bytes = 0
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as fault:
                raise TokcompError(f"{folder}: cannot be written ({fault.strerror})") from fault

    def get(self, key: str, kinds: Sequence[type]) -> list[Any] | None:
        """The values put under ``key``, dataclasses of ``kinds``; None where there are none any more."""
        if key in self._held:
            self._held.move_to_end(key)
            return list(self._held[key][0])
        if self.folder is None:
            return None
        path = self._path(self.folder, key)
        try:
            arrays = read_npz(path, ["structure", *map(str, range(_MOST_ARRAYS))], _LARGEST_FILE)
            values = _unpacked(arrays, kinds)
            os.utime(path)  # now is when it was used last
        except (ValueError, KeyError, TypeError, OSError) as fault:
            if path.exists():
                logger.warning("%s: damaged, the picture is encoded again (%s)", path, fault)
                path.unlink(missing_ok=True)
            return None
        self._hold(key, values)
        return values

    def put(self, key: str, values: Sequence[Any]) -> None:
        """Keep ``values``; a disk that cannot be written is told once a picture and costs nothing else."""
        self._hold(key, list(values))
        if self.folder is None:
            return
        arrays: list[NDArray[Any]] = []
        structure = json.dumps([_packed(value, arrays) for value in values])
        if sum(array.nbytes for array in arrays) > min(self.disk_bytes, _LARGEST_FILE):
            return
        named = {str(number): array for number, array in enumerate(arrays)}
        named["structure"] = np.frombuffer(structure.encode(), np.uint8)
        try:
            write_whole(self._path(self.folder, key), lambda stream: np.savez(stream, **named))  # type: ignore[arg-type]
            self._make_room(self.folder)
        except OSError as fault:
            logger.warning("%s: the encoded picture is not kept (%s)", self.folder, fault.strerror or fault)

    def forget(self) -> None:
        """Hold nothing in memory."""
        self._held.clear()
        self._bytes = 0

    def _hold(self, key: str, values: list[Any]) -> None:
        size = sum(array.nbytes for value in values for array in _arrays(value))
        if size > self.memory_bytes:
            return
        self._bytes += size - (self._held.pop(key)[1] if key in self._held else 0)
        self._held[key] = values, size
        while self._bytes > self.memory_bytes:
            _, (_, dropped) = self._held.popitem(last=False)
            self._bytes -= dropped

    def _make_room(self, folder: Path) -> None:
        found = []
        for path in folder.glob(f"*{_SUFFIX}"):
            try:
                state = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            found.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.disk_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / f"{sha256(key.encode()).hexdigest()[:40]}{_SUFFIX}"


def disk_cache(size: str) -> EncodedCache:
    """One on disk alone, beside the towers, of a ``size`` such as ``4GB``; raises ``UsageError``, ``TokcompError``."""
    from .export.tower_files import cache_directory

    found = re.fullmatch(r"([0-9]{1,6})\s*([MG])i?B?", size.strip(), re.IGNORECASE)
    if not found or not int(found[1]):
        raise UsageError(f"image cache of {size!r}: write a size such as 500MB or 4GB")
    number = int(found[1]) * (10**6 if found[2].upper() == "M" else 10**9)
    return EncodedCache(0, cache_directory() / "pictures", number)


def _arrays(value: Any) -> Iterator[NDArray[Any]]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _arrays(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _arrays(getattr(value, field.name))


def _packed(value: Any, arrays: list[NDArray[Any]]) -> Any:
    """``value`` as JSON can write it, its arrays by their numbers in ``arrays``."""
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, tuple):
        return {"tuple": [_packed(part, arrays) for part in value]}
    if is_dataclass(value):
        inside = {field.name: _packed(getattr(value, field.name), arrays) for field in fields(value)}
        return {"kind": type(value).__name__, "fields": inside}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be kept")


def _unpacked(arrays: dict[str, NDArray[Any]], kinds: Sequence[type]) -> list[Any]:
    by_name = {kind.__name__: kind for kind in kinds}

    def made(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        if "array" in part:
            return arrays[str(part["array"])]
        if "tuple" in part:
            return tuple(made(inside) for inside in part["tuple"])
        return by_name[part["kind"]](**{name: made(inside) for name, inside in part["fields"].items()})

    return [made(part) for part in json.loads(arrays["structure"].tobytes())]
