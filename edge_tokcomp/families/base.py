"""What a family of vision-language models is: preprocessing, layout, marker text and the tower's recipe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.families.tower_spec import TowerSpec
from edge_tokcomp.tokens import Layout

Metadata = Mapping[str, Any]
"""A GGUF's key-value pairs as plain Python values."""

TensorShapes = Mapping[str, tuple[int, ...]]
"""A GGUF's tensors by name: their shapes, slowest axis first."""


@dataclass(frozen=True)
class Tokens:
    """Text around or between crops, given as the language model's token ids."""

    ids: tuple[int, ...]


Part = str | Tokens | tuple[int, ...]
"""Text around or between the crops of a picture, or the crops whose rows stand here, in the layout's order."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """One picture made ready for the tower.

    ``crops``: each ``(3, H, W) float32``, normalised. ``grids``: rows and columns of tokens of each crop. ``tiles``:
    rows and columns of crops that make up the picture, where it was cut. ``size``: height and width of the picture.
    """

    crops: tuple[NDArray[np.float32], ...]
    grids: tuple[tuple[int, int], ...]
    size: tuple[int, int]
    tiles: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for crop in self.crops:
            if crop.ndim != 3 or crop.shape[0] != 3 or crop.dtype != np.float32:
                raise ValueError(f"crops must be (3, H, W) float32, got {crop.shape} {crop.dtype}")
        if len(self.grids) != len(self.crops):
            raise ValueError(f"{len(self.crops)} crops need as many grids, got {len(self.grids)}")


class Family(Protocol):
    """One family of models. Instances hold nothing: what differs between models of a family is in the ``TowerSpec``."""

    @property
    def name(self) -> str:
        """Short and unique; stands in ``TowerSpec.family`` and in records."""

    @property
    def models(self) -> str:
        """The models it serves, as people call them."""

    @property
    def projectors(self) -> tuple[str, ...]:
        """The projector types its files name."""

    @property
    def causal(self) -> bool:
        """Whether image rows attend only to what stands before them."""

    @property
    def positions(self) -> Literal["line", "grid"]:
        """Whether rows are counted on as text is, or lie at their row and column of the one crop (M-RoPE)."""

    @property
    def markers(self) -> tuple[str, ...]:
        """What chat templates of the family write for an image."""

    @property
    def written(self) -> str:
        """What is put into the text for an image where a template takes none; the first marker stands within."""

    def matches(self, metadata: Metadata) -> bool:
        """Whether an mmproj with this metadata belongs to the family."""

    def spec(self, metadata: Metadata, shapes: TensorShapes) -> TowerSpec:
        """The tower in an mmproj of tensors of such ``shapes``.

        Raises ``TokcompError`` when the file cannot be of this family, ``UnsupportedError`` for a variant of it that is
        not built here.
        """

    def preprocess(self, image: Image.Image, spec: TowerSpec, grid: tuple[int, int] | None = None) -> Pixels:
        """An RGB picture as the tower wants it, its crops of ``grid`` tokens where that is given.

        Raises ``ImageError`` for one that cannot be made to fit, ``UsageError`` for a ``grid`` where the family sizes
        pictures itself.
        """

    def layout(self, pixels: Pixels, spec: TowerSpec) -> Layout:
        """Where the rows lie that the tower returns for ``pixels``, in the order in which they are fed."""

    def prompt(self, pixels: Pixels) -> tuple[Part, ...]:
        """What stands in the prompt for the image."""


def projector_type(metadata: Metadata) -> str:
    """The projector type of an mmproj; empty when it names none.

    It has two spellings. The first LLaVA files have neither, only the flag that they hold a LLaVA projector.
    """
    for key in ("clip.projector_type", "clip.vision.projector_type"):
        if isinstance(metadata.get(key), str) and metadata[key]:
            return str(metadata[key])
    return "mlp" if metadata.get("clip.has_llava_projector") is True else ""


def read_integer(metadata: Metadata, key: str) -> int:
    """An integer of the metadata, all of which are 1 or more; raises ``TokcompError`` when it is something else."""
    value = metadata.get(key)
    if type(value) is not int:
        raise _fault(key, value, "an integer")
    if value < 1:
        raise TokcompError(f"{key} {value} is not possible, 1 or more is; convert the model again")
    return value


def read_optional_integer(metadata: Metadata, key: str, default: int) -> int:
    """``read_integer`` where the metadata has the key, else ``default``."""
    return read_integer(metadata, key) if key in metadata else default


def first_side(shapes: TensorShapes, name: str) -> int:
    """Length of a tensor's slowest axis, 0 where there is none."""
    return (shapes.get(name) or (0,))[0]


def vit_values(metadata: Metadata, shapes: TensorShapes, without: Collection[str] = ()) -> dict[str, Any]:
    """What most recipes read alike, by the names of ``TowerSpec``, but for those a family knows better.

    Raises ``TokcompError`` for what is missing or of another type.
    """
    vision = "clip.vision."
    readers: dict[str, Callable[[], Any]] = {
        "image_size": lambda: read_integer(metadata, f"{vision}image_size"),
        "patch_size": lambda: read_integer(metadata, f"{vision}patch_size"),
        "width": lambda: read_integer(metadata, f"{vision}embedding_length"),
        "heads": lambda: read_integer(metadata, f"{vision}attention.head_count"),
        "ffn_width": lambda: read_integer(metadata, f"{vision}feed_forward_length"),
        "blocks": lambda: read_blocks(metadata, shapes),
        "eps": lambda: read_number(metadata, f"{vision}attention.layer_norm_epsilon"),
        "image_mean": lambda: read_three(metadata, f"{vision}image_mean"),
        "image_std": lambda: read_three(metadata, f"{vision}image_std"),
        "patch_bias": lambda: "v.patch_embd.bias" in shapes,
    }
    return {name: read() for name, read in readers.items() if name not in without}


def read_blocks(metadata: Metadata, shapes: TensorShapes) -> int:
    """``block_count``; raises ``TokcompError`` unless the file holds that many blocks."""
    blocks = read_integer(metadata, "clip.vision.block_count")
    check_blocks(blocks, shapes)
    return blocks


def check_blocks(blocks: int, shapes: TensorShapes) -> None:
    """Raise ``TokcompError`` unless the file holds blocks 0 to ``blocks - 1``."""
    present = sum(f"v.blk.{n}.ln1.weight" in shapes for n in range(min(blocks, len(shapes))))
    if blocks != present:
        raise TokcompError(f"features come after {blocks} blocks, the file holds {present}; convert the model again")


def read_number(metadata: Metadata, key: str) -> float:
    """A number of the metadata; raises ``TokcompError`` when it is missing or something else."""
    value = metadata.get(key)
    if type(value) is not int and type(value) is not float:
        raise _fault(key, value, "a number")
    return float(value)


def read_three(metadata: Metadata, key: str) -> tuple[float, float, float]:
    """Three numbers of the metadata; raises ``TokcompError`` when they are missing or something else."""
    value = metadata.get(key)
    if not isinstance(value, list) or len(value) != 3 or not all(type(v) in (int, float) for v in value):
        raise _fault(key, value, "three numbers")
    return float(value[0]), float(value[1]), float(value[2])


def _fault(key: str, value: Any, kind: str) -> TokcompError:
    found = "missing" if value is None else f"{value!r:.80}, not {kind}"
    return TokcompError(f"{key} is {found}; convert the model again")
