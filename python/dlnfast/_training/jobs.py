# SPDX-License-Identifier: MIT
"""Jobs, one class for each engine: working arrays, the call of the core, and the recorded states."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import numpy as np
import numpy.typing as npt

from .._closure.certificate import Certificate
from .._closure.operators import ExplicitLayers
from .._closure.subspaces import Closure, factors_within
from .._problem.kinds import AnyProblem
from .._problem.problem import Problem
from .._problem.samples import SampleProblem
from .._support.arrays import FloatArray, aligned_copy
from .._support.dispatch import core
from .._support.errors import DivergedError
from .._support.products import multiply
from .._support.progress import ProgressBar
from .._trajectory.dense import DenseStates
from .._trajectory.layer_spectra import LayerTracking
from .._trajectory.reduced import ReducedStates
from .._trajectory.states import COMPLETE, States
from .._trajectory.trajectory import Trajectory
from .._weights.implicit import ImplicitWeights
from ..optimizers import Shampoo
from .callbacks import Callback, CallbackState, bind_state
from .options import Options
from .rates import divergence_text
from .request import Request, Weights
from .rules import core_rule

if TYPE_CHECKING:
    from .. import _core as types


class Outputs:
    """The output arrays that the core fills during a run; valid after any interruption."""

    def __init__(self, request: Request) -> None:
        self.loss = allocate_records((request.n_losses,), np.dtype(np.float64))
        self.record_steps = np.empty(request.n_records, dtype=np.int64)
        # The step of the first loss, then the counts of the core.
        self._numbers = np.zeros(1 + len(core.Count), dtype=np.int64)
        #: Counters of the core, indexed by `core.Count`.
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
        return int(self.counts[core.Count.losses])

    @property
    def n_records(self) -> int:
        return int(self.counts[core.Count.records])

    @property
    def n_snapshots(self) -> int:
        return int(self.counts[core.Count.snapshots])

    @property
    def n_rates(self) -> int:
        return int(self.counts[core.Count.rates])

    @property
    def last_step(self) -> int:
        """Step of the last loss."""
        return self.begin + self.n_losses - 1

    @property
    def between_steps(self) -> bool:
        """Whether the weights belong to the last loss."""
        return bool(self.counts[core.Count.between_steps])

    def empty(self) -> None:
        """Reset the counters: the next loss is that of the step after the last one."""
        # One statement, which no signal interrupts: `last_step` is right at any moment.
        self._numbers[:5] = self.last_step + 1, 0, 0, 0, 0


def allocate_records(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return an array for records; if it does not fit the memory, the error names the remedy."""
    try:
        return np.empty(shape, dtype=dtype)
    except (MemoryError, ValueError, OverflowError) as error:  # the latter for shapes beyond addresses
        raise MemoryError(
            f"records of shape {shape} do not fit the memory ({error}): raise record.every (or "
            "record.weights_every), record fewer singular_values or no vectors, or take fewer steps"
        ) from None


class Job(Protocol):
    """A prepared run of one engine."""

    #: Keys of the options added after version 0.1.0 that the job reads; it refuses all others.
    reads: ClassVar[frozenset[str]]

    def run(self, arguments: types.Run) -> tuple[types.Outcome, int, int]:
        """Run; return the outcome, the last step, and the layer that grew most (0 unless diverged)."""
        ...

    def states(self, outputs: Outputs, complete: bool) -> States:
        """Return the recorded states; `complete` says that the run is finished."""
        ...

    def current_states(self, outputs: Outputs) -> tuple[States, npt.NDArray[np.int64]]:
        """Return states that end with the newest record and its weights, and the steps of their records.

        Called between two steps only, at a record.
        """
        steps = outputs.record_steps[: outputs.n_records]
        return self.states(outputs, complete=True), steps


