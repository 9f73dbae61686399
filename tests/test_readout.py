"""Reading tensors while llama.cpp computes, with the machine code and without it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cut_models import cut_model, logits
from decoding import random_rows
from edge_tokcomp.errors import TokcompError
from edge_tokcomp.language import readout
from edge_tokcomp.language.callback_code import LONGEST_NAME, native_callback
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.readout import Readout
from edge_tokcomp.language.segment import Segment
from edge_tokcomp.methods.layer_steps import read_layer_steps
from tiny_models import write_tiny_llama

needs_code = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="no code for this machine"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanguageModel]:
    path = write_tiny_llama(tmp_path_factory.mktemp("lm") / "llama.gguf", n_layer=4).path
    with LanguageModel.open(path, threads=1) as opened:
        yield opened


@pytest.fixture(params=["native", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(readout, "native_callback", lambda: 0)
    elif not native_callback():
        pytest.skip("no code for this machine")
    return request.param


def segment(model: LanguageModel, **options: Any) -> Segment:
    return Segment(model, n_ctx=256, n_outputs=64, readout=Readout(), **options)


ASKED = [["l_out-1"], ["l_out-3"], ["l_out-0"], ["Qcur-2"], ["Kcur-0", "Qcur-0"], ["l_out-2", "Qcur-2", "Kcur-2"]]


def test_tensors_are_the_same_with_and_without_the_code(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [random_rows(20, seed=1), random_rows(9, sequence=1, seed=2)]

    def everything() -> list[NDArray[np.float32]]:
        found = []
        with segment(model, n_sequences=2, n_ubatch=16) as made:
            for names in ASKED:
                found += made.tensors(rows, names)
                made.clear()
                found += made.logits(rows)
                made.clear()
        return found

    native = everything()
    monkeypatch.setattr(readout, "native_callback", lambda: 0)
    python = everything()
    shapes = [found.shape for found in native]
    assert shapes[:3] == [(29, 64), (1, 416), (1, 416)]
    assert shapes[-5:] == [(29, 64), (29, 4, 16), (29, 4, 16), (1, 416), (1, 416)]
    for one, other in zip(native, python, strict=True):
        np.testing.assert_array_equal(one, other)


@needs_code
def test_a_hidden_state_costs_no_call_into_python(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    with segment(model) as made:
        made.tensors([random_rows(5)], ["l_out-2"])
        made.logits([random_rows(1, 5)])
        assert calls == []
        made.tensors([random_rows(5, 6)], ["l_out-2", "Kcur-2"])
        assert {b"l_out-2", b"Kcur-2"} <= set(calls)
        made.tensors([random_rows(5, 11)], ["l_out-2"])
        calls.clear()
        made.logits([random_rows(1, 16)])
        assert calls == []


@needs_code
def test_a_token_costs_no_call_into_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    cut = cut_model(tmp_path, "llama", [2, 4])
    prompt = cut.prompt(5, (4, 5), 4)
    for text, attentive in (("", False), ("spectrum@2:0.5,4:0", False), ("fastv@2:0.5+pyramid@4:0.5", True)):
        with cut.segmented(read_layer_steps(text) if text else ()) as decoder:
            decoder.decode(list(prompt))
            assert bool(calls) == attentive
            calls.clear()
            for word in prompt.words(3):
                decoder.decode([word])
            further = random_rows(6, prompt.end + 3)
            decoder.decode([further])
            assert calls == []


def test_segments_without_the_code_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = cut_model(tmp_path, "qwen2vl", [2, 4])
    prompt = cut.prompt(5, (4, 5), 4)
    found = []
    for _ in range(2):
        with cut.segmented(read_layer_steps("fastv@2:0.5+spectrum@4:0.25")) as decoder:
            found.append([logits(decoder, list(prompt)), *(logits(decoder, [word]) for word in prompt.words(2))])
        monkeypatch.setattr(readout, "native_callback", lambda: 0)
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The names that Python is asked about, from now on."""
    names: list[bytes] = []
    answer = Readout._answer

    def noting(self: Readout, tensor: int, ask: bool, user_data: object) -> bool:
        names.append(self._ggml.name(tensor))
        return answer(self, tensor, ask, user_data)

    monkeypatch.setattr(Readout, "_answer", noting)
    return names


