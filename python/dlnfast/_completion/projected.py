# SPDX-License-Identifier: MIT
"""Observations projected onto fixed bases, and runs on the projected problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .._closure.certificate import Certificate
from .._problem.observations import Completion, Observations, Sensing
from .._support.arrays import FloatArray, check_count, check_scale
from .._support.checkpoint import Checkpoint, RunFolder, State
from .._support.checksums import compute_identity
from .._support.files import Arrays
from .._support.schedule import Schedule, read_stored_rate
from .._training.callbacks import Callback, refuse_state
from .._training.options import Record
from .._training.resumable import ResumableWork, replay_records, run_resumable
from .._training.train import train
from .._trajectory.dense import DenseStates
from .._trajectory.problem_packing import pack_problem
from .._trajectory.trajectory import Trajectory


def project(problem: Observations, U: npt.ArrayLike, V: npt.ArrayLike) -> Sensing:
    """Project observations of ``U X V^T`` onto the bases: as few measurements of X as it has entries.

    Parameters
    ----------
    problem : Completion or Sensing
        n observations.
    U, V : array_like, shape (d_y, a) and (d_x, b)
        Any matrices.

    Returns
    -------
    Sensing
        Measurements of X (a, b), with the same loss: the triangular factor of a QR decomposition instead of
        the n observations. `loss_floor` is the loss that remains for every X.

    Notes
    -----
    2 n (a b)^2 flops once.
    """
    left, right = np.asarray(U, dtype=np.float64), np.asarray(V, dtype=np.float64)
    a, b = left.shape[1], right.shape[1]
    size = a * b
    triangle: FloatArray = np.empty((0, size + 1))
    chunk = max(4 * size, 2**22 // size)
    for begin in range(0, problem.n_observations, chunk):
        part = slice(begin, begin + chunk)
        rows = _project_rows(problem, left, right, part)
        known = problem.values[part, np.newaxis]
        triangle = np.asarray(np.linalg.qr(np.vstack([triangle, np.hstack([rows, known])]), mode="r"))
    n_rows = min(len(triangle), size)
    floor = float(np.sum(triangle[n_rows:, size] ** 2))
    projected = Sensing(
        triangle[:n_rows, :size].reshape(n_rows, a, b), triangle[:n_rows, size], loss_scale=problem.loss_scale
    )
    projected.loss_floor = problem.loss_scale / 2 * floor
    projected.reduction = problem.reduction
    projected._source = {"name": "projected", "of": problem.describe()}
    return projected


def _project_rows(problem: Observations, U: FloatArray, V: FloatArray, part: slice) -> FloatArray:
    if isinstance(problem, Completion):
        u, v = U[problem.rows[part]], V[problem.columns[part]]
        return (u[:, :, np.newaxis] * v[:, np.newaxis, :]).reshape(len(u), -1)
    assert isinstance(problem, Sensing)
    return problem.projected(U, V, part).reshape(-1, U.shape[1] * V.shape[1])


def train_projected(
    problem: Observations, narrow: list[FloatArray], learning_rate: Any, settings: dict[str, Any]
) -> Trajectory:
    """Train the layers between the first and the last, and return the run of all layers.

    The trajectory on an exception has all layers, too.
    """
    first, *cores, last = narrow
    refuse_state(settings["record"].callback, "train_compressed with frozen outer layers")
    small = project(problem, last, first.T)
    try:
        run = train(small, cores, learning_rate=learning_rate, engine="dense", **settings)
    except BaseException as error:
        inner = getattr(error, "trajectory", None)
        if inner is not None:
            error.trajectory = _add_outer_layers(problem, first, inner, last)  # type: ignore[attr-defined]
        raise
    return _add_outer_layers(problem, first, run, last)


def _add_outer_layers(
    problem: Observations, first: FloatArray, run: Trajectory, last: FloatArray
) -> Trajectory:
    """Add the frozen outer layers to a run of the inner ones."""
    config = dict(run.config)
    for name in ("learning_rate", "weight_decay", "momentum"):
        config[name] = _add_outer_rates(config[name], run.n_layers, config["steps"])
    config["widths"] = [problem.dim_in, *config["widths"], problem.dim_out]
    config["problem"] = problem.describe()
    return Trajectory(
        steps=run.steps,
        loss=run.loss,
        states=run.states.enclose(first, last, run),
        certificate=run.certificate,
        problem=problem,
        config=config,
        wall_time=run.wall_time,
        rates=run.rates,
    )


def _add_outer_rates(
    inner: list[float] | dict[str, Any], n_inner: int, n_steps: int
) -> list[float] | dict[str, Any]:
    """Return the rates of all layers, or the definition of their schedule: zero for the outer ones."""
    if isinstance(inner, list):
        return [0.0, *inner, 0.0]
    rates = read_stored_rate(inner, n_inner, max(n_steps, 1))
    return Schedule.from_values(np.pad(rates, ((0, 0), (1, 1)))).to_dict()


def train_in_turns(
    problem: Observations,
    narrow: list[FloatArray],
    learning_rate: Any,
    outer: float,
    turn: int,
    settings: dict[str, Any],
) -> Trajectory:
    """Train the inner layers for `turn` steps at a time between steps of the outer ones."""
    wanted = dict(settings)
    checkpoint = wanted.pop("checkpoint", None)
    n_steps = check_count(wanted.pop("steps"), "steps", minimum=0)
    record = wanted.pop("record").checked(n_steps)
    if record.n_values != 0 or record.vectors:
        raise ValueError(
            "singular_values and vectors are not recorded with outer_every above 1: "
            "record=dln.Record(singular_values=None)"
        )
    if np.any(np.asarray(wanted.get("momentum", 0.0)) != 0):
        raise ValueError("a step of the outer layers resets the momentum: set outer_every=1")
    record_every, weights_every = (
        -(-(max(n_steps, 1) if every is None else every) // turn) * turn
        for every in (record.every, record.weights_every)
    )
    decay = check_scale(wanted.get("weight_decay", 0.0), "weight_decay (lambda)")
    work = _AlternatingRun(
        problem,
        narrow,
        learning_rate=learning_rate,
        outer=outer,
        turn=turn,
        decay=decay,
        n_steps=n_steps,
        record_every=record_every,
        snapshot_every=None if record.weights_every is None else weights_every,
        callback=refuse_state(record.callback, "train_compressed with outer_every above 1"),
        options=wanted,
    )
    if checkpoint is None:
        run_resumable(None, work)
    else:
        target = Checkpoint.of(checkpoint)
        rules = {"learning_rate": repr(learning_rate), "turn": turn, "weights_every": weights_every}
        rules |= {name: repr(value) for name, value in wanted.items()}
        run_resumable(work.make_folder(target, rules), work, seconds=target.seconds)
    return work.trajectory()


class _AlternatingRun(ResumableWork):
    """A run in turns, as resumable work: the inner layers train for some steps, then the outer ones move."""

    def __init__(
        self,
        problem: Observations,
        narrow: list[FloatArray],
        *,
        learning_rate: Any,
        outer: float,
        turn: int,
        decay: float,
        n_steps: int,
        record_every: int,
        snapshot_every: int | None,
        callback: Callback | None,
        options: dict[str, Any],
    ) -> None:
        self.problem, self.narrow, self.outer, self.decay = problem, narrow, outer, decay
        self._learning_rate, self._turn, self._options = learning_rate, turn, options
        self.n_steps, self.record_every, self._snapshot_every = n_steps, record_every, snapshot_every
        self._callback = callback
        self._layers = [layer.copy() for layer in narrow]
        self.step = 0
        self._records: list[int] = []
        #: Settings of the last turn.
        self._config: dict[str, Any] | None = None
        self._losses: list[FloatArray] = []
        self._rates: list[FloatArray] = []
        self._adapts = False
        self._snapshots: list[list[FloatArray]] = []
        self._snapshot_steps: list[int] = []
        #: Outcome and last loss of a finished run.
        self._end: tuple[str | None, FloatArray] = (None, np.empty(0))
        self._request: dict[str, Any] = {}

    def make_folder(self, checkpoint: Checkpoint, rules: dict[str, Any]) -> RunFolder:
        """Return the folder of this run, which has these settings."""
        arrays: Arrays = {f"layer_{i}": layer for i, layer in enumerate(self.narrow)}
        rules |= {"problem": pack_problem(self.problem, arrays), "outer": self.outer, "decay": self.decay}
        rules |= {"steps": self.n_steps, "record_every": self.record_every}
        self._request = {"rules": rules}
        return RunFolder(checkpoint.directory, compute_identity(rules, arrays), "dlnfast run in turns")

    # -------------------------------------------------------------------------------- resumable work

    @property
    def is_finished(self) -> bool:
        """Whether the run has an outcome."""
        return self._end[0] is not None

    def request(self) -> tuple[dict[str, Any], Arrays]:
        """Return the settings; the identity stands for problem and weights."""
        return self._request, {}

    def state(self) -> State | None:
        """Return the layers and everything recorded so far; None within a turn."""
        arrays: Arrays = {f"layer_{i}": layer for i, layer in enumerate(self._layers)}
        for i, snapshots in enumerate(zip(*self._snapshots, strict=True)):
            arrays[f"snapshots_{i}"] = np.array(snapshots)
        arrays["loss"] = np.concatenate([*self._losses, np.empty(0)])
        arrays["rates"] = np.concatenate([*self._rates, np.empty(0)])
        if len(arrays["loss"]) != self.step:  # interrupted while a turn was added
            return None
        outcome, arrays["last_loss"] = self._end
        metadata = {
            "config": self._config,
            "adapts": self._adapts,
            "records": self._records,
            "snapshot_steps": self._snapshot_steps,
            "outcome": outcome,
        }
        return State(self.step, 0.0, arrays, metadata)

    def restore_state(self, state: State) -> None:
        """Continue from a state."""
        metadata, arrays, step = state.metadata, state.arrays, state.step
        n_layers = len(self._layers)
        outcome = metadata["outcome"]
        self._end = (outcome, arrays["last_loss"])
        self.step, self._config, self._adapts = step, metadata["config"], metadata["adapts"]
        self._layers = [arrays[f"layer_{i}"] for i in range(n_layers)]
        # An unfinished run takes the record and the snapshot of this step again.
        self._records = [record for record in metadata["records"] if outcome or record < step]
        self._losses, self._rates = [arrays["loss"]], [arrays["rates"]]
        self._snapshot_steps = [taken for taken in metadata["snapshot_steps"] if outcome or taken < step]
        snapshots = [arrays[f"snapshots_{i}"] for i in range(n_layers)] if self._snapshot_steps else []
        self._snapshots = [[layer[n] for layer in snapshots] for n in range(len(self._snapshot_steps))]

    def advance(self, flush: Callable[[], None]) -> None:
        """Take turns until the last step, the tolerance, or a stop by the callback."""
        if self._callback is not None:
            losses = np.concatenate([*self._losses, np.empty(0)])
            saved = ((step, float(losses[step])) for step in self._records if step < self.step)
            replay_records(self._callback, saved)
        # Numbers that overflow are an error of the next turn, not a warning.
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                while not self.is_finished:
                    flush()
                    self._take_turn()
            except BaseException as error:
                if hasattr(error, "trajectory"):  # that of the inner layers alone
                    error.trajectory = self._trajectory_so_far()
                raise

    # ------------------------------------------------------------------------------------- the turns

    def _take_turn(self) -> None:
        """Train the inner layers, take the records that are due, and move the outer layers."""
        first, *cores, last = self._layers
        count = min(self._turn, self.n_steps - self.step)
        inner = train(
            project(self.problem, last, first.T),
            cores,
            learning_rate=self._learning_rate,
            engine="dense",
            steps=count,
            record=Record(every=max(count, 1), singular_values=None),
            **self._options,
        )
        if self._snapshot_every is not None and self.step % self._snapshot_every == 0:
            self._snapshot_steps.append(self.step)
            self._snapshots.append([layer.copy() for layer in self._layers])
        has_converged = inner.config["outcome"] == "converged"
        is_last = has_converged or count == 0
        if self.step % self.record_every == 0 or is_last:
            self._records.append(self.step)
            if self._callback is not None and self._callback(self.step, float(inner.loss[0])) is True:
                self._end = ("stopped", inner.loss[:1])
                return
        self._add(inner, move=not is_last)
        if is_last:
            self._records[-1:] = sorted({self._records[-1], self.step})
            self._end = ("converged" if has_converged else "finished", inner.loss[-1:])

    def _add(self, inner: Trajectory, *, move: bool) -> None:
        """Append a run of the inner layers, and move the outer layers at its end."""
        taken = len(inner.loss) - 1
        eta = inner.config["learning_rate"][0]
        moved = inner.rates if inner.rates is not None else np.full(taken, eta)
        if move:
            rate = self.outer * float(np.sum(moved))
            layers = _move_outer(self.problem, self._layers, inner, rate, self.decay)
        else:
            layers = [self._layers[0], *inner.all_weights(), self._layers[-1]]
        self._losses.append(inner.loss[:-1])
        self._rates.append(moved)
        self._config, self._adapts = inner.config, inner.rates is not None
        self._layers = layers
        self.step += taken

    def _trajectory_so_far(self) -> Trajectory | None:
        """Return the run up to the last step of the outer layers; None before the first."""
        if self._config is None:
            return None
        return self._trajectory("interrupted", np.array([self.problem.loss(self._layers)]))

    def trajectory(self) -> Trajectory:
        """Return the finished run, in the layout of a run in one piece."""
        outcome, last_loss = self._end
        assert outcome is not None
        return self._trajectory(outcome, last_loss)

    def _trajectory(self, outcome: str, last_loss: FloatArray) -> Trajectory:
        # Without settings the run was stopped before the first step.
        config = self._config or {"learning_rate": [0.0] * (len(self.narrow) - 2)}
        eta = config["learning_rate"][0]
        return Trajectory(
            steps=np.array(self._records, dtype=np.int64),
            loss=np.concatenate([*self._losses, last_loss], dtype=np.float64),
            states=DenseStates(
                values=(),
                left=(),
                right=(),
                snapshots=tuple(np.array(each) for each in zip(*self._snapshots, strict=True)),
                snapshot_steps=np.array(self._snapshot_steps, dtype=np.int64),
                initial=tuple(self.narrow),
                final=tuple(self._layers),
            ),
            certificate=Certificate("dense", ""),
            problem=self.problem,
            config=config
            | {
                "outcome": outcome,
                "problem": self.problem.describe(),
                "steps": self.n_steps,
                "record_every": self.record_every,
                "learning_rate": [self.outer * eta, *config["learning_rate"], self.outer * eta],
                "weight_decay": [self.decay] * len(self._layers),
                "momentum": [0.0] * len(self._layers),
                "dtype": self.narrow[0].dtype.name,
                "widths": [self.problem.dim_in, *(layer.shape[0] for layer in self._layers)],
            },
            wall_time=0.0,
            rates=np.concatenate(self._rates, dtype=np.float64) if self._adapts else None,
        )


def _move_outer(
    problem: Observations, layers: list[FloatArray], inner: Trajectory, rate: float, decay: float
) -> list[FloatArray]:
    """Return the inner layers at the end of a run, and the outer layers after one step from there."""
    first, last = layers[0], layers[-1]
    cores = inner.all_weights()
    descent = problem.backprojection([first, *cores, last])  # minus the gradient of the product, over c
    chain = cores[0]
    for layer in cores[1:]:
        chain = layer @ chain
    c = problem.loss_scale
    to_last = descent.apply(first).T  # E V
    to_first = descent.apply_transpose(np.ascontiguousarray(last.T))  # U^T E
    moved_first = first + rate * (c * chain.T @ to_first - decay * first)
    moved_last = last + rate * (c * to_last @ chain.T - decay * last)
    return [np.ascontiguousarray(moved_first), *cores, np.ascontiguousarray(moved_last)]
