# SPDX-License-Identifier: MIT
"""The engine of a run: chosen, with the reasons."""

from __future__ import annotations

from dataclasses import replace

from .._closure.certificate import Assumptions, Certificate
from .._closure.closure import LARGEST_SHARE, find_closure
from .._closure.conditions import satisfies_all_but_rank
from .._closure.subspaces import Closure
from .._problem.observations import Observations
from .._problem.problem import Problem
from .._support.arrays import FloatArray, scale_of
from .._support.errors import AssumptionError
from .._weights.checks import require_arrays
from .._weights.implicit import ImplicitWeights
from .rates import rate_caution
from .request import Request

ADAPTIVE_RATE = 'learning_rate is adaptive, which is for the dense engine; wanted numbers or "auto"'


def _choose_implicit(engine: str, problem: Problem, law: ImplicitWeights) -> tuple[Certificate, Closure]:
    if engine == "dense":
        raise AssumptionError(
            "engine='dense' needs whole layers, but weights are a law: draw them with "
            "dln.orthogonal(..., implicit=False)"
        )
    space = find_closure(problem, law)
    found = space.assumptions
    if not found.hold:
        raise AssumptionError(_assumption_text(found))
    return Certificate("reduced", f"the closure holds in law, {found.describe_dims()}", found), space


def choose_engine(
    engine: str, problem: Problem | Observations, weights: list[FloatArray] | ImplicitWeights
) -> tuple[Certificate, Closure | None]:
    """Return which engine runs and why, with the active subspaces where it is the reduced one."""
    if isinstance(problem, Observations):
        if engine == "reduced":
            raise AssumptionError(
                "engine='reduced' does not hold here: of a matrix that is known in part no small subspace is "
                "invariant; train_compressed approximates"
            )
        require_arrays(weights)
        return Certificate(
            "dense", f"the matrix is known through {problem.n_observations} observations"
        ), None
    if isinstance(weights, ImplicitWeights):
        return _choose_implicit(engine, problem, weights)
    if engine == "dense":
        return Certificate("dense", "engine='dense' was asked for", None), None
    filling = engine == "reduced" and satisfies_all_but_rank(problem, weights)
    space = find_closure(problem, weights, largest_share=1.0 if filling else LARGEST_SHARE)
    found = space.assumptions
    if engine == "reduced" and not found.hold:
        raise AssumptionError(_assumption_text(found))
    if engine == "auto" and min(found.dims) == 0 < max(found.dims):
        # Not wrong, but a reduced run would have no singular vectors to show in some layers.
        return Certificate(
            "dense", "layers of zeros: nothing reaches all of them from the target", found
        ), None
    if found.hold:
        return Certificate("reduced", f"the closure holds, {found.describe_dims()}", found), space
    failure = found.failures[0].text
    if found.failures[0].name == "closure" and satisfies_all_but_rank(problem, weights):
        # Exact all the same, but not faster.
        reason = f'little to gain with a target of this rank: {failure}; engine="reduced" takes more'
        return Certificate("dense", reason, found), None
    return Certificate("dense", f"the theorem does not apply: {failure}", found), None


def with_caution(certificate: Certificate, request: Request) -> Certificate:
    """Add to the reason that rounding may grow, where the rate is above what the minimum bears."""
    if request.steps < 2 or request.adaptive is not None:
        return certificate
    weights = request.weights
    caution = rate_caution(
        request.problem,
        weights.scales if isinstance(weights, ImplicitWeights) else [scale_of(w) for w in weights],
        request.learning_rate,
        request.momentum,
        decomposed=certificate.engine == "reduced",  # which has decomposed the target, however large
    )
    return replace(certificate, reason=f"{certificate.reason}{caution}") if caution else certificate


def _assumption_text(assumptions: Assumptions) -> str:
    lines = [
        f"{check.text} (limit {check.limit:.1e}"
        + (
            f"; a reduced run would be wrong by about {check.expected_error:.1e}"
            if check.expected_error
            else ""
        )
        + f"); {check.remedy}"
        for check in assumptions.failures
    ]
    return "engine='reduced' does not hold here. " + " | ".join(lines)
