"""``pull`` as a process of its own, in the environment of a user of a Hub of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fake_hub import Hub

DEMO = Path(__file__).parents[1] / "models" / "demo"
LM, MMPROJ = (DEMO / "demo-lm.gguf").read_bytes(), (DEMO / "demo-mmproj.gguf").read_bytes()
REPO = "someone/Seer-7B-GGUF"
FILES = {
    "README.md": b"a card", "Seer-7B-Q4_K_M.gguf": LM, "Seer-7B-Q8_0.gguf": LM + b"8" * 64,
    "mmproj-Seer-7B-f16.gguf": MMPROJ, "mmproj-Seer-7B-Q8_0.gguf": MMPROJ + b"8" * 64,
}  # fmt: skip


def world_of(hub: Hub, folder: Path) -> dict[str, str]:
    """The environment of a user of ``hub`` who has done nothing yet and keeps models below ``folder``."""
    usual = {
        name: value for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS")) and not name.lower().endswith("_proxy")
    }  # fmt: skip
    return {**usual, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "COLUMNS": "200"}


def start(world: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edge_tokcomp", "pull", *arguments]
    return subprocess.Popen(command, env=world, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def pull(world: dict[str, str], *arguments: str) -> tuple[int, list[str], list[str]]:
    """Exit code, and the lines of stdout and stderr."""
    process = start(world, *arguments)
    stdout, stderr = process.communicate(timeout=120)
    assert "Traceback" not in stderr, stderr
    return process.returncode, stdout.splitlines(), stderr.splitlines()


def refusal(world: dict[str, str], *arguments: str) -> str:
    """The one line on stderr of a command that could not be done."""
    code, out, err = pull(world, *arguments)
    assert (code, out) == (2, [])
    assert err[-1].startswith("edge-tokcomp: ")
    return err[-1].removeprefix("edge-tokcomp: ")


def cache(tmp_path: Path, name: str = REPO) -> Path:
    return tmp_path / "hf" / "hub" / f"models--{name.replace('/', '--')}"
