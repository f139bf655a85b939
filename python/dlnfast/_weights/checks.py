# SPDX-License-Identifier: MIT
"""Checks that initial weights fit one another, the problem and the engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from .._problem.observations import Observations
from .._problem.problem import Problem
from .._support.arrays import FloatArray, as_layers
from .._support.errors import AssumptionError, ShapeError
from .implicit import ImplicitWeights


def require_arrays(weights: list[FloatArray] | ImplicitWeights) -> list[FloatArray]:
    """Return the weights if they are arrays; raise AssumptionError for lazily sampled weights."""
    if isinstance(weights, ImplicitWeights):
        raise AssumptionError(
            "weights are lazily sampled, but the dense engine needs complete layers; wanted arrays, such as "
            "dln.orthogonal(..., implicit=False)"
        )
    return weights


def _check_weights(weights: Sequence[npt.ArrayLike], problem: Problem | Observations) -> list[FloatArray]:
    layers = as_layers(weights, columns=(problem.dim_in, _describe_input_dimension(problem)))
    if len(layers[-1]) != problem.dim_out:
        raise ShapeError(
            f"weights[{len(layers) - 1}] (W_{len(layers)}) has {len(layers[-1])} rows; "
            f"wanted {problem.dim_out}, problem.dim_out"
        )
    return layers


def _describe_input_dimension(problem: Problem | Observations) -> str:
    white = problem.whitening
    if white is None or white.matrix is None or white.rank == white.matrix.shape[1]:
        return "problem.dim_in"
    return f"problem.dim_in: whitening reduced {white.matrix.shape[1]} dimensions to {white.rank}"


def check_initial(
    weights: Sequence[npt.ArrayLike] | ImplicitWeights, problem: Problem | Observations
) -> list[FloatArray] | ImplicitWeights:
    """Convert initial weights to arrays of fitting shapes; check the widths of lazily sampled weights."""
    if not isinstance(weights, ImplicitWeights):
        return _check_weights(weights, problem)
    for width, wanted, symbol in (
        (weights.widths[0], problem.dim_in, "d_x"),
        (weights.widths[-1], problem.dim_out, "d_y"),
    ):
        if width != wanted:
            raise ShapeError(
                f"weights have widths {list(weights.widths)}; wanted {wanted}, the problem's {symbol}, "
                f"at the {'input' if symbol == 'd_x' else 'output'}"
            )
    return weights
