# SPDX-License-Identifier: MIT
"""The problem that gradient descent solves: its sufficient statistics and where they came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ._arrays import (
    FloatArray,
    IntArray,
    as_matrix,
    as_vector,
    check_choice,
    check_count,
    check_flag,
    check_scale,
    random_generator,
)
from ._dispatch import core
from ._errors import ShapeError
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
from .initial import haar
from .statistics import SufficientStatistics

if TYPE_CHECKING:
    from ._core import Objective

REDUCTIONS: Final = ("sum", "mean")

#: ||S - I||_F / sqrt(d_x) up to which the data count as white.
_WHITE: Final = 1e-12
#: Targets up to this smaller side are decomposed directly.
_SMALL_TARGET: Final = 512
#: Largest dim for which `low_rank_recovery` decomposes a dim x dim matrix.
_DENSE_RECOVERY_DIM: Final = 1024


class LowRank:
    """A matrix held as factors: ``Phi = U diag(s) V^T``, its singular value decomposition.

    Parameters
    ----------
    U : array_like, shape (d_y, r)
        Left singular vectors, orthonormal columns. r may be 0.
    s : array_like, shape (r,)
        Singular values, descending and not negative.
    V : array_like, shape (d_x, r)
        Right singular vectors, orthonormal columns.

    Raises
    ------
    ShapeError
        For shapes that do not fit together.
    ValueError
        For columns that are not orthonormal, or singular values that are negative or out of order.

    Notes
    -----
    Float32 factors stay float32; of mixed precisions the higher one is taken. O((d_x + d_y) r) memory.

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast import LowRank
    >>> target = LowRank([[1.0], [0.0]], [3.0], [[0.0], [1.0], [0.0]])
    >>> target.shape, target.rank
    ((2, 3), 1)
    >>> target.dense()
    array([[0., 3., 0.],
           [0., 0., 0.]])
    """

    def __init__(self, U: npt.ArrayLike, s: npt.ArrayLike, V: npt.ArrayLike) -> None:
        values = as_vector(s, "s", symbol="singular values", empty=True)
        left = as_matrix(U, "U", shape=(None, values.size), symbol="left singular vectors", empty=True)
        right = as_matrix(V, "V", shape=(None, values.size), symbol="right singular vectors", empty=True)
        dtype = np.result_type(left, values, right)
        self.U = check_orthonormal(left, "U").astype(dtype, copy=False)
        self.V = check_orthonormal(right, "V").astype(dtype, copy=False)
        self.s = values.astype(dtype, copy=False)
        if np.any(self.s < 0) or np.any(np.diff(self.s) > 0):
            raise ValueError(f"s (singular values) is {self.s}; wanted descending values, none negative")

    @property
    def shape(self) -> tuple[int, int]:
        """(d_y, d_x)."""
        return self.U.shape[0], self.V.shape[0]

    @property
    def rank(self) -> int:
        """r, the number of singular values held (zeros included)."""
        return int(self.s.size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Precision of the factors."""
        return self.s.dtype

    @property
    def T(self) -> LowRank:
        """The transpose, ``V diag(s) U^T``."""
        return LowRank(self.V, self.s, self.U)

    def dense(self) -> FloatArray:
        """Return ``U diag(s) V^T`` as an array of shape (d_y, d_x)."""
        product: FloatArray = (self.U * self.s) @ self.V.T
        return product

    def truncated(self, rank: int) -> LowRank:
        """Return the best approximation of at most the given rank: the leading factors.

        Parameters
        ----------
        rank : int
            At least 0.

        Returns
        -------
        LowRank
            Views of the factors; this one where its rank is no larger.

        Raises
        ------
        ValueError
            For a negative rank.
        """
        count = check_count(rank, "rank", minimum=0)
        if count >= self.rank:
            return self
        return LowRank(self.U[:, :count], self.s[:count], self.V[:, :count])

    def astype(self, dtype: npt.DTypeLike) -> LowRank:
        """Return the same matrix with factors that are orthonormal to rounding in another precision.

        Parameters
        ----------
        dtype : dtype
            float64 or float32.

        Returns
        -------
        LowRank
            This one where the precision is the same; else O((d_y + d_x) r^2).
        """
        if self.dtype == np.dtype(dtype):
            return self
        # A mere cast would leave U and V as far from orthonormal as the coarser precision had them.
        left, left_triangle = np.linalg.qr(self.U.astype(dtype))
        right, right_triangle = np.linalg.qr(self.V.astype(dtype))
        u, s, vt = np.linalg.svd((left_triangle * self.s.astype(dtype)) @ right_triangle.T)
        return LowRank(left @ u, s, right @ vt.T)

    def __repr__(self) -> str:
        """Return the shape, rank and precision."""
        return f"LowRank({self.shape[0]} x {self.shape[1]}, rank {self.rank}, {self.dtype})"


