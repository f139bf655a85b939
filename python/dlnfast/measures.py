# SPDX-License-Identifier: MIT
"""Measures of features, of subspaces, of weights and of the loss landscape, and of noise.

All measures compute in float64 for input of any precision, and return Python floats or float64 arrays. A
measure that is undefined for its input raises `ValueError`; no measure returns NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from . import reference as plain
from ._noise.edge import NoiseBulk, noise_bulk, noise_edge, noise_variance, rank_above_noise
from ._noise.spectrum import read_spectrum
from ._noise.spikes import spike_position, spike_strength, spike_threshold
from ._problem.problem import Problem, check_problem
from ._support.arrays import (
    FloatArray,
    as_array,
    as_list,
    as_matrix,
    check_choice,
    check_count,
    check_scale,
    frobenius_norm,
)
from ._support.eigenvalues import largest_eigenvalues
from ._support.errors import ShapeError

__all__ = [
    "NoiseBulk",
    "SubspaceCosine",
    "balancedness",
    "effective_rank",
    "energy_share",
    "feature_compression",
    "feature_discrimination",
    "image_angles",
    "intruder_directions",
    "layer_alignment",
    "mode_strengths",
    "noise_bulk",
    "noise_edge",
    "noise_variance",
    "numerical_rank",
    "rank_above_noise",
    "schatten_norm",
    "sharpness",
    "spike_position",
    "spike_strength",
    "spike_threshold",
    "stable_rank",
    "subspace_angles",
    "subspace_cosine",
    "vector_angles",
]

#: Largest number of Lanczos steps of `sharpness`.
_MAX_ITERATIONS = 300

# Features.


def feature_compression(features: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    r"""Return the ratio of the variance within classes to that between them, C_l = tr Sigma_W / tr Sigma_B.

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
        C_l >= 0, without unit: 0 for one sample per class, infinity if the class means coincide.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    ValueError
        If a value is not finite, there is a single class, or all features are equal.

    Notes
    -----
    Cost: O(d N) time; memory of one class at a time, and K d numbers for the means. arXiv:2306.01154 calls
    this ratio D_l, arXiv:2311.02960 calls it C_l.

    Examples
    --------
    >>> from dlnfast.measures import feature_compression
    >>> round(feature_compression([[0.0, 2.0, 9.0, 11.0]], ["a", "a", "b", "b"]), 12)
    0.049382716049
    """
    matrix, classes = _group_samples(features, labels)
    # The value does not depend on the unit and the origin. With one of the samples, or one of the means, as
    # the origin, components that are equal for all of them cancel to exact zeros.
    unit = _find_unit(matrix)
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


def feature_discrimination(features: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    r"""Return the separation of the directions of class means, D_l = 1 - max_{k != k'} cos(mu_k, mu_k').

    The means are not centred. D_l is 0 if two class means have the same direction, 1 if all are orthogonal,
    and at most K / (K - 1), for a simplex.

    Parameters
    ----------
    features : (d, N) array_like
        Z_l, one column per sample.
    labels : (N,) array_like
        Class of each sample: numbers or strings, of at least two classes.

    Returns
    -------
    float
        D_l in [0, 2], without unit; accurate for small values too.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    ValueError
        If a value is not finite, there is a single class, or the mean of a class is zero and has no
        direction.

    Notes
    -----
    Cost: O(d N + d K^2) time, O(d K) memory beside one class at a time. Defined in arXiv:2311.02960.

    Examples
    --------
    >>> from dlnfast.measures import feature_discrimination
    >>> feature_discrimination([[1.0, 0.0], [0.0, 3.0]], [0, 1])
    1.0
    """
    matrix, classes = _group_samples(features, labels)
    unit = _find_unit(matrix)
    means = []
    for label, members in classes.items():
        means.append(np.mean(matrix[:, members].astype(np.float64) / unit, axis=1))
        if not means[-1].any():
            raise ValueError(f"features (Z): the mean of class {label!r} is zero and has no direction")
    directions = _normalise_columns(np.stack(means, axis=1), "class means")
    # 1 - cos = ||a - b||^2 / 2 for unit vectors, without cancellation for a cosine near 1.
    nearest = min(
        float(np.min(np.sum((directions[:, k + 1 :] - directions[:, k : k + 1]) ** 2, axis=0)))
        for k in range(len(means) - 1)
    )
    return nearest / 2


def _group_samples(
    features: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[FloatArray, dict[Any, npt.NDArray[np.intp]]]:
    """Return the features, and the columns of each class."""
    matrix = as_matrix(features, "features", symbol="Z")
    names = as_array(labels, "labels")
    if names.dtype == object and all(isinstance(label, str) for label in names.flat):
        names = names.astype(np.str_)  # tables store text as objects
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


def _find_unit(matrix: FloatArray) -> float:
    """Return the largest magnitude of an entry, 1 if all entries are zero."""
    return max(float(np.max(matrix)), -float(np.min(matrix))) or 1.0


# Subspaces and vectors.


def subspace_angles(U: npt.ArrayLike, V: npt.ArrayLike) -> FloatArray:
    r"""Return the principal angles between two subspaces, in radians, ascending.

    Parameters
    ----------
    U, V : (d, p) and (d, q) array_like
        Bases as linearly independent columns, which need not be orthonormal.

    Returns
    -------
    (min(p, q),) ndarray of float64
        Angles in [0, pi/2]; the last one is the largest.

    Raises
    ------
    ShapeError
        If the numbers of rows differ, or a matrix has more columns than rows.
    ValueError
        If a value is not finite, or columns are linearly dependent.

    Notes
    -----
    All angles are accurate to rounding: each is computed from its cosine, a singular value of
    :math:`U^T V`, and its sine, one of :math:`(I - U U^T) V` (Bjorck and Golub, Math. Comp. 27, 1973). Cost:
    O(d (p + q)^2) time, O(d (p + q)) memory.

    Examples
    --------
    >>> from dlnfast.measures import subspace_angles
    >>> subspace_angles([[1.0], [0.0]], [[1.0], [1e-12]])
    array([1.e-12])
    """
    return plain.principal_angles(*_orthonormalise_both(U, V))


class SubspaceCosine(NamedTuple):
    """Statistics of the cosines of the principal angles between two subspaces."""

    #: Cosine of the largest principal angle.
    minimum: float
    #: Mean cosine.
    mean: float
    #: Cosine of the smallest principal angle; near 1 if a single direction is shared.
    maximum: float
    #: ||U^T V||_F^2 / r, the mean squared cosine.
    overlap: float
    #: Expected `overlap` of a random subspace, max(p, q) / d.
    baseline: float


def subspace_cosine(U: npt.ArrayLike, V: npt.ArrayLike) -> SubspaceCosine:
    """Return statistics of the cosines of the principal angles between two subspaces.

    Parameters
    ----------
    U, V : (d, p) and (d, q) array_like
        Bases as linearly independent columns, which need not be orthonormal. Commonly p = q = r.

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
        If a value is not finite, or columns are linearly dependent.

    Notes
    -----
    Cost: O(d (p + q)^2) time, O(d (p + q)) memory.

    Examples
    --------
    >>> from dlnfast.measures import subspace_cosine
    >>> subspace_cosine([[1.0], [0.0]], [[0.0], [2.0]]).overlap
    0.0
    """
    first, second = _orthonormalise_both(U, V)
    # Because of rounding, cosines of shared directions may exceed 1 by an eps.
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

    The first r and the last r vectors are compared one by one, up to sign. The others belong to one repeated
    singular value and are defined as a subspace only: each of them gets the largest principal angle between
    the two subspaces. (The figures of arXiv:2306.01154 show these angles.)

    Parameters
    ----------
    vectors, reference : (d, k) array_like
        Left or right singular vectors as orthonormal columns, in the order of descending singular values.
    rank : int
        r, the number of vectors at either end that are compared one by one. All are if 2 r >= k.

    Returns
    -------
    (k,) ndarray of float64
        Angles in [0, pi/2], accurate to rounding near 0 and near pi/2.

    Raises
    ------
    ShapeError
        If the shapes differ.
    ValueError
        If a value is not finite, a column is zero, or the rank is negative.

    Notes
    -----
    Cost: O(d k) for the vectors and O(d (k - 2 r)^2) for the middle block, or O(d r^2) for the block if
    k = d.

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast.measures import vector_angles
    >>> vector_angles(np.eye(4), np.eye(4)[:, [0, 2, 1, 3]], rank=1)
    array([0., 0., 0., 0.])
    """
    ends = check_count(rank, "rank", minimum=0)
    current = _normalise_columns(as_matrix(vectors, "vectors", dtype=np.float64), "vectors")
    initial = _normalise_columns(
        as_matrix(reference, "reference", shape=current.shape, dtype=np.float64), "reference"
    )
    dim, count = current.shape
    if count < dim or 4 * ends >= dim or ends == 0:
        return plain.vector_angles(current, initial, ends)
    # The orthogonal complements have the same largest angle, and that of the middle block is smaller here.
    angles = plain.angle(current, initial)
    outer = np.r_[:ends, count - ends : count]
    angles[ends : count - ends] = plain.principal_angles(current[:, outer], initial[:, outer])[-1]
    return angles


