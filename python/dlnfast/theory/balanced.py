# SPDX-License-Identifier: MIT
"""The exact gradient flow of balanced two-layer networks, a matrix Riccati equation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .._problem.problem import Problem, check_problem
from .._support.arrays import FloatArray, as_layers, as_vector, check_count, frobenius_norm
from .._support.errors import AssumptionError, ShapeError
from .kernel import NeuralTangentKernel

#: Largest ||W_2^T W_2 - W_1 W_1^T - lambda I||_F, relative to ||W_1||_F^2 + ||W_2||_F^2.
_BALANCE_LIMIT: Final = 1e-10
#: Largest number of substeps between two times: some seconds for small networks.
_MOST_SUBSTEPS: Final = 10**5
#: Largest exponent of a substep: exponentials stay below e^4, so that nothing overflows or cancels.
_LARGEST_EXPONENT: Final = 4.0


class BalancedFlow(NamedTuple):
    """Exact gradient flow of a two-layer network: the matrix Q Q^T at each time, Q = [W_1^T; W_2]."""

    #: (n_times, d_2, d_0), the end-to-end map W_2 W_1.
    end_to_end: npt.NDArray[np.float64]
    #: (n_times, d_0, d_0), W_1^T W_1.
    first_gram: npt.NDArray[np.float64]
    #: (n_times, d_2, d_2), W_2 W_2^T.
    last_gram: npt.NDArray[np.float64]
    #: lambda, with W_2^T W_2 - W_1 W_1^T = lambda I at all times.
    balance: float

    def kernel(self, index: int) -> NeuralTangentKernel:
        """Return the neural tangent kernel W_2 W_2^T (x) I + I (x) W_1^T W_1 at one of the times.

        Parameters
        ----------
        index : int
            Index of the time.

        Returns
        -------
        NeuralTangentKernel
            Kernel as its four factors.

        Raises
        ------
        TypeError, ValueError
            If there is no such time.
        """
        at = check_count(index, "index", minimum=0, maximum=len(self.first_gram) - 1)
        first, last = self.first_gram[at], self.last_gram[at]
        return NeuralTangentKernel(left=(last, np.eye(len(last))), right=(np.eye(len(first)), first))


def balanced_flow(problem: Problem, weights: Sequence[npt.ArrayLike], times: npt.ArrayLike) -> BalancedFlow:
    r"""Return the exact gradient flow of a two-layer network with lambda-balanced weights and white inputs.

    For W_2^T W_2 - W_1 W_1^T = lambda I at the start, and so at all times, M = Q Q^T with
    Q = [W_1^T; W_2] follows a Riccati equation,

    .. math::
        \dot M = c (F M + M F - M^2), \qquad
        F = \begin{pmatrix} -\tfrac \lambda 2 I & \Phi^T \\ \Phi & \tfrac \lambda 2 I \end{pmatrix},

    .. math::
        M(t) = e^{c F t} Q_0 \left(I + Q_0^T \frac{e^{2 c F t} - I}{2 F} Q_0\right)^{-1} Q_0^T e^{c F t}.

    Parameters
    ----------
    problem : Problem
        Problem with white inputs.
    weights : sequence of array_like
        W_1 (h x d_0) and W_2 (d_2 x h); h is arbitrary. For h = 1 all weights are balanced.
        Square `orthogonal` layers of scales eps_1, eps_2 are, with lambda = eps_2^2 - eps_1^2.
    times : array_like, shape (n_times,)
        Times of `dlnfast.flow`, not negative, not decreasing.

    Returns
    -------
    BalancedFlow
        Named tuple ``(end_to_end, first_gram, last_gram, balance)``. The layers are determined up to a
        rotation of the hidden units, W_1 -> R W_1, W_2 -> W_2 R^T.

    Raises
    ------
    AssumptionError
        If the inputs are not white, or the weights not balanced.
    ShapeError
        If there are not two layers, or they do not fit the problem.
    TypeError
        If `problem` is no `Problem`, or a layer or time is not numeric.
    ValueError
        If the times are negative, decrease, or are more than 4e5 / (c ||F||) apart.

    Notes
    -----
    *Derivation.* With P = W_2 W_1 the flow is d(W_1^T W_1) = c (Phi^T P + P^T Phi - 2 P^T P), d(W_2 W_2^T) =
    c (Phi P^T + P Phi^T - 2 P P^T), dP = c (W_2 W_2^T (Phi - P) + (Phi - P) W_1^T W_1). Balance gives
    P^T P = (W_1^T W_1)^2 + lambda W_1^T W_1 and P P^T = (W_2 W_2^T)^2 - lambda W_2 W_2^T, which turns the
    quadratic terms into -M^2 and the terms of lambda in F. The solution is verified by
    d(S^{-1}) = -S^{-1} dS S^{-1} for the matrix S in parentheses.

    *Evaluation.* In the eigenbasis of F the exponentials are diagonal. The formula is applied from time to
    time, in substeps of exponents up to 4, which is exact because M(t) only depends on some square root of
    M(s). So nothing overflows, and modes far below rounding of the others grow correctly. S is never formed:
    its triangular factor is that of [D^{1/2} Q_0; I].

    Cost: O((d_0 + d_2)^3 + k (d_0 + d_2) h^2) with h <= d_0 + d_2 after a decomposition, for k substeps in
    total, k about n_times + c ||F|| t / 4.

    Fukumizu 1998, Effect of batch learning in multilayer neural networks; Braun, Domine, Fitzgerald, Saxe
    2022, arXiv:2206.08740 (lambda = 0); Domine et al. 2024, arXiv:2409.14623 (any lambda).

    Examples
    --------
    >>> import numpy as np
    >>> import dlnfast as dln
    >>> problem = dln.Problem(np.diag([3.0, 1.0]))
    >>> first, last = dln.orthogonal([2, 2], scale=0.1), dln.orthogonal([2, 2], scale=0.5, seed=1)
    >>> exact = dln.theory.balanced_flow(problem, first + last, [0.0, 100.0])
    >>> round(exact.balance, 12), bool(np.allclose(exact.end_to_end[-1], problem.dense_target()))
    (0.24, True)
    """
    if check_problem(problem).input_gram is not None:
        raise AssumptionError("input_gram (S) is not the identity; wanted white inputs")
    first, last = _two_layers(problem, weights)
    moments = as_vector(times, "times", dtype=np.float64, symbol="t")
    if moments[0] < 0.0 or np.any(np.diff(moments) < 0.0):
        raise ValueError("times has a value that is negative, or below the one before; wanted ordered times")
    balance = _measure_balance(first, last)
    dim_in = problem.dim_in
    target = problem.dense_target()
    corner = balance / 2
    matrix = np.block([[-corner * np.eye(dim_in), target.T], [target, corner * np.eye(problem.dim_out)]])
    exponents, basis = np.linalg.eigh(matrix)
    exponents = problem.loss_scale * exponents
    root = basis.T @ np.vstack([first.T, last])
    if root.shape[1] > len(root):
        root = _triangle(root.T).T  # a smaller root of the same matrix
    now, largest = 0.0, float(np.max(np.abs(exponents)))
    found = np.empty((len(moments), len(matrix), len(matrix)))
    for i, moment in enumerate(moments):
        exponent = largest * (float(moment) - now)
        if not exponent <= _MOST_SUBSTEPS * _LARGEST_EXPONENT:
            raise ValueError(
                f"times[{i}] is {moment:g}, at which exponentials have grown by e^{exponent:.1e}; wanted at "
                f"most e^{_MOST_SUBSTEPS * _LARGEST_EXPONENT:.0e} from one time to the next"
            )
        count = math.ceil(exponent / _LARGEST_EXPONENT)
        for _ in range(count):
            root = _advance(root, exponents, (moment - now) / count, problem.loss_scale)
        now = float(moment)
        whole = basis @ root
        found[i] = whole @ whole.T
    return BalancedFlow(
        end_to_end=found[:, dim_in:, :dim_in].copy(),
        first_gram=found[:, :dim_in, :dim_in].copy(),
        last_gram=found[:, dim_in:, dim_in:].copy(),
        balance=balance,
    )


def _two_layers(problem: Problem, weights: Sequence[npt.ArrayLike]) -> tuple[FloatArray, FloatArray]:
    """Return W_1 and W_2 in float64, or raise if they do not fit the problem."""
    layers = [np.asarray(layer, dtype=np.float64) for layer in as_layers(weights)]
    if len(layers) != 2:
        raise ShapeError(f"weights has {len(layers)} layers; wanted two, W_1 and W_2")
    first, last = layers
    if (len(last), first.shape[1]) != (problem.dim_out, problem.dim_in):
        raise ShapeError(
            f"weights map {first.shape[1]} to {len(last)} dimensions; wanted {problem.dim_in} to "
            f"{problem.dim_out}, those of the problem"
        )
    return first, last


def _measure_balance(first: FloatArray, last: FloatArray) -> float:
    """Return lambda, or raise if the weights are not balanced."""
    difference = last.T @ last - first @ first.T
    balance = float(np.trace(difference)) / len(difference)
    deviation = frobenius_norm(difference - balance * np.eye(len(difference)))
    size = frobenius_norm(first) ** 2 + frobenius_norm(last) ** 2
    if deviation > _BALANCE_LIMIT * size:
        raise AssumptionError(
            f"weights are not balanced: W_2^T W_2 - W_1 W_1^T differs from {balance:.3g} I by "
            f"{deviation / size:.1e}, relative to their squares; wanted at most {_BALANCE_LIMIT:.0e}"
        )
    return balance


def _triangle(matrix: FloatArray) -> FloatArray:
    """Return the triangular factor R of a QR decomposition."""
    found: FloatArray = np.linalg.qr(matrix)[1]
    return found


def _advance(root: FloatArray, exponents: FloatArray, duration: float, rate: float) -> FloatArray:
    """Return a root of M after a short time, from one before it, in the eigenbasis of F.

    `exponents` are c times the eigenvalues f of F. The new root is e^{c f t} q R^{-1} with the triangular
    factor R^T R = I + q^T D q and D = (e^{2 c f t} - 1) / (2 f).
    """
    powers = 2 * exponents * duration
    # (e^x - 1) / x, with its limit 1 at 0.
    means = np.divide(np.expm1(powers), powers, out=np.ones_like(powers), where=powers != 0)
    scaled = np.sqrt(rate * duration * means)[:, np.newaxis] * root
    factor = _triangle(np.vstack([scaled, np.eye(root.shape[1])]))
    found: FloatArray = np.exp(powers / 2)[:, np.newaxis] * np.linalg.solve(factor.T, root.T).T
    return found
