"""What is checked before llama.cpp sees a file, and the token table read from it."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.language.decoder import PlainDecoder
from edge_tokcomp.language.gguf_header import read_header
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.token_embedding import TokenEmbedding
from tiny_models import BOS, EOS, IM_END, TinyModel, byte_token, tiny_vocabulary, write_tiny_llama, write_tiny_model

TEXT = "the red cat on the left, 7 日本"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_llama(tmp_path_factory.mktemp("lm") / "llama.gguf")


def rewrite(source: Path, target: Path, *, drop: str = "", replace: dict[str, str] | None = None) -> Path:
    """A copy with one metadata key or tensor left out, or string values replaced."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(target), (replace or {}).get("general.architecture", "llama"))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", drop):
            continue
        value = (replace or {}).get(name, field.contents())
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type)
    for tensor in reader.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    close(writer)
    return target


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_header_agrees_with_gguf_reader(tiny: TinyModel) -> None:
    header, reader = read_header(tiny.path), gguf.GGUFReader(tiny.path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {*header.metadata, *header.arrays} == set(fields)
    for name, value in header.metadata.items():
        assert value == fields[name].contents()
    for name, count in header.arrays.items():
        assert count == len(fields[name].data)
    for tensor in reader.tensors:
        found = header.tensors[tensor.name]
        assert (list(found.shape), found.offset, found.n_bytes, found.type_name) == (
            tensor.shape.tolist(), tensor.data_offset, tensor.n_bytes, tensor.tensor_type.name,
        )  # fmt: skip


def test_model_facts(tiny: TinyModel) -> None:
    with LanguageModel.open(tiny.path, threads=1) as model:
        assert (model.architecture, model.n_embd, model.n_embd_inp, model.n_layer) == ("llama", 64, 64, 2)
        assert (model.n_vocab, model.n_ctx_train, model.bos, model.eos) == (tiny.n_vocab, tiny.n_ctx_train, BOS, EOS)
        assert (model.bos_text, model.eos_text, model.chat_template) == ("<s>", "</s>", None)
        assert not model.multi_position
        assert [model.is_end(token) for token in (EOS, IM_END, BOS, 100)] == [True, True, False, False]


def test_chat_template_longer_than_any_buffer_is_read_whole(tmp_path: Path) -> None:
    template = "{# " + "x" * 5000 + " #}{{ messages[0].content }}"
    path = write_tiny_llama(tmp_path / "m.gguf", chat_template=template).path
    with LanguageModel.open(path, threads=1) as model:
        assert model.chat_template == template


def test_text_survives_the_tokenizer(tiny: TinyModel) -> None:
    with LanguageModel.open(tiny.path, threads=1) as model:
        tokens = model.tokenize(TEXT, add_special=True, parse_special=True)
        assert tokens[0] == BOS
        assert tokens.dtype == np.int32
        assert model.detokenize(tokens).strip() == TEXT
        assert b"".join(model.piece(int(token)) for token in tokens).decode().strip() == TEXT
        assert model.piece(byte_token(0xE6)) == b"\xe6"
        assert model.piece(EOS) == b""
        assert model.piece(EOS, special=True) == b"</s>"
        special = model.tokenize("<|im_end|>", add_special=False, parse_special=True)
        assert special.tolist() == [IM_END]
        assert len(model.tokenize("<|im_end|>", add_special=False, parse_special=False)) > 1
        words, _, _ = tiny_vocabulary(tiny.n_vocab)
        assert words[model.tokenize("the", add_special=False, parse_special=True)[0]].decode() == "▁the"
        with pytest.raises(UsageError, match="UTF-8"):
            model.tokenize("\ud800", add_special=True, parse_special=True)
        for bad in (-1, tiny.n_vocab):
            for call in (model.piece, model.is_end, lambda token: model.detokenize(np.array([token], np.int32))):
                with pytest.raises(ValueError, match="outside the vocabulary"):
                    call(bad)


def truncated(tiny: TinyModel, folder: Path) -> Path:
    return put(folder, tiny.path.read_bytes()[:-1000])


def cut_in_header(tiny: TinyModel, folder: Path) -> Path:
    return put(folder, tiny.path.read_bytes()[:3000])


def empty(_tiny: TinyModel, folder: Path) -> Path:
    return put(folder, b"")


def other_file(_tiny: TinyModel, folder: Path) -> Path:
    return put(folder, b"PK\x03\x04" + bytes(1000))


def missing(_tiny: TinyModel, folder: Path) -> Path:
    return folder / "nothing.gguf"


def a_folder(_tiny: TinyModel, folder: Path) -> Path:
    return folder


def big_endian(tiny: TinyModel, folder: Path) -> Path:
    return put(folder, b"GGUF" + struct.pack(">I", 3) + tiny.path.read_bytes()[8:])


def version_one(tiny: TinyModel, folder: Path) -> Path:
    return put(folder, b"GGUF" + struct.pack("<I", 1) + tiny.path.read_bytes()[8:])


def endless_counts(_tiny: TinyModel, folder: Path) -> Path:
    return put(folder, b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**40) + bytes(64))


