# SPDX-License-Identifier: MIT
"""Sums and products of float64 matrices beyond float64, as pairs of arrays that stand for their sum.

Products are made of BLAS products. A factor is cut in two, row by row: leading bits, so few that sums of
products of them are exact in float64, and the rest. What is rounded is only what the rests contribute. The
error-free transformation of Ozaki, Ogita, Oishi, Rump, "Error-free transformations of matrix multiplication
by using fast routines of matrix multiplication and its applications", Numerical Algorithms 59 (2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from .arrays import FloatArray

#: Products summed in one go: leading parts keep (53 - 11) / 2 = 21 bits then, errors are about eps / 2^21.
MAX_INNER_SIZE: Final = 2**11
#: Entries added in one go: the intermediate results of six of them stay in the second-level cache.
_BLOCK: Final = 2**13


class Pair:
    """The array ``value + correction``, both float64, where None stands for a correction of 0.

    Attributes
    ----------
    value : ndarray, C-contiguous
    correction : ndarray of the same shape, or None
        Not necessarily below half a unit in the last place of `value`.
    """

    __slots__ = ("correction", "value")

    def __init__(self, value: FloatArray, correction: FloatArray | None = None) -> None:
        self.value = value
        self.correction = correction

    def add(self, other: Pair) -> None:
        """Add `other` in place; ``a + b`` is ``b + a`` bit for bit.

        The sum of the values is split without error into a value and a correction (Knuth's two-sum).
        """
        if self.correction is None:
            self.correction = np.zeros_like(self.value)
        mine, carried = self.value.reshape(-1), self.correction.reshape(-1)
        theirs = other.value.reshape(-1)
        more = None if other.correction is None else other.correction.reshape(-1)
        for start in range(0, mine.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            total, error = _two_sum(mine[part], theirs[part])
            if more is not None:
                carried[part] += more[part]
            carried[part] += error
            mine[part] = total

    def minus(self, other: Pair) -> Pair:
        """Return the difference as a new pair."""
        result = self.copy()
        result.add(other.mapped(np.negative))
        return result.normalised()

    def normalised(self) -> Pair:
        """Return the same numbers with corrections of at most half a unit in the last place."""
        if self.correction is None:
            return self
        return Pair(*_two_sum(self.value, self.correction))

    def rounded(self) -> FloatArray:
        """Return the numbers as float64, a new array."""
        return self.value.copy() if self.correction is None else self.value + self.correction

    def total(self) -> float:
        """Return the sum of a vector, rounded once."""
        return math.fsum([*self.value, *(() if self.correction is None else self.correction)])

    def copy(self) -> Pair:
        """Return a pair of copies."""
        return self.mapped(np.copy)

    def mapped(self, change: Callable[[FloatArray], FloatArray]) -> Pair:
        """Return the pair of what a linear `change` without rounding makes of both arrays."""
        return Pair(change(self.value), None if self.correction is None else change(self.correction))


class Split(NamedTuple):
    """A matrix cut into leading bits and the rest, None for a rest of 0: ``first + rest``."""

    first: FloatArray
    rest: FloatArray | None

    def whole(self) -> FloatArray:
        """Return ``first + rest`` as float64."""
        return self.first if self.rest is None else self.first + self.rest


def split(matrix: FloatArray | Pair) -> Split:
    """Cut a matrix so that its leading part is exact in products along its rows.

    The leading part is rounded, row by row, to multiples of ``2^-b`` of the power of two above the largest
    entry; with ``2 b + log2(columns) <= 53`` sums of products of two such rows have no rounding.
    """
    value = matrix.value if isinstance(matrix, Pair) else matrix
    bits = (53 - (value.shape[1] - 1).bit_length()) // 2
    largest = np.maximum(value.max(axis=1), -value.min(axis=1))
    # Adding and subtracting a number whose unit in the last place is the step rounds to that step.
    shift = np.ldexp(1.5, np.frexp(largest)[1] - bits + 52)[:, np.newaxis]
    first = (value + shift) - shift
    rest = value - first
    if isinstance(matrix, Pair) and matrix.correction is not None:
        rest += matrix.correction
    return Split(first, rest if rest.any() else None)


def product(a: Split, b: Split) -> Pair:
    """Return ``a b^T``, with errors of about eps / 2^21 of ``|a| |b|^T``; exact where there are no rests."""
    value = a.first @ b.first.T
    if a.rest is None and b.rest is None:
        return Pair(value)
    correction = np.zeros_like(value)
    if b.rest is not None:
        correction += a.first @ b.rest.T
    if a.rest is not None:
        correction += a.rest @ b.whole().T
    return Pair(value, correction)


def gram(a: Split) -> Pair:
    """Return ``a a^T``, exactly symmetric, as accurate as `product`."""
    value = a.first @ a.first.T
    if a.rest is None:
        return Pair(value)
    half = (a.first + 0.5 * a.rest) @ a.rest.T
    return Pair(value, half + half.T)


def row_sums(a: Split) -> Pair:
    """Return the sums of the rows."""
    return Pair(a.first.sum(axis=1), None if a.rest is None else a.rest.sum(axis=1))


def squared_row_norms(a: Split) -> Pair:
    """Return the sums of the squares of the rows."""
    value = np.sum(a.first * a.first, axis=1)
    return Pair(value, None if a.rest is None else np.sum((a.first + a.whole()) * a.rest, axis=1))


def quotient(a: Pair, divisor: int) -> Pair:
    """Return a vector divided by an integer below 2^53."""
    value = a.rounded() / divisor
    back = product(split(value[:, np.newaxis]), split(np.array([[float(divisor)]])))
    rest = a.mapped(lambda part: part[:, np.newaxis]).minus(back)
    return Pair(value, rest.rounded()[:, 0] / divisor)


def _two_sum(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the rounded sum and its error."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)
