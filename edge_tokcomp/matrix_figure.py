"""The figure beside a matrix: score against image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from .errors import TokcompError
from .evaluation import PLACED

BASELINES = ("random", "uniform", "pool", "resolution")

_COLUMNS = 3
_LONGEST_TITLE = 45
_MARKS = "os^Dv*P"


def figure(document: dict[str, Any], path: Path) -> None:
    """Mean score against tokens, a line a method with its interval shaded; baselines in grey.

    Raises ``TokcompError`` where matplotlib is not installed.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in document["arms"][1:]:
        lines.setdefault(row["method"], []).append(row)
    names = [name for name in lines if name not in BASELINES]
    canvas, axes = _panels(len(names))
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
        axis.tick_params(axis="both", which="both", labelsize=8, labelbottom=place + _COLUMNS >= len(names))
    if any(name in lines for name in BASELINES):
        axes[0].legend(fontsize=7, loc="lower right")
    _save(canvas, document, "image tokens in the language model", path)


def steps_figure(document: dict[str, Any], path: Path) -> None:
    """Mean score against the image tokens a layer holds, a panel for each text of layer steps, a mark for each method;
    grey: without steps.

    Raises ``TokcompError`` where matplotlib is not installed.
    """
    names = list(dict.fromkeys(row["layer_steps"] for row in document["arms"] if row["layer_steps"]))
    marks = dict(zip(dict.fromkeys(row["method"] for row in document["arms"]), cycle(_MARKS), strict=False))
    canvas, axes = _panels(len(names))
    for axis in axes[len(names) :]:
        axis.axis("off")
    for name, axis in zip(names, axes, strict=False):
        for steps, colour in (("", "0.6"), (name, "tab:blue")):
            for method, mark in marks.items():
                rows = [row for row in document["arms"] if (row["layer_steps"], row["method"]) == (steps, method)]
                mean = [100 * row["mean"] for row in rows]
                reach = [[100 * abs(row["mean"] - row[bound]) for row in rows] for bound in ("mean_low", "mean_high")]
                tokens = [row["layer_tokens"] for row in rows]
                label = None if steps else method
                axis.errorbar(tokens, mean, reach, fmt=mark, color=colour, markersize=4, elinewidth=0.8, label=label)
        axis.set_title(name.replace("+", "+\\n") if len(name) > _LONGEST_TITLE else name, fontsize=8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, loc="lower right")
    _save(canvas, document, "image tokens in a layer of the language model, on average", path)


def _panels(count: int) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as fault:
        raise TokcompError(f"the figure needs matplotlib ({fault}); pip install 'edge-tokcomp[eval]'") from fault
    rows = max(1, -(-count // _COLUMNS))
    canvas = Figure(figsize=(4 * _COLUMNS, 2.6 * rows + 0.4), layout="constrained")
    return canvas, canvas.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()


def _save(canvas: Any, document: dict[str, Any], label: str, path: Path) -> None:
    canvas.supxlabel(label, fontsize=9)
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
