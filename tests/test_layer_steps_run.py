"""Layer steps in the pipeline, the command, the records and the evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from numpy.typing import NDArray

from edge_tokcomp import evaluation
from edge_tokcomp.cli import main
from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.export.split import split_model
from edge_tokcomp.language import binding
from edge_tokcomp.language.prompt import chat_prompt
from edge_tokcomp.language.segmented import SegmentedDecoder
from edge_tokcomp.methods import get_method
from edge_tokcomp.methods.layer_step import spell_steps
from edge_tokcomp.methods.layer_steps import read_layer_steps
from edge_tokcomp.parameters import hash_of_model
from edge_tokcomp.tokens import Rows
from edge_tokcomp.vlm import VLM, load
from picture_files import pictures
from reference_language import Prompt, ReferenceLanguage
from tiny_mmproj import write_mmproj
from tiny_models import write_tiny_llama, write_tiny_model

SHORT: dict[str, Any] = {"max_tokens": 8}
STEPS = ("spectrum@1:0.5,2:0.25,3:0", "fastv@1:0.5", "pyramid@0,2:0.5", "todre@2:1", "dart@1:0.5+spectrum@3:0.1")

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Four layers, 36 image tokens."""
    folder = tmp_path_factory.mktemp("deep")
    lm = write_tiny_llama(folder / "lm.gguf", n_layer=4)
    return Pair(lm.path, write_mmproj(folder / "mmproj.gguf", out=64).path)


@pytest.fixture(scope="module")
def cut(deep: Pair) -> Iterator[VLM]:
    """The same, cut at every layer, without steps."""
    folder = split_model(deep.lm, (1, 2, 3), deep.lm.parent / "segments", threads=1)
    with load(folder, deep.mmproj, threads=1, provider="cpu") as vlm:
        yield vlm


def scene(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8)


def opened(pair: Pair, **options: Any) -> VLM:
    return load(pair.lm, pair.mmproj, threads=1, provider="cpu", **options)


def test_a_folder_of_segments_says_what_the_file_says(cut: VLM, deep: Pair) -> None:
    assert isinstance(cut.decoder, SegmentedDecoder)
    with opened(deep) as whole:
        for seed in range(3):
            for question in ("Describe the image.", "is the cat red"):
                found, expected = (
                    cut.answer(scene(seed), question, **SHORT),
                    whole.answer(scene(seed), question, **SHORT),
                )
                assert found.text == expected.text
                assert found.layer_tokens == expected.layer_tokens == 36
        assert cut.decoder.n_layer == whole.decoder.n_layer == 4


@pytest.mark.parametrize("steps", STEPS)
def test_answers_are_those_of_the_numpy_model_that_drops_the_same_rows(cut: VLM, deep: Pair, steps: str) -> None:
    reference = ReferenceLanguage(deep.lm)
    cut.set_layer_steps(steps)
    ends = [token for token in range(cut.model.n_vocab) if cut.model.is_end(token)]
    for seed in range(3):
        encoded = cut.encode(scene(seed))
        for question in ("Describe the image.", "is the cat red"):
            lead, text = (
                cut.embedding.lookup(piece) for piece in chat_prompt(cut.model, question, 1).tokenize(cut.model)
            )
            prompt = Prompt(lead, encoded.rows.embeddings, encoded.rows.crop, text)
            tokens, layers = reference.generate(prompt, read_layer_steps(steps), ends, 8)
            said = cut.model.detokenize(np.array([t for t in tokens if t not in ends], np.int32)).strip()
            answer = cut.answer(encoded, question, **SHORT)
            assert answer.text == said
            assert answer.layer_tokens == pytest.approx(np.mean(layers))
            assert answer.tokens_after == 36
            assert "".join(cut.ask(encoded, question, stream=True, **SHORT)) == said