def layer_alignment(weights: Iterable[npt.ArrayLike], k: int) -> list[SubspaceCosine]:
    r"""Return how far each layer's leading output directions are the leading input directions of the next.

    Compares the span of the k leading left singular vectors of W_l with that of the k leading right singular
    vectors of W_{l+1}. Pass the changes W_l(t) - W_l(0) for the alignment of what was learned.

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) array_like
        W_1 .. W_L, or their changes.
    k : int
        Dimension of the subspaces.

    Returns
    -------
    list of SubspaceCosine
        L - 1 entries. ``overlap`` is 1 for equal subspaces, and about ``baseline``, k / d_l, for random ones.

    Raises
    ------
    ShapeError
        If neighbouring shapes do not fit, or there is no layer.
    ValueError
        If a value is not finite, or a matrix has a rank below k.

    Notes
    -----
    Cost: one SVD per layer, O(d_l d_{l-1} min(d_l, d_{l-1})). `Trajectory.layer_alignment` uses recorded
    vectors instead.

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast.measures import layer_alignment
    >>> [pair] = layer_alignment([np.diag([3.0, 1.0]), np.diag([1.0, 2.0])], 1)
    >>> pair.overlap, pair.baseline
    (0.0, 0.5)
    """
    count = check_count(k, "k")
    outputs, inputs = [], []
    for number, layer in enumerate(_convert_layers(weights)):
        left, values, right = np.linalg.svd(_scale_to_one(layer), full_matrices=False)
        rank = numerical_rank(values, shape=layer.shape)
        if rank < count:
            raise ValueError(f"weights[{number}] has the rank {rank}; wanted at least k, {count}")
        outputs.append(left[:, :count])
        inputs.append(right[:count].T)
    pairs = zip(outputs[:-1], inputs[1:], strict=True)
    return [subspace_cosine(below, above) for below, above in pairs]


