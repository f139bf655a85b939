# SPDX-License-Identifier: MIT
"""Layers as operators: W_l(0) however it is held, and W_l(t) of a reduced run without forming it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray, as_array, as_matrix, check_count
from .._support.products import multiply
from .certificate import Family

#: Entries of the largest array that implicit layers are revealed to.
_LARGEST_ARRAY = 10**8


class Layers(Protocol):
    """The initial layers W_1(0) .. W_L(0), of which only products are needed. Layers count from 1."""

    def apply(self, layer: int, X: FloatArray) -> FloatArray:
        """Return W_l X."""
        ...

    def apply_transpose(self, layer: int, Y: FloatArray) -> FloatArray:
        """Return W_l^T Y."""
        ...

    def dense(self, layer: int) -> FloatArray:
        """Return W_l as an array."""
        ...


class ExplicitLayers:
    """Layers held as arrays."""

    def __init__(self, weights: Sequence[FloatArray]) -> None:
        self.weights = tuple(weights)

    def apply(self, layer: int, X: FloatArray) -> FloatArray:
        """Return W_l X."""
        return multiply(self.weights[layer - 1], X)

    def apply_transpose(self, layer: int, Y: FloatArray) -> FloatArray:
        """Return W_l^T Y."""
        return multiply(self.weights[layer - 1], Y, transpose_a=True)

    def dense(self, layer: int) -> FloatArray:
        """Return W_l as an array."""
        return self.weights[layer - 1]


class Complement:
    """What is outside the active subspaces, and how its directions fall into families.

    At every node j = 0 .. L the vectors orthogonal to A_j are a sum of families (`Family`).
    A family's part of a vector is found by following it through isometries: what ends in a wide layer does
    not come through it, what begins in a tall one is not reached by its transpose.

    Parameters
    ----------
    layers : Layers
        W_l(0).
    bases : sequence of ndarray
        A_0 .. A_L.
    families : sequence of Family
        As the closure found them.
    gram_eigen : (ndarray, ndarray) or None
        Eigenvalues and eigenvectors of S, where families differ by an eigenvalue.
    """

    def __init__(
        self,
        layers: Layers,
        bases: Sequence[FloatArray],
        families: Sequence[Family],
        gram_eigen: tuple[FloatArray, FloatArray] | None,
    ) -> None:
        self.layers = layers
        self.bases = bases
        self.families = tuple(families)
        self.gram_eigen = gram_eigen
        self._rho = {
            layer: rho
            for family in self.families
            for layer, rho in zip(range(family.first, family.last + 1), family.rho, strict=True)
        }

    def outside(self, node: int, X: FloatArray) -> FloatArray:
        """Return the part of X orthogonal to A_j."""
        basis = self.bases[node]
        if basis.shape[1] == basis.shape[0]:
            return np.zeros_like(X)
        return X - basis @ (basis.T @ X)

    def split(self, node: int, X: FloatArray) -> dict[int, FloatArray]:
        """Return the parts of X, orthogonal to A_j, in the families at node j, by index."""
        here = [i for i, f in enumerate(self.families) if f.first - 1 <= node <= f.last]
        parts: dict[int, FloatArray] = {}
        rest = X
        for first in sorted({self.families[i].first for i in here}, reverse=True):
            # The layer before `first` is where these begin: only others come through it.
            survivors = self._there_and_back(node, first - 2, rest) if first > 1 else None
            group = [i for i in here if self.families[i].first == first]
            self._split_by_end(node, rest if survivors is None else rest - survivors, group, parts)
            if survivors is not None:
                rest = survivors
        return parts

    def _split_by_end(
        self, node: int, rest: FloatArray, group: list[int], parts: dict[int, FloatArray]
    ) -> None:
        """Split vectors whose families begin at the same layer."""
        ends = sorted({self.families[i].last for i in group})
        for end in ends:
            members = [i for i in group if self.families[i].last == end]
            if end < ends[-1]:
                # The layer after `end` lets the others through.
                survivors = self._there_and_back(node, end + 1, rest)
                parts[members[0]], rest = rest - survivors, survivors
            elif len(members) == 1:
                parts[members[0]] = rest
            else:
                at_input = self._carry(rest, node, 0)
                for i in members:
                    parts[i] = self._carry(self._in_eigenspace(at_input, self.families[i].coupling), 0, node)

    def _in_eigenspace(self, X: FloatArray, coupling: float) -> FloatArray:
        assert self.gram_eigen is not None
        values, vectors = self.gram_eigen
        chosen = np.abs(values - coupling) <= 2e-9 * values[-1]
        space = vectors[:, chosen].astype(X.dtype, copy=False)
        return self.outside(0, space @ (space.T @ X))

    def _there_and_back(self, node: int, other: int, X: FloatArray) -> FloatArray:
        return self._carry(self._carry(X, node, other), other, node)

    def _carry(self, X: FloatArray, node: int, other: int) -> FloatArray:
        """Carry vectors from one node to another by the layers' isometries."""
        while node < other:
            X = self.outside(node + 1, self._scaled(node + 1, self.layers.apply(node + 1, X)))
            node += 1
        while node > other:
            X = self.outside(node - 1, self._scaled(node, self.layers.apply_transpose(node, X)))
            node -= 1
        return X

    def _scaled(self, layer: int, X: FloatArray) -> FloatArray:
        rho = self._rho.get(layer, 0.0)
        return X / X.dtype.type(rho) if rho > 0 else np.zeros_like(X)


