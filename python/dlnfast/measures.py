# SPDX-License-Identifier: MIT
"""Measures of features, of subspaces and of weights.

All of them compute in float64, whatever the precision of what comes in, and return Python floats or
float64 arrays. None returns NaN: where a measure has no value, `ValueError` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from . import reference as plain
from ._problem.problem import Problem, check_problem
from ._support.arrays import (
    FloatArray,
    as_array,
    as_list,
    as_matrix,
    as_vector,
    check_choice,
    check_count,
    check_scale,
    frobenius_norm,
    random_generator,
)
from ._support.errors import ShapeError

__all__ = [
    "SubspaceCosine",
    "balancedness",
    "compression",
    "discrimination",
    "effective_rank",
    "energy_share",
    "image_angles",
    "mode_strengths",
    "numerical_rank",
    "schatten_norm",
    "sharpness",
    "stable_rank",
    "subspace_angles",
    "subspace_cosine",
    "vector_angles",
]

#: Lanczos steps after which `sharpness` gives up.
_MOST_ITERATIONS = 300

# Features.


def compression(features: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    r"""Return the spread within classes relative to the spread between them, C_l = tr Sigma_W / tr Sigma_B.

    With the class means mu_k and the mean mu_G of all N samples,

    .. math::
        \Sigma_W = \frac1N \sum_k \sum_{i \in k} (z_i - \mu_k)(z_i - \mu_k)^T, \qquad
        \Sigma_B = \frac1K \sum_k (\mu_k - \mu_G)(\mu_k - \mu_G)^T .

    Small values mean collapsed classes. The measure does not change when all features are shifted, rotated
    or multiplied by one number.

    Parameters
    ----------
    features : (d, N) array_like
        Z_l, one column per sample.
    labels : (N,) array_like
        Class of each sample: numbers or strings, of at least two classes.

    Returns
    -------
    float
        C_l >= 0, without unit: 0 for one sample per class, infinity where the class means coincide.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    ValueError
        For values that are not finite, for a single class, and for features that do not vary at all.

    Notes
    -----
    Cost: O(d N) time; memory of one class at a time, and K d numbers for the means. arXiv:2306.01154 calls
    this ratio D_l, arXiv:2311.02960 calls it C_l.

    Examples
    --------
    >>> from dlnfast.measures import compression
    >>> round(compression([[0.0, 2.0, 9.0, 11.0]], ["a", "a", "b", "b"]), 12)
    0.049382716049
    """
    matrix, classes = _samples(features, labels)
    # The value does not depend on unit and origin. Origins among the samples, and among the means, let what
    # is the same for all of them cancel to exact zeros.
    unit = _largest(matrix)
    origin = matrix[:, :1].astype(np.float64) / unit
    within = 0.0
    means = []
    for members in classes.values():
        samples = matrix[:, members].astype(np.float64) / unit - origin
        first = samples[:, :1]
        mean = first + np.mean(samples - first, axis=1, keepdims=True)
        within += float(np.sum((samples - mean) ** 2))
        means.append(mean[:, 0])
    centres = np.stack(means, axis=1)
    centres -= centres[:, :1]
    sizes = np.array([len(members) for members in classes.values()])
    overall = centres @ sizes / matrix.shape[1]
    between = float(np.sum((centres - overall[:, np.newaxis]) ** 2))
    if between == 0.0:
        if within == 0.0:
            raise ValueError("features (Z) are the same for all samples: compression is 0 / 0")
        return float("inf")
    return float((within / matrix.shape[1]) / (between / len(classes)))


def discrimination(features: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    r"""Return how far apart the directions of the class means are, D_l = 1 - max_{k != k'} cos(mu_k, mu_k').

    The means are not centred. D_l is 0 where two class means share a direction, 1 where all are orthogonal,
    and at most K / (K - 1), reached by a simplex.

    Parameters
    ----------
    features : (d, N) array_like
        Z_l, one column per sample.
    labels : (N,) array_like
        Class of each sample: numbers or strings, of at least two classes.

    Returns
    -------
    float
        D_l in [0, 2], without unit; accurate where it is small, too.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    ValueError
        For values that are not finite, for a single class, and for a class whose mean is zero: it has no
        direction.

    Notes
    -----
    Cost: O(d N + d K^2) time, O(d K) memory beside one class at a time. Defined in arXiv:2311.02960.

    Examples
    --------
    >>> from dlnfast.measures import discrimination
    >>> discrimination([[1.0, 0.0], [0.0, 3.0]], [0, 1])
    1.0
    """
    matrix, classes = _samples(features, labels)
    unit = _largest(matrix)
    means = []
    for label, members in classes.items():
        means.append(np.mean(matrix[:, members].astype(np.float64) / unit, axis=1))
        if not means[-1].any():
            raise ValueError(f"features (Z): the mean of class {label!r} is zero and has no direction")
    directions = _unit_columns(np.stack(means, axis=1), "class means")
    # 1 - cos = ||a - b||^2 / 2 for unit vectors, without cancellation where the cosine is near 1.
    nearest = min(
        float(np.min(np.sum((directions[:, k + 1 :] - directions[:, k : k + 1]) ** 2, axis=0)))
        for k in range(len(means) - 1)
    )
    return nearest / 2


def _samples(
    features: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[FloatArray, dict[Any, npt.NDArray[np.intp]]]:
    """Return the features and, class by class, the columns that belong to it."""
    matrix = as_matrix(features, "features", symbol="Z")
    names = as_array(labels, "labels")
    if names.dtype == object and all(isinstance(label, str) for label in names.flat):
        names = names.astype(np.str_)  # as tables hold text
    if names.shape != (matrix.shape[1],):
        raise ShapeError(
            f"labels has shape {names.shape}; wanted one label per column of features, ({matrix.shape[1]},)"
        )
    if names.dtype.kind not in "biufUS":
        raise TypeError(f"labels has dtype {names.dtype}; wanted numbers or strings")
    if names.dtype.kind == "f" and not np.isfinite(names).all():
        raise ValueError("labels has a value that is not finite")
    unique, which = np.unique(names, return_inverse=True)
    if len(unique) < 2:
        raise ValueError(f"labels has a single class, {unique.tolist()[0]!r}; wanted at least two")
    order = np.argsort(which, kind="stable")
    columns = np.split(order, np.cumsum(np.bincount(which))[:-1])
    return matrix, dict(zip(unique.tolist(), columns, strict=True))


def _largest(matrix: FloatArray) -> float:
    """Return the largest magnitude as a unit, 1 if all entries are zero."""
    return max(float(np.max(matrix)), -float(np.min(matrix))) or 1.0


# Subspaces and vectors.


def subspace_angles(U: npt.ArrayLike, V: npt.ArrayLike) -> FloatArray:
    r"""Return the principal angles between two subspaces, in radians, ascending.

    Parameters
    ----------
    U, V : (d, p) and (d, q) array_like
        Bases, as linearly independent columns; made orthonormal here.

    Returns
    -------
    (min(p, q),) ndarray of float64
        Angles in [0, pi/2]; the last one is the largest.

    Raises
    ------
    ShapeError
        If the numbers of rows differ, or a matrix has more columns than rows.
    ValueError
        For values that are not finite and for linearly dependent columns.

    Notes
    -----
    Accurate to rounding everywhere: each angle comes from its cosine, a singular value of :math:`U^T V`, and
    its sine, one of :math:`(I - U U^T) V` (Bjorck and Golub, Math. Comp. 27, 1973). Cost: O(d (p + q)^2)
    time, O(d (p + q)) memory.

    Examples
    --------
    >>> from dlnfast.measures import subspace_angles
    >>> subspace_angles([[1.0], [0.0]], [[1.0], [1e-12]])
    array([1.e-12])
    """
    return plain.principal_angles(*_two_bases(U, V))


class SubspaceCosine(NamedTuple):
    """How well two subspaces agree: statistics of the cosines of their principal angles."""

    #: Cosine of the largest principal angle.
    minimum: float
    #: Mean cosine.
    mean: float
    #: Cosine of the smallest principal angle; near 1 already when one direction is shared.
    maximum: float
    #: ||U^T V||_F^2 / r, the mean squared cosine.
    overlap: float
    #: Expected `overlap` of a random subspace, max(p, q) / d.
    baseline: float


def subspace_cosine(U: npt.ArrayLike, V: npt.ArrayLike) -> SubspaceCosine:
    """Return the cosines of the principal angles between two subspaces, summarised, with a random baseline.

    Parameters
    ----------
    U, V : (d, p) and (d, q) array_like
        Bases, as linearly independent columns; made orthonormal here. Commonly p = q = r.

    Returns
    -------
    SubspaceCosine
        Named tuple ``(minimum, mean, maximum, overlap, baseline)``, with r = min(p, q) in the overlap
        ||U^T V||_F^2 / r. Its expectation for a uniformly random V, the baseline, is max(p, q) / d.

    Raises
    ------
    ShapeError
        If the numbers of rows differ, or a matrix has more columns than rows.
    ValueError
        For values that are not finite and for linearly dependent columns.

    Notes
    -----
    Cost: O(d (p + q)^2) time, O(d (p + q)) memory.

    Examples
    --------
    >>> from dlnfast.measures import subspace_cosine
    >>> subspace_cosine([[1.0], [0.0]], [[0.0], [2.0]]).overlap
    0.0
    """
    first, second = _two_bases(U, V)
    # Rounding puts cosines of shared directions up to an eps above 1.
    cosines = np.minimum(plain.singular_values(first.T @ second), 1.0)
    return SubspaceCosine(
        minimum=float(cosines[-1]),
        mean=float(np.mean(cosines)),
        maximum=float(cosines[0]),
        overlap=float(np.mean(cosines**2)),
        baseline=max(first.shape[1], second.shape[1]) / first.shape[0],
    )


def vector_angles(vectors: npt.ArrayLike, reference: npt.ArrayLike, rank: int) -> FloatArray:
    """Return k angles between two sets of singular vectors, in radians; the middle block shares one.

    The first r and the last r vectors are compared one by one, up to sign. Those between belong to one
    repeated singular value and are defined as a subspace only: each gets the largest principal angle
    between the two subspaces. (The figures of arXiv:2306.01154 are drawn this way.)

    Parameters
    ----------
    vectors, reference : (d, k) array_like
        Left or right singular vectors as orthonormal columns, in the order of descending singular values.
    rank : int
        r, how many vectors at either end stand alone. All do if 2 r >= k.

    Returns
    -------
    (k,) ndarray of float64
        Angles in [0, pi/2], accurate to rounding near 0 and near pi/2.

    Raises
    ------
    ShapeError
        If the shapes differ.
    ValueError
        For values that are not finite, a column of zeros, a negative rank.

    Notes
    -----
    Cost: O(d k) for the vectors and O(d (k - 2 r)^2) for the middle block; O(d r^2) in its place for
    complete sets, k = d.

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast.measures import vector_angles
    >>> vector_angles(np.eye(4), np.eye(4)[:, [0, 2, 1, 3]], rank=1)
    array([0., 0., 0., 0.])
    """
    ends = check_count(rank, "rank", minimum=0)
    current = _unit_columns(as_matrix(vectors, "vectors", dtype=np.float64), "vectors")
    initial = _unit_columns(
        as_matrix(reference, "reference", shape=current.shape, dtype=np.float64), "reference"
    )
    dim, count = current.shape
    if count < dim or 4 * ends >= dim or ends == 0:
        return plain.vector_angles(current, initial, ends)
    # Orthogonal complements make the same largest angle, and here the complement of the middle is smaller.
    angles = plain.angle(current, initial)
    outer = np.r_[:ends, count - ends : count]
    angles[ends : count - ends] = plain.principal_angles(current[:, outer], initial[:, outer])[-1]
    return angles


def _two_bases(U: npt.ArrayLike, V: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    first = as_matrix(U, "U", dtype=np.float64)
    second = as_matrix(V, "V", shape=(first.shape[0], None), dtype=np.float64)
    return _orthonormal(first, "U"), _orthonormal(second, "V")


def _orthonormal(matrix: FloatArray, name: str) -> FloatArray:
    """Return an orthonormal basis of the span of independent columns."""
    rows, columns = matrix.shape
    if columns > rows:
        raise ShapeError(f"{name} has shape {matrix.shape}; wanted no more columns than rows")
    basis, values, _ = np.linalg.svd(_unit_columns(matrix, name), full_matrices=False)
    rank = numerical_rank(values, shape=matrix.shape)
    if rank < columns:
        raise ValueError(f"{name} has linearly dependent columns: rank {rank}, wanted {columns}")
    return basis


def _unit_columns(matrix: FloatArray, name: str) -> FloatArray:
    """Return the columns divided by their norms, without overflow."""
    largest = np.max(np.abs(matrix), axis=0)
    if not largest.all():
        raise ValueError(f"{name} has a column of zeros, number {int(np.argmin(largest))}")
    scaled = matrix / largest
    return np.asarray(scaled / np.linalg.norm(scaled, axis=0))


def mode_strengths(problem: Problem, W: npt.ArrayLike) -> FloatArray:
    r"""Return how much of each mode of the target a matrix holds, :math:`u_i^T W v_i`.

    Parameters
    ----------
    problem : Problem
        Phi = sum_i sigma_i u_i v_i^T.
    W : (d_y, d_x) array_like
        The end-to-end matrix W_{L:1}.

    Returns
    -------
    (r,) ndarray of float64
        In the order of descending sigma_i, whatever the singular values of W; equal to sigma_i once learned.

    Raises
    ------
    ShapeError
        If W does not fit the problem.

    Notes
    -----
    Cost: O(d_y d_x r) beyond the target's decomposition. Where sigma_i repeats, only sums over the repeated
    ones are defined.

    Examples
    --------
    >>> from dlnfast import Problem
    >>> from dlnfast.measures import mode_strengths
    >>> mode_strengths(Problem([[3.0, 0.0], [0.0, 2.0]]), [[1.0, 9.0], [0.0, 2.5]])
    array([1. , 2.5])
    """
    factors = check_problem(problem).target_factors()
    matrix = as_matrix(W, "W", shape=(problem.dim_out, problem.dim_in), dtype=np.float64)
    return np.asarray(np.sum(factors.U * (matrix @ factors.V), axis=0))


# Ranks and norms.


def numerical_rank(
    matrix: npt.ArrayLike,
    kind: Literal["machine", "nuclear", "threshold"] = "machine",
    *,
    mass: float = 0.95,
    threshold: float = 0.05,
    shape: tuple[int, ...] | None = None,
) -> int:
    """Return the numerical rank, in one of three meanings.

    Parameters
    ----------
    matrix : (m, n) or (k,) array_like
        W, or its singular values in any order.
    kind : {"machine", "nuclear", "threshold"}
        "machine": the number of singular values above max(m, n) eps sigma_1, with the eps of the precision
        that `matrix` came in. "nuclear": the least number of singular values whose sum reaches the share
        `mass` of the nuclear norm. "threshold": the number of singular values above `threshold` sigma_1.
    mass : float
        Share for "nuclear", in (0, 1].
    threshold : float
        Relative threshold for "threshold", in [0, 1).
    shape : tuple of int, optional
        (m, n) for "machine", where singular values are given. Default: (k, k).

    Returns
    -------
    int
        The rank; 0 for zeros.

    Raises
    ------
    ValueError
        For an unknown kind, a level out of its range, values that are not finite, negative singular values.

    Notes
    -----
    Cost: one SVD without vectors, O(m n min(m, n)); O(k log k) from singular values. The three meanings
    differ widely on trained weights, so name the one that is reported.

    Examples
    --------
    >>> from dlnfast.measures import numerical_rank
    >>> [numerical_rank([1.0, 0.5, 0.01, 0.0], kind) for kind in ("machine", "nuclear", "threshold")]
    [3, 2, 2]
    """
    check_choice(kind, "kind", ("machine", "nuclear", "threshold"))
    share = check_scale(mass, "mass", strict=True, at_most=1.0)
    level = check_scale(threshold, "threshold", below=1.0)
    values, precision, matrix_shape = _spectrum(matrix)
    if values[0] == 0.0:
        return 0
    relative = values / values[0]
    if kind == "machine":
        return int(np.sum(relative > max(shape or matrix_shape) * precision))
    if kind == "nuclear":
        cumulative = np.cumsum(relative)
        return int(np.searchsorted(cumulative, share * cumulative[-1])) + 1
    return int(np.sum(relative > level))


def stable_rank(matrix: npt.ArrayLike) -> float:
    """Return ||W||_F^2 / ||W||_2^2, the squared singular values' sum in units of the largest.

    Parameters
    ----------
    matrix : (m, n) or (k,) array_like
        W, or its singular values.

    Returns
    -------
    float
        Between 1 and the rank; 0 for zeros.

    Raises
    ------
    ValueError
        For values that are not finite and negative singular values.

    Notes
    -----
    Cost: one SVD without vectors, O(m n min(m, n)); O(k) from singular values.

    Examples
    --------
    >>> from dlnfast.measures import stable_rank
    >>> stable_rank([[3.0, 0.0], [0.0, 3.0]])
    2.0
    """
    values, _, _ = _spectrum(matrix)
    return float(np.sum((values / values[0]) ** 2)) if values[0] > 0.0 else 0.0


def energy_share(matrix: npt.ArrayLike, k: int) -> float:
    r"""Return the share of ||W||_F^2 in the k largest singular values.

    .. math:: \sum_{i \le k} \sigma_i^2 \Big/ \sum_i \sigma_i^2

    Parameters
    ----------
    matrix : (m, n) or (p,) array_like
        W, or all its singular values.
    k : int
        How many; all of them where there are fewer.

    Returns
    -------
    float
        In [0, 1]; 0 for zeros, which have no energy.

    Raises
    ------
    ValueError
        For values that are not finite, negative singular values, k < 1.

    Notes
    -----
    Cost: one SVD without vectors, O(m n min(m, n)); O(p log p) from singular values. Of an n x n matrix with
    independent entries about 4 k / n, as long as k << n.

    Examples
    --------
    >>> from dlnfast.measures import energy_share
    >>> energy_share([3.0, 4.0, 0.0], 1)
    0.64
    """
    count = check_count(k, "k")
    values, _, _ = _spectrum(matrix)
    if values[0] == 0.0:
        return 0.0
    squares = (values / values[0]) ** 2
    return float(np.sum(squares[:count]) / np.sum(squares))


def image_angles(W: npt.ArrayLike, start: npt.ArrayLike, vectors: npt.ArrayLike) -> FloatArray:
    """Return how far the images of some vectors have turned: the angles between W v and W_0 v, in radians.

    0 along all directions that the change W - W_0 does not act on, whatever they are to W_0.

    Parameters
    ----------
    W, start : (m, n) array_like
        W and W_0.
    vectors : (n, p) array_like
        Columns v, of any length but 0.

    Returns
    -------
    (p,) ndarray of float64
        Angles of lines, in [0, pi/2], accurate to rounding near 0 and near pi/2; pi/2 where one of the two
        images is zero, 0 where both are.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    ValueError
        For values that are not finite.

    Notes
    -----
    Cost: O(m n p).

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast.measures import image_angles
    >>> image_angles([[1.0, 0.0], [1.0, 2.0]], np.eye(2), np.eye(2)) / np.pi
    array([0.25, 0.  ])
    """
    current = as_matrix(W, "W", dtype=np.float64)
    initial = as_matrix(start, "start", symbol="W_0", shape=current.shape, dtype=np.float64)
    columns = as_matrix(vectors, "vectors", shape=(current.shape[1], None), dtype=np.float64)
    # Directions do not depend on units: in these, neither products nor squares overflow or vanish.
    columns = _in_units(columns, axis=0)
    images = [_in_units(_in_units(matrix) @ columns, axis=0) for matrix in (current, initial)]
    lengths = [np.linalg.norm(image, axis=0) for image in images]
    lines = [image / np.where(length > 0, length, 1.0) for image, length in zip(images, lengths, strict=True)]
    angles = plain.angle(*lines)
    empty = [length == 0 for length in lengths]
    angles[empty[0] != empty[1]] = np.pi / 2
    angles[empty[0] & empty[1]] = 0.0
    return angles


def _in_units(matrix: FloatArray, axis: int | None = None) -> FloatArray:
    """Return the matrix, or each of its columns, times the power of two that brings it to size 1."""
    exponents = np.frexp(np.max(np.abs(matrix), axis=axis, initial=0.0))[1]
    return np.asarray(np.ldexp(matrix, -exponents))


def effective_rank(matrix: npt.ArrayLike) -> float:
    r"""Return :math:`\exp(-\sum_i p_i \log p_i)` with :math:`p_i = \sigma_i / \sum_j \sigma_j`.

    Parameters
    ----------
    matrix : (m, n) or (k,) array_like
        W, or its singular values.

    Returns
    -------
    float
        Between 1 and the rank, k for k equal singular values; 0 for zeros.

    Raises
    ------
    ValueError
        For values that are not finite and negative singular values.

    Notes
    -----
    Cost: one SVD without vectors, O(m n min(m, n)); O(k) from singular values. Roy and Vetterli, The
    effective rank: a measure of effective dimensionality, EUSIPCO 2007.

    Examples
    --------
    >>> from dlnfast.measures import effective_rank
    >>> round(effective_rank([2.0, 2.0, 2.0, 0.0]), 12)
    3.0
    """
    values, _, _ = _spectrum(matrix)
    if values[0] == 0.0:
        return 0.0
    relative = values[values > 0.0] / values[0]
    shares = relative / np.sum(relative)
    shares = shares[shares > 0.0]  # a subnormal share may round to 0, whose p log p is 0
    return float(np.exp(-np.sum(shares * np.log(shares))))


def schatten_norm(matrix: npt.ArrayLike, p: float) -> float:
    r"""Return :math:`(\sum_i \sigma_i^p)^{1/p}`: nuclear norm for p = 1, Frobenius for 2.

    Parameters
    ----------
    matrix : (m, n) or (k,) array_like
        W, or its singular values.
    p : float
        Above 0; infinity stands for the spectral norm. Below 1 it is a quasi-norm.

    Returns
    -------
    float
        The norm, in the unit of W.

    Raises
    ------
    ValueError
        For p <= 0 or NaN, for values that are not finite and negative singular values.

    Notes
    -----
    Cost: one SVD without vectors, O(m n min(m, n)); O(k) from singular values.

    Examples
    --------
    >>> from dlnfast.measures import schatten_norm
    >>> schatten_norm([3.0, 4.0], 1)
    7.0
    """
    values, _, _ = _spectrum(matrix)
    largest = float(values[0])
    if isinstance(p, float) and p == np.inf:
        return largest
    exponent = check_scale(p, "p", strict=True)
    if largest == 0.0:
        return 0.0
    with np.errstate(over="ignore", under="ignore"):
        norm = float(largest * np.sum((values / largest) ** exponent) ** (1 / exponent))
    if not np.isfinite(norm):
        raise ValueError(f"p is {exponent:g}, for which the norm of this matrix overflows")
    return norm


def balancedness(weights: Iterable[npt.ArrayLike]) -> FloatArray:
    r"""Return how far neighbouring layers are from balance, :math:`\|W_{l+1}^T W_{l+1} - W_l W_l^T\|_F`.

    Gradient flow without weight decay conserves each of these differences; descent changes them by
    O(learning rate).

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) array_like
        W_1 .. W_L.

    Returns
    -------
    (L - 1,) ndarray of float64
        One number for each pair of layers (l, l + 1).

    Raises
    ------
    ShapeError
        If neighbouring shapes do not fit, or there is no layer.
    ValueError
        For values that are not finite.

    Notes
    -----
    Cost: O(d_l^2 (d_{l-1} + d_{l+1})) time and O(d_l^2) memory for each pair.

    Examples
    --------
    >>> from dlnfast.measures import balancedness
    >>> balancedness([[[2.0]], [[1.0]]])
    array([3.])
    """
    layers = _double_layers(weights)
    pairs = zip(layers[1:], layers[:-1], strict=True)
    return np.array([_imbalance(above, below) for above, below in pairs])


def _imbalance(above: FloatArray, below: FloatArray) -> float:
    """Return ``||A^T A - B B^T||_F``, infinity where it overflows, in units in which no square does."""
    exponent = int(np.frexp(max(frobenius_norm(above), frobenius_norm(below)))[1])
    above, below = np.ldexp(above, -exponent), np.ldexp(below, -exponent)
    with np.errstate(over="ignore", under="ignore"):
        return float(np.ldexp(np.linalg.norm(above.T @ above - below @ below.T), 2 * exponent))


# The landscape.


def sharpness(problem: Problem, weights: Sequence[npt.ArrayLike], *, tolerance: float = 1e-6) -> float:
    r"""Return the largest eigenvalue of the Hessian of the loss, over all entries of all layers.

    Gradient descent is stable around a minimum only where it is below 2 / eta.

    Parameters
    ----------
    problem : Problem
        S, Phi and c.
    weights : sequence of (d_l, d_{l-1}) array_like
        W_1 .. W_L.
    tolerance : float
        Relative error at which to stop; rounding allows about 1e-12.

    Returns
    -------
    float
        The largest eigenvalue; negative at a maximum.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    ValueError
        For values that are not finite, and where 300 iterations do not reach the tolerance.

    Notes
    -----
    Lanczos iteration with full reorthogonalisation on exact Hessian-vector products, from a fixed random
    start; commonly 20 to 60 of them, each of about 3 gradients, and as many vectors of the size of all
    weights in memory. (Lanczos meets an eigenvalue that its start does not contain only through rounding.)

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast import Problem
    >>> from dlnfast.measures import sharpness
    >>> round(sharpness(Problem(np.diag([8.0, 1.0])), [np.diag([2.0, 1.0])] * 3), 6)  # 3 * 8^(4/3)
    48.0
    """
    limit = check_scale(tolerance, "tolerance", strict=True)
    layers = _double_layers(weights, check_problem(problem).dim_in)
    if layers[-1].shape[0] != problem.dim_out:
        raise ShapeError(
            f"weights end with {layers[-1].shape[0]} rows; wanted {problem.dim_out} rows, problem.dim_out"
        )
    target, gram, loss_scale = problem.dense_target(), problem.input_gram, problem.loss_scale
    sizes = np.cumsum([layer.size for layer in layers])[:-1]

    def product(vector: FloatArray) -> FloatArray:
        parts = np.split(vector, sizes)
        directions = [part.reshape(w.shape) for part, w in zip(parts, layers, strict=True)]
        changes = plain.hessian_product(layers, directions, target, gram, loss_scale)
        return np.concatenate([change.ravel() for change in changes])

    return _largest_eigenvalue(product, sum(layer.size for layer in layers), limit)


def _largest_eigenvalue(product: Callable[[FloatArray], FloatArray], size: int, tolerance: float) -> float:
    """Return the largest eigenvalue of a symmetric operator on vectors of this size."""
    vector: FloatArray = random_generator(0, ("sharpness",)).standard_normal(size)
    basis = np.empty((min(size, _MOST_ITERATIONS), size))
    diagonal: list[float] = []
    below: list[float] = []
    for step in range(len(basis)):
        basis[step] = vector / np.linalg.norm(vector)
        vector = product(basis[step])
        diagonal.append(float(basis[step] @ vector))
        for _ in range(2):  # twice is enough
            vector = vector - basis[: step + 1].T @ (basis[: step + 1] @ vector)
        length = float(np.linalg.norm(vector))
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(below, -1) + np.diag(below, 1))
        scale = max(abs(float(values[0])), abs(float(values[-1])))
        # An eigenvalue lies within the residual of the Ritz value; it is wrong by no more than that.
        if step + 1 == size or length * abs(float(vectors[-1, -1])) <= tolerance * scale:
            return float(values[-1])
        below.append(length)
    raise ValueError(f"tolerance is {tolerance:g}: not reached after {len(basis)} iterations")


def _double_layers(weights: Iterable[npt.ArrayLike], columns: int | None = None) -> list[FloatArray]:
    """Return W_1 .. W_L as float64 matrices that follow on each other."""
    layers: list[FloatArray] = []
    for number, weight in enumerate(as_list(weights, "weights", "a list of matrices, W_1 .. W_L"), start=1):
        shape = (None, layers[-1].shape[0] if layers else columns)
        name, symbol = f"weights[{number - 1}]", f"W_{number}"
        layers.append(as_matrix(weight, name, shape=shape, dtype=np.float64, symbol=symbol))
    if not layers:
        raise ShapeError("weights is empty; wanted at least one layer")
    return layers


def _spectrum(matrix: npt.ArrayLike) -> tuple[FloatArray, float, Sequence[int]]:
    """Return the singular values, descending, the machine eps of the input and its shape."""
    held = as_array(matrix, "matrix (W)")
    if held.ndim == 2:
        array = as_matrix(held, "matrix", symbol="W")
        precision = float(np.finfo(array.dtype).eps)
        return plain.singular_values(array.astype(np.float64)), precision, array.shape
    given = as_vector(held, "matrix", symbol="singular values")
    if np.min(given) < 0.0:
        raise ValueError(f"matrix (singular values) has a negative value, {np.min(given):g}")
    values = np.sort(given.astype(np.float64))[::-1]
    return values, float(np.finfo(given.dtype).eps), given.shape
