# SPDX-License-Identifier: MIT
"""`Closure`: the active subspaces of a problem and its initial weights, as `closure` finds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .._problem.problem import Problem
from .._support.arrays import FloatArray
from .certificate import Assumptions, Residuals, shorten
from .family import Family


@dataclass(frozen=True, repr=False)
class Closure:
    """The active subspaces of a problem and its initial weights, and the families of their complement.

    Attributes
    ----------
    dims : tuple of int
        Dimensions a_0 .. a_L.
    bases : sequence of ndarray
        Bases A_l, d_l x a_l, with orthonormal columns. Empty if the subspaces did not close.
    cores : tuple of ndarray
        ``A_l^T W_l(0) A_{l-1}``.
    target : ndarray, shape (a_L, a_0)
        ``A_L^T Phi A_0``.
    input_gram : ndarray or None
        ``A_0^T S A_0``; None if S = I.
    input_factor, factor_target : ndarray or None
        F and G with ``F F^T = A_0^T S A_0`` and ``G F^T = A_L^T Phi A_0``, of at most a_0 columns; None if
        S = I.
    families : tuple of Family
        Families of the whole complement.
    residuals : Residuals or None
        Relative residuals of the five inclusions.
    assumptions : Assumptions
        The measured conditions.
    """

    dims: tuple[int, ...]
    bases: Sequence[FloatArray]
    cores: tuple[FloatArray, ...]
    target: FloatArray
    input_gram: FloatArray | None
    input_factor: FloatArray | None
    factor_target: FloatArray | None
    families: tuple[Family, ...]
    residuals: Residuals | None
    assumptions: Assumptions = field(repr=False)

    @property
    def holds(self) -> bool:
        """Whether a run inside these subspaces is exact."""
        return self.assumptions.hold

    def __repr__(self) -> str:
        """Return the dimensions, the widths, and whether the reduced model is exact."""
        return f"Closure(dims={self.dims}, widths={self.assumptions.widths}, holds={self.holds})"

    def report(self) -> str:
        """Return a text with each condition, its measured value, and a remedy if it does not hold."""
        found = self.assumptions
        if found.hold:
            lines = [found.describe_dims()]
        elif self.residuals is None:
            lines = ["no small invariant subspaces were found"]
        else:
            lines = [f"subspaces of dimensions {shorten(self.dims)} were found, but a condition fails"]
        for check in found.checks:
            lines.append(f"{'holds' if check.holds else 'FAILS'}  {check.text}")
            if not check.holds:
                lines.append(f"       -> {check.remedy}")
        if self.residuals is not None:
            pairs = zip(Residuals._fields, self.residuals, strict=True)
            lines.append("residuals: " + ", ".join(f"{name} {value:.1e}" for name, value in pairs))
        for family in self.families:
            recursion = "which only weight decay changes"
            if family.coupling:
                recursion = f"with coupling s = {family.coupling:g}"
            span = f"layers {family.first} to {family.last}"
            lines.append(
                f"complement: one singular value of multiplicity {family.multiplicity} in {span}, {recursion}"
            )
        if found.hold and found.expected_error > 0:
            lines.append(f"expected relative error of a reduced run: {found.expected_error:.1e}")
        return "\n".join(lines)


def factors_within(
    problem: Problem, first: FloatArray, last: FloatArray
) -> tuple[FloatArray, FloatArray] | tuple[None, None]:
    """Return `Closure.input_factor` and `Closure.factor_target` for the bases A_0 and A_L."""
    if problem.input_factor is None or problem.factor_target is None:
        return None, None
    factor, target = first.T @ problem.input_factor, last.T @ problem.factor_target
    if factor.shape[1] > len(factor):
        # ||W F - G|| = ||(W F - G) Q|| up to a constant that does not depend on W.
        frame, triangle = np.linalg.qr(factor.T)
        factor, target = triangle.T, target @ frame
    dtype = first.dtype
    return np.ascontiguousarray(factor, dtype=dtype), np.ascontiguousarray(target, dtype=dtype)
