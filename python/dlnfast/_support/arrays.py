# SPDX-License-Identifier: MIT
"""Checks and conversions of arguments.

Every array argument of the package is converted by `as_array`, or by a function of this module that calls
it. So tensors, masked arrays, sparse matrices and tables have the same meaning everywhere, and this is the
only module that copies input.
"""

from __future__ import annotations

import array
import math
import operator
import os
import sys
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Number
from pathlib import Path
from typing import Any, Final, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from .errors import CopyWarning, ShapeError
from .types import FloatArray as FloatArray
from .types import IntArray as IntArray

#: Copies of an argument above this size issue a `CopyWarning`.
LARGE_COPY_BYTES = 64 * 2**20

#: The largest integer that the core accepts.
LARGEST_COUNT: Final = 2**63 - 1

#: Types of scalars that NumPy converts to entries of an array.
_PLAIN: Final = (float, int, complex, str, bytes, np.generic)
#: Depth of nested lists below which NumPy converts them.
_MAX_DEPTH: Final = 8
#: Entries up to which a temporary array of flags costs less than the protected sum that avoids it.
_FEW_ENTRIES: Final = 2**16


def _format_title(name: str, symbol: str | None) -> str:
    return f"{name} ({symbol})" if symbol else name


def _float_dtype(array: npt.NDArray[Any], title: str) -> np.dtype[Any]:
    for dtype in (np.float32, np.float64):
        if array.dtype.newbyteorder("=") == dtype:
            return np.dtype(dtype)
    if array.dtype.kind in "biu":
        return np.dtype(np.float64)
    raise TypeError(
        f"{title} has dtype {array.dtype}; wanted float64 or float32 (integers are converted to float64)"
    )


def _convert_array(
    x: object,
    name: str,
    n_axes: int,
    shape: Sequence[int | None] | None,
    dtype: npt.DTypeLike | None,
    finite: bool,
    symbol: str | None,
    empty: bool,
) -> FloatArray:
    title = _format_title(name, symbol)
    array = as_array(x, title)
    if array.dtype == object:
        raise TypeError(f"{title} is not numeric: got {_describe_objects(x, array)}")
    wanted = _float_dtype(array, title) if dtype is None else np.dtype(dtype)
    if dtype is not None:
        _float_dtype(array, title)
    if array.ndim != n_axes:
        kind = "a matrix (2 axes)" if n_axes == 2 else "a vector (1 axis)"
        raise ShapeError(f"{title} has shape {array.shape}; wanted {kind}")
    if shape is not None and any(w is not None and w != g for w, g in zip(shape, array.shape, strict=True)):
        text = ", ".join("any" if w is None else str(w) for w in shape)
        raise ShapeError(f"{title} has shape {array.shape}; wanted ({text}{',' if n_axes == 1 else ''})")
    if array.size == 0 and not empty:
        raise ShapeError(f"{title} is empty: shape {array.shape}")
    if type(array) is np.ndarray and array.dtype == wanted and array.flags.carray:
        result: FloatArray = array  # decided without the slower `np.require`
    else:
        result = np.require(array, wanted, ["C_CONTIGUOUS", "ALIGNED"])
    if (
        isinstance(x, np.ndarray)
        and result is not array
        and not np.shares_memory(result, array)
        and result.nbytes > LARGE_COPY_BYTES
    ):
        warnings.warn(
            f"{title}: {result.nbytes / 2**20:.0f} MB copied to a C-contiguous {wanted} array "
            f"(it came as {array.dtype}, strides {array.strides})",
            CopyWarning,
            stacklevel=4,
        )
    if finite and not is_finite(result):
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(result))[0])
        raise ValueError(f"{title} has a value that is not finite: {result[index]} at {index}")
    return result