def test_a_file_is_cut_in_the_cache_at_the_layers_of_the_steps(deep: Pair) -> None:
    with opened(deep, layer_steps="fastv@0.5:0.5+spectrum@0.75:0", keep=9) as vlm:
        assert isinstance(vlm.decoder, SegmentedDecoder)
        assert [model.n_layer for model in vlm.decoder._models] == [2, 1, 1]
        answer = vlm.answer(scene(), **SHORT)
        assert (answer.tokens_after, answer.layer_tokens) == (9, (9 + 9 + 5 + 0) / 4)
        assert vlm.decoder.positions == "renumbered"
        with pytest.raises(UsageError, match=r"spectrum@1:0.5: acts at layer 1, but the model is cut at 2, 3"):
            vlm.set_layer_steps("spectrum@1:0.5")
        assert vlm.answer(scene(), **SHORT).text == answer.text
    with opened(deep, layer_steps="spectrum@0:0.25") as vlm:  # before the first layer: nothing to cut
        assert vlm.answer(scene(), **SHORT).layer_tokens == 9


def test_a_model_that_was_loaded_whole_takes_no_steps(deep: Pair) -> None:
    with opened(deep) as vlm:
        vlm.set_layer_steps("")
        with pytest.raises(UsageError, match="loaded whole; load it with layer_steps"):
            vlm.set_layer_steps("fastv@1:0.5")


@pytest.mark.parametrize(("steps", "times"), [("spectrum@1:0.5", 1), ("fastv@1:0.5", 3)])
def test_what_can_be_kept_for_a_further_question_is(
    cut: VLM, monkeypatch: pytest.MonkeyPatch, steps: str, times: int
) -> None:
    """The image where nothing looks at the question, the text before it where something does."""
    cut.set_layer_steps(steps)
    images: list[int] = []
    plain = cut.decoder.decode

    def counting(batch: Sequence[Rows], **options: Any) -> Any:
        images.extend(int((rows.crop >= 0).sum()) for rows in batch if rows.crop is not None and (rows.crop >= 0).any())
        return plain(batch, **options)

    monkeypatch.setattr(cut.decoder, "decode", counting)
    picture = cut.encode(scene(5))
    said = [cut.ask(picture, question, **SHORT) for question in ("what is this", "is the cat red", "what is this")]
    assert images == [36] * times
    assert said[0] == said[2]


def test_several_pictures_in_one_question_lose_rows_each(cut: VLM) -> None:
    for steps in ("spectrum@1:0.5", "pyramid@2:0.5"):
        cut.set_layer_steps(steps)
        answer = cut.answer([scene(1), scene(2)], "is the cat red", **SHORT)
        assert answer.tokens_after == 72
        assert answer.layer_tokens == pytest.approx(
            72 * (1 + 3 * 0.5) / 4 if steps[0] == "s" else 72 * (2 + 2 * 0.5) / 4
        )


