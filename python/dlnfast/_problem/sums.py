# SPDX-License-Identifier: MIT
"""Sums over samples that come in batches, in double-double precision, and their centred moments."""

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
from .data import Samples, Statistics, check_layout, gram_resolution, whitener_of_gram, without_overflow

_FORMAT: Final = "dlnfast statistics"
_FORMAT_VERSION: Final = 1
#: Errors of the sums, as a share of ||X||_F^2: eps / 2^21, with room for a few of them.
_SUM_ERROR: Final = float(np.finfo(np.float64).eps) / 2**20


class DataSums:
    """Sums over samples in double-double precision: ``X X^T``, ``Y X^T``, ``||Y||_F^2``, sums of X and Y.

    `SufficientStatistics` is the public class; this one knows no `Problem`, so that `Problem` may use it.

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
        self._labelled = False

    # ---------------------------------------------------------------------------------------- summing

    def add(self, X: npt.ArrayLike, Y: npt.ArrayLike) -> Self:
        """Add a batch and return self.

        Parameters
        ----------
        X : array_like, shape (d_x, n)
            Inputs of any real precision, n >= 0; read a chunk at a time, so that it may be memory-mapped.
        Y : array_like, shape (d_y, n), or of int, shape (n,)
            Targets, or labels, of which a batch may lack some: classes are those of all batches.

        Returns
        -------
        SufficientStatistics
            Itself.

        Raises
        ------
        TypeError, ShapeError
            For arrays of the wrong type or shape, and labels after targets or the other way round.
        ValueError
            For values that are not finite, or sums that overflow.

            After an error the statistics are as they were before.

        Notes
        -----
        O(n d_x (d_x + d_y) + d_x^2).
        """
        if self._is_empty(X, Y):
            return self
        samples = Samples(X, Y, self.layout)
        outputs_labelled = samples.outputs is None
        self._check_fit(samples.dim_in, samples.dim_out, outputs_labelled, "X (raw inputs)", "Y (targets)")
        batch = type(self)(self.layout)
        batch.n_samples, batch._labelled, batch._classes = (
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
            Each as for `add`.

        Returns
        -------
        SufficientStatistics
            Itself.

        Raises
        ------
        TypeError, ShapeError, ValueError
            As from `add`, naming the batch by its index from 0; the batches before it have been added.
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

        ``a + b`` does the same to a copy of a. It is ``b + a`` bit for bit; other orders of several merges
        agree as far as the sums are known.

        Parameters
        ----------
        other : SufficientStatistics
            Of the same layout and dimensions.

        Returns
        -------
        SufficientStatistics
            Itself.

        Raises
        ------
        TypeError
            For what is no `SufficientStatistics`, and labels beside targets.
        ShapeError, ValueError
            For other dimensions, another layout, or sums that overflow.
        """
        if not isinstance(other, DataSums):
            raise TypeError(f"other is {type(other).__name__}; wanted {type(self).__name__}")
        if other.layout != self.layout:
            raise ValueError(f"other has layout {other.layout!r}; wanted {self.layout!r}, as here")
        if not other.n_samples:
            return self
        self._check_fit(other.dim_in, other.dim_out, other._labelled, "other (inputs)", "other (targets)")
        return self._absorb(other.copy() if not self.n_samples or other is self else other)

    def __add__(self, other: DataSums) -> Self:
        if not isinstance(other, DataSums):
            return NotImplemented
        return self.copy().merge(other)

    def copy(self) -> Self:
        """Return the same sums in arrays of their own."""
        result = type(self)(self.layout)
        result.n_samples, result._classes, result._labelled = self.n_samples, self._classes, self._labelled
        result._sums = {name: sums.copy() for name, sums in self._sums.items()}
        return result

    def _absorb(self, other: DataSums) -> Self:
        """Add checked sums; arrays of `other` become mine where I have none."""
        theirs, classes = other._sums, other._classes
        mine = self._sums
        if mine and self._labelled:
            assert self._classes is not None
            assert classes is not None
            union = np.union1d(self._classes, classes)
            mine, theirs = _with_classes(mine, self._classes, union), _with_classes(theirs, classes, union)
            classes = union
        elif mine and (self._classes is None or classes is None):
            classes = None
        _check_overflow(mine, theirs)
        self._sums = mine
        self._add_sums(theirs)
        self.n_samples += other.n_samples
        self._classes, self._labelled = classes, other._labelled
        return self

    def _add_sums(self, sums: dict[str, Pair]) -> None:
        if not self._sums:
            self._sums = dict(sums)
            return
        for name, total in self._sums.items():
            total.add(sums[name])

    def _is_empty(self, X: npt.ArrayLike, Y: npt.ArrayLike) -> bool:
        """Tell whether a batch has no samples; raise where its shapes do not fit for all that."""
        try:
            shape, shape_of_outputs = shape_of(X, "X (raw inputs)"), shape_of(Y, "Y (targets)")
        except ValueError:  # rows of different lengths, which `Samples` explains
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
        if labelled != self._labelled:
            kinds = ("targets, a matrix", "labels, a vector")
            raise TypeError(f"{outputs} are {kinds[labelled]}; wanted {kinds[self._labelled]}, as before")
        if not labelled and dim_out != self.dim_out:
            raise ShapeError(f"{outputs} has dimension {dim_out}; wanted {self.dim_out}, as before")

    # ---------------------------------------------------------------------------------------- reading

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
        """The class that each row of Y stands for, (K,), ascending, where Y is one-hot in every batch."""
        return self._classes

    @property
    def input_gram(self) -> FloatArray:
        """S = X X^T, shape (d_x, d_x), rounded to float64: a new array."""
        return self._some("input_gram").round()

    @property
    def target(self) -> FloatArray:
        """Phi = Y X^T, shape (d_y, d_x), rounded to float64: a new array."""
        return self._some("target").round()

    @property
    def output_norm_squared(self) -> float:
        """||Y||_F^2."""
        return self._some("output_norms_squared").sum()

    @property
    def input_mean(self) -> FloatArray:
        """The mean of the inputs, shape (d_x,)."""
        return quotient(self._some("input_sum"), self.n_samples).round()

    def _some(self, name: str) -> Pair:
        if not self._sums:
            raise ValueError("there are no samples: add at least one batch that is not empty")
        return self._sums[name]

    @classmethod
    def _unpack(cls, meta: dict[str, Any], arrays: Arrays) -> Self:
        result = cls(meta["layout"])
        result.n_samples, result._labelled = int(meta["n_samples"]), bool(meta["labelled"])
        if result.n_samples:
            d_y, d_x = arrays["target"].shape
            shapes = dict(zip(NAMES, ((d_x, d_x), (d_x,), (d_y, d_x), (d_y,), (d_y,)), strict=True))
            for name, shape in shapes.items():
                pair = Pair(arrays[name], arrays.get(f"{name}_correction"))
                result._sums[name] = pair.map(partial(_checked, name=name, shape=shape))
            result._classes = arrays.get("classes")
            if result._labelled and (result._classes is None or result._classes.shape != (d_y,)):
                raise ValueError("its classes are not those of its targets")
        return result


