"""Accuracy on the demo tasks: the same fresh scenes and questions for every method and budget, compared in pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .answers import SeenImage
from .dynamic import Claim, share_batch
from .errors import TokcompError
from .methods import Method, get_method
from .methods.layer_step import LayerStep, spell_steps
from .vlm import VLM

EVAL_SEED, ASK_SEED = 9000, 9001
"""First word of every test scene's seed, and of its questions'; training draws from others.

Two streams: drawn from one, a scene's brightness and its first answer would be the same number.
"""

TUNING_SEEDS = 7000, 7001
"""The same for scenes by which a method's parameters may be chosen; their digits are of the validation split."""

PLACED = ("place", "placed caption")
"""Scored beside the tasks, and in no mean: where a thing is, and caption F1 that counts a thing only at its place."""

RESAMPLES = 2000


Scores = dict[str, NDArray[np.float64]]
"""Task to ``(scenes,)``: the score on each scene, NaN where the task was not asked."""


@dataclass(frozen=True)
class Arm:
    """One way of running the model that is scored; ``dynamic``: the scenes share their budget, as one batch;
    ``steps``: what is dropped inside the language model."""

    method: Method
    keep: int | float
    dynamic: bool = False
    steps: tuple[LayerStep, ...] = ()

    @property
    def name(self) -> str:
        label = str(self.method) if not self.method.compresses else f"{self.method} {self.keep}"
        return label + " dynamic" * self.dynamic + "".join(f" + {step}" for step in self.steps)


class Scored(NamedTuple):
    """Of one arm: its scores, and means over scenes of the image tokens that entered the language model and of those
    that a layer held."""

    scores: Scores
    tokens: float
    layer_tokens: float


def evaluate(
    vlm: VLM, *, scenes: int, seed: int = 0, wrong_image: bool = False, tuning: bool = False
) -> dict[str, Any]:
    """Score the model's method and budget, and ``none`` beside it, on ``scenes`` fresh test scenes, or ``tuning`` ones.

    A model that was loaded with ``dynamic`` shares its budget over them, as one batch.
    ``wrong_image`` encodes another scene than the questions are about: what is left is what the text alone gives.
    Returns ``method, keep, dynamic, layer_steps, scenes, tuning, seed, tokens, layer_tokens, seconds`` and, for each of
    ``tasks``, ``score``, the bounds ``low`` and ``high`` of its 95 % bootstrap interval, and ``n``, the scenes asked
    (several questions on one count as their mean); for a compressing method or layer steps also ``none`` and
    ``difference`` with its paired interval.
    """
    started = time.perf_counter()
    dynamic = vlm.sharing is not None
    steps = vlm.layer_steps
    arms = [Arm(get_method("none"), 1.0)]
    if vlm.method.compresses or steps:
        arms.append(Arm(vlm.method, vlm.keep, dynamic, steps))
    try:
        scored = score_arms(vlm, arms, scenes=scenes, seed=seed, wrong_image=wrong_image, tuning=tuning)
    finally:
        vlm.set_layer_steps(steps)
    plain, mine = scored[0].scores, scored[-1].scores
    tasks: dict[str, dict[str, float]] = {}
    for task in mine:
        row = summarise(mine[task])
        if not row["n"]:
            continue  # few scenes may hold nothing to ask about, and NaN is no JSON
        tasks[task] = row
        if len(arms) > 1:
            tasks[task] |= paired(mine[task], plain[task])
    return {
        "method": str(vlm.method), "keep": vlm.keep, "dynamic": dynamic, "scenes": scenes, "tuning": tuning,
        "seed": seed, "wrong_image": wrong_image, "layer_steps": spell_steps(steps), "tokens": scored[-1].tokens,
        "layer_tokens": round(scored[-1].layer_tokens, 1), "model": vlm.name,
        "precision": vlm.engine.precision, "version": __version__,
        "seconds": round(time.perf_counter() - started, 1), "tasks": tasks,
    }  # fmt: skip


