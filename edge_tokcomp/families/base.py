"""What a family of vision-language models is: preprocessing, layout, marker text and the tower's recipe.

``TowerSpec`` describes a vision transformer completely enough to rebuild it from an mmproj GGUF's tensors and to feed
it pictures; the exporter writes it beside the ONNX files, so that nothing has to be asked of the GGUF again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.tokens import Layout

Metadata = Mapping[str, Any]
"""A GGUF's key-value pairs as plain Python values."""

Activation = Literal["quick_gelu", "gelu", "silu"]
Projector = Literal["mlp"]


@dataclass(frozen=True)
class TowerSpec:
    """A vision transformer and the preprocessing it was trained with.

    ``image_size``, ``patch_size``: pixels. ``width``: D. ``blocks``: how many are run; the features are the output of
    the last of them. ``class_token``: row 0 is the CLS row. ``attention_block``: the block whose CLS attention is an
    output (None without a CLS). ``patch_bias``, ``pre_norm``: whether the patch embedding has a bias and whether a
    LayerNorm stands before the first block. ``projector_prefixes``: the projector's tensors, in order. ``image_mean``,
    ``image_std``: of the three channels, pixels scaled to 0..1.

    Raises ``TokcompError`` when the values cannot describe a tower: they come from files.
    """

    family: str
    image_size: int
    patch_size: int
    width: int
    heads: int
    ffn_width: int
    blocks: int
    activation: Activation
    eps: float
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    projector: Projector
    projector_prefixes: tuple[str, ...]
    class_token: bool
    attention_block: int | None
    patch_bias: bool = False
    pre_norm: bool = False

    def __post_init__(self) -> None:
        for name, most in _LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise TokcompError(f"{name} {value!r} is not an integer within 1..{most}; is the file damaged?")
        if self.patch_size > self.image_size:
            raise TokcompError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")
        if self.width % self.heads:
            raise TokcompError(f"width {self.width} is not a multiple of its {self.heads} heads")
        if self.activation not in get_args(Activation):
            raise TokcompError(f"activation {self.activation!r} is none of {', '.join(get_args(Activation))}")
        if self.projector not in get_args(Projector):
            raise TokcompError(f"projector {self.projector!r} is none of {', '.join(get_args(Projector))}")
        if not 0 < self.eps < 1:
            raise TokcompError(f"layer norm epsilon {self.eps!r} is not within 0..1")
        if len(self.image_mean) != 3 or not all(map(math.isfinite, self.image_mean)):
            raise TokcompError(f"image_mean {self.image_mean!r} is not three finite numbers")
        if len(self.image_std) != 3 or not all(math.isfinite(s) and s > 0 for s in self.image_std):
            raise TokcompError(f"image_std {self.image_std!r} is not three positive numbers")
        if (self.attention_block is None) == self.class_token:
            raise TokcompError("a CLS attention block goes with a class token, and only with one")
        if self.attention_block is not None and not 0 <= self.attention_block < self.blocks:
            raise TokcompError(f"attention_block {self.attention_block} is not within 0..{self.blocks - 1}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns of one crop; a remainder of the picture is left out."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def patches(self) -> int:
        """N, the patches of one crop."""
        return self.grid[0] * self.grid[1]

    @property
    def rows(self) -> int:
        """Rows the tower returns for one crop: N, and 1 for the CLS."""
        return self.patches + self.class_token

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TowerSpec:
        """The reverse of ``to_dict``; raises ``TokcompError`` for missing, unknown or impossible values."""
        try:
            lists = {name: tuple(values[name]) for name in ("image_mean", "image_std", "projector_prefixes")}
            return cls(**{**values, **lists})
        except (KeyError, TypeError) as fault:
            raise TokcompError(f"not a tower description ({fault}); export the tower again") from fault


_LARGEST = {
    "image_size": 8192,
    "patch_size": 8192,
    "width": 65_536,
    "heads": 4096,
    "ffn_width": 1 << 20,
    "blocks": 1024,
}


@dataclass(frozen=True, eq=False)
class Pixels:
    """One picture made ready for the tower.

    ``crops (C, 3, H, W) float32``: normalised. ``grids``: patch rows and columns of each crop.
    """

    crops: NDArray[np.float32]
    grids: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if self.crops.ndim != 4 or self.crops.shape[1] != 3 or self.crops.dtype != np.float32:
            raise ValueError(f"crops must be (C, 3, H, W) float32, got {self.crops.shape} {self.crops.dtype}")
        if len(self.grids) != len(self.crops):
            raise ValueError(f"{len(self.crops)} crops need as many grids, got {len(self.grids)}")


class Family(Protocol):
    """One family of models. Instances hold nothing: what differs between models of a family is in the ``TowerSpec``."""

    @property
    def name(self) -> str:
        """Short and unique; stands in ``TowerSpec.family`` and in records."""

    @property
    def causal(self) -> bool:
        """Whether image rows attend only to what stands before them."""

    def matches(self, metadata: Metadata) -> bool:
        """Whether an mmproj with this metadata belongs to the family."""

    def spec(self, metadata: Metadata, tensor_names: Collection[str]) -> TowerSpec:
        """The tower in an mmproj; raises ``TokcompError`` when the file cannot be of this family."""

    def preprocess(self, image: Image.Image, spec: TowerSpec, grid: tuple[int, int] | None = None) -> Pixels:
        """An RGB picture as the tower wants it, its crops of ``grid`` patches where that is given.

        Raises ``ImageError`` for one that cannot be made to fit.
        """

    def layout(self, pixels: Pixels) -> Layout:
        """Where the rows lie that the tower returns for ``pixels``."""

    def prompt(self, pixels: Pixels) -> tuple[str | int, ...]:
        """What stands in the prompt for the image: marker text, and crop numbers where a crop's rows go."""


def projector_type(metadata: Metadata) -> str:
    """The projector type of an mmproj; empty when it names none.

    It has two spellings. The first LLaVA files have neither, only the flag that they hold a LLaVA projector.
    """
    for key in ("clip.projector_type", "clip.vision.projector_type"):
        if isinstance(metadata.get(key), str) and metadata[key]:
            return str(metadata[key])
    return "mlp" if metadata.get("clip.has_llava_projector") is True else ""


def read_integer(metadata: Metadata, key: str) -> int:
    """An integer of the metadata; raises ``TokcompError`` when it is missing or something else."""
    value = metadata.get(key)
    if type(value) is not int:
        raise TokcompError(
            f"{key} is {'missing' if value is None else f'{value!r}, not an integer'}; convert the model again"
        )
    return value


def read_number(metadata: Metadata, key: str) -> float:
    """A number of the metadata; raises ``TokcompError`` when it is missing or something else."""
    value = metadata.get(key)
    if type(value) not in (int, float):
        raise TokcompError(
            f"{key} is {'missing' if value is None else f'{value!r}, not a number'}; convert the model again"
        )
    return float(value)  # type: ignore[arg-type]


def read_three(metadata: Metadata, key: str) -> tuple[float, float, float]:
    """Three numbers of the metadata; raises ``TokcompError`` when they are missing or something else."""
    value = metadata.get(key)
    if not isinstance(value, list) or len(value) != 3 or not all(type(v) in (int, float) for v in value):
        raise TokcompError(
            f"{key} is {'missing' if value is None else f'{value!r}, not three numbers'}; convert the model again"
        )
    return float(value[0]), float(value[1]), float(value[2])
