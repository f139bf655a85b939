# SPDX-License-Identifier: MIT
"""Trained networks brought to the dimension that they use, with the error of it stated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .._problem.factors import split_layers
from .._support.arrays import (
    FloatArray,
    as_array,
    as_layers,
    as_matrix,
    check_count,
    check_flag,
    check_scale,
    is_finite,
    random_generator,
    widths_of,
)
from .._support.products import multiply
from .._trajectory.states import ActiveChain
from .._trajectory.trajectory import Trajectory

#: Random directions on which the rounding of the product is measured.
_N_PROBES: Final = 8
#: Entries of the longest stretch of a layer that is compared at once (32 MB in float64).
_STRETCH: Final = 2**22


@dataclass(frozen=True, eq=False, repr=False)
class CompressedNetwork:
    """A chain of thin layers whose product is the best approximation of its rank; see `compress`.

    ``list(result)`` are weights for `dlnfast.train` and for all else that takes layers.

    Attributes
    ----------
    layers : tuple of ndarray
        (k, d_0), then (k, k) for each inner layer, then (d_L, k): as many layers as before, but two for a
        single one.
    bases : tuple of ndarray, shape (d_l, k)
        A_0 .. A_L, orthonormal columns. A_0 and A_L hold the leading right and left singular vectors of
        W_{L:1}, so that the compressed product is ``A_L diag(singular_values[:k]) A_0^T``.
    rank : int
        k.
    widths : tuple of int
        d_0 .. d_L, of the network that was compressed.
    error, spectral_error : float
        Error of the product W_{L:1}: Frobenius norm, ``sqrt(sum_{i > k} sigma_i^2)``, and largest singular
        value, ``sigma_{k+1}``. No matrix of rank k has a smaller one.
    relative_error : float
        ``error / ||W_{L:1}||_F``.
    singular_values : ndarray, shape (min_l d_l,)
        All of W_{L:1} that can differ from zero, descending.
    resolution : float
        Bound on the rounding errors of `singular_values`, and so of the errors and of the layers' product.
    layer_errors : ndarray, shape (L,)
        ``||W_l - A_l A_l^T W_l A_{l-1} A_{l-1}^T||_F / ||W_l||_F``: the share of each layer that
        is removed, even if it had no effect on the output. A trained layer is often a multiple of an isometry
        outside the learned directions, so these can be near 1 where `relative_error` is tiny.
    n_parameters_before : int
        ``sum_l d_l d_{l-1}``.
    """

    layers: tuple[FloatArray, ...]
    bases: tuple[FloatArray, ...]
    rank: int
    widths: tuple[int, ...]
    error: float
    spectral_error: float
    relative_error: float
    singular_values: FloatArray
    resolution: float
    layer_errors: npt.NDArray[np.float64]
    n_parameters_before: int

    @property
    def n_parameters(self) -> int:
        """Numbers in the compressed layers: ``k (d_0 + d_L + (L - 2) k)``."""
        return sum(layer.size for layer in self.layers)

    def __iter__(self) -> Iterator[FloatArray]:
        """Return the layers one by one."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    def __repr__(self) -> str:
        """Return the sizes before and after and the error."""
        return (
            f"CompressedNetwork(rank {self.rank}, widths {list(self.widths)}, "
            f"{self.n_parameters_before} -> {self.n_parameters} parameters, "
            f"relative error {self.relative_error:.1e})"
        )

    def end_to_end(self) -> FloatArray:
        """Return the product of the layers, shape (d_L, d_0); O(d_L d_0 k)."""
        result = self.layers[0]
        for layer in self.layers[1:]:
            result = multiply(layer, result)
        return result

    def apply(self, X: npt.ArrayLike) -> FloatArray:
        """Return the outputs of the compressed network.

        Parameters
        ----------
        X : array_like, shape (d_0, N) or (d_0,)
            One sample per column, or a single sample.

        Returns
        -------
        ndarray, shape (d_L, N) or (d_L,)
            In the precision of the layers; ``2 N`` flops for each of the `n_parameters`.

        Raises
        ------
        TypeError, ShapeError, ValueError
            If X is not numeric, does not fit d_0, or is not finite.
        """
        inputs = as_array(X, "X")
        is_single = inputs.ndim == 1
        first = self.layers[0]
        block = as_matrix(
            inputs[:, None] if is_single else inputs, "X", shape=(first.shape[1], None), dtype=first.dtype
        )
        for layer in self.layers:
            block = multiply(layer, block)
        return block[:, 0] if is_single else block


