"""Time to first token by stage, methods and budgets interleaved in one run.

    python benchmarks/first_token.py --arms none "prunesid 64" "mosaic 128 fastv@1:0.5" [--lm LM.gguf --mmproj …]
    python benchmarks/first_token.py --shape llava-next-7b --image PICTURE --precision int8 --arms "mmtok 160"

An arm is a method, its budget and layer steps. Every round encodes the picture afresh and answers with one token under
each arm in turn; medians over the rounds that follow the warm-up, and each arm's ratio to the first, round by round.
Arms without layer steps run in the whole model, the others in its segments. Prints a Markdown table with the share of
the first token that choosing takes (``compress``, the projector on what is kept included); ``--out`` takes all.
"""

from __future__ import annotations

import argparse
import json
import platform
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_tokcomp.encoded_cache import EncodedCache
from edge_tokcomp.export.random_pairs import BENCH_SHAPES, cached_pair
from edge_tokcomp.images import Image, open_image
from edge_tokcomp.methods import Method, get_method
from edge_tokcomp.methods.layer_step import LayerStep
from edge_tokcomp.methods.layer_steps import read_layer_steps
from edge_tokcomp.vlm import VLM, load

STAGES = ("preprocess", "encode", "compress", "prefill", "first_token")
SAMPLE = Path(__file__).resolve().parents[1] / "models" / "demo" / "samples" / "scene-3.jpg"


@dataclass(frozen=True)
class Arm:
    """One way to the first token."""

    method: Method
    keep: int | float
    steps: tuple[LayerStep, ...]

    @classmethod
    def read(cls, text: str) -> Arm:
        """``METHOD``, ``METHOD KEEP`` or ``METHOD KEEP STEPS``; the method ``none`` has no budget."""
        method, *rest = text.split()
        chosen = get_method(method)
        keep = int(rest.pop(0)) if chosen.compresses else 1.0
        return cls(chosen, keep, read_layer_steps(rest))

    def first_token(self, vlm: VLM, image: Image) -> dict[str, float]:
        """Milliseconds by stage."""
        vlm.method, vlm.keep = self.method, self.keep
        if vlm.layer_steps != self.steps:
            vlm.set_layer_steps(self.steps)
        return vlm.answer(image, max_tokens=1).timings_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arms", nargs="+", default=["none", "prunesid 64", "uniform 64"], help="'METHOD KEEP STEPS'")
    parser.add_argument("--image", type=Path, default=SAMPLE)
    parser.add_argument("--lm")
    parser.add_argument("--mmproj")
    parser.add_argument("--shape", choices=sorted(BENCH_SHAPES), help="random weights of that shape")
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if options.shape:
        if options.lm or options.mmproj:
            parser.error("--shape or --lm and --mmproj, not both")
        options.lm, options.mmproj = cached_pair(BENCH_SHAPES[options.shape])
    arms = [Arm.read(text) for text in options.arms]
    samples: list[list[dict[str, float]]] = [[] for _ in arms]
    image = open_image(options.image)
    with ExitStack() as stack:
        settings = {"precision": options.precision, "threads": options.threads, "cache": EncodedCache(0)}
        whole = stack.enter_context(load(options.lm, options.mmproj, **settings))
        segmented = whole
        if inside := tuple(step for arm in arms for step in arm.steps):
            segmented = stack.enter_context(load(options.lm, options.mmproj, layer_steps=inside, **settings))
        for number in range(options.warm_up + options.rounds):
            for arm, timed in zip(arms, samples, strict=True):
                timings = arm.first_token(segmented if arm.steps else whole, image)
                if number >= options.warm_up:
                    timed.append(timings)
    first = np.array([each["first_token"] for each in samples[0]])
    rows = []
    print(f"{platform.processor() or platform.machine()}, {options.rounds} rounds, medians in ms")
    print(f"| arm | {' | '.join(STAGES)} | ratio | share of compress |")
    print("|---" * (len(STAGES) + 3) + "|")
    for name, timed in zip(options.arms, samples, strict=True):
        medians = {stage: float(np.median([each[stage] for each in timed])) for stage in STAGES}
        ratio = float(np.median(np.array([each["first_token"] for each in timed]) / first))
        share = float(np.median([each["compress"] / each["first_token"] for each in timed]))
        rows.append({"arm": name, "medians_ms": medians, "ratio": ratio, "compress_share": share, "samples": timed})
        stages = " | ".join(f"{medians[stage]:.1f}" for stage in STAGES)
        print(f"| `{name}` | {stages} | {ratio:.2f} | {share:.2%} |", flush=True)
    if options.out:
        document = {"precision": options.precision, "threads": options.threads, "arms": rows}
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
