"""Finding the pictures a command names: files, folders, globs, and a list on standard input."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import UsageError
from .text import encodable

EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        "jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "webp", "bmp", "dib", "tif", "tiff", "avif", "heic", "heif",
        "hif", "jp2", "j2k", "mpo", "ico", "tga", "ppm", "pgm", "pbm", "pnm", "qoi",
    )
)  # fmt: skip

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"qoif", b"\x00\x00\x00\x0cjP  ")
_TIFF = (b"II*\x00", b"MM\x00*")


@dataclass(frozen=True)
class Source:
    """A picture to be captioned: where it lies, and ``id``, its path relative to ``root``, an absolute folder.

    ``root`` is the folder that was named, or that of the one file; with several names, where the command runs. In id
    and root, bytes of a file name that are no UTF-8 stand as ``\\xe9``, so that they can be written anywhere.
    """

    path: Path
    id: str
    root: str


def find_sources(names: Sequence[str], *, recursive: bool = False, listing: BinaryIO | None = None) -> list[Source]:
    """The pictures that ``names`` stand for, each once, sorted by id within each name.

    A file is taken as it is. A folder gives the files in it (below it with ``recursive``) that have a picture's
    extension in any case or start like one; hidden ones are left out, links to folders are not followed. A glob is
    expanded where the shell did not. ``-`` reads one path a line, or separated by NUL, from ``listing`` (standard
    input); its list may be empty.

    Raises ``UsageError`` for a name that stands for nothing and for a folder that cannot be listed.
    """
    found: dict[str, Source] = {}
    several = len(names) > 1
    try:
        here = os.path.realpath(os.curdir)
    except OSError as fault:
        raise UsageError(f"the current folder cannot be opened ({fault.strerror}); change to another") from fault
    for name in names:
        for source in _expand(name, recursive, several, here, listing):
            found.setdefault(os.path.abspath(source.path), source)
    return list(found.values())


def _expand(name: str, recursive: bool, several: bool, here: str, listing: BinaryIO | None) -> Iterator[Source]:
    if name == "-":
        yield from (_as_named(Path(line), here) for line in _lines(listing))
        return
    if not name:
        raise UsageError("an empty name stands for no file or folder")
    path = Path(name)
    try:
        is_folder, exists = path.is_dir(), os.path.lexists(path)
    except OSError as fault:
        raise UsageError(f"{name}: cannot be opened ({fault.strerror})") from fault
    if is_folder:
        inside = list(_in_folder(path, recursive, here if several else None))
        if not inside:
            hint = "" if recursive else "; --recursive goes into its sub-folders"
            raise UsageError(f"{name}: no pictures in this folder{hint}")
        yield from inside
    elif exists:
        yield _as_named(path, here) if several else _inside(path, path.parent, os.path.realpath(path.parent))
    elif glob.has_magic(name):
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        if not matches:
            raise UsageError(f"{name}: no file matches")
        for match in matches:
            if match.is_dir():
                yield from _in_folder(match, recursive, here)
            else:
                yield _as_named(match, here)
    else:
        raise UsageError(f"{name}: no such file or folder")


def _as_named(path: Path, here: str) -> Source:
    return Source(path, encodable(path.as_posix()), encodable(path.anchor if path.is_absolute() else here))


def _inside(path: Path, folder: Path, root: str) -> Source:
    return Source(path, encodable(path.relative_to(folder).as_posix()), encodable(root))


def _lines(listing: BinaryIO | None) -> list[str]:
    if listing is None:
        if sys.stdin is None:
            raise UsageError("-: standard input is closed; give it a list of files")
        listing = sys.stdin.buffer
    data = listing.read()
    lines = data.split(b"\0") if b"\0" in data else [line.rstrip(b"\r") for line in data.split(b"\n")]
    return [os.fsdecode(line) for line in lines if line.strip()]


def _in_folder(folder: Path, recursive: bool, here: str | None) -> Iterator[Source]:
    """The pictures of ``folder``; their ids are relative to it, or as they are named from ``here``."""
    root = os.path.realpath(folder)
    paths: list[Path] = []
    for base, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        paths += [Path(base, name) for name in files if not name.startswith(".")]
    pictures = [path for path in paths if _is_picture(path)]
    sources = [_inside(path, folder, root) if here is None else _as_named(path, here) for path in pictures]
    yield from sorted(sources, key=lambda source: source.id)


def _refuse(fault: OSError) -> None:
    raise UsageError(f"{fault.filename}: cannot be listed ({fault.strerror})")


def _is_picture(path: Path) -> bool:
    """By extension, else by the first bytes: a picture without its extension, or with an odd one, still counts.

    Raw photographs of many makers start like TIFF, hence that counts only where there is no extension.
    """
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
        or (head.startswith(_TIFF) and not path.suffix)
        or (head[:2] == b"BM" and head[6:10] == b"\0\0\0\0")
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"heic", b"mif1"))
    )