class LayerOperator:
    """W_l(t) of a reduced run: products, columns, rows and entries, without the d x d array.

    ``W_l(t) = A_l C_l(t) A_{l-1}^T + sum_f (rho_{f,l}(t) / rho_l(0)) D_l P_f``, where D_l is W_l(0) outside
    the active subspaces and P_f projects on a family.

    Attributes
    ----------
    shape : tuple of int
        (d_l, d_{l-1}).
    dtype : dtype
        Of the weights.
    """

    def __init__(
        self,
        complement: Complement,
        layer: int,
        core: FloatArray,
        core0: FloatArray,
        rho: Mapping[int, float],
    ) -> None:
        self._complement = complement
        self._layer = layer
        self._above, self._below = complement.bases[layer], complement.bases[layer - 1]
        self._core, self._core0 = core, core0
        self.shape = (self._above.shape[0], self._below.shape[0])
        self.dtype = core.dtype
        self._ratios = {}
        for i, value in rho.items():
            family = complement.families[i]
            start = family.rho[layer - family.first]
            self._ratios[i] = value / start if start > 0 else 0.0

    def __matmul__(self, X: npt.ArrayLike) -> FloatArray:
        """Return W_l(t) X for X of shape (d_{l-1},) or (d_{l-1}, k)."""
        return self._product(X, self.shape[1], self._apply)

    def apply(self, X: npt.ArrayLike) -> FloatArray:
        """Return W_l(t) X."""
        return self @ X

    def apply_transpose(self, Y: npt.ArrayLike) -> FloatArray:
        """Return W_l(t)^T Y for Y of shape (d_l,) or (d_l, k)."""
        return self._product(Y, self.shape[0], self._apply_transpose)

    def column(self, j: int) -> FloatArray:
        """Return column j, counted from 0."""
        return self @ self._unit(j, self.shape[1], "j")

    def row(self, i: int) -> FloatArray:
        """Return row i, counted from 0."""
        return self.apply_transpose(self._unit(i, self.shape[0], "i"))

    def entry(self, i: int, j: int) -> float:
        """Return the entry (i, j), counted from 0."""
        check_count(i, "i", minimum=0, maximum=self.shape[0] - 1)
        return float(self.column(j)[i])

    def dense(self) -> FloatArray:
        """Return W_l(t) as an array: O(d^2 a), or O(L d^3) where it has several families.

        Raises
        ------
        MemoryError
            If the layers are implicit and have more than `_LARGEST_ARRAY` entries.
        """
        if not isinstance(self._complement.layers, ExplicitLayers) and np.prod(self.shape) > _LARGEST_ARRAY:
            raise MemoryError(
                f"layer {self._layer} is {self.shape[0]} x {self.shape[1]} and is held as a law: ask for "
                "products, columns, rows or entries, run.layer(layer, step)"
            )
        ratios = set(self._ratios.values())
        if len(ratios) > 1:
            return self._apply(np.eye(self.shape[1], dtype=self.dtype))
        ratio = self.dtype.type(ratios.pop() if ratios else 0.0)
        update = multiply(self._above @ (self._core - ratio * self._core0), self._below, transpose_b=True)
        if ratio != 0:
            update += ratio * self._complement.layers.dense(self._layer)
        return update

    def _product(self, X: npt.ArrayLike, length: int, by: object) -> FloatArray:
        given = as_array(X, "X")
        block = as_matrix(
            given[:, None] if given.ndim == 1 else given, "X", shape=(length, None), dtype=self.dtype
        )
        result: FloatArray = by(block)  # type: ignore[operator]
        return result[:, 0] if given.ndim == 1 else result

    def _unit(self, index: int, length: int, name: str) -> FloatArray:
        unit = np.zeros(length, dtype=self.dtype)
        unit[check_count(index, name, minimum=0, maximum=length - 1)] = 1.0
        return unit

    def _apply(self, X: FloatArray) -> FloatArray:
        inside = self._below.T @ X
        result = self._above @ (self._core @ inside)
        if any(self._ratios.values()):
            rest = X - self._below @ inside
            result += self._complement.layers.apply(self._layer, self._weighted(rest))
        return result

    def _apply_transpose(self, Y: FloatArray) -> FloatArray:
        inside = self._above.T @ Y
        result = self._below @ (self._core.T @ inside)
        if any(self._ratios.values()):
            rest = self._complement.layers.apply_transpose(self._layer, Y - self._above @ inside)
            result += self._weighted(self._complement.outside(self._layer - 1, rest))
        return result

    def _weighted(self, rest: FloatArray) -> FloatArray:
        """Return the parts of vectors outside A_{l-1}, each family's times what its scalar has become."""
        values = set(self._ratios.values())
        if len(values) == 1:
            return rest * self.dtype.type(values.pop())
        total = np.zeros_like(rest)
        for i, part in self._complement.split(self._layer - 1, rest).items():
            if i in self._ratios:
                total += self.dtype.type(self._ratios[i]) * part
        return total
