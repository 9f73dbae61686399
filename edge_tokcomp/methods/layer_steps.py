"""The layer steps: FastV, PyramidDrop, DART, ToDRE's stage II and LUVC's spectrum pruning; reading them from text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..layer_state import LayerState
from ..tokens import Ints
from .dart import take_turns
from .kernels import settle, top_k, unit_rows
from .layer_step import LayerStep, highest, rows_of
from .options import describe_options, match_options, read_value, suggest


@dataclass(frozen=True)
class FastV(LayerStep):
    """The rows that the last token looks at most; the amount is the share of the rows that entered.

    The released code; the paper speaks of the attention a row receives on average.
    """

    at: tuple[tuple[int | float, float], ...] = ((2, 0.5),)

    name: ClassVar[str] = "fastv"
    title: ClassVar[str] = "FastV"
    source: ClassVar[str] = "ECCV 2024, released code"
    amount: ClassVar[str] = "share of the image rows kept"
    attention: ClassVar[Literal["none", "previous", "next"]] = "previous"

    def choose(self, state: LayerState, amount: float) -> Ints:
        """By the last text row's attention."""
        return highest(_last_row(state), rows_of(amount, state.entered))


@dataclass(frozen=True)
class PyramidDrop(LayerStep):
    """At each of its layers the share ``amount`` of the rows left: those the question's last token looks at most."""

    at: tuple[tuple[int | float, float], ...] = ((0.25, 0.5), (0.5, 0.5), (0.75, 0.5))

    name: ClassVar[str] = "pyramid"
    title: ClassVar[str] = "PyramidDrop"
    source: ClassVar[str] = "CVPR 2025, released code"
    amount: ClassVar[str] = "share of the rows left that is kept"
    attention: ClassVar[Literal["none", "previous", "next"]] = "next"

    def choose(self, state: LayerState, amount: float) -> Ints:
        """By the last text row's attention in the layer that follows."""
        return highest(_last_row(state), rows_of(amount, len(state)))


@dataclass(frozen=True)
class DuplicatesDrop(LayerStep):
    """DART: the image rows least like a few pivots; the amount is the share of the rows that entered.

    Pivots are the ``image_pivots`` image rows and the ``text_pivots`` text rows with the largest L1 norm of keys. The
    image's own are kept, and each pivot in turn takes an equal share of the rows least like it (cosine of hidden states
    after the model's final norm) that are still free. The ports round each share down and add the pivots, which gives
    up to 4 rows more or fewer than the amount says; here the sum is exact.
    """

    at: tuple[tuple[int | float, float], ...] = ((2, 0.222),)
    image_pivots: int = 4
    text_pivots: int = 4

    name: ClassVar[str] = "dart"
    title: ClassVar[str] = "DART"
    source: ClassVar[str] = "EMNLP 2025, from ports of its code"
    amount: ClassVar[str] = "share of the image rows kept"
    looks_at_keys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_pivots < 1 or self.text_pivots < 0:
            raise UsageError("dart: image_pivots must be 1 or more and text_pivots 0 or more")

    def choose(self, state: LayerState, amount: float) -> Ints:
        """Pivots, then what they take in turn."""
        if state.keys is None or state.words is None or state.final_norm is None:
            raise ValueError("the step needs keys, words and final_norm")
        budget = min(rows_of(amount, state.entered), len(state))
        pivots = top_k(state.keys[state.image], min(self.image_pivots, budget))
        words = top_k(state.keys[state.text], min(self.text_pivots, len(state.text)))
        rows = unit_rows(state.hidden * state.final_norm)
        chosen_by = np.concatenate([rows[pivots], unit_rows(state.words * state.final_norm)[words]])
        return np.sort(take_turns(settle(rows @ chosen_by.T), pivots, budget))


