"""Idefics3 and SmolVLM against transformers, on tiny models as two GGUF files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.export.mmproj import Mmproj
from edge_tokcomp.families import TowerSpec, family_for, family_named
from edge_tokcomp.families.base import Part, Pixels
from edge_tokcomp.tower import Tower
from family_proof import (
    Proof,
    assert_same_rows,
    assert_same_text,
    assert_same_when_rows_are_dropped,
    error,
    photo,
)
from hf_mmproj import write_mmproj_of
from hf_processors import make_processor, make_tokenizer
from hf_vlms import HALF, build
from mtmd_pieces import both_pieces, rows, texts

NAMES = ("idefics3", "smolvlm")
SIZES = ((64, 64), (100, 60), (203, 151), (31, 330))
PUBLISHED = {  # image_size, patch_size, scale_factor, width, heads, feed-forward, blocks
    "SmolVLM-500M": (512, 16, 4, 768, 12, 3072, 12),
    "SmolVLM2-2.2B": (384, 14, 3, 1152, 16, 4304, 27),
    "Idefics3-8B": (364, 14, 2, 1152, 16, 4304, 27),
}
FAMILY = family_named("idefics3")


@pytest.fixture(scope="module", params=NAMES)
def proof(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Proof:
    return Proof.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def one_tile(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    """A SmolVLM whose longest edge is one tile."""
    made = Proof.make(
        "smolvlm", tmp_path_factory.mktemp("one"), lambda keys: keys.update({"clip.vision.preproc_image_size": 64})
    )
    made.processor.image_processor.size = {"longest_edge": 64}
    return made


def written(parts: tuple[Part, ...], pixels: Pixels) -> str:
    """The processor's spelling of ``parts``: an image token for every row."""
    return "".join(
        part if isinstance(part, str) else "<image>" * sum(int(np.prod(pixels.grids[crop])) for crop in part)
        for part in parts
    )


def their_text(processor: Any, image: Image.Image) -> tuple[str, Any]:
    found = processor.image_processor([[image]], return_row_col_info=True)
    return processor.replace_image_token(found, 0), found["pixel_values"][0]


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_processors(proof: Proof, size: tuple[int, int]) -> None:
    theirs = proof.asked([photo(*size)], "q")["pixel_values"][0].numpy()
    pixels = proof.family.preprocess(photo(*size), proof.spec)
    np.testing.assert_allclose(np.stack(pixels.crops), theirs, atol=1e-6)


def test_picture_sizes_of_all_kinds_are_cut_as_the_processor_cuts_them(proof: Proof) -> None:
    random = np.random.default_rng(0)
    metadata, shapes = Mmproj(proof.mmproj).metadata, Mmproj(proof.mmproj).shapes
    side = proof.spec.image_size
    for longest in (side, side + 20, 3 * side - 1, 5 * side):  # sides that are no whole tiles too
        spec = proof.family.spec(metadata | {"clip.vision.preproc_image_size": longest}, shapes)
        proof.processor.image_processor.size = {"longest_edge": longest}
        for width, height in [(1, 9), (9, 1), (2, 1), *random.integers(2, 300, (12, 2)).tolist()]:
            image = photo(width, height)
            text, theirs = their_text(proof.processor, image)
            pixels = proof.family.preprocess(image, spec)
            np.testing.assert_allclose(np.stack(pixels.crops), theirs, atol=1e-6)
            assert written(proof.family.prompt(pixels), pixels) == text
    proof.processor.image_processor.size = {"longest_edge": 4 * side}


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_those_of_tower_and_connector(proof: Proof, size: tuple[int, int]) -> None:
    theirs = proof.asked([photo(*size)], "q")
    with torch.no_grad():
        out = proof.model.get_image_features(theirs["pixel_values"], theirs["pixel_attention_mask"])
    assert_same_rows(proof, photo(*size), torch.cat([*out.pooler_output], 0).numpy())


@pytest.mark.parametrize("size", SIZES)
def test_prompt_and_picture_give_the_same_text(proof: Proof, size: tuple[int, int]) -> None:
    assert_same_text(proof, [photo(*size)])


def test_two_pictures_stand_behind_one_another(proof: Proof) -> None:
    assert_same_text(proof, [photo(90, 60), photo(60, 100, seed=1)], "which is larger")


@pytest.mark.parametrize("method", ["divprune", "todre"])
def test_kept_rows_follow_one_another(proof: Proof, method: str) -> None:
    assert_same_when_rows_are_dropped(proof, photo(203, 151), method=method)


