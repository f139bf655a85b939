# SPDX-License-Identifier: MIT
"""Truncation of products of factors by the singular values of the product."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._support.arrays import check_count, check_scale
from .updates import compute_thin_svd


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
            raise ValueError(f"{caller} needs a rank or a tolerance")
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
        # tails[k] is the error at rank k.
        tails = torch.cat([values.square().flip(0).cumsum(0).flip(0), values.new_zeros(1)]).sqrt()
        rank = len(values)
        if self.tolerance is not None:
            rank = int(torch.nonzero(tails <= self.tolerance * tails[0])[0])
        rank = max(1, rank if self.rank is None else min(rank, self.rank))
        total, error = float(tails[0]), float(tails[rank])
        truncation = Truncation(rank, error, error / total if total > 0 else 0.0)
        return truncation, (u[:, :rank], values[:rank], vt[:rank])
