# SPDX-License-Identifier: MIT
"""`DecoupledNetwork`: a network at some records as an orthogonal sum of chains of small matrices.

In suitable orthonormal bases of all nodes (inputs, hidden units, outputs) every layer is block diagonal. Each
block belongs to a chain from a first to a last node. The active subspaces are one chain, with the cores as
matrices; every direction of a family is a chain of numbers; and a direction that no layer passes on is a
chain of a single node. Whole layers are one chain without others. The target is zero outside of the first
chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray

Table = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chain:
    """Blocks of the layers between two nodes, at R records; `multiplicity` equal copies of it.

    Attributes
    ----------
    first, last : int
        First and last node, 0 .. L.
    multiplicity : int
        Number of copies.
    dims : tuple of int
        Dimension of the chain at its nodes.
    layers : sequence of ndarray, shape (R, dims[i + 1], dims[i])
        The blocks, in float64.
    gram_factor : ndarray, shape (dims[0], q), or None
        F with F F^T the block of S, if the chain begins at the inputs.
    residual : ndarray, shape (R, dims[-1], dims[0]), or None
        Block of W_{L:1} S - Phi, if the chain runs from the inputs to the outputs.
    """

    first: int
    last: int
    multiplicity: int
    dims: tuple[int, ...]
    layers: Sequence[FloatArray]
    n_records: int
    gram_factor: FloatArray | None = None
    residual: FloatArray | None = None
    _products: dict[tuple[int, int], FloatArray] = field(default_factory=dict, init=False, repr=False)

    def has(self, node: int) -> bool:
        """Return whether the chain runs through a node."""
        return self.first <= node <= self.last

    def dim(self, node: int) -> int:
        """Return the dimension at a node; 0 outside of the chain."""
        return self.dims[node - self.first] if self.has(node) else 0

    def layer(self, number: int) -> FloatArray:
        """Return the block of W_l, l counted from 1."""
        return self.layers[number - 1 - self.first]

    def product(self, start: int, end: int) -> FloatArray:
        """Return the block of W_{end:start+1}, which maps node `start` to node `end`; computed once."""
        if (start, end) not in self._products:
            found: FloatArray
            if start == end:
                found = np.broadcast_to(np.eye(self.dim(start)), (self.n_records, *2 * (self.dim(start),)))
            elif start + 1 == end:
                found = self.layer(end)
            else:
                found = self.layer(end) @ self.product(start, end - 1)
            self._products[start, end] = found
        return self._products[start, end]


@dataclass(frozen=True)
class DecoupledNetwork:
    """The chains of a network at some records.

    Attributes
    ----------
    widths : list of int
        d_0 .. d_L.
    chains : tuple of Chain
        The one that holds the target first, then chains of numbers.
    is_whole : bool
        Whether the only chain are the whole layers.
    """

    widths: Sequence[int]
    chains: tuple[Chain, ...]
    is_whole: bool = False

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.widths) - 1

    def through(self) -> list[Chain]:
        """Return the chains from the inputs to the outputs."""
        return [chain for chain in self.chains if (chain.first, chain.last) == (0, self.n_layers)]

    def end_to_end_singular_values(self, k: int) -> Table:
        """Return the k largest singular values of W_{L:1}, those of all through chains and zeros."""
        found: list[tuple[FloatArray, int]] = []
        for chain in self.through():
            values = np.linalg.svd(chain.product(0, self.n_layers), compute_uv=False)
            found.append((values, chain.multiplicity))
        n_all = min(self.widths[0], self.widths[-1])
        n_zeros = n_all - sum(values.shape[1] * count for values, count in found)
        found.append((np.zeros((self.chains[0].n_records, 1)), max(n_zeros, 0)))
        return select_largest(found, k)

    def balancedness(self) -> Table:
        """Return ``||W_{l+1}^T W_{l+1} - W_l W_l^T||_F`` for l = 1 .. L-1, a column each."""
        squares = np.zeros((self.chains[0].n_records, self.n_layers - 1))
        for node in range(1, self.n_layers):
            for chain in self.chains:
                if not chain.has(node):
                    continue
                size = chain.dim(node)
                difference = np.zeros((chain.n_records, size, size))
                if chain.has(node + 1):
                    above = chain.layer(node + 1)
                    difference += _transpose(above) @ above
                if chain.has(node - 1):
                    below = chain.layer(node)
                    difference -= below @ _transpose(below)
                squares[:, node - 1] += chain.multiplicity * np.sum(difference**2, axis=(1, 2))
        return np.asarray(np.sqrt(squares), dtype=np.float64)


def select_largest(found: Sequence[tuple[FloatArray, int]], k: int) -> Table:
    """Return the k largest of columns of values with multiplicities, in descending order, for each row."""
    columns = [np.repeat(values, min(count, k), axis=1) for values, count in found]
    return np.asarray(-np.sort(-np.concatenate(columns, axis=1), axis=1)[:, :k], dtype=np.float64)


def _transpose(stack: FloatArray) -> FloatArray:
    return np.swapaxes(stack, 1, 2)