def test_a_tile_none_of_whose_rows_are_kept_keeps_its_markers(proof: Proof) -> None:
    with proof.open(method="divprune", keep=3) as vlm:
        encoded = vlm.encode(photo(203, 151))
        whole = vlm.encoder.compress(encoded, vlm.method, 1.0, "q")
    assert (encoded.rows.crop >= 0).sum() == 3
    assert (encoded.rows.crop < 0).sum() == (whole.rows.crop < 0).sum()


def test_a_picture_of_one_tile_is_the_overview_alone(one_tile: Proof) -> None:
    pixels = one_tile.family.preprocess(photo(203, 151), one_tile.spec)
    assert one_tile.family.prompt(pixels) == (
        "<fake_token_around_image><global-img>",
        (0,),
        "<fake_token_around_image>",
    )
    assert one_tile.family.layout(pixels, one_tile.spec).overview is None
    assert_same_text(one_tile, [photo(203, 151)])


@pytest.mark.parametrize("size", SIZES)
def test_llama_cpp_reads_the_same_tiles_and_markers(proof: Proof, size: tuple[int, int]) -> None:
    """It resizes lines first as Pillow before 13 does, which turns to columns first where that is less work: tall
    pictures come out up to a few levels of grey apart."""
    ours, theirs = both_pieces(proof, photo(*size))
    assert texts(ours) == texts(theirs)
    for own, other in zip(rows(ours), rows(theirs), strict=True):
        assert error(other, own) <= (5e-3 if size[0] >= size[1] else 3e-2)


def test_llama_cpp_writes_a_picture_of_one_tile_twice(one_tile: Proof) -> None:
    """As a tile and as the overview of that tile (tools/mtmd/mtmd-image.cpp, mtmd_image_preprocessor_idefics3). The
    processors have a text of its own for a picture that is not split. No public issue says so."""
    ours, theirs = both_pieces(one_tile, photo(203, 151))
    assert len(rows(ours)) == 1
    tile, overview = rows(theirs)
    assert error(tile, rows(ours)[0]) <= 5e-3
    assert error(overview, tile) == 0


def test_llama_cpp_stretches_to_the_nearest_tiles_where_a_file_does_not_say_how_many(tmp_path: Path) -> None:
    """Files from before pull request 16206 lack the key. transformers makes four tiles of any longer side."""
    old = Proof.make("smolvlm", tmp_path, lambda keys: keys.update({"clip.vision.preproc_image_size": None}))
    assert_same_text(old, [photo(203, 151)])
    ours, theirs = both_pieces(old, photo(203, 151))
    assert len(rows(ours)) == 3 * 4 + 1
    assert len(rows(theirs)) == 2 * 3 + 1  # 151 / 64 and 203 / 64, rounded


def test_the_overview_comes_last_and_methods_know_it(proof: Proof) -> None:
    pixels = proof.family.preprocess(photo(203, 151), proof.spec)
    layout = proof.family.layout(pixels, proof.spec)
    assert layout.overview == len(pixels.crops) - 1 == 12
    assert pixels.tiles == (3, 4)


def test_tiles_alike_in_every_pixel_go_through_the_tower_once(proof: Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    """The white margins of a page."""
    page = Image.new("RGB", (300, 300), "white")
    page.paste(photo(20, 16), (1, 1))
    with proof.open() as vlm:
        counts: list[int] = []
        plain = Tower.encode
        monkeypatch.setattr(
            Tower, "encode", lambda self, crops, *more: (counts.append(len(crops)), plain(self, crops, *more))[1]
        )
        seen = vlm.see(page)
        crops = vlm.engine.pixels(page).crops
    distinct = len({crop.tobytes() for crop in crops})
    assert sum(counts) == distinct < len(crops)
    monkeypatch.undo()
    features = np.split(np.asarray(seen.tokens.features), len(crops))
    with proof.open() as vlm:
        for crop, rows in zip(crops, features, strict=True):
            np.testing.assert_allclose(vlm.engine.tower.encode(crop[None]).features[0], rows, atol=1e-5)


def test_lower_resolution_shrinks_every_crop(proof: Proof) -> None:
    with proof.open(method="resolution", keep=13 * 4) as vlm:
        seen = vlm.see(photo(203, 151))
        assert vlm.answer(seen, "q", max_tokens=2).tokens_after == 13 * 4
    assert seen.tokens.layout.grids == ((2, 2),) * 13
    whole = proof.family.preprocess(photo(203, 151), proof.spec, (2, 2))
    assert {crop.shape for crop in whole.crops} == {(3, 2 * proof.spec.unit, 2 * proof.spec.unit)}


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("size", [(640, 480), (300, 900), (1000, 230)])
def test_published_models_have_the_processors_tokens(model: str, size: tuple[int, int]) -> None:
    side, patch, merge, *_ = PUBLISHED[model]
    spec = published(model)
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=side, patch_size=patch), scale_factor=merge)
    name = "idefics3" if model.startswith("Idefics3") else "smolvlm"
    preprocessor = {**HALF, "size": {"longest_edge": 4 * side}, "max_image_size": {"longest_edge": side}}
    processor = make_processor(name, make_tokenizer(name), preprocessor, config)
    text, theirs = their_text(processor, photo(*size))
    pixels = FAMILY.preprocess(photo(*size), spec)
    assert len(pixels.crops) == len(theirs)
    assert written(FAMILY.prompt(pixels), pixels) == text
    assert len(FAMILY.layout(pixels, spec)) == text.count("<image>")
    np.testing.assert_allclose(np.stack(pixels.crops), theirs, atol=1e-6)


