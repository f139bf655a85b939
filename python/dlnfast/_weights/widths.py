# SPDX-License-Identifier: MIT
"""Checks of the arguments of every initialisation: widths d_0 .. d_L, scales, precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .._support.arrays import as_list, check_count, check_precision, per_layer
from .._support.errors import ShapeError

Scale = float | Sequence[float]


def check_widths(widths: Sequence[int]) -> list[int]:
    """Convert d_0 .. d_L to ints; there have to be at least two, none below 1."""
    items = as_list(widths, "widths", "a list of integers, d_0 .. d_L")
    sizes = [check_count(d, f"widths[{i}] (d_{i})") for i, d in enumerate(items)]
    if len(sizes) < 2:
        raise ShapeError(f"widths has {len(sizes)} entries; wanted d_0 .. d_L, at least two")
    return sizes


def check_distribution(
    widths: Sequence[int], scale: Scale, dtype: npt.DTypeLike
) -> tuple[list[int], npt.NDArray[np.float64], np.dtype[Any]]:
    """Check the parameters of a distribution of weights; return d_0 .. d_L, a scale per layer, the dtype."""
    sizes = check_widths(widths)
    scales = per_layer(scale, "scale (eps)", len(sizes) - 1)
    return sizes, scales, check_precision(dtype)
