"""What a method of one's own must do, and what happens when it does not."""

from __future__ import annotations

import numpy as np
import pytest

from edge_tokcomp.methods import Merges, Picks, Scores
from edge_tokcomp.tokens import Layout
from made_up_images import Custom, answering, image, with_separators


def test_scores_keep_the_highest_with_ties_to_the_lower_index():
    values = np.array([1.0, 3.0, 2.0, 3.0, 2.0, 3.0, -np.inf, 2.0, 0.0])
    plan = answering(lambda rows, k: Scores(values, {"n": 9})).compress(image(Layout.of_grids((3, 3))), 5)
    assert plan.rank.tolist() == [1, 3, 5, 2, 4]
    assert plan.stats == {"n": 9.0}


def test_merges_land_on_global_rows_beside_separators_and_dropped_ones():
    layout = with_separators(Layout.of_grids((2, 3)), [0, 3])
    weight = np.array([0.5, 0.5, 0, 0.25, 0.5, 0.25], np.float32)
    merges = Merges(np.array([4, 1]), np.array([1, 1, -1, 0, 0, 0]), weight)
    plan = answering(lambda rows, k: merges).compress(image(layout), 4)
    assert plan.rank.tolist() == [0, 4, 6, 2]
    assert plan.keep.tolist() == [0, 2, 4, 6]
    assert plan.assign.tolist() == [0, 1, 1, -1, 2, 3, 3, 3]
    assert plan.weight.tolist() == [1, 0.5, 0.5, 0, 1, 0.25, 0.5, 0.25]


def test_a_kept_cls_row_passes_through_a_merging_plan_unchanged():
    layout = Layout.of_grids((1, 3), cls_rows=True)
    merges = Merges(np.array([1]), np.zeros(3, int), np.full(3, 1 / 3, np.float32))
    plan = answering(lambda rows, k: merges, keep_cls=True).compress(image(layout), 2)
    assert plan.keep.tolist() == plan.rank.tolist() == [0, 2]
    assert plan.assign.tolist() == [0, 1, 1, 1]
    assert plan.weight[0] == 1


def test_picks_in_order_fill_the_places_of_their_crop_and_separators_stay():
    layout = with_separators(Layout.of_grids((1, 3), (1, 3), cls_rows=True), [2, 6])
    assert layout.role.tolist() == [2, 0, 1, 0, 0, 2, 0, 1, 0, 0]

    def chosen(rows, k):
        return Picks(np.array([5, 1, 2, 3, 0])[:k], in_order=True)

    plan = answering(chosen).compress(image(layout), 7)
    assert plan.rank.tolist() == [2, 7, 9, 3, 4, 6, 1]
    assert plan.keep.tolist() == [1, 2, 3, 4, 6, 7, 9]
    assert plan.order.tolist() == [3, 2, 4, 1, 9, 7, 6]
    with_cls = answering(lambda rows, k: Picks(np.array([2, 1, 0])[:k], in_order=True), scope="crop", keep_cls=True)
    plan = with_cls.compress(image(layout), 7)
    assert plan.order.tolist() == [0, 2, 4, 3, 5, 7, 9]
    assert np.array_equal(layout.crop[plan.order], layout.crop[plan.keep])
    assert answering(lambda rows, k: Picks(np.arange(k), in_order=True)).compress(image(layout), 7).order is None


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda rows, k: Picks(np.arange(k + 1)), "must choose 3 different rows of 9"),
        (lambda rows, k: Picks(np.zeros(k, int)), "must choose"),
        (lambda rows, k: Picks(np.arange(k) + 7), "must choose"),
        (lambda rows, k: Picks(np.arange(k) - 1), "must choose"),
        (lambda rows, k: Scores(np.ones(4)), "must score 9 rows"),
        (lambda rows, k: Scores(np.full(9, np.nan)), "without NaN"),
        (lambda rows, k: Merges(np.arange(k), np.zeros(4, int), np.zeros(4)), "must assign and weigh"),
        (lambda rows, k: Merges(np.arange(k), np.zeros(9, int), np.ones(9)), "to itself"),
    ],
)
def test_a_method_that_breaks_its_contract_is_named(answer, says):
    with pytest.raises(ValueError, match=f"custom {says}|{says}"):
        answering(answer).compress(image(Layout.of_grids((3, 3))), 3)


def test_methods_see_only_their_candidates():
    seen = []

    def look(rows, k):
        seen.append((len(rows), rows.features.shape, rows.cls_attention.shape, rows.keys.shape, rows.embeddings.shape))
        seen.append((rows.grids, rows.crop.tolist(), rows.cell.tolist(), rows.budget, k))
        return Picks(np.arange(k))

    layout = with_separators(Layout.of_grids((1, 2), (2, 2), cls_rows=True), [2])
    wanting = {"wants": frozenset({"cls_attention", "keys"})}
    answering(look, scope="crop", **wanting).compress(image(layout), 4)
    assert seen[:2] == [(2, (2, 24), (4, 2), (2, 8), (2, 20)), (((1, 2),), [0, 0], [0, 1], 1, 1)]
    assert seen[2:] == [(4, (4, 24), (4, 4), (4, 8), (4, 20)), (((2, 2),), [0] * 4, [0, 1, 2, 3], 2, 2)]
    seen.clear()
    answering(look, **wanting).compress(image(layout), 4)
    assert seen[1] == (((1, 2), (2, 2)), [0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 2, 3], 3, 3)


def test_compress_cannot_be_overridden():
    class Mixin:
        def compress(self, tokens, keep, *, seed=0):
            return None

    with pytest.raises(TypeError, match="must not override compress"):
        type("Sly", (Mixin, Custom), {})
    with pytest.raises(TypeError, match="must not override compress"):
        type("Bold", (Custom,), {"compress": lambda *_: None})
