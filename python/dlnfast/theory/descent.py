# SPDX-License-Identifier: MIT
"""Closed forms for gradient descent: first step, modes, plateaus, stable rates, features."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import reference as plain
from .._problem.low_rank import LowRank, as_dense
from .._problem.problem import Problem, check_problem
from .._support.arrays import (
    FloatArray,
    as_array,
    as_list,
    as_matrix,
    as_vector,
    check_count,
    check_scale,
    per_layer,
    scale_of,
)
from .._support.errors import AssumptionError, ShapeError

__all__ = [
    "FirstOrderSplit",
    "PlateauBounds",
    "aligned_modes",
    "compression_law",
    "default_learning_rate",
    "discrimination_law",
    "first_order_split",
    "plateau_bounds",
    "power_iteration",
    "rho_flow",
    "stability_threshold",
]


def rho_flow(
    time: npt.ArrayLike, scale: float, n_layers: int, loss_scale: float, learning_rate: float
) -> npt.NDArray[np.float64]:
    r"""Return the repeated singular value rho of square layers under gradient flow.

    .. math::
        \rho(t) = \left(\epsilon^{-(2L-2)} + (2L-2)\, c \eta t\right)^{-1/(2L-2)},

    the solution of rho' = -c eta rho^{2L-1}, rho(0) = eps; for L = 1 its limit eps exp(-c eta t). For a
    target of rank r, d - 2r singular values of a square d x d layer are equal to rho(t), up to
    O(learning rate). With a wide last layer they stay at eps instead.

    Parameters
    ----------
    time : array_like
        t >= 0, in steps of gradient descent; fractions are allowed.
    scale : float
        eps, the same for all layers.
    n_layers : int
        L.
    loss_scale, learning_rate : float
        c and eta.

    Returns
    -------
    ndarray of float64
        rho(t), of the shape of `time`.

    Raises
    ------
    ValueError
        If a time, a scale or a rate is negative or not finite.

    Notes
    -----
    Cost: O(1) per time. There is no overflow for small scales and many layers. Continuous-time form of the
    recursion in Yaras et al. 2023, arXiv:2306.01154, Theorem 1.

    Examples
    --------
    >>> from dlnfast.theory import rho_flow
    >>> round(float(rho_flow(50, scale=1.0, n_layers=3, loss_scale=1 / 900, learning_rate=1.0)), 4)
    0.9511
    """
    raw = as_array(time, "time (t)")
    if raw.dtype.kind not in "biuf":
        raise TypeError(f"time (t) has dtype {raw.dtype}; wanted numbers")
    times = raw.astype(np.float64)
    if not np.all(np.isfinite(times) & (times >= 0.0)):
        raise ValueError("time (t) has a value that is negative or not finite")
    eps = check_scale(scale, "scale")
    rate = check_scale(loss_scale, "loss_scale") * check_scale(learning_rate, "learning_rate")
    exponent = 2 * check_count(n_layers, "n_layers") - 2
    # rho = eps exp(-log1p(x) / (2L - 2)) with x = (2L - 2) c eta t eps^(2L - 2): log1p(x) / (2L - 2) is
    # accurate for small x, and tends to c eta t for L = 1.
    with np.errstate(over="ignore", invalid="ignore"):
        growth = rate * times * np.float64(eps) ** exponent
    if not np.isfinite(growth).all():
        raise ValueError(f"scale (eps) is {eps:g}: its power {exponent}, times the time, overflows")
    decay = growth if exponent == 0 else np.log1p(exponent * growth) / exponent
    return np.asarray(eps * np.exp(-decay))


class FirstOrderSplit(NamedTuple):
    """Rates of change of the singular values of one layer in the first step: sigma_i = eps_l + eta rate."""

    #: (a,) d sigma_i / d eta at eta = 0 of the active singular values, descending.
    rates: npt.NDArray[np.float64]
    #: Rate of all other singular values, which stay equal.
    common_rate: float
    #: Number of these other singular values.
    multiplicity: int
    #: Number of `rates` above `common_rate`, and number below.
    n_rising: int
    n_falling: int
    #: (d_l, a) and (d_{l-1}, a), the singular vectors u_i(0+) and v_i(0+) of `rates`.
    left: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]


def first_order_split(problem: Problem, weights: Sequence[npt.ArrayLike], layer: int) -> FirstOrderSplit:
    r"""Return the rates at which the singular values of a square layer rise and fall in the first step.

    From W_l(0) = eps_l Q_l one step of gradient descent leads to the singular values

    .. math::
        \sigma_i = \epsilon_l + \eta\, \mu_i + O(\eta^2), \qquad
        \mu_i = \frac{c P}{\epsilon_l} \lambda_i\!\left(\tfrac12 (M \Phi + \Phi^T M^T) - P M M^T\right),
        \quad M = Q_{L:1}^T,\; P = \prod_k \epsilon_k,

    in the same order for every layer, and to singular vectors that do not depend on eta: the limits for
    t -> 0+, which the Q_l map from layer to layer.

    Parameters
    ----------
    problem : Problem
        Problem with white inputs; Phi has rank r.
    weights : sequence of array_like
        W_1(0) .. W_L(0), scaled isometries; the last one may be wide, K x d (then eps_L Q_L in the formula is
        W_L(0), which need not have orthonormal rows).
    layer : int
        Number l of a square layer.

    Returns
    -------
    FirstOrderSplit
        Named tuple ``(rates, common_rate, multiplicity, n_rising, n_falling, left, right)``.

    Raises
    ------
    AssumptionError
        If the inputs are not white, or a layer is not a scaled isometry.
    ShapeError
        If a layer is not d x d, or the last one not K x d with K < d.
    ValueError
        If the layer is out of range, or is the wide last one.

    Notes
    -----
    *Square layers.* M M^T = I, so mu_i = (c P / eps_l)(nu_i - P) with the eigenvalues nu_i of
    sym(M Phi), which are those of sym(Phit), Phit = A_L^T Phi A_0, and zeros. With x in the span of V and
    Q_{L:1}^T U, x^T M Phi x = <a, b> for the independent coordinates a = U^T M^T x and b = Sigma V^T x:
    signature (r, r). So r singular values rise, r fall, and d - 2r change slowly and stay equal, at the rate
    ``common_rate`` = -c P^2 / eps_l. Rising and falling are relative to this rate.

    *Wide last layer.* With y = M^T x in R^K and z = Phi x,
    ``x^T (..) x = <y, z> - P |y|^2 = |z|^2 / (4 P) - P |y - z / (2 P)|^2``, where z has r dimensions and
    y all K: r singular values rise, K fall and d - r - K do not change, ``common_rate`` = 0.

    Both cases assume that V and Q_{L:1}^T U (or all rows of Q_{L:1}) are linearly independent, which is not
    true for aligned weights: then at most r values change in square layers, and all of them rise. Weight
    decay subtracts eta lambda eps_l from all values; momentum has no effect on the first step. Computed by
    `dlnfast.reference.limit_vectors` on the reduced network, O(L d^3). Yaras et al. 2023, arXiv:2306.01154.

    Examples
    --------
    >>> import dlnfast as dln
    >>> from dlnfast.theory import first_order_split
    >>> problem = dln.low_rank_recovery(dim=30, rank=3)
    >>> split = first_order_split(problem, dln.orthogonal([30] * 4), layer=1)
    >>> split.n_rising, split.multiplicity, split.n_falling, round(1 + split.common_rate, 6)
    (3, 24, 3, 0.998889)
    """
    if check_problem(problem).input_gram is not None:
        raise AssumptionError("input_gram (S) is not the identity; wanted white inputs")
    matrices = _layers(problem, weights)
    index = check_count(layer, "layer", maximum=len(matrices)) - 1
    is_square = problem.dim_out == problem.dim_in
    if index == len(matrices) - 1 and not is_square:
        raise ValueError(f"layer is {layer}, the wide last one; wanted a square layer")
    scales = [scale_of(weight) for weight in matrices]
    if 0.0 in scales or not np.isfinite(scales).all():
        raise AssumptionError(f"weights have scales {scales}; wanted layers that are scaled isometries")
    target = problem.dense_target()
    bases = plain.active_subspaces(matrices, scales, target)
    cores = [above.T @ w @ below for above, w, below in zip(bases[1:], matrices, bases[:-1], strict=True)]
    gradients = plain.gradients(cores, bases[-1].T @ target @ bases[0], None, problem.loss_scale)
    left, right = plain.limit_vectors(cores[index], gradients[index], scales[index])
    # sigma_i = u_i^T W v_i, to first order with the vectors of the limit.
    rates = -np.sum(left * (gradients[index] @ right), axis=0)
    common = -problem.loss_scale * float(np.prod(scales)) ** 2 / scales[index] if is_square else 0.0
    relative = rates - common
    rounding = 64 * np.finfo(np.float64).eps * float(np.max(np.abs(relative), initial=0.0))
    return FirstOrderSplit(
        rates=rates,
        common_rate=common,
        multiplicity=problem.dim_in - len(rates),
        n_rising=int(np.sum(relative > rounding)),
        n_falling=int(np.sum(relative < -rounding)),
        left=bases[index + 1] @ left,
        right=bases[index] @ right,
    )


def _layers(problem: Problem, weights: Sequence[npt.ArrayLike]) -> list[FloatArray]:
    """Convert W_1 .. W_L to float64; they have to be d x d, the last one d_L x d with d_L <= d."""
    items = as_list(weights, "weights", "a list of matrices, W_1 .. W_L")
    count, dim = len(items), problem.dim_in
    if count == 0 or problem.dim_out > dim:
        raise ShapeError(
            f"weights has {count} layers from {dim} to {problem.dim_out} dimensions; wanted at least one "
            "layer, and no more outputs than inputs"
        )
    rows = [dim] * (count - 1) + [problem.dim_out]
    return [
        as_matrix(weight, f"weights[{i}]", shape=(rows[i], dim), dtype=np.float64, symbol=f"W_{i + 1}")
        for i, weight in enumerate(items)
    ]


def aligned_modes(
    singular_values: npt.ArrayLike,
    n_layers: int,
    *,
    steps: int,
    scale: float | Sequence[float] = 1.0,
    loss_scale: float = 1.0,
    learning_rate: float | Sequence[float],
    weight_decay: float | Sequence[float] = 0.0,
    momentum: float | Sequence[float] = 0.0,
) -> npt.NDArray[np.float64]:
    r"""Return the modes of gradient descent from aligned layers, by a scalar recursion per layer and mode.

    .. math::
        s_{l,i} \leftarrow (1 - \eta_l \lambda_l) s_{l,i}
        - c \eta_l \prod_{k \ne l} s_{k,i} \Bigl(\prod_k s_{k,i} - \sigma_i\Bigr),
        \qquad s_{l,i}(0) = \epsilon_l,

    exactly, for layers W_l(0) = eps_l Q_l with Q_{L:1} V = U (`dlnfast.aligned`), on white inputs.

    Parameters
    ----------
    singular_values : array_like, shape (r,)
        sigma_i of Phi, none negative. A 0 gives the recursion of rho, for directions of square layers in
        which Phi vanishes. (Below a wide last layer, directions that W_L maps to 0 stay at eps.)
    n_layers : int
        L.
    steps : int
        Number of updates, T.
    scale, learning_rate, weight_decay, momentum : float or sequence of float
        eps, eta, lambda and mu (heavy ball: v <- mu v + gradient + lambda s, s <- s - eta v), for all layers
        or one per layer.
    loss_scale : float
        c.

    Returns
    -------
    ndarray of float64, shape (T + 1, L, r)
        s_{l,i}(t); a mode of the whole network is their product over l. The modes have signs: the singular
        values are their magnitudes. Infinite or NaN after divergence.

    Raises
    ------
    ShapeError
        If the number of values per layer is neither 1 nor L.
    ValueError
        If a parameter is out of range.

    Notes
    -----
    Cost: O(T L r). Saxe, McClelland, Ganguli 2014, arXiv:1312.6120, for gradient flow.

    Examples
    --------
    >>> from dlnfast.theory import aligned_modes
    >>> modes = aligned_modes([2.0, 1.0], 3, steps=200, scale=0.5, learning_rate=0.1)
    >>> modes.shape, [round(float(product), 9) for product in modes[-1].prod(axis=0)]
    ((201, 3, 2), [2.0, 1.0])
    """
    sigma = as_vector(singular_values, "singular_values", dtype=np.float64, symbol="sigma_i")
    if np.any(sigma < 0):
        raise ValueError(f"singular_values (sigma_i) has a negative value, {sigma.min():g}")
    depth = check_count(n_layers, "n_layers")
    rate = check_scale(loss_scale, "loss_scale", strict=True)
    eta = per_layer(learning_rate, "learning_rate (eta)", depth)[:, np.newaxis]
    decay = per_layer(weight_decay, "weight_decay (lambda)", depth)[:, np.newaxis]
    inertia = per_layer(momentum, "momentum (mu)", depth, below=1.0)[:, np.newaxis]
    modes = np.empty((check_count(steps, "steps", minimum=0) + 1, depth, sigma.size))
    modes[0] = per_layer(scale, "scale (eps)", depth)[:, np.newaxis]
    velocity = np.zeros((depth, sigma.size))
    with np.errstate(over="ignore", invalid="ignore"):
        for current, following in pairwise(modes):
            others = _multiply_others(current)
            slope = rate * others * (others[0] * current[0] - sigma)
            velocity = inertia * velocity + slope + decay * current
            following[:] = current - eta * velocity
    return modes


def _multiply_others(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return, for each row, the product of all other rows, without division."""
    result = np.ones_like(values)
    result[1:] = np.cumprod(values[:-1], axis=0)
    result[:-1] *= np.cumprod(values[:0:-1], axis=0)[::-1]
    return result


