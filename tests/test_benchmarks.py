"""What the benchmark scripts print, and how they refuse."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the name given; the threads it sets at import are set back."""
    for library in ("OMP", "OPENBLAS", "MKL"):
        monkeypatch.setenv(f"{library}_NUM_THREADS", "1")
    name = f"benchmark_{request.param}"
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{request.param}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", ["selection"], indirect=True)
def test_every_round_has_all_work_items_and_everyone_gets_other_neighbours(script: Any) -> None:
    names = [f"item {number}" for number in range(12)]
    rounds = [script.in_turn(names, number) for number in range(40)]
    assert all(sorted(order) == sorted(names) for order in rounds)
    assert rounds == [script.in_turn(names, number) for number in range(40)]
    for name in names:
        before = [order[order.index(name) - 1] for order in rounds if order[0] != name]
        assert max(before.count(other) for other in names) <= len(rounds) / 3


@pytest.mark.parametrize("script", ["layer_segments"], indirect=True)
def test_ratios_are_taken_round_by_round_and_token_by_token(script: Any) -> None:
    def turns(prefill: list[float], tokens: list[list[float]]) -> list[Any]:
        return [
            script.Turn({"whole": whole}, 288.0, [{"whole": each} for each in mine])
            for whole, mine in zip(prefill, tokens, strict=True)
        ]

    plain = turns([100, 200, 400], [[10, 20, 40]] * 3)
    other = turns([300, 200, 200], [[20, 20, 80], [20, 30, 40], [10, 10, 40]])
    assert script.times_table({"plain": plain, "segmented": other}).splitlines()[2:] == [
        "| plain | 288 | 200.0 | 1.000 (1.000 to 1.000) | 20.00 | 1.000 (1.000 to 1.000) |",
        "| segmented | 288 | 200.0 | 1.000 (0.500 to 3.000) | 20.00 | 1.500 (1.000 to 2.000) |",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["selection.py", "--methods", "prunsid"], "unknown method 'prunsid' (did you mean 'prunesid'?)"),
        (["selection.py", "--methods", "luvc", "--rounds", "1"], "method luvc acts in the tower or before it"),
        (["layer_segments.py", "--steps", "fastv@1:nan"], "'nan' is not a number"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(arguments: list[str], says: str) -> None:
    command = [sys.executable, str(FOLDER / arguments[0]), *arguments[1:]]
    if arguments[0] == "selection.py":
        command += ["--cases", "576 to 64", "--warm-up", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
