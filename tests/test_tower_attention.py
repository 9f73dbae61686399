"""Attention and keys of a chosen block: what the graphs say of them, which graph runs, and the option ``block``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edge_tokcomp import load
from edge_tokcomp.cli import main
from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.export.mmproj import Mmproj
from edge_tokcomp.export.reference import reference_tower
from edge_tokcomp.export.tower_files import TowerFiles, cached_tower, export_tower
from edge_tokcomp.methods import METHODS, AttentionMethod, get_method
from edge_tokcomp.tower import Tower
from edge_tokcomp.tower_engine import TowerEngine
from edge_tokcomp.variant import PLAIN, Merge, TowerKind, TowerVariant
from family_proof import Proof, photo
from hf_mmproj import write_mmproj_of
from hf_vlms import build
from tiny_mmproj import Tiny, write_mmproj


def pictures(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).standard_normal((count, 3, height, width), dtype=np.float32)


def error(found: np.ndarray | None, wanted: np.ndarray) -> float:
    assert found is not None
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def opened(files: TowerFiles) -> Tower:
    return Tower(files.directory, provider="cpu", threads=1, graph=files.graph)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_mmproj(tmp_path_factory.mktemp("mmproj") / "m.gguf")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    return Proof.make("gemma3", tmp_path_factory.mktemp("gemma"))


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 88)])
def test_a_blocks_cls_attention_and_keys_are_those_of_transformers(
    tiny: Tiny, cache: Path, block: int, height: int, width: int
) -> None:
    pixels = pictures(2, height, width)
    caught = []
    layers = tiny.tower.encoder.layers
    hook = layers[block].self_attn.k_proj.register_forward_hook(lambda *call: caught.append(call[2]))
    with torch.no_grad():
        out = tiny.tower(torch.from_numpy(pixels), interpolate_pos_encoding=True, output_attentions=True)
    hook.remove()
    heads = caught[0].reshape(*caught[0].shape[:2], tiny.tower.config.num_attention_heads, -1)
    files = cached_tower(tiny.path, cache=cache, kind=TowerKind(block=block))
    reference = reference_tower(files.spec, Mmproj(tiny.path), pixels, TowerVariant(block=block))
    for found in (opened(files).encode(pixels), reference):
        assert error(found.cls_attention, out.attentions[block][:, :, 0, :].numpy()) <= 1e-5
        assert error(found.keys, heads.mean(dim=2).numpy()) <= 1e-5
        assert found.patches is None


@pytest.mark.parametrize("block", [0, 1, 2])
def test_attention_received_in_a_block_is_that_of_transformers(
    gemma: Proof, tmp_path_factory: pytest.TempPathFactory, block: int
) -> None:
    """Gemma 3's SigLIP has no CLS; squares of patches become tokens."""
    files = cached_tower(gemma.mmproj, threads=1, kind=TowerKind(block=block))
    side, unit = files.spec.image_size, files.spec.merge
    pixels = pictures(1, side, side)
    tower = gemma.model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tower(torch.from_numpy(pixels), output_attentions=True).attentions[block][0].numpy()
    lines = files.spec.grid[0]
    wanted = weights.mean(axis=1).reshape(len(weights), lines, unit, lines, unit).sum(axis=(2, 4))
    for found in (
        opened(files).encode(pixels),
        reference_tower(files.spec, Mmproj(gemma.mmproj), pixels, TowerVariant(block=block)),
    ):
        assert found.patches is not None
        assert error(found.patches.received(0), wanted.reshape(len(weights), -1)) <= 1e-5


