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

from .answers import Look
from .budget import tokens_to_keep
from .errors import TokcompError, UsageError
from .families.base import Part, Tokens
from .files import fingerprint
from .language.model import LanguageModel
from .language.mtmd import ImagePiece, MtmdEncoder, TextPiece
from .methods import Method, TowerMethod
from .tokens import Layout, VisionTokens
from .variant import PLAIN, TowerVariant

MARK = "<__media__>"
"""What stands for a picture in the text; nothing of a vocabulary."""


class MtmdEngine:
    """libmtmd's tower of ``mmproj`` for ``model``; ``why`` it is used."""

    name = "mtmd"
    precision = "gguf"
    """Its weights are computed with as the file holds them."""
    markers = (MARK,)
    written = MARK
    sizes_differ = True

    def __init__(self, mmproj: Path, model: LanguageModel, *, threads: int, gpu: bool, why: str) -> None:
        self.mmproj, self.reason = mmproj, f"llama.cpp's own (mtmd), on the {'GPU' if gpu else 'CPU'}: {why}"
        self._model = model
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

    def variant(self, method: Method, keep: int | float, picture: Pil.Image | None = None) -> TowerVariant:
        """Plain; raises ``UsageError`` for methods that have the tower run otherwise."""
        if isinstance(method, TowerMethod):
            raise UsageError(
                f"method {method.name} acts in the tower or before it, and this one is llama.cpp's own "
                f"({self.family_name}); choose another method"
            )
        return PLAIN

    def kept(self, method: Method, keep: int | float) -> int:
        """Rows of a picture of usual size that enter the language model under ``method``."""
        if not method.compresses:
            return self.crop_tokens
        return keep if isinstance(keep, int) else tokens_to_keep(keep, self.crop_tokens)

    def look(self, picture: Pil.Image, variant: TowerVariant = PLAIN) -> Look:
        """Have libmtmd prepare ``picture`` and encode its crops."""
        started = time.perf_counter()
        pieces = self._encoder.encode(np.asarray(picture))
        preprocess = self._encoder.preparing_s * 1e3
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
        layout = Layout.of_grids(*(self._grid(image) for image in images))
        if self.positions == "line" or self.row_width == self._model.n_embd:
            return VisionTokens(rows, layout)
        # Deepstack: further columns, which enter the language model deeper down.
        own, further = np.split(rows, [self._model.n_embd], axis=1)
        return VisionTokens(own, layout, np.asarray, carried=further)

    def _grid(self, image: ImagePiece) -> tuple[int, int]:
        count = len(image.embeddings)
        if self.positions == "line":
            return image.grid or (1, count)
        if image.grid is None or image.positions is None or image.moving is None:
            raise TokcompError(f"{self.mmproj}: where its rows stand ({self.family_name}) is not supported")
        row, column = np.divmod(np.arange(count), image.grid[1])
        nothing = np.zeros(count, np.int64)
        expected = np.stack([nothing, row, column, nothing])
        moving = np.array([1, 1, 1, 0])[:, None]
        if not (np.array_equal(image.positions, expected) and (image.moving == moving).all()) or image.n_pos != max(
            image.grid
        ):
            raise TokcompError(f"{self.mmproj}: where its rows stand ({self.family_name}) is not supported")
        return image.grid

    def close(self) -> None:
        """Free the tower."""
        self._encoder.close()
