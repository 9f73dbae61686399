"""An exported directory in place of the mmproj."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pair

from edge_tokcomp import VLM, load
from edge_tokcomp.cli import main
from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.export import tower_files
from edge_tokcomp.export.tower_files import cached_tower, export_tower
from edge_tokcomp.parameters import hash_of_model
from family_proof import Proof, assert_same_rows, assert_same_text, photo
from hf_folder import write_folder
from hf_mmproj import write_mmproj_of
from hf_vlms import build
from picture_files import pictures
from tiny_mmproj import write_mmproj
from tiny_models import write_tiny_model

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def directory(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tower(pair.mmproj, tmp_path_factory.mktemp("towers") / "tower").directory


def opened(pair: Pair, mmproj: Path, **options: object) -> VLM:
    return load(pair.lm, mmproj, threads=1, provider="cpu", **options)


def test_a_directory_says_what_its_file_says(pair: Pair, directory: Path) -> None:
    picture = photo(50, 40)
    with opened(pair, pair.mmproj, keep=9) as vlm:
        wanted, hashed = vlm.ask(picture, "what is this", max_tokens=5), hash_of_model(vlm)
    with opened(pair, directory, keep=9) as vlm:
        assert vlm.ask(picture, "what is this", max_tokens=5) == wanted
        assert vlm.engine.directory == directory
        first = hash_of_model(vlm)
    assert first != hashed
    with opened(pair, shutil.copytree(directory, directory.parent / "copy"), keep=9) as vlm:
        assert hash_of_model(vlm) == first


def test_the_tower_of_a_checkpoint_answers_as_transformers_does(tmp_path: Path) -> None:
    proof = Proof.make("qwen3vl", tmp_path)
    theirs = proof.asked([photo(70, 90)], "q")
    wanted = proof.model.get_image_features(theirs["pixel_values"], theirs["image_grid_thw"])
    folder = write_folder(proof.model, "qwen3vl", tmp_path / "checkpoint")
    proof.mmproj = export_tower(folder, tmp_path / "tower").directory
    assert_same_text(proof, [photo(70, 90)])
    levels = [torch.cat([*level]) for level in (wanted.pooler_output, *wanted.deepstack_features)]
    assert_same_rows(proof, photo(70, 90), torch.cat(levels, 1).detach().numpy())


def test_captions_of_a_directory_from_the_command_line(
    pair: Pair, directory: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(tmp_path / "pictures", 2)
    monkeypatch.chdir(directory)
    options = ["--lm", str(pair.lm), "--mmproj", ".", "--threads", "1", "--provider", "cpu"]
    out = tmp_path / "captions.jsonl"
    command = ["caption", str(folder), *options, "--max-tokens", "3", "--out", str(out)]
    assert main(command) == 0
    assert len(out.read_text().splitlines()) == 2
    assert main(["calibrate", str(folder), *options]) == 0
    assert main([*command, "--overwrite", "--keep", "9", "--dynamic", "calibrated"]) == 0


def test_a_directory_has_one_precision(pair: Pair, directory: Path) -> None:
    with pytest.raises(UsageError, match=rf"^{directory}: a tower of precision fp32, not int8; ask for precision fp32"):
        opened(pair, directory, precision="int8")


def test_patches_are_not_merged_in_a_tower_that_is_built(pair: Pair, directory: Path) -> None:
    with pytest.raises(UsageError, match=rf"^{directory}: patches cannot be merged .*; name the mmproj file"):
        opened(pair, directory, method="luvc", keep=16)


def test_pictures_of_lower_resolution_need_no_file(pair: Pair, directory: Path) -> None:
    with opened(pair, directory, method="resolution", keep=16) as vlm:
        assert len(vlm.encode(photo(50, 40)).rows) == 16


def test_a_checkpoint_is_to_be_exported_first(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=rf"^{tmp_path}: a checkpoint; .*: edge-tokcomp export --hf {tmp_path} --out"):
        opened(pair, tmp_path)


def test_llama_cpp_runs_no_directory(pair: Pair, directory: Path) -> None:
    with pytest.raises(TokcompError, match=rf"^{directory}: ") as fault:
        opened(pair, directory, engine="mtmd")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tower.json", None, "not an exported tower"),
        ("tower.json", b"{}", "not an exported tower"),
        ("tower.json", b'{"a":' * 100_000, "not an exported tower"),
        ("tower.json", bytes(2_000_000), "tower.json is damaged"),
        ("projector.onnx.data", b"", "projector.onnx.data is damaged"),
        ("tower.onnx", None, "not an exported tower"),
    ],
)
def test_a_directory_that_is_damaged(
    pair: Pair, directory: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    copy = shutil.copytree(directory, tmp_path / "tower")
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    with pytest.raises(TokcompError, match=message) as fault:
        opened(pair, copy)
    assert str(copy) in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_directory_of_another_exporter(pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower_files, "EXPORTER", tower_files.EXPORTER + 1)
    with pytest.raises(TokcompError, match="written by another version of edge-tokcomp; export the tower again"):
        cached_tower(directory)


def test_a_folder_is_taken_in_its_own_precision_unless_another_is_asked_for(tmp_path: Path) -> None:
    tiny = write_mmproj(tmp_path / "m.gguf", width=128, ffn=512)
    export_tower(tiny.path, tmp_path / "small", "int8")
    assert cached_tower(tmp_path / "small").precision == "int8"
    with pytest.raises(UsageError, match="a tower of precision int8, not fp32"):
        cached_tower(tmp_path / "small", "fp32")


def test_llama_cpps_own_tower_takes_no_folder(tmp_path: Path) -> None:
    tiny = write_mmproj(tmp_path / "m.gguf")
    lm = write_tiny_model(tmp_path / "lm.gguf", "llama", n_embd=96).path
    export_tower(tiny.path, tmp_path / "tower")
    with pytest.raises(UsageError, match=r"a folder, and llama.cpp's own tower \(engine mtmd\) needs the mmproj file"):
        load(lm, tmp_path / "tower", engine="mtmd", threads=1)


def forged(directory: Path, copy: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy whose description says what ``change`` makes of it, with a checksum that holds."""
    shutil.copytree(directory, copy)
    body = json.loads((copy / "tower.json").read_text())
    del body["crc32"]
    change(body)
    (copy / "tower.json").write_text(json.dumps(body | {"crc32": tower_files._crc32_of(body)}))
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda body: body["files"].pop("projector.onnx.data"),
            "lists other files than tower.onnx, tower.onnx.d",
        ),
        (lambda body: body["files"].update({"separator.npy": {"bytes": 1, "crc32": 1}}), "lists other files than"),
        (lambda body: body["files"].update({"../../etc/passwd": {"bytes": 1, "crc32": 1}}), "lists other files than"),
        (lambda body: body.update(files=[1]), "lists other files than"),
        (lambda body: body["files"].update({"tower.onnx": 5}), "not an exported tower"),
        (lambda body: body["spec"].update(separator="v.break"), "lists other files than .*, separator.npy; export"),
        (lambda body: body.update(precision="fp99"), "precision 'fp99' is none of fp32, fp16, int8"),
        (lambda body: body.update(precision=5), "precision 5 is none of"),
        (lambda body: body["spec"].update(family="nope"), "unknown model family 'nope'; known: "),
        (lambda body: body["spec"].update(heads=0), "heads 0 is not an integer within"),
    ],
)
def test_a_description_that_cannot_be(
    directory: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    copy = forged(directory, tmp_path / "tower", change)
    with pytest.raises(TokcompError, match=rf"^{copy}: .*{message}") as fault:
        cached_tower(copy)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"image_size": 24}, r"pictures: \(48, 48\), not \(24, 24\)"),
        ({"patch_size": 4}, "units: 8, not 4"),
        ({"width": 32, "heads": 2}, "rows: 64, not 32"),
        ({"deepstack": [{"block": 0, "projector": [{"kind": "linear", "name": "a"}]}]}, "deepstack levels: 0, not 1"),
        ({"class_token": False, "attention_block": None}, "a class token: True, not False"),
    ],
)
def test_a_description_of_another_tower(
    pair: Pair, directory: Path, tmp_path: Path, spec: dict[str, object], message: str
) -> None:
    copy = forged(directory, tmp_path / "tower", lambda body: body["spec"].update(spec))
    with pytest.raises(TokcompError, match=rf"^{copy}: its graphs are another tower's .* \({message}\)") as fault:
        opened(pair, copy)
    assert "\n" not in str(fault.value)


def test_a_separator_that_the_description_does_not_name(pair: Pair, directory: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(directory, tmp_path / "tower")
    with opened(pair, copy) as vlm:
        width = vlm.engine.row_width
    np.save(copy / "separator.npy", np.ones(width, np.float32))
    with pytest.raises(TokcompError, match=r"another tower's than its description \(a separator: True, not False\)"):
        opened(pair, copy)


def test_a_folder_of_another_kind_of_positions_is_refused(tmp_path: Path) -> None:
    tower = write_mmproj_of(build("qwen2vl"), "qwen2vl", tmp_path / "m.gguf")
    lm = write_tiny_model(tmp_path / "lm.gguf", "llama", n_embd=64).path
    export_tower(tower, tmp_path / "tower")
    with pytest.raises(TokcompError, match=r"lm\.gguf is one with positions as in text; the two files"):
        load(lm, tmp_path / "tower", threads=1, provider="cpu")
