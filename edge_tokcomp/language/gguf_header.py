"""The header of a GGUF file, checked in Python before llama.cpp sees the file.

Files come from outside: every count and length is held against the file's size before it is believed. Arrays are
skipped, not decoded: ``gguf.GGUFReader`` makes a NumPy view for every element, which takes seconds and hundreds of
megabytes for a vocabulary of 150 000 tokens. Format: gguf specification, version 2 and 3.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ..errors import TokcompError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MOST_LAYERS = 512
_SPLIT_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``shape`` innermost first, as stored; ``offset`` in bytes from the start of the file.

    ``n_bytes`` is ``None`` for a type that the installed gguf package does not know.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    n_bytes: int | None

    @property
    def type_name(self) -> str:
        """The type's name (``Q8_0``), or its number where gguf has no name for it."""
        return GGMLQuantizationType(self.type_id).name if self.n_bytes is not None else f"type {self.type_id}"


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensor table of one file; ``arrays`` holds the length of each array value.

    ``spans``: where each metadata entry (key, type and value) lies, ``(first byte, byte after the last)``, in order.
    """

    path: Path
    metadata: Mapping[str, str | int | float | bool]
    arrays: Mapping[str, int]
    spans: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, TensorInfo]

    def text(self, key: str) -> str:
        """A string value, or ``""`` where the file has none."""
        value = self.metadata.get(key, "")
        return value if isinstance(value, str) else ""

    def number(self, key: str, default: float) -> float:
        """A numeric value, or ``default`` where the file has none."""
        value = self.metadata.get(key, default)
        return float(value) if isinstance(value, (int, float)) else default

    def integer(self, key: str, default: int) -> int:
        """An integer value, or ``default`` where the file has none; raises ``TokcompError`` for any other value."""
        value = self.metadata.get(key, default)
        if type(value) is not int:
            raise TokcompError(f"{self.path}: {key} is {value!r:.40}, not an integer; download the file again")
        return value

    def numbers(self, key: str) -> list[float]:
        """The values of the array ``key``; raises ``TokcompError`` unless these are numbers."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.spans[key][0] + 8 + len(key.encode()))
                _, kind, count = struct.unpack("<IIQ", stream.read(16))
                if kind in _SCALARS:
                    layout = struct.Struct("<" + _SCALARS[kind])
                    return [float(value) for (value,) in layout.iter_unpack(stream.read(count * layout.size))]
        except (OSError, struct.error) as fault:
            raise TokcompError(f"{self.path}: {key} cannot be read ({fault}); check the path") from fault
        raise TokcompError(f"{self.path}: damaged GGUF, {key} holds no numbers; convert it again")


