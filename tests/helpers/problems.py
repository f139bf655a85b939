# SPDX-License-Identifier: MIT
"""Training problems that several test modules start from."""

from __future__ import annotations

import numpy as np

import dlnfast as dln

from .matrices import draw_low_rank


def draw_low_rank_target(dim_out: int, dim_in: int, *, rank: int, seed: int = 0) -> dln.LowRank:
    """Return factors of a random target with singular values rank, .., 2, 1."""
    return draw_low_rank(seed, dim_out, dim_in, np.arange(rank, 0, -1.0))


def draw_problem(
    widths: list[int], *, seed: int = 0, white: bool = True, loss_scale: float = 0.3
) -> dln.Problem:
    """Return a problem with a random dense target, and white or random correlated inputs."""
    rng = np.random.default_rng(seed)
    target = rng.standard_normal((widths[-1], widths[0])) / np.sqrt(widths[0])
    if white:
        return dln.Problem(target, loss_scale=loss_scale)
    root = rng.standard_normal((widths[0], widths[0] + 3)) / np.sqrt(widths[0])
    return dln.Problem(target @ root @ root.T, root @ root.T, loss_scale)