def compression_law(
    layer: npt.ArrayLike,
    *,
    scale: float,
    n_layers: int,
    n_classes: int,
    samples_per_class: int,
    output_multiplier: float = 1.0,
) -> npt.NDArray[np.float64]:
    r"""Return the compression C_l of the features of a trained linear classifier, geometric in l.

    .. math::
        C_l = C_0 \left(\frac{\epsilon^2 a^{2/L}}{n^{1/L}}\right)^l, \qquad
        C_0 = \frac{1 - 1/n}{1/n - 1/N}, \qquad l = 0, \dots, L - 1,

    for orthonormal samples X (N = K n), targets Y = I_K (x) 1_n^T, a loss proportional to
    ||a W_{L:1} X - Y||_F^2, and layers of orthogonal initialisation with scale eps, trained to convergence
    without weight decay.

    Parameters
    ----------
    layer : array_like of int
        Number l of the layer, from 0, the inputs, to L - 1. (After the last layer, C_L = 0.)
    scale : float
        eps.
    n_layers : int
        L.
    n_classes, samples_per_class : int
        K >= 2 and n.
    output_multiplier : float
        a.

    Returns
    -------
    ndarray of float64
        C_l, of the shape of `layer`, for the definition of `dlnfast.measures.feature_compression`.

    Raises
    ------
    ValueError
        If a layer is outside 0 .. L - 1, or a parameter is out of range.

    Notes
    -----
    Cost: O(1) per layer. Wang et al. 2025, arXiv:2311.02960.

    The formula assumes that the singular values of all N - K directions within classes stay at eps. In fact K
    of them shrink during training: for small eps and d = N, the compression of trained networks is between
    (N - 2K) / (N - K) times this value and this value, and is lower in later layers; fitted rates are 1 to 3
    per cent lower. Before convergence the last layers have larger values: the mean loss has to be about 1e-8,
    not 1e-6.

    Examples
    --------
    >>> from dlnfast.theory import compression_law
    >>> expected = compression_law([0, 1], scale=0.5, n_layers=8, n_classes=5, samples_per_class=10)
    >>> print(expected[0], round(expected[1] / expected[0], 4))
    11.25 0.1875
    """
    depth = check_count(n_layers, "n_layers")
    layers = _check_layers(layer, 0, depth - 1, f", the inputs of the {depth} layers")
    count = check_count(samples_per_class, "samples_per_class")
    total = count * check_count(n_classes, "n_classes", minimum=2)
    multiplier = check_scale(output_multiplier, "output_multiplier", strict=True)
    initial = (1 - 1 / count) / (1 / count - 1 / total)
    with np.errstate(over="ignore"):
        ratio = np.float64(multiplier) ** 2 / count
        rate = np.float64(check_scale(scale, "scale")) ** 2 * ratio ** (1 / depth)
        compression = np.asarray(initial * rate ** layers.astype(np.float64))
    if not np.isfinite(compression).all():
        raise ValueError("scale or output_multiplier is so large that C_l overflows")
    return compression


