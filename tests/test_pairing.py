"""Files that do not belong together, or are damaged, are told before memory is taken for them."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from edge_tokcomp import load, vlm
from edge_tokcomp.errors import TokcompError
from edge_tokcomp.language.gguf_header import read_header
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.pairing import check_pair, on_grid
from family_proof import Proof
from hf_mmproj import write_mmproj_of
from hf_vlms import FAMILIES, build
from tiny_models import ARCHITECTURES, write_tiny_model

_KINDS = {float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING, bool: gguf.GGUFValueType.BOOL}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("lm") / "lm.gguf", "llama", n_embd=96).path


@pytest.fixture
def _nothing_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise RuntimeError("memory is taken")

    monkeypatch.setattr(vlm, "open_language", refuse)
    monkeypatch.setattr(vlm, "open_engine", refuse)


@pytest.mark.usefixtures("_nothing_opened")
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_widths_that_differ_are_told_first(lm: Path, tmp_path: Path, name: str) -> None:
    mmproj = write_mmproj_of(build(name), name, tmp_path / "m.gguf")
    width = 256 if name == "qwen3vl" else 64
    with pytest.raises(
        TokcompError, match=rf"m\.gguf writes rows of {width}, .*lm\.gguf takes 96; the two files"
    ) as fault:
        load(lm, mmproj)
    assert "\n" not in str(fault.value)


@pytest.mark.usefixtures("_nothing_opened")
@pytest.mark.parametrize("name", ["qwen25vl", "gemma3"])
def test_a_missing_tensor_is_told_first(lm: Path, tmp_path: Path, name: str) -> None:
    mmproj = write_mmproj_of(build(name), name, tmp_path / "m.gguf", drop=("v.blk.1.attn_out.weight",))
    with pytest.raises(TokcompError, match=r"tensor v\.blk\.1\.attn_out\.weight is missing"):
        load(lm, mmproj)


@pytest.mark.usefixtures("_nothing_opened")
def test_a_model_that_llama_cpp_serves_is_checked_too(lm: Path, tmp_path: Path) -> None:
    mmproj = write_mmproj_of(
        build("qwen25vl"), "qwen25vl", tmp_path / "m.gguf",
        edit=lambda metadata: metadata.update({"clip.projector_type": "qwen2.5o"}),
    )  # fmt: skip
    with pytest.raises(TokcompError, match=r"writes rows of 64, .* takes 96"):
        load(lm, mmproj)


@pytest.mark.usefixtures("_nothing_opened")
@pytest.mark.parametrize(
    ("architecture", "name", "message"),
    [
        (
            "llama",
            "qwen2vl",
            r"m\.gguf needs .* by row and column \(M-RoPE\), .*lm\.gguf is one .* as in text",
        ),
        ("qwen2vl", "llava15", r"m\.gguf needs .* as in text, .*lm\.gguf is one with positions by row and column"),
    ],
)
def test_positions_that_differ_are_told_first(tmp_path: Path, architecture: str, name: str, message: str) -> None:
    lm = write_tiny_model(tmp_path / "lm.gguf", architecture, n_embd=64).path
    mmproj = write_mmproj_of(build(name), name, tmp_path / "m.gguf")
    with pytest.raises(TokcompError, match=f"{message}.*; the two files are not of one model") as fault:
        load(lm, mmproj)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_headers_say_which_positions_llama_cpp_takes(tmp_path: Path, architecture: str) -> None:
    lm = write_tiny_model(tmp_path / "lm.gguf", architecture, n_layer=4).path
    with LanguageModel.open(lm, threads=1) as model:
        assert on_grid(read_header(lm)) == model.multi_position


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 64.0, "64", True])
@pytest.mark.parametrize("key", ["llama.embedding_length", "llama.n_deepstack_layers", "split.count"])
def test_numbers_of_a_header_that_are_no_integers(tmp_path: Path, key: str, value: float | str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "lm.gguf", arch="llama")
    writer.add_key_value(key, value, _KINDS[type(value)])
    if key != "llama.embedding_length":
        writer.add_embedding_length(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(TokcompError, match=rf"lm\.gguf: {key} is {value!r}, not an integer; download the file again"):
        load(tmp_path / "lm.gguf", tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["llava15", "qwen2vl", "qwen3vl", "lfm2vl"])
def test_files_of_one_model_pass(tmp_path: Path, name: str) -> None:
    proof = Proof.make(name, tmp_path)
    check_pair(proof.lm, proof.mmproj)