def compress(
    weights: Sequence[npt.ArrayLike] | Trajectory,
    rank: int | None = None,
    tol: float | None = None,
    *,
    balanced: bool = False,
) -> CompressedNetwork:
    r"""Compress a trained linear network to the dimension that it uses.

    The layers are compressed as one product, W_L .. W_1, without activations or biases. In a network with
    these, compress each layer by itself, or use low-rank adapters.

    Parameters
    ----------
    weights : list of array_like, or Trajectory
        W_1 .. W_L, all float64 or all float32; or a run, whose last weights are compressed.
    rank : int, optional
        k, at most min(d_0, d_L).
    tol : float, optional
        Take the smallest k for which ``||W_{L:1} - result||_F <= tol ||W_{L:1}||_F``; in [0, 1). By default,
        with neither of the two, k is the numerical rank of W_{L:1}.
    balanced : bool
        Share the singular values among the layers, ``diag(s)^(1/L)`` in each, instead of the factors of the
        layers: ``W_{l+1}^T W_{l+1} = W_l W_l^T``, as after gradient descent from a small start.
        Use it to train the result further. The product is the same, but inner layers no longer act on the
        network's own features.

    Returns
    -------
    CompressedNetwork
        The thin layers, the subspaces that they act on, and the errors.

    Raises
    ------
    TypeError
        For layers that are not matrices of float32 or float64, or not all of one precision; for `rank` that
        is no integer.
    ShapeError
        For layers that do not fit each other.
    ValueError
        For values that are not finite, `rank` or `tol` out of range or both set, and a product that is
        zero, zero to rounding, or too large for its precision.
    MemoryError
        For a run with lazily sampled weights, if k exceeds the number of learned directions: choose a smaller
        `rank` or a larger `tol`.

    Notes
    -----
    With A_0 the k leading right singular vectors of ``W_{L:1} = W_L .. W_1``, and orthonormal A_l that span
    ``W_l .. W_1 A_0``, every layer maps the span of A_{l-1} into that of A_l. So the chain

        A_1^T W_1 A_0 A_0^T,  A_2^T W_2 A_1,  ..,  W_L A_{L-1}

    has the product ``W_{L:1} A_0 A_0^T``, the best approximation of rank k (Eckart and Young), and its errors
    are known: they are the singular values left out. The inner layers are triangular: A_l comes from the QR
    decomposition of ``W_l A_{l-1}``. Kwon et al. (arXiv 2311.05061) and Yaras et
    al. (arXiv 2406.04112) show that k is small after training; they compress before it, as
    `compressed_weights` does.

    k is never more than the narrowest layer or than the numerical rank, the number of singular values
    above `CompressedNetwork.resolution`, even if `rank` or `tol` asks for more: further
    directions are rounding errors. `CompressedNetwork.rank` is the final k. The resolution is the larger of
    ``max_l(d_l) eps sigma_1`` (the product of two such norms where a narrow layer splits the chain) and four
    times the rounding error of the product, measured on random vectors.

    Cost: the product, from the narrowest layer outwards, and a decomposition of its smaller side. Square
    layers: 2 (L - 1) d^3 flops, and a singular value decomposition of a d x d matrix, about 20 d^3. With a
    layer of width p < d: 2 L d^2 p, QR of two d x p factors and a decomposition of a p x p matrix; no d x d
    array. A reduced run whose active subspaces hold all of the result: O(d a k + L a^3) for active dimension
    a, at any width, also for a file saved without weights. Others are compressed as arrays.

    Examples
    --------
    >>> import dlnfast as dln
    >>> problem = dln.low_rank_recovery(dim=30, rank=3)
    >>> run = dln.train(problem, dln.orthogonal([30] * 4, scale=0.1), learning_rate=1.0, steps=3000)
    >>> small = dln.compress(run, tol=1e-3)
    >>> small
    CompressedNetwork(rank 3, widths [30, 30, 30, 30], 2700 -> 189 parameters, relative error 3.1e-04)
    >>> [layer.shape for layer in small]
    [(3, 30), (3, 3), (30, 3)]
    >>> more = dln.train(problem, list(small), learning_rate=1.0, steps=100)
    """
    check_flag(balanced, "balanced")
    if rank is not None and tol is not None:
        raise ValueError(f"rank is {rank!r} and tol is {tol!r}; wanted one of them, or neither")
    if isinstance(weights, Trajectory):
        wanted = _Wanted.from_arguments(rank, tol, (weights.widths[0], weights.widths[-1]))
        chain = weights.states.active_chain()
        found = None if chain is None else _compress_chain(chain, weights.widths, wanted)
        if found is None:
            found = _compress_layers(_last_weights(weights), wanted)
    else:
        layers = as_layers(weights, wanted="a list of matrices, W_1 .. W_L, or a Trajectory")
        wanted = _Wanted.from_arguments(rank, tol, (layers[0].shape[1], layers[-1].shape[0]))
        found = _compress_layers(layers, wanted)
    return found.network(balanced=bool(balanced))


