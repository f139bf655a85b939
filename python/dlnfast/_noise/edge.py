# SPDX-License-Identifier: MIT
"""Bulk and edge of the singular values of a random matrix, and the variance of its entries."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray, check_choice, check_scale
from .._support.errors import ShapeError
from .spectrum import read_shape, read_spectrum
from .tracy_widom import upper_quantile

_LEAST_LEVEL, _MOST_LEVEL = 1e-10, 0.5
_LEVEL: Final = 0.01
#: Level of the robust start of an estimate.
_START_LEVEL: Final = 1e-6
#: Mean of the Tracy-Widom distribution of order 1.
_MEAN: Final = -1.2065335745820
#: Factor of a level: up to 1.15 times as many Gaussian matrices of practical sizes as in the limit exceed it.
_MARGIN: Final = 0.8
#: Angles of the trapezoidal rule for the Marchenko-Pastur distribution.
_N_ANGLES: Final = 2048


class NoiseBulk(NamedTuple):
    """Singular values of a large random matrix: the ends of their interval, and their median."""

    #: The smallest one, ``sigma |sqrt(m) - sqrt(n)|``.
    lower: float
    #: Median of the Marchenko-Pastur distribution.
    median: float
    #: sigma (sqrt(m) + sqrt(n)), the largest one.
    upper: float


def noise_edge(shape: tuple[int, int], entry_variance: float, *, level: float = _LEVEL) -> float:
    r"""Return the edge that the largest singular value of a random matrix exceeds with a given probability.

    For independent entries of mean 0 and variance :math:`\sigma^2` the largest singular value is near
    :math:`\sigma (\sqrt m + \sqrt n)`, and its square fluctuates by a Tracy-Widom variable of order 1, on a
    scale that matters for matrices of any practical size:

    .. math::
        \text{edge}^2 = \sigma^2 (\mu + \tau q), \qquad
        \mu = (\sqrt{m_-} + \sqrt{n_-})^2, \qquad
        \tau = \sqrt\mu \, (1 / \sqrt{m_-} + 1 / \sqrt{n_-})^{1/3},

    with :math:`m_- = m - 1/2`, :math:`n_- = n - 1/2`, and the quantile q of 0.8 times `level`. The factor
    covers the errors of finite sizes.

    Parameters
    ----------
    shape : (int, int)
        Numbers of rows and columns, (m, n).
    entry_variance : float
        Variance sigma^2 of the entries.
    level : float
        Probability of a larger value, in [1e-10, 0.5].

    Returns
    -------
    float
        Edge, in the unit of the entries.

    Raises
    ------
    TypeError, ValueError
        If `shape` is no pair of sizes, `entry_variance` is negative, or `level` is out of range.

    Notes
    -----
    Cost: about 0.1 s for the first call with a level, then O(1). The centre and scale are those of Ma
    (Bernoulli 18, 2012), with an error of O(min(m, n)^(-2/3)); the limit is Johnstone's (Annals of Statistics
    29, 2001). It needs entries with a finite fourth moment. Heavier tails, and variances that differ from row
    to row, make larger values without any low-rank part.

    Examples
    --------
    >>> from dlnfast.measures import noise_edge
    >>> edge = noise_edge((100, 400), 0.25)  # sigma (sqrt(m) + sqrt(n)) is 15
    >>> round(edge, 2)
    15.26
    """
    rows, columns = read_shape(shape)
    variance = check_scale(entry_variance, "entry_variance")
    quantile = _find_quantile(level)
    return _compute_edge(rows, columns, variance, quantile)


def _find_quantile(level: object) -> float:
    """Return the quantile of the Tracy-Widom distribution that a probability is read at."""
    wanted = check_scale(level, "level", minimum=_LEAST_LEVEL, at_most=_MOST_LEVEL)
    return upper_quantile(_MARGIN * wanted)


def _compute_edge(rows: int, columns: int, variance: float, quantile: float) -> float:
    return float(np.sqrt(variance) * np.sqrt(_expect_square(rows, columns, quantile)))


def _expect_square(rows: int, columns: int, quantile: float) -> float:
    """Return the square of the largest value of noise of variance 1, for a Tracy-Widom variable."""
    m, n = np.sqrt(rows - 0.5), np.sqrt(columns - 0.5)
    return max(float((m + n) ** 2 + (m + n) * (1 / m + 1 / n) ** (1 / 3) * quantile), 0.0)


def noise_bulk(shape: tuple[int, int], entry_variance: float) -> NoiseBulk:
    r"""Return the interval of the singular values of a large random matrix, and their median.

    Parameters
    ----------
    shape : (int, int)
        Numbers of rows and columns, (m, n).
    entry_variance : float
        Variance sigma^2 of the entries.

    Returns
    -------
    NoiseBulk
        Named tuple ``(lower, median, upper)``, in the unit of the entries.

    Raises
    ------
    TypeError, ValueError
        If `shape` is no pair of sizes, or `entry_variance` is negative.

    Notes
    -----
    Cost: O(1). The distribution is that of Marchenko and Pastur (Math. USSR Sbornik 1, 1967). Its median has
    no closed form and is computed by quadrature, to about 1e-6.

    Examples
    --------
    >>> from dlnfast.measures import noise_bulk
    >>> lower, median, upper = noise_bulk((100, 400), 1.0)
    >>> lower, round(median, 2), upper
    (10.0, 19.14, 30.0)
    """
    rows, columns = read_shape(shape)
    sigma = float(np.sqrt(check_scale(entry_variance, "entry_variance")))
    m, n = float(np.sqrt(rows)), float(np.sqrt(columns))
    return NoiseBulk(sigma * abs(m - n), sigma * _compute_median(rows, columns), sigma * (m + n))


@lru_cache(maxsize=512)
def _compute_median(rows: int, columns: int) -> float:
    """Return the median of the min(m, n) singular values of a matrix with entries of variance 1.

    With lambda = 1 + c + 2 sqrt(c) cos(theta), c = min / max, the density of the squares over max(m, n)
    becomes 2 sin^2(theta) / (pi lambda), smooth in theta from 0 (the largest value) to pi.
    """
    few, many = sorted((rows, columns))
    ratio = few / many
    angles = (np.arange(_N_ANGLES) + 0.5) * np.pi / _N_ANGLES
    squares = 1 + ratio + 2 * np.sqrt(ratio) * np.cos(angles)
    shares = np.cumsum(2 * np.sin(angles) ** 2 / squares) / _N_ANGLES
    angle = np.interp(0.5, shares, angles + np.pi / (2 * _N_ANGLES))
    return float(np.sqrt(many * (1 + ratio + 2 * np.sqrt(ratio) * np.cos(angle))))


def noise_variance(
    matrix: npt.ArrayLike,
    *,
    shape: tuple[int, int] | None = None,
    norm: float | None = None,
    method: Literal["energy", "median"] = "energy",
) -> float:
    r"""Estimate the variance of the entries of the noise in a matrix of noise and a low-rank part.

    Both methods drop the k singular values beyond the edge of the estimate, and repeat until k is stable.
    What remains is like a random matrix of the size (m - k, n - k).

    Parameters
    ----------
    matrix : (m, n) or (p,) array_like
        W, or its singular values: all of them, or the p largest.
    shape : (int, int), optional
        (m, n); needed if `matrix` holds singular values.
    norm : float, optional
        Frobenius norm of W; needed if only the largest singular values are given.
    method : {"energy", "median"}
        "energy": ``(||W||_F^2 - sum of the k squares) / ((m - k) (n - k))``, from the k of "median" on if all
        values are given. It is precise for noise, but includes parts of low rank inside the bulk. "median":
        the squared ratio of the median singular value to that of the Marchenko-Pastur distribution. It hardly
        depends on any low-rank part, needs all values, and has 2 to 3 times the error for noise.

    Returns
    -------
    float
        Variance sigma^2, in the squared unit of the entries. If all of the p given values are beyond the
        edge, the low-rank part may be larger than p, and the result is an upper bound.

    Raises
    ------
    ShapeError
        If there are more singular values than the shape allows.
    ValueError
        If a value is not finite or negative, `shape` or `norm` is missing, `norm` is below that of the
        values, or "median" is requested without all values.

    Notes
    -----
    Cost: one SVD without vectors, O(m n min(m, n)); O(p) for each of a few iterations from singular values.
    Relative standard error for n x n noise: 1.4 / n by "energy", 3 / n by "median". The ratio of medians is
    that of Gavish and Donoho, IEEE Trans. Inform. Theory 60, 2014.

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast.measures import noise_variance
    >>> noise = np.random.default_rng(0).normal(0, 0.1, (200, 300))
    >>> round(noise_variance(noise + 0.5), 3)  # a constant is of rank 1
    0.01
    """
    spectrum = _read_values(matrix, shape, norm, method)
    share, _ = _estimate(spectrum, _find_quantile(_LEVEL))
    variance = share * spectrum.norm * spectrum.norm
    if not np.isfinite(variance):
        raise ValueError(f"matrix or norm is so large, {spectrum.norm:g}, that the variance overflows")
    return variance


def rank_above_noise(
    matrix: npt.ArrayLike,
    entry_variance: float | None = None,
    *,
    shape: tuple[int, int] | None = None,
    norm: float | None = None,
    level: float = _LEVEL,
) -> int:
    """Return the number of singular values beyond the edge of a random matrix of the same shape.

    Parameters
    ----------
    matrix : (m, n) or (p,) array_like
        W, or its singular values: all of them, or the p largest.
    entry_variance : float, optional
        Variance of the entries of the noise, such as that of the initial weights. Default: the estimate of
        `noise_variance`.
    shape : (int, int), optional
        (m, n); needed if `matrix` holds singular values.
    norm : float, optional
        Frobenius norm of W; needed if only the largest singular values are given, and no variance.
    level : float
        Probability that a matrix of noise has any value beyond the edge, in [1e-10, 0.5].

    Returns
    -------
    int
        Number of values above `noise_edge`; at most p.

    Raises
    ------
    ShapeError, ValueError
        The errors of `noise_variance` and `noise_edge`.

    Notes
    -----
    Cost: see `noise_variance`. Values within rounding errors of 0, as of a matrix of exact low rank without
    noise, do not count.

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast.measures import rank_above_noise
    >>> noise = np.random.default_rng(0).normal(0, 0.1, (200, 300))
    >>> rank_above_noise(noise), rank_above_noise(noise + 0.5)
    (0, 1)
    """
    quantile = _find_quantile(level)
    if entry_variance is None:
        return _estimate(_read_values(matrix, shape, norm, "energy"), quantile)[1]
    variance = check_scale(entry_variance, "entry_variance")
    spectrum = _read_values(matrix, shape, norm, "energy", needs_norm=False)
    edge = _compute_edge(*spectrum.shape, variance, quantile)
    return int(np.sum(spectrum.values > max(edge, spectrum.rounding)))


class _Values(NamedTuple):
    """Singular values, their matrix's shape and norm, a bound on rounding errors, and the method."""

    values: FloatArray
    shape: tuple[int, int]
    norm: float
    rounding: float
    method: str


