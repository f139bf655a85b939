# SPDX-License-Identifier: MIT
"""Observations projected onto bases, and runs on what is left of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from .._closure.certificate import Certificate
from .._problem.observations import Completion, Observations, Sensing
from .._support.arrays import FloatArray, check_count, check_scale
from .._support.checkpoint import Checkpoint, RunFolder, State, identity_of, terminating
from .._support.files import Arrays
from .._training.options import Record
from .._training.train import train
from .._trajectory.states import COLUMNS, DenseStates, LayerTracking
from .._trajectory.storage import pack_problem
from .._trajectory.trajectory import Trajectory


def project(problem: Observations, U: npt.ArrayLike, V: npt.ArrayLike) -> Sensing:
    """Return what the observations say of X in ``U X V^T``, as few measurements as X has entries.

    Parameters
    ----------
    problem : Completion or Sensing
        n observations.
    U, V : array_like, shape (d_y, a) and (d_x, b)
        Any matrices.

    Returns
    -------
    Sensing
        Of X (a, b), with the same loss: a triangle of a QR decomposition in place of the n observations, and
        what no X explains in `loss_floor`.

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
        rows = _projected_rows(problem, left, right, part)
        known = problem.values[part, np.newaxis]
        triangle = np.asarray(np.linalg.qr(np.vstack([triangle, np.hstack([rows, known])]), mode="r"))
    kept = min(len(triangle), size)
    floor = float(np.sum(triangle[kept:, size] ** 2))
    projected = Sensing(
        triangle[:kept, :size].reshape(kept, a, b), triangle[:kept, size], loss_scale=problem.loss_scale
    )
    projected.loss_floor = problem.loss_scale / 2 * floor
    projected.reduction = problem.reduction
    projected._source = {"name": "projected", "of": problem.describe()}
    return projected


def _projected_rows(problem: Observations, U: FloatArray, V: FloatArray, part: slice) -> FloatArray:
    if isinstance(problem, Completion):
        u, v = U[problem.rows[part]], V[problem.columns[part]]
        return (u[:, :, np.newaxis] * v[:, np.newaxis, :]).reshape(len(u), -1)
    assert isinstance(problem, Sensing)
    return problem.projected(U, V, part).reshape(-1, U.shape[1] * V.shape[1])


def train_projected(
    problem: Observations, narrow: list[FloatArray], learning_rate: Any, settings: dict[str, Any]
) -> Trajectory:
    """Train the layers between the first and the last, and return the run of all of them.

    An exception that carries the trajectory so far carries that of all layers too.
    """
    first, *cores, last = narrow
    small = project(problem, last, first.T)
    try:
        run = train(small, cores, learning_rate=learning_rate, engine="dense", **settings)
    except BaseException as error:
        inner = getattr(error, "trajectory", None)
        if inner is not None:
            error.trajectory = _between(problem, first, inner, last)  # type: ignore[attr-defined]
        raise
    return _between(problem, first, run, last)


