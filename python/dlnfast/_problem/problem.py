# SPDX-License-Identifier: MIT
"""`Problem`: least squares over linear maps, as sufficient statistics.

`data` and `sums` compute the statistics, from samples and from batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from .._support.arrays import (
    FloatArray,
    IntArray,
    as_matrix,
    check_choice,
    check_flag,
    check_scale,
    random_generator,
)
from .._support.errors import ShapeError
from .data import (
    WHITENING_METHODS,
    Moments,
    Samples,
    Whitening,
    distance_from_identity,
    gram_resolution,
    map_columns,
    sample_columns,
    squared_tolerance,
    whiten_inputs,
)
from .low_rank import LowRank, as_dense
from .sums import CenteredMoments, DataSums

if TYPE_CHECKING:
    from .._core import Objective

REDUCTIONS: Final = ("sum", "mean")
#: Largest ||S - I||_F / sqrt(d_x) of data that count as white.
_WHITE: Final = 1e-12
#: Largest smaller side of a target that is decomposed directly.
_SMALL_TARGET: Final = 512


class Problem:
    """Least squares over linear maps: ``l(W) = c/2 ||W X - Y||_F^2``, as sufficient statistics.

    Gradient descent depends on the data only through ``S = X X^T`` and ``Phi = Y X^T``, because the gradient
    with respect to W is ``c (W S - Phi)``. The constructor takes statistics; `from_data` computes them from
    data, and `from_batches` from data larger than memory.

    Parameters
    ----------
    target : array_like, shape (d_y, d_x), or LowRank
        Phi = Y X^T. A C-contiguous float64 array is not copied; a `LowRank` stays factored.
    input_gram : array_like, shape (d_x, d_x), optional
        S = X X^T, symmetric and positive semi-definite. None means S = I: white inputs.
    loss_scale : float
        c, positive: 1 for the sum over all entries of Y, 1 / (d_y N) for their mean. **It rescales every
        learning rate.**
    output_norm_squared : float, optional
        ||Y||_F^2. Default: the smallest value consistent with Phi and S, for which the minimal loss is 0.

    Attributes
    ----------
    target : ndarray of float64, shape (d_y, d_x), or LowRank
        Phi.
    input_gram : ndarray of float64, shape (d_x, d_x), or None
        S; None for the identity.
    loss_scale : float
        Factor c of the loss.
    dim_in, dim_out : int
        d_x and d_y.
    least_squares : ndarray, shape (d_y, d_x), or LowRank
        M*, the minimiser of the loss with the smallest norm: ``M* S = Phi``. The target itself if S = I.
    input_factor : ndarray, shape (d_x, q), or None
        F with ``S = F F^T``, q the rank of S: eigenvectors times the square roots of their eigenvalues. None
        if S = I.
    factor_target : ndarray, shape (d_y, q), or None
        G with ``Phi = G F^T``: the loss is ``c/2 ||W F - G||_F^2 + loss_floor``. None if S = I.
    reduction : {"sum", "mean"} or None
        Meaning of `loss_scale`, if known.
    n_samples : int or None
        N, if known.
    whitening : Whitening or None
        Whitening transform of the inputs, for problems from data.
    input_mean : ndarray, shape (d_x,), or None
        Mean that was subtracted from the raw inputs, if they were centred.

    Raises
    ------
    TypeError, ShapeError
        If an array has the wrong type or shape.
    ValueError
        If a value is not finite, `input_gram` is not symmetric (to 1e-10) or has a negative eigenvalue,
        `target` has a component outside the range of `input_gram`, or `output_norm_squared` is below its
        smallest consistent value: no data have such statistics.

    Notes
    -----
    Eigenvalues of S below ``4 (d_x + 1000) eps`` times the largest count as zero, in M* and in the loss; see
    `gram_resolution`. Cost: O(d_x^3) with `input_gram`, O(1) without.

    Model and statistics as in Yaras, Wang, Hu, Zhu, Balzano, Qu, "The Law of Parsimony in Gradient
    Descent for Learning Deep Linear Networks" (arXiv 2306.01154).

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast import Problem
    >>> problem = Problem(target=np.diag([3.0, 2.0, 0.0]), loss_scale=1 / 9)
    >>> problem.whitened, problem.loss_floor, problem.target_factors().rank
    (True, 0.0, 2)
    >>> round(problem.loss(np.zeros((3, 3))), 6)  # (9 + 4) / 18
    0.722222
    """

    def __init__(
        self,
        target: npt.ArrayLike | LowRank,
        input_gram: npt.ArrayLike | None = None,
        loss_scale: float = 1.0,
        *,
        output_norm_squared: float | None = None,
    ) -> None:
        self.target = _as_target(target)
        self.dim_out, self.dim_in = self.target.shape
        self.loss_scale = check_scale(loss_scale, "loss_scale", strict=True)
        self.input_gram = None if input_gram is None else _as_gram(input_gram, self.dim_in)
        self.least_squares: FloatArray | LowRank = self.target
        self.reduction: str | None = None
        self.n_samples: int | None = None
        self.whitening: Whitening | None = None
        self.input_mean: FloatArray | None = None
        self._samples: Samples | None = None
        self._layout = "columns"
        self._classes: IntArray | None = None
        self._source: dict[str, Any] = {"name": "statistics"}
        self._output_norm_squared = output_norm_squared
        if output_norm_squared is not None:
            self._output_norm_squared = check_scale(output_norm_squared, "output_norm_squared")
        self._gram_eigen: tuple[FloatArray, FloatArray] | None = None
        self.input_factor: FloatArray | None = None
        self.factor_target: FloatArray | None = None
        condition_number = 1.0 if self.input_gram is None else self._solve_least_squares(self.input_gram)
        self._check_output_norm(condition_number)

    # ----------------------------------------------------------------------------------- constructors

    @classmethod
    def from_data(
        cls,
        X: npt.ArrayLike,
        Y: npt.ArrayLike,
        *,
        whiten: str | None = None,
        center: bool = False,
        reduction: str = "mean",
        layout: str = "columns",
        rank_tolerance: float | None = None,
    ) -> Problem:
        """Return the problem of fitting ``Y`` by ``W X``, ``l(W) = c/2 ||W X - Y||_F^2``.

        Parameters
        ----------
        X : array_like, shape (d_x, N)
            Inputs of any real type. Integers, such as pixels, are converted a chunk at a time.
        Y : array_like, shape (d_y, N), or of int, shape (N,)
            Targets, or labels, which stand for their one-hot columns.
        whiten : {None, "zca", "pca", "cholesky"}
            Method that replaces X by T X with ``T X (T X)^T = I``, a sum, not a mean. A rank-deficient X is
            reduced to its numerical rank q: the problem then has dim_in = q. `problem.whitening` holds T and
            the measured deviation from I; see `whiten_inputs`.
        center : bool
            Whether to subtract the mean of the inputs first, `problem.input_mean`. Y is not centred, because
            Phi does not depend on the mean of Y once X is centred.
        reduction : {"mean", "sum"}
            c = 1 / (d_y N) or c = 1.
        layout : {"columns", "rows"}
            "rows": X is (N, d_x) and Y is (N, d_y), one sample per row.
        rank_tolerance : float, optional
            Largest singular value of X, relative to the first one, that `whiten` treats as zero.
            Default ``sqrt(4 (d_x + 1000) eps)``, about 1e-6.

        Returns
        -------
        Problem
            It refers to X and Y, which must not change as long as it exists. `labels` and `classes` are set
            if Y is one-hot.

        Raises
        ------
        TypeError, ShapeError
            If an array has the wrong type or shape.
        ValueError
            If a value is not finite, a square overflows, a setting is unknown, or X = 0 is to be whitened.

        Notes
        -----
        One pass over the data (three with whitening, one more with centring), in float64, a chunk of 32 MB
        at a time: O(N d_x (d_x + d_y)) time, O(d_x^2) memory.

        Without whitening, inputs with ``||S - I||_F <= 1e-12 sqrt(d_x)`` count as white: `input_gram` is then
        None, and `problem.whitening.error` holds the measured deviation.

        Examples
        --------
        >>> import numpy as np
        >>> from dlnfast import Problem
        >>> X = np.random.default_rng(0).standard_normal((4, 50))
        >>> problem = Problem.from_data(X, np.arange(50) % 3, whiten="zca")
        >>> problem.target.shape, problem.whitened, problem.classes
        ((3, 4), True, array([0, 1, 2]))
        """
        check_settings(whiten, center, reduction, rank_tolerance)
        samples = Samples(X, Y, layout, center)
        problem = cls._from_moments(samples, whiten, reduction, rank_tolerance)
        problem._samples = samples
        problem._describe_source("from_data", layout, whiten, center, rank_tolerance)
        return problem

    @classmethod
    def from_batches(
        cls,
        batches: Iterable[tuple[npt.ArrayLike, npt.ArrayLike]],
        *,
        whiten: str | None = None,
        center: bool = False,
        reduction: str = "mean",
        layout: str = "columns",
        rank_tolerance: float | None = None,
    ) -> Problem:
        """Return the problem of `from_data` from one pass over batches of samples, in constant memory.

        Parameters
        ----------
        batches : iterable of (X, Y)
            List, generator, PyTorch ``DataLoader`` or other iterable of pairs of arrays or CPU tensors. X is
            (d_x, n) and Y is (d_y, n), or a vector of n integer labels; n may differ between batches and may
            be 0. A batch may lack classes that others have.
        whiten, center, reduction, layout, rank_tolerance
            Same meaning as in `from_data`.

        Returns
        -------
        Problem
            The problem that `from_data` returns for the concatenated batches, without `inputs`, `outputs` and
            `labels`.

        Raises
        ------
        TypeError, ShapeError, ValueError
            For the reasons of `from_data`; the message names the index of the batch, from 0. ValueError also
            if there are no samples.

        Notes
        -----
        The same as ``SufficientStatistics(layout).add_batches(batches).problem(whiten, ...)``; see
        `SufficientStatistics` for the sums, their accuracy, and sums of several processes.

        Examples
        --------
        >>> import numpy as np
        >>> from dlnfast import Problem
        >>> generator = np.random.default_rng(0)
        >>> batches = ((generator.standard_normal((4, 50)), np.arange(50) % 3) for _ in range(10))
        >>> problem = Problem.from_batches(batches, whiten="zca")
        >>> problem.target.shape, problem.n_samples, problem.classes
        ((3, 4), 500, array([0, 1, 2]))
        """
        check_settings(whiten, center, reduction, rank_tolerance)
        sums = DataSums(layout).add_batches(batches)
        return cls._from_sums(sums, whiten, center, reduction, rank_tolerance)

    @classmethod
    def _from_sums(
        cls, sums: DataSums, whiten: str | None, center: bool, reduction: str, rank_tolerance: float | None
    ) -> Problem:
        moments = CenteredMoments(sums, center)
        problem = cls._from_moments(moments, whiten, reduction, rank_tolerance)
        problem._store_loss_floor(moments)
        problem._describe_source("from_batches", sums.layout, whiten, center, rank_tolerance)
        return problem

    @classmethod
    def _from_moments(
        cls, moments: Moments, whiten: str | None, reduction: str, rank_tolerance: float | None
    ) -> Problem:
        loss_scale = scale_of_reduction(reduction, moments.dim_out, moments.n_samples)
        if whiten is None:
            statistics = moments.statistics()
            whitening = _detect_white(statistics.input_gram)
        else:
            whitening, statistics = whiten_inputs(moments, whiten, rank_tolerance)
        norm_squared = statistics.output_norm_squared
        if whitening is not None:
            # If W X fits Y, ||Phi||^2 may exceed ||Y||^2 by as much as T S T^T exceeds I.
            explained = float(np.sum(statistics.target**2))
            if explained <= norm_squared * (1 + 4 * math.sqrt(whitening.rank) * whitening.error):
                norm_squared = max(norm_squared, explained)
        problem = cls(
            statistics.target,
            statistics.input_gram if whitening is None else None,
            loss_scale,
            output_norm_squared=norm_squared,
        )
        problem.reduction = reduction
        problem.n_samples = moments.n_samples
        problem.whitening = whitening
        problem.input_mean = moments.mean
        problem._classes = moments.classes
        return problem

    def _describe_source(
        self, name: str, layout: str, whiten: str | None, center: bool, rank_tolerance: float | None
    ) -> None:
        self._layout = layout
        self._source = {
            "name": name,
            "layout": layout,
            "whiten": whiten,
            "center": bool(center),
            "rank_tolerance": None if rank_tolerance is None else float(rank_tolerance),
        }

    # ------------------------------------------------------------------------------------------ data

    @property
    def whitened(self) -> bool:
        """Whether S = I."""
        return self.input_gram is None

    @cached_property
    def inputs(self) -> FloatArray | None:
        """The inputs in problem coordinates, T (X - mean), float64, (dim_in, N); computed on first access.

        None for a problem without samples, such as the problem of a run read from a file.
        """
        return None if self._samples is None else self._transform(self._samples.inputs)

    @cached_property
    def outputs(self) -> FloatArray | None:
        """The targets Y, float64 of shape (d_y, N); converted on first access. None without samples."""
        if self._samples is None:
            return None
        return np.ascontiguousarray(self._samples.read_outputs(slice(0, self._samples.n_samples)))

    @property
    def labels(self) -> IntArray | None:
        """The class of every sample, (N,), if Y is one-hot; None otherwise and without samples."""
        return None if self._samples is None else self._samples.labels

    @property
    def classes(self) -> IntArray | None:
        """The class of each row of Y, (K,), if Y is one-hot; None otherwise."""
        return self._classes

    def transform(self, X: npt.ArrayLike) -> FloatArray:
        """Transform raw inputs, such as those of a test set, to problem coordinates, T (X - mean).

        Parameters
        ----------
        X : array_like, shape (d_x, n)
            Inputs in the layout of `from_data` or `from_batches`: (n, d_x) if that was "rows".

        Returns
        -------
        ndarray of float64, shape (dim_in, n)
            One sample per column in any layout, so that ``W @ problem.transform(X)`` predicts.

        Raises
        ------
        ShapeError
            If the inputs have another dimension.
        ValueError
            If a value is not finite, or T is unknown because the problem comes from a file of an early
            version.
        """
        white = self.whitening
        if white is not None and white.method is not None and white.matrix is None:
            raise ValueError(
                f"the inputs were whitened ({white.method}), but the file that this problem was read from "
                "does not hold the matrix T: compute the problem again with Problem.from_data"
            )
        columns = sample_columns(X, "X", self._layout, "raw inputs")
        dim = self.dim_in if white is None or white.matrix is None else white.matrix.shape[1]
        if columns.shape[0] != dim:
            wanted = f"(n, {dim})" if self._layout == "rows" else f"({dim}, n)"
            found = columns.shape[::-1] if self._layout == "rows" else columns.shape
            raise ShapeError(f"X (raw inputs) has shape {found}; wanted {wanted}")
        return self._transform(columns)

    def _transform(self, columns: npt.NDArray[Any]) -> FloatArray:
        matrix = None if self.whitening is None else self.whitening.matrix
        return map_columns(columns, "X", matrix, self.input_mean)

    # ------------------------------------------------------------------------------------------ loss

    @cached_property
    def output_norm_squared(self) -> float:
        """||Y||_F^2."""
        known = self._output_norm_squared
        return self._explained_norm_squared if known is None else known

    @cached_property
    def loss_floor(self) -> float:
        """The minimum of the loss over W: ``c/2 (||Y||_F^2 - ||G||_F^2)``; if S = I, G = Phi.

        For problems from data or batches it is computed without cancellation, as ``c/2 ||M* X - Y||_F^2``.
        Otherwise a difference below ``4 (d_x + 1000) eps ||Y||_F^2``, which may be rounding error of the
        statistics, counts as 0.
        """
        if self._samples is not None:
            return self._minimal_loss(self._samples)
        known = self.output_norm_squared
        residual = known - self._explained_norm_squared
        return self.loss_scale / 2 * residual if residual > gram_resolution(self.dim_in) * known else 0.0

    def _minimal_loss(self, moments: Moments) -> float:
        fit = as_dense(self.least_squares)
        if self.whitening is not None and self.whitening.matrix is not None:
            fit = fit @ self.whitening.matrix
        return self.loss_scale / 2 * moments.squared_residual(fit)

    def _store_loss_floor(self, moments: Moments) -> None:
        """Compute `loss_floor` now, because the moments are not stored."""
        self.__dict__["loss_floor"] = self._minimal_loss(moments)

    @np.errstate(over="ignore", invalid="ignore")
    def loss(self, W: npt.ArrayLike) -> float:
        """Return ``l(W) = c/2 ||(W - M*) F||_F^2 + loss_floor`` with ``S = F F^T``, a sum of squares.

        Parameters
        ----------
        W : array_like, shape (d_y, d_x)
            The end-to-end matrix W_L ... W_1.

        Returns
        -------
        float
            The loss; infinity if it overflows.

        Raises
        ------
        ShapeError
            If W has another shape.
        ValueError
            If an entry is not finite.

        Notes
        -----
        There is no cancellation: the part above `loss_floor` is never negative, and its error is that of
        rounding ``(W - M*) F``, near ``(eps ||W|| ||F||)^2 c`` for very small losses.
        """
        matrix = as_matrix(W, "W", shape=(self.dim_out, self.dim_in), symbol="end-to-end matrix")
        error = matrix - as_dense(self.least_squares)
        if self.input_factor is not None:
            error = error @ self.input_factor
        quadratic = float(np.sum(error * error))
        return self.loss_scale / 2 * quadratic + self.loss_floor if math.isfinite(quadratic) else math.inf

    @cached_property
    def _explained_norm_squared(self) -> float:
        """tr(M* Phi^T) = ||G||_F^2, the smallest ||Y||_F^2 that is consistent with Phi and S."""
        if isinstance(self.least_squares, LowRank):
            return float(np.sum(self.least_squares.s**2))
        target = as_dense(self.target) if self.factor_target is None else self.factor_target
        return float(np.sum(target**2))

    def _solve_least_squares(self, gram: FloatArray) -> float:
        """Set M* and the eigenvalues and eigenvectors of S; return its condition number on its range."""
        eigenvalues, vectors = np.linalg.eigh(gram)
        resolution = gram_resolution(self.dim_in)
        largest = max(float(eigenvalues[-1]), 0.0)
        if eigenvalues[0] < -resolution * largest or largest == 0 > eigenvalues[0]:
            raise ValueError(
                f"input_gram (S) is not positive semi-definite: its eigenvalues reach from "
                f"{eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g}"
            )
        keep = eigenvalues > resolution * largest
        coordinates = as_dense(self.target) @ vectors
        self._check_range(coordinates, keep, largest)
        with np.errstate(over="ignore", invalid="ignore"):
            solution = (coordinates[:, keep] / eigenvalues[keep]) @ vectors[:, keep].T
        if not np.isfinite(solution).all():
            raise ValueError(
                f"input_gram (S) has eigenvalues down to {eigenvalues[keep][0]:.1e}: Phi S^-1 overflows"
            )
        self.least_squares = solution
        self._gram_eigen = np.maximum(eigenvalues, 0.0), vectors
        roots = np.sqrt(eigenvalues[keep])
        self.input_factor, self.factor_target = vectors[:, keep] * roots, coordinates[:, keep] / roots
        return largest / float(eigenvalues[keep][0]) if keep.any() else 1.0

    def _check_range(self, coordinates: FloatArray, keep: npt.NDArray[np.bool_], largest: float) -> None:
        """Refuse a target with a component outside the range of S that rounding of S does not explain."""
        outside, size = float(np.linalg.norm(coordinates[:, ~keep])), float(np.linalg.norm(coordinates))
        # ||Y X^T e|| <= ||Y|| sqrt(e^T S e): bound for an eigenvector e whose eigenvalue counts as zero.
        scale = max(size, math.sqrt((self._output_norm_squared or 0.0) * largest))
        if outside > math.sqrt(gram_resolution(self.dim_in)) * scale:
            raise ValueError(
                f"target (Phi = Y X^T) has a component outside the range of input_gram (S = X X^T), of "
                f"relative size {outside / size:.1e}: no data have both (S has rank {int(keep.sum())} of "
                f"{keep.size})"
            )

    def _check_output_norm(self, condition_number: float) -> None:
        if self._output_norm_squared is None:
            return
        rounding = gram_resolution(self.dim_in) * condition_number
        if self._output_norm_squared < self._explained_norm_squared * (1 - rounding):
            raise ValueError(
                f"output_norm_squared (||Y||^2) is {self._output_norm_squared:.6g}; wanted at least "
                f"{self._explained_norm_squared:.6g}, which target and input_gram imply"
            )

    @property
    def gram_eigen(self) -> tuple[FloatArray, FloatArray] | None:
        """Eigenvalues (d_x,), ascending, and eigenvectors (d_x, d_x) of S; None if S = I."""
        return self._gram_eigen

    # ---------------------------------------------------------------------------------------- target

    def target_factors(self, tolerance: float | None = None) -> LowRank:
        """Return the singular value decomposition of Phi, truncated at its numerical rank.

        Parameters
        ----------
        tolerance : float, optional
            Largest singular value, relative to the first one, that counts as zero. Default:
            ``max(d_y, d_x) eps`` for a dense target; 0 for a factored target, whose rank is exact.

        Returns
        -------
        LowRank

        Raises
        ------
        ValueError
            If the tolerance is negative.

        Notes
        -----
        A dense target is decomposed once, in O(d_x d_y min(d_x, d_y)). A large one of low rank is decomposed
        from random projections in O(d_x d_y r), after a check that they span its range to rounding.
        """
        if tolerance is None:
            exact = isinstance(self.target, LowRank)
            tolerance = 0.0 if exact else max(self.target.shape) * float(np.finfo(np.float64).eps)
        limit = check_scale(tolerance, "tolerance")
        values = self._target_svd.s
        return self._target_svd.truncated(int(np.sum(values > limit * values[:1])))

    @property
    def target_cut(self) -> float | None:
        """The largest singular value of Phi that counts as zero, relative to the first; None if exact."""
        if isinstance(self.target, LowRank):
            return None
        values, rank = self._target_svd.s, self.target_factors().rank
        return float(values[rank] / values[0]) if rank < len(values) and rank > 0 else 0.0

    def rank_exceeds(self, limit: int) -> bool:
        """Return whether the rank of Phi exceeds `limit`, without decomposing a large Phi of high rank.

        Parameters
        ----------
        limit : int
            Rank to compare with, at least 0.

        Returns
        -------
        bool

        Notes
        -----
        Cost: O(d_y d_x limit), unless Phi is decomposed already.
        """
        decomposed = "_target_svd" in self.__dict__ or isinstance(self.target, LowRank)
        if not decomposed and limit < min(self.target.shape) and min(self.target.shape) > _SMALL_TARGET:
            assert not isinstance(self.target, LowRank)
            found = _decompose_projection(self.target, limit + 8)
            if found is None:
                return True
            self.__dict__["_target_svd"] = found
        return self.target_factors().rank > limit

    @cached_property
    def _target_svd(self) -> LowRank:
        if isinstance(self.target, LowRank):
            return self.target
        return _decompose(self.target)

    def dense_target(self, dtype: npt.DTypeLike = np.float64) -> FloatArray:
        """Return Phi as an array of shape (d_y, d_x), not copied if it has this precision.

        Parameters
        ----------
        dtype : dtype
            float64 or float32.

        Returns
        -------
        ndarray, shape (d_y, d_x)
        """
        return as_dense(self.target).astype(dtype, copy=False)

    def engine_arguments(self, dtype: npt.DTypeLike) -> Objective:
        """Return the keyword arguments that describe the problem to the core's dense descent.

        Parameters
        ----------
        dtype : dtype
            float64 or float32.

        Returns
        -------
        dict
            Objective of the core: c, Phi, and S, F and G where S is not the identity.
        """
        held = (
            None if matrix is None else np.ascontiguousarray(matrix, dtype=dtype)
            for matrix in (self.input_gram, self.input_factor, self.factor_target)
        )
        input_gram, input_factor, factor_target = held
        return {
            "target": np.ascontiguousarray(self.dense_target(dtype)),
            "input_gram": input_gram,
            "input_factor": input_factor,
            "factor_target": factor_target,
            "loss_scale": self.loss_scale,
            "loss_floor": self.loss_floor,
            "observed": None,
            "measurements": None,
        }

    # --------------------------------------------------------------------------------------- metadata

    def describe(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        white = self.whitening
        return {
            "source": dict(self._source),
            "dim_in": self.dim_in,
            "dim_out": self.dim_out,
            "n_samples": self.n_samples,
            "loss_scale": self.loss_scale,
            "reduction": self.reduction,
            "target": "factors" if isinstance(self.target, LowRank) else "dense",
            "input_gram": "identity" if self.whitened else "dense",
            "output_norm_squared": self.output_norm_squared,
            "whitening": None
            if white is None
            else {
                "method": white.method,
                "rank": white.rank,
                "condition_number": white.condition_number,
                "error": white.error,
                "discarded": white.discarded,
            },
        }

    def _restore(
        self,
        description: Mapping[str, Any],
        loss_floor: float | None,
        arrays: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        """Set the attributes that `describe` returned, and those that depended on samples, from a file."""
        self.reduction, self.n_samples = description.get("reduction"), description.get("n_samples")
        self._source = dict(description.get("source", self._source))
        self._layout = self._source.get("layout", self._layout)
        white = description.get("whitening")
        self.whitening = None if white is None else Whitening(matrix=arrays.get("whitening"), **white)
        self.input_mean, self._classes = arrays.get("input_mean"), arrays.get("classes")
        if loss_floor is not None:
            self.__dict__["loss_floor"] = loss_floor  # computed from the samples, without cancellation

    def __repr__(self) -> str:
        """Return the dimensions, the kind of inputs and the scale of the loss."""
        inputs = "white inputs" if self.whitened else "general inputs"
        return f"Problem({self.dim_in} -> {self.dim_out}, {inputs}, loss_scale={self.loss_scale:.6g})"


def _decompose(matrix: FloatArray) -> LowRank:
    """Return the singular value decomposition, computed from random projections if the rank is low."""
    smaller = min(matrix.shape)
    if smaller > _SMALL_TARGET:
        for n_columns in (32, 256, smaller // 4 + 8):
            found = _decompose_projection(matrix, n_columns)
            if found is not None:
                return found
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return LowRank(left, values, np.ascontiguousarray(right.T))


def _decompose_projection(matrix: FloatArray, n_columns: int) -> LowRank | None:
    """Return the decomposition within the span of random projections; None if they miss part of the range."""
    probes = random_generator(0, ("range of the target",)).standard_normal((matrix.shape[1], n_columns))
    basis = np.linalg.qr(matrix @ probes)[0]
    inside = basis.T @ matrix
    missed = float(np.linalg.norm(matrix - basis @ inside))
    left, values, right = np.linalg.svd(inside, full_matrices=False)
    if missed > max(matrix.shape) * float(np.finfo(matrix.dtype).eps) * float(values[0]):
        return None
    return LowRank(basis @ left, values, np.ascontiguousarray(right.T))


def _as_target(target: npt.ArrayLike | LowRank) -> FloatArray | LowRank:
    if isinstance(target, LowRank):
        return target.astype(np.float64)
    return as_matrix(target, "target", dtype=np.float64, symbol="Phi")


def _as_gram(input_gram: npt.ArrayLike, dim: int) -> FloatArray:
    gram = as_matrix(input_gram, "input_gram", shape=(dim, dim), dtype=np.float64, symbol="S")
    asymmetry, size = float(np.linalg.norm(gram - gram.T)), float(np.linalg.norm(gram))
    if asymmetry > 1e-10 * size:
        raise ValueError(
            f"input_gram (S) is not symmetric: ||S - S^T||_F is {asymmetry / size:.1e} of ||S||_F; "
            f"wanted at most 1e-10"
        )
    return gram if asymmetry == 0 else (gram + gram.T) / 2


def _detect_white(gram: FloatArray) -> Whitening | None:
    deviation = distance_from_identity(gram)
    if deviation > _WHITE:
        return None
    return Whitening(None, None, rank=gram.shape[0], condition_number=1.0, error=deviation, discarded=0.0)


def check_problem(problem: object) -> Problem:
    """Return the argument if it is a `Problem`; raise TypeError otherwise."""
    if isinstance(problem, Problem):
        return problem
    raise TypeError(f"problem is {type(problem).__name__}; wanted a dlnfast.Problem")


def check_settings(whiten: str | None, center: bool, reduction: str, rank_tolerance: float | None) -> None:
    """Check the settings of `Problem.from_data` before any pass over the data."""
    if whiten is None and rank_tolerance is not None:
        raise ValueError("rank_tolerance is set, but whiten is None: only whitening reduces the rank")
    check_choice(whiten, "whiten", WHITENING_METHODS, optional=True)
    check_choice(reduction, "reduction", REDUCTIONS)
    check_flag(center, "center")
    squared_tolerance(rank_tolerance, 1)


def scale_of_reduction(reduction: str, dim_out: int, n_samples: int) -> float:
    """Return the loss scale c for a reduction."""
    return 1.0 if reduction == "sum" else 1.0 / (dim_out * n_samples)
