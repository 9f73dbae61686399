"""Every rule that is checked before llama.cpp, which would abort the process or answer -1."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest

from decoding import exact, image_prompt, random_rows, wanting_all
from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.language.cells import Cells
from edge_tokcomp.language.decoder import PlainDecoder
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.token_embedding import TokenEmbedding, bare_rows
from edge_tokcomp.tokens import Rows
from tiny_models import TinyModel, write_tiny_llama, write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_llama(tmp_path_factory.mktemp("lm") / "llama.gguf", n_layer=3)


@pytest.fixture(scope="module")
def model(tiny: TinyModel) -> Iterator[LanguageModel]:
    with LanguageModel.open(tiny.path, threads=1) as opened:
        yield opened


@pytest.fixture
def decoder(model: LanguageModel) -> Iterator[PlainDecoder]:
    with exact(model, n_sequences=4) as made:
        yield made


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanguageModel]:
    path = write_tiny_model(tmp_path_factory.mktemp("lm") / "qwen2vl.gguf", "qwen2vl").path
    with LanguageModel.open(path, threads=1) as opened:
        yield opened


def gap_inside(rows: Rows) -> Rows:
    return Rows(rows.embeddings, rows.positions + (np.arange(4) > 1).astype(np.int32), rows.sequence)


BAD_ROWS: dict[str, tuple[Callable[[Rows], Rows], str]] = {
    "wrong width": (lambda rows: random_rows(4, 3, width=48), "rows are 48 wide, llama takes 64"),
    "gap before": (lambda rows: random_rows(4, 5), "at position 5, but must follow at 3"),
    "gap inside": (gap_inside, "row 2 .* at position 6, but must follow at 5"),
    "step back": (lambda rows: random_rows(4, 2), "at position 2, but must follow at 3"),
    "no rows": (lambda rows: random_rows(0, 3), "has no rows"),
    "sequence": (lambda rows: random_rows(4, 3, sequence=4), "sequence 4 is outside 0..3"),
    "sections": (lambda rows: Rows(rows.embeddings, np.zeros((4, 4), np.int32)), "one position a row"),
    "nan": (lambda rows: Rows(rows.embeddings * np.float32("nan"), rows.positions), "row 0 .* not finite"),
    "infinite": (lambda rows: Rows(rows.embeddings / np.float32(0), rows.positions), "row 0 .* not finite"),
    "bare": (lambda rows: bare_rows([1, 2, 3, 4], 3), "of rows with embeddings or of tokens alone, not of both"),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_and_leave_no_trace(decoder: PlainDecoder, name: str) -> None:
    bad, words = BAD_ROWS[name]
    decoder.decode([random_rows(3)])
    with pytest.raises(ValueError, match=words):
        decoder.decode([random_rows(2, sequence=1), bad(random_rows(4, 3))])
    assert (decoder.length(0), decoder.length(1), decoder.room) == (3, 0, decoder.n_ctx - 3)
    decoder.decode([random_rows(1, 3)])


def test_full_context_says_how_much_is_needed_and_every_cell_can_be_used(model: LanguageModel) -> None:
    with PlainDecoder(model, n_ctx=256, n_sequences=2) as made:
        made.decode([random_rows(200)])
        with pytest.raises(TokcompError, match=r"60 rows .* 56 of 256 .* raise n_ctx by 4 or more"):
            made.decode([random_rows(30, 200), random_rows(30, sequence=1)])
        made.decode([random_rows(26, 200), random_rows(30, sequence=1)])
        assert made.room == 0
        with pytest.raises(TokcompError, match="1 rows"):
            made.decode([random_rows(1, 30, 1)])
        made.drop(0, 100)
        made.decode([random_rows(126, 30, 1, seed=8)])
        assert made.room == 0


def image_rows(count: int) -> Rows:
    return replace(random_rows(count), crop=np.zeros(count, np.int64))


def test_non_causal_image_must_fit_one_micro_batch(model: LanguageModel) -> None:
    with PlainDecoder(model, n_ctx=256, n_batch=64, n_ubatch=16) as made:
        with pytest.raises(TokcompError, match=r"17 image rows .* n_ubatch is 16; raise n_ubatch and n_batch to 17"):
            made.decode([image_rows(17)], causal=False)
        assert made.room == 256
        made.decode([image_rows(16), random_rows(40, 16)], causal=False)  # text comes in parts
    with PlainDecoder(model, n_ctx=256) as made:
        with pytest.raises(ValueError, match="40 logit rows"):
            made.decode([wanting_all(image_rows(40))], causal=False)
        mixed = replace(random_rows(4), crop=np.array([-1, 0, 0, -1]))
        with pytest.raises(ValueError, match="text stands among the image rows of sequence 0"):
            made.decode([mixed], causal=False)
        assert made.room == 256


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_ctx": 0}, "n_ctx 0"),
        ({"n_ubatch": -1}, "n_ubatch -1"),
        ({"n_sequences": 257}, "n_sequences 257"),
        ({"n_sequences": 9, "n_batch": 8}, "n_sequences 9"),
        ({"threads": 0}, "threads 0"),
        ({"kv_type": "q1"}, "kv_type 'q1'"),
    ],
)
def test_options_out_of_range(model: LanguageModel, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PlainDecoder(model, **options)


def test_context_too_large_for_the_machine_is_one_clear_line(model: LanguageModel) -> None:
    with pytest.raises(TokcompError, match=r"n_ctx 2000000000 needs .* GiB .*; lower n_ctx"):
        PlainDecoder(model, n_ctx=2_000_000_000, kv_type="f32")


def test_failure_inside_llama_cpp_empties_the_sequences_of_that_batch(
    decoder: PlainDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder.decode([random_rows(5), random_rows(5, sequence=1)])
    monkeypatch.setattr("edge_tokcomp.language.batches._check_contiguous", lambda rows, *_: (0, 0))
    with pytest.raises(TokcompError, match=r"cannot decode 2 rows \(code -1"):
        decoder.decode([random_rows(2, 50)])
    monkeypatch.undo()
    assert (decoder.length(0), decoder.length(1)) == (0, 5)
    decoder.decode([random_rows(2), random_rows(1, 5, 1)])


def test_bookkeeping_agrees_with_llama_cpp(decoder: PlainDecoder) -> None:
    """Random forks, drops and batches; the mirror and the real cache tell the same story."""
    rng = np.random.default_rng(11)
    for _ in range(60):
        sequence, other = (int(value) for value in rng.choice(4, 2, replace=False))
        action = rng.integers(4)
        if action == 0:
            decoder.drop(sequence)
        elif action == 1 and decoder.length(sequence):
            decoder.drop(sequence, int(rng.integers(decoder.length(sequence) + 1)))
        elif action == 2:
            decoder.drop(other)
            decoder.fork(sequence, other)
        elif decoder.room >= 40:
            decoder.decode([random_rows(int(rng.integers(1, 40)), decoder.length(sequence), sequence)])
        for each in range(4):
            last = llama.llama_memory_seq_pos_max(decoder._context.memory, each)  # -1 for an empty sequence
            assert last == decoder.length(each) - 1
    free = decoder.room
    at = decoder.length(0)
    decoder.decode([random_rows(free, at, 0)])  # llama.cpp finds exactly as many free cells as we count
    assert decoder.room == 0


def test_mrope_rules(many: LanguageModel) -> None:
    rows, positions = image_prompt()
    with exact(many, n_sequences=2) as made:
        (whole,) = made.decode([Rows(rows, positions)])
        assert made.length(0) == 12
        # Text as plain positions, the image in two parts: the same.
        first = Rows(rows[:3], positions[0, :3], 1)
        last = Rows(rows[16:], positions[0, 16:], 1)
        made.decode([first, Rows(rows[3:9], positions[:, 3:9], 1)])
        made.decode([Rows(rows[9:16], positions[:, 9:16], 1)])
        assert made.length(1) == 3 + 5
        (parts,) = made.decode([last])
        np.testing.assert_allclose(parts, whole, atol=1e-4)
        with pytest.raises(ValueError, match=r"text rows .* start at position 11, but must start at 12"):
            made.decode([Rows(rows[:2], np.array([11, 12], np.int32))])
        with pytest.raises(ValueError, match=r"image rows .* must start at 11 or later"):
            made.decode([Rows(rows[:2], np.array([[10, 10], [12, 12], [12, 13], [0, 0]], np.int32))])
        with pytest.raises(ValueError, match="never step back"):
            made.decode([Rows(rows[:2], np.array([14, 14], np.int32))])
        made.decode([Rows(rows[:1], np.array([40], np.int32))])  # a jump forward is allowed
        made.drop(0, 40)
        assert made.length(0) == 12


def test_unknown_token_is_refused_before_decoding(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="token 416 is outside the vocabulary"):
        TokenEmbedding.of(model).rows([1, 416], 0)


def test_an_unknown_token_without_its_row_is_refused_by_llama_cpp(decoder: PlainDecoder) -> None:
    with pytest.raises(TokcompError, match=r"llama\.cpp cannot decode 2 rows"):
        decoder.decode([bare_rows([1, 416], 0)])
    assert (decoder.length(0), decoder.room) == (0, decoder.n_ctx)
    decoder.decode([bare_rows([1, 415], 0)])


def test_rows_of_nothing_are_a_bug() -> None:
    with pytest.raises(ValueError, match="2 rows have neither embeddings nor tokens"):
        Rows(np.empty((2, 0), np.float32), np.arange(2, dtype=np.int32))


def test_closed_decoder(model: LanguageModel) -> None:
    made = PlainDecoder(model, n_ctx=256)
    made.close()
    made.close()
    with pytest.raises(ValueError, match="is closed"):
        made.decode([random_rows(1)])


def test_the_process_lives_after_every_refusal(tiny: TinyModel) -> None:
    """What would abort llama.cpp is tried in a process of its own: it must end with exit code 0."""
    program = (
        "import sys, numpy as np\n"
        "from edge_tokcomp.language.model import LanguageModel\n"
        "from edge_tokcomp.language.decoder import PlainDecoder\n"
        "from edge_tokcomp.tokens import Rows\n"
        "model = LanguageModel.open(sys.argv[1], threads=1)\n"
        "decoder = PlainDecoder(model, n_ctx=256, n_batch=16, n_ubatch=8, n_sequences=2)\n"
        "def rows(n, width=64, start=0, sequence=0):\n"
        "    places, crop = np.arange(start, start + n, dtype=np.int32), np.zeros(n, np.int64)\n"
        "    return Rows(np.ones((n, width), np.float32), places, sequence, crop=crop)\n"
        "for batch, causal in (([rows(9)], False), ([rows(300)], True), ([rows(3, width=32)], True),\n"
        "                      ([rows(3, sequence=300)], True), ([rows(3, start=-1)], True)):\n"
        "    try: decoder.decode(batch, causal=causal)\n"
        "    except Exception as fault: print(type(fault).__name__)\n"
        "for call in (lambda: decoder.fork(0, 9), lambda: decoder.drop(-5), lambda: decoder.length(2)):\n"
        "    try: call()\n"
        "    except Exception as fault: print(type(fault).__name__)\n"
        "print(decoder.decode([rows(40)])[0].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tiny.path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["TokcompError"] * 2 + ["ValueError"] * 6 + ["(1,", "416)"]


def test_cells_share_forks_and_free_the_right_ones() -> None:
    cells = Cells(10, 3)
    cells.add(0, np.arange(4, dtype=np.int32))
    cells.fork(0, 1)
    cells.add(1, np.arange(4, 6, dtype=np.int32))
    assert (cells.room, cells.length(0), cells.length(1)) == (4, 4, 6)
    cells.drop(0, 2)
    assert (cells.room, cells.length(0), cells.last(0)) == (4, 2, 1)
    cells.drop(1, 3)
    assert cells.room == 7
    with pytest.raises(ValueError, match="8 rows do not fit into 7"):
        cells.add(2, np.arange(8, dtype=np.int32))
    cells.add(2, np.array([[5, 5], [9, 7], [5, 6], [0, 0]], np.int32))
    assert (cells.last(2), cells.length(2), cells.room) == (5, 10, 5)
    cells.clear()
    assert (cells.room, cells.length(1)) == (10, 0)
