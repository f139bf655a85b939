# SPDX-License-Identifier: MIT
"""The conditions of a reduced run, as `Check`s with their text and remedy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .._problem.data import distance_from_identity
from .._problem.problem import Problem
from .._support.arrays import FloatArray, widths_of
from .certificate import ERROR_PER_DEPARTURE, ERROR_PER_NOISE, Check, Residuals, shorten
from .isometry import measure_isometry, rounding_tolerance


def breaks_no_assumption(problem: Problem, weights: Sequence[FloatArray]) -> bool:
    """Return whether inputs, shapes and layers are such that only a high rank can make a closure large."""
    widths = tuple(widths_of(weights))
    checks = [check_widths(widths), check_white(problem)]
    layers = list(enumerate(weights, start=1))
    if widths[-1] < widths[-2]:
        layers.pop()  # a wide last layer may be anything
    checks += [check_rotation(weight, layer) for layer, weight in layers]
    return all(check.holds for check in checks)


def check_shapes_outside(widths: Sequence[int], bulge: bool) -> Check:
    return Check(
        name="shapes",
        measured=float(bulge),
        limit=0.0,
        text=f"widths {shorten(widths)}: "
        + (
            "outside the active subspaces the layers widen and narrow again"
            if bulge
            else "the layers outside the active subspaces fit into each other"
        ),
        remedy=SHAPE_REMEDY,
    )


SHAPE_REMEDY = (
    "give hidden layers the width of the input or of the output, without a bulge between them; "
    'or use engine="dense"'
)


def check_widths(widths: Sequence[int]) -> Check:
    steps = np.diff(widths)
    rising, falling = np.flatnonzero(steps > 0), np.flatnonzero(steps < 0)
    bulge = bool(len(rising) and len(falling) and rising[0] < falling[-1])
    finding = "a bulge: they widen and narrow again" if bulge else "no bulge"
    return Check("shapes", float(bulge), 0.0, f"widths {shorten(widths)}: {finding}", SHAPE_REMEDY)


def check_gram(problem: Problem, mixes: bool) -> Check:
    if problem.input_gram is None:
        return check_white(problem)
    text = (
        "input_gram (S) may differ from the identity here: its part that leaves the subspace is given below"
    )
    if mixes:
        text = "input_gram (S) is not the identity, and mixes directions that end in different layers"
    return Check("whitened inputs", float(mixes), 0.0, text, _WHITE_REMEDY)


_WHITE_REMEDY = 'whiten the inputs: Problem.from_data(..., whiten="zca"); or use engine="dense"'


def check_white(problem: Problem) -> Check:
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
    text = f"weights[{layer - 1}] (W_{layer}) is active as a whole"
    return Check(f"rotation of layer {layer}", 0.0, 0.0, text, "")


def check_rotation(weight: FloatArray, layer: int) -> Check:
    tall = weight.shape[0] >= weight.shape[1]
    nothing = np.empty((0, weight.shape[1] if tall else weight.shape[0]), dtype=weight.dtype)
    rho, departure = measure_isometry(weight, layer, tall, nothing, 0.0)
    return check_isometry(layer, rho, departure, weight.dtype)


def check_isometry(layer: int, rho: float, departure: float, dtype: npt.DTypeLike) -> Check:
    # What a departure does to a run is linear in it.
    limit = rounding_tolerance(dtype)
    finding = "is" if departure <= limit else "is not"
    return Check(
        name=f"rotation of layer {layer}",
        measured=departure,
        limit=limit,
        text=f"weights[{layer - 1}] (W_{layer}) {finding} a scaled rotation: "
        + (f"||W^T W / eps^2 - I||_F / sqrt(d) = {departure:.1e}" if rho > 0 else "it is zero"),
        remedy='start from dln.orthogonal(...); or use engine="dense"',
        expected_error=min(1.0, ERROR_PER_DEPARTURE * departure),
    )


def check_target(problem: Problem, limit: int, rank_exceeds: bool = False) -> Check:
    name, smaller = "rank of the target", min(problem.target.shape)
    remedy = (
        "train on a truncated target, Problem(dln.LowRank(U, s, V)): the weights move by about "
        f'{ERROR_PER_NOISE} times the norm of what is cut off; or use engine="dense"'
    )
    if rank_exceeds:
        text = f"target (Phi) has rank above {limit} of {smaller}"
        return Check(name, 1.0, 0.0, text, remedy)
    rank, cut = problem.target_factors().rank, problem.target_cut
    gap = "exactly" if cut is None else f"the next singular value is {cut:.1e} of the first"
    text = f"target (Phi) has rank {rank} of {smaller}, {gap}"
    return Check(name, 0.0, 0.0, text, remedy, ERROR_PER_NOISE * (cut or 0.0))


def check_inclusions(found: Residuals, tolerance: float, dims: Sequence[int], widths: Sequence[int]) -> Check:
    worst = max(found)
    return Check(
        name="closure",
        measured=worst,
        limit=64 * tolerance,
        text=f"the active subspaces end at {shorten(dims)} of {shorten(widths)} dimensions: the largest "
        f"residual of an inclusion is {worst:.1e}",
        remedy="the subspaces grow by directions that rounding hides: whiten the inputs, or use "
        'engine="dense"',
        expected_error=0.0 if worst <= tolerance else min(1.0, ERROR_PER_DEPARTURE * worst),
    )
