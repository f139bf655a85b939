# SPDX-License-Identifier: MIT
"""`MatrixCompletion`: an estimator with the interface of scikit-learn."""

from __future__ import annotations

import inspect
import math
import os
import time
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from .._problem.factors import entries_of_product
from .._support.arrays import FloatArray
from .._support.checkpoint import Checkpoint
from .._support.moved import refuse_moved
from .._trajectory.trajectory import Trajectory
from .entries import Entries, fit_biases, merge_duplicates, read_entries, read_pairs
from .fitted import CheckpointedFit, Fit, Fitted, Trial, split_entries
from .gradient_descent import GradientFit
from .options import (
    OPTIONS,
    BiasOptions,
    EntryOptions,
    LayerOptions,
    Settings,
    StoppingOptions,
    check_clip,
    is_range,
    read_options,
)
from .search import VariationalFit

#: Maximum number of entries of a matrix that `predict` fills as a whole, 1 GB.
_LARGEST_MATRIX: Final = 2**27
#: Sweeps over the biases before the method begins.
_FIRST_SWEEPS: Final = 5
_METHODS: Final[dict[str, type[Fit]]] = {"variational": VariationalFit, "gradient": GradientFit}
_LAYERS, _STOPPING, _ENTRIES = LayerOptions(), StoppingOptions(), EntryOptions()

#: Keywords of version 0.1.0, and the code that replaces them.
_MOVED: Final = {
    **{
        name: f"layers=LayerOptions({name}=...)"
        for name in ("compress", "scale", "learning_rate", "outer", "dtype")
    },
    "bias_penalty": "biases=BiasOptions(penalty=...)",
    **{
        name: f"stopping=StoppingOptions({name}=...)"
        for name in ("validation_fraction", "patience", "record_every", "tolerance")
    },
    **{name: f"entries=EntryOptions({name}=...)" for name in ("shape", "duplicates", "weighting", "clip")},
}


class NotFittedError(ValueError, AttributeError):
    """A result of `fit` was requested before `fit`; with the base classes of scikit-learn's error."""


