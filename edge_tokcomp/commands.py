"""What the verbs do that run a model; the others are in ``file_commands``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import stat
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from .budget import describe, largest_share, smallest_share
from .errors import ImageError, UsageError, check_positive
from .files import write_whole
from .images import MAX_PIXELS, Image, open_image
from .methods import get_method
from .methods.layer_step import spell_steps
from .text import printable, unheard

if TYPE_CHECKING:
    from .answers import EncodedImage
    from .console import Console
    from .parameters import Parameters
    from .records import Sink
    from .resume import Done
    from .sources import Source
    from .vlm import VLM


def caption(options: argparse.Namespace) -> int:
    """Caption every source; see ``captioning``."""
    from .captioning import caption_all
    from .console import Console, TextLines
    from .parameters import Parameters, check_context
    from .records import read_earlier
    from .resume import Done, check_ids
    from .sidecars import check_sidecars, sidecar_extension
    from .sources import find_sources
    from .vlm import CAPTION_PROMPT

    target, sidecar = _target(options.out), sidecar_extension(options.sidecar)
    if options.max_tokens < 1:
        raise UsageError(f"--max-tokens {options.max_tokens} is not a positive number")
    sources = _without_outputs(find_sources(options.sources, recursive=options.recursive), target, sidecar)
    if sidecar:
        check_sidecars(sources, sidecar, target)
    parameters = Parameters(CAPTION_PROMPT if options.prompt is None else options.prompt, options.max_tokens)
    earlier = None if options.overwrite else target
    if earlier:
        next(read_earlier(earlier), None)  # a file that is none of ours is refused before the model is loaded

    def already() -> Done | None:
        done = Done.read(earlier) if target or not sidecar else None
        if done:
            check_ids(sources, done)
        return done

    with _load(options, parallel=check_positive("--parallel", options.parallel)) as vlm, ExitStack() as stack:
        warning = check_context(vlm, parameters)
        if options.dry_run:
            return _dry_run(vlm, sources, parameters, already(), sidecar, options.overwrite)
        # The sink first: it keeps other runs from the file, so that what is read of it stays true.
        output = _output(options, target)
        if output:
            stack.callback(output.close)
        done = already()
        console = Console(len(sources))
        stack.callback(console.close)
        inside = f"layer steps {spell_steps(vlm.layer_steps)}, " if vlm.layer_steps else ""
        console.say(f"{vlm.name}, {inside}tower {vlm.engine.reason}, {len(sources)} images")
        if warning:
            console.say(warning)
        if options.threads is None and len(sources) - len(done.latest if done else ()) >= _MANY:
            _divide(vlm, sources, parameters, console)
        if vlm.sharing and vlm.sharing.by == "batch":
            console.say("dynamic batch: every picture is scored first, then captioned; the tower runs twice")
        try:
            summary = caption_all(
                vlm, sources, output or TextLines(console), parameters, done=done, sidecar=sidecar,
                overwrite=options.overwrite, progress=console, on_stop=console.stopping,
            )  # fmt: skip
        except KeyboardInterrupt:
            summary = None  # the second one; what follows is the same as after the first
    if summary is not None:
        for line in summary.lines():
            console.say(line)
    if summary is None or summary.interrupted:
        console.say(_how_to_go_on(options, target, sidecar))
        return 130
    return 1 if summary.failures else 0


_MANY = 64
"""Pictures for which it pays to measure how the threads are best used: it takes the time of some six."""


def _divide(vlm: VLM, sources: list[Source], parameters: Parameters, console: Console) -> None:
    """Divide the threads by the first picture that can be read."""
    for source in sources:
        try:
            image = open_image(source.path, max_pixels=vlm.encoder.max_pixels)
        except ImageError:
            continue
        prompt = parameters.for_source(source).prompt
        console.say(f"threads: {vlm.divide_threads(image, prompt, max_tokens=parameters.max_tokens)}")
        return


def _target(out: str | None) -> Path | None:
    if out is None or out == "-":
        return None
    path = Path(out)
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise UsageError(f"--out {out}: write FILE.jsonl, FILE.csv or -")
    try:
        if not path.parent.is_dir():
            raise UsageError(f"--out {out}: there is no folder {path.parent}")
        if path.exists() and not path.is_file():
            raise UsageError(f"--out {out}: not a regular file")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"--out {out}: cannot be written (permission denied)")
    except OSError as fault:
        raise UsageError(f"--out {out}: cannot be written ({fault.strerror})") from fault
    return path


def _without_outputs(sources: list[Source], target: Path | None, sidecar: str | None) -> list[Source]:
    """Leave out what earlier runs wrote among the pictures and a glob brought back."""
    own = None if target is None else os.path.abspath(target)
    kept = [
        source for source in sources
        if os.path.abspath(source.path) != own and not (sidecar and source.path.name.endswith(sidecar))
    ]  # fmt: skip
    if len(kept) < len(sources):
        with unheard(sys.stderr):
            print(f"{len(sources) - len(kept)} output files among the sources are left out", file=sys.stderr)  # noqa: T201
    return kept


def _output(options: argparse.Namespace, target: Path | None) -> Sink | None:
    """What ``--out`` names."""
    from .records import Csv, JsonLines, JsonStream

    if target is not None:
        return (Csv if target.suffix.lower() == ".csv" else JsonLines)(target, overwrite=options.overwrite)
    return JsonStream(sys.stdout) if options.out else None


def _how_to_go_on(options: argparse.Namespace, target: Path | None, sidecar: str | None) -> str:
    if target is None and sidecar is None:
        return "interrupted; with --out FILE.jsonl a run can be taken up again"
    if options.overwrite and sidecar:
        return f"interrupted; to begin anew: {shlex.join(options.command_line)}"
    again = [word for word in options.command_line if word != "--overwrite"]
    given = " (with the same list on standard input)" if "-" in options.sources else ""
    return f"interrupted; to go on{given}: {shlex.join(again)}"


def _dry_run(
    vlm: VLM, sources: list[Source], parameters: Parameters, done: Done | None, sidecar: str | None, overwrite: bool
) -> int:
    from .captioning import count_done
    from .parameters import prompt_rows

    engine = vlm.engine
    before = engine.crop_tokens
    after = engine.kept(vlm.method, vlm.keep)
    shared = ""
    if vlm.sharing:
        low, high = smallest_share(after), largest_share(after, before)
        shared = f" on average, {low} to {high} by what there is to see (dynamic {vlm.sharing})"
    skip = count_done(vlm, sources, parameters, done, sidecar, overwrite)
    lines = {
        "images": f"{len(sources)} found, {skip} done, {len(sources) - skip} to do",
        "language model": f"{vlm.lm} ({vlm.model.architecture}, {vlm.decoder.n_layer} layers)",
        "tower": f"{vlm.mmproj} ({engine.family_name}, {engine.precision}, {engine.reason})",
        "image tokens": f"{_budget(vlm, before, after)}{shared}, method {vlm.method}",
        "context": f"{vlm.decoder.n_ctx} rows; image and prompt take {prompt_rows(vlm, parameters)}, "
        f"the caption up to {parameters.max_tokens}",
        "prompt": parameters.prompt,
    }
    if vlm.layer_steps:
        lines["layer steps"] = f"{spell_steps(vlm.layer_steps)}, positions {vlm.decoder.positions}"
    for name, value in lines.items():
        print(f"{name:15} {value}")  # noqa: T201
    return 0


def _budget(vlm: VLM, before: int, after: int) -> str:
    """Image tokens that are kept, as far as that is known before a picture is seen."""
    if not vlm.engine.sizes_differ:
        return f"{describe(before, after)} a picture"
    if not vlm.method.compresses or vlm.keep == 1.0:
        return f"all of a picture's, whose number goes by its size (a crop of usual size has {before})"
    amount = f"{vlm.keep}" if isinstance(vlm.keep, int) else f"{vlm.keep:.0%} of a picture's"
    return f"{amount}, of as many as its size gives it (a crop of usual size has {before})"


def ask(options: argparse.Namespace) -> int:
    """Answer one question, streaming."""
    _refuse_alone(options)
    image = _open(options)
    with _load(options) as vlm:
        encoded = vlm.encode(image, options.question)
        steps = f", layer steps {spell_steps(vlm.layer_steps)}" if vlm.layer_steps else ""
        print(f"image tokens {_told(encoded)}{steps}", file=sys.stderr)  # noqa: T201
        for piece in vlm.ask(encoded, options.question, stream=True, max_tokens=options.max_tokens):
            print(piece, end="", flush=True)  # noqa: T201
    print()  # noqa: T201
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Draw the plan over the picture."""
    from .overlay import draw_overlay
    from .tower_engine import TowerEngine
    from .vlm import CAPTION_PROMPT

    _refuse_alone(options)
    image, form = _open(options), _picture_format(options.out)
    if Path(options.out).exists() and Path(options.out).samefile(options.image):
        raise UsageError(f"--out {options.out} is the picture itself; name another file")
    with _load(options) as vlm:
        if not isinstance(vlm.engine, TowerEngine):
            raise UsageError(f"what llama.cpp's own tower sees cannot be drawn ({vlm.engine.reason})")
        encoded = vlm.encode(image, options.question or CAPTION_PROMPT)
        spec = vlm.engine.spec
        pixels = vlm.engine.pixels(encoded.image.picture, encoded.variant)
        picture = draw_overlay(pixels, spec, encoded.tokens.layout, encoded.plan, str(vlm.method), encoded.owner)
    try:
        write_whole(options.out, lambda stream: picture.save(stream, form))
    except OSError as fault:
        raise UsageError(f"--out {options.out}: cannot be written ({fault.strerror or fault})") from fault
    print(f"{options.out}: {_told(encoded)}", file=sys.stderr)  # noqa: T201
    return 0


