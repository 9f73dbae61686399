"""Picture files made here: plain ones, odd ones, hostile ones, and folders of them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil

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


def grey_tiff(width: int, height: int, depth: int, sample_format: int, samples: bytes) -> bytes:
    """Uncompressed grey of ``depth`` bits; ``sample_format`` 1 is unsigned, 2 signed."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, depth), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
            (278, 4, height), (279, 4, len(samples)), (339, 3, sample_format)]  # fmt: skip
    return tiff(tags, samples)


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


def pictures(folder: Path, count: int = 4) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Pil.fromarray(noise).save(folder / f"{number}.png")
    return folder


BAD = {"truncated.png", "empty.jpg", "renamed.jpg", "huge.png", "gone.png"}


def mixed(folder: Path) -> dict[str, str]:
    """A folder of good and bad files, and what the row of each must say: its notes, or the reason it failed."""
    folder.mkdir()
    plain = Pil.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    plain.save(folder / "good.png")
    exif = Pil.Exif()
    exif[274] = 6
    plain.save(folder / "rotated.jpg", exif=exif)
    plain.convert("CMYK").save(folder / "print.jpg")
    Pil.fromarray((np.arange(2400, dtype=np.uint16) * 27).reshape(40, 60)).save(folder / "deep.png")
    plain.quantize(16).save(folder / "palette.png")
    plain.save(folder / "moving.gif", save_all=True, append_images=[Pil.new("RGB", (60, 40))])
    data = (folder / "good.png").read_bytes()
    (folder / "truncated.png").write_bytes(data[:-400])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "renamed.jpg").write_text("shopping list\n")
    (folder / "huge.png").write_bytes(png(20_000, 10_000, 1, 0, bytes(2_500 * 10_000)))
    (folder / "gone.png").symlink_to("nowhere")
    return {
        "good.png": "", "rotated.jpg": "EXIF orientation 6", "print.jpg": "CMYK", "deep.png": "16-bit grey",
        "palette.png": "", "moving.gif": "first of several", "truncated.png": "damaged or truncated",
        "empty.jpg": "0 bytes", "renamed.jpg": "it is text", "huge.png": "200,000,000 pixels",
        "gone.png": "link to a file that is not there",
    }  # fmt: skip
