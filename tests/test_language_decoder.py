"""Decoding rows: the same logits as tokens, as transformers, and however the batch is cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from decoding import Floats, exact, image_prompt, random_rows, wanting_all
from edge_tokcomp.language.batches import apart
from edge_tokcomp.language.decoder import PlainDecoder
from edge_tokcomp.language.generation import generate
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.token_embedding import TokenEmbedding, bare_rows
from edge_tokcomp.tokens import Rows
from tiny_models import TinyModel, write_tiny_llama, write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_llama(tmp_path_factory.mktemp("lm") / "llama.gguf", n_layer=3)


@pytest.fixture(scope="module")
def model(tiny: TinyModel) -> Iterator[LanguageModel]:
    with LanguageModel.open(tiny.path, threads=1) as opened:
        yield opened


@pytest.fixture
def decoder(model: LanguageModel) -> Iterator[PlainDecoder]:
    with exact(model, n_sequences=4) as made:
        yield made


def part(rows: Rows, piece: slice) -> Rows:
    return Rows(rows.embeddings[piece], rows.positions[..., piece], rows.sequence)


def relative(found: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


TOKENS = np.array([1, 291, 304, 326, 296, 261, 58, 300, 7, 400, 2, 291, 3, 288], np.int32)


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [
        ("llama", "F32"), ("llama", "F16"), ("llama", "Q8_0"), ("llama", "Q4_0"),
        ("qwen2", "Q8_0"), ("gemma2", "Q8_0"), ("gemma3", "Q8_0"), ("qwen2vl", "Q8_0"), ("qwen3vl", "Q8_0"),
        ("lfm2", "F32"),
    ],
)  # fmt: skip
def test_looked_up_rows_give_the_logits_of_the_tokens(tmp_path: Path, architecture: str, quantization: str) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", architecture, n_layer=4, quantization=quantization).path
    with LanguageModel.open(path, threads=1) as opened:
        compare_rows_with_tokens(opened, f"{architecture} {quantization}")


def compare_rows_with_tokens(model: LanguageModel, name: str) -> None:
    """Rows, tokens alone, and what llama.cpp itself makes of these."""
    with PlainDecoder(model, n_ctx=256) as made:
        (found,) = made.decode([wanting_all(TokenEmbedding.of(model).rows(TOKENS, 0))])
        made.clear()
        (bare,) = made.decode([wanting_all(bare_rows(TOKENS.tolist(), 0))])
        made.clear()
        expected = logits_of_tokens(made, TOKENS)
    np.testing.assert_array_equal(bare, expected, err_msg=name)
    difference = np.abs(found - expected).max()
    assert difference <= 1e-6 * np.abs(expected).max(), f"{name}: {difference}"


def logits_of_tokens(decoder: PlainDecoder, tokens: NDArray[np.int32]) -> Floats:
    """Token ids through llama.cpp's own batch, logits of all of them."""
    context = decoder._context.pointer
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        batch.token[index], batch.pos[index] = int(token), index
        batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    llama_cpp.llama_batch_free(batch)
    rows = [llama_cpp.llama_get_logits_ith(context, index) for index in range(len(tokens))]
    return np.stack([np.ctypeslib.as_array(row, (decoder.n_vocab,)).copy() for row in rows])


@pytest.mark.parametrize("quantization", ["Q4_K", "Q6_K"])
def test_block_quantised_token_tables(tmp_path: Path, quantization: str) -> None:
    """Types that only llama.cpp can write: the whole file is quantised by it, as published files are."""
    source = write_tiny_llama(tmp_path / "f32.gguf", n_embd=256, n_head=4, n_layer=1).path
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.pure = 1, True
    params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + {"Q4_K": "Q4_K_M"}.get(quantization, quantization))
    path = tmp_path / "k.gguf"
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(path), params) == 0
    with LanguageModel.open(path, threads=1) as opened:
        assert opened.header.tensors["token_embd.weight"].type_name == quantization
        compare_rows_with_tokens(opened, quantization)


