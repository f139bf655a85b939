# SPDX-License-Identifier: MIT
"""The torch engine: whole weight matrices on a PyTorch device."""

from __future__ import annotations

import torch

from .._closure.certificate import Certificate
from .._problem.kinds import AnyProblem
from .._problem.observations import Observations
from .._problem.samples import SampleProblem
from .._support.errors import AssumptionError
from .._training.engines import Engine
from .._training.options import Options
from .._training.rates import ADAPTIVE_RATE
from .._training.request import Request, Weights
from .._weights.implicit import ImplicitWeights
from ._devices import find_device
from .descent import TorchJob
from .sample_descent import SampleJob


class TorchEngine(Engine):
    """Trains whole weight matrices on a PyTorch device."""

    name = "torch"

    def __init__(self, device: str = "") -> None:
        """Take the name of a device; empty for PyTorch's default."""
        super().__init__()
        self._wanted = device or None

    def check(self, options: Options, problem: AnyProblem, weights: Weights) -> Certificate:
        """Return the certificate and find the device, or name the engine that can do the run."""
        if isinstance(problem, Observations):
            raise TypeError(
                f"problem is {type(problem).__name__}; engine='torch' wants a dlnfast.Problem: "
                "engine='dense' descends on observations of a matrix"
            )
        if isinstance(weights, ImplicitWeights):
            remedy = "engine='reduced' trains them, or draw them with"
            if isinstance(problem, SampleProblem):
                remedy = "draw them with"
            raise AssumptionError(
                "engine='torch' needs whole layers, but weights are lazily sampled: "
                f"{remedy} dln.orthogonal(..., implicit=False)"
            )
        if options.adaptive is not None:
            raise ValueError(ADAPTIVE_RATE)
        self.device = str(find_device(self._wanted, weights[0].dtype))
        if isinstance(problem, SampleProblem):
            return Certificate("torch", f"samples, on {self.device}; {problem.reason_without_closure}", None)
        return Certificate("torch", f"engine='torch' was asked for, on {self.device}", None)

    def prepare(self, request: Request) -> TorchJob:
        """Return the job on the device that `check` found."""
        assert request.device is not None
        device = torch.device(request.device)
        return (
            SampleJob(request, device)
            if isinstance(request.problem, SampleProblem)
            else TorchJob(request, device)
        )
