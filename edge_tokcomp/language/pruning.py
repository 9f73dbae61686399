"""Rows on their way through layer segments, and what decides which of them go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..layer_state import LayerState
from ..tokens import Ints, Rows
from .batches import sections, wanted
from .segment import Logits

Floats = NDArray[np.float32]


class Pruning(Protocol):
    """A rule that says which image rows live on at a layer; ``methods.layer_step.LayerStep`` is what is meant."""

    @property
    def attention(self) -> Literal["none", "previous", "next"]:
        """The layer whose attention it looks at."""

    @property
    def looks_from_all(self) -> bool:
        """Whether it looks at the attention of all text rows after the image, or of the last alone."""

    @property
    def looks_at_keys(self) -> bool:
        """Whether it looks at the keys of the layer before."""

    def layers(self, depth: int) -> dict[int, float]:
        """Layer to amount."""

    def survivors(self, state: LayerState, amount: float) -> Ints:
        """The image rows that live on."""


Schedule = dict[int, list[tuple[Pruning, float]]]
"""Of a layer the steps that act before it, in their order, with their amounts."""

_UNNAMED_QUERIES = ("lfm2",)
"""Architectures whose graphs give queries and keys no names by which they could be found."""


def schedule(steps: Sequence[Pruning], cuts: Sequence[int], depth: int, architecture: str) -> Schedule:
    """Where ``steps`` act in a model of ``depth`` layers that is cut before the layers ``cuts``.

    Raises ``UsageError`` for a layer that is no cut, and for steps whose inputs the architecture does not give.
    """
    at: Schedule = {}
    for step in steps:
        if architecture in _UNNAMED_QUERIES and (step.attention != "none" or step.looks_at_keys):
            raise UsageError(f"{step}: looks at queries or keys, which {architecture} models do not show; use spectrum")
        for layer, amount in step.layers(depth).items():
            if layer and layer not in cuts:
                where = f"cut at {', '.join(map(str, cuts))}" if cuts else "not cut"
                raise UsageError(
                    f"{step}: acts at layer {layer}, but the model is {where}; cut it at {layer} too "
                    "(edge-tokcomp split), or load the uncut file with these steps"
                )
            at.setdefault(layer, []).append((step, amount))
    return at


def looked_at(at: Schedule) -> set[int]:
    """Layers whose keys a step looks at."""
    layers: set[int] = set()
    for layer, entries in at.items():
        for step, _ in entries:
            if step.attention == "next":
                layers.add(layer)
            elif step.attention == "previous" or step.looks_at_keys:
                layers.add(layer - 1)
    return layers


@dataclass(eq=False)
class Flow:
    """The rows of one sequence on their way through the segments.

    ``number (n,)``: which of the rows that came in are left; ``place (n,)``: of the ``Rows`` that each came in, in the
    batch. ``entered``: image rows that came in; ``asked``: text rows after the last of them. ``attention``, ``keys``:
    of the layer before, over the rows held and these. ``kept``: what was left before each segment so far.
    """

    sequence: int
    hidden: Floats
    positions: NDArray[np.int32]
    crop: Ints
    want: NDArray[np.bool_]
    number: Ints
    place: Ints
    entered: int
    asked: int
    attention: Floats | None = None
    keys: Floats | None = None
    kept: list[Ints] = field(default_factory=list)

    @property
    def image(self) -> Ints:
        """Places of the image rows that are left."""
        return np.flatnonzero(self.crop >= 0)

    @property
    def question(self) -> Ints:
        """The text rows after the image, whichever of its rows are left."""
        return np.arange(len(self.crop) - self.asked, len(self.crop))

    @property
    def parts(self) -> list[slice]:
        """Those that came in the same ``Rows``, in order."""
        cuts = [0, *(np.flatnonzero(np.diff(self.place)) + 1).tolist(), len(self.place)]
        return [slice(*ends) for ends in pairwise(cuts)] if len(self.place) else []

    def keep(self, rows: Ints, held: int) -> None:
        """Let only ``rows`` go on, of those behind the ``held`` ones."""
        self.hidden, self.positions, self.crop = self.hidden[rows], self.positions[..., rows], self.crop[rows]
        self.want, self.number, self.place = self.want[rows], self.number[rows], self.place[rows]
        whole = np.concatenate([np.arange(held), held + rows])
        self.attention = None if self.attention is None else self.attention[:, whole]
        self.keys = None if self.keys is None else self.keys[whole]


def flows_of(batch: Sequence[Rows], *, multi_position: bool) -> list[Flow]:
    """The rows of each sequence, one after another."""
    flows = []
    for sequence in dict.fromkeys(rows.sequence for rows in batch):
        places = [place for place, rows in enumerate(batch) if rows.sequence == sequence]
        mine = [batch[place] for place in places]
        positions = [sections(rows) if multi_position else rows.positions for rows in mine]
        crop = np.concatenate([np.full(len(r), -1, np.int64) if r.crop is None else r.crop for r in mine])
        image = np.flatnonzero(crop >= 0)
        flows.append(Flow(
            sequence, np.concatenate([rows.embeddings for rows in mine]), np.concatenate(positions, axis=-1), crop,
            np.concatenate([wanted(rows) for rows in mine]), np.arange(len(crop)),
            np.repeat(places, [len(rows) for rows in mine]), len(image), len(crop) - 1 - int(image.max(initial=-1)),
        ))  # fmt: skip
    return flows


def in_place(flows: Sequence[Flow], answers: Sequence[Logits], count: int, n_vocab: int) -> list[Logits]:
    """The ``answers`` to what the flows hold, one after another, as those of the ``count`` ``Rows`` that came in, each
    in its place; none of those that were all dropped."""
    found = [np.zeros((0, n_vocab), np.float32)] * count
    rest, coming = found[0], iter(answers)
    for flow in flows:
        for part in flow.parts:
            asked = int(np.count_nonzero(flow.want[part]))
            while len(rest) < asked:
                rest = next(coming)
            found[int(flow.place[part.start])], rest = rest[:asked], rest[asked:]
    return found
