"""What looks at pictures: our tower, or llama.cpp's own where there is none here or it is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_tokcomp import load
from edge_tokcomp.cli import main
from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.mtmd_engine import MtmdEngine
from edge_tokcomp.tower_engine import TowerEngine
from family_proof import Proof, error, our_greedy, photo

SIZES = {"qwen2vl": (96, 64), "qwen3vl": (160, 128), "gemma3": (64, 64), "lfm2vl": (320, 256), "mistral3": (64, 48)}
"""Pictures that neither resizes."""


def unknown(metadata: dict[str, object]) -> None:
    """A projector that is llama.cpp's alone: its tower is Qwen2.5-VL's, under another name."""
    metadata["clip.projector_type"] = "qwen2.5o"


@pytest.fixture(scope="module", params=sorted(SIZES))
def proof(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Proof:
    return Proof.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    return Proof.make("qwen25vl", tmp_path_factory.mktemp("other"), unknown)


def test_both_engines_lead_to_the_same_text(proof: Proof) -> None:
    picture = photo(*SIZES[proof.name])
    question = "what is this"
    found = []
    for engine in ("onnx", "mtmd"):
        with proof.open(engine=engine) as vlm:
            assert vlm.engine.name == engine
            found.append((vlm.encode(picture), *our_greedy(vlm, [picture], question, 4)))
    (ours, said, logits), (theirs, repeated, again) = found
    assert ours.plan.before == theirs.plan.before
    if proof.name != "gemma3":  # where llama.cpp leaves the line breaks around a picture out
        assert error(again, logits) <= 2e-2
        assert repeated == said


@pytest.mark.parametrize("method", ["divprune", "mosaic", "pool"])
def test_what_llama_cpp_encodes_is_compressed(proof: Proof, method: str) -> None:
    picture = photo(*SIZES[proof.name])
    with proof.open(engine="mtmd", method=method, keep=0.5) as vlm:
        encoded = vlm.encode(picture)
        kept = len(encoded.plan)
        assert 0 < kept == round(encoded.plan.before / 2 + 1e-9)
        assert (encoded.rows.crop >= 0).sum() == kept
        answer = vlm.answer(encoded, "what is this", max_tokens=4)
        assert answer.tokens_after == kept
        assert "".join(vlm.ask(encoded, "what is this", stream=True, max_tokens=4)) == answer.text


def test_kept_rows_of_a_grid_stay_where_they_were(other: Proof) -> None:
    with other.open(engine="mtmd", method="uniform", keep=4) as vlm:
        encoded = vlm.encode(photo(168, 140))
    rows, (grid,) = encoded.rows, encoded.tokens.layout.grids
    images = rows.crop >= 0
    row, column = np.divmod(encoded.tokens.layout.cell[encoded.plan.keep], grid[1])
    start = int(np.argmax(images))
    assert rows.positions[0][images].tolist() == [start] * 4
    assert rows.positions[1][images].tolist() == (row + start).tolist()
    assert rows.positions[2][images].tolist() == (column + start).tolist()
    after = rows.positions[0][np.flatnonzero(images)[-1] + 1 :]
    assert after.tolist() == list(range(start + max(grid), start + max(grid) + len(after)))
    assert rows.advance == start + max(grid) + len(after)


def test_a_model_without_a_tower_here_is_served_and_the_reason_said(
    other: Proof, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with other.open(keep=8) as vlm:
        assert isinstance(vlm.engine, MtmdEngine)
        assert vlm.engine.reason.startswith("llama.cpp's own (mtmd), on the CPU: projector qwen2.5o is not")
        assert isinstance(vlm.caption(photo(168, 140), max_tokens=4), str)
    photo(168, 140).save(tmp_path / "a.png")
    files = ["--lm", str(other.lm), "--mmproj", str(other.mmproj), "--ctx", "1024"]
    assert main(["caption", str(tmp_path / "a.png"), *files, "--keep", "8", "--max-tokens", "3"]) == 0
    assert "llama.cpp's own (mtmd)" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "a.png"), *files, "--keep", "8", "--out", str(tmp_path / "b.png")]) == 2
    assert "cannot be drawn" in capsys.readouterr().err


def test_a_tower_of_ours_is_taken_where_there_is_one(proof: Proof) -> None:
    with proof.open() as vlm:
        assert isinstance(vlm.engine, TowerEngine)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"engine": "cuda"}, UsageError, "unknown engine 'cuda'; one of auto, onnx, mtmd"),
        ({"engine": "onnx"}, TokcompError, "projector qwen2.5o is not supported"),
        ({"precision": "int8"}, UsageError, "precision int8 is of our own towers"),
        ({"method": "resolution", "keep": 8}, UsageError, "acts in the tower or before it"),
        ({"method": "visionzip", "keep": 8}, TokcompError, "needs the attention of the vision tower"),
    ],
)
def test_what_the_engine_cannot_do_is_one_line(
    other: Proof, options: dict[str, object], kind: type[TokcompError], message: str
) -> None:
    with (
        pytest.raises(kind, match=message) as fault,
        load(other.lm, other.mmproj, threads=1, provider="cpu", **options) as vlm,  # type: ignore[arg-type]
    ):
        vlm.encode(photo(168, 140))
    assert "\n" not in str(fault.value)
