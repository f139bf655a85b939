# SPDX-License-Identifier: MIT
"""The conditions of a reduced run: each function measures one and returns a `Check`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .._problem.data import distance_from_identity
from .._problem.problem import Problem
from .._support.arrays import FloatArray, widths_of
from .certificate import ERROR_PER_DEPARTURE, ERROR_PER_NOISE, Check, Residuals, shorten
from .isometry import measure_isometry, rounding_tolerance


def satisfies_all_but_rank(problem: Problem, weights: Sequence[FloatArray]) -> bool:
    """Return whether inputs, shapes and layers meet the conditions, so that only a high rank can fail."""
    widths = tuple(widths_of(weights))
    checks = [check_widths(widths), check_white(problem)]
    layers = list(enumerate(weights, start=1))
    if widths[-1] < widths[-2]:
        layers.pop()  # a wide last layer need not be an isometry: it may be active as a whole
    checks += [check_rotation(weight, layer) for layer, weight in layers]
    return all(check.holds for check in checks)


def check_shapes_outside(widths: Sequence[int], bulge: bool) -> Check:
    """Check that the dimensions of the complement do not rise and fall again."""
    return Check(
        name="shapes",
        measured=float(bulge),
        limit=0.0,
        text=f"widths {shorten(widths)}: "
        + (
            "outside the active subspaces the layers widen and narrow again"
            if bulge
            else "the layers outside the active subspaces fit one another"
        ),
        remedy=SHAPE_REMEDY,
    )


SHAPE_REMEDY = (
    "give hidden layers the width of the input or of the output, without a bulge between them; "
    'or use engine="dense"'
)


def check_widths(widths: Sequence[int]) -> Check:
    """Check that the widths do not rise and fall again."""
    steps = np.diff(widths)
    rising, falling = np.flatnonzero(steps > 0), np.flatnonzero(steps < 0)
    bulge = bool(len(rising) and len(falling) and rising[0] < falling[-1])
    finding = "a bulge: they widen and narrow again" if bulge else "no bulge"
    return Check("shapes", float(bulge), 0.0, f"widths {shorten(widths)}: {finding}", SHAPE_REMEDY)


def check_gram(problem: Problem, mixes: bool) -> Check:
    """Check that S does not mix directions of the complement that end in different layers."""
    if problem.input_gram is None:
        return check_white(problem)
    text = (
        "input_gram (S) may differ from the identity here: its residual outside the subspace is listed below"
    )
    if mixes:
        text = "input_gram (S) is not the identity, and mixes directions that end in different layers"
    return Check("whitened inputs", float(mixes), 0.0, text, _WHITE_REMEDY)


_WHITE_REMEDY = 'whiten the inputs: Problem.from_data(..., whiten="zca"); or use engine="dense"'


def check_white(problem: Problem) -> Check:
    """Check that S = I."""
    if problem.input_gram is None:
        error = 0.0 if problem.whitening is None else problem.whitening.error
        text = f"input_gram (S) is the identity (error {error:.1e})"
        return Check("whitened inputs", 0.0, 0.0, text, "", ERROR_PER_DEPARTURE * error)
    distance = distance_from_identity(problem.input_gram)
    return Check(
        name="whitened inputs",
        measured=distance,
        limit=0.0,
        text=f"input_gram (S) is not the identity: ||S - I||_F / sqrt(d_x) = {distance:.2e}",
        remedy=_WHITE_REMEDY,
        expected_error=min(1.0, ERROR_PER_DEPARTURE * distance),
    )


def check_active_layer(layer: int) -> Check:
    """Return the condition of a layer, counted from 1, without a complement: it always holds."""
    text = f"weights[{layer - 1}] (W_{layer}) is active as a whole"
    return Check(f"rotation of layer {layer}", 0.0, 0.0, text, "")


def check_rotation(weight: FloatArray, layer: int) -> Check:
    """Check that a layer, counted from 1, is a multiple of an isometry."""
    tall = weight.shape[0] >= weight.shape[1]
    empty = np.empty((0, weight.shape[1] if tall else weight.shape[0]), dtype=weight.dtype)
    rho, departure = measure_isometry(weight, layer, tall, empty, 0.0)
    return check_isometry(layer, rho, departure, weight.dtype)


def check_isometry(layer: int, rho: float, departure: float, dtype: npt.DTypeLike) -> Check:
    """Check that a layer, counted from 1, is a multiple of an isometry, from a measured departure."""
    # The error of a reduced run is linear in the departure.
    limit = rounding_tolerance(dtype)
    finding = "is" if departure <= limit else "is not"
    return Check(
        name=f"rotation of layer {layer}",
        measured=departure,
        limit=limit,
        text=f"weights[{layer - 1}] (W_{layer}) {finding} a scaled isometry: "
        + (f"||W^T W / eps^2 - I||_F / sqrt(d) = {departure:.1e}" if rho > 0 else "it is zero"),
        remedy='start from dln.orthogonal(...); or use engine="dense"',
        expected_error=min(1.0, ERROR_PER_DEPARTURE * departure),
    )


def check_target(problem: Problem, limit: int, rank_exceeds: bool = False) -> Check:
    """Check that the rank of the target is at most `limit`; `rank_exceeds` says that it is not."""
    name, smaller = "rank of the target", min(problem.target.shape)
    remedy = (
        "train on a truncated target, Problem(dln.LowRank(U, s, V)): the weights change by about "
        f'{ERROR_PER_NOISE} times the norm of the truncated part; or use engine="dense"'
    )
    if rank_exceeds:
        text = f"target (Phi) has rank above {limit} of {smaller}"
        return Check(name, 1.0, 0.0, text, remedy)
    rank, cut = problem.target_factors().rank, problem.target_cut
    gap = "exactly" if cut is None else f"the next singular value is {cut:.1e} of the first"
    text = f"target (Phi) has rank {rank} of {smaller}, {gap}"
    return Check(name, 0.0, 0.0, text, remedy, ERROR_PER_NOISE * (cut or 0.0))


def check_inclusions(found: Residuals, tolerance: float, dims: Sequence[int], widths: Sequence[int]) -> Check:
    """Check that the residuals of the inclusions of active subspaces are rounding errors."""
    worst = max(found)
    return Check(
        name="closure",
        measured=worst,
        limit=64 * tolerance,
        text=f"the active subspaces have {shorten(dims)} of {shorten(widths)} dimensions: the largest "
        f"residual of an inclusion is {worst:.1e}",
        remedy="the subspaces need directions that are below rounding errors: whiten the inputs, or use "
        'engine="dense"',
        expected_error=0.0 if worst <= tolerance else min(1.0, ERROR_PER_DEPARTURE * worst),
    )
