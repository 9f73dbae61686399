"""The two GGUF files of the demo model against the torch model they were written from."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant
from sentencepiece import sentencepiece_model_pb2

from edge_tokcomp.export.demo.dense import pixels_of
from edge_tokcomp.export.demo.from_gguf import fit_heads, read_weights, write_vocabulary
from edge_tokcomp.export.demo.model import DemoVLM, LanguageShape, TowerShape
from edge_tokcomp.export.demo.pool import Pool, draw_part
from edge_tokcomp.export.demo.rotary import to_halves, to_pairs
from edge_tokcomp.export.demo.scenes import draw_scene
from edge_tokcomp.export.demo.to_gguf import write_language_model, write_mmproj
from edge_tokcomp.export.demo.vocabulary import AFTER_IMAGE, BEFORE_IMAGE, BOS, Vocabulary, train_vocabulary
from edge_tokcomp.vlm import VLM, load
from tiny_models import pair_order

TOWER = TowerShape(width=64, blocks=2, heads=2, hidden=128)
LANGUAGE = LanguageShape(width=64, blocks=2, heads=2, hidden=128)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.model"
    train_vocabulary(path, scenes=60)
    return path


@pytest.fixture(scope="module")
def vocabulary(trained: Path) -> Vocabulary:
    return Vocabulary(trained)


@pytest.fixture(scope="module")
def pair(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoVLM, Path]:
    torch.manual_seed(0)
    model = DemoVLM(TOWER, LANGUAGE).eval()
    folder = tmp_path_factory.mktemp("pair")
    write_language_model(folder / "lm.gguf", model, vocabulary, Quant.F32)
    write_mmproj(folder / "mmproj.gguf", model, TOWER)
    return model, folder


@pytest.fixture(scope="module")
def vlm(pair: tuple[DemoVLM, Path]) -> VLM:
    return load(pair[1] / "lm.gguf", pair[1] / "mmproj.gguf", threads=1)


def test_llama_cpp_tokenises_as_training_did(vocabulary: Vocabulary, vlm: VLM) -> None:
    texts = [BEFORE_IMAGE, AFTER_IMAGE.format(question="Is there a red circle?"), " At the top left a blue star.", " 7",
             "Grüße, 世界 🙂\ttab\n\n  two spaces", "", " ", "unfamiliarwords AND CAPS 12345"]  # fmt: skip
    for text in texts:
        ours = vlm.model.tokenize(text, add_special=False, parse_special=True).tolist()
        assert ours == vocabulary.encode(text), text


def test_any_text_survives_encoding_and_decoding(vlm: VLM) -> None:
    for text in ("Grüße, 世界 🙂", "a\tb\nc  d", "\x00\x7f ünïcödé", "ASSISTANT: yes</s"):
        tokens = vlm.model.tokenize(text, add_special=False, parse_special=False)
        assert b"".join(vlm.model.piece(int(token)) for token in tokens).decode() == text


def test_the_chat_template_writes_the_prompt_of_training(vocabulary: Vocabulary, vlm: VLM) -> None:
    from edge_tokcomp.language.prompt import chat_prompt

    before, after = chat_prompt(vlm.model, "How many stars are there?", 1).tokenize(vlm.model)
    assert before.tolist() == [BOS, *vocabulary.encode(BEFORE_IMAGE)]
    assert after.tolist() == vocabulary.encode(AFTER_IMAGE.format(question="How many stars are there?"))


def test_the_pipeline_sees_and_says_what_the_torch_model_does(
    pair: tuple[DemoVLM, Path], vocabulary: Vocabulary, vlm: VLM
) -> None:
    model, _ = pair
    scene = draw_scene((11, 0))
    question = "Which digit is on the red card?"
    with torch.no_grad():
        features = model.v(pixels_of(scene.image[None]))
        image = model.mm(features[:, 1:])
        lead = model.lm.token_embd(torch.tensor([[BOS, *vocabulary.encode(BEFORE_IMAGE)]]))
        tail = torch.tensor([vocabulary.encode(AFTER_IMAGE.format(question=question))])
        said: list[int] = []
        for _ in range(12):
            rows = torch.cat([lead, image, model.lm.token_embd(tail)], 1)
            states = model.lm(rows, torch.arange(rows.shape[1])[None], rows.shape[1], None)
            said.append(int(model.lm.output(states[0, -1]).argmax()))
            tail = torch.cat([tail, torch.tensor([said[-1:]])], 1)
    encoded = vlm.encode(scene.image)
    error = np.abs(encoded.rows.embeddings - image[0].numpy()).max() / np.abs(image.numpy()).max()
    assert error < 5e-3  # the mmproj is F16
    text = b"".join(vlm.model.piece(token) for token in said).decode(errors="replace")
    assert vlm.answer(encoded, question, max_tokens=12).text == text.strip()


def test_rotary_rows_are_reordered_to_neighbouring_pairs_and_back() -> None:
    halves = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
    pairs = to_pairs(halves, 3)
    np.testing.assert_array_equal(pairs, halves[pair_order(24, 3)])
    assert pairs[:4, 0].tolist() == [0, 20, 5, 25]  # rows 0, 4, 1, 5 of the first head
    np.testing.assert_array_equal(to_halves(pairs, 3), halves)


def test_the_files_read_back_are_the_model_they_were_written_from(pair: tuple[DemoVLM, Path]) -> None:
    model, folder = pair
    torch.manual_seed(1)
    read = DemoVLM(TOWER, LANGUAGE)
    read_weights(read, folder / "lm.gguf", folder / "mmproj.gguf")
    for name, weight in read.state_dict().items():
        if not name.startswith("aid."):
            error = (weight - model.state_dict()[name]).abs().max().item()
            assert error <= (0 if name.startswith("lm.") else 1e-3 * weight.abs().max().item()), name


def test_the_vocabulary_read_back_encodes_as_before(
    pair: tuple[DemoVLM, Path], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    write_vocabulary(pair[1] / "lm.gguf", tmp_path / "vocabulary.model")
    read = Vocabulary(tmp_path / "vocabulary.model")
    for text in (" At the top left a blue star.", "Grüße, 世界 🙂\ttab\n\n  two spaces", "12345 unfamiliarwords"):
        assert read.encode(text) == vocabulary.encode(text)
        assert read.decode(read.encode(text)) == text


def test_the_vocabulary_read_back_has_the_settings_it_was_trained_with(
    pair: tuple[DemoVLM, Path], trained: Path, tmp_path: Path
) -> None:
    write_vocabulary(pair[1] / "lm.gguf", tmp_path / "vocabulary.model")
    read, truth = (
        sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
        for path in (tmp_path / "vocabulary.model", trained)
    )
    assert read.trainer_spec == truth.trainer_spec
    for name in ("name", "precompiled_charsmap", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        assert getattr(read.normalizer_spec, name) == getattr(truth.normalizer_spec, name), name
    assert [(p.piece, p.score, p.type) for p in read.pieces] == [(p.piece, p.score, p.type) for p in truth.pieces]


def test_heads_fitted_to_a_frozen_tower_leave_it_alone(pair: tuple[DemoVLM, Path], tmp_path: Path) -> None:
    draw_part(tmp_path, 0, 12)
    model = copy.deepcopy(pair[0])
    before = fit_heads(model, Pool(tmp_path), steps=1, batch=8)
    after = fit_heads(model, Pool(tmp_path), steps=40, batch=8)
    assert after["shape"] > before["shape"]
    for name, weight in model.v.state_dict().items():
        assert torch.equal(weight, pair[0].v.state_dict()[name])
