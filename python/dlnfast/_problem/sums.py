# SPDX-License-Identifier: MIT
"""Sums over batches of samples in double-double precision, and the moments that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray, IntArray, shape_of
from .._support.double_double import (
    MAX_INNER_SIZE,
    Pair,
    gram,
    product,
    quotient,
    row_sums,
    split,
    squared_row_norms,
)
from .._support.errors import ShapeError
from .._support.files import Arrays
from .data import Samples, Statistics, check_layout, check_overflow, gram_resolution, whitener_of_gram

#: Bound on the errors of the sums, relative to ||X||_F^2: twice eps / 2^21.
_SUM_ERROR: Final = float(np.finfo(np.float64).eps) / 2**20


class DataSums:
    """Sums over samples in double-double precision: ``X X^T``, ``Y X^T``, ``||Y||_F^2``, sums of X and Y.

    `SufficientStatistics` is the public class. This base class does not depend on `Problem`, so `Problem` can
    use it.

    Parameters
    ----------
    layout : {"columns", "rows"}
        Whether samples are the columns or the rows of a batch.
    """

    def __init__(self, layout: str = "columns") -> None:
        self.layout = check_layout(layout)
        self.n_samples = 0
        self._sums: dict[str, Pair] = {}
        self._classes: IntArray | None = None
        self._has_labels = False

    # ------------------------------------------------------------------------------------- summation

    def add(self, X: npt.ArrayLike, Y: npt.ArrayLike) -> Self:
        """Add a batch and return self.

        Parameters
        ----------
        X : array_like, shape (d_x, n)
            Inputs of any real type, n >= 0, read a chunk at a time; may be memory-mapped.
        Y : array_like, shape (d_y, n), or of int, shape (n,)
            Targets, or labels. The classes are the union of those of all batches.

        Returns
        -------
        SufficientStatistics
            The object itself.

        Raises
        ------
        TypeError, ShapeError
            If an array has the wrong type or shape, or labels and targets are mixed.
        ValueError
            If a value is not finite, or a sum overflows.

            After an error the statistics are unchanged.

        Notes
        -----
        Cost: O(n d_x (d_x + d_y) + d_x^2).
        """
        if self._is_empty(X, Y):
            return self
        samples = Samples(X, Y, self.layout)
        outputs_labelled = samples.outputs is None
        self._check_fit(samples.dim_in, samples.dim_out, outputs_labelled, "X (raw inputs)", "Y (targets)")
        batch = type(self)(self.layout)
        batch.n_samples, batch._has_labels, batch._classes = (
            samples.n_samples,
            outputs_labelled,
            samples.classes,
        )
        for part in samples.parts(MAX_INNER_SIZE):
            batch._add_sums(_sums(samples.read_inputs(part), samples.read_outputs(part)))
        return self._absorb(batch)

    def add_batches(self, batches: Iterable[tuple[npt.ArrayLike, npt.ArrayLike]]) -> Self:
        """Add every pair (X, Y) of an iterable, in one pass, and return self.

        Parameters
        ----------
        batches : iterable of (X, Y)
            Pairs of arguments of `add`.

        Returns
        -------
        SufficientStatistics
            The object itself.

        Raises
        ------
        TypeError, ShapeError, ValueError
            For the reasons of `add`; the message names the index of the batch, from 0. The batches before it
            have been added.
        """
        try:
            numbered = enumerate(batches)
        except TypeError:
            name = type(batches).__name__
            raise TypeError(f"batches is {name}; wanted an iterable of pairs (X, Y)") from None
        for index, batch in numbered:
            try:
                X, Y = batch
            except (TypeError, ValueError):
                raise TypeError(f"batch {index} is {type(batch).__name__}; wanted a pair (X, Y)") from None
            try:
                self.add(X, Y)
            except (TypeError, ValueError) as error:
                raise type(error)(f"batch {index}: {error}") from error
        return self

    def merge(self, other: DataSums) -> Self:
        """Add sums over other samples and return self; `other` is not changed.

        ``a + b`` merges into a copy of a, and equals ``b + a`` bit for bit. Different orders of several
        merges agree to the accuracy of the sums.

        Parameters
        ----------
        other : SufficientStatistics
            Statistics with the same layout and dimensions.

        Returns
        -------
        SufficientStatistics
            The object itself.

        Raises
        ------
        TypeError
            If `other` is not a `SufficientStatistics`, or one has labels and the other targets.
        ShapeError, ValueError
            If the dimensions or the layouts differ, or a sum overflows.
        """
        if not isinstance(other, DataSums):
            raise TypeError(f"other is {type(other).__name__}; wanted {type(self).__name__}")
        if other.layout != self.layout:
            raise ValueError(f"other has layout {other.layout!r}; wanted {self.layout!r}, that of the first")
        if not other.n_samples:
            return self
        self._check_fit(other.dim_in, other.dim_out, other._has_labels, "other (inputs)", "other (targets)")
        return self._absorb(other.copy() if not self.n_samples or other is self else other)

    def __add__(self, other: DataSums) -> Self:
        if not isinstance(other, DataSums):
            return NotImplemented
        return self.copy().merge(other)

    def copy(self) -> Self:
        """Return a copy, which shares no arrays with this object."""
        result = type(self)(self.layout)
        result.n_samples, result._classes = self.n_samples, self._classes
        result._has_labels = self._has_labels
        result._sums = {name: sums.copy() for name, sums in self._sums.items()}
        return result

    def _absorb(self, other: DataSums) -> Self:
        """Add sums that fit; if this object has none yet, it takes the arrays of `other` without a copy."""
        added, classes = other._sums, other._classes
        own = self._sums
        if own and self._has_labels:
            assert self._classes is not None
            assert classes is not None
            union = np.union1d(self._classes, classes)
            own, added = _insert_classes(own, self._classes, union), _insert_classes(added, classes, union)
            classes = union
        elif own and (self._classes is None or classes is None):
            classes = None
        _check_total_overflow(own, added)
        self._sums = own
        self._add_sums(added)
        self.n_samples += other.n_samples
        self._classes, self._has_labels = classes, other._has_labels
        return self

    def _add_sums(self, sums: dict[str, Pair]) -> None:
        if not self._sums:
            self._sums = dict(sums)
            return
        for name, total in self._sums.items():
            total.add(sums[name])

    def _is_empty(self, X: npt.ArrayLike, Y: npt.ArrayLike) -> bool:
        """Return whether a batch has no samples; raise ShapeError if its other dimensions do not fit."""
        try:
            shape, shape_of_outputs = shape_of(X, "X (raw inputs)"), shape_of(Y, "Y (targets)")
        except ValueError:  # rows of different lengths: `Samples` raises with an explanation
            return False
        axis = 1 if self.layout == "columns" else 0
        if len(shape) != 2 or shape[axis]:
            return False
        n_outputs = shape_of_outputs[axis if len(shape_of_outputs) == 2 else 0] if shape_of_outputs else None
        if len(shape_of_outputs) not in (1, 2) or n_outputs:
            raise ShapeError(f"X has 0 samples and Y has shape {shape_of_outputs}; wanted as many")
        dim_out = shape_of_outputs[1 - axis] if len(shape_of_outputs) == 2 else self.dim_out
        self._check_fit(shape[1 - axis], dim_out, len(shape_of_outputs) == 1, "X (raw inputs)", "Y (targets)")
        return True

    def _check_fit(self, dim_in: int, dim_out: int, labelled: bool, inputs: str, outputs: str) -> None:
        if not self.n_samples:
            return
        if dim_in != self.dim_in:
            raise ShapeError(f"{inputs} has dimension {dim_in}; wanted {self.dim_in}, as before")
        if labelled != self._has_labels:
            kinds = ("targets, a matrix", "labels, a vector")
            raise TypeError(f"{outputs} are {kinds[labelled]}; wanted {kinds[self._has_labels]}, as before")
        if not labelled and dim_out != self.dim_out:
            raise ShapeError(f"{outputs} has dimension {dim_out}; wanted {self.dim_out}, as before")

    # ---------------------------------------------------------------------------------------- results

    @property
    def dim_in(self) -> int:
        """d_x, 0 before the first sample."""
        return len(self._sums["input_sum"].value) if self._sums else 0

    @property
    def dim_out(self) -> int:
        """d_y, or the number of classes so far; 0 before the first sample."""
        return len(self._sums["output_sum"].value) if self._sums else 0

    @property
    def classes(self) -> IntArray | None:
        """The class of each row of Y, (K,), ascending, if Y is one-hot in every batch; None otherwise."""
        return self._classes

    @property
    def input_gram(self) -> FloatArray:
        """S = X X^T, shape (d_x, d_x), rounded to float64: a new array."""
        return self._get_sum("input_gram").round()

    @property
    def target(self) -> FloatArray:
        """Phi = Y X^T, shape (d_y, d_x), rounded to float64: a new array."""
        return self._get_sum("target").round()

    @property
    def output_norm_squared(self) -> float:
        """||Y||_F^2."""
        return self._get_sum("output_norms_squared").sum()

    @property
    def input_mean(self) -> FloatArray:
        """The mean of the inputs, shape (d_x,)."""
        return quotient(self._get_sum("input_sum"), self.n_samples).round()

    def _get_sum(self, name: str) -> Pair:
        if not self._sums:
            raise ValueError("there are no samples; add at least one batch that is not empty")
        return self._sums[name]

    @classmethod
    def _unpack(cls, meta: dict[str, Any], arrays: Arrays) -> Self:
        result = cls(meta["layout"])
        result.n_samples, result._has_labels = int(meta["n_samples"]), bool(meta["labelled"])
        if result.n_samples:
            d_y, d_x = arrays["target"].shape
            shapes = dict(zip(NAMES, ((d_x, d_x), (d_x,), (d_y, d_x), (d_y,), (d_y,)), strict=True))
            for name, shape in shapes.items():
                pair = Pair(arrays[name], arrays.get(f"{name}_correction"))
                result._sums[name] = pair.map(partial(_check_part, name=name, shape=shape))
            result._classes = arrays.get("classes")
            if result._has_labels and (result._classes is None or result._classes.shape != (d_y,)):
                raise ValueError("its classes do not match its targets")
        return result


NAMES: Final = ("input_gram", "input_sum", "target", "output_sum", "output_norms_squared")


@np.errstate(over="ignore", invalid="ignore")
def _sums(inputs: FloatArray, outputs: FloatArray) -> dict[str, Pair]:
    """Return the sums over at most MAX_INNER_SIZE samples."""
    X, Y = split(inputs), split(outputs)
    sums = (gram(X), row_sums(X), product(Y, X), row_sums(Y), squared_row_norms(Y))
    return dict(zip(NAMES, sums, strict=True))


@np.errstate(over="ignore", invalid="ignore")
def _check_total_overflow(own: dict[str, Pair], added: dict[str, Pair]) -> None:
    """Refuse sums whose total overflows; by the Cauchy-Schwarz inequality the diagonal does so first."""
    for name, title, formula in (
        ("input_gram", "X", "X X^T"),
        ("output_norms_squared", "Y", "||Y||^2"),
    ):
        sums = [s[name].value for s in (added, own) if s]
        sizes = [np.diag(values) if values.ndim == 2 else values for values in sums]
        check_overflow(np.array(sum(map(np.sum, sizes))), title, formula)


def _check_part(part: npt.NDArray[Any], name: str, shape: tuple[int, ...]) -> FloatArray:
    if part.shape != shape or part.dtype != np.float64:
        raise ValueError(f"{name} is {part.dtype} of shape {part.shape}; wanted float64 of shape {shape}")
    if not np.isfinite(part).all():
        raise ValueError(f"{name} has values that are not finite")
    return np.ascontiguousarray(part)


def _insert_classes(sums: dict[str, Pair], classes: IntArray, union: IntArray) -> dict[str, Pair]:
    """Return the sums with one row for each class of the union; rows of new classes are zero."""
    if classes.size == union.size:
        return sums
    rows = np.searchsorted(union, classes)

    def insert(part: FloatArray) -> FloatArray:
        wider = np.zeros((union.size, *part.shape[1:]))
        wider[rows] = part
        return wider

    return {name: total if name.startswith("input") else total.map(insert) for name, total in sums.items()}


class CenteredMoments:
    """An implementation of `Moments` from sums, with centred inputs or raw ones."""

    def __init__(self, sums: DataSums, center: bool) -> None:
        self._gram, self._target = sums._get_sum("input_gram"), sums._get_sum("target")
        self._output_norms_squared = sums._get_sum("output_norms_squared")
        self.dim_in, self.dim_out = sums.dim_in, sums.dim_out
        self.n_samples, self.classes = sums.n_samples, sums.classes
        self.mean: FloatArray | None = None
        if center:
            self._center(sums)

    def _center(self, sums: DataSums) -> None:
        """Subtract N m m^T and N y m^T, with the means m of X and y of Y, in double-double precision."""
        mean = quotient(sums._get_sum("input_sum"), self.n_samples)
        columns = [
            split(vector.normalise().map(lambda part: part[:, np.newaxis]))
            for vector in (mean, sums._get_sum("input_sum"), sums._get_sum("output_sum"))
        ]
        self.mean = mean.round()
        total = float(np.trace(self._gram.value))
        self._gram = self._gram.subtract(product(columns[1], columns[0]))
        self._target = self._target.subtract(product(columns[2], columns[0]))
        centred = float(np.trace(self._gram.value))
        if centred * gram_resolution(self.dim_in) < total * _SUM_ERROR:
            ratio = math.sqrt(max(centred, 0.0) / total) if total else 0.0
            raise ValueError(
                f"X (raw inputs) has a spread of {ratio:.1e} of its distance from 0, too small to centre the "
                f"sums of X X^T; subtract a vector near the mean from every batch"
            )

    def transformed_gram(self, transform: FloatArray | None = None) -> FloatArray:
        """Return T S T^T, with errors near cond(S) eps / 2^21."""
        if transform is None:
            gram_matrix = self._gram.round()
        else:
            T = split(transform)
            half = product(T, split(self._gram.normalise())).normalise()
            gram_matrix = product(split(half), T).round()
        return (gram_matrix + gram_matrix.T) / 2

    def statistics(self, transform: FloatArray | None = None) -> Statistics:
        """Return S, Phi and ||Y||^2 of (T X, Y)."""
        target = self._target
        if transform is not None:
            target = product(split(target.normalise()), split(transform))
        return Statistics(self.transformed_gram(transform), target.round(), self._output_norms_squared.sum())

    def principal_whitener(self, squared_tolerance: float) -> tuple[FloatArray, float]:
        """Return T from the eigenvectors of S, and the share of ||X||_F^2 that it discards."""
        return whitener_of_gram(self.transformed_gram(), squared_tolerance)

    def squared_residual(self, matrix: FloatArray) -> float:
        """Return ||M X - Y||_F^2 = <M S - 2 Phi, M> + ||Y||_F^2, with errors near eps / 2^21 ||Y||_F^2."""
        M = split(matrix)
        half = product(M, split(self._gram.normalise())).subtract(self._target.map(lambda part: 2 * part))
        rows = product(split(half), M).map(lambda part: np.diag(part).copy())
        rows.add(self._output_norms_squared)
        return max(rows.sum(), 0.0)
