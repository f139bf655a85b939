# SPDX-License-Identifier: MIT
"""Modes of aligned, balanced networks under gradient flow: their strength over time, and the inverse."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .._support.arrays import as_array, check_count, check_scale

Array = npt.NDArray[np.float64]

#: Smallest x at which G(x) - G(infinity) is summed as a series in 1 / x.
_SERIES_FROM = 1.25
#: Bisections, after which the bracket, of at most 2^11 in the logarithm, is as small as rounding.
_BISECTIONS = 64


def mode_strength(
    time: npt.ArrayLike,
    sigma: float,
    initial: float,
    *,
    n_layers: int = 2,
    loss_scale: float = 1.0,
) -> npt.NDArray[np.float64]:
    r"""Return the strength a(t) of a mode of an aligned, balanced network under gradient flow.

    .. math::
        \dot a = c L\, a^{2 - 2/L} (\sigma - a), \qquad
        a(t) = \frac{\sigma\, e^{2 c \sigma t}}{e^{2 c \sigma t} - 1 + \sigma / a_0} \quad (L = 2).

    The mode is u^T W_{L:1} v for singular vectors u, v of Phi with the singular value sigma, and all layers
    have the singular value a^{1/L} on it.

    Parameters
    ----------
    time : array_like
        t >= 0, the time of `dlnfast.flow`.
    sigma : float
        Singular value of Phi, not negative.
    initial : float
        a_0 = a(0) > 0: the product of the layers' scales for `dlnfast.aligned`.
    n_layers : int
        L.
    loss_scale : float
        c.

    Returns
    -------
    ndarray of float64
        a(t), of the shape of `time`.

    Raises
    ------
    TypeError
        If the times are not numbers.
    ValueError
        If a time is negative or not finite, or a parameter is out of range.

    Notes
    -----
    *L = 1*: a_0 e^{-c t} + sigma (1 - e^{-c t}). *L = 2*: the logistic function above. *L > 2*: the time is
    an explicit function of a, see `escape_time`, and is inverted by bisection, to rounding. *sigma = 0*: the
    L-th power of `rho_flow`. Nothing overflows for large times. Cost: O(1) per time, O(L) for L > 2.

    Saxe, McClelland, Ganguli 2014, arXiv:1312.6120: equation 8 for two layers, and the section on deeper
    networks.

    Examples
    --------
    >>> from dlnfast.theory import mode_strength
    >>> strengths = mode_strength([0.0, 2.0, 4.0, 6.0], sigma=2.0, initial=1e-3)
    >>> [round(float(a), 4) for a in strengths]
    [0.001, 1.1972, 1.9996, 2.0]
    """
    times = _check_times(time)
    value = check_scale(sigma, "sigma")
    start = check_scale(initial, "initial", strict=True)
    depth = check_count(n_layers, "n_layers")
    rate = check_scale(loss_scale, "loss_scale", strict=True)
    with np.errstate(all="ignore"):
        found = _evaluate(rate * times, value, start, depth)
    if not np.isfinite(found).all():
        raise ValueError(f"initial is {start:g} and sigma {value:g}, whose quotient or powers overflow")
    return found


def escape_time(
    sigma: float,
    initial: float,
    *,
    fraction: npt.ArrayLike = 0.5,
    n_layers: int = 2,
    loss_scale: float = 1.0,
) -> npt.NDArray[np.float64]:
    r"""Return the time in which a mode grows from a_0 to a fraction of its final value sigma.

    .. math::
        t = \int_{a_0}^{f \sigma} \frac{da}{c L\, a^{2 - 2/L} (\sigma - a)}, \qquad
        t = \frac{1}{2 c \sigma} \log \frac{f (\sigma - a_0)}{a_0 (1 - f)} \quad (L = 2),

    for an aligned, balanced network (`mode_strength` is the inverse function). For small a_0 this is the
    length of the plateau: about log(sigma / a_0) / (2 c sigma) for two layers, and
    a_0^{2/L - 1} / (c (L - 2) sigma) for more.

    Parameters
    ----------
    sigma : float
        Singular value of Phi, above 0.
    initial : float
        a_0, between 0 and sigma.
    fraction : array_like
        Fractions f of the final value, from a_0 / sigma on, below 1.
    n_layers : int
        L.
    loss_scale : float
        c.

    Returns
    -------
    ndarray of float64
        Times, of the shape of `fraction`.

    Raises
    ------
    TypeError
        If the fractions are not numbers.
    ValueError
        If a parameter is out of range, or a fraction is below a_0 / sigma or not below 1.

    Notes
    -----
    With a = sigma x^L the integral is 1 / (c sigma^{2 - 2/L}) times that of
    1 / (x^{L-1} (1 - x^L)) = x^{1-L} + x / (1 - x^L), so that for L > 2 it is the difference of

    .. math::
        G(x) = \frac{x^{2-L}}{2 - L} - \frac 1L \sum_{j=0}^{L-1} \omega^{2j} \log(1 - \omega^{-j} x),
        \qquad \omega = e^{2 \pi i / L}

    between its ends: partial fractions at the L-th roots of unity. Cost: O(L) per fraction. The sum cancels
    for small x, where the first term is larger: t is exact to rounding, relative to the whole plateau.

    Saxe, McClelland, Ganguli 2014, arXiv:1312.6120; its formulas are those for L = 2 and for L to infinity.
    Layers that are not aligned take longer, see `plateau_bounds`.

    Examples
    --------
    >>> from dlnfast.theory import escape_time
    >>> two, three = (float(escape_time(1.0, 1e-6, n_layers=depth)) for depth in (2, 3))
    >>> round(two, 4), round(three, 4)
    (6.9078, 99.1497)
    """
    value = check_scale(sigma, "sigma", strict=True)
    start = check_scale(initial, "initial", strict=True)
    depth = check_count(n_layers, "n_layers")
    rate = check_scale(loss_scale, "loss_scale", strict=True)
    fractions = _as_numbers(fraction, "fraction")
    if not np.all((fractions >= start / value) & (fractions < 1.0)):
        raise ValueError(f"fraction has a value outside [{start / value:g}, 1), from initial / sigma on")
    ratio = start / value
    if depth == 1:
        return np.asarray(np.log((1 - ratio) / (1 - fractions)) / rate)
    if depth == 2:
        growth = np.log(fractions / ratio) + np.log((1 - ratio) / (1 - fractions))
        return np.asarray(growth / (2 * rate * value))
    with np.errstate(over="ignore", divide="ignore"):
        speed = rate * np.float64(value) ** (2 - 2 / depth)
        if ratio == 0.0:
            raise ValueError(f"initial is {start:g}, too small against sigma = {value:g}")
        begin = _antiderivative(*_root(np.asarray(ratio), depth), depth)
        end = _antiderivative(*_root(fractions, depth), depth)
        times = np.asarray(np.where(fractions == ratio, 0.0, (end - begin) / speed))
    if not np.isfinite(times).all():
        raise ValueError(f"initial is {start:g}: the time of {depth} layers overflows")
    return times


def _evaluate(times: Array, value: float, start: float, depth: int) -> Array:
    """Return a(t) for c = 1."""
    if value == 0.0:
        return _decay(times, start, depth)
    if depth == 1:
        return np.asarray(start * np.exp(-times) - value * np.expm1(-times))
    if depth == 2:
        growth = -2 * value * times
        return np.asarray(value / (value / start * np.exp(growth) - np.expm1(growth)))
    if start == value:
        return np.full_like(times, value)
    speed = np.float64(value) ** (2 - 2 / depth)
    return np.asarray(value * _invert(speed * times, start / value, (start - value) / value, depth))


def _check_times(time: npt.ArrayLike) -> Array:
    """Return the times, or raise for one that is negative or not finite."""
    times = _as_numbers(time, "time (t)")
    if not np.all(np.isfinite(times) & (times >= 0.0)):
        raise ValueError("time (t) has a value that is negative or not finite")
    return times


def _as_numbers(x: npt.ArrayLike, title: str) -> Array:
    """Convert numbers to float64, of any shape."""
    raw = as_array(x, title)
    if raw.dtype.kind not in "biuf":
        raise TypeError(f"{title} has dtype {raw.dtype}; wanted numbers")
    return raw.astype(np.float64)


def _decay(times: Array, start: float, depth: int) -> Array:
    """Return the mode of sigma = 0: a^{1/L} follows x' = -c x^{2L-1}."""
    if depth == 1:
        return np.asarray(start * np.exp(-times))
    growth = times * np.float64(start) ** (2 - 2 / depth)
    return np.asarray(start * np.exp(-depth * np.log1p((2 * depth - 2) * growth) / (2 * depth - 2)))


