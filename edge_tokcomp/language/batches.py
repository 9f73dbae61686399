"""What may stand in a batch, checked before llama.cpp sees it: widths, values, positions; and how it is cut into calls.

llama.cpp aborts the process or answers -1 when these rules are broken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..tokens import Rows

_LEAST_ROWS = 128
"""Half of it is the least that equal parts of more have, and what llama.cpp's flash attention tiles: fewer rows at once
it rounds otherwise (GGML_FA_TILE_Q)."""

Stand = tuple[int, int]
"""Where a sequence stands: its last row's (temporal) position and the highest of any section, -1 before the first."""


@dataclass(frozen=True)
class Join:
    """A batch laid end to end: ``embeddings (n, width)``, ``positions (n,)`` or ``(4, n)``, the rest ``(n,)``.

    ``tokens``: what is fed instead of text rows, -1 for image rows: for models that take them, and of bare batches;
    else None.
    """

    embeddings: NDArray[np.float32]
    positions: NDArray[np.int32]
    sequences: NDArray[np.int32]
    wanted: NDArray[np.bool_]
    tokens: NDArray[np.int32] | None = None

    def inputs(self, part: slice) -> NDArray[np.float32] | NDArray[np.int32]:
        """What is fed of a part that is all text or all image: rows ``(m, width)``, or tokens ``(m,)``."""
        if self.tokens is None or self.tokens[part.start] < 0:
            return self.embeddings[part]
        return self.tokens[part]


@dataclass(frozen=True, eq=False)
class Group:
    """What of a batch is computed together: ``places`` in it, its ``batch``, and that joined. ``both_ways``: it is an
    image whose rows see one another."""

    places: Sequence[int]
    batch: Sequence[Rows]
    whole: Join
    both_ways: bool


def join(batch: Sequence[Rows], *, multi_position: bool, takes_tokens: bool = False) -> Join:
    """Lay ``batch`` end to end; raises ``ValueError`` for text without the tokens that the model takes."""
    if len(batch) == 1:
        (rows,) = batch
        tokens = _tokens(rows) if takes_tokens or rows.bare else None
        positions = sections(rows) if multi_position else rows.positions
        return Join(
            rows.embeddings, np.asarray(positions, np.int32), np.array([rows.sequence] * len(rows), np.int32),
            wanted(rows), tokens,
        )  # fmt: skip
    tokens = np.concatenate([_tokens(rows) for rows in batch]) if takes_tokens or batch[0].bare else None
    places = [sections(rows) if multi_position else rows.positions for rows in batch]
    return Join(
        np.concatenate([rows.embeddings for rows in batch]),
        np.concatenate(places, axis=-1).astype(np.int32),
        np.repeat([rows.sequence for rows in batch], [len(rows) for rows in batch]).astype(np.int32),
        np.concatenate([wanted(rows) for rows in batch]),
        tokens,
    )


def check_rows(
    batch: Sequence[Rows],
    stand: Callable[[int], Stand],
    *,
    width: int,
    multi_position: bool,
    architecture: str,
    takes_bare: bool,
) -> None:
    """Raise ``ValueError`` for rows of another width, values that are not finite, positions the model does not allow.

    ``stand``: where a sequence stands before the batch.
    """
    last = {rows.sequence: stand(rows.sequence) for rows in batch}
    bare = batch[0].bare
    for rows in batch:
        if not len(rows):
            raise ValueError(f"a batch for sequence {rows.sequence} has no rows")
        if rows.bare and not takes_bare:
            raise ValueError(f"rows of sequence {rows.sequence} are tokens alone, which this decoder does not look up")
        if rows.bare != bare:
            raise ValueError("a batch is of rows with embeddings or of tokens alone, not of both")
        if not bare and rows.embeddings.shape[1] != width:
            raise ValueError(f"rows are {rows.embeddings.shape[1]} wide, {architecture} takes {width}")
        if not (bare or np.isfinite(rows.embeddings).all()):
            bad = int(np.flatnonzero(~np.isfinite(rows.embeddings).all(axis=1))[0])
            raise ValueError(f"row {bad} of sequence {rows.sequence} holds values that are not finite")
        check = _check_many if multi_position else _check_contiguous
        last[rows.sequence] = check(rows, *last[rows.sequence])


def wanted(rows: Rows) -> NDArray[np.bool_]:
    """``(n,)``: the rows whose logits are asked for."""
    if rows.want_logits is not None:
        return rows.want_logits
    last = np.zeros(len(rows), np.bool_)
    last[-1:] = True
    return last


def of_image(rows: Rows) -> bool:
    """Whether rows of an image are among them."""
    return rows.crop is not None and bool((rows.crop >= 0).any())


