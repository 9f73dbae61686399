"""Opening pictures: every stated rule against values worked out here, and hostile files against the one promise."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pil
from PIL import ImageCms, ImageFile

from edge_tokcomp.errors import ImageError
from edge_tokcomp.images import open_image, read_bytes, wrap_image

U8 = NDArray[np.uint8]


def noise(height: int = 12, width: int = 20, channels: int = 3, seed: int = 0) -> U8:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int = 48, width: int = 64) -> U8:
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * x % 256, 5 * y % 256, 2 * (x + y) % 256], axis=-1).astype(np.uint8)


def saved(picture: Pil.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def pixels(data: bytes, **options: Any) -> U8:
    return np.asarray(open_image(data, **options).picture)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand: ``rows`` are the samples of all rows, without filter bytes."""
    stride = len(rows) // height
    raw = b"".join(b"\0" + rows[stride * y : stride * (y + 1)] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )


def over_white(rgba: NDArray[Any]) -> NDArray[np.float64]:
    alpha = rgba[..., 3:].astype(float) / 255
    return np.asarray(rgba[..., :3] * alpha + 255 * (1 - alpha))


# Row 0 of the stored picture is the upright one's top, right, ...; column 0 its left, ... (EXIF 2.32, tag 274).
STORED: dict[int, Callable[[U8], U8]] = {
    1: lambda up: up,
    2: lambda up: up[:, ::-1],
    3: lambda up: up[::-1, ::-1],
    4: lambda up: up[::-1],
    5: lambda up: up.swapaxes(0, 1),
    6: lambda up: up.swapaxes(0, 1)[::-1],
    7: lambda up: up[::-1, ::-1].swapaxes(0, 1),
    8: lambda up: up.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied_to_the_pixel(orientation: int, form: str) -> None:
    upright = noise(12, 20)
    exif = Pil.Exif()
    exif[274] = orientation
    stored = Pil.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = saved(stored, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    assert np.array_equal(pixels(data), upright)


def test_exif_orientation_of_a_jpeg_is_applied() -> None:
    exif = Pil.Exif()
    exif[274] = 6
    stored = Pil.fromarray(np.ascontiguousarray(STORED[6](smooth())))
    image = open_image(saved(stored, "JPEG", quality=98, exif=exif))
    assert (image.width, image.height) == (64, 48)
    assert np.abs(np.asarray(image.picture).astype(int) - smooth()).mean() < 4
    assert image.notes == ("EXIF orientation 6 applied",)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_changes_nothing(orientation: int) -> None:
    exif = Pil.Exif()
    exif[274] = orientation
    assert np.array_equal(pixels(saved(Pil.fromarray(noise()), "PNG", exif=exif)), noise())


def test_broken_exif_does_not_cost_the_picture() -> None:
    image = open_image(saved(Pil.fromarray(noise()), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff"))
    assert np.array_equal(np.asarray(image.picture), noise())


def test_cmyk_goes_through_its_profile() -> None:
    """The profile: a CMYK device whose inks darken red only, so that black ink gives cyan, unlike plain conversion."""
    data = saved(Pil.fromarray(np.full((4, 4, 4), (0, 0, 0, 255), np.uint8), "CMYK"), "TIFF", icc_profile=odd_cmyk())
    image = open_image(data)
    red, green, blue = np.asarray(image.picture)[0, 0].astype(int)
    assert image.notes == ("CMYK through its profile",)
    assert red + 60 < min(green, blue)
    plain = open_image(saved(Pil.new("CMYK", (4, 4), (0, 0, 0, 255)), "TIFF"))
    assert np.asarray(plain.picture).max() == 0
    assert plain.notes == ("CMYK without a profile",)


def test_a_cmyk_profile_that_is_none_is_said_in_a_note() -> None:
    rgb_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (b"no profile at all", rgb_profile):
        image = open_image(saved(Pil.new("CMYK", (4, 4), (255, 0, 0, 0)), "TIFF", icc_profile=profile))
        assert np.asarray(image.picture)[0, 0].tolist() == [0, 255, 255]
        assert image.notes[0].startswith("CMYK without its profile, which cannot be used")


def test_adobe_cmyk_jpeg_is_not_inverted() -> None:
    ink = np.zeros((32, 32, 4), np.uint8)
    ink[:, :16] = (255, 0, 0, 0)
    data = saved(Pil.fromarray(ink, "CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    found = pixels(data).astype(int)
    assert np.abs(found[4:-4, 2:12] - (0, 255, 255)).max() < 12
    assert np.abs(found[4:-4, 20:-2] - (255, 255, 255)).max() < 12


def test_16_bit_grey_is_scaled_and_rounded() -> None:
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    wanted = np.round(grey / 257).astype(np.uint8)
    files = [png(256, 256, 16, 0, grey.astype(">u2").tobytes()), saved(Pil.fromarray(grey), "TIFF")]
    files.append(b"P5 256 256 65535\n" + grey.astype(">u2").tobytes())
    files.append(saved(Pil.fromarray(grey.astype(np.int32)), "TIFF"))
    for data in files:
        assert np.array_equal(pixels(data), np.repeat(wanted[..., None], 3, -1))


def test_16_bit_grey_with_a_transparent_value_has_white_there() -> None:
    grey = np.array([[100, 30000], [65535, 100]], ">u2")
    data = png(2, 2, 16, 0, grey.tobytes(), chunk(b"tRNS", struct.pack(">H", 100)))
    assert pixels(data)[..., 0].tolist() == [[255, 117], [255, 255]]


@pytest.mark.parametrize("low", [-1, 70_000])
def test_32_bit_grey_beyond_16_bits_is_refused(low: int) -> None:
    with pytest.raises(ImageError, match="do not fit 16 bits"):
        open_image(saved(Pil.fromarray(np.full((2, 2), low, np.int32)), "TIFF"))


def test_floating_point_grey_must_lie_within_0_and_1() -> None:
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    found = pixels(saved(Pil.fromarray(values), "TIFF"))
    assert np.array_equal(found[..., 1].ravel(), np.arange(256))
    for wrong in (-0.1, 1.5, np.nan, np.inf):
        with pytest.raises(ImageError, match=r"not within 0\.\.1"):
            open_image(saved(Pil.fromarray(np.where(values == 0, np.float32(wrong), values)), "TIFF"))


def test_16_bit_colour_is_scaled() -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (6, 5, 3)).astype(">u2")
    found = pixels(png(5, 6, 16, 2, deep.tobytes()))
    assert np.abs(found.astype(float) - deep / 257).max() <= 1
    tiff = tiff_rgb16(deep.astype("<u2"))
    assert np.abs(pixels(tiff).astype(float) - deep / 257).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    rgba = noise(channels=4, seed=3)
    if mode == "LA":
        rgba[..., :3] = rgba[..., :1]
    source = rgba if mode == "RGBA" else rgba[..., [0, 3]]
    image = open_image(saved(Pil.fromarray(source, mode), "PNG"))
    assert np.abs(np.asarray(image.picture) - over_white(rgba)).max() <= 1
    assert image.notes == ("transparency over white",)


def test_a_transparent_colour_of_an_opaque_picture_becomes_white() -> None:
    rgb = noise(3, 3)
    for key in (chunk(b"tRNS", struct.pack(">HHH", *map(int, rgb[1, 1]))),):
        found = pixels(png(3, 3, 8, 2, rgb.tobytes(), key))
        assert found[1, 1].tolist() == [255, 255, 255]
        assert np.array_equal(found[0], rgb[0])


def test_palettes_with_transparency_become_rgb_over_white() -> None:
    indices = np.arange(16, dtype=np.uint8).reshape(4, 4)
    palette = noise(1, 16)[0]
    picture = Pil.fromarray(indices, "P")
    picture.putpalette(palette.tobytes())
    alpha = np.linspace(0, 255, 16).astype(np.uint8)
    found = pixels(saved(picture, "PNG", transparency=alpha.tobytes()))
    wanted = over_white(np.concatenate([palette, alpha[:, None]], axis=1))
    assert np.abs(found.reshape(16, 3) - wanted).max() <= 1
    assert np.array_equal(pixels(saved(picture, "PNG")).reshape(16, 3), palette)
    assert pixels(saved(picture, "GIF", transparency=5)).reshape(16, 3)[5].tolist() == [255, 255, 255]


def test_one_bit_pictures_are_black_and_white() -> None:
    bits = np.random.default_rng(0).random((9, 9)) < 0.5
    for form in ("PNG", "TIFF", "BMP"):
        found = pixels(saved(Pil.fromarray(bits), form))
        assert np.array_equal(found, np.repeat((bits * 255)[..., None], 3, -1))


@pytest.mark.parametrize(
    ("form", "options"),
    [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("MPO", {"quality": 98}), ("AVIF", {})],
)
def test_of_several_pictures_the_first_is_taken(form: str, options: dict[str, Any]) -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    first, *rest = (Pil.fromarray(np.full((16, 16, 3), colour, np.uint8)) for colour in colours)
    image = open_image(saved(first, form, save_all=True, append_images=rest, **options))
    assert np.abs(np.asarray(image.picture).astype(int) - colours[0]).max() <= (0 if form in ("PNG", "TIFF") else 12)
    assert image.notes == ("the first of several pictures in the file",)
    assert open_image(saved(first, form, **options)).notes == ()


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


def test_what_a_file_is_decides_its_content_not_its_name(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(saved(Pil.fromarray(noise()), "PNG"))
    assert np.array_equal(np.asarray(open_image(path).picture), noise())
    path.write_text("Grüße, this is no picture\n", encoding="utf-8")
    with pytest.raises(ImageError, match=r"photo\.jpg: not a picture that can be read \(it is text\)"):
        open_image(path)
    path.write_bytes(b"\x7fELF\x02\x01\x01\0" * 20)
    with pytest.raises(ImageError, match="starts with 7f 45 4c 46"):
        open_image(path)


def test_text_is_recognised_wherever_a_long_one_is_cut() -> None:
    for lead in range(4):
        with pytest.raises(ImageError, match="it is text"):
            open_image(b"x" * lead + "€".encode() * 400)


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


def test_heic_says_what_to_install_and_avif_does_not() -> None:
    pytest.importorskip("PIL._avif")
    heic = struct.pack(">I", 24) + b"ftypmif1\0\0\0\0mif1heic" + b"\0" * 40
    if "pillow_heif" not in sys.modules:
        with pytest.raises(ImageError, match=r"edge-tokcomp\[heic\]|damaged|not a picture"):
            open_image(heic)
    avif = saved(Pil.fromarray(smooth()), "AVIF")
    as_mif1 = avif[:8] + b"mif1" + avif[12:]
    assert pixels(as_mif1).shape == (48, 64, 3)


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


def riff_webp(width: int, height: int) -> bytes:
    canvas = struct.pack("<I", 2) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", len(canvas)) + canvas
    body += b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    frame = saved(Pil.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
    place = (0).to_bytes(6, "little") + bytes(6) + (100).to_bytes(3, "little") + b"\0"
    body += b"ANMF" + struct.pack("<I", len(place) + len(frame)) + place + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bombs() -> dict[str, bytes]:
    """Small files that declare, and some of which hold, more pixels than may be decoded."""
    whole = png(20_000, 10_000, 1, 0, bytes(2_500 * 10_000))
    declared = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 25_000, 8, 6, 0, 0, 0))
    declared += chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(whole), 22) + whole
    tags = [(256, 4, 100_000), (257, 4, 100_000), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, 100_000),
            (279, 4, 16)]  # fmt: skip
    tiled = [(256, 4, 2_000), (257, 4, 2_000), (258, 3, 8), (259, 3, 5), (262, 3, 1), (322, 4, 60_000),
             (323, 4, 60_000), (324, 4, 8), (325, 4, 16)]  # fmt: skip
    jp2 = bytearray(saved(Pil.fromarray(smooth()), "JPEG2000", no_jp2=True))
    jp2[8:16] = struct.pack(">II", 60_000, 60_000)
    jp2[24:32] = struct.pack(">II", 60_000, 60_000)
    gif = b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0)
    gif += b"\x2c" + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0x80) + bytes(6) + b"\x02\x02\x4c\x01\0;"
    late = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0)
    late += b"\x2c" + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0x80) + bytes(6) + b"\x02\x02\x4c\x01\0;"
    return {
        "200 megapixels.png": whole,
        "a thousand million pixels.png": declared,
        "in an icon.ico": icon,
        "screen.gif": gif,
        "frame.gif": late,
        "strip.tif": tiff(tags, bytes(16)),
        "tile.tif": tiff(tiled, bytes(16)),
        "canvas.webp": riff_webp(16_383, 16_383),
        "header.bmp": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "header.ppm": b"P6 60000 60000 255\n",
        "header.qoi": b"qoif" + struct.pack(">IIBB", 60_000, 60_000, 3, 0) + bytes(20),
        "header.tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 60_000, 60_000, 24, 0) + bytes(40),
        "codestream.j2k": bytes(jp2),
        "text.png": png(1, 1, 8, 2, bytes(3), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100_000_000), 1))),
    }


