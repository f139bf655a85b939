# SPDX-License-Identifier: MIT
"""`descend`: full-batch gradient descent on any model, step by step as `train` does on linear ones."""

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
    """What `descend` did.

    Attributes
    ----------
    loss : ndarray, shape (T + 1,)
        Of the weights after t = 0 .. T steps.
    converged : bool
        Whether the last one is at most the tolerance.
    """

    loss: npt.NDArray[np.float64]
    converged: bool

    @property
    def steps(self) -> int:
        """T."""
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
        Whose parameters move.
    loss : callable
        Returns the loss of the model as it is, over all samples.
    learning_rate : float
        eta.
    steps : int
        At most so many.
    tolerance : float
        Stop as soon as the loss is at most this.
    progress : bool
        A bar on a terminal, once the run has taken a second.

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
