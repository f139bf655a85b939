# SPDX-License-Identifier: MIT
"""`closure`: the invariant subspaces of gradient descent, and whether the reduced model is exact.

The active subspaces A_0 .. A_L are the smallest with

    W_l(0) A_{l-1} in A_l,  W_l(0)^T A_l in A_{l-1},  Phi A_0 in A_L,  Phi^T A_L in A_0,  S A_0 in A_0 .

They are invariant under gradient descent and heavy ball. The reduced model is exact if, in addition, every
layer acts on the complement as a multiple of an isometry: these multiples follow scalar recursions. It is
fast if the subspaces are small. Cases 1 and 2 of Yaras et al., arXiv 2306.01154 (square layers with a target
of rank r, or with a wide last layer) are two of the settings with both properties.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .._problem.data import gram_resolution
from .._problem.low_rank import LowRank
from .._problem.problem import Problem, check_problem
from .._support.arrays import FloatArray, check_scale, widths_of
from .._support.products import multiply
from .._weights.checks import check_initial
from .._weights.implicit import ImplicitWeights
from .certificate import Assumptions, Check, Residuals, shorten
from .complement import MeasuredComplement, find_spans
from .conditions import (
    SHAPE_REMEDY,
    check_active_layer,
    check_gram,
    check_inclusions,
    check_isometry,
    check_rotation,
    check_shapes_outside,
    check_target,
    check_white,
    check_widths,
)
from .family import Family
from .growth import MAX_GROWTH, MIN_LIMIT, Growth
from .sampled import SampledBases
from .subspaces import Closure, factors_within

#: Largest ratio of active dimensions to the width for which ``engine="auto"`` uses the reduced engine.
LARGEST_SHARE = 0.5


def closure(
    problem: Problem,
    weights: Sequence[npt.ArrayLike] | ImplicitWeights,
    *,
    largest_share: float = LARGEST_SHARE,
) -> Closure:
    """Find the active subspaces of a problem and its initial weights.

    Parameters
    ----------
    problem : Problem
        Problem with the target Phi and the Gram matrix S of the inputs.
    weights : list of ndarray, or ImplicitWeights
        ``W_1(0), .., W_L(0)``, all float64 or all float32; or lazily sampled weights, of which only as much
        is sampled as the closure needs.
    largest_share : float
        Largest allowed ratio of an active dimension to the largest width. (``train`` with
        ``engine="reduced"`` allows any ratio if only the rank of the target makes it large.)

    Returns
    -------
    Closure
        If there is no small closure, ``holds`` is False and ``report()`` has the reasons.

    Raises
    ------
    ShapeError, TypeError
        If the layers do not fit one another or the problem, or differ in precision.
    ValueError
        If `largest_share` is not above 0.

    Notes
    -----
    The seeds are the row and column spaces of Phi. Every new direction is mapped by the layer above, by the
    transpose of the layer below and by S, and the new components of the images are added by a rank-revealing
    orthogonalisation. A wide last layer, or a narrow first one, that is not a multiple of an isometry becomes
    active as a whole. Cost: 8 L d^2 a flops for active dimension a, without a d x d temporary or a d x d
    decomposition.

    Yaras et al., arXiv 2306.01154, Theorem 1; arXiv 2406.04112.

    Examples
    --------
    >>> import dlnfast as dln
    >>> problem = dln.low_rank_recovery(dim=30, rank=3)
    >>> space = dln.closure(problem, dln.orthogonal([30] * 4))
    >>> space.dims, space.holds
    ((6, 6, 6, 6), True)
    """
    check_problem(problem)
    share = check_scale(largest_share, "largest_share", strict=True)
    return find_closure(problem, check_initial(weights, problem), largest_share=min(share, 1.0))


@np.errstate(over="ignore", invalid="ignore")
def find_closure(
    problem: Problem,
    weights: Sequence[FloatArray] | ImplicitWeights,
    *,
    largest_share: float = LARGEST_SHARE,
) -> Closure:
    """Find the closure of weights that have been checked; see `closure`."""
    if isinstance(weights, ImplicitWeights):
        return _find_sampled_closure(problem, weights, largest_share)
    widths = tuple(widths_of(weights))
    limit = int(largest_share * max(widths))
    if problem.rank_exceeds(limit):
        return _build_failure(problem, weights, (0,) * len(widths), limit, rank_exceeds=True)
    space = _grow_closure(problem, weights, limit, ())
    if not space.holds and problem.gram_eigen is not None:
        # With few samples, the range of S is small and invariant for any S. Taking all of it as seeds gives
        # larger subspaces than needed if S has few distinct eigenvalues, but smaller rounding errors if it
        # has many.
        values, vectors = problem.gram_eigen
        inputs = vectors[:, values > gram_resolution(problem.dim_in) * values[-1]]
        if inputs.shape[1] <= limit:
            second = _grow_closure(problem, weights, limit, inputs)
            space = second if second.holds else space
    return space


def _grow_closure(
    problem: Problem, weights: Sequence[FloatArray], limit: int, inputs: npt.ArrayLike
) -> Closure:
    """Grow the subspaces from the target and from the seeds `inputs`, and measure the complement."""
    growth = Growth(problem, weights, limit, np.asarray(inputs))
    if not growth.grow():
        return _build_failure(problem, weights, growth.dims, limit)
    complement = MeasuredComplement(problem, weights, growth)
    for end in complement.find_ends_to_include():
        # A wide last layer, or a narrow first one, need not be an isometry if it is active as a whole.
        growth.include_node(end)
        if not growth.grow():
            return _build_failure(problem, weights, growth.dims, limit)
        complement = MeasuredComplement(problem, weights, growth)
    return _build_closure(problem, weights, growth.bases(), complement)


def _find_sampled_closure(problem: Problem, weights: ImplicitWeights, largest_share: float) -> Closure:
    """Return the closure of lazily sampled weights in O(L r^3), at any width."""
    widths = weights.widths
    checks = [check_widths(widths), check_white(problem)]
    # Without a bulge only a high rank makes a closure large. The limit is generous, because the dense engine
    # cannot run lazily sampled weights.
    limit = int((1.0 if checks[0].holds else largest_share) * max(widths))
    empty = np.empty((0, 0), dtype=weights.dtype)
    dims: tuple[int, ...] = (0,) * len(widths)
    if problem.input_gram is None and not problem.rank_exceeds(limit):
        factors = problem.target_factors()
        seeds = 2 * factors.rank
        bound = min(limit, max(MAX_GROWTH * seeds, MIN_LIMIT))
        ends = [min(max(bound, d), max(bound, limit)) if d <= limit else bound for d in widths]
        found = weights.close(factors.V, factors.U, ends)
        dims = found.dims
        spans = find_spans([d - a for d, a in zip(widths, dims, strict=True)], weights.scales)
        if found.closed and spans is not None:
            last = len(weights.scales)
            families = tuple(
                Family(first, end, m, float((first, end) == (1, last)), weights.scales[first - 1 : end])
                for first, end, m in spans
            )
            text = (
                f"the layers are multiples of isometries by their distribution; {shorten(dims)} of "
                f"{shorten(widths)}"
            )
            checks[0] = Check("shapes", 0.0, 0.0, f"widths {shorten(widths)}: no obstacle", SHAPE_REMEDY)
            checks.append(check_target(problem, max(dims)))
            checks.append(Check("closure", 0.0, 0.0, f"{text} dimensions are active", ""))
            target = (found.left * factors.s) @ found.right.T
            return Closure(
                dims=dims,
                bases=SampledBases(weights, dims),
                cores=tuple(
                    np.ascontiguousarray(eps * core, dtype=weights.dtype)
                    for eps, core in zip(weights.scales, found.cores, strict=True)
                ),
                target=np.ascontiguousarray(target, dtype=weights.dtype),
                input_gram=None,
                input_factor=None,
                factor_target=None,
                families=families,
                residuals=None,
                assumptions=Assumptions(tuple(checks), dims, widths),
            )
    checks.append(
        Check(
            name="closure",
            measured=float(limit + 1),
            limit=float(limit),
            text=f"the active subspaces of widths {shorten(widths)} do not close within {limit} dimensions",
            remedy="lazily sampled weights need white inputs, a target of low rank and widths without a "
            "bulge: correct the conditions that fail above, or sample arrays (implicit=False)",
        )
    )
    measured = Assumptions(tuple(checks), dims, widths)
    return Closure(dims, (), (), empty, None, None, None, (), None, measured)


def _build_closure(
    problem: Problem, weights: Sequence[FloatArray], bases: list[FloatArray], complement: MeasuredComplement
) -> Closure:
    """Return the closure of subspaces that have closed, with its residuals and conditions."""
    growth = complement.growth
    bulge = complement.spans() is None
    checks = [check_shapes_outside(complement.widths, bulge), check_gram(problem, complement.gram_mixes)]
    for layer, (rho, departure) in enumerate(
        zip(complement.rho, complement.departures, strict=True), start=1
    ):
        if min(complement.dims[layer - 1], complement.dims[layer]) == 0:
            checks.append(check_active_layer(layer))
        else:
            checks.append(check_isometry(layer, rho, departure, growth.dtype))
    cores = []
    forward = backward = 0.0
    for layer, weight in enumerate(weights):
        below, above, norm = bases[layer], bases[layer + 1], growth.norms[layer] or 1.0
        image = multiply(weight, below)
        inside = above.T @ image
        cores.append(np.ascontiguousarray(inside))
        forward = max(forward, _outside_norm(image, above, inside) / norm)
        back = multiply(weight, above, transpose_a=True)
        backward = max(backward, _outside_norm(back, below, below.T @ back) / norm)
    first, last = bases[0], bases[-1]
    image, back = _multiply_target(problem, first), _multiply_target(problem, last, transpose=True)
    target, size = last.T @ image, max(float(np.linalg.norm(image)), np.finfo(np.float64).tiny)
    residuals = [_outside_norm(image, last, target) / size, _outside_norm(back, first, first.T @ back) / size]
    gram = None
    outside_gram = 0.0
    if growth.gram is not None:
        image = multiply(growth.gram, first)
        gram = first.T @ image
        outside_gram = _outside_norm(image, first, gram) / growth.gram_norm
        gram = np.ascontiguousarray((gram + gram.T) / 2)
    found = Residuals(forward, backward, residuals[0], residuals[1], outside_gram)
    dims, widths = growth.dims, tuple(growth.widths)
    checks.append(check_target(problem, max(dims)))
    checks.append(check_inclusions(found, growth.tolerance, dims, widths))
    factor, factor_target = factors_within(problem, first, last)
    return Closure(
        dims=dims,
        bases=tuple(bases),
        cores=tuple(cores),
        target=np.ascontiguousarray(target),
        input_gram=gram,
        input_factor=factor,
        factor_target=factor_target,
        families=complement.families(),
        residuals=found,
        assumptions=Assumptions(tuple(checks), dims, widths),
    )


def _build_failure(
    problem: Problem,
    weights: Sequence[FloatArray],
    dims: tuple[int, ...],
    limit: int,
    rank_exceeds: bool = False,
) -> Closure:
    """Return a closure without bases, with the conditions that may be the reason."""
    widths = tuple(widths_of(weights))
    checks = [check_widths(widths), check_white(problem)]
    checks += [check_rotation(weight, layer) for layer, weight in enumerate(weights, start=1)]
    checks.append(check_target(problem, limit, rank_exceeds))
    reached = (
        "the rank of the target alone exceeds it" if rank_exceeds else f"they have grown to {shorten(dims)}"
    )
    checks.append(
        Check(
            name="closure",
            measured=float(max(*dims, limit + 1)),
            limit=float(limit),
            text=f"the active subspaces of widths {shorten(widths)} do not close within {limit} dimensions "
            f"({reached})",
            remedy="correct the conditions that fail above, lower the rank of the target, or use "
            'engine="dense"',
        )
    )
    empty = np.empty((0, 0), dtype=weights[0].dtype)
    measured = Assumptions(tuple(checks), dims, widths)
    return Closure(dims, (), (), empty, None, None, None, (), None, measured)


def _outside_norm(image: FloatArray, basis: FloatArray, inside: FloatArray) -> float:
    """Return the largest norm of the component of a column outside the span of the basis."""
    residual = image - basis @ inside
    unit = float(np.abs(residual).max(initial=0.0)) or 1.0
    return unit * float(np.linalg.norm(residual / unit, axis=0).max(initial=0.0))


def _multiply_target(problem: Problem, block: FloatArray, *, transpose: bool = False) -> FloatArray:
    """Return Phi (or Phi^T) times a thin block."""
    if isinstance(problem.target, LowRank):
        factors = problem.target
        left, s, right = (np.asarray(part, dtype=block.dtype) for part in (factors.U, factors.s, factors.V))
        if transpose:
            left, right = right, left
        return np.asarray((left * s) @ (right.T @ block))
    return multiply(np.asarray(problem.target, dtype=block.dtype), block, transpose_a=transpose)
