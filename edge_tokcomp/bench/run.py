"""The run: contenders in turn on the same new picture in every round, batches in between, peak memory at the end."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from .. import __version__
from .contenders import BASELINE, Setting
from .pictures import picture
from .process import Worker

OURS = "ours"


@dataclass(frozen=True)
class Plan:
    """What is measured: ``arms`` of ours beside the baseline, on pictures of ``size``; ``rounds`` follow one that does
    not count, ``batches`` of ``images`` lie between them, of the ``batch_arms``; each batch is of other pictures.

    ``subject``: the arm that is compared with the baseline. ``apart``: arms in processes of their own, since the tower
    they want may be another than that of the rest, of which few stay open at once.
    """

    subject: str
    arms: tuple[str, ...]
    batch_arms: tuple[str, ...]
    size: tuple[int, int]
    rounds: int
    batches: int
    images: int
    baseline: bool = True
    apart: tuple[str, ...] = ()


def run(
    setting: Setting, plan: Plan, told: Callable[[str], None] = lambda _: None
) -> Generator[dict[str, Any], None, None]:
    """The document: every sample, and what they were taken of. ``told`` of each step in a line.

    It is given once the contenders are loaded and again whenever there is more in it: after every round, batch and
    measure of memory. It is one object, which grows by whole rounds and says in the end that it is ``complete``.
    Raises ``TokcompError`` where a contender fails; what was given stays true.
    """
    document: dict[str, Any] = {
        "schema": 2, "complete": False, "reason": "the run has not ended",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "host": _host(),
        "versions": {name: version(name) for name in ("llama_cpp_python", "onnxruntime", "numpy")}
        | {"edge_tokcomp": __version__, "python": platform.python_version()},
        "setting": asdict(setting), "plan": asdict(plan),
        "singles": {arm: [] for arm in _contenders(plan)}, "batches": {arm: [] for arm in plan.batch_arms},
        "peak_bytes": {},
    }  # fmt: skip
    told("loading")
    with ExitStack() as stack:
        ours = stack.enter_context(Worker(OURS, setting))
        workers = {arm: stack.enter_context(Worker(OURS, setting)) for arm in plan.apart}
        if plan.baseline:
            workers[BASELINE] = stack.enter_context(Worker(BASELINE, setting))
        yield document
        order = random.Random(0)
        due = [round((number + 1) * plan.rounds / (plan.batches + 1)) for number in range(plan.batches)]
        for number in range(plan.rounds + 1):
            data = picture(number, *plan.size)
            names = _contenders(plan)
            order.shuffle(names)
            samples = {}
            for arm in names:
                told(f"round {number} of {plan.rounds}: {arm}")
                samples[arm] = workers.get(arm, ours).ask("caption", [data], arm=arm)
            if number:
                # In one assignment, since an interrupt may come anywhere.
                document["singles"] = {arm: [*before, samples[arm]] for arm, before in document["singles"].items()}
                yield document
            else:
                document |= _steps(ours, samples[plan.subject]["prompt"] + setting.tokens // 2, setting.parallel, told)
            for batch in [place for place, after in enumerate(due) if after == number]:
                for arm in plan.batch_arms:
                    told(f"batch {batch + 1} of {plan.batches}: {plan.images} pictures, {arm}")
                    taken = workers.get(arm, ours).ask("batch", _pictures(batch, plan), arm=arm)
                    document["batches"][arm].append(taken)
                    yield document
    for name, peak in _peaks(setting, plan, told):
        document["peak_bytes"][name] = peak
        yield document
    document |= {"complete": True, "reason": None}
    yield document


def _steps(worker: Worker, rows: int, parallel: int, told: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of a step of one sequence and of ``parallel``, behind ``rows`` rows or as many as fit: of a prompt and
    half of what is generated, since that is what steps are behind on average."""
    found: dict[str, Any] = {"steps_s": {}, "steps_rows": {}, "steps_rows_wanted": rows}
    for count in (1, parallel):
        told(f"steps of {count} at once")
        step = worker.ask("steps", count=count, rows=rows)
        found["steps_s"][str(count)], found["steps_rows"][str(count)] = step["seconds"], step["rows"]
    return found


def _peaks(setting: Setting, plan: Plan, told: Callable[[str], None]) -> Iterator[tuple[str, int]]:
    """Peak resident memory of each contender that captions two pictures, and of each batch, in processes of their
    own. What is mapped of the model files is in it."""
    data = picture(0, *plan.size)
    for arm in _contenders(plan):
        told(f"peak memory: {arm}")
        with Worker(BASELINE if arm == BASELINE else OURS, replace(setting, parallel=1)) as worker:
            for _ in range(2):
                worker.ask("caption", [data], arm=arm)
            peak = int(worker.ask("peak")["bytes"])
        yield arm, peak
    for arm in plan.batch_arms:
        told(f"peak memory: {arm}, {setting.parallel} at once")
        with Worker(OURS, setting) as worker:
            worker.ask("batch", [picture(index, *plan.size) for index in range(setting.parallel)], arm=arm)
            peak = int(worker.ask("peak")["bytes"])
        yield batch_label(arm, setting.parallel), peak


def batch_label(arm: str, parallel: int) -> str:
    """What the peak of ``arm``'s batches is called."""
    return f"{arm}, {parallel} at once"


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
