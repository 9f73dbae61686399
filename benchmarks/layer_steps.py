"""Layer steps on the demo tasks: image rows dropped between the layers of the demo's language model, run in NumPy.

    python benchmarks/layer_steps.py --steps "spectrum@1:0.5,2:0.25,3:0" "fastv@1:0.5" [--method mosaic --keep 128]

Scores on tuning scenes, so that a step's free parameters may be chosen by it. Prints a table: image rows averaged over
the layers, mean of the tasks, and each of them (- for one never asked). The model has four layers, so layers are whole
numbers below 4.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.evaluation import PLACED, TUNING_SEEDS, summarise
from edge_tokcomp.export.demo.questions import TASKS, ask_all, object_f1
from edge_tokcomp.export.demo.scenes import draw_scene
from edge_tokcomp.export.reference_language import Prompt, ReferenceLanguage
from edge_tokcomp.language.prompt import chat_prompt
from edge_tokcomp.methods.layer_step import LayerStep
from edge_tokcomp.methods.layer_steps import read_layer_step
from edge_tokcomp.vlm import VLM, load

LONGEST_ANSWER = 96

Scores = dict[str, NDArray[np.float64]]


def score(vlm: VLM, arms: Sequence[Sequence[LayerStep]], scenes: int) -> tuple[list[Scores], list[float]]:
    """Scores of every arm by task and scene, and its image rows averaged over layers and questions."""
    model = ReferenceLanguage(vlm.lm)
    sums = [{task: np.zeros((scenes, 2)) for task in TASKS} for _ in arms]
    rows, asked = np.zeros(len(arms)), 0
    ends = [token for token in range(len(model.table)) if vlm.model.is_end(token)]
    for index in range(scenes):
        scene = draw_scene((TUNING_SEEDS[0], 0, index), "validation")
        seen = vlm.see(scene.image)
        for question in ask_all(scene, np.random.default_rng((TUNING_SEEDS[1], 0, index)), vary=False):
            if question.task in PLACED:
                continue
            encoded = vlm.encode(seen, question.text)
            pieces = chat_prompt(vlm.model, question.text, 1).tokenize(vlm.model)
            lead, text = (vlm.embedding.lookup(piece) for piece in pieces)
            prompt = Prompt(lead, encoded.rows, encoded.tokens.layout.crop[encoded.plan.keep], text)
            asked += 1
            for number, steps in enumerate(arms):
                tokens, layers = model.generate(prompt, steps, ends, LONGEST_ANSWER)
                rows[number] += np.mean(layers)
                said = vlm.model.detokenize(np.array([t for t in tokens if t not in ends], np.int32)).strip()
                right = float(said.rstrip(".").lower() == question.answer.lower())
                if question.task == "caption":
                    right = object_f1(said, scene)
                sums[number][question.task][index] += (right, 1)
    with np.errstate(invalid="ignore"):
        return [{task: s[:, 0] / s[:, 1] for task, s in arm.items()} for arm in sums], (rows / asked).tolist()


def line(name: str, rows: float, scores: Scores) -> str:
    """One row of the table, per cent; the mean is of the tasks that were asked."""
    found = [summarise(values) for values in scores.values()]
    mean = 100 * np.mean([each["score"] for each in found if each["n"]])
    cells = [f"{100 * each['score']:.1f}" if each["n"] else "-" for each in found]
    return f"| `{name}` | {rows:.0f} | {mean:.1f} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", nargs="*", default=[], help="one arm each; several steps of an arm joined by '+'")
    parser.add_argument("--method", default="none")
    parser.add_argument("--keep")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    try:
        report(options)
    except TokcompError as fault:
        parser.exit(2, f"{parser.prog}: {fault}\n")


def report(options: argparse.Namespace) -> None:
    """Score the arms, print the table and write the file."""
    names = ["none", *options.steps]
    arms = [[], *([read_layer_step(part) for part in text.split("+")] for text in options.steps)]
    with load(method=options.method, keep=options.keep, threads=options.threads) as vlm:
        scores, rows = score(vlm, arms, options.scenes)
    print(f"{vlm.method} {options.keep or ''}, {options.scenes} tuning scenes, per cent")
    print(f"| steps | rows a layer | mean | {' | '.join(TASKS)} |")
    print("|---" * (3 + len(TASKS)) + "|")
    for name, result, count in zip(names, scores, rows, strict=True):
        print(line(name, count, result))
    if options.out:
        document = [
            {"steps": name, "rows": count, "scores": {task: values.tolist() for task, values in result.items()}}
            for name, result, count in zip(names, scores, rows, strict=True)
        ]
        options.out.write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
