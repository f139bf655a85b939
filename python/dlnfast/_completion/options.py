# SPDX-License-Identifier: MIT
"""The options of `MatrixCompletion`, and all of its settings, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._support.arrays import (
    FloatArray,
    as_pair,
    check_choice,
    check_count,
    check_flag,
    check_precision,
    check_scale,
)
from .._support.threads import MAX_THREADS
from .._training.options import Adaptive
from .entries import BIASES, DUPLICATES

METHODS: Final = ("variational", "gradient")
#: Default maximum of updates of each method, and depth of gradient descent.
_STEPS: Final = {"variational": 30, "gradient": 2000}
_DEPTH: Final = 3
#: Default width: an upper bound on the rank, which decay and early stopping find.
_DEFAULT_WIDTH: Final = 32


@dataclass(frozen=True)
class LayerOptions:
    """Initial layers and learning rates of a `MatrixCompletion` with method "gradient", and the precision.

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
    dtype : {"float64", "float32"}, optional
        Precision. Default: float64, and float32 for the moments of method "variational" with more than
        300,000 entries.
    keep_trajectories : bool
        Whether the fitted estimator keeps the runs on all entries in `trajectories_`. They take much more
        memory than the factors.
    """

    compress: bool = True
    scale: float = 1e-3
    learning_rate: float | str | Adaptive = "adaptive"
    outer: float = 1.0
    dtype: npt.DTypeLike | None = None
    keep_trajectories: bool = False


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
        ``n / (n + penalty)`` times its mean residual. Method "variational" starts from it, and learns the
        penalties.
    """

    kind: str | None = "auto"
    penalty: float | tuple[float, float] = 3.0


