"""ToDRE stage I against recomputing every pair at every step, and the greedy kernel it shares."""

from __future__ import annotations

import numpy as np
import pytest

from edge_tokcomp.methods import get_method, selection
from edge_tokcomp.methods.kernels import settle, top_k, unit_rows
from edge_tokcomp.methods.selection import Cosines, greedy
from edge_tokcomp.tokens import Layout, Role, VisionTokens

FORMS = ["max_sum", "k_center"]


def image(*grids, seed=0, attention=True, cls_rows=False, overview=None) -> VisionTokens:
    return tokens_of(Layout.of_grids(*grids, cls_rows=cls_rows, overview=overview), seed, attention)


def tokens_of(layout: Layout, seed: int = 0, attention: bool = True) -> VisionTokens:
    rng = np.random.default_rng(seed)
    total = len(layout)
    features = rng.standard_normal((total, 4)) @ rng.standard_normal((4, 32)) + rng.standard_normal((total, 32))
    features = (features + rng.standard_normal(32)).astype(np.float32)
    matrix = rng.standard_normal((32, 50)).astype(np.float32)
    cls_attention = rng.dirichlet(np.full(total, 0.3), 4).astype(np.float32) if attention else None
    return VisionTokens(features, layout, lambda rows: np.tanh(rows @ matrix), cls_attention)


def slow_todre(embeddings: np.ndarray, pivot: int, k: int, form: str) -> list[int]:
    rows = embeddings.astype(np.float64)
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in rows] for a in rows])
    chosen = [pivot]
    while len(chosen) < k:
        worth = {}
        for i in range(len(rows)):
            if i not in chosen:
                near = [cosine[i, c] for c in chosen]
                worth[i] = -sum(near) if form == "max_sum" else 1 - max(near)
        chosen.append(max(worth, key=lambda i: worth[i]))
    return chosen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 2, 5, 30, 71])
def test_each_step_takes_the_token_farthest_from_those_chosen(form, k):
    tokens = image((8, 9), seed=k)
    pivot = int(tokens.cls_attention.mean(axis=0).argmax())
    plan = get_method("todre", form=form).compress(tokens, k)
    assert plan.rank.tolist() == slow_todre(tokens.embeddings, pivot, k, form)
    assert plan.stats["pivot_by_attention"] == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_smaller_budget_is_the_beginning_of_a_larger_one(form):
    tokens = image((9, 9), (5, 7))
    method = get_method("todre", form=form)
    longest = method.compress(tokens, 115).rank
    for k in (1, 2, 7, 8, 40, 114):
        assert np.array_equal(method.compress(tokens, k).rank, longest[:k])


@pytest.mark.parametrize("cls_rows", [False, True])
@pytest.mark.parametrize("overview", [0, 2])
def test_the_pivot_is_looked_for_in_the_overview_only_but_tokens_come_from_every_crop(cls_rows, overview):
    tokens = image((4, 4), (6, 6), (6, 6), cls_rows=cls_rows, overview=overview)
    tokens.cls_attention[:, [0, 30]] = 0, 1
    plan = get_method("todre").compress(tokens, 20)
    searched = (tokens.layout.crop == overview) & (tokens.layout.role == Role.PATCH)
    assert plan.rank[0] == np.where(searched, tokens.cls_attention.mean(axis=0), -1).argmax()
    if cls_rows:
        return
    assert plan.rank.tolist() == slow_todre(tokens.embeddings, int(plan.rank[0]), 20, "max_sum")
    assert set(tokens.layout.crop[plan.keep]) == {0, 1, 2}


@pytest.mark.parametrize("form", FORMS)
def test_the_pivot_of_a_video_is_the_best_of_the_frame_whose_best_is_largest(form):
    for seed in range(6):
        tokens = tokens_of(Layout.of_frames(5, (4, 3), cls_rows=True), seed)
        frames = tokens.cls_attention.mean(axis=0).reshape(5, 13)
        frames[:, 0] = 0
        best = frames.argmax(axis=1)
        frame = max(range(5), key=lambda f, best=best, frames=frames: frames[f, best[f]])
        plan = get_method("todre", form=form).compress(tokens, 9)
        assert plan.rank[0] == 13 * frame + best[frame]


