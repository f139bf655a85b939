# SPDX-License-Identifier: MIT
"""The complement of the active subspaces: its families and how far each layer is from an isometry there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .._problem.data import gram_resolution
from .._problem.problem import Problem
from .._support.arrays import FloatArray
from .._support.products import multiply
from .certificate import Family
from .growth import Growth
from .isometry import measure_isometry, rounding_tolerance


class Outside:
    """What is outside the active subspaces: which families there are, and how well they are families."""

    def __init__(self, problem: Problem, weights: Sequence[FloatArray], growth: Growth) -> None:
        self.problem = problem
        self.weights = weights
        self.growth = growth
        self.widths = growth.widths
        self.dims = [d - a for d, a in zip(self.widths, growth.dims, strict=True)]
        self.rho: list[float] = []
        self.departures: list[float] = []
        for layer in range(len(weights)):
            rho, departure = self._isometry(layer)
            self.rho.append(rho)
            self.departures.append(departure)

    def ends_to_capture(self) -> list[int]:
        """Return the ends whose layers are no isometries outside and that are small enough to take in."""
        last = len(self.weights)
        ends = []
        for node, layer in ((0, 0), (last, last - 1)):
            fails = self.departures[layer] > rounding_tolerance(self.growth.dtype)
            hidden = self.widths[1] if node == 0 else self.widths[last - 1]
            if fails and 0 < self.widths[node] < hidden and self.dims[node] > 0:
                ends.append(node)
        return ends

    def families(self) -> tuple[Family, ...]:
        """Return the families, those through all layers first; none where they do not exist."""
        spans = self.spans()
        if spans is None or self.gram_mixes:
            return ()
        last = len(self.weights)
        found: list[tuple[int, int, int, float]] = []
        for first, end, multiplicity in spans:
            if (first, end) == (1, last):
                found = [(first, end, m, s) for s, m in self._couplings(multiplicity)] + found
            else:
                found.append((first, end, multiplicity, 0.0))
        return tuple(Family(*family, tuple(self.rho[family[0] - 1 : family[1]])) for family in found)

    def spans(self) -> list[tuple[int, int, int]] | None:
        """Return the spans of the rest; see `spans_outside`."""
        return spans_outside(self.dims, self.rho)

    @property
    def gram_mixes(self) -> bool:
        """Whether S splits directions that run through the network together with others that end there."""
        spans = self.spans() or []
        last = len(self.weights)
        through = sum(m for first, end, m in spans if (first, end) == (1, last))
        return 0 < through < self.dims[0] and len(self._couplings(self.dims[0])) > 1

    def _couplings(self, through: int) -> list[tuple[float, int]]:
        """Return the eigenvalues of S outside A_0 with their multiplicities, for `through` directions."""
        eigen = self.problem.gram_eigen
        if through == 0:
            return []
        if eigen is None:
            return [(1.0, through)]
        values = eigen[0]
        rows = self.growth.rows[0].astype(np.float64)
        inside = np.linalg.eigvalsh(multiply(multiply(rows, self._gram()), rows, transpose_b=True))
        clusters = np.array(_gram_clusters(values))
        middles = clusters.mean(axis=1)
        # Each of those inside is one of S, to the precision of the rows.
        taken = np.argmin(np.abs(inside[:, None] - middles), axis=1)
        found = []
        for i, (low, high) in enumerate(clusters.tolist()):
            count = int(np.sum((values >= low) & (values <= high)) - np.sum(taken == i))
            if count > 0:
                counts = middles[i] > gram_resolution(self.problem.dim_in) * values[-1]
                found.append((float(middles[i]) if counts else 0.0, count))
        if len(found) == 1:
            return [(found[0][0], through)]
        return sorted(found, reverse=True)

    def _gram(self) -> FloatArray:
        assert self.problem.input_gram is not None
        return self.problem.input_gram

    def _isometry(self, layer: int) -> tuple[float, float]:
        """Return rho and ``||D^T D / rho^2 - I||_F / sqrt(m)`` of a layer D outside the active subspaces."""
        small = min(self.dims[layer], self.dims[layer + 1])
        if small == 0:
            return 0.0, 0.0
        weight, tall = self.weights[layer], self.dims[layer + 1] >= self.dims[layer]
        node = layer if tall else layer + 1
        return measure_isometry(weight, layer + 1, tall, self.growth.rows[node], self.growth.norms[layer])


def spans_outside(dims: Sequence[int], rho: Sequence[float]) -> list[tuple[int, int, int]] | None:
    """Return (first layer, last layer, multiplicity) of the rest; None where it has no such parts.

    A layer that is zero out there ends everything and begins anew. A tall layer begins a part of its own. A
    wide one ends as many directions as it is short of: all of them, or some of a single part. To end some
    of several parts at once would mix them (a bulge).

    Parameters
    ----------
    dims : sequence of int
        m_0 .. m_L, what the active subspaces leave of each node.
    rho : sequence of float
        The scalar of each layer out there.
    """
    parts, ended = [(1, dims[0])], []
    for layer in range(1, len(dims)):
        size, step = dims[layer], dims[layer] - dims[layer - 1]
        if rho[layer - 1] == 0.0:
            # Nothing comes through, and by symmetry nothing comes back.
            ended += [(first, layer - 1, m) for first, m in parts]
            parts = [(layer + 1, size)]
        elif step > 0:
            parts.append((layer + 1, step))
        elif step < 0 and (size == 0 or len(parts) == 1):
            ended += [(first, layer - 1, m if size == 0 else -step) for first, m in parts]
            parts = [] if size == 0 else [(parts[0][0], size)]
        elif step < 0:
            return None
    ended += [(first, len(rho), m) for first, m in parts]
    return sorted(
        ((first, end, m) for first, end, m in ended if m > 0 and first <= end),
        key=lambda span: span[:2] != (1, len(rho)),
    )


def _gram_clusters(values: FloatArray) -> list[tuple[float, float]]:
    """Return intervals that hold the eigenvalues of S, one for each number that they are equal to."""
    width = 1e-9 * float(values[-1])
    clusters: list[tuple[float, float]] = []
    for value in values.tolist():
        if clusters and value - clusters[-1][0] <= width:
            clusters[-1] = clusters[-1][0], value
        else:
            clusters.append((value, value))
    return clusters
