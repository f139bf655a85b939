# SPDX-License-Identifier: MIT
"""Sums and products of matrices in more than float64 precision, as unevaluated sums of two float64 arrays.

Products are computed by BLAS. Each factor is split, row by row, into leading bits and a remainder. There are
so few leading bits that inner products of leading parts are exact in float64; only the contributions of the
remainders are rounded. This is the error-free transformation of Ozaki, Ogita, Oishi, Rump, "Error-free
transformations of matrix multiplication by using fast routines of matrix multiplication and its
applications", Numerical Algorithms 59 (2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from .arrays import FloatArray

#: Largest inner size of one product: leading parts have (53 - 11) / 2 = 21 bits, errors are near eps / 2^21.
MAX_INNER_SIZE: Final = 2**11
#: Number of entries that `Pair.add` handles at a time: six arrays of this size fit in the second-level cache.
_BLOCK: Final = 2**13


class Pair:
    """The array ``value + correction``, an unevaluated sum of two float64 arrays.

    Attributes
    ----------
    value : ndarray, C-contiguous
    correction : ndarray of the same shape, or None
        Low-order part, which may exceed half a unit in the last place of `value`; None means 0.
    """

    __slots__ = ("correction", "value")

    def __init__(self, value: FloatArray, correction: FloatArray | None = None) -> None:
        self.value = value
        self.correction = correction

    def add(self, other: Pair) -> None:
        """Add `other` in place; ``a + b`` equals ``b + a`` bit for bit.

        The sum of the values is split without error into a value and a correction (Knuth's two-sum).
        """
        if self.correction is None:
            self.correction = np.zeros_like(self.value)
        value, correction = self.value.reshape(-1), self.correction.reshape(-1)
        other_value = other.value.reshape(-1)
        other_correction = None if other.correction is None else other.correction.reshape(-1)
        for start in range(0, value.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            total, error = _two_sum(value[part], other_value[part])
            if other_correction is not None:
                correction[part] += other_correction[part]
            correction[part] += error
            value[part] = total

    def subtract(self, other: Pair) -> Pair:
        """Return the difference as a new pair."""
        result = self.copy()
        result.add(other.map(np.negative))
        return result.normalise()

    def normalise(self) -> Pair:
        """Return an equal pair whose corrections are at most half a unit in the last place."""
        if self.correction is None:
            return self
        return Pair(*_two_sum(self.value, self.correction))

    def round(self) -> FloatArray:
        """Return the numbers rounded to float64, as a new array."""
        return self.value.copy() if self.correction is None else self.value + self.correction

    def sum(self) -> float:
        """Return the sum of the entries of a vector, rounded once."""
        return math.fsum([*self.value, *(() if self.correction is None else self.correction)])

    def copy(self) -> Pair:
        """Return a copy."""
        return self.map(np.copy)

    def map(self, function: Callable[[FloatArray], FloatArray]) -> Pair:
        """Apply a linear function that does not round to both arrays, and return the new pair."""
        return Pair(function(self.value), None if self.correction is None else function(self.correction))


class Split(NamedTuple):
    """A matrix ``leading + remainder``, split into leading bits and a remainder; None is a remainder of 0."""

    leading: FloatArray
    remainder: FloatArray | None

    def join(self) -> FloatArray:
        """Return ``leading + remainder`` as float64."""
        return self.leading if self.remainder is None else self.leading + self.remainder


def split(matrix: FloatArray | Pair) -> Split:
    """Split a matrix so that inner products of the leading parts of its rows are exact.

    The leading part is rounded, row by row, to multiples of ``2^-b`` times the power of two above the largest
    entry; if ``2 b + log2(columns) <= 53``, the inner product of two such rows is not rounded.
    """
    value = matrix.value if isinstance(matrix, Pair) else matrix
    bits = (53 - (value.shape[1] - 1).bit_length()) // 2
    largest = np.maximum(value.max(axis=1), -value.min(axis=1))
    # Adding and subtracting a number whose unit in the last place is the step rounds to that step.
    shift = np.ldexp(1.5, np.frexp(largest)[1] - bits + 52)[:, np.newaxis]
    leading = (value + shift) - shift
    remainder = value - leading
    if isinstance(matrix, Pair) and matrix.correction is not None:
        remainder += matrix.correction
    return Split(leading, remainder if remainder.any() else None)


def product(a: Split, b: Split) -> Pair:
    """Return ``a b^T``, with errors near ``eps / 2^21 |a| |b|^T``; exact if both remainders are 0."""
    value = a.leading @ b.leading.T
    if a.remainder is None and b.remainder is None:
        return Pair(value)
    correction = np.zeros_like(value)
    if b.remainder is not None:
        correction += a.leading @ b.remainder.T
    if a.remainder is not None:
        correction += a.remainder @ b.join().T
    return Pair(value, correction)


def gram(a: Split) -> Pair:
    """Return ``a a^T``, exactly symmetric, as accurate as `product`."""
    value = a.leading @ a.leading.T
    if a.remainder is None:
        return Pair(value)
    half = (a.leading + 0.5 * a.remainder) @ a.remainder.T
    return Pair(value, half + half.T)


def row_sums(a: Split) -> Pair:
    """Return the sum of each row."""
    return Pair(a.leading.sum(axis=1), None if a.remainder is None else a.remainder.sum(axis=1))


def squared_row_norms(a: Split) -> Pair:
    """Return the squared Euclidean norm of each row."""
    value = np.sum(a.leading * a.leading, axis=1)
    if a.remainder is None:
        return Pair(value)
    return Pair(value, np.sum((a.leading + a.join()) * a.remainder, axis=1))


def quotient(a: Pair, divisor: int) -> Pair:
    """Return a vector divided by an integer below 2^53."""
    value = a.round() / divisor
    back = product(split(value[:, np.newaxis]), split(np.array([[float(divisor)]])))
    residual = a.map(lambda part: part[:, np.newaxis]).subtract(back)
    return Pair(value, residual.round()[:, 0] / divisor)


def _two_sum(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the rounded sum and its rounding error, which is exact (Knuth)."""
    total = a + b
    part_of_b = total - a
    return total, (a - (total - part_of_b)) + (b - part_of_b)
