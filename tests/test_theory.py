# SPDX-License-Identifier: MIT
"""The closed forms against runs, and the figures published for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers.matrices import draw_orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import measures, reference, theory

Array = npt.NDArray[Any]


def plain_descent(
    weights: list[Array], target: Array, rate: float, steps: int, loss_scale: float = 1.0
) -> Iterator[tuple[float, list[Array]]]:
    zeros = [0.0] * len(weights)
    return reference.train_dense(
        weights, target, loss_scale=loss_scale, learning_rate=[rate] * len(weights), steps=steps,
        weight_decay=zeros, momentum=zeros,
    )  # fmt: skip


# rho.


def test_rho_has_the_published_values_of_svd_evolution() -> None:
    generator = np.random.default_rng(0)
    left, values, right_t = np.linalg.svd(generator.standard_normal((30, 30)))
    target = left[:, :3] * values[:3] @ right_t[:3]
    weights = [draw_orthonormal(generator, 30, 30) for _ in range(3)]
    *_, (_, final) = plain_descent(weights, target, rate=1.0, steps=50, loss_scale=1 / 900)
    flow = theory.rho_flow(50, scale=1.0, n_layers=3, loss_scale=1 / 900, learning_rate=1.0)
    assert round(float(flow), 4) == 0.9511
    for weight in final:
        middle = reference.singular_values(weight)[3:27]
        np.testing.assert_allclose(middle, middle[0], rtol=tolerance(np.float64, 30, 50))
        assert round(float(middle[0]), 4) == 0.9510


@pytest.mark.parametrize("n_layers", [1, 2, 3, 5])
def test_rho_of_descent_tends_to_the_flow(n_layers: int) -> None:
    """With target 0 every singular value is rho; half the step size, half the distance to the flow."""
    errors = []
    for rate in (1e-2, 5e-3):
        run = plain_descent([np.eye(2) * 0.9] * n_layers, np.zeros((2, 2)), rate, int(3 / rate))
        rho = np.array([weights[0][0, 0] for _, weights in run])
        flow = theory.rho_flow(np.arange(len(rho)), 0.9, n_layers, 1.0, rate)
        errors.append(np.max(np.abs(rho - flow)))
    assert errors[0] < 5e-3
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.05)


@settings(deadline=None)
@given(
    time=st.floats(0.0, 1e6),
    scale=st.floats(1e-3, 2.0),
    n_layers=st.integers(2, 8),
    rate=st.floats(1e-6, 1.0),
)
def test_rho_equals_the_formula(time: float, scale: float, n_layers: int, rate: float) -> None:
    power = 2 * n_layers - 2
    expected = (scale**-power + power * 0.3 * rate * time) ** (-1 / power)
    computed = theory.rho_flow(time, scale, n_layers, 0.3, rate)
    assert computed == pytest.approx(expected, rel=tolerance(np.float64, power))


def test_rho_in_limiting_cases() -> None:
    np.testing.assert_array_equal(theory.rho_flow([0.0, 5.0], 0.0, 3, 1.0, 1.0), [0.0, 0.0])
    # eps^(2 - 2L) would overflow here.
    assert theory.rho_flow(1e9, 1e-3, 200, 1.0, 1.0) == pytest.approx(1e-3, rel=1e-12)
    assert theory.rho_flow(np.ones((2, 3)), 0.5, 3, 1.0, 0.1).shape == (2, 3)
    with pytest.raises(ValueError, match=r"time \(t\) has a value that is negative"):
        theory.rho_flow([1.0, -1.0], 0.5, 3, 1.0, 0.1)
    with pytest.raises(ValueError, match="n_layers is 0"):
        theory.rho_flow(1.0, 0.5, 0, 1.0, 0.1)


# The split in the first step.


def draw_low_rank_problem(generator: np.random.Generator, rows: int, cols: int, rank: int) -> dln.Problem:
    return dln.Problem(generator.standard_normal((rows, rank)) @ generator.standard_normal((rank, cols)))


def after_one_step(split: theory.FirstOrderSplit, *, scale: float, rate: float) -> Array:
    """Return the singular values that the split predicts, descending."""
    rates = np.concatenate([split.rates, np.full(split.multiplicity, split.common_rate)])
    return np.sort(scale + rate * rates)[::-1]


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize(
    ("dim", "n_outputs", "rank", "n_layers"),
    [(9, 9, 2, 3), (12, 12, 1, 1), (8, 8, 4, 2), (7, 7, 6, 2), (5, 5, 0, 3), (11, 3, 3, 3), (12, 5, 2, 4)],
)
def test_the_split_equals_the_first_step(
    dim: int, n_outputs: int, rank: int, n_layers: int, scale: float
) -> None:
    """r rise; r fall, or all K with a wide last layer; half the step, a quarter of the error."""
    problem = draw_low_rank_problem(np.random.default_rng(dim), n_outputs, dim, rank)
    weights = dln.orthogonal([dim] * n_layers + [n_outputs], scale, seed=1)
    for layer in range(1, n_layers + (n_outputs == dim)):
        split = theory.first_order_split(problem, weights, layer)
        if 2 * rank <= dim:
            n_falling = rank if n_outputs == dim else n_outputs
            assert (split.n_rising, split.n_falling) == (rank, n_falling)
            assert split.multiplicity == dim - rank - n_falling
        assert len(split.rates) + split.multiplicity == dim
        errors = []
        for rate in (2e-4, 1e-4):
            run = dln.train(problem, weights, learning_rate=rate, steps=1)
            errors.append(
                np.max(np.abs(run.singular_values(layer)[1] - after_one_step(split, scale=scale, rate=rate)))
            )
        assert errors[0] < 1e-4
        if rank > 0:
            assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("n_outputs", [10, 4])
def test_rates_are_the_eigenvalues_of_the_formula(n_outputs: int) -> None:
    problem = draw_low_rank_problem(np.random.default_rng(2), n_outputs, 10, 3)
    scales = [0.5, 1.0, 0.8]
    weights = dln.orthogonal([10, 10, 10, n_outputs], scales, seed=3)
    product = np.prod(scales)
    frame = (weights[2] @ weights[1] @ weights[0]).T / product
    inner = frame @ problem.dense_target()
    expected = np.linalg.eigvalsh((inner + inner.T) / 2 - product * frame @ frame.T)[::-1]
    for layer in (1, 2):
        split = theory.first_order_split(problem, weights, layer)
        found = after_one_step(split, scale=0.0, rate=1.0)
        bound = tolerance(np.float64, 10) * np.max(np.abs(found))
        np.testing.assert_allclose(found, product / scales[layer - 1] * expected, rtol=0, atol=bound)


@pytest.mark.parametrize("n_outputs", [9, 4])
def test_vectors_of_the_split_are_the_limit(n_outputs: int) -> None:
    problem = draw_low_rank_problem(np.random.default_rng(4), n_outputs, 9, 2)
    weights = dln.orthogonal([9, 9, 9, n_outputs], 0.7, seed=5)
    rate = 1e-6
    run = dln.train(
        problem, weights, learning_rate=rate, steps=1, record=dln.Record(vectors=True), engine="dense"
    )
    n_falling = min(n_outputs, 2) if n_outputs == 9 else n_outputs
    outer = np.r_[:2, 9 - n_falling : 9]
    for layer in (1, 2):
        split = theory.first_order_split(problem, weights, layer)
        for side, vectors in (("left", split.left), ("right", split.right)):
            trained = run.singular_vectors(layer, side, step=1)[:, outer]
            # Wrong by the step; by rounding over the gaps, which the step opens.
            assert np.max(reference.angle(trained, vectors)) < 1e-5
        bound = tolerance(np.float64, 9)
        np.testing.assert_allclose(weights[layer - 1] @ split.right, 0.7 * split.left, rtol=0, atol=bound)


def test_aligned_layers_only_rise() -> None:
    problem = dln.low_rank_recovery(12, 3, seed=1)
    split = theory.first_order_split(problem, dln.aligned(problem, [12] * 4, 0.4), 2)
    assert (split.n_rising, split.n_falling, split.multiplicity) == (3, 0, 9)


def test_errors_of_the_split_name_bad_arguments() -> None:
    problem = draw_low_rank_problem(np.random.default_rng(0), 3, 6, 2)
    weights = dln.orthogonal([6, 6, 3])
    with pytest.raises(ValueError, match="layer is 2, the wide last one"):
        theory.first_order_split(problem, weights, 2)
    with pytest.raises(ValueError, match="layer is 3"):
        theory.first_order_split(problem, weights, 3)
    with pytest.raises(dln.AssumptionError, match="not scales"):
        theory.first_order_split(problem, dln.gaussian([6, 6, 3]), 1)
    with pytest.raises(dln.AssumptionError, match="wanted white inputs"):
        theory.first_order_split(dln.Problem(np.eye(3), np.diag([1.0, 2.0, 3.0])), [np.eye(3)], 1)
    for wrong in ([], weights[:1], dln.orthogonal([6, 7, 3])):
        with pytest.raises(dln.ShapeError, match="weights"):
            theory.first_order_split(problem, wrong, 1)
    with pytest.raises(dln.ShapeError, match="no more outputs than inputs"):
        theory.first_order_split(dln.Problem(np.ones((7, 6))), dln.orthogonal([6, 7]), 1)


# Aligned modes.


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize(
    "settings_",
    [
        {"learning_rate": 0.05},
        {"learning_rate": 0.02, "momentum": 0.9},
        {
            "learning_rate": [0.02, 0.05, 0.03],
            "weight_decay": [0.0, 0.1, 0.01],
            "momentum": [0.5, 0.0, 0.9],
        },
    ],
)
@pytest.mark.parametrize("scale", [0.3, [0.5, 0.9, 0.2]])
def test_modes_equal_an_aligned_run(engine: str, settings_: dict[str, Any], scale: Any) -> None:
    problem = dln.Problem(draw_low_rank_problem(np.random.default_rng(6), 10, 10, 2).target, loss_scale=0.1)
    sigma = problem.target_factors().s
    weights = dln.aligned(problem, [10] * 4, scale, seed=2)
    run = dln.train(problem, weights, steps=300, engine=engine, **settings_)
    modes = theory.aligned_modes(
        np.append(sigma, 0.0), 3, steps=300, scale=scale, loss_scale=0.1, **settings_
    )  # the last one is rho
    assert modes.shape == (301, 3, 3)
    for layer in (1, 2, 3):
        values = np.abs(modes[:, layer - 1, [0, 1] + [2] * 8])
        expected = -np.sort(-values, axis=1)
        np.testing.assert_allclose(run.singular_values(layer), expected, rtol=0, atol=1e-12)
    product = run.end_to_end()
    factors = problem.target_factors()
    found = np.diagonal(factors.U.T @ product @ factors.V)
    np.testing.assert_allclose(found, modes[-1, :, :2].prod(axis=0), rtol=0, atol=1e-12)


def test_modes_below_a_wide_last_layer() -> None:
    problem = draw_low_rank_problem(np.random.default_rng(7), 3, 8, 3)
    run = dln.train(problem, dln.aligned(problem, [8, 8, 8, 3], 0.4), learning_rate=0.02, steps=200)
    modes = theory.aligned_modes(problem.target_factors().s, 3, steps=200, scale=0.4, learning_rate=0.02)
    frozen = np.full((201, 5), 0.4)
    expected = -np.sort(-np.hstack([modes[:, 0], frozen]), axis=1)
    np.testing.assert_allclose(run.singular_values(1), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(run.singular_values(3), modes[:, 2], rtol=0, atol=1e-12)


def test_modes_of_zero_layers_and_of_divergence() -> None:
    modes = theory.aligned_modes([2.0], 3, steps=3, scale=[0.1, 0.1, 0.0], learning_rate=0.1)
    np.testing.assert_allclose(modes[1, :, 0], [0.1, 0.1, 0.1 * 0.1 * 0.1 * 2.0], rtol=1e-15)
    assert theory.aligned_modes([2.0], 1, steps=1, learning_rate=0.5)[-1, 0, 0] == 1.5
    assert not np.isfinite(theory.aligned_modes([2.0], 3, steps=50, learning_rate=9.0)[-1]).any()


def test_errors_of_modes_name_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"singular_values .* negative value, -1"):
        theory.aligned_modes([1.0, -1.0], 2, steps=1, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"momentum .* is 1"):
        theory.aligned_modes([1.0], 2, steps=1, learning_rate=0.1, momentum=1.0)
    with pytest.raises(dln.ShapeError, match=r"scale .* has 3 values"):
        theory.aligned_modes([1.0], 2, steps=1, learning_rate=0.1, scale=[1.0, 1.0, 1.0])


# Compression.


def trained_compressions(
    *, seed: int, scale: float, n_layers: int, loss_below: float, multiplier: float = 1.0, rate: float = 1.0
) -> Array:
    """Return C_0 .. C_{L-1} for K = 5 classes of 10 orthonormal samples each, on the loss of a W X."""
    generator = np.random.default_rng(seed)
    inputs = draw_orthonormal(generator, 50, 50)
    labels = np.repeat(np.arange(5), 10)
    outputs = (labels == np.arange(5)[:, np.newaxis]).astype(float)
    target = outputs @ inputs.T / multiplier
    loss_scale = multiplier**2 / outputs.size
    scales = [scale] * n_layers
    weights0 = [scale * draw_orthonormal(generator, 50, 50) for _ in range(n_layers)]
    weights0[-1] = weights0[-1][:5]
    bases = reference.active_subspaces(weights0, scales, target)
    run = reference.train_reduced(
        weights0, scales, bases, target, loss_scale=loss_scale, learning_rate=[rate] * n_layers, steps=10**5,
        weight_decay=[0.0] * n_layers, momentum=[0.0] * n_layers,
    )  # fmt: skip
    cores, rho = next((cores, rho) for loss, cores, rho in run if loss < loss_below)
    features = [inputs]
    for weight in reference.reconstruct(weights0, scales, bases, cores, rho)[:-1]:
        features.append(weight @ features[-1])
    return np.array([measures.feature_compression(layer, labels) for layer in features])


def fitted_ratio(compressions: Array) -> float:
    return float(np.exp(np.polyfit(np.arange(len(compressions)), np.log(compressions), 1)[0]))


def assert_within_prediction(compressions: Array, predicted: Array) -> None:
    """Of the N - K = 45 directions within classes, K = 5 shrink during training and contribute less."""
    rounding = tolerance(np.float64, 50)
    assert np.all(compressions <= predicted * (1 + rounding))
    assert np.all(compressions >= predicted * 40 / 45)


def test_compression_in_the_setting_of_progressive_collapse() -> None:
    runs = [trained_compressions(seed=seed, scale=0.5, n_layers=8, loss_below=4e-9) for seed in range(4)]
    predicted = theory.compression_law(np.arange(8), scale=0.5, n_layers=8, n_classes=5, samples_per_class=10)
    assert round(float(predicted[1] / predicted[0]), 4) == 0.1875
    for compressions in runs:
        assert compressions[0] == pytest.approx(11.25, rel=tolerance(np.float64, 50))
        assert predicted[0] == pytest.approx(11.25, rel=tolerance(np.float64, 1))
        assert_within_prediction(compressions, predicted)
        assert fitted_ratio(compressions) == pytest.approx(0.1854, abs=5e-4)
        assert compressions[7] == pytest.approx(8.47e-5, rel=0.02)


def test_compression_lags_behind_the_loss() -> None:
    """A mean loss of 1e-6 is not yet convergence: the remaining component adds to the last layers."""
    compressions = trained_compressions(seed=0, scale=0.5, n_layers=8, loss_below=1e-6)
    assert compressions[7] == pytest.approx(9.63e-5, rel=0.02)
    assert fitted_ratio(compressions) == pytest.approx(0.1877, abs=5e-4)


@pytest.mark.parametrize(
    ("scale", "n_layers", "multiplier", "rate"),
    [(0.3, 4, 1.0, 2.0), (0.2, 3, 1.0, 4.0), (0.3, 4, 10.0, 0.5), (0.3, 5, 0.3, 2.0)],
)
def test_the_compression_law_equals_its_formula(
    scale: float, n_layers: int, multiplier: float, rate: float
) -> None:
    compressions = trained_compressions(
        seed=1, scale=scale, n_layers=n_layers, loss_below=1e-11, multiplier=multiplier, rate=rate
    )
    predicted = theory.compression_law(
        np.arange(n_layers), scale=scale, n_layers=n_layers, n_classes=5, samples_per_class=10,
        output_multiplier=multiplier,
    )  # fmt: skip
    assert_within_prediction(compressions, predicted)


def test_errors_of_the_compression_law_name_bad_arguments() -> None:
    arguments: dict[str, Any] = {"scale": 0.5, "n_layers": 4, "n_classes": 5, "samples_per_class": 10}
    assert theory.compression_law(2, **arguments).shape == ()
    for layer in (-1, 4):
        with pytest.raises(ValueError, match=r"layer \(l\) has a value outside 0 \.\. 3"):
            theory.compression_law(layer, **arguments)
    with pytest.raises(TypeError, match="float64; wanted integers"):
        theory.compression_law(1.5, **arguments)
    with pytest.raises(ValueError, match="n_classes is 1"):
        theory.compression_law(1, **{**arguments, "n_classes": 1})
    assert theory.compression_law(0, **{**arguments, "samples_per_class": 1}) == 0.0


# Discrimination.


def make_noisy_classes(noise: float, seed: int) -> tuple[dln.Problem, Array, Array]:
    """Return a problem, its samples and labels: K = 3 classes of 6 orthonormal samples, plus noise."""
    generator = np.random.default_rng(seed)
    inputs = draw_orthonormal(generator, 30, 30)[:, :18]
    disturbance = generator.standard_normal(inputs.shape)
    inputs = inputs + noise * disturbance / np.linalg.norm(disturbance)
    labels = np.repeat(np.arange(3), 6)
    outputs = (labels == np.arange(3)[:, np.newaxis]).astype(float)
    return dln.Problem(outputs @ inputs.T, inputs @ inputs.T), inputs, labels


@pytest.mark.parametrize("n_layers", [2, 3])
def test_discrimination_law_is_the_limit_of_small_scales_and_steps(n_layers: int) -> None:
    problem, inputs, labels = make_noisy_classes(1.0, seed=8)
    predicted = theory.discrimination_law(
        np.arange(1, n_layers + 1), problem.least_squares, n_layers=n_layers
    )
    errors = []
    for scale in (0.2, 0.05):
        run = dln.train(
            problem,
            dln.orthogonal([30] * n_layers + [3], scale, seed=9),
            learning_rate=theory.default_learning_rate(problem, n_layers, scale=scale) / 10,
            steps=10**5,
            record=dln.Record(every=10**5, singular_values=None),
            tolerance=1e-22,
        )
        features = [run.features(layer, inputs) for layer in range(1, n_layers + 1)]
        found = np.array([measures.feature_discrimination(layer, labels) for layer in features])
        errors.append(float(np.max(np.abs(found - predicted))))
    assert predicted[-1] == pytest.approx(1.0, abs=tolerance(np.float64, 3))
    assert 1 - predicted[0] > 0.01
    assert errors[0] < 1e-3
    assert errors[1] < 0.25 * errors[0]


def test_discrimination_law_is_linear_to_first_order() -> None:
    layers = np.arange(1, 7)
    slopes = []
    for noise in (0.1, 0.05):
        problem, _, _ = make_noisy_classes(noise, seed=8)
        predicted = theory.discrimination_law(layers, problem.least_squares, n_layers=6)
        line = 1 - (1 - layers / 6) * (1 - predicted[0]) / (1 - 1 / 6)
        slopes.append(np.max(np.abs(predicted - line)) / (1 - predicted[0]))
    assert slopes[0] < 0.01
    assert slopes[1] == pytest.approx(slopes[0] / 2, rel=0.2)


def test_errors_of_the_discrimination_law_name_bad_arguments() -> None:
    problem, _, _ = make_noisy_classes(1.0, seed=8)
    assert theory.discrimination_law(2, problem.least_squares, n_layers=2).shape == ()
    for layer in (0, 4):
        with pytest.raises(ValueError, match=r"layer \(l\) has a value outside 1 \.\. 3"):
            theory.discrimination_law(layer, problem.least_squares, n_layers=3)
    with pytest.raises(TypeError, match="float64; wanted integers"):
        theory.discrimination_law(1.5, problem.least_squares, n_layers=3)
    with pytest.raises(ValueError, match="a single row"):
        theory.discrimination_law(1, [[1.0, 2.0]], n_layers=3)
    for matrix in ([[1.0, 2.0], [2.0, 4.0]], [[1.0], [2.0]], np.zeros((2, 2))):
        with pytest.raises(ValueError, match="rank below 2"):
            theory.discrimination_law(1, matrix, n_layers=3)
    factors = dln.low_rank_recovery(6, 2).target
    with pytest.raises(ValueError, match="rank below 6"):
        theory.discrimination_law(1, factors, n_layers=3)


# Stability.


def hessian(weights: list[Array], target: Array, loss_scale: float, gram: Array | None = None) -> Array:
    """Return the Hessian of the loss by central differences of the gradient."""

    def slopes(point: Array) -> Array:
        pieces = np.split(point, np.cumsum([w.size for w in weights])[:-1])
        moved = [piece.reshape(w.shape) for piece, w in zip(pieces, weights, strict=True)]
        return np.concatenate([g.ravel() for g in reference.gradients(moved, target, gram, loss_scale)])

    origin, width = np.concatenate([w.ravel() for w in weights]), 1e-4
    return np.array(
        [(slopes(origin + width * e) - slopes(origin - width * e)) / (2 * width) for e in np.eye(len(origin))]
    )


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4])
def test_threshold_is_two_over_the_sharpness(n_layers: int) -> None:
    target = np.diag([3.0, 1.5])
    balanced = [np.diag([3.0, 1.5]) ** (1 / n_layers)] * n_layers
    sharpness = np.linalg.eigvalsh(hessian(balanced, target, 0.2))[-1]
    # The differences are wrong by 1e-4^2.
    assert theory.stability_threshold(3.0, n_layers, 0.2) == pytest.approx(2 / sharpness, rel=1e-6)


@pytest.mark.parametrize("n_layers", [1, 2, 3, 5])
@pytest.mark.parametrize(("factor", "stable"), [(0.97, True), (1.03, False)])
def test_descent_oscillates_beyond_the_threshold(n_layers: int, factor: float, stable: bool) -> None:
    root = 10.0 ** (1 / n_layers)
    weights = [np.array([[root * (1 + 1e-7)]])] * n_layers
    rate = factor * theory.stability_threshold(10.0, n_layers)
    losses = [loss for loss, _ in plain_descent(weights, np.array([[10.0]]), rate, steps=40)]
    assert (losses[-1] < losses[0]) is stable


def test_threshold_of_edge_of_stability() -> None:
    assert round(theory.stability_threshold(10.0, 3), 4) == 0.0309
    assert theory.stability_threshold(7.0, 1, 0.5) == 4.0
    assert theory.stability_threshold(1e300, 3) == 0.0
    assert theory.stability_threshold(1e-300, 3) == np.inf
    with pytest.raises(ValueError, match="sigma is 0"):
        theory.stability_threshold(0.0, 3)


# A rate to start with.


def problems() -> dict[str, dln.Problem]:
    """Return problems with several target shapes and ranks, and white, correlated or too few inputs."""
    generator = np.random.default_rng(0)
    return {
        "recovery": dln.low_rank_recovery(30, 3),
        "classes": dln.classification(5, 10),
        "small target": dln.Problem(np.diag([0.1, 0.05] + [0.0] * 10)),
        "large target": dln.Problem(np.diag([1000.0, 300.0] + [0.0] * 10)),
        "full rank": dln.Problem(generator.standard_normal((12, 12)), loss_scale=0.01),
        "Gaussian inputs": dln.Problem.from_data(
            generator.standard_normal((20, 60)), generator.standard_normal((3, 60))
        ),
        "few samples": dln.Problem.from_data(
            generator.standard_normal((20, 8)), generator.standard_normal((4, 8))
        ),
        "skewed inputs": dln.Problem.from_data(
            generator.standard_normal((10, 40)) * np.logspace(0, -1.5, 10)[:, np.newaxis],
            generator.standard_normal((10, 40)),
        ),
    }


PROBLEMS = problems()


def trained_losses(name: str, weights: list[Array], rate: float, momentum: float = 0.0) -> Array:
    """Return the losses over 1500 steps, minus the loss floor."""
    run = dln.train(
        PROBLEMS[name],
        weights,
        learning_rate=rate,
        steps=1500,
        momentum=momentum,
        record=dln.Record(every=1500, singular_values=None),
    )
    return np.asarray(run.loss - PROBLEMS[name].loss_floor)


@pytest.mark.parametrize("distribution", [dln.orthogonal, dln.gaussian])
@pytest.mark.parametrize("n_layers", [1, 2, 3, 5])
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_default_rate_learns_and_never_diverges(name: str, n_layers: int, distribution: Any) -> None:
    problem = PROBLEMS[name]
    for scale in (1.0, 0.5, 0.1):
        weights = distribution([problem.dim_in] * n_layers + [problem.dim_out], scale)
        losses = trained_losses(name, weights, theory.default_learning_rate(problem, n_layers, scale=scale))
        assert np.max(losses) <= losses[0] * (1 + 1e-12)
        # Elsewhere plateaus, and singular values far below the largest, take longer.
        plateau = scale < 0.5 and n_layers > 2
        slow = name == "skewed inputs" or (name in ("large target", "full rank") and n_layers == 5)
        if not plateau and not slow:
            assert np.min(losses) < 1e-3 * losses[0], f"scale {scale}"


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_default_rate_does_not_need_the_scale(name: str) -> None:
    """The default for scale 1 is at most as large as that for any smaller one."""
    problem = PROBLEMS[name]
    weights = dln.orthogonal([problem.dim_in] * 3 + [problem.dim_out], 0.3)
    rate = theory.default_learning_rate(problem, 3)
    assert rate <= theory.default_learning_rate(problem, 3, scale=0.3)
    losses = trained_losses(name, weights, rate)
    assert np.max(losses) <= losses[0] * (1 + 1e-12)


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_default_rate_of_many_and_of_large_layers_and_with_momentum(name: str) -> None:
    problem = PROBLEMS[name]
    for n_layers, scale in ((20, 1.0), (6, 2.0)):
        widths = [problem.dim_in] * n_layers + [problem.dim_out]
        losses = trained_losses(
            name,
            dln.orthogonal(widths, scale),
            theory.default_learning_rate(problem, n_layers, scale=scale),
        )
        assert np.max(losses) <= losses[0] * (1 + 1e-12)
        wider = (np.e * (n_layers + 1)) ** (1 / (2 * n_layers))
        rate = theory.default_learning_rate(problem, n_layers, scale=wider * scale)
        losses = trained_losses(name, dln.gaussian(widths, scale), rate)
        assert np.max(losses) <= losses[0] * (1 + 1e-12)
    for mu in (0.5, 0.9):
        rate = (1 - mu) * theory.default_learning_rate(problem, 3)
        losses = trained_losses(name, dln.orthogonal([problem.dim_in] * 3 + [problem.dim_out]), rate, mu)
        assert np.max(losses) <= losses[0] * (1 + 1e-12)


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("white", [True, False])
def test_default_rate_is_one_over_the_sharpness(n_layers: int, white: bool) -> None:
    generator = np.random.default_rng(10)
    target = generator.standard_normal((3, 3))
    root = generator.standard_normal((3, 3))
    gram = None if white else root @ root.T
    problem = dln.Problem(target, gram, 0.3)
    left, values, right = np.linalg.svd(reference.least_squares(target, gram))
    powers = np.diag(values ** (1 / n_layers))
    balanced = [powers] * n_layers
    balanced[0], balanced[-1] = balanced[0] @ right, left @ balanced[-1]
    if n_layers == 1:
        balanced = [left @ powers @ right]
    sharpness = np.linalg.eigvalsh(hessian(balanced, target, 0.3, gram))[-1]
    # The differences are wrong by 1e-4^2, and near a minimum by rounding over 1e-4.
    rate = theory.default_learning_rate(problem, n_layers, scale=0.0)
    assert rate == pytest.approx(1 / sharpness, rel=1e-6)
    for scale in (0.5, 1.0, 1.5):
        start = dln.orthogonal([3] * (n_layers + 1), scale, seed=11)
        bound = theory.default_learning_rate(problem, n_layers, scale=scale)
        assert np.linalg.eigvalsh(hessian(start, target, 0.3, gram))[-1] <= (1 + 1e-6) / bound


def test_default_rate_in_limiting_cases() -> None:
    target = np.diag([2.0, 1.0])
    base = theory.default_learning_rate(dln.Problem(target), 3)
    assert theory.default_learning_rate(dln.Problem(target, loss_scale=0.01), 3) == pytest.approx(100 * base)
    # The same problem with and without its matrix S.
    same = dln.Problem(target, np.eye(2))
    assert theory.default_learning_rate(same, 3) == pytest.approx(base, rel=1e-14)
    nothing = dln.Problem(np.zeros((2, 2)), loss_scale=0.5)
    assert theory.default_learning_rate(nothing, 3, scale=0.0) == 2.0
    assert theory.default_learning_rate(nothing, 3, scale=1.0) == pytest.approx(1 / (0.5 * 5))
    assert theory.default_learning_rate(dln.Problem(np.zeros((2, 2)), np.eye(2) * 4), 1) == 0.25
    with pytest.raises(ValueError, match="no learning rate above 0 is stable"):
        theory.default_learning_rate(nothing, 3, scale=1e200)
    with pytest.raises(ValueError, match="scale is -1"):
        theory.default_learning_rate(nothing, 3, scale=-1.0)


# Plateaus.


def steps_to_half(overlap: float, scale: float, n_layers: int, rate: float) -> int:
    """Return when W_{L:1} has a quarter of the initial loss left: the mode of sigma = 1 is half learned.

    The last layer turns by the angle that makes <Q_{L:1}^T u, v> equal to `overlap`.
    """
    sine = np.sqrt(1 - overlap**2)
    last = scale * np.array([[overlap, -sine], [sine, overlap]])
    weights = [scale * np.eye(2)] * (n_layers - 1) + [last]
    run = plain_descent(weights, np.diag([1.0, 0.0]), rate, steps=10**5)
    return next(step for step, (loss, _) in enumerate(run) if loss < 0.125)


@pytest.mark.parametrize(
    ("n_layers", "scale", "rate", "unrelated"),
    [(3, 0.03, 0.02, 1.2), (4, 0.1, 0.05, 1.27), (5, 0.2, 0.05, 1.32)],
)
def test_plateau_lasts_as_long_as_its_bounds_say(
    n_layers: int, scale: float, rate: float, unrelated: float
) -> None:
    shortest, longest = theory.plateau_bounds(1.0, scale, n_layers, 1.0, rate)
    assert longest == 2 * shortest
    # Finite scales shorten the plateau by a few per cent, for three layers by about the scale itself.
    assert steps_to_half(1.0, scale, n_layers, rate) == pytest.approx(shortest, rel=0.04)
    assert steps_to_half(0.0, scale, n_layers, rate) == pytest.approx(unrelated * shortest, rel=0.04)
    assert steps_to_half(-0.7, scale, n_layers, rate) == pytest.approx(longest, rel=0.25)


def test_plateau_scales_with_its_arguments() -> None:
    base = theory.plateau_bounds(2.0, 0.1, 4, 0.5, 0.01).shortest
    assert theory.plateau_bounds(4.0, 0.1, 4, 0.5, 0.01).shortest == pytest.approx(base / 2)
    assert theory.plateau_bounds(2.0, 0.05, 4, 0.5, 0.01).shortest == pytest.approx(base * 4)
    assert theory.plateau_bounds(2.0, 0.1, 4, 1.0, 0.02).shortest == pytest.approx(base / 4)
    assert theory.plateau_bounds(2.0, 1e-3, 200, 1.0, 1.0) == (np.inf, np.inf)
    with pytest.raises(ValueError, match="n_layers is 2; wanted an integer of at least 3"):
        theory.plateau_bounds(1.0, 0.1, 2, 1.0, 0.1)


# The power iteration of two layers.


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_the_power_iteration_is_that_of_the_block_matrix(
    dim_out: int, dim_in: int, width: int, steps: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    target = generator.standard_normal((dim_out, dim_in))
    problem = dln.Problem(target, loss_scale=0.5)
    start = [generator.standard_normal(shape) for shape in ((width, dim_in), (dim_out, width))]
    found = theory.power_iteration(problem, start, steps=steps, learning_rate=0.1)
    expected = reference.power_iteration(start, target, 0.5, 0.1, steps)
    # Both parts of Z are rounded at the size of Z, which is at most (1 + c eta sigma_1)^t times the start.
    size = (1 + 0.05 * np.linalg.norm(target, 2)) ** steps * max(map(np.linalg.norm, start))
    for here, there in zip(found, expected, strict=True):
        error = np.linalg.norm(here - there)
        assert error <= tolerance(np.float64, dim_out + dim_in, max(steps, 1)) * size


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_two_small_layers_follow_the_power_iteration(seed: int) -> None:
    """The residual differs from -Phi by W_2 W_1, of order eps^2: so do the layers, in relative terms."""
    problem = dln.low_rank_recovery(dim=12, rank=2, seed=seed)
    errors = []
    for scale in (1e-2, 1e-3):
        start = dln.orthogonal([12] * 3, scale, seed)
        rate = 0.2 / (problem.loss_scale * problem.target_factors().s[0])
        run = dln.train(problem, start, learning_rate=rate, steps=10)
        expected = theory.power_iteration(problem, start, steps=10, learning_rate=rate)
        errors.append(
            max(
                np.linalg.norm(here - there) / np.linalg.norm(there)
                for here, there in zip(run.all_weights(), expected, strict=True)
            )
        )
    assert errors[0] < 0.01
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize(
    ("start", "steps", "error", "message"),
    [
        ([np.eye(3)], 1, dln.ShapeError, "weights has 1 layers; wanted two"),
        ([np.eye(2), np.eye(2)], 1, dln.ShapeError, "weights"),
        ([np.eye(3), np.ones((3, 2))], 1, dln.ShapeError, "weights"),
        ([np.eye(3), np.eye(3)], -1, ValueError, "steps is -1"),
        ([np.eye(3), np.eye(3)], 10**5, ValueError, "grows beyond"),
    ],
)
def test_errors_name_wrong_arguments_of_the_power_iteration(
    start: list[Array], steps: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        theory.power_iteration(dln.Problem(np.eye(3)), start, steps=steps, learning_rate=0.1)


def test_the_power_iteration_wants_white_inputs() -> None:
    problem = dln.Problem(np.eye(2), input_gram=np.diag([1.0, 2.0]))
    with pytest.raises(dln.AssumptionError, match="white"):
        theory.power_iteration(problem, [np.eye(2)] * 2, steps=1, learning_rate=0.1)
