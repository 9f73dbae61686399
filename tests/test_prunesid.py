"""PruneSID against a slow reading of the released code: singular vectors, Python loops, explicit matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tokcomp.methods import get_method, information_score
from edge_tokcomp.methods.prunesid import bounded_quotas, mean_cosine, projections, survive
from edge_tokcomp.tokens import Layout, Role, VisionTokens


def features_of(count: int, seed: int, width: int = 64) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixture = np.abs(rng.standard_normal((count, 9))) ** 2
    rows = 0.5 * mixture @ rng.standard_normal((9, width)) + rng.standard_normal((count, width))
    return (rows + rng.standard_normal(width)).astype(np.float32)


def attention_of(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(count, 0.3), 6).astype(np.float32)


def image(count_or_grid, seed: int, cls_rows: bool = False) -> VisionTokens:
    layout = Layout.of_grids(count_or_grid, cls_rows=cls_rows)
    return VisionTokens(features_of(len(layout), seed), layout, cls_attention=attention_of(len(layout), seed))


def slow_projections(features: np.ndarray, groups: int, centre: str) -> np.ndarray:
    squashed = 1 / (1 + np.exp(-features.astype(np.float64)))
    if centre == "feature":
        matrix = squashed.T - squashed.T.mean(axis=0)
    else:
        matrix = squashed.T - squashed.mean(axis=0)[:, None]
    return np.abs(np.linalg.svd(matrix, full_matrices=False)[2].T[:, :groups])


def slow_rho(features: np.ndarray, mode: str) -> float:
    unit = [row / np.linalg.norm(row) for row in features.astype(np.float64)]
    count = len(unit)
    if mode == "qwen":
        return sum(unit[i] @ unit[j] for i in range(count) for j in range(i, count)) / count**2
    pairs = [unit[i] @ unit[j] for i in range(count) for j in range(i + 1, count)]
    return sum(pairs) / len(pairs)


def slow_nms(similarity: np.ndarray, scores: np.ndarray, tau: float) -> list[int]:
    scores, kept = scores.copy(), []
    while scores.sum() > 0:
        best = int(scores.argmax())
        kept.append(best)
        scores[best] = 0
        scores[similarity[best] > tau] = 0
    return kept


def half_even(numerator: int, denominator: int) -> int:
    whole, rest = divmod(numerator, denominator)
    return whole + (2 * rest > denominator or (2 * rest == denominator and whole % 2 == 1))


def slow_quotas(sizes, kept, wanted, budget, upper) -> list[int]:
    low = [min(1, size) for size in sizes]
    up = [min(upper, size, m) for size, m in zip(sizes, kept, strict=True)]
    while sum(up) < budget:
        up = [min(u + 1, size) for u, size in zip(up, sizes, strict=True)]
    other = max(0, wanted - sum(low))
    quota, cumulated = [], 0
    for g in range(len(sizes)):
        before = half_even(cumulated * other, sum(kept))
        cumulated += kept[g]
        quota.append(min(low[g] + half_even(cumulated * other, sum(kept)) - before, up[g]))
    for g in np.argsort(-np.array(kept), kind="stable"):
        if sum(quota) < other + sum(low):
            quota[g] += min(up[g] - quota[g], other + sum(low) - sum(quota))
    return quota


def slow_prunesid(features, scores, budget, patches, centre, rho_mode, groups, lambda_, upper_mult=5) -> list[int]:
    """The released algorithm: local indices in the order in which it emits them. ``scores``: None for projections."""
    lengths = slow_projections(features, groups, centre)
    member_of = lengths.argmax(axis=1)
    scores = lengths.max(axis=1) if scores is None else scores
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    tau = lambda_ * slow_rho(features, rho_mode)
    listed, sizes, kept = [], [], []
    for g in range(groups):
        members = np.flatnonzero(member_of == g)
        first = slow_nms(unit[members] @ unit[members].T, scores[members], tau)
        rest = [i for i in np.argsort(-scores[members], kind="stable") if i not in first]
        listed.append([int(members[i]) for i in [*first, *rest]])
        sizes.append(len(members))
        kept.append(len(first))
    quotas = slow_quotas(sizes, kept, patches, budget, upper_mult * math.ceil(budget / 64))
    return [row for rows, quota in zip(listed, quotas, strict=True) for row in rows[:quota]]


@pytest.mark.parametrize("budget", [4, 16, 32, 40, 64, 65, 100, 129, 192])
@pytest.mark.parametrize("seed", [0, 2])
def test_the_released_llava_code_without_and_with_its_cls_row(budget, seed):
    tokens = image((15, 14), seed, cls_rows=True)
    patches = tokens.layout.patches
    summed = tokens.cls_attention.astype(np.float64).sum(axis=0)[patches]
    for keep_cls in (False, True):
        plan = get_method("prunesid", keep_cls=keep_cls).compress(tokens, budget)
        expected = slow_prunesid(
            tokens.features[patches],
            summed,
            budget,
            budget - keep_cls,
            "feature",
            "strict_upper",
            budget // 4,
            budget / 32,
        )
        assert plan.rank.tolist() == [0] * keep_cls + patches[expected].tolist()
        assert np.sum(tokens.layout.role[plan.keep] == Role.PATCH) == budget - keep_cls


@pytest.mark.parametrize("budget", [8, 16, 40, 70, 150])
def test_the_released_qwen_code(budget):
    tokens = image((14, 15), budget)
    plan = get_method("prunesid-qwen").compress(tokens, budget)
    groups, lambda_ = max(budget // 4, 4), max(18 * budget / 210, 1)
    assert plan.rank.tolist() == slow_prunesid(
        tokens.features, None, budget, budget, "feature", "qwen", groups, lambda_
    )


@pytest.mark.parametrize("options", [(4, 0.6, 5), (9, 1.3, 1), (1, 0.9, 2)])
def test_options_reach_the_algorithm(options):
    groups, lambda_, upper = options
    tokens = image((10, 12), 5)
    method = get_method(
        "prunesid", centre="token", score="projection", groups=groups, lambda_=lambda_, upper_mult=upper
    )
    expected = slow_prunesid(tokens.features, None, 33, 33, "token", "strict_upper", groups, lambda_, upper)
    assert method.compress(tokens, 33).rank.tolist() == expected


@pytest.mark.parametrize("budget", [8, 32, 64])
def test_the_paper_shares_the_budget_by_survivors_and_takes_the_best_of_each_group(budget):
    tokens = image((12, 12), budget)
    lengths = slow_projections(tokens.features, budget // 4, "token")
    member_of, scores = lengths.argmax(axis=1), lengths.max(axis=1)
    unit = tokens.features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    tau = budget / 32 * slow_rho(tokens.features, "strict_upper")
    kept = []
    for g in range(budget // 4):
        members = np.flatnonzero(member_of == g)
        kept.append(members[slow_nms(unit[members] @ unit[members].T, scores[members], tau)].tolist())
    survivors = sum(len(group) for group in kept)
    plan = get_method("prunesid-paper").compress(tokens, budget)
    assert plan.stats["survivors"] == survivors
    chosen = set(plan.keep.tolist())
    if survivors <= budget:
        assert {row for group in kept for row in group} <= chosen
        spare = sorted((row for row in range(144) if not any(row in group for group in kept)), key=lambda r: -scores[r])
        assert chosen == {row for group in kept for row in group} | set(spare[: budget - survivors])
        return
    for group in kept:
        count = len(chosen & set(group))
        assert chosen & set(group) == set(group[:count])
        assert abs(count - len(group) / survivors * budget) < 1


def test_the_cases_cover_survivors_above_and_below_the_budget():
    survivors = {
        b: get_method("prunesid-paper").compress(image((12, 12), b), b).stats["survivors"] for b in (8, 32, 64)
    }
    assert min(s - b for b, s in survivors.items()) < 0 < max(s - b for b, s in survivors.items())


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12), st.integers(1, 40), st.data()
)
def test_quotas_equal_the_released_arithmetic(pairs, upper, data):
    sizes = [max(pair) for pair in pairs]
    kept = [min(pair) for pair in pairs]
    filled = sum(size > 0 for size in sizes)
    if not any(kept):
        kept = sizes
    if not filled:
        return
    budget = data.draw(st.integers(filled + 1, max(sum(sizes), filled + 1)))
    for cls in (0, 1):
        if budget <= sum(sizes):
            quotas = bounded_quotas(sizes, kept, budget - cls, upper, budget)
            assert quotas == slow_quotas(sizes, kept, budget - cls, budget, upper)
            assert sum(quotas) == budget - cls


def test_a_budget_above_the_crop_ends():
    assert bounded_quotas([3, 2], [1, 1], 5, 5, 99) == [3, 2]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.floats(-0.5, 1.2), st.integers(0, 10**6))
def test_suppression_equals_picking_the_best_again_and_again(count, tau, seed):
    unit = features_of(count, seed, width=3)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    scores = np.sort(np.random.default_rng(seed).choice([0.0, 0.1, 0.2, 0.7, 0.9, 1.0], count))[::-1] + 0.0
    scores[scores > 0] -= np.arange(np.sum(scores > 0)) * 1e-6
    near = unit @ unit.T > tau
    assert np.flatnonzero(survive(near, scores > 0)).tolist() == slow_nms(unit @ unit.T, scores, tau)


@pytest.mark.parametrize("centre", ["feature", "token"])
def test_projections_are_the_singular_vectors(centre):
    features = features_of(90, 3)
    expected = slow_projections(features, 20, centre)
    assert np.allclose(projections(features, 20, centre), expected, atol=1e-9)


def test_components_of_rounding_noise_count_for_nothing():
    same = np.repeat(features_of(3, 0), 10, axis=0)
    lengths = projections(same, 8, "token")
    assert np.any(lengths[:, 1] > 0)
    assert not np.any(lengths[:, 2:])
    assert not np.any(projections(np.zeros((6, 4), np.float32), 3, "feature"))


def test_an_inert_threshold_leaves_the_most_attended_of_each_group():
    tokens = image((8, 8), 1)
    summed = tokens.cls_attention.astype(np.float64).sum(axis=0)
    plan = get_method("prunesid", lambda_=1000.0).compress(tokens, 24)
    assert plan.stats["tau"] > 1
    assert plan.stats["survivors"] == 64
    member_of = slow_projections(tokens.features, 6, "feature").argmax(axis=1)
    for g in range(6):
        members = np.flatnonzero(member_of == g)
        chosen = np.intersect1d(members, plan.keep)
        best = members[np.argsort(-summed[members], kind="stable")][: len(chosen)]
        assert set(chosen) == set(best)


def test_a_negative_mean_cosine_suppresses_what_points_the_same_way():
    directions = np.array([[1, 0.1], [1, -0.1], [-1, 0.1], [-1, -0.1]], np.float32)
    features = np.tile(directions, (4, 1))
    layout = Layout.of_grids((4, 4))
    plan = get_method("prunesid", groups=1).compress(
        VisionTokens(features, layout, cls_attention=attention_of(16, 0)), 6
    )
    assert plan.stats["rho"] < 0
    assert plan.stats["survivors"] == 2
    assert len(plan) == 6


def test_tokens_without_attention_come_last():
    tokens = image((6, 6), 2)
    tokens.cls_attention[:, 5:] = 0
    assert get_method("prunesid", groups=1).compress(tokens, 5).keep.tolist() == [0, 1, 2, 3, 4]
    tokens.cls_attention[:] = 0
    plan = get_method("prunesid").compress(tokens, 9)
    assert plan.stats["survivors"] == 0
    assert len(plan) == 9


def test_rho_and_information_equal_the_mean_over_pairs():
    features = features_of(25, 4)
    for mode in ("strict_upper", "qwen"):
        unit = features / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
        assert mean_cosine(unit, mode) == pytest.approx(slow_rho(features, mode), abs=1e-9)
    assert information_score(features) == pytest.approx(1 - slow_rho(features, "strict_upper"), abs=1e-9)
    assert information_score(np.ones((5, 3), np.float32)) == pytest.approx(0, abs=1e-12)
    assert information_score(np.ones((1, 3), np.float32)) == 1
    torch = pytest.importorskip("torch")
    assert information_score(torch.from_numpy(features)) == pytest.approx(information_score(features), abs=1e-12)


def test_a_budget_is_the_same_plan_whichever_way_it_is_written():
    tokens = image((12, 12), 0)
    plans = [get_method("prunesid").compress(tokens, keep).rank.tolist() for keep in (36, "36", 0.25, "25%")]
    assert plans.count(plans[0]) == 4


@pytest.mark.parametrize("width", [5, 24, 40, 80])
@pytest.mark.parametrize("centre", ["feature", "token"])
def test_projections_equal_the_singular_vectors_whichever_gram_matrix_is_smaller(width, centre):
    rows = np.random.default_rng(width).standard_normal((40, width)).astype(np.float32)
    squashed = 1 / (1 + np.exp(-rows.astype(np.float64)))
    squashed -= squashed.mean(axis=1 if centre == "feature" else 0, keepdims=True)
    vectors, values, _ = np.linalg.svd(squashed)
    found = projections(rows, 12, centre)
    assert found.shape == (40, 12)
    real = int(np.sum(values > 1e-6))
    np.testing.assert_allclose(found[:, :real], np.abs(vectors[:, : min(real, 12)]), atol=1e-7)
    assert np.all(found[:, real:] == 0)