class ResumableJob(Job, Protocol):
    """A job whose state can be saved to a folder and restored; the base class of all such jobs."""

    def state_arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """Return the arrays that change during the run: its state."""
        ...

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue from saved `state_arrays`."""
        ...

    def space_arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """Return those arrays of the invariant subspaces that are not records; none for whole layers."""
        return {}

    def replace_space(self, arrays: Mapping[str, npt.NDArray[Any]]) -> ResumableJob:
        """Return the job in the invariant subspaces of a folder; a job of whole layers returns itself."""
        del arrays
        return self


class OptimizerState:
    """Optimizer state of a checkpointed run: velocities, Kahan compensation, power-iteration vectors.

    All are zeros at the start. The core writes them; runs without a checkpoint have none.
    """

    def __init__(self, request: Request, weights: Sequence[FloatArray]) -> None:
        size = max(max(w.shape) for w in weights)
        is_saved = request.flush_every > 0
        has_momentum = is_saved and request.momentum.any()
        has_compensation = is_saved and size <= core.SMALL_LIMIT
        is_adaptive = is_saved and request.adaptive is not None
        self.velocity = [np.zeros_like(w) for w in weights] if has_momentum else []
        self.compensation = [np.zeros_like(w) for w in weights] if has_compensation else []
        self.power_vectors = [np.zeros(w.shape[1], dtype=w.dtype) for w in weights] if is_adaptive else []
        self.left_factors: list[npt.NDArray[np.float64]] = []
        self.right_factors: list[npt.NDArray[np.float64]] = []
        if is_saved and isinstance(request.optimizer, Shampoo):
            epsilon = request.optimizer.epsilon
            self.left_factors = [epsilon * np.eye(w.shape[0]) for w in weights]
            self.right_factors = [epsilon * np.eye(w.shape[1]) for w in weights]
        self.is_resumed = False

    def arguments(self) -> types.OptimizerState:
        """Return the state as arguments of the core."""
        return {
            "velocity": self.velocity,
            "compensation": self.compensation,
            "power_vectors": self.power_vectors,
            "left_factors": self.left_factors,
            "right_factors": self.right_factors,
        }

    def velocity_norms(self) -> list[float]:
        """Return the norms of the velocities that a resumed run starts from; an empty list for zeros."""
        if not self.is_resumed:
            return []
        return [float(np.linalg.norm(v.astype(np.float64))) for v in self.velocity]

    def arrays(self) -> dict[str, FloatArray]:
        # Names in the state files since version 0.1.0.
        lists: dict[str, Sequence[FloatArray]]
        lists = {"velocity": self.velocity, "carry": self.compensation, "search": self.power_vectors}
        lists |= {"left_factor": self.left_factors, "right_factor": self.right_factors}
        return {f"{name}_{i}": array for name, each in lists.items() for i, array in enumerate(each)}


class CoreJob(ResumableJob):
    """A job whose state is in arrays that the core writes."""

    reads: ClassVar[frozenset[str]] = frozenset()
    optimizer: OptimizerState

    @abstractmethod
    def state_arrays(self) -> dict[str, FloatArray]:
        """Return the arrays that change during the run: its state."""

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue from saved `state_arrays`."""
        self.optimizer.is_resumed = True
        for name, array in self.state_arrays().items():
            array[...] = arrays[name]


