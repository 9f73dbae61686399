"""A Hugging Face checkpoint's folder as a source of towers, for models whose mmproj GGUF is wrong or absent.

Not by ``torch.onnx.export``: the tensors are read and given the names of an mmproj, so that the one graph builder
serves both sources. Pictures of any size, int8 and fp16, what methods ask of attention and the check against NumPy come
with it, torch is not needed, and nothing depends on what an exporter of the day makes of a model's Python.

Tensors are read one at a time, of fused or large ones only the part that is wanted; files, types and shapes are
checked before. safetensors' reader for NumPy reads bfloat16 once ml_dtypes is imported.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edge_tokcomp.errors import TokcompError

from .hf_metadata import metadata_of
from .hf_names import Names
from .hf_settings import read_pixels, read_settings, token_id
from .source import Floats, Source

_FLOATS = ("F64", "F32", "F16", "BF16")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PART_NAME = re.compile(r"[\w.+ -]{1,200}\.safetensors", re.ASCII)
"""A file beside the index, whatever the system; one with nothing of the tower need not be there."""


class Checkpoint(Source):
    """An open folder with ``config.json``, ``preprocessor_config.json`` and ``*.safetensors``, in parts or not.

    Raises ``TokcompError`` when something is missing, damaged or of a type without a family.
    """

    again: ClassVar[str] = "download the checkpoint again"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        config, pixels = read_settings(self.path / "config.json"), read_pixels(self.path)
        self.metadata = metadata_of(config, pixels)
        self._parts = dict(self._found())
        self.shapes = {name: part.shape for name, part in self._parts.items()}
        weights = sorted({part.tensor.file.path for part in self._parts.values()})
        self.files = (config.file, *([pixels.file] if pixels.values else []), *weights)

    def _found(self) -> Iterator[tuple[str, _Part]]:
        """Every tensor of the tower by its name in an mmproj, and where it lies."""
        names = Names(self.metadata)
        seen: dict[str, str] = {}
        files: dict[str, _File] = {}
        for stored, file in _places(self.path, files).items():
            name = names.of(stored)
            if name is None:
                continue
            if file not in files:
                files[file] = _File(self.path / file)
            for part, place in self._divided(name, files[file].tensor(stored)):
                if part in seen:
                    raise TokcompError(f"{self.path}: holds {part} twice, as {seen[part]} and {stored}; {self.again}")
                seen[part] = stored
                yield part, place

    def _divided(self, name: str, tensor: _Tensor) -> Iterator[tuple[str, _Part]]:
        """What an mmproj has of one tensor, under one name or several."""
        first, *others = tensor.shape or (0,)
        if ".attn_qkv." in name and not first % 3:
            for part, letter in enumerate("qkv"):
                rows = slice(part * first // 3, (part + 1) * first // 3)
                yield name.replace("attn_qkv", f"attn_{letter}"), _Part(tensor, (first // 3, *others), (rows,))
        elif name == "v.patch_embd.weight" and len(others) == 4:  # frames are the third axis
            for frame in range(min(others[1], 2)):
                shape = (first, others[0], *others[2:])
                yield f"{name}.{frame}" if frame else name, _Part(tensor, shape, (_ALL, _ALL, frame))
        elif name == "v.patch_embd.weight" and len(others) == 1 and 3 * _side(others[0]) ** 2 == others[0]:
            # A linear over the pixels of a patch, colours last.
            yield name, _Part(tensor, (first, 3, *[_side(others[0])] * 2), change=_colours_first)
        elif name == "v.token_embd.img_break":
            row = token_id(self.path, "[IMG_BREAK]")
            if row >= first:
                raise TokcompError(f"{self.path}: token {row} is not among the {first} rows of {tensor.name}")
            yield name, _Part(tensor, tuple(others), (row,))
        elif name == "mm.soft_emb_norm.weight":
            yield name, _Part(tensor, tensor.shape, change=_plus_one)
        else:
            yield name, _Part(tensor, tensor.shape)

    def _read(self, name: str) -> Floats:
        part = self._parts[name]
        values = part.tensor.read(part.index)
        return values if part.change is None else part.change(values)


@dataclass(frozen=True)
class _Part:
    """A tensor of the tower: ``index`` of a stored one, and what is then done to it; its ``shape`` at the end."""

    tensor: _Tensor
    shape: tuple[int, ...]
    index: tuple[slice | int, ...] = (slice(None),)
    change: Callable[[Floats], Floats] | None = None


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a safetensors file."""

    file: _File
    name: str
    shape: tuple[int, ...]

    def read(self, index: tuple[slice | int, ...]) -> Floats:
        """The part at ``index`` as ``float32``."""
        return np.asarray(self.file.slice(self.name)[index], dtype=np.float32)


