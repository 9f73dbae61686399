"""Every method under the same invariants: add a method to ``METHODS`` and it is tested here."""

from __future__ import annotations

import functools

import array_api_strict
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.methods import METHODS, Picks, TowerMethod, get_method
from edge_tokcomp.methods.regions import split
from edge_tokcomp.tokens import Layout, Role, VisionTokens
from made_up_images import answering, compress, image, moved, same_plan, with_separators

MATRIX = [
    *(name for name, cls in METHODS.items() if not issubclass(cls, TowerMethod)),
    "mosaic:plenty=0,attended=1",
    "prunesid:score=projection",
    "prunesid:centre=token,rho_mode=qwen,groups=3,lambda=0.5",
    "prunesid:keep_cls=true",
    "prunesid:order=released",
    "prunesid:order=released,keep_cls=true",
    "prunesid-paper:keep_cls=true",
    "todre:form=k_center",
    "visionzip:aggregate=mean,centred=true,keep_cls=true",
    "divprune:centred=true,distinctive=true",
    "vispruner:important=0.25,step=3,centred=true",
    "scope:centred=true",
    "scope:alpha=0",
    "cdpruner:relevance=negative,normalise=mean,centred=true,distinctive=true",
    "cdpruner:relevance=off",
    "dart:image_pivots=2,text_pivots=1,centred=true",
    "holov:chunks=5",
    "mmtok:centred=true",
    "tome:centred=true",
]
COMPRESSING = [name for name in MATRIX if name != "none"]
BLIND = ("random", "uniform", "pool")
ORDERED = ("mosaic", "holov", "visionzip", "tome", "cdpruner:relevance=off", "scope:alpha=0")
"""Methods whose result goes by the raster order of the tokens: by design, or because ties are the rule."""
SEEING = [name for name in COMPRESSING if not name.startswith(BLIND)]


@st.composite
def layouts(draw) -> Layout:
    grids = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3))
    layout = Layout.of_grids(*grids, cls_rows=draw(st.booleans()))
    places = draw(st.lists(st.integers(0, len(layout)), max_size=4))
    return with_separators(layout, sorted(places)) if places else layout


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(MATRIX), layouts(), st.data(), st.integers(0, 99))
def test_every_plan_has_exactly_the_budget_sorted_unique_protected_and_repeatable(name, layout, data, seed):
    tokens, before = image(layout, seed), len(layout.uncompressed)
    keep = data.draw(st.integers(1, before + 2) | st.floats(0.01, 1))
    method = get_method(name)
    plan = compress(name, tokens, keep, seed=seed)

    separators = int(layout.protected.sum())
    wanted = min(keep, before) if isinstance(keep, int) else max(1, int(keep * before + 0.5))
    expected = before if name == "none" else max(wanted, min(separators + 1, before))
    assert len(plan) == expected
    assert plan.before == before
    assert plan.total == len(layout)
    assert np.all(np.diff(plan.keep) > 0)
    assert np.array_equal(np.sort(plan.rank), plan.keep)
    assert set(np.flatnonzero(layout.protected)) <= set(plan.keep)
    assert np.any(layout.role[plan.keep] == Role.PATCH)
    if not getattr(method, "keep_cls", False) or expected == before:
        assert not np.any(layout.role[plan.keep] == Role.CLS)
    if expected == before:
        assert np.array_equal(plan.keep, layout.uncompressed)
        assert np.array_equal(plan.rank, layout.uncompressed)
    assert plan.keep.dtype == plan.rank.dtype == np.int64
    assert ("keep_raised" in plan.stats) == (separators + 1 > wanted)
    assert same_plan(plan, compress(name, image(layout, seed), keep, seed=seed))
    assert plan.apply(tokens.features).shape == (expected, 24)


@pytest.mark.parametrize("name", MATRIX)
def test_a_budget_of_nothing_is_refused(name):
    for keep in (0, 0.0, -1, "0%"):
        with pytest.raises(UsageError, match="keep"):
            compress(name, image(Layout.of_grids((3, 3))), keep)


