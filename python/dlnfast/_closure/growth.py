# SPDX-License-Identifier: MIT
"""Growth of the active subspaces: from the target through the layers, until they are closed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .._problem.problem import Problem
from .._support.arrays import FloatArray, scale_of, widths_of
from .._support.dispatch import core
from .._support.products import multiply
from .isometry import rounding_tolerance

#: Largest ratio of the dimension of a subspace to that of the seeds. All settings that are known to close
#: need at most a ratio of 2.
MAX_GROWTH = 6
#: Smallest limit of the dimension; it replaces `MAX_GROWTH` for few seeds.
MIN_LIMIT = 64


class Growth:
    """Subspaces A_0 .. A_L that grow until they are closed.

    Vectors are rows here, as in the core.

    Parameters
    ----------
    problem : Problem
        Problem with the target and S.
    weights : sequence of ndarray
        ``W_1(0) .. W_L(0)``.
    limit : int
        Largest allowed dimension.
    inputs : ndarray, shape (d_0, k)
        Additional seeds at the input; may be empty.
    """

    def __init__(
        self, problem: Problem, weights: Sequence[FloatArray], limit: int, inputs: FloatArray
    ) -> None:
        self.problem = problem
        self.weights = weights
        self.dtype = weights[0].dtype
        self.tolerance = rounding_tolerance(self.dtype)
        self.widths = widths_of(weights)
        self._largest_width = max(self.widths)
        self.rows = [np.empty((0, d), dtype=self.dtype) for d in self.widths]
        # Uncertainty of each direction: rounding error, divided by the norm of the vector that it comes from.
        self.noise = [np.empty(0) for _ in self.widths]
        self.n_mapped = [0] * len(self.widths)  # number of rows of each node that the layers have mapped
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
        self.limit = min(limit, max(MAX_GROWTH * seeds, MIN_LIMIT))

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions a_0 .. a_L at present."""
        return tuple(len(rows) for rows in self.rows)

    def bases(self) -> list[FloatArray]:
        """Return A_l with orthonormal columns; the identity if A_l is the whole space.

        A_l is rotated within its span so that W_l(0) maps A_{l-1} to its first columns if the layer is a
        multiple of an isometry: then the cores are nearly diagonal, and have smaller rounding errors.
        """
        bases = [_refine_orthonormality(rows.T) for rows in self.rows]
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
                    bases[node] = _refine_orthonormality(bases[node] @ (left * signs))
        return bases

    def grow(self) -> bool:
        """Map new directions by the layers until there are none; return False beyond the limit."""
        last = len(self.widths) - 1
        order = [*range(last + 1), *range(last - 1, 0, -1)]
        # Only the neighbours of a node grow when its rows are mapped, so a sweep is linear in L.
        is_within = not any(self._is_too_large(node) for node in range(last + 1))
        while any(n_mapped < len(rows) for n_mapped, rows in zip(self.n_mapped, self.rows, strict=True)):
            for node in order:
                grown = self._map_new_rows(node)
                if not is_within or any(self._is_too_large(neighbour) for neighbour in grown):
                    return False
        return True

    def include_node(self, node: int) -> None:
        """Make the whole space of a node active."""
        self._add(node, np.eye(self.widths[node], dtype=self.dtype))

    def _is_too_large(self, node: int) -> bool:
        # The input or the output may be active as a whole: its complement is then empty.
        size, hidden = len(self.rows[node]), 0 < node < len(self.widths) - 1
        return size > self.limit and (hidden or size < self.widths[node] or size == self._largest_width)

    def _map_new_rows(self, node: int) -> Sequence[int]:
        """Map the new rows of a node, and return the nodes that may have grown."""
        start, end = self.n_mapped[node], len(self.rows[node])
        if start == end:
            return ()
        self.n_mapped[node] = end
        new_rows, noise = self.rows[node][start:end], self.noise[node][start:end]
        if node < len(self.weights):
            image = multiply(new_rows, self.weights[node], transpose_b=True)
            self._add_image(node + 1, image, node, noise)
        if node > 0:
            image = multiply(new_rows, self.weights[node - 1])
            self._add_image(node - 1, image, node - 1, noise)
        if node == 0 and self.gram is not None:
            self._add(0, multiply(new_rows, self.gram) / self.dtype.type(self.gram_norm), noise)
        return range(max(node - 1, 0), min(node + 2, len(self.widths)))

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
        # An image is as uncertain as its preimage: scale it down so that noise is below the tolerance.
        trust = np.minimum(1.0, self.tolerance / (64.0 * uncertain))
        block = np.ascontiguousarray(block * trust[:, None], dtype=self.dtype)
        basis = np.empty((len(rows) + k, rows.shape[1]), dtype=self.dtype)
        basis[: len(rows)] = rows
        found = np.zeros(k)
        n_new = core.extend_basis(basis, len(rows), block, self.tolerance, found)
        self.rows[node] = basis[: len(rows) + n_new]
        new_noise = float((trust * uncertain).max()) / found[:n_new]
        self.noise[node] = np.concatenate([self.noise[node], new_noise])


def _refine_orthonormality(basis: FloatArray) -> FloatArray:
    """Return the basis after a Newton step towards orthonormal columns, from errors of 1e-15 to 1e-16."""
    return np.ascontiguousarray(1.5 * basis - 0.5 * (basis @ (basis.T @ basis)))
