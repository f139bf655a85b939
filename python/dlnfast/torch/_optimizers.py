# SPDX-License-Identifier: MIT
"""Update rules of `dlnfast.optimizers` on PyTorch tensors, as in ``cpp/src/update_rule.cpp``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .._training.rules import as_muon, direction_scales, rank_tolerance
from ..optimizers import Adam, AdamW, Muon, Nesterov, Optimizer, Shampoo, SpectralSign

#: Tensors that a rule keeps for a layer, by name.
State = dict[str, torch.Tensor]
#: eta, lambda and mu of a step.
Rates = tuple[float, float, float]
#: Changes weight, gradient and state of a layer in place, for step t.
LayerRule = Callable[[torch.Tensor, torch.Tensor, State, int, Rates], None]


def make_layer_rule(rule: Optimizer, weight: torch.Tensor) -> tuple[LayerRule, State]:
    """Return the rule for a layer, and its state before the first step.

    Parameters
    ----------
    rule : Optimizer
        Settings.
    weight : Tensor, shape (m, n)
        Weight matrix of the layer.

    Returns
    -------
    callable, dict
    """
    rows, columns = weight.shape
    zeros = {"velocity": torch.zeros_like(weight)}
    if isinstance(rule, Nesterov):
        return _step_nesterov, zeros
    if isinstance(rule, (Muon, SpectralSign)):
        muon = as_muon(rule)
        scale = float(direction_scales(muon, (columns, rows))[0])
        return _Muon(muon, scale, weight), zeros
    if isinstance(rule, Shampoo):
        eye = rule.epsilon * torch.eye(rows, dtype=torch.float64, device=weight.device)
        other = rule.epsilon * torch.eye(columns, dtype=torch.float64, device=weight.device)
        return _Shampoo(rule), zeros | {"left_factor": eye, "right_factor": other}
    assert isinstance(rule, Adam)
    return _Adam(rule), {"first": torch.zeros_like(weight), "second": torch.zeros_like(weight)}


def _step_nesterov(weight: torch.Tensor, gradient: torch.Tensor, state: State, t: int, rates: Rates) -> None:
    eta, decay, mu = rates
    del t
    if decay != 0.0:
        gradient.add_(weight, alpha=decay)
    velocity = state["velocity"].mul_(mu).add_(gradient)
    weight.add_(gradient.add_(velocity, alpha=mu), alpha=-eta)


class _Muon:
    def __init__(self, rule: Muon, scale: float, weight: torch.Tensor) -> None:
        self.rule, self.scale = rule, scale
        self.tolerance = rank_tolerance(rule, np.dtype(str(weight.dtype).removeprefix("torch.")))

    def __call__(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: State, t: int, rates: Rates
    ) -> None:
        eta, decay, mu = rates
        del t
        velocity = state["velocity"].mul_(mu).add_(gradient, alpha=1 - mu)
        direction = gradient.mul_(1 - mu).add_(velocity, alpha=mu) if self.rule.nesterov else velocity
        moved = self._orthogonalize(direction).mul_(eta * self.scale)
        weight.sub_(moved if decay == 0.0 else moved.add_(weight, alpha=eta * decay))

    def _orthogonalize(self, matrix: torch.Tensor) -> torch.Tensor:
        if self.rule.method == "polar":
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            counts = values > self.tolerance * values[:1]
            polar: torch.Tensor = (left * counts.to(left.dtype)) @ right
            return polar
        a, b, c = self.rule.coefficients
        result: torch.Tensor = matrix / torch.linalg.matrix_norm(matrix).clamp(min=self.rule.epsilon)
        is_wide = result.shape[0] <= result.shape[1]
        for _ in range(self.rule.steps):
            gram = result @ result.T if is_wide else result.T @ result
            polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            factors = (polynomial, result) if is_wide else (result, polynomial)
            result = torch.addmm(result, *factors, beta=a)
        return result


class _Shampoo:
    def __init__(self, rule: Shampoo) -> None:
        self.rule = rule

    def __call__(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: State, t: int, rates: Rates
    ) -> None:
        eta, decay, mu = rates
        del t
        wide = gradient.to(torch.float64)
        left = state["left_factor"].mul_(self.rule.decay).addmm_(wide, wide.T)
        right = state["right_factor"].mul_(self.rule.decay).addmm_(wide.T, wide)
        direction = _inverse_fourth_root(left) @ wide @ _inverse_fourth_root(right)
        moved = state["velocity"].mul_(mu).add_(direction.to(weight.dtype)) * eta
        weight.sub_(moved if decay == 0.0 else moved.add_(weight, alpha=eta * decay))


def _inverse_fourth_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    least = 1e-16 * float(values.abs().max().clamp(min=1e-300))
    root: torch.Tensor = (vectors * values.clamp(min=least).pow(-0.25)) @ vectors.T
    return root


class _Adam:
    """Adam and AdamW: the formulas of ``torch.optim``."""

    def __init__(self, rule: Adam) -> None:
        self.rule = rule
        self.is_decoupled = isinstance(rule, AdamW)

    def __call__(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: State, t: int, rates: Rates
    ) -> None:
        eta, decay, _ = rates
        first_beta, second_beta = self.rule.betas
        if decay != 0.0 and self.is_decoupled:
            weight.mul_(1 - eta * decay)
        elif decay != 0.0:
            gradient.add_(weight, alpha=decay)
        first = state["first"].lerp_(gradient, 1 - first_beta)
        second = state["second"].mul_(second_beta).addcmul_(gradient, gradient, value=1 - second_beta)
        correction = math.sqrt(1 - second_beta ** (t + 1))
        denominator = second.sqrt().div_(correction).add_(self.rule.epsilon)
        weight.addcdiv_(first, denominator, value=-eta / (1 - first_beta ** (t + 1)))


class GradientRule:
    """Stores the gradient of a layer in place of a step; has the methods of `_rule.UpdateRule`.

    The tensor passed as `velocity` receives the gradient.

    Parameters
    ----------
    loss_scale : float
        Factor c of the loss.
    """

    is_trained = True
    has_momentum = True
    has_decay_term = False

    def __init__(self, loss_scale: float) -> None:
        self.scale = loss_scale

    def step_along_product(
        self, matrix: torch.Tensor, velocity: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor
    ) -> None:
        """Store ``c left right``."""
        del matrix
        assert velocity is not None
        velocity.addmm_(left, right, beta=0, alpha=self.scale)

    def step_along(
        self, matrix: torch.Tensor, velocity: torch.Tensor | None, block: torch.Tensor, out: Any = None
    ) -> None:
        """Store ``c block``."""
        del matrix, out
        assert velocity is not None
        torch.mul(block, self.scale, out=velocity)

    def set_rates(self, rate: float, decay: float, momentum: float) -> None:
        """Ignore the rates: the rule of the layer has them."""
        del rate, decay, momentum