def intruder_directions(
    vectors: npt.ArrayLike, base: npt.ArrayLike, *, threshold: float = 0.5
) -> npt.NDArray[np.intp]:
    r"""Return the indices of singular vectors of a tuned weight that resemble none of its base.

    These are the columns u of `vectors` with :math:`\max_j |\langle u, u'_j \rangle|` below the threshold,
    over all columns u' of `base`.

    Parameters
    ----------
    vectors : (d, k) array_like
        Leading left, or right, singular vectors of the tuned weight, as columns.
    base : (d, q) array_like
        Leading singular vectors of the same side of the weight before.
    threshold : float
        Cosine in (0, 1].

    Returns
    -------
    ndarray of intp
        Indices from 0, ascending.

    Raises
    ------
    ShapeError
        If the numbers of rows differ.
    ValueError
        If a value is not finite, a column is zero, or the threshold is out of range.

    Notes
    -----
    Cost: O(d k q). The measure is that of arXiv:2410.21228, which compares with all d vectors of the base. A
    leading q < d can only find more: also vectors that were in the base but not leading. Cosines of random
    vectors are about ``sqrt(2 log(q) / d)`` at most. Vectors of nearly equal singular values mix freely, and
    then each may have small cosines although their span is unchanged: compare with `subspace_cosine`.

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast.measures import intruder_directions
    >>> intruder_directions(np.eye(4)[:, [0, 3]], np.eye(4)[:, :2])
    array([1])
    """
    limit = check_scale(threshold, "threshold", strict=True, at_most=1.0)
    tuned = _normalise_columns(as_matrix(vectors, "vectors", dtype=np.float64), "vectors")
    known = as_matrix(base, "base", shape=(tuned.shape[0], None), dtype=np.float64)
    cosines = np.abs(tuned.T @ _normalise_columns(known, "base"))
    return np.flatnonzero(np.max(cosines, axis=1) < limit)


