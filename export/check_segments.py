"""Layer segments held against the model they are cut from: the same rows in, the same logits out."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.files import write_whole
from edge_tokcomp.language.segment_files import SegmentFiles

if TYPE_CHECKING:
    from edge_tokcomp.language.decoder import Decoder
    from edge_tokcomp.language.token_embedding import TokenEmbedding

TOLERANCE = 1e-3
"""Relative error allowed; on a CPU the logits are the same bit for bit."""

_PROMPT, _STEPS = 16, 4
_CHECK = "check.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentCheck:
    """``relative_error``: largest over ``rows`` rows of logits, of the norm of the difference to the norm."""

    relative_error: float
    rows: int

    def __str__(self) -> str:
        return f"relative error {self.relative_error:.1e} over {self.rows} rows of logits"


def verify_segments(
    lm: str | os.PathLike[str], directory: str | os.PathLike[str], *, threads: int | None = None
) -> SegmentCheck:
    """Feed random tokens to ``lm`` and to the segments in ``directory``, and note the result there.

    Raises ``TokcompError`` when their logits differ by more than ``TOLERANCE``. One model is open at a time.
    """
    from edge_tokcomp.language.decoder import PlainDecoder
    from edge_tokcomp.language.model import LanguageModel
    from edge_tokcomp.language.segmented import SegmentedDecoder
    from edge_tokcomp.language.token_embedding import TokenEmbedding

    files = SegmentFiles.read(directory)
    with LanguageModel.open(lm, threads=threads) as model, PlainDecoder(model, n_ctx=256) as plain:
        rows = _rows(TokenEmbedding.of(model))
        whole = _logits(plain, rows)
    with SegmentedDecoder.open(files, threads=threads, n_ctx=256) as segmented:
        cut = _logits(segmented, rows)
    if not np.isfinite(whole).all():
        raise TokcompError(f"{os.fspath(lm)}: its logits are not finite; download or convert it again")
    error = float((np.linalg.norm(cut - whole, axis=1) / np.linalg.norm(whole, axis=1)).max())
    check = SegmentCheck(error, len(whole))
    _log.info("segments of %s against the whole model: %s", os.fspath(lm), check)
    if not error <= TOLERANCE:
        raise TokcompError(
            f"{os.fspath(lm)}: its segments do not give the model's logits ({check}); please report this file"
        )
    text = json.dumps(asdict(check))
    try:
        write_whole(files.directory / _CHECK, lambda stream: stream.write(text.encode()))
    except OSError as fault:  # in somebody else's cache: it will be run again
        _log.info("%s: what was found cannot be noted there (%s)", files.directory, fault.strerror)
    return check


def read_check(directory: str | os.PathLike[str]) -> SegmentCheck | None:
    """What ``verify_segments`` found out about ``directory``; ``None`` where it was not run."""
    try:
        return SegmentCheck(**json.loads((Path(directory) / _CHECK).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _rows(table: TokenEmbedding) -> NDArray[np.float32]:
    """Random tokens, with random features beside them where the model takes such (deepstack)."""
    rng = np.random.default_rng(0)
    rows = table.lookup(rng.integers(0, table.n_vocab, _PROMPT + _STEPS))
    tokens, features = rows[:, : table.n_embd], rows[:, table.n_embd :]
    features[:] = tokens.std() * rng.standard_normal(features.shape)
    return rows


def _logits(decoder: Decoder, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of every row: first a prompt at once, then row by row, as a caption is generated."""
    from edge_tokcomp.tokens import Rows

    found = []
    for start, stop in [(0, _PROMPT), *((row, row + 1) for row in range(_PROMPT, len(rows)))]:
        positions = np.arange(start, stop, dtype=np.int32)
        found += decoder.decode([Rows(rows[start:stop], positions, want_logits=np.ones(stop - start, np.bool_))])
    return np.concatenate(found)
