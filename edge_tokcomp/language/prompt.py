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
    ``question``: the user's words in it, which are text whatever they spell.
    """

    pieces: tuple[str, ...]
    form: str
    reason: str
    question: str = ""

    def around(self, texts: Sequence[tuple[str, str]]) -> ChatPrompt:
        """The same with text right before and after each image, which is read as one with what stands there."""
        pieces = list(self.pieces)
        for number, (before, after) in enumerate(texts):
            pieces[number] += before
            pieces[number + 1] = after + pieces[number + 1]
        return replace(self, pieces=tuple(pieces))

    def tokenize(self, model: LanguageModel) -> list[NDArray[np.int32]]:
        """Token ids of each piece ``(n,) int32``; BOS once, at the start, where the model is configured for it."""
        bos = model.bos_text
        written = bool(bos) and self.pieces[0].startswith(bos)
        return [self._tokens(model, piece, index == 0 and not written) for index, piece in enumerate(self.pieces)]

    def _tokens(self, model: LanguageModel, piece: str, add_special: bool) -> NDArray[np.int32]:
        """Token ids of one piece, in one go unless the question spells a control token such as ``</s>``."""
        words = self.question.strip()
        if words and words in piece:
            obeyed, plain = (
                model.tokenize(words, add_special=False, parse_special=special) for special in (True, False)
            )
            if not np.array_equal(obeyed, plain):
                before, after = piece.split(words, 1)
                return np.concatenate([
                    model.tokenize(before, add_special=add_special, parse_special=True), plain,
                    model.tokenize(after, add_special=False, parse_special=True),
                ])  # fmt: skip
        return model.tokenize(piece, add_special=add_special, parse_special=True)


def chat_prompt(
    model: LanguageModel, question: str, n_images: int, markers: Sequence[str] = ("<image>",), own_line: bool = True
) -> ChatPrompt:
    """Write the user's turn, images first, and the start of the answer; the result is split at the images.

    ``markers``: what the model's template may write for an image (``<image>``, ``<|image_pad|>``,
    ``<start_of_image>``); it is taken out of the text. The first is put there where the template takes no image, each
    with ``own_line`` on a line of its own. A file without a template gets the form of LLaVA-1.5.

    Raises ``UsageError`` when the question holds a marker, ``TokcompError`` when the template fails in every form.
    """
    if n_images < 0 or not all(markers) or not markers:
        raise ValueError(f"n_images {n_images} must be 0 or more and no marker of {markers!r} empty")
    for marker in markers:
        if marker in question:
            raise UsageError(f"the question contains {marker!r}, which stands for an image; write it differently")
    if not model.chat_template:
        text = f"USER: {_marked(question, n_images, markers[0], own_line)} ASSISTANT:"
        reason = "the model file has no chat template; LLaVA-1.5's form is used"
        return _split(text, markers[0], "vicuna", reason, question)
    faults: list[str] = []
    for form, content in _forms(question, n_images, markers[0], own_line):
        text, fault = _render(model, content)
        marker = next((marker for marker in markers if marker in text), markers[0])
        fault = fault or _fault(text, question, n_images, marker)
        if not fault:
            reason = "; ".join(faults) or "the model file's chat template takes it"
            return _split(text, marker, form, reason, question)
        faults.append(f"{form}: {fault}")
    raise TokcompError(
        f"{model.path}: its chat template cannot write a question with {n_images} images ({'; '.join(faults)}); "
        "use a model file with a working tokenizer.chat_template"
    )


def _marked(question: str, n_images: int, marker: str, own_line: bool) -> str:
    """Images before the question; LLaVA models are trained on lines of their own."""
    return (marker + "\n" * own_line) * n_images + question


def _forms(question: str, n_images: int, marker: str, own_line: bool) -> Iterator[tuple[str, Any]]:
    if n_images:
        parts: list[dict[str, str]] = [{"type": "image"} for _ in range(n_images)]
        yield "image parts", [*parts, {"type": "text", "text": question}]
    yield "string", _marked(question, n_images, marker, own_line)
    yield "text parts", [{"type": "text", "text": _marked(question, n_images, marker, own_line)}]


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


def _fault(text: str, question: str, n_images: int, marker: str) -> str:
    """Why ``text`` is no faithful prompt, ``""`` if it is."""
    if text.count(marker) != n_images:
        return f"the template writes {marker!r} {text.count(marker)} times for {n_images} images"
    if text.count(question.strip()) < 1:
        return "the template leaves the question out"
    if "'type':" in text and "'type':" not in question:
        return "the template takes no list of parts"
    return ""


def _split(text: str, marker: str, form: str, reason: str, question: str) -> ChatPrompt:
    logger.debug("chat prompt written as %s (%s)", form, reason)
    return ChatPrompt(tuple(text.split(marker)), form, reason, question)
