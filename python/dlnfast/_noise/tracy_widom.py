# SPDX-License-Identifier: MIT
"""The Tracy-Widom distribution of order 1, from its Fredholm determinant."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

_Table = npt.NDArray[np.float64]

#: Nodes of the Gauss-Legendre rule, and the length of the interval beyond max(-s, 0), where Ai < 1e-15.
_N_NODES: Final = 24
_LENGTH: Final = 12.0
#: Nodes u of the trapezoidal rule for Ai; its integrand decays like exp(-c u^2) with c >= 1.
_CONTOUR: Final = np.linspace(-6.0, 6.0, 81)
#: The quantiles of all levels in [1e-12, 0.5] are in this interval.
_LOWEST, _HIGHEST = -2.0, 12.0
_TOLERANCE: Final = 1e-9
_MAX_ITERATIONS: Final = 60


def airy(x: _Table) -> _Table:
    r"""Return the Airy function Ai for real x of at least about -10.

    The trapezoidal rule for :math:`\frac1{2\pi} \int \exp(i t^3/3 + i x t)\,dt` along t = u + i c, with
    c = max(sqrt(x), 1), which runs through the saddle point for x >= 1. The rule converges exponentially.
    """
    c = np.sqrt(np.maximum(x, 1.0))[..., np.newaxis]
    t = _CONTOUR + 1j * c
    values = np.exp(1j * t**3 / 3 + 1j * x[..., np.newaxis] * t).real
    step = float(_CONTOUR[1] - _CONTOUR[0])
    return np.asarray(np.sum(values, axis=-1) * step / (2 * np.pi))


def distribution_function(s: float) -> float:
    r"""Return F_1(s), the probability that a Tracy-Widom variable of order 1 is at most s.

    :math:`F_1(s) = \det(I - B_s)` on :math:`L^2(0, \infty)` with the kernel B_s(x, y) = Ai(x + y + s)
    (Ferrari and Spohn, J. Phys. A 38, 2005), discretised by a Gauss-Legendre rule (Bornemann, Math. Comp. 79,
    2010). The absolute error is about 1e-14 for s >= -5.
    """
    length = _LENGTH + max(-s, 0.0)
    nodes, weights = np.polynomial.legendre.leggauss(_N_NODES)
    x, roots = (nodes + 1) * length / 2, np.sqrt(weights * length / 2)
    kernel = roots[:, np.newaxis] * airy(x[:, np.newaxis] + x + s) * roots
    return float(np.linalg.det(np.eye(_N_NODES) - kernel))


@lru_cache(maxsize=64)
def upper_quantile(level: float) -> float:
    """Return the s with 1 - F_1(s) = level, for a level in [1e-12, 0.5].

    The secant method on the logarithm of 1 - F_1, within a bracket that is halved where a secant leaves it.
    """
    low, high = _LOWEST, _HIGHEST
    points = [(s, _log_excess(s, level)) for s in (0.0, 1.0)]
    for _ in range(_MAX_ITERATIONS):
        (a, at_a), (b, at_b) = points
        found = b - at_b * (b - a) / (at_b - at_a) if at_a != at_b else b
        if abs(found - b) < _TOLERANCE:
            break
        s = found if low < found < high else (low + high) / 2
        excess = _log_excess(s, level)
        low, high = (s, high) if excess > 0 else (low, s)
        points = [points[1], (s, excess)]
    return points[1][0]


def _log_excess(s: float, level: float) -> float:
    """Return log((1 - F_1(s)) / level), which decreases in s."""
    return float(np.log(max(1.0 - distribution_function(s), 1e-16) / level))
