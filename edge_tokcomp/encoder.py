"""From a picture to the rows a language model is fed: decode, preprocess, tower, compression, projector, markers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil
from threadpoolctl import ThreadpoolController

from .answers import EncodedImage, SeenImage
from .budget import tokens_to_keep
from .dynamic import Share
from .errors import UsageError
from .families import family_named
from .families.base import Pixels
from .images import Image, open_image, wrap_image
from .methods import Method, TowerMethod
from .tokens import VisionTokens
from .tower import Provider, Tower, TowerOutput
from .variant import PLAIN, TowerVariant

Picture = Any
"""A path, encoded bytes, a PIL image, an ``(H, W, 3) uint8`` array, an ``images.Image``, a ``SeenImage`` or an
``EncodedImage``."""

Embed = Callable[[str, bool], NDArray[np.float32]]
"""``(text, special)`` to ``(n, width)``: a language model's own rows for a text; ``special`` obeys its tokens."""


class ImageEncoder:
    """The vision half of a model: ``spec`` and ``family`` say what it is, ``tower`` runs it under ``method``.

    ``directory``: of the exported tower, run plainly.
    ``embed``: the language model's rows for text: the question, for methods that look at it, and the family's markers.
    """

    def __init__(
        self, mmproj: Path, embed: Embed, *, precision: Literal["fp32", "int8"], provider: Provider, threads: int,
        seed: int, max_pixels: int, method: Method, keep: int | float,
    ) -> None:  # fmt: skip
        from .export.tower_files import cached_tower

        self.precision, self.threads, self.seed, self.max_pixels = precision, threads, seed, max_pixels
        self._mmproj, self._provider, self._embed = mmproj, provider, embed
        self._pools = ThreadpoolController()
        self._towers: dict[TowerVariant, Tower] = {}
        self._plain = cached_tower(mmproj, precision, threads=threads)
        self.spec, self.directory = self._plain.spec, self._plain.directory
        self.family = family_named(self.spec.family)
        self.tower = self._tower(self.variant(method, keep))

    def variant(self, method: Method, keep: int | float) -> TowerVariant:
        """How the tower is to be run for ``method``."""
        wanted = tokens_to_keep(keep, self.spec.patches)
        if not isinstance(method, TowerMethod) or wanted == self.spec.patches:
            return PLAIN
        return method.variant(wanted, self.spec.grid, self.spec.blocks)

    def kept(self, method: Method, keep: int | float) -> int:
        """Rows of one crop that enter the language model under ``method``."""
        variant = self.variant(method, keep)
        if variant != PLAIN:
            return math.prod(variant.final_grid(self.spec.grid, self.spec.blocks))
        return tokens_to_keep(keep, self.spec.patches) if method.compresses else self.spec.patches

    def see(self, picture: Picture, variant: TowerVariant = PLAIN) -> SeenImage:
        """Run the tower on ``picture``, unless that was done; raises ``ImageError`` for one that cannot be read."""
        seen = picture if isinstance(picture, SeenImage) else None
        if seen and seen.variant == variant:
            return seen
        tower = self._tower(variant)
        clock = _Clock()
        image = seen.image if seen else self._open(picture)
        clock.stop("decode")
        if seen:
            clock.times["decode"] = seen.timings_ms["decode"]
        pixels = self.family.preprocess(image.picture, self.spec, variant.grid)
        clock.stop("preprocess")
        output = tower.encode(pixels.crops, want={"keys"})
        clock.stop("encode")
        tokens = self._tokens(pixels, output, variant)
        return SeenImage(image, tokens, self.family.prompt(pixels), clock.times, variant, output.owner)

    def compress(
        self, seen: SeenImage, method: Method, keep: int | float, question: str, share: Share | None = None
    ) -> EncodedImage:
        """``seen`` under ``method`` and ``keep``, which came about by ``share`` where there is one.

        The tower runs again only where the method needs it run otherwise.
        """
        seen = self.see(seen, self.variant(method, keep))
        clock, tokens = _Clock(), seen.tokens
        asked = "query" in method.needs | method.wants
        query = self._embed(question, False) if asked else None
        with self._pools.limit(limits=self.threads, user_api="blas"):
            plan = method.compress(tokens, keep, seed=self.seed, query=query)
        kept = np.asarray(tokens.rows(plan), np.float32)
        crop = tokens.layout.crop[plan.keep]  # of plan.order as well, which stays within a crop
        parts = [kept[crop == part] if isinstance(part, int) else self._embed(part, True) for part in seen.parts]
        owners = [part if isinstance(part, int) else -1 for part in seen.parts]
        clock.stop("compress")
        return EncodedImage(
            seen.image, tokens, seen.parts, {**seen.timings_ms, **clock.times}, seen.variant, seen.owner, plan,
            np.concatenate(parts), np.repeat(owners, [len(part) for part in parts]), method, keep,
            question if asked else None, share,
        )  # fmt: skip

    def _open(self, picture: Picture) -> Image:
        if isinstance(picture, Image):
            return picture
        if isinstance(picture, Pil.Image):
            return wrap_image(picture, max_pixels=self.max_pixels)
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise UsageError(f"a picture array must be (H, W, 3) uint8, got {picture.shape} {picture.dtype}")
            return wrap_image(Pil.fromarray(picture), max_pixels=self.max_pixels)
        return open_image(picture, max_pixels=self.max_pixels)

    def _tokens(self, pixels: Pixels, output: TowerOutput, variant: TowerVariant) -> VisionTokens:
        """The rows of all crops end to end."""
        attention, keys = output.cls_attention, output.keys
        grids = tuple(variant.final_grid(grid, self.spec.blocks) for grid in pixels.grids)
        layout = self.family.layout(replace(pixels, grids=grids))
        if variant != PLAIN:
            layout = replace(layout, whole=self.spec.patches * len(grids))
        return VisionTokens(
            output.features.reshape(-1, output.features.shape[-1]),
            layout,
            partial(_project, self.tower),
            None if attention is None else np.concatenate(list(attention), axis=-1),
            None if keys is None else keys.reshape(-1, keys.shape[-1]),
        )

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
            stay = [PLAIN, *list(self._towers)[:1]]
            self._towers = {old: tower for old, tower in self._towers.items() if old in stay} | {merging: opened}
        return self._towers[merging]


def _project(tower: Tower, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return tower.project(np.ascontiguousarray(rows, np.float32))


class _Clock:
    """Milliseconds between stops, by name."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, name: str) -> None:
        now = time.perf_counter()
        self.times[name] = (now - self._last) * 1e3
        self._last = now
