# SPDX-License-Identifier: MIT
"""`train_batch`: many small reduced runs in one call, for phase diagrams."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from .._closure.certificate import Certificate, step_flops
from .._closure.subspaces import Closure
from .._problem.problem import Problem
from .._support.arrays import FloatArray, as_list, count_axes, is_array
from .._support.checkpoint import Checkpoint, RunFolder
from .._support.checksums import compute_identity
from .._support.dispatch import core
from .._support.errors import AssumptionError, ShapeError
from .._support.files import Arrays
from .._support.moved import refuse_keywords
from .._support.progress import ProgressBar
from .._support.schedule import Schedule
from .._trajectory.problem_packing import pack_problem
from .._trajectory.trajectory import Trajectory
from .._weights.checks import check_initial
from .._weights.implicit import ImplicitWeights
from ..optimizers import Optimizer
from .choice import choose_engine
from .jobs import Outputs, ReducedJob, allocate_records, core_arguments, make_trajectory, reduced_states
from .options import MOVED_OPTIONS, Options, Record
from .rates import ADAPTIVE_RATE, make_request, with_caution
from .request import Request
from .resumable import Records, ResumableWork, run_resumable

Layers = Sequence[npt.ArrayLike] | ImplicitWeights
#: One value for all, one per run, or one per run and layer.
PerRun = float | Schedule | Sequence[float | Schedule] | npt.NDArray[np.float64]

#: Flops between two flushes of a batch.
_GROUP_FLOPS: Final = 1e9


class Batch(Sequence[Trajectory]):
    """The trajectories of `train_batch`, in the order of its arguments.

    Attributes
    ----------
    loss : ndarray, shape (n_runs, steps + 1)
        Loss of every run at every step. Infinite from the step at which a run diverged; the last loss is
        repeated after a run that reached the tolerance.
    outcomes : list of str
        Outcome of each run: "finished", "converged" or "diverged".
    wall_time : float
        Seconds for the whole batch.
    """

    def __init__(
        self,
        runs: Sequence[Trajectory | None],
        loss: npt.NDArray[np.float64],
        outcomes: list[str],
        wall_time: float,
    ) -> None:
        self._runs = list(runs)
        self.loss = loss
        self.outcomes = outcomes
        self.wall_time = wall_time

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self._runs)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...

    @overload
    def __getitem__(self, index: slice) -> list[Trajectory]: ...

    def __getitem__(self, index: int | slice) -> Trajectory | list[Trajectory]:
        """Return a run, or several; one that diverged ends with its last record before that."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        run = self._runs[index]
        if run is None:
            raise ValueError(f"run {index} diverged at step 0: it has no trajectory")
        return run

    def __iter__(self) -> Iterator[Trajectory]:
        """Iterate over the runs."""
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        """Return the number of runs and their outcomes."""
        counts = ", ".join(f"{self.outcomes.count(o)} {o}" for o in sorted(set(self.outcomes)))
        return f"Batch({len(self)} runs: {counts}; {self.wall_time:.3g} s)"