def _refuse_alone(options: argparse.Namespace) -> None:
    """Raise ``UsageError`` where one picture has no others to share a budget with."""
    if options.dynamic in ("batch", "running"):
        raise UsageError(
            f"--dynamic {options.dynamic}: one picture has no others to share its budget with; "
            "use --dynamic calibrated (after edge-tokcomp calibrate)"
        )


def _told(encoded: EncodedImage) -> str:
    """What was kept, and how that came about."""
    line = f"{encoded.plan}, method {encoded.method}"
    return f"{line}, {encoded.share}" if encoded.share else line


def calibrate(options: argparse.Namespace) -> int:
    """Measure the mean information score of pictures, for ``--dynamic calibrated``."""
    from tqdm import tqdm

    from .scoring import calibrate_on
    from .sources import find_sources

    sources = find_sources(options.sources, recursive=options.recursive)
    failures = 0
    with _load(options) as vlm, tqdm(total=len(sources), unit="image", file=sys.stderr) as bar:

        def told(source: Source, reason: str) -> None:
            nonlocal failures
            if reason:
                failures += 1
                bar.write(printable(f"{source.id}: {reason}"), file=sys.stderr)
            bar.update()

        calibration = calibrate_on(vlm, sources, told)
        path = calibration.save(vlm.engine.directory)
    print(f"{path}: {calibration}", file=sys.stderr)  # noqa: T201
    return 1 if failures else 0


