"""Captions in files of their own beside the pictures: ``a.jpg`` gets ``a.txt``."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

from .errors import TokcompError, UsageError
from .files import write_whole
from .sources import EXTENSIONS, Source

_ENDS_THE_RUN = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS))
"""Faults of the disk: the next picture would meet them too."""


class SidecarError(TokcompError):
    """One sidecar cannot be read or written; the run goes on with the other pictures."""


def sidecar_extension(given: str | None) -> str | None:
    """The extension with its dot, None for none; raises ``UsageError`` for what is none, and for that of a picture."""
    if given is None:
        return None
    dotted = given if given.startswith(".") else f".{given}"
    if not re.fullmatch(r"(\.[\w-]+)+", dotted):
        raise UsageError(f"--sidecar {given}: name an extension such as .txt")
    if Path(f"a{dotted}").suffix.lower() in EXTENSIONS:
        raise UsageError(f"--sidecar {given} would write captions over pictures; name an extension such as .txt")
    return dotted


def sidecar_path(source: Source, extension: str) -> Path:
    """Where the caption of ``source`` goes: ``a.jpg`` to ``a.txt``."""
    return source.path.with_suffix(extension)


def check_sidecars(sources: Sequence[Source], extension: str, target: Path | None = None) -> None:
    """Raise ``UsageError`` when two pictures would share a sidecar, or one would be written over something.

    ``target``: the file the records go to.
    """
    pictures = {_place(source.path): source for source in sources}
    owners: dict[str, Source] = {}
    for source in sources:
        beside = sidecar_path(source, extension)
        place = _place(beside)
        if place in pictures:
            raise UsageError(f"the sidecar of {source.id} would be written over the picture {pictures[place].id}")
        if target is not None and place == _place(target):
            raise UsageError(
                f"the sidecar of {source.id} would be written over --out {target}; name another --sidecar or --out"
            )
        if place in owners:
            raise UsageError(
                f"{owners[place].id} and {source.id} would share the sidecar {beside.name}; "
                "rename one, or write to --out instead"
            )
        owners[place] = source


def _place(path: Path) -> str:
    return os.path.normcase(os.path.abspath(path))


def is_filled(path: Path) -> bool:
    """Whether a sidecar is there and not empty; raises ``SidecarError`` where that cannot be found out."""
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError as fault:
        raise SidecarError(f"{path}: cannot be read ({fault.strerror})") from fault


def holds(path: Path, text: str) -> bool:
    """Whether a sidecar can be read and says ``text``, as ``write_sidecar`` writes it."""
    try:
        content = _content(text)
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


def write_sidecar(path: Path, text: str) -> None:
    """Write ``text`` and a newline to ``path``, whole or not at all.

    Raises ``SidecarError`` for a fault of this one file, ``TokcompError`` for one of the disk.
    """
    try:
        write_whole(path, lambda stream: stream.write(_content(text)))
    except OSError as fault:
        kind = TokcompError if fault.errno in _ENDS_THE_RUN else SidecarError
        raise kind(f"{path}: cannot be written ({fault.strerror})") from fault


def _content(text: str) -> bytes:
    return f"{text}\n".encode()
