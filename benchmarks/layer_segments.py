"""A language model cut into layer segments against the same model whole: prefill, decoding, where the time goes.

    python benchmarks/layer_segments.py --shape llava-1.5-7b --at 8,16,24 --steps "spectrum@8:0.5,16:0.25,24:0"

Three arms in one process: the whole model, its segments with nothing dropped, its segments with the steps. All compute
the same random rows, without sampling: in turn a prompt of text, image and text, then, row by row in turn, single rows
as generation feeds them; who begins changes every time. Medians over the rounds that follow the warm-up; ratios to the
whole model are taken round by round (of tokens: median over the round, one by one) and given with their range. Prints
Markdown tables; ``--out`` takes every sample. ``--memory``: afterwards each arm in a process of its own, for its peaks
(Linux).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.export.random_models import LANGUAGE_SHAPES, cached_language_model
from edge_tokcomp.export.split import cached_segments
from edge_tokcomp.language import binding
from edge_tokcomp.language.decoder import Decoder, PlainDecoder
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.segment_files import SegmentFiles
from edge_tokcomp.language.segmented import SegmentedDecoder
from edge_tokcomp.methods.layer_steps import read_layer_step
from edge_tokcomp.tokens import Rows

ARMS = PLAIN, SEGMENTED, PRUNED = "plain", "segmented", "pruned"
LEAD = 5
"""Rows of text before the image: the start of the sequence and ``USER:``."""


@dataclass(frozen=True)
class Work:
    """What every arm computes: a prompt of ``image`` and ``text`` rows, then ``tokens`` single rows."""

    lm: Path
    segments: Path
    steps: str
    image: int
    text: int
    tokens: int
    threads: int

    @contextmanager
    def opened(self, arms: Sequence[str]) -> Iterator[dict[str, Decoder]]:
        """Decoders with room for it all; both segmented arms share the weights."""
        options = {"threads": self.threads, "n_ctx": -(-(self.image + self.text + self.tokens) // 256) * 256}
        files = SegmentFiles.read(self.segments)
        steps = {SEGMENTED: [], PRUNED: [read_layer_step(part) for part in self.steps.split("+")]}
        decoders: dict[str, Decoder] = {}
        with ExitStack() as stack:
            if PLAIN in arms:
                decoders[PLAIN] = PlainDecoder(stack.enter_context(LanguageModel.open(self.lm)), **options)
            if cut := [arm for arm in arms if arm != PLAIN]:
                models = [stack.enter_context(LanguageModel.open(path)) for path in files.paths]
                decoders |= {arm: SegmentedDecoder(models, files.cuts, steps[arm], **options) for arm in cut}
            for decoder in decoders.values():
                stack.enter_context(decoder)
            yield decoders

    def round(self, decoders: Mapping[str, Decoder], number: int) -> dict[str, Turn]:
        """One turn of every arm."""
        count = self.image + self.text
        width = next(iter(decoders.values())).row_width
        values = np.random.default_rng(0).standard_normal((count + self.tokens, width), np.float32)
        ends = [0, LEAD, LEAD + self.image, count]
        prompt = [  # text, image, text, as the pipeline feeds them
            Rows(
                values[start:end], np.arange(start, end, dtype=np.int32), crop=np.full(end - start, crop),
                want_logits=np.arange(start, end) == count - 1,
            )
            for (start, end), crop in zip(pairwise(ends), (-1, 0, -1), strict=True)
        ]  # fmt: skip
        turns = {}
        for arm in in_turn(decoders, number):
            decoders[arm].clear()
            turns[arm] = Turn(timed(decoders[arm], prompt), self.image * decoders[arm].layer_share(0))
        for place in range(count, count + self.tokens):
            row = Rows(values[place : place + 1], np.array([place], np.int32))
            for arm in in_turn(decoders, number + place):
                turns[arm].tokens.append(timed(decoders[arm], [row]))
        return turns


@dataclass
class Turn:
    """Of one arm in one round: milliseconds of prefill and of each token, whole and by part."""

    prefill: dict[str, float]
    rows_a_layer: float
    tokens: list[dict[str, float]] = field(default_factory=list)


def in_turn(arms: Iterable[str], number: int) -> tuple[str, ...]:
    """The arms in every order, one after another, so that each has either neighbour."""
    orders = list(permutations(arms))
    return orders[number % len(orders)]


def timed(decoder: Decoder, batch: Sequence[Rows]) -> dict[str, float]:
    """Milliseconds of decoding: ``whole``, by segment and choosing with the ``rest``, and ``outside llama.cpp``."""
    before = dict(decoder.seconds) if isinstance(decoder, SegmentedDecoder) else {}
    with clocked() as computing:
        started = time.perf_counter()
        decoder.decode(batch)
        whole = 1000 * (time.perf_counter() - started)
    parts = {name: 1000 * (decoder.seconds[name] - seconds) for name, seconds in before.items()}
    if parts:
        parts["rest"] = whole - sum(parts.values())
    return {"whole": whole, **parts, "outside llama.cpp": whole - 1000 * computing[0]}


@contextmanager
def clocked() -> Iterator[list[float]]:
    """While it lasts, the seconds spent within llama.cpp's decode are added to the one value of the list."""
    spent, decode = [0.0], binding.Context.decode

    def measured(*arguments: Any) -> None:
        started = time.perf_counter()
        try:
            decode(*arguments)
        finally:
            spent[0] += time.perf_counter() - started

    binding.Context.decode = measured
    try:
        yield spent
    finally:
        binding.Context.decode = decode


