# SPDX-License-Identifier: MIT
r"""Rows and columns that are learned after a fit, by one ridge regression each, on the fitted factors.

The posterior mean of a row (x, a) with entries r_j, given the factors and biases (y_j, b_j) of the columns,
minimises

.. math::

    \frac{1}{\sigma^2} \sum_j w_j \rho_j E\left[(r_j - \mu - a - b_j - x \cdot y_j)^2\right]
    + (u - m)^T \Lambda (u - m), \qquad u = (x, a).

The prior N(m, Lambda^-1) is that of the fit, at the mean of the logarithms of the counts: the number of
entries of a new row is not yet that of a row of the fit. The covariances of the columns, which a fitted
estimator does not store, are approximated from their numbers of entries n_j:
``(n_j rho_j / sigma^2 E + Lambda)^-1``, with the mean E over all entries of the second moments of the rows. A
row that has entries already has such a covariance, too: with its mean it stands for these entries, so that
new ones are added without the old ones.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray
from .._support.dispatch import core
from .entries import Entries, Positions
from .variational import Posterior, Side, pack_means, padded_length, unpack_means, unpack_moment

#: Smallest variance in a prior, relative to the mean of the variances, and smallest eigenvalue of its
#: correlations.
_LEAST_VARIANCE: Final = 1e-10
#: Smallest variance of a bias and of the noise, relative to that of the entries.
_NOTHING: Final = 1e-12
#: Smallest mean square of the entries: its square and its inverse are finite.
_LEAST_TOTAL: Final = 1e-100
#: Passes over rows and columns that have both changed.
_PASSES: Final = 2

_PACKED: Final = ("counts", "noise_precisions")

Means = tuple[FloatArray, FloatArray]


@dataclass(frozen=True)
class FactorPrior:
    """Prior of the rows u = (x, a) of one factor, and the information on the rows that are known.

    Attributes
    ----------
    mean : ndarray, shape (k + 1,)
        m.
    precision : ndarray, shape (k + 1, k + 1)
        Lambda.
    second_moment : ndarray, shape (k + 1, k + 1)
        E: mean over all entries of the second moment of (x, 1).
    counts : ndarray of float32, shape (n,)
        Sum of the weights of the entries of each row.
    noise_precisions : ndarray of float32, shape (n,)
        Relative precision of the noise of each row.
    """

    mean: FloatArray
    precision: FloatArray
    second_moment: FloatArray
    counts: npt.NDArray[np.float32]
    noise_precisions: npt.NDArray[np.float32]

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields, with the vectors compressed: small integers, and often only ones."""
        packed = {name: zlib.compress(getattr(self, name).tobytes()) for name in _PACKED}
        return self.__dict__ | packed

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the fields."""
        packed = {name: np.frombuffer(zlib.decompress(state[name]), np.float32) for name in _PACKED}
        self.__dict__.update(state | packed)

    def resize(self, n_rows: int) -> FactorPrior:
        """Return the prior with the first rows, or with further ones of which nothing is known."""
        new = max(n_rows - len(self.counts), 0)
        return replace(
            self,
            counts=np.append(self.counts[:n_rows], np.zeros(new, np.float32)),
            noise_precisions=np.append(self.noise_precisions[:n_rows], np.ones(new, np.float32)),
        )

    def add_counts(self, rows: Positions, weights: FloatArray | None) -> FactorPrior:
        """Return the prior with further entries of some rows."""
        more = np.bincount(rows, weights, len(self.counts))
        return replace(self, counts=(self.counts + more).astype(np.float32))

    def extend_means(self, means: FloatArray, n_rows: int) -> FloatArray:
        """Return means with those of the prior for rows up to `n_rows`."""
        return np.vstack([means, np.tile(self.mean, (n_rows - len(means), 1))])


@dataclass(frozen=True)
class FoldIn:
    """What is stored of a fit to add rows and columns: the priors of both factors, and sigma^2.

    Attributes
    ----------
    sides : (FactorPrior, FactorPrior)
        Rows and columns.
    noise : float
        sigma^2.
    weight_scale : float
        Mean of the sample weights of the fit, by which they were divided.
    """

    sides: tuple[FactorPrior, FactorPrior]
    noise: float
    weight_scale: float = 1.0

    @classmethod
    def of_posterior(cls, posterior: Posterior, left: FloatArray, right: FloatArray) -> FoldIn:
        """Return the priors that a variational fit has learned, in the basis of the published factors."""
        values = np.sum(np.square(left), axis=0)
        raw = [side.means(posterior.rank)[:, :-1] for side in posterior.sides]
        # left right^T = raw[0] raw[1]^T, and the columns of both are orthogonal with norms values^(1/2).
        bases = raw[1].T @ right / values, raw[0].T @ left / values
        rows, columns = (
            _transform_side(posterior, side, basis)
            for side, basis in zip(posterior.sides, bases, strict=True)
        )
        return cls((rows, columns), posterior.noise)

    @classmethod
    def of_factors(
        cls, means: Means, entries: Entries, has_biases: tuple[bool, bool], noise: float
    ) -> FoldIn:
        """Return priors estimated from factors (x, a) and (y, b) that were learned without priors."""
        total = max(entries.mean(np.square(entries.values)), _LEAST_TOTAL)
        noise = max(noise, _NOTHING * total)
        counts = [
            np.bincount(index, entries.weights, n).astype(np.float64)
            for index, n in zip((entries.rows, entries.columns), entries.shape, strict=True)
        ]
        moments = [_second_moment(each, count) for each, count in zip(means, counts, strict=True)]
        rows, columns = (
            _estimate_side(each, count, own, other, has_bias, noise, total)
            for each, count, own, other, has_bias in zip(
                means, counts, moments, moments[::-1], has_biases, strict=True
            )
        )
        return cls((rows, columns), noise)

    def resize(self, shape: tuple[int, int]) -> FoldIn:
        """Return the state for the rows and columns of another shape."""
        rows, columns = (side.resize(n) for side, n in zip(self.sides, shape, strict=True))
        return replace(self, sides=(rows, columns))

    def add(
        self, means: Means, entries: Entries, centred: FloatArray, sides: tuple[int, ...], n_threads: int
    ) -> tuple[FoldIn, Means]:
        """Add entries to the rows (side 0), the columns (side 1), or both.

        Parameters
        ----------
        means : (ndarray, ndarray)
            (x, a) of all rows and (y, b) of all columns, with those of the prior for new ones.
        entries : Entries
            New entries.
        centred : ndarray
            Their values less mu.
        sides : tuple of int
            Which means change.
        n_threads : int
            Number of threads, as in `train`.

        Returns
        -------
        (FoldIn, (ndarray, ndarray))
            The state with the entries counted, and the means.
        """
        indices, weights = (entries.rows, entries.columns), entries.weights
        found, known = [*means], [*self.sides]
        for _ in range(_PASSES if len(sides) > 1 else 1):
            for at in sides:
                other = known[1 - at], found[1 - at]
                changed, new = self._solve(at, means[at], other, indices, centred, weights, n_threads)
                found[at] = means[at].copy()
                found[at][changed] = new
                # The covariances of the rows, seen from the columns, are those after their new entries.
                known[at] = self.sides[at].add_counts(indices[at], weights)
        return replace(self, sides=(known[0], known[1])), (found[0], found[1])

    def _solve(
        self,
        at: int,
        means: FloatArray,
        others: tuple[FactorPrior, FloatArray],
        indices: tuple[Positions, Positions],
        values: FloatArray,
        weights: FloatArray | None,
        n_threads: int,
    ) -> tuple[Positions, FloatArray]:
        """Return the rows of one side that have entries, and their posterior means."""
        own, (other, other_means) = self.sides[at], others
        rank = means.shape[1] - 1
        rows, row_of_entry = np.unique(indices[at], return_inverse=True)
        columns, column_of_entry = np.unique(indices[1 - at], return_inverse=True)
        moments = np.zeros((len(columns) + 1, padded_length(rank)))
        pack_means(other_means[columns], moments[:-1])
        self._add_covariances(other, own.second_moment, columns, moments[:-1])
        # The entries that a row had before are one more entry of value 0, whose column has their second
        # moment; what they say about the mean is in the shift.
        past = other.second_moment
        moments[-1, : (rank + 1) * (rank + 2) // 2] = past[np.tril_indices(rank + 1)]
        counts = own.counts[rows].astype(np.float64)
        row_of_entry = np.append(row_of_entry, np.arange(len(rows)))
        order = np.argsort(row_of_entry, kind="stable")
        ones = np.ones(len(values)) if weights is None else weights
        start = np.concatenate([[0], np.cumsum(np.bincount(row_of_entry))])
        index = np.append(column_of_entry, np.full(len(rows), len(columns)))[order].astype(np.int32)
        precisions = own.noise_precisions[rows].astype(np.float64) / self.noise
        # Of a row without entries the fit has the mean of the prior for that count, which does not say much.
        before = np.where(counts[:, np.newaxis] > 0.0, means[rows], own.mean)
        shifts = before @ own.precision + (precisions * counts)[:, np.newaxis] * (before @ past)
        result, errors = np.zeros((len(rows), padded_length(rank))), np.zeros(len(rows))
        core.row_posteriors(
            (start, index, np.append(values, np.zeros(len(rows)))[order]),
            moments,
            np.append(other.noise_precisions[columns].astype(np.float64), 1.0),
            np.append(ones, counts)[order],
            precisions,
            (own.precision, np.ascontiguousarray(shifts)),
            False,
            result,
            errors,
            n_threads,
        )
        return rows, unpack_means(result, rank)

    def _add_covariances(
        self, side: FactorPrior, second_moment: FloatArray, rows: Positions, moments: FloatArray
    ) -> None:
        """Add the approximate covariances of some rows to their packed moments of (x, 1, a)."""
        # With Lambda = L L^T and L^-1 E L^-T = U diag(e) U^T, the covariance for a count n is
        # V diag(1 / (1 + n / sigma^2 e)) V^T, V = L^-T U: linear in one vector for each row.
        inverse = np.linalg.inv(np.linalg.cholesky(side.precision))
        eigenvalues, vectors = np.linalg.eigh(inverse @ second_moment @ inverse.T)
        basis = inverse.T @ vectors
        known = side.counts[rows].astype(np.float64) * side.noise_precisions[rows] / self.noise
        shares = 1.0 / (1.0 + known[:, np.newaxis] * np.maximum(eigenvalues, 0.0))
        rank = len(basis) - 1
        spread = np.zeros((rank + 2, rank + 1))  # of (x, 1, a)
        spread[:rank], spread[-1] = basis[:-1], basis[-1]
        a, b = np.tril_indices(rank + 2)
        moments[:, : len(a)] += shares @ (spread[a] * spread[b]).T


def _transform_side(posterior: Posterior, side: Side, basis: FloatArray) -> FactorPrior:
    rank, width = basis.shape
    change = np.zeros((rank + 1, width + 1))
    change[:-1, :-1], change[-1, -1] = basis, 1.0
    start = side.entries[0]
    counts = np.diff(start).astype(np.float64)
    if side.weights is not None:
        sums = np.concatenate([[0.0], np.cumsum(side.weights, dtype=np.float64)])
        counts = np.diff(sums[start])
    # Summed in float64, without a copy of the moments.
    total = np.einsum("i,ij->j", counts * side.precisions, side.moments, dtype=np.float64)
    moment = unpack_moment(total / counts.sum(), rank)[:-1, :-1]
    covariance = change.T @ side.prior.covariance @ change
    if side.has_bias:
        precision = _invert(covariance)
    else:
        precision = np.zeros_like(covariance)
        precision[:-1, :-1] = _invert(covariance[:-1, :-1])
        precision[-1, -1] = posterior.prior_precision(side)[-1, -1]
    return FactorPrior(
        side.prior.coefficients[0] @ change,
        precision,
        change.T @ moment @ change,
        counts.astype(np.float32),
        side.precisions.astype(np.float32),
    )


def _second_moment(means: FloatArray, counts: FloatArray) -> FloatArray:
    """Return the mean over entries of the second moment of (x, 1)."""
    vectors = np.hstack([means[:, :-1], np.ones((len(means), 1))])
    return np.asarray((counts * vectors.T) @ vectors / counts.sum())


def _estimate_side(
    means: FloatArray,
    counts: FloatArray,
    own: FloatArray,
    other: FloatArray,
    has_bias: bool,
    noise: float,
    total: float,
) -> FactorPrior:
    """Return the prior whose mean and covariance are those of the rows with entries."""
    seen = means[counts > 0]
    mean = seen.mean(axis=0)
    covariance = (seen - mean).T @ (seen - mean) / len(seen)
    # Factors have the unit of the square root of the entries, biases that of the entries.
    variances = np.diagonal(covariance)
    floor = np.full(len(mean), _LEAST_VARIANCE * float(np.mean(variances[:-1])) + _NOTHING * math.sqrt(total))
    floor[-1] = _LEAST_VARIANCE * variances[-1] + _NOTHING * total
    covariance[np.diag_indices(len(mean))] += floor
    if not has_bias:
        covariance[-1] = covariance[:, -1] = mean[-1] = 0.0
        covariance[-1, -1] = _NOTHING * total
    ones = np.ones(len(means), np.float32)
    return FactorPrior(mean, _invert(covariance), own, counts.astype(np.float32), ones)


def _invert(covariance: FloatArray) -> FloatArray:
    """Return the inverse of a covariance whose variances may differ by many orders of magnitude."""
    scale = np.sqrt(np.maximum(np.diagonal(covariance), _LEAST_TOTAL))
    correlation = covariance / np.outer(scale, scale)
    correlation[np.diag_indices(len(scale))] += _LEAST_VARIANCE
    inverse = np.linalg.inv((correlation + correlation.T) / 2) / np.outer(scale, scale)
    return np.asarray((inverse + inverse.T) / 2)
