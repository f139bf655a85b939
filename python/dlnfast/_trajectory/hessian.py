# SPDX-License-Identifier: MIT
"""The largest eigenvalues of the Hessian of the loss, and of the tangent kernel, from small blocks.

Let D_l be changes of the layers, R = W_{L:1} S - Phi, and S = F F^T. To second order the loss changes by

    c/2 ||sum_l W_{L:l+1} D_l W_{l-1:1} F||_F^2 + c sum_{l<k} <R, W_{L:k+1} D_k W_{k-1:l+1} D_l W_{l-1:1}>.

With chains as in `chains`, D_l has a block for every pair of chains: from chain h at node l-1 to chain g at
node l. The first term adds the squares of the pairs, because products stay within their chains and S is block
diagonal. In the second term R is block diagonal, so a block from h to g at layer k meets only blocks from g
to h. So the Hessian is an orthogonal sum of one problem for every unordered pair of chains, and for every
chain with itself. A pair of a chain of dimension a with a chain of numbers has at most 2 L a unknowns.
"""

from __future__ import annotations

import itertools

import numpy as np

from .._support.arrays import FloatArray
from .._support.eigenvalues import largest_eigenvalues
from .chains import Chain, DecoupledNetwork, Table, select_largest

#: Largest number of unknowns for which all eigenvalues are computed at once; otherwise the largest by
#: iteration.
DENSE_LIMIT = 256
#: Largest number of Lanczos steps of one start.
_MAX_ITERATIONS = 1000


def hessian_eigenvalues(network: DecoupledNetwork, loss_scale: float, k: int, tolerance: float) -> Table:
    """Return the k largest eigenvalues of the Hessian with respect to all weights, shape (R, k).

    Parameters
    ----------
    network : DecoupledNetwork
        The layers at R records.
    loss_scale : float
        c.
    k : int
        Number of eigenvalues, at most the number of weights.
    tolerance : float
        Relative error of eigenvalues that are computed by iteration.
    """
    active, others = network.chains[0], network.chains[1:]
    n_layers = network.n_layers
    n_own = sum(active.dim(node) * active.dim(node + 1) for node in range(n_layers))
    found: list[tuple[FloatArray, int]] = []
    if n_own:
        rows = []
        for record in range(active.n_records):
            own = _OwnHessian(active, record, loss_scale)
            rows.append(own.largest(min(k, n_own), tolerance))
        found.append((np.array(rows), 1))
    for i, g in enumerate(network.chains):
        for h in network.chains[max(i, 1) :]:
            count = g.multiplicity * h.multiplicity
            if g is h:
                found.append((np.linalg.eigvalsh(_self_block(g, n_layers, loss_scale)), g.multiplicity))
                count = g.multiplicity * (g.multiplicity - 1) // 2
            found.append((np.linalg.eigvalsh(_pair_block(g, h, n_layers, loss_scale)), count))
    assert all(chain.dims == (1,) * len(chain.dims) for chain in others)
    return select_largest(found, k)


class _OwnHessian:
    """The Hessian with respect to the layers of one chain from the inputs to the outputs, at one record."""

    def __init__(self, chain: Chain, record: int, loss_scale: float) -> None:
        last = chain.last
        self.c = loss_scale
        self.layers = [layer[record] for layer in chain.layers]
        assert chain.residual is not None
        assert chain.gram_factor is not None
        residual = chain.residual[record]
        factor = chain.gram_factor
        self.gram = None if _is_identity(factor) else factor @ factor.T
        #: W_{L:l+1} and W_{l-1:1}, for l = 1 .. L.
        self.above = [chain.product(node, last)[record] for node in range(1, last + 1)]
        self.below = [chain.product(0, node)[record] for node in range(last)]
        self.residual_below = [residual @ below.T for below in self.below]
        self.above_residual = [above.T @ residual for above in self.above]
        ends = np.cumsum([0, *(layer.size for layer in self.layers)]).tolist()
        self.size = ends[-1]
        self.spans = list(itertools.pairwise(ends))

    def product(self, vectors: FloatArray) -> FloatArray:
        """Return the products of the Hessian with vectors (.., n)."""
        before = vectors.shape[:-1]
        changes = [
            vectors[..., start:end].reshape(*before, *w.shape)
            for (start, end), w in zip(self.spans, self.layers, strict=True)
        ]
        n = len(changes)
        # Derivatives of W_{l-1:1} and of W_{L:l+1}.
        below: list[FloatArray | None] = [None]
        for layer in range(n):
            moved = changes[layer] @ self.below[layer]
            previous = below[-1]
            below.append(moved if previous is None else moved + self.layers[layer] @ previous)
        above: FloatArray | None = None
        moved = below[n]
        assert moved is not None
        if self.gram is not None:
            moved = moved @ self.gram
        result = np.empty_like(vectors)
        for layer in reversed(range(n)):
            total = self.above[layer].T @ (moved @ self.below[layer].T)
            if above is not None:
                total = total + above.swapaxes(-1, -2) @ self.residual_below[layer]
            inner = below[layer]
            if inner is not None:
                total = total + self.above_residual[layer] @ inner.swapaxes(-1, -2)
            start, end = self.spans[layer]
            result[..., start:end] = self.c * total.reshape(*before, -1)
            if layer:
                own = self.above[layer] @ changes[layer]
                above = own if above is None else above @ self.layers[layer] + own
        return result

    def largest(self, k: int, tolerance: float) -> FloatArray:
        """Return the k largest eigenvalues, descending."""
        if self.size <= DENSE_LIMIT:
            whole = self.product(np.eye(self.size))
            return np.linalg.eigvalsh((whole + whole.T) / 2)[::-1][:k]
        return largest_eigenvalues(self.product, self.size, k, tolerance, "sharpness", _MAX_ITERATIONS)