def discrimination_law(
    layer: npt.ArrayLike, least_squares: npt.ArrayLike | LowRank, *, n_layers: int
) -> npt.NDArray[np.float64]:
    r"""Return the discrimination D_l of the features of a trained linear classifier, nearly linear in l.

    .. math::
        D_l = 1 - \max_{k \ne k'} \frac{G_{kk'}}{\sqrt{G_{kk} G_{k'k'}}}, \qquad
        G = (M M^T)^{l/L - 1}, \qquad l = 1, \dots, L,

    for one-hot targets Y = M X and balanced layers that fit them exactly, which is the limit eps, eta -> 0 of
    networks trained without weight decay.

    Parameters
    ----------
    layer : array_like of int
        Number l of the layer, from 1 to L. (At l = 0, the inputs, G would be the Gram matrix of the projected
        class means only.)
    least_squares : array_like, shape (K, d_x), or LowRank
        M = Y X^+, the least-squares solution of minimal norm, `Problem.least_squares`, of rank K >= 2.
    n_layers : int
        L.

    Returns
    -------
    ndarray of float64
        D_l, of the shape of `layer`, for the definition of `dlnfast.measures.feature_discrimination`.

    Raises
    ------
    ValueError
        If a layer is outside 1 .. L, there are fewer than two classes, or the rank of M is below K.

    Notes
    -----
    With balanced layers W_{l:1}^T W_{l:1} = (M^T M)^{l/L}, and M maps the class means mu to unit vectors:
    mu^T (M^T M)^{l/L} mu = (M M^T)^{l/L - 1}. For samples that are orthonormal up to E = X^T X - I,
    M M^T = Y (X^T X)^{-1} Y^T is n (I - Ebar) to first order, Ebar = Y E Y^T / n, so that
    D_l = 1 - (1 - l/L) max_{k != k'} Ebar_{kk'}: linear, as in Wang et al. 2025, arXiv:2311.02960.

    With a finite eps, the last layer has an imbalance of about eps^2; with a finite eta, all layers have one.
    In the setting of that paper (eps = 0.3, L = 6, eta = 0.1) D_l differs by up to 0.011, with eps = 0.1 by
    up to 0.002. Cost: O(K^2 d_x).

    Examples
    --------
    >>> from dlnfast.theory import discrimination_law
    >>> expected = discrimination_law([1, 2, 3], [[1.0, 0.0], [-0.1, 1.0]], n_layers=3)
    >>> [round(float(value), 4) for value in expected]
    [0.9335, 0.9667, 1.0]
    """
    depth = check_count(n_layers, "n_layers")
    layers = _check_layers(layer, 1, depth)
    matrix = least_squares.dense() if isinstance(least_squares, LowRank) else least_squares
    solution = as_matrix(matrix, "least_squares", dtype=np.float64, symbol="M")
    if solution.shape[0] < 2:
        raise ValueError("least_squares (M) has a single row; wanted at least two classes")
    left, values, _ = np.linalg.svd(solution, full_matrices=False)
    if len(values) < len(solution) or values[-1] <= max(solution.shape) * np.finfo(float).eps * values[0]:
        raise ValueError(f"least_squares (M) has rank below {len(solution)}, the number of classes")
    powers = (values / values[0]) ** (2 * layers[..., np.newaxis] / depth - 2)
    gram = np.einsum("ai,...i,bi->...ab", left, powers, left)
    size = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    cosines = gram / (size[..., :, np.newaxis] * size[..., np.newaxis, :])
    return np.asarray(1 - np.max(cosines - 2 * np.eye(len(solution)), axis=(-2, -1)))


