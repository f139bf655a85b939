# SPDX-License-Identifier: MIT
"""`MatrixCompletion`: a matrix known in part, such as ratings, completed with one call of `fit`."""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ._arrays import (
    FloatArray,
    as_array,
    as_integers,
    as_matrix,
    as_pair,
    as_vector,
    check_choice,
    check_count,
    check_flag,
    check_precision,
    check_scale,
    is_sparse,
    known_values,
    random_generator,
    stored_entries,
)
from ._errors import ShapeError
from ._threads import MAX_THREADS
from .checkpoint import Checkpoint, RunFolder, State, identity_of, terminating
from .completion import Completion
from .descent import Adaptive, train
from .factors import entries_of_product, leading_factors
from .files import Arrays
from .initial import orthogonal
from .trajectory import Trajectory

_Places = npt.NDArray[np.int64]
_Vector = npt.NDArray[np.float64]

BIASES: Final = ("auto", "both", "rows", "columns", "mean", None)
DUPLICATES: Final = ("error", "mean")

#: What weight_decay="auto" tries, in this order, for as long as it gains.
DECAYS: Final = (0.7, 0.5, 0.35, 0.2, 0.1, 0.03, 0.0)
#: Poorer values in a row that end the search.
_POORER: Final = 2
#: Width where none is given: decay and early stopping find the rank, this only bounds it.
_DEFAULT_WIDTH: Final = 32
#: Fewer held-out entries than this decide nothing.
_FEWEST_HELD_OUT: Final = 10
#: Share by which the held-out error has to fall for patience to begin anew.
_LEAST_GAIN: Final = 1e-4
#: Held-out errors that biases have to stay below, over the size of the entries, to be worth fitting.
_WORTH: Final = 0.97
#: Held-out errors below this share of the spread of the ratings end the search: there is no noise.
_EXACT: Final = 1e-3
#: Sweeps of the two biases at most, and the change, over the largest rating, that ends them.
_MOST_SWEEPS: Final = 200
_SETTLED: Final = 1e-10
#: Patience with errors that stay the same, over that with errors that rise.
_FLAT: Final = 4
#: Of the singular values that layers start from, over the largest: training turns the vectors anyway, and
#: those of noise, which are nearly equal, would take most of the time.
_START_TOLERANCE: Final = 1e-4
#: Snapshots that the last run keeps for the case that it is interrupted.
_SNAPSHOTS: Final = 8
#: Entries that `predict` fills without being told which, 1 GB.
_LARGEST_WHOLE: Final = 2**27
#: Residuals below this share of the largest rating are rounding.
_ROUNDING: Final = 1e-12
#: Hexadecimal digits of a fit's identity that name its folder.
_NAME_LENGTH: Final = 16


class NotFittedError(ValueError, AttributeError):
    """An estimator was asked for what only `fit` finds out; of the types that scikit-learn's own has."""


class Entries(NamedTuple):
    """Known entries of a matrix, and how large it is."""

    rows: _Places
    columns: _Places
    values: _Vector
    shape: tuple[int, int]


class Biases(NamedTuple):
    """What a rating is before anything is known of the pair: mean, and what row and column add to it."""

    mean: float
    rows: _Vector
    columns: _Vector

    def at(self, rows: _Places, columns: _Places) -> _Vector:
        """Return the sums at some places."""
        return np.asarray(self.mean + self.rows[rows] + self.columns[columns])