def _root(strength: Array, depth: int) -> tuple[Array, Array]:
    """Return x = a^{1/L} and log(1 - x), without cancellation, for relative strengths a below 1."""
    logarithm = np.log(strength) / depth
    return np.exp(logarithm), np.log(-np.expm1(logarithm))


def _antiderivative(x: Array, log_gap: Array, depth: int) -> Array:
    """Return G(x) of `escape_time`; `log_gap` is log|1 - x|."""
    roots = np.exp(2j * np.pi * np.arange(1, depth) / depth)
    others = np.sum(roots**2 * np.log1p(-x[..., np.newaxis] / roots), axis=-1).real
    return np.asarray(x ** (2.0 - depth) / (2 - depth) - (log_gap + others) / depth)


def _tail(x: Array, log_gap: Array, depth: int) -> Array:
    """Return G(x) - G(infinity) for x > 1, without cancellation for large x.

    From `_SERIES_FROM` on it is the sum over k of x^{-n} / n with n = 2 L - 2 + k L.
    """
    count = 1 + int(40 / (depth * np.log(_SERIES_FROM)))
    orders = 2.0 * depth - 2 + depth * np.arange(count)

    def series(points: Array) -> Array:
        return np.asarray(np.sum(points[..., np.newaxis] ** -orders / orders, axis=-1))

    switch, switch_gap = np.asarray(_SERIES_FROM), np.asarray(np.log(_SERIES_FROM - 1))
    constant = _antiderivative(switch, switch_gap, depth) - series(switch)
    near = _antiderivative(np.minimum(x, switch), np.minimum(log_gap, switch_gap), depth) - constant
    return np.asarray(np.where(x < _SERIES_FROM, near, series(np.maximum(x, switch))))


