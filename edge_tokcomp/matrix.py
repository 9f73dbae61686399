"""Many methods at many budgets on the demo tasks: one run, a table, a figure and the numbers behind them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .evaluation import PLACED, RESAMPLES, Arm, Scores, score_arms, summarise
from .matrix_figure import BASELINES, figure, steps_figure
from .methods import METHODS, get_method
from .methods.layer_step import spell_steps
from .methods.layer_steps import read_layer_steps
from .vlm import VLM

VARIANTS = (
    "todre:form=k_center", "divprune:centred=true", "divprune:centred=true,distinctive=true", "scope:centred=true",
    "cdpruner:centred=true,distinctive=true", "mmtok:centred=true",
)  # fmt: skip
DEFAULT_METHODS = (*(name for name in METHODS if name != "none"), *VARIANTS)
DEFAULT_KEEPS = (288, 192, 128, 64, 32, 16)


def run_matrix(
    vlm: VLM, methods: Sequence[str], keeps: Sequence[int], steps: Sequence[str] = (), *, scenes: int, seed: int = 0,
    tuning: bool = False, told: Callable[[int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score every method at every budget, without layer steps and with each of ``steps``, and ``none`` before them all,
    on the same scenes and questions. For steps the model has to be cut at their layers.

    Returns the settings and ``arms``, ``none`` first: ``method, keep, layer_steps, tokens, layer_tokens, tasks`` (as
    ``evaluate`` has them) and ``mean`` of the tasks' scores, ``difference`` of that to ``none`` and ``retention``
    (share of ``none``'s mean), each with its 95 % bootstrap interval (``_low``, ``_high``): scenes drawn anew, the same
    ones for all arms. ``best`` and ``baseline``: the best of all arms without steps and of the baselines among them at
    that budget, and the interval of the difference to it. ``unpruned``: for an arm with steps, the difference to that
    method and budget without.
    """
    started = time.perf_counter()
    inside = [(), *(read_layer_steps(text) for text in steps)]
    arms = [Arm(get_method("none"), 1.0)]
    for method in map(get_method, methods):
        for keep in keeps if method.compresses else (1.0,):
            arms += [Arm(method, keep, steps=each) for each in inside if method.compresses or each]
    for arm in arms:
        vlm.engine.variant(arm.method, arm.keep)  # refuses a method that cannot be run, before the first scene
    scored = score_arms(vlm, arms, scenes=scenes, seed=seed, tuning=tuning, told=told)
    draws = np.random.default_rng(0).integers(scenes, size=(RESAMPLES, scenes))
    means = [_task_mean(result.scores, draws) for result in scored]
    plain = means[0]
    rows = []
    for arm, result, mean in zip(arms, scored, means, strict=True):
        row: dict[str, Any] = {"method": str(arm.method), "keep": arm.keep, "layer_steps": spell_steps(arm.steps)}
        row |= {"tokens": result.tokens, "layer_tokens": round(result.layer_tokens, 1)}
        row["tasks"] = {task: summarise(values) for task, values in result.scores.items()}
        for name, values in (("mean", mean), ("difference", mean - plain), ("retention", mean / plain)):
            low, high = np.percentile(values[1:], [2.5, 97.5])
            row |= {name: _rounded(values[0]), f"{name}_low": _rounded(low), f"{name}_high": _rounded(high)}
        rivals = {
            str(other.method): values
            for other, values in zip(arms, means, strict=True)
            if other.keep == arm.keep and other.method.compresses and not other.steps
        }
        for name, among in (("best", rivals), ("baseline", {k: v for k, v in rivals.items() if k in BASELINES})):
            if among and arm.method.compresses and not arm.steps:
                best = max(among, key=lambda name: float(among[name][0]))
                low, high = np.percentile((mean - among[best])[1:], [2.5, 97.5])
                row[name] = {"method": best, "low": _rounded(low), "high": _rounded(high)}
        if arm.steps:
            whole = means[arms.index(replace(arm, steps=()))]
            low, high = np.percentile((mean - whole)[1:], [2.5, 97.5])
            row["unpruned"] = {
                "difference": _rounded(mean[0] - whole[0]), "low": _rounded(low), "high": _rounded(high)
            }  # fmt: skip
        rows.append(row)
    return {
        "model": vlm.name, "precision": vlm.engine.precision, "scenes": scenes, "tuning": tuning,
        "seed": seed, "version": __version__, "seconds": round(time.perf_counter() - started, 1), "arms": rows,
    }  # fmt: skip


