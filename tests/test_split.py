"""Cutting a language model into segments: what is copied, what is changed, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.export import segment_plan
from edge_tokcomp.export.check_segments import read_check
from edge_tokcomp.export.split import cached_segments, split_model
from edge_tokcomp.files import fingerprint
from edge_tokcomp.language.segment_files import CUTTER, SegmentFiles
from tiny_models import TinyModel, write_tiny_llama, write_tiny_model

Contents = tuple[dict[str, Any], dict[str, tuple[str, list[int], bytes]]]


def contents(path: Path) -> Contents:
    """Metadata and tensors (type, shape, raw bytes), as gguf-py reads them."""
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {
        tensor.name: (tensor.tensor_type.name, tensor.shape.tolist(), tensor.data.tobytes())
        for tensor in reader.tensors
    }
    assert len(tensors) == len(reader.tensors)
    return metadata, tensors


def cut(model: TinyModel, at: list[int], *, verify: bool = False) -> list[Contents]:
    """The segments of a model, written beside it."""
    folder = split_model(model.path, at, model.path.parent / "segments", verify=verify, threads=1)
    return [contents(path) for path in SegmentFiles.read(folder).paths]


def random_model(path: Path, kind: GGMLQuantizationType) -> TinyModel:
    """Random bytes as weights of any type, in the frame of a model; good for copying only."""
    model = write_tiny_llama(path, n_embd=256, n_layer=3)
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in contents(path)[0].items():
        if isinstance(value, int) and key.startswith("llama."):
            writer.add_uint32(key, value)
    writer.add_tokenizer_model("llama")
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    for name, weight in model.weights.items():
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
            continue
        rows = rng.integers(0, 256, (len(weight), weight.shape[1] // block * block_bytes), np.uint8)
        writer.add_tensor(name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Six layers with a chat template."""
    return write_tiny_llama(tmp_path_factory.mktemp("lm") / "llama.gguf", n_layer=6, chat_template="{{ messages }}")


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ2_XXS"])
def test_tensors_are_copied_as_they_are(tmp_path: Path, quantization: str) -> None:
    model = random_model(tmp_path / "m.gguf", GGMLQuantizationType[quantization])
    _, whole = contents(model.path)
    segments = [tensors for _, tensors in cut(model, [1])]
    layer = {name.removeprefix("blk.0.") for name in whole if name.startswith("blk.0.")}
    for first, stop, tensors in ((0, 1, segments[0]), (1, 3, segments[1])):
        for number in range(first, stop):
            for name in layer:
                assert tensors[f"blk.{number - first}.{name}"] == whole[f"blk.{number}.{name}"]
        assert tensors["output_norm.weight"] == whole["output_norm.weight"]
        assert sum(name.startswith("blk.") for name in tensors) == (stop - first) * len(layer)
    for name in ("token_embd.weight", "output.weight"):
        assert segments[1][name] == whole[name]
        assert segments[0][name][:2] == ("F16", [256, 32])


def test_metadata_is_the_models_apart_from_what_is_the_segments(llama: TinyModel, tmp_path: Path) -> None:
    whole, _ = contents(llama.path)
    folder = split_model(llama.path, [2, 5], tmp_path / "out", verify=False)
    found = [contents(folder / f"segment-{number}-of-3.gguf")[0] for number in (1, 2, 3)]
    for number, (metadata, first, stop) in enumerate(zip(found, (0, 2, 5), (2, 5, 6), strict=True), start=1):
        own = {
            "index": number, "count": 3, "first_layer": first, "depth": 6, "source": fingerprint(llama.path),
            "cutter": CUTTER, "model": "llama.gguf",
        }  # fmt: skip
        wanted = whole | {f"edge_tokcomp.segment.{key}": value for key, value in own.items()}
        wanted["llama.block_count"] = stop - first
        if number < 3:
            wanted = {key: value for key, value in wanted.items() if not key.startswith("tokenizer.")}
            wanted |= {"tokenizer.ggml.model": "none", "llama.vocab_size": 32}
        assert metadata == wanted
    assert "tokenizer.chat_template" in found[2]


