# SPDX-License-Identifier: MIT
"""Which entries a fit has seen, the best columns of a row, and rows or columns with similar factors."""

from __future__ import annotations

import zlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray
from .entries import Positions

#: Numbers that are predicted at a time.
_CHUNK: Final = 2**23


class Seen:
    """The columns of each row that have entries.

    Parameters
    ----------
    rows, columns : ndarray of int64, shape (n,)
        Indices of the entries, in any order; repeated ones count once.
    n_rows : int

    Notes
    -----
    4 bytes for each entry in memory. A pickle holds the gaps between the columns of a row, compressed: about
    1 byte for each entry.
    """

    def __init__(self, rows: Positions, columns: Positions, n_rows: int) -> None:
        key = rows * (int(columns.max(initial=0)) + 1) + columns
        if not (key[1:] > key[:-1]).all():
            order = np.argsort(key)
            rows, columns = rows[order], columns[order]
        is_first = np.ones(len(rows), np.bool_)
        is_first[1:] = (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1])
        counts = np.bincount(rows[is_first], minlength=n_rows)
        self.start: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts)])
        self.index: npt.NDArray[np.int32] = columns[is_first].astype(np.int32)

    def columns_of(self, row: int) -> npt.NDArray[np.int32]:
        """Return the columns of a row; none for a row that is not known."""
        if row + 1 >= len(self.start):
            return self.index[:0]
        return self.index[self.start[row] : self.start[row + 1]]

    def add(self, rows: Positions, columns: Positions, n_rows: int) -> Seen:
        """Return these entries and others."""
        known = np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))
        return Seen(np.append(known, rows), np.append(self.index, columns).astype(np.int64), n_rows)

    def __getstate__(self) -> dict[str, Any]:
        """Return the counts of the rows, and the gaps between their columns."""
        gaps = self.index.astype(np.int64)
        gaps[1:] -= self.index[:-1]
        filled = self.start[:-1][np.diff(self.start) > 0]
        gaps[filled] = self.index[filled]
        return {"counts": _compress(np.diff(self.start)), "gaps": _compress(gaps)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        counts, gaps = _decompress(state["counts"]), _decompress(state["gaps"])
        self.start = np.concatenate([[0], np.cumsum(counts)])
        sums = np.concatenate([[0], np.cumsum(gaps)])
        self.index = (sums[1:] - np.repeat(sums[self.start[:-1]], counts)).astype(np.int32)


def _compress(numbers: Positions) -> bytes:
    """Compress numbers below 2^32: the lowest bytes of all, then the next ones, which are mostly zero."""
    planes = numbers.astype("<u4").view(np.uint8).reshape(-1, 4).T
    return zlib.compress(planes.tobytes())


def _decompress(data: bytes) -> Positions:
    planes = np.frombuffer(zlib.decompress(data), np.uint8).reshape(4, -1)
    return np.ascontiguousarray(planes.T).view("<u4").reshape(-1).astype(np.int64)


def best_columns(
    rows: FloatArray,
    columns: FloatArray,
    offsets: FloatArray,
    count: int,
    excluded: list[npt.NDArray[np.int32]],
) -> tuple[Positions, FloatArray]:
    """Return the `count` largest values of ``rows columns^T + offsets`` in each row, and their columns.

    Parameters
    ----------
    rows : ndarray, shape (m, k)
    columns : ndarray, shape (n, k)
    offsets : ndarray, shape (n,)
        Added to all rows.
    count : int
    excluded : list of ndarray
        Columns left out, for each row.

    Returns
    -------
    (ndarray of int64, ndarray), both of shape (m, min(count, n))
        Columns, and their values, largest first; equal ones in the order of the columns. -1 and NaN after the
        last column that is not excluded.
    """
    count = min(count, len(columns))
    chosen = np.empty((len(rows), count), np.int64)
    values = np.empty((len(rows), count))
    step = max(1, _CHUNK // max(len(columns), 1))
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step] @ columns.T + offsets
        for i, left_out in enumerate(excluded[begin : begin + step]):
            part[i, left_out] = -np.inf
        for i, row in enumerate(part, begin):
            chosen[i] = _largest(row, count)
            values[i] = row[chosen[i]]
    is_none = values == -np.inf
    chosen[is_none], values[is_none] = -1, np.nan
    return chosen, values


def _largest(values: FloatArray, count: int) -> Positions:
    """Return the indices of the largest values, largest first, equal ones in their order."""
    if 0 < count < len(values):
        least = -np.partition(-values, count - 1)[count - 1]
        above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
        candidates = np.concatenate([above, equal[: count - len(above)]])
    else:
        candidates = np.arange(len(values))[:count]
    return candidates[np.lexsort((candidates, -values[candidates]))]


def normalise_rows(factors: FloatArray) -> FloatArray:
    """Return factors divided by the norms of their rows; zero ones stay zero."""
    norms = np.linalg.norm(factors, axis=1, keepdims=True)
    return np.asarray(factors / np.where(norms > 0.0, norms, 1.0))
