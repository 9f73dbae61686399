"""``pull``: that what it fetches arrives whole, once, and goes on where it was left off."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.fetching import fetch, plan
from edge_tokcomp.hub import HubFile, Repository
from fake_hub import COMMIT, Hub, serve, sha256
from pull_command import DEMO, FILES, LM, MMPROJ, REPO, cache, pull, refusal, start, world_of

pytest.importorskip("huggingface_hub")

CHUNK = 10 << 20
"""What huggingface_hub reads at once, and so what an interrupted transfer is kept in multiples of."""
BIG = os.urandom(2 * CHUNK + 12345)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve({REPO: dict(FILES)}) as hub:
        yield hub


@pytest.fixture
def world(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return world_of(hub, tmp_path)


def test_the_two_files_arrive_in_the_cache_and_a_second_time_nothing_is_fetched(
    hub: Hub, world: dict[str, str], tmp_path: Path
) -> None:
    code, out, err = pull(world, REPO)
    assert code == 0, err
    snapshot = cache(tmp_path) / "snapshots" / COMMIT
    assert out == [str(snapshot / "Seer-7B-Q4_K_M.gguf"), str(snapshot / "mmproj-Seer-7B-f16.gguf")]
    assert Path(out[0]).read_bytes() == LM
    assert Path(out[1]).read_bytes() == MMPROJ
    assert sorted(path.name for path in (cache(tmp_path) / "blobs").iterdir()) == sorted([sha256(LM), sha256(MMPROJ)])
    assert f"edge-tokcomp caption photos/ --lm {out[0]} --mmproj {out[1]}" in err
    assert "mmproj-Seer-7B-f16.gguf: 2.7 MB, to fetch" in err
    assert any(line.startswith("language model Q4_K_M, the first there is of") for line in err)
    assert any(line.startswith("5.1 MB to write to") and line.endswith("are free") for line in err)
    assert {path for path, _ in hub.asked("C")} == {f"/{sha256(LM)}", f"/{sha256(MMPROJ)}"}
    listing = f"/api/models/{REPO}/revision/main"
    links = {f"/{REPO}/resolve/{commit}/{Path(path).name}" for path in out for commit in ("main", COMMIT)}
    assert {path for where, _, path, _, _ in hub.log if where == "S"} <= {listing, *links}

    hub.log.clear()
    assert pull(world, REPO)[:2] == (0, out)
    assert not hub.asked("C")
    assert pull({**world, "HF_HUB_OFFLINE": "1"}, REPO)[:2] == (0, out)


def test_what_huggingface_hub_itself_has_fetched_is_not_fetched_again(hub: Hub, world: dict[str, str]) -> None:
    script = "import sys, huggingface_hub as h; print(h.hf_hub_download(*sys.argv[1:]))"
    environment = {**world, "HF_HUB_DISABLE_XET": "1"}
    fetched = [
        subprocess.run([sys.executable, "-c", script, REPO, name], env=environment, text=True, stdout=subprocess.PIPE,
                       stderr=subprocess.DEVNULL, check=True).stdout.strip()
        for name in ("Seer-7B-Q4_K_M.gguf", "mmproj-Seer-7B-f16.gguf")
    ]  # fmt: skip
    hub.log.clear()
    assert pull(world, REPO)[:2] == (0, fetched)
    assert not hub.asked("C")


def test_a_tag_a_folder_and_parts_in_a_sub_folder(hub: Hub, world: dict[str, str], tmp_path: Path) -> None:
    parts = [f"BF16/Seer-BF16-{number:05}-of-00002.gguf" for number in (1, 2)]
    hub.repositories[REPO] |= dict.fromkeys(parts, LM)
    hub.repositories[REPO][parts[1]] = b"GGUF" + b"2" * 5000
    folder = tmp_path / "my models"
    code, out, err = pull(world, f"{REPO}:bf16", "--out", str(folder))
    assert code == 0, err
    assert out == [str(folder / parts[0]), str(folder / "mmproj-Seer-7B-f16.gguf")]
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        *parts, "mmproj-Seer-7B-f16.gguf",
    }  # fmt: skip
    for name in parts:
        assert (folder / name).read_bytes() == hub.repositories[REPO][name]
    assert not cache(tmp_path).exists()
    (command,) = (line for line in err if line.startswith("edge-tokcomp caption"))
    assert shlex.split(command)[4:] == [out[0], "--mmproj", out[1]]
    hub.log.clear()
    assert pull(world, f"{REPO}:bf16", "--out", str(folder))[:2] == (0, out)
    assert not hub.asked("C")


def test_a_folder_is_filled_from_the_cache(hub: Hub, world: dict[str, str], tmp_path: Path) -> None:
    assert pull(world, REPO)[0] == 0
    hub.log.clear()
    assert pull(world, REPO, "--out", str(tmp_path / "o"))[0] == 0
    assert (tmp_path / "o" / "Seer-7B-Q4_K_M.gguf").read_bytes() == LM
    assert not hub.asked("C")
    assert pull({**world, "HF_HUB_OFFLINE": "1"}, REPO, "--out", str(tmp_path / "p"))[0] == 0
    assert (tmp_path / "p" / "mmproj-Seer-7B-f16.gguf").read_bytes() == MMPROJ


@pytest.mark.parametrize("other", [b"mine", LM[:-1] + b"?"])
def test_another_file_in_the_place_is_left_alone(hub: Hub, world: dict[str, str], tmp_path: Path, other: bytes) -> None:
    place = tmp_path / "Seer-7B-Q4_K_M.gguf"
    place.write_bytes(other)
    assert refusal(world, REPO, "--out", str(tmp_path)) == (
        f"{place}: there is another file of that name; move it away, or use another --out"
    )
    assert place.read_bytes() == other


def test_a_dry_run_lists_and_writes_nothing(hub: Hub, world: dict[str, str], tmp_path: Path) -> None:
    assert pull(world, REPO, "--dry-run")[:2] == (
        0, ["Seer-7B-Q4_K_M.gguf: 2.3 MB, to fetch", "mmproj-Seer-7B-f16.gguf: 2.7 MB, to fetch"],
    )  # fmt: skip
    assert not (tmp_path / "hf").exists()
    assert len(hub.log) == 1
    assert pull(world, REPO)[0] == 0
    assert pull(world, f"{REPO}:Q8_0", "--dry-run")[:2] == (
        0, ["Seer-7B-Q8_0.gguf: 2.3 MB, to fetch", "mmproj-Seer-7B-f16.gguf: 2.7 MB, there"],
    )  # fmt: skip


def test_small_files_that_git_itself_keeps(hub: Hub, world: dict[str, str], tmp_path: Path) -> None:
    hub.repositories[REPO]["Seer-7B-Q4_K_M.gguf"] = b"GGUF, and little more"
    for more in ([], ["--out", str(tmp_path / "o")]):
        code, out, err = pull(world, REPO, *more)
        assert code == 0, err
        assert Path(out[0]).read_bytes() == b"GGUF, and little more"


def test_where_there_are_no_links_a_file_is_stored_once(hub: Hub, world: dict[str, str], tmp_path: Path) -> None:
    environment = {**world, "HF_HUB_DISABLE_SYMLINKS": "1"}
    code, out, err = pull(environment, REPO)
    assert code == 0, err
    assert not Path(out[0]).is_symlink()
    assert Path(out[0]).read_bytes() == LM
    assert not list((cache(tmp_path) / "blobs").iterdir())
    hub.log.clear()
    assert pull(environment, REPO)[:2] == (0, out)
    assert pull({**environment, "HF_HUB_OFFLINE": "1"}, REPO)[:2] == (0, out)
    assert not hub.asked("C")


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_that_is_cut_is_taken_up_by_range(hub: Hub, world: dict[str, str], reset: bool) -> None:
    hub.reset = reset
    hub.repositories[REPO]["Seer-7B-Q4_K_M.gguf"] = BIG
    hub.cut = [CHUNK + 99] if reset else [CHUNK + 99, CHUNK + 7]
    code, out, err = pull(world, REPO)
    assert code == 0, err
    assert Path(out[0]).read_bytes() == BIG
    spans = [span for path, span in hub.asked("C") if path == f"/{sha256(BIG)}"]
    assert spans == [None, f"bytes={CHUNK}-", f"bytes={2 * CHUNK}-"][: 2 if reset else 3]


def until(condition: Any) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never came to that")


@pytest.mark.parametrize("more", [False, True])
def test_an_interrupted_pull_goes_on_where_it_was(hub: Hub, world: dict[str, str], tmp_path: Path, more: bool) -> None:
    hub.repositories[REPO]["Seer-7B-Q4_K_M.gguf"] = BIG
    folder = tmp_path / "o" if more else cache(tmp_path) / "blobs"
    name = "Seer-7B-Q4_K_M.gguf" if more else sha256(BIG)
    command = [REPO, "--out", str(folder)] if more else [REPO]
    hub.stall = 2 * CHUNK + 77
    process = start(world, *command)
    partial = folder / f"{name}.{sha256(BIG)[:8]}.partial"
    until(lambda: partial.exists() and partial.stat().st_size == 2 * CHUNK)
    (again,) = pull(world, *command)[2][-1:]
    assert again == f"edge-tokcomp: {partial}: another process is fetching it; wait for that one"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.endswith("edge-tokcomp: interrupted; run the same command again to go on\n")
    assert partial.read_bytes() == BIG[: 2 * CHUNK]

    hub.stall = None
    hub.log.clear()
    assert pull(world, *command, "--dry-run")[1][0] == "Seer-7B-Q4_K_M.gguf: 21.0 MB, to fetch, 21.0 MB of it are there"
    code, out, err = pull(world, *command)
    assert code == 0, err
    assert hub.asked("C") == [(f"/{sha256(BIG)}", f"bytes={2 * CHUNK}-"), (f"/{sha256(MMPROJ)}", None)]
    assert Path(out[0]).read_bytes() == BIG
    assert not list(folder.glob("*.partial"))


@pytest.mark.slow
def test_a_network_that_stays_away_is_told_in_one_line_and_costs_nothing(
    hub: Hub, world: dict[str, str], tmp_path: Path
) -> None:
    hub.repositories[REPO]["Seer-7B-Q4_K_M.gguf"] = BIG
    hub.cut = [CHUNK + 5] + [0] * 50
    line = refusal(world, REPO)
    assert line.startswith(f"the Hugging Face Hub cannot be reached ({hub.url}: ")
    assert line.endswith("; 10.5 MB of Seer-7B-Q4_K_M.gguf are kept, the same command goes on from there")
    hub.cut.clear()
    hub.log.clear()
    assert pull(world, REPO)[0] == 0
    assert hub.asked("C") == [(f"/{sha256(BIG)}", f"bytes={CHUNK}-"), (f"/{sha256(MMPROJ)}", None)]


@pytest.mark.parametrize("whole", [False, True])
def test_a_partial_file_of_any_kind_ends_as_the_file_or_as_nothing(
    hub: Hub, world: dict[str, str], tmp_path: Path, whole: bool
) -> None:
    hub.whole = whole
    blobs = cache(tmp_path) / "blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{sha256(LM)}.{sha256(LM)[:8]}.partial"
    for content in (LM[:99], LM, LM + b"more", b""):
        partial.write_bytes(content)
        code, out, err = pull(world, REPO)
        assert code == 0, err
        assert Path(out[0]).read_bytes() == LM
        (blobs / sha256(LM)).unlink()
        Path(out[0]).unlink()
    partial.write_bytes(b"not what the Hub has")
    if not whole:
        assert refusal(world, REPO) == (
            "Seer-7B-Q4_K_M.gguf: arrived damaged and is removed; run the same command again"
        )
    assert pull(world, REPO)[0] == 0


def test_bytes_that_are_not_those_of_the_listing_are_not_kept(hub: Hub, world: dict[str, str], tmp_path: Path) -> None:
    hub.swap[LM] = LM[:-1] + b"?"
    assert "arrived damaged" in refusal(world, REPO)
    assert not list((cache(tmp_path) / "blobs").glob(f"{sha256(LM)}*"))
    hub.swap[LM] = LM + b"?"
    assert "Seer-7B-Q4_K_M.gguf: does not arrive in the" in refusal(world, REPO)
    hub.swap.clear()
    code, out, err = pull(world, REPO)
    assert code == 0, err
    assert Path(out[0]).read_bytes() == LM


def test_a_disk_too_small_is_told_before_anything_is_fetched(hub: Hub, world: dict[str, str], tmp_path: Path) -> None:
    def enormous(listing: dict[str, Any]) -> None:
        listing["siblings"][1] |= {"size": 10**18}

    hub.edit = enormous
    for more in ([], ["--dry-run"]):
        code, _, err = pull(world, REPO, *more)
        assert code == 2
        assert f"{cache(tmp_path)}: 1,000,000,000,002.7 MB to write and " in err[-1]
        assert err[-1].endswith(" MB free; make room, or use another --out")
    assert not hub.asked("C")
    assert not (tmp_path / "hf").exists()


def test_a_place_that_cannot_be_written_is_told_in_one_line(hub: Hub, world: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refusal(world, REPO, "--out", str(tmp_path / "file")) == f"--out {tmp_path / 'file'}: not a folder"
    assert refusal(world, REPO, "--out", str(tmp_path / ("x" * 300))).endswith("cannot be opened (File name too long)")


@pytest.fixture
def kept(tmp_path: Path) -> Repository:
    """A repository that the cache has and the Hub was not asked for."""
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / sha256(BIG)).write_bytes(BIG)
    return Repository("o/r", COMMIT, {"m.gguf": HubFile(len(BIG), sha256(BIG))}, tmp_path / "hub", "away")


def test_progress_is_said_now_and_then_where_there_is_no_terminal(
    kept: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(time, "monotonic", iter([0.0, *(6.0 * tick for tick in range(100))]).__next__)
    assert fetch(kept, plan(kept, "m.gguf", tmp_path / "o"), told.append).read_bytes() == BIG
    assert told[:2] == ["m.gguf: 3.1 MB of 21.0 MB, 0.3 MB/s", "m.gguf: 5.2 MB of 21.0 MB, 0.2 MB/s"]
    assert told[-1] == "checking m.gguf"
    assert len(told) == 11


def test_a_disk_that_fills_up_keeps_what_it_has(
    kept: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Any, stream: Any, length: int) -> None:
        stream.write(source.read(length))
        raise OSError(errno.ENOSPC, "No space left on device")

    job = plan(kept, "m.gguf", tmp_path / "o")
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(TokcompError) as refusal:
        fetch(kept, job, lambda line: None)
    assert str(refusal.value) == f"{tmp_path / 'o' / 'm.gguf'}: cannot be written (No space left on device)"
    assert [path.name for path in (tmp_path / "o").iterdir()] == [job.partial.name]
    monkeypatch.undo()
    assert fetch(kept, job, lambda line: None).read_bytes() == BIG


@pytest.mark.slow
def test_the_command_that_is_printed_captions(hub: Hub, world: dict[str, str]) -> None:
    code, _, err = pull(world, REPO)
    assert code == 0
    (command,) = (line for line in err if line.startswith("edge-tokcomp caption photos/"))
    words = [*shlex.split(command)[3:], "--threads", "1", "--keep", "64", "--max-tokens", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "edge_tokcomp", "caption", str(DEMO / "samples" / "scene-1.jpg"), *words],
        env=world, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("scene-1.jpg\tAt the top")
