"""Accuracy of every method at every budget on the demo tasks, as a Markdown table and one JSON line.

    python benchmarks/demo_matrix.py --scenes 300 --out matrix.json

All arms see the same scenes and questions; each scene is encoded once.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from edge_tokcomp.evaluation import Arm, paired, score_arms, summarise
from edge_tokcomp.methods import get_method
from edge_tokcomp.vlm import load

METHODS = ("random", "uniform", "pool", "prunesid", "prunesid-paper", "todre", "todre:form=k_center")
KEEPS = (192, 128, 64, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--keeps", nargs="+", type=int, default=KEEPS)
    parser.add_argument("--precision", choices=("fp32", "int8"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    arms = [Arm(get_method("none"), 1.0)]
    arms += [Arm(get_method(name), keep) for name in options.methods for keep in options.keeps]

    def told(done: int) -> None:
        if done % 20 == 0:
            print(f"{done}/{options.scenes} scenes", file=sys.stderr, flush=True)

    with load(precision=options.precision, threads=options.threads) as vlm:
        scores, tokens = score_arms(vlm, arms, scenes=options.scenes, seed=options.seed, told=told)
    tasks = list(scores[0])
    print(f"| method | tokens | {' | '.join(tasks)} | mean | against none |")
    print("|---" * (len(tasks) + 4) + "|")
    rows = []
    for arm, result, count in zip(arms, scores, tokens, strict=True):
        means = {task: summarise(result[task]) for task in tasks}
        pooled, plain = (np.nanmean(np.stack([each[task] for task in tasks]), 0) for each in (result, scores[0]))
        gap = paired(pooled, plain)
        rows.append({"arm": arm.name, "tokens": count, "tasks": means, "per_scene": gap})
        cells = " | ".join(f"{100 * means[task]['score']:.1f}" for task in tasks)
        mean = np.mean([means[task]["score"] for task in tasks])
        interval = (
            f"{100 * gap['difference']:+.1f} [{100 * gap['difference_low']:+.1f}, {100 * gap['difference_high']:+.1f}]"
        )
        print(f"| {arm.method} | {count:.0f} | {cells} | {100 * mean:.1f} | {interval} |")
    document = {"scenes": options.scenes, "seed": options.seed, "precision": options.precision, "arms": rows}
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
