from __future__ import annotations

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.export import tower_files
from edge_tokcomp.export.mmproj import Mmproj
from edge_tokcomp.export.reference import reference_projector, reference_tower
from edge_tokcomp.export.tower_files import cache_directory, cached_tower, export_tower
from edge_tokcomp.export.vit import write_projector, write_tower
from edge_tokcomp.families.tower_spec import TowerSpec
from edge_tokcomp.tower import Tower
from edge_tokcomp.variant import TowerVariant
from tiny_mmproj import MLP, write_mmproj


def pictures(count, size, seed=1):
    return np.random.default_rng(seed).standard_normal((count, 3, size, size), dtype=np.float32)


def by_transformers(tiny, pixels):
    with torch.no_grad():
        out = tiny.tower(torch.from_numpy(pixels), output_hidden_states=True, output_attentions=True)
    return out.hidden_states[-2].numpy(), out.attentions[-2][:, :, 0, :].numpy()


def error(found, wanted):
    assert found.shape == wanted.shape
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_mmproj(tmp_path_factory.mktemp("mmproj") / "m.gguf", kind=Kind.F16)


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    return export_tower(tiny.path, tmp_path_factory.mktemp("towers") / "fp32")


@pytest.fixture(scope="module")
def tower(exported):
    return Tower(exported.directory, provider="cpu", threads=1, graph="attention")


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("swapped", [True, False])
def test_tower_equals_transformers(tmp_path, kind, activation, swapped):
    tiny = write_mmproj(tmp_path / "m.gguf", kind=kind, activation=activation, swapped=swapped)
    directory = export_tower(tiny.path, tmp_path / "tower").directory
    plain, looking = (Tower(directory, provider="cpu", threads=1, graph=graph) for graph in ("tower", "attention"))
    features, attention = by_transformers(tiny, pictures(3, 48))
    assert error(plain.encode(pictures(3, 48)).features, features) <= 1e-4
    output = looking.encode(pictures(3, 48))
    assert error(output.features, features) <= 1e-4
    assert error(output.cls_attention, attention) <= 1e-4
    np.testing.assert_allclose(output.cls_attention.sum(-1), 1, atol=1e-5)


def test_projector_equals_torch(tiny, tower):
    rows = np.random.default_rng(2).standard_normal((11, 64), dtype=np.float32)
    with torch.no_grad():
        wanted = tiny.projector(torch.from_numpy(rows)).numpy()
    assert error(tower.project(rows), wanted) <= 1e-5
    assert tower.project(rows[:0]).shape == (0, 96)


def test_a_batch_equals_its_pictures_one_by_one(tower):
    pixels = pictures(3, 48)
    together = tower.encode(pixels)
    for number in range(3):
        alone = tower.encode(pixels[number : number + 1])
        np.testing.assert_allclose(together.features[number], alone.features[0], atol=1e-4)
        np.testing.assert_allclose(together.cls_attention[number], alone.cls_attention[0], atol=1e-5)


def test_a_remainder_of_the_picture_is_left_out_as_transformers_does(tmp_path):
    tiny = write_mmproj(tmp_path / "m.gguf", image=51, patch=8)
    tower = Tower(export_tower(tiny.path, tmp_path / "tower").directory, provider="cpu", threads=1)
    assert error(tower.encode(pictures(1, 51)).features, by_transformers(tiny, pictures(1, 51))[0]) <= 1e-4


def test_features_stop_at_the_layer_the_file_names(tmp_path):
    tiny = write_mmproj(tmp_path / "m.gguf", layers=[2])
    tower = Tower(export_tower(tiny.path, tmp_path / "tower").directory, provider="cpu", threads=1, graph="attention")
    with torch.no_grad():
        out = tiny.tower(torch.from_numpy(pictures(1, 48)), output_hidden_states=True, output_attentions=True)
    output = tower.encode(pictures(1, 48))
    assert error(output.features, out.hidden_states[2].numpy()) <= 1e-4
    assert error(output.cls_attention, out.attentions[1][:, :, 0, :].numpy()) <= 1e-4


def test_reference_equals_transformers(tiny):
    mmproj = Mmproj(tiny.path)
    spec = tower_files.family_for(mmproj.metadata).spec(mmproj.metadata, mmproj.shapes)
    features, attention = by_transformers(tiny, pictures(2, 48))
    found = reference_tower(spec, mmproj, pictures(2, 48), TowerVariant(block=spec.block(None)))
    assert error(found.features, features) <= 1e-5
    assert error(found.cls_attention, attention) <= 1e-5
    with torch.no_grad():
        wanted = tiny.projector(torch.from_numpy(features[0])).numpy()
    assert error(reference_projector(spec, mmproj, features[0]), wanted) <= 1e-5