def _describe_objects(x: object, array: npt.NDArray[Any]) -> str:
    """Return the type of `x`, and the first of its entries that is no number."""
    if array.ndim > 0:
        for index, item in np.ndenumerate(array):
            if not isinstance(item, Number):
                return f"{type(x).__name__} with {item!r} of type {type(item).__name__} at {index}"
    return type(x).__name__


class StoredEntries(NamedTuple):
    """The stored entries of a sparse matrix, in any order, including explicit zeros."""

    rows: npt.NDArray[Any]
    columns: npt.NDArray[Any]
    values: npt.NDArray[Any]
    shape: tuple[int, int]


def as_array(x: object, title: str, *, missing: bool = False) -> npt.NDArray[Any]:
    """Convert any array-like object to an array, without a copy where possible.

    Parameters
    ----------
    x : object
        Array, nested list, buffer, PyTorch tensor (which is detached and moved to the host; half precision
        becomes float32), pandas object, or anything else that NumPy converts.
    title : str
        Name of the argument, for messages.
    missing : bool
        Whether to return NaN for masked entries and pandas' NA. By default they are refused, because the
        values below a mask are arbitrary.

    Raises
    ------
    ShapeError
        If rows have different lengths.
    TypeError
        If `x` is a sparse matrix, or is not array-like.
    ValueError
        If there are masked entries or NA, unless `missing` is true.
    """
    array, gaps = read_array(x, title)
    if gaps is None:
        return array
    if not missing:
        index = tuple(int(i) for i in np.argwhere(gaps)[0])
        raise ValueError(
            f"{title} has missing values: {int(gaps.sum())} masked or NA, the first at {index}; wanted all "
            "values"
        )
    if array.dtype.kind not in "biuf":
        return array
    filled = array.astype(array.dtype if array.dtype.kind == "f" else np.float64)
    filled[gaps] = np.nan
    return filled


