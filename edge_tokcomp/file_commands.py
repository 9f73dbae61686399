"""What the verbs do that turn files into files, or list what there is; no model is run for an answer."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import textwrap
from pathlib import Path

from .errors import UsageError, check_positive
from .methods import AttentionMethod, TowerMethod, get_method, joined_form, method_table
from .methods.options import describe_options, spell
from .text import printable, unheard


def methods(options: argparse.Namespace) -> int:
    """List the methods, and the steps inside the language model."""
    from .methods.layer_steps import LAYER_STEPS, layer_step_table

    table, joined = method_table(), joined_form()
    if options.json:
        listed = {"methods": table, "joined": joined, "layer_steps": layer_step_table()}
        print(json.dumps(listed, indent=2))  # noqa: T201
        return 0
    print("methods (--method), before the language model:")  # noqa: T201
    for row in table:
        needs = f"  needs {', '.join(row['needs'])}" if row["needs"] else ""
        print(f"{row['name']:15} {row['title']}{needs}")  # noqa: T201
        print(f"{'':15} {row['source']}")  # noqa: T201
        if row["options"]:
            settings = ", ".join(f"{name}={spell(value['default'])}" for name, value in row["options"].items())
            print(f"{'':15} {settings}")  # noqa: T201
    print(f"{joined['name']:15} {joined['title']}, as in {joined['example']}")  # noqa: T201
    print(f"{'':15} {joined['source']}; TOWER: {', '.join(joined['first'])}")  # noqa: T201
    leave = joined["options"]["leave"]["default"]
    print(f"{'':15} leave={spell(leave)}, written with the first: how much the tower leaves")  # noqa: T201
    print("\nlayer steps (--layer-steps NAME@LAYER:AMOUNT,...), inside it:")  # noqa: T201
    for name, step in LAYER_STEPS.items():
        print(f"{name:15} {step.title}; amount: {step.amount}")  # noqa: T201
        print(f"{'':15} {step.source}")  # noqa: T201
        defaults = {option: value["default"] for option, value in describe_options(step).items()}
        at = ",".join(f"{layer}:{amount:g}" for layer, amount in defaults.pop("at"))
        settings = ", ".join(f"{option}={spell(value)}" for option, value in defaults.items())
        print(f"{'':15} {name}@{at}{', ' * bool(settings)}{settings}")  # noqa: T201
    return 0


def models(options: argparse.Namespace) -> int:
    """List the families that have a tower here, and the projectors that llama.cpp's own serves."""
    from .families import CHECKED, FAMILIES
    from .language.mtmd_file import served_projectors

    own = {projector for family in FAMILIES for projector in family.projectors}
    others = sorted(served_projectors() - own)
    if options.json:
        table = [
            {"family": family.name, "models": family.models, "projectors": family.projectors, "engine": "onnx",
             "checked": CHECKED} for family in FAMILIES
        ]  # fmt: skip
        print(json.dumps({"families": table, "mtmd": others}, indent=2))  # noqa: T201
        return 0
    print("with a tower of ours (--engine onnx, the default for them):")  # noqa: T201
    for family in FAMILIES:
        print(f"{family.name:12} {family.models}  (projector {', '.join(family.projectors)})")  # noqa: T201
    print(f"checked: {CHECKED}")  # noqa: T201
    print("\nby llama.cpp's own tower (--engine mtmd, the default for them), projector types:")  # noqa: T201
    print(textwrap.fill(", ".join(others), 100))  # noqa: T201
    print(  # noqa: T201
        "checked: what llama.cpp encodes enters the language model as llama.cpp itself would feed it, on tiny random\n"
        "models of the families above, of MiniCPM-V, GLM-4V, CogVLM, Gemma 3n, Gemma 4, HunyuanVL and DeepSeek-V4\n"
        "(resampler, glm4v, cogvlm, gemma3nv, gemma4v, hunyuanvl, deepseek4v); the other types were not run."
    )
    return 0


