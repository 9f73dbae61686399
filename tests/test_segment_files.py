"""A directory of segments is checked as a whole before any of it is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.export import segment_plan
from edge_tokcomp.export.split import split_model
from edge_tokcomp.files import fingerprint
from edge_tokcomp.language import binding, segment_files
from edge_tokcomp.language.gguf_header import read_header
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.segment_files import SegmentFiles
from edge_tokcomp.language.segmented import SegmentedDecoder
from tiny_models import TinyModel, write_tiny_llama, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_llama(tmp_path_factory.mktemp("lm") / "llama.gguf", n_layer=6)


@pytest.fixture(scope="module")
def whole(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model cut in three."""
    return split_model(model.path, [2, 5], tmp_path_factory.mktemp("segments") / "whole", verify=False)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "segments"))


def test_segments_are_described(model: TinyModel, whole: Path) -> None:
    files = SegmentFiles.read(str(whole))
    assert (files.directory, files.cuts, files.depth, files.architecture) == (whole, (2, 5), 6, "llama")
    assert [path.name for path in files.paths] == [f"segment-{number}-of-3.gguf" for number in (1, 2, 3)]
    assert files.source == fingerprint(model.path)


def test_ten_segments_are_in_order(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "m.gguf", n_layer=11)
    files = SegmentFiles.read(split_model(model.path, range(1, 11), tmp_path / "out", verify=False))
    assert files.cuts == tuple(range(1, 11))
    assert files.paths[10].name == "segment-11-of-11.gguf"


def test_other_files_beside_the_segments_are_left_alone(folder: Path) -> None:
    (folder / "README.txt").write_text("mine")
    assert SegmentFiles.read(folder).depth == 6


def test_spans_hold_the_entries_of_a_header(model: TinyModel) -> None:
    header, data = read_header(model.path), model.path.read_bytes()
    ends = [24]
    for key, (start, end) in header.spans.items():
        assert start == ends[-1]
        assert data[start : start + 8 + len(key)] == len(key).to_bytes(8, "little") + key.encode()
        ends.append(end)
    assert {*header.spans} == {*header.metadata, *header.arrays}
    assert data[ends[-1] + 8 :].startswith(b"token_embd.weight")


def no_folder(folder: Path, _model: TinyModel) -> None:
    shutil.rmtree(folder)


def a_file(folder: Path, model: TinyModel) -> None:
    shutil.rmtree(folder)
    shutil.copy(model.path, folder)


def empty(folder: Path, _model: TinyModel) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def uncut(folder: Path, model: TinyModel) -> None:
    empty(folder, model)
    shutil.copy(model.path, folder)


def uncut_under_a_segments_name(folder: Path, model: TinyModel) -> None:
    shutil.copy(model.path, folder / "segment-2-of-3.gguf")


def another_gguf(folder: Path, model: TinyModel) -> None:
    shutil.copy(model.path, folder / "model.gguf")


def first_missing(folder: Path, _model: TinyModel) -> None:
    (folder / "segment-1-of-3.gguf").unlink()


def last_missing(folder: Path, _model: TinyModel) -> None:
    (folder / "segment-3-of-3.gguf").unlink()


def truncated(folder: Path, _model: TinyModel) -> None:
    path = folder / "segment-2-of-3.gguf"
    path.write_bytes(path.read_bytes()[:-500])


def two_cuts(folder: Path, model: TinyModel) -> None:
    other = split_model(model.path, [3], folder.parent / "other", verify=False)
    shutil.copy(other / "segment-1-of-2.gguf", folder)


def too_many(folder: Path, _model: TinyModel) -> None:
    shutil.copy(folder / "segment-3-of-3.gguf", folder / "segment-4-of-3.gguf")


def renamed(folder: Path, _model: TinyModel) -> None:
    shutil.copy(folder / "segment-1-of-3.gguf", folder / "segment-2-of-3.gguf")


def of_another_cut(folder: Path, model: TinyModel) -> None:
    other = split_model(model.path, [3, 5], folder.parent / "other", verify=False)
    shutil.copy(other / "segment-2-of-3.gguf", folder)


def of_another_last_cut(folder: Path, model: TinyModel) -> None:
    other = split_model(model.path, [2, 4], folder.parent / "other", verify=False)
    shutil.copy(other / "segment-2-of-3.gguf", folder)


def of_another_model(folder: Path, _model: TinyModel) -> None:
    other = write_tiny_llama(folder.parent / "other.gguf", n_layer=6, seed=1)
    cut = split_model(other.path, [2, 5], folder.parent / "other", verify=False)
    shutil.copy(cut / "segment-2-of-3.gguf", folder)


