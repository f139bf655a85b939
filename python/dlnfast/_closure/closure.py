# SPDX-License-Identifier: MIT
"""The invariant subspaces of gradient descent: found, certified, and the complement outside them.

The active subspaces A_0 .. A_L are the smallest with

    W_l(0) A_{l-1} in A_l,  W_l(0)^T A_l in A_{l-1},  Phi A_0 in A_L,  Phi^T A_L in A_0,  S A_0 in A_0 .

Gradient descent and heavy ball keep them for ever. They are useful where they are small and where nothing
but scalars happens outside: every layer acts on the complement as a multiple of an isometry, and these
multiples follow scalar recursions. Cases 1 and 2 of Yaras et al., arXiv 2306.01154 (square layers with a
target of rank r, or with a wide last layer) are two of the settings in which this holds.
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
from .certificate import Assumptions, Check, Family, Residuals, shorten
from .complement import Outside, spans_outside
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
from .growth import LARGEST_GROWTH, LEAST_LIMIT, Growth
from .sampled import SampledBases
from .subspaces import Closure, factors_within

#: ``engine="auto"`` takes the reduced engine when the active dimensions are at most this share of the width.
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
        Its target and input_gram.
    weights : list of ndarray, or ImplicitWeights
        ``W_1(0), .., W_L(0)``, all float64 or all float32; or their law, of which just what the closure
        needs is revealed.
    largest_share : float
        Growth ends when an active dimension exceeds this share of the largest width. (``train`` with
        ``engine="reduced"`` takes any share where only the rank of the target makes it large.)

    Returns
    -------
    Closure
        With ``holds`` False, and the reasons in ``report()``, where there is no small closure.

    Raises
    ------
    ShapeError, TypeError
        For layers that do not fit each other or the problem, and of two precisions.
    ValueError
        For a share that is not above 0.

    Notes
    -----
    The seeds are the row and column spaces of Phi; every new direction is sent through the layer above, the
    layer below (transposed) and S, and what is new in the images is added by a rank-revealing
    orthogonalisation. A wide last layer, or a narrow first one, that is no multiple of an isometry is taken
    in as a whole. 8 L d^2 a flops for active dimension a, no d x d temporary, no d x d decomposition.

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
    """Return what `closure` does, of weights that were checked."""
    if isinstance(weights, ImplicitWeights):
        return _closure_of_law(problem, weights, largest_share)
    widths = tuple(widths_of(weights))
    limit = int(largest_share * max(widths))
    if problem.rank_exceeds(limit):
        return _not_closed(problem, weights, (0,) * len(widths), limit, rank_exceeds=True)
    space = _attempt(problem, weights, limit, ())
    if not space.holds and problem.gram_eigen is not None:
        # Few samples: whatever S is, nothing leaves its range. To take all of it in is more than is needed
        # where S has few eigenvalues, and less subject to rounding where it has many.
        values, vectors = problem.gram_eigen
        inputs = vectors[:, values > gram_resolution(problem.dim_in) * values[-1]]
        if inputs.shape[1] <= limit:
            second = _attempt(problem, weights, limit, inputs)
            space = second if second.holds else space
    return space


def _attempt(problem: Problem, weights: Sequence[FloatArray], limit: int, inputs: npt.ArrayLike) -> Closure:
    """Grow the subspaces from the target, and from `inputs` at the input, and see what is outside."""
    growth = Growth(problem, weights, limit, np.asarray(inputs))
    if not growth.closes():
        return _not_closed(problem, weights, growth.dims, limit)
    rest = Outside(problem, weights, growth)
    for end in rest.ends_to_capture():
        # A wide last layer, or a narrow first one, may be anything if it is active as a whole.
        growth.capture(end)
        if not growth.closes():
            return _not_closed(problem, weights, growth.dims, limit)
        rest = Outside(problem, weights, growth)
    return _closed(problem, weights, growth.bases(), rest)


def _closure_of_law(problem: Problem, law: ImplicitWeights, largest_share: float) -> Closure:
    """Return the closure of layers that are revealed just as far as it needs: O(L r^3), at any width."""
    widths = law.widths
    checks = [check_widths(widths), check_white(problem)]
    # Without a bulge only a high rank makes a closure large, and there is no dense engine to fall back to.
    limit = int((1.0 if checks[0].holds else largest_share) * max(widths))
    nothing = np.empty((0, 0), dtype=law.dtype)
    dims: tuple[int, ...] = (0,) * len(widths)
    if problem.input_gram is None and not problem.rank_exceeds(limit):
        factors = problem.target_factors()
        seeds = 2 * factors.rank
        bound = min(limit, max(LARGEST_GROWTH * seeds, LEAST_LIMIT))
        ends = [min(max(bound, d), max(bound, limit)) if d <= limit else bound for d in widths]
        found = law.close(factors.V, factors.U, ends)
        dims = found.dims
        spans = spans_outside([d - a for d, a in zip(widths, dims, strict=True)], law.scales)
        if found.closed and spans is not None:
            last = len(law.scales)
            families = tuple(
                Family(first, end, m, float((first, end) == (1, last)), law.scales[first - 1 : end])
                for first, end, m in spans
            )
            text = (
                f"the layers are multiples of isometries by their law; {shorten(dims)} of {shorten(widths)}"
            )
            checks[0] = Check("shapes", 0.0, 0.0, f"widths {shorten(widths)}: no obstacle", SHAPE_REMEDY)
            checks.append(check_target(problem, max(dims)))
            checks.append(Check("closure", 0.0, 0.0, f"{text} dimensions are active", ""))
            target = (found.left * factors.s) @ found.right.T
            return Closure(
                dims=dims,
                bases=SampledBases(law, dims),
                cores=tuple(
                    np.ascontiguousarray(eps * core_, dtype=law.dtype)
                    for eps, core_ in zip(law.scales, found.cores, strict=True)
                ),
                target=np.ascontiguousarray(target, dtype=law.dtype),
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
            remedy="implicit layers need white inputs, a target of low rank and widths without a bulge: mend "
            "what fails above, or draw the layers (implicit=False)",
        )
    )
    measured = Assumptions(tuple(checks), dims, widths)
    return Closure(dims, (), (), nothing, None, None, None, (), None, measured)


def _closed(
    problem: Problem, weights: Sequence[FloatArray], bases: list[FloatArray], rest: Outside
) -> Closure:
    growth = rest.growth
    checks = [check_shapes_outside(rest.widths, rest.spans() is None), check_gram(problem, rest.gram_mixes)]
    for layer, (rho, departure) in enumerate(zip(rest.rho, rest.departures, strict=True), start=1):
        if min(rest.dims[layer - 1], rest.dims[layer]) == 0:
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
        forward = max(forward, _outside(image, above, inside) / norm)
        back = multiply(weight, above, transpose_a=True)
        backward = max(backward, _outside(back, below, below.T @ back) / norm)
    first, last = bases[0], bases[-1]
    image, back = _times_target(problem, first), _times_target(problem, last, transpose=True)
    target, size = last.T @ image, max(float(np.linalg.norm(image)), np.finfo(np.float64).tiny)
    residuals = [_outside(image, last, target) / size, _outside(back, first, first.T @ back) / size]
    gram = None
    outside_gram = 0.0
    if growth.gram is not None:
        image = multiply(growth.gram, first)
        gram = first.T @ image
        outside_gram = _outside(image, first, gram) / growth.gram_norm
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
        families=rest.families(),
        residuals=found,
        assumptions=Assumptions(tuple(checks), dims, widths),
    )


def _not_closed(
    problem: Problem,
    weights: Sequence[FloatArray],
    dims: tuple[int, ...],
    limit: int,
    rank_exceeds: bool = False,
) -> Closure:
    """Return a closure without bases, with every condition that is broken."""
    widths = tuple(widths_of(weights))
    checks = [check_widths(widths), check_white(problem)]
    checks += [check_rotation(weight, layer) for layer, weight in enumerate(weights, start=1)]
    checks.append(check_target(problem, limit, rank_exceeds))
    reached = (
        "the target's rank alone is beyond that" if rank_exceeds else f"{shorten(dims)} had been reached"
    )
    checks.append(
        Check(
            name="closure",
            measured=float(max(*dims, limit + 1)),
            limit=float(limit),
            text=f"the active subspaces of widths {shorten(widths)} do not close within {limit} dimensions "
            f"({reached})",
            remedy='mend what fails above, if anything, take a target of lower rank, or use engine="dense"',
        )
    )
    nothing = np.empty((0, 0), dtype=weights[0].dtype)
    measured = Assumptions(tuple(checks), dims, widths)
    return Closure(dims, (), (), nothing, None, None, None, (), None, measured)


def _outside(image: FloatArray, basis: FloatArray, inside: FloatArray) -> float:
    """Return the largest norm of a column's part outside the span of the basis."""
    rest = image - basis @ inside
    unit = float(np.abs(rest).max(initial=0.0)) or 1.0
    return unit * float(np.linalg.norm(rest / unit, axis=0).max(initial=0.0))


def _times_target(problem: Problem, block: FloatArray, *, transpose: bool = False) -> FloatArray:
    """Return Phi (or Phi^T) times a thin block."""
    if isinstance(problem.target, LowRank):
        factors = problem.target
        left, s, right = (np.asarray(part, dtype=block.dtype) for part in (factors.U, factors.s, factors.V))
        if transpose:
            left, right = right, left
        return np.asarray((left * s) @ (right.T @ block))
    return multiply(np.asarray(problem.target, dtype=block.dtype), block, transpose_a=transpose)
