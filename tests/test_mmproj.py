from __future__ import annotations

import random
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.export.mmproj import Mmproj
from edge_tokcomp.export.shapes import projector_shapes, tower_shapes
from edge_tokcomp.families import family_for
from tiny_mmproj import write_mmproj


def opened(path):
    """Everything that is read of a file before memory is taken for its weights."""
    mmproj = Mmproj(path)
    spec = family_for(mmproj.metadata).spec(mmproj.metadata, mmproj.shapes)
    mmproj.require(tower_shapes(spec) | projector_shapes(spec, mmproj))
    return mmproj, spec


def test_metadata_are_plain_values(tmp_path):
    write_mmproj(tmp_path / "m.gguf", layers=[3])
    metadata = Mmproj(tmp_path / "m.gguf").metadata
    assert metadata["clip.vision.image_size"] == 48
    assert type(metadata["clip.vision.image_size"]) is int
    assert metadata["clip.has_llava_projector"] is True
    assert metadata["clip.vision.feature_layer"] == [3]
    assert metadata["clip.projector_type"] == "mlp"


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0])
def test_tensors_are_dequantised(tmp_path, kind):
    tiny = write_mmproj(tmp_path / "m.gguf", kind=kind)
    found = Mmproj(tiny.path).tensor("v.blk.1.attn_k.weight", (64, 64))
    wanted = tiny.tower.state_dict()["encoder.layers.1.self_attn.k_proj.weight"].numpy()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("ffn", [128, 64])
def test_feed_forward_is_told_apart_whichever_name_it_bears(tmp_path, swapped, ffn):
    def modern(metadata):
        if not swapped:
            metadata["clip.has_text_encoder"] = None

    tiny = write_mmproj(tmp_path / "m.gguf", ffn=ffn, swapped=swapped, edit=modern)
    mmproj = Mmproj(tiny.path)
    state = tiny.tower.state_dict()
    np.testing.assert_array_equal(
        mmproj.tensor("v.blk.0.ffn_up.weight", (ffn, 64)), state["encoder.layers.0.mlp.fc1.weight"].numpy()
    )
    np.testing.assert_array_equal(
        mmproj.tensor("v.blk.0.ffn_down.bias", (64,)), state["encoder.layers.0.mlp.fc2.bias"].numpy()
    )


def test_a_missing_tensor_is_named(tmp_path):
    write_mmproj(tmp_path / "m.gguf", drop=("v.blk.2.attn_out.bias",))
    with pytest.raises(TokcompError, match=r"v\.blk\.2\.attn_out\.bias is missing"):
        opened(tmp_path / "m.gguf")


def test_queries_that_stand_there_twice_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch="clip")
    for name, rows in (("attn_qkv", 12), ("attn_q", 4)):
        writer.add_tensor(f"v.blk.0.{name}.weight", np.zeros((rows, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(TokcompError, match=r"'v.blk.0.attn_q.weight' twice, as 'v.blk.0.attn_qkv.*' and") as fault:
        Mmproj(tmp_path / "m.gguf")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v.position_embd.weight", (36, 64)),
        ("v.patch_embd.weight", (64, 3, 4, 4)),
        ("v.blk.0.attn_q.weight", (64, 32)),
        ("mm.2.weight", (96, 64)),
        ("mm.0.bias", (95,)),
    ],
)
def test_a_tensor_of_another_shape_is_named(tmp_path, name, shape):
    write_mmproj(tmp_path / "m.gguf", reshape={name: shape})
    with pytest.raises(TokcompError, match=name.replace(".", r"\.")):
        opened(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("clip.vision.image_size", None, "clip.vision.image_size is missing"),
        ("clip.vision.image_size", 2**31, "image_size 2147483648 is not an integer within"),
        ("clip.vision.image_size", 0, "image_size 0"),
        ("clip.vision.image_size", "48", "'48', not an integer"),
        ("clip.vision.patch_size", 49, "patch_size 49 is larger"),
        ("clip.vision.attention.head_count", 5, "width 64 is not a multiple of its 5 heads"),
        ("clip.vision.block_count", 4, "after 4 blocks, the file holds 3"),
        ("clip.vision.block_count", 4_000_000_000, "after 4000000000 blocks, the file holds 3"),
        ("clip.vision.block_count", 0, "block_count 0 is not possible"),
        ("clip.vision.image_std", [0.2, 0.0, 0.2], "image_std"),
        ("clip.vision.image_mean", [0.2, 0.2], "not three numbers"),
        ("clip.vision.image_mean", [0.2, float("nan"), 0.2], "image_mean"),
        ("clip.vision.attention.layer_norm_epsilon", 2.0, "epsilon"),
        ("clip.vision.feature_layer", [1, 2], "stack several"),
        ("clip.vision.feature_layer", [9], "after 9 blocks"),
        ("clip.use_silu", True, "both"),
        ("clip.projector_type", "ldpv2", "projector ldpv2 is not supported; supported families: .*llava15"),
        ("clip.has_vision_encoder", False, "not a vision projector"),
    ],
)
def test_impossible_metadata_is_refused_in_one_line(tmp_path, key, value, message):
    activation = "gelu" if key == "clip.use_silu" else "quick_gelu"
    write_mmproj(tmp_path / "m.gguf", activation=activation, edit=lambda metadata: metadata.update({key: value}))
    with pytest.raises(TokcompError, match=message) as fault:
        opened(tmp_path / "m.gguf")
    assert "\n" not in str(fault.value)


