"""What a segmented decoder refuses, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from by_torch import TorchSequence
from cut_models import CutModel, Prompt, Watched, alone, cut_model, held, logits, relative, same
from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.segmented import SegmentedDecoder
from edge_tokcomp.language.token_embedding import bare_rows
from edge_tokcomp.methods.layer_steps import read_layer_steps
from edge_tokcomp.tokens import Rows


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


def test_a_fork_that_cannot_be_changes_nothing(cut: CutModel, decoder: SegmentedDecoder) -> None:
    """Whatever is left of the rows that entered."""
    decoder.set_steps(read_layer_steps("spectrum@0:0"))
    image = cut.prompt((3, 3)).parts[0]
    assert [found.shape for found in decoder.decode([*cut.prompt(4, sequence=1), image])] == [(4, 416), (0, 416)]
    lengths = [decoder.length(i) for i in range(3)]
    for source, target, rows in ((0, 1, 4), (1, 0, len(image))):
        with pytest.raises(ValueError, match=f"sequence {target} holds {rows} rows; drop it"):
            decoder.fork(source, target)
    for source, target in ((0, 5), (5, 0), (-1, 2), (0, -1)):
        with pytest.raises(ValueError, match=r"is outside 0\.\.4"):
            decoder.fork(source, target)
    assert [decoder.length(i) for i in range(3)] == lengths


def test_the_rows_that_are_fed_stay_as_they_were(cut: CutModel) -> None:
    """Hidden states are written over rows, but over none of the caller's."""
    with cut.segmented(n_ctx=512, n_ubatch=32) as decoder:
        (rows,) = cut.prompt(150).parts
        before = rows.embeddings.copy()
        decoder.decode([rows])
        assert np.array_equal(rows.embeddings, before)


def test_what_cannot_be_is_refused_before_anything_is_computed(cut: CutModel, decoder: SegmentedDecoder) -> None:
    lead, image, text = cut.prompt(3, (4, 4), 3).parts
    decoder.set_steps([])
    assert len(logits(decoder, [lead, replace(image, want_logits=np.ones(len(image), np.bool_)), text])) == 18
    decoder.set_steps(read_layer_steps("pyramid@2:0.5"))
    cases: list[tuple[list[Rows], str]] = [
        ([lead, replace(image, want_logits=None), text], "logits of image rows of sequence 0 are wanted"),
        ([lead, image], "decode the image in one batch with the text after it"),
        ([lead, text, image], "positions may not leave gaps|must start at"),
        ([replace(lead, sequence=5)], r"sequence 5 is outside 0\.\.4"),
        ([replace(lead, embeddings=lead.embeddings[:, :-1].copy())], "rows are 63 wide"),
        ([replace(lead, embeddings=np.full_like(lead.embeddings, np.nan))], "not finite"),
        ([bare_rows([1, 2], 0)], "sequence 0 are tokens alone, which this decoder does not look up"),
        ([text], "must follow at 0|must start at 0"),
    ]
    for batch, words in cases:
        if words.startswith("must follow") and decoder.model.multi_position:
            continue  # such a model may start anywhere
        with pytest.raises(ValueError, match=words):
            decoder.decode(batch)
        assert (decoder.room, decoder.length(0)) == (decoder.n_ctx, 0)
    assert decoder.decode([]) == []
    for call in (decoder.length, decoder.layer_share, decoder.drop):
        with pytest.raises(ValueError, match="sequence 5 is outside"):
            call(5)


def test_a_step_where_the_model_is_not_cut_is_refused(cut: CutModel, decoder: SegmentedDecoder) -> None:
    decoder.set_steps(read_layer_steps("spectrum@2:0.5"))
    decoder.decode(list(cut.prompt(3, (4, 4), 3)))
    rows = held(decoder, 0)
    for text in ("fastv@3:0.5", "spectrum@2:0.5,5:0", "spectrum"):
        with pytest.raises(UsageError, match=r"acts at layer \d, but the model is cut at 2, 4; cut it at"):
            decoder.set_steps(read_layer_steps(text))
    with pytest.raises(UsageError, match="of a model of 6 layers"):
        decoder.set_steps(read_layer_steps("spectrum@6:0.5"))
    assert held(decoder, 0) == rows  # those before stand, and what was decoded
    with pytest.raises(UsageError, match="acts at layer 3"):
        cut.segmented(read_layer_steps("fastv@3:0.5"))
    decoder.set_steps([])
    assert decoder.room == decoder.n_ctx


def test_rows_that_do_not_fit_are_refused(cut: CutModel) -> None:
    with cut.segmented(read_layer_steps("pyramid@2:0.5"), n_sequences=2) as decoder:
        start = cut.prompt(200, (4, 4), 5)
        decoder.decode(list(start))
        with pytest.raises(TokcompError, match="100 rows of image and prompt do not fit: 39 of 256"):
            decoder.decode(list(cut.prompt(100, sequence=1)))
        assert (decoder.length(0), decoder.length(1), decoder.room) == (start.end, 0, 39)
        fitting = cut.prompt(10, (4, 5), 14, sequence=1, seed=1)
        assert len(fitting) == 39
        assert same(logits(decoder, list(fitting)), alone(cut, decoder._at[2][0][:1], [list(fitting)])[0][0])
        assert decoder.room == 0
        more = Rows(start.parts[0].embeddings[:1], start.parts[0].positions[..., :1] + start.end, 0)
        with pytest.raises(TokcompError, match="1 rows of image and prompt do not fit: 0 of 256"):
            decoder.decode([more])
        assert decoder.length(0) == start.end  # nothing was computed, so nothing is lost


