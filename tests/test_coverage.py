"""Greedy coverage: of one table, of several, and of tables that are alike both ways."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edge_tokcomp.methods import get_method
from edge_tokcomp.methods.selection import Cover, coverage
from edge_tokcomp.tokens import Layout, VisionTokens
from made_up_images import greedily, image


def test_coverage_equals_exhaustive_search_up_to_the_greedy_bound():
    rng = np.random.default_rng(0)
    for _ in range(10):
        table = rng.random((9, 8)) ** 3

        def covered(columns, table=table):
            return table[:, list(columns)].max(axis=1).sum()

        best = max(covered(columns) for columns in itertools.combinations(range(8), 3))
        assert covered(coverage([Cover(table, np.ones(9))], 3)) >= (1 - 1 / np.e) * best


@pytest.mark.parametrize("things", [(5,), (70,), (5, 70), (20, 20, 20)])
@pytest.mark.parametrize("worth", [False, True])
def test_coverage_of_several_tables_is_that_of_one_below_the_other(things, worth):
    rng = np.random.default_rng(len(things))
    tables = [rng.random((count, 30)) ** 4 for count in things]
    weights = [rng.random(count) for count in things]
    value = rng.random(30) if worth else None

    def gain(row, chosen):
        total = 0.0
        for table, weight in zip(tables, weights, strict=True):
            covered = np.max([np.zeros(len(table)), *(table[:, c] for c in chosen)], axis=0)
            total += float(weight @ np.maximum(table[:, row] - covered, 0))
        return total * (value[row] if worth else 1)

    covers = [Cover(table, weight) for table, weight in zip(tables, weights, strict=True)]
    assert coverage(covers, 12, value).tolist() == greedily(30, 12, gain)


@pytest.mark.parametrize("count", [40, 90])
def test_coverage_of_a_symmetric_table_reads_rows_for_columns(count):
    table = np.random.default_rng(count).random((count, count)) ** 6
    table = (table + table.T) / 2
    weight = np.random.default_rng(0).random(count)
    plain, symmetric = (coverage([Cover(table, weight, flag)], 30) for flag in (False, True))
    assert plain.tolist() == symmetric.tolist()


@pytest.mark.parametrize("temperature", [0.2, 0.05])
def test_mmtok_takes_rows_of_zeros_for_like_none(temperature):
    """Their softmax is the same for all, so that they decide nothing."""
    tokens = image(Layout.of_grids((5, 6)), 0)
    features = tokens.features.copy()
    features[[3, 17]] = 0
    length = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features.astype(np.float64) / np.where(length > 0, length, 1)
    powers = np.exp(unit @ unit.T / temperature)
    table = powers / powers.sum(axis=1, keepdims=True)

    def gain(row, chosen):
        return sum(max(table[thing, [row, *chosen]]) - max([0, *table[thing, chosen]]) for thing in range(30))

    plan = get_method("mmtok", image_temperature=temperature).compress(VisionTokens(features, tokens.layout), 10)
    assert plan.rank.tolist() == greedily(30, 10, gain)


def test_mmtok_bears_powers_that_underflow():
    tokens = image(Layout.of_grids((5, 6)), 0)
    features = tokens.features.copy()
    features[[3, 17]] = 0
    plan = get_method("mmtok", image_temperature=0.001).compress(VisionTokens(features, tokens.layout), 10)
    assert not {3, 17} & set(plan.keep.tolist())