def fit_biases(
    entries: Entries, which: str | None = "both", penalty: tuple[float, float] = (0.0, 0.0)
) -> Biases:
    r"""Return the mean, and biases a, b that minimise a ridge problem.

    .. math:: \sum_{ij} (r_{ij} - \mu - a_i - b_j)^2 + \lambda_a \sum_i a_i^2 + \lambda_b \sum_j b_j^2

    Parameters
    ----------
    entries : Entries
        The ratings r.
    which : {"both", "rows", "columns", "mean", None}
        What is fitted; the rest is zero, with None the mean too.
    penalty : (float, float)
        lambda_a and lambda_b: the bias of a row with n ratings is its mean residual times
        ``n / (n + lambda_a)``.

    Returns
    -------
    Biases

    Notes
    -----
    mu is the mean of the ratings, not shrunk. The two sides take turns in closed form until neither moves:
    block coordinate descent of a convex problem. O(n) a sweep. Rows and columns without ratings get 0.

    Koren, Bell, Volinsky, "Matrix factorization techniques for recommender systems", Computer 42 (2009).
    """
    i, j, r, shape = entries
    mean = float(np.mean(r)) if which is not None else 0.0
    residual = r - mean
    a, b = np.zeros(shape[0]), np.zeros(shape[1])
    # A divisor of 0 belongs to a sum of 0.
    share_a, share_b = (
        1.0 / np.maximum(np.bincount(index, minlength=n) + lam, np.finfo(np.float64).tiny)
        for index, n, lam in ((i, shape[0], penalty[0]), (j, shape[1], penalty[1]))
    )
    settled = _SETTLED * float(np.max(np.abs(r)))
    for _ in range(_MOST_SWEEPS):
        moved = 0.0
        if which in ("both", "columns"):
            before = b
            b = np.bincount(j, residual - a[i], minlength=shape[1]) * share_b
            moved = float(np.max(np.abs(b - before)))
        if which in ("both", "rows"):
            before = a
            a = np.bincount(i, residual - b[j], minlength=shape[0]) * share_a
            moved = max(moved, float(np.max(np.abs(a - before))))
        if which != "both" or moved <= settled:
            break
    return Biases(mean, a, b)


