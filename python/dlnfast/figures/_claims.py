# SPDX-License-Identifier: MIT
"""Claims of a source, and the check whether the numbers of a figure show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..plots import linear_fit, log_linear_fit

#: Level of the confidence intervals, and the power for which the smallest detectable difference is stated.
_CONFIDENCE: Final = 0.95
_POWER: Final = 0.8


@dataclass(frozen=True)
class Claim:
    """One claim of the source, and its measured values.

    Attributes
    ----------
    text : str
        The claim.
    shown : bool
        Whether the numbers show it.
    measured : str
        The numbers.
    interval : tuple of float, optional
        Confidence interval of the difference that the claim says is positive. A claim with an interval that
        is not shown is refuted if the whole interval is negative, and otherwise not decided.
    """

    text: str
    shown: bool
    measured: str
    interval: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        """Return "shown", "not shown", "refuted" or "not decided"."""
        if self.shown:
            return "shown"
        if self.interval is None:
            return "not shown"
        return "refuted" if self.interval[1] < 0 else "not decided"

    def __str__(self) -> str:
        """Return the claim with its verdict and numbers in one line."""
        verdict = self.verdict if self.shown else self.verdict.upper()
        return f"{verdict}: {self.text} ({self.measured})"


def as_numbers(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Return the claims in values that JSON knows."""
    return [{**asdict(claim), "verdict": claim.verdict} for claim in claims]


def compare_pairs(text: str, differences: npt.ArrayLike, *, unit: float = 1.0, digits: int = 2) -> Claim:
    """Return the claim that paired differences are positive in the mean, decided by their t interval.

    Parameters
    ----------
    text : str
        The claim.
    differences : array_like of shape (n,)
        Differences of the same quantity, one per seed; n of at least 2.
    unit : float
        Factor of the numbers in the text, 100 for percentage points.
    digits : int
        Digits after the decimal point in the text.

    Notes
    -----
    An interval that contains zero decides nothing. The text then states the power of the test: the true mean
    difference that it would have found with a probability of 80 %, ``(t_0.975 + t_0.8) s / sqrt(n)`` with the
    standard deviation s and n - 1 degrees of freedom.
    """
    numbers = np.asarray(differences, dtype=np.float64)
    n, mean = len(numbers), float(numbers.mean())
    interval = t_interval(numbers)
    low, high = (f"{unit * end:+.{digits}f}" for end in interval)
    measured = f"{unit * mean:+.{digits}f}, 95 % interval {low} to {high}, {n} seeds"
    if interval[0] <= 0 <= interval[1]:
        error = float(numbers.std(ddof=1) / math.sqrt(n))
        detectable = interval[1] - mean + t_quantile(_POWER, n - 1) * error
        measured += f"; a difference of {unit * detectable:.{digits}f} would be found in 80 % of such tests"
    return Claim(text, interval[0] > 0, measured, interval)


def t_interval(values: npt.ArrayLike) -> tuple[float, float]:
    """Return the t interval, at the level of the claims, of the mean of at least two values."""
    numbers = np.asarray(values, dtype=np.float64)
    n, mean = len(numbers), float(numbers.mean())
    half = t_quantile(0.5 + _CONFIDENCE / 2, n - 1) * float(numbers.std(ddof=1) / math.sqrt(n))
    return mean - half, mean + half


def t_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t distribution, for probabilities of at least one half.

    Notes
    -----
    The probability of [0, t] is the integral of the density, by the substitution ``t = sqrt(degrees) tan(a)``
    that of ``cos(a)^(degrees - 1)``, normalised; bisection inverts it.
    """
    nodes, weights = np.polynomial.legendre.leggauss(100)

    def integral(angle: float) -> float:
        return float(angle / 2 * weights @ np.cos(angle / 2 * (nodes + 1)) ** (degrees - 1))

    wanted = (2 * probability - 1) * integral(math.pi / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if integral(middle) < wanted else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def rises_then_saturates(accuracy: Sequence[float], start: int, slack: float) -> tuple[bool, str]:
    """Return whether accuracies rise up to layer `start`, counted from 1, and then stay, and the numbers."""
    first, later = accuracy[0], np.asarray(accuracy[start - 1 :])
    gain, loss = float(later[0] - first), float(later.max() - later.min())
    text = f"{100 * first:.1f} % in layer 1, {100 * later[0]:.1f} % in layer {start}, "
    text += f"then within {100 * loss:.1f} points"
    return gain > slack and loss <= max(slack, gain / 4), text


def falls_geometrically(layers: Sequence[int], values: npt.ArrayLike) -> tuple[bool, float, str]:
    """Return whether values fall at a near-geometric rate, their factor per layer, and the numbers."""
    numbers = np.asarray(values, dtype=np.float64)
    fit, line = log_linear_fit(layers, numbers), linear_fit(layers, np.log(numbers))
    assert fit is not None
    assert line is not None
    good = fit.ratio < 0.8 and line.r_squared >= 0.95  # below that a layer hardly compresses
    return good, fit.ratio, f"factor {fit.ratio:.3g} a layer, R^2 of the logarithms {line.r_squared:.3f}"
