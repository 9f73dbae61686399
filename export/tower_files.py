"""A source of towers turned into a directory that ``edge_tokcomp.tower.Tower`` runs, checked, and cached.

Sources are an mmproj GGUF and the folder of a Hugging Face checkpoint.

A directory holds ``tower.onnx``, ``projector.onnx``, their weights (``.data``), ``attention.onnx`` (the tower again,
over the same weights, with attention and keys of the block that methods look at by default), ``separator.npy`` where
the model has one, and ``tower.json``: the ``TowerSpec``, what was exported from what, the check's figures, and size and
checksum of every file. It is built aside and renamed into place, so that it is whole or not there; of two builders at
once the first one's is kept. What a killed builder leaves behind is removed by the next one.

A tower of another kind, one that merges patches or tells of another block's attention, has a directory of its own, with
the plain tower's weights linked into it, and no ``attention.onnx``. What it merges is told when it runs: a session for
each size of pictures would not do, since opening one takes seconds (a ViT-L with 24 blocks, one thread: 2.5 to 3.8 s).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from threadpoolctl import threadpool_limits

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.families import Family, family_for, family_named
from edge_tokcomp.families.tower_spec import TowerSpec
from edge_tokcomp.tower import GraphName, Precision
from edge_tokcomp.variant import PLAIN, TowerKind

from .building import discard, folder_aside, put, refuse_taken
from .check import EXACT, Check, Reference, check_tower, trial
from .hf_checkpoint import Checkpoint
from .mmproj import Mmproj
from .shapes import language_width, projector_shapes, tower_shapes
from .source import Source
from .vit import write_projector, write_tower

EXPORTER = 5
"""Raise it whenever the graphs or the description (``TowerSpec``) written for the same file change, so also where a
family's recipe does: cached towers are then built anew."""

_MOST_BYTES = 1 << 20
"""Of a description; it has a few thousand."""

_GRAPHS: tuple[GraphName, ...] = ("tower", "attention")
_LINEARS = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_gate", "ffn_up", "ffn_down")
# Rungs of int8, fastest first: what stays in float32. A sharp attention suffers in the queries and keys, outliers in
# ffn_down's input. The projector always stays: its input is not normalised, and only kept rows pass through it.
_LEFT_ALONE: tuple[tuple[str, ...], ...] = ((), ("attn_q", "attn_k"), ("ffn_down",), ("attn_q", "attn_k", "ffn_down"))

# Cosines that differ by less may order themselves either way. int8 moves them by more than anything can be held to:
# there the reference merges what the export merges.
_SLACK: dict[Precision, float] = {"fp32": EXACT, "fp16": 4.0, "int8": 4.0}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TowerFiles:
    """An exported tower: where it is, its description, how far it is from the source.

    ``left_in_fp32``: linears that int8 leaves alone. ``kind``: what was asked for; ``graph``: which of the directory's
    it is.
    """

    directory: Path
    spec: TowerSpec
    precision: Precision
    check: Check
    left_in_fp32: tuple[str, ...]
    kind: TowerKind
    graph: GraphName = "tower"


def export_tower(
    source: str | os.PathLike[str], directory: str | os.PathLike[str], precision: Precision = "fp32"
) -> TowerFiles:
    """Export ``source``, an mmproj GGUF or a checkpoint's folder, into a new ``directory``; raises ``TokcompError`` if
    that exists or the source cannot be exported.

    Every export is run against the NumPy reference on one seeded picture; one beyond tolerance is an error. int8 takes
    the fastest choice of layers that stays within it.
    """
    target = Path(directory)
    refuse_taken(target)
    with _built(_Order(Path(source), precision), target.parent) as partial:
        put(partial, target)
    return _read(target)