def read_array(x: object, title: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Convert to an array, and return it with a mask of its masked entries and NA; None if there are none.

    Raises the errors of `as_array`.
    """
    return _read(x, title, 0)


def _read(x: object, title: str, level: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    if isinstance(x, (list, tuple)) and level < _MAX_DEPTH and not all(isinstance(i, _PLAIN) for i in x):
        return _read_items(x, title, level)
    if is_sparse(x):
        raise TypeError(f"{title} is a sparse {type(x).__name__}; wanted a dense array")
    if is_of(x, "torch", "Tensor"):
        return _read_tensor(x, title)
    try:
        if any(is_of(x, "pandas", kind) for kind in ("DataFrame", "Series", "Index")) or (
            is_of(x, "pandas.api.extensions", "ExtensionArray")
        ):
            return _read_table(x)
        foreign = hasattr(x, "__dlpack__") and not hasattr(x, "__array__")
        return _read_masked(np.from_dlpack(x) if foreign else np.asanyarray(x))  # type: ignore[arg-type]
    except MemoryError:
        raise
    except ValueError as error:  # rows of different lengths
        raise ShapeError(f"{title} is not a rectangular array: {error}") from None
    except TypeError:  # from objects whose __array__ or the like does not work
        raise TypeError(f"{title} is not numeric: got {type(x).__name__}") from None
    except Exception as error:  # for example for an array in the memory of a GPU
        raise TypeError(f"{title} is {type(x).__name__}, which NumPy cannot read: {error}") from error


def _read_items(
    items: Sequence[object], title: str, level: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Convert a list whose items may be masked arrays, tensors or tables, whose masks NumPy would ignore."""
    if all(type(item) is np.ndarray for item in items):
        return _stack(list(items), title), None
    read = [(item, None) if isinstance(item, _PLAIN) else _read(item, title, level + 1) for item in items]
    values = _stack([_unwrap(value) for value, _ in read], title)
    if all(gaps is None for _, gaps in read):
        return values, None
    return values, _stack(
        [np.zeros(np.shape(value), np.bool_) if gaps is None else gaps for value, gaps in read], title
    )


def _unwrap(value: object) -> object:
    """Return the object in an array without axes: NumPy would put such an array into one of objects."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _stack(items: list[Any], title: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(items)
    except ValueError as error:  # rows of different lengths
        raise ShapeError(f"{title} is not a rectangular array: {error}") from None


def _read_masked(x: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    values = np.asarray(x)
    if not isinstance(x, np.ma.MaskedArray) or values.dtype.names is not None:
        return values, None
    gaps = np.ma.getmaskarray(x)
    return values, gaps if gaps.any() else None


def _read_table(x: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Convert a pandas object; NumPy would make Python objects of nullable columns, or NaN of NA."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    kinds = list(x.dtypes) if x.ndim == 2 else [x.dtype]
    simple = all(isinstance(kind, np.dtype) for kind in kinds)
    if simple or not all(is_numeric_dtype(kind) or is_bool_dtype(kind) for kind in kinds):
        return np.asarray(x), None
    gaps = np.asarray(x.isna(), dtype=np.bool_)
    if gaps.any():
        filled = x.astype("Float64")  # a type that has NA
        return filled.to_numpy(dtype=np.float64, na_value=np.nan), gaps
    plain = [getattr(kind, "numpy_dtype", getattr(kind, "subtype", kind)) for kind in kinds]
    return np.asarray(x, dtype=np.result_type(*plain)), None


def _read_tensor(x: Any, title: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Convert a PyTorch tensor: detach it, copy it to the host, convert half precision to float32."""
    if type(x).__name__ == "MaskedTensor":
        gaps = ~_read_tensor(x.get_mask(), title)[0]
        return _read_tensor(x.get_data(), title)[0], gaps if gaps.any() else None
    try:
        values = x.detach()
        if str(values.dtype) in ("torch.float16", "torch.bfloat16"):
            values = values.float()  # exact
        return values.cpu().resolve_conj().resolve_neg().numpy(), None
    except (RuntimeError, TypeError) as error:  # for example of a type that NumPy lacks
        raise TypeError(f"{title} is a tensor of {x.dtype} that NumPy cannot read: {error}") from error


def is_of(x: object, module: str, name: str) -> bool:
    """Return whether `x` is an instance of a class of a package, without importing the package."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(x, kind)


def is_sparse(x: object) -> bool:
    """Return whether `x` is a SciPy sparse matrix or array, or a PyTorch tensor of a sparse layout."""
    if is_of(x, "torch", "Tensor"):
        return str(x.layout) != "torch.strided"  # type: ignore[attr-defined]
    return hasattr(x, "tocoo")


def read_stored_entries(x: Any, name: str) -> StoredEntries:
    """Return the stored entries of a sparse matrix, including explicit zeros.

    Formats of whole diagonals (DIA) or blocks (BSR) store the zeros inside them.

    Raises
    ------
    ShapeError
        If `x` does not have two axes.
    TypeError
        If `x` is not a sparse matrix.
    """
    if not is_sparse(x):
        raise TypeError(f"{name} is {type(x).__name__}; wanted a SciPy sparse matrix or array")
    if len(x.shape) != 2:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; wanted a matrix (2 axes)")
    shape = int(x.shape[0]), int(x.shape[1])
    if is_of(x, "torch", "Tensor"):
        return _read_tensor_entries(x, name, shape)
    if getattr(x, "format", None) == "dia":  # its tocoo leaves out zeros
        columns = np.broadcast_to(np.arange(x.data.shape[1]), x.data.shape)
        rows = columns - np.asarray(x.offsets)[:, np.newaxis]
        inside = (rows >= 0) & (rows < shape[0]) & (columns < shape[1])
        return StoredEntries(rows[inside], columns[inside], x.data[inside], shape)
    entries = x.tocoo()
    return StoredEntries(entries.row, entries.col, entries.data, shape)


def _read_tensor_entries(x: Any, name: str, shape: tuple[int, int]) -> StoredEntries:
    try:
        entries = x.detach().to_sparse_coo()
        if entries.dense_dim():
            raise TypeError(f"{name} is a hybrid sparse tensor; wanted one number for every entry")
        # Private methods: unless a tensor is coalesced, `indices` raises; `coalesce` would sum duplicates.
        indices = as_array(entries._indices(), name)
        return StoredEntries(indices[0], indices[1], as_array(entries._values(), name), shape)
    except RuntimeError as error:  # PyTorch does not convert this layout or data type
        raise TypeError(f"{name} is a tensor of layout {x.layout}, which cannot be read: {error}") from error


def read_known_values(
    x: object, name: str
) -> tuple[npt.NDArray[np.float64], slice | npt.NDArray[np.bool_], int]:
    """Return the known values of a vector (neither masked nor NA), their indices, and the length of `x`."""
    array, gaps = read_array(x, name)
    if array.dtype.kind == "f" and array.ndim == 1:
        unknown = np.isnan(array)
        if gaps is not None:
            unknown &= ~gaps
        if unknown.any():
            raise ValueError(
                f"{name} has a value that is not finite: nan at {(int(np.argmax(unknown)),)}; wanted "
                "numbers: leave out unknown values, or mask them"
            )
    if gaps is None or array.ndim != 1:
        return as_vector(array, name, dtype=np.float64, empty=True), slice(None), array.size
    return as_vector(array[~gaps], name, dtype=np.float64, empty=True), ~gaps, array.size


def count_axes(x: object, title: str) -> int:
    """Return the number of axes, without a conversion if the object has a shape."""
    return len(shape_of(x, title))


def shape_of(x: object, title: str) -> tuple[int, ...]:
    """Return the shape, without a conversion if the object has one."""
    shape = getattr(x, "shape", None)
    return tuple(shape) if isinstance(shape, tuple) else as_array(x, title).shape


def as_integers(x: object, title: str) -> IntArray:
    """Convert integers to an int64 array of any shape; an empty array may be of any type.

    Raises
    ------
    TypeError
        If an entry is not an integer.
    ValueError
        If an integer exceeds 2**63 - 1, and for the reasons of `as_array`.
    """
    array = as_array(x, title)
    if array.dtype.kind not in "iu" and array.size > 0:
        raise TypeError(f"{title} has dtype {array.dtype}; wanted integers")
    if array.dtype.kind == "u" and array.size > 0 and int(array.max()) > LARGEST_COUNT:
        index = tuple(int(i) for i in np.argwhere(array > LARGEST_COUNT)[0])
        raise ValueError(f"{title} is {int(array[index])} at {index}; wanted integers of at most 2**63 - 1")
    return np.require(array, np.int64, ["C_CONTIGUOUS", "ALIGNED"])


def as_list(x: object, name: str, wanted: str) -> list[Any]:
    """Return the items of an iterable or an array; `wanted` describes them in the error message."""
    # Convert first: iterating over a table gives the names of its columns, and masks would be ignored.
    items = as_array(x, name) if is_array(x) else x
    try:
        return list(items)  # type: ignore[call-overload, no-any-return]
    except TypeError:
        raise TypeError(f"{name} is {type(x).__name__}; wanted {wanted}") from None


def as_pair(x: Any, name: str, wanted: str) -> tuple[Any, Any]:
    """Return the two items of a list or an array; `wanted` describes them in the error message."""
    items = as_array(x, name) if is_array(x) else x
    try:
        first, second = items
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {x!r}; wanted {wanted}") from None
    return first, second


def is_array(x: object) -> bool:
    """Return whether `x` is an array of any kind or a NumPy scalar, not a list or a number."""
    return hasattr(x, "__array__") or isinstance(x, (memoryview, array.array)) or is_sparse(x)


def is_finite(array: npt.NDArray[Any]) -> bool:
    """Return whether all entries are finite, without a temporary array of that size for large arrays."""
    if array.size <= _FEW_ENTRIES:
        return bool(np.isfinite(array).all())
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.sum(array, dtype=np.float64)):
            return True
    return bool(np.isfinite(array).all())


def as_matrix(
    x: object,
    name: str,
    *,
    shape: tuple[int | None, int | None] | None = None,
    dtype: npt.DTypeLike | None = None,
    finite: bool = True,
    symbol: str | None = None,
    empty: bool = False,
) -> FloatArray:
    """Convert `x` to a C-contiguous float64 or float32 matrix; return `x` itself if it is one.

    `shape` holds the required sizes, None for any. ``dtype=None`` keeps float32 and float64, and converts
    integers and booleans to float64.

    Raises
    ------
    TypeError
        If `x` is of type float16, complex, or not numeric.
    ShapeError
        If the number of axes or a size is wrong or, unless `empty` is true, there are no entries.
    ValueError
        If there are infinite values or NaN, unless `finite` is false.
    """
    return _convert_array(x, name, 2, shape, dtype, finite, symbol, empty)


@overload
def as_vector(
    x: object,
    name: str,
    *,
    length: int | None = None,
    dtype: type[np.float64],
    finite: bool = True,
    symbol: str | None = None,
    empty: bool = False,
) -> npt.NDArray[np.float64]: ...


@overload
def as_vector(
    x: object,
    name: str,
    *,
    length: int | None = None,
    dtype: npt.DTypeLike | None = None,
    finite: bool = True,
    symbol: str | None = None,
    empty: bool = False,
) -> FloatArray: ...


def as_vector(
    x: object,
    name: str,
    *,
    length: int | None = None,
    dtype: npt.DTypeLike | None = None,
    finite: bool = True,
    symbol: str | None = None,
    empty: bool = False,
) -> FloatArray:
    """Convert `x` to a C-contiguous float64 or float32 vector; see `as_matrix`."""
    return _convert_array(x, name, 1, None if length is None else (length,), dtype, finite, symbol, empty)


def as_layers(
    weights: object,
    name: str = "weights",
    *,
    columns: tuple[int, str] | None = None,
    wanted: str = "a list of matrices, W_1 .. W_L",
) -> list[FloatArray]:
    """Convert ``W_1 .. W_L`` to matrices of one precision, and check that their products are defined.

    `columns` holds the required number of columns of ``W_1`` and its meaning; `wanted` describes the
    argument in error messages.

    Raises
    ------
    TypeError
        If `weights` is not a list, or has mixed precisions.
    ShapeError
        If `weights` is an empty list or a single matrix, or the sizes of neighbours do not fit.
    """
    if getattr(weights, "ndim", None) == 2:
        raise ShapeError(f"{name} is one matrix; wanted a list of them, W_1 .. W_L")
    if hasattr(weights, "named_parameters"):
        raise TypeError(
            f"{name} is {type(weights).__name__}, a torch.nn.Module; wanted {wanted}: model.to_weights() "
            "returns those of a DeepLinear, and dlnfast.torch.track tracks any model"
        )
    items = as_list(weights, name, wanted)
    if not items:
        raise ShapeError(f"{name} is empty; wanted W_1 .. W_L, at least one")
    layers: list[FloatArray] = []
    for i, weight in enumerate(items):
        layer = as_matrix(weight, f"{name}[{i}]", symbol=f"W_{i + 1}")
        title = f"{name}[{i}] (W_{i + 1})"
        fit = (len(layers[-1]), f"the rows of {name}[{i - 1}]") if layers else columns
        if fit is not None and layer.shape[1] != fit[0]:
            raise ShapeError(f"{title} has shape {layer.shape}; wanted {fit[0]} columns, {fit[1]}")
        if layers and layer.dtype != layers[0].dtype:
            raise TypeError(
                f"{title} is {layer.dtype} but {name}[0] is {layers[0].dtype}; wanted one precision for all"
            )
        layers.append(layer)
    return layers


def _is_masked(x: object) -> bool:
    """Return whether `x` is a masked scalar of a masked array."""
    return isinstance(x, np.ma.MaskedArray) and x.ndim == 0 and bool(np.ma.getmaskarray(x))


def check_count(n: object, name: str, *, minimum: int = 1, maximum: int | None = LARGEST_COUNT) -> int:
    """Convert `n` to an int between `minimum` and `maximum`; ``maximum=None`` allows any larger number."""
    if isinstance(n, (bool, np.bool_)) or _is_masked(n):
        raise TypeError(f"{name} is {n!r}; wanted an integer of at least {minimum}")
    try:
        count = operator.index(n)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        raise TypeError(f"{name} is {n!r}; wanted an integer of at least {minimum}") from None
    if count < minimum:
        raise ValueError(f"{name} is {count}; wanted an integer of at least {minimum}")
    if maximum is not None and count > maximum:
        raise ValueError(f"{name} is {count}; wanted an integer of at most {maximum}")
    return count


def check_scale(
    x: object,
    name: str,
    *,
    minimum: float = 0.0,
    strict: bool = False,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """Convert `x` to a finite float within the bounds; unless `strict`, `minimum` itself is allowed."""
    if type(x) is float and at_most is None and minimum < x < (math.inf if below is None else below):
        return x  # the usual case, without the slower questions
    odd = isinstance(x, (bool, np.bool_, str, bytes, np.complexfloating)) or _is_masked(x)
    try:
        if odd or getattr(x, "ndim", 0) > 0:
            raise TypeError
        value = float(x.detach() if hasattr(x, "detach") else x)  # type: ignore[arg-type]
    except OverflowError:
        value = math.inf
    except (TypeError, ValueError, RuntimeError):
        bound = _describe_bounds(minimum, strict, below, at_most)
        raise TypeError(f"{name} is {x!r}; wanted a number{bound}") from None
    too_small = value < minimum or (strict and value == minimum)
    too_large = (below is not None and value >= below) or (at_most is not None and value > at_most)
    if too_small or too_large or not math.isfinite(value):
        finite = "finite " if below is None and at_most is None else ""
        bound = _describe_bounds(minimum, strict, below, at_most)
        raise ValueError(f"{name} is {value:g}; wanted a {finite}number{bound}")
    return value


def _describe_bounds(minimum: float, strict: bool, below: float | None, at_most: float | None) -> str:
    """Return the words for an interval that follow "a number" in a message."""
    if below is not None or at_most is not None:
        upper = f"{below:g})" if at_most is None else f"{at_most:g}]"
        return f" in {'(' if strict else '['}{minimum:g}, {upper}"
    return f" {'above' if strict else 'of at least'} {minimum:g}" if math.isfinite(minimum) else ""


def frobenius_norm(matrix: FloatArray) -> float:
    """Return ||matrix||_F in double precision, without overflow or underflow of squares."""
    largest = float(np.max(np.abs(matrix), initial=0.0))
    if largest == 0.0 or not np.isfinite(largest):
        return largest
    exponent = int(np.frexp(largest)[1])
    scaled = np.ldexp(matrix.astype(np.float64, copy=False), -exponent)  # exact
    return float(np.ldexp(np.linalg.norm(scaled), exponent))


def check_choice(
    x: object, name: str, choices: Iterable[str], *, optional: bool = False, also: str | None = None
) -> Any:
    """Return `x` if it is one of the choices, or None if `optional` is true; raise ValueError otherwise.

    `also` describes other values that the caller accepts, for the message.
    """
    words = list(choices)
    if (isinstance(x, str) and x in words) or (optional and x is None):
        return x
    wanted = [*map(repr, words), *(["None"] if optional else [])]
    raise ValueError(f"{name} is {x!r}; wanted one of {', '.join(wanted)}{f', or {also}' if also else ''}")


def check_flag(x: object, name: str) -> bool:
    """Convert True or False of Python or NumPy to a bool; raise TypeError for anything else."""
    if isinstance(x, (bool, np.bool_)):
        return bool(x)
    raise TypeError(f"{name} is {x!r}; wanted True or False")


def check_path(x: object, name: str) -> Path:
    """Convert a string or a path to a Path; raise TypeError for anything else."""
    if isinstance(x, (str, os.PathLike)):
        return Path(x)
    raise TypeError(f"{name} is {x!r}; wanted a path")


def check_precision(x: object, name: str = "dtype") -> np.dtype[Any]:
    """Convert a name or a type to the dtype float64 or float32; raise TypeError for any other."""
    dtype: np.dtype[Any] | None = None
    with suppress(TypeError, ValueError):
        dtype = np.dtype(x)  # type: ignore[call-overload]
    # NumPy converts None to float64.
    if x is None or dtype is None or dtype not in (np.dtype(np.float64), np.dtype(np.float32)):
        found = repr(x) if x is None or dtype is None else dtype
        raise TypeError(f"{name} is {found}; wanted float64 or float32")
    return dtype


def aligned_copy(array: FloatArray) -> FloatArray:
    """Return a C-contiguous copy aligned to a cache line, so that aligned SIMD vectors span no two lines."""
    line = 64
    memory = np.empty(array.nbytes + line, dtype=np.uint8)
    start = -memory.ctypes.data % line
    copy: FloatArray = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def widths_of(weights: Sequence[Any]) -> list[int]:
    """Return the widths d_0 .. d_L of a network with the weights W_1 .. W_L."""
    return [weights[0].shape[1], *(w.shape[0] for w in weights)]


def scale_of(weight: FloatArray) -> float:
    """Return the scale ||W||_F / sqrt(min(m, n)), which is eps for eps times an isometry."""
    return frobenius_norm(weight) / float(np.sqrt(min(weight.shape)))


def per_layer(
    x: object,
    name: str,
    n_layers: int | None,
    *,
    minimum: float = 0.0,
    strict: bool = False,
    below: float | None = None,
) -> npt.NDArray[np.float64]:
    """Return a scalar, or a sequence with one value per layer, as a vector of length `n_layers`.

    Without a number of layers a scalar has length 1 and a sequence may have any length. The bounds are those
    of `check_scale`.
    """
    is_number = isinstance(x, (float, int))  # decided without the slower questions for arrays
    single = is_number or isinstance(x, (str, bytes, Mapping)) or not isinstance(x, Iterable)
    if single if is_number or not is_array(x) else count_axes(x, name) == 0:
        value = check_scale(x, name, minimum=minimum, strict=strict, below=below)
        return np.array([value] * (n_layers or 1))  # several times faster than np.full for few layers
    values = as_list(x, name, "one number or one per layer")
    if n_layers is not None and len(values) != n_layers:
        raise ShapeError(f"{name} has {len(values)} values; wanted one number or one per layer ({n_layers})")
    return np.array(
        [
            check_scale(v, f"{name}[{i}]", minimum=minimum, strict=strict, below=below)
            for i, v in enumerate(values)
        ]
    )


def random_generator(seed: object, stream: Sequence[int | str], block: int = 0) -> np.random.Generator:
    """Return a counter-based random generator that depends only on seed, name of the stream and block.

    Parameters
    ----------
    seed : int
        Seed, non-negative and below 2**64.
    stream : sequence of int or str
        Name of the stream, such as ``("orthogonal", layer)``. Each use of random numbers has its own stream.
    block : int
        Part of the stream from which the numbers are drawn, below 2**64, such as the step of a run. Blocks
        hold 2**194 numbers each and do not overlap.
    """
    number = check_count(seed, "seed", minimum=0, maximum=2**64 - 1)
    use = zlib.crc32(repr(tuple(stream)).encode())
    key, counter = np.array([number, use], dtype=np.uint64), np.array([0, 0, 0, block], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
