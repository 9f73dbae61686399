"""Opening pictures from outside: by content, within limits, by stated rules.

* EXIF orientation is applied; for HEIC the container's own rotation is (by pillow-heif), never both.
* CMYK goes through its embedded profile to sRGB, or Pillow's plain conversion without one. RGB profiles are left alone,
  as the models' own training did.
* Deep grey is scaled to 8 bits, not clipped: by the depth of the file where it is 12 or 16 bits; 32 bits say nothing of
  where white is, so that their values decide, which must fit 8 or 16 bits. Floating-point grey must lie within 0..1. Of
  16-bit colour Pillow reads the upper byte. Palettes become RGB.
* Transparency is laid over white. Animated and multi-picture files give their first picture, and a note.
* Truncated and damaged files are errors, never half a picture. (What follows the first picture is not looked at.)
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import ImageError

if TYPE_CHECKING:
    from PIL import Image as PilImage

MAX_PIXELS = 100_000_000
"""Default limit on width x height: 400 MB once decoded."""

MAX_FILE_BYTES = 1 << 30

FORMATS = (
    "JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "MPO", "ICO", "PPM", "QOI", "TGA",
)  # fmt: skip
"""What is read. Pillow knows more, among them formats for which it starts other programs."""

_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 0x0102
_HEIF_BRANDS = frozenset((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"))
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
_PILLOW = threading.Lock()


@dataclass(frozen=True, eq=False)
class Image:
    """A decoded picture: upright RGB ``picture``, ``sha256`` of the file's bytes, ``notes`` on what was decided."""

    picture: PilImage.Image
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return self.picture.width

    @property
    def height(self) -> int:
        return self.picture.height


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a picture file; raises ``ImageError`` if it is no regular file, empty, huge or unreadable."""
    try:
        if not Path(path).exists():
            raise ImageError("a link to a file that is not there" if os.path.islink(path) else "no such file")
        if not Path(path).is_file():  # Opening a pipe would wait for its writer.
            raise ImageError("not a regular file")
        with Path(path).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise ImageError(f"the file has {size:,} bytes, more than the limit of {MAX_FILE_BYTES:,}")
            data = stream.read(MAX_FILE_BYTES)
    except OSError as fault:
        raise ImageError(f"cannot be read ({fault.strerror or fault})") from fault
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    return data


def open_image(source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Read and decode a picture by the rules above; raises ``ImageError`` with file and reason in one line."""
    if isinstance(source, bytes):
        if not source:
            raise ImageError("the picture is empty (0 bytes)")
        with _decoding(max_pixels):
            rgb, notes = _first_picture(_identify(source), max_pixels)
        return Image(rgb, hashlib.sha256(source).hexdigest(), tuple(notes))
    try:
        return open_image(read_bytes(source), max_pixels=max_pixels)
    except ImageError as fault:
        raise ImageError(f"{os.fspath(source)}: {fault}") from fault


def wrap_image(picture: PilImage.Image, *, max_pixels: int = MAX_PIXELS) -> Image:
    """A Pillow picture by the same rules; its ``sha256`` is that of its pixels.

    ``convert``, ``copy``, ``resize`` and ``crop`` of Pillow keep the EXIF orientation and leave the pixels as they lie,
    so it is applied to every picture that carries one. Whoever turns a picture beforehand does it with
    ``PIL.ImageOps.exif_transpose``, which takes the orientation away. Raises ``ImageError``.
    """
    with _decoding(max_pixels):
        rgb, notes = _first_picture(picture, max_pixels)
    return Image(rgb, hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest(), tuple(notes))


@contextmanager
def _decoding(max_pixels: int) -> Iterator[None]:
    """Pillow under our rules, and whatever its readers raise on hostile files as ``ImageError``.

    Its pixel limit, its tolerance and its warnings are settings of the process: set here, one thread at a time, and
    put back.
    """
    from PIL import Image as Pil
    from PIL import ImageFile

    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Pil.DecompressionBombWarning)
        before = Pil.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        # Icons are decoded as they are opened, so the limit cannot wait for us to look at the header.
        Pil.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
        try:
            yield
        except ImageError:
            raise
        except (Pil.DecompressionBombError, Pil.DecompressionBombWarning) as fault:
            counted = re.search(r"\((\d+) pixels\)", str(fault))
            raise _too_large(int(counted[1]) if counted else None, max_pixels) from fault
        except MemoryError as fault:
            raise ImageError("not enough memory to decode it") from fault
        except Exception as fault:
            raise ImageError(f"damaged or truncated ({type(fault).__name__}: {_one_line(fault)})") from fault
        finally:
            Pil.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _identify(data: bytes) -> PilImage.Image:
    """Read the header of a picture file; the pixels are not decoded yet."""
    from PIL import Image as Pil
    from PIL import UnidentifiedImageError

    _enable_heif(data)
    Pil.init()
    try:
        return Pil.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Pil.OPEN])
    except UnidentifiedImageError:
        raise ImageError(f"not a picture that can be read ({_looks_like(data)})") from None


