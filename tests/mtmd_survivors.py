"""Loads variants of an mmproj and encodes a picture with each, in processes of their own: llama.cpp may end them.

A tensor is left out, an axis of it is one longer, its type is another; a number is another or of another type. What
killed its process is printed; everything else was refused in one line or encoded.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.export.gguf_parts import GgufParts, Piece, Tensor, entry
from edge_tokcomp.language.gguf_header import GgufHeader, TensorInfo, read_header
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.mtmd import MtmdEncoder

SECONDS = 30
F32, F16, Q8_0 = 0, 1, 8
NUMBERS = (0, 1, 3, 2**31 - 1)
NAMES = (
    "spatial_merge_size", "projector.scale_factor", "image_min_pixels", "image_max_pixels", "preproc_image_size",
    "preproc_min_tiles", "preproc_max_tiles", "attention.head_count_kv", "attention.head_dim", "n_wa_pattern",
)  # fmt: skip


def variants(header: GgufHeader) -> Iterator[tuple[str, dict[str, bytes | None], dict[str, Tensor | None]]]:
    """What is done, and what takes the place of metadata entries and tensors; None leaves them out."""
    for name, tensor in header.tensors.items():
        if ".blk." in name and ".blk.1." not in name:
            continue
        shape = tensor.shape
        yield f"{name} left out", {}, {name: None}
        yield f"{name} with a longer last axis", {}, {name: blank(tensor, (*shape[:-1], shape[-1] + 1), F32)}
        yield f"{name} with a longer first axis", {}, {name: blank(tensor, (shape[0] + 1, *shape[1:]), F32)}
        yield f"{name} in F16", {}, {name: blank(tensor, shape, F16)}
        if shape[0] % 32 == 0:
            yield f"{name} in Q8_0", {}, {name: blank(tensor, shape, Q8_0)}
    keys = {key for key in header.metadata if key.startswith("clip.")} | {f"clip.vision.{name}" for name in NAMES}
    for key in sorted(keys):
        value = header.metadata.get(key, 0)
        yield f"{key} left out", {key: None}, {}
        yield f"{key} as text", {key: entry(key, "other")}, {}
        yield f"{key} as an array", {key: entry(key, [True, False])}, {}
        if isinstance(value, (bool, str)):
            continue
        for number in NUMBERS:
            yield f"{key} {number}", {key: entry(key, number)}, {}
        yield f"{key} below 0", {key: head(key) + struct.pack("<If", 6, -1)}, {}
    for values in ([], [0, 0], [-1, 7], [50, 60, 30, 10], [2**30] * 2):
        for key in ("clip.vision.image_grid_pinpoints", "clip.vision.feature_layer"):
            array = struct.pack(f"<IIQ{len(values)}i", 9, 5, len(values), *values)
            yield f"{key} {values}", {key: head(key) + array}, {}


def head(key: str) -> bytes:
    """How a metadata entry begins."""
    return struct.pack("<Q", len(key)) + key.encode()


def blank(tensor: TensorInfo, shape: tuple[int, ...], type_id: int) -> Tensor:
    count = int(np.prod(shape))
    return Tensor(tensor.name, shape, type_id, bytes(count // 32 * 34 if type_id == Q8_0 else count * (4 >> type_id)))


def write(header: GgufHeader, path: Path, entries: dict[str, bytes | None], tensors: dict[str, Tensor | None]) -> None:
    spans = {key: Piece(header.path, start, stop - start) for key, (start, stop) in header.spans.items()}
    stored = {
        name: Tensor(name, tensor.shape, tensor.type_id, Piece(header.path, tensor.offset, tensor.n_bytes or 0))
        for name, tensor in header.tensors.items()
    }
    parts = GgufParts(
        [one for one in (spans | entries).values() if one is not None],
        [one for one in (stored | tensors).values() if one is not None], 32,
    )  # fmt: skip
    with path.open("wb") as stream:
        parts.write(stream)


def survives(lm: Path, mmproj: Path) -> bool:
    """Whether a child of this process outlives loading the file and encoding a picture."""
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        try:
            with LanguageModel.open(lm, threads=1) as model, MtmdEncoder(mmproj, model, threads=1) as encoder:
                encoder.encode(np.full((50, 70, 3), 99, np.uint8))
        except TokcompError as fault:
            os._exit("\n" in str(fault))
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    lm, source = Path(sys.argv[1]), Path(sys.argv[2])
    header, target, tried = read_header(source), source.with_suffix(".variant"), 0
    for done, entries, tensors in variants(header):
        write(header, target, entries, tensors)
        tried += 1
        if not survives(lm, target):
            sys.stdout.write(f"{done}\n")
    if tried < 200:
        raise SystemExit(f"only {tried} variants")
