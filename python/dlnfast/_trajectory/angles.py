# SPDX-License-Identifier: MIT
"""Angles between the singular vectors of the records and reference vectors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .. import reference as plain
from .._support.arrays import FloatArray, frobenius_norm
from .._support.errors import ShapeError
from .._support.products import multiply


def is_limit(reference: str) -> bool:
    """Return True for "limit".

    Raises
    ------
    ValueError
        For any other name.
    """
    if not isinstance(reference, str) or reference != "limit":
        raise ValueError(f'reference is {reference!r}; wanted "limit", "first_step" or an array')
    return True


def compute_scale(weight: FloatArray) -> float:
    """Return the root mean square of the singular values of a matrix: eps of a scaled isometry."""
    return frobenius_norm(weight) / float(np.sqrt(max(min(weight.shape), 1)))


def is_scaled_isometry(weight: FloatArray) -> bool:
    """Return whether all singular values of a matrix are equal, to rounding."""
    scale = compute_scale(weight)
    if scale == 0.0:
        return False
    small = weight if weight.shape[0] <= weight.shape[1] else weight.T
    departure = multiply(small, small, transpose_b=True) / scale**2 - np.eye(len(small))
    return bool(np.abs(departure).max() < 1024 * np.finfo(weight.dtype).eps)


def compute_limit(weight: FloatArray, gradient: FloatArray, side: str) -> FloatArray:
    """Return the singular vectors of W_l(t) for t -> 0+, where W_l(0) is a scaled isometry."""
    left, right = plain.limit_vectors(weight, gradient, compute_scale(weight))
    return left if side == "left" else right


def measure_angles(vectors: FloatArray, chosen: FloatArray, start: int) -> npt.NDArray[np.float64]:
    """Return the angles between vectors and reference vectors of the same index, at all records.

    Parameters
    ----------
    vectors : ndarray, shape (n_records, d, k)
        Vectors as columns.
    chosen : ndarray, shape (d, k)
        Reference vectors.
    start : int
        Index of the first record to compare; the angles of earlier records are 0.

    Returns
    -------
    ndarray, shape (n_records, k)
    """
    result = np.zeros((len(vectors), vectors.shape[2]))
    for i in range(start, len(vectors)):
        result[i] = plain.angle(vectors[i], chosen)
    return result


def measure_block_angles(
    vectors: FloatArray, chosen: FloatArray, start: int, n_top: int, n_bottom: int
) -> npt.NDArray[np.float64]:
    """Return angles vector by vector at both ends, and the largest principal angle of the block between.

    The vectors in the middle share a singular value, so that only their span is determined.

    Parameters
    ----------
    vectors, chosen, start : ndarray, ndarray, int
        See `measure_angles`.
    n_top, n_bottom : int
        Number of vectors before and after the block.

    Returns
    -------
    ndarray, shape (n_records, k)

    Raises
    ------
    ShapeError
        If the shapes of the vectors differ.
    """
    if vectors.shape[1:] != chosen.shape:
        raise ShapeError(f"reference has shape {chosen.shape}; wanted {vectors.shape[1:]}")
    result = measure_angles(vectors, chosen, start)
    middle = slice(n_top, vectors.shape[2] - n_bottom)
    if middle.start < middle.stop:
        for i in range(start, len(vectors)):
            result[i, middle] = plain.principal_angles(vectors[i][:, middle], chosen[:, middle])[-1]
    return result
