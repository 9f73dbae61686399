"""How tower and language model share one budget of threads, by measuring both at the start of a long run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .language.decoder import Decoder
from .language.requests import Request, marked
from .language.token_embedding import TokenEmbedding

_TOKENS = 64
"""Of a caption, where no more are known of it."""
_LITTLE = 0.03
"""Beside each other must be faster by this share than in turns: what is measured varies, and costs memory."""


@dataclass(frozen=True)
class Division:
    """Threads of the ``tower`` and of the ``language`` model, run ``beside`` each other or in turns; ``reason``."""

    tower: int
    language: int
    beside: bool
    reason: str

    def __str__(self) -> str:
        how = "beside each other" if self.beside else "in turns"
        return f"tower {self.tower}, language model {self.language}, {how}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Halves:
    """The two halves of a pipeline as they are measured: ``encode`` does the tower's work on a picture, ``generate``
    the language model's; ``set_threads`` gives each its threads."""

    encode: Callable[[], object]
    generate: Callable[[], object]
    set_threads: Callable[[int, int], None]


def divide(halves: Halves, threads: int) -> Division:
    """The faster of both in turns with all ``threads`` and beside each other with a part each, and set it.

    The parts are in the proportion of the work; both ways are run, so that what they take from one another counts.
    """
    if threads < 2:
        halves.set_threads(threads, threads)
        return Division(threads, threads, False, "there is one thread")
    halves.set_threads(threads, threads)
    halves.encode()  # first runs take memory
    halves.generate()
    encode, generate = _seconds(halves.encode), _seconds(halves.generate)
    part = min(max(round(threads * encode / (encode + generate)), 1), threads - 1)
    halves.set_threads(part, threads - part)
    halves.encode()
    beside, turns = _side_by_side(halves), encode + generate
    figures = f"{turns * 1e3:.0f} ms a picture in turns, {beside * 1e3:.0f} beside each other"
    if beside < turns * (1 - _LITTLE):
        return Division(part, threads - part, True, figures)
    halves.set_threads(threads, threads)
    return Division(threads, threads, False, figures)


def language_work(
    decoder: Decoder, embedding: TokenEmbedding, request: Request, *, causal: bool, parallel: int
) -> Callable[[], None]:
    """What the language model does for one picture of ``parallel``: its prompt, and its share of the steps in which all
    of them generate."""
    tokens = min(request.max_tokens, _TOKENS)
    decoder.clear()
    decoder.decode([marked(rows, 0) for rows in request.prefix], causal=causal)
    count = min(parallel, decoder.n_sequences - 1, max(decoder.room // (request.length + tokens), 1))
    numbers = range(1, count + 1)

    def run() -> None:
        for number in numbers:
            decoder.drop(number)
        decoder.fork(0, 1)
        decoder.decode([marked(rows, 1) for rows in request.rows], causal=causal)
        for number in numbers[1:]:
            decoder.fork(1, number)
        for _ in range(max(round(tokens / count), 1)):
            decoder.decode([embedding.rows([0], decoder.length(number), number) for number in numbers])

    return run


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _side_by_side(halves: Halves) -> float:
    """Seconds a picture while both run all the time: those of the slower half."""
    ended = threading.Event()
    times: list[float] = []
    faults: list[BaseException] = []

    def encode() -> None:
        try:
            while not (ended.is_set() and times):
                times.append(_seconds(halves.encode))
        except BaseException as fault:  # noqa: BLE001 -- raised where it is waited for
            faults.append(fault)

    beside = threading.Thread(target=encode, name="edge-tokcomp tower")
    beside.start()
    try:
        generate = np.median([_seconds(halves.generate) for _ in range(2)])
    finally:
        ended.set()
        beside.join()
    if faults:
        raise faults[0]
    return float(max(np.median(times), generate))
