# SPDX-License-Identifier: MIT
"""Engines: the interface, the reduced and the dense engine, and the choice between them.

An engine checks whether it can do a run, with reasons in a `Certificate`, and prepares a job that does it.
`registry.ENGINES` lists all of them by name; `load_engine` imports the one that a run asks for.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar, Final

from .._closure.certificate import Assumptions, Certificate
from .._closure.closure import LARGEST_SHARE, Closure, find_closure
from .._closure.conditions import breaks_no_assumption
from .._problem.observations import Observations
from .._problem.problem import Problem
from .._support.arrays import FloatArray
from .._support.errors import AssumptionError
from .._weights.checks import require_arrays
from .._weights.implicit import ImplicitWeights
from .jobs import DenseJob, ReducedJob, ResumableJob
from .options import Options
from .rates import rate_caution
from .registry import ENGINES, split_engine
from .request import Request, make_request

ADAPTIVE_RATE: Final = 'learning_rate is adaptive, which is for the dense engine; wanted numbers or "auto"'

Weights = list[FloatArray] | ImplicitWeights


# ---------------------------------------------------------------------------------------------- interface


class Engine(ABC):
    """One way to take the steps of a run.

    Attributes
    ----------
    name : str
        Name in `registry.ENGINES`.
    device : str or None
        Device that the engine computes on, for engines that have several.
    space : Closure or None
        Invariant subspaces that the run stays in; None for whole layers.
    """

    name: ClassVar[str]
    device: str | None = None
    space: Closure | None = None

    def __init__(self, device: str = "") -> None:
        """Take the text after the colon of ``"name:device"``, which is empty for most engines."""
        if device:
            raise ValueError(
                f"engine is '{self.name}:{device}'; wanted '{self.name}', as only 'torch' takes a device"
            )

    @abstractmethod
    def check(self, options: Options, problem: Problem | Observations, weights: Weights) -> Certificate:
        """Return the reason for this engine, or raise if it cannot do the run."""

    @abstractmethod
    def prepare(self, request: Request) -> ResumableJob:
        """Return the job that does the run; `check` was called before."""


def load_engine(text: str) -> Engine:
    """Return the engine that ``"name"`` or ``"name:device"`` asks for.

    Raises
    ------
    ModuleNotFoundError
        If the engine needs a package that is not installed.
    ValueError
        If the engine takes no device.
    """
    name, device = split_engine(text)
    module, _, cls = ENGINES[name].partition(":")
    engine: Engine = getattr(importlib.import_module(module), cls)(device)
    return engine


def resolve(
    options: Options, problem: Problem | Observations, weights: Weights
) -> tuple[Engine, Request, Certificate]:
    """Decide everything that depends on problem and weights: the rates and the engine.

    Parameters
    ----------
    options : Options
        Checked options.
    problem : Problem or Observations
    weights : list of ndarray, or ImplicitWeights
        Checked weights.

    Returns
    -------
    tuple of Engine, Request, Certificate
        The engine, its request, and the reasons.
    """
    request = make_request(options, problem, weights)
    engine = load_engine(options.engine)
    certificate = engine.check(options, problem, weights)
    request = replace(request, device=engine.device)
    return engine, request, with_caution(certificate, request)


# ------------------------------------------------------------------------------------------------ engines


class ReducedEngine(Engine):
    """Trains the invariant subspaces only: exact, at a cost independent of the width."""

    name = "reduced"

    def check(self, options: Options, problem: Problem | Observations, weights: Weights) -> Certificate:
        """Return the certificate of the closure, or raise if the closure does not hold."""
        certificate, self.space = choose_engine(self.name, problem, weights)
        if options.adaptive is not None:
            raise ValueError(ADAPTIVE_RATE)
        return certificate

    def prepare(self, request: Request) -> ReducedJob:
        """Return the job inside the invariant subspaces."""
        assert self.space is not None
        return ReducedJob(request, self.space)


class DenseEngine(Engine):
    """Trains whole weight matrices."""

    name = "dense"

    def check(self, options: Options, problem: Problem | Observations, weights: Weights) -> Certificate:
        """Return the certificate; only lazily sampled weights are refused."""
        del options
        return choose_engine(self.name, problem, weights)[0]

    def prepare(self, request: Request) -> DenseJob:
        """Return the job on copies of the weights."""
        return DenseJob(request)


class AutomaticEngine(Engine):
    """The reduced engine where it is exact and smaller than the network, otherwise the dense engine."""

    name = "auto"

    def check(self, options: Options, problem: Problem | Observations, weights: Weights) -> Certificate:
        """Return the certificate of the chosen engine."""
        if options.adaptive is not None and not isinstance(weights, ImplicitWeights):
            return Certificate("dense", "learning_rate is adaptive", None)
        certificate, self.space = choose_engine(self.name, problem, weights)
        if options.adaptive is not None and self.space is not None:
            raise ValueError(ADAPTIVE_RATE)
        return certificate

    def prepare(self, request: Request) -> ResumableJob:
        """Return the job of the chosen engine."""
        return DenseJob(request) if self.space is None else ReducedJob(request, self.space)


# ------------------------------------------------------------------------------------------------- choice


def choose_engine(
    engine: str, problem: Problem | Observations, weights: Weights
) -> tuple[Certificate, Closure | None]:
    """Choose between the reduced and the dense engine.

    Parameters
    ----------
    engine : {"auto", "reduced", "dense"}
    problem : Problem or Observations
    weights : list of ndarray, or ImplicitWeights

    Returns
    -------
    tuple of Certificate and Closure
        The engine with its reasons, and the invariant subspaces; None for the dense engine.

    Raises
    ------
    AssumptionError
        If the engine that is asked for cannot do the run.
    """
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
    is_full = engine == "reduced" and breaks_no_assumption(problem, weights)
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
    if found.failures[0].name == "closure" and breaks_no_assumption(problem, weights):
        # Exact all the same, but not faster.
        reason = f'little to gain with a target of this rank: {failure}; engine="reduced" takes more'
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
    return Certificate("reduced", f"the closure holds in distribution, {found.describe_dims()}", found), space


def with_caution(certificate: Certificate, request: Request) -> Certificate:
    """Return the certificate with a warning in its reason, if the minimum is unstable at these rates."""
    if request.steps < 2 or request.adaptive is not None:
        return certificate
    caution = rate_caution(
        request.problem,
        request.scales(),
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
