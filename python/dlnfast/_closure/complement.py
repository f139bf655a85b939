# SPDX-License-Identifier: MIT
"""Measurements of the complement of the active subspaces: isometry of each layer there, and families.

`operators.Complement` computes with the families that are found here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .._problem.data import gram_resolution
from .._problem.problem import Problem
from .._support.arrays import FloatArray
from .._support.products import multiply
from .family import Family
from .growth import Growth
from .isometry import measure_isometry, rounding_tolerance


class MeasuredComplement:
    """The complement of the active subspaces: its dimensions, the action of each layer on it, its families.

    Attributes
    ----------
    dims : list of int
        Dimensions m_0 .. m_L of the complement.
    rho : list of float
        Scalar of each layer on the complement.
    departures : list of float
        Distance of each layer from its scalar times an isometry, on the complement.
    """

    def __init__(self, problem: Problem, weights: Sequence[FloatArray], growth: Growth) -> None:
        self.problem = problem
        self.weights = weights
        self.growth = growth
        self.widths = growth.widths
        self.dims = [d - a for d, a in zip(self.widths, growth.dims, strict=True)]
        self.rho: list[float] = []
        self.departures: list[float] = []
        for layer in range(len(weights)):
            rho, departure = self._measure_layer(layer)
            self.rho.append(rho)
            self.departures.append(departure)

    def find_ends_to_include(self) -> list[int]:
        """Return the nodes, 0 or L, whose layer is no isometry on the complement but may be active whole."""
        last = len(self.weights)
        ends = []
        for node, layer in ((0, 0), (last, last - 1)):
            fails = self.departures[layer] > rounding_tolerance(self.growth.dtype)
            hidden = self.widths[1] if node == 0 else self.widths[last - 1]
            if fails and 0 < self.widths[node] < hidden and self.dims[node] > 0:
                ends.append(node)
        return ends

    def families(self) -> tuple[Family, ...]:
        """Return the families, those through all layers first; an empty tuple if there are none."""
        spans = self.spans()
        if spans is None or self.gram_mixes:
            return ()
        last = len(self.weights)
        found: list[tuple[int, int, int, float]] = []
        for first, end, multiplicity in spans:
            if (first, end) == (1, last):
                found = [(first, end, m, s) for s, m in self._find_couplings(multiplicity)] + found
            else:
                found.append((first, end, multiplicity, 0.0))
        return tuple(Family(*family, tuple(self.rho[family[0] - 1 : family[1]])) for family in found)

    def spans(self) -> list[tuple[int, int, int]] | None:
        """Return the spans of the complement; see `find_spans`."""
        return find_spans(self.dims, self.rho)

    @property
    def gram_mixes(self) -> bool:
        """Whether eigenspaces of S mix directions that run through all layers with directions that end."""
        spans = self.spans() or []
        last = len(self.weights)
        through = sum(m for first, end, m in spans if (first, end) == (1, last))
        return 0 < through < self.dims[0] and len(self._find_couplings(self.dims[0])) > 1

    def _find_couplings(self, through: int) -> list[tuple[float, int]]:
        """Return the eigenvalues of S outside A_0 with their multiplicities, for `through` directions."""
        eigen = self.problem.gram_eigen
        if through == 0:
            return []
        if eigen is None:
            return [(1.0, through)]
        values = eigen[0]
        rows = self.growth.rows[0].astype(np.float64)
        inside = np.linalg.eigvalsh(multiply(multiply(rows, self._gram()), rows, transpose_b=True))
        clusters = np.array(_cluster_eigenvalues(values))
        middles = clusters.mean(axis=1)
        # The eigenvalues of S within A_0 are eigenvalues of S, to the precision of the rows.
        taken = np.argmin(np.abs(inside[:, None] - middles), axis=1)
        found = []
        for i, (low, high) in enumerate(clusters.tolist()):
            count = int(np.sum((values >= low) & (values <= high)) - np.sum(taken == i))
            if count > 0:
                is_nonzero = middles[i] > gram_resolution(self.problem.dim_in) * values[-1]
                found.append((float(middles[i]) if is_nonzero else 0.0, count))
        if len(found) == 1:
            return [(found[0][0], through)]
        return sorted(found, reverse=True)

    def _gram(self) -> FloatArray:
        assert self.problem.input_gram is not None
        return self.problem.input_gram

    def _measure_layer(self, layer: int) -> tuple[float, float]:
        """Return rho and ``||D^T D / rho^2 - I||_F / sqrt(m)`` of a layer D on the complement."""
        small = min(self.dims[layer], self.dims[layer + 1])
        if small == 0:
            return 0.0, 0.0
        weight, tall = self.weights[layer], self.dims[layer + 1] >= self.dims[layer]
        node = layer if tall else layer + 1
        return measure_isometry(weight, layer + 1, tall, self.growth.rows[node], self.growth.norms[layer])


def find_spans(dims: Sequence[int], rho: Sequence[float]) -> list[tuple[int, int, int]] | None:
    """Return the parts (first layer, last layer, multiplicity) of the complement; None if it has none.

    A layer that is zero on the complement ends all parts, and new ones start after it. A layer with more rows
    than columns starts a new part. A layer with fewer rows than columns ends as many directions: all of them,
    or some of a single part. If several parts lost some directions, the layer would mix them (a bulge).

    Parameters
    ----------
    dims : sequence of int
        Dimensions m_0 .. m_L of the complement at each node.
    rho : sequence of float
        Scalar of each layer on the complement.
    """
    parts, finished = [(1, dims[0])], []
    for layer in range(1, len(dims)):
        size, step = dims[layer], dims[layer] - dims[layer - 1]
        if rho[layer - 1] == 0.0:
            # The layer and its transpose map the complement to 0.
            finished += [(first, layer - 1, m) for first, m in parts]
            parts = [(layer + 1, size)]
        elif step > 0:
            parts.append((layer + 1, step))
        elif step < 0 and (size == 0 or len(parts) == 1):
            finished += [(first, layer - 1, m if size == 0 else -step) for first, m in parts]
            parts = [] if size == 0 else [(parts[0][0], size)]
        elif step < 0:
            return None
    finished += [(first, len(rho), m) for first, m in parts]
    return sorted(
        ((first, end, m) for first, end, m in finished if m > 0 and first <= end),
        key=lambda span: span[:2] != (1, len(rho)),
    )


def _cluster_eigenvalues(values: FloatArray) -> list[tuple[float, float]]:
    """Group eigenvalues of S that are equal to rounding; return the smallest and largest of each group."""
    width = 1e-9 * float(values[-1])
    clusters: list[tuple[float, float]] = []
    for value in values.tolist():
        if clusters and value - clusters[-1][0] <= width:
            clusters[-1] = clusters[-1][0], value
        else:
            clusters.append((value, value))
    return clusters
