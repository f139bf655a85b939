# SPDX-License-Identifier: MIT
"""Compression of networks to low rank: exact errors, the nearest matrix of a rank, the smallest rank."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers.matrices import draw_layers, draw_orthonormal, entry_setter
from helpers.optional_packages import import_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast._completion import compress as compression

F32, F64 = np.float32, np.float64
#: Widths of 1, primes, narrow and wide layers, at either end and between.
WIDTHS = st.lists(st.sampled_from([1, 2, 3, 5, 7, 13, 17]), min_size=2, max_size=6)
DTYPES = st.sampled_from([F32, F64])
SEEDS = st.integers(0, 2**16)


def product(layers):
    result = np.asarray(layers[0], dtype=F64)
    for layer in layers[1:]:
        result = np.asarray(layer, dtype=F64) @ result
    return result


def allowed(layers):
    """Return the rounding error of the product, relative to the norms of the layers, which may cancel."""
    size = np.prod([np.linalg.norm(w, 2) for w in layers])
    return float(size) * tolerance(layers[0].dtype, max(max(w.shape) for w in layers), len(layers))


def decomposed(layers):
    """Return the error allowed of U diag(s) V^T: LAPACK's iteration stops at 90 eps, whatever the size."""
    size = np.prod([np.linalg.norm(w, 2) for w in layers])
    return 2 * allowed(layers) + 90 * float(size * np.finfo(layers[0].dtype).eps)


def assert_chain(result, layers):
    """Compare all properties of a result with NumPy's decomposition of the full product."""
    full, limit = product(layers), allowed(layers)
    values = np.linalg.svd(full, compute_uv=False)
    k, n = result.rank, len(result.singular_values)
    assert n == min(result.widths)
    np.testing.assert_allclose(result.singular_values, values[:n], atol=limit, rtol=0)
    left_out = np.linalg.norm(full - product(result.layers))
    assert abs(left_out - result.error) <= limit * np.sqrt(n)
    assert abs(result.error - np.linalg.norm(values[k:])) <= limit * np.sqrt(n)
    assert abs(np.linalg.norm(full - product(result.layers), 2) - result.spectral_error) <= limit
    assert result.relative_error == pytest.approx(result.error / np.linalg.norm(result.singular_values))
    # The result: thin layers of the same precision, orthonormal bases of the leading directions.
    ends = [len(result.bases[0]), *[k] * (len(result.layers) - 1), len(result.bases[-1])]
    assert [w.shape for w in result] == [(rows, columns) for columns, rows in pairwise(ends)]
    assert all(w.dtype == layers[0].dtype and w.flags.c_contiguous for w in result)
    assert result.n_parameters == sum(w.size for w in result)
    assert result.n_parameters_before == sum(w.size for w in layers)
    for basis, width in zip(result.bases, result.widths, strict=True):
        assert basis.shape == (width, k)
        assert np.linalg.norm(basis.T @ basis - np.eye(k)) < tolerance(basis.dtype, width * k)
    leading = (result.bases[-1] * result.singular_values[:k]) @ result.bases[0].T
    assert np.linalg.norm(product(result.layers) - leading, 2) <= decomposed(layers)
    np.testing.assert_allclose(result.end_to_end(), product(result.layers), atol=limit, rtol=0)
    # Subspaces are accurate to rounding relative to the smallest retained value.
    near = tolerance(layers[0].dtype, max(result.widths)) + limit / float(result.singular_values[k - 1])
    assert result.layer_errors == pytest.approx(expected_layer_errors(result, layers), abs=near)


def expected_layer_errors(result, layers):
    errors = []
    for weight, below, above in zip(layers, result.bases[:-1], result.bases[1:], strict=True):
        weight, below, above = (np.asarray(x, dtype=F64) for x in (weight, below, above))
        projected = above @ (above.T @ weight @ below) @ below.T
        errors.append(np.linalg.norm(weight - projected) / np.linalg.norm(weight))
    return errors


# Exactness.


