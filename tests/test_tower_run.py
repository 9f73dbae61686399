"""A tower at work: where its two graphs run, and what is said when one of them fails."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.export.graph import Graph
from edge_tokcomp.tower import Tower

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tower of 12 numbers a picture whose features do not come out of less than 5 pictures; rows are squared."""
    with Graph(tmp_path / "tower.onnx") as graph:
        pixels = graph.input("pixels", ("batch", 3, 2, 2))
        graph.output(graph.node("Reshape", pixels, graph.ints(-1, 5, 3)), "features", ("batch", 5, 3))
        graph.save(
            {"image_size": "2", "patch_size": "1", "heads": "1", "unit": "1", "class_token": "False", "window": "0"}
        )
    with Graph(tmp_path / "projector.onnx") as graph:
        rows = graph.input("rows", ("n", 3))
        graph.output(graph.node("Mul", rows, rows), "embeddings", ("n", 3))
        graph.save()
    return tmp_path


@pytest.mark.parametrize("refused", ["tower.onnx", "projector.onnx"])
def test_neither_graph_runs_on_the_cpu_in_silence_when_cuda_was_asked_for(
    directory: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    started: list[tuple[str, str]] = []

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        """CUDA starts for every graph but one."""

        def __init__(self, path: str, *options: Any, providers: list[Any]) -> None:
            names = [name if isinstance(name, str) else name[0] for name in providers]
            self.claimed = [name for name in names if name == CPU or Path(path).name != refused]
            started.append((Path(path).name, self.claimed[0]))
            super().__init__(path, *options, providers=[CPU])

        def get_providers(self) -> list[str]:
            return self.claimed

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(TokcompError, match="provider cuda does not start here"):
        Tower(directory, provider="cuda", threads=1)
    started.clear()
    tower = Tower(directory, provider="auto", threads=1)
    assert (tower.provider, tower.provider_reason) == (
        "cpu", "cpu: CUDA is installed but does not start on this machine",
    )  # fmt: skip
    assert dict(started) == {"tower.onnx": CPU, "projector.onnx": CPU}
    assert tower.project(np.ones((2, 3), np.float32)).tolist() == [[1, 1, 1]] * 2


@pytest.mark.parametrize("value", [3e38, -np.inf, np.nan])
def test_a_projected_row_that_is_not_finite_is_named_with_what_to_check(directory: Path, value: float) -> None:
    tower = Tower(directory, provider="cpu", threads=1)
    rows = np.ones((4, 3), np.float32)
    rows[2, 1] = value
    with pytest.raises(TokcompError, match=r"projector, row 2 of 4: not finite .* check the mmproj file") as fault:
        tower.project(rows)
    assert "\n" not in str(fault.value)


def test_a_failure_of_onnx_runtime_is_one_line_that_names_the_graph(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tower = Tower(directory, provider="cpu", threads=1)
    assert tower.encode(np.ones((5, 3, 2, 2), np.float32)).features.shape == (4, 5, 3)
    with pytest.raises(TokcompError, match=r"tower\.onnx: ONNX Runtime fails on cpu \(.*Reshape.*free memory") as fault:
        tower.encode(np.ones((1, 3, 2, 2), np.float32))
    assert "\n" not in str(fault.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "fault", [RuntimeError("Failed to allocate memory\nfor requested buffer"), MemoryError(), ValueError("bad kernel")]
)
def test_whatever_onnx_runtime_raises_is_one_line(
    directory: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    class Failing:
        def run(self, *_: object) -> None:
            raise fault

    tower = Tower(directory, provider="cpu", threads=1)
    monkeypatch.setattr(tower, "_projector", Failing())
    with pytest.raises(TokcompError, match=r"projector\.onnx: ONNX Runtime fails on cpu \(") as caught:
        tower.project(np.ones((1, 3), np.float32))
    assert "\n" not in str(caught.value)


def header(shape: str, kind: str = "'<f4'") -> bytes:
    """What NumPy would write before an array that says so of itself."""
    text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def saved(write: Callable[..., None], row: list[float]) -> bytes:
    with io.BytesIO() as stream:
        write(stream, np.asarray(row, np.float32))
        return stream.getvalue()


_ROW = saved(np.save, [1, 2, 3])
SEPARATORS = {
    "empty": b"",
    "header cut off": _ROW[:40],
    "row cut off": _ROW[:-4],
    "longer": _ROW + bytes(4),
    "claims a terabyte": header("(1000000000000,)"),
    "claims more than can be": header(f"({2**63},)"),
    "claims less than nothing": header("(-1,)"),
    "archive": saved(np.savez, [1, 2, 3]),
    "no archive": b"PK\x03\x04junk",
    "pickle": b"\x80\x04.",
    "objects": header("(3,)", "'|O'") + bytes(12),
    "other numbers": header("(3,)", "'<i4'") + bytes(12),
    "column": header("(3, 1)") + bytes(12),
    "deep": b"\x93NUMPY\x01\x00" + struct.pack("<H", 60000) + b"(" * 60000,
    "not finite": saved(np.save, [1, np.nan, 3]),
    "as large as a row": bytes(len(_ROW)),
}


@pytest.mark.parametrize("name", SEPARATORS)
def test_a_separator_that_is_no_row(directory: Path, name: str) -> None:
    (directory / "separator.npy").write_bytes(_ROW)
    separator = Tower(directory, provider="cpu", threads=1).separator
    assert separator is not None
    assert separator.tolist() == [1, 2, 3]
    (directory / "separator.npy").write_bytes(SEPARATORS[name])
    with pytest.raises(TokcompError, match=rf"^{directory}: .*separator.*; export the tower again$") as fault:
        Tower(directory, provider="cpu", threads=1)
    assert "\n" not in str(fault.value)


def test_deepstack_features_that_the_projector_does_not_take(directory: Path) -> None:
    with Graph(directory / "tower.onnx") as graph:
        pixels = graph.input("pixels", ("batch", 3, 2, 2))
        for name, width in (("features", 3), ("deepstack", 6)):
            graph.output(graph.node("Reshape", pixels, graph.ints(-1, 4, width)), name, ("batch", 4, width))
        graph.save(
            {"image_size": "2", "patch_size": "1", "heads": "1", "unit": "1", "class_token": "False", "window": "0"}
        )
    with pytest.raises(TokcompError, match=r"are no tower and projector .*rows of 3 and 3"):
        Tower(directory, provider="cpu", threads=1)
