from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tokcomp.budget import describe, parse_keep, share, tokens_to_keep
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
