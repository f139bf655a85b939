# SPDX-License-Identifier: MIT
"""Closed forms for gradient descent and gradient flow, for comparison with measurements.

Symbols: L layers, initial scale eps (W_l(0) = eps Q_l), loss c/2 ||W_{L:1} - Phi||_F^2 for whitened inputs,
learning rate eta. There is no weight decay and no momentum, unless they are among the arguments. Functions
with a learning rate count time in steps; those without it have the time of `dlnfast.flow`.
"""

from __future__ import annotations

from .balanced import BalancedFlow, balanced_flow
from .descent import (
    FirstOrderSplit,
    PlateauBounds,
    aligned_modes,
    compression_law,
    default_learning_rate,
    discrimination_law,
    first_order_split,
    plateau_bounds,
    power_iteration,
    rho_flow,
    stability_threshold,
)
from .kernel import NeuralTangentKernel, neural_tangent_kernel
from .modes import escape_time, mode_strength

__all__ = [
    "BalancedFlow",
    "FirstOrderSplit",
    "NeuralTangentKernel",
    "PlateauBounds",
    "aligned_modes",
    "balanced_flow",
    "compression_law",
    "default_learning_rate",
    "discrimination_law",
    "escape_time",
    "first_order_split",
    "mode_strength",
    "neural_tangent_kernel",
    "plateau_bounds",
    "power_iteration",
    "rho_flow",
    "stability_threshold",
]
