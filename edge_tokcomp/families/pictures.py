"""What preprocessings share: resizing by Pillow, as the Hugging Face processors do, cutting, normalising."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_tokcomp.errors import ImageError
from edge_tokcomp.families.tower_spec import TowerSpec

LONGEST_SIDE = 65_535
"""Pixels; a longer picture would be resized or padded to gigabytes."""

BILINEAR, BICUBIC, LANCZOS = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS


def check_picture(image: Image.Image) -> None:
    """Raise ``ImageError`` for a picture no side of which may be resized, ``ValueError`` for one that is not RGB."""
    if image.mode != "RGB":
        raise ValueError(f"preprocess takes an RGB picture, got mode {image.mode}")
    width, height = image.size
    if min(width, height) < 1 or max(width, height) > LONGEST_SIDE:
        raise ImageError(f"picture of {width}x{height} pixels: sides must be within 1..{LONGEST_SIDE}; resize it first")


def resized(image: Image.Image, height: int, width: int, resample: Image.Resampling) -> Image.Image:
    """``image`` in another size."""
    return image if image.size == (width, height) else image.resize((width, height), resample)


def normalised(image: Image.Image, spec: TowerSpec) -> NDArray[np.float32]:
    """``(3, H, W) float32``: colours less the mean, by the standard deviation."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    pixels = (pixels - np.array(spec.image_mean, np.float32)) / np.array(spec.image_std, np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)


def cut(image: Image.Image, rows: int, columns: int) -> list[Image.Image]:
    """Equal parts of a picture whose sides are multiples of ``rows`` and ``columns``, in raster order."""
    width, height = image.width // columns, image.height // rows
    return [
        image.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
        for row in range(rows)
        for column in range(columns)
    ]


def fit_area(height: int, width: int, unit: int, least: int, most: int, shortest: int = 0) -> tuple[int, int]:
    """Height and width in multiples of ``unit`` near those given, of ``least`` to ``most`` pixels, in proportion.

    As Qwen2-VL and models after it size their pictures. ``shortest``: what a side of less than half a ``unit`` counts
    as before the areas are compared.
    """
    tall, wide = (max(shortest, round(side / unit) * unit) for side in (height, width))
    if tall * wide > most:
        scale = math.sqrt(height * width / most)
        tall, wide = (max(unit, math.floor(side / scale / unit) * unit) for side in (height, width))
    elif tall * wide < least:
        scale = math.sqrt(least / (height * width))
        tall, wide = (math.ceil(side * scale / unit) * unit for side in (height, width))
    return tall, wide