def stability_threshold(sigma: float, n_layers: int, loss_scale: float = 1.0) -> float:
    r"""Return the learning rate above which gradient descent oscillates around the balanced minimum.

    .. math:: \eta^* = \frac{2}{c L \sigma^{2 - 2/L}},

    which is two over the sharpness in the mode of the singular value sigma of Phi. For the largest singular
    value it is two over the largest eigenvalue of the Hessian.

    Parameters
    ----------
    sigma : float
        Singular value of the target, above 0.
    n_layers : int
        L.
    loss_scale : float
        c, above 0.

    Returns
    -------
    float
        eta*.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    Notes
    -----
    Cost: O(1). At a balanced minimum every layer has the singular value sigma^{1/L}, so that a change of it
    changes the product by sigma^{1 - 1/L} times as much. arXiv:2502.20531 studies larger learning rates.

    Examples
    --------
    >>> from dlnfast.theory import stability_threshold
    >>> round(stability_threshold(10.0, 3), 4)
    0.0309
    """
    value = check_scale(sigma, "sigma", strict=True)
    depth = check_count(n_layers, "n_layers")
    prefactor = check_scale(loss_scale, "loss_scale", strict=True)
    with np.errstate(over="ignore", under="ignore", divide="ignore"):  # the result may be 0 or infinity
        return float(2 / (prefactor * depth * np.float64(value) ** (2 - 2 / depth)))


