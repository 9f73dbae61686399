"""What goes into an answer and what comes out: an encoded picture, the answer, its pieces as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from PIL import Image as Pil

from .dynamic import Share
from .errors import UsageError
from .families.base import Part, Pixels
from .image_rows import ImageRows
from .images import Image
from .methods import Method
from .tokens import Ints, Plan, VisionTokens
from .variant import TowerVariant


class Shown:
    """A picture as an engine is shown it; ``prepare`` makes its crops, where the engine leaves that to us."""

    def __init__(self, picture: Pil.Image, prepare: Callable[[Pil.Image], Pixels] | None = None) -> None:
        self.picture, self._prepare = picture, prepare

    @cached_property
    def crops(self) -> Pixels:
        """As the tower usually takes them, made when first asked for."""
        if self._prepare is None:
            raise ValueError("this engine makes the crops itself")
        return self._prepare(self.picture)


@dataclass(frozen=True, eq=False)
class Look:
    """What an engine says of a picture: its ``tokens``; ``parts``: the marker text around and between its crops, and
    which crops' rows go where; ``owner``: of each crop ``(N,) int64``, the cell that each of its patches was merged
    into, where the tower merges. ``timings_ms``: ``preprocess``, ``encode``."""

    tokens: VisionTokens
    parts: tuple[Part, ...]
    owner: tuple[Ints, ...] | None
    timings_ms: dict[str, float]


@dataclass(frozen=True, eq=False)
class SeenImage:
    """A picture that was looked at.

    ``tokens``, ``parts``, ``owner``: see ``Look``. ``variant``: how the tower was run, which is as a method wants it
    under a budget: ``asked`` for them.
    ``timings_ms``: ``decode`` (file to pixels), ``preprocess``, ``encode`` (tower).
    """

    image: Image
    tokens: VisionTokens
    parts: tuple[Part, ...]
    timings_ms: dict[str, float]
    variant: TowerVariant
    owner: tuple[Ints, ...] | None
    asked: tuple[Method, int | float]

    @property
    def around(self) -> tuple[str, str]:
        """The text of ``parts`` before the first crop and after the last: read as one with that around the picture."""
        texts = [part if isinstance(part, str) else "" for part in self.parts]
        return texts[0], texts[-1] if len(texts) > 1 else ""

    @property
    def inner(self) -> tuple[Part, ...]:
        """``parts`` without the text around."""
        start = isinstance(self.parts[0], str)
        stop = len(self.parts) - (len(self.parts) > 1 and isinstance(self.parts[-1], str))
        return self.parts[start:stop]


@dataclass(frozen=True, eq=False)
class EncodedImage(SeenImage):
    """A picture encoded and compressed: ask as often as you like, the tower runs once.

    ``method``, ``keep``: how it was compressed; ``question``: for what, if the method looks at the question, else None.
    Asked another question, such a picture is compressed anew.
    ``rows``: what enters the language model, the family's marker text between crops included.
    ``timings_ms`` has ``compress`` too (scoring, selection and projector).
    ``share``: how ``keep`` came about where a budget is shared among pictures (``dynamic``).
    """

    plan: Plan
    rows: ImageRows
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
    Of answers that were made several at once the last three include the others' work.
    ``plans``, ``shares``: of each image what was kept, and how a shared budget was divided. ``images``: themselves;
    none of answers that were made several at once, which would hold all their arrays.
    """

    text: str
    finish_reason: str
    tokens_before: int
    tokens_after: int
    layer_tokens: float
    prompt_tokens: int
    generated_tokens: int
    timings_ms: dict[str, float]
    plans: tuple[Plan, ...] = field(repr=False, default=())
    shares: tuple[Share | None, ...] = field(repr=False, default=())
    images: tuple[EncodedImage, ...] = field(repr=False, default=())


@dataclass(frozen=True)
class Facts:
    """What is known of an answer before it is generated; ``stages_ms``: of its images."""

    plans: tuple[Plan, ...]
    shares: tuple[Share | None, ...]
    stages_ms: dict[str, float]
    prompt_tokens: int

    def answer(
        self, text: str, finish_reason: str, generated: int, layer_share: float, *, prefill_s: float,
        generate_s: float, images: tuple[EncodedImage, ...] = (),
    ) -> Answer:  # fmt: skip
        """With what came of it."""
        timings = {**self.stages_ms, "prefill": prefill_s * 1e3}
        timings["first_token"] = sum(timings.values())
        timings["generate"] = generate_s * 1e3
        after = sum(map(len, self.plans))
        return Answer(
            text.strip(), finish_reason, sum(plan.before for plan in self.plans), after, after * layer_share,
            self.prompt_tokens, generated, timings, self.plans, self.shares, images,
        )  # fmt: skip


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