class _Wanted(NamedTuple):
    """The requested size: a rank, a tolerance, or neither."""

    rank: int | None
    tol: float | None

    @classmethod
    def from_arguments(cls, rank: object, tol: object, ends: tuple[int, int]) -> _Wanted:
        if rank is not None:
            rank = check_count(rank, "rank (k)")
            if rank > min(ends):
                raise ValueError(
                    f"rank (k) is {rank}; wanted at most {min(ends)}, the smaller side of the "
                    f"{ends[1]} x {ends[0]} product"
                )
        if tol is not None:
            tol = check_scale(tol, "tol (relative error)", below=1.0)
        return cls(rank, tol)

    def rank_of(self, values: FloatArray, resolution: float) -> int:
        """Return k for these singular values."""
        numerical = int(np.sum(values > resolution))
        if numerical == 0:
            raise ValueError(
                f"weights have a product W_L .. W_1 that is zero to rounding: its largest singular value is "
                f"{values[0]:.1e}, and rounding may be {resolution:.1e}; wanted one to compress"
            )
        if self.rank is not None:
            return min(self.rank, numerical)
        if self.tol is not None:
            left_out = _tails(values)
            # Never 0: to leave out everything is a relative error of 1, and tol is below that.
            return min(int(np.argmax(left_out <= self.tol * left_out[0])), numerical)
        return numerical


class _Spectrum(NamedTuple):
    """The singular value decomposition of a product of layers."""

    left: FloatArray
    values: FloatArray
    right: FloatArray
    resolution: float


class _Parts(NamedTuple):
    """A compressed network: bases A_0 .. A_L, the layers between them, singular values and errors."""

    bases: list[FloatArray]
    inner: list[FloatArray]  # A_l^T W_l A_{l-1}; the last is W_L A_{L-1}
    values: FloatArray
    resolution: float
    layer_errors: list[float]

    def network(self, *, balanced: bool) -> CompressedNetwork:
        first, last = self.bases[0], self.bases[-1]
        rank = first.shape[1]
        n_layers = max(len(self.inner), 2)
        if balanced:
            share = np.asarray(self.values[:rank] ** (1 / n_layers), dtype=first.dtype)
            layers = [share[:, None] * first.T, *[np.diag(share)] * (n_layers - 2), last * share]
        elif len(self.inner) == 1:
            layers = [first.T, *self.inner]
        else:
            layers = [self.inner[0] @ first.T, *self.inner[1:]]
        left_out = _tails(self.values)
        widths = tuple(len(basis) for basis in self.bases)
        return CompressedNetwork(
            layers=tuple(np.array(layer, order="C") for layer in layers),
            bases=tuple(np.ascontiguousarray(basis) for basis in self.bases),
            rank=rank,
            widths=widths,
            error=float(left_out[rank]),
            spectral_error=float(self.values[rank]) if rank < len(self.values) else 0.0,
            relative_error=float(left_out[rank] / left_out[0]),
            singular_values=self.values,
            resolution=self.resolution,
            layer_errors=np.array(self.layer_errors),
            n_parameters_before=sum(a * b for a, b in pairwise(widths)),
        )


