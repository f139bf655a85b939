# SPDX-License-Identifier: MIT
"""The arguments of one run, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._problem.observations import Observations
from .._problem.problem import Problem
from .._support.arrays import (
    FloatArray,
    check_choice,
    check_count,
    check_flag,
    check_scale,
    per_layer,
    widths_of,
)
from .._support.errors import AssumptionError
from .._support.threads import MAX_THREADS
from .._weights.implicit import ImplicitWeights
from ..theory import stability_threshold
from .rates import Adaptive, AdaptiveRequest, PerLayer, adaptive_rates, largest_target_value, learning_rates
from .stopping import Plateau

Callback = Callable[[int, float], bool | None]
#: Stands for all singular values in the core, which takes the smaller of this and of what there is.
ALL_VALUES = 2**62
#: Optimizers whose update acts on each entry by itself.
_ENTRYWISE: Final = (
    "adam", "adamw", "adamax", "nadam", "radam", "adagrad", "adadelta", "rmsprop", "rprop", "lion", "signsgd",
)  # fmt: skip
#: Optimizers whose update is made of gradients by sums, products and functions of singular values.
_KEEPS_SUBSPACES: Final = ("muon", "shampoo", "nesterov")


@dataclass(frozen=True)
class Request:
    """The arguments of one run, checked."""

    problem: Problem | Observations
    weights: list[FloatArray] | ImplicitWeights
    learning_rate: npt.NDArray[np.float64]  # where it adapts, the ratios of the layers
    adaptive: AdaptiveRequest | None
    weight_decay: npt.NDArray[np.float64]
    momentum: npt.NDArray[np.float64]
    steps: int
    record_every: int
    n_values: int | None  # None: all
    vectors: bool
    tracking: str
    weights_every: int | None
    tolerance: float | None
    n_threads: int
    callback: Callback | None
    device: str | None = None  # engine="torch" only
    drain_every: int = 0  # steps between two writings of what was recorded; 0: nothing is written

    @classmethod
    def checked(
        cls,
        problem: Problem | Observations,
        weights: list[FloatArray] | ImplicitWeights,
        *,
        learning_rate: PerLayer | str | Adaptive,
        steps: int,
        weight_decay: PerLayer,
        momentum: PerLayer,
        record_every: int,
        singular_values: str | int | None,
        vectors: bool,
        tracking: str = "auto",
        weights_every: int | None,
        tolerance: float | None,
        n_threads: int,
        callback: Callback | None,
    ) -> Request:
        """Return the request, or raise what `train` promises."""
        n_layers = len(weights)
        inertia = per_layer(momentum, "momentum (mu)", n_layers, below=1.0)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback is {type(callback).__name__}; wanted a callable of (step, loss)")
        decay = per_layer(weight_decay, "weight_decay (lambda)", n_layers)
        n_values = _check_n_values(singular_values)
        n_steps = check_count(steps, "steps", minimum=0)
        kept_every = weights_every
        if weights_every is not None:
            kept_every = min(check_count(weights_every, "weights_every", maximum=None), max(n_steps, 1))
        with_vectors = check_flag(vectors, "vectors")
        if with_vectors and n_values == 0:
            raise ValueError("vectors is True but singular_values asks for none")
        check_choice(tracking, "tracking", ("auto", "dense", "full"))
        adaptive = None
        if isinstance(learning_rate, Adaptive) or (
            isinstance(learning_rate, str) and learning_rate == "adaptive"
        ):
            law = Adaptive() if isinstance(learning_rate, str) else learning_rate
            rates, adaptive = adaptive_rates(law, problem, weights)
        else:
            rates = learning_rates(learning_rate, problem, weights, decay, inertia)
        return cls(
            problem=problem,
            weights=weights,
            learning_rate=rates,
            adaptive=adaptive,
            weight_decay=decay,
            momentum=inertia,
            steps=n_steps,
            # Intervals longer than the run are all alike.
            record_every=min(check_count(record_every, "record_every", maximum=None), max(n_steps, 1)),
            n_values=n_values,
            vectors=with_vectors,
            tracking=tracking,
            weights_every=kept_every,
            tolerance=None if tolerance is None else check_scale(tolerance, "tolerance"),
            n_threads=check_count(n_threads, "n_threads", minimum=0, maximum=MAX_THREADS),
            callback=callback,
        )

    # Room, as in cpp/src/descent.cpp: for a run that takes all its steps, or from drain to drain.

    @property
    def n_records(self) -> int:
        """Records: step 0, multiples of record_every, the last step."""
        extra = 2 if self.drain_every else self.steps % self.record_every != 0
        return self._n_multiples(self.record_every) + extra

    @property
    def n_losses(self) -> int:
        """Losses, one for each step."""
        return min(self.drain_every, self.steps) + 1 if self.drain_every else self.steps + 1

    @property
    def n_snapshots(self) -> int:
        """Whole weights, at multiples of weights_every."""
        return self._n_multiples(self.weights_every) if self.weights_every else 0

    def _n_multiples(self, every: int) -> int:
        if self.drain_every:
            return min(self.drain_every, self.steps) // every + 2
        return self.steps // every + 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """Precision of the weights."""
        return self.weights.dtype if isinstance(self.weights, ImplicitWeights) else self.weights[0].dtype

    @property
    def widths(self) -> list[int]:
        """d_0, .., d_L."""
        if isinstance(self.weights, ImplicitWeights):
            return list(self.weights.widths)
        return widths_of(self.weights)

    def settings(self, engine: str) -> dict[str, Any]:
        """Return the keywords of `train` that make this request, in values that JSON knows."""
        law = self.adaptive
        return {
            "learning_rate": self.learning_rate.tolist(),
            "adaptive": None
            if law is None
            else {"safety": law.safety, "ratios": self.learning_rate.tolist(), "curvature": law.curvature},
            "steps": self.steps,
            "weight_decay": self.weight_decay.tolist(),
            "momentum": self.momentum.tolist(),
            "engine": engine,
            "record_every": self.record_every,
            "singular_values": "all" if self.n_values is None else self.n_values or None,
            "vectors": self.vectors,
            "tracking": self.tracking,
            "weights_every": self.weights_every,
            "tolerance": self.tolerance,
            "n_threads": self.n_threads,
            "plateau": isinstance(self.callback, Plateau),
            **({} if self.device is None else {"device": self.device}),
        }

    def describe(self, engine: str, outcome: str) -> dict[str, Any]:
        """Return all settings of the run in values that JSON knows."""
        return {
            "engine": engine,
            "outcome": outcome,
            "problem": self.problem.describe(),
            "learning_rate": self.learning_rate.tolist(),
            "adaptive": None
            if self.adaptive is None
            else {"safety": self.adaptive.safety, "curvature": self.adaptive.curvature},
            "weight_decay": self.weight_decay.tolist(),
            "momentum": self.momentum.tolist(),
            "steps": self.steps,
            "record_every": self.record_every,
            "tolerance": self.tolerance,
            "tracking": self.tracking,
            "n_threads": self.n_threads,
            "dtype": self.dtype.name,
            "widths": self.widths,
            **({} if self.device is None else {"device": self.device}),
        }


def divergence_text(request: Request, step: int, layer: int) -> str:
    """Return what an error says of a run whose loss left the finite numbers at this step."""
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


def check_optimizer(optimizer: str) -> None:
    """Raise, with the reason, for all but gradient descent."""
    if isinstance(optimizer, str) and optimizer == "gd":
        return
    if isinstance(optimizer, str) and optimizer.lower() in _ENTRYWISE:
        raise AssumptionError(
            f"optimizer is {optimizer!r}: rates that differ from entry to entry destroy the invariant "
            "subspaces (the weights end up 50-70 % away from any reduced run), so neither engine offers it; "
            'wanted "gd", with momentum=... for heavy ball'
        )
    if isinstance(optimizer, str) and optimizer.lower() in _KEEPS_SUBSPACES:
        raise ValueError(
            f"optimizer is {optimizer!r}, which no engine runs yet. It keeps the invariant subspaces, as "
            "does every update made of gradients by sums, products, transposes and functions of singular "
            'values; wanted "gd", with momentum=... for heavy ball'
        )
    raise ValueError(f'optimizer is {optimizer!r}; wanted "gd" (with momentum=... for heavy ball)')


def _check_n_values(singular_values: str | int | None) -> int | None:
    if singular_values is None or singular_values is False:
        return 0
    if isinstance(singular_values, str):
        if singular_values == "all":
            return None
        raise ValueError(f'singular_values is {singular_values!r}; wanted "all", a number or None')
    return min(check_count(singular_values, "singular_values", minimum=0, maximum=None), ALL_VALUES)
