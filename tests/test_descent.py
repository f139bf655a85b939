# SPDX-License-Identifier: MIT
"""`train` apart from its accuracy: records, stopping, callbacks, the update rule, the gradients."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
from helpers.records import with_record
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference
from dlnfast._training.curvature import minimum_sharpness
from dlnfast.theory.descent import minimum_sharpness as theory_sharpness

F64 = np.float64
ENGINES = ["reduced", "dense"]
DIM = 10


def scalar_problem(sigma=1.3, loss_scale=0.5):
    return dln.Problem([[sigma]], loss_scale=loss_scale)


# Records and stopping.


@pytest.mark.parametrize("engine", ENGINES)
@settings(deadline=None, max_examples=25)
@given(steps=st.integers(0, 23), every=st.integers(1, 30))
def test_records_are_at_multiples_and_at_the_end(engine, steps, every):
    problem, weights = dln.low_rank_recovery(6, 1), dln.orthogonal([6] * 3)
    run = dln.train(
        problem, weights, learning_rate=0.5, steps=steps, record=dln.Record(every=every), engine=engine
    )
    wanted = sorted({*range(0, steps + 1, every), steps})
    assert run.steps.tolist() == wanted
    assert run.steps.dtype == np.int64
    assert run.loss.shape == (steps + 1,)
    assert run.singular_values(1).shape == (len(wanted), 6)
    assert run.outcome == "finished"


@pytest.mark.parametrize("engine", ENGINES)
def test_recording_does_not_change_the_run(engine, problem, weights):
    rates = {"learning_rate": 0.5, "steps": 40, "engine": engine}
    first, *others = (dln.train(problem, weights, **with_record(rates, every=every)) for every in (1, 7, 40))
    for run in others:
        np.testing.assert_array_equal(run.loss, first.loss)
        np.testing.assert_array_equal(run.weights(3), first.weights(3))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_of_no_steps_returns_the_initial_weights(engine, problem, weights):
    run = dln.train(problem, weights, learning_rate=1.0, steps=0, engine=engine)
    wanted = problem.loss(reference.end_to_end(weights))
    np.testing.assert_allclose(run.loss, [wanted], rtol=tolerance(F64, DIM))
    for layer in (1, 2, 3):
        np.testing.assert_allclose(run.weights(layer), weights[layer - 1], atol=tolerance(F64, DIM))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_run_stops_at_the_first_loss_below_the_tolerance(engine, problem, weights):
    rates = {"learning_rate": 0.5, "steps": 400, "record": dln.Record(every=9), "engine": engine}
    whole = dln.train(problem, weights, **rates)
    limit = float(np.sqrt(whole.loss[0] * whole.loss.min()))
    first = int(np.argmax(whole.loss <= limit))
    assert first % 9 != 0
    run = dln.train(problem, weights, tolerance=limit, **rates)
    np.testing.assert_array_equal(run.loss, whole.loss[: first + 1])
    assert run.steps.tolist() == [*range(0, first, 9), first]
    assert run.outcome == "converged"
    # A tolerance that the initial loss satisfies.
    run = dln.train(problem, weights, tolerance=1e9, **rates)
    assert (len(run.loss), run.steps.tolist()) == (1, [0])
    # A tolerance that is never reached.
    assert dln.train(problem, weights, tolerance=0.0, **rates).outcome == "finished"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_callback_sees_every_record(engine, problem, weights):
    seen = []
    rates = {"learning_rate": 0.1, "steps": 50, "record": dln.Record(every=8), "engine": engine}
    run = dln.train(problem, weights, **with_record(rates, callback=lambda *args: seen.append(args)))
    assert [step for step, _ in seen] == run.steps.tolist()
    assert [loss for _, loss in seen] == run.loss[run.steps].tolist()
    assert all(type(step) is int and type(loss) is float for step, loss in seen)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_callback_can_stop_the_run(engine, problem, weights):
    rates = {"learning_rate": 0.1, "steps": 50, "record": dln.Record(every=8), "engine": engine}
    run = dln.train(problem, weights, **with_record(rates, callback=lambda step, loss: step >= 20))
    assert (run.steps.tolist(), len(run.loss)) == ([0, 8, 16, 24], 25)
    assert run.outcome == "stopped"
    assert run.weights(1).shape == (DIM, DIM)
    assert run.singular_values(1).shape == (4, DIM)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_callback_may_return_a_numpy_boolean(engine, problem, weights):
    rates = {"learning_rate": 0.1, "steps": 50, "record": dln.Record(every=8), "engine": engine}
    run = dln.train(problem, weights, **with_record(rates, callback=lambda step, loss: np.bool_(step >= 20)))
    assert len(run.loss) == 25


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("at", [0, 16])
def test_an_exception_of_a_callback_carries_the_trajectory(engine, at, problem, weights):
    class OwnError(Exception):
        pass

    def fail(step, loss):
        if step == at:
            raise OwnError("stop here")

    with pytest.raises(OwnError, match="stop here") as caught:
        dln.train(
            problem,
            weights,
            learning_rate=0.1,
            steps=50,
            record=dln.Record(every=8, vectors=True, callback=fail),
            engine=engine,
        )
    run = caught.value.trajectory
    assert run.steps.tolist() == list(range(0, at + 1, 8))
    assert len(run.loss) == at + 1
    assert run.outcome == "interrupted"
    assert np.isfinite(run.singular_values(3)).all()
    assert any(f"up to step {at}" in note for note in caught.value.__notes__)
    # The next run is not affected.
    assert len(dln.train(problem, weights, learning_rate=0.1, steps=5, engine=engine).loss) == 6


@pytest.mark.parametrize("engine", ENGINES)
def test_progress_prints_nothing_outside_a_terminal(engine, problem, weights, capfd):
    dln.train(problem, weights, learning_rate=0.1, steps=500, engine=engine, record=dln.Record(progress=True))
    assert "tqdm" in sys.modules
    assert capfd.readouterr() == ("", "")


# Content of the records.


def test_the_option_singular_values_sets_the_number_of_recorded_values(problem, weights):
    rates = {"learning_rate": 0.1, "steps": 4, "engine": "dense"}
    every = dln.train(problem, weights, **rates).singular_values(2)
    np.testing.assert_array_equal(
        dln.train(problem, weights, **with_record(rates, singular_values=3)).singular_values(2), every[:, :3]
    )
    assert dln.train(problem, weights, **with_record(rates, singular_values=99)).singular_values(2).shape == (
        5,
        DIM,
    )
    for no_values, engine in itertools.product((None, 0), ENGINES):
        run = dln.train(
            problem, weights, **with_record(rates | {"engine": engine}, singular_values=no_values)
        )
        with pytest.raises(ValueError, match="no singular values were recorded"):
            run.singular_values(2)
    reduced = dln.train(
        problem, weights, record=dln.Record(singular_values=3), learning_rate=0.1, steps=4, engine="reduced"
    )
    assert reduced.singular_values(2).shape == (5, 3)


def test_the_option_weights_every_sets_the_saved_weights_of_the_dense_engine(problem, weights):
    run = dln.train(
        problem, weights, learning_rate=0.1, steps=10, engine="dense", record=dln.Record(weights_every=4)
    )
    every = dln.train(
        problem, weights, learning_rate=0.1, steps=10, engine="dense", record=dln.Record(weights_every=1)
    )
    for step in (0, 4, 8, 10):
        np.testing.assert_array_equal(run.weights(2, step), every.weights(2, step))
    np.testing.assert_array_equal(run.weights(2), every.weights(2, 10))
    with pytest.raises(ValueError, match=r"step is 5.*\[0, 4, 8, 10\].*weights_every"):
        run.weights(2, 5)


@pytest.mark.parametrize("dtype", [np.float32, F64])
def test_recorded_vectors_decompose_the_weights(dtype):
    problem = dln.Problem(dln.low_rank_recovery(DIM, 2, seed=1).target, loss_scale=0.01)
    weights = dln.gaussian([DIM, 7, 12, DIM], 0.7, seed=2, dtype=dtype)
    run = dln.train(
        problem,
        weights,
        learning_rate=0.5,
        steps=6,
        record=dln.Record(every=2, weights_every=2, vectors=True, singular_values=5),
    )
    for layer in (1, 2, 3):
        for record, step in enumerate(run.steps):
            left, right = (run.singular_vectors(layer, side, step) for side in ("left", "right"))
            values, weight = run.singular_values(layer)[record], run.weights(layer, step)
            assert np.linalg.norm(weight @ right - left * values) <= tolerance(dtype, 12) * values[0] * 5
            assert np.linalg.norm(left.T @ left - np.eye(5)) <= tolerance(dtype, 12) * 5


def test_a_run_has_its_configuration(problem, weights):
    run = dln.train(
        problem,
        weights,
        learning_rate=[0.1, 0.2, 0.3],
        weight_decay=0.01,
        momentum=0.5,
        steps=9,
        record=dln.Record(every=4),
        tolerance=1e-12,
        n_threads=1,
    )
    wanted = {
        "learning_rate": [0.1, 0.2, 0.3],
        "weight_decay": [0.01] * 3,
        "momentum": [0.5] * 3,
        "steps": 9,
        "record_every": 4,
        "tolerance": 1e-12,
        "n_threads": 1,
        "dtype": "float64",
        "widths": [DIM] * 4,
        "engine": "reduced",
        "outcome": "finished",
    }
    assert {name: run.config[name] for name in wanted} == wanted
    assert run.config["problem"]["loss_scale"] == problem.loss_scale
    assert run.n_layers == 3
    assert run.problem is problem
    assert run.rank == 2
    assert 0 < run.wall_time < 60
    assert "reduced" in repr(run)


# The update rule, on one entry per layer, where it can be written down.


def descend_scalars(start, *, sigma, loss_scale, rate, decay, momentum, steps):
    w, v = list(start), [0.0] * len(start)
    losses, weights = [], []
    for _ in range(steps + 1):
        error = math.prod(w) - sigma
        losses.append(loss_scale / 2 * error**2)
        weights.append(list(w))
        slopes = [loss_scale * error * math.prod(w[:i] + w[i + 1 :]) for i in range(len(w))]
        v = [momentum[i] * v[i] + slopes[i] + decay[i] * w[i] for i in range(len(w))]
        w = [w[i] - rate[i] * v[i] for i in range(len(w))]
    return np.array(losses), np.array(weights)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("n_layers", [1, 2, 3, 5])
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_scalar_layers_follow_the_update_rule(engine, n_layers, data):
    def numbers(low, high):
        return data.draw(st.lists(st.floats(low, high), min_size=n_layers, max_size=n_layers))

    start = numbers(0.5, 1.2)
    rate, decay, momentum = numbers(0, 0.3), numbers(0, 0.1), numbers(0, 0.9)
    problem = scalar_problem()
    losses, wanted = descend_scalars(
        start, sigma=1.3, loss_scale=0.5, rate=rate, decay=decay, momentum=momentum, steps=40
    )
    run = dln.train(
        problem,
        [np.array([[w]]) for w in start],
        learning_rate=rate,
        weight_decay=decay,
        momentum=momentum,
        steps=40,
        engine=engine,
        record=dln.Record(weights_every=1),
    )
    allowed = 10 * tolerance(F64, n_layers, 40)  # momentum 0.9 sums ten steps' errors up
    np.testing.assert_allclose(np.sqrt(run.loss), np.sqrt(losses), atol=allowed)
    for layer in range(n_layers):
        got = [run.weights(layer + 1, step)[0, 0] for step in range(41)]
        np.testing.assert_allclose(got, wanted[:, layer], atol=allowed)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_layers_are_updated_simultaneously(engine):
    """After one step from (a, b), both have moved along the gradient at (a, b)."""
    a, b, sigma, rate = 0.5, 0.8, 1.3, 0.1
    run = dln.train(dln.Problem([[sigma]]), [[[a]], [[b]]], learning_rate=rate, steps=1, engine=engine)
    error = a * b - sigma
    np.testing.assert_allclose(run.weights(1), [[a - rate * error * b]], rtol=tolerance(F64, 1))
    np.testing.assert_allclose(run.weights(2), [[b - rate * error * a]], rtol=tolerance(F64, 1))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_loss_is_that_of_the_weights_of_its_step(engine, problem, weights):
    run = dln.train(
        problem, weights, learning_rate=0.5, steps=30, engine=engine, record=dln.Record(weights_every=1)
    )
    for step in run.steps:
        direct = problem.loss(run.end_to_end(int(step)))
        assert abs(run.loss[step] - direct) <= tolerance(F64, DIM**2, 30) * run.loss[0]


def test_the_loss_scale_multiplies_the_rate(weights):
    target = dln.low_rank_recovery(DIM, 2, seed=1).target
    small, large = (dln.Problem(target, loss_scale=c) for c in (0.01, 1.0))
    a = dln.train(small, weights, learning_rate=1.0, steps=50)
    b = dln.train(large, weights, learning_rate=0.01, steps=50)
    np.testing.assert_allclose(100 * a.loss, b.loss, rtol=100 * tolerance(F64, DIM, 50))  # as it converges
    for layer in (1, 2, 3):
        np.testing.assert_allclose(a.weights(layer), b.weights(layer), atol=tolerance(F64, DIM, 50) * 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_small_steps_lower_the_loss_and_conserve_the_balance(engine, problem, weights):
    """Gradient flow keeps W_{l+1}^T W_{l+1} - W_l W_l^T; descent changes it by O(eta^2) a step."""
    changes = []
    for rate in (0.2, 0.1):
        run = dln.train(
            problem,
            weights,
            learning_rate=rate,
            steps=round(40 / rate),
            engine=engine,
            record=dln.Record(weights_every=round(40 / rate)),
        )
        assert np.all(np.diff(run.loss) < 0)
        start, end = (
            dln.measures.balancedness([run.weights(layer, step) for layer in (1, 2, 3)]) for step in (0, -1)
        )
        changes.append(np.abs(end - start).max())
    assert 0 < changes[1] < 0.7 * changes[0] < 0.1


@pytest.mark.parametrize("whiten", [None, "zca"])
def test_the_loss_equals_the_loss_of_the_data(whiten):
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((6, 40)), rng.standard_normal((3, 40))
    problem = dln.Problem.from_data(X, Y, whiten=whiten)
    run = dln.train(
        problem,
        dln.gaussian([6, 6, 3]),
        learning_rate=0.05,
        steps=20,
        engine="dense",
        record=dln.Record(weights_every=1),
    )
    for step in (0, 10, 20):
        direct = problem.loss_scale / 2 * np.linalg.norm(run.end_to_end(step) @ problem.inputs - Y) ** 2
        assert abs(run.loss[step] - direct) <= tolerance(F64, X.size, 20) * direct


# The gradients.


@settings(deadline=None, max_examples=60)
@given(
    widths=st.lists(st.sampled_from([1, 2, 3, 7, 8, 13, 31, 67, 97]), min_size=2, max_size=6),
    seed=st.integers(0, 999),
    white=st.booleans(),
    dtype=st.sampled_from([np.float32, F64]),
    n_threads=st.sampled_from([1, 2, 7]),
)
def test_gradients_equal_the_reference(widths, seed, white, dtype, n_threads):
    rng = np.random.default_rng(seed)
    target = rng.standard_normal((widths[-1], widths[0]))
    gram = None
    if not white:
        root = rng.standard_normal((widths[0], widths[0] + 3))
        gram = root @ root.T
    problem = dln.Problem(target, gram, 0.3)
    weights = dln.gaussian(widths, 0.9, seed, dtype=dtype)
    wide = [w.astype(F64) for w in weights]
    norms = [np.linalg.norm(w, 2) for w in wide]
    got = dln.gradients(problem, weights, n_threads=n_threads)
    wanted = reference.gradients(wide, target, gram, 0.3)
    # Norms of the factors of a gradient; their products may cancel.
    size = np.linalg.norm(target) + math.prod(norms) * (1 if gram is None else np.linalg.norm(gram))
    for layer, (mine, plain) in enumerate(zip(got, wanted, strict=True)):
        others = math.prod(norms[:layer] + norms[layer + 1 :])
        assert mine.shape == plain.shape
        assert mine.dtype == dtype
        allowed = tolerance(dtype, max(widths), len(widths)) * 0.3 * others * size
        assert np.linalg.norm(mine - plain) <= allowed


@pytest.mark.parametrize("dtype", [np.float32, F64])
@pytest.mark.parametrize("widths", [[40, 300, 200, 3], [300, 7, 200], [90, 66, 90]])
def test_gradients_do_not_depend_on_the_team(widths, dtype):
    problem = dln.Problem(np.random.default_rng(0).standard_normal((widths[-1], widths[0])))
    weights = dln.gaussian(widths, 1.0, 1, dtype=dtype)
    alone, *others = [dln.gradients(problem, weights, n_threads=n) for n in (1, 2, 7)]
    for found in others:
        for mine, wanted in zip(found, alone, strict=True):
            np.testing.assert_array_equal(mine, wanted)


def test_gradients_of_read_only_weights():
    problem = dln.low_rank_recovery(DIM, 2)
    weights = dln.gaussian([DIM] * 3)
    before = [w.copy() for w in weights]
    for w in weights:
        w.flags.writeable = False
    dln.gradients(problem, weights)
    for w, old in zip(weights, before, strict=True):
        np.testing.assert_array_equal(w, old)


def test_gradients_where_the_loss_is_not_finite():
    weights = dln.gaussian([4, 4, 4])
    weights[1][0, 0] = 1e300
    weights[0][0, :] = 1e300
    with pytest.raises(dln.DivergedError, match="not finite at these weights") as error:
        dln.gradients(dln.low_rank_recovery(4, 1), weights)
    assert error.value.step == 0
    assert error.value.layer == 1


def test_gradients_of_lazily_sampled_weights():
    with pytest.raises(dln.AssumptionError, match="implicit=False"):
        dln.gradients(dln.low_rank_recovery(DIM, 2), dln.orthogonal([DIM] * 3, implicit=True))


def test_gradients_vanish_where_the_target_is_reached():
    problem = dln.low_rank_recovery(DIM, 2)
    weights = [np.eye(DIM), np.eye(DIM), problem.dense_target()]
    for gradient in dln.gradients(problem, weights):
        assert np.abs(gradient).max() <= tolerance(F64, DIM) * np.linalg.norm(problem.dense_target())


# Arguments stay unchanged.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("read_only", [False, True])
def test_arguments_stay_unchanged(engine, read_only, weights):
    target = dln.low_rank_recovery(DIM, 2, seed=1).target.dense()
    rates, decay = np.full(3, 0.5), [1e-3, 0.0, 1e-3]
    given_arrays = [target, rates, *weights]
    before = [a.copy() for a in given_arrays]
    if read_only:
        for array in given_arrays:
            array.flags.writeable = False
    run = dln.train(
        dln.Problem(target, loss_scale=0.01),
        weights,
        learning_rate=rates,
        weight_decay=decay,
        momentum=0.3,
        steps=20,
        engine=engine,
        record=dln.Record(weights_every=5, vectors=True),
    )
    assert run.loss[-1] < run.loss[0]
    for array, copy in zip(given_arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)
    assert decay == [1e-3, 0.0, 1e-3]


def test_runs_are_reproducible_to_the_last_bit(problem, weights):
    for engine in ENGINES:
        one, two = (
            dln.train(problem, weights, learning_rate=0.5, steps=40, engine=engine, n_threads=1)
            for _ in range(2)
        )
        np.testing.assert_array_equal(one.loss, two.loss)
        np.testing.assert_array_equal(one.weights(2), two.weights(2))


# Rates at which rounding grows.


def recovery_certificate(rate, problem=None, **options):
    problem = dln.low_rank_recovery(30, 3) if problem is None else problem
    widths = [problem.dim_in] * 3 + [problem.dim_out]
    run = dln.train(problem, dln.orthogonal(widths), learning_rate=rate, **{"steps": 2} | options)
    return run.certificate


@pytest.mark.parametrize("engine", ["auto", "reduced", "dense"])
def test_rates_above_the_stability_threshold_are_reported(engine, caplog):
    problem = dln.low_rank_recovery(30, 3)
    bound = dln.theory.stability_threshold(problem.target.s[0], 3, problem.loss_scale)
    with caplog.at_level("INFO", "dlnfast"):
        assert "rounding" not in recovery_certificate(0.999 * bound, engine=engine).reason
        assert "may grow" not in caplog.text
        reason = recovery_certificate(1.001 * bound, engine=engine).reason
    assert f"is above {bound:.3g}" in reason
    assert "trajectories can part" in reason
    assert reason in caplog.text
    assert "\n" not in reason


def test_momentum_and_rates_per_layer_move_the_threshold():
    problem = dln.low_rank_recovery(30, 3)
    bound = dln.theory.stability_threshold(problem.target.s[0], 3, problem.loss_scale)
    assert "part" not in recovery_certificate(1.49 * bound, momentum=0.5).reason
    assert "trajectories can part" in recovery_certificate(1.51 * bound, momentum=0.5).reason
    assert "part" not in recovery_certificate([1.9 * bound, 0.5 * bound, 0.5 * bound]).reason
    assert "trajectories can part" in recovery_certificate([1.9 * bound, 0.6 * bound, 0.6 * bound]).reason


@pytest.mark.parametrize(
    "problem",
    [
        dln.Problem(np.diag([3.0, 1.0]), np.diag([1.0, 2.0])),
        dln.Problem(np.zeros((2, 2))),
        dln.Problem(np.full((2, 2), 1e-300)),
    ],
)
def test_no_threshold_is_reported_where_there_is_none(problem):
    assert "part" not in recovery_certificate(0.01, problem).reason


def test_the_threshold_of_dense_targets_is_reported():
    target = dln.low_rank_recovery(30, 3).dense_target()
    problem = dln.Problem(target, loss_scale=1 / 900)
    for engine in ("reduced", "dense"):
        assert "trajectories can part" in recovery_certificate(30.0, problem, engine=engine).reason
        assert "part" not in recovery_certificate(28.0, problem, engine=engine).reason
        assert "part" not in recovery_certificate(30.0, problem, engine=engine, steps=1).reason


def not_white():
    generator = np.random.default_rng(0)
    X = generator.standard_normal((8, 200)) * np.linspace(1, 2, 8)[:, np.newaxis]
    return dln.Problem.from_data(X, generator.standard_normal((4, 8)) @ X)


def of_rank_one_inputs():
    """Return a problem whose inputs are zero in all but three dimensions."""
    X = np.random.default_rng(1).standard_normal((6, 50)) * np.array([[3.0, 2.0, 1.0, 0.0, 0.0, 0.0]]).T
    return dln.Problem.from_data(X, X[:3] + X[3:])


def at_the_balanced_minimum(problem, depth):
    """Return layers of equal singular values whose product is the least-squares solution."""
    left, values, right_t = np.linalg.svd(problem.least_squares, full_matrices=False)
    root = np.diag(values ** (1 / depth))
    return [root @ right_t, *[root] * (depth - 2), left @ root]


@pytest.mark.parametrize("make", [not_white, of_rank_one_inputs])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_sharpness_of_the_balanced_minimum_equals_that_of_its_hessian(make, depth):
    problem = make()
    found = theory_sharpness(problem, depth)
    wanted = dln.measures.sharpness(problem, at_the_balanced_minimum(problem, depth), tolerance=1e-8)
    # The eigenvalue of a Lanczos iteration is right to its tolerance.
    assert found == pytest.approx(wanted, rel=1e-7)


@pytest.mark.parametrize("make", [not_white, of_rank_one_inputs])
@pytest.mark.parametrize("engine", ["auto", "dense"])
def test_rates_above_the_threshold_are_reported_for_inputs_that_are_not_white(make, engine):
    problem = make()
    bound = 2 / theory_sharpness(problem, 3)
    assert "rounding" not in recovery_certificate(0.999 * bound, problem, engine=engine).reason
    reason = recovery_certificate(1.001 * bound, problem, engine=engine).reason
    assert f"learning_rate (eta) {1.001 * bound:.3g} is above {bound:.3g}" in reason
    assert "rounding may grow, so that trajectories can part" in reason
    assert "part" not in recovery_certificate(1.4 * bound, problem, engine=engine, momentum=0.5).reason
    assert "part" not in recovery_certificate(1.4 * bound, problem, engine=engine, steps=1).reason


def runs_from_nearly_equal_weights(problem, weights, *, rate, steps):
    """Return the distance, relative to the weights, of two runs that start 1e-13 apart, and the first run."""
    near = [w * (1 + 1e-13 * np.sign(np.sin(np.arange(w.size))).reshape(w.shape)) for w in weights]
    one, other = (
        dln.train(
            problem,
            w,
            learning_rate=rate,
            steps=steps,
            engine="dense",
            record=dln.Record(singular_values=None),
        )
        for w in (weights, near)
    )
    ends = zip(one.all_weights(), other.all_weights(), strict=True)
    return max(np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in ends), one


OBSERVED = {
    "completion": lambda: dln.low_rank_completion(40, 2, 0.6),
    "sensing": lambda: dln.low_rank_sensing(16, 2, 200),
}


@pytest.mark.parametrize("kind", OBSERVED)
def test_rates_below_the_threshold_are_not_reported_for_observed_matrices(kind):
    problem = OBSERVED[kind]()
    weights = dln.orthogonal([problem.dim_in] * 4, 0.3, seed=1)
    bound = 2 / minimum_sharpness(problem, [0.3] * 3, [1.0] * 3)
    apart, run = runs_from_nearly_equal_weights(problem, weights, rate=0.5 * bound, steps=500)
    assert apart < 1e-12
    assert "rounding" not in run.certificate.reason


@pytest.mark.parametrize("kind", OBSERVED)
def test_rates_above_the_threshold_are_reported_for_observed_matrices(kind):
    problem = OBSERVED[kind]()
    weights = dln.orthogonal([problem.dim_in] * 4, 0.3, seed=1)
    bound = 2 / minimum_sharpness(problem, [0.3] * 3, [1.0] * 3)
    apart, run = runs_from_nearly_equal_weights(problem, weights, rate=1.3 * bound, steps=1500)
    assert apart > 1e-12
    assert f"learning_rate (eta) {1.3 * bound:.3g} is above {bound:.3g}" in run.certificate.reason
    assert "by an estimate from the observations" in run.certificate.reason
    assert "rounding may grow, so that trajectories can part" in run.certificate.reason


@pytest.mark.parametrize("kind", OBSERVED)
def test_automatic_rates_are_not_reported_for_observed_matrices(kind):
    problem = OBSERVED[kind]()
    weights = dln.orthogonal([problem.dim_in] * 4, 0.3, seed=1)
    for options in ({"learning_rate": "auto"}, {"learning_rate": "adaptive"}, {"learning_rate": 0.0}):
        assert "part;" not in dln.train(problem, weights, steps=2, **options).certificate.reason
        assert "rounding" not in dln.train(problem, weights, steps=2, **options).certificate.reason


@pytest.mark.parametrize("kind", OBSERVED)
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_estimated_sharpness_is_near_the_true_one(kind, depth):
    problem = OBSERVED[kind]()
    root = np.diag(problem.truth.s ** (1 / depth))
    layers = [root @ problem.truth.V.T, *[root] * (depth - 2), problem.truth.U @ root]
    # Gauss-Newton is the whole Hessian where the residual is zero.
    rows = []
    for index, layer in enumerate(layers):
        for entry in range(layer.size):
            unit = np.zeros(layer.size)
            unit[entry] = 1.0
            changed = [*layers[:index], unit.reshape(layer.shape), *layers[index + 1 :]]
            product = changed[0]
            for factor in changed[1:]:
                product = factor @ product
            rows.append(problem.apply(product) if kind == "sensing" else problem.predict(product))
    wanted = problem.loss_scale * np.linalg.norm(np.array(rows), 2) ** 2
    # An estimate: it ignores how the observations are spread over rows and columns.
    assert minimum_sharpness(problem, [1e-3] * depth, [1.0] * depth) == pytest.approx(wanted, rel=0.5)


def test_one_layer_on_an_observed_matrix_has_an_exact_threshold():
    problem = dln.low_rank_completion(10, 2, 0.5, reduction="sum")
    start = [np.zeros((10, 10))]
    for rate, named in ((1.99, False), (2.01, True)):
        reason = dln.train(problem, start, learning_rate=rate, steps=2).certificate.reason
        assert ("is above 2, where" in reason) == named


@pytest.mark.parametrize(
    "options", [{"outer": 0.0}, {}, {"outer_every": 3}], ids=["frozen", "outer", "turns"]
)
def test_compressed_runs_report_rates_above_the_threshold(options):
    problem = dln.low_rank_completion(60, 2, 0.5)
    arguments = {"rank": 2, "steps": 6, "record": dln.Record(singular_values=None), **options}
    weights = dln.orthogonal([60] * 4, 0.1)
    for rate, named in ((1e-3, False), (1e3, True)):
        reason = dln.train_compressed(problem, weights, learning_rate=rate, **arguments).certificate.reason
        assert reason.startswith("compressed to 4 dimensions by the gradient")
        assert ("rounding may grow, so that trajectories can part" in reason) == named


# The default learning rate.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_automatic_learning_rate_trains(engine, momentum, problem, weights):
    run = dln.train(problem, weights, learning_rate="auto", momentum=momentum, steps=2000, engine=engine)
    scale = np.linalg.norm(weights[0]) / np.sqrt(DIM)
    wanted = dln.theory.default_learning_rate(problem, len(weights), scale=scale) * (1 - momentum)
    np.testing.assert_allclose(run.config["learning_rate"], wanted, rtol=1e-12)
    assert run.loss[-1] < 1e-3 * run.loss[0]


@pytest.mark.parametrize("decay", [0.2, 50.0])
def test_an_automatic_learning_rate_allows_weight_decay(decay, problem, weights):
    run = dln.train(problem, weights, learning_rate="auto", weight_decay=decay, steps=200)
    assert run.config["learning_rate"][0] <= 1 / decay
    penalty = decay / 2 * sum(np.sum(run.weights(layer) ** 2) for layer in (1, 2, 3))
    start = decay / 2 * sum(np.sum(w**2) for w in weights)
    assert run.loss[-1] + penalty < run.loss[0] + start


def test_an_automatic_learning_rate_for_lazily_sampled_weights(problem):
    lazy_weights = dln.orthogonal([DIM] * 4, [0.3, 0.5, 0.4], implicit=True)
    run = dln.train(problem, lazy_weights, learning_rate="auto", steps=1)
    wanted = dln.theory.default_learning_rate(problem, 3, scale=0.5)
    assert run.config["learning_rate"] == [wanted] * 3


def test_unknown_learning_rate_words_are_refused(problem, weights):
    with pytest.raises(TypeError, match=r"learning_rate \(eta\) is 'fast'"):
        dln.train(problem, weights, learning_rate="fast", steps=1)