class MatrixCompletion:
    r"""Complete a matrix of which some entries are known: biases, and a deep linear network for the rest.

    .. math:: r_{ij} \approx \mu + a_i + b_j + (W_L \cdots W_1)_{ij}

    The biases are a ridge regression. What they leave is learned by gradient descent on the layers, from a
    small start, with weight decay, and stopped early: three ways to prefer low rank. How much decay and how
    many steps is found on entries that `fit` holds out, before it runs once more on all of them. Where decay
    alone ends a run, because there is little noise, the run goes on without it: what it has shrunk grows
    back, what it has removed does not.

    Parameters
    ----------
    rank : int, optional
        The rank at most: the width of the layers. Default: 32, or as many as there are rows or columns with
        entries. Decay and early stopping find how many are used; too many cost time more than accuracy. For
        ``compress=False`` the default is the whole smaller side.
    depth : int
        L, the number of layers, at least 2. Depth prefers low rank more strongly.
    compress : bool
        True: layers start in the leading singular vectors of the residuals, as those of `compressed_weights`
        with basis "surrogate". False: they start as random orthogonal ones as wide as `rank`; with the
        default rank a step costs as much as products of whole matrices, so for small matrices. Random layers
        see little of the leading directions at first, and want a larger `scale`, such as 0.01.
    outer : float
        Learning rate of the first and last layer over that of the others.
    scale : float
        Singular values of the product at the start, over the largest one that the entries suggest for the
        whole matrix. The smaller, the more is learned one direction after the other.
    learning_rate : "adaptive", Adaptive or float
        As of `train`. A number applies to residuals of unit variance and the mean over entries.
    weight_decay : "auto" or float
        Over the leading singular value of the residuals: directions below this share of it are not learned
        (exactly so at the start, and for L = 2 altogether). "auto" tries 0.7, 0.5, 0.35, .., 0 on held-out
        entries until it gains no more.
    steps : int
        Updates at most, with decay and then without.
    tolerance : float
        Stop where the mean square of the residuals is at most this share of what the biases left.
    biases : {"auto", "both", "rows", "columns", "mean", None}
        What is fitted before the layers. None: nothing, not even the mean. "auto": "both" where they predict
        held-out entries better than zero does, else None; "both" where too few are held out. Of a matrix
        without noise whose rows and columns have no levels of their own, biases spoil the low rank.
    bias_penalty : float or (float, float)
        Ridge penalty of the biases, or one for rows and one for columns: a row of n ratings keeps the share
        ``n / (n + bias_penalty)`` of what its ratings say.
    weighting : (float, float)
        (p, q): while the layers learn, an entry counts ``n_i^-p m_j^-q`` times, for a row with n_i and a
        column with m_j known entries. p > 0 keeps rows with many ratings from ruling; q < 0 trusts columns
        with many. The default is what suits users in rows and items in columns (about 0.003 in RMSE on
        MovieLens); (0, 0) counts all alike. Even counts make no difference.
    validation_fraction : float
        Share of the entries held out to choose the decay and the number of steps, in [0, 1). 0: all `steps`
        are taken, and `weight_decay` must be a number. Fewer than 10 entries held out decide nothing: all
        steps are then taken, and "auto" means 0.
    patience : int
        Records without a gain that end a run on held-out entries.
    record_every : int
        Steps between records: how finely the number of steps is chosen.
    clip : (float, float), "range" or None
        Bounds of what is predicted; "range": those of the ratings.
    shape : (int, int), optional
        Rows and columns, where pairs are given. Default: as many as the largest indices ask for.
    duplicates : {"error", "mean"}
        What to do with a place that is given twice.
    seed : int
        Of the entries held out, and of random layers.
    n_threads : int
        As of `train`.
    progress : bool
        A bar on a terminal for the last run.
    dtype : {"float64", "float32"}
        Precision of the layers.
    checkpoint : path or Checkpoint, optional
        A folder in which every `fit` keeps what it has done, under a name that follows from the entries and
        the settings: after a kill the same `fit` goes on, to the same bits with the same number of threads.
        So do those of a search over many settings. `every` counts steps.

    Attributes
    ----------
    mean_ : float
        mu.
    row_bias_, column_bias_ : ndarray, shape (n_rows,) and (n_columns,)
        a and b.
    row_factors_, column_factors_ : ndarray, shape (n_rows, k) and (n_columns, k)
        The product of the layers is ``row_factors_ @ column_factors_.T``; the columns of both are orthogonal
        and carry the root of the singular values, largest first.
    singular_values_ : ndarray, shape (k,)
        Those of the product, zeros left out.
    shape_ : (int, int)
    weight_decay_, biases_ : float, str or None
        What was chosen.
    n_steps_ : int
        Steps of the last fit, of both runs. 0 where the layers gained nothing on held-out entries: the
        factors are then zero.
    trajectory_ : Trajectory or None
        Of the last run, on standardised residuals, from which the factors are; None where there was none.
    trajectories_ : list of Trajectory
        The run with decay, and the one that goes on without, where there was one.
    validation_ : list of (float, int, float)
        For each run on held-out entries: the decay, its best number of steps, its held-out RMSE there.
    fit_seconds_ : float

    Notes
    -----
    Rows and columns without entries, and those beyond the shape that `predict` is asked about, have bias 0
    and factors 0: of a new row only the mean and the column's bias are known.

    Ctrl-C during `fit` leaves a fitted estimator, of the last kept snapshot of the last run or of the best
    record so far, and raises KeyboardInterrupt, so that a search over many settings ends too. (In a notebook
    go on with the estimator as if `fit` had returned.)

    Follows the conventions of scikit-learn without needing it: `clone`, `cross_val_score` and `GridSearchCV`
    take it with pairs. (Files are often sorted by user: give ``cv=KFold(5, shuffle=True)``, or whole users
    are held out.) O(n k) for n entries and width k at every step; nothing of the size of the whole
    matrix is formed.

    Yaras et al. 2024, arXiv 2406.04112 (compressed factorisations); Arora et al. 2019, arXiv 1905.13655
    (depth and low rank); Koren, Bell, Volinsky 2009 (biases).

    Examples
    --------
    >>> import dlnfast as dln
    >>> import numpy as np
    >>> pairs = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]])
    >>> model = dln.MatrixCompletion(bias_penalty=0.0).fit(pairs, [1.0, 2.0, 3.0, 4.0, 5.0])
    >>> model.predict([[2, 1]]).round(3)
    array([6.])
    """

    #: Of scikit-learn before version 1.6.
    _estimator_type = "regressor"

    mean_: float
    row_bias_: FloatArray
    column_bias_: FloatArray
    row_factors_: FloatArray
    column_factors_: FloatArray
    singular_values_: FloatArray
    shape_: tuple[int, int]
    weight_decay_: float
    biases_: str | None
    n_steps_: int
    trajectory_: Trajectory | None
    trajectories_: list[Trajectory]
    validation_: list[tuple[float, int, float]]
    fit_seconds_: float

    def __init__(
        self,
        rank: int | None = None,
        depth: int = 3,
        compress: bool = True,
        *,
        outer: float = 1.0,
        scale: float = 1e-3,
        learning_rate: float | str | Adaptive = "adaptive",
        weight_decay: float | str = "auto",
        steps: int = 2000,
        tolerance: float = 1e-12,
        biases: str | None = "auto",
        bias_penalty: float | tuple[float, float] = 3.0,
        weighting: tuple[float, float] = (0.25, -0.25),
        validation_fraction: float = 0.1,
        patience: int = 5,
        record_every: int = 10,
        clip: tuple[float, float] | str | None = None,
        shape: tuple[int, int] | None = None,
        duplicates: str = "error",
        seed: int = 0,
        n_threads: int = 0,
        progress: bool = False,
        dtype: npt.DTypeLike = "float64",
        checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    ) -> None:
        self.rank = rank
        self.depth = depth
        self.compress = compress
        self.outer = outer
        self.scale = scale
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.steps = steps
        self.tolerance = tolerance
        self.biases = biases
        self.bias_penalty = bias_penalty
        self.weighting = weighting
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.record_every = record_every
        self.clip = clip
        self.shape = shape
        self.duplicates = duplicates
        self.seed = seed
        self.n_threads = n_threads
        self.progress = progress
        self.dtype = dtype
        self.checkpoint = checkpoint

    # --------------------------------------------------------------------------------------- settings

    @classmethod
    def _parameter_names(cls) -> list[str]:
        return sorted(name for name in inspect.signature(cls.__init__).parameters if name != "self")

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return all settings by name; `deep` makes no difference, as none is an estimator.

        Parameters
        ----------
        deep : bool
            Accepted for scikit-learn.

        Returns
        -------
        dict
        """
        return {name: getattr(self, name) for name in self._parameter_names()}

    def set_params(self, **params: Any) -> Self:
        """Change settings by name.

        Parameters
        ----------
        **params
            Settings and their new values.

        Returns
        -------
        MatrixCompletion
            Itself.

        Raises
        ------
        ValueError
            For a name that is no setting.
        """
        names = self._parameter_names()
        for name, value in params.items():
            if name not in names:
                raise ValueError(f"{name!r} is no setting of {type(self).__name__}: {', '.join(names)}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        """Return the settings that are not the default."""
        defaults = inspect.signature(type(self).__init__).parameters
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name, parameter in defaults.items()
            if name != "self" and repr(getattr(self, name)) != repr(parameter.default)
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_is_fitted__(self) -> bool:
        """Tell scikit-learn whether `fit` has been here."""
        return hasattr(self, "row_factors_")

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn what it is; only scikit-learn asks."""
        from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags

        return Tags(
            estimator_type="regressor",
            target_tags=TargetTags(required=False),
            regressor_tags=RegressorTags(),
            input_tags=InputTags(sparse=True, allow_nan=True),
        )

    # -------------------------------------------------------------------------------------------- fit

    def fit(self, X: Any, y: npt.ArrayLike | None = None) -> Self:
        """Learn from the known entries.

        Parameters
        ----------
        X : array_like of int, shape (n, 2), or array_like, shape (n_rows, n_columns), or SciPy sparse matrix
            With `y`: the row and column of every entry, from 0. Without: the matrix, NaN, masked or NA where
            it is not known, or a sparse one, whose stored entries are the known ones, zeros included.
        y : array_like, shape (n,), optional
            The ratings. Those that are masked, or pandas' NA, are not known: their pairs only count for the
            shape.

        Returns
        -------
        MatrixCompletion
            Itself.

        Raises
        ------
        TypeError, ShapeError
            For X and y of the wrong type or shape, or places that are no integers.
        ValueError
            No entries; ratings that are not finite; negative places, or such beyond `shape`; places given
            twice; a rank above the smaller side; any setting out of its range.
        DivergedError
            For a `learning_rate` too large.
        KeyboardInterrupt
            After Ctrl-C, with the estimator fitted as far as it came.
        """
        start = time.perf_counter()
        settings = _Settings.checked(self)
        entries = _unique(_entries(X, y, self.shape), settings.duplicates)
        settings.check_width(entries.shape)
        kept = None if self.checkpoint is None else _KeptFit(self.checkpoint, settings, entries)
        parts = _split(settings, entries)
        settings = replace(settings, biases=_worthwhile_biases(settings, parts))
        self._clip_range = (float(entries.values.min()), float(entries.values.max()))
        self.shape_, self.validation_, self.trajectories_ = entries.shape, [], []
        self.trajectory_, self.n_steps_, self.weight_decay_ = None, 0, settings.decay or 0.0
        self.biases_ = settings.biases
        # First of all, so that there is something to predict with whenever Ctrl-C comes.
        biases = fit_biases(entries, settings.biases, settings.penalty)
        self._keep(biases, None, entries.shape)
        try:
            with nullcontext() if kept is None else kept.owned():
                plan = None if parts is None else self._search(settings, *parts, kept)
                if plan is None:
                    plan = [_Phase(settings.decay or 0.0, settings.steps)]
                network = _Network(settings, entries, biases)
                self.weight_decay_, self.n_steps_ = plan[0].decay, 0
                self._keep(network.biases, None, entries.shape)
                if not network.nothing_left:
                    self._carry_out(plan, network, kept)
        finally:
            self.fit_seconds_ = time.perf_counter() - start
        return self

    def _search(
        self, settings: _Settings, seen: Entries, held_out: Entries, kept: _KeptFit | None
    ) -> list[_Phase]:
        """Return the decay and the steps that suit held-out entries."""
        network = _Network(settings, seen, fit_biases(seen, settings.biases, settings.penalty))
        self._keep(network.biases, None, seen.shape)
        if network.nothing_left:
            return [_Phase(self.weight_decay_, 0)]
        exact = _EXACT * float(np.std(np.concatenate([seen.values, held_out.values])))
        best, plan = math.inf, [_Phase(self.weight_decay_, 0)]
        poorer, least = 0, math.inf
        for decay in DECAYS if settings.decay is None else (settings.decay,):
            first = self._watched(network, held_out, network.start, decay, best, kept)
            if first.error < best:
                best, plan = first.error, [first.phase(settings.steps)]
                self.weight_decay_ = decay
            if decay > 0 and first.step > 0 and not first.rises:
                assert first.layers is not None
                second = self._watched(network, held_out, first.layers, 0.0, best, kept)
                if second.step > 0 and second.error < best:
                    best, plan = second.error, [first.phase(settings.steps), second.phase(settings.steps)]
                    self.weight_decay_ = decay
            # By the runs with decay alone: one that goes on without may hide that less decay would keep more.
            poorer = 0 if first.error < least else poorer + 1
            least = min(least, first.error)
            if poorer == _POORER or best <= exact:
                break
        return plan

    def _watched(
        self,
        network: _Network,
        held_out: Entries,
        start: list[FloatArray],
        decay: float,
        best: float,
        kept: _KeptFit | None,
    ) -> _Watch:
        """Run until held-out entries gain no more; keep what is better than the best so far."""
        watch = _Watch(network.settings.patience, decay)
        known = network.biases.at(held_out.rows, held_out.columns)

        def keep(step: int, layers: list[FloatArray]) -> None:
            self.n_steps_ = step
            self._keep(network.biases, network.factors(layers), network.shape)

        def follow(begin: tuple[int, list[FloatArray]] | None, folder: _WatchFolder | None = None) -> None:
            for step, layers in network.records(start, decay, begin):
                alone = step == 0 and layers is network.start  # of which the layers know nothing yet
                low = 0.0 if alone else network.entries_of(layers, held_out.rows, held_out.columns)
                error = _rmse(self._clipped(known + low), held_out.values)
                if watch.sees(step, error, layers) and error < best and step > 0:
                    keep(step, layers)
                if folder is not None:
                    folder.note(watch, network, step, layers)
                if watch.is_over:
                    return

        if kept is None:
            follow(None)
        else:
            with kept.watch(len(self.validation_)) as folder:
                begin = folder.go_on(watch, network)
                if watch.layers is not None and watch.error < best and watch.step > 0:
                    keep(watch.step, watch.layers)
                if not (folder.has_ended or watch.is_over):
                    follow(begin, folder)
                folder.end()
        self.validation_.append((decay, watch.step, watch.error))
        return watch

    def _carry_out(self, plan: list[_Phase], network: _Network, kept: _KeptFit | None) -> None:
        """Run the phases on all entries, one from where the other ended."""
        layers = network.start
        for i, phase in enumerate(plan):
            if phase.steps == 0:
                continue
            done = self.n_steps_
            checkpoint = None if kept is None else kept.run(i)
            try:
                run = network.run(layers, phase, progress=self.progress, checkpoint=checkpoint)
            except KeyboardInterrupt as interrupt:
                partial = getattr(interrupt, "trajectory", None)
                if isinstance(partial, Trajectory):
                    self._take(network, partial, done, _last_snapshot(partial))
                interrupt.add_note(f"the estimator is fitted, up to step {self.n_steps_}")
                raise
            layers = self._take(network, run, done, int(run.steps[-1]))

    def _take(self, network: _Network, run: Trajectory, done: int, step: int) -> list[FloatArray]:
        self.trajectory_ = run
        self.trajectories_.append(run)
        self.n_steps_ = done + step
        layers = run.all_weights(step)
        if self.n_steps_ > 0:
            self._keep(network.biases, network.factors(layers), network.shape)
        return layers

    def _keep(
        self,
        biases: Biases,
        factors: tuple[FloatArray, FloatArray, FloatArray] | None,
        shape: tuple[int, int],
    ) -> None:
        self.mean_, self.row_bias_, self.column_bias_ = biases
        if factors is None:
            factors = np.zeros((shape[0], 1)), np.zeros((shape[1], 1)), np.zeros(1)
        self.row_factors_, self.column_factors_, self.singular_values_ = factors

    # ---------------------------------------------------------------------------------------- predict

    def predict(self, X: npt.ArrayLike | None = None) -> FloatArray:
        """Return entries of the completed matrix.

        Parameters
        ----------
        X : array_like of int, shape (n, 2), optional
            Rows and columns. Those that `fit` has not seen, or that are beyond its shape, get what is known:
            the mean and the bias of the other side. Default: the whole matrix.

        Returns
        -------
        ndarray, shape (n,), or (n_rows, n_columns)

        Raises
        ------
        TypeError, ShapeError, ValueError
            For X that is no array of pairs, negative places, or a whole matrix of more than 2^27 entries.
        NotFittedError
            Before `fit`.
        """
        self._check_fitted()
        if X is None:
            if math.prod(self.shape_) > _LARGEST_WHOLE:
                raise ValueError(
                    f"X is None, but the matrix has {self.shape_[0]} x {self.shape_[1]} entries; wanted pairs"
                )
            whole = self.row_factors_ @ self.column_factors_.T
            whole += self.row_bias_[:, np.newaxis] + self.column_bias_ + self.mean_
            return self._clipped(whole)
        rows, columns = _pairs(X)
        i, j = (np.minimum(place, n - 1) for place, n in zip((rows, columns), self.shape_, strict=True))
        new_row, new_column = rows >= self.shape_[0], columns >= self.shape_[1]
        low = entries_of_product((self.row_factors_, self.column_factors_), i, j)
        result = self.mean_ + np.where(new_row, 0.0, self.row_bias_[i])
        result = result + np.where(new_column, 0.0, self.column_bias_[j])
        return self._clipped(result + np.where(new_row | new_column, 0.0, low))

    def score(self, X: Any, y: npt.ArrayLike | None = None) -> float:
        """Return R^2 on known entries, given as to `fit`: 1 less the share of the variance that is missed.

        Of ratings that are all alike it is 1 where they are met, else 0, as scikit-learn has it.

        Parameters
        ----------
        X : array_like, sparse matrix, or pairs of ids
            Known entries, as for `fit`.
        y : array_like, shape (n,), optional
            Their values, where X holds pairs.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            Before `fit`, and for entries that `fit` would refuse.
        """
        self._check_fitted()
        entries = _entries(X, y, None)
        error = self._errors(entries)
        spread = entries.values - entries.values.mean()
        missed, total = float(error @ error), float(spread @ spread)
        if total == 0.0:
            return 1.0 if missed == 0.0 else 0.0
        return 1.0 - missed / total

    def rmse(self, X: Any, y: npt.ArrayLike | None = None) -> float:
        """Return the root of the mean squared error on known entries, given as to `fit`.

        Parameters
        ----------
        X : array_like, sparse matrix, or pairs of ids
            Known entries, as for `fit`.
        y : array_like, shape (n,), optional
            Their values, where X holds pairs.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            Before `fit`, and for entries that `fit` would refuse.
        """
        self._check_fitted()
        error = self._errors(_entries(X, y, None))
        return math.sqrt(float(error @ error) / error.size)

    def _errors(self, entries: Entries) -> FloatArray:
        return self.predict(np.column_stack([entries.rows, entries.columns])) - entries.values

    def _clipped(self, values: FloatArray) -> FloatArray:
        if self.clip is None:
            return values
        low, high = self._clip_range if _is_range(self.clip) else _check_clip(self.clip)
        return np.clip(values, low, high)

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(f"this {type(self).__name__} is not fitted: call fit(X, y) first")


# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
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
    def checked(cls, given: MatrixCompletion) -> _Settings:
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
        if given.clip is not None and not _is_range(given.clip):
            _check_clip(given.clip)
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


def _is_range(clip: Any) -> bool:
    return isinstance(clip, str) and clip == "range"


def _check_clip(clip: Any) -> tuple[float, float]:
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


# --------------------------------------------------------------------------------------------------
# Entries
# --------------------------------------------------------------------------------------------------


def _entries(X: Any, y: npt.ArrayLike | None, shape: tuple[int, int] | None) -> Entries:
    """Return the known entries from any of the three forms."""
    if is_sparse(X):
        if y is not None:
            raise TypeError("y is given with a sparse matrix X, which holds its values itself; wanted y=None")
        rows, columns, values, found = stored_entries(X, "X")
    elif y is None:
        rows, columns, values, found = _known_of_array(X)
    else:
        rows, columns = _pairs(X)
        values, which, count = known_values(y, "y (ratings)")
        if count != rows.size:
            raise ShapeError(f"y (ratings) has {count} values; wanted {rows.size}, one for each pair")
        found = (int(rows.max(initial=-1)) + 1, int(columns.max(initial=-1)) + 1)
        if shape is not None:
            found = _check_fits(shape, found)
        rows, columns = rows[which], columns[which]
    if values.size == 0:
        raise ValueError("X has no known entries; wanted at least one")
    known = as_vector(values, "X (known entries)", dtype=np.float64)
    if shape is not None and y is None and tuple(shape) != tuple(found):
        raise ShapeError(f"shape is {tuple(shape)}, but X has shape {tuple(found)}")
    # Explicit copies: what is given is never changed, nor kept.
    return Entries(
        np.array(rows, np.int64), np.array(columns, np.int64), np.array(known), (int(found[0]), int(found[1]))
    )


