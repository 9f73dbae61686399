"""An mmproj that libmtmd would crash on is refused in one line; what it can use is told."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind

import hf_vlms
from edge_tokcomp.errors import TokcompError
from edge_tokcomp.export.gguf_parts import Tensor, entry
from edge_tokcomp.language.gguf_header import read_header
from edge_tokcomp.language.mtmd_file import check_projector, served_projectors
from hf_mmproj import write_mmproj_of
from mtmd_further_towers import write_cogvlm, write_deepseek4v, write_gemma3n, write_hunyuanvl
from mtmd_survivors import head, write
from tiny_mmproj import write_mmproj
from tiny_models import write_tiny_llama


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """A transformers model of each family."""
    return {family: hf_vlms.build(family) for family in hf_vlms.FAMILIES}


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0], ids=["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("family", hf_vlms.FAMILIES)
def test_files_as_converters_write_them_are_taken(
    models: dict[str, Any], tmp_path: Path, family: str, kind: Kind
) -> None:
    model = models[family]
    projector = check_projector(write_mmproj_of(model, family, tmp_path / "mmproj.gguf", kind=kind))
    assert projector.width == 64 * (4 if family == "qwen3vl" else 1)
    assert projector.kind in served_projectors()
    assert (projector.row_break is not None) == (family in ("pixtral", "mistral3"))


def refused(path: Path) -> str:
    with pytest.raises(TokcompError) as fault:
        check_projector(path)
    text = str(fault.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("clip.has_vision_encoder", False, "holds no vision tower, as an mmproj for audio does"),
        ("clip.projector_type", "ultravox", "projector type 'ultravox' is unknown to the installed llama.cpp"),
        ("clip.projector_type", None, "projector type '' is unknown"),
        ("clip.vision.patch_size", None, "clip.vision.patch_size is missing"),
        ("clip.vision.patch_size", 0, "clip.vision.patch_size is 0, not 1 to 1024"),
        ("clip.vision.block_count", 0, "clip.vision.block_count is 0"),
        ("clip.vision.block_count", 2**31 - 1, "clip.vision.block_count is 2147483647, not 0 to 512"),
        ("clip.vision.block_count", 4, "is missing in some of 4 blocks"),
        ("clip.vision.attention.head_count", 0, "clip.vision.attention.head_count is 0"),
        ("clip.vision.attention.head_count", 7, "attn_q.weight is (64, 64), its metadata asks for (64, 63)"),
        ("clip.vision.embedding_length", 60, "its metadata asks for (60, 60)"),
        ("clip.vision.attention.layer_norm_epsilon", -1.0, "layer_norm_epsilon is below 0"),
        ("clip.vision.attention.layer_norm_epsilon", float("nan"), "layer_norm_epsilon is below 0"),
        ("clip.vision.attention.layer_norm_epsilon", 1, "layer_norm_epsilon is no 32-bit float (GGUF type 4)"),
        ("clip.vision.image_size", 48.0, "clip.vision.image_size is no 32-bit number (GGUF type 6)"),
        ("clip.vision.image_size", 8192, "image_size 8192 in patches of 8 makes more than 65536 patches"),
        ("clip.vision.image_size", 4, "image_size 4 in patches of 8 cannot be merged 1 by 1"),
        ("clip.vision.image_size", 64, "v.position_embd.weight is (64, 37), its metadata asks for (64, 65)"),
        ("clip.vision.image_grid_pinpoints", [48, 50], "image_grid_pinpoints are not all in tiles of image_size 48"),
        ("clip.vision.image_grid_pinpoints", [48, 48 * 65], "image_grid_pinpoints are not all in tiles"),
        ("clip.vision.preproc_min_tiles", 13, "preproc_min_tiles 13 does not go with preproc_max_tiles 12"),
        ("clip.vision.preproc_max_tiles", 10**6, "preproc_max_tiles is 1000000, not 1 to 256"),
    ],
)  # fmt: skip
def test_metadata_that_llama_cpp_would_end_the_process_for_is_refused(
    tmp_path: Path, key: str, value: Any, says: str
) -> None:
    assert says in refused(
        write_mmproj(tmp_path / "bad.gguf", edit=lambda metadata: metadata.update({key: value})).path
    )


@pytest.mark.parametrize(
    ("made", "name", "shape", "says"),
    [
        (write_cogvlm, "mm.gate.weight", (96, 47), "mm.gate.weight is (47, 96), its metadata asks for (48, 96)"),
        (write_cogvlm, "mm.post_fc_norm.bias", (47,), "mm.post_fc_norm.bias is (47,), its weight (48,)"),
        (write_cogvlm, "v.eoi", (63,), "v.eoi is (63,), its metadata asks for (64,)"),
        (write_cogvlm, "v.blk.0.attn_qkv.bias", None, "tensor v.blk.0.attn_qkv.bias is missing"),
        (write_cogvlm, "v.position_embd.weight", (36, 32), "v.position_embd.weight is (32, 36), its metadata asks"),
        (write_hunyuanvl, "mm.0.weight", (48, 32, 3, 2), "mm.0.weight is (2, 3, 32, 48), its metadata asks for (2, 2"),
        (write_hunyuanvl, "v.image_newline", (95,), "v.image_newline is (95,), its metadata asks for (96,)"),
        (write_hunyuanvl, "mm.image_end", (63,), "mm.image_end is (63,), its metadata asks for (64,)"),
        (write_hunyuanvl, "v.position_embd.weight", (63, 32), "v.position_embd.weight is (32, 63), its metadata asks"),
        (write_hunyuanvl, "v.position_embd.weight", None, "tensor v.position_embd.weight is missing"),
        (write_deepseek4v, "mm.2.weight", (64, 47), "mm.2.weight is (47, 64), its metadata asks for (48, 64)"),
        (write_deepseek4v, "v.token_embd.img_pad", (63,), "v.token_embd.img_pad is (63,), its metadata asks for (64,)"),
        (write_gemma3n, "mm.input_projection.weight", (63, 64), "mm.input_projection.weight is (64, 63), its metadata"),
    ],
)  # fmt: skip
def test_tensors_of_towers_that_only_llama_cpp_has_are_checked(
    tmp_path: Path, made: Any, name: str, shape: tuple[int, ...] | None, says: str
) -> None:
    good = read_header(made(tmp_path / "good.gguf"))
    other = None if shape is None else Tensor(name, shape[::-1], 0, bytes(4 * math.prod(shape)))
    write(good, tmp_path / "bad.gguf", {}, {name: other})
    assert check_projector(good.path).width == 64
    assert says in refused(tmp_path / "bad.gguf")


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("v.patch_embd.weight", (64, 3, 8, 9), "patch_embd.weight is (9, 8, 3, 64), its metadata asks for (8, 8, 3"),
        ("v.class_embd", (65,), "v.class_embd is (65,), its metadata asks for (64,)"),
        ("v.position_embd.weight", (36, 64), "v.position_embd.weight is (64, 36), its metadata asks for (64, 37)"),
        ("v.blk.1.ln1.weight", (65,), "v.blk.1.ln1.bias is (64,), its weight (65,)"),
        ("v.blk.1.attn_out.weight", (64, 32), "attn_out is (32, 64) in block 1, (64, 64) in block 0"),
        ("mm.2.bias", (95,), "mm.2.bias is (95,), its weight (96, 96)"),
        ("mm.2.weight", (96, 95), "mm.2.weight is (95, 96), its metadata asks for (96, 96)"),
    ],
)  # fmt: skip
def test_a_tensor_of_another_shape_is_refused(tmp_path: Path, name: str, shape: tuple[int, ...], says: str) -> None:
    assert says in refused(write_mmproj(tmp_path / "bad.gguf", reshape={name: shape}).path)


@pytest.mark.parametrize("name", ["v.patch_embd.weight", "v.position_embd.weight", "mm.0.bias", "mm.2.weight"])
def test_a_tensor_that_llama_cpp_would_miss_too_late_is_refused(tmp_path: Path, name: str) -> None:
    assert f"tensor {name} is missing" in refused(write_mmproj(tmp_path / "bad.gguf", drop=(name,)).path)


def test_a_bias_that_one_block_lacks_is_refused(tmp_path: Path) -> None:
    # llama.cpp would leave it out there and say nothing.
    path = write_mmproj(tmp_path / "bad.gguf", drop=("v.blk.1.attn_q.bias",)).path
    assert "tensor attn_q.bias is missing in some of 3 blocks" in refused(path)


@pytest.mark.parametrize(("size", "patch"), [(64, 5), (768, 4), (400, 3)])
def test_gemma3ns_sizes_must_tell_the_number_of_its_rows(tmp_path: Path, size: int, patch: int) -> None:
    good = read_header(write_gemma3n(tmp_path / "good.gguf"))
    values = {"clip.vision.image_size": size, "clip.vision.patch_size": patch}
    write(good, tmp_path / "bad.gguf", {key: entry(key, value) for key, value in values.items()}, {})
    assert f"image_size {size} over patch_size {patch} is not the number of its rows" in refused(tmp_path / "bad.gguf")


def test_a_vector_that_is_not_f32_is_refused(tmp_path: Path) -> None:
    good = read_header(write_mmproj(tmp_path / "good.gguf").path)
    half = Tensor("v.pre_ln.weight", (64,), 1, bytes(128))
    write(good, tmp_path / "bad.gguf", {}, {"v.pre_ln.weight": half})
    assert "tensor v.pre_ln.weight is F16, not F32" in refused(tmp_path / "bad.gguf")


@pytest.mark.parametrize(("kind", "code", "value"), [(5, "i", -1), (10, "Q", 8), (12, "d", 8.0)])
def test_a_number_of_another_width_is_refused(tmp_path: Path, kind: int, code: str, value: Any) -> None:
    good = read_header(write_mmproj(tmp_path / "good.gguf").path)
    key = "clip.vision.patch_size"
    write(good, tmp_path / "bad.gguf", {key: head(key) + struct.pack(f"<I{code}", kind, value)}, {})
    assert f"{key} is no 32-bit number (GGUF type {kind})" in refused(tmp_path / "bad.gguf")


def test_other_files_are_refused(tmp_path: Path) -> None:
    lm = write_tiny_llama(tmp_path / "lm.gguf").path
    assert refused(lm) == "architecture 'llama' is no vision tower; name the mmproj file"
    whole = write_mmproj(tmp_path / "whole.gguf").path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:-1])
    assert "truncated GGUF" in refused(cut)
    assert "cannot be read" in refused(tmp_path / "nowhere.gguf")


def test_a_projector_type_that_no_file_names_is_not_served(tmp_path: Path) -> None:
    # llama.cpp's own name for the projector of Yi-VL, which it does not read from files.
    assert "mlp_norm" not in served_projectors()
    yi = {"mm.1.weight": (96,), "mm.1.bias": (96,), "mm.3.weight": (96, 96), "mm.3.bias": (96,)}
    good = read_header(write_mmproj(tmp_path / "good.gguf").path)
    added = {name: Tensor(name, shape, 0, bytes(4 * math.prod(shape))) for name, shape in yi.items()}
    write(good, tmp_path / "yi.gguf", {}, {**added, "mm.2.weight": None, "mm.2.bias": None})
    projector = check_projector(tmp_path / "yi.gguf")
    assert (projector.kind, projector.width) == ("mlp", 96)


def test_levels_of_a_tower_are_slices_of_its_rows(models: dict[str, Any], tmp_path: Path) -> None:
    path = write_mmproj_of(models["qwen3vl"], "qwen3vl", tmp_path / "whole.gguf")
    assert check_projector(path).width == 4 * 64
    lacking = write_mmproj_of(models["qwen3vl"], "qwen3vl", tmp_path / "bad.gguf", drop=("v.deepstack.2.fc2.weight",))
    assert "tensor v.deepstack.2.fc2.weight is missing" in refused(lacking)
