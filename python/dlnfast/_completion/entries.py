# SPDX-License-Identifier: MIT
"""Known entries of a matrix in all accepted forms, and the biases of rows and columns."""

from __future__ import annotations

from collections.abc import Callable
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
    read_stored_entries,
)
from .._support.errors import ShapeError

Positions = npt.NDArray[np.int64]
Vector = npt.NDArray[np.float64]
BIASES: Final = ("auto", "both", "rows", "columns", "mean", None)
DUPLICATES: Final = ("error", "mean")
#: Number of rows from which a matrix may be a file of ratings with their times, or with repeated pairs.
_LONG: Final = 50
#: Maximum number of sweeps over both biases, and the change, relative to the largest rating, that ends them.
_MOST_SWEEPS: Final = 200
_SETTLED: Final = 1e-10
#: Residuals below this share of the largest rating are rounding.
ROUNDING: Final = 1e-12


class Entries(NamedTuple):
    """Known entries of a matrix, its shape, and the weights of the entries, whose mean is 1; None: all 1."""

    rows: Positions
    columns: Positions
    values: Vector
    shape: tuple[int, int]
    weights: Vector | None = None

    def take(self, part: Positions) -> Entries:
        """Return some of the entries."""
        weights = None if self.weights is None else self.weights[part]
        return Entries(self.rows[part], self.columns[part], self.values[part], self.shape, weights)

    def mean(self, values: FloatArray) -> float:
        """Return the weighted mean of some numbers, one for each entry."""
        return float(np.average(values, weights=self.weights))


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
        The ratings r; their weights multiply the squares, and count as numbers of ratings.
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
    i, j, r, shape, weights = entries
    mean = entries.mean(r) if which is not None else 0.0
    residual = r - mean
    a, b = np.zeros(shape[0]), np.zeros(shape[1])
    # A divisor of 0 belongs to a sum of 0.
    share_a, share_b = (
        1.0 / np.maximum(np.bincount(index, weights, n) + lam, np.finfo(np.float64).tiny)
        for index, n, lam in ((i, shape[0], penalty[0]), (j, shape[1], penalty[1]))
    )
    settled = _SETTLED * float(np.max(np.abs(r)))

    def weigh(values: FloatArray) -> FloatArray:
        return values if weights is None else values * weights

    for _ in range(sweeps):
        moved = 0.0
        if which in ("both", "columns"):
            before = b
            b = np.bincount(j, weigh(residual - a[i]), shape[1]) * share_b
            moved = float(np.max(np.abs(b - before)))
        if which in ("both", "rows"):
            before = a
            a = np.bincount(i, weigh(residual - b[j]), shape[0]) * share_a
            moved = max(moved, float(np.max(np.abs(a - before))))
        if which != "both" or moved <= settled:
            break
    return Biases(mean, a, b)


def read_matrix(X: Any, may_be_pairs: bool = False) -> tuple[Positions, Positions, Vector, tuple[int, int]]:
    """Return the known entries of a matrix with gaps, or the stored ones of a sparse matrix, and its shape.

    Unless `may_be_pairs` is true, index pairs without gaps in two or three columns are refused.
    """
    if is_sparse(X):
        rows, columns, values, shape = read_stored_entries(X, "X")
        known = as_vector(values, "X (known entries)", dtype=np.float64, empty=True)
        return np.asarray(rows, np.int64), np.asarray(columns, np.int64), known, shape
    array = as_array(X, "X", missing=True)
    if array.ndim != 2:
        raise ShapeError(f"X {_describe(X, array)}; wanted a matrix (2 axes), or pairs (n, 2) and y")
    if array.dtype.kind in "USO" and array.shape[1] in (2, 3):
        raise TypeError(
            f"X has dtype {array.dtype} and shape {array.shape}, and y is None; wanted pairs and their "
            'ratings (X, y), numbers, or EntryOptions(form="long") for columns (row, column, rating)'
        )
    whole = as_matrix(array, "X", finite=False, empty=True)
    if not may_be_pairs and _are_pairs(whole):
        raise ValueError(
            f"X has shape {whole.shape} and no gap, and y is None: it looks like index pairs, not like "
            "a matrix with NaNs; wanted fit(pairs, ratings) with pairs of shape (n, 2), or entries.form "
            '"long" for columns (row, column, rating), or "wide" for a matrix. If the integers are ids, pass '
            'them as strings or categories, such as DataFrame.astype("category")'
        )
    rows, columns = np.nonzero(~np.isnan(whole))
    known = as_vector(whole[rows, columns], "X (known entries)", dtype=np.float64, empty=True)
    return rows, columns, known, (whole.shape[0], whole.shape[1])


