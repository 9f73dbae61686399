"""What each verb of the command does."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .budget import describe, tokens_to_keep
from .errors import UsageError
from .images import MAX_PIXELS
from .methods import get_method, method_table
from .tokens import Layout, VisionTokens

if TYPE_CHECKING:
    from .records import Sink
    from .vlm import VLM


def caption(options: argparse.Namespace) -> int:
    """Caption every source; see ``captioning``."""
    from .captioning import Done, Parameters, caption_all
    from .console import Console, TextLines
    from .records import Csv, JsonLines
    from .sources import find_sources
    from .vlm import CAPTION_PROMPT

    target = _target(options.out)
    sidecar = options.sidecar and (options.sidecar if options.sidecar.startswith(".") else f".{options.sidecar}")
    if options.max_tokens < 1:
        raise UsageError(f"--max-tokens {options.max_tokens} is not a positive number")
    sources = find_sources(options.sources, recursive=options.recursive)
    parameters = Parameters(options.prompt or CAPTION_PROMPT, options.max_tokens)
    keeps_record = target is not None or not sidecar
    if target is not None and options.overwrite and not options.dry_run:
        target.unlink(missing_ok=True)
    done = Done.read(target) if keeps_record else None
    with _load(options) as vlm:
        if options.dry_run:
            return _dry_run(vlm, sources, parameters, done)
        console = Console(len(sources))
        console.say(f"{vlm.lm.name}, tower {vlm.tower.provider_reason}, {len(sources)} images")
        sink: Sink
        try:
            if options.out is None:
                sink = TextLines(console)
            elif target is not None and target.suffix.lower() == ".csv":
                sink = Csv(target)
            else:
                sink = JsonLines(target or sys.stdout)
        except OSError as fault:
            raise UsageError(f"{target}: cannot be written ({fault.strerror or fault})") from fault
        try:
            summary = caption_all(
                vlm,
                sources,
                sink,
                parameters,
                done=done,
                sidecar=sidecar,
                overwrite=options.overwrite,
                progress=console,
            )
        finally:
            sink.close()
            console.close()
    console.say(str(summary))
    for name, reason in summary.failures:
        console.say(f"  failed: {name}: {reason}")
    if summary.interrupted:
        if target or sidecar:
            again = [word for word in options.command_line if word != "--overwrite"]
            console.say(f"interrupted; to go on: {shlex.join(again)}")
        else:
            console.say("interrupted; with --out FILE.jsonl a run can be taken up again")
        return 130
    return 1 if summary.failures else 0


def _target(out: str | None) -> Path | None:
    if out is None or out == "-":
        return None
    path = Path(out)
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise UsageError(f"--out {out}: write FILE.jsonl, FILE.csv or -")
    if not path.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {path.parent}")
    return path


def _dry_run(vlm: VLM, sources: list[Any], parameters: Any, done: Any) -> int:
    from .captioning import Done, count_done

    before = vlm.spec.patches
    after = tokens_to_keep(vlm.keep, before) if vlm.method.compresses else before
    skip = count_done(vlm, sources, parameters, done or Done())
    lines = {
        "images": f"{len(sources)} found, {skip} done, {len(sources) - skip} to do",
        "language model": f"{vlm.lm} ({vlm.model.architecture}, {vlm.model.n_layer} layers)",
        "tower": f"{vlm.mmproj} ({vlm.family.name}, {vlm.precision}, {vlm.tower.provider_reason})",
        "image tokens": f"{describe(before, after)} a crop, method {vlm.method}",
        "context": f"{vlm.decoder.n_ctx} rows",
        "prompt": parameters.prompt,
    }
    for name, value in lines.items():
        print(f"{name:15} {value}")  # noqa: T201
    return 0


def ask(options: argparse.Namespace) -> int:
    """Answer one question, streaming."""
    with _load(options) as vlm:
        encoded = vlm.encode(options.image)
        print(f"image tokens {encoded.plan}, method {vlm.method}", file=sys.stderr)  # noqa: T201
        for piece in vlm.ask(encoded, options.question, stream=True, max_tokens=options.max_tokens):
            print(piece, end="", flush=True)  # noqa: T201
    print()  # noqa: T201
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Draw the plan over the picture."""
    from .overlay import draw_overlay

    with _load(options) as vlm:
        encoded = vlm.encode(options.image)
        pixels = vlm.family.preprocess(encoded.image.picture, vlm.spec)
        label = f"{vlm.method}  {encoded.plan}"
        picture = draw_overlay(pixels, vlm.spec, encoded.tokens.layout, encoded.plan, label)
    try:
        picture.save(options.out)
    except (OSError, ValueError) as fault:
        raise UsageError(f"--out {options.out}: cannot be written ({fault}); name a .png file") from fault
    print(f"{options.out}: {label}", file=sys.stderr)  # noqa: T201
    return 0


