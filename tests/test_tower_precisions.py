"""Towers of 16 and 8 bits: close to the source in everything they return, or refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import pytest
from gguf import GGMLQuantizationType as Kind
from test_tower import by_transformers, pictures

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.export import check, tower_files
from edge_tokcomp.export.check import Check, check_tower
from edge_tokcomp.export.tower_files import cached_tower, export_tower
from edge_tokcomp.tower import Tower
from edge_tokcomp.variant import TowerKind
from family_proof import error
from hf_mmproj import write_mmproj_of
from hf_vlms import FAMILIES, build
from tiny_mmproj import write_mmproj


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_mmproj(tmp_path_factory.mktemp("tiny") / "m.gguf")


def test_int8_stays_close_to_transformers_and_is_a_third_of_the_size(tmp_path):
    tiny = write_mmproj(tmp_path / "m.gguf", kind=Kind.Q8_0, width=128, heads=4, ffn=512, image=96)
    small = export_tower(tiny.path, tmp_path / "int8", "int8")
    large = export_tower(tiny.path, tmp_path / "fp32")
    found = Tower(small.directory, provider="cpu", threads=1).encode(pictures(2, 96)).features
    wanted, _ = by_transformers(tiny, pictures(2, 96))
    cosine = (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert cosine.mean() >= 0.999
    assert small.check.cosine == pytest.approx(cosine.mean(), abs=1e-3)
    sizes = [(files.directory / "tower.onnx.data").stat().st_size for files in (small, large)]
    assert sizes[0] < sizes[1] / 3


def test_fp16_stays_within_its_rounding_of_transformers_and_is_half_the_size(tmp_path):
    tiny = write_mmproj(tmp_path / "m.gguf", kind=Kind.F16, width=128, ffn=512)
    small = export_tower(tiny.path, tmp_path / "fp16", "fp16")
    whole = export_tower(tiny.path, tmp_path / "fp32")
    found, wanted = (
        Tower(files.directory, provider="cpu", threads=1).encode(pictures(1, 48)).features for files in (small, whole)
    )
    assert found.dtype == np.float32
    assert 1e-5 < error(found, wanted) < 5e-3
    for name in ("tower.onnx.data", "projector.onnx.data"):
        assert (small.directory / name).stat().st_size < 0.6 * (whole.directory / name).stat().st_size
    with pytest.raises(UsageError, match="cannot be merged inside a tower of fp16"):
        cached_tower(tiny.path, "fp16", tmp_path / "cache", kind=TowerKind(merging=True))
    looking = cached_tower(tiny.path, "fp16", tmp_path / "cache", kind=TowerKind(block=0))
    assert looking.check.close
    assert looking.check.attention > 0


def test_fp16_that_overflows_is_refused(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(check, "NEAR", 0.0)
    with pytest.raises(TokcompError, match="fp16 loses too much of this tower"):
        export_tower(tiny.path, tmp_path / "fp16", "fp16")


def test_int8_leaves_sensitive_layers_alone_until_it_is_close_enough(tmp_path, tiny, monkeypatch):
    checks = iter([0.5, 0.5, 1.0])
    monkeypatch.setattr(
        tower_files, "check_tower", lambda *args: dataclasses.replace(check_tower(*args), cosine=next(checks))
    )
    directory = export_tower(tiny.path, tmp_path / "int8", "int8").directory
    assert json.loads((directory / "tower.json").read_text())["left_in_fp32"] == ["ffn_down"]
    kinds = {
        node.input[1].removesuffix(".weight").removesuffix(".levels"): node.op_type
        for node in onnx.load(directory / "tower.onnx", load_external_data=False).graph.node
        if "MatMul" in node.op_type
    }
    assert kinds["v.blk.1.ffn_down"] == "MatMul"
    assert kinds["v.blk.1.ffn_up"] == kinds["v.blk.1.attn_q"] == "DynamicQuantizeMatMul"


def test_int8_that_is_never_close_is_refused(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(
        tower_files, "check_tower", lambda *args: dataclasses.replace(check_tower(*args), cosine=float("nan"))
    )
    with pytest.raises(TokcompError, match="use precision fp32"):
        export_tower(tiny.path, tmp_path / "int8", "int8")
    assert not list(tmp_path.iterdir())


GOOD = Check(features=0.01, attention=0.01, keys=0.01, embeddings=1e-4, cosine=0.9999, worst_cosine=0.99, misplaced=0.0)


@pytest.mark.parametrize("field", ["features", "attention", "keys", "embeddings"])
@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_what_is_returned_ruined_is_neither_close_nor_exact(field, value):
    assert GOOD.close
    ruined = dataclasses.replace(GOOD, **{field: value})
    assert not ruined.close
    assert not ruined.exact


def test_deepstack_features_count_as_features_do(tmp_path, monkeypatch):
    mmproj = write_mmproj_of(build("qwen3vl"), "qwen3vl", tmp_path / "m.gguf")
    plain = Tower.encode

    def negated(self, *args, **options):
        output = plain(self, *args, **options)
        return dataclasses.replace(output, deepstack=-output.deepstack)

    monkeypatch.setattr(Tower, "encode", negated)
    for precision in ("fp32", "fp16", "int8"):
        with pytest.raises(TokcompError, match=r"differs from the source|loses too much"):
            cached_tower(mmproj, precision, tmp_path / "cache", threads=1)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_close_to_its_source_in_few_bits(tmp_path, name, precision):
    mmproj = write_mmproj_of(build(name), name, tmp_path / "m.gguf")
    found = cached_tower(mmproj, precision, tmp_path / "cache", threads=1).check
    assert found.close
    assert not found.exact
    assert found.cosine >= 0.999
    assert max(found.features, found.attention, found.keys) < (1e-2 if precision == "fp16" else 0.12)
