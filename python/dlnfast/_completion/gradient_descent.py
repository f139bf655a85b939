# SPDX-License-Identifier: MIT
"""Gradient descent on a deep network, with falling weight decay and early stopping by held-out entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np

from .._problem.factors import entries_of_product, leading_factors
from .._problem.observations import Completion
from .._support.arrays import FloatArray
from .._support.checkpoint import Checkpoint, State
from .._support.files import Arrays
from .._training.options import Adaptive, Record
from .._training.resumable import ResumableWork
from .._training.train import train
from .._trajectory.trajectory import Trajectory
from .._weights.initial import orthogonal
from .entries import ROUNDING, Biases, Entries, Positions, fit_biases
from .fitted import Factors, Fit, Fitted, Trial, normalise_factors, root_mean_square
from .options import Settings

#: Candidates of weight_decay="auto", tried in this order while the held-out error falls.
DECAYS: Final = (0.7, 0.5, 0.35, 0.2, 0.1, 0.03, 0.0)
#: Number of consecutive worse candidates after which no more are tried.
WORSE_DECAYS: Final = 2
#: Relative decrease of the held-out error that restarts the patience.
_LEAST_GAIN: Final = 1e-4
#: Biases are fitted if their held-out error is at most this share of the entries' root mean square.
_WORTH: Final = 0.97
#: If the held-out error is below this share of the standard deviation of the ratings, there is no noise, and
#: no more candidates are tried.
EXACT_FIT: Final = 1e-3
#: Patience with constant errors, over patience with rising errors.
_FLAT: Final = 4
#: Tolerance of the initial singular values, over the largest: training changes the vectors anyway, and those
#: of noise, which are nearly equal, would take most of the time.
_START_TOLERANCE: Final = 1e-4
#: Number of snapshots in the last run, for the case that it is interrupted.
_SNAPSHOTS: Final = 8


def choose_biases(settings: Settings, parts: tuple[Entries, Entries] | None) -> str | None:
    """Return which biases to fit; for "auto", those with the smaller error on held-out entries."""
    if settings.biases != "auto":
        return settings.biases
    if parts is None:
        return "both"
    learned, held_out = parts
    predicted = fit_biases(learned, "both", settings.penalty).at(held_out.rows, held_out.columns)
    nothing = root_mean_square(np.zeros_like(predicted), held_out)
    return "both" if root_mean_square(predicted, held_out) <= _WORTH * nothing else None


class Phase(NamedTuple):
    """A weight decay, and the maximum number of steps with it."""

    decay: float
    steps: int


class Watch:
    """Early stopping: the best record so far, and whether to stop."""

    def __init__(self, patience: int, decay: float) -> None:
        self.error = math.inf
        self.step = 0
        self.layers: list[FloatArray] | None = None
        self.rises = False
        self._decay = decay
        self._patience = patience
        self._reference = math.inf
        self._waited = 0

    def add_record(self, step: int, error: float, layers: list[FloatArray]) -> bool:
        """Add a record; return whether it is the best so far."""
        if error < self._reference * (1 - _LEAST_GAIN):
            self._reference, self._waited = error, 0
        else:
            self._waited += 1
        self.rises = error > self._reference * (1 + _LEAST_GAIN)
        if error < self.error:
            self.error, self.step, self.layers = error, step, layers
            return True
        return False

    @property
    def is_over(self) -> bool:
        # Small layers change little between the learning of two singular directions.
        return self._waited >= self._patience * (1 if self.rises else _FLAT)

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """Return the best record and the counters: JSON values, and arrays."""
        metadata = {
            "error": self.error,
            "best_step": self.step,
            "rises": self.rises,
            "reference": self._reference,
            "waited": self._waited,
        }
        return metadata, {f"best_{i}": layer for i, layer in enumerate(self.layers or ())}

    def restore(self, metadata: dict[str, Any], arrays: Arrays, n_layers: int) -> None:
        """Continue from the result of `state`."""
        self.error, self.step, self.rises = metadata["error"], metadata["best_step"], metadata["rises"]
        self._reference, self._waited = metadata["reference"], metadata["waited"]
        self.layers = [arrays[f"best_{i}"] for i in range(n_layers)] if "best_0" in arrays else None

    def phase(self, steps: int) -> Phase:
        """Return the phase for all entries: up to the best step, or all steps if the run was not stopped."""
        return Phase(self._decay, self.step if self.is_over else steps)


class Network:
    """Biases of some entries, and the network that learns the residuals.

    Residuals are divided by their size, and weighted: with ``D_ij = d_i e_j`` the network learns
    ``D * residuals``, which is as low in rank as they are, and the loss weighs the entries by D^2.
    """

    def __init__(self, settings: Settings, entries: Entries, biases: Biases) -> None:
        self.settings = settings
        self.shape = entries.shape
        self.biases = biases
        residual = entries.values - self.biases.at(entries.rows, entries.columns)
        counts = [
            np.bincount(indices, minlength=n)
            for indices, n in zip((entries.rows, entries.columns), entries.shape, strict=True)
        ]
        self._empty = [count == 0 for count in counts]
        self._weights = [
            _power(np.maximum(count, 1.0), -power / 2)
            for count, power in zip(counts, settings.weighting, strict=True)
        ]
        if not all(np.isfinite(each).all() and each.all() for each in self._weights):
            raise ValueError(f"weighting is {settings.weighting}; with these numbers of entries it overflows")
        residual *= self._weights[0][entries.rows] * self._weights[1][entries.columns]
        self._size = math.sqrt(float(np.mean(residual**2)))
        largest = float(np.max(np.abs(entries.values)))
        reach = float(np.max(self._weights[0]) * np.max(self._weights[1]))
        self.nothing_left = self._size <= ROUNDING * largest * reach
        if self.nothing_left:
            return
        self.problem = Completion(
            entries.rows, entries.columns, residual / self._size, entries.shape, reduction="observed"
        )
        self.start, self._layer_scale = self._first_layers()
        #: Curvature that the first run with an adaptive rate has measured.
        self.curvature: Sequence[float] | None = None

    def _first_layers(self) -> tuple[list[FloatArray], float]:
        settings, problem = self.settings, self.problem
        width, depth = settings.check_width(self.shape), settings.depth
        if settings.width is None and settings.compress:
            # Rows without entries add nothing to the rank.
            width = min(width, *(int(np.sum(~empty)) for empty in self._empty))
        found = leading_factors(problem.backprojection(), width if settings.compress else 1, _START_TOLERANCE)
        self._leading = float(found.s[0])
        scale = (settings.scale * self._leading / problem.density) ** (1 / depth)
        if not 0.0 < scale**depth < math.inf or not math.isfinite(scale):
            raise ValueError(f"scale is {settings.scale:g}: layers that large, or small, leave the numbers")
        if settings.compress:
            inner = [scale * np.eye(width)] * (depth - 2)
            start = [scale * found.V.T, *inner, scale * found.U]
            layers = [np.ascontiguousarray(layer, dtype=settings.dtype or np.float64) for layer in start]
        else:
            widths = [self.shape[1], *[width] * (depth - 1), self.shape[0]]
            layers = orthogonal(widths, scale, settings.seed, dtype=settings.dtype or np.float64)
        return layers, scale

    def _options(self, decay: float) -> dict[str, Any]:
        settings, problem = self.settings, self.problem
        ratios = [settings.outer, *[1.0] * (settings.depth - 2), settings.outer]
        rate: Any
        if isinstance(settings.learning_rate, Adaptive):
            adaptive = settings.learning_rate
            curvature = adaptive.curvature if self.curvature is None else self.curvature
            rate = replace(adaptive, ratios=ratios, curvature=curvature)
        else:
            rate = [settings.learning_rate * ratio for ratio in ratios]
        # A direction of singular value s grows like c s scale^(L - 2), and decays like lambda.
        growth = problem.loss_scale * self._leading * self._layer_scale ** (settings.depth - 2)
        return {
            "learning_rate": rate,
            "weight_decay": decay * growth,
            "engine": "dense",
            "n_threads": settings.n_threads,
            # The loss is half the mean square of residuals, which is 1 at first.
            "tolerance": settings.tolerance / 2,
        }

    def _remember(self, run: Trajectory) -> None:
        # Measured once: it takes as long as dozens of steps.
        if run.config["adaptive"] is not None:
            self.curvature = run.config["adaptive"]["curvature"]

    def records(
        self, start: list[FloatArray], decay: float, begin: tuple[int, list[FloatArray]] | None = None
    ) -> Iterator[tuple[int, list[FloatArray]]]:
        """Yield step and layers, at step 0 and at every record; or after the record `begin`."""
        step, layers = (0, start) if begin is None else begin
        if begin is None:
            yield step, layers
        while step < self.settings.steps:
            few = min(self.settings.record_every, self.settings.steps - step)
            record = Record(every=few, singular_values=None)
            run = train(self.problem, layers, steps=few, record=record, **self._options(decay))
            self._remember(run)
            taken = int(run.steps[-1])
            step += taken
            layers = run.all_weights()
            if taken > 0:
                yield step, layers
            if taken < few:
                return

    def run(
        self, start: list[FloatArray], phase: Phase, *, progress: bool, checkpoint: Checkpoint | None
    ) -> Trajectory:
        """Return a run of one phase."""
        run = train(
            self.problem,
            start,
            steps=phase.steps,
            record=Record(
                every=self.settings.record_every,
                singular_values=None,
                weights_every=math.ceil(phase.steps / _SNAPSHOTS),
                progress=progress,
            ),
            checkpoint=checkpoint,
            **self._options(phase.decay),
        )
        self._remember(run)
        return run

    def _remove_weights(self, layers: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
        """Return X and Y with X Y^T the part that the network adds to the biases."""
        # All widths inside are the same: the first layer is one side, the others, from the bottom, the other.
        first, *inner, last = (np.asarray(layer) for layer in layers)
        above = np.eye(first.shape[0], dtype=first.dtype)
        for layer in inner:
            above = layer @ above
        sides = []
        for side, weights, empty in zip((last @ above, first.T), self._weights, self._empty, strict=True):
            scaled = side.astype(np.float64) / weights[:, np.newaxis]
            scaled[empty] = 0.0  # rows without entries keep random initial values or rounding errors
            sides.append(scaled)
        sides[0] *= self._size
        return sides[0], sides[1]

    def entries_of(self, layers: Sequence[FloatArray], rows: Positions, columns: Positions) -> FloatArray:
        """Return the network's part of some entries, without the biases."""
        return entries_of_product(self._remove_weights(layers), rows, columns)

    def factors(self, layers: Sequence[FloatArray]) -> Factors:
        """Return orthogonal factors, scaled by the roots of the singular values, and these."""
        return normalise_factors(*self._remove_weights(layers), 8 * np.finfo(self.settings.dtype).eps)