def test_arrays_with_an_entry_a_layer_are_sliced_and_others_are_not(tmp_path: Path) -> None:
    extra = {
        "feed_forward_length": [130, 131, 132, 133], "attention.head_count": [4, 5, 6, 7],
        "attention.head_count_kv": [3, 0, 2, 1], "rope.dimension_sections": [2, 3, 3, 0], "odd": [1, 2, 3],
    }  # fmt: skip
    model = write_tiny_model(tmp_path / "m.gguf", "llama", n_layer=4, extra=extra)
    for (metadata, _), part in zip(cut(model, [1]), (slice(1), slice(1, 4)), strict=True):
        for key in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
            assert metadata[f"llama.{key}"] == extra[key][part]
        assert metadata["llama.rope.dimension_sections"] == [2, 3, 3, 0]
        assert metadata["llama.odd"] == [1, 2, 3]


def test_parts_of_a_split_model_are_gathered(llama: TinyModel, tmp_path: Path) -> None:
    parts = write_tiny_model(
        tmp_path / "m.gguf", "llama", n_layer=6, chat_template="{{ messages }}", tensors_per_file=15
    )
    assert len(list(tmp_path.glob("m-*-of-00004.gguf"))) == 4
    gathered = cut(parts, [2, 5], verify=True)
    whole = [contents(path) for path in SegmentFiles.read(cached_segments(llama.path, [2, 5], verify=False)).paths]
    for (metadata, tensors), (metadata_of_one, tensors_of_one) in zip(gathered, whole, strict=True):
        assert tensors == tensors_of_one
        other = {"edge_tokcomp.segment.source": "", "edge_tokcomp.segment.model": ""}
        assert metadata | other == metadata_of_one | other


SLIDING = {"attention.sliding_window": 4, "rope.freq_base": 1e6}
CONSTANT = {"feed_forward_length": [128] * 6, "attention.head_count": [4] * 6, "attention.head_count_kv": [4] * 6}
WAYS: list[tuple[str, list[int], dict[str, Any]]] = [
    ("llama", [2, 5], {}),
    ("llama", [1, 2, 3, 4, 5], {"quantization": "Q8_0", "tied": True, "rope_freqs": True}),
    ("llama", [3], {"quantization": "Q4_0", "extra": CONSTANT}),
    ("mistral3", [2, 5], {}),
    ("internlm2", [2, 5], {}),
    ("phi3", [2, 5], {}),
    ("granite", [2, 5], {}),
    ("qwen2", [2, 5], {}),
    ("qwen3", [2, 5], {"tied": True}),
    ("qwen2vl", [2, 5], {"quantization": "F16"}),
    ("qwen3vl", [4, 5], {}),
    ("gemma3", [2, 5, 6], {"extra": SLIDING, "n_layer": 8}),  # a layer without a window by itself
    ("gemma3", [2, 5], {"extra": {**SLIDING, "attention.sliding_window_pattern": 3}}),
    ("gemma3", [2, 3], {"extra": {**SLIDING, "attention.sliding_window_pattern": [True, True, False] * 2}}),
    ("gemma3", [2], {"extra": {"attention.sliding_window": None}}),
    ("lfm2", [2, 4], {}),
]


