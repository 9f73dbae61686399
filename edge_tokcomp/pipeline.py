"""Many pictures through one model: encoded one after another, answered several at once, given in their order.

Pictures come from an iterator that a thread of its own runs, so that reading and decoding files costs no time. The
tower and the language model either take turns with all threads, the tower whenever the language model has room for
another picture, or run beside each other with a part of the threads each. What waits in between is bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from .ahead import Ahead, AtOnce, Supply
from .answers import Answer, Facts
from .dynamic import Share
from .encoder import Picture
from .errors import TokcompError, UsageError
from .language.requests import Completion, Request
from .language.scheduler import Scheduler

T = TypeVar("T")

_PICTURES_AHEAD = 2
"""Decoded pictures that wait for the tower: each may have 100 million pixels."""
_MOST_PENDING = 1024
"""Asks that wait for one before them, whose text is long."""
_ENCODED_AHEAD = 2
"""Pictures that wait for the language model, where the tower runs beside it."""


@dataclass(frozen=True, eq=False)
class Ask(Generic[T]):
    """A question about one picture; without one it passes through in its place.

    ``tag``: whatever it is known by. ``share``: of a budget that pictures share, where that was decided before.
    ``information``: the score of a picture that was answered in an earlier run, to be counted in the running mean.
    """

    tag: T
    picture: Picture | None
    question: str
    share: Share | None = None
    information: float | None = None


Outcome = Answer | Exception | None
"""What became of an ``Ask``: None where there was nothing to ask."""


@dataclass(frozen=True, eq=False)
class _Ready(Generic[T]):
    """An ``Ask`` whose picture is encoded, or whose outcome is known."""

    ask: Ask[T]
    outcome: Outcome = None
    request: Request | None = None
    facts: Facts | None = None


@dataclass(eq=False)
class _Pending(Generic[T]):
    """An ``Ask`` that has not been given yet; ``done`` once its outcome is known."""

    ready: _Ready[T]
    outcome: Outcome = None
    done: bool = False


class Pipeline(Iterator[tuple[Ask[T], Outcome]]):
    """Iterate for every ``Ask``, without its picture, and its ``Outcome``, in order.

    ``encode``: makes what the language model is asked of a picture, and what is known of it by then; ``note``: counts
    the score of an ``Ask`` that has one. ``beside``: encode in a thread of its own rather than in turns. ``stopped``:
    asked all the time; once it says so nothing new is begun, and what had not reached the language model is left out.
    """

    def __init__(
        self, asks: Iterable[Ask[T]], encode: Callable[[Ask[T]], tuple[Request, Facts]], scheduler: Scheduler, *,
        note: Callable[[float], None] | None, beside: bool, stopped: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._encode, self._scheduler, self._note, self._stopped = encode, scheduler, note, stopped
        self._pictures: Ahead[Ask[T]] = Ahead(asks, _PICTURES_AHEAD, "edge-tokcomp pictures")
        made = map(self._ready, self._pictures)
        self._supply: Supply[_Ready[T]] = Ahead(made, _ENCODED_AHEAD, "edge-tokcomp tower") if beside else AtOnce(made)
        self._pending: deque[_Pending[T]] = deque()
        self._by_ticket: dict[int, _Pending[T]] = {}
        self._exhausted = self._ended = False
        self._running = self._run()

    def __next__(self) -> tuple[Ask[T], Outcome]:
        if self._ended:
            raise UsageError("these answers were not read to their end before another question was asked; ask again")
        return next(self._running)

    def end(self) -> None:
        """Another question comes."""
        if not self._ended:
            self._ended = True
            self.close()

    def close(self) -> None:
        """Begin nothing more, and forget what runs."""
        self._pictures.close()
        self._supply.close()
        self._scheduler.clear()

    def _run(self) -> Iterator[tuple[Ask[T], Outcome]]:
        try:
            while True:
                while self._pending and self._pending[0].done:
                    first = self._pending.popleft()
                    yield first.ready.ask, first.outcome
                self._fetch()
                if self._pending and self._pending[0].done:
                    continue
                if self._scheduler.busy:
                    self._step()
                elif self._exhausted and not self._pending:
                    return
        finally:
            self._pictures.close()
            self._supply.close()

    def _fetch(self) -> None:
        """Bring in as many pictures as the language model can begin with, waiting for one only when it is idle."""
        if self._stopped():
            self._stop()
        while not self._exhausted and self._scheduler.hungry and len(self._pending) < _MOST_PENDING:
            try:
                ready = self._supply.take(wait=not (self._scheduler.busy or self._pending))
            except StopIteration:
                self._exhausted = True
                return
            if self._stopped():
                self._stop()
                return
            if ready is None:
                return
            pending = _Pending(ready, ready.outcome, done=ready.request is None)
            self._pending.append(pending)
            if ready.request is not None:
                try:
                    self._by_ticket[self._scheduler.submit(ready.request)] = pending
                except TokcompError as fault:
                    pending.outcome, pending.done = fault, True
            if pending.done and len(self._pending) == 1:
                return  # at the front: it can be given

    def _step(self) -> None:
        try:
            completions = self._scheduler.step()
        except Exception as fault:  # noqa: BLE001 -- what was in the language model is lost, but not what comes after it
            for pending in self._by_ticket.values():
                pending.outcome, pending.done = fault, True
            self._by_ticket.clear()
            return
        for completion in completions:
            pending = self._by_ticket.pop(completion.ticket)
            pending.outcome, pending.done = _outcome(pending.ready, completion), True

    def _stop(self) -> None:
        self._exhausted = True
        left_out = [self._by_ticket.pop(ticket) for ticket in self._scheduler.cancel_waiting()]
        if left_out:  # and what only passes through behind them: it may say the same as one of them
            first = self._pending.index(left_out[0])
            self._pending = deque(
                pending for place, pending in enumerate(self._pending)
                if pending not in left_out and (place < first or pending.ready.request is not None)
            )  # fmt: skip

    def _ready(self, ask: Ask[T]) -> _Ready[T]:
        try:
            if self._note and ask.information is not None:
                self._note(ask.information)
            if ask.picture is None or self._stopped():
                return _Ready(ask)
            request, facts = self._encode(ask)
            ask = replace(ask, picture=None)  # let go: it is large
        except Exception as fault:  # noqa: BLE001 -- it is the outcome of this picture, not the end of the others
            return _Ready(ask, fault)
        return _Ready(ask, None, request, facts)


def _outcome(ready: _Ready[T], completion: Completion) -> Outcome:
    if completion.fault:
        return TokcompError(completion.fault)
    if ready.facts is None:
        raise ValueError(f"request {completion.ticket} came without facts")
    return ready.facts.answer(
        completion.text, completion.finish_reason or "stop", len(completion.tokens), completion.layer_share,
        prefill_s=completion.first_token_s, generate_s=completion.generate_s,
    )  # fmt: skip