class ReducedJob(CoreJob):
    """A run inside the invariant subspaces: cores, and the scalars of the families outside."""

    def __init__(self, request: Request, space: Closure) -> None:
        self.request = request
        self.space = space
        self.cores = [core_.copy() for core_ in space.cores]
        self.core_records = [allocate_records((request.n_records, *c.shape), c.dtype) for c in self.cores]
        n_scalars = sum(len(family.rho) for family in space.families)
        self.optimizer = OptimizerState(request, self.cores)
        #: rho, velocities and compensation of all families, and their factors of Shampoo.
        rule = request.optimizer
        self.scalars = np.zeros((4 if isinstance(rule, Shampoo) else 3, n_scalars))
        self.scalars[0] = [rho for family in space.families for rho in family.rho]
        if isinstance(rule, Shampoo):
            self.scalars[3] = rule.epsilon
        self.rho_records = allocate_records((request.n_records, n_scalars), np.dtype(np.float64))
        self._has_saved_space = False

    def space_arrays(self) -> dict[str, FloatArray]:
        """Return the data of the reduced problem that the records do not hold."""
        factor, target = self.space.input_factor, self.space.factor_target
        if factor is None or target is None:
            return {}
        return {"core_factor": factor, "core_factor_target": target}

    def replace_space(self, arrays: Mapping[str, npt.NDArray[Any]]) -> ReducedJob:
        """Return the job in the saved subspaces; those of another process differ by rounding."""
        if "basis_0" in arrays:
            bases: Sequence[FloatArray] = [arrays[f"basis_{i}"] for i in range(len(self.space.bases))]
        else:  # lazily sampled weights give the same bases again
            bases = self.space.bases
        assert isinstance(self.request.problem, Problem)
        factors = arrays.get("core_factor"), arrays.get("core_factor_target")
        if factors[0] is None:  # a run of version 0.1.0, or one with white inputs
            factors = factors_within(self.request.problem, bases[0], bases[-1])
        space = replace(
            self.space,
            bases=bases,
            target=arrays["core_target"],
            input_gram=arrays.get("core_gram"),
            input_factor=factors[0],
            factor_target=factors[1],
        )
        job = ReducedJob(self.request, space)
        job._has_saved_space = True
        return job

    def run(self, arguments: types.Run) -> tuple[types.Outcome, int, int]:
        space = self.space
        values: types.ReducedArguments = {
            **arguments,
            **self.optimizer.arguments(),
            **reduced_objective(space, self.request.problem),
            "families": [
                {"first": f.first - 1, "multiplicity": f.multiplicity, "coupling": f.coupling, "rho": f.rho}
                for f in space.families
            ],
            "core_records": self.core_records,
            "rho_records": self.rho_records,
            "scalars": self.scalars if self.request.flush_every else None,
        }
        return core.reduced_descent(self.cores, values)

    def state_arrays(self) -> dict[str, FloatArray]:
        """Return the arrays that change during the run: its state."""
        cores = {f"weight_{i}": core_ for i, core_ in enumerate(self.cores)}
        return cores | {"scalars": self.scalars} | self.optimizer.arrays()

    def _reduced_states(self, cores: tuple[FloatArray, ...], rho: npt.NDArray[np.float64]) -> ReducedStates:
        request = self.request
        return reduced_states(
            self.space, request.weights, request.problem, request.n_values, cores=cores, rho=rho
        )

    def states(self, outputs: Outputs, complete: bool) -> ReducedStates:
        n = outputs.n_records
        cores = tuple(records[:n] for records in self.core_records)
        return self._reduced_states(cores, self.rho_records[:n])

    def current_states(self, outputs: Outputs) -> tuple[ReducedStates, npt.NDArray[np.int64]]:
        """Return the states of step 0, from which layers are reconstructed, and of the newest record."""
        newest = outputs.n_records - 1
        cores = tuple(
            np.stack([first, records[newest]])
            for first, records in zip(self._initial_cores, self.core_records, strict=True)
        )
        initial = [rho for family in self.space.families for rho in family.rho]
        rho = np.stack([np.array(initial, dtype=np.float64), self.rho_records[newest]])
        steps = np.array([0, outputs.record_steps[newest]], dtype=np.int64)
        return self._reduced_states(cores, rho), steps

    @cached_property
    def _initial_cores(self) -> list[FloatArray]:
        """The cores of W(0) in the bases, which may be those of another process."""
        weights, bases = self.request.weights, self.space.bases
        if isinstance(weights, ImplicitWeights) or not self._has_saved_space:
            return list(self.space.cores)
        return [bases[i + 1].T @ multiply(weight, bases[i]) for i, weight in enumerate(weights)]


