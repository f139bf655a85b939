# SPDX-License-Identifier: MIT
"""Matrix completion and sensing: the problems, their losses, and the dense engine on them."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import numpy as np
import pytest
from helpers.optional_packages import import_sparse
from helpers.records import with_record
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference
from dlnfast._problem.factors import leading_factors

F64 = np.float64


def mask_of(shape, density, rng):
    mask = rng.random(shape) < density
    mask[rng.integers(shape[0]), rng.integers(shape[1])] = True
    return mask


def draw_gaussian_layers(widths, rng, dtype=F64):
    return [(rng.standard_normal((m, n)) / np.sqrt(max(m, n))).astype(dtype) for n, m in pairwise(widths)]


# The engine against the definition.


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n_threads", [1, 2, 7])
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_descent_on_entries_equals_the_reference(dtype, n_threads, data):
    widths = data.draw(st.lists(st.integers(1, 23), min_size=2, max_size=6))
    density = data.draw(st.sampled_from([0.02, 0.1, 0.3, 1.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shape = widths[-1], widths[0]
    mask, target = mask_of(shape, density, rng), rng.standard_normal(shape)
    weights = draw_gaussian_layers(widths, rng, dtype)
    momentum = data.draw(st.sampled_from([0.0, 0.6]))
    n = len(weights)
    rates = {
        # The first or the last layer may be frozen.
        "learning_rate": [data.draw(st.sampled_from([0.0, 0.02, 0.05])) for _ in range(n)],
        "weight_decay": [data.draw(st.sampled_from([0.0, 0.1])) for _ in range(n)],
        "momentum": [momentum] * n,
    }
    steps = 6
    problem = dln.Completion.from_dense(target, mask, loss_scale=0.7)
    run = dln.train(
        problem,
        weights,
        steps=steps,
        n_threads=n_threads,
        **with_record(rates, singular_values=None, weights_every=1),
    )
    wanted = list(
        reference.train_observed(
            [w.astype(F64) for w in weights],
            target.astype(dtype).astype(F64),
            mask,
            loss_scale=0.7,
            steps=steps,
            **rates,
        )
    )
    limit = 4 * tolerance(dtype, max(widths) * n, steps)  # the errors of n products add up
    np.testing.assert_allclose(run.loss, [loss for loss, _ in wanted], rtol=limit, atol=limit * wanted[0][0])
    for step, (_, layers) in enumerate(wanted):
        for layer, w in enumerate(layers, start=1):
            assert np.linalg.norm(run.weights(layer, step) - w) <= limit * max(np.linalg.norm(w), 1.0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n_threads", [1, 2, 7])
def test_descent_on_measurements_equals_the_reference(dtype, n_threads):
    rng = np.random.default_rng(3)
    widths = [7, 5, 11]
    operators = rng.standard_normal((40, 11, 7)) / 40
    values = rng.standard_normal(40)
    weights = draw_gaussian_layers(widths, rng, dtype)
    rates = {"learning_rate": [0.5, 0.4], "weight_decay": [0.0, 0.1], "momentum": [0.0, 0.5]}
    problem = dln.Sensing(operators, values)
    run = dln.train(problem, weights, steps=9, n_threads=n_threads, **rates)
    wanted = list(
        reference.train_measured(
            [w.astype(F64) for w in weights], operators, values, loss_scale=1.0, steps=9, **rates
        )
    )
    limit = 4 * tolerance(dtype, 77, 9)
    np.testing.assert_allclose(run.loss, [loss for loss, _ in wanted], rtol=limit)
    for layer in (1, 2):
        np.testing.assert_allclose(run.weights(layer), wanted[-1][1][layer - 1], atol=limit)


def test_a_full_mask_equals_the_fully_observed_problem():
    target = dln.low_rank_recovery(20, 3).target
    weights = dln.orthogonal([20] * 4, 0.5)
    settings_ = {"learning_rate": 0.5, "steps": 50, "engine": "dense"}
    whole = dln.train(dln.Problem(target, loss_scale=1 / 400), weights, **settings_)
    everything = dln.train(dln.Completion.from_dense(target.dense()), weights, **settings_)
    np.testing.assert_allclose(everything.loss, whole.loss, rtol=tolerance(F64, 20, 50))


def test_the_result_does_not_depend_on_the_number_of_threads():
    problem = dln.low_rank_completion(300, 3, 0.1)
    weights = draw_gaussian_layers([300, 6, 6, 300], np.random.default_rng(0))
    runs = [
        dln.train(
            problem,
            weights,
            learning_rate=10.0,
            steps=20,
            n_threads=n,
            record=dln.Record(singular_values=None),
        )
        for n in (1, 2, 7)
    ]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.loss, runs[0].loss)
        np.testing.assert_array_equal(run.weights(1), runs[0].weights(1))


@pytest.mark.parametrize("n_threads", [1, 2, 7])
@pytest.mark.parametrize("dtype", [np.float32, F64])
@pytest.mark.parametrize("widths", [(5, 4, 6), (5, 6), (1, 3, 1), (31, 2, 37), (67, 71, 73, 79)])
def test_gradients_equal_the_reference(widths, dtype, n_threads):
    rng = np.random.default_rng(1)
    shape = widths[-1], widths[0]
    density = 0.1 if min(shape) > 30 else 0.5
    mask, target = mask_of(shape, density, rng), rng.standard_normal(shape)
    weights = [w.astype(dtype) for w in draw_gaussian_layers(widths, rng)]
    wide = [w.astype(F64) for w in weights]
    product = functools.reduce(lambda m, w: w @ m, wide)
    operators = rng.standard_normal((9, *shape))
    values = rng.standard_normal(9)
    residual = np.tensordot(operators, product, 2) - values
    for problem, error in (
        (
            dln.Completion.from_dense(target, mask, loss_scale=0.3),
            reference.observed_residual(product, target, mask),
        ),
        (dln.Sensing(operators, values, loss_scale=0.3), np.tensordot(residual, operators, 1)),
    ):
        found = dln.gradients(problem, weights, n_threads=n_threads)
        for layer, gradient in enumerate(found):
            below = functools.reduce(lambda m, w: w @ m, wide[:layer], np.eye(widths[0]))
            above = functools.reduce(lambda m, w: w @ m, wide[layer + 1 :], np.eye(widths[layer + 1]))
            wanted = 0.3 * above.T @ error @ below.T
            size = np.linalg.norm(above) * np.linalg.norm(error) * np.linalg.norm(below)
            assert gradient.dtype == dtype
            allowed = tolerance(dtype, 9 * math.prod(shape)) * (1 + size)
            np.testing.assert_allclose(gradient, wanted, rtol=0, atol=allowed)


def test_tracked_values_of_a_masked_run_are_within_their_bounds():
    problem = dln.low_rank_completion(150, 2, 0.2)
    run = dln.train(
        problem,
        dln.orthogonal([150] * 4, 0.1),
        learning_rate="adaptive",
        steps=60,
        record=dln.Record(every=20, singular_values=5, weights_every=20),
    )
    for layer in (1, 2, 3):
        for record, step in enumerate(run.steps):
            exact = np.linalg.svd(run.weights(layer, int(step)), compute_uv=False)[:5]
            errors = run.singular_value_errors(layer)[record]
            assert np.all(np.abs(exact - run.singular_values(layer)[record]) <= errors)


# Rates.


@pytest.mark.parametrize("learning_rate", ["auto", "adaptive"])
@pytest.mark.parametrize("widths", [[60] * 4, [60, 8, 8, 60], [60, 60]])
def test_default_rates_lower_the_loss_monotonically(learning_rate, widths):
    problem = dln.low_rank_completion(60, 2, 0.4)
    run = dln.train(
        problem,
        dln.orthogonal(widths, 0.5),
        learning_rate=learning_rate,
        steps=400,
        record=dln.Record(singular_values=None),
    )
    assert np.all(np.diff(run.loss) <= 1e-12 * run.loss[0])
    assert run.loss[-1] < 1e-3 * run.loss[0]


def test_adaptive_rates_are_recorded_and_saved(tmp_path):
    problem = dln.low_rank_completion(40, 2, 0.5)
    weights = dln.orthogonal([40] * 4, 1e-2)
    run = dln.train(
        problem, weights, learning_rate="adaptive", steps=100, record=dln.Record(singular_values=None)
    )
    assert run.rates.shape == (100,)
    # On the plateau far above the rate that is stable at the end.
    assert run.rates[0] > 20 * run.rates[-1] > 0
    run.save(tmp_path / "run.npz")
    again = dln.load(tmp_path / "run.npz")
    np.testing.assert_array_equal(again.rates, run.rates)
    assert again.problem.describe() == problem.describe()
    assert again.problem.loss(again.end_to_end()) == pytest.approx(run.loss[-1])
    assert again.problem.recovery_error(again.end_to_end()) == pytest.approx(
        problem.recovery_error(run.end_to_end())
    )


def test_adaptive_rates_for_a_fully_observed_target():
    problem = dln.low_rank_recovery(30, 3)
    run = dln.train(problem, dln.orthogonal([30] * 4, 1e-2), learning_rate="adaptive", steps=400)
    assert run.engine == "dense"
    assert np.all(np.diff(run.loss) <= 0)
    assert run.loss[-1] < 1e-4 * run.loss[0]
    with pytest.raises(ValueError, match="adaptive"):
        dln.train(problem, dln.orthogonal([30] * 4), learning_rate="adaptive", steps=1, engine="reduced")


def test_ratios_scale_the_rates_of_the_layers():
    problem = dln.low_rank_completion(20, 2, 0.5)
    weights = dln.orthogonal([20] * 4, 0.5)
    rates = dln.Adaptive(ratios=[0.0, 1.0, 0.0])
    run = dln.train(problem, weights, learning_rate=rates, steps=5)
    np.testing.assert_array_equal(run.weights(1), weights[0])
    assert not np.array_equal(run.weights(2), weights[1])


# The problems.


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 13), columns=st.integers(1, 13), seed=st.integers(0, 2**32))
def test_entries_are_stored_as_given(rows, columns, seed):
    rng = np.random.default_rng(seed)
    mask, matrix = mask_of((rows, columns), 0.4, rng), rng.standard_normal((rows, columns))
    i, j = np.nonzero(mask)
    order = rng.permutation(len(i))
    problem = dln.Completion(i[order], j[order], matrix[i, j][order], (rows, columns), truth=matrix)
    np.testing.assert_array_equal(problem.rows, i)
    np.testing.assert_array_equal(problem.columns, j)
    np.testing.assert_array_equal(problem.values, matrix[i, j])
    start, index, values = problem.entries()[1]
    np.testing.assert_array_equal(values, matrix.T[mask.T])
    np.testing.assert_array_equal(np.repeat(np.arange(columns), np.diff(start)), np.nonzero(mask.T)[0])
    np.testing.assert_array_equal(index, np.nonzero(mask.T)[1])
    np.testing.assert_array_equal(problem.empty_rows, np.flatnonzero(~mask.any(axis=1)))
    np.testing.assert_array_equal(problem.empty_columns, np.flatnonzero(~mask.any(axis=0)))
    assert problem.density == pytest.approx(mask.mean())
    np.testing.assert_array_equal(problem.backprojection().dense(), np.where(mask, matrix, 0.0))


def test_all_constructors_give_the_same_problem():
    sparse = import_sparse()
    matrix = np.array([[1.0, np.nan, 0.0], [np.nan, 2.0, np.nan]])
    dense = dln.Completion.from_dense(matrix)
    masked = dln.Completion.from_dense(np.nan_to_num(matrix, nan=7.0), ~np.isnan(matrix))
    stored = sparse.coo_array(([1.0, 0.0, 2.0], ([0, 0, 1], [0, 2, 1])), shape=(2, 3))
    for problem in (masked, dln.Completion.from_sparse(stored), dln.Completion.from_sparse(stored.tocsr())):
        assert problem.n_observations == 3
        np.testing.assert_array_equal(problem.values, dense.values)
        np.testing.assert_array_equal(problem.columns, dense.columns)


@pytest.mark.parametrize("thin", [False, True])
def test_recovery_errors_use_the_named_normalization(thin):
    rng = np.random.default_rng(5)
    weights = draw_gaussian_layers([12, 3, 10] if thin else [12, 12, 10], rng)
    product = weights[1] @ weights[0]
    factors = dln.low_rank_recovery(12, 2).target
    truth = dln.LowRank(np.linalg.qr(factors.U[:10])[0], factors.s, factors.V)
    mask = mask_of((10, 12), 0.4, rng)
    problem = dln.Completion.from_dense(truth.dense(), mask, truth=truth)
    difference = product - truth.dense()
    for W in (product, weights):
        assert problem.recovery_error(W) == pytest.approx(
            np.linalg.norm(difference) / np.linalg.norm(truth.s), rel=1e-12
        )
        assert problem.recovery_error(W, "mean") == pytest.approx((difference**2).mean() / 2, rel=1e-12)
        assert problem.recovery_error(W, "unobserved") == pytest.approx(
            (difference[~mask] ** 2).sum() / 240, rel=1e-12
        )
        assert problem.loss(W) == pytest.approx((difference[mask] ** 2).sum() / 240, rel=1e-12)
        np.testing.assert_allclose(problem.predict(W, [3, 9], [0, 11]), product[[3, 9], [0, 11]])


@pytest.mark.parametrize("form", ["dense", "rank one", "sparse"])
def test_measurements_are_accepted_in_all_forms(form):
    rng = np.random.default_rng(2)
    left, right = rng.standard_normal((9, 4)), rng.standard_normal((9, 6))
    dense = left[:, :, None] * right[:, None, :]
    W = rng.standard_normal((4, 6))
    values = np.einsum("mij,ij->m", dense, W)
    if form == "dense":
        problem = dln.Sensing(dense, values)
    elif form == "rank one":
        problem = dln.Sensing((left, right), values)
    else:
        sparse = import_sparse()
        problem = dln.Sensing(sparse.csr_array(dense.reshape(9, -1)), values, shape=(4, 6))
    assert problem.shape == (4, 6)
    np.testing.assert_allclose(problem.apply(W), values, rtol=1e-12)
    r = rng.standard_normal(9)
    np.testing.assert_allclose(problem.adjoint(r), np.einsum("m,mij->ij", r, dense), rtol=1e-12)
    U, V = rng.standard_normal((4, 2)), rng.standard_normal((6, 3))
    np.testing.assert_allclose(problem.projected(U, V), U.T @ dense @ V, rtol=1e-11, atol=1e-12)
    assert problem.density == pytest.approx((dense**2).sum() / 24)
    assert problem.error_scale >= np.linalg.norm(dense.reshape(9, -1), 2)
    run = dln.train(problem, draw_gaussian_layers([6, 4], rng), learning_rate="auto", steps=400)
    assert run.loss[-1] < 1e-6 * run.loss[0]
    assert problem.loss(run.end_to_end()) == pytest.approx(run.loss[-1], rel=1e-6, abs=1e-12)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 6))
def test_leading_vectors_of_large_sparse_matrices_are_accurate(seed, k):
    rng = np.random.default_rng(seed)
    mask = mask_of((300, 280), 0.05, rng)
    matrix = np.where(mask, rng.standard_normal((300, 7)) @ rng.standard_normal((7, 280)), 0.0)
    found = leading_factors(dln.Completion.from_dense(matrix, mask).backprojection(), k)
    exact = np.linalg.svd(matrix, compute_uv=False)[:k]
    np.testing.assert_allclose(found.s, exact, rtol=1e-9)
    # Residuals do not depend on the basis of equal singular values; compare the root of the missing energy.
    assert np.linalg.norm(matrix @ found.V - found.U * found.s) < 1e-5 * exact[0]


# Errors.


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([0, 0], [1, 1], [1.0, 2.0], (2, 2)), ValueError, r"\(0, 1\) occurs twice: 1 by entry 0 and 2 by"),
        (([0, 2], [1, 1], [1.0, 2.0], (2, 2)), ValueError, r"entry 1 is at \(2, 1\), outside the 2 x 2"),
        (([0, -1], [1, 1], [1.0, 2.0], (2, 2)), ValueError, r"entry 1 is at \(-1, 1\), outside"),
        (([0, 1], [1, 1], [1.0, np.nan], (2, 2)), ValueError, "values has a value that is not finite"),
        (([0, 1], [1], [1.0, 2.0], (2, 2)), dln.ShapeError, "columns has 1 entries; wanted 2"),
        (([0.0, 1.0], [1, 1], [1.0, 2.0], (2, 2)), TypeError, "rows has dtype float64; wanted integers"),
        (([], [], [], (2, 2)), ValueError, "no entry is known"),
        (([0], [0], [1.0], (0, 2)), ValueError, r"shape\[0\] \(d_y\) is 0"),
        (([0], [0], [1.0], 5), TypeError, "shape is 5; wanted two integers"),
    ],
)
def test_errors_name_bad_entries(arguments, error, text):
    with pytest.raises(error, match=text):
        dln.Completion(*arguments)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: dln.Completion.from_dense([[np.nan, np.nan]]), ValueError, "no entry is known"),
        (lambda: dln.Completion.from_dense([[1.0, np.inf]]), ValueError, "not finite"),
        (lambda: dln.Completion.from_dense([[1.0, 2.0]], [[1, 0]]), TypeError, "mask has dtype int64"),
        (lambda: dln.Completion.from_dense([[1.0, 2.0]], [[True]]), dln.ShapeError, "mask has shape"),
        (lambda: dln.Completion.from_sparse([[1.0]]), TypeError, "wanted a SciPy sparse"),
        (lambda: dln.Completion([0], [0], [1.0], (1, 1), reduction="average"), ValueError, "reduction is"),
        (lambda: dln.Completion([0], [0], [1.0], (1, 1), loss_scale=0.0), ValueError, "loss_scale is 0"),
        (lambda: dln.Completion([0], [0], [1.0], (1, 1), truth=[[1.0, 2.0]]), dln.ShapeError, "truth"),
        (lambda: dln.Completion([0], [0], [1.0], (1, 1)).recovery_error([[1.0]]), ValueError, "truth is not"),
        (lambda: dln.Sensing(np.ones((2, 2, 2)), [1.0]), dln.ShapeError, r"wanted \(1, d_y, d_x\)"),
        (lambda: dln.Sensing(np.full((1, 2, 2), np.nan), [1.0]), ValueError, "operators"),
        (lambda: dln.low_rank_completion(5, 2, 0.0), ValueError, "observed is 0"),
        (lambda: dln.low_rank_completion(5, 2, 1.5), ValueError, "observed is 1.5"),
        (lambda: dln.low_rank_completion(5, 6, 0.5), ValueError, "rank is 6"),
    ],
)
def test_errors_name_bad_problems(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_errors_name_runs_that_cannot_start():
    problem = dln.low_rank_completion(10, 2, 0.5)
    weights = dln.orthogonal([10] * 3, 0.5)
    with pytest.raises(dln.AssumptionError, match="known in part"):
        dln.train(problem, weights, learning_rate=1.0, steps=1, engine="reduced")
    with pytest.raises(dln.ShapeError, match="wanted 10"):
        dln.train(problem, dln.orthogonal([9, 10]), learning_rate=1.0, steps=1)
    with pytest.raises(dln.AssumptionError, match="lazily sampled"):
        dln.train(problem, dln.orthogonal([10] * 3, implicit=True), learning_rate=1.0, steps=1)


def test_a_run_on_entries_that_diverges_is_an_error():
    problem = dln.low_rank_completion(10, 2, 0.5)
    weights = dln.orthogonal([10] * 3, 0.5)
    with pytest.raises(dln.DivergedError, match="not finite"):
        dln.train(problem, weights, learning_rate=1e6, steps=200)


def test_errors_name_bad_settings_of_adaptive_rates():
    problem = dln.low_rank_completion(10, 2, 0.5)
    weights = dln.orthogonal([10] * 3, 0.5)
    with pytest.raises(ValueError, match="safety"):
        dln.train(problem, weights, learning_rate=dln.Adaptive(safety=0.0), steps=1)
    with pytest.raises(dln.ShapeError, match="ratios has 3 values"):
        dln.train(problem, weights, learning_rate=dln.Adaptive(ratios=[1.0] * 3), steps=1)


def test_rows_without_entries_have_a_zero_gradient():
    problem = dln.Completion([0, 0, 2], [0, 1, 2], [1.0, 2.0, 3.0], (4, 3))
    assert problem.empty_rows.tolist() == [1, 3]
    weights = draw_gaussian_layers([3, 2, 4], np.random.default_rng(0))
    run = dln.train(problem, weights, learning_rate=0.5, steps=50)
    np.testing.assert_array_equal(run.weights(2)[[1, 3]], weights[1][[1, 3]])
    assert run.loss[-1] < run.loss[0]