def _invert(durations: Array, start: float, excess: float, depth: int) -> Array:
    """Return the relative strengths a with G(x(a)) = G(x(a_0)) + duration; `excess` is a_0 - 1, not 0.

    Bisection in w: x = 1 / (1 + e^{-w}) below 1 and x = 1 + e^{-w} above it, so that 1 - x has no
    cancellation, and G increases in w.
    """
    is_above = excess > 0
    potential = _tail if is_above else _antiderivative
    # x - 1 from a - 1.
    gap = float(np.expm1(np.log1p(excess) / depth)) if abs(excess) < 0.5 else start ** (1 / depth) - 1
    x_start = np.asarray(start ** (1 / depth))
    goal = potential(x_start, np.asarray(np.log(abs(gap))), depth) + durations
    low = np.full_like(durations, -np.log(gap) if is_above else np.log(x_start / -gap))
    # Beyond that, x is 1 to rounding.
    high = np.full_like(durations, max(float(low.max(initial=0.0)), 0.0) + 800.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_low = potential(*_unfold(middle, is_above), depth) < goal
        low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
    x = _unfold((low + high) / 2, is_above)[0]
    return np.asarray(np.where(durations == 0, start, x**depth))


def _unfold(w: Array, is_above: bool) -> tuple[Array, Array]:
    """Return x and log|1 - x|."""
    if is_above:
        return 1 + np.exp(-w), -w
    return 1 / (1 + np.exp(-w)), -np.logaddexp(0.0, w)
