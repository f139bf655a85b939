# SPDX-License-Identifier: MIT
"""`train_batch`: many small reduced runs in one call, as phase diagrams need them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from ._arrays import (
    FloatArray,
    as_list,
    axes_of,
    is_array,
)
from ._dispatch import core
from ._errors import AssumptionError, ShapeError
from ._weight_checks import check_initial
from .checkpoint import Checkpoint, RunFolder, identity_of, terminating
from .closure import Certificate, Closure, step_flops
from .descent import Request, allocate_records, choose_engine, reduced_states, with_caution
from .files import Arrays
from .implicit import ImplicitWeights
from .operators import ExplicitLayers
from .problem import Problem
from .trajectory import ReducedStates, Trajectory, pack_problem

Layers = Sequence[npt.ArrayLike] | ImplicitWeights
#: One value for all, one per run, or one per run and layer.
PerRun = float | Sequence[float] | npt.NDArray[np.float64]

#: What is computed between two writings of a batch that is kept.
_PORTION_FLOPS: Final = 1e9


class Batch(Sequence[Trajectory]):
    """The trajectories of `train_batch`, in the order of its arguments.

    Attributes
    ----------
    loss : ndarray, shape (n_runs, steps + 1)
        The loss of every run at every step. Infinite from the step at which a run diverged; a run that
        came down to the tolerance keeps its last loss.
    outcomes : list of str
        "finished", "converged" or "diverged", for each run.
    wall_time : float
        Seconds for all of it.
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
        """Return the number of runs and how they ended."""
        counts = ", ".join(f"{self.outcomes.count(o)} {o}" for o in sorted(set(self.outcomes)))
        return f"Batch({len(self)} runs: {counts}; {self.wall_time:.3g} s)"


