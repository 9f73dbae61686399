"""Files made to do harm, and files that came to it: an ``ImageError`` in one line, and no memory taken."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pil
from PIL import ImageFile

from edge_tokcomp.errors import ImageError
from edge_tokcomp.images import open_image, read_bytes
from picture_files import bombs, noise, saved, smooth

MEASURE = """
import sys
from pathlib import Path
from edge_tokcomp.errors import ImageError
from edge_tokcomp.images import open_image
def peak():  # getrusage would begin with the peak of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
for path in sorted(Path(sys.argv[1]).iterdir()):
    before = peak()
    try:
        open_image(path)
        answer = "opened"
    except ImageError as fault:
        answer = str(fault).removeprefix(f"{path}: ")
    print(path.name, (peak() - before) // 1024, answer, sep="\t")
"""


@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF", "TGA", "ICO"])
def test_truncated_files_are_errors(form: str, part: float, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Pil.fromarray(noise(64, 64)), form)
    open_image(data)
    for tolerant in (False, True):  # other libraries set this for the whole process
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
        with pytest.raises(ImageError):
            open_image(data[: int(len(data) * part)])
        assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


def test_empty_missing_and_odd_files_are_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    reasons = {
        "empty.png": r"the file is empty \(0 bytes\)", "none.png": "no such file",
        "broken.png": "a link to a file that is not there", "pipe.png": "not a regular file",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=reason) as caught:
            open_image(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match="not a regular file"):
        read_bytes(tmp_path)
    with pytest.raises(ImageError, match="empty"):
        open_image(b"")


def test_formats_that_start_programs_are_not_read() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(ImageError, match="not a picture that can be read"):
        open_image(eps)


def test_the_pixel_limit_counts_to_the_pixel() -> None:
    data = saved(Pil.new("L", (30, 40)), "PNG")
    assert open_image(data, max_pixels=1200).width == 30
    with pytest.raises(ImageError, match="1,200 pixels, more than the limit of 1,199;"):
        open_image(data, max_pixels=1199)
    icon = saved(Pil.new("RGB", (64, 64)), "ICO", sizes=[(64, 64)])
    with pytest.raises(ImageError, match="limit of 4,095"):
        open_image(icon, max_pixels=4095)


def test_a_higher_limit_than_pillows_own_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pil, "MAX_IMAGE_PIXELS", 500)
    data = saved(Pil.new("L", (50, 50)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(data).width == 50
    assert Pil.MAX_IMAGE_PIXELS == 500


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_bombs_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "bombs"
    folder.mkdir()
    (folder / "0.png").write_bytes(saved(Pil.fromarray(noise()), "PNG"))  # takes what Pillow itself takes once
    for name, data in bombs().items():
        assert len(data) < 2_000_000
        (folder / name).write_bytes(data)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == len(bombs()) + 1
    for name, grown, answer in lines[1:]:
        assert answer != "opened", name
        assert int(grown) < 40, (name, grown, answer)


MUTATED = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "QOI", "TGA", "ICO", "MPO", "JPEG2000", "AVIF"]


@pytest.mark.parametrize("form", MUTATED)
def test_damaged_files_give_a_picture_or_an_image_error(form: str) -> None:
    rng = np.random.default_rng(MUTATED.index(form))
    exif = Pil.Exif()
    exif[274] = 6
    options: dict[str, Any] = {} if form in ("BMP", "GIF", "PPM", "QOI", "TGA", "ICO", "JPEG2000") else {"exif": exif}
    original = saved(Pil.fromarray(smooth(40, 40)), form, **options)
    for _ in range(40):
        data = bytearray(original)
        for _ in range(int(rng.integers(1, 8))):
            data[int(rng.integers(min(len(data), 400) if rng.random() < 0.7 else len(data)))] = int(rng.integers(256))
        if rng.random() < 0.3:
            del data[int(rng.integers(len(data))) :]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                image = open_image(bytes(data), max_pixels=1_000_000)
            except ImageError:
                continue
        assert image.picture.mode == "RGB"
        assert 0 < image.width * image.height <= 1_000_000