@pytest.mark.slow
def test_logits_and_greedy_text_equal_transformers(tiny: TinyModel, model: LanguageModel) -> None:
    """Text, 24 random image rows, text: f32 weights, default (f16) and f32 key-value cache."""
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("by_transformers").torch_llama(tiny)
    embedding = TokenEmbedding.of(model)
    middle = random_rows(24, seed=3).embeddings
    rows = np.concatenate([embedding.lookup(TOKENS[:5]), middle, embedding.lookup(TOKENS[5:9])])
    with torch.no_grad():
        expected = reference(inputs_embeds=torch.from_numpy(rows)[None]).logits[0].numpy()
        options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
        answer = reference.generate(inputs_embeds=torch.from_numpy(rows)[None], **options)[0].tolist()
    prompt = Rows(rows, np.arange(len(rows), dtype=np.int32))
    for kv_type, bound in (("f16", 2e-3), ("f32", 1e-5)):
        with PlainDecoder(model, n_ctx=256, kv_type=kv_type) as made:
            (found,) = made.decode([wanting_all(prompt)])
            error = max(relative(a, b) for a, b in zip(found, expected, strict=True))
            assert error <= bound, f"cache {kv_type}: {error}"
            made.clear()
            run = generate(made, model, embedding, [prompt], max_tokens=32)
            run.text()
            assert run.tokens == answer
            assert len(set(answer)) > 4


@pytest.mark.slow
def test_image_positions_equal_transformers(tmp_path: Path) -> None:
    """M-RoPE: a 4x5 image of which every third row is left out keeps its original positions."""
    torch = pytest.importorskip("torch")
    written = write_tiny_model(tmp_path / "m.gguf", "qwen2vl")
    reference = pytest.importorskip("by_transformers").torch_llama(written)
    rows, positions = image_prompt()
    with torch.no_grad():
        where = torch.from_numpy(positions[:3, None].astype(np.int64))
        hidden = reference(inputs_embeds=torch.from_numpy(rows)[None], position_ids=where)[0][0].numpy()
    expected = hidden @ written.weights["output.weight"].T
    with LanguageModel.open(written.path, threads=1) as many, exact(many) as made:
        (found,) = made.decode([wanting_all(Rows(rows, positions))])
    error = max(relative(a, b) for a, b in zip(found, expected, strict=True))
    assert error <= 1e-4


def test_sequences_in_one_batch_equal_separate_runs(model: LanguageModel, decoder: PlainDecoder) -> None:
    prompts = [random_rows(count, sequence=index, seed=index) for index, count in enumerate((5, 17, 1))]
    together = decoder.decode([wanting_all(prompt) for prompt in prompts])
    step = decoder.decode([random_rows(1, len(prompt), index, seed=9) for index, prompt in enumerate(prompts)])
    for index, prompt in enumerate(prompts):
        with exact(model) as alone:
            (expected,) = alone.decode([wanting_all(Rows(prompt.embeddings, prompt.positions))])
            (next_expected,) = alone.decode([random_rows(1, len(prompt), seed=9)])
        np.testing.assert_allclose(together[index], expected, atol=1e-4)
        np.testing.assert_allclose(step[index], next_expected, atol=1e-4)
        assert decoder.length(index) == len(prompt) + 1


def test_fork_of_a_shared_prefix_equals_a_full_run(model: LanguageModel, decoder: PlainDecoder) -> None:
    prefix = random_rows(20, seed=1)
    tails = [random_rows(6, 20, sequence, seed=10 + sequence) for sequence in (1, 2)]
    decoder.decode([prefix])
    for sequence in (1, 2):
        decoder.fork(0, sequence)
    assert decoder.room == decoder.n_ctx - 20
    found = decoder.decode(tails)
    assert decoder.room == decoder.n_ctx - 32
    for logits, tail in zip(found, tails, strict=True):
        with exact(model) as alone:
            alone.decode([prefix])
            (expected,) = alone.decode([Rows(tail.embeddings, tail.positions)])
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert [decoder.length(sequence) for sequence in range(4)] == [20, 26, 26, 0]
    decoder.drop(0)
    assert decoder.room == decoder.n_ctx - 32  # the forks still hold the prefix
    decoder.drop(1)
    decoder.drop(2)
    assert decoder.room == decoder.n_ctx
    decoder.decode([random_rows(4, sequence=3), random_rows(2, sequence=0)])
    with pytest.raises(ValueError, match="sequence 3 holds 4 rows"):
        decoder.fork(0, 3)