def check_orthonormal(vectors: FloatArray, name: str) -> FloatArray:
    """Return `vectors` if its columns are orthonormal to rounding; otherwise say how far they are from it."""
    if vectors.shape[0] == 0:
        raise ShapeError(f"{name} is empty: shape {vectors.shape}")
    wide = vectors.astype(np.float64, copy=False)
    deviation = float(np.linalg.norm(wide.T @ wide - np.eye(vectors.shape[1])))
    # QR and SVD routines stay within a few eps per column; sums over very long columns add to that.
    limit = 1000 * float(np.finfo(vectors.dtype).eps) * math.sqrt(max(vectors.shape[1], 1))
    if not deviation <= limit:
        raise ValueError(
            f"{name} has columns that are not orthonormal: ||{name}^T {name} - I||_F is {deviation:.1e}; "
            f"wanted at most {limit:.1e} (orthonormalise with numpy.linalg.qr or numpy.linalg.svd)"
        )
    return vectors


class Problem:
    """Least squares over linear maps: ``l(W) = c/2 ||W X - Y||_F^2``, held as sufficient statistics.

    Gradient descent sees the data only through ``S = X X^T`` and ``Phi = Y X^T``, because the gradient
    with respect to W is ``c (W S - Phi)``. Made from statistics here, from data with `from_data`, from data
    larger than memory with `from_batches`.

    Parameters
    ----------
    target : array_like, shape (d_y, d_x), or LowRank
        Phi = Y X^T. Kept by reference where it is a C-contiguous float64 array; `LowRank` stays factored.
    input_gram : array_like, shape (d_x, d_x), optional
        S = X X^T, symmetric and positive semi-definite. None means S = I: white inputs.
    loss_scale : float
        c, positive: 1 for the sum over all entries of Y, 1 / (d_y N) for their mean. **It rescales every
        learning rate.**
    output_norm_squared : float, optional
        ||Y||_F^2. Default: the least value consistent with Phi and S, so that the best loss is 0.

    Attributes
    ----------
    target : ndarray of float64, shape (d_y, d_x), or LowRank
    input_gram : ndarray of float64, shape (d_x, d_x), or None
    loss_scale : float
    dim_in, dim_out : int
        d_x and d_y.
    least_squares : ndarray, shape (d_y, d_x), or LowRank
        M*, the minimiser of the loss with least norm: ``M* S = Phi``. The target itself where S = I.
    input_factor : ndarray, shape (d_x, q), or None
        F with ``S = F F^T``, q the rank of S: eigenvectors times the roots of their eigenvalues. None where
        S = I.
    factor_target : ndarray, shape (d_y, q), or None
        G with ``Phi = G F^T``: the loss is ``c/2 ||W F - G||_F^2 + loss_floor``. None where S = I.
    reduction : {"sum", "mean"} or None
        What `loss_scale` stands for, where known.
    n_samples : int or None
        N, where known.
    whitening : Whitening or None
        How the inputs became white, for problems made from data.
    input_mean : ndarray, shape (d_x,), or None
        What was subtracted from the raw inputs, where they were centred.

    Raises
    ------
    TypeError, ShapeError
        For arrays of the wrong type or shape.
    ValueError
        For values that are not finite, an `input_gram` that is not symmetric (to 1e-10) or has a negative
        eigenvalue, a `target` that reaches outside the range of `input_gram`, or an `output_norm_squared`
        below its least consistent value: no data have such statistics.

    Notes
    -----
    Eigenvalues of S below ``4 (d_x + 1000) eps`` of the largest count as zero, in M* and in the loss; see
    `dlnfast.data.gram_resolution`. O(d_x^3) where `input_gram` is given, O(1) otherwise.

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

    # ---------------------------------------------------------------------------------------- making

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
            Inputs of any real precision; integers such as pixels are welcome and are not converted as a
            whole.
        Y : array_like, shape (d_y, N), or of int, shape (N,)
            Targets, or labels, which stand for their one-hot columns.
        whiten : {None, "zca", "pca", "cholesky"}
            Replace X by T X with ``T X (T X)^T = I``, a sum, not a mean. A rank-deficient X is reduced
            to its numerical rank q: the problem then has dim_in = q. `problem.whitening` says how white
            the inputs became; see `dlnfast.data.whiten_inputs`.
        center : bool
            Subtract the mean of the inputs first, `problem.input_mean`. Y stays as it is: Phi is the same
            whether its mean is subtracted or not, once that of X is.
        reduction : {"mean", "sum"}
            c = 1 / (d_y N) or c = 1.
        layout : {"columns", "rows"}
            "rows": X is (N, d_x) and Y is (N, d_y), one sample a row.
        rank_tolerance : float, optional
            With `whiten`: share of the largest singular value of X up to which a direction counts as
            empty. Default ``sqrt(4 (d_x + 1000) eps)``, about 1e-6.

        Returns
        -------
        Problem
            It refers to X and Y, which must not change while it lives. `labels` and `classes` are set
            where Y is one-hot.

        Raises
        ------
        TypeError, ShapeError
            For arrays of the wrong type or shape.
        ValueError
            For values that are not finite or whose squares overflow, unknown settings, or X = 0 where it
            is to be whitened.

        Notes
        -----
        One pass over the data (three when whitening, one more when centring), in float64, a chunk of 32 MB
        at a time: O(N d_x (d_x + d_y)) time, O(d_x^2) memory.

        Without whitening, data that are white already, ``||S - I||_F <= 1e-12 sqrt(d_x)``, count as such:
        `input_gram` is then None, and `problem.whitening.error` keeps the measured deviation.

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
        problem = cls._of_moments(samples, whiten, reduction, rank_tolerance)
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
            X is (d_x, n) and Y is (d_y, n), or a vector of n integer labels; n may differ and may be 0.
            NumPy arrays, memory-mapped ones, CPU tensors; a list, a generator, a PyTorch ``DataLoader``. A
            batch may lack classes that others have.
        whiten, center, reduction, layout, rank_tolerance
            As in `from_data`.

        Returns
        -------
        Problem
            The one that `from_data` makes of all batches side by side, without `inputs`, `outputs` and
            `labels`.

        Raises
        ------
        TypeError, ShapeError, ValueError
            As from `from_data`, naming the batch by its index from 0; ValueError where there are no samples.

        Notes
        -----
        ``SufficientStatistics(layout).add_batches(batches).problem(whiten, ...)``; see
        `SufficientStatistics` for what is summed, how accurately, and for sums that several processes make.

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
        statistics = SufficientStatistics(layout).add_batches(batches)
        return statistics.problem(
            whiten=whiten, center=center, reduction=reduction, rank_tolerance=rank_tolerance
        )

    @classmethod
    def _of_moments(
        cls, moments: Moments, whiten: str | None, reduction: str, rank_tolerance: float | None
    ) -> Problem:
        loss_scale = _loss_scale(reduction, moments.dim_out, moments.n_samples)
        if whiten is None:
            statistics = moments.statistics()
            whitening = _found_white(statistics.input_gram)
        else:
            whitening, statistics = whiten_inputs(moments, whiten, rank_tolerance)
        norm_squared = statistics.output_norm_squared
        if whitening is not None:
            # ||Phi||^2 may exceed ||Y||^2 by as much as T S T^T exceeds I, where W X fits Y.
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
        """The inputs in problem coordinates, T (X - mean), float64, (dim_in, N); made on first access.

        None for a problem without samples, such as that of a run read from a file.
        """
        return None if self._samples is None else self._transformed(self._samples.inputs)

    @cached_property
    def outputs(self) -> FloatArray | None:
        """The targets Y, float64 of shape (d_y, N); made on first access. None without samples."""
        if self._samples is None:
            return None
        return np.ascontiguousarray(self._samples.read_outputs(slice(0, self._samples.n_samples)))

    @property
    def labels(self) -> IntArray | None:
        """The class of every sample, (N,), where Y is one-hot. None without samples."""
        return None if self._samples is None else self._samples.labels

    @property
    def classes(self) -> IntArray | None:
        """The class that each row of Y stands for, (K,), where Y is one-hot."""
        return self._classes

    def transform(self, X: npt.ArrayLike) -> FloatArray:
        """Return raw inputs in problem coordinates, T (X - mean), such as those of a test set.

        Parameters
        ----------
        X : array_like, shape (d_x, n)
            In the layout given to `from_data` or `from_batches`: (n, d_x) where that was "rows".

        Returns
        -------
        ndarray of float64, shape (dim_in, n)
            Always one sample a column, so that ``W @ problem.transform(X)`` predicts.

        Raises
        ------
        ShapeError
            For inputs of another size.
        ValueError
            For values that are not finite, or where T is not known: a file of an early version lacks it.
        """
        white = self.whitening
        if white is not None and white.method is not None and white.matrix is None:
            raise ValueError(
                f"the inputs were whitened ({white.method}), but the file that this problem was read from "
                "does not hold the matrix T: make the problem again with Problem.from_data"
            )
        columns = sample_columns(X, "X", self._layout, "raw inputs")
        dim = self.dim_in if white is None or white.matrix is None else white.matrix.shape[1]
        if columns.shape[0] != dim:
            wanted = f"(n, {dim})" if self._layout == "rows" else f"({dim}, n)"
            found = columns.shape[::-1] if self._layout == "rows" else columns.shape
            raise ShapeError(f"X (raw inputs) has shape {found}; wanted {wanted}")
        return self._transformed(columns)

    def _transformed(self, columns: npt.NDArray[Any]) -> FloatArray:
        matrix = None if self.whitening is None else self.whitening.matrix
        return map_columns(columns, "X", matrix, self.input_mean)

    # ------------------------------------------------------------------------------------------ loss

    @cached_property
    def output_norm_squared(self) -> float:
        """||Y||_F^2."""
        return self._explained if self._output_norm_squared is None else self._output_norm_squared

    @cached_property
    def loss_floor(self) -> float:
        """The loss that no W removes: ``c/2 (||Y||_F^2 - ||G||_F^2)`` (``||Phi||_F^2`` where S = I).

        From data or batches it is ``c/2 ||M* X - Y||_F^2``, which does not cancel. A difference that rounding
        of the statistics hides, below ``4 (d_x + 1000) eps`` of ``||Y||_F^2``, counts as 0.
        """
        if self._samples is not None:
            return self._least_loss(self._samples)
        known = self.output_norm_squared
        rest = known - self._explained
        return self.loss_scale / 2 * rest if rest > gram_resolution(self.dim_in) * known else 0.0

    def _least_loss(self, moments: Moments) -> float:
        fit = as_dense(self.least_squares)
        if self.whitening is not None and self.whitening.matrix is not None:
            fit = fit @ self.whitening.matrix
        return self.loss_scale / 2 * moments.squared_residual(fit)

    def _keep_loss_floor(self, moments: Moments) -> None:
        """Take the least loss from what is only at hand now."""
        self.__dict__["loss_floor"] = self._least_loss(moments)

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
            Infinity where it overflows.

        Raises
        ------
        ShapeError
            For another shape.
        ValueError
            For entries that are not finite.

        Notes
        -----
        Nothing cancels: the part above `loss_floor` is not negative, and exact to rounding of
        ``(W - M*) F``, about ``(eps ||W|| ||F||)^2 c`` where the loss is as small as that.
        """
        matrix = as_matrix(W, "W", shape=(self.dim_out, self.dim_in), symbol="end-to-end matrix")
        error = matrix - as_dense(self.least_squares)
        if self.input_factor is not None:
            error = error @ self.input_factor
        quadratic = float(np.sum(error * error))
        return self.loss_scale / 2 * quadratic + self.loss_floor if math.isfinite(quadratic) else math.inf

    @cached_property
    def _explained(self) -> float:
        """tr(M* Phi^T) = ||G||_F^2, the least ||Y||_F^2 that Phi and S allow."""
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
        """Refuse a target outside the range of S by more than directions that S cannot resolve allow."""
        outside, size = float(np.linalg.norm(coordinates[:, ~keep])), float(np.linalg.norm(coordinates))
        # ||Y X^T e|| <= ||Y|| sqrt(e^T S e): what data may put along an eigenvector that counts as empty.
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
        if self._output_norm_squared < self._explained * (1 - rounding):
            raise ValueError(
                f"output_norm_squared (||Y||^2) is {self._output_norm_squared:.6g}; wanted at least "
                f"{self._explained:.6g}, which target and input_gram imply"
            )

    @property
    def gram_eigen(self) -> tuple[FloatArray, FloatArray] | None:
        """Eigenvalues (d_x,), ascending, and eigenvectors (d_x, d_x) of S; None where S = I."""
        return self._gram_eigen

    # ---------------------------------------------------------------------------------------- target

    def target_factors(self, tolerance: float | None = None) -> LowRank:
        """Return the singular value decomposition of Phi, cut at its numerical rank.

        Parameters
        ----------
        tolerance : float, optional
            Singular values up to this share of the largest count as zero. Default:
            ``max(d_y, d_x) eps`` for a dense target; 0 for a factored one, whose rank is exact.

        Returns
        -------
        LowRank

        Raises
        ------
        ValueError
            For a negative tolerance.

        Notes
        -----
        A dense target is decomposed once, O(d_x d_y min(d_x, d_y)); a large one of low rank from random
        projections, O(d_x d_y r), after a check that they hold all of it to rounding.
        """
        if tolerance is None:
            exact = isinstance(self.target, LowRank)
            tolerance = 0.0 if exact else max(self.target.shape) * float(np.finfo(np.float64).eps)
        limit = check_scale(tolerance, "tolerance")
        values = self._decomposed_target.s
        return self._decomposed_target.truncated(int(np.sum(values > limit * values[:1])))

    @property
    def target_cut(self) -> float | None:
        """The largest singular value of Phi that counts as zero, as a share of the first; None if exact."""
        if isinstance(self.target, LowRank):
            return None
        values, rank = self._decomposed_target.s, self.target_factors().rank
        return float(values[rank] / values[0]) if rank < len(values) and rank > 0 else 0.0

    def rank_exceeds(self, limit: int) -> bool:
        """Return whether the rank of Phi is above `limit`, without decomposing a large Phi of high rank.

        Parameters
        ----------
        limit : int
            At least 0.

        Returns
        -------
        bool

        Notes
        -----
        Cost: O(d_y d_x limit), unless Phi is decomposed already.
        """
        decomposed = "_decomposed_target" in self.__dict__ or isinstance(self.target, LowRank)
        if not decomposed and limit < min(self.target.shape) and min(self.target.shape) > _SMALL_TARGET:
            assert not isinstance(self.target, LowRank)
            found = _within_range(self.target, limit + 8)
            if found is None:
                return True
            self.__dict__["_decomposed_target"] = found
        return self.target_factors().rank > limit

    @cached_property
    def _decomposed_target(self) -> LowRank:
        if isinstance(self.target, LowRank):
            return self.target
        return _decomposed(self.target)

    def dense_target(self, dtype: npt.DTypeLike = np.float64) -> FloatArray:
        """Return Phi as an array of shape (d_y, d_x); the problem's own one where the precision fits.

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
        """Return what the dense engine learns from.

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

    # ------------------------------------------------------------------------------------- reporting

    def describe(self) -> dict[str, Any]:
        """Return the configuration in values that JSON knows."""
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
        """Take back what `describe` said, and what else a file keeps of the samples that it does not hold."""
        self.reduction, self.n_samples = description.get("reduction"), description.get("n_samples")
        self._source = dict(description.get("source", self._source))
        self._layout = self._source.get("layout", self._layout)
        white = description.get("whitening")
        self.whitening = None if white is None else Whitening(matrix=arrays.get("whitening"), **white)
        self.input_mean, self._classes = arrays.get("input_mean"), arrays.get("classes")
        if loss_floor is not None:
            self.__dict__["loss_floor"] = loss_floor  # summed over the samples, without cancellation

    def __repr__(self) -> str:
        """Return the dimensions, the kind of inputs and the scale of the loss."""
        inputs = "white inputs" if self.whitened else "general inputs"
        return f"Problem({self.dim_in} -> {self.dim_out}, {inputs}, loss_scale={self.loss_scale:.6g})"


