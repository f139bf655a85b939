# SPDX-License-Identifier: MIT
"""Losses over samples: values, mini-batches, label noise, files and errors of `SampleProblem`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference
from dlnfast._support.arrays import random_generator
from dlnfast._training.choice import choose_engine
from dlnfast._training.rates import least_squares_of

LOSSES = ["squared", "cross-entropy", "logistic"]
RNG = np.random.default_rng(0)
X = RNG.standard_normal((5, 12))
Y = RNG.standard_normal((3, 12))
LABELS = np.arange(12) % 3
SIGNS = np.where(np.arange(12) % 2, 1, -1)


def targets_of(loss):
    return {"squared": Y, "cross-entropy": LABELS, "logistic": SIGNS}[loss]


def target_columns(problem):
    """Return the targets as `reference.sample_gradients` takes them."""
    if problem.loss_name == "squared":
        return problem.outputs
    if problem.loss_name == "logistic":
        return problem.labels[np.newaxis].astype(float)
    return dln.one_hot(problem.labels, range(problem.dim_out))


def make(loss="squared", **options):
    return dln.SampleProblem(X, targets_of(loss), loss=loss, **options)


# Loss.


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("has_biases", [False, True])
@settings(deadline=None, max_examples=30)
@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    n=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_the_loss_equals_the_reference(loss, has_biases, widths, n, seed):
    rng = np.random.default_rng(seed)
    dim_out = {"squared": 2, "cross-entropy": 3, "logistic": 1}[loss]
    dims = [*widths, dim_out]
    inputs = rng.standard_normal((dims[0], n))
    targets = {
        "squared": rng.standard_normal((2, n)),
        "cross-entropy": rng.integers(0, 3, n),
        "logistic": rng.integers(0, 2, n),
    }[loss]
    options = {"n_classes": 3} if loss == "cross-entropy" else {}
    problem = dln.SampleProblem(inputs, targets, loss=loss, biases=has_biases, **options)
    weights = dln.gaussian(dims, 1.0, seed)
    biases = [rng.standard_normal(len(w)) for w in weights] if has_biases else None
    found = problem.loss(weights, biases)
    arguments = (weights, inputs, target_columns(problem), loss, problem.loss_scale, biases)
    wanted = reference.sample_gradients(*arguments)[0]
    assert found == pytest.approx(wanted, rel=100 * tolerance(np.float64, 6))


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_the_reference_are_differences_of_its_loss(loss):
    problem = make(loss)
    rng = np.random.default_rng(1)
    weights = dln.gaussian([5, 4, problem.dim_out], 0.7, 3)
    biases = [rng.standard_normal(len(w)) for w in weights]
    directions = [rng.standard_normal(w.shape) for w in weights]
    shifts = [rng.standard_normal(b.shape) for b in biases]

    def evaluate(t):
        moved = [w + t * d for w, d in zip(weights, directions, strict=True)]
        shifted = [b + t * s for b, s in zip(biases, shifts, strict=True)]
        return reference.sample_gradients(moved, X, target_columns(problem), loss, 0.1, shifted)

    step = 1e-5
    slope = (evaluate(step)[0] - evaluate(-step)[0]) / (2 * step)
    _, of_weights, of_biases = evaluate(0.0)
    wanted = sum(np.sum(g * d) for g, d in zip(of_weights, directions, strict=True))
    wanted += sum(np.sum(g * s) for g, s in zip(of_biases, shifts, strict=True))
    assert slope == pytest.approx(wanted, rel=1e-8)  # central differences: step^2, and eps / step


def test_the_reference_refuses_another_loss():
    with pytest.raises(ValueError, match="loss is 'hinge'"):
        reference.sample_gradients([np.eye(2)], np.eye(2), np.eye(2), "hinge", 1.0)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_large_outputs_does_not_overflow(loss):
    problem = make(loss)
    weight = 1e4 * np.ones((problem.dim_out, 5))
    weight[0] *= -1
    assert np.isfinite(problem.loss([weight]))


def test_the_default_scale_is_that_of_the_mean():
    assert make().loss_scale == dln.Problem.from_data(X, Y).loss_scale == 1 / 36
    assert make("cross-entropy").loss_scale == make("logistic").loss_scale == 1 / 12
    assert make("logistic", loss_scale=2.0).loss_scale == 2.0


def test_least_squares_have_the_same_loss():
    problem = make(loss_scale=0.3)
    W = np.random.default_rng(3).standard_normal((3, 5))
    assert least_squares_of(problem).loss(W) == pytest.approx(problem.loss([W]), rel=1e-12)


def test_labels_and_one_hot_columns_are_the_same_problem():
    for loss in ("squared", "cross-entropy"):
        of_labels = dln.SampleProblem(X, LABELS, loss=loss)
        of_columns = dln.SampleProblem(X, dln.one_hot(LABELS), loss=loss)
        W = np.random.default_rng(3).standard_normal((3, 5))
        assert of_labels.loss([W]) == of_columns.loss([W])
    np.testing.assert_array_equal(dln.SampleProblem(X, (SIGNS + 1) // 2, loss="logistic").labels, SIGNS)
    assert dln.SampleProblem(X, LABELS, loss="cross-entropy", n_classes=7).dim_out == 7


# Mini-batches.


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 40), data=st.data(), seed=st.integers(0, 2**64 - 1))
def test_every_epoch_uses_every_sample_once(n, data, seed):
    size = data.draw(st.integers(1, n))
    problem = dln.SampleProblem(np.ones((1, n)), np.ones((1, n)), batch_size=size, seed=seed)
    assert problem.steps_per_epoch == -(-n // size)
    for epoch in (0, 3):
        first = epoch * problem.steps_per_epoch
        batches = [problem.batch(first + i) for i in range(problem.steps_per_epoch)]
        assert [len(b) for b in batches[:-1]] == [size] * (len(batches) - 1)
        assert sorted(np.concatenate(batches).tolist()) == list(range(n))


def test_batches_depend_on_seed_and_step_only():
    first, second = make(batch_size=5, seed=7), make(batch_size=5, seed=7)
    backwards = [second.batch(step) for step in reversed(range(9))][::-1]
    for step, batch in enumerate(backwards):
        np.testing.assert_array_equal(first.batch(step), batch)
    other = make(batch_size=5, seed=8)
    assert any((first.batch(step) != other.batch(step)).any() for step in range(3))
    assert (first.batch(0) != first.batch(3)).any()  # the next epoch has another order


def test_batches_are_the_documented_permutation():
    numbers = random_generator(4, ("mini-batches",), 2).bit_generator.random_raw(12)
    problem = make(batch_size=6, seed=4)
    np.testing.assert_array_equal(np.concatenate([problem.batch(4), problem.batch(5)]), np.argsort(numbers))
    # These numbers are part of the format of runs: another order would break resumed runs.
    assert problem.batch(0).tolist() == [9, 10, 8, 2, 0, 3]


def test_blocks_of_a_stream_are_different_numbers():
    first = random_generator(1, ("a",)).random(4)
    np.testing.assert_array_equal(random_generator(1, ("a",), 0).random(4), first)
    assert not np.isin(random_generator(1, ("a",), 1).random(1000), first).any()


def test_full_batches_keep_the_order_of_the_samples():
    np.testing.assert_array_equal(make().batch(3), np.arange(12))
    with pytest.raises(ValueError, match="step is -1"):
        make().batch(-1)


# Label noise.


def test_gaussian_label_noise_has_its_mean_and_deviation():
    problem = make(label_noise=0.5, seed=2)
    noise = np.array([problem.targets(step) - Y for step in range(400)]).reshape(400, -1) / 0.5
    n = noise.size
    assert abs(noise.mean()) <= 5 / np.sqrt(n)
    assert abs(np.mean(noise**2) - 1) <= 5 * np.sqrt(2 / n)
    # Independent from step to step.
    assert abs(np.mean(noise[1:] * noise[:-1])) <= 5 / np.sqrt(n)
    np.testing.assert_array_equal(problem.targets(3), make(label_noise=0.5, seed=2).targets(3))


@pytest.mark.parametrize(("loss", "n_classes"), [("cross-entropy", 3), ("logistic", 2)])
def test_labels_flip_with_the_stated_probability(loss, n_classes):
    problem = make(loss, label_noise=0.3, seed=2)
    drawn = np.array([problem.targets(step) for step in range(600)])
    flipped = drawn != problem.labels
    n = flipped.size
    assert abs(flipped.mean() - 0.3) <= 5 * np.sqrt(0.3 * 0.7 / n)
    if n_classes == 3:  # both of the other classes are as probable
        shift = (drawn - problem.labels)[flipped] % 3
        assert abs(np.mean(shift == 1) - 0.5) <= 5 * np.sqrt(0.25 / shift.size)
    assert set(np.unique(drawn)) == set(np.unique(problem.labels))


@pytest.mark.parametrize("loss", ["cross-entropy", "logistic"])
def test_flips_of_probability_one_change_every_label(loss):
    problem = make(loss, label_noise=1.0)
    assert (problem.targets(0) != problem.labels).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_targets_without_noise_are_those_of_the_batch(loss):
    problem = make(loss, batch_size=5)
    clean = problem.labels if problem.outputs is None else problem.outputs
    np.testing.assert_array_equal(problem.targets(1), clean[..., problem.batch(1)])


# Files.


@pytest.mark.parametrize("loss", LOSSES)
def test_arrays_reconstruct_the_problem(loss):
    problem = make(loss, batch_size=5, label_noise=0.25, seed=3, biases=True, loss_scale=0.5)
    again = dln.SampleProblem.from_arrays(*problem.to_arrays())
    assert again.describe() == problem.describe()
    np.testing.assert_array_equal(again.inputs, problem.inputs)
    np.testing.assert_array_equal(again.targets(2), problem.targets(2))
    assert "batch_size=5" in repr(again)


# Engines.


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss": "cross-entropy"}, "nonlinear function of the outputs"),
        ({"loss": "logistic"}, "nonlinear function of the outputs"),
        ({"batch_size": 3}, "every mini-batch has its own S and Phi"),
        ({"label_noise": 0.1}, "label noise changes Phi at every step"),
        ({"biases": True}, "layers without biases"),
        ({}, "Problem.from_data"),
    ],
)
def test_engines_of_the_core_give_the_reason_for_their_refusal(options, reason):
    problem = make(**options)
    weights = dln.gaussian([5, 4, problem.dim_out])
    with pytest.raises(dln.AssumptionError, match=reason):
        dln.train(problem, weights, learning_rate=0.1, steps=1, engine="reduced")
    with pytest.raises(TypeError, match="engine is 'dense'"):
        dln.train(problem, weights, learning_rate=0.1, steps=1, engine="dense")
    with pytest.raises(TypeError, match="engine is 'auto'"):
        choose_engine("auto", problem, weights)


def test_functions_for_other_problems_refuse_samples():
    problem, weights = make(), dln.gaussian([5, 4, 3])
    with pytest.raises(TypeError, match="SampleProblem"):
        dln.gradients(problem, weights)
    with pytest.raises(TypeError, match="SampleProblem"):
        dln.train_batch(problem, [weights], learning_rate=0.1, steps=1)
    with pytest.raises(TypeError, match="SampleProblem"):
        dln.flow(problem, weights, times=[0.0, 1.0])


def test_training_without_pytorch_says_how_to_install_it(run_python):
    program = """