def _picture_format(out: str) -> str:
    """Pillow's name for the kind of file ``--out`` names; raises ``UsageError`` if it cannot be written there."""
    path = Path(out)
    form = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower())
    if form is None:
        raise UsageError(f"--out {out}: name a .png or .jpg file")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise UsageError(f"--out {out}: there is no folder {path.parent}") from None
    except OSError as fault:
        raise UsageError(f"--out {out}: cannot be written ({fault.strerror})") from fault
    else:
        if not stat.S_ISREG(mode):
            raise UsageError(f"--out {out}: not a regular file")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--out {out}: cannot be written (permission denied)")
    return form


def eval(options: argparse.Namespace) -> int:
    """Score on the demo tasks; see ``evaluation``."""
    from .evaluation import evaluate, report

    if options.scenes < 1:
        raise UsageError(f"--scenes {options.scenes} is not a positive number")
    if options.matrix is not None:
        return _eval_matrix(options)
    if options.dynamic not in (None, "batch"):
        raise UsageError(f"--dynamic {options.dynamic}: the scenes are one batch; use --dynamic batch")
    if options.methods or options.keeps or options.steps:
        raise UsageError(
            "--methods, --keeps and --steps belong to --matrix DIR; write --method, --keep and --layer-steps for one"
        )
    with _load(options) as vlm:
        result = evaluate(
            vlm, scenes=options.scenes, seed=options.seed, wrong_image=options.wrong_image, tuning=options.tuning
        )
    print(json.dumps(result) if options.json else report(result))  # noqa: T201
    return 0