def cached_tower(
    mmproj: str | os.PathLike[str],
    precision: Precision | None = None,
    cache: str | os.PathLike[str] | None = None,
    *,
    kind: TowerKind = PLAIN.kind,
    threads: int | None = None,
) -> TowerFiles:
    """The tower of ``mmproj`` from the cache, built there when it is missing or damaged; raises ``TokcompError``.

    ``precision``: fp32 by default. ``mmproj`` may be an exported directory, which is taken as it is: with no other
    precision than its own, without merges, and with the attention of no other block than methods usually look at.
    The key is the SHA-256 of the file, the exporter's version, the precision and the ``kind``; the usual block needs no
    tower of its own. ``UsageError`` for a kind that the tower cannot be. ``cache`` defaults to ``$EDGE_TOKCOMP_CACHE``,
    else to the platform's cache folder. ``threads``: of BLAS while a tower is built and checked; as many as it has by
    default.
    """
    if os.path.isdir(mmproj):
        return _exported(Path(os.path.abspath(mmproj)), precision, kind)
    home = Path(cache) if cache is not None else cache_directory()
    order = _Order(Path(mmproj), precision or "fp32", _sha256(Path(mmproj)), threads)
    if kind.merging:
        return _cached(replace(order, kind=kind), home)
    return _with_attention(_cached(order, home), kind) or _cached(replace(order, kind=kind), home)


def written_rows(mmproj: Path) -> tuple[int, Family]:
    """Width of the rows that the projector of ``mmproj`` writes, and their family; raises ``TokcompError`` for a file
    that is not whole.

    Nothing but the header is read.
    """
    source, spec = _opened(_Order(mmproj, "fp32"))
    return language_width(spec, source) * (1 + len(spec.deepstack)), family_named(spec.family)


@dataclass(frozen=True)
class _Order:
    """A tower to be built of ``source``, with ``threads`` for BLAS. ``digest``: the SHA-256 of its file, if it is known
    already."""

    source: Path
    precision: Precision
    digest: str | None = None
    threads: int | None = None
    kind: TowerKind = PLAIN.kind

    @property
    def folder(self) -> str:
        """Its name in the cache."""
        other = f"-{self.kind}" if self.kind != PLAIN.kind else ""
        if self.digest is None:
            raise ValueError("the folder in the cache is named by the file's digest")
        return f"{self.digest[:32]}-v{EXPORTER}-{self.precision}{other}"


def _cached(order: _Order, home: Path) -> TowerFiles:
    target = home / order.folder
    if os.path.exists(target):
        try:
            return _read(target, order.kind)
        except TokcompError as fault:
            _log.warning("%s; building the tower again", fault)
    plain = None
    if order.kind != PLAIN.kind:
        _opened(order)  # What cannot be is refused before the plain tower is built.
        plain = _cached(replace(order, kind=PLAIN.kind), home)
    _log.info("building the %s vision tower (%s) of %s in %s", order.precision, order.kind, order.source, target)
    with _built(order, home, plain) as partial:
        try:
            _move_into_place(partial, target, order.kind)
        except OSError as fault:
            raise TokcompError(
                f"{target}: cannot be written ({fault.strerror}); remove it or set EDGE_TOKCOMP_CACHE"
            ) from fault
    return _read(target, order.kind)


