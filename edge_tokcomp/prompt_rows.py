"""A prompt as rows: text and images in turn, each at its position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, zip_longest

import numpy as np
from numpy.typing import NDArray

from .answers import EncodedImage
from .image_rows import ImageRows, shifted
from .language.token_embedding import TokenEmbedding
from .tokens import Origin, Rows


def prompt_parts(
    embedding: TokenEmbedding, pieces: Sequence[NDArray[np.int32]], images: Sequence[EncodedImage]
) -> list[ImageRows]:
    """Text and images in turn, text first and last; images, and crops through all of them, are numbered."""
    parts: list[ImageRows] = []
    crops = 0
    for number, (piece, image) in enumerate(zip_longest(pieces, images)):
        parts.append(ImageRows.of_text(embedding.rows(piece, 0)))
        if image is not None:
            rows = image.rows.aligned(sum(part.advance for part in parts))
            crop = np.where(rows.crop >= 0, rows.crop + crops, -1)
            places = shifted(rows.positions, rows.origin, number, Origin.PICTURE)
            parts.append(replace(rows, crop=crop, positions=places))
            crops += len(image.tokens.layout.grids)
    return parts


def rows_of(parts: Sequence[ImageRows], start: int, sequence: int) -> list[Rows]:
    """``parts`` from position ``start`` on, none of whose logits are wanted.

    The text around and between crops is apart from their rows: these may see one another, but text only looks back.
    """
    made = []
    for part in parts:
        places = shifted(part.positions, part.origin, start)
        cuts = [0, *(np.flatnonzero(np.diff(part.crop < 0)) + 1).tolist(), len(part)]
        for piece in (slice(*ends) for ends in pairwise(cuts)) if len(part) else ():
            made.append(
                Rows(
                    part.embeddings[piece], places[..., piece], sequence, np.zeros(len(part), np.bool_)[piece],
                    part.crop[piece], part.tokens[piece],
                )
            )  # fmt: skip
        start += part.advance
    return made
