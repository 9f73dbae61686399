"""Pictures to measure on: all different, as JPEG files, none of which a cache could know."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def picture(number: int, width: int, height: int) -> bytes:
    """The JPEG file of picture ``number``: coarse colours with some noise, about as large as a photograph's."""
    rng = np.random.default_rng([number, width, height])
    coarse = rng.integers(0, 256, (max(height // 48, 1), max(width // 48, 1), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, "JPEG", quality=90)
    return stream.getvalue()
