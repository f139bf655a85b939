# SPDX-License-Identifier: MIT
"""Layers as operators: W_l(0) as arrays or lazily sampled, and W_l(t) of a reduced run, never formed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray, as_array, as_matrix, check_count
from .._support.products import multiply
from .family import Family

#: Largest number of entries of an array that `LayerOperator.dense` samples.
_MAX_ENTRIES = 10**8


def check_sampled_size(layer: int, shape: tuple[int, int], instead: str) -> None:
    """Raise a MemoryError if a lazily sampled layer has more than `_MAX_ENTRIES` entries.

    `instead` says what the user should do.
    """
    if math.prod(shape) > _MAX_ENTRIES:
        raise MemoryError(f"layer {layer} is {shape[0]} x {shape[1]} and lazily sampled; {instead}")


class Layers(Protocol):
    """The initial layers W_1(0) .. W_L(0), accessed by products. Layers count from 1."""

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
    """Layers that are stored as arrays."""

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
    """The complement of the active subspaces, and its decomposition into families.

    At every node j = 0 .. L the complement of A_j is an orthogonal sum of families (`Family`). The component
    of a vector in a family is computed by applying layers there and back: families that end in a wide layer
    are mapped to 0 by it, families that start in a tall layer are mapped to 0 by its transpose.

    Parameters
    ----------
    layers : Layers
        W_l(0).
    bases : sequence of ndarray
        A_0 .. A_L.
    families : sequence of Family
        Families of the closure.
    gram_eigen : (ndarray, ndarray) or None
        Eigenvalues and eigenvectors of S, needed if families differ in their eigenvalue.
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

    def outside(self, node: int, X: FloatArray) -> FloatArray:
        """Return the component of X orthogonal to A_j."""
        basis = self.bases[node]
        if basis.shape[1] == basis.shape[0]:
            return np.zeros_like(X)
        return X - basis @ (basis.T @ X)

    def split(self, node: int, X: FloatArray) -> dict[int, FloatArray]:
        """Return the components of X, which is orthogonal to A_j, in the families at node j, by index."""
        present = [i for i, f in enumerate(self.families) if f.first - 1 <= node <= f.last]
        parts: dict[int, FloatArray] = {}
        remainder = X
        for first in sorted({self.families[i].first for i in present}, reverse=True):
            # These families start at the layer before `first`, whose transpose maps them to 0.
            passed = self._round_trip(node, first - 2, remainder) if first > 1 else None
            group = [i for i in present if self.families[i].first == first]
            self._split_by_end(node, remainder if passed is None else remainder - passed, group, parts)
            if passed is not None:
                remainder = passed
        return parts

    def _split_by_end(self, node: int, X: FloatArray, group: list[int], parts: dict[int, FloatArray]) -> None:
        """Split vectors whose families start at the same layer; write the components to `parts`."""
        ends = sorted({self.families[i].last for i in group})
        for end in ends:
            members = [i for i in group if self.families[i].last == end]
            if end < ends[-1]:
                # The layer after `end` maps the families that end there to 0.
                passed = self._round_trip(node, end + 1, X)
                parts[members[0]], X = X - passed, passed
            elif len(members) == 1:
                parts[members[0]] = X
            else:
                at_input = self._transport(X, node, 0)
                for i in members:
                    part = self._project_on_eigenspace(at_input, self.families[i].coupling)
                    parts[i] = self._transport(part, 0, node)

    def _project_on_eigenspace(self, X: FloatArray, coupling: float) -> FloatArray:
        assert self.gram_eigen is not None
        values, vectors = self.gram_eigen
        chosen = np.abs(values - coupling) <= 2e-9 * values[-1]
        space = vectors[:, chosen].astype(X.dtype, copy=False)
        return self.outside(0, space @ (space.T @ X))

    def _round_trip(self, node: int, other: int, X: FloatArray) -> FloatArray:
        """Transport vectors from one node to another and back."""
        return self._transport(self._transport(X, node, other), other, node)

    def _transport(self, X: FloatArray, node: int, other: int) -> FloatArray:
        """Map vectors from one node to another by the isometries of the layers between them."""
        while node < other:
            X = self.outside(node + 1, self._normalise(node + 1, self.layers.apply(node + 1, X)))
            node += 1
        while node > other:
            X = self.outside(node - 1, self._normalise(node, self.layers.apply_transpose(node, X)))
            node -= 1
        return X

    def _normalise(self, layer: int, X: FloatArray) -> FloatArray:
        """Divide images under a layer by its scalar."""
        rho = 0.0
        for family in self.families:  # all families of a layer have the same scalar at the start
            if family.first <= layer <= family.last:
                rho = family.rho[layer - family.first]
        return X / X.dtype.type(rho) if rho > 0 else np.zeros_like(X)


