"""The leading eigenvectors of a symmetric matrix, on any array-API namespace, as exact as the full decomposition's."""

from __future__ import annotations

import math
from functools import lru_cache

import array_api_compat
import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from ..tokens import Array
from .kernels import like, to_numpy

_BLOCK = 4
_ROUNDING = 1e-15
"""Residual, as a share of the largest eigenvalue, that the full decomposition has too."""
_SPENT = 1e-10
"""Length, as a share of the largest entry, below which a new vector is a combination of those before it."""


def leading_eigenvectors(matrix: Array, count: int) -> tuple[Array, Array]:
    """The ``count`` largest eigenvalues of ``matrix (N, N) float64``, symmetric and positive semi-definite, in
    descending order, and their eigenvectors ``(N, count)``; all N where there are no more.

    Block Lanczos with full reorthogonalisation (Golub and Van Loan, Matrix Computations, section 10.3.6) from fixed
    random vectors, until every residual is below the rounding error of the matrix, as the full decomposition's are.
    The full one takes its place where it would be no slower: for small matrices, a large share of the eigenvectors,
    slow convergence, and matrices of few distinct eigenvalues, which run out of new vectors; and where an eigenvalue
    has so many equal copies that the vectors found hold only some of them.
    """
    xp = array_namespace(matrix)
    found = _lanczos(matrix, count)
    if found is not None:
        return found
    values, vectors = xp.linalg.eigh(matrix)
    return xp.flip(values)[:count], xp.flip(vectors, axis=1)[:, :count]


def _lanczos(matrix: Array, count: int) -> tuple[Array, Array] | None:
    """The same, or None where the full decomposition is called for."""
    xp = array_namespace(matrix)
    size = matrix.shape[0]
    check = 3 * count + 8 * _BLOCK
    most = min(2 * check, size // 2)
    if 3 * check > size:
        return None
    device = array_api_compat.device(matrix)
    basis = xp.zeros((size, most), dtype=matrix.dtype, device=device)
    inside = xp.zeros((most, most), dtype=matrix.dtype, device=device)
    block = like(_beginning(size), matrix)
    before, known = 0, 0
    spent = _SPENT * float(xp.max(xp.linalg.diagonal(matrix)))
    while known + _BLOCK <= most:
        basis[:, known : known + _BLOCK] = block
        # The same as matrix @ block, which takes BLAS libraries 1.6 times as long.
        fresh = xp.matrix_transpose(xp.matrix_transpose(block) @ matrix)
        known += _BLOCK
        recent, so_far = basis[:, before:known], basis[:, :known]
        part = xp.matrix_transpose(recent) @ fresh
        inside[before:known, known - _BLOCK : known] = part
        fresh -= recent @ part
        fresh -= so_far @ (xp.matrix_transpose(so_far) @ fresh)
        before = known - _BLOCK
        block, link = xp.linalg.qr(fresh)
        link = to_numpy(link)
        if np.abs(link.diagonal()).min() <= spent:
            return None
        if known < check:
            continue
        values, mixture = np.linalg.eigh(to_numpy(inside[:known, :known]), UPLO="U")
        residual = float(np.max(np.linalg.norm(link @ mixture[-_BLOCK:, -count:], axis=0)) / values[-1])
        if residual <= _ROUNDING:
            if _largest_beside(so_far, matrix) > 0.9 * values[-count]:
                return None
            leading = like(np.ascontiguousarray(mixture[:, : -count - 1 : -1]), matrix)
            return like(values[: -count - 1 : -1].copy(), matrix), so_far @ leading
        steady = (known - count) * math.log(residual / _ROUNDING) / -math.log(residual)
        check = known + _BLOCK + int(steady / 2)  # half of it, as residuals fall ever faster
        if check > most:
            return None
    return None


def _largest_beside(basis: Array, matrix: Array) -> float:
    """About the largest eigenvalue of ``matrix`` on what is orthogonal to ``basis``: eight steps of power iteration.

    A lower bound, and a close one where it is well above the next: a copy that Lanczos overlooked.
    """
    xp = array_namespace(matrix)
    probe = like(_random(matrix.shape[0], 1, seed=1)[:, 0], matrix)
    for _ in range(8):
        probe = probe - basis @ (xp.matrix_transpose(basis) @ probe)
        probe = matrix @ (probe / xp.linalg.vector_norm(probe))
    return float(xp.linalg.vector_norm(probe - basis @ (xp.matrix_transpose(basis) @ probe)))


@lru_cache(maxsize=8)
def _beginning(size: int) -> NDArray[np.float64]:
    """``(size, _BLOCK)``: random orthonormal vectors to begin with."""
    return np.linalg.qr(_random(size, _BLOCK, seed=0))[0]


@lru_cache(maxsize=16)
def _random(size: int, columns: int, seed: int) -> NDArray[np.float64]:
    """``(size, columns)``: the same on every backend."""
    return np.random.Generator(np.random.PCG64(seed)).standard_normal((size, columns))
