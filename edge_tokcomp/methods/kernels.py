"""Numerical steps that methods share, on any array-API namespace (NumPy, torch on CPU or CUDA).

What decides a choice is accumulated in float64 and *settled*: values closer than about 1e-11 become equal, so that
rounding noise, which differs from one BLAS to the next, never breaks a tie. Ties go to the lower index.
"""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from ..tokens import Array, Ints

_GRID = float(2**36)


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


def unit_rows(rows: Array, *, centred: bool = False) -> Array:
    """``(N, D)`` rows scaled to length 1, in float64; a zero row stays zero.

    ``centred``: their mean is subtracted first (Cen-Prune). Towers give all rows a large common part, so that plain
    cosines lie close together and their order says little.
    """
    xp = array_namespace(rows)
    rows = xp.astype(rows, xp.float64)
    if centred:
        rows = _without_noise(rows - xp.mean(rows, axis=0, keepdims=True), rows)
    length = xp.sqrt(xp.sum(rows * rows, axis=1, keepdims=True))
    return rows / xp.where(length > 0, length, xp.ones_like(length))


def _without_noise(rows: Array, before: Array) -> Array:
    """``rows`` with those set to zero that are nothing but rounding errors of ``before``."""
    xp = array_namespace(rows)
    large = xp.max(xp.abs(rows), axis=1, keepdims=True) > 1e-12 * xp.max(xp.abs(before))
    return xp.where(large, rows, xp.zeros_like(rows))


def stretched(values: Array) -> Array:
    """``values (N,)`` moved and scaled to reach from 0 to 1; all 1 where they do not differ."""
    xp = array_namespace(values)
    low, high = xp.min(values), xp.max(values)
    width = high - low
    differ = width > 1e-12 * xp.max(xp.abs(values))
    return xp.where(differ, (values - low) / xp.where(differ, width, xp.ones_like(width)), xp.ones_like(values))


def gram(rows: Array) -> Array:
    """``(N, N)`` inner products of ``rows (N, D)``."""
    return rows @ array_namespace(rows).matrix_transpose(rows)


def top_k(scores: NDArray[Any], k: int) -> Ints:
    """Indices of the ``k`` highest ``scores (N,)``, highest first, ties to the lower index."""
    return np.argsort(-scores, kind="stable")[:k].astype(np.int64)
