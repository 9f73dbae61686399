"""What being asked about every node of the graph costs a generated token: not at all, by machine code, by Python.

    python benchmarks/readout.py --shape smolvlm-500m [--rounds 20 --threads 1]

The same model in three contexts, without an evaluation callback, with the one that is machine code, and with one in
Python, none of which wants anything; single rows through each in turn, by themselves and beside a thread that computes
in Python, as a program that serves others does. Medians in ms and, of the ratios to no callback taken round by round,
the median. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from edge_tokcomp.export.random_models import LANGUAGE_SHAPES, cached_language_model
from edge_tokcomp.language import readout
from edge_tokcomp.language.decoder import PlainDecoder
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.tokens import Rows

ARMS = ("no callback", "machine code", "Python")
PROMPT, TOKENS = 64, 16


@contextmanager
def python_answers(wanted: bool) -> Iterator[None]:
    """While it lasts, as on a system that forbids executable memory."""
    native = readout.native_callback
    if wanted:
        readout.native_callback = lambda: 0
    try:
        yield
    finally:
        readout.native_callback = native


@contextmanager
def busy_thread(wanted: bool) -> Iterator[None]:
    """While it lasts, another thread counts in Python."""
    done = threading.Event()

    def count() -> None:
        number = 0
        while not done.is_set():
            number += 1

    thread = threading.Thread(target=count)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if wanted:
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=LANGUAGE_SHAPES, default="smolvlm-500m")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    path = cached_language_model(LANGUAGE_SHAPES[options.shape])
    with ExitStack() as stack:
        model = stack.enter_context(LanguageModel.open(path, threads=options.threads))
        decoders = {}
        for arm in ARMS:
            with python_answers(arm == "Python"):
                asked = None if arm == "no callback" else readout.Readout()
                decoders[arm] = stack.enter_context(PlainDecoder(model, n_ctx=512, readout=asked))
        values = np.random.default_rng(0).standard_normal((PROMPT + TOKENS, model.n_embd_inp), np.float32)
        print(f"{options.shape}, {options.threads} threads, {options.rounds} rounds of {TOKENS} tokens, medians in ms")
        print("| answered by | alone | to none | beside a busy thread | to none |\n|---|---|---|---|---|")
        times = np.array([
            [[turn(decoders[arm], arm, values, busy) for arm in ARMS] for busy in (False, True)]
            for _ in range(options.rounds + 1)
        ])[1:]  # fmt: skip
    for number, arm in enumerate(ARMS):
        cells = []
        for busy in (0, 1):
            mine = times[:, busy, number]
            cells += [f"{np.median(mine):.2f}", f"{np.median(mine / times[:, busy, 0]):.3f}"]
        print(f"| {arm} | {' | '.join(cells)} |")


def turn(decoder: PlainDecoder, arm: str, values: np.ndarray, busy: bool) -> float:
    """Median milliseconds of a token."""
    spent = []
    with python_answers(arm == "Python"):
        decoder.clear()
        decoder.decode([Rows(values[:PROMPT], np.arange(PROMPT, dtype=np.int32))])
        with busy_thread(busy):
            for place in range(PROMPT, PROMPT + TOKENS):
                row = Rows(values[place : place + 1], np.array([place], np.int32))
                started = time.perf_counter()
                decoder.decode([row])
                spent.append(1000 * (time.perf_counter() - started))
    return float(np.median(spent))


if __name__ == "__main__":
    main()