def default_learning_rate(problem: Problem, n_layers: int, *, scale: float = 1.0) -> float:
    r"""Return a learning rate that is stable from the start to the end of training: one over the sharpness.

    .. math:: \eta = \frac{1}{\max(\Lambda_\infty, \Lambda_0)},

    half of the largest stable rate for the larger of two sharpnesses: Lambda_inf at the balanced minimum, and
    Lambda_0 at the initial weights.

    Parameters
    ----------
    problem : Problem
        Problem with Phi, S and c.
    n_layers : int
        L.
    scale : float
        eps: the largest initial scale of a layer, ``||W_l||_F / sqrt(min(d_l, d_{l-1}))``. The default, 1, is
        safe for smaller scales too; for a small target, the true scale gives a larger rate.

    Returns
    -------
    float
        eta, without momentum. With momentum mu (heavy ball), use (1 - mu) eta.

    Raises
    ------
    ValueError
        If a parameter is out of range, or so large that eta underflows to 0.

    Notes
    -----
    *At the balanced minimum* W_{L:1} = M, M S = Phi, the Hessian has the largest eigenvalue

    .. math::
        \Lambda_\infty = c\, \lambda_{\max}\Bigl(S^{1/2} \sum_{l=1}^L m_1^{2 - 2l/L}
        (M^T M)^{(l-1)/L} S^{1/2}\Bigr),

    with m_1 the largest singular value of M and (M^T M)^0 = I. For white inputs it is c L sigma_1^{2-2/L},
    two over `stability_threshold`; in general at most ||S|| times that, with M for Phi. Up to half of the
    threshold, 1 / Lambda_inf, an aligned mode that grows from below never overshoots: a step changes
    x = s / sigma^{1/L} by (c eta sigma^{2-2/L}) x^{L-1} (1 - x^L) <= 1 - x.

    *At the start*, with W_l = eps Q_l, the Hessian is at most

    .. math:: \Lambda_0 = c \left(L \|S\| \epsilon^{2L-2} + (L-1)\, \epsilon^{L-2}
        \left(\|\Phi\| + \|S\| \epsilon^L\right)\right):

    where the first term comes from changes of single layers, and the second from pairs of layers and the
    residual W_{L:1} S - Phi.

    *In between*, for white inputs and square layers, gradient flow keeps the layers balanced and
    ||W_{L:1}|| <= max(sigma_1, eps^L). So the sharpness is at most 3 max(Lambda_inf, Lambda_0), and any
    excess over max(Lambda_inf, Lambda_0) is due to the transient part of the residual. The stability of
    gradient descent there is measured, not proved: for L = 1 .. 20, eps = 0.1 .. 2, white and Gaussian
    inputs, inputs of condition number 10^4 and fewer samples than dimensions, no run from an orthogonal
    initialisation diverged or finished above its initial loss.

    Gaussian and uniform layers of the same norm have products that are larger by about sqrt(e (L + 1)): for
    more than about 8 layers pass ``(e (L + 1))^(1 / (2 L))`` times their scale.

    Cost: an SVD of Phi (of M, and an eigenvalue of a d_x x d_x matrix, for inputs that are not white); O(1)
    if Phi is a `LowRank`.

    Examples
    --------
    >>> import dlnfast as dln
    >>> from dlnfast.theory import default_learning_rate, stability_threshold
    >>> problem = dln.Problem([[10.0, 0.0], [0.0, 0.0]])
    >>> eta = default_learning_rate(problem, 3)
    >>> round(eta / stability_threshold(10.0, 3), 12)
    0.5
    """
    depth = check_count(n_layers, "n_layers")
    eps = check_scale(scale, "scale")
    check_problem(problem)
    with np.errstate(over="ignore"):
        sharpness = max(minimum_sharpness(problem, depth), _initial_sharpness(problem, depth, eps))
    if sharpness == 0.0:  # the target and the gradient are zero: any rate is stable
        return 1.0 / problem.loss_scale
    rate = 1.0 / sharpness
    if rate == 0.0:
        raise ValueError(f"scale is {eps:g}: no learning rate above 0 is stable with {depth} such layers")
    return rate