class MatrixCompletion:
    r"""Complete a matrix of which some entries are known, by biases and a linear network.

    .. math:: r_{ij} \approx \mu + a_i + b_j + (W_L \cdots W_1)_{ij}

    Method "variational" fits a network of two layers by variational Bayes: sweeps of alternating least
    squares that take the uncertainty of the other layer into account. The weight decay of every direction,
    and of the biases, is learned, so that directions that the entries do not support vanish. The rank and
    the model of the noise are chosen on entries that `fit` holds out, before it sweeps over all of them.

    Method "gradient" fits the biases by ridge regression, and a deep network by gradient descent, from a
    small initial scale, with weight decay and early stopping: all three favour low rank. The decay and the
    number of steps are chosen on held-out entries. Where decay alone ends a run, because there is little
    noise, the run continues without it: singular values that it has shrunk grow back, those that it has
    removed do not.

    Parameters
    ----------
    rank : int, optional
        Maximum rank. Default: for "variational" 8, 16, 32 and 64 are tried for as long as the held-out
        error falls; for "gradient" 32, or the number of rows or columns with entries if that is smaller,
        and with ``layers.compress=False`` the smaller side of the matrix.
    method : {"variational", "gradient"}
        Way to fit: variational Bayes for two layers, or gradient descent on a deep network.
    depth : int, optional
        Number of layers L, at least 2. Depth prefers low rank more strongly. Default: 3 for "gradient", 2 for
        "variational", which has no other.
    weight_decay : "auto" or float
        Weight decay of "gradient", over the leading singular value of the residuals: directions below this
        share of it are not learned (exactly so at the start, and for L = 2 altogether). "auto" tries 0.7,
        0.5, 0.35, .., 0 on held-out entries for as long as the error falls. Method "variational" learns it.
    steps : int, optional
        Maximum number of updates of a run: sweeps (default 30) or steps (default 2000, with decay and then
        without).
    layers : LayerOptions
        Initial layers and learning rates of "gradient", and precision.
    biases : BiasOptions, str or None
        Biases of the model; a string or None is the `kind`.
    stopping : StoppingOptions
        Held-out entries and early stopping.
    entries : EntryOptions
        Shape, duplicates, weights and bounds of the entries.
    seed : int
        Seed of the choice of held-out entries, and of random layers.
    n_threads : int
        Number of threads, as in `train`.
    progress : bool
        Whether to show a progress bar on a terminal for the last run of gradient descent.
    checkpoint : path or Checkpoint, optional
        Folder in which every `fit` has a subfolder, whose name follows from the entries and the settings.
        After a crash the same `fit` resumes bit for bit, with the same number of threads. So do the fits of a
        grid search. `every` counts steps.

    Attributes
    ----------
    mean_ : float
        mu.
    row_bias_, column_bias_ : ndarray, shape (n_rows,) and (n_columns,)
        a and b.
    row_factors_, column_factors_ : ndarray, shape (n_rows, k) and (n_columns, k)
        The product of the layers is ``row_factors_ @ column_factors_.T``; the columns of both are orthogonal
        and have the square roots of the singular values as norms, largest first.
    singular_values_ : ndarray, shape (k,)
        Nonzero singular values of the product.
    shape_ : (int, int)
        Shape of the completed matrix.
    noise_variance_ : float or None
        sigma^2 of "variational".
    weight_decay_ : float or None
        The chosen weight decay of "gradient".
    biases_ : str or None
        The chosen kind of biases.
    n_steps_ : int
        Number of updates that led to the factors. 0 where the layers gained nothing on held-out entries: the
        factors are then zero.
    trajectories_ : list of Trajectory
        Runs of "gradient" on standardised residuals, with decay and, if there is one, its continuation
        without decay. Empty unless ``layers.keep_trajectories`` is true.
    validation_ : list of (dict, int, float)
        Runs on held-out entries: what was tried, the best number of updates, and the RMSE there.
    fit_seconds_ : float
        Duration of the fit in seconds.

    Notes ----- Rows and columns without entries, and those beyond the shape in `predict`, have bias 0 and
    factors 0 with "gradient": of a new row only the mean and the column's bias are known. With
    "variational" those without entries get the mean of the prior.

    Ctrl-C during `fit` leaves a fitted estimator, from the last snapshot of the last run or from the best
    record so far, and raises KeyboardInterrupt, so that a grid search stops, too. (In a notebook
    you can use the estimator as if `fit` had returned.)

    Follows the conventions of scikit-learn without needing it: `clone`, `cross_val_score` and
    `GridSearchCV` take it with pairs. (Files are often sorted by user: give ``cv=KFold(5, shuffle=True)``,
    or whole users are held out.) For n entries and rank k, O(n k^2 + (rows + columns) k^3) for every sweep,
    and O(n k) for every step of gradient descent; nothing of the size of the whole matrix is formed.

    Lim, Teh 2007, "Variational Bayesian approach to movie rating prediction"; Raiko, Ilin, Karhunen 2007
    (variational); Yaras et al. 2024, arXiv 2406.04112 (compressed factorisations); Arora et al. 2019,
    arXiv 1905.13655 (depth and low rank); Koren, Bell, Volinsky 2009 (biases).

    Examples
    --------
    >>> import dlnfast as dln
    >>> import numpy as np
    >>> generator = np.random.default_rng(0)
    >>> matrix = np.outer(generator.normal(size=40), generator.normal(size=30))
    >>> known = generator.random((40, 30)) < 0.5
    >>> model = dln.MatrixCompletion().fit(np.where(known, matrix, np.nan))
    >>> bool(np.abs(model.predict() - matrix)[~known].max() < 0.01)
    True
    """

    #: Attribute that scikit-learn before version 1.6 reads.
    _estimator_type = "regressor"

    mean_: float
    row_bias_: FloatArray
    column_bias_: FloatArray
    row_factors_: FloatArray
    column_factors_: FloatArray
    singular_values_: FloatArray
    shape_: tuple[int, int]
    noise_variance_: float | None
    weight_decay_: float | None
    biases_: str | None
    n_steps_: int
    trajectories_: list[Trajectory]
    validation_: list[Trial]
    fit_seconds_: float

    @refuse_moved("MatrixCompletion", _MOVED)
    def __init__(
        self,
        rank: int | None = None,
        *,
        method: str = "variational",
        depth: int | None = None,
        weight_decay: float | str = "auto",
        steps: int | None = None,
        layers: LayerOptions = _LAYERS,
        biases: BiasOptions | str | None = "auto",
        stopping: StoppingOptions = _STOPPING,
        entries: EntryOptions = _ENTRIES,
        seed: int = 0,
        n_threads: int = 0,
        progress: bool = False,
        checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    ) -> None:
        self.rank = rank
        self.method = method
        self.depth = depth
        self.weight_decay = weight_decay
        self.steps = steps
        self.layers = layers
        self.biases = biases
        self.stopping = stopping
        self.entries = entries
        self.seed = seed
        self.n_threads = n_threads
        self.progress = progress
        self.checkpoint = checkpoint

    # --------------------------------------------------------------------------------------- settings

    @classmethod
    def _parameter_names(cls) -> list[str]:
        return sorted(name for name in inspect.signature(cls.__init__).parameters if name != "self")

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return all settings by name.

        Parameters
        ----------
        deep : bool
            Whether to return the single options, too, under names such as ``layers__scale``.

        Returns
        -------
        dict
        """
        found = {name: getattr(self, name) for name in self._parameter_names()}
        if deep:
            for name in OPTIONS:
                options = read_options(name, found[name])
                found |= {f"{name}__{field.name}": getattr(options, field.name) for field in fields(options)}
        return found

    def set_params(self, **params: Any) -> Self:
        """Change settings by name.

        Parameters
        ----------
        **params
            Settings and their new values; ``layers__scale`` sets one of the options in `layers`.

        Returns
        -------
        MatrixCompletion
            Itself.

        Raises
        ------
        ValueError
            For a name that is no setting; that of an earlier version gets its new name.
        """
        nested: dict[str, dict[str, Any]] = {}
        for name, value in params.items():
            outer, _, inner = name.partition("__")
            known = [field.name for field in fields(OPTIONS[outer])] if outer in OPTIONS else []
            if inner in known:
                nested.setdefault(outer, {})[inner] = value
            elif name in self._parameter_names():
                setattr(self, name, value)
            else:
                names = ", ".join(self._parameter_names())
                hint = f"; since version 0.2.0 write {_MOVED[name]}" if name in _MOVED else ""
                raise ValueError(f"{name!r} is no setting of {type(self).__name__}: {names}{hint}")
        for name, changed in nested.items():  # after whole options, as scikit-learn does
            setattr(self, name, replace(read_options(name, getattr(self, name)), **changed))
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
        """Return whether `fit` has been called, for scikit-learn."""
        return hasattr(self, "row_factors_")

    def __sklearn_tags__(self) -> Any:
        """Return the tags that scikit-learn asks for."""
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
            Row and column of every entry, from 0, if `y` is passed. Otherwise the matrix, with NaN, masked
            values or NA at unknown entries, or a sparse matrix, whose stored entries are the known ones,
            zeros included.
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
            For X and y of the wrong type or shape, or indices that are not integers.
        ValueError
            No entries; ratings that are not finite; negative indices, or such beyond `shape`; index pairs
            that occur twice; a rank above the smaller side; any setting out of its range.
        DivergedError
            For a `learning_rate` too large.
        KeyboardInterrupt
            After Ctrl-C, with the estimator fitted up to the last record.
        """
        start = time.perf_counter()
        settings = Settings.from_estimator(self)
        entries = merge_duplicates(
            read_entries(X, y, read_options("entries", self.entries).shape), settings.duplicates
        )
        settings.check_width(entries.shape)
        folder = None if self.checkpoint is None else CheckpointedFit(self.checkpoint, settings, entries)
        self._clip_range = (float(entries.values.min()), float(entries.values.max()))
        kind = "both" if settings.biases == "auto" else settings.biases
        # First of all, so that there is something to predict with whenever Ctrl-C comes.
        first = replace(
            Fitted.of_biases(fit_biases(entries, kind, settings.penalty, _FIRST_SWEEPS)), kind=kind
        )
        fit = _METHODS[settings.method](
            settings,
            entries,
            split_entries(settings, entries),
            self._clip_values,
            folder,
            self.progress,
            first,
        )
        self.shape_ = entries.shape
        try:
            with nullcontext() if folder is None else folder.owned():
                fit.run()
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(f"the estimator is fitted, up to {fit.unit} {fit.fitted.n_steps}")
            raise
        finally:
            self._take(fit)
            self.fit_seconds_ = time.perf_counter() - start
        return self

    def _take(self, fit: Fit) -> None:
        """Set the attributes that end with an underscore, which belong together."""
        found = fit.fitted
        self.mean_, self.row_bias_, self.column_bias_ = found.biases
        self.row_factors_, self.column_factors_, self.singular_values_ = found.factors
        self.biases_, self.n_steps_, self.weight_decay_ = found.kind, found.n_steps, found.weight_decay
        self.noise_variance_ = found.noise_variance
        self.validation_, self.trajectories_ = fit.trials, list(found.trajectories)

    # ---------------------------------------------------------------------------------------- predict

    def predict(self, X: npt.ArrayLike | None = None) -> FloatArray:
        """Return entries of the completed matrix.

        Parameters
        ----------
        X : array_like of int, shape (n, 2), optional
            Rows and columns. Where `fit` has not seen the row or the column, or its shape ends before it,
            the prediction is the mean and the bias of the other side. Default: the whole matrix.

        Returns
        -------
        ndarray, shape (n,), or (n_rows, n_columns)

        Raises
        ------
        TypeError, ShapeError, ValueError
            For X that is no array of pairs, negative indices, or a whole matrix of more than 2^27 entries.
        NotFittedError
            Before `fit`.
        """
        self._check_fitted()
        if X is None:
            if math.prod(self.shape_) > _LARGEST_MATRIX:
                raise ValueError(
                    f"X is None, but the matrix has {self.shape_[0]} x {self.shape_[1]} entries; wanted pairs"
                )
            whole = self.row_factors_ @ self.column_factors_.T
            whole += self.row_bias_[:, np.newaxis] + self.column_bias_ + self.mean_
            return self._clip_values(whole)
        rows, columns = read_pairs(X)
        i, j = (np.minimum(index, n - 1) for index, n in zip((rows, columns), self.shape_, strict=True))
        new_row, new_column = rows >= self.shape_[0], columns >= self.shape_[1]
        low = entries_of_product((self.row_factors_, self.column_factors_), i, j)
        result = self.mean_ + np.where(new_row, 0.0, self.row_bias_[i])
        result = result + np.where(new_column, 0.0, self.column_bias_[j])
        return self._clip_values(result + np.where(new_row | new_column, 0.0, low))

    def score(self, X: Any, y: npt.ArrayLike | None = None) -> float:
        """Return R^2 on known entries, in a form that `fit` takes: 1 - residual variance / variance.

        For constant ratings it is 1 if the predictions are exact and 0 otherwise, as in scikit-learn.

        Parameters
        ----------
        X : array_like, sparse matrix, or pairs of ids
            Known entries, as for `fit`.
        y : array_like, shape (n,), optional
            Values of the entries, if X holds pairs.

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
        """Return the root of the mean squared error on known entries, in a form that `fit` takes.

        Parameters
        ----------
        X : array_like, sparse matrix, or pairs of ids
            Known entries, as for `fit`.
        y : array_like, shape (n,), optional
            Values of the entries, if X holds pairs.

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

    def _clip_values(self, values: FloatArray) -> FloatArray:
        clip = read_options("entries", self.entries).clip
        if clip is None:
            return values
        low, high = self._clip_range if is_range(clip) else check_clip(clip)
        return np.clip(values, low, high)

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(f"this {type(self).__name__} is not fitted: call fit(X, y) first")
