"""Pictures to vision tokens by llama.cpp's own tower and projector (libmtmd), for models that have no tower here.

What comes out is of language width already; it is compressed as it is. libmtmd also says which tokens stand around and
between the crops, so that the text of the prompt holds a bare mark and no marker of the chat template's.
"""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image as Pil

from . import __version__
from .answers import Look, Shown
from .budget import tokens_to_keep
from .encoded_cache import EncodedCache
from .errors import TokcompError, UsageError
from .families.base import Part, Tokens
from .files import fingerprint
from .language.model import LanguageModel
from .language.mtmd import ImagePiece, MtmdEncoder, TextPiece
from .methods import AttentionMethod, Method, TowerMethod
from .tokens import Layout, Origin, Places, Role, VisionTokens
from .variant import PLAIN, TowerVariant

MARK = "<__media__>"
"""What stands for a picture in the text; nothing of a vocabulary."""


class MtmdEngine:
    """libmtmd's tower of ``mmproj`` for ``model``; ``why`` it is used; ``cache``: of what it said."""

    name = "mtmd"
    precision = "gguf"
    """Its weights are computed with as the file holds them."""
    markers = (MARK,)
    written = MARK
    sizes_differ = True

    def __init__(
        self, mmproj: Path, model: LanguageModel, *, threads: int, gpu: bool, why: str, cache: EncodedCache
    ) -> None:
        self.mmproj, self.reason = mmproj, f"llama.cpp's own (mtmd), on the {'GPU' if gpu else 'CPU'}: {why}"
        self._model, self.on_gpu, self._threads, self.cache = model, gpu, threads, cache
        self._encoder = MtmdEncoder(mmproj, model, threads=threads, gpu=gpu)
        self.row_width, self.causal = self._encoder.row_width, self._encoder.causal
        self.family_name = self._encoder.projector
        self.positions: Literal["line", "grid"] = "grid" if self._encoder.grid_positions else "line"

    @cached_property
    def crop_tokens(self) -> int:
        """Tokens of a picture of the size that the file names."""
        return self._encoder.usual_tokens

    @cached_property
    def directory(self) -> Path:
        """Where what is measured of this model is kept."""
        from .export.tower_files import cache_directory

        folder = Path(cache_directory(), f"{fingerprint(self.mmproj)[:32]}-mtmd")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise TokcompError(f"{folder}: cannot be written ({fault.strerror}); set EDGE_TOKCOMP_CACHE") from fault
        return folder

    @cached_property
    def _words(self) -> str:
        """Tells vocabularies apart, in which markers have their tokens."""
        return fingerprint(self._model.path)

    def show(self, picture: Pil.Image) -> Shown:
        """``picture``, to be looked at; libmtmd cuts its crops and does not give them."""
        return Shown(picture)

    def variant(self, method: Method, keep: int | float, shown: Shown | None = None) -> TowerVariant:
        """Plain; raises ``UsageError`` for methods that have the tower run otherwise."""
        if isinstance(method, TowerMethod):
            raise UsageError(
                f"method {method.name} acts in the tower or before it, and this one is llama.cpp's own "
                f"({self.family_name}); choose another method"
            )
        if isinstance(method, AttentionMethod) and method.block is not None:
            raise UsageError(
                f"method {method}: the block is of our own towers, and this one is llama.cpp's own "
                f"({self.family_name}); leave block out"
            )
        return PLAIN

    def kept(self, method: Method, keep: int | float) -> int:
        """Rows of a picture of usual size that enter the language model under ``method``."""
        if not method.compresses:
            return self.crop_tokens
        return keep if isinstance(keep, int) else tokens_to_keep(keep, self.crop_tokens)

    def look(self, shown: Shown, variant: TowerVariant = PLAIN, content: str = "") -> Look:
        """Have libmtmd prepare a picture and encode its crops, unless ``cache`` holds what it says of this
        ``content``, a digest."""
        started, preprocess = time.perf_counter(), 0.0
        key = f"{content} {self.directory.name} {self._words} {__version__}"
        pieces = self.cache.get(key, (ImagePiece, TextPiece)) if content else None
        if pieces is None:
            pieces = self._encoder.encode(np.asarray(shown.picture))
            preprocess = self._encoder.preparing_s * 1e3
            if content:
                self.cache.put(key, pieces)
        encode = (time.perf_counter() - started) * 1e3 - preprocess
        images = [piece for piece in pieces if isinstance(piece, ImagePiece)]
        parts: list[Part] = []
        for piece in pieces:
            if isinstance(piece, TextPiece):
                parts.append(Tokens(tuple(piece.tokens.tolist())))
            else:
                parts.append((sum(isinstance(part, tuple) for part in parts),))
        return Look(self._tokens(images), tuple(parts), None, {"preprocess": preprocess, "encode": encode})

    def _tokens(self, images: list[ImagePiece]) -> VisionTokens:
        rows = np.concatenate([image.embeddings for image in images])
        layout = self._layout(images)
        if self.positions == "line" or self.row_width == self._model.n_embd:
            return VisionTokens(rows, layout)
        # Deepstack: further columns, which enter the language model deeper down.
        own, further = np.split(rows, [self._model.n_embd], axis=1)
        return VisionTokens(own, layout, np.asarray, carried=further)

    def _layout(self, images: list[ImagePiece]) -> Layout:
        counts = [len(image.cell) for image in images]
        cell, places = np.concatenate([image.cell for image in images]), None
        if self.positions == "grid" and not all(map(_on_its_grid, images)):
            places = Places(
                np.concatenate([image.positions for image in images if image.positions is not None], axis=1),
                np.concatenate([image.origin for image in images if image.origin is not None], axis=1),
                tuple(image.n_pos for image in images),
            )
        return Layout(
            tuple(image.grid or (1, count) for image, count in zip(images, counts, strict=True)),
            np.repeat(np.arange(len(images)), counts), cell,
            np.where(cell < 0, Role.SEPARATOR, Role.PATCH).astype(np.int8), places=places,
            padding=images[0].padding,
        )  # fmt: skip

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from now on, which takes opening the tower anew."""
        if threads != self._threads:
            self._encoder.close()
            self._encoder = MtmdEncoder(self.mmproj, self._model, threads=threads, gpu=self.on_gpu)
            self._threads = threads

    def close(self) -> None:
        """Free the tower."""
        self._encoder.close()


def _on_its_grid(image: ImagePiece) -> bool:
    """Whether all its rows stand at row and column of its grid, at one time, and the text where the grid ends."""
    if image.grid is None or image.positions is None or image.origin is None:
        return False
    row, column = np.divmod(image.cell, image.grid[1])
    at = np.stack([0 * row, row, column, 0 * row])
    origin = np.array([Origin.START] * 3 + [Origin.NOTHING])[:, None]
    alike = np.array_equal(image.positions, at) and bool((image.origin == origin).all())
    return alike and image.n_pos == max(image.grid)
