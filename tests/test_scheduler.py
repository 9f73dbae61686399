"""Many requests in one batch: every text is what it is alone, whatever else is computed beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cut_models import cut_model, make_prompt
from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.language.decoder import Decoder, PlainDecoder
from edge_tokcomp.language.generation import generate
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.requests import Completion, Request
from edge_tokcomp.language.sampling import Sampling
from edge_tokcomp.language.scheduler import Scheduler
from edge_tokcomp.language.token_embedding import TokenEmbedding
from edge_tokcomp.methods.layer_steps import read_layer_steps
from edge_tokcomp.tokens import Rows
from tiny_models import TinyModel, write_tiny_model

ARCHITECTURES = ("llama", "qwen2vl", "qwen3vl", "gemma3", "lfm2")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path = tmp_path_factory.mktemp("lm") / "model.gguf"
    return write_tiny_model(path, request.param, n_layer=4)


@pytest.fixture(scope="module")
def model(tiny: TinyModel) -> Iterator[LanguageModel]:
    with LanguageModel.open(tiny.path, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TinyModel, LanguageModel]]:
    tiny = write_tiny_model(tmp_path_factory.mktemp("lm") / "llama.gguf", "llama")
    with LanguageModel.open(tiny.path, threads=1) as opened:
        yield tiny, opened


def open_decoder(model: LanguageModel, sequences: int = 5, n_ctx: int = 512, **options: Any) -> PlainDecoder:
    """A decoder whose cache rounds nothing, so that what else is in a batch shows only where it must not."""
    return PlainDecoder(model, n_ctx=n_ctx, n_sequences=sequences, kv_type="f32", threads=1, **options)


def request(tiny: TinyModel, number: int, *, max_tokens: int = 8, lead: int = 4, **options: Any) -> Request:
    """Text, a picture of its own size, text; the first text is the same for all."""
    prefix = make_prompt(tiny, lead, seed=77).parts
    prompt = make_prompt(tiny, lead, (3 + number % 3, 4 + number % 2), 2 + number % 4, seed=number)
    sampling = options.pop("sampling", Sampling())
    return Request(prefix, ("lead", lead), prompt.parts[1:], sampling, max_tokens, **options)


def alone(
    decoder: Decoder, model: LanguageModel, request: Request, *, causal: bool = True
) -> tuple[tuple[int, ...], Any]:
    """Tokens and finish reason of a request that has the decoder to itself."""
    decoder.clear()
    silent = [
        replace(rows, sequence=1, want_logits=np.zeros(len(rows), np.bool_))
        for rows in [*request.prefix, *request.rows]
    ]
    run = generate(
        decoder, model, TokenEmbedding.of(model), silent, request.sampling, max_tokens=request.max_tokens,
        stop=request.stop, causal=causal,
    )  # fmt: skip
    run.text()
    return tuple(run.tokens), run.finish_reason


def run_all(scheduler: Scheduler, requests: Sequence[Request]) -> list[Completion]:
    """Submit all, step to the end; in the order of their submission."""
    for request in requests:
        scheduler.submit(request)
    found: list[Completion] = []
    while scheduler.busy:
        found += scheduler.step()
    return sorted(found, key=lambda completion: completion.ticket)


@pytest.mark.parametrize("chunk", [7, 512])
def test_every_text_is_what_it_is_alone(tiny: TinyModel, model: LanguageModel, chunk: int) -> None:
    causal = tiny.architecture != "gemma3"
    requests = [request(tiny, number, max_tokens=3 + 5 * (number % 4)) for number in range(9)]
    embedding = TokenEmbedding.of(model)
    with open_decoder(model) as decoder:
        expected = [alone(decoder, model, each, causal=causal) for each in requests]
        scheduler = Scheduler(decoder, model, embedding, causal=causal, chunk=chunk)
        found = run_all(scheduler, requests)
        assert [(each.tokens, each.finish_reason) for each in found] == expected
        assert decoder.room == decoder.n_ctx - 4  # the prefix stays
    assert len({tokens for tokens, _ in expected}) > 4
    assert scheduler.steps < sum(len(tokens) for tokens, _ in expected)


@pytest.mark.parametrize("text", ["spectrum@2:0.5", "fastv@2:0.5", "pyramid@2:0.6+fastv@2:0.3", "dart@2:0.4"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2vl", "gemma3"])
def test_texts_in_layer_segments_are_what_they_are_alone(architecture: str, text: str, tmp_path: Any) -> None:
    cut, causal = cut_model(tmp_path, architecture, [2]), architecture != "gemma3"
    requests = [request(cut.tiny, number, max_tokens=3 + 2 * number) for number in range(5)]
    with cut.segmented(read_layer_steps(text), n_sequences=4) as decoder:
        expected = [alone(decoder, decoder.model, each, causal=causal) for each in requests]
        embedding = TokenEmbedding(decoder.model.path, row_width=decoder.row_width)
        scheduler = Scheduler(decoder, decoder.model, embedding, causal=causal, chunk=16)
        found = run_all(scheduler, requests)
        assert [(each.tokens, each.finish_reason) for each in found] == expected
        assert all(each.layer_share < 1 for each in found)


def test_long_prompts_in_layer_segments_are_generated_from_at_once(tmp_path: Any) -> None:
    """Each has more rows than a segment computes at once, and comes whole; the others go on meanwhile."""
    cut = cut_model(tmp_path, "llama", [1, 2, 4])
    with cut.segmented(read_layer_steps("spectrum@2:0.5"), n_sequences=5, n_ctx=1024) as decoder:
        prompts = [make_prompt(cut.tiny, 4, (13, 14), 3, seed=number).parts for number in range(4)]
        requests = [Request((), number, prompt, Sampling(ignore_end=True), 20) for number, prompt in enumerate(prompts)]
        assert decoder.n_ubatch < requests[0].length < decoder.chunk
        embedding = TokenEmbedding(decoder.model.path, row_width=decoder.row_width)
        scheduler = Scheduler(decoder, decoder.model, embedding)
        assert [len(each.tokens) for each in run_all(scheduler, requests)] == [20] * 4
    assert scheduler.steps < 30


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are admitted without room for what they come to."""
    monkeypatch.setattr("edge_tokcomp.language.requests.AHEAD", 1)


