"""The merger as a graph against the merger in NumPy, and attention that counts what was merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from edge_tokcomp.export.attention import Attention, Sizes
from edge_tokcomp.export.graph import Graph
from edge_tokcomp.export.oim import Merger
from edge_tokcomp.methods.oim import MergedGrid
from edge_tokcomp.variant import Merge, Sharing

D, DK = 12, 5


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def merged_by_graph(
    folder: Path, x: np.ndarray, keys: np.ndarray, grid: tuple[int, int], merges: Sequence[Merge], sharing: Sharing
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """``x`` and sizes after all ``merges``, and the owners after each."""
    with Graph(folder / "merger.onnx") as graph:
        merger = Merger(graph, grid, x.shape[1] - grid[0] * grid[1], sharing)
        rows = graph.input("x", ("batch", x.shape[1], D))
        after, owners = merger.merge(rows, graph.input("keys", ("batch", x.shape[1], DK)), merges)
        graph.output(after, "after", ("batch", "rows", D))
        graph.output(merger.sizes, "sizes", ("batch", "rows"))
        for number, owner in enumerate(owners):
            graph.output(owner, f"owner_{number}", ("batch", grid[0] * grid[1]), TensorProto.INT64)
        graph.save()
    after, sizes, *owners = session(folder / "merger.onnx").run(None, {"x": x, "keys": keys})
    return after, sizes, owners


def merged_by_numpy(
    x: np.ndarray, keys: np.ndarray, grid: tuple[int, int], merges: Sequence[Merge], sharing: Sharing
) -> list[MergedGrid]:
    """One picture without its CLS row, after each of the ``merges``."""
    steps = [MergedGrid.of(x.reshape(*grid, -1), keys.reshape(*grid, -1))]
    for merge in merges:
        steps.append(steps[-1].merge_rows(merge.rows, sharing).merge_columns(merge.columns, sharing))
    return steps[1:]


def random_rows(batch: int, lead: int, grid: tuple[int, int], seed: int, few: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows and keys; with ``few`` there are three different keys, so that nearly every choice is a tie."""
    rng = np.random.default_rng(seed)
    count = lead + grid[0] * grid[1]
    keys = rng.standard_normal((batch, count, DK)).astype(np.float32)
    if few:
        keys = keys[:, :3][:, rng.integers(0, 3, count)]
    return rng.standard_normal((batch, count, D)).astype(np.float32), keys


PLANS = [
    ((9, 11), (Merge(0, 3, 2),)),
    ((9, 11), (Merge(0, 0, 3), Merge(0, 2, 0), Merge(0, 2, 1))),
    ((24, 24), (Merge(0, 8, 8), Merge(0, 5, 5))),
    ((1, 10), (Merge(0, 3, 0), Merge(0, 2, 0))),
    ((5, 1), (Merge(0, 0, 1),)),
    ((2, 2), (Merge(0, 1, 1),)),
]


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("sharing", ["per-line", "shared"])
@pytest.mark.parametrize(("grid", "merges"), PLANS)
def test_the_graph_merges_what_numpy_merges(
    tmp_path: Path, grid: tuple[int, int], merges: tuple[Merge, ...], sharing: Sharing, lead: int, few: bool
) -> None:
    x, keys = random_rows(3, lead, grid, len(merges), few)
    after, sizes, owners = merged_by_graph(tmp_path, x, keys, grid, merges, sharing)
    for picture in range(3):
        steps = merged_by_numpy(x[picture, lead:], keys[picture, lead:], grid, merges, sharing)
        for owner, step in zip(owners, steps, strict=True):
            np.testing.assert_array_equal(owner[picture], step.owner)
        np.testing.assert_array_equal(sizes[picture, lead:], steps[-1].size.ravel())
        np.testing.assert_allclose(after[picture, lead:], steps[-1].features.reshape(-1, D), rtol=0, atol=2e-6)


@pytest.mark.parametrize("sharing", ["per-line", "shared"])
def test_nothing_is_lost_and_the_cls_row_stands_alone(tmp_path: Path, sharing: Sharing) -> None:
    grid = (10, 13)
    x, keys = random_rows(4, 1, grid, 5, False)
    keys[:, 0] = keys[:, 1]  # The CLS is most like the first patch, and still no neighbour of it.
    after, sizes, owners = merged_by_graph(tmp_path, x, keys, grid, [Merge(0, 4, 3), Merge(0, 2, 2)], sharing)
    np.testing.assert_array_equal(after[:, 0], x[:, 0])
    assert np.all(sizes[:, 0] == 1)
    for picture in range(4):
        np.testing.assert_array_equal(np.bincount(owners[-1][picture], minlength=5 * 7), sizes[picture, 1:])
        mean = (after[picture, 1:] * sizes[picture, 1:, None]).sum(axis=0) / 130
        np.testing.assert_allclose(mean, x[picture, 1:].mean(axis=0), atol=1e-6)
        for cell in range(35):
            of_cell = x[picture, 1:][owners[-1][picture] == cell]
            np.testing.assert_allclose(after[picture, 1 + cell], of_cell.mean(axis=0), atol=1e-5)


def test_equal_cells_merge_from_the_left_stay_what_they_are_and_zero_keys_do_no_harm(tmp_path: Path) -> None:
    x = np.full((1, 20, D), np.float32(1 / 3))
    after, sizes, _ = merged_by_graph(
        tmp_path, x, np.zeros((1, 20, DK), np.float32), (2, 10), [Merge(0, 3, 0), Merge(0, 2, 1)], "per-line"
    )
    assert sizes.tolist() == [[8, 6, 2, 2, 2]]
    np.testing.assert_array_equal(after, x[:, :5])


HEADS, WIDTH = 3, 24


def attended(folder: Path, rows: np.ndarray, sizes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Attention of ``rows`` to each other, and the weights of row 0's query."""
    with Graph(folder / "attention.onnx") as graph:
        x = graph.input("x", ("batch", "rows", WIDTH))
        counted = None if sizes is None else Sizes.of(graph, graph.input("sizes", ("batch", "rows")), HEADS, WIDTH)
        query, key = (graph.node("Mul", x, graph.constant(np.full(1, n, np.float32))) for n in (1.5, -1.0))
        attention = Attention(graph, query, key, x, HEADS, WIDTH, counted)
        graph.output(attention.attend(), "attended", ("batch", "rows", WIDTH))
        graph.output(attention.first_row(), "first", ("batch", HEADS, "rows"))
        graph.save()
    inputs = {"x": rows} if sizes is None else {"x": rows, "sizes": sizes}
    found, first = session(folder / "attention.onnx").run(None, inputs)
    return found, first


def test_attention_by_size_equals_attention_to_all_that_was_merged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 9, WIDTH)).astype(np.float32)
    times = np.array([1, 3, 1, 2, 1, 1, 7, 1, 2])
    sizes = np.tile(times.astype(np.float32), (2, 1))
    wanted, wanted_first = attended(tmp_path, np.repeat(rows, times, axis=1), None)
    starts = np.cumsum(times) - times
    found, first = attended(tmp_path, rows, sizes)
    np.testing.assert_allclose(found, wanted[:, starts], atol=1e-5)
    np.testing.assert_allclose(first, np.add.reduceat(wanted_first, starts, axis=2), atol=1e-6)
    unweighted, unweighted_first = attended(tmp_path, rows, None)
    assert np.abs(unweighted - wanted[:, starts]).max() > 0.1
    assert np.abs(unweighted_first - np.add.reduceat(wanted_first, starts, axis=2)).max() > 0.1