def _tails(values: FloatArray) -> npt.NDArray[np.float64]:
    """Return ``sqrt(sum_{i > k} sigma_i^2)`` for k = 0 .. n, the smallest added first."""
    largest = max(float(values[0]), np.finfo(np.float64).tiny)
    squares = np.square(values[::-1].astype(np.float64) / largest)
    return np.append(largest * np.sqrt(np.cumsum(squares))[::-1], 0.0)


# ------------------------------------------------------------------------------------------ layers as arrays


def _compress_layers(weights: Sequence[FloatArray], wanted: _Wanted) -> _Parts:
    spectrum = _spectrum(weights)
    rank = wanted.rank_of(spectrum.values, spectrum.resolution)
    bases, inner = _sweep(weights, spectrum, rank)
    errors = []
    for layer, weight in enumerate(weights):
        norm, departure = _measure_left_out(weight, bases, inner, layer)
        errors.append(departure / norm)
    return _Parts(bases, inner, spectrum.values, spectrum.resolution, errors)


def _spectrum(weights: Sequence[FloatArray]) -> _Spectrum:
    """Decompose W_{L:1}, with no array larger than the product of its narrowest layer with the widest."""
    above, below = split_layers(weights)
    dtype = weights[0].dtype
    for half in (above, below):
        if half is not None and not is_finite(half):
            raise ValueError(f"weights have a product W_L .. W_1 that is too large for {dtype}")
    left_basis, left = _triangle(above)
    right_basis, right = _triangle(None if below is None else below.T)
    if left is None or right is None:
        small = left if left is not None else np.asarray(right).T
    else:
        small = multiply(left, right, transpose_b=True)
    u, values, vt = np.linalg.svd(small)
    # Two factors that are large where their product is small leave their own rounding in it.
    size = float(values[0])
    if left is not None and right is not None:
        size = float(np.linalg.norm(left, 2)) * float(np.linalg.norm(right, 2))
    widest = max(widths_of(weights))
    rounding = widest * float(np.finfo(dtype).eps) * size
    return _Spectrum(
        u if left_basis is None else multiply(left_basis, u),
        values,
        vt.T if right_basis is None else multiply(right_basis, vt, transpose_b=True),
        max(rounding, 4 * _estimate_rounding(weights, above, below)),
    )


def _triangle(matrix: FloatArray | None) -> tuple[FloatArray | None, FloatArray | None]:
    """Return Q and R of a matrix that is taller than wide, None and itself of one that is not."""
    if matrix is None or matrix.shape[0] <= matrix.shape[1]:
        return None, matrix
    basis, triangle = np.linalg.qr(matrix)
    return basis, triangle


def _estimate_rounding(
    weights: Sequence[FloatArray], above: FloatArray | None, below: FloatArray | None
) -> float:
    """Estimate, in the Frobenius norm, how the product differs from the layers applied one by one.

    Where layers cancel each other, the rounding error of the product is that of the larger intermediate
    results, which the product itself does not show.
    """
    shape = (weights[0].shape[1], _N_PROBES)
    probes = random_generator(0, ("compress",)).standard_normal(shape).astype(weights[0].dtype)
    image = one_by_one = probes
    for half in (below, above):
        image = image if half is None else multiply(half, image)
    for weight in weights:
        one_by_one = multiply(weight, one_by_one)
    with np.errstate(over="ignore", invalid="ignore"):
        # E ||E g||^2 = ||E||_F^2 for Gaussian g.
        rounding = float(np.linalg.norm(image - one_by_one)) / float(np.sqrt(_N_PROBES))
    return rounding if np.isfinite(rounding) else 0.0  # probes may overflow where the product just does not


