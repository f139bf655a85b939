# SPDX-License-Identifier: MIT
"""The runs of a fit: a network with falling weight decay, and early stopping by held-out entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .._problem.factors import entries_of_product, leading_factors
from .._problem.observations import Completion
from .._support.arrays import (
    FloatArray,
    as_pair,
    check_choice,
    check_count,
    check_flag,
    check_precision,
    check_scale,
    random_generator,
)
from .._support.checkpoint import Checkpoint, RunFolder, State
from .._support.checksums import compute_identity
from .._support.files import Arrays
from .._support.threads import MAX_THREADS
from .._training.options import Adaptive, Record
from .._training.resumable import ResumableWork, own_folder
from .._training.train import train
from .._trajectory.trajectory import Trajectory
from .._weights.initial import orthogonal
from .entries import BIASES, DUPLICATES, ROUNDING, Biases, Entries, Positions, fit_biases

#: Candidates of weight_decay="auto", tried in this order while the held-out error falls.
DECAYS: Final = (0.7, 0.5, 0.35, 0.2, 0.1, 0.03, 0.0)
#: Number of consecutive worse candidates after which no more are tried.
WORSE_DECAYS: Final = 2
#: Default width: an upper bound on the rank, which decay and early stopping find.
_DEFAULT_WIDTH: Final = 32
#: Minimum number of held-out entries.
_FEWEST_HELD_OUT: Final = 10
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
#: Maximum number of entries of a matrix that `predict` fills as a whole, 1 GB.
LARGEST_MATRIX_BYTES: Final = 2**27
#: Hexadecimal digits of a fit's identity that name its folder.
_NAME_LENGTH: Final = 16


@dataclass(frozen=True)
class LayerOptions:
    """Initial layers and learning rates of a `MatrixCompletion`.

    Parameters
    ----------
    compress : bool
        True: layers start in the leading singular vectors of the residuals, as those of `compressed_weights`
        with basis "surrogate". False: they start as random orthogonal matrices as wide as `rank`. With the
        default rank a step then costs as much as products of whole matrices. Random layers see little of the
        leading directions at first, and need a larger `scale`, such as 0.01.
    scale : float
        Singular values of the initial product, over the largest singular value that the entries suggest for
        the whole matrix. The smaller, the more is learned one direction after the other.
    learning_rate : "adaptive", Adaptive or float
        Learning rate, as in `train`. A number applies to residuals of unit variance and the mean over
        entries.
    outer : float
        Learning rate of the first and last layer over that of the others.
    dtype : {"float64", "float32"}
        Precision of the layers.
    """

    compress: bool = True
    scale: float = 1e-3
    learning_rate: float | str | Adaptive = "adaptive"
    outer: float = 1.0
    dtype: npt.DTypeLike = "float64"


@dataclass(frozen=True)
class BiasOptions:
    """The biases that a `MatrixCompletion` fits before its layers.

    Parameters
    ----------
    kind : {"auto", "both", "rows", "columns", "mean", None}
        Biases of rows, columns or both, with the mean; the mean alone; or None, not even the mean. "auto":
        "both" where they predict held-out entries better than zero does, else None; "both" where too few
        entries are held out. Biases spoil the low rank of a matrix without noise whose rows and columns have
        no levels of their own.
    penalty : float or (float, float)
        Ridge penalty of the biases, or one for rows and one for columns: the bias of a row with n entries is
        ``n / (n + penalty)`` times its mean residual.
    """

    kind: str | None = "auto"
    penalty: float | tuple[float, float] = 3.0


@dataclass(frozen=True)
class StoppingOptions:
    """Early stopping and validation of a `MatrixCompletion`.

    Parameters
    ----------
    validation_fraction : float
        Share of the entries held out to choose the decay and the number of steps, in [0, 1). 0: all `steps`
        are taken, and `weight_decay` must be a number. Fewer than 10 entries held out decide nothing: all
        steps are then taken, and "auto" means 0.
    patience : int
        Number of records without a gain that ends a run on held-out entries.
    record_every : int
        Number of steps between records, in which the number of steps is chosen.
    tolerance : float
        A run stops where the mean square of the residuals is at most this share of its initial value.
    """

    validation_fraction: float = 0.1
    patience: int = 5
    record_every: int = 10
    tolerance: float = 1e-12


@dataclass(frozen=True)
class EntryOptions:
    """Reading, weights and predictions of entries in a `MatrixCompletion`.

    Parameters
    ----------
    shape : (int, int), optional
        Number of rows and columns, if X holds index pairs. Default: as many as the largest indices need.
    duplicates : {"error", "mean"}
        Treatment of an index pair that occurs twice.
    weighting : (float, float)
        (p, q): while the layers learn, an entry counts ``n_i^-p m_j^-q`` times, for a row with n_i and a
        column with m_j known entries. p > 0 limits the influence of rows with many ratings; q < 0 raises that
        of columns with many. The default suits users in rows and items in columns (about 0.003 in RMSE on
        MovieLens); (0, 0) weighs all entries alike. Without differences in the counts it has no effect.
    clip : (float, float), "range" or None
        Bounds of the predictions; "range": those of the ratings.
    """

    shape: tuple[int, int] | None = None
    duplicates: str = "error"
    weighting: tuple[float, float] = (0.25, -0.25)
    clip: tuple[float, float] | str | None = None


#: The parameters of an estimator that hold options, and the class of these options.
OPTIONS: Final[dict[str, type]] = {
    "layers": LayerOptions,
    "biases": BiasOptions,
    "stopping": StoppingOptions,
    "entries": EntryOptions,
}


def read_options(name: str, value: Any) -> Any:
    """Return the options of a parameter; the value of `biases` may also be a kind."""
    wanted = OPTIONS[name]
    if isinstance(value, wanted):
        return value
    if name == "biases" and (value is None or isinstance(value, str)):
        return BiasOptions(value)
    raise TypeError(f"{name} is {type(value).__name__}; wanted dlnfast.{wanted.__name__}")


@dataclass(frozen=True)
class Settings:
    """The settings of an estimator, checked."""

    width: int | None
    depth: int
    compress: bool
    outer: float
    scale: float
    learning_rate: float | Adaptive
    decay: float | None
    steps: int
    tolerance: float
    biases: str | None
    penalty: tuple[float, float]
    weighting: tuple[float, float]
    validation_fraction: float
    patience: int
    record_every: int
    duplicates: str
    seed: int
    n_threads: int
    dtype: np.dtype[Any]

    @classmethod
    def from_estimator(cls, estimator: Any) -> Settings:
        """Check the settings of an estimator; an error names the wrong one."""
        layers, biases, stopping, entries = (read_options(name, getattr(estimator, name)) for name in OPTIONS)
        check_choice(biases.kind, "biases", [word for word in BIASES if word is not None], optional=True)
        check_choice(entries.duplicates, "entries.duplicates", DUPLICATES)
        fraction = check_scale(stopping.validation_fraction, "stopping.validation_fraction", below=1.0)
        decay = _check_decay(estimator.weight_decay)
        if decay is None and fraction == 0:
            raise ValueError(
                'weight_decay is "auto" and validation_fraction is 0, which leaves nothing to choose it by; '
                "wanted a number for weight_decay, or a fraction above 0"
            )
        if entries.clip is not None and not is_range(entries.clip):
            check_clip(entries.clip)
        dtype = check_precision(layers.dtype)
        penalty = biases.penalty
        if isinstance(penalty, (tuple, list, np.ndarray)):
            both = _pair_of_numbers(penalty, "biases.penalty")
        else:
            one = check_scale(penalty, "biases.penalty")
            both = (one, one)
        return cls(
            width=None if estimator.rank is None else check_count(estimator.rank, "rank"),
            depth=check_count(estimator.depth, "depth", minimum=2),
            compress=check_flag(layers.compress, "layers.compress"),
            outer=check_scale(layers.outer, "layers.outer", strict=True),
            scale=check_scale(layers.scale, "layers.scale", strict=True),
            learning_rate=_check_rate(layers.learning_rate),
            decay=decay,
            steps=check_count(estimator.steps, "steps"),
            tolerance=check_scale(stopping.tolerance, "stopping.tolerance"),
            biases=biases.kind,
            penalty=both,
            weighting=_pair_of_numbers(entries.weighting, "entries.weighting", minimum=-math.inf),
            validation_fraction=fraction,
            patience=check_count(stopping.patience, "stopping.patience"),
            record_every=check_count(stopping.record_every, "stopping.record_every"),
            duplicates=entries.duplicates,
            seed=check_count(estimator.seed, "seed", minimum=0),
            n_threads=check_count(estimator.n_threads, "n_threads", minimum=0, maximum=MAX_THREADS),
            dtype=dtype,
        )

    def check_width(self, shape: tuple[int, int]) -> int:
        """Return the width of the layers for a matrix of this shape."""
        smaller = min(shape)
        if self.width is None:
            return min(smaller, _DEFAULT_WIDTH) if self.compress else smaller
        if self.width > smaller:
            raise ValueError(
                f"rank is {self.width}; wanted at most {smaller}, the smaller side of the {shape[0]} x "
                f"{shape[1]} matrix"
            )
        return self.width


def _check_decay(decay: Any) -> float | None:
    if isinstance(decay, str):
        if decay == "auto":
            return None
        raise ValueError(f'weight_decay is {decay!r}; wanted "auto" or a number of at least 0')
    return check_scale(decay, "weight_decay")


def _check_rate(rate: Any) -> float | Adaptive:
    if isinstance(rate, Adaptive):
        return rate
    if isinstance(rate, str):
        if rate == "adaptive":
            return Adaptive()
        raise ValueError(
            f'layers.learning_rate is {rate!r}; wanted "adaptive", an Adaptive or a number above 0'
        )
    return check_scale(rate, "layers.learning_rate", strict=True)


def is_range(clip: Any) -> bool:
    return isinstance(clip, str) and clip == "range"


def check_clip(clip: Any) -> tuple[float, float]:
    if isinstance(clip, str):
        raise ValueError(f'entries.clip is {clip!r}; wanted "range", two numbers or None')
    low, high = _pair_of_numbers(clip, "entries.clip", minimum=-math.inf)
    if low > high:
        raise ValueError(f"entries.clip is ({low:g}, {high:g}); wanted the lower bound first")
    return low, high


def _pair_of_numbers(x: Any, name: str, minimum: float = 0.0) -> tuple[float, float]:
    first, second = as_pair(x, name, "two numbers")
    return (
        check_scale(first, f"{name}[0]", minimum=minimum),
        check_scale(second, f"{name}[1]", minimum=minimum),
    )


def split_entries(settings: Settings, entries: Entries) -> tuple[Entries, Entries] | None:
    """Return the entries to learn from and those held out, None where these would be too few."""
    n_held_out = round(settings.validation_fraction * entries.values.size)
    if n_held_out < _FEWEST_HELD_OUT or n_held_out >= entries.values.size:
        return None
    order = random_generator(settings.seed, ("completion", "validation")).permutation(entries.values.size)
    learned, held_out = (
        Entries(entries.rows[part], entries.columns[part], entries.values[part], entries.shape)
        for part in (np.sort(order[n_held_out:]), np.sort(order[:n_held_out]))
    )
    return learned, held_out


def choose_biases(settings: Settings, parts: tuple[Entries, Entries] | None) -> str | None:
    """Return which biases to fit; for "auto", those with the smaller error on held-out entries."""
    if settings.biases != "auto":
        return settings.biases
    if parts is None:
        return "both"
    learned, held_out = parts
    predicted = fit_biases(learned, "both", settings.penalty).at(held_out.rows, held_out.columns)
    nothing = root_mean_square(np.zeros_like(predicted), held_out.values)
    return "both" if root_mean_square(predicted, held_out.values) <= _WORTH * nothing else None


def root_mean_square(predicted: FloatArray, values: FloatArray) -> float:
    return math.sqrt(float(np.mean((predicted - values) ** 2)))


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
            layers = [np.ascontiguousarray(layer, dtype=settings.dtype) for layer in start]
        else:
            widths = [self.shape[1], *[width] * (depth - 1), self.shape[0]]
            layers = orthogonal(widths, scale, settings.seed, dtype=settings.dtype)
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

    def factors(self, layers: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return orthogonal factors, scaled by the roots of the singular values, and these."""
        left, right = self._remove_weights(layers)
        (q_left, r_left), (q_right, r_right) = np.linalg.qr(left), np.linalg.qr(right)
        u, s, vt = np.linalg.svd(r_left @ r_right.T)
        rank = max(1, int(np.sum(s > 8 * np.finfo(self.settings.dtype).eps * s[:1])))
        root = np.sqrt(s[:rank])
        return q_left @ u[:, :rank] * root, q_right @ vt[:rank].T * root, s[:rank]


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


