"""Files of the Hugging Face Hub brought into its cache or a folder: whole, checked, and taken up where they stopped.

huggingface_hub begins a file anew that an earlier process did not finish (its issue 4196), and models are large. So
only its HTTP download is used: into a partial file beside the place, which is held against the Hub's digest and then
put where the cache looks for it, so that neither huggingface_hub nor llama.cpp fetches or stores it again.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import TokcompError, UsageError
from .hub import REVISION, US, HubFile, Repository, client_fault, explain

Told = Callable[[str], None]

_MOST_BYTES = 50 * 10**9
"""What the Hub sends of one file over plain HTTP."""
_QUIET_SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """A file on its way to ``target``, which is a blob of the cache if ``in_cache``.

    ``there``: it is there already. ``missing``: bytes still to be written. ``copy``: where the cache has it.
    """

    name: str
    file: HubFile
    target: Path
    in_cache: bool
    there: bool
    missing: int
    copy: Path | None = None

    @property
    def partial(self) -> Path:
        """Where it grows; the key keeps what is published later from being appended to it."""
        return self.target.with_name(f"{self.target.name}.{self.file.key[:8]}.partial")

    def __str__(self) -> str:
        if self.there:
            state = "there"
        elif self.copy:
            state = "to copy from the cache"
        elif self.missing < self.file.size:
            state = f"to fetch, {megabytes(self.file.size - self.missing)} of it are there"
        else:
            state = "to fetch"
        return f"{self.name}: {megabytes(self.file.size)}, {state}"


def plan(repository: Repository, name: str, out: Path | None) -> Job:
    """What there is to do for a file to lie in the cache, or in ``out`` under its name in the repository.

    Raises ``UsageError`` for a file of another size in its place, or a place that cannot be looked at.
    """
    file = repository.files[name]
    blob = repository.blobs / file.key
    target = blob if out is None else out / name
    try:
        cached = next((path for path in (repository.snapshot / name, blob) if path.is_file()), None)
        there = cached is not None if out is None else target.exists()
        if out is not None and there and (not target.is_file() or target.stat().st_size != file.size):
            raise UsageError(_taken(target))
        job = Job(name, file, target, out is None, there, 0 if there else file.size, cached if out else None)
        if there or job.copy or not job.partial.is_file():
            return job
        return replace(job, missing=max(file.size - job.partial.stat().st_size, 0))
    except OSError as fault:
        raise UsageError(f"{target}: cannot be opened ({fault.strerror})") from fault


def check_space(place: Path, needed: int) -> int:
    """Bytes free where ``place`` is or will be; raises ``TokcompError`` where they are fewer than ``needed``."""
    try:
        folder = next(folder for folder in (place, *place.resolve().parents) if folder.exists())
        free = shutil.disk_usage(folder).free
    except OSError as fault:
        raise UsageError(f"{place}: cannot be opened ({fault.strerror})") from fault
    if needed > free:
        raise TokcompError(
            f"{place}: {megabytes(needed)} to write and {megabytes(free)} free; make room, or use another --out"
        )
    return free


def megabytes(size: int) -> str:
    """As people read it."""
    return f"{size / 1e6:,.1f} MB"


def fetch(repository: Repository, job: Job, told: Told) -> Path:
    """Have the file whole and checked in its place; returns that. What has arrived is kept for a next time.

    Raises ``TokcompError`` when the Hub refuses or is lost, when the bytes are not those it promised, when the disk
    cannot take them, and while another process fetches them.
    """
    try:
        if not job.there:
            job.target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(job, told) as stream:
                if not job.target.exists():
                    _fill(repository, job, stream)
                    stream.flush()
                    told(f"checking {job.name}")
                    if not _is(job.partial, job.file):
                        job.partial.unlink()
                        raise TokcompError(f"{job.name}: arrived damaged and is removed; run the same command again")
                    os.replace(job.partial, job.target)
        elif not job.in_cache and not _is(job.target, job.file):
            raise UsageError(_taken(job.target))
        return _in_cache(repository, job) if job.in_cache else job.target
    except (OSError, client_fault()) as fault:
        if isinstance(fault, OSError) and fault.errno is not None and not isinstance(fault, client_fault()):
            raise TokcompError(f"{job.target}: cannot be written ({fault.strerror})") from fault
        have = job.partial.stat().st_size if job.partial.exists() else 0
        kept = f"; {megabytes(have)} of {job.name} are kept, the same command goes on from there" if have else ""
        raise TokcompError(f"{explain(repository.name, fault)}{kept}") from fault


def _fill(repository: Repository, job: Job, stream: _Partial) -> None:
    size = job.file.size
    if job.copy or stream.tell() > size:
        stream.seek(0)
        stream.truncate()
    if job.copy:
        with job.copy.open("rb") as source:
            shutil.copyfileobj(source, stream, 1 << 20)
        return
    if size > _MOST_BYTES:
        raise TokcompError(
            f"{job.name}: {megabytes(size)} is more than the Hub sends over plain HTTP; fetch it with "
            f"`hf download {repository.name} {job.name}`, then run the same command again"
        )
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repository.name, job.name, revision=repository.commit)
    while stream.tell() < size:
        begun = stream.tell()
        try:
            http_get(
                url, stream, resume_size=begun, headers=build_hf_headers(**US), expected_size=size,
                displayed_filename=job.name,
            )  # fmt: skip
        except HfHubHTTPError:
            raise
        except client_fault():
            if stream.tell() <= begun:  # else the network comes and goes: go on as long as it comes
                raise
        except OSError as fault:
            if fault.errno is not None:
                raise
            if not begun < stream.tell() <= size:
                raise TokcompError(f"{job.name}: does not arrive in the {size} bytes the Hub says it has") from fault


def _in_cache(repository: Repository, job: Job) -> Path:
    """The file's name in the cache, which leads to its blob."""
    if repository.offline:
        return repository.snapshot / job.name
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(repository.name, job.name, revision=REVISION, **US))
    if not job.there and not path.is_symlink():  # where there are no links it is a copy
        job.target.unlink(missing_ok=True)
    return path


