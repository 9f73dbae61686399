from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tokcomp.budget import (
    RunningMean,
    describe,
    dynamic_keep,
    dynamic_keeps,
    largest_share,
    parse_keep,
    share,
    smallest_share,
    tokens_to_keep,
)
from edge_tokcomp.errors import UsageError


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("64", 64), (" 64 ", 64), (64, 64), (np.int64(64), 64), ("1", 1),
        ("0.25", 0.25), (".25", 0.25), (0.25, 0.25), (np.float32(0.25), 0.25), ("2.5e-1", 0.25),
        ("25%", 0.25), ("25 %", 0.25), ("12.5%", 0.125), ("100%", 1.0), ("1.0", 1.0), (1.0, 1.0),
    ],
)  # fmt: skip
def test_keep_is_read_as_written(written, meant):
    keep = parse_keep(written)
    assert keep == meant
    assert type(keep) is type(meant)


@pytest.mark.parametrize(
    "nonsense",
    [
        0, -1, "0", "-3", 0.0, -0.5, 1.5, "1.5", "64.0", "0%", "101%", "-5%", float("nan"), "nan", float("inf"), "inf",
        "", "abc", "64 tokens", "0x10", "1_000", "٣", "1/4", "%", ".", "1e3", True, False, None, [64], 1j, "9" * 5000,
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_the_value_and_what_to_write(nonsense):
    with pytest.raises(UsageError) as caught:
        parse_keep(nonsense)
    assert repr(nonsense) in str(caught.value)
    assert "write a number of tokens (64), a fraction (0.25) or a percentage (25%)" in str(caught.value)


@given(st.integers(1, 10**6), st.integers(1, 5000))
def test_a_count_is_kept_exactly_up_to_what_is_there(keep, before):
    assert tokens_to_keep(keep, before) == min(keep, before)


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 5000))
def test_a_fraction_keeps_the_nearest_count_but_never_none(keep, before):
    kept = tokens_to_keep(keep, before)
    assert 1 <= kept <= before
    assert abs(kept - keep * before) <= 0.5 + 1e-9 or kept == 1


def test_halves_are_rounded_up_and_nothing_has_no_budget():
    assert tokens_to_keep(0.5, 5) == 3
    assert tokens_to_keep("25%", 576) == 144
    with pytest.raises(ValueError, match="0 tokens"):
        tokens_to_keep(1, 0)


@settings(deadline=None)
@given(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_shares_without_caps_are_as_near_to_proportion_as_whole_numbers_can_be(total, weights):
    def error(parts):
        return sum(
            abs(part - Fraction(total * weight, sum(weights))) for part, weight in zip(parts, weights, strict=True)
        )

    every = (parts for parts in itertools.product(range(total + 1), repeat=len(weights)) if sum(parts) == total)
    assert error(share(total, weights)) == min(error(parts) for parts in every)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50) | st.floats(0, 50), st.integers(0, 30)), min_size=1, max_size=8), st.data()
)
def test_shares_sum_exactly_respect_caps_and_stay_fair(pairs, data):
    weights, caps = [w for w, _ in pairs], [c for _, c in pairs]
    total = data.draw(st.integers(0, sum(caps)))
    parts = share(total, weights, caps)
    assert sum(parts) == total
    assert all(0 <= part <= cap for part, cap in zip(parts, caps, strict=True))
    assert parts == share(total, weights, caps)
    for i, j in itertools.permutations(range(len(parts)), 2):
        if parts[i] < caps[i] and parts[j] > 0 and weights[i] > 0 and weights[j] > 0:
            assert Fraction(parts[j] - 1) / Fraction(weights[j]) <= Fraction(parts[i] + 1) / Fraction(weights[i])


def test_equal_remainders_go_to_the_lower_index_and_zero_weights_share_equally():
    assert share(7, [1, 1, 1]) == [3, 2, 2]
    assert share(4, [0, 0, 0]) == [2, 1, 1]
    assert share(5, [0.0, 1.0], [9, 2]) == [3, 2]


@pytest.mark.parametrize(
    "bad", [(5, [1, 1], [2, 2]), (-1, [1], [2]), (1, [float("nan")], [2]), (1, [-1], [2]), (1, [1], [1, 1])]
)
def test_impossible_shares_are_programming_faults(bad):
    with pytest.raises(ValueError, match=r"share|weights"):
        share(*bad)


def test_the_echo_names_before_after_and_percentage():
    assert describe(576, 64) == "576 → 64 (11.1 %)"
    with pytest.raises(ValueError, match="0 tokens"):
        describe(0, 0)


SCORES = st.floats(0, 2) | st.sampled_from([0.0, 0.25, 0.5, 1.0])


@st.composite
def batches(draw):
    """``(keep, score, most)`` of some pictures."""
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        most = draw(st.integers(1, 60))
        rows.append((draw(st.integers(1, most)), draw(SCORES), most))
    return rows


def dynamic(rows) -> list[int]:
    return dynamic_keeps(*zip(*rows, strict=True)) if rows else []