def minimum_sharpness(problem: Problem, depth: int) -> float:
    """Return the largest eigenvalue of the Hessian at the balanced minimum; see `default_learning_rate`."""
    if problem.input_gram is None:
        factors = problem.target_factors()
        largest = float(factors.s[0]) if factors.rank else 0.0
        return problem.loss_scale * depth * float(np.float64(largest) ** (2 - 2 / depth))
    _, values, right_t = np.linalg.svd(as_dense(problem.least_squares), full_matrices=False)
    m1 = values[0]
    if m1 == 0.0:
        return 0.0 if depth > 1 else problem.loss_scale * float(np.linalg.norm(problem.input_gram, 2))
    # The sum is m1^(2 - 2/L) (I + V diag(extra) V^T); `root` is the square root of the second factor.
    extra = sum(((values / m1) ** (2 * (layer - 1) / depth) for layer in range(2, depth + 1)), np.zeros(1))
    root = np.eye(problem.dim_in) + (right_t.T * (np.sqrt(1 + extra) - 1)) @ right_t
    largest = float(np.linalg.eigvalsh(root @ problem.input_gram @ root)[-1])
    return problem.loss_scale * float(m1 ** (2 - 2 / depth)) * largest


def _initial_sharpness(problem: Problem, depth: int, eps: float) -> float:
    """Return a bound on the Hessian at W_l = eps Q_l."""
    if isinstance(problem.target, LowRank) or problem.input_gram is None:
        factors = problem.target_factors()
        target = float(factors.s[0]) if factors.rank else 0.0
    else:
        target = float(np.linalg.norm(problem.target, 2))
    inputs = 1.0 if problem.input_gram is None else float(np.linalg.norm(problem.input_gram, 2))
    scale = np.float64(eps)
    bound = depth * inputs * scale ** (2 * depth - 2)
    if depth > 1:
        bound += (depth - 1) * scale ** (depth - 2) * (target + inputs * scale**depth)
    return float(problem.loss_scale * bound)