def _read_values(
    matrix: npt.ArrayLike,
    shape: tuple[int, int] | None,
    norm: float | None,
    method: str,
    *,
    needs_norm: bool = True,
) -> _Values:
    check_choice(method, "method", ("energy", "median"))
    values, precision, found = read_spectrum(matrix)
    if len(found) == 2:
        sizes = (int(found[0]), int(found[1]))
        if shape is not None and read_shape(shape) != sizes:
            raise ShapeError(f"shape is {shape!r}, but matrix has the shape {sizes}")
    elif shape is None:
        raise ValueError("shape is missing; wanted (m, n), because matrix holds singular values")
    else:
        sizes = read_shape(shape)
    few = min(sizes)
    if len(values) > few:
        raise ShapeError(f"matrix holds {len(values)} singular values; wanted at most {few} for {sizes}")
    has_all = len(values) == few
    if method == "median" and not has_all:
        raise ValueError(f'method is "median", which needs all {few} singular values; got {len(values)}')
    if norm is None and needs_norm and not has_all:
        raise ValueError(f"norm is missing; wanted it beside {len(values)} of {few} singular values")
    own = float(values[0] * np.linalg.norm(values / values[0])) if values[0] > 0 else 0.0
    whole = own if norm is None else check_scale(norm, "norm")
    rounding = max(sizes) * precision
    if whole < own * (1 - rounding):
        raise ValueError(f"norm is {whole:g}, below that of the singular values, {own:g}")
    return _Values(values, sizes, max(whole, own), rounding * float(values[0]), method)


