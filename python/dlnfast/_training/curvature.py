# SPDX-License-Identifier: MIT
"""The sharpness of the loss of a partly known matrix, from which learning rates are derived."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from .._problem.factors import leading_factors, orthonormal_rows, threads_beside_numpy
from .._problem.observations import Completion, Observations, Sensing
from .._support.arrays import FloatArray, random_generator, scale_of
from .._support.dispatch import core

#: For hidden layers up to this width the curvature is measured within the network's end layers.
_NARROW: Final = 64
#: Number of leading singular vectors that represent the learned matrix.
_LEADING: Final = 8
#: Steps of power iteration; the margin covers their error.
_SWEEPS: Final = 12
_MARGIN: Final = 1.1


class Curvatures(NamedTuple):
    """The largest observed share of the squared norm of a change.

    For orthonormal U (d_y, a) and V (d_x, b) and any X of norm 1: of ``U X V^T``, of ``X V^T`` and of
    ``U X``. All are p for entries observed with uniform density p, and 1 for a matrix known as a whole.
    """

    core: float
    left: float
    right: float


def curvatures(problem: Observations, U: FloatArray, V: FloatArray) -> Curvatures:
    """Return the observed shares of changes inside two subspaces, and inside only one of them.

    The Gauss-Newton part of the Hessian of ``c/2 ||B vec(W_{L:1}) - y||^2`` for layer l is at most c times
    the largest of these times the squared norms of the other layers.

    Parameters
    ----------
    problem : Observations
        The entries or measurements.
    U, V : ndarray, shape (d_y, a) and (d_x, b)
        Orthonormal columns.

    Notes
    -----
    Power iteration, 36 passes over the observations; 10 per cent are added for its error.
    """
    u, v = np.ascontiguousarray(U.T), np.ascontiguousarray(V.T)
    a, b = len(u), len(v)
    apply_observed = (
        _make_entry_map(problem) if isinstance(problem, Completion) else _make_measurement_map(problem)
    )
    if isinstance(problem, Sensing):
        operators = problem.projected(U, V).reshape(problem.n_observations, -1)
        inside = float(np.linalg.norm(operators, 2)) ** 2 / _MARGIN
    else:
        inside = _estimate_largest_eigenvalue(lambda X: u @ apply_observed(X.T @ u, v, "left").T, (a, b), 0)
    left = _estimate_largest_eigenvalue(lambda X: apply_observed(X, v, "left"), (b, problem.dim_out), 1)
    right = _estimate_largest_eigenvalue(lambda X: apply_observed(u, X, "right"), (a, problem.dim_in), 2)
    return Curvatures(_MARGIN * inside, _MARGIN * left, _MARGIN * right)


#: Maps x (k, d_y), y (k, d_x) and a side to y E^T ("left") or x E ("right") of the observed part,
#: E = B^T B (x^T y).
_ObservedMap = Callable[[FloatArray, FloatArray, str], FloatArray]


def _make_measurement_map(problem: Observations) -> _ObservedMap:
    assert isinstance(problem, Sensing)

    def apply_observed(x: FloatArray, y: FloatArray, side: str) -> FloatArray:
        error = problem.adjoint(problem.apply(x.T @ y))
        return np.asarray(y @ error.T if side == "left" else x @ error)

    return apply_observed


def _make_entry_map(problem: Completion) -> _ObservedMap:
    nothing = np.zeros(problem.n_observations)
    by_rows, by_columns = problem.entries()
    index = (*by_rows[:2], nothing), (*by_columns[:2], nothing)

    def apply_observed(x: FloatArray, y: FloatArray, side: str) -> FloatArray:
        entries = index
        if side == "right":  # the transpose, so that only one of the two products is computed
            entries, x, y = (index[1], index[0]), y, x
        x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
        found = np.empty_like(x)
        core.residual_products(entries, x, y, found, None, threads_beside_numpy(entries, len(x)))
        return found

    return apply_observed


def _estimate_largest_eigenvalue(
    product: Callable[[FloatArray], FloatArray], shape: tuple[int, int], stream: int
) -> float:
    """Return the largest eigenvalue of a positive semi-definite map, from below."""
    vector: FloatArray = random_generator(0, ("curvature", stream)).standard_normal(shape)
    value = 0.0
    for _ in range(_SWEEPS):
        size = float(np.linalg.norm(vector))
        if size == 0.0:
            break
        vector = product(vector / size)
        value = float(np.linalg.norm(vector))
    return value


def layer_curvatures(problem: Observations, weights: Sequence[FloatArray]) -> list[float]:
    """Return for each layer the largest observed share of its changes.

    In networks that are narrow inside, the first and last layer change whole columns and rows, the others
    only the part between them; in wide networks any layer may do either.
    """
    left, right = weights[-1], weights[0].T
    found = leading_factors(problem.backprojection(), min(_LEADING, *problem.shape), tolerance=1e-3)
    # Smaller ones are those of the pattern of observations: spikes, on which it is all but complete.
    found = found.truncated(int(np.sum(found.s > 0.5 * found.s[:1])))
    if max(left.shape[1], right.shape[1]) > min(_NARROW, *problem.shape):
        seen = curvatures(problem, found.U, found.V)
        return [max(seen)] * len(weights)
    seen = curvatures(problem, _span(left, found.U), _span(right, found.V))
    if len(weights) == 1:
        return [max(seen)]
    return [seen.right, *[seen.core] * (len(weights) - 2), seen.left]


def _span(*blocks: FloatArray) -> FloatArray:
    """Return an orthonormal basis of all columns, each block's by its own scale."""
    tiny = float(np.finfo(np.float64).tiny)
    rows = np.vstack([x.T.astype(np.float64) / max(float(np.linalg.norm(x)), tiny) for x in blocks])
    values, vectors = np.linalg.eigh(rows @ rows.T)
    # Directions below 1e-5 of the largest are rounding of those that two blocks share.
    is_large = values > 1e-10 * max(float(values[-1]), tiny)
    return orthonormal_rows((vectors[:, is_large] / np.sqrt(values[is_large])).T @ rows).T


