"""Language models whose text enters as token ids and whose images enter as rows: alone, together, in the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from decoding import exact, wanting_all
from edge_tokcomp import load
from edge_tokcomp.errors import TokcompError
from edge_tokcomp.export.split import split_model
from edge_tokcomp.language.generation import generate
from edge_tokcomp.language.gguf_header import read_header
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.prompt import chat_prompt
from edge_tokcomp.language.requests import Request
from edge_tokcomp.language.sampling import Sampling
from edge_tokcomp.language.scheduler import Scheduler
from edge_tokcomp.language.segmented import SegmentedDecoder
from edge_tokcomp.language.token_embedding import TokenEmbedding
from edge_tokcomp.prompt_rows import prompt_parts, rows_of
from edge_tokcomp.tokens import Origin, Role, Rows
from edge_tokcomp.vlm import VLM
from mtmd_files import Files, noise
from mtmd_helper import Floats, helper_logits, token_logits
from tiny_token_models import TAKING_TOKENS, write_token_model

TOKENS = [1, 65, 300, 17, 301, 99, 288, 5]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("mtmd"))


@pytest.fixture(scope="module", params=TAKING_TOKENS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanguageModel]:
    path = write_token_model(tmp_path_factory.mktemp("lm") / f"{request.param}.gguf", request.param)
    with LanguageModel.open(path, threads=1) as opened:
        yield opened


@pytest.fixture
def embedding(model: LanguageModel) -> TokenEmbedding:
    return TokenEmbedding.of(model)


def image(model: LanguageModel, count: int, start: int, sequence: int = 0, seed: int = 0) -> Rows:
    values = np.random.default_rng(seed).standard_normal((count, model.n_embd_inp)).astype(np.float32)
    places = np.arange(start, start + count, dtype=np.int32)
    return Rows(values, places, sequence, np.zeros(count, np.bool_), np.zeros(count, np.int64))


def silent(rows: Rows) -> Rows:
    return replace(rows, want_logits=np.zeros(len(rows), np.bool_))


def close(found: Any, wanted: Any, bound: float = 1e-4) -> bool:
    return bool(np.abs(np.asarray(found) - wanted).max() <= bound * np.abs(wanted).max())


def test_text_has_the_logits_of_its_tokens(model: LanguageModel, embedding: TokenEmbedding) -> None:
    wanted = token_logits(model, TOKENS)
    rows = embedding.rows(TOKENS, 0)
    with exact(model) as decoder:
        (found,) = decoder.decode([wanting_all(rows)])
        assert close(found, wanted)
        for count in (1, 5, 8):
            decoder.clear()
            (last,) = decoder.decode([embedding.rows(TOKENS[:count], 0)])
            assert close(last[0], wanted[count - 1])
        decoder.clear()
        (as_image,) = decoder.decode([replace(rows, crop=np.zeros(8, np.int64))])
        assert not close(as_image[0], wanted[-1], 0.1)


@pytest.mark.parametrize("sizes", [{}, {"n_batch": 3, "n_ubatch": 2}, {"n_outputs": 2}], ids=["whole", "cut", "few"])
def test_logits_can_be_had_of_any_rows(model: LanguageModel, embedding: TokenEmbedding, sizes: dict[str, int]) -> None:
    prompt = [embedding.rows(TOKENS[:3], 0), image(model, 4, 3), embedding.rows(TOKENS[3:], 7)]
    with exact(model) as decoder:
        every = np.concatenate(decoder.decode([replace(p, want_logits=np.ones(len(p), np.bool_)) for p in prompt]))
    want = np.arange(12) % 3 == 1
    asked = [replace(p, want_logits=want[p.positions]) for p in prompt]
    with exact(model, **sizes) as decoder:
        assert close(np.concatenate(decoder.decode(asked)), every[want])


def test_an_image_and_generated_tokens_of_other_sequences_share_a_call_of_decode(
    model: LanguageModel, embedding: TokenEmbedding
) -> None:
    lead, tail = embedding.rows(TOKENS[:3], 0, 0), embedding.rows(TOKENS[3:5], 7, 0)
    prompts = [embedding.rows(TOKENS[: 2 + n], 0, n) for n in (1, 2)]
    with exact(model, n_sequences=3) as decoder:
        decoder.decode([lead, *map(silent, prompts)])
        batch = [image(model, 4, 3), embedding.rows([77], 3, 1), tail, embedding.rows([88], 4, 2)]
        none, first, second, third = decoder.decode(batch)
        assert len(none) == 0
        assert [decoder.rows(sequence) for sequence in (0, 1, 2)] == [9, 4, 5]
        assert decoder.room == decoder.n_ctx - 18
        following = decoder.decode([embedding.rows([99], decoder.length(n), n) for n in (0, 1, 2)])
    with exact(model) as alone:
        whole = alone.decode([lead, image(model, 4, 3), tail, embedding.rows([99], 9)])
        assert close(second, whole[2])
        assert close(following[0], whole[3])
        for found, after, prompt, token in (
            (first, following[1], prompts[0], 77),
            (third, following[2], prompts[1], 88),
        ):
            alone.clear()
            rows = [replace(prompt, sequence=0), embedding.rows([token], len(prompt))]
            assert close(found, alone.decode(rows)[1])
            assert close(after, alone.decode([embedding.rows([99], len(prompt) + 1)])[0])


@pytest.mark.parametrize("causal", [True, False])
def test_several_requests_at_once_get_the_tokens_of_each_alone(
    model: LanguageModel, embedding: TokenEmbedding, causal: bool
) -> None:
    prefix, alone = [embedding.rows(TOKENS[:3], 0)], []
    found: dict[int, tuple[int, ...]] = {}
    requests = [[image(model, 5 + n, 3, seed=n), embedding.rows([70 + n, 80, 90], 8 + n)] for n in range(4)]
    with exact(model) as decoder:
        for picture, text in requests:
            decoder.clear()
            run = generate(decoder, model, embedding, [*prefix, picture, text], max_tokens=6, causal=causal)
            run.text()
            alone.append(tuple(run.tokens))
    with exact(model, n_sequences=4) as decoder:
        scheduler = Scheduler(decoder, model, embedding, causal=causal)
        for rows in requests:
            scheduler.submit(Request(prefix, "prefix", rows, Sampling(), 6))
        while scheduler.busy:
            found.update((done.ticket, done.tokens) for done in scheduler.step())
    assert [tokens for _, tokens in sorted(found.items())] == alone


def test_a_forked_sequence_goes_on_by_itself(model: LanguageModel, embedding: TokenEmbedding) -> None:
    with exact(model, n_sequences=2) as decoder:
        decoder.decode([embedding.rows(TOKENS[:3], 0), image(model, 4, 3)])
        decoder.fork(0, 1)
        both = decoder.decode([embedding.rows([token], 7, n) for n, token in enumerate((77, 88))])
        decoder.drop(1)
        decoder.fork(0, 1)
        again = decoder.decode([embedding.rows([99], 8, n) for n in (0, 1)])
    assert not close(both[1], both[0], 1e-2)
    assert close(again[1], again[0])


def test_a_part_of_a_sequence_can_be_forgotten(model: LanguageModel, embedding: TokenEmbedding) -> None:
    with exact(model) as decoder:
        decoder.decode([embedding.rows(TOKENS[:3], 0), image(model, 4, 3)])
        (once,) = decoder.decode([embedding.rows([77, 88], 7)])
        if model.recurrent:  # DeepSeek-V4, whose attention is to blocks of rows made one
            with pytest.raises(ValueError, match="cannot forget a part of a sequence"):
                decoder.drop(0, 7)
            return
        decoder.drop(0, 7)
        assert decoder.length(0) == 7
        (again,) = decoder.decode([embedding.rows([77, 88], 7)])
    assert close(again, once)


def test_generated_tokens_are_fed_as_tokens(model: LanguageModel, embedding: TokenEmbedding) -> None:
    prompt = [embedding.rows(TOKENS[:3], 0), image(model, 6, 3), embedding.rows(TOKENS[3:], 9)]
    with exact(model) as decoder:
        run = generate(decoder, model, embedding, prompt, max_tokens=6)
        run.text()
        for count, token in enumerate(run.tokens):
            decoder.clear()
            text = embedding.rows([*TOKENS[3:], *run.tokens[:count]], 9)
            assert decoder.decode([*prompt[:2], text])[-1][-1].argmax() == token
    assert len(run.tokens) == 6


def test_text_without_its_tokens_is_a_bug(model: LanguageModel, embedding: TokenEmbedding) -> None:
    rows = embedding.rows(TOKENS, 0)
    wanted = pytest.raises(ValueError, match="text rows of sequence 0 come without their tokens")
    with exact(model) as decoder, wanted:
        decoder.decode([replace(rows, tokens=None)])


def test_layer_segments_of_such_a_model_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(TokcompError, match="models take text as tokens, which layer segments cannot hand on"):
        SegmentedDecoder([model], ())
    with pytest.raises(TokcompError, match=f"{model.architecture}") as fault:
        split_model(model.path, [1], tmp_path / "cut")
    assert "\n" not in str(fault.value)


def opened(files: Files, family: str, **options: Any) -> VLM:
    return load(*files.of(family), threads=1, n_ctx=1024, **options)


def pipeline_logits(vlm: VLM, pictures: list[Any], question: str) -> tuple[Floats, list[str]]:
    """Of the prompt's last token, fed as the pipeline does but into a cache that rounds nothing; and its text."""
    images = vlm.encode_all(pictures, question)
    written = chat_prompt(vlm.model, question, len(images), vlm.engine.markers, vlm.engine.written)
    written = written.around([one.around for one in images])
    rows = rows_of(prompt_parts(vlm.embedding, written.tokenize(vlm.model), images), 0, 0)
    with exact(vlm.model) as decoder:
        found = decoder.decode([*rows[:-1], replace(rows[-1], want_logits=None)], causal=vlm.engine.causal)
        return found[-1][0], list(written.pieces)


