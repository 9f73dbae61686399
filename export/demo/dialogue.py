"""Several questions about one image in one training sequence.

Layout of a sequence: BOS and ``USER: ``, the 576 image rows, then one block a question. A block sees the image and
itself alone and its positions restart where the image ends, so each is trained exactly as it is asked at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .model import GRID, DemoVLM
from .questions import Question, ask_all
from .scenes import Scene, Thing
from .vocabulary import AFTER_IMAGE, BEFORE_IMAGE, BOS, EOS, Vocabulary

TEXT = 224
"""Text rows a sequence; questions that do not fit are left out."""

EACH = {"existence": 2, "shape": 2, "count": 4, "digit": 2, "relation": 2}
"""Questions of a kind about one scene, if it allows so many; 1 for the others."""

EMPHASIS = {"digit": 2.0, "counting": 1.5}
"""Weight of the tasks that are learnt last; 1 for the others."""


@dataclass(frozen=True, eq=False)
class Dialogue:
    """``tokens``, ``targets`` (-100 where nothing is learnt), ``positions``, ``block`` each ``(B, TEXT)``;
    ``weight`` of each target; ``questions`` with the span of their answers.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    block: Tensor
    weight: Tensor
    questions: list[list[tuple[Question, int, int]]]


def build(vocabulary: Vocabulary, scenes: Sequence[Sequence[Thing]], rng: np.random.Generator) -> Dialogue:
    """Draw questions about every scene and lay them out."""
    start = 1 + len(vocabulary.encode(BEFORE_IMAGE)) + GRID * GRID
    shape = (len(scenes), TEXT)
    tokens, block = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    targets, positions = np.full(shape, -100, np.int64), np.full(shape, start, np.int64)
    weight = np.zeros(shape, np.float32)
    asked: list[list[tuple[Question, int, int]]] = []
    for row, things in enumerate(scenes):
        questions = ask_all(Scene(np.empty(0, np.uint8), tuple(things), np.empty(0, np.int8)), rng, each=EACH)
        order = [0, *(1 + rng.permutation(len(questions) - 1))]
        spans, at = [], 0
        for number in order:
            question = questions[number]
            prompt = vocabulary.encode(AFTER_IMAGE.format(question=question.text))
            answer = [*vocabulary.encode(f" {question.answer}"), EOS]
            length = len(prompt) + len(answer) - 1
            if at + length > TEXT:
                continue
            tokens[row, at : at + length] = [*prompt, *answer[:-1]]
            first = at + len(prompt) - 1
            targets[row, first : at + length] = answer
            weight[row, first : at + length] = EMPHASIS.get(question.task, 1.0) * len(answer) ** -0.5
            positions[row, at : at + length] = start + np.arange(length)
            block[row, at : at + length] = number
            spans.append((question, first, at + length))
            at += length
        asked.append(spans)
    return Dialogue(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(positions),
        torch.from_numpy(block),
        torch.from_numpy(weight),
        asked,
    )


def hidden_states(
    model: DemoVLM, vocabulary: Vocabulary, features: Tensor, dialogue: Dialogue, order: Tensor | None = None
) -> Tensor:
    """Final hidden states ``(B, TEXT, width)`` of the text rows, image features ``(B, 1 + N, D)`` in front of them.

    ``order (N,)``: the order of the image rows, raster by default. Training shuffles all of them, so that the language
    model reads places from the features, which carry them, and not from row numbers, which say little in a large VLM.
    """
    batch = len(features)
    lead = torch.tensor([BOS, *vocabulary.encode(BEFORE_IMAGE)])
    image = model.mm(features[:, 1:] if order is None else features[:, 1:][:, order])
    rows = torch.cat([
        model.lm.token_embd(lead).expand(batch, -1, -1).to(image.dtype), image,
        model.lm.token_embd(dialogue.tokens).to(image.dtype),
    ], 1)  # fmt: skip
    front = rows.shape[1] - TEXT
    positions = torch.cat([torch.arange(front).expand(batch, -1), dialogue.positions], 1)
    block, row = dialogue.block, torch.arange(TEXT)
    inside = (block[:, :, None] == block[:, None, :]) & (row[:, None] >= row)
    mask = torch.cat([torch.ones(batch, TEXT, front, dtype=torch.bool), inside], 2)[:, None]
    bias = torch.zeros(mask.shape, dtype=image.dtype).masked_fill_(~mask, float("-inf"))
    return model.lm(rows, positions, front, bias)[:, front:]


def dialogue_loss(model: DemoVLM, states: Tensor, dialogue: Dialogue) -> tuple[Tensor, Tensor]:
    """Weighted loss of the answers, and whether each target was predicted ``(B, TEXT) bool``."""
    learnt = dialogue.targets >= 0
    logits = model.lm.output(states[learnt]).float()
    error = F.cross_entropy(logits, dialogue.targets[learnt], reduction="none")
    weight = dialogue.weight[learnt]
    right = torch.ones_like(learnt)
    right[learnt] = logits.argmax(-1) == dialogue.targets[learnt]
    return (error * weight).sum() / weight.sum(), right


def scores(dialogue: Dialogue, right: Tensor) -> dict[str, list[bool]]:
    """Per kind of question, which were answered exactly right."""
    result: dict[str, list[bool]] = {}
    for row, spans in enumerate(dialogue.questions):
        for question, start, stop in spans:
            result.setdefault(question.kind, []).append(bool(right[row, start:stop].all()))
    return result
