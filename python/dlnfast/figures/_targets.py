# SPDX-License-Identifier: MIT
"""Targets that several figures share."""

from __future__ import annotations

import numpy as np

from .._problem.low_rank import LowRank
from .._problem.problem import Problem
from .._problem.standard import low_rank_recovery
from .._support.arrays import random_generator

#: Distance of the chosen singular values.
_SPACING = 5


def spaced_target(dim: int, rank: int, seed: int, setting: str) -> LowRank:
    """Return a target with every fifth singular value of a Gaussian matrix, and its vectors.

    Raises
    ------
    ValueError
        If the rank exceeds a fifth of `dim`; the message names it by `setting`.
    """
    chosen = _SPACING * np.arange(rank)
    if rank and chosen[-1] >= dim:
        raise ValueError(f"{setting} is {rank}; wanted at most {-(-dim // _SPACING)}, a fifth of the width")
    generator = random_generator(seed, ("factorisation-compressed", "spaced target"))
    left, values, right = np.linalg.svd(generator.standard_normal((dim, dim)))
    return LowRank(left[:, chosen], values[chosen], right[chosen].T)


def fixed_modes(dim: int, rank: int, seed: int, published: int = 30) -> Problem:
    """Return the target of `low_rank_recovery` at a published width in a space of `dim` dimensions.

    Singular values and c are those of the published width, so that a run takes as many steps at any width.
    """
    narrow = low_rank_recovery(published, rank, seed)
    wide = low_rank_recovery(dim, rank, seed)
    assert isinstance(narrow.target, LowRank)
    assert isinstance(wide.target, LowRank)
    return Problem(LowRank(wide.target.U, narrow.target.s, wide.target.V), loss_scale=narrow.loss_scale)
