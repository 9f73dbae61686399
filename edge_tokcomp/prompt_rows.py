"""A prompt as rows: text and images in turn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from .answers import EncodedImage
from .language.token_embedding import TokenEmbedding
from .tokens import Ints, Rows

Part = tuple[NDArray[np.float32], Ints]
"""Rows at language width, and the crop each is of, -1 for text."""


def prompt_parts(
    embedding: TokenEmbedding, pieces: Sequence[NDArray[np.int32]], images: Sequence[EncodedImage]
) -> list[Part]:
    """Text and images in turn, text first and last; crops are numbered through all images."""
    parts, crops = [], 0
    for piece, image in zip_longest(pieces, images):
        parts.append((embedding.lookup(piece), np.full(len(piece), -1)))
        if image is not None:
            parts.append((image.rows, np.where(image.crop >= 0, image.crop + crops, -1)))
            crops += len(image.tokens.layout.grids)
    return parts


def rows_of(parts: Sequence[Part], start: int, sequence: int) -> list[Rows]:
    """``parts`` from position ``start`` on, none of whose logits are wanted; empty ones are left out."""
    made = []
    for rows, crop in parts:
        if len(rows):
            positions = np.arange(start, start + len(rows), dtype=np.int32)
            made.append(Rows(rows, positions, sequence, np.zeros(len(rows), np.bool_), crop))
            start += len(rows)
    return made