class _Partial(io.BufferedWriter):
    """A growing file. Where no terminal shows huggingface_hub's bar, it says now and then how far it is."""

    def __init__(self, job: Job, told: Told) -> None:
        super().__init__(open(job.partial, "ab", buffering=0))  # noqa: SIM115
        self.job, self.told, self.begun = job, told, self.tell()
        self.started = self.last = time.monotonic()

    def write(self, data: Any) -> int:
        written = super().write(data)
        now = time.monotonic()
        if now - self.last > _QUIET_SECONDS and not sys.stderr.isatty():
            self.last = now
            rate = (self.tell() - self.begun) / (now - self.started) / 1e6
            size = megabytes(self.job.file.size)
            self.told(f"{self.job.name}: {megabytes(self.tell())} of {size}, {rate:.1f} MB/s")
        return written


@contextmanager
def _alone(job: Job, told: Told) -> Iterator[_Partial]:
    """The partial file, while no other process fetches it; one that got no bytes is removed."""
    with _Partial(job, told) as stream:
        _lock(stream, job.partial)
        try:
            yield stream
        finally:
            stream.flush()
            if job.partial.exists() and not job.partial.stat().st_size:
                job.partial.unlink()


def _lock(stream: io.BufferedWriter, path: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as fault:
        raise TokcompError(f"{path}: another process is fetching it; wait for that one") from fault
    except OSError:  # not every network disk has locks
        return


def _is(path: Path, file: HubFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    if not file.key:
        return True
    digest = hashlib.sha256() if len(file.key) == 64 else hashlib.sha1(f"blob {file.size}\0".encode())
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == file.key


def _taken(target: Path) -> str:
    return f"{target}: there is another file of that name; move it away, or use another --out"
