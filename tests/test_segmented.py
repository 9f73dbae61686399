"""A model in layer segments: the whole model's logits, and with rows dropped those of a torch model that drops them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama_cpp import ggml_backend_sched_eval_callback

from by_torch import WINDOW, TorchSequence
from cut_models import (
    CUTS,
    CutModel,
    Floats,
    Ints,
    Keep,
    Prompt,
    Watched,
    compare_states,
    cut_model,
    every_other,
    logits,
    make_prompt,
    relative,
)
from decoding import image_prompt
from edge_tokcomp.errors import UsageError
from edge_tokcomp.language.decoder import PlainDecoder
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.readout import Readout
from edge_tokcomp.language.segment_files import gpu_shares
from edge_tokcomp.language.segmented import SegmentedDecoder
from edge_tokcomp.layer_state import LayerState
from edge_tokcomp.methods.layer_steps import image_share, read_layer_steps
from edge_tokcomp.tokens import Rows
from tiny_models import ARCHITECTURES, write_tiny_model


@pytest.mark.parametrize("quantization", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("architecture", CUTS)
def test_segments_without_steps_give_the_logits_of_the_model(
    tmp_path: Path, architecture: str, quantization: str
) -> None:
    """Prefill in pieces, more rows than are computed at once, then 32 tokens."""
    cut = cut_model(tmp_path, architecture, CUTS[architecture], quantization=quantization)
    prompt = cut.prompt(7, (8, 9), 9)
    assert len(prompt) > 2 * 32
    lead, image, text = (Rows(p.embeddings, p.positions, 0, np.ones(len(p), np.bool_), p.crop) for p in prompt)
    half = len(image) // 2
    first, second = (
        Rows(image.embeddings[part], image.positions[..., part], 0, image.want_logits[part], image.crop[part])
        for part in (slice(half), slice(half, None))
    )
    batches = [[lead, first], [second, text], *([word] for word in prompt.words(32))]
    for kv_type, flash, most in (("f32", None, 1e-5), ("f16", True, 1e-3)):
        options: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 32, "kv_type": kv_type, "flash_attention": flash}
        with LanguageModel.open(cut.tiny.path, threads=1) as model, PlainDecoder(model, **options) as plain:
            expected = [logits(plain, batch) for batch in batches]
        with cut.segmented(**options) as segmented:
            found = [logits(segmented, batch) for batch in batches]
            assert segmented.positions == "original"
            assert (segmented.length(0), segmented.room) == (prompt.end + 32, 256 - len(prompt) - 32)
            assert segmented.layer_share(0) == 1
        errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
        assert max(errors) <= most, (kv_type, errors)


def test_positions_of_a_grid_with_gaps(tmp_path: Path) -> None:
    cut = cut_model(tmp_path, "qwen2vl", [3])
    embeddings, positions = image_prompt()
    rows = Rows(embeddings, positions, 0, np.ones(len(embeddings), np.bool_))
    with LanguageModel.open(cut.tiny.path, threads=1) as model, PlainDecoder(model, n_ctx=256, kv_type="f32") as plain:
        expected = logits(plain, [rows])
    with cut.segmented() as segmented:
        assert relative(logits(segmented, [rows]), expected) <= 1e-5


KINDS: dict[str, dict[str, Any]] = {
    "llama": {}, "llama grouped": {"n_head_kv": 2}, "qwen2 grouped": {"n_head_kv": 1}, "qwen2vl": {},
    "qwen2vl grouped": {"n_head_kv": 2},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CutModel:
    folder = tmp_path_factory.mktemp("cut")
    return cut_model(folder, request.param.split()[0], [2, 3, 4], **KINDS[request.param])


@pytest.fixture(scope="module")
def decoder(cut: CutModel) -> Iterator[SegmentedDecoder]:
    """Four sequences; a prompt takes several micro-batches."""
    with cut.segmented(n_sequences=4, n_ubatch=32, n_ctx=512) as made:
        yield made


SCRIPTS = {"every third": Keep([2, 4], every_other), "at once": Keep([0, 3], lambda layer, state: [] if layer else [4])}
PROMPT = (6, (6, 7), 5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_given_rows_are_dropped_before_given_layers(cut: CutModel, decoder: SegmentedDecoder, script: str) -> None:
    step = SCRIPTS[script]
    decoder.set_steps([step])
    reference = TorchSequence(cut.tiny, [step])
    prompt = cut.prompt(*PROMPT)
    assert relative(logits(decoder, list(prompt)), reference.feed(prompt.parts)) <= 1e-4
    for word in prompt.words(6):
        assert relative(logits(decoder, [word]), reference.feed([word])) <= 1e-4
    held = [len(keys) - 11 - 6 for keys, _ in reference.caches]
    assert held == ([31, 31, 21, 21, 14, 14] if script == "every third" else [1, 1, 1, 0, 0, 0])
    assert decoder.layer_share(0) == pytest.approx(np.mean(held) / 31)
    assert decoder.length(0) == prompt.end + 6
    assert decoder.positions == ("original" if decoder.model.multi_position else "renumbered")


def test_it_matters_which_rows_are_dropped_and_where(cut: CutModel) -> None:
    """What the reference tells apart is far more than what the decoder may differ by."""
    prompt = cut.prompt(*PROMPT)
    scripts = [[], [Keep([2], every_other)], [Keep([3], every_other)], [Keep([2], lambda *_: range(21))]]
    found = [TorchSequence(cut.tiny, steps).feed(prompt.parts)[-5:] for steps in scripts]
    for number, one in enumerate(found):
        assert all(relative(one, other) > 0.08 for other in found[:number])


STEPS = [
    "spectrum@2:0.5,4:0.25",
    "spectrum@0:0.75,3:0",
    "fastv@2:0.5",
    "pyramid@0,2,4:0.5",
    "dart@2:0.4",
    "fastv@3:0.25+pyramid@2:0.5",  # both look at layer 2
    "dart@4:0.5+todre@4:0+fastv@4:0.2",
]


@pytest.mark.parametrize("lead", ["in the call", "before", "shared"])
@pytest.mark.parametrize("text", STEPS)
def test_steps_see_what_torch_computes_and_drop_the_same_rows(
    cut: CutModel, decoder: SegmentedDecoder, text: str, lead: str
) -> None:
    check_steps(cut, decoder, text, lead)


def test_the_image_goes_once_the_question_hardly_looks_at_it(cut: CutModel, decoder: SegmentedDecoder) -> None:
    (state,) = check_steps(cut, decoder, "todre@3:0", "in the call")
    share = image_share(state)
    for amount, left in ((share - 0.01, len(state)), (share + 0.01, 0)):
        check_steps(cut, decoder, f"todre@3:{amount:.4f}", "in the call", left)


def check_steps(
    cut: CutModel, decoder: SegmentedDecoder, text: str, lead: str, left: int | None = None
) -> list[LayerState]:
    """Prefill and generate; the text before the image in the same call, in calls before, or in another sequence.

    ``left``: of the image rows in the last layer. Returns what the last step was shown in torch.
    """
    steps = read_layer_steps(text)
    watched = [Watched(step) for step in steps]
    decoder.set_steps(watched)
    tails = [cut.prompt(8, (6, 7), 3, (2, 3), 5, seed=seed, sequence=seed) for seed in (1, 2)]
    tails = tails[: 1 + (lead == "shared")]
    watches = [[Watched(step) for step in steps] for _ in tails]
    references = [TorchSequence(cut.tiny, watch) for watch in watches]
    start = tails[0].parts[0]
    if lead == "in the call":
        batch = list(tails[0])
        expected = references[0].feed(batch)
    else:
        source = 3 if lead == "shared" else 1
        for piece in (slice(0, 3), slice(3, 8)):
            decoder.decode([Rows(start.embeddings[piece], start.positions[piece], source)])
        batch = [rows for tail in tails for rows in tail.parts[1:]]
        for tail, reference in zip(tails, references, strict=True):
            reference.feed([start])
            if lead == "shared":
                decoder.fork(3, tail.parts[0].sequence)
        expected = np.concatenate(
            [reference.feed(tail.parts[1:]) for tail, reference in zip(tails, references, strict=True)]
        )
    assert relative(logits(decoder, batch), expected) <= 2e-4
    for number, step in enumerate(watched):
        # Layer by layer, and in each of them sequence by sequence.
        noted = sorted(chain.from_iterable(watch[number].seen for watch in watches), key=lambda entry: entry[0])
        compare_states(step, noted)
    for words in zip(*(tail.words(4, seed=seed) for seed, tail in enumerate(tails)), strict=True):
        expected = np.concatenate([reference.feed([word]) for word, reference in zip(words, references, strict=True)])
        assert relative(logits(decoder, words), expected) <= 2e-4
    held = [len(reference.caches[-1][0]) - 8 - 3 - 5 - 4 for reference in references]
    assert left is None or held == [left]
    return [state for _, state, _ in watches[0][-1].seen]


def test_text_before_an_image_is_known_whole_or_not_at_all(cut: CutModel, decoder: SegmentedDecoder) -> None:
    """Where steps look at one layer from both sides, and single rows came in between, as generated tokens do."""
    decoder.set_steps(read_layer_steps("fastv@3:0.25+pyramid@2:0.5"))
    lead, *rest = cut.prompt(6, (4, 5), 3)
    for piece in (slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)):
        decoder.decode([Rows(lead.embeddings[piece], lead.positions[piece])])
    with pytest.raises(ValueError, match="before anything is generated"):
        decoder.decode(rest)


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("text", ["fastv@2:0.5", "dart@3:0.5", "pyramid@2:0.5"])
def test_text_that_was_dropped_is_not_looked_at(
    cut: CutModel, decoder: SegmentedDecoder, text: str, start: int
) -> None:
    watched, watch = (Watched(step) for step in read_layer_steps(text) * 2)
    decoder.set_steps([watched])
    lead, *rest = cut.prompt(8, (4, 5), 3)
    before = cut.prompt(8, seed=7).parts[0]
    if start:
        decoder.decode([Rows(lead.embeddings[:start], lead.positions[:start])])
    decoder.decode([Rows(before.embeddings[start:], before.positions[start:])])
    decoder.drop(0, start)
    decoder.decode([Rows(lead.embeddings[start:], lead.positions[start:])])
    expected = TorchSequence(cut.tiny, [watch]).feed([lead, *rest])[8:]
    assert relative(logits(decoder, rest), expected) <= 2e-4
    compare_states(watched, watch.seen)


@pytest.mark.parametrize("text", ["fastv@2:0.5,4:0.25", "pyramid@2,4:0.5"])
def test_attention_is_had_with_flash_attention_on(cut: CutModel, text: str) -> None:
    """And keys and values rounded to 16 bits."""
    watched, watch = (Watched(step) for step in read_layer_steps(text) * 2)
    prompt = cut.prompt(*PROMPT)
    reference = TorchSequence(cut.tiny, [watch])
    with cut.segmented([watched], kv_type="f16", flash_attention=True) as decoder:
        assert relative(logits(decoder, list(prompt)), reference.feed(prompt.parts)) <= 2e-3
        for word in prompt.words(4):
            assert relative(logits(decoder, [word]), reference.feed([word])) <= 2e-3
    for (_, found, kept), (_, expected, stay) in zip(watched.seen, watch.seen, strict=True):
        assert np.abs(found.attention - expected.attention).max() <= 1e-3
        assert kept.tolist() == stay.tolist()


class SoftMax(Readout):
    """Notes the attention that llama.cpp computes itself where flash attention is off."""

    def __init__(self, *layers: int) -> None:
        super().__init__()
        self.names = [f"kq_soft_max-{layer}".encode() for layer in layers]
        self.maps: dict[bytes, Floats] = {}
        self._noting = ggml_backend_sched_eval_callback(self._note)

    @property
    def callback(self) -> Any:
        return self._noting

    def _note(self, tensor: int, ask: bool, _user_data: object) -> bool:
        name = self._ggml.name(tensor)
        if name in self.names and not ask:
            self.maps[name] = self._ggml.copy(tensor, 3)  # (heads, rows, cells)
        return name in self.names or not ask


LOOKED_AT = {name: [2] for name in ARCHITECTURES if name not in ("gemma2", "lfm2")} | {"qwen3vl": [4], "gemma3": [2, 5]}
"""Where each architecture is cut; in gemma3 layer 5 sees all, the others as far as their window reaches."""


@pytest.mark.parametrize(("architecture", "layer"), [(name, at) for name, cuts in LOOKED_AT.items() for at in cuts])
def test_attention_is_what_llama_computes_in_every_architecture(tmp_path: Path, architecture: str, layer: int) -> None:
    cut, causal = cut_model(tmp_path, architecture, [layer]), architecture != "gemma3"
    prompt = cut.prompt(6, (6, 7), 4)
    assert len(prompt) > WINDOW
    noted = SoftMax(layer - 1, layer)
    with LanguageModel.open(cut.tiny.path, threads=1) as model:
        PlainDecoder(model, n_ctx=256, kv_type="f32", readout=noted).decode(list(prompt), causal=causal)
    watched = [Watched(step) for step in read_layer_steps(f"fastv@{layer}:1+pyramid@{layer}:1")]
    with cut.segmented(watched, kv_type="f16", flash_attention=True) as decoder:
        decoder.decode(list(prompt), causal=causal)
    for step, name in zip(watched, noted.names, strict=True):
        ((_, state, _),) = step.seen
        expected = noted.maps[name].mean(axis=0)[-4:, : len(prompt)]
        assert state.attention.shape == (4, len(prompt))
        assert np.abs(state.attention - expected).max() <= 1e-3
        assert np.abs(expected - expected[:, ::-1]).max() > 0.03


def test_architectures_whose_graph_names_no_queries_take_the_other_steps(tmp_path: Path) -> None:
    cut = cut_model(tmp_path, "lfm2", [2, 4])
    prompt = cut.prompt(5, (4, 5), 4)
    with cut.segmented(read_layer_steps("spectrum@2:0.6,4:0.2"), n_sequences=2) as decoder:
        alone = logits(decoder, prompt.at(0))
        word = logits(decoder, prompt.words(1))
        assert decoder.layer_share(0) == pytest.approx((1 + 0.6 + 0.2) / 3)
        decoder.clear()
        other = cut.prompt(5, (2, 5), 4, seed=1, sequence=1)
        assert relative(logits(decoder, [*prompt.at(0), *other])[: len(alone)], alone) <= 1e-4
        assert relative(logits(decoder, prompt.words(1)), word) <= 1e-4
        for text in ("fastv@2:0.5", "pyramid@2:0.5", "dart@2:0.5"):
            with pytest.raises(UsageError, match="which lfm2 models do not show; use spectrum"):
                decoder.set_steps(read_layer_steps(text))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_dropped_before_the_first_layer_were_never_fed(tmp_path: Path, architecture: str) -> None:
    """In every architecture, cut or whole."""
    tiny = write_tiny_model(tmp_path / "m.gguf", architecture, n_layer=4)
    prompt = make_prompt(tiny, 5, (4, 5), 4)
    lead, image, text = prompt
    stay = np.arange(0, len(image), 2)
    fewer = [lead, replace(image, embeddings=image.embeddings[stay], positions=image.positions[..., stay],
                           want_logits=image.want_logits[stay], crop=image.crop[stay]), text]  # fmt: skip
    seen: list[LayerState] = []

    def rule(_: int, state: LayerState) -> Ints:
        seen.append(state)
        return stay

    with LanguageModel.open(tiny.path, threads=1) as model:
        if not model.multi_position:
            text = replace(text, positions=text.positions - len(image) + len(stay))
            fewer[1:] = [replace(fewer[1], positions=image.positions[: len(stay)]), text]
        options: dict[str, Any] = {"n_ctx": 256, "kv_type": "f32"}
        with (
            PlainDecoder(model, **options) as plain,
            SegmentedDecoder([model], (), [Keep([0], rule)], **options) as cut,
        ):
            assert relative(logits(cut, list(prompt)), logits(plain, fewer)) <= 1e-5
            (word,) = prompt.words(1)
            (next_word,) = Prompt(prompt.parts, plain.length(0)).words(1)
            assert relative(logits(cut, [word]), logits(plain, [next_word])) <= 1e-5
            assert cut.room == plain.room
    np.testing.assert_array_equal(seen[0].hidden, image.embeddings[:, : tiny.n_embd])


@pytest.mark.parametrize("gpu_layers", [-1, *range(12)])
def test_as_many_layers_are_offloaded_as_of_the_whole_model(gpu_layers: int) -> None:
    """llama.cpp counts from the end, the output first, and takes it with any layer."""
    layers = [3, 1, 4]
    shares = gpu_shares(gpu_layers, layers)
    found = [
        share < 0 or count - row < share for count, share in zip(layers, shares, strict=True) for row in range(count)
    ]
    assert found == [gpu_layers < 0 or 8 - layer < gpu_layers for layer in range(8)]
    assert (shares[-1] != 0) == (gpu_layers != 0)
