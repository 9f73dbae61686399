"""The verb ``bench``: what is measured, a table for people, and one JSON object as the last line.

A run that is stopped shows what it had measured by then.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from .bench.contenders import Setting
from .bench.report import rounds, summary, table
from .bench.run import Plan, run
from .errors import TokcompError, UsageError, check_positive
from .files import write_whole
from .language.segment import available_cores
from .methods import get_method
from .signals import interrupts_to
from .text import printable, unheard

_LARGEST_SIDE = 16384


def bench(options: argparse.Namespace) -> int:
    """Measure, and print what came of it: 130 where that was interrupted, 1 where a contender failed on the way or
    ``--out`` could not be written."""
    plan, out = _plan(options), _out(options)
    lm, mmproj = _files(options)
    setting = Setting(
        str(lm), str(mmproj), options.prompt, options.tokens, options.threads or available_cores(), options.ctx,
        options.precision, options.parallel,
    )  # fmt: skip
    document: dict[str, Any] = {}
    code, reason, unwritten = 0, "", False
    try:
        with interrupts_to(signal.default_int_handler), closing(run(setting, plan, _tell)) as documents:
            for document in documents:
                if out and rounds(document) and not _written(out, summary(document)):
                    out, unwritten = None, True
    except KeyboardInterrupt:
        code, reason = 130, "interrupted"
    except TokcompError as fault:
        if not document:
            raise
        code, reason = 1, str(fault)
    done = rounds(document) if document else 0
    if code:
        shown = "" if done else ", so nothing is shown"
        _tell(f"edge-tokcomp: {reason}; whole rounds: {done} of {plan.rounds}{shown}")
        document["reason"] = reason
    if done:
        found = summary(document)
        if code and out:
            unwritten = not _written(out, found)
        print(f"{table(found)}\n{json.dumps(found)}")  # noqa: T201
    return code or int(unwritten)


def _plan(options: argparse.Namespace) -> Plan:
    for name in ("keep", "tokens", "rounds", "images", "parallel", "ctx", "threads"):
        check_positive(f"--{name}", getattr(options, name))
    if options.tokens < 2:
        raise UsageError(f"--tokens {options.tokens} has no rate of generation; ask for 2 or more")
    if options.batches < 0 or options.batches > options.rounds:
        raise UsageError(f"--batches {options.batches} do not fit between {options.rounds} rounds; ask for fewer")
    size = re.fullmatch(r"(\d{1,6})x(\d{1,6})", options.size)
    if not size or not all(1 <= int(side) <= _LARGEST_SIDE for side in size.groups()):
        raise UsageError(f"--size {options.size}: write WIDTHxHEIGHT, as in 1024x768, up to {_LARGEST_SIDE} each")
    for name in options.method:
        if not get_method(name).compresses:
            raise UsageError(f"--method {name} keeps every token; name one that compresses")
    subject, *apart = arms = list(dict.fromkeys(f"{get_method(name)} {options.keep}" for name in options.method))
    if "pool" not in options.without and f"pool {options.keep}" not in arms:
        arms.insert(0, f"pool {options.keep}")
    batch_arms = tuple(arms) if options.batches else ()
    if "none" not in options.without:
        arms.insert(0, "none")
    sides = int(size.group(1)), int(size.group(2))
    return Plan(
        subject, tuple(arms), batch_arms, sides, options.rounds, options.batches, options.images,
        "baseline" not in options.without, tuple(apart),
    )  # fmt: skip


def _files(options: argparse.Namespace) -> tuple[Path, Path]:
    if (options.lm is None) != (options.mmproj is None):
        raise UsageError("--lm and --mmproj come together; name neither for random weights of --shape")
    if options.lm is not None:
        return Path(options.lm), Path(options.mmproj)
    from .export.random_pairs import BENCH_SHAPES, cached_pair

    if options.shape not in BENCH_SHAPES:
        raise UsageError(f"unknown shape {options.shape!r}; one of {', '.join(BENCH_SHAPES)}")
    _tell(f"{options.shape}: random weights, written to the cache if they are not there")
    lm, mmproj = cached_pair(BENCH_SHAPES[options.shape])
    return lm, mmproj


def _out(options: argparse.Namespace) -> Path | None:
    """The file for the document; refused before there is anything to lose."""
    if options.out is None:
        return None
    path = Path(options.out)
    if (os.path.exists(path) and not os.path.isfile(path)) or not os.access(path.parent, os.W_OK):
        raise UsageError(f"--out {path}: cannot be written; name a file in a folder that can be")
    return path


def _written(out: Path, found: dict[str, Any]) -> bool:
    """Write the document; a disk that is full costs the file, not what is measured, and is told."""
    try:
        write_whole(out, lambda stream: stream.write(f"{json.dumps(found)}\n".encode()))
    except OSError as fault:
        _tell(f"edge-tokcomp: --out {out}: cannot be written ({fault.strerror or fault}); measuring goes on")
        return False
    return True


def _tell(text: str) -> None:
    with unheard(sys.stderr):
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201