def _known_of_array(X: Any) -> tuple[_Places, _Places, FloatArray, tuple[int, int]]:
    array = as_array(X, "X", missing=True)
    if array.ndim != 2:
        raise ShapeError(f"X has shape {array.shape}; wanted a matrix (2 axes), or pairs (n, 2) and y")
    whole = as_matrix(array, "X", finite=False, empty=True)
    if whole.shape[1] in (2, 3) and len(whole) > 3 and _are_places(whole[:, :2]):
        raise ValueError(
            f"X has shape {whole.shape} and no gap, and y is not given: it looks like places, not like a "
            "matrix with NaNs; wanted fit(pairs, ratings) with pairs of shape (n, 2)"
        )
    rows, columns = np.nonzero(~np.isnan(whole))
    return rows, columns, whole[rows, columns], (whole.shape[0], whole.shape[1])


def _are_places(array: npt.NDArray[Any]) -> bool:
    """Tell whether these are whole numbers from 0, no two rows of them alike."""
    whole = np.isfinite(array).all() and (array >= 0).all() and (array == np.floor(array)).all()
    return bool(whole) and len(np.unique(array, axis=0)) == len(array)


def _pairs(X: Any) -> tuple[_Places, _Places]:
    array = as_array(X, "X")
    if array.ndim != 2 or array.shape[1] != 2:
        raise ShapeError(f"X has shape {array.shape}; wanted pairs (row, column) of shape (n, 2)")
    pairs = as_integers(array, "X")
    if pairs.size > 0 and pairs.min() < 0:
        n = int(np.argmax(pairs.min(axis=1) < 0))
        raise ValueError(f"X[{n}] is ({pairs[n, 0]}, {pairs[n, 1]}); wanted places from 0")
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def _check_fits(shape: Any, found: tuple[int, int]) -> tuple[int, int]:
    n_rows, n_columns = as_pair(shape, "shape", "two integers, (rows, columns)")
    given = check_count(n_rows, "shape[0]"), check_count(n_columns, "shape[1]")
    if found[0] > given[0] or found[1] > given[1]:
        raise ValueError(
            f"X reaches row {found[0] - 1} and column {found[1] - 1}; shape is {given}, which ends at "
            f"({given[0] - 1}, {given[1] - 1})"
        )
    return given


