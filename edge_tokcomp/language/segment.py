"""One llama.cpp context over consecutive layers of a model, all of them for a whole model, and its key-value cache.

Every rule whose breach would end the process is checked here before the call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import TokcompError, UsageError
from ..tokens import Rows
from . import binding
from .batches import Group, Join, Stand, check_rows, grouped, of_image, parts, wanted
from .cells import Cells
from .model import LanguageModel
from .readout import Readout

Floats = NDArray[np.float32]
Logits = NDArray[np.float32]

_MAX_SEQUENCES = 256
_SPARE_OUTPUTS = 32
_USUAL_CONTEXT = 4096
_BOOKKEEPING_BYTES = 64
"""What llama.cpp and ``Cells`` note about one cell, roughly."""

Self = TypeVar("Self", bound="Segment")


class Segment:
    """A context and what is in its cache.

    When a call into llama.cpp fails half-way, the sequences of that batch are emptied, so that the state is known.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        n_ctx: int | None = None,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_sequences: int = 1,
        threads: int | None = None,
        threads_batch: int | None = None,
        flash_attention: bool | None = None,
        offload_kv: bool = True,
        kv_type: Literal["f16", "f32"] = "f16",
        n_outputs: int | None = None,
        readout: Readout | None = None,
        equal_in: int | None = None,
    ) -> None:
        """``n_ctx``: the model's own up to 4096 by default. ``threads`` for single rows, ``threads_batch`` for batches;
        ``None`` takes the model's, then every core. ``flash_attention``: ``None`` lets llama.cpp decide, except that it
        is off for ``kv_type="f32"``, because it rounds to f16. ``n_outputs``: output rows of one call, by default a
        few. ``readout``: for ``tensors``. ``equal_in``: see ``parts``.

        Raises ``UsageError`` for options out of range, ``TokcompError`` when the context cannot be made.
        """
        n_ctx = usual_context(model) if n_ctx is None else n_ctx
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
        check_memory(n_ctx, model.kv_bytes_per_row(kv_type))
        self._model, self._readout, self._equal_in = model, readout, equal_in
        self._n_sequences = n_sequences
        # llama.cpp reserves a buffer of n_outputs x n_vocab floats: 300 MB for 512 rows of a 150 000 token vocabulary.
        self._n_outputs = min(n_batch, n_outputs or max(n_sequences, _SPARE_OUTPUTS))
        self._context = binding.Context(
            model.handle,
            binding.ContextOptions(
                n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_ubatch, n_sequences=n_sequences, n_outputs=self._n_outputs,
                threads=threads, threads_batch=threads_batch, flash_attention=flash_attention, offload_kv=offload_kv,
                kv_type=kv_type,
            ),
            readout,
        )  # fmt: skip
        if not self._context.has_memory:
            self._context.close()
            raise TokcompError(f"{model.path}: {model.architecture} keeps no state, so it cannot generate text")
        self._cells = Cells(self._context.n_ctx, n_sequences)

    @property
    def n_ctx(self) -> int:
        """Rows that all sequences together may hold; rows shared by a fork count once."""
        return self._context.n_ctx

    @property
    def n_batch(self) -> int:
        """Rows of one call into llama.cpp; larger batches are split."""
        return self._context.n_batch

    @property
    def n_ubatch(self) -> int:
        """Rows computed at once: the largest image whose rows see one another."""
        return self._context.n_ubatch

    @property
    def n_sequences(self) -> int:
        """Sequence ids run from 0 to this, exclusive."""
        return self._n_sequences

    @property
    def row_width(self) -> int:
        """Width of the rows fed in, ``n_embd_inp``."""
        return self._model.n_embd_inp

    @property
    def room(self) -> int:
        """Rows that still fit."""
        return self._cells.room

    def length(self, sequence: int) -> int:
        """The position at which text may follow."""
        self.check_sequence(sequence)
        return self._cells.length(sequence)

    def rows(self, sequence: int) -> int:
        """Rows held by a sequence."""
        return self._cells.rows(sequence)

    def logits(self, batch: Sequence[Rows], *, causal: bool = True, checked: bool = False) -> list[Logits]:
        """Append the rows of ``batch``, which may belong to several sequences; later ``Rows`` see earlier ones.

        For each ``Rows`` the logits ``(m, n_vocab) float32`` of the rows it wants, by default its last. Batches above
        ``n_batch`` take several calls, and so do text and images where the model takes text as tokens. Without
        ``causal`` each ``Rows`` of an image is a call, whose rows see one another. ``checked``: the caller vouches for
        widths, values and positions.

        Raises ``TokcompError`` when the rows do not fit the context or the micro-batch, ``ValueError`` for rows of the
        wrong width, with non-finite values or at positions the model does not allow.
        """
        _ = self._context.pointer  # a closed context says so before anything else
        if not batch:
            return []
        groups = self._groups(batch, causal, checked)
        found: dict[int, Logits] = {}
        with self._emptied_by_failure(batch):
            for group in groups:
                found.update(zip(group.places, self._logits(group), strict=True))
        return [found[place] for place in range(len(batch))]

    def tensors(
        self, batch: Sequence[Rows], names: Sequence[str], *, causal: bool = True, checked: bool = False,
        over: bool = False,
    ) -> list[Floats]:  # fmt: skip
        """As ``logits``, but give tensors of the graph for all rows of the batch, and compute no further than these.

        ``names``: ``l_out-N`` gives ``(n, n_embd)``, ``Qcur-N`` and ``Kcur-N`` rotated ``(n, heads, head_dim)``.
        ``over``: ``l_out`` may be written over the embeddings of the batch, which nobody needs any more.
        """
        _ = self._context.pointer
        if self._readout is None:
            raise ValueError("this context was made without a readout")
        groups = self._groups(batch, causal, checked)
        ends = np.cumsum([len(rows) for rows in batch])
        found: list[Floats] = []
        with self._emptied_by_failure(batch):
            for group in groups:
                arrays = self._tensors(self._readout, group, names, over)
                if len(groups) == 1:
                    return arrays
                found = found or [np.empty((ends[-1], *array.shape[1:]), np.float32) for array in arrays]
                rows = np.concatenate([np.arange(ends[at] - len(batch[at]), ends[at]) for at in group.places])
                for into, array in zip(found, arrays, strict=True):
                    into[rows] = array
        return found

    def fork(self, source: int, target: int) -> None:
        """Let the empty sequence ``target`` share all rows of ``source``; nothing is computed or copied."""
        self.check_sequence(source)
        self.check_sequence(target)
        if self._cells.rows(target):
            raise ValueError(f"sequence {target} holds {self._cells.rows(target)} rows; drop it before forking into it")
        self._context.copy_sequence(source, target)
        self._cells.fork(source, target)

    def drop(self, sequence: int, start: int | None = None) -> None:
        """Forget positions from ``start`` on, or the whole sequence.

        Raises ``ValueError`` when a recurrent or hybrid model is asked to forget a part: its state cannot be cut back.
        """
        self.check_sequence(sequence)
        if start is None or start <= 0:
            self._context.remove(sequence)
            self._cells.drop(sequence)
        elif start <= self._cells.last(sequence):
            if self._model.recurrent or not self._context.remove(sequence, start):
                raise ValueError(
                    f"a {self._model.architecture} model cannot forget a part of a sequence; fork before the part"
                )
            self._cells.drop(sequence, start)

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from now on; raises ``UsageError`` for fewer than 1."""
        if threads < 1:
            raise UsageError(f"threads {threads} is not a positive number")
        self._context.set_threads(threads)

    def clear(self) -> None:
        """Forget everything."""
        self._context.clear()
        self._cells.clear()

    def close(self) -> None:
        """Free the context; a second call does nothing."""
        self._context.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_fault: object) -> None:
        self.close()

    def check_sequence(self, sequence: int) -> None:
        """Raise ``ValueError`` for a sequence this context was not made for."""
        if not 0 <= sequence < self._n_sequences:
            raise ValueError(f"sequence {sequence} is outside 0..{self._n_sequences - 1}; make the decoder with more")

    def check_room(self, batch: Sequence[Rows], causal: bool = True) -> None:
        """Raise ``TokcompError`` where ``batch`` does not fit the context, or without ``causal`` one of its images the
        micro-batch."""
        count = sum(map(len, batch))
        if count > self.room:
            raise TokcompError(
                f"{count} rows of image and prompt do not fit: {self.room} of {self.n_ctx} context rows are free; "
                f"raise n_ctx by {count - self.room} or more, or keep fewer image tokens"
            )
        for rows in () if causal else batch:
            if of_image(rows) and len(rows) > self.n_ubatch:
                raise TokcompError(
                    f"{len(rows)} image rows that see one another must be computed at once, but n_ubatch is "
                    f"{self.n_ubatch}; raise n_ubatch and n_batch to {len(rows)} or more, or keep fewer image tokens"
                )

    def _logits(self, group: Group) -> list[Logits]:
        whole, batch = group.whole, group.batch
        answers = np.empty((np.count_nonzero(whole.wanted), self._model.n_vocab), np.float32)
        if self._readout:
            self._readout.expect(())
        done = 0

        def take(part: slice) -> None:
            nonlocal done
            if self._readout:
                self._readout.take()  # nothing, or what was raised in its callback
            for row in whole.wanted[part].nonzero()[0].tolist():
                self._context.copy_logits(row, answers[done])
                done += 1

        kinds = self._kinds(whole)
        calls = list(parts(whole.wanted, self.n_batch, self._n_outputs, kinds, equal_in=self._equal_in))
        self._run(group, whole.wanted, calls, take)
        if len(batch) == 1:
            return [answers]
        counts = [int(wanted(rows).sum()) for rows in batch]
        return np.split(answers, np.cumsum(counts)[:-1])

    def _tensors(self, readout: Readout, group: Group, names: Sequence[str], over: bool) -> list[Floats]:
        # The last layer of a graph computes output rows only; its queries and keys come before that.
        every = np.full(len(group.whole.wanted), any(name.startswith("l_out") for name in names))
        found: list[Floats] = []
        # A call is one micro-batch, since the next overwrites what is read. Models with a recurrent state compute
        # sequences of different lengths in several.
        changes = np.flatnonzero(np.diff(group.whole.sequences)) + 1 if self._model.recurrent else ()
        ends = [*changes, len(every)]
        most = min(self.n_ubatch, self.n_batch)
        calls = [
            slice(start + part.start, start + part.stop)
            for start, end in zip([0, *ends], ends, strict=False)
            for part in parts(every[start:end], most, self._n_outputs, equal_in=self._equal_in)
        ]
        readout.expect(names)

        def take(part: slice) -> None:
            arrays = readout.take()
            if len(calls) == 1:
                found.extend(arrays)
                return
            for name, array in zip(names, arrays, strict=True) if not found else ():
                shape = (len(every), *array.shape[1:])
                given = group.whole.embeddings
                fits = over and name.startswith("l_out") and given.shape == shape
                found.append(given if fits else np.empty(shape, np.float32))
            for into, array in zip(found, arrays, strict=True):
                into[part] = array
            if part.stop < len(every):
                readout.expect(names)

        self._run(group, every, calls, take)
        return found

    def _stand(self, sequence: int) -> Stand:
        self.check_sequence(sequence)
        return self._cells.last(sequence), self._cells.length(sequence) - 1

    def _groups(self, batch: Sequence[Rows], causal: bool, checked: bool) -> list[Group]:
        """``batch`` as it is computed, checked whole before any of it is."""
        model = self._model
        if not checked:
            check_rows(
                batch, self._stand, width=self.row_width, multi_position=model.multi_position,
                architecture=model.architecture, takes_bare=True,
            )  # fmt: skip
        self.check_room(batch, causal)
        for rows in () if causal else batch:
            if rows.crop is None or not of_image(rows):
                continue
            if (rows.crop < 0).any():
                raise ValueError(f"text stands among the image rows of sequence {rows.sequence}, which see one another")
            if (asked := np.count_nonzero(wanted(rows))) > self._n_outputs:
                raise ValueError(f"{asked} logit rows of a non-causal batch are wanted, {self._n_outputs} can be had")

        return grouped(batch, causal, multi_position=model.multi_position, takes_tokens=model.takes_tokens)

    def _kinds(self, whole: Join) -> NDArray[np.int8] | None:
        """What must not share a call, told by different numbers; None where everything may."""
        if whole.tokens is None or not self._model.takes_tokens:
            return None
        text = (whole.tokens >= 0).astype(np.int8)
        return text + 2 * whole.wanted if self._model.logits_of_all_or_none else text

    def _run(
        self, group: Group, outputs: NDArray[np.bool_], calls: Sequence[slice], take: Callable[[slice], None]
    ) -> None:
        whole = group.whole
        with self._both_ways() if group.both_ways else nullcontext():
            for part in calls:
                self._context.decode(
                    whole.inputs(part), whole.positions[..., part], whole.sequences[part], outputs[part]
                )
                take(part)
        for rows in group.batch:
            self._cells.add(rows.sequence, rows.positions)

    @contextmanager
    def _emptied_by_failure(self, batch: Sequence[Rows]) -> Iterator[None]:
        """When a call fails, leave nothing in the sequences of its batch."""
        try:
            yield
        except BaseException:
            for sequence in {rows.sequence for rows in batch}:
                self._context.remove(sequence)
                self._cells.drop(sequence)
            raise

    @contextmanager
    def _both_ways(self) -> Iterator[None]:
        """Rows see those after them too."""
        self._context.set_causal(False)
        try:
            yield
        finally:
            self._context.set_causal(True)


def usual_context(model: LanguageModel) -> int:
    """Rows of context where nothing else is asked for."""
    return min(model.n_ctx_train, _USUAL_CONTEXT)


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_memory(n_ctx: int, bytes_per_row: int) -> None:
    """Refuse a cache beyond the machine: the system would end the process instead of llama.cpp saying no."""
    if not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = n_ctx * (bytes_per_row + _BOOKKEEPING_BYTES)
    if needed > memory:
        raise TokcompError(
            f"n_ctx {n_ctx} needs {needed / 2**30:.1f} GiB for the key-value cache, this machine has "
            f"{memory / 2**30:.1f} GiB; lower n_ctx"
        )
