"""The NumPy language model against llama.cpp on the bundled model, and what dropping rows does in it."""

from __future__ import annotations

import numpy as np
import pytest

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.export.demo.questions import ask_all
from edge_tokcomp.export.demo.scenes import draw_scene
from edge_tokcomp.language.prompt import chat_prompt
from edge_tokcomp.layer_state import LayerState
from edge_tokcomp.methods.layer_step import LayerStep
from edge_tokcomp.methods.layer_steps import read_layer_step
from edge_tokcomp.models import DEMO_MMPROJ
from edge_tokcomp.vlm import load
from reference_language import Prompt, ReferenceLanguage


@pytest.fixture(scope="module")
def vlm():
    with load(threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def reference(vlm):
    return ReferenceLanguage(vlm.lm)


def prompt_of(vlm, encoded, question: str) -> Prompt:
    lead, text = (vlm.embedding.lookup(piece) for piece in chat_prompt(vlm.model, question, 1).tokenize(vlm.model))
    return Prompt(lead, encoded.rows.embeddings, np.zeros(len(encoded.rows), np.int64), text)


def said(vlm, tokens: list[int]) -> str:
    return vlm.model.detokenize(np.array([t for t in tokens if not vlm.model.is_end(t)], np.int32)).strip()


def test_greedy_answers_equal_those_of_llama_cpp(vlm, reference):
    ends = [token for token in range(len(reference.table)) if vlm.model.is_end(token)]
    for seed in range(2):
        scene = draw_scene((31, seed), "validation")
        encoded = vlm.encode(scene.image)
        for question in ask_all(scene, np.random.default_rng(seed), vary=False):
            tokens, seen = reference.generate(prompt_of(vlm, encoded, question.text), [], ends, 96)
            assert said(vlm, tokens) == vlm.ask(encoded, question.text)
            assert seen == [576] * reference.depth


def test_rows_dropped_before_the_first_layer_are_rows_that_never_came(vlm, reference):
    encoded = vlm.encode(draw_scene((31, 5), "validation").image)
    prompt = prompt_of(vlm, encoded, "Describe the image.")
    step = read_layer_step("spectrum@0:0.3")
    dropped, seen = reference.generate(prompt, [step], [2], 24)
    assert seen == [173] * reference.depth
    state_rows = sorted(np.argsort(-step.energy(prompt.image), kind="stable")[:173])
    shorter = Prompt(prompt.lead, prompt.image[state_rows], prompt.crop[:173], prompt.text)
    assert dropped == reference.generate(shorter, [], [2], 24)[0]


def test_every_step_sees_what_it_needs_and_leaves_what_it_says(vlm, reference):
    prompt = prompt_of(vlm, vlm.encode(draw_scene((31, 6), "validation").image), "Describe the image.")
    for text, wanted in (
        ("fastv@1:0.5", [576, 288, 288, 288]), ("dart@2:0.25", [576, 576, 144, 144]),
        ("todre@3:1.0", [576, 576, 576, 0]), ("pyramid@1,2,3:0.5", [576, 288, 144, 72]),
        ("spectrum", [576, 288, 144, 0]),
    ):  # fmt: skip
        assert reference.generate(prompt, [read_layer_step(text)], [2], 2)[1] == wanted


def test_steps_at_one_layer_act_one_after_the_other(vlm, reference):
    prompt = prompt_of(vlm, vlm.encode(draw_scene((31, 7), "validation").image), "Describe the image.")
    smooth, rough = read_layer_step("spectrum@0:0.3"), read_layer_step("spectrum@0:0.1,cutoff=1.0,centred=false")
    answers = []
    for first, second, counts in ((smooth, rough, (173, 58)), (rough, smooth, (58, 58))):
        rows = np.arange(576)
        for step, count in zip((first, second), counts, strict=True):
            rows = rows[np.sort(np.argsort(-step.energy(prompt.image[rows]), kind="stable")[:count])]
        dropped, seen = reference.generate(prompt, [first, second], [2], 24)
        assert seen == [58] * reference.depth
        left = Prompt(prompt.lead, prompt.image[rows], prompt.crop[rows], prompt.text)
        assert dropped == reference.generate(left, [], [2], 24)[0]
        answers.append(dropped)
    assert answers[0] != answers[1]


def test_the_second_step_at_a_layer_sees_the_rows_that_the_first_left(vlm, reference):
    states: list[LayerState] = []

    class Look(LayerStep):
        name = "look"
        attention = "previous"
        looks_at_keys = True

        def choose(self, state, amount):
            states.append(state)
            return np.arange(len(state))

    prompt = prompt_of(vlm, vlm.encode(draw_scene((31, 8), "validation").image), "Describe the image.")
    look, drop = Look(((2, 0.0),)), read_layer_step("pyramid@2:0.25")
    assert reference.generate(prompt, [look, drop, look], [2], 1)[1] == [576, 576, 144, 144]
    before, after = states
    place = {row.tobytes(): number for number, row in enumerate(before.hidden)}
    kept = np.array([place[row.tobytes()] for row in after.hidden])
    assert len(kept) == len(set(kept)) == 144
    rows = np.concatenate([np.arange(len(prompt.lead)), before.image[kept], before.text])
    np.testing.assert_array_equal(after.attention, before.attention[:, rows])
    np.testing.assert_array_equal(after.keys, before.keys[rows])
    np.testing.assert_array_equal(after.words, before.words)
    assert after.image.tolist() == [len(prompt.lead) + i for i in range(144)]
    assert after.text.tolist() == [len(prompt.lead) + 144 + i for i in range(len(prompt.text))]
    assert (after.entered, len(after.crop)) == (576, 144)


def test_other_models_are_refused():
    with pytest.raises(TokcompError, match="llama models of plain attention heads only"):
        ReferenceLanguage(DEMO_MMPROJ)
