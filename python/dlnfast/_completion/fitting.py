# SPDX-License-Identifier: MIT
"""The phases of a fit: a network whose weight decay is lowered, watched on held-out entries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

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
from .._support.checkpoint import Checkpoint, RunFolder, State, identity_of, terminating
from .._support.files import Arrays
from .._support.threads import MAX_THREADS
from .._training.options import Adaptive, Record
from .._training.train import train
from .._trajectory.trajectory import Trajectory
from .._weights.initial import orthogonal
from .entries import BIASES, DUPLICATES, ROUNDING, Biases, Entries, Positions, fit_biases

#: What weight_decay="auto" tries, in this order, for as long as it gains.
DECAYS: Final = (0.7, 0.5, 0.35, 0.2, 0.1, 0.03, 0.0)
#: Poorer values in a row that end the search.
WORSE_DECAYS: Final = 2
#: Width where none is given: decay and early stopping find the rank, this only bounds it.
_DEFAULT_WIDTH: Final = 32
#: Fewer held-out entries than this decide nothing.
_FEWEST_HELD_OUT: Final = 10
#: Share by which the held-out error has to fall for patience to begin anew.
_LEAST_GAIN: Final = 1e-4
#: Held-out errors that biases have to stay below, over the size of the entries, to be worth fitting.
_WORTH: Final = 0.97
#: Held-out errors below this share of the spread of the ratings end the search: there is no noise.
EXACT_FIT: Final = 1e-3
#: Patience with errors that stay the same, over that with errors that rise.
_FLAT: Final = 4
#: Of the singular values that layers start from, over the largest: training turns the vectors anyway, and
#: those of noise, which are nearly equal, would take most of the time.
_START_TOLERANCE: Final = 1e-4
#: Snapshots that the last run keeps for the case that it is interrupted.
_SNAPSHOTS: Final = 8
#: Entries that `predict` fills without being told which, 1 GB.
LARGEST_MATRIX_BYTES: Final = 2**27
#: Hexadecimal digits of a fit's identity that name its folder.
_NAME_LENGTH: Final = 16


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
    def checked(cls, given: Any) -> Settings:
        """Return them, or raise what names the one that is wrong."""
        check_choice(given.biases, "biases", [word for word in BIASES if word is not None], optional=True)
        check_choice(given.duplicates, "duplicates", DUPLICATES)
        fraction = check_scale(given.validation_fraction, "validation_fraction", below=1.0)
        decay = _check_decay(given.weight_decay)
        if decay is None and fraction == 0:
            raise ValueError(
                'weight_decay is "auto" and validation_fraction is 0, which leaves nothing to choose it by; '
                "wanted a number for weight_decay, or a fraction above 0"
            )
        if given.clip is not None and not is_range(given.clip):
            check_clip(given.clip)
        dtype = check_precision(given.dtype)
        penalty = given.bias_penalty
        if isinstance(penalty, (tuple, list, np.ndarray)):
            both = _pair_of_numbers(penalty, "bias_penalty")
        else:
            one = check_scale(penalty, "bias_penalty")
            both = (one, one)
        return cls(
            width=None if given.rank is None else check_count(given.rank, "rank"),
            depth=check_count(given.depth, "depth", minimum=2),
            compress=check_flag(given.compress, "compress"),
            outer=check_scale(given.outer, "outer", strict=True),
            scale=check_scale(given.scale, "scale", strict=True),
            learning_rate=_check_rate(given.learning_rate),
            decay=decay,
            steps=check_count(given.steps, "steps"),
            tolerance=check_scale(given.tolerance, "tolerance"),
            biases=given.biases,
            penalty=both,
            weighting=_pair_of_numbers(given.weighting, "weighting", minimum=-math.inf),
            validation_fraction=fraction,
            patience=check_count(given.patience, "patience"),
            record_every=check_count(given.record_every, "record_every"),
            duplicates=given.duplicates,
            seed=check_count(given.seed, "seed", minimum=0),
            n_threads=check_count(given.n_threads, "n_threads", minimum=0, maximum=MAX_THREADS),
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
        raise ValueError(f'learning_rate is {rate!r}; wanted "adaptive", an Adaptive or a number above 0')
    return check_scale(rate, "learning_rate", strict=True)


def is_range(clip: Any) -> bool:
    return isinstance(clip, str) and clip == "range"


def check_clip(clip: Any) -> tuple[float, float]:
    if isinstance(clip, str):
        raise ValueError(f'clip is {clip!r}; wanted "range", two numbers or None')
    low, high = _pair_of_numbers(clip, "clip", minimum=-math.inf)
    if low > high:
        raise ValueError(f"clip is ({low:g}, {high:g}); wanted the lower bound first")
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
    kept, held_out = (
        Entries(entries.rows[part], entries.columns[part], entries.values[part], entries.shape)
        for part in (np.sort(order[n_held_out:]), np.sort(order[:n_held_out]))
    )
    return kept, held_out


def choose_biases(settings: Settings, parts: tuple[Entries, Entries] | None) -> str | None:
    """Return which biases to fit: what was asked for, or for "auto" what held-out entries say."""
    if settings.biases != "auto":
        return settings.biases
    if parts is None:
        return "both"
    kept, held_out = parts
    predicted = fit_biases(kept, "both", settings.penalty).at(held_out.rows, held_out.columns)
    nothing = root_mean_square(np.zeros_like(predicted), held_out.values)
    return "both" if root_mean_square(predicted, held_out.values) <= _WORTH * nothing else None


def root_mean_square(predicted: FloatArray, values: FloatArray) -> float:
    return math.sqrt(float(np.mean((predicted - values) ** 2)))


class Phase(NamedTuple):
    """A weight decay, and the steps with it at most."""

    decay: float
    steps: int


class Watch:
    """Early stopping: the best record so far, and when it is time to give up."""

    def __init__(self, patience: int, decay: float) -> None:
        self.error = math.inf
        self.step = 0
        self.layers: list[FloatArray] | None = None
        self.rises = False
        self._decay = decay
        self._patience = patience
        self._reference = math.inf
        self._waited = 0

    def sees(self, step: int, error: float, layers: list[FloatArray]) -> bool:
        """Take note of a record; return whether it is the best so far."""
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
        # Between one direction and the next small layers stand still for a while.
        return self._waited >= self._patience * (1 if self.rises else _FLAT)

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """Return what it has seen: values that JSON knows, and arrays."""
        about = {
            "error": self.error,
            "best_step": self.step,
            "rises": self.rises,
            "reference": self._reference,
            "waited": self._waited,
        }
        return about, {f"best_{i}": layer for i, layer in enumerate(self.layers or ())}

    def go_on_from(self, about: dict[str, Any], arrays: Arrays, n_layers: int) -> None:
        """Take over what `state` returned."""
        self.error, self.step, self.rises = about["error"], about["best_step"], about["rises"]
        self._reference, self._waited = about["reference"], about["waited"]
        self.layers = [arrays[f"best_{i}"] for i in range(n_layers)] if "best_0" in arrays else None

    def phase(self, steps: int) -> Phase:
        """Return what to do with all entries: as long, or to the end where nothing had cut it short."""
        return Phase(self._decay, self.step if self.is_over else steps)


class Network:
    """Biases of some entries, and the network that learns what they leave.

    Residuals are divided by their size, and weighted: with ``D_ij = d_i e_j`` the network learns
    ``D * residuals``, which is as low in rank as they are, and the loss weighs the entries by D^2.
    """

    def __init__(self, settings: Settings, entries: Entries, biases: Biases) -> None:
        self.settings = settings
        self.shape = entries.shape
        self.biases = biases
        residual = entries.values - self.biases.at(entries.rows, entries.columns)
        counts = [
            np.bincount(place, minlength=n)
            for place, n in zip((entries.rows, entries.columns), entries.shape, strict=True)
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
        #: What the first run with an adaptive rate has measured.
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
            law = settings.learning_rate
            curvature = law.curvature if self.curvature is None else self.curvature
            rate = replace(law, ratios=ratios, curvature=curvature)
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
        """Yield the layers at step 0 and at every record, for as long as they are asked for.

        Or from a record on that is known already.
        """
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

    def _unweighted(self, layers: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
        """Return X and Y with X Y^T the part that the network adds to the biases."""
        # All widths inside are the same: the first layer is one side, the others, from the bottom, the other.
        first, *inner, last = (np.asarray(layer) for layer in layers)
        above = np.eye(first.shape[0], dtype=first.dtype)
        for layer in inner:
            above = layer @ above
        sides = []
        for side, weights, empty in zip((last @ above, first.T), self._weights, self._empty, strict=True):
            scaled = side.astype(np.float64) / weights[:, np.newaxis]
            scaled[empty] = 0.0  # what random layers or rounding left where nothing is known
            sides.append(scaled)
        sides[0] *= self._size
        return sides[0], sides[1]

    def entries_of(self, layers: Sequence[FloatArray], rows: Positions, columns: Positions) -> FloatArray:
        """Return what the network adds to the biases at some places."""
        return entries_of_product(self._unweighted(layers), rows, columns)

    def factors(self, layers: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return it as orthogonal factors with the roots of the singular values, and these."""
        left, right = self._unweighted(layers)
        (q_left, r_left), (q_right, r_right) = np.linalg.qr(left), np.linalg.qr(right)
        u, s, vt = np.linalg.svd(r_left @ r_right.T)
        kept = max(1, int(np.sum(s > 8 * np.finfo(self.settings.dtype).eps * s[:1])))
        root = np.sqrt(s[:kept])
        return q_left @ u[:, :kept] * root, q_right @ vt[:kept].T * root, s[:kept]


