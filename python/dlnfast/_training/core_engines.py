# SPDX-License-Identifier: MIT
"""The engines of the core: the reduced one, the dense one, and the automatic choice between them."""

from __future__ import annotations

from .._closure.certificate import Certificate
from .._problem.kinds import AnyProblem
from .._weights.implicit import ImplicitWeights
from .choice import choose_engine
from .engines import Engine
from .jobs import DenseJob, ReducedJob, ResumableJob
from .options import Options
from .rates import ADAPTIVE_RATE
from .request import Request, Weights


class ReducedEngine(Engine):
    """Trains the invariant subspaces only: exact, at a cost independent of the width."""

    name = "reduced"

    def check(self, options: Options, problem: AnyProblem, weights: Weights) -> Certificate:
        """Return the certificate of the closure, or raise if the closure does not hold."""
        if options.adaptive is not None:  # refused before the closure, which is expensive
            raise ValueError(ADAPTIVE_RATE)
        certificate, self.space = choose_engine(self.name, problem, weights)
        return certificate

    def prepare(self, request: Request) -> ReducedJob:
        """Return the job inside the invariant subspaces."""
        assert self.space is not None
        return ReducedJob(request, self.space)


class DenseEngine(Engine):
    """Trains whole weight matrices."""

    name = "dense"

    def check(self, options: Options, problem: AnyProblem, weights: Weights) -> Certificate:
        """Return the certificate; only lazily sampled weights are refused.

        The engine does every option that an engine has to know before it has a job. Unknown names of options
        never arrive here: `Options` refuses them. `jobs.refuse_unread_options` refuses the known options that
        `DenseJob` does not read.
        """
        del options
        return choose_engine(self.name, problem, weights)[0]

    def prepare(self, request: Request) -> DenseJob:
        """Return the job on copies of the weights."""
        return DenseJob(request)


class AutomaticEngine(Engine):
    """The reduced engine where it is exact and smaller than the network, otherwise the dense engine."""

    name = "auto"

    def check(self, options: Options, problem: AnyProblem, weights: Weights) -> Certificate:
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
