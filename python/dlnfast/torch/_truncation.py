# SPDX-License-Identifier: MIT
"""Truncation of products of factors by the singular values of the product."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from .._support.arrays import check_count, check_scale
from .updates import compute_thin_svd

#: Rounding of a singular value of a product of factors, relative to the largest value and per sqrt(rank).
_ROUNDING: Final = 8 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Truncation:
    """Rank and error of one layer after its product of factors was truncated.

    Attributes
    ----------
    rank : int
        Rank of the product.
    error : float
        Error ``||P - P_rank||_F``, the least possible at this rank.
    relative_error : float
        Error divided by ``||P||_F``; 0 for P = 0.
    """

    rank: int
    error: float
    relative_error: float


@dataclass(frozen=True)
class TruncationRule:
    """Largest rank, and largest error relative to the norm; None for no limit."""

    rank: int | None
    tolerance: float | None

    @classmethod
    def checked(cls, rank: int | None, tolerance: float | None, caller: str) -> TruncationRule:
        """Return a rule from arguments of `caller`, of which at least one is required."""
        if rank is None and tolerance is None:
            raise ValueError(f"{caller} needs a rank or a tolerance; got neither")
        return cls(
            None if rank is None else check_count(rank, "rank"),
            None
            if tolerance is None
            else check_scale(tolerance, "tolerance (share of the norm of the product)", below=1.0),
        )

    def truncate(
        self, left: torch.Tensor, right: torch.Tensor
    ) -> tuple[Truncation, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return rank and error of the truncated product ``left right``, and its U, s and V^T in float64."""
        u, values, vt = compute_thin_svd(left, right)
        truncation = self.choose(values)
        rank = truncation.rank
        return truncation, (u[:, :rank], values[:rank], vt[:rank])

    def choose(self, values: torch.Tensor, complement: float = 0.0) -> Truncation:
        """Return rank and error for leading singular values in float64; `complement` sums the other squares.

        Errors within the rounding of the values count as equal to the tolerance.
        """
        # tails[k] is the error at rank k.
        tails = torch.cat([values.square().flip(0).cumsum(0).flip(0), values.new_zeros(1)])
        tails = (tails + complement).sqrt()
        rank = len(values)
        if self.tolerance is not None:
            limit = (self.tolerance + _ROUNDING * math.sqrt(max(rank, 1))) * tails[0]
            rank = int(torch.nonzero(torch.cat([tails[:-1] <= limit, limit.new_ones(1).bool()]))[0])
        rank = max(1, rank if self.rank is None else min(rank, self.rank))
        total, error = float(tails[0]), float(tails[rank])
        return Truncation(rank, error, error / total if total > 0 else 0.0)
