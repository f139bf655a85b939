# SPDX-License-Identifier: MIT
"""Learning rates: constant, automatic and adaptive ones, and the largest at which a minimum is stable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from .._closure.certificate import Certificate
from .._problem.kinds import AnyProblem
from .._problem.low_rank import LowRank
from .._problem.observations import Observations
from .._problem.problem import Problem
from .._problem.samples import SampleProblem
from .._support.arrays import check_scale, per_layer, scale_of, widths_of
from .._support.schedule import Schedule, read_rate
from .._weights.checks import require_arrays
from .._weights.implicit import ImplicitWeights
from ..theory.descent import default_learning_rate, minimum_sharpness, stability_threshold
from .curvature import constant_rate, layer_curvatures
from .curvature import minimum_sharpness as minimum_sharpness_of_observed
from .options import Adaptive, Options, PerLayer, Rate
from .request import AdaptiveRequest, RateTables, Request, Weights

ADAPTIVE_RATE: Final = 'learning_rate is adaptive, which is for the dense engine; wanted numbers or "auto"'
#: Smaller side up to which a target is decomposed for a message alone.
_SMALL_TARGET: Final = 512


def largest_target_value(problem: AnyProblem) -> float:
    """Return ||Phi||_2, or 0 if it is unknown or takes a large decomposition."""
    if not isinstance(problem, Problem):
        return 0.0
    if isinstance(problem.target, LowRank):
        return float(problem.target.s[0]) if problem.target.rank else 0.0
    return float(np.linalg.norm(problem.target, 2)) if min(problem.target.shape) <= _SMALL_TARGET else 0.0


def learning_rates(
    learning_rate: PerLayer | str,
    problem: AnyProblem,
    weights: Weights,
    weight_decay: npt.NDArray[np.float64],
    momentum: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the constant learning rates of the layers: the numbers of the options, or those of "auto"."""
    n_layers = len(weights)
    if not isinstance(learning_rate, str):
        return read_rate(learning_rate, "learning_rate (eta)", n_layers)
    if isinstance(problem, Observations):
        return automatic_rates(problem, weights, np.ones(n_layers), weight_decay, momentum)
    if isinstance(problem, SampleProblem):
        if problem.loss_name != "squared":
            raise ValueError(
                f'learning_rate (eta) is "auto", but the {problem.loss_name} loss need not have a minimum, '
                "whose sharpness decides; wanted numbers or a dlnfast.Schedule"
            )
        problem = least_squares_of(problem)
    scales = weights.scales if isinstance(weights, ImplicitWeights) else [scale_of(w) for w in weights]
    return rates_at(problem, scales, weight_decay, momentum)


def least_squares_of(problem: SampleProblem) -> Problem:
    """Return the `Problem` with the full loss of samples under the squared loss; O(N d_x (d_x + d_y))."""
    assert problem.outputs is not None
    inputs, outputs = problem.inputs.astype(np.float64), problem.outputs.astype(np.float64)
    return Problem(
        outputs @ inputs.T,
        inputs @ inputs.T,
        problem.loss_scale,
        output_norm_squared=float(np.sum(outputs**2)),
    )


