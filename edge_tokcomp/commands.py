"""What each verb of the command does."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import shlex
import sys
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .budget import describe, tokens_to_keep
from .errors import UsageError
from .images import MAX_PIXELS, Image, open_image
from .methods import get_method, method_table
from .tokens import Layout, VisionTokens

if TYPE_CHECKING:
    from .captioning import Done, Parameters
    from .records import Sink
    from .sources import Source
    from .vlm import VLM

_FEATURE_ARRAYS = ("features", "embeddings", "cls_attention", "keys", "query", "grid")
_FEATURE_BYTES = 4 << 30
"""Most bytes a file of ``compress`` may unpack to."""


def caption(options: argparse.Namespace) -> int:
    """Caption every source; see ``captioning``."""
    from .captioning import Done, Parameters, caption_all, check_context, check_sidecars
    from .console import Console, TextLines
    from .sources import find_sources
    from .vlm import CAPTION_PROMPT

    target, sidecar = _target(options.out), _sidecar(options.sidecar)
    if options.max_tokens < 1:
        raise UsageError(f"--max-tokens {options.max_tokens} is not a positive number")
    sources = _without_outputs(find_sources(options.sources, recursive=options.recursive), target, sidecar)
    if sidecar:
        check_sidecars(sources, sidecar)
    parameters = Parameters(CAPTION_PROMPT if options.prompt is None else options.prompt, options.max_tokens)
    done = Done.read(None if options.overwrite else target) if target or not sidecar else None
    with _load(options) as vlm:
        check_context(vlm, parameters)
        if options.dry_run:
            return _dry_run(vlm, sources, parameters, done, sidecar, options.overwrite)
        output = _output(options, target)
        console = Console(len(sources))
        sink = output or TextLines(console)
        console.say(f"{vlm.lm.name}, tower {vlm.tower.provider_reason}, {len(sources)} images")
        summary = None
        try:
            summary = caption_all(
                vlm, sources, sink, parameters, done=done, sidecar=sidecar, overwrite=options.overwrite,
                progress=console, on_stop=console.stopping,
            )  # fmt: skip
        except KeyboardInterrupt:
            pass  # the second one; what follows is the same as after the first
        finally:
            sink.close()
            console.close()
    if summary is not None:
        console.say(str(summary))
        for name, reason in summary.failures:
            console.say(f"  failed: {name}: {reason}")
    if summary is None or summary.interrupted:
        console.say(_how_to_go_on(options, target, sidecar))
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
    if path.exists() and not path.is_file():
        raise UsageError(f"--out {out}: not a regular file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"--out {out}: cannot be written (permission denied)")
    return path


def _sidecar(extension: str | None) -> str | None:
    from .sources import EXTENSIONS

    if extension is None:
        return None
    dotted = extension if extension.startswith(".") else f".{extension}"
    if not re.fullmatch(r"(\.[\w-]+)+", dotted):
        raise UsageError(f"--sidecar {extension}: name an extension such as .txt")
    if Path(f"a{dotted}").suffix.lower() in EXTENSIONS:
        raise UsageError(f"--sidecar {extension} would write captions over pictures; name an extension such as .txt")
    return dotted


def _without_outputs(sources: list[Source], target: Path | None, sidecar: str | None) -> list[Source]:
    """Leave out what earlier runs wrote among the pictures and a glob brought back."""
    own = None if target is None else os.path.abspath(target)
    kept = [
        source for source in sources
        if os.path.abspath(source.path) != own and not (sidecar and source.path.name.endswith(sidecar))
    ]  # fmt: skip
    if len(kept) < len(sources):
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

    before = vlm.spec.patches
    after = tokens_to_keep(vlm.keep, before) if vlm.method.compresses else before
    skip = count_done(vlm, sources, parameters, done, sidecar, overwrite)
    lines = {
        "images": f"{len(sources)} found, {skip} done, {len(sources) - skip} to do",
        "language model": f"{vlm.lm} ({vlm.model.architecture}, {vlm.model.n_layer} layers)",
        "tower": f"{vlm.mmproj} ({vlm.family.name}, {vlm.precision}, {vlm.tower.provider_reason})",
        "image tokens": f"{describe(before, after)} a crop, method {vlm.method}",
        "context": f"{vlm.decoder.n_ctx} rows; image and prompt take {vlm.rows_needed(parameters.prompt)}, "
        f"the caption up to {parameters.max_tokens}",
        "prompt": parameters.prompt,
    }
    for name, value in lines.items():
        print(f"{name:15} {value}")  # noqa: T201
    return 0


def ask(options: argparse.Namespace) -> int:
    """Answer one question, streaming."""
    image = _open(options)
    with _load(options) as vlm:
        encoded = vlm.encode(image, options.question)
        print(f"image tokens {encoded.plan}, method {vlm.method}", file=sys.stderr)  # noqa: T201
        for piece in vlm.ask(encoded, options.question, stream=True, max_tokens=options.max_tokens):
            print(piece, end="", flush=True)  # noqa: T201
    print()  # noqa: T201
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Draw the plan over the picture."""
    from .overlay import draw_overlay
    from .vlm import CAPTION_PROMPT

    image = _open(options)
    if Path(options.out).exists() and Path(options.out).samefile(options.image):
        raise UsageError(f"--out {options.out} is the picture itself; name another file")
    with _load(options) as vlm:
        encoded = vlm.encode(image, options.question or CAPTION_PROMPT)
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
    if options.matrix is not None:
        return _eval_matrix(options)
    if options.methods or options.keeps:
        raise UsageError("--methods and --keeps belong to --matrix DIR; write --method and --keep for one run")
    with _load(options) as vlm:
        result = evaluate(vlm, scenes=options.scenes, seed=options.seed, wrong_image=options.wrong_image)
    print(json.dumps(result) if options.json else report(result))  # noqa: T201
    return 0