def test_a_language_model_is_no_mmproj(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "lm.gguf", arch="llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(TokcompError, match=r"architecture 'llama'.*mmproj file"):
        Mmproj(tmp_path / "lm.gguf")


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"clip")


def header(tensors: int, pairs: int, *parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"".join(parts)


HOSTILE = {
    "empty": b"",
    "no magic": b"PK\x03\x04" + bytes(60),
    "magic alone": b"GGUF",
    "version 9": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "more tensors than bytes": header(2**63, 1, ARCHITECTURE),
    "more pairs than bytes": header(0, 2**63, ARCHITECTURE),
    "text past the end": header(0, 1, struct.pack("<Q", 2**62), b"abc"),
    "array past the end": header(0, 2, ARCHITECTURE, text(b"a"), struct.pack("<IIQ", 9, 4, 2**62)),
    "array in an array": header(0, 2, ARCHITECTURE, text(b"a"), struct.pack("<IIQIQ", 9, 9, 1, 9, 1)),
    "long array": header(0, 2, ARCHITECTURE, text(b"a"), struct.pack("<IIQ", 9, 0, 70_000), bytes(70_000)),
    "unknown value type": header(0, 2, ARCHITECTURE, text(b"a"), struct.pack("<I", 77), bytes(8)),
    "one key twice": header(0, 2, ARCHITECTURE, ARCHITECTURE),
    "key that is no text": header(0, 2, ARCHITECTURE, text(b"\xff\xfe"), struct.pack("<IB", 0, 1)),
    "alignment zero": header(0, 2, ARCHITECTURE, text(b"general.alignment"), struct.pack("<II", 4, 0)),
    "tensor past the end": header(
        1, 1, ARCHITECTURE, text(b"t"), struct.pack("<IQQIQ", 2, 2**20, 2**20, 0, 0), bytes(64)
    ),
    "tensor whose size wraps": header(
        1, 1, ARCHITECTURE, text(b"t"), struct.pack("<IQQQIQ", 3, 2**32, 2**31, 2, 0, 0), bytes(64)
    ),
    "tensor of five axes": header(1, 1, ARCHITECTURE, text(b"t"), struct.pack("<IQQQQQIQ", 5, 1, 1, 1, 1, 1, 0, 0)),
    "tensor of unknown type": header(1, 1, ARCHITECTURE, text(b"t"), struct.pack("<IQIQ", 1, 4, 999, 0), bytes(64)),
    "tensor of part of a block": header(1, 1, ARCHITECTURE, text(b"t"), struct.pack("<IQIQ", 1, 31, 8, 0), bytes(64)),
    "one tensor twice": header(
        2, 1, ARCHITECTURE, (text(b"t") + struct.pack("<IQIQ", 1, 1, 0, 0)) * 2, bytes(64)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_before_memory_is_taken(tmp_path, name):
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(TokcompError) as fault:
            opened(path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert str(path) in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(TokcompError, match="cannot be read"):
            Mmproj(path)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    path = tmp_path_factory.mktemp("smallest") / "m.gguf"
    write_mmproj(path, blocks=1, width=8, heads=2, ffn=16, out=8, image=8, patch=4)
    return path.read_bytes()


def test_a_file_cut_off_anywhere_is_refused(tmp_path, smallest):
    path = tmp_path / "m.gguf"
    for length in range(0, len(smallest) - 32, 101):
        path.write_bytes(smallest[:length])
        with pytest.raises(TokcompError):
            opened(path)


def test_a_flipped_header_byte_is_refused_or_harmless(tmp_path, smallest):
    path = tmp_path / "m.gguf"
    chance = random.Random(0)
    for place in range(0, 3000, 37):
        damaged = bytearray(smallest)
        damaged[place] = chance.choice([0, 0xFF, damaged[place] ^ 1 << chance.randrange(8)])
        path.write_bytes(damaged)
        try:
            opened(path)
        except TokcompError as fault:
            assert "\n" not in str(fault)  # noqa: PT017 - what must not come is any other exception