def _unique(entries: Entries, duplicates: str) -> Entries:
    """Return the entries in the order of rows and columns, each place once."""
    key = entries.rows * entries.shape[1] + entries.columns
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    start = np.flatnonzero(first)
    rows, columns, values = entries.rows[order], entries.columns[order], entries.values[order]
    if start.size < key.size:
        if duplicates == "error":
            again = int(np.flatnonzero(~first)[0])
            raise ValueError(
                f"X has ({rows[again]}, {columns[again]}) twice, rated {values[again - 1]:g} and "
                f'{values[again]:g}; wanted each place once, or duplicates="mean"'
            )
        counts = np.diff(np.append(start, key.size))
        values = np.add.reduceat(values, start) / counts
        rows, columns = rows[start], columns[start]
    return Entries(rows, columns, values, entries.shape)


def _split(settings: _Settings, entries: Entries) -> tuple[Entries, Entries] | None:
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


def _worthwhile_biases(settings: _Settings, parts: tuple[Entries, Entries] | None) -> str | None:
    """Return which biases to fit: what was asked for, or for "auto" what held-out entries say."""
    if settings.biases != "auto":
        return settings.biases
    if parts is None:
        return "both"
    kept, held_out = parts
    predicted = fit_biases(kept, "both", settings.penalty).at(held_out.rows, held_out.columns)
    nothing = _rmse(np.zeros_like(predicted), held_out.values)
    return "both" if _rmse(predicted, held_out.values) <= _WORTH * nothing else None