def compress(options: argparse.Namespace) -> int:
    """Run a method on the arrays of a file."""
    from .features import read_features

    method = get_method(options.method)
    if isinstance(method, TowerMethod):
        raise UsageError(f"method {method.name} acts in the tower or before it, not on its rows; choose another method")
    if isinstance(method, AttentionMethod) and method.block is not None:
        raise UsageError(f"method {method}: the block is of a tower, and these rows have left it; leave block out")
    tokens, query = read_features(Path(options.features))
    plan = method.compress(tokens, options.keep, seed=options.seed, query=query)
    try:
        plan.save(options.out)
    except OSError as fault:
        raise UsageError(f"--out {options.out}: cannot be written ({fault.strerror or fault})") from fault
    print(f"{options.out}: {plan}, method {method}", file=sys.stderr)  # noqa: T201
    return 0


def export(options: argparse.Namespace) -> int:
    """Build a tower into a new directory."""
    from .export.tower_files import export_tower

    if options.hf is None and os.path.isdir(options.mmproj):
        raise UsageError(f"{options.mmproj}: a folder; name a GGUF file, or a checkpoint's folder with --hf")
    if options.hf is not None and not os.path.isdir(options.hf):
        raise UsageError(f"--hf {options.hf}: not a folder; name that of a checkpoint, with its config.json")
    files = export_tower(options.mmproj if options.hf is None else options.hf, options.out, options.precision)
    line = f"{options.out}: {files.spec.family} tower, {files.precision}, against the source: {files.check}"
    print(line, file=sys.stderr)  # noqa: T201
    return 0


def split(options: argparse.Namespace) -> int:
    """Cut a language model into segments; their folder goes to stdout."""
    from .export.check_segments import read_check
    from .export.split import cached_segments, split_model
    from .language.gguf_header import read_header, split_files
    from .language.segment_files import SegmentFiles

    try:
        at = [int(layer) for layer in options.at.split(",")]
    except ValueError as fault:
        raise UsageError(f"--at {options.at}: name layers by number, as in --at 8,16,24") from fault
    verify, threads = options.verify, check_positive("--threads", options.threads)
    size = sum(path.stat().st_size for path in split_files(read_header(options.lm))) / 1e6
    print(f"{options.lm}: {size:,.1f} MB", file=sys.stderr)  # noqa: T201
    if options.out is None:
        folder = cached_segments(options.lm, at, verify=verify, threads=threads)
    else:
        print(f"cutting it before layers {', '.join(map(str, at))}", file=sys.stderr)  # noqa: T201
        folder = split_model(options.lm, at, options.out, verify=verify, threads=threads)
    files = SegmentFiles.read(folder)
    bounds = [0, *files.cuts, files.depth]
    for path, start, stop in zip(files.paths, bounds, bounds[1:], strict=False):
        line = f"{path.name}: layers {start} to {stop - 1}, {path.stat().st_size / 1e6:,.1f} MB"
        print(line, file=sys.stderr)  # noqa: T201
    check = read_check(folder)
    print(f"against the whole model: {check}" if check else "not run against the whole model", file=sys.stderr)  # noqa: T201
    print(folder)  # noqa: T201
    return 0


def pull(options: argparse.Namespace) -> int:
    """Fetch a model's files; the paths of language model and mmproj go to stdout."""
    from .fetching import check_space, fetch, megabytes, plan
    from .hub import open_repository
    from .pulling import choose, read_name

    name, tag = read_name(options.repository)
    out = None if options.out is None else Path(options.out)
    if out is not None and os.path.exists(out) and not os.path.isdir(out):
        raise UsageError(f"--out {out}: not a folder")
    repository = open_repository(name)
    if repository.offline:
        _tell(f"{repository.offline}; going by what the cache has of {name}")
    choice = choose(str(repository), repository.files, tag)
    _tell(choice.reason)
    jobs = [plan(repository, file, out) for file in (*choice.lm, choice.mmproj)]
    for job in jobs:
        print(printable(str(job)), file=sys.stdout if options.dry_run else sys.stderr)
    needed, place = sum(job.missing for job in jobs), repository.folder if out is None else out
    if needed:
        free = check_space(place, needed)
        _tell(f"{megabytes(needed)} to write to {place}, where {megabytes(free)} are free")
    if options.dry_run:
        return 0
    lm, *_, mmproj = [fetch(repository, job, _tell) for job in jobs]
    _tell(f"edge-tokcomp caption photos/ --lm {shlex.quote(str(lm))} --mmproj {shlex.quote(str(mmproj))}")
    print(lm, mmproj, sep="\n")  # noqa: T201
    return 0


def _tell(line: str) -> None:
    with unheard(sys.stderr):
        print(printable(line), file=sys.stderr)  # noqa: T201
