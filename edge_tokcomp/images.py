"""Opening pictures from outside: by content, within limits, by stated rules.

* EXIF orientation is applied; for HEIC the container's own rotation is (by pillow-heif), never both.
* CMYK goes through its embedded profile to sRGB, or Pillow's plain conversion without one. RGB profiles are left alone,
  as the models' own training did.
* 16-bit grey is scaled to 8 bits, not clipped; floating-point grey must lie within 0..1. Palettes become RGB.
* Transparency is laid over white. Animated and multi-picture files give their first picture, and a note.
* Truncated and damaged files are errors, never half a picture.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import ImageError

if TYPE_CHECKING:
    from PIL import Image as PilImage

MAX_PIXELS = 100_000_000
"""Default limit on width x height: 300 MB once decoded."""

MAX_FILE_BYTES = 1 << 30

_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


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
        if not Path(path).is_file():
            raise ImageError("no such file" if not Path(path).exists() else "not a regular file")
        size = os.stat(path).st_size
        if size == 0:
            raise ImageError("the file is empty (0 bytes)")
        if size > MAX_FILE_BYTES:
            raise ImageError(f"the file has {size:,} bytes, more than the limit of {MAX_FILE_BYTES:,}")
        return Path(path).read_bytes()
    except OSError as fault:
        raise ImageError(f"cannot be read ({fault.strerror or fault})") from fault


def open_image(source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Read and decode a picture by the rules above; raises ``ImageError`` with the reason in one line."""
    data = source if isinstance(source, bytes) else read_bytes(source)
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    try:
        rgb, notes = _decode(data, max_pixels)
    except ImageError:
        raise
    except Exception as fault:
        raise ImageError(f"damaged or truncated ({type(fault).__name__}: {_one_line(fault)})") from fault
    return Image(rgb, hashlib.sha256(data).hexdigest(), tuple(notes))


def wrap_image(picture: PilImage.Image) -> Image:
    """A picture already in memory, by the same rules; its ``sha256`` is that of its pixels."""
    rgb, notes = _to_rgb(picture)
    return Image(rgb, hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest(), tuple(notes))


def _decode(data: bytes, max_pixels: int) -> tuple[PilImage.Image, list[str]]:
    from PIL import Image as Pil
    from PIL import ImageOps, UnidentifiedImageError

    _enable_heif(data)
    try:
        with warnings.catch_warnings():
            # Our own limit stands below; Pillow's warning would only repeat it.
            warnings.simplefilter("ignore", Pil.DecompressionBombWarning)
            picture = Pil.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ImageError(f"not a picture that can be read ({_looks_like(data)})") from None
    except Pil.DecompressionBombError as fault:
        raise ImageError(
            f"more pixels than the limit of {max_pixels:,} ({_one_line(fault)}); see --max-pixels"
        ) from None
    with picture:
        width, height = picture.size
        if width * height > max_pixels:
            raise ImageError(
                f"{width} x {height} is {width * height:,} pixels, more than the limit of {max_pixels:,}; "
                "see --max-pixels"
            )
        if min(width, height) < 1:
            raise ImageError(f"{width} x {height} has no pixels")
        frames = getattr(picture, "n_frames", 1)
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        rgb, notes = _to_rgb(upright)
    if frames > 1:
        notes.insert(0, f"first of {frames} frames")
    return rgb, notes


def _to_rgb(picture: PilImage.Image) -> tuple[PilImage.Image, list[str]]:
    """Any mode to RGB, with notes on what was not plain."""
    from PIL import Image as Pil

    mode = picture.mode
    if mode == "RGB":
        return picture.copy() if picture.readonly else picture, []
    if mode == "CMYK":
        return _from_cmyk(picture)
    if mode.startswith("I;16") or mode == "I":
        low, high = _range(picture)
        if low < 0 or high > 65535:
            raise ImageError(f"grey values {low:g}..{high:g} do not fit 16 bits")
        return picture.convert("I").point(lambda value: value / 257).convert("L").convert("RGB"), [
            "16-bit grey scaled to 8"
        ]
    if mode == "F":
        low, high = _range(picture)
        if not (low >= 0 and high <= 1):
            raise ImageError(f"floating-point grey values {low:g}..{high:g} are not within 0..1")
        return picture.point(lambda value: value * 255).convert("L").convert("RGB"), ["float grey scaled to 8 bits"]
    if "transparency" in picture.info or mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        rgba = picture.convert("RGBA")
        white = Pil.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Pil.alpha_composite(white, rgba).convert("RGB"), ["transparency over white"]
    return picture.convert("RGB"), []


def _range(picture: PilImage.Image) -> tuple[float, float]:
    """Least and greatest value of a picture of one band."""
    values = np.asarray(picture)
    return float(values.min()), float(values.max())


def _from_cmyk(picture: PilImage.Image) -> tuple[PilImage.Image, list[str]]:
    from PIL import ImageCms

    profile = picture.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            rgb = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError) as fault:
            return picture.convert("RGB"), [f"CMYK without its profile, which is damaged ({_one_line(fault)})"]
        if rgb is not None:
            return rgb, ["CMYK through its profile"]
    return picture.convert("RGB"), ["CMYK without a profile"]


def _enable_heif(data: bytes) -> None:
    """Register the HEIC reader when the file is one; it is an extra."""
    if data[4:8] != b"ftyp" or data[8:12] not in _HEIF_BRANDS:
        return
    try:
        import pillow_heif
    except ImportError:
        raise ImageError("a HEIC picture; pip install 'edge-tokcomp[heic]' to read it") from None
    pillow_heif.register_heif_opener()


def _looks_like(data: bytes) -> str:
    try:
        text = data[:512].decode("utf-8")
    except UnicodeDecodeError:
        return f"it starts with {data[:8].hex(' ')}"
    return (
        "it is text" if text.isprintable() or any(c in text for c in "\n\t") else f"it starts with {data[:8].hex(' ')}"
    )


def _one_line(fault: BaseException) -> str:
    return " ".join(str(fault).split()) or "no reason given"
