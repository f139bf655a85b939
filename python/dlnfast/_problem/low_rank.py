# SPDX-License-Identifier: MIT
"""`LowRank`: a matrix of low rank, held as its singular value decomposition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray, as_matrix, as_vector, check_count
from .._support.errors import ShapeError


class LowRank:
    """A matrix held as factors: ``Phi = U diag(s) V^T``, its singular value decomposition.

    Parameters
    ----------
    U : array_like, shape (d_y, r)
        Left singular vectors, orthonormal columns. r may be 0.
    s : array_like, shape (r,)
        Singular values, descending and not negative.
    V : array_like, shape (d_x, r)
        Right singular vectors, orthonormal columns.

    Raises
    ------
    ShapeError
        If the shapes of the factors do not match.
    ValueError
        If columns are not orthonormal, or singular values are negative or not descending.

    Notes
    -----
    Float32 factors stay float32; factors of mixed precision become float64. O((d_x + d_y) r) memory.

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast import LowRank
    >>> target = LowRank([[1.0], [0.0]], [3.0], [[0.0], [1.0], [0.0]])
    >>> target.shape, target.rank
    ((2, 3), 1)
    >>> target.dense()
    array([[0., 3., 0.],
           [0., 0., 0.]])
    """

    def __init__(self, U: npt.ArrayLike, s: npt.ArrayLike, V: npt.ArrayLike) -> None:
        values = as_vector(s, "s", symbol="singular values", empty=True)
        left = as_matrix(U, "U", shape=(None, values.size), symbol="left singular vectors", empty=True)
        right = as_matrix(V, "V", shape=(None, values.size), symbol="right singular vectors", empty=True)
        dtype = np.result_type(left, values, right)
        self.U = check_orthonormal(left, "U").astype(dtype, copy=False)
        self.V = check_orthonormal(right, "V").astype(dtype, copy=False)
        self.s = values.astype(dtype, copy=False)
        if np.any(self.s < 0) or np.any(np.diff(self.s) > 0):
            raise ValueError(f"s (singular values) is {self.s}; wanted descending values, none negative")

    @property
    def shape(self) -> tuple[int, int]:
        """(d_y, d_x)."""
        return self.U.shape[0], self.V.shape[0]

    @property
    def rank(self) -> int:
        """r, the number of singular values, including zeros."""
        return int(self.s.size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Precision of the factors."""
        return self.s.dtype

    @property
    def T(self) -> LowRank:
        """The transpose, ``V diag(s) U^T``."""
        return LowRank(self.V, self.s, self.U)

    def dense(self) -> FloatArray:
        """Return ``U diag(s) V^T`` as an array of shape (d_y, d_x)."""
        product: FloatArray = (self.U * self.s) @ self.V.T
        return product

    def truncated(self, rank: int) -> LowRank:
        """Return the best approximation of at most this rank: the leading factors.

        Parameters
        ----------
        rank : int
            Largest rank, at least 0.

        Returns
        -------
        LowRank
            Views of the factors; this object itself if its rank is not larger.

        Raises
        ------
        ValueError
            If the rank is negative.
        """
        count = check_count(rank, "rank", minimum=0)
        if count >= self.rank:
            return self
        return LowRank(self.U[:, :count], self.s[:count], self.V[:, :count])

    def astype(self, dtype: npt.DTypeLike) -> LowRank:
        """Convert to another precision; the factors are again orthonormal to rounding.

        Parameters
        ----------
        dtype : dtype
            float64 or float32.

        Returns
        -------
        LowRank
            This object itself if it has this precision already; otherwise the cost is O((d_y + d_x) r^2).
        """
        if self.dtype == np.dtype(dtype):
            return self
        # After a cast alone, U and V would be orthonormal to the lower of the two precisions only.
        left, left_triangle = np.linalg.qr(self.U.astype(dtype))
        right, right_triangle = np.linalg.qr(self.V.astype(dtype))
        u, s, vt = np.linalg.svd((left_triangle * self.s.astype(dtype)) @ right_triangle.T)
        return LowRank(left @ u, s, right @ vt.T)

    def __repr__(self) -> str:
        """Return the shape, rank and precision."""
        return f"LowRank({self.shape[0]} x {self.shape[1]}, rank {self.rank}, {self.dtype})"


def check_orthonormal(vectors: FloatArray, name: str) -> FloatArray:
    """Return `vectors` if its columns are orthonormal to rounding; raise ValueError otherwise."""
    if vectors.shape[0] == 0:
        raise ShapeError(f"{name} is empty: shape {vectors.shape}")
    wide = vectors.astype(np.float64, copy=False)
    deviation = float(np.linalg.norm(wide.T @ wide - np.eye(vectors.shape[1])))
    # QR and SVD routines have errors of a few eps per column; inner products of long columns add to that.
    limit = 1000 * float(np.finfo(vectors.dtype).eps) * math.sqrt(max(vectors.shape[1], 1))
    if not deviation <= limit:
        raise ValueError(
            f"{name} has columns that are not orthonormal: ||{name}^T {name} - I||_F is {deviation:.1e}; "
            f"wanted at most {limit:.1e} (orthonormalise with numpy.linalg.qr or numpy.linalg.svd)"
        )
    return vectors


def as_dense(matrix: FloatArray | LowRank) -> FloatArray:
    """Return the matrix as an array."""
    return matrix.dense() if isinstance(matrix, LowRank) else matrix
