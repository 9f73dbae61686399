"""What earlier runs left: skipped, tried again, and never taken for another picture."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from batch import PARAMETERS, into, rows
from edge_tokcomp.captioning import count_done
from edge_tokcomp.dynamic import Sharing
from edge_tokcomp.errors import UsageError
from edge_tokcomp.methods import get_method
from edge_tokcomp.methods.layer_steps import read_layer_steps
from edge_tokcomp.parameters import Parameters, hash_of_model, params_hash
from edge_tokcomp.resume import Done, check_ids
from edge_tokcomp.sources import find_sources
from edge_tokcomp.vlm import VLM
from picture_files import mixed, pictures


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_a_second_run_skips_what_is_done_and_tries_failures_again(vlm: VLM, tmp_path: Path, name: str) -> None:
    mixed(tmp_path / "photos")
    out = tmp_path / name
    first = into(vlm, tmp_path / "photos", out)
    before = out.read_bytes()
    again = into(vlm, tmp_path / "photos", out)
    assert (again.ok, again.skipped, len(again.failures)) == (0, first.ok, len(first.failures))
    assert out.read_bytes() == before  # the same failure needs no second row
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "empty.jpg")
    mended = into(vlm, tmp_path / "photos", out)
    assert (mended.ok, mended.skipped) == (1, first.ok)
    assert into(vlm, tmp_path / "photos", out).ok == 0


def test_changed_pictures_and_changed_parameters_are_due_again(vlm: VLM, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "p", 3), tmp_path / "o.jsonl"
    assert into(vlm, folder, out).ok == 3
    Image.new("RGB", (5, 5)).save(folder / "1.png")
    assert into(vlm, folder, out).ok == 1
    assert into(vlm, folder, out, parameters=Parameters("is this red", 6)).ok == 3
    assert into(vlm, folder, out, parameters=Parameters("what is this", 7)).ok == 3
    assert into(vlm, folder, out).skipped == 3


def test_the_parameters_hash_depends_on_all_that_decides_a_caption() -> None:
    base = params_hash("vlm", PARAMETERS)
    assert base == params_hash("vlm", replace(PARAMETERS))
    others = [("other", PARAMETERS), ("vlm", Parameters("x", 6)), ("vlm", Parameters("what is this", 7))]
    assert len({base, *(params_hash(*other) for other in others)}) == 4


def test_the_models_hash_depends_on_its_files_and_on_how_it_was_loaded(vlm: VLM, tmp_path: Path) -> None:
    def like(**changed: object) -> str:
        names = ("lm", "mmproj", "method", "keep", "sharing", "seed", "engine", "decoder", "layer_steps")
        given = {name: getattr(vlm, name) for name in names} | changed
        return hash_of_model(SimpleNamespace(**given))  # type: ignore[arg-type]

    other = tmp_path / "other.gguf"
    other.write_bytes(vlm.lm.read_bytes()[:-1] + b"!")
    base = like()
    assert base == hash_of_model(vlm)
    changes: list[dict[str, object]] = [
        {"lm": other}, {"mmproj": other}, {"method": get_method("pool")}, {"method": get_method("todre:form=k_center")},
        {"keep": 5}, {"seed": 9}, {"engine": SimpleNamespace(name="onnx", precision="int8")},
        {"engine": SimpleNamespace(name="mtmd", precision="fp32")},
        {"decoder": SimpleNamespace(n_ctx=77)}, {"sharing": Sharing("batch")}, {"sharing": Sharing("running")},
        {"sharing": Sharing(0.5)}, {"sharing": Sharing(0.6)},
        {"layer_steps": read_layer_steps("fastv@1:0.5")}, {"layer_steps": read_layer_steps("fastv@1:0.6")},
    ]  # fmt: skip
    assert len({base, *(like(**change) for change in changes)}) == 1 + len(changes)
    moved = tmp_path / "moved.gguf"
    shutil.copy(vlm.lm, moved)
    assert like(lm=moved) == base


def test_the_same_bytes_under_another_name_get_a_row_without_being_computed(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = pictures(tmp_path / "p", 2), tmp_path / "o.jsonl"
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    calls: list[str] = []
    plain = vlm.asker.request
    monkeypatch.setattr(vlm.asker, "request", lambda e, q, *o: (calls.append(q), plain(e, q, *o))[1])
    assert into(vlm, folder, out).ok == 3
    assert len(calls) == 2
    by_id = {row["id"]: row for row in rows(out)}
    assert by_id["copy.png"]["caption"] == by_id["0.png"]["caption"]
    assert by_id["copy.png"]["notes"] == ["same bytes as 0.png"]
    assert by_id["copy.png"]["finish_reason"] == by_id["0.png"]["finish_reason"]
    (folder / "moved.png").write_bytes((folder / "1.png").read_bytes())
    assert into(vlm, folder, out).ok == 1
    assert len(calls) == 2
    (folder / "again.png").write_bytes((folder / "0.png").read_bytes())
    assert into(vlm, folder, out).ok == 1
    assert into(vlm, folder, out).skipped == 5


def test_overwrite_computes_again(vlm: VLM, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "p", 2), tmp_path / "o.jsonl"
    into(vlm, folder, out)
    assert into(vlm, folder, out, overwrite=True).ok == 2


def test_a_dry_run_counts_what_would_be_skipped(vlm: VLM, tmp_path: Path) -> None:
    mixed(tmp_path / "photos")
    out = tmp_path / "o.jsonl"
    sources = find_sources([str(tmp_path / "photos")])
    assert count_done(vlm, sources, PARAMETERS, Done.read(out)) == 0
    summary = into(vlm, tmp_path / "photos", out)
    assert count_done(vlm, sources, PARAMETERS, Done.read(out)) == summary.ok
    assert count_done(vlm, sources, PARAMETERS, Done.read(out), overwrite=True) == 0
    assert count_done(vlm, sources, Parameters("x", 6), Done.read(out)) == 0
    (tmp_path / "photos" / "good.txt").write_text("x")
    assert count_done(vlm, sources, PARAMETERS, None, ".txt") == 1


def test_a_failure_that_comes_back_is_written_again(vlm: VLM, tmp_path: Path) -> None:
    """The last row of an id counts, and it must not say ok of a picture that is broken again."""
    folder, out = pictures(tmp_path / "p", 1), tmp_path / "o.jsonl"
    good = (folder / "0.png").read_bytes()
    states = [b"text", b"text", good, b"text", b"text", good, good]
    seen = []
    for state in states:
        (folder / "0.png").write_bytes(state)
        into(vlm, folder, out)
        seen.append([row["status"] for row in rows(out)])
    assert seen[1] == ["error"]
    assert seen[4] == ["error", "ok", "error"]
    assert seen[6] == ["error", "ok", "error", "ok"]
    last = rows(out)[-1]
    assert (last["notes"], last["caption"]) == (["as captioned before"], rows(out)[1]["caption"])


def test_another_picture_of_the_same_id_is_refused_and_a_folder_may_move(vlm: VLM, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    folder, other = pictures(tmp_path / "a", 2), tmp_path / "b"
    (folder / "bad.png").write_text("text")
    into(vlm, folder, out)
    shutil.copytree(folder, other)
    Image.new("RGB", (5, 5)).save(other / "bad.png")  # it was never captioned
    check_ids(find_sources([str(other)]), Done.read(out))
    summary = into(vlm, other, out)
    assert (summary.ok, summary.skipped) == (1, 2)
    Image.new("RGB", (5, 5)).save(other / "1.png")
    with pytest.raises(UsageError, match=r"holds 1\.png of the folder .*/a, not the one of .*/b; use another --out"):
        check_ids(find_sources([str(other)]), Done.read(out))
    Image.new("RGB", (6, 6)).save(folder / "1.png")  # in its own folder a picture may change
    check_ids(find_sources([str(folder / "1.png")]), Done.read(out))
