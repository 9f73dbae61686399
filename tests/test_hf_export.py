"""Towers of Hugging Face checkpoints: the rows of transformers, and the bytes of the same model's mmproj."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from edge_tokcomp.cli import main
from edge_tokcomp.export.hf_checkpoint import Checkpoint
from edge_tokcomp.export.hf_metadata import metadata_of
from edge_tokcomp.export.hf_settings import Settings
from edge_tokcomp.export.tower_files import TowerFiles, export_tower
from edge_tokcomp.families import FAMILIES as OURS
from edge_tokcomp.families import family_for
from edge_tokcomp.tower import Tower
from hf_features import features, normalized
from hf_folder import Tensors, as_opengvlab, assert_same, changed, edit, renamed, write_folder
from hf_mmproj import write_mmproj_of
from hf_vlms import FAMILIES, Ids, _fill, build

Captured = pytest.CaptureFixture[str]

SIZES = {  # width and height of one crop, which nothing resizes
    "llava15": (48, 48), "llava_next": (48, 48), "idefics3": (32, 32), "smolvlm": (64, 64), "qwen2vl": (96, 64),
    "qwen25vl": (168, 140), "qwen3vl": (96, 64), "internvl_qwen2": (32, 32), "internvl_qwen3": (32, 32),
    "gemma3": (64, 64), "lfm2vl": (320, 256), "pixtral": (64, 48), "mistral3": (64, 48),
}  # fmt: skip


@dataclass
class Case:
    """A model, its checkpoint and the towers of checkpoint and mmproj."""

    name: str
    model: PreTrainedModel
    folder: Path
    files: TowerFiles
    of_mmproj: TowerFiles


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, made = request.param, tmp_path_factory.mktemp(request.param)
    model = build(name)
    mmproj = write_mmproj_of(model, name, made / "mmproj.gguf")  # the model takes the file's rounded values
    folder = write_folder(model, name, made / "checkpoint")
    return Case(name, model, folder, export_tower(folder, made / "tower"), export_tower(mmproj, made / "of-mmproj"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to be spoilt."""
    return write_folder(build("llava15"), "llava15", tmp_path_factory.mktemp("plain") / "checkpoint")


def opened(files: TowerFiles) -> Tower:
    return Tower(files.directory, provider="cpu", threads=1)


