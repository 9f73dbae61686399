"""Reader of an mmproj GGUF: its metadata, and its tensors dequantised one at a time.

``gguf.GGUFReader`` trusts the counts in a file and makes an object of every array element, so the header is read with
suspicion first. The tensors a tower needs are checked by name and shape before the first of them is read.

Old converters wrote the two linears of a block's feed-forward under each other's name; here ``ffn_up`` always widens
and ``ffn_down`` always narrows. Queries, keys and values stored as one tensor (``attn_qkv``) are read as three.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.language.gguf_header import read_header

from .source import Floats, Source

_MOST_ELEMENTS = 1 << 16
"""Array elements in the metadata; an mmproj has some dozens."""


class Mmproj(Source):
    """An open mmproj GGUF. Raises ``TokcompError`` when the file is missing, damaged, or no vision projector."""

    again: ClassVar[str] = "convert the model again"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = (self.path,)
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
            self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, KeyError, IndexError, OSError) as fault:
            raise TokcompError(f"{self.path}: not a readable GGUF ({fault}); download or convert it again") from fault
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._stored: dict[str, tuple[str, int | None]] = {}
        for name, place in self._names():
            if name in self._stored:
                raise TokcompError(
                    f"{self.path}: holds {name!r} twice, as {self._stored[name][0]!r} and {place[0]!r}; {self.again}"
                )
            self._stored[name] = place
        self.shapes = {name: self._shape(*place) for name, place in self._stored.items()}

    def _names(self) -> Iterator[tuple[str, tuple[str, int | None]]]:
        """Names here, and for each the name in the file and which third of that it is, where three are one there."""
        swapped = self._has_swapped_ffn()
        for stored in self._tensors:
            if ".attn_qkv." in stored:
                for part, letter in enumerate("qkv"):
                    yield stored.replace(".attn_qkv.", f".attn_{letter}."), (stored, part)
            elif swapped and ".ffn_up." in stored:
                yield stored.replace(".ffn_up.", ".ffn_down."), (stored, None)
            elif swapped and ".ffn_down." in stored:
                yield stored.replace(".ffn_down.", ".ffn_up."), (stored, None)
            else:
                yield stored, (stored, None)

    def _shape(self, stored: str, part: int | None) -> tuple[int, ...]:
        shape = tuple(int(length) for length in reversed(self._tensors[stored].shape.tolist()))
        if part is None:
            return shape
        if shape[0] % 3:
            raise TokcompError(f"{self.path}: tensor {stored} of {shape[0]} rows holds no queries, keys and values")
        return (shape[0] // 3, *shape[1:])

    def _read(self, name: str) -> Floats:
        stored, part = self._stored[name]
        tensor = self._tensors[stored]
        try:
            whole = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError as fault:
            raise TokcompError(
                f"{self.path}: tensor {name} is of type {tensor.tensor_type.name}, which cannot be read; "
                "use an F16 or Q8_0 file"
            ) from fault
        return whole if part is None else whole.reshape(3, -1)[part]

    def _has_swapped_ffn(self) -> bool:
        up, down = (self._tensors.get(f"v.blk.0.ffn_{way}.weight") for way in ("up", "down"))
        if up is None or down is None:
            return False
        width = self.metadata.get("clip.vision.embedding_length")
        if down.shape[0] != width:
            return False
        # A square feed-forward does not tell; only the old converters wrote whether there is a text encoder.
        return bool(up.shape[0] != width) or "clip.has_text_encoder" in self.metadata
