# SPDX-License-Identifier: MIT
"""`gradients`: the gradient of the loss with respect to each layer, by the products of the dense engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .._problem.observations import Observations
from .._problem.problem import Problem
from .._support.arrays import FloatArray, check_count
from .._support.dispatch import core
from .._support.errors import DivergedError
from .._support.threads import MAX_THREADS
from .checks import check_initial, require_arrays


def gradients(
    problem: Problem | Observations, weights: Sequence[npt.ArrayLike], *, n_threads: int = 0
) -> list[FloatArray]:
    """Return the gradients ``G_l = c W_{L:l+1}^T (W_{L:1} S - Phi) W_{l-1:1}^T`` at these weights.

    Parameters
    ----------
    problem : Problem, Completion or Sensing
        The problem whose loss is differentiated.
    weights : sequence of array_like
        Layers ``W_1, .., W_L``.
    n_threads : int
        Number of threads, as for `train`.

    Returns
    -------
    list of ndarray
        ``G_1, .., G_L``, each of the shape of its layer. Costs one step of the dense engine.

    Raises
    ------
    ShapeError
        Weights that do not fit each other or the problem.
    AssumptionError
        Weights that are sampled lazily (``implicit=True``) instead of whole layers.
    DivergedError
        The loss at these weights is not finite.
    """
    if not isinstance(problem, (Problem, Observations)):
        raise TypeError(
            f"problem is {type(problem).__name__}; wanted a dlnfast.Problem, Completion or Sensing"
        )
    layers = [np.require(w, None, ["C", "A"]) for w in require_arrays(check_initial(weights, problem))]
    team = check_count(n_threads, "n_threads", minimum=0, maximum=MAX_THREADS)
    found = [np.empty_like(w) for w in layers]
    loss = core.gradients(layers, problem.engine_arguments(layers[0].dtype), found, team)
    if not math.isfinite(loss):
        sizes = [float(np.max(np.abs(w), initial=0.0)) for w in layers]
        layer = 1 + int(np.argmax(sizes))
        raise DivergedError(
            f"the loss is not finite at these weights (layer {layer} has the largest entries)",
            step=0,
            layer=layer,
        )
    return found