class CheckpointedFit:
    """The folder of one fit: of its runs on held-out entries, and of those on all."""

    def __init__(self, checkpoint: Any, settings: Settings, entries: Entries) -> None:
        given = Checkpoint.of(checkpoint)
        self.every, self.seconds = given.every, given.seconds
        known = {field.name: repr(getattr(settings, field.name)) for field in fields(settings)}
        arrays = {"rows": entries.rows, "columns": entries.columns, "values": entries.values}
        self._identity = identity_of(known | {"shape": entries.shape}, arrays)
        self._path = Path(given.directory) / self._identity[:_NAME_LENGTH]

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Own the folder of the fit in the block."""
        with terminating(), RunFolder(self._path).owned():
            yield

    @contextmanager
    def watch(self, number: int) -> Iterator[WatchFolder]:
        """Own the folder of a run on held-out entries in the block."""
        kind = "dlnfast run on held-out entries"
        folder = RunFolder(self._path / f"held-out-{number}", self._identity, kind)
        with folder.owned():
            folder.begin({}, {})
            watched = WatchFolder(folder, self.seconds)
            try:
                yield watched
            except BaseException as error:
                watched.save(error)
                raise

    def run(self, number: int) -> Checkpoint:
        """Return that of a run on all of them."""
        return Checkpoint(self._path / f"run-{number}", self.every, self.seconds)


class WatchFolder:
    """The folder of a run on held-out entries: its last record, and what its watch had seen by then."""

    def __init__(self, folder: RunFolder, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        #: The state of the last record; None before the first.
        self._last: State | None = None
        #: The state in the folder.
        self._written: State | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the run is over."""
        return self._last is not None and bool(self._last.about["ended"])

    def go_on(self, watch: Watch, network: Network) -> tuple[int, list[FloatArray]] | None:
        """Let a watch know what it has seen; return where its run was, None before its first record."""
        self._last = self._written = state = self._folder.newest()
        if state is None:
            return None
        n_layers = network.settings.depth
        watch.go_on_from(state.about, state.arrays, n_layers)
        network.curvature = state.about["curvature"]
        return state.step, [state.arrays[f"layer_{i}"] for i in range(n_layers)]

    def note(self, watch: Watch, network: Network, step: int, layers: list[FloatArray]) -> None:
        """Take note of a record, and write it where that is due."""
        about, arrays = watch.state()
        arrays |= {f"layer_{i}": layer for i, layer in enumerate(layers)}
        about |= {"ended": False, "curvature": network.curvature}
        self._last = State(step, 0.0, arrays, about)  # whole at any moment, for `save`
        if self._folder.is_due(self._seconds):
            self._write()

    def end(self) -> None:
        """Write that the run is over."""
        if self._last is not None and not self.has_ended:
            self._last = replace(self._last, about=self._last.about | {"ended": True})
        self._write()

    def save(self, error: BaseException) -> None:
        """Write the last record after an error, and say on the error where that fails."""
        try:
            self._write()
        except Exception as failure:  # what ended the run is the error to raise
            self._folder.note_loss(error, failure)

    def _write(self) -> None:
        state = self._last
        if state is not None and state is not self._written:
            self._folder.write_state(state)
            self._written = state


@np.errstate(over="ignore")
def _power(base: FloatArray, exponent: float) -> FloatArray:
    return np.asarray(base**exponent)


def last_snapshot(run: Trajectory) -> int:
    """Return the last step at which an interrupted run kept its layers."""
    steps = getattr(run.states, "snapshot_steps", np.zeros(0))
    return int(steps[-1]) if len(steps) else 0
