"""The mmproj files of the tiny models: libmtmd, llama.cpp's own reader, makes of them what transformers makes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from numpy.typing import NDArray
from transformers import PreTrainedModel

from hf_features import features, normalized
from hf_mmproj import write_mmproj_of
from hf_vlms import FAMILIES, build
from libmtmd_rows import rows_of
from tiny_models import write_tiny_model

# Architecture of the language model, and a picture (width, height) that neither side resizes.
CASES = {
    "llava15": ("llama", 48, 48), "llava_next": ("llama", 48, 48), "idefics3": ("llama", 128, 64),
    "smolvlm": ("llama", 256, 128), "qwen2vl": ("qwen2vl", 96, 64), "qwen25vl": ("qwen2vl", 168, 140),
    "qwen3vl": ("qwen3vl", 96, 64), "internvl_qwen2": ("qwen2", 64, 32), "internvl_qwen3": ("qwen3", 64, 32),
    "gemma3": ("gemma3", 64, 64), "lfm2vl": ("lfm2", 320, 256), "pixtral": ("llama", 64, 48),
    "mistral3": ("llama", 64, 48),
}  # fmt: skip
CLASS_TOKEN = ("llava15", "llava_next", "internvl_qwen2", "internvl_qwen3")


def picture_of(family: str) -> NDArray[np.uint8]:
    _, width, height = CASES[family]
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(model: PreTrainedModel, family: str, folder: Path) -> list[NDArray[np.float32]]:
    """Tiles as libmtmd encodes them, from a file written of ``model`` into ``folder``."""
    mmproj = write_mmproj_of(model, family, folder / "mmproj.gguf")
    layers = 5 if family == "qwen3vl" else 2  # it takes three deepstack slices
    lm = write_tiny_model(folder / "lm.gguf", CASES[family][0], n_layer=layers).path
    return rows_of(lm, mmproj, picture_of(family), 4 * 64 if family == "qwen3vl" else 64)


def distance(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_every_family_is_compared() -> None:
    assert CASES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", [family for family in CASES if family not in CLASS_TOKEN])
def test_libmtmd_agrees_with_transformers(family: str, tmp_path: Path) -> None:
    model = build(family)
    tiles = encoded(model, family, tmp_path)
    expected = features(model, family, picture_of(family))
    assert len(tiles) == len(expected) + (family in ("idefics3", "smolvlm"))  # and the picture as a whole
    for tile, rows in zip(tiles, expected, strict=False):
        assert distance(tile, rows) < 5e-3


@pytest.mark.parametrize("family", ["internvl_qwen2", "internvl_qwen3"])
def test_libmtmd_gives_internvl_patches_the_position_before_theirs(family: str, tmp_path: Path) -> None:
    model = build(family)
    tiles = encoded(model, family, tmp_path)
    right = features(model, family, picture_of(family))
    table = model.model.vision_tower.embeddings.position_embeddings
    with torch.no_grad():
        table.copy_(table.roll(1, 1))  # the class token stands last, with the last position
    shifted = features(model, family, picture_of(family))
    assert len(tiles) == len(shifted) + 1
    for tile, wrong, rows in zip(tiles, shifted, right, strict=False):
        assert distance(tile, wrong) < 5e-3
        assert distance(tile, rows) > 0.1


@pytest.mark.parametrize("family", ["llava15", "llava_next"])
def test_libmtmd_runs_llava_a_block_short_and_takes_the_class_token_for_a_patch(family: str, tmp_path: Path) -> None:
    model = build(family)
    (tile,) = encoded(model, family, tmp_path)
    tower, pixels = model.model.vision_tower, normalized(family, picture_of(family))[None]
    (right,) = features(model, family, picture_of(family))
    with torch.no_grad():
        table = tower.embeddings.position_embedding.weight
        table.copy_(table.roll(1, 0))  # the class token stands last, with the last position
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-3][0]
        wrong = model.model.multi_modal_projector(torch.cat([hidden[2:], hidden[:1]])).numpy()
    assert distance(tile, wrong) < 5e-3
    assert distance(tile, right) > 0.1


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_takes_the_values_of_the_file(family: str, kind: Kind, tmp_path: Path) -> None:
    model = build(family)
    rounded = contents(write_mmproj_of(model, family, tmp_path / "rounded.gguf", kind=kind))
    again = contents(write_mmproj_of(model, family, tmp_path / "again.gguf"))
    before = contents(write_mmproj_of(build(family), family, tmp_path / "before.gguf"))
    assert rounded.keys() == again.keys() == before.keys()
    precision = 1e-3 if family.startswith("llava") else 0  # its projector is F16 at best
    for name, value in rounded.items():
        np.testing.assert_allclose(again[name], value, rtol=precision, atol=1e-6)
    assert any((before[name] != value).any() for name, value in rounded.items())


def test_seeds_give_models() -> None:
    first, same, other = (build("smolvlm", seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_keys_change_and_tensors_stay_out(tmp_path: Path) -> None:
    def edit(metadata: dict[str, object]) -> None:
        metadata |= {"clip.vision.image_size": 64, "clip.use_gelu": None}

    path = write_mmproj_of(build("gemma3"), "gemma3", tmp_path / "mmproj.gguf", edit=edit, drop=("v.post_ln.bias",))
    reader = gguf.GGUFReader(path)
    assert reader.fields["clip.vision.image_size"].contents() == 64
    assert "clip.use_gelu" not in reader.fields
    assert "v.post_ln.bias" not in contents(path)


def contents(path: Path) -> dict[str, NDArray[np.float32]]:
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}
