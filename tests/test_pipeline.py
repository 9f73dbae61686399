"""Many pictures through one model: each answered as alone, in order, whatever becomes of the others."""

from __future__ import annotations

import gc
import io
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from numpy.typing import NDArray
from PIL import Image as Pil

from edge_tokcomp.answers import Answer
from edge_tokcomp.division import Division
from edge_tokcomp.errors import ImageError, TokcompError, UsageError
from edge_tokcomp.images import Image, open_image
from edge_tokcomp.language.sampling import Sampling
from edge_tokcomp.pipeline import Ask
from edge_tokcomp.vlm import VLM, load
from picture_files import pictures

QUESTION = "what is this"


def picture(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["in turns", "beside"])
def model(pair: Pair, home: Path, request: pytest.FixtureRequest) -> Iterator[VLM]:
    with load(pair.lm, pair.mmproj, threads=1, provider="cpu", keep=12, parallel=3) as vlm:
        vlm.division = Division(1, 1, request.param == "beside", "for this test")
        yield vlm


def test_answers_are_those_of_one_at_a_time_in_order(model: VLM) -> None:
    seen = [picture(seed) for seed in range(11)]
    expected = [model.ask(each, QUESTION, max_tokens=5) for each in seen]
    answers = list(model.answer_all(seen, QUESTION, max_tokens=5))
    assert [answer.text for answer in answers if isinstance(answer, Answer)] == expected
    assert len(set(expected)) > 3
    first = answers[0]
    assert isinstance(first, Answer)
    assert (first.tokens_before, first.tokens_after, first.generated_tokens) == (36, 12, 5)
    assert first.timings_ms["encode"] > 0
    assert first.timings_ms["first_token"] >= first.timings_ms["prefill"] > 0
    assert first.images == ()


def test_each_may_be_asked_something_else_and_is_known_by_its_tag(model: VLM) -> None:
    asks = [Ask(f"tag {seed}", picture(seed), f"what is this {'zq ' * seed}") for seed in range(5)]
    expected = [model.ask(ask.picture, ask.question, max_tokens=4) for ask in asks]
    found = list(model.answer_each(asks, max_tokens=4))
    assert [ask.tag for ask, _ in found] == [ask.tag for ask in asks]
    assert [outcome.text for _, outcome in found if isinstance(outcome, Answer)] == expected
    assert all(ask.picture is None for ask, _ in found)


