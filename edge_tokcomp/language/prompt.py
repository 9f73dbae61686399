"""The chat prompt around the images, written by the model file's own chat template.

Templates differ in what they take: a list of parts, an image among them; a plain string; or a list of text parts only.
Each form is tried in that order, and the first whose output holds question and images once is used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from numpy.typing import NDArray

from ..errors import TokcompError, UsageError
from .model import LanguageModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatPrompt:
    """Text around the images: ``pieces`` is one longer than the number of images, image i lies before piece i + 1.

    ``form``: how it was written, ``"image parts"``, ``"string"``, ``"text parts"`` or ``"vicuna"``; ``reason``: why.
    ``question``: the user's words in it, which are text whatever they spell; ``place``: the piece they are in, and
    where in it they begin.
    """

    pieces: tuple[str, ...]
    form: str
    reason: str
    question: str = ""
    place: tuple[int, int] = (-1, 0)

    def around(self, texts: Sequence[tuple[str, str]]) -> ChatPrompt:
        """The same with text right before and after each image, which is read as one with what stands there."""
        pieces, (asked, start) = list(self.pieces), self.place
        for number, (before, after) in enumerate(texts):
            pieces[number] += before
            pieces[number + 1] = after + pieces[number + 1]
            start += len(after) * (asked == number + 1)
        return replace(self, pieces=tuple(pieces), place=(asked, start))

    def tokenize(self, model: LanguageModel) -> list[NDArray[np.int32]]:
        """Token ids of each piece ``(n,) int32``; BOS once, at the start, where the model is configured for it."""
        bos = model.bos_text
        written = bool(bos) and self.pieces[0].startswith(bos)
        return [self._tokens(model, index, index == 0 and not written) for index in range(len(self.pieces))]

    def _tokens(self, model: LanguageModel, index: int, add_special: bool) -> NDArray[np.int32]:
        """Token ids of one piece, in one go unless the question spells a control token such as ``</s>``."""
        piece, (asked, start) = self.pieces[index], self.place
        if index == asked:
            obeyed, plain = (
                model.tokenize(self.question, add_special=False, parse_special=special) for special in (True, False)
            )
            if not np.array_equal(obeyed, plain):
                before, after = piece[:start], piece[start + len(self.question) :]
                return np.concatenate([
                    model.tokenize(before, add_special=add_special, parse_special=True), plain,
                    model.tokenize(after, add_special=False, parse_special=True),
                ])  # fmt: skip
        return model.tokenize(piece, add_special=add_special, parse_special=True)


def chat_prompt(
    model: LanguageModel, question: str, n_images: int, markers: Sequence[str] = ("<image>",),
    written: str = "<image>\n",
) -> ChatPrompt:  # fmt: skip
    """Write the user's turn, images first, and the start of the answer; the result is split at the images.

    ``markers``: what the model's template may write for an image (``<image>``, ``<|image_pad|>``,
    ``<start_of_image>``); it is taken out of the text. ``written``: what is put there for each image where the template
    takes none, the first marker within. A file without a template gets the form of LLaVA-1.5.

    Raises ``UsageError`` when the question holds a marker, ``TokcompError`` when the template fails in every form.
    """
    if n_images < 0 or not all(markers) or not markers or markers[0] not in written:
        raise ValueError(f"{n_images} images, markers {markers!r} and {written!r} do not go together")
    for marker in markers:
        if marker in question:
            raise UsageError(f"the question contains {marker!r}, which stands for an image; write it differently")
    if not model.chat_template:
        text = f"USER: {written * n_images}{_QUESTION} ASSISTANT:"
        reason = "the model file has no chat template; LLaVA-1.5's form is used"
        return _split(text, markers[0], "vicuna", reason, question)
    faults: list[str] = []
    for form, content in _forms(n_images, written):
        text, fault = _render(model, content)
        marker = next((marker for marker in markers if marker in text), markers[0])
        fault = fault or _fault(text, n_images, marker)
        if not fault:
            reason = "; ".join(faults) or "the model file's chat template takes it"
            return _split(text, marker, form, reason, question)
        faults.append(f"{form}: {fault}")
    raise TokcompError(
        f"{model.path}: its chat template cannot write a question with {n_images} images ({'; '.join(faults)}); "
        "use a model file with a working tokenizer.chat_template"
    )


_QUESTION = "\uf8ffquestion\uf8ff"
"""Stands for the user's words while the template writes, so that they are found again whatever they spell."""


def _forms(n_images: int, written: str) -> Iterator[tuple[str, Any]]:
    if n_images:
        parts: list[dict[str, str]] = [{"type": "image"} for _ in range(n_images)]
        yield "image parts", [*parts, {"type": "text", "text": _QUESTION}]
    yield "string", written * n_images + _QUESTION
    yield "text parts", [{"type": "text", "text": written * n_images + _QUESTION}]


def _render(model: LanguageModel, content: Any) -> tuple[str, str]:
    """The template's text and ``""``, or ``""`` and why it failed."""
    messages: Any = [{"role": "user", "content": content}]
    try:
        return _formatter(model.chat_template or "", model.eos_text, model.bos_text)(messages=messages).prompt, ""
    # Templates are programs from outside: a wrong form of content shows as any of these.
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as fault:
        return "", " ".join(f"{type(fault).__name__} {fault}".split())


@lru_cache(maxsize=4)
def _formatter(template: str, eos: str, bos: str) -> Jinja2ChatFormatter:
    """Compiled once a model: compiling takes longer than a small model's prefill."""
    return Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)


def _fault(text: str, n_images: int, marker: str) -> str:
    """Why ``text`` is no faithful prompt, ``""`` if it is."""
    if text.count(marker) != n_images:
        return f"the template writes {marker!r} {text.count(marker)} times for {n_images} images"
    if text.count(_QUESTION) != 1:
        return f"the template writes the question {text.count(_QUESTION)} times"
    if "'type':" in text:
        return "the template takes no list of parts"
    return ""


def _split(text: str, marker: str, form: str, reason: str, question: str) -> ChatPrompt:
    logger.debug("chat prompt written as %s (%s)", form, reason)
    pieces, words = text.split(marker), question.strip()
    asked = next(number for number, piece in enumerate(pieces) if _QUESTION in piece)
    start = pieces[asked].index(_QUESTION)
    pieces[asked] = pieces[asked].replace(_QUESTION, words)
    return ChatPrompt(tuple(pieces), form, reason, words, (asked, start))
