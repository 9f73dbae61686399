"""Finding the pictures a command names: files, folders, globs, and a list on standard input."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from .errors import UsageError

EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        "jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "webp", "bmp", "dib", "tif", "tiff", "avif", "heic", "heif",
        "hif", "jp2", "j2k", "mpo", "ico", "tga", "ppm", "pgm", "pbm", "pnm", "qoi",
    )
)  # fmt: skip

_SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"BM",
    b"II*\x00",
    b"MM\x00*",
    b"qoif",
    b"\x00\x00\x00\x0cjP  ",
)


@dataclass(frozen=True)
class Source:
    """A picture to be captioned: where it lies, and ``id``, its path relative to the folder that was named."""

    path: Path
    id: str


def find_sources(names: Sequence[str], *, recursive: bool = False, listing: TextIO | None = None) -> list[Source]:
    """The pictures that ``names`` stand for, each once, sorted by id within each name.

    A file is taken as it is. A folder gives the files in it (below it with ``recursive``) that have a picture's
    extension in any case or start like one; hidden ones are left out. A glob is expanded where the shell did not.
    ``-`` reads one path a line, or separated by NUL, from ``listing`` (standard input).

    Raises ``UsageError`` for a name that stands for nothing.
    """
    found: dict[str, Source] = {}
    several = len(names) > 1
    for name in names:
        for source in _expand(name, recursive, several, listing):
            found.setdefault(os.path.abspath(source.path), source)
    return list(found.values())


def _expand(name: str, recursive: bool, several: bool, listing: TextIO | None) -> Iterator[Source]:
    if name == "-":
        for line in _lines(listing or sys.stdin):
            yield Source(Path(line), Path(line).as_posix())
        return
    path = Path(name)
    if path.is_dir():
        yield from _in_folder(path, recursive, several)
    elif path.exists():
        yield Source(path, path.as_posix() if several else path.name)
    elif glob.has_magic(name):
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        if not matches:
            raise UsageError(f"{name}: no file matches")
        for match in matches:
            if match.is_dir():
                yield from _in_folder(match, recursive, True)
            else:
                yield Source(match, match.as_posix())
    else:
        raise UsageError(f"{name}: no such file or folder")


def _lines(listing: TextIO) -> Iterable[str]:
    text = listing.read()
    return [line for line in (text.split("\0") if "\0" in text else text.splitlines()) if line.strip()]


def _in_folder(folder: Path, recursive: bool, several: bool) -> Iterator[Source]:
    paths: list[Path] = []
    for base, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        paths += [Path(base, name) for name in files if not name.startswith(".")]
    sources = [
        Source(path, path.as_posix() if several else path.relative_to(folder).as_posix())
        for path in paths
        if _is_picture(path)
    ]
    yield from sorted(sources, key=lambda source: source.id)


def _refuse(fault: OSError) -> None:
    raise UsageError(f"{fault.filename}: cannot be listed ({fault.strerror})")


def _is_picture(path: Path) -> bool:
    """By extension, else by the first bytes: a picture without its extension still counts."""
    if path.suffix.lower() in EXTENSIONS:
        return True
    try:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError:
        return False
    return (
        head.startswith(_SIGNATURES)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"heic", b"mif1"))
    )
