# SPDX-License-Identifier: MIT
"""Singular values of a low-rank matrix in noise: visibility, position and strength."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .._support.arrays import as_vector, check_scale
from .edge import noise_edge
from .spectrum import read_shape

_Table = npt.NDArray[np.float64]


def spike_threshold(shape: tuple[int, int], entry_variance: float, *, level: float | None = None) -> float:
    r"""Return the smallest singular value of a low-rank matrix that is visible in noise.

    In the sum of a matrix of low rank and of noise, a singular value :math:`\theta` of the former appears
    outside the bulk only if :math:`\theta > \sigma (m n)^{1/4}`.

    Parameters
    ----------
    shape : (int, int)
        Numbers of rows and columns, (m, n).
    entry_variance : float
        Variance sigma^2 of the noise.
    level : float, optional
        Level of `noise_edge`, for the value that appears at this edge. `rank_above_noise` counts such values
        in half of the cases. Default: the limit of large sizes, which is smaller.

    Returns
    -------
    float
        Threshold, in the unit of the entries.

    Raises
    ------
    TypeError, ValueError
        If `shape` is no pair of sizes, `entry_variance` is negative, or `level` is out of range.

    Notes
    -----
    Cost: O(1). The phase transition is that of Baik, Ben Arous and Peche (Annals of Probability 33, 2005);
    Benaych-Georges and Nadakuditi (J. Multivariate Analysis 111, 2012) show it for singular values. Close to
    the threshold the position grows with the square of theta's distance from it, so that the margin of
    `noise_edge` matters: 12 % of theta for 1000 x 1000.

    Examples
    --------
    >>> from dlnfast.measures import spike_threshold
    >>> round(spike_threshold((100, 400), 0.01), 6), round(spike_threshold((100, 400), 0.01, level=0.01), 2)
    (1.414214, 1.73)
    """
    rows, columns = read_shape(shape)
    sigma = np.sqrt(check_scale(entry_variance, "entry_variance"))
    if level is not None:
        edge = noise_edge(shape, entry_variance, level=level)
        visible = float(spike_strength([edge], shape, entry_variance)[0])
        if visible > 0.0:  # at a high level the edge is inside the bulk
            return visible
    return float(sigma * np.sqrt(np.sqrt(rows) * np.sqrt(columns)))


def spike_position(planted: npt.ArrayLike, shape: tuple[int, int], entry_variance: float) -> _Table:
    r"""Return the singular values with which those of a low-rank matrix appear in noise.

    .. math:: y = \sqrt{(\theta^2 + \sigma^2 m) (\theta^2 + \sigma^2 n)} / \theta

    above `spike_threshold`; the upper end of the bulk, :math:`\sigma (\sqrt m + \sqrt n)`, below.

    Parameters
    ----------
    planted : (k,) array_like
        Singular values theta of the matrix of low rank.
    shape : (int, int)
        Numbers of rows and columns, (m, n).
    entry_variance : float
        Variance sigma^2 of the noise.

    Returns
    -------
    (k,) ndarray of float64
        Singular values of the sum, in the limit of large sizes and constant rank.

    Raises
    ------
    TypeError, ValueError
        If a value is negative or not finite, `shape` is no pair of sizes, or `entry_variance` is negative.

    Notes
    -----
    Cost: O(k). Benaych-Georges and Nadakuditi (J. Multivariate Analysis 111, 2012). For random noise the
    values fluctuate by about sigma.

    Examples
    --------
    >>> from dlnfast.measures import spike_position
    >>> spike_position([0.0, 20.0], (100, 100), 1.0)
    array([20., 25.])
    """
    values, small, large = _read_arguments(planted, "planted", shape, entry_variance)
    # Not below the threshold: there the formula would increase again. theta = 0 needs noise of variance 0.
    seen = np.maximum(values, np.sqrt(small) * np.sqrt(large))
    factor = np.divide(large, seen, out=np.zeros_like(seen), where=seen > 0)
    return np.asarray(np.hypot(seen, small) * np.hypot(1.0, factor))


def spike_strength(observed: npt.ArrayLike, shape: tuple[int, int], entry_variance: float) -> _Table:
    r"""Return the singular values of a low-rank matrix from those of its sum with noise.

    The inverse of `spike_position`. An observed singular value overestimates the planted one, because noise
    adds to it.

    Parameters
    ----------
    observed : (k,) array_like
        Singular values y of the sum.
    shape : (int, int)
        Numbers of rows and columns, (m, n).
    entry_variance : float
        Variance sigma^2 of the noise, for example from `noise_variance`.

    Returns
    -------
    (k,) ndarray of float64
        Estimates of theta; 0 for values inside the bulk, which tell nothing.

    Raises
    ------
    TypeError, ValueError
        If a value is negative or not finite, `shape` is no pair of sizes, or `entry_variance` is negative.

    Notes
    -----
    Cost: O(k). With a = y^2 - sigma^2 (m + n), the planted value is
    :math:`\theta^2 = (a + \sqrt{a^2 - 4 \sigma^4 m n}) / 2`; see `spike_position` for the source.

    Examples
    --------
    >>> from dlnfast.measures import spike_strength
    >>> spike_strength([19.0, 25.0], (100, 100), 1.0)
    array([ 0., 20.])
    """
    values, small, large = _read_arguments(observed, "observed", shape, entry_variance)
    unit = max(float(np.max(values, initial=0.0)), small, large) or 1.0
    y, edge, product = values / unit, (small + large) / unit, (small / unit) * (large / unit)
    above = (y - edge) * (y + edge)  # a - 2 sigma^2 sqrt(m n), without cancellation at the edge
    root = np.sqrt(np.maximum(above * (above + 4 * product), 0.0))
    squares = np.where(above >= 0.0, (above + 2 * product + root) / 2, 0.0)
    return np.asarray(unit * np.sqrt(squares))


def _read_arguments(
    values: npt.ArrayLike, name: str, shape: tuple[int, int], entry_variance: float
) -> tuple[_Table, float, float]:
    """Return the singular values, sigma sqrt(min(m, n)) and sigma sqrt(max(m, n))."""
    array = as_vector(values, name, dtype=np.float64)
    if np.min(array) < 0.0:
        raise ValueError(f"{name} has a negative value, {np.min(array):g}; wanted singular values")
    small, large = np.sqrt(check_scale(entry_variance, "entry_variance")) * np.sqrt(sorted(read_shape(shape)))
    return array, float(small), float(large)
