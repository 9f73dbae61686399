"""The ``edge-tokcomp`` command: arguments in, exit codes out.

Heavy modules are imported by the verbs that need them: ``--help`` must answer at once.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TextIO

from . import __version__
from .errors import ImageError, TokcompError

OK, SOME_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

_ROOMS = {"bench": "bench_command"} | dict.fromkeys(
    ("methods", "models", "compress", "export", "split", "pull"), "file_commands"
)
"""Where verbs are that run no model of the user's in this process; the others are in ``commands``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 all well, 1 some pictures failed, 2 it could not be done as asked, 130 interrupted."""
    _open_streams()
    try:
        return _run(arguments)
    finally:
        _settle_errors()


def _run(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help(sys.stderr)
        return USAGE
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    options.command_line = ["edge-tokcomp", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        room = import_module(f".{_ROOMS.get(options.run, 'commands')}", __package__)
        code = int(getattr(room, options.run)(options))
        sys.stdout.flush()
        return code
    except ImageError as fault:
        return _say(str(fault), SOME_FAILED)
    except TokcompError as fault:
        return _say(str(fault), USAGE)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        _drop(sys.stdout)
        return SOME_FAILED
    except OSError as fault:
        if fault.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        _drop(sys.stdout)
        return _say(f"the output cannot be written ({fault.strerror})", USAGE)
    except KeyboardInterrupt:
        return _say("interrupted; run the same command again to go on", INTERRUPTED)


def _open_streams() -> None:
    """Streams that are closed swallow what is written; characters a terminal cannot show are escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _settle_errors() -> None:
    """Let what nobody read on stderr go nowhere."""
    if not sys.stderr.closed:
        try:
            sys.stderr.flush()
        except OSError:
            _drop(sys.stderr)


def _drop(stream: TextIO) -> None:
    """Let what is still buffered go nowhere: Python would fail on it again at the end, with an exit code of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _say(text: str, code: int) -> int:
    from .text import printable, unheard

    with unheard(sys.stderr):
        print(f"edge-tokcomp: {printable(text)}", file=sys.stderr)  # noqa: T201
    return code


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    parser = argparse.ArgumentParser(
        prog="edge-tokcomp",
        allow_abbrev=False,
        description="Vision-language models on small machines, with a fraction of their image tokens.",
    )
    parser.add_argument("--version", action="version", version=f"edge-tokcomp {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")

    caption = _verb(verbs, "caption", "caption pictures, folders of them, or a list")
    caption.add_argument("sources", nargs="+", metavar="SOURCE", help="file, folder, glob, or - for a list on stdin")
    _model_options(caption)
    caption.add_argument("--prompt", help="what is asked of each picture; {stem} and {parent} stand for its names")
    caption.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest caption (default 256)")
    caption.add_argument("--parallel", type=int, metavar="N", help="captions that are generated at once, as far as the "
                         "context holds them (default 16)")  # fmt: skip
    caption.add_argument("--out", metavar="FILE", help="FILE.jsonl, FILE.csv, or - for JSON lines on stdout; "
                         "without it, names and captions go to stdout")  # fmt: skip
    caption.add_argument("--sidecar", metavar="EXT", help="also write each caption beside its picture, as .txt say")
    caption.add_argument("--recursive", action="store_true", help="go into sub-folders")
    caption.add_argument("--overwrite", action="store_true", help="begin anew instead of skipping what is done")
    caption.add_argument("--dry-run", action="store_true", help="say what would be done, and with what")

    ask = _verb(verbs, "ask", "ask about one picture")
    ask.add_argument("image", metavar="IMAGE")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    _model_options(ask)

    calibrate = _verb(verbs, "calibrate", "measure how much there is to see in pictures, for --dynamic calibrated")
    calibrate.add_argument("sources", nargs="+", metavar="SOURCE", help="file, folder, glob, or - for a list on stdin; "
                           "such pictures as will be asked about")  # fmt: skip
    calibrate.add_argument("--recursive", action="store_true", help="go into sub-folders")
    _model_options(calibrate, compression=False)

    inspect = _verb(verbs, "inspect", "draw the kept tokens over a picture")
    inspect.add_argument("image", metavar="IMAGE")
    inspect.add_argument("--out", metavar="FILE.png", required=True)
    inspect.add_argument("--question", metavar="TEXT", help="what is asked, for methods that look at the question "
                         "(default: to describe the image)")  # fmt: skip
    _model_options(inspect, steps=False)

    evaluate = _verb(verbs, "eval", "score a method on the demo tasks")
    evaluate.add_argument("--scenes", type=int, default=200, metavar="N", help="fresh test scenes (default 200)")
    evaluate.add_argument(
        "--wrong-image", action="store_true", help="show the model another scene than it is asked about"
    )
    evaluate.add_argument("--tuning", action="store_true", help="score on tuning scenes, by which parameters may be "
                          "chosen, not on the test scenes")  # fmt: skip
    evaluate.add_argument("--json", action="store_true", help="one JSON object on stdout")
    evaluate.add_argument("--matrix", metavar="DIR", help="score many methods at many budgets instead; table, figure "
                          "and numbers go to DIR")  # fmt: skip
    evaluate.add_argument("--methods", nargs="+", metavar="METHOD", help="methods of the matrix (default: all)")
    evaluate.add_argument(
        "--keeps", nargs="+", type=int, metavar="K", help="its budgets (default: 288 192 128 64 32 16)"
    )
    evaluate.add_argument(
        "--steps", nargs="+", metavar="S", help="its layer steps, each beside none at all (default: none)"
    )
    _model_options(evaluate)

    bench = _verb(verbs, "bench", "measure speed and memory beside llama-cpp-python's own image handler")
    _bench_options(bench)

    methods = _verb(verbs, "methods", "list the compression methods and layer steps, with their options")
    methods.add_argument("--json", action="store_true", help="as JSON")

    models = _verb(verbs, "models", "list the models that can be used, and how far each was checked")
    models.add_argument("--json", action="store_true", help="as JSON")

    compress = _verb(verbs, "compress", "run a method on arrays of your own")
    compress.add_argument("features", metavar="FEATURES.npz", help="features (N,D); optionally embeddings (N,d), "
                          "cls_attention (heads,N), keys (N,Dk), query (m,d), grid (rows, columns): N - 1 cells mean "
                          "that row 0 is a CLS row")  # fmt: skip
    compress.add_argument("--method", required=True)
    compress.add_argument("--keep", required=True, metavar="K")
    compress.add_argument("--seed", type=int, default=0)
    compress.add_argument("--out", required=True, metavar="PLAN.npz")

    export = _verb(verbs, "export", "build the ONNX tower of an mmproj GGUF or of a Hugging Face checkpoint")
    source = export.add_mutually_exclusive_group(required=True)
    source.add_argument("mmproj", nargs="?", metavar="MMPROJ.gguf")
    source.add_argument("--hf", metavar="DIR", help="instead of a GGUF: the folder of a Hugging Face checkpoint, with "
                        "config.json and *.safetensors")  # fmt: skip
    export.add_argument("--out", required=True, metavar="DIR", help="a new folder, to be used as --mmproj")
    export.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32")

    split = _verb(verbs, "split", "cut a language model into layer segments, for pruning between its layers")
    split.add_argument("lm", metavar="LM.gguf")
    split.add_argument("--at", required=True, metavar="L,L,...", help="layers that begin a segment, as in 8,16,24")
    split.add_argument("--out", metavar="DIR", help="a new folder for the segments (default: in the cache)")
    split.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="run the segments against "
                       "the whole model (default)")  # fmt: skip
    split.add_argument("--threads", type=int, metavar="N", help="for that check (default: all cores)")

    pull = _verb(verbs, "pull", "fetch a model from the Hugging Face Hub: its language model and its mmproj")
    pull.add_argument("repository", metavar="REPO", help="OWNER/NAME of a GGUF repository; OWNER/NAME:Q4_K_M for "
                      "one of its quantisations (default: Q4_K_M if it is there), OWNER/NAME:FILE.gguf for "
                      "a file")  # fmt: skip
    pull.add_argument("--out", metavar="DIR", help="a folder for the files (default: in the Hugging Face cache)")
    pull.add_argument("--dry-run", action="store_true", help="list what would be fetched")
    return parser


def _bench_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--shape", default="smolvlm-500m", metavar="S", help="random weights of a published model's "
                       "sizes, written to the cache: llava-1.5-7b, llava-next-7b, smolvlm-256m, smolvlm-500m "
                       "(default), qwen2.5-vl-3b, internvl3-1b, gemma3-4b")  # fmt: skip
    bench.add_argument("--lm", metavar="LM.gguf", help="a real model instead, with --mmproj")
    bench.add_argument("--mmproj", metavar="MMPROJ.gguf")
    bench.add_argument("--method", nargs="+", default=["mosaic"], metavar="M",
                       help="what is compared; the ratios are the first's (default mosaic)")  # fmt: skip
    bench.add_argument("--keep", type=int, default=64, metavar="K", help="image tokens kept (default 64)")
    bench.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="int8", help="of our tower (default "
                       "int8)")  # fmt: skip
    bench.add_argument("--size", default="1024x768", metavar="WxH", help="of the pictures (default 1024x768)")
    bench.add_argument("--tokens", type=int, default=48, metavar="N", help="length of every caption (default 48)")
    bench.add_argument("--prompt", default="Describe the image in detail.")
    bench.add_argument("--rounds", type=int, default=10, metavar="N", help="captions of each contender (default 10)")
    bench.add_argument("--batches", type=int, default=3, metavar="N", help="batches of each arm (default 3)")
    bench.add_argument("--images", type=int, default=32, metavar="N", help="pictures of a batch (default 32)")
    bench.add_argument("--parallel", type=int, default=16, metavar="N", help="captions generated at once in a batch "
                       "(default 16)")  # fmt: skip
    bench.add_argument("--threads", type=int, metavar="N", help="of every contender (default: all cores)")
    bench.add_argument("--ctx", type=int, default=4096, metavar="N", help="rows of context (default 4096)")
    bench.add_argument("--without", nargs="+", default=[], choices=("none", "pool", "baseline"), help="contenders that "
                       "are left out")  # fmt: skip
    bench.add_argument("--out", metavar="FILE.json", help="also write the document there, anew after every "
                       "round")  # fmt: skip