def score_arms(
    vlm: VLM, arms: Sequence[Arm], *, scenes: int, seed: int, wrong_image: bool = False, tuning: bool = False,
    told: Callable[[int], None] | None = None,
) -> list[Scored]:  # fmt: skip
    """Score every arm on the same scenes, encoded once for each way the tower is run.

    Arms with steps need a model that is cut at their layers (``UsageError``).
    """
    try:
        from .export.demo.questions import TASKS, ask_all, object_f1, placed_f1
        from .export.demo.scenes import draw_scene

        draw_scene((EVAL_SEED, seed, 0), "test")
    except ImportError as fault:
        raise TokcompError(f"scoring needs scikit-learn ({fault}); pip install 'edge-tokcomp[eval]'") from fault
    (draw, ask), split = (TUNING_SEEDS, "validation") if tuning else ((EVAL_SEED, ASK_SEED), "test")

    def drawn(index: int) -> Any:
        return draw_scene((draw, seed, index), split)

    other = scenes if wrong_image else 0
    keeps = _keeps(arms, (vlm.see(drawn(index + other).image) for index in range(scenes)))
    sums = [{task: np.zeros((scenes, 2)) for task in (*TASKS, *PLACED)} for _ in arms]
    tokens, layer_tokens, asked = np.zeros(len(arms)), np.zeros(len(arms)), 0
    for index in range(scenes):
        scene = drawn(index)
        questions = ask_all(scene, np.random.default_rng((ask, seed, index)), vary=False)
        asked += len(questions)
        seen = vlm.see((drawn(index + other) if wrong_image else scene).image)
        for number, arm in enumerate(arms):
            compressed = vlm.compress(seen, arm.method, keeps[number][index] if arm.dynamic else arm.keep)
            if compressed.variant.serves(seen.variant):
                seen = compressed  # Seen with a block's attention, it serves other arms too.
            tokens[number] += len(compressed.plan)
            if arm.steps != vlm.layer_steps:
                vlm.set_layer_steps(arm.steps)
            for question in questions:
                answer = vlm.answer(compressed, question.text, max_tokens=160)
                text = answer.text
                layer_tokens[number] += answer.layer_tokens
                right = object_f1(text, scene) if question.task == "caption" else float(_same(text, question.answer))
                sums[number][question.task][index] += (right, 1)
                if question.task == "caption":
                    sums[number]["placed caption"][index] += (placed_f1(text, scene), 1)
        if told:
            told(index + 1)
    with np.errstate(invalid="ignore"):
        scores = [{task: s[:, 0] / s[:, 1] for task, s in arm.items()} for arm in sums]
    return [
        Scored(*each)
        for each in zip(scores, (tokens / scenes).tolist(), (layer_tokens / max(asked, 1)).tolist(), strict=True)
    ]


def _keeps(arms: Sequence[Arm], scenes: Iterable[SeenImage]) -> list[list[int]]:
    """Tokens of every scene in each arm that shares its budget; nothing for the others."""
    sharing = [number for number, arm in enumerate(arms) if arm.dynamic]
    claims: list[list[Claim]] = [[] for _ in arms]
    for seen in scenes if sharing else ():
        for number in sharing:
            claims[number].append(Claim.of(seen.tokens, arms[number].keep))
    return [[share.keep for share in share_batch(each)] for each in claims]


def summarise(scores: NDArray[np.float64]) -> dict[str, float]:
    """Mean over the scenes asked, its 95 % bootstrap interval, and how many there were."""
    asked = scores[~np.isnan(scores)]
    if not len(asked):
        return {"score": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    if np.all(asked == asked[0]) and asked[0] in (0, 1):  # nothing to resample: Wilson's interval
        reach = 1.96**2 / (len(asked) + 1.96**2)
        low, high = (1 - reach, 1.0) if asked[0] else (0.0, reach)
    else:
        low, high = np.percentile(_resample(asked), [2.5, 97.5])
    return {
        "score": round(float(asked.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "n": len(asked),
    }


def paired(scores: NDArray[np.float64], plain: NDArray[np.float64]) -> dict[str, float]:
    """The uncompressed score, and the mean difference to it scene by scene with its 95 % interval."""
    both = ~np.isnan(scores) & ~np.isnan(plain)
    if not both.any():
        return {}
    gap = scores[both] - plain[both]
    low, high = np.percentile(_resample(gap), [2.5, 97.5])
    return {
        "none": round(float(plain[both].mean()), 4), "difference": round(float(gap.mean()), 4),
        "difference_low": round(float(low), 4), "difference_high": round(float(high), 4),
    }  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    inside = ""
    if result["layer_steps"]:
        inside = f"layer steps {result['layer_steps']}: {result['layer_tokens']:.0f} a layer, "
    lines = [
        f"{result['method']}, {result['tokens']:.0f} image tokens{' on average' * result['dynamic']}, {inside}"
        f"{result['scenes']} scenes, {result['seconds']:.0f} s"
        + (", shown the wrong image" if result["wrong_image"] else "")
    ]
    for task, row in result["tasks"].items():
        line = (
            f"{task:10} {100 * row['score']:6.1f} %  [{100 * row['low']:5.1f}, {100 * row['high']:5.1f}]  n={row['n']}"
        )
        if "difference" in row:
            line += (
                f"  against none {100 * row['difference']:+5.1f} "
                f"[{100 * row['difference_low']:+5.1f}, {100 * row['difference_high']:+5.1f}]"
            )
        lines.append(line)
    return "\n".join(lines)


def _resample(values: NDArray[np.float64]) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    return np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)])


def _same(text: str, answer: str) -> bool:
    return text.strip().rstrip(".").lower() == answer.lower()
