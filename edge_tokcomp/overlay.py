"""A picture of a plan: kept patches as they are, dropped ones dimmed, borders where they merge, the counts below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .families.base import Pixels
from .families.tower_spec import TowerSpec
from .tokens import Ints, Layout, Plan, Role

SIDE = 672
"""Least pixels along a crop's edge, so that single patches can be told apart."""

_DIM, _EDGE, _BORDER, _STRIP, _MARGIN = 0.22, (255, 196, 0), (150, 125, 60), 34, 10


def draw_overlay(
    pixels: Pixels, spec: TowerSpec, layout: Layout, plan: Plan, method: str, owner: Sequence[Ints] | None = None
) -> Image.Image:
    """What the tower saw of each crop, side by side, with ``plan`` laid over it; its counts and ``method`` below.

    ``owner``: of each crop ``(N,)``, the cell that each patch was merged into inside the tower; then the borders are
    those of the cells that are kept.
    """
    if owner is None:
        crops = [_crop(pixels, spec, layout, plan, number) for number in range(len(pixels.crops))]
    else:
        crops = [_merged(pixels, spec, layout, plan, owner[number], number) for number in range(len(pixels.crops))]
    width = sum(crop.width for crop in crops) + 8 * (len(crops) - 1)
    canvas = Image.new("RGB", (width, max(crop.height for crop in crops) + _STRIP), (24, 24, 24))
    left = 0
    for crop in crops:
        canvas.paste(crop, (left, 0))
        left += crop.width + 8
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=18)
    counts = str(plan).replace("→", "to")  # Pillow's built-in font has no arrow
    label, kept = f"{counts}  {method}", len(method)
    while kept and pen.textlength(label, font) > width - 2 * _MARGIN:
        kept -= 1
        label = f"{counts}  {method[:kept]}..."
    pen.text((_MARGIN, canvas.height - _STRIP // 2), label, (240, 240, 240), font, anchor="lm")
    return canvas


def _enlarged(pixels: Pixels, spec: TowerSpec, grid: tuple[int, int], number: int) -> tuple[NDArray[np.float32], int]:
    """A crop as colours, ``(H, W, 3)`` in 0..255, and the side in it of one cell of ``grid``."""
    values = pixels.crops[number].transpose(1, 2, 0) * np.array(spec.image_std, np.float32) + np.array(
        spec.image_mean, np.float32
    )
    seen = Image.fromarray((np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8))
    rows, columns = grid
    patch = -(-SIDE // max(rows, columns))
    return np.asarray(seen.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC), np.float32), patch


def _merged(pixels: Pixels, spec: TowerSpec, layout: Layout, plan: Plan, owner: Ints, number: int) -> Image.Image:
    """A crop with lines where one merged cell ends and the next begins."""
    rows, columns = pixels.grids[number]
    grid = rows * spec.merge, columns * spec.merge
    big, patch = _enlarged(pixels, spec, grid, number)
    height, width = layout.grids[number]
    row, column = np.divmod(owner, width * spec.merge)
    shares = _shares(layout, plan, number, height * width)[row // spec.merge * width + column // spec.merge]
    cells = np.where(shares == 1, owner, -1).reshape(grid)
    return _shown(_bordered(_dimmed(big, shares.reshape(grid), patch), cells, patch, _EDGE))


def _dimmed(big: NDArray[np.float32], shares: NDArray[np.float64], patch: int) -> NDArray[np.float32]:
    """``big`` as light as the ``shares (rows, columns)`` of its patches, and as grey."""
    light = np.maximum(np.kron(shares, np.ones((patch, patch))), _DIM)[..., None].astype(np.float32)
    grey = big.mean(axis=2, keepdims=True) * 0.5
    return np.asarray(big * light + grey * (1 - light) * 0.4)


def _bordered(big: NDArray[np.float32], owner: Ints, patch: int, colour: tuple[int, int, int]) -> NDArray[np.float32]:
    """``big`` with lines between patches of different ``owner (rows, columns)``."""
    cells = np.kron(owner, np.ones((patch, patch), np.int64))
    ends = np.zeros(cells.shape, np.bool_)
    ends[:, 1:] |= cells[:, 1:] != cells[:, :-1]
    ends[1:] |= cells[1:] != cells[:-1]
    return np.where(ends[..., None], np.array(colour, np.float32), big)


def _shown(values: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _crop(pixels: Pixels, spec: TowerSpec, layout: Layout, plan: Plan, number: int) -> Image.Image:
    rows, columns = pixels.grids[number]
    big, patch = _enlarged(pixels, spec, (rows, columns), number)
    big = _dimmed(big, _shares(layout, plan, number, rows * columns).reshape(rows, columns), patch)
    if plan.assign is not None:
        mine = (layout.crop == number) & (layout.role == Role.PATCH)
        owner = np.full(rows * columns, -1, np.int64)
        owner[layout.cell[mine]] = plan.assign[mine]
        big = _bordered(big, owner.reshape(rows, columns), patch, _BORDER)
    shown = _shown(big)
    pen = ImageDraw.Draw(shown)
    kept = layout.cell[plan.keep[(layout.crop[plan.keep] == number) & (layout.role[plan.keep] == Role.PATCH)]]
    for cell in kept:
        top, left = int(cell) // columns * patch, int(cell) % columns * patch
        pen.rectangle((left, top, left + patch - 1, top + patch - 1), outline=_EDGE)
    return shown


def _shares(layout: Layout, plan: Plan, number: int, cells: int) -> NDArray[np.float64]:
    """Brightness of each cell: 1 kept, 0.6 merged into another, 0 dropped."""
    shares = np.zeros(cells)
    mine = np.flatnonzero((layout.crop == number) & (layout.role == Role.PATCH))
    if plan.assign is not None:
        shares[layout.cell[mine[plan.assign[mine] >= 0]]] = 0.6
    shares[layout.cell[np.intersect1d(plan.keep, mine)]] = 1.0
    return shares