def endless_string(_tiny: TinyModel, folder: Path) -> Path:
    return put(folder, b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(64))


def endless_array(_tiny: TinyModel, folder: Path) -> Path:
    return put(folder, b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 8, 7) + b"\xff" * 64)


def unknown_value_type(_tiny: TinyModel, folder: Path) -> Path:
    return put(folder, b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 99) + bytes(64))


def mmproj(tiny: TinyModel, folder: Path) -> Path:
    return rewrite(tiny.path, folder / "x.gguf", replace={"general.type": "mmproj", "general.architecture": "clip"})


def adapter(tiny: TinyModel, folder: Path) -> Path:
    return rewrite(tiny.path, folder / "x.gguf", replace={"general.type": "adapter"})


def unknown_architecture(tiny: TinyModel, folder: Path) -> Path:
    return rewrite(tiny.path, folder / "x.gguf", replace={"general.architecture": "dodo"})


def missing_tensor(tiny: TinyModel, folder: Path) -> Path:
    return rewrite(tiny.path, folder / "x.gguf", drop="blk.1.ffn_up.weight")


def put(folder: Path, data: bytes) -> Path:
    (folder / "x.gguf").write_bytes(data)
    return folder / "x.gguf"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (truncated, "truncated"),
        (cut_in_header, "truncated"),
        (empty, "is empty"),
        (other_file, "not a GGUF"),
        (missing, "cannot be read"),
        (a_folder, "cannot be read"),
        (big_endian, "big-endian"),
        (version_one, "version 1"),
        (endless_counts, "truncated"),
        (endless_string, "truncated"),
        (endless_array, "truncated"),
        (unknown_value_type, "unknown type 99"),
        (mmproj, "--mmproj"),
        (adapter, "'adapter'"),
        (unknown_architecture, "dodo"),
        (missing_tensor, "blk.1.ffn_up"),
    ],
)
def test_broken_files_are_one_clear_line(
    tiny: TinyModel, tmp_path: Path, make: Callable[[TinyModel, Path], Path], words: str
) -> None:
    path = make(tiny, tmp_path)
    with pytest.raises(TokcompError) as caught:
        LanguageModel.open(path, threads=1)
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message


def test_parts_of_a_split_model_are_found_and_missing_ones_named(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "whole.gguf").path
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama", split_max_tensors=8)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name):  # the token table lands in the last part
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    close(writer)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    with LanguageModel.open(parts[0], threads=1) as model:
        rows = TokenEmbedding.of(model).lookup([5, 300])
    np.testing.assert_array_equal(rows, TokenEmbedding(source).lookup([5, 300]))
    with pytest.raises(TokcompError, match=r"part 2 of 3; open the first part, m-00001-of-00003\.gguf"):
        LanguageModel.open(parts[1])
    parts[2].unlink()
    with pytest.raises(TokcompError, match=r"m-00003-of-00003\.gguf: missing"):
        LanguageModel.open(parts[0])


def test_options_out_of_range(tiny: TinyModel) -> None:
    with pytest.raises(UsageError, match="gpu_layers -2"):
        LanguageModel.open(tiny.path, gpu_layers=-2)
    with pytest.raises(UsageError, match="threads 0"):
        LanguageModel.open(tiny.path, threads=0)


