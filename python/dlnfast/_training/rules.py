# SPDX-License-Identifier: MIT
"""The settings of `dlnfast.optimizers` for the core and for the torch engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..optimizers import Muon, Nesterov, Optimizer, Shampoo, SpectralSign

if TYPE_CHECKING:
    from .. import _core as types


def core_rule(rule: Optimizer | None, widths: Sequence[int], dtype: np.dtype[Any]) -> types.Optimizer | None:
    """Return the settings for the core; None for gradient descent and for rules of the torch engine alone."""
    if isinstance(rule, Nesterov):
        return _settings("nesterov")
    if isinstance(rule, Shampoo):
        return _settings("shampoo", epsilon=rule.epsilon, decay=rule.decay)
    if not isinstance(rule, (Muon, SpectralSign)):
        return None
    muon = as_muon(rule)
    return _settings(
        "muon",
        nesterov=muon.nesterov,
        method=muon.method,
        iterations=muon.steps,
        coefficients=list(muon.coefficients),
        epsilon=muon.epsilon,
        direction_scale=direction_scales(muon, widths).tolist(),
        rank_tolerance=rank_tolerance(muon, dtype),
    )


def as_muon(rule: Muon | SpectralSign) -> Muon:
    """Return the rule as settings of `Muon`."""
    if isinstance(rule, Muon):
        return rule
    return Muon(rule.momentum, False, "polar", scale=None, rank_tolerance=rule.rank_tolerance)


def direction_scales(rule: Muon, widths: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return the factor q of every layer of a network with these widths."""
    rows, cols = np.array(widths[1:], dtype=np.float64), np.array(widths[:-1], dtype=np.float64)
    if rule.scale is None:
        return np.ones(len(rows))
    if rule.scale == "original":
        return np.sqrt(np.maximum(1.0, rows / np.maximum(cols, 1.0)))
    return 0.2 * np.sqrt(np.maximum(rows, cols))


def rank_tolerance(rule: Muon, dtype: np.dtype[Any]) -> float:
    """Return the rank tolerance in a precision."""
    return math.sqrt(np.finfo(dtype).eps) if rule.rank_tolerance is None else float(rule.rank_tolerance)


def _settings(name: str, **settings: Any) -> types.Optimizer:
    values: Any = {
        "rule": name,
        "nesterov": False,
        "method": "newton-schulz",
        "iterations": 0,
        "coefficients": [0.0] * 3,
        "epsilon": 0.0,
        "decay": 1.0,
        "direction_scale": [],
        "rank_tolerance": 0.0,
    } | settings
    result: types.Optimizer = values
    return result
