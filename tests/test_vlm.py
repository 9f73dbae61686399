"""The pipeline on a tiny random model: however it is asked, the same rows go in and the same text comes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_info

import edge_tokcomp
from edge_tokcomp.errors import ImageError, TokcompError, UsageError
from edge_tokcomp.language import binding
from edge_tokcomp.language.decoder import PlainDecoder
from edge_tokcomp.language.generation import generate
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.sampling import Sampling
from edge_tokcomp.language.segment import available_cores
from edge_tokcomp.language.token_embedding import TokenEmbedding
from edge_tokcomp.methods import Picks, get_method
from edge_tokcomp.records import STAGES
from edge_tokcomp.tokens import Rows
from edge_tokcomp.vlm import CAPTION_PROMPT, VLM, load
from made_up_images import answering
from tiny_mmproj import write_mmproj
from tiny_models import CHATML, write_tiny_llama

SHORT: dict[str, Any] = {"max_tokens": 12}


def scene(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8)


def opened(pair: Pair, **options: Any) -> VLM:
    return load(pair.lm, pair.mmproj, threads=1, provider="cpu", **options)


def by_hand(vlm: VLM, images: list[NDArray[np.uint8]], question: str, max_tokens: int = 12) -> str:
    """LLaVA-1.5's prompt around the images' rows, decoded in one piece by a decoder of its own."""
    with LanguageModel.open(vlm.lm, threads=1) as model, PlainDecoder(model, n_ctx=1024) as decoder:
        embedding = TokenEmbedding.of(model)

        def rows_of(text: str, first: bool) -> NDArray[np.float32]:
            return embedding.lookup(model.tokenize(text, add_special=first, parse_special=True))

        parts = [rows_of("USER: ", True)]
        for number, image in enumerate(images):
            tail = "\n" if number + 1 < len(images) else f"\n{question} ASSISTANT:"
            parts += [vlm.encode(image).rows.embeddings, rows_of(tail, False)]
        rows = np.concatenate(parts)
        prompt = Rows(rows, np.arange(len(rows), dtype=np.int32))
        return generate(decoder, model, embedding, [prompt], max_tokens=max_tokens).text().strip()


def test_caption_ask_answer_and_their_streams_agree(vlm: VLM) -> None:
    wanted = by_hand(vlm, [scene()], CAPTION_PROMPT)
    assert wanted
    assert vlm.caption(scene(), **SHORT) == wanted
    assert vlm.ask(scene(), CAPTION_PROMPT, **SHORT) == wanted
    assert vlm.answer(scene(), **SHORT).text == wanted
    assert "".join(vlm.caption(scene(), stream=True, **SHORT)) == wanted
    assert "".join(vlm.ask(scene(), CAPTION_PROMPT, stream=True, **SHORT)) == wanted
    assert wanted != vlm.caption(scene(1), **SHORT)


def test_a_stream_comes_in_pieces_and_without_white_space_at_its_ends(vlm: VLM) -> None:
    for seed in range(8):
        pieces = list(vlm.caption(scene(seed), stream=True, max_tokens=30))
        assert len(pieces) > 3
        assert "".join(pieces) == vlm.caption(scene(seed), max_tokens=30) == "".join(pieces).strip()


def test_several_images_go_in_in_order(vlm: VLM) -> None:
    images = [scene(1), scene(2), scene(3)]
    question = "What is in the two?"
    answer = vlm.answer(images, question, **SHORT)
    assert answer.text == by_hand(vlm, images, question)
    assert answer.text != vlm.ask(images[::-1], question, **SHORT)
    assert answer.tokens_before == answer.tokens_after == 3 * 36
    assert len(answer.images) == 3


def test_asking_again_about_an_encoded_image_equals_asking_afresh(vlm: VLM) -> None:
    one, other = vlm.encode(scene(4)), vlm.encode(scene(5))
    questions = ["what is this", "is the cat red", "what is this"]
    held = [vlm.ask(one, question, **SHORT) for question in questions]
    assert held == [by_hand(vlm, [scene(4)], question) for question in questions]
    between = [(vlm.ask(other, "and this", **SHORT), vlm.ask(one, question, **SHORT))[1] for question in questions]
    assert between == held
    assert vlm.encode(one) is one


def test_a_method_that_looks_at_the_question_compresses_anew_for_each(vlm: VLM) -> None:
    blind = vlm.compress(vlm.encode(scene(4)), get_method("divprune"), 9, "is the cat red")
    assert blind.question is None
    assert vlm.encode(blind, "what is this") is blind
    seeing = vlm.compress(vlm.encode(scene(4)), get_method("cdpruner"), 9, "is the cat red")
    assert seeing.question == "is the cat red"
    assert vlm.encode(seeing, "is the cat red") is seeing
    words = vlm.embedding.lookup(vlm.model.tokenize("what is this", add_special=False, parse_special=True))
    expected = get_method("cdpruner").compress(seeing.tokens, 9, query=words)
    answer = vlm.answer(seeing, "what is this", **SHORT)
    assert answer.images[0].plan.rank.tolist() == expected.rank.tolist()
    assert answer.images[0].question == "what is this"
    assert answer.tokens_after == 9
    assert seeing.plan.rank.tolist() != expected.rank.tolist()


def test_a_further_question_does_not_decode_the_image_again(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    plain = vlm.decoder.decode

    def counting(batch: Sequence[Rows], **options: Any) -> Any:
        decoded.extend(1 for rows in batch if rows.crop is not None and (rows.crop >= 0).any())
        return plain(batch, **options)

    monkeypatch.setattr(vlm.decoder, "decode", counting)
    picture = vlm.encode(scene(6))
    for question in ("what is this", "is the cat red", "what is this"):
        vlm.ask(picture, question, **SHORT)
    assert len(decoded) == 1
    vlm.ask(vlm.encode(scene(6)), "what is this", **SHORT)
    assert len(decoded) == 2


def test_a_picture_may_come_in_any_form(vlm: VLM, tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    Image.fromarray(scene()).save(path)
    wanted = vlm.caption(scene(), **SHORT)
    for form in (
        path,
        str(path),
        path.read_bytes(),
        Image.open(path),
        Image.fromarray(scene()),
        vlm.encode(path).image,
    ):
        assert vlm.caption(form, **SHORT) == wanted
    for wrong in (scene()[..., 0], scene().astype(np.float32), scene()[..., :2]):
        with pytest.raises(UsageError, match=r"\(H, W, 3\) uint8"):
            vlm.encode(wrong)
    with pytest.raises(ImageError, match=r"none\.png: no such file"):
        vlm.caption(tmp_path / "none.png")
    with pytest.raises(UsageError, match="no picture"):
        vlm.caption([])


def test_a_new_question_ends_an_open_stream(vlm: VLM) -> None:
    picture = vlm.encode(scene())
    wanted = vlm.ask(picture, "what is this", **SHORT)
    begun = vlm.ask(picture, "is the cat red", stream=True, **SHORT)
    next(begun)
    unread = vlm.ask(picture, "and the dog", stream=True, **SHORT)
    assert vlm.ask(picture, "what is this", **SHORT) == wanted
    for overtaken in (begun, unread):
        with pytest.raises(UsageError, match="not read to its end"):
            next(overtaken)
    read = vlm.ask(picture, "what is this", stream=True, **SHORT)
    assert "".join(read) == wanted
    vlm.ask(picture, "and the dog", **SHORT)
    assert list(read) == []
    assert "".join(vlm.ask(picture, "what is this", stream=True, **SHORT)) == wanted


def test_an_answer_says_how_it_came_about(vlm: VLM) -> None:
    answer = vlm.answer(scene(), "what is this", **SHORT)
    text = vlm.model.tokenize("USER: ", add_special=True, parse_special=True)
    tail = vlm.model.tokenize("\nwhat is this ASSISTANT:", add_special=False, parse_special=True)
    assert answer.prompt_tokens == len(text) + 36 + len(tail)
    assert vlm.rows_needed("what is this") == answer.prompt_tokens + 1
    assert (answer.tokens_before, answer.tokens_after) == (36, 36)
    assert (answer.generated_tokens, answer.finish_reason) == (12, "length")
    assert tuple(answer.timings_ms) == STAGES
    assert all(value >= 0 for value in answer.timings_ms.values())
    before = sum(answer.timings_ms[stage] for stage in STAGES[:5])
    assert answer.timings_ms["first_token"] == pytest.approx(before)
    assert vlm.answer(scene(), "what is this", max_tokens=1).generated_tokens == 1


def test_a_stop_string_ends_the_answer(vlm: VLM) -> None:
    whole = vlm.ask(scene(), "what is this", max_tokens=30)
    stop = whole[5:8]
    answer = vlm.answer(scene(), "what is this", max_tokens=30, stop=[stop])
    assert answer.text == whole[: whole.index(stop)].strip()
    assert answer.finish_reason == "stop"


def test_nothing_is_compressed_without_keep(pair: Pair, vlm: VLM) -> None:
    assert (str(vlm.method), vlm.keep) == ("none", 1.0)
    for options in (
        {"method": "none"},
        {"method": "none", "keep": 4},
        {"keep": "100%"},
        {"method": "pool", "keep": 1.0},
    ):
        with opened(pair, **options) as other:
            answer = other.answer(scene(), **SHORT)
            assert answer.text == vlm.caption(scene(), **SHORT)
            assert answer.tokens_after == 36


@pytest.mark.parametrize(
    ("options", "method", "keep"),
    [
        ({}, "none", 1.0),
        ({"keep": 9}, "mosaic", 9),
        ({"method": "todre"}, "todre", 0.25),
        ({"method": "none"}, "none", 1.0),
    ],
)
def test_method_and_keep_that_are_left_open(pair: Pair, options: dict[str, Any], method: str, keep: float) -> None:
    with opened(pair, **options) as opened_so:
        assert (str(opened_so.method), opened_so.keep) == (method, keep)
        assert len(opened_so.encode(scene()).plan) == (36 if method == "none" else 9)


def test_only_the_kept_tokens_enter_the_language_model(pair: Pair, vlm: VLM) -> None:
    with opened(pair, keep=9, method="prunesid") as small:
        encoded = small.encode(scene())
        answer = small.answer(encoded, "what is this", **SHORT)
        assert (answer.tokens_before, answer.tokens_after, len(encoded.rows)) == (36, 9, 9)
        whole = vlm.answer(scene(), "what is this", **SHORT)
        assert answer.prompt_tokens == whole.prompt_tokens - 27
        assert answer.text == by_hand(small, [scene()], "what is this")
        every = vlm.encode(scene())
        assert np.abs(encoded.rows.embeddings - every.tokens.embeddings[encoded.plan.keep]).max() < 1e-4
        again = vlm.compress(every, get_method("prunesid"), 9)
        assert vlm.ask(again, "what is this", **SHORT) == answer.text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "prunsid", "keep": 9}, "did you mean 'prunesid'"),
        ({"keep": 0}, "leaves no token"),
        ({"keep": "many"}, "is not an amount"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"provider": "npu"}, "unknown provider"),
        ({"precision": "int3"}, "unknown precision"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(pair: Pair, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        load(pair.lm, pair.mmproj, **{"threads": 1, "provider": "cpu", **options})
    assert "\n" not in str(caught.value)


def test_lm_and_mmproj_come_together_and_in_their_places(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mmproj is not given"):
        load(lm=pair.lm)
    with pytest.raises(UsageError, match="lm is not given"):
        load(mmproj=pair.mmproj)
    for lm, mmproj in ((pair.mmproj, pair.lm), (pair.lm, pair.lm), (tmp_path / "no.gguf", pair.mmproj)):
        with pytest.raises(TokcompError, match=r"\.gguf"):
            load(lm, mmproj, threads=1)


def test_files_of_two_models_are_told_apart_by_their_widths(pair: Pair, tmp_path: Path) -> None:
    wide = write_mmproj(tmp_path / "wide.gguf", out=96)
    with pytest.raises(TokcompError, match=r"wide\.gguf writes rows of 96, .*tiny-lm\.gguf takes 64"):
        load(pair.lm, wide.path, threads=1, provider="cpu")


def test_the_models_own_chat_template_is_used(pair: Pair, tmp_path: Path) -> None:
    chat = write_tiny_llama(tmp_path / "chat.gguf", chat_template=CHATML)
    with load(chat.path, pair.mmproj, threads=1, provider="cpu") as vlm:
        answer = vlm.answer(scene(), "what is this", **SHORT)
        around = sum(
            len(vlm.model.tokenize(text, add_special=first, parse_special=True))
            for text, first in (
                ("<|im_start|>user\n", True),
                ("\nwhat is this<|im_end|>\n<|im_start|>assistant\n", False),
            )
        )
        assert answer.prompt_tokens == around + 36


def test_a_prompt_beyond_the_context_is_said_and_does_no_harm(pair: Pair) -> None:
    with opened(pair, n_ctx=256) as vlm:
        wanted = vlm.ask(scene(), "what is this", **SHORT)
        assert vlm.rows_needed("zq " * 300) > 256
        for picture in (scene(1), vlm.encode(scene(1))):
            for _ in range(2):
                with pytest.raises(TokcompError, match=r"rows of context|context rows"):
                    vlm.ask(picture, "zq " * 300)
        held = vlm.encode(scene())
        assert vlm.ask(held, "what is this", **SHORT) == wanted
        with pytest.raises(TokcompError, match="rows"):
            vlm.ask(held, "zq " * 300)
        assert vlm.ask(held, "what is this", **SHORT) == wanted
        answer = vlm.answer(held, "what is this", max_tokens=5000)
        assert answer.finish_reason == "context"
        assert answer.prompt_tokens + answer.generated_tokens <= 256 + 1


def test_sampling_follows_its_seed(vlm: VLM) -> None:
    def drawn(seed: int) -> str:
        return vlm.ask(scene(), "what is this", sampling=Sampling(temperature=1.5, seed=seed), **SHORT)

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(6)}) > 1


def test_bad_options_of_an_answer_leave_the_model_usable(vlm: VLM) -> None:
    wanted = vlm.caption(scene(), **SHORT)
    for options in ({"max_tokens": 0}, {"stop": "a string"}, {"stop": [""]}):
        with pytest.raises(UsageError):
            vlm.caption(scene(), **options)
        with pytest.raises(UsageError):
            list(vlm.caption(scene(), stream=True, **options))
        assert vlm.caption(scene(), **SHORT) == wanted


def test_closing_twice_and_with_an_open_stream_is_fine(pair: Pair) -> None:
    with opened(pair) as vlm:
        stream: Iterator[str] = vlm.caption(scene(), stream=True, **SHORT)
        next(stream)
        vlm.close()
        vlm.close()
        with pytest.raises(UsageError, match="or the model closed"):
            next(stream)
    with pytest.raises(ValueError, match="closed; load it again"):
        vlm.caption(scene())


def test_a_second_question_waits_for_no_tower(vlm: VLM) -> None:
    picture = vlm.encode(scene(7))
    first, second = (vlm.answer(picture, question, **SHORT).timings_ms for question in ("what is this", "is it red"))
    stages = ("decode", "preprocess", "encode", "compress")
    assert {stage: first[stage] for stage in stages} == {stage: picture.timings_ms[stage] for stage in stages}
    assert {second[stage] for stage in stages} == {0}
    assert second["first_token"] == second["prefill"]


def test_threads_and_context_out_of_range_are_refused_before_files_are_read() -> None:
    for options in ({"threads": 0}, {"threads": 10**6}, {"n_ctx": 0}, {"n_ctx": -1}):
        with pytest.raises(UsageError, match=next(iter(options))):
            load("none.gguf", "none.gguf", **options)


def test_picture_arrays_above_the_pixel_limit_are_refused(vlm: VLM) -> None:
    with pytest.raises(ImageError, match="pixels"):
        vlm.encode(np.zeros((12000, 12000, 3), np.uint8))


def test_the_package_offers_load_and_the_class() -> None:
    assert edge_tokcomp.load is load
    assert edge_tokcomp.VLM is VLM


def test_one_thread_budget_reaches_all_three_libraries(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    blas: list[int] = []

    def watching(rows: Any, k: int) -> Picks:
        blas.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return Picks(np.arange(k))

    asked: list[tuple[int, int]] = []
    plain = binding.llama.llama_init_from_model

    def listening(model: Any, params: Any) -> Any:
        asked.append((params.n_threads, params.n_threads_batch))
        return plain(model, params)

    monkeypatch.setattr(binding.llama, "llama_init_from_model", listening)
    for threads in (1, 2):
        blas.clear()
        asked.clear()
        with load(pair.lm, pair.mmproj, threads=threads, provider="cpu", method=answering(watching), keep=9) as vlm:
            vlm.caption(scene(), **SHORT)
            graphs = (vlm.engine.tower._tower, vlm.engine.tower._projector)
            assert {graph.get_session_options().intra_op_num_threads for graph in graphs} == {threads}
        assert set(blas) == {min(threads, available_cores())}
        assert set(asked) == {(threads, threads)}
