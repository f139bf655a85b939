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

import numpy as np

from ._support.arrays import FloatArray as Array
from ._support.errors import AssumptionError

#: The update rule of one layer.
Rule = Callable[[Array, Array, dict[str, Array], float, float, float], Array]

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


def sample_gradients(
    weights: Sequence[Array],
    inputs: Array,
    targets: Array,
    loss: str,
    loss_scale: float,
    biases: Sequence[Array] | None = None,
) -> tuple[float, list[Array], list[Array]]:
    """Return ``c sum_j loss(z_j, y_j)``, and its gradients with respect to weights and biases.

    The outputs are z_j = z_{L,j} with z_{l,j} = W_l z_{l-1,j} + b_l and z_{0,j} = x_j.

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) arrays
        W_1 .. W_L.
    inputs : (d_0, N) array
        x_j as columns.
    targets : (d_L, N) array
        y_j as columns: any for "squared", one-hot for "cross-entropy", -1 or 1 in one row for "logistic".
    loss : {"squared", "cross-entropy", "logistic"}
        Loss of a sample: 1/2 ||z - y||^2, log sum_k exp(z_k) - <y, z>, or log(1 + exp(-y z)).
    loss_scale : float
        c.
    biases : sequence of (d_l,) arrays, optional
        b_1 .. b_L. Default: zeros.

    Returns
    -------
    loss : float
        The loss.
    weight_gradients : list of (d_l, d_{l-1}) arrays
        ``c D_l Z_{l-1}^T`` with ``D_{l-1} = W_l^T D_l``, where c D_L is the gradient with respect to Z_L.
    bias_gradients : list of (d_l,) arrays
        ``c D_l 1``.

    Raises
    ------
    ValueError
        If the loss is another one.

    Notes
    -----
    Cost: O(N sum_l d_l d_{l-1}). The chain rule, as in Rumelhart, Hinton, Williams, "Learning representations
    by back-propagating errors" (Nature 323, 1986).
    """
    shifts = [np.zeros(len(w)) for w in weights] if biases is None else biases
    values = [inputs]
    for weight, shift in zip(weights, shifts, strict=True):
        values.append(weight @ values[-1] + shift[:, np.newaxis])
    outputs = values.pop()
    if loss == "squared":
        error = outputs - targets
        total = 0.5 * float(np.sum(error**2))
    elif loss == "cross-entropy":
        log_sums = np.logaddexp.reduce(outputs, axis=0)
        error = np.exp(outputs - log_sums) - targets
        total = float(np.sum(log_sums) - np.sum(targets * outputs))
    elif loss == "logistic":
        error = -targets / (1 + np.exp(targets * outputs))
        total = float(np.sum(np.logaddexp(0.0, -targets * outputs)))
    else:
        raise ValueError(f"loss is {loss!r}; wanted 'squared', 'cross-entropy' or 'logistic'")
    weight_gradients: list[Array] = []
    bias_gradients: list[Array] = []
    for weight, below in zip(reversed(weights), reversed(values), strict=True):
        weight_gradients.append(loss_scale * error @ below.T)
        bias_gradients.append(loss_scale * error.sum(axis=1))
        error = weight.T @ error
    return loss_scale * total, weight_gradients[::-1], bias_gradients[::-1]


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
        (I kron X)^T K (I kron X) with the kernel K of `neural_tangent_kernel`, for the outputs in C order.

    Notes
    -----
    Cost: that of `neural_tangent_kernel`, and O(d_L^3 d_0 N (d_0 + N)).
    """
    lift = np.kron(np.eye(len(weights[-1])), inputs)
    kernel: Array = lift.T @ neural_tangent_kernel(weights) @ lift
    return kernel


# Training all weights.


def train_dense(
    weights: Sequence[Array],
    target: Array,
    *,
    input_gram: Array | None = None,
    loss_scale: float,
    learning_rate: Sequence[float] | Array,
    steps: int,
    weight_decay: Sequence[float] | Array,
    momentum: Sequence[float] | Array,
    output_norm_squared: float | None = None,
    rule: Rule | None = None,
) -> Iterator[tuple[float, list[Array]]]:
    """Yield (loss, weights) of gradient descent, or of another update rule, at t = 0, 1, .., `steps`.

    All layers are updated simultaneously. Gradient descent, the default rule `heavy_ball`, is
    V_l <- mu_l V_l + G_l + lambda_l W_l, then W_l <- W_l - eta_l V_l; V_l(0) = 0.

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
    learning_rate, weight_decay, momentum : sequence of float, or (steps, L) array
        eta_l, lambda_l, mu_l; row t of an array has those of step t.
    steps : int
        Number of updates.
    output_norm_squared : float or None
        ||Y||_F^2, for the part of the loss that does not depend on the weights.
    rule : callable, optional
        Function of (weight, gradient, state, eta, lambda, mu) that returns the new weight of a layer, such as
        `nesterov` or the result of `muon`; `state` is an empty dictionary of the layer at the start.

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
    states: list[dict[str, Array]] = [{} for _ in now]
    rates = [_rates_of_steps(rate, steps) for rate in (learning_rate, weight_decay, momentum)]
    list(zip(now, *(range(rate.shape[-1]) for rate in rates), strict=True))  # one for each layer
    update = heavy_ball if rule is None else rule
    solution, factor = least_squares(target, input_gram), _input_factor(input_gram)
    floor = _loss_floor(solution, target, loss_scale, output_norm_squared)
    for step in range(steps + 1):
        if step > 0:
            slopes = gradients(now, target, input_gram, loss_scale)
            now = _update_layers(update, now, slopes, states, *(rate[step - 1] for rate in rates))
        yield _excess_loss(end_to_end(now), solution, factor, loss_scale) + floor, now


