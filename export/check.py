"""How far an exported tower is from its source: both run on the same seeded picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.families.tower_spec import TowerSpec
from edge_tokcomp.methods.luvc import LUVC
from edge_tokcomp.tokens import Ints
from edge_tokcomp.tower import GraphName, Tower, TowerOutput
from edge_tokcomp.variant import Merge, TowerKind, TowerVariant

from .reference import reference_projector, reference_tower
from .source import Source
from .vit import picture_size

Floats = NDArray[np.float32]

EXACT = 1e-4
"""Largest relative error of a float32 export."""
CLOSE, NEAR, ROUGH = 0.999, 5e-3, 0.2
"""Of other exports: smallest mean cosine of the rows; largest relative error of the projector, which is in 16 bits at
least; and of attention and keys, by which tokens are chosen."""


@dataclass(frozen=True)
class Check:
    """Errors against the NumPy reference.

    ``features`` (deepstack features among them), ``attention`` (of the CLS, or received), ``keys``, ``embeddings``:
    relative errors, ``|export - source| / |source|``. ``cosine``, ``worst_cosine``: mean and least over the rows of
    features and of each level of deepstack features. ``misplaced``: fraction of the patches that a merge put elsewhere
    than the source does.
    """

    features: float
    attention: float
    keys: float
    embeddings: float
    cosine: float
    worst_cosine: float
    misplaced: float

    @property
    def exact(self) -> bool:
        """Within rounding of the source."""
        errors = (self.features, self.attention, self.keys, self.embeddings)
        return all(error <= EXACT for error in errors) and not self.misplaced

    @property
    def close(self) -> bool:
        """Good enough for a tower of 16 or 8 bits."""
        near = self.embeddings <= NEAR and all(error <= ROUGH for error in (self.features, self.attention, self.keys))
        return near and self.cosine >= CLOSE and not self.misplaced

    def to_dict(self) -> dict[str, float]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"relative error of features {self.features:.1e}, attention {self.attention:.1e}, "
            f"keys {self.keys:.1e}, projector {self.embeddings:.1e}; cosine {self.cosine:.5f}, worst row "
            f"{self.worst_cosine:.5f}; patches merged elsewhere {self.misplaced:.1%}"
        )


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture, ``merges``, and what the source makes of both: ``output`` of the tower, ``embeddings`` of the
    projector."""

    pixels: Floats
    merges: tuple[Merge, ...]
    output: TowerOutput
    embeddings: Floats

    @cached_property
    def attention(self) -> Floats | None:
        """What ``_attention`` says of the source, which an export is held against several times."""
        return _attention(self.output)

    @classmethod
    def of(cls, spec: TowerSpec, source: Source) -> Reference:
        """Run the NumPy tower and projector of ``source`` on one picture, and look at the usual block's attention."""
        return cls._of(spec, source, TowerVariant(block=spec.block(None)), (), 0.0)

    @classmethod
    def of_kind(
        cls, spec: TowerSpec, source: Source, kind: TowerKind, directory: Path, slack: float, threads: int
    ) -> Reference:
        """The same of a tower of that ``kind``, given what the one in ``directory`` merges: see ``ReferenceMerger``."""
        variant = trial(spec, kind)
        found: tuple[Ints, ...] = ()
        if kind.merging:
            pixels = seeded_picture(*picture_size(spec))
            found = Tower(directory, provider="cpu", threads=threads).encode(pixels, variant.merges).owners
        return cls._of(spec, source, variant, found, slack)

    @classmethod
    def _of(
        cls, spec: TowerSpec, source: Source, variant: TowerVariant, found: tuple[Ints, ...], slack: float
    ) -> Reference:
        pixels = seeded_picture(*picture_size(spec))
        output = reference_tower(spec, source, pixels, variant, found, slack)
        return cls(pixels, variant.merges, output, reference_projector(spec, source, output.rows(0)))


def check_tower(directory: Path, reference: Reference, threads: int, graphs: Sequence[GraphName] = ("tower",)) -> Check:
    """Run the ``graphs`` in ``directory`` on the reference's picture, and the projector on the reference's features.

    The last of the graphs says what the reference says of attention and keys.
    """
    wanted, errors, cosines = reference.output, [], []
    for graph in graphs:
        tower = Tower(directory, provider="cpu", threads=threads, graph=graph)
        output = tower.encode(reference.pixels, reference.merges)
        errors += [_relative(output.features, wanted.features), _relative(output.deepstack, wanted.deepstack)]
        cosines.append(_cosines(_levels(output), _levels(wanted)))
    merges = zip(output.owners, wanted.owners, strict=True)
    return Check(
        features=float(np.max(errors)),  # which says so where one of them is no number
        attention=_relative(_attention(output), reference.attention),
        keys=_relative(output.keys, wanted.keys),
        embeddings=_relative(tower.project(wanted.rows(0)), reference.embeddings),
        cosine=float(np.mean(cosines)),
        worst_cosine=float(np.min(cosines)),
        misplaced=max((float(np.mean(found != owner)) for found, owner in merges), default=0.0),
    )


def trial(spec: TowerSpec, kind: TowerKind) -> TowerVariant:
    """How a tower of that ``kind`` is run to be checked: where it merges, from the first block on, to a third of the
    tokens. Raises ``UsageError`` for a kind that it cannot be."""
    spec.block(kind.block)
    variant = TowerVariant(block=kind.block)
    if not kind.merging:
        return variant
    height, width = (side // spec.unit for side in picture_size(spec))
    merging = LUVC(first=0.0, sharing=kind.sharing, proportional=kind.proportional)
    blocks = spec.blocks if kind.block is None else kind.block + 1
    wanted = max(height * width // 3, 1)
    return replace(merging.variant(wanted, (height, width), blocks, spec.merge, spec.window_patches), block=kind.block)


def seeded_picture(height: int, width: int) -> Floats:
    """``(1, 3, H, W) float32``: coloured blocks of every size, so that patches differ and neighbours resemble."""
    random = np.random.default_rng(0)
    picture = np.zeros((3, height, width), dtype=np.float32)
    block = max(height, width)
    while block >= 1:
        cells = random.standard_normal((3, -(-height // block), -(-width // block)), dtype=np.float32)
        picture += np.kron(cells, np.ones((1, block, block), np.float32))[:, :height, :width]
        block //= 2
    return np.asarray(picture / picture.std(), dtype=np.float32)[None]


def _levels(output: TowerOutput) -> Floats:
    """Rows of features, then of each level of deepstack features."""
    rows = output.features[0]
    if output.deepstack is None:
        return np.asarray(rows)
    levels = np.split(output.deepstack[0], output.deepstack.shape[2] // rows.shape[1], axis=1)
    return np.concatenate([rows, *levels])


def _attention(output: TowerOutput) -> Floats | None:
    """Of the CLS, or received where there is none."""
    return output.cls_attention if output.patches is None else np.asarray(output.patches.received(0))


def _relative(found: Floats | None, wanted: Floats | None) -> float:
    if found is None and wanted is None:
        return 0.0
    if found is None or wanted is None:
        return float("inf")
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), np.finfo(np.float32).tiny))


def _cosines(found: Floats, wanted: Floats) -> Floats:
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
    return np.asarray((found * wanted).sum(-1) / np.maximum(lengths, np.finfo(np.float32).tiny))
