"""An mmproj GGUF turned into a directory that ``edge_tokcomp.tower.Tower`` runs, checked, and cached.

A directory holds ``tower.onnx``, ``projector.onnx``, their weights (``.data``) and ``tower.json``: the ``TowerSpec``,
what was exported from what, the check's figures, and size and checksum of every file. It is built aside and renamed
into place, so that it is whole or not there; of two builders at once the first one's is kept. What a killed builder
leaves behind is removed by the next one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from threadpoolctl import threadpool_limits

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.families import family_for
from edge_tokcomp.families.base import TowerSpec

from .building import discard, folder_aside
from .check import Check, Reference, check_tower
from .mmproj import Mmproj, projector_shapes, tower_shapes
from .vit import write_projector, write_tower

EXPORTER = 1
"""Raise it whenever the graphs written for the same file change: cached towers are then built anew."""

Precision = Literal["fp32", "int8"]
"""int8 stores and multiplies the blocks' matrices in 8 bits, quantising activations as they come: for CPUs."""

_LINEARS = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down")
# Rungs of int8, fastest first: what stays in float32. A sharp attention suffers in the queries and keys, outliers in
# ffn_down's input. The projector always stays: its input is not normalised, and only kept rows pass through it.
_LEFT_ALONE: tuple[tuple[str, ...], ...] = ((), ("attn_q", "attn_k"), ("ffn_down",), ("attn_q", "attn_k", "ffn_down"))

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TowerFiles:
    """An exported tower: where it is, its description, how far it is from the source."""

    directory: Path
    spec: TowerSpec
    precision: Precision
    check: Check


def export_tower(
    mmproj: str | os.PathLike[str], directory: str | os.PathLike[str], precision: Precision = "fp32"
) -> TowerFiles:
    """Export ``mmproj`` into a new ``directory``; raises ``TokcompError`` if it exists or the file cannot be exported.

    Every export is run against the NumPy reference on one seeded picture; one beyond tolerance is an error. int8 takes
    the fastest choice of layers that stays within it.
    """
    target = Path(directory)
    try:
        target.lstat()
    except FileNotFoundError:
        pass
    except OSError as fault:
        raise TokcompError(f"{target}: cannot be written ({fault.strerror}); name another directory") from fault
    else:
        raise TokcompError(f"{target} already exists; name a new directory or remove it")
    with _built(Path(mmproj), target.parent, precision, _sha256(Path(mmproj)), None) as partial:
        try:
            os.rename(partial, target)
        except OSError as fault:
            raise TokcompError(f"{target}: cannot be written ({fault.strerror})") from fault
    return _read(target)


def cached_tower(
    mmproj: str | os.PathLike[str],
    precision: Precision = "fp32",
    cache: str | os.PathLike[str] | None = None,
    *,
    threads: int | None = None,
) -> TowerFiles:
    """The tower of ``mmproj`` from the cache, built there when it is missing or damaged; raises ``TokcompError``.

    The key is the SHA-256 of the file, the exporter's version and the precision. ``cache`` defaults to
    ``$EDGE_TOKCOMP_CACHE``, else to the platform's cache folder. ``threads``: of BLAS while a tower is built and
    checked; as many as it has by default.
    """
    home = Path(cache) if cache is not None else cache_directory()
    digest = _sha256(Path(mmproj))
    target = home / f"{digest[:32]}-v{EXPORTER}-{precision}"
    if os.path.exists(target):
        try:
            return _read(target)
        except TokcompError as fault:
            _log.warning("%s; building the tower again", fault)
    _log.info("building the %s vision tower of %s in %s", precision, mmproj, target)
    with _built(Path(mmproj), home, precision, digest, threads) as partial:
        try:
            _move_into_place(partial, target)
        except OSError as fault:
            raise TokcompError(
                f"{target}: cannot be written ({fault.strerror}); remove it or set EDGE_TOKCOMP_CACHE"
            ) from fault
    return _read(target)