# Update rules of one layer: functions of weight W, gradient G, state, eta, lambda and mu.


def heavy_ball(
    weight: Array, gradient: Array, state: dict[str, Array], eta: float, decay: float, mu: float
) -> Array:
    """Return W - eta V with V <- mu V + G + lambda W.

    Parameters
    ----------
    weight, gradient : (m, n) array
        W and G.
    state : dict
        Holds V.
    eta, decay, mu : float
        eta, lambda, mu.

    Returns
    -------
    (m, n) array

    Notes
    -----
    Cost: O(m n).
    """
    state["velocity"] = mu * state.get("velocity", np.zeros_like(weight)) + gradient + decay * weight
    new: Array = weight - eta * state["velocity"]
    return new


def nesterov(
    weight: Array, gradient: Array, state: dict[str, Array], eta: float, decay: float, mu: float
) -> Array:
    """Return W - eta (D + mu V) with D = G + lambda W and V <- mu V + D.

    Parameters
    ----------
    weight, gradient : (m, n) array
        W and G.
    state : dict
        Holds V.
    eta, decay, mu : float
        eta, lambda, mu.

    Returns
    -------
    (m, n) array

    Notes
    -----
    ``torch.optim.SGD(nesterov=True)``. Cost: O(m n).
    """
    direction = gradient + decay * weight
    state["velocity"] = mu * state.get("velocity", np.zeros_like(weight)) + direction
    new: Array = weight - eta * (direction + mu * state["velocity"])
    return new


def muon(orthogonalize: Callable[[Array], Array], *, looks_ahead: bool, scale: float) -> Rule:
    """Return the rule W <- (1 - eta lambda) W - eta q p(D), with V <- mu V + (1 - mu) G.

    D is mu V + (1 - mu) G if the rule looks ahead, otherwise V.

    Parameters
    ----------
    orthogonalize : callable
        p, such as `polar_factor` or `newton_schulz` with their arguments.
    looks_ahead : bool
        Whether D looks ahead (Nesterov).
    scale : float
        q.

    Returns
    -------
    callable

    Notes
    -----
    ``torch.optim.Muon`` with p by `newton_schulz` in bfloat16. Cost of a step: that of p.
    """

    def update(
        weight: Array, gradient: Array, state: dict[str, Array], eta: float, decay: float, mu: float
    ) -> Array:
        velocity = mu * state.get("velocity", np.zeros_like(weight)) + (1 - mu) * gradient
        state["velocity"] = velocity
        direction = mu * velocity + (1 - mu) * gradient if looks_ahead else velocity
        return (1 - eta * decay) * weight - eta * scale * orthogonalize(direction)

    return update


def newton_schulz(
    matrix: Array, coefficients: tuple[float, float, float], steps: int, epsilon: float
) -> Array:
    """Return X after `steps` of X <- a X + b X X^T X + c X (X^T X)^2, from X = M / max(||M||_F, epsilon).

    Parameters
    ----------
    matrix : (m, n) array
        M.
    coefficients : (a, b, c)
        Coefficients of the polynomial.
    steps : int
        Number of iterations.
    epsilon : float
        Smallest norm to divide by.

    Returns
    -------
    (m, n) array

    Notes
    -----
    Cost: O(m n min(m, n)) for each iteration.
    """
    a, b, c = coefficients
    result = matrix / max(float(np.linalg.norm(matrix)), epsilon)
    for _ in range(steps):
        gram = result.T @ result
        result = a * result + result @ (b * gram + c * gram @ gram)
    return result


def polar_factor(matrix: Array, tolerance: float) -> Array:
    """Return U V^T over the singular values of M = U S V^T above `tolerance` times the largest one.

    Parameters
    ----------
    matrix : (m, n) array
        M.
    tolerance : float
        Relative bound for singular values that count as zero.

    Returns
    -------
    (m, n) array

    Notes
    -----
    Cost: O(m n min(m, n)).
    """
    left, values, right_t = np.linalg.svd(matrix, full_matrices=False)
    counts = values > tolerance * values.max(initial=0.0)
    result: Array = left[:, counts] @ right_t[counts]
    return result