def test_dropping_the_end_and_going_on_equals_never_having_been_there(decoder: PlainDecoder) -> None:
    rows = random_rows(12, seed=2)
    (expected,) = decoder.decode([rows])
    decoder.drop(0, 8)
    assert (decoder.length(0), decoder.room) == (8, decoder.n_ctx - 8)
    decoder.decode([random_rows(3, 8, seed=77)])
    decoder.drop(0, 8)
    (again,) = decoder.decode([part(rows, slice(8, 12))])
    np.testing.assert_allclose(again, expected, atol=1e-4)
    decoder.drop(0)
    (whole,) = decoder.decode([rows])
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    decoder.clear()
    assert (decoder.length(0), decoder.room) == (0, decoder.n_ctx)


@pytest.mark.parametrize(("n_batch", "n_ubatch"), [(7, 7), (16, 4), (40, 16)])
def test_splitting_over_n_batch_equals_one_call(model: LanguageModel, n_batch: int, n_ubatch: int) -> None:
    """45 rows in two sequences with 41 wanted logits, more than the 32 of one call."""
    first, second = random_rows(30, seed=4), random_rows(15, sequence=1, seed=5)
    batch = [wanting_all(first), Rows(second.embeddings, second.positions, 1, np.arange(15) % 4 != 0)]
    with exact(model, n_sequences=2) as whole:
        expected = [np.concatenate([whole.decode([part(rows, slice(at, at + 1))])[0] for at in range(len(rows))])
                    for rows in batch]  # fmt: skip
    with exact(model, n_sequences=2, n_batch=n_batch, n_ubatch=n_ubatch) as split:
        assert split.n_batch == n_batch
        found = split.decode(batch)
        assert (split.length(0), split.length(1)) == (30, 15)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(found[1], expected[1][np.arange(15) % 4 != 0], atol=1e-4)


def test_last_row_is_the_default_and_none_can_be_asked_for(decoder: PlainDecoder) -> None:
    rows = random_rows(6)
    (every,) = decoder.decode([wanting_all(rows)])
    decoder.clear()
    last, none = decoder.decode([rows, Rows(rows.embeddings, rows.positions, 1, np.zeros(6, np.bool_))])
    assert (last.shape, none.shape, last.dtype) == ((1, decoder.n_vocab), (0, decoder.n_vocab), np.float32)
    np.testing.assert_allclose(last[0], every[-1], atol=1e-4)
    assert decoder.decode([]) == []


def test_several_rows_of_one_sequence_follow_one_another(model: LanguageModel, decoder: PlainDecoder) -> None:
    rows = random_rows(10, seed=6)
    first, second = decoder.decode([part(rows, slice(0, 4)), part(rows, slice(4, 10))])
    with exact(model) as alone:
        (expected,) = alone.decode([wanting_all(rows)])
    np.testing.assert_allclose(first[0], expected[3], atol=1e-4)
    np.testing.assert_allclose(second[0], expected[9], atol=1e-4)