def _sweep(
    weights: Sequence[FloatArray], spectrum: _Spectrum, rank: int
) -> tuple[list[FloatArray], list[FloatArray]]:
    """Return A_0 .. A_L and the layers between them."""
    bases, inner = [np.ascontiguousarray(spectrum.right[:, :rank])], []
    for weight in weights[:-1]:
        basis, triangle = np.linalg.qr(multiply(weight, bases[-1]))
        bases.append(basis)
        inner.append(triangle)
    inner.append(multiply(weights[-1], bases[-1]))
    bases.append(spectrum.left[:, :rank])
    return bases, inner


def _measure_left_out(
    weight: FloatArray, bases: Sequence[FloatArray], inner: Sequence[FloatArray], layer: int
) -> tuple[float, float]:
    """Return ``||W||_F`` and ``||W - A_l A_l^T W A_{l-1} A_{l-1}^T||_F`` of layer 0 .. L - 1.

    A stretch of rows at a time. The difference of the squared norms would be faster and lose half the digits.
    """
    is_last = layer == len(inner) - 1
    image = inner[layer] if is_last else bases[layer + 1] @ inner[layer]  # A_l A_l^T W A_{l-1}
    scale = max(float(weight.max()), -float(weight.min()), np.finfo(np.float64).tiny)
    norm = departure = 0.0
    rows = max(1, _STRETCH // weight.shape[1])
    for begin in range(0, len(weight), rows):
        part = slice(begin, begin + rows)
        block = weight[part] / scale
        norm += float(np.sum(np.square(block), dtype=np.float64))
        block -= (image[part] / scale) @ bases[layer].T
        departure += float(np.sum(np.square(block), dtype=np.float64))
    return scale * float(np.sqrt(norm)), scale * float(np.sqrt(departure))


# ---------------------------------------------------------------------------------------------- reduced runs


def _compress_chain(chain: ActiveChain, widths: Sequence[int], wanted: _Wanted) -> _Parts | None:
    """Compress the cores and lift the result; None where the rank exceeds that of the cores.

    W_{L:1} is the product of the cores on the active subspaces, and outside of them one number for each
    family of directions that passes through all layers.
    """
    cores = [np.ascontiguousarray(core) for core in chain.cores]
    if min(min(core.shape) for core in cores) == 0:
        return None
    spectrum = _spectrum(cores)
    values = np.zeros(min(widths), dtype=spectrum.values.dtype)
    merged = np.concatenate([spectrum.values, *(np.full(m, value) for m, value in chain.through)])
    n_values = min(len(merged), len(values))  # the others are zero
    values[:n_values] = -np.sort(-merged)[:n_values]
    rounding = max(widths) * float(np.finfo(values.dtype).eps) * float(values[0])
    resolution = max(rounding, spectrum.resolution)
    rank = wanted.rank_of(values, resolution)
    # Equal values are taken from inside the active subspaces first.
    largest_outside = max((value for _, value in chain.through), default=0.0)
    if rank > int(np.sum(spectrum.values >= largest_outside)):
        return None
    inside, inner = _sweep(cores, spectrum, rank)
    errors = []
    for layer, core in enumerate(cores):
        norm, departure = _measure_left_out(core, inside, inner, layer)
        outside = chain.norms_outside[layer]
        errors.append(float(np.hypot(departure, outside) / np.hypot(norm, outside)))
    bases: list[FloatArray] = [np.asarray(A) @ B for A, B in zip(chain.bases, inside, strict=True)]
    inner[-1] = np.asarray(chain.bases[-1]) @ inner[-1]
    return _Parts(bases, inner, values, resolution, errors)


def _last_weights(run: Trajectory) -> list[FloatArray]:
    try:
        weights = run.all_weights()
    except MemoryError as error:
        raise MemoryError(
            "rank (k) reaches beyond the active subspaces of this run, whose weights are lazily sampled; "
            f"wanted a smaller rank or a larger tol, which retains only the learned directions ({error})"
        ) from None
    return as_layers(weights, wanted="a list of matrices, W_1 .. W_L, or a Trajectory")


__all__ = ["CompressedNetwork", "compress"]
