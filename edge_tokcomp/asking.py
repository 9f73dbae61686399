"""Questions about encoded pictures to the language model: one at a time, or what a scheduler makes of many."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol
from weakref import WeakSet

from .answers import Answer, AnswerStream, EncodedImage, Facts
from .engines import Engine
from .errors import TokcompError
from .image_rows import ImageRows
from .language.decoder import Decoder
from .language.generation import Generation, generate
from .language.model import LanguageModel
from .language.prompt import ChatPrompt, chat_prompt
from .language.requests import Request
from .language.sampling import Sampling
from .language.scheduler import Scheduler
from .language.token_embedding import TokenEmbedding
from .prompt_rows import prompt_parts, rows_of
from .tokens import Rows

IMAGE_STAGES = ("decode", "preprocess", "encode", "compress")

_PREFIX, _ANSWER = 0, 1
"""Sequences: the prompt up to and including the last image, which is kept for the next question; the answer."""


class Unfinished(Protocol):
    """Answers that are not read to their end yet."""

    def end(self) -> None:
        """Another question comes."""


class Asker:
    """The language half of a model: ``engine`` says how pictures stand in a prompt. Not for several threads at once,
    but for ``request``."""

    def __init__(
        self, model: LanguageModel, decoder: Decoder, embedding: TokenEmbedding, engine: Engine, *, seed: int
    ) -> None:
        self.model, self.decoder, self.embedding, self.engine, self.seed = model, decoder, embedding, engine, seed
        self._held: tuple[object, ...] | None = None
        self._timed: WeakSet[object] = WeakSet()
        self._unfinished: Unfinished | None = None
        self._closed = False

    def written(self, question: str, images: int) -> ChatPrompt:
        """The prompt as the model's template writes it; raises as ``chat_prompt`` does."""
        return chat_prompt(self.model, question, images, self.engine.markers, self.engine.written)

    def answer(
        self, images: Sequence[EncodedImage], question: str, sampling: Sampling | None, max_tokens: int,
        stop: Sequence[str],
    ) -> Answer:  # fmt: skip
        """The answer, generated to its end."""
        prompt, prompt_tokens, prefill = self._prompt(images, question)
        facts = self._facts(images, prompt_tokens)
        try:
            generation = self._generate(prompt, sampling, max_tokens, stop)
            text = generation.text()
            share = self.decoder.layer_share(_ANSWER)
        finally:
            self.decoder.drop(_ANSWER)
        return facts.answer(
            text, generation.finish_reason or "stop", len(generation.tokens), share,
            prefill_s=prefill + generation.first_token_s, generate_s=generation.generate_s, images=tuple(images),
        )  # fmt: skip

    def stream(
        self, images: Sequence[EncodedImage], question: str, sampling: Sampling | None, max_tokens: int,
        stop: Sequence[str],
    ) -> AnswerStream:  # fmt: skip
        """Its text as it comes."""
        prompt, _, _ = self._prompt(images, question)
        stream = AnswerStream(self._generate(prompt, sampling, max_tokens, stop), partial(self.decoder.drop, _ANSWER))
        self._unfinished = stream
        return stream

    def scheduler(self) -> Scheduler:
        """For many questions at once; what was held for further ones is forgotten."""
        self.forget()
        return Scheduler(self.decoder, self.model, self.embedding, causal=self.engine.causal)

    def request(
        self, images: Sequence[EncodedImage], question: str, sampling: Sampling | None, max_tokens: int,
        stop: Sequence[str],
    ) -> tuple[Request, Facts]:  # fmt: skip
        """What a scheduler is asked, and what is known of the answer by then."""
        lead, *others = self._parts(images, question)
        request = Request(
            rows_of([lead], 0, 0), lead.tokens.tobytes(), rows_of(others, lead.advance, 0),
            sampling or Sampling(seed=self.seed), max_tokens, tuple(stop),
        )  # fmt: skip
        return request, self._facts(images, request.length)

    def watch(self, unfinished: Unfinished) -> None:
        """Answers that end when another question comes."""
        self._unfinished = unfinished

    def forget(self) -> None:
        """Hold nothing for further questions. Raises ``ValueError`` once closed."""
        self._check_open()
        self._end_unfinished()
        self._held = None

    def close(self) -> None:
        """Answer nothing more."""
        self._end_unfinished()
        self._closed = True

    def _prompt(self, images: Sequence[EncodedImage], question: str) -> tuple[list[Rows], int, float]:
        """Bring what of the prompt can be kept for further questions into the language model: up to the last image, or
        up to the first where layer steps look at the question. The rest, rows of the whole, and seconds spent."""
        self._check_open()
        self._end_unfinished()
        started = time.perf_counter()
        parts = self._parts(images, question)
        needed = sum(map(len, parts)) + 1
        if needed > self.decoder.n_ctx:
            raise TokcompError(
                f"image and prompt need {needed} rows of context, there are {self.decoder.n_ctx}; "
                "keep fewer image tokens, ask less, or raise n_ctx (--ctx)"
            )
        kept = 1 if self.decoder.looks_at_text else len(parts) - 1
        pictures: Sequence[EncodedImage] = () if self.decoder.looks_at_text else images
        key = (*(text.tokens.tobytes() for text in parts[:kept:2]), *pictures)
        if key != self._held:
            self._held = None
            self.decoder.clear()
            self.decoder.decode(rows_of(parts[:kept], 0, _PREFIX), causal=self.engine.causal)
            self._held = key
        self.decoder.drop(_ANSWER)
        self.decoder.fork(_PREFIX, _ANSWER)
        start = sum(part.advance for part in parts[:kept])
        return rows_of(parts[kept:], start, _ANSWER), needed - 1, time.perf_counter() - started

    def _parts(self, images: Sequence[EncodedImage], question: str) -> list[ImageRows]:
        """The prompt: text and images in turn, text first and last."""
        pieces = self.written(question, len(images)).around([image.around for image in images]).tokenize(self.model)
        return prompt_parts(self.embedding, pieces, images)

    def _facts(self, images: Sequence[EncodedImage], prompt_tokens: int) -> Facts:
        stages = dict.fromkeys(IMAGE_STAGES, 0.0)
        for image in images:
            # What the tower gave is shared by all that was made of it, under any method and for any question.
            for stage in IMAGE_STAGES:
                if (image if stage == "compress" else image.tokens) not in self._timed:
                    stages[stage] += image.timings_ms[stage]
            self._timed.update((image, image.tokens))
        plans, shares = tuple(image.plan for image in images), tuple(image.share for image in images)
        return Facts(plans, shares, stages, prompt_tokens)

    def _generate(
        self, prompt: Sequence[Rows], sampling: Sampling | None, max_tokens: int, stop: Sequence[str]
    ) -> Generation:
        sampling = sampling or Sampling(seed=self.seed)
        return generate(
            self.decoder, self.model, self.embedding, prompt, sampling, max_tokens=max_tokens, stop=stop,
            causal=self.engine.causal,
        )  # fmt: skip

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the model is closed; load it again")

    def _end_unfinished(self) -> None:
        """Answers that nobody reads to their end must not hold sequences; going on with them raises."""
        if self._unfinished is not None:
            self._unfinished.end()
            self._unfinished = None