class CheckpointedFit:
    """The folder of one fit, which has a folder for each of its runs."""

    def __init__(self, checkpoint: Any, settings: Settings, entries: Entries) -> None:
        target = Checkpoint.of(checkpoint)
        self._every, self.seconds = target.every, target.seconds
        known = {field.name: repr(getattr(settings, field.name)) for field in fields(settings)}
        arrays = {"rows": entries.rows, "columns": entries.columns, "values": entries.values}
        self._identity = compute_identity(known | {"shape": entries.shape}, arrays)
        self._path = Path(target.directory) / self._identity[:_NAME_LENGTH]

    def owned(self) -> AbstractContextManager[None]:
        """Own the folder of the fit within the block."""
        return own_folder(self._path)

    def held_out_run(self, number: int) -> RunFolder:
        """Return the folder of a run with held-out entries."""
        kind = "dlnfast run on held-out entries"
        return RunFolder(self._path / f"held-out-{number}", self._identity, kind)

    def final_run(self, number: int) -> Checkpoint:
        """Return the checkpoint of a run on all entries."""
        return Checkpoint(self._path / f"run-{number}", self._every, self.seconds)


@np.errstate(over="ignore")
def _power(base: FloatArray, exponent: float) -> FloatArray:
    return np.asarray(base**exponent)


def last_snapshot(run: Trajectory) -> int:
    """Return the step of the last snapshot of an interrupted run."""
    steps = getattr(run.states, "snapshot_steps", np.zeros(0))
    return int(steps[-1]) if len(steps) else 0
