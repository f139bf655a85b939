# SPDX-License-Identifier: MIT
"""One job for each engine: working arrays, the call of the core, and the states it leaves."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .._closure.certificate import Certificate
from .._closure.operators import ExplicitLayers
from .._closure.subspaces import Closure, factors_within
from .._problem.problem import Problem
from .._support.arrays import FloatArray, aligned_copy
from .._support.dispatch import core
from .._support.errors import DivergedError
from .._support.progress import ProgressBar
from .._tracking.svd_tracker import DEFAULTS as TRACKER_DEFAULTS
from .._trajectory.load import COMPLETE
from .._trajectory.states import DenseStates, LayerTracking, ReducedStates
from .._trajectory.trajectory import Trajectory
from .._weights.implicit import ImplicitWeights
from .request import ALL_VALUES, Request, divergence_text

#: Widths up to which the core compensates its sums (small_limit in cpp/src/small_descent.hpp).
_COMPENSATED = 32


class Outputs:
    """The arrays that the core fills while it runs; readable after any interruption."""

    def __init__(self, request: Request) -> None:
        self.loss = allocate_records((request.n_losses,), np.dtype(np.float64))
        self.record_steps = np.empty(request.n_records, dtype=np.int64)
        self._numbers = np.zeros(6, dtype=np.int64)
        #: What the core counts: losses, records, snapshots, rates, and whether it is between two steps.
        self.counts = self._numbers[1:]
        n_rates = 0 if request.adaptive is None else request.n_losses
        self.rate = allocate_records((n_rates,), np.dtype(np.float64))

    @property
    def begin(self) -> int:
        """Step of the first loss."""
        return int(self._numbers[0])

    @begin.setter
    def begin(self, step: int) -> None:
        self._numbers[0] = step

    @property
    def n_losses(self) -> int:
        return int(self.counts[0])

    @property
    def n_records(self) -> int:
        return int(self.counts[1])

    @property
    def n_snapshots(self) -> int:
        return int(self.counts[2])

    @property
    def n_rates(self) -> int:
        return int(self.counts[3])

    @property
    def last_step(self) -> int:
        """Step of the last loss."""
        return self.begin + self.n_losses - 1

    @property
    def between_steps(self) -> bool:
        """Whether the weights belong to the last loss."""
        return bool(self.counts[4])

    def empty(self) -> None:
        """Make room for what comes after the last loss."""
        # In one statement, which no signal divides: `last_step` is right at any moment.
        self._numbers[:5] = self.last_step + 1, 0, 0, 0, 0


def allocate_records(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return an array for records, or say what to change if it does not fit the memory."""
    try:
        return np.empty(shape, dtype=dtype)
    except (MemoryError, ValueError, OverflowError) as error:  # the latter for shapes beyond addresses
        raise MemoryError(
            f"records of shape {shape} do not fit the memory ({error}): raise record_every (or "
            "weights_every), keep fewer singular_values or no vectors, or take fewer steps"
        ) from None


class Job(Protocol):
    """One engine's preparation for a run, and the reading of what it left."""

    def run(self, arguments: dict[str, Any]) -> tuple[str, int, int]: ...

    def states(self, outputs: Outputs, complete: bool) -> ReducedStates | DenseStates: ...


class ResumableJob(Job, Protocol):
    """One whose run can be written to a folder, and go on from there."""

    #: What moves beside the weights.
    motion: OptimizerState

    def moving(self) -> dict[str, FloatArray]: ...


class OptimizerState:
    """Velocities, what compensated sums have rounded away, and vectors that a search goes on from.

    Zeros at the start; written by the core where the run is kept.
    """

    def __init__(self, request: Request, weights: Sequence[FloatArray]) -> None:
        kept = request.drain_every > 0
        size = max(max(w.shape) for w in weights)
        self.velocity = [np.zeros_like(w) for w in weights] if kept and request.momentum.any() else []
        self.carry = [np.zeros_like(w) for w in weights] if kept and size <= _COMPENSATED else []
        adapts = kept and request.adaptive is not None
        self.search = [np.zeros(w.shape[1], dtype=w.dtype) for w in weights] if adapts else []
        #: Whether the run goes on from somewhere.
        self.resumes = False

    def arguments(self) -> dict[str, Any]:
        norms = [float(np.linalg.norm(v.astype(np.float64))) for v in self.velocity]
        return {
            "velocity": self.velocity,
            "carry": self.carry,
            "search": self.search,
            "velocity_norms": norms if self.resumes else [],
        }

    def arrays(self) -> dict[str, FloatArray]:
        lists = {"velocity": self.velocity, "carry": self.carry, "search": self.search}
        return {f"{name}_{i}": array for name, each in lists.items() for i, array in enumerate(each)}


