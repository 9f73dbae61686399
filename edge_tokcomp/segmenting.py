"""The language model as the pipeline runs it: whole, or in layer segments with image rows dropped between them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from .errors import TokcompError, UsageError
from .language.decoder import PlainDecoder
from .language.gguf_header import GgufHeader, layer_count, read_header, split_files
from .language.model import LanguageModel, check_language_model
from .language.pruning import schedule
from .language.segment_files import PREFIX, SegmentFiles
from .language.segmented import SegmentedDecoder
from .methods.layer_step import LayerStep

logger = logging.getLogger(__name__)


def open_language(
    stack: ExitStack, lm: Path, steps: Sequence[LayerStep], *, gpu_layers: int, threads: int, n_ctx: int | None,
    n_sequences: int,
) -> tuple[LanguageModel, PlainDecoder | SegmentedDecoder]:  # fmt: skip
    """Open ``lm``, a GGUF file or a directory of its segments; ``stack`` closes what is opened.

    With ``steps`` a file is cut at their layers, in the cache, and run in segments; what model has the vocabulary comes
    first. Raises ``TokcompError`` for files that cannot be run so, ``UsageError`` for options and for layers that the
    model does not have.
    """
    files = SegmentFiles.read(lm) if lm.is_dir() else None
    if files is None:
        header = check_language_model(lm)
        if header.text(PREFIX + "source"):
            index, count = (header.integer(PREFIX + key, 0) for key in ("index", "count"))
            raise TokcompError(f"{lm}: is segment {index} of {count} of a model; name its folder, {lm.parent}")
        if cuts := _cuts(header, steps):
            from .export.split import cached_segments

            files = SegmentFiles.read(cached_segments(lm, cuts, threads=threads))
    if files is not None:
        decoder = SegmentedDecoder.open(
            files, steps, gpu_layers=gpu_layers, threads=threads, n_ctx=n_ctx, n_sequences=n_sequences
        )
        stack.enter_context(decoder)
        return decoder.model, decoder
    model = stack.enter_context(LanguageModel.open(lm, gpu_layers=gpu_layers, threads=threads))
    if steps:  # before the first layer only: nothing to cut
        whole = SegmentedDecoder([model], (), steps, n_ctx=n_ctx, n_sequences=n_sequences)
        return model, stack.enter_context(whole)
    return model, stack.enter_context(PlainDecoder(model, n_ctx=n_ctx, n_sequences=n_sequences))


def model_files(lm: Path) -> tuple[Path, ...]:
    """The files of a language model: itself, all parts of a split one, or its segments."""
    return SegmentFiles.read(lm).paths if lm.is_dir() else tuple(split_files(read_header(lm)))


def model_name(lm: Path) -> str:
    """The name of a language model's file; of segments, that of the file they were cut from."""
    return SegmentFiles.read(lm).name if lm.is_dir() else lm.name


def _cuts(header: GgufHeader, steps: Sequence[LayerStep]) -> list[int]:
    """Where the model has to be cut for ``steps``."""
    depth = layer_count(header)
    cuts: set[int] = set()
    for step in steps:
        try:
            cuts |= set(step.layers(depth))
        except UsageError as fault:
            raise UsageError(f"{fault} ({header.path.name})") from fault
    found = sorted(cuts - {0})
    schedule(steps, found, depth, header.text("general.architecture"))
    return found