def _are_pairs(array: npt.NDArray[Any]) -> bool:
    """Return whether a matrix looks like index pairs, with values and, if it is long, times.

    It then has no gap, and the first two columns have integers from 0 in distinct, or mostly distinct, rows.
    """
    is_long = len(array) >= _LONG
    if len(array) <= 3 or not 2 <= array.shape[1] <= (4 if is_long else 3):
        return False
    pairs = array[:, :2]
    whole = np.isfinite(array).all() and (pairs >= 0).all() and (pairs == np.floor(pairs)).all()
    return bool(whole) and len(np.unique(pairs, axis=0)) >= len(pairs) * (0.5 if is_long else 1.0)


def _describe(X: object, array: npt.NDArray[Any]) -> str:
    """Return the type of something that is no array, and the shape of an array, for a message."""
    return f"has shape {array.shape}" if array.ndim else f"is {type(X).__name__}"


def _read_integers(X: Any, name: str) -> Positions:
    """Read integers; the error for other numbers says that positions are meant."""
    try:
        return as_integers(X, name)
    except TypeError as error:
        raise TypeError(f"{error} from 0, or ids of another type, such as strings") from None


def read_indices(X: Any, name: str) -> Positions:
    """Read a vector of integers from 0."""
    found = _read_integers(X, name)
    if found.size > 0 and found.min() < 0:
        n = int(np.argmax(found < 0))
        raise ValueError(f"{name} is {found[n]} at {n}; wanted indices from 0")
    return np.ascontiguousarray(found)


def read_pairs(X: Any) -> tuple[Positions, Positions]:
    """Read pairs of integers from 0, shape (n, 2)."""
    array = as_array(X, "X")
    if array.ndim == 1 and array.size == 0:
        array = array.reshape(0, 2)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ShapeError(f"X {_describe(X, array)}; wanted pairs (row, column) of shape (n, 2)")
    pairs = _read_integers(array, "X")
    if pairs.size > 0 and pairs.min() < 0:
        n = int(np.argmax(pairs.min(axis=1) < 0))
        raise ValueError(f"X[{n}] is ({pairs[n, 0]}, {pairs[n, 1]}); wanted indices from 0")
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def check_shape(shape: Any, found: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of a matrix with entries up to (rows, columns) `found`."""
    n_rows, n_columns = as_pair(shape, "entries.shape", "two integers, (rows, columns)")
    sizes = check_count(n_rows, "entries.shape[0]"), check_count(n_columns, "entries.shape[1]")
    if found[0] > sizes[0] or found[1] > sizes[1]:
        raise ValueError(
            f"X reaches row {found[0] - 1} and column {found[1] - 1}; entries.shape is {sizes}, which ends "
            f"at ({sizes[0] - 1}, {sizes[1] - 1})"
        )
    return sizes


def merge_duplicates(
    entries: Entries, duplicates: str, describe: Callable[[int, int], str] = "({}, {})".format
) -> Entries:
    """Sort the entries by rows and columns, and merge those of one index pair.

    Both ratings of a pair, and their weights, are replaced by the means. `describe` names a pair in messages.
    """
    key = entries.rows * entries.shape[1] + entries.columns
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    start = np.flatnonzero(first)
    merged = entries.take(order)
    if start.size == key.size:
        return merged
    if duplicates == "error":
        again = int(np.flatnonzero(~first)[0])
        raise ValueError(
            f"X has {describe(int(merged.rows[again]), int(merged.columns[again]))} twice, rated "
            f"{merged.values[again - 1]:g} and {merged.values[again]:g}; wanted each index pair once, or "
            'EntryOptions(duplicates="mean")'
        )
    weights = np.ones(key.size) if merged.weights is None else merged.weights
    total = np.add.reduceat(weights, start)
    values = np.add.reduceat(weights * merged.values, start) / total
    mean_weights = None if merged.weights is None else total / np.diff(np.append(start, key.size))
    return merged.take(start)._replace(values=values, weights=mean_weights)
