# SPDX-License-Identifier: MIT
"""Standard problems: low-rank recovery, classification, matrix completion and matrix sensing."""

from __future__ import annotations

from typing import Final

import numpy as np

from .._support.arrays import check_count, check_scale, random_generator
from .._support.dispatch import core
from .._support.haar import haar
from .factors import entries_of_product
from .low_rank import LowRank
from .observations import Completion, Sensing
from .problem import Problem, check_settings, scale_of_reduction

#: Largest dim for which `low_rank_recovery` decomposes a dim x dim matrix.
_DENSE_RECOVERY_DIM: Final = 1024


def low_rank_recovery(dim: int, rank: int, seed: int = 0, reduction: str = "mean") -> Problem:
    """Return a problem whose target is a random low-rank matrix, with white inputs.

    Parameters
    ----------
    dim : int
        d. The target is d x d, the best rank-r approximation of a matrix of independent N(0, 1) entries.
    rank : int
        r, at most `dim`.
    seed : int
        Seed of the random matrix, non-negative.
    reduction : {"mean", "sum"}
        c = 1 / d^2 (the mean for N = d samples, X = I) or c = 1.

    Returns
    -------
    Problem
        A problem with S = I and a `LowRank` target.

    Raises
    ------
    ValueError
        If the rank exceeds d, or the reduction is unknown.

    Notes
    -----
    Up to d = 1024 the Gaussian matrix is drawn and decomposed. For larger d no d x d array is formed, and the
    distribution of Phi is exactly the same: the singular vectors of a Gaussian matrix are independent
    Haar-distributed frames (QR of a d x r Gaussian), and its singular values are those of the upper
    bidiagonal matrix with independent chi_d, chi_(d-1), ..., chi_1 on the diagonal and chi_(d-1), ..., chi_1
    above it (Dumitriu, Edelman, "Matrix models for beta ensembles", J. Math. Phys. 43 (2002)). Its first rows
    determine the r largest to rounding. O(d r^2) time, O(d r) memory.

    The setting of Yaras et al. 2023, arXiv 2306.01154.

    Examples
    --------
    >>> from dlnfast import low_rank_recovery
    >>> problem = low_rank_recovery(dim=30, rank=3)
    >>> problem.target
    LowRank(30 x 30, rank 3, float64)
    """
    dim, rank = check_count(dim, "dim"), check_count(rank, "rank", minimum=0)
    if rank > dim:
        raise ValueError(f"rank is {rank}; wanted at most dim = {dim}")
    check_settings(None, False, reduction, None)
    loss_scale = scale_of_reduction(reduction, dim, dim)
    draw = _draw_truncated_gaussian if dim <= _DENSE_RECOVERY_DIM else _draw_truncated_factors
    problem = Problem(draw(dim, rank, seed), loss_scale=loss_scale)
    problem.reduction = reduction
    problem.n_samples = dim
    problem._source = {"name": "low_rank_recovery", "dim": dim, "rank": rank, "seed": int(seed)}
    return problem


def _draw_truncated_gaussian(dim: int, rank: int, seed: int) -> LowRank:
    gaussian = random_generator(seed, ("low_rank_recovery", "matrix")).standard_normal((dim, dim))
    left, values, right = np.linalg.svd(gaussian)
    return LowRank(left[:, :rank], values[:rank], right[:rank].T)


def _draw_truncated_factors(dim: int, rank: int, seed: int) -> LowRank:
    generator = random_generator(seed, ("low_rank_recovery", "singular values"))
    degrees = np.arange(dim, 0, -1)
    diagonal = np.sqrt(generator.chisquare(degrees))
    superdiagonal = np.sqrt(generator.chisquare(degrees[1:]))
    # The first k singular vectors decay like Airy functions beyond about d^(1/3) k^(2/3) rows: further rows
    # than these change no bit of the values.
    rows = min(dim, int((40 + 10 * rank ** (2 / 3)) * dim ** (1 / 3)))
    values = core.bidiagonal_singular_values(diagonal[:rows], superdiagonal[: rows - 1], rank)
    left = haar(dim, rank, random_generator(seed, ("low_rank_recovery", "left")))
    right = haar(dim, rank, random_generator(seed, ("low_rank_recovery", "right")))
    return LowRank(left, values, right)