def reduced_objective(space: Closure, problem: AnyProblem) -> types.Objective:
    """Return the small problem of the cores, for the core."""
    return {
        "target": space.target,
        "input_gram": space.input_gram,
        "input_factor": space.input_factor,
        "factor_target": space.factor_target,
        "loss_scale": problem.loss_scale,
        "loss_floor": problem.loss_floor,
        "observed": None,
        "measurements": None,
    }


def reduced_states(
    space: Closure,
    weights: Weights,
    problem: AnyProblem,
    n_values: int | None,
    *,
    cores: tuple[FloatArray, ...],
    rho: npt.NDArray[np.float64],
) -> ReducedStates:
    """Return the records of a reduced run, together with its initial layers."""
    return ReducedStates(
        bases=space.bases,
        cores=cores,
        families=space.families,
        rho=rho,
        target=space.target,
        input_gram=space.input_gram,
        layers=weights if isinstance(weights, ImplicitWeights) else ExplicitLayers(weights),
        n_values=n_values,
        loss_scale=problem.loss_scale,
    )


class DenseJob(CoreJob):
    """A run of whole layers: working copies of the weights, and the arrays of the records."""

    def __init__(self, request: Request) -> None:
        self.request = request
        assert not isinstance(request.weights, ImplicitWeights)
        self.initial = tuple(request.weights)
        # Working copies: W_l(0) belongs to the caller.
        self.weights = [aligned_copy(w) for w in self.initial]
        self.optimizer = OptimizerState(request, self.weights)
        n, dtype = request.n_records, request.dtype
        shapes = [w.shape for w in self.weights]
        counts = [min(*s, request.n_values if request.n_values is not None else min(s)) for s in shapes]
        tracked = counts if request.n_values != 0 else []
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
            self.left = [allocate_records((n, s[0], k), dtype) for s, k in zip(shapes, counts, strict=True)]
            self.right = [allocate_records((n, s[1], k), dtype) for s, k in zip(shapes, counts, strict=True)]
        every = request.weights_every
        self.snapshots = [allocate_records((request.n_snapshots, *s), dtype) for s in shapes] if every else []

    def run(self, arguments: types.Run) -> tuple[types.Outcome, int, int]:
        """Run; return the outcome, the last step, and the layer that grew most in a diverged run."""
        problem = self.request.problem
        assert not isinstance(problem, SampleProblem)
        values: types.DenseArguments = {
            **arguments,
            **problem.engine_arguments(self.request.dtype),
            **self.optimizer.arguments(),
            "snapshot_every": self.request.weights_every or 0,
            "values": self.values,
            "errors": self.errors,
            "signs": self.signs,
            "branches": self.branches,
            "clusters": self.clusters,
            "tracking": self.tracking,
            "tracker": {**core.TRACKER_DEFAULTS, "mode": cast("types.TrackerMode", self.request.tracking)},
            "velocity_norms": self.optimizer.velocity_norms(),
            # The factored form starts from W(0), so a resumed run cannot use it.
            "factored": self.request.tracking == "auto" and not self.optimizer.is_resumed,
            "initial": [] if self.optimizer.is_resumed else [np.ascontiguousarray(w) for w in self.initial],
            "left": self.left,
            "right": self.right,
            "snapshots": self.snapshots,
        }
        return core.dense_descent(self.weights, values)

    def replace_space(self, arrays: Mapping[str, npt.NDArray[Any]]) -> DenseJob:
        """Return the job, without snapshots that the folder of an earlier version did not begin with."""
        if self.request.default_weights_every is not None and "snapshots_0" not in arrays:
            self.request = replace(self.request, default_weights_every=None)
            self.snapshots = []
        return self

    def state_arrays(self) -> dict[str, FloatArray]:
        """Return the arrays that change during the run: its state."""
        return {f"weight_{i}": w for i, w in enumerate(self.weights)} | self.optimizer.arrays()

    def states(self, outputs: Outputs, complete: bool) -> DenseStates:
        """Return the records so far, with the final weights of a finished run."""
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


