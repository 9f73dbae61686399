"""Pixtral 12B, Mistral Small 3.1 and 3.2 and their kin: pictures of any size as one crop, a break after every row.

A picture that is too long is made smaller in proportion, and every picture stretched (bicubic) to whole patches, or for
Mistral to whole squares of them. How long it may be is the ``longest_edge`` of the checkpoints' processors, which files
lack; it equals ``image_size`` in all that are published (1024 for Pixtral, 1540 for Mistral Small 3).

**Tower.** Rotary positions, every other frequency by row and by column; queries and keys lie in the file with rotated
pairs side by side (in a Hugging Face checkpoint in halves, see ``HALVES``). Mistral joins squares of patches by a
matrix over torch's ``unfold``: channel by channel.

**Text.** Between rows of tokens stands the embedding of ``[IMG_BREAK]``, of which the projector's file has a copy, and
``[IMG_END]`` after the last, which is read with the text that follows.

llama.cpp sizes pictures otherwise: to 8 to 1024 tokens without breaks (since a GPU ran out of memory, issue 14310 of
ggml-org/llama.cpp), so it makes small ones larger and large ones much smaller than the models were trained on; it
rounds sides to the nearest multiple instead of up, and fills up with black instead of stretching.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from edge_tokcomp.errors import ImageError, TokcompError
from edge_tokcomp.families.base import (
    Metadata,
    Part,
    Pixels,
    TensorShapes,
    projector_type,
    read_number,
    read_optional_integer,
    vit_values,
)
from edge_tokcomp.families.pictures import BICUBIC, check_picture, normalised, resized
from edge_tokcomp.families.tower_spec import Limits, Rotary, Step, TowerSpec
from edge_tokcomp.tokens import Layout, Role

_THETA = 10_000.0
"""Base of the rotary positions of all published checkpoints, which only some files name."""
HALVES = "edge_tokcomp.rotary_halves"
"""Ours, true of a source whose queries and keys lie with the two halves of rotated pairs half a head apart."""


@dataclass(frozen=True)
class Pixtral:
    """See the module's text."""

    name: str = "pixtral"
    models: str = "Pixtral 12B, Mistral Small 3.1 and 3.2"
    projectors: tuple[str, ...] = ("pixtral",)
    causal: bool = True
    positions: Literal["line", "grid"] = "line"
    markers: tuple[str, ...] = ("[IMG]",)
    written: str = "[IMG]"

    def matches(self, metadata: Metadata) -> bool:
        return projector_type(metadata) == "pixtral"

    def spec(self, metadata: Metadata, shapes: TensorShapes) -> TowerSpec:
        values, base = vit_values(metadata, shapes), "clip.rope.freq_base"
        merge = read_optional_integer(metadata, "clip.vision.spatial_merge_size", 1)
        joins = merge > 1 or "mm.patch_merger.weight" in shapes
        first = (Step("linear", "mm.patch_merger", bias=False, by_channel=True),) if joins else ()
        return TowerSpec(
            family=self.name,
            activation="gelu" if metadata.get("clip.use_gelu") is True else "silu",
            projector=(
                *first,
                Step("linear", "mm.1", bias="mm.1.bias" in shapes),
                Step("gelu"),
                Step("linear", "mm.2", bias="mm.2.bias" in shapes),
            ),
            class_token=False,
            attention_block=None,
            dynamic=True,
            norm="rms",
            pre_norm=True,
            post_norm=joins,
            last_norm="mm.input_norm",
            bias=False,
            gated=True,
            positions=None,
            rotary=Rotary(
                read_number(metadata, base) if base in metadata else _THETA,
                alternating=True,
                adjacent=metadata.get(HALVES) is not True,
            ),
            merge=merge,
            separator="v.token_embd.img_break",
            limits=Limits(longest_edge=values["image_size"]),
            **values,
        )

    def preprocess(self, image: Image.Image, spec: TowerSpec, grid: tuple[int, int] | None = None) -> Pixels:
        check_picture(image)
        rows, columns = grid or _tokens(image.height, image.width, spec)
        crop = normalised(resized(image, rows * spec.unit, columns * spec.unit, BICUBIC), spec)
        return Pixels((crop,), ((rows, columns),), (image.height, image.width))

    def layout(self, pixels: Pixels, spec: TowerSpec) -> Layout:
        ((rows, columns),) = pixels.grids
        cell = np.full((rows, columns + 1), -1, np.int64)
        cell[:, :-1] = np.arange(rows * columns).reshape(rows, columns)
        cell = cell.ravel()[:-1]
        role = np.where(cell < 0, Role.SEPARATOR, Role.PATCH).astype(np.int8)
        return Layout(pixels.grids, np.zeros(len(cell), np.int64), cell, role)

    def prompt(self, pixels: Pixels) -> tuple[Part, ...]:
        return (0,), "[IMG_END]"


def _tokens(height: int, width: int, spec: TowerSpec) -> tuple[int, int]:
    """Rows and columns of tokens of a picture; raises ``ImageError`` for one that would be left without."""
    if spec.limits.longest_edge is None:
        raise TokcompError("the tower's description is without a longest edge; export the tower again")
    ratio = max(height, width) / spec.limits.longest_edge
    tall, wide = (math.floor(side / ratio) if ratio > 1 else side for side in (height, width))
    if min(tall, wide) < 1:
        raise ImageError(
            f"picture of {width}x{height} pixels: one side may be at most {spec.limits.longest_edge} times the other; "
            "cut it"
        )
    return -(-tall // spec.unit), -(-wide // spec.unit)
