"""Decoding rows: against tokens, against transformers, and every rule that is checked before llama.cpp."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import TinyModel, write_tiny_llama, write_tiny_model

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.language.cells import Cells
from edge_tokcomp.language.decoder import PlainDecoder
from edge_tokcomp.language.generation import generate
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.token_embedding import TokenEmbedding
from edge_tokcomp.tokens import Rows

Floats = NDArray[np.float32]
N_EMBD = 64


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_llama(tmp_path_factory.mktemp("lm") / "llama.gguf", n_layer=3)


@pytest.fixture(scope="module")
def model(tiny: TinyModel) -> Iterator[LanguageModel]:
    with LanguageModel.open(tiny.path, threads=1) as opened:
        yield opened


@pytest.fixture
def decoder(model: LanguageModel) -> Iterator[PlainDecoder]:
    with PlainDecoder(model, n_ctx=256, n_sequences=4) as made:
        yield made


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanguageModel]:
    path = write_tiny_model(tmp_path_factory.mktemp("lm") / "qwen2vl.gguf", "qwen2vl").path
    with LanguageModel.open(path, threads=1) as opened:
        yield opened


def random_rows(count: int, start: int = 0, sequence: int = 0, *, seed: int = 0, width: int = N_EMBD) -> Rows:
    values = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return Rows(values, np.arange(start, start + count, dtype=np.int32), sequence)


def wanting_all(rows: Rows) -> Rows:
    return Rows(rows.embeddings, rows.positions, rows.sequence, np.ones(len(rows), np.bool_))


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
    ],
)  # fmt: skip
def test_looked_up_rows_give_the_logits_of_the_tokens(tmp_path: Path, architecture: str, quantization: str) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", architecture, n_layer=4, quantization=quantization).path
    with LanguageModel.open(path, threads=1) as opened:
        compare_rows_with_tokens(opened, f"{architecture} {quantization}")


def compare_rows_with_tokens(model: LanguageModel, name: str) -> None:
    with PlainDecoder(model, n_ctx=256) as made:
        (found,) = made.decode([wanting_all(TokenEmbedding.of(model).rows(TOKENS, 0))])
        made.clear()
        expected = logits_of_tokens(made, TOKENS)
    difference = np.abs(found - expected).max()
    print(f"{name}: largest difference {difference}")
    assert difference <= 1e-6 * np.abs(expected).max()


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
    params.ftype = {"Q4_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K}[quantization]
    path = tmp_path / "k.gguf"
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(path), params) == 0
    with LanguageModel.open(path, threads=1) as opened:
        assert opened.header.tensors["token_embd.weight"].type_name == quantization
        compare_rows_with_tokens(opened, quantization)


def torch_llama(tiny: TinyModel) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    names = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {
        "model.embed_tokens.weight": tiny.weights["token_embd.weight"],
        "model.norm.weight": tiny.weights["output_norm.weight"],
        "lm_head.weight": tiny.weights["output.weight"],
    }
    for name, weight in tiny.weights.items():
        if name.startswith("blk."):
            _, layer, kind, leaf = name.split(".")
            state[f"model.layers.{layer}.{names[kind]}.{leaf}"] = weight
    sizes = {
        "vocab_size": tiny.n_vocab, "hidden_size": tiny.n_embd, "intermediate_size": tiny.n_ff,
        "num_hidden_layers": tiny.n_layer, "num_attention_heads": tiny.n_head, "num_key_value_heads": tiny.n_head,
        "max_position_embeddings": tiny.n_ctx_train, "rms_norm_eps": tiny.norm_eps, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": tiny.rope_base},
    }  # fmt: skip
    if tiny.architecture == "llama":
        reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    else:
        sizes["rope_parameters"] |= {"rope_type": "default", "mrope_section": [2, 3, 3]}
        reference = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLTextModel(
            transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLTextConfig(**sizes)
        )
        state = {name.removeprefix("model."): weight for name, weight in state.items() if name != "lm_head.weight"}
    reference.load_state_dict({name: torch.from_numpy(weight) for name, weight in state.items()})
    return reference.eval()


@pytest.mark.slow
def test_logits_and_greedy_text_equal_transformers(tiny: TinyModel, model: LanguageModel) -> None:
    """Text, 24 random image rows, text: f32 weights, default (f16) and f32 key-value cache."""
    torch = pytest.importorskip("torch")
    reference = torch_llama(tiny)
    embedding = TokenEmbedding.of(model)
    middle = random_rows(24, seed=3).embeddings
    rows = np.concatenate([embedding.lookup(TOKENS[:5]), middle, embedding.lookup(TOKENS[5:9])])
    with torch.no_grad():
        expected = reference(inputs_embeds=torch.from_numpy(rows)[None]).logits[0].numpy()
        answer = reference.generate(
            inputs_embeds=torch.from_numpy(rows)[None], max_new_tokens=32, do_sample=False, eos_token_id=2, pad_token_id=0
        )[0].tolist()
    prompt = Rows(rows, np.arange(len(rows), dtype=np.int32))
    for kv_type, bound in (("f16", 2e-3), ("f32", 1e-5)):
        with PlainDecoder(model, n_ctx=256, kv_type=kv_type) as made:
            (found,) = made.decode([wanting_all(prompt)])
            error = max(relative(a, b) for a, b in zip(found, expected, strict=True))
            print(f"kv {kv_type}: relative error {error:.2e}")
            assert error <= bound
            made.clear()
            run = generate(made, model, embedding, [prompt], max_tokens=32)
            run.text()
            assert run.tokens == answer
            assert len(set(answer)) > 4


@pytest.mark.slow
def test_image_positions_equal_transformers(many: LanguageModel, tmp_path: Path) -> None:
    """M-RoPE: a 4x5 image of which every third row is left out keeps its original positions."""
    torch = pytest.importorskip("torch")
    written = write_tiny_model(tmp_path / "m.gguf", "qwen2vl")
    reference = torch_llama(written)
    rows, positions = image_prompt()
    with torch.no_grad():
        hidden = reference(
            inputs_embeds=torch.from_numpy(rows)[None], position_ids=torch.from_numpy(positions[:3, None].astype(np.int64))
        )[0][0].numpy()
    expected = hidden @ written.weights["output.weight"].T
    with PlainDecoder(many, n_ctx=256, kv_type="f32") as made:
        (found,) = made.decode([wanting_all(Rows(rows, positions))])
    error = max(relative(a, b) for a, b in zip(found, expected, strict=True))
    print(f"qwen2vl: relative error {error:.2e}")
    assert error <= 1e-5


def image_prompt() -> tuple[Floats, NDArray[np.int32]]:
    """3 text rows, the kept rows of a 4x5 grid, 4 text rows; positions ``(4, n)``."""
    text, grid = np.arange(3), np.arange(20)[np.arange(20) % 3 != 0]
    after = np.arange(3 + 5, 3 + 5 + 4)
    image = np.stack([np.full(len(grid), 3), 3 + grid // 5, 3 + grid % 5, np.zeros_like(grid)])
    lead = [np.stack([where, where, where, np.zeros_like(where)]) for where in (text, after)]
    positions = np.concatenate([lead[0], image, lead[1]], axis=1).astype(np.int32)
    return random_rows(positions.shape[1], seed=5).embeddings, positions


def test_sequences_in_one_batch_equal_separate_runs(model: LanguageModel, decoder: PlainDecoder) -> None:
    prompts = [random_rows(count, sequence=index, seed=index) for index, count in enumerate((5, 17, 1))]
    together = decoder.decode([wanting_all(prompt) for prompt in prompts])
    step = decoder.decode([random_rows(1, len(prompt), index, seed=9) for index, prompt in enumerate(prompts)])
    for index, prompt in enumerate(prompts):
        with PlainDecoder(model, n_ctx=256) as alone:
            (expected,) = alone.decode([wanting_all(Rows(prompt.embeddings, prompt.positions))])
            (next_expected,) = alone.decode([random_rows(1, len(prompt), seed=9)])
        np.testing.assert_allclose(together[index], expected, atol=2e-3)
        np.testing.assert_allclose(step[index], next_expected, atol=2e-3)
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
        with PlainDecoder(model, n_ctx=256) as alone:
            alone.decode([prefix])
            (expected,) = alone.decode([Rows(tail.embeddings, tail.positions)])
        np.testing.assert_allclose(logits, expected, atol=2e-3)
    assert [decoder.length(sequence) for sequence in range(4)] == [20, 26, 26, 0]
    decoder.drop(0)
    assert decoder.room == decoder.n_ctx - 32  # the forks still hold the prefix
    decoder.drop(1)
    decoder.drop(2)
    assert decoder.room == decoder.n_ctx
    with pytest.raises(ValueError, match="sequence 3 holds 4 rows"):
        fork_into_taken(decoder)


def fork_into_taken(decoder: PlainDecoder) -> None:
    decoder.decode([random_rows(4, sequence=3), random_rows(2, sequence=0)])
    decoder.fork(0, 3)


def test_dropping_the_end_and_going_on_equals_never_having_been_there(decoder: PlainDecoder) -> None:
    rows = random_rows(12, seed=2)
    (expected,) = decoder.decode([rows])
    decoder.drop(0, 8)
    assert (decoder.length(0), decoder.room) == (8, decoder.n_ctx - 8)
    decoder.decode([random_rows(3, 8, seed=77)])
    decoder.drop(0, 8)
    (again,) = decoder.decode([part(rows, slice(8, 12))])
    np.testing.assert_allclose(again, expected, atol=2e-3)
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
    with PlainDecoder(model, n_ctx=256, n_sequences=2) as whole:
        expected = [np.concatenate([whole.decode([part(rows, slice(at, at + 1))])[0] for at in range(len(rows))])
                    for rows in batch]  # fmt: skip
    with PlainDecoder(model, n_ctx=256, n_sequences=2, n_batch=n_batch, n_ubatch=n_ubatch) as split:
        assert split.n_batch == n_batch
        found = split.decode(batch)
        assert (split.length(0), split.length(1)) == (30, 15)
    np.testing.assert_allclose(found[0], expected[0], atol=3e-3)
    np.testing.assert_allclose(found[1], expected[1][np.arange(15) % 4 != 0], atol=3e-3)


def test_last_row_is_the_default_and_none_can_be_asked_for(decoder: PlainDecoder) -> None:
    rows = random_rows(6)
    (every,) = decoder.decode([wanting_all(rows)])
    decoder.clear()
    last, none = decoder.decode([rows, Rows(rows.embeddings, rows.positions, 1, np.zeros(6, np.bool_))])
    assert (last.shape, none.shape, last.dtype) == ((1, decoder.n_vocab), (0, decoder.n_vocab), np.float32)
    np.testing.assert_allclose(last[0], every[-1], atol=2e-3)
    assert decoder.decode([]) == []


def test_several_rows_of_one_sequence_follow_one_another(model: LanguageModel, decoder: PlainDecoder) -> None:
    rows = random_rows(10, seed=6)
    first, second = decoder.decode([part(rows, slice(0, 4)), part(rows, slice(4, 10))])
    with PlainDecoder(model, n_ctx=256) as alone:
        (expected,) = alone.decode([wanting_all(rows)])
    np.testing.assert_allclose(first[0], expected[3], atol=2e-3)
    np.testing.assert_allclose(second[0], expected[9], atol=2e-3)


def test_non_causal_rows_see_one_another_and_the_switch_is_set_back(decoder: PlainDecoder) -> None:
    rows = random_rows(8, seed=7)
    changed = Rows(rows.embeddings.copy(), rows.positions)
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


def gap_inside(rows: Rows) -> Rows:
    return Rows(rows.embeddings, rows.positions + (np.arange(4) > 1).astype(np.int32), rows.sequence)


BAD_ROWS: dict[str, tuple[Callable[[Rows], Rows], str]] = {
    "wrong width": (lambda rows: random_rows(4, 3, width=48), "rows are 48 wide, llama takes 64"),
    "gap before": (lambda rows: random_rows(4, 5), "at position 5, but must follow at 3"),
    "gap inside": (gap_inside, "row 2 .* at position 6, but must follow at 5"),
    "step back": (lambda rows: random_rows(4, 2), "at position 2, but must follow at 3"),
    "no rows": (lambda rows: random_rows(0, 3), "has no rows"),
    "sequence": (lambda rows: random_rows(4, 3, sequence=4), "sequence 4 is outside 0..3"),
    "sections": (lambda rows: Rows(rows.embeddings, np.zeros((4, 4), np.int32)), "one position a row"),
    "nan": (lambda rows: Rows(rows.embeddings * np.float32("nan"), rows.positions), "row 0 .* not finite"),
    "infinite": (lambda rows: Rows(rows.embeddings / np.float32(0), rows.positions), "row 0 .* not finite"),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_and_leave_no_trace(decoder: PlainDecoder, name: str) -> None:
    bad, words = BAD_ROWS[name]
    decoder.decode([random_rows(3)])
    with pytest.raises(ValueError, match=words):
        decoder.decode([random_rows(2, sequence=1), bad(random_rows(4, 3))])
    assert (decoder.length(0), decoder.length(1), decoder.room) == (3, 0, decoder.n_ctx - 3)
    decoder.decode([random_rows(1, 3)])


def test_full_context_says_how_much_is_needed_and_every_cell_can_be_used(model: LanguageModel) -> None:
    with PlainDecoder(model, n_ctx=256, n_sequences=2) as made:
        made.decode([random_rows(200)])
        with pytest.raises(TokcompError, match=r"60 rows .* 56 of 256 .* raise n_ctx by 4 or more"):
            made.decode([random_rows(30, 200), random_rows(30, sequence=1)])
        made.decode([random_rows(26, 200), random_rows(30, sequence=1)])
        assert made.room == 0
        with pytest.raises(TokcompError, match="1 rows"):
            made.decode([random_rows(1, 30, 1)])
        made.drop(0, 100)
        made.decode([random_rows(126, 30, 1, seed=8)])
        assert made.room == 0


def test_non_causal_image_must_fit_one_micro_batch(model: LanguageModel) -> None:
    with PlainDecoder(model, n_ctx=256, n_batch=64, n_ubatch=16) as made:
        with pytest.raises(TokcompError, match="17 image rows .* n_ubatch is 16; raise n_ubatch and n_batch to 17"):
            made.decode([random_rows(17)], causal=False)
        made.decode([random_rows(16)], causal=False)
    with PlainDecoder(model, n_ctx=256) as made, pytest.raises(ValueError, match="40 logit rows"):
        made.decode([wanting_all(random_rows(40))], causal=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_ctx": 0}, "n_ctx 0"),
        ({"n_ubatch": -1}, "n_ubatch -1"),
        ({"n_sequences": 257}, "n_sequences 257"),
        ({"n_sequences": 9, "n_batch": 8}, "n_sequences 9"),
        ({"threads": 0}, "threads 0"),
        ({"kv_type": "q1"}, "kv_type 'q1'"),
    ],
)
def test_options_out_of_range(model: LanguageModel, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PlainDecoder(model, **options)


def test_context_too_large_for_the_machine_is_one_clear_line(model: LanguageModel) -> None:
    with pytest.raises(TokcompError, match=r"cannot make a context of n_ctx 2000000000 .*lower n_ctx"):
        PlainDecoder(model, n_ctx=2_000_000_000, kv_type="f32")


def test_failure_inside_llama_cpp_empties_the_sequences_of_that_batch(
    decoder: PlainDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder.decode([random_rows(5), random_rows(5, sequence=1)])
    monkeypatch.setattr("edge_tokcomp.language.decoder._check_contiguous", lambda rows, *_: (0, 0))
    with pytest.raises(TokcompError, match=r"cannot decode 2 rows \(code -1"):
        decoder.decode([random_rows(2, 50)])
    monkeypatch.undo()
    assert (decoder.length(0), decoder.length(1)) == (0, 5)
    decoder.decode([random_rows(2), random_rows(1, 5, 1)])


def test_bookkeeping_agrees_with_llama_cpp(decoder: PlainDecoder) -> None:
    """Random forks, drops and batches; the mirror and the real cache tell the same story."""
    rng = np.random.default_rng(11)
    for _ in range(60):
        sequence, other = (int(value) for value in rng.choice(4, 2, replace=False))
        action = rng.integers(4)
        if action == 0:
            decoder.drop(sequence)
        elif action == 1 and decoder.length(sequence):
            decoder.drop(sequence, int(rng.integers(decoder.length(sequence) + 1)))
        elif action == 2:
            decoder.drop(other)
            decoder.fork(sequence, other)
        elif decoder.room >= 40:
            decoder.decode([random_rows(int(rng.integers(1, 40)), decoder.length(sequence), sequence)])
        for each in range(4):
            assert decoder._context.last_position(each) == decoder.length(each) - 1
    free = decoder.room
    at = decoder.length(0)
    decoder.decode([random_rows(free, at, 0)])  # llama.cpp finds exactly as many free cells as we count
    assert decoder.room == 0


def test_mrope_rules(many: LanguageModel) -> None:
    rows, positions = image_prompt()
    with PlainDecoder(many, n_ctx=256, n_sequences=2) as made:
        (whole,) = made.decode([Rows(rows, positions)])
        assert made.length(0) == 12
        # Text as plain positions, the image in two parts: the same.
        first = Rows(rows[:3], positions[0, :3], 1)
        last = Rows(rows[16:], positions[0, 16:], 1)
        made.decode([first, Rows(rows[3:9], positions[:, 3:9], 1)])
        made.decode([Rows(rows[9:16], positions[:, 9:16], 1)])
        assert made.length(1) == 3 + 5
        (parts,) = made.decode([last])
        np.testing.assert_allclose(parts, whole, atol=2e-3)
        with pytest.raises(ValueError, match=r"text rows .* start at position 11, but must start at 12"):
            made.decode([Rows(rows[:2], np.array([11, 12], np.int32))])
        with pytest.raises(ValueError, match=r"image rows .* must start at 11 or later"):
            made.decode([Rows(rows[:2], np.array([[10, 10], [12, 12], [12, 13], [0, 0]], np.int32))])
        with pytest.raises(ValueError, match="never step back"):
            made.decode([Rows(rows[:2], np.array([14, 14], np.int32))])
        made.decode([Rows(rows[:1], np.array([40], np.int32))])  # a jump forward is allowed
        made.drop(0, 40)
        assert made.length(0) == 12


def test_unknown_token_is_refused_before_decoding(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="token 416 is outside the vocabulary"):
        TokenEmbedding.of(model).rows([1, 416], 0)


def test_closed_decoder(model: LanguageModel) -> None:
    made = PlainDecoder(model, n_ctx=256)
    made.close()
    made.close()
    with pytest.raises(ValueError, match="is closed"):
        made.decode([random_rows(1)])


def test_the_process_lives_after_every_refusal(tiny: TinyModel) -> None:
    """What would abort llama.cpp is tried in a process of its own: it must end with exit code 0."""
    program = (
        "import sys, numpy as np\n"
        "from edge_tokcomp.language.model import LanguageModel\n"
        "from edge_tokcomp.language.decoder import PlainDecoder\n"
        "from edge_tokcomp.tokens import Rows\n"
        "model = LanguageModel.open(sys.argv[1], threads=1)\n"
        "decoder = PlainDecoder(model, n_ctx=256, n_batch=16, n_ubatch=8, n_sequences=2)\n"
        "def rows(n, width=64, start=0, sequence=0):\n"
        "    return Rows(np.ones((n, width), np.float32), np.arange(start, start + n, dtype=np.int32), sequence)\n"
        "for batch, causal in (([rows(9)], False), ([rows(300)], True), ([rows(3, width=32)], True),\n"
        "                      ([rows(3, sequence=300)], True), ([rows(3, start=-1)], True)):\n"
        "    try: decoder.decode(batch, causal=causal)\n"
        "    except Exception as fault: print(type(fault).__name__)\n"
        "for call in (lambda: decoder.fork(0, 9), lambda: decoder.drop(-5), lambda: decoder.length(2)):\n"
        "    try: call()\n"
        "    except Exception as fault: print(type(fault).__name__)\n"
        "print(decoder.decode([rows(40)])[0].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tiny.path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["TokcompError"] * 2 + ["ValueError"] * 6 + ["(1,", "416)"]


def test_cells_share_forks_and_free_the_right_ones() -> None:
    cells = Cells(10, 3)
    cells.add(0, np.arange(4, dtype=np.int32))
    cells.fork(0, 1)
    cells.add(1, np.arange(4, 6, dtype=np.int32))
    assert (cells.room, cells.length(0), cells.length(1)) == (4, 4, 6)
    cells.drop(0, 2)
    assert (cells.room, cells.length(0), cells.last(0)) == (4, 2, 1)
    cells.drop(1, 3)
    assert cells.room == 7
    with pytest.raises(ValueError, match="8 rows do not fit into 7"):
        cells.add(2, np.arange(8, dtype=np.int32))
    cells.add(2, np.array([[5, 5], [9, 7], [5, 6], [0, 0]], np.int32))
    assert (cells.last(2), cells.length(2), cells.room) == (5, 10, 5)
    cells.clear()
    assert (cells.room, cells.length(1)) == (10, 0)