@pytest.mark.parametrize("name", ["qwen25vl", "pixtral", "internvl_qwen2", "lfm2vl"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_block_of_other_towers_passes_the_exports_check(tmp_path: Path, name: str, precision: str) -> None:
    mmproj = write_mmproj_of(build(name), name, tmp_path / "m.gguf")
    blocks = cached_tower(mmproj, precision, tmp_path / "cache", threads=1).spec.blocks
    for block in range(blocks):
        files = cached_tower(mmproj, precision, tmp_path / "cache", threads=1, kind=TowerKind(block=block))
        assert files.check.attention > 0
        assert files.check.keys > 0
        assert files.check.exact if precision == "fp32" else files.check.close


def test_what_is_not_asked_for_is_not_in_the_graph_that_runs(tiny: Tiny, tmp_path: Path) -> None:
    plain, usual, other = (
        cached_tower(tiny.path, cache=tmp_path, kind=TowerKind(block=block)) for block in (None, 2, 0)
    )
    graphs = [onnx.load(f.directory / f"{f.graph}.onnx", load_external_data=False).graph for f in (plain, usual, other)]
    assert [{value.name for value in graph.output} for graph in graphs] == [
        {"features"}, {"features", "keys", "cls_attention"}, {"features", "keys", "cls_attention"},
    ]  # fmt: skip
    assert len(graphs[0].node) < len(graphs[1].node)
    assert (plain.directory, plain.graph, usual.graph, other.graph) == (usual.directory, "tower", "attention", "tower")
    data = [files.directory / "tower.onnx.data" for files in (plain, other)]
    assert data[0].samefile(data[1])
    assert all(
        path.stat().st_size < 100_000 for path in (plain.directory / "attention.onnx", other.directory / "tower.onnx")
    )
    assert not (other.directory / "attention.onnx").exists()


def test_the_graph_is_chosen_by_what_the_method_looks_at(gemma: Proof) -> None:
    looking = {"prunesid", "visionzip", "vispruner", "holov", "scope", "tome"}
    only_at_a_cls = {"mosaic", "todre"}
    with load(method="none", threads=1) as demo, gemma.open() as other:
        for vlm, wanted in ((demo, looking | only_at_a_cls), (other, looking)):
            assert isinstance(vlm.engine, TowerEngine)
            found = {name for name in METHODS if vlm.engine.variant(get_method(name), 9).block is not None}
            assert found == wanted
            assert {vlm.engine.variant(get_method(name), 9).block for name in wanted} == {vlm.engine.spec.blocks - 1}
    assert {name for name, cls in METHODS.items() if issubclass(cls, AttentionMethod)} == (
        looking | only_at_a_cls | {"prunesid-paper", "prunesid-qwen"}
    )


@pytest.mark.parametrize("method", ["visionzip", "tome", "scope", "prunesid-paper:score=cls"])
@pytest.mark.parametrize("block", [0, 2, -1, -2])
def test_the_option_reaches_the_method(gemma: Proof, method: str, block: int) -> None:
    text = f"{method}{',' if ':' in method else ':'}block={block}"
    assert str(get_method(str(get_method(text)))) == str(get_method(text))
    blocks = gemma.spec.blocks
    files = cached_tower(gemma.mmproj, threads=1, kind=TowerKind(block=block % blocks))
    with gemma.open(method=text, keep=4) as vlm:
        encoded = vlm.encode(photo(50, 70))
        assert encoded.variant == TowerVariant(block=block % blocks)
        wanted = opened(files).encode(np.stack(vlm.engine.pixels(encoded.image.picture).crops))
        np.testing.assert_array_equal(encoded.tokens.keys, wanted.keys[0])  # type: ignore[index]
        assert len(encoded.plan) == 4
        assert isinstance(vlm.caption(encoded, max_tokens=2), str)


def test_another_block_gives_another_plan() -> None:
    with load(method="vispruner", keep=32, threads=1) as vlm:
        sample = Path(vlm.lm).parent / "samples" / "scene-3.jpg"
        seen = vlm.see(sample)
        plans = [vlm.compress(seen, get_method("vispruner", block=block), 32).plan.keep for block in (None, -1, -2)]
    np.testing.assert_array_equal(plans[0], plans[1])
    assert not np.array_equal(plans[0], plans[2])


def test_what_was_seen_with_attention_serves_methods_that_look_at_none_and_not_the_reverse() -> None:
    with load(method="vispruner", keep=32, threads=1) as vlm:
        sample = Path(vlm.lm).parent / "samples" / "scene-3.jpg"
        seen = vlm.see(sample)
        assert seen.variant == TowerVariant(block=vlm.engine.spec.blocks - 1)
        assert vlm.compress(seen, get_method("divprune"), 32).tokens is seen.tokens
        vlm.claim(sample)
        assert list(vlm.engine._towers) == [seen.variant.kind]  # no second session for what this one returns too
    with load(method="divprune", keep=32, threads=1) as vlm:
        seen = vlm.see(sample)
        assert (seen.variant, seen.tokens.attention, seen.tokens.keys) == (PLAIN, None, None)
        assert vlm.compress(seen, get_method("tome"), 32).tokens.keys is not None


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("visionzip:block=3", r"block 3: this tower runs 3 blocks, 0 to 2, or -3 to -1 counted from the last"),
        ("tome:block=-4", r"block -4: this tower runs 3 blocks, 0 to 2, or -3 to -1"),
        ("mosaic:block=1", r"method mosaic:block=1: of this tower, which has no class token, .*; leave block out"),
        ("prunesid:score=projection,block=1", r"prunesid:.*block=1.*: with these options it looks at no .*; leave"),
        ("divprune:block=1", r"method divprune has no option 'block'"),
        ("tome:block=last", r"tome: block must be a whole number or none, got 'last'"),
    ],
)
def test_blocks_that_cannot_be_looked_at(gemma: Proof, method: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as fault:
        gemma.open(method=method, keep=4)
    assert "\n" not in str(fault.value)


def test_llama_cpps_tower_and_arrays_have_no_blocks(
    gemma: Proof, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        gemma.open(engine="mtmd", method="tome:block=-2", keep=4) as vlm,
        pytest.raises(
            UsageError, match=r"tome:block=-2: the block is of our own towers, .* \(gemma3\); leave"
        ) as fault,
    ):
        vlm.encode(photo(50, 70))
    assert "\n" not in str(fault.value)
    np.savez(tmp_path / "a.npz", features=np.ones((9, 4), np.float32))
    assert main(["compress", str(tmp_path / "a.npz"), "--method", "tome:block=1", "--keep", "3", "--out", "b.npz"]) == 2
    assert "these rows have left it; leave block out" in capsys.readouterr().err


def test_an_exported_directory_tells_of_the_usual_block(tiny: Tiny, tmp_path: Path) -> None:
    export_tower(tiny.path, tmp_path / "tower")
    assert cached_tower(tmp_path / "tower", kind=TowerKind(block=2)).graph == "attention"
    with pytest.raises(UsageError, match=r"of block 2 only, not of block 0; name the mmproj file, or leave block out"):
        cached_tower(tmp_path / "tower", kind=TowerKind(block=0))
    with pytest.raises(UsageError, match="block 7: this tower runs 3 blocks"):
        cached_tower(tmp_path / "tower", kind=TowerKind(block=7))
    (tmp_path / "tower" / "attention.onnx").unlink()
    with pytest.raises(TokcompError, match="not an exported tower"):
        cached_tower(tmp_path / "tower")


def test_a_block_whose_patches_merge_afterwards_is_refused() -> None:
    with pytest.raises(UsageError, match="merge after block 1: attention is looked at in block 1, which has more"):
        TowerVariant(merges=(Merge(1, 1, 0),), block=1).final_grid((6, 6), 3)
