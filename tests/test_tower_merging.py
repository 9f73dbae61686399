"""LUVC's merger in the towers of every family: squares of patches as tokens, rotary positions, windows, deepstack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_tokcomp.cli import main
from edge_tokcomp.errors import UsageError
from edge_tokcomp.export.mmproj import Mmproj
from edge_tokcomp.export.reference import reference_tower
from edge_tokcomp.export.tower_files import TowerFiles, cached_tower
from edge_tokcomp.methods import get_method
from edge_tokcomp.tokens import Role
from edge_tokcomp.tower import Precision, Tower, TowerOutput
from edge_tokcomp.variant import Merge, TowerKind, TowerVariant, pieces
from family_proof import Proof, photo
from hf_mmproj import write_mmproj_of
from hf_vlms import build

NAMES = (
    "llava15", "llava_next", "idefics3", "smolvlm", "internvl_qwen2", "gemma3", "qwen2vl", "qwen25vl", "qwen3vl",
    "pixtral", "mistral3", "lfm2vl",
)  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def mmproj(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name = request.param
    return name, write_mmproj_of(build(name), name, tmp_path_factory.mktemp(name) / "m.gguf")


def error(found: np.ndarray | None, wanted: np.ndarray | None) -> float:
    if found is None or wanted is None:
        assert found is None
        assert wanted is None
        return 0.0
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def both(mmproj: Path, files: TowerFiles, grid: tuple[int, int], variant: TowerVariant) -> tuple[TowerOutput, ...]:
    """What the graph and what NumPy make of two pictures."""
    size = [length * files.spec.unit for length in grid]
    pixels = np.random.default_rng(size[0]).standard_normal((2, 3, *size), dtype=np.float32)
    tower = Tower(files.directory, provider="cpu", threads=1)
    return tower.encode(pixels, variant.merges), reference_tower(files.spec, Mmproj(mmproj), pixels, variant)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_merging_export_passes_its_check(mmproj: tuple[str, Path], precision: Precision) -> None:
    files = cached_tower(mmproj[1], precision, kind=TowerKind(True), threads=1)
    assert files.check.exact if precision == "fp32" else files.check.close
    assert files.check.misplaced == 0


@pytest.mark.parametrize(
    ("grid", "share", "method"),
    [
        ((6, 6), 0.6, "luvc"),
        ((5, 9), 0.2, "luvc:first=0.0,passes=4"),
        ((11, 4), 0.5, "luvc:first=0.0,sharing=shared"),
        ((4, 7), 0.3, "luvc:first=0.0,proportional=false"),
    ],
)
def test_one_graph_merges_as_the_numpy_tower_does_whatever_the_size(
    mmproj: tuple[str, Path], grid: tuple[int, int], share: float, method: str
) -> None:
    kind = get_method(method).variant(4, (6, 6), 3).kind
    files = cached_tower(mmproj[1], kind=kind, threads=1)
    spec = files.spec
    wanted = int(share * grid[0] * grid[1])
    variant = get_method(method).variant(wanted, grid, spec.blocks, spec.merge, spec.window_patches)
    found, reference = both(mmproj[1], files, grid, variant)
    rows, columns = variant.final_grid(grid, spec.blocks, spec.merge, spec.window_patches)
    assert rows * columns <= wanted or spec.window is not None
    assert found.features.shape == (2, spec.cls_rows + rows * columns, spec.token_width)
    for ours, theirs in zip(found.owners, reference.owners, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert error(found.features, reference.features) <= 1e-5
    assert error(found.deepstack, reference.deepstack) <= 1e-5
    assert (found.deepstack is None) == (not spec.deepstack)


def test_levels_taken_before_a_merge_are_those_of_the_plain_tower_averaged_over_what_merged(tmp_path: Path) -> None:
    path = write_mmproj_of(build("qwen3vl"), "qwen3vl", tmp_path / "m.gguf")
    merging = cached_tower(path, cache=tmp_path / "cache", kind=TowerKind(True), threads=1)
    plain = cached_tower(path, cache=tmp_path / "cache", threads=1)
    before = [number for number, stack in enumerate(plain.spec.deepstack) if stack.block < plain.spec.blocks - 1]
    pixels = np.random.default_rng(0).standard_normal((1, 3, 6 * plain.spec.unit, 6 * plain.spec.unit), np.float32)
    merge = Merge(plain.spec.blocks - 2, 4, 4)
    found, whole = (
        Tower(files.directory, provider="cpu", threads=1).encode(pixels, merges)
        for files, merges in ((merging, (merge,)), (plain, ()))
    )
    assert found.owner is not None
    assert found.deepstack is not None
    assert whole.deepstack is not None
    side, width = plain.spec.merge, plain.spec.width
    grid = 6 * side
    assert len(before) >= 2
    for level in before:
        part = slice(level * plain.spec.token_width, (level + 1) * plain.spec.token_width)
        patches = whole.deepstack[0, :, part].reshape(6, 6, side, side, width).swapaxes(1, 2).reshape(grid**2, width)
        cells = np.stack([patches[found.owner[0] == cell].mean(axis=0) for cell in range((grid - 4) ** 2)])
        tokens = cells.reshape(4, side, 4, side, width).swapaxes(1, 2).reshape(16, -1)
        assert error(found.deepstack[0, :, part], tokens) <= 1e-5


def test_windows_hold_the_patches_they_held_and_a_patch_is_left_in_each(tmp_path: Path) -> None:
    path = write_mmproj_of(build("qwen25vl"), "qwen25vl", tmp_path / "m.gguf")
    files = cached_tower(path, cache=tmp_path / "cache", kind=TowerKind(True), threads=1)
    spec, grid = files.spec, (7, 10)
    side = spec.window_patches
    assert side is not None
    patches = tuple(length * spec.merge for length in grid)
    variant = get_method("luvc").variant(1, grid, spec.blocks, spec.merge, side)
    left = variant.final_grid(grid, spec.blocks, spec.merge, side)
    assert left == tuple(-(-len(pieces(length, side)) // spec.merge) for length in patches)
    owner = both(path, files, grid, variant)[0].owner
    assert owner is not None
    row, column = np.divmod(np.arange(patches[0] * patches[1]), patches[1])
    windows = np.stack([row // side, column // side], axis=1)
    for picture in owner:
        for cell in range(left[0] * left[1] * spec.merge**2):
            assert len(np.unique(windows[picture == cell], axis=0)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_fewer_tokens_come_out_of_every_crop_and_answers_come_of_them(name: str, tmp_path: Path) -> None:
    proof = Proof.make(name, tmp_path)
    picture = photo(61, 133)
    with proof.open() as vlm:
        whole = vlm.see(picture).tokens
    with proof.open(method="luvc", keep=0.5) as vlm:
        encoded = vlm.encode(picture)
        layout = encoded.tokens.layout
        assert layout.before == whole.layout.before
        assert len(encoded.plan) <= (whole.layout.before + 1) // 2  # separators count
        for left, own, owner in zip(layout.grids, whole.layout.grids, encoded.owner or (), strict=True):
            assert left[0] * left[1] <= max(0.5 * own[0] * own[1] + 0.5, 1)
            assert len(owner) == own[0] * own[1] * vlm.engine.spec.merge**2
            assert len(np.unique(owner)) == left[0] * left[1] * vlm.engine.spec.merge**2
        if name in ("pixtral", "mistral3"):  # a break after every row but the last
            ((rows, columns),) = layout.grids
            assert np.flatnonzero(layout.role == Role.SEPARATOR).tolist() == [
                columns + row * (columns + 1) for row in range(rows - 1)
            ]
        if vlm.engine.positions == "grid":
            ((rows, columns),) = layout.grids
            cells = np.divmod(np.arange(rows * columns), columns)
            np.testing.assert_array_equal(encoded.rows.positions[1:3], cells)
            assert encoded.rows.advance == max(rows, columns)
        if vlm.engine.spec.deepstack:
            assert encoded.rows.embeddings.shape[1] == vlm.engine.row_width > vlm.model.n_embd
        answer = vlm.answer(encoded, "what is this", max_tokens=3)
        assert answer.tokens_after == len(encoded.plan)
        assert isinstance(vlm.caption(picture, max_tokens=3), str)
    picture.save(tmp_path / "a.png")
    files = ["--lm", str(proof.lm), "--mmproj", str(proof.mmproj), "--ctx", "1024"]
    drawn = ["--method", "luvc", "--keep", "0.5", "--out", str(tmp_path / "b.png")]
    assert main(["inspect", str(tmp_path / "a.png"), *files, *drawn]) == 0
    assert np.asarray(Image.open(tmp_path / "b.png")).std() > 0


def test_pictures_of_all_sizes_and_budgets_go_through_one_session(tmp_path: Path) -> None:
    proof = Proof.make("qwen25vl", tmp_path)
    with proof.open(method="luvc", keep=9) as vlm:
        for size in ((60, 60), (300, 120), (90, 400), (56, 56)):
            assert len(vlm.encode(photo(*size)).plan) <= 9
        tower = vlm.engine.tower
        vlm.compress(vlm.see(photo(90, 90)), get_method("luvc"), 0.3)
        assert vlm.engine._towers == {TowerKind(True): tower}


def test_crops_of_several_sizes_merge_each_to_its_share(tmp_path: Path) -> None:
    proof = Proof.make("lfm2vl", tmp_path)
    with proof.open(method="luvc", keep=0.3) as vlm:
        for picture in (photo(1000, 700), photo(64, 48)):
            encoded = vlm.encode(picture)
            own = vlm.engine.pixels(picture).grids
            for left, grid in zip(encoded.tokens.layout.grids, own, strict=True):
                assert 0.15 <= left[0] * left[1] / (grid[0] * grid[1]) <= 0.3
        assert encoded.variant.further == ()
    with proof.open(method="luvc", keep=100) as vlm:
        assert len(vlm.encode(photo(1000, 700)).plan) <= 100


def test_lower_resolution_of_crops_of_several_sizes_is_refused(tmp_path: Path) -> None:
    proof = Proof.make("lfm2vl", tmp_path)
    with pytest.raises(UsageError, match="method resolution runs the tower on crops of one size, and lfm2vl cuts"):
        proof.open(method="resolution", keep=0.5)


def test_merges_that_leave_a_part_of_a_token_are_refused() -> None:
    with pytest.raises(UsageError, match="leave 8 x 7 patches leave no whole tokens of 2 x 2"):
        TowerVariant(merges=(Merge(0, 1, 0),)).final_grid((4, 4), 3, 2)
