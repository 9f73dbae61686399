"""Model families: one file each, found by what an mmproj GGUF says of itself."""

from __future__ import annotations

from edge_tokcomp.errors import TokcompError, UnsupportedError
from edge_tokcomp.families.base import Family, Metadata, Part, Pixels, projector_type
from edge_tokcomp.families.gemma3 import Gemma3
from edge_tokcomp.families.idefics3 import Idefics3
from edge_tokcomp.families.internvl import InternVL
from edge_tokcomp.families.lfm2vl import Lfm2VL
from edge_tokcomp.families.llava15 import Llava15
from edge_tokcomp.families.llava_next import LlavaNext
from edge_tokcomp.families.pixtral import Pixtral
from edge_tokcomp.families.qwenvl import Qwen2VL, Qwen3VL, Qwen25VL
from edge_tokcomp.families.tower_spec import TowerSpec

__all__ = ["CHECKED", "FAMILIES", "Family", "Part", "Pixels", "TowerSpec", "family_for", "family_named"]

FAMILIES: tuple[Family, ...] = (
    Gemma3(), Idefics3(), InternVL(), Lfm2VL(), Llava15(), LlavaNext(), Pixtral(), Qwen2VL(), Qwen25VL(), Qwen3VL(),
)  # fmt: skip


CHECKED = (
    "tiny random models of transformers' own classes, as GGUF files: pixels, tower and projector, whole prompts, "
    "greedy text, and the same with half of the rows dropped; no published checkpoint was run, "
    "prompts and counts at the published sizes were"
)
"""How far every family was checked: by ``tests/test_family_*.py``."""


def family_for(metadata: Metadata) -> Family:
    """The family an mmproj belongs to; raises ``UnsupportedError`` naming its projector type when there is none."""
    for family in FAMILIES:
        if family.matches(metadata):
            return family
    kind = " ".join(projector_type(metadata).split())[:80] or "of no stated type"
    raise UnsupportedError(f"projector {kind} is not supported; supported families: {_names()}")


def family_named(name: str) -> Family:
    """The family of that name; raises ``TokcompError`` listing the names when there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise TokcompError(f"unknown model family {name!r}; known: {_names()}")


def _names() -> str:
    return ", ".join(family.name for family in FAMILIES)
