# SPDX-License-Identifier: MIT
"""`MatrixCompletion`: an estimator with the interface of scikit-learn."""

from __future__ import annotations

import inspect
import math
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .._problem.factors import entries_of_product
from .._support.arrays import FloatArray
from .._support.checkpoint import Checkpoint
from .._training.options import Adaptive
from .._trajectory.trajectory import Trajectory
from .entries import Biases, Entries, fit_biases, merge_duplicates, read_entries, read_pairs
from .fitting import (
    DECAYS,
    EXACT_FIT,
    LARGEST_MATRIX_BYTES,
    WORSE_DECAYS,
    CheckpointedFit,
    Network,
    Phase,
    Settings,
    Watch,
    WatchFolder,
    check_clip,
    choose_biases,
    is_range,
    last_snapshot,
    root_mean_square,
    split_entries,
)


class NotFittedError(ValueError, AttributeError):
    """An estimator was asked for what only `fit` finds out; of the types that scikit-learn's own has."""


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
        settings = Settings.checked(self)
        entries = merge_duplicates(read_entries(X, y, self.shape), settings.duplicates)
        settings.check_width(entries.shape)
        kept = None if self.checkpoint is None else CheckpointedFit(self.checkpoint, settings, entries)
        parts = split_entries(settings, entries)
        settings = replace(settings, biases=choose_biases(settings, parts))
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
                    plan = [Phase(settings.decay or 0.0, settings.steps)]
                network = Network(settings, entries, biases)
                self.weight_decay_, self.n_steps_ = plan[0].decay, 0
                self._keep(network.biases, None, entries.shape)
                if not network.nothing_left:
                    self._carry_out(plan, network, kept)
        finally:
            self.fit_seconds_ = time.perf_counter() - start
        return self

    def _search(
        self, settings: Settings, seen: Entries, held_out: Entries, kept: CheckpointedFit | None
    ) -> list[Phase]:
        """Return the decay and the steps that suit held-out entries."""
        network = Network(settings, seen, fit_biases(seen, settings.biases, settings.penalty))
        self._keep(network.biases, None, seen.shape)
        if network.nothing_left:
            return [Phase(self.weight_decay_, 0)]
        exact = EXACT_FIT * float(np.std(np.concatenate([seen.values, held_out.values])))
        best, plan = math.inf, [Phase(self.weight_decay_, 0)]
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
            if poorer == WORSE_DECAYS or best <= exact:
                break
        return plan

    def _watched(
        self,
        network: Network,
        held_out: Entries,
        start: list[FloatArray],
        decay: float,
        best: float,
        kept: CheckpointedFit | None,
    ) -> Watch:
        """Run until held-out entries gain no more; keep what is better than the best so far."""
        watch = Watch(network.settings.patience, decay)
        known = network.biases.at(held_out.rows, held_out.columns)

        def keep(step: int, layers: list[FloatArray]) -> None:
            self.n_steps_ = step
            self._keep(network.biases, network.factors(layers), network.shape)

        def follow(begin: tuple[int, list[FloatArray]] | None, folder: WatchFolder | None = None) -> None:
            for step, layers in network.records(start, decay, begin):
                alone = step == 0 and layers is network.start  # of which the layers know nothing yet
                low = 0.0 if alone else network.entries_of(layers, held_out.rows, held_out.columns)
                error = root_mean_square(self._clipped(known + low), held_out.values)
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

    def _carry_out(self, plan: list[Phase], network: Network, kept: CheckpointedFit | None) -> None:
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
                    self._take(network, partial, done, last_snapshot(partial))
                interrupt.add_note(f"the estimator is fitted, up to step {self.n_steps_}")
                raise
            layers = self._take(network, run, done, int(run.steps[-1]))

    def _take(self, network: Network, run: Trajectory, done: int, step: int) -> list[FloatArray]:
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
            if math.prod(self.shape_) > LARGEST_MATRIX_BYTES:
                raise ValueError(
                    f"X is None, but the matrix has {self.shape_[0]} x {self.shape_[1]} entries; wanted pairs"
                )
            whole = self.row_factors_ @ self.column_factors_.T
            whole += self.row_bias_[:, np.newaxis] + self.column_bias_ + self.mean_
            return self._clipped(whole)
        rows, columns = read_pairs(X)
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
        entries = read_entries(X, y, None)
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
        error = self._errors(read_entries(X, y, None))
        return math.sqrt(float(error @ error) / error.size)

    def _errors(self, entries: Entries) -> FloatArray:
        return self.predict(np.column_stack([entries.rows, entries.columns])) - entries.values

    def _clipped(self, values: FloatArray) -> FloatArray:
        if self.clip is None:
            return values
        low, high = self._clip_range if is_range(self.clip) else check_clip(self.clip)
        return np.clip(values, low, high)

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(f"this {type(self).__name__} is not fitted: call fit(X, y) first")
