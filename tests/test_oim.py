"""LUVC's orthogonal merger against merging one pair at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tokcomp.methods.oim import MergedGrid
from edge_tokcomp.variant import most_pairs


def grid(height: int, width: int, seed: int = 0) -> MergedGrid:
    rng = np.random.default_rng(seed)
    return MergedGrid.of(
        rng.standard_normal((height, width, 6)).astype(np.float32),
        rng.standard_normal((height, width, 4)).astype(np.float32),
    )


def slow_rows(cells: list[list[list[int]]], keys: np.ndarray, pairs: int, sharing: str) -> list[list[list[int]]]:
    """``cells[row][column]`` lists original cells; returns them with pairs joined."""
    means = [[keys[c].astype(np.float64).mean(axis=0) for c in line] for line in cells]

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    alike = np.array([[cosine(a, b) for a, b in itertools.pairwise(line)] for line in means])
    result = []
    for number, line in enumerate(cells):
        score = alike.sum(axis=0) if sharing == "shared" else alike[number]
        lefts: list[int] = []
        for left in sorted(range(len(score)), key=lambda j: -score[j]):
            if len(lefts) < pairs and all(abs(left - other) > 1 for other in lefts):
                lefts.append(left)
        merged: list[list[int]] = []
        for column, cell in enumerate(line):
            if column - 1 in lefts:
                merged[-1] = merged[-1] + cell
            else:
                merged.append(cell)
        result.append(merged)
    return result


@pytest.mark.parametrize("sharing", ["per-line", "shared"])
@pytest.mark.parametrize("seed", range(4))
def test_passes_equal_merging_pair_by_pair(sharing, seed):
    merged = grid(9, 11, seed)
    start = merged
    cells = [[[r * 11 + c] for c in range(11)] for r in range(9)]
    keys = start.keys.reshape(99, -1)
    for pairs in (3, 2):
        merged = merged.merge_rows(pairs, sharing)
        cells = slow_rows(cells, keys, pairs, sharing)
        merged = merged.merge_columns(pairs, sharing)
        turned = slow_rows([list(column) for column in zip(*cells, strict=True)], keys, pairs, sharing)
        cells = [list(row) for row in zip(*turned, strict=True)]
        assert merged.size.shape == (len(cells), len(cells[0]))
    flat = [cell for line in cells for cell in line]
    for number, cell in enumerate(flat):
        assert sorted(np.flatnonzero(merged.owner == number)) == sorted(cell)
        expected = start.features.reshape(99, -1)[cell].mean(axis=0)
        np.testing.assert_allclose(merged.features.reshape(len(flat), -1)[number], expected, atol=1e-5)
    assert merged.size.ravel().tolist() == [len(cell) for cell in flat]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(["per-line", "shared"]), st.data())
def test_the_grid_stays_a_rectangle_and_mass_and_mean_are_conserved(height, width, sharing, data):
    start = merged = grid(height, width)
    across = data.draw(st.integers(0, most_pairs(width)))
    down = data.draw(st.integers(0, most_pairs(height)))
    merged = merged.merge_rows(across, sharing).merge_columns(down, sharing)
    assert merged.features.shape == (height - down, width - across, 6)
    assert merged.size.sum() == height * width
    assert np.array_equal(np.bincount(merged.owner), merged.size.ravel())
    weighted = (merged.features * merged.size[..., None]).sum(axis=(0, 1)) / merged.size.sum()
    np.testing.assert_allclose(weighted, start.features.mean(axis=(0, 1)), atol=1e-5)
    rebuilt = [start.features.reshape(-1, 6)[merged.owner == cell].mean(axis=0) for cell in range(merged.size.size)]
    np.testing.assert_allclose(rebuilt, merged.features.reshape(-1, 6), atol=1e-5)


def test_24_by_24_with_four_pairs_each_way_is_20_by_20():
    assert grid(24, 24).merge_rows(4).merge_columns(4).size.shape == (20, 20)


def test_shared_pairs_keep_columns_straight_and_lines_of_their_own_may_shear_them():
    start = grid(8, 12, 3)
    straight = start.merge_rows(4, "shared")
    assert np.all(straight.size == straight.size[0])
    assert not np.all(start.merge_rows(4).size == start.merge_rows(4).size[0])


def test_equal_neighbours_merge_first():
    merged = grid(1, 9)
    merged.keys[0, 5] = merged.keys[0, 4] * 3
    assert merged.merge_rows(1).size.tolist() == [[1, 1, 1, 1, 2, 1, 1, 1]]


def test_equal_cells_merge_from_the_left_and_zero_keys_do_no_harm():
    flat = MergedGrid.of(np.ones((2, 10, 3), np.float32), np.zeros((2, 10, 2), np.float32))
    assert flat.merge_rows(3).size.tolist() == [[2, 2, 2, 1, 1, 1, 1]] * 2


@pytest.mark.parametrize("length", range(1, 20))
def test_greedy_choice_always_finds_as_many_pairs_as_promised(length):
    for seed in range(20):
        assert grid(3, length, seed).merge_rows(most_pairs(length)).size.shape == (3, length - most_pairs(length))


def test_more_pairs_than_sure_and_grids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="9 pairs of a line of 24: 0 to 8"):
        grid(24, 24).merge_rows(9)
    with pytest.raises(ValueError, match="of one grid"):
        MergedGrid.of(np.ones((2, 3, 4), np.float32), np.ones((3, 2, 4), np.float32))
