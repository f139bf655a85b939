# SPDX-License-Identifier: MIT
"""The gradients of the loss at given weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from .._problem.observations import Observations
from .._problem.problem import Problem
from .._support.arrays import FloatArray
from .._training.options import Record
from .._training.train import train


def gradients(
    problem: Problem | Observations, weights: Sequence[npt.ArrayLike], *, n_threads: int = 0
) -> list[FloatArray]:
    """Return the gradients ``G_l = c W_{L:l+1}^T (W_{L:1} S - Phi) W_{l-1:1}^T`` at these weights.

    Parameters
    ----------
    problem : Problem, Completion or Sensing
        What the loss is made of.
    weights : sequence of array_like
        ``W_1, .., W_L``.
    n_threads : int
        As for `train`.

    Returns
    -------
    list of ndarray
        ``G_1, .., G_L``, each of the shape of its layer. Costs one step of the dense engine.
    """
    # One step with learning rate 1 and weight decay 1 leaves W - (G + W) = -G, with nothing rounded away.
    run = train(
        problem,
        weights,
        learning_rate=1.0,
        weight_decay=1.0,
        steps=1,
        engine="dense",
        record=Record(singular_values=None),
        n_threads=n_threads,
    )
    return [-weight for weight in run.all_weights()]
