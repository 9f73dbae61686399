"""Towers that merge: built over the plain tower's weights, and checked against the source."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.export import tower_files
from edge_tokcomp.export.mmproj import Mmproj
from edge_tokcomp.export.reference import reference_tower
from edge_tokcomp.export.tower_files import TowerFiles, cached_tower
from edge_tokcomp.export.vit import write_tower
from edge_tokcomp.tower import Tower, TowerOutput
from edge_tokcomp.variant import PLAIN, Merge, TowerKind, TowerVariant
from tiny_mmproj import Tiny, write_mmproj

MERGES = [
    ((6, 6), TowerVariant(merges=(Merge(0, 1, 2),))),
    ((6, 6), TowerVariant(merges=(Merge(0, 2, 2), Merge(0, 1, 0), Merge(1, 0, 1)), sharing="shared")),
    ((4, 9), TowerVariant(merges=(Merge(0, 2, 1), Merge(1, 2, 0)), proportional=False)),
    ((8, 3), TowerVariant(merges=(Merge(1, 0, 2),))),
    ((6, 6), TowerVariant(merges=(Merge(0, 2, 2),) + 3 * (Merge(1, 1, 1),))),
    ((5, 7), TowerVariant(merges=())),
]
KIND = TowerKind(merging=True)
KINDS = [KIND, TowerKind(True, sharing="shared"), TowerKind(True, proportional=False)]


def opened(files: TowerFiles) -> Tower:
    return Tower(files.directory, provider="cpu", threads=1, graph=files.graph)


def run(
    files: TowerFiles, merges: tuple[Merge, ...] = (), grid: tuple[int, int] = (6, 6), batch: int = 2, seed: int = 0
) -> tuple[np.ndarray, TowerOutput]:
    pixels = np.random.default_rng(seed).standard_normal((batch, 3, 8 * grid[0], 8 * grid[1]), dtype=np.float32)
    return pixels, opened(files).encode(pixels, merges)


def error(found: np.ndarray | None, wanted: np.ndarray | None) -> float:
    assert found is not None
    assert wanted is not None
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_mmproj(tmp_path_factory.mktemp("mmproj") / "m.gguf")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(("grid", "variant"), MERGES)
def test_a_merging_tower_equals_the_source_merged_in_numpy(
    tiny: Tiny, cache: Path, grid: tuple[int, int], variant: TowerVariant
) -> None:
    variant = dataclasses.replace(variant, block=2)
    kind = TowerKind(True, variant.sharing, variant.proportional, 2)
    files = cached_tower(tiny.path, cache=cache, kind=kind)
    pixels, output = run(files, variant.merges, grid, 3)
    wanted = reference_tower(files.spec, Mmproj(tiny.path), pixels, variant)
    height, width = grid
    height -= sum(merge.columns for merge in variant.merges)
    width -= sum(merge.rows for merge in variant.merges)
    assert output.features.shape == (3, 1 + height * width, 64)
    assert len(output.owners) == len(variant.merges)
    for found, owner in zip(output.owners, wanted.owners, strict=True):
        np.testing.assert_array_equal(found, owner)
    assert error(output.features, wanted.features) <= 1e-5
    assert error(output.cls_attention, wanted.cls_attention) <= 1e-5
    assert error(output.keys, wanted.keys) <= 1e-5
    np.testing.assert_allclose(output.cls_attention.sum(-1), 1, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("proportional", [True, False])
def test_merging_equal_patches_changes_nothing_when_later_blocks_attend_by_size(
    tmp_path: Path, proportional: bool
) -> None:
    """Without positions, patches that show the same are the same row in every block."""
    tiny = write_mmproj(tmp_path / "m.gguf", reshape={"v.position_embd.weight": (37, 64)})
    kind = TowerKind(True, proportional=proportional, block=2)
    files = cached_tower(tiny.path, cache=tmp_path / "cache", kind=kind)
    plain = cached_tower(tiny.path, cache=tmp_path / "cache")
    tiles = np.random.default_rng(1).standard_normal((2, 3, 3, 3, 8, 8)).astype(np.float32)
    pixels = np.repeat(np.repeat(tiles, 2, axis=2), 2, axis=3).swapaxes(3, 4).reshape(2, 3, 48, 48)
    merged = opened(files).encode(pixels, (Merge(0, 2, 1),))
    whole = Tower(plain.directory, provider="cpu", threads=1, graph="attention").encode(pixels)
    owner = merged.owner
    assert owner is not None
    assert owner[0].reshape(6, 6)[0].tolist() == [0, 0, 1, 1, 2, 3]
    spread = np.take_along_axis(merged.features[:, 1:], owner[..., None], axis=1)
    worst = np.abs(spread - whole.features[:, 1:]).max()
    summed = np.zeros_like(merged.cls_attention)
    for picture in range(2):
        summed[picture, :, 0] = whole.cls_attention[picture, :, 0]  # type: ignore[index]
        np.add.at(summed[picture].T, 1 + owner[picture], whole.cls_attention[picture, :, 1:].T)  # type: ignore[index]
    apart = np.abs(merged.cls_attention - summed).max()
    if proportional:
        assert worst < 1e-5
        assert apart < 1e-5
    else:
        assert worst > 0.05
        assert apart > 0.005


def test_a_merging_tower_shares_the_plain_towers_weights(tiny: Tiny, tmp_path: Path) -> None:
    merging = cached_tower(tiny.path, cache=tmp_path, kind=KIND)
    plain = cached_tower(tiny.path, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for name in ("tower.onnx.data", "projector.onnx.data", "projector.onnx"):
        assert (merging.directory / name).samefile(plain.directory / name)
    assert not (merging.directory / "tower.onnx").samefile(plain.directory / "tower.onnx")
    assert cached_tower(tiny.path, cache=tmp_path, kind=KIND) == merging
    assert len({cached_tower(tiny.path, cache=tmp_path, kind=kind).directory for kind in KINDS}) == 3


def test_one_that_is_told_to_merge_nothing_is_the_plain_tower(tiny: Tiny, cache: Path) -> None:
    plain, merging = (cached_tower(tiny.path, cache=cache, kind=kind) for kind in (PLAIN.kind, KIND))
    for grid in ((6, 6), (3, 5)):
        wanted, found = (run(files, grid=grid)[1] for files in (plain, merging))
        assert wanted.features.shape == (2, 1 + grid[0] * grid[1], 64)
        assert error(found.features, wanted.features) <= 1e-6
        assert found.owner is None
        assert wanted.owner is None
    with pytest.raises(ValueError, match="this graph merges nothing"):
        run(plain, (Merge(0, 1, 0),))
    with pytest.raises(ValueError, match=r"merges after blocks \[2\] of 3"):
        run(merging, (Merge(2, 1, 0),))
    with pytest.raises(UsageError, match="3 pairs in a row of 6 patches; at most 2"):
        run(merging, (Merge(0, 3, 0),))


def test_weights_are_copied_where_the_disk_has_no_links(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    files = cached_tower(tiny.path, cache=tmp_path, kind=KIND)
    assert (files.directory / "tower.onnx.data").stat().st_nlink == 1
    assert run(files, (Merge(0, 1, 2),))[1].features.shape == (2, 21, 64)


def test_a_damaged_weight_file_is_replaced_for_both(tiny: Tiny, tmp_path: Path) -> None:
    files = cached_tower(tiny.path, cache=tmp_path, kind=KIND)
    wanted = run(files)[1].features
    damaged = files.directory / "tower.onnx.data"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 0x40
    damaged.write_bytes(data)
    again = cached_tower(tiny.path, cache=tmp_path, kind=KIND)
    assert again == files
    np.testing.assert_array_equal(run(again)[1].features, wanted)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("grid", "variant"), MERGES[:3])
def test_int8_towers_merge_too(tiny: Tiny, cache: Path, grid: tuple[int, int], variant: TowerVariant) -> None:
    files = cached_tower(tiny.path, "int8", cache, kind=variant.kind)
    plain = cached_tower(tiny.path, "int8", cache)
    assert (files.directory / "tower.onnx.data").samefile(plain.directory / "tower.onnx.data")
    assert files.left_in_fp32 == plain.left_in_fp32
    assert files.check.cosine >= 0.999
    pixels, output = run(files, variant.merges, grid)
    wanted = reference_tower(files.spec, Mmproj(tiny.path), pixels, variant, output.owners, slack=4.0)
    for found, owner in zip(output.owners, wanted.owners, strict=True):
        np.testing.assert_array_equal(found, owner)
    assert error(output.features, wanted.features) < 0.05


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (TowerKind(True, sharing="shared"), r"differs from the source .* elsewhere [1-9]"),
        (TowerKind(True, proportional=False), r"differs from the source .* elsewhere 0\.0%"),
    ],
)
def test_a_merging_tower_that_differs_from_its_source_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: TowerKind, message: str
) -> None:
    def twisted(
        spec: Any, source: Any, path: Path, int8: Any, kind: Any = PLAIN.kind, weights: Any = None, half: Any = False
    ) -> None:
        write_tower(spec, source, path, int8, other if kind.merging else kind, weights, half)

    monkeypatch.setattr(tower_files, "write_tower", twisted)
    with pytest.raises(TokcompError, match=message) as fault:
        cached_tower(tiny.path, cache=tmp_path, kind=KIND)
    assert "(merging) differs" in str(fault.value)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_patch_said_to_be_elsewhere_is_a_difference_even_if_the_numbers_agree(tiny: Tiny, cache: Path) -> None:
    check = cached_tower(tiny.path, cache=cache, kind=KIND).check
    assert check.exact
    assert check.close
    assert not dataclasses.replace(check, misplaced=0.1).exact
    assert not dataclasses.replace(check, misplaced=0.1).close
    assert not dataclasses.replace(check, keys=1e-3).exact


def test_choices_that_noise_decides_are_followed_and_others_are_not(tiny: Tiny, cache: Path) -> None:
    _, variant = MERGES[1]
    files = cached_tower(tiny.path, cache=cache, kind=variant.kind)
    pixels, output = run(files, variant.merges, seed=3)
    source = Mmproj(tiny.path)
    own = reference_tower(files.spec, source, pixels, variant)
    flipped = tuple(np.roll(owner, 1, axis=0) for owner in output.owners)  # each picture as the other one merges
    assert not np.array_equal(flipped[0], own.owners[0])
    strict = reference_tower(files.spec, source, pixels, variant, flipped, slack=1e-4)
    lenient = reference_tower(files.spec, source, pixels, variant, flipped, slack=4.0)
    for number, owner in enumerate(own.owners):
        np.testing.assert_array_equal(strict.owners[number], owner)
        np.testing.assert_array_equal(lenient.owners[number], flipped[number])


def test_rounding_that_decides_a_merge_does_not_count_against_an_export(tmp_path: Path) -> None:
    """On nearly uniform pictures without positions, cosines lie closer together than rounding moves them."""
    tiny = write_mmproj(tmp_path / "m.gguf", reshape={"v.position_embd.weight": (37, 64)})
    files, (_, variant) = cached_tower(tiny.path, cache=tmp_path / "cache", kind=KIND), MERGES[0]
    noise = np.random.default_rng(0).standard_normal((40, 3, 48, 48))
    pixels = (0.5 + 1e-5 * noise).astype(np.float32)
    output = opened(files).encode(pixels, variant.merges)
    wanted = reference_tower(files.spec, Mmproj(tiny.path), pixels, variant, output.owners, slack=1e-4)
    np.testing.assert_array_equal(output.owner, wanted.owner)
    assert error(output.features, wanted.features) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "message"), [(KIND, "merges between blocks, and this tower has 1"), (TowerKind(block=9), "runs 3 blocks")]
)
def test_kinds_that_cannot_be_are_refused_before_anything_is_built(
    tiny: Tiny, tmp_path: Path, kind: TowerKind, message: str
) -> None:
    tiny = write_mmproj(tmp_path / "m.gguf", layers=[1]) if kind.merging else tiny
    with pytest.raises(UsageError, match=message):
        cached_tower(tiny.path, cache=tmp_path / "cache", kind=kind)
    assert not kind.merging or not (tmp_path / "cache").exists()


def test_the_description_names_the_kind(tiny: Tiny, cache: Path) -> None:
    files = cached_tower(tiny.path, cache=cache, kind=KINDS[2])
    described = json.loads((files.directory / "tower.json").read_text(encoding="utf-8"))
    assert described["kind"] == "merging+unweighted"
    assert described["check"]["misplaced"] == 0