def of_another_architecture(folder: Path, _model: TinyModel) -> None:
    other = write_tiny_model(folder.parent / "other.gguf", "qwen2", n_layer=6)
    cut = split_model(other.path, [2, 5], folder.parent / "other", verify=False)
    shutil.copy(cut / "segment-2-of-3.gguf", folder)


def without_a_number(folder: Path, _model: TinyModel) -> None:
    replace(folder / "segment-1-of-3.gguf", b"edge_tokcomp.segment.depth", b"edge_tokcomp.segment.xepth")


def without_layers(folder: Path, _model: TinyModel) -> None:
    name = b"llama.block_count\x04\x00\x00\x00"
    replace(folder / "segment-1-of-3.gguf", name + b"\x02", name + b"\x00")


def too_deep(folder: Path, _model: TinyModel) -> None:
    name = b"edge_tokcomp.segment.depth\x04\x00\x00\x00"
    for path in folder.iterdir():
        replace(path, name + b"\x06", name + b"\x07")


def replace(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_folder, "cannot be read (No such file or directory); name a directory of segments"),
        (a_file, "cannot be read (Not a directory); name a directory of segments"),
        (empty, "holds no segments; make them with `edge-tokcomp split"),
        (uncut, "llama.gguf: is no segment"),
        (uncut_under_a_segments_name, "segment-2-of-3.gguf: is no segment"),
        (another_gguf, "model.gguf: is no segment"),
        (first_missing, "segment-1-of-3.gguf: missing"),
        (last_missing, "segment-3-of-3.gguf: missing"),
        (truncated, "segment-2-of-3.gguf: truncated"),
        (two_cuts, "does not belong with"),
        (too_many, "segment-4-of-3.gguf: does not belong with"),
        (renamed, "segment-2-of-3.gguf: is segment 1 of another cut"),
        (of_another_cut, "segment-2-of-3.gguf: begins at layer 3, not 2"),
        (of_another_last_cut, "segment-3-of-3.gguf: begins at layer 5, not 4"),
        (of_another_model, "segment-2-of-3.gguf: is of another model than segment-1-of-3.gguf"),
        (of_another_architecture, "segment-2-of-3.gguf: is of another model than segment-1-of-3.gguf"),
        (without_a_number, "segment-1-of-3.gguf: damaged segment (edge_tokcomp.segment.depth is None)"),
        (too_deep, "holds layers 0 to 5 of 7"),
        (without_layers, "segment-1-of-3.gguf: says it has 0 layers, not 1 to 512"),
    ],
)
def test_what_is_no_whole_set_of_segments_is_one_clear_line(
    folder: Path,
    model: TinyModel,
    damage: Callable[[Path, TinyModel], None],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(folder, model)
    monkeypatch.setattr(binding, "Model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(TokcompError) as caught:
        SegmentFiles.read(folder)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("cutter", "words"), [(0, "an older version"), (99, "a newer version")])
def test_segments_of_another_cutter_are_refused(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cutter: int, words: str
) -> None:
    monkeypatch.setattr(segment_plan, "CUTTER", cutter)
    monkeypatch.setattr(segment_files, "CUTTER", cutter)
    folder = split_model(model.path, [2], tmp_path / "out", verify=False)
    monkeypatch.undo()
    with pytest.raises(TokcompError, match=f"was cut by {words}.*cut the model again"):
        SegmentFiles.read(folder)


def test_segments_of_another_width_are_refused(tmp_path: Path) -> None:
    """llama.cpp would read beyond the end of the rows it is given."""
    folders = []
    for width in (64, 128):
        path = write_tiny_llama(tmp_path / f"{width}.gguf", n_embd=width, n_layer=4).path
        folders.append(split_model(path, [2], tmp_path / f"cut-{width}", verify=False))
    narrow, wide = folders
    with ExitStack() as stack:
        paths = (narrow / "segment-1-of-2.gguf", wide / "segment-2-of-2.gguf")
        models = [stack.enter_context(LanguageModel.open(path, threads=1)) for path in paths]
        with pytest.raises(TokcompError, match=r"takes rows of 128, segment-1-of-2\.gguf gives 64"):
            SegmentedDecoder(models, [2])
    shutil.copy(wide / "segment-2-of-2.gguf", narrow / "segment-2-of-2.gguf")
    with pytest.raises(TokcompError, match="is of another model than"):
        SegmentFiles.read(narrow)
