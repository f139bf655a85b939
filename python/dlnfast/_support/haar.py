# SPDX-License-Identifier: MIT
"""Orthonormal frames: Haar-distributed samples, QR with a positive diagonal, extension of a frame."""

from __future__ import annotations

import numpy as np

from .arrays import FloatArray


def haar(rows: int, cols: int, generator: np.random.Generator) -> FloatArray:
    """Draw a Haar-distributed matrix with orthonormal columns, or orthonormal rows if it is wide."""
    if rows < cols:
        return np.ascontiguousarray(haar(cols, rows, generator).T)
    return signed_q(generator.standard_normal((rows, cols)))


def signed_q(matrix: FloatArray) -> FloatArray:
    """Return Q of the QR factorisation with a positive diagonal of R.

    Q is Haar-distributed if the matrix is Gaussian.
    """
    q, r = np.linalg.qr(matrix)
    return np.asarray(q * np.where(np.diagonal(r) < 0, -1.0, 1.0).astype(q.dtype))


def join_frames(frame: FloatArray, others: FloatArray) -> FloatArray:
    """Return `frame` and the part of `others` orthogonal to it, as one matrix of orthonormal columns."""
    for _ in range(2):  # twice is enough: the second round removes the rounding error of the first
        others = signed_q(others - frame @ (frame.T @ others))
    return np.hstack([frame, others])
