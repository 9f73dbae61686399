"""From a picture to the rows a language model is fed: decode, look, compress, project, put the marker text between."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image as Pil
from threadpoolctl import ThreadpoolController

from .answers import EncodedImage, SeenImage
from .dynamic import Share
from .engines import Engine
from .errors import UsageError
from .families.base import Tokens
from .image_rows import image_rows
from .images import Image, open_image, wrap_image
from .methods import Method, TowerMethod
from .methods.none import NoCompression
from .tokens import Rows

Picture = Any
"""A path, encoded bytes, a PIL image, an ``(H, W, 3) uint8`` array, an ``images.Image``, a ``SeenImage`` or an
``EncodedImage``."""

Embed = Callable[[str | Tokens, bool], Rows]
"""``(text, special)`` to a language model's own rows for a text; ``special`` obeys its tokens."""


WHOLE = NoCompression()


class ImageEncoder:
    """Pictures to rows by an ``engine``.

    ``embed``: the language model's rows for text: the question, for methods that look at it, and the family's markers.
    """

    def __init__(self, engine: Engine, embed: Embed, *, threads: int, seed: int, max_pixels: int) -> None:
        self.engine, self.threads, self.seed, self.max_pixels = engine, threads, seed, max_pixels
        self._embed = embed
        self._pools = ThreadpoolController()

    def see(self, picture: Picture, method: Method = WHOLE, keep: int | float = 1.0) -> SeenImage:
        """Look at ``picture`` as ``method`` wants it looked at, unless that was done.

        Raises ``ImageError`` for one that cannot be read.
        """
        seen = picture if isinstance(picture, SeenImage) else None
        asked = (method, keep)
        # 1 is one token and 1.0 all of them, which are equal.
        if seen and seen.asked == asked and type(seen.asked[1]) is type(keep):
            return seen
        started = time.perf_counter()
        image = seen.image if seen else self._open(picture)
        opened = time.perf_counter()
        shown = self.engine.show(image.picture)
        variant = self.engine.variant(method, keep, shown)
        if seen and seen.variant.serves(variant):
            return seen
        decode = seen.timings_ms["decode"] if seen else (opened - started) * 1e3
        settled = (time.perf_counter() - opened) * 1e3  # the picture's crops may say how the tower is run
        look = self.engine.look(shown, variant, image.sha256)
        timings = {"decode": decode, **look.timings_ms}
        timings["preprocess"] += settled
        return SeenImage(image, look.tokens, look.parts, timings, variant, look.owner, asked)

    def compress(
        self, seen: SeenImage, method: Method, keep: int | float, question: str, share: Share | None = None
    ) -> EncodedImage:
        """``seen`` under ``method`` and ``keep``, which came about by ``share`` where there is one.

        The tower runs again only where the method needs it run otherwise.
        """
        seen = self.see(seen, method, keep)
        started, tokens = time.perf_counter(), seen.tokens
        asked = "query" in method.needs | method.wants
        query = self._embed(question, False).embeddings if asked else None
        with self._pools.limit(limits=self.threads, user_api="blas"):
            # What a method of the tower's leaves is kept, all of it where it has nothing to do.
            chooser = (method.behind or WHOLE) if isinstance(method, TowerMethod) else method
            plan = chooser.compress(tokens, keep, seed=self.seed, query=query)
        kept = np.asarray(tokens.rows(plan), np.float32)
        rows = image_rows(seen.inner, kept, plan, tokens.layout, self._text, on_grid=self.engine.positions == "grid")
        compress = (time.perf_counter() - started) * 1e3
        return EncodedImage(
            seen.image, tokens, seen.parts, {**seen.timings_ms, "compress": compress}, seen.variant, seen.owner,
            (method, keep), plan, rows, method, keep, question if asked else None, share,
        )  # fmt: skip

    def _text(self, text: str | Tokens) -> Rows:
        return self._embed(text, True)

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
