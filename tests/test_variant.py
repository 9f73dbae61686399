"""What can be asked of a tower, and what cannot."""

from __future__ import annotations

from typing import Any

import pytest

from edge_tokcomp.errors import UsageError
from edge_tokcomp.variant import PLAIN, Merge, TowerKind, TowerVariant, pieces, shrinking, spread


def test_merges_shrink_the_grid_one_after_another() -> None:
    variant = TowerVariant(merges=(Merge(7, 8, 8), Merge(7, 0, 3), Merge(11, 5, 0)))
    assert variant.final_grid((24, 24), 23) == (13, 11)
    assert TowerVariant((12, 30), variant.merges[2:]).final_grid((24, 24), 23) == (12, 25)
    assert PLAIN.final_grid((24, 16), 1) == (24, 16)


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ((Merge(0, 9, 0),), "after block 0: 9 pairs in a row of 24 patches; at most 8 can be merged at once"),
        ((Merge(0, 8, 0), Merge(1, 0, 6)), "after block 1: 6 pairs in a column of 16 patches; at most 5"),
        ((Merge(22, 1, 1),), "after block 22: of 23 blocks, 0 to 21 have one after them"),
        ((Merge(400, 1, 1),), "after block 400: of 23 blocks, 0 to 21"),
    ],
)
def test_a_merge_that_the_tower_cannot_do_is_named(merges: tuple[Merge, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TowerVariant(merges=merges).final_grid((16, 24), 23)


def test_a_tower_of_one_block_merges_nothing() -> None:
    with pytest.raises(UsageError, match="of 1 blocks, none has one after it"):
        TowerVariant(merges=(Merge(0, 1, 1),)).final_grid((16, 24), 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Merge(-1, 1, 1), "block must be an integer from 0, got -1"),
        (lambda: Merge(1, 1.0, 1), "rows must be an integer from 0, got 1.0"),  # type: ignore[arg-type]
        (lambda: Merge(1, 1, True), "columns must be an integer from 0, got True"),
        (lambda: Merge(3, 0, 0), "after block 3: no pairs asked for"),
        (lambda: TowerVariant((0, 24)), r"grid must be .* got \(0, 24\)"),
        (lambda: TowerVariant((24, 4000)), r"each 1 to 1024, got \(24, 4000\)"),
        (lambda: TowerVariant((24,)), r"grid must be .* got \(24,\)"),  # type: ignore[arg-type]
        (lambda: TowerVariant(merges=(Merge(4, 1, 1), Merge(2, 1, 1))), "in the order of their blocks, got 4, 2"),
        (lambda: TowerVariant(sharing="all"), "unknown sharing 'all'; one of per-line, shared"),  # type: ignore[arg-type]
    ],
)
def test_values_that_cannot_be_meant_are_usage_errors(wrong: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        wrong()


def test_one_graph_serves_all_merges_and_the_text_tells_graphs_apart() -> None:
    merges = (Merge(7, 8, 8), Merge(11, 1, 0))
    texts = {
        str(PLAIN.kind): "plain",
        str(TowerVariant((12, 18), sharing="shared").kind): "plain",
        str(TowerVariant(block=3).kind): "plain+block3",
        str(TowerVariant(merges=merges).kind): "merging",
        str(TowerVariant(further=((), merges[:1])).kind): "merging",
        str(TowerVariant(merges=merges, sharing="shared", block=20).kind): "merging+shared+block20",
        str(TowerVariant((12, 18), merges, proportional=False).kind): "merging+unweighted",
    }
    assert list(texts) == list(dict.fromkeys(texts.values()))


def test_a_graph_serves_those_that_ask_for_less() -> None:
    plain, block, merging, shared = (
        TowerKind(), TowerKind(block=2), TowerKind(True), TowerKind(True, sharing="shared"),
    )  # fmt: skip
    assert all(kind.serves(kind) and kind.serves(plain) for kind in (plain, block, merging, shared))
    assert not any(one.serves(other) for one, other in (
        (plain, block), (plain, merging), (merging, block), (merging, shared), (shared, merging),
        (block, TowerKind(block=1)),
    ))  # fmt: skip
    assert TowerKind(True, block=2).serves(block)


def test_crops_of_several_sizes_have_merges_of_their_own() -> None:
    one, other = (Merge(0, 1, 1),), (Merge(0, 2, 1), Merge(1, 0, 1))
    assert [TowerVariant(merges=one).of_crop(number).merges for number in (0, 2)] == [one, one]
    variant = TowerVariant(merges=one, further=(other, ()))
    assert [variant.of_crop(number).merges for number in range(3)] == [one, other, ()]
    assert not variant.usual
    with pytest.raises(UsageError, match="in the order of their blocks, got 1, 0"):
        TowerVariant(further=(other[::-1],))


def test_windows_shrink_each_by_its_share_and_none_is_lost() -> None:
    assert pieces(21, 8) == (8, 8, 5)
    assert pieces(21, None) == (21,)
    assert spread(5, (8, 8, 5)) == (2, 2, 1)
    assert spread(8, (8, 8, 5)) == (3, 3, 2)
    variant = TowerVariant(merges=(Merge(0, 8, 2), Merge(1, 4, 0)))
    assert variant.final_grid((8, 21), 3, window=8) == (6, 9)
    assert list(shrinking(variant.merges, (8, 21), 8)) == [
        ((8,), (8, 8, 5)), ((6,), (5, 5, 3)), ((6,), (3, 4, 2)),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="9 pairs in a row of 21 patches in 3 windows; at most 8 can be merged at on"):
        TowerVariant(merges=(Merge(0, 9, 0),)).final_grid((8, 21), 3, window=8)