def _rmse(predicted: FloatArray, values: FloatArray) -> float:
    return math.sqrt(float(np.mean((predicted - values) ** 2)))


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------


class _Phase(NamedTuple):
    """A weight decay, and the steps with it at most."""

    decay: float
    steps: int


class _Watch:
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

    def phase(self, steps: int) -> _Phase:
        """Return what to do with all entries: as long, or to the end where nothing had cut it short."""
        return _Phase(self._decay, self.step if self.is_over else steps)


class _Network:
    """Biases of some entries, and the network that learns what they leave.

    Residuals are divided by their size, and weighted: with ``D_ij = d_i e_j`` the network learns
    ``D * residuals``, which is as low in rank as they are, and the loss weighs the entries by D^2.
    """

    def __init__(self, settings: _Settings, entries: Entries, biases: Biases) -> None:
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
        self.nothing_left = self._size <= _ROUNDING * largest * reach
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
            "singular_values": None,
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
            run = train(self.problem, layers, steps=few, record_every=few, **self._options(decay))
            self._remember(run)
            taken = int(run.steps[-1])
            step += taken
            layers = run.all_weights()
            if taken > 0:
                yield step, layers
            if taken < few:
                return

    def run(
        self, start: list[FloatArray], phase: _Phase, *, progress: bool, checkpoint: Checkpoint | None
    ) -> Trajectory:
        """Return a run of one phase."""
        run = train(
            self.problem,
            start,
            steps=phase.steps,
            record_every=self.settings.record_every,
            weights_every=math.ceil(phase.steps / _SNAPSHOTS),
            progress=progress,
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

    def entries_of(self, layers: Sequence[FloatArray], rows: _Places, columns: _Places) -> FloatArray:
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


class _KeptFit:
    """The folder of one fit: of its runs on held-out entries, and of those on all."""

    def __init__(self, checkpoint: Any, settings: _Settings, entries: Entries) -> None:
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
    def watch(self, number: int) -> Iterator[_WatchFolder]:
        """Own the folder of a run on held-out entries in the block."""
        kind = "dlnfast run on held-out entries"
        folder = RunFolder(self._path / f"held-out-{number}", self._identity, kind)
        with folder.owned():
            folder.begin({}, {})
            watched = _WatchFolder(folder, self.seconds)
            try:
                yield watched
            except BaseException as error:
                watched.save(error)
                raise

    def run(self, number: int) -> Checkpoint:
        """Return that of a run on all of them."""
        return Checkpoint(self._path / f"run-{number}", self.every, self.seconds)


class _WatchFolder:
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

    def go_on(self, watch: _Watch, network: _Network) -> tuple[int, list[FloatArray]] | None:
        """Let a watch know what it has seen; return where its run was, None before its first record."""
        self._last = self._written = state = self._folder.newest()
        if state is None:
            return None
        n_layers = network.settings.depth
        watch.go_on_from(state.about, state.arrays, n_layers)
        network.curvature = state.about["curvature"]
        return state.step, [state.arrays[f"layer_{i}"] for i in range(n_layers)]

    def note(self, watch: _Watch, network: _Network, step: int, layers: list[FloatArray]) -> None:
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


def _last_snapshot(run: Trajectory) -> int:
    """Return the last step at which an interrupted run kept its layers."""
    steps = getattr(run.states, "snapshot_steps", np.zeros(0))
    return int(steps[-1]) if len(steps) else 0


__all__ = ["BIASES", "DECAYS", "DUPLICATES", "MatrixCompletion", "NotFittedError", "fit_biases"]