def _eval_matrix(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .matrix import DEFAULT_KEEPS, DEFAULT_METHODS, run_matrix, write_report

    if options.method is not None or options.keep is not None or options.wrong_image or options.json:
        raise UsageError(
            "--matrix DIR takes --methods and --keeps; --method, --keep, --wrong-image and --json do not go with it"
        )
    names, keeps = options.methods or DEFAULT_METHODS, options.keeps or DEFAULT_KEEPS
    if min(keeps) < 1:
        raise UsageError(f"--keeps {min(keeps)} leaves no token")
    for name in names:
        get_method(name)
    command = f"edge-tokcomp eval --scenes {options.scenes} --seed {options.seed} --matrix {options.matrix}"
    for flag, values in (("--methods", options.methods), ("--keeps", options.keeps)):
        command += f" {flag} {' '.join(map(str, values))}" if values else ""
    with _load(options) as vlm, tqdm(total=options.scenes, unit="scene", file=sys.stderr) as bar:
        document = run_matrix(
            vlm, names, keeps, scenes=options.scenes, seed=options.seed, told=lambda done: bar.update(done - bar.n)
        )  # fmt: skip
    try:
        paths = write_report(document, command, Path(options.matrix))
    except OSError as fault:
        raise UsageError(f"--matrix {options.matrix}: cannot be written ({fault.strerror or fault})") from fault
    print(", ".join(map(str, paths)), file=sys.stderr)  # noqa: T201
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
    tokens, query = _read_features(Path(options.features))
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

    files = export_tower(options.mmproj, options.out, options.precision)
    line = f"{options.out}: {files.spec.family} tower, {files.precision}, against the source: {files.check}"
    print(line, file=sys.stderr)  # noqa: T201
    return 0


def _read_features(path: Path) -> tuple[VisionTokens, NDArray[np.generic] | None]:
    """The arrays of ``compress``, the question's apart. N = rows x columns + 1 means that row 0 is the CLS row."""
    try:
        arrays = _read_arrays(path)
    except (
        OSError, EOFError, ValueError, SyntaxError, RuntimeError, tokenize.TokenError, zipfile.BadZipFile, zlib.error
    ) as fault:  # fmt: skip
        raise UsageError(f"{path}: not an .npz of arrays ({fault})") from fault
    if "features" not in arrays:
        raise UsageError(f"{path}: has no array 'features' (N, D); write it with numpy.savez(FILE, features=...)")
    grid_array = arrays.pop("grid", None)
    for name, array in arrays.items():
        if array.dtype.kind != "f" or array.ndim != 2 or not array.size:
            raise UsageError(f"{path}: {name} {array.shape} {array.dtype} must be a matrix of floating-point numbers")
    features, embeddings = arrays["features"], arrays.get("embeddings")
    count = len(features)
    rows, columns = _grid(path, grid_array, count)
    if embeddings is not None and len(embeddings) != count:
        raise UsageError(f"{path}: embeddings {embeddings.shape} must be ({count}, d)")
    query, width = arrays.get("query"), (features if embeddings is None else embeddings).shape[1]
    if query is not None and query.shape[1] != width:
        raise UsageError(f"{path}: query {query.shape} must be (m, {width}), as wide as the embeddings")
    try:
        tokens = VisionTokens(
            features,
            Layout.of_grids((rows, columns), cls_rows=rows * columns == count - 1),
            None if embeddings is None else lambda _rows: embeddings,
            arrays.get("cls_attention"),
            arrays.get("keys"),
        )
        return tokens, query
    except ValueError as fault:
        raise UsageError(f"{path}: {fault}") from fault


def _grid(path: Path, array: NDArray[np.generic] | None, count: int) -> tuple[int, int]:
    if array is None:
        for patches in (count, count - 1):  # a square, without or with a CLS row before it
            side = math.isqrt(patches)
            if side and side**2 == patches:
                return side, side
        return 1, count
    if array.shape != (2,) or array.dtype.kind not in "iu":
        raise UsageError(f"{path}: grid {array.shape} {array.dtype} must be two whole numbers, rows and columns")
    rows, columns = int(array[0]), int(array[1])
    if rows < 1 or columns < 1 or rows * columns not in (count, count - 1):
        raise UsageError(f"{path}: grid {rows} x {columns} does not hold {count} rows, with or without a CLS row")
    return rows, columns


def _read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of ``compress``, declared sizes checked before memory is taken for them."""
    arrays: dict[str, NDArray[np.generic]] = {}
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > _FEATURE_BYTES:
            raise ValueError(f"unpacks to more than {_FEATURE_BYTES >> 30} GiB")
        for name in _FEATURE_ARRAYS:
            if f"{name}.npy" not in archive.namelist():
                continue
            data = archive.read(f"{name}.npy")
            stream = io.BytesIO(data)
            older = np.lib.format.read_magic(stream) == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if older else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read_header(stream)
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
                raise ValueError(f"{name} has the wrong type or size")
            flat = np.frombuffer(data, dtype, offset=stream.tell())
            arrays[name] = flat.reshape(shape, order="F" if by_columns else "C")
    return arrays


def _open(options: argparse.Namespace) -> Image:
    """The picture, before a model is loaded for it."""
    return open_image(options.image, max_pixels=_max_pixels(options))


def _max_pixels(options: argparse.Namespace) -> int:
    return _positive("--max-pixels", options.max_pixels) or MAX_PIXELS


def _load(options: argparse.Namespace) -> VLM:
    from .vlm import load

    return load(
        options.lm, options.mmproj, method=options.method, keep=options.keep, precision=options.precision,
        provider=options.provider, gpu_layers=options.gpu_layers, threads=_positive("--threads", options.threads),
        n_ctx=_positive("--ctx", options.ctx), seed=options.seed,
        max_pixels=_max_pixels(options),
    )  # fmt: skip


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise UsageError(f"{name} {value} is not a positive number")
    return value
