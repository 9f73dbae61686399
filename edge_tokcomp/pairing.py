"""Whether a language model and an mmproj belong together, told from their headers before memory is taken for either."""

from __future__ import annotations

from pathlib import Path

from .errors import TokcompError, UnsupportedError
from .language.gguf_header import read_header
from .segmenting import model_files


def check_pair(lm: Path, mmproj: Path) -> None:
    """Raise ``TokcompError`` for an ``mmproj`` that is damaged or writes rows of another width than ``lm`` takes.

    A tower's directory is not looked into: it says its width once it is open.
    """
    header = read_header(model_files(lm)[0])
    architecture = header.text("general.architecture")
    n_embd = int(header.number(f"{architecture}.embedding_length", 0))
    takes = n_embd * (1 + int(header.number(f"{architecture}.n_deepstack_layers", 0)))
    if not takes or mmproj.is_dir():
        return
    writes = _written(mmproj)
    if writes != takes:
        raise TokcompError(f"{mmproj} writes rows of {writes}, {lm} takes {takes}; the two files are not of one model")


def _written(mmproj: Path) -> int:
    """Width of the rows that the projector in a file writes, deepstack features included."""
    from .export.tower_files import written_width

    try:
        return int(written_width(mmproj))
    except UnsupportedError:
        from .language.mtmd_file import check_projector

        return check_projector(mmproj).width
