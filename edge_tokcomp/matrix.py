"""Many methods at many budgets on the demo tasks: one run, a table, a figure and the numbers behind them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .errors import TokcompError
from .evaluation import PLACED, RESAMPLES, Arm, Scores, score_arms, summarise
from .methods import METHODS, get_method
from .vlm import VLM

BASELINES = ("random", "uniform", "pool", "resolution")
VARIANTS = (
    "todre:form=k_center", "divprune:centred=true", "divprune:centred=true,distinctive=true", "scope:centred=true",
    "cdpruner:centred=true,distinctive=true", "mmtok:centred=true",
)  # fmt: skip
DEFAULT_METHODS = (*(name for name in METHODS if name != "none"), *VARIANTS)
DEFAULT_KEEPS = (288, 192, 128, 64, 32, 16)


def run_matrix(
    vlm: VLM, methods: Sequence[str], keeps: Sequence[int], *, scenes: int, seed: int = 0, tuning: bool = False,
    told: Callable[[int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score every method at every budget, and ``none``, on the same scenes and questions.

    Returns the settings and ``arms``, ``none`` first: ``method, keep, tokens, tasks`` (as ``evaluate`` has them) and
    ``mean`` of the tasks' scores, ``difference`` of that to ``none`` and ``retention`` (share of ``none``'s mean), each
    with its 95 % bootstrap interval (``_low``, ``_high``): scenes drawn anew, the same ones for all arms. ``best`` and
    ``baseline``: the best of all arms and of the baselines at that budget, and the interval of the difference to it.
    """
    started = time.perf_counter()
    arms = [Arm(get_method("none"), 1.0), *(Arm(get_method(name), keep) for name in methods for keep in keeps)]
    scores, tokens = score_arms(vlm, arms, scenes=scenes, seed=seed, tuning=tuning, told=told)
    draws = np.random.default_rng(0).integers(scenes, size=(RESAMPLES, scenes))
    means = [_task_mean(result, draws) for result in scores]
    plain = means[0]
    rows = []
    for arm, result, count, mean in zip(arms, scores, tokens, means, strict=True):
        row: dict[str, Any] = {"method": str(arm.method), "keep": arm.keep, "tokens": count}
        row["tasks"] = {task: summarise(values) for task, values in result.items()}
        for name, values in (("mean", mean), ("difference", mean - plain), ("retention", mean / plain)):
            low, high = np.percentile(values[1:], [2.5, 97.5])
            row |= {name: _rounded(values[0]), f"{name}_low": _rounded(low), f"{name}_high": _rounded(high)}
        rivals = {
            str(other.method): values
            for other, values in zip(arms, means, strict=True)
            if other.keep == arm.keep and other.method.compresses
        }
        for name, among in (("best", rivals), ("baseline", {k: v for k, v in rivals.items() if k in BASELINES})):
            if among and arm.method.compresses:
                best = max(among, key=lambda name: float(among[name][0]))
                low, high = np.percentile((mean - among[best])[1:], [2.5, 97.5])
                row[name] = {"method": best, "low": _rounded(low), "high": _rounded(high)}
        rows.append(row)
    return {
        "model": vlm.lm.name, "precision": vlm.encoder.precision, "scenes": scenes, "tuning": tuning,
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
    lines = [
        f"| method | tokens | {' | '.join(tasks)} | mean | retention | against `none` |",
        "|---" * (len(tasks) + 5) + "|",
    ]
    for row in document["arms"]:
        cells = [f"{100 * row['tasks'][task]['score']:.1f}" for task in tasks]
        last = ["", ""]
        if row["method"] != "none":
            low, high = 100 * row["difference_low"], 100 * row["difference_high"]
            last = [f"{100 * row['retention']:.1f}", f"{100 * row['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"]
        cells += [f"{100 * row['mean']:.1f}", *last]
        lines.append(f"| `{row['method']}` | {row['tokens']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


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


def figure(document: dict[str, Any], path: Path) -> None:
    """Mean score against tokens, a line a method with its interval shaded; baselines in grey.

    Raises ``TokcompError`` where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as fault:
        raise TokcompError(f"the figure needs matplotlib ({fault}); pip install 'edge-tokcomp[eval]'") from fault
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in document["arms"][1:]:
        lines.setdefault(row["method"], []).append(row)
    names = [name for name in lines if name not in BASELINES]
    columns = 3
    shape = (max(1, -(-len(names) // columns)), columns)
    canvas = Figure(figsize=(4 * columns, 2.6 * shape[0] + 0.4), layout="constrained")
    axes = canvas.subplots(*shape, sharex=True, sharey=True, squeeze=False).ravel()
    whole = 100 * document["arms"][0]["mean"]
    for place, axis in enumerate(axes):
        if place >= max(1, len(names)):
            axis.axis("off")
            continue
        axis.axhline(whole, color="black", linewidth=0.8, linestyle=":")
        for name, style in zip(BASELINES, ("--", "-", "-.", (0, (1, 1))), strict=True):
            if name in lines:
                x, y, _, _ = _curve(lines[name])
                axis.plot(x, y, linestyle=style, color="0.55", linewidth=1, label=name)
        if place < len(names):
            x, y, low, high = _curve(lines[names[place]])
            axis.fill_between(x, low, high, alpha=0.25, color="tab:blue", linewidth=0)
            axis.plot(x, y, color="tab:blue", linewidth=1.8, marker="o", markersize=3)
            axis.set_title(names[place], fontsize=9)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.set_xticks(x, [f"{tokens:.0f}" for tokens in x], fontsize=8)
        axis.tick_params(axis="both", which="both", labelsize=8, labelbottom=place + columns >= len(names))
    if any(name in lines for name in BASELINES):
        axes[0].legend(fontsize=7, loc="lower right")
    canvas.supxlabel("image tokens in the language model", fontsize=9)
    canvas.supylabel(f"mean of {len(set(document['arms'][0]['tasks']) - set(PLACED))} tasks, per cent", fontsize=9)
    canvas.savefig(path, dpi=110)


def _curve(rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Tokens, mean and its bounds in per cent, by tokens."""
    rows = sorted(rows, key=lambda row: float(row["tokens"]))
    return (
        [float(row["tokens"]) for row in rows],
        [100 * float(row["mean"]) for row in rows],
        [100 * float(row["mean_low"]) for row in rows],
        [100 * float(row["mean_high"]) for row in rows],
    )


def write_report(document: dict[str, Any], command: str, folder: Path) -> list[Path]:
    """Write ``matrix.md``, ``matrix.png`` and ``matrix.json`` into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"matrix.{kind}" for kind in ("md", "png", "json")]
    figure(document, paths[1])
    text = (
        f"# The demo tasks under compression\n\n`{command}`\n\n"
        f"{document['scenes']} {'tuning' if document['tuning'] else 'fresh'} scenes, seed {document['seed']}, "
        f"{document['precision']} tower, greedy; the same "
        "scenes and questions for all. Per cent; caption is object-F1, the others exact match. Mean: of the tasks "
        f"but {' and '.join(PLACED)} (F1 that counts a thing only where it is said to be). "
        "Retention: the mean as a share of that of `none`. Intervals: 95 %, bootstrap over scenes, paired with `none`."
        f"\n\n![Mean score against image tokens](matrix.png)\n\n{verdicts(document)}\n\n{table(document)}\n"
    )
    paths[0].write_text(text)
    paths[2].write_text(json.dumps(document, indent=1) + "\n")
    return paths