@given(WIDTHS, SEEDS, DTYPES, st.sampled_from([1.0, 0.7, 0.1]), st.data())
@settings(max_examples=80, deadline=None)
def test_the_stated_errors_equal_those_of_the_full_product(widths, seed, dtype, decay, data):
    layers = draw_layers(seed, widths, decay=decay, dtype=dtype)
    rank = data.draw(st.none() | st.integers(1, min(widths[0], widths[-1])), label="rank")
    tol = data.draw(st.none() | st.floats(0, 0.99), label="tol") if rank is None else None
    try:
        result = dln.compress(layers, rank, tol)
    except ValueError as error:  # directions that pass through each layer may end in the next
        assert "zero to rounding" in str(error)
        assert np.linalg.norm(product(layers), 2) <= 10 * allowed(layers)
        return
    assert_chain(result, layers)
    numerical = int(np.sum(result.singular_values > result.resolution))
    assert result.rank <= min(numerical, *widths)
    if rank is not None:
        assert result.rank == min(rank, numerical)
    balanced = dln.compress(layers, rank, tol, balanced=True)
    assert balanced.rank == result.rank
    assert np.linalg.norm(product(balanced.layers) - product(result.layers)) <= decomposed(layers)
    for below, above in pairwise(balanced):
        gap = np.linalg.norm(above.T @ above - below @ below.T, 2)
        assert gap <= np.linalg.norm(above, 2) ** 2 * tolerance(dtype, max(widths))


@given(WIDTHS, SEEDS, DTYPES, st.floats(0, 0.999))
@settings(max_examples=60, deadline=None)
def test_tol_selects_the_smallest_sufficient_rank(widths, seed, dtype, tol):
    layers = [w.astype(dtype) for w in dln.gaussian(widths, seed=seed)]
    result = dln.compress(layers, tol=tol)
    values = result.singular_values.astype(F64)
    relative = [np.linalg.norm(values[k:]) / np.linalg.norm(values) for k in range(len(values) + 1)]
    if result.rank < np.sum(values > result.resolution):
        assert relative[result.rank] <= tol * (1 + 1e-12)
    assert result.rank == 1 or relative[result.rank - 1] > tol * (1 - 1e-12)


@given(WIDTHS, SEEDS)
@settings(max_examples=30, deadline=None)
def test_the_result_is_the_nearest_matrix_of_its_rank(widths, seed):
    layers = dln.gaussian(widths, seed=seed)
    result = dln.compress(layers, rank=1)
    full, rng = product(layers), np.random.default_rng(seed)
    limit = allowed(layers)
    for step in (1e-3, 1e-1, 1.0):
        near = [w + step * np.abs(w).max() * rng.standard_normal(w.shape) for w in result]
        assert np.linalg.norm(full - product(near)) >= result.error - limit
        assert np.linalg.norm(full - product(near), 2) >= result.spectral_error - limit


@given(WIDTHS, SEEDS, DTYPES)
@settings(max_examples=40, deadline=None)
def test_compressing_twice_changes_nothing(widths, seed, dtype):
    layers = [w.astype(dtype) for w in dln.gaussian(widths, seed=seed)]
    once = dln.compress(layers, tol=0.5)
    twice = dln.compress(list(once))
    limit = 2 * allowed(list(once))
    assert twice.rank == once.rank
    assert twice.error <= limit
    assert np.linalg.norm(product(twice.layers) - product(once.layers)) <= limit
    np.testing.assert_allclose(
        twice.singular_values[: once.rank], once.singular_values[: once.rank], atol=limit, rtol=0
    )
    assert [w.shape for w in twice] == [w.shape for w in once]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("widths", [[9, 7], [9, 7, 5], [11, 3, 13, 11], [6, 6, 6]])
def test_inputs_pass_through_the_thin_layers(widths, dtype):
    layers = [w.astype(dtype) for w in dln.gaussian(widths, seed=3)]
    result = dln.compress(layers, rank=2)
    X = np.random.default_rng(0).standard_normal((widths[0], 4))
    wanted = product(result.layers) @ X
    limit = allowed(layers) * np.linalg.norm(X)
    np.testing.assert_allclose(result.apply(X), wanted, atol=limit, rtol=0)
    np.testing.assert_allclose(result.apply(X[:, 1]), wanted[:, 1], atol=limit, rtol=0)
    np.testing.assert_allclose(result.apply(X[:, 1].tolist()), wanted[:, 1], atol=limit, rtol=0)
    assert result.apply(X).dtype == dtype
    with pytest.raises(dln.ShapeError, match=rf"X has shape \(3, 4\); wanted \({widths[0]}, any\)"):
        result.apply(X[:3])
    with pytest.raises(ValueError, match="X has a value that is not finite"):
        result.apply(np.full(widths[0], np.nan))


