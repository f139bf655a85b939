# SPDX-License-Identifier: MIT
"""`descend`: full-batch gradient descent on any model, with the steps that `train` takes on linear ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .._support.arrays import check_count, check_scale
from .._support.errors import DivergedError
from .._support.progress import ProgressBar

__all__ = ["Descent", "descend"]


@dataclass(frozen=True)
class Descent:
    """Losses of a run of `descend`.

    Attributes
    ----------
    loss : ndarray, shape (T + 1,)
        Losses of the weights after t = 0 .. T steps.
    converged : bool
        Whether the last loss is at most the tolerance.
    """

    loss: npt.NDArray[np.float64]
    converged: bool

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return len(self.loss) - 1


def descend(
    model: nn.Module,
    loss: Callable[[], torch.Tensor],
    *,
    learning_rate: float,
    steps: int,
    tolerance: float = 0.0,
    progress: bool = False,
) -> Descent:
    """Take steps ``W <- W - eta dl/dW`` until the loss is small.

    Parameters
    ----------
    model : Module
        Model to train, in place.
    loss : callable
        Function without arguments that returns the current loss of the model over all samples.
    learning_rate : float
        Learning rate eta.
    steps : int
        Maximal number of steps.
    tolerance : float
        Loss at or below which the descent stops.
    progress : bool
        Show a progress bar on a terminal, after the first second.

    Returns
    -------
    Descent

    Raises
    ------
    DivergedError
        If the loss is not finite.

    Notes
    -----
    Cost: a forward and a backward pass over all samples per step.

    Examples
    --------
    >>> import torch
    >>> from dlnfast.torch import DeepLinear, descend
    >>> model = DeepLinear([2, 2, 2], scale=1.0, seed=0, dtype=torch.float64)
    >>> found = descend(
    ...     model,
    ...     lambda: 0.5 * (model(torch.eye(2, dtype=torch.float64)) - torch.eye(2)).square().sum(),
    ...     learning_rate=0.1,
    ...     steps=1000,
    ...     tolerance=1e-12,
    ... )
    >>> found.converged
    True
    """
    rate = check_scale(learning_rate, "learning_rate (eta)")
    least = check_scale(tolerance, "tolerance")
    n_steps = check_count(steps, "steps", minimum=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    values: list[float] = []
    with ProgressBar(n_steps, progress) as bar:
        for step in range(n_steps + 1):
            current = loss()
            values.append(float(current.detach()))
            if not math.isfinite(values[-1]):
                text = f"the loss is not finite at step {step}: lower learning_rate (eta), now {rate:g}"
                raise DivergedError(text, step=step, layer=0)
            if values[-1] <= least or step == n_steps:
                break
            gradients = torch.autograd.grad(current, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(gradient, alpha=rate)
            if bar.listener is not None and step % 100 == 0:
                bar.listener(step, values[-1])
    return Descent(np.array(values), values[-1] <= least)
