"""Captions beside the pictures: whole, never over something of the user's, and one that fails costs only itself."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from batch import PARAMETERS, Told, into, rows, run
from edge_tokcomp import sidecars
from edge_tokcomp.captioning import Summary, count_done
from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.parameters import Parameters
from edge_tokcomp.sidecars import SidecarError, check_sidecars, write_sidecar
from edge_tokcomp.sources import find_sources
from edge_tokcomp.vlm import VLM
from picture_files import pictures


def test_sidecars_are_written_and_decide_where_there_is_no_record(vlm: VLM, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 3)
    (folder / "1.txt").write_bytes(b"caf\xe9, by hand\n")
    (folder / "2.txt").write_bytes(b"")
    summary, records = run(vlm, folder, sidecar=".txt")
    assert (summary.ok, summary.skipped) == (2, 1)
    assert (folder / "0.txt").read_text(encoding="utf-8") == records[0].caption + "\n"
    assert (folder / "1.txt").read_bytes() == b"caf\xe9, by hand\n"
    assert (folder / "2.txt").read_text(encoding="utf-8") == records[1].caption + "\n"
    assert run(vlm, folder, sidecar=".txt")[0].skipped == 3
    assert run(vlm, folder, sidecar=".txt", overwrite=True)[0].ok == 3
    assert (folder / "1.txt").read_bytes() != b"caf\xe9, by hand\n"


def test_a_sidecar_by_hand_stays_and_one_of_ours_follows_the_record(vlm: VLM, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "p", 2), tmp_path / "o.jsonl"
    (folder / "1.txt").write_text("by hand")
    into(vlm, folder, out, sidecar=".txt")
    assert (folder / "1.txt").read_text() == "by hand"
    first, second = rows(out)
    assert first["notes"] == []
    assert second["notes"] == ["the sidecar that was there is kept"]
    (folder / "0.txt").unlink()
    assert into(vlm, folder, out, sidecar=".txt").skipped == 2
    assert (folder / "0.txt").read_text(encoding="utf-8") == first["caption"] + "\n"
    other = Parameters("what is this", 3)
    assert into(vlm, folder, out, sidecar=".txt", parameters=other).ok == 2
    latest = rows(out)[-2]
    assert latest["caption"] != first["caption"]
    assert (folder / "0.txt").read_text(encoding="utf-8") == latest["caption"] + "\n"
    assert (folder / "1.txt").read_text() == "by hand"


def test_sidecars_that_would_collide_are_refused(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 1)
    Image.new("RGB", (4, 4)).save(folder / "0.jpg")
    sources = find_sources([str(folder)])
    with pytest.raises(UsageError, match=r"0\.jpg and 0\.png would share the sidecar 0\.txt"):
        check_sidecars(sources, ".txt")
    with pytest.raises(UsageError, match="written over the picture"):
        check_sidecars(sources, ".png")
    (folder / "0.jpg").unlink()
    with pytest.raises(UsageError, match=r"0\.png would be written over --out .*0\.jsonl"):
        check_sidecars(find_sources([str(folder)]), ".jsonl", folder / "." / "0.jsonl")
    check_sidecars(find_sources([str(folder)]), ".txt", folder / "0.jsonl")


@pytest.mark.parametrize("out", [True, False])
def test_a_sidecar_that_cannot_be_written_costs_its_own_picture_and_is_tried_again(
    vlm: VLM, tmp_path: Path, out: bool
) -> None:
    folder, told = pictures(tmp_path / "p", 2), Told()
    (folder / "0.txt").mkdir()

    def again(**options: Any) -> Summary:
        if out:
            return into(vlm, folder, tmp_path / "o.jsonl", sidecar=".txt", **options)
        return run(vlm, folder, sidecar=".txt", **options)[0]

    summary = again(progress=told)
    assert told.seen == [("0.png", "error", False), ("1.png", "ok", False)]
    assert [name for name, _ in summary.failures] == ["0.png"]
    assert "0.txt: cannot be written (Is a directory)" in summary.failures[0][1]
    assert (folder / "1.txt").is_file()
    summary = again()
    assert (summary.ok, summary.skipped, len(summary.failures)) == (0, 1, 1)
    (folder / "0.txt").rmdir()
    summary = again()
    assert len(summary.failures) == 0
    assert (folder / "0.txt").is_file()
    if out:  # its caption was kept
        first, second = rows(tmp_path / "o.jsonl")
        assert (first["status"], second["status"]) == ("ok", "ok")
        assert "0.txt: cannot be written" in first["notes"][0]
        assert (folder / "0.txt").read_text(encoding="utf-8") == first["caption"] + "\n"


@pytest.mark.parametrize("out", [True, False])
def test_a_sidecar_with_too_long_a_name_costs_its_own_picture(vlm: VLM, tmp_path: Path, out: bool) -> None:
    folder = pictures(tmp_path / "p", 1)
    long = "n" * 251 + ".png"
    (folder / long).write_bytes((folder / "0.png").read_bytes())
    sources = find_sources([str(folder)])
    if out:
        summary = into(vlm, folder, tmp_path / "o.jsonl", sidecar=".caption")
        assert [row["id"] for row in rows(tmp_path / "o.jsonl")] == ["0.png", long]
    else:
        summary = run(vlm, folder, sidecar=".caption")[0]
        assert count_done(vlm, sources, PARAMETERS, None, ".caption") == 1
    assert (folder / "0.caption").is_file()
    assert [name for name, _ in summary.failures] == [long]
    assert "File name too long" in summary.failures[0][1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_fault_of_the_disk_ends_the_run(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sidecars, "write_whole", full)
    told = Told()
    with pytest.raises(TokcompError, match=r"0\.txt: cannot be written"):
        into(vlm, pictures(tmp_path / "p", 2), tmp_path / "o.jsonl", sidecar=".txt", progress=told)
    assert told.seen == []


def test_a_run_that_ended_between_sidecar_and_record_is_put_right(vlm: VLM, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "p", 1), tmp_path / "o.jsonl"
    into(vlm, folder, out, sidecar=".txt")
    before = rows(out)
    out.unlink()
    into(vlm, folder, out, sidecar=".txt")
    (row,) = rows(out)
    assert (row["caption"], row["notes"]) == (before[0]["caption"], [])


def test_sidecars_are_whole_have_usual_permissions_and_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".txt")
    mask = os.umask(0o022)
    try:
        write_sidecar(path, "old")
        write_sidecar(path, "Grüße")
    finally:
        os.umask(mask)
    assert path.read_bytes() == "Grüße\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    folder = tmp_path / "folder.txt"
    folder.mkdir()
    (folder / "x").touch()
    for target in (folder, tmp_path / "no" / "such.txt"):
        with pytest.raises(SidecarError, match="cannot be written"):
            write_sidecar(target, "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, "folder.txt"])