def _task_mean(scores: Scores, draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """``(1 + draws,)``: the mean over the tasks of their mean scores, on all scenes and then on each draw of them."""
    means = []
    for task, values in scores.items():
        asked = ~np.isnan(values)
        if task not in PLACED and asked.any():
            filled = np.where(asked, values, 0.0)
            means.append([filled.sum() / asked.sum(), *(filled[draws].sum(1) / np.maximum(asked[draws].sum(1), 1))])
    return np.asarray(np.mean(np.array(means), axis=0))


def _rounded(value: float) -> float:
    return round(float(value), 4)


def table(document: dict[str, Any]) -> str:
    """The matrix as a Markdown table, per cent."""
    tasks = list(document["arms"][0]["tasks"])
    inside = any(row["layer_steps"] for row in document["arms"])
    heads = ["method", *["layer steps"] * inside, "tokens", *["a layer"] * inside, *tasks, "mean", "retention"]
    heads += ["against `none`", *["against no layer steps"] * inside]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for number, row in enumerate(document["arms"]):
        cells = [f"`{row['method']}`", *[f"`{row['layer_steps']}`" if row["layer_steps"] else ""] * inside]
        cells += [f"{row['tokens']:.0f}", *[f"{row['layer_tokens']:.0f}"] * inside]
        cells += [f"{100 * row['tasks'][task]['score']:.1f}" for task in tasks]
        cells += [f"{100 * row['mean']:.1f}", f"{100 * row['retention']:.1f}" if number else ""]
        cells.append(_interval(row["difference"], row["difference_low"], row["difference_high"]) if number else "")
        cells += [_interval(**row["unpruned"]) if "unpruned" in row else ""] * inside
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(difference: float, low: float, high: float) -> str:
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def verdicts(document: dict[str, Any]) -> str:
    """A line a budget: the best of all and those not told apart from it, the best baseline and the methods above and
    below that, by the 95 % paired intervals."""
    lines = []
    for keep in sorted({row["keep"] for row in document["arms"] if "best" in row}, reverse=True):
        rows = {row["method"]: row for row in document["arms"] if row["keep"] == keep and "best" in row}
        first = next(iter(rows.values()))["best"]["method"]
        equal = [name for name, row in rows.items() if name != first and row["best"]["high"] >= 0]
        line = f"- **{keep}** tokens: best `{first}` {100 * rows[first]['mean']:.1f}, "
        line += f"not told apart from it: {_names(equal)}."
        others = {name: row["baseline"] for name, row in rows.items() if name not in BASELINES and "baseline" in row}
        if others:
            best = next(iter(others.values()))["method"]
            above = [name for name, row in others.items() if row["low"] > 0]
            below = [name for name, row in others.items() if row["high"] < 0]
            line += f" Best baseline `{best}` {100 * rows[best]['mean']:.1f}. Above it: {_names(above)}. "
            line += f"Below it: {_names(below)}."
        lines.append(line)
    return "\n".join(lines)


def _names(methods: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in methods) or "none"


def write_report(document: dict[str, Any], command: str, folder: Path) -> list[Path]:
    """Write ``matrix.md``, ``matrix.png`` and ``matrix.json`` into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"matrix.{kind}" for kind in ("md", "png", "json")]
    inside = any(row["layer_steps"] for row in document["arms"])
    (steps_figure if inside else figure)(document, paths[1])
    text = (
        f"# The demo tasks under compression\n\n`{command}`\n\n"
        f"{document['scenes']} {'tuning' if document['tuning'] else 'fresh'} scenes, seed {document['seed']}, "
        f"{document['precision']} tower, greedy; the same "
        "scenes and questions for all. Per cent; caption is object-F1, the others exact match. Mean: of the tasks "
        f"but {' and '.join(PLACED)} (F1 that counts a thing only where it is said to be). "
        "Retention: the mean as a share of that of `none`. Intervals: 95 %, bootstrap over scenes, paired with `none`."
        + " A layer: image tokens that a layer of the language model holds, on average." * inside
        + f"\n\n![Mean score against image tokens](matrix.png)\n\n{verdicts(document)}\n\n{table(document)}\n"
    )
    paths[0].write_text(text)
    paths[2].write_text(json.dumps(document, indent=1) + "\n")
    return paths
