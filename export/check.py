"""How far an exported tower is from its source: both run on the same seeded picture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.families.base import TowerSpec
from edge_tokcomp.tower import Tower

from .mmproj import Mmproj
from .reference import reference_projector, reference_tower

Floats = NDArray[np.float32]

EXACT = 1e-4
"""Largest relative error of a float32 export."""
CLOSE = 0.999
"""Smallest mean cosine of a quantised export's rows."""


@dataclass(frozen=True)
class Check:
    """Errors against the NumPy reference.

    ``features``, ``cls_attention``, ``embeddings``: relative errors, ``|export - source| / |source|`` (0 where there is
    no CLS). ``cosine``, ``worst_cosine``: mean and least over the rows of the features.
    """

    features: float
    cls_attention: float
    embeddings: float
    cosine: float
    worst_cosine: float

    @property
    def exact(self) -> bool:
        """Within rounding of the source."""
        return all(error <= EXACT for error in (self.features, self.cls_attention, self.embeddings))

    @property
    def close(self) -> bool:
        """Good enough for a quantised tower."""
        return self.cosine >= CLOSE and self.embeddings <= EXACT

    def to_dict(self) -> dict[str, float]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"relative error of features {self.features:.1e}, CLS attention {self.cls_attention:.1e}, "
            f"projector {self.embeddings:.1e}; cosine {self.cosine:.5f}, worst row {self.worst_cosine:.5f}"
        )


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture, and what the source makes of it."""

    pixels: Floats
    features: Floats
    cls_attention: Floats | None
    embeddings: Floats

    @classmethod
    def of(cls, spec: TowerSpec, mmproj: Mmproj) -> Reference:
        """Run the NumPy tower and projector of ``mmproj`` on one picture."""
        pixels = seeded_picture(spec)
        features, cls_attention = reference_tower(spec, mmproj, pixels)
        return cls(pixels, features, cls_attention, reference_projector(spec, mmproj, features[0]))


def check_tower(directory: Path, reference: Reference) -> Check:
    """Run the tower in ``directory`` on the reference's picture, and its projector on the reference's features."""
    tower = Tower(directory, provider="cpu", threads=1)
    output = tower.encode(reference.pixels)
    attention = 0.0
    if output.cls_attention is not None and reference.cls_attention is not None:
        attention = _relative(output.cls_attention, reference.cls_attention)
    cosines = _cosines(output.features[0], reference.features[0])
    return Check(
        features=_relative(output.features, reference.features),
        cls_attention=attention,
        embeddings=_relative(tower.project(reference.features[0]), reference.embeddings),
        cosine=float(cosines.mean()),
        worst_cosine=float(cosines.min()),
    )


def seeded_picture(spec: TowerSpec) -> Floats:
    """``(1, 3, H, W) float32``: coloured blocks of every size, so that patches differ and neighbours resemble."""
    random = np.random.default_rng(0)
    size = spec.image_size
    picture = np.zeros((3, size, size), dtype=np.float32)
    block = size
    while block >= 1:
        cells = -(-size // block)
        picture += np.kron(
            random.standard_normal((3, cells, cells), dtype=np.float32), np.ones((1, block, block), np.float32)
        )[:, :size, :size]
        block //= 2
    return np.asarray(picture / picture.std(), dtype=np.float32)[None]


def _relative(found: Floats, wanted: Floats) -> float:
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), np.finfo(np.float32).tiny))


def _cosines(found: Floats, wanted: Floats) -> Floats:
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
    return np.asarray((found * wanted).sum(-1) / np.maximum(lengths, np.finfo(np.float32).tiny))