def cache_directory() -> Path:
    """``$EDGE_TOKCOMP_CACHE``, else ``edge-tokcomp`` in the platform's cache folder."""
    if chosen := os.environ.get("EDGE_TOKCOMP_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edge-tokcomp"
    variable, fallback = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    return Path(os.environ.get(variable) or Path.home() / fallback) / "edge-tokcomp"


def _opened(order: _Order) -> tuple[Source, TowerSpec]:
    """The source and the tower in it; raises ``TokcompError`` unless what is ordered can be built of them."""
    if order.precision not in get_args(Precision):
        raise UsageError(f"unknown precision {order.precision!r}; one of {', '.join(get_args(Precision))}")
    source = Checkpoint(order.source) if order.source.is_dir() else Mmproj(order.source)
    try:
        spec = family_for(source.metadata).spec(source.metadata, source.shapes)
    except TokcompError as fault:
        advice = str(fault).replace(Mmproj.again, source.again)  # Families know of mmproj files only.
        raise type(fault)(f"{order.source}: {advice}") from fault
    source.require(tower_shapes(spec) | projector_shapes(spec, source))
    trial(spec, order.kind)  # refuses what the tower cannot be
    if order.kind.merging and order.precision == "fp16":
        raise UsageError("patches cannot be merged inside a tower of fp16; use precision fp32 or int8")
    return source, spec


@contextmanager
def _built(order: _Order, beside: Path, plain: TowerFiles | None = None) -> Iterator[Path]:
    """The whole tower in a folder in ``beside``, to be renamed away; raises ``TokcompError``.

    ``plain``: the plain tower, where another is ordered.
    """
    source, spec = _opened(order)
    digest = order.digest or _sha256(*source.files)
    with folder_aside(beside) as partial:
        try:
            with threadpool_limits(limits=order.threads, user_api="blas"):
                if plain is None:
                    check, left_alone = _write_graphs(spec, source, partial, order)
                else:
                    check, left_alone = _write_kind(plain, source, partial, order), plain.left_in_fp32
            _log.info("%s tower (%s) of %s: %s", order.precision, order.kind, order.source, check)
            files = {
                path.name: {"bytes": path.stat().st_size, "crc32": _crc32(path)} for path in sorted(partial.iterdir())
            }
            body = {
                "exporter": EXPORTER, "source": order.source.absolute().name, "source_sha256": digest,
                "precision": order.precision, "left_in_fp32": left_alone, "kind": str(order.kind),
                "spec": spec.to_dict(), "check": check.to_dict(), "files": files,
            }  # fmt: skip
            text = json.dumps(body | {"crc32": _crc32_of(body)}, indent=1, sort_keys=True)
            (partial / "tower.json").write_text(text, encoding="utf-8")
        except OSError as fault:
            raise TokcompError(f"{partial}: cannot be written ({fault.strerror})") from fault
        yield partial


def _write_graphs(spec: TowerSpec, source: Source, into: Path, order: _Order) -> tuple[Check, tuple[str, ...]]:
    precision, threads = order.precision, order.threads or 1
    reference = Reference.of(spec, source)
    if not np.isfinite(reference.embeddings).all():
        raise TokcompError(f"{source.path}: its weights give no finite numbers; download or convert it again")
    half = precision == "fp16"
    write_projector(spec, source, into / "projector.onnx", half)
    if spec.separator:
        np.save(into / "separator.npy", source.tensor(spec.separator, (language_width(spec, source),)))

    def written(int8: Sequence[str] = ()) -> Check:
        plain, looking = (into / f"{graph}.onnx" for graph in _GRAPHS)
        write_tower(spec, source, plain, int8, half=half)
        write_tower(spec, source, looking, int8, TowerKind(block=spec.block(None)), plain, half)
        return check_tower(into, reference, threads, _GRAPHS)

    if precision != "int8":
        return _held(written(), source, order), ()
    for left_alone in _LEFT_ALONE:
        check = written([name for name in _LINEARS if name not in left_alone])
        if check.close:
            return check, left_alone
        _log.info("int8 with %s in fp32: %s, not enough", ", ".join(left_alone) or "nothing", check)
    return _held(check, source, order), left_alone


def _write_kind(plain: TowerFiles, source: Source, into: Path, order: _Order) -> Check:
    """The tower of ``plain`` as it is ordered otherwise, over the same weights."""
    spec, kind, threads = plain.spec, order.kind, order.threads or 1
    for name in _names(spec, kind)[1:]:  # ``tower.onnx`` is its own.
        try:
            os.link(plain.directory / name, into / name)
        except OSError:  # Some disks have no links.
            shutil.copyfile(plain.directory / name, into / name)
    int8 = [name for name in _LINEARS if name not in plain.left_in_fp32] if plain.precision == "int8" else []
    half = plain.precision == "fp16"
    write_tower(spec, source, into / "tower.onnx", int8, kind, plain.directory / "tower.onnx", half)
    reference = Reference.of_kind(spec, source, kind, into, _SLACK[plain.precision], threads)
    return _held(check_tower(into, reference, threads), source, order)


def _held(check: Check, source: Source, order: _Order) -> Check:
    """``check`` of what ``order`` asks for; raises ``TokcompError`` for one beyond tolerance."""
    if order.precision == "fp32" and not check.exact:
        raise TokcompError(
            f"{source.path}: its export ({order.kind}) differs from the source ({check}); please report this file"
        )
    if order.precision != "fp32" and not check.close:
        raise TokcompError(
            f"{source.path}: {order.precision} loses too much of this tower ({order.kind}; {check}); use precision fp32"
        )
    return check


def _move_into_place(partial: Path, target: Path, kind: TowerKind) -> None:
    """Rename, unless another builder was first; what is damaged is taken away before."""
    while True:
        try:
            os.rename(partial, target)
            return
        except OSError:
            if not target.exists():
                raise
        try:
            _read(target, kind)
            return
        except TokcompError:
            discard(target)


def _exported(directory: Path, precision: Precision | None, kind: TowerKind) -> TowerFiles:
    """The tower in a directory that a user names; raises ``TokcompError`` unless it is what is asked for."""
    if not (directory / "tower.json").exists() and (directory / "config.json").exists():
        raise UsageError(
            f"{directory}: a checkpoint; build its tower first: edge-tokcomp export --hf {directory} --out TOWER"
        )
    files = _read(directory)
    if precision not in (None, files.precision):
        raise UsageError(
            f"{directory}: a tower of precision {files.precision}, not {precision}; ask for precision "
            f"{files.precision}, or export another"
        )
    if kind.merging:
        raise UsageError(
            f"{directory}: patches cannot be merged inside a tower that is built; name the mmproj file, or choose a "
            "method that acts after the tower"
        )
    found = _with_attention(files, kind)
    if found is None:
        files.spec.block(kind.block)
        raise UsageError(
            f"{directory}: tells of the attention of block {files.spec.block(None)} only, not of block {kind.block}; "
            "name the mmproj file, or leave block out"
        )
    return found


def _with_attention(plain: TowerFiles, kind: TowerKind) -> TowerFiles | None:
    """Of the plain tower the graph of that ``kind``, which merges nothing, if it is one of its two."""
    if kind.block not in (None, plain.spec.block(None)):
        return None
    return replace(plain, kind=kind, graph="tower" if kind.block is None else "attention")


def _read(directory: Path, kind: TowerKind = PLAIN.kind) -> TowerFiles:
    """The description of a directory whose files all are as they were written; raises ``TokcompError``."""
    try:
        return _described(directory, kind)
    except TokcompError as fault:
        raise TokcompError(f"{directory}: {fault}") from fault
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise TokcompError(f"{directory}: not an exported tower ({fault})") from fault


def _described(directory: Path, kind: TowerKind) -> TowerFiles:
    if (directory / "tower.json").stat().st_size > _MOST_BYTES:
        raise TokcompError("tower.json is damaged")
    body = json.loads((directory / "tower.json").read_text(encoding="utf-8"))
    if body["exporter"] != EXPORTER:
        raise TokcompError("written by another version of edge-tokcomp; export the tower again")
    if body.pop("crc32") != _crc32_of(body) or body["kind"] != str(kind):
        raise TokcompError("tower.json is damaged")
    spec, precision = TowerSpec.from_dict(body["spec"]), body["precision"]
    family_named(spec.family)
    if precision not in get_args(Precision):
        raise TokcompError(f"precision {precision!r:.40} is none of {', '.join(get_args(Precision))}")
    names = _names(spec, kind)
    if set(body["files"]) != set(names):
        raise TokcompError(f"tower.json lists other files than {', '.join(names)}; export the tower again")
    for name in names:
        path, wanted = directory / name, body["files"][name]
        if path.stat().st_size != wanted["bytes"] or _crc32(path) != wanted["crc32"]:
            raise TokcompError(f"{name} is damaged")
    return TowerFiles(directory, spec, precision, Check(**body["check"]), tuple(body["left_in_fp32"]), kind)


def _names(spec: TowerSpec, kind: TowerKind) -> tuple[str, ...]:
    """The files of a tower besides its description."""
    files = ("tower.onnx", "tower.onnx.data", "projector.onnx", "projector.onnx.data")
    return (*files, *["attention.onnx"] * (kind == PLAIN.kind), *["separator.npy"] * bool(spec.separator))


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
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
