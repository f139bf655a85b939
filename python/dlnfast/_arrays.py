# SPDX-License-Identifier: MIT
"""Checks and conversions of what users pass in: the one place where an argument may be copied."""

from __future__ import annotations

import operator
import os
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from ._errors import CopyWarning, ShapeError

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]

#: Copies of an argument above this size are announced with a `CopyWarning`.
LARGE_COPY_BYTES = 64 * 2**20

#: The largest integer that the core takes.
LARGEST_COUNT: Final = 2**63 - 1


def _titled(name: str, symbol: str | None) -> str:
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


def _checked_array(
    x: object,
    name: str,
    n_axes: int,
    shape: Sequence[int | None] | None,
    dtype: npt.DTypeLike | None,
    finite: bool,
    symbol: str | None,
    empty: bool,
) -> FloatArray:
    title = _titled(name, symbol)
    if getattr(x, "requires_grad", False) is True:
        raise TypeError(f"{title} is a tensor that requires grad; wanted its values alone: pass x.detach()")
    array = as_array(x, title)
    if array.dtype == object:
        raise TypeError(f"{title} is not numeric: got {type(x).__name__}")
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
    result: FloatArray = np.require(array, wanted, ["C_CONTIGUOUS", "ALIGNED"])
    if isinstance(x, np.ndarray) and not np.shares_memory(result, array) and result.nbytes > LARGE_COPY_BYTES:
        warnings.warn(
            f"{title}: {result.nbytes / 2**20:.0f} MB copied to a C-contiguous {wanted} array "
            f"(it came as {array.dtype}, strides {array.strides})",
            CopyWarning,
            stacklevel=4,
        )
    if finite and not is_finite(result):
        where = np.argwhere(~np.isfinite(result))[0]
        place = tuple(int(i) for i in where)
        raise ValueError(f"{title} has a value that is not finite: {result[place]} at {place}")
    return result


def as_array(x: object, title: str) -> npt.NDArray[Any]:
    """Return any array, or say what has none."""
    try:
        return np.asarray(x)
    except ValueError as error:  # rows of different lengths
        raise ShapeError(f"{title} is not a rectangular array: {error}") from None
    except TypeError:  # of objects that promise an array and break their word
        raise TypeError(f"{title} is not numeric: got {type(x).__name__}") from None


def as_list(x: object, name: str, wanted: str) -> list[Any]:
    """Return the items of an iterable, or say what was wanted."""
    try:
        return list(x)  # type: ignore[call-overload, no-any-return]
    except TypeError:
        raise TypeError(f"{name} is {type(x).__name__}; wanted {wanted}") from None


def is_finite(array: npt.NDArray[Any]) -> bool:
    """Tell whether all entries are finite, without a temporary of the array's size where possible."""
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
    """Return `x` as a C-contiguous float64 or float32 matrix, itself where it already is one.

    `shape` holds wanted sizes, None for any. `dtype=None` keeps float32 and float64 and turns
    integers and booleans into float64.

    Raises
    ------
    TypeError
        For float16, complex and non-numeric input.
    ShapeError
        For a wrong number of axes, wrong sizes or, unless `empty`, no entries.
    ValueError
        For NaN or infinity, unless `finite` is false.
    """
    return _checked_array(x, name, 2, shape, dtype, finite, symbol, empty)


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
    """Return `x` as a C-contiguous float64 or float32 vector; see `as_matrix`."""
    return _checked_array(x, name, 1, None if length is None else (length,), dtype, finite, symbol, empty)


def as_layers(
    weights: object,
    name: str = "weights",
    *,
    columns: tuple[int, str] | None = None,
    wanted: str = "a list of matrices, W_1 .. W_L",
) -> list[FloatArray]:
    """Return ``W_1 .. W_L`` as matrices that follow on each other, all of one precision.

    `columns` holds how many the first has to have, and what they are; `wanted` what may be given.

    Raises
    ------
    TypeError
        For what is no list, and mixed precisions.
    ShapeError
        For an empty list, a single matrix, and sizes that do not fit.
    """
    if isinstance(weights, np.ndarray) and weights.ndim == 2:
        raise ShapeError(f"{name} is one matrix; wanted a list of them, W_1 .. W_L")
    if hasattr(weights, "named_parameters"):
        raise TypeError(
            f"{name} is {type(weights).__name__}, a torch.nn.Module; wanted {wanted}: those of a DeepLinear "
            "are model.to_weights(), and dlnfast.torch.track follows any model"
        )
    given = as_list(weights, name, wanted)
    if not given:
        raise ShapeError(f"{name} is empty; wanted W_1 .. W_L, at least one")
    layers: list[FloatArray] = []
    for i, weight in enumerate(given):
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


