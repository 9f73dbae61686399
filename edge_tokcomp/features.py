"""The arrays that ``compress`` is given: an ``.npz`` of one encoded image, and perhaps of a question."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .files import read_npz
from .tokens import Layout, VisionTokens

_ARRAYS = ("features", "embeddings", "cls_attention", "keys", "query", "grid")
_MOST_BYTES = 4 << 30


def read_features(path: Path) -> tuple[VisionTokens, NDArray[np.float32] | None]:
    """An image's tokens, and ``query (m, d)`` if there is one; raises ``UsageError`` for arrays that do not fit.

    Row 0 is a CLS row when ``grid (rows, columns)`` holds one row less than there are. Without ``grid`` all rows are
    patches: a square if their number is one, else a single line.
    """
    try:
        arrays = read_npz(path, _ARRAYS, _MOST_BYTES)
    except ValueError as fault:
        raise UsageError(f"{path}: not an .npz of arrays ({fault})") from fault
    if "features" not in arrays:
        raise UsageError(f"{path}: has no array 'features' (N, D); write it with numpy.savez(FILE, features=...)")
    grid_array = arrays.pop("grid", None)
    for name, array in arrays.items():
        if array.dtype.kind != "f" or array.ndim != 2 or not array.size:
            raise UsageError(f"{path}: {name} {array.shape} {array.dtype} must be a matrix of floating-point numbers")
        with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinite, which methods refuse by its row.
            arrays[name] = array.astype(np.float32, copy=False)
    features, embeddings = arrays["features"], arrays.get("embeddings")
    count = len(features)
    rows, columns = _grid(path, grid_array, count)
    if embeddings is not None and len(embeddings) != count:
        raise UsageError(f"{path}: embeddings {embeddings.shape} must be ({count}, d)")
    query, width = arrays.get("query"), (features if embeddings is None else embeddings).shape[1]
    if query is not None and query.shape[1] != width:
        raise UsageError(f"{path}: query {query.shape} must be (m, {width}), as wide as the embeddings")
    try:
        tokens = VisionTokens(
            features,
            Layout.of_grids((rows, columns), cls_rows=rows * columns == count - 1),
            None if embeddings is None else lambda _rows: embeddings,
            arrays.get("cls_attention"),
            arrays.get("keys"),
        )
    except ValueError as fault:
        raise UsageError(f"{path}: {fault}") from fault
    return tokens, query


def _grid(path: Path, array: NDArray[np.generic] | None, count: int) -> tuple[int, int]:
    if array is None:
        side = math.isqrt(count)
        return (side, side) if side**2 == count else (1, count)
    if array.shape != (2,) or array.dtype.kind not in "iu":
        raise UsageError(f"{path}: grid {array.shape} {array.dtype} must be two whole numbers, rows and columns")
    rows, columns = int(array[0]), int(array[1])
    if rows < 1 or columns < 1 or rows * columns not in (count, count - 1):
        raise UsageError(f"{path}: grid {rows} x {columns} does not hold {count} rows, with or without a CLS row")
    return rows, columns
