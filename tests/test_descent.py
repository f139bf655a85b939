"""`train` and `gradients`: settings, records, and what any run must satisfy."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference


@pytest.fixture
def problem():
    return dln.low_rank_recovery(16, 2, seed=3)


@pytest.fixture
def weights():
    return dln.orthogonal([16] * 4, scale=0.8, seed=3)


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [(10, 1, list(range(11))), (10, 5, [0, 5, 10]), (10, 4, [0, 4, 8, 10]), (3, 10, [0, 3]), (0, 7, [0])],
)
def test_records_stand_at_the_right_steps(problem, weights, engine, steps, every, expected):
    run = dln.train(problem, weights, learning_rate=1.0, steps=steps, record_every=every, engine=engine)
    assert run.steps.tolist() == expected
    assert len(run.loss) == steps + 1
    assert run.singular_values(2).shape == (len(expected), 16)


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_recording_does_not_change_the_run(problem, weights, engine):
    runs = [
        dln.train(problem, weights, learning_rate=2.0, steps=40, record_every=k, engine=engine)
        for k in (1, 7, 40)
    ]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.loss, runs[0].loss)
        np.testing.assert_array_equal(run.weights(3), runs[0].weights(3))


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_a_tolerance_ends_the_run(problem, weights, engine):
    full = dln.train(problem, weights, learning_rate=5.0, steps=300, engine=engine)
    goal = float(full.loss[100])
    run = dln.train(
        problem, weights, learning_rate=5.0, steps=300, engine=engine, tolerance=goal, record_every=1000
    )
    first = int(np.argmax(full.loss <= goal))
    assert len(run.loss) == first + 1
    assert run.steps.tolist() == [0, first]
    assert run.config["outcome"] == "converged"
    np.testing.assert_array_equal(run.loss, full.loss[: first + 1])


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_how_many_singular_values(problem, weights, engine):
    everything = dln.train(problem, weights, learning_rate=1.0, steps=5, engine=engine)
    some = dln.train(problem, weights, learning_rate=1.0, steps=5, engine=engine, singular_values=3)
    np.testing.assert_array_equal(some.singular_values(1), everything.singular_values(1)[:, :3])
    more = dln.train(problem, weights, learning_rate=1.0, steps=5, engine=engine, singular_values=99)
    assert more.singular_values(1).shape == (6, 16)


def test_weights_every(problem, weights):
    run = dln.train(problem, weights, learning_rate=1.0, steps=10, engine="dense", weights_every=4)
    whole = dln.train(problem, weights, learning_rate=1.0, steps=10, engine="dense", weights_every=1)
    for step in (0, 4, 8, 10, -1):
        np.testing.assert_array_equal(run.weights(2, step), whole.weights(2, step))


sizes = st.sampled_from([1, 2, 3, 5, 7, 11, 17])


@settings(deadline=None, max_examples=60)
@given(
    widths=st.lists(sizes, min_size=2, max_size=6),
    seed=st.integers(0, 1000),
    white=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
    n_threads=st.sampled_from([0, 1, 2, 7]),
)
def test_gradients_are_those_of_the_reference(widths, seed, white, dtype, n_threads):
    rng = np.random.default_rng(seed)
    gram = None
    if not white:
        root = rng.standard_normal((widths[0], widths[0] + 2))
        gram = root @ root.T
    target = rng.standard_normal((widths[-1], widths[0]))
    problem = dln.Problem(target, gram, loss_scale=0.3)
    weights = dln.gaussian(widths, scale=1.3, seed=seed, dtype=dtype)
    found = dln.gradients(problem, weights, n_threads=n_threads)
    expected = reference.gradients([w.astype(np.float64) for w in weights], target, gram, 0.3)
    # Rounding is relative to the products of norms, not to a gradient that may cancel.
    norms = [np.linalg.norm(w.astype(np.float64)) for w in weights]
    size = np.linalg.norm(np.eye(1) if gram is None else gram)
    for layer, (g, e) in enumerate(zip(found, expected, strict=True)):
        rest = np.prod(norms[:layer] + norms[layer + 1 :])
        scale = 0.3 * rest * (np.prod(norms) * size + np.linalg.norm(target))
        limit = tolerance(dtype, max(widths)) * len(widths) * scale
        assert g.dtype == dtype
        assert np.linalg.norm(g - e) <= limit


@settings(deadline=None, max_examples=40)
@given(
    widths=st.lists(sizes, min_size=2, max_size=5),
    seed=st.integers(0, 1000),
    white=st.booleans(),
    decay=st.sampled_from([0.0, 1e-2]),
    momentum=st.sampled_from([0.0, 0.6]),
)
def test_dense_runs_are_those_of_the_reference(widths, seed, white, decay, momentum):
    rng = np.random.default_rng(seed)
    gram = None
    if not white:
        root = rng.standard_normal((widths[0], widths[0] + 2)) / np.sqrt(widths[0] + 2)
        gram = root @ root.T + 0.5 * np.eye(widths[0])
    problem = dln.Problem(rng.standard_normal((widths[-1], widths[0])), gram)
    weights = dln.gaussian(widths, scale=0.7, seed=seed)
    n_layers, steps = len(weights), 30
    rates = {
        "learning_rate": [0.02 / (layer + 1) for layer in range(n_layers)],
        "weight_decay": [decay * layer for layer in range(n_layers)],
        "momentum": [momentum / (layer + 1) for layer in range(n_layers)],
    }
    run = dln.train(problem, weights, steps=steps, engine="dense", weights_every=1, **rates)
    states = list(
        reference.train_dense(
            weights,
            problem.dense_target(),
            input_gram=gram,
            loss_scale=1.0,
            steps=steps,
            output_norm_squared=problem.output_norm_squared,
            **rates,
        )
    )
    # Small rates: no direction is amplified, so that errors add up like random steps do.
    limit = tolerance(np.float64, max(widths), steps) * 10
    for step, (loss, expected) in enumerate(states):
        assert run.loss[step] == pytest.approx(loss, rel=limit, abs=limit)
        for layer, w in enumerate(expected):
            assert np.linalg.norm(run.weights(layer + 1, step) - w) <= limit * np.linalg.norm(w)


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_small_steps_lower_the_loss_and_keep_the_balance(problem, weights, engine):
    run = dln.train(problem, weights, learning_rate=0.05, steps=200, engine=engine, weights_every=200)
    assert (np.diff(run.loss) < 0).all()
    ends = [dln.measures.balancedness([run.weights(layer, step) for layer in (1, 2, 3)]) for step in (0, 200)]
    # Gradient flow keeps W_{l+1}^T W_{l+1} - W_l W_l^T; descent drifts by O(eta^2) a step.
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-3)


def test_the_loss_is_that_of_the_data():
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((6, 40)), rng.standard_normal((3, 40))
    for whiten in (None, "zca"):
        problem = dln.Problem.from_data(X, Y, whiten=whiten)
        run = dln.train(
            problem,
            dln.gaussian([6, 6, 3], seed=1),
            learning_rate=0.05,
            steps=20,
            engine="dense",
            weights_every=1,
        )
        for step in (0, 10, 20):
            residual = run.end_to_end(step) @ problem.inputs - Y
            assert run.loss[step] == pytest.approx(np.sum(residual**2) / (2 * 3 * 40), rel=1e-12)


def test_the_bar_appears_only_when_wanted(problem, weights, capsys):
    dln.train(problem, weights, learning_rate=1.0, steps=10, progress=False)
    assert capsys.readouterr().err == ""
    dln.train(problem, weights, learning_rate=1.0, steps=10, progress=True)
    assert "tqdm" in sys.modules
    assert "%" not in capsys.readouterr().err  # no terminal, and far below a second


def test_the_configuration_is_kept(problem, weights):
    run = dln.train(problem, weights, learning_rate=[1.0, 2.0, 3.0], weight_decay=0.1, steps=4)
    assert run.config["learning_rate"] == [1.0, 2.0, 3.0]
    assert run.config["weight_decay"] == [0.1] * 3
    assert run.config["widths"] == [16] * 4
    assert run.config["outcome"] == "finished"
    assert run.config["problem"]["loss_scale"] == problem.loss_scale
    assert run.wall_time > 0
