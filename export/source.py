"""What a tower is built from: tensors by the names that an mmproj GGUF gives them, and its metadata."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.errors import TokcompError

Floats = NDArray[np.float32]


class Source(ABC):
    """An open file or folder with a vision tower and its projector.

    ``metadata``: as llama.cpp's converter writes it, plain Python values. ``shapes``: of the tensors, slowest axis
    first. ``files``: what decides the tower. ``again``: what a user can do about one that lacks something.
    """

    path: Path
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    files: tuple[Path, ...]
    again: ClassVar[str]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, slowest axis first; raises ``TokcompError`` when it is missing."""
        if name not in self.shapes:
            raise TokcompError(f"{self.path}: tensor {name} is missing; {self.again}")
        return self.shapes[name]

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ``TokcompError`` unless every tensor is there in its shape (axes of one may be missing or added)."""
        for name, wanted in shapes.items():
            found = self.shape(name)
            if _squeezed(found) != _squeezed(wanted):
                raise TokcompError(
                    f"{self.path}: tensor {name} is {found}, its metadata asks for {wanted}; {self.again}"
                )

    def tensor(self, name: str, shape: tuple[int, ...]) -> Floats:
        """One tensor as ``shape float32``; raises ``TokcompError`` if it is missing, of another shape or unreadable."""
        self.require({name: shape})
        return self._read(name).reshape(shape)

    @abstractmethod
    def _read(self, name: str) -> Floats:
        """A tensor that is there."""


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)