def picture_of(name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    width, height = SIZES[name]
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rows_of(files: TowerFiles, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What enters the language model of one crop, with the rows between its rows."""
    tower = opened(files)
    rows = tower.project(tower.encode(normalized(name, picture_of(name)).numpy()[None]).rows(0)[files.spec.cls_rows :])
    if name not in ("pixtral", "mistral3"):
        return rows
    grid = rows.reshape(SIZES[name][1] // files.spec.unit, -1, rows.shape[1])
    line_ends = np.broadcast_to(tower.separator, (len(grid), 1, rows.shape[1]))
    return np.concatenate([grid, line_ends], axis=1).reshape(-1, rows.shape[1])[:-1]


def distance(found: Any, wanted: Any) -> float:
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_every_family_has_a_checkpoint_here() -> None:
    found = set()
    for name, entry in FAMILIES.items():
        config, pixels = (
            Settings(Path(name), values) for values in (entry.config(Ids()).to_dict(), entry.preprocessor)
        )
        found.add(family_for(metadata_of(config, pixels)).name)
    assert found == {family.name for family in OURS}


def test_rows_are_those_of_transformers(case: Case) -> None:
    assert distance(rows_of(case.files, case.name), features(case.model, case.name, picture_of(case.name))[0]) <= 1e-4


def test_features_are_those_of_the_mmproj_to_the_byte(case: Case) -> None:
    assert case.files.spec.family == case.of_mmproj.spec.family
    pixels = normalized(case.name, picture_of(case.name)).numpy()[None]
    ours, theirs = (opened(files).encode(pixels) for files in (case.files, case.of_mmproj))
    for name in ("features", "cls_attention", "keys", "deepstack"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_array_equal(rows_of(case.files, case.name), rows_of(case.of_mmproj, case.name))


def test_names_stand_behind_model_or_do_not(case: Case, tmp_path: Path) -> None:
    parts = "vision_tower|vision_model|visual|multi_modal_projector|connector|image_newline"
    if any(name.startswith(("model.v", "model.multi")) for name in load_file(case.folder / "model.safetensors")):
        patterns = [(rf"^model\.({parts})\b", r"\1"), (r"^model\.language_model\.", "language_model.model.")]
    else:
        patterns = [(rf"^({parts})\b", r"model.\1"), (r"^language_model\.model\.", "model.language_model.")]
    assert_same(Checkpoint(renamed(case.folder, tmp_path / "other", patterns)), Checkpoint(case.folder))


@pytest.mark.parametrize("name", ["llava15", "llava_next", "gemma3", "lfm2vl"])
def test_names_of_published_files(name: str, tmp_path: Path) -> None:
    saved = write_folder(build(name), name, tmp_path / "saved")
    published = renamed(
        saved, tmp_path / "published", [(r"^(model\.)?vision_tower\.", r"\1vision_tower.vision_model.")]
    )
    assert_same(Checkpoint(published), Checkpoint(saved))


def test_internvl_as_opengvlab_publishes_it(tmp_path: Path) -> None:
    saved = write_folder(build("internvl_qwen2"), "internvl_qwen2", tmp_path / "saved")
    assert_same(Checkpoint(as_opengvlab(saved, tmp_path / "published")), Checkpoint(saved))


def test_a_tower_of_rms_norms_and_normalised_keys(tmp_path: Path) -> None:
    entry = FAMILIES["internvl_qwen2"]  # as the large InternVL have it
    config = entry.config(Ids())
    for key, value in (("use_qk_norm", True), ("norm_type", "rms_norm"), ("attention_bias", False)):
        setattr(config.vision_config, key, value)
    model = entry.model(config).float().eval()
    _fill(model, 0)
    folder = write_folder(model, "internvl_qwen2", tmp_path / "checkpoint")
    files = export_tower(folder, tmp_path / "tower")
    assert (files.spec.norm, files.spec.qk_norm, files.spec.qkv_bias) == ("rms", True, False)
    wanted = features(model, "internvl_qwen2", picture_of("internvl_qwen2"))[0]
    assert distance(rows_of(files, "internvl_qwen2"), wanted) <= 1e-4
    assert_same(Checkpoint(as_opengvlab(folder, tmp_path / "published")), Checkpoint(folder))


@pytest.mark.parametrize(("layer", "blocks"), [(None, 3), (-1, 4), ([-2], 3), (2, 2)])
def test_features_are_of_the_layer_that_the_configuration_names(
    plain: Path, tmp_path: Path, layer: object, blocks: int
) -> None:
    folder = shutil.copytree(plain, tmp_path / "checkpoint")
    edit(folder / "config.json", lambda values: values.update(vision_feature_layer=layer))
    source = Checkpoint(folder)
    assert family_for(source.metadata).spec(source.metadata, source.shapes).blocks == blocks


def test_tensors_in_bfloat16_and_in_parts(tmp_path: Path) -> None:
    model = build("mistral3").to(torch.bfloat16)
    parts = write_folder(model, "mistral3", tmp_path / "parts", max_shard_size="40KB")
    assert len(list(parts.glob("*.safetensors"))) > 3
    whole = write_folder(model.float(), "mistral3", tmp_path / "whole")
    assert_same(Checkpoint(parts), Checkpoint(whole))


def test_parts_with_nothing_of_the_tower_need_not_be_there(tmp_path: Path) -> None:
    folder = write_folder(build("llava15"), "llava15", tmp_path / "checkpoint", max_shard_size="60KB")
    wanted = Checkpoint(folder)
    unused = [path for path in folder.glob("*.safetensors") if path not in wanted.files]
    assert unused
    for path in unused:
        path.unlink()
    assert_same(Checkpoint(folder), wanted)


def test_weights_under_any_names_without_an_index(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = {name: value for name, value in tensors.items() if "layers.1." in name}
    save_file(half, folder / "a.safetensors")
    save_file({name: value for name, value in tensors.items() if name not in half}, folder / "b.safetensors")
    assert_same(Checkpoint(folder), Checkpoint(plain))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_are_those_of_the_mmproj(tmp_path: Path, precision: Any) -> None:
    model = build("llava15")
    mmproj = write_mmproj_of(model, "llava15", tmp_path / "mmproj.gguf")
    folder = write_folder(model, "llava15", tmp_path / "checkpoint")
    ours, theirs = (export_tower(source, tmp_path / source.stem / "t", precision) for source in (folder, mmproj))
    for name in ("tower.onnx", "tower.onnx.data", "projector.onnx", "projector.onnx.data"):
        assert (ours.directory / name).read_bytes() == (theirs.directory / name).read_bytes()


def test_the_digest_is_of_settings_and_weights(plain: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return json.loads(
            (export_tower(folder, tmp_path / "towers" / folder.name).directory / "tower.json").read_text()
        )["source_sha256"]

    def nudge(tensors: Tensors) -> Tensors:
        tensors["vision_tower.embeddings.class_embedding"][0] += 1
        return tensors

    same, other = shutil.copytree(plain, tmp_path / "same"), changed(plain, tmp_path / "other", nudge)
    bigger = shutil.copytree(plain, tmp_path / "bigger")
    edit(bigger / "preprocessor_config.json", lambda values: values.update(image_std=[1.0] * 3))
    assert digest(plain) == digest(same)
    assert len({digest(same.rename(tmp_path / "moved")), digest(other), digest(bigger)}) == 3


def test_export_hf_on_the_command_line(plain: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["export", "--hf", str(plain), "--out", str(tmp_path / "tower")]) == 0
    said = capsys.readouterr().err
    assert said.startswith(
        f"{tmp_path / 'tower'}: llava15 tower, fp32, against the source: relative error of features "
    )
    assert json.loads((tmp_path / "tower" / "tower.json").read_text())["source"] == "checkpoint"
    for command, line in (
        (["export", str(plain)], f"{plain}: a folder; name a GGUF file, or a checkpoint's folder with --hf"),
        (["export", "--hf", str(plain / "config.json")], f"--hf {plain / 'config.json'}: not a folder; name that of a "
         "checkpoint, with its config.json"),
        (["export", "--hf", str(tmp_path)], f"{tmp_path / 'config.json'}: cannot be read (No such file or directory); "
         "name a checkpoint's folder"),
    ):  # fmt: skip
        assert main([*command, "--out", str(tmp_path / "new")]) == 2
        assert capsys.readouterr().err == f"edge-tokcomp: {line}\n"
    for command in (["export"], ["export", "m.gguf", "--hf", str(plain)]):
        with pytest.raises(SystemExit):
            main([*command, "--out", str(tmp_path / "new")])
