"""What goes into an answer and what comes out: an encoded picture, the answer, its pieces as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .dynamic import Share
from .errors import UsageError
from .images import Image
from .methods import Method
from .tokens import Ints, Plan, VisionTokens
from .variant import TowerVariant


@dataclass(frozen=True, eq=False)
class SeenImage:
    """A picture the tower has run on.

    ``parts``: the family's marker text for it, and crop numbers where a crop's rows go. ``variant``: how the tower was
    run; ``owner (crops, N) int64``: the cell that each patch of a crop was merged into, where it merges.
    ``timings_ms``: ``decode`` (file to pixels), ``preprocess``, ``encode`` (tower).
    """

    image: Image
    tokens: VisionTokens
    parts: tuple[str | int, ...]
    timings_ms: dict[str, float]
    variant: TowerVariant
    owner: Ints | None


@dataclass(frozen=True, eq=False)
class EncodedImage(SeenImage):
    """A picture encoded and compressed: ask as often as you like, the tower runs once.

    ``method``, ``keep``: how it was compressed; ``question``: for what, if the method looks at the question, else None.
    Asked another question, such a picture is compressed anew.
    ``rows (n, width) float32``: what enters the language model, the family's marker text around crops included;
    ``crop (n,) int64``: the crop each is of, -1 for that text.
    ``timings_ms`` has ``compress`` too (scoring, selection and projector).
    ``share``: how ``keep`` came about where a budget is shared among pictures (``dynamic``).
    """

    plan: Plan
    rows: NDArray[np.float32]
    crop: Ints
    method: Method
    keep: int | float
    question: str | None
    share: Share | None = None


@dataclass(frozen=True)
class Answer:
    """Text and how it came about.

    ``finish_reason``: ``stop``, ``length`` (``max_tokens``) or ``context`` (no room left).
    ``layer_tokens``: image tokens that a layer of the language model held, on average; ``tokens_after`` enter it.
    ``timings_ms``: the stages of every image, 0 for one that was encoded for an earlier question; ``prefill`` (prompt
    and image rows to the first logits), ``first_token`` (all of these together: what a person waits for), ``generate``.
    """

    text: str
    finish_reason: str
    tokens_before: int
    tokens_after: int
    layer_tokens: float
    prompt_tokens: int
    generated_tokens: int
    timings_ms: dict[str, float]
    images: tuple[EncodedImage, ...] = field(repr=False, default=())


class AnswerStream(Iterator[str]):
    """The pieces of one answer, until it ends or another question takes its place in the language model."""

    def __init__(self, pieces: Iterator[str], drop: Callable[[], None]) -> None:
        self._pieces = stripped(pieces)
        self._drop = drop
        self._state: Literal["open", "done", "ended"] = "open"

    def __next__(self) -> str:
        if self._state == "ended":
            raise UsageError(
                "this answer was not read to its end before another question was asked or the model closed; ask again"
            )
        try:
            return next(self._pieces)
        except BaseException:
            self._close("done")
            raise

    def end(self) -> None:
        """Another question comes."""
        self._close("ended")

    def close(self) -> None:
        """Read no further."""
        self._close("done")

    def _close(self, state: Literal["done", "ended"]) -> None:
        if self._state == "open":
            self._state, self._pieces = state, iter(())
            self._drop()


def stripped(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces without the white space at either end of the whole, which ``answer`` takes off too."""
    held, started = "", False
    for piece in pieces:
        text = held + piece if started else (held + piece).lstrip()
        shown = text.rstrip()
        held = text[len(shown) :]
        if shown:
            started = True
            yield shown