def read_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Read and check a GGUF header; every tensor must lie inside the file.

    Raises ``TokcompError`` in one line for a file that is missing, unreadable, no GGUF, damaged or truncated.
    """
    place = Path(path)
    try:
        with place.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            magic = stream.read(4)
            if magic != b"GGUF":
                found = f"starts with {magic!r}" if magic else "is empty"
                raise TokcompError(f"{place}: not a GGUF file ({found}); a GGUF starts with b'GGUF'")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _parse(place, view, size)
    except OSError as fault:
        raise TokcompError(f"{place}: cannot be read ({fault.strerror or fault}); check the path") from fault
    except struct.error as fault:
        raise TokcompError(
            f"{place}: truncated GGUF, its header ends at byte {size}; download the file again"
        ) from fault
    except (ValueError, OverflowError) as fault:
        raise TokcompError(f"{place}: damaged GGUF header ({fault}); download the file again") from fault


def layer_count(header: GgufHeader) -> int:
    """Layers of a language model; raises ``TokcompError`` for a number that llama.cpp would end the process for."""
    layers = header.metadata.get(f"{header.text('general.architecture')}.block_count")
    if not isinstance(layers, int) or not 1 <= layers <= _MOST_LAYERS:
        raise TokcompError(f"{header.path}: says it has {layers} layers, not 1 to {_MOST_LAYERS}; download it again")
    return layers


def split_files(header: GgufHeader) -> list[Path]:
    """All files of a model: the file itself, or the parts of a split one in order.

    Raises ``TokcompError`` when ``header`` is a later part, a part is missing, or their number is none.
    """
    count = header.integer("split.count", 1)
    if count <= 1:
        return [header.path]
    match = _SPLIT_NAME.fullmatch(header.path.name)
    if match is None or int(match[3]) != count:
        raise TokcompError(
            f"{header.path}: part of a model in {count} files; keep the names as published (…-00001-of-{count:05}.gguf)"
        )
    parts = [header.path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if header.path != parts[0]:
        raise TokcompError(f"{header.path}: part {int(match[2])} of {count}; open the first part, {parts[0].name}")
    for part in parts:
        if not part.is_file():
            raise TokcompError(f"{part}: missing, the model has {count} parts; download it beside the others")
    return parts


class _Cursor:
    """A place in the file that cannot leave it."""

    def __init__(self, view: mmap.mmap, size: int) -> None:
        self.view, self.size, self.offset = view, size, 4

    def take(self, code: str) -> int | float | bool:
        layout = struct.Struct("<" + code)
        value: int | float | bool = layout.unpack_from(self.view, self.offset)[0]
        self.offset += layout.size
        return value

    def count(self, least_bytes: int) -> int:
        """A 64-bit count of things that take at least ``least_bytes`` each."""
        number = int(self.take("Q"))
        if number * least_bytes > self.size - self.offset:
            raise struct.error(f"{number} entries do not fit")
        return number

    def skip(self, n_bytes: int) -> None:
        if n_bytes > self.size - self.offset:
            raise struct.error(f"{n_bytes} bytes do not fit")
        self.offset += n_bytes

    def string(self) -> str:
        length = self.count(1)
        start = self.offset
        self.offset += length
        return self.view[start : self.offset].decode("utf-8", errors="replace")

    def skip_strings(self, number: int) -> None:
        unpack, view, offset, size = struct.Struct("<Q").unpack_from, self.view, self.offset, self.size
        for _ in range(number):
            offset += 8 + unpack(view, offset)[0]
            if offset > size:
                raise struct.error("a string does not fit")
        self.offset = offset


def _parse(path: Path, view: mmap.mmap, size: int) -> GgufHeader:
    cursor = _Cursor(view, size)
    version = int(cursor.take("I"))
    if version & 0xFFFF == 0:
        raise TokcompError(f"{path}: big-endian GGUF; convert it with gguf_convert_endian.py of gguf-py")
    if version not in (2, 3):
        raise TokcompError(f"{path}: GGUF version {version}; versions 2 and 3 can be read, convert the model again")
    n_tensors, n_values = cursor.count(24), cursor.count(13)
    metadata: dict[str, str | int | float | bool] = {}
    arrays: dict[str, int] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(n_values):
        start = cursor.offset
        key = cursor.string()
        if key in metadata or key in arrays:
            raise ValueError(f"metadata key {key!r} stands there twice")
        kind = int(cursor.take("I"))
        if kind == _ARRAY:
            arrays[key] = _skip_array(cursor)
        elif kind == _STRING:
            metadata[key] = cursor.string()
        elif kind in _SCALARS:
            metadata[key] = cursor.take(_SCALARS[kind])
        else:
            raise ValueError(f"metadata key {key!r} has the unknown type {kind}")
        spans[key] = (start, cursor.offset)
    tensors = _tensors(path, cursor, n_tensors, metadata.get("general.alignment", 32))
    return GgufHeader(path, metadata, arrays, spans, tensors)


def _skip_array(cursor: _Cursor) -> int:
    kind = int(cursor.take("I"))
    if kind == _STRING:
        number = cursor.count(8)
        cursor.skip_strings(number)
    elif kind in _SCALARS:
        width = struct.calcsize("<" + _SCALARS[kind])
        number = cursor.count(width)
        cursor.skip(number * width)
    else:
        raise ValueError(f"an array has the unknown item type {kind}")
    return number


def _tensors(path: Path, cursor: _Cursor, number: int, alignment: object) -> dict[str, TensorInfo]:
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(number):
        name = cursor.string()
        if name in entries:
            raise ValueError(f"tensor {name!r} stands there twice")
        dimensions = int(cursor.take("I"))
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(int(cursor.take("Q")) for _ in range(dimensions))
        entries[name] = (shape, int(cursor.take("I")), int(cursor.take("Q")))
    start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, (shape, type_id, relative) in entries.items():
        n_bytes = _tensor_bytes(name, shape, type_id)
        if start + relative + (n_bytes or 0) > cursor.size:
            raise TokcompError(
                f"{path}: truncated GGUF, tensor {name!r} ends at byte {start + relative + (n_bytes or 0)} "
                f"of a file of {cursor.size}; download the file again"
            )
        tensors[name] = TensorInfo(name, shape, type_id, start + relative, n_bytes)
    return tensors


def _tensor_bytes(name: str, shape: tuple[int, ...], type_id: int) -> int | None:
    if type_id not in GGMLQuantizationType.__members__.values():
        return None
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
    elements = 1
    for extent in shape:
        elements *= extent
    if shape[0] % block:
        raise ValueError(f"tensor {name!r} has rows of {shape[0]}, not whole blocks of {block}")
    return elements // int(block) * int(block_bytes)