@pytest.mark.parametrize("silu", [True, False])
def test_a_tower_without_cls_equals_the_reference(tmp_path, silu):
    path = tmp_path / "m.gguf"
    write_mmproj(
        path,
        activation="silu" if silu else "gelu",
        drop=("v.class_embd",),
        reshape={"v.position_embd.weight": (36, 64)},
    )
    mmproj = Mmproj(path)
    spec = TowerSpec(
        family="llava15", image_size=48, patch_size=8, width=64, heads=4, ffn_width=128, blocks=3,
        activation="silu" if silu else "gelu", eps=1e-6, image_mean=(0, 0, 0), image_std=(1, 1, 1), projector=MLP,
        class_token=False, attention_block=None,
    )  # fmt: skip
    write_tower(spec, mmproj, tmp_path / "tower.onnx")
    write_projector(spec, mmproj, tmp_path / "projector.onnx")
    output = Tower(tmp_path, provider="cpu", threads=1).encode(pictures(2, 48))
    assert output.cls_attention is None
    assert error(output.features, reference_tower(spec, mmproj, pictures(2, 48)).features) <= 1e-5


def test_graphs_are_valid_onnx_of_opset_20(exported):
    for name in ("tower.onnx", "attention.onnx", "projector.onnx"):
        model = onnx.load(exported.directory / name)
        onnx.checker.check_model(model)
        assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20, "com.microsoft": 1}


@pytest.mark.parametrize("graph", ["tower", "attention"])
def test_an_export_that_differs_from_its_source_is_refused(tmp_path, tiny, monkeypatch, graph):
    def twisted(spec, mmproj, path, *options, **more):
        eps = 0.5 if path.stem == graph else spec.eps
        write_tower(dataclasses.replace(spec, eps=eps), mmproj, path, *options, **more)

    monkeypatch.setattr(tower_files, "write_tower", twisted)
    with pytest.raises(TokcompError, match="differs from the source"):
        export_tower(tiny.path, tmp_path / "tower")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers_are_refused(tmp_path, tiny):
    data = bytearray(tiny.path.read_bytes())
    data[-96 * 4 :] = b"\xff" * (96 * 4)
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(TokcompError, match="no finite numbers"):
        export_tower(tmp_path / "m.gguf", tmp_path / "tower")


def test_export_says_how_far_it_is_and_never_overwrites(exported, tiny):
    assert 0 < exported.check.features <= 1e-4
    assert "cosine 1.00000" in str(exported.check)
    described = json.loads((exported.directory / "tower.json").read_text(encoding="utf-8"))
    assert TowerSpec.from_dict(described["spec"]) == exported.spec
    with pytest.raises(TokcompError, match="already exists"):
        export_tower(tiny.path, exported.directory)


def test_faults_of_the_source_name_the_file(tmp_path):
    write_mmproj(tmp_path / "m.gguf", edit=lambda known: known.update({"clip.projector_type": "resampler"}))
    with pytest.raises(TokcompError, match=r"m\.gguf: projector resampler is not supported"):
        cached_tower(tmp_path / "m.gguf", cache=tmp_path / "cache")
    with pytest.raises(TokcompError, match=r"none\.gguf: cannot be read"):
        cached_tower(tmp_path / "none.gguf", cache=tmp_path / "cache")
    with pytest.raises(UsageError, match="unknown precision 'int4'; one of fp32, fp16, int8"):
        cached_tower(tmp_path / "m.gguf", "int4", tmp_path / "cache")


@pytest.fixture
def builds(monkeypatch):
    """The precisions of the towers that were built, in order."""
    seen = []

    def counted(spec, mmproj, into, order):
        seen.append(order.precision)
        return write_graphs(spec, mmproj, into, order)

    write_graphs = tower_files._write_graphs
    monkeypatch.setattr(tower_files, "_write_graphs", counted)
    return seen


def test_a_tower_is_built_once_for_a_content_and_a_precision(tmp_path, tiny, builds):
    cache = tmp_path / "cache"
    first = cached_tower(tiny.path, cache=cache)
    assert cached_tower(tiny.path, cache=cache) == first
    moved = tmp_path / "elsewhere.gguf"
    moved.write_bytes(tiny.path.read_bytes())
    assert cached_tower(moved, cache=cache) == first
    assert builds == ["fp32"]
    assert cached_tower(tiny.path, "int8", cache).directory != first.directory
    changed = write_mmproj(tmp_path / "other.gguf", seed=9)
    assert cached_tower(changed.path, cache=cache).directory != first.directory
    assert builds == ["fp32", "int8", "fp32"]


def test_a_newer_exporter_builds_anew(tmp_path, tiny, monkeypatch):
    first = cached_tower(tiny.path, cache=tmp_path)
    monkeypatch.setattr(tower_files, "EXPORTER", 1_000)
    assert cached_tower(tiny.path, cache=tmp_path).directory != first.directory


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["tower.onnx", "tower.onnx.data", "projector.onnx", "projector.onnx.data", "tower.json"]
)
@pytest.mark.parametrize("harm", [cut, flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"[]")])
def test_a_damaged_cache_entry_is_built_again(tmp_path, tiny, name, harm, builds):
    first = cached_tower(tiny.path, cache=tmp_path)
    wanted = (first.directory / "tower.onnx.data").read_bytes()
    harm(first.directory / name)
    again = cached_tower(tiny.path, cache=tmp_path)
    assert len(builds) == 2
    assert again.directory == first.directory
    assert (again.directory / "tower.onnx.data").read_bytes() == wanted
    assert [path.name for path in tmp_path.iterdir()] == [first.directory.name]


