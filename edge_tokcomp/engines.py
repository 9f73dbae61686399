"""Which engine looks at a model's pictures: our tower on ONNX Runtime, or llama.cpp's own (libmtmd)."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, get_args

from .encoded_cache import EncodedCache
from .errors import UnsupportedError, UsageError
from .language.model import LanguageModel
from .methods import Method
from .mtmd_engine import MtmdEngine
from .tower import Precision, Provider
from .tower_engine import TowerEngine

EngineName = Literal["auto", "onnx", "mtmd"]
Engine = TowerEngine | MtmdEngine

logger = logging.getLogger(__name__)


def check_engine(name: str) -> None:
    """Raise ``UsageError`` for a name that no engine has."""
    if name not in get_args(EngineName):
        raise UsageError(f"unknown engine {name!r}; one of {', '.join(get_args(EngineName))}")


def open_engine(
    stack: ExitStack, name: EngineName, mmproj: Path, model: LanguageModel, *, row_width: int,
    precision: Precision | None, provider: Provider, threads: int, gpu: bool, method: Method, keep: int | float,
    cache: EncodedCache,
) -> Engine:  # fmt: skip
    """The engine of that ``name``; ``auto`` is ours, or llama.cpp's for models that have no tower here.

    ``row_width``: of the rows that the language model takes. ``stack`` closes the engine. Raises ``UsageError`` for an
    unknown name, ``TokcompError`` for files that cannot be used.
    """
    check_engine(name)
    reason = "asked for"
    if name != "mtmd":
        try:
            return TowerEngine(
                mmproj, precision=precision, provider=provider, threads=threads, method=method, keep=keep, cache=cache
            )
        except UnsupportedError as fault:
            if name == "onnx":
                raise
            reason = str(fault).removeprefix(f"{mmproj}: ").partition(";")[0]
            logger.warning("pictures are looked at by llama.cpp's own tower (engine mtmd): %s", reason)
    if precision is not None:
        raise UsageError(f"precision {precision} is of our own towers, and this one is llama.cpp's ({reason})")
    if mmproj.is_dir():
        raise UsageError(
            f"{mmproj}: a folder, and llama.cpp's own tower (engine mtmd) needs the mmproj file; name that"
        )
    if provider == "cuda":
        raise UsageError(
            f"provider {provider} is of our own towers, and this one is llama.cpp's ({reason}); it runs where "
            "--gpu-layers puts the language model"
        )
    if row_width != model.n_embd_inp:
        raise UsageError(
            f"{mmproj}: llama.cpp's own tower (engine mtmd) does not serve a deepstack model in layer segments; use "
            "engine onnx, or no layer steps"
        )
    engine = MtmdEngine(mmproj, model, threads=threads, gpu=gpu, why=reason, cache=cache)
    stack.callback(engine.close)
    return engine
