# SPDX-License-Identifier: MIT
"""Random matrices with known properties, and the deviation of a matrix from them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dlnfast import LowRank

Array = npt.NDArray[np.floating]


def draw_orthonormal(seed: int | np.random.Generator, rows: int, columns: int) -> Array:
    """Return a random matrix with orthonormal columns or, if it is wide, orthonormal rows."""
    if rows < columns:
        return draw_orthonormal(seed, columns, rows).T
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))[0]


def draw_low_rank(seed: int | np.random.Generator, rows: int, columns: int, values: npt.ArrayLike) -> LowRank:
    """Return U diag(values) V^T with random orthonormal U and V, as factors."""
    rng = np.random.default_rng(seed)
    values = np.asarray(values, float)
    left = draw_orthonormal(rng, rows, len(values))
    return LowRank(left, values, draw_orthonormal(rng, columns, len(values)))


def draw_matrix(seed: int | np.random.Generator, rows: int, columns: int, values: npt.ArrayLike) -> Array:
    """Return a random matrix with these nonzero singular values."""
    factors = draw_low_rank(seed, rows, columns, values)
    return (factors.U * factors.s) @ factors.V.T


def draw_layers(
    seed: int, widths: list[int], *, decay: float = 1.0, dtype: npt.DTypeLike = float
) -> list[Array]:
    """Return layers between these widths; the singular values of each start at 1 and fall by `decay`."""
    rng = np.random.default_rng(seed)
    pairs = [(d_out, d_in, decay ** np.arange(min(d_in, d_out))) for d_in, d_out in pairwise(widths)]
    return [draw_matrix(rng, d_out, d_in, values).astype(dtype) for d_out, d_in, values in pairs]


def gram_error(matrix: Array, scale: float = 1.0) -> Array:
    """Return the smaller Gram matrix minus scale^2 I: zero for `scale` times an orthonormal matrix."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = small.astype(np.float64) @ small.T.astype(np.float64)
    return gram - scale**2 * np.eye(len(small))


def entry_setter(value: float, index: tuple[int, int]) -> Callable[[Array], Array]:
    """Return a function that copies a matrix with one entry replaced."""

    def set_entry(matrix: Array) -> Array:
        changed = matrix.copy()
        changed[index] = value
        return changed

    return set_entry


class Products:
    """A matrix defined by its products only."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, matrix.dtype

    def matmat(self, x):
        return self.matrix @ x

    def rmatmat(self, y):
        return self.matrix.T @ y
