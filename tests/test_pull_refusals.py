"""``pull`` where the Hub refuses, is away or is none: one line that says what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_hub import Hub, serve
from pull_command import FILES, LM, MMPROJ, REPO, pull, refusal, world_of

pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve({REPO: dict(FILES)}) as hub:
        yield hub


@pytest.fixture
def world(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return world_of(hub, tmp_path)


def test_private_and_gated_repositories_ask_to_log_in(hub: Hub, world: dict[str, str]) -> None:
    hub.repositories["a/private"] = hub.repositories["a/gated"] = dict(FILES)
    hub.private.add("a/private")
    hub.gated.add("a/gated")
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    for name in ("a/private", "a/nothing"):
        assert refusal(world, name) == f"{name}: not at {hub.url}, or private; check the name, or {log_in}"
    assert refusal(world, "a/gated") == (f"a/gated: gated; ask for access at {hub.url}/a/gated, then {log_in}")
    assert not Path(world["HF_HOME"], "hub", "models--a--private").exists()
    assert not list(Path(world["HF_HOME"]).rglob("*.partial"))
    hub.log.clear()
    code, _, err = pull({**world, "HF_TOKEN": "hf_right"}, "a/private")
    assert code == 0, err
    assert {token for where, *_, token in hub.log if where == "S"} == {"Bearer hf_right"}
    assert {token for where, *_, token in hub.log if where == "C"} == {None}


def test_without_network_the_cache_is_used_or_one_line_says_so(hub: Hub, world: dict[str, str], tmp_path: Path) -> None:
    away = {**world, "HF_ENDPOINT": "http://127.0.0.1:9"}
    offline = {**world, "HF_HUB_OFFLINE": "1"}
    place = tmp_path / "hf" / "hub"
    silence = "the Hugging Face Hub cannot be reached (http://127.0.0.1:9: Connection refused)"
    assert refusal(away, REPO) == f"{silence}, and the cache {place} has no GGUF of {REPO}"
    assert refusal(offline, REPO) == f"HF_HUB_OFFLINE is set, and the cache {place} has no GGUF of {REPO}"
    assert not hub.log

    code, out, _ = pull(world, f"{REPO}:Q8_0")
    assert code == 0
    hub.log.clear()
    for environment, reason in ((away, silence), (offline, "HF_HUB_OFFLINE is set")):
        code, found, err = pull(environment, REPO)
        assert (code, found) == (0, out)
        assert err[0] == f"{reason}; going by what the cache has of {REPO}"
        assert refusal(environment, f"{REPO}:Q4_K_M") == f"{REPO} in the cache: no Q4_K_M; there is Q8_0"
    assert not hub.log
    Path(out[1]).resolve().unlink()
    assert f"{REPO} in the cache: no mmproj" in refusal(offline, REPO)


def test_a_hub_that_is_down_and_one_that_is_none(hub: Hub, world: dict[str, str]) -> None:
    hub.broken = 503
    assert refusal(world, REPO).startswith(f"{REPO}: {hub.url} answers 503; try again later, and the cache")
    hub.broken = 418
    assert refusal(world, REPO) == f"{REPO}: {hub.url} answers 418; try again later"
    hub.broken = 200
    assert refusal(world, REPO).startswith(f"{hub.url}: answers as no Hub does (")


HOSTILE: list[dict[str, Any]] = [
    {"sha": "../../.."}, {"sha": None}, {"siblings": [{"rfilename": "a-Q4_0.gguf"}]},
    {"siblings": [{"rfilename": "a-Q4_0.gguf", "size": -1, "blobId": "0" * 40}]},
    {"siblings": [{"rfilename": "a-Q4_0.gguf", "size": 1, "blobId": "../../x"}]},
]  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE)
def test_a_listing_that_is_none_is_refused(hub: Hub, world: dict[str, str], change: dict[str, Any]) -> None:
    hub.edit = lambda listing: listing.update(change)
    assert refusal(world, REPO).startswith(f"{hub.url}: answers as no Hub does (")


def test_files_that_would_lie_elsewhere_are_not_there(hub: Hub, world: dict[str, str], tmp_path: Path) -> None:
    hub.repositories[REPO] = {"../../m-Q4_0.gguf": LM, "/m-Q8_0.gguf": LM, "mmproj.gguf": MMPROJ}
    assert "no language model, only mmproj.gguf" in refusal(world, REPO, "--out", str(tmp_path / "o"))


def test_without_huggingface_hub_one_line_says_how_to_get_it(world: dict[str, str]) -> None:
    script = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from edge_tokcomp.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", script, "pull", REPO], env=world, text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith("edge-tokcomp: pull needs huggingface_hub (")
    assert done.stderr.endswith("; pip install 'edge-tokcomp[hub]'\n")
    assert done.stderr.count("\n") == 1


def test_the_help_does_not_import_it(world: dict[str, str]) -> None:
    script = (
        "import sys\nfrom edge_tokcomp.cli import main\n"
        "try: main(['pull', '--help'])\nexcept SystemExit: sys.exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], env=world, stdout=subprocess.DEVNULL).returncode == 0