class ReducedJob:
    def __init__(self, request: Request, space: Closure) -> None:
        self.request = request
        self.space = space
        self.cores = [core_.copy() for core_ in space.cores]
        self.core_records = [allocate_records((request.n_records, *c.shape), c.dtype) for c in self.cores]
        n_scalars = sum(len(family.rho) for family in space.families)
        self.motion = OptimizerState(request, self.cores)
        #: rho, velocities and carries of all families.
        self.scalars = np.zeros((3, n_scalars))
        self.scalars[0] = [rho for family in space.families for rho in family.rho]
        self.rho_records = allocate_records((request.n_records, n_scalars), np.dtype(np.float64))

    def space_arrays(self) -> dict[str, FloatArray]:
        """Return what the core learns from, where it is not among the records anyway."""
        factor, target = self.space.input_factor, self.space.factor_target
        if factor is None or target is None:
            return {}
        return {"core_factor": factor, "core_factor_target": target}

    def within(self, arrays: Mapping[str, npt.NDArray[Any]]) -> ReducedJob:
        """Return the job inside the subspaces that are written: another process finds others, by rounding."""
        if "basis_0" in arrays:
            bases: Sequence[FloatArray] = [arrays[f"basis_{i}"] for i in range(len(self.space.bases))]
        else:  # they follow from a law
            bases = self.space.bases
        assert isinstance(self.request.problem, Problem)
        factors = arrays.get("core_factor"), arrays.get("core_factor_target")
        if factors[0] is None:  # a run that an earlier version began, or one of white inputs
            factors = factors_within(self.request.problem, bases[0], bases[-1])
        space = replace(
            self.space,
            bases=bases,
            target=arrays["core_target"],
            input_gram=arrays.get("core_gram"),
            input_factor=factors[0],
            factor_target=factors[1],
        )
        return ReducedJob(self.request, space)

    def run(self, arguments: dict[str, Any]) -> tuple[str, int, int]:
        space = self.space
        arguments |= self.motion.arguments()
        arguments |= {
            "target": space.target,
            "input_gram": space.input_gram,
            "input_factor": space.input_factor,
            "factor_target": space.factor_target,
            "loss_floor": self.request.problem.loss_floor,
            "families": [(f.first - 1, f.multiplicity, f.coupling, f.rho) for f in space.families],
            "core_records": self.core_records,
            "rho_records": self.rho_records,
            "scalars": self.scalars if self.request.drain_every else None,
        }
        return core.reduced_descent(self.cores, arguments)

    def moving(self) -> dict[str, FloatArray]:
        """Return the arrays that change while the run goes on, its state."""
        cores = {f"weight_{i}": core_ for i, core_ in enumerate(self.cores)}
        return cores | {"scalars": self.scalars} | self.motion.arrays()

    def states(self, outputs: Outputs, complete: bool) -> ReducedStates:
        n = outputs.n_records
        cores = tuple(records[:n] for records in self.core_records)
        return reduced_states(self.request, self.space, cores, self.rho_records[:n])


def reduced_states(
    request: Request, space: Closure, cores: tuple[FloatArray, ...], rho: npt.NDArray[np.float64]
) -> ReducedStates:
    """Return what a reduced run recorded, together with what it started from."""
    given = request.weights
    return ReducedStates(
        bases=space.bases,
        cores=cores,
        families=space.families,
        rho=rho,
        target=space.target,
        input_gram=space.input_gram,
        layers=given if isinstance(given, ImplicitWeights) else ExplicitLayers(given),
        n_values=request.n_values,
        loss_scale=request.problem.loss_scale,
    )


