"""The merger as a graph against the merger in NumPy, and attention that counts what was merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from edge_tokcomp.export.attention import Attention, Sizes
from edge_tokcomp.export.graph import Graph
from edge_tokcomp.export.oim import Merger, Pairs
from edge_tokcomp.export.patches import Grid
from edge_tokcomp.methods.oim import MergedGrid
from edge_tokcomp.variant import Merge, Sharing, shrinking, spread

D, DK = 12, 5


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def merged_by_graph(
    folder: Path, x: np.ndarray, keys: np.ndarray, grid: tuple[int, int], merges: Sequence[Merge], sharing: Sharing,
    window: int | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """``after``, what becomes of ``x`` and, ``beside`` it, of the same again; ``sizes``, ``positions``; ``owners``."""
    with Graph(folder / "merger.onnx") as graph:
        rows, by = (graph.input(name, ("batch", "rows", width)) for name, width in (("x", D), ("keys", DK)))
        size = [graph.input(name, (1,), TensorProto.INT64) for name in ("height", "width")]
        patches = Grid(graph, graph.node("Shape", rows, start=0, end=1), *size, 1)
        lead = x.shape[1] - grid[0] * grid[1]
        merger = Merger(graph, patches, lead, sharing, window, Pairs.of(graph, 1))
        after, beside = merger.merge(0, by, [rows, graph.node("Neg", rows)])
        graph.output(after, "after", ("batch", "rows", D))
        graph.output(beside, "beside", ("batch", "rows", D))
        graph.output(merger.state.sizes, "sizes", ("batch", "rows"))
        graph.output(merger.positions, "positions", ("batch", "rows", 2))
        graph.output(merger.state.owners, "owners", ("all", "batch", "patches"), TensorProto.INT64)
        graph.save()
    before = list(shrinking(merges, grid, window))
    inputs: dict[str, Any] = {
        "x": x, "keys": keys, "height": np.array(grid[:1]), "width": np.array(grid[1:]),
        "merges": np.array([len(merges)]),
        "pairs_down": [spread(m.columns, down) for m, (down, _) in zip(merges, before, strict=False)],
        "pairs_across": [spread(m.rows, across) for m, (_, across) in zip(merges, before, strict=False)],
    }  # fmt: skip
    for name, pieces in (("pairs_down", before[0][0]), ("pairs_across", before[0][1])):
        inputs[name] = np.array(inputs[name], np.int64).reshape(len(merges), len(pieces))
    names = ["after", "beside", "sizes", "positions", "owners"]
    return dict(zip(names, session(folder / "merger.onnx").run(names, inputs), strict=True))


def merged_by_numpy(
    x: np.ndarray, keys: np.ndarray, grid: tuple[int, int], merges: Sequence[Merge], sharing: Sharing,
    window: int | None = None,
) -> list[MergedGrid]:  # fmt: skip
    """One picture without its CLS row, after each of the ``merges``."""
    steps = [MergedGrid.of(x.reshape(*grid, -1), keys.reshape(*grid, -1), window)]
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
    ((9, 11), None, (Merge(0, 3, 2),)),
    ((9, 11), None, (Merge(0, 0, 3), Merge(0, 2, 0), Merge(0, 2, 1))),
    ((24, 24), None, (Merge(0, 8, 8), Merge(0, 5, 5))),
    ((1, 10), None, (Merge(0, 3, 0), Merge(0, 2, 0))),
    ((5, 1), None, (Merge(0, 0, 1),)),
    ((2, 2), None, (Merge(0, 1, 1),)),
    ((9, 11), 4, (Merge(0, 3, 2), Merge(0, 2, 0), Merge(0, 2, 1))),
    ((5, 12), 8, (Merge(0, 4, 2), Merge(0, 3, 0))),
    ((6, 4), 2, (Merge(0, 2, 3),)),
    ((3, 7), 1, ()),
]


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("sharing", ["per-line", "shared"])
@pytest.mark.parametrize(("grid", "window", "merges"), PLANS)
def test_the_graph_merges_what_numpy_merges(
    tmp_path: Path, grid: tuple[int, int], window: int | None, merges: tuple[Merge, ...], sharing: Sharing, lead: int,
    few: bool,
) -> None:  # fmt: skip
    x, keys = random_rows(3, lead, grid, len(merges), few)
    found = merged_by_graph(tmp_path, x, keys, grid, merges, sharing, window)
    np.testing.assert_array_equal(found["beside"], -found["after"])
    assert len(found["owners"]) == len(merges)
    for picture in range(3 if merges else 0):
        steps = merged_by_numpy(x[picture, lead:], keys[picture, lead:], grid, merges, sharing, window)
        for owner, step in zip(found["owners"], steps, strict=True):
            np.testing.assert_array_equal(owner[picture], step.owner)
        np.testing.assert_array_equal(found["sizes"][picture, lead:], steps[-1].size.ravel())
        wanted = steps[-1].features.reshape(-1, D)
        np.testing.assert_allclose(found["after"][picture, lead:], wanted, rtol=0, atol=2e-6)
        for cell, position in enumerate(found["positions"][picture, lead:]):
            of_cell = np.argwhere(steps[-1].owner.reshape(grid) == cell)
            np.testing.assert_allclose(position, of_cell.mean(axis=0), rtol=1e-6)
            assert window is None or len({tuple(place // window) for place in of_cell}) == 1
    if not merges:
        np.testing.assert_array_equal(found["after"], x)


@pytest.mark.parametrize("sharing", ["per-line", "shared"])
def test_nothing_is_lost_and_the_cls_row_stands_alone(tmp_path: Path, sharing: Sharing) -> None:
    grid = (10, 13)
    x, keys = random_rows(4, 1, grid, 5, False)
    keys[:, 0] = keys[:, 1]  # The CLS is most like the first patch, and still no neighbour of it.
    found = merged_by_graph(tmp_path, x, keys, grid, [Merge(0, 4, 3), Merge(0, 2, 2)], sharing)
    after, sizes, owners = (found[name] for name in ("after", "sizes", "owners"))
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
    found = merged_by_graph(
        tmp_path, x, np.zeros((1, 20, DK), np.float32), (2, 10), [Merge(0, 3, 0), Merge(0, 2, 1)], "per-line"
    )
    assert found["sizes"].tolist() == [[8, 6, 2, 2, 2]]
    np.testing.assert_array_equal(found["after"], x[:, :5])


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