def test_builders_at_once_agree_and_leave_nothing_behind(tmp_path, tiny, builds):
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: cached_tower(tiny.path, cache=tmp_path), range(4)))
    assert len({files.directory for files in built}) == 1
    assert len(list(tmp_path.iterdir())) == 1
    del builds[:]
    assert cached_tower(tiny.path, cache=tmp_path).directory == built[0].directory
    assert builds == []


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_TOKCOMP_CACHE", str(tmp_path / "a"))
    assert cache_directory() == tmp_path / "a"
    monkeypatch.delenv("EDGE_TOKCOMP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    if sys.platform == "linux":
        assert cache_directory() == tmp_path / "b" / "edge-tokcomp"


def test_a_cache_that_cannot_be_written_says_so(tmp_path, tiny):
    (tmp_path / "file").write_text("")
    with pytest.raises(TokcompError, match="EDGE_TOKCOMP_CACHE"):
        cached_tower(tiny.path, cache=tmp_path / "file")


def test_a_tower_knows_its_shapes(tower):
    assert tower.image_size == (48, 48)
    assert (tower.unit, tower.width, tower.language_width) == (8, 64, 96)
    assert tower.provider == "cpu"
    assert tower.provider_reason == "cpu: asked for"


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((1, 3, 48, 47), np.float32),
        np.zeros((1, 1, 48, 48), np.float32),
        np.zeros((3, 48, 48), np.float32),
        np.zeros((0, 3, 48, 48), np.float32),
        np.zeros((1, 3, 48, 48), np.float64),
    ],
)
def test_pixels_of_another_shape_are_a_programming_fault(tower, pixels):
    with pytest.raises(ValueError, match=r"pixels must be \(B, 3, n\*8, n\*8\) float32, got"):
        tower.encode(pixels)


@pytest.mark.parametrize("rows", [np.zeros((2, 65), np.float32), np.zeros(64, np.float32), np.zeros((2, 64))])
def test_rows_of_another_shape_are_a_programming_fault(tower, rows):
    with pytest.raises(ValueError, match=r"rows must be \(n, 64\) float32, got"):
        tower.project(rows)


def test_a_directory_without_a_tower_says_so(tmp_path, exported):
    with pytest.raises(TokcompError, match="no such file"):
        Tower(tmp_path, threads=1)
    for name in ("tower.onnx", "projector.onnx"):
        (tmp_path / name).write_bytes(b"\x00 not onnx")
    with pytest.raises(TokcompError, match="cannot load it") as fault:
        Tower(tmp_path, threads=1)
    assert "\n" not in str(fault.value)
    for name in ("tower.onnx", "projector.onnx"):
        (tmp_path / name).write_bytes((exported.directory / "projector.onnx").read_bytes())
    (tmp_path / "projector.onnx.data").write_bytes((exported.directory / "projector.onnx.data").read_bytes())
    with pytest.raises(TokcompError, match="no tower and projector"):
        Tower(tmp_path, threads=1)


def test_unknown_providers_and_thread_counts_are_refused(exported):
    with pytest.raises(UsageError, match="unknown provider 'tpu'; one of auto, cpu, cuda"):
        Tower(exported.directory, provider="tpu", threads=1)
    with pytest.raises(UsageError, match="threads must be at least 1"):
        Tower(exported.directory, threads=0)


def test_a_missing_provider_is_an_error_that_says_how_to_get_it(exported, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(TokcompError, match=r"no provider cuda; .*pip install 'edge-tokcomp\[gpu\]'"):
        Tower(exported.directory, provider="cuda", threads=1)
    tower = Tower(exported.directory, provider="auto", threads=1)
    assert tower.provider == "cpu"
    assert tower.provider_reason == "cpu: the installed ONNX Runtime has no CUDA"


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA starts here")
def test_a_provider_that_does_not_start_is_never_replaced_in_silence(exported, monkeypatch):
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    with pytest.raises(TokcompError, match="cuda does not start here"):
        Tower(exported.directory, provider="cuda", threads=1)
    tower = Tower(exported.directory, provider="auto", threads=1)
    assert tower.provider == "cpu"
    assert tower.provider_reason == "cpu: CUDA is installed but does not start on this machine"
    assert tower.encode(pictures(1, 48)).features.shape == (1, 37, 64)


def test_without_onnx_runtime_the_extras_are_named(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TokcompError, match=r"edge-tokcomp\[cpu\].*edge-tokcomp\[gpu\]"):
        Tower(exported.directory, threads=1)
