# SPDX-License-Identifier: MIT
"""Matrices on PyTorch devices as operators for the tracker, which multiply thin blocks of vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .._support.arrays import FloatArray, as_array

#: Precisions in which singular values are computed; tensors of other precisions are read as float32.
_EXACT: dict[torch.dtype, np.dtype[Any]] = {
    torch.float64: np.dtype(np.float64),
    torch.float32: np.dtype(np.float32),
}


def get_numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the NumPy precision in which a tensor is tracked: its own, or float32 for half precisions."""
    return _EXACT.get(dtype, np.dtype(np.float32))


def get_torch_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the PyTorch precision in which a tensor is tracked; see `get_numpy_dtype`."""
    return dtype if dtype in _EXACT else torch.float32


def matrix_to_host(matrix: torch.Tensor) -> FloatArray:
    """Return a tensor as an array, half precisions as float32; a view of it if possible."""
    result: FloatArray = matrix.detach().to("cpu", get_torch_dtype(matrix.dtype)).numpy()
    return result


def to_device(X: npt.ArrayLike, dtype: np.dtype[Any], device: torch.device) -> torch.Tensor:
    """Copy an array into a tensor on a device."""
    array = np.array(as_array(X, "X"), dtype=dtype)  # a copy, because X may be a read-only view
    return torch.from_numpy(array).to(device)


def to_host(block: torch.Tensor) -> FloatArray:
    """Copy a tensor into a C-contiguous array."""
    result: FloatArray = np.ascontiguousarray(block.cpu().numpy())
    return result


def frobenius_norm(tensor: torch.Tensor) -> float:
    """Return the Frobenius norm, summed in float64 without overflow or underflow of the squares."""
    norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    if 1e-140 < norm < np.inf:
        return norm
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if largest == 0.0 or not np.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(tensor.double() / largest))


class DeviceMatrix:
    """Operator ``W - W_0`` for tensors on any device, which `SVDTracker.update` accepts as a matrix.

    Only blocks of vectors are copied between the device and the host, not the matrix.

    Parameters
    ----------
    matrix : Tensor, shape (m, n)
        Matrix W. Half precisions are read as float32.
    start : Tensor, shape (m, n), optional
        Matrix W_0; zero by default.
    """

    def __init__(self, matrix: torch.Tensor, start: torch.Tensor | None = None) -> None:
        self.dtype = get_numpy_dtype(matrix.dtype)
        values = matrix.detach().to(get_torch_dtype(matrix.dtype))
        self._values = values if start is None else values - start.detach().to(values)
        self.shape = (int(matrix.shape[0]), int(matrix.shape[1]))

    def matmat(self, X: npt.ArrayLike, /) -> FloatArray:
        """Return ``(W - W_0) X`` for X of shape (n, p).

        Parameters
        ----------
        X : array_like, shape (n, p)
            Block of vectors as columns.

        Returns
        -------
        ndarray, shape (m, p)
        """
        return to_host(self._values @ to_device(X, self.dtype, self._values.device))

    def rmatmat(self, Y: npt.ArrayLike, /) -> FloatArray:
        """Return ``(W - W_0)^T Y`` for Y of shape (m, p).

        Parameters
        ----------
        Y : array_like, shape (m, p)
            Block of vectors as columns.

        Returns
        -------
        ndarray, shape (n, p)
        """
        return to_host(self._values.T @ to_device(Y, self.dtype, self._values.device))

    def squared_norm(self) -> float:
        """Return ``||W - W_0||_F^2``, summed in float64."""
        return float(torch.sum(self._values.to(torch.float64).square()))


class ProductMatrix:
    """Operator ``A B - A_0 B_0`` for thin factors on any device; the matrix is never computed.

    Parameters
    ----------
    left, right : Tensor, shape (m, r) and (r, n)
        Factors A and B. Half precisions are read as float32.
    start : (Tensor, Tensor), optional
        Factors A_0 and B_0, of any inner size; zero by default.
    """

    def __init__(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        start: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.dtype = get_numpy_dtype(left.dtype)
        kind = get_torch_dtype(left.dtype)
        self._left, self._right = left.detach().to(kind), right.detach().to(kind)
        if start is not None:
            first, second = (tensor.detach().to(self._left) for tensor in start)
            self._left = torch.cat([self._left, -first], dim=1)
            self._right = torch.cat([self._right, second])
        self.shape = (int(left.shape[0]), int(right.shape[1]))

    def matmat(self, X: npt.ArrayLike, /) -> FloatArray:
        """Return ``M X`` for X of shape (n, p)."""
        return to_host(self._left @ (self._right @ to_device(X, self.dtype, self._left.device)))

    def rmatmat(self, Y: npt.ArrayLike, /) -> FloatArray:
        """Return ``M^T Y`` for Y of shape (m, p)."""
        return to_host(self._right.T @ (self._left.T @ to_device(Y, self.dtype, self._left.device)))

    def squared_norm(self) -> float:
        """Return ``||M||_F^2`` in float64, from the triangular factors of A and B; O((m + n) r^2)."""
        above = torch.linalg.qr(self._left.double(), mode="r")[1]
        below = torch.linalg.qr(self._right.T.double(), mode="r")[1]
        return float(torch.sum((above @ below.T).square()))
