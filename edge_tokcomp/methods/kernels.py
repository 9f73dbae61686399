"""Numerical steps that methods share, on any array-API namespace (NumPy, torch on CPU or CUDA).

What decides a choice is accumulated in float64 and *settled*: values closer than about 1e-11 become equal, so that
rounding noise, which differs from one BLAS to the next, never breaks a tie. Ties go to the lower index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat
import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from ..tokens import Array, Ints

_GRID = float(2**36)
_GRAM_ROWS = 4096
_STEPS_PER_ROW = 16


def to_numpy(array: Array) -> NDArray[Any]:
    """A NumPy view or copy of ``array``, from whatever device it is on."""
    if isinstance(array, np.ndarray):
        return array
    if array_api_compat.is_torch_array(array):
        return np.asarray(array.detach().cpu().numpy())
    return np.asarray(np.from_dlpack(array))


def like(values: NDArray[Any], other: Array) -> Array:
    """``values`` as an array of ``other``'s library, on its device."""
    return array_namespace(other).asarray(values, device=array_api_compat.device(other))


def settle(values: Array) -> Array:
    """``values float64`` (of the order of 1) rounded to multiples of 2**-36."""
    return array_namespace(values).round(values * _GRID) / _GRID


def unit_rows(rows: Array) -> Array:
    """``(N, D)`` rows scaled to length 1, in float64; a zero row stays zero."""
    xp = array_namespace(rows)
    rows = xp.astype(rows, xp.float64)
    length = xp.sqrt(xp.sum(rows * rows, axis=1, keepdims=True))
    return rows / xp.where(length > 0, length, xp.ones_like(length))


def gram(rows: Array) -> Array:
    """``(N, N)`` inner products of ``rows (N, D)``."""
    return rows @ array_namespace(rows).matrix_transpose(rows)


def top_k(scores: NDArray[Any], k: int) -> Ints:
    """Indices of the ``k`` highest ``scores (N,)``, highest first, ties to the lower index."""
    return np.argsort(-scores, kind="stable")[:k].astype(np.int64)


def cosines_to(unit: Array, steps: int) -> Callable[[Array], Array]:
    """``chosen (1,) -> (N,)`` cosines of every row to the chosen one, for about ``steps`` calls.

    Many calls on few rows are cheaper from one Gram matrix (N x N), which reads the rows once; otherwise each call is
    one product with the rows and memory stays O(N).
    """
    xp = array_namespace(unit)
    count = unit.shape[0]
    if count <= min(_GRAM_ROWS, _STEPS_PER_ROW * steps):
        table = gram(unit)
        return lambda chosen: xp.take(table, chosen, axis=0)[0, :]
    return lambda chosen: unit @ xp.take(unit, chosen, axis=0)[0, :]


def greedy(gain: Array, update: Callable[[Array], Array], k: int, first: int | None = None) -> Ints:
    """Take ``k`` rows one at a time, each time the one with the highest gain; returns them in that order.

    ``gain (N,) float64``: of joining the empty set. ``update(chosen (1,))``: every row's gain once ``chosen`` joined.
    ``first``: the row to begin with, whatever its gain. Rows already taken are never taken again. The loop waits for
    the device only at its end.
    """
    xp = array_namespace(gain)
    rows = xp.arange(gain.shape[0], device=array_api_compat.device(gain))
    never = xp.full_like(gain, -xp.inf)
    taken = rows < 0
    picks: list[Array] = []
    while len(picks) < k:
        if first is not None and not picks:
            chosen = rows[first : first + 1]
        else:
            chosen = xp.argmax(xp.where(taken, never, settle(gain)), keepdims=True)
        picks.append(chosen)
        taken = taken | (rows == chosen)
        if len(picks) < k:
            gain = update(chosen)
    return to_numpy(xp.concat(picks)).astype(np.int64)
