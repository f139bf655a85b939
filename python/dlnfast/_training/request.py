# SPDX-License-Identifier: MIT
"""The request of a run: its options resolved for one problem and one network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._problem.observations import Observations
from .._problem.problem import Problem
from .._problem.samples import SampleProblem
from .._support.arrays import FloatArray, scale_of
from .._support.schedule import Schedule
from .._weights.implicit import ImplicitWeights
from ..optimizers import Optimizer
from .callbacks import RecordCallback
from .options import Options
from .stopping import Plateau

#: Largest size of the snapshots of a run that did not ask for any.
SNAPSHOT_BYTES: Final = 2**26
#: Initial weights after their checks.
Weights = list[FloatArray] | ImplicitWeights


@dataclass(frozen=True)
class AdaptiveRequest:
    """The constants of an adaptive rate, measured for a problem and its weights."""

    safety: float
    curvature: list[float]
    error_scale: float


@dataclass(frozen=True)
class RateTables:
    """The rates of every step, (steps, 1) or (steps, L); None for constant ones."""

    learning_rate: npt.NDArray[np.float64] | None = None
    weight_decay: npt.NDArray[np.float64] | None = None
    momentum: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Request:
    """Everything that an engine needs to know: problem, weights, checked options, and rates per layer.

    Attributes
    ----------
    problem : Problem, Observations or SampleProblem
    weights : list of ndarray, or ImplicitWeights
        W_1(0), .., W_L(0); empty where each process holds its own rows.
    options : Options
        The checked options. An engine reads an option without an attribute here from them.
    widths : list of int
        d_0, .., d_L.
    dtype : dtype
        Precision of the weights.
    learning_rate : ndarray, shape (L,)
        Learning rates of the layers; for an adaptive rate their ratios, for a schedule the largest ones.
    adaptive : AdaptiveRequest or None
        Constants of an adaptive rate.
    weight_decay, momentum : ndarray, shape (L,)
        For a schedule the largest ones.
    tables : RateTables
        The rates of every step.
    callback : callable or None
        Callback of the records, which a resumed run replaces.
    device : str or None
        Device of an engine that has several.
    flush_every : int
        Number of steps between two flushes of the records to a folder; 0 without a folder.
    """

    problem: Problem | Observations | SampleProblem
    weights: Weights
    options: Options
    widths: list[int]
    dtype: np.dtype[Any]
    learning_rate: npt.NDArray[np.float64]
    adaptive: AdaptiveRequest | None
    weight_decay: npt.NDArray[np.float64]
    momentum: npt.NDArray[np.float64]
    callback: RecordCallback | None
    device: str | None = None
    flush_every: int = 0
    tables: RateTables = RateTables()
    #: Number of steps between two snapshots that `with_small_snapshots` has added; None for none.
    default_weights_every: int | None = None

    def with_small_snapshots(self) -> Request:
        """Return the request with snapshots of small weights at every record, unless it sets them.

        Only where all of them need at most `SNAPSHOT_BYTES`, and where singular values are recorded.
        """
        if self.options.record.weights_every is not None or self.n_values == 0:
            return self
        found = replace(self, default_weights_every=self.record_every)
        n_entries = sum(rows * columns for columns, rows in pairwise(self.widths))
        is_small = found.n_snapshots * n_entries * self.dtype.itemsize <= SNAPSHOT_BYTES
        return found if is_small else self

    # ------------------------------------------------------------------------------------------ options

    @property
    def steps(self) -> int:
        """Number of updates."""
        return self.options.steps

    @property
    def optimizer(self) -> Optimizer | None:
        """Update rule; None for gradient descent."""
        rule = self.options.optimizer
        return rule if isinstance(rule, Optimizer) else None

    @property
    def is_scheduled(self) -> bool:
        """Whether a rate changes from step to step."""
        return any(
            t is not None for t in (self.tables.learning_rate, self.tables.weight_decay, self.tables.momentum)
        )

    def rates_at(self, step: int, layer: int) -> tuple[float, float, float]:
        """Return learning rate, weight decay and momentum of a layer, counted from 0, at a step."""
        tables = (self.tables.learning_rate, self.tables.weight_decay, self.tables.momentum)
        constant = (self.learning_rate, self.weight_decay, self.momentum)
        rate, decay, momentum = (
            float(every[layer] if table is None else table[step, layer if table.shape[1] > 1 else 0])
            for table, every in zip(tables, constant, strict=True)
        )
        return rate, decay, momentum

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
        wanted = self.options.record.weights_every
        return self.default_weights_every if wanted is None else wanted

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
        extra = 2 if self.flush_every else self.steps % self.record_every != 0
        return self._n_multiples(self.record_every) + extra

    @property
    def n_losses(self) -> int:
        """Number of losses, one for each step."""
        return min(self.flush_every, self.steps) + 1 if self.flush_every else self.steps + 1

    @property
    def n_snapshots(self) -> int:
        """Number of snapshots of the weights, at multiples of weights_every."""
        return self._n_multiples(self.weights_every) if self.weights_every else 0

    def _n_multiples(self, every: int) -> int:
        if self.flush_every:
            return min(self.flush_every, self.steps) // every + 2
        return self.steps // every + 1

    def scales(self) -> list[float]:
        """Return the scales of the layers; zeros where each process holds its own rows."""
        if isinstance(self.weights, ImplicitWeights):
            return list(self.weights.scales)
        return [scale_of(w) for w in self.weights] or [0.0] * len(self.learning_rate)

    # ------------------------------------------------------------------------------------- descriptions

    def _rates(self) -> dict[str, Any]:
        """Return the rates of the layers, or the definitions of their schedules."""
        rates = {}
        for name in ("learning_rate", "weight_decay", "momentum"):
            rate = getattr(self.options, name)
            rates[name] = rate.to_dict() if isinstance(rate, Schedule) else getattr(self, name).tolist()
        return rates

    def settings(self, engine: str) -> dict[str, Any]:
        """Return the settings that make this request again, in values that JSON knows.

        `train.resume` reads them; together with problem and weights they identify a run folder.
        """
        rule = self.adaptive
        return {
            **self.options.stored(),
            **self._rates(),
            # Another rule has its momentum in its own settings.
            **({} if self.optimizer is None else {"momentum": 0.0}),
            "adaptive": None
            if rule is None
            else {"safety": rule.safety, "ratios": self.learning_rate.tolist(), "curvature": rule.curvature},
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
            **self._rates(),
            "adaptive": None
            if self.adaptive is None
            else {"safety": self.adaptive.safety, "curvature": self.adaptive.curvature},
            "dtype": "float64" if self.dtype.itemsize == 8 else "float32",  # faster than dtype.name
            "widths": self.widths,
            **({} if self.device is None else {"device": self.device}),
        }