def test_nothing_is_computed_after_the_last_tensor(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "native_callback", lambda: 0)
    names = counted(monkeypatch)
    with segment(model) as made:
        made.tensors([random_rows(5)], ["l_out-1"])
        assert names[-1] == b"l_out-1"
        assert b"attn_norm-1" in names
        assert b"attn_norm-2" not in names
        made.tensors([random_rows(5, 5)], ["l_out-1", "Qcur-2"])
        assert names[-1] == b"Qcur-2"
        names.clear()
        made.logits([random_rows(5, 10)])
        assert names[-1] == b"result_output"


@pytest.mark.parametrize("names", [["l_out-9"], ["l_out-1", "Kcur-9"], ["l_out-1", "l_out-1000000000000"]])
def test_a_tensor_that_does_not_come_is_an_error(model: LanguageModel, way: str, names: list[str]) -> None:
    with segment(model) as made:
        with pytest.raises(TokcompError, match=f"computed {names[-1]} 0 times where one was expected: a layer of"):
            made.tensors([random_rows(5)], names)
        assert made.rows(0) == 0
        (found,) = made.tensors([random_rows(5)], ["l_out-1"])
        assert found.shape == (5, 64)


@pytest.mark.parametrize("names", [["l_out-1"], ["l_out-1", "Qcur-1"], ["Qcur-1"]])
def test_a_tensor_that_comes_in_parts_is_an_error(model: LanguageModel, way: str, names: list[str]) -> None:
    with segment(model, n_ubatch=4) as made:
        read = made._readout
        assert read is not None
        rows = random_rows(8)
        read.expect(names)
        made._context.decode(rows.embeddings, rows.positions, np.zeros(8, np.int32), np.ones(8, np.int8))
        with pytest.raises(TokcompError, match=r"computed (l_out|Qcur)-1 2 times where one was expected"):
            read.take()
        made.clear()
        found = made.tensors([rows], names)  # which makes a call of each micro-batch
        assert {len(values) for values in found} == {8}


@pytest.mark.parametrize("count", [3, 9])
def test_what_is_read_is_written_over_the_rows_only_when_that_is_asked_for(
    model: LanguageModel, way: str, count: int
) -> None:
    with segment(model, n_ubatch=4) as made:
        rows = random_rows(count)
        before = rows.embeddings.copy()
        plain, keys = made.tensors([rows], ["l_out-1", "Kcur-1"])
        assert np.array_equal(rows.embeddings, before)
        made.clear()
        over, again = made.tensors([rows], ["l_out-1", "Kcur-1"], over=True)
        assert np.array_equal(over, plain)
        assert np.array_equal(again, keys)
        assert np.shares_memory(over, rows.embeddings) == (count > 4)  # what one call gives is no second array


def test_other_types_and_shapes_are_an_error(model: LanguageModel, way: str) -> None:
    made = segment(model, flash_attention=False)
    with made, pytest.raises(TokcompError, match=r"kq_soft_max-1.* in another type than float32"):
        made.tensors([random_rows(5)], ["kq_soft_max-1"])


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("names", [["l_out-1"], ["Qcur-1", "Kcur-1"], []])
def test_what_is_raised_within_the_callback_comes_out(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, names: list[str], fault: type[BaseException]
) -> None:
    """Such as an interrupt from the keyboard, which Python delivers wherever it runs."""
    monkeypatch.setattr(readout, "native_callback", lambda: 0)
    with segment(model) as made:
        made.logits([random_rows(5)])
        with monkeypatch.context() as patch:
            patch.setattr(made._readout._ggml, "name", lambda _: (_ for _ in ()).throw(fault()))
            with pytest.raises(fault):
                made.tensors([random_rows(2, 5)], names) if names else made.logits([random_rows(2, 5)])
        assert made.rows(0) == 0
        assert len(made.logits([random_rows(5)])[0]) == 1


def test_names_longer_than_the_code_compares_are_left_to_python() -> None:
    read = Readout()
    for name, python in (("a" * LONGEST_NAME, False), ("a" * (LONGEST_NAME + 1), True), ("Qcur-1", True)):
        read.expect([name])
        assert bool(read._state.python) == (python or not native_callback())
    read.expect([])
    assert read.take() == []