def test_records_name_steps_positions_and_the_tokens_of_a_layer(deep: Pair, tmp_path: Path, capsys: Captured) -> None:
    folder, out = pictures(tmp_path / "p", 2), tmp_path / "o.jsonl"
    command = ["caption", str(folder), *deep.options, "--max-tokens", "4", "--out", str(out)]
    assert main([*command, "--layer-steps", "spectrum@0.5:0.5"]) == 0
    said = capsys.readouterr().err
    assert "lm.gguf, layer steps spectrum@0.5:0.5, tower" in said
    assert "image tokens 72 → 72, 54 in a layer" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        assert {name: row["choices"][name] for name in ("layer_steps", "positions", "layer_tokens")} == {
            "layer_steps": "spectrum@0.5:0.5", "positions": "renumbered", "layer_tokens": 27.0,
        }  # fmt: skip
    assert main([*command, "--layer-steps", "spectrum@0.5:0.5"]) == 0
    assert "2 skipped" in capsys.readouterr().err
    assert main(command) == 0  # without the steps they are due again
    assert "0 skipped" in capsys.readouterr().err
    assert main([*command, "--layer-steps", "spectrum@0.5:0.5", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "layer steps     spectrum@0.5:0.5, positions renumbered" in said
    assert "4 layers" in said


def test_pictures_and_their_crops_are_told_apart_and_text_is_no_picture(
    cut: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut.set_layer_steps("spectrum@1:0.5")
    seen: list[Rows] = []
    plain = cut.decoder.decode
    monkeypatch.setattr(
        cut.decoder, "decode", lambda batch, **options: (seen.extend(batch), plain(batch, **options))[1]
    )
    cut.answer([scene(1), scene(2)], "is the cat red", **SHORT)
    crops = [rows.crop for rows in seen if rows.crop is not None]
    assert [np.unique(crop).tolist() for crop in crops[:4]] == [[-1], [0], [-1], [1]]
    parts = replace(cut.encode(scene(3)), parts=((), "left", (0,), "right", ()))
    again = cut.compress(replace(parts, method=get_method("pool")), get_method("uniform"), 9)
    before, after = (len(cut.model.tokenize(text, add_special=False, parse_special=True)) for text in ("left", "right"))
    assert again.rows.crop.tolist() == [-1] * before + [0] * 9 + [-1] * after


def test_other_steps_end_an_open_stream(cut: VLM) -> None:
    cut.set_layer_steps("spectrum@1:0.5")
    stream = cut.caption(scene(), stream=True, **SHORT)
    next(stream)
    cut.set_layer_steps("fastv@1:0.5")
    with pytest.raises(UsageError, match="was not read to its end"):
        next(stream)


def test_an_evaluation_that_is_broken_off_leaves_the_steps_as_they_were(
    cut: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_off(vlm: VLM, *_: Any, **__: Any) -> None:
        vlm.set_layer_steps("")
        raise KeyboardInterrupt

    cut.set_layer_steps("spectrum@1:0.5")
    monkeypatch.setattr(evaluation, "score_arms", broken_off)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(cut, scenes=1)
    assert spell_steps(cut.layer_steps) == "spectrum@1:0.5"


def test_amounts_are_written_as_they_are() -> None:
    for text in ("fastv@2:0.123456789", "spectrum@1:0.5,3:0", "todre@0.875:1"):
        assert spell_steps(read_layer_steps(text)) == text


def test_the_hash_of_a_model_knows_its_files_and_steps(deep: Pair, cut: VLM) -> None:
    cut.set_layer_steps("")
    before = hash_of_model(cut)
    cut.set_layer_steps("fastv@1:0.5")
    assert hash_of_model(cut) != before


def test_asking_tells_the_steps(deep: Pair, tmp_path: Path, capsys: Captured) -> None:
    (picture,) = pictures(tmp_path / "p", 1).iterdir()
    command = [
        "ask",
        str(picture),
        "is the cat red",
        *deep.options,
        "--max-tokens",
        "4",
        "--layer-steps",
        "fastv@1:0.5",
    ]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "image tokens 36 → 36 (100.0 %), method none, layer steps fastv@1:0.5" in said
    assert "dummy" not in said


def test_steps_that_cannot_be_are_refused_in_one_line_before_anything_is_loaded(
    deep: Pair, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (picture,) = pictures(tmp_path / "p", 1).iterdir()
    odd = write_tiny_model(tmp_path / "gemma2.gguf", "gemma2", n_layer=4).path
    lfm2 = write_tiny_model(tmp_path / "lfm2.gguf", "lfm2", n_layer=4).path
    one = split_model(deep.lm, (2,), tmp_path / "cut", verify=False) / "segment-1-of-2.gguf"
    empty = tmp_path / "empty"
    empty.mkdir()
    cases: list[tuple[Path, str, str]] = [
        (deep.lm, "spectrum@4:0.5", "layer 4 of a model of 4 layers (0 to 3) (lm.gguf)"),
        (deep.lm, "sperctum@2:0.5", "did you mean 'spectrum'?"),
        (deep.lm, "fastv@0:0.5", "layer 0 has none; begin at layer 1"),
        (odd, "spectrum@2:0.5", "gemma2"),
        (empty, "spectrum@2:0.5", "holds no segments"),
        (one, "spectrum@2:0.5", f"is segment 1 of 2 of a model; name its folder, {one.parent}"),
        (one, "", f"is segment 1 of 2 of a model; name its folder, {one.parent}"),
        (one.parent, "fastv@3:0.5", "acts at layer 3, but the model is cut at 2; cut it at 3 too"),
        (lfm2, "fastv@2:0.5", "which lfm2 models do not show; use spectrum"),
        (tmp_path / "none.gguf", "spectrum@2:0.5", "No such file"),
    ]
    for lm, steps, reason in cases:
        monkeypatch.setattr(binding, "Model", lambda *_, **__: pytest.fail("loaded"))
        options = ["--lm", str(lm), "--mmproj", str(deep.mmproj), "--layer-steps", steps]
        assert main(["ask", str(picture), "what is this", *options]) == 2
        said = capsys.readouterr().err
        assert reason in said
        assert said.count("\n") == 1


def test_damaged_segments_are_refused_before_they_are_loaded(deep: Pair, tmp_path: Path) -> None:
    folder = split_model(deep.lm, (2,), tmp_path / "cut", verify=False)
    last = folder / "segment-2-of-2.gguf"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TokcompError, match=r"segment-2-of-2\.gguf: truncated"):
        load(folder, deep.mmproj, threads=1)
    last.unlink()
    with pytest.raises(TokcompError, match=r"segment-2-of-2\.gguf: missing"):
        load(folder, deep.mmproj, threads=1)


def test_reading_steps_back_from_their_text() -> None:
    for text in STEPS:
        assert spell_steps(read_layer_steps(text)) == spell_steps(read_layer_steps(spell_steps(read_layer_steps(text))))
    assert read_layer_steps(["fastv@1:0.5", read_layer_steps("todre")[0]]) == read_layer_steps("fastv@1:0.5+todre")
    assert read_layer_steps("") == read_layer_steps([]) == ()


@pytest.mark.slow
def test_the_matrix_scores_steps_beside_none(tmp_path: Path) -> None:
    steps = ["spectrum@1:0.5", "todre@2:0"]
    command = ["eval", "--scenes", "3", "--matrix", str(tmp_path), "--methods", "none", "uniform", "--keeps", "64"]
    assert main([*command, "--threads", "1", "--steps", *steps]) == 0
    arms = json.loads((tmp_path / "matrix.json").read_text())["arms"]
    assert [(row["method"], row["layer_steps"], row["tokens"]) for row in arms] == [
        ("none", "", 576), ("none", steps[0], 576), ("none", steps[1], 576),
        ("uniform", "", 64), ("uniform", steps[0], 64), ("uniform", steps[1], 64),
    ]  # fmt: skip
    assert [row["layer_tokens"] for row in arms] == [576, 360, 576, 64, 40, 64]
    # todre@2:0 drops nothing: what it answers is what is answered without it.
    for plain, same in ((arms[0], arms[2]), (arms[3], arms[5])):
        assert same["tasks"] == plain["tasks"]
        assert same["unpruned"] == {"difference": 0, "low": 0, "high": 0}
    text = (tmp_path / "matrix.md").read_text()
    assert "| method | layer steps | tokens | a layer |" in text
    assert "against no layer steps" in text
    assert (tmp_path / "matrix.png").stat().st_size > 10_000


@pytest.mark.slow
def test_eval_reports_the_tokens_of_a_layer(capsys: Captured) -> None:
    command = ["eval", "--scenes", "2", "--layer-steps", "spectrum@0.5:0.5", "--threads", "1"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["layer_tokens"], found["layer_steps"]) == (576, 432, "spectrum@0.5:0.5")
    assert main(command) == 0
    assert "none, 576 image tokens, layer steps spectrum@0.5:0.5: 432 a layer, 2 scenes" in capsys.readouterr().out
    assert get_method("none").compresses is False