def train_batch(
    problems: Problem | Sequence[Problem],
    weights: Layers | Sequence[Layers],
    *,
    learning_rate: PerRun | str,
    steps: int,
    weight_decay: PerRun = 0.0,
    momentum: PerRun = 0.0,
    record_every: int | None = None,
    singular_values: str | int | None = "all",
    tolerance: float | None = None,
    n_threads: int = 0,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
) -> Batch:
    r"""Train many networks by the reduced engine in one call: seeds, scales, rates, depths, targets.

    Runs of equal shape descend side by side, one in each lane of a vector register, and groups of them on
    several threads. Every run is what `train` with ``engine="reduced"`` gives, to rounding.

    Parameters
    ----------
    problems : Problem or sequence of Problem
        One for all runs, or one per run.
    weights : list of arrays, ImplicitWeights, or a sequence of such
        ``W_1(0), .., W_L(0)`` for all runs, or one list (or law) per run.
    learning_rate : float, sequence of float, array of shape (n_runs, L), or "auto"
        ``eta``: for all runs, one per run, or one per run and layer; "auto" as in `train`.
    steps : int
        Number of updates of every run.
    weight_decay, momentum : float, sequence of float, or array of shape (n_runs, L)
        ``lambda`` and ``mu``, likewise.
    record_every : int, optional
        As in `train`; by default only the first and the last step are recorded.
    singular_values : {"all", None} or int
        How many singular values `Trajectory.singular_values` shows.
    tolerance : float, optional
        A run stops as soon as its loss is at most this.
    n_threads : int
        As in `train`.
    checkpoint : path or Checkpoint, optional
        A folder of this batch's own, to which groups of runs are written as they end: some seconds' worth, or
        ``Checkpoint(.., every=n_runs)``. The same call goes on with the runs that are missing. (`sweep` keeps
        every run in a folder of its own.)

    Returns
    -------
    Batch
        ``batch.loss`` for all runs at once, ``batch[i]`` for the trajectory of one.

    Raises
    ------
    AssumptionError
        If the active subspaces of a run do not close; a note on the error says of which.
    ShapeError
        If the arguments give different numbers of runs.
    TypeError, ValueError
        As `train` does.

    Notes
    -----
    A run that diverges is no error here: in a phase diagram it is a result. It is marked in
    ``batch.outcomes``, and the others go on.

    Cost: what `train` needs for a closure, once for each pair of a problem and a network (about a
    millisecond at d = 30; runs that differ in their rates alone share one); then per step and run about
    0.4 of a single run's time on one thread, where cores are at most 8 wide. Memory: steps + 1 losses, and
    the cores at the records, of every run.

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
        steps=steps,
        record_every=max(steps, 1) if record_every is None else record_every,
        singular_values=singular_values,
        vectors=False,
        weights_every=None,
        tolerance=tolerance,
        n_threads=n_threads,
        callback=None,
    )
    n_steps = plans[0].request.steps if plans else 0
    loss = np.full((len(plans), n_steps + 1), np.inf)
    runs: list[Trajectory | None] = [None] * len(plans)
    outcomes = [""] * len(plans)
    groups: dict[Any, list[int]] = {}
    for i, plan in enumerate(plans):
        groups.setdefault(plan.shape, []).append(i)
    with ExitStack() as stack:
        kept = None
        if checkpoint is not None:
            kept = stack.enter_context(_KeptRuns(Checkpoint.of(checkpoint), plans))
        for members in groups.values():
            for i, end in _ends(members, plans, kept):
                outcomes[i], runs[i] = end.outcome, end.trajectory
                if end.trajectory is None:
                    continue
                n_losses = len(end.trajectory.loss)
                loss[i, :n_losses] = end.trajectory.loss
                if end.outcome == "converged":
                    loss[i, n_losses:] = end.trajectory.loss[-1]
    return Batch(runs, loss, outcomes, time.perf_counter() - start)


def _ends(members: list[int], plans: list[Plan], kept: _KeptRuns | None) -> Iterator[tuple[int, End]]:
    """Yield how the runs of one shape end, with their numbers."""
    if kept is None:
        yield from zip(members, descend_together([plans[i] for i in members]), strict=True)
        return
    for some in kept.portions(members):
        ends = kept.read(some)
        if ends is None:
            kept.own()
            ends = kept.read(some)  # another owner may just have written it
        if ends is None:
            ends = descend_together([plans[i] for i in some])
            kept.write(some, ends)
        yield from zip(some, ends, strict=True)


class Plan(NamedTuple):
    """One run, checked, in its active subspaces."""

    request: Request
    certificate: Certificate
    space: Closure

    @property
    def shape(self) -> Any:
        """What runs must share to descend side by side."""
        space = self.space
        return (
            tuple(c.shape for c in space.cores),
            tuple((f.first, f.last) for f in space.families),
            space.input_gram is None,
            self.request.dtype.name,
        )


class End(NamedTuple):
    """How one run of a batch ended; one that diverged at step 0 has no trajectory."""

    outcome: str
    step: int
    layer: int
    trajectory: Trajectory | None


class _KeptRuns:
    """The runs of a batch that have ended, in a folder; files are named by the first run they hold."""

    def __init__(self, checkpoint: Checkpoint, plans: list[Plan]) -> None:
        self._plans = plans
        self._every = checkpoint.every
        arrays: Arrays = {}
        runs, problems = [], dict[int, Any]()
        seen: dict[int, int] = {}
        for plan in plans:
            request = plan.request
            pair = []
            for thing in (request.problem, request.weights):
                # The requests hold what they were given, so addresses name it; lists are made anew.
                parts = list(thing) if isinstance(thing, list) else [thing]
                for part in parts:
                    if id(part) not in seen:
                        seen[id(part)] = len(seen)
                        known = _add(part, f"{seen[id(part)]}_", arrays)
                        if known is not None:
                            problems[seen[id(part)]] = known
                    pair.append(seen[id(part)])
            law = request.weights.describe() if isinstance(request.weights, ImplicitWeights) else None
            runs.append({**request.settings("reduced"), "holds": pair, "law": law})
        settings = {"runs": runs, "problems": problems, "every": self._every}
        identity = identity_of(settings, arrays)
        self._folder = RunFolder(checkpoint.directory, identity, "dlnfast batch")
        self._owning: ExitStack | None = None
        if self._folder.exists:
            self._folder.check_request()

    def __enter__(self) -> _KeptRuns:
        return self

    def __exit__(self, *_: object) -> None:
        if self._owning is not None:
            self._owning.close()
        else:
            self._folder.tidy()

    def own(self) -> None:
        """Own the folder from now on: a batch that is only read needs no lock."""
        if self._owning is None:
            with ExitStack() as stack:
                stack.enter_context(terminating())
                stack.enter_context(self._folder.owned())
                self._folder.begin({"n_runs": len(self._plans)}, {})
                self._owning = stack.pop_all()

    def portions(self, members: list[int]) -> Iterator[list[int]]:
        """Yield the runs of one shape in groups that are written together."""
        plan = self._plans[members[0]]
        flops = step_flops(plan.space.cores)
        whole = max(1.0, plan.request.steps * (flops + 100.0))
        # Whole registers, and both threads of a small machine, are full with multiples of 32.
        count = self._every or int(np.clip(_PORTION_FLOPS / whole // 32, 1, 32)) * 32
        return (members[i : i + count] for i in range(0, len(members), count))

    def write(self, members: list[int], ends: list[End]) -> None:
        """Keep how these runs ended."""
        about, arrays = [], Arrays()
        for n, (i, end) in enumerate(zip(members, ends, strict=True)):
            found = None
            if end.trajectory is not None:
                problem = end.trajectory.problem
                if not isinstance(self._plans[i].request.weights, ImplicitWeights):
                    end.trajectory.problem = None  # the caller has it
                found, its_own = end.trajectory.to_arrays(weights=False)
                end.trajectory.problem = problem
                arrays |= {f"{n}:{name}": array for name, array in its_own.items()}
            about.append({"outcome": end.outcome, "step": end.step, "layer": end.layer, "run": found})
        self._folder.write_records(members[0], arrays, {"members": members, "runs": about})

    def read(self, members: list[int]) -> list[End] | None:
        """Return how these runs ended, if that was written."""
        found = self._folder.read_records(members[0])
        if found is None:
            return None
        about, arrays = found
        if about["members"] != members:
            raise ValueError(f"{self._folder.path} holds runs {about['members']}; wanted {members}")
        ends = []
        for n, (i, end) in enumerate(zip(members, about["runs"], strict=True)):
            run = None
            if end["run"] is not None:
                own = {name.partition(":")[2]: a for name, a in arrays.items() if name.startswith(f"{n}:")}
                request = self._plans[i].request
                run = Trajectory.from_arrays(end["run"], own, request.problem)
                if not isinstance(request.weights, ImplicitWeights):
                    assert isinstance(run.states, ReducedStates)
                    run.states = replace(run.states, layers=ExplicitLayers(request.weights))
            ends.append(End(end["outcome"], end["step"], end["layer"], run))
        return ends


def _add(part: Any, name: str, arrays: Arrays) -> dict[str, Any] | None:
    """Put a problem or matrix among the arrays that identify a batch; return what else defines it."""
    if isinstance(part, Problem):
        own: Arrays = {}
        known = pack_problem(part, own)
        arrays |= {name + key: array for key, array in own.items()}
        return known
    if not isinstance(part, ImplicitWeights):  # a law is described elsewhere
        arrays[name] = part
    return None


class _Result(NamedTuple):
    """What one run left."""

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
        as_list(rate, name, several) if is_array(rate) and axes_of(rate, name) > 0 else rate
        for name, rate in by_name.items()
    ]
    for name, rate in zip(by_name, rates, strict=True):
        lengths[name] = len(rate) if _is_per_run(rate) else None
    counts = {n for n in lengths.values() if n is not None}
    if len(counts) > 1:
        given = ", ".join(f"{name}: {n}" for name, n in lengths.items() if n is not None)
        raise ShapeError(f"the arguments give different numbers of runs ({given}); wanted one number")
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
    """Check one run; `closures` holds what is known of the pairs of objects that came before."""
    if not isinstance(problem, Problem):
        raise TypeError(f"problems holds {type(problem).__name__}; wanted dlnfast.Problem")
    request = Request.checked(
        problem,
        check_initial(network, problem),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        momentum=momentum,
        **common,
    )
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
    """Return whether this is one network, a law or a list of matrices, and not a list of networks."""
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
    begin = time.perf_counter()
    results = _descend(plans)
    seconds = (time.perf_counter() - begin) / len(plans)
    return [
        End(r.outcome, r.step, r.layer, _trajectory(plan, r, seconds) if len(r.loss) else None)
        for plan, r in zip(plans, results, strict=True)
    ]


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
            "input_gram": _stacked([space.input_gram for space in spaces]),
            "input_factor": _stacked([space.input_factor for space in spaces]),
            "factor_target": _stacked([space.factor_target for space in spaces]),
            "families": [(f.first - 1, len(f.rho)) for f in families],
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


def _stacked(matrices: list[FloatArray | None]) -> FloatArray | None:
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
        states=reduced_states(request, plan.space, result.cores, result.rho),
        certificate=plan.certificate,
        problem=request.problem,
        config=request.describe("reduced", result.outcome),
        wall_time=seconds,
    )