@pytest.mark.usefixtures("careless")
def test_what_a_full_context_throws_out_comes_to_the_same_text(tiny: TinyModel, model: LanguageModel) -> None:
    causal = tiny.architecture != "gemma3"
    requests = [request(tiny, number, max_tokens=90) for number in range(6)]
    embedding = TokenEmbedding.of(model)
    with open_decoder(model, n_ctx=256) as decoder:
        expected = [alone(decoder, model, each, causal=causal) for each in requests]
        scheduler = Scheduler(decoder, model, embedding, causal=causal)
        assert [(each.tokens, each.finish_reason) for each in run_all(scheduler, requests)] == expected
    assert scheduler.given_up > 0


@pytest.mark.usefixtures("careless")
def test_a_text_thrown_out_of_layer_segments_comes_to_the_same(tmp_path: Any) -> None:
    cut = cut_model(tmp_path, "llama", [2])
    requests = [request(cut.tiny, number, max_tokens=90) for number in range(10)]
    with cut.segmented(read_layer_steps("fastv@2:0.5"), n_sequences=9, n_ctx=256) as decoder:
        expected = [alone(decoder, decoder.model, each) for each in requests]
        scheduler = Scheduler(decoder, decoder.model, TokenEmbedding(decoder.model.path, row_width=decoder.row_width))
        assert [(each.tokens, each.finish_reason) for each in run_all(scheduler, requests)] == expected
    assert scheduler.given_up > 0


def test_a_text_that_fills_the_context_ends_where_it_does_alone(llama: tuple[TinyModel, LanguageModel]) -> None:
    """Beside another of an other beginning, which must not hold any of it in the end."""
    tiny, model = llama
    requests = [request(tiny, 1, max_tokens=500), request(tiny, 2, max_tokens=40, lead=9)]
    with open_decoder(model, n_ctx=256) as decoder:
        expected = [alone(decoder, model, each) for each in requests]
        found = run_all(Scheduler(decoder, model, TokenEmbedding.of(model)), requests)
    assert [(each.tokens, each.finish_reason) for each in found] == expected
    assert [each.finish_reason for each in found] == ["context", "length"]