class PlateauBounds(NamedTuple):
    """Bounds on the number of steps after which a mode is learned from a small initialisation."""

    #: T, for initial layers aligned with the target.
    shortest: float
    #: 2 T.
    longest: float


def plateau_bounds(
    sigma: float, scale: float, n_layers: int, loss_scale: float, learning_rate: float
) -> PlateauBounds:
    r"""Return bounds T and 2 T on the number of steps until the mode of sigma is learned, for L >= 3.

    .. math:: T = \frac{\epsilon^{2-L}}{(L - 2)\, c \eta \sigma}

    is the time at which the solution of s' = c eta sigma s^{L-1}, s(0) = eps, becomes infinite. The singular
    value of every layer follows this equation while it is small, if the layers are aligned with the target.

    Parameters
    ----------
    sigma : float
        Singular value of the target, above 0.
    scale : float
        eps, small against sigma^{1/L}.
    n_layers : int
        L >= 3. (With two layers the growth is exponential, and there is no such plateau.)
    loss_scale, learning_rate : float
        c and eta.

    Returns
    -------
    PlateauBounds
        Named tuple ``(shortest, longest)`` = (T, 2 T), in steps.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    Notes
    -----
    Cost: O(1). With singular vectors u, v of the mode and the overlap b = <Q_{L:1}^T u, v>, the initial
    growth rate is (1 + b) / 2 times the aligned one. For a target of rank 1, gradient flow reaches half of
    sigma after T for b = 1, after 1.2 T (L = 3) to 1.3 T (L = 5) for b = 0, the usual case in wide layers,
    and after 2 T for b near -0.7; it never does for b = -1. This is the limit of small scales: for L = 3 and
    eps = 0.2 sigma^{1/3} all times are shorter by about T / 6.

    Examples
    --------
    >>> from dlnfast.theory import plateau_bounds
    >>> plateau_bounds(1.0, scale=0.01, n_layers=3, loss_scale=1.0, learning_rate=0.1)
    PlateauBounds(shortest=1000.0, longest=2000.0)
    """
    value = check_scale(sigma, "sigma", strict=True)
    eps = check_scale(scale, "scale", strict=True)
    depth = check_count(n_layers, "n_layers", minimum=3)
    prefactor = check_scale(loss_scale, "loss_scale", strict=True)
    eta = check_scale(learning_rate, "learning_rate", strict=True)
    with np.errstate(over="ignore", divide="ignore"):  # the result may be infinite
        shortest = float(np.float64(eps) ** (2 - depth) / ((depth - 2) * prefactor * eta * value))
    return PlateauBounds(shortest, 2 * shortest)


