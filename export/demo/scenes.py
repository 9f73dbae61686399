"""Scenes whose contents are known: shapes and digit cards on textured backgrounds.

A scene is drawn from a seed. One object lies in each of some cells of a 3 x 3 grid, anywhere inside its cell, so that
places have names. Digits are scikit-learn's 8 x 8 handwriting, split by sample: no digit image of the validation or the
test split is ever drawn in training, and training is tuned on validation alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SIDE = 192
"""Pixels along a scene's edge: 24 patches of 8."""

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "card")
COLORS = {
    "red": (208, 38, 40),
    "orange": (244, 140, 32),
    "yellow": (246, 220, 52),
    "green": (40, 156, 66),
    "blue": (40, 84, 204),
    "purple": (140, 56, 172),
    "white": (244, 244, 244),
}
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
SMALL, LARGE = (14, 24), (34, 58)
"""Diameters in pixels; a small object is at most 3 patches across. Cards are always large: a digit needs room."""

MOST = 6
"""Objects on a scene, at most."""

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Thing:
    """One object: ``x``, ``y`` its centre and ``size`` its diameter in pixels; ``digit`` only on cards."""

    shape: str
    color: str
    x: float
    y: float
    size: float
    cell: int
    digit: int | None = None

    @property
    def small(self) -> bool:
        return self.size <= SMALL[1]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, eq=False)
class Scene:
    """``image (192, 192, 3) uint8`` and what is on it, in reading order.

    ``owner (192, 192) int8``: the index of the thing a pixel shows, -1 for background.
    """

    image: NDArray[np.uint8]
    things: tuple[Thing, ...]
    owner: NDArray[np.int8]


@lru_cache(maxsize=1)
def _digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Handwriting ``(1797, 8, 8)``, ink from 0 to 1, and the digit each sample shows."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8) / 16).astype(np.float32), labels.astype(np.int64)


@lru_cache(maxsize=3)
def _digit_samples(split: Split) -> tuple[NDArray[np.int64], ...]:
    """For each digit, the indices of its samples in the split: test 30 %, validation a seventh of the rest, train."""
    _, labels = _digits()
    order = np.random.default_rng(20260101).permutation(len(labels))
    test = int(0.3 * len(order))
    validation = test + (len(order) - test) // 7
    start, stop = {"test": (0, test), "validation": (test, validation), "train": (validation, len(order))}[split]
    part = np.zeros(len(order), bool)
    part[order[start:stop]] = True
    return tuple(np.flatnonzero((labels == digit) & part) for digit in range(10))


def draw_scene(seed: int | tuple[int, ...], split: Split = "train") -> Scene:
    """The scene of ``seed``: 1 to ``MOST`` objects, digits from ``split``."""
    rng = np.random.default_rng(seed)
    image = _background(rng)
    owner = np.full((SIDE, SIDE), -1, np.int8)
    things = []
    for number, thing in enumerate(_arrange(rng)):
        things.append(_paint(image, owner, number, thing, rng, split))
    return Scene(np.clip(image, 0, 255).astype(np.uint8), tuple(things), owner)


