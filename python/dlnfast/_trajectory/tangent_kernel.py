# SPDX-License-Identifier: MIT
"""`TrainKernel`: the neural tangent kernel over the training outputs, as factors of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray
from .._support.eigenvalues import largest_eigenvalues
from .chains import Chain, DecoupledNetwork, select_largest

#: Largest size of a block whose eigenvalues are all computed at once; otherwise by iteration.
_DENSE_LIMIT = 256
_MAX_ITERATIONS = 1000


class TrainKernel(NamedTuple):
    r"""The neural tangent kernel over the training outputs at the records, as factors of the layers.

    With the outputs ``f = W_{L:1} X`` and the inputs ``X``, sample by sample,

    .. math:: K = \sum_l \frac{\partial f}{\partial W_l} \frac{\partial f}{\partial W_l}^T
        = \sum_l P_l \otimes X^T Q_l X, \qquad
        P_l = W_{L:l+1} W_{L:l+1}^T, \quad Q_l = W_{l-1:1}^T W_{l-1:1} .

    Reduced runs have the factors inside the active subspaces, ``A_L^T P_l A_L`` and ``A_0^T Q_l A_0``, and
    their scalars on the directions outside. Whole layers have no directions outside.
    """

    #: P_l for l = 1 .. L, each of shape (n_records, a_L, a_L).
    left: tuple[FloatArray, ...]
    #: Q_l for l = 1 .. L, each of shape (n_records, a_0, a_0).
    right: tuple[FloatArray, ...]
    #: The scalars of P_l and of Q_l outside, each of shape (n_records, n_groups).
    left_outside: tuple[FloatArray, ...]
    right_outside: tuple[FloatArray, ...]
    #: Number of directions in each of these groups.
    left_multiplicities: npt.NDArray[np.int64]
    right_multiplicities: npt.NDArray[np.int64]
    #: (n_records, k), the k largest eigenvalues of K, descending.
    eigenvalues: FloatArray
    #: (n_records,), the trace of K.
    trace: FloatArray


def find_kernel(network: DecoupledNetwork, k: int, tolerance: float) -> TrainKernel:
    """Return the kernel at the records of a network, with its k largest eigenvalues.

    Parameters
    ----------
    network : DecoupledNetwork
        The layers at R records.
    k : int
        Number of eigenvalues, at most d_L d_0.
    tolerance : float
        Relative error of eigenvalues that are computed by iteration.
    """
    n_layers, widths = network.n_layers, network.widths
    outputs = [chain for chain in network.chains if chain.last == n_layers]
    inputs = [chain for chain in network.chains if chain.first == 0]
    left = [[_left_factor(chain, layer, n_layers) for layer in range(1, n_layers + 1)] for chain in outputs]
    right = [[_right_factor(chain, layer) for layer in range(1, n_layers + 1)] for chain in inputs]
    measured = [[_weigh(q, chain) for q in qs] for chain, qs in zip(inputs, right, strict=True)]
    found: list[tuple[FloatArray, int]] = []
    values: FloatArray
    trace = np.zeros(network.chains[0].n_records)
    n_known = 0
    for i, (g, ps) in enumerate(zip(outputs, left, strict=True)):
        for j, (h, qs) in enumerate(zip(inputs, measured, strict=True)):
            count = g.multiplicity * h.multiplicity
            if i or j:  # one of both is a number, and numbers are their own eigenvalues
                values = np.linalg.eigvalsh(sum(p * q for p, q in zip(ps, qs, strict=True)))
            else:
                values = _largest_of_products(ps, qs, k, tolerance)
            found.append((values, count))
            n_known += count * ps[0].shape[1] * qs[0].shape[1]
            trace += count * sum(_trace(p) * _trace(q) for p, q in zip(ps, qs, strict=True))
    n_zeros = widths[0] * widths[-1] - n_known
    found.append((np.zeros((len(trace), 1)), max(n_zeros, 0)))
    return TrainKernel(
        left=tuple(left[0]),
        right=tuple(right[0]),
        left_outside=_collect_scalars(left[1:], n_layers, len(trace)),
        right_outside=_collect_scalars(right[1:], n_layers, len(trace)),
        left_multiplicities=np.array([chain.multiplicity for chain in outputs[1:]], dtype=np.int64),
        right_multiplicities=np.array([chain.multiplicity for chain in inputs[1:]], dtype=np.int64),
        eigenvalues=select_largest(found, k),
        trace=trace,
    )


def join_kernels(parts: Sequence[TrainKernel]) -> TrainKernel:
    """Return the kernel at the records of several slices."""

    def join(name: str) -> tuple[FloatArray, ...]:
        return tuple(
            np.concatenate(arrays) for arrays in zip(*(getattr(p, name) for p in parts), strict=True)
        )

    return TrainKernel(
        left=join("left"),
        right=join("right"),
        left_outside=join("left_outside"),
        right_outside=join("right_outside"),
        left_multiplicities=parts[0].left_multiplicities,
        right_multiplicities=parts[0].right_multiplicities,
        eigenvalues=np.concatenate([part.eigenvalues for part in parts]),
        trace=np.concatenate([part.trace for part in parts]),
    )


def _left_factor(chain: Chain, layer: int, n_layers: int) -> FloatArray:
    if not chain.has(layer):
        return np.zeros((chain.n_records, chain.dims[-1], chain.dims[-1]))
    product = chain.product(layer, n_layers)
    return np.asarray(product @ np.swapaxes(product, 1, 2))


def _right_factor(chain: Chain, layer: int) -> FloatArray:
    if not chain.has(layer - 1):
        return np.zeros((chain.n_records, chain.dims[0], chain.dims[0]))
    product = chain.product(0, layer - 1)
    return np.asarray(np.swapaxes(product, 1, 2) @ product)


def _weigh(right: FloatArray, chain: Chain) -> FloatArray:
    """Return F^T Q F."""
    factor = chain.gram_factor
    assert factor is not None
    return np.asarray(factor.T @ right @ factor)


def _largest_of_products(
    left: Sequence[FloatArray], right: Sequence[FloatArray], k: int, tolerance: float
) -> FloatArray:
    """Return the largest eigenvalues of ``E -> sum_l P_l E Q_l``, for every record."""
    rows, columns = left[0].shape[1], right[0].shape[1]
    size = rows * columns
    found = np.empty((len(left[0]), min(k, size)))
    for record in range(len(found)):
        ps, qs = [p[record] for p in left], [q[record] for q in right]
        if size <= _DENSE_LIMIT:
            whole = sum(np.kron(p, q) for p, q in zip(ps, qs, strict=True))
            found[record] = np.linalg.eigvalsh(whole)[::-1][:k]
            continue

        def product(vector: FloatArray, ps: list[FloatArray] = ps, qs: list[FloatArray] = qs) -> FloatArray:
            matrix = vector.reshape(rows, columns)
            return np.asarray(sum(p @ matrix @ q for p, q in zip(ps, qs, strict=True))).ravel()

        found[record] = largest_eigenvalues(
            product, size, found.shape[1], tolerance, "tangent kernel", _MAX_ITERATIONS
        )
    return found


def _collect_scalars(
    factors: Sequence[Sequence[FloatArray]], n_layers: int, n_records: int
) -> tuple[FloatArray, ...]:
    """Return the scalars of several chains as columns, one array for each layer."""
    return tuple(
        np.stack([of_chain[layer][:, 0, 0] for of_chain in factors], axis=1)
        if factors
        else np.zeros((n_records, 0))
        for layer in range(n_layers)
    )


def _trace(stack: FloatArray) -> FloatArray:
    return np.asarray(np.trace(stack, axis1=1, axis2=2))
