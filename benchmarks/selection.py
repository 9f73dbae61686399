"""Time and memory of choosing tokens, each method beside the product or decomposition it cannot avoid.

    python benchmarks/selection.py [--methods prunesid todre ...] [--cases "576 to 64" ...] [--torch] [--out FILE.json]

One thread. Every round times all yardsticks and all methods of a case, in CPU time (on CUDA by the clock) and in an
order of its own: what runs pays for the memory that the one before it gave back. Medians over the rounds, and a
method's ratio to its floor within the same round. Prints a Markdown table; ``--out`` takes all samples.

The pictures are made up in the likeness of a CLIP tower's output: 160 smooth fields over the grid, finer and weaker one
after another, each in a random direction of feature space; white noise a quarter as strong; and one heavy-tailed row
that all tokens share. Their mean cosine is about 0.4 and the squares of their singular values fall to 1 % of the
largest within some 20 (the bundled model's: 0.4 to 0.7, and within 10). 2880 tokens are five crops of 24 x 24.
Features count as embeddings (no projector), and the question is 12 random rows.

Floors: PruneSID's is the decomposition of each crop's N x N matrix, as many components as it has groups (SciPy; with
``--torch`` PyTorch's, which has all of them only). Methods that compare all pairs: the Gram matrix. ToDRE and CDPruner:
that or K matrix-vector products, whichever is less; CDPruner's also the products with the K rows of its Cholesky
factor. Others: the product of their rows with the few they are compared with, with each other in their chunk (HoloV),
or, halved pass after pass, with the other half (ToMe). Operands are in float64 and normalised beforehand.

Share: of the time that a 7B model takes to read the image rows kept and 40 rows of text. ``--prefill`` says how fast it
reads; 40 tokens a second is a round number for Q4_0 on two cores, not a measurement, and encoding comes on top.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import numpy as np
from array_api_compat import array_namespace, is_numpy_array
from scipy.linalg import eigh as scipy_eigh
from threadpoolctl import threadpool_limits

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.methods import get_method
from edge_tokcomp.tokens import Layout, VisionTokens

METHODS = (
    "mosaic", "prunesid", "prunesid-paper", "prunesid-qwen", "todre", "todre:form=k_center", "divprune",
    "divprune:centred=true,distinctive=true", "scope", "mmtok", "cdpruner", "dart", "holov", "visionzip", "vispruner",
    "tome", "pool", "uniform", "random",
)  # fmt: skip
HEADS, QUESTION = 16, 12
TEXT_ROWS = 40


@dataclass(frozen=True)
class Case:
    """``crops`` of ``side`` x ``side`` tokens, ``width`` values each, to ``keep`` in all."""

    crops: int
    side: int
    width: int
    keep: int

    def __str__(self) -> str:
        return f"{self.crops * self.side**2} to {self.keep}"


CASES = (
    Case(1, 24, 1024, 64),
    Case(1, 24, 1024, 128),
    Case(5, 24, 1024, 160),
    Case(5, 24, 1024, 320),
    Case(1, 32, 4096, 128),
)


def picture(side: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """``(side * side, width) float32``: features in the likeness of a tower's, see above."""
    fields = 160
    place = np.stack(np.divmod(np.arange(side**2), side)) / side
    cycles = rng.random((2, fields)) * np.minimum(0.5 + np.arange(fields) / 12, side / 4)
    phase = rng.random((2, fields))
    field = np.prod(np.cos(2 * np.pi * (place[:, :, None] * cycles[:, None] + phase[:, None])), axis=0)
    field *= (1 + np.arange(fields)) ** -0.6 / field.std(axis=0)
    scene = field @ rng.standard_normal((fields, width))
    shared = rng.standard_t(3, width)
    noise = 0.25 * rng.standard_normal(scene.shape)
    return (scene / scene.std() + 0.75 * shared / shared.std() + noise).astype(np.float32)


def image(case: Case, seed: int = 0) -> tuple[VisionTokens, np.ndarray]:
    """An image of ``case`` and a question."""
    rng = np.random.default_rng(seed)
    crops = [picture(case.side, case.width, rng) for _ in range(case.crops)]
    attention = [rng.dirichlet(np.full(case.side**2, 0.1), HEADS) for _ in range(case.crops)]
    layout = Layout.of_grids(*[(case.side, case.side)] * case.crops)
    question = rng.standard_normal((QUESTION, case.width)).astype(np.float32)
    tokens = VisionTokens(
        np.concatenate(crops), layout, cls_attention=np.concatenate(attention, axis=1).astype(np.float32)
    )
    return tokens, question


