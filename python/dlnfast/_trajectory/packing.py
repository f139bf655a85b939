# SPDX-License-Identifier: MIT
"""Lists with one array per layer, as named arrays in files: pack, unpack and check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._support.arrays import FloatArray
from .._support.errors import ShapeError
from .._support.file_checks import check_array
from .._support.files import Arrays


def pack_list(name: str, items: Sequence[FloatArray | None] | None, arrays: Arrays) -> list[bool] | None:
    """Add the items to the arrays as ``name_0``, ``name_1``, ..; return which of them are not None."""
    if items is None:
        return None
    for i, item in enumerate(items):
        if item is not None:
            arrays[f"{name}_{i}"] = item
    return [item is not None for item in items]


def unpack_list(name: str, present: list[bool] | None, arrays: Arrays) -> Any:
    """Return the tuple that `pack_list` packed; `present` is its result."""
    if present is None:
        return None
    return tuple(arrays[f"{name}_{i}"] if is_there else None for i, is_there in enumerate(present))


def check_steps(steps: Any, name: str, last: int | None = None) -> None:
    """Raise unless steps are increasing integers from 0, up to `last` where the losses end there.

    Raises
    ------
    ValueError
        The message names the array.
    """
    check_array(steps, name, (None,), "i")
    if len(steps) and steps[0] < 0:
        raise ValueError(f"{name} begins with {steps[0]}; wanted steps from 0")
    if np.any(steps[1:] <= steps[:-1]):
        raise ValueError(f"{name} does not increase")
    if last is not None and len(steps) and steps[-1] > last:
        raise ValueError(f"{name} ends with {steps[-1]}, but the losses with step {last}")


def check_matrices(matrices: Sequence[Any], name: str, shapes: Sequence[tuple[int, int]]) -> None:
    """Raise unless there is one matrix of the right shape per layer.

    Raises
    ------
    ValueError
        The message names the matrix.
    """
    if len(matrices) != len(shapes):
        raise ShapeError(f"{name} holds {len(matrices)} layers; wanted {len(shapes)}")
    for i, (matrix, shape) in enumerate(zip(matrices, shapes, strict=True)):
        check_array(matrix, f"{name}_{i}", shape)
