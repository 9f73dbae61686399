"""Gemma 3 with vision (4B, 12B, 27B): one crop, 256 tokens, whose rows in the language model see one another.

A picture is stretched to a square of 896 pixels (bilinear) and seen by a SigLIP tower; the mean of each square of four
by four patches becomes a token, normalised and projected. Files hold the norm of the projector with the 1 already added
that transformers adds, and its matrix as ``(in, out)``. Lower resolutions stretch the table of positions, as
transformers' ``interpolate_pos_encoding`` does.

**Text.** The Hugging Face processor writes two line breaks before ``<start_of_image>`` and after ``<end_of_image>``
and tokenizes them with the text around; llama.cpp leaves them out. **Picture.** llama.cpp keeps the proportions and
fills the square up with black, the processor stretches. Both ways the processor's is what the model was trained with.

**Pan and scan**, further crops of long pictures, is off by default in the processor, and is not done here.

**Attention.** Rows of one picture see one another, in a call of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from edge_tokcomp.families.base import (
    Metadata,
    Part,
    Pixels,
    TensorShapes,
    projector_type,
    read_optional_integer,
    vit_values,
)
from edge_tokcomp.families.pictures import BILINEAR, check_picture, normalised, resized
from edge_tokcomp.families.tower_spec import Step, TowerSpec
from edge_tokcomp.tokens import Layout

_MERGE = 4
"""Patches a side of one token. Files say it only where it is another."""


@dataclass(frozen=True)
class Gemma3:
    """See the module's text."""

    name: str = "gemma3"
    models: str = "Gemma 3 4B, 12B and 27B"
    projectors: tuple[str, ...] = ("gemma3",)
    causal: bool = False
    positions: Literal["line", "grid"] = "line"
    markers: tuple[str, ...] = ("<start_of_image>",)
    written: str = "<start_of_image>"

    def matches(self, metadata: Metadata) -> bool:
        return projector_type(metadata) == "gemma3"

    def spec(self, metadata: Metadata, shapes: TensorShapes) -> TowerSpec:
        values = vit_values(metadata, shapes)
        return TowerSpec(
            family=self.name,
            activation="gelu_tanh",
            projector=(
                Step("rms_norm", "mm.soft_emb_norm", bias=False, eps=values["eps"]),
                Step("linear", "mm.input_projection", bias=False, transposed=True),
            ),
            class_token=False,
            attention_block=None,
            post_norm=True,
            merge=read_optional_integer(metadata, "clip.vision.projector.scale_factor", _MERGE),
            pool=True,
            **values,
        )

    def preprocess(self, image: Image.Image, spec: TowerSpec, grid: tuple[int, int] | None = None) -> Pixels:
        check_picture(image)
        height, width = (spec.image_size,) * 2 if grid is None else (side * spec.unit for side in grid)
        crop = normalised(resized(image, height, width, BILINEAR), spec)
        return Pixels((crop,), (grid or spec.grid,), (image.height, image.width))

    def layout(self, pixels: Pixels, spec: TowerSpec) -> Layout:
        return Layout.of_grids(*pixels.grids)

    def prompt(self, pixels: Pixels) -> tuple[Part, ...]:
        return "\n\n<start_of_image>", (0,), "<end_of_image>\n\n"
