# SPDX-License-Identifier: MIT
"""Products of layers that are never formed, and linear maps: entries, norms, leading singular vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from .._support.arrays import (
    FloatArray,
    as_layers,
    as_matrix,
    check_count,
    count_axes,
    is_sparse,
    random_generator,
    widths_of,
)
from .._support.dispatch import core
from .._support.errors import ShapeError
from .._support.products import multiply
from .low_rank import LowRank, as_dense

#: Entries in CSR format: start of each row, column of each entry, value of each entry.
SparseRows = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], FloatArray]


@runtime_checkable
class Layered(Protocol):
    """An object with the layers of a network, such as a `Trajectory`.

    A protocol, because `Trajectory` imports this package.
    """

    def all_weights(self, step: int = -1) -> list[FloatArray]:
        """Return ``W_1 .. W_L``."""
        ...


#: A matrix as an array, as factors, as layers W_1 .. W_L whose product it is, or as an object with layers.
MatrixOrLayers = npt.ArrayLike | LowRank | Sequence[npt.ArrayLike] | Layered
#: X (d_y, k) and Y (d_x, k) of X Y^T; None for Y = I.
Factors = tuple[FloatArray, FloatArray | None]

#: Largest smaller side of a matrix that is decomposed directly.
_SMALL: Final = 256
_MAX_SWEEPS: Final = 40
#: Smallest ratio of Cholesky pivots for which Cholesky is accurate enough to orthonormalise rows.
_MIN_PIVOT_RATIO: Final = 1e-6
#: Largest number of flops of a sparse product that runs on one thread.
_SINGLE_THREAD_FLOPS: Final = 2e8


def split_layers(weights: Sequence[FloatArray]) -> tuple[FloatArray | None, FloatArray | None]:
    """Return X (d_L, p) and Y (p, d_0) with ``W_{L:1} = X Y``, p the smallest width; None for I.

    The products start at the layer of width p, so that each of them has p as one of its sizes.
    """
    widths = widths_of(weights)
    pivot = int(np.argmin(widths))
    above: FloatArray | None = None
    below: FloatArray | None = None
    for weight in weights[pivot:]:
        above = weight if above is None else multiply(weight, above)
    for weight in reversed(weights[:pivot]):
        below = weight if below is None else multiply(below, weight)
    return above, below


def as_factors(W: MatrixOrLayers, shape: tuple[int, int], name: str = "W") -> Factors:
    """Convert a matrix, or the product of layers, to factors, and check its shape."""
    left: FloatArray
    right: FloatArray | None
    if isinstance(W, Layered):
        W = W.all_weights()
    if isinstance(W, LowRank):
        left, right = W.U * W.s, W.V
    elif isinstance(W, (list, tuple)) and len(W) > 0 and is_matrix(W[0], name):
        layers = as_layers(W, name)
        head, tail = split_layers(layers)
        left = np.asarray(tail if head is None else head)
        right = None if head is None or tail is None else tail.T
    else:
        left, right = as_matrix(W, name, symbol="end-to-end matrix"), None
    found = left.shape[0], left.shape[1] if right is None else right.shape[0]
    if found != shape:
        raise ShapeError(f"{name} has shape {found}; wanted {shape}")
    return left, right


def is_matrix(first: object, name: str) -> bool:
    """Return whether the first item of a list is a matrix, dense or sparse (which `as_layers` refuses)."""
    return is_sparse(first) or count_axes(first, f"{name}[0]") == 2


def dense_product(factors: Factors) -> FloatArray:
    """Return X Y^T."""
    left, right = factors
    return left if right is None else np.asarray(left @ right.T)


def entries_of_product(
    factors: Factors, rows: npt.NDArray[np.integer], columns: npt.NDArray[np.integer]
) -> FloatArray:
    """Return ``(X Y^T)[rows, columns]``, computed in chunks of 32 MB."""
    left, right = factors
    if right is None:
        return np.asarray(left[rows, columns])
    result = np.empty(len(rows), dtype=np.result_type(left, right))
    chunk = max(1, 2**22 // max(left.shape[1], 1))
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        np.einsum("ik,ik->i", left[rows[part]], right[columns[part]], out=result[part])
    return result


def squared_distance(factors: Factors, truth: LowRank | FloatArray) -> float:
    """Return ``||X Y^T - Phi||_F^2``; for thin factors only from the R factors of QR decompositions."""
    left, right = factors
    if isinstance(truth, LowRank) and right is not None and left.shape[1] + truth.rank < min(truth.shape):
        a = np.linalg.qr(np.hstack([left, -truth.U * truth.s]), mode="r")
        b = np.linalg.qr(np.hstack([right, truth.V]), mode="r")
        return float(np.linalg.norm(np.asarray(a) @ np.asarray(b).T) ** 2)
    return float(np.linalg.norm(dense_product(factors) - as_dense(truth)) ** 2)


def threads_beside_numpy(entries: tuple[SparseRows, SparseRows], k: int) -> int:
    """Return the number of threads for a sparse product between calls of NumPy: 1, or 0 for all.

    Idle threads of OpenMP and of NumPy's BLAS slow each other down. Below a few milliseconds per product this
    costs more than the additional threads save.
    """
    return 1 if 4.0 * entries[0][2].size * k < _SINGLE_THREAD_FLOPS else 0


class LinearMap(ABC):
    """A matrix M that is accessed by products with blocks of row vectors."""

    shape: tuple[int, int]

    @abstractmethod
    def apply(self, X: FloatArray) -> FloatArray:
        """Return ``X M^T`` for X (k, n)."""

    @abstractmethod
    def apply_transpose(self, X: FloatArray) -> FloatArray:
        """Return ``X M`` for X (k, m)."""

    @abstractmethod
    def dense(self) -> FloatArray:
        """Return M as an array."""


class DenseMap(LinearMap):
    """A matrix that is stored as an array."""

    def __init__(self, matrix: FloatArray) -> None:
        self.matrix = matrix
        self.shape = matrix.shape[0], matrix.shape[1]

    def apply(self, X: FloatArray) -> FloatArray:
        """Return ``X M^T``."""
        return np.asarray(X @ self.matrix.T)

    def apply_transpose(self, X: FloatArray) -> FloatArray:
        """Return ``X M``."""
        return np.asarray(X @ self.matrix)

    def dense(self) -> FloatArray:
        """Return M."""
        return self.matrix


class SparseMap(LinearMap):
    """A sparse matrix, stored by rows and by columns."""

    def __init__(self, entries: tuple[SparseRows, SparseRows], shape: tuple[int, int]) -> None:
        self.entries = entries
        self.shape = shape

    def apply(self, X: FloatArray) -> FloatArray:
        """Return ``X M^T``; 4 n k flops for n entries."""
        return self._product(self.entries, X, self.shape[0])

    def apply_transpose(self, X: FloatArray) -> FloatArray:
        """Return ``X M``; 4 n k flops for n entries."""
        return self._product((self.entries[1], self.entries[0]), X, self.shape[1])

    @staticmethod
    def _product(entries: tuple[SparseRows, SparseRows], X: FloatArray, length: int) -> FloatArray:
        # The core has a kernel for residuals: with a zero matrix they are minus the entries.
        block = np.ascontiguousarray(X)
        zero = np.zeros((len(block), length), dtype=block.dtype)
        out = np.empty_like(zero)
        core.residual_products(entries, zero, block, out, None, threads_beside_numpy(entries, len(block)))
        return np.negative(out, out=out)

    def dense(self) -> FloatArray:
        """Return M as an array."""
        start, index, values = self.entries[0]
        result = np.zeros(self.shape)
        result[np.repeat(np.arange(self.shape[0]), np.diff(start)), index] = values
        return result


def leading_factors(matrix: LinearMap, rank: int, tolerance: float = 1e-10) -> LowRank:
    """Return the `rank` leading singular vectors and values; the values to `tolerance` times the largest.

    Block subspace iteration from a random start with ``2 rank + 8`` vectors; each sweep takes two products.
    Small matrices, and those with no more than ``2 rank + 8`` rows or columns, are decomposed directly.
    Singular vectors of nearly equal values are an arbitrary basis of their span.
    """
    m, n = matrix.shape
    count = check_count(rank, "rank", maximum=min(m, n))
    width = min(2 * count + 8, m, n)
    if min(m, n) <= max(_SMALL, width):
        left, values, right_t = np.linalg.svd(matrix.dense(), full_matrices=False)
        return LowRank(left[:, :count], values[:count], right_t[:count].T)
    right = orthonormal_rows(random_generator(0, ("leading factors",)).standard_normal((width, n)))
    left = image = right
    previous = np.full(count, np.inf)
    for _ in range(_MAX_SWEEPS):
        left = orthonormal_rows(matrix.apply(right))
        image = matrix.apply_transpose(left)
        right = orthonormal_rows(image)
        values = np.linalg.svd(image @ right.T, compute_uv=False)[:count]
        # The error of a value is quadratic in the angle of its vector.
        if np.all(np.abs(values - previous) <= tolerance * values[0]):
            break
        previous = values
    # image = left M, and all rows of it lie in the span of `right`.
    u, values, vt = np.linalg.svd(image @ right.T)
    return LowRank((u[:, :count].T @ left).T, values[:count], (vt[:count] @ right).T)


def orthonormal_rows(block: FloatArray) -> FloatArray:
    """Return an orthonormal basis of the span of the rows of a wide block.

    Cholesky twice, which is as accurate as a QR decomposition and several times as fast; a QR decomposition
    if the rows are nearly dependent.
    """
    result = block
    for _ in range(2):
        try:
            lower = np.linalg.cholesky(result @ result.T)
        except np.linalg.LinAlgError:
            break
        pivots = np.diag(lower)
        if not pivots.min() > _MIN_PIVOT_RATIO * pivots.max():
            break
        result = np.linalg.inv(lower) @ result
    else:
        return result
    return np.ascontiguousarray(np.linalg.qr(block.T)[0].T)
