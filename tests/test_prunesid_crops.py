"""PruneSID on several crops and frames, and the order of its tokens: what the papers and the release do with each."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as Pil
from test_prunesid import slow_prunesid

from edge_tokcomp.answers import SeenImage
from edge_tokcomp.families.base import Pixels
from edge_tokcomp.images import wrap_image
from edge_tokcomp.methods import get_method
from edge_tokcomp.overlay import draw_overlay
from edge_tokcomp.tokens import Layout, Plan, Role, VisionTokens
from edge_tokcomp.vlm import VLM
from made_up_images import image, with_separators

SIDE = 24


def numbered(layout: Layout, seed: int = 0) -> VisionTokens:
    """``image`` whose features say in their last column which row they are."""
    tokens = image(layout, seed, width=64)
    tokens.features[:, -1] = np.arange(len(layout)) / len(layout)
    return VisionTokens(tokens.features, layout, None, tokens.cls_attention)


def numbers(rows: np.ndarray, total: int) -> list[int]:
    return np.rint(rows[:, -1] * total).astype(int).tolist()


def next_layout(cls_rows: bool = True) -> Layout:
    """LLaVA-NeXT's: an overview and 2 x 2 crops of 24 x 24, a separator behind each."""
    layout = Layout.of_grids(*[(SIDE, SIDE)] * 5, cls_rows=cls_rows, overview=0)
    rows = SIDE * SIDE + cls_rows
    return with_separators(layout, [rows * crop for crop in range(1, 6)])


def slow_crop(tokens: VisionTokens, crop: int, budget: int, cls: bool = False) -> list[int]:
    """The released choice for one crop by itself, as rows of the image, in its order."""
    layout = tokens.layout
    rows = np.flatnonzero((layout.crop == crop) & (layout.role == Role.PATCH))
    scores = tokens.cls_attention.astype(np.float64).sum(axis=0)[rows]
    chosen = slow_prunesid(
        tokens.features[rows], scores, budget, budget - cls, "feature", "strict_upper", budget // 4, budget / 32
    )
    lead = np.flatnonzero((layout.crop == crop) & (layout.role == Role.CLS))[:1].tolist() if cls else []
    return lead + rows[chosen].tolist()


def chosen_of(plan: Plan, layout: Layout, crop: int) -> list[int]:
    """Rows of a crop in the order of choice, separators aside."""
    return [row for row in plan.rank.tolist() if layout.crop[row] == crop and layout.role[row] != Role.SEPARATOR]


@pytest.mark.parametrize("keep_cls", [False, True])
def test_each_crop_of_an_image_is_compressed_on_its_own_and_keeps_its_features_in_their_places(keep_cls):
    layout = next_layout()
    tokens = numbered(layout)
    plan = get_method("prunesid", keep_cls=keep_cls).compress(tokens, 325)
    assert len(plan) == 325
    assert set(np.flatnonzero(layout.role == Role.SEPARATOR)) <= set(plan.keep.tolist())
    for crop in range(5):
        chosen = chosen_of(plan, layout, crop)
        assert len(chosen) == 64
        assert chosen == slow_crop(tokens, crop, 64, keep_cls)
    assert np.sum(layout.role[plan.keep] == Role.CLS) == 5 * keep_cls
    assert numbers(tokens.rows(plan), len(layout)) == plan.keep.tolist() == sorted(plan.keep.tolist())


@pytest.mark.parametrize(
    ("keep", "parts"), [(6, [1, 0, 0, 0, 0]), (327, [65, 65, 64, 64, 64]), (0.1, [57, 57, 57, 57, 56])]
)
def test_crops_share_the_budget_to_the_last_token(keep, parts):
    layout = next_layout()
    plan = get_method("prunesid").compress(image(layout), keep)
    patches = plan.keep[layout.role[plan.keep] == Role.PATCH]
    assert np.bincount(layout.crop[patches], minlength=5).tolist() == parts
    assert len(plan) == (289 if keep == 0.1 else keep)  # of 5 x 576 patches and 5 separators


def test_crops_of_different_grids_share_in_proportion_to_their_patches():
    layout = Layout.of_grids((12, 12), (12, 24), (24, 24), cls_rows=True, overview=0)
    plan = get_method("prunesid").compress(image(layout), 70)
    assert np.bincount(layout.crop[plan.keep]).tolist() == [10, 20, 40]


