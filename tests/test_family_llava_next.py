"""LLaVA-NeXT (LLaVA-1.6) against transformers, on tiny models as two GGUF files."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextModel
from transformers.image_processing_utils import select_best_resolution

import hf_vlms
from edge_tokcomp.errors import TokcompError, UnsupportedError
from edge_tokcomp.export.mmproj import Mmproj
from edge_tokcomp.families import family_for, family_named
from edge_tokcomp.families.base import Pixels
from edge_tokcomp.families.llava_next import LlavaNext, _best
from edge_tokcomp.families.tower_spec import Limits, TowerSpec
from edge_tokcomp.language.mtmd import ImagePiece, MtmdEncoder
from edge_tokcomp.methods import get_method
from edge_tokcomp.tokens import Layout, Role, VisionTokens
from family_proof import Proof, assert_same_text, assert_same_when_rows_are_dropped, error, photo
from hf_language import write_language
from hf_mmproj import write_mmproj_of
from hf_processors import make_processor, make_tokenizer
from hf_vlms import CLIP, build
from tiny_mmproj import MLP

SIZES = ((64, 64), (100, 60), (203, 141), (31, 330), (400, 90), (20, 20), (50, 77))
PUBLISHED = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SPEC = TowerSpec(
    family="llava_next", image_size=336, patch_size=14, width=1024, heads=16, ffn_width=4096, blocks=23,
    activation="quick_gelu", eps=1e-5, image_mean=tuple(CLIP["image_mean"]), image_std=tuple(CLIP["image_std"]),
    projector=MLP, class_token=True, attention_block=22, pre_norm=True, separator="model.image_newline",
    limits=Limits(pinpoints=tuple((height, width) for height, width in PUBLISHED)),
)  # fmt: skip
ALL_SIZES = [
    (640, 480), (480, 640), (336, 336), (300, 300), (672, 672), (1024, 768), (1920, 1080), (1000, 333), (333, 1001),
    (337, 336), (1, 1000), (5000, 1), (1, 1), (17, 3000), (671, 673),
    (176, 55), (205, 328), (352, 748),  # so many cells of bars but for rounding
    *map(tuple, np.random.default_rng(0).integers(1, 1500, (60, 2)).tolist()),
]  # fmt: skip
"""Width and height."""


def mistral(ids: hf_vlms.Ids) -> LlavaNextConfig:
    config = hf_vlms._llava_next(ids)
    config.text_config = hf_vlms._mistral()
    return config


@pytest.fixture(scope="module", params=["vicuna", "mistral"])
def proof(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Proof:
    entry = hf_vlms.FAMILIES["llava_next"]
    if request.param == "mistral":
        entry = replace(entry, config=mistral)
    with mock.patch.dict(hf_vlms.FAMILIES, llava_next=entry):
        return Proof.make("llava_next", tmp_path_factory.mktemp(request.param))


@cache
def spread(size: tuple[int, int]) -> Pixels:
    """The crops that a picture of a published model is cut into, without their pixels."""
    nothing = np.zeros((3, 1, 1), np.float32)
    with mock.patch("edge_tokcomp.families.llava_next.normalised", return_value=nothing):
        return LlavaNext().preprocess(Image.new("RGB", size), SPEC)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_processors(proof: Proof, size: tuple[int, int]) -> None:
    theirs = proof.asked([photo(*size)], "q")["pixel_values"][0].numpy()
    pixels = proof.family.preprocess(photo(*size), proof.spec)
    np.testing.assert_allclose(np.stack(pixels.crops), theirs, atol=1e-5)
    assert pixels.grids == ((6, 6),) * len(theirs)
    assert pixels.tiles[0] * pixels.tiles[1] == len(theirs) - 1


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_those_that_transformers_packs_newlines_among_them(proof: Proof, size: tuple[int, int]) -> None:
    theirs = proof.asked([photo(*size)], "q")
    with torch.no_grad():
        (wanted,) = proof.model.get_image_features(theirs["pixel_values"], theirs["image_sizes"]).pooler_output
    with proof.open() as vlm:
        tokens = vlm.see(photo(*size)).tokens
    layout = tokens.layout
    assert error(tokens.embeddings[layout.uncompressed], wanted) <= 1e-4
    newline = proof.model.model.image_newline.detach().numpy()
    assert (tokens.embeddings[layout.protected] == newline).all()
    assert layout.protected.any()
    assert layout.overview == 0


@pytest.mark.parametrize("size", SIZES)
def test_prompt_and_picture_give_the_same_text(proof: Proof, size: tuple[int, int]) -> None:
    assert_same_text(proof, [photo(*size)])


def test_two_pictures_stand_behind_one_another(proof: Proof) -> None:
    assert_same_text(proof, [photo(90, 60), photo(60, 100, seed=1)], "which is larger")


@pytest.mark.parametrize("method", ["divprune", "prunesid", "vispruner"])
def test_with_rows_dropped_the_others_and_all_newlines_follow_on(proof: Proof, method: str) -> None:
    assert_same_when_rows_are_dropped(proof, photo(203, 141), method=method)


@pytest.mark.parametrize("template", ["mistral", None])
def test_published_templates_take_a_picture(proof: Proof, template: str | None, tmp_path: Path) -> None:
    """Mistral's takes strings only; files of Vicuna have none at all."""
    text = None
    wanted = "USER: <image>\nwhat is this ASSISTANT:"
    if template == "mistral":
        text = (
            "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
            "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
        )
        wanted = "[INST] <image>\nwhat is this [/INST]"
    other = replace(proof, lm=write_language(proof.model, "llava_next", tmp_path / "lm.gguf", proof.tokenizer, text))
    picture = photo(100, 61)
    theirs = dict(proof.processor(images=[picture], text=wanted, return_tensors="pt"))
    with mock.patch.object(Proof, "asked", return_value=theirs):
        assert_same_text(other, [picture])


