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

from . import __version__
from .answers import Look, Shown
from .budget import tokens_to_keep
from .encoded_cache import EncodedCache
from .errors import TokcompError, UsageError
from .families import TowerSpec, family_named
from .families.base import Pixels
from .families.tower_spec import Limits
from .methods import AttentionMethod, Method, TowerMethod
from .tokens import Ints, Layout, Role, VisionTokens
from .tower import Patches, Precision, Provider, Tower, TowerOutput
from .variant import PLAIN, Merge, TowerKind, TowerVariant

Floats = NDArray[np.float32]

_TOGETHER = 4
"""Crops that go through the tower at once: each of an InternVL takes 90 MB more, and none is the faster on a CPU."""


class TowerEngine:
    """The vision half of a model: ``spec`` and ``family`` say what it is, ``tower`` runs it under a method.

    ``directory``: of the exported tower, run plainly. ``reason``: where it runs and why. ``cache``: of what it said.
    """

    name = "onnx"

    def __init__(
        self, mmproj: Path, *, precision: Precision | None, provider: Provider, threads: int, method: Method,
        keep: int | float, cache: EncodedCache,
    ) -> None:  # fmt: skip
        from .export.tower_files import cached_tower

        self.threads, self.cache = threads, cache
        self._mmproj, self._provider = mmproj, provider
        self._towers: dict[TowerKind, Tower] = {}
        self._plain = cached_tower(mmproj, precision, threads=threads)
        self.precision = self._plain.precision
        self.spec, self.directory = self._plain.spec, self._plain.directory
        self.family = family_named(self.spec.family)
        self.causal, self.positions = self.family.causal, self.family.positions
        self.markers, self.written = self.family.markers, self.family.written
        self.family_name = self.family.name
        # Where sizes differ, a number of tokens may be all of a usual picture and a part of a larger one.
        self.tower = self._tower(self.variant(method, 0.5 if self.sizes_differ and keep != 1.0 else keep).kind)
        self.row_width, self.reason = self.tower.language_width, self.tower.provider_reason

    @property
    def crop_tokens(self) -> int:
        """Tokens of one crop of the size the tower was made for."""
        return int(self.spec.patches)

    @property
    def on_gpu(self) -> bool:
        """Whether the tower runs on a GPU."""
        return self.tower.provider != "cpu"

    def set_threads(self, threads: int) -> None:
        """Compute with so many CPU threads from now on, which takes opening the tower anew."""
        if threads != self.threads:
            self.threads, kinds = threads, list(self._towers)
            self._towers.clear()
            for kind in kinds:
                self._tower(kind)
            self.tower = next(iter(self._towers.values()))

    @property
    def sizes_differ(self) -> bool:
        """Whether pictures differ in how many tokens they have."""
        return bool(self.spec.limits != Limits())

    def show(self, picture: Pil.Image) -> Shown:
        """``picture``, to be looked at."""
        return Shown(picture, self.pixels)

    def variant(self, method: Method, keep: int | float, shown: Shown | None = None) -> TowerVariant:
        """How the tower is to be run for ``method`` on the crops of a picture, of one crop if none is ``shown``.

        Raises ``UsageError`` where it cannot be run so.
        """
        if not isinstance(method, TowerMethod):
            return TowerVariant(block=self._looked_at(method))
        pixels = shown.crops if shown else None
        grids = (self.spec.grid,) if pixels is None else pixels.grids
        counts = [math.prod(grid) for grid in grids]
        before = sum(counts) if pixels is None else self._layout(pixels, grids).before
        keep = method.leaves(keep, before)
        # A number of tokens is meant for the whole picture.
        wanted = [max(keep * count // sum(counts), 1) if isinstance(keep, int) else keep for count in counts]
        tokens = [tokens_to_keep(part, count) for part, count in zip(wanted, counts, strict=True)]
        while True:
            variant = self._variant_of_crops(method, tokens, grids)
            if pixels is None or max(tokens) == 1:
                return variant
            left = [self._left(variant.of_crop(number), grid) for number, grid in enumerate(grids)]
            over = self._layout(pixels, left).before - tokens_to_keep(keep, before)
            if over <= 0:
                return variant
            # Separators count too, and how many there are shows only now.
            tokens = [
                max(1, part - -(-over * count // sum(counts))) for part, count in zip(tokens, counts, strict=True)
            ]

    def _variant_of_crops(
        self, method: TowerMethod, wanted: Sequence[int], grids: Sequence[tuple[int, int]]
    ) -> TowerVariant:
        """For at most ``wanted`` tokens of each crop."""
        whole = PLAIN if method.behind is None else TowerVariant(block=self._looked_at(method.behind))
        variants = [
            whole if tokens == math.prod(grid) else self._variant_of_crop(method, tokens, grid)
            for tokens, grid in zip(wanted, grids, strict=True)
        ]
        if all(variant == variants[0] for variant in variants):
            return variants[0]
        merging = next(variant for variant in variants if variant != whole)
        return replace(merging, merges=variants[0].merges, further=tuple(variant.merges for variant in variants[1:]))

    def _variant_of_crop(self, method: TowerMethod, wanted: int, grid: tuple[int, int]) -> TowerVariant:
        spec = self.spec
        found = method.variant(wanted, grid, spec.blocks, spec.merge, spec.window_patches)
        if method.behind:
            found = replace(found, block=self._looked_at(method.behind))
        if found.grid is not None and spec.dynamic and spec.limits.max_tiles is not None:
            raise UsageError(
                f"method {method.name} runs the tower on crops of one size, and {self.family_name} cuts pictures "
                "into crops of several; choose another method"
            )
        self._left(found, grid)  # refuses merges that cannot be
        return found

    def _left(self, variant: TowerVariant, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens that come of a crop of ``grid``."""
        return variant.final_grid(grid, self.spec.blocks, self.spec.merge, self.spec.window_patches)

    def _layout(self, pixels: Pixels, grids: Sequence[tuple[int, int]]) -> Layout:
        """Where the rows of a picture lie whose crops come out as ``grids`` of tokens."""
        return self.family.layout(replace(pixels, grids=tuple(grids)), self.spec)

    def _looked_at(self, method: Method) -> int | None:
        """The block whose attention or keys ``method`` looks at, if it does; raises ``UsageError`` for one not run."""
        asked = method.needs | method.wants
        if not self.spec.class_token:  # What would have to be computed first is for methods that cannot do without.
            asked -= {"cls_attention"} - method.needs
        number = method.block if isinstance(method, AttentionMethod) else None
        if asked & {"cls_attention", "keys"}:
            return int(self.spec.block(number))
        if number is not None:
            raise UsageError(
                f"method {method}: of this tower, which has no class token, it looks at no block's attention; leave "
                "block out"
            )
        return None

    def kept(self, method: Method, keep: int | float) -> int:
        """Rows that enter the language model under ``method``, of a picture of one crop or as many as are asked for."""
        chooses = method.compresses if not isinstance(method, TowerMethod) else method.behind is not None
        if self.sizes_differ and isinstance(keep, int) and chooses:
            return keep
        variant = self.variant(method, keep)
        if not variant.usual:
            left = math.prod(self._left(variant, self.spec.grid))
            return min(left, tokens_to_keep(keep, self.spec.patches)) if chooses else left
        return tokens_to_keep(keep, self.spec.patches) if method.compresses else self.spec.patches

    def pixels(self, picture: Pil.Image, variant: TowerVariant = PLAIN) -> Pixels:
        """``picture`` as the tower wants it."""
        return self.family.preprocess(picture, self.spec, variant.grid)

    def look(self, shown: Shown, variant: TowerVariant = PLAIN, content: str = "") -> Look:
        """Preprocess a picture and run the tower on its crops, unless ``cache`` holds what it says of this
        ``content``, a digest."""
        tower = self._tower(variant.kind)
        started = time.perf_counter()
        pixels = self.pixels(shown.picture, variant) if variant.grid else shown.crops
        ready = time.perf_counter()
        outputs = self._recalled(content, variant)
        if outputs is None:
            outputs = _encoded(tower, pixels.crops, [variant.of_crop(n).merges for n in range(len(pixels.crops))])
            if content:
                self.cache.put(self._key(content, variant), outputs)
        done = time.perf_counter()
        timings = {"preprocess": (ready - started) * 1e3, "encode": (done - ready) * 1e3}
        owner = None
        if variant.kind.merging:
            owner = tuple(_owner(output, grid, self.spec) for output, grid in zip(outputs, pixels.grids, strict=True))
        own = (self.spec.grid,) * len(pixels.crops)
        if not variant.usual and self.spec.dynamic:
            own = shown.crops.grids
        return Look(self._tokens(tower, pixels, outputs, variant, own), self.family.prompt(pixels), owner, timings)

    def _recalled(self, content: str, variant: TowerVariant) -> list[TowerOutput] | None:
        """What the tower said before, of the usual block's attention too where none is asked for."""
        if not content:
            return None
        found = self.cache.get(self._key(content, variant), (TowerOutput, Patches))
        if found is None and variant.block is None:
            more = replace(variant, block=self.spec.block(None))
            found = self.cache.get(self._key(content, more), (TowerOutput, Patches))
        return found

    def _key(self, content: str, variant: TowerVariant) -> str:
        return f"{content} {self.directory.name} {variant} {__version__}"

    def _tokens(
        self, tower: Tower, pixels: Pixels, outputs: Sequence[TowerOutput], variant: TowerVariant,
        own: tuple[tuple[int, int], ...],
    ) -> VisionTokens:  # fmt: skip
        """The rows of all crops in the layout's order; ``own``: the grids that the crops have otherwise."""
        grids = tuple(self._left(variant.of_crop(number), grid) for number, grid in enumerate(pixels.grids))
        layout = self._layout(pixels, grids)
        if not variant.usual:
            layout = replace(layout, whole=self._layout(pixels, own).before)
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

    def _tower(self, kind: TowerKind) -> Tower:
        """The tower of that ``kind``, opened when first asked for.

        Each open one holds the weights anew: one that can do more than is asked for is taken rather than another
        opened, and besides the plain one and the first only the last one stays open.
        """
        for ready in (kind, *(old for old in self._towers if old.serves(kind))):
            if ready in self._towers:
                return self._towers[ready]
        files = self._plain
        if kind != PLAIN.kind:
            from .export.tower_files import cached_tower

            files = cached_tower(self._mmproj, self.precision, kind=kind, threads=self.threads)
        opened = Tower(files.directory, provider=self._provider, threads=self.threads, graph=files.graph)
        _check_described(opened, self.spec)
        stay = [PLAIN.kind, *list(self._towers)[:1]]
        self._towers = {old: tower for old, tower in self._towers.items() if old in stay} | {kind: opened}
        return opened


def _check_described(tower: Tower, spec: TowerSpec) -> None:
    """Raise ``TokcompError`` unless the graphs are those of the tower that the description beside them is of."""
    side = spec.image_size
    for name, found, wanted in (
        ("pictures", tower.image_size, (side, side)),
        ("units", tower.unit, spec.unit),
        ("rows", tower.width, spec.token_width),
        ("deepstack levels", tower.levels, len(spec.deepstack)),
        ("a class token", tower.class_token, spec.class_token),
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


def _encoded(tower: Tower, crops: Sequence[Floats], merges: Sequence[tuple[Merge, ...]]) -> list[TowerOutput]:
    """What the tower says of each crop, with its ``merges``: those alike in shape and merges go through it together, a
    few at a time, and those alike in every pixel, as the margins of a page, once."""
    found: dict[int, TowerOutput] = {}
    ways = [(crop.shape, each) for crop, each in zip(crops, merges, strict=True)]
    first: dict[tuple[object, bytes], int] = {}
    same = [
        first.setdefault((way, crop.tobytes()), number)
        for number, (way, crop) in enumerate(zip(ways, crops, strict=True))
    ]
    for way in dict.fromkeys(ways):
        members = [number for number, other in enumerate(ways) if other == way and same[number] == number]
        for start in range(0, len(members), _TOGETHER):
            batch = members[start : start + _TOGETHER]
            output = tower.encode(np.stack([crops[number] for number in batch]), way[1])
            found |= {number: output.crop(place) for place, number in enumerate(batch)}
    return [found[number] for number in same]


def _owner(output: TowerOutput, grid: tuple[int, int], spec: TowerSpec) -> Ints:
    """``(N,)``: the cell that each patch of a crop of ``grid`` tokens is in at the end."""
    return np.arange(math.prod(grid) * spec.merge**2) if output.owner is None else output.owner[0]


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
