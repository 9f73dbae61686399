"""Random models of published sizes: laid out as llama-quantize would, well behaved, whole or not there."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.export.random_models import LANGUAGE_SHAPES, LanguageShape, cached_language_model
from edge_tokcomp.language.decoder import PlainDecoder
from edge_tokcomp.language.gguf_header import read_header
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.prompt import chat_prompt
from edge_tokcomp.language.token_embedding import TokenEmbedding
from edge_tokcomp.tokens import Rows

TINY = LanguageShape("tiny", "llama", 2, 256, 512, 4, 2, 64, 1000, 1e4, 512, 1e-5, False)
ODD = LanguageShape("odd", "llama", 2, 96, 160, 3, 1, 32, 1000, 1e4, 512, 1e-5, False)
TIED = LanguageShape("tied", "qwen2vl", 2, 256, 512, 2, 1, 128, 1000, 1e6, 512, 1e-6, True)
UNTIED = LanguageShape("untied", "qwen2", 2, 128, 256, 2, 1, 64, 1000, 1e6, 512, 1e-6, False)
GEMMA = LanguageShape(
    "gemma", "gemma3", 6, 256, 512, 2, 1, 128, 1000, 1e6, 512, 1e-6, True, image="<start_of_image>", window=64,
    stretch=8.0,
)  # fmt: skip
DEEP = LanguageShape("deep", "llama", 32, 128, 256, 2, 2, 64, 1000, 1e4, 512, 1e-5, False)


def types(path: Path) -> dict[str, str]:
    return {name: tensor.type_name for name, tensor in read_header(path).tensors.items()}


@pytest.mark.parametrize("quantization", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("shape", [TINY, ODD, TIED, UNTIED, GEMMA], ids=lambda shape: shape.name)
def test_tensors_have_the_types_that_llama_quantize_gives_them(
    tmp_path: Path, shape: LanguageShape, quantization: str
) -> None:
    path = cached_language_model(shape, quantization, tmp_path)
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.allow_requantize = 1, True
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization}")
    again = tmp_path / "again.gguf"
    assert llama_cpp.llama_model_quantize(bytes(path), bytes(again), params) == 0
    assert types(path) == types(again)
    assert path.stat().st_size == pytest.approx(again.stat().st_size, abs=4096)


@pytest.mark.parametrize("quantization", ["Q4_0", "Q8_0"])
def test_values_are_centred_with_the_deviation_that_keeps_activations_in_size(
    tmp_path: Path, quantization: str
) -> None:
    seen = set()
    for tensor in gguf.GGUFReader(cached_language_model(TINY, quantization, tmp_path)).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            assert values.mean() == pytest.approx(1, abs=0.03)
            continue
        seen.add(tensor.tensor_type.name)
        assert values.std() * np.sqrt(values.shape[1]) == pytest.approx(1, abs=0.02), tensor.name
        # Blocks of 32 have means of deviation sqrt(1 / 32 + 0.108 ** 2), of either sign: over all of them, 0.
        assert abs(values.mean() / values.std()) < 4 * 0.21 / np.sqrt(values.size / 32), tensor.name
        assert len(np.unique(values, axis=0)) == len(values)
    assert seen == ({"Q4_0", "Q6_K"} if quantization == "Q4_0" else {"Q8_0"})


@pytest.mark.parametrize("shape", [DEEP, TIED, UNTIED, GEMMA], ids=lambda shape: shape.name)
def test_logits_stay_of_order_one_and_depend_on_the_rows(tmp_path: Path, shape: LanguageShape) -> None:
    rng = np.random.default_rng(0)
    with (
        LanguageModel.open(cached_language_model(shape, cache=tmp_path), threads=1) as model,
        PlainDecoder(model, n_ctx=256) as decoder,
    ):
        assert (model.n_vocab, model.n_embd, model.n_layer) == (shape.vocab, shape.n_embd, shape.layers)
        last = []
        for sequence in range(2):
            rows = Rows(
                rng.standard_normal((40, shape.n_embd)).astype(np.float32),
                np.arange(40, dtype=np.int32),
                want_logits=np.arange(40) % 2 == sequence,
            )
            decoder.clear()
            (logits,) = decoder.decode([rows])
            assert np.isfinite(logits).all()
            assert 0.5 < logits.std() < 2
            last.append(logits[-1])
        assert abs(np.corrcoef(last)[0, 1]) < 0.5


def test_a_prompt_of_llava_is_written_tokenised_and_answered(tmp_path: Path) -> None:
    with (
        LanguageModel.open(cached_language_model(TINY, cache=tmp_path), threads=1) as model,
        PlainDecoder(model, n_ctx=128) as decoder,
    ):
        prompt = chat_prompt(model, "Describe the image briefly.", 1)
        before, after = prompt.tokenize(model)
        assert (prompt.form, before[0]) == ("image parts", model.bos)
        said = model.detokenize(np.concatenate([before, after]))
        assert " ".join(said.split()) == "USER: Describe the image briefly. ASSISTANT:"
        assert len(before) + len(after) <= 12, "words are tokens of their own"
        assert model.detokenize(model.tokenize("Qué 7~", add_special=False, parse_special=False)).strip() == "Qué 7~"
        rows = TokenEmbedding.of(model).rows(np.concatenate([before, after]), 0)
        assert np.isfinite(decoder.decode([rows])[0]).all()


def test_a_file_is_written_once_the_same_every_time_and_again_when_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = cached_language_model(TINY, cache=tmp_path / "cache")
    whole, written = path.read_bytes(), path.stat().st_mtime_ns
    assert cached_language_model(TINY, cache=tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == written
    assert cached_language_model(TINY, cache=tmp_path / "other").read_bytes() == whole
    path.write_bytes(whole[:-100])
    assert cached_language_model(TINY, cache=tmp_path / "cache").read_bytes() == whole
    assert "truncated" in caplog.text
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [path.name], "nothing is left behind"


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**12, 10**12, 3 * 10**9))
    with pytest.raises(TokcompError, match=r"llava-1\.5-7b-Q4_0 takes 3\.9 GB and the disk has 3\.0 GB free") as fault:
        cached_language_model(LANGUAGE_SHAPES["llava-1.5-7b"], cache=tmp_path)
    assert "EDGE_TOKCOMP_CACHE" in str(fault.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_quantisation_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'Q4_K' is unknown; choose Q4_0 or Q8_0"):
        cached_language_model(TINY, "Q4_K", tmp_path)