def _arrange(rng: np.random.Generator) -> list[Thing]:
    """Objects in reading order, without overlaps, in cells of their own."""
    count = int(rng.integers(1, MOST + 1))
    shapes, colors = list(SHAPES), list(COLORS)
    if rng.random() < 0.5:  # repeats make counting and comparing mean something
        shapes = list(rng.choice(shapes, size=3, replace=False))
    if rng.random() < 0.5:
        colors = list(rng.choice(colors, size=3, replace=False))
    things: list[Thing] = []
    for cell in sorted(rng.choice(9, size=count, replace=False)):
        shape, color = str(rng.choice(shapes)), str(rng.choice(colors))
        if rng.random() < 0.15:
            shape = "card"
        for _ in range(20):
            low, high = SMALL if shape != "card" and rng.random() < 0.35 else LARGE
            size = float(rng.uniform(max(low, 42) if shape == "card" else low, high))
            x, y = ((rng.uniform(7, 57) + 64 * axis) for axis in (cell % 3, cell // 3))
            x, y = (float(np.clip(value, size / 2 + 1, SIDE - size / 2 - 1)) for value in (x, y))
            if all(max(abs(x - other.x), abs(y - other.y)) > (size + other.size) / 2 + 2 for other in things):
                things.append(Thing(shape, color, x, y, size, int(cell)))
                break
    return things


def _background(rng: np.random.Generator) -> NDArray[np.float32]:
    """A muted, uneven surface: a colour gradient, blotches of noise, and sometimes stripes or checks."""
    base = rng.uniform(50, 175) + rng.normal(0, 14, 3)
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    slope = (np.float32(np.cos(angle)) * ramp[None, :] + np.float32(np.sin(angle)) * ramp[:, None])[..., None]
    image = base.astype(np.float32) + slope * rng.normal(0, 18, 3).astype(np.float32)
    for cells in (6, 24):
        blotch = rng.normal(0, rng.uniform(3, 16), (cells, cells)).astype(np.float32)
        image += _stretch(blotch)[..., None]
    pattern = rng.random()
    if pattern < 0.5:
        period, phase = rng.uniform(8, 40), rng.uniform(0, 6)
        turn = rng.uniform(0, np.pi)
        wave = _wave(turn, period, phase)
        if pattern < 0.2:
            wave = wave * _wave(turn + np.pi / 2, period, phase)
        image += (np.sign(wave) if rng.random() < 0.5 else wave)[..., None] * np.float32(rng.uniform(4, 16))
    image += rng.standard_normal((SIDE, SIDE, 1), np.float32) * np.float32(rng.uniform(2, 8))
    return image


def _wave(turn: float, period: float, phase: float) -> NDArray[np.float32]:
    """A plane sine wave, from the sines and cosines of its two axes."""
    steps = np.arange(SIDE) * (2 * np.pi / period)
    x, y = np.cos(turn) * steps[None, :] + phase, np.sin(turn) * steps[:, None]
    return np.asarray(np.sin(x) * np.cos(y) + np.cos(x) * np.sin(y), np.float32)


def _stretch(grid: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bilinear blow-up of a small square grid to the scene's size."""
    at = np.linspace(0, len(grid) - 1, SIDE, dtype=np.float32)
    low = np.minimum(at.astype(int), len(grid) - 2)
    part = (at - low).astype(np.float32)
    rows = grid[low] * (1 - part[:, None]) + grid[low + 1] * part[:, None]
    return np.asarray(rows[:, low] * (1 - part) + rows[:, low + 1] * part, np.float32)


def _paint(
    image: NDArray[np.float32],
    owner: NDArray[np.int8],
    number: int,
    thing: Thing,
    rng: np.random.Generator,
    split: Split,
) -> Thing:
    """Draw one object in place, 3 x 3 samples a pixel; returns it with its digit."""
    half = thing.size / 2
    left, top = int(thing.x - half) - 1, int(thing.y - half) - 1
    right, bottom = min(SIDE, int(thing.x + half) + 3), min(SIDE, int(thing.y + half) + 3)
    left, top = max(0, left), max(0, top)
    fine = (np.arange(3) + 0.5) / 3
    xs = ((np.arange(left, right)[:, None] + fine).reshape(-1) - thing.x) / half
    ys = ((np.arange(top, bottom)[:, None] + fine).reshape(-1) - thing.y) / half
    turn = 0.0 if thing.shape == "card" else rng.uniform(-0.22, 0.22)
    u = np.cos(turn) * xs[None, :] + np.sin(turn) * ys[:, None]
    v = -np.sin(turn) * xs[None, :] + np.cos(turn) * ys[:, None]
    u, v = np.asarray(u, np.float32), np.asarray(v, np.float32)
    cover = _average(_inside(thing.shape, u, v))[..., None]
    color = np.array(COLORS[thing.color], np.float32) + rng.normal(0, 9, 3).astype(np.float32)
    region = image[top:bottom, left:right]
    paint: NDArray[np.float32]
    shade = 1 + rng.uniform(-0.12, 0.12) * np.linspace(-1, 1, bottom - top, dtype=np.float32)[:, None, None]
    grain = rng.standard_normal((*region.shape[:2], 1), np.float32)
    paint = np.broadcast_to(color * shade, region.shape) + 3 * grain
    digit = None
    if thing.shape == "card":
        digit = int(rng.integers(10))
        panel = _average((np.abs(u) < 0.78) & (np.abs(v) < 0.78))[..., None]
        ink = _handwriting(digit, split, u[1::3, 1::3], v[1::3, 1::3], rng)[..., None]
        paper = rng.uniform(222, 240) * (1 - ink) + rng.uniform(10, 50) * ink
        paint = np.asarray(paint * (1 - panel) + paper * panel, np.float32)
    image[top:bottom, left:right] = region * (1 - cover) + paint * cover
    owner[top:bottom, left:right][cover[..., 0] > 0.5] = number
    return Thing(thing.shape, thing.color, thing.x, thing.y, thing.size, thing.cell, digit)


def _average(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    rows, columns = mask.shape
    return np.asarray(mask.reshape(rows // 3, 3, columns // 3, 3).mean((1, 3)), np.float32)


def _inside(shape: str, u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which points of the square [-1, 1] x [-1, 1] (v downwards) belong to a shape."""
    if shape == "circle":
        return u * u + v * v < 0.94
    if shape == "ring":
        radius = u * u + v * v
        return (radius < 0.96) & (radius > 0.27)
    if shape == "square":
        return (np.abs(u) < 0.82) & (np.abs(v) < 0.82)
    if shape == "card":
        return (np.abs(u) < 0.98) & (np.abs(v) < 0.98)
    if shape == "triangle":
        return (v < 0.78) & (v > 2 * np.abs(u) - 0.98)
    if shape == "cross":
        return ((np.abs(u) < 0.32) & (np.abs(v) < 0.95)) | ((np.abs(v) < 0.32) & (np.abs(u) < 0.95))
    if shape == "star":
        angle = np.arctan2(u, -v)  # one point upwards
        wedge = np.abs(np.mod(angle + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
        radius = np.hypot(u, v)
        outer, inner = 1.0, 0.42  # the edge from a tip to the next notch, as a line in polar form
        tip, notch = np.array([outer, 0.0]), inner * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
        edge = notch - tip
        x, y = radius * np.cos(wedge) - tip[0], radius * np.sin(wedge) - tip[1]
        return np.asarray(edge[0] * y - edge[1] * x > 0)
    raise ValueError(f"no such shape: {shape}")


def _handwriting(
    digit: int, split: Split, u: NDArray[np.float32], v: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Ink of a random sample of ``digit``, slightly turned, scaled and moved, at the pixels ``(u, v)``.

    In training it is bent as well: the train split has some 108 samples a digit, few enough to be learnt by heart.
    """
    images, _ = _digits()
    glyph = np.pad(images[rng.choice(_digit_samples(split)[digit])], 1)
    turn, scale = rng.uniform(-0.15, 0.15), rng.uniform(0.58, 0.74)
    right, down = u - rng.uniform(-0.06, 0.06), v - rng.uniform(-0.06, 0.06)
    x = (np.cos(turn) * right + np.sin(turn) * down) / scale * 4
    y = (-np.sin(turn) * right + np.cos(turn) * down) / scale * 4
    gain = 1.4
    if split == "train":
        x, y, gain = _bend(x, y, rng.spawn(1)[0])  # a stream of its own: the rest of the scene stays what it was
    x, y = np.clip(x + 4.5, 0, 8.999), np.clip(y + 4.5, 0, 8.999)
    column, row = x.astype(int), y.astype(int)
    a, b = x - column, y - row
    ink = (glyph[row, column] * (1 - a) + glyph[row, column + 1] * a) * (1 - b) + (
        glyph[row + 1, column] * (1 - a) + glyph[row + 1, column + 1] * a
    ) * b
    return np.asarray(np.clip(ink * gain, 0, 1), np.float32)


def _bend(
    x: NDArray[np.float32], y: NDArray[np.float32], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    """Another hand for the same digit: glyph coordinates turned, slanted, stretched and waved; and the ink's gain."""
    turn, slant = rng.uniform(-0.15, 0.15), rng.uniform(-0.2, 0.2)
    wide, high = np.exp(rng.uniform(-0.15, 0.15, 2))
    u = (np.cos(turn) * x + np.sin(turn) * y) * wide
    v = (-np.sin(turn) * x + np.cos(turn) * y) * high
    u = u + slant * v
    waves, phases = rng.uniform(0.3, 0.9, 4), rng.uniform(0, 2 * np.pi, 4)
    strength = rng.uniform(0, 0.35)
    u, v = (
        u + strength * (np.sin(waves[0] * v + phases[0]) + 0.5 * np.sin(waves[1] * u + phases[1])),
        v + strength * (np.sin(waves[2] * u + phases[2]) + 0.5 * np.sin(waves[3] * v + phases[3])),
    )
    return u, v, float(rng.uniform(1.0, 2.0))