def test_a_second_image_later_is_pruned_or_refused(cut: CutModel, decoder: SegmentedDecoder) -> None:
    whole = cut.prompt(4, (4, 5), 3, (5, 4), 6)
    first, later = whole.parts[:3], whole.parts[3:]
    end = int(first[-1].positions[-1]) + 1
    steps = read_layer_steps("spectrum@2:0.5,4:0.25")
    decoder.set_steps(steps)
    reference = TorchSequence(cut.tiny, steps)
    for batch in (first, later, whole.words(1)):
        assert relative(logits(decoder, batch), reference.feed(batch)) <= 2e-4
    assert decoder.layer_share(0) == pytest.approx((2 + 2 * 8 / 15 + 2 * 4 / 15) / 6)
    for text in ("pyramid@2:0.5", "fastv@2:0.5", "dart@2:0.5"):
        decoder.set_steps(read_layer_steps(text))
        decoder.decode(first)
        rows = held(decoder, 0)
        with pytest.raises(ValueError, match="decode all images of a sequence in one batch, before anything"):
            decoder.decode(later)
        assert (held(decoder, 0), decoder.length(0)) == (rows, end)
        assert len(logits(decoder, Prompt(first, end).words(1))) == 1


@pytest.mark.parametrize("text", ["pyramid@2:0.5", "fastv@2:0.5", "dart@4:0.5"])
def test_text_that_was_not_noted_cannot_be_looked_at(cut: CutModel, decoder: SegmentedDecoder, text: str) -> None:
    """A single row that was fed as a generated token is; dropped, all is known again."""
    decoder.set_steps(read_layer_steps(text))
    prompt = cut.prompt(8, (4, 4), 3)
    lead, *rest = prompt.parts
    expected = logits(decoder, list(prompt))
    decoder.clear()
    pieces = [replace(lead, embeddings=lead.embeddings[p], positions=lead.positions[p], want_logits=None, crop=None)
              for p in (slice(0, 5), slice(5, 6), slice(6, 8))]  # fmt: skip
    for piece in pieces:
        decoder.decode([piece])
    with pytest.raises(ValueError, match="before anything is generated"):
        decoder.decode(rest)
    decoder.drop(0, 5)
    joined = replace(lead, embeddings=lead.embeddings[5:], positions=lead.positions[5:], want_logits=None, crop=None)
    decoder.decode([joined])
    assert same(logits(decoder, rest), expected[8:])


def test_positions_are_told(cut: CutModel, decoder: SegmentedDecoder) -> None:
    assert (decoder.positions, decoder.looks_at_text) == ("original", False)
    decoder.set_steps(read_layer_steps("dart@2:0.5"))
    assert decoder.looks_at_text
    assert decoder.positions == ("original" if cut.tiny.architecture == "qwen2vl" else "renumbered")
    assert (decoder.n_layer, decoder.n_vocab, decoder.n_sequences, decoder.row_width) == (6, 416, 5, 64)


def test_time_is_told_by_segment_and_for_choosing(cut: CutModel, decoder: SegmentedDecoder) -> None:
    decoder.set_steps(read_layer_steps("pyramid@2:0.5"))
    before = dict(decoder.seconds)
    assert list(before) == ["segment 0", "segment 1", "segment 2", "choose"]
    decoder.decode(list(cut.prompt(3, (4, 4), 3)))
    assert all(decoder.seconds[name] > before[name] for name in before)


def test_a_whole_model_takes_steps_before_its_first_layer(cut: CutModel) -> None:
    steps = read_layer_steps("pyramid@0:0.5")
    prompt = cut.prompt(5, (4, 5), 4)
    with LanguageModel.open(cut.tiny.path, threads=1) as model:
        with SegmentedDecoder([model], (), steps, n_ctx=256, kv_type="f32") as decoder:
            reference = TorchSequence(cut.tiny, steps)
            assert relative(logits(decoder, list(prompt)), reference.feed(prompt.parts)) <= 2e-4
            (word,) = prompt.words(1)
            assert relative(logits(decoder, [word]), reference.feed([word])) <= 2e-4
            assert held(decoder, 0) == [5 + 8 + 4 + 1]
        model.tokenize("a", add_special=True, parse_special=True)  # it was only lent


def test_closing_frees_all_that_was_opened(cut: CutModel) -> None:
    decoder = cut.segmented()
    decoder.close()
    decoder.close()
    with pytest.raises(ValueError, match="is closed"):
        decoder.decode(list(cut.prompt(3)))
    with pytest.raises(ValueError, match="is closed"):
        _ = decoder.model.handle.pointer


@pytest.mark.parametrize("text", ["fastv@2:0.5,4:0.25", "pyramid@2,4:0.5"])
def test_steps_that_look_from_the_last_row_are_shown_that_one(tmp_path: Path, text: str) -> None:
    cut = cut_model(tmp_path, "llama", [2, 4])
    prompt = list(cut.prompt(5, (4, 5), 4))
    (step,) = read_layer_steps(text)
    shown = []
    for looks_from_all in (True, False):
        watched = Watched(step, looks_from_all=looks_from_all)
        with cut.segmented([watched]) as decoder:
            found = logits(decoder, prompt)
        shown.append((found, [state.attention for _, state, _ in watched.seen]))
    (found, whole), (alone, last) = shown
    assert np.array_equal(found, alone)
    for every, one in zip(whole, last, strict=True):
        assert every is not None
        assert one is not None
        assert len(every) == 4
        np.testing.assert_allclose(one, every[-1:], rtol=1e-6)
