"""The values that travel from picture to text: ``VisionTokens -> Plan -> Rows``.

Arrays and numbers only. This module does not know towers, methods or language models. Arrays may be NumPy arrays or
torch tensors; whatever a method was given it computes on, and index arrays are always NumPy ``int64``.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from .budget import describe
from .errors import TokcompError
from .files import read_npz, write_whole

Array = Any
"""A NumPy array or a torch tensor (array API, through array-api-compat)."""

Ints = NDArray[np.int64]


class Role(enum.IntEnum):
    """What a row of an image is."""

    PATCH = 0
    """A patch (or merged patch) of the picture: what methods choose among."""
    SEPARATOR = 1
    """Newline, row break or tile marker embedding: always kept, never scored."""
    CLS = 2
    """The tower's class token: offered to methods, not part of the uncompressed image."""


class Origin(enum.IntEnum):
    """What a position is counted from."""

    NOTHING = 0
    START = 1
    """The position at which the picture begins, or within it the crop."""
    PICTURE = 2
    """The picture's number in the prompt."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where an image's rows stand in an M-RoPE model, when row and column of a grid do not tell.

    ``at (4, N) int32``: the positions of each row in llama.cpp's order, in a prompt's first picture and a crop that
    starts at 0. ``origin (4, N) int8``: an ``Origin`` each. ``advance``: of each crop how far on the text after it
    stands.
    """

    at: NDArray[np.int32]
    origin: NDArray[np.int8]
    advance: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where every row of one image lies.

    ``grids``: ``(rows, columns)`` of each crop.
    ``crop (N,) int64``: the crop a row belongs to.
    ``cell (N,) int64``: its raster index in that crop's grid, -1 for a row that is no patch.
    ``role (N,) int8``: a ``Role``.
    ``overview``: the crop that is a thumbnail of the whole picture, of which the other crops are parts. Where there is
    none, crops are equals: frames of a video, tiles.
    ``whole``: rows of the uncompressed image, where these are fewer because the tower was run otherwise; else None.
    ``places``: positions, where rows stand neither at their cells nor one behind the other, as text does; else None.
    ``padding``: of the first rows so many are left out that the row behind them comes last in a block of ``padding +
    1`` positions.
    """

    grids: tuple[tuple[int, int], ...]
    crop: Ints
    cell: Ints
    role: NDArray[np.int8]
    overview: int | None = None
    whole: int | None = None
    places: Places | None = None
    padding: int = 0

    def __post_init__(self) -> None:
        if not (self.crop.shape == self.cell.shape == self.role.shape) or self.crop.ndim != 1:
            raise ValueError(
                f"layout arrays must share one axis: crop {self.crop.shape}, cell {self.cell.shape}, "
                f"role {self.role.shape}"
            )
        if len(self.crop) and not (self.crop.min() >= 0 and self.crop.max() < len(self.grids)):
            raise ValueError(f"layout names crop {int(self.crop.max())}, but has {len(self.grids)} grids")
        if self.overview is not None and (type(self.overview) is bool or not 0 <= self.overview < len(self.grids)):
            raise ValueError(f"overview {self.overview} is none of {len(self.grids)} crops")
        cells = np.array([rows * columns for rows, columns in self.grids], dtype=np.int64)
        patch = self.role == Role.PATCH
        if np.any(patch & ((self.cell < 0) | (self.cell >= cells[self.crop]))):
            raise ValueError("layout places a patch outside its crop's grid")

    def __len__(self) -> int:
        return len(self.crop)

    @classmethod
    def of_grids(cls, *grids: tuple[int, int], cls_rows: bool = False, overview: int | None = None) -> Layout:
        """Crops one after another in raster order, each led by its CLS row when ``cls_rows``."""
        crop, cell, role = [], [], []
        for number, (rows, columns) in enumerate(grids):
            if rows < 1 or columns < 1:
                raise ValueError(f"grid {(rows, columns)} has no cells")
            lead = 1 if cls_rows else 0
            crop.append(np.full(lead + rows * columns, number, np.int64))
            cell.append(np.concatenate([np.full(lead, -1, np.int64), np.arange(rows * columns)]))
            role.append(np.concatenate([np.full(lead, Role.CLS, np.int8), np.zeros(rows * columns, np.int8)]))
        return cls(tuple(grids), np.concatenate(crop), np.concatenate(cell), np.concatenate(role), overview)

    @classmethod
    def of_frames(cls, count: int, grid: tuple[int, int], *, cls_rows: bool = False) -> Layout:
        """``count`` frames of a video, in time, each a crop."""
        if count < 1:
            raise ValueError(f"a video of {count} frames has no layout")
        return cls.of_grids(*[grid] * count, cls_rows=cls_rows)

    @property
    def patches(self) -> Ints:
        """Indices of the patch rows, in order."""
        return np.flatnonzero(self.role == Role.PATCH).astype(np.int64)

    @property
    def protected(self) -> NDArray[np.bool_]:
        """``(N,) bool``: rows that every plan keeps."""
        return np.asarray(self.role == Role.SEPARATOR)

    @property
    def uncompressed(self) -> Ints:
        """Indices of the rows that enter the language model when nothing is left out."""
        return np.flatnonzero(self.role != Role.CLS).astype(np.int64)

    @property
    def before(self) -> int:
        """Rows of the uncompressed image."""
        return len(self.uncompressed) if self.whole is None else self.whole


@dataclass(frozen=True, eq=False)
class VisionTokens:
    """One encoded image.

    ``features (N, D) float32``: rows before the projector.
    ``project``: ``(n, D) -> (n, d)``, the projector; ``None`` when ``features`` are already of language width.
    ``cls_attention (heads, N) float32``: softmax weights of each crop's CLS query over the rows, if there is a CLS.
    ``keys (N, Dk) float32``: attention keys averaged over heads, for merging methods.
    ``carried (N, E) float32``: what the projector takes after the features and methods do not look at (deepstack).
    ``separator (d,) float32``: what separators are at language width.
    ``received``: computes the attention that rows receive from the others of their crop, ``(heads, N) float32``, where
    there is no CLS.
    """

    features: Array
    layout: Layout
    project: Callable[[Array], Array] | None = None
    cls_attention: Array | None = None
    keys: Array | None = None
    carried: Array | None = None
    separator: NDArray[np.float32] | None = None
    received: Callable[[], Array] | None = None

    def __post_init__(self) -> None:
        count = len(self.layout)
        if self.features.ndim != 2 or self.features.shape[0] != count:
            raise ValueError(f"features {tuple(self.features.shape)} do not fit a layout of {count} rows")
        if self.cls_attention is not None and (self.cls_attention.ndim != 2 or self.cls_attention.shape[1] != count):
            raise ValueError(f"cls_attention {tuple(self.cls_attention.shape)} must be (heads, {count})")
        if self.keys is not None and (self.keys.ndim != 2 or self.keys.shape[0] != count):
            raise ValueError(f"keys {tuple(self.keys.shape)} must be ({count}, Dk)")
        if self.carried is not None and (self.carried.ndim != 2 or self.carried.shape[0] != count):
            raise ValueError(f"carried {tuple(self.carried.shape)} must be ({count}, E)")

    def __len__(self) -> int:
        return len(self.layout)

    @cached_property
    def embeddings(self) -> Array:
        """``(N, d)``: every row at language width; computed once, on first use."""
        return self._projected(self.features, self.carried, self.layout.protected)

    @cached_property
    def attention(self) -> Array | None:
        """``cls_attention``; without a CLS what rows receive, computed on first use; None where neither can be had."""
        if self.cls_attention is not None or self.received is None:
            return self.cls_attention
        return self.received()

    def rows(self, plan: Plan) -> Array:
        """``(n, d)``: what enters the language model under ``plan``.

        The projector runs on the kept rows only, unless a method already asked for all of them.
        """
        if "embeddings" in self.__dict__ and plan.assign is None:
            return plan.apply(self.embeddings)
        carried = None if self.carried is None else plan.apply(self.carried)
        order = plan.keep if plan.order is None else plan.order
        return self._projected(plan.apply(self.features), carried, self.layout.protected[order])

    def _projected(self, rows: Array, carried: Array | None, separators: NDArray[np.bool_]) -> Array:
        if self.project is None:
            return rows
        if carried is not None:
            rows = array_namespace(rows).concat([rows, carried], axis=1)
        made = self.project(rows)
        if self.separator is not None and separators.any():
            made[np.flatnonzero(separators)] = array_namespace(made).asarray(self.separator)
        return made


@dataclass(frozen=True, eq=False)
class Plan:
    """Which rows of an image survive, apart from the arrays it will be applied to.

    ``keep (n,) int64``: row indices, ascending (raster order).
    ``rank (n,) int64``: the same indices in the order the method chose them; a prefix is the plan of a smaller budget
    for greedy methods.
    ``total``: N, the length of the token axis the plan belongs to. ``before``: rows of the uncompressed image.
    ``assign (N,) int64``: for merging methods, the position in ``keep`` a row is merged into, -1 if it is dropped.
    ``weight (N,) float32``: the row's share in that sum.
    ``stats``: what the method measured on the way (thresholds, quotas).
    ``order (n,) int64``: the same indices in the order in which they enter the language model, where that is another
    than ``keep``: the order of some releases, for comparison. Never together with ``assign``.
    """

    keep: Ints
    rank: Ints
    total: int
    before: int
    assign: Ints | None = None
    weight: NDArray[np.float32] | None = None
    stats: Mapping[str, float] = field(default_factory=dict)
    order: Ints | None = None

    def __post_init__(self) -> None:
        if self.before < 1:
            raise ValueError(f"before must be 1 or more, got {self.before}")
        if len(self.keep) and (self.keep[0] < 0 or self.keep[-1] >= self.total or np.any(np.diff(self.keep) <= 0)):
            raise ValueError(f"keep must be ascending, without repeats, within 0..{self.total - 1}")
        if not np.array_equal(np.sort(self.rank), self.keep):
            raise ValueError("rank must be a permutation of keep")
        if self.order is not None and (self.assign is not None or not np.array_equal(np.sort(self.order), self.keep)):
            raise ValueError("order must be a permutation of keep, and does not go with assign")
        if (self.assign is None) != (self.weight is None):
            raise ValueError("assign and weight come together")
        if self.assign is not None and self.weight is not None:
            if self.assign.shape != (self.total,) or self.weight.shape != (self.total,):
                raise ValueError(f"assign {self.assign.shape} and weight {self.weight.shape} must be ({self.total},)")
            if np.any(self.assign < -1) or np.any(self.assign >= len(self.keep)):
                raise ValueError(f"assign must lie within -1..{len(self.keep) - 1}")
            if not np.all(np.isfinite(self.weight)):
                raise ValueError("weight must be finite")
            if len(np.unique(self.assign[self.assign >= 0])) < len(self.keep):
                raise ValueError("assign must merge at least one row into every kept one")

    def __len__(self) -> int:
        return len(self.keep)

    def __str__(self) -> str:
        return describe(self.before, len(self))

    def apply(self, rows: Array) -> Array:
        """Gather (or merge) ``rows (N, ...)`` into ``(n, ...)``, in the order in which they enter the language model.

        NumPy or torch, on the device they are on.
        """
        if rows.shape[0] != self.total:
            raise ValueError(f"plan is for {self.total} rows, got {rows.shape[0]}")
        if self.assign is None or self.weight is None:
            return rows[self.keep if self.order is None else self.order]
        into = self.assign >= 0
        source = np.flatnonzero(into)
        order = source[np.argsort(self.assign[source], kind="stable")]
        if isinstance(rows, np.ndarray):
            weight, flat = self.weight.astype(rows.dtype), rows.reshape(self.total, -1)
            ends = np.searchsorted(self.assign[order], np.arange(1, len(self)))
            found = np.empty((len(self), flat.shape[1]), rows.dtype)
            for place, members in enumerate(np.split(order, ends)):  # a product each: ten times as fast as a reduceat
                np.dot(weight[members], flat[members], out=found[place])
            return found.reshape(len(self), *rows.shape[1:])
        shares = rows.new_tensor(self.weight[order]).reshape((-1,) + (1,) * (rows.ndim - 1))
        merged = rows.new_zeros((len(self), *rows.shape[1:]))
        target = rows.new_tensor(self.assign[order]).long()
        return merged.index_add(0, target, rows[order] * shares)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as ``.npz``, whole or not at all; raises ``OSError``."""
        arrays: dict[str, Any] = {
            "keep": self.keep, "rank": self.rank, "total": self.total, "before": self.before,
            "stats_names": np.array(list(self.stats), dtype=np.str_),
            "stats_values": np.array(list(self.stats.values()), dtype=np.float64),
        }  # fmt: skip
        if self.assign is not None and self.weight is not None:
            arrays |= {"assign": self.assign, "weight": self.weight}
        if self.order is not None:
            arrays["order"] = self.order
        write_whole(path, lambda stream: np.savez(stream, **arrays))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan written by ``save``; raises ``TokcompError`` for any other file."""
        try:
            file = read_npz(Path(path), _PLAN_ARRAYS, _PLAN_BYTES)
            for name, array in file.items():
                kind, axes, dtype = _PLAN_ARRAYS[name]
                if array.dtype.kind != kind or array.ndim != axes:
                    raise ValueError(f"{name} has the wrong type or size")
                with np.errstate(over="ignore"):  # a weight beyond float32 becomes infinite, and is refused as such
                    file[name] = array.astype(dtype)
            return cls(
                keep=file["keep"],
                rank=file["rank"],
                total=int(file["total"].item()),
                before=int(file["before"].item()),
                assign=file.get("assign"),
                weight=file.get("weight"),
                stats=dict(zip(file["stats_names"].tolist(), file["stats_values"].tolist(), strict=True)),
                order=file.get("order"),
            )
        except (KeyError, ValueError, SystemError) as fault:  # the last from NumPy, for names that are no characters
            raise TokcompError(f"{path}: not a plan file ({fault}); write one with `edge-tokcomp compress`") from fault


_PLAN_BYTES = 64 << 20
"""Most bytes a plan file may unpack to: about two million rows."""

_PLAN_ARRAYS: Mapping[str, tuple[str, int, type[np.generic]]] = {
    "keep": ("i", 1, np.int64), "rank": ("i", 1, np.int64), "total": ("i", 0, np.int64), "before": ("i", 0, np.int64),
    "assign": ("i", 1, np.int64), "weight": ("f", 1, np.float32), "order": ("i", 1, np.int64),
    "stats_names": ("U", 1, np.str_), "stats_values": ("f", 1, np.float64),
}  # fmt: skip
"""Kind and number of axes of each array in a plan file, and the type it is given."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What a decoder is fed.

    ``embeddings (n, n_embd_inp) float32``; ``positions (n,) int32``, or ``(4, n)`` for M-RoPE; ``sequence``: the id of
    the sequence the rows belong to; ``want_logits (n,) bool``: rows whose logits are asked for (last only by default).
    ``crop (n,) int64``: of an image row the image, crop or frame it belongs to, -1 for text; all text by default.
    ``tokens (n,) int32``: of a text row the token that it embeds; models that take ids instead of rows need them.
    With ``tokens`` the embeddings may be left out, ``(n, 0)``, where a decoder takes text so (``bare``).
    """

    embeddings: NDArray[np.float32]
    positions: NDArray[np.int32]
    sequence: int = 0
    want_logits: NDArray[np.bool_] | None = None
    crop: Ints | None = None
    tokens: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        count = len(self.embeddings)
        if self.embeddings.ndim != 2 or self.embeddings.dtype != np.float32:
            got = f"{self.embeddings.shape} {self.embeddings.dtype}"
            raise ValueError(f"embeddings must be (n, width) float32, got {got}")
        if self.positions.shape not in ((count,), (4, count)):
            raise ValueError(f"positions {self.positions.shape} must be ({count},) or (4, {count})")
        if self.want_logits is not None and self.want_logits.shape != (count,):
            raise ValueError(f"want_logits {self.want_logits.shape} must be ({count},)")
        if self.crop is not None and self.crop.shape != (count,):
            raise ValueError(f"crop {self.crop.shape} must be ({count},)")
        if self.tokens is not None and self.tokens.shape != (count,):
            raise ValueError(f"tokens {self.tokens.shape} must be ({count},)")
        if self.bare and self.tokens is None:
            raise ValueError(f"{count} rows have neither embeddings nor tokens")

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def bare(self) -> bool:
        """Whether these are tokens alone."""
        return not self.embeddings.shape[1]
