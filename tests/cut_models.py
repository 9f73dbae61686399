"""Tiny models cut into layer segments, prompts with images for them, and layer steps whose answers a test knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.export.split import split_model
from edge_tokcomp.language.decoder import Decoder
from edge_tokcomp.language.segment_files import SegmentFiles
from edge_tokcomp.language.segmented import SegmentedDecoder
from edge_tokcomp.layer_state import LayerState
from edge_tokcomp.methods.layer_step import LayerStep
from edge_tokcomp.tokens import Rows
from tiny_models import TinyModel, write_tiny_model

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

CUTS = {
    "llama": [2, 3, 5], "qwen2": [2, 5], "qwen2vl": [1, 4], "qwen3": [3], "qwen3vl": [4, 5], "gemma3": [2, 5],
    "lfm2": [2, 4],
}  # fmt: skip
"""Architectures, and where they are cut."""


@dataclass(frozen=True)
class CutModel:
    """A model and its segments."""

    tiny: TinyModel
    files: SegmentFiles

    def segmented(self, steps: Sequence[Any] = (), **options: Any) -> SegmentedDecoder:
        """A decoder on one thread, whose cache rounds nothing unless told to."""
        return SegmentedDecoder.open(self.files, steps, threads=1, **({"n_ctx": 256, "kv_type": "f32"} | options))

    def prompt(self, *parts: int | tuple[int, int], **options: int) -> Prompt:
        """``make_prompt`` for this model."""
        return make_prompt(self.tiny, *parts, **options)


@dataclass(frozen=True)
class Prompt:
    """``parts``: text and images in turn. ``end``: the position at which text follows."""

    parts: tuple[Rows, ...]
    end: int

    def __iter__(self) -> Any:
        return iter(self.parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def at(self, sequence: int) -> list[Rows]:
        """The same in another sequence."""
        return [Rows(p.embeddings, p.positions, sequence, p.want_logits, p.crop) for p in self.parts]

    def words(self, count: int, *, seed: int = 99, sequence: int | None = None) -> list[Rows]:
        """Single text rows that follow, as generation feeds them."""
        width = self.parts[0].embeddings.shape[1]
        values = np.random.default_rng(seed).standard_normal((count, 1, width)).astype(np.float32)
        sequence = self.parts[0].sequence if sequence is None else sequence
        return [Rows(value, np.array([self.end + i], np.int32), sequence) for i, value in enumerate(values)]


def make_prompt(tiny: TinyModel, *parts: int | tuple[int, int], seed: int = 0, sequence: int = 0) -> Prompt:
    """``parts``: how many rows of text, or the grid of an image of which every fourth row is missing.

    Each part is ``Rows`` of its own, images are numbered as they come; logits are wanted of all text.
    """
    many, slices = tiny.architecture.endswith("vl"), 4 if tiny.architecture == "qwen3vl" else 1
    rng = np.random.default_rng(seed)
    rows: list[Rows] = []
    place = images = 0
    for part in parts:
        grid = part if isinstance(part, tuple) else None
        cells = np.arange(part) if grid is None else np.flatnonzero(np.arange(grid[0] * grid[1]) % 4 != 1)
        values = rng.standard_normal((len(cells), slices * tiny.n_embd)).astype(np.float32)
        positions, end = place + np.arange(len(cells)), place + len(cells)
        if grid is None:
            values[:, tiny.n_embd :] = 0
        elif many:
            row, column = np.divmod(cells, grid[1])
            positions = np.stack([np.full(len(cells), place), place + row, place + column, 0 * cells])
            end = place + max(grid)
        crop = np.full(len(cells), -1 if grid is None else images)
        images += grid is not None
        rows.append(Rows(values, positions.astype(np.int32), sequence, np.full(len(cells), grid is None), crop))
        place = end
    return Prompt(tuple(rows), place)


@dataclass(frozen=True)
class Keep:
    """At each of the layers ``at``, keep the image rows that ``rule(layer, state)`` names."""

    at: Sequence[int]
    rule: Callable[[int, LayerState], Sequence[int] | Ints]
    attention: str = "none"
    looks_from_all: bool = False
    looks_at_keys: bool = False

    def layers(self, depth: int) -> dict[int, float]:
        return {layer: float(layer) for layer in self.at}

    def survivors(self, state: LayerState, amount: float) -> Ints:
        return np.asarray(self.rule(int(amount), state), np.int64)


@dataclass(frozen=True)
class Watched:
    """A step in a model of ``depth`` layers; ``seen``: each layer it acted at, what it was shown, what it kept.

    It is shown the attention of all text rows after the image, unless told otherwise.
    """

    step: LayerStep
    depth: int = 6
    looks_from_all: bool = True
    seen: list[tuple[int, LayerState, Ints]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def layers(self, depth: int) -> dict[int, float]:
        # The amount tells the layer; the step gets its own back.
        return {layer: float(layer) for layer in self.step.layers(depth)}

    def survivors(self, state: LayerState, amount: float) -> Ints:
        stay = self.step.survivors(state, self.step.layers(self.depth)[int(amount)])
        self.seen.append((int(amount), state, stay))
        return stay


def cut_model(folder: Path, architecture: str, at: Sequence[int], **options: Any) -> CutModel:
    """Write a model of six layers and cut it."""
    tiny = write_tiny_model(folder / "m.gguf", architecture, **{"n_layer": 6, **options})
    return CutModel(tiny, SegmentFiles.read(split_model(tiny.path, at, folder / "segments", verify=False)))


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest relative error of a row."""
    if found.shape != expected.shape:
        raise ValueError(f"{found.shape} is compared with {expected.shape}")
    if not len(expected):
        return 0.0
    return float((np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


def logits(decoder: Decoder, batch: Sequence[Rows], **options: Any) -> Floats:
    """Of all rows of a batch that want them."""
    return np.concatenate(decoder.decode(batch, **options))


def held(decoder: SegmentedDecoder, sequence: int) -> list[int]:
    """Rows of a sequence in each segment."""
    return [segment.rows(sequence) for segment in decoder._segments]


def alone(
    cut: CutModel, steps: Sequence[Any], batches: Sequence[Sequence[Rows]], **options: Any
) -> tuple[list[Floats], list[int]]:
    """Logits of the same batches in a decoder of their own, and the rows it holds then; ``options``: of ``decode``."""
    with cut.segmented(steps) as decoder:
        found = [logits(decoder, [replace(rows, sequence=0) for rows in batch], **options) for batch in batches]
        return found, held(decoder, 0)


def compare_states(step: Watched, noted: list[tuple[int, LayerState, Ints]], most: float = 1e-4) -> None:
    """What a step was shown in the segments and kept, against what was ``noted`` in torch."""
    assert [layer for layer, *_ in step.seen] == [layer for layer, *_ in noted]
    assert noted
    for (_, found, kept), (_, expected, stay) in zip(step.seen, noted, strict=True):
        assert kept.tolist() == stay.tolist()
        assert found.entered == expected.entered
        for name in ("crop", "image", "text"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()
        assert relative(found.hidden, expected.hidden) <= most
        if found.attention is not None and expected.attention is not None:
            assert found.attention.shape == expected.attention.shape
            assert np.abs(found.attention - expected.attention).max() <= most
        assert (found.attention is None) == (step.attention == "none")
        if step.looks_at_keys:
            np.testing.assert_allclose(found.keys, expected.keys, rtol=most)
            assert relative(found.words, expected.words) <= most
            np.testing.assert_array_equal(found.final_norm, expected.final_norm)


def same(found: Any, expected: Any) -> bool:
    """Up to the order of sums."""
    return relative(found, expected) <= 2e-5


def every_other(layer: int, state: LayerState) -> list[int]:
    """Other rows at each layer."""
    return [row for row in range(len(state)) if (row + layer) % 3]
