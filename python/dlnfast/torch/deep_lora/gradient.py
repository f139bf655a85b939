# SPDX-License-Identifier: MIT
"""Initial factors of Deep LoRA, from the leading singular vectors of the gradient."""

from __future__ import annotations

import numpy as np
import torch

from ..._problem.low_rank import LowRank
from ..._support.arrays import FloatArray
from ..._support.haar import haar, join_frames, signed_q
from .layers import Factors, Target


def draw_frames(
    gradient: LowRank | None, target: Target, rank: int, generator: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Draw the frames right (rank, d_in) and left (d_out, rank), images of each other under a rotation E.

    For a square weight and a Haar distributed E, the right frame spans ``[V_g, E^T U_g]``, and the left frame
    is its image, ``left = E right^T``. The frames are drawn from their joint distribution without forming E:
    the image X of V_g is a uniform frame; the part of U_g outside of X has as its preimage a uniform frame F
    outside of V_g. So ``right = [V_g, F]^T`` and ``left = [X, orth((1 - X X^T) U_g)]``. Without a gradient
    both frames are uniform and independent.
    """
    if gradient is None:
        return haar(rank, target.d_in, generator), haar(target.d_out, rank, generator)
    v, u = signed_q(gradient.V.astype(np.float64)), gradient.U.astype(np.float64)
    n_right = v.shape[1]
    image = haar(target.d_out, n_right, generator)
    n_left = rank - n_right
    right = join_frames(v, generator.standard_normal((target.d_in, n_left)))
    left = join_frames(image, u[:, :n_left])
    return np.ascontiguousarray(right.T), left


def make_first_factors(
    target: Target,
    frames: tuple[FloatArray, FloatArray] | None,
    width: int,
    depth: int,
    scale: float,
    generator: np.random.Generator,
) -> Factors:
    """Make the factors: `depth` scaled identities between the frames, or `depth` scaled random frames."""
    framed = frames is not None
    if frames is not None:
        cores = np.tile(scale * np.eye(width), (depth, 1, 1))
    else:
        frames = scale * haar(width, target.d_in, generator), scale * haar(target.d_out, width, generator)
        cores = np.array([scale * haar(width, width, generator) for _ in range(depth - 2)])

    def tensor(array: FloatArray) -> torch.Tensor:
        return torch.as_tensor(array, dtype=target.dtype, device=target.weight.device)

    return Factors(tensor(frames[0]), tensor(cores) if len(cores) else None, tensor(frames[1]), framed)