@dataclass(frozen=True)
class StoppingOptions:
    """Early stopping and validation of a `MatrixCompletion`.

    Parameters
    ----------
    validation_fraction : float
        Share of the entries held out to choose the settings and the number of updates, in [0, 1). 0: all
        `steps` are taken, "gradient" needs a number for `weight_decay`, and "variational" takes rank 8 and
        equal noise. Fewer than 10 entries held out decide nothing: all steps are then taken, and "auto"
        means 0.
    patience : int
        Number of records without a gain that ends a run of "gradient" on held-out entries.
    record_every : int
        Number of steps between records of "gradient", in which the number of steps is chosen.
    tolerance : float
        A run of "gradient" stops where the mean square of the residuals is at most this share of its
        initial value.
    budget : float, optional
        Seconds after which no further settings are tried. Default: no limit.
    """

    validation_fraction: float = 0.1
    patience: int = 5
    record_every: int = 10
    tolerance: float = 1e-12
    budget: float | None = None


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
        (p, q): while the layers of "gradient" learn, an entry counts ``n_i^-p m_j^-q`` times, for a row
        with n_i and a column with m_j known entries. p > 0 limits the influence of rows with many ratings;
        q < 0 raises that of columns with many. The default suits users in rows and items in columns (about
        0.003 in RMSE on MovieLens); (0, 0) weighs all entries alike. Without differences in the counts it
        has no effect.
    clip : (float, float), "range" or None
        Bounds of the predictions; "range": those of the ratings.
    form : {"auto", "long", "wide"}
        Meaning of X without y: "long" has three columns, row, column and rating; "wide" is the matrix, with
        the ids of a DataFrame in its index and columns. "auto": a DataFrame of three columns is long if the
        first or second one is not numeric, and anything else is wide; numbers that look like index pairs are
        an error.
    keep_seen : bool
        Whether the fitted estimator keeps which entries it has seen, for ``recommend(exclude_seen=True)``:
        4 bytes for each in memory, about 1 in a pickle. (The pickle of a 5,000 x 2,000 matrix of rank 16 with
        1, 2, 4 and 5 % of the entries has 1.20, 1.29, 1.44 and 1.51 times the size of the factors.)
    """

    shape: tuple[int, int] | None = None
    duplicates: str = "error"
    weighting: tuple[float, float] = (0.25, -0.25)
    clip: tuple[float, float] | str | None = None
    form: str = "auto"
    keep_seen: bool = True


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
    budget: float
    biases: str | None
    penalty: tuple[float, float]
    weighting: tuple[float, float]
    validation_fraction: float
    patience: int
    record_every: int
    duplicates: str
    seed: int
    n_threads: int
    dtype: np.dtype[Any] | None
    keeps_trajectories: bool
    method: str

    @classmethod
    def from_estimator(cls, estimator: Any) -> Settings:
        """Check the settings of an estimator; an error names the wrong one."""
        layers, biases, stopping, entries = (read_options(name, getattr(estimator, name)) for name in OPTIONS)
        check_choice(biases.kind, "biases", [word for word in BIASES if word is not None], optional=True)
        check_choice(entries.duplicates, "entries.duplicates", DUPLICATES)
        check_flag(entries.keep_seen, "entries.keep_seen")
        fraction = check_scale(stopping.validation_fraction, "stopping.validation_fraction", below=1.0)
        decay = _check_decay(estimator.weight_decay)
        method = check_choice(estimator.method, "method", METHODS)
        is_variational = method == "variational"
        if is_variational:
            _check_learned(estimator)
        elif decay is None and fraction == 0:
            raise ValueError(
                'weight_decay is "auto" and validation_fraction is 0, which leaves nothing to choose it by; '
                "wanted a number for weight_decay, or a fraction above 0"
            )
        if entries.clip is not None and not is_range(entries.clip):
            check_clip(entries.clip)
        dtype = None if layers.dtype is None else check_precision(layers.dtype)
        penalty = biases.penalty
        if isinstance(penalty, (tuple, list, np.ndarray)):
            both = _pair_of_numbers(penalty, "biases.penalty")
        else:
            one = check_scale(penalty, "biases.penalty")
            both = (one, one)
        return cls(
            width=None if estimator.rank is None else check_count(estimator.rank, "rank"),
            depth=_DEPTH if estimator.depth is None else check_count(estimator.depth, "depth", minimum=2),
            compress=check_flag(layers.compress, "layers.compress"),
            outer=check_scale(layers.outer, "layers.outer", strict=True),
            scale=check_scale(layers.scale, "layers.scale", strict=True),
            learning_rate=_check_rate(layers.learning_rate),
            decay=decay,
            steps=_STEPS[method] if estimator.steps is None else check_count(estimator.steps, "steps"),
            tolerance=check_scale(stopping.tolerance, "stopping.tolerance"),
            budget=math.inf
            if stopping.budget is None
            else check_scale(stopping.budget, "stopping.budget", strict=True),
            biases=biases.kind,
            penalty=both,
            weighting=_pair_of_numbers(entries.weighting, "entries.weighting", minimum=-math.inf),
            validation_fraction=fraction,
            patience=check_count(stopping.patience, "stopping.patience"),
            record_every=check_count(stopping.record_every, "stopping.record_every"),
            duplicates=entries.duplicates,
            seed=check_count(estimator.seed, "seed", minimum=0),
            n_threads=check_count(estimator.n_threads, "n_threads", minimum=0, maximum=MAX_THREADS),
            dtype=dtype or (None if is_variational else np.dtype(np.float64)),
            keeps_trajectories=check_flag(layers.keep_trajectories, "layers.keep_trajectories"),
            method=method,
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


def _check_learned(estimator: Any) -> None:
    """Raise if a setting of gradient descent is passed with the method that learns it."""
    if estimator.weight_decay != "auto":
        raise ValueError(
            f'weight_decay is {estimator.weight_decay!r}, but method "variational" learns it; wanted '
            '"auto", or method="gradient"'
        )
    if estimator.depth not in (None, 2):
        raise ValueError(
            f'depth is {estimator.depth!r}, but method "variational" has 2 layers; wanted method="gradient"'
        )


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


def apply_clip(values: FloatArray, clip: Any, limits: tuple[float, float]) -> FloatArray:
    """Return predictions within the bounds; `limits` are those of the ratings."""
    if clip is None:
        return values
    return np.clip(values, *(limits if is_range(clip) else check_clip(clip)))


def _pair_of_numbers(x: Any, name: str, minimum: float = 0.0) -> tuple[float, float]:
    first, second = as_pair(x, name, "two numbers")
    return (
        check_scale(first, f"{name}[0]", minimum=minimum),
        check_scale(second, f"{name}[1]", minimum=minimum),
    )
