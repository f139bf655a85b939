# SPDX-License-Identifier: MIT
"""Straight lines through measures of layers, on linear and logarithmic axes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .._support.arrays import as_vector


class LinearFit(NamedTuple):
    """D_l ~ start + slope l."""

    slope: float
    start: float
    #: Share of the variance that the line explains; 1 for constant values.
    r_squared: float


def linear_fit(layers: npt.ArrayLike, values: npt.ArrayLike) -> LinearFit | None:
    """Return the straight line through values, by least squares.

    Parameters
    ----------
    layers : array_like, shape (n,)
        l.
    values : array_like, shape (n,)
        D_l. Those that are not finite are left out.

    Returns
    -------
    LinearFit or None
        Named tuple ``(slope, start, r_squared)``; None where fewer than two values are left.

    Raises
    ------
    ShapeError
        For vectors of different lengths.

    Notes
    -----
    Cost: O(n).

    Examples
    --------
    >>> from dlnfast.plots import linear_fit
    >>> fit = linear_fit([0, 1, 2], [8.0, 6.0, 4.0])
    >>> round(fit.slope, 12), round(fit.start, 12), round(fit.r_squared, 12)
    (-2.0, 8.0, 1.0)
    """
    positions = as_vector(layers, "layers", dtype=np.float64)
    numbers = as_vector(values, "values", length=positions.size, dtype=np.float64, finite=False)
    use = np.isfinite(numbers)
    if np.unique(positions[use]).size < 2:
        return None
    slope, start = np.polyfit(positions[use], numbers[use], 1)
    missed = float(np.sum((numbers[use] - start - slope * positions[use]) ** 2))
    variance = float(np.sum((numbers[use] - np.mean(numbers[use])) ** 2))
    return LinearFit(float(slope), float(start), 1.0 - missed / variance if variance > 0 else 1.0)


class LogLinearFit(NamedTuple):
    """C_l ~ start * ratio^l."""

    ratio: float
    start: float


def log_linear_fit(layers: npt.ArrayLike, values: npt.ArrayLike) -> LogLinearFit | None:
    """Return the geometric sequence through positive values: least squares of log(value) over the layer.

    Parameters
    ----------
    layers : array_like, shape (n,)
        l.
    values : array_like, shape (n,)
        C_l. Those that are not positive and finite are left out.

    Returns
    -------
    LogLinearFit or None
        Named tuple ``(ratio, start)``; None where fewer than two values are left.

    Raises
    ------
    ShapeError
        For vectors of different lengths.

    Notes
    -----
    Cost: O(n).

    Examples
    --------
    >>> from dlnfast.plots import log_linear_fit
    >>> fit = log_linear_fit([0, 1, 2], [8.0, 4.0, 2.0])
    >>> round(fit.ratio, 12), round(fit.start, 12)
    (0.5, 8.0)
    """
    positions = as_vector(layers, "layers", dtype=np.float64)
    numbers = as_vector(values, "values", length=positions.size, dtype=np.float64, finite=False)
    use = np.isfinite(numbers) & (numbers > 0)
    if np.unique(positions[use]).size < 2:
        return None
    slope, intercept = np.polyfit(positions[use], np.log(numbers[use]), 1)
    return LogLinearFit(float(np.exp(slope)), float(np.exp(intercept)))
