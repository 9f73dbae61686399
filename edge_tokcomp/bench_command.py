"""The verb ``bench``: what is measured, a table for people, and one JSON object as the last line."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from .bench.contenders import Setting
from .bench.report import summary, table
from .bench.run import Plan, run
from .errors import UsageError, check_positive
from .files import write_whole
from .language.segment import available_cores
from .methods import get_method

_LARGEST_SIDE = 16384


def bench(options: argparse.Namespace) -> int:
    """Measure, and print what came of it."""
    plan, subject = _plan(options)
    lm, mmproj = _files(options)
    setting = Setting(
        str(lm), str(mmproj), options.prompt, options.tokens, options.threads or available_cores(), options.ctx,
        options.precision, options.parallel,
    )  # fmt: skip
    found = summary(run(setting, plan, _told), subject)
    print(table(found))  # noqa: T201
    line = json.dumps(found)
    if options.out:
        try:
            write_whole(options.out, lambda stream: stream.write(f"{line}\n".encode()))
        except OSError as fault:
            raise UsageError(f"--out {options.out}: cannot be written ({fault.strerror or fault})") from fault
    print(line)  # noqa: T201
    return 0


def _plan(options: argparse.Namespace) -> tuple[Plan, str]:
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
    plan = Plan(
        tuple(arms), batch_arms, sides, options.rounds, options.batches, options.images,
        "baseline" not in options.without, tuple(apart),
    )  # fmt: skip
    return plan, subject


def _files(options: argparse.Namespace) -> tuple[Path, Path]:
    if (options.lm is None) != (options.mmproj is None):
        raise UsageError("--lm and --mmproj come together; name neither for random weights of --shape")
    if options.lm is not None:
        return Path(options.lm), Path(options.mmproj)
    from .export.random_pairs import BENCH_SHAPES, cached_pair

    if options.shape not in BENCH_SHAPES:
        raise UsageError(f"unknown shape {options.shape!r}; one of {', '.join(BENCH_SHAPES)}")
    _told(f"{options.shape}: random weights, written to the cache if they are not there")
    lm, mmproj = cached_pair(BENCH_SHAPES[options.shape])
    return lm, mmproj


def _told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
