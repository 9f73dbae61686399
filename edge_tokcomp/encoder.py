"""From a picture to the rows a language model is fed: decode, preprocess, tower, compression, projector, markers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil
from threadpoolctl import ThreadpoolController

from .answers import EncodedImage
from .errors import UsageError
from .families import family_named
from .families.base import Pixels
from .images import Image, open_image, wrap_image
from .methods import Method
from .tokens import VisionTokens
from .tower import Provider, Tower

Picture = Any
"""A path, encoded bytes, a PIL image, an ``(H, W, 3) uint8`` array, an ``images.Image`` or an ``EncodedImage``."""

Embed = Callable[[str, bool], NDArray[np.float32]]
"""``(text, special)`` to ``(n, width)``: a language model's own rows for a text; ``special`` obeys its tokens."""


class ImageEncoder:
    """The vision half of a model: ``spec`` and ``family`` say what it is, ``tower`` runs it.

    ``embed``: the language model's rows for text: the question, for methods that look at it, and the family's markers.
    """

    def __init__(
        self, mmproj: Path, embed: Embed, *, precision: Literal["fp32", "int8"], provider: Provider, threads: int,
        seed: int, max_pixels: int,
    ) -> None:  # fmt: skip
        from .export.tower_files import cached_tower

        files = cached_tower(mmproj, precision, threads=threads)
        self.spec, self.family = files.spec, family_named(files.spec.family)
        self.tower = Tower(files.directory, provider=provider, threads=threads)
        self.precision, self.threads, self.seed, self.max_pixels = precision, threads, seed, max_pixels
        self._embed = embed
        self._pools = ThreadpoolController()

    def encode(self, picture: Picture, method: Method, keep: int | float, question: str) -> EncodedImage:
        """``picture`` under ``method`` and ``keep``; raises ``ImageError`` for one that cannot be read."""
        clock = _Clock()
        image = self._open(picture)
        clock.stop("decode")
        pixels = self.family.preprocess(image.picture, self.spec)
        clock.stop("preprocess")
        tokens = self._tokens(pixels)
        clock.stop("encode")
        return self._compressed(image, tokens, self.family.prompt(pixels), clock.times, method, keep, question)

    def compress(self, encoded: EncodedImage, method: Method, keep: int | float, question: str) -> EncodedImage:
        """The same picture under another method, budget or question; the tower does not run again."""
        return self._compressed(
            encoded.image, encoded.tokens, encoded.parts, encoded.timings_ms, method, keep, question
        )  # fmt: skip

    def _compressed(
        self, image: Image, tokens: VisionTokens, parts: tuple[str | int, ...], times: Mapping[str, float],
        method: Method, keep: int | float, question: str,
    ) -> EncodedImage:  # fmt: skip
        clock = _Clock()
        asked = "query" in method.needs | method.wants
        query = self._embed(question, False) if asked else None
        with self._pools.limit(limits=self.threads, user_api="blas"):
            plan = method.compress(tokens, keep, seed=self.seed, query=query)
        kept = np.asarray(tokens.rows(plan), np.float32)
        crop = tokens.layout.crop[plan.keep]
        rows = np.concatenate([
            kept[crop == part] if isinstance(part, int) else self._embed(part, True) for part in parts
        ])  # fmt: skip
        clock.stop("compress")
        return EncodedImage(
            image, tokens, plan, rows, parts, {**times, **clock.times}, method, keep, question if asked else None
        )

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

    def _tokens(self, pixels: Pixels) -> VisionTokens:
        """Run the tower on all crops and lay their rows end to end."""
        output = self.tower.encode(pixels.crops)
        attention = output.cls_attention
        return VisionTokens(
            output.features.reshape(-1, output.features.shape[-1]),
            self.family.layout(pixels),
            partial(_project, self.tower),
            None if attention is None else np.concatenate(list(attention), axis=-1),
        )


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
