# SPDX-License-Identifier: MIT
"""Engines: the interface, and the reduced and the dense engine.

An engine checks whether it can do a run, with reasons in a `Certificate`, and prepares a job that does it.
`registry.ENGINES` lists all of them by name; `load_engine` imports the one that a run asks for.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

from .._closure.certificate import Certificate
from .._closure.closure import Closure
from .._problem.observations import Observations
from .._problem.problem import Problem
from .._weights.implicit import ImplicitWeights
from .choice import ADAPTIVE_RATE, Weights, choose_engine, with_caution
from .jobs import DenseJob, ReducedJob, ResumableJob
from .options import Options
from .registry import ENGINES, split_engine
from .request import Request, make_request

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
