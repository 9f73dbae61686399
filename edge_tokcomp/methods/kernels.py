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
_BLOCK_VALUES, _GPU_VALUES = 2**16, 2**24
"""Values that are worked on at a time: so that they stay in the processor's cache (512 KiB), and on a GPU, where every
piece costs launches, so that they fit beside the rest (128 MiB)."""


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
    return directions(rows, centred=centred)[0]


def directions(rows: Array, *, centred: bool = True) -> tuple[Array, Array]:
    """``unit_rows``, and the lengths ``(N,)`` they had before."""
    xp = array_namespace(rows)
    unit = xp.astype(rows, xp.float64)  # a copy, so that what follows may work in place
    least, mean = 0.0, xp.zeros_like(unit[:1, :])
    if centred:
        least = 1e-12 * xp.astype(_largest(rows), xp.float64)  # what is shorter is made of rounding errors
        mean = xp.mean(unit, axis=0, keepdims=True)
    lengths = []
    for block in blocks(unit.shape[0], unit.shape[1], unit):
        part = unit[block, :]
        if centred:
            part -= mean
        length = xp.sqrt(xp.linalg.vecdot(part, part))
        length = xp.where(length > least, length, xp.zeros_like(length))
        part /= xp.where(length > 0, length, xp.full_like(length, xp.inf))[:, None]
        lengths.append(length)
    return unit, xp.concat(lengths)


def _largest(values: Array) -> Array:
    """The largest magnitude in ``values``."""
    xp = array_namespace(values)
    return xp.maximum(xp.max(values), -xp.min(values))


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


def blocks(count: int, width: int, array: Array) -> list[slice]:
    """``count`` rows of ``width`` values, cut into pieces to be worked on where ``array`` is; one at least."""
    on_cpu = str(array_api_compat.device(array)).lower().startswith("cpu")
    step = max(1, (_BLOCK_VALUES if on_cpu else _GPU_VALUES) // width)
    return [slice(start, min(start + step, count)) for start in range(0, max(count, 1), step)]


def held_between(values: Array, low: Array, high: Array) -> Array:
    """``values`` raised to ``low`` and lowered to ``high``; NumPy's in place, since fresh memory costs more."""
    if isinstance(values, np.ndarray):
        np.maximum(values, low, out=values)
        return np.minimum(values, high, out=values)
    xp = array_namespace(values)
    return xp.minimum(xp.maximum(values, low), high)


def top_k(scores: NDArray[Any], k: int) -> Ints:
    """Indices of the ``k`` highest ``scores (N,)``, highest first, ties to the lower index."""
    return np.argsort(-scores, kind="stable")[:k].astype(np.int64)