def exact_level(rows) -> list[Fraction]:
    """What each would get in fractions of tokens: ``level * keep * score`` within bounds, the level by bisection."""
    total, low, high = sum(keep for keep, _, _ in rows), Fraction(0), Fraction(2**40)

    def parts(level):
        return [
            min(
                max(level * keep * Fraction(max(score, 1e-6)), Fraction(smallest_share(keep))),
                largest_share(keep, most),
            )
            for keep, score, most in rows
        ]

    for _ in range(140):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(parts(middle)) < total else (low, middle)
    return parts(high)


@settings(deadline=None)
@given(batches())
def test_a_batch_keeps_exactly_its_budget_within_bounds_and_in_proportion(rows):
    parts = dynamic(rows)
    assert sum(parts) == sum(keep for keep, _, _ in rows)
    for part, (keep, _, most) in zip(parts, rows, strict=True):
        assert -(-keep // 2) <= part <= min(2 * keep, most)
    assert all(abs(part - level) < 1 + 1e-6 for part, level in zip(parts, exact_level(rows), strict=True))
    assert dynamic(rows) == parts


def test_shares_beyond_the_bounds_go_to_those_within():
    assert dynamic_keeps([64, 64], [0.3, 0.6], [576, 576]) == [43, 85]
    assert dynamic_keeps([64] * 4, [0.1, 0.5, 0.5, 0.9], [576] * 4) == [32, 59, 59, 106]
    assert dynamic_keeps([64] * 4, [0.01, 0.01, 0.01, 1.0], [576] * 4) == [43, 43, 42, 128]
    assert dynamic_keeps([64, 64], [0.1, 1.0], [576, 70]) == [58, 70]
    assert dynamic_keeps([64, 64, 64], [0.0, 0.0, 0.0], [576] * 3) == [64, 64, 64]
    assert dynamic_keeps([5, 10], [0.0, 0.0], [9, 10]) == [5, 10]
    assert dynamic_keeps([], [], []) == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=9), SCORES)
def test_equal_scores_leave_every_keep_as_it_is(pairs, score):
    rows = [(keep, score, keep + more) for keep, more in pairs]
    assert dynamic(rows) == [keep for keep, _ in pairs]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 60), st.lists(SCORES, min_size=1, max_size=9))
def test_of_two_pictures_alike_but_for_the_score_the_higher_gets_no_less(keep, more, scores):
    parts = dynamic([(keep, score, keep + more) for score in scores])
    for i, j in itertools.permutations(range(len(scores)), 2):
        if max(scores[i], 1e-6) > max(scores[j], 1e-6):
            assert parts[i] >= parts[j]
        elif max(scores[i], 1e-6) == max(scores[j], 1e-6):
            assert abs(parts[i] - parts[j]) <= 1


@settings(deadline=None)
@given(batches(), st.data())
def test_a_higher_score_never_costs_a_picture_tokens(rows, data):
    place = data.draw(st.integers(0, len(rows) - 1))
    keep, score, most = rows[place]
    raised = [*rows[:place], (keep, data.draw(st.floats(score, 2)), most), *rows[place + 1 :]]
    assert dynamic(raised)[place] >= dynamic(rows)[place]


@settings(deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_the_pictures_decides_nothing(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert dynamic_keeps([6, 6], [0.375, 0.625], [99, 99]) == [4, 8]  # of 4.5 and 7.5
    assert dynamic_keeps([6, 6], [0.625, 0.375], [99, 99]) == [8, 4]
    given_out = [sorted(zip(each, dynamic(each), strict=True)) for each in (rows, shuffled)]
    assert given_out[0] == given_out[1]


@settings(deadline=None)
@given(st.integers(1, 300), SCORES, st.floats(1e-3, 2), st.integers(0, 400))
def test_a_picture_alone_gets_its_part_of_the_mean_within_bounds(keep, score, mean, more):
    most = keep + more
    part = dynamic_keep(keep, score, mean, most)
    exact = Fraction(keep) * Fraction(max(score, 1e-6)) / Fraction(mean)
    low, high = -(-keep // 2), min(2 * keep, most)
    assert low <= part <= high
    assert part == low if exact < low else part == high if exact > high else abs(part - exact) <= Fraction(1, 2)
    assert part <= dynamic_keep(keep, min(score + 0.1, 2), mean, most)
    assert dynamic_keep(keep, mean, mean, most) == keep


def test_a_picture_alone_is_rounded_to_the_nearest_and_halves_up():
    assert dynamic_keep(64, 0.5, 0.4, 576) == 80
    assert dynamic_keep(5, 0.5, 0.25, 576) == 10
    assert dynamic_keep(5, 0.75, 0.5, 576) == 8
    assert dynamic_keep(64, 0.0, 0.0, 576) == 64


@pytest.mark.parametrize(
    "bad",
    [([1], [1.0], []), ([1], [float("nan")], [1]), ([1], [float("inf")], [1]), ([0], [1.0], [1]), ([2], [1.0], [1])],
)
def test_impossible_batches_are_programming_faults(bad):
    with pytest.raises(ValueError, match=r"as many|not finite|does not lie"):
        dynamic_keeps(*bad)


@given(st.lists(st.floats(0, 2), min_size=1, max_size=30))
def test_the_running_mean_is_that_of_all_so_far(values):
    running = RunningMean()
    for count, value in enumerate(values, start=1):
        assert running.add(value) == pytest.approx(sum(values[:count]) / count, abs=1e-12)
