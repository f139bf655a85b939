# SPDX-License-Identifier: MIT
"""Orthonormal frames: Haar-distributed draws, QR with a positive diagonal, completion of a frame."""

from __future__ import annotations

import numpy as np

from .arrays import FloatArray


def haar(rows: int, cols: int, generator: np.random.Generator) -> FloatArray:
    """Draw a rows x cols matrix with orthonormal columns, or rows where it is wide, from Haar's law."""
    if rows < cols:
        return np.ascontiguousarray(haar(cols, rows, generator).T)
    return signed_q(generator.standard_normal((rows, cols)))


def signed_q(matrix: FloatArray) -> FloatArray:
    """Return Q of the QR factorisation whose R has a positive diagonal: of a Gaussian matrix, Haar's law."""
    q, r = np.linalg.qr(matrix)
    return np.asarray(q * np.where(np.diagonal(r) < 0, -1.0, 1.0).astype(q.dtype))


def join_frames(frame: FloatArray, others: FloatArray) -> FloatArray:
    """Return `frame` and the part of `others` outside of it, all orthonormal."""
    for _ in range(2):  # the second round removes what rounding, amplified by the first, left
        others = signed_q(others - frame @ (frame.T @ others))
    return np.hstack([frame, others])
