"""Sampling, and text streamed from tokens: characters, stop strings, ends and lengths."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.language.decoder import PlainDecoder
from edge_tokcomp.language.generation import Generation, generate
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.sampling import Sampler, Sampling
from edge_tokcomp.language.text_stream import TextStream
from edge_tokcomp.language.token_embedding import TokenEmbedding
from edge_tokcomp.tokens import Rows
from tiny_models import EOS, IM_END, TinyModel, byte_token, write_tiny_llama

N_VOCAB = 416


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_llama(tmp_path_factory.mktemp("lm") / "llama.gguf")


@pytest.fixture(scope="module")
def model(tiny: TinyModel) -> Iterator[LanguageModel]:
    with LanguageModel.open(tiny.path, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def embedding(model: LanguageModel) -> TokenEmbedding:
    return TokenEmbedding.of(model)


def some_logits(seed: int = 0) -> NDArray[np.float32]:
    return (3 * np.random.default_rng(seed).standard_normal(N_VOCAB)).astype(np.float32)


def draw(model: LanguageModel, sampling: Sampling, count: int = 200) -> list[int]:
    with Sampler(sampling, model) as sampler:
        return [sampler.sample(some_logits()) for _ in range(count)]


def test_greedy_and_top_k_one_pick_the_maximum(model: LanguageModel) -> None:
    with Sampler(Sampling(), model) as greedy, Sampler(Sampling(temperature=1.5, top_k=1), model) as single:
        for seed in range(20):
            assert greedy.sample(some_logits(seed)) == single.sample(some_logits(seed)) == some_logits(seed).argmax()


def test_the_seed_decides(model: LanguageModel) -> None:
    first = draw(model, Sampling(temperature=1.0, seed=7))
    assert first == draw(model, Sampling(temperature=1.0, seed=7))
    assert first != draw(model, Sampling(temperature=1.0, seed=8))


def test_draws_follow_the_probabilities(model: LanguageModel) -> None:
    logits = np.full(N_VOCAB, -100, np.float32)
    logits[[5, 6, 7]] = np.log([0.6, 0.3, 0.1])
    with Sampler(Sampling(temperature=1.0, seed=1), model) as sampler:
        counts = np.bincount([sampler.sample(logits) for _ in range(3000)], minlength=8)[5:8]
    np.testing.assert_allclose(counts / 3000, [0.6, 0.3, 0.1], atol=0.04)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=2.0, top_k=5),
        Sampling(temperature=1.0, top_p=0.5),
        Sampling(temperature=1.0, min_p=0.3),
    ],
)
def test_cuts_leave_only_the_tokens_they_name(model: LanguageModel, sampling: Sampling) -> None:
    logits = some_logits().astype(np.float64)
    order = np.argsort(-logits)
    probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    if sampling.top_k:
        allowed = order[: sampling.top_k]
    elif sampling.top_p < 1:
        allowed = order[: int(np.searchsorted(np.cumsum(probability[order]), sampling.top_p)) + 1]
    else:
        allowed = np.flatnonzero(probability >= sampling.min_p * probability.max())
    assert set(draw(model, sampling, 500)) == set(allowed.tolist())


def test_repeat_penalty_turns_to_other_tokens(model: LanguageModel) -> None:
    with Sampler(Sampling(repeat_penalty=5.0), model) as sampler:
        chosen = [sampler.sample(np.abs(some_logits())) for _ in range(6)]
    assert len(set(chosen)) == 6


def test_a_grammar_leaves_only_what_it_allows(model: LanguageModel) -> None:
    with Sampler(Sampling(grammar='root ::= "ab" [0-9]'), model) as sampler:
        tokens = [sampler.sample(some_logits(seed)) for seed in range(4)]
    assert re.fullmatch("ab[0-9]", model.detokenize(np.array(tokens[:3], np.int32)))
    assert model.is_end(tokens[3])


def test_a_grammar_that_cannot_be_read_is_refused(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="the grammar cannot be read; write GBNF"):
        Sampler(Sampling(grammar="root ::= ("), model)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
        {"min_p": 1.0}, {"repeat_penalty": 0.0}, {"seed": -1}, {"seed": 2**32 - 1},
    ],
)  # fmt: skip
def test_sampling_out_of_range_names_value_and_range(options: dict[str, float]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(UsageError, match=rf"{name} {value} is out of range: it must be"):
        Sampling(**options)  # type: ignore[arg-type]


def test_unusable_logits(model: LanguageModel) -> None:
    with Sampler(Sampling(), model) as sampler:
        with pytest.raises(ValueError, match=r"logits \(3,\) must be \(416,\)"):
            sampler.sample(np.zeros(3, np.float32))
        broken = some_logits()
        broken[3] = np.nan
        with pytest.raises(TokcompError, match="not numbers"):
            sampler.sample(broken)
        suppressed = some_logits()
        suppressed[10:] = -np.inf
        assert sampler.sample(suppressed) == suppressed.argmax()
    with pytest.raises(ValueError, match="is closed"):
        sampler.sample(some_logits())


def feed(stream: TextStream, *pieces: bytes) -> list[str]:
    return [*(stream.push(piece) for piece in pieces), stream.finish()]


def test_characters_split_over_tokens_are_shown_whole() -> None:
    assert feed(TextStream(), b"a\xe6", b"\x97", b"\xa5\xe6\x9c", b"\xac!") == ["a", "", "日", "本!", ""]
    assert feed(TextStream(), "😀".encode()[:3]) == ["", ""]  # never finished: left out
    assert feed(TextStream(), b"a\xffb") == ["a�b", ""]  # no character at all


def test_stop_strings_split_over_tokens() -> None:
    stream = TextStream(["###", "STOP"])
    assert feed(stream, b"one #", b"# two ST", b"ART #", b"#", b"# three") == ["one ", "## two ", "START ", "", "", ""]
    assert stream.stopped
    assert feed(TextStream(["###"]), b"tail ##") == ["tail ", "##"]
    assert feed(TextStream(["日本"]), b"a\xe6\x97", b"\xa5\xe6", b"\x9c\xac", b"x") == ["a", "", "", "", ""]
    assert feed(TextStream(["bc", "abcd"]), b"xab", b"c") == ["x", "a", ""]  # whichever begins first and is whole
    assert feed(TextStream(["aab"]), b"a", b"a", b"a", b"b") == ["", "", "a", "", ""]


def test_bad_stop_strings() -> None:
    with pytest.raises(UsageError, match="must be a list"):
        TextStream("end")
    with pytest.raises(UsageError, match="empty stop string"):
        TextStream(["end", ""])


class Script:
    """A decoder that answers with given tokens, whatever it is fed; it notes what it was fed."""

    n_ctx = n_batch = n_ubatch = 64
    n_sequences, n_vocab, row_width = 2, N_VOCAB, 64
    takes_bare = False

    def __init__(self, tokens: Sequence[int], room: int = 64) -> None:
        self.tokens, self.room = list(tokens), room
        self.fed: list[Rows] = []

    def decode(self, batch: Sequence[Rows], *, causal: bool = True) -> list[NDArray[np.float32]]:
        self.fed += batch
        self.room -= sum(len(rows) for rows in batch)
        logits = np.zeros((1, N_VOCAB), np.float32)
        logits[0, self.tokens.pop(0)] = 1
        silent = [np.empty((0, N_VOCAB), np.float32)] * (len(batch) - 1)
        return [*silent, logits]

    def length(self, sequence: int) -> int:
        return sum(len(rows) for rows in self.fed if rows.sequence == sequence)

    def fork(self, source: int, target: int) -> None:
        raise NotImplementedError

    def drop(self, sequence: int, start: int | None = None) -> None:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError


def scripted(model: LanguageModel, embedding: TokenEmbedding, tokens: Sequence[int], **options: object) -> Generation:
    room = int(str(options.pop("room", 64)))
    prompt = [embedding.rows([1, 270, 271], 0)]
    return generate(Script(tokens, room), model, embedding, prompt, **options)  # type: ignore[arg-type]


def test_end_token_stops_and_is_not_shown(model: LanguageModel, embedding: TokenEmbedding) -> None:
    for end in (EOS, IM_END):
        run = scripted(model, embedding, [byte_token(ord("h")), byte_token(ord("i")), end, 50])
        assert (list(run), run.finish_reason, len(run.tokens)) == (["h", "i"], "stop", 3)
    assert run.first_token_s > 0
    assert run.generate_s >= 0


def test_max_tokens_and_stop_strings_end_the_text(model: LanguageModel, embedding: TokenEmbedding) -> None:
    tokens = [byte_token(value) for value in b"one END two"]
    run = scripted(model, embedding, tokens, max_tokens=4)
    assert (run.text(), run.finish_reason, len(run.tokens)) == ("one ", "length", 4)
    run = scripted(model, embedding, tokens, stop=["END"], max_tokens=10)
    assert (run.text(), run.finish_reason, len(run.tokens)) == ("one ", "stop", 7)
    run = scripted(model, embedding, tokens, stop=["ENDS"], max_tokens=7)
    assert (list(run)[-1], run.finish_reason) == ("END", "length")  # what was held back comes at the end


def test_half_a_character_is_never_shown(model: LanguageModel, embedding: TokenEmbedding) -> None:
    tokens = [byte_token(value) for value in "é日".encode()]
    assert list(scripted(model, embedding, [*tokens, EOS])) == ["é", "日"]
    assert list(scripted(model, embedding, tokens, max_tokens=4)) == ["é"]


def test_a_full_context_ends_generation_and_says_so(model: LanguageModel, embedding: TokenEmbedding) -> None:
    run = scripted(model, embedding, [byte_token(ord("x"))] * 20, room=8)
    assert (run.text(), run.finish_reason) == ("x" * 6, "context")  # 3 prompt rows, 5 more, and the last is not fed


def test_generated_tokens_follow_the_prompt_and_only_the_last_row_is_scored(
    model: LanguageModel, embedding: TokenEmbedding
) -> None:
    decoder = Script([300, 301, EOS])
    image = Rows(np.ones((4, 64), np.float32), np.arange(2, 6, dtype=np.int32), 1)
    prompt = [embedding.rows([1, 270], 0, 1), image, embedding.rows([271], 6, 1)]
    run = generate(decoder, model, embedding, prompt)
    assert decoder.fed == []  # nothing happens before the first `next`
    run.text()
    assert [rows.positions.tolist() for rows in decoder.fed[3:]] == [[7], [8]]
    assert {rows.sequence for rows in decoder.fed} == {1}
    np.testing.assert_array_equal(decoder.fed[3].embeddings, embedding.lookup([300]))
    asked = [rows.want_logits for rows in decoder.fed[:3]]
    assert asked[2] is None
    assert not np.any(asked[0])
    assert not np.any(asked[1])


def test_bad_calls(model: LanguageModel, embedding: TokenEmbedding) -> None:
    with pytest.raises(UsageError, match="max_tokens 0"):
        scripted(model, embedding, [EOS], max_tokens=0)
    with pytest.raises(ValueError, match="one or more Rows of one sequence"):
        generate(Script([]), model, embedding, [])
    with pytest.raises(ValueError, match=r"one or more Rows of one sequence, got \[0, 1\]"):
        generate(Script([]), model, embedding, [embedding.rows([1], 0, 0), embedding.rows([1], 0, 1)])


def test_greedy_run_equals_argmax_over_full_prefills(model: LanguageModel, embedding: TokenEmbedding) -> None:
    """Token by token with a cache against a fresh prefill of everything so far."""
    prompt = model.tokenize("the red cat", add_special=True, parse_special=True)
    options = {"n_ctx": 256, "kv_type": "f32"}
    with PlainDecoder(model, **options) as decoder:  # type: ignore[arg-type]
        run = generate(decoder, model, embedding, [embedding.rows(prompt, 0)], max_tokens=12)
        text = run.text()
        assert decoder.length(0) == len(prompt) + len(run.tokens) - 1
    tokens: list[int] = []
    with PlainDecoder(model, **options) as fresh:  # type: ignore[arg-type]
        while len(tokens) < len(run.tokens):
            fresh.clear()
            (logits,) = fresh.decode([embedding.rows([*prompt, *tokens], 0)])
            tokens.append(int(logits[0].argmax()))
    assert run.tokens == tokens
    assert text == b"".join(model.piece(token) for token in tokens).decode(errors="replace")[: len(text)]
