"""Several sequences in layer segments: each with rows of its own left, shared, cut back, failed, abandoned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from by_torch import TorchSequence
from cut_models import CutModel, Keep, Prompt, alone, cut_model, held, logits, relative, same
from edge_tokcomp.language.generation import generate
from edge_tokcomp.language.segmented import SegmentedDecoder
from edge_tokcomp.language.token_embedding import TokenEmbedding
from edge_tokcomp.layer_state import LayerState
from edge_tokcomp.methods.layer_steps import read_layer_steps
from edge_tokcomp.tokens import Rows

STEPS = ["spectrum@2:0.5,4:0.25", "pyramid@2:0.6+fastv@4:0.3", "spectrum@0:0.5,4:0"]


@pytest.fixture(scope="module", params=["llama", "qwen2vl"])
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CutModel:
    return cut_model(tmp_path_factory.mktemp("cut"), request.param, [2, 4])


@pytest.fixture(scope="module")
def made(cut: CutModel) -> Iterator[SegmentedDecoder]:
    with cut.segmented(n_sequences=5, n_ctx=512) as decoder:
        yield decoder


@pytest.fixture
def decoder(made: SegmentedDecoder) -> SegmentedDecoder:
    """Five empty sequences, no steps."""
    made.set_steps([])
    return made


@pytest.mark.parametrize("text", STEPS)
def test_sequences_in_one_batch_equal_each_alone(cut: CutModel, decoder: SegmentedDecoder, text: str) -> None:
    """Three sequences with images, while a fourth generates."""
    steps = read_layer_steps(text)
    decoder.set_steps(steps)
    talking = cut.prompt(4, (4, 4), 3, seed=9, sequence=3)
    prompts = [cut.prompt(5 + i, (4 + i, 5), 4 - i, seed=i, sequence=i) for i in range(3)]
    decoder.decode(list(talking))
    first, second, third = talking.words(3)
    decoder.decode([first])
    # What belongs to one sequence need not stand together.
    a, b = list(prompts[0]), [rows for prompt in prompts[1:] for rows in prompt]
    found = decoder.decode([a[0], b[0], second, a[1], *b[1:], a[2]])
    by_sequence = {
        0: [found[0], found[3], found[-1]], 1: [found[1], found[4], found[5]], 2: found[6:9], 3: [found[2]],
    }  # fmt: skip
    words = [word for prompt in prompts for word in prompt.words(1)]
    after = decoder.decode([*words, third])
    for prompt, word, answer in zip(prompts, words, after, strict=False):
        sequence = word.sequence
        expected, rows = alone(cut, steps, [list(prompt), [word]])
        assert same(np.concatenate(by_sequence[sequence]), expected[0])
        assert same(answer, expected[1])
        assert held(decoder, sequence) == rows
    expected, rows = alone(cut, steps, [list(talking), [first], [second], [third]])
    assert same(found[2], expected[2])
    assert same(after[3], expected[3])
    assert held(decoder, 3) == rows
    assert len({tuple(held(decoder, i)) for i in range(4)}) == 4
    assert decoder.room == decoder.n_ctx - sum(held(decoder, i)[0] for i in range(4))


@pytest.mark.parametrize("text", STEPS)
def test_sequences_forked_after_pruning_go_on_by_themselves(
    cut: CutModel, decoder: SegmentedDecoder, text: str
) -> None:
    steps = read_layer_steps(text)
    decoder.set_steps(steps)
    prompt = cut.prompt(6, (5, 6), 5)
    reference = TorchSequence(cut.tiny, steps)
    assert relative(logits(decoder, list(prompt)), reference.feed(prompt.parts)) <= 2e-4
    references = [reference, reference.fork(), reference.fork()]
    for sequence in (1, 2):
        decoder.fork(0, sequence)
    assert [decoder.length(i) for i in range(4)] == [prompt.end] * 3 + [0]
    assert decoder.layer_share(1) == decoder.layer_share(0) < 1
    room = decoder.room
    for turn in range(3):
        words = [prompt.words(3, seed=i, sequence=i)[turn] for i in range(3)]
        expected = np.concatenate([other.feed([word]) for other, word in zip(references, words, strict=True)])
        assert relative(logits(decoder, words), expected) <= 2e-4
    assert decoder.room == room - 9
    decoder.drop(0)
    decoder.drop(1)
    (word,) = Prompt(prompt.parts, prompt.end + 3).words(1, sequence=2)
    assert relative(logits(decoder, [word]), references[2].feed([word])) <= 2e-4
    decoder.drop(2)
    assert decoder.room == decoder.n_ctx


@pytest.mark.parametrize("text", STEPS)
def test_dropping_the_end_of_generated_text_equals_never_having_generated_it(
    cut: CutModel, decoder: SegmentedDecoder, text: str
) -> None:
    steps = read_layer_steps(text)
    decoder.set_steps(steps)
    prompt = cut.prompt(6, (5, 6), 5)
    reference = TorchSequence(cut.tiny, steps)
    reference.feed(prompt.parts)
    decoder.decode(list(prompt))
    before, other = prompt.words(6, seed=1), prompt.words(6, seed=2)
    for word in before:
        decoder.decode([word])
    for word in before[:2]:
        reference.feed([word])
    rows = held(decoder, 0)
    decoder.drop(0, prompt.end + 2)
    assert held(decoder, 0) == [count - 4 for count in rows]
    assert (decoder.length(0), decoder.room) == (prompt.end + 2, decoder.n_ctx - rows[0] + 4)
    for word in other[2:]:
        assert relative(logits(decoder, [word]), reference.feed([word])) <= 2e-4
    decoder.drop(0, prompt.end + 100)
    assert decoder.length(0) == prompt.end + 6
    # Back to the text before the image, and another image.
    lead = len(prompt.parts[0])
    decoder.drop(0, lead)
    assert held(decoder, 0) == [lead] * 3
    assert decoder.layer_share(0) == 1
    parts = cut.prompt(6, (3, 8), 4, seed=5).parts
    expected, _ = alone(cut, steps, [[prompt.parts[0], *parts[1:]]])
    assert decoder.looks_at_text == ("pyramid" in text)
    if not decoder.looks_at_text:  # the text before it was not noted apart from the image
        assert same(logits(decoder, parts[1:]), expected[0][lead:])
    decoder.drop(0)
    assert (decoder.length(0), decoder.room, held(decoder, 0)) == (0, decoder.n_ctx, [0, 0, 0])
    assert same(logits(decoder, [prompt.parts[0], *parts[1:]]), expected[0])


class FaultError(Exception):
    """What a test raises itself."""


@pytest.mark.parametrize("text", ["spectrum@2:0.5,4:0.25", "pyramid@2:0.6,4:0.3", "dart@2:0.5+todre@4:0"])
@pytest.mark.parametrize("where", [0, 1, 2, "step", "later call"])
def test_a_failure_empties_the_sequences_of_its_batch_and_no_other(
    cut: CutModel, monkeypatch: pytest.MonkeyPatch, where: Any, text: str
) -> None:
    steps = read_layer_steps(text)
    with cut.segmented(steps, n_sequences=4, n_ubatch=16) as decoder:
        quiet, forked = cut.prompt(4, (3, 3), 3, seed=1, sequence=0), cut.prompt(6, seed=2, sequence=1)
        decoder.decode([*quiet, *forked])
        decoder.fork(1, 2)
        before = [held(decoder, sequence) for sequence in range(4)]
        touched = [*cut.prompt(6, (5, 5), 4, seed=3, sequence=2).parts[1:], *cut.prompt(5, (4, 4), 2, sequence=3)]
        with monkeypatch.context() as patch:
            fail(patch, decoder, where)
            with pytest.raises(FaultError):
                decoder.decode(touched)
        assert [held(decoder, sequence) for sequence in range(4)] == [before[0], before[1], [0] * 3, [0] * 3]
        assert [decoder.length(sequence) for sequence in range(4)] == [quiet.end, 6, 0, 0]
        assert decoder.room == decoder.n_ctx - before[0][0] - 6
        for segment in decoder._segments:
            assert segment.rows(decoder._spare) == 0
        # All that is left goes on, and what was emptied can be used again.
        decoder.fork(1, 2)
        expected, _ = alone(cut, steps, [[forked.parts[0], *touched[:2]]])
        assert same(np.concatenate(decoder.decode(touched)[:2]), expected[0][6:])
        (word,) = quiet.words(1)
        assert same(logits(decoder, [word]), alone(cut, steps, [list(quiet), [word]])[0][1])


def fail(patch: pytest.MonkeyPatch, decoder: SegmentedDecoder, where: int | str) -> None:
    """Let llama.cpp fail in a segment, at once or in its second call, or a step when it chooses."""
    if where == "step":
        step = decoder._at[4][0][0]
        patch.setattr(type(step), "choose", lambda *_: (_ for _ in ()).throw(FaultError()))
        return
    context = decoder._segments[1 if where == "later call" else where]._context
    calls, decode = [0], context.decode

    def failing(*arguments: Any) -> None:
        calls[0] += 1
        if where != "later call" or calls[0] == 2:
            raise FaultError
        decode(*arguments)

    patch.setattr(context, "decode", failing)


@pytest.mark.parametrize("text", ["spectrum@0:0", "spectrum@2:0.5,4:0", "spectrum@4:0"])
def test_an_image_may_lose_all_its_rows(cut: CutModel, decoder: SegmentedDecoder, text: str) -> None:
    """Alone in its call, beside other sequences, or with text around it; what follows goes on."""
    steps = read_layer_steps(text)
    decoder.set_steps(steps)
    image, words = cut.prompt((4, 4), 5).parts
    other = cut.prompt(3, (4, 5), 4, seed=1, sequence=1)
    references = [TorchSequence(cut.tiny, steps) for _ in range(2)]
    found = decoder.decode([image, *other])
    assert len(found[0]) == 0
    assert relative(np.concatenate(found), references[1].feed(other.parts)) <= 2e-4
    references[0].feed([image])
    layers = {"spectrum@0:0": 0, "spectrum@2:0.5,4:0": (2 + 1) / 6, "spectrum@4:0": 4 / 6}[text]
    assert decoder.layer_share(0) == pytest.approx(layers)
    assert held(decoder, 0)[-1] == 0
    assert decoder.length(0) == words.positions[0]
    for batch in ([words, *other.words(1)], [*Prompt((image, words), int(words.positions[-1]) + 1).words(1)]):
        expected = [references[rows.sequence].feed([rows]) for rows in batch]
        assert relative(logits(decoder, batch), np.concatenate(expected)) <= 2e-4
    decoder.drop(0, int(words.positions[0]))
    assert (decoder.length(0), held(decoder, 0)[-1]) == (words.positions[0], 0)
    expected = TorchSequence(cut.tiny, steps).feed([image, words])
    assert relative(logits(decoder, [words]), expected) <= 2e-4
    decoder.drop(0, 0)
    assert relative(logits(decoder, [image, words]), expected) <= 2e-4


def test_two_steps_at_one_layer_act_one_after_the_other(cut: CutModel, decoder: SegmentedDecoder) -> None:
    even, third = (Keep([2], lambda _, state, by=by: range(0, len(state), by)) for by in (2, 3))
    prompt = cut.prompt(5, (6, 6), 4)
    found = []
    for steps in ([even, third], [third, even], [Keep([2], lambda _, state: range(0, len(state), 6))]):
        decoder.set_steps(steps)
        found.append(logits(decoder, list(prompt)))
        assert held(decoder, 0) == [len(prompt), 9 + 5, 9 + 5]
    assert same(found[0], found[2])
    assert same(found[1], found[2])


@pytest.mark.parametrize("text", ["spectrum@2:0.5", "pyramid@2:0.5"])
def test_rows_of_several_crops_are_told_apart(cut: CutModel, decoder: SegmentedDecoder, text: str) -> None:
    """Crops may change within one ``Rows``, and stand in several."""
    seen: list[LayerState] = []

    def most_of_the_second(_: int, state: LayerState) -> list[int]:
        seen.append(state)
        return [row for row in range(len(state)) if state.crop[row] == 7 or row % 4 == 0]

    step = Keep([2], most_of_the_second)
    parts = cut.prompt(4, (4, 5), (3, 3), 3).parts
    crop = np.repeat([3, 7], [5, len(parts[1]) - 5])
    parts = (parts[0], replace(parts[1], crop=crop), replace(parts[2], crop=np.full(len(parts[2]), 9)), parts[3])
    decoder.set_steps([step])
    expected = TorchSequence(cut.tiny, [step]).feed(parts)
    assert relative(logits(decoder, parts), expected) <= 2e-4
    for state in seen:
        assert state.crop.tolist() == [3] * 5 + [7] * (len(crop) - 5) + [9] * len(parts[2])
        assert (state.image.tolist(), state.text.tolist()) == (
            [*range(4, 4 + len(state))],
            [4 + len(state) + i for i in range(3)],
        )
    steps = read_layer_steps(text)
    decoder.set_steps(steps)
    assert relative(logits(decoder, parts), TorchSequence(cut.tiny, steps).feed(parts)) <= 2e-4


def test_text_is_streamed_abandoned_and_begun_again(cut: CutModel, decoder: SegmentedDecoder) -> None:
    decoder.set_steps(read_layer_steps("fastv@2:0.5"))
    embedding = TokenEmbedding.of(decoder.model)
    prompt = cut.prompt(5, (4, 5), 4, sequence=1)
    whole = generate(decoder, decoder.model, embedding, prompt.parts, max_tokens=12)
    text = whole.text()
    assert (len(whole.tokens), decoder.length(1)) == (12, prompt.end + 11)
    decoder.drop(1)
    half = generate(decoder, decoder.model, embedding, prompt.parts, max_tokens=12)
    begun = "".join(next(half) for _ in range(3))
    assert text.startswith(begun)
    del half
    decoder.drop(1)
    assert (decoder.room, held(decoder, 1)) == (decoder.n_ctx, [0, 0, 0])
    other = cut.prompt(2, (3, 3), 6, seed=8, sequence=1)
    assert generate(decoder, decoder.model, embedding, other.parts, max_tokens=12).text() != text
    decoder.drop(1)
    again = generate(decoder, decoder.model, embedding, prompt.parts, max_tokens=12)
    assert again.text() == text
    # By hand, in torch.
    reference = TorchSequence(cut.tiny, read_layer_steps("fastv@2:0.5"))
    answer, tokens = reference.feed(prompt.parts), []
    for _ in range(12):
        tokens.append(int(answer[-1].argmax()))
        row = cut.tiny.weights["token_embd.weight"][tokens[-1:]]
        answer = reference.feed([Rows(row, np.array([prompt.end + len(tokens) - 1], np.int32))])
    assert tokens == again.tokens
