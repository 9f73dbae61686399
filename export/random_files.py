"""Files of random weights: written in pieces of a few megabytes, whole or not at all, the same every time.

Values have the standard deviation 1 / sqrt(columns), so that activations stay of order one through all layers.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.language.gguf_header import read_header

from .building import folder_aside
from .tower_files import cache_directory

_SEED = 0
_PIECE_BYTES = 4 << 20
_ALIGNMENT = 32
_HEADER_BYTES = 32 << 20
"""More than metadata and vocabulary take."""

_FLOATS = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}
# A block of each type as it lies in the file, and the bits of one value.
_BLOCKS = {
    GGMLQuantizationType.Q4_0: (np.dtype([("d", "<u2"), ("quants", "u1", 16)]), 4),
    GGMLQuantizationType.Q8_0: (np.dtype([("d", "<u2"), ("quants", "u1", 32)]), 8),
    GGMLQuantizationType.Q6_K: (np.dtype([("quants", "u1", 192), ("scales", "i1", 16), ("d", "<u2")]), 6),
}
_SIGN = 0x8000
_INNER_SCALE = 8
"""Of Q6_K's sixteenths of a block; with 1, the block's own scale would be a subnormal float16."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tensor:
    """``extent`` rows first. ``centre``: the mean of a vector."""

    extent: tuple[int, ...]
    kind: GGMLQuantizationType = GGMLQuantizationType.F32
    centre: float = 0.0

    @property
    def n_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        if self.extent[-1] % block:
            raise ValueError(f"rows of {self.extent[-1]} are no whole blocks of {block} ({self.kind.name})")
        return math.prod(self.extent) // int(block) * int(block_bytes)


def cached_file(
    name: str,
    architecture: str,
    tensors: Mapping[str, Tensor],
    facts: object,
    describe: Callable[[gguf.GGUFWriter], None],
    cache: str | os.PathLike[str] | None = None,
) -> Path:
    """The GGUF ``random-NAME-….gguf`` in ``cache``, written there when it is missing or damaged.

    ``describe`` adds its metadata; ``facts``: what those say, for the file's name. Raises ``TokcompError`` when the
    disk has no room for it or cannot be written.
    """
    home = Path(cache) if cache is not None else cache_directory()
    digest = hashlib.sha256(f"{_SEED} {facts} {dict(tensors)}".encode()).hexdigest()[:12]
    target = home / f"random-{name}-{digest}.gguf"
    if target.exists():
        try:
            read_header(target)
            return target
        except TokcompError as fault:
            _log.warning("%s; writing it again", fault)
    needed = sum(tensor.n_bytes for tensor in tensors.values()) + _HEADER_BYTES
    with folder_aside(home) as partial:
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise TokcompError(
                f"{home}: {name} takes {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; make room or "
                "set EDGE_TOKCOMP_CACHE to a folder on another disk"
            )
        _log.info("writing random weights of %s (%.1f GB) to %s", name, needed / 1e9, target)
        try:
            _write(partial / target.name, architecture, tensors, describe)
            os.replace(partial / target.name, target)
        except OSError as fault:
            raise TokcompError(f"{target}: cannot be written ({fault.strerror})") from fault
    return target


def _write(
    path: Path, architecture: str, tensors: Mapping[str, Tensor], describe: Callable[[gguf.GGUFWriter], None]
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer)
    for name, tensor in tensors.items():
        writer.add_tensor_info(name, tensor.extent, np.dtype(np.float32), tensor.n_bytes, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    rng = np.random.default_rng(_SEED)
    with path.open("ab") as stream:
        stream.write(bytes(-stream.tell() % _ALIGNMENT))
        for tensor in tensors.values():
            for piece in pieces(rng, tensor):
                stream.write(piece)
            stream.write(bytes(-stream.tell() % _ALIGNMENT))


def pieces(rng: np.random.Generator, tensor: Tensor) -> Iterator[bytes]:
    """The tensor as it lies in the file, a few megabytes at a time."""
    if tensor.kind in _FLOATS:
        values = rng.standard_normal(tensor.extent, np.float32)
        columns = math.prod(tensor.extent[1:])
        values = tensor.centre + 0.1 * values if len(tensor.extent) == 1 else values / np.sqrt(columns)
        yield values.astype(_FLOATS[tensor.kind]).tobytes()
        return
    layout, bits = _BLOCKS[tensor.kind]
    levels = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    scale = 1 / np.sqrt(tensor.extent[-1]) / np.sqrt(np.mean(levels**2.0))
    left, step = tensor.n_bytes // layout.itemsize, _PIECE_BYTES // layout.itemsize
    while left:
        blocks = np.frombuffer(bytearray(rng.bytes(min(left, step) * layout.itemsize)), layout)
        left -= len(blocks)
        # Levels reach one further down than up. Scales of either sign, as in real files, make the mean 0; it would
        # otherwise grow from matrix to matrix.
        if tensor.kind == GGMLQuantizationType.Q6_K:
            blocks["scales"] = np.where(blocks["scales"] < 0, -_INNER_SCALE, _INNER_SCALE)
            blocks["d"] = np.float16(scale / _INNER_SCALE).view(np.uint16)
        else:
            blocks["d"] = (blocks["d"] & _SIGN) | np.float16(scale).view(np.uint16)
        yield blocks.tobytes()