class _File:
    """A safetensors file; raises ``TokcompError`` for one that is missing or damaged."""

    def __init__(self, path: Path) -> None:
        try:
            import ml_dtypes  # noqa: F401
            from safetensors import SafetensorError, safe_open
        except ImportError as fault:
            raise TokcompError(f"reading a checkpoint needs {fault.name}; pip install 'edge-tokcomp[hf]'") from fault
        self.path, self._fault = path, SafetensorError
        try:
            self._open: Any = safe_open(path, framework="numpy")
        except OSError as fault:
            reason = fault.strerror or str(fault)
            raise TokcompError(f"{path}: cannot be read ({reason}); {Checkpoint.again}") from fault
        except SafetensorError as fault:
            raise TokcompError(f"{path}: not a whole safetensors file ({fault}); {Checkpoint.again}") from fault

    def names(self) -> list[str]:
        """Of its tensors."""
        return list(self._open.keys())

    def slice(self, name: str) -> Any:
        """A tensor of which parts can be read; raises ``TokcompError`` where there is none of that name."""
        try:
            return self._open.get_slice(name)
        except self._fault as fault:
            raise TokcompError(f"{self.path}: tensor {name} is missing; {Checkpoint.again}") from fault

    def tensor(self, name: str) -> _Tensor:
        """A tensor of floating-point numbers; raises ``TokcompError`` for any other."""
        found = self.slice(name)
        kind = found.get_dtype()
        if kind not in _FLOATS:
            raise TokcompError(
                f"{self.path}: tensor {name} is of type {kind}, which cannot be read; "
                f"take the checkpoint that is not quantised ({', '.join(_FLOATS)})"
            )
        return _Tensor(self, name, tuple(found.get_shape()))


def _places(folder: Path, files: dict[str, _File]) -> Mapping[str, str]:
    """Which file each tensor lies in; ``files`` takes those that had to be opened for it."""
    index = folder / _INDEX
    if index.exists():
        places = read_settings(index).part("weight_map").values
        for place in places.values():
            if not isinstance(place, str) or not _PART_NAME.fullmatch(place):
                raise TokcompError(f"{index}: {place!a:.80} is no *.safetensors beside it; {Checkpoint.again}")
        return places
    names = [_WHOLE] if (folder / _WHOLE).exists() else sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise TokcompError(f"{folder}: holds no *.safetensors; name the folder of a Hugging Face checkpoint")
    files |= {name: _File(folder / name) for name in names}
    return {stored: name for name in names for stored in files[name].names()}


_ALL = slice(None)


def _colours_first(weight: Floats) -> Floats:
    """A patch embedding ``(D, side * side * 3)`` as the convolution ``(D, 3, side, side)``."""
    side = _side(weight.shape[1])
    return np.ascontiguousarray(weight.reshape(-1, side, side, 3).transpose(0, 3, 1, 2))


def _side(pixels: int) -> int:
    return math.isqrt(pixels // 3)


def _plus_one(weight: Floats) -> Floats:
    """Gemma's norms multiply by what they hold and one."""
    return np.asarray(weight + np.float32(1))
