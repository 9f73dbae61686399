"""Greedy selection, the one loop behind most methods, and the gains it is run with.

``greedy`` takes the row of highest gain, again and again. What differs is the gain of a row given those taken:

* ``farthest``: minus its summed (max-sum) or its largest (max-min) cosine to them;
* ``coverage``: how much better everything is covered, a row covering another as well as it resembles it;
* ``log_det``: the volume it adds to theirs.

Everything is O(N) a step beside the products named, and waits for the device as little as it can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import array_api_compat
import numpy as np
from array_api_compat import array_namespace

from ..tokens import Array, Ints
from .kernels import blocks, gram, held_between, settle, to_numpy

_GRAM_ROWS = 4096
_ROWS_PER_STEP = 8
_SMALL = 2**15
"""Values of a table up to which all are worked on, which is less than to look for those that change."""
_SPENT = 2.0**-30
"""Volume, of at most 1, below which a row counts as a combination of those taken."""


def greedy(gain: Array, update: Callable[[Array], Array], k: int, first: int | None = None) -> Ints:
    """Take ``k`` rows one at a time, each time the one with the highest gain; returns them in that order.

    ``gain (N,) float64``: of joining the empty set. ``update(chosen (1,))``: every row's gain once ``chosen`` joined.
    ``first``: the row to begin with, whatever its gain. Rows already taken are never taken again. Gains should be of
    the order of 1 at most; ties go to the lower index.
    """
    xp = array_namespace(gain)
    rows = xp.arange(gain.shape[0], device=array_api_compat.device(gain))
    never = xp.full_like(gain, -xp.inf)
    left = xp.zeros_like(gain)
    picks: list[Array] = []
    while len(picks) < k:
        if first is not None and not picks:
            chosen = rows[first : first + 1]
        else:
            chosen = xp.argmax(settle(gain) + left, keepdims=True)
        picks.append(chosen)
        left = xp.where(rows == chosen, never, left)
        if len(picks) < k:
            gain = update(chosen)
    return to_numpy(xp.concat(picks)).astype(np.int64)


class Cosines:
    """Cosines of ``unit (N, D)``, rows of length 1, to one of them at a time, for about ``steps`` of them.

    Many steps on few rows are cheaper from one Gram matrix (N x N), which reads the rows once (measured for one thread
    of NumPy: from 4 to 10 rows a step); otherwise each step is one product with the rows and memory stays O(N).
    """

    def __init__(self, unit: Array, steps: int) -> None:
        self.unit = unit
        count = unit.shape[0]
        self.table = gram(unit) if count <= min(_GRAM_ROWS, _ROWS_PER_STEP * steps) else None

    def to(self, chosen: Array) -> Array:
        """``(N,)`` cosines of every row to the ``chosen (1,)``."""
        xp = array_namespace(self.unit)
        if self.table is not None:
            return xp.take(self.table, chosen, axis=0)[0, :]
        return self.unit @ xp.take(self.unit, chosen, axis=0)[0, :]

    def nearest(self) -> Array:
        """``(N,)``: each row's largest cosine to another row; -1 for a single row."""
        xp = array_namespace(self.unit)
        count, device = self.unit.shape[0], array_api_compat.device(self.unit)
        best = []
        for block in blocks(count, count, self.unit):
            cosine = (
                self.unit[block, :] @ xp.matrix_transpose(self.unit) if self.table is None else self.table[block, :]
            )
            own = xp.eye(cosine.shape[0], count, k=block.start, dtype=cosine.dtype, device=device)
            best.append(xp.max(cosine - 2 * own, axis=1))
        return xp.concat(best)


def farthest(
    cosines: Cosines,
    k: int,
    first: int,
    measure: Literal["max_sum", "max_min"],
    worth: Callable[[Array], Array] = lambda distance: distance,
) -> Ints:
    """``first`` and ``k - 1`` more, each the one least like those taken.

    ``max_sum``: smallest summed cosine. ``max_min``: smallest largest cosine (farthest first, k-center).
    ``worth``: what to rank by, given the distance: minus the sum, or one minus the largest cosine.
    """
    xp = array_namespace(cosines.unit)
    summing = measure == "max_sum"
    alike = xp.full_like(cosines.unit[:, 0], 0.0 if summing else -1.0)

    def update(chosen: Array) -> Array:
        nonlocal alike
        alike = alike + cosines.to(chosen) if summing else xp.maximum(alike, cosines.to(chosen))
        return worth(-alike if summing else 1 - alike)

    return greedy(-alike, update, k, first=first)


