from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from edge_tokcomp.errors import ImageError, TokcompError
from edge_tokcomp.export.mmproj import Mmproj
from edge_tokcomp.families import family_for, family_named, llava15
from edge_tokcomp.families.llava15 import Llava15
from edge_tokcomp.families.tower_spec import TowerSpec
from edge_tokcomp.tokens import Role
from tiny_mmproj import MEAN, MLP, STD, write_mmproj

SPEC = TowerSpec(
    family="llava15", image_size=336, patch_size=14, width=1024, heads=16, ffn_width=4096, blocks=23,
    activation="quick_gelu", eps=1e-5, image_mean=tuple(MEAN), image_std=tuple(STD), projector=MLP,
    class_token=True, attention_block=22, pre_norm=True,
)  # fmt: skip
SIZES = [(640, 480), (333, 500), (336, 336), (1, 1000), (1000, 1), (7, 5), (1, 1), (3000, 17), (337, 336)]


def picture(size, mode="RGB"):
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(2) if channels == 1 else values, mode)


def read(path):
    mmproj = Mmproj(path)
    return family_for(mmproj.metadata).spec(mmproj.metadata, mmproj.shapes)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [336, 50])
def test_pixels_equal_hugging_face_llava_with_padding(size, target):
    image = picture(size)
    square = {"height": target, "width": target}
    theirs = LlavaImageProcessorPil(do_pad=True, size=square, do_center_crop=False, image_mean=MEAN, image_std=STD)
    wanted = theirs(image, return_tensors="np")["pixel_values"]
    found = Llava15().preprocess(image, dataclasses.replace(SPEC, image_size=target)).crops[0][None]
    assert found.shape == (1, 3, target, target)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_pixels_equal_hugging_face_clip_on_a_padded_picture():
    padded = ImageOps.pad(picture((400, 400)), (400, 400))
    wanted = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)(padded, return_tensors="np")
    found = Llava15().preprocess(padded, SPEC).crops[0][None]
    np.testing.assert_allclose(found, wanted["pixel_values"], atol=1e-5)


def test_a_grey_picture_has_equal_channels_before_normalising():
    found = Llava15().preprocess(picture((50, 80), "L").convert("RGB"), SPEC).crops[0]
    channels = found * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]
    inside = channels[:, :, 168]  # A middle column: nothing of it is padding.
    np.testing.assert_allclose(inside[0], inside[2], atol=1e-5)


def test_padding_is_the_mean_colour_and_almost_zero():
    found = Llava15().preprocess(Image.new("RGB", (1000, 10), "white"), SPEC).crops[0]
    assert np.abs(found[:, 0]).max() < 0.02
    assert found[:, 168].min() > 1.5


@pytest.mark.parametrize("grid", [(8, 8), (5, 6), (1, 1)])
@pytest.mark.parametrize("size", SIZES)
def test_a_picture_for_a_smaller_grid_is_the_padded_square_resized_to_it(grid, size):
    image = picture(size)
    wanted = {"height": grid[0] * SPEC.patch_size, "width": grid[1] * SPEC.patch_size}
    theirs = LlavaImageProcessorPil(do_pad=True, size=wanted, do_center_crop=False, image_mean=MEAN, image_std=STD)
    found = Llava15().preprocess(image, SPEC, grid)
    assert found.grids == (grid,)
    np.testing.assert_allclose(found.crops[0][None], theirs(image, return_tensors="np")["pixel_values"], atol=1e-5)


