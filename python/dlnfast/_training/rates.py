# SPDX-License-Identifier: MIT
"""Learning rates: automatic, adaptive, and the largest ones at which a minimum is stable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .._problem.low_rank import LowRank
from .._problem.observations import Observations
from .._problem.problem import Problem
from .._support.arrays import FloatArray, check_scale, per_layer, scale_of
from .._weights.checks import require_arrays
from .._weights.implicit import ImplicitWeights
from ..theory import default_learning_rate, minimum_sharpness, stability_threshold
from .curvature import constant_rate, layer_curvatures
from .curvature import minimum_sharpness as minimum_sharpness_of_observed

PerLayer = float | Sequence[float]


@dataclass(frozen=True)
class Adaptive:
    r"""A learning rate that follows the weights: the stability threshold, measured at every step.

    .. math:: \eta = \frac{\text{safety}}{c \sum_l m_l q_l s_l^2 + c \max_l \sum_{k \ne l} \sqrt{m_l m_k}
        s_{lk} e + \lambda},

    with s_l (s_lk) the product of the largest singular values of all layers but l (and k), e the norm of the
    residual and q_l the share of a change that the observations see. The denominator bounds the Hessian in
    the metric of the rates; descent is stable for safety below 2. Where small weights leave a plateau the
    rate is larger by orders of magnitude than any constant one that is stable in the end.

    Parameters
    ----------
    safety : float
        Above 0.
    ratios : sequence of float, optional
        m_l: the layers' rates are m_l eta. All 1 by default.
    curvature : sequence of float, optional
        q_l. Measured by default; 1 for white inputs.

    Notes
    -----
    Costs two products of each layer with a vector at every step. `Trajectory.rates` keeps eta.
    """

    safety: float = 1.5
    ratios: Sequence[float] | None = None
    curvature: Sequence[float] | None = None


@dataclass(frozen=True)
class AdaptiveRequest:
    """`Adaptive`, checked, with everything measured."""

    safety: float
    curvature: list[float]
    error_scale: float


#: Smaller side up to which a target is decomposed for a message alone.
_SMALL_TARGET: Final = 512


def largest_target_value(problem: Problem | Observations) -> float:
    """Return ||Phi||_2, or 0 where it is not known or would take a large decomposition."""
    if isinstance(problem, Observations):
        return 0.0
    if isinstance(problem.target, LowRank):
        return float(problem.target.s[0]) if problem.target.rank else 0.0
    return float(np.linalg.norm(problem.target, 2)) if min(problem.target.shape) <= _SMALL_TARGET else 0.0


def learning_rates(
    learning_rate: PerLayer | str,
    problem: Problem | Observations,
    weights: list[FloatArray] | ImplicitWeights,
    weight_decay: npt.NDArray[np.float64],
    momentum: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    n_layers = len(weights)
    if not isinstance(learning_rate, str):
        return per_layer(learning_rate, "learning_rate (eta)", n_layers)
    if learning_rate != "auto":
        raise TypeError(f'learning_rate (eta) is {learning_rate!r}; wanted numbers, "auto" or "adaptive"')
    if isinstance(problem, Observations):
        return automatic_rates(problem, weights, np.ones(n_layers), weight_decay, momentum)
    scales = weights.scales if isinstance(weights, ImplicitWeights) else [scale_of(w) for w in weights]
    return rates_at(problem, scales, weight_decay, momentum)


def rates_at(
    problem: Problem,
    scales: Sequence[float],
    weight_decay: npt.NDArray[np.float64],
    momentum: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the learning rates of "auto" for layers of these scales (eps)."""
    n_layers = len(scales)
    # Weight decay makes everything sharper by lambda.
    sharpness = 1.0 / default_learning_rate(problem, n_layers, scale=max(scales)) + float(weight_decay.max())
    return np.full(n_layers, (1.0 - float(momentum.max())) / sharpness)