@pytest.mark.parametrize("family", ["cogvlm", "gemma3n", "gemma4_e2b", "gemma4", "hunyuanvl", "deepseek4v"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_pipeline_feeds_pictures_as_libmtmds_helper_does(files: Files, family: str, count: int) -> None:
    pictures = [noise(60, 90, 1), noise(70, 48, 2)][:count]
    with opened(files, family) as vlm:
        assert vlm.engine.name == "mtmd"
        found, texts = pipeline_logits(vlm, list(map(Image.fromarray, pictures)), "what is this")
        # Written out: the BOS that libmtmd adds comes after it has counted what stands before DeepSeek-V4's picture.
        texts[0] = vlm.model.bos_text + texts[0]
        wanted = helper_logits(vlm.model, vlm.mmproj, texts, pictures)
    assert close(found, wanted)


@pytest.mark.parametrize("family", ["cogvlm", "gemma3n", "gemma4_e2b", "hunyuanvl", "deepseek4v"])
def test_half_of_the_rows_can_be_dropped(files: Files, family: str) -> None:
    pictures = [Image.fromarray(noise(60, 90, seed)) for seed in (1, 2)]
    with opened(files, family, method="divprune", keep=0.5) as vlm:
        encoded = vlm.encode(pictures[0])
        assert len(encoded.plan) == (encoded.rows.crop >= 0).sum() == round(encoded.plan.before / 2 + 1e-9)
        answer = vlm.answer(pictures, "what is this", max_tokens=5)
        assert (answer.tokens_after, answer.tokens_before) == (2 * len(encoded.plan), 2 * encoded.plan.before)
        assert answer.generated_tokens > 0


def test_learned_rows_around_and_between_are_kept_and_the_others_stand_where_they_stood(files: Files) -> None:
    picture = Image.fromarray(noise(64, 96, 1))
    with opened(files, "hunyuanvl", method="divprune", keep=0.5) as vlm:
        encoded = vlm.encode(picture)
    layout = encoded.tokens.layout
    ((rows, columns),) = layout.grids
    assert (rows, columns) == (4, 6)
    learned = np.flatnonzero(layout.role == Role.SEPARATOR)
    np.testing.assert_array_equal(learned, [0, *(1 + 6 + 7 * np.arange(4)), 29])
    assert np.isin(learned, encoded.plan.keep).all()
    np.testing.assert_array_equal(layout.cell[layout.patches], np.arange(24))
    # Time counts on, then column and row, then the picture's number: none in the first.
    place = np.arange(30)
    row, column = np.divmod(place - 1, 7)
    at = np.stack([place, column, row, 0 * place])
    at[:, [0, 29]] = place[[0, 29]]
    starts = at[:, encoded.plan.keep] + (encoded.rows.origin[:, 1:-1] == Origin.START)  # behind a marker
    np.testing.assert_array_equal(encoded.rows.positions[:, 1:-1], starts)
    assert encoded.rows.advance == 32


def test_cogvlms_learned_rows_are_kept(files: Files) -> None:
    with opened(files, "cogvlm", method="divprune", keep=0.25) as vlm:
        encoded = vlm.encode(Image.fromarray(noise(60, 90, 1)))
    assert encoded.tokens.layout.grids == ((6, 6),)
    assert {0, 37} <= set(encoded.plan.keep.tolist())
    assert len(encoded.plan) == round(38 / 4)


def in_pairs(rows: int, columns: int) -> list[int]:
    """The cells of DeepSeek-V4's rows: lines two by two, a column of both at a time, breaks and padding between."""
    cells = [-1] * 4
    for line in range(0, rows, 2):
        for column in range(columns + 1):
            for row in (line, line + 1):
                cells.append(row * columns + column if row < rows and column < columns else -1)
    return [*cells, *[-1] * (-len(cells) % 4), -1]


@pytest.mark.parametrize("size", [(72, 120), (72, 96), (100, 90)])
def test_a_picture_begins_a_block_of_deepseek_v4_wherever_it_stands(files: Files, size: tuple[int, int]) -> None:
    with opened(files, "deepseek4v", method="divprune", keep=0.5) as vlm:
        encoded = vlm.encode(Image.fromarray(noise(*size)))
        layout = encoded.tokens.layout
        assert layout.cell.tolist() == in_pairs(*layout.grids[0])
        assert layout.grids[0] == tuple(-(-side // 24) for side in size)
        header = read_header(vlm.mmproj)
        tensor = header.tensors["v.token_embd.img_start"]
        begin = np.fromfile(vlm.mmproj, np.float32, tensor.shape[0], offset=tensor.offset)
        for before in range(6):
            text = np.arange(3, 3 + before, dtype=np.int32)
            _, picture, _ = prompt_parts(vlm.embedding, [text, text], [encoded])
            (place,) = np.flatnonzero((picture.embeddings == begin).all(axis=1))
            assert (before + place) % 4 == 3  # the last of a block
            assert len(picture) == picture.advance == len(encoded.plan) - before % 4
            np.testing.assert_array_equal(picture.positions, np.arange(len(picture)))
            np.testing.assert_array_equal(picture.embeddings, encoded.rows.embeddings[before % 4 :])


def test_hunyuanvl_needs_a_model_on_a_grid(files: Files, tmp_path: Path) -> None:
    lm = write_token_model(tmp_path / "lm.gguf", "gemma4")
    with pytest.raises(TokcompError, match=r"needs a language model with positions by row and column \(M-RoPE\)"):
        load(lm, files.of("hunyuanvl")[1], threads=1)