def test_one_layer_becomes_two():
    (weight,) = draw_layers(0, [7, 5], decay=0.5)
    result = dln.compress([weight], rank=2)
    assert [w.shape for w in result] == [(2, 7), (5, 2)]
    assert_chain(result, [weight])
    assert len(result) == 2
    assert len(result.layer_errors) == 1
    assert result.layer_errors[0] == pytest.approx(result.relative_error)


def test_small_singular_values_are_not_lost_to_squaring():
    layers = draw_layers(0, [20, 20], decay=10.0**-0.7)  # the last is 5e-14 of the first
    result = dln.compress(layers)
    wanted = 10.0 ** (-0.7 * np.arange(20))
    assert abs(result.singular_values - wanted).max() < tolerance(F64, 20)
    assert result.rank == 20


def test_a_narrow_layer_limits_the_rank_and_nothing_square_is_formed(monkeypatch):
    shapes = []
    original = compression.multiply

    def watched(a, b, **options):
        result = original(a, b, **options)
        shapes.append(result.shape)
        return result

    monkeypatch.setattr(compression, "multiply", watched)
    layers = dln.gaussian([101, 101, 101, 3, 101, 101], seed=1)
    result = dln.compress(layers, rank=50)
    assert result.rank == 3  # of the 50 requested ones
    assert max(min(shape) for shape in shapes) <= 8  # 3, or the probes
    monkeypatch.undo()
    assert_chain(result, layers)


def test_the_rank_is_limited_to_the_numerical_rank():
    target = dln.low_rank_recovery(20, 4).target.dense()
    layers = [*dln.orthogonal([20] * 3), target]
    assert dln.compress(layers).rank == 4
    for options in ({"rank": 15}, {"tol": 0.0}, {"tol": 1e-300}):
        result = dln.compress(layers, **options)
        assert result.rank == 4
        assert result.error < tolerance(F64, 20) * np.linalg.norm(target)


def test_layers_that_cancel_leave_only_rounding():
    q = dln.orthogonal([30, 30])[0]
    leading, complement = (
        np.diag(np.r_[np.ones(10), np.zeros(20)]),
        np.diag(np.r_[np.zeros(10), np.ones(20)]),
    )
    layers = [(q @ leading @ q.T), (q @ complement @ q.T)]  # zero, were they exact
    with pytest.raises(ValueError, match=r"weights have a product W_L \.\. W_1 that is zero to rounding"):
        dln.compress(layers)
    with pytest.raises(ValueError, match="zero to rounding"):
        dln.compress([w.astype(F32) for w in layers])
    # A value that is far above eps, but not above eps relative to the product, is still one.
    layers = [q @ (leading + 1e-9 * complement) @ q.T, q @ (complement * 1.0) @ q.T]
    result = dln.compress(layers)
    assert result.rank == 20
    assert result.singular_values[:20] == pytest.approx(np.full(20, 1e-9), rel=1e-6)  # 1e-16 / 1e-9


def test_thin_factors_that_cancel_leave_only_rounding():
    q = draw_orthonormal(0, 40, 4)
    turn = draw_orthonormal(1, 4, 4)
    below = (q * [1, 1, 0, 0] @ turn).T
    above = q * [0, 0, 1, 1] @ turn
    with pytest.raises(ValueError, match="zero to rounding"):
        dln.compress([below, above])


def test_long_products_of_gaussian_layers_do_not_count_as_zero():
    layers = dln.gaussian([30] * 51, seed=0)
    result = dln.compress(layers, rank=1)
    values = np.linalg.svd(product(layers), compute_uv=False)
    assert result.singular_values[0] == pytest.approx(values[0])
    assert result.resolution < 1e-10 * values[0]


