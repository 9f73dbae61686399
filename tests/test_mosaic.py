"""Mosaic against a slow version written from its description, and what it is for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_tokcomp.errors import UsageError
from edge_tokcomp.methods import get_method
from edge_tokcomp.tokens import Layout, VisionTokens
from made_up_images import image


def by_hand(tokens: VisionTokens, k: int, temperature=0.3, reach=1.5, plenty=2.0, stand_out=0.5, attended=0.125):
    """Rows in the order of choice, what each row goes to, and its share there."""
    (height, width), cells = tokens.layout.grids[0], tokens.layout.cell.tolist()
    rows = tokens.features.astype(np.float64)
    apart = rows - rows.mean(axis=0)
    count, radius = len(rows), reach * math.sqrt(height * width / k)

    def likeness(i: int, j: int) -> float:
        cosine = apart[i] @ apart[j] / np.linalg.norm(apart[i]) / np.linalg.norm(apart[j])
        down, across = cells[i] // width - cells[j] // width, cells[i] % width - cells[j] % width
        return math.exp(-(1 - cosine) / temperature) * math.exp(-(down**2 + across**2) / (2 * radius**2))

    alike = np.array([[likeness(i, j) for j in range(count)] for i in range(count)])
    halvings = math.log2(count / k) - plenty
    lengths, attention = np.linalg.norm(apart, axis=1), tokens.cls_attention.astype(np.float64).sum(axis=0)
    worth = (lengths / lengths.mean()) ** (stand_out * min(max(halvings, 0), 1))
    worth *= (attention / attention.mean()) ** (attended * max(halvings - 1, 0))
    chosen: list[int] = []
    for _ in range(k):
        covered = alike[:, chosen].max(axis=1) if chosen else np.zeros(count)
        gain = {j: worth @ np.maximum(alike[:, j] - covered, 0) for j in range(count) if j not in chosen}
        chosen.append(max(gain, key=lambda j: (round(gain[j], 9), -j)))  # a pair that only covers each other ties
    goes = [chosen.index(i) if i in chosen else int(np.argmax(alike[i, chosen])) for i in range(count)]
    given = np.array([alike[i, chosen[goes[i]]] for i in range(count)])
    return chosen, goes, given / np.bincount(goes, given)[goes]


@pytest.mark.parametrize(("grid", "k"), [((6, 7), 3), ((6, 7), 9), ((8, 8), 2), ((5, 9), 30), ((1, 12), 4)])
@pytest.mark.parametrize("options", [{}, {"plenty": 0.5, "attended": 0.4, "reach": 0.8, "temperature": 0.7}])
def test_mosaic_equals_its_description(grid, k, options):
    tokens = image(Layout.of_grids(grid), seed=k)
    chosen, goes, share = by_hand(tokens, k, **options)
    plan = get_method("mosaic", **options).compress(tokens, k)
    assert plan.rank.tolist() == chosen
    assert plan.keep[plan.assign].tolist() == [chosen[place] for place in goes]
    np.testing.assert_allclose(plan.weight, share, rtol=1e-5)


def test_rows_given_in_another_order_but_at_their_cells_give_the_same_choice():
    layout = Layout.of_grids((6, 7))
    tokens, order = image(layout, 5), np.random.default_rng(5).permutation(42)
    moved = VisionTokens(
        tokens.features[order], Layout(layout.grids, layout.crop, layout.cell[order], layout.role), tokens.project,
        tokens.cls_attention[:, order],
    )  # fmt: skip
    method = get_method("mosaic")
    assert order[method.compress(moved, 9).rank].tolist() == method.compress(tokens, 9).rank.tolist()


def test_every_row_is_a_mean_and_nothing_is_dropped():
    plan = get_method("mosaic").compress(image(Layout.of_grids((8, 8))), 10)
    assert plan.assign.min() == 0
    np.testing.assert_allclose(np.bincount(plan.assign, plan.weight), 1, rtol=1e-6)


def test_a_picture_of_one_colour_is_covered_about_as_evenly_as_by_a_grid():
    same = VisionTokens(np.ones((144, 8), np.float32), Layout.of_grids((12, 12)))

    def far(name: str, keep: int) -> float:
        y, x = np.divmod(np.arange(144), 12)
        kept = get_method(name).compress(same, keep).keep
        return float(np.hypot(y[:, None] - y[kept], x[:, None] - x[kept]).min(axis=1).mean())

    for keep in (4, 9, 16, 36):
        assert far("mosaic", keep) <= 1.2 * far("uniform", keep) < 1.2 * far("random", keep)


def test_a_small_thing_on_a_large_background_is_covered_by_tokens_of_its_own():
    rng = np.random.default_rng(2)
    rows = rng.normal(0, 0.1, (144, 8)).astype(np.float32) + np.array([3, 1, 0, 0, 0, 0, 0, 0], np.float32)
    thing = [40, 41, 52, 53]
    rows[thing] += np.array([0, 0, 2, 2, 0, 0, 0, 0], np.float32)
    tokens = VisionTokens(rows, Layout.of_grids((12, 12)))
    for keep in (2, 4, 8, 16):
        plan = get_method("mosaic").compress(tokens, keep)
        assert set(plan.keep[plan.assign[thing]].tolist()) <= set(thing)


@pytest.mark.parametrize("text", ["mosaic:temperature=0.001", "mosaic:reach=-1.0", "mosaic:plenty=-1.0"])
def test_constants_that_cannot_be_are_refused(text):
    with pytest.raises(UsageError, match="mosaic"):
        get_method(text)