@dataclass(frozen=True)
class InformationMigration(LayerStep):
    """ToDRE stage II: once the text's share of attention to the image falls below the amount, all image rows go.

    The share is the attention of the text rows to the image over their attention to everything. The paper's second
    condition, the image's attention to the text, holds always where the image stands before the text and sees no row
    behind its own.
    """

    at: tuple[tuple[int | float, float], ...] = ((0.875, 0.1),)

    name: ClassVar[str] = "todre"
    title: ClassVar[str] = "ToDRE stage II"
    source: ClassVar[str] = "arXiv 2505.18757 v2, section on stage II"
    amount: ClassVar[str] = "share of the text's attention below which the image goes"
    looks_from_all: ClassVar[bool] = True
    attention: ClassVar[Literal["none", "previous", "next"]] = "next"

    def choose(self, state: LayerState, amount: float) -> Ints:
        """All or nothing."""
        return np.arange(0 if image_share(state) < amount else len(state), dtype=np.int64)


def image_share(state: LayerState) -> float:
    """Attention of the text rows to the image rows, as a share of all they give."""
    given = _attention(state)
    whole = float(given.sum())
    return float(given[:, state.image].sum()) / whole if whole > 0 else 0.0


@dataclass(frozen=True)
class Spectrum(LayerStep):
    """LUVC's spectrum pruning: the rows with most energy left after a low-pass filter along the image; no attention.

    The amount is the share of the rows that entered; 0 drops the image. From the paper (abstract): a low-pass filter,
    neither attention nor similarity, a cascade over layers that ends with no image rows. Ours, since the full text was
    not to be had: the filter acts along the rows of a crop and keeps the share ``cutoff`` of the frequencies (at least
    two: the constant alone makes all rows equal), on rows

    * ``mirrored`` at the ends: a periodic filter spills the first row's energy into the last;
    * ``scaled`` to the same length: a few rows of huge norm would hold all the energy;
    * ``centred``, their mean taken away: what all rows share is most of the energy, and those that hold most of it
      are those that show nothing of their own, the background.

    Chosen on tuning scenes of the demo tasks (docs/layer-tuning).
    """

    at: tuple[tuple[int | float, float], ...] = ((0.25, 0.5), (0.5, 0.25), (0.75, 0.1), (0.97, 0.0))
    cutoff: float = 0.25
    mirrored: bool = True
    scaled: bool = True
    centred: bool = True

    name: ClassVar[str] = "spectrum"
    title: ClassVar[str] = "LUVC-style spectrum pruning"
    source: ClassVar[str] = "arXiv 2512.09010, abstract; the filter is a reconstruction"
    amount: ClassVar[str] = "share of the image rows kept, 0 for none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.cutoff <= 1:
            raise UsageError(f"spectrum: cutoff must be above 0 and at most 1, got {self.cutoff}")

    def choose(self, state: LayerState, amount: float) -> Ints:
        """By energy after the filter, over all crops."""
        energy = np.empty(len(state))
        for crop in np.unique(state.crop):
            mine = state.crop == crop
            energy[mine] = self.energy(state.hidden[mine])
        return highest(energy, rows_of(amount, state.entered))

    def energy(self, hidden: NDArray[np.float32]) -> NDArray[np.float64]:
        """``(n,)``: energy of each row of one crop after the filter."""
        waves = low_waves(len(hidden), self.cutoff, self.mirrored)
        # The first wave is the constant: without it the rows are centred.
        waves = waves[1:] if self.centred else waves
        weights = waves
        if self.scaled:
            size = np.sqrt(np.einsum("ij,ij->i", hidden, hidden) / hidden.shape[1])
            weights = waves / np.where(size > 0, size, np.float32(1))
        # The filtered rows are waves.T @ heights; of them only the squares are wanted.
        heights = weights @ hidden
        products = (heights @ heights.T).astype(np.float64)
        energy = np.einsum("ki,ki->i", products @ waves, waves) / hidden.shape[1]
        # Equal energies must stay equal whatever the products were summed up in: ties go to the lower row.
        grid = np.exp2(np.floor(np.log2(energy.max())) - _EXACT_BITS) if energy.max() > 0 else 1.0
        return np.asarray(np.round(energy / grid) * grid)


_EXACT_BITS = 18
"""Of the largest energy; float32 sums leave about so many."""