def test_lists_and_integers_are_matrices():
    result = dln.compress([[[1, 0], [0, 0]], [[2, 0], [0, 3]]])
    assert result.rank == 1
    np.testing.assert_array_equal(np.abs(result.end_to_end()), [[2.0, 0.0], [0.0, 0.0]])
    assert "rank 1, widths [2, 2, 2], 8 -> 4 parameters" in repr(result)
    np.testing.assert_array_equal(
        dln.compress(np.array([[[1.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 3.0]]])).end_to_end(),
        result.end_to_end(),
    )


def test_arguments_stay_unchanged_and_results_own_their_memory():
    layers = dln.gaussian([8, 8, 8], seed=2)
    before = [w.copy() for w in layers]
    result = dln.compress(layers, rank=3)
    for w in (*result.layers, *result.bases):
        w[...] = 0
    for w, same in zip(layers, before, strict=True):
        np.testing.assert_array_equal(w, same)


def test_tensors_are_read():
    torch = import_torch()
    layers = dln.gaussian([6, 7, 5], seed=0)
    wanted = dln.compress(layers, rank=2)
    found = dln.compress([torch.from_numpy(w) for w in layers], rank=2)
    np.testing.assert_array_equal(found.end_to_end(), wanted.end_to_end())
    x = torch.ones(6, dtype=torch.float64)
    np.testing.assert_array_equal(found.apply(x), wanted.apply(np.ones(6)))
    found = dln.compress([torch.nn.Parameter(torch.from_numpy(w)) for w in layers], rank=2)
    np.testing.assert_array_equal(found.end_to_end(), wanted.end_to_end())


# Trained networks.

DIM, RANK = 24, 3


def run_of(engine, *, dim=DIM, depth=3, scale=0.1, steps=3000, decay=0.0, widths=None, **options):
    problem = dln.low_rank_recovery(dim, RANK, seed=1)
    weights = dln.orthogonal(widths or [dim] * (depth + 1), scale, seed=2, **options)
    return dln.train(
        problem,
        weights,
        learning_rate=1.0,
        steps=steps,
        weight_decay=decay,
        engine=engine,
        record=dln.Record(every=steps),
    )


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_a_trained_network_has_the_rank_of_its_target(engine, depth):
    run = run_of(engine, depth=depth, scale=0.2 if depth > 3 else 0.05, steps=8000)
    result = dln.compress(run, tol=0.02)
    assert result.rank == RANK
    assert_chain(result, run.all_weights())
    target = run.problem.target.s
    assert result.singular_values[:RANK] == pytest.approx(target, rel=1e-3)  # as far as 8000 steps train
    # Outside it is a scaled isometry, which each layer keeps and the product has in its L-th power.
    rho = result.singular_values[RANK:-RANK]
    assert rho == pytest.approx(np.full(len(rho), rho[0]), rel=1e-6)
    assert result.layer_errors.min() > 3 * result.relative_error


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_weight_decay_leaves_the_numerical_rank_of_the_target(engine):
    factors = dln.low_rank_recovery(DIM, RANK, seed=1).target
    problem = dln.Problem(factors)  # the sum loss, which decay does not win over
    weights = dln.orthogonal([DIM] * 5, 0.5, seed=2)
    run = dln.train(
        problem,
        weights,
        learning_rate=5e-3,
        weight_decay=0.5,
        steps=8000,
        engine=engine,
        record=dln.Record(every=8000),
    )
    result = dln.compress(run)
    assert result.rank == RANK
    assert result.error <= result.resolution * DIM
    assert_chain(result, run.all_weights())


def test_both_engines_give_the_same_compression():
    reduced, dense = (dln.compress(run_of(engine), tol=0.02) for engine in ("reduced", "dense"))
    # 3,000 steps amplify rounding.
    limit = 100 * tolerance(F64, DIM, 3000)
    assert reduced.rank == dense.rank
    assert reduced.error == pytest.approx(dense.error, rel=limit)
    np.testing.assert_allclose(reduced.singular_values, dense.singular_values, atol=10 * limit)
    np.testing.assert_allclose(reduced.layer_errors, dense.layer_errors, rtol=limit)
    np.testing.assert_allclose(reduced.end_to_end(), dense.end_to_end(), atol=10 * limit)


