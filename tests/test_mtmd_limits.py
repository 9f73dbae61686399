"""What libmtmd cannot do is said in one line; what it takes of the machine is what it is given."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
import pytest

from edge_tokcomp.errors import ImageError, TokcompError, UsageError
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.mtmd import MtmdEncoder
from mtmd_files import Files, noise
from tiny_mmproj import write_mmproj
from tiny_models import write_tiny_model

Opened = tuple[LanguageModel, MtmdEncoder]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("mtmd"))


@pytest.fixture
def opened(request: pytest.FixtureRequest, files: Files) -> Iterator[Opened]:
    lm, mmproj = files.of(request.param)
    with LanguageModel.open(lm, threads=1) as model, MtmdEncoder(mmproj, model, threads=1) as encoder:
        yield model, encoder


def of(*families: str) -> Any:
    return pytest.mark.parametrize("opened", families, indirect=True)


@of("idefics3")
@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((0, 5, 3), "no pixels"),
        ((70_000, 2, 3), "too large"),
        ((60_000, 60_000, 3), "too large"),
        ((1, 60_000, 3), "128x0"),
    ],
)
def test_a_picture_that_cannot_be_prepared_is_an_image_error(opened: Opened, shape: Any, says: str) -> None:
    _, encoder = opened
    with pytest.raises(ImageError, match=says) as fault:
        encoder.encode(np.broadcast_to(np.uint8(7), shape))
    assert "\n" not in str(fault.value)


@of("llava15")
def test_a_picture_of_another_shape_or_type_is_a_bug(opened: Opened) -> None:
    _, encoder = opened
    for picture in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            encoder.encode(picture)


@of("llava15")
def test_a_closed_encoder_or_model_says_so(opened: Opened) -> None:
    model, encoder = opened
    model.close()
    with pytest.raises(ValueError, match="Model is closed"):
        encoder.encode(noise(8, 8))
    encoder.close()
    encoder.close()
    with pytest.raises(ValueError, match="MtmdEncoder is closed"):
        encoder.encode(noise(8, 8))


def test_a_projector_of_another_width_is_refused_before_it_is_loaded(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mtmd, "mtmd_init_from_file", None)
    wanted = pytest.raises(TokcompError, match=r"rows of 256.* takes 64; use the mmproj and")
    with LanguageModel.open(files.of("qwen2vl")[0], threads=1) as model, wanted:
        MtmdEncoder(files.of("qwen3vl")[1], model, threads=1)


def test_a_vocabulary_without_the_markers_is_refused(files: Files, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "lm.gguf", "llama")
    wanted = pytest.raises(TokcompError, match="its vocabulary lacks a marker that idefics3 projectors need")
    with LanguageModel.open(tmp_path / "lm.gguf", threads=1) as model, wanted:
        MtmdEncoder(files.of("idefics3")[1], model, threads=1)


def test_a_llama_cpp_without_libmtmd_is_said(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp.mtmd_cpp", None)
    lm, mmproj = files.of("llava15")
    with LanguageModel.open(lm, threads=1) as model, pytest.raises(TokcompError, match="built without libmtmd"):
        MtmdEncoder(mmproj, model, threads=1)


def test_options_that_cannot_be_honoured_are_refused(files: Files) -> None:
    lm, mmproj = files.of("llava15")
    with LanguageModel.open(lm, threads=1) as model:
        with pytest.raises(UsageError, match="threads 0"):
            MtmdEncoder(mmproj, model, threads=0)
        if not llama.llama_supports_gpu_offload():
            with pytest.raises(TokcompError, match="without a GPU backend"):
                MtmdEncoder(mmproj, model, threads=1, gpu=True)


def test_llama_cpps_reason_is_in_the_error_and_its_lines_in_our_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_model(tmp_path / "lm.gguf", "llama", n_embd=96)
    good = write_mmproj(tmp_path / "good.gguf").path
    bad = write_mmproj(
        tmp_path / "bad.gguf", edit=lambda metadata: metadata.update({"clip.vision.image_std": [0.5]})
    ).path
    with LanguageModel.open(tmp_path / "lm.gguf", threads=1) as model, caplog.at_level(logging.DEBUG):
        MtmdEncoder(good, model, threads=1).close()
        with pytest.raises(
            TokcompError, match=r"bad.gguf: llama.cpp cannot load it \(.*at least 3 elements.*\)$"
        ) as fault:
            MtmdEncoder(bad, model, threads=1)
    assert "\n" not in str(fault.value)
    assert {"load_hparams: projector:          mlp"} <= {record.getMessage() for record in caplog.records}


SCRIPT = """
import os, sys
from pathlib import Path
import numpy as np
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.mtmd import MtmdEncoder

def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

lm, mmproj, threads, often = sys.argv[1:]
picture = np.full((200, 300, 3), 99, np.uint8)
with LanguageModel.open(lm, threads=1) as model, MtmdEncoder(Path(mmproj), model, threads=int(threads)) as encoder:
    before = len(os.listdir("/proc/self/task"))
    for _ in range(int(often) // 4):
        encoder.encode(picture)
    settled = resident()
    for _ in range(int(often) - int(often) // 4):
        encoder.encode(picture)
    print(len(os.listdir("/proc/self/task")) - before, resident() - settled)
"""


def in_a_process(files: Files, family: str, threads: int, often: int) -> tuple[int, int, str]:
    """Threads started, bytes that memory grew by over the last three quarters of the calls, and what stderr got."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", SCRIPT, *map(str, files.of(family)), str(threads), str(often)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    started, grown = map(int, done.stdout.split())
    return started, grown, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_encoding_uses_the_threads_it_is_given_and_is_silent(files: Files, threads: int) -> None:
    started, _, stderr = in_a_process(files, "qwen25vl", threads, 4)
    assert started == threads - 1
    assert stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat(files: Files) -> None:
    _, grown, _ = in_a_process(files, "internvl_qwen2", 1, 200)
    assert grown < 2 << 20


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(
    "family",
    ["llava_next", "qwen25vl", "qwen3vl", "internvl_qwen2", "gemma3", "mistral3", "cogvlm", "hunyuanvl", "deepseek4v"],
)
def test_no_damaged_file_ends_the_process(files: Files, family: str) -> None:
    script = Path(__file__).with_name("mtmd_survivors.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}
    command = [sys.executable, str(script), *map(str, files.of(family))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.stdout, done.returncode) == ("", 0)