def _decomposed(matrix: FloatArray) -> LowRank:
    """Return the singular value decomposition, from the range of random projections where that is enough."""
    smaller = min(matrix.shape)
    if smaller > _SMALL_TARGET:
        for n_columns in (32, 256, smaller // 4 + 8):
            found = _within_range(matrix, n_columns)
            if found is not None:
                return found
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return LowRank(left, values, np.ascontiguousarray(right.T))


def _within_range(matrix: FloatArray, n_columns: int) -> LowRank | None:
    """Return the decomposition within the range of random projections, None if that misses anything."""
    probes = random_generator(0, ("range of the target",)).standard_normal((matrix.shape[1], n_columns))
    basis = np.linalg.qr(matrix @ probes)[0]
    inside = basis.T @ matrix
    missed = float(np.linalg.norm(matrix - basis @ inside))
    left, values, right = np.linalg.svd(inside, full_matrices=False)
    if missed > max(matrix.shape) * float(np.finfo(matrix.dtype).eps) * float(values[0]):
        return None
    return LowRank(basis @ left, values, np.ascontiguousarray(right.T))


def as_dense(matrix: FloatArray | LowRank) -> FloatArray:
    """Return the matrix as an array, itself where it is one."""
    return matrix.dense() if isinstance(matrix, LowRank) else matrix


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


def _found_white(gram: FloatArray) -> Whitening | None:
    deviation = distance_from_identity(gram)
    if deviation > _WHITE:
        return None
    return Whitening(None, None, rank=gram.shape[0], condition_number=1.0, error=deviation, discarded=0.0)


def check_problem(problem: object) -> Problem:
    """Return the problem if it is one."""
    if isinstance(problem, Problem):
        return problem
    raise TypeError(f"problem is {type(problem).__name__}; wanted a dlnfast.Problem")


def check_settings(whiten: str | None, center: bool, reduction: str, rank_tolerance: float | None) -> None:
    """Refuse wrong settings before any pass over the data."""
    if whiten is None and rank_tolerance is not None:
        raise ValueError("rank_tolerance is given, but whiten is None: only whitening reduces the rank")
    check_choice(whiten, "whiten", WHITENING_METHODS, optional=True)
    check_choice(reduction, "reduction", REDUCTIONS)
    check_flag(center, "center")
    squared_tolerance(rank_tolerance, 1)


def _loss_scale(reduction: str, dim_out: int, n_samples: int) -> float:
    return 1.0 if reduction == "sum" else 1.0 / (dim_out * n_samples)


# --------------------------------------------------------------------------------------------------
# Standard problems
# --------------------------------------------------------------------------------------------------


def low_rank_recovery(dim: int, rank: int, seed: int = 0, reduction: str = "mean") -> Problem:
    """Return the recovery of a random low-rank matrix: Phi = rank-r truncation of a Gaussian, S = I.

    Parameters
    ----------
    dim : int
        d. The target is d x d, the best rank-r approximation of a matrix of independent N(0, 1) entries.
    rank : int
        r, at most `dim`.
    seed : int
        Non-negative.
    reduction : {"mean", "sum"}
        c = 1 / d^2 (as N = d samples, X = I, are implied) or c = 1.

    Returns
    -------
    Problem
        Its target is a `LowRank`.

    Raises
    ------
    ValueError
        For a rank above d, and an unknown reduction.

    Notes
    -----
    Up to d = 1024 the Gaussian is drawn and decomposed. Beyond, no d x d array is formed, and the law of
    Phi is exactly the same: the singular vectors of a Gaussian matrix are independent Haar frames (QR of
    a d x r Gaussian) and its singular values those of the upper bidiagonal matrix with independent
    chi_d, chi_(d-1), ..., chi_1 on the diagonal and chi_(d-1), ..., chi_1 above it (Dumitriu, Edelman,
    "Matrix models for beta ensembles", J. Math. Phys. 43 (2002)), of which the first rows are enough for
    the r largest. O(d r^2) time, O(d r) memory.

    The setting of Yaras et al. 2023, arXiv 2306.01154.

    Examples
    --------
    >>> from dlnfast import low_rank_recovery
    >>> problem = low_rank_recovery(dim=30, rank=3)
    >>> problem.target
    LowRank(30 x 30, rank 3, float64)
    """
    dim, rank = check_count(dim, "dim"), check_count(rank, "rank", minimum=0)
    if rank > dim:
        raise ValueError(f"rank is {rank}; wanted at most dim = {dim}")
    check_settings(None, False, reduction, None)
    loss_scale = _loss_scale(reduction, dim, dim)
    draw = _truncated_gaussian if dim <= _DENSE_RECOVERY_DIM else _truncated_gaussian_factors
    problem = Problem(draw(dim, rank, seed), loss_scale=loss_scale)
    problem.reduction = reduction
    problem.n_samples = dim
    problem._source = {"name": "low_rank_recovery", "dim": dim, "rank": rank, "seed": int(seed)}
    return problem


def _truncated_gaussian(dim: int, rank: int, seed: int) -> LowRank:
    gaussian = random_generator(seed, ("low_rank_recovery", "matrix")).standard_normal((dim, dim))
    left, values, right = np.linalg.svd(gaussian)
    return LowRank(left[:, :rank], values[:rank], right[:rank].T)


def _truncated_gaussian_factors(dim: int, rank: int, seed: int) -> LowRank:
    generator = random_generator(seed, ("low_rank_recovery", "singular values"))
    degrees = np.arange(dim, 0, -1)
    diagonal = np.sqrt(generator.chisquare(degrees))
    superdiagonal = np.sqrt(generator.chisquare(degrees[1:]))
    # The first singular vectors live in the first rows, of which there are about d^(1/3) k^(2/3) (their tails
    # are those of Airy functions): what follows this many rows changes no bit of the values.
    rows = min(dim, int((40 + 10 * rank ** (2 / 3)) * dim ** (1 / 3)))
    values = core.bidiagonal_singular_values(diagonal[:rows], superdiagonal[: rows - 1], rank)
    left = haar(dim, rank, random_generator(seed, ("low_rank_recovery", "left")))
    right = haar(dim, rank, random_generator(seed, ("low_rank_recovery", "right")))
    return LowRank(left, values, right)


def classification(
    n_classes: int, samples_per_class: int, dim: int | None = None, seed: int = 0, reduction: str = "mean"
) -> Problem:
    """Return a balanced classification of random orthonormal data: ``Y = I_K (x) 1_n^T``.

    Parameters
    ----------
    n_classes : int
        K, the output dimension.
    samples_per_class : int
        n, so that N = K n.
    dim : int, optional
        d_x. Default: N. With N >= d_x the rows of X are orthonormal and S = I; with N < d_x its columns
        are, and S is a projector of rank N. Haar-distributed either way.
    seed : int
        Non-negative.
    reduction : {"mean", "sum"}
        c = 1 / (K N) or c = 1.

    Returns
    -------
    Problem
        With `inputs`, `outputs`, `labels` (sorted by class) and `classes`.

    Raises
    ------
    ValueError
        For numbers below 1, a d_x that does not fit N, and an unknown reduction.

    Notes
    -----
    The setting of Wang, Li, Yaras, Zhu, Balzano, Hu, Qu, "Understanding Deep Representation Learning via
    Layerwise Feature Compression and Discrimination" (arXiv 2311.02960).

    Cost: a QR decomposition of a d_x x N matrix.

    Examples
    --------
    >>> from dlnfast import classification
    >>> problem = classification(n_classes=5, samples_per_class=10)
    >>> problem.inputs.shape, problem.outputs.shape, problem.loss_scale
    ((50, 50), (5, 50), 0.004)
    """
    n_classes = check_count(n_classes, "n_classes")
    samples_per_class = check_count(samples_per_class, "samples_per_class")
    n_samples = n_classes * samples_per_class
    dim = n_samples if dim is None else check_count(dim, "dim")
    labels = np.repeat(np.arange(n_classes), samples_per_class)
    generator = random_generator(seed, ("classification",))
    frame = haar(max(dim, n_samples), min(dim, n_samples), generator)
    problem = Problem.from_data(frame.T if n_samples >= dim else frame, labels, reduction=reduction)
    problem._source = {
        "name": "classification",
        "n_classes": n_classes,
        "samples_per_class": samples_per_class,
        "dim": dim,
        "seed": int(seed),
    }
    return problem