def _orthonormalise_both(U: npt.ArrayLike, V: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    first = as_matrix(U, "U", dtype=np.float64)
    second = as_matrix(V, "V", shape=(first.shape[0], None), dtype=np.float64)
    return _orthonormalise(first, "U"), _orthonormalise(second, "V")


def _orthonormalise(matrix: FloatArray, name: str) -> FloatArray:
    """Return an orthonormal basis of the span of independent columns."""
    rows, columns = matrix.shape
    if columns > rows:
        raise ShapeError(f"{name} has shape {matrix.shape}; wanted no more columns than rows")
    basis, values, _ = np.linalg.svd(_normalise_columns(matrix, name), full_matrices=False)
    rank = numerical_rank(values, shape=matrix.shape)
    if rank < columns:
        raise ValueError(f"{name} has linearly dependent columns: rank {rank}, wanted {columns}")
    return basis


def _normalise_columns(matrix: FloatArray, name: str) -> FloatArray:
    """Divide the columns by their norms, without overflow."""
    largest = np.max(np.abs(matrix), axis=0)
    if not largest.all():
        raise ValueError(f"{name} has a column of zeros, number {int(np.argmin(largest))}")
    scaled = matrix / largest
    return np.asarray(scaled / np.linalg.norm(scaled, axis=0))


def mode_strengths(problem: Problem, W: npt.ArrayLike) -> FloatArray:
    r"""Return the strength of each mode of the target in a matrix, :math:`u_i^T W v_i`.

    Parameters
    ----------
    problem : Problem
        Problem with the target Phi = sum_i sigma_i u_i v_i^T.
    W : (d_y, d_x) array_like
        The end-to-end matrix W_{L:1}.

    Returns
    -------
    (r,) ndarray of float64
        Strengths in the order of descending sigma_i; equal to sigma_i for W = Phi.

    Raises
    ------
    ShapeError
        If W does not fit the problem.

    Notes
    -----
    Cost: O(d_y d_x r) and the decomposition of the target. For equal sigma_i only the sum of their strengths
    is defined.

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
    """Return the numerical rank, by one of three definitions.

    Parameters
    ----------
    matrix : (m, n) or (k,) array_like
        W, or its singular values in any order.
    kind : {"machine", "nuclear", "threshold"}
        "machine": the number of singular values above max(m, n) eps sigma_1, with the eps of the precision of
        `matrix`. "nuclear": the smallest number of singular values whose sum is at least `mass` times the
        nuclear norm. "threshold": the number of singular values above `threshold` sigma_1.
    mass : float
        Fraction of the nuclear norm for "nuclear", in (0, 1].
    threshold : float
        Relative threshold for "threshold", in [0, 1).
    shape : tuple of int, optional
        (m, n) for "machine" if `matrix` holds singular values. Default: (k, k).

    Returns
    -------
    int
        The rank; 0 for zeros.

    Raises
    ------
    ValueError
        If the kind is unknown, `mass` or `threshold` is out of range, a value is not finite, or a singular
        value is negative.

    Notes
    -----
    Cost: one SVD without vectors, O(m n min(m, n)); O(k log k) from singular values. The three definitions
    give very different numbers for trained weights: report which one you use.

    Examples
    --------
    >>> from dlnfast.measures import numerical_rank
    >>> [numerical_rank([1.0, 0.5, 0.01, 0.0], kind) for kind in ("machine", "nuclear", "threshold")]
    [3, 2, 2]
    """
    check_choice(kind, "kind", ("machine", "nuclear", "threshold"))
    share = check_scale(mass, "mass", strict=True, at_most=1.0)
    level = check_scale(threshold, "threshold", below=1.0)
    values, precision, matrix_shape = read_spectrum(matrix)
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
    """Return the stable rank ||W||_F^2 / ||W||_2^2.

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
        If a value is not finite, or a singular value is negative.

    Notes
    -----
    Cost: one SVD without vectors, O(m n min(m, n)); O(k) from singular values.

    Examples
    --------
    >>> from dlnfast.measures import stable_rank
    >>> stable_rank([[3.0, 0.0], [0.0, 3.0]])
    2.0
    """
    values, _, _ = read_spectrum(matrix)
    return float(np.sum((values / values[0]) ** 2)) if values[0] > 0.0 else 0.0


def energy_share(matrix: npt.ArrayLike, k: int) -> float:
    r"""Return the fraction of ||W||_F^2 in the k largest singular values.

    .. math:: \sum_{i \le k} \sigma_i^2 \Big/ \sum_i \sigma_i^2

    Parameters
    ----------
    matrix : (m, n) or (p,) array_like
        W, or all its singular values.
    k : int
        Number of singular values, at least 1; all if there are fewer.

    Returns
    -------
    float
        Fraction in [0, 1]; 0 for a matrix of zeros.

    Raises
    ------
    ValueError
        If a value is not finite, a singular value is negative, or k < 1.

    Notes
    -----
    Cost: one SVD without vectors, O(m n min(m, n)); O(p log p) from singular values. For an n x n matrix with
    independent entries the fraction is about 4 k / n, for k << n.

    Examples
    --------
    >>> from dlnfast.measures import energy_share
    >>> energy_share([3.0, 4.0, 0.0], 1)
    0.64
    """
    count = check_count(k, "k")
    values, _, _ = read_spectrum(matrix)
    if values[0] == 0.0:
        return 0.0
    squares = (values / values[0]) ** 2
    return float(np.sum(squares[:count]) / np.sum(squares))


def image_angles(W: npt.ArrayLike, start: npt.ArrayLike, vectors: npt.ArrayLike) -> FloatArray:
    """Return the angles between the images W v and W_0 v of vectors, in radians.

    An angle is 0 if (W - W_0) v = 0, for any W_0.

    Parameters
    ----------
    W, start : (m, n) array_like
        W and W_0.
    vectors : (n, p) array_like
        Columns v, of any nonzero norm.

    Returns
    -------
    (p,) ndarray of float64
        Angles between lines, in [0, pi/2], accurate to rounding near 0 and near pi/2; pi/2 if one of the two
        images is zero, 0 if both are.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    ValueError
        If a value is not finite.

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
    # Directions do not depend on scale: after scaling, neither products nor squares overflow or underflow.
    columns = _scale_to_one(columns, axis=0)
    images = [_scale_to_one(_scale_to_one(matrix) @ columns, axis=0) for matrix in (current, initial)]
    lengths = [np.linalg.norm(image, axis=0) for image in images]
    lines = [image / np.where(length > 0, length, 1.0) for image, length in zip(images, lengths, strict=True)]
    angles = plain.angle(*lines)
    empty = [length == 0 for length in lengths]
    angles[empty[0] != empty[1]] = np.pi / 2
    angles[empty[0] & empty[1]] = 0.0
    return angles


def _scale_to_one(matrix: FloatArray, axis: int | None = None) -> FloatArray:
    """Multiply a matrix, or each of its columns, by a power of two that brings its largest entry near 1."""
    exponents = np.frexp(np.max(np.abs(matrix), axis=axis, initial=0.0))[1]
    return np.asarray(np.ldexp(matrix, -exponents))


def effective_rank(matrix: npt.ArrayLike) -> float:
    r"""Return the effective rank :math:`\exp(-\sum_i p_i \log p_i)` for :math:`p_i = \sigma_i / \|W\|_*`.

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
        If a value is not finite, or a singular value is negative.

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
    values, _, _ = read_spectrum(matrix)
    if values[0] == 0.0:
        return 0.0
    relative = values[values > 0.0] / values[0]
    shares = relative / np.sum(relative)
    shares = shares[shares > 0.0]  # a share may underflow to 0, and p log p is 0 there
    return float(np.exp(-np.sum(shares * np.log(shares))))


def schatten_norm(matrix: npt.ArrayLike, p: float) -> float:
    r"""Return the Schatten norm :math:`(\sum_i \sigma_i^p)^{1/p}`: nuclear for p = 1, Frobenius for p = 2.

    Parameters
    ----------
    matrix : (m, n) or (k,) array_like
        W, or its singular values.
    p : float
        Exponent, above 0; infinity for the spectral norm. For p < 1 the result is a quasi-norm.

    Returns
    -------
    float
        The norm, in the unit of W.

    Raises
    ------
    ValueError
        If p <= 0 or p is NaN, a value is not finite, or a singular value is negative.

    Notes
    -----
    Cost: one SVD without vectors, O(m n min(m, n)); O(k) from singular values.

    Examples
    --------
    >>> from dlnfast.measures import schatten_norm
    >>> schatten_norm([3.0, 4.0], 1)
    7.0
    """
    values, _, _ = read_spectrum(matrix)
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
    r"""Return the imbalance of neighbouring layers, :math:`\|W_{l+1}^T W_{l+1} - W_l W_l^T\|_F`.

    Gradient flow without weight decay conserves each of these differences; gradient descent changes them by
    O(learning rate).

    Parameters
    ----------
    weights : sequence of (d_l, d_{l-1}) array_like
        W_1 .. W_L.

    Returns
    -------
    (L - 1,) ndarray of float64
        One number for each pair of layers (l, l + 1); infinity if it is beyond the largest number.

    Raises
    ------
    ShapeError
        If neighbouring shapes do not fit, or there is no layer.
    ValueError
        If a value is not finite.

    Notes
    -----
    Cost: O(d_l^2 (d_{l-1} + d_{l+1})) time and O(d_l^2) memory for each pair.

    Examples
    --------
    >>> from dlnfast.measures import balancedness
    >>> balancedness([[[2.0]], [[1.0]]])
    array([3.])
    """
    layers = _convert_layers(weights)
    pairs = zip(layers[1:], layers[:-1], strict=True)
    return np.array([_imbalance(above, below) for above, below in pairs])


def _imbalance(above: FloatArray, below: FloatArray) -> float:
    """Return ``||A^T A - B B^T||_F``, infinity if it overflows; squares are computed after scaling."""
    exponent = int(np.frexp(max(frobenius_norm(above), frobenius_norm(below)))[1])
    above, below = np.ldexp(above, -exponent), np.ldexp(below, -exponent)
    with np.errstate(over="ignore", under="ignore"):
        return float(np.ldexp(np.linalg.norm(above.T @ above - below @ below.T), 2 * exponent))


# The landscape.


def sharpness(problem: Problem, weights: Sequence[npt.ArrayLike], *, tolerance: float = 1e-6) -> float:
    r"""Return the largest eigenvalue of the Hessian of the loss, over all entries of all layers.

    Gradient descent is stable around a minimum only if the sharpness is below 2 / eta.

    Parameters
    ----------
    problem : Problem
        Problem with S, Phi and c.
    weights : sequence of (d_l, d_{l-1}) array_like
        W_1 .. W_L.
    tolerance : float
        Relative error at which the iteration stops; at least about 1e-12 because of rounding.

    Returns
    -------
    float
        The largest eigenvalue; negative at a maximum.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    ValueError
        If a value is not finite, or 300 iterations do not reach the tolerance.

    Notes
    -----
    Lanczos iteration with full reorthogonalisation on exact Hessian-vector products, from a fixed random
    start. Cost: commonly 20 to 60 products, each of about 3 gradients, and the memory of as many vectors of
    the size of all weights. (An eigenvalue whose eigenvectors are orthogonal to the start is found through
    rounding only.)

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast import Problem
    >>> from dlnfast.measures import sharpness
    >>> round(sharpness(Problem(np.diag([8.0, 1.0])), [np.diag([2.0, 1.0])] * 3), 6)  # 3 * 8^(4/3)
    48.0
    """
    limit = check_scale(tolerance, "tolerance", strict=True)
    layers = _convert_layers(weights, check_problem(problem).dim_in)
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

    n_entries = sum(layer.size for layer in layers)
    return float(largest_eigenvalues(product, n_entries, 1, limit, "sharpness", _MAX_ITERATIONS)[0])


def _convert_layers(weights: Iterable[npt.ArrayLike], columns: int | None = None) -> list[FloatArray]:
    """Convert W_1 .. W_L to float64 matrices, and check that their products are defined."""
    layers: list[FloatArray] = []
    for number, weight in enumerate(as_list(weights, "weights", "a list of matrices, W_1 .. W_L"), start=1):
        shape = (None, layers[-1].shape[0] if layers else columns)
        name, symbol = f"weights[{number - 1}]", f"W_{number}"
        layers.append(as_matrix(weight, name, shape=shape, dtype=np.float64, symbol=symbol))
    if not layers:
        raise ShapeError("weights is empty; wanted at least one layer")
    return layers
