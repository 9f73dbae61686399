"""Rows in, logits out: what generation and scheduling are written against, and the plain form of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from ..tokens import Rows
from .segment import Logits, Segment

Positions = Literal["original", "renumbered"]


class Decoder(Protocol):
    """A language model's state over several sequences."""

    @property
    def n_ctx(self) -> int:
        """Rows that all sequences together may hold; rows shared by a fork count once."""

    @property
    def n_batch(self) -> int:
        """Rows of one call into llama.cpp; larger batches are split."""

    @property
    def n_ubatch(self) -> int:
        """Rows computed at once: the largest image whose rows see one another."""

    @property
    def chunk(self) -> int:
        """Rows that one call of ``decode`` had best have."""

    @property
    def n_sequences(self) -> int:
        """Sequence ids run from 0 to this, exclusive."""

    @property
    def n_layer(self) -> int:
        """Layers of the whole model."""

    @property
    def n_vocab(self) -> int:
        """Width of the logits."""

    @property
    def row_width(self) -> int:
        """Width of the rows fed in, ``n_embd_inp``."""

    @property
    def room(self) -> int:
        """Rows that still fit."""

    @property
    def takes_bare(self) -> bool:
        """Whether it looks tokens up itself, in batches of nothing but text: reading, dequantising and checking the row
        of a generated token takes longer than all else that is done between two calls of llama.cpp."""

    @property
    def looks_at_text(self) -> bool:
        """Whether image rows have to come in one batch with the text that follows them."""

    @property
    def prunes(self) -> bool:
        """Whether image rows are dropped on the way, so that those of a prompt have to come in one batch."""

    @property
    def positions(self) -> Positions:
        """Whether every layer sees a row at the position it was given, or at its place among those that are left."""

    def decode(self, batch: Sequence[Rows], *, causal: bool = True) -> list[Logits]:
        """Append rows to their sequences; for each ``Rows`` the logits ``(m, n_vocab) float32`` of the rows wanted.

        A row sees those before it in its sequence. Without ``causal`` the rows of an image, which are ``Rows`` of their
        own, see one another as well; text still only looks back.
        """

    def fork(self, source: int, target: int) -> None:
        """Let the empty sequence ``target`` start as ``source`` stands, without computing or copying."""

    def drop(self, sequence: int, start: int | None = None) -> None:
        """Forget positions from ``start`` on, or the whole sequence."""

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from now on."""

    def clear(self) -> None:
        """Forget everything."""

    def length(self, sequence: int) -> int:
        """The position at which text may follow."""

    def layer_share(self, sequence: int) -> float:
        """Of the image rows that entered a sequence, the share that a layer holds, on average over the layers."""


class PlainDecoder(Segment):
    """The whole model in one llama.cpp context, whose key-value cache is shared by all sequences."""

    looks_at_text = prunes = False
    takes_bare = True
    positions: Positions = "original"

    @property
    def chunk(self) -> int:
        """Those computed at once."""
        return self.n_ubatch

    @property
    def n_layer(self) -> int:
        """Layers of the model."""
        return self._model.n_layer

    @property
    def n_vocab(self) -> int:
        """Width of the logits."""
        return self._model.n_vocab

    def decode(self, batch: Sequence[Rows], *, causal: bool = True) -> list[Logits]:
        """``Segment.logits``."""
        return self.logits(batch, causal=causal)

    def layer_share(self, sequence: int) -> float:
        """1: every layer holds every row."""
        self.check_sequence(sequence)
        return 1.0
