"""What of a picture enters the language model: its kept rows, the family's text between crops, and where they stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .families.base import Part, Tokens
from .tokens import Ints, Layout, Origin, Plan, Rows

Floats = NDArray[np.float32]
Int32s = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class ImageRows:
    """``embeddings (n, width) float32``; ``crop (n,) int64``: the crop each row is of, -1 for text; ``tokens (n,)
    int32``: the token of each text row, -1 for image rows.

    ``positions``: from the picture's first, ``(n,) int32``, or ``(4, n)`` for M-RoPE, with an ``Origin`` each in
    ``origin``; ``advance``: how far behind that first one the text after the picture stands. ``padding``: as of the
    ``Layout``.
    """

    embeddings: Floats
    crop: Ints
    tokens: Int32s
    positions: Int32s
    origin: NDArray[np.int8]
    advance: int
    padding: int = 0

    def __len__(self) -> int:
        return len(self.embeddings)

    def aligned(self, start: int) -> ImageRows:
        """Without the padding that a picture at position ``start`` does not need."""
        spare = start % (self.padding + 1)
        if not spare:
            return self
        return ImageRows(
            self.embeddings[spare:], self.crop[spare:], self.tokens[spare:], self.positions[..., spare:] - spare,
            self.origin[..., spare:], self.advance - spare,
        )  # fmt: skip

    @classmethod
    def of_text(cls, text: Rows) -> ImageRows:
        """Text, from its first token on."""
        count = len(text)
        places, origin = _counted(count, False)
        return cls(
            text.embeddings, np.full(count, -1, np.int64), np.asarray(text.tokens, np.int32), places, origin, count
        )


def image_rows(
    parts: Sequence[Part],
    kept: Floats,
    plan: Plan,
    layout: Layout,
    embed: Callable[[str | Tokens], Rows],
    *,
    on_grid: bool,
) -> ImageRows:
    """``kept (n, width)``: the rows of ``plan``, put where ``parts`` say.

    ``on_grid``: rows stand at their row and column of the uncompressed crop's grid, all at one time, and what follows
    where that grid ends (M-RoPE), unless ``layout.places`` says otherwise; else they are counted.
    """
    order = plan.keep if plan.order is None else plan.order
    crop = layout.crop[order]
    pieces: list[tuple[Floats, Ints, Int32s, Int32s, NDArray[np.int8]]] = []
    start = 0
    for part in parts:
        if isinstance(part, tuple):
            inside = np.isin(crop, part)
            rows, owners, tokens = kept[inside], crop[inside], np.full(int(inside.sum()), -1, np.int32)
            places, origin, length = _stand(layout, part, order[inside], on_grid)
        else:
            text = embed(part)
            rows, length, tokens = text.embeddings, len(text), np.asarray(text.tokens, np.int32)
            owners, (places, origin) = np.full(length, -1, np.int64), _counted(length, on_grid)
        pieces.append((rows, owners, tokens, shifted(places, origin, start), origin))
        start += length
    return ImageRows(
        np.concatenate([rows for rows, *_ in pieces]), np.concatenate([owners for _, owners, *_ in pieces]),
        np.concatenate([tokens for _, _, tokens, *_ in pieces]),
        np.concatenate([places for *_, places, _ in pieces], axis=-1),
        np.concatenate([origin for *_, origin in pieces], axis=-1), start, layout.padding,
    )  # fmt: skip


def shifted(positions: Int32s, origin: NDArray[np.int8], by: int, of: Origin = Origin.START) -> Int32s:
    """``positions``, those with this ``origin`` counted from ``by``."""
    moved: Int32s = positions + np.int32(by) * (origin == of)
    return moved


def _stand(layout: Layout, part: tuple[int, ...], rows: Ints, on_grid: bool) -> tuple[Int32s, NDArray[np.int8], int]:
    """Positions and origins of ``rows`` of the crops ``part``, counted from where these begin; and where they end."""
    if not on_grid:
        return *_counted(len(rows), False), len(rows)
    (crop,) = part
    if layout.places:
        return layout.places.at[:, rows], layout.places.origin[:, rows], layout.places.advance[crop]
    row, column = np.divmod(layout.cell[rows], layout.grids[crop][1])
    _, origin = _counted(len(rows), True)
    return np.stack([0 * row, row, column, 0 * row]).astype(np.int32), origin, max(layout.grids[crop])


def _counted(count: int, on_grid: bool) -> tuple[Int32s, NDArray[np.int8]]:
    """As text stands, and what from: of four positions (M-RoPE) the last is always 0."""
    places = np.arange(count, dtype=np.int32)
    if not on_grid:
        return places, np.full(count, Origin.START, np.int8)
    origin = np.full((4, count), Origin.START, np.int8)
    origin[3] = Origin.NOTHING
    return np.stack([places, places, places, 0 * places]), origin
