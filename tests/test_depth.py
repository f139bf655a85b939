# SPDX-License-Identifier: MIT
"""Deep networks: set-up, runs, records and rates take time in proportion to the number of layers.

Function calls are counted instead of times. Products inside the core are not counted.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers.calls import count_calls

import dlnfast as dln
from dlnfast._training.curvature import layer_curvatures, minimum_sharpness, multiply_others, sum_pairs

DIM, RANK = 6, 1
FEW, MANY = 32, 128
PROBLEM = dln.low_rank_recovery(dim=DIM, rank=RANK)
OBSERVED = dln.low_rank_completion(dim=DIM, rank=RANK, observed=0.8)


def deep_weights(depth, **options):
    return dln.orthogonal([DIM] * (depth + 1), scale=0.99, **options)


def train(depth, *, steps=3, weights=None, engine="reduced", every=2, **options):
    weights = deep_weights(depth) if weights is None else weights
    record = dln.Record(every=every, vectors=engine == "dense")
    settings = {"learning_rate": 1e-3, "steps": steps, "record": record, "engine": engine}
    return dln.train(PROBLEM, weights, **(settings | options))


def read_layers(name, *arguments, **options):
    """Return a function that reads one answer for each layer of a run."""

    def prepare(depth):
        run = train(depth, **options)
        return lambda: [getattr(run, name)(layer, *arguments) for layer in range(1, depth + 1)]

    return prepare


def read_run(name, *arguments, **options):
    def prepare(depth):
        run = train(depth, **options)
        return lambda: getattr(run, name)(*arguments)

    return prepare


def prepare_closure(depth):
    weights = deep_weights(depth)
    return lambda: dln.closure(PROBLEM, weights)


def prepare_gram_closure(depth):
    generator = np.random.default_rng(0)
    inputs = np.linalg.qr(generator.standard_normal((DIM, DIM)))[0] * np.array([2.0, 2, 2, 1, 1, 1])[:, None]
    problem = dln.Problem.from_data(inputs, PROBLEM.dense_target() @ inputs, whiten=None)
    weights = deep_weights(depth)
    return lambda: dln.closure(problem, weights)


def prepare_sampled_closure(depth):
    weights = deep_weights(depth, implicit=True)
    return lambda: dln.closure(PROBLEM, weights)


def prepare_failed_closure(depth):
    weights = dln.gaussian([DIM] * (depth + 1))
    return lambda: dln.closure(PROBLEM, weights)


def prepare_train(depth, **options):
    weights = deep_weights(depth)
    return lambda: train(depth, weights=weights, **options)


def prepare_automatic_train(depth):
    return prepare_train(depth, learning_rate="auto")


def prepare_dense_train(depth):
    return prepare_train(depth, engine="dense")


def prepare_divergence(depth):
    def diverge():
        with pytest.raises(dln.DivergedError):
            train(depth, weights=weights, learning_rate=1e9, steps=20)

    weights = deep_weights(depth)
    return diverge


def prepare_observed_rate(depth):
    weights = deep_weights(depth)
    return lambda: dln.train(OBSERVED, weights, learning_rate="auto", steps=0)


def prepare_batch(depth):
    weights = [deep_weights(depth, seed=seed) for seed in range(2)]
    return lambda: dln.train_batch([PROBLEM] * 2, weights, learning_rate=1e-3, steps=3)


@pytest.mark.parametrize(
    "prepare",
    [
        prepare_closure,
        prepare_gram_closure,
        prepare_sampled_closure,
        prepare_failed_closure,
        prepare_train,
        prepare_automatic_train,
        prepare_dense_train,
        prepare_divergence,
        prepare_observed_rate,
        prepare_batch,
    ],
)
def test_the_setup_of_a_run_is_linear_in_the_number_of_layers(prepare):
    few, many = (count_calls(prepare(depth)) for depth in (FEW, MANY))
    assert many <= MANY / FEW * few


@pytest.mark.parametrize(
    "prepare",
    [
        read_layers("singular_values"),
        read_layers("singular_value_errors"),
        read_layers("active_singular_values"),
        read_layers("branches"),
        read_layers("rho"),
        read_layers("multiplicity"),
        read_layers("singular_vectors"),
        read_layers("active_angles", "left"),
        read_layers("angles", "right"),
        read_layers("angles", "right", engine="dense"),
        read_layers("singular_values", engine="dense"),
        read_run("ranks"),
        read_run("all_weights"),
        read_run("end_to_end"),
        read_run("to_arrays"),
        read_run("__repr__"),
    ],
)
def test_reading_all_layers_of_a_run_is_linear_in_their_number(prepare):
    few, many = (count_calls(prepare(depth)) for depth in (FEW, MANY))
    assert many <= MANY / FEW * few


def test_files_of_a_run_are_linear_in_the_number_of_layers(tmp_path):
    def save_and_load(depth):
        run, path = train(depth), tmp_path / f"{depth}.npz"
        return lambda: (run.save(path), dln.load(path))

    few, many = (count_calls(save_and_load(depth)) for depth in (FEW, MANY))
    assert many <= MANY / FEW * few


def test_checkpoints_are_linear_in_the_number_of_layers(tmp_path):
    few, many = (count_calls(prepare_train(depth, checkpoint=tmp_path / str(depth))) for depth in (FEW, MANY))
    assert many <= MANY / FEW * few


# Products of all layers but some.

VALUES = [
    np.array([2.0]),
    np.array([2.0, 3.0]),
    np.array([2.0, 0.0, 5.0, 0.5]),
    np.array([0.0, 3.0, 0.0, 7.0]),
    np.random.default_rng(0).uniform(0.5, 2.0, 9),
]


@pytest.mark.parametrize("values", VALUES)
def test_products_of_other_values_equal_direct_products(values):
    direct = [np.prod(np.delete(values, i)) for i in range(len(values))]
    np.testing.assert_allclose(multiply_others(values), direct, rtol=1e-14)


@pytest.mark.parametrize("values", VALUES)
def test_sums_over_pairs_equal_direct_sums(values):
    n = len(values)
    terms = np.random.default_rng(1).uniform(0.1, 1.0, n)
    direct = [
        sum(terms[j] * np.prod(np.delete(values, [i, j])) for j in range(n) if j != i) for i in range(n)
    ]
    np.testing.assert_allclose(sum_pairs(values, terms), direct, rtol=1e-14)


def test_the_sharpness_of_observations_needs_no_product_per_layer():
    curvature = layer_curvatures(OBSERVED, deep_weights(3))
    assert np.all(np.array(curvature) > 0)
    few, many = (
        count_calls(lambda depth=depth: minimum_sharpness(OBSERVED, [0.9] * depth, [1.0] * depth))
        for depth in (FEW, MANY)
    )
    assert many <= few + 5
