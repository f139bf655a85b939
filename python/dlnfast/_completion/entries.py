# SPDX-License-Identifier: MIT
"""Known entries of a matrix in all accepted forms, and the biases of rows and columns."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .._support.arrays import (
    FloatArray,
    as_array,
    as_integers,
    as_matrix,
    as_pair,
    as_vector,
    check_count,
    is_sparse,
    read_known_values,
    read_stored_entries,
)
from .._support.errors import ShapeError

Positions = npt.NDArray[np.int64]
Vector = npt.NDArray[np.float64]
BIASES: Final = ("auto", "both", "rows", "columns", "mean", None)
DUPLICATES: Final = ("error", "mean")
#: Maximum number of sweeps over both biases, and the change, relative to the largest rating, that ends them.
_MOST_SWEEPS: Final = 200
_SETTLED: Final = 1e-10
#: Residuals below this share of the largest rating are rounding.
ROUNDING: Final = 1e-12


class Entries(NamedTuple):
    """Known entries of a matrix, and its shape."""

    rows: Positions
    columns: Positions
    values: Vector
    shape: tuple[int, int]


class Biases(NamedTuple):
    """The mean of all ratings, and the biases of rows and columns that are added to it."""

    mean: float
    rows: Vector
    columns: Vector

    def at(self, rows: Positions, columns: Positions) -> Vector:
        """Return mean and biases at some index pairs."""
        return np.asarray(self.mean + self.rows[rows] + self.columns[columns])


def fit_biases(
    entries: Entries,
    which: str | None = "both",
    penalty: tuple[float, float] = (0.0, 0.0),
    sweeps: int = _MOST_SWEEPS,
) -> Biases:
    r"""Fit the mean, and biases a, b by ridge regression.

    .. math:: \sum_{ij} (r_{ij} - \mu - a_i - b_j)^2 + \lambda_a \sum_i a_i^2 + \lambda_b \sum_j b_j^2

    Parameters
    ----------
    entries : Entries
        The ratings r.
    which : {"both", "rows", "columns", "mean", None}
        Which biases are fitted; the others are zero, and with None so is the mean.
    penalty : (float, float)
        lambda_a and lambda_b: the bias of a row with n ratings is its mean residual times
        ``n / (n + lambda_a)``.
    sweeps : int
        Maximum number of sweeps over rows and columns.

    Returns
    -------
    Biases

    Notes
    -----
    mu is the mean of the ratings, without a penalty. The biases of rows and of columns are minimised
    alternately in closed form: block coordinate descent on a convex problem, O(n) per sweep. Rows and columns
    without ratings get 0.

    Koren, Bell, Volinsky, "Matrix factorization techniques for recommender systems", Computer 42 (2009).
    """
    i, j, r, shape = entries
    mean = float(np.mean(r)) if which is not None else 0.0
    residual = r - mean
    a, b = np.zeros(shape[0]), np.zeros(shape[1])
    # A divisor of 0 belongs to a sum of 0.
    share_a, share_b = (
        1.0 / np.maximum(np.bincount(index, minlength=n) + lam, np.finfo(np.float64).tiny)
        for index, n, lam in ((i, shape[0], penalty[0]), (j, shape[1], penalty[1]))
    )
    settled = _SETTLED * float(np.max(np.abs(r)))
    for _ in range(sweeps):
        moved = 0.0
        if which in ("both", "columns"):
            before = b
            b = np.bincount(j, residual - a[i], minlength=shape[1]) * share_b
            moved = float(np.max(np.abs(b - before)))
        if which in ("both", "rows"):
            before = a
            a = np.bincount(i, residual - b[j], minlength=shape[0]) * share_a
            moved = max(moved, float(np.max(np.abs(a - before))))
        if which != "both" or moved <= settled:
            break
    return Biases(mean, a, b)


def read_entries(X: Any, y: npt.ArrayLike | None, shape: tuple[int, int] | None) -> Entries:
    """Read the known entries from any of the three forms."""
    if is_sparse(X):
        if y is not None:
            raise TypeError("y is set, but the sparse matrix X holds its values itself; wanted y=None")
        rows, columns, values, found = read_stored_entries(X, "X")
    elif y is None:
        rows, columns, values, found = _known_of_array(X)
    else:
        rows, columns = read_pairs(X)
        values, which, count = read_known_values(y, "y (ratings)")
        if count != rows.size:
            raise ShapeError(f"y (ratings) has {count} values; wanted {rows.size}, one for each pair")
        found = (int(rows.max(initial=-1)) + 1, int(columns.max(initial=-1)) + 1)
        if shape is not None:
            found = _check_fits(shape, found)
        rows, columns = rows[which], columns[which]
    if values.size == 0:
        raise ValueError("X has no known entries; wanted at least one")
    known = as_vector(values, "X (known entries)", dtype=np.float64)
    if shape is not None and y is None and tuple(shape) != tuple(found):
        raise ShapeError(f"shape is {tuple(shape)}, but X has shape {tuple(found)}")
    # Explicit copies, so that the caller's arrays are neither changed nor referred to.
    return Entries(
        np.array(rows, np.int64), np.array(columns, np.int64), np.array(known), (int(found[0]), int(found[1]))
    )


def _known_of_array(X: Any) -> tuple[Positions, Positions, FloatArray, tuple[int, int]]:
    array = as_array(X, "X", missing=True)
    if array.ndim != 2:
        raise ShapeError(f"X has shape {array.shape}; wanted a matrix (2 axes), or pairs (n, 2) and y")
    whole = as_matrix(array, "X", finite=False, empty=True)
    if whole.shape[1] in (2, 3) and len(whole) > 3 and _are_indices(whole[:, :2]):
        raise ValueError(
            f"X has shape {whole.shape} and no gap, and y is None: it looks like index pairs, not like "
            "a matrix with NaNs; wanted fit(pairs, ratings) with pairs of shape (n, 2)"
        )
    rows, columns = np.nonzero(~np.isnan(whole))
    return rows, columns, whole[rows, columns], (whole.shape[0], whole.shape[1])


def _are_indices(array: npt.NDArray[Any]) -> bool:
    """Return whether these are integers from 0 in distinct rows."""
    whole = np.isfinite(array).all() and (array >= 0).all() and (array == np.floor(array)).all()
    return bool(whole) and len(np.unique(array, axis=0)) == len(array)


def read_pairs(X: Any) -> tuple[Positions, Positions]:
    array = as_array(X, "X")
    if array.ndim != 2 or array.shape[1] != 2:
        raise ShapeError(f"X has shape {array.shape}; wanted pairs (row, column) of shape (n, 2)")
    pairs = as_integers(array, "X")
    if pairs.size > 0 and pairs.min() < 0:
        n = int(np.argmax(pairs.min(axis=1) < 0))
        raise ValueError(f"X[{n}] is ({pairs[n, 0]}, {pairs[n, 1]}); wanted indices from 0")
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def _check_fits(shape: Any, found: tuple[int, int]) -> tuple[int, int]:
    n_rows, n_columns = as_pair(shape, "shape", "two integers, (rows, columns)")
    sizes = check_count(n_rows, "shape[0]"), check_count(n_columns, "shape[1]")
    if found[0] > sizes[0] or found[1] > sizes[1]:
        raise ValueError(
            f"X reaches row {found[0] - 1} and column {found[1] - 1}; shape is {sizes}, which ends at "
            f"({sizes[0] - 1}, {sizes[1] - 1})"
        )
    return sizes


def merge_duplicates(entries: Entries, duplicates: str) -> Entries:
    """Sort the entries by rows and columns, and merge those of one index pair."""
    key = entries.rows * entries.shape[1] + entries.columns
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    start = np.flatnonzero(first)
    rows, columns, values = entries.rows[order], entries.columns[order], entries.values[order]
    if start.size < key.size:
        if duplicates == "error":
            again = int(np.flatnonzero(~first)[0])
            raise ValueError(
                f"X has ({rows[again]}, {columns[again]}) twice, rated {values[again - 1]:g} and "
                f'{values[again]:g}; wanted each index pair once, or duplicates="mean"'
            )
        counts = np.diff(np.append(start, key.size))
        values = np.add.reduceat(values, start) / counts
        rows, columns = rows[start], columns[start]
    return Entries(rows, columns, values, entries.shape)