def test_what_cannot_be_read_or_asked_comes_as_its_error_in_its_place(model: VLM, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    answers = list(model.answer_all([picture(0), broken, picture(1), tmp_path / "none.png"], QUESTION, max_tokens=3))
    assert [type(answer).__name__ for answer in answers] == ["Answer", "ImageError", "Answer", "ImageError"]
    assert "broken.png" in str(answers[1])
    asks = [Ask(0, picture(0), QUESTION), Ask(1, picture(1), "<image>"), Ask(2, picture(2), "zq " * 9000)]
    outcomes = [outcome for _, outcome in model.answer_each(asks, max_tokens=3)]
    assert [type(outcome).__name__ for outcome in outcomes] == ["Answer", "UsageError", "TokcompError"]


def test_a_fault_that_is_no_ones_input_is_raised(model: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.encoder, "see", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(model.answer_all([picture(0)], QUESTION))


def test_a_call_that_fails_costs_what_was_in_it_and_not_what_comes_after(
    model: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.ask(picture(8), QUESTION, max_tokens=4)
    plain, calls = model.decoder.decode, iter(range(999))

    def decode(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 2:
            raise TokcompError("llama.cpp cannot decode 3 rows")
        return plain(*arguments, **options)

    monkeypatch.setattr(model.decoder, "decode", decode)
    answers = list(model.answer_all([picture(seed) for seed in range(9)], QUESTION, max_tokens=4))
    failed = [isinstance(answer, TokcompError) for answer in answers]
    assert failed[0]
    assert not failed[-1]
    assert sum(failed) <= 3
    assert isinstance(answers[-1], Answer)
    assert answers[-1].text == expected


def test_nothing_to_ask_passes_through_in_its_place(model: VLM) -> None:
    asks = [Ask(number, picture(number) if number % 3 == 1 else None, QUESTION) for number in range(8)]
    found = list(model.answer_each(asks, max_tokens=9))
    assert [ask.tag for ask, _ in found] == list(range(8))
    assert [isinstance(outcome, Answer) for _, outcome in found] == [number % 3 == 1 for number in range(8)]


def test_pictures_are_taken_no_faster_than_they_are_answered(model: VLM) -> None:
    taken: list[int] = []

    def source() -> Iterator[NDArray[np.uint8]]:
        for number in range(60):
            taken.append(number)
            yield picture(number)

    answers = model.answer_all(source(), QUESTION, max_tokens=3)
    next(answers)
    # Three are answered at once and one waits; two encoded and two decoded lie ready, two more are being made.
    assert len(taken) <= 12
    answers.close()


def test_pictures_are_let_go_once_they_are_encoded(model: VLM) -> None:
    alive: list[weakref.ref[Image]] = []

    def source() -> Iterator[Ask[int]]:
        for number in range(12):
            image = open_image(_png(number))
            alive.append(weakref.ref(image))
            yield Ask(number, image, QUESTION)
            del image

    held = 0
    for _ask, _ in model.answer_each(source(), max_tokens=6):
        gc.collect()
        held = max(held, sum(reference() is not None for reference in alive))
    assert held <= 6  # those that wait for the tower, not those whose text is generated


def test_answers_not_read_to_their_end_end_when_something_else_is_asked(model: VLM) -> None:
    answers = model.answer_each([Ask(seed, picture(seed), QUESTION) for seed in range(9)], max_tokens=5)
    next(answers)
    threads = threading.active_count()
    expected = model.ask(picture(3), QUESTION, max_tokens=5)
    with pytest.raises(UsageError, match="not read to their end"):
        next(answers)
    assert threading.active_count() < threads
    assert model.ask(picture(3), QUESTION, max_tokens=5) == expected
    assert model.decoder.room > model.decoder.n_ctx - 100


def test_stopped_it_begins_nothing_more_and_finishes_what_is_generated(model: VLM) -> None:
    stopped = threading.Event()
    asks = (Ask(seed, picture(seed), QUESTION) for seed in range(200))
    found = []
    for ask, outcome in model.answer_each(asks, max_tokens=5, stopped=stopped.is_set):
        found.append(ask.tag)
        assert isinstance(outcome, Answer)
        stopped.set()
    assert found == list(range(len(found)))
    assert 1 <= len(found) <= 3


def test_texts_are_drawn_as_they_are_alone(model: VLM) -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    seen = [picture(seed) for seed in range(4)]
    expected = [model.ask(each, QUESTION, max_tokens=6, sampling=sampling) for each in seen]
    answers = model.answer_all(seen, QUESTION, max_tokens=6, sampling=sampling)
    assert [answer.text for answer in answers if isinstance(answer, Answer)] == expected


def test_more_at_once_than_the_context_holds_come_to_the_same(pair: Pair, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 9)
    paths = sorted(folder.iterdir())
    with load(pair.lm, pair.mmproj, threads=1, parallel=8, n_ctx=256) as vlm:
        expected = [vlm.answer(path, max_tokens=60) for path in paths]
        for answer, alone in zip(vlm.answer_all(paths, max_tokens=60), expected, strict=True):
            assert isinstance(answer, Answer)
            assert (answer.generated_tokens, answer.finish_reason) == (alone.generated_tokens, alone.finish_reason)
            assert answer.text[:12] == alone.text[:12]  # what rounds otherwise shows in random weights before long


def test_a_number_at_once_that_makes_no_sense_is_refused(pair: Pair) -> None:
    with pytest.raises(UsageError, match="parallel 0 is not a positive number"):
        load(pair.lm, pair.mmproj, parallel=0)
    with pytest.raises(UsageError, match="limit of 256"):
        load(pair.lm, pair.mmproj, threads=1, parallel=256)


def _png(number: int) -> bytes:
    stream = io.BytesIO()
    Pil.fromarray(picture(number)).save(stream, "PNG")
    return stream.getvalue()


def test_an_error_is_what_answer_would_raise(model: VLM, tmp_path: Path) -> None:
    (answer,) = model.answer_all([tmp_path / "none.png"])
    with pytest.raises(ImageError) as raised:
        model.answer(tmp_path / "none.png")
    assert str(answer) == str(raised.value)