def check_count(n: object, name: str, *, minimum: int = 1, maximum: int | None = LARGEST_COUNT) -> int:
    """Return `n` as an int of at least `minimum` and at most `maximum`; None for what only is a limit."""
    if isinstance(n, (bool, np.bool_)):
        raise TypeError(f"{name} is {n!r}; wanted an integer of at least {minimum}")
    try:
        count = operator.index(n)  # type: ignore[arg-type]
    except TypeError:
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
    """Return `x` as a finite float within these bounds; at `minimum` itself unless `strict`."""
    if below is not None or at_most is not None:
        upper = f"{below:g})" if at_most is None else f"{at_most:g}]"
        bound, finite = f" in {'(' if strict else '['}{minimum:g}, {upper}", ""
    else:
        finite = "finite "
        bound = f" {'above' if strict else 'of at least'} {minimum:g}" if np.isfinite(minimum) else ""
    if isinstance(x, (bool, np.bool_, str, bytes, np.complexfloating)) or getattr(x, "ndim", 0) > 0:
        raise TypeError(f"{name} is {x!r}; wanted a number{bound}")
    try:
        value = float(x)  # type: ignore[arg-type]
    except OverflowError:
        value = np.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {x!r}; wanted a number{bound}") from None
    too_small = value < minimum or (strict and value == minimum)
    too_large = (below is not None and value >= below) or (at_most is not None and value > at_most)
    if not np.isfinite(value) or too_small or too_large:
        raise ValueError(f"{name} is {value:g}; wanted a {finite}number{bound}")
    return value


def frobenius_norm(matrix: FloatArray) -> float:
    """Return ||matrix||_F in double precision, whatever its size: no square overflows or vanishes."""
    largest = float(np.max(np.abs(matrix), initial=0.0))
    if largest == 0.0 or not np.isfinite(largest):
        return largest
    exponent = int(np.frexp(largest)[1])
    scaled = np.ldexp(matrix.astype(np.float64, copy=False), -exponent)  # exact
    return float(np.ldexp(np.linalg.norm(scaled), exponent))


def check_choice(
    x: object, name: str, choices: Iterable[str], *, optional: bool = False, also: str | None = None
) -> Any:
    """Return `x` if it is one of the words, or None where that is one of the choices.

    `also` says what else the caller takes.
    """
    words = list(choices)
    if (isinstance(x, str) and x in words) or (optional and x is None):
        return x
    wanted = [*map(repr, words), *(["None"] if optional else [])]
    raise ValueError(f"{name} is {x!r}; wanted one of {', '.join(wanted)}{f', or {also}' if also else ''}")


def check_flag(x: object, name: str) -> bool:
    """Return `x` as a bool if it is one."""
    if isinstance(x, (bool, np.bool_)):
        return bool(x)
    raise TypeError(f"{name} is {x!r}; wanted True or False")


def check_path(x: object, name: str) -> Path:
    """Return `x` as a path if it names one."""
    if isinstance(x, (str, os.PathLike)):
        return Path(x)
    raise TypeError(f"{name} is {x!r}; wanted a path")


def check_precision(x: object, name: str = "dtype") -> np.dtype[Any]:
    """Return float64 or float32, of whichever the name or type is given."""
    dtype: np.dtype[Any] | None = None
    with suppress(TypeError, ValueError):
        dtype = np.dtype(x)  # type: ignore[call-overload]
    # NumPy takes None for float64.
    if x is None or dtype is None or dtype not in (np.dtype(np.float64), np.dtype(np.float32)):
        found = repr(x) if x is None or dtype is None else dtype
        raise TypeError(f"{name} is {found}; wanted float64 or float32")
    return dtype


def aligned_copy(array: FloatArray) -> FloatArray:
    """Return a C-contiguous copy that begins at a cache line, so that no vector of a row spans two."""
    line = 64
    memory = np.empty(array.nbytes + line, dtype=np.uint8)
    begin = -memory.ctypes.data % line
    copy: FloatArray = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def widths_of(weights: Sequence[Any]) -> list[int]:
    """Return the widths d_0 .. d_L that the matrices W_1 .. W_L lead from and to."""
    return [weights[0].shape[1], *(w.shape[0] for w in weights)]


def scale_of(weight: FloatArray) -> float:
    """Return ||W||_F / sqrt(min(m, n)): of eps times an isometry, eps."""
    return frobenius_norm(weight) / float(np.sqrt(min(weight.shape)))


def per_layer(
    x: object,
    name: str,
    n_layers: int,
    *,
    minimum: float = 0.0,
    strict: bool = False,
    below: float | None = None,
) -> npt.NDArray[np.float64]:
    """Return a scalar, or a sequence with one value per layer, as a vector of length `n_layers`.

    The bounds are those of `check_scale`.
    """
    single = isinstance(x, (str, bytes, Mapping)) or not isinstance(x, Iterable)
    if single or (isinstance(x, np.ndarray) and x.ndim == 0):
        return np.full(n_layers, check_scale(x, name, minimum=minimum, strict=strict, below=below))
    values = list(x)  # type: ignore[call-overload]
    if len(values) != n_layers:
        raise ShapeError(f"{name} has {len(values)} values; wanted one number or one per layer ({n_layers})")
    return np.array(
        [
            check_scale(v, f"{name}[{i}]", minimum=minimum, strict=strict, below=below)
            for i, v in enumerate(values)
        ]
    )


def random_generator(seed: object, stream: Sequence[int | str]) -> np.random.Generator:
    """Return a counter-based generator that depends on nothing but `seed` and the name of its use.

    Parameters
    ----------
    seed : int
        Non-negative, below 2**64.
    stream : sequence of int or str
        What the numbers are for, such as ``("orthogonal", layer)``; each use has its own stream.
    """
    number = check_count(seed, "seed", minimum=0, maximum=2**64 - 1)
    use = zlib.crc32(repr(tuple(stream)).encode())
    return np.random.Generator(np.random.Philox(key=np.array([number, use], dtype=np.uint64)))
