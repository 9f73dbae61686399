"""Pictures to vision tokens by a family's preprocessing and its tower on ONNX Runtime."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil

from .answers import Look
from .budget import tokens_to_keep
from .errors import TokcompError, UsageError
from .families import TowerSpec, family_named
from .families.base import Pixels
from .families.tower_spec import Limits
from .methods import Method, TowerMethod
from .tokens import Layout, Role, VisionTokens
from .tower import Precision, Provider, Tower, TowerOutput
from .variant import PLAIN, TowerVariant

Floats = NDArray[np.float32]

_TOGETHER = 4
"""Crops that go through the tower at once: each of an InternVL takes 90 MB more, and none is the faster on a CPU."""


class TowerEngine:
    """The vision half of a model: ``spec`` and ``family`` say what it is, ``tower`` runs it under a method.

    ``directory``: of the exported tower, run plainly. ``reason``: where it runs and why.
    """

    name = "onnx"

    def __init__(
        self, mmproj: Path, *, precision: Precision | None, provider: Provider, threads: int, method: Method,
        keep: int | float,
    ) -> None:  # fmt: skip
        from .export.tower_files import cached_tower

        self.threads = threads
        self._mmproj, self._provider = mmproj, provider
        self._towers: dict[TowerVariant, Tower] = {}
        self._plain = cached_tower(mmproj, precision, threads=threads)
        self.precision = self._plain.precision
        self.spec, self.directory = self._plain.spec, self._plain.directory
        self.family = family_named(self.spec.family)
        self.causal, self.positions = self.family.causal, self.family.positions
        self.markers, self.written = self.family.markers, self.family.written
        self.family_name = self.family.name
        self.tower = self._tower(self.variant(method, keep))
        self.row_width, self.reason = self.tower.language_width, self.tower.provider_reason

    @property
    def crop_tokens(self) -> int:
        """Tokens of one crop of the size the tower was made for."""
        return int(self.spec.patches)

    @property
    def sizes_differ(self) -> bool:
        """Whether pictures differ in how many tokens they have."""
        return bool(self.spec.limits != Limits())

    def variant(self, method: Method, keep: int | float, picture: Pil.Image | None = None) -> TowerVariant:
        """How the tower is to be run for ``method`` on the crops of ``picture``, of one crop if none is given.

        Raises ``UsageError`` where it cannot be run so.
        """
        if not isinstance(method, TowerMethod):
            return PLAIN
        if self.spec.dynamic and self.spec.limits.max_tiles is not None:
            raise UsageError(
                f"method {method.name} runs the tower on crops of one size, and {self.family_name} cuts pictures "
                "into crops of several; choose a method that acts after the tower"
            )
        grids = (self.spec.grid,) if picture is None else self.pixels(picture).grids
        if isinstance(keep, int):
            keep = max(keep // len(grids), 1)  # a number of tokens is meant for the whole picture
        wanted = tokens_to_keep(keep, math.prod(grids[0]))
        return (
            PLAIN
            if wanted == math.prod(grids[0])
            else method.variant(wanted, grids[0], self.spec.blocks, self.spec.merge)
        )

    def kept(self, method: Method, keep: int | float) -> int:
        """Rows that enter the language model under ``method``, of a picture of one crop or as many as are asked for."""
        if self.sizes_differ and isinstance(keep, int) and method.compresses and not isinstance(method, TowerMethod):
            return keep
        variant = self.variant(method, keep)
        if variant != PLAIN:
            return math.prod(variant.final_grid(self.spec.grid, self.spec.blocks, self.spec.merge))
        return tokens_to_keep(keep, self.spec.patches) if method.compresses else self.spec.patches

    def pixels(self, picture: Pil.Image, variant: TowerVariant = PLAIN) -> Pixels:
        """``picture`` as the tower wants it."""
        return self.family.preprocess(picture, self.spec, variant.grid)

    def look(self, picture: Pil.Image, variant: TowerVariant = PLAIN) -> Look:
        """Preprocess ``picture`` and run the tower on its crops."""
        tower = self._tower(variant)
        started = time.perf_counter()
        pixels = self.pixels(picture, variant)
        ready = time.perf_counter()
        outputs = _encoded(tower, pixels.crops)
        done = time.perf_counter()
        timings = {"preprocess": (ready - started) * 1e3, "encode": (done - ready) * 1e3}
        owner = None if outputs[0].owner is None else np.concatenate([output.owner for output in outputs])
        own = (self.spec.grid,) * len(pixels.crops)
        if variant != PLAIN and self.spec.dynamic:
            own = self.pixels(picture).grids
        return Look(self._tokens(tower, pixels, outputs, variant, own), self.family.prompt(pixels), owner, timings)

    def _tokens(
        self, tower: Tower, pixels: Pixels, outputs: Sequence[TowerOutput], variant: TowerVariant,
        own: tuple[tuple[int, int], ...],
    ) -> VisionTokens:  # fmt: skip
        """The rows of all crops in the layout's order; ``own``: the grids that the crops have otherwise."""
        grids = tuple(variant.final_grid(grid, self.spec.blocks, self.spec.merge) for grid in pixels.grids)
        layout = self.family.layout(replace(pixels, grids=grids), self.spec)
        if variant != PLAIN:
            layout = replace(layout, whole=self.family.layout(replace(pixels, grids=own), self.spec).before)
        place = partial(_placed, layout=layout, lead=self.spec.cls_rows)
        attention = [output.cls_attention[0].T for output in outputs if output.cls_attention is not None]
        keys = [output.keys[0] for output in outputs if output.keys is not None]
        deepstack = [output.deepstack[0] for output in outputs if output.deepstack is not None]
        return VisionTokens(
            place([output.features[0] for output in outputs]), layout, partial(_project, tower),
            place(attention).T if attention else None, place(keys) if keys else None,
            place(deepstack) if deepstack else None, tower.separator,
            partial(_received, outputs, layout, self.spec.cls_rows) if outputs[0].patches else None,
        )  # fmt: skip

    def _tower(self, variant: TowerVariant) -> Tower:
        """The tower that runs ``variant``, opened when first asked for; smaller pictures need none of their own.

        Besides the plain one and the first, only the last one stays open: each holds the weights anew.
        """
        merging = variant if variant.merges else PLAIN
        if merging not in self._towers:
            from .export.tower_files import cached_tower

            files = self._plain
            if merging != PLAIN:
                files = cached_tower(self._mmproj, self.precision, variant=merging, threads=self.threads)
            opened = Tower(files.directory, provider=self._provider, threads=self.threads)
            _check_described(opened, self.spec)
            stay = [PLAIN, *list(self._towers)[:1]]
            self._towers = {old: tower for old, tower in self._towers.items() if old in stay} | {merging: opened}
        return self._towers[merging]