@pytest.mark.parametrize("newline", [True, False])
def test_rows_lie_where_transformers_packs_those_of_published_sizes(newline: bool) -> None:
    config = LlavaNextConfig(image_grid_pinpoints=PUBLISHED)
    spec = SPEC if newline else replace(SPEC, separator="")
    for size in ALL_SIZES:
        pixels = spread(size)
        layout = LlavaNext().layout(pixels, spec)
        numbers = torch.arange(len(pixels.crops) * 576, dtype=torch.float64).reshape(-1, 576, 1)
        packed, _ = LlavaNextModel.pack_image_features(
            SimpleNamespace(config=config), [numbers], torch.tensor([size[::-1]]), "default",
            torch.tensor([-1.0], dtype=torch.float64) if newline else None,
        )  # fmt: skip
        rows = layout.uncompressed
        ours = np.where(layout.protected[rows], -1, layout.crop[rows] * 576 + layout.cell[rows])
        assert ours.tolist() == packed[0][:, 0].long().tolist()


def test_the_pinpoint_is_the_one_that_transformers_takes() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        pinpoints = [tuple(pair) for pair in (random.integers(1, 5, (4, 2)) * 336).tolist()]
        height, width = random.integers(1, 1500, 2).tolist()
        assert _best(height, width, pinpoints) == select_best_resolution((height, width), pinpoints)


