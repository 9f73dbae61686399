"""The attention that patches receive from one another: what stands for a CLS row's where a tower has none."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_AT_ONCE = 256
"""Queries; the weights of all of a large picture's would be gigabytes."""


def received_attention(queries: Floats, keys: Floats, heads: int) -> Floats:
    """``(heads, P) float32``: softmax weights of ``queries (P, D)`` over ``keys (P, D)``, averaged over the queries.

    What releases of VisionZip and others take for towers without a CLS.
    """
    count, width = keys.shape
    size = width // heads
    received = np.zeros((heads, count), np.float32)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        of_head, scale = np.ascontiguousarray(keys[:, part].T), np.float32(size**-0.5)
        for start in range(0, count, _AT_ONCE):
            weights = queries[start : start + _AT_ONCE, part] @ of_head
            weights *= scale
            weights -= weights.max(axis=1, keepdims=True)
            np.exp(weights, out=weights)
            received[head] += (1 / weights.sum(axis=1)) @ weights
    return np.asarray(received / np.float32(count))


def squares(x: Floats, grid: tuple[int, int], side: int) -> Floats:
    """``x (..., P)`` over a ``grid`` of patches to ``(..., N, side * side)``: the patches of each square."""
    rows, columns = grid[0] // side, grid[1] // side
    cells = x.reshape(*x.shape[:-1], rows, side, columns, side)
    return np.asarray(np.moveaxis(cells, -3, -2).reshape(*x.shape[:-1], rows * columns, side * side))
