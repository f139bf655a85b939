# SPDX-License-Identifier: MIT
"""The request of a run: its options resolved for one problem and one network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .._problem.observations import Observations
from .._problem.problem import Problem
from .._support.arrays import FloatArray, per_layer, scale_of, widths_of
from .._weights.implicit import ImplicitWeights
from ..theory import stability_threshold
from .options import Adaptive, Callback, Options
from .rates import AdaptiveRequest, adaptive_rates, largest_target_value, learning_rates
from .stopping import Plateau


@dataclass(frozen=True)
class Request:
    """Everything that an engine needs to know: problem, weights, checked options, and rates per layer.

    Attributes
    ----------
    problem : Problem or Observations
    weights : list of ndarray, or ImplicitWeights
        W_1(0), .., W_L(0); empty where each process holds its own rows.
    options : Options
        The checked options. An engine reads an option without an attribute here from them.
    widths : list of int
        d_0, .., d_L.
    dtype : dtype
        Precision of the weights.
    learning_rate : ndarray, shape (L,)
        Learning rates of the layers; for an adaptive rate their ratios.
    adaptive : AdaptiveRequest or None
        Constants of an adaptive rate.
    weight_decay, momentum : ndarray, shape (L,)
    callback : callable or None
        Callback of the records, which a resumed run replaces.
    device : str or None
        Device of an engine that has several.
    drain_every : int
        Number of steps between two flushes of the records to a folder; 0 without a folder.
    """

    problem: Problem | Observations
    weights: list[FloatArray] | ImplicitWeights
    options: Options
    widths: list[int]
    dtype: np.dtype[Any]
    learning_rate: npt.NDArray[np.float64]
    adaptive: AdaptiveRequest | None
    weight_decay: npt.NDArray[np.float64]
    momentum: npt.NDArray[np.float64]
    callback: Callback | None
    device: str | None = None
    drain_every: int = 0

    # ------------------------------------------------------------------------------------------ options

    @property
    def steps(self) -> int:
        """Number of updates."""
        return self.options.steps

    @property
    def record_every(self) -> int:
        """Number of steps between two records."""
        return self.options.record.every

    @property
    def n_values(self) -> int | None:
        """Number of singular values of each layer in a record; None for all."""
        return self.options.record.n_values

    @property
    def vectors(self) -> bool:
        """Whether records hold singular vectors."""
        return self.options.record.vectors

    @property
    def tracking(self) -> str:
        """Method that computes singular values on the dense engines."""
        return self.options.record.tracking

    @property
    def weights_every(self) -> int | None:
        """Number of steps between two snapshots of the weights."""
        return self.options.record.weights_every

    @property
    def tolerance(self) -> float | None:
        """Loss at which the run ends."""
        return self.options.tolerance

    @property
    def n_threads(self) -> int:
        """Number of threads; 0 for automatic."""
        return self.options.n_threads

    # ------------------------------------------------- sizes of arrays, as in cpp/src/descent.cpp

    @property
    def n_records(self) -> int:
        """Number of records: step 0, multiples of record_every, the last step."""
        extra = 2 if self.drain_every else self.steps % self.record_every != 0
        return self._n_multiples(self.record_every) + extra

    @property
    def n_losses(self) -> int:
        """Number of losses, one for each step."""
        return min(self.drain_every, self.steps) + 1 if self.drain_every else self.steps + 1

    @property
    def n_snapshots(self) -> int:
        """Number of snapshots of the weights, at multiples of weights_every."""
        return self._n_multiples(self.weights_every) if self.weights_every else 0

    def _n_multiples(self, every: int) -> int:
        if self.drain_every:
            return min(self.drain_every, self.steps) // every + 2
        return self.steps // every + 1

    def scales(self) -> list[float]:
        """Return the scales of the layers; zeros where each process holds its own rows."""
        if isinstance(self.weights, ImplicitWeights):
            return list(self.weights.scales)
        return [scale_of(w) for w in self.weights] or [0.0] * len(self.learning_rate)

    # ------------------------------------------------------------------------------------- descriptions

    def settings(self, engine: str) -> dict[str, Any]:
        """Return the settings that make this request again, in values that JSON knows.

        `train.resume` reads them; together with problem and weights they identify a run folder.
        """
        rule = self.adaptive
        return {
            **self.options.stored(),
            "learning_rate": self.learning_rate.tolist(),
            "adaptive": None
            if rule is None
            else {"safety": rule.safety, "ratios": self.learning_rate.tolist(), "curvature": rule.curvature},
            "weight_decay": self.weight_decay.tolist(),
            "momentum": self.momentum.tolist(),
            "engine": engine,
            "plateau": isinstance(self.callback, Plateau),
            **({} if self.device is None else {"device": self.device}),
        }

    def describe(self, engine: str, outcome: str) -> dict[str, Any]:
        """Return the metadata of the run, for `Trajectory.config`, in values that JSON knows."""
        hidden = ("singular_values", "vectors", "weights_every")  # the trajectory shows them
        return {
            **{name: value for name, value in self.options.stored().items() if name not in hidden},
            "engine": engine,
            "outcome": outcome,
            "problem": self.problem.describe(),
            "learning_rate": self.learning_rate.tolist(),
            "adaptive": None
            if self.adaptive is None
            else {"safety": self.adaptive.safety, "curvature": self.adaptive.curvature},
            "weight_decay": self.weight_decay.tolist(),
            "momentum": self.momentum.tolist(),
            "dtype": self.dtype.name,
            "widths": self.widths,
            **({} if self.device is None else {"device": self.device}),
        }


def make_request(
    options: Options, problem: Problem | Observations, weights: list[FloatArray] | ImplicitWeights
) -> Request:
    """Return the request of checked options: decide the rates of the layers, and the sizes.

    Raises
    ------
    ShapeError
        For a list of rates of another length than the network.
    AssumptionError
        For an adaptive rate with lazily sampled weights.
    """
    n_layers = len(weights)
    weight_decay = per_layer(options.weight_decay, "weight_decay (lambda)", n_layers)
    momentum = per_layer(options.momentum, "momentum (mu)", n_layers, below=1.0)
    adaptive = None
    if options.adaptive is not None:
        rates, adaptive = adaptive_rates(options.adaptive, problem, weights)
    else:
        assert not isinstance(options.learning_rate, Adaptive)
        rates = learning_rates(options.learning_rate, problem, weights, weight_decay, momentum)
    return Request(
        problem=problem,
        weights=weights,
        options=options,
        widths=list(weights.widths) if isinstance(weights, ImplicitWeights) else widths_of(weights),
        dtype=weights.dtype if isinstance(weights, ImplicitWeights) else weights[0].dtype,
        learning_rate=rates,
        adaptive=adaptive,
        weight_decay=weight_decay,
        momentum=momentum,
        callback=options.record.callback,
    )


def divergence_text(request: Request, step: int, layer: int) -> str:
    """Return the message for a run whose loss is not finite at this step, with the remedy."""
    text = (
        f"the loss is not finite at step {step} (layer {layer} has grown most): lower learning_rate (eta), "
        f"now {_span(request.learning_rate)}"
    )
    if request.adaptive is not None:
        text = f"the loss is not finite at step {step} (layer {layer} has grown most): lower safety, "
        text += f"now {request.adaptive.safety:g}"
    sigma = largest_target_value(request.problem)
    if request.problem.input_gram is not None:
        text += ", or whiten the inputs"
    elif sigma > 0:
        bound = stability_threshold(sigma, len(request.weights), request.problem.loss_scale)
        text += f"; at a balanced minimum of this problem rates above {bound:.3g} oscillate"
    if request.weight_decay.max() * request.learning_rate.max() > 2.0:
        product = _span(request.learning_rate * request.weight_decay)
        text += f"; learning_rate * weight_decay is {product}, above 2"
    return text


def _span(values: npt.NDArray[np.float64]) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:g}" if low == high else f"{low:g} .. {high:g}"