class DenseJob:
    """Working copies of the weights, and room for what the records of whole layers hold."""

    def __init__(self, request: Request) -> None:
        self.request = request
        assert not isinstance(request.weights, ImplicitWeights)
        self.initial = tuple(request.weights)
        # The working copies; W_l(0) stays with the caller.
        self.weights = [aligned_copy(w) for w in self.initial]
        self.motion = OptimizerState(request, self.weights)
        n, dtype = request.n_records, request.dtype
        shapes = [w.shape for w in self.weights]
        kept = [min(*s, request.n_values if request.n_values is not None else min(s)) for s in shapes]
        tracked = kept if request.n_values != 0 else []
        self.values = [allocate_records((n, k), dtype) for k in tracked]
        self.errors, self.signs = (
            [allocate_records((n, k), np.dtype(np.float64)) for k in tracked] for _ in range(2)
        )
        self.branches, self.clusters = (
            [allocate_records((n, k), np.dtype(np.int64)) for k in tracked] for _ in range(2)
        )
        n_columns = len(core.TRACKING_COLUMNS)
        self.tracking = [allocate_records((n, n_columns), np.dtype(np.float64)) for _ in tracked]
        self.left, self.right = [], []
        if request.vectors:
            self.left = [allocate_records((n, s[0], k), dtype) for s, k in zip(shapes, kept, strict=True)]
            self.right = [allocate_records((n, s[1], k), dtype) for s, k in zip(shapes, kept, strict=True)]
        every = request.weights_every
        self.snapshots = [allocate_records((request.n_snapshots, *s), dtype) for s in shapes] if every else []

    def run(self, arguments: dict[str, Any]) -> tuple[str, int, int]:
        """Descend; return the outcome, the last step, and the layer that grew most where it diverged."""
        arguments |= self.request.problem.engine_arguments(self.request.dtype)
        arguments |= self.motion.arguments()
        arguments |= {
            "snapshot_every": self.request.weights_every or 0,
            "n_values": ALL_VALUES if self.request.n_values is None else self.request.n_values,
            "values": self.values,
            "errors": self.errors,
            "signs": self.signs,
            "branches": self.branches,
            "clusters": self.clusters,
            "tracking": self.tracking,
            "tracker": TRACKER_DEFAULTS | {"n_values": 1, "mode": self.request.tracking},
            # What starts from W(0) cannot go on from other weights.
            "factored": self.request.tracking == "auto" and not self.motion.resumes,
            "initial": [] if self.motion.resumes else [np.ascontiguousarray(w) for w in self.initial],
            "left": self.left,
            "right": self.right,
            "snapshots": self.snapshots,
        }
        return core.dense_descent(self.weights, arguments)

    def moving(self) -> dict[str, FloatArray]:
        """Return the arrays that change while the run goes on, its state."""
        return {f"weight_{i}": w for i, w in enumerate(self.weights)} | self.motion.arrays()

    def states(self, outputs: Outputs, complete: bool) -> DenseStates:
        """Return what was recorded so far, with the weights at the end where the run came to one."""
        n = outputs.n_records
        every = self.request.weights_every or 1
        first = -(-outputs.begin // every)
        return DenseStates(
            values=tuple(v[:n] for v in self.values),
            tracking=tuple(
                LayerTracking(*(a[:n] for a in arrays))
                for arrays in zip(
                    self.errors, self.signs, self.branches, self.clusters, self.tracking, strict=True
                )
            ),
            left=tuple(v[:n] for v in self.left),
            right=tuple(v[:n] for v in self.right),
            snapshots=tuple(s[: outputs.n_snapshots] for s in self.snapshots),
            snapshot_steps=(first + np.arange(outputs.n_snapshots, dtype=np.int64)) * every,
            initial=self.initial,
            final=tuple(self.weights) if complete else None,
        )


def core_arguments(request: Request, outputs: Outputs, bar: ProgressBar) -> dict[str, Any]:
    """Return what both engines of the core take."""
    return {
        "loss_scale": request.problem.loss_scale,
        "learning_rate": request.learning_rate.tolist(),
        "weight_decay": request.weight_decay.tolist(),
        "momentum": request.momentum.tolist(),
        "steps": request.steps,
        "record_every": request.record_every,
        "tolerance": -1.0 if request.tolerance is None else request.tolerance,
        "n_threads": request.n_threads,
        "loss": outputs.loss,
        "record_steps": outputs.record_steps,
        "counts": outputs.counts,
        "adaptive": None
        if request.adaptive is None
        else (request.adaptive.safety, request.adaptive.curvature, request.adaptive.error_scale),
        "rate": outputs.rate,
        "on_record": request.callback,
        "on_progress": bar.listener,
        "on_drain": None,
        "first": outputs.begin,
        "drain_every": request.drain_every,
    }


def make_trajectory(
    job: Job, request: Request, certificate: Certificate, outputs: Outputs, outcome: str, seconds: float
) -> Trajectory:
    """Return what is in the outputs."""
    return Trajectory(
        steps=outputs.record_steps[: outputs.n_records],
        loss=outputs.loss[: outputs.n_losses],
        states=job.states(outputs, complete=outcome in COMPLETE),
        certificate=certificate,
        problem=request.problem,
        config=request.describe(certificate.engine, outcome),
        wall_time=seconds,
        rates=None if request.adaptive is None else outputs.rate[: outputs.n_rates],
    )


def run_job(
    job: Job, request: Request, certificate: Certificate, bar: ProgressBar, start: float
) -> Trajectory:
    """Let a job run, and return its trajectory or raise the error that holds it."""
    outputs = Outputs(request)

    def trajectory(outcome: str) -> Trajectory:
        return make_trajectory(job, request, certificate, outputs, outcome, time.perf_counter() - start)

    try:
        outcome, step, layer = job.run(core_arguments(request, outputs, bar))
    except BaseException as error:
        if outputs.n_records > 0:
            partial = trajectory("interrupted")
            error.trajectory = partial  # type: ignore[attr-defined]
            error.add_note(
                f"the trajectory up to step {partial.steps[-1]} is kept in the attribute trajectory"
            )
        raise
    if outcome == "diverged":
        partial_run = trajectory("diverged") if outputs.n_records > 0 else None
        raise DivergedError(
            divergence_text(request, step, layer), step=step, layer=layer, trajectory=partial_run
        )
    return trajectory(outcome)