NAMES: Final = ("input_gram", "input_sum", "target", "output_sum", "output_norms_squared")


@np.errstate(over="ignore", invalid="ignore")
def _sums(inputs: FloatArray, outputs: FloatArray) -> dict[str, Pair]:
    """Return the sums over at most MAX_INNER_SIZE samples."""
    X, Y = split(inputs), split(outputs)
    sums = (gram(X), row_sums(X), product(Y, X), row_sums(Y), squared_row_norms(Y))
    return dict(zip(NAMES, sums, strict=True))


@np.errstate(over="ignore", invalid="ignore")
def _check_overflow(mine: dict[str, Pair], theirs: dict[str, Pair]) -> None:
    """Refuse sums that overflow: their diagonals do so first, by Cauchy and Schwarz."""
    for name, title, formula in (
        ("input_gram", "X", "X X^T"),
        ("output_norms_squared", "Y", "||Y||^2"),
    ):
        sums = [s[name].value for s in (theirs, mine) if s]
        sizes = [np.diag(values) if values.ndim == 2 else values for values in sums]
        without_overflow(np.array(sum(map(np.sum, sizes))), title, formula)


def _checked(part: npt.NDArray[Any], name: str, shape: tuple[int, ...]) -> FloatArray:
    if part.shape != shape or part.dtype != np.float64:
        raise ValueError(f"{name} is {part.dtype} of shape {part.shape}; wanted float64 of shape {shape}")
    if not np.isfinite(part).all():
        raise ValueError(f"{name} has values that are not finite")
    return np.ascontiguousarray(part)


def _with_classes(sums: dict[str, Pair], classes: IntArray, union: IntArray) -> dict[str, Pair]:
    """Return the sums with a row for each class of the union, zero for those that were not there."""
    if classes.size == union.size:
        return sums
    rows = np.searchsorted(union, classes)

    def widened(part: FloatArray) -> FloatArray:
        wider = np.zeros((union.size, *part.shape[1:]))
        wider[rows] = part
        return wider

    return {name: total if name.startswith("input") else total.map(widened) for name, total in sums.items()}


class CenteredMoments:
    """What `Moments` asks for, from sums, with inputs centred or not."""

    def __init__(self, sums: DataSums, center: bool) -> None:
        self._gram, self._target = sums._some("input_gram"), sums._some("target")
        self._output_norms_squared = sums._some("output_norms_squared")
        self.dim_in, self.dim_out = sums.dim_in, sums.dim_out
        self.n_samples, self.classes = sums.n_samples, sums.classes
        self.mean: FloatArray | None = None
        if center:
            self._center(sums)

    def _center(self, sums: DataSums) -> None:
        """Subtract N m m^T and the like, all as pairs."""
        mean = quotient(sums._some("input_sum"), self.n_samples)
        columns = [
            split(vector.normalise().map(lambda part: part[:, np.newaxis]))
            for vector in (mean, sums._some("input_sum"), sums._some("output_sum"))
        ]
        self.mean = mean.round()
        total = float(np.trace(self._gram.value))
        self._gram = self._gram.subtract(product(columns[1], columns[0]))
        self._target = self._target.subtract(product(columns[2], columns[0]))
        left = float(np.trace(self._gram.value))
        if left * gram_resolution(self.dim_in) < total * _SUM_ERROR:
            share = math.sqrt(max(left, 0.0) / total) if total else 0.0
            raise ValueError(
                f"X (raw inputs) spreads by {share:.1e} of its distance from 0, too little for sums of X X^T "
                f"to be centred; subtract a vector near the mean from every batch"
            )

    def transformed_gram(self, transform: FloatArray | None = None) -> FloatArray:
        """Return T S T^T to about cond(S) eps / 2^21."""
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
        """Return T from the eigenvectors of S, and what it discards."""
        return whitener_of_gram(self.transformed_gram(), squared_tolerance)

    def squared_residual(self, matrix: FloatArray) -> float:
        """Return ||M X - Y||_F^2 = <M S - 2 Phi, M> + ||Y||_F^2, to about eps / 2^21 of ||Y||_F^2."""
        M = split(matrix)
        half = product(M, split(self._gram.normalise())).subtract(self._target.map(lambda part: 2 * part))
        rows = product(split(half), M).map(lambda part: np.diag(part).copy())
        rows.add(self._output_norms_squared)
        return max(rows.sum(), 0.0)
