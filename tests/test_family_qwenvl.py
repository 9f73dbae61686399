"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers, on tiny models as two GGUF files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edge_tokcomp import load
from edge_tokcomp.errors import ImageError, TokcompError
from edge_tokcomp.families import family_for
from family_proof import Proof, assert_same_rows, assert_same_text, assert_same_when_rows_are_dropped, photo
from hf_language import write_language

NAMES = ("qwen2vl", "qwen25vl", "qwen3vl")
SIZES = ((64, 64), (100, 60), (203, 151), (31, 330))


@pytest.fixture(scope="module", params=NAMES)
def proof(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Proof:
    def limits(metadata):  # of the tiny processors; published files say nothing of them
        unit = (2 * metadata["clip.vision.patch_size"]) ** 2
        metadata |= {"clip.vision.image_min_pixels": 8 * unit, "clip.vision.image_max_pixels": 40 * unit}

    made = Proof.make(request.param, tmp_path_factory.mktemp(request.param), limits)
    unit = made.spec.unit**2
    made.processor.image_processor.size = {"shortest_edge": 8 * unit, "longest_edge": 40 * unit}
    return made


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_processors(proof: Proof, size: tuple[int, int]) -> None:
    theirs = proof.asked([photo(*size)], "q")
    pixels = proof.family.preprocess(photo(*size), proof.spec)
    (_, rows, columns), patch = theirs["image_grid_thw"][0].tolist(), proof.spec.patch_size
    assert pixels.grids == ((rows // 2, columns // 2),)
    # Two patches by two, one after another, and every patch twice, for two frames.
    wanted = theirs["pixel_values"].numpy().reshape(rows // 2, columns // 2, 2, 2, 3, 2, patch, patch)
    assert np.array_equal(wanted[:, :, :, :, :, 0], wanted[:, :, :, :, :, 1])
    wanted = wanted[:, :, :, :, :, 0].transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * patch, columns * patch)
    np.testing.assert_allclose(pixels.crops[0], wanted, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_those_of_tower_and_merger(proof: Proof, size: tuple[int, int]) -> None:
    theirs = proof.asked([photo(*size)], "q")
    with torch.no_grad():
        out = proof.model.get_image_features(theirs["pixel_values"], theirs["image_grid_thw"])
    wanted = torch.cat([*out.pooler_output], 0)
    if proof.name == "qwen3vl":
        wanted = torch.cat([wanted, *(torch.cat([*level]) for level in out.deepstack_features)], 1)
    assert_same_rows(proof, photo(*size), wanted.numpy())


@pytest.mark.parametrize("size", SIZES)
def test_prompt_and_picture_give_the_same_text(proof: Proof, size: tuple[int, int]) -> None:
    assert_same_text(proof, [photo(*size)])


def test_two_pictures_stand_behind_one_another(proof: Proof) -> None:
    assert_same_text(proof, [photo(90, 60), photo(60, 100, seed=1)], "which is larger")


@pytest.mark.parametrize("method", ["divprune", "prunesid-qwen", "pool"])
def test_kept_rows_stay_where_they_were(proof: Proof, method: str) -> None:
    if method == "pool":
        with proof.open(method=method, keep=0.5) as vlm:
            encoded = vlm.encode(photo(203, 151))
        row, column = np.divmod(encoded.tokens.layout.cell[encoded.plan.keep], encoded.tokens.layout.grids[0][1])
        assert encoded.rows.positions[1].tolist() == row.tolist()
        assert encoded.rows.positions[2].tolist() == column.tolist()
    else:
        assert_same_when_rows_are_dropped(proof, photo(203, 151), method=method)


def test_the_text_after_a_picture_stands_where_its_whole_grid_ends(proof: Proof) -> None:
    with proof.open(method="uniform", keep=1) as vlm:
        rows = vlm.encode(photo(203, 151)).rows
    assert len(rows) == 1
    assert rows.advance == max(proof.family.preprocess(photo(203, 151), proof.spec).grids[0])


def test_a_sliver_is_refused(proof: Proof) -> None:
    with pytest.raises(ImageError, match=r"picture of 1x300 pixels: .* at most 200 times the other"):
        proof.family.preprocess(Image.new("RGB", (1, 300)), proof.spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip.vision.n_wa_pattern": 0}, "n_wa_pattern 0"),
        ({"clip.vision.window_size": 13}, "window.side 0"),
        ({"clip.vision.n_wa_pattern": None}, "n_wa_pattern is missing"),
        ({"clip.vision.spatial_merge_size": 99, "clip.vision.window_size": 4000}, "merge 99"),
        ({"clip.vision.is_deepstack_layers": [True] * 9}, "does not say which of"),
        ({"clip.vision.patch_size": 0}, "patch_size 0"),
        ({"clip.vision.spatial_merge_size": 0}, "spatial_merge_size 0"),
        ({"clip.vision.spatial_merge_size": "2"}, "spatial_merge_size is '2', not an integer"),
        ({"clip.vision.window_size": 0.5}, "window_size is 0.5, not an integer"),
        ({"clip.vision.image_min_pixels": 783}, r"783 to 3211264 pixels of a picture are not within 784\.\.12845056"),
        ({"clip.vision.image_max_pixels": 16384 * 784 + 1}, "3136 to 12845057 pixels"),
        ({"clip.vision.image_min_pixels": 4000, "clip.vision.image_max_pixels": 3999}, "4000 to 3999 pixels"),
        ({"clip.vision.attention.head_count": 7}, "not a multiple of its 7 heads"),
    ],
)
def test_impossible_metadata_is_refused_in_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    from edge_tokcomp.export.mmproj import Mmproj
    from hf_mmproj import write_mmproj_of
    from hf_vlms import build

    name = "qwen3vl" if "clip.vision.is_deepstack_layers" in changes else "qwen25vl"
    mmproj = Mmproj(write_mmproj_of(build(name), name, tmp_path / "m.gguf", edit=lambda keys: keys.update(changes)))
    with pytest.raises(TokcompError, match=message) as fault:
        family_for(mmproj.metadata).spec(mmproj.metadata, mmproj.shapes)
    assert "\n" not in str(fault.value)


def test_a_lower_resolution_is_a_smaller_picture_of_the_same_proportions(proof: Proof) -> None:
    picture = photo(203, 151)
    (own,) = proof.family.preprocess(picture, proof.spec).grids
    with proof.open(method="resolution", keep=0.5) as vlm:
        encoded = vlm.encode(picture)
        (rows, columns), before = encoded.tokens.layout.grids[0], encoded.plan.before
        assert before == own[0] * own[1]
        assert 0.35 * before < rows * columns == len(encoded.plan) <= round(before / 2)
        assert abs(rows / columns - own[0] / own[1]) < 0.2
        assert encoded.rows.advance == max(rows, columns)
        assert vlm.answer(encoded, "what is this", max_tokens=2).tokens_after == rows * columns
        small = picture.resize((columns * proof.spec.unit, rows * proof.spec.unit), Image.Resampling.BICUBIC)
        wanted = proof.family.preprocess(small, proof.spec)
        assert wanted.grids == ((rows, columns),)
        np.testing.assert_array_equal(vlm.engine.pixels(picture, encoded.variant).crops[0], wanted.crops[0])


def test_prompt_tokens_are_those_of_the_processor(proof: Proof) -> None:
    """Rows, not positions: a picture of M-RoPE moves the text on by less than it has rows."""
    pictures = [photo(203, 151), photo(100, 60)]
    with proof.open() as vlm:
        answer = vlm.answer(pictures, "what is this", max_tokens=2)
    assert answer.prompt_tokens == proof.asked(pictures, "what is this")["input_ids"].shape[1]


def test_a_template_that_takes_no_image_gets_the_marks_around_it(proof: Proof, tmp_path: Path) -> None:
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    plain = turns + "<|im_start|>assistant\n"
    lm = write_language(proof.model, proof.name, tmp_path / "plain.gguf", proof.tokenizer, plain)
    with load(lm, proof.mmproj, threads=1, provider="cpu", n_ctx=512) as vlm:
        encoded = vlm.encode(photo(100, 60))
        pieces = vlm.asker.written("what is this", 1).around([encoded.around]).tokenize(vlm.model)
        said = [vlm.model.detokenize(piece, special=True) for piece in pieces]
    assert said[0].endswith("<|im_start|>user\n<|vision_start|>")
    assert said[1].startswith("<|vision_end|>what is this<|im_end|>")
