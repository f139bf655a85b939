# SPDX-License-Identifier: MIT
r"""Variational Bayes for a network of two layers with biases: all weight decays are learned.

.. math::

    r_{ij} \sim N(\mu + a_i + b_j + x_i \cdot y_j,\; \sigma^2 / (w_{ij} \tau_i \rho_j)), \qquad
    (x_i, a_i) \sim N(B_x^T \phi_i, \Sigma_x), \qquad (y_j, b_j) \sim N(B_y^T \phi_j, \Sigma_y)

with :math:`\phi_i = (1, \log(1 + n_i))` for a row with n_i entries, and weights w of the entries. The
posteriors of all rows and columns are independent and Gaussian. A sweep computes those of the rows given
those of the columns, and the other way round: alternating least squares whose Gram matrices have the
covariances of the other factor, too. After each half the prior, :math:`\sigma^2` and, where that helps, the
precisions :math:`\tau, \rho` maximise the expected log likelihood. So directions that the entries do not
support vanish without a choice of a rank or a decay.

Lim, Teh, "Variational Bayesian approach to movie rating prediction", KDD Cup 2007; Raiko, Ilin, Karhunen,
"Principal component analysis for large scale problems with lots of missing values", ECML 2007;
Salakhutdinov, Mnih 2008 (priors with full covariances); Nakajima, Sugiyama 2011 (why directions vanish).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .._problem.factors import SparseRows, entries_of_product, leading_factors
from .._problem.observations import Completion
from .._support.arrays import FloatArray
from .._support.dispatch import core
from .._support.files import Arrays
from .entries import ROUNDING, Entries, Positions, fit_biases

#: Priors stay wide after a start, so that directions are found before they may vanish: for some sweeps, and
#: for as long as the variance of the noise falls by this share in a sweep.
_WIDE_SWEEPS: Final = 4
_STEADY: Final = 0.03
#: Ridge of the biases at the start, and number of sweeps over them.
_PENALTY: Final = (3.0, 3.0)
_START_SWEEPS: Final = 5
#: Error of the leading singular values at the start, relative to the largest.
_START_TOLERANCE: Final = 0.1
#: Variance of the part of a direction at the start, relative to that of the residuals, times the rank.
_START_SHARE: Final = 0.3
#: Added observations of the own variance, which keep an estimated covariance invertible.
_PRIOR_COUNT: Final = 2.0
#: Fewest rows whose counts are used to predict their means.
_FEWEST_ROWS: Final = 20
#: Precision of a bias that is held at zero, over the largest that the entries of a row give.
_FIXED: Final = 1e6
#: Smallest variance of the noise, relative to that of the ratings.
_LEAST_NOISE: Final = 1e-14
#: Smallest and largest standard deviation of the entries for each precision: fourth powers must not overflow.
_RANGES: Final = {"float32": (1e-9, 1e15), "float64": (1e-70, 1e70)}
#: Variance of the noise levels between rows below which they are taken as equal.
_LEAST_SPREAD: Final = 1e-3
#: Numbers that one call of the core reads.
_BLOCK_WORK: Final = 10**9
#: Bytes that the moments may take.
_MEMORY: Final = 2**29
#: Entries are in float32 above this number.
_SINGLE: Final = 300_000


@dataclass
class Prior:
    """Prior of the rows of a factor: means ``features @ coefficients``, and one covariance."""

    coefficients: FloatArray
    covariance: FloatArray


@dataclass
class Side:
    """One factor, with its bias as the last entry: what is known of its rows, and their posteriors.

    Attributes
    ----------
    entries : tuple of ndarray
        Entries by these rows: starts, indices, values.
    features : ndarray, shape (n, 1 or 2)
        A constant and, where counts differ, their standardised logarithm.
    moments : ndarray, shape (n, padded length)
        Packed second moments of (x_i, 1, a_i), as in `row_posteriors` of the core.
    precisions : ndarray of float64, shape (n,)
        Relative precisions tau of the noise of these rows.
    weights : ndarray or None
        Relative precisions of single entries, in the order of `entries`; None: all are 1.
    """

    entries: SparseRows
    counts: FloatArray
    features: FloatArray
    has_bias: bool
    prior: Prior
    moments: FloatArray
    precisions: FloatArray
    weights: FloatArray | None = None
    errors: npt.NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.errors = np.zeros(len(self.counts))

    def means(self, rank: int) -> FloatArray:
        """Return the posterior means of (x_i, a_i), shape (n, rank + 1), in float64."""
        found = unpack_means(self.moments, rank)
        if not self.has_bias:
            found[:, rank] = 0.0
        return found


class Snapshot(NamedTuple):
    """State of a `Posterior` between two sweeps. Rows follow from the columns."""

    rank: int
    age: int
    is_wide: bool
    learns_noise: bool
    noise: float
    mean: float
    moments: FloatArray
    priors: list[Prior]
    precisions: list[FloatArray]

    def energies(self) -> FloatArray:
        """Return the eigenvalues of Sigma_x Sigma_y for the directions, largest first."""
        return energies_of(self.priors)

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """Return JSON values and arrays."""
        arrays: Arrays = {"moments": self.moments}
        for i in (0, 1):
            arrays[f"coefficients_{i}"] = self.priors[i].coefficients
            arrays[f"covariance_{i}"] = self.priors[i].covariance
            arrays[f"precisions_{i}"] = self.precisions[i]
        return dict(zip(self._fields[:6], self[:6], strict=True)), arrays

    @classmethod
    def from_state(cls, metadata: dict[str, Any], arrays: Arrays) -> Snapshot:
        """Return the snapshot of which `state` returned these values."""
        first: Any = [metadata[name] for name in cls._fields[:6]]
        priors = [Prior(arrays[f"coefficients_{i}"], arrays[f"covariance_{i}"]) for i in (0, 1)]
        last = arrays["moments"], priors, [arrays[f"precisions_{i}"] for i in (0, 1)]
        return cls._make([*first, *last])


class Posterior:
    """Posteriors of both factors for some entries.

    Parameters
    ----------
    entries : Entries
    kind : {"both", "rows", "columns", "mean", None}
        Biases that are part of the model.
    n_threads : int
        Number of threads, as in `train`.
    dtype : dtype, optional
        Precision of the moments. Default: float64, and float32 for more than 300,000 entries.
    mean : float, optional
        mu. Default: the mean of the entries, or 0 if `kind` is None.

    Attributes
    ----------
    rank : int
        Number of directions; 0 until `add_directions`.
    mean, noise : float
        mu and sigma^2.
    learns_noise : bool
        Whether the precisions tau and rho are learned; otherwise they are 1.

    Notes
    -----
    A sweep takes about ``2 n (k + 2)^2 + (rows + columns) k^3`` multiplications for n entries and rank k, and
    reads ``n (k + 2)^2`` numbers. The memory is ``(rows + columns) (k + 2)^2 / 2`` numbers.
    """

    def __init__(
        self,
        entries: Entries,
        kind: str | None,
        n_threads: int,
        dtype: npt.DTypeLike | None = None,
        mean: float | None = None,
    ) -> None:
        self.shape, self.rank, self.learns_noise = entries.shape, 0, False
        self._entries, self._n_threads = entries, n_threads
        if dtype is None:
            dtype = np.float32 if entries.values.size > _SINGLE else np.float64
        self.dtype = np.dtype(dtype)
        start = fit_biases(entries, kind, _PENALTY, _START_SWEEPS)
        self.mean = start.mean if mean is None else mean
        centred = entries.values - self.mean
        self._check_range(centred)
        #: Mean square of the centred entries.
        self.total = entries.mean(np.square(centred))
        orders = self._sort(centred)
        weights: list[FloatArray | None] = [None, None]
        if entries.weights is not None:
            weights = [order[2] for order in self._sort(entries.weights)]
        self.sides = [
            self._make_side(order, weight, bias, kind in ("both", word))
            for order, weight, bias, word in zip(orders, weights, start[1:], ("rows", "columns"), strict=True)
        ]
        self._start = start
        self.noise = entries.mean(np.square(entries.values - start.at(entries.rows, entries.columns)))
        #: Number of sweeps since directions were added, and whether the priors are still wide.
        self.age, self.is_wide = 0, True

    def _check_range(self, centred: FloatArray) -> None:
        """Raise ValueError if variances leave the range of the precision."""
        largest = float(np.max(np.abs(centred)))
        if largest <= ROUNDING * float(np.max(np.abs(self._entries.values))):
            return  # constant, so nothing is computed
        spread = largest * math.sqrt(self._entries.mean(np.square(centred / largest)))
        low, high = _RANGES[self.dtype.name]
        if not low <= spread <= high:
            raise ValueError(
                f"the ratings have the standard deviation {spread:.1e}; wanted {low:g} to {high:g} in "
                f"{self.dtype}: multiply them by a constant"
            )

    def _sort(self, values: FloatArray) -> tuple[SparseRows, SparseRows]:
        entries = self._entries
        return Completion(entries.rows, entries.columns, values, entries.shape).entries(self.dtype)

    def _make_side(
        self, order: SparseRows, weights: FloatArray | None, bias: FloatArray, has_bias: bool
    ) -> Side:
        counts = np.diff(order[0]).astype(np.float64)
        seen = counts > 0
        features = [np.ones(len(counts))]
        logarithms = np.log1p(np.maximum(counts, 1.0))
        spread = float(np.std(logarithms[seen]))
        if np.count_nonzero(seen) >= _FEWEST_ROWS and spread > 1e-6:
            features.append((logarithms - np.mean(logarithms[seen])) / spread)
        variance = max(float(np.mean(np.square(bias))), 1e-6 * self.total)
        prior = Prior(np.zeros((len(features), 1)), np.array([[variance]]))
        empty = np.zeros((len(counts), 0), self.dtype)
        return Side(
            order, counts, np.stack(features, axis=1), has_bias, prior, empty, np.ones(len(counts)), weights
        )

    @property
    def is_exact(self) -> bool:
        """Whether the biases leave nothing but rounding errors."""
        largest = float(np.max(np.abs(self._entries.values)))
        return math.sqrt(self.noise) <= ROUNDING * largest

    @property
    def highest_rank(self) -> int:
        """Largest rank that rows and columns with entries, and memory, allow."""
        seen = min(int(np.count_nonzero(side.counts)) for side in self.sides)
        numbers = _MEMORY / (sum(self.shape) * self.dtype.itemsize)
        return max(1, min(seen, int(math.sqrt(2 * numbers)) - 3))

    # ------------------------------------------------------------------------------------- directions

    def add_directions(self, count: int) -> None:
        """Add the leading directions of the residuals, weighted by the numbers of entries."""
        entries, known = self._entries, self.rank
        predict = self.predict if known > 0 else self._start.at
        before = self.sides[1].means(known) if known > 0 else self._start.columns[:, np.newaxis]
        residual = entries.values - predict(entries.rows, entries.columns)
        scale = [1.0 / np.sqrt(side.counts + 5.0) for side in self.sides]
        weights = 1.0 if entries.weights is None else entries.weights
        weighted = weights * residual * scale[0][entries.rows] * scale[1][entries.columns]
        found = leading_factors(
            Completion(entries.rows, entries.columns, weighted, self.shape).backprojection(),
            count,
            _START_TOLERANCE,
        )
        directions = found.V * np.sqrt(self.shape[1])
        self.rank = known + count
        variance = _START_SHARE * entries.mean(np.square(residual)) / count
        if known > 0:
            # Residuals are smaller than what is left to learn; the last direction so far is not.
            last = float(energies_of(side.prior for side in self.sides)[-1])
            variance = max(variance, math.sqrt(variance * last))
        variances = variance, 1.0
        for side, variance in zip(self.sides, variances, strict=True):
            side.prior = _extend_prior(side.prior, count, variance)
            side.moments = np.zeros((len(side.counts), padded_length(self.rank)), self.dtype)
            # What the new directions will explain is not noise.
            side.precisions = np.ones(len(side.counts))
        # Columns (y_j, b_j) without covariances, from which the rows follow.
        pack_means(np.hstack([before[:, :known], directions, before[:, known:]]), self.sides[1].moments)
        self.age, self.is_wide = 0, True

    # ----------------------------------------------------------------------------------------- sweeps

    def sweep(self) -> None:
        """Compute the posteriors of the rows, then those of the columns."""
        before = self.noise
        for side, other in (self.sides, self.sides[::-1]):
            self._update_side(side, other)
        self.age += 1
        if self.age >= _WIDE_SWEEPS and self.noise >= (1.0 - _STEADY) * before:
            self.is_wide = False

    def _update_side(self, side: Side, other: Side) -> None:
        self._compute_posteriors(side, other)
        if not self.is_wide:
            self._estimate_prior(side)
            if self.learns_noise:
                _estimate_precisions(side)
        noise = float(side.precisions @ side.errors) / self._entries.values.size
        self.noise = max(noise, _LEAST_NOISE * self.total)

    def _compute_posteriors(self, side: Side, other: Side) -> None:
        precision = self.prior_precision(side)
        shifts = np.ascontiguousarray(side.features @ (side.prior.coefficients @ precision), self.dtype)
        own, weights = (side.precisions / self.noise).astype(self.dtype), other.precisions.astype(self.dtype)
        start, index, values = side.entries
        for begin, end in self._split_rows(start):
            first, last = start[begin], start[end]
            core.row_posteriors(
                (start[begin : end + 1] - first, index[first:last], values[first:last]),
                other.moments,
                weights,
                None if side.weights is None else side.weights[first:last],
                own[begin:end],
                (precision.astype(self.dtype), shifts[begin:end]),
                True,
                side.moments[begin:end],
                side.errors[begin:end],
                self._n_threads,
            )

    def _split_rows(self, start: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Yield blocks of rows that take a fraction of a second each, so that Ctrl-C waits no longer."""
        n_blocks = 1 + int(start[-1] * padded_length(self.rank) // _BLOCK_WORK)
        targets = np.linspace(0, int(start[-1]), n_blocks + 1)[1:-1]
        cuts = [0, *np.unique(np.searchsorted(start, targets)).tolist(), len(start) - 1]
        yield from ((begin, end) for begin, end in pairwise(cuts) if begin < end)

    def prior_precision(self, side: Side) -> FloatArray:
        """Return the inverse of the prior covariance; a bias that is not part of the model is held at 0."""
        if side.has_bias:
            return np.linalg.inv(side.prior.covariance)
        result = np.zeros_like(side.prior.covariance)
        result[:-1, :-1] = np.linalg.inv(side.prior.covariance[:-1, :-1])
        result[-1, -1] = _FIXED * float(np.max(side.counts)) / self.noise
        return result

    def _estimate_prior(self, side: Side) -> None:
        """Set the prior to its maximum of the expected log likelihood, given the posteriors."""
        seen = side.counts > 0
        means, features = side.means(self.rank)[seen], side.features[seen]
        # Columns of features are orthogonal: the second one is centred.
        sizes = np.sum(np.square(features), axis=0)
        crossed = features.T @ means
        coefficients = crossed / sizes[:, np.newaxis]
        total = seen.astype(self.dtype) @ side.moments
        chosen = [*range(self.rank), self.rank + 1]
        moment = unpack_moment(total, self.rank)[np.ix_(chosen, chosen)] - crossed.T @ coefficients
        n = len(means)
        own = np.maximum(np.diagonal(moment), np.finfo(np.float64).tiny)
        covariance = (moment + np.diag(_PRIOR_COUNT * own / n)) / (n + _PRIOR_COUNT)
        if not side.has_bias:
            coefficients[:, -1] = 0.0
            covariance[-1] = covariance[:, -1] = 0.0
            covariance[-1, -1] = 1e-6 * self.total
        side.prior = Prior(coefficients, covariance)

    # ----------------------------------------------------------------------------------------- states

    def snapshot(self) -> Snapshot:
        """Return a copy of all that later sweeps depend on."""
        return Snapshot(
            self.rank,
            self.age,
            self.is_wide,
            self.learns_noise,
            self.noise,
            self.mean,
            self.sides[1].moments.copy(),
            [side.prior for side in self.sides],
            [side.precisions for side in self.sides],
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot, of a posterior of other entries with the same mu, too."""
        self.rank, self.age, self.is_wide, self.learns_noise, self.noise = snapshot[:5]
        for side, prior, precisions in zip(self.sides, snapshot.priors, snapshot.precisions, strict=True):
            n_features = side.features.shape[1]
            coefficients = np.zeros((n_features, self.rank + 1))
            coefficients[: len(prior.coefficients)] = prior.coefficients[:n_features]
            side.prior, side.precisions = Prior(coefficients, prior.covariance), precisions
        self.sides[0].moments = np.zeros((self.shape[0], padded_length(self.rank)), self.dtype)
        self.sides[1].moments = snapshot.moments.astype(self.dtype)
        self._compute_posteriors(*self.sides)

    # ---------------------------------------------------------------------------------------- results

    def factors(self) -> tuple[FloatArray, FloatArray]:
        """Return the posterior means (x_i, a_i) and (y_j, b_j)."""
        rows, columns = (side.means(self.rank) for side in self.sides)
        return rows, columns

    def predict(self, rows: Positions, columns: Positions) -> FloatArray:
        """Return the posterior means of some entries."""
        own, other = self.factors()
        left = np.hstack([own, np.ones((len(own), 1))])
        right = np.hstack([other[:, :-1], np.ones((len(other), 1)), other[:, -1:]])
        return self.mean + entries_of_product((left, right), rows, columns)


def padded_length(rank: int) -> int:
    """Return the length of a row of moments in memory."""
    return ((rank + 2) * (rank + 3) // 2 + 15) // 16 * 16


def pack_means(means: FloatArray, moments: FloatArray) -> None:
    """Write the packed moments of rows (x_i, a_i), shape (n, rank + 1), without covariances."""
    ones = np.ones((len(means), 1))
    vectors = np.hstack([means[:, :-1], ones, means[:, -1:]])
    for a in range(vectors.shape[1]):
        first = a * (a + 1) // 2
        moments[:, first : first + a + 1] = vectors[:, a : a + 1] * vectors[:, : a + 1]


def unpack_means(moments: FloatArray, rank: int) -> FloatArray:
    """Return the means (x_i, a_i), shape (n, rank + 1), in float64."""
    first, bias = rank * (rank + 1) // 2, (rank + 1) * (rank + 2) // 2
    return moments[:, [*range(first, first + rank), bias + rank]].astype(np.float64)


def unpack_moment(packed: FloatArray, rank: int) -> FloatArray:
    """Return the second moment of (x, 1, a) as a matrix."""
    whole = np.zeros((rank + 2, rank + 2))
    whole[np.tril_indices(rank + 2)] = packed[: (rank + 2) * (rank + 3) // 2]
    whole += np.tril(whole, -1).T
    return whole


def energies_of(priors: Iterable[Prior]) -> FloatArray:
    """Return the eigenvalues of Sigma_x Sigma_y for the directions, largest first."""
    rows, columns = (prior.covariance[:-1, :-1] for prior in priors)
    return np.sort(np.linalg.eigvals(rows @ columns).real)[::-1]


def _extend_prior(prior: Prior, count: int, variance: float) -> Prior:
    """Add independent directions with mean 0 before the bias."""
    known = len(prior.covariance) - 1
    kept = [*range(known), known + count]
    covariance = variance * np.eye(known + count + 1)
    covariance[np.ix_(kept, kept)] = prior.covariance
    coefficients = np.zeros((len(prior.coefficients), known + count + 1))
    coefficients[:, kept] = prior.coefficients
    return Prior(coefficients, covariance)


def _estimate_precisions(side: Side) -> None:
    r"""Set the noise precisions of rows, which have a Gamma prior whose variance is estimated, too.

    For a row with n entries, :math:`E_i / n` for the normalised errors has variance ``V + 2 / n`` if the
    noise levels have variance V: this gives V, and ``2 / V`` as the number of entries that the prior counts
    for.
    """
    errors, counts = side.errors, side.counts
    n = counts.sum()
    base = float(side.precisions @ errors) / n
    seen = counts > 0
    if not base > 0.0:
        return
    levels = errors[seen] / (base * counts[seen])
    spread = float(np.sum(counts[seen] * np.square(levels - 1.0) - 2.0)) / n
    prior_count = 2.0 / max(spread, _LEAST_SPREAD)
    precisions = (prior_count + counts) / (prior_count + errors / base)
    side.precisions = precisions * (n / float(precisions @ counts))
