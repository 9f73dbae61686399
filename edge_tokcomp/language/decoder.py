"""Rows in, logits out.

``Decoder`` is what generation and scheduling are written against; ``PlainDecoder`` is one llama.cpp context. llama.cpp
aborts the process or answers -1 when its rules are broken, so every rule is checked here before the call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import TokcompError, UsageError
from ..tokens import Rows
from . import binding
from .cells import Cells
from .model import LanguageModel

Logits = NDArray[np.float32]

_MAX_SEQUENCES = 256
_SPARE_OUTPUTS = 32
_BOOKKEEPING_BYTES = 64
"""What llama.cpp and ``Cells`` note about one cell, roughly."""


class Decoder(Protocol):
    """A language model's state over several sequences."""

    @property
    def n_ctx(self) -> int:
        """Rows that all sequences together may hold; rows shared by a fork count once."""

    @property
    def n_batch(self) -> int:
        """Rows of one call into llama.cpp; larger batches are split."""

    @property
    def n_ubatch(self) -> int:
        """Rows computed at once: the largest non-causal batch."""

    @property
    def n_sequences(self) -> int:
        """Sequence ids run from 0 to this, exclusive."""

    @property
    def n_vocab(self) -> int:
        """Width of the logits."""

    @property
    def row_width(self) -> int:
        """Width of the rows fed in, ``n_embd_inp``."""

    @property
    def room(self) -> int:
        """Rows that still fit."""

    def decode(self, batch: Sequence[Rows], *, causal: bool = True) -> list[Logits]:
        """Append rows to their sequences; for each ``Rows`` the logits ``(m, n_vocab) float32`` of the rows wanted."""

    def fork(self, source: int, target: int) -> None:
        """Let the empty sequence ``target`` start as ``source`` stands, without computing or copying."""

    def drop(self, sequence: int, start: int | None = None) -> None:
        """Forget positions from ``start`` on, or the whole sequence."""

    def clear(self) -> None:
        """Forget everything."""

    def length(self, sequence: int) -> int:
        """The position at which text may follow."""


@dataclass(frozen=True)
class _Join:
    """A batch laid end to end: ``embeddings (n, width)``, ``positions (n,)`` or ``(4, n)``, the rest ``(n,)``."""

    embeddings: NDArray[np.float32]
    positions: NDArray[np.int32]
    sequences: NDArray[np.int32]
    wanted: NDArray[np.bool_]