import sys
sys.modules["torch"] = None
import numpy as np
import dlnfast as dln
problem = dln.SampleProblem(np.eye(3), [0, 1, 2], loss="cross-entropy")
try:
    dln.train(problem, dln.orthogonal([3, 3, 3]), learning_rate=0.1, steps=1)
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install torch" in run_python(program)


# Invalid input.


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"loss": "hinge"}, ValueError, "loss is 'hinge'"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"batch_size": 13}, ValueError, "batch_size is 13; wanted an integer of at most 12"),
        ({"batch_size": 2.5}, TypeError, "batch_size is 2.5"),
        ({"label_noise": -1.0}, ValueError, "label_noise is -1"),
        ({"label_noise": np.nan}, ValueError, "label_noise is nan"),
        ({"loss": "logistic", "label_noise": 1.5}, ValueError, "label_noise is 1.5"),
        ({"loss_scale": 0.0}, ValueError, "loss_scale is 0"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"biases": "yes"}, TypeError, "biases is 'yes'"),
        ({"X": np.full((5, 12), np.nan)}, ValueError, "X"),
        ({"X": X[:, :7]}, dln.ShapeError, "X has 7 samples and Y has 12"),
        ({"X": X[0]}, dln.ShapeError, "X"),
        ({"X": X * 1j}, TypeError, "X"),
        ({"Y": np.where(Y > 1, np.inf, Y)}, ValueError, "Y"),
        ({"Y": LABELS + 0.5}, TypeError, "Y has dtype float64; wanted integers"),
        ({"loss": "cross-entropy", "Y": LABELS * 1.0}, TypeError, "Y has dtype float64; wanted integers"),
        (
            {"loss": "cross-entropy", "Y": LABELS - 1},
            ValueError,
            r"Y\[0\] is -1; wanted labels of at least 0",
        ),
        ({"loss": "cross-entropy", "n_classes": 2}, ValueError, r"Y\[2\] is 2; wanted labels in 0 .. 1"),
        ({"loss": "cross-entropy", "Y": 0 * LABELS}, ValueError, "Y has one class"),
        ({"loss": "cross-entropy", "Y": Y}, ValueError, "column 0 of Y is not one-hot"),
        ({"loss": "cross-entropy", "Y": np.eye(3)}, dln.ShapeError, "X has 12 samples and Y has 3"),
        ({"Y": Y, "n_classes": 4}, dln.ShapeError, "Y has 3 rows; wanted 4"),
        ({"loss": "cross-entropy", "Y": ["a"] * 12}, TypeError, "Y"),
        ({"loss": "logistic", "Y": LABELS}, ValueError, r"Y has the labels \[0, 1, 2\]"),
        ({"loss": "logistic", "Y": np.array([-1, 0, 1] * 4)}, ValueError, "Y has the labels"),
        ({"loss": "logistic", "Y": SIGNS * 1.0}, TypeError, "Y has dtype float64; wanted integers"),
        ({"loss": "logistic", "Y": SIGNS[np.newaxis]}, dln.ShapeError, "wanted a non-empty vector"),
        ({"loss": "logistic", "n_classes": 2}, ValueError, "n_classes is set"),
    ],
)
def test_invalid_arguments_are_named(arguments, error, text):
    targets = {"cross-entropy": LABELS, "logistic": SIGNS}.get(arguments.get("loss"), Y)
    with pytest.raises(error, match=text):
        dln.SampleProblem(**({"X": X, "Y": targets} | arguments))


def test_invalid_weights_and_biases_are_named():
    problem = make(biases=True)
    weights = dln.gaussian([5, 4, 3])
    with pytest.raises(dln.ShapeError, match="wanted 5 columns"):
        problem.loss(dln.gaussian([4, 3]))
    with pytest.raises(dln.ShapeError, match="has 2 rows; wanted 3"):
        problem.loss(dln.gaussian([5, 2]))
    with pytest.raises(dln.ShapeError, match="biases has 1 vectors; wanted 2"):
        problem.loss(weights, [np.zeros(4)])
    with pytest.raises(dln.ShapeError, match=r"biases\[1\]"):
        problem.loss(weights, [np.zeros(4), np.zeros(4)])
    assert problem.loss([np.full((3, 5), 1e300)]) == np.inf
