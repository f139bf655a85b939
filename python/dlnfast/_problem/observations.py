# SPDX-License-Identifier: MIT
"""Partial observations of a matrix: `Completion` (entries) and `Sensing` (linear measurements)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from .._support.arrays import (
    FloatArray,
    as_array,
    as_integers,
    as_matrix,
    as_pair,
    as_vector,
    check_choice,
    check_count,
    check_scale,
    is_sparse,
    random_generator,
    read_known_values,
    read_stored_entries,
)
from .._support.dispatch import core
from .._support.errors import ShapeError
from .._support.file_checks import check_array
from .factors import (
    DenseMap,
    Factors,
    LinearMap,
    MatrixOrLayers,
    SparseMap,
    SparseRows,
    as_factors,
    dense_product,
    entries_of_product,
    is_matrix,
    leading_factors,
    squared_distance,
)
from .low_rank import LowRank

if TYPE_CHECKING:
    from .._core import Objective

NORMALIZATIONS: Final = ("relative", "mean", "unobserved")


class Observations(ABC):
    """Base class of `Completion` and `Sensing`: a matrix Phi that is known through linear observations.

    Attributes
    ----------
    dim_in, dim_out : int
        d_x and d_y.
    loss_scale : float
        c.
    reduction : str or None
        Meaning of `loss_scale`, if known.
    truth : LowRank or ndarray or None
        The complete matrix Phi, if known.
    """

    #: These attributes have the values of a `Problem` with white inputs and no samples.
    input_gram: None = None
    gram_eigen: None = None
    whitening: None = None
    inputs: None = None
    outputs: None = None
    labels: None = None
    classes: None = None
    loss_floor: float = 0.0
    whitened: bool = True

    dim_in: int
    dim_out: int
    loss_scale: float
    reduction: str | None
    truth: LowRank | FloatArray | None
    _source: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_y, d_x)."""
        return self.dim_out, self.dim_in

    @property
    @abstractmethod
    def values(self) -> FloatArray:
        """The observed numbers, one for each observation."""

    @abstractmethod
    def engine_arguments(self, dtype: npt.DTypeLike) -> Objective:
        """Return the keyword arguments that describe the problem to the core's dense descent."""

    @abstractmethod
    def loss(self, W: MatrixOrLayers) -> float:
        """Return the loss of an end-to-end matrix, or of layers ``W_1 .. W_L``."""

    @abstractmethod
    def backprojection(self, weights: Sequence[npt.ArrayLike] | None = None) -> LinearMap:
        """Return minus the gradient with respect to W_{L:1}, divided by c, at 0 or at some layers."""

    @property
    @abstractmethod
    def n_observations(self) -> int:
        """Number of observations."""

    @property
    @abstractmethod
    def density(self) -> float:
        """Mean of ``||observations of W||^2 / ||W||_F^2`` over random directions of W."""

    @property
    def error_scale(self) -> float:
        """Bound on ``||dl/dW_{L:1}||_F / (c ||residuals||)``."""
        return 1.0

    def recovery_error(self, W: MatrixOrLayers, normalization: str = "relative") -> float:
        r"""Return the distance of a matrix from the truth.

        Parameters
        ----------
        W : array_like or LowRank, shape (d_y, d_x), sequence of array_like, or Trajectory
            The matrix; or layers ``W_1 .. W_L``, whose product is not formed if they are thin; or a run, of
            which the last layers are used.
        normalization : {"relative", "mean", "unobserved"}
            "relative": ``||W - Phi||_F / ||Phi||_F``. "mean": ``||W - Phi||_F^2 / (2 d_y d_x)``.
            "unobserved": the same sum over the unobserved entries only, also divided by ``2 d_y d_x``; for
            `Completion` only.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            If the truth is unknown, or the normalization is another one.

        Notes
        -----
        All three are in use in the literature. Cost: O((d_y + d_x) (k + r)^2) for layers of width k and a
        truth of rank r.
        """
        check_choice(normalization, "normalization", NORMALIZATIONS)
        if self.truth is None:
            raise ValueError("the truth is not known: create the problem with truth=...")
        square = squared_distance(as_factors(W, self.shape), self.truth)
        if normalization == "relative":
            norm = np.linalg.norm(self.truth.s if isinstance(self.truth, LowRank) else self.truth)
            return math.sqrt(square) / float(norm)
        if normalization == "unobserved":
            square = max(square - self._observed_distance(W), 0.0)
        return square / (2 * self.dim_out * self.dim_in)

    def _observed_distance(self, W: MatrixOrLayers) -> float:
        """Return ``||Omega * (W - Phi)||_F^2``."""
        raise ValueError('normalization is "unobserved", but measurements have no entries that they observe')

    def target_values(self, rank: int) -> npt.NDArray[np.float64]:
        """Return the leading singular values of the surrogate, an estimate of those of Phi.

        The surrogate is the backprojection of the observations, divided by their `density`.

        Parameters
        ----------
        rank : int
            Number of singular values.

        Returns
        -------
        ndarray, shape (rank,)
            Singular values, descending.
        """
        return leading_factors(self.backprojection(), rank, tolerance=1e-8).s / self.density

    def suggested_rank(self, limit: int = 32) -> int:
        """Return the rank after which the singular values of the surrogate drop by the largest ratio.

        Parameters
        ----------
        limit : int
            Largest rank that is considered; a quarter of the smaller side if that is less.

        Returns
        -------
        int
            Suggested rank, at least 1.

        Raises
        ------
        TypeError, ValueError
            If `limit` is not a positive integer.

        Notes
        -----
        Random entries of a matrix of rank r have r singular values near p sigma_i, and a bulk of smaller ones
        near ``sqrt(p d)`` times the root mean square of the entries. If the r values are not clearly above
        that bulk, the result is meaningless. The values are computed to one per cent, in a few sweeps of
        products.
        """
        count = min(check_count(limit, "limit"), max(min(self.shape) // 4, 1)) + 1
        count = min(count, *self.shape)
        values = leading_factors(self.backprojection(), count, tolerance=1e-4).s
        if count == 1 or values[0] == 0:
            return 1
        floor = float(np.finfo(np.float64).eps) * values[0]
        return int(np.argmax(values[:-1] / np.maximum(values[1:], floor))) + 1

    def describe(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        return {
            "source": dict(self._source),
            "kind": type(self).__name__.lower(),
            "dim_in": self.dim_in,
            "dim_out": self.dim_out,
            "n_observations": self.n_observations,
            "loss_scale": self.loss_scale,
            "reduction": self.reduction,
        }

    @abstractmethod
    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that a file needs to reconstruct the problem."""

    def _restore(self, description: Mapping[str, Any]) -> None:
        """Set the attributes that `describe` returned."""
        self.reduction = description.get("reduction")
        self._source = dict(description.get("source", self._source))

    def __repr__(self) -> str:
        """Return the dimensions, the number of observations and the scale of the loss."""
        return (
            f"{type(self).__name__}({self.dim_out} x {self.dim_in}, {self.n_observations} observations, "
            f"loss_scale={self.loss_scale:.6g})"
        )


class Completion(Observations):
    r"""Deep matrix completion: ``l = c/2 ||Omega * (W_{L:1} - Phi)||_F^2``, Omega the observed entries.

    Parameters
    ----------
    rows, columns : array_like of int, shape (n,)
        Indices of the observed entries, from 0, in any order.
    values : array_like, shape (n,)
        Values of Phi at these indices. Masked values and pandas' NA count as unknown and are left out.
    shape : (int, int)
        (d_y, d_x). Rows and columns without entries are allowed (`empty_rows`, `empty_columns`); their only
        gradient is that of weight decay.
    reduction : {"mean", "observed", "sum"}
        c = 1 / (d_y d_x), the choice of arXiv 2406.04112; 1 / n; 1. **It rescales every learning rate.**
    loss_scale : float, optional
        c itself, instead of `reduction`.
    truth : array_like or LowRank, shape (d_y, d_x), optional
        The complete matrix Phi, for `recovery_error`.

    Attributes
    ----------
    n_observations : int
        n.
    density : float
        p = n / (d_y d_x).

    Raises
    ------
    TypeError, ShapeError
        If an array has the wrong type or length.
    ValueError
        If there are no entries, an index is outside the matrix, two entries have the same index (the message
        has both values), or a value is not finite.

    Notes
    -----
    Entries are stored by rows and by columns, with 4 + 8 bytes each, 24 bytes per entry in total; sorting is
    O(n). Training with float32 weights adds two float32 copies of the values.

    Examples
    --------
    >>> import dlnfast as dln
    >>> problem = dln.Completion([0, 1, 1], [0, 0, 1], [1.0, 2.0, 4.0], shape=(2, 2), truth=[[1, 2], [2, 4]])
    >>> problem.density, problem.loss([[1.0, 0.0], [2.0, 2.0]])  # 4 / 2, over 4 entries
    (0.75, 0.5)
    >>> problem.recovery_error([[1.0, 0.0], [2.0, 4.0]], "unobserved")
    0.5
    """

    def __init__(
        self,
        rows: npt.ArrayLike,
        columns: npt.ArrayLike,
        values: npt.ArrayLike,
        shape: tuple[int, int],
        *,
        reduction: str = "mean",
        loss_scale: float | None = None,
        truth: npt.ArrayLike | LowRank | None = None,
    ) -> None:
        self.dim_out, self.dim_in = _check_shape(shape)
        known, which, count = read_known_values(values, "values")
        if known.size == 0:
            raise ValueError("values is empty: no entry is known; wanted at least one")
        i, j = (_as_indices(x, name, count)[which] for x, name in ((rows, "rows"), (columns, "columns")))
        self._by_rows = _sort_entries(i, j, known, self.shape)
        self._by_columns = _transpose_entries(self._by_rows, self.dim_in)
        self.reduction = reduction if loss_scale is None else None
        self.loss_scale = _choose_scale(reduction, loss_scale, self.shape, known.size)
        self.truth = _as_truth(truth, self.shape)
        self._single: tuple[SparseRows, SparseRows] | None = None
        self._source = {"name": "entries"}

    @classmethod
    def from_dense(
        cls,
        matrix: npt.ArrayLike,
        mask: npt.ArrayLike | None = None,
        **options: Any,
    ) -> Completion:
        """Return the completion of a dense array with unknown entries.

        Parameters
        ----------
        matrix : array_like, shape (d_y, d_x)
            Phi. Without `mask`, NaN, masked entries of a masked array and NA of a pandas DataFrame are
            unknown.
        mask : array_like of bool, shape (d_y, d_x), optional
            True for observed entries; other entries are ignored.
        **options
            Other parameters of the class: `reduction`, `loss_scale`, `truth`.

        Returns
        -------
        Completion

        Raises
        ------
        ShapeError
            If `matrix` does not have two axes, or the mask has another shape.
        TypeError, ValueError
            If an observed entry is not a real, finite number.
        """
        if is_sparse(matrix):
            raise TypeError(
                f"matrix is a sparse {type(matrix).__name__}; wanted a dense array: Completion.from_sparse "
                "takes its stored entries"
            )
        array = as_matrix(as_array(matrix, "matrix", missing=True), "matrix", finite=False, empty=True)
        if mask is None:
            known = ~np.isnan(array)
        else:
            known = as_array(mask, "mask")
            if known.dtype != np.bool_:
                raise TypeError(f"mask has dtype {known.dtype}; wanted bool")
            if known.shape != array.shape:
                raise ShapeError(f"mask has shape {known.shape}; wanted that of matrix, {array.shape}")
        rows, columns = np.nonzero(known)
        values = as_vector(array[rows, columns], "matrix (known entries)", empty=True)
        return cls(rows, columns, values, (array.shape[0], array.shape[1]), **options)

    @classmethod
    def from_sparse(cls, matrix: Any, **options: Any) -> Completion:
        """Return the completion of a sparse matrix from its stored entries, including explicit zeros.

        Parameters
        ----------
        matrix : scipy.sparse array or matrix, shape (d_y, d_x)
            SciPy sparse matrix or array of any format, or sparse PyTorch tensor. The formats DIA and BSR
            store whole diagonals and blocks; zeros inside them count as entries.
        **options
            Other parameters of the class: `reduction`, `loss_scale`, `truth`.

        Returns
        -------
        Completion

        Raises
        ------
        TypeError
            If `matrix` is not sparse.
        ValueError
            If an entry is stored twice or is not finite.
        """
        entries = read_stored_entries(matrix, "matrix")
        values = as_vector(entries.values, "matrix (stored entries)", empty=True)
        return cls(entries.rows, entries.columns, values, entries.shape, **options)

    # ----------------------------------------------------------------------------------------- entries

    @property
    def n_observations(self) -> int:
        """n, the number of observed entries."""
        return int(self._by_rows[2].size)

    @property
    def density(self) -> float:
        """The share of entries that are observed, p = n / (d_y d_x)."""
        return self.n_observations / (self.dim_out * self.dim_in)

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Row of every entry, (n,), ascending."""
        return np.repeat(np.arange(self.dim_out), np.diff(self._by_rows[0]))

    @property
    def columns(self) -> npt.NDArray[np.int32]:
        """Column of every entry, (n,), ascending within a row."""
        return self._by_rows[1]

    @property
    def values(self) -> FloatArray:
        """Phi at the observed entries, (n,), in the order of `rows` and `columns`."""
        return self._by_rows[2]

    @property
    def empty_rows(self) -> npt.NDArray[np.int64]:
        """Rows without any entry."""
        return np.flatnonzero(np.diff(self._by_rows[0]) == 0)

    @property
    def empty_columns(self) -> npt.NDArray[np.int64]:
        """Columns without any entry."""
        return np.flatnonzero(np.diff(self._by_columns[0]) == 0)

    def entries(self, dtype: npt.DTypeLike = np.float64) -> tuple[SparseRows, SparseRows]:
        """Return the entries by rows and by columns, each as (start, index, values).

        Parameters
        ----------
        dtype : dtype
            float64 or float32.

        Returns
        -------
        pair of SparseRows
            CSR arrays of the matrix and of its transpose. Views in float64; converted once for float32.
        """
        if np.dtype(dtype) == np.float64:
            return self._by_rows, self._by_columns
        if self._single is None:
            start, index, values = self._by_rows
            by_rows = (start, index, values.astype(np.float32))
            start, index, values = self._by_columns
            self._single = by_rows, (start, index, values.astype(np.float32))
        return self._single

    def replaced(self, values: npt.ArrayLike) -> Completion:
        """Return a problem with the same observed entries but other values, and without a truth.

        Parameters
        ----------
        values : array_like, shape (n,)
            New values, in the order of `rows` and `columns`.

        Returns
        -------
        Completion

        Raises
        ------
        ShapeError
            If the number of values differs.
        TypeError, ValueError
            If a value is not a real, finite number.
        """
        known = as_vector(values, "values", length=self.n_observations, dtype=np.float64)
        other = object.__new__(Completion)
        vars(other).update(vars(self))
        other.truth, other._single = None, None
        other._by_rows = (*self._by_rows[:2], known)
        other._by_columns = _transpose_entries(other._by_rows, self.dim_in)
        other._source = {"name": "entries"}
        return other

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that a file needs to reconstruct the problem."""
        start, index, values = self._by_rows
        return {"observed_start": start, "observed_index": index, "observed_values": values}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, npt.NDArray[Any]], shape: tuple[int, int], **options: Any
    ) -> Completion:
        """Reconstruct a problem from the arrays of `to_arrays`.

        Parameters
        ----------
        arrays : mapping of str to ndarray
            Arrays of `to_arrays`.
        shape : (int, int)
            (d_y, d_x).
        **options
            Other parameters of the class: `reduction`, `loss_scale`, `truth`.

        Returns
        -------
        Completion

        Raises
        ------
        ValueError
            If the arrays are inconsistent.
        """
        start, index = arrays["observed_start"], arrays["observed_index"]
        check_array(start, "observed_start", (shape[0] + 1,), "i")
        if start[0] != 0 or start[-1] != len(index) or np.any(np.diff(start) < 0):
            raise ValueError(f"observed_start does not rise from 0 to {len(index)}")
        rows = np.repeat(np.arange(shape[0]), np.diff(start))
        return cls(rows, arrays["observed_index"], arrays["observed_values"], shape, **options)

    # ------------------------------------------------------------------------------------------- loss

    def engine_arguments(self, dtype: npt.DTypeLike) -> Objective:
        """Return the keyword arguments that describe the problem to the core's dense descent.

        Parameters
        ----------
        dtype : dtype
            float64 or float32.

        Returns
        -------
        dict
            Objective of the core.
        """
        return {**_no_target(self.loss_scale, self.loss_floor), "observed": self.entries(dtype)}

    def predict(
        self, W: MatrixOrLayers, rows: npt.ArrayLike | None = None, columns: npt.ArrayLike | None = None
    ) -> FloatArray:
        """Return entries of a matrix.

        Parameters
        ----------
        W : array_like, LowRank or sequence of array_like
            The matrix, or layers ``W_1 .. W_L``.
        rows, columns : array_like of int, shape (n,), optional
            Indices of the entries. Default: the observed entries, in the order of `values`.

        Returns
        -------
        ndarray, shape (n,)

        Raises
        ------
        ShapeError
            If the matrix or the layers have another shape.
        ValueError
            If only one of `rows` and `columns` is passed, or an index is outside the matrix.
        """
        factors = as_factors(W, self.shape)
        if rows is None or columns is None:
            if rows is not None or columns is not None:
                raise ValueError("rows and columns belong together; only one of them is set")
            i, j = self.rows, self.columns.astype(np.int64)
        else:
            j = _as_indices(columns, "columns", None)
            i = _as_indices(rows, "rows", j.size)
            for index, name, limit in ((i, "rows", self.dim_out), (j, "columns", self.dim_in)):
                if index.size and (index.min() < 0 or index.max() >= limit):
                    raise ValueError(
                        f"{name} reaches from {index.min()} to {index.max()}; wanted 0 to {limit - 1}"
                    )
        return entries_of_product(factors, i, j)

    def loss(self, W: MatrixOrLayers) -> float:
        """Return ``c/2 ||Omega * (W - Phi)||_F^2`` of an end-to-end matrix, or of layers ``W_1 .. W_L``.

        Parameters
        ----------
        W : array_like, LowRank or sequence of array_like
            An end-to-end matrix (d_y, d_x), or layers ``W_1 .. W_L``.

        Returns
        -------
        float

        Notes
        -----
        Cost: O(n r) for layers whose narrowest width is r; the matrix is not formed.
        """
        return self.loss_scale / 2 * self._squared_residual(W, self.values)

    def _observed_distance(self, W: MatrixOrLayers) -> float:
        assert self.truth is not None
        known = entries_of_product(as_factors(self.truth, self.shape), self.rows, self.columns)
        return self._squared_residual(W, known)

    def _squared_residual(self, W: MatrixOrLayers, known: FloatArray) -> float:
        difference = self.predict(W) - known
        return float(difference @ difference)

    def backprojection(self, weights: Sequence[npt.ArrayLike] | None = None) -> LinearMap:
        """Return ``Omega * (Phi - W_{L:1})`` as a linear map; ``Omega * Phi`` without `weights`.

        Parameters
        ----------
        weights : sequence of array_like, optional
            ``W_1 .. W_L``.

        Returns
        -------
        LinearMap, shape (d_y, d_x)
            Minus the gradient of the loss with respect to W_{L:1}, divided by c.
        """
        if weights is None:
            return SparseMap(self.entries(), self.shape)
        factors = as_factors(weights, self.shape, "weights")
        known = entries_of_product(factors, self.rows, self.columns)
        return SparseMap(self.replaced(self.values - known).entries(), self.shape)


class Sensing(Observations):
    r"""Deep matrix sensing: ``l = c/2 sum_i (<A_i, W_{L:1}> - y_i)^2``.

    Parameters
    ----------
    operators : array_like, shape (m, d_y, d_x), or pair of array_like, or scipy.sparse
        A_1 .. A_m as one array; or, for operators ``A_i = a_i b_i^T`` of rank one, a pair of arrays of shape
        (m, d_y) and (m, d_x); or a SciPy sparse array of shape (m, d_y d_x), each A_i flattened by rows,
        which needs `shape` too.
    values : array_like, shape (m,)
        Measurements y_i.
    shape : (int, int), optional
        (d_y, d_x), for sparse operators.
    reduction : {"sum", "observed", "mean"}
        c = 1; 1 / m; 1 / (d_y d_x).
    loss_scale : float, optional
        c itself, instead of `reduction`.
    truth : array_like or LowRank, shape (d_y, d_x), optional
        The complete matrix Phi, for `recovery_error`.

    Raises
    ------
    TypeError, ShapeError, ValueError
        For the reasons of `Completion`.

    Notes
    -----
    The dense engine stores all operators as one array of 8 m d_y d_x bytes, and reads it once per step. With
    frozen bases (``train_compressed(..., outer=0)``) the operators are projected once.

    Examples
    --------
    >>> import numpy as np
    >>> import dlnfast as dln
    >>> operators = np.random.default_rng(0).standard_normal((5, 2, 3))
    >>> problem = dln.Sensing(operators, operators.sum(axis=(1, 2)))  # y = <A_i, ones>
    >>> round(problem.loss(np.ones((2, 3))), 12)
    0.0
    """

    def __init__(
        self,
        operators: Any,
        values: npt.ArrayLike,
        *,
        shape: tuple[int, int] | None = None,
        reduction: str = "sum",
        loss_scale: float | None = None,
        truth: npt.ArrayLike | LowRank | None = None,
    ) -> None:
        self._values = as_vector(values, "values", dtype=np.float64)
        m = self._values.size
        self._sparse: Any = None
        self._rank_one: tuple[FloatArray, FloatArray] | None = None
        self._dense: FloatArray | None = None
        if is_sparse(operators):
            if shape is None:
                raise ValueError("shape is needed for sparse operators: (d_y, d_x)")
            self.dim_out, self.dim_in = _check_shape(shape)
            self._sparse = _as_csr(operators, (m, self.dim_out * self.dim_in))
        elif (
            isinstance(operators, (tuple, list))
            and len(operators) == 2
            and is_matrix(operators[0], "operators")
        ):
            left = as_matrix(operators[0], "operators[0]", shape=(m, None), dtype=np.float64)
            right = as_matrix(operators[1], "operators[1]", shape=(m, None), dtype=np.float64)
            self._rank_one = left, right
            self.dim_out, self.dim_in = left.shape[1], right.shape[1]
        else:
            array = as_array(operators, "operators")
            if array.ndim != 3 or array.shape[0] != m:
                raise ShapeError(
                    f"operators has shape {array.shape}; wanted ({m}, d_y, d_x), or for rank one the pair of "
                    f"({m}, d_y) and ({m}, d_x)"
                )
            self.dim_out, self.dim_in = array.shape[1:]
            self._dense = as_matrix(array.reshape(m, -1), "operators", dtype=np.float64)
        if shape is not None and _check_shape(shape) != self.shape:
            raise ShapeError(f"shape is {tuple(shape)}; wanted {self.shape}, that of the operators")
        self.reduction = reduction if loss_scale is None else None
        self.loss_scale = _choose_scale(reduction, loss_scale, self.shape, m)
        self.truth = _as_truth(truth, self.shape)
        self._source = {"name": "measurements"}

    @property
    def values(self) -> FloatArray:
        """y_1 .. y_m."""
        return self._values

    @property
    def n_observations(self) -> int:
        """m, the number of measurements."""
        return int(self.values.size)

    @cached_property
    def density(self) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        """M times the mean square of the entries of the A_i."""
        if self._rank_one is not None:
            left, right = self._rank_one
            total = float(np.sum(np.sum(left**2, axis=1) * np.sum(right**2, axis=1)))
        else:
            data = self._sparse.data if self._dense is None else self._dense.reshape(-1)
            total = float(np.dot(data, data))
        return total / (self.dim_out * self.dim_in)

    @cached_property
    def error_scale(self) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        """1.1 times a power-iteration estimate of the norm ``||B||_2`` of the m x (d_y d_x) operator."""
        vector: FloatArray = random_generator(0, ("sensing norm",)).standard_normal(self.shape)
        size = 0.0
        for _ in range(8):
            vector /= np.linalg.norm(vector)
            image = self.apply(vector)
            size = float(np.linalg.norm(image))
            vector = self.adjoint(image)
            if not vector.any():
                return 0.0
        return 1.1 * size

    def apply(self, W: MatrixOrLayers) -> FloatArray:
        """Return ``<A_i, W>`` for i = 1 .. m.

        Parameters
        ----------
        W : array_like, LowRank or sequence of array_like
            An end-to-end matrix (d_y, d_x), or layers ``W_1 .. W_L``.

        Returns
        -------
        ndarray, shape (m,)

        Notes
        -----
        Cost: O(m d_y d_x); O(m (d_y + d_x) r) for rank-one operators and factors of width r.
        """
        return self._measure(as_factors(W, self.shape))

    def _measure(self, factors: Factors) -> FloatArray:
        if self._rank_one is not None:
            left, right = factors
            a, b = self._rank_one
            product: FloatArray = np.einsum("ik,ik->i", a @ left, b if right is None else b @ right)
            return product
        vector = dense_product(factors).reshape(-1)
        return np.asarray((self._sparse if self._dense is None else self._dense) @ vector)

    def adjoint(self, r: npt.ArrayLike) -> FloatArray:
        """Return ``sum_i r_i A_i``, (d_y, d_x).

        Parameters
        ----------
        r : array_like, shape (m,)
            Coefficients, one for each measurement.

        Returns
        -------
        ndarray, shape (d_y, d_x)

        Raises
        ------
        ShapeError
            If the number of coefficients differs.

        Notes
        -----
        Cost: O(m d_y d_x).
        """
        weights = as_vector(r, "r", length=self.n_observations, dtype=np.float64)
        if self._rank_one is not None:
            left, right = self._rank_one
            result: FloatArray = (left * weights[:, np.newaxis]).T @ right
            return result
        operator = self._sparse if self._dense is None else self._dense
        return np.asarray(operator.T @ weights).reshape(self.shape)

    def projected(self, U: npt.ArrayLike, V: npt.ArrayLike, which: slice = slice(None)) -> FloatArray:
        """Return ``U^T A_i V``, (m, a, b); O(m d_y d_x b), or O(m (d_y a + d_x b)) for rank one.

        Parameters
        ----------
        U : array_like, shape (d_y, a)
            Matrix on the left of every measurement matrix.
        V : array_like, shape (d_x, b)
            Matrix on the right.
        which : slice
            Range of measurements. Default: all.

        Returns
        -------
        ndarray, shape (m, a, b)

        Raises
        ------
        ShapeError
            If the number of rows of U is not d_y, or that of V is not d_x.
        """
        left = as_matrix(U, "U", shape=(self.dim_out, None), dtype=np.float64)
        right = as_matrix(V, "V", shape=(self.dim_in, None), dtype=np.float64)
        if self._rank_one is not None:
            a, b = self._rank_one[0][which] @ left, self._rank_one[1][which] @ right
            return np.asarray(a[:, :, np.newaxis] * b[:, np.newaxis, :])
        first, last, _ = which.indices(self.n_observations)
        result = np.empty((last - first, left.shape[1], right.shape[1]))
        chunk = max(1, 2**24 // (self.dim_out * self.dim_in))  # 128 MB of operators at a time
        for start in range(first, last, chunk):
            part = slice(start, min(start + chunk, last))
            operators = self._sparse[part].toarray() if self._dense is None else self._dense[part]
            images = operators.reshape(-1, self.dim_in) @ right
            images = images.reshape(-1, self.dim_out, right.shape[1])
            result[start - first : part.stop - first] = np.swapaxes(np.swapaxes(images, 1, 2) @ left, 1, 2)
        return result

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that a file needs to reconstruct the problem."""
        floor = np.array(self.loss_floor)
        return {"operators": self._operators(np.float64), "measured": self.values, "measured_floor": floor}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, npt.NDArray[Any]], shape: tuple[int, int], **options: Any
    ) -> Sensing:
        """Reconstruct a problem from the arrays of `to_arrays`.

        Parameters
        ----------
        arrays : mapping of str to ndarray
            Arrays of `to_arrays`.
        shape : (int, int)
            (d_y, d_x).
        **options
            Other parameters of the class: `reduction`, `loss_scale`, `truth`.

        Returns
        -------
        Sensing
        """
        problem = cls(arrays["operators"].reshape(-1, *shape), arrays["measured"], **options)
        problem.loss_floor = float(arrays["measured_floor"])
        return problem

    def engine_arguments(self, dtype: npt.DTypeLike) -> Objective:
        """Return the keyword arguments that describe the problem to the core's dense descent.

        Parameters
        ----------
        dtype : dtype
            float64 or float32.

        Returns
        -------
        dict
            Objective of the core.
        """
        known = self._operators(dtype), self.values.astype(dtype, copy=False)
        return {**_no_target(self.loss_scale, self.loss_floor), "measurements": known}

    def _operators(self, dtype: npt.DTypeLike) -> FloatArray:
        """Return B, one row per measurement."""
        if self._dense is not None:
            matrix = self._dense
        elif self._rank_one is not None:
            left, right = self._rank_one
            matrix = (left[:, :, np.newaxis] * right[:, np.newaxis, :]).reshape(len(left), -1)
        else:
            matrix = self._sparse.toarray()
        return np.require(matrix, dtype, ["C_CONTIGUOUS", "ALIGNED"])

    def loss(self, W: MatrixOrLayers) -> float:
        """Return ``c/2 sum_i (<A_i, W> - y_i)^2`` of an end-to-end matrix, or of layers ``W_1 .. W_L``.

        Parameters
        ----------
        W : array_like, LowRank or sequence of array_like
            An end-to-end matrix (d_y, d_x), or layers ``W_1 .. W_L``.

        Returns
        -------
        float

        Notes
        -----
        Cost: that of `apply`.
        """
        residual = self.apply(W) - self.values
        return self.loss_scale / 2 * float(residual @ residual) + self.loss_floor

    def backprojection(self, weights: Sequence[npt.ArrayLike] | None = None) -> DenseMap:
        """Return ``sum_i (y_i - <A_i, W_{L:1}>) A_i``; W_{L:1} = 0 without `weights`.

        Parameters
        ----------
        weights : sequence of array_like, optional
            ``W_1 .. W_L``.

        Returns
        -------
        DenseMap, shape (d_y, d_x)
            Minus the gradient of the loss with respect to W_{L:1}, divided by c.
        """
        if weights is None:
            return DenseMap(self.adjoint(self.values))
        measured = self._measure(as_factors(weights, self.shape, "weights"))
        return DenseMap(self.adjoint(self.values - measured))


def _no_target(loss_scale: float, loss_floor: float) -> Objective:
    """Return the objective of a matrix without a target or observations."""
    return {
        "target": None,
        "input_gram": None,
        "input_factor": None,
        "factor_target": None,
        "loss_scale": loss_scale,
        "loss_floor": loss_floor,
        "observed": None,
        "measurements": None,
    }


def _check_shape(shape: Any) -> tuple[int, int]:
    rows, columns = as_pair(shape, "shape", "two integers, (d_y, d_x)")
    most = 2**31 - 1
    return check_count(rows, "shape[0] (d_y)", maximum=most), check_count(
        columns, "shape[1] (d_x)", maximum=most
    )


def _as_indices(x: npt.ArrayLike, name: str, length: int | None) -> npt.NDArray[np.int64]:
    array = as_integers(x, name)
    if array.ndim != 1:
        raise ShapeError(f"{name} has shape {array.shape}; wanted a vector (1 axis)")
    if length is not None and array.size != length:
        raise ShapeError(f"{name} has {array.size} entries; wanted {length}, as many as values")
    return array


def _as_csr(operators: Any, wanted: tuple[int, int]) -> Any:
    """Convert sparse operators to a float64 CSR array of SciPy; duplicate entries are summed."""
    from scipy.sparse import csr_array

    rows, columns, values, shape = read_stored_entries(operators, "operators")
    if shape != wanted:
        raise ShapeError(f"operators has shape {shape}; wanted {wanted}, (m, d_y d_x)")
    known = as_vector(values, "operators (stored entries)", dtype=np.float64, empty=True)
    return csr_array((known, (rows, columns)), shape=shape)


def _sort_entries(
    rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], values: FloatArray, shape: tuple[int, int]
) -> SparseRows:
    start = np.empty(shape[0] + 1, dtype=np.int64)
    index = np.empty(values.size, dtype=np.int32)
    known = np.empty_like(values)
    bad = core.sort_entries(rows, columns, values, *shape, start, index, known)
    if bad >= 0:
        i, j = int(rows[bad]), int(columns[bad])
        if not (0 <= i < shape[0] and 0 <= j < shape[1]):
            raise ValueError(f"entry {bad} is at ({i}, {j}), outside the {shape[0]} x {shape[1]} matrix")
        first = int(np.flatnonzero((rows == i) & (columns == j))[0])
        raise ValueError(
            f"({i}, {j}) occurs twice: {values[first]:g} by entry {first} and {values[bad]:g} by entry "
            f"{bad}; wanted each index once"
        )
    return start, index, known


def _transpose_entries(by_rows: SparseRows, n_columns: int) -> SparseRows:
    start = np.empty(n_columns + 1, dtype=np.int64)
    index = np.empty_like(by_rows[1])
    values = np.empty_like(by_rows[2])
    core.transpose_entries(by_rows, n_columns, start, index, values)
    return start, index, values


def _choose_scale(
    reduction: str, loss_scale: float | None, shape: tuple[int, int], n_observations: int
) -> float:
    scales = {"mean": 1.0 / (shape[0] * shape[1]), "observed": 1.0 / n_observations, "sum": 1.0}
    check_choice(reduction, "reduction", tuple(scales))
    if loss_scale is None:
        return scales[reduction]
    return check_scale(loss_scale, "loss_scale", strict=True)


def _as_truth(truth: npt.ArrayLike | LowRank | None, shape: tuple[int, int]) -> LowRank | FloatArray | None:
    if truth is None:
        return None
    if isinstance(truth, LowRank):
        if truth.shape != shape:
            raise ShapeError(f"truth has shape {truth.shape}; wanted {shape}")
        return truth
    return as_matrix(truth, "truth", shape=shape, dtype=np.float64, symbol="Phi")
