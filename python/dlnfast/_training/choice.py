# SPDX-License-Identifier: MIT
"""The choice between the reduced and the dense engine, with its reasons."""

from __future__ import annotations

from .._closure.certificate import Assumptions, Certificate
from .._closure.closure import LARGEST_SHARE, find_closure
from .._closure.conditions import satisfies_all_but_rank
from .._closure.subspaces import Closure
from .._problem.kinds import AnyProblem
from .._problem.observations import Observations
from .._problem.problem import Problem
from .._problem.samples import SampleProblem
from .._support.errors import AssumptionError
from .._weights.checks import require_arrays
from .._weights.implicit import ImplicitWeights
from .request import Weights


def choose_engine(engine: str, problem: AnyProblem, weights: Weights) -> tuple[Certificate, Closure | None]:
    """Choose between the reduced and the dense engine.

    Parameters
    ----------
    engine : {"auto", "reduced", "dense"}
    problem : Problem, Observations or SampleProblem
    weights : list of ndarray, or ImplicitWeights

    Returns
    -------
    tuple of Certificate and Closure
        The engine with its reasons, and the invariant subspaces; None for the dense engine.

    Raises
    ------
    AssumptionError
        If the engine that is asked for cannot do the run.
    TypeError
        If the dense engine is asked for with a `SampleProblem`.
    """
    if isinstance(problem, SampleProblem):
        if engine == "reduced":
            raise AssumptionError(
                f"engine='reduced' does not hold here: {problem.reason_without_closure}; wanted "
                "engine='torch'"
            )
        raise TypeError(
            f"engine is {engine!r}, which reads S = X X^T and Phi = Y X^T only; wanted 'torch' for a "
            f"SampleProblem, whose {problem.loss_name} loss is computed from the samples at every step"
        )
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
        return _choose_for_implicit_weights(engine, problem, weights)
    if engine == "dense":
        return Certificate("dense", "engine='dense' was asked for", None), None
    is_full = engine == "reduced" and satisfies_all_but_rank(problem, weights)
    space = find_closure(problem, weights, largest_share=1.0 if is_full else LARGEST_SHARE)
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
        reason = f'the theorem applies, but engine="reduced" is not faster at this rank: {failure}'
        return Certificate("dense", reason, found), None
    return Certificate("dense", f"the theorem does not apply: {failure}", found), None


def _choose_for_implicit_weights(
    engine: str, problem: Problem, weights: ImplicitWeights
) -> tuple[Certificate, Closure]:
    if engine == "dense":
        raise AssumptionError(
            "engine='dense' needs whole layers, but weights are lazily sampled: draw them with "
            "dln.orthogonal(..., implicit=False)"
        )
    space = find_closure(problem, weights)
    found = space.assumptions
    if not found.hold:
        raise AssumptionError(_assumption_text(found))
    return Certificate(
        "reduced", f"the closure holds for lazily sampled weights, {found.describe_dims()}", found
    ), space


def _assumption_text(assumptions: Assumptions) -> str:
    lines = []
    for check in assumptions.failures:
        notes = []
        if 0 < check.limit < 1:  # a tolerance; a limit of 0 or of a dimension is in the text
            notes.append(f"limit {check.limit:.1e}")
        if check.expected_error:
            notes.append(f"a reduced run would be wrong by about {check.expected_error:.1e}")
        lines.append(check.text + (f" ({'; '.join(notes)})" if notes else "") + f"; {check.remedy}")
    return "engine='reduced' does not hold here. " + " | ".join(lines)
