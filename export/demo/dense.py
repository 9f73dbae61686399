"""Per-patch supervision of the tower: what each patch shows and where its object lies.

Without it the tower learns to see only through the language model's errors, which takes many times as long. The heads
are dropped after training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .model import GRID, PATCH, DenseHeads
from .scenes import COLORS, SHAPES, SIDE, Thing

WINDOW = 12
"""Patches along the edge of a training window."""

_SHAPE_INDEX = {shape: index for index, shape in enumerate(SHAPES)}
_COLOR_INDEX = {color: index for index, color in enumerate(COLORS)}


@dataclass(frozen=True, eq=False)
class DenseTargets:
    """Per patch ``(B, N)``: ``shape`` (0 is background), ``color``, ``digit`` (-100 where there is none).

    ``box (B, N, 3)``: centre and diameter of the patch's thing as fractions of the scene's edge. ``scene (B, names)``:
    which names are present; ``count (B,)``: how many things.
    """

    shape: Tensor
    color: Tensor
    digit: Tensor
    box: Tensor
    scene: Tensor
    count: Tensor


def pixels_of(images: NDArray[np.uint8]) -> Tensor:
    """``(B, H, W, 3) uint8`` to ``(B, 3, H, W) float32`` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(127.5).sub_(1)


def dense_targets(owners: NDArray[np.int8], things: Sequence[Sequence[Thing]]) -> DenseTargets:
    """Targets of whole scenes; ``owners (B, 576)`` names the thing each patch belongs to."""
    shape = np.zeros(owners.shape, np.int64)
    color, digit = np.full(owners.shape, -100, np.int64), np.full(owners.shape, -100, np.int64)
    box = np.zeros((*owners.shape, 3), np.float32)
    present = np.zeros((len(owners), len(SHAPES) * len(COLORS)), np.float32)
    for row, scene in enumerate(things):
        for number, thing in enumerate(scene):
            mine = owners[row] == number
            shape[row, mine] = 1 + _SHAPE_INDEX[thing.shape]
            color[row, mine] = _COLOR_INDEX[thing.color]
            if thing.digit is not None:
                digit[row, mine] = thing.digit
            box[row, mine] = (thing.x / SIDE, thing.y / SIDE, thing.size / SIDE)
            present[row, _SHAPE_INDEX[thing.shape] * len(COLORS) + _COLOR_INDEX[thing.color]] = 1
    count = np.array([len(scene) for scene in things])
    return DenseTargets(
        torch.from_numpy(shape),
        torch.from_numpy(color),
        torch.from_numpy(digit),
        torch.from_numpy(box),
        torch.from_numpy(present),
        torch.from_numpy(count),
    )


def windows(
    images: NDArray[np.uint8], owners: NDArray[np.int8], things: Sequence[Sequence[Thing]], rng: np.random.Generator
) -> tuple[Tensor, Tensor, DenseTargets]:
    """A window of 12 x 12 patches around one thing of each scene: pixels, ``cells (B, 144)`` and targets."""
    full = dense_targets(owners, things)
    pixels, cells = [], []
    for image, scene in zip(images, things, strict=True):
        thing = scene[int(rng.integers(len(scene)))]
        top, left = (
            int(np.clip(round(at / PATCH - WINDOW / 2 + rng.uniform(-4, 4)), 0, GRID - WINDOW))
            for at in (thing.y, thing.x)
        )
        side = WINDOW * PATCH
        pixels.append(image[top * PATCH : top * PATCH + side, left * PATCH : left * PATCH + side])
        cells.append(((top + np.arange(WINDOW))[:, None] * GRID + left + np.arange(WINDOW)).reshape(-1))
    where = torch.from_numpy(np.stack(cells))
    targets = DenseTargets(
        full.shape.gather(1, where),
        full.color.gather(1, where),
        full.digit.gather(1, where),
        full.box.gather(1, where[..., None].expand(-1, -1, 3)),
        full.scene,
        full.count,
    )
    return pixels_of(np.stack(pixels)), where, targets


def dense_loss(
    heads: DenseHeads, features: Tensor, targets: DenseTargets, *, whole: bool
) -> tuple[Tensor, dict[str, float]]:
    """Loss of ``features (B, 1 + N, width)`` and accuracies; ``whole`` adds the scene-wide targets of CLS.

    Object and background patches are averaged apart: a plain mean drowns the objects.
    """
    patches = features[:, 1:]
    thing = targets.shape > 0
    at_things, card = patches[thing], targets.digit[thing] >= 0
    shape = heads.shape(patches).float()
    error = F.cross_entropy(shape.flatten(0, 1), targets.shape.flatten(), reduction="none").view_as(thing)
    color, digit = heads.color(at_things).float(), heads.digit(at_things[card]).float()
    loss = error[thing].mean() + error[~thing].mean() + F.cross_entropy(color, targets.color[thing])
    if card.any():
        loss = loss + 2 * F.cross_entropy(digit, targets.digit[thing][card])
    loss = loss + 5 * F.l1_loss(heads.box(at_things).float(), targets.box[thing])
    if whole:
        names = heads.scene(features[:, 0]).float()
        loss = loss + 3 * F.binary_cross_entropy_with_logits(names[:, :-7], targets.scene)
        loss = loss + 0.3 * F.cross_entropy(names[:, -7:], targets.count)
    with torch.no_grad():
        seen = {
            "shape": (shape[thing].argmax(-1) == targets.shape[thing]).float().mean().item(),
            "color": (color.argmax(-1) == targets.color[thing]).float().mean().item(),
            "digit": (digit.argmax(-1) == targets.digit[thing][card]).float().mean().item(),
        }
    return loss, seen
