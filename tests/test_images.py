"""Opening pictures: every stated rule against values worked out here."""

from __future__ import annotations

import hashlib
import inspect
import io
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pil
from PIL import ImageCms, ImageOps

from edge_tokcomp.errors import ImageError
from edge_tokcomp.images import MAX_PIXELS, open_image, wrap_image
from picture_files import U8, chunk, grey_tiff, noise, odd_cmyk, png, saved, smooth, tiff_rgb16


def pixels(data: bytes, **options: Any) -> U8:
    return np.asarray(open_image(data, **options).picture)


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


@pytest.mark.parametrize("wrong", [-1, 70_000])
def test_32_bit_grey_beyond_16_bits_is_refused(wrong: int) -> None:
    picture = Pil.fromarray(np.array([[0, wrong]], np.int32))
    for opened in (lambda: open_image(saved(picture, "TIFF")), lambda: wrap_image(picture)):
        with pytest.raises(
            ImageError, match=rf"grey values .*{wrong}.* are not within 0\.\.(255|65535); save"
        ) as fault:
            opened()
        assert "\n" not in str(fault.value)


def test_32_bit_grey_is_scaled_by_the_range_of_its_values_and_says_so() -> None:
    for values, wanted, note in (
        ([0, 7, 255], [0, 7, 255], "32-bit grey with values of 8 bits"),
        ([0, 256, 65535], [0, 1, 255], "32-bit grey with values of 16 bits, scaled to 8"),
    ):
        picture = Pil.fromarray(np.array([values], np.int32))
        for image in (open_image(saved(picture, "TIFF")), wrap_image(picture)):
            assert np.asarray(image.picture)[0].tolist() == [[value] * 3 for value in wanted]
            assert image.notes == (note,)


def test_deep_grey_is_scaled_by_the_depth_of_its_file() -> None:
    """However dark the picture: 7 of 65535 is black, not 7 of 255."""
    dark = np.array([[0, 7], [100, 200]], np.uint16)
    twelve, signed = bytes([0x00, 0x0F, 0xFF, 0x00, 0x18, 0x00]), np.array([[0, 32767], [1, 16384]], "<i2").tobytes()
    for data, wanted, note in (
        (b"P5 2 2 65535\n" + dark.astype(">u2").tobytes(), [0, 0, 0, 1], "16-bit grey scaled to 8"),
        (png(2, 2, 16, 0, dark.astype(">u2").tobytes()), [0, 0, 0, 1], "16-bit grey scaled to 8"),
        (saved(Pil.fromarray(dark), "TIFF"), [0, 0, 0, 1], "16-bit grey scaled to 8"),
        (grey_tiff(2, 2, 12, 1, twelve), [0, 255, 0, 128], "12-bit grey scaled to 8"),
        (grey_tiff(2, 2, 16, 2, signed), [0, 255, 0, 128], "16-bit grey scaled to 8"),
    ):
        image = open_image(data)
        assert np.asarray(image.picture)[..., 0].ravel().tolist() == wanted
        assert image.notes == (note,)
    with pytest.raises(ImageError, match=r"grey values -1\.\.32767 are not within 0\.\.32767"):
        open_image(grey_tiff(2, 1, 16, 2, np.array([-1, 32767], "<i2").tobytes()))


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


def test_heic_says_what_to_install_and_avif_does_not() -> None:
    pytest.importorskip("PIL._avif")
    heic = struct.pack(">I", 24) + b"ftypmif1\0\0\0\0mif1heic" + b"\0" * 40
    if "pillow_heif" not in sys.modules:
        with pytest.raises(ImageError, match=r"edge-tokcomp\[heic\]|damaged|not a picture"):
            open_image(heic)
    avif = saved(Pil.fromarray(smooth()), "AVIF")
    as_mif1 = avif[:8] + b"mif1" + avif[12:]
    assert pixels(as_mif1).shape == (48, 64, 3)


def test_a_picture_from_memory_follows_the_same_rules() -> None:
    exif = Pil.Exif()
    exif[274] = 8
    data = saved(Pil.fromarray(np.ascontiguousarray(STORED[8](noise()))), "PNG", exif=exif)
    assert np.array_equal(np.asarray(wrap_image(Pil.open(io.BytesIO(data))).picture), noise())
    with pytest.raises(ImageError, match="truncated"):
        wrap_image(Pil.open(io.BytesIO(data[:-60])))
    rgba = noise(channels=4)
    assert np.abs(np.asarray(wrap_image(Pil.fromarray(rgba)).picture) - over_white(rgba)).max() <= 1


@pytest.mark.parametrize(
    "derive",
    [
        lambda picture: picture.copy(),
        lambda picture: picture.convert("RGBA"),
        lambda picture: picture.resize(picture.size),
        lambda picture: picture.crop((0, 0, *picture.size)),
        ImageOps.exif_transpose,
        lambda picture: wrap_image(picture).picture,
        lambda picture: wrap_image(picture).picture.copy(),
    ],
)
@pytest.mark.parametrize(("form", "tag"), [("PNG", "exif"), ("TIFF", "exif"), ("WEBP", "exif"), ("WEBP", "xmp")])
def test_exif_orientation_of_a_derived_picture_is_applied_once(
    derive: Callable[[Pil.Image], Pil.Image], form: str, tag: str
) -> None:
    exif = Pil.Exif()
    exif[274] = 6
    where = {"exif": exif} if tag == "exif" else {"xmp": b'<x tiff:Orientation="6"/>'}
    stored = Pil.fromarray(np.ascontiguousarray(STORED[6](noise())))
    data = saved(stored, form, **where, **({"lossless": True} if form == "WEBP" else {}))
    picture = derive(Pil.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(wrap_image(picture).picture), noise())


def test_the_pixel_limit_holds_for_pictures_from_memory() -> None:
    opened = Pil.open(io.BytesIO(saved(Pil.fromarray(noise(12, 20)), "PNG")))
    for picture in (opened, opened.copy(), opened.convert("L"), Pil.fromarray(noise(12, 20))):
        assert wrap_image(picture, max_pixels=240).width == 20
        with pytest.raises(ImageError, match="240 pixels, more than the limit of 239"):
            wrap_image(picture, max_pixels=239)
    assert inspect.signature(wrap_image).parameters["max_pixels"].default == MAX_PIXELS
    with pytest.raises(ImageError, match="0 x 5 has no pixels"):
        wrap_image(Pil.new("RGB", (0, 5)))


def test_the_hash_is_of_the_files_bytes_or_of_the_pixels(tmp_path: Path) -> None:

    data = saved(Pil.fromarray(noise()), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    assert open_image(tmp_path / "a.png").sha256 == open_image(data).sha256 == hashlib.sha256(data).hexdigest()
    assert wrap_image(Pil.fromarray(noise())).sha256 == wrap_image(Pil.open(io.BytesIO(data))).sha256
    assert wrap_image(Pil.fromarray(noise())).sha256 != wrap_image(Pil.fromarray(noise(seed=1))).sha256