def test_non_causal_rows_see_one_another_and_the_switch_is_set_back(decoder: PlainDecoder) -> None:
    rows = replace(random_rows(8, seed=7), crop=np.zeros(8, np.int64))
    changed = replace(rows, embeddings=rows.embeddings.copy())
    changed.embeddings[-1] += 1
    seen = []
    for causal in (True, False):
        first = decoder.decode([wanting_all(rows)], causal=causal)[0][0]
        decoder.clear()
        other = decoder.decode([wanting_all(changed)], causal=causal)[0][0]
        decoder.clear()
        seen.append(bool(np.abs(first - other).max() > 1e-2))
    assert seen == [False, True]
    (after,) = decoder.decode([wanting_all(rows)])
    decoder.clear()
    (again,) = decoder.decode([wanting_all(changed)])
    np.testing.assert_allclose(after[0], again[0], atol=1e-4)  # causal again


def test_images_see_themselves_and_text_what_stands_before_whatever_else_is_in_the_batch(model: LanguageModel) -> None:
    """One call for several sequences gives what a call for each ``Rows`` gives."""

    def rows(start: int, count: int, sequence: int, image: int = -1) -> Rows:
        made = random_rows(count, start, sequence, seed=10 * sequence + start)
        return wanting_all(replace(made, crop=np.full(count, image)))

    batch = [
        rows(0, 3, 0), rows(0, 9, 1, 0), rows(3, 8, 0, 0), rows(11, 7, 0, 1), rows(9, 1, 1), rows(18, 2, 0),
        rows(20, 5, 0, 2), rows(0, 4, 2), rows(25, 6, 0),
    ]  # fmt: skip
    # Two images behind one another are apart, text comes as late as it can.
    assert apart(batch) == [[0], [2], [3], [5], [1], [6], [4, 7, 8]]
    with exact(model, n_sequences=3) as decoder:
        together = decoder.decode(batch, causal=False)
        after = decoder.decode([random_rows(1, at, n, seed=99) for n, at in ((0, 31), (1, 10), (2, 4))], causal=False)
        decoder.clear()
        for part, found in zip(batch, together, strict=True):
            (expected,) = decoder.decode([part], causal=False)
            np.testing.assert_allclose(found, expected, atol=1e-4)
        for (sequence, at), found in zip(((0, 31), (1, 10), (2, 4)), after, strict=True):
            (expected,) = decoder.decode([random_rows(1, at, sequence, seed=99)])
            np.testing.assert_allclose(found, expected, atol=1e-4)
        decoder.clear()
        looking_back = decoder.decode(batch)
    for image in (1, 2, 3, 6):
        assert np.abs(looking_back[image] - together[image]).max() > 1e-2
    np.testing.assert_allclose(looking_back[0], together[0], atol=1e-4)


def test_hybrid_models_fork_exactly_and_say_that_they_cannot_be_cut_back(tmp_path: Path) -> None:
    """LFM2: convolution states besides the cache."""
    path = write_tiny_model(tmp_path / "m.gguf", "lfm2", n_layer=4).path
    with LanguageModel.open(path, threads=1) as hybrid, exact(hybrid, n_sequences=4) as made:
        prefix = random_rows(9, seed=1)
        made.decode([prefix])
        made.fork(0, 1)
        made.fork(0, 2)
        tails = [random_rows(count, 9, sequence, seed=sequence) for sequence, count in ((1, 5), (2, 3))]
        found = made.decode(tails)
        steps = made.decode([random_rows(1, 14, 1, seed=8), random_rows(1, 12, 2, seed=9)])
        for tail, logits, step in zip(tails, found, steps, strict=True):
            with exact(hybrid) as alone:
                (expected,) = alone.decode([prefix, Rows(tail.embeddings, tail.positions)])[1:]
                (next_expected,) = alone.decode([random_rows(1, 9 + len(tail), seed=7 + tail.sequence)])
            np.testing.assert_allclose(logits, expected, atol=1e-4)
            np.testing.assert_allclose(step, next_expected, atol=1e-4)
        with pytest.raises(ValueError, match="lfm2 model cannot forget a part of a sequence"):
            made.drop(1, 10)
        made.drop(1)
        made.fork(0, 1)
        (again,) = made.decode([tails[0]])
        np.testing.assert_allclose(again, found[0], atol=1e-4)
