"""The demo model's captions of 500 scenes: many at once against one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_tokcomp.asking import Asker
from edge_tokcomp.export.demo.scenes import draw_scene
from edge_tokcomp.language.requests import Request
from edge_tokcomp.vlm import CAPTION_PROMPT, load

SCENES = 500
_ROUNDING = 0.1
"""Of logits of about 10: quantised products of one row and of many round otherwise."""


def alone(asker: Asker, request: Request, count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of a request that has the decoder to itself, and how far ahead of the next each was."""
    decoder, tokens, margins = asker.decoder, [], []
    decoder.clear()
    decoder.decode(list(request.prefix))
    rows = [*request.rows[:-1], type(request.rows[-1])(
        request.rows[-1].embeddings, request.rows[-1].positions, 0, None, request.rows[-1].crop, request.rows[-1].tokens
    )]  # fmt: skip
    logits: NDArray[np.float32] = decoder.decode(rows)[-1][-1]
    for _ in range(count):
        best = np.sort(logits)[-2:]
        tokens.append(int(logits.argmax()))
        margins.append(float(best[1] - best[0]))
        if asker.model.is_end(tokens[-1]):
            break
        logits = decoder.decode([asker.embedding.rows(tokens[-1:], decoder.length(0), 0)])[0][-1]
    return tokens, margins


def at_once(asker: Asker, requests: Sequence[Request]) -> list[list[int]]:
    """Their tokens, from one scheduler."""
    scheduler, found = asker.scheduler(), {}
    tickets = [scheduler.submit(request) for request in requests]
    while scheduler.busy:
        found |= {completion.ticket: list(completion.tokens) for completion in scheduler.step()}
    return [found[ticket] for ticket in tickets]


@pytest.mark.slow
def test_captions_made_at_once_differ_only_where_two_tokens_are_as_good(capsys: pytest.CaptureFixture[str]) -> None:
    margins = []
    with load(keep=64, parallel=16) as vlm:
        images = [vlm.encode(draw_scene((9000, 5, number), "test").image) for number in range(SCENES)]
        requests = [vlm.asker.request([image], CAPTION_PROMPT, None, 96, ())[0] for image in images]
        together = at_once(vlm.asker, requests)
        for request, tokens in zip(requests, together, strict=True):
            expected, ahead = alone(vlm.asker, request, 96)
            if tokens != expected:
                place = next(i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b)
                margins.append(ahead[place])
    with capsys.disabled():
        print(f"\n{len(margins)} of {SCENES} captions differ; by how much the token was ahead: {sorted(margins)}")  # noqa: T201
    assert len(margins) <= SCENES // 20
    assert max(margins, default=0.0) < _ROUNDING