def tiff(tags: list[tuple[int, int, int]], data: bytes) -> bytes:
    """A little-endian TIFF: ``data`` at offset 8, then one directory of single values."""
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + struct.pack("<I", 0)


def tiff_rgb16(values: NDArray[Any]) -> bytes:
    """Uncompressed 16-bit colour; the three depths stand behind the samples."""
    height, width, _ = values.shape
    data = values.tobytes()
    depths = struct.pack("<HHH", 16, 16, 16)
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 8 + len(data)), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, 1, 8), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, len(data))]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data) + 6) + data + depths + directory + struct.pack("<I", 0)


def odd_cmyk() -> bytes:
    """A CMYK profile in which every ink but black is invisible, and black ink prints Lab (70, -40, -20): cyan."""
    white, cyan = (255, 128, 128), (178, 88, 108)
    ramp = bytes(range(256))
    corners = b"".join(bytes(cyan if black else white) for _ in range(8) for black in (0, 1))
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1" + bytes(4) + struct.pack(">BBBB", 4, 3, 2, 0) + matrix + ramp * 4 + corners + ramp * 3
    table += bytes(-len(table) % 4)
    point = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    text = b"desc" + bytes(4) + struct.pack(">I", 4) + b"odd\0" + bytes(78)
    text += bytes(-len(text) % 4)
    parts, at = {b"desc": text, b"wtpt": point, b"A2B0": table}, 128 + 4 + 3 * 12
    index, body = struct.pack(">I", len(parts)), b""
    for name, part in parts.items():
        index += name + struct.pack(">II", at + len(body), len(part))
        body += part
    size = 128 + len(index) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + index + body


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