@pytest.mark.skipif(llama_cpp.llama_supports_gpu_offload(), reason="this llama.cpp has a GPU")
def test_gpu_layers_without_a_gpu_build_say_how_to_get_one(tiny: TinyModel) -> None:
    with pytest.raises(TokcompError, match="CMAKE_ARGS"):
        LanguageModel.open(tiny.path, gpu_layers=-1)


def test_deepstack_model_with_too_few_layers_is_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", "qwen3vl", n_layer=3).path
    with pytest.raises(TokcompError, match="3 layers cannot take 3 deepstack slices"):
        LanguageModel.open(path)


def test_nothing_is_printed_and_exit_is_clean_with_everything_left_open(tiny: TinyModel) -> None:
    program = (
        "import sys; from edge_tokcomp.language.model import LanguageModel\n"
        "from edge_tokcomp.language.decoder import PlainDecoder\n"
        "from edge_tokcomp.language.sampling import Sampler, Sampling\n"
        "model = LanguageModel.open(sys.argv[1], threads=1)\n"
        "decoder = PlainDecoder(model, n_ctx=256); sampler = Sampler(Sampling(), model)\n"
        "try: LanguageModel.open(sys.argv[0])\n"
        "except Exception as fault: print(type(fault).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tiny.path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "TokcompError\n", "")


def test_closing_is_idempotent_and_closes_what_hangs_on_the_model(tiny: TinyModel) -> None:
    model = LanguageModel.open(tiny.path, threads=1)
    decoder = PlainDecoder(model, n_ctx=256)
    model.close()
    model.close()
    decoder.close()
    for call in (lambda: decoder.decode([]), decoder.clear, lambda: model.piece(3), lambda: PlainDecoder(model)):
        with pytest.raises(ValueError, match="is closed"):
            call()


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_lookup_equals_the_dequantised_table(tmp_path: Path, quantization: str) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", quantization=quantization).path
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight")
    table = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 64)
    tokens = np.array([7, 400, 7, 0, 415], np.int32)
    np.testing.assert_array_equal(TokenEmbedding(path).lookup(tokens), table[tokens])


def test_lookup_refuses_unknown_tokens_and_pads_to_the_width(tiny: TinyModel) -> None:
    embedding = TokenEmbedding(tiny.path, row_width=256)
    rows = embedding.lookup([3, 4])
    assert rows.shape == (2, 256)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows[:, :64], tiny.weights["token_embd.weight"][3:5])
    assert not rows[:, 64:].any()
    assert embedding.lookup(np.array([], np.int32)).shape == (0, 256)
    for bad in ([-1], [3, tiny.n_vocab]):
        with pytest.raises(ValueError, match=f"token {bad[-1]} is outside the vocabulary"):
            embedding.lookup(bad)
    for wrong in ([0.5], [[1, 2]]):
        with pytest.raises(ValueError, match="one row of integers"):
            embedding.lookup(wrong)
    with pytest.raises(ValueError, match="row_width 32"):
        TokenEmbedding(tiny.path, row_width=32)


def test_memory_stays_flat_however_large_the_table(tmp_path: Path) -> None:
    """A table of 65 MB (246 MB dequantised) is opened and read here and there."""
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_tensor("token_embd.weight", np.zeros((240_000, 272), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    close(writer)
    program = (
        "import resource, sys\n"
        "from edge_tokcomp.language.token_embedding import TokenEmbedding\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak(); embedding = TokenEmbedding(sys.argv[1])\n"
        "for start in range(0, 240_000, 4800): embedding.lookup(range(start, start + 48))\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "m.gguf"], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 20


def test_an_architecture_that_takes_no_rows_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "granite-switch")
    writer.add_tensor("token_embd.weight", np.zeros((32, 32), np.float32))
    close(writer)
    with pytest.raises(TokcompError, match=r"m\.gguf: granite-switch models take no image rows in llama\.cpp"):
        TokenEmbedding(tmp_path / "m.gguf")


def test_a_file_without_a_token_table_is_refused(tiny: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(TokcompError, match=r"no token_embd\.weight"):
        TokenEmbedding(rewrite(tiny.path, tmp_path / "m.gguf", drop="token_embd.weight"))
