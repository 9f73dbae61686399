"""Images whose rows see one another in layer segments: image and question go through together, text only looks back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from by_torch import WINDOW, TorchSequence
from cut_models import CutModel, Keep, Prompt, Watched, alone, compare_states, cut_model, held, logits, relative
from edge_tokcomp.errors import TokcompError
from edge_tokcomp.language.decoder import PlainDecoder
from edge_tokcomp.language.gguf_header import read_header
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.row_attention import head_scale, layer_windows
from edge_tokcomp.language.segmented import SegmentedDecoder
from edge_tokcomp.methods.layer_steps import image_share, read_layer_steps
from edge_tokcomp.tokens import Rows
from tiny_models import write_tiny_model

CLOSE = 2e-3
"""llama.cpp looks GELU up in a table of half floats: a change of the last bit may come to a step of it."""

STEPS = [
    "spectrum@2:0.5,4:0.25",
    "spectrum@0:0.75,3:0",
    "fastv@2:0.5",
    "fastv@5:0.5",
    "pyramid@0,2,4:0.5",
    "pyramid@5:0.5",  # looks at a layer without a window
    "dart@2:0.4",
    "fastv@3:0.25+pyramid@2:0.5",
    "dart@4:0.5+todre@4:0+fastv@4:0.2",
]


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> CutModel:
    return cut_model(tmp_path_factory.mktemp("cut"), "gemma3", [2, 3, 4, 5], n_head_kv=2)


@pytest.fixture(scope="module")
def made(cut: CutModel) -> Iterator[SegmentedDecoder]:
    with cut.segmented(n_sequences=5, n_ctx=512) as decoder:
        yield decoder


@pytest.fixture
def decoder(made: SegmentedDecoder) -> SegmentedDecoder:
    """Five empty sequences, no steps."""
    made.set_steps([])
    return made


def pictured(cut: CutModel, seed: int = 0, sequence: int = 0) -> Prompt:
    """Text, two images with text between, a question: more rows than a window has."""
    prompt = cut.prompt(8, (6, 7), 3, (2, 3), 5, seed=seed, sequence=sequence)
    assert len(prompt) > WINDOW
    return prompt


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
@pytest.mark.parametrize(("kv_type", "flash"), [("f32", None), ("f16", True)])
def test_segments_give_the_logits_of_the_model_bit_for_bit(
    tmp_path: Path, quantization: str, kv_type: str, flash: bool | None
) -> None:
    """The prompt in one call and in one for each part, then tokens."""
    cut = cut_model(tmp_path, "gemma3", [2, 5], quantization=quantization)
    options: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "kv_type": kv_type, "flash_attention": flash}
    prompt = pictured(cut)
    parts = [replace(part, want_logits=np.ones(len(part), np.bool_)) for part in prompt]
    found = []
    with LanguageModel.open(cut.tiny.path, threads=1) as model, PlainDecoder(model, **options) as plain:
        for decoder in (plain, cut.segmented(n_sequences=2, **options)):
            with decoder:
                for batches in ([parts], [[part] for part in parts]):
                    decoder.clear()
                    rows = [logits(decoder, batch, causal=False) for batch in batches]
                    found.append(np.concatenate([*rows, *(logits(decoder, [word]) for word in prompt.words(4))]))
    for other in found[1:]:
        assert np.array_equal(other, found[0])
    with cut.segmented(**options) as decoder:  # it matters whether the rows of an image see one another
        assert relative(logits(decoder, parts)[8:], found[0][8:-4]) > 0.01


@pytest.mark.parametrize("lead", ["in the call", "before", "shared"])
@pytest.mark.parametrize("text", STEPS)
def test_steps_see_what_torch_computes_and_drop_the_same_rows(
    cut: CutModel, decoder: SegmentedDecoder, text: str, lead: str
) -> None:
    """The text before the image in the same call, in calls before, or in another sequence."""
    steps = read_layer_steps(text)
    watched = [Watched(step) for step in steps]
    decoder.set_steps(watched)
    tails = [pictured(cut, seed, seed) for seed in (1, 2)][: 1 + (lead == "shared")]
    watches = [[Watched(step) for step in steps] for _ in tails]
    references = [TorchSequence(cut.tiny, watch) for watch in watches]
    start = tails[0].parts[0]
    first = 0 if lead == "in the call" else 1
    for piece in (slice(0, 3), slice(3, 8)) if first else ():
        source = 3 if lead == "shared" else 1
        decoder.decode([Rows(start.embeddings[piece], start.positions[piece], source)], causal=False)
    for tail, reference in zip(tails, references, strict=True):
        if first:
            reference.feed([start])
        if lead == "shared":
            decoder.fork(3, tail.parts[0].sequence)
    expected = [reference.feed(tail.parts[first:]) for tail, reference in zip(tails, references, strict=True)]
    batch = [rows for tail in tails for rows in tail.parts[first:]]
    assert relative(logits(decoder, batch, causal=False), np.concatenate(expected)) <= CLOSE
    for number, step in enumerate(watched):
        # Layer by layer, and in each of them sequence by sequence.
        compare_states(
            step, sorted((seen for watch in watches for seen in watch[number].seen), key=lambda s: s[0]), CLOSE
        )
    for words in zip(*(tail.words(4, seed=seed) for seed, tail in enumerate(tails)), strict=True):
        expected = [reference.feed([word]) for word, reference in zip(words, references, strict=True)]
        assert relative(logits(decoder, words, causal=False), np.concatenate(expected)) <= CLOSE
    for tail, reference in zip(tails, references, strict=True):
        left = [len(keys) for keys, _ in reference.caches]
        assert held(decoder, tail.parts[0].sequence) == [left[layer] for layer in (0, 2, 3, 4, 5)]


def test_the_image_goes_once_the_question_hardly_looks_at_it(cut: CutModel, decoder: SegmentedDecoder) -> None:
    prompt = pictured(cut)
    watch = Watched(*read_layer_steps("todre@3:0"))
    TorchSequence(cut.tiny, [watch]).feed(prompt.parts)
    ((_, state, _),) = watch.seen
    share = image_share(state)
    for amount, left in ((share - 0.01, len(state)), (share + 0.01, 0)):
        steps = read_layer_steps(f"todre@3:{amount:.4f}")
        decoder.set_steps(steps)
        expected = TorchSequence(cut.tiny, steps).feed(prompt.parts)
        assert relative(logits(decoder, list(prompt), causal=False), expected) <= CLOSE
        assert held(decoder, 0)[-1] == 16 + left


def test_given_rows_are_dropped_from_each_of_two_images(cut: CutModel, decoder: SegmentedDecoder) -> None:
    """Until one has none left, so that the text around it comes together."""
    step = Keep(
        [2, 4], lambda layer, state: [i for i in range(len(state)) if state.crop[i] == 0 or (layer < 4 and i % 2)]
    )
    decoder.set_steps([step])
    prompt = pictured(cut)
    expected = TorchSequence(cut.tiny, [step]).feed(prompt.parts)
    assert relative(logits(decoder, list(prompt), causal=False), expected) <= CLOSE
    assert held(decoder, 0) == [51, 49, 49, 47, 47]


@pytest.mark.parametrize("text", ["", *STEPS[::2]])
def test_sequences_in_one_batch_equal_each_alone(cut: CutModel, decoder: SegmentedDecoder, text: str) -> None:
    """Three with images, whatever stands between their rows, while a fourth generates."""
    steps = read_layer_steps(text)
    decoder.set_steps(steps)
    talking = cut.prompt(4, (4, 4), 3, seed=9, sequence=3)
    prompts = [pictured(cut, seed=1), *(cut.prompt(5 + i, (4 + i, 5), 4 - i, seed=i, sequence=i) for i in (1, 2))]
    decoder.decode(list(talking), causal=False)
    first, second, third = talking.words(3)
    decoder.decode([first], causal=False)
    a, b, c = (list(prompt) for prompt in prompts)
    batch = [a[0], b[0], second, a[1], *b[1:], *a[2:4], *c, a[4]]
    found = decoder.decode(batch, causal=False)
    words = [word for prompt in prompts for word in prompt.words(1)]
    after = decoder.decode([*words, third], causal=False)
    for prompt, word, answer in zip(prompts, words, after, strict=False):
        expected, rows = alone(cut, steps, [list(prompt), [word]], causal=False)
        mine = [part for part, of in zip(found, batch, strict=True) if of.sequence == word.sequence]
        assert relative(np.concatenate(mine), expected[0]) <= CLOSE
        assert relative(answer, expected[1]) <= CLOSE
        assert held(decoder, word.sequence) == rows
    expected, rows = alone(cut, steps, [list(talking), [first], [second], [third]], causal=False)
    assert relative(found[2], expected[2]) <= CLOSE
    assert relative(after[3], expected[3]) <= CLOSE
    assert held(decoder, 3) == rows


@pytest.mark.parametrize("text", ["", "spectrum@2:0.5", "pyramid@2:0.5", "pyramid@0:0.5", "spectrum@0:0.95"])
def test_an_image_that_is_not_computed_at_once_is_refused(cut: CutModel, text: str) -> None:
    """Each by itself, and with the rows that enter; before the first layer these may be fewer."""
    with cut.segmented(read_layer_steps(text), n_ubatch=32, n_sequences=2) as decoder:
        decoder.decode(list(cut.prompt(40, (6, 7), 3, (6, 7), 3)), causal=False)
        decoder.clear()
        decoder.decode(list(cut.prompt(4, sequence=1)))
        long = list(cut.prompt(4, (6, 8), 3))
        if text == "pyramid@0:0.5":
            assert len(decoder.decode(long, causal=False)) == 3
            return
        with pytest.raises(TokcompError, match=r"image rows that see one another .* n_ubatch is 32; .* keep") as fault:
            decoder.decode(long, causal=False)
        assert "\n" not in str(fault.value)
        assert (decoder.length(0), decoder.length(1)) == (0, 4)
        assert decoder.room == decoder.n_ctx - 4
        decoder.decode(long)  # rows that only look back come in parts


def test_a_layers_window_is_known_in_segments_too(cut: CutModel, tmp_path: Path) -> None:
    assert layer_windows(read_header(cut.tiny.path)) == [WINDOW] * 5 + [0]
    assert [layer_windows(read_header(path)) for path in cut.files.paths] == [[WINDOW] * 2, *[[WINDOW]] * 3, []]
    for pattern, windows in ((2, [7, 0, 7]), (0, [7] * 3), ([False, True, False], [0, 7, 0])):
        extra = {"attention.sliding_window": 7, "attention.sliding_window_pattern": pattern}
        tiny = write_tiny_model(tmp_path / "m.gguf", "gemma3", n_layer=3, extra=extra)
        assert layer_windows(read_header(tiny.path)) == windows
    llama = write_tiny_model(tmp_path / "l.gguf", "llama", extra={"attention.sliding_window": 7})
    assert layer_windows(read_header(llama.path)) == []


def test_gemma_3_27b_scales_by_its_width(tmp_path: Path) -> None:
    for depth, scaled_by in ((61, 16), (62, 8)):
        extra = {"attention.head_count": 8}
        tiny = write_tiny_model(tmp_path / "m.gguf", "gemma3", n_layer=depth, extra=extra)
        assert head_scale(read_header(tiny.path), 16) == pytest.approx(scaled_by**-0.5)