@refuse_keywords(MOVED_OPTIONS)
def train_batch(
    problems: Problem | Sequence[Problem],
    weights: Layers | Sequence[Layers],
    *,
    learning_rate: PerRun | str,
    steps: int,
    weight_decay: PerRun = 0.0,
    momentum: PerRun = 0.0,
    optimizer: str | Optimizer = "gd",
    record: Record | None = None,
    tolerance: float | None = None,
    n_threads: int = 0,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
) -> Batch:
    r"""Train many networks by the reduced engine in one call: seeds, scales, rates, depths, targets.

    Runs of equal shape descend side by side, one in each lane of a vector register, and groups of them on
    several threads. Every run equals that of `train` with ``engine="reduced"``, up to rounding errors.

    Parameters
    ----------
    problems : Problem or sequence of Problem
        One for all runs, or one per run.
    weights : list of arrays, ImplicitWeights, or a sequence of such
        ``W_1(0), .., W_L(0)`` for all runs, or one list (or lazily sampled weights) per run.
    learning_rate : float, Schedule, sequence of these, array of shape (n_runs, L), or "auto"
        ``eta``: for all runs, one per run, or one per run and layer; "auto" and `Schedule` as in `train`.
    steps : int
        Number of updates of every run.
    weight_decay, momentum : float, Schedule, sequence of these, or array of shape (n_runs, L)
        ``lambda`` and ``mu``, likewise.
    optimizer : str or Optimizer
        Update rule of all runs, as in `train`.
    record : Record, optional
        Steps of the records, and number of singular values in `Trajectory.singular_values`. By default the
        first and the last step, with all singular values. Its other options must have their defaults.
    tolerance : float, optional
        A run stops as soon as its loss is at most this.
    n_threads : int
        Number of threads, as in `train`.
    checkpoint : path or Checkpoint, optional
        Folder for this batch alone, to which groups of runs are written when they are finished: as many as
        take some seconds, or ``Checkpoint(.., every=n_runs)``. The same call computes the missing runs.
        (`sweep` writes every run to a folder of its own.)

    Returns
    -------
    Batch
        ``batch.loss`` for all runs at once, ``batch[i]`` for the trajectory of one.

    Raises
    ------
    AssumptionError
        If the active subspaces of a run do not close; a note on the error names the run.
    ShapeError
        If the arguments give different numbers of runs.
    TypeError, ValueError
        As `train` does.

    Notes
    -----
    A run that diverges is no error here: in a phase diagram it is a result. It is marked in
    ``batch.outcomes``, and the others continue.

    Cost: that of a closure in `train`, once for each pair of a problem and a network (about a
    millisecond at d = 30; runs that differ in their rates alone share one); then per step and run about
    0.4 of a single run's time on one thread, where cores are at most 8 wide; runs with a `Schedule` or
    another rule than gradient descent take the time of single runs, one after the other. Memory: steps + 1
    losses, and the cores at the records, of every run.

    Examples
    --------
    >>> import dlnfast as dln
    >>> problem = dln.low_rank_recovery(dim=30, rank=3)
    >>> starts = [dln.orthogonal([30] * 4, scale=eps) for eps in (0.25, 0.5, 1.0)]
    >>> batch = dln.train_batch(problem, starts, learning_rate=1.0, steps=50)
    >>> batch.loss.shape, round(float(batch[2].rho(1)[-1]), 4)
    ((3, 51), 0.951)
    """
    start = time.perf_counter()
    plans = _plan(
        problems,
        weights,
        learning_rate,
        weight_decay,
        momentum,
        optimizer=optimizer,
        steps=steps,
        record=_check_record(record, steps),
        tolerance=tolerance,
        n_threads=n_threads,
    )
    n_steps = plans[0].request.steps if plans else 0
    loss = np.full((len(plans), n_steps + 1), np.inf)
    runs: list[Trajectory | None] = [None] * len(plans)
    outcomes = [""] * len(plans)
    work = _BatchRun(plans, None if checkpoint is None else Checkpoint.of(checkpoint))
    run_resumable(work.folder, work)
    for i, end in work.ends.items():
        outcomes[i], runs[i] = end.outcome, end.trajectory
        if end.trajectory is None:
            continue
        n_losses = len(end.trajectory.loss)
        loss[i, :n_losses] = end.trajectory.loss
        if end.outcome == "converged":
            loss[i, n_losses:] = end.trajectory.loss[-1]
    return Batch(runs, loss, outcomes, time.perf_counter() - start)


def _check_record(record: Record | None, steps: int) -> Record:
    """Return the records of a batch, or raise for options that only single runs have."""
    if record is None:
        return Record(every=max(steps, 1))
    if isinstance(record, Record) and record != Record(record.every, record.singular_values):
        raise ValueError(
            f"record is {record}; train_batch takes every and singular_values only, train takes all options"
        )
    return record