@pytest.mark.parametrize(("architecture", "at", "options"), WAYS)
def test_segments_give_the_logits_of_the_model(
    tmp_path: Path, architecture: str, at: list[int], options: dict[str, Any]
) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", architecture, **{"n_layer": 6, **options})
    folder = split_model(model.path, at, tmp_path / "out", threads=1)
    check = read_check(folder)
    assert check is not None
    assert check.relative_error <= 1e-5
    assert check.rows == 20


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [("granite", {}), ("gemma3", {**SLIDING, "attention.sliding_window_pattern": 3})],
)
def test_segments_that_compute_something_else_are_found_out(
    tmp_path: Path, architecture: str, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", architecture, n_layer=6, extra=extra)
    monkeypatch.setitem(segment_plan._ARCHITECTURES, architecture, segment_plan._Architecture())
    monkeypatch.setattr(segment_plan, "layer_windows", lambda _header: [])
    with pytest.raises(TokcompError, match="do not give the model's logits"):
        split_model(model.path, [2], tmp_path / "out", threads=1)
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_a_windowless_segment_says_nothing_of_windows(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", "gemma3", n_layer=8, extra=SLIDING)
    patterns = [
        (metadata.get("gemma3.attention.sliding_window"), metadata.get("gemma3.attention.sliding_window_pattern"))
        for metadata, _ in cut(model, [4, 5, 6])
    ]
    assert patterns == [(4, [True] * 4), (4, [True]), (None, None), (4, [True] * 2)]


@pytest.mark.parametrize(
    ("architecture", "options", "words"),
    [
        ("gemma2", {}, r"a gemma2 model cannot be cut .* gemma3, granite, .* qwen3vl"),
        ("llama", {"extra": {"nextn_predict_layers": 1}}, "predict further tokens"),
        ("llama", {"extra": {"attention.shared_kv_layers": 2}}, "keys and values of earlier ones"),
        ("gemma3", {"extra": {"embedding_length_per_layer_input": 16}}, "an embedding of the token"),
        ("granite", {"extra": {"deepstack_mapping": [0, -1, -1, 1, -1, -1]}}, "all over its depth"),
        ("llama", {"extra": {"attention.causal": False}}, "not causal"),
        ("llama", {"extra": {"block_count": 5}}, "holds 6 layers instead of 5"),
        ("llama", {"extra": {"block_count": 100_000}}, "says it has 100000 layers, not 1 to 512"),
        ("llama", {"extra": {"block_count": None}}, "says it has None layers, not 1 to 512"),
        (
            "llama",
            {"extra": {"some.array": [1, 2, 3, 4, 5, 6]}},
            r"6 entries of llama\.some\.array stand for its layers",
        ),
        ("llama", {"extra": {"attention.head_count": [4] * 5}}, "head_count has 5 entries for 6 layers"),
        ("llama", {"extra": {"feed_forward_length": list("abcdef")}}, "holds no numbers"),
        ("llama", {"extra": {"feed_forward_length": ["a" * 100] * 6}}, "holds no numbers"),
    ],
)
def test_models_that_cannot_be_cut_are_one_clear_line(
    tmp_path: Path, architecture: str, options: dict[str, Any], words: str
) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", architecture, n_layer=6, **options)
    with pytest.raises(TokcompError, match=words) as caught:
        split_model(model.path, [2], tmp_path / "out")
    assert str(model.path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_a_segment_is_not_cut_again(llama: TinyModel, tmp_path: Path) -> None:
    folder = split_model(llama.path, [3], tmp_path / "out", verify=False)
    with pytest.raises(TokcompError, match="is a segment already"):
        split_model(folder / "segment-2-of-2.gguf", [1], tmp_path / "again")


def test_a_file_that_is_no_language_model_is_refused(llama: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(llama.path.read_bytes()[:-1000])
    with pytest.raises(TokcompError, match="truncated"):
        split_model(tmp_path / "m.gguf", [1], tmp_path / "out")
    with pytest.raises(TokcompError, match="cannot be read"):
        cached_segments(tmp_path / "nothing.gguf", [1])


@pytest.mark.parametrize("at", [[], [0], [6], [-1, 3], [3, 2], [2, 2], [2, 7]])
def test_cuts_outside_the_model_are_refused_with_its_depth(llama: TinyModel, tmp_path: Path, at: list[int]) -> None:
    for attempt in (lambda: split_model(llama.path, at, tmp_path / "out"), lambda: cached_segments(llama.path, at)):
        with pytest.raises(UsageError, match=r"llama\.gguf has 6 layers; name some from 1 to 5 in ascending order"):
            attempt()


@pytest.mark.parametrize(
    ("architecture", "n_layer", "at", "words"),
    [
        ("qwen3vl", 6, [3, 5], "up to layer 3, which must be in the first segment; cut at 4 or later"),
        ("lfm2", 6, [1, 3], "layers 0 to 0 are all convolutions, .* layers with attention are 1, 3, 5"),
        ("lfm2", 6, [3, 5], "layers 5 to 5 are all attention"),
        ("gemma3", 62, [10], "gemma3 models of 62 layers differently"),
        ("gemma3", 64, [1, 63], "gemma3 models of 62 layers differently"),
    ],
)
def test_cuts_that_an_architecture_does_not_allow(
    tmp_path: Path, architecture: str, n_layer: int, at: list[int], words: str
) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", architecture, n_layer=n_layer, n_embd=32, n_head=2)
    with pytest.raises(UsageError, match=words):
        split_model(model.path, at, tmp_path / "out")
