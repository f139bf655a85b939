# SPDX-License-Identifier: MIT
"""`Family`: directions outside the active subspaces that share one scalar per layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Directions outside the active subspaces on which each layer acts as one scalar times an isometry.

    Attributes
    ----------
    first, last : int
        First and last layer, counted from 1, through which the directions run.
    multiplicity : int
        Number of directions.
    coupling : float
        Eigenvalue s of S on the directions if they run through all layers: their scalars follow
        ``rho_l <- rho_l (1 - eta_l lambda_l - c s eta_l prod_{k != l} rho_k^2)``. 0 otherwise: the gradient
        on them is 0, and only weight decay changes their scalars.
    rho : tuple of float
        rho_l(0) for l = first .. last.
    """

    first: int
    last: int
    multiplicity: int
    coupling: float
    rho: tuple[float, ...]
