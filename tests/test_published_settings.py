# SPDX-License-Identifier: MIT
"""Computations of the authors' notebooks in plain NumPy, beside the calls of docs/notebooks.md.

Nothing here uses `dlnfast.reference`: descent, masks, bases and measures are written out once more. The
bounds are the agreement that the page states.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers import jax_numbers
from helpers.matrices import draw_orthonormal

import dlnfast as dln
from dlnfast import measures


def descend(weights, error, rates, steps, momentum=0.0):
    """Return the layers after gradient descent; ``error(W)`` is the gradient with respect to the product."""
    weights = [np.array(weight) for weight in weights]
    velocities = [np.zeros_like(weight) for weight in weights]
    for _ in range(steps):
        below, above = [np.eye(weights[0].shape[1])], [np.eye(weights[-1].shape[0])]
        for weight in weights[:-1]:
            below.append(weight @ below[-1])
        for weight in weights[:0:-1]:
            above.append(above[-1] @ weight)
        slope = error(weights[-1] @ below[-1])
        for index, (left, right) in enumerate(zip(above[::-1], below, strict=True)):
            velocities[index] = momentum * velocities[index] + left.T @ slope @ right.T
        weights = [w - eta * v for w, v, eta in zip(weights, velocities, rates, strict=True)]
    return weights


def product(weights):
    result = weights[0]
    for weight in weights[1:]:
        result = weight @ result
    return result


def largest_difference(found, expected):
    return max(
        np.linalg.norm(here - there) / np.linalg.norm(there)
        for here, there in zip(found, expected, strict=True)
    )


def draw_low_rank(rng, dim, rank):
    left, values, right = np.linalg.svd(rng.standard_normal((dim, dim)))
    return left[:, :rank] * values[:rank] @ right[:rank]


def draw_isometries(rng, dim, scale, depth=3):
    return [scale * draw_orthonormal(rng, dim, dim) for _ in range(depth)]


def known_entries(rng, target, share, **options):
    mask = rng.random(target.shape) < share
    rows, columns = np.nonzero(mask)
    return mask, dln.Completion(rows, columns, target[mask], target.shape, truth=target, **options)


# law-of-parsimony


@pytest.mark.parametrize(("momentum", "bound"), [(0.0, 1e-14), (0.9, 1e-14)])
def test_fig_thm_and_momentum_of_fig_optimizers(momentum, bound):
    rng = np.random.default_rng(0)
    target, weights = draw_low_rank(rng, 30, 3), draw_isometries(rng, 30, 1.0)
    run = dln.train(
        dln.Problem(target, loss_scale=1 / 900), weights, learning_rate=1.0, steps=50, momentum=momentum
    )
    assert run.engine == "reduced"
    expected = descend(weights, lambda W: (W - target) / 900, [1.0] * 3, 50, momentum)
    for layer, weight in enumerate(expected, start=1):
        values = np.linalg.svd(weight, compute_uv=False)
        np.testing.assert_allclose(run.singular_values(layer)[-1], values, rtol=bound)
    assert largest_difference(run.all_weights(), expected) < bound


def test_fig_thm_angles():
    rng = np.random.default_rng(1)
    target, weights = draw_low_rank(rng, 30, 3), draw_isometries(rng, 30, 1.0)
    run = dln.train(dln.Problem(target, loss_scale=1 / 900), weights, learning_rate=1.0, steps=50)
    frames = []
    for steps in (1, 50):
        layer = descend(weights, lambda W: (W - target) / 900, [1.0] * 3, steps)[0]
        frames.append(np.linalg.svd(layer)[2])
    # The same definition by the arc cosine, which is accurate where angles are not small.
    first, last = frames
    ends = [0, 1, 2, 27, 28, 29]
    expected = np.arccos(np.abs(np.sum(first[ends] * last[ends], axis=1)))
    found = run.angles(1, "right", "first_step")[-1]
    # Vectors after one step are as accurate as the gaps between values that differ by c sigma = 1e-2.
    np.testing.assert_allclose(found[ends], expected, atol=1e-12)
    assert found[3:27].max() < 1e-12


def test_fig_collapse():
    rng = np.random.default_rng(0)
    inputs, labels = draw_orthonormal(rng, 50, 50), np.repeat(np.arange(5), 10)
    weights = [0.5 * draw_orthonormal(rng, 50, 50) for _ in range(7)] + [0.5 * draw_orthonormal(rng, 50, 5).T]
    outputs = np.eye(5)[:, labels]
    expected, steps, error = weights, 0, np.inf
    while error >= 1e-6:  # asked every 100 steps, as in the notebook
        expected = descend(expected, lambda W: (W @ inputs - outputs) @ inputs.T / 250, [1.0] * 8, 100)
        steps += 100
        error = np.mean((product(expected) @ inputs - outputs) ** 2) / 2
    run = dln.train(dln.Problem.from_data(inputs, labels), weights, learning_rate=1.0, steps=steps)
    assert run.engine == "reduced"
    compressions = []
    features = inputs
    for weight in [None, *expected[:-1]]:
        features = features if weight is None else weight @ features
        means = np.array([features[:, labels == k].mean(axis=1) for k in range(5)]).T
        within = np.sum((features - means[:, labels]) ** 2) / 50
        between = np.sum((means - features.mean(axis=1, keepdims=True)) ** 2) / 5
        compressions.append(within / between)
    found = [measures.feature_compression(run.features(layer), labels) for layer in range(8)]
    np.testing.assert_allclose(found, compressions, rtol=1e-13)
    assert found[0] == pytest.approx(11.25, rel=1e-12)
    # Another seed, whose loss at the end is another one.
    assert found[7] == pytest.approx(8.47e-5, rel=0.1)
    ratio = np.exp(np.polyfit(np.arange(8), np.log(found), 1)[0])
    assert ratio == pytest.approx(0.1854, rel=0.02)


def test_fig_nonwhitened_data():
    rng = np.random.default_rng(0)
    inputs, outputs = rng.standard_normal((30, 300)) / 15, rng.standard_normal((3, 300))
    weights = [draw_orthonormal(rng, 30, 30) for _ in range(2)] + [draw_orthonormal(rng, 30, 3).T]
    run = dln.train(dln.Problem.from_data(inputs, outputs), weights, learning_rate=1.0, steps=50)
    assert run.engine == "dense"
    expected = descend(weights, lambda W: (W @ inputs - outputs) @ inputs.T / 900, [1.0] * 3, 50)
    assert largest_difference(run.all_weights(), expected) < 1e-14


class NotebookNumbers:
    """Random numbers of the notebooks: JAX's generator, with the key 0 split before each draw."""

    def __init__(self):
        self.key = jax_numbers.make_key(0)

    def split(self):
        self.key, part = jax_numbers.split(self.key)
        return part

    def gaussian(self, *shape):
        return jax_numbers.draw_normal(self.split(), *shape)

    def rotation(self, dim):
        return jax_numbers.draw_orthogonal(self.split(), dim)

    def layers(self, dim, rows, depth, scale):
        parts = jax_numbers.split(self.split(), depth)
        weights = [scale * jax_numbers.draw_orthogonal(part, dim) for part in parts]
        weights[-1] = weights[-1][:rows]
        return weights


