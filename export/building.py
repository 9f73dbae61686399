"""Folders in which something is built aside, and the removal of those whose builder is gone.

Beside its folder a builder keeps a file locked for as long as it lives; the system lets go of the lock however the
process ends. Where there are no such locks (Windows, some network disks) there is no such file either, and a folder
counts as abandoned when nothing was written in it for an hour.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from edge_tokcomp.errors import TokcompError

ABANDONED_S = 3600

_OURS = re.compile(r"\.(building|damaged)-[0-9a-f]{32}")


@contextmanager
def folder_aside(home: Path) -> Iterator[Path]:
    """A new folder in ``home``, removed at the end unless it was renamed away; abandoned ones are removed first.

    Raises ``TokcompError`` when ``home`` cannot be written.
    """
    try:
        if not home.exists():
            home.mkdir(parents=True, exist_ok=True)
        _sweep(home)
        folder, lock = _claim(home)
    except OSError as fault:
        raise TokcompError(
            f"{home}: cannot be written ({fault.strerror}); name another folder (for the cache, EDGE_TOKCOMP_CACHE)"
        ) from fault
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            _lock_path(folder).unlink(missing_ok=True)
            lock.close()


def refuse_taken(target: Path) -> None:
    """Raise ``TokcompError`` unless ``target`` is the name of nothing yet."""
    try:
        target.lstat()
    except FileNotFoundError:
        return
    except OSError as fault:
        raise TokcompError(f"{target}: cannot be written ({fault.strerror}); name another directory") from fault
    raise TokcompError(f"{target} already exists; name a new directory or remove it")


def put(folder: Path, target: Path) -> None:
    """Give a folder that was built aside its name; raises ``TokcompError``."""
    try:
        os.rename(folder, target)
    except OSError as fault:
        raise TokcompError(f"{target}: cannot be written ({fault.strerror}); name another directory") from fault


def discard(folder: Path) -> None:
    """Remove ``folder``, away from its name at once; raises ``OSError``."""
    grave = folder.with_name(f".damaged-{uuid.uuid4().hex}")
    os.rename(folder, grave)
    shutil.rmtree(grave, ignore_errors=True)


def _claim(home: Path) -> tuple[Path, BinaryIO | None]:
    """A new folder, and the open file whose lock says that its builder lives, where there are such locks."""
    while True:
        folder = home / f".building-{uuid.uuid4().hex}"
        path = _lock_path(folder)
        lock = path.open("xb")
        taken = _take(lock)
        if taken and path.exists():
            folder.mkdir()
            return folder, lock
        lock.close()
        if taken is None:
            path.unlink()
            folder.mkdir()
            return folder, None
        # A sweep came between opening and locking: it has the lock, or has removed the file.


def _sweep(home: Path) -> None:
    for path in list(home.iterdir()):
        name = path.name.removesuffix(".lock")
        if not _OURS.fullmatch(name):
            continue
        with suppress(OSError):  # Another sweep was faster, or it is not ours to remove.
            if name.startswith(".damaged"):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != name:
                with path.open("r+b") as lock:
                    if _take(lock):
                        shutil.rmtree(path.with_name(name), ignore_errors=True)
                        path.unlink()
            # A locked folder is gone before its lock is.
            elif not _lock_path(path).exists() and _idle_seconds(path) > ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)


def _take(lock: BinaryIO) -> bool | None:
    """Whether the lock was free and is ours now; None where there are no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _idle_seconds(folder: Path) -> float:
    return time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
