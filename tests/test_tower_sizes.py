"""Pictures of other sizes, and attention keys, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edge_tokcomp.export.mmproj import Mmproj
from edge_tokcomp.export.reference import reference_tower
from edge_tokcomp.export.tower_files import TowerFiles, cached_tower
from edge_tokcomp.tower import Tower
from edge_tokcomp.variant import TowerVariant
from tiny_mmproj import Tiny, write_mmproj

SIZES = [(48, 48), (24, 24), (40, 88), (96, 16), (8, 8), (16, 48), (32, 72)]


def pictures(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).standard_normal((count, 3, height, width), dtype=np.float32)


def by_transformers(tiny: Tiny, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, CLS attention, and the block's keys averaged over heads."""
    keys = []
    hook = tiny.tower.encoder.layers[-2].self_attn.k_proj.register_forward_hook(lambda *call: keys.append(call[2]))
    with torch.no_grad():
        out = tiny.tower(
            torch.from_numpy(pixels), interpolate_pos_encoding=True, output_hidden_states=True, output_attentions=True
        )
    hook.remove()
    heads = keys[0].reshape(*keys[0].shape[:2], tiny.tower.config.num_attention_heads, -1)
    return out.hidden_states[-2].numpy(), out.attentions[-2][:, :, 0, :].numpy(), heads.mean(dim=2).numpy()


def error(found: np.ndarray | None, wanted: np.ndarray) -> float:
    assert found is not None
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_mmproj(tmp_path_factory.mktemp("mmproj") / "m.gguf")


@pytest.fixture(scope="module")
def files(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> TowerFiles:
    return cached_tower(tiny.path, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tower(files: TowerFiles) -> Tower:
    return Tower(files.directory, provider="cpu", threads=1, graph="attention")


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pictures_of_any_size_give_what_transformers_gives(
    tiny: Tiny, tower: Tower, files: TowerFiles, height: int, width: int
) -> None:
    pixels = pictures(2, height, width)
    features, attention, keys = by_transformers(tiny, pixels)
    output = tower.encode(pixels)
    reference = reference_tower(files.spec, Mmproj(tiny.path), pixels, TowerVariant(block=2))
    for found in (output, reference):
        assert error(found.features, features) <= 1e-5
        assert error(found.cls_attention, attention) <= 1e-5
        assert error(found.keys, keys) <= 1e-5
        assert found.owner is None


@pytest.mark.parametrize("side", [24, 40, 51])
def test_a_tower_whose_pictures_leave_a_remainder_takes_those_and_multiples_of_a_patch(
    tmp_path: Path, side: int
) -> None:
    tiny = write_mmproj(tmp_path / "m.gguf", image=51)
    tower = Tower(cached_tower(tiny.path, cache=tmp_path / "cache").directory, provider="cpu", threads=1)
    assert tower.image_size == (51, 51)
    assert (
        error(tower.encode(pictures(1, side, side)).features, by_transformers(tiny, pictures(1, side, side))[0]) < 1e-5
    )
    with pytest.raises(ValueError, match=r"got \(1, 3, 51, 50\)"):
        tower.encode(pictures(1, 51, 50))


def test_at_its_own_size_the_positions_are_the_table_to_the_bit(tiny: Tiny, files: TowerFiles, tmp_path: Path) -> None:
    model = onnx.load(files.directory / "tower.onnx")
    (resize,) = (node for node in model.graph.node if node.op_type == "Resize")
    model.graph.output.append(onnx.helper.make_tensor_value_info(resize.output[0], onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "tower.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "tower.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run([resize.output[0]], {"pixels": pictures(1, 48, 48)})
    table = tiny.tower.state_dict()["embeddings.position_embedding.weight"].numpy()[1:]
    np.testing.assert_array_equal(found[0].reshape(64, 36).T, table)


@pytest.mark.parametrize(("height", "width"), [(0, 8), (8, 12), (49, 48), (4, 4)])
def test_pictures_that_are_no_whole_patches_are_a_programming_fault(tower: Tower, height: int, width: int) -> None:
    with pytest.raises(ValueError, match=r"pixels must be \(B, 3, n\*8, n\*8\)"):
        tower.encode(np.zeros((1, 3, height, width), np.float32))