@pytest.mark.parametrize(
    ("key", "block", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers_of_its_authors(key, block, expected):
    high, low = np.array(block, np.uint32).reshape(2, 1)
    assert np.concatenate(jax_numbers.threefry(np.array(key, np.uint32), high, low)).tolist() == [*expected]


def test_random_numbers_are_those_of_jax():
    """Printed by JAX 0.10.2 with `jax_enable_x64` and without `jax_threefry_partitionable`."""
    key = jax_numbers.make_key(0)
    assert jax_numbers.split(key).tolist() == [[4146024105, 967050713], [2718843009, 1272950319]]
    printed = [0.1878440128937887, -1.2833422921291577, 0.6494182018294374]
    np.testing.assert_allclose(jax_numbers.draw_normal(key, 3), printed, rtol=1e-15)


def test_fig_thm_with_the_numbers_of_the_notebook():
    numbers = NotebookNumbers()
    left, values, right = np.linalg.svd(numbers.gaussian(30, 30))
    problem = dln.Problem(dln.LowRank(left[:, :3], values[:3], right[:3].T), loss_scale=1 / 900)
    run = dln.train(problem, numbers.layers(30, 30, 3, 1.0), learning_rate=1.0, steps=50)
    np.testing.assert_allclose(values[:3], [11.33, 9.66, 9.27], atol=0.006)
    found = run.singular_values(1)[-1]
    np.testing.assert_allclose(found[[0, 2, 27, 29]], [1.453, 1.356, 0.844, 0.781], atol=6e-4)
    assert round(float(run.rho(1)[-1]), 5) == 0.95096
    angles = run.angles(1, "right", "first_step")[-1]
    np.testing.assert_allclose(sorted(angles[:3])[::2], [0.374, 0.551], atol=6e-4)
    np.testing.assert_allclose(sorted(angles[27:])[::2], [0.380, 0.447], atol=6e-4)


def test_fig_collapse_with_the_numbers_of_the_notebook():
    numbers = NotebookNumbers()
    problem = dln.Problem.from_data(numbers.rotation(50), np.repeat(np.arange(5), 10))
    first = numbers.layers(50, 5, 8, 0.5)
    numbers.layers(50, 5, 6, 0.5)  # the network before it in the grid
    grid = numbers.layers(50, 5, 8, 0.5)
    for weights, steps, last, ratio in ((first, 1600, 8.42e-5, 0.1853), (grid, 1500, 8.53e-5, 0.1856)):
        run = dln.train(problem, weights, learning_rate=1.0, steps=steps)
        assert run.loss[steps] < 1e-6 < run.loss[steps - 100]  # asked every 100 steps
        found = [measures.feature_compression(run.features(layer), problem.labels) for layer in range(8)]
        assert found[0] == pytest.approx(11.25, rel=1e-12)
        assert found[7] == pytest.approx(last, rel=1e-3)
        fitted = np.exp(np.polyfit(np.arange(8), np.log(found), 1)[0])
        assert fitted == pytest.approx(ratio, abs=6e-5)


def test_fig_nonwhitened_data_prints_the_values_of_the_notebook():
    """The last version of the notebook: inputs not divided by 15, 10,000 steps."""
    numbers = NotebookNumbers()
    outputs, inputs = numbers.gaussian(3, 300), numbers.gaussian(30, 300)
    weights = numbers.layers(30, 3, 3, 1.0)
    problem = dln.Problem.from_data(inputs, outputs)
    run = dln.train(problem, weights, learning_rate=1.0, steps=10_000, record=dln.Record(every=10_000))
    values = run.singular_values(1)[-1]
    printed = {0: 1.03839487, 1: 1.03628277, 2: 1.01529377, 15: 0.99999956, 24: 0.99320109}
    printed |= {25: 0.98465792, 26: 0.9805486, 27: 0.46395467, 28: 0.41263444, 29: 0.32226465}
    for index, value in printed.items():
        assert abs(values[index] - value) < 6e-9


def test_fig_equiv_traj_L2():
    rng = np.random.default_rng(0)
    target, weights = draw_low_rank(rng, 60, 10), draw_isometries(rng, 60, 3e-2)
    run = dln.train(dln.Problem(target, loss_scale=1 / 3600), weights, learning_rate=30.0, steps=1500)
    assert run.engine == "reduced"
    expected = descend(weights, lambda W: (W - target) / 3600, [30.0] * 3, 1500)
    assert run.loss[-1] < 0.01 * run.loss[0]  # learned, not on the plateau
    assert largest_difference(run.all_weights(), expected) < 1e-13


def gradient_basis(weights, scale, residual, rank):
    """Return A_0 .. A_L: the leading vectors of the gradient at the start, mapped through the layers."""
    left, _, right = np.linalg.svd(residual)
    whole = product(weights) / scale ** len(weights)
    bases = [np.linalg.qr(np.hstack([right[:rank].T, whole.T @ left[:, :rank]]))[0]]
    for weight in weights:
        bases.append(weight @ bases[-1] / scale)
    return bases


@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_fig_equiv_traj_mc(gamma):
    rng = np.random.default_rng(0)
    target, scale = draw_low_rank(rng, 60, 2), 3e-2
    weights = draw_isometries(rng, 60, scale)
    mask, problem = known_entries(rng, target, 0.5)
    run = dln.train_compressed(problem, weights, rank=2, outer=gamma, learning_rate=40.0, steps=2000)
    bases = gradient_basis(weights, scale, mask * (product(weights) - target), 2)
    narrow = [bases[0].T, *[scale * np.eye(4)] * 3, bases[-1]]
    rates = [40.0 * gamma, 40.0, 40.0, 40.0, 40.0 * gamma]
    expected = product(descend(narrow, lambda W: mask * (W - target) / 3600, rates, 2000))
    assert run.loss[-1] < 0.2 * run.loss[0]
    assert np.linalg.norm(run.end_to_end() - expected) < 1e-13 * np.linalg.norm(expected)
    unobserved = np.sum((~mask * (expected - target)) ** 2) / 2 / 3600
    assert problem.recovery_error(run, "unobserved") == pytest.approx(unobserved, rel=1e-8)


@pytest.mark.parametrize(("depth", "width"), [(2, 10), (2, 40), (3, 10), (3, 40)])
def test_fig_compare_depth_and_narrow_networks(depth, width):
    rng = np.random.default_rng(0)
    target = draw_low_rank(rng, 40, 4)
    mask, problem = known_entries(rng, target, 0.4)
    sizes = [40, *[width] * (depth - 1), 40]
    weights = dln.orthogonal(sizes, 0.1, seed=0)
    rate = 20.0
    run = dln.train(problem, weights, learning_rate=rate, steps=1000)
    expected = descend(weights, lambda W: mask * (W - target) / 1600, [rate] * depth, 1000)
    assert run.loss[-1] < 0.5 * run.loss[0]
    assert largest_difference(run.all_weights(), expected) < 1e-13


def test_fig_compare_depth_is_chaotic_at_the_published_step():
    """Three layers at step 300: rounding decides the iterations, and not the recovered matrix."""
    problem = dln.low_rank_completion(100, 10, 0.3, seed=0)
    start = dln.orthogonal([100, 10, 10, 100], 1e-3, seed=0)
    rng = np.random.default_rng(0)
    moved = [weight * (1 + 1e-12 * rng.standard_normal(weight.shape)) for weight in start]
    record = dln.Record(every=1000, weights_every=1000, singular_values=None)
    options = {"learning_rate": 300.0, "steps": 60_000, "tolerance": 1e-10, "record": record}
    runs = [dln.train(problem, weights, **options) for weights in (start, moved)]
    steps = sorted({int(t) for t in runs[0].steps[:-1]} & {int(t) for t in runs[1].steps[:-1]})
    apart = [np.linalg.norm(runs[0].end_to_end(t) - runs[1].end_to_end(t)) for t in steps]
    sizes = [np.linalg.norm(runs[0].end_to_end(t)) for t in steps]
    assert max(a / s for a, s in zip(apart, sizes, strict=True)) > 0.01
    for run in runs:
        assert np.sum(np.diff(run.loss) > 0) > 1000
        assert problem.recovery_error(run.all_weights(), "unobserved") < 1e-9


# comp-deep-nets


@pytest.mark.parametrize(("depth", "alpha"), [(2, 2.0), (3, 1.0), (3, 5.0)])
def test_fig_traj_mc_ablation_and_depth_effect(depth, alpha):
    rng = np.random.default_rng(0)
    target, scale = draw_low_rank(rng, 60, 2), 0.1
    mask, problem = known_entries(rng, target, 0.5, reduction="observed")
    run = dln.train_compressed(
        problem,
        rank=4,
        basis="surrogate",
        depth=depth,
        scale=scale,
        outer=alpha,
        learning_rate=3.0,
        steps=1000,
    )
    left, _, right = np.linalg.svd(mask * target / mask.mean())
    narrow = [scale * right[:4], *[scale * np.eye(4)] * (depth - 2), scale * left[:, :4]]
    rates = [3.0 * alpha, *[3.0] * (depth - 2), 3.0 * alpha]
    expected = product(descend(narrow, lambda W: mask * (W - target) / mask.sum(), rates, 1000))
    assert run.loss[-1] < 0.2 * run.loss[0]
    assert np.linalg.norm(run.end_to_end() - expected) < 1e-13 * np.linalg.norm(expected)


def test_fig_traj_mf():
    rng = np.random.default_rng(0)
    left, values, right = np.linalg.svd(rng.standard_normal((60, 60)))
    chosen = 3 * np.arange(10)
    target = left[:, chosen] * values[chosen] @ right[chosen]
    run = dln.train_compressed(
        dln.Problem(target, loss_scale=1 / 3600), rank=20, basis="surrogate", scale=0.1, outer=1.0,
        learning_rate=30.0, steps=2000,
    )  # fmt: skip
    # Only directions of the target matter: those beyond its rank stay at eps, whatever they are.
    U, _, Vt = np.linalg.svd(target)
    narrow = [0.1 * Vt[:10], 0.1 * np.eye(10), 0.1 * U[:, :10]]
    expected = product(descend(narrow, lambda W: (W - target) / 3600, [30.0] * 3, 2000))
    learned = U[:, :10] @ (U[:, :10].T @ run.end_to_end() @ Vt[:10].T) @ Vt[:10]
    assert run.loss[-1] < 0.1 * run.loss[0]
    assert np.linalg.norm(learned - expected) < 1e-13 * np.linalg.norm(expected)


def test_fig_traj_ms():
    rng = np.random.default_rng(0)
    target = draw_low_rank(rng, 20, 2)
    operators = rng.standard_normal((250, 20, 20)) / 250
    values = np.tensordot(operators, target, 2)
    run = dln.train_compressed(
        dln.Sensing(operators, values, truth=target), rank=4, basis="surrogate", scale=0.1, outer=1.0,
        learning_rate=3.0, steps=600,
    )  # fmt: skip
    left, _, right = np.linalg.svd(np.tensordot(values, operators, 1))
    narrow = [0.1 * right[:4], 0.1 * np.eye(4), 0.1 * left[:, :4]]

    def error(W):
        return np.tensordot(np.tensordot(operators, W, 2) - values, operators, 1)

    expected = product(descend(narrow, error, [3.0] * 3, 600))
    assert run.loss[-1] < 0.5 * run.loss[0]
    assert np.linalg.norm(run.end_to_end() - expected) < 1e-13 * np.linalg.norm(expected)


def test_fig_power_method():
    rng = np.random.default_rng(0)
    target, weights = draw_low_rank(rng, 60, 3), draw_isometries(rng, 60, 3e-2)
    run = dln.train(dln.Problem(target, loss_scale=1 / 3600), weights, learning_rate=10.0, steps=400)
    layers = descend(weights, lambda W: (W - target) / 3600, [10.0] * 3, 400)
    U, _, Vt = np.linalg.svd(target)
    for layer, side, expected, vector in (
        (3, "left", np.linalg.svd(layers[2])[0][:, 0], U[:, 0]),
        (1, "right", np.linalg.svd(layers[0])[2][0], Vt[0]),
    ):
        found = run.singular_vectors(layer, side)[:, 0]
        assert abs(found @ vector) == pytest.approx(abs(expected @ vector), abs=1e-12)


# PNC_DLN


def test_theory_and_assumption():
    """Compression, discrimination, balance and distance from the minimum norm solution of one network."""
    rng = np.random.default_rng(0)
    inputs = draw_orthonormal(rng, 50, 30)
    noise = rng.standard_normal((50, 30))
    inputs = inputs + noise / np.linalg.norm(noise)
    labels = np.repeat(np.arange(3), 10)
    outputs = np.eye(3)[:, labels]
    weights = [0.3 * draw_orthonormal(rng, 50, 50) for _ in range(5)] + [0.3 * draw_orthonormal(rng, 50, 3).T]
    # |a W X - Y|^2 / N has the statistics of the inputs a X, and c = 2 / N.
    problem = dln.Problem.from_data(100 * inputs, outputs, reduction="sum")
    problem = dln.Problem(
        problem.target, input_gram=problem.input_gram, output_norm_squared=30.0, loss_scale=2 / 30
    )
    run = dln.train(problem, weights, learning_rate=0.1, steps=60)
    assert run.loss[-1] < 1e-8
    expected = descend(
        weights, lambda W: 2 * 100 / 30 * (100 * W @ inputs - outputs) @ inputs.T, [0.1] * 6, 60
    )
    assert largest_difference(run.all_weights(), expected) < 1e-13
    features = expected[1] @ expected[0] @ inputs
    means = np.array([features[:, labels == k].mean(axis=1) for k in range(3)]).T
    within = np.sum((features - means[:, labels]) ** 2) / 30
    between = np.sum((means - features.mean(axis=1, keepdims=True)) ** 2) / 3
    found = run.features(2, inputs)
    assert measures.feature_compression(found, labels) == pytest.approx(within / between, rel=1e-12)
    unit = means / np.linalg.norm(means, axis=0)
    cosines = unit.T @ unit - 2 * np.eye(3)
    assert measures.feature_discrimination(found, labels) == pytest.approx(1 - cosines.max(), rel=1e-12)
    gaps = [np.linalg.norm(above.T @ above - below @ below.T) for below, above in pairwise(expected)]
    np.testing.assert_allclose(measures.balancedness(run.all_weights()), gaps, rtol=1e-9, atol=1e-13)
    smallest = outputs @ np.linalg.pinv(100 * inputs)
    distance = np.linalg.norm(product(expected) - smallest)
    assert np.linalg.norm(run.end_to_end() - problem.least_squares) == pytest.approx(distance, rel=1e-9)
