"""Pixtral and Mistral Small 3 against transformers, on tiny models as two GGUF files: breaks between rows of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edge_tokcomp.errors import ImageError, TokcompError
from edge_tokcomp.families import TowerSpec, family_for
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.mtmd import ImagePiece, MtmdEncoder, TextPiece
from edge_tokcomp.tokens import Role
from family_proof import (
    Proof,
    assert_same_rows,
    assert_same_text,
    assert_same_when_rows_are_dropped,
    error,
    photo,
)
from hf_processors import make_processor, make_tokenizer
from hf_vlms import CLIP, build

NAMES = ("pixtral", "mistral3")
SIZES = ((64, 64), (100, 60), (203, 151), (31, 330), (20, 7))
IMAGE = 300


@pytest.fixture(scope="module", params=NAMES)
def proof(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Proof:
    return Proof.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_processors(proof: Proof, size: tuple[int, int]) -> None:
    theirs = proof.asked([photo(*size)], "q")
    pixels = proof.family.preprocess(photo(*size), proof.spec)
    height, width = theirs["image_sizes"][0].tolist()
    assert pixels.grids == ((height // proof.spec.unit, width // proof.spec.unit),)
    np.testing.assert_allclose(pixels.crops[0], theirs["pixel_values"][0].numpy(), atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_those_of_tower_and_projector(proof: Proof, size: tuple[int, int]) -> None:
    theirs = proof.asked([photo(*size)], "q")
    with torch.no_grad():
        features = proof.model.get_image_features(theirs["pixel_values"], image_sizes=theirs["image_sizes"])
    assert_same_rows(proof, photo(*size), torch.cat([*features.pooler_output]).numpy())


@pytest.mark.parametrize("size", SIZES)
def test_prompt_and_picture_give_the_same_text(proof: Proof, size: tuple[int, int]) -> None:
    assert_same_text(proof, [photo(*size)])


def test_two_pictures_stand_behind_one_another(proof: Proof) -> None:
    assert_same_text(proof, [photo(90, 60), photo(60, 100, seed=1)], "which is larger")


@pytest.mark.parametrize("method", ["divprune", "uniform"])
def test_dropped_rows_leave_the_breaks(proof: Proof, method: str) -> None:
    assert_same_when_rows_are_dropped(proof, photo(203, 151), method=method)


@pytest.mark.parametrize("method", ["uniform", "pool", "tome"])
def test_breaks_stay_where_the_rows_they_end_are(proof: Proof, method: str) -> None:
    with proof.open(method=method, keep=20) as vlm:
        encoded = vlm.encode(photo(203, 151))
        row_break = vlm.embedding.lookup([304])
    layout, plan = encoded.tokens.layout, encoded.plan
    breaks = layout.role[plan.keep] == Role.SEPARATOR
    assert (len(plan), breaks.sum()) == (20, layout.grids[0][0] - 1)
    np.testing.assert_allclose(encoded.rows.embeddings[:20][breaks], np.repeat(row_break, breaks.sum(), 0), atol=1e-6)
    assert not np.isclose(encoded.rows.embeddings[:20][~breaks], row_break).all(axis=1).any()


def test_a_matrix_over_an_unfolded_square_is_read_in_the_order_of_our_squares(tmp_path: Path) -> None:
    """Without the order of columns rows differ: the tower's own check, graph against NumPy, cannot say so by itself."""
    from dataclasses import replace

    from edge_tokcomp.export.mmproj import Mmproj
    from edge_tokcomp.export.reference import reference_projector

    made = Proof.make("mistral3", tmp_path)
    mmproj, spec = Mmproj(made.mmproj), made.spec
    rows = np.random.default_rng(0).standard_normal((3, spec.token_width)).astype(np.float32)
    projector = made.model.model.multi_modal_projector
    with torch.no_grad():
        square = torch.from_numpy(rows).reshape(3, 2, 2, spec.width).permute(0, 3, 1, 2)
        merged = projector.patch_merger.merging_layer(torch.nn.functional.unfold(square, 2).squeeze(-1))
        wanted = projector.linear_2(projector.act(projector.linear_1(merged)))
    assert error(reference_projector(spec, mmproj, rows), wanted) <= 1e-5
    assert error(made.tower().project(rows), wanted) <= 1e-5
    steps = tuple(replace(step, by_channel=False) for step in spec.projector)
    assert error(reference_projector(replace(spec, projector=steps), mmproj, rows), wanted) > 0.1


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_the_file_says_how_the_feed_forward_is_gated(activation: str) -> None:
    metadata = _published("pixtral-12b")[0] | {f"clip.use_{name}": name == activation for name in ("silu", "gelu")}
    assert _spec(metadata).activation == activation


