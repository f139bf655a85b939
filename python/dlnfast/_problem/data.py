# SPDX-License-Identifier: MIT
"""Samples: one-hot targets, sums over chunks of raw data, and whitening."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from .._support.arrays import (
    FloatArray,
    IntArray,
    as_array,
    as_integers,
    as_matrix,
    check_choice,
    check_scale,
    count_axes,
    is_finite,
)
from .._support.errors import ShapeError

LAYOUTS: Final = ("columns", "rows")
WHITENING_METHODS: Final = ("zca", "pca", "cholesky")

#: Number of values that are converted to float64 at a time (32 MB); raw data are never copied as a whole.
_CHUNK_VALUES: Final = 2**22


# --------------------------------------------------------------------------------------------------
# Labels
# --------------------------------------------------------------------------------------------------


def one_hot(labels: npt.ArrayLike, classes: npt.ArrayLike | None = None) -> FloatArray:
    """Return the targets Y of a classification: ``Y[k, j]`` is 1 if sample j is of class k, otherwise 0.

    Parameters
    ----------
    labels : array_like of int, shape (N,)
        Class of every sample.
    classes : array_like of int, shape (K,), optional
        The classes, in the order of the rows of Y. Default: the distinct labels, ascending. Pass them for a
        part of a data set, which may lack some classes.

    Returns
    -------
    ndarray of float64, shape (K, N)

    Raises
    ------
    TypeError
        If a label is not an integer.
    ShapeError
        If the labels are not a non-empty vector.
    ValueError
        If a label is not among `classes`, or `classes` contains one twice.

    Notes
    -----
    Cost: O(K N).

    Examples
    --------
    >>> from dlnfast import one_hot
    >>> one_hot([0, 2, 2])
    array([[1., 0., 0.],
           [0., 1., 1.]])
    >>> one_hot([0, 2, 2], classes=range(3)).shape
    (3, 3)
    """
    values = as_labels(labels, "labels")
    known = np.unique(values) if classes is None else as_labels(classes, "classes")
    if np.unique(known).size != known.size:
        raise ValueError(f"classes names a class twice: {known.tolist()}")
    member: npt.NDArray[np.bool_] = known[:, None] == values[None, :]
    unknown = ~member.any(axis=0)
    if unknown.any():
        sample = int(np.argmax(unknown))
        raise ValueError(f"labels[{sample}] is {values[sample]}; wanted one of classes {known.tolist()}")
    return member.astype(np.float64)


def as_labels(labels: object, name: str) -> IntArray:
    """Convert integer labels to a non-empty int64 vector."""
    array = as_array(labels, name)
    if array.ndim != 1 or array.size == 0:
        raise ShapeError(f"{name} has shape {array.shape}; wanted a non-empty vector (N,)")
    if array.dtype.kind not in "biu":
        text = array.dtype.kind in "USO"
        numbers = ": classes, numbers = np.unique(labels, return_inverse=True)" if text else ""
        raise TypeError(f"{name} has dtype {array.dtype}; wanted integers{numbers}")
    return as_integers(array.astype(np.int64) if array.dtype.kind == "b" else array, name)


def _find_labels(outputs: npt.NDArray[Any]) -> IntArray | None:
    """Return the row of the single 1 in every column; None if `outputs` is not one-hot."""
    labels = np.empty(outputs.shape[1], dtype=np.int64)
    for part in _sample_ranges(outputs.shape[1], outputs.shape[0]):
        chunk = outputs[:, part]
        ones = chunk == 1
        if not (np.logical_or(ones, chunk == 0).all() and (ones.sum(axis=0) == 1).all()):
            return None
        labels[part] = ones.argmax(axis=0)
    return labels


# --------------------------------------------------------------------------------------------------
# Samples and their statistics
# --------------------------------------------------------------------------------------------------


def check_layout(layout: str) -> str:
    """Return the layout if it is known; raise ValueError otherwise."""
    found: str = check_choice(layout, "layout", LAYOUTS)
    return found


def sample_columns(x: object, name: str, layout: str, symbol: str | None = None) -> npt.NDArray[Any]:
    """Return raw samples as columns, (d, N), as a view of `x` in its own precision if possible."""
    check_layout(layout)
    array = as_array(x, f"{name} ({symbol})" if symbol else name)
    raw = array if _is_real_matrix(array) else as_matrix(array, name, symbol=symbol)
    columns: npt.NDArray[Any] = raw.T if layout == "rows" else raw
    return columns


def _is_real_matrix(x: npt.NDArray[Any]) -> bool:
    if x.ndim != 2 or x.size == 0:
        return False
    return x.dtype.kind in "biu" or x.dtype in (np.float32, np.float64)


def _sample_ranges(n_samples: int, dim: int, max_samples: int | None = None) -> Iterator[slice]:
    width = min(max(1, _CHUNK_VALUES // dim), max_samples or n_samples)
    for start in range(0, n_samples, width):
        yield slice(start, min(start + width, n_samples))


def _as_float64(raw: npt.NDArray[Any], part: slice, name: str) -> FloatArray:
    chunk = np.asarray(raw[:, part], dtype=np.float64)
    if not is_finite(chunk):
        row, column = (int(i) for i in np.argwhere(~np.isfinite(chunk))[0])
        raise ValueError(
            f"{name} has a value that is not finite: {chunk[row, column]} in component {row} of "
            f"sample {column + part.start}"
        )
    return chunk


def map_columns(
    raw: npt.NDArray[Any], name: str, matrix: FloatArray | None, mean: FloatArray | None = None
) -> FloatArray:
    """Return ``matrix (raw - mean)`` as C-contiguous float64; None for a matrix of I and a mean of 0."""
    if matrix is None and mean is None:
        return np.ascontiguousarray(_as_float64(raw, slice(0, raw.shape[1]), name))
    result = np.empty((raw.shape[0] if matrix is None else matrix.shape[0], raw.shape[1]))
    for part in _sample_ranges(raw.shape[1], raw.shape[0]):
        columns = _subtract_mean(_as_float64(raw, part, name), mean)
        result[:, part] = columns if matrix is None else matrix @ columns
    return result


def _subtract_mean(columns: FloatArray, mean: FloatArray | None) -> FloatArray:
    return columns if mean is None else columns - mean[:, np.newaxis]


@dataclass(frozen=True, eq=False)
class Statistics:
    """The sufficient statistics of data: S = X X^T, Phi = Y X^T and ||Y||_F^2."""

    input_gram: FloatArray
    target: FloatArray
    output_norm_squared: float


class Samples:
    """The raw data X and Y without a copy, converted to float64 a chunk of samples at a time.

    Attributes
    ----------
    inputs : ndarray, shape (d_x, N)
        X, not copied.
    outputs : ndarray, shape (d_y, N), or None
        Y, not copied; None for labels, whose one-hot columns are computed a chunk at a time.
    labels, classes : ndarray of int64 or None
        Class of every sample, and class of each row of Y, if Y is one-hot.
    mean : ndarray, shape (d_x,), or None
        Mean of X, which `read_inputs` subtracts; None unless `center` is true.
    """

    def __init__(self, X: object, Y: object, layout: str, center: bool = False) -> None:
        self.inputs = sample_columns(X, "X", layout, "raw inputs")
        self.outputs: npt.NDArray[Any] | None = None
        self.labels: IntArray | None
        self.classes: IntArray | None = None
        if _is_vector(Y):
            self.labels = _read_labels(Y, layout)
            self.classes = np.unique(self.labels)
            self.dim_out, n_outputs = self.classes.size, self.labels.size
        else:
            self.outputs = sample_columns(Y, "Y", layout, "targets")
            self.labels = _find_labels(self.outputs)
            self.dim_out, n_outputs = self.outputs.shape
            if self.labels is not None:
                self.classes = np.arange(self.dim_out)
        self.dim_in, self.n_samples = self.inputs.shape
        if n_outputs != self.n_samples:
            text = (
                f"X has {self.n_samples} samples and Y has {n_outputs}; wanted as many in layout {layout!r}"
            )
            other_outputs = n_outputs if self.outputs is None else self.outputs.shape[0]
            if self.n_samples == other_outputs and n_outputs == 1:
                raise ShapeError(text + "; pass labels as a vector: Y.ravel()")
            if self.inputs.shape[0] == other_outputs:
                other = next(name for name in LAYOUTS if name != layout)
                text += f' (layout="{other}" would fit: {other_outputs} samples)'
            raise ShapeError(text)
        self.mean: FloatArray | None = None  # `_compute_mean` reads raw inputs
        self.mean = self._compute_mean() if center else None

    @np.errstate(over="ignore")
    def _compute_mean(self) -> FloatArray:
        total = np.zeros(self.dim_in)
        for part in self.parts():
            total += np.sum(self.read_inputs(part), axis=1)
        mean: FloatArray = check_overflow(total, "X", "the sum of X") / self.n_samples
        return mean

    def parts(self, max_samples: int | None = None) -> Iterator[slice]:
        """Yield ranges of samples whose inputs and outputs together fill one chunk."""
        return _sample_ranges(self.n_samples, self.dim_in + self.dim_out, max_samples)

    def read_inputs(self, part: slice, transform: FloatArray | None = None) -> FloatArray:
        """Return the inputs of a range of samples, multiplied by `transform` if there is one."""
        chunk = _subtract_mean(_as_float64(self.inputs, part, "X"), self.mean)
        return chunk if transform is None else transform @ chunk

    def read_outputs(self, part: slice) -> FloatArray:
        """Return the outputs of a range of samples."""
        if self.outputs is None:
            assert self.labels is not None
            return one_hot(self.labels[part], self.classes)
        return _as_float64(self.outputs, part, "Y")

    @np.errstate(over="ignore", invalid="ignore")
    def transformed_gram(self, transform: FloatArray | None = None) -> FloatArray:
        """Return (T X)(T X)^T, summed over chunks; T = I if `transform` is None."""
        dim = self.dim_in if transform is None else transform.shape[0]
        gram = np.zeros((dim, dim))
        for part in self.parts():
            inputs = self.read_inputs(part, transform)
            gram += inputs @ inputs.T
        return check_overflow(gram, "X", "X X^T")

    @np.errstate(over="ignore", invalid="ignore")
    def statistics(self, transform: FloatArray | None = None) -> Statistics:
        """Return the sufficient statistics of (T X, Y) from one pass over the data."""
        dim = self.dim_in if transform is None else transform.shape[0]
        gram, target, norm_squared = np.zeros((dim, dim)), np.zeros((self.dim_out, dim)), 0.0
        for part in self.parts():
            inputs, outputs = self.read_inputs(part, transform), self.read_outputs(part)
            gram += inputs @ inputs.T
            target += outputs @ inputs.T
            norm_squared += float(np.sum(outputs * outputs))
        check_overflow(gram, "X", "X X^T")
        check_overflow(np.array(norm_squared), "Y", "||Y||^2")
        return Statistics(gram, target, norm_squared)

    @np.errstate(over="ignore", invalid="ignore")
    def principal_whitener(self, squared_tolerance: float) -> tuple[FloatArray, float]:
        """Return ``diag(lambda)^(-1/2) E^T`` over the retained eigenpairs of S, and the discarded energy."""
        if self.n_samples >= self.dim_in:
            return whitener_of_gram(self.transformed_gram(), squared_tolerance)
        # The nonzero eigenvalues of S are those of X^T X, which is the smaller matrix here.
        inputs = self.read_inputs(slice(0, self.n_samples))
        small = check_overflow(inputs.T @ inputs, "X", "X^T X")
        keep, eigenvalues, vectors, discarded = _select_eigenpairs(small, squared_tolerance)
        return (inputs @ (vectors[:, keep] / eigenvalues[keep])).T, discarded

    def squared_residual(self, matrix: FloatArray) -> float:
        """Return ||M X - Y||_F^2 from one pass over the data, with centred X if `mean` is set."""
        total = 0.0
        for part in self.parts():
            residual = self.read_inputs(part, matrix) - self.read_outputs(part)
            total += float(np.sum(residual * residual))
        return total


def _read_labels(Y: object, layout: str) -> IntArray:
    array = as_array(Y, "Y (a vector, so labels)")
    if array.dtype.kind == "f":
        shape, code = ("(N, 1)", "Y[:, None]") if layout == "rows" else ("(1, N)", "Y[None, :]")
        raise TypeError(
            f"Y (a vector, so labels) has dtype {array.dtype}; wanted integers, or for regression on one "
            f"output an array of shape {shape}: {code}"
        )
    return as_labels(array, "Y (a vector, so labels)")


def _is_vector(x: object) -> bool:
    try:
        return count_axes(x, "Y") == 1
    except ValueError:  # rows of different lengths: `sample_columns` raises with an explanation
        return False


def check_overflow(total: FloatArray, name: str, formula: str) -> FloatArray:
    """Return `total` if it is finite; raise ValueError otherwise."""
    if not is_finite(total):
        raise ValueError(f"{name} is too large: {formula} overflows float64; divide {name} by a constant")
    return total


# --------------------------------------------------------------------------------------------------
# Whitening
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Whitening:
    """A whitening transform, and its measured accuracy.

    Attributes
    ----------
    method : {"zca", "pca", "cholesky"} or None
        Whitening method; None if the raw inputs were white to within `error`.
    matrix : ndarray, shape (q, d_x), or None
        T with T S T^T = I, where S = X X^T; None means I.
    rank : int
        q, the numerical rank of X and the input dimension of the problem.
    condition_number : float
        Ratio of the largest to the smallest retained eigenvalue of S, the square of that of X.
    error : float
        ||T S T^T - I||_F / sqrt(q), measured on the whitened data.
    discarded : float
        Share of ||X||_F^2 in the discarded directions.
    """

    method: str | None
    matrix: FloatArray | None
    rank: int
    condition_number: float
    error: float
    discarded: float

    def __repr__(self) -> str:
        """Return the method, the sizes and the numbers, without the matrix."""
        kind = "no transform" if self.method is None else self.method
        rank = f"rank {self.rank}" + ("" if self.matrix is None else f" of {self.matrix.shape[1]}")
        return (
            f"Whitening({kind}, {rank}, error {self.error:.1e}, "
            f"condition number {self.condition_number:.3g}, discarded {self.discarded:.1e})"
        )


def gram_resolution(dim: int) -> float:
    """Return the relative resolution of the eigenvalues of a Gram matrix, ``4 (d + 1000) eps``.

    Smaller eigenvalues, relative to the largest, are indistinguishable from rounding errors. The errors of
    the eigenvalue solver grow no faster than d, those of a sum over N samples like sqrt(N); N is assumed to
    be 10^6. The Gram matrix squares singular values, so those of the inputs are resolved to the square root
    of this number, about 1e-6.
    """
    return float(4 * (dim + 1000) * np.finfo(np.float64).eps)


class Moments(Protocol):
    """Moments of data, computed from samples or from sums over batches.

    `mean` is the vector that has been subtracted from the inputs, None for 0.
    """

    dim_in: int
    dim_out: int
    n_samples: int
    mean: FloatArray | None
    classes: IntArray | None

    def transformed_gram(self, transform: FloatArray) -> FloatArray:
        """Return T S T^T, so accurately that T S T^T - I has no cancellation error."""
        ...

    def statistics(self, transform: FloatArray | None = None) -> Statistics:
        """Return the sufficient statistics of (T X, Y); T = I if `transform` is None."""
        ...

    def principal_whitener(self, squared_tolerance: float) -> tuple[FloatArray, float]:
        """Return a T with T S T^T = I approximately, and the share of ||X||_F^2 that it discards."""
        ...

    def squared_residual(self, matrix: FloatArray) -> float:
        """Return ||M X - Y||_F^2, without cancellation."""
        ...


def whiten_inputs(
    moments: Moments, method: str, rank_tolerance: float | None = None
) -> tuple[Whitening, Statistics]:
    """Find T with T S T^T = I, S = X X^T, and the statistics of the whitened samples.

    Parameters
    ----------
    moments : Samples or SufficientStatistics
        Moments of X, (d_x, N), centred or not. Sums, not divided by N.
    method : {"zca", "pca", "cholesky"}
        With S = E diag(lambda) E^T: ``T = E diag(lambda)^(-1/2) E^T``, ``diag(lambda)^(-1/2) E^T``, or
        the inverse of the lower triangular factor of S = L L^T. They differ by a rotation from the left.
    rank_tolerance : float, optional
        Largest singular value of X, relative to the first one, whose direction is discarded. Default:
        ``sqrt(4 (d_x + 1000) eps)``, about 1e-6, the resolution of S.

    Returns
    -------
    whitening : Whitening
    statistics : Statistics
        Statistics of (T X, Y), summed over T X.

    Raises
    ------
    ValueError
        If X = 0, or `rank_tolerance` is so small that a retained direction is rounding noise.

    Notes
    -----
    The eigenvectors of S whiten X with an error near cond(S) eps, because S is rounded. The Gram matrix of
    the whitened data is near I, so its Cholesky factor is accurate; multiplied into T, it reduces the error
    to sqrt(cond(S)) eps, that of rounding T X. Three passes over the data, of which the last one measures the
    error; O(N d^2) time, and the memory of one chunk. `SufficientStatistics` have more than float64 precision
    and need no pass over the data.

    If the rank q is below d_x, the problem is posed in the q principal coordinates of X. S is diagonal in
    them, so the three methods coincide.

    Names as in Kessy, Lewin, Strimmer, "Optimal whitening and decorrelation", The American Statistician 72
    (2018); their Cholesky whitening orders the features in reverse.
    """
    tolerance = squared_tolerance(rank_tolerance, moments.dim_in)
    first, discarded = moments.principal_whitener(tolerance)
    nearly_identity = moments.transformed_gram(first)
    if np.linalg.eigvalsh(nearly_identity)[0] < 0.1:
        # The data have less energy along some direction than its eigenvalue of the rounded S.
        raise ValueError(
            f"rank_tolerance is {math.sqrt(tolerance):.1e}, which keeps directions of X that are "
            f"rounding noise; wanted about {math.sqrt(gram_resolution(moments.dim_in)):.1e} or more"
        )
    refined = np.linalg.solve(np.linalg.cholesky(nearly_identity), first)
    matrix, condition_number = _canonical_whitener(refined, method)
    rank = matrix.shape[0]
    result = moments.statistics(matrix)
    error = distance_from_identity(result.input_gram)
    return Whitening(method, matrix, rank, condition_number, error, discarded), result


def distance_from_identity(gram: FloatArray) -> float:
    """Return ||G - I||_F / sqrt(q) of a (q, q) Gram matrix."""
    return float(np.linalg.norm(gram - np.eye(gram.shape[0])) / math.sqrt(gram.shape[0]))


def squared_tolerance(rank_tolerance: float | None, dim: int) -> float:
    """Return the largest eigenvalue of S, relative to the first one, that counts as zero."""
    if rank_tolerance is None:
        return gram_resolution(dim)
    return check_scale(rank_tolerance, "rank_tolerance (share of sigma_1)", below=1.0) ** 2


def whitener_of_gram(gram: FloatArray, squared_tolerance: float) -> tuple[FloatArray, float]:
    """Return ``diag(lambda)^(-1/2) E^T`` over the retained eigenpairs of S, and the discarded energy."""
    keep, eigenvalues, vectors, discarded = _select_eigenpairs(gram, squared_tolerance)
    return (vectors[:, keep] / np.sqrt(eigenvalues[keep])).T, discarded


def _select_eigenpairs(
    gram: FloatArray, squared_tolerance: float
) -> tuple[npt.NDArray[np.bool_], FloatArray, FloatArray, float]:
    eigenvalues, vectors = np.linalg.eigh(gram)
    keep = eigenvalues > max(squared_tolerance * eigenvalues[-1], 0.0)
    if not keep.any():
        raise ValueError("X (raw inputs) is zero: there is nothing to whiten")
    energy = np.maximum(eigenvalues, 0.0)
    return keep, eigenvalues, vectors, float(energy[~keep].sum() / energy.sum())


def _canonical_whitener(whitener: FloatArray, method: str) -> tuple[FloatArray, float]:
    """Rotate a T with T S T^T = I to the T of the method; return it and cond(S).

    T^T T = S^(-1) for any rotation, so T yields the principal axes and the Cholesky factor.
    """
    rank, dim = whitener.shape
    _, scales, axes = np.linalg.svd(whitener, full_matrices=False)
    scales, axes = scales[::-1], axes[::-1]  # largest singular value of X first
    condition_number = float((scales[-1] / scales[0]) ** 2)
    if method == "cholesky" and rank == dim:
        _, upper = np.linalg.qr(whitener[:, ::-1])
        lower = upper[::-1, ::-1]
        return np.ascontiguousarray(lower * _signs(np.diag(lower))[:, None]), condition_number
    if method == "zca" and rank == dim:
        return (axes.T * scales) @ axes, condition_number
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    return (scales * _signs(largest[:, 0]))[:, None] * axes, condition_number


def _signs(values: FloatArray) -> FloatArray:
    """Return the signs of `values`, +1 for zeros."""
    return np.where(values < 0, -1.0, 1.0)