@pytest.mark.parametrize(
    ("d_x", "hidden", "d_y"),
    [(30, 30, 30), (12, 30, 30), (30, 12, 12), (30, 30, 4), (12, 30, 4)],
)
@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": 2}, {"rank": 4}, {"tol": 0.3}, {"tol": 1e-9}, {}])
def test_compressing_a_reduced_run_equals_compressing_its_weights(d_x, hidden, d_y, options):
    rng = np.random.default_rng(0)
    u, v = (draw_orthonormal(rng, d, 2) for d in (d_y, d_x))
    problem = dln.Problem(dln.LowRank(u, [2.0, 1.0], v))
    weights = dln.orthogonal([d_x, hidden, hidden, d_y], 0.5, seed=2)
    run = dln.train(problem, weights, learning_rate=0.05, steps=60, weight_decay=0.1, engine="reduced")
    result, wanted = dln.compress(run, **options), dln.compress(run.all_weights(), **options)
    assert result.rank == wanted.rank
    assert result.widths == wanted.widths == (d_x, hidden, hidden, d_y)
    assert_chain(result, run.all_weights())


def test_a_reduced_run_is_compressed_without_forming_layers(monkeypatch):
    run = run_of("reduced")
    wanted = dln.compress(run.all_weights(), tol=0.02)
    monkeypatch.setattr(type(run), "weights", lambda *_: pytest.fail("a whole layer was asked for"))
    result = dln.compress(run, tol=0.02)
    np.testing.assert_allclose(result.end_to_end(), wanted.end_to_end(), atol=1e2 * tolerance(F64, DIM))


def test_a_file_without_weights_can_be_compressed(tmp_path):
    run = run_of("reduced")
    run.save(tmp_path / "run.npz", weights=False)
    again = dln.load(tmp_path / "run.npz")
    np.testing.assert_array_equal(
        dln.compress(again, tol=0.02).end_to_end(), dln.compress(run, tol=0.02).end_to_end()
    )
    with pytest.raises(ValueError, match="saved without its initial weights"):
        dln.compress(again, rank=DIM)
    dense = run_of("dense", steps=5)
    dense.save(tmp_path / "dense.npz", weights=False)
    with pytest.raises(ValueError, match="the weights were recorded at"):
        dln.compress(dln.load(tmp_path / "dense.npz"))


def test_a_run_from_lazily_sampled_weights_is_compressed_in_its_active_dimension():
    dim = 20_000
    run = run_of("reduced", dim=dim, scale=0.1, steps=3000, implicit=True)
    result = dln.compress(run, rank=RANK)
    assert result.n_parameters == RANK * (2 * dim + RANK)
    rho = abs(np.prod([run.rho(layer)[-1] for layer in (1, 2, 3)]))
    assert result.spectral_error == pytest.approx(rho)
    assert result.error == pytest.approx(rho * np.sqrt(dim - RANK), rel=1e-3)  # but for what fell
    with pytest.raises(MemoryError, match=r"rank \(k\) reaches beyond the active subspaces"):
        dln.compress(run)


def test_an_untrained_run_is_compressed_as_arrays():
    run = run_of("reduced", steps=1)
    result = dln.compress(run, rank=10)
    assert result.rank == 10
    assert_chain(result, run.all_weights())


def test_a_compressed_network_can_be_trained():
    run = run_of("dense", steps=1000)
    for balanced in (False, True):
        small = dln.compress(run, rank=RANK, balanced=balanced)
        more = dln.train(run.problem, list(small), learning_rate=1.0, steps=1000)
        assert more.loss[0] == pytest.approx(run.problem.loss(product(small.layers)))
        assert more.loss[-1] < 1e-3 * run.loss[0]
        # The directions outside leave no loss floor.
        assert more.loss[-1] < run_of("dense", steps=2000).loss[-1]


def test_float32_runs_are_compressed():
    problem = dln.low_rank_recovery(DIM, RANK, seed=1)
    weights = dln.orthogonal([DIM] * 4, 0.1, seed=2, dtype=F32)
    for engine in ("reduced", "dense"):
        run = dln.train(problem, weights, learning_rate=1.0, steps=3000, engine=engine)
        result = dln.compress(run, tol=0.02)
        assert result.rank == RANK
        assert_chain(result, run.all_weights())


# Bad input.


def bad(index, change, widths=(6, 5, 4, 6)):
    layers = dln.gaussian(list(widths), seed=0)
    layers[index] = change(layers[index])
    return layers