def bind_callback(
    job: Job,
    request: Request,
    certificate: Certificate,
    outputs: Outputs,
    earlier: Sequence[npt.NDArray[np.float64]] = (),
) -> Callback | None:
    """Return the callback of a request as a function of step and loss, with access to the running job.

    Parameters
    ----------
    job, request, certificate, outputs
        The run.
    earlier : sequence of ndarray
        Losses of the steps before those of `outputs`; read at each call.
    """
    if request.callback is None:
        return None

    def find_losses() -> npt.NDArray[np.float64]:
        return np.concatenate([*earlier, outputs.loss[: outputs.n_losses]])

    def read() -> tuple[Trajectory, int]:
        states, steps = job.current_states(outputs)
        run = make_trajectory(job, request, certificate, outputs, "unfinished", 0.0)
        run.states, run.steps = states, steps
        return run, len(steps) - 1

    return bind_state(request.callback, lambda step, loss: CallbackState(step, loss, find_losses, read))


def core_arguments(
    request: Request,
    outputs: Outputs,
    bar: ProgressBar,
    on_record: Callback | None,
    on_flush: Callable[[int], None] | None = None,
) -> types.Run:
    """Return the arguments that all engines have in common."""
    adaptive = request.adaptive
    return {
        "learning_rate": request.learning_rate.tolist(),
        "weight_decay": request.weight_decay.tolist(),
        "momentum": request.momentum.tolist(),
        "learning_rate_table": request.tables.learning_rate,
        "weight_decay_table": request.tables.weight_decay,
        "momentum_table": request.tables.momentum,
        "optimizer": core_rule(request.optimizer, request.widths, request.dtype),
        "steps": request.steps,
        "record_every": request.record_every,
        "tolerance": -1.0 if request.tolerance is None else request.tolerance,
        "n_threads": request.n_threads,
        "loss": outputs.loss,
        "record_steps": outputs.record_steps,
        "counts": outputs.counts,
        # A safety of 0 means constant rates.
        "safety": 0.0 if adaptive is None else adaptive.safety,
        "curvature": () if adaptive is None else adaptive.curvature,
        "error_scale": 1.0 if adaptive is None else adaptive.error_scale,
        "rate": outputs.rate,
        "on_record": on_record,
        "on_progress": bar.listener,
        "on_flush": on_flush,
        "first": outputs.begin,
        "flush_every": request.flush_every,
    }


def refuse_unread_options(job: Job, options: Options) -> None:
    """Raise for an option that is set but that the engine of the job does not read."""
    for key in sorted(options.added() - job.reads):
        raise ValueError(f"{key} is set, but engine={options.engine!r} does not read it")


def make_trajectory(
    job: Job, request: Request, certificate: Certificate, outputs: Outputs, outcome: str, seconds: float
) -> Trajectory:
    """Return the trajectory of the records so far."""
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
    """Run a job, and return its trajectory; an error gets the partial trajectory as an attribute."""
    outputs = Outputs(request)

    def trajectory(outcome: str) -> Trajectory:
        return make_trajectory(job, request, certificate, outputs, outcome, time.perf_counter() - start)

    try:
        on_record = bind_callback(job, request, certificate, outputs)
        outcome, step, layer = job.run(core_arguments(request, outputs, bar, on_record))
    except BaseException as error:
        if outputs.n_records > 0:
            partial = trajectory("interrupted")
            error.trajectory = partial  # type: ignore[attr-defined]
            error.add_note(f"the trajectory up to step {partial.steps[-1]} is in the attribute trajectory")
        raise
    if outcome == "diverged":
        partial_run = trajectory("diverged") if outputs.n_records > 0 else None
        raise DivergedError(
            divergence_text(request, step, layer), step=step, layer=layer, trajectory=partial_run
        )
    return trajectory(outcome)
