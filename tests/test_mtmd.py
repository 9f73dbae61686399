"""libmtmd's rows fed by us give the logits that llama.cpp's own helper gives for the same prompt and picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.language.decoder import PlainDecoder
from edge_tokcomp.language.gguf_header import read_header
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.mtmd import ImagePiece, MtmdEncoder, TextPiece
from edge_tokcomp.language.token_embedding import TokenEmbedding
from edge_tokcomp.tokens import Origin, Rows
from mtmd_files import FAMILIES, Files, Picture, noise
from mtmd_helper import CONTEXT, helper_logits

Floats = NDArray[np.float32]
Opened = tuple[LanguageModel, MtmdEncoder]

BEFORE, AFTER = "<|im_start|>the picture ", " the other\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("mtmd"))


@pytest.fixture
def opened(request: pytest.FixtureRequest, files: Files) -> Iterator[Opened]:
    lm, mmproj = files.of(request.param)
    with LanguageModel.open(lm, threads=1) as model, MtmdEncoder(mmproj, model, threads=1) as encoder:
        yield model, encoder


def of(*families: str) -> Any:
    return pytest.mark.parametrize("opened", families, indirect=True)


def our_logits(model: LanguageModel, encoder: MtmdEncoder, picture: Picture) -> Floats:
    """Of the last row, when text, pieces and text are fed one after another at the positions that the pieces tell."""
    embedding = TokenEmbedding.of(model)
    before, after = (model.tokenize(text, add_special=False, parse_special=True) for text in (BEFORE, AFTER))
    place = 0
    with PlainDecoder(model, n_ctx=CONTEXT, kv_type="f32") as decoder:
        for piece in (TextPiece(before), *encoder.encode(picture), TextPiece(after)):
            if isinstance(piece, TextPiece):
                (logits,) = decoder.decode([embedding.rows(piece.tokens, place)])
                place += len(piece.tokens)
                continue
            spare = place % (piece.padding + 1)
            positions = np.arange(place, place + len(piece.embeddings) - spare, dtype=np.int32)
            if piece.positions is not None and piece.origin is not None:
                positions = piece.positions + np.int32(place) * (piece.origin == Origin.START)
            image = np.zeros(len(positions.T), np.int64)
            decoder.decode([Rows(piece.embeddings[spare:], positions, crop=image)], causal=encoder.causal)
            place += piece.n_pos - spare
        assert decoder.length(0) == place
    return logits[0]


@of(*FAMILIES)
@pytest.mark.parametrize("size", [(60, 90), (210, 130)], ids=["wide", "tall"])
def test_our_rows_at_our_positions_give_the_logits_of_libmtmds_own_helper(opened: Opened, size: Any) -> None:
    model, encoder = opened
    picture = noise(*size)
    wanted = helper_logits(model, encoder.path, (BEFORE, AFTER), [picture])
    assert np.abs(our_logits(model, encoder, picture) - wanted).max() <= 1e-4 * np.abs(wanted).max()


@of("qwen2vl", "qwen25vl", "qwen3vl")
def test_rows_of_an_m_rope_model_stand_on_the_pictures_grid(opened: Opened) -> None:
    model, encoder = opened
    side = 28 if encoder.projector == "qwen2.5vl_merger" else 16  # pixels a token
    start, image, end = encoder.encode(noise(13 * side, 8 * side))
    assert isinstance(start, TextPiece)
    assert isinstance(image, ImagePiece)
    assert isinstance(end, TextPiece)
    assert [model.detokenize(piece.tokens, special=True) for piece in (start, end)] == [
        "<|vision_start|>", "<|vision_end|>",
    ]  # fmt: skip
    assert (encoder.grid_positions, encoder.causal, image.grid, image.n_pos) == (True, True, (13, 8), 13)
    assert image.embeddings.shape == (13 * 8, model.n_embd_inp)
    row, column = np.mgrid[:13, :8].reshape(2, -1)
    assert image.positions is not None
    np.testing.assert_array_equal(image.positions, [0 * row, row, column, 0 * row])
    assert image.origin is not None
    start_of = [[Origin.START]] * 3 + [[Origin.NOTHING]]
    np.testing.assert_array_equal(image.origin, np.repeat(start_of, 13 * 8, axis=1))


@of("idefics3")
def test_pieces_come_in_prompt_order_with_the_markers_between_the_tiles(opened: Opened) -> None:
    model, encoder = opened
    pieces = encoder.encode(noise(64, 128))  # two rows of four tiles of 32, then the whole
    text = "".join(
        model.detokenize(piece.tokens, special=True) if isinstance(piece, TextPiece) else "*" for piece in pieces
    )
    rows = ["".join(f"<fake_token_around_image><row_{row}_col_{column}>*" for column in (1, 2, 3, 4)) for row in (1, 2)]
    assert text == "\n".join(rows) + "\n\n<fake_token_around_image><global-img>*<fake_token_around_image>"
    images = [piece for piece in pieces if isinstance(piece, ImagePiece)]
    assert {image.embeddings.shape for image in images} == {(16, 64)}
    assert {(image.n_pos, image.grid, image.positions is None) for image in images} == {(16, None, True)}


@of("minicpmv")
def test_the_whole_comes_first_where_the_model_has_it_so(opened: Opened) -> None:
    model, encoder = opened
    texts = [
        model.detokenize(piece.tokens, special=True) if isinstance(piece, TextPiece) else f"*{len(piece.embeddings)}"
        for piece in encoder.encode(noise(90, 150))
    ]
    row = "<slice>*16</slice><slice>*16</slice>"
    assert "".join(texts) == f"<image>*16</image>{row}\n{row}"


@of("gemma3")
def test_gemma3_sees_its_image_rows_in_both_directions(opened: Opened) -> None:
    _, encoder = opened
    assert not encoder.causal


@of("llava15", "gemma3", "internvl_qwen2")
def test_usual_tokens_are_those_of_a_picture_of_the_files_size(opened: Opened) -> None:
    _, encoder = opened
    side = int(read_header(encoder.path).number("clip.vision.image_size", 0))
    pieces = encoder.encode(noise(side, side))
    assert encoder.usual_tokens == sum(len(piece.embeddings) for piece in pieces if isinstance(piece, ImagePiece)) > 0


@of("pixtral")
def test_row_ends_that_are_not_finite_are_written_as_the_file_has_them(opened: Opened) -> None:
    _, encoder = opened
    tensor = read_header(encoder.path).tensors["v.token_embd.img_break"]
    row_break = np.fromfile(encoder.path, np.float32, 64, offset=tensor.offset)
    rows = np.ones((3, 64), np.float32)
    rows[1] = row_break
    rows[1, 5:9] = np.nan
    encoder._mend(rows)
    np.testing.assert_array_equal(rows, [np.ones(64), row_break, np.ones(64)])
    rows[2, 0] = np.inf
    with pytest.raises(TokcompError, match="not finite"):
        encoder._mend(rows)


@of("llava15")
def test_pictures_are_rgb_in_any_memory_order(opened: Opened) -> None:
    _, encoder = opened
    picture = noise(48, 48)
    (once,), (turned,) = encoder.encode(picture), encoder.encode(np.asfortranarray(picture))
    (blue,) = encoder.encode(picture[..., ::-1])
    assert isinstance(once, ImagePiece)
    assert isinstance(turned, ImagePiece)
    assert isinstance(blue, ImagePiece)
    np.testing.assert_array_equal(once.embeddings, turned.embeddings)
    assert np.abs(once.embeddings - blue.embeddings).max() > 0.1