@pytest.mark.parametrize("name", MATRIX)
def test_one_token_stays_itself(name):
    assert compress(name, image(Layout.of_grids((1, 1))), 1).keep.tolist() == [0]


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("value", [0.0, 1.0, -3e30])
def test_identical_tokens_give_exact_and_equal_plans_on_numpy_and_torch(name, value):
    torch = pytest.importorskip("torch")
    layout = Layout.of_grids((6, 7), cls_rows=True)
    flat = np.full((len(layout), 16), value, np.float32)
    attention = np.full((2, len(layout)), 1 / len(layout), np.float32)
    for keep in (1, 5, 16, 41):
        plan = compress(name, VisionTokens(flat, layout, cls_attention=attention), keep)
        assert len(plan) == keep
        on_torch = VisionTokens(torch.from_numpy(flat), layout, cls_attention=torch.from_numpy(attention))
        assert same_plan(plan, compress(name, on_torch, keep))


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("grids", [((8, 8),), ((9, 5), (4, 11))])
def test_numpy_torch_and_the_strict_array_api_give_the_same_plan(name, grids):
    torch = pytest.importorskip("torch")
    layout = with_separators(Layout.of_grids(*grids, cls_rows=True), [3, 9])
    for seed in range(4):
        tokens = image(layout, seed, width=40)
        if seed == 3:
            tokens.features[10:14] = tokens.features[30:34]
            tokens.cls_attention[:, 10:14] = tokens.cls_attention[:, 30:34]
        plan = compress(name, tokens, 23, seed=seed)
        assert same_plan(plan, compress(name, moved(tokens, torch.from_numpy), 23, seed=seed))
        strict = moved(tokens, array_api_strict.asarray)
        assert same_plan(plan, compress(name, strict, 23, seed=seed))


def test_torch_tensors_inside_an_autograd_graph_are_taken_as_values():
    torch = pytest.importorskip("torch")
    tokens = image(Layout.of_grids((5, 5)))
    tracked = moved(tokens, lambda array: torch.from_numpy(array).requires_grad_())
    for name in COMPRESSING:
        assert same_plan(compress(name, tokens, 7), compress(name, tracked, 7))
    seen = []
    answering(lambda rows, k: seen.append(rows) or Picks(np.arange(k))).compress(tracked, 7)
    assert not seen[0].features.requires_grad


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_features_change_few_choices(name, kind):
    torch = pytest.importorskip("torch")
    shared = []
    for seed in range(5):
        tokens = image(Layout.of_grids((16, 16), cls_rows=True), seed, width=64)
        half = moved(tokens, lambda array: torch.from_numpy(array).to(getattr(torch, kind)))
        project = functools.partial(lambda whole, rows: whole(rows.float()), tokens.project)
        rounded = VisionTokens(half.features, half.layout, project, half.cls_attention)
        one, two = compress(name, tokens, 64), compress(name, rounded, 64)
        shared.append(len(np.intersect1d(one.keep, two.keep)) / 64)
    bars = {"float16": 0.95, "bfloat16": 0.8}
    if name.startswith("vispruner"):  # one token dropped otherwise swaps even and odd for all that follow
        bars = {"float16": 0.8, "bfloat16": 0.5}
    assert np.mean(shared) >= bars[kind], shared


@pytest.mark.parametrize("name", [name for name in SEEING if "keep_cls" not in name and not name.startswith(ORDERED)])
def test_permuted_tokens_give_the_permuted_choice(name):
    layout = Layout.of_grids((7, 6))
    for seed in range(5):
        tokens = image(layout, seed)
        order = np.random.default_rng(seed).permutation(42)
        shuffled = VisionTokens(
            tokens.features[order], layout, tokens.project, tokens.cls_attention[:, order], tokens.keys[order]
        )
        plan, permuted = compress(name, tokens, 13), compress(name, shuffled, 13)
        assert order[permuted.rank].tolist() == plan.rank.tolist()


