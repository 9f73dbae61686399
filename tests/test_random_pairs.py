"""Random pairs of published shapes: as the published files, and run by our engines and llama.cpp's alike.

What runs has the shapes' architectures, patches, tiles and vocabulary's markers, and else is as small as can be.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from llama_cpp.llama_chat_format import MTMDChatHandler
from PIL import Image

import edge_tokcomp
from edge_tokcomp.export import random_models, random_towers
from edge_tokcomp.export.random_files import Tensor, pieces
from edge_tokcomp.export.random_pairs import BENCH_SHAPES, BenchShape, cached_pair
from edge_tokcomp.families import family_for, family_named
from edge_tokcomp.families.tower_spec import Window
from edge_tokcomp.language.mtmd import ImagePiece, MtmdEncoder
from edge_tokcomp.vlm import VLM

WIDE = np.random.default_rng(0).integers(0, 256, (223, 451, 3), np.uint8)
SQUARE = np.random.default_rng(1).integers(0, 256, (672, 672, 3), np.uint8)
QUESTION = "Describe the image."

# Image tokens of WIDE and SQUARE, by the models' papers and cards. LLaVA-1.5: 24 x 24. LLaVA-NeXT: these, and per row
# of tiles 24 lines of 24 a tile and a newline (24 (2 24 + 1) and 48 (2 24 + 1)). SmolVLM: 64 a tile of 512 pixels of a
# picture enlarged to 2048, and of the overview (4 x 2 and 4 x 4 tiles). Qwen2.5-VL: one each 28 x 28 pixels.
# InternVL3: 256 a tile of 448 pixels, and of the thumbnail (2 x 1 tiles; SQUARE has more than half of 2 x 2's pixels,
# not of 3 x 3's). Gemma 3: 256.
TOKENS = {
    "llava-1.5-7b": (576, 576),
    "llava-next-7b": (576 + 1176, 576 + 2352),
    "smolvlm-256m": (64 * 9, 64 * 17),
    "smolvlm-500m": (64 * 9, 64 * 17),
    "qwen2.5-vl-3b": (16 * 8, 24 * 24),
    "internvl3-1b": (256 * 3, 256 * 5),
    "gemma3-4b": (256, 256),
}


def tiny(shape: BenchShape) -> BenchShape:
    """The same in small; the layers are enough for Gemma 3 to have one that sees everything."""
    language = replace(
        shape.language, layers=6 if shape.language.window else 2, n_embd=128, n_ff=256, heads=2, kv_heads=1,
        head_dim=64, vocab=1200,
    )  # fmt: skip
    tower = replace(
        shape.tower.tower, width=32, heads=1, ffn_width=64, blocks=2,
        attention_block=1 if shape.tower.tower.class_token else None,
        window=shape.tower.tower.window and Window(4, (1,)),
    )  # fmt: skip
    metadata = dict(shape.tower.metadata)
    if tower.window:
        metadata["clip.vision.n_wa_pattern"] = 2
    widths = dict.fromkeys(shape.tower.widths, 128)
    return BenchShape(language, replace(shape.tower, tower=tower, widths=widths, metadata=metadata), shape.quantization)


@pytest.fixture(scope="module", params=BENCH_SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Its name and its two files."""
    return request.param, *cached_pair(tiny(BENCH_SHAPES[request.param]), tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def vlm(pair: tuple[str, Path, Path]) -> Iterator[VLM]:
    with edge_tokcomp.load(pair[1], pair[2], threads=1, engine="onnx") as vlm:
        yield vlm


@pytest.fixture(scope="module")
def handled(pair: tuple[str, Path, Path]) -> Iterator[Any]:
    """llama-cpp-python's own way to ask the same files."""
    handler = MTMDChatHandler(str(pair[2]), verbose=False, use_gpu=False)
    llama = llama_cpp.Llama(str(pair[1]), chat_handler=handler, n_ctx=4096, n_threads=1, verbose=False)
    yield llama
    llama.close()


def test_both_halves_of_every_shape_go_together() -> None:
    assert list(BENCH_SHAPES) == list(random_towers.TOWER_SHAPES)
    for shape in BENCH_SHAPES.values():
        family = family_named(shape.tower.tower.family)
        assert list(shape.tower.widths.values())[-1] == shape.language.n_embd
        assert shape.language.image == family.written.strip()
    # Both are Vicuna 7B.
    assert BENCH_SHAPES["llava-next-7b"].language is BENCH_SHAPES["llava-1.5-7b"].language


@pytest.mark.parametrize("name", BENCH_SHAPES)
def test_the_file_describes_its_tower(name: str) -> None:
    shape = random_towers.TOWER_SHAPES[name]
    writer = gguf.GGUFWriter(None, "clip")
    random_towers._describe(writer, shape)
    metadata = {key: value.value for key, value in writer.kv_data[0].items()}
    shapes = {name: tensor.extent for name, tensor in random_towers._tensors(shape).items()}
    family = family_for(metadata)
    assert family.name == shape.tower.family
    assert family.spec(metadata, shapes) == shape.tower


# Bytes of published files, less than 80 a tensor of which are names and metadata: mmproj-model-f16.gguf of
# cjpais/llava-1.6-mistral-7b-gguf and ggml-org/gemma-3-4b-it-GGUF, mmproj-…-f16.gguf of
# ggml-org/SmolVLM-{256M,500M}-Instruct-GGUF and ggml-org/Qwen2.5-VL-3B-Instruct-GGUF.
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llava-next-7b", 624_451_168),
        ("smolvlm-256m", 190_031_616),
        ("smolvlm-500m", 199_468_800),
        ("qwen2.5-vl-3b", 1_338_428_128),
        ("gemma3-4b", 851_251_104),
    ],
)
def test_towers_have_the_bytes_of_published_files(name: str, published: int) -> None:
    tensors = random_towers._tensors(random_towers.TOWER_SHAPES[name])
    assert 0 < published - sum(tensor.n_bytes for tensor in tensors.values()) < 80 * len(tensors)


