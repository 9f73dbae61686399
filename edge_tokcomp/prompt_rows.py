"""A prompt as rows: text and images in turn, each at its position."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from .answers import EncodedImage
from .image_rows import ImageRows
from .language.decoder import Decoder
from .language.token_embedding import TokenEmbedding
from .tokens import Rows


def prompt_parts(
    embedding: TokenEmbedding, pieces: Sequence[NDArray[np.int32]], images: Sequence[EncodedImage]
) -> list[ImageRows]:
    """Text and images in turn, text first and last; crops are numbered through all images."""
    parts, crops = [], 0
    for piece, image in zip_longest(pieces, images):
        count = len(piece)
        places = np.arange(count, dtype=np.int32)
        parts.append(ImageRows(embedding.lookup(piece), np.full(count, -1, np.int64), places, count))
        if image is not None:
            rows = image.rows
            crop = np.where(rows.crop >= 0, rows.crop + crops, -1)
            parts.append(ImageRows(rows.embeddings, crop, rows.positions, rows.advance))
            crops += len(image.tokens.layout.grids)
    return parts


def rows_of(parts: Sequence[ImageRows], start: int, sequence: int) -> list[Rows]:
    """``parts`` from position ``start`` on, none of whose logits are wanted; empty ones are left out."""
    made = []
    for part in parts:
        if len(part):
            places = part.positions.copy()
            places[: 3 if places.ndim == 2 else None] += np.int32(start)
            made.append(Rows(part.embeddings, places, sequence, np.zeros(len(part), np.bool_), part.crop))
        start += part.advance
    return made


def feed(decoder: Decoder, rows: Sequence[Rows], *, causal: bool) -> None:
    """Decode ``rows``; without ``causal`` those of each image see one another, which takes a batch of their own."""
    if causal:
        if rows:
            decoder.decode(rows)
        return
    for one in rows:
        decoder.decode([one], causal=bool(one.crop is None or (one.crop < 0).all()))