@pytest.mark.parametrize("array", ["features", "cls_attention", "embeddings"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_array_and_row(array, bad):
    layout = Layout.of_grids((3, 3), cls_rows=True)
    tokens = image(layout)
    if array == "features":
        tokens.features[[7, 4], 2] = bad
    elif array == "cls_attention":
        tokens.cls_attention[1, [7, 4]] = bad
    else:
        hit = np.isin(np.arange(10), [4, 7])[:, None]
        tokens = VisionTokens(tokens.features, layout, lambda rows: np.where(hit, bad, rows))
    with pytest.raises(TokcompError, match=f"{array}, row 4: not finite"):
        get_method("prunesid" if array == "cls_attention" else "todre").compress(tokens, 3)


def test_arrays_a_method_does_not_use_are_not_looked_at():
    tokens = image(Layout.of_grids((3, 3)))
    tokens.cls_attention[:] = np.nan
    assert len(get_method("prunesid-paper").compress(tokens, 3)) == 3


def test_integer_features_and_images_without_patches_are_programming_faults():
    with pytest.raises(ValueError, match="floating point"):
        get_method("uniform").compress(VisionTokens(np.ones((4, 2), int), Layout.of_grids((2, 2))), 2)
    only = Layout(((1, 1),), np.zeros(1, np.int64), -np.ones(1, np.int64), np.full(1, Role.SEPARATOR, np.int8))
    with pytest.raises(ValueError, match="no patch"):
        get_method("uniform").compress(VisionTokens(np.ones((1, 2), np.float32), only), 1)
    with pytest.raises(UsageError, match="seed"):
        get_method("random").compress(image(Layout.of_grids((2, 2))), 2, seed=-1)


def test_a_missing_input_is_named_with_what_to_do_even_when_nothing_is_compressed():
    tokens = VisionTokens(np.ones((9, 4), np.float32), Layout.of_grids((3, 3)))
    for keep in (3, 9):
        with pytest.raises(TokcompError, match=r"needs the attention.*prunesid-paper.*score=projection"):
            get_method("prunesid").compress(tokens, keep)


def test_the_projector_runs_only_for_methods_that_look_at_the_language_width():
    for name in MATRIX:
        tokens = image(Layout.of_grids((5, 5)))
        compress(name, tokens, 6)
        assert ("embeddings" in tokens.__dict__) == ("embeddings" in get_method(name).needs), name


def test_kept_cls_rows_cost_one_of_their_crops_budget_and_never_the_last_patch():
    layout = Layout.of_grids((4, 4), (4, 4), cls_rows=True)
    plan = get_method("prunesid-paper:keep_cls=true").compress(image(layout), 12)
    assert [int(np.sum(layout.role[plan.keep[layout.crop[plan.keep] == c]] == Role.CLS)) for c in (0, 1)] == [1, 1]
    assert [int(np.sum(layout.crop[plan.keep] == c)) for c in (0, 1)] == [6, 6]
    lone = get_method("prunesid-paper:keep_cls=true").compress(image(layout), 1)
    assert layout.role[lone.keep].tolist() == [Role.PATCH]


def test_crops_share_the_budget_in_proportion_to_their_patches():
    layout = Layout.of_grids((6, 6), (3, 6), (6, 3))
    for name in ("uniform", "pool", "prunesid"):
        plan = compress(name, image(layout), 24)
        assert np.bincount(layout.crop[plan.keep]).tolist() == [12, 6, 6]


def test_crop_methods_treat_each_crop_as_an_image_of_its_own():
    layout = Layout.of_grids((6, 6), (6, 6))
    tokens = image(layout)
    for name in ("uniform", "prunesid", "prunesid-paper", "prunesid-qwen"):
        both = compress(name, tokens, 20).keep
        for crop, rows in ((0, slice(0, 36)), (1, slice(36, 72))):
            attention = tokens.cls_attention[:, rows]
            alone = VisionTokens(tokens.features[rows], Layout.of_grids((6, 6)), cls_attention=attention)
            plan = compress(name, alone, 10)
            assert np.array_equal(plan.keep, both[layout.crop[both] == crop] - 36 * crop)


def test_random_choices_repeat_for_a_picture_differ_between_pictures_and_seeds_and_nest():
    layout = Layout.of_grids((6, 6), (3, 3))
    plan = get_method("random").compress(image(layout, 0), 20, seed=7)
    assert np.array_equal(plan.rank, get_method("random").compress(image(layout, 0), 20, seed=7).rank)
    assert np.array_equal(plan.rank[:8], get_method("random").compress(image(layout, 0), 8, seed=7).rank)
    assert not np.array_equal(plan.keep, get_method("random").compress(image(layout, 1), 20, seed=7).keep)
    assert not np.array_equal(plan.keep, get_method("random").compress(image(layout, 0), 20, seed=8).keep)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_regions_tile_the_grid_with_rectangles_around_their_centres(height, width, data):
    k = data.draw(st.integers(1, height * width))
    centres, labels = split(height, width, k)
    label = np.array(labels).reshape(height, width)
    assert sorted(set(labels)) == list(range(k))
    for region in range(k):
        rows, columns = np.nonzero(label == region)
        assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        row, column = divmod(centres[region], width)
        assert 0 <= rows.mean() - row <= 0.5
        assert 0 <= columns.mean() - column <= 0.5


def test_regions_are_the_squares_one_would_draw_and_beat_chance():
    centres, labels = split(24, 24, 64)
    assert centres == tuple(r * 24 + c for r in range(1, 24, 3) for c in range(1, 24, 3))
    assert set(np.bincount(labels)) == {9}
    rng = np.random.default_rng(0)
    cells = np.stack(np.divmod(np.arange(24 * 18), 18), axis=1)
    for k in (5, 17, 31, 64, 100):
        places = [np.array(split(24, 18, k)[0]), *(rng.permutation(24 * 18)[:k] for _ in range(20))]
        even, *chance = (np.mean(np.min(np.sum((cells[:, None] - cells[p]) ** 2, axis=2), axis=1)) for p in places)
        assert even < 0.9 * min(chance)


def test_rows_out_of_raster_order_and_grids_with_holes_are_still_spread_evenly():
    shuffle = np.random.default_rng(0).permutation(36)
    layout = Layout(((6, 6),), np.zeros(36, np.int64), shuffle, np.zeros(36, np.int8))
    plan = get_method("uniform").compress(image(layout), 9)
    assert sorted(shuffle[plan.keep]) == list(split(6, 6, 9)[0])
    pooled = get_method("pool").compress(image(layout), 9)
    assert np.array_equal(
        shuffle[pooled.keep][pooled.assign], np.array(split(6, 6, 9)[0])[np.array(split(6, 6, 9)[1])[shuffle]]
    )
    holes = Layout(((6, 6),), np.zeros(30, np.int64), np.delete(np.arange(36), slice(10, 16)), np.zeros(30, np.int8))
    assert get_method("uniform").compress(image(holes), 5).keep.tolist() == [2, 8, 14, 20, 26]


@settings(deadline=None, max_examples=60)
@given(layouts(), st.data())
def test_pooling_conserves_mass_and_averages_by_region(layout, data):
    tokens = image(layout)
    keep = data.draw(st.integers(1, len(layout.uncompressed)))
    plan = get_method("pool").compress(tokens, keep)
    assert np.allclose(plan.apply(np.ones((len(layout), 1))), 1)
    patch = layout.role == Role.PATCH
    served = patch & np.isin(layout.crop, layout.crop[plan.keep[patch[plan.keep]]])
    used = np.isin(np.arange(len(layout)), plan.keep) if plan.assign is None else plan.assign >= 0
    assert np.array_equal(used, served | layout.protected)
    merged = plan.apply(tokens.features)
    for place, row in enumerate(plan.keep):
        group = [row] if plan.assign is None else np.flatnonzero(plan.assign == place)
        assert row in group
        assert len(set(layout.crop[group])) == 1
        assert np.allclose(merged[place], tokens.features[group].mean(axis=0), atol=1e-5)