def test_internvls_tower_has_the_bytes_of_the_published_one_in_q8_0() -> None:
    """mmproj-InternVL3-1B-Instruct-Q8_0.gguf: the blocks' and the projector's matrices quantised."""
    tensors = random_towers._tensors(random_towers.TOWER_SHAPES["internvl3-1b"])
    stored = 0
    for name, tensor in tensors.items():
        matrix = len(tensor.extent) == 2 and "embd" not in name
        stored += math.prod(tensor.extent) // 32 * 34 if matrix else tensor.n_bytes
    assert 0 < 332_567_840 - stored < 80 * len(tensors)


# Bytes of the published Q8_0 files of language models, of which tokenizers take some: a token's text and length, its
# type or score, merges. SmolVLM-{256M,500M}-Instruct, InternVL3-1B-Instruct, gemma-3-4b-it. Parameters: their logs.
@pytest.mark.parametrize(
    ("name", "published"),
    [("smolvlm-256m", 175_054_528), ("smolvlm-500m", 436_806_912), ("internvl3-1b", 675_206_560),
     ("gemma3-4b", 4_130_226_336)],
)  # fmt: skip
def test_language_models_have_the_bytes_of_published_files(name: str, published: int) -> None:
    shape = BENCH_SHAPES[name].language
    stored = sum(tensor.n_bytes for tensor in random_models._tensors(shape, "Q8_0").values())
    assert 15 * shape.vocab < published - stored < 45 * shape.vocab


@pytest.mark.parametrize(("name", "billions"), [("llava-1.5-7b", 6.74), ("qwen2.5-vl-3b", 3.09), ("gemma3-4b", 3.88)])
def test_language_models_have_the_parameters_of_published_files(name: str, billions: float) -> None:
    tensors = random_models._tensors(BENCH_SHAPES[name].language, "Q4_0").values()
    assert round(sum(math.prod(tensor.extent) for tensor in tensors) / 1e9, 2) == billions


def test_norms_are_about_one_and_matrices_keep_rows_in_size() -> None:
    tensors = random_towers._tensors(random_towers.TOWER_SHAPES["internvl3-1b"])
    ones = {name for name, tensor in tensors.items() if tensor.centre == 1}
    assert ones == {"mm.model.mlp.0.weight", *(f"v.blk.{n}.ln{k}.weight" for n in range(24) for k in (1, 2))}
    rng = np.random.default_rng(0)
    for kind, dtype in ((Kind.F32, "<f4"), (Kind.F16, "<f2")):
        tensor = Tensor((64, 3, 16, 16), kind)
        values = np.frombuffer(b"".join(pieces(rng, tensor)), dtype).reshape(64, -1)
        assert np.linalg.norm(values.astype(np.float32), axis=1) == pytest.approx(1, abs=0.15)


def test_pictures_have_the_published_numbers_of_tokens(pair: tuple[str, Path, Path], vlm: VLM) -> None:
    for picture, tokens in zip((WIDE, SQUARE), TOKENS[pair[0]], strict=True):
        assert vlm.encode(picture).plan.before == tokens


def test_an_answer_is_made_of_finite_numbers(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, decode = [], vlm.decoder.decode

    def watched(*rows: Any, **options: Any) -> Any:
        logits = decode(*rows, **options)
        seen.extend(each for each in logits if each.size)
        return logits

    monkeypatch.setattr(vlm.decoder, "decode", watched)
    answer = vlm.answer(WIDE, QUESTION, max_tokens=8)
    assert answer.generated_tokens > 0
    assert seen
    assert all(np.isfinite(each).all() and 0.2 < each.std() < 5 for each in seen)


def test_libmtmd_encodes_the_same_number_of_rows_a_crop(pair: tuple[str, Path, Path], vlm: VLM) -> None:
    with MtmdEncoder(pair[2], vlm.model, threads=1) as theirs:
        pieces = [piece for piece in theirs.encode(SQUARE) if isinstance(piece, ImagePiece)]
    assert all(np.isfinite(piece.embeddings).all() for piece in pieces)
    ours = vlm.encode(SQUARE).tokens.layout.grids
    assert [len(piece.embeddings) for piece in pieces] == [rows * columns for rows, columns in ours]


def test_llama_cpp_pythons_handler_is_asked_the_same(
    pair: tuple[str, Path, Path], vlm: VLM, handled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int] = []
    evaluate = handled.eval
    monkeypatch.setattr(handled, "eval", lambda tokens: fed.extend(tokens) or evaluate(tokens))
    stream = io.BytesIO()
    Image.fromarray(WIDE).save(stream, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    reply = handled.create_chat_completion([{"role": "user", "content": content}], max_tokens=4, temperature=0)
    assert reply["usage"]["completion_tokens"] > 0
    assert np.isfinite(np.ctypeslib.as_array(handled._ctx.get_logits(), (handled.n_vocab(),))).all()
    image = vlm.encode(WIDE)
    parts = vlm.asker._parts([image], QUESTION)
    ours = np.concatenate([part.tokens for part in parts])
    ours = ours[ours >= 0].tolist()
    if pair[0] == "gemma3-4b":
        # Libmtmd leaves the empty lines of the processor's text out.
        (empty,) = vlm.model.tokenize("\n\n", add_special=False, parse_special=True)
        assert ours.count(empty) == 2
        ours = [token for token in ours if token != empty]
    assert fed[: len(ours)] == ours
