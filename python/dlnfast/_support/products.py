# SPDX-License-Identifier: MIT
"""Matrix products by the core's multi-threaded kernels."""

from __future__ import annotations

import numpy as np

from .dispatch import core
from .types import FloatArray


def multiply(
    a: FloatArray, b: FloatArray, *, transpose_a: bool = False, transpose_b: bool = False, n_threads: int = 0
) -> FloatArray:
    """Return ``op(a) op(b)`` by the core's multi-threaded products; both of the same precision."""
    rows = a.shape[1] if transpose_a else a.shape[0]
    cols = b.shape[0] if transpose_b else b.shape[1]
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    out = np.empty((rows, cols), dtype=a.dtype)
    core.multiply(a, transpose_a, b, transpose_b, out, n_threads)
    return out