def _published(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata of the mmproj, and what the processor's files say."""
    edge, patch, merge = {"pixtral-12b": (1024, 16, 1), "mistral-small-3.1": (1540, 14, 2)}[name]
    metadata: dict[str, Any] = {
        "clip.projector_type": "pixtral", "clip.use_silu": True, "clip.vision.image_size": edge,
        "clip.vision.patch_size": patch, "clip.vision.embedding_length": 1024, "clip.vision.block_count": 24,
        "clip.vision.feed_forward_length": 4096, "clip.vision.attention.head_count": 16,
        "clip.vision.attention.layer_norm_epsilon": 1e-5, "clip.vision.image_mean": CLIP["image_mean"],
        "clip.vision.image_std": CLIP["image_std"],
    }  # fmt: skip
    if merge > 1:
        metadata["clip.vision.spatial_merge_size"] = merge
    size = {"size": {"longest_edge": edge}, "patch_size": patch, "spatial_merge_size": merge}
    return metadata, {**CLIP, **size}


def _spec(metadata: dict[str, Any]) -> TowerSpec:
    return family_for(metadata).spec(metadata, {f"v.blk.{block}.ln1.weight": (1024,) for block in range(24)})


@pytest.mark.parametrize("name", ["pixtral-12b", "mistral-small-3.1"])
def test_published_models_take_the_tokens_of_the_processor(name: str) -> None:
    metadata, preprocessor = _published(name)
    family, spec = family_for(metadata), _spec(metadata)
    tokenizer = make_tokenizer("pixtral")
    row_break, end = tokenizer.convert_tokens_to_ids(["[IMG_BREAK]", "[IMG_END]"])
    processor = make_processor("pixtral", tokenizer, preprocessor)
    for picture in (photo(1540, 1540), photo(1600, 431), photo(333, 1000), photo(16, 17), photo(1, 900)):
        asked = processor(images=[picture], text="[IMG]", return_tensors="np")
        pixels = family.preprocess(picture, spec)
        np.testing.assert_allclose(pixels.crops[0], asked["pixel_values"][0], atol=1e-6)
        layout = family.layout(pixels, spec)
        ours = np.where(layout.role == Role.PATCH, IMAGE, row_break)
        assert [*ours, end] == asked["input_ids"][0].tolist()[1:]
        assert layout.cell[layout.patches].tolist() == list(range(np.prod(pixels.grids[0])))
        assert family.prompt(pixels) == ((0,), "[IMG_END]")


def test_llama_cpp_feeds_the_same_where_it_does_not_resize(proof: Proof) -> None:
    picture = photo(64, 48)
    image, end = _libmtmd(proof, picture)
    with proof.open() as vlm:
        tokens = vlm.see(picture).tokens
        mark = vlm.model.tokenize("[IMG_END]", add_special=False, parse_special=True)
    assert image.n_pos == len(tokens)
    assert error(image.embeddings, tokens.embeddings) <= 5e-3  # rows and breaks
    assert end.tokens.tolist() == mark.tolist()


def test_llama_cpp_takes_other_numbers_of_tokens(proof: Proof) -> None:
    """libmtmd (tools/mtmd/mtmd-image.cpp, calc_size_preserved_ratio) makes a picture of 8 to 1024 tokens and knows no
    longest edge (ggml-org/llama.cpp issue 14310, pull request 16878), and rounds to the nearest multiple, not up."""
    small, large, between = (9, 7), (203, 151), (67, 67)
    theirs = {"pixtral": {small: 12, large: 475, between: 64}, "mistral3": {small: 12, large: 117, between: 16}}
    ours = {"pixtral": {small: 2, large: 192, between: 81}, "mistral3": {small: 1, large: 48, between: 25}}
    with proof.open() as vlm:
        row_break = vlm.embedding.lookup([304])
    for size in (small, large, between):
        image, _ = _libmtmd(proof, photo(*size))
        breaks = np.isclose(image.embeddings, row_break).all(axis=1).sum()
        assert len(image.embeddings) - breaks == theirs[proof.name][size]
        ((rows, columns),) = proof.family.preprocess(photo(*size), proof.spec).grids
        assert rows * columns == ours[proof.name][size]


def test_llama_cpp_keeps_proportions_on_black_where_the_processor_stretches(proof: Proof) -> None:
    """libmtmd (tools/mtmd/mtmd-image.cpp, resize with padding). No public issue says so."""
    picture, black = photo(112, 29), Image.new("RGB", (112, 32))
    black.paste(picture, (0, 1))
    image, _ = _libmtmd(proof, picture)
    with proof.open() as vlm:
        padded, stretched = (vlm.see(seen).tokens.embeddings for seen in (black, picture))
    assert error(image.embeddings, padded) <= 5e-3
    assert error(image.embeddings, stretched) > 0.05


def _libmtmd(proof: Proof, picture: Image.Image) -> tuple[ImagePiece, TextPiece]:
    with LanguageModel.open(proof.lm) as model, MtmdEncoder(proof.mmproj, model, threads=1) as encoder:
        image, end = encoder.encode(np.asarray(picture))
    assert isinstance(image, ImagePiece)
    assert isinstance(end, TextPiece)
    return image, end


def test_a_sliver_is_refused(proof: Proof) -> None:
    with pytest.raises(ImageError, match=r"picture of 1x300 pixels: one side may be at most 128 times the other"):
        proof.family.preprocess(Image.new("RGB", (1, 300)), proof.spec)


def test_a_lower_resolution_is_a_smaller_picture_with_its_own_breaks(proof: Proof) -> None:
    with proof.open(method="resolution", keep=0.5) as vlm:
        encoded = vlm.encode(photo(203, 151))
    ((rows, columns),) = encoded.tokens.layout.grids
    assert len(encoded.plan) == rows * (columns + 1) - 1 < encoded.plan.before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip.vision.spatial_merge_size": 0}, "spatial_merge_size 0"),
        ({"clip.vision.spatial_merge_size": 2.0}, "spatial_merge_size is 2.0, not an integer"),
        ({"clip.vision.spatial_merge_size": 60}, "60 patches of 8 are larger"),
        ({"clip.vision.patch_size": 0}, "patch_size 0"),
        ({"clip.rope.freq_base": 0.0}, "base 0.0 of rotary positions"),
        ({"clip.vision.attention.head_count": 16}, "heads of 2 channels cannot be rotated"),
        ({"clip.vision.image_size": 8192}, "makes up to 262144 tokens of 16 pixels a side, 16384 are possible"),
        ({"clip.vision.image_size": 1 << 30}, "image_size 1073741824"),
    ],
)
def test_impossible_metadata_is_refused_in_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(TokcompError, match=message) as fault:
        _opened(tmp_path, "mistral3", edit=lambda keys: keys.update(changes))
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("name", ["mm.patch_merger.weight", "mm.input_norm.weight", "v.token_embd.img_break"])
def test_a_tensor_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(TokcompError, match=f"tensor {name} is missing"):
        _opened(tmp_path, "mistral3", drop=(name,))


def _opened(folder: Path, name: str, **options: Any) -> None:
    from edge_tokcomp.export.mmproj import Mmproj
    from edge_tokcomp.export.shapes import projector_shapes, tower_shapes
    from hf_mmproj import write_mmproj_of

    mmproj = Mmproj(write_mmproj_of(build(name), name, folder / "m.gguf", **options))
    spec = family_for(mmproj.metadata).spec(mmproj.metadata, mmproj.shapes)
    mmproj.require(tower_shapes(spec) | projector_shapes(spec, mmproj))
