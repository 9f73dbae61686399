"""Checkpoints that are missing something, damaged, foreign or hostile: one line each, before memory is taken."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_tokcomp.errors import TokcompError, UnsupportedError
from edge_tokcomp.export import hf_settings
from edge_tokcomp.export.hf_checkpoint import Checkpoint
from edge_tokcomp.export.tower_files import export_tower
from hf_folder import Tensors, changed, edit, write_folder
from hf_vlms import build

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a tiny model, made once."""
    home, made = tmp_path_factory.mktemp("folders"), {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = write_folder(build(name), name, home / name)
        return made[name]

    return folder


def refused(folder: Path, message: str, kind: type[TokcompError] = TokcompError) -> None:
    """``folder`` is refused in one line that names it."""
    with pytest.raises(kind, match=message) as fault:
        export_tower(folder, folder.parent / "tower")
    assert "\n" not in str(fault.value)
    assert str(folder) in str(fault.value)
    assert not (folder.parent / "tower").exists()


def spoilt(folder: Path, tmp_path: Path, **vision: object) -> Path:
    """A copy whose configuration says ``vision`` of its tower."""
    copy = shutil.copytree(folder, tmp_path / "checkpoint")
    edit(copy / "config.json", lambda values: values["vision_config"].update(vision))
    return copy


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llava15", {"model_type": "paligemma"}, "model type 'paligemma' has no tower here; those that have: gemma3, "),
        ("llava15", {"model_type": None}, "model type 'None' has no tower here"),
        ("llava15", {"vision_config": None}, "after 11 blocks, the file holds 4; download the checkpoint again"),
        ("llava15", {"vision_config": [1]}, r"vision_config is \[1\], not an object"),
        ("llava15", {"vision_config": {"model_type": "siglip_vision_model"}}, "'siglip_vision_model' is not supported"),
        ("llava15", {"vision_feature_layer": [-2, -5]}, r"vision_feature_layer \[-2, -5\] is not one of 4 blocks"),
        ("llava15", {"vision_feature_layer": -9}, "vision_feature_layer -9 is not one of 4 blocks"),
        ("llava15", {"vision_feature_select_strategy": "full"}, "'full' is not supported, default is"),
        ("llava_next", {"image_grid_pinpoints": [3, 4]}, "are not heights and widths"),
        ("llava_next", {"image_grid_pinpoints": [[48, "9"]]}, r"\[48, '9'\] are not heights and widths"),
        ("smolvlm", {"scale_factor": "4"}, "scale_factor is '4', not an integer"),
        ("internvl_qwen2", {"downsample_ratio": 0.3}, "downsample_ratio 0.3 is not one in so many"),
        ("internvl_qwen2", {"downsample_ratio": 0}, "downsample_ratio 0.0 is not one in so many"),
        ("mistral3", {"text_config": {"rms_norm_eps": 0.1}}, "text_config.rms_norm_eps 0.1 is not supported, 1e-05 is"),
        ("lfm2vl", {"downsample_factor": 1 << 70}, "1180591620717411303424 patches of 16 do not divide a tile"),
    ],
)
def test_settings_that_make_no_tower_here(
    folders: Callable[[str], Path], tmp_path: Path, name: str, change: dict[str, object], message: str
) -> None:
    copy = shutil.copytree(folders(name), tmp_path / "checkpoint")
    edit(copy / "config.json", lambda values: values.update(change))
    refused(copy, message)