class PlainDecoder:
    """One llama.cpp context whose key-value cache is shared by all sequences.

    When a call into llama.cpp fails half-way, the sequences of that batch are emptied, so that the state is known.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        n_ctx: int = 4096,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_sequences: int = 1,
        threads: int | None = None,
        threads_batch: int | None = None,
        flash_attention: bool | None = None,
        offload_kv: bool = True,
        kv_type: Literal["f16", "f32"] = "f16",
    ) -> None:
        """``threads`` for single rows, ``threads_batch`` for batches; ``None`` takes the model's, then every core.

        ``flash_attention``: ``None`` lets llama.cpp decide, except that it is off for ``kv_type="f32"``, because it
        rounds to f16. Raises ``UsageError`` for options out of range, ``TokcompError`` when the context cannot be made.
        """
        sizes = {"n_ctx": n_ctx, "n_batch": n_batch, "n_ubatch": n_ubatch, "n_sequences": n_sequences}
        for name, value in sizes.items():
            if value < 1:
                raise UsageError(f"{name} {value} is not a positive number")
        if n_sequences > min(_MAX_SEQUENCES, n_batch):
            raise UsageError(
                f"n_sequences {n_sequences} is more than n_batch {n_batch} or llama.cpp's limit of {_MAX_SEQUENCES}"
            )
        if kv_type not in ("f16", "f32"):
            raise UsageError(f"kv_type {kv_type!r} is unknown; choose f16 or f32")
        if threads is None:
            threads = model.threads or available_cores()
        if threads_batch is None:
            threads_batch = threads
        if min(threads, threads_batch) < 1:
            raise UsageError(f"threads {threads} and threads_batch {threads_batch} must be positive")
        if flash_attention is None and kv_type == "f32":
            flash_attention = False
        _check_memory(model, n_ctx, kv_type)
        self._model = model
        self._n_sequences = n_sequences
        # llama.cpp reserves a buffer of n_outputs x n_vocab floats: 300 MB for 512 rows of a 150 000 token vocabulary.
        self._n_outputs = min(n_batch, max(n_sequences, _SPARE_OUTPUTS))
        self._context = binding.Context(
            model.handle,
            binding.ContextOptions(
                n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_ubatch, n_sequences=n_sequences, n_outputs=self._n_outputs,
                threads=threads, threads_batch=threads_batch, flash_attention=flash_attention, offload_kv=offload_kv,
                kv_type=kv_type,
            ),
        )  # fmt: skip
        if not self._context.has_memory:
            self._context.close()
            raise TokcompError(f"{model.path}: {model.architecture} keeps no state, so it cannot generate text")
        self._cells = Cells(self._context.n_ctx, n_sequences)

    @property
    def n_ctx(self) -> int:
        return self._context.n_ctx

    @property
    def n_batch(self) -> int:
        return self._context.n_batch

    @property
    def n_ubatch(self) -> int:
        return self._context.n_ubatch

    @property
    def n_sequences(self) -> int:
        return self._n_sequences

    @property
    def n_vocab(self) -> int:
        return self._model.n_vocab

    @property
    def row_width(self) -> int:
        return self._model.n_embd_inp

    @property
    def room(self) -> int:
        return self._cells.room

    def length(self, sequence: int) -> int:
        """The position at which text may follow."""
        self._check_sequence(sequence)
        return self._cells.length(sequence)

    def decode(self, batch: Sequence[Rows], *, causal: bool = True) -> list[Logits]:
        """Append the rows of ``batch``, which may belong to several sequences; later ``Rows`` see earlier ones.

        For each ``Rows`` the logits ``(m, n_vocab) float32`` of the rows it wants, by default its last. Batches above
        ``n_batch`` take several calls. ``causal=False`` lets rows of one sequence see one another in both directions
        (Gemma-3 images); such a batch must fit ``n_ubatch``.

        Raises ``TokcompError`` when the rows do not fit the context or the micro-batch, ``ValueError`` for rows of the
        wrong width, with non-finite values or at positions the model does not allow.
        """
        _ = self._context.pointer  # a closed decoder says so before anything else
        if not batch:
            return []
        self._check_rows(batch)
        self._check_sizes(batch, causal)
        join = self._join(batch)
        answers = np.empty((int(join.wanted.sum()), self.n_vocab), np.float32)
        touched = {rows.sequence for rows in batch}
        try:
            with self._attention(causal):
                done = 0
                for part in _parts(join.wanted, self.n_batch, self._n_outputs):
                    wanted = join.wanted[part]
                    self._context.decode(
                        join.embeddings[part], join.positions[..., part], join.sequences[part], wanted.astype(np.int8)
                    )
                    for row in np.flatnonzero(wanted):
                        self._context.copy_logits(int(row), answers[done])
                        done += 1
            for rows in batch:
                self._cells.add(rows.sequence, rows.positions)
        except BaseException:
            for sequence in touched:
                self._context.remove(sequence)
                self._cells.drop(sequence)
            raise
        counts = [int(_wanted(rows).sum()) for rows in batch]
        return np.split(answers, np.cumsum(counts)[:-1])

    def fork(self, source: int, target: int) -> None:
        """Let the empty sequence ``target`` share all rows of ``source``; nothing is computed or copied."""
        self._check_sequence(source)
        self._check_sequence(target)
        if self._cells.rows(target):
            raise ValueError(f"sequence {target} holds {self._cells.rows(target)} rows; drop it before forking into it")
        self._context.copy_sequence(source, target)
        self._cells.fork(source, target)

    def drop(self, sequence: int, start: int | None = None) -> None:
        """Forget positions from ``start`` on, or the whole sequence.

        Raises ``ValueError`` when a recurrent or hybrid model is asked to forget a part: its state cannot be cut back.
        """
        self._check_sequence(sequence)
        if start is None or start <= 0:
            self._context.remove(sequence)
            self._cells.drop(sequence)
        elif start <= self._cells.last(sequence):
            if self._model.recurrent or not self._context.remove(sequence, start):
                raise ValueError(
                    f"a {self._model.architecture} model cannot forget a part of a sequence; fork before the part"
                )
            self._cells.drop(sequence, start)

    def clear(self) -> None:
        """Forget everything."""
        self._context.clear()
        self._cells.clear()

    def close(self) -> None:
        """Free the context; a second call does nothing."""
        self._context.close()

    def __enter__(self) -> PlainDecoder:
        return self

    def __exit__(self, *_fault: object) -> None:
        self.close()

    def _check_sequence(self, sequence: int) -> None:
        if not 0 <= sequence < self._n_sequences:
            raise ValueError(f"sequence {sequence} is outside 0..{self._n_sequences - 1}; make the decoder with more")

    def _check_rows(self, batch: Sequence[Rows]) -> None:
        last = {rows.sequence: (-1, -1) for rows in batch}
        for rows in batch:
            self._check_sequence(rows.sequence)
            last[rows.sequence] = (self._cells.last(rows.sequence), self._cells.length(rows.sequence) - 1)
        for rows in batch:
            if not len(rows):
                raise ValueError(f"a batch for sequence {rows.sequence} has no rows")
            if rows.embeddings.shape[1] != self.row_width:
                raise ValueError(
                    f"rows are {rows.embeddings.shape[1]} wide, {self._model.architecture} takes {self.row_width}"
                )
            if not np.isfinite(rows.embeddings).all():
                bad = int(np.flatnonzero(~np.isfinite(rows.embeddings).all(axis=1))[0])
                raise ValueError(f"row {bad} of sequence {rows.sequence} holds values that are not finite")
            check = _check_many if self._model.multi_position else _check_contiguous
            last[rows.sequence] = check(rows, *last[rows.sequence])

    def _check_sizes(self, batch: Sequence[Rows], causal: bool) -> None:
        count = sum(len(rows) for rows in batch)
        if count > self.room:
            raise TokcompError(
                f"{count} rows of image and prompt do not fit: {self.room} of {self.n_ctx} context rows are free; "
                f"raise n_ctx by {count - self.room} or more, or keep fewer image tokens"
            )
        if causal:
            return
        if count > self.n_ubatch:
            raise TokcompError(
                f"{count} image rows that see one another must be computed at once, but n_ubatch is {self.n_ubatch}; "
                f"raise n_ubatch and n_batch to {count} or more, or keep fewer image tokens"
            )
        wanted = sum(int(_wanted(rows).sum()) for rows in batch)
        if wanted > self._n_outputs:
            raise ValueError(f"{wanted} logit rows of a non-causal batch are wanted, {self._n_outputs} can be had")

    def _join(self, batch: Sequence[Rows]) -> _Join:
        positions = [_sections(rows) if self._model.multi_position else rows.positions for rows in batch]
        return _Join(
            np.concatenate([rows.embeddings for rows in batch]),
            np.concatenate(positions, axis=-1).astype(np.int32),
            np.repeat([rows.sequence for rows in batch], [len(rows) for rows in batch]).astype(np.int32),
            np.concatenate([_wanted(rows) for rows in batch]),
        )

    @contextmanager
    def _attention(self, causal: bool) -> Iterator[None]:
        if causal:
            yield
            return
        self._context.set_causal(False)
        try:
            yield
        finally:
            self._context.set_causal(True)


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_memory(model: LanguageModel, n_ctx: int, kv_type: str) -> None:
    """Refuse a cache beyond the machine: the system would end the process instead of llama.cpp saying no."""
    if not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = n_ctx * (model.kv_bytes_per_row(kv_type) + _BOOKKEEPING_BYTES)
    if needed > memory:
        raise TokcompError(
            f"n_ctx {n_ctx} needs {needed / 2**30:.1f} GiB for the key-value cache, this machine has "
            f"{memory / 2**30:.1f} GiB; lower n_ctx"
        )


def _wanted(rows: Rows) -> NDArray[np.bool_]:
    if rows.want_logits is not None:
        return rows.want_logits
    last = np.zeros(len(rows), np.bool_)
    last[-1:] = True
    return last


def _sections(rows: Rows) -> NDArray[np.int32]:
    """Positions ``(4, n)``; text has the same position in the first three sections and 0 in the last."""
    if rows.positions.ndim == 2:
        return rows.positions
    return np.stack([rows.positions, rows.positions, rows.positions, np.zeros_like(rows.positions)])


def _check_contiguous(rows: Rows, last: int, _reach: int) -> tuple[int, int]:
    """Ordinary rotary models: no gap, no step back; returns the new last position, twice."""
    if rows.positions.ndim != 1:
        raise ValueError(f"this model takes one position a row, got {rows.positions.shape}")
    expected = np.arange(last + 1, last + 1 + len(rows))
    wrong = np.flatnonzero(rows.positions != expected)
    if len(wrong):
        raise ValueError(
            f"row {wrong[0]} of sequence {rows.sequence} is at position {rows.positions[wrong[0]]}, "
            f"but must follow at {expected[wrong[0]]}: positions may not leave gaps"
        )
    return int(expected[-1]), int(expected[-1])


def _check_many(rows: Rows, last: int, reach: int) -> tuple[int, int]:
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


def _parts(wanted: NDArray[np.bool_], n_batch: int, n_outputs: int) -> Iterator[slice]:
    """Slices of at most ``n_batch`` rows with at most ``n_outputs`` wanted ones."""
    start = 0
    while start < len(wanted):
        stop = min(start + n_batch, len(wanted))
        outputs = np.flatnonzero(wanted[start:stop])
        if len(outputs) > n_outputs:
            stop = start + int(outputs[n_outputs])
        yield slice(start, stop)
        start = stop