class LayerOperator:
    """W_l(t) of a reduced run: products, columns, rows and entries, without the d x d array.

    ``W_l(t) = A_l C_l(t) A_{l-1}^T + sum_f (rho_{f,l}(t) / rho_l(0)) D_l P_f``, where D_l is W_l(0) on the
    complement of the active subspaces and P_f is the projection on a family.

    Attributes
    ----------
    shape : tuple of int
        (d_l, d_{l-1}).
    dtype : dtype
        Precision of the weights.
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
        """Return W_l(t) as an array, in O(d^2 a), or in O(L d^3) if there are several families.

        Raises
        ------
        MemoryError
            If the weights are lazily sampled and the layer has more than `_MAX_ENTRIES` entries.
        """
        if not isinstance(self._complement.layers, ExplicitLayers):
            instead = "use products, columns, rows or entries of run.layer(layer, step)"
            check_sampled_size(self._layer, self.shape, instead)
        ratios = set(self._ratios.values())
        if len(ratios) > 1:
            return self._apply(np.eye(self.shape[1], dtype=self.dtype))
        ratio = self.dtype.type(ratios.pop() if ratios else 0.0)
        update = multiply(self._above @ (self._core - ratio * self._core0), self._below, transpose_b=True)
        if ratio != 0:
            update += ratio * self._complement.layers.dense(self._layer)
        return update

    def _product(self, X: npt.ArrayLike, length: int, by: object) -> FloatArray:
        array = as_array(X, "X")
        block = as_matrix(
            array[:, None] if array.ndim == 1 else array, "X", shape=(length, None), dtype=self.dtype
        )
        result: FloatArray = by(block)  # type: ignore[operator]
        return result[:, 0] if array.ndim == 1 else result

    def _unit(self, index: int, length: int, name: str) -> FloatArray:
        unit = np.zeros(length, dtype=self.dtype)
        unit[check_count(index, name, minimum=0, maximum=length - 1)] = 1.0
        return unit

    def _apply(self, X: FloatArray) -> FloatArray:
        inside = self._below.T @ X
        result = self._above @ (self._core @ inside)
        if any(self._ratios.values()):
            outside = X - self._below @ inside
            result += self._complement.layers.apply(self._layer, self._weight_families(outside))
        return result

    def _apply_transpose(self, Y: FloatArray) -> FloatArray:
        inside = self._above.T @ Y
        result = self._below @ (self._core.T @ inside)
        if any(self._ratios.values()):
            image = self._complement.layers.apply_transpose(self._layer, Y - self._above @ inside)
            result += self._weight_families(self._complement.outside(self._layer - 1, image))
        return result

    def _weight_families(self, X: FloatArray) -> FloatArray:
        """Multiply the component of X in each family by the ratio of its scalar to the initial scalar."""
        values = set(self._ratios.values())
        if len(values) == 1:
            return X * self.dtype.type(values.pop())
        total = np.zeros_like(X)
        for i, part in self._complement.split(self._layer - 1, X).items():
            if i in self._ratios:
                total += self.dtype.type(self._ratios[i]) * part
        return total
