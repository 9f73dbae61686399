"""A model run in layer segments, a context each, with image rows dropped between them.

llama.cpp has no way to run a part of the layers, nor to give layers different rows: its cache cells are shared by all.
A GGUF that holds some of the layers is a model to it, though. So hidden states leave one context as an array, rows are
dropped, and the others enter the next context as its embeddings. Text rows are never dropped. A generated token passes
through all segments.

Ordinary rotary models must hold contiguous positions in every context: rows that are left are renumbered, and the text
after an image moves towards the text before it. M-RoPE models keep every row at its own position.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TokcompError
from ..layer_state import LayerState
from ..tokens import Rows
from .batches import Stand, check_rows, rows_at_once
from .decoder import Positions
from .history import History
from .model import LanguageModel
from .pruning import Flow, Pruning, flows_of, in_place, looked_at, schedule
from .readout import Readout
from .row_attention import final_norm, head_scale, layer_windows, text_attention
from .segment import Logits, Segment, check_memory, usual_context
from .segment_files import SegmentFiles, gpu_shares

Floats = NDArray[np.float32]


class SegmentedDecoder:
    """The ``Decoder`` of a model that was cut; without ``steps`` it computes what the whole model does.

    ``model``: the last segment, which has vocabulary and tokenizer. ``seconds``: time spent so far in each segment,
    and in choosing rows (``choose``).
    """

    def __init__(
        self, models: Sequence[LanguageModel], cuts: Sequence[int], steps: Sequence[Pruning] = (), **options: Any
    ) -> None:
        """``models``: the segments in order. ``cuts``: the first layer of all but the first. ``options``: as for
        ``Segment``, for each; they share its ``n_ubatch`` (``rows_at_once``). Raises what ``Segment`` and
        ``set_steps`` raise."""
        self.model = models[-1]
        if self.model.takes_tokens:
            raise TokcompError(
                f"{self.model.path}: {self.model.architecture} models take text as tokens, which layer segments cannot "
                "hand on; load it whole"
            )
        for model in models[1:]:
            if model.n_embd_inp != models[0].n_embd:  # llama.cpp would read beyond the rows' end
                raise TokcompError(
                    f"{model.path}: takes rows of {model.n_embd_inp}, {models[0].path.name} gives {models[0].n_embd}; "
                    "the two are not of one model, cut it again"
                )
        self._n_layer = sum(model.n_layer for model in models)
        self._first = (0, *cuts)
        self._models, self._segments = tuple(models), list[Segment]()
        self._windows = [window for model in models for window in layer_windows(model.header) or [0] * model.n_layer]
        self._n_sequences = int(options.pop("n_sequences", 1))
        bytes_per_row = sum(model.kv_bytes_per_row(options.get("kv_type", "f16")) for model in models)
        check_memory(options.get("n_ctx") or usual_context(self.model), bytes_per_row)
        self.set_steps(steps)
        self._most = most = min(int(options.get("n_ubatch", 512)), int(options.get("n_batch", 2048)))
        rows = rows_at_once(most, len(models), self._n_sequences + 1, self.model.architecture)
        with ExitStack() as stack:
            for model in models:
                own: dict[str, Any] = options | {"n_ubatch": rows, "n_batch": rows, "equal_in": most}
                if model is not self.model:
                    own["n_outputs"] = rows  # a call reads all its rows
                segment = Segment(model, n_sequences=self._n_sequences + 1, readout=Readout(), **own)
                self._segments.append(stack.enter_context(segment))
            self._stack = stack.pop_all()
        self._spare = self._n_sequences
        self.seconds = {**{f"segment {number}": 0.0 for number in range(len(models))}, "choose": 0.0}

    @classmethod
    def open(
        cls, files: SegmentFiles, steps: Sequence[Pruning] = (), *, gpu_layers: int = 0, threads: int | None = None,
        use_mmap: bool = True, **options: Any,
    ) -> SegmentedDecoder:  # fmt: skip
        """Load the segments of a cut model; ``close`` frees them. ``gpu_layers``: as for the whole model, -1 for all.

        Raises ``TokcompError`` and ``UsageError`` as ``LanguageModel.open`` and the class do.
        """
        schedule(steps, files.cuts, files.depth, files.architecture)  # refuses before anything is loaded
        shares = gpu_shares(gpu_layers, files.layers)
        with ExitStack() as stack:
            models = [
                stack.enter_context(LanguageModel.open(path, gpu_layers=share, threads=threads, use_mmap=use_mmap))
                for path, share in zip(files.paths, shares, strict=True)
            ]
            decoder = cls(models, files.cuts, steps, **options)
            for model in models:
                decoder._stack.callback(model.close)
            stack.pop_all()
        return decoder

    takes_bare = False

    @property
    def n_ctx(self) -> int:
        return self._segments[0].n_ctx

    @property
    def n_batch(self) -> int:
        return self._segments[0].n_batch

    @property
    def n_ubatch(self) -> int:
        return self._segments[0].n_ubatch

    @property
    def chunk(self) -> int:
        """Those the whole model computes at once."""
        return self._most

    @property
    def n_sequences(self) -> int:
        return self._n_sequences

    @property
    def n_layer(self) -> int:
        return self._n_layer

    @property
    def n_vocab(self) -> int:
        return self.model.n_vocab

    @property
    def row_width(self) -> int:
        return self._segments[0].row_width

    @property
    def room(self) -> int:
        return self._segments[0].room

    @property
    def looks_at_text(self) -> bool:
        """Whether a step looks at the question."""
        return any(step.attention != "none" or step.looks_at_keys for at in self._at.values() for step, _ in at)

    @property
    def prunes(self) -> bool:
        """Whether there are steps."""
        return bool(self._at)

    @property
    def positions(self) -> Positions:
        """``renumbered`` for ordinary rotary models with steps."""
        return "renumbered" if self._at and not self.model.multi_position else "original"

    def set_steps(self, steps: Sequence[Pruning]) -> None:
        """Prune by ``steps`` from now on; steps at one layer act in this order. Everything is forgotten.

        Raises ``UsageError`` as ``schedule`` does; then those before stand.
        """
        at = schedule(steps, self._first[1:], self._n_layer, self.model.architecture)
        keys = any(step.looks_at_keys for entries in at.values() for step, _ in entries)
        self._final_norm = final_norm(self.model.header) if keys else None
        self._at = at
        self.clear()

    def length(self, sequence: int) -> int:
        """The position at which text may follow."""
        return self._stand(sequence)[1] + 1

    def layer_share(self, sequence: int) -> float:
        """Of the image rows that entered, the share a layer holds on average; 1 where none did."""
        history = self._history[self._checked(sequence)]
        entered = int(history.image.sum())
        depths = [model.n_layer for model in self._models]
        return float(np.dot(history.layer_counts, depths) / (entered * self._n_layer)) if entered else 1.0

    def decode(self, batch: Sequence[Rows], *, causal: bool = True) -> list[Logits]:
        """As ``Segment.logits``, with image rows dropped on the way.

        Which of them stay is decided when all of the batch has passed a segment. Where ``looks_at_text``, they come in
        one batch with the text after them, after text that came before. No logits can be had of image rows that may be
        dropped. Raises ``ValueError`` where that does not hold.
        """
        if not batch:
            return []
        check_rows(
            batch, self._stand, width=self.row_width, multi_position=self.model.multi_position,
            architecture=self.model.architecture, takes_bare=self.takes_bare,
        )  # fmt: skip
        flows = flows_of(batch, multi_position=self.model.multi_position)
        if 0 not in self._at:  # with rows dropped before it, the first segment will see for itself
            self._segments[0].check_room(batch, causal)
        self._check_flows(flows)
        came = {flow.sequence: (flow.positions, flow.crop >= 0) for flow in flows}
        try:
            for number in range(len(self._segments)):
                started = time.perf_counter()
                for flow in flows:
                    self._prune(number, flow)
                    flow.kept.append(flow.number)
                chosen = time.perf_counter()
                answers = self._pass(number, [flow for flow in flows if len(flow.number)], causal)
                self.seconds["choose"] += chosen - started
                self.seconds[f"segment {number}"] += time.perf_counter() - chosen
            for flow in flows:
                history = self._history[flow.sequence]
                self._history[flow.sequence] = history.add(*came[flow.sequence], flow.kept)
        except BaseException:
            for flow in flows:
                self.drop(flow.sequence)
            raise
        return in_place(flows, answers, len(batch), self.n_vocab)

    def fork(self, source: int, target: int) -> None:
        """Let the empty sequence ``target`` share all that ``source`` holds, in every segment."""
        self._checked(source)
        if count := len(self._history[self._checked(target)].time):
            raise ValueError(f"sequence {target} holds {count} rows; drop it before forking into it")
        for segment in self._segments:
            segment.fork(source, target)
        self._history[target] = self._history[source]
        for keys in self._lead_keys.values():
            if source in keys:
                keys[target] = keys[source]

    def drop(self, sequence: int, start: int | None = None) -> None:
        """Forget positions from ``start`` on, or the whole sequence; see ``Segment.drop``."""
        history = self._history[self._checked(sequence)]
        left = history.until(0 if start is None else start)
        for segment, rows, was in zip(self._segments, left.held, history.held, strict=True):
            if len(rows) < len(was):
                segment.drop(sequence, start if self.model.multi_position and len(rows) else len(rows))
            elif start is None:
                segment.drop(sequence)  # a call that failed may have left rows that no history tells of
        self._history[sequence] = left
        for keys in self._lead_keys.values():
            if sequence in keys:
                keys[sequence] = keys[sequence][: len(left.time)]

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from now on; raises ``UsageError`` for fewer than 1."""
        for segment in self._segments:
            segment.set_threads(threads)

    def clear(self) -> None:
        """Forget everything."""
        for segment in self._segments:
            segment.clear()
        self._history = [History.empty(len(self._first)) for _ in range(self._n_sequences)]
        # Keys of the text before the image, by layer and sequence: what attention to it is computed from.
        self._lead_keys: dict[int, dict[int, Floats]] = {layer: {} for layer in looked_at(self._at)}

    def close(self) -> None:
        """Free the contexts, and the models that ``open`` loaded; a second call does nothing."""
        self._stack.close()

    def __enter__(self) -> SegmentedDecoder:
        return self

    def __exit__(self, *_fault: object) -> None:
        self.close()

    def _checked(self, sequence: int) -> int:
        if not 0 <= sequence < self._n_sequences:
            raise ValueError(f"sequence {sequence} is outside 0..{self._n_sequences - 1}; make the decoder with more")
        return sequence

    def _stand(self, sequence: int) -> Stand:
        return self._history[self._checked(sequence)].stand

    def _check_flows(self, flows: Sequence[Flow]) -> None:
        for flow in flows:
            if not flow.entered or not self._at:
                continue
            if np.any(flow.want & (flow.crop >= 0)):
                raise ValueError(
                    f"logits of image rows of sequence {flow.sequence} are wanted, but these may be dropped; "
                    "want none of them (want_logits)"
                )
            if not self.looks_at_text:
                continue
            if not len(flow.question):
                raise ValueError("a step looks at the question: decode the image in one batch with the text after it")
            history = self._history[flow.sequence]
            if any(len(keys.get(flow.sequence, ())) != len(history.time) for keys in self._lead_keys.values()):
                raise ValueError(
                    "a step looks at the attention of the question to all before it: decode all images of a sequence "
                    "in one batch, before anything is generated"
                )

    def _prune(self, number: int, flow: Flow) -> None:
        layer, held = self._first[number], self._segments[number].rows(flow.sequence)
        looks = any(step.attention == "next" for step, _ in self._at.get(layer, ()))
        if looks and not flow.entered and self._is_lead(flow):
            (keys,) = self._probe(number, flow, ["Kcur-0"])
            self._note_keys(layer, flow.sequence, keys)
        for step, amount in self._at.get(layer, ()):
            image, text = flow.image, flow.question
            if not len(image):
                break
            attention = flow.attention
            if step.attention == "next":
                queries, keys = self._probe(number, flow, ["Qcur-0", "Kcur-0"])
                attention = self._attention(layer, flow, queries, keys, [step])
            state = LayerState(
                flow.hidden[image, : self.model.n_embd], flow.crop[image], flow.entered, held + image, held + text,
                attention if step.attention != "none" else None, flow.keys, flow.hidden[text, : self.model.n_embd],
                self._final_norm,
            )  # fmt: skip
            stay = step.survivors(state, amount)
            flow.keep(np.sort(np.concatenate([np.flatnonzero(flow.crop < 0), image[stay]])), held)
        flow.attention = flow.keys = None

    def _pass(self, number: int, flows: Sequence[Flow], causal: bool) -> list[Logits]:
        """Run one segment, and leave its hidden states in the flows; the last one gives logits."""
        if not flows:
            return []
        segment = self._segments[number]
        batch = [rows for flow in flows for rows in self._rows(number, flow, causal)]
        if number == len(self._segments) - 1:
            return segment.logits(batch, causal=causal, checked=True)
        last = self._models[number].n_layer - 1
        layer = self._first[number] + last
        names = [f"l_out-{last}"]
        steps = [step for step, _ in self._at.get(layer + 1, ()) if step.attention == "previous" or step.looks_at_keys]
        looking = [flow for flow in flows if flow.entered or self._is_lead(flow)] if steps else []
        if looking:
            names += [f"Qcur-{last}", f"Kcur-{last}"]
        tensors = segment.tensors(batch, names, causal=causal, checked=True, over=True)
        ends = np.cumsum([len(flow.number) for flow in flows])[:-1]
        split = [[tensor] for tensor in tensors] if len(flows) == 1 else [np.split(tensor, ends) for tensor in tensors]
        for flow, *parts in zip(flows, *split, strict=True):
            flow.hidden = parts[0]
            if flow in looking and flow.entered:
                flow.attention = self._attention(layer, flow, parts[1], parts[2], steps)
                lead = self._lead_keys[layer].get(flow.sequence)
                whole = parts[2] if lead is None else np.concatenate([lead, parts[2]])
                flow.keys = np.abs(whole).sum(axis=(1, 2))
            elif flow in looking:
                self._note_keys(layer, flow.sequence, parts[2])
        return []

    def _rows(self, number: int, flow: Flow, causal: bool) -> list[Rows]:
        """What a flow feeds a segment: all of it, or without ``causal`` what is left of each ``Rows`` that came in."""
        at = self._positions(number, flow)
        return [
            Rows(flow.hidden[part], at[..., part], flow.sequence, flow.want[part], flow.crop[part])
            for part in ([slice(None)] if causal else flow.parts)
        ]

    def _positions(self, number: int, flow: Flow) -> NDArray[np.int32]:
        if self.model.multi_position:
            return flow.positions
        start = self._segments[number].length(flow.sequence)
        return np.arange(start, start + len(flow.number), dtype=np.int32)

    def _is_lead(self, flow: Flow) -> bool:
        """Whether it is text that may come before an image, and not a token that was generated."""
        history = self._history[flow.sequence]
        text = not flow.entered and not history.image.any()
        return text and (len(flow.number) > 1 or not len(history.time))

    def _probe(self, number: int, flow: Flow, names: Sequence[str]) -> list[Floats]:
        """Queries and keys of a segment's first layer, had the flow gone on as it is; in a sequence of its own.

        A row's come of its hidden state alone, before any row sees another: whom an image's rows see does not matter.
        """
        segment = self._segments[number]
        rows = Rows(flow.hidden, self._positions(number, flow), self._spare)
        segment.fork(flow.sequence, self._spare)
        try:
            return segment.tensors([rows], names, checked=True)
        finally:
            segment.drop(self._spare)

    def _attention(
        self, layer: int, flow: Flow, queries: Floats, keys: Floats, steps: Sequence[Pruning]
    ) -> Floats | None:
        """What ``steps`` look at: of all rows of a long question it takes seconds, and most look from the last."""
        looking = [step for step in steps if step.attention != "none"]
        if not looking:
            return None
        rows = flow.question if any(step.looks_from_all for step in looking) else flow.question[-1:]
        lead = self._lead_keys[layer].get(flow.sequence)
        whole = keys if lead is None else np.concatenate([lead, keys])
        scale = head_scale(self.model.header, keys.shape[2])
        return text_attention(queries[rows], whole, scale, self._windows[layer])

    def _note_keys(self, layer: int, sequence: int, keys: Floats) -> None:
        earlier = self._lead_keys[layer].get(sequence, keys[:0])
        # More were noted in this call, for a step on the layer's other side; with fewer the text is not known whole.
        if len(earlier) == len(self._history[sequence].time):
            self._lead_keys[layer][sequence] = np.concatenate([earlier, keys])
