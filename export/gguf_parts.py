"""A GGUF file put together from parts of others, byte for byte: metadata entries and tensors are copied, not read.

``gguf.GGUFReader`` and ``GGUFWriter`` take seconds and half a gigabyte for a vocabulary of 150 000 tokens. Format: gguf
specification, version 3; entries of a version 2 file have the same bytes.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_BLOCK_BYTES = 4 << 20
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Piece:
    """``n_bytes`` of a file, from byte ``offset`` on."""

    path: Path
    offset: int
    n_bytes: int

    def read(self) -> bytes:
        """All of it; raises ``OSError``."""
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.n_bytes)


@dataclass(frozen=True)
class Tensor:
    """``shape`` innermost first, as stored; ``type_id`` in ggml's numbering."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    data: Piece | bytes

    @property
    def n_bytes(self) -> int:
        """Size of its data."""
        return _size(self.data)


@dataclass(frozen=True)
class GgufParts:
    """A file to be: metadata ``entries`` (key, type and value each), tensors, alignment of the tensors in bytes."""

    entries: Sequence[Piece | bytes]
    tensors: Sequence[Tensor]
    alignment: int

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        head = len(self._counts()) + sum(map(_size, self.entries)) + len(self._table())
        return self._padded(head) + sum(self._padded(tensor.n_bytes) for tensor in self.tensors)

    def write(self, stream: BinaryIO) -> None:
        """Write the file; memory stays flat. Raises ``OSError``."""
        stream.write(self._counts())
        for entry in self.entries:
            _copy(entry, stream)
        stream.write(self._table())
        for data in (b"", *(tensor.data for tensor in self.tensors)):
            _copy(data, stream)
            stream.write(bytes(-stream.tell() % self.alignment))

    def _counts(self) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.entries))

    def _table(self) -> bytes:
        table, offset = io.BytesIO(), 0
        for tensor in self.tensors:
            table.write(_string(tensor.name))
            table.write(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))
            table.write(struct.pack("<IQ", tensor.type_id, offset))
            offset += self._padded(tensor.n_bytes)
        return table.getvalue()

    def _padded(self, n_bytes: int) -> int:
        return n_bytes + -n_bytes % self.alignment


def entry(key: str, value: str | int | Sequence[bool]) -> bytes:
    """A metadata entry: a string, a number of 32 bits or an array of truth values."""
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, int):
        return _string(key) + struct.pack("<II", _UINT32, value)
    return _string(key) + struct.pack("<IIQ", _ARRAY, _BOOL, len(value)) + bytes(map(int, value))


def entry_slice(data: bytes, start: int, stop: int) -> bytes:
    """An array entry with the values from ``start`` to ``stop`` only; ``ValueError`` unless it holds numbers."""
    key, kind, items = _array(data)
    width = struct.calcsize("<" + _NUMBERS[kind])
    return key + struct.pack("<IIQ", _ARRAY, kind, stop - start) + items[start * width : stop * width]


def _array(data: bytes) -> tuple[bytes, int, bytes]:
    """Key (with its length), item type and items of an array entry."""
    end = 8 + struct.unpack_from("<Q", data)[0]
    _, kind, count = struct.unpack_from("<IIQ", data, end)
    if kind not in _NUMBERS:
        raise ValueError(f"an array of {count} entries holds no numbers")
    return data[:end], kind, data[end + 16 :]


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _size(data: Piece | bytes) -> int:
    return len(data) if isinstance(data, bytes) else data.n_bytes


def _copy(data: Piece | bytes, into: BinaryIO) -> None:
    if isinstance(data, bytes):
        into.write(data)
        return
    with data.path.open("rb") as stream:
        stream.seek(data.offset)
        left = data.n_bytes
        while left:
            block = stream.read(min(left, _BLOCK_BYTES))
            if not block:
                raise OSError(f"{data.path} grew shorter while it was copied")
            into.write(block)
            left -= len(block)