def test_crops_that_are_no_overview_are_equals():
    tokens = image((4, 4), (6, 6), seed=1)
    tokens.cls_attention[:, 30] = 1
    assert get_method("todre").compress(tokens, 5).rank[0] == 30


@pytest.mark.parametrize("overview", [0, None])
def test_without_attention_the_pivot_is_the_most_typical_token_of_the_overview_or_of_all(overview):
    tokens = image((5, 5), (6, 6), attention=False, overview=overview)
    plan = get_method("todre").compress(tokens, 12)
    unit = tokens.embeddings / np.linalg.norm(tokens.embeddings, axis=1, keepdims=True)
    among = unit if overview is None else unit[:25]
    assert plan.rank[0] == np.argmax(among @ among.mean(axis=0))
    assert plan.rank.tolist() == slow_todre(tokens.embeddings, int(plan.rank[0]), 12, "max_sum")
    assert plan.stats["pivot_by_attention"] == 0


def test_distances_are_measured_at_language_width():
    tokens = image((7, 7))
    flat = VisionTokens(tokens.features, tokens.layout, None, tokens.cls_attention)
    assert get_method("todre").compress(flat, 9).rank.tolist() != get_method("todre").compress(tokens, 9).rank.tolist()


def test_cls_rows_are_never_chosen():
    tokens = image((4, 4), cls_rows=True)
    tokens.cls_attention[:, 0] = 1
    assert 0 not in get_method("todre").compress(tokens, 10).keep


@pytest.mark.parametrize("form", FORMS)
def test_the_table_and_the_running_form_choose_the_same(form, monkeypatch):
    tokens = image((20, 20))
    table = get_method("todre", form=form).compress(tokens, 60).rank
    monkeypatch.setattr(selection, "_GRAM_ROWS", 0)
    running = get_method("todre", form=form).compress(image((20, 20)), 60).rank
    assert np.array_equal(table, running)


def test_cosines_equal_the_definition_in_both_forms():
    rows = np.random.default_rng(0).standard_normal((40, 7)).astype(np.float32)
    rows[3] = 0
    unit = unit_rows(rows)
    assert unit.dtype == np.float64
    for steps in (1, 40):
        got = Cosines(unit, steps).to(np.array([5]))
        norms = np.linalg.norm(rows, axis=1)
        expected = [0 if i == 3 else rows[i] @ rows[5] / norms[i] / norms[5] for i in range(40)]
        assert np.allclose(got, expected, atol=1e-6)


def test_unit_rows_survive_extreme_lengths():
    rows = np.array([[3e38, 3e38], [1e-45, 0], [0, 0]], np.float32)
    assert np.allclose(unit_rows(rows), [[0.5**0.5, 0.5**0.5], [1, 0], [0, 0]])


def test_greedy_takes_the_highest_gain_once_with_ties_to_the_lower_index():
    gains = np.array([0.5, 2.0, 2.0 + 1e-13, 1.0])
    calls = []

    def update(chosen):
        calls.append(int(chosen[0]))
        return gains

    assert greedy(gains, update, 3).tolist() == [1, 2, 3]
    assert calls == [1, 2]
    assert greedy(gains, update, 2, first=3).tolist() == [3, 1]


def test_top_k_is_stable_and_settling_removes_rounding_noise():
    assert top_k(np.array([1.0, 3.0, 3.0, 2.0, 3.0]), 4).tolist() == [1, 2, 4, 3]
    assert settle(np.array([1 / 3])) == settle(np.array([1 / 3 + 1e-15]))
    assert settle(np.array([1.0, 1.0 + 1e-9])).tolist() != [1.0, 1.0]
