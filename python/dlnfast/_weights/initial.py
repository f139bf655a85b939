# SPDX-License-Identifier: MIT
"""Initial weights W_1 .. W_L: orthogonal, Gaussian, uniform and aligned.

All are scaled alike: ``||W_l||_F = scale_l * sqrt(min(d_l, d_{l-1}))``, which an orthogonal layer has
exactly, so that runs from different distributions can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from .._problem.problem import Problem, check_problem
from .._support.arrays import FloatArray, check_flag, random_generator
from .._support.errors import ShapeError
from .._support.haar import haar, join_frames
from .implicit import ImplicitWeights
from .widths import Scale, check_distribution, check_widths


@overload
def orthogonal(
    widths: Sequence[int],
    scale: Scale = 1.0,
    seed: int = 0,
    *,
    implicit: Literal[False] = False,
    dtype: npt.DTypeLike = np.float64,
) -> list[FloatArray]: ...


@overload
def orthogonal(
    widths: Sequence[int],
    scale: Scale = 1.0,
    seed: int = 0,
    *,
    implicit: Literal[True],
    dtype: npt.DTypeLike = np.float64,
) -> ImplicitWeights: ...


def orthogonal(
    widths: Sequence[int],
    scale: Scale = 1.0,
    seed: int = 0,
    *,
    implicit: bool = False,
    dtype: npt.DTypeLike = np.float64,
) -> list[FloatArray] | ImplicitWeights:
    r"""Draw ``W_l = scale_l Q_l`` with Haar-distributed orthonormal columns or rows.

    Parameters
    ----------
    widths : sequence of int
        ``d_0, .., d_L``; layer l is ``d_l x d_{l-1}``.
    scale : float or sequence of float
        ``eps``, for all layers or one per layer.
    seed : int
        Layer l of a seed is the same whatever the other layers are.
    implicit : bool
        Return the law instead of arrays: layers of any width, of which nothing is drawn until it is asked
        for; see `ImplicitWeights`. The numbers differ from those of the same seed's arrays,
        the law does not.
    dtype : dtype
        float64 or float32.

    Returns
    -------
    list of ndarray, or ImplicitWeights
        ``W_1, .., W_L``.

    Raises
    ------
    ShapeError
        If there are fewer than two widths, or not one scale per layer.
    ValueError
        For a width below 1 or a negative scale.

    Notes
    -----
    The initialisation of the theorem (Yaras et al., arXiv 2306.01154, section 2). A QR factorisation
    per layer: O(d^3) time, one d x d temporary.

    Examples
    --------
    >>> import numpy as np
    >>> import dlnfast as dln
    >>> w1, w2 = dln.orthogonal([4, 4, 2], scale=0.5)
    >>> bool(abs(w1.T @ w1 - 0.25 * np.eye(4)).max() < 1e-15)
    True
    """
    if check_flag(implicit, "implicit"):
        return ImplicitWeights(widths, scale, seed, dtype=dtype)
    return _draw(
        widths,
        scale,
        dtype,
        lambda rows, cols, layer: haar(rows, cols, random_generator(seed, ("orthogonal", layer))),
    )


def gaussian(
    widths: Sequence[int], scale: Scale = 1.0, seed: int = 0, *, dtype: npt.DTypeLike = np.float64
) -> list[FloatArray]:
    """Draw Gaussian layers with the Frobenius norm of orthogonal ones; see `orthogonal`.

    Parameters
    ----------
    widths : sequence of int
        d_0 .. d_L.
    scale : float or sequence of float
        eps, for all layers or one per layer: ``||W_l||_F = eps sqrt(min(d_l, d_{l-1}))``.
    seed : int
        Not below 0. Equal seeds, widths and precisions give equal layers.
    dtype : dtype
        float64 or float32.

    Returns
    -------
    list of ndarray
        ``W_1 .. W_L``, W_l of shape (d_l, d_{l-1}).

    Raises
    ------
    ShapeError, TypeError, ValueError
        For widths, scales and seeds that are none.

    Notes
    -----
    Cost: O(sum_l d_l d_{l-1}).
    """
    return _draw_independent("gaussian", np.random.Generator.standard_normal, widths, scale, seed, dtype)


def uniform(
    widths: Sequence[int], scale: Scale = 1.0, seed: int = 0, *, dtype: npt.DTypeLike = np.float64
) -> list[FloatArray]:
    """Draw layers uniform on an interval around 0, with the norm of orthogonal ones; see `orthogonal`.

    Parameters
    ----------
    widths : sequence of int
        d_0 .. d_L.
    scale : float or sequence of float
        eps, for all layers or one per layer: ``||W_l||_F = eps sqrt(min(d_l, d_{l-1}))``.
    seed : int
        Not below 0. Equal seeds, widths and precisions give equal layers.
    dtype : dtype
        float64 or float32.

    Returns
    -------
    list of ndarray
        ``W_1 .. W_L``, W_l of shape (d_l, d_{l-1}).

    Raises
    ------
    ShapeError, TypeError, ValueError
        For widths, scales and seeds that are none.

    Notes
    -----
    Cost: O(sum_l d_l d_{l-1}).
    """

    def entries(generator: np.random.Generator, shape: tuple[int, int]) -> FloatArray:
        return generator.uniform(-1.0, 1.0, shape)

    return _draw_independent("uniform", entries, widths, scale, seed, dtype)


def aligned(
    problem: Problem,
    widths: Sequence[int],
    scale: Scale = 1.0,
    seed: int = 0,
    *,
    dtype: npt.DTypeLike = np.float64,
) -> list[FloatArray]:
    r"""Draw orthogonal layers that carry the target's right singular vectors to its left ones.

    The layers satisfy ``Q_{L:1} V = U`` for ``Phi = U diag(s) V^T``; on the complement they are
    independent Haar rotations. Training is then diagonal: r directions, each with its own scalar
    recursion (also called spectral initialisation; Saxe et al., arXiv 1312.6120).

    Parameters
    ----------
    problem : Problem
        Its target gives U and V; d_0 and d_L are its sizes.
    widths, scale, seed, dtype
        As for `orthogonal`. No width may be below the target's rank.

    Returns
    -------
    list of ndarray
        ``W_1 .. W_L``, W_l of shape (d_l, d_{l-1}).

    Raises
    ------
    ShapeError
        If the widths do not fit the problem or a layer is narrower than the target's rank.

    Notes
    -----
    Cost: O(L d^3), and the decomposition of Phi.
    """
    sizes = check_widths(widths)
    factors = check_problem(problem).target_factors()
    if (sizes[0], sizes[-1]) != (problem.dim_in, problem.dim_out):
        raise ShapeError(
            f"widths (d_0, .., d_L) go from {sizes[0]} to {sizes[-1]}; "
            f"the problem goes from {problem.dim_in} to {problem.dim_out}"
        )
    if min(sizes) < factors.rank:
        raise ShapeError(f"widths has {min(sizes)}, below the target's rank {factors.rank}")
    n_layers = len(sizes) - 1
    frames = [np.asarray(factors.V)]
    for layer in range(1, n_layers):
        frames.append(haar(sizes[layer], factors.rank, random_generator(seed, ("aligned frame", layer))))
    frames.append(np.asarray(factors.U))

    def layer_of(rows: int, cols: int, layer: int) -> FloatArray:
        generator = random_generator(seed, ("aligned", layer))
        n = min(rows, cols)
        left = _completed(frames[layer], n, generator)
        right = _completed(frames[layer - 1], n, generator)
        return left @ right.T

    return _draw(sizes, scale, dtype, layer_of)


def _completed(frame: FloatArray, n_columns: int, generator: np.random.Generator) -> FloatArray:
    """Return `frame` with orthonormal random columns added up to `n_columns`."""
    missing = n_columns - frame.shape[1]
    return join_frames(frame, generator.standard_normal((frame.shape[0], missing)))


def _draw(
    widths: Sequence[int],
    scale: Scale,
    dtype: npt.DTypeLike,
    law: Callable[[int, int, int], FloatArray],
) -> list[FloatArray]:
    sizes, scales, precision = check_distribution(widths, scale, dtype)
    return [
        np.ascontiguousarray(scales[i] * law(sizes[i + 1], sizes[i], i + 1), dtype=precision)
        for i in range(len(sizes) - 1)
    ]


def _draw_independent(
    name: str,
    entries: Callable[[np.random.Generator, tuple[int, int]], FloatArray],
    widths: Sequence[int],
    scale: Scale,
    seed: int,
    dtype: npt.DTypeLike,
) -> list[FloatArray]:
    """Draw layers of independent entries, rescaled to the norm of an orthogonal layer."""

    def law(rows: int, cols: int, layer: int) -> FloatArray:
        matrix = entries(random_generator(seed, (name, layer)), (rows, cols))
        return np.asarray(matrix * (np.sqrt(min(rows, cols)) / np.linalg.norm(matrix)))

    return _draw(widths, scale, dtype, law)
