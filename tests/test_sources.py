"""Finding pictures: what a name stands for, and that each is found once."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from edge_tokcomp.errors import UsageError
from edge_tokcomp.sources import Source, find_sources


def picture(path: Path, form: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, form)
    return path


def ids(sources: list[Source]) -> list[str]:
    return [source.id for source in sources]


def test_a_folder_gives_its_pictures_sorted_by_their_path_in_it(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.WebP", ".hidden.png", "deep/d.png", ".cache/e.png", "deep/.git/f.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert ids(find_sources([str(tmp_path)])) == ["a.JPG", "b.png", "c.WebP"]
    assert ids(find_sources([str(tmp_path)], recursive=True)) == ["a.JPG", "b.png", "c.WebP", "deep/d.png"]


def test_a_picture_without_its_extension_counts(tmp_path: Path) -> None:
    forms = {"one": "JPEG", "two.part": "PNG", "three.image": "WEBP", "four": "TIFF", "five": "BMP", "six.x": "GIF"}
    for name, form in forms.items():
        picture(tmp_path / name, form)
    assert ids(find_sources([str(tmp_path)])) == sorted(forms)


def test_raw_photographs_and_texts_that_start_like_pictures_do_not(tmp_path: Path) -> None:
    (tmp_path / "photo.nef").write_bytes(b"MM\x00*" + bytes(40))
    (tmp_path / "photo.dng").write_bytes(b"II*\x00" + bytes(40))
    (tmp_path / "cars").write_text("BMW and others")
    (tmp_path / "strip").write_text("GIF8 is no signature")
    picture(tmp_path / "photo.jpg")
    assert ids(find_sources([str(tmp_path)])) == ["photo.jpg"]


def test_with_several_names_ids_are_the_paths_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(Path("x/a.png"))
    picture(Path("y/a.png"))
    picture(Path("z.png"))
    assert ids(find_sources(["x", "y", "z.png"])) == ["x/a.png", "y/a.png", "z.png"]
    assert ids(find_sources(["x/a.png"])) == ["a.png"]


def test_a_root_and_an_id_together_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = Path.cwd().resolve()
    picture(Path("x/deep/a.png"))
    picture(Path("y.png"))
    (tmp_path / "link").symlink_to("x", target_is_directory=True)
    absolute = str(tmp_path / "x")
    cases = {
        ("x",): here / "x", ("x/deep",): here / "x" / "deep", ("x/deep/a.png",): here / "x" / "deep", ("y.png",): here,
        ("x", "y.png"): here, ("x/*/*.png",): here, ("link",): here / "x", (absolute,): here / "x",
        (absolute, "y.png"): Path("/"), (".",): here,
    }  # fmt: skip
    for names, root in cases.items():
        sources = find_sources(names, recursive=True)
        assert sources[0].root == str(root), names
        for source in sources:
            assert Path(source.root, source.id).samefile(source.path), names
    (source,) = find_sources(["-"], listing=io.BytesIO(b"y.png"))
    assert (source.root, source.id) == (str(here), "y.png")


def test_a_current_folder_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UsageError, match="current folder cannot be opened"):
        find_sources([str(tmp_path)])


def test_what_is_named_twice_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(Path("x/a.png"))
    found = find_sources(["x", "x/a.png", "./x/../x/a.png", str(tmp_path / "x"), "x/*.png"])
    assert ids(found) == ["x/a.png"]


def test_globs_are_expanded_where_the_shell_did_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("p/a.png", "p/b.jpg", "p/q/c.png", "[x].png"):
        picture(Path(name))
    assert ids(find_sources(["p/*.png"])) == ["p/a.png"]
    assert ids(find_sources(["p/**/*.png"])) == ["p/a.png", "p/q/c.png"]
    assert ids(find_sources(["p*"])) == ["p/a.png", "p/b.jpg"]
    assert ids(find_sources(["[x].png"])) == ["[x].png"]  # a file of that very name comes first
    with pytest.raises(UsageError, match=r"nothing\*: no file matches"):
        find_sources(["nothing*"])


def test_names_that_stand_for_nothing_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "full" / "deep" / "a.png")
    (tmp_path / "empty").mkdir()
    for name, reason in {
        str(tmp_path / "no.png"): "no such file or folder",
        str(tmp_path / "empty"): "no pictures in this folder",
        str(tmp_path / "full"): "--recursive",
        "": "empty name",
        "x" * 5000: "cannot be opened",
    }.items():
        with pytest.raises(UsageError, match=reason):
            find_sources([name])


def test_a_named_file_is_taken_whatever_it_is(tmp_path: Path) -> None:
    """What is wrong with it becomes an error row: every file named is accounted for."""
    (tmp_path / "text.md").write_text("x")
    (tmp_path / "broken.png").symlink_to("nowhere")
    assert ids(find_sources([str(tmp_path / "text.md")])) == ["text.md"]
    assert ids(find_sources([str(tmp_path / "broken.png")])) == ["broken.png"]
    assert ids(find_sources([str(tmp_path)])) == ["broken.png"]


def test_links_to_files_are_followed_and_loops_of_folders_are_not(tmp_path: Path) -> None:
    picture(tmp_path / "real.png")
    (tmp_path / "link.png").symlink_to("real.png")
    (tmp_path / "loop").symlink_to(".", target_is_directory=True)
    assert ids(find_sources([str(tmp_path)], recursive=True)) == ["link.png", "real.png"]


@pytest.mark.parametrize("text", [b"a.png\nb c.png\n\n", b"a.png\r\nb c.png\r\n", b"a.png\0b c.png\0"])
def test_a_list_on_standard_input_is_lines_or_nul_separated(text: bytes) -> None:
    assert ids(find_sources(["-"], listing=io.BytesIO(text))) == ["a.png", "b c.png"]


def test_an_empty_list_is_no_fault() -> None:
    assert find_sources(["-"], listing=io.BytesIO(b"")) == []


def test_a_list_may_hold_any_file_name() -> None:
    names = [b"caf\xe9.png", "ü\u2028ü.png".encode(), b"tab\there.png"]
    found = find_sources(["-"], listing=io.BytesIO(b"\n".join(names)))
    assert [os.fsencode(source.path) for source in found] == names
    assert found[0].id == "caf\\xe9.png"
    assert find_sources(["-"], listing=io.BytesIO(b"new\nline.png\0"))[0].path.name == "new\nline.png"


def test_a_closed_standard_input_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="standard input is closed"):
        find_sources(["-"])


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_ids_of_names_that_are_no_utf8_can_be_written(tmp_path: Path) -> None:
    picture(tmp_path / os.fsdecode(b"caf\xe9.png"))
    (found,) = find_sources([str(tmp_path)])
    assert found.id == "caf\\xe9.png"
    assert found.id.encode()
    assert found.path.exists()
    picture(tmp_path / os.fsdecode(b"f\xe9") / "a.png")
    (found,) = find_sources([str(tmp_path / os.fsdecode(b"f\xe9"))])
    assert found.root == f"{tmp_path.resolve()}/f\\xe9"