def cache_directory() -> Path:
    """``$EDGE_TOKCOMP_CACHE``, else ``edge-tokcomp`` in the platform's cache folder."""
    if chosen := os.environ.get("EDGE_TOKCOMP_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edge-tokcomp"
    variable, fallback = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    return Path(os.environ.get(variable) or Path.home() / fallback) / "edge-tokcomp"


@contextmanager
def _built(source: Path, beside: Path, precision: Precision, digest: str, threads: int | None) -> Iterator[Path]:
    """The whole tower in a folder in ``beside``, to be renamed away; raises ``TokcompError``."""
    if precision not in get_args(Precision):
        raise UsageError(f"unknown precision {precision!r}; one of {', '.join(get_args(Precision))}")
    mmproj = Mmproj(source)
    try:
        spec = family_for(mmproj.metadata).spec(mmproj.metadata, mmproj.names)
    except TokcompError as fault:
        raise TokcompError(f"{source}: {fault}") from fault
    mmproj.require(tower_shapes(spec) | projector_shapes(spec, mmproj))
    with folder_aside(beside) as partial:
        try:
            with threadpool_limits(limits=threads, user_api="blas"):
                check, left_alone = _write_graphs(spec, mmproj, partial, precision)
            _log.info("%s tower of %s: %s", precision, source, check)
            files = {
                path.name: {"bytes": path.stat().st_size, "crc32": _crc32(path)} for path in sorted(partial.iterdir())
            }
            body = {
                "exporter": EXPORTER, "source": source.name, "source_sha256": digest, "precision": precision,
                "left_in_fp32": left_alone, "spec": spec.to_dict(), "check": check.to_dict(), "files": files,
            }  # fmt: skip
            text = json.dumps(body | {"crc32": _crc32_of(body)}, indent=1, sort_keys=True)
            (partial / "tower.json").write_text(text, encoding="utf-8")
        except OSError as fault:
            raise TokcompError(f"{partial}: cannot be written ({fault.strerror})") from fault
        yield partial


def _write_graphs(spec: TowerSpec, mmproj: Mmproj, into: Path, precision: Precision) -> tuple[Check, tuple[str, ...]]:
    reference = Reference.of(spec, mmproj)
    if not np.isfinite(reference.embeddings).all():
        raise TokcompError(f"{mmproj.path}: its weights give no finite numbers; download or convert it again")
    write_projector(spec, mmproj, into / "projector.onnx")
    if precision == "fp32":
        write_tower(spec, mmproj, into / "tower.onnx")
        check = check_tower(into, reference)
        if not check.exact:
            raise TokcompError(f"{mmproj.path}: its export differs from the source ({check}); please report this file")
        return check, ()
    for left_alone in _LEFT_ALONE:
        write_tower(spec, mmproj, into / "tower.onnx", int8=[name for name in _LINEARS if name not in left_alone])
        check = check_tower(into, reference)
        if check.close:
            return check, left_alone
        _log.info("int8 with %s in fp32: %s, not enough", ", ".join(left_alone) or "nothing", check)
    raise TokcompError(f"{mmproj.path}: int8 loses too much of this tower ({check}); use precision fp32")


def _move_into_place(partial: Path, target: Path) -> None:
    """Rename, unless another builder was first; what is damaged is taken away before."""
    while True:
        try:
            os.rename(partial, target)
            return
        except OSError:
            if not target.exists():
                raise
        try:
            _read(target)
            return
        except TokcompError:
            discard(target)


def _read(directory: Path) -> TowerFiles:
    """The description of a directory whose files all are as they were written; raises ``TokcompError``."""
    try:
        body = json.loads((directory / "tower.json").read_text(encoding="utf-8"))
        if body.pop("crc32") != _crc32_of(body) or not body["files"]:
            raise TokcompError(f"{directory}: tower.json is damaged")
        for name, wanted in body["files"].items():
            path = directory / name
            if path.stat().st_size != wanted["bytes"] or _crc32(path) != wanted["crc32"]:
                raise TokcompError(f"{path} is damaged")
        spec, check = TowerSpec.from_dict(body["spec"]), Check(**body["check"])
        return TowerFiles(directory, spec, body["precision"], check)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise TokcompError(f"{directory}: not an exported tower ({fault})") from fault


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as fault:
        raise TokcompError(f"{path}: cannot be read ({fault.strerror})") from fault
    return digest.hexdigest()


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _crc32_of(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