def _pair_block(g: Chain, h: Chain, n_layers: int, loss_scale: float) -> FloatArray:
    """Return the Hessian with respect to the blocks between a chain and one copy of a chain of numbers.

    The unknowns are vectors x_l, the blocks of D_l from h to g, and y_l, the transposed blocks from g to h.
    """
    layers = range(1, n_layers + 1)
    xs = [layer for layer in layers if h.has(layer - 1) and g.has(layer)]
    ys = [layer for layer in layers if g.has(layer - 1) and h.has(layer)]
    ends = np.cumsum([0, *(g.dim(layer) for layer in xs), *(g.dim(layer - 1) for layer in ys)]).tolist()
    spans = [slice(*pair) for pair in itertools.pairwise(ends)]
    span_x, span_y = dict(zip(xs, spans, strict=False)), dict(zip(ys, spans[len(xs) :], strict=True))
    all_x, all_y = slice(0, ends[len(xs)]), slice(ends[len(xs)], ends[-1])
    block = np.zeros((g.n_records, ends[-1], ends[-1]))
    if xs and h.gram_factor is not None and g.last == n_layers:
        jacobian = np.concatenate([g.product(i, n_layers) * h.product(0, i - 1) for i in xs], axis=2)
        coupling = float(np.sum(h.gram_factor**2))
        block[:, all_x, all_x] += coupling * (np.swapaxes(jacobian, 1, 2) @ jacobian)
    if ys and g.gram_factor is not None and h.last == n_layers:
        images = [h.product(i, n_layers) * (g.product(0, i - 1) @ g.gram_factor) for i in ys]
        jacobian = np.concatenate(images, axis=1)
        block[:, all_y, all_y] += jacobian @ np.swapaxes(jacobian, 1, 2)
    if g.residual is not None:
        for upper, lower in ((k, i) for k in xs for i in ys if i < k):
            error = np.swapaxes(g.product(upper, n_layers), 1, 2) @ g.residual
            error = error @ np.swapaxes(g.product(0, lower - 1), 1, 2)
            block[:, span_x[upper], span_y[lower]] += h.product(lower, upper - 1) * error
    if h.residual is not None:
        for upper, lower in ((k, i) for k in ys for i in xs if i < k):
            error = h.residual * h.product(upper, n_layers) * h.product(0, lower - 1)
            between = np.swapaxes(g.product(lower, upper - 1), 1, 2)
            block[:, span_x[lower], span_y[upper]] += error * between
    block[:, all_y, all_x] = np.swapaxes(block[:, all_x, all_y], 1, 2)
    return loss_scale * block


def _self_block(h: Chain, n_layers: int, loss_scale: float) -> FloatArray:
    """Return the Hessian with respect to the numbers of one copy of a chain of numbers."""
    size = h.last - h.first
    block = np.zeros((h.n_records, size, size))
    if h.residual is None or h.gram_factor is None:
        return block
    coupling = float(np.sum(h.gram_factor**2))
    #: Product of all numbers but that of each layer.
    others = [(h.product(i, n_layers) * h.product(0, i - 1))[:, 0, 0] for i in range(1, n_layers + 1)]
    for upper in range(1, n_layers + 1):
        block[:, upper - 1, upper - 1] = coupling * others[upper - 1] ** 2
        for lower in range(1, upper):
            between = h.product(upper, n_layers) * h.product(lower, upper - 1) * h.product(0, lower - 1)
            entry = coupling * others[upper - 1] * others[lower - 1] + (h.residual * between)[:, 0, 0]
            block[:, upper - 1, lower - 1] = block[:, lower - 1, upper - 1] = entry
    return loss_scale * block


def _is_identity(factor: FloatArray) -> bool:
    return factor.shape[0] == factor.shape[1] and bool(np.array_equal(factor, np.eye(len(factor))))
