# SPDX-License-Identifier: MIT
"""Training of deep linear networks in plain NumPy: the specification of the package.

Every function implements a formula of the papers for float64 arrays, without optimisation. The tests compare
all engines of the package with it. Names follow the papers. Lists count layers from 0
where the mathematics counts from 1: ``weights[l - 1]`` is W_l, a d_l x d_{l-1} matrix; ``bases[l]`` is A_l.
``learning_rate`` (eta_l), ``weight_decay`` (lambda_l), ``momentum`` (mu_l) and ``scales`` (epsilon_l) are
sequences with one number per layer.

Sources: Yaras, Wang, Hu, Zhu, Balzano, Qu. The Law of Parsimony in Gradient Descent for Learning Deep Linear
Networks. arXiv:2306.01154, Theorem 1. Yaras, Wang, Balzano, Qu. Compressible Dynamics in Deep
Overparameterized Low-Rank Learning & Adaptation. ICML 2024, arXiv:2406.04112.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from ._support.arrays import FloatArray as Array
from ._support.errors import AssumptionError

Value = TypeVar("Value", float, Array)

# The model, its loss and its gradients.


def end_to_end(weights: Sequence[Array]) -> Array:
    """Return W_{L:1} = W_L ... W_1, a d_L x d_0 matrix.

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) arrays
        W_1 .. W_L.

    Returns
    -------
    (d_L, d_0) array

    Notes
    -----
    Cost: O(L d^3).
    """
    return _product(weights, weights[0].shape[1])


def loss_from_data(weights: Sequence[Array], inputs: Array, outputs: Array, loss_scale: float) -> float:
    """Return c/2 ||W_{L:1} X - Y||_F^2 for X (d_0, N) and Y (d_L, N).

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) arrays
        W_1 .. W_L.
    inputs : (d_0, N) array
        X.
    outputs : (d_L, N) array
        Y.
    loss_scale : float
        c.

    Returns
    -------
    float

    Notes
    -----
    Cost: O(L d^3 + d^2 N).
    """
    return loss_scale / 2 * _squared_norm(end_to_end(weights) @ inputs - outputs)


def loss(
    weights: Sequence[Array],
    target: Array,
    input_gram: Array | None,
    loss_scale: float,
    output_norm_squared: float | None = None,
) -> float:
    """Return the loss of `loss_from_data` from S = X X^T, Phi = Y X^T and ||Y||_F^2, without cancellation.

    With the least-squares solution M, M S = Phi, and F F^T = S, the loss is
    c/2 ||(W_{L:1} - M) F||_F^2 + c/2 (||Y||_F^2 - <M, Phi>). M and F have no components in the null space of
    S. Without `output_norm_squared` the second term, which does not depend on W, is taken as 0.

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) arrays
        W_1 .. W_L.
    target : (d_L, d_0) array
        Phi.
    input_gram : (d_0, d_0) array or None
        S; None for the identity.
    loss_scale : float
        c.
    output_norm_squared : float, optional
        ``||Y||_F^2``.

    Returns
    -------
    float

    Notes
    -----
    Cost: O(L d^3). (For S other than the identity a pseudoinverse and its eigenvectors.)
    """
    solution = least_squares(target, input_gram)
    excess = _excess_loss(end_to_end(weights), solution, _input_factor(input_gram), loss_scale)
    return excess + _loss_floor(solution, target, loss_scale, output_norm_squared)


def least_squares(target: Array, input_gram: Array | None) -> Array:
    """Return the M of minimal norm with M S = Phi.

    Parameters
    ----------
    target : (d_L, d_0) array
        Phi.
    input_gram : (d_0, d_0) array or None
        S; None for the identity.

    Returns
    -------
    (d_L, d_0) array
        M = Phi S^+; Phi if S is the identity.

    Notes
    -----
    Cost: O(d_0^3).
    """
    if input_gram is None:
        return target
    return target @ np.linalg.pinv(input_gram, rcond=_cutoff(input_gram), hermitian=True)


def gradients(
    weights: Sequence[Array], target: Array, input_gram: Array | None, loss_scale: float
) -> list[Array]:
    """Return G_l = c W_{L:l+1}^T (W_{L:1} S - Phi) W_{l-1:1}^T for l = 1..L.

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) arrays
        W_1 .. W_L.
    target : (d_L, d_0) array
        Phi.
    input_gram : (d_0, d_0) array or None
        S; None for the identity.
    loss_scale : float
        c.

    Returns
    -------
    list of (d_l, d_{l-1}) arrays

    Notes
    -----
    Cost: O(L d^3). arXiv:2306.01154, equation of the gradient under Theorem 1.
    """
    below = [np.eye(weights[0].shape[1])]
    for weight in weights:
        below.append(weight @ below[-1])
    product = below.pop()
    residual = (product if input_gram is None else product @ input_gram) - target
    above = np.eye(len(target))
    result: list[Array] = []
    for weight, product_below in zip(reversed(weights), reversed(below), strict=True):
        result.append(loss_scale * above.T @ residual @ product_below.T)
        above = above @ weight
    return result[::-1]


def hessian_product(
    weights: Sequence[Array],
    directions: Sequence[Array],
    target: Array,
    input_gram: Array | None,
    loss_scale: float,
) -> list[Array]:
    """Return the derivatives of the gradients G_1 .. G_L along D_1 .. D_L: the Hessian times (D_1, .., D_L).

    With A_l = W_{L:l+1}, B_l = W_{l-1:1}, R = W_{L:1} S - Phi and a dot for the derivative,
    c (dot A_l^T R B_l^T + A_l^T dot R B_l^T + A_l^T R dot B_l^T).

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) arrays
        W_1 .. W_L.
    directions : sequence of (d_l, d_{l-1}) arrays
        D_1 .. D_L.
    target : (d_L, d_0) array
        Phi.
    input_gram : (d_0, d_0) array or None
        S; None for the identity.
    loss_scale : float
        c.

    Returns
    -------
    list of (d_l, d_{l-1}) arrays

    Notes
    -----
    Cost: O(L d^3).
    """
    below = [np.eye(weights[0].shape[1])]
    below_dot = [np.zeros_like(below[0])]
    for weight, direction in zip(weights, directions, strict=True):
        below_dot.append(direction @ below[-1] + weight @ below_dot[-1])
        below.append(weight @ below[-1])
    gram = below[0] if input_gram is None else input_gram
    residual, residual_dot = below[-1] @ gram - target, below_dot[-1] @ gram
    above = np.eye(len(target))
    above_dot = np.zeros_like(above)
    result: list[Array] = []
    for layer in reversed(range(len(weights))):
        change = above_dot.T @ residual @ below[layer].T + above.T @ residual_dot @ below[layer].T
        result.insert(0, loss_scale * (change + above.T @ residual @ below_dot[layer].T))
        above_dot = above_dot @ weights[layer] + above @ directions[layer]
        above = above @ weights[layer]
    return result


def hessian(weights: Sequence[Array], target: Array, input_gram: Array | None, loss_scale: float) -> Array:
    """Return the Hessian of the loss with respect to all entries of W_1 .. W_L, column by column.

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) arrays
        W_1 .. W_L.
    target : (d_L, d_0) array
        Phi.
    input_gram : (d_0, d_0) array or None
        S; None for the identity.
    loss_scale : float
        c.

    Returns
    -------
    (n, n) array
        n = sum_l d_l d_{l-1}, for the entries of W_1 in C order, then those of W_2 and so on.

    Notes
    -----
    Cost: O(n L d^3).
    """
    splits = np.cumsum([weight.size for weight in weights])
    result = np.empty((splits[-1], splits[-1]))
    for i, unit in enumerate(np.eye(splits[-1])):
        parts = np.split(unit, splits[:-1])
        directions = [part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]
        changes = hessian_product(weights, directions, target, input_gram, loss_scale)
        result[:, i] = np.concatenate([change.ravel() for change in changes])
    return result


def train_kernel(weights: Sequence[Array], inputs: Array) -> Array:
    """Return the neural tangent kernel over the outputs W_{L:1} X: J J^T with the Jacobian J of the outputs.

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) arrays
        W_1 .. W_L.
    inputs : (d_0, N) array
        X.

    Returns
    -------
    (d_L N, d_L N) array
        sum_l (W_{L:l+1} W_{L:l+1}^T) kron (X^T W_{l-1:1}^T W_{l-1:1} X), for the outputs in C order.

    Notes
    -----
    Cost: O(L d_L^2 N^2).
    """
    n_outputs, n_samples = len(weights[-1]), inputs.shape[1]
    result = np.zeros((n_outputs * n_samples, n_outputs * n_samples))
    for layer in range(len(weights)):
        above = _product(weights[layer + 1 :], len(weights[layer]))
        below = _product(weights[:layer], len(inputs)) @ inputs
        result += np.kron(above @ above.T, below.T @ below)
    return result


# Training all weights.


def train_dense(
    weights: Sequence[Array],
    target: Array,
    *,
    input_gram: Array | None = None,
    loss_scale: float,
    learning_rate: Sequence[float],
    steps: int,
    weight_decay: Sequence[float],
    momentum: Sequence[float],
    output_norm_squared: float | None = None,
) -> Iterator[tuple[float, list[Array]]]:
    """Yield (loss, weights) of gradient descent at t = 0, 1, .., `steps`.

    All layers are updated simultaneously: V_l <- mu_l V_l + G_l + lambda_l W_l, then W_l <- W_l - eta_l V_l;
    V_l(0) = 0.

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) arrays
        W_1(0) .. W_L(0); they are not changed.
    target : (d_L, d_0) array
        Phi = Y X^T.
    input_gram : (d_0, d_0) array or None
        S = X X^T; None for whitened inputs, S = I.
    loss_scale : float
        c.
    learning_rate, weight_decay, momentum : sequence of float
        eta_l, lambda_l, mu_l.
    steps : int
        Number of updates.
    output_norm_squared : float or None
        ||Y||_F^2, for the part of the loss that does not depend on the weights.

    Yields
    ------
    loss : float
    weights : list of arrays
        W_1(t) .. W_L(t), at t = 0 .. `steps`.

    Notes
    -----
    Cost: O(L d^3) per step.
    """
    now: list[Array] = [np.array(weight, dtype=np.float64) for weight in weights]
    velocities: list[Array] = [np.zeros_like(weight) for weight in now]
    settings = list(zip(learning_rate, weight_decay, momentum, strict=True))
    solution, factor = least_squares(target, input_gram), _input_factor(input_gram)
    floor = _loss_floor(solution, target, loss_scale, output_norm_squared)
    for step in range(steps + 1):
        if step > 0:
            slopes = gradients(now, target, input_gram, loss_scale)
            now, velocities = _heavy_ball(now, velocities, slopes, settings)
        yield _excess_loss(end_to_end(now), solution, factor, loss_scale) + floor, now


# Partial observations of a matrix: the gradient with respect to W_{L:1} is Omega * (W_{L:1} - Phi) for
# observed entries (a 0/1 array Omega), and sum_i (<A_i, W_{L:1}> - y_i) A_i for measurements.


def observed_residual(product: Array, target: Array, mask: Array) -> Array:
    """Return E = Omega * (W_{L:1} - Phi); the loss is c/2 ||E||_F^2. Other entries of Phi are ignored.

    Parameters
    ----------
    product, target : (d_L, d_0) array
        W_{L:1} and Phi.
    mask : (d_L, d_0) array
        Nonzero where Phi is observed.

    Returns
    -------
    (d_L, d_0) array

    Notes
    -----
    Cost: O(d_L d_0).
    """
    return np.where(mask != 0, product - np.where(mask != 0, target, 0.0), 0.0)


def measured_residual(product: Array, operators: Array, values: Array) -> Array:
    """Return r_i = <A_i, W_{L:1}> - y_i for A of shape (m, d_L, d_0); the loss is c/2 ||r||^2.

    Parameters
    ----------
    product : (d_L, d_0) array
        W_{L:1}.
    operators : (m, d_L, d_0) array
        A_i.
    values : (m,) array
        y_i.

    Returns
    -------
    (m,) array

    Notes
    -----
    Cost: O(m d_L d_0).
    """
    residual: Array = np.einsum("mij,ij->m", operators, product) - values
    return residual


def train_observed(
    weights: Sequence[Array],
    target: Array,
    mask: Array,
    *,
    loss_scale: float,
    learning_rate: Sequence[float],
    steps: int,
    weight_decay: Sequence[float],
    momentum: Sequence[float],
) -> Iterator[tuple[float, list[Array]]]:
    """Yield (loss, weights) of gradient descent on c/2 ||Omega * (W_{L:1} - Phi)||_F^2; see `train_dense`.

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) arrays
        W_1(0) .. W_L(0).
    target, mask : (d_L, d_0) array
        Phi, and Omega, which is nonzero where Phi is observed.
    loss_scale : float
        c.
    learning_rate, weight_decay, momentum : sequence of float
        eta_l, lambda_l, mu_l.
    steps : int
        Number of updates.

    Yields
    ------
    loss : float
    weights : list of arrays
        W_1(t) .. W_L(t), at t = 0 .. `steps`.

    Notes
    -----
    Cost: O(L d^3) per step.
    """

    def residual(product: Array) -> tuple[float, Array]:
        error = observed_residual(product, target, mask)
        return _squared_norm(error), error

    return _descend(weights, residual, loss_scale, steps, learning_rate, weight_decay, momentum)


def train_measured(
    weights: Sequence[Array],
    operators: Array,
    values: Array,
    *,
    loss_scale: float,
    learning_rate: Sequence[float],
    steps: int,
    weight_decay: Sequence[float],
    momentum: Sequence[float],
) -> Iterator[tuple[float, list[Array]]]:
    """Yield (loss, weights) of gradient descent on c/2 sum_i (<A_i, W_{L:1}> - y_i)^2; see `train_dense`.

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) arrays
        W_1(0) .. W_L(0).
    operators : (m, d_L, d_0) array
        A_i.
    values : (m,) array
        y_i.
    loss_scale : float
        c.
    learning_rate, weight_decay, momentum : sequence of float
        eta_l, lambda_l, mu_l.
    steps : int
        Number of updates.

    Yields
    ------
    loss : float
    weights : list of arrays
        W_1(t) .. W_L(t), at t = 0 .. `steps`.

    Notes
    -----
    Cost: O(L d^3 + m d^2) per step.
    """

    def residual(product: Array) -> tuple[float, Array]:
        misfit = measured_residual(product, operators, values)
        return _squared_norm(misfit), np.einsum("m,mij->ij", misfit, operators)

    return _descend(weights, residual, loss_scale, steps, learning_rate, weight_decay, momentum)


def _descend(
    weights: Sequence[Array],
    residual: Callable[[Array], tuple[float, Array]],
    loss_scale: float,
    steps: int,
    *rates: Sequence[float],
) -> Iterator[tuple[float, list[Array]]]:
    """Run gradient descent on c/2 times a sum of squares.

    ``residual(W_{L:1})`` returns the sum of squares, and half its gradient with respect to W_{L:1}.
    """
    now: list[Array] = [np.array(weight, dtype=np.float64) for weight in weights]
    velocities: list[Array] = [np.zeros_like(weight) for weight in now]
    settings = list(zip(*rates, strict=True))
    for step in range(steps + 1):
        squares, error = residual(end_to_end(now))
        yield loss_scale / 2 * squares, now
        if step == steps:
            return
        slopes = []
        for index, weight in enumerate(now):
            above = _product(now[index + 1 :], weight.shape[0])
            below = _product(now[:index], now[0].shape[1])
            slopes.append(loss_scale * above.T @ error @ below.T)
        now, velocities = _heavy_ball(now, velocities, slopes, settings)


def _heavy_ball(
    values: Sequence[Value],
    velocities: Sequence[Value],
    slopes: Sequence[Value],
    settings: Sequence[tuple[float, float, float]],
) -> tuple[list[Value], list[Value]]:
    """Update all layers by heavy ball with (eta, lambda, mu)_l; return new values W_l and velocities V_l."""
    new_values: list[Value] = []
    new_velocities: list[Value] = []
    for value, velocity, slope, (eta, decay, mu) in zip(values, velocities, slopes, settings, strict=True):
        new_velocity = mu * velocity + slope + decay * value
        new_velocities.append(new_velocity)
        new_values.append(value - eta * new_velocity)
    return new_values, new_velocities


# The theorem: S = I, W_l(0) = epsilon_l Q_l, and either
#   case 1: every layer d x d and orthogonal, Phi of rank r, or
#   case 2: the last layer K x d, the others d x d and orthogonal, any Phi.


def active_subspaces(weights0: Sequence[Array], scales: Sequence[float], target: Array) -> list[Array]:
    """Return orthonormal bases A_0 .. A_L of the active subspaces, by the formula of the theorem.

    With Phi = U Sigma V^T of rank r: A_0 = orth[V, Q_{L:1}^T U] in case 1, orth[V, Q_{L:1}^T] in case 2;
    A_l = Q_l A_{l-1}, except A_L = I in case 2.

    Parameters
    ----------
    weights0 : sequence of (d_l, d_{l-1}) arrays
        W_1(0) .. W_L(0).
    scales : sequence of float
        epsilon_l.
    target : (d_L, d_0) array
        Phi.

    Returns
    -------
    list of (d_l, a_l) arrays
        A_0 .. A_L, orthonormal columns.

    Notes
    -----
    Cost: O(L d^3). arXiv:2306.01154, Theorem 1.
    """
    rotations = _check_rotations(weights0, scales)
    whole = end_to_end(rotations)
    left, values, right_t = np.linalg.svd(target, full_matrices=False)
    rank = _count_rank(values, target.shape)
    if _is_square(weights0):
        bases = [_orthonormal_basis(np.hstack([right_t[:rank].T, whole.T @ left[:, :rank]]))]
    else:
        bases = [_orthonormal_basis(np.hstack([right_t[:rank].T, whole.T]))]
    for rotation in rotations[:-1]:
        bases.append(rotation @ bases[-1])
    bases.append(rotations[-1] @ bases[-1] if _is_square(weights0) else np.eye(len(target)))
    return bases


def closed_subspaces(
    weights0: Sequence[Array], target: Array, input_gram: Array | None, tolerance: float = 1e-10
) -> list[Array]:
    """Return bases of the smallest invariant subspaces A_0 .. A_L of gradient descent, for any weights.

    They contain the row and column spaces of Phi, and W_l(0) A_{l-1} lies in A_l, W_l(0)^T A_l in A_{l-1},
    S A_0 in A_0. Images are added until no dimension changes.

    Parameters
    ----------
    weights0 : sequence of (d_l, d_{l-1}) arrays
        W_1(0) .. W_L(0).
    target : (d_L, d_0) array
        Phi.
    input_gram : (d_0, d_0) array or None
        S; None for the identity.
    tolerance : float
        Norm, relative to that of the map, up to which a direction counts as zero.

    Returns
    -------
    list of (d_l, a_l) arrays
        A_0 .. A_L, orthonormal columns.

    Notes
    -----
    Cost: O(L d^3) for each direction that is found.
    """
    left, values, right_t = np.linalg.svd(target, full_matrices=False)
    rank = _count_rank(values, target.shape)
    bases: list[Array] = [np.empty((weights0[0].shape[1], 0)), *(np.empty((len(w), 0)) for w in weights0)]
    bases[0], bases[-1] = right_t[:rank].T, left[:, :rank]
    while True:
        blocks = [[basis] for basis in bases]
        for layer, weight in enumerate(weights0):
            size = max(float(np.linalg.norm(weight, 2)), 1e-300)
            blocks[layer + 1].append(weight @ bases[layer] / size)
            blocks[layer].append(weight.T @ bases[layer + 1] / size)
        if input_gram is not None:
            blocks[0].append(input_gram @ bases[0] / np.linalg.norm(input_gram, 2))
        grown: list[Array] = []
        for parts in blocks:
            vectors, lengths, _ = np.linalg.svd(np.hstack(parts), full_matrices=False)
            grown.append(vectors[:, lengths > tolerance])
        if all(new.shape == old.shape for new, old in zip(grown, bases, strict=True)):
            return bases
        bases = grown


def train_reduced(
    weights0: Sequence[Array],
    scales: Sequence[float],
    bases: Sequence[Array],
    target: Array,
    *,
    loss_scale: float,
    learning_rate: Sequence[float],
    steps: int,
    weight_decay: Sequence[float],
    momentum: Sequence[float],
) -> Iterator[tuple[float, list[Array], list[float]]]:
    """Yield (loss, cores Wt_l, scalars rho_l) at t = 0, 1, .., `steps`: the reduced form of `train_dense`.

    The cores are trained as a small network with the target Phit = A_L^T Phi A_0 and the gradient
    c Wt_{L:l+1}^T (Wt_{L:1} - Phit) Wt_{l-1:1}^T. They start from A_l^T W_l(0) A_{l-1}, which is epsilon_l I
    (except for l = L in case 2).

    On the complement, layer l is a multiple rho_l of its initial rotation, rho_l(0) = epsilon_l. In case 1
    the gradient of rho_l is c rho_l prod_{k != l} rho_k^2, so without momentum
    rho_l <- rho_l (1 - eta_l lambda_l - c eta_l prod_{k != l} rho_k^2). In case 2 it is 0, so that without
    momentum rho_l = epsilon_l (1 - eta_l lambda_l)^t, for l < L only: W_L is 0 on the complement. Each rho_l
    has its own velocity.

    Parameters
    ----------
    weights0, scales, target
        W_l(0) = epsilon_l Q_l, epsilon_l and Phi.
    bases
        A_0 .. A_L from `active_subspaces`.
    loss_scale, learning_rate, steps, weight_decay, momentum
        Same meaning as in `train_dense`.

    Yields
    ------
    loss : float
    cores : list of (a_l, a_{l-1}) arrays
    rho : list of float
        Wt_l(t) and rho_l(t), at t = 0 .. `steps`.

    Notes
    -----
    Cost: O(L a^3) per step for active dimension a, and O(L d^2 a) before the first. arXiv:2306.01154,
    Theorem 1.
    """
    is_square = _is_square(weights0)
    dim, active_dim = bases[0].shape
    small_target = bases[-1].T @ target @ bases[0]
    cores: list[Array] = [
        above.T @ weight @ below for above, weight, below in zip(bases[1:], weights0, bases[:-1], strict=True)
    ]
    rho = [float(scale) for scale in (scales if is_square else scales[:-1])]
    core_velocities = [np.zeros_like(core) for core in cores]
    rho_velocities = [0.0 for _ in rho]
    settings = list(zip(learning_rate, weight_decay, momentum, strict=True))
    for step in range(steps + 1):
        if step > 0:
            core_slopes = gradients(cores, small_target, None, loss_scale)
            rho_slopes = [
                _rho_slope(rho, layer, loss_scale) if is_square else 0.0 for layer in range(len(rho))
            ]
            cores, core_velocities = _heavy_ball(cores, core_velocities, core_slopes, settings)
            rho, rho_velocities = _heavy_ball(rho, rho_velocities, rho_slopes, settings[: len(rho)])
        complement_norm_squared = (dim - active_dim) * math.prod(rho) ** 2 if is_square else 0.0
        small_loss = _excess_loss(end_to_end(cores), small_target, None, loss_scale)
        yield small_loss + loss_scale / 2 * complement_norm_squared, cores, rho


def reconstruct(
    weights0: Sequence[Array],
    scales: Sequence[float],
    bases: Sequence[Array],
    cores: Sequence[Array],
    rho: Sequence[float],
) -> list[Array]:
    """Return W_1(t) .. W_L(t) from the cores Wt_l(t) and the scalars rho_l(t).

    W_l = (rho_l / epsilon_l) W_l(0) + A_l (Wt_l - rho_l I) A_{l-1}^T, except W_L = Wt_L A_{L-1}^T in case 2.

    Parameters
    ----------
    weights0 : sequence of (d_l, d_{l-1}) arrays
        W_1(0) .. W_L(0).
    scales : sequence of float
        epsilon_l.
    bases : sequence of (d_l, a_l) arrays
        A_0 .. A_L.
    cores : sequence of (a_l, a_{l-1}) arrays
        Wt_l(t).
    rho : sequence of float
        rho_l(t).

    Returns
    -------
    list of (d_l, d_{l-1}) arrays

    Notes
    -----
    Cost: O(L d^2 a). arXiv:2306.01154, Theorem 1.
    """
    weights: list[Array] = []
    for layer, core in enumerate(cores):
        above, below = bases[layer + 1], bases[layer]
        if layer < len(rho):
            change = above @ (core - rho[layer] * np.eye(len(core))) @ below.T
            weights.append(rho[layer] / scales[layer] * weights0[layer] + change)
        else:
            weights.append(core @ below.T)
    return weights


def _rho_slope(rho: Sequence[float], layer: int, loss_scale: float) -> float:
    others = math.prod(rho[:layer]) * math.prod(rho[layer + 1 :])
    return loss_scale * rho[layer] * others**2


# Singular values and vectors.


def singular_values(weight: Array) -> Array:
    """Return the singular values of W, descending.

    Parameters
    ----------
    weight : (m, n) array
        W.

    Returns
    -------
    (min(m, n),) array

    Notes
    -----
    Cost: O(m n min(m, n)).
    """
    return np.linalg.svd(weight, compute_uv=False)


def limit_vectors(weight0: Array, gradient0: Array, scale: float) -> tuple[Array, Array]:
    """Return the limits (U, V) of the singular vectors of W(t) for t -> 0+.

    (Those of W(0) = epsilon Q itself are arbitrary.) To first order
    W(t)^T W(t) = epsilon^2 I + 2 epsilon t sym(-Q^T G), sym(M) = (M + M^T) / 2. For Q with orthonormal
    columns the right vectors are the eigenvectors of sym(-Q^T G), and u = Q v; for Q with orthonormal rows
    the left vectors are those of sym(-G Q^T), and v = Q^T u. Weight decay only shifts the eigenvalues. Both
    have min(d_l, d_{l-1}) columns in the order of descending eigenvalues, which is that of the singular
    values for t > 0; signs, and bases of repeated eigenvalues, are arbitrary.

    Parameters
    ----------
    weight0, gradient0 : (m, n) array
        W_l(0) and G_l(0).
    scale : float
        epsilon_l.

    Returns
    -------
    left : (m, k) array
    right : (n, k) array
        Columns u_i and v_i, k = min(m, n).

    Notes
    -----
    Cost: O(d^3).
    """
    rotation = weight0 / scale
    if weight0.shape[0] >= weight0.shape[1]:
        right = _descending_eigenvectors(-rotation.T @ gradient0)
        return rotation @ right, right
    left = _descending_eigenvectors(-gradient0 @ rotation.T)
    return left, rotation.T @ left


def angle(vectors: Array, others: Array) -> Array:
    """Return the angle in [0, pi/2] between the lines along x and y, column by column, for unit columns.

    ``2 atan2(||x - s y||, ||x + s y||)`` with s the sign of <x, y>; for small angles ``arccos |<x, y>|``
    would lose half of the digits.

    Parameters
    ----------
    vectors, others : (d, k) array
        Unit columns x and y.

    Returns
    -------
    (k,) array
        Angles in radians.

    Notes
    -----
    Cost: O(d k).
    """
    sign = np.where(np.sum(vectors * others, axis=0) < 0, -1.0, 1.0)
    difference = np.linalg.norm(vectors - sign * others, axis=0)
    total = np.linalg.norm(vectors + sign * others, axis=0)
    return np.asarray(2 * np.arctan2(difference, total))


def principal_angles(basis: Array, other: Array) -> Array:
    """Return the principal angles, ascending, between the spans of two matrices with orthonormal columns.

    The cosines are the singular values of U^T V, the sines those of (I - U U^T) V, where U has at least as
    many columns as V. The cosines alone would lose half of the digits of small angles, the sines those of
    angles near pi/2.

    Parameters
    ----------
    basis : (d, k) array
        U, orthonormal columns.
    other : (d, j) array
        V, orthonormal columns.

    Returns
    -------
    (min(k, j),) array
        Angles in radians.

    Notes
    -----
    Cost: O(d k j).
    """
    if basis.shape[1] < other.shape[1]:
        basis, other = other, basis
    overlap = basis.T @ other
    cosines = singular_values(overlap)
    sines = singular_values(other - basis @ overlap)[::-1]
    return np.arctan2(sines, cosines)


def vector_angles(vectors: Array, reference: Array, rank: int) -> Array:
    """Return k angles between the singular vectors in two (d, k) arrays with orthonormal columns.

    The first r and the last r vectors are compared one by one. The others belong to one repeated singular
    value, so they share the largest principal angle between the two subspaces that they span.

    Parameters
    ----------
    vectors, reference : (d, k) array
        Orthonormal columns.
    rank : int
        r, the number of vectors at either end that are compared one by one.

    Returns
    -------
    (k,) array
        Angles in radians.

    Notes
    -----
    Cost: O(d k^2).
    """
    angles = angle(vectors, reference)
    middle = slice(rank, len(angles) - rank)
    if rank < len(angles) - rank:
        angles[middle] = principal_angles(vectors[:, middle], reference[:, middle])[-1]
    return angles


# Helpers.


def _product(factors: Sequence[Array], dim: int) -> Array:
    """Return the product of the last factor .. the first, or the identity of size `dim` without factors."""
    result = np.eye(dim)
    for factor in factors:
        result = factor @ result
    return result


def _squared_norm(matrix: Array) -> float:
    return float(np.sum(matrix**2))


def _cutoff(input_gram: Array) -> float:
    """Return the size of rounding errors of the eigenvalues of S, relative to the largest eigenvalue."""
    return len(input_gram) * float(np.finfo(np.float64).eps)


def _input_factor(input_gram: Array | None) -> Array | None:
    """Return F with F F^T = S and rank(S) columns."""
    if input_gram is None:
        return None
    eigenvalues, vectors = np.linalg.eigh(input_gram)
    keep = eigenvalues > _cutoff(input_gram) * eigenvalues[-1]
    factor: Array = vectors[:, keep] * np.sqrt(eigenvalues[keep])
    return factor


def _excess_loss(product: Array, solution: Array, factor: Array | None, loss_scale: float) -> float:
    difference = product - solution
    return loss_scale / 2 * _squared_norm(difference if factor is None else difference @ factor)


def _loss_floor(
    solution: Array, target: Array, loss_scale: float, output_norm_squared: float | None
) -> float:
    if output_norm_squared is None:
        return 0.0
    return loss_scale / 2 * max(output_norm_squared - float(np.sum(solution * target)), 0.0)


def _is_square(weights: Sequence[Array]) -> bool:
    return bool(weights[-1].shape[0] == weights[-1].shape[1])


def _check_rotations(weights0: Sequence[Array], scales: Sequence[float]) -> list[Array]:
    """Return Q_l = W_l(0) / epsilon_l; raise AssumptionError unless the theorem applies to them."""
    rotations = [weight / scale for weight, scale in zip(weights0, scales, strict=True)]
    identity = np.eye(weights0[0].shape[1])
    for layer, rotation in enumerate(rotations if _is_square(weights0) else rotations[:-1], start=1):
        if rotation.shape != identity.shape or not np.allclose(rotation.T @ rotation, identity, 0, 1e-6):
            raise AssumptionError(
                f"weights0: W_{layer}(0) of shape {rotation.shape} is not scales[{layer - 1}] times an "
                f"orthogonal matrix of shape {identity.shape}; wanted this for all layers, except a last one "
                "with another number of rows"
            )
    return rotations


def _count_rank(values: Array, shape: tuple[int, ...]) -> int:
    """Return the number of the descending singular `values` above the rounding error of the largest."""
    return int(np.sum(values > max(shape) * np.finfo(np.float64).eps * values[0])) if len(values) else 0


def _orthonormal_basis(matrix: Array) -> Array:
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    return left[:, : _count_rank(values, matrix.shape)]


def _descending_eigenvectors(matrix: Array) -> Array:
    return np.linalg.eigh((matrix + matrix.T) / 2).eigenvectors[:, ::-1]
