"""A language model GGUF cut into layer segments: a directory of files that ``SegmentFiles`` reads, checked, and cached.

Each segment is a GGUF of its own, with the tensors of consecutive layers as they are, so that a chain of llama.cpp
contexts over them computes what one over the whole file does, and rows can be dropped in between. A directory is built
aside and renamed into place, so that it is whole or not there; of two builders at once the first one's is kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.language.gguf_header import split_files
from edge_tokcomp.language.segment_files import CUTTER, SegmentFiles, segment_name

from .building import discard, folder_aside, put, refuse_taken
from .check_segments import read_check, verify_segments
from .segment_plan import Source
from .tower_files import cache_directory

_SPARE_BYTES = 1 << 20
"""For folders and what else a file system notes."""

_log = logging.getLogger(__name__)


def split_model(
    lm: str | os.PathLike[str],
    at: Sequence[int],
    directory: str | os.PathLike[str],
    *,
    verify: bool = True,
    threads: int | None = None,
) -> Path:
    """Cut ``lm`` before the layers ``at`` into a new ``directory``, and return it.

    ``verify``: run the segments against the whole model, with ``threads``, by default every core. Raises
    ``TokcompError`` if the directory exists, the model cannot be cut, the disk is too small or the segments do not give
    the model's logits; ``UsageError`` for cuts that are none. Nothing is left behind then.
    """
    target = Path(directory)
    source, at = Source.read(lm), tuple(map(int, at))
    source.check_cuts(at)
    refuse_taken(target)
    with _built(source, at, target.parent, verify, threads) as partial:
        put(partial, target)
    return target


def cached_segments(
    lm: str | os.PathLike[str],
    at: Sequence[int],
    cache: str | os.PathLike[str] | None = None,
    *,
    verify: bool = True,
    threads: int | None = None,
) -> Path:
    """As ``split_model``, in the cache: built there when missing, damaged or, if that is asked for, not yet verified.

    The key is the fingerprint of the model's files and when they were last written, the cutter's version and the cuts.
    Segments of the same model that
    are cut at more layers do as well, and spare the disk. ``cache`` defaults to ``tower_files.cache_directory``.
    """
    home = Path(cache) if cache is not None else cache_directory()
    source, at = Source.read(lm), tuple(map(int, at))
    source.check_cuts(at)
    # The fingerprint is of samples: one tensor may differ between them, but not in a file written at the same instant.
    written = [path.stat().st_mtime_ns for path in split_files(source.header)]
    digest = hashlib.sha256(f"{source.fingerprint} {written}".encode()).hexdigest()
    stem = f"{digest[:32]}-cut{CUTTER}-"
    target = home / (stem + hashlib.sha256(",".join(map(str, at)).encode()).hexdigest()[:16])
    if not os.path.lexists(target):
        target = _cut_finer(home, stem, source, at) or target
    if os.path.lexists(target):
        try:
            _check_cached(target, source, at)
        except TokcompError as fault:
            _log.warning("%s; cutting the model again", fault)
        else:
            if verify and read_check(target) is None:
                _verify_cached(source, target, threads)
            return target
    _log.warning(
        "cutting %s at %s into %s, once; it takes the model's size on disk", source.header.path.name,
        ", ".join(map(str, at)), home,
    )  # fmt: skip
    with _built(source, at, home, verify, threads) as partial:
        try:
            _move_into_place(partial, target, source, at)
        except OSError as fault:
            raise TokcompError(
                f"{target}: cannot be written ({fault.strerror}); remove it or set EDGE_TOKCOMP_CACHE"
            ) from fault
    return target


def _cut_finer(home: Path, stem: str, source: Source, at: Sequence[int]) -> Path | None:
    """Segments of the model in the cache that are cut at all of ``at`` and as few other layers as may be."""
    found = []
    for folder in home.glob(f"{stem}*"):
        try:
            files = SegmentFiles.read(folder)
        except TokcompError:
            continue  # what is damaged is told of when it is asked for
        if files.source == source.fingerprint and set(at) <= set(files.cuts):
            found.append((len(files.cuts), folder))
    return min(found)[1] if found else None


@contextmanager
def _built(source: Source, at: Sequence[int], beside: Path, verify: bool, threads: int | None) -> Iterator[Path]:
    """All segments in a folder in ``beside``, to be renamed away; raises ``TokcompError``."""
    parts = source.segments(at)
    with folder_aside(beside) as partial:
        _check_space(partial, sum(part.n_bytes for part in parts) + _SPARE_BYTES)
        for number, part in enumerate(parts, start=1):
            path = partial / segment_name(number, len(parts))
            _log.info("writing %s, %.0f MB", path.name, part.n_bytes / 1e6)
            try:
                with path.open("xb") as stream:
                    part.write(stream)
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError as fault:
                raise TokcompError(f"{path}: cannot be written ({fault.strerror or fault})") from fault
        SegmentFiles.read(partial)
        if verify:
            verify_segments(source.header.path, partial, threads=threads)
        yield partial


def _check_space(folder: Path, needed: int) -> None:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as fault:
        raise TokcompError(f"{folder.parent}: cannot be written ({fault.strerror})") from fault
    if needed > free:
        raise TokcompError(
            f"{folder.parent}: the segments need {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; make room or "
            "name another place (--out; for the cache, EDGE_TOKCOMP_CACHE)"
        )


def _check_cached(target: Path, source: Source, at: Sequence[int]) -> None:
    """Raises ``TokcompError`` unless ``target`` holds these very segments."""
    files = SegmentFiles.read(target)
    if files.source != source.fingerprint or not set(at) <= set(files.cuts):
        raise TokcompError(f"{target}: holds other segments")


def _verify_cached(source: Source, target: Path, threads: int | None) -> None:
    """Segments that fail do not stay in the cache."""
    try:
        verify_segments(source.header.path, target, threads=threads)
    except TokcompError:
        with suppress(OSError):  # not ours to remove
            discard(target)
        raise


def _move_into_place(partial: Path, target: Path, source: Source, at: Sequence[int]) -> None:
    """Rename, unless another builder was first; what is damaged is taken away before."""
    while True:
        try:
            os.rename(partial, target)
            return
        except OSError:
            if not os.path.lexists(target):
                raise
        try:
            _check_cached(target, source, at)
            return
        except TokcompError:
            discard(target)