@pytest.mark.parametrize(
    ("name", "vision", "message"),
    [
        ("llava15", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported, quick_gelu or gelu is"),
        ("llava15", {"num_hidden_layers": "4"}, "num_hidden_layers is '4', not an integer"),
        ("llava15", {"num_hidden_layers": 10**9}, "features come after 999999999 blocks, the file holds 4"),
        ("llava15", {"layer_norm_eps": float("nan")}, "layer_norm_eps is nan, not a number"),
        ("llava15", {"patch_size": [8, 4]}, r"patch_size is \[8, 4\], not the side of a square"),
        ("llava15", {"patch_size": 4}, r"tensor v.patch_embd.weight is \(32, 3, 8, 8\), its metadata asks for"),
        ("llava15", {"hidden_size": 64}, r"tensor .* its metadata asks for .*; download the checkpoint again"),
        ("qwen25vl", {"fullatt_block_indexes": [1, 2]}, r"fullatt_block_indexes \[1, 2\] is not every n-th of 4"),
        ("qwen25vl", {"depth": 10**9}, "is not every n-th of 1000000000 blocks"),
        ("qwen25vl", {"rope_parameters": {"rope_theta": 5}}, "rope_theta of its tower is not 10000"),
        ("qwen2vl", {"temporal_patch_size": 4}, "temporal_patch_size 4 is not supported, 2 is"),
        ("qwen3vl", {"deepstack_visual_indexes": [2, 1]}, r"\[2, 1\] does not name some of 5 blocks in order"),
        ("qwen3vl", {"deepstack_visual_indexes": [1, 9]}, r"\[1, 9\] does not name some of 5 blocks in order"),
        ("qwen3vl", {"depth": 10**12}, "does not name some of 1000000000000 blocks in order"),
        ("internvl_qwen2", {"use_mean_pooling": False}, "use_mean_pooling False is not supported, True is"),
        ("pixtral", {"head_dim": 8}, "head_dim 8 is not supported, 16 is"),
    ],
)
def test_settings_of_a_tower_that_cannot_be(
    folders: Callable[[str], Path], tmp_path: Path, name: str, vision: dict[str, object], message: str
) -> None:
    refused(spoilt(folders(name), tmp_path, **vision), message)


def test_a_tower_of_another_kind_is_unsupported_rather_than_damaged(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    refused(spoilt(folders("llava15"), tmp_path, hidden_act="relu"), "not supported", UnsupportedError)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", None, "config.json: cannot be read .No such file or directory.; name a checkpoint's folder"),
        ("config.json", "{", "config.json: not a JSON file"),
        ("config.json", "[]", "config.json: holds no JSON object"),
        ("config.json", '{"a":' * 100_000, "config.json: not a JSON file"),
        ("config.json", "\xff", "config.json: not a JSON file"),
        ("preprocessor_config.json", None, "preprocessor_config.json: image_mean is missing"),
        ("preprocessor_config.json", '{"image_mean": [0, 0, "1"]}', "image_mean is .* not a list of numbers"),
        ("preprocessor_config.json", '{"image_mean": [0, 0, 1e999]}', "image_mean is .* not a list of numbers"),
        ("preprocessor_config.json", '{"image_mean": [0], "image_std": [1, 1, 1]}', "not three numbers"),
    ],
)
def test_files_of_settings_that_are_no_such(
    folders: Callable[[str], Path], tmp_path: Path, file: str, text: str | None, message: str
) -> None:
    copy = shutil.copytree(folders("llava15"), tmp_path / "checkpoint")
    (copy / file).unlink()
    if text is not None:
        (copy / file).write_text(text, encoding="latin-1")
    refused(copy, message)


def test_a_file_of_settings_as_large_as_a_model_is_not_read(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_settings, "_MOST_BYTES", 100)
    refused(shutil.copytree(folders("llava15"), tmp_path / "checkpoint"), "config.json: more than 0 MiB")