def _first_picture(picture: PilImage.Image, max_pixels: int) -> tuple[PilImage.Image, list[str]]:
    """The first picture of a file, or one from memory: decoded, upright and RGB, with notes on what was not plain."""
    width, height = picture.size
    if width * height > max_pixels:
        raise _too_large(width * height, max_pixels)
    if min(width, height) < 1:
        raise ImageError(f"{width} x {height} has no pixels")
    # Counting the frames would read a file of any length to its end.
    notes = ["the first of several pictures in the file"] if getattr(picture, "is_animated", False) else []
    picture.load()
    white = _white_level(picture)
    upright, turned = _upright(picture)
    rgb, converted = _to_rgb(upright, white)
    return rgb, notes + turned + converted


def _upright(picture: PilImage.Image) -> tuple[PilImage.Image, list[str]]:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception as fault:  # noqa: BLE001  Readers of metadata raise anything; the pixels are whole.
        return picture, [f"EXIF cannot be read, orientation not applied ({_one_line(fault)})"]
    if not isinstance(orientation, int) or orientation not in turns:
        return picture, []
    turned = picture.transpose(turns[orientation])
    for name in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        turned.info.pop(name, None)  # Whoever opens the result again must not turn it again.
    return turned, [f"EXIF orientation {orientation} applied"]


def _white_level(picture: PilImage.Image) -> int | None:
    """The value that is white in a picture of deep grey, by its file's depth; None where 32 bits leave it open."""
    bits = getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE)  # of a TIFF
    if picture.mode.startswith("I;16"):
        return 4095 if bits == (12,) else 65535
    if picture.format in ("PNG", "PPM"):  # Pillow's mode of 32 bits for files of 16, or scaled to 16.
        return 65535
    return 32767 if bits == (16,) else None  # signed


def _to_rgb(picture: PilImage.Image, white: int | None) -> tuple[PilImage.Image, list[str]]:
    """Any mode to RGB, with notes on what was not plain."""
    from PIL import Image as Pil

    mode = picture.mode
    if mode == "CMYK":
        return _from_cmyk(picture)
    if mode.startswith("I;16") or mode in ("I", "F"):
        return _from_grey(picture, white)
    if "transparency" in picture.info or mode in ("RGBA", "LA", "PA", "RGBa"):
        rgba = picture.convert("RGBA")
        paper = Pil.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Pil.alpha_composite(paper, rgba).convert("RGB"), ["transparency over white"]
    return (picture if mode == "RGB" else picture.convert("RGB")), []


def _from_grey(picture: PilImage.Image, white: int | None) -> tuple[PilImage.Image, list[str]]:
    """Integer grey of more than 8 bits, or floating-point grey, rounded to 8 bits."""
    from PIL import Image as Pil

    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())
    if picture.mode == "F":
        if not (low >= 0 and high <= 1):
            raise ImageError(f"floating-point grey values {low:g}..{high:g} are not within 0..1")
        grey, note = (values * np.float32(255) + np.float32(0.5)).astype(np.uint8), "float grey scaled to 8 bits"
    else:
        if white is not None:
            note = f"{16 if white == 32767 else white.bit_length()}-bit grey scaled to 8"
        elif high <= 255:
            white, note = 255, "32-bit grey with values of 8 bits"
        else:
            white, note = 65535, "32-bit grey with values of 16 bits, scaled to 8"
        if low < 0 or high > white:
            raise ImageError(
                f"grey values {low:.0f}..{high:.0f} are not within 0..{white}; save the picture with 8 or 16 bits"
            )
        table = ((np.arange(white + 1) * 255 + white // 2) // white).astype(np.uint8)
        grey = table[values]
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
        note += ", transparency over white"
    return Pil.fromarray(grey).convert("RGB"), [note]


def _from_cmyk(picture: PilImage.Image) -> tuple[PilImage.Image, list[str]]:
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture.convert("RGB"), ["CMYK without a profile"]
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        rgb = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImportError, ImageCms.PyCMSError, OSError, ValueError) as fault:
        return picture.convert("RGB"), [f"CMYK without its profile, which cannot be used ({_one_line(fault)})"]
    return (rgb or picture.convert("RGB")), ["CMYK through its profile"]


def _enable_heif(data: bytes) -> None:
    """Register the HEIC reader when the file is one; it is an extra."""
    if data[4:8] != b"ftyp":
        return
    length = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, length, 4))}
    if brands & _AVIF_BRANDS or not brands & _HEIF_BRANDS:
        return
    try:
        import pillow_heif
    except ImportError:
        raise ImageError("a HEIC picture; pip install 'edge-tokcomp[heic]' to read it") from None
    pillow_heif.register_heif_opener()


def _too_large(count: int | None, max_pixels: int) -> ImageError:
    found = "more" if count is None else f"{count:,} pixels, more"
    return ImageError(f"{found} than the limit of {max_pixels:,}; make it smaller or raise max_pixels (--max-pixels)")


def _looks_like(data: bytes) -> str:
    text = data[:512].decode("utf-8", "ignore")
    if len(text.encode()) >= len(data[:512]) - 3 and all(c.isprintable() or c.isspace() for c in text):
        return "it is text"
    return f"it starts with {data[:8].hex(' ')}"


def _one_line(fault: BaseException) -> str:
    return " ".join(str(fault).split()) or "no reason given"
