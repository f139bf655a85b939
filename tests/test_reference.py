# SPDX-License-Identifier: MIT
"""The NumPy reference against training on the data, and the theorem against full training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from helpers.matrices import draw_matrix, draw_orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

from dlnfast import reference
from dlnfast._support.errors import AssumptionError

Array = npt.NDArray[Any]

# Difference allowed between the reduced and the full run, relative to each ||W_l||_F, at any step.
EXACT = 1e-13


def random_weights(generator: np.random.Generator, widths: Sequence[int], scale: float = 0.5) -> list[Array]:
    return [
        scale * generator.standard_normal((rows, columns)) for columns, rows in itertools.pairwise(widths)
    ]


# The model and its gradients.


@settings(deadline=None, max_examples=40)
@given(
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=6),
    n_samples=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_gradients_are_differences_of_the_loss(widths: list[int], n_samples: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights = random_weights(generator, widths)
    inputs = generator.standard_normal((widths[0], n_samples))
    outputs = generator.standard_normal((widths[-1], n_samples))
    slopes = reference.gradients(weights, outputs @ inputs.T, inputs @ inputs.T, 0.3)

    # The loss is quadratic in a single entry: central differences are exact for any step, so use a long one.
    for layer, weight in enumerate(weights):
        for entry in np.ndindex(weight.shape):
            losses = []
            for sign in (1.0, -1.0):
                moved = [w.copy() for w in weights]
                moved[layer][entry] += sign
                losses.append(reference.loss_from_data(moved, inputs, outputs, 0.3))
            difference = (losses[0] - losses[1]) / 2
            scale = 1.0 + sum(losses)
            assert abs(slopes[layer][entry] - difference) <= tolerance(np.float64, 4, 20) * scale


@settings(deadline=None, max_examples=40)
@given(
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=6),
    white=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_hessian_products_are_differences_of_gradients(widths: list[int], white: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights, directions = random_weights(generator, widths), random_weights(generator, widths)
    inputs = generator.standard_normal((widths[0], 5))
    gram = None if white else inputs @ inputs.T
    target = generator.standard_normal((widths[-1], widths[0]))
    width, ends = 1e-4, []
    for sign in (1.0, -1.0):
        moved = [w + sign * width * d for w, d in zip(weights, directions, strict=True)]
        ends.append(reference.gradients(moved, target, gram, 0.3))
    products = reference.hessian_product(weights, directions, target, gram, 0.3)
    for product, high, low in zip(products, *ends, strict=True):
        scale = 1.0 + np.linalg.norm(high) / width
        # Wrong by the third derivative times 1e-8, and by rounding over 1e-4.
        assert np.linalg.norm(product - (high - low) / (2 * width)) <= 1e-8 * scale


@settings(deadline=None, max_examples=40)
@given(dim=st.integers(1, 6), n_samples=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_loss_from_statistics_is_loss_from_data(dim: int, n_samples: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights = random_weights(generator, [dim, 3, 2])
    inputs = generator.standard_normal((dim, n_samples))
    outputs = generator.standard_normal((2, n_samples))
    statistics = reference.loss(
        weights, outputs @ inputs.T, inputs @ inputs.T, 0.7, output_norm_squared=float(np.sum(outputs**2))
    )
    direct = reference.loss_from_data(weights, inputs, outputs, 0.7)
    # The solution M with M S = Phi loses digits with the condition number of S, and with them the loss floor.
    values = np.linalg.svd(inputs, compute_uv=False)
    scale = (1.0 + direct) * (values[0] / values[-1]) ** 2
    assert abs(statistics - direct) <= tolerance(np.float64, 12) * scale * (1.0 + np.sum(outputs**2))


def test_loss_near_its_minimum_keeps_its_digits() -> None:
    generator = np.random.default_rng(1)
    target = generator.standard_normal((4, 4))
    difference = 1e-9 * generator.standard_normal((4, 4))
    expected = 0.5 * np.sum(difference**2)
    computed = reference.loss([target + difference], target, None, 1.0)
    # The perturbed target itself is rounded, by 1e-16 against 1e-9.
    assert computed == pytest.approx(expected, rel=1e-6)


def test_whitened_inputs_equal_an_identity_gram_matrix() -> None:
    generator = np.random.default_rng(2)
    weights, target = random_weights(generator, [5, 4, 3]), generator.standard_normal((3, 5))
    assert reference.loss(weights, target, None, 2.0) == pytest.approx(
        reference.loss(weights, target, np.eye(5), 2.0), rel=tolerance(np.float64, 5)
    )
    for implicit, explicit in zip(
        reference.gradients(weights, target, None, 2.0),
        reference.gradients(weights, target, np.eye(5), 2.0),
        strict=True,
    ):
        np.testing.assert_allclose(implicit, explicit, rtol=0, atol=tolerance(np.float64, 5) * 10)


def train_on_data(
    weights: list[Array],
    inputs: Array,
    outputs: Array,
    loss_scale: float,
    rates: Sequence[float],
    decays: Sequence[float],
    momenta: Sequence[float],
    steps: int,
) -> list[list[Array]]:
    """Return all iterates of heavy-ball descent, by forward and backward passes over the samples."""
    weights = [w.copy() for w in weights]
    velocities = [np.zeros_like(w) for w in weights]
    iterates = [[w.copy() for w in weights]]
    for _ in range(steps):
        activations = [inputs]
        for weight in weights:
            activations.append(weight @ activations[-1])
        error = loss_scale * (activations[-1] - outputs)
        slopes: list[Array] = []
        for weight, activation in zip(reversed(weights), reversed(activations[:-1]), strict=True):
            slopes.insert(0, error @ activation.T)
            error = weight.T @ error
        for layer, slope in enumerate(slopes):
            velocities[layer] = momenta[layer] * velocities[layer] + slope + decays[layer] * weights[layer]
            weights[layer] = weights[layer] - rates[layer] * velocities[layer]
        iterates.append([w.copy() for w in weights])
    return iterates


@pytest.mark.parametrize("n_samples", [3, 40], ids=["fewer samples than inputs", "more"])
def test_train_dense_is_descent_on_the_data(n_samples: int) -> None:
    generator = np.random.default_rng(3)
    widths, loss_scale, steps = [7, 5, 6, 4], 1 / (4 * n_samples), 200
    weights = random_weights(generator, widths)
    inputs = generator.standard_normal((7, n_samples))
    outputs = generator.standard_normal((4, n_samples))
    rates, decays, momenta = [0.05, 0.1, 0.2], [0.0, 0.01, 0.002], [0.9, 0.0, 0.5]
    given_weights = [w.copy() for w in weights]

    run = reference.train_dense(
        weights, outputs @ inputs.T, input_gram=inputs @ inputs.T, loss_scale=loss_scale,
        learning_rate=rates, steps=steps, weight_decay=decays, momentum=momenta,
        output_norm_squared=float(np.sum(outputs**2)),
    )  # fmt: skip
    expected = train_on_data(weights, inputs, outputs, loss_scale, rates, decays, momenta, steps)
    bound = tolerance(np.float64, 40, steps)
    count = 0
    for (loss, iterate), exact in zip(run, expected, strict=True):
        for mine, other in zip(iterate, exact, strict=True):
            assert np.linalg.norm(mine - other) <= bound * np.linalg.norm(other)
        direct = reference.loss_from_data(exact, inputs, outputs, loss_scale)
        # Relative to the loss of no network at all: the loss floor is a difference of numbers of that size.
        assert abs(loss - direct) <= 10 * bound * loss_scale * np.sum(outputs**2)
        count += 1
    assert count == steps + 1
    for before, after in zip(given_weights, weights, strict=True):
        np.testing.assert_array_equal(before, after)


def test_zero_steps_yield_the_initial_weights() -> None:
    weights = [np.eye(2)]
    ((loss, iterate),) = reference.train_dense(
        weights, np.zeros((2, 2)), loss_scale=1.0, learning_rate=[1.0], steps=0, weight_decay=[0.0],
        momentum=[0.0],
    )  # fmt: skip
    assert loss == 1.0
    np.testing.assert_array_equal(iterate[0], np.eye(2))


def test_settings_need_one_value_per_layer() -> None:
    run = reference.train_dense(
        [np.eye(2)] * 2, np.eye(2), loss_scale=1.0, learning_rate=[1.0], steps=1, weight_decay=[0.0] * 2,
        momentum=[0.0] * 2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="zip"):
        next(run)


def test_float32_is_trained_in_float64() -> None:
    weights = [np.eye(3, dtype=np.float32)] * 2
    run = reference.train_dense(
        weights, np.zeros((3, 3), dtype=np.float32), loss_scale=0.1, learning_rate=[1.0] * 2, steps=2,
        weight_decay=[0.0] * 2, momentum=[0.0] * 2,
    )  # fmt: skip
    assert all(w.dtype == np.float64 for _, iterate in run for w in iterate)


# The theorem.


class LayerOptions(NamedTuple):
    """Per-layer settings, cycled through the layers."""

    scales: tuple[float, ...] = (0.5,)
    rates: tuple[float, ...] = (0.05,)
    decays: tuple[float, ...] = (0.0,)
    momenta: tuple[float, ...] = (0.0,)

    def layers(self, n_layers: int) -> list[list[float]]:
        return [[values[layer % len(values)] for layer in range(n_layers)] for values in self]


SETTINGS = {
    "plain": LayerOptions(),
    "weight decay": LayerOptions(decays=(1e-3,)),
    "per layer": LayerOptions((0.4, 0.7, 0.5), (0.03, 0.06), (0.0, 1e-3, 1e-2)),
    "momentum": LayerOptions(rates=(0.01,), momenta=(0.9,)),
    "momentum and weight decay": LayerOptions((0.6, 0.4), (0.02, 0.01), (1e-2, 0.0, 1e-3), (0.8, 0.5, 0.0)),
}


class Agreement(NamedTuple):
    """Largest differences of a reduced run from the full one, and the share of the loss left at the end."""

    weights: float
    loss: float
    remaining: float


def compare_engines(weights0: list[Array], target: Array, setting: LayerOptions, steps: int) -> Agreement:
    scales, rates, decays, momenta = setting.layers(len(weights0))
    arguments: dict[str, Any] = {
        "loss_scale": 1.0, "learning_rate": rates, "steps": steps,
        "weight_decay": decays, "momentum": momenta,
    }  # fmt: skip
    bases = reference.active_subspaces(weights0, scales, target)
    dense = reference.train_dense(weights0, target, **arguments)
    reduced = reference.train_reduced(weights0, scales, bases, target, **arguments)
    weight_error = loss_error = first_loss = last_loss = 0.0
    for (dense_loss, weights), (reduced_loss, cores, rho) in zip(dense, reduced, strict=True):
        first_loss, last_loss = first_loss or dense_loss, dense_loss
        loss_error = max(loss_error, abs(dense_loss - reduced_loss) / first_loss)
        rebuilt = reference.reconstruct(weights0, scales, bases, cores, rho)
        for weight, other in zip(weights, rebuilt, strict=True):
            error = np.linalg.norm(weight - other) / np.linalg.norm(weight)
            weight_error = max(weight_error, float(error))
    return Agreement(weight_error, loss_error, last_loss / first_loss)


def initial(
    generator: np.random.Generator,
    dim: int,
    *,
    n_layers: int,
    setting: LayerOptions,
    n_outputs: int | None = None,
) -> list[Array]:
    rows = [dim] * (n_layers - 1) + [n_outputs or dim]
    scales = setting.layers(n_layers)[0]
    return [scale * draw_orthonormal(generator, k, dim) for scale, k in zip(scales, rows, strict=True)]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("n_layers", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("n_outputs", [None, 4], ids=["square", "wide"])
def test_reduced_training_equals_dense_training(
    n_outputs: int | None, n_layers: int, setting: LayerOptions
) -> None:
    generator = np.random.default_rng(n_layers)
    target = draw_matrix(generator, n_outputs or 24, 24, [3.0, 2.5, 2.0, 1.5])
    weights0 = initial(generator, 24, n_layers=n_layers, setting=setting, n_outputs=n_outputs)
    agreement = compare_engines(weights0, target, setting, steps=250)
    assert agreement.weights <= EXACT
    assert agreement.loss <= EXACT
    assert agreement.remaining < 0.5  # something was learned


@pytest.mark.parametrize("n_outputs", [None, 3], ids=["square", "wide"])
@pytest.mark.parametrize(
    ("dim", "values"),
    [
        (8, [3.0, 2.0, 1.0]),
        (5, [3.0, 2.0, 1.0]),  # 2 r > d: everything is active
        (3, [3.0, 2.0, 1.0]),
        (8, [2.0, 2.0, 2.0]),  # repeated singular values
        (8, [3.0, 2.0]),  # a wide target of rank below its rows
        (8, [3.0, 1e-9]),  # nearly so
        (8, []),
    ],
    ids=["plain", "2r > d", "r = d", "repeated", "deficient", "nearly deficient", "rank 0"],
)
@pytest.mark.parametrize("n_layers", [1, 3])
def test_reduced_training_equals_dense_training_in_extreme_cases(
    n_layers: int, dim: int, values: list[float], n_outputs: int | None
) -> None:
    # Without momentum: a single layer with target 0 would swing through 0, where no relative error is small.
    setting = SETTINGS["per layer"]
    generator = np.random.default_rng(dim)
    target = draw_matrix(generator, n_outputs or dim, dim, values)
    weights0 = initial(generator, dim, n_layers=n_layers, setting=setting, n_outputs=n_outputs)
    assert compare_engines(weights0, target, setting, steps=200).weights <= EXACT


def test_scalar_layers_have_reduced_dynamics() -> None:
    weights0 = [np.array([[0.5]])] * 3
    assert compare_engines(weights0, np.array([[2.0]]), SETTINGS["plain"], steps=100).weights <= EXACT


def test_active_dimensions_are_those_of_the_theorem() -> None:
    generator = np.random.default_rng(4)
    scales = [0.5] * 3

    def dimensions(weights0: list[Array], target: Array) -> list[int]:
        return [basis.shape[1] for basis in reference.active_subspaces(weights0, scales, target)]

    square = initial(generator, 10, n_layers=3, setting=SETTINGS["plain"])
    wide = initial(generator, 10, n_layers=3, setting=SETTINGS["plain"], n_outputs=3)
    assert dimensions(square, draw_matrix(generator, 10, 10, [2.0, 1.0])) == [4, 4, 4, 4]
    assert dimensions(square, np.zeros((10, 10))) == [0, 0, 0, 0]
    assert dimensions(wide, draw_matrix(generator, 3, 10, [3.0, 2.0, 1.0])) == [6, 6, 6, 3]
    assert dimensions(wide, draw_matrix(generator, 3, 10, [3.0])) == [4, 4, 4, 3]
    # Aligned with the target, Q_{L:1}^T U = V, the network never leaves r dimensions.
    rotation = reference.end_to_end(square) / 0.5**3
    right = draw_orthonormal(generator, 10, 2)
    assert dimensions(square, rotation @ right * [2.0, 1.0] @ right.T) == [2, 2, 2, 2]


def test_aligned_network_is_exact_in_r_dimensions() -> None:
    generator = np.random.default_rng(5)
    square = initial(generator, 10, n_layers=3, setting=SETTINGS["plain"])
    right = draw_orthonormal(generator, 10, 2)
    target = reference.end_to_end(square) / 0.5**3 @ right * [3.0, 2.0] @ right.T
    assert compare_engines(square, target, SETTINGS["plain"], steps=250).weights <= EXACT


@pytest.mark.parametrize("n_outputs", [None, 2], ids=["square", "wide"])
def test_bases_contain_all_changes_of_the_weights(n_outputs: int | None) -> None:
    generator = np.random.default_rng(6)
    setting = SETTINGS["plain"]
    weights0 = initial(generator, 9, n_layers=3, setting=setting, n_outputs=n_outputs)
    target = draw_matrix(generator, n_outputs or 9, 9, [2.0, 1.0])
    bases = reference.active_subspaces(weights0, setting.layers(3)[0], target)
    bound = tolerance(np.float64, 9, 3)
    for basis in bases:
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=bound)
    np.testing.assert_allclose(target @ bases[0] @ bases[0].T, target, atol=bound)
    np.testing.assert_allclose(bases[-1] @ bases[-1].T @ target, target, atol=bound)
    for layer, weight in enumerate(weights0):
        image = weight @ bases[layer]
        np.testing.assert_allclose(bases[layer + 1] @ bases[layer + 1].T @ image, image, atol=bound)


def test_middle_singular_values_are_rho() -> None:
    generator = np.random.default_rng(7)
    setting = SETTINGS["weight decay"]
    scales, rates, decays, momenta = setting.layers(3)
    for n_outputs in (None, 3):
        weights0 = initial(generator, 12, n_layers=3, setting=setting, n_outputs=n_outputs)
        target = draw_matrix(generator, n_outputs or 12, 12, [3.0, 2.0, 1.0])
        bases = reference.active_subspaces(weights0, scales, target)
        run = reference.train_reduced(
            weights0, scales, bases, target, loss_scale=1.0, learning_rate=rates, steps=100,
            weight_decay=decays, momentum=momenta,
        )  # fmt: skip
        *_, (_, cores, rho) = run
        weights = reference.reconstruct(weights0, scales, bases, cores, rho)
        values = reference.singular_values(weights[0])
        np.testing.assert_allclose(values[3:9], rho[0], rtol=tolerance(np.float64, 12, 10))
        assert values[2] > rho[0] > values[9]
        if n_outputs is None:
            assert len(rho) == 3
            assert rho[0] < 0.45
        else:
            assert len(rho) == 2
            assert rho[0] == pytest.approx(0.5 * (1 - 0.05 * 1e-3) ** 100, rel=tolerance(np.float64, 100))


def test_reduced_training_is_exact_through_a_long_plateau() -> None:
    generator = np.random.default_rng(8)
    setting = LayerOptions(scales=(1e-2,), rates=(0.05,))
    target = draw_matrix(generator, 12, 12, [3.0, 2.0])
    agreement = compare_engines(
        initial(generator, 12, n_layers=3, setting=setting), target, setting, steps=4000
    )
    # Rounding in the direction of growth is amplified along with the weights, from 1e-2 to 1.
    assert agreement.weights <= 1e-12
    assert agreement.remaining < 1e-3


@pytest.mark.parametrize(
    "weights0",
    [
        [np.eye(4), np.ones((4, 4)), np.eye(4)],
        [np.eye(4)[:, :3], np.eye(4), np.eye(4)],
        [np.eye(5, 4), np.eye(5), np.eye(3, 5)],
        [np.eye(5, 4), np.eye(4, 5), np.eye(4)],
    ],
    ids=["not orthogonal", "narrow input", "wider inside", "bulge"],
)
def test_networks_outside_the_theorem_are_refused(weights0: list[Array]) -> None:
    target = np.zeros((weights0[-1].shape[0], weights0[0].shape[1]))
    with pytest.raises(AssumptionError, match=r"W_\d\(0\)"):
        reference.active_subspaces(weights0, [1.0] * 3, target)


# Singular vectors.


@pytest.mark.parametrize("shape", [(7, 7), (4, 7), (7, 4)], ids=["square", "wide", "tall"])
def test_limit_vectors_are_those_of_a_tiny_step(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(9)
    weight0 = 0.3 * draw_orthonormal(generator, *shape)
    gradient0 = generator.standard_normal(shape)
    left, right = reference.limit_vectors(weight0, gradient0, 0.3)
    assert left.shape == (shape[0], min(shape))
    assert right.shape == (shape[1], min(shape))
    errors = []
    for rate in (1e-4, 1e-5, 1e-6):
        left_after, _, right_after_t = np.linalg.svd(
            (1 - rate * 0.1) * weight0 - rate * gradient0, full_matrices=False
        )
        angles = [reference.angle(left_after, left), reference.angle(right_after_t.T, right)]
        errors.append(float(np.max(angles)))
    # The vectors of a step differ by O(rate) from the limit.
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.2)


def test_limit_vectors_of_the_theorem() -> None:
    """r singular values rise, r fall, the others stay together, with the same q in every layer."""
    generator = np.random.default_rng(10)
    setting, rank = SETTINGS["plain"], 2
    weights0 = initial(generator, 9, n_layers=3, setting=setting)
    target = draw_matrix(generator, 9, 9, [2.0, 1.0])
    scales = setting.layers(3)[0]
    bases = reference.active_subspaces(weights0, scales, target)
    small_target = bases[-1].T @ target @ bases[0]
    rates, vectors = np.linalg.eigh((small_target + small_target.T) / 2)
    assert np.sum(rates > 0) == np.sum(rates < 0) == rank
    slopes = reference.gradients(weights0, target, None, 1.0)
    for layer in range(3):
        left, right = reference.limit_vectors(weights0[layer], slopes[layer], scales[layer])
        ends = [0, 1, -2, -1]
        # Vectors are as accurate as the gaps between eigenvalues, here above 0.01 of their size.
        bound = 100 * tolerance(np.float64, 9, 3)
        assert np.max(reference.angle(right[:, ends], bases[layer] @ vectors[:, ::-1])) <= bound
        assert np.max(reference.angle(left[:, ends], bases[layer + 1] @ vectors[:, ::-1])) <= bound


@pytest.mark.parametrize("size", [0.0, 1e-150, 1e-14, 1e-8, 0.3, 1.0, np.pi / 2 - 1e-8, np.pi / 2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_angles_lose_no_digits(size: float, sign: float) -> None:
    first = np.array([[1.0], [0.0]])
    second = sign * np.array([[np.cos(size)], [np.sin(size)]])
    (computed,) = reference.angle(first, second)
    np.testing.assert_allclose(computed, size, rtol=4 * np.finfo(np.float64).eps)


def test_singular_values_are_sorted() -> None:
    np.testing.assert_allclose(
        reference.singular_values(np.diag([1.0, -3.0, 2.0])), [3.0, 2.0, 1.0], rtol=tolerance(np.float64, 3)
    )
