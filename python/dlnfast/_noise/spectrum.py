# SPDX-License-Identifier: MIT
"""Reading of arguments that are a matrix or its singular values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .. import reference as plain
from .._support.arrays import FloatArray, as_array, as_list, as_matrix, as_vector, check_count


def read_spectrum(matrix: npt.ArrayLike) -> tuple[FloatArray, float, Sequence[int]]:
    """Return the singular values, descending, the machine eps of the input and its shape."""
    array = as_array(matrix, "matrix (W)")
    if array.ndim == 2:
        weight = as_matrix(array, "matrix", symbol="W")
        precision = float(np.finfo(weight.dtype).eps)
        return plain.singular_values(weight.astype(np.float64)), precision, weight.shape
    unsorted = as_vector(array, "matrix", symbol="singular values")
    if np.min(unsorted) < 0.0:
        raise ValueError(f"matrix (singular values) has a negative value, {np.min(unsorted):g}")
    values = np.sort(unsorted.astype(np.float64))[::-1]
    return values, float(np.finfo(unsorted.dtype).eps), unsorted.shape


def read_shape(shape: object) -> tuple[int, int]:
    """Return the numbers of rows and columns.

    Raises
    ------
    TypeError, ValueError
        For anything but two integers of at least 1.
    """
    sizes = as_list(shape, "shape", "(m, n)")
    if len(sizes) != 2:
        raise ValueError(f"shape is {shape!r}; wanted two numbers, (m, n)")
    return check_count(sizes[0], "shape[0]"), check_count(sizes[1], "shape[1]")
