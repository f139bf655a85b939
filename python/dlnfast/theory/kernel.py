# SPDX-License-Identifier: MIT
"""The neural tangent kernel of a deep linear network, as a sum of Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray, as_layers, as_matrix, is_finite
from .._support.products import multiply


@dataclass(frozen=True)
class NeuralTangentKernel:
    r"""The kernel K = sum_l B_l (x) A_l of the end-to-end map W = W_{L:1}, as its 2 L factors.

    K maps a d_L x d_0 matrix D to sum_l B_l D A_l. Gradient flow moves the end-to-end map by
    dW/dt = -c K(W S - Phi), and for samples x, x' the kernel is sum_l (x^T A_l x') B_l.

    Attributes
    ----------
    left : tuple of ndarray, shape (d_L, d_L)
        B_l = W_{L:l+1} W_{L:l+1}^T for l = 1 .. L.
    right : tuple of ndarray, shape (d_0, d_0)
        A_l = W_{l-1:1}^T W_{l-1:1}.
    """

    left: tuple[FloatArray, ...]
    right: tuple[FloatArray, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (d_L, d_0) of the matrices that the kernel maps."""
        return len(self.left[0]), len(self.right[0])

    def apply(self, direction: npt.ArrayLike) -> FloatArray:
        """Return sum_l B_l D A_l.

        Parameters
        ----------
        direction : array_like, shape (d_L, d_0)
            D.

        Returns
        -------
        ndarray, shape (d_L, d_0)

        Raises
        ------
        ShapeError
            For a D of another shape.

        Notes
        -----
        Cost: O(L d^3).
        """
        matrix = as_matrix(direction, "direction", shape=self.shape, dtype=self.left[0].dtype, symbol="D")
        total = np.zeros_like(matrix)
        for left, right in zip(self.left, self.right, strict=True):
            total += multiply(multiply(left, matrix), right)
        return total

    def at(self, x: npt.ArrayLike, y: npt.ArrayLike) -> FloatArray:
        """Return the kernel between samples.

        Parameters
        ----------
        x : array_like, shape (d_0, m)
            Samples, one per column.
        y : array_like, shape (d_0, n)
            Samples, one per column.

        Returns
        -------
        ndarray, shape (m, n, d_L, d_L)
            sum_l (x_i^T A_l y_j) B_l, the derivative of the outputs at x_i times that at y_j, summed over all
            weights.

        Raises
        ------
        ShapeError
            For samples of another dimension.

        Notes
        -----
        Cost: O(L (d_0^2 n + m n (d_0 + d_L^2))).
        """
        dtype = self.left[0].dtype
        first = as_matrix(x, "x", shape=(self.shape[1], None), dtype=dtype)
        second = as_matrix(y, "y", shape=(self.shape[1], None), dtype=dtype)
        products = np.stack([first.T @ multiply(right, second) for right in self.right])
        found: FloatArray = np.einsum("lmn,lab->mnab", products, np.stack(self.left))
        return found

    def trace(self) -> float:
        """Return the trace, sum_l tr(B_l) tr(A_l).

        Returns
        -------
        float
        """
        return float(
            sum(np.trace(left) * np.trace(right) for left, right in zip(self.left, self.right, strict=True))
        )

    def inner(self, other: NeuralTangentKernel) -> float:
        """Return the Frobenius inner product with a kernel of the same shape.

        Parameters
        ----------
        other : NeuralTangentKernel
            Kernel of a network with the same d_0 and d_L, of any depth.

        Returns
        -------
        float
            sum_{l,m} <B_l, B'_m> <A_l, A'_m>.

        Raises
        ------
        TypeError, ValueError
            If `other` is no kernel, or one of another shape.

        Notes
        -----
        Cost: O(L^2 (d_0^2 + d_L^2)).
        """
        if not isinstance(other, NeuralTangentKernel):
            raise TypeError(f"other is {type(other).__name__}; wanted a NeuralTangentKernel")
        if other.shape != self.shape:
            raise ValueError(f"other has shape {other.shape}; wanted {self.shape}")
        lefts = _inner_products(self.left, other.left)
        return float(np.sum(lefts * _inner_products(self.right, other.right)))

    def alignment(self, other: NeuralTangentKernel) -> float:
        """Return the cosine between two kernels, 1 for multiples: constant during lazy training.

        Parameters
        ----------
        other : NeuralTangentKernel
            Kernel of the same shape, for example of the initial weights.

        Returns
        -------
        float
            Cosine in [0, 1].

        Raises
        ------
        TypeError, ValueError
            If `other` is no kernel, or one of another shape, or one of both is zero.
        """
        product = self.inner(other)
        size = math.sqrt(self.inner(self)) * math.sqrt(other.inner(other))
        if size == 0.0:
            raise ValueError("a kernel is zero, and has no angle to others")
        return min(product / size, 1.0)

    def dense(self) -> FloatArray:
        """Return the whole matrix, for vectorised D with rows one after the other (``D.ravel()``).

        Returns
        -------
        ndarray, shape (d_L d_0, d_L d_0)
            sum_l B_l (x) A_l: 8 (d_L d_0)^2 bytes.
        """
        size = self.shape[0] * self.shape[1]
        total = np.zeros((size, size), dtype=self.left[0].dtype)
        for left, right in zip(self.left, self.right, strict=True):
            total += np.kron(left, right)
        return total