def automatic_rates(
    problem: Observations,
    weights: list[FloatArray] | ImplicitWeights,
    ratios: npt.NDArray[np.float64],
    weight_decay: npt.NDArray[np.float64],
    momentum: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return constant rates in these ratios: `curvature.constant_rate`."""
    layers = require_arrays(weights)
    curvature = layer_curvatures(problem, layers)
    sharpness = 1.0 / constant_rate(problem, layers, ratios.tolist(), curvature)
    sharpness += float((ratios * weight_decay).max())
    rates: npt.NDArray[np.float64] = ratios * ((1.0 - float(momentum.max())) / sharpness)
    return rates


def adaptive_rates(
    law: Adaptive, problem: Problem | Observations, weights: list[FloatArray] | ImplicitWeights
) -> tuple[npt.NDArray[np.float64], AdaptiveRequest]:
    layers = require_arrays(weights)
    safety = check_scale(law.safety, "safety", strict=True)
    ratios = per_layer(1.0 if law.ratios is None else law.ratios, "ratios", len(layers))
    error_scale = 1.0
    if isinstance(problem, Observations):
        error_scale = problem.error_scale
    elif problem.gram_eigen is not None:
        error_scale = float(np.sqrt(problem.gram_eigen[0][-1]))
    if law.curvature is not None:
        curvature = per_layer(law.curvature, "curvature", len(layers))
    elif isinstance(problem, Observations):
        curvature = np.array(layer_curvatures(problem, layers))
    else:
        curvature = np.full(len(layers), error_scale**2)
    return ratios, AdaptiveRequest(safety, curvature.tolist(), error_scale)


@np.errstate(over="ignore")
def rate_caution(
    problem: Problem | Observations,
    scales: Sequence[float],
    learning_rate: npt.NDArray[np.float64],
    momentum: npt.NDArray[np.float64],
    *,
    decomposed: bool = False,
) -> str:
    """Return what to add to the reason of a run whose rates are above what the minimum bears, else ""."""
    # Layers with rates of their own add up to their mean; heavy ball bears 1 + mu times as much.
    rate, bears = float(learning_rate.mean()), 1 + float(momentum.min())
    if rate == 0:
        return ""
    bound = bears * _largest_stable_rate(problem, scales, learning_rate / rate, rate / bears, decomposed)
    if rate <= bound:
        return ""
    where = "the balanced minimum"
    if isinstance(problem, Observations):
        where = "by an estimate from the observations the minimum"
    return (
        f"; learning_rate (eta) {rate:.3g} is above {bound:.3g}, where {where} is unstable: each step is "
        "exact to rounding, but rounding may grow, so that trajectories can part"
    )


def _largest_stable_rate(
    problem: Problem | Observations,
    scales: Sequence[float],
    ratios: npt.NDArray[np.float64],
    rate: float,
    decomposed: bool,
) -> float:
    """Return the rate above which the minimum is unstable, infinity where it is clear that `rate` is not."""
    n_layers = len(scales)
    if isinstance(problem, Observations):
        return _twice_over(minimum_sharpness_of_observed(problem, scales, ratios.tolist()))
    # A Frobenius norm bounds the largest singular value; where that is enough nothing is decomposed.
    gram = 1.0 if problem.gram_eigen is None else float(problem.gram_eigen[0][-1])
    best = problem.least_squares
    norm = float(np.linalg.norm(best.s if isinstance(best, LowRank) else best))
    scale = problem.loss_scale * gram
    if norm == 0 or scale == 0:
        return math.inf
    if math.isfinite(norm + scale) and rate <= stability_threshold(norm, n_layers, scale):
        return math.inf
    if problem.input_gram is not None:
        few = decomposed or min(problem.target.shape) <= _SMALL_TARGET
        return _twice_over(minimum_sharpness(problem, n_layers)) if few else math.inf
    sigma = float(problem.target_factors().s[0]) if decomposed else largest_target_value(problem)
    return stability_threshold(sigma, n_layers, problem.loss_scale) if sigma > 0 else math.inf


def _twice_over(sharpness: float) -> float:
    return 2.0 / sharpness if sharpness > 0 else math.inf
