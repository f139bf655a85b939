# SPDX-License-Identifier: MIT
"""Edge, variance and planted singular values of random matrices, against samples and exact formulas.

``python tests/test_noise_edge.py REPETITIONS`` prints the shares and thresholds of the two tests of samples
for 20 shapes and many repetitions.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
from tolerances import tolerance

import dlnfast as dln
from dlnfast import measures
from dlnfast._noise.tracy_widom import airy, distribution_function, upper_quantile

SMALL_SHAPES = [(30, 30), (30, 60), (45, 90), (30, 300), (60, 60), (100, 50), (200, 20)]
SHAPES = [
    *((30, 30), (30, 60), (30, 150), (30, 300), (30, 1500), (45, 60), (60, 60), (60, 600), (60, 3000)),
    *((100, 100), (100, 400), (100, 1000), (150, 300), (200, 200), (200, 600), (300, 300), (300, 900)),
    *((500, 500), (500, 1000), (1000, 1000)),
]


def sample_spectrum(shape, generator):
    """Return all singular values of a Gaussian matrix, from the bidiagonal form that it reduces to.

    The entries of the bidiagonal matrix are independent and chi-distributed (Dumitriu and Edelman, J. Math.
    Phys. 43, 2002).
    """
    from scipy.linalg import eigvalsh_tridiagonal

    few, many = sorted(shape)
    diagonal = generator.chisquare(many - np.arange(few))
    below = generator.chisquare(np.arange(few - 1, 0, -1))
    squares = diagonal + np.r_[0.0, below]
    return np.sqrt(np.maximum(eigvalsh_tridiagonal(squares, np.sqrt(diagonal[:-1] * below)), 0.0))[::-1]


def count_false(shape, repetitions, generator):
    """Count matrices of noise with a value beyond the edge: variance known, estimated, or from 8 values."""
    found = np.zeros(3, dtype=int)
    for _ in range(repetitions):
        values = sample_spectrum(shape, generator)
        norm = float(np.linalg.norm(values))
        found += [
            measures.rank_above_noise(values, 1.0, shape=shape) > 0,
            measures.rank_above_noise(values, shape=shape) > 0,
            measures.rank_above_noise(values[:8], shape=shape, norm=norm) > 0,
        ]
    return found


def plant(shape, theta, generator):
    """Return noise of variance 1 with a planted singular value, and its left and right vectors."""
    u, v = (generator.standard_normal(size) for size in shape)
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    return generator.standard_normal(shape) + theta * np.outer(u, v), u, v


def find_detected_strength(shape, repetitions, generator):
    """Return the planted singular value that `rank_above_noise` finds in half of the matrices.

    By the logistic fit of the share of findings near the expected threshold.
    """
    wanted = measures.spike_threshold(shape, 1.0, level=0.01)
    factors = np.linspace(0.8, 1.2, 9)
    shares = []
    for factor in factors:
        ranks = [
            measures.rank_above_noise(plant(shape, factor * wanted, generator)[0]) for _ in range(repetitions)
        ]
        shares.append(np.mean(np.array(ranks) > 0))
    smooth = np.clip(shares, 0.5 / repetitions, 1 - 0.5 / repetitions)
    slope, offset = np.polyfit(factors, np.log(smooth / (1 - smooth)), 1)
    return -offset / slope * wanted


def find_visible_strength(shape, repetitions, generator):
    """Return the planted singular value at which the leading vectors start to know the planted ones.

    The squared cosine of the left vectors is ``(theta^4 - t^4) / (theta^2 (theta^2 + m))`` above the
    threshold t (Benaych-Georges and Nadakuditi). Solve for t in the mean over samples above it.
    """
    rows, columns = shape
    limit = (rows * columns) ** 0.25
    found = []
    for factor in np.repeat([1.3, 1.6, 2.0], repetitions):
        theta = factor * limit
        matrix, u, v = plant(shape, theta, generator)
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        for cosine, size in ((left[:, 0] @ u, rows), (right[0] @ v, columns)):
            found.append(theta**4 - cosine**2 * theta**2 * (theta**2 + size))
    return np.mean(found) ** 0.25


# ------------------------------------------------------------------------------------ null distribution


def test_the_airy_function_agrees_with_scipy():
    scipy_special = pytest.importorskip("scipy.special", reason="SciPy is optional")
    x = np.linspace(-5.0, 20.0, 101)
    np.testing.assert_allclose(airy(x), scipy_special.airy(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("probability", "quantile"), [(0.5, -1.26857), (0.9, 0.45014), (0.95, 0.97932), (0.99, 2.02345)]
)
def test_quantiles_of_tracy_widom_are_the_published_ones(probability, quantile):
    assert upper_quantile(1 - probability) == pytest.approx(quantile, abs=1e-5)
    assert distribution_function(upper_quantile(1 - probability)) == pytest.approx(probability, abs=1e-8)


def test_few_matrices_of_noise_have_a_value_beyond_the_edge():
    pytest.importorskip("scipy.linalg", reason="SciPy is optional")
    generator = np.random.default_rng(0)
    found = sum(count_false(shape, 400, generator) for shape in SMALL_SHAPES)
    n_all = 400 * len(SMALL_SHAPES)
    # At a probability of 1 % the numbers have a standard deviation of 0.19 % of all.
    assert np.all(found / n_all < 0.0125)
    assert found[0] / n_all > 0.004  # the edge is no further out than it must be


@pytest.mark.parametrize("level", [0.2, 0.01])
def test_the_level_is_the_probability_of_a_larger_value(level):
    pytest.importorskip("scipy.linalg", reason="SciPy is optional")
    generator, shape = np.random.default_rng(1), (40, 80)
    edge = measures.noise_edge(shape, 4.0, level=level) / 2
    share = np.mean([sample_spectrum(shape, generator)[0] > edge for _ in range(4000)])
    assert 0.6 * level < share < 1.1 * level


@pytest.mark.parametrize("shape", [(400, 400), (100, 800), (300, 200)])
def test_the_bulk_of_a_matrix(shape):
    values = np.linalg.svd(np.random.default_rng(2).normal(0, 0.3, shape), compute_uv=False)
    lower, median, upper = measures.noise_bulk(shape, 0.09)
    size = max(shape) ** 0.5 * 0.3
    assert abs(np.median(values) - median) < 0.01 * size
    assert abs(values[0] - upper) < 0.05 * size
    assert abs(values[-1] - lower) < 0.05 * size
    assert measures.noise_bulk(shape[::-1], 0.09) == (lower, median, upper)


# --------------------------------------------------------------------------------------------- variance


@pytest.mark.parametrize("method", ["energy", "median"])
@pytest.mark.parametrize(("shape", "rank"), [((120, 120), 0), ((120, 120), 12), ((80, 400), 20)])
def test_the_variance_is_that_of_the_noise(shape, rank, method):
    generator = np.random.default_rng(3)
    left = np.linalg.qr(generator.standard_normal((shape[0], max(rank, 1))))[0][:, :rank]
    right = np.linalg.qr(generator.standard_normal((shape[1], max(rank, 1))))[0][:, :rank]
    matrix = generator.normal(0, 0.2, shape) + 20.0 * left @ right.T
    # The bulk left by a low rank is smaller by the rank's share of it: 1 / min(m, n) for each.
    assert measures.noise_variance(matrix, method=method) == pytest.approx(0.04, rel=0.08)
    assert measures.rank_above_noise(matrix) == rank
    values = np.linalg.svd(matrix, compute_uv=False)
    from_values = measures.noise_variance(values, shape=shape, method=method)
    assert from_values == pytest.approx(measures.noise_variance(matrix, method=method), rel=1e-9)


def test_leading_values_and_the_norm_are_enough():
    generator = np.random.default_rng(4)
    matrix = generator.standard_normal((90, 60)) + np.outer(np.ones(90), np.ones(60))
    values = np.linalg.svd(matrix, compute_uv=False)
    norm = float(np.linalg.norm(matrix))
    found = measures.noise_variance(values[:5], shape=(90, 60), norm=norm)
    assert found == pytest.approx(measures.noise_variance(matrix), rel=1e-9)
    assert measures.rank_above_noise(values[:5], shape=(90, 60), norm=norm) == 1
    assert measures.rank_above_noise(values[:5], 1.0, shape=(90, 60)) == 1


def test_many_values_of_the_low_rank_part_do_not_hide_each_other():
    generator = np.random.default_rng(5)
    left, right = (np.linalg.qr(generator.standard_normal((200, 70)))[0] for _ in range(2))
    matrix = generator.standard_normal((200, 200)) + 3 * np.sqrt(200) * left @ right.T
    assert measures.rank_above_noise(matrix) == 70


def test_matrices_without_noise():
    assert measures.noise_variance(np.zeros((4, 6))) == 0.0
    assert measures.rank_above_noise(np.zeros((4, 6))) == 0
    product = np.random.default_rng(6).standard_normal((50, 3)) @ np.ones((3, 40))
    assert measures.rank_above_noise(product) == 1  # rounding errors do not count
    full = np.diag([3.0, 2.0])
    assert measures.rank_above_noise(full, 0.0) == 2


def test_results_scale_with_the_matrix():
    matrix = np.random.default_rng(7).standard_normal((40, 50)) + 1.0
    for factor in (1e-150, 1e150):
        assert measures.rank_above_noise(factor * matrix) == 1
        found = measures.noise_variance(factor * matrix) / factor / factor
        assert found == pytest.approx(measures.noise_variance(matrix), rel=tolerance(np.float64, 2000))


# ------------------------------------------------------------------------------------ planted values


@pytest.mark.parametrize("shape", [(60, 60), (50, 200), (300, 40)])
def test_strength_is_the_inverse_of_position(shape):
    threshold = measures.spike_threshold(shape, 0.25)
    planted = threshold * np.array([1.001, 1.5, 4.0, 1e6])
    observed = measures.spike_position(planted, shape, 0.25)
    # Near the threshold the inverse is a square root.
    np.testing.assert_allclose(measures.spike_strength(observed, shape, 0.25), planted, rtol=1e-9)
    edge = measures.noise_bulk(shape, 0.25).upper
    np.testing.assert_allclose(measures.spike_position([0.0, threshold], shape, 0.25), edge, rtol=1e-14)
    assert not measures.spike_strength([0.0, 0.999 * edge], shape, 0.25).any()


def test_planted_values_appear_where_they_are_expected():
    generator, shape = np.random.default_rng(8), (150, 250)
    theta = np.array([60.0, 40.0, 30.0])
    left, right = (np.linalg.qr(generator.standard_normal((size, 3)))[0] for size in shape)
    values = [
        np.linalg.svd(generator.standard_normal(shape) + left * theta @ right.T, compute_uv=False)[:3]
        for _ in range(30)
    ]
    # The mean of 30 values, each with a standard deviation of about 1.
    found = np.mean(values, axis=0)
    np.testing.assert_allclose(found, measures.spike_position(theta, shape, 1.0), atol=0.8)
    np.testing.assert_allclose(measures.spike_strength(found, shape, 1.0), theta, rtol=0.04)


@pytest.mark.parametrize("shape", [(100, 100), (60, 240)])
def test_values_are_detected_from_the_threshold_on(shape):
    wanted = measures.spike_threshold(shape, 1.0, level=0.01)
    assert wanted > measures.spike_threshold(shape, 1.0)
    assert find_detected_strength(shape, 60, np.random.default_rng(9)) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("shape", [(120, 120), (60, 240)])
def test_vectors_are_known_from_the_threshold_on(shape):
    wanted = measures.spike_threshold(shape, 1.0)
    assert find_visible_strength(shape, 40, np.random.default_rng(10)) == pytest.approx(wanted, rel=0.05)


# --------------------------------------------------------------------------------------------- directions


def test_layers_whose_changes_fit_together_are_aligned():
    generator = np.random.default_rng(11)
    shared = np.linalg.qr(generator.standard_normal((30, 2)))[0]
    lower = shared @ generator.standard_normal((2, 20)) + 0.01 * generator.standard_normal((30, 20))
    upper = generator.standard_normal((10, 2)) @ shared.T + 0.01 * generator.standard_normal((10, 30))
    [aligned] = measures.layer_alignment([lower, upper], 2)
    assert aligned.minimum > 0.99
    assert aligned.baseline == 2 / 30
    draws = [
        measures.layer_alignment(
            [generator.standard_normal((30, 20)), generator.standard_normal((10, 30))], 2
        )
        for _ in range(200)
    ]
    assert np.mean([pair.overlap for [pair] in draws]) == pytest.approx(2 / 30, rel=0.1)
    with pytest.raises(ValueError, match=r"weights\[1\] has the rank 1; wanted at least k, 2"):
        measures.layer_alignment([lower, np.ones((10, 30))], 2)


def test_intruders_are_directions_that_the_base_does_not_lead():
    generator = np.random.default_rng(12)
    base = generator.standard_normal((60, 60)) + np.outer(np.ones(60), np.ones(60))
    direction = np.linalg.qr(np.c_[np.ones(60), generator.standard_normal(60)])[0][:, 1:]
    tuned = base + 200 * direction @ generator.standard_normal((1, 60)) / 60**0.5
    before, after = (np.linalg.svd(weight)[0][:, :4] for weight in (base, tuned))
    assert 0 in measures.intruder_directions(after, before)
    assert len(measures.intruder_directions(before, before, threshold=1.0 - 1e-9)) == 0
    with pytest.raises(ValueError, match="threshold"):
        measures.intruder_directions(after, before, threshold=0.0)


# ------------------------------------------------------------------------------------------- trajectories


@pytest.fixture(scope="module")
def run():
    record = dln.Record(vectors=True, every=10)
    weights = dln.gaussian([24] * 4, 0.5, seed=0)
    return dln.train(
        dln.low_rank_recovery(24, 2), weights, learning_rate=0.05, steps=40, engine="dense", record=record
    )


def test_readings_of_a_run_are_the_measures_of_its_weights(run):
    variances = run.noise_variance(1)
    assert variances.shape == (5,)
    for row, step in enumerate(run.steps):
        weight = run.weights(1, int(step))
        assert variances[row] == pytest.approx(measures.noise_variance(weight), rel=1e-9)
        assert run.rank_above_noise(1)[row] == measures.rank_above_noise(weight)
        edge = measures.noise_edge(weight.shape, float(variances[row]))
        assert run.noise_edge(1)[row] == pytest.approx(edge, rel=1e-12)
    assert set(run.noise_edge(1, 0.25, level=0.1)) == {measures.noise_edge((24, 24), 0.25, level=0.1)}
    first = [run.weights(layer, 0) for layer in (1, 2)]
    [wanted] = measures.layer_alignment(first, 2)
    assert run.layer_alignment(1, 2, 2)["overlap"][0] == pytest.approx(wanted.overlap, rel=1e-9)
    assert not run.intruder_directions(1, 1.0 - 1e-6)[0].any()
    assert run.intruder_directions(1, 1.0 - 1e-6)[-1].any()


def test_few_recorded_values_need_the_norm():
    record = dln.Record(singular_values=3, tracking="dense")
    weights = dln.gaussian([24] * 3, 0.5, seed=0)
    few = dln.train(
        dln.low_rank_recovery(24, 2), weights, learning_rate=0.05, steps=4, engine="dense", record=record
    )
    wanted = [measures.noise_variance(few.weights(1, step)) for step in (0, -1)]
    assert few.noise_variance(1)[[0, -1]] == pytest.approx(wanted, rel=1e-4)


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measures.noise_edge((3,), 1.0), r"shape is \(3,\); wanted two numbers"),
        (lambda: measures.noise_edge((3, 0), 1.0), r"shape\[1\] is 0"),
        (lambda: measures.noise_edge((3, 4), -1.0), "entry_variance is -1"),
        (lambda: measures.noise_edge((3, 4), 1.0, level=0.9), "level is 0.9"),
        (lambda: measures.noise_variance([1.0]), "shape is missing"),
        (lambda: measures.noise_variance([1.0], shape=(2, 2)), "norm is missing"),
        (lambda: measures.noise_variance([2.0], shape=(2, 2), norm=1.0), "norm is 1, below"),
        (lambda: measures.noise_variance([2.0], shape=(2, 2), norm=3.0, method="median"), "needs all 2"),
        (lambda: measures.noise_variance([1.0, 1.0, 1.0], shape=(2, 2)), "holds 3 singular values"),
        (lambda: measures.noise_variance(np.eye(2), shape=(2, 3)), r"shape is \(2, 3\), but"),
        (lambda: measures.noise_variance(np.eye(2), method="mean"), "method is 'mean'"),
        (lambda: measures.spike_position([-1.0], (2, 2), 1.0), "planted has a negative value"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def print_measurements(repetitions):
    """Print the shares of false findings, and the thresholds of planted values, for all shapes."""
    generator = np.random.default_rng(100)
    print("shape, share of matrices with a value beyond the edge: known, estimated, estimated from 8 values")
    total = np.zeros(3)
    for shape in SHAPES:
        found = count_false(shape, repetitions, generator)
        total += found
        print(shape, *(f"{share:.2%}" for share in found / repetitions), flush=True)
    print("all", *(f"{share:.3%}" for share in total / repetitions / len(SHAPES)))
    print("shape, threshold over theory: detected by rank_above_noise, known vectors")
    for shape in [(60, 60), (40, 160), (100, 100), (30, 600), (200, 200), (150, 600)]:
        detected = find_detected_strength(shape, 200, generator) / measures.spike_threshold(
            shape, 1.0, level=0.01
        )
        visible = find_visible_strength(shape, 100, generator) / measures.spike_threshold(shape, 1.0)
        print(shape, f"{detected:.3f} {visible:.3f}", flush=True)


if __name__ == "__main__":
    print_measurements(int(sys.argv[1]))
