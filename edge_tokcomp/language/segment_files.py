"""A directory of layer segments: one language model cut into GGUF files of consecutive layers.

``segment-1-of-3.gguf`` holds the first layers, the last file the last ones, the output head, the token table and the
tokenizer. Each says in its metadata which model and which layers it is cut from, so that files of different cuts are
told apart before llama.cpp sees them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import TokcompError
from .gguf_header import GgufHeader, layer_count, read_header

CUTTER = 2
"""Raise it whenever segments of the same model and cuts change: those of another version are refused."""

PREFIX = "edge_tokcomp.segment."
"""Of the metadata keys ``index`` (from 1), ``count``, ``first_layer``, ``depth`` (layers of the whole model),
``source`` (fingerprint of its files), ``model`` (its file's name) and ``cutter``."""

_NAME = re.compile(r"segment-([1-9][0-9]*)-of-([1-9][0-9]*)\.gguf")


@dataclass(frozen=True)
class SegmentFiles:
    """Segments that belong together: ``cuts`` are the first layers of all but the first, ``depth`` all layers.

    ``source``: fingerprint of the model's files, as ``files.fingerprint`` gives it; ``name``: of the (first) file.
    """

    directory: Path
    paths: tuple[Path, ...]
    cuts: tuple[int, ...]
    depth: int
    architecture: str
    source: str
    name: str

    @property
    def layers(self) -> list[int]:
        """Of each segment, how many."""
        return [stop - start for start, stop in zip((0, *self.cuts), (*self.cuts, self.depth), strict=True)]

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> SegmentFiles:
        """Check the headers in ``directory``; no tensor is read.

        Raises ``TokcompError`` in one line for anything but the whole set of segments of one model.
        """
        folder = Path(directory)
        paths = _find(folder)
        headers = [read_header(path) for path in paths]
        for number, header in enumerate(headers, start=1):
            _check(header, number, headers[0], len(paths))
        architecture, source, depth, _ = _model(headers[0])
        starts = [_number(header, PREFIX + "first_layer") for header in headers]
        ends = [start + layer_count(header) for start, header in zip(starts, headers, strict=True)]
        for path, start, end in zip(paths, starts, [0, *ends], strict=False):
            if start != end:
                raise TokcompError(
                    f"{path}: begins at layer {start}, not {end}; it is of another cut, cut the model again"
                )
        if ends[-1] != depth:
            raise TokcompError(f"{folder}: holds layers 0 to {ends[-1] - 1} of {depth}; cut the model again")
        name = headers[0].text(PREFIX + "model")
        return cls(folder, tuple(paths), tuple(starts[1:]), depth, architecture, source, name)


def gpu_shares(gpu_layers: int, layers: Sequence[int]) -> list[int]:
    """What each segment is loaded with: llama.cpp counts from the end, the output first."""
    if gpu_layers < 0:
        return [gpu_layers] * len(layers)
    shares, rest = [], gpu_layers
    for number, count in enumerate(reversed(layers)):
        own = min(rest, count + (number == 0))
        shares.append(own + (number > 0 and own > 0))
        rest -= own
    return shares[::-1]


def segment_name(number: int, count: int) -> str:
    """Of the ``number``-th file, counted from 1, of ``count``."""
    return f"segment-{number}-of-{count}.gguf"


def _find(folder: Path) -> list[Path]:
    """The files in order, none missing and none too many."""
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix == ".gguf")
    except OSError as fault:
        raise TokcompError(f"{folder}: cannot be read ({fault.strerror}); name a directory of segments") from fault
    if not found:
        raise TokcompError(f"{folder}: holds no segments; make them with `edge-tokcomp split LM.gguf --at … --out DIR`")
    count = 0
    for path in found:
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise TokcompError(f"{path}: is no segment; a directory of segments holds no other GGUF file")
        count = count or int(match[2])
        if int(match[2]) != count or int(match[1]) > count:
            raise TokcompError(f"{path}: does not belong with {found[0].name}; keep one cut in a directory")
    paths = [folder / segment_name(number, count) for number in range(1, len(found) + 1)]
    for path in paths:
        if path not in found:
            raise TokcompError(f"{path}: missing, the model has {count} segments; cut it again")
    if len(found) < count:
        raise TokcompError(f"{folder / segment_name(len(found) + 1, count)}: missing, cut the model again")
    return paths


def _check(header: GgufHeader, number: int, first: GgufHeader, count: int) -> None:
    path = header.path
    if PREFIX + "cutter" not in header.metadata:
        raise TokcompError(f"{path}: is no segment but another GGUF file; remove it from the directory")
    cutter = _number(header, PREFIX + "cutter")
    if cutter != CUTTER:
        raise TokcompError(
            f"{path}: was cut by {'an older' if cutter < CUTTER else 'a newer'} version (cutter {cutter}, this one is "
            f"{CUTTER}); cut the model again"
        )
    if (_number(header, PREFIX + "index"), _number(header, PREFIX + "count")) != (number, count):
        raise TokcompError(
            f"{path}: is segment {_number(header, PREFIX + 'index')} of another cut; cut the model again"
        )
    if _model(header) != _model(first):
        raise TokcompError(f"{path}: is of another model than {first.path.name}; cut the model again")


def _model(header: GgufHeader) -> tuple[str, str, int, float]:
    """What all segments of a model have in common; of another width, rows would be read beyond their end."""
    architecture = header.text("general.architecture")
    width = header.number(f"{architecture}.embedding_length", 0)
    return architecture, header.text(PREFIX + "source"), _number(header, PREFIX + "depth"), width


def _number(header: GgufHeader, key: str) -> int:
    value = header.metadata.get(key)
    if not isinstance(value, int):
        raise TokcompError(f"{header.path}: damaged segment ({key} is {value!r}); cut the model again")
    return value
