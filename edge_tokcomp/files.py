"""Files written whole or not at all, and archives of arrays read with suspicion."""

from __future__ import annotations

import hashlib
import io
import math
import os
import tokenize
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

_BROKEN = (
    OSError, EOFError, ValueError, SyntaxError, RuntimeError, MemoryError, tokenize.TokenError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip
"""What reading a file that is no archive of arrays can raise, down to NumPy's header parser."""


def write_whole(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, and put it there once it is whole; a fault leaves what was there.

    The file has the mode of any new one. Links are followed. Raises ``OSError``, and what ``write`` raises.
    """
    target = Path(os.path.realpath(path))
    partial = target.parent / f".{uuid.uuid4().hex}.partial"
    stream = partial.open("xb")
    try:
        with stream:
            write(stream)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def fingerprint(*paths: Path) -> str:
    """Size, head and 64 samples of each file, digested: hashing a model's gigabytes would delay every start."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            for part in range(64):
                stream.seek(size * part // 64)
                digest.update(stream.read(1 << 14))
    return digest.hexdigest()


def read_npz(path: Path, names: Iterable[str], most_bytes: int) -> dict[str, NDArray[Any]]:
    """The arrays called ``names`` in an ``.npz``, those that are there, as read-only views of its bytes.

    Each array's declared size is checked before memory is taken for it, and the whole may unpack to ``most_bytes``.
    Raises ``ValueError`` with the reason in one line for a file that is missing, damaged or holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > most_bytes:
                raise ValueError(f"unpacks to more than {most_bytes >> 20:,} MiB")
            members = set(archive.namelist())
            return {name: _array(name, archive.read(f"{name}.npy")) for name in names if f"{name}.npy" in members}
    except _BROKEN as fault:
        reason = fault.strerror if isinstance(fault, OSError) else None
        raise ValueError(" ".join((reason or str(fault) or type(fault).__name__).split())) from fault


def _array(name: str, data: bytes) -> NDArray[Any]:
    stream = io.BytesIO(data)
    first = np.lib.format.read_magic(stream) == (1, 0)
    read_header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read_header(stream)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"{name} has the wrong type or size")
    flat = np.frombuffer(data, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if by_columns else "C")