def yardsticks(case: Case, features: np.ndarray, move: Callable[[np.ndarray], Any]) -> dict[str, Callable[[], Any]]:
    """What the floors are made of, on arrays that ``move`` put where the methods run."""
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    count, kept = case.side**2, case.keep // case.crops
    squashed = np.tanh(features[:count].astype(np.float64) / 2)
    squashed -= squashed.mean(axis=1, keepdims=True)
    matrix = move(squashed @ squashed.T)
    every, crop, factor = move(unit), move(unit[:count]), move(unit[:count, :kept].copy())
    few, chunk = move(unit[:8].T.copy()), count // 16
    eigh = array_namespace(matrix).linalg.eigh
    leading = {"subset_by_index": [count - kept // 4, count - 1]}
    halves, left = [], count
    while left > kept:
        halves.append(left // 2)
        left = max(kept, left - left // 2)

    def for_crops(work: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: [work() for _ in range(case.crops)]

    return {
        "eigh, K/4": for_crops(lambda: scipy_eigh(matrix, **leading) if is_numpy_array(matrix) else eigh(matrix)),
        "eigh": for_crops(lambda: eigh(matrix)),
        "Gram": lambda: every @ every.T,
        "crops' Grams": for_crops(lambda: crop @ crop.T),
        "products": lambda: [every @ every[i] for i in range(case.keep)],
        "crops' products": for_crops(lambda: [crop @ crop[i] for i in range(kept)]),
        "factors": for_crops(lambda: [factor[:, :i] @ factor[i, :i] for i in range(kept)]),
        "8 rows": lambda: every @ few,
        "chunks": for_crops(lambda: [rows @ rows.T for rows in (crop[i * chunk : (i + 1) * chunk] for i in range(16))]),
        "halves": for_crops(lambda: [crop[:half] @ crop[half : 2 * half].T for half in halves]),
    }


FLOORS: dict[str, Callable[[dict[str, float]], float]] = {
    "prunesid": lambda ms: ms["eigh, K/4"],
    "prunesid-paper": lambda ms: ms["eigh, K/4"],
    "prunesid-qwen": lambda ms: ms["eigh, K/4"],
    "todre": lambda ms: min(ms["Gram"], ms["products"]),
    "divprune": lambda ms: ms["Gram"],
    "mosaic": lambda ms: ms["crops' Grams"],
    "scope": lambda ms: ms["crops' Grams"],
    "mmtok": lambda ms: ms["Gram"],
    "cdpruner": lambda ms: min(ms["crops' Grams"], ms["crops' products"]) + ms["factors"],
    "dart": lambda ms: ms["8 rows"],
    "holov": lambda ms: ms["chunks"],
    "visionzip": lambda ms: ms["8 rows"],
    "vispruner": lambda ms: ms["crops' Grams"],
    "tome": lambda ms: ms["halves"],
}


def milliseconds(work: Callable[[], Any], device: str) -> float:
    """On a CPU the thread's own time, which does not count what else runs on the machine; on CUDA the clock's."""
    if device == "cuda":
        import torch

        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)
    start = time.thread_time()
    work()
    return 1000 * (time.thread_time() - start)


def peak_bytes(work: Callable[[], Any], device: str) -> int:
    """Most memory held at once beyond what was there before; on a PyTorch CPU, which does not say, 0."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return int(torch.cuda.max_memory_allocated() - before)
    if device == "cpu":
        return 0
    gc.collect()
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure(case: Case, names: list[str], device: str, rounds: int, warm_up: int) -> list[dict[str, Any]]:
    """A row of results for each yardstick and method of ``case``."""
    tokens, question = image(case)
    move = mover(device)
    work = yardsticks(case, tokens.features, move)
    moved = VisionTokens(move(tokens.features), tokens.layout, cls_attention=move(tokens.cls_attention))
    asked = move(question)
    for name in names:
        work[name] = partial(get_method(name).compress, moved, case.keep, query=asked)
    samples: dict[str, list[float]] = {name: [] for name in work}
    for number in range(warm_up + rounds):
        for name in in_turn(list(work), number):
            taken = milliseconds(work[name], device)
            if number >= warm_up:
                samples[name].append(taken)
    by_round = [{name: taken[i] for name, taken in samples.items()} for i in range(rounds)]
    rows = []
    for name, each in work.items():
        floor = FLOORS.get(name.split(":")[0])
        rows.append(
            {
                "case": str(case), "name": name, "ms": float(np.median(samples[name])),
                "ratio": None if floor is None else float(np.median([ms[name] / floor(ms) for ms in by_round])),
                "squares": peak_bytes(each, device) / (8 * len(tokens) ** 2), "samples_ms": samples[name],
            }
        )  # fmt: skip
    return rows


def in_turn(names: list[str], number: int) -> list[str]:
    """The order of round ``number``: shuffled, since turning it in a circle would leave everyone its neighbour."""
    return [names[place] for place in np.random.default_rng(number).permutation(len(names))]


def mover(device: str) -> Callable[[np.ndarray], Any]:
    """How an array gets to ``device``."""
    if device == "numpy":
        return lambda array: array
    import torch

    torch.set_num_threads(1)
    return lambda array: torch.from_numpy(array).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--cases", nargs="+", choices=[str(case) for case in CASES], metavar="'N to K'")
    parser.add_argument("--torch", action="store_true", help="on PyTorch: CUDA where there is a device, the CPU if not")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--prefill", type=float, default=40.0, help="tokens a second of the 7B model, for the share")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    try:
        report(options)
    except TokcompError as fault:
        parser.exit(2, f"{parser.prog}: {fault}\n")


def report(options: argparse.Namespace) -> None:
    """Measure the cases, print the table and write the file."""
    device = "numpy"
    if options.torch:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{platform.processor() or platform.machine()}, {device}, one thread, {options.rounds} rounds, medians")
    print(f"share: of {TEXT_ROWS} text rows and the image rows kept at {options.prefill:g} tokens a second\n")
    print("| case | method | ms | x floor | memory / 8 N² bytes | share |")
    print("|---" * 6 + "|")
    results = []
    with threadpool_limits(1):
        for case in CASES:
            if options.cases is None or str(case) in options.cases:
                for row in measure(case, options.methods, device, options.rounds, options.warm_up):
                    row["share"] = row["ms"] / 1000 * options.prefill / (case.keep + TEXT_ROWS)
                    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
                    memory = "" if device == "cpu" else f"{row['squares']:.1f}"
                    cells = [row["case"], f"`{row['name']}`", f"{row['ms']:.2f}", ratio, memory, f"{row['share']:.2%}"]
                    print(f"| {' | '.join(cells)} |", flush=True)
                    results.append(row)
    if options.out:
        document = {"device": device, "prefill": options.prefill, "rows": results}
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
