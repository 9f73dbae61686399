"""libmtmd, llama.cpp's own vision towers and projectors, by ``llama_cpp.mtmd_cpp`` (ctypes): a picture in, rows out.

For projectors of which we have no ONNX tower. libmtmd prepares and encodes a picture; its rows are compressed and fed
by us. Beside ``binding``, the one file that touches C functions; log lines go to the same logger.

Not thread-safe: one object, one thread at a time (calls release the GIL).
"""

from __future__ import annotations

import ctypes
import math
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from ..errors import ImageError, TokcompError, check_positive
from ..tokens import Origin
from .binding import Handle, _backend
from .model import LanguageModel
from .mtmd_file import check_projector

_MOST_PIXELS, _LONGEST_SIDE = 1 << 28, 1 << 16
"""libmtmd counts pixels, of whole tiles, in 32 bits, and makes no picture longer than this."""
_USUAL_SIDE = 512
"""Of a picture, where a file names none, and of the largest tiles."""
_PLACES = np.dtype([(name, np.uint32) for name in ("t", "x", "y", "z")])
_SECTIONS = ("t", "y", "x", "z")
"""Order of a row's four positions in a batch of llama.cpp."""
_WRAPPED = ("cogvlm", "hunyuanvl")
"""Of whose rows the first and the last are learned, and begin and end the picture."""
_NUMBERED = "hunyuanvl"
"""Puts a learned row after each line of a picture, and the picture's number into the fourth position of its rows."""
_PADDED, _PADDING = "deepseek4v", 3
"""Whose language model reads rows in blocks of four: padding before a picture brings it to the beginning of one."""


@dataclass(frozen=True, eq=False)
class TextPiece:
    """Marker tokens before, between or after image rows: ``tokens (n,) int32``."""

    tokens: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class ImagePiece:
    """Rows that stand for a picture, or for one tile of it.

    ``embeddings (n, row_width) float32``. ``n_pos``: how far the text that follows moves on. ``grid``: rows and columns
    of tokens, where they are known; ``cell (n,) int64``: each row's raster index in it, -1 for learned rows around and
    between. ``padding``: see ``Layout``. For M-RoPE models ``positions (4, n) int32``: ``(t, y, x, z)`` of a piece that
    starts at 0 in a prompt's first picture, and ``origin (4, n) int8``: an ``Origin`` of each.
    """

    embeddings: NDArray[np.float32]
    n_pos: int
    grid: tuple[int, int] | None
    cell: NDArray[np.int64]
    positions: NDArray[np.int32] | None = None
    origin: NDArray[np.int8] | None = None
    padding: int = 0


