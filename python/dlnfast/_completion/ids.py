# SPDX-License-Identifier: MIT
"""Ids of rows and columns, and the forms in which `MatrixCompletion` accepts entries that have ids."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from numbers import Number
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .._support.arrays import (
    as_array,
    as_vector,
    check_choice,
    is_of,
    is_sparse,
    read_array,
    read_known_values,
)
from .._support.errors import ShapeError
from .entries import Entries, Positions, Vector, check_shape, read_indices, read_matrix, read_pairs

FORMS: Final = ("auto", "long", "wide")
#: Positions are refused where they exceed the known ones by more than the first number, and by the second one
#: for each entry; `fit` warns where fewer than a share of at least so many have entries.
_FREE_POSITIONS: Final = 2**20
_POSITIONS_PER_ENTRY: Final = 1000
_MANY_POSITIONS: Final = 1000
_LEAST_USED: Final = 0.1
_REMEDY: Final = (
    'If they are ids, pass strings or categories, such as DataFrame.astype("category"); otherwise state the '
    "size with EntryOptions(shape=(rows, columns))"
)
_AXES: Final = ("rows", "columns")


class Ids:
    """Distinct ids of rows or columns, in the order of their positions.

    Parameters
    ----------
    values : ndarray, shape (n,)
    """

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self.values = values
        self._positions: dict[Hashable, int] | None = None

    def __len__(self) -> int:
        """Return the number of ids."""
        return len(self.values)

    def __getstate__(self) -> npt.NDArray[Any]:
        """Return the ids: the table of their positions is made again."""
        return self.values

    def __setstate__(self, values: npt.NDArray[Any]) -> None:
        self.__init__(values)  # type: ignore[misc]

    def find(self, ids: Sequence[Hashable]) -> Positions:
        """Return the positions of some ids; that of an unknown one is the number of ids."""
        if self._positions is None:
            self._positions = {found: i for i, found in enumerate(self.values.tolist())}
        unknown = len(self.values)
        return np.array([self._positions.get(each, unknown) for each in ids], np.int64)

    def name_of(self, at: int) -> Any:
        """Return the id at a position, as a Python object."""
        return self.values[at : at + 1].tolist()[0]

    def extend(self, ids: npt.NDArray[Any]) -> Ids:
        """Return these ids, followed by those of `ids` that are new."""
        new = ids[self.find(ids.tolist()) == len(self)]
        if len(new) == 0:
            return self
        values = np.empty(len(self) + len(new), object)
        values[: len(self)], values[len(self) :] = self.values.tolist(), new.tolist()
        return Ids(_simplify(values))

    def are_strings(self) -> bool:
        """Return whether every id is a string."""
        return all(isinstance(each, str) for each in self.values.tolist())


class Axis(NamedTuple):
    """Rows or columns of entries.

    Attributes
    ----------
    positions : ndarray of int64
        Position of the row of each entry; with ids, index into them.
    size : int
        Number of rows that the input names or has.
    ids : ndarray of object or None
        Distinct ids of the rows. None: rows have positions only.
    is_whole : bool
        Whether the input is a matrix, all of whose rows are in order.
    """

    positions: Positions
    size: int
    ids: npt.NDArray[Any] | None = None
    is_whole: bool = False

    def take(self, part: slice | npt.NDArray[np.bool_]) -> Axis:
        """Return the axis of some of the entries."""
        return self._replace(positions=self.positions[part])

    def place(self, known: Ids | None, word: str, title: str = "X") -> Positions:
        """Return positions among known rows; those of unknown ids are the number of known ones.

        Raises TypeError where ids are given and there are none, or integers instead of strings; `title`
        names the argument.
        """
        if known is None:
            if self.ids is None:
                return self.positions
            if len(self.ids) == 0:
                return self.positions
            owner = f"{title} has {word} with" if title == "X" else f"{title} has"
            raise TypeError(f"{owner} ids, such as {self.ids[0]!r}; wanted integers, as `fit` had")
        if self.ids is not None:
            return known.find(self.ids.tolist())[self.positions]
        if self.is_whole:
            return self.positions
        if self.positions.size > 0 and known.are_strings():
            place = f" for {word}" if title == "X" else ""
            raise TypeError(
                f"{title} has integers{place}; wanted ids, such as {known.values[0]!r}, as `fit` had"
            )
        return known.find(self.positions.tolist())

    def extend(
        self, known: Ids | None, n_known: int, word: str, are_new: bool = False
    ) -> tuple[Positions, int, Ids | None]:
        """Return positions where unknown rows come after the known ones, the number of rows, and all ids.

        With `are_new`, all rows must be unknown; those of a matrix without ids come after the known ones.
        """
        if self.is_whole and self.ids is None:
            if known is not None and are_new:
                raise TypeError(
                    f"X has {word} without ids; wanted ids, such as {known.values[0]!r}, as `fit` had"
                )
            first = n_known if are_new else 0
            return self.positions + first, max(n_known, first + self.size), known
        named = self
        if known is not None and self.ids is None:
            self.place(known, word)  # raises for integers instead of strings
            named = _axis_of_ids(self.positions.tolist(), word)
        ids = known if known is None or named.ids is None else known.extend(named.ids)
        positions = named.place(ids, word)
        if are_new and positions.size > 0 and positions.min() < n_known:
            first = int(positions.min())
            raise ValueError(
                f"X has {first if ids is None else ids.name_of(first)!r} among the new {word}, which is "
                "known; wanted new ones, or partial_fit"
            )
        if ids is None:
            self.check_size(n_known, word)
        return positions, max(n_known, self.size) if ids is None else len(ids), ids

    def check_size(self, n_known: int, word: str) -> None:
        """Raise ValueError if positions reach far beyond the entries, because they are probably ids."""
        if self.size - n_known > _FREE_POSITIONS + _POSITIONS_PER_ENTRY * self.positions.size:
            raise ValueError(
                f"X reaches position {self.size - 1} of the {word} with {self.positions.size} entries; "
                f"wanted positions from 0 without large gaps. {_REMEDY}"
            )

    def warn_of_gaps(self, word: str) -> None:
        """Warn if few of many positions have entries, because they are probably ids."""
        used = np.count_nonzero(np.bincount(self.positions, minlength=self.size))
        if self.size >= _MANY_POSITIONS and used < _LEAST_USED * self.size:
            warnings.warn(
                f"{1.0 - used / self.size:.1%} of the {self.size} {word} have no entries: the integers in X "
                f"are positions from 0. {_REMEDY}",
                UserWarning,
                stacklevel=4,
            )

    def name(self) -> Ids | None:
        """Return the ids as those of a new matrix."""
        return None if self.ids is None else Ids(_simplify(self.ids))


class Reading(NamedTuple):
    """Entries as they were read: rows, columns, values, and weights if there are any."""

    rows: Axis
    columns: Axis
    values: Vector
    weights: Vector | None = None

    def find_shape(self, wanted: Any) -> tuple[int, int]:
        """Return the shape of the matrix; `wanted` is the option of the estimator, or None."""
        found = self.rows.size, self.columns.size
        if wanted is None:
            for axis, word in zip(self[:2], _AXES, strict=True):
                if axis.ids is None and not axis.is_whole:
                    axis.check_size(0, word)
                    axis.warn_of_gaps(word)
            return found
        if self.rows.ids is not None or self.columns.ids is not None:
            raise ValueError(f"entries.shape is {wanted}, but X has ids, which determine it; wanted None")
        if not self.rows.is_whole:
            return check_shape(wanted, found)
        if tuple(wanted) != found:
            raise ShapeError(f"entries.shape is {tuple(wanted)}, but X has shape {found}")
        return found

    def entries(self, rows: Positions, columns: Positions, shape: tuple[int, int], scale: float) -> Entries:
        """Return the entries at some positions, with the weights over `scale`.

        Raises ValueError if there are none.
        """
        if self.values.size == 0:
            raise ValueError("X has no known entries; wanted at least one")
        weights = None if self.weights is None else self.weights / scale
        return Entries(rows, columns, self.values, shape, weights)

    @property
    def weight_scale(self) -> float:
        """Mean of the weights; 1 without weights."""
        return 1.0 if self.weights is None or self.weights.size == 0 else float(np.mean(self.weights))

    def count_grouped(self) -> int:
        """Return the number of entries if they are grouped by rows, as in a sorted file or a matrix; or 0."""
        rows = self.rows.positions
        changes = int(np.count_nonzero(rows[1:] != rows[:-1]))
        is_grouped = 0 < changes == np.count_nonzero(np.bincount(rows)) - 1 if rows.size > 1 else False
        return rows.size if is_grouped else 0


def read_known(X: Any, y: Any, form: str = "auto", sample_weight: Any = None) -> Reading:
    """Read known entries in any form.

    Parameters
    ----------
    X : object
        Pairs with `y`; otherwise a matrix with gaps, a sparse matrix, a table that is wide, or one with
        columns row, column and value.
    y : array_like or None
    form : {"auto", "long", "wide"}
        Meaning of X without y. "auto": a table of three columns whose first or second one has ids is long.
    sample_weight : array_like, optional
        Weight of each known entry, in the order of y, or of the stored entries of a matrix.

    Returns
    -------
    Reading
        Copies. Entries of weight 0 are left out.
    """
    check_choice(form, "entries.form", FORMS)
    if y is not None:
        if is_sparse(X):
            raise TypeError("y is set, but the sparse matrix X holds its values itself; wanted y=None")
        reading = _read_values(*read_pair_axes(X), y, "y (ratings)", sample_weight)
    elif not is_sparse(X) and (form == "long" or (form == "auto" and _is_long(X))):
        parts = _split_columns(X, 3)
        rows, columns = _read_axes(parts)
        reading = _read_values(rows, columns, parts[2], "X (third column, the ratings)", sample_weight)
    else:
        reading = _read_whole(X, form, sample_weight)
    if reading.weights is None:
        return reading
    kept = reading.weights > 0.0
    rows, columns = (axis.take(kept) for axis in reading[:2])
    return Reading(rows, columns, reading.values[kept], reading.weights[kept])


def read_pair_axes(X: Any) -> tuple[Axis, Axis]:
    """Read pairs of ids or positions."""
    if not _is_table(X) and not _is_list_of_ids(X):
        array = read_array(X, "X")[0]
        if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "OUST":
            rows, columns = read_pairs(X)
            return _axis_of_positions(rows), _axis_of_positions(columns)
    return _read_axes(_split_columns(X, 2))


def read_ids(x: Any, known: Ids | None, word: str) -> tuple[list[Any], Positions, bool]:
    """Return ids or positions, their positions, and whether `x` is a single one.

    Lists, arrays and series hold several; everything else is one id.
    """
    is_one = not isinstance(x, (list, range)) and not getattr(x, "shape", ()) and not hasattr(x, "to_list")
    items: Any = np.array([x]) if is_one and known is None else x
    if is_one and known is not None:
        items = np.empty(1, object)
        items[0] = x
    title = word.removesuffix("s")
    axis = _read_axis(items, word, title)
    positions = axis.place(known, word, title)
    asked = axis.positions.tolist() if axis.ids is None else axis.ids[axis.positions].tolist()
    return asked, positions, is_one


# ------------------------------------------------------------------------------------------------ forms


def _read_values(rows: Axis, columns: Axis, y: Any, name: str, sample_weight: Any) -> Reading:
    values, which, count = read_known_values(_plain_column(y), name)
    if count != rows.positions.size:
        raise ShapeError(f"{name} has {count} values; wanted {rows.positions.size}, one for each pair")
    weights = _read_weights(sample_weight, count)
    return Reading(
        rows.take(which), columns.take(which), np.array(values), None if weights is None else weights[which]
    )


def _read_whole(X: Any, form: str, sample_weight: Any) -> Reading:
    ids: tuple[Any, Any] = (None, None)
    may_be_pairs = form == "wide"
    if is_of(X, "pandas", "DataFrame"):
        _check_columns(X, [(name, X.iloc[:, at]) for at, name in enumerate(X.columns)])
        ids = _labels(X.index), _labels(X.columns)
        # A part of a table, such as a split for training, has integers in an index without a name.
        may_be_pairs |= X.index.name is not None or _has_ids(X.index)
        X = X.set_axis(range(X.shape[0]), axis=0).set_axis(range(X.shape[1]), axis=1)
    elif is_of(X, "polars", "DataFrame"):
        _check_columns(X, list(zip(X.columns, X.get_columns(), strict=True)))
        ids = None, np.array(X.columns, object)
        X = np.ma.column_stack([_plain_column(each) for each in X.get_columns()]) if X.width else X.to_numpy()
    *positions, values, shape = read_matrix(X, may_be_pairs)
    axes = []
    for at, size, labels, word in zip(positions, shape, ids, _AXES, strict=True):
        if labels is None:
            axes.append(Axis(np.array(at, np.int64), size, None, is_whole=True))
        else:
            named = _axis_of_ids(labels.tolist(), word, is_sorted=False)
            axes.append(named._replace(positions=named.positions[at], is_whole=True))
    return Reading(axes[0], axes[1], np.array(values), _read_weights(sample_weight, values.size))


def _check_columns(X: Any, columns: list[tuple[Any, Any]]) -> None:
    """Raise if a table that is read as wide has a column that is not numeric."""
    for name, column in columns:
        kind = str(column.dtype)
        # Python objects may be numbers or None, which the conversion decides.
        if _has_ids(column) and kind.lower() not in ("object", "null"):
            raise TypeError(
                f"X has {X.shape[1]} columns, of which {name!r} has dtype {kind}; wanted three columns (row, "
                "column, rating), two columns and y, or a wide table of numbers alone, with the ids of the "
                "rows as index"
            )


def _read_weights(sample_weight: Any, count: int) -> Vector | None:
    if sample_weight is None:
        return None
    weights = as_vector(_plain_column(sample_weight), "sample_weight", dtype=np.float64, empty=True)
    if weights.size != count:
        raise ShapeError(f"sample_weight has {weights.size} values; wanted {count}, one for each entry")
    if weights.size > 0 and weights.min() < 0.0:
        at = int(np.argmax(weights < 0.0))
        raise ValueError(f"sample_weight is {weights[at]:g} at {at}; wanted numbers of at least 0")
    if weights.size > 0 and not weights.any():
        raise ValueError("sample_weight is zero for all entries; wanted some above 0")
    return np.array(weights)


def _is_long(X: Any) -> bool:
    """Return whether a table has three columns, one of the first two with ids."""
    if not _is_table(X) or X.shape[1] != 3:
        return False
    return any(_has_ids(column) for column in _split_columns(X, 3)[:2])


def _has_ids(column: Any) -> bool:
    kind = str(column.dtype).lower()
    return not kind.startswith(("int", "uint", "float", "bool", "double", "sparse", "decimal"))


# ----------------------------------------------------------------------------------------------- columns


def _is_table(X: object) -> bool:
    return is_of(X, "pandas", "DataFrame") or is_of(X, "polars", "DataFrame")


def _plain_column(x: Any) -> Any:
    """Return a column of polars as an array, masked where it has nulls; anything else as it is."""
    if not is_of(x, "polars", "Series"):
        return x
    if not x.null_count():
        return x.to_numpy()
    return np.ma.masked_array(x.fill_null(0).to_numpy(), x.is_null().to_numpy())


def _split_columns(X: Any, count: int) -> list[Any]:
    if _is_table(X):
        columns = [X.iloc[:, i] for i in range(X.shape[1])] if hasattr(X, "iloc") else list(X.get_columns())
    elif isinstance(X, (list, tuple)) and X and all(isinstance(row, (list, tuple)) for row in X):
        lengths = sorted({len(row) for row in X})
        if len(lengths) > 1:
            raise ShapeError(f"X has rows of {lengths[0]} and of {lengths[-1]} items; wanted {count} in each")
        columns = list(zip(*X, strict=True))
    else:
        array = read_array(X, "X")[0]
        if array.ndim != 2:
            raise ShapeError(f"X has shape {array.shape}; wanted {count} columns")
        columns = list(array.T)
    if len(columns) != count:
        names = "row, column" if count == 2 else "row, column, rating"
        raise ShapeError(f"X has {len(columns)} columns; wanted {count}: {names}")
    return columns


def _is_list_of_ids(X: Any) -> bool:
    """Return whether X is a list of pairs with ids of any type, of which NumPy may not make an array."""
    if not isinstance(X, (list, tuple)) or not all(isinstance(pair, (list, tuple)) for pair in X):
        return False
    return all(len(pair) == 2 for pair in X) and not all(isinstance(each, Number) for p in X for each in p)


def _read_axes(columns: Sequence[Any]) -> tuple[Axis, Axis]:
    return _read_axis(columns[0], "rows", "X (first column)"), _read_axis(
        columns[1], "columns", "X (second column)"
    )


def _axis_of_positions(positions: Positions) -> Axis:
    return Axis(np.array(positions), int(positions.max(initial=-1)) + 1)


def _read_axis(column: Any, word: str, title: str) -> Axis:
    """Read one column of ids or positions; `title` names it in messages."""
    is_category = str(getattr(column, "dtype", "")).lower().startswith(("categor", "enum"))
    if is_of(column, "polars", "Series"):
        numeric = column.dtype.is_numeric() and column.null_count() == 0
        values = column.to_numpy() if numeric else _objects(column.to_list())
    elif is_of(column, "pandas", "Series") or is_of(column, "pandas", "Index"):
        gaps = np.asarray(column.isna())
        if gaps.any():
            raise _no_id(title, word, int(np.argmax(gaps)))
        if is_category:
            return _axis_of_categories(column, word)
        values = as_array(column, title)
    elif isinstance(column, (list, tuple)):
        values = as_array(column, title)
        values = _objects(column) if values.dtype.kind in "USO" or values.ndim != 1 else values
    else:
        values = as_array(column, title)
    if values.ndim != 1:
        raise ShapeError(f"{title} has shape {values.shape}; wanted one axis")
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise _no_id(title, word, int(np.argmax(np.isnan(values))))
    if values.dtype.kind in "iufbc" and not is_category:
        return _axis_of_positions(read_indices(values, title))
    items = values.tolist() if values.dtype.kind == "O" else values.astype(object).tolist()
    kinds = set(map(type, items))
    if kinds and not is_category and all(map(_is_integer_type, kinds)):
        return _axis_of_positions(read_indices(np.array(items), title))
    if any(issubclass(kind, (Number, np.bool_)) and not _is_integer_type(kind) for kind in kinds):
        for each in items:
            if isinstance(each, (Number, np.bool_)) and not _is_integer_type(type(each)) and each == each:
                raise TypeError(
                    f"{title} has {each!r} of type {type(each).__name__}; wanted integers, or ids"
                )
    return _axis_of_ids(items, word, title=title)


def _axis_of_categories(column: Any, word: str) -> Axis:
    """Return the axis of a pandas column by its codes, without a Python object for each entry."""
    categorical = getattr(column, "cat", column)
    used, codes = np.unique(np.asarray(categorical.codes), return_inverse=True)
    axis = _axis_of_ids(categorical.categories[used].tolist(), word)
    return axis._replace(positions=axis.positions[codes])


def _axis_of_ids(items: list[Any], word: str, is_sorted: bool = True, title: str = "X") -> Axis:
    """Return distinct ids, sorted where they can be compared, otherwise in the order in which they occur.

    The order of the entries then does not change the fit.
    """
    try:
        ids = list(dict.fromkeys(items))
    except TypeError:
        at = next(i for i, each in enumerate(items) if not _is_hashable(each))
        raise TypeError(
            f"{_argument(title)} has {items[at]!r} of type {type(items[at]).__name__} as id of {word} at "
            f"{at}; wanted a "
            "hashable one"
        ) from None
    if any(map(_is_missing, ids)):
        raise _no_id(title, word, next(i for i, each in enumerate(items) if _is_missing(each)))
    if is_sorted:
        with suppress(TypeError):
            ids = sorted(ids)
    numbers = {each: i for i, each in enumerate(ids)}
    positions = np.fromiter(map(numbers.__getitem__, items), np.int64, len(items))
    return Axis(positions, len(ids), _objects(ids))


def _no_id(title: str, word: str, at: int) -> ValueError:
    return ValueError(
        f"{_argument(title)} has no id of {word} at {at}: it is missing (NA); wanted an id for every entry"
    )


def _argument(title: str) -> str:
    """Return the name of the argument in a title such as "X (first column)"."""
    return title.partition(" (")[0]


def _is_missing(value: object) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, (float, np.floating, np.datetime64)) and bool(value != value)


def _is_integer_type(kind: type) -> bool:
    return issubclass(kind, (int, np.integer)) and not issubclass(kind, bool)


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _objects(items: Sequence[Any]) -> npt.NDArray[Any]:
    found = np.empty(len(items), object)
    for i, each in enumerate(items):  # one by one, as NumPy would make axes of tuples
        found[i] = each
    return found


def _simplify(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return ids as int64 if all are integers that fit."""
    items = values.tolist()
    if items and all(_is_integer_type(type(each)) and abs(each) < 2**63 for each in items):
        return np.array(items, np.int64)
    return values


def _labels(index: Any) -> npt.NDArray[Any] | None:
    """Return the labels of a table's rows or columns; None if they are 0, 1, 2, .."""
    array = np.asarray(index)
    if array.dtype.kind in "iu" and np.array_equal(array, np.arange(len(array))):
        return None
    return _objects(index.tolist())


def describe_pairs(rows: Ids | None, columns: Ids | None) -> Callable[[int, int], str]:
    """Return a function that names the pair at two positions."""

    def describe(i: int, j: int) -> str:
        names = [at if ids is None else ids.name_of(at) for ids, at in ((rows, i), (columns, j))]
        return f"({names[0]!r}, {names[1]!r})"

    return describe