def power_iteration(
    problem: Problem, weights: Sequence[npt.ArrayLike], *, steps: int, learning_rate: float
) -> list[FloatArray]:
    r"""Return two layers after gradient descent with the residual replaced by -Phi: a block power iteration.

    .. math::
        \begin{pmatrix} W_2 \\ W_1^T \end{pmatrix} \leftarrow
        \left(I + c \eta \begin{pmatrix} 0 & \Phi \\ \Phi^T & 0 \end{pmatrix}\right)
        \begin{pmatrix} W_2 \\ W_1^T \end{pmatrix}.

    Gradient descent on two layers has the residual W_2 W_1 - Phi. As long as W_2 W_1 is small against Phi, it
    follows this iteration, whose leading singular vectors tend to the pairs (u_i, v_i) of Phi.

    Parameters
    ----------
    problem : Problem
        Problem with white inputs; Phi has rank r.
    weights : sequence of two array_like, shapes (h, d_x) and (d_y, h)
        W_1(0) and W_2(0).
    steps : int
        Number of updates, t.
    learning_rate : float
        eta.

    Returns
    -------
    list of ndarray
        W_1(t) and W_2(t).

    Raises
    ------
    AssumptionError
        If the inputs are not white.
    ShapeError
        If there are not two layers, or their shapes do not fit the problem.
    ValueError
        If a parameter is out of range, or the iteration overflows.

    Notes
    -----
    The matrix of the iteration has the eigenvalues 1 + x_i and 1 - x_i, x_i = c eta sigma_i, with the
    eigenvectors (u_i, v_i) and (u_i, -v_i), and 1. With C_t and S_t, half the sum and half the difference of
    (1 + x_i)^t and (1 - x_i)^t, W_2(t) = W_2 + U ((C_t - I) U^T W_2 + S_t V^T W_1^T), and the same with
    exchanged roles for W_1(t)^T. Cost: O((d_x + d_y) h r), for any t.

    *More layers.* With inner layers held at their start, W_{L-1:2} = eps^{L-2} Q, the layers Q W_1 and W_L
    follow the same iteration with the rate eps^{L-2} eta. In training the inner layers grow as well, so that
    the modes grow faster than any power iteration with a constant rate.

    Examples
    --------
    >>> import dlnfast as dln
    >>> from dlnfast.theory import power_iteration
    >>> problem = dln.Problem([[2.0, 0.0], [0.0, 1.0]])
    >>> start = [[[0.0, 0.01], [0.01, 0.0]], [[0.01, 0.0], [0.0, 0.01]]]
    >>> W_1, W_2 = power_iteration(problem, start, steps=50, learning_rate=0.1)
    >>> bool(W_2[0, 0] > 50 * W_2[1, 1])
    True
    """
    if check_problem(problem).input_gram is not None:
        raise AssumptionError("input_gram (S) is not the identity; wanted white inputs")
    items = as_list(weights, "weights", "a list of two matrices, W_1 and W_2")
    if len(items) != 2:
        raise ShapeError(f"weights has {len(items)} layers; wanted two")
    below = as_matrix(items[0], "weights[0]", shape=(None, problem.dim_in), dtype=np.float64, symbol="W_1")
    shape = (problem.dim_out, below.shape[0])
    above = as_matrix(items[1], "weights[1]", shape=shape, dtype=np.float64, symbol="W_2")
    count = check_count(steps, "steps", minimum=0)
    eta = check_scale(learning_rate, "learning_rate")
    factors = problem.target_factors()
    growth = problem.loss_scale * eta * factors.s
    with np.errstate(over="ignore", invalid="ignore"):
        rising, falling = (1 + growth) ** count, (1 - growth) ** count
        even, odd = ((rising + falling) / 2 - 1)[:, np.newaxis], ((rising - falling) / 2)[:, np.newaxis]
        left, right = factors.U.T @ above, factors.V.T @ below.T
        result: list[FloatArray] = [
            below + (factors.V @ (even * right + odd * left)).T,
            above + factors.U @ (even * left + odd * right),
        ]
    if not all(np.isfinite(layer).all() for layer in result):
        raise ValueError(f"steps is {count}: the iteration grows beyond the largest number")
    return result


def _check_layers(layer: npt.ArrayLike, first: int, last: int, remark: str = "") -> npt.NDArray[Any]:
    """Convert layer numbers to an integer array, and check their range; `remark` ends the message."""
    layers = as_array(layer, "layer (l)")
    if layers.dtype.kind not in "iu":
        raise TypeError(f"layer (l) has dtype {layers.dtype}; wanted integers")
    if not np.all((layers >= first) & (layers <= last)):
        raise ValueError(f"layer (l) has a value outside {first} .. {last}{remark}")
    return layers
