"""What generation takes outside llama.cpp's own call: our Python between two calls of ``llama_decode``.

    python benchmarks/own_time.py --shape smolvlm-500m [--rounds 20 --tokens 64 --threads 2]

One sequence by ``generate`` and sixteen by ``Scheduler``, greedy, behind prompts of 90 rows; from the first token of
the last sequence on. Medians over rounds. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import llama_cpp.llama_cpp as llama

from edge_tokcomp.export.random_models import LANGUAGE_SHAPES, cached_language_model
from edge_tokcomp.language.decoder import PlainDecoder
from edge_tokcomp.language.generation import generate
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.requests import Request
from edge_tokcomp.language.sampling import Sampling
from edge_tokcomp.language.scheduler import Scheduler
from edge_tokcomp.language.token_embedding import TokenEmbedding

PROMPT, AT_ONCE = 90, 16


class Clock:
    """Seconds inside ``llama_decode``, which it stands in for."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.inside, self._call = 0.0, call

    def __call__(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        answer = self._call(*arguments)
        self.inside += time.perf_counter() - started
        return answer


@contextmanager
def clocked() -> Iterator[Clock]:
    """While it lasts ``llama_decode`` is timed."""
    plain = llama.llama_decode
    clock = Clock(plain)
    llama.llama_decode = clock
    try:
        yield clock
    finally:
        llama.llama_decode = plain


def alone(decoder: PlainDecoder, model: LanguageModel, tokens: int, clock: Clock) -> tuple[float, float]:
    """Milliseconds of a token of one sequence, and how many of them outside."""
    embedding = TokenEmbedding.of(model)
    decoder.clear()
    prompt = [embedding.rows([1] * PROMPT, 0)]
    pieces = generate(decoder, model, embedding, prompt, Sampling(ignore_end=True), max_tokens=tokens + 1)
    while not pieces.tokens:
        next(pieces)
    done = len(pieces.tokens)
    clock.inside, started = 0.0, time.perf_counter()
    pieces.text()
    whole, count = time.perf_counter() - started, len(pieces.tokens) - done
    return 1e3 * whole / count, 1e3 * (whole - clock.inside) / count


def together(decoder: PlainDecoder, model: LanguageModel, tokens: int, clock: Clock) -> tuple[float, float]:
    """The same of a step of many sequences."""
    embedding = TokenEmbedding.of(model)
    scheduler = Scheduler(decoder, model, embedding)
    for number in range(AT_ONCE):
        rows = [embedding.rows([1 + number] * PROMPT, 0)]
        scheduler.submit(Request([], number, rows, Sampling(ignore_end=True), tokens + AT_ONCE))
    room = decoder.n_ctx - AT_ONCE * PROMPT
    while decoder.room > room:  # prompts come first
        scheduler.step()
    scheduler.step()
    clock.inside, started = 0.0, time.perf_counter()
    for _ in range(tokens):
        scheduler.step()
    whole = time.perf_counter() - started
    scheduler.clear()
    return 1e3 * whole / tokens, 1e3 * (whole - clock.inside) / tokens


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smolvlm-500m", choices=sorted(LANGUAGE_SHAPES))
    parser.add_argument("--quantization", default="Q8_0")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    path = cached_language_model(LANGUAGE_SHAPES[options.shape], options.quantization)
    print("| sequences | ms a step | outside llama.cpp ms | share |\n|---|---|---|---|")
    with LanguageModel.open(path, threads=options.threads) as model, clocked() as clock:
        sizes = {"n_ctx": 4096, "n_sequences": AT_ONCE + 1, "threads": options.threads}
        with PlainDecoder(model, **sizes) as decoder:
            found: dict[int, list[tuple[float, float]]] = {1: [], AT_ONCE: []}
            for _ in range(options.rounds + 1):
                found[1].append(alone(decoder, model, options.tokens, clock))
                found[AT_ONCE].append(together(decoder, model, options.tokens, clock))
            for count, (_, *samples) in found.items():
                shares = median(own / whole for whole, own in samples)
                whole, own = (median(column) for column in zip(*samples, strict=True))
                print(f"| {count} | {whole:.2f} | {own:.2f} | {shares:.1%} |")


if __name__ == "__main__":
    main()