class HeldOutRun(ResumableWork):
    """A run on the other entries until the held-out ones gain no more, as resumable work.

    Parameters
    ----------
    network : Network
    start : list of ndarray
        Initial layers.
    decay : float
        Weight decay.
    watch : Watch
    error_of : callable
        ``error_of(layers)`` returns the error on the held-out entries.
    on_best : callable
        Called without arguments whenever `watch` has a new best record.
    """

    unit = "step"

    def __init__(
        self,
        network: Network,
        start: list[FloatArray],
        decay: float,
        watch: Watch,
        measure_error: Callable[[list[FloatArray]], float],
        on_best: Callable[[], None],
    ) -> None:
        self._network, self._start, self._decay = network, start, decay
        self._watch, self._error_of, self._on_best = watch, measure_error, on_best
        #: The state of the last record; None before the first.
        self._last: State | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the run is over."""
        return self._last is not None and bool(self._last.metadata["ended"])

    def advance(self, flush: Callable[[], None]) -> None:
        """Train from record to record."""
        watch, network = self._watch, self._network
        if not watch.is_over:
            for step, layers in network.records(self._start, self._decay, self._begin()):
                if watch.add_record(step, self._error_of(layers), layers):
                    self._on_best()
                self._last = self._state_at(step, layers)
                flush()
                if watch.is_over:
                    break
        if self._last is not None:
            self._last = replace(self._last, metadata=self._last.metadata | {"ended": True})

    def _begin(self) -> tuple[int, list[FloatArray]] | None:
        if self._last is None:
            return None
        arrays = self._last.arrays
        return self._last.step, [arrays[f"layer_{i}"] for i in range(self._network.settings.depth)]

    def _state_at(self, step: int, layers: list[FloatArray]) -> State:
        metadata, arrays = self._watch.state()
        arrays |= {f"layer_{i}": layer for i, layer in enumerate(layers)}
        return State(step, 0.0, arrays, metadata | {"ended": False, "curvature": self._network.curvature})

    def state(self) -> State | None:
        """Return the layers of the last record, and the watch as it was then."""
        return self._last

    def restore_state(self, state: State) -> None:
        """Continue from a record."""
        self._last = state
        self._watch.restore(state.metadata, state.arrays, self._network.settings.depth)
        self._network.curvature = state.metadata["curvature"]
        if self._watch.layers is not None:
            self._on_best()


@np.errstate(over="ignore")
def _power(base: FloatArray, exponent: float) -> FloatArray:
    return np.asarray(base**exponent)


def last_snapshot(run: Trajectory) -> int:
    """Return the step of the last snapshot of an interrupted run."""
    steps = getattr(run.states, "snapshot_steps", np.zeros(0))
    return int(steps[-1]) if len(steps) else 0


class GradientFit(Fit):
    """Gradient descent on layers that learn the residuals of biases.

    The decay and the number of steps are chosen on held-out entries, before a run on all of them.
    """

    def run(self) -> None:
        """Choose a plan on held-out entries, and carry it out on all of them."""
        settings = replace(self.settings, biases=choose_biases(self.settings, self.parts))
        biases = fit_biases(self.entries, settings.biases, settings.penalty)
        alone = replace(Fitted.of_biases(biases), kind=settings.biases)
        self.fitted = replace(alone, weight_decay=settings.decay or 0.0)
        plan = None if self.parts is None else self._search(settings, *self.parts)
        if plan is None:
            plan = [Phase(settings.decay or 0.0, settings.steps)]
        network = Network(settings, self.entries, biases)
        self.fitted = replace(alone, weight_decay=plan[0].decay)
        if not network.nothing_left:
            self._run_phases(plan, network)

    def _search(self, settings: Settings, seen: Entries, held_out: Entries) -> list[Phase]:
        """Return the decay and the steps that suit held-out entries."""
        network = Network(settings, seen, fit_biases(seen, settings.biases, settings.penalty))
        self.fitted = replace(self.fitted, biases=network.biases)
        decay_now = self.fitted.weight_decay or 0.0
        if network.nothing_left:
            return [Phase(decay_now, 0)]
        exact = EXACT_FIT * float(np.std(np.concatenate([seen.values, held_out.values])))
        best, plan = math.inf, [Phase(decay_now, 0)]
        poorer, least = 0, math.inf
        for decay in DECAYS if settings.decay is None else (settings.decay,):
            first = self._run_held_out(network, held_out, network.start, decay, best)
            if first.error < best:
                best, plan = first.error, [first.phase(settings.steps)]
            if decay > 0 and first.step > 0 and not first.rises:
                assert first.layers is not None
                second = self._run_held_out(network, held_out, first.layers, 0.0, best, of=decay)
                if second.step > 0 and second.error < best:
                    best, plan = second.error, [first.phase(settings.steps), second.phase(settings.steps)]
            # By the runs with decay alone: the one without may hide that less decay would keep more.
            poorer = 0 if first.error < least else poorer + 1
            least = min(least, first.error)
            if poorer == WORSE_DECAYS or best <= exact:
                break
        return plan

    def _run_held_out(
        self,
        network: Network,
        held_out: Entries,
        start: list[FloatArray],
        decay: float,
        best: float,
        of: float | None = None,
    ) -> Watch:
        """Run until the held-out error stops falling; keep factors that are better than the best so far.

        `of` is the decay of the run that this one, without decay, continues.
        """
        watch = Watch(network.settings.patience, decay)
        known = network.biases.at(held_out.rows, held_out.columns)

        def measure_error(layers: list[FloatArray]) -> float:
            # The network's own initial layers have learned nothing yet.
            low = (
                0.0
                if layers is network.start
                else network.entries_of(layers, held_out.rows, held_out.columns)
            )
            return root_mean_square(self.clip(known + low), held_out)

        def keep_best() -> None:
            if watch.layers is not None and watch.error < best and watch.step > 0:
                self.fitted = replace(
                    self.fitted,
                    biases=network.biases,
                    factors=network.factors(watch.layers),
                    n_steps=watch.step,
                    weight_decay=decay if of is None else of,
                    stage="search",
                )

        work = HeldOutRun(network, start, decay, watch, measure_error, keep_best)
        self.perform(work, len(self.trials))
        self.trials.append(Trial({"weight_decay": decay}, watch.step, watch.error))
        return watch

    def _run_phases(self, plan: list[Phase], network: Network) -> None:
        """Run the phases on all entries, each from the end of the one before."""
        layers = network.start
        for i, phase in enumerate(plan):
            if phase.steps == 0:
                continue
            done = self.fitted.n_steps
            checkpoint = None if self.checkpoint is None else self.checkpoint.final_run(i)
            try:
                run = network.run(layers, phase, progress=self.progress, checkpoint=checkpoint)
            except KeyboardInterrupt as interrupt:
                partial = getattr(interrupt, "trajectory", None)
                if isinstance(partial, Trajectory):
                    self._take(network, partial, done, last_snapshot(partial))
                raise
            layers = self._take(network, run, done, int(run.steps[-1]))

    def _take(self, network: Network, run: Trajectory, done: int, step: int) -> list[FloatArray]:
        layers = run.all_weights(step)
        kept = (*self.fitted.trajectories, run) if network.settings.keeps_trajectories else ()
        found = replace(self.fitted, n_steps=done + step, trajectories=kept)
        if found.n_steps > 0:
            found = replace(found, factors=network.factors(layers), stage="last run")
        self.fitted = found
        return layers