def header(text: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + data


HOSTILE = {
    "empty": b"",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "header longer than the file": struct.pack("<Q", 2**60) + b"{}",
    "header that is no JSON": header("{{"),
    "tensor past the end": header('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', bytes(8)),
    "shape of another size": header('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', bytes(4)),
    "size that wraps": header(
        '{"a":{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,0]}}'
    ),
    "more bytes than tensors": header("{}", bytes(64)),
    "pickle": b"\x80\x02}q\x00." + bytes(64),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_files_that_are_no_safetensors(folders: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    copy = shutil.copytree(folders("llava15"), tmp_path / "checkpoint")
    (copy / "model.safetensors").write_bytes(HOSTILE[kind])
    refused(copy, r"model.safetensors: not a whole safetensors file \(.*\); download the checkpoint again")


def test_a_file_cut_off_anywhere(folders: Callable[[str], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders("llava15"), tmp_path / "checkpoint")
    whole = (copy / "model.safetensors").read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        (copy / "model.safetensors").write_bytes(whole[:length])
        refused(copy, "not a whole safetensors file")


def test_no_weights(folders: Callable[[str], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders("llava15"), tmp_path / "checkpoint")
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"PK")
    refused(copy, r"holds no \*.safetensors; name the folder of a Hugging Face checkpoint")
    (copy / "model.safetensors").mkdir()
    refused(copy, "model.safetensors: cannot be read")


def _without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def _with(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: make(tensors[name])}


_Q = "vision_tower.encoder.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llava15", _without(_Q), "tensor v.blk.1.attn_q.weight is missing; download the checkpoint again"),
        ("llava15", _without("multi_modal_projector.linear_2.bias"), "tensor mm.2.bias is missing"),
        ("llava15", lambda tensors: {"a": torch.ones(2)}, "no class token"),
        ("llava15", _with(_Q, lambda value: value[:8]), r"tensor v.blk.1.attn_q.weight is \(8, 32\), its metadata"),
        ("llava15", _with(_Q, lambda value: value.to(torch.int8)), "self_attn.q_proj.weight is of type I8, which"),
        ("llava15", _with(_Q, lambda value: value.to(torch.float8_e4m3fn)), "is of type F8_E4M3, which cannot be read"),
        ("llava15", _with(_Q, lambda value: value * torch.nan), "its weights give no finite numbers"),
        ("llava15", lambda tensors: {**tensors, f"model.{_Q}": torch.ones(2)}, "holds v.blk.1.attn_q.weight twice"),
        ("qwen2vl", lambda tensors: {**tensors, "visual.blocks.0.attention.q_proj.weight": torch.ones(2)},
         "holds v.blk.0.attn_q.weight twice, as visual.blocks.0.att.* and visual.blocks.0.att"),
        ("qwen2vl", _with("visual.patch_embed.proj.weight", lambda value: value[:, :, :1]), "weight.1 is missing"),
        ("qwen2vl", _with("visual.blocks.0.attn.qkv.weight", lambda value: value[:95]), "attn_q.weight is missing"),
        ("lfm2vl", _with("model.vision_tower.embeddings.patch_embedding.weight", lambda value: value[:, :770 - 9]),
         r"tensor v.patch_embd.weight is \(32, 761\), its metadata asks for"),
        ("lfm2vl", _with("model.vision_tower.embeddings.patch_embedding.weight", lambda value: value[:, 0]),
         r"tensor v.patch_embd.weight is \(32,\), its metadata asks for"),
        ("pixtral", _with("language_model.model.embed_tokens.weight", lambda value: value[:300]),
         "token 304 is not among the 300 rows of language_model.model.embed_tokens.weight"),
        ("pixtral", _without("language_model.model.embed_tokens.weight"), "v.token_embd.img_break is missing"),
    ],
)  # fmt: skip
def test_tensors_that_are_missing_or_others(
    folders: Callable[[str], Path], tmp_path: Path, name: str, change: Callable[[Tensors], Tensors], message: str
) -> None:
    refused(changed(folders(name), tmp_path / "checkpoint", change), message)


def _place(values: dict[str, Any], file: str) -> None:
    values["weight_map"] = dict.fromkeys(values["weight_map"], file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: _place(values, "../a.safetensors"), "'../a.safetensors' is no .* beside it"),
        (lambda values: _place(values, ".."), "'..' is no .* beside it"),
        (lambda values: _place(values, 3), "3 is no .* beside it"),
        (lambda values: _place(values, "none.safetensors"), "none.safetensors: cannot be read .No such file"),
        (lambda values: _place(values, "c:\\a.safetensors"), r"'c:.*a.safetensors' is no .* beside it"),
        (lambda values: _place(values, f"{'a' * 5000}.safetensors"), "'aaa.* is no .* beside it"),
        (lambda values: _place(values, "\ud800.safetensors"), r"'\\ud800.safetensors' is no .* beside it"),
        (lambda values: _place(values, "a\0.safetensors"), r"'a\\x00.safetensors' is no .* beside it"),
        (lambda values: _place(values, ["a.safetensors"]), r"\['a.safetensors'\] is no .* beside it"),
        (lambda values: _place(values, "config.json"), "'config.json' is no .* beside it"),
        (lambda values: _place(values, sorted(set(values["weight_map"].values()))[0]), "tensor .* is missing"),
        (lambda values: values.pop("weight_map"), "no class token"),
    ],
)
def test_an_index_that_leads_astray(tmp_path: Path, change: Change, message: str) -> None:
    folder = write_folder(build("llava15"), "llava15", tmp_path / "checkpoint", max_shard_size="60KB")
    edit(folder / "model.safetensors.index.json", change)
    refused(folder, message)


def test_no_tokenizer_has_the_row_break(folders: Callable[[str], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders("pixtral"), tmp_path / "checkpoint")
    for text in (
        json.dumps(
            {"added_tokens": [3, {"id": "304", "content": "[IMG_BREAK]"}, {"id": -1, "content": "[IMG_BREAK]"}]}
        ),
        '{"added_tokens": 3}',
        None,
    ):
        (copy / "tokenizer.json").unlink()
        if text is not None:
            (copy / "tokenizer.json").write_text(text)
        refused(copy, r"none of its tokenizer files has the token \[IMG_BREAK\]; download the checkpoint again")


def test_what_is_needed_to_read_a_checkpoint_is_named(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(TokcompError, match=r"needs safetensors; pip install 'edge-tokcomp\[hf\]'"):
        Checkpoint(folders("llava15"))