class Plan(NamedTuple):
    """One run, checked, in its active subspaces."""

    request: Request
    certificate: Certificate
    space: Closure

    @property
    def shape(self) -> Any:
        """Shapes and precision that runs must share to descend side by side."""
        space = self.space
        return (
            tuple(c.shape for c in space.cores),
            tuple((f.first, f.last) for f in space.families),
            space.input_gram is None,
            self.request.dtype.name,
        )


class End(NamedTuple):
    """Outcome of one run of a batch; a run that diverged at step 0 has no trajectory."""

    outcome: str
    step: int
    layer: int
    trajectory: Trajectory | None


class _BatchRun(ResumableWork):
    """A batch as resumable work: groups of runs of one shape, one after the other.

    Without a folder all runs of one shape are one group. The files of a folder are named by the first run of
    their group.
    """

    has_states = False

    def __init__(self, plans: list[Plan], checkpoint: Checkpoint | None) -> None:
        self._plans = plans
        self.ends: dict[int, End] = {}
        by_shape: dict[Any, list[int]] = {}
        for i, plan in enumerate(plans):
            by_shape.setdefault(plan.shape, []).append(i)
        #: The group that was computed last, until it is written.
        self._computed: list[int] = []
        self.folder: RunFolder | None = None
        if checkpoint is None:
            self._groups = list(by_shape.values())
        else:
            self._groups = [
                group for members in by_shape.values() for group in self._split(members, checkpoint.every)
            ]
            identity = _identity(plans, checkpoint.every)
            self.folder = RunFolder(checkpoint.directory, identity, "dlnfast batch")

    def _split(self, members: list[int], every: int | None) -> Iterator[list[int]]:
        """Split the runs of one shape into groups that are written together."""
        plan = self._plans[members[0]]
        flops = step_flops(plan.space.cores)
        whole = max(1.0, plan.request.steps * (flops + 100.0))
        # Multiples of 32 fill the vector registers of both threads of a small machine.
        count = every or int(np.clip(_GROUP_FLOPS / whole // 32, 1, 32)) * 32
        return (members[i : i + count] for i in range(0, len(members), count))

    @property
    def is_finished(self) -> bool:
        """Whether all runs are computed or loaded."""
        return len(self.ends) == len(self._plans)

    def request(self) -> tuple[dict[str, Any], Arrays]:
        """Return the number of runs; the identity stands for everything else."""
        return {"n_runs": len(self._plans)}, {}

    def advance(self, flush: Callable[[], None]) -> None:
        """Run the groups that are missing, and flush after each."""
        for group in self._groups:
            if group[0] in self.ends:
                continue
            ends = descend_together([self._plans[i] for i in group])
            self.ends |= zip(group, ends, strict=True)
            self._computed = group
            flush()
            self._computed = []

    def records_since(self, step: int) -> Records | None:
        """Return the outcomes of the group that was computed last."""
        del step
        if not self._computed:
            return None
        members, runs, arrays = self._computed, [], Arrays()
        for n, i in enumerate(members):
            end, found = self.ends[i], None
            if end.trajectory is not None:
                found, its_own = self._pack(end.trajectory, i)
                arrays |= {f"{n}:{name}": array for name, array in its_own.items()}
            runs.append({"outcome": end.outcome, "step": end.step, "layer": end.layer, "run": found})
        return Records(members[0], arrays, {"members": members, "runs": runs})

    def _pack(self, run: Trajectory, i: int) -> tuple[dict[str, Any], Arrays]:
        """Return a trajectory as metadata and arrays, without the problem unless the weights are drawn."""
        problem = run.problem
        if not isinstance(self._plans[i].request.weights, ImplicitWeights):
            run.problem = None  # the caller has it
        try:
            return run.to_arrays(weights=False)
        finally:
            run.problem = problem

    def restore(self, storage: RunFolder) -> None:
        """Load the groups that are in the folder."""
        for group in self._groups:
            found = storage.read_records(group[0])
            if found is not None:
                self.ends |= zip(group, self._unpack(storage, group, *found), strict=True)

    def _unpack(
        self, storage: RunFolder, members: list[int], metadata: dict[str, Any], arrays: Arrays
    ) -> list[End]:
        if metadata["members"] != members:
            raise ValueError(f"{storage.path} holds runs {metadata['members']}; wanted {members}")
        ends = []
        for n, (i, end) in enumerate(zip(members, metadata["runs"], strict=True)):
            run = None
            if end["run"] is not None:
                own = {name.partition(":")[2]: a for name, a in arrays.items() if name.startswith(f"{n}:")}
                request = self._plans[i].request
                run = Trajectory.from_arrays(end["run"], own, request.problem)
                if run.states.initial_weights() is None:
                    run.states = run.states.replace_initial_weights(request.weights)
            ends.append(End(end["outcome"], end["step"], end["layer"], run))
        return ends


def _identity(plans: list[Plan], every: int | None) -> str:
    """Return the identity of a batch: problems, weights and settings of all runs."""
    arrays: Arrays = {}
    runs: list[dict[str, Any]] = []
    problems: dict[int, Any] = {}
    seen: dict[int, int] = {}
    for plan in plans:
        request = plan.request
        pair = []
        for thing in (request.problem, request.weights):
            # The requests hold the caller's objects, so their addresses name them; lists are copies.
            parts = list(thing) if isinstance(thing, list) else [thing]
            for part in parts:
                if id(part) not in seen:
                    seen[id(part)] = len(seen)
                    known = _add(part, f"{seen[id(part)]}_", arrays)
                    if known is not None:
                        problems[seen[id(part)]] = known
                pair.append(seen[id(part)])
        sampled = None
        if isinstance(request.weights, ImplicitWeights):
            sampled = request.weights.describe()
            assert isinstance(request.problem, Problem)
            factors = request.problem.target_factors()
            if not request.weights.is_determined_by(factors.V, factors.U):
                # Earlier queries have determined numbers too.
                arrays |= {
                    f"cores of run {len(runs)}, {i}": core_ for i, core_ in enumerate(plan.space.cores)
                }
        runs.append({**request.settings("reduced"), "holds": pair, "law": sampled})
    return compute_identity({"runs": runs, "problems": problems, "every": every}, arrays)


def _add(part: Any, name: str, arrays: Arrays) -> dict[str, Any] | None:
    """Put a problem or matrix among the arrays that identify a batch; return its other settings."""
    if isinstance(part, Problem):
        own: Arrays = {}
        known = pack_problem(part, own)
        arrays |= {name + key: array for key, array in own.items()}
        return known
    if not isinstance(part, ImplicitWeights):  # which are described in the settings
        arrays[name] = part
    return None


class _Result(NamedTuple):
    """Result of one run."""

    outcome: str
    step: int
    layer: int
    loss: npt.NDArray[np.float64]
    n_records: int
    cores: tuple[FloatArray, ...]
    rho: npt.NDArray[np.float64]


def _plan(
    problems: Problem | Sequence[Problem],
    weights: Any,
    learning_rate: PerRun | str,
    weight_decay: PerRun,
    momentum: PerRun,
    **common: Any,
) -> list[Plan]:
    several = "one for all runs, or a list with one for each"
    many_problems = None if isinstance(problems, Problem) else as_list(problems, "problems", several)
    many_weights = None if _is_one_network(weights) else as_list(weights, "weights", several)
    lengths = {
        "problems": None if many_problems is None else len(many_problems),
        "weights": None if many_weights is None else len(many_weights),
    }
    by_name = {"learning_rate": learning_rate, "weight_decay": weight_decay, "momentum": momentum}
    rates: list[Any] = [
        as_list(rate, name, several) if is_array(rate) and count_axes(rate, name) > 0 else rate
        for name, rate in by_name.items()
    ]
    for name, rate in zip(by_name, rates, strict=True):
        lengths[name] = len(rate) if _is_per_run(rate) else None
    counts = {n for n in lengths.values() if n is not None}
    if len(counts) > 1:
        numbers = ", ".join(f"{name}: {n}" for name, n in lengths.items() if n is not None)
        raise ShapeError(f"the arguments give different numbers of runs ({numbers}); wanted one number")
    plans = []
    closures: dict[tuple[int, int], tuple[Certificate, Closure | None]] = {}
    for i in range(counts.pop() if counts else 1):
        problem = problems if many_problems is None else many_problems[i]
        network = weights if many_weights is None else many_weights[i]
        eta, decay, mu = (r[i] if _is_per_run(r) else r for r in rates)
        try:
            plans.append(_plan_one(problem, network, eta, decay, mu, common, closures))
        except Exception as error:
            error.add_note(f"in run {i} of the batch")
            raise
    return plans


def _plan_one(
    problem: Any,
    network: Any,
    learning_rate: Any,
    weight_decay: Any,
    momentum: Any,
    common: dict[str, Any],
    closures: dict[tuple[int, int], tuple[Certificate, Closure | None]],
) -> Plan:
    """Check one run; `closures` caches the results of earlier pairs of problem and network."""
    if not isinstance(problem, Problem):
        raise TypeError(f"problems holds {type(problem).__name__}; wanted dlnfast.Problem")
    options = Options(
        learning_rate=learning_rate, weight_decay=weight_decay, momentum=momentum, engine="reduced", **common
    )
    if options.adaptive is not None:
        raise ValueError(ADAPTIVE_RATE)
    request = make_request(options.checked(), problem, check_initial(network, problem))
    # The caller holds both objects as long as the batch is planned, so their addresses name them.
    pair = (id(problem), id(network))
    if pair not in closures:
        closures[pair] = choose_engine("reduced", problem, request.weights)
    certificate, space = closures[pair]
    if space is None:
        raise AssumptionError(f"train_batch runs the reduced engine; here: {certificate}")
    return Plan(request, with_caution(certificate, request), space)


def _is_per_run(rate: Any) -> bool:
    """Return whether a rate has an entry per run: a list, whose entries may be lists."""
    return isinstance(rate, (list, tuple))


def _is_one_network(weights: Any) -> bool:
    """Return whether this is one network, not a list of networks."""
    return isinstance(weights, ImplicitWeights) or _axes(weights) == 3


def _axes(value: Any) -> int:
    """Return how deep arrays or lists are nested; lists of matrices need not be of equal shapes."""
    if hasattr(value, "ndim"):
        return int(value.ndim)
    if isinstance(value, (list, tuple)):
        return 1 + (_axes(value[0]) if value else 0)
    return 3 if isinstance(value, ImplicitWeights) else 0


def descend_together(plans: list[Plan]) -> list[End]:
    """Run plans of equal shape and schedule in one call of the core."""
    if any(plan.request.is_scheduled or plan.request.optimizer is not None for plan in plans):
        return [_descend_alone(plan) for plan in plans]
    begin = time.perf_counter()
    results = _descend(plans)
    seconds = (time.perf_counter() - begin) / len(plans)
    return [
        End(r.outcome, r.step, r.layer, _trajectory(plan, r, seconds) if len(r.loss) else None)
        for plan, r in zip(plans, results, strict=True)
    ]


def _descend_alone(plan: Plan) -> End:
    """Run one plan as `train` does, with the rates of every step and any update rule."""
    begin = time.perf_counter()
    job, outputs = ReducedJob(plan.request, plan.space), Outputs(plan.request)
    outcome, step, layer = job.run(core_arguments(plan.request, outputs, ProgressBar(0, False), None))
    if outputs.n_records == 0:
        return End(outcome, step, layer, None)
    seconds = time.perf_counter() - begin
    run = make_trajectory(job, plan.request, plan.certificate, outputs, outcome, seconds)
    return End(outcome, step, layer, run)


def _descend(plans: list[Plan]) -> list[_Result]:
    request, spaces = plans[0].request, [plan.space for plan in plans]
    n, n_layers, dtype = len(plans), len(spaces[0].cores), request.dtype
    families = spaces[0].families
    n_scalars = sum(len(f.rho) for f in families)
    loss = allocate_records((n, request.steps + 1), np.dtype(np.float64))
    cores = [np.stack([space.cores[i] for space in spaces]) for i in range(n_layers)]
    core_records = [allocate_records((n, request.n_records, *c.shape[1:]), dtype) for c in cores]
    rho_records = allocate_records((n, request.n_records, n_scalars), np.dtype(np.float64))
    counts = np.zeros((n, 2), dtype=np.int64)
    results = core.batch_descent(
        cores,
        {
            "target": np.stack([space.target for space in spaces]),
            "input_gram": _stack([space.input_gram for space in spaces]),
            "input_factor": _stack([space.input_factor for space in spaces]),
            "factor_target": _stack([space.factor_target for space in spaces]),
            "families": [{"first": f.first - 1, "length": len(f.rho)} for f in families],
            "rho": np.array([[r for f in s.families for r in f.rho] for s in spaces]).reshape(n, n_scalars),
            "multiplicity": _table([[float(f.multiplicity) for f in s.families] for s in spaces]),
            "coupling": _table([[f.coupling for f in s.families] for s in spaces]),
            "learning_rate": np.stack([plan.request.learning_rate for plan in plans]),
            "weight_decay": np.stack([plan.request.weight_decay for plan in plans]),
            "momentum": np.stack([plan.request.momentum for plan in plans]),
            "loss_scale": np.array([[plan.request.problem.loss_scale] for plan in plans]),
            "loss_floor": np.array([[plan.request.problem.loss_floor] for plan in plans]),
            "steps": request.steps,
            "record_every": request.record_every,
            "tolerance": -1.0 if request.tolerance is None else request.tolerance,
            "n_threads": request.n_threads,
            "loss": loss,
            "core_records": core_records,
            "rho_records": rho_records,
            "counts": counts,
        },
    )
    return [
        _Result(
            *result,
            loss[i, : counts[i, core.Count.losses]],
            int(counts[i, core.Count.records]),
            tuple(records[i, : counts[i, core.Count.records]] for records in core_records),
            rho_records[i, : counts[i, core.Count.records]],
        )
        for i, result in enumerate(results)
    ]


def _stack(matrices: list[FloatArray | None]) -> FloatArray | None:
    """Return the matrices as one array, None for white inputs, which have none.

    Factors of S may have different ranks: columns of zeros add nothing.
    """
    held = [m for m in matrices if m is not None]
    if not held:
        return None
    most = max(m.shape[1] for m in held)
    return np.stack([np.pad(m, ((0, 0), (0, most - m.shape[1]))) for m in held])


def _table(rows: list[list[float]]) -> npt.NDArray[np.float64]:
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(rows[0]))


def _trajectory(plan: Plan, result: _Result, seconds: float) -> Trajectory:
    request, last = plan.request, len(result.loss) - 1
    steps = np.minimum(np.arange(result.n_records, dtype=np.int64) * request.record_every, last)
    return Trajectory(
        steps=steps,
        loss=result.loss,
        states=reduced_states(
            plan.space,
            request.weights,
            request.problem,
            request.n_values,
            cores=result.cores,
            rho=result.rho,
        ),
        certificate=plan.certificate,
        problem=request.problem,
        config=request.describe("reduced", result.outcome),
        wall_time=seconds,
    )
