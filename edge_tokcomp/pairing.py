"""Whether a language model and an mmproj belong together, told from their headers before memory is taken for either."""

from __future__ import annotations

from pathlib import Path

from .errors import TokcompError, UnsupportedError
from .families import Family
from .language.gguf_header import GgufHeader, read_header
from .segmenting import model_files

_ALWAYS_ON_GRID = {
    "qwen2vl", "paddleocr", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen4exp", "qwen3tts",
}  # fmt: skip
"""Architectures that llama.cpp gives M-RoPE (``llama_model_rope_type`` of llama-cpp-python 0.3.36); others have it
where their header has sections of it (GLM-4V)."""


def check_pair(lm: Path, mmproj: Path) -> None:
    """Raise ``TokcompError`` for an ``mmproj`` that is damaged or no part of the model that ``lm`` is: rows of another
    width than it takes, or a grid of positions for a model that counts on as in text (and the reverse).

    A tower's directory is not looked into: it says what it is once it is open. Nor is it told here what positions the
    models have that only llama.cpp's own tower serves.
    """
    header = read_header(model_files(lm)[0])
    architecture = header.text("general.architecture")
    n_embd = header.integer(f"{architecture}.embedding_length", 0)
    takes = n_embd * (1 + header.integer(f"{architecture}.n_deepstack_layers", 0))
    if not takes or mmproj.is_dir():
        return
    writes, family = _written(mmproj)
    if writes != takes:
        raise TokcompError(f"{mmproj} writes rows of {writes}, {lm} takes {takes}; the two files are not of one model")
    if family:
        check_positions(lm, "grid" if on_grid(header) else "line", mmproj, family.positions)


def check_positions(lm: Path, taken: str, mmproj: Path, given: str) -> None:
    """Raise ``TokcompError`` where the positions that ``lm`` takes and ``mmproj`` needs (``line``, ``grid``) differ."""
    if taken != given:
        raise TokcompError(
            f"{mmproj} needs a language model {_KINDS[given]}, {lm} is one {_KINDS[taken]}; "
            "the two files are not of one model"
        )


_KINDS = {"grid": "with positions by row and column (M-RoPE)", "line": "with positions as in text"}


def on_grid(header: GgufHeader) -> bool:
    """Whether the rows of a language model carry positions by row and column."""
    architecture = header.text("general.architecture")
    sections = f"{architecture}.rope.dimension_sections"
    return architecture in _ALWAYS_ON_GRID or sections in header.arrays or sections in header.metadata


def _written(mmproj: Path) -> tuple[int, Family | None]:
    """Width of the rows that the projector in a file writes, deepstack features included; and its family, where that
    is known here."""
    from .export.tower_files import written_rows

    try:
        width, family = written_rows(mmproj)
    except UnsupportedError:
        from .language.mtmd_file import check_projector

        return check_projector(mmproj).width, None
    return int(width), family
