# SPDX-License-Identifier: MIT
"""Checks of arrays that were read from a file: shape, type and finite values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ShapeError


@contextmanager
def translate_part_errors(title: str) -> Iterator[None]:
    """Raise ValueError where the block meets a missing part, or a part of a wrong type, of a file.

    `title` names the file or the object in the message.
    """
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{title} lacks {error}") from error
    except (TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{title} has a part of another type than expected: {error}") from error


def check_array(
    array: Any,
    name: str,
    shape: Sequence[int | None],
    kinds: str = "f",
    *,
    finite: bool = True,
    dtype: npt.DTypeLike | None = None,
) -> None:
    """Check the type, shape and values of an array that was read from a file.

    Parameters
    ----------
    array : object
        Object to check.
    name : str
        Name of the array, for messages.
    shape : sequence of int or None
        Required sizes; None allows any size.
    kinds : str
        Allowed kinds of dtypes: "f" for float64 and float32, "i" for integers.
    finite : bool
        Whether infinite values and NaN are refused.
    dtype : dtype, optional
        Required dtype. Default: any of `kinds`.

    Raises
    ------
    ShapeError
        If the shape is another one.
    ValueError
        If it is not an array, has another dtype, or has values that are not finite.
    """
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is {type(array).__name__}; wanted an array")
    if array.dtype.kind not in kinds or (array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8)):
        wanted = "integers" if kinds == "i" else "float64 or float32"
        raise ValueError(f"{name} has dtype {array.dtype}; wanted {wanted}")
    if dtype is not None and array.dtype != dtype:
        raise ValueError(f"{name} has dtype {array.dtype}; wanted {np.dtype(dtype)}")
    if array.ndim != len(shape) or any(
        n is not None and n != m for n, m in zip(shape, array.shape, strict=True)
    ):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ShapeError(f"{name} has shape {array.shape}; wanted ({wanted})")
    if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite")