def test_samplers_are_their_own(llama: tuple[TinyModel, LanguageModel]) -> None:
    tiny, model = llama
    samplings = [
        Sampling(temperature=1.2, seed=1), Sampling(), Sampling(temperature=1.2, seed=2), Sampling(repeat_penalty=3.0),
        Sampling(grammar='root ::= [a-z] [a-z] [0-9] "!"'),
    ]  # fmt: skip
    requests = [request(tiny, 3, max_tokens=20, sampling=sampling) for sampling in samplings]
    with open_decoder(model) as decoder:
        expected = [alone(decoder, model, each) for each in requests]
        found = run_all(Scheduler(decoder, model, TokenEmbedding.of(model)), requests)
    assert [(each.tokens, each.finish_reason) for each in found] == expected
    assert len({tokens for tokens, _ in expected}) == 5
    assert found[4].text[3:] == "!"


def test_a_stop_string_ends_one_text_only(llama: tuple[TinyModel, LanguageModel]) -> None:
    tiny, model = llama
    with open_decoder(model) as decoder:
        scheduler = Scheduler(decoder, model, TokenEmbedding.of(model))
        (whole,) = run_all(scheduler, [request(tiny, 5, max_tokens=30)])
        stop = whole.text[10:13]
        found = run_all(scheduler, [request(tiny, 5, max_tokens=30, stop=[stop]), request(tiny, 5, max_tokens=30)])
    assert (found[0].text, found[0].finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert (found[1].text, found[1].finish_reason) == (whole.text, "length")


class Counted(PlainDecoder):
    """Notes the rows of each call by sequence."""

    def decode(self, batch: Sequence[Rows], *, causal: bool = True) -> Any:
        self.calls.append([(rows.sequence, len(rows)) for rows in batch])
        return super().decode(batch, causal=causal)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.calls: list[list[tuple[int, int]]] = []
        super().__init__(*arguments, **options)


@pytest.fixture
def counted(llama: tuple[TinyModel, LanguageModel]) -> Iterator[Counted]:
    with Counted(llama[1], n_ctx=512, n_sequences=4, threads=1) as decoder:
        yield decoder


def test_a_shared_beginning_is_decoded_once(llama: tuple[TinyModel, LanguageModel], counted: Counted) -> None:
    tiny, model = llama
    run_all(Scheduler(counted, model, TokenEmbedding.of(model)), [request(tiny, number) for number in range(7)])
    assert [call for call in counted.calls if any(sequence == 0 for sequence, _ in call)] == [[(0, 4)]]


def test_prompts_come_in_chunks_beside_generated_rows(llama: tuple[TinyModel, LanguageModel], counted: Counted) -> None:
    tiny, model = llama
    scheduler = Scheduler(counted, model, TokenEmbedding.of(model), chunk=8)
    run_all(scheduler, [request(tiny, number, max_tokens=12) for number in range(6)])
    batches = [[count for _, count in call] for call in counted.calls[1:]]
    assert max(sum(batch) for batch in batches) == 8
    assert any(1 in batch and max(batch) > 1 for batch in batches)


def test_sequences_are_admitted_in_order_and_reused_at_once(llama: tuple[TinyModel, LanguageModel]) -> None:
    tiny, model = llama
    with open_decoder(model, sequences=3) as decoder:
        scheduler = Scheduler(decoder, model, TokenEmbedding.of(model))
        lengths = [20, 4, 4, 4, 4]
        for number, length in enumerate(lengths):
            scheduler.submit(request(tiny, number, max_tokens=length))
        assert not scheduler.hungry
        order: list[int] = []
        while scheduler.busy:
            order += [completion.ticket for completion in scheduler.step()]
    assert order == [2, 3, 4, 5, 1]
    assert scheduler.steps == 20  # the four short ones ran behind one another beside the long one
    assert scheduler.hungry


def test_cancelled_requests_leave_the_others_alone(llama: tuple[TinyModel, LanguageModel]) -> None:
    tiny, model = llama
    requests = [request(tiny, number, max_tokens=10) for number in range(5)]
    with open_decoder(model, sequences=3) as decoder:
        expected = [alone(decoder, model, each)[0] for each in requests]
        scheduler = Scheduler(decoder, model, TokenEmbedding.of(model))
        tickets = [scheduler.submit(each) for each in requests]
        found = scheduler.step() + scheduler.step()
        scheduler.cancel(tickets[0])  # generates
        scheduler.cancel(tickets[3])  # waits
        scheduler.cancel(tickets[3])
        scheduler.cancel(99)
        while scheduler.busy:
            found += scheduler.step()
        assert {each.ticket: each.tokens for each in found} == {tickets[i]: expected[i] for i in (1, 2, 4)}
        assert decoder.room == decoder.n_ctx - 4


def test_logits_that_are_no_numbers_fail_their_own_request(llama: tuple[TinyModel, LanguageModel]) -> None:
    tiny, model = llama
    good = request(tiny, 1)

    class Broken(PlainDecoder):
        def decode(self, batch: Sequence[Rows], *, causal: bool = True) -> Any:
            answers = super().decode(batch, causal=causal)
            return [
                answer * np.nan if rows.sequence == 2 else answer for rows, answer in zip(batch, answers, strict=True)
            ]

    with Broken(model, n_ctx=512, n_sequences=4, kv_type="f32", threads=1) as decoder:
        expected = alone(decoder, model, good)[0]
        found = run_all(Scheduler(decoder, model, TokenEmbedding.of(model)), [good, request(tiny, 2), good])
    assert [each.tokens for each in found] == [expected, (), expected]
    assert "not numbers" in found[1].fault
    assert found[1].finish_reason is None
    assert found[0].fault == found[2].fault == ""


def test_requests_that_cannot_be_run_are_refused_when_they_come(llama: tuple[TinyModel, LanguageModel]) -> None:
    tiny, model = llama
    embedding = TokenEmbedding.of(model)
    with open_decoder(model, n_ctx=256, n_ubatch=32) as decoder:
        scheduler = Scheduler(decoder, model, embedding, causal=False)
        long = Request((), "none", make_prompt(tiny, 256).parts, Sampling(), 4)
        with pytest.raises(TokcompError, match=r"need 257 rows of context, there are 256; keep fewer"):
            scheduler.submit(long)
        with pytest.raises(TokcompError, match=r"45 image rows that see one another .* n_ubatch is 32"):
            scheduler.submit(Request((), "none", make_prompt(tiny, (6, 10), 2).parts, Sampling(), 4))
        with pytest.raises(UsageError, match="max_tokens 0"):
            scheduler.submit(request(tiny, 1, max_tokens=0))
        broken = make_prompt(tiny, 3).parts
        broken[0].embeddings[1, 1] = np.inf
        with pytest.raises(ValueError, match="not finite"):
            scheduler.submit(Request((), "none", broken, Sampling(), 4))
        assert not scheduler.busy
    with open_decoder(model, sequences=1) as decoder, pytest.raises(ValueError, match="two sequences or more"):
        Scheduler(decoder, model, embedding)


def test_a_call_that_fails_leaves_a_scheduler_that_works(llama: tuple[TinyModel, LanguageModel]) -> None:
    tiny, model = llama

    class Failing(PlainDecoder):
        broken = False

        def decode(self, batch: Sequence[Rows], *, causal: bool = True) -> Any:
            if self.broken:
                raise TokcompError("llama.cpp cannot decode")
            return super().decode(batch, causal=causal)

    with Failing(model, n_ctx=512, n_sequences=4, kv_type="f32", threads=1) as decoder:
        scheduler = Scheduler(decoder, model, TokenEmbedding.of(model))
        expected = run_all(scheduler, [request(tiny, 1)])[0].tokens
        scheduler.submit(request(tiny, 2))
        scheduler.step()
        decoder.broken = True
        with pytest.raises(TokcompError, match="cannot decode"):
            scheduler.step()
        decoder.broken = False
        assert not scheduler.busy
        assert decoder.room == decoder.n_ctx
        assert run_all(scheduler, [request(tiny, 1)])[0].tokens == expected