def test_published_models_have_as_many_tokens_as_their_cards_say() -> None:
    assert {model: published(model).patches for model in PUBLISHED} == {
        "SmolVLM-500M": 64, "SmolVLM2-2.2B": 81, "Idefics3-8B": 169,
    }  # fmt: skip


def published(model: str, **changes: Any) -> TowerSpec:
    side, patch, merge, width, heads, ffn, blocks = PUBLISHED[model]
    metadata = {
        "clip.vision.image_size": side, "clip.vision.patch_size": patch, "clip.vision.embedding_length": width,
        "clip.vision.attention.head_count": heads, "clip.vision.feed_forward_length": ffn,
        "clip.vision.block_count": blocks, "clip.vision.projector.scale_factor": merge,
        "clip.vision.attention.layer_norm_epsilon": 1e-6, "clip.vision.preproc_image_size": 4 * side,
        "clip.vision.image_mean": [0.5] * 3, "clip.vision.image_std": [0.5] * 3,
    } | changes  # fmt: skip
    return FAMILY.spec(metadata, {f"v.blk.{block}.ln1.weight": (width,) for block in range(blocks)})


def test_a_file_that_does_not_say_how_long_the_longest_edge_is_gets_four_tiles(tmp_path: Path) -> None:
    file = Mmproj(
        write_mmproj_of(
            build("smolvlm"), "smolvlm", tmp_path / "m.gguf",
            edit=lambda keys: keys.update({"clip.vision.preproc_image_size": None}),
        )
    )  # fmt: skip
    assert family_for(file.metadata).spec(file.metadata, file.shapes).limits.longest_edge == 256


def test_the_epsilon_that_converters_make_up_is_siglips() -> None:
    assert (
        published("SmolVLM-500M", **{"clip.vision.attention.layer_norm_epsilon": float(np.float32(1e-5))}).eps == 1e-6
    )
    assert published("SmolVLM-500M", **{"clip.vision.attention.layer_norm_epsilon": 2e-5}).eps == 2e-5


def test_the_longest_edge_has_a_bound() -> None:
    assert published("SmolVLM-500M", **{"clip.vision.preproc_image_size": 1 << 30}).limits.longest_edge == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip.vision.projector.scale_factor": 3}, "8 patches a side of image_size 32 cannot be merged by 3"),
        ({"clip.vision.projector.scale_factor": None}, "scale_factor is missing"),
        ({"clip.vision.projector.scale_factor": 0}, "scale_factor 0"),
        ({"clip.vision.preproc_image_size": 0}, "preproc_image_size 0"),
        ({"clip.vision.preproc_image_size": 4096}, "makes up to 16384 tiles of 32 pixels a side, 64 are possible"),
        ({"clip.vision.patch_size": 0}, "patch_size 0"),
        ({"clip.vision.attention.head_count": 7}, "not a multiple of its 7 heads"),
        ({"clip.vision.block_count": 9}, "9 blocks, the file holds 3"),
    ],
)
def test_impossible_metadata_is_refused_in_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "m.gguf"
    mmproj = Mmproj(write_mmproj_of(build("idefics3"), "idefics3", path, edit=lambda keys: keys.update(changes)))
    with pytest.raises(TokcompError, match=message) as fault:
        family_for(mmproj.metadata).spec(mmproj.metadata, mmproj.shapes)
    assert "\n" not in str(fault.value)
