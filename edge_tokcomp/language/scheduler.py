"""Many captions at once: continuous batching over the sequences of one decoder.

Every step is one call of the decoder: a row of each sequence that generates, and as many prompt rows of those that were
admitted as fit beside them. What prompts begin with alike is decoded once and forked. A sequence leaves when it ends,
and the next prompt takes its place with the next step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Hashable, Sequence

import numpy as np

from ..errors import TokcompError
from ..tokens import Rows
from .batches import of_image
from .continuation import Continuation
from .decoder import Decoder
from .model import LanguageModel
from .requests import Completion, Request, Run, marked
from .segment import Logits
from .token_embedding import TokenEmbedding, bare_rows

logger = logging.getLogger(__name__)

_PREFIX = 0
"""The sequence that holds what prompts begin with."""


class Scheduler:
    """Runs requests on the sequences of ``decoder``: the first is for prefixes, each other for one request at a time.

    ``causal``: whether image rows see only those before them; otherwise each image comes whole.
    ``chunk``: rows of one call, the decoder's by default. Decoders that drop image rows on the way get each prompt in
    one call. Requests are admitted in the order in which they were submitted, as soon as a sequence is free and the
    context has room for the prompt and some of the text. When it runs full, the request admitted last gives up its rows
    and is computed again later; its text goes on where it was.

    ``steps``: so far; ``given_up``: requests that had to be computed again.
    """

    def __init__(
        self, decoder: Decoder, model: LanguageModel, embedding: TokenEmbedding, *, causal: bool = True,
        chunk: int | None = None,
    ) -> None:  # fmt: skip
        """Raises ``ValueError`` for a decoder with one sequence."""
        if decoder.n_sequences < 2:
            raise ValueError("a scheduler needs a decoder of two sequences or more: one is for prefixes")
        self.steps = self.given_up = 0
        self._decoder, self._model, self._embedding, self._causal = decoder, model, embedding, causal
        self._chunk = chunk or decoder.chunk
        self._waiting: deque[Run] = deque()
        self._running: list[Run] = []  # in the order of their admission
        self._tickets = 0
        self.clear()

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running)

    @property
    def hungry(self) -> bool:
        """Whether another request would be looked at now: a sequence is free and none waits for room."""
        return bool(self._free) and not self._waiting

    def submit(self, request: Request) -> int:
        """Queue a request; the number by which its completion is known.

        Raises ``TokcompError`` for a prompt that the context cannot hold, ``UsageError`` for bad options,
        ``ValueError`` for rows that are not finite.
        """
        if request.length + 1 > self._decoder.n_ctx:
            raise TokcompError(
                f"image and prompt need {request.length + 1} rows of context, there are {self._decoder.n_ctx}; "
                "keep fewer image tokens, ask less, or raise n_ctx (--ctx)"
            )
        for rows in request.rows:
            if not np.isfinite(rows.embeddings).all():
                raise ValueError("the prompt holds values that are not finite")
            if not self._causal and of_image(rows) and len(rows) > self._decoder.n_ubatch:
                raise TokcompError(
                    f"{len(rows)} image rows that see one another must be computed at once, but n_ubatch is "
                    f"{self._decoder.n_ubatch}; keep fewer image tokens"
                )
        growth = Continuation(self._model, request.sampling, max_tokens=request.max_tokens, stop=request.stop)
        self._tickets += 1
        self._waiting.append(Run(self._tickets, request, growth))
        return self._tickets

    def cancel(self, ticket: int) -> None:
        """Forget a request; one that has ended, or never was, is none."""
        for run in [*self._running, *self._waiting]:
            if run.ticket == ticket:
                run.growth.close()
                if run in self._running:
                    self._release(run)
                else:
                    self._waiting.remove(run)

    def cancel_waiting(self) -> list[int]:
        """Forget the requests that no token was generated of and that are not admitted; their numbers."""
        tickets = [run.ticket for run in self._waiting if not run.growth.tokens]
        for ticket in tickets:
            self.cancel(ticket)
        return tickets

    def step(self) -> list[Completion]:
        """Admit what there is room for, run one batch, and give what ended with it.

        Raises what ``decoder.decode`` raises; then all requests are forgotten.
        """
        try:
            done = self._make_room()
            self._admit()
            if batch := self._batch():
                done += self._take(batch, self._decoder.decode([rows for _, rows in batch], causal=self._causal))
        except BaseException:
            self.clear()
            raise
        self.steps += 1
        return done

    def clear(self) -> None:
        """Forget all requests and everything in the decoder."""
        for run in [*self._running, *self._waiting]:
            run.growth.close()
        self._free = list(range(self._decoder.n_sequences - 1, _PREFIX, -1))
        self._waiting.clear()
        self._running.clear()
        self._prefix: Hashable = None
        self._decoder.clear()

    def _make_room(self) -> list[Completion]:
        """Let the context hold the next row of each sequence that generates, and what is left of the prompts in it: by
        those admitted last giving up. A text that is alone and has no room ends."""
        while self._running and sum(max(sum(map(len, r.waiting)), 1) for r in self._running) > self._decoder.room:
            run = self._running[-1]
            if len(self._running) > 1:
                self._release(run)
                tokens, last = run.growth.tokens, run.request.rows[-1]
                run.begin_again(self._embedding.rows(tokens, int(last.positions.max()) + 1) if tokens else None)
                self._waiting.appendleft(run)
                self.given_up += 1
                logger.info("the context is full: request %d is computed again later", run.ticket)
            elif self._prefix not in (None, run.request.key):
                self._decoder.drop(_PREFIX)
                self._prefix = None
            else:
                run.growth.end("context")
                run.text.append(run.growth.rest())
                logger.info("request %d ends after %d tokens: the context is full", run.ticket, len(run.growth.tokens))
                return [self._end(run)]
        return []

    def _admit(self) -> None:
        while self._waiting and self._free:
            run = self._waiting[0]
            shared = run.request.key == self._prefix
            needed = run.owed + (0 if shared else sum(map(len, run.request.prefix)))
            if self._running and needed + sum(other.owed for other in self._running) > self._decoder.room:
                return
            if not shared:
                self._prefix = None
                self._decoder.drop(_PREFIX)
                self._decoder.decode([marked(rows, _PREFIX) for rows in run.request.prefix], causal=self._causal)
                self._prefix = run.request.key
            self._waiting.popleft()
            run.sequence = self._free.pop()
            self._decoder.fork(_PREFIX, run.sequence)
            self._running.append(run)
            if not run.growth.tokens:
                run.growth.start()

    def _batch(self) -> list[tuple[Run, Rows]]:
        """The rows of one call: one of each sequence that generates, then prompts in the order of their admission."""
        bare = self._decoder.takes_bare and all(run.generates for run in self._running)
        text = bare_rows if bare else self._embedding.rows
        batch = [
            (run, text(run.growth.tokens[-1:], self._decoder.length(run.sequence), run.sequence))
            for run in self._running if run.generates
        ]  # fmt: skip
        left = max(self._chunk - len(batch), 1)
        for run in [run for run in self._running if run.waiting]:
            if self._decoder.prunes:
                # Which image rows stay is decided over all of them, by the text behind them too.
                if batch and left < sum(map(len, run.waiting)):
                    break
                rows = run.prompt()
                batch += [(run, part) for part in rows]
                left -= sum(map(len, rows))
                continue
            while run.waiting and left > 0:
                whole = not self._causal and of_image(run.waiting[0])
                batch.append((run, run.some(len(run.waiting[0]) if whole else left)))
                left -= len(batch[-1][1])
        return batch

    def _take(self, batch: Sequence[tuple[Run, Rows]], answers: Sequence[Logits]) -> list[Completion]:
        """Choose a token wherever logits came, and give what ended."""
        done = []
        for (run, _), logits in zip(batch, answers, strict=True):
            if not len(logits):
                continue
            fault = ""
            try:
                run.text.append(run.growth.take(logits[-1]))
            except TokcompError as reason:
                fault = str(reason)
                run.growth.close()
            if fault or run.growth.finish_reason:
                done.append(self._end(run, fault))
        return done

    def _end(self, run: Run, fault: str = "") -> Completion:
        completion = run.completion(self._decoder.layer_share(run.sequence), fault)
        self._release(run)
        return completion

    def _release(self, run: Run) -> None:
        self._decoder.drop(run.sequence)
        self._running.remove(run)
        self._free.append(run.sequence)
