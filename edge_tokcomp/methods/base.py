"""The contract of a compression method, and every guard that no method should have to think about.

``Method.compress`` checks the arrays, turns the budget into a number of patches for each image or crop, asks the
method's one function which to keep, and writes the ``Plan``. It knows nothing about any particular method.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, final

import array_api_compat
import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from ..budget import share, tokens_to_keep
from ..errors import TokcompError, UsageError
from ..tokens import Array, Ints, Plan, Role, VisionTokens
from .kernels import like, to_numpy, top_k
from .options import check_options, options_of, spell

Stats = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Candidates:
    """The patch rows a method chooses among: those of the image, or of one crop for methods of scope ``crop``.

    ``features (n, D) float32``, ``cls_attention (heads, n) float32`` and ``keys (n, Dk) float32`` are arrays of the
    caller's library on the caller's device; the last two are there when the method names them and the tower has them.
    ``grids``: ``(rows, columns)`` of each crop in the view; ``crop (n,)`` and ``cell (n,)`` place a row in them;
    ``overview``: the one of them that is a thumbnail of the whole picture, if one is.
    ``budget``: rows the language model gets from this view, a kept CLS included (``k`` counts patches only).
    ``query (m, d) float32``: the question's tokens at language width, if there is one and the method names it.
    ``seed``: of the run and the crop, for ``random``.
    """

    features: Array
    grids: tuple[tuple[int, int], ...]
    crop: Ints
    cell: Ints
    budget: int
    seed: tuple[int, int]
    cls_attention: Array | None = None
    keys: Array | None = None
    query: Array | None = None
    project: Callable[[], Array] | None = None
    overview: int | None = None

    def __len__(self) -> int:
        return len(self.cell)

    @property
    def xp(self) -> Any:
        """The array namespace of ``features``."""
        return array_namespace(self.features)

    @property
    def random(self) -> np.random.Generator:
        """PCG64 seeded by ``seed`` and what the picture holds; the same on every backend."""
        content = zlib.crc32(np.ascontiguousarray(to_numpy(self.features)).data)
        return np.random.Generator(np.random.PCG64([*self.seed, content]))

    @cached_property
    def embeddings(self) -> Array:
        """``(n, d) float32``: the rows at language width, projected when first asked for."""
        return self.features if self.project is None else self.project()


@dataclass(frozen=True, eq=False)
class Scores:
    """``values (n,)``: the ``k`` highest are kept, ties to the lower index."""

    values: Array
    stats: Stats = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Picks:
    """``indices (k,) int64``: the rows kept, in the order they were chosen.

    ``in_order``: they enter the language model in that order, not in raster order: each in the next of the crop's kept
    places. CLS rows and separators stay where they are.
    """

    indices: Ints
    stats: Stats = field(default_factory=dict)
    in_order: bool = False


@dataclass(frozen=True, eq=False)
class Merges:
    """Kept rows become weighted sums.

    ``representatives (k,) int64``: rows whose places the sums take. ``assign (n,) int64``: the position in
    ``representatives`` that a row is added to, -1 for none. ``weight (n,)``: the row's share in that sum.
    """

    representatives: Ints
    assign: Ints
    weight: NDArray[np.float32]
    stats: Stats = field(default_factory=dict)


Choice = Scores | Picks | Merges


@dataclass(frozen=True)
class Method(ABC):
    """A compression method. Subclasses are frozen dataclasses whose fields are their hyper-parameters.

    ``needs``: inputs without which it cannot run; ``wants``: inputs it uses when the tower offers them; both from
    ``cls_attention``, ``keys``, ``embeddings``, ``grid``. ``scope``: ``image`` chooses among all crops at once,
    ``crop`` compresses each crop on its own with a share of the budget in proportion to its patches.
    A field ``keep_cls: bool`` lets the CLS rows of the layout in, each at the cost of one row of the budget.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    scope: ClassVar[Literal["image", "crop"]] = "image"
    wants: ClassVar[frozenset[str]] = frozenset()
    instead: ClassVar[str] = "choose another method (edge-tokcomp methods)"
    """What to do when an input is missing."""
    compresses: ClassVar[bool] = True
    """False only for the baseline that keeps everything."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.compress is not Method.compress:
            raise TypeError(f"{cls.__name__} must not override compress(): implement choose()")

    def __post_init__(self) -> None:
        check_options(self)

    def __str__(self) -> str:
        """The text that ``get_method`` reads back: name and options that differ from their defaults."""
        options = [(field.name, getattr(self, field.name), field.default) for field in options_of(self)]
        values = {name.rstrip("_"): value for name, value, default in options if value != default}
        return self.name + ":" * bool(values) + ",".join(f"{name}={spell(value)}" for name, value in values.items())

    @property
    def needs(self) -> frozenset[str]:
        """Inputs without which the method, with these options, cannot run."""
        return frozenset()

    @abstractmethod
    def choose(self, rows: Candidates, k: int) -> Choice:
        """Choose ``k`` of ``rows``, where ``1 <= k < len(rows)``."""

    @final
    def compress(
        self, tokens: VisionTokens, keep: str | int | float, *, seed: int = 0, query: Array | None = None
    ) -> Plan:
        """The plan that leaves ``keep`` of the image's tokens (int: tokens, float: fraction kept).

        ``query (m, d)``: the question's tokens at language width, for methods that look at the question.

        The budget counts everything that enters the language model. Separators are always kept; at least one patch is,
        and a budget too small for both is raised (``stats``: ``keep_asked``, ``keep_raised``). A budget of all tokens
        or more changes nothing. A CLS row is kept only beside a patch. Computed in float32 or better.

        Raises ``TokcompError`` for values that are not finite and inputs the method needs and the tower lacks,
        ``UsageError`` for a bad ``keep`` or ``seed``.
        """
        layout = tokens.layout
        if not len(layout.patches):
            raise ValueError("the image has no patch rows")
        if seed < 0:
            raise UsageError(f"seed must be 0 or more, got {seed}")
        wanted = tokens_to_keep(keep, layout.before)
        inputs = _Inputs(tokens, self, query)
        separators = np.flatnonzero(layout.protected).astype(np.int64)
        total = max(wanted, len(separators) + 1)
        stats: dict[str, float] = {} if total == wanted else {"keep_asked": wanted, "keep_raised": total}
        if not self.compresses or total >= len(layout.uncompressed):
            return _identity(tokens, stats)
        ranked, merging, fed = [separators], _Merging(len(tokens), separators), np.arange(len(tokens), dtype=np.int64)
        for view, budget in self._views(tokens, total - len(separators)):
            cls_rows = view.cls_rows[: max(budget - 1, 0)]
            k = budget - len(cls_rows)
            if 0 < k < len(view.patches):
                rows = inputs.candidates(view.patches, view.crops, budget, seed)
                order, choice = self._settled(self.choose(rows, k), len(view.patches), k)
            else:
                order, choice = np.arange(k), Picks(np.arange(k))
            chosen = np.concatenate([cls_rows, view.patches[order]])
            ranked.append(chosen)
            if isinstance(choice, Picks) and choice.in_order:
                chosen = view.patches[order]
                crop = layout.crop[chosen]
                fed[chosen[np.lexsort((chosen, crop))]] = chosen[np.argsort(crop, kind="stable")]
            merging.add(view.patches, order, choice)
            merging.keep(cls_rows)
            prefix = f"crop{view.crops[0]}." if len(layout.grids) > 1 and self.scope == "crop" else ""
            stats |= {prefix + name: float(value) for name, value in choice.stats.items()}
        rank = np.concatenate(ranked)
        kept = np.sort(rank)
        assign, weight = merging.tables(kept)
        fed = fed[kept]
        return Plan(
            kept, rank, len(tokens), layout.before, assign, weight, stats,
            None if np.array_equal(fed, kept) else fed,
        )  # fmt: skip

    def _views(self, tokens: VisionTokens, budget: int) -> list[tuple[_View, int]]:
        """The whole image, or each crop with its share of the budget."""
        layout = tokens.layout
        every = tuple(range(len(layout.grids)))
        crops = [every] if self.scope == "image" else [(c,) for c in every]
        views = []
        for members in crops:
            inside = np.isin(layout.crop, members)
            patches = np.flatnonzero(inside & (layout.role == Role.PATCH)).astype(np.int64)
            cls_rows = np.flatnonzero(inside & (layout.role == Role.CLS)).astype(np.int64)
            if len(patches):
                views.append(_View(members, patches, cls_rows if getattr(self, "keep_cls", False) else cls_rows[:0]))
        sizes = [len(view.patches) for view in views]
        return list(zip(views, share(budget, sizes, [len(v.patches) + len(v.cls_rows) for v in views]), strict=True))

    def _settled(self, choice: Choice, count: int, k: int) -> tuple[Ints, Choice]:
        """The chosen local indices in order of choice; ``ValueError`` where a method broke its contract."""
        if isinstance(choice, Scores):
            values = to_numpy(choice.values).astype(np.float64)
            if values.shape != (count,) or np.any(np.isnan(values)):
                raise ValueError(f"{self.name} must score {count} rows without NaN, got shape {values.shape}")
            return top_k(values, k), choice
        order = np.asarray(choice.indices if isinstance(choice, Picks) else choice.representatives, dtype=np.int64)
        if order.shape != (k,) or len(np.unique(order)) != k or order.min() < 0 or order.max() >= count:
            raise ValueError(f"{self.name} must choose {k} different rows of {count}, got {order.tolist()}")
        if isinstance(choice, Merges):
            if choice.assign.shape != (count,) or choice.weight.shape != (count,):
                raise ValueError(f"{self.name} must assign and weigh {count} rows")
            if not np.array_equal(choice.assign[order], np.arange(k)):
                raise ValueError(f"{self.name} must assign each representative to itself")
        return order, choice


@dataclass(frozen=True)
class AttentionMethod(Method):
    """A method that looks at attention or keys inside the tower.

    ``block``: of the tower's, which one's; negative ones count from the last that is run. By default the one whose
    output the projector takes.
    """

    block: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block is not None and not (self.needs | self.wants) & {"cls_attention", "keys"}:
            raise UsageError(f"{self}: with these options it looks at no block's attention; leave block out")


@dataclass(frozen=True, eq=False)
class _View:
    crops: tuple[int, ...]
    patches: Ints
    cls_rows: Ints


_INPUTS = {
    "cls_attention": "the attention of the vision tower",
    "keys": "the attention keys of the tower",
    "query": "the question",
}


class _Inputs:
    """The arrays of one image: checked for presence at once, for their values when they are used."""

    def __init__(self, tokens: VisionTokens, method: Method, query: Array | None) -> None:
        self.tokens = tokens
        self.features = finite_float32("features", tokens.features)
        self.optional: dict[str, Array | None] = {}
        # Attention that has to be computed first is not offered to a method that can do without.
        attention = tokens.attention if "cls_attention" in method.needs else tokens.cls_attention
        asked = None if query is None or not query.shape[0] else query  # a question of no words is none
        there = {"cls_attention": attention, "keys": tokens.keys, "query": asked}
        for name, array in there.items():
            wording = _INPUTS[name]
            if array is None and name in method.needs:
                raise TokcompError(f"method {method.name} needs {wording}, which is not there: {method.instead}")
            self.optional[name] = None
            if array is not None and name in method.needs | method.wants:
                array_namespace(self.features, array)  # refuses a mix of libraries
                self.optional[name] = finite_float32(name, array, axis=int(name == "cls_attention"))

    def candidates(self, patches: Ints, crops: tuple[int, ...], budget: int, seed: int) -> Candidates:
        layout, index = self.tokens.layout, like(patches, self.features)
        xp = array_namespace(self.features)
        start, end = int(patches[0]), int(patches[-1]) + 1
        run = end - start == len(patches)  # one after another, as a crop's are: a view will do

        def rows_of(array: Array) -> Array:
            return array[start:end, ...] if run else xp.take(array, index, axis=0)

        def project() -> Array:
            return finite_float32("embeddings", rows_of(self.tokens.embeddings), names=patches)

        attention, keys = self.optional["cls_attention"], self.optional["keys"]
        return Candidates(
            features=rows_of(self.features),
            grids=tuple(layout.grids[c] for c in crops),
            crop=np.searchsorted(crops, layout.crop[patches]).astype(np.int64),
            cell=layout.cell[patches],
            budget=budget,
            seed=(seed, crops[0]),
            cls_attention=None if attention is None else xp.take(attention, index, axis=1),
            keys=None if keys is None else rows_of(keys),
            query=self.optional["query"],
            project=None if self.tokens.project is None else project,
            overview=crops.index(layout.overview) if layout.overview in crops else None,
        )


class _Merging:
    """Collects ``assign`` and ``weight``; a plan without any merge carries neither."""

    def __init__(self, total: int, separators: Ints) -> None:
        self.into = np.full(total, -1, np.int64)
        self.weight = np.zeros(total, np.float32)
        self.any = False
        self.keep(separators)

    def keep(self, rows: Ints) -> None:
        self.into[rows] = rows
        self.weight[rows] = 1.0

    def add(self, patches: Ints, order: Ints, choice: Choice) -> None:
        if isinstance(choice, Merges):
            self.any = True
            joined = choice.assign >= 0
            self.into[patches[joined]] = patches[order[choice.assign[joined]]]
            self.weight[patches[joined]] = choice.weight[joined]
        else:
            self.keep(patches[order])

    def tables(self, kept: Ints) -> tuple[Ints | None, NDArray[np.float32] | None]:
        if not self.any:
            return None, None
        return np.where(self.into >= 0, np.searchsorted(kept, self.into), -1).astype(np.int64), self.weight


def _identity(tokens: VisionTokens, stats: Stats) -> Plan:
    every = tokens.layout.uncompressed
    return Plan(every, every, len(tokens), tokens.layout.before, stats=stats)


def finite_float32(label: str, array: Array, axis: int = 0, names: Ints | None = None) -> Array:
    """``array`` in float32, apart from any autograd graph; ``TokcompError`` names its first row that is not finite.

    ``axis``: the token axis. ``names``: the numbers its rows go by, where they are not 0, 1, 2…
    """
    if "float" not in str(array.dtype):
        raise ValueError(f"{label} must be floating point, got {array.dtype}")
    if array_api_compat.is_torch_array(array):
        array = array.detach()
    xp = array_namespace(array)
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite then, and refused below
        array = xp.astype(array, xp.float32, copy=False)
    finite = xp.isfinite(array)
    if not bool(xp.all(finite)):
        row = int(np.argmin(to_numpy(xp.all(finite, axis=1 - axis))))
        row = row if names is None else int(names[row])
        raise TokcompError(f"{label}, row {row}: not finite (NaN or infinity); check the tower and its precision")
    return array
