"""What a vision tower is made of: enough to rebuild it from an mmproj GGUF's tensors and to feed it pictures.

The exporter writes a ``TowerSpec`` beside the ONNX files, so that nothing has to be asked of the GGUF again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.families.spec_checks import (
    check_blocks,
    check_choice,
    check_epsilon,
    check_flags,
    check_integer,
    check_kind,
    check_numbers,
    check_range,
    check_text,
)

MOST_TILES = 64
"""Crops of one picture that a file may ask for."""
MOST_TOKENS = 16_384
"""Of one picture of any size: what the Hugging Face processors of Qwen-VL allow."""
_MOST_SIDE = 8192
"""Pixels of one crop."""
_MOST_PINPOINTS = 256
_MOST_WINDOW = 256
_MOST_THETA = 1e9

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

    def __post_init__(self) -> None:
        check_choice("projector step", self.kind, get_args(StepKind))
        check_text(f"name of a {self.kind}", self.name, empty=self.kind in get_args(Activation))
        check_flags(self, ("bias", "transposed", "by_channel"), f"{self.kind} {self.name:.80}: ")
        check_epsilon(f"{self.kind} {self.name:.80}: eps", self.eps)


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

    def __post_init__(self) -> None:
        if type(self.theta) not in (int, float) or not 1 < self.theta <= _MOST_THETA:
            raise TokcompError(
                f"base {self.theta!r:.80} of rotary positions is not a number above 1, at most {_MOST_THETA:g}"
            )
        check_flags(self, ("alternating", "adjacent"), "rotary.")


@dataclass(frozen=True)
class Window:
    """Blocks whose patches attend within square windows only.

    ``side``: of a window, in tokens. ``whole``: blocks (from 0) that attend to everything.
    """

    side: int
    whole: tuple[int, ...]

    def __post_init__(self) -> None:
        check_integer("window.side", self.side, 1, _MOST_WINDOW)
        check_kind("window.whole", self.whole, tuple)


@dataclass(frozen=True)
class Deepstack:
    """Features taken after a block on the way, which enter the language model deeper down beside the others."""

    block: int
    projector: tuple[Step, ...]

    def __post_init__(self) -> None:
        _check_projector("deepstack.projector", self.projector)


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

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "longest_edge", "min_tiles", "max_tiles"):
            if (value := getattr(self, name)) is not None and type(value) is not int:
                raise TokcompError(f"limits.{name} {value!r:.80} is not an integer; is the file damaged?")
        check_range("tiles", self.min_tiles, self.max_tiles, 1, MOST_TILES)
        pairs = isinstance(self.pinpoints, tuple) and len(self.pinpoints) <= _MOST_PINPOINTS
        if not pairs or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.pinpoints):
            raise TokcompError(f"limits.pinpoints {self.pinpoints!r:.80} are not up to {_MOST_PINPOINTS} pairs")
        for side in (side for pair in self.pinpoints for side in pair):
            check_integer("side of limits.pinpoints", side, 1, MOST_TILES * _MOST_SIDE)


@dataclass(frozen=True)
class TowerSpec:
    """A vision transformer, its projector, and the preprocessing they were trained with.

    ``image_size``, ``patch_size``: pixels; the table of positions is of ``image_size``. ``dynamic``: pictures of any
    size are meant to be fed, not crops of ``image_size`` alone. ``width``: D of a patch. ``blocks``: how many are run;
    the features are the output of the last of them. ``class_token``: row 0 is the CLS row. ``attention_block``: the
    block whose CLS attention methods look at by default (None without a CLS). ``image_mean``, ``image_std``: of the
    three channels, pixels scaled to 0..1.

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
        self._check_fields()
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
        if (self.attention_block is None) == self.class_token:
            raise TokcompError("a CLS attention block goes with a class token, and only with one")
        if self.attention_block is not None:
            check_integer("attention_block", self.attention_block, 0, self.blocks - 1)
        check_blocks("deepstack block", [stack.block for stack in self.deepstack], self.blocks)
        check_blocks("whole block", self.window.whole if self.window else (), self.blocks)
        if self.class_token and (self.window or self.rotary):
            raise TokcompError("a CLS row has no place in windows or rotary positions")
        self._check_limits()

    def _check_fields(self) -> None:
        """Each for itself."""
        for name, most in _LARGEST.items():
            check_integer(name, getattr(self, name), 1, most)
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        check_flags(self, _FLAGS)
        check_text("family", self.family)
        check_text("last_norm", self.last_norm)
        check_text("separator", self.separator, empty=True)
        check_epsilon("layer norm epsilon", self.eps)
        check_numbers("image_mean", self.image_mean, -10, 10)
        check_numbers("image_std", self.image_std, 1e-3, 1e3)
        _check_projector("projector", self.projector)
        check_kind("deepstack", self.deepstack, tuple)
        for stack in self.deepstack:
            check_kind("deepstack", stack, Deepstack)
        for name, kind in (("rotary", Rotary), ("window", Window)):
            if getattr(self, name) is not None:
                check_kind(name, getattr(self, name), kind)
        check_kind("limits", self.limits, Limits)

    def _check_limits(self) -> None:
        """Pictures that nobody means are refused before memory is taken."""
        limits = self.limits
        most = min(MOST_TOKENS * self.unit**2, _MOST_SIDE**2)
        check_range("pixels", limits.min_pixels, limits.max_pixels, self.unit**2, most)
        if limits.longest_edge is not None:
            check_integer("limits.longest_edge", limits.longest_edge, 1, _MOST_SIDE)
            side = self.unit if self.dynamic else self.image_size
            parts, (name, allowed) = (-(-limits.longest_edge // side)) ** 2, _PARTS[self.dynamic]
            if parts > allowed:
                raise TokcompError(
                    f"a longest edge of {limits.longest_edge} pixels makes up to {parts} {name} of {side} pixels a "
                    f"side, {allowed} are possible; is the file damaged?"
                )
        for pair in limits.pinpoints:
            if pair[0] % self.image_size or pair[1] % self.image_size:
                raise TokcompError(
                    f"pinpoint {pair} is not height and width of whole tiles of {self.image_size} pixels"
                )
            if pair[0] * pair[1] > MOST_TILES * self.image_size**2:
                raise TokcompError(f"pinpoint {pair} asks for more than {MOST_TILES} tiles of {self.image_size} pixels")

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

    def block(self, number: int | None) -> int:
        """The block of that number, counted from the last where it is negative; for None the one whose attention
        methods look at by default: ``attention_block``, without a CLS the last.

        Raises ``UsageError`` for one that is not run.
        """
        if number is None:
            return self.blocks - 1 if self.attention_block is None else self.attention_block
        if not -self.blocks <= number < self.blocks:
            raise UsageError(
                f"block {number}: this tower runs {self.blocks} blocks, 0 to {self.blocks - 1}, or -{self.blocks} to "
                "-1 counted from the last"
            )
        return number % self.blocks

    @property
    def window_patches(self) -> int | None:
        """Patches a side of a window, None where attention is not windowed."""
        return None if self.window is None else self.window.side * self.merge

    @property
    def whole_blocks(self) -> Collection[int]:
        """Blocks whose patches attend to all others."""
        return range(self.blocks) if self.window is None else self.window.whole

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
            raise TokcompError(f"not a tower description ({fault!r:.200}); export the tower again") from fault


_LARGEST = {
    "image_size": _MOST_SIDE,
    "patch_size": _MOST_SIDE,
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

_FLAGS = (
    "class_token", "dynamic", "patch_bias", "pre_norm", "post_norm", "bias", "qkv_bias", "gated", "qk_norm",
    "layer_scale", "pool",
)  # fmt: skip
_PARTS = {False: ("tiles", MOST_TILES), True: ("tokens", MOST_TOKENS)}

_T = TypeVar("_T")


def _check_projector(name: str, steps: Any) -> None:
    """Raise ``TokcompError`` unless ``steps`` lead somewhere."""
    check_kind(name, steps, tuple)
    for step in steps:
        check_kind(name, step, Step)
    if not any(step.kind == "linear" for step in steps):
        raise TokcompError(f"{name}: without a linear step it leads to no language model")


def _steps(values: Any) -> tuple[Step, ...]:
    return tuple(Step(**step) for step in values)


def _made(kind: type[_T], values: Mapping[str, Any] | None) -> _T | None:
    return None if values is None else kind(**values)
