"""Methods that act in the tower or before it: lower resolution, and LUVC's merger."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.methods import get_method
from edge_tokcomp.methods.resolution import in_proportion
from edge_tokcomp.models import DEMO_LM
from edge_tokcomp.tokens import Layout
from edge_tokcomp.variant import PLAIN, Merge, TowerVariant, most_pairs, pieces, shrinking, spread
from edge_tokcomp.vlm import load
from made_up_images import image

SAMPLE = DEMO_LM.parent / "samples" / "scene-3.jpg"


@pytest.fixture(scope="module")
def vlm():
    with load(method="mosaic", keep=64, threads=1) as model:
        yield model


@given(st.integers(1, 700), st.integers(1, 30), st.integers(1, 30))
def test_a_smaller_grid_keeps_proportions_and_the_budget_and_stays_within_the_towers_own(wanted, height, width):
    rows, columns = in_proportion(wanted, (height, width))
    assert 1 <= rows <= height
    assert 1 <= columns <= width
    assert rows * columns <= wanted
    if height == width:  # the largest that is square or has one column more
        inside = [r * c for r in range(1, height + 1) for c in (r, r + 1) if r * c <= wanted and c <= width]
        assert rows * columns == max(inside, default=1)
    elif rows > 1:
        assert abs(columns - rows * width / height) <= 1
        assert (rows + 1) ** 2 * width > wanted * height or rows in (height, wanted)


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(2, 30), st.floats(0.001, 0.999), st.data())
def test_luvc_merges_down_to_the_grid_within_the_budget(height, width, blocks, share, data):
    wanted = max(1, int(share * height * width))
    side, window = data.draw(st.sampled_from([(1, None), (2, None), (4, None), (1, 3), (2, 8), (2, 2)]))
    passes = data.draw(st.none() | st.integers(1, min(12, height + width)))
    first = data.draw(st.floats(0, 1))
    method = get_method("luvc", passes=passes, first=first, last=data.draw(st.floats(first, 1)))
    variant = method.variant(wanted, (height, width), blocks, side, window)
    rows, columns = in_proportion(wanted, (height, width))
    patches = height * side, width * side
    if window:  # a patch is left in each
        rows, columns = (
            max(left, -(-len(pieces(length, window)) // side))
            for left, length in zip((rows, columns), patches, strict=True)
        )
    assert variant.final_grid((height, width), blocks, side, window) == (rows, columns)
    before = list(shrinking(variant.merges, patches, window))
    for merge, lines in zip(variant.merges, before, strict=False):
        assert first * (blocks - 2) - 0.5 <= merge.block <= blocks - 2
        for pairs, lengths in zip((merge.columns, merge.rows), lines, strict=True):
            fewer = spread(pairs, lengths)
            assert sum(fewer) == pairs
            assert all(0 <= less <= most_pairs(length) for less, length in zip(fewer, lengths, strict=True))
    assert all(min(lengths) >= 1 for lengths in before[-1])


def test_luvc_takes_as_few_passes_as_pairing_allows_by_even_factors():
    early = get_method("luvc", first=0.0)
    assert early.variant(64, (24, 24), 8).merges == (Merge(0, 7, 7), Merge(3, 5, 5), Merge(6, 4, 4))
    assert get_method("luvc").variant(64, (24, 24), 8).merges == (Merge(3, 7, 7), Merge(5, 5, 5), Merge(6, 4, 4))
    assert early.variant(256, (24, 24), 8).merges == (Merge(0, 8, 8),)
    assert len(get_method("luvc", passes=4).variant(256, (24, 24), 8).merges) == 4
    shared = get_method("luvc", sharing="shared", proportional=False).variant(64, (24, 24), 8)
    assert (shared.sharing, shared.proportional) == ("shared", False)


@pytest.mark.parametrize("text", ["luvc:first=0.6,last=0.5", "luvc:first=-0.1", "luvc:passes=0"])
def test_schedules_that_cannot_be_are_refused(text):
    with pytest.raises(UsageError, match="luvc"):
        get_method(text)
    with pytest.raises(UsageError, match="has 1"):
        get_method("luvc").variant(9, (6, 6), 1)


@pytest.mark.parametrize(
    ("name", "keep", "left"), [("resolution", 32, 30), ("resolution", 0.25, 144), ("luvc", 64, 64)]
)
def test_what_the_tower_gives_is_what_is_kept_and_counts_are_of_the_whole_picture(vlm, name, keep, left):
    encoded = vlm.compress(vlm.see(SAMPLE), get_method(name), keep)
    grid = in_proportion(left, (24, 24))
    assert encoded.plan.before == 576
    assert len(encoded.plan) == len(encoded.rows) == left
    assert encoded.tokens.layout.grids == (grid,)
    assert encoded.tokens.embeddings.shape == (left + 1, encoded.rows.embeddings.shape[1])
    np.testing.assert_array_equal(encoded.rows.embeddings, encoded.tokens.embeddings[1:])
    assert vlm.answer(encoded, max_tokens=4).tokens_after == left


def test_rows_are_those_of_the_tower_run_that_way(vlm):
    seen, spec = vlm.see(SAMPLE), vlm.engine.spec
    small = vlm.engine.family.preprocess(seen.image.picture, spec, (8, 8))
    found = vlm.compress(seen, get_method("resolution"), 64).tokens
    np.testing.assert_array_equal(found.features, vlm.engine.tower.encode(np.stack(small.crops)).features[0])
    merged = vlm.compress(seen, get_method("luvc"), 64)
    assert merged.variant == get_method("luvc").variant(64, spec.grid, spec.blocks)
    assert np.bincount(merged.owner[0], minlength=64).sum() == 576
    assert seen.owner is None


def test_keeping_everything_runs_the_tower_plainly(vlm):
    seen = vlm.see(SAMPLE)
    for keep in (576, 600, 1.0):
        encoded = vlm.compress(seen, get_method("luvc"), keep)
        assert encoded.variant.usual
        assert encoded.tokens is seen.tokens


def test_going_back_to_another_method_runs_the_tower_again(vlm):
    merged = vlm.compress(vlm.see(SAMPLE), get_method("luvc"), 64)
    again = vlm.compress(merged, get_method("mosaic"), 64)
    assert again.variant == TowerVariant(block=vlm.engine.spec.block(None))
    np.testing.assert_array_equal(again.rows.embeddings, vlm.encode(SAMPLE).rows.embeddings)


def test_a_model_loaded_for_a_method_in_the_tower_opens_no_other_tower():
    with load(method="luvc", keep=100, threads=1) as model:
        encoded = model.encode(SAMPLE)
        assert list(model.engine._towers) == [encoded.variant.kind]
        assert str(encoded.plan) == "576 → 100 (17.4 %)"
        assert model.caption(encoded).startswith("At the ")
    with load(method="resolution", keep=100, threads=1) as model:
        assert model.encode(SAMPLE).variant == TowerVariant(grid=(10, 10))
        assert list(model.engine._towers) == [PLAIN.kind]


def test_rows_that_have_left_the_tower_and_shared_budgets_are_refused():
    with pytest.raises(TokcompError, match="method luvc acts in the tower or before it, and these 64 rows"):
        get_method("luvc").compress(image(Layout.of_grids((8, 8))), 9)
    with pytest.raises(UsageError, match="method resolution acts before; choose another"):
        load(method="resolution", keep=64, dynamic="running")


def test_keys_of_the_tower_reach_the_methods(vlm):
    seen = vlm.see(SAMPLE)
    keys = vlm.engine.tower.encode(np.stack(vlm.engine.pixels(seen.image.picture).crops)).keys
    np.testing.assert_array_equal(seen.tokens.keys, keys[0])


def test_what_was_seen_otherwise_is_seen_again_and_its_score_is_that_of_the_plain_tower(vlm):
    with load(method="resolution", keep=0.25, threads=1) as small:
        seen = small.see(SAMPLE)
        assert seen.variant == TowerVariant(grid=(12, 12))
        assert small.claim(SAMPLE) == vlm.claim(SAMPLE).__class__(vlm.claim(SAMPLE).information, 144, 0, 576)
        assert vlm.see(seen).variant == TowerVariant(block=vlm.engine.spec.block(None))
        assert vlm.encode(seen).plan.before == 576
        np.testing.assert_array_equal(vlm.encode(seen).rows.embeddings, vlm.encode(SAMPLE).rows.embeddings)
        assert vlm.see(seen).timings_ms["decode"] == seen.timings_ms["decode"]


def test_context_and_dry_runs_count_the_rows_that_are_really_kept(vlm):
    for method, keep, rows in (("resolution", 255, 240), ("luvc", 128, 121), ("none", 1.0, 576), ("mosaic", 0.5, 288)):
        assert vlm.engine.kept(get_method(method), keep) == rows
    with load(method="resolution", keep=255, n_ctx=256, threads=1) as small:
        assert small.answer(SAMPLE, max_tokens=2).tokens_after == 240


def test_opening_a_tower_is_no_part_of_encoding_and_few_stay_open(vlm):
    seen = vlm.see(SAMPLE)
    for keep in (36, 49, 81, 121):
        vlm.compress(seen, get_method("luvc"), keep)
        assert len(vlm.engine._towers) <= 2
    found = vlm.compress(seen, get_method("luvc"), 36).timings_ms
    assert found["encode"] < 20 * seen.timings_ms["encode"]
    assert found["decode"] == seen.timings_ms["decode"]


def test_stages_of_a_picture_count_once_whatever_is_made_of_it():
    with load(method="mmtok", keep=64, threads=1) as asking:
        seen = asking.see(SAMPLE)
        first, second = (asking.answer(seen, "How many rings are there?", max_tokens=2).timings_ms for _ in range(2))
        assert first["encode"] == seen.timings_ms["encode"]
        assert second["encode"] == second["decode"] == 0
        assert second["compress"] > 0
        encoded = asking.encode(SAMPLE, "What is red?")
        assert asking.answer(encoded, "What is red?", max_tokens=2).timings_ms["encode"] > 0
        again = asking.answer(encoded, "What is blue?", max_tokens=2).timings_ms
        assert again["encode"] == 0
        assert again["compress"] > 0


def test_more_passes_than_lines_are_refused():
    with pytest.raises(UsageError, match="luvc: 2000000 passes over 24 x 24 patches; name 48 at most"):
        get_method("luvc", passes=2_000_000).variant(64, (24, 24), 8)
