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
def naming_parts(what: str) -> Iterator[None]:
    """Turn the errors of Python about parts that are missing, or of another type, into a ValueError."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{what} lacks {error}") from error
    except (TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{what} has a part of another type than wanted: {error}") from error


def check_array(
    array: Any,
    name: str,
    shape: Sequence[int | None],
    kinds: str = "f",
    *,
    finite: bool = True,
    dtype: npt.DTypeLike | None = None,
) -> None:
    """Raise unless it is an array of this shape and kind of dtype; None stands for any size.

    Parameters
    ----------
    array : object
    name : str
    shape : sequence of int or None
    kinds : str
        Of dtypes: "f" takes float64 and float32 only, "i" integers.
    finite : bool
        Whether its values have to be.
    dtype : dtype, optional
        The one that is wanted, if only one is.

    Raises
    ------
    ShapeError
        For another shape.
    ValueError
        For anything else that is wrong.
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
