"""A pool of drawn scenes on disk, read through a memory map: drawing costs more than a small training step can wait.

A part is three files: ``NNN.images.npy``, ``NNN.owners.npy`` and, written last, ``NNN.json`` with the scenes' things.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.errors import TokcompError

from .model import GRID, PATCH
from .scenes import SIDE, Scene, Thing, draw_scene

DRAWING = 2
"""Raise it whenever ``draw_part`` would write something else: pools drawn before are then refused."""

TRAIN_SEED = 1
PARTS, PART_SCENES = 20, 4000
"""Size of the pool the bundled model was trained on."""

COVER = 0.3
"""A patch belongs to the thing that covers this share of it."""


def patch_owner(scene: Scene) -> NDArray[np.int8]:
    """``(576,) int8``: the thing that owns each patch, -1 for background."""
    patches = scene.owner.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    cover = np.stack([(patches == number).mean(1) for number in range(len(scene.things))])
    best = cover.argmax(0)
    return np.where(cover.max(0) >= COVER, best, -1).astype(np.int8)


def draw_pool(folder: Path, processes: int, parts: int = PARTS, scenes: int = PART_SCENES) -> None:
    """Draw all parts of the pool that are not there yet; ``TokcompError`` if one is of another drawing version."""
    missing = []
    for part in range(parts):
        done = folder / f"{part:03d}.json"
        if done.exists():
            _read_things(done)
        else:
            missing.append(part)
    if not missing:
        return
    with multiprocessing.get_context("spawn").Pool(processes) as workers:
        workers.starmap(draw_part, [(folder, part, scenes) for part in missing], chunksize=1)


def draw_part(folder: Path, part: int, scenes: int) -> None:
    """Draw scenes ``part * scenes .. (part + 1) * scenes - 1`` into a part of the pool."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.lib.format.open_memmap(folder / f"{part:03d}.images.npy", "w+", np.uint8, (scenes, SIDE, SIDE, 3))
    owners = np.zeros((scenes, GRID * GRID), np.int8)
    things = []
    for index in range(scenes):
        scene = draw_scene((TRAIN_SEED, part * scenes + index))
        images[index], owners[index] = scene.image, patch_owner(scene)
        things.append([asdict(thing) for thing in scene.things])
    images.flush()
    np.save(folder / f"{part:03d}.owners.npy", owners)
    partial = folder / f"{part:03d}.partial"
    partial.write_text(json.dumps({"drawing": DRAWING, "things": things}))
    os.replace(partial, folder / f"{part:03d}.json")


def _read_things(done: Path) -> list[list[dict[str, Any]]]:
    content = json.loads(done.read_text())
    drawing = content.get("drawing") if isinstance(content, dict) else None
    if drawing != DRAWING:
        version = "no drawing version" if drawing is None else f"drawing version {drawing}"
        raise TokcompError(
            f"{done} has {version}, this code draws version {DRAWING}: delete {done.parent} to draw it anew"
        )
    things: list[list[dict[str, Any]]] = content["things"]
    return things


class Pool:
    """The finished parts of a pool, as one sequence of scenes; ``TokcompError`` for another drawing version's."""

    def __init__(self, folder: Path) -> None:
        self.images: list[NDArray[np.uint8]] = []
        self.owners: list[NDArray[np.int8]] = []
        self.things: list[tuple[Thing, ...]] = []
        self.ends: list[int] = []
        for done in sorted(folder.glob("*.json")):
            self.things += [tuple(Thing(**thing) for thing in scene) for scene in _read_things(done)]
            self.images.append(np.load(done.with_suffix(".images.npy"), mmap_mode="r"))
            self.owners.append(np.load(done.with_suffix(".owners.npy")))
            self.ends.append(len(self.things))

    def __len__(self) -> int:
        return len(self.things)

    def batch(self, indices: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.int8], list[tuple[Thing, ...]]]:
        """``images (B, 192, 192, 3) uint8``, ``owners (B, 576) int8``, things of each."""
        parts = np.searchsorted(self.ends, indices, side="right")
        starts = [0, *self.ends]
        images = [self.images[part][index - starts[part]] for part, index in zip(parts, indices, strict=True)]
        owners = [self.owners[part][index - starts[part]] for part, index in zip(parts, indices, strict=True)]
        return np.stack(images), np.stack(owners), [self.things[index] for index in indices]
