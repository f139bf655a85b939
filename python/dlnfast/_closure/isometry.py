# SPDX-License-Identifier: MIT
"""The departure of a matrix from a multiple of an isometry, measured on random directions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray, frobenius_norm, random_generator
from .._support.products import multiply

#: Number of random directions on which a layer is compared with a multiple of an isometry.
N_PROBES = 8


def rounding_tolerance(dtype: npt.DTypeLike) -> float:
    """Return the relative size up to which a direction, or a departure from an assumption, is rounding error.

    Layers from Householder QR are orthogonal to a few eps, and products of width d add sqrt(d) eps.
    """
    return 1024.0 * float(np.finfo(dtype).eps)


def measure_isometry(
    weight: FloatArray, layer: int, tall: bool, inside: FloatArray, norm: float
) -> tuple[float, float]:
    """Return rho and the departure of W (or of W^T, if not `tall`) from rho times an isometry.

    Measured on `N_PROBES` random directions x orthogonal to the rows of `inside`: the mean of
    ``||W^T W x - rho^2 x||^2`` is an unbiased estimate of ``||W^T W - rho^2 I||_F^2``, to which a departure
    in a single direction contributes for every x. Both are 0 if the layer is zero on the complement.
    """
    dim = weight.shape[1] if tall else weight.shape[0]
    probes = random_generator(0, ("probe", layer)).standard_normal((dim, N_PROBES)).astype(weight.dtype)
    for _ in range(2):
        probes -= inside.T @ (inside @ probes)
    image = multiply(weight, probes, transpose_a=not tall)
    rho = frobenius_norm(image) / float(np.linalg.norm(probes))
    if rho <= rounding_tolerance(weight.dtype) * norm:
        return 0.0, 0.0
    unit = weight.dtype.type(rho)
    back = multiply(weight, image / unit, transpose_a=tall) / unit  # rho^2 may overflow or underflow
    return rho, float(np.linalg.norm(back - probes)) / float(np.linalg.norm(probes))