def shampoo(*, epsilon: float, decay_of_factors: float = 1.0) -> Rule:
    """Return the rule V <- mu V + P^(-1/4) G Q^(-1/4), W <- (1 - eta lambda) W - eta V.

    P <- beta P + G G^T and Q <- beta Q + G^T G, from epsilon times the identity.

    Parameters
    ----------
    epsilon : float
        Start of both factors.
    decay_of_factors : float
        beta.

    Returns
    -------
    callable

    Notes
    -----
    Gupta, Koren, Singer, arXiv:1802.09568, for matrices. Cost of a step: O(m^3 + n^3).
    """

    def inverse_fourth_root(matrix: Array) -> Array:
        values, vectors = np.linalg.eigh(matrix)
        result: Array = (vectors * values**-0.25) @ vectors.T
        return result

    def update(
        weight: Array, gradient: Array, state: dict[str, Array], eta: float, decay: float, mu: float
    ) -> Array:
        rows, columns = weight.shape
        beta = decay_of_factors
        state["left"] = beta * state.get("left", epsilon * np.eye(rows)) + gradient @ gradient.T
        state["right"] = beta * state.get("right", epsilon * np.eye(columns)) + gradient.T @ gradient
        direction = inverse_fourth_root(state["left"]) @ gradient @ inverse_fourth_root(state["right"])
        state["velocity"] = mu * state.get("velocity", np.zeros_like(weight)) + direction
        return (1 - eta * decay) * weight - eta * state["velocity"]

    return update


def _update_layers(
    rule: Rule,
    values: Sequence[Array],
    slopes: Sequence[Array],
    states: Sequence[dict[str, Array]],
    *rates: Sequence[float] | Array,
) -> list[Array]:
    """Return all layers after one update with their rates eta_l, lambda_l and mu_l; change their states."""
    return [rule(*layer) for layer in zip(values, slopes, states, *rates, strict=True)]


def _rates_of_steps(rates: Sequence[float] | Array, steps: int) -> Array:
    """Return the rates of every step, (steps, L)."""
    array = np.asarray(rates, dtype=np.float64)
    return np.broadcast_to(array, (steps, array.shape[-1])) if array.ndim == 1 else array


# Gradient flow, the limit of small learning rates.


def gradient_flow(
    weights: Sequence[Array],
    target: Array,
    *,
    input_gram: Array | None = None,
    loss_scale: float,
    weight_decay: Sequence[float],
    times: Sequence[float],
    steps: int,
) -> Iterator[list[Array]]:
    """Yield the weights of the gradient flow dW_l/dt = -(G_l + lambda_l W_l) at the times.

    The classical Runge-Kutta method of order 4, with steps of equal size between two times.

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) arrays
        W_1(0) .. W_L(0); they are not changed.
    target : (d_L, d_0) array
        Phi.
    input_gram : (d_0, d_0) array or None
        S; None for the identity.
    loss_scale : float
        c.
    weight_decay : sequence of float
        lambda_l.
    times : sequence of float
        Times, not decreasing from 0 on.
    steps : int
        Number of steps between two times, and before the first.

    Yields
    ------
    list of arrays
        W_1(t) .. W_L(t).

    Notes
    -----
    Cost: O(L d^3) for each of 4 gradients per step.
    """

    def slopes(now: list[Array]) -> list[Array]:
        pairs = zip(gradients(now, target, input_gram, loss_scale), now, weight_decay, strict=True)
        return [-(gradient + decay * weight) for gradient, weight, decay in pairs]

    def move(now: list[Array], slope: list[Array], size: float) -> list[Array]:
        return [weight + size * change for weight, change in zip(now, slope, strict=True)]

    now: list[Array] = [np.array(weight, dtype=np.float64) for weight in weights]
    last = 0.0
    for time in times:
        size = (time - last) / steps
        for _ in range(steps):
            first = slopes(now)
            second = slopes(move(now, first, size / 2))
            third = slopes(move(now, second, size / 2))
            fourth = slopes(move(now, third, size))
            for slope, share in ((first, 6), (second, 3), (third, 3), (fourth, 6)):
                now = move(now, slope, size / share)
        last = time
        yield now


