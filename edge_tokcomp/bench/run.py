"""The run: contenders in turn on the same new picture in every round, batches in between, peak memory at the end."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from .. import __version__
from .contenders import BASELINE, Setting
from .pictures import picture
from .process import Worker

OURS = "edge-tokcomp"


@dataclass(frozen=True)
class Plan:
    """What is measured: ``arms`` of ours beside the baseline, on pictures of ``size``; ``rounds`` follow one that does
    not count, ``batches`` of ``images`` lie between them, of the ``batch_arms``; each batch is of other pictures.

    ``apart``: arms in processes of their own, since the tower they want may be another than that of the rest, of which
    few stay open at once.
    """

    arms: tuple[str, ...]
    batch_arms: tuple[str, ...]
    size: tuple[int, int]
    rounds: int
    batches: int
    images: int
    baseline: bool = True
    apart: tuple[str, ...] = ()


def run(setting: Setting, plan: Plan, told: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The document: every sample, and what they were taken of. ``told`` of each step in a line.

    Raises ``TokcompError`` where a contender fails.
    """
    singles: dict[str, list[dict[str, Any]]] = {arm: [] for arm in _contenders(plan)}
    batches: dict[str, list[dict[str, Any]]] = {arm: [] for arm in plan.batch_arms}
    told("loading")
    with ExitStack() as stack:
        ours = stack.enter_context(Worker(OURS, setting))
        workers = {arm: stack.enter_context(Worker(OURS, setting)) for arm in plan.apart}
        if plan.baseline:
            workers[BASELINE] = stack.enter_context(Worker(BASELINE, setting))
        order = random.Random(0)
        due = [round((number + 1) * plan.rounds / (plan.batches + 1)) for number in range(plan.batches)]
        for number in range(plan.rounds + 1):
            data = picture(number, *plan.size)
            names = _contenders(plan)
            order.shuffle(names)
            for arm in names:
                told(f"round {number} of {plan.rounds}: {arm}")
                sample = workers.get(arm, ours).ask("caption", [data], arm=arm)
                if number:
                    singles[arm].append(sample)
            for batch in [place for place, after in enumerate(due) if after == number]:
                for arm in plan.batch_arms:
                    told(f"batch {batch + 1} of {plan.batches}: {plan.images} pictures, {arm}")
                    batches[arm].append(workers.get(arm, ours).ask("batch", _pictures(batch, plan), arm=arm))
        steps = {count: ours.ask("steps", count=count)["seconds"] for count in (1, setting.parallel)}
    return {
        "schema": 1, "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "host": _host(),
        "versions": {name: version(name) for name in ("llama_cpp_python", "onnxruntime", "numpy")}
        | {"edge_tokcomp": __version__, "python": platform.python_version()},
        "setting": asdict(setting), "plan": asdict(plan), "singles": singles, "batches": batches,
        "steps_s": {str(count): seconds for count, seconds in steps.items()},
        "peak_bytes": _peaks(setting, plan, told),
    }  # fmt: skip


def _peaks(setting: Setting, plan: Plan, told: Callable[[str], None]) -> dict[str, int]:
    """Peak resident memory of each contender that captions two pictures, and of each batch, in processes of their
    own. What is mapped of the model files is in it."""
    data = picture(0, *plan.size)
    peaks = {}
    for arm in _contenders(plan):
        told(f"peak memory: {arm}")
        with Worker(BASELINE if arm == BASELINE else OURS, replace(setting, parallel=1)) as worker:
            for _ in range(2):
                worker.ask("caption", [data], arm=arm)
            peaks[arm] = int(worker.ask("peak")["bytes"])
    for arm in plan.batch_arms:
        told(f"peak memory: {arm}, {setting.parallel} at once")
        with Worker(OURS, setting) as worker:
            worker.ask("batch", [picture(index, *plan.size) for index in range(setting.parallel)], arm=arm)
            peaks[f"{arm}, {setting.parallel} at once"] = int(worker.ask("peak")["bytes"])
    return peaks


def _contenders(plan: Plan) -> list[str]:
    return [*plan.arms, *([BASELINE] if plan.baseline else [])]


def _host() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            name = next((line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")), name)
    except OSError:
        pass
    return {"cpu": name, "cores": os.cpu_count(), "system": platform.platform(terse=True)}


def _pictures(batch: int, plan: Plan) -> list[bytes]:
    """Those of a batch; each picture is in one only."""
    return [picture(1000 * (batch + 1) + index, *plan.size) for index in range(plan.images)]