@pytest.mark.parametrize("cls_rows", [False, True])
def test_a_video_keeps_seventeen_of_every_frame(cls_rows):
    layout = Layout.of_frames(8, (16, 16), cls_rows=cls_rows)
    tokens = numbered(layout, 3)
    plan = get_method("prunesid").compress(tokens, 136)
    assert len(plan) == 136
    for frame in range(8):
        assert chosen_of(plan, layout, frame) == slow_crop(tokens, frame, 17)
    assert numbers(tokens.rows(plan), len(layout)) == plan.keep.tolist()
    assert np.bincount(layout.crop[get_method("prunesid").compress(tokens, 17 / 256).keep]).tolist() == [17] * 8


@pytest.mark.parametrize("keep_cls", [False, True])
def test_the_released_order_of_one_crop_is_cls_then_group_by_group(keep_cls, tmp_path):
    layout = Layout.of_grids((SIDE, SIDE), cls_rows=True)
    tokens = numbered(layout, 1)
    raster = get_method("prunesid", keep_cls=keep_cls).compress(tokens, 64)
    plan = get_method("prunesid:order=released", keep_cls=keep_cls).compress(tokens, 64)
    assert np.array_equal(plan.keep, raster.keep)
    assert np.array_equal(plan.rank, raster.rank)
    assert raster.order is None
    released = slow_crop(tokens, 0, 64, keep_cls)
    assert released != sorted(released)
    assert numbers(tokens.rows(plan), len(layout)) == plan.order.tolist() == released
    plan.save(tmp_path / "plan")
    assert numbers(tokens.rows(Plan.load(tmp_path / "plan")), len(layout)) == released
    assert len(get_method("prunesid:order=released").compress(tokens, 576)) == 576


@pytest.mark.parametrize("keep_cls", [False, True])
def test_the_released_order_of_several_crops_puts_features_into_others_places(keep_cls):
    """Its mask is sorted, the features it fills in are not; separators, which it leaves out, stay where they are."""
    layout = next_layout()
    tokens = numbered(layout, 2)
    plan = get_method("prunesid:order=released", keep_cls=keep_cls).compress(tokens, 325)
    expected = np.arange(len(layout))
    for crop in range(5):
        group_order = slow_crop(tokens, crop, 64, keep_cls)
        expected[sorted(group_order)] = group_order
    assert numbers(tokens.rows(plan), len(layout)) == expected[plan.keep].tolist()
    moved = plan.order != plan.keep
    assert moved.mean() > 0.8
    assert not np.any(moved & (layout.role[plan.keep] == Role.SEPARATOR))
    assert np.array_equal(layout.crop[plan.order], layout.crop[plan.keep])


@pytest.mark.parametrize(("budget", "sorted_"), [(64, False), (150, False), (151, True)])
def test_the_released_qwen_code_sorts_more_than_150_tokens(budget, sorted_):
    tokens = image(Layout.of_grids((20, 22)), 4, width=64)
    plan = get_method("prunesid-qwen:order=released").compress(tokens, budget)
    if sorted_:
        assert plan.order is None
    else:
        assert plan.order.tolist() == plan.rank.tolist() != plan.keep.tolist()


def test_an_overlay_shows_places_whatever_the_order(vlm: VLM):
    spec, layout = vlm.engine.spec, Layout.of_grids((6, 6))
    pixels = Pixels((np.random.default_rng(0).standard_normal((3, 48, 48), np.float32),), ((6, 6),), (48, 48))
    tokens = image(layout)
    plans = [get_method(f"prunesid:order={order}").compress(tokens, 9) for order in ("raster", "released")]
    drawn = [draw_overlay(pixels, spec, layout, plan, "same").tobytes() for plan in plans]
    assert plans[1].order is not None
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("order", ["raster", "released"])
def test_the_rows_of_each_crop_go_where_its_number_stands(vlm: VLM, order):
    layout = with_separators(Layout.of_grids((6, 6), (5, 6), (4, 4), cls_rows=True, overview=0), [20, 37])
    tokens = numbered(layout)
    picture = wrap_image(Pil.new("RGB", (4, 4)), max_pixels=99)
    method = get_method(f"prunesid:order={order}")
    variant = vlm.engine.variant(method, 30)
    seen = SeenImage(picture, tokens, ("left", (2,), (0,), " mid", (1,), "right"), {}, variant, None, (method, 30))
    encoded = vlm.compress(seen, method, 30)
    fed, place = tokens.rows(encoded.plan), layout.crop[encoded.plan.keep]
    words = vlm.embedding.lookup(vlm.model.tokenize(" mid", add_special=False, parse_special=True))
    expected = [fed[place == 2], fed[place == 0], words, fed[place == 1]]
    assert encoded.around == ("left", "right")
    assert np.array_equal(encoded.rows.embeddings, np.concatenate(expected))
    assert (encoded.plan.order is not None) == (order == "released")
