"""Model families: one file each, found by what an mmproj GGUF says of itself."""

from __future__ import annotations

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.families.base import Family, Metadata, Part, Pixels, projector_type
from edge_tokcomp.families.llava15 import Llava15
from edge_tokcomp.families.qwenvl import Qwen2VL, Qwen3VL, Qwen25VL
from edge_tokcomp.families.tower_spec import TowerSpec

__all__ = ["FAMILIES", "Family", "Part", "Pixels", "TowerSpec", "family_for", "family_named"]

FAMILIES: tuple[Family, ...] = (Llava15(), Qwen2VL(), Qwen25VL(), Qwen3VL())


def family_for(metadata: Metadata) -> Family:
    """The family an mmproj belongs to; raises ``TokcompError`` naming its projector type when there is none."""
    for family in FAMILIES:
        if family.matches(metadata):
            return family
    kind = projector_type(metadata) or "of no stated type"
    tiled = (
        " with image_grid_pinpoints (several crops, as LLaVA-1.6)"
        if "clip.vision.image_grid_pinpoints" in metadata
        else ""
    )
    raise TokcompError(f"projector {kind}{tiled} is not supported; supported families: {_names()}")


def family_named(name: str) -> Family:
    """The family of that name; raises ``TokcompError`` listing the names when there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise TokcompError(f"unknown model family {name!r}; known: {_names()}")


def _names() -> str:
    return ", ".join(family.name for family in FAMILIES)