def _estimate(spectrum: _Values, quantile: float) -> tuple[float, int]:
    """Return the variance of the noise over the squared norm, and the number of values beyond its edge."""
    if spectrum.method == "median":
        return _iterate(spectrum, quantile, 0)
    if len(spectrum.values) < min(spectrum.shape):
        return _iterate(spectrum, quantile, 0)
    # From the median's count, many values of the low-rank part cannot hide each other. Only values far beyond
    # the edge count for it: dropping the largest one of pure noise would make the estimate too small.
    start = _iterate(spectrum._replace(method="median"), _find_quantile(_START_LEVEL), 0)[1]
    return _iterate(spectrum, quantile, start)


def _iterate(spectrum: _Values, quantile: float, count: int) -> tuple[float, int]:
    """Alternate between the variance without the `count` largest values and the number beyond its edge.

    The variance is returned in units of the squared norm.
    """
    rows, columns = spectrum.shape
    unit = spectrum.norm or 1.0
    values, few = spectrum.values / unit, min(spectrum.shape)
    variance, seen = 0.0, set[int]()
    while count not in seen:
        seen.add(count)
        left = (rows - count, columns - count)
        if count == few:  # no noise is left
            variance = tested = 0.0
        elif spectrum.method == "median":
            variance = tested = float(np.median(values[count:]) / _compute_median(*left)) ** 2
        else:
            rest = 1.0 - float(np.sum(values[:count] ** 2))
            variance = max(rest, 0.0) / (left[0] * left[1])
            tested = _leave_out(rest, float(values[count]), left) if count < len(values) else variance
        edge = _compute_edge(rows, columns, tested, quantile)
        count = int(np.sum(values > max(edge, spectrum.rounding / unit)))
    return variance, count


def _leave_out(energy: float, largest: float, shape: tuple[int, int]) -> float:
    """Return the variance of noise without its largest value, which is tested and may be no noise."""
    expected = _expect_square(*shape, _MEAN)
    entries = shape[0] * shape[1] - expected
    return max(energy - largest**2, 0.0) / entries if entries > 0.0 else energy / (shape[0] * shape[1])