def measure(work: Work, rounds: int, warm_up: int) -> dict[str, list[Turn]]:
    """Turns of each arm, one a round."""
    turns: dict[str, list[Turn]] = {arm: [] for arm in ARMS}
    with work.opened(ARMS) as decoders:
        for number in range(warm_up + rounds):
            for arm, turn in work.round(decoders, number).items():
                if number >= warm_up:
                    turns[arm].append(turn)
    return turns


def peak_memory(work: Work, arm: str) -> dict[str, float]:
    """Peaks of this process in MiB while it runs one arm: ``VmHWM`` of all, ``RssAnon`` and ``RssFile`` by sampling."""
    peaks = {"RssAnon": 0.0, "RssFile": 0.0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            now = memory_now()
            for name in peaks:
                peaks[name] = max(peaks[name], now[name])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with work.opened([arm]) as decoders:
            work.round(decoders, 0)
    finally:
        done.set()
        watcher.join()
    return {"VmHWM": memory_now()["VmHWM"], **peaks}


def memory_now() -> dict[str, float]:
    """The sizes in ``/proc/self/status``, MiB."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines if words[-1] == "kB"}


def ratio_cell(ratios: Sequence[float]) -> str:
    """Median and range."""
    return f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def times_table(turns: Mapping[str, Sequence[Turn]]) -> str:
    """One line an arm."""
    lines = ["| arm | image rows a layer | prefill, ms | to plain | ms a token | to plain |", "|---" * 6 + "|"]
    for arm, mine in turns.items():
        pairs = list(zip(mine, turns[PLAIN], strict=True))
        prefill = [turn.prefill["whole"] / plain.prefill["whole"] for turn, plain in pairs]
        token = [
            float(np.median([a["whole"] / b["whole"] for a, b in zip(turn.tokens, plain.tokens, strict=True)]))
            for turn, plain in pairs
        ]
        lines.append(
            f"| {arm} | {mine[0].rows_a_layer:.0f} "
            f"| {np.median([turn.prefill['whole'] for turn in mine]):.1f} | {ratio_cell(prefill)} "
            f"| {np.median([each['whole'] for turn in mine for each in turn.tokens]):.2f} | {ratio_cell(token)} |"
        )
    return "\n".join(lines)


def parts_table(turns: Mapping[str, Sequence[Turn]], cuts: Sequence[int], depth: int) -> str:
    """One line a part of the time, a column for prefill and one for a token of each arm."""
    lines = [f"| ms | {' | '.join(f'{arm}, prefill | {arm}, token' for arm in turns)} |"]
    lines.append("|---" * (1 + 2 * len(turns)) + "|")
    bounds = [0, *cuts, depth]
    for part in turns[SEGMENTED][0].prefill:
        label = part
        if part.startswith("segment "):
            number = int(part.split()[1])
            label = f"layers {bounds[number]} to {bounds[number + 1] - 1}"
        cells = []
        for mine in turns.values():
            for samples, digits in (
                ([turn.prefill for turn in mine], 1),
                ([token for turn in mine for token in turn.tokens], 3),
            ):
                found = [sample[part] for sample in samples if part in sample]
                cells.append(f"{np.median(found):.{digits}f}" if found else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(options: argparse.Namespace) -> None:
    """Cut the model, measure, print the tables and write the file."""
    for part in options.steps.split("+"):
        read_layer_step(part)  # A mistake is said before gigabytes are written.
    lm = options.lm or cached_language_model(LANGUAGE_SHAPES[options.shape])
    segments = cached_segments(lm, options.at, threads=options.threads)
    files = SegmentFiles.read(segments)
    work = Work(lm, segments, options.steps, options.rows, options.text, options.tokens, options.threads)
    turns = measure(work, options.rounds, options.warm_up)
    name = options.lm.name if options.lm else f"{options.shape}, random weights"
    print(f"{name}, {files.depth} layers cut at {', '.join(map(str, files.cuts))}; {PRUNED}: `{options.steps}`")
    print(
        f"{options.rows} image and {options.text} text rows, {options.tokens} tokens; {options.threads} threads, "
        f"{options.rounds} rounds, medians\n"
    )
    print(times_table(turns), "", parts_table(turns, files.cuts, files.depth), sep="\n")
    memory = {}
    if options.memory:
        print("\n| peak, MiB | all | anonymous | of files |\n|---|---|---|---|")
        for arm in ARMS:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                memory[arm] = pool.submit(peak_memory, work, arm).result()
            print(f"| {arm} | {' | '.join(f'{memory[arm][key]:.0f}' for key in ('VmHWM', 'RssAnon', 'RssFile'))} |")
    if options.out:
        document = {
            "model": name, "cuts": files.cuts, "work": asdict(work) | {"lm": str(lm), "segments": str(segments)},
            "versions": {each: version(each) for each in ("llama-cpp-python", "numpy")} | {
                "python": platform.python_version(), "machine": platform.machine()
            },
            "turns": {arm: [asdict(turn) for turn in mine] for arm, mine in turns.items()}, "memory_mib": memory,
        }  # fmt: skip
        options.out.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=list(LANGUAGE_SHAPES), default="llava-1.5-7b", help="random weights")
    parser.add_argument("--lm", type=Path, help="a GGUF file, instead of --shape")
    parser.add_argument("--at", type=lambda text: tuple(map(int, text.split(","))), default=(8, 16, 24), metavar="N,N")
    parser.add_argument("--steps", default="spectrum@8:0.5,16:0.25,24:0", help="several are joined by '+'")
    parser.add_argument("--rows", type=int, default=576, help="of the image")
    parser.add_argument("--text", type=int, default=30, help="rows of the prompt around it")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    try:
        report(options)
    except TokcompError as fault:
        parser.exit(2, f"{parser.prog}: {fault}\n")


if __name__ == "__main__":
    main()
