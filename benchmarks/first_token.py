"""Time to first token by stage, methods and budgets interleaved in one run.

    python benchmarks/first_token.py --arms none "prunesid 64" "uniform 64" [--lm LM.gguf --mmproj MMPROJ.gguf]

Every round encodes the picture afresh and answers with one token under each arm in turn; medians over the rounds that
follow the warm-up, and each arm's ratio to the first, round by round. Prints a Markdown table; ``--out`` takes all.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np

from edge_tokcomp.images import open_image
from edge_tokcomp.methods import get_method
from edge_tokcomp.vlm import load

STAGES = ("preprocess", "encode", "compress", "prefill", "first_token")
SAMPLE = Path(__file__).resolve().parents[1] / "models" / "demo" / "samples" / "scene-3.jpg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arms", nargs="+", default=["none", "prunesid 64", "uniform 64"], help="'METHOD KEEP'")
    parser.add_argument("--image", type=Path, default=SAMPLE)
    parser.add_argument("--lm")
    parser.add_argument("--mmproj")
    parser.add_argument("--precision", choices=("fp32", "int8"), default="fp32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    arms = [(get_method(arm.split()[0]), int(arm.split()[1]) if " " in arm else 1.0) for arm in options.arms]
    samples: list[list[dict[str, float]]] = [[] for _ in arms]
    image = open_image(options.image)
    with load(options.lm, options.mmproj, precision=options.precision, threads=options.threads) as vlm:
        for number in range(options.warm_up + options.rounds):
            for arm, (method, keep) in enumerate(arms):
                vlm.method, vlm.keep = method, keep
                timings = vlm.answer(image, max_tokens=1).timings_ms
                if number >= options.warm_up:
                    samples[arm].append(timings)
    first = np.array([each["first_token"] for each in samples[0]])
    rows = []
    print(f"{platform.processor() or platform.machine()}, {options.rounds} rounds, medians in ms")
    print(f"| arm | {' | '.join(STAGES)} | ratio |")
    print("|---" * (len(STAGES) + 2) + "|")
    for name, timed in zip(options.arms, samples, strict=True):
        medians = {stage: float(np.median([each[stage] for each in timed])) for stage in STAGES}
        ratio = float(np.median(np.array([each["first_token"] for each in timed]) / first))
        rows.append({"arm": name, "medians_ms": medians, "ratio": ratio, "samples": timed})
        print(f"| `{name}` | {' | '.join(f'{medians[stage]:.1f}' for stage in STAGES)} | {ratio:.2f} |")
    if options.out:
        document = {"precision": options.precision, "threads": options.threads, "arms": rows}
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