@np.errstate(over="ignore")
def constant_rate(
    problem: Observations, weights: Sequence[FloatArray], ratios: Sequence[float], curvature: Sequence[float]
) -> float:
    r"""Return a learning rate that is safe from the start to the end: one over the larger sharpness.

    Descent keeps the differences of ``W_l W_l^T / m_l`` between neighbours (m_l: the ratio of the layer's
    rate), so that layers with largest singular values s_l end at ``s_l^2 + m_l t``, with the t that makes
    their product that of the matrix, sigma_1 of the surrogate. There the sharpness is
    ``c sum_l m_l q_l prod_{k != l} s_k^2``; at the start the residual adds to it as in
    `theory.default_learning_rate`.
    """
    scales = np.array([scale_of(w) for w in weights])
    m, q = np.asarray(ratios, dtype=np.float64), np.asarray(curvature)
    sigma = float(problem.target_values(1)[0])

    def gauss_newton(values: FloatArray) -> float:
        return float(np.sum(m * q * multiply_others(values) ** 2))

    at_end = gauss_newton(np.sqrt(_layer_squares(sigma, scales, m)))
    error = problem.error_scale * math.sqrt(2 * problem.loss(list(weights)) / problem.loss_scale)
    rows = np.sqrt(m) * sum_pairs(scales, np.sqrt(m))
    sharpness = problem.loss_scale * max(at_end, gauss_newton(scales) + float(rows.max()) * error)
    return 1.0 / sharpness if sharpness > 0 else 1.0 / problem.loss_scale


@np.errstate(over="ignore")
def minimum_sharpness(problem: Observations, scales: Sequence[float], ratios: Sequence[float]) -> float:
    r"""Return an estimate of the largest eigenvalue of the Hessian at the minimum.

    .. math:: c\, p \sum_l m_l \prod_{k \ne l} s_k^2

    with the density p of the observations, and layers of largest singular values s_l that descent has brought
    to the sigma_1 of the surrogate (see `constant_rate`, whose curvatures are bounds). Within a third where
    the observations are many and nothing stands out of the matrix.

    Parameters
    ----------
    problem : Observations
        The entries or measurements.
    scales : sequence of float
        Initial scale of every layer: `scale_of`.
    ratios : sequence of float
        m_l: the learning rate of every layer over the one that the sharpness is for.

    Returns
    -------
    float
        0 where the observations are zeros.
    """
    m = np.asarray(ratios, dtype=np.float64)
    if m.size == 1:
        return float(problem.loss_scale * m[0] * problem.error_scale**2)
    sigma = float(problem.target_values(1)[0])
    if sigma == 0.0:
        return 0.0
    squares = _layer_squares(sigma, np.asarray(scales, dtype=np.float64), m)
    return float(problem.loss_scale * problem.density * np.sum(m * multiply_others(squares)))


def multiply_others(values: FloatArray) -> FloatArray:
    """Return for each i the product of all values but the i-th, in O(L) and without a division."""
    return _products_before(values) * _products_before(values[::-1])[::-1]


def sum_pairs(values: FloatArray, terms: FloatArray) -> FloatArray:
    r"""Return for each i the sum ``sum_{j != i} terms_j prod_{k != i, j} values_k``, in O(L).

    It is the coefficient of x in ``prod_{k != i} (values_k + terms_k x)``.
    """

    def sums_before(values: FloatArray, terms: FloatArray, products: FloatArray) -> FloatArray:
        sums = np.zeros_like(values)
        for i in range(1, len(values)):
            sums[i] = sums[i - 1] * values[i - 1] + products[i - 1] * terms[i - 1]
        return sums

    below, above = _products_before(values), _products_before(values[::-1])
    sums_below = sums_before(values, terms, below)
    sums_above = sums_before(values[::-1], terms[::-1], above)
    found: FloatArray = sums_below * above[::-1] + below * sums_above[::-1]
    return found


def _products_before(values: FloatArray) -> FloatArray:
    """Return for each i the product of the values before the i-th."""
    return np.concatenate([np.ones(min(1, len(values))), np.cumprod(values[:-1])])


def _layer_squares(sigma: float, scales: FloatArray, m: FloatArray) -> FloatArray:
    """Return the largest singular values of the layers, squared, when their product has become sigma."""
    low, high = 0.0, 1.0
    while np.prod(scales**2 + m * high) < sigma**2 and m.any():
        high *= 2.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.prod(scales**2 + m * middle) < sigma**2 else (low, middle)
    squares: FloatArray = scales**2 + m * low
    return squares
