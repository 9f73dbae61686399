"""The Hugging Face Hub: what a repository holds, by the Hub or by its cache, and what the Hub refuses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from . import __version__
from .errors import TokcompError, UsageError

REVISION = "main"
US: dict[str, Any] = {"library_name": "edge-tokcomp", "library_version": __version__}
"""How huggingface_hub introduces us."""

_KEY = re.compile("[0-9a-f]{64}|[0-9a-f]{40}")
_COMMIT = re.compile("[0-9a-f]{40}")
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True)
class HubFile:
    """``size`` in bytes. ``key``: SHA-256, or git's SHA-1 of a small file, or ``""`` where nobody gave one."""

    size: int
    key: str


@dataclass(frozen=True)
class Repository:
    """The GGUF files of a repository's main branch, by name, as they are at ``commit``.

    ``folder``: of the repository in the cache. ``offline``: why the Hub was not asked or did not answer; then ``files``
    are what the cache has.
    """

    name: str
    commit: str
    files: Mapping[str, HubFile]
    folder: Path
    offline: str = ""

    def __str__(self) -> str:
        return f"{self.name} in the cache" if self.offline else self.name

    @property
    def blobs(self) -> Path:
        """Where the cache has files, each under its key."""
        return self.folder / "blobs"

    @property
    def snapshot(self) -> Path:
        """Where it has links to them, under the names of this commit."""
        return self.folder / "snapshots" / self.commit


def open_repository(name: str) -> Repository:
    """List a repository of the Hub, or what the cache has of it where the Hub is out of reach.

    Raises ``TokcompError`` without huggingface_hub, for a repository that is not there or not open to the user, and
    when neither Hub nor cache know it.
    """
    # Else huggingface_hub also fetches a list from the Hub by which it describes itself more closely.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.file_download import repo_folder_name
    except ImportError as fault:
        raise TokcompError(f"pull needs huggingface_hub ({fault}); pip install 'edge-tokcomp[hub]'") from fault
    try:
        folder = Path(constants.HF_HUB_CACHE).expanduser().resolve() / repo_folder_name(repo_id=name, repo_type="model")
    except HFValidationError as fault:
        raise UsageError(str(fault)) from fault
    if constants.HF_HUB_OFFLINE:
        return _cached(name, folder, "HF_HUB_OFFLINE is set")
    try:
        return _listed(name, folder)
    except client_fault() as fault:
        reason = explain(name, fault)
        if isinstance(fault, HfHubHTTPError) and fault.response.status_code < 500:
            raise reason from fault
        return _cached(name, folder, str(reason))


def client_fault() -> type[Exception]:
    """What all faults of huggingface_hub's HTTP client are: requests, httpx or httpx2, by its version."""
    from huggingface_hub.errors import HfHubHTTPError

    kinds: list[type[Exception]] = [kind for kind in HfHubHTTPError.__mro__ if kind.__module__ != "builtins"]
    return kinds[-1]


def explain(name: str, fault: Exception) -> TokcompError:
    """One line for what the Hub says of a repository, or for its silence."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    hub = constants.ENDPOINT
    if isinstance(fault, GatedRepoError):
        return TokcompError(f"{name}: gated; ask for access at {hub}/{name}, then {_LOG_IN}")
    if isinstance(fault, RepositoryNotFoundError):
        return TokcompError(f"{name}: not at {hub}, or private; check the name, or {_LOG_IN}")
    if isinstance(fault, HfHubHTTPError) and not isinstance(fault, LocalEntryNotFoundError):
        status = fault.response.status_code
        if status in (401, 403):
            return TokcompError(f"{name}: {hub} refuses access ({status}); {_LOG_IN}")
        return TokcompError(f"{name}: {hub} answers {status}; try again later")
    return TokcompError(f"the Hugging Face Hub cannot be reached ({hub}: {_reason(fault)})")


def _reason(fault: BaseException) -> str:
    """What the system says at the bottom of it, in few words, or else the fault's own."""
    words, link = str(fault) or type(fault).__name__, fault
    while deeper := link.__cause__ or link.__context__:
        link = deeper
        if isinstance(link, OSError) and link.strerror:
            words = link.strerror
    return words


def _listed(name: str, folder: Path) -> Repository:
    from huggingface_hub import HfApi, constants

    try:
        info = HfApi(**US).model_info(
            name, revision=REVISION, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        files = {}
        for sibling in info.siblings or ():
            if _is_safe(sibling.rfilename):
                size, key = sibling.size, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
                if not isinstance(size, int) or size < 0 or not _KEY.fullmatch(key):
                    raise ValueError(f"{sibling.rfilename} has size {size} and digest {key}")
                files[sibling.rfilename] = HubFile(size, key)
        if not _COMMIT.fullmatch(info.sha):
            raise ValueError(f"commit {info.sha}")
    except client_fault():
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as fault:
        raise TokcompError(f"{constants.ENDPOINT}: answers as no Hub does ({fault}); check HF_ENDPOINT") from fault
    return Repository(name, info.sha, files, folder)


def _cached(name: str, folder: Path, offline: str) -> Repository:
    try:
        commit = (folder / "refs" / REVISION).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        commit = ""
    cache = Repository(name, commit, {}, folder, offline)
    files = {}
    for path in cache.snapshot.rglob("*") if _COMMIT.fullmatch(commit) else ():
        inside = path.relative_to(cache.snapshot).as_posix()
        if path.is_file() and _is_safe(inside):
            key = path.resolve().name
            files[inside] = HubFile(path.stat().st_size, key if _KEY.fullmatch(key) else "")
    if not files:
        raise TokcompError(f"{offline}, and the cache {folder.parent} has no GGUF of {name}")
    return Repository(name, commit, files, folder, offline)


def _is_safe(name: str) -> bool:
    """Whether it names a GGUF that will lie below the folder it is put into."""
    path = PurePosixPath(name)
    return path.suffix.lower() == ".gguf" and not path.is_absolute() and ".." not in path.parts and "\\" not in name