def eval(options: argparse.Namespace) -> int:
    """Score on the demo tasks; see ``evaluation``."""
    from .evaluation import evaluate, report

    if options.scenes < 1:
        raise UsageError(f"--scenes {options.scenes} is not a positive number")
    with _load(options) as vlm:
        result = evaluate(vlm, scenes=options.scenes, seed=options.seed, wrong_image=options.wrong_image)
    print(json.dumps(result) if options.json else report(result))  # noqa: T201
    return 0


def methods(options: argparse.Namespace) -> int:
    """List the methods."""
    table = method_table()
    if options.json:
        print(json.dumps(table, indent=2))  # noqa: T201
        return 0
    for row in table:
        needs = f"  needs {', '.join(row['needs'])}" if row["needs"] else ""
        print(f"{row['name']:15} {row['title']}{needs}")  # noqa: T201
        print(f"{'':15} {row['source']}")  # noqa: T201
        if row["options"]:
            settings = ", ".join(f"{name}={value['default']}" for name, value in row["options"].items())
            print(f"{'':15} {settings}")  # noqa: T201
    return 0


def compress(options: argparse.Namespace) -> int:
    """Run a method on the arrays of a file."""
    method = get_method(options.method)
    plan = method.compress(_read_features(Path(options.features)), options.keep, seed=options.seed)
    try:
        plan.save(options.out)
    except OSError as fault:
        raise UsageError(f"--out {options.out}: cannot be written ({fault.strerror or fault})") from fault
    print(f"{options.out}: {plan}, method {method}", file=sys.stderr)  # noqa: T201
    return 0


def export(options: argparse.Namespace) -> int:
    """Build a tower into a new directory."""
    from .export.tower_files import export_tower

    files = export_tower(options.mmproj, options.out, options.precision)
    print(f"{options.out}: {files.spec.family} tower, {files.precision}, against the source: {files.check}")  # noqa: T201
    return 0


def _read_features(path: Path) -> VisionTokens:
    """The arrays of ``compress``. N = rows x columns + 1 means that row 0 is the CLS row."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as fault:
        raise UsageError(f"{path}: not an .npz of arrays ({fault})") from fault
    if "features" not in arrays:
        raise UsageError(f"{path}: has no array 'features' (N, D); it holds {', '.join(arrays) or 'nothing'}")
    features = arrays["features"]
    if features.ndim != 2 or not len(features):
        raise UsageError(f"{path}: features {features.shape} must be (N, D)")
    count, side = len(features), int(len(features) ** 0.5)
    grid = (
        tuple(int(n) for n in arrays["grid"]) if "grid" in arrays else (side, side) if side**2 == count else (1, count)
    )
    if len(grid) != 2 or grid[0] < 1 or grid[1] < 1 or grid[0] * grid[1] not in (count, count - 1):
        raise UsageError(f"{path}: grid {grid} does not hold {count} rows, with or without a CLS row")
    embeddings = arrays.get("embeddings")
    if embeddings is not None and (embeddings.ndim != 2 or len(embeddings) != count):
        raise UsageError(f"{path}: embeddings {embeddings.shape} must be ({count}, d)")
    try:
        return VisionTokens(
            features,
            Layout.of_grids((grid[0], grid[1]), cls_rows=grid[0] * grid[1] == count - 1),
            None if embeddings is None else lambda _rows: embeddings,
            arrays.get("cls_attention"),
            arrays.get("keys"),
        )
    except ValueError as fault:
        raise UsageError(f"{path}: {fault}") from fault


def _load(options: argparse.Namespace) -> VLM:
    from .vlm import load

    return load(
        options.lm, options.mmproj, method=options.method, keep=options.keep, precision=options.precision,
        provider=options.provider, gpu_layers=options.gpu_layers, threads=_positive("--threads", options.threads),
        n_ctx=_positive("--ctx", options.ctx), seed=options.seed,
        max_pixels=_positive("--max-pixels", options.max_pixels) or MAX_PIXELS,
    )  # fmt: skip


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise UsageError(f"{name} {value} is not a positive number")
    return value