def rates_at(
    problem: Problem,
    scales: Sequence[float],
    weight_decay: npt.NDArray[np.float64],
    momentum: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the learning rates of "auto" for layers of these scales (eps)."""
    n_layers = len(scales)
    # Weight decay adds lambda to every eigenvalue of the Hessian.
    sharpness = 1.0 / default_learning_rate(problem, n_layers, scale=max(scales)) + float(weight_decay.max())
    return np.full(n_layers, (1.0 - float(momentum.max())) / sharpness)


def automatic_rates(
    problem: Observations,
    weights: Weights,
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
    rule: Adaptive, problem: AnyProblem, weights: Weights
) -> tuple[npt.NDArray[np.float64], AdaptiveRequest]:
    """Return the ratios of the layers' rates, and the constants of an adaptive rate."""
    if isinstance(problem, SampleProblem):
        raise ValueError(f"{ADAPTIVE_RATE}, for a SampleProblem numbers")
    layers = require_arrays(weights)
    safety = check_scale(rule.safety, "safety", strict=True)
    ratios = per_layer(1.0 if rule.ratios is None else rule.ratios, "ratios", len(layers))
    error_scale = 1.0
    if isinstance(problem, Observations):
        error_scale = problem.error_scale
    elif problem.gram_eigen is not None:
        error_scale = float(np.sqrt(problem.gram_eigen[0][-1]))
    if rule.curvature is not None:
        curvature = per_layer(rule.curvature, "curvature", len(layers))
    elif isinstance(problem, Observations):
        curvature = np.array(layer_curvatures(problem, layers))
    else:
        curvature = np.full(len(layers), error_scale**2)
    return ratios, AdaptiveRequest(safety, curvature.tolist(), error_scale)


@np.errstate(over="ignore")
def rate_caution(
    problem: AnyProblem,
    scales: Sequence[float],
    learning_rate: npt.NDArray[np.float64],
    momentum: npt.NDArray[np.float64],
    *,
    decomposed: bool = False,
) -> str:
    """Return the warning for rates at which the minimum is unstable; empty for stable rates."""
    if isinstance(problem, SampleProblem):
        return ""  # no minimum is computed
    # The mean decides where layers have different rates; momentum raises the bound by the factor 1 + mu.
    rate, factor = float(learning_rate.mean()), 1 + float(momentum.min())
    if rate == 0:
        return ""
    bound = factor * _largest_stable_rate(problem, scales, learning_rate / rate, rate / factor, decomposed)
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
    """Return the largest rate at which the minimum is stable; infinity if `rate` is clearly below it."""
    n_layers = len(scales)
    if isinstance(problem, Observations):
        return _stable_rate(minimum_sharpness_of_observed(problem, scales, ratios.tolist()))
    # The Frobenius norm bounds the largest singular value. If that bound suffices, nothing is decomposed.
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
        return _stable_rate(minimum_sharpness(problem, n_layers)) if few else math.inf
    sigma = float(problem.target_factors().s[0]) if decomposed else largest_target_value(problem)
    return stability_threshold(sigma, n_layers, problem.loss_scale) if sigma > 0 else math.inf


def _stable_rate(sharpness: float) -> float:
    """Return two over the sharpness, the threshold of gradient descent."""
    return 2.0 / sharpness if sharpness > 0 else math.inf


def make_request(options: Options, problem: AnyProblem, weights: Weights) -> Request:
    """Return the request of checked options: decide the rates of the layers, and the sizes.

    Raises
    ------
    ShapeError
        For a list of rates of another length than the network.
    AssumptionError
        For an adaptive rate with lazily sampled weights.
    """
    n_layers = len(weights)
    steps = options.steps
    weight_decay, decay_table = _read_rates(options.weight_decay, "weight_decay (lambda)", n_layers, steps)
    momentum, momentum_table = _read_rates(options.momentum, "momentum (mu)", n_layers, steps, below=1.0)
    adaptive = rate_table = None
    if options.adaptive is not None:
        if decay_table is not None or momentum_table is not None:
            raise ValueError(
                "learning_rate is adaptive, and weight_decay or momentum is a Schedule; wanted constant ones"
            )
        rates, adaptive = adaptive_rates(options.adaptive, problem, weights)
    elif isinstance(options.learning_rate, Schedule):
        rates, rate_table = _read_rates(options.learning_rate, "learning_rate (eta)", n_layers, steps)
    else:
        assert not isinstance(options.learning_rate, Adaptive)
        rates = learning_rates(options.learning_rate, problem, weights, weight_decay, momentum)
    return Request(
        problem=problem,
        weights=weights,
        options=options,
        widths=list(weights.widths) if isinstance(weights, ImplicitWeights) else widths_of(weights),
        dtype=weights.dtype if isinstance(weights, ImplicitWeights) else weights[0].dtype,
        learning_rate=rates,
        adaptive=adaptive,
        weight_decay=weight_decay,
        momentum=momentum,
        callback=options.record.callback,
        tables=RateTables(rate_table, decay_table, momentum_table),
    )


def _read_rates(
    rate: Rate, name: str, n_layers: int, steps: int, *, below: float | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]:
    """Return the rates of the layers, the largest ones of a schedule, and the table of a schedule."""
    rates = read_rate(rate, name, n_layers, steps=steps, below=below)
    if not isinstance(rate, Schedule):
        return rates, None
    largest = rates.max(axis=0, initial=0.0)
    return np.broadcast_to(largest, n_layers).copy(), np.ascontiguousarray(rates)


def with_caution(certificate: Certificate, request: Request) -> Certificate:
    """Return the certificate with a warning in its reason, if the minimum is unstable at these rates."""
    if request.steps < 2 or request.adaptive is not None or request.optimizer is not None:
        return certificate
    caution = rate_caution(
        request.problem,
        request.scales(),
        request.learning_rate,
        request.momentum,
        decomposed=certificate.engine == "reduced",  # which has decomposed the target, however large
    )
    return replace(certificate, reason=f"{certificate.reason}{caution}") if caution else certificate


def divergence_text(request: Request, step: int, layer: int) -> str:
    """Return the message for a run whose loss is not finite at this step, with the remedy."""
    text = (
        f"the loss is not finite at step {step} (layer {layer} has grown most): lower learning_rate (eta), "
        f"now {_span(request.learning_rate)}"
    )
    if request.adaptive is not None:
        text = f"the loss is not finite at step {step} (layer {layer} has grown most): lower safety, "
        text += f"now {request.adaptive.safety:g}"
    sigma = largest_target_value(request.problem)
    if request.problem.input_gram is not None:
        text += ", or whiten the inputs"
    elif sigma > 0:
        bound = stability_threshold(sigma, len(request.learning_rate), request.problem.loss_scale)
        text += f"; at a balanced minimum of this problem rates above {bound:.3g} oscillate"
    if request.weight_decay.max() * request.learning_rate.max() > 2.0:
        product = _span(request.learning_rate * request.weight_decay)
        text += f"; learning_rate * weight_decay is {product}, above 2"
    return text


def _span(values: npt.NDArray[np.float64]) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:g}" if low == high else f"{low:g} .. {high:g}"
