# SPDX-License-Identifier: MIT
"""Measures against formulas written out by brute force, against invariances and at their edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers.matrices import draw_orthonormal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerances import tolerance

from dlnfast import Problem, measures, reference, theory
from dlnfast._support.errors import ShapeError

Array = npt.NDArray[Any]

seeds = st.integers(0, 2**32 - 1)


# Compression and discrimination.


def brute_compression(features: Array, labels: Array) -> float:
    """Form Sigma_W and Sigma_B sample by sample."""
    dim, count = features.shape
    overall = sum(features.T) / count
    within, between = np.zeros((dim, dim)), np.zeros((dim, dim))
    classes = sorted(set(labels.tolist()))
    for name in classes:
        members = [z for z, label in zip(features.T, labels, strict=True) if label == name]
        mean = sum(members) / len(members)
        between += np.outer(mean - overall, mean - overall) / len(classes)
        for z in members:
            within += np.outer(z - mean, z - mean) / count
    return float(np.trace(within) / np.trace(between))


def brute_discrimination(features: Array, labels: Array) -> float:
    means = [features[:, labels == name].mean(axis=1) for name in np.unique(labels)]
    cosines = [
        a @ b / np.sqrt((a @ a) * (b @ b)) for i, a in enumerate(means) for j, b in enumerate(means) if i != j
    ]
    return float(1 - max(cosines))


@st.composite
def labelled_features(draw: st.DrawFn) -> tuple[Array, Array]:
    generator = np.random.default_rng(draw(seeds))
    dim, n_classes = draw(st.integers(1, 7)), draw(st.integers(2, 5))
    extra = draw(st.lists(st.integers(0, n_classes - 1), max_size=20))
    labels = generator.permutation(np.array([*range(n_classes), *extra]))
    return generator.standard_normal((dim, len(labels))) + 1.0, labels


@settings(deadline=None)
@given(labelled_features())
def test_feature_measures_equal_brute_force(sample: tuple[Array, Array]) -> None:
    features, labels = sample
    bound = tolerance(np.float64, features.size)
    expected = brute_compression(features, labels)
    # Sigma_B may be small against the features, and its relative error grows by that.
    assert measures.feature_compression(features, labels) == pytest.approx(
        expected, rel=bound * (1 + expected), abs=bound
    )
    assert measures.feature_discrimination(features, labels) == pytest.approx(
        brute_discrimination(features, labels), abs=bound * np.max(np.abs(features)) ** 2 * 100
    )


@settings(deadline=None)
@given(labelled_features(), st.floats(-3, 3), st.sampled_from([1e-200, 1e-3, 1.0, 1e200]), seeds)
def test_compression_is_invariant(
    sample: tuple[Array, Array], shift: float, factor: float, seed: int
) -> None:
    features, labels = sample
    rotation = draw_orthonormal(np.random.default_rng(seed), len(features), len(features))
    value = measures.feature_compression(features, labels)
    moved = measures.feature_compression(factor * (rotation @ features + shift), labels)
    assert moved == pytest.approx(value, rel=tolerance(np.float64, features.size) * 10 * (1 + value))


@settings(deadline=None)
@given(labelled_features(), st.sampled_from([1e-200, 1e-3, 1e200]), seeds)
def test_discrimination_is_invariant(sample: tuple[Array, Array], factor: float, seed: int) -> None:
    features, labels = sample
    rotation = draw_orthonormal(np.random.default_rng(seed), len(features), len(features))
    value = measures.feature_discrimination(features, labels)
    assert 0.0 <= value <= len(set(labels.tolist())) / (len(set(labels.tolist())) - 1) * (1 + 1e-12)
    assert measures.feature_discrimination(factor * (rotation @ features), labels) == pytest.approx(
        value, abs=tolerance(np.float64, features.size) * 100
    )


def test_feature_measures_of_the_inputs_of_a_classification() -> None:
    """Orthonormal samples: C_0 = (1 - 1/n) / (1/n - 1/N) and orthogonal class means."""
    inputs = draw_orthonormal(np.random.default_rng(0), 50, 50)
    labels = np.repeat(np.arange(5), 10)
    assert measures.feature_compression(inputs, labels) == pytest.approx(11.25, rel=tolerance(np.float64, 50))
    assert measures.feature_discrimination(inputs, labels) == pytest.approx(
        1.0, abs=tolerance(np.float64, 50)
    )


def test_feature_measures_in_limiting_cases() -> None:
    assert measures.feature_compression([[1.0, 2.0, 4.0]], [0, 1, 2]) == 0.0  # one sample per class
    assert (
        measures.feature_compression([[0.1, 0.1, 0.1, 0.7, 0.7, 0.7]], [0, 0, 0, 1, 1, 1]) == 0.0
    )  # collapsed
    assert (
        measures.feature_compression([[-1.0, 1.0, -2.0, 2.0, 0.0]], [0, 0, 1, 1, 1]) == np.inf
    )  # equal means
    assert measures.feature_discrimination([[1.0, -2.0]], ["a", "b"]) == 2.0  # opposite
    assert measures.feature_discrimination([[1.0, 3.0]], ["a", "b"]) == 0.0  # the same direction
    angle = 1e-7
    nearly = [[1.0, np.cos(angle)], [0.0, np.sin(angle)]]
    assert measures.feature_discrimination(nearly, [0, 1]) == pytest.approx(angle**2 / 2, rel=1e-8)


def test_compression_of_equal_means_is_infinite_in_spite_of_rounding() -> None:
    # The weighted sum of five times 12/17 is not 12/17.
    samples = np.array([0.0] * 5 + [1.0] * 12)
    labels = np.repeat(np.arange(5), [5 * 17, 17, 5 * 17, 2 * 17, 17])
    assert measures.feature_compression(np.tile(samples, 14)[np.newaxis], labels) == np.inf


def test_integers_and_single_precision_are_features() -> None:
    labels = np.array([0, 0, 1, 1])
    integers = np.array([[0, 2, 9, 11]])
    assert measures.feature_compression(integers, labels) == measures.feature_compression(
        integers.astype(np.float32), labels
    )
    features = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    for measure in (measures.feature_compression, measures.feature_discrimination):
        assert measure(features, labels) == measure(features.astype(np.float64), labels)


FeatureMeasure = Callable[[Any, Any], float]


@pytest.mark.parametrize("measure", [measures.feature_compression, measures.feature_discrimination])
def test_errors_of_feature_measures_name_bad_arguments(measure: FeatureMeasure) -> None:
    features = np.arange(6.0).reshape(2, 3)
    with pytest.raises(ValueError, match=r"labels has a single class, 'a'"):
        measure(features, ["a"] * 3)
    with pytest.raises(ShapeError, match=r"labels has shape \(2,\); .* \(3,\)"):
        measure(features, [0, 1])
    with pytest.raises(ValueError, match="labels has a value that is not finite"):
        measure(features, [0.0, 1.0, np.nan])
    with pytest.raises(TypeError, match="labels has dtype object"):
        measure(features, [None, 1, 2])
    with pytest.raises(ValueError, match=r"features \(Z\) has a value that is not finite"):
        measure(features * np.nan, [0, 1, 1])
    with pytest.raises(ShapeError, match=r"features \(Z\) has shape \(3,\)"):
        measure(features[0], [0, 1, 1])
    with pytest.raises(ValueError, match="features"):
        measure(np.zeros((2, 3)), [0, 1, 1])


def test_compression_refuses_constant_features() -> None:
    with pytest.raises(ValueError, match="same for all samples"):
        measures.feature_compression(np.full((3, 7), 0.1), [0, 1, 1, 0, 2, 1, 0])


def test_discrimination_names_the_class_without_direction() -> None:
    with pytest.raises(ValueError, match="mean of class 'dog' is zero"):
        measures.feature_discrimination([[1.0, 2.0, -2.0]], ["cat", "dog", "dog"])


# Subspaces and vectors.


def subspaces_at(generator: np.random.Generator, dim: int, angles: Array) -> tuple[Array, Array]:
    """Return bases, mixed and rescaled, of two subspaces with these principal angles."""
    count = len(angles)
    frame = draw_orthonormal(generator, dim, 2 * count)
    first, second = frame[:, :count], frame[:, :count] * np.cos(angles) + frame[:, count:] * np.sin(angles)
    mixing = draw_orthonormal(generator, count, count)
    return first @ mixing, second @ draw_orthonormal(generator, count, count)


@settings(deadline=None)
@given(
    seed=seeds,
    logarithms=st.lists(st.floats(-15.0, 0.0), min_size=1, max_size=4),
    near_right=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_subspace_angles_lose_no_digits(seed: int, logarithms: list[float], near_right: list[bool]) -> None:
    small = 10.0 ** np.array(logarithms)
    angles = np.where(near_right[: len(small)], np.pi / 2 - small, small)
    first, second = subspaces_at(np.random.default_rng(seed), 11, angles)
    # Absolute, at every size of the angle: from cosines alone small ones would be wrong by 1e-8.
    bound = tolerance(np.float64, 11)
    np.testing.assert_allclose(measures.subspace_angles(first, second), np.sort(angles), rtol=0, atol=bound)
    np.testing.assert_allclose(reference.principal_angles(first, second), np.sort(angles), rtol=0, atol=bound)


@settings(deadline=None)
@given(seed=seeds, dim=st.integers(2, 9), first_rank=st.integers(1, 5), second_rank=st.integers(1, 5))
def test_subspace_angles_agree_with_projectors(
    seed: int, dim: int, first_rank: int, second_rank: int
) -> None:
    generator = np.random.default_rng(seed)
    first = generator.standard_normal((dim, min(first_rank, dim)))
    second = generator.standard_normal((dim, min(second_rank, dim)))
    angles = measures.subspace_angles(first, second)
    assert len(angles) == min(first.shape[1], second.shape[1])
    assert np.all(np.diff(angles) >= 0)
    projectors = [m @ np.linalg.pinv(m) for m in (first, second)]
    squared = np.sort(np.linalg.eigvals(projectors[0] @ projectors[1]).real)[::-1][: len(angles)]
    # Projectors lose digits where random bases are badly conditioned.
    condition = max(np.linalg.cond(first), np.linalg.cond(second))
    np.testing.assert_allclose(np.cos(angles) ** 2, squared, atol=tolerance(np.float64, dim) * condition**2)


def test_subspace_angles_do_not_depend_on_the_basis() -> None:
    generator = np.random.default_rng(2)
    first, second = subspaces_at(generator, 9, np.array([0.2, 0.5, 1.2]))
    skewed = second @ (np.triu(generator.standard_normal((3, 3))) + 3 * np.eye(3)) * [1e-100, 1.0, 1e100]
    np.testing.assert_allclose(
        measures.subspace_angles(first, skewed), [0.2, 0.5, 1.2], rtol=10 * tolerance(np.float64, 9)
    )
    # A direction has an accuracy of 1e-7 in single precision.
    single = measures.subspace_angles(first.astype(np.float32), second.astype(np.float32))
    assert single.dtype == np.float64
    np.testing.assert_allclose(single, [0.2, 0.5, 1.2], atol=1e-6)


@settings(deadline=None)
@given(seed=seeds, first_rank=st.integers(1, 4), second_rank=st.integers(1, 4))
def test_subspace_cosines_agree_with_projectors(seed: int, first_rank: int, second_rank: int) -> None:
    generator = np.random.default_rng(seed)
    first, second = draw_orthonormal(generator, 8, first_rank), draw_orthonormal(generator, 8, second_rank)
    result = measures.subspace_cosine(first, second)
    rank, bound = min(first_rank, second_rank), tolerance(np.float64, 8)
    overlap = np.trace(first @ first.T @ second @ second.T) / rank
    assert result.overlap == pytest.approx(overlap, abs=bound)
    assert result.baseline == max(first_rank, second_rank) / 8
    cosines = np.cos(measures.subspace_angles(first, second))
    for name in ("minimum", "mean", "maximum"):
        expected = {"minimum": cosines[-1], "mean": np.mean(cosines), "maximum": cosines[0]}[name]
        assert getattr(result, name) == pytest.approx(expected, abs=bound)
    assert 0.0 <= result.minimum <= result.mean * (1 + bound)
    assert result.mean <= result.maximum * (1 + bound) <= 1 + bound


def test_subspace_cosine_baseline_is_the_mean_over_random_subspaces() -> None:
    generator = np.random.default_rng(3)
    fixed = np.eye(12)[:, :3]
    overlaps = [
        measures.subspace_cosine(fixed, draw_orthonormal(generator, 12, 3)).overlap for _ in range(2000)
    ]
    standard_error = np.std(overlaps) / np.sqrt(len(overlaps))
    assert abs(np.mean(overlaps) - 3 / 12) < 5 * standard_error


def test_subspace_cosine_of_a_subspace_with_itself() -> None:
    basis = draw_orthonormal(np.random.default_rng(4), 30, 8)
    result = measures.subspace_cosine(basis, -basis[:, ::-1])
    assert result.maximum <= 1.0
    np.testing.assert_allclose(result[:4], 1.0, rtol=tolerance(np.float64, 30))


@pytest.mark.parametrize("measure", [measures.subspace_angles, measures.subspace_cosine])
def test_errors_of_subspace_measures_name_bad_arguments(measure: Callable[[Any, Any], Any]) -> None:
    basis = np.eye(4)[:, :2]
    with pytest.raises(ShapeError, match=r"V has shape \(3, 2\); wanted \(4, any\)"):
        measure(basis, basis[:3])
    with pytest.raises(ShapeError, match="no more columns than rows"):
        measure(basis, np.ones((4, 5)))
    with pytest.raises(ValueError, match="V has linearly dependent columns: rank 1, wanted 2"):
        measure(basis, np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"U has a column of zeros, number 1"):
        measure(basis * [1.0, 0.0], basis)
    with pytest.raises(ValueError, match="not finite"):
        measure(np.where(basis == 1.0, np.inf, 0.0), basis)


@settings(deadline=None)
@given(seed=seeds, dim=st.integers(1, 12), missing=st.integers(0, 3), rank=st.integers(0, 7))
@example(seed=0, dim=9, missing=0, rank=2)
@example(seed=1, dim=12, missing=1, rank=1)
def test_vector_angles_equal_brute_force(seed: int, dim: int, missing: int, rank: int) -> None:
    generator = np.random.default_rng(seed)
    count = max(dim - missing, 1)
    vectors, initial = draw_orthonormal(generator, dim, count), draw_orthonormal(generator, dim, count)
    computed = measures.vector_angles(vectors, initial, rank)
    expected = np.arccos(np.minimum(np.abs(np.sum(vectors * initial, axis=0)), 1.0))
    middle = slice(rank, count - rank)
    if count > 2 * rank:
        # The largest angle has the sine ||P - Q||_2, P and Q the projectors.
        difference = vectors[:, middle] @ vectors[:, middle].T - initial[:, middle] @ initial[:, middle].T
        expected[middle] = np.arcsin(np.minimum(np.linalg.norm(difference, 2), 1.0))
    # arccos and arcsin lose half the digits at their ends.
    np.testing.assert_allclose(computed, expected, atol=1e-7)
    plain = reference.vector_angles(vectors, initial, rank)
    np.testing.assert_allclose(computed, plain, rtol=0, atol=tolerance(np.float64, dim))


@pytest.mark.parametrize("size", [0.0, 1e-12, 0.3, np.pi / 2 - 1e-12])
def test_vector_angles_of_the_middle_block_lose_no_digits(size: float) -> None:
    """All vectors are passed; those of the middle block rotate among themselves."""
    generator = np.random.default_rng(5)
    initial = draw_orthonormal(generator, 20, 20)
    turn = np.eye(20)
    turn[np.ix_([1, 7], [1, 7])] = [[np.cos(size), -np.sin(size)], [np.sin(size), np.cos(size)]]
    turn[:, 3:17] = turn[:, 3:17] @ draw_orthonormal(generator, 14, 14)
    angles = measures.vector_angles(initial @ turn, initial, rank=3)
    expected = np.where(np.isin(np.arange(20), [0, 2, 17, 18, 19]), 0.0, size)
    np.testing.assert_allclose(angles, expected, rtol=0, atol=tolerance(np.float64, 20))


def test_errors_of_vector_angles_name_bad_arguments() -> None:
    with pytest.raises(ShapeError, match=r"reference has shape \(3, 2\); wanted \(3, 3\)"):
        measures.vector_angles(np.eye(3), np.eye(3)[:, :2], 1)
    with pytest.raises(ValueError, match="vectors has a column of zeros, number 2"):
        measures.vector_angles(np.diag([1.0, 1.0, 0.0]), np.eye(3), 1)
    with pytest.raises(ValueError, match="rank is -1"):
        measures.vector_angles(np.eye(3), np.eye(3), -1)
    with pytest.raises(TypeError, match=r"rank is 1\.5"):
        measures.vector_angles(np.eye(3), np.eye(3), 1.5)  # type: ignore[arg-type]


# Ranks, norms and balance.


@settings(deadline=None)
@given(seed=seeds, rows=st.integers(1, 8), columns=st.integers(1, 8), rank=st.integers(0, 8))
def test_ranks_and_norms_equal_brute_force(seed: int, rows: int, columns: int, rank: int) -> None:
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((rows, rank)) @ generator.standard_normal((rank, columns))
    values = np.linalg.svd(matrix, compute_uv=False)
    assert measures.numerical_rank(matrix) == np.linalg.matrix_rank(matrix)
    assert measures.numerical_rank(matrix, "threshold", threshold=0.3) == sum(values > 0.3 * values[0])
    if rank == 0:
        assert measures.numerical_rank(matrix, "nuclear") == 0
        assert measures.stable_rank(matrix) == measures.effective_rank(matrix) == 0.0
        assert measures.schatten_norm(matrix, 3) == 0.0
        return
    nuclear = measures.numerical_rank(matrix, "nuclear", mass=0.8)
    assert sum(values[: nuclear - 1]) < 0.8 * sum(values) <= sum(values[:nuclear]) * (1 + 1e-12)
    bound = tolerance(np.float64, 8)
    norm = np.linalg.norm
    assert measures.stable_rank(matrix) == pytest.approx(norm(matrix) ** 2 / norm(matrix, 2) ** 2, rel=bound)
    shares = [float(value / np.sum(values)) for value in values]
    entropy = -sum(p * math.log(p) for p in shares if p > 0)
    assert measures.effective_rank(matrix) == pytest.approx(math.exp(entropy), rel=bound)
    for p, expected in ((1, norm(matrix, "nuc")), (2, norm(matrix)), (np.inf, norm(matrix, 2))):
        assert measures.schatten_norm(matrix, p) == pytest.approx(expected, rel=bound)
    assert measures.schatten_norm(matrix, 0.5) == pytest.approx(sum(values**0.5) ** 2, rel=bound)


@given(seeds, st.integers(1, 12), st.integers(1, 12), st.integers(1, 14))
def test_energy_is_that_of_the_best_approximation(seed: int, rows: int, columns: int, k: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    best = (left[:, :k] * values[:k]) @ right[:k]
    bound = tolerance(np.float64, max(rows, columns))
    norm = np.linalg.norm
    wanted = norm(best) ** 2 / norm(matrix) ** 2
    assert measures.energy_share(matrix, k) == pytest.approx(wanted, abs=bound)
    assert measures.energy_share(values[::-1], k) == pytest.approx(wanted, abs=bound)


def test_energy_in_limiting_cases() -> None:
    assert measures.energy_share(np.zeros((3, 2)), 1) == 0.0
    assert measures.energy_share(np.full(3, 1e-300), 2) == pytest.approx(2 / 3)
    assert measures.energy_share([1.0, 2.0], 9) == 1.0
    with pytest.raises(ValueError, match="k is 0"):
        measures.energy_share([1.0], 0)


@given(seeds, st.integers(2, 9), st.integers(2, 9), st.floats(0.01, 100.0))
def test_image_angles_are_nonzero_only_along_changed_directions(
    seed: int, rows: int, columns: int, size: float
) -> None:
    generator = np.random.default_rng(seed)
    start = generator.standard_normal((rows, columns))
    directions = draw_orthonormal(generator, columns, columns)
    left = generator.standard_normal((rows, 1))
    moved = start + size * left @ directions[:, :1].T
    angles = measures.image_angles(moved, start, directions)
    # The change is orthogonal to the others up to rounding; their images may be short.
    images = np.linalg.norm(start @ directions, axis=0)
    slack = 4 * tolerance(np.float64, columns) * (np.linalg.norm(moved) + np.linalg.norm(start)) / images
    assert np.all(angles[1:] <= slack[1:])
    first = [matrix @ directions[:, 0] for matrix in (moved, start)]
    cosine = abs(first[0] @ first[1]) / (np.linalg.norm(first[0]) * np.linalg.norm(first[1]))
    assert np.cos(angles[0]) == pytest.approx(cosine, abs=float(slack[0]) + 1e-12)


def test_vanishing_images_have_no_angle() -> None:
    angles = measures.image_angles([[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]], np.eye(3))
    np.testing.assert_array_equal(angles, [np.pi / 2, np.pi / 2, 0.0])
    with pytest.raises(ShapeError, match="W_0"):
        measures.image_angles(np.eye(2), np.eye(3), np.eye(2))
    with pytest.raises(ShapeError, match="vectors"):
        measures.image_angles(np.eye(2), np.eye(2), np.eye(3))


@pytest.mark.parametrize("factor", [1e-300, 1e-30, 1.0, 1e300])
def test_ranks_do_not_depend_on_the_scale(factor: float) -> None:
    values = np.array([0.5, 4.0, 2.0, 0.0])
    for measure in (measures.stable_rank, measures.effective_rank, measures.numerical_rank):
        assert measure(factor * values) == pytest.approx(measure(values), rel=tolerance(np.float64, 4))
    assert measures.schatten_norm(factor * values, 3) == pytest.approx(
        factor * measures.schatten_norm(values, 3), rel=tolerance(np.float64, 4)
    )


def test_ranks_of_equal_singular_values() -> None:
    assert measures.effective_rank(np.eye(7)) == pytest.approx(7.0, rel=tolerance(np.float64, 7))
    assert measures.stable_rank(np.eye(7)) == 7.0
    assert [measures.numerical_rank(np.eye(20), kind) for kind in ("machine", "nuclear", "threshold")] == [
        20, 19, 20,
    ]  # fmt: skip
    assert measures.numerical_rank(np.eye(20), "nuclear", mass=1.0) == 20


def test_machine_rank_depends_on_precision_and_shape() -> None:
    values = [1.0, 1e-5, 1e-8]
    assert measures.numerical_rank(np.array(values)) == 3
    assert measures.numerical_rank(np.array(values, dtype=np.float32)) == 2
    assert measures.numerical_rank(np.array(values, dtype=np.float32), shape=(1000, 3)) == 1


@pytest.mark.parametrize(
    "measure",
    [
        measures.numerical_rank,
        measures.stable_rank,
        measures.effective_rank,
        lambda w: measures.schatten_norm(w, 2),
    ],
)
def test_errors_of_spectral_measures_name_bad_arguments(measure: Callable[[Any], float]) -> None:
    with pytest.raises(ValueError, match=r"singular values\) has a negative value, -1"):
        measure([1.0, -1.0])
    with pytest.raises(ValueError, match="not finite"):
        measure([[1.0, np.nan]])
    with pytest.raises(ShapeError, match=r"matrix .*shape \(1, 1, 1\)"):
        measure([[[1.0]]])
    with pytest.raises(ShapeError, match="empty"):
        measure([])


def test_errors_of_spectral_measures_name_bad_levels() -> None:
    with pytest.raises(ValueError, match=r"kind is 'numerical'; wanted one of 'machine'"):
        measures.numerical_rank([1.0], "numerical")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mass is 1\.5"):
        measures.numerical_rank([1.0], "nuclear", mass=1.5)
    with pytest.raises(ValueError, match="threshold is 1;"):
        measures.numerical_rank([1.0], "threshold", threshold=1.0)
    for p in (0.0, -1.0, np.nan, -np.inf):
        with pytest.raises(ValueError, match="p is"):
            measures.schatten_norm([1.0], p)


def test_balancedness_of_orthogonal_layers_is_their_difference_of_scales() -> None:
    generator = np.random.default_rng(6)
    weights = [scale * draw_orthonormal(generator, 6, 6) for scale in (0.5, 0.5, 0.1)]
    expected = [0.0, (0.25 - 0.01) * np.sqrt(6)]
    np.testing.assert_allclose(measures.balancedness(weights), expected, atol=tolerance(np.float64, 6))
    assert measures.balancedness(weights[:1]).shape == (0,)


def test_balancedness_is_conserved_by_the_flow() -> None:
    """Descent changes W_{l+1}^T W_{l+1} - W_l W_l^T by O(rate^2) per step: half the rate, half the change."""
    generator = np.random.default_rng(7)
    weights = [0.5 * draw_orthonormal(generator, 6, 6) for _ in range(3)]
    target = generator.standard_normal((6, 6))
    changes = []
    for rate, steps in ((2e-3, 400), (1e-3, 800), (5e-4, 1600)):
        *_, (loss, final) = reference.train_dense(
            weights, target, loss_scale=1.0, learning_rate=[rate] * 3, steps=steps, weight_decay=[0.0] * 3,
            momentum=[0.0] * 3,
        )  # fmt: skip
        changes.append(measures.balancedness(final))
    assert loss < 0.5 * reference.loss(weights, target, None, 1.0)
    assert np.all(changes[0] < 0.02)
    np.testing.assert_allclose(changes[0] / changes[1], 2.0, rtol=0.05)
    np.testing.assert_allclose(changes[1] / changes[2], 2.0, rtol=0.05)


def test_errors_of_balancedness_name_bad_arguments() -> None:
    with pytest.raises(ShapeError, match=r"weights\[1\] \(W_2\) has shape \(3, 3\); wanted \(any, 2\)"):
        measures.balancedness([np.ones((2, 3)), np.ones((3, 3))])
    with pytest.raises(ShapeError, match="weights is empty"):
        measures.balancedness([])


def test_mode_strengths_ignore_components_orthogonal_to_the_mode() -> None:
    generator = np.random.default_rng(8)
    left, right = draw_orthonormal(generator, 5, 2), draw_orthonormal(generator, 4, 2)
    problem = Problem(left @ np.diag([3.0, 1.0]) @ right.T)
    across = left[:, :1] @ right[:, 1:].T
    found = measures.mode_strengths(problem, problem.dense_target() * 2 + 7 * across)
    np.testing.assert_allclose(found, [6.0, 2.0], rtol=tolerance(np.float64, 5))
    with pytest.raises(ShapeError, match="W has shape"):
        measures.mode_strengths(problem, np.ones((4, 5)))


# The landscape.


def whole_hessian(problem: Problem, weights: list[Array]) -> Array:
    """Form the Hessian column by column."""
    sizes = np.cumsum([w.size for w in weights])
    columns = []
    for vector in np.eye(sizes[-1]):
        parts = np.split(vector, sizes[:-1])
        directions = [part.reshape(w.shape) for part, w in zip(parts, weights, strict=True)]
        changes = reference.hessian_product(
            weights, directions, problem.dense_target(), problem.input_gram, problem.loss_scale
        )
        columns.append(np.concatenate([change.ravel() for change in changes]))
    return np.array(columns)


@settings(deadline=None, max_examples=30)
@given(widths=st.lists(st.integers(1, 5), min_size=2, max_size=5), white=st.booleans(), seed=seeds)
def test_sharpness_is_the_largest_eigenvalue(widths: list[int], white: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    root = generator.standard_normal((widths[0], widths[0] + 2))
    target = generator.standard_normal((widths[-1], widths[0]))
    problem = Problem(target, None if white else root @ root.T, 0.3)
    weights = [generator.standard_normal((rows, columns)) for columns, rows in pairwise(widths)]
    eigenvalues = np.linalg.eigvalsh(whole_hessian(problem, weights))
    scale = np.max(np.abs(eigenvalues))
    for limit in (1e-6, 1e-11):
        assert abs(measures.sharpness(problem, weights, tolerance=limit) - eigenvalues[-1]) <= limit * scale


def test_sharpness_at_the_balanced_minimum_is_two_over_the_threshold() -> None:
    generator = np.random.default_rng(0)
    left, right = draw_orthonormal(generator, 30, 30), draw_orthonormal(generator, 30, 30)
    values = np.linspace(3.0, 1.0, 30)
    roots = np.diag(values ** (1 / 3))
    problem = Problem(left @ np.diag(values) @ right.T, loss_scale=0.01)
    found = measures.sharpness(problem, [roots @ right.T, roots, left @ roots], tolerance=1e-9)
    assert found == pytest.approx(2 / theory.stability_threshold(3.0, 3, 0.01), rel=1e-9)


def test_sharpness_at_stationary_points() -> None:
    problem = Problem([[2.0, 0.0]])
    assert measures.sharpness(problem, [[[0.0, 0.0]]]) == pytest.approx(1.0)
    assert measures.sharpness(Problem([[0.0]]), [[[0.0]]] * 3) == 0.0
    assert measures.sharpness(Problem([[1.0]]), [[[0.0]]] * 2) == pytest.approx(1.0)  # a saddle


def test_errors_of_sharpness_name_bad_arguments() -> None:
    problem = Problem([[2.0, 0.0]])
    with pytest.raises(ShapeError, match="weights is empty; wanted at least one layer"):
        measures.sharpness(problem, [])
    with pytest.raises(ShapeError, match="weights end with 3 rows"):
        measures.sharpness(problem, [np.ones((3, 2))])
    with pytest.raises(ShapeError, match=r"weights\[1\] \(W_2\) has shape \(1, 2\); wanted \(any, 3\)"):
        measures.sharpness(problem, [np.ones((3, 2)), np.ones((1, 2))])
    with pytest.raises(ValueError, match="tolerance is 0"):
        measures.sharpness(problem, [np.ones((1, 2))], tolerance=0.0)


def test_sharpness_that_does_not_converge_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Problem(np.diag(np.linspace(1.0, 2.0, 20)))
    weights = list(np.random.default_rng(0).standard_normal((2, 20, 20)))
    monkeypatch.setattr(measures, "_MAX_ITERATIONS", 5)
    with pytest.raises(ValueError, match="not reached after 5 iterations"):
        measures.sharpness(large, weights)


@pytest.mark.parametrize("level", [1e-300, 1e-170, 1e-80, 1e80, 1e150])
def test_measures_do_not_depend_on_the_scale(level):
    """Squares of entries far from 1 overflow or vanish; the measures are of ratios, or scale with them."""
    rng = np.random.default_rng(0)
    W, V = rng.standard_normal((6, 5)), rng.standard_normal((5, 5))
    for measure in (measures.stable_rank, measures.effective_rank, measures.numerical_rank):
        assert measure(level * W) == pytest.approx(measure(W), rel=1e-13)
    assert measures.schatten_norm(level * W, 2) == pytest.approx(
        level * measures.schatten_norm(W, 2), rel=1e-13
    )
    assert measures.energy_share(level * W, 2) == pytest.approx(measures.energy_share(W, 2), rel=1e-13)
    start = rng.standard_normal((6, 5))
    for columns in (V, level * V):
        found = measures.image_angles(level * W, start, columns)
        np.testing.assert_allclose(found, measures.image_angles(W, start, V), rtol=1e-12)
    pair = [rng.standard_normal((5, 4)), W]
    if level >= 1e-150:  # a multiple of its square, which is a number then
        found = measures.balancedness([level * w for w in pair])
        np.testing.assert_allclose(found, level * (level * measures.balancedness(pair)), rtol=1e-12)


def test_imbalance_that_overflows_is_infinite_and_never_nan():
    assert measures.balancedness([1e200 * np.eye(2), 2e200 * np.eye(2)])[0] == np.inf
    assert measures.balancedness([1e-200 * np.eye(2), 2e-200 * np.eye(2)])[0] == 0.0