def _check_described(tower: Tower, spec: TowerSpec) -> None:
    """Raise ``TokcompError`` unless the graphs are those of the tower that the description beside them is of."""
    side = spec.image_size
    for name, found, wanted in (
        ("pictures", tower.image_size, (side, side)),
        ("units", tower.unit, spec.unit),
        ("rows", tower.width, spec.token_width),
        ("deepstack levels", tower.levels, len(spec.deepstack)),
        ("a class token", "queries" not in tower.further, spec.class_token),
        ("a separator", tower.separator is not None, bool(spec.separator)),
    ):
        if found != wanted:
            raise TokcompError(
                f"{tower.directory}: its graphs are another tower's than its description ({name}: {found}, not "
                f"{wanted}); export the tower again"
            )


def tower_file(mmproj: Path) -> Path:
    """The file that tells towers apart: the mmproj, or an exported directory's description, with all its checksums."""
    return mmproj / "tower.json" if mmproj.is_dir() else mmproj


def _encoded(tower: Tower, crops: Sequence[Floats]) -> list[TowerOutput]:
    """What the tower says of each crop; those of one size go through it together, a few at a time."""
    found: dict[int, TowerOutput] = {}
    for size in dict.fromkeys(crop.shape for crop in crops):
        members = [number for number, crop in enumerate(crops) if crop.shape == size]
        for start in range(0, len(members), _TOGETHER):
            batch = members[start : start + _TOGETHER]
            output = tower.encode(np.stack([crops[number] for number in batch]), want=tower.further)
            found |= {number: output.crop(place) for place, number in enumerate(batch)}
    return [found[number] for number in range(len(crops))]


def _placed(parts: Sequence[Floats], layout: Layout, lead: int) -> Floats:
    """The rows ``(rows, ...)`` of all crops in the order of ``layout``, zero where it has a separator."""
    ends = np.cumsum([len(part) for part in parts])
    starts = ends - [len(part) for part in parts]
    patch = layout.role == Role.PATCH
    index = starts[layout.crop] + np.where(patch, lead + layout.cell, 0)
    flat = parts[0] if len(parts) == 1 else np.concatenate(parts)
    rows = flat if np.array_equal(index, np.arange(len(flat))) else flat[index]
    if layout.protected.any():
        rows = np.where(layout.protected.reshape(-1, *[1] * (rows.ndim - 1)), np.float32(0), rows)
    return np.asarray(rows)


def _received(outputs: Sequence[TowerOutput], layout: Layout, lead: int) -> Floats:
    """``(heads, N)``: what each row of ``layout`` receives of the attention of its crop."""
    parts = [output.patches.received(0).T for output in outputs if output.patches is not None]
    return np.asarray(_placed(parts, layout, lead).T)


def _project(tower: Tower, rows: Floats) -> Floats:
    return tower.project(np.ascontiguousarray(rows, np.float32))