def classification(
    n_classes: int, samples_per_class: int, dim: int | None = None, seed: int = 0, reduction: str = "mean"
) -> Problem:
    """Return a balanced classification problem on random orthonormal data: ``Y = I_K (x) 1_n^T``.

    Parameters
    ----------
    n_classes : int
        K, the output dimension.
    samples_per_class : int
        n, so that N = K n.
    dim : int, optional
        d_x. Default: N. If N >= d_x, the rows of X are orthonormal and S = I; if N < d_x, its columns are
        orthonormal, and S is a projector of rank N. X is Haar-distributed in both cases.
    seed : int
        Seed of the random data, non-negative.
    reduction : {"mean", "sum"}
        c = 1 / (K N) or c = 1.

    Returns
    -------
    Problem
        A problem with `inputs`, `outputs`, `labels` (sorted by class) and `classes`.

    Raises
    ------
    ValueError
        If a number is below 1, d_x does not fit N, or the reduction is unknown.

    Notes
    -----
    The setting of Wang, Li, Yaras, Zhu, Balzano, Hu, Qu, "Understanding Deep Representation Learning via
    Layerwise Feature Compression and Discrimination" (arXiv 2311.02960).

    Cost: a QR decomposition of a d_x x N matrix.

    Examples
    --------
    >>> from dlnfast import classification
    >>> problem = classification(n_classes=5, samples_per_class=10)
    >>> problem.inputs.shape, problem.outputs.shape, problem.loss_scale
    ((50, 50), (5, 50), 0.004)
    """
    n_classes = check_count(n_classes, "n_classes")
    samples_per_class = check_count(samples_per_class, "samples_per_class")
    n_samples = n_classes * samples_per_class
    dim = n_samples if dim is None else check_count(dim, "dim")
    labels = np.repeat(np.arange(n_classes), samples_per_class)
    generator = random_generator(seed, ("classification",))
    frame = haar(max(dim, n_samples), min(dim, n_samples), generator)
    problem = Problem.from_data(frame.T if n_samples >= dim else frame, labels, reduction=reduction)
    problem._source = {
        "name": "classification",
        "n_classes": n_classes,
        "samples_per_class": samples_per_class,
        "dim": dim,
        "seed": int(seed),
    }
    return problem


def low_rank_completion(
    dim: int, rank: int, observed: float = 0.2, *, seed: int = 0, reduction: str = "mean"
) -> Completion:
    """Return a completion problem: a random low-rank matrix, of which random entries are observed.

    Parameters
    ----------
    dim : int
        d. Phi is d x d, the rank-r truncation of a Gaussian matrix, as in `low_rank_recovery`.
    rank : int
        r, at most `dim`.
    observed : float
        Probability with which each entry is observed, in (0, 1].
    seed : int
        Seed of the random matrix and of the observed entries, non-negative.
    reduction : {"mean", "observed", "sum"}
        c = 1 / d^2, 1 / n or 1.

    Returns
    -------
    Completion
        A problem with its truth.

    Raises
    ------
    ValueError
        If the probability is outside (0, 1], the rank exceeds d, or the reduction is unknown.

    Notes
    -----
    Memory: O(p d^2) for d > 1024, because Phi is drawn as factors. In each row, the number of observed
    entries is binomial, and their columns are sampled without replacement.

    The setting of Yaras et al. 2024, arXiv 2406.04112.

    Examples
    --------
    >>> import dlnfast as dln
    >>> problem = dln.low_rank_completion(dim=100, rank=5, observed=0.3)
    >>> problem.truth
    LowRank(100 x 100, rank 5, float64)
    """
    probability = check_scale(observed, "observed", strict=True)
    if probability > 1:
        raise ValueError(f"observed is {probability:g}; wanted a probability in (0, 1]")
    truth = low_rank_recovery(dim, rank, seed).target
    assert isinstance(truth, LowRank)
    generator = random_generator(seed, ("low_rank_completion", "observed"))
    counts = generator.binomial(dim, probability, size=dim)
    columns = np.concatenate([generator.choice(dim, size=n, replace=False, shuffle=False) for n in counts])
    rows = np.repeat(np.arange(dim), counts)
    values = entries_of_product((truth.U * truth.s, truth.V), rows, columns)
    problem = Completion(rows, columns, values, (dim, dim), reduction=reduction, truth=truth)
    problem._source = {
        "name": "low_rank_completion",
        "dim": dim,
        "rank": rank,
        "observed": probability,
        "seed": int(seed),
    }
    return problem


def low_rank_sensing(
    dim: int, rank: int, n_measurements: int, *, seed: int = 0, reduction: str = "sum"
) -> Sensing:
    """Return a sensing problem: a random low-rank matrix, known by Gaussian measurements.

    Parameters
    ----------
    dim : int
        d. Phi is d x d, the rank-r truncation of a Gaussian matrix, as in `low_rank_recovery`.
    rank : int
        r, at most `dim`.
    n_measurements : int
        m. The A_i have independent N(0, 1) / m entries.
    seed : int
        Seed of the random matrix and of the measurements, non-negative.
    reduction : {"sum", "observed", "mean"}
        c = 1, 1 / m or 1 / d^2.

    Returns
    -------
    Sensing
        A problem with its truth.

    Raises
    ------
    ValueError
        If the rank exceeds d, there are no measurements, or the reduction is unknown.

    Notes
    -----
    The setting of Yaras et al. 2024, arXiv 2406.04112.

    Cost: the m operators take 8 m d^2 bytes of memory.

    Examples
    --------
    >>> import dlnfast as dln
    >>> dln.low_rank_sensing(dim=20, rank=2, n_measurements=150)
    Sensing(20 x 20, 150 observations, loss_scale=1)
    """
    count = check_count(n_measurements, "n_measurements")
    truth = low_rank_recovery(dim, rank, seed).target
    assert isinstance(truth, LowRank)
    generator = random_generator(seed, ("low_rank_sensing", "operators"))
    operators = generator.standard_normal((count, dim, dim))
    operators /= count
    values = operators.reshape(count, -1) @ truth.dense().reshape(-1)
    problem = Sensing(operators, values, reduction=reduction, truth=truth)
    problem._source = {
        "name": "low_rank_sensing",
        "dim": dim,
        "rank": rank,
        "n_measurements": count,
        "seed": int(seed),
    }
    return problem