def test_a_picture_from_memory_follows_the_same_rules() -> None:
    exif = Pil.Exif()
    exif[274] = 8
    data = saved(Pil.fromarray(np.ascontiguousarray(STORED[8](noise()))), "PNG", exif=exif)
    opened = Pil.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(wrap_image(opened).picture), noise())
    turned = Pil.open(io.BytesIO(data)).rotate(90, expand=True)  # carries the old EXIF along
    assert np.array_equal(np.asarray(wrap_image(turned).picture), noise())
    with pytest.raises(ImageError, match="truncated"):
        wrap_image(Pil.open(io.BytesIO(data[:-60])))
    with pytest.raises(ImageError, match="limit of 10"):
        wrap_image(Pil.open(io.BytesIO(data)), max_pixels=10)
    rgba = noise(channels=4)
    assert np.abs(np.asarray(wrap_image(Pil.fromarray(rgba)).picture) - over_white(rgba)).max() <= 1


def test_the_hash_is_of_the_files_bytes_or_of_the_pixels(tmp_path: Path) -> None:
    import hashlib

    data = saved(Pil.fromarray(noise()), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    assert open_image(tmp_path / "a.png").sha256 == open_image(data).sha256 == hashlib.sha256(data).hexdigest()
    assert wrap_image(Pil.fromarray(noise())).sha256 == wrap_image(Pil.open(io.BytesIO(data))).sha256
    assert wrap_image(Pil.fromarray(noise())).sha256 != wrap_image(Pil.fromarray(noise(seed=1))).sha256