BAD_WEIGHTS = {
    "nothing": (None, TypeError, "weights is NoneType; wanted a list of matrices"),
    "a number": (1.0, TypeError, "weights is float"),
    "lazily sampled weights": (
        dln.orthogonal([6, 6], implicit=True),
        TypeError,
        "weights is ImplicitWeights",
    ),
    "one matrix": (np.eye(4), dln.ShapeError, "weights is one matrix; wanted a list"),
    "no layers": ([], dln.ShapeError, "weights is empty"),
    "a vector": (bad(1, lambda w: w[0]), dln.ShapeError, r"weights\[1\] \(W_2\) has shape \(5,\)"),
    "no rows": (bad(2, lambda w: w[:0]), dln.ShapeError, r"weights\[2\] \(W_3\) is empty"),
    "no chain": (
        bad(1, lambda w: w.T),
        dln.ShapeError,
        r"weights\[1\] \(W_2\) has shape \(5, 4\); wanted 5 columns, the rows of weights\[0\]",
    ),
    "NaN": (bad(1, entry_setter(np.nan, (1, 2))), ValueError, r"weights\[1\] \(W_2\).*nan at \(1, 2\)"),
    "infinity": (bad(0, entry_setter(np.inf, (1, 2))), ValueError, r"weights\[0\] \(W_1\).*inf at \(1, 2\)"),
    "float16": (bad(0, lambda w: w.astype(np.float16)), TypeError, r"weights\[0\] \(W_1\) has dtype float16"),
    "complex": (bad(0, lambda w: w + 0j), TypeError, r"weights\[0\] \(W_1\) has dtype complex128"),
    "mixed": (
        bad(2, lambda w: w.astype(F32)),
        TypeError,
        r"weights\[2\] \(W_3\) is float32 but weights\[0\] is float64; wanted one precision",
    ),
    # What underflows is zero, too.
    "zero": (bad(1, np.zeros_like), ValueError, "a product .* zero to rounding: .* singular value is 0"),
    "too small": ([np.full((3, 3), 1e-200)] * 2, ValueError, "zero to rounding"),
    "too large": ([np.full((3, 3), 1e200)] * 2, ValueError, "a product .* too large for float64"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_errors_name_bad_weights(name):
    weights, error, text = BAD_WEIGHTS[name]
    with pytest.raises(error, match=text):
        dln.compress(weights)


BAD_OPTIONS = {
    "both": ({"rank": 1, "tol": 0.1}, ValueError, r"rank is 1 and tol is 0\.1; wanted one of them"),
    "rank 0": ({"rank": 0}, ValueError, r"rank \(k\) is 0; wanted an integer of at least 1"),
    "negative rank": ({"rank": -1}, ValueError, r"rank \(k\) is -1"),
    "rank above": (
        {"rank": 6},
        ValueError,
        r"rank \(k\) is 6; wanted at most 5, the smaller side of the 5 x 7 product",
    ),
    "fraction": ({"rank": 1.5}, TypeError, r"rank \(k\) is 1\.5"),
    "a flag": ({"rank": True}, TypeError, r"rank \(k\) is True"),
    "tol 1": ({"tol": 1.0}, ValueError, r"tol \(relative error\) is 1; wanted a number in \[0, 1\)"),
    "negative tol": ({"tol": -0.1}, ValueError, r"tol \(relative error\) is -0\.1"),
    "tol NaN": ({"tol": np.nan}, ValueError, r"tol \(relative error\) is nan"),
    "text": ({"tol": "0.1"}, TypeError, r"tol \(relative error\) is '0\.1'"),
    "balanced": ({"balanced": "yes"}, TypeError, "balanced is 'yes'; wanted True or False"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_errors_name_bad_options(name):
    options, error, text = BAD_OPTIONS[name]
    with pytest.raises(error, match=text):
        dln.compress(dln.gaussian([7, 6, 5], seed=0), **options)
    problem = dln.Problem(np.ones((5, 7)))
    run = dln.train(problem, dln.orthogonal([7, 6, 5]), learning_rate=1e-3, steps=1)
    with pytest.raises(error, match=text):
        dln.compress(run, **options)
