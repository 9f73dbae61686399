"""Every test runs with a home, a cache and a model of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from edge_tokcomp.vlm import VLM


@dataclass(frozen=True)
class Pair:
    """Two GGUF files of one random model: 36 image tokens of width 64."""

    lm: Path
    mmproj: Path

    @property
    def options(self) -> list[str]:
        """How a command names it."""
        return ["--lm", str(self.lm), "--mmproj", str(self.mmproj), "--threads", "1", "--provider", "cpu"]


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder of the session; what the tests and the processes they start write there is theirs."""
    folder = tmp_path_factory.mktemp("home")
    set_now = {
        "HOME": str(folder), "USERPROFILE": str(folder), "XDG_CACHE_HOME": str(folder / "xdg"),
        "EDGE_TOKCOMP_CACHE": str(folder / "cache"),
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in set_now}
    os.environ.update(set_now)
    yield folder
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    # Imported here because it takes torch seconds, which tests without a model need not wait for.
    from tiny_mmproj import write_mmproj
    from tiny_models import write_tiny_llama

    folder = tmp_path_factory.mktemp("pair")
    lm = write_tiny_llama(folder / "tiny-lm.gguf")
    mmproj = write_mmproj(folder / "tiny-mmproj.gguf", out=64)
    return Pair(lm.path, mmproj.path)


@pytest.fixture(scope="session")
def vlm(pair: Pair, home: Path) -> Iterator[VLM]:
    """The pair, loaded, nothing compressed."""
    from edge_tokcomp.vlm import load

    with load(pair.lm, pair.mmproj, threads=1, provider="cpu") as model:
        yield model
