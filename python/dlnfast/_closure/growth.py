# SPDX-License-Identifier: MIT
"""Subspaces that grow from the target through the layers until they are closed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .._problem.problem import Problem
from .._support.arrays import FloatArray, scale_of, widths_of
from .._support.dispatch import core
from .._support.products import multiply
from .isometry import rounding_tolerance

#: Growth is given up beyond this many times the dimension of the seeds (the settings known to close need at
#: most twice that), or `_LEAST_LIMIT` if that is more.
LARGEST_GROWTH = 6
LEAST_LIMIT = 64


class Growth:
    """Subspaces that grow until they are closed. Vectors are rows here, as in the core."""

    def __init__(
        self, problem: Problem, weights: Sequence[FloatArray], limit: int, inputs: FloatArray
    ) -> None:
        self.problem = problem
        self.weights = weights
        self.dtype = weights[0].dtype
        self.tolerance = rounding_tolerance(self.dtype)
        self.widths = widths_of(weights)
        self.rows = [np.empty((0, d), dtype=self.dtype) for d in self.widths]
        # How uncertain each direction is: rounding, divided by the length of what it was made from.
        self.noise = [np.empty(0) for _ in self.widths]
        self.sent = [0] * len(self.widths)  # how many rows of each node have gone to its neighbours
        self.norms = [scale_of(w) for w in weights]
        self.gram = None if problem.input_gram is None else problem.input_gram.astype(self.dtype, copy=False)
        eigen = problem.gram_eigen
        self.gram_norm = 1.0 if eigen is None else max(float(eigen[0][-1]), np.finfo(np.float64).tiny)
        factors = problem.target_factors()
        self._add(0, np.asarray(factors.V.T, dtype=self.dtype))
        self._add(len(self.widths) - 1, np.asarray(factors.U.T, dtype=self.dtype))
        if inputs.size:
            self._add(0, np.asarray(inputs.T, dtype=self.dtype))
        seeds = len(self.rows[0]) + len(self.rows[-1])
        self.limit = min(limit, max(LARGEST_GROWTH * seeds, LEAST_LIMIT))

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(len(rows) for rows in self.rows)

    def bases(self) -> list[FloatArray]:
        """Return A_l with orthonormal columns; the identity where A_l is everything.

        A_l is turned within its span so that W_l(0) carries A_{l-1} to its first columns, where the layer is
        a multiple of an isometry: then the cores are nearly diagonal, and rounded less.
        """
        bases = [_polished(rows.T) for rows in self.rows]
        for node, d in enumerate(self.widths):
            if bases[node].shape[1] == d:
                bases[node] = np.eye(d, dtype=self.dtype)
            elif node > 0 and 0 < bases[node - 1].shape[1] <= bases[node].shape[1]:
                image = bases[node].T @ multiply(self.weights[node - 1], bases[node - 1])
                left, right = np.linalg.qr(image, mode="complete")
                sizes = np.abs(np.diagonal(right))
                if sizes.min() > 0.5 * sizes.max():
                    signs = np.ones(left.shape[1], dtype=self.dtype)
                    signs[: len(sizes)] = np.where(np.diagonal(right) < 0, -1.0, 1.0)
                    bases[node] = _polished(bases[node] @ (left * signs))
        return bases

    def closes(self) -> bool:
        """Send new directions on until there are none; False if a subspace outgrows the limit."""
        last = len(self.widths) - 1
        order = [*range(last + 1), *range(last - 1, 0, -1)]
        while any(sent < len(rows) for sent, rows in zip(self.sent, self.rows, strict=True)):
            for node in order:
                self._send(node)
                if any(self._too_large(grown) for grown in range(last + 1)):
                    return False
        return True

    def capture(self, node: int) -> None:
        """Take the whole space of a node into its active subspace."""
        self._add(node, np.eye(self.widths[node], dtype=self.dtype))

    def _too_large(self, node: int) -> bool:
        # An end that is active as a whole is no obstacle: nothing of it is left to reduce.
        size, hidden = len(self.rows[node]), 0 < node < len(self.widths) - 1
        return size > self.limit and (hidden or size < self.widths[node] or size == max(self.widths))

    def _send(self, node: int) -> None:
        begin, end = self.sent[node], len(self.rows[node])
        if begin == end:
            return
        self.sent[node] = end
        fresh, noise = self.rows[node][begin:end], self.noise[node][begin:end]
        if node < len(self.weights):
            image = multiply(fresh, self.weights[node], transpose_b=True)
            self._add_image(node + 1, image, node, noise)
        if node > 0:
            image = multiply(fresh, self.weights[node - 1])
            self._add_image(node - 1, image, node - 1, noise)
        if node == 0 and self.gram is not None:
            self._add(0, multiply(fresh, self.gram) / self.dtype.type(self.gram_norm), noise)

    def _add_image(self, node: int, image: FloatArray, layer: int, noise: npt.NDArray[np.float64]) -> None:
        unit = self.norms[layer]
        if unit == 0 or not image.size:
            return
        longest = float(np.linalg.norm(image / self.dtype.type(unit), axis=1).max())
        self.norms[layer] = unit * max(longest, 1.0)
        self._add(node, image / self.dtype.type(self.norms[layer]), noise)

    def _add(self, node: int, block: FloatArray, noise: npt.NDArray[np.float64] | None = None) -> None:
        rows, k = self.rows[node], len(block)
        if k == 0 or len(rows) == rows.shape[1]:
            return
        eps = float(np.finfo(self.dtype).eps)
        uncertain = np.full(k, eps) if noise is None else np.maximum(noise, eps)
        # An image is known no better than its origin: what may be noise is pressed below the tolerance.
        trust = np.minimum(1.0, self.tolerance / (64.0 * uncertain))
        block = np.ascontiguousarray(block * trust[:, None], dtype=self.dtype)
        basis = np.empty((len(rows) + k, rows.shape[1]), dtype=self.dtype)
        basis[: len(rows)] = rows
        found = np.zeros(k)
        n_new = core.extend_basis(basis, len(rows), block, self.tolerance, found)
        self.rows[node] = basis[: len(rows) + n_new]
        fresh = float((trust * uncertain).max()) / found[:n_new]
        self.noise[node] = np.concatenate([self.noise[node], fresh])


def _polished(basis: FloatArray) -> FloatArray:
    """Return the basis after a Newton step towards orthonormal columns, 1e-15 -> 1e-16."""
    return np.ascontiguousarray(1.5 * basis - 0.5 * (basis @ (basis.T @ basis)))
