"""The compression methods by name.

A method of another package registers its class under the entry-point group ``edge_tokcomp.methods``; such methods are
looked for when an unknown name is asked for or the table is listed, never on import.
"""

from __future__ import annotations

import dataclasses
import re
from importlib import metadata
from typing import Any

from ..errors import TokcompError, UsageError
from .base import AttentionMethod, Candidates, Choice, Merges, Method, Picks, Scores
from .cdpruner import CDPruner
from .dart import DART
from .divprune import DivPrune
from .holov import HoloV
from .joined import Joined
from .luvc import LUVC
from .mmtok import MMTok
from .mosaic import Mosaic
from .none import NoCompression
from .options import describe_options, match_options, read_options, suggest
from .pool import Pool
from .prunesid import PruneSID, PruneSIDPaper, PruneSIDQwen, information_score
from .random_ import RandomTokens
from .resolution import Resolution
from .scope import SCOPE
from .todre import ToDRE
from .tome import ToMe
from .tower_method import TowerMethod
from .uniform import Uniform
from .visionzip import VisionZip
from .vispruner import VisPruner

__all__ = [
    "METHODS", "AttentionMethod", "Candidates", "Choice", "Joined", "Merges", "Method", "Picks", "Scores",
    "TowerMethod", "get_method", "information_score", "joined_form", "method_table",
]  # fmt: skip

GROUP = "edge_tokcomp.methods"

_JOIN = re.compile(r"\+(?=\s*[A-Za-z])")
"""Between two methods; the sign of a number has no letter behind it."""

METHODS: dict[str, type[Method]] = {
    "none": NoCompression,
    "random": RandomTokens,
    "uniform": Uniform,
    "pool": Pool,
    "resolution": Resolution,
    "mosaic": Mosaic,
    "prunesid": PruneSID,
    "prunesid-paper": PruneSIDPaper,
    "prunesid-qwen": PruneSIDQwen,
    "todre": ToDRE,
    "luvc": LUVC,
    "visionzip": VisionZip,
    "divprune": DivPrune,
    "vispruner": VisPruner,
    "scope": SCOPE,
    "cdpruner": CDPruner,
    "dart": DART,
    "holov": HoloV,
    "mmtok": MMTok,
    "tome": ToMe,
}


def get_method(method: str | Method, **options: Any) -> Method:
    """The method of that name with ``options`` set, or ``method`` itself with ``options`` changed.

    The name may carry options: ``"prunesid:centre=token,score=projection"``; keyword arguments win over those. Two
    names with a plus between them are a method in the tower and one behind it: ``"luvc:leave=0.4+mosaic"``.
    Raises ``UsageError`` for unknown names and options, with the valid ones.
    """
    if isinstance(method, Method):
        return dataclasses.replace(method, **match_options(type(method), method.name, options))
    first, *rest = (part.strip() for part in _JOIN.split(method, maxsplit=1))
    name, colon, text = first.partition(":")
    written = read_options(name, text) if colon else {}
    leave = {"leave": written.pop("leave")} if rest and "leave" in written else {}
    cls = METHODS.get(name) or _outside(name)
    if not rest:
        return cls(**match_options(cls, name, written) | match_options(cls, name, options))
    joined = Joined(cls(**match_options(cls, name, written)), get_method(rest[0]), **leave)  # type: ignore[arg-type]
    return get_method(joined, **options)


def method_table() -> list[dict[str, Any]]:
    """Every method, also those of other packages: name, title, source, scope, inputs, options with their defaults."""
    return [
        {
            "name": name,
            "title": cls.title,
            "source": cls.source,
            "scope": cls.scope,
            "needs": sorted(cls().needs),
            "wants": sorted(cls.wants),
            "options": describe_options(cls),
        }
        for name, cls in _all_methods().items()
    ]


def joined_form() -> dict[str, Any]:
    """How two methods are written as one: which may stand ``first`` and ``then``, by name, and the options of the pair,
    which are written with the first."""
    classes = _all_methods()
    first = [name for name, cls in classes.items() if issubclass(cls, TowerMethod)]
    return {
        "name": "TOWER+METHOD",
        "title": "one in the tower and one that chooses among what it leaves",
        "source": Joined.source,
        "example": "luvc:first=0.0+mosaic",
        "first": first,
        "then": [name for name, cls in classes.items() if cls.compresses and name not in first],
        "options": describe_options(Joined),
    }


def _all_methods() -> dict[str, type[Method]]:
    return METHODS | {name: _outside(name) for name in sorted(_entry_points()) if name not in METHODS}


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=GROUP)}


def _outside(name: str) -> type[Method]:
    """The class that another package registered under ``name``."""
    points = _entry_points()
    if name not in points:
        known = [*METHODS, *sorted(set(points) - set(METHODS))]
        raise UsageError(f"unknown method {name!r}{suggest(name, known)}; methods: {', '.join(known)}")
    label = f"method {name!r} ({points[name].value})"
    try:
        cls = points[name].load()
    except (ImportError, AttributeError) as fault:
        raise TokcompError(f"{label} cannot be loaded: {fault}; mend or remove its package") from fault
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise TokcompError(f"{label} is not a subclass of edge_tokcomp.methods.Method; mend or remove its package")
    return cls
