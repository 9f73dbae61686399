"""Reader of an mmproj GGUF: its metadata, and its tensors dequantised one at a time.

``gguf.GGUFReader`` trusts the counts in a file and makes an object of every array element, so the header is read with
suspicion first. The tensors a tower needs are checked by name and shape before the first of them is read.

Old converters wrote the two linears of a block's feed-forward under each other's name; here ``ffn_up`` always widens
and ``ffn_down`` always narrows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.families.base import TowerSpec
from edge_tokcomp.language.gguf_header import read_header

_MOST_ELEMENTS = 1 << 16
"""Array elements in the metadata; an mmproj has some dozens."""


class Mmproj:
    """An open mmproj GGUF.

    ``metadata``: its key-value pairs as plain Python values. ``names``: its tensors. Raises ``TokcompError`` when the
    file is missing, damaged, or no vision projector.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        header = read_header(self.path)
        kind = header.text("general.architecture")
        if kind != "clip" or header.metadata.get("clip.has_vision_encoder") is False:
            raise TokcompError(
                f"{self.path}: not a vision projector (architecture {kind!r}); name the model's mmproj file"
            )
        if sum(header.arrays.values()) > _MOST_ELEMENTS:
            longest = max(header.arrays, key=lambda key: header.arrays[key])
            raise TokcompError(
                f"{self.path}: array {longest} of {header.arrays[longest]} elements has no place in an mmproj"
            )
        try:
            reader = GGUFReader(self.path)
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, KeyError, IndexError, OSError) as fault:
            raise TokcompError(f"{self.path}: not a readable GGUF ({fault}); download or convert it again") from fault
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._swapped = self._has_swapped_ffn()
        self.names = frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, slowest axis first; raises ``TokcompError`` when it is missing."""
        stored = self._stored(name)
        if stored not in self._tensors:
            raise TokcompError(f"{self.path}: tensor {name} is missing; convert the model again")
        return tuple(int(length) for length in reversed(self._tensors[stored].shape.tolist()))

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ``TokcompError`` unless every tensor is there in its shape (axes of one may be missing or added)."""
        for name, wanted in shapes.items():
            found = self.shape(name)
            if _squeezed(found) != _squeezed(wanted):
                raise TokcompError(
                    f"{self.path}: tensor {name} is {found}, its metadata asks for {wanted}; convert the model again"
                )

    def tensor(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """One tensor as ``shape float32``; raises ``TokcompError`` if it is missing, of another shape or unreadable."""
        self.require({name: shape})
        tensor = self._tensors[self._stored(name)]
        try:
            return np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(shape)
        except NotImplementedError as fault:
            raise TokcompError(
                f"{self.path}: tensor {name} is of type {tensor.tensor_type.name}, which cannot be read; "
                "use an F16 or Q8_0 file"
            ) from fault

    def _stored(self, name: str) -> str:
        if not self._swapped:
            return name
        if ".ffn_up." in name:
            return name.replace(".ffn_up.", ".ffn_down.")
        return name.replace(".ffn_down.", ".ffn_up.")

    def _has_swapped_ffn(self) -> bool:
        up, down = (self._tensors.get(f"v.blk.0.ffn_{way}.weight") for way in ("up", "down"))
        if up is None or down is None:
            return False
        width = self.metadata.get("clip.vision.embedding_length")
        if down.shape[0] != width:
            return False
        # A square feed-forward does not tell; only the old converters wrote whether there is a text encoder.
        return bool(up.shape[0] != width) or "clip.has_text_encoder" in self.metadata


def tower_shapes(spec: TowerSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the tower of ``spec`` is made of."""
    width = spec.width
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (width, 3, spec.patch_size, spec.patch_size),
        "v.position_embd.weight": (spec.rows, width),
    }
    if spec.patch_bias:
        shapes["v.patch_embd.bias"] = (width,)
    if spec.class_token:
        shapes["v.class_embd"] = (width,)
    norms = ["v.pre_ln"] * spec.pre_norm
    linears: dict[str, tuple[int, int]] = {}
    for block in range(spec.blocks):
        norms += [f"v.blk.{block}.ln1", f"v.blk.{block}.ln2"]
        linears |= {f"v.blk.{block}.attn_{part}": (width, width) for part in ("q", "k", "v", "out")}
        linears |= {
            f"v.blk.{block}.ffn_up": (spec.ffn_width, width),
            f"v.blk.{block}.ffn_down": (width, spec.ffn_width),
        }
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def projector_shapes(spec: TowerSpec, mmproj: Mmproj) -> dict[str, tuple[int, ...]]:
    """Name and shape of the projector's tensors: linears, each as wide as the one before it ends."""
    shapes: dict[str, tuple[int, ...]] = {}
    width = spec.width
    for prefix in spec.projector_prefixes:
        into = mmproj.shape(f"{prefix}.weight")[0]
        shapes |= {f"{prefix}.weight": (into, width), f"{prefix}.bias": (into,)}
        width = into
    return shapes


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)
