"""Reader of an mmproj GGUF: its metadata, and its tensors dequantised one at a time.

``gguf.GGUFReader`` trusts the counts in a file and makes an object of every array element, so the header is read with
suspicion first. The tensors a tower needs are checked by name and shape before the first of them is read.

Old converters wrote the two linears of a block's feed-forward under each other's name; here ``ffn_up`` always widens
and ``ffn_down`` always narrows. Queries, keys and values stored as one tensor (``attn_qkv``) are read as three.
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
from edge_tokcomp.language.gguf_header import read_header

_MOST_ELEMENTS = 1 << 16
"""Array elements in the metadata; an mmproj has some dozens."""


class Mmproj:
    """An open mmproj GGUF.

    ``metadata``: its key-value pairs as plain Python values. ``shapes``: of its tensors, slowest axis first. Raises ``TokcompError`` when the
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
        self.shapes = {name: _shape(tensor) for name, tensor in self._tensors.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, slowest axis first; raises ``TokcompError`` when it is missing."""
        stored, part = self._stored(name)
        if stored not in self._tensors:
            raise TokcompError(f"{self.path}: tensor {name} is missing; convert the model again")
        first, *others = self.shapes[stored]
        if part is not None and first % 3:
            raise TokcompError(f"{self.path}: tensor {stored} of {first} rows holds no queries, keys and values")
        return (first if part is None else first // 3, *others)

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
        stored, part = self._stored(name)
        tensor = self._tensors[stored]
        try:
            whole = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            return whole.reshape(shape) if part is None else whole.reshape(3, *shape)[part]
        except NotImplementedError as fault:
            raise TokcompError(
                f"{self.path}: tensor {name} is of type {tensor.tensor_type.name}, which cannot be read; "
                "use an F16 or Q8_0 file"
            ) from fault

    def _stored(self, name: str) -> tuple[str, int | None]:
        """What a tensor is called in the file, and which third of that it is where three are stored as one."""
        for part, letter in enumerate("qkv"):
            fused = name.replace(f".attn_{letter}.", ".attn_qkv.")
            if fused != name and fused in self._tensors:
                return fused, part
        if self._swapped and ".ffn_up." in name:
            return name.replace(".ffn_up.", ".ffn_down."), None
        if self._swapped and ".ffn_down." in name:
            return name.replace(".ffn_down.", ".ffn_up."), None
        return name, None

    def _has_swapped_ffn(self) -> bool:
        up, down = (self._tensors.get(f"v.blk.0.ffn_{way}.weight") for way in ("up", "down"))
        if up is None or down is None:
            return False
        width = self.metadata.get("clip.vision.embedding_length")
        if down.shape[0] != width:
            return False
        # A square feed-forward does not tell; only the old converters wrote whether there is a text encoder.
        return bool(up.shape[0] != width) or "clip.has_text_encoder" in self.metadata


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(length) for length in reversed(tensor.shape.tolist()))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)