def _eval_matrix(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .matrix import DEFAULT_KEEPS, DEFAULT_METHODS, run_matrix, write_report
    from .methods.layer_steps import read_layer_steps

    alone = ("method", "keep", "dynamic", "layer_steps", "wrong_image", "json")
    if any(getattr(options, name) for name in alone):
        raise UsageError(
            "--matrix DIR takes --methods, --keeps and --steps; --method, --keep, --dynamic, --layer-steps, "
            "--wrong-image and --json do not go with it"
        )
    if any(not text.strip() for text in options.steps or ()):
        raise UsageError("--steps: an empty one; without steps every method is scored anyway")
    names, keeps = options.methods or DEFAULT_METHODS, options.keeps or DEFAULT_KEEPS
    if min(keeps) < 1:
        raise UsageError(f"--keeps {min(keeps)} leaves no token")
    for name in names:
        get_method(name)
    steps = options.steps or []
    options.layer_steps = [step for text in steps for step in read_layer_steps(text)]
    command = f"edge-tokcomp eval --scenes {options.scenes} --seed {options.seed} --matrix {options.matrix}"
    command += " --tuning" * options.tuning
    for flag, values in (("--methods", options.methods), ("--keeps", options.keeps), ("--steps", options.steps)):
        command += f" {flag} {shlex.join(map(str, values))}" if values else ""
    with _load(options) as vlm, tqdm(total=options.scenes, unit="scene", file=sys.stderr) as bar:
        document = run_matrix(
            vlm, names, keeps, steps, scenes=options.scenes, seed=options.seed, tuning=options.tuning,
            told=lambda done: bar.update(done - bar.n),
        )  # fmt: skip
    try:
        paths = write_report(document, command, Path(options.matrix))
    except OSError as fault:
        raise UsageError(f"--matrix {options.matrix}: cannot be written ({fault.strerror or fault})") from fault
    print(", ".join(map(str, paths)), file=sys.stderr)  # noqa: T201
    return 0


def _open(options: argparse.Namespace) -> Image:
    """The picture, before a model is loaded for it."""
    return open_image(options.image, max_pixels=_max_pixels(options))


def _max_pixels(options: argparse.Namespace) -> int:
    return check_positive("--max-pixels", options.max_pixels) or MAX_PIXELS


def _load(options: argparse.Namespace, *, parallel: int | None = None) -> VLM:
    from .encoded_cache import EncodedCache, disk_cache
    from .vlm import DEFAULT_PARALLEL, load

    return load(
        options.lm, options.mmproj, method=options.method, keep=options.keep, dynamic=options.dynamic,
        layer_steps=options.layer_steps or (), precision=options.precision, provider=options.provider,
        engine=options.engine, gpu_layers=options.gpu_layers, threads=check_positive("--threads", options.threads),
        n_ctx=check_positive("--ctx", options.ctx), seed=options.seed, max_pixels=_max_pixels(options),
        parallel=parallel or DEFAULT_PARALLEL,
        # Commands ask about a picture once, so that memory needs to keep none.
        cache=disk_cache(options.image_cache) if options.image_cache else EncodedCache(0),
    )  # fmt: skip
