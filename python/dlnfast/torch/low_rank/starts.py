# SPDX-License-Identifier: MIT
"""Initial factors of low rank: in the subspace of the first gradient, random, or of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from ..._problem.factors import leading_factors
from ..._problem.low_rank import LowRank
from ..._support.arrays import FloatArray
from ..._support.haar import haar, join_frames, signed_q
from .._gradients import TensorMap
from ..layers import WeightMatrix

INITS: Final = ("gradient", "surrogate", "random", "weight")
#: Singular values of a gradient below this share of the largest have no vectors of their own.
_SHARE: Final = 1e-6
#: Error of the singular values of a weight relative to the largest; that of the vectors is its root.
_TOLERANCE: Final = 1e-12


def start_from_frames(
    left: FloatArray, right: FloatArray, norm: float, depth: int, generator: np.random.Generator
) -> list[FloatArray]:
    """Return factors ``right, C_1, .., left`` of a product of this Frobenius norm with a random rotation.

    left (m, r) and right (r, n) have orthonormal columns and rows. The product is ``g left Q right`` with a
    rotation Q and ``g = norm / sqrt(r)``: all its singular values are g. The cores share g equally; with
    depth 2 the two factors do.
    """
    rank = len(right)
    rotation = haar(rank, rank, generator)
    size = norm / np.sqrt(rank)
    if depth == 2:
        return [np.sqrt(size) * rotation @ right, np.sqrt(size) * left]
    share = size ** (1 / (depth - 2))
    return [right, share * rotation, *[share * np.eye(rank) for _ in range(depth - 3)], left]


def draw_random_frames(
    matrix: WeightMatrix, rank: int, generator: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Draw uniform frames left (m, r) and right (r, n)."""
    rows, columns = matrix.shape
    return haar(rows, rank, generator), haar(rank, columns, generator)


def frames_of_gradient(
    gradient: LowRank, rank: int, generator: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Return frames of the leading singular vectors of a gradient, completed by random directions."""
    n_found = int(np.count_nonzero(gradient.s[:rank] > _SHARE * gradient.s[0]))
    left, right = (
        _complete(vectors[:, :n_found].astype(np.float64), rank, generator)
        for vectors in (gradient.U, gradient.V)
    )
    return left, right.T


def frames_of_surrogate(
    gradient: LowRank, weight: torch.Tensor, rank: int, generator: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    r"""Return frames that span ``[V_g, W^T U_g]`` on the right and ``[U_g, W V_g]`` on the left.

    Half of the directions are the leading singular vectors of the gradient, the others their images under the
    weight W at the start.
    """
    half = (rank + 1) // 2
    found = int(np.count_nonzero(gradient.s[:half] > _SHARE * gradient.s[0]))
    u, v = (vectors[:, :found].astype(np.float64) for vectors in (gradient.U, gradient.V))
    images = [
        np.asarray((weight.double() @ torch.as_tensor(v, device=weight.device)).cpu().numpy()),
        np.asarray((weight.double().T @ torch.as_tensor(u, device=weight.device)).cpu().numpy()),
    ]
    left, right = (
        _complete(join_frames(signed_q(own), image[:, : rank - found]), rank, generator)
        for own, image in zip((u, v), images, strict=True)
    )
    return left, right.T


def start_from_weight(weight: torch.Tensor, rank: int, depth: int) -> list[FloatArray]:
    """Return balanced factors of the best approximation of rank r of a weight."""
    found = leading_factors(TensorMap(weight.double()), rank, _TOLERANCE)
    roots = found.s ** (1 / depth)
    cores = [np.diag(roots) for _ in range(depth - 2)]
    return [roots[:, np.newaxis] * found.V.T, *cores, found.U * roots]


def multiply_factors(factors: Sequence[FloatArray]) -> FloatArray:
    """Return ``W_L .. W_1``."""
    product = factors[0]
    for factor in factors[1:]:
        product = factor @ product
    return product


def _complete(frame: FloatArray, rank: int, generator: np.random.Generator) -> FloatArray:
    """Return a frame with random directions added up to `rank` columns."""
    missing = rank - frame.shape[1]
    if missing <= 0:
        return signed_q(frame)
    return join_frames(signed_q(frame), generator.standard_normal((frame.shape[0], missing)))