def test_the_two_passes_on_strips_equal_one_resize_of_the_square(monkeypatch):
    monkeypatch.setattr(llava15, "_STRIP_PIXELS", 1500)
    image = picture((211, 500))
    colour = tuple(int(mean * 255) for mean in MEAN)
    square = Image.new("RGB", (500, 500), colour)
    square.paste(image, ((500 - 211) // 2, 0))
    wanted = np.asarray(square.resize((336, 336), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(np.asarray(llava15._pad_and_resize(image, SPEC, (336, 336))), wanted)


def test_a_very_long_picture_is_read_and_an_endless_one_refused():
    assert np.isfinite(Llava15().preprocess(Image.new("RGB", (1, 20_000)), SPEC).crops[0]).all()
    with pytest.raises(ImageError, match="65536x1"):
        Llava15().preprocess(Image.new("RGB", (65_536, 1)), SPEC)


def test_a_picture_of_another_mode_is_a_programming_fault():
    with pytest.raises(ValueError, match="mode L"):
        Llava15().preprocess(Image.new("L", (4, 4)), SPEC)


def test_layout_has_the_cls_first_and_as_many_rows_as_the_tower():
    pixels = Llava15().preprocess(picture((9, 9)), SPEC)
    layout = Llava15().layout(pixels, SPEC)
    assert len(layout) == SPEC.patches + SPEC.cls_rows == 577
    assert layout.grids == ((24, 24),)
    assert layout.role[0] == Role.CLS
    assert len(layout.uncompressed) == 576
    assert Llava15().prompt(pixels) == ((0,),)


def test_values_come_from_the_file(tmp_path):
    write_mmproj(tmp_path / "m.gguf", image=40, patch=10, width=32, heads=2, ffn=48, blocks=2, activation="gelu")
    spec = read(tmp_path / "m.gguf")
    assert (spec.image_size, spec.patch_size, spec.grid, spec.cls_rows) == (40, 10, (4, 4), 1)
    assert (spec.width, spec.heads, spec.ffn_width, spec.blocks, spec.attention_block) == (32, 2, 48, 2, 1)
    assert spec.activation == "gelu"
    assert spec.pre_norm
    assert spec.image_mean == pytest.approx(MEAN)
    assert TowerSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("metadata", "blocks"),
    [
        ({"clip.vision.block_count": 3}, 3),
        ({"clip.vision.block_count": 2}, 2),
        ({"clip.vision.block_count": 3, "clip.vision.feature_layer": [2]}, 2),
    ],
)
def test_features_come_after_the_blocks_the_file_counts(tmp_path, metadata, blocks):
    write_mmproj(tmp_path / "m.gguf", blocks=3, edit=lambda known: known.update(metadata))
    assert read(tmp_path / "m.gguf").blocks == blocks


@pytest.mark.parametrize(
    "edit",
    [
        {},
        {"clip.projector_type": None, "clip.vision.projector_type": "mlp"},
        {"clip.projector_type": None},
    ],
)
def test_a_file_is_known_by_either_spelling_or_the_oldest_flag(tmp_path, edit):
    write_mmproj(tmp_path / "m.gguf", edit=lambda known: known.update(edit))
    assert read(tmp_path / "m.gguf").family == "llava15"


@pytest.mark.parametrize(
    ("edit", "drop", "message"),
    [
        ({"clip.projector_type": None, "clip.has_llava_projector": None}, (), "of no stated type"),
        ({}, ("v.class_embd",), "no class token"),
        ({}, ("mm.2.weight",), "two-layer MLP"),
    ],
)
def test_relatives_that_work_otherwise_are_refused(tmp_path, edit, drop, message):
    write_mmproj(tmp_path / "m.gguf", edit=lambda known: known.update(edit), drop=drop)
    with pytest.raises(TokcompError, match=message):
        read(tmp_path / "m.gguf")


def test_families_are_found_by_name():
    assert family_named("llava15") == Llava15()
    with pytest.raises(TokcompError, match=r"unknown model family 'llava9'; known: .*llava15"):
        family_named("llava9")


@pytest.mark.parametrize(
    "values", [{}, {"family": "x"}, SPEC.to_dict() | {"more": 1}, SPEC.to_dict() | {"image_mean": 3}]
)
def test_a_damaged_description_is_refused(values):
    with pytest.raises(TokcompError):
        TowerSpec.from_dict(values)
