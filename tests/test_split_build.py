"""Segments are built whole or not at all, checked, and kept in the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from edge_tokcomp.cli import main
from edge_tokcomp.errors import TokcompError
from edge_tokcomp.export import check_segments, segment_plan, split
from edge_tokcomp.export.check_segments import TOLERANCE, read_check
from edge_tokcomp.export.gguf_parts import GgufParts
from edge_tokcomp.export.split import cached_segments, split_model
from edge_tokcomp.language.segment_files import SegmentFiles
from tiny_models import TinyModel, write_tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_llama(tmp_path_factory.mktemp("lm") / "llama.gguf", n_layer=6)


def test_what_is_there_is_not_overwritten(llama: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(TokcompError, match="already exists"):
        split_model(llama.path, [2], tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TokcompError, match="already exists"):
        split_model(llama.path, [2], tmp_path / "link")
    with pytest.raises(TokcompError, match="cannot be written"):
        split_model(llama.path, [2], llama.path / "out")


def test_a_disk_that_is_too_small_is_found_before_writing(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 10**6, 10**6))
    monkeypatch.setattr(GgufParts, "write", lambda *_: pytest.fail("something was written"))
    with pytest.raises(TokcompError, match=r"the segments need \d MB, 1 MB are free") as caught:
        split_model(llama.path, [2], tmp_path / "out")
    assert str(tmp_path) in str(caught.value)
    assert not os.listdir(tmp_path)


def test_the_space_asked_for_is_what_the_files_take(llama: TinyModel, tmp_path: Path) -> None:
    parts = segment_plan.Source.read(llama.path).segments([1, 4])
    folder = split_model(llama.path, [1, 4], tmp_path / "out", verify=False)
    assert [path.stat().st_size for path in SegmentFiles.read(folder).paths] == [part.n_bytes for part in parts]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    write = GgufParts.write

    def fail_at_the_second(self: GgufParts, stream: Any) -> None:
        if "segment-2" in stream.name:
            stream.write(b"GGUF")
            raise fault
        write(self, stream)

    monkeypatch.setattr(GgufParts, "write", fail_at_the_second)
    with pytest.raises(TokcompError if isinstance(fault, OSError) else KeyboardInterrupt) as caught:
        split_model(llama.path, [2], tmp_path / "out")
    assert "No space left" in str(caught.value) or not isinstance(fault, OSError)
    assert not os.listdir(tmp_path)


def test_the_cache_is_built_once_for_each_cut(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (cached_segments(llama.path, at, tmp_path, threads=1) for at in ([4], [2, 4]))
    assert first != second
    assert [SegmentFiles.read(folder).cuts for folder in (first, second)] == [(4,), (2, 4)]
    monkeypatch.setattr(split, "folder_aside", lambda _: pytest.fail("built again"))
    monkeypatch.setattr(split, "verify_segments", lambda *_, **__: pytest.fail("verified again"))
    assert cached_segments(str(llama.path), (2, 4), tmp_path) == second
    assert cached_segments(llama.path, [4], tmp_path) == first
    assert cached_segments(llama.path, [2], tmp_path) == second  # cut there too, and at one layer more
    assert sorted(os.listdir(tmp_path)) == sorted([first.name, second.name])


def test_a_file_written_since_is_cut_anew(tmp_path: Path) -> None:
    """The fingerprint is of samples, which a change of one tensor may miss."""
    path = write_tiny_llama(tmp_path / "m.gguf", n_layer=4).path
    first = cached_segments(path, [2], tmp_path / "cache", verify=False)
    os.utime(path, ns=(0, 1))
    assert cached_segments(path, [2], tmp_path / "cache", verify=False) != first


def test_a_check_that_cannot_be_noted_is_no_fault(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cached_segments(llama.path, [2], tmp_path, verify=False)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("edge_tokcomp.export.check_segments.write_whole", refuse)
    assert cached_segments(llama.path, [2], tmp_path, threads=1) == folder


@pytest.mark.parametrize("damage", ["truncated", "missing", "other"])
def test_damaged_segments_in_the_cache_are_cut_again(llama: TinyModel, tmp_path: Path, damage: str) -> None:
    folder = cached_segments(llama.path, [2, 4], tmp_path, verify=False)
    last = folder / "segment-3-of-3.gguf"
    whole = last.read_bytes()
    if damage == "truncated":
        last.write_bytes(whole[:-100])
    elif damage == "missing":
        last.unlink()
    else:
        shutil.rmtree(folder)
        split_model(llama.path, [3], folder, verify=False)
    assert cached_segments(llama.path, [2, 4], tmp_path, verify=False) == folder
    assert last.read_bytes() == whole
    assert os.listdir(tmp_path) == [folder.name]


def test_of_two_builders_the_first_ones_segments_are_kept(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_builder(*_: object, **__: object) -> None:
        folder = cached_segments(llama.path, [2], tmp_path, verify=False)
        (folder / "first").touch()

    monkeypatch.setattr(split, "verify_segments", other_builder)
    folder = cached_segments(llama.path, [2], tmp_path)
    assert (folder / "first").exists()
    assert os.listdir(tmp_path) == [folder.name]


def test_segments_cached_unverified_are_verified_when_that_is_asked(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cached_segments(llama.path, [2], tmp_path, verify=False)
    assert read_check(folder) is None
    monkeypatch.setattr(check_segments, "TOLERANCE", -1.0)
    with pytest.raises(TokcompError, match="do not give the model's logits"):
        cached_segments(llama.path, [2], tmp_path, threads=1)
    assert not os.listdir(tmp_path)
    monkeypatch.undo()
    cached_segments(llama.path, [2], tmp_path, verify=False)
    assert cached_segments(llama.path, [2], tmp_path, threads=1) == folder
    check = read_check(folder)
    assert check is not None
    assert check.relative_error <= TOLERANCE


def test_memory_stays_flat_however_large_the_model(tmp_path: Path) -> None:
    """A model of 64 MB, half of it in one tensor."""
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((32, 32), np.float32))
    for layer, rows in ((0, 120_000), (1, 110_000)):
        data = np.zeros((rows, 272), np.uint8)
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", data, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    program = (
        "import resource, sys\n"
        "from edge_tokcomp.export.split import split_model\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak(); split_model(sys.argv[1], [1], sys.argv[2], verify=False); print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "m.gguf", tmp_path / "out"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 20
    assert (tmp_path / "out" / "segment-1-of-2.gguf").stat().st_size > 30e6


def test_the_command_says_where_the_segments_are(
    llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["split", str(llama.path), "--at", "2,5", "--out", str(tmp_path / "out"), "--threads", "1"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out'}\n"
    for words in (
        "llama.gguf: 1.2 MB",
        "cutting it before layers 2, 5",
        "segment-2-of-3.gguf: layers 2 to 4, ",
        "relative error ",
    ):
        assert words in said.err
    assert main(["split", str(llama.path), "--at", "3", "--no-verify"]) == 0
    said = capsys.readouterr()
    assert SegmentFiles.read(said.out.strip()).cuts == (3,)
    assert Path(said.out.strip()).parent == Path(os.environ["EDGE_TOKCOMP_CACHE"])
    assert "not run against the whole model" in said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--at", "2,x"], "--at 2,x: name layers by number"),
        (["--at", ""], "name layers by number"),
        (["--at", "2", "--threads", "0"], "--threads 0"),
        (["--at", "9"], "has 6 layers"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(
    llama: TinyModel, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["split", str(llama.path), *arguments]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert not said.out