class MtmdEncoder(Handle):
    """A vision tower with its projector, and the markers around its rows, for one language model.

    ``projector``: its type, as the file names it. ``row_width``: width of the rows. ``causal``: whether an image row
    sees only those before it. ``grid_positions``: whether rows carry four positions (M-RoPE). ``preparing_s``: seconds
    that cutting and resizing the last picture took.
    """

    preparing_s = 0.0

    def __init__(self, mmproj: Path, model: LanguageModel, *, threads: int, gpu: bool = False) -> None:
        """Load the tower of ``mmproj`` for ``model``, which must stay open.

        Raises ``TokcompError`` when the file is damaged, holds no tower that libmtmd knows, or is another model's.
        """
        check_positive("threads", threads)
        projector = check_projector(mmproj)
        if projector.width != model.n_embd_inp:
            raise TokcompError(
                f"{mmproj} writes rows of {projector.width}, {model.path} takes {model.n_embd_inp}; "
                "use the mmproj and the language model of one model"
            )
        if not model.handle.has_tokenizer:
            raise TokcompError(f"{model.path}: carries no tokenizer, so that a picture's markers have no tokens")
        if gpu and not llama.llama_supports_gpu_offload():
            raise TokcompError(
                "gpu: this llama-cpp-python was built without a GPU backend; "
                "reinstall it with CMAKE_ARGS=-DGGML_CUDA=on (or your GPU's), or leave it out"
            )
        self._library = _library()
        parameters = self._library.mtmd_context_params_default()
        parameters.use_gpu, parameters.n_threads, parameters.print_timings = gpu, threads, False
        # Buffers then grow with the pictures; a warm-up reserves them for the largest there could be.
        parameters.warmup = False
        pointer = _backend.attempt(
            lambda: self._library.mtmd_init_from_file(os.fsencode(mmproj), model.handle.pointer, parameters)
        )
        if not pointer:
            raise TokcompError(f"{mmproj}: llama.cpp cannot load it ({_reason()})")
        super().__init__(pointer, self._library.mtmd_free, keep=model.handle)
        self.path, self.projector, self.row_width, self._model = mmproj, projector.kind, projector.width, model
        self._side, self._row_break = projector.image_size or _USUAL_SIDE, projector.row_break
        self.causal = not self._library.mtmd_decode_use_non_causal(pointer, None)
        self.grid_positions = bool(self._library.mtmd_decode_use_mrope(pointer))
        try:
            if self.projector == _NUMBERED and not self.grid_positions:  # libmtmd would end the process
                raise TokcompError(
                    f"{mmproj} needs a language model with positions by row and column (M-RoPE), {model.path} is none; "
                    "use the mmproj and the language model of one model"
                )
            self._check_markers()
        except BaseException:
            self.close()
            raise

    @cached_property
    def usual_tokens(self) -> int:
        """Image tokens of a square picture of the size that the file names."""
        with self._chunks(self._side, self._side, None) as chunks:
            images = [chunk for chunk in chunks if not self._is_text(chunk)]
            return sum(self._library.mtmd_input_chunk_get_n_tokens(chunk) for chunk in images)

    def encode(self, picture: NDArray[np.uint8]) -> list[TextPiece | ImagePiece]:
        """The pieces of an RGB ``picture (height, width, 3) uint8``, in the order in which they enter the prompt.

        Raises ``ImageError`` for a picture that libmtmd cannot prepare, ``TokcompError`` when it cannot encode it.
        """
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(f"a picture must be (height, width, 3) uint8, got {picture.shape} {picture.dtype}")
        height, width, _ = picture.shape
        if not height or not width:
            raise ImageError(f"{width} x {height} has no pixels")
        if height * width > _MOST_PIXELS or max(height, width) > _LONGEST_SIDE:
            raise ImageError(
                f"{width} x {height} is too large for llama.cpp, which takes {_MOST_PIXELS:,} pixels and sides of "
                f"{_LONGEST_SIDE:,}; make it smaller"
            )
        pixels = np.ascontiguousarray(picture)
        started = time.perf_counter()
        with self._chunks(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))) as chunks:
            self.preparing_s = time.perf_counter() - started
            return [TextPiece(self._tokens(chunk)) if self._is_text(chunk) else self._image(chunk) for chunk in chunks]

    @contextmanager
    def _chunks(self, width: int, height: int, pixels: Any) -> Iterator[list[Any]]:
        """A picture cut as the projector wants it; without ``pixels`` in form only."""
        # A closed one says so here; libmtmd would read freed memory.
        library, context, _ = self._library, self.pointer, self._model.handle.pointer
        with (
            Handle(library.mtmd_bitmap_init(width, height, pixels), library.mtmd_bitmap_free) as bitmap,
            Handle(library.mtmd_input_chunks_init(), library.mtmd_input_chunks_free) as chunks,
        ):
            marker = library.mtmd_default_marker()
            text = library.mtmd_input_text(marker, len(marker), False, True)
            bitmaps = (ctypes.c_void_p * 1)(bitmap.pointer)
            if _backend.attempt(lambda: library.mtmd_tokenize(context, chunks.pointer, text, bitmaps, 1)):
                raise ImageError(f"llama.cpp cannot prepare a picture of {width} x {height} ({_reason()})")
            count = library.mtmd_input_chunks_size(chunks.pointer)
            yield [library.mtmd_input_chunks_get(chunks.pointer, place) for place in range(count)]

    def _check_markers(self) -> None:
        """Find the markers that the vocabulary lacks, with a picture so large that it is cut into tiles."""
        side = 2 * max(self._side, _USUAL_SIDE)
        with self._chunks(side, side, None) as chunks:
            for chunk in filter(self._is_text, chunks):
                if self._tokens(chunk).min() < 0:
                    raise TokcompError(
                        f"{self._model.path}: its vocabulary lacks a marker that {self.projector} projectors need; "
                        f"use the language model that belongs to {self.path}"
                    )

    def _is_text(self, chunk: Any) -> bool:
        return bool(self._library.mtmd_input_chunk_get_type(chunk) == self._library.MTMD_INPUT_CHUNK_TYPE_TEXT)

    def _tokens(self, chunk: Any) -> NDArray[np.int32]:
        count = ctypes.c_size_t()
        start = self._library.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        return np.ctypeslib.as_array(start, (count.value,)).astype(np.int32)

    def _image(self, chunk: Any) -> ImagePiece:
        library = self._library
        if _backend.attempt(lambda: library.mtmd_encode_chunk(self.pointer, chunk)):
            raise TokcompError(f"{self.path}: llama.cpp cannot encode a picture ({_reason()})")
        count = library.mtmd_input_chunk_get_n_tokens(chunk)
        # The next chunk is written over this one.
        embeddings = np.ctypeslib.as_array(library.mtmd_get_output_embd(self.pointer), (count, self.row_width)).copy()
        if not np.isfinite(embeddings).all():
            self._mend(embeddings)
        n_pos = int(library.mtmd_input_chunk_get_n_pos(chunk))
        cell, square = np.arange(count), None
        if self.projector in _WRAPPED:
            cell = np.concatenate([[-1], np.arange(count - 2), [-1]])
            square = (math.isqrt(count - 2),) * 2  # CogVLM's
        if self.projector == _PADDED:
            return ImagePiece(embeddings, n_pos, *self._in_pairs(embeddings), padding=_PADDING)
        if not self.grid_positions:
            return ImagePiece(embeddings, n_pos, square, cell)
        image = library.mtmd_input_chunk_get_tokens_image(chunk)
        positions, later = (self._places(image, start, count) for start in (0, 1))
        origin = np.where(later > positions, Origin.START, Origin.NOTHING).astype(np.int8)
        columns, rows = library.mtmd_image_tokens_get_nx(image), library.mtmd_image_tokens_get_ny(image)
        if self.projector == _NUMBERED:
            row, column = np.divmod(cell, columns + 1)
            cell = np.where((cell < 0) | (column == columns), -1, row * columns + column)
            origin[3, origin[3] == Origin.NOTHING] = Origin.PICTURE
            return ImagePiece(embeddings, n_pos, (rows, columns), cell, positions, origin)
        # Tiles are numbered like text, and learned row ends may stand among the rows of a grid.
        grid = (rows, columns) if rows * columns == count and not positions[0].any() else None
        return ImagePiece(embeddings, n_pos, grid, cell, positions, origin)

    def _in_pairs(self, embeddings: NDArray[np.float32]) -> tuple[tuple[int, int], NDArray[np.int64]]:
        """Grid and cells of DeepSeek-V4's rows: padding, a learned row, lines two by two and these column by column,
        with row breaks, padding again and a learned row."""
        breaks = np.flatnonzero((embeddings == self._row_break).all(axis=1))
        first = _PADDING + 1
        rows, columns = len(breaks), (int(breaks[0]) - first) // 2
        pair, place = np.divmod(np.arange(len(embeddings)) - first, 2 * (columns + 1))
        row, column = 2 * pair + place % 2, place // 2
        inside = (pair >= 0) & (row < rows) & (column < columns)
        return (rows, columns), np.where(inside, row * columns + column, -1)

    def _mend(self, embeddings: NDArray[np.float32]) -> None:
        """Write Pixtral's row ends, which are not finite now and then: llama.cpp makes them by multiplying memory that
        nobody has written with 0 (``models/pixtral.cpp``, 0.3.36)."""
        wrong = ~np.isfinite(embeddings)
        rows = wrong.any(axis=1)
        if self._row_break is None or not (wrong | (embeddings == self._row_break))[rows].all():
            raise TokcompError(
                f"{self.path}: llama.cpp computes rows that are not finite; use a file of higher precision"
            )
        embeddings[rows] = self._row_break

    def _places(self, image: Any, start: int, count: int) -> NDArray[np.int32]:
        places = np.empty(count, _PLACES)
        pointer = places.ctypes.data_as(ctypes.POINTER(self._library.mtmd_decoder_pos))
        self._library.mtmd_helper_image_get_decoder_pos(image, start, pointer)
        return np.stack([places[section] for section in _SECTIONS]).astype(np.int32)


class _Log:
    """libmtmd's log lines, sent where llama.cpp's go; it prints them on stderr until told otherwise."""

    def __init__(self) -> None:
        self._captured = False

    def capture(self, library: Any) -> None:
        if not self._captured:
            _backend.start()
            library.mtmd_log_set(_backend._callback, None)
            # Made before the first encoder, so run after the last: nothing may reach into Python by then.
            weakref.finalize(self, library.mtmd_log_set, llama.llama_log_callback(), None)
            self._captured = True


_log = _Log()


def _library() -> Any:
    """``llama_cpp.mtmd_cpp``, which loads its shared library when imported."""
    try:
        import llama_cpp.mtmd_cpp as library
    except (ImportError, OSError, RuntimeError) as fault:
        raise TokcompError(
            f"this llama-cpp-python was built without libmtmd ({fault}); reinstall it without -DLLAVA_BUILD=OFF"
        ) from fault
    _log.capture(library)
    return library


def _reason() -> str:
    return " ".join(_backend.reason.split())
