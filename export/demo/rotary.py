"""Row order of query and key matrices: the torch model turns a head's first half against its second, llama.cpp pairs.

Both functions take and return ``(heads * dim, columns)``; each undoes the other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def to_pairs(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head from (first half, second half) to neighbouring pairs."""
    return _exchange(weight, heads, 2, -1)


def to_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head from neighbouring pairs to (first half, second half)."""
    return _exchange(weight, heads, -1, 2)


def _exchange(weight: NDArray[np.float32], heads: int, outer: int, inner: int) -> NDArray[np.float32]:
    rows, columns = weight.shape
    return weight.reshape(heads, outer, inner, columns).swapaxes(1, 2).reshape(rows, columns)