def neural_tangent_kernel(weights: Sequence[npt.ArrayLike]) -> NeuralTangentKernel:
    r"""Return the neural tangent kernel of the end-to-end map of a deep linear network.

    .. math::
        K = \sum_{l=1}^L \left(W_{L:l+1} W_{L:l+1}^T\right) \otimes \left(W_{l-1:1}^T W_{l-1:1}\right).

    Parameters
    ----------
    weights : sequence of array_like
        W_1 .. W_L; of a run, ``run.all_weights(step)``, as `Trajectory.neural_tangent_kernel` does.

    Returns
    -------
    NeuralTangentKernel
        The kernel as 2 L factors. Its full matrix, of (d_L d_0)^2 entries, is never formed unless
        `NeuralTangentKernel.dense` asks for it.

    Raises
    ------
    ShapeError
        If the layers do not fit each other.
    TypeError
        If a layer is not numeric.
    ValueError
        If a product of the layers overflows.

    Notes
    -----
    The kernel is the Gram matrix of the derivatives of W_{L:1} with respect to all weights, because
    dW_{L:1} = sum_l W_{L:l+1} dW_l W_{l-1:1}. For white inputs it is also the kernel of the outputs on the
    data. Cost: O(L d^3), and L (d_0^2 + d_L^2) entries. Jacot, Gabriel, Hongler 2018, arXiv:1806.07572; for
    linear networks Braun, Domine, Fitzgerald, Saxe 2022, arXiv:2206.08740.

    Examples
    --------
    >>> import dlnfast as dln
    >>> kernel = dln.theory.neural_tangent_kernel(dln.orthogonal([4, 4, 2], scale=0.5))
    >>> kernel.shape, round(kernel.trace(), 12)  # 4 x 0.5 + 2 x 1
    ((2, 4), 4.0)
    """
    layers = as_layers(weights)
    below: list[FloatArray] = [np.eye(layers[0].shape[1], dtype=layers[0].dtype)]
    for layer in layers[:-1]:
        below.append(multiply(layer, below[-1]))
    above: list[FloatArray] = [np.eye(len(layers[-1]), dtype=layers[0].dtype)]
    for layer in reversed(layers[1:]):
        above.append(multiply(above[-1], layer))
    kernel = NeuralTangentKernel(
        left=tuple(multiply(matrix, matrix, transpose_b=True) for matrix in reversed(above)),
        right=tuple(multiply(matrix, matrix, transpose_a=True) for matrix in below),
    )
    if not all(is_finite(matrix) for matrix in (*kernel.left, *kernel.right)):
        raise ValueError("weights are so large that their products overflow")
    return kernel


def _inner_products(first: Sequence[FloatArray], second: Sequence[FloatArray]) -> FloatArray:
    """Return the Frobenius inner products of all pairs of matrices."""
    rows = [np.stack([np.ravel(matrix) for matrix in each]).astype(np.float64) for each in (first, second)]
    found: FloatArray = rows[0] @ rows[1].T
    return found
