"""What a vision tower is made of: enough to rebuild it from an mmproj GGUF's tensors and to feed it pictures.

The exporter writes a ``TowerSpec`` beside the ONNX files, so that nothing has to be asked of the GGUF again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from edge_tokcomp.errors import TokcompError

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]
"""``gelu`` is the exact one, ``gelu_tanh`` its usual approximation, ``quick_gelu`` ``x * sigmoid(1.702 x)``."""

Norm = Literal["layer", "rms"]

Stretch = Literal["bicubic", "bilinear", "corners"]
"""How a table of positions is stretched to another grid: Keys' bicubic with a = -0.75 and bilinear with antialiasing,
pixel centres at halves; ``corners``: bilinear, the corners of both grids in the same places."""

StepKind = Literal["linear", "layer_norm", "rms_norm", "quick_gelu", "gelu", "gelu_tanh", "silu"]


@dataclass(frozen=True)
class Step:
    """One step of a projector: a linear or a norm with the tensors ``NAME.weight`` and, with ``bias``, ``NAME.bias``;
    or an activation. A norm stands for the epsilon ``eps``.

    Of a linear's weight, ``transposed``: the file holds it ``(in, out)``. ``by_channel``: it takes the channels of a
    merged square one by one, each with all patches (torch's ``unfold``), where tokens here have the patches one by one.
    """

    kind: StepKind
    name: str = ""
    bias: bool = True
    eps: float = 1e-5
    transposed: bool = False
    by_channel: bool = False


@dataclass(frozen=True)
class Rotary:
    """Two-dimensional rotary positions: of each head's angles one half turns with the patch row, one with its column.

    ``theta``: base of the frequencies. ``alternating``: rows take the even ones of a head's frequencies and columns the
    odd ones (Pixtral); else both take the even ones (Qwen-VL). ``adjacent``: the file holds query and key channels with
    the two halves of each rotated pair side by side.
    """

    theta: float = 10_000.0
    alternating: bool = False
    adjacent: bool = False


@dataclass(frozen=True)
class Window:
    """Blocks whose patches attend within square windows only.

    ``side``: of a window, in tokens. ``whole``: blocks (from 0) that attend to everything.
    """

    side: int
    whole: tuple[int, ...]


@dataclass(frozen=True)
class Deepstack:
    """Features taken after a block on the way, which enter the language model deeper down beside the others."""

    block: int
    projector: tuple[Step, ...]


@dataclass(frozen=True)
class Limits:
    """What a family makes of pictures of other sizes; ``None`` where it has no such rule.

    ``min_pixels``, ``max_pixels``: of the resized picture. ``longest_edge``: pixels. ``min_tiles``, ``max_tiles``: how
    many crops a picture is cut into. ``pinpoints``: the sizes ``(height, width)`` that crops make up.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    longest_edge: int | None = None
    min_tiles: int | None = None
    max_tiles: int | None = None
    pinpoints: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class TowerSpec:
    """A vision transformer, its projector, and the preprocessing they were trained with.

    ``image_size``, ``patch_size``: pixels; the table of positions is of ``image_size``. ``dynamic``: pictures of any
    size are meant to be fed, not crops of ``image_size`` alone. ``width``: D of a patch. ``blocks``: how many are run;
    the features are the output of the last of them. ``class_token``: row 0 is the CLS row. ``attention_block``: the
    block whose CLS attention is an output (None without a CLS). ``image_mean``, ``image_std``: of the three channels,
    pixels scaled to 0..1.

    ``patch_bias``, ``patch_slices``: of the patch embedding: whether it has a bias, and how many convolutions a still
    picture passes (2 where a model takes pairs of frames). ``pre_norm``, ``post_norm``: norms before the first and
    after the last block, the latter by the name ``last_norm``. ``bias``: whether linears and norms of the blocks have
    them; ``qkv_bias``: queries, keys and values too. ``gated``: of the feed-forward. ``qk_norm``: queries and keys are
    normalised over all heads. ``layer_scale``: what a block adds is scaled. ``positions``: how the learned table is
    stretched, None where there is none.

    ``merge``: each square of so many patches a side becomes one token, their rows end to end in raster order, or their
    mean with ``pool``. The ``projector``'s steps go from a token to language width. ``separator``: the tensor, of
    language width, that stands between rows of tokens.

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
    projector: tuple[Step, ...]
    class_token: bool
    attention_block: int | None
    dynamic: bool = False
    patch_bias: bool = False
    patch_slices: int = 1
    norm: Norm = "layer"
    pre_norm: bool = False
    post_norm: bool = False
    last_norm: str = "v.post_ln"
    bias: bool = True
    qkv_bias: bool = True
    gated: bool = False
    qk_norm: bool = False
    layer_scale: bool = False
    positions: Stretch | None = "bicubic"
    rotary: Rotary | None = None
    window: Window | None = None
    merge: int = 1
    pool: bool = False
    deepstack: tuple[Deepstack, ...] = ()
    separator: str = ""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        for name, most in _LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise TokcompError(f"{name} {value!r} is not an integer within 1..{most}; is the file damaged?")
        if self.unit > self.image_size:
            raise TokcompError(
                f"patch_size {self.patch_size} is larger than image_size {self.image_size}"
                if self.merge == 1
                else f"{self.merge} patches of {self.patch_size} are larger than image_size {self.image_size}"
            )
        if not self.dynamic and self.table_grid[0] % self.merge:
            raise TokcompError(
                f"{self.table_grid[0]} patches a side of image_size {self.image_size} cannot be merged by {self.merge}"
            )
        if self.width % self.heads:
            raise TokcompError(f"width {self.width} is not a multiple of its {self.heads} heads")
        if self.rotary and self.width // self.heads % 4:
            raise TokcompError(f"heads of {self.width // self.heads} channels cannot be rotated by row and column")
        if self.rotary and not 1 < self.rotary.theta < math.inf:
            raise TokcompError(f"base {self.rotary.theta!r} of rotary positions is not a number above 1")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise TokcompError(f"{name} {getattr(self, name)!r} is none of {', '.join(map(str, allowed))}")
        for step in (*self.projector, *(step for stack in self.deepstack for step in stack.projector)):
            if step.kind not in get_args(StepKind):
                raise TokcompError(f"projector step {step.kind!r} is none of {', '.join(get_args(StepKind))}")
        if not any(step.kind == "linear" for step in self.projector):
            raise TokcompError("a projector without a linear step leads to no language model")
        if not 0 < self.eps < 1:
            raise TokcompError(f"layer norm epsilon {self.eps!r} is not within 0..1")
        if len(self.image_mean) != 3 or not all(map(math.isfinite, self.image_mean)):
            raise TokcompError(f"image_mean {self.image_mean!r} is not three finite numbers")
        if len(self.image_std) != 3 or not all(math.isfinite(s) and s > 0 for s in self.image_std):
            raise TokcompError(f"image_std {self.image_std!r} is not three positive numbers")
        if (self.attention_block is None) == self.class_token:
            raise TokcompError("a CLS attention block goes with a class token, and only with one")
        for name, block in (
            ("attention_block", self.attention_block),
            *(("deepstack block", stack.block) for stack in self.deepstack),
            *(("whole block", block) for block in (self.window.whole if self.window else ())),
        ):
            if block is not None and not 0 <= block < self.blocks:
                raise TokcompError(f"{name} {block} is not within 0..{self.blocks - 1}")
        if self.class_token and (self.window or self.rotary):
            raise TokcompError("a CLS row has no place in windows or rotary positions")

    @property
    def unit(self) -> int:
        """Pixels a side of what becomes one token; sides of pictures are multiples of it."""
        return self.patch_size * self.merge

    @property
    def table_grid(self) -> tuple[int, int]:
        """Rows and columns of the table of positions, in patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of one crop of ``image_size``; a remainder of the picture is left out."""
        side = self.image_size // self.unit
        return side, side

    @property
    def patches(self) -> int:
        """N, the tokens of one crop of ``image_size``."""
        return self.grid[0] * self.grid[1]

    @property
    def cls_rows(self) -> int:
        """1 where the tower returns the CLS row before the tokens: it cannot where patches are merged."""
        return int(self.class_token and self.merge == 1)

    @property
    def token_width(self) -> int:
        """Width of a token before the projector."""
        return self.width * (1 if self.pool else self.merge**2)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TowerSpec:
        """The reverse of ``to_dict``; raises ``TokcompError`` for missing, unknown or impossible values."""
        try:
            window, rotary, limits = (values.get(name) for name in ("window", "rotary", "limits"))
            parts: dict[str, Any] = {
                "image_mean": tuple(values["image_mean"]),
                "image_std": tuple(values["image_std"]),
                "projector": _steps(values["projector"]),
                "deepstack": tuple(Deepstack(s["block"], _steps(s["projector"])) for s in values.get("deepstack", ())),
                "rotary": _made(Rotary, rotary),
                "window": _made(Window, window and {**window, "whole": tuple(window["whole"])}),
            }
            if limits is not None:
                sizes = tuple((height, width) for height, width in limits.get("pinpoints", ()))
                parts["limits"] = Limits(**{**limits, "pinpoints": sizes})
            return cls(**{**values, **parts})
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise TokcompError(f"not a tower description ({fault}); export the tower again") from fault


_LARGEST = {
    "image_size": 8192,
    "patch_size": 8192,
    "width": 65_536,
    "heads": 4096,
    "ffn_width": 1 << 20,
    "blocks": 1024,
    "merge": 64,
    "patch_slices": 2,
}
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "activation": get_args(Activation),
    "norm": get_args(Norm),
    "positions": (*get_args(Stretch), None),
}

_T = TypeVar("_T")


def _steps(values: Any) -> tuple[Step, ...]:
    return tuple(Step(**step) for step in values)


def _made(kind: type[_T], values: Mapping[str, Any] | None) -> _T | None:
    return None if values is None else kind(**values)