@dataclass(frozen=True, eq=False)
class Cover:
    """Things to be covered: ``table (R, N) float64``, 0 or more, says how well each of N rows covers each of R things,
    ``weight (R,)`` what covering one is worth.

    ``symmetric``: the things are the rows, and the table says of two of them the same both ways.
    """

    table: Array
    weight: Array
    symmetric: bool = False


def coverage(covers: Sequence[Cover], k: int, worth: Array | None = None) -> Ints:
    """``k`` rows that together cover the things of all ``covers`` best, a thing as well as the best of them does; a
    row's gain is multiplied by its ``worth (N,)``.

    Gains are kept up to date by what the chosen row takes from the others, on the things it covers better than before:
    a thing is improved O(log K) times, so all K steps cost about as much as R log K rows of the table.
    """
    xp = array_namespace(covers[0].table)
    gain = sum((cover.weight @ cover.table for cover in covers[1:]), covers[0].weight @ covers[0].table)
    scale = xp.max(gain)
    scale = xp.where(scale > 0, scale, xp.ones_like(scale))
    gain = gain / scale
    # Of each thing how well it is covered and what that is worth, side by side: a step is many small calls.
    states = [xp.stack([xp.zeros_like(cover.weight), cover.weight / scale]) for cover in covers]

    def update(chosen: Array) -> Array:
        nonlocal gain
        for cover, state in zip(covers, states, strict=True):
            for loss in _losses(xp, cover, state, chosen):
                gain -= loss
        return gain if worth is None else gain * worth

    return greedy(gain if worth is None else gain * worth, update, k)


def _losses(xp: Any, cover: Cover, state: Array, chosen: Array) -> Iterator[Array]:
    """What the gains ``(N,)`` fall by in the ``state (2, R)`` of a cover once ``chosen (1,)`` joins, in parts."""
    # A row lies together in memory, a column does not.
    line = xp.take(cover.table, chosen, axis=0)[0, :] if cover.symmetric else xp.take(cover.table, chosen, axis=1)[:, 0]
    after = xp.maximum(state[0, :], line)
    if after.shape[0] * cover.table.shape[1] <= _SMALL:
        reach = held_between(xp.asarray(cover.table, copy=True), state[0, :, None], after[:, None])
        yield state[1, :] @ reach - state[1, :] @ state[0, :]
    else:
        better = xp.nonzero(after > state[0, :])[0]
        for block in blocks(better.shape[0], cover.table.shape[1], cover.table):
            things = better[block]
            part, most = xp.take(state, things, axis=1), xp.take(after, things)
            reach = held_between(xp.take(cover.table, things, axis=0), part[0, :, None], most[:, None])
            yield part[1, :] @ reach - part[1, :] @ part[0, :]
    state[0, :] = after


def log_det(row: Callable[[Array], Array], diagonal: Array, k: int) -> Ints:
    """``k`` rows that greedily maximise the determinant of their part of a kernel matrix (MAP of a DPP).

    ``row(chosen (1,)) -> (N,)``: a row of the kernel; ``diagonal (N,)``: its diagonal, of the order of 1.
    The incremental Cholesky form: O(N K) a step beside ``row``. Rows that add no volume come last, in raster order.
    """
    xp: Any = array_namespace(diagonal)
    volume = xp.asarray(diagonal, copy=True)
    basis = xp.zeros((k, diagonal.shape[0]), dtype=diagonal.dtype, device=array_api_compat.device(diagonal))
    least, none = xp.full_like(diagonal[:1], _SPENT), xp.zeros_like(diagonal[:1])
    size = 0

    def update(chosen: Array) -> Array:
        nonlocal volume, size
        left, known = xp.take(volume, chosen), basis[:size, :]
        fresh = row(chosen) - xp.matrix_transpose(known) @ xp.take(known, chosen, axis=1)[:, 0]
        fresh = fresh * xp.where(left > least, 1 / xp.sqrt(xp.maximum(left, least)), none)
        basis[size, :] = fresh
        size += 1
        volume = volume - fresh * fresh
        return xp.where(volume > least, volume, none)

    return greedy(xp.where(volume > least, volume, none), update, k)
