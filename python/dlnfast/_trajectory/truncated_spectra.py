# SPDX-License-Identifier: MIT
"""Measures of a spectrum from its leading singular values and the norm of the matrix."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray

_Table = npt.NDArray[np.float64]


def measure_energy_share(values: _Table, k: int, norm: _Table | None = None) -> _Table:
    """Return the share of the squared Frobenius norm in the k largest singular values, at all records.

    Parameters
    ----------
    values : ndarray, shape (n_records, n)
        Leading singular values, descending.
    k : int
        At most n.
    norm : ndarray, shape (n_records,), optional
        Frobenius norms; by default those of the values.

    Returns
    -------
    ndarray, shape (n_records,)
    """
    # In units of the largest: squares of values far from 1 may overflow or vanish.
    unit = np.where(values[:, 0] > 0, values[:, 0], 1.0)
    values = values / unit[:, None]
    whole = np.linalg.norm(values, axis=1) if norm is None else norm / unit
    top = np.linalg.norm(values[:, :k], axis=1)
    share = np.divide(top, whole, out=np.zeros_like(top), where=whole > 0)
    result: _Table = np.minimum(share, 1.0) ** 2
    return result


def bound_unrecorded(values: FloatArray, norm: float | None) -> float:
    """Return a bound on the other singular values of a matrix, infinite where its norm is not known.

    Parameters
    ----------
    values : ndarray, shape (n,)
        Leading singular values, in the precision of their computation.
    norm : float or None
        Frobenius norm.

    Returns
    -------
    float
    """
    if norm is None or not math.isfinite(norm):
        return math.inf
    if norm == 0.0:
        return 0.0
    rounding = len(values) * float(np.finfo(values.dtype).eps)
    share = float(np.sum((values.astype(np.float64) / norm) ** 2))
    return norm * math.sqrt(max(1.0 - share - rounding, 0.0))
