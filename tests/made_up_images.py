"""Made-up images, and a method that does what it is told, for the tests of compression methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace

from edge_tokcomp.methods import Method, get_method
from edge_tokcomp.tokens import Layout, Plan, Role, VisionTokens


def image(layout: Layout, seed: int = 0, width: int = 24) -> VisionTokens:
    """Features of a few overlapping clusters around a common mean, the way towers give them."""
    rng = np.random.default_rng(seed)
    total = len(layout)
    mixture = np.abs(rng.standard_normal((total, 6))) ** 2
    features = mixture @ rng.standard_normal((6, width)) + rng.standard_normal((total, width))
    features += rng.standard_normal(width)
    matrix = rng.standard_normal((width, 20)).astype(np.float32)
    return VisionTokens(
        features.astype(np.float32),
        layout,
        project=lambda rows: projected(rows, matrix),
        cls_attention=rng.dirichlet(np.full(total, 0.3), 4).astype(np.float32),
        keys=rng.standard_normal((total, 8)).astype(np.float32),
    )


def projected(rows: Any, matrix: np.ndarray) -> Any:
    """``rows @ matrix``, by way of float64: in float32 some BLAS give equal rows different products."""
    xp = array_namespace(rows)
    wide = xp.astype(rows, xp.float64)
    return xp.astype(wide @ as_array(matrix.astype(np.float64), wide), xp.float32)


def question(tokens: VisionTokens) -> Any:
    """Five tokens at the language width of ``tokens``, in its library."""
    width = tokens.features.shape[1] if tokens.project is None else 20
    return as_array(np.random.default_rng(77).standard_normal((5, width)).astype(np.float32), tokens.features)


def compress(name: str, tokens: VisionTokens, keep: int | float, seed: int = 0) -> Plan:
    """The plan of a method by name, asked ``question``."""
    return get_method(name).compress(tokens, keep, seed=seed, query=question(tokens))


def as_array(values: np.ndarray, other):
    if isinstance(other, np.ndarray):
        return values
    strict = hasattr(other, "__array_namespace__")
    return other.__array_namespace__().asarray(values) if strict else other.new_tensor(values)


def moved(tokens: VisionTokens, convert) -> VisionTokens:
    return VisionTokens(
        convert(tokens.features), tokens.layout, tokens.project, convert(tokens.cls_attention), convert(tokens.keys)
    )


def with_separators(layout: Layout, places: list[int]) -> Layout:
    """``layout`` with a separator row before each of ``places``."""
    return Layout(
        layout.grids,
        np.insert(layout.crop, places, [layout.crop[min(p, len(layout) - 1)] for p in places]),
        np.insert(layout.cell, places, -1),
        np.insert(layout.role, places, Role.SEPARATOR),
        layout.overview,
    )


PLAN_ARRAYS = ("keep", "rank", "assign", "weight", "order")


def same_plan(one, two) -> bool:
    return all(
        (a is None and b is None) or np.array_equal(a, b)
        for a, b in ((getattr(plan, name) for plan in (one, two)) for name in PLAN_ARRAYS)
    )


@dataclass(frozen=True)
class Custom(Method):
    """Returns what the test hands it."""

    name: ClassVar[str] = "custom"
    title: ClassVar[str] = "Custom"
    source: ClassVar[str] = "test"
    answer: ClassVar[Any] = None

    def choose(self, rows, k):
        return type(self).answer(rows, k)


def answering(answer, **attributes) -> Method:
    return type("Answering", (Custom,), {"answer": staticmethod(answer), **attributes})()


def greedily(count: int, k: int, gain: Callable[[int, list[int]], float]) -> list[int]:
    """``k`` of ``count``, one at a time, each the one of highest gain beside those chosen before."""
    chosen: list[int] = []
    while len(chosen) < k:
        chosen.append(max((i for i in range(count) if i not in chosen), key=lambda i: gain(i, chosen)))
    return chosen