def _verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    parser.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")
    parser.set_defaults(run=name)
    return parser


def _threads(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto")
    return int(text)


def _model_options(parser: argparse.ArgumentParser, *, compression: bool = True, steps: bool = True) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--lm", metavar="LM.gguf", help="language model, or a folder of its segments (see `split`); "
                       "the bundled demo model without it")  # fmt: skip
    group.add_argument("--mmproj", metavar="MMPROJ.gguf", help="vision tower and projector, or a folder of them "
                       "(see `export`)")  # fmt: skip
    group.add_argument("--engine", choices=("auto", "onnx", "mtmd"), default="auto", help="what looks at pictures: our "
                       "own tower (onnx), llama.cpp's (mtmd); ours where the model has one (default)")  # fmt: skip
    group.add_argument("--precision", choices=("fp32", "fp16", "int8"), help="of our tower: int8 for CPUs, fp16 for "
                       "GPUs (default fp32)")  # fmt: skip
    group.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="where the tower runs")
    group.add_argument(
        "--gpu-layers", type=int, default=0, metavar="N", help="language model layers on the GPU, -1 all"
    )
    group.add_argument("--threads", type=_threads, metavar="N", help="one budget for everything (default: auto, all "
                       "cores; with many pictures it is measured how tower and language model share them)")  # fmt: skip
    group.add_argument("--ctx", type=int, metavar="N", help="rows of context (default: the model's, up to 4096)")
    group.add_argument("--image-cache", metavar="SIZE", help="keep what the tower says of pictures on disk, up to SIZE "
                       "(500MB, 4GB), so that asking about them again costs no encoding")  # fmt: skip
    group.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger pictures (default 100 000 000)")
    if not compression:
        parser.set_defaults(keep=None, method=None, dynamic=None, layer_steps=None, seed=0)
        return
    group = parser.add_argument_group("compression")
    group.add_argument("--keep", metavar="K", help="image tokens kept: 64, 0.25 or 25%% (default: all; with "
                       "--method a quarter)")  # fmt: skip
    group.add_argument("--method", metavar="M", help="how they are chosen (default mosaic), see `methods`")
    if steps:
        group.add_argument("--layer-steps", metavar="S", help="drop image tokens inside the language model too, as in "
                           "spectrum@8:0.5,16:0.25,24:0 or fastv@2:0.5, several joined by +; layers by number or as a "
                           "fraction of the depth; see `methods`")  # fmt: skip
    else:
        parser.set_defaults(layer_steps=None)
    group.add_argument("--dynamic", choices=("batch", "running", "calibrated"), help="more tokens for pictures with "
                       "more to see, half to twice --keep, which is the mean: over all pictures of the run, exactly "
                       "(batch: each is scored first, so the tower runs twice); over those so far (running); over "
                       "those of `calibrate` (calibrated)")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="S")
