# SPDX-License-Identifier: MIT
"""The interface of engines, and the decision which one does a run.

An engine checks whether it can do a run, with reasons in a `Certificate`, and prepares a job that does it.
`registry.ENGINES` lists all of them by name; `load_engine` imports the one that a run asks for.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

from .._closure.certificate import Certificate
from .._closure.subspaces import Closure
from .._problem.kinds import AnyProblem
from .jobs import ResumableJob
from .options import Options
from .rates import make_request, with_caution
from .registry import ENGINES, split_engine
from .request import Request, Weights


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
    def check(self, options: Options, problem: AnyProblem, weights: Weights) -> Certificate:
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


def resolve(options: Options, problem: AnyProblem, weights: Weights) -> tuple[Engine, Request, Certificate]:
    """Decide everything that depends on problem and weights: the rates and the engine.

    Parameters
    ----------
    options : Options
        Checked options.
    problem : Problem, Observations or SampleProblem
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
    if engine.device is not None:
        request = replace(request, device=engine.device)
    return engine, request, with_caution(certificate, request)