@lru_cache(maxsize=8)
def low_waves(count: int, cutoff: float, mirrored: bool) -> NDArray[np.float32]:
    """``(k, count)``: orthonormal waves of the lowest share ``cutoff`` of the frequencies, at least two, along a line.

    Of a line that is mirrored at its ends (cosines, DCT-II), or of one that is joined to a ring (Fourier).
    """
    place = np.arange(count)
    if mirrored:
        bins = min(max(2, int(cutoff * (count + 1))), count)
        waves = np.cos(np.pi / count * (place + 0.5) * np.arange(bins)[:, None])
    else:
        bins = min(max(2, int(cutoff * (count // 2 + 1))), count // 2 + 1)
        turns = 2 * np.pi / count * place * np.arange(bins)[:, None]
        waves = np.concatenate([np.cos(turns), np.sin(turns[1:])])
        waves = waves[np.abs(waves).max(axis=1) > 0.5]  # the sine of the highest frequency of an even line is nothing
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    return np.asarray(waves, np.float32)


LAYER_STEPS: dict[str, type[LayerStep]] = {
    step.name: step for step in (Spectrum, InformationMigration, FastV, PyramidDrop, DuplicatesDrop)
}


def read_layer_steps(steps: str | Sequence[str | LayerStep]) -> tuple[LayerStep, ...]:
    """Steps as a text joins them by ``+``, or those of a list; none in an empty one.

    Raises ``UsageError`` as ``read_layer_step``.
    """
    listed = (steps.split("+") if steps.strip() else []) if isinstance(steps, str) else steps
    return tuple(read_layer_step(step) if isinstance(step, str) else step for step in listed)


def read_layer_step(text: str) -> LayerStep:
    """The step written as ``NAME@LAYER:AMOUNT,LAYER:AMOUNT,OPTION=VALUE``.

    Layers before one amount share it: ``pyramid@8,16,24:0.5``. A name alone takes the step's own layers.
    Raises ``UsageError`` for what cannot be read, with what can.
    """
    name, sign, rest = (part.strip() for part in text.partition("@"))
    if name not in LAYER_STEPS:
        raise UsageError(
            f"unknown layer step {name!r}{suggest(name, LAYER_STEPS)}; layer steps: {', '.join(LAYER_STEPS)}"
        )
    cls = LAYER_STEPS[name]
    at: list[tuple[int | float, float]] = []
    waiting: list[int | float] = []
    options: dict[str, Any] = {}
    for part in (piece.strip() for piece in rest.split(",")) if sign else ():
        key, equals, value = part.partition("=")
        if equals:
            if key.strip().rstrip("_") == "at":
                raise UsageError(f"layer step {text!r}: at is written as {name}@LAYER:AMOUNT")
            options[key.strip()] = read_value(value.strip())
            continue
        layer, colon, amount = part.partition(":")
        waiting.append(_number(text, layer))
        if colon:
            at += [(each, float(_number(text, amount))) for each in waiting]
            waiting = []
    if waiting:
        raise UsageError(f"layer step {text!r}: layer {waiting[-1]} has no amount; write {name}@LAYER:AMOUNT")
    settings = match_options(cls, cls.name, options)
    return cls(**({"at": tuple(at)} if at else {}) | settings)


def layer_step_table() -> list[dict[str, Any]]:
    """Every step: name, title, source, what its amount means, which attention it looks at, options with defaults."""
    return [
        {
            "name": name,
            "title": cls.title,
            "source": cls.source,
            "amount": cls.amount,
            "attention": cls.attention,
            "options": describe_options(cls),
        }
        for name, cls in LAYER_STEPS.items()
    ]


def _number(text: str, part: str) -> int | float:
    value = read_value(part.strip())
    # The comparison fails for NaN, infinity and whole numbers that no float holds.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise UsageError(f"layer step {text!r}: {part.strip()!r} is not a number; write NAME@LAYER:AMOUNT")
    return value


def _attention(state: LayerState) -> NDArray[np.float64]:
    if state.attention is None:
        raise ValueError("the step needs attention")
    return state.attention.astype(np.float64)


def _last_row(state: LayerState) -> NDArray[np.float64]:
    """``(n,)``: the last text row's attention to the image rows."""
    return np.asarray(_attention(state)[-1][state.image])
