"""Files written whole, and the one reader of archives that plans and the arrays of ``compress`` go through."""

from __future__ import annotations

import errno
import io
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from edge_tokcomp.errors import UsageError
from edge_tokcomp.features import read_features
from edge_tokcomp.files import read_npz, write_whole
from edge_tokcomp.tokens import Plan


def test_a_link_is_written_through_and_a_fault_leaves_what_was_there(tmp_path: Path) -> None:
    link, there = tmp_path / "link", tmp_path / "there"
    link.symlink_to(there)
    write_whole(link, lambda stream: stream.write(b"one"))
    assert link.is_symlink()

    def full(stream: BinaryIO) -> None:
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(link, full)
    assert there.read_bytes() == b"one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]


@pytest.mark.parametrize("name", ["x" * 300, "nodir/x", "folder", "/", ""])
def test_a_place_that_cannot_be_written_is_an_os_error_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):  # noqa: PT011  which one is the system's choice
        write_whole(tmp_path / name, lambda stream: stream.write(b"x"))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_arrays_of_either_format_and_order_come_back_the_same(tmp_path: Path, version: tuple[int, int]) -> None:
    wanted = {"rows": np.arange(6.0).reshape(2, 3), "columns": np.asfortranarray(np.arange(6).reshape(2, 3))}
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name, array in wanted.items():
            stream = io.BytesIO()
            np.lib.format.write_array(stream, array, version)
            archive.writestr(f"{name}.npy", stream.getvalue())
    found = read_npz(tmp_path / "a.npz", ["rows", "columns", "absent"], 1 << 20)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert np.array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_an_archive_may_unpack_to_the_limit_and_not_to_a_byte_more(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros(1000))
    size = 8000 + 128
    assert len(read_npz(tmp_path / "a.npz", ["a"], size)["a"]) == 1000
    with pytest.raises(ValueError, match="unpacks to more than"):
        read_npz(tmp_path / "a.npz", ["a"], size - 1)


def test_plans_and_features_are_read_by_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    objects = io.BytesIO()
    np.savez(objects, features=np.array([[object()]]), keep=np.array([object()]))
    for data, reason in (
        (b"", "not a zip file"),
        (b"PK\x03\x04 cut", "not a zip file"),
        (objects.getvalue(), "(features|keep) has the wrong type or size"),
    ):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=reason):
            read_features(path)
        with pytest.raises(Exception, match=reason):
            Plan.load(path)
    path.unlink()
    with pytest.raises(UsageError, match=r"a\.npz: not an \.npz of arrays \(No such file or directory\)"):
        read_features(path)