def _between(problem: Observations, first: FloatArray, run: Trajectory, last: FloatArray) -> Trajectory:
    """Return a run of the layers between two that did not move, together with these."""
    states = run.states
    assert isinstance(states, DenseStates)
    n_values = states.values[0].shape[1] if states.values else 0
    outside = [_Still(layer, states, len(run.steps), n_values) for layer in (first, last)]

    def around(name: str) -> tuple[Any, ...]:
        inner = getattr(states, name)
        return (getattr(outside[0], name), *inner, getattr(outside[1], name)) if inner else ()

    config = dict(run.config)
    for name in ("learning_rate", "weight_decay", "momentum"):
        config[name] = [0.0, *config[name], 0.0]
    config["widths"] = [problem.dim_in, *config["widths"], problem.dim_out]
    config["problem"] = problem.describe()
    final = None if states.final is None else (first, *states.final, last)
    initial = None if states.initial is None else (first, *states.initial, last)
    names = ("values", "left", "right", "snapshots", "tracking")
    return Trajectory(
        steps=run.steps,
        loss=run.loss,
        states=DenseStates(
            **{name: around(name) for name in names},
            snapshot_steps=states.snapshot_steps,
            initial=initial,
            final=final,
        ),
        certificate=run.certificate,
        problem=problem,
        config=config,
        wall_time=run.wall_time,
        rates=run.rates,
    )


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
        raise ValueError("momentum is not kept over the steps of the outer layers: outer_every=1")
    record_every, weights_every = (
        -(-(max(n_steps, 1) if every is None else every) // turn) * turn
        for every in (record.every, record.weights_every)
    )
    decay = check_scale(wanted.get("weight_decay", 0.0), "weight_decay (lambda)")
    watched = record.callback
    turns = _Turns(problem, narrow, outer, decay, n_steps, record_every)
    with ExitStack() as stack:
        kept = None
        if checkpoint is not None:
            rules = {"learning_rate": repr(learning_rate), "turn": turn, "weights_every": weights_every}
            rules |= {name: repr(value) for name, value in wanted.items()}
            kept = _KeptTurns(Checkpoint.of(checkpoint), turns, rules)
            if kept.outcome is None:
                stack.enter_context(terminating())
                stack.enter_context(kept.owned())
            if kept.outcome is not None:
                return turns.trajectory(kept.outcome, kept.last_loss)
            if watched is not None:
                for step, loss in turns.told():
                    watched(step, loss)

        def ended_as(outcome: str, last_loss: FloatArray) -> Trajectory:
            if kept is not None:
                kept.write(outcome, last_loss)
            return turns.trajectory(outcome, last_loss)

        try:
            while True:
                if kept is not None and kept.is_due:
                    kept.write()
                first, *cores, last = turns.layers
                count = min(turn, n_steps - turns.step)
                inner = train(
                    project(problem, last, first.T),
                    cores,
                    learning_rate=learning_rate,
                    engine="dense",
                    steps=count,
                    record=Record(every=max(count, 1), singular_values=None, progress=record.progress),
                    **wanted,
                )
                if record.weights_every is not None and turns.step % weights_every == 0:
                    turns.keep_layers()
                converged = inner.config["outcome"] == "converged"
                ended = converged or count == 0
                if turns.step % record_every == 0 or ended:
                    turns.records.append(turns.step)
                    if watched is not None and watched(turns.step, float(inner.loss[0])) is True:
                        return ended_as("stopped", inner.loss[:1])
                turns.add(inner, move=not ended)
                if ended:
                    turns.records[-1:] = sorted({turns.records[-1], turns.step})
                    return ended_as("converged" if converged else "finished", inner.loss[-1:])
        except BaseException as error:
            if kept is not None:
                kept.save(error)
            if hasattr(error, "trajectory"):  # that of the inner layers alone
                error.trajectory = turns.so_far()  # pyright: ignore[reportAttributeAccessIssue]
            raise


class _Turns:
    """A run in pieces: the inner layers train, then the outer ones move."""

    def __init__(
        self,
        problem: Observations,
        narrow: list[FloatArray],
        outer: float,
        decay: float,
        n_steps: int,
        record_every: int,
    ) -> None:
        self.problem, self.narrow, self.outer, self.decay = problem, narrow, outer, decay
        self.n_steps, self.record_every = n_steps, record_every
        self.layers = [layer.copy() for layer in narrow]
        self.step = 0
        self.records: list[int] = []
        self.config: dict[str, Any] | None = None  # of the last piece
        self._losses: list[FloatArray] = []
        self._rates: list[FloatArray] = []
        self._adapts = False
        self._snapshots: list[list[FloatArray]] = []
        self._snapshot_steps: list[int] = []

    def keep_layers(self) -> None:
        """Keep the layers as they are."""
        self._snapshot_steps.append(self.step)
        self._snapshots.append([layer.copy() for layer in self.layers])

    def add(self, inner: Trajectory, *, move: bool) -> None:
        """Go on to the end of a piece, and move the outer layers there."""
        taken = len(inner.loss) - 1
        eta = inner.config["learning_rate"][0]
        moved = inner.rates if inner.rates is not None else np.full(taken, eta)
        if move:
            rate = self.outer * float(np.sum(moved))
            layers = _move_outer(self.problem, self.layers, inner, rate, self.decay)
        else:
            layers = [self.layers[0], *inner.all_weights(), self.layers[-1]]
        self._losses.append(inner.loss[:-1])
        self._rates.append(moved)
        self.config, self._adapts = inner.config, inner.rates is not None
        self.layers = layers
        self.step += taken

    def told(self) -> Iterator[tuple[int, float]]:
        """Yield step and loss at the records before this step."""
        losses = np.concatenate([*self._losses, np.empty(0)])
        return ((step, float(losses[step])) for step in self.records if step < self.step)

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """Return everything that moves: values that JSON knows, and arrays."""
        arrays: Arrays = {f"layer_{i}": layer for i, layer in enumerate(self.layers)}
        for i, kept in enumerate(zip(*self._snapshots, strict=True)):
            arrays[f"snapshots_{i}"] = np.array(kept)
        arrays["loss"] = np.concatenate([*self._losses, np.empty(0)])
        arrays["rates"] = np.concatenate([*self._rates, np.empty(0)])
        about = {
            "config": self.config,
            "adapts": self._adapts,
            "records": self.records,
            "snapshot_steps": self._snapshot_steps,
        }
        return about, arrays

    def go_on_from(self, step: int, about: dict[str, Any], arrays: Arrays, *, ended: bool) -> None:
        """Take over what `state` returned."""
        n_layers = len(self.layers)
        self.step, self.config, self._adapts = step, about["config"], about["adapts"]
        self.layers = [arrays[f"layer_{i}"] for i in range(n_layers)]
        # What is due at this step comes again, but after the last one.
        self.records = [record for record in about["records"] if ended or record < step]
        self._losses, self._rates = [arrays["loss"]], [arrays["rates"]]
        self._snapshot_steps = [kept for kept in about["snapshot_steps"] if ended or kept < step]
        kept = [arrays[f"snapshots_{i}"] for i in range(n_layers)] if self._snapshot_steps else []
        self._snapshots = [[layer[n] for layer in kept] for n in range(len(self._snapshot_steps))]

    def so_far(self) -> Trajectory | None:
        """Return the run up to the last step of the outer layers; None before the first."""
        if self.config is None:
            return None
        return self.trajectory("interrupted", np.array([self.problem.loss(self.layers)]))

    def trajectory(self, outcome: str, last_loss: FloatArray) -> Trajectory:
        """Return what there is, in the layout of a run in one piece."""
        # Stopped before the first step, if there is none.
        config = self.config or {"learning_rate": [0.0] * (len(self.narrow) - 2)}
        eta = config["learning_rate"][0]
        return Trajectory(
            steps=np.array(self.records, dtype=np.int64),
            loss=np.concatenate([*self._losses, last_loss], dtype=np.float64),
            states=DenseStates(
                values=(),
                left=(),
                right=(),
                snapshots=tuple(np.array(kept) for kept in zip(*self._snapshots, strict=True)),
                snapshot_steps=np.array(self._snapshot_steps, dtype=np.int64),
                initial=tuple(self.narrow),
                final=tuple(self.layers),
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
                "weight_decay": [self.decay] * len(self.layers),
                "momentum": [0.0] * len(self.layers),
                "dtype": self.narrow[0].dtype.name,
                "widths": [self.problem.dim_in, *(layer.shape[0] for layer in self.layers)],
            },
            wall_time=0.0,
            rates=np.concatenate(self._rates, dtype=np.float64) if self._adapts else None,
        )


class _KeptTurns:
    """Such a run in a folder: its state, from which it goes on between two pieces."""

    def __init__(self, checkpoint: Checkpoint, turns: _Turns, rules: dict[str, Any]) -> None:
        self.turns, self.seconds = turns, checkpoint.seconds
        arrays: Arrays = {f"layer_{i}": layer for i, layer in enumerate(turns.narrow)}
        rules["problem"] = pack_problem(turns.problem, arrays)
        rules |= {"outer": turns.outer, "decay": turns.decay, "steps": turns.n_steps}
        rules["record_every"] = turns.record_every
        self._folder = RunFolder(checkpoint.directory, identity_of(rules, arrays), "dlnfast run in turns")
        self._rules = rules
        self.outcome: str | None = None
        self.last_loss: FloatArray = np.empty(0)
        self._before = 0.0
        self._begin = time.perf_counter()
        if self._folder.exists:
            self._folder.check_request()
            self._go_on()
            if self.outcome is not None:
                self._folder.tidy()

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Own the folder in the block, and go on from what it holds then."""
        with self._folder.owned():
            self._folder.begin({"rules": self._rules}, {})
            self._go_on()
            yield

    def _go_on(self) -> None:
        """Take over the newest state."""
        turns, state = self.turns, self._folder.newest()
        if state is not None:
            about, arrays = state.about, state.arrays
            self.outcome, self.last_loss, self._before = about["outcome"], arrays["last_loss"], state.seconds
            turns.go_on_from(state.step, about, arrays, ended=self.outcome is not None)

    @property
    def is_due(self) -> bool:
        """Whether the last state is old enough."""
        return self._folder.is_due(self.seconds)

    def write(self, outcome: str | None = None, last_loss: FloatArray | None = None) -> None:
        """Keep everything up to the step that the outer layers have reached."""
        about, arrays = self.turns.state()
        if len(arrays["loss"]) != self.turns.step:  # interrupted while a piece was added
            return
        if outcome is not None and last_loss is not None:  # as it is then, should this have to be repeated
            self.outcome, self.last_loss = outcome, last_loss
        arrays["last_loss"] = self.last_loss
        seconds = self._before + time.perf_counter() - self._begin
        self._folder.write_state(State(self.turns.step, seconds, arrays, about | {"outcome": self.outcome}))

    def save(self, error: BaseException) -> None:
        """Write the state after an error, and say on the error where that fails."""
        try:
            self.write()
        except Exception as failure:  # what ended the run is the error to raise
            self._folder.note_loss(error, failure)


def _move_outer(
    problem: Observations, layers: list[FloatArray], inner: Trajectory, rate: float, decay: float
) -> list[FloatArray]:
    """Return the layers with the inner ones of a run, and the outer ones a step on from there."""
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


class _Still:
    """The records of a layer that does not move."""

    def __init__(self, layer: FloatArray, states: DenseStates, n: int, n_values: int) -> None:
        u, s, vt = np.linalg.svd(layer, full_matrices=False)
        k = min(n_values, len(s))

        def repeated(x: npt.NDArray[Any], count: int = n) -> npt.NDArray[Any]:
            return np.broadcast_to(x, (count, *x.shape))

        self.values = repeated(s[:k])
        self.left, self.right = repeated(u[:, :k]), repeated(vt[:k].T)
        self.snapshots = repeated(layer, len(states.snapshot_steps))
        error = 16 * float(np.finfo(layer.dtype).eps) * s[:k]
        columns = np.zeros(len(COLUMNS))
        self.tracking = LayerTracking(
            repeated(error.astype(np.float64)),
            repeated(np.ones(k)),
            repeated(np.arange(k)),
            repeated(np.zeros(k, dtype=np.int64)),
            repeated(columns),
        )
