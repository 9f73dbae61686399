"""How far an exported tower is from its source: both run on the same seeded picture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.families.tower_spec import TowerSpec
from edge_tokcomp.tower import Tower, TowerOutput
from edge_tokcomp.variant import PLAIN, TowerVariant

from .mmproj import Mmproj
from .reference import reference_projector, reference_tower
from .vit import picture_size

Floats = NDArray[np.float32]

EXACT = 1e-4
"""Largest relative error of a float32 export."""
CLOSE = 0.999
"""Smallest mean cosine of a quantised export's rows."""


@dataclass(frozen=True)
class Check:
    """Errors against the NumPy reference.

    ``features`` (deepstack features among them), ``cls_attention``, ``keys``, ``embeddings``: relative errors,
    ``|export - source| / |source|`` (0 where there is no CLS). ``cosine``, ``worst_cosine``: mean and least over the
    rows of the features. ``misplaced``: fraction of the patches that a merge put elsewhere than the source does.
    """

    features: float
    cls_attention: float
    keys: float
    embeddings: float
    cosine: float
    worst_cosine: float
    misplaced: float

    @property
    def exact(self) -> bool:
        """Within rounding of the source."""
        errors = (self.features, self.cls_attention, self.keys, self.embeddings)
        return all(error <= EXACT for error in errors) and not self.misplaced

    @property
    def close(self) -> bool:
        """Good enough for a quantised tower."""
        return self.cosine >= CLOSE and self.embeddings <= EXACT and not self.misplaced

    def to_dict(self) -> dict[str, float]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"relative error of features {self.features:.1e}, CLS attention {self.cls_attention:.1e}, "
            f"keys {self.keys:.1e}, projector {self.embeddings:.1e}; cosine {self.cosine:.5f}, worst row "
            f"{self.worst_cosine:.5f}; patches merged elsewhere {self.misplaced:.1%}"
        )


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture, and what the source makes of it: ``output`` of the tower, ``embeddings`` of the projector."""

    pixels: Floats
    output: TowerOutput
    embeddings: Floats

    @classmethod
    def of(cls, spec: TowerSpec, mmproj: Mmproj) -> Reference:
        """Run the NumPy tower and projector of ``mmproj`` on one picture."""
        pixels = seeded_picture(*picture_size(spec, PLAIN))
        return cls._of(spec, mmproj, pixels, reference_tower(spec, mmproj, pixels))

    @classmethod
    def of_variant(
        cls, spec: TowerSpec, mmproj: Mmproj, variant: TowerVariant, directory: Path, slack: float
    ) -> Reference:
        """The same of a tower that merges, given what that in ``directory`` merges: see ``ReferenceMerger``."""
        pixels = seeded_picture(*picture_size(spec, variant))
        found = Tower(directory, provider="cpu", threads=1).encode(pixels).owners
        return cls._of(spec, mmproj, pixels, reference_tower(spec, mmproj, pixels, variant, found, slack))

    @classmethod
    def _of(cls, spec: TowerSpec, mmproj: Mmproj, pixels: Floats, output: TowerOutput) -> Reference:
        return cls(pixels, output, reference_projector(spec, mmproj, output.rows(0)))


def check_tower(directory: Path, reference: Reference) -> Check:
    """Run the tower in ``directory`` on the reference's picture, and its projector on the reference's features."""
    tower = Tower(directory, provider="cpu", threads=1)
    output, wanted = tower.encode(reference.pixels, want={"keys"}), reference.output
    cosines = _cosines(output.features[0], wanted.features[0])
    merges = zip(output.owners, wanted.owners, strict=True)
    return Check(
        features=max(_relative(output.features, wanted.features), _relative(output.deepstack, wanted.deepstack)),
        cls_attention=_relative(output.cls_attention, wanted.cls_attention),
        keys=_relative(output.keys, wanted.keys),
        embeddings=_relative(tower.project(wanted.rows(0)), reference.embeddings),
        cosine=float(cosines.mean()),
        worst_cosine=float(cosines.min()),
        misplaced=max((float(np.mean(found != owner)) for found, owner in merges), default=0.0),
    )


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


def _relative(found: Floats | None, wanted: Floats | None) -> float:
    if found is None or wanted is None:
        return 0.0
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), np.finfo(np.float32).tiny))


def _cosines(found: Floats, wanted: Floats) -> Floats:
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
    return np.asarray((found * wanted).sum(-1) / np.maximum(lengths, np.finfo(np.float32).tiny))