def apart(batch: Sequence[Rows]) -> list[list[int]]:
    """Places in ``batch`` that may be computed together where the rows of an image see one another and text only looks
    back: each ``Rows`` of an image alone, text of all sequences in as few lists as the images between allow.

    A sequence's ``Rows`` keep their order; text comes as late as it can, when the most is there to share a call.
    """
    ahead: Counter[int] = Counter()  # images still to come in each sequence
    found: dict[tuple[int, int], list[int]] = {}
    for place in reversed(range(len(batch))):
        sequence, image = batch[place].sequence, of_image(batch[place])
        # After all that has more images ahead; those images themselves before the text behind them.
        found.setdefault((-ahead[sequence], place - len(batch) if image else 0), []).insert(0, place)
        ahead[sequence] += image
    return [found[key] for key in sorted(found)]


def grouped(batch: Sequence[Rows], causal: bool, *, multi_position: bool, takes_tokens: bool = False) -> list[Group]:
    """``batch`` as it is computed: all together, or without ``causal`` what ``apart`` leaves together; raises as
    ``join``."""
    groups = []
    for places in [range(len(batch))] if causal else apart(batch):
        mine = [batch[place] for place in places]
        whole = join(mine, multi_position=multi_position, takes_tokens=takes_tokens)
        groups.append(Group(places, mine, whole, both_ways=not causal and of_image(mine[0])))
    return groups


def sections(rows: Rows) -> NDArray[np.int32]:
    """Positions ``(4, n)``; text has the same position in the first three sections and 0 in the last."""
    if rows.positions.ndim == 2:
        return rows.positions
    return np.stack([rows.positions, rows.positions, rows.positions, np.zeros_like(rows.positions)])


def parts(
    outputs: NDArray[np.bool_], most_rows: int, most_outputs: int, kinds: NDArray[np.int8] | None = None,
    *, equal_in: int | None = None,
) -> Iterator[slice]:  # fmt: skip
    """Slices of at most ``most_rows`` rows with at most ``most_outputs`` of the ``outputs (n,)``, each of rows of one
    of the ``kinds (n,)``; ``equal_in`` divides every so many rows into slices of about the same length."""
    start = 0
    if kinds is None and len(outputs) <= min(most_rows, most_outputs):
        yield slice(start, len(outputs))
        return
    while start < len(outputs):
        stop = min(start + most_rows, len(outputs))
        if equal_in:
            left = min((start // equal_in + 1) * equal_in, len(outputs)) - start
            stop = start + -(-left // -(-left // most_rows))
        if kinds is not None and len(others := np.flatnonzero(kinds[start:stop] != kinds[start])):
            stop = start + int(others[0])
        if stop - start > most_outputs and len(within := np.flatnonzero(outputs[start:stop])) > most_outputs:
            stop = start + int(within[most_outputs])
        yield slice(start, stop)
        start = stop


def rows_at_once(most: int, segments: int, sequences: int, architecture: str) -> int:
    """Rows of a micro-batch, so that the compute buffers of all ``segments`` take about what the whole model's takes
    for ``most`` rows. Images of Gemma 3 see one another and are computed at once."""
    if architecture.startswith("gemma"):
        return most
    return min(most, max(-(-most // segments), _LEAST_ROWS, sequences))


def _tokens(rows: Rows) -> NDArray[np.int32]:
    """``(n,)``: the tokens of text rows, -1 for image rows."""
    if rows.bare and rows.tokens is not None:
        return rows.tokens
    text = np.ones(len(rows), np.bool_) if rows.crop is None else rows.crop < 0
    if not text.any():
        return np.full(len(rows), -1, np.int32)
    if rows.tokens is None or (rows.tokens[text] < 0).any():
        raise ValueError(f"text rows of sequence {rows.sequence} come without their tokens, which this model takes")
    return np.where(text, rows.tokens, -1).astype(np.int32)


def _check_contiguous(rows: Rows, last: int, _reach: int) -> Stand:
    """Ordinary rotary models: no gap, no step back; returns the new last position, twice."""
    if rows.positions.ndim != 1:
        raise ValueError(f"this model takes one position a row, got {rows.positions.shape}")
    if len(rows) == 1 and rows.positions[0] == last + 1:
        return last + 1, last + 1
    expected = np.arange(last + 1, last + 1 + len(rows))
    wrong = np.flatnonzero(rows.positions != expected)
    if len(wrong):
        raise ValueError(
            f"row {wrong[0]} of sequence {rows.sequence} is at position {rows.positions[wrong[0]]}, "
            f"but must follow at {expected[wrong[0]]}: positions may not leave gaps"
        )
    return int(expected[-1]), int(expected[-1])


def _check_many(rows: Rows, last: int, reach: int) -> Stand:
    """M-RoPE models: images may jump forward and share a time, text must move on; returns the new last and reach."""
    times = rows.positions if rows.positions.ndim == 1 else rows.positions[0]
    text = rows.positions.ndim == 1
    least = reach + 1 if text else max(last, 0)
    if times[0] < least or np.any(np.diff(times) < (1 if text else 0)) or rows.positions.min() < 0:
        raise ValueError(
            f"{'text' if text else 'image'} rows of sequence {rows.sequence} start at position {times[0]}, "
            f"but must start at {least} or later and never step back"
        )
    return int(times[-1]), max(reach, int(rows.positions.max()))