def test_published_sizes_have_as_many_tokens_as_the_processor_counts() -> None:
    settings = CLIP | {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    processor = make_processor(
        "llava_next", make_tokenizer("llava_next"), settings | {"image_grid_pinpoints": PUBLISHED}, LlavaNextConfig()
    )
    sizes = [(height, width) for width, height in ALL_SIZES]
    wanted = processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    assert [LlavaNext().layout(spread(size), SPEC).before for size in ALL_SIZES] == wanted
    assert wanted[0] == 576 + 36 * 48 + 36  # 640x480 within 672x672: the bars are six cells above and six below
    assert max(wanted) == 576 + 48 * 48 + 48


def test_every_crop_has_its_cls_row_the_tiles_after_everything(proof: Proof) -> None:
    with proof.open(method="prunesid", keep=0.6) as vlm:
        tokens = vlm.see(photo(203, 141)).tokens
        plan = get_method("prunesid", keep_cls=True).compress(tokens, 0.6)
    layout = tokens.layout
    places = np.flatnonzero(layout.role == Role.CLS)
    assert layout.crop[places].tolist() == [0, 1, 2, 3, 4]
    assert places.tolist() == [0, *range(len(layout) - 4, len(layout))]
    assert np.isin(places, plan.keep).all()
    assert layout.before == len(layout) - 5


def test_cls_rows_stay_where_they_are_when_patches_do_not(proof: Proof) -> None:
    with proof.open(method="prunesid") as vlm:
        tokens = vlm.see(photo(203, 141)).tokens
    layout, method = tokens.layout, get_method("prunesid", keep_cls=True, order="released")
    plan = method.compress(tokens, 0.6)
    assert plan.order is not None
    assert np.flatnonzero(layout.role[plan.order] == Role.CLS).tolist() == [0, *range(len(plan) - 4, len(plan))]
    for crop in range(5):
        patches = np.flatnonzero((layout.crop == crop) & (layout.role == Role.PATCH))
        fed, chosen = (rows[np.isin(rows, patches)].tolist() for rows in (plan.order, plan.rank))
        assert fed == chosen


def test_the_attention_of_each_row_is_that_of_its_own_crops_cls(proof: Proof) -> None:
    pixels = proof.family.preprocess(photo(203, 141), proof.spec)
    with torch.no_grad():
        crops = torch.from_numpy(np.stack(pixels.crops))
        output = proof.model.model.vision_tower(crops, output_attentions=True)
    wanted = output.attentions[proof.spec.blocks - 1][:, :, 0].numpy()
    with proof.open(method="prunesid") as vlm:
        tokens = vlm.see(photo(203, 141)).tokens
    rows = np.flatnonzero(~tokens.layout.protected)
    crop, column = tokens.layout.crop[rows], 1 + tokens.layout.cell[rows]  # a CLS row has cell -1
    assert tokens.cls_attention is not None
    np.testing.assert_allclose(tokens.cls_attention[:, rows].T, wanted[crop, :, column], atol=1e-5)


@pytest.mark.parametrize("method", ["vispruner", "mosaic", "pool", "uniform", "holov", "visionzip"])
def test_each_crop_is_compressed_by_itself_cells_in_bars_left_out(proof: Proof, method: str) -> None:
    with proof.open(method="visionzip") as vlm:  # whose tower says what all of them look at
        tokens = vlm.see(photo(203, 141)).tokens
    layout, chosen = tokens.layout, get_method(method)
    plan = chosen.compress(tokens, 0.5)
    assert len(plan) == round(0.5 * layout.before)
    for crop in range(5):
        rows = np.flatnonzero((layout.crop == crop) & (layout.role == Role.PATCH))
        assert len(rows) == (36 if crop == 0 else 24)
        nothing = np.zeros(len(rows), np.int64)
        assert tokens.cls_attention is not None
        assert tokens.keys is not None
        alone = VisionTokens(
            tokens.features[rows], Layout((layout.grids[crop],), nothing, layout.cell[rows], nothing.astype(np.int8)),
            tokens.project, tokens.cls_attention[:, rows], tokens.keys[rows],
        )  # fmt: skip
        kept = np.intersect1d(rows, plan.keep)
        assert rows[chosen.compress(alone, len(kept)).keep].tolist() == kept.tolist()


@pytest.mark.parametrize("method", ["resolution", "luvc"])
def test_smaller_and_merged_crops_lie_between_the_same_bars(proof: Proof, method: str) -> None:
    with proof.open() as vlm:
        before = vlm.see(photo(203, 141)).tokens.layout.before
    with proof.open(method=method, keep=0.5) as vlm:
        answer = vlm.answer(photo(203, 141), max_tokens=1)
    (encoded,) = answer.images
    layout = encoded.tokens.layout
    assert layout.grids == ((4, 4),) * 5
    assert answer.tokens_before == before
    # Of eight rows of cells the outer ones are bars: 2 of 12 are, on either side, in the tower's own grid.
    cells = layout.cell[(layout.crop == 1) & (layout.role == Role.PATCH)]
    assert cells.tolist() == list(range(4, 16))
    assert answer.tokens_after == len(encoded.plan) == 16 + 6 * 8 + 6


def test_a_file_without_newline_says_so_and_feeds_row_after_row(
    proof: Proof, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_mmproj_of(
        proof.model, "llava_next", tmp_path / "m.gguf", drop=("model.image_newline",),
        edit=lambda metadata: metadata.update({"general.name": str(tmp_path)}),  # no file that the cache knows
    )  # fmt: skip
    other = replace(proof, mmproj=path)
    theirs = proof.asked([photo(203, 141)], "q")
    with caplog.at_level(logging.WARNING), other.open() as vlm:
        tokens = vlm.see(photo(203, 141)).tokens
    assert [line for line in caplog.messages if "no image_newline: rows of tiles are fed" in line]
    with torch.no_grad():
        features = proof.model.get_image_features(theirs["pixel_values"], theirs["image_sizes"]).pooler_output[0]
    newline = (features == proof.model.model.image_newline).all(dim=1)
    assert error(tokens.embeddings[tokens.layout.uncompressed], features[~newline]) <= 1e-4


def test_a_newline_of_either_name_is_found(proof: Proof) -> None:
    mmproj = Mmproj(proof.mmproj)
    shapes = {name.replace("model.image", "v.image"): shape for name, shape in mmproj.shapes.items()}
    assert LlavaNext().spec(mmproj.metadata, mmproj.shapes).separator == "model.image_newline"
    assert LlavaNext().spec(mmproj.metadata, shapes).separator == "v.image_newline"
    assert TowerSpec.from_dict(SPEC.to_dict()) == SPEC
    assert family_named("llava_next") == family_for(mmproj.metadata) == LlavaNext()


def test_llama_cpp_feeds_whole_tiles_then_the_overview_and_no_newline(proof: Proof) -> None:
    """For the overview's place see its pull request 24769, for newlines 23545; issue 8457 tells of worse answers.

    Its rows themselves are wrong too (issues 25814 and 25817).
    """
    picture, small = photo(203, 141), photo(203, 141).resize((48, 48), Image.Resampling.BICUBIC)
    with proof.open() as vlm:
        encoder = MtmdEncoder(proof.mmproj, vlm.model, threads=1)
        pieces, (overview,) = encoder.encode(np.asarray(picture)), encoder.encode(np.asarray(small))
        encoder.close()
        assert vlm.see(picture).parts == ((0,), (1, 2, 3, 4))
        assert vlm.see(small).parts == ((0,), (1, 2))  # transformers cuts small pictures too
    assert isinstance(overview, ImagePiece)
    rows = [piece.embeddings for piece in pieces if isinstance(piece, ImagePiece)]
    assert [len(tile) for tile in rows] == [36] * 5
    assert len(rows) == len(pieces)
    assert [error(tile, overview.embeddings) < 1e-3 for tile in rows] == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"clip.vision.image_grid_pinpoints": [48]}, TokcompError, "not heights and widths"),
        ({"clip.vision.image_grid_pinpoints": [48, 50]}, TokcompError, "not height and width of whole tiles of 48"),
        ({"clip.vision.image_grid_pinpoints": [0, 48]}, TokcompError, "pinpoints 0"),
        ({"clip.vision.image_grid_pinpoints": 48}, TokcompError, "not heights and widths"),
        ({"clip.vision.image_grid_pinpoints": ["a", "b"]}, TokcompError, "not heights and widths"),
        ({"clip.vision.image_grid_pinpoints": [48 * 65, 48]}, TokcompError, "more than 64 tiles"),
        ({"clip.vision.image_grid_pinpoints": [2**31 - 32, 2**31 - 32]}, TokcompError, "pinpoints 2147483616"),
        ({"clip.vision.image_size": 0}, TokcompError, "image_size 0"),
        ({"clip.vision.mm_patch_merge_type": "flat"}, UnsupportedError, "'flat' is not spatial_unpad"),
    ],
)
def test_impossible_metadata_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    path = write_mmproj_of(
        build("llava_next"), "llava_next", tmp_path / "m.gguf", edit=lambda keys: keys.update(changes)
    )
    mmproj = Mmproj(path)
    with pytest.raises(kind, match=message) as fault:
        family_for(mmproj.metadata).spec(mmproj.metadata, mmproj.shapes)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("method", ["resolution", "luvc"])
def test_a_number_of_tokens_is_meant_for_all_crops_together(proof: Proof, method: str) -> None:
    with proof.open(method=method, keep=60) as vlm:
        some = vlm.encode(photo(150, 100))
    with proof.open(method=method, keep=10_000) as vlm:
        every = vlm.encode(photo(150, 100))
    assert len(some.tokens.layout.grids) > 1
    assert len(some.plan) <= 60 + some.tokens.layout.protected.sum()
    assert len(every.plan) == every.plan.before
