# SPDX-License-Identifier: MIT
"""Random initial weights W_1 .. W_L: orthogonal, Gaussian, uniform and aligned.

All distributions have layers of the same norm, ``||W_l||_F = scale_l * sqrt(min(d_l, d_{l-1}))``, that of an
orthogonal layer, so that runs from different distributions can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal, overload

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
        Seed, non-negative. Layer l depends on the seed, on l and on its own sizes only.
    implicit : bool
        Whether to return lazily sampled weights instead of arrays: layers of any width, of which numbers are
        drawn only when they are needed; see `ImplicitWeights`. They have the same distribution as the arrays,
        but for the same seed the numbers differ.
    dtype : dtype
        float64 or float32.

    Returns
    -------
    list of ndarray, or ImplicitWeights
        ``W_1, .., W_L``.

    Raises
    ------
    ShapeError
        If there are fewer than two widths, or the number of scales is not 1 or L.
    ValueError
        If a width is below 1 or a scale is negative.
    MemoryError
        If the layers do not fit into memory; ``implicit=True`` needs no arrays of their size.

    Notes
    -----
    The initialisation of the theorem (Yaras et al., arXiv 2306.01154, section 2). Cost: a QR factorisation
    per layer, O(d^3) time and one d x d temporary.

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
    try:
        return _draw(
            widths,
            scale,
            dtype,
            lambda rows, cols, layer: haar(rows, cols, random_generator(seed, ("orthogonal", layer))),
        )
    except MemoryError as error:
        raise MemoryError(
            f"layers of width {max(widths)} do not fit into memory ({error}): implicit=True samples only the "
            "directions that a run needs"
        ) from None


def gaussian(
    widths: Sequence[int], scale: Scale = 1.0, seed: int = 0, *, dtype: npt.DTypeLike = np.float64
) -> list[FloatArray]:
    """Draw layers with Gaussian entries and the norm of orthogonal layers.

    Parameters
    ----------
    widths : sequence of int
        d_0 .. d_L.
    scale : float or sequence of float
        eps, for all layers or one per layer: ``||W_l||_F = eps sqrt(min(d_l, d_{l-1}))``.
    seed : int
        Seed, non-negative. Equal seeds, widths and precisions give equal layers.
    dtype : dtype
        float64 or float32.

    Returns
    -------
    list of ndarray
        ``W_1 .. W_L``, W_l of shape (d_l, d_{l-1}).

    Raises
    ------
    ShapeError, TypeError, ValueError
        For the reasons of `orthogonal`.

    Notes
    -----
    Cost: O(sum_l d_l d_{l-1}).
    """
    return _draw_independent("gaussian", np.random.Generator.standard_normal, widths, scale, seed, dtype)


def uniform(
    widths: Sequence[int], scale: Scale = 1.0, seed: int = 0, *, dtype: npt.DTypeLike = np.float64
) -> list[FloatArray]:
    """Draw layers with entries uniform on an interval around 0, and the norm of orthogonal layers.

    Parameters
    ----------
    widths : sequence of int
        d_0 .. d_L.
    scale : float or sequence of float
        eps, for all layers or one per layer: ``||W_l||_F = eps sqrt(min(d_l, d_{l-1}))``.
    seed : int
        Seed, non-negative. Equal seeds, widths and precisions give equal layers.
    dtype : dtype
        float64 or float32.

    Returns
    -------
    list of ndarray
        ``W_1 .. W_L``, W_l of shape (d_l, d_{l-1}).

    Raises
    ------
    ShapeError, TypeError, ValueError
        For the reasons of `orthogonal`.

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
    r"""Draw orthogonal layers that map the target's right singular vectors to its left ones.

    The layers satisfy ``Q_{L:1} V = U`` for ``Phi = U diag(s) V^T``; on the complement they are
    independent Haar rotations. Training is then diagonal: r directions, each with its own scalar
    recursion (also called spectral initialisation; Saxe et al., arXiv 1312.6120).

    Parameters
    ----------
    problem : Problem
        Problem whose target has the singular vectors U and V.
    widths : sequence of int
        ``d_0, .., d_L``; d_0 and d_L are the dimensions of the problem, and no width is below the rank of the
        target.
    scale, seed, dtype
        Same meaning as for `orthogonal`.

    Returns
    -------
    list of ndarray
        ``W_1 .. W_L``, W_l of shape (d_l, d_{l-1}).

    Raises
    ------
    ShapeError
        If the widths do not fit the problem, or one is below the rank of the target.

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

    def draw_layer(rows: int, cols: int, layer: int) -> FloatArray:
        generator = random_generator(seed, ("aligned", layer))
        n = min(rows, cols)
        left = _complete_frame(frames[layer], n, generator)
        right = _complete_frame(frames[layer - 1], n, generator)
        return left @ right.T

    return _draw(sizes, scale, dtype, draw_layer)


def _complete_frame(frame: FloatArray, n_columns: int, generator: np.random.Generator) -> FloatArray:
    """Extend `frame` by random columns to `n_columns` orthonormal columns."""
    missing = n_columns - frame.shape[1]
    return join_frames(frame, generator.standard_normal((frame.shape[0], missing)))


def _draw(
    widths: Sequence[int],
    scale: Scale,
    dtype: npt.DTypeLike,
    draw_layer: Callable[[int, int, int], FloatArray],
) -> list[FloatArray]:
    """Scale the matrices of ``draw_layer(rows, columns, layer)`` and convert them to the precision."""
    sizes, scales, precision = check_distribution(widths, scale, dtype)
    return [
        np.ascontiguousarray(scales[i] * draw_layer(sizes[i + 1], sizes[i], i + 1), dtype=precision)
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

    def draw_layer(rows: int, cols: int, layer: int) -> FloatArray:
        matrix = entries(random_generator(seed, (name, layer)), (rows, cols))
        return np.asarray(matrix * (np.sqrt(min(rows, cols)) / np.linalg.norm(matrix)))

    return _draw(widths, scale, dtype, draw_layer)


#: The distributions that need no problem, by their names in specifications and in `dlnfast.torch`.
DISTRIBUTIONS: Final[dict[str, Callable[..., list[FloatArray]]]] = {
    "orthogonal": orthogonal,
    "gaussian": gaussian,
    "uniform": uniform,
}