def balanced_flow(
    weights: Sequence[Array], target: Array, time: float, *, loss_scale: float
) -> tuple[Array, Array, Array]:
    """Return W_2 W_1, W_1^T W_1 and W_2 W_2^T of a lambda-balanced two-layer network at one time.

    With W_2^T W_2 - W_1 W_1^T = lambda I, Q = [W_1^T; W_2], F = [-lambda/2 I, Phi^T; Phi, lambda/2 I] and
    E = exp(c t F): Q Q^T = E Q_0 (I + Q_0^T (E^2 - I) (2 F)^{-1} Q_0)^{-1} Q_0^T E. For large t the
    inverse is inaccurate, and E overflows.

    Parameters
    ----------
    weights : two arrays, (h, d_0) and (d_2, h)
        W_1(0) and W_2(0).
    target : (d_2, d_0) array
        Phi.
    time : float
        t.
    loss_scale : float
        c.

    Returns
    -------
    end_to_end : (d_2, d_0) array
    first_gram : (d_0, d_0) array
    last_gram : (d_2, d_2) array

    Notes
    -----
    Cost: O((d_0 + d_2)^3 + h^3). Braun et al. 2022, arXiv:2206.08740; Domine et al. 2024, arXiv:2409.14623.
    """
    first, last = weights
    dim_out, dim_in = target.shape
    balance = np.trace(last.T @ last - first @ first.T) / len(first)
    matrix = np.block([[-balance / 2 * np.eye(dim_in), target.T], [target, balance / 2 * np.eye(dim_out)]])
    values, vectors = np.linalg.eigh(matrix)
    duration = loss_scale * time
    integral = np.array([np.expm1(2 * f * duration) / (2 * f) if f else duration for f in values])
    root = vectors.T @ np.vstack([first.T, last])
    inner = np.linalg.inv(np.eye(root.shape[1]) + root.T @ (integral[:, np.newaxis] * root))
    grown = vectors @ (np.exp(values * duration)[:, np.newaxis] * root)
    gram = grown @ inner @ grown.T
    return gram[dim_in:, :dim_in], gram[:dim_in, :dim_in], gram[dim_in:, dim_in:]


def neural_tangent_kernel(weights: Sequence[Array]) -> Array:
    """Return J J^T for the derivative J of W_{L:1}, row after row, with respect to all weights.

    Changing the entry (i, j) of W_l by 1 changes W_{L:1} by column i of W_{L:l+1} times row j of W_{l-1:1}.
    `train_kernel` is the kernel of the outputs W_{L:1} X.

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) arrays
        W_1 .. W_L.

    Returns
    -------
    (d_L d_0, d_L d_0) array

    Notes
    -----
    Cost: O(L d^6) for square layers. Jacot, Gabriel, Hongler 2018, arXiv:1806.07572.
    """
    dim_in = weights[0].shape[1]
    derivatives: list[Array] = []
    for index, weight in enumerate(weights):
        below = _product(weights[:index], dim_in)
        above = _product(weights[index + 1 :], len(weight))
        for i in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                derivatives.append(np.outer(above[:, i], below[j]).ravel())
    jacobian = np.stack(derivatives, axis=1)
    kernel: Array = jacobian @ jacobian.T
    return kernel


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
    states: list[dict[str, Array]] = [{} for _ in now]
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
        now = _update_layers(heavy_ball, now, slopes, states, *rates)


def power_iteration(
    weights: Sequence[Array], target: Array, loss_scale: float, learning_rate: float, steps: int
) -> list[Array]:
    """Return W_1 and W_2 after gradient descent with the residual W_{2:1} - Phi replaced by -Phi.

    The blocks of Z = [W_2; W_1^T] follow ``Z <- (I + c eta [[0, Phi], [Phi^T, 0]]) Z``: a block power
    iteration.

    Parameters
    ----------
    weights : sequence of two arrays, (h, d_x) and (d_y, h)
        W_1 and W_2.
    target : (d_y, d_x) array
        Phi.
    loss_scale, learning_rate : float
        c and eta.
    steps : int
        Number of updates.

    Returns
    -------
    list of two arrays

    Notes
    -----
    Cost: O(h d_x d_y) per step.
    """
    below, above = (np.array(weight, dtype=np.float64) for weight in weights)
    rate = loss_scale * learning_rate
    for _ in range(steps):
        below, above = below + rate * above.T @ target, above + rate * target @ below.T
    return [below, above]


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
    core_states: list[dict[str, Array]] = [{} for _ in cores]
    rho_states: list[dict[str, Array]] = [{} for _ in rho]
    rates = (learning_rate, weight_decay, momentum)
    rho_rates = [rate[: len(rho)] for rate in rates]
    for step in range(steps + 1):
        if step > 0:
            core_slopes = gradients(cores, small_target, None, loss_scale)
            rho_slopes = [
                np.array(_rho_slope(rho, layer, loss_scale) if is_square else 0.0)
                for layer in range(len(rho))
            ]
            cores = _update_layers(heavy_ball, cores, core_slopes, core_states, *rates)
            scalars = [np.array(value) for value in rho]
            scalars = _update_layers(heavy_ball, scalars, rho_slopes, rho_states, *rho_rates)
            rho = [float(value) for value in scalars]
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
