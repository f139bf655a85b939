# SPDX-License-Identifier: MIT
"""The update rule of one weight matrix, shared by both descents on PyTorch devices."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class UpdateRule:
    """Gradient descent step of one layer, with momentum and weight decay, rounded as in the core.

    With learning rate eta, decay lambda, momentum mu and the gradient c G of the loss at W:
    ``V <- mu V + c G + lambda W``, then ``W <- W - eta V``. All methods also accept W^T, with the transposes
    of G and V.

    Parameters
    ----------
    loss_scale : float
        Factor c of the loss.
    rates : (float, float, float)
        Learning rate, weight decay and momentum.
    dtype : dtype
        Precision of the weight.
    is_scheduled : bool
        Whether `set_rates` changes the rates from step to step; `rates` are then the largest ones.
    """

    def __init__(
        self,
        loss_scale: float,
        rates: tuple[float, float, float],
        dtype: np.dtype[Any],
        *,
        is_scheduled: bool = False,
    ) -> None:
        self.scale = loss_scale
        self.set_rates(*rates)
        self.is_trained = self.rate != 0.0
        self.has_momentum = self.is_trained and self.momentum != 0.0
        # As in the core: W drops out where rate * decay is 1, and exactly -rate G remains.
        takes_all = not self.has_momentum and dtype.type(self.rate) * dtype.type(self.decay) == 1
        takes_all = takes_all and not is_scheduled
        self.weight_factor = 0.0 if takes_all else 1.0
        #: Whether the decay is added to the gradient before the step, so that the step is rounded once. A
        #: factor 1 - rate * decay would be rounded in the same direction at every step of a slow phase.
        self.has_decay_term = (
            self.is_trained and not self.has_momentum and self.decay != 0.0 and not takes_all
        )

    def set_rates(self, rate: float, decay: float, momentum: float) -> None:
        """Set the rates of the next step; what the rule needs follows from the largest rates of a run."""
        self.rate, self.decay, self.momentum = rate, decay, momentum

    def step_along_product(
        self, matrix: torch.Tensor, velocity: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor
    ) -> None:
        """Step along ``c left right``; use `step_along_sum` instead if `has_decay_term`."""
        if velocity is not None:
            velocity.addmm_(left, right, beta=self.momentum, alpha=self.scale)
            self._step_along_velocity(matrix, velocity)
        else:
            matrix.addmm_(left, right, beta=self.weight_factor, alpha=-self.rate * self.scale)

    def step_along_sum(
        self, matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None
    ) -> None:
        """Step along ``c left right + decay W``, which is computed in `out`."""
        gradient = torch.addmm(matrix, left, right, beta=self.decay, alpha=self.scale, out=out)
        matrix.add_(gradient, alpha=-self.rate)

    def step_along(
        self,
        matrix: torch.Tensor,
        velocity: torch.Tensor | None,
        block: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> None:
        """Step along ``c block``; a sum with the decay is computed in `out`, which may be the block."""
        if velocity is not None:
            velocity.mul_(self.momentum).add_(block, alpha=self.scale)
            self._step_along_velocity(matrix, velocity)
        elif self.has_decay_term:
            gradient = torch.mul(block, self.scale, out=out).add_(matrix, alpha=self.decay)
            matrix.add_(gradient, alpha=-self.rate)
        elif self.weight_factor == 0.0:
            torch.mul(block, -self.rate * self.scale, out=matrix)
        else:
            matrix.add_(block, alpha=-self.rate * self.scale)

    def _step_along_velocity(self, matrix: torch.Tensor, velocity: torch.Tensor) -> None:
        if self.decay != 0.0:
            velocity.add_(matrix, alpha=self.decay)
        matrix.add_(velocity, alpha=-self.rate)
