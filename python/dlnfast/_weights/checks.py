# SPDX-License-Identifier: MIT
"""Checks that initial weights fit one another, the problem and the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy.typing as npt

from .._problem.data import Whitening
from .._support.arrays import FloatArray, as_layers
from .._support.errors import AssumptionError, ShapeError
from .implicit import ImplicitWeights


class HasDimensions(Protocol):
    """The part of a problem that its weights must fit."""

    @property
    def dim_in(self) -> int: ...

    @property
    def dim_out(self) -> int: ...

    @property
    def whitening(self) -> Whitening | None: ...


def check_initial(
    weights: Sequence[npt.ArrayLike] | ImplicitWeights, problem: HasDimensions
) -> list[FloatArray] | ImplicitWeights:
    """Return the initial weights, as arrays unless they are sampled lazily; raise if the sizes do not fit."""
    if not isinstance(weights, ImplicitWeights):
        return check_layers(weights, problem)
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


def check_layers(weights: Sequence[npt.ArrayLike], problem: HasDimensions) -> list[FloatArray]:
    """Return the layers as arrays that fit the problem and each other."""
    layers = as_layers(weights, columns=(problem.dim_in, _describe_input_dimension(problem)))
    if len(layers[-1]) != problem.dim_out:
        raise ShapeError(
            f"weights[{len(layers) - 1}] (W_{len(layers)}) has {len(layers[-1])} rows; "
            f"wanted {problem.dim_out}, problem.dim_out"
        )
    return layers


def require_arrays(weights: list[FloatArray] | ImplicitWeights) -> list[FloatArray]:
    """Return the layers, or raise `AssumptionError` for weights that are sampled lazily."""
    if isinstance(weights, ImplicitWeights):
        raise AssumptionError(
            "weights are lazily sampled, but the dense engine needs complete layers; wanted arrays, such as "
            "dln.orthogonal(..., implicit=False)"
        )
    return weights


def _describe_input_dimension(problem: HasDimensions) -> str:
    white = problem.whitening
    if white is None or white.matrix is None or white.rank == white.matrix.shape[1]:
        return "problem.dim_in"
    return f"problem.dim_in: whitening reduced {white.matrix.shape[1]} dimensions to {white.rank}"
