"""The command as a process: imported, piped, interrupted, killed, on a terminal."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Pair

from edge_tokcomp.cli import main
from picture_files import pictures

FEW = ["--max-tokens", "4"]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


LIGHT = """
import sys
try:
    from edge_tokcomp.cli import main
    main(sys.argv[1:])
except SystemExit:
    pass
heavy = ("numpy", "PIL", "onnxruntime", "llama_cpp", "onnx", "torch", "tqdm", "jinja2", "gguf")
print(" ".join(name for name in heavy if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["caption", "--help"], ["--version"], []])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == ""
    assert ("usage: edge-tokcomp" in done.stdout + done.stderr) or "--version" in arguments


def test_every_package_is_installed() -> None:
    root = Path(__file__).parent.parent
    listed = re.findall(r'^    "(edge_tokcomp[.\w]*)",$', (root / "pyproject.toml").read_text(), re.MULTILINE)
    found = {f"edge_tokcomp.{file.parent.name}" for file in (root / "edge_tokcomp").glob("*/__init__.py")}
    assert found <= set(listed)


def start(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    defaults: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "edge_tokcomp", *arguments], **{**defaults, **options})


def wait_for_lines(out: Path, count: int) -> None:
    for _ in range(6000):
        if out.exists() and out.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{out} never had {count} lines")


@pytest.mark.slow
def test_an_interrupted_process_says_how_to_go_on_and_exits_130(pair: Pair, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "many photos", 24), tmp_path / "o.jsonl"
    command = ["caption", str(folder), *pair.options, "--max-tokens", "120", "--out", str(out), "--overwrite"]
    process = start(command)
    wait_for_lines(out, 2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "stopping after the captions that are begun" in stderr
    assert "Traceback" not in stderr
    done = len(rows(out))
    assert 2 <= done < 24
    assert f"{done} captioned" in stderr
    (again,) = re.findall(r"interrupted; to go on: edge-tokcomp (.*)", stderr)
    words = shlex.split(again)
    assert words == command[:-1]
    assert main(words) == 0
    assert [row["id"] for row in rows(out)] == sorted(p.name for p in folder.iterdir())


@pytest.mark.slow
def test_a_killed_run_is_taken_up_where_it_was(pair: Pair, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "p", 30), tmp_path / "o.csv"
    command = ["caption", str(folder), *pair.options, "--max-tokens", "100", "--out", str(out), "--sidecar", ".txt"]
    process = start(command)
    wait_for_lines(out, 4)
    process.kill()
    process.communicate(timeout=120)
    assert out.read_bytes().count(b"\n") < 31, "the run was over before it was killed"
    out.write_bytes(out.read_bytes()[:-7])
    assert main(command) == 0
    with out.open(encoding="utf-8", newline="") as stream:
        assert [row["id"] for row in csv.DictReader(stream)] == sorted(p.name for p in folder.glob("*.png"))
    assert len(list(folder.glob("*.txt"))) == 30


def test_a_reader_that_goes_away_ends_the_run_quietly(pair: Pair, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 30)
    process = start(["caption", str(folder), *pair.options, "--max-tokens", "100", "--out", "-"])
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline())["id"] == "0.png"
    process.stdout.close()
    stderr = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 1
    assert "Traceback" not in stderr
    assert "BrokenPipe" not in stderr


def test_nobody_reading_what_is_said_ends_no_run(pair: Pair, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 3)
    (folder / "bad.png").write_text("text")
    command = ["caption", str(folder), *pair.options, *FEW, "--out"]
    # Where streams are buffered, Python tries once more at the end, and fails with an exit code of its own.
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    head = start([*command, str(tmp_path / "head.jsonl")], stderr=subprocess.STDOUT, env=usual)
    assert head.stdout is not None
    assert head.stdout.readline()
    head.stdout.close()
    assert head.wait(timeout=120) == 1  # of the bad picture
    assert len(rows(tmp_path / "head.jsonl")) == 4
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            assert start([*command, str(tmp_path / "full.jsonl")], stderr=full, env=usual).wait(timeout=120) == 1
            assert start([*command, "no/such.jsonl"], stderr=full, env=usual).wait(timeout=120) == 2
        assert len(rows(tmp_path / "full.jsonl")) == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_stdout_is_said_in_one_line(pair: Pair, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start(["methods"], stdout=full)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert stderr == "edge-tokcomp: the output cannot be written (No space left on device)\n"


def test_a_list_on_standard_input_of_a_process_and_closed_streams(pair: Pair, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 2)
    names = b"\0".join([os.fsencode(folder / "0.png"), b"caf\xe9.png"])
    process = start(
        ["caption", "-", *pair.options, *FEW, "--out", "-"], stdin=subprocess.PIPE, text=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    stdout, stderr = process.communicate(names, timeout=120)
    assert process.returncode == 1, stderr
    first, second = (json.loads(line) for line in stdout.decode("utf-8").splitlines())
    assert (first["status"], second["status"]) == ("ok", "error")
    assert second["id"] == "caf\\xe9.png"
    closed = subprocess.run(
        f"{shlex.quote(sys.executable)} -m edge_tokcomp methods >&- 2>&-", shell=True, check=False, timeout=120
    )
    assert closed.returncode == 0


def on_a_terminal(command: list[str]) -> str:
    """What ``command`` writes to a terminal of 120 columns, stdout and stderr."""
    pty = pytest.importorskip("pty")
    import fcntl
    import termios

    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = start(command, stdout=theirs, stderr=theirs, text=False)
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(mine, 65536):
            seen += part
    except OSError:
        pass  # how Linux says that the other end is closed
    os.close(mine)
    assert process.wait(timeout=120) == 0, seen
    return seen.decode()


@pytest.mark.slow
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(pair: Pair, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 5)
    command = ["caption", str(folder), *pair.options, *FEW]
    seen = on_a_terminal([*command, "--out", str(tmp_path / "o.jsonl")])
    assert re.search(r"100%\|█+\| 5/5 images \[\d\d:\d\d<00:00, +[\d.]+ images/s\]", seen)
    seen = on_a_terminal(command)
    for name in range(5):  # the bar is wiped before a caption is printed
        assert re.search(rf"[\r\n]{name}\.png\t", seen)
    process = start(command)
    stdout, stderr = process.communicate(timeout=120)
    assert len(stdout.splitlines()) == 5
    assert "\r" not in stdout + stderr
    assert "|" not in stderr
