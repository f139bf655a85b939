# SPDX-License-Identifier: MIT
"""Quantities of the theory that trajectories compute from cores and families, against whole matrices."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from helpers.matrices import draw_orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import measures, reference
from dlnfast._support.eigenvalues import largest_eigenvalues
from dlnfast._trajectory import hessian, tangent_kernel

F64 = np.float64
SEED = 5


def make_target(rows, columns, rank):
    U, V = draw_orthonormal(1, rows, rank), draw_orthonormal(2, columns, rank)
    return dln.LowRank(U, np.linspace(2.0, 1.0, rank), V)


def spiked_problem(dim, rank):
    spike = draw_orthonormal(3, dim, 1)
    gram = np.eye(dim) + 2 * spike @ spike.T
    return dln.Problem(make_target(dim, dim, rank).dense() @ gram, input_gram=gram)


def projector_problem(dim, n_samples):
    """Return a problem with fewer orthonormal samples than inputs: directions with S = 0 run through all."""
    X = draw_orthonormal(3, dim, n_samples)
    return dln.Problem(make_target(dim, dim, 1).dense() @ X @ X.T, input_gram=X @ X.T)


#: Problem and widths; every kind of family: through all layers, from or to a hidden layer, none.
CASES = {
    "square": (dln.Problem(make_target(10, 10, 2)), [10, 10, 10, 10]),
    "one layer": (dln.Problem(make_target(9, 9, 2)), [9, 9]),
    "two layers": (dln.Problem(make_target(10, 10, 2)), [10, 10, 10]),
    "four layers": (dln.Problem(make_target(8, 8, 1)), [8, 8, 8, 8, 8]),
    "wide last layer": (dln.classification(3, 4, seed=3), [12, 12, 12, 3]),
    "narrow inputs": (dln.Problem(make_target(12, 8, 1)), [8, 12, 12, 12]),
    "narrow outputs": (dln.Problem(make_target(7, 10, 1)), [10, 10, 7, 7]),
    "wide hidden layers": (dln.Problem(make_target(12, 12, 1)), [12, 14, 12]),
    "spiked inputs": (spiked_problem(10, 1), [10, 10, 10]),
    "few samples": (projector_problem(10, 5), [10, 10, 10]),
}


def train(problem, widths, *, steps=40, every=20, engine="reduced", record=None, scale=0.6, rate=0.02):
    """Return a run that has records before, during and after most of the descent."""
    weights = dln.orthogonal(widths, scale, seed=SEED)
    record = record or dln.Record(every=every)
    return dln.train(problem, weights, learning_rate=rate, steps=steps, engine=engine, record=record)


def whole_layers(run):
    return [[w.astype(F64) for w in run.all_weights(int(step))] for step in run.steps]


def explicit_eigenvalues(problem, weights):
    target = problem.dense_target()
    matrix = reference.hessian(weights, target, problem.input_gram, problem.loss_scale)
    return np.linalg.eigvalsh(matrix)[::-1]


# The Hessian.


@pytest.mark.parametrize("name", CASES)
def test_all_eigenvalues_of_the_hessian_equal_those_of_the_explicit_one(name):
    problem, widths = CASES[name]
    run = train(problem, widths)
    n_weights = sum(rows * columns for rows, columns in run.shapes)
    found = run.sharpness(n_weights)
    assert found.shape == (3, n_weights)
    for values, weights in zip(found, whole_layers(run), strict=True):
        wanted = explicit_eigenvalues(problem, weights)
        assert np.abs(values - wanted).max() <= tolerance(F64, n_weights) * np.abs(wanted).max()


@settings(max_examples=15, deadline=None)
@given(
    dim=st.integers(4, 9),
    rank=st.integers(1, 2),
    depth=st.integers(1, 4),
    scale=st.sampled_from([0.1, 0.7, 1.0]),
    steps=st.sampled_from([0, 1, 30, 1000]),
)
def test_eigenvalues_for_drawn_shapes(dim, rank, depth, scale, steps):
    rank = min(rank, dim // 2)
    problem = dln.Problem(make_target(dim, dim, rank))
    run = train(problem, [dim] * (depth + 1), scale=scale, steps=steps, every=1000)
    found = run.sharpness(depth * dim**2)
    for values, weights in zip(found, whole_layers(run), strict=True):
        wanted = explicit_eigenvalues(problem, weights)
        # Rounding of the closure, which is about that of a product of d x d matrices for each step.
        allowed = tolerance(F64, depth * dim**2, max(steps, 1))
        assert np.abs(values - wanted).max() <= allowed * np.abs(wanted).max()


def test_the_largest_eigenvalues_of_a_wider_network():
    """30 wide, three layers, before and at convergence; multiplicities are above 20."""
    problem = dln.low_rank_recovery(30, 3, seed=0)
    run = dln.train(
        problem,
        dln.orthogonal([30] * 4, 0.8, seed=1),
        learning_rate="auto",
        steps=3000,
        record=dln.Record(every=3000),
    )
    assert run.engine == "reduced"
    assert run.loss[-1] < 1e-3 * run.loss[0]
    found = run.sharpness(60)
    for values, weights in zip(found, whole_layers(run), strict=True):
        wanted = explicit_eigenvalues(problem, weights)[:60]
        assert np.abs(values - wanted).max() <= 1e-10 * wanted[0]
        np.testing.assert_allclose(run.sharpness()[:, 0], found[:, 0], rtol=1e-10)


@pytest.mark.parametrize("name", ["square", "wide last layer", "spiked inputs"])
def test_iteration_on_the_cores_finds_the_same_eigenvalues(name, monkeypatch):
    run = train(*CASES[name])
    whole = run.sharpness(25)
    monkeypatch.setattr(hessian, "DENSE_LIMIT", 0)
    iterated = run.sharpness(25)
    assert np.all(np.abs(iterated - whole) <= 1e-10 * whole[:, :1])
    assert np.all(np.abs(run.sharpness(1) - whole[:, :1]) <= 1e-10 * whole[:, :1])


def test_the_sharpness_of_the_minimum_is_that_of_the_theory():
    problem = dln.Problem(make_target(10, 10, 2))
    weights = dln.aligned(problem, [10] * 4, 0.5)
    run = dln.train(problem, weights, learning_rate=0.05, steps=2000, record=dln.Record(every=2000))
    np.testing.assert_allclose(run.mode_strengths()[-1], [2.0, 1.0], rtol=1e-12)
    wanted = 2.0 / dln.theory.stability_threshold(2.0, 3, problem.loss_scale)
    assert run.sharpness()[-1, 0] == pytest.approx(wanted, rel=1e-9)


def test_inputs_that_mix_the_complement_are_computed_from_whole_layers(caplog):
    """S need not be a multiple of the identity on directions that end at a wide last layer."""
    dim, n_outputs = 16, 2
    weights = dln.orthogonal([dim, dim, n_outputs], 0.6, seed=SEED)
    solution = make_target(n_outputs, dim, n_outputs)
    spike = draw_orthonormal(3, dim, 1)
    sources = {}
    for name, gram in (
        ("white", None),
        ("spiked", np.eye(dim) + spike @ spike.T),
        ("general", np.diag(np.linspace(1.0, 2.0, dim))),
    ):
        problem = dln.Problem(solution if gram is None else solution.dense() @ gram, input_gram=gram)
        run = dln.train(problem, weights, learning_rate=0.02, steps=10, record=dln.Record(every=5))
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="dlnfast"):
            found = run.sharpness(3)
        sources[name] = run.engine, caplog.messages[-1].removeprefix("the sharpness is computed from ")
        for values, layers in zip(found, whole_layers(run), strict=True):
            wanted = explicit_eigenvalues(problem, layers)[:3]
            assert np.abs(values - wanted).max() <= 1e-10 * wanted[0]
    assert sources == {
        "white": ("reduced", "cores and scalars"),
        "spiked": ("reduced", "whole layers"),
        "general": ("dense", "whole layers"),
    }


# End to end.


@pytest.mark.parametrize("name", CASES)
def test_end_to_end_values_modes_and_balance_equal_those_of_whole_layers(name):
    problem, widths = CASES[name]
    run = train(problem, widths)
    values, modes, balance = run.end_to_end_singular_values(), run.mode_strengths(), run.balancedness()
    assert values.shape == (3, min(widths[0], widths[-1]))
    assert modes.shape == (3, run.rank)
    assert balance.shape == (3, len(widths) - 2)
    np.testing.assert_array_equal(run.end_to_end_singular_values(2), values[:, :2])
    solution = dln.Problem(problem.least_squares)
    allowed = tolerance(F64, max(widths), 40)
    for i, weights in enumerate(whole_layers(run)):
        product = reference.end_to_end(weights)
        wanted = np.linalg.svd(product, compute_uv=False)
        assert np.abs(values[i] - wanted).max() <= allowed * wanted[0]
        assert np.abs(modes[i] - measures.mode_strengths(solution, product)).max() <= allowed * wanted[0]
        if len(weights) > 1:
            size = max(np.linalg.norm(w) for w in weights) ** 2
            assert np.abs(balance[i] - measures.balancedness(weights)).max() <= allowed * size


def test_dense_runs_give_the_same_answers():
    for name in ("square", "wide last layer", "narrow inputs"):
        problem, widths = CASES[name]
        small, whole = (train(problem, widths, engine=engine) for engine in ("reduced", "dense"))
        allowed = tolerance(F64, max(widths), 40) * 10  # values of products of all layers
        for method in ("end_to_end_singular_values", "mode_strengths", "balancedness", "sharpness"):
            a, b = getattr(small, method)(), getattr(whole, method)()
            relative = 1e-9 if method == "sharpness" else allowed  # by iteration in the dense run
            assert np.abs(a - b).max() <= relative * np.abs(b).max()
        a, b = small.train_kernel(3), whole.train_kernel(3)
        np.testing.assert_allclose(a.eigenvalues, b.eigenvalues, rtol=1e-9)
        np.testing.assert_allclose(a.trace, b.trace, rtol=allowed)


def test_float32_runs_are_answered_in_float64():
    problem, widths = CASES["square"]
    weights = dln.orthogonal(widths, 0.6, seed=SEED, dtype=np.float32)
    run = dln.train(problem, weights, learning_rate=0.02, steps=20, engine="reduced")
    double = train(problem, widths, steps=20, every=1)
    for method in ("end_to_end_singular_values", "mode_strengths", "sharpness"):
        found, wanted = getattr(run, method)(), getattr(double, method)()
        assert found.dtype == F64
        assert np.abs(found - wanted).max() <= tolerance(np.float32, 10, 20) * np.abs(wanted).max()


def test_lazily_sampled_networks_of_a_million_units():
    dim, scale = 10**6, 0.5
    problem = dln.low_rank_recovery(dim, 2, seed=0)
    weights = dln.orthogonal([dim] * 4, scale, seed=1, implicit=True)
    run = dln.train(problem, weights, learning_rate="auto", steps=200, record=dln.Record(every=100))
    values = run.end_to_end_singular_values(6)
    np.testing.assert_allclose(values[0], scale**3, rtol=1e-12)
    rho = run.rho(1) * run.rho(2) * run.rho(3)
    np.testing.assert_allclose(values[:, 4:], np.repeat(rho[:, None], 2, axis=1), rtol=1e-9)
    np.testing.assert_allclose(run.balancedness()[0], 0.0, atol=1e-9)
    modes = run.mode_strengths()
    assert np.all(np.diff(modes, axis=0) > 0)
    sharpness = run.sharpness(3)
    # At the start all layers are scaled rotations, so that the Gauss-Newton part is c 3 scale^4 I.
    assert np.all(sharpness[:, 0] >= sharpness[:, 2])
    assert sharpness[0, 0] >= problem.loss_scale * 3 * scale**4
    kernel = run.train_kernel(4)
    # At the start K is 3 scale^4 times the identity.
    np.testing.assert_allclose(kernel.eigenvalues[0], 3 * scale**4, rtol=1e-12)
    np.testing.assert_allclose(kernel.trace[0], 3 * scale**4 * dim**2, rtol=1e-12)


# The tangent kernel.


@pytest.mark.parametrize("limit", [0, 256])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_that_of_the_jacobian(name, limit, monkeypatch):
    monkeypatch.setattr(tangent_kernel, "_DENSE_LIMIT", limit)
    problem, widths = CASES[name]
    run = train(problem, widths)
    k = 6
    found = run.train_kernel(k)
    inputs = np.eye(widths[0]) if problem.input_factor is None else problem.input_factor
    for i, weights in enumerate(whole_layers(run)):
        whole = reference.train_kernel(weights, inputs)
        wanted = np.linalg.eigvalsh(whole)[::-1][:k]
        np.testing.assert_allclose(found.eigenvalues[i], wanted, rtol=1e-9)
        assert found.trace[i] == pytest.approx(np.trace(whole), rel=1e-12)
    for layer in range(len(widths) - 1):
        weights = whole_layers(run)[-1]
        above = reference.end_to_end([np.eye(widths[layer + 1]), *weights[layer + 1 :]])
        below = reference.end_to_end([np.eye(widths[0]), *weights[:layer]])
        last, first = run.states.bases[-1], run.states.bases[0]
        allowed = tolerance(F64, max(widths), 40) * np.linalg.norm(above) ** 2
        left = last.T @ above @ above.T @ last
        assert np.abs(found.left[layer][-1] - left).max() <= allowed
        allowed = tolerance(F64, max(widths), 40) * max(np.linalg.norm(below) ** 2, 1.0)
        right = first.T @ below.T @ below @ first
        assert np.abs(found.right[layer][-1] - right).max() <= allowed
        outside = found.left_outside[layer][-1] @ found.left_multiplicities
        assert np.trace(found.left[layer][-1]) + outside == pytest.approx(np.linalg.norm(above) ** 2)
        outside = found.right_outside[layer][-1] @ found.right_multiplicities
        assert np.trace(found.right[layer][-1]) + outside == pytest.approx(np.linalg.norm(below) ** 2)


def test_the_kernel_gives_the_velocity_of_the_outputs():
    """A small step moves W_{L:1} by -eta c sum_l P_l (W_{L:1} - Phi) Q_l."""
    problem, widths = CASES["square"]
    run = train(problem, widths, steps=1, every=1, rate=1e-6)
    kernel = run.train_kernel()
    error = run.states.cores[2][0] @ run.states.cores[1][0] @ run.states.cores[0][0] - run.states.target
    velocity = -problem.loss_scale * sum(
        p[0] @ error @ q[0] for p, q in zip(kernel.left, kernel.right, strict=True)
    )
    last, first = run.states.bases[-1], run.states.bases[0]
    moved = last.T @ (run.end_to_end(1) - run.end_to_end(0)) @ first / 1e-6
    assert np.abs(moved - velocity).max() <= 1e-5 * np.abs(velocity).max()  # second order in the step


def test_both_kernels_of_a_run_have_the_same_factors_of_whole_layers():
    problem = dln.Problem(np.random.default_rng(0).standard_normal((3, 5)))
    weights = dln.gaussian([5, 4, 6, 3], 0.5, seed=1)
    run = dln.train(problem, weights, learning_rate=0.1, steps=3, engine="dense")
    over_records = run.train_kernel(4)
    for step in run.steps:
        kernel = run.neural_tangent_kernel(step)
        for name in ("left", "right"):
            factors = zip(getattr(kernel, name), getattr(over_records, name), strict=True)
            for of_step, of_all in factors:
                np.testing.assert_allclose(of_step, of_all[step], rtol=0, atol=tolerance(F64, 6))
        # The inputs are white: the kernel over the outputs has the eigenvalues of the map.
        values = np.linalg.eigvalsh(kernel.dense())[::-1]
        np.testing.assert_allclose(over_records.eigenvalues[step], values[:4], rtol=1e-12)
        assert over_records.trace[step] == pytest.approx(kernel.trace(), rel=1e-12)


# Errors.


def test_questions_that_cannot_be_answered():
    problem, widths = CASES["square"]
    run = train(problem, widths)
    with pytest.raises(ValueError, match="k is 11"):
        run.end_to_end_singular_values(11)
    with pytest.raises(ValueError, match="k is 301"):
        run.sharpness(301)
    with pytest.raises(ValueError, match="k is 101"):
        run.train_kernel(101)
    with pytest.raises(ValueError, match="tolerance is 0"):
        run.sharpness(tolerance=0.0)
    sparse = train(problem, widths, engine="dense", record=dln.Record(every=10, weights_every=40))
    for method in (
        "end_to_end_singular_values",
        "mode_strengths",
        "balancedness",
        "sharpness",
        "train_kernel",
    ):
        with pytest.raises(
            ValueError, match=r"step is 10, .*\[0, 40\] only: record=dln\.Record\(weights_every"
        ):
            getattr(sparse, method)()


def test_partly_known_matrices_have_no_modes_and_no_hessian_here():
    problem = dln.low_rank_completion(dim=12, rank=2, observed=0.6)
    run = dln.train(problem, dln.orthogonal([12] * 3, 0.5), learning_rate=0.1, steps=4)
    assert run.end_to_end_singular_values().shape == (5, 12)
    assert run.balancedness().shape == (5, 1)
    for method in ("mode_strengths", "sharpness", "train_kernel"):
        with pytest.raises(ValueError, match=f"{method} needs a Problem .* is Completion"):
            getattr(run, method)()


# The iteration.


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_largest_eigenvalues_with_multiplicities(size):
    values = np.repeat([3.0, 1.0, 0.0, -5.0], [min(3, size), size, size, size])[:size]
    basis = draw_orthonormal(4, size, size)
    matrix = basis * values @ basis.T
    for k in range(1, size + 1):
        found = largest_eigenvalues(lambda x: matrix @ x, size, k, 1e-10, "test")
        assert np.abs(found - np.sort(values)[::-1][:k]).max() <= 1e-10 * np.abs(values).max()


def test_eigenvalues_of_zero_and_of_slow_iterations():
    np.testing.assert_array_equal(largest_eigenvalues(np.zeros_like, 5, 3, 1e-10, "test"), np.zeros(3))
    scales = np.linspace(0.0, 1.0, 200)
    with pytest.raises(ValueError, match="tolerance is 1e-12: not reached after 20 iterations"):
        largest_eigenvalues(lambda x: scales * x, 200, 1, 1e-12, "test", max_iterations=20)
