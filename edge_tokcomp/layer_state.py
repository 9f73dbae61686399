"""What the language model shows of itself between two layers, for those who prune there: arrays only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .tokens import Ints


@dataclass(frozen=True, eq=False)
class LayerState:
    """One sequence at the input of one decoder layer.

    ``hidden (n, d) float32``: hidden states of the image rows that are left, in sequence order; ``crop (n,)``: the
    image, crop or frame each belongs to. ``entered``: image rows that entered the language model.
    ``attention (t, m) float32``: softmax attention, mean of heads, of the ``t`` text rows after the image to all ``m``
    rows of the sequence, where the step names it; of the last of them alone where it may look from no other.
    ``image (n,)``, ``text (t,)``: places of those rows among the m.
    ``keys (m,) float32``: L1 norm of every row's key in the layer before, all heads, after rotation; ``words (t, d)``:
    hidden states of the text rows; ``final_norm (d,)``: weight of the norm before the model's head; all three for
    steps with ``looks_at_keys``.
    """

    hidden: NDArray[np.float32]
    crop: Ints
    entered: int
    image: Ints
    text: Ints
    attention: NDArray[np.float32] | None = None
    keys: NDArray[np.float32] | None = None
    words: NDArray[np.float32] | None = None
    final_norm: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.hidden)
