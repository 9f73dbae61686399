"""What llama.cpp's own libmtmd makes of a picture, beside what we make of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from edge_tokcomp.language.mtmd import MtmdEncoder, TextPiece
from family_proof import Proof

Piece = Any
"""Marker tokens, a list, or rows ``(n, width)``."""


def both_pieces(proof: Proof, picture: Image.Image) -> tuple[list[Piece], list[Piece]]:
    """Ours and libmtmd's, in the order in which they enter the prompt."""
    with proof.open() as vlm, MtmdEncoder(proof.mmproj, vlm.model, threads=1) as encoder:
        seen = vlm.see(picture)
        crop = seen.tokens.layout.crop
        ours: list[Piece] = [
            vlm.model.tokenize(part, add_special=False, parse_special=True).tolist() if isinstance(part, str)
            else seen.tokens.embeddings[np.isin(crop, part)]
            for part in seen.parts
        ]  # fmt: skip
        theirs: list[Piece] = []
        for piece in encoder.encode(np.asarray(picture)):
            if isinstance(piece, TextPiece):
                theirs.append(piece.tokens.tolist())
            else:
                assert piece.n_pos == len(piece.embeddings)  # counted on, as ours
                theirs.append(piece.embeddings)
    return ours, theirs


def texts(pieces: list[Piece]) -> list[list[int]]:
    """The marker tokens among ``pieces``."""
    return [piece for piece in pieces if isinstance(piece, list)]


def rows(pieces: list[Piece]) -> list[Any]:
    """The rows of each crop among ``pieces``."""
    return [piece for piece in pieces if not isinstance(piece, list)]
