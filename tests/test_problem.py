# SPDX-License-Identifier: MIT
"""Problems: low-rank targets, sufficient statistics, losses, and errors for bad arguments."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from helpers.matrices import draw_low_rank, draw_matrix, draw_orthonormal
from helpers.memory import measure_peak
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerances import tolerance

from dlnfast._problem import data as data_module
from dlnfast._problem import standard
from dlnfast._problem.data import gram_resolution, one_hot
from dlnfast._problem.low_rank import LowRank
from dlnfast._problem.problem import Problem
from dlnfast._problem.standard import classification, low_rank_recovery
from dlnfast._support.errors import ShapeError

F64 = np.float64
METHODS = ["zca", "pca", "cholesky"]
SIZES = st.sampled_from([1, 2, 3, 5, 7, 11, 13, 17])
SEEDS = st.integers(0, 10**6)


def random_factors(rng, dim_out, dim_in, rank):
    values = np.sort(rng.uniform(1, 2, rank))[::-1]
    return draw_low_rank(rng, dim_out, dim_in, values)


def direct_loss(W, X, Y, loss_scale):
    return loss_scale / 2 * np.linalg.norm(W @ X - Y) ** 2


def relative_error(got, wanted, *factors):
    """Return ||got - wanted|| / ||wanted||, or relative to the norms of factors whose product may cancel."""
    size = math.prod(np.linalg.norm(factor) for factor in factors or (wanted,))
    return np.linalg.norm(np.asarray(got) - wanted) / max(size, np.finfo(F64).tiny)


# ---------------------------------------------------------------------------------------------- LowRank


@settings(deadline=None)
@given(dim_out=SIZES, dim_in=SIZES, data=st.data(), seed=SEEDS)
def test_low_rank_equals_its_decomposition(dim_out, dim_in, data, seed):
    rank = data.draw(st.integers(0, min(dim_out, dim_in)))
    factors = random_factors(np.random.default_rng(seed), dim_out, dim_in, rank)
    dense = factors.dense()
    assert (factors.shape, factors.rank, factors.dtype) == ((dim_out, dim_in), rank, F64)
    wanted = np.zeros((dim_out, dim_in))
    for u, s, v in zip(factors.U.T, factors.s, factors.V.T, strict=True):
        wanted += s * np.outer(u, v)
    np.testing.assert_allclose(dense, wanted, atol=2 * tolerance(F64, rank + 1))
    np.testing.assert_allclose(factors.T.dense(), wanted.T, atol=2 * tolerance(F64, rank + 1))
    expected = np.linalg.svd(dense, compute_uv=False)[:rank]
    np.testing.assert_allclose(factors.s, expected, rtol=tolerance(F64, max(dim_out, dim_in)))
    if rank:
        assert factors.truncated(rank - 1).rank == rank - 1
    assert factors.truncated(rank + 1) is factors


def test_low_rank_keeps_float32_and_widens_exactly():
    rng = np.random.default_rng(0)
    narrow = random_factors(rng, 40, 30, 4)
    narrow = LowRank(*(a.astype(np.float32) for a in (narrow.U, narrow.s, narrow.V)))
    assert narrow.dtype == np.float32
    wide = narrow.astype(F64)
    assert wide.dtype == F64
    for vectors in (wide.U, wide.V):
        assert np.linalg.norm(vectors.T @ vectors - np.eye(4)) < tolerance(F64, 40)
    exact = (narrow.U.astype(F64) * narrow.s.astype(F64)) @ narrow.V.astype(F64).T
    assert relative_error(wide.dense(), exact) < tolerance(F64, 40)
    assert wide.astype(F64) is wide
    assert wide.astype(np.float32).dtype == np.float32
    assert Problem(narrow).target.dtype == F64


def test_low_rank_uses_the_higher_of_mixed_precisions():
    mixed = LowRank(np.eye(3, 1, dtype=np.float32), [2.0], np.eye(2, 1))
    assert mixed.dtype == mixed.U.dtype == mixed.V.dtype == F64
    assert repr(mixed) == "LowRank(3 x 2, rank 1, float64)"


@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        ((np.eye(3, 2), [1.0], np.eye(3, 1)), ShapeError, r"U \(left.*\(3, 2\); wanted \(any, 1\)"),
        ((np.eye(3, 1), [1.0], np.eye(3, 2)), ShapeError, "V "),
        ((np.eye(3, 1), [[1.0]], np.eye(3, 1)), ShapeError, "s "),
        ((np.ones((0, 0)), [], np.ones((3, 0))), ShapeError, "U is empty"),
        ((np.ones((3, 0)), [], np.ones((0, 0))), ShapeError, "V is empty"),
        ((2 * np.eye(3, 1), [1.0], np.eye(3, 1)), ValueError, "U has columns that are not orthonormal"),
        ((np.eye(3, 2), [2.0, 1.0], np.ones((3, 2))), ValueError, "V has columns that are not orthonormal"),
        ((np.eye(1, 2), [2.0, 1.0], np.eye(3, 2)), ValueError, "U has columns"),
        ((np.eye(3, 1), [-1.0], np.eye(3, 1)), ValueError, "none negative"),
        ((np.eye(3, 2), [1.0, 2.0], np.eye(3, 2)), ValueError, "descending"),
        ((np.eye(3, 1), [np.nan], np.eye(3, 1)), ValueError, "s .*not finite"),
        ((np.full((3, 1), np.inf), [1.0], np.eye(3, 1)), ValueError, "U .*not finite"),
        ((np.eye(3, 1, dtype=np.float16), [1.0], np.eye(3, 1)), TypeError, "U .*float16"),
        ((np.eye(3, 1), [1j], np.eye(3, 1)), TypeError, "s .*complex"),
    ],
)
def test_errors_of_low_rank_name_bad_arguments(factors, error, message):
    with pytest.raises(error, match=message):
        LowRank(*factors)


# ---------------------------------------------------------------------------- problems from statistics


@settings(deadline=None)
@given(dim_in=SIZES, dim_out=SIZES, n_samples=SIZES, seed=SEEDS, scale=st.sampled_from([1.0, 0.01]))
def test_loss_of_statistics_is_the_loss_of_the_data(dim_in, dim_out, n_samples, seed, scale):
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((dim_in, n_samples)), rng.standard_normal((dim_out, n_samples))
    W = rng.standard_normal((dim_out, dim_in))
    singular_values = np.linalg.svd(X, compute_uv=False)
    assume(singular_values[0] < 1e4 * singular_values[-1])
    problem = Problem(Y @ X.T, X @ X.T, scale, output_norm_squared=np.sum(Y**2))
    wanted = direct_loss(W, X, Y, scale)
    # M* solves equations of condition number cond(S), and ||Y||^2 - tr(M* Phi^T) inherits its error.
    condition = (singular_values[0] / singular_values[-1]) ** 2
    size = scale / 2 * (np.sum(Y**2) + np.sum(W**2) * np.sum(X**2))
    allowed = tolerance(F64, dim_in * n_samples) * condition * size
    assert abs(problem.loss(W) - wanted) <= allowed
    best = scale / 2 * np.sum((Y - Y @ np.linalg.pinv(X) @ X) ** 2)
    assert abs(problem.loss_floor - best) <= allowed
    assert problem.loss_floor >= 0
    inverse = np.linalg.pinv(X)
    minimal = Y @ inverse
    allowed = 8 * tolerance(F64, dim_in) * condition
    assert relative_error(problem.least_squares, minimal, Y, inverse) <= allowed


@settings(deadline=None)
@given(dim_in=SIZES, dim_out=SIZES, extra=st.integers(0, 9), seed=SEEDS)
def test_statistics_of_white_inputs(dim_in, dim_out, extra, seed):
    rng = np.random.default_rng(seed)
    X, Y = draw_orthonormal(rng, dim_in + extra, dim_in).T, rng.standard_normal((dim_out, dim_in + extra))
    W = rng.standard_normal((dim_out, dim_in))
    problem = Problem(Y @ X.T, loss_scale=0.5, output_norm_squared=np.sum(Y**2))
    assert problem.least_squares is problem.target
    # The floor ||Y||^2 - ||Phi||^2 is known to rounding of ||Y||^2.
    assert abs(problem.loss(W) - direct_loss(W, X, Y, 0.5)) <= tolerance(F64, dim_in) * (
        np.sum(Y**2) + np.sum(W**2)
    )


@pytest.mark.parametrize("gram", [None, np.diag([3.0, 1.0, 0.5])])
def test_loss_does_not_cancel_near_the_optimum(gram):
    rng = np.random.default_rng(1)
    best, direction = rng.standard_normal((2, 4, 3))
    problem = Problem(best if gram is None else best @ gram, gram, 2.0)
    assert problem.loss_floor == 0.0
    assert problem.loss(problem.least_squares) == 0.0
    W = problem.least_squares + 1e-9 * direction
    step = W - problem.least_squares
    wanted = np.sum((step if gram is None else step @ gram) * step)
    # The expanded formula would be wrong by about eps ||Y||^2, some hundred times this loss.
    assert abs(problem.loss(W) - wanted) <= tolerance(F64, 3) * wanted


def test_default_output_norm_is_the_least_consistent_one():
    rng = np.random.default_rng(2)
    X, W = rng.standard_normal((5, 9)), rng.standard_normal((3, 5))
    Y = W @ X
    problem = Problem(Y @ X.T, X @ X.T)
    # cond(S) is about 50.
    assert abs(problem.output_norm_squared - np.sum(Y**2)) < 50 * tolerance(F64, 9) * np.sum(Y**2)
    assert problem.loss_floor == 0.0
    factors = random_factors(rng, 6, 4, 2)
    assert Problem(factors).output_norm_squared == pytest.approx(np.sum(factors.s**2))


@settings(deadline=None)
@given(dim_in=SIZES, dim_out=SIZES, data=st.data(), seed=SEEDS)
def test_least_squares_of_a_singular_gram_has_least_norm(dim_in, dim_out, data, seed):
    rng = np.random.default_rng(seed)
    rank = data.draw(st.integers(1, dim_in))
    X = draw_matrix(rng, dim_in, 20, np.linspace(2, 1, rank))
    Y = rng.standard_normal((dim_out, 20))
    problem = Problem(Y @ X.T, X @ X.T, output_norm_squared=np.sum(Y**2))
    allowed = tolerance(F64, 20 * dim_in)
    assert relative_error(problem.least_squares @ problem.input_gram, Y @ X.T, Y, X) < allowed
    minimal, *_ = np.linalg.lstsq(X.T, Y.T, rcond=1e-10)
    # The smallest singular value of X is 1.
    assert relative_error(problem.least_squares, minimal.T, Y) < 4 * allowed


def test_a_factored_target_with_a_general_gram_matrix():
    rng = np.random.default_rng(3)
    factors, X = random_factors(rng, 6, 5, 2), rng.standard_normal((5, 12))
    gram = X @ X.T
    problem = Problem(factors, gram)
    wanted = factors.dense() @ np.linalg.inv(gram)
    assert relative_error(problem.least_squares, wanted) < np.linalg.cond(gram) * tolerance(F64, 12)
    W = rng.standard_normal((6, 5))
    assert problem.loss(W) == pytest.approx(Problem(factors.dense(), gram).loss(W))


def test_statistics_that_are_zero():
    problem = Problem(np.zeros((2, 3)), np.zeros((3, 3)))
    np.testing.assert_array_equal(problem.least_squares, np.zeros((2, 3)))
    assert problem.loss(np.ones((2, 3))) == 0.0
    assert Problem(np.zeros((2, 3))).target_factors().rank == 0


def test_a_target_outside_the_range_of_the_gram_matrix_is_refused():
    target = np.array([[1.0, 0.0, 1e-3]])
    with pytest.raises(ValueError, match=r"target .* outside the range of input_gram .* size 1.0e-03"):
        Problem(target, np.diag([1.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="S has rank 0 of 3"):
        Problem(target, np.zeros((3, 3)))


def test_weak_directions_of_real_data_are_not_refused():
    # One input is much larger than another, which alone explains Y: ||Phi e|| is large relative to ||Phi||,
    # yet the Gram matrix does not resolve e.
    rng = np.random.default_rng(4)
    large, small = draw_orthonormal(rng, 50, 2).T
    X = np.stack([1e9 * large, small])
    problem = Problem.from_data(X, small[None], reduction="sum")
    assert problem.loss(np.array([[0.0, 1.0]])) == pytest.approx(problem.loss_floor, abs=1)


@pytest.mark.parametrize(
    ("gram", "error", "message"),
    [
        ([[1.0, 0.1], [0.0, 1.0]], ValueError, r"input_gram \(S\) is not symmetric: .* is .*e-0. of"),
        ([[1.0, 0.0], [0.0, -0.1]], ValueError, "not positive semi-definite: .* from -0.1 to 1"),
        ([[-1.0, 0.0], [0.0, 0.0]], ValueError, "not positive semi-definite"),
        (np.eye(3), ShapeError, r"input_gram \(S\) has shape \(3, 3\); wanted \(2, 2\)"),
        ([[1.0, np.nan], [np.nan, 1.0]], ValueError, "input_gram .*not finite"),
        (np.eye(2, dtype=np.float16), TypeError, "input_gram .*float16"),
    ],
)
def test_errors_name_bad_gram_matrices(gram, error, message):
    with pytest.raises(error, match=message):
        Problem(np.ones((1, 2)), gram)


def test_gram_is_symmetrised_within_rounding():
    gram = np.array([[2.0, 1.0 + 1e-13], [1.0, 2.0]])
    problem = Problem(np.ones((1, 2)), gram)
    np.testing.assert_array_equal(problem.input_gram, problem.input_gram.T)
    exact = np.eye(2) * 3
    assert Problem(np.ones((1, 2)), exact).input_gram is exact


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (np.ones(3), ShapeError, r"target \(Phi\) has shape \(3,\); wanted a matrix"),
        (np.ones((0, 3)), ShapeError, "target .*empty"),
        (np.ones((2, 2), np.float16), TypeError, "target .*float16"),
        (np.ones((2, 2), complex), TypeError, "target .*complex"),
        ([[None]], TypeError, "target .*not numeric"),
        ([[np.inf]], ValueError, "target .*not finite"),
    ],
)
def test_errors_name_bad_targets(target, error, message):
    with pytest.raises(error, match=message):
        Problem(target)


def test_targets_of_any_layout_are_read():
    values = np.random.default_rng(5).standard_normal((4, 6))
    read_only = values.copy()
    read_only.flags.writeable = False
    strided = np.repeat(values, 2, axis=1)[:, ::2]
    for target in (values.tolist(), np.asfortranarray(values), strided, read_only):
        np.testing.assert_array_equal(Problem(target).target, values)
    assert Problem(values).target is values
    assert Problem(values.astype(np.float32)).target.dtype == F64


@pytest.mark.parametrize("loss_scale", [0.0, -1.0, np.nan, np.inf])
def test_errors_name_bad_loss_scales(loss_scale):
    with pytest.raises(ValueError, match="loss_scale is"):
        Problem(np.eye(2), loss_scale=loss_scale)


def test_an_output_norm_below_the_least_consistent_one_is_refused():
    target = np.diag([3.0, 4.0])
    with pytest.raises(ValueError, match=r"output_norm_squared .* is 24.9; wanted at least 25"):
        Problem(target, output_norm_squared=24.9)
    with pytest.raises(ValueError, match=r"output_norm_squared .* is 12; wanted at least 12.5"):
        Problem(target, 2 * np.eye(2), output_norm_squared=12)
    for bad in (-1.0, np.nan):
        with pytest.raises(ValueError, match="output_norm_squared is"):
            Problem(target, output_norm_squared=bad)
    just_below = Problem(target, output_norm_squared=np.nextafter(25.0, 0))
    assert just_below.loss_floor == 0.0
    assert Problem(target, loss_scale=2.0, output_norm_squared=26.0).loss_floor == 1.0


def test_loss_checks_its_argument_and_never_returns_nan():
    problem = Problem(np.eye(2), np.diag([1.0, 2.0]))
    with pytest.raises(ShapeError, match=r"W \(end-to-end matrix\) has shape \(3, 2\); wanted \(2, 2\)"):
        problem.loss(np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"W .*not finite"):
        problem.loss([[np.nan, 0], [0, 0]])
    assert problem.loss([[1e200, -1e200], [0, 0]]) == math.inf
    assert problem.loss(np.eye(2, dtype=np.float32)) == problem.loss(np.eye(2))


# ---------------------------------------------------------------------------------------- target factors


@settings(deadline=None)
@given(dim_in=SIZES, dim_out=SIZES, data=st.data(), seed=SEEDS)
def test_target_factors_find_the_rank(dim_in, dim_out, data, seed):
    rank = data.draw(st.integers(0, min(dim_in, dim_out)))
    target = random_factors(np.random.default_rng(seed), dim_out, dim_in, rank).dense()
    found = Problem(target).target_factors()
    assert found.rank == rank
    np.testing.assert_allclose(found.dense(), target, atol=2 * tolerance(F64, max(dim_in, dim_out)))


def test_target_factors_accept_a_tolerance():
    rng = np.random.default_rng(6)
    problem = Problem(draw_matrix(rng, 8, 5, [1.0, 1e-3, 1e-9]))
    assert [problem.target_factors(t).rank for t in (None, 1e-12, 1e-6, 1e-2, 2.0)] == [3, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="tolerance is -1"):
        problem.target_factors(-1.0)


def test_target_factors_of_a_factored_target_are_exact():
    factors = LowRank(np.eye(6, 3), [1.0, 1e-30, 0.0], np.eye(5, 3))
    found = Problem(factors).target_factors()
    assert found.rank == 2
    np.testing.assert_array_equal(found.U, factors.U[:, :2])


def test_dense_target_is_an_array():
    factors = random_factors(np.random.default_rng(7), 4, 5, 2)
    np.testing.assert_array_equal(Problem(factors).dense_target(), factors.dense())
    assert Problem(factors).dense_target(np.float32).dtype == np.float32
    dense = factors.dense()
    assert np.shares_memory(Problem(dense).dense_target(), dense)


# ------------------------------------------------------------------------------------ problems from data


@settings(deadline=None)
@given(
    dim_in=SIZES,
    dim_out=SIZES,
    n_samples=SIZES,
    seed=SEEDS,
    chunk=st.integers(1, 200),
    layout=st.sampled_from(["columns", "rows"]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_statistics_of_data(dim_in, dim_out, n_samples, seed, chunk, layout, reduction):
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((dim_in, n_samples)), rng.standard_normal((dim_out, n_samples))
    given_as = (X, Y) if layout == "columns" else (X.T, Y.T)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "_CHUNK_VALUES", chunk)
        problem = Problem.from_data(*given_as, layout=layout, reduction=reduction)
        floor = problem.loss_floor
        np.testing.assert_array_equal(problem.inputs, X)
    allowed = tolerance(F64, n_samples)
    assert relative_error(problem.input_gram, X @ X.T) < allowed
    assert relative_error(problem.target, Y @ X.T, Y, X) < allowed
    assert relative_error(problem.output_norm_squared, np.sum(Y**2)) < allowed
    assert problem.loss_scale == (1.0 if reduction == "sum" else 1 / (dim_out * n_samples))
    assert (problem.n_samples, problem.dim_in, problem.dim_out) == (n_samples, dim_in, dim_out)
    assert problem.reduction == reduction
    assert not problem.whitened
    np.testing.assert_array_equal(problem.outputs, Y)
    best = np.linalg.norm(Y - Y @ np.linalg.pinv(X) @ X) ** 2
    condition = np.linalg.cond(X)
    assume(condition < 1e4)
    # Summed residuals are as exact as M*, which solves equations of condition number cond(X)^2.
    assert abs(math.sqrt(2 * floor / problem.loss_scale) - math.sqrt(best)) < (
        tolerance(F64, n_samples * dim_in) * condition**2 * np.linalg.norm(Y)
    )


@settings(deadline=None)
@given(
    dim_in=SIZES,
    dim_out=SIZES,
    n_samples=SIZES,
    seed=SEEDS,
    whiten=st.sampled_from([None, *METHODS]),
    near=st.sampled_from([1.0, 1e-6]),
)
def test_loss_of_data_equals_the_loss(dim_in, dim_out, n_samples, seed, whiten, near):
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((dim_in, n_samples)), rng.standard_normal((dim_out, n_samples))
    condition = np.linalg.cond(X)
    assume(condition < 1e3)
    problem = Problem.from_data(X, Y, whiten=whiten)
    W = problem.least_squares + near * rng.standard_normal((dim_out, problem.dim_in))
    wanted = direct_loss(W, problem.inputs, Y, problem.loss_scale)
    # Rounding in the residual is of size eps ||W|| ||X||; relative to M* it grows with the condition number.
    size = problem.loss_scale * (np.sum(W**2) * np.sum(problem.inputs**2) + np.sum(Y**2))
    allowed = tolerance(F64, dim_in * n_samples) * condition**2 * (math.sqrt(wanted * size) + 1e-12 * size)
    assert abs(problem.loss(W) - wanted) <= allowed


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.bool_, np.float32, np.float64])
@pytest.mark.parametrize("whiten", [None, "zca"])
def test_inputs_of_any_precision_and_layout_are_read(dtype, whiten):
    rng = np.random.default_rng(8)
    X = rng.integers(0, 2, (6, 40)).astype(dtype)
    Y = rng.integers(0, 2, (2, 40)).astype(dtype)
    wanted = Problem.from_data(X.astype(F64), Y.astype(F64), whiten=whiten)
    allowed = tolerance(F64, 40) * np.linalg.cond(X.astype(F64))
    read_only = X.copy()
    read_only.flags.writeable = False
    strided = np.repeat(X, 3, axis=1)[:, ::3]
    for other in (X, np.asfortranarray(X), strided, read_only, X.tolist()):
        got = Problem.from_data(other, Y, whiten=whiten)
        assert relative_error(got.target, wanted.target) < allowed
        assert got.target.dtype == got.inputs.dtype == got.outputs.dtype == F64
        assert relative_error(got.inputs, wanted.inputs) < allowed


def test_contiguous_float64_data_are_not_copied():
    X, Y = np.random.default_rng(9).standard_normal((2, 3, 20))
    problem = Problem.from_data(X, Y)
    assert np.shares_memory(problem.inputs, X)
    assert np.shares_memory(problem.outputs, Y)


def test_integer_images_are_never_converted_as_a_whole():
    images = np.random.default_rng(10).integers(0, 256, (20_000, 300), np.uint8)
    labels = np.arange(20_000) % 10
    with measure_peak() as peak:
        problem = Problem.from_data(images, labels, whiten="cholesky", layout="rows")
    as_float64 = 8 * images.size
    # Raw, transformed and integer chunks of at most 32 MB, where a converted copy alone takes 48 MB.
    assert problem.whitening.error < 1e-13
    assert peak.bytes < 2.2 * 8 * data_module._CHUNK_VALUES
    assert as_float64 > 8 * data_module._CHUNK_VALUES


def test_one_hot_targets_have_labels():
    X = np.random.default_rng(11).standard_normal((3, 8))
    labels = np.array([4, 9, 4, 4, 7, 9, 7, 4], np.uint8)
    problem = Problem.from_data(X, labels)
    assert (problem.dim_out, problem.classes.tolist()) == (3, [4, 7, 9])
    np.testing.assert_array_equal(problem.labels, labels)
    np.testing.assert_array_equal(problem.outputs, one_hot(labels))
    for Y in (one_hot(labels, range(10)), one_hot(labels, range(10)).astype(np.uint8).tolist()):
        matrix = Problem.from_data(X, Y)
        np.testing.assert_array_equal(matrix.labels, labels)
        np.testing.assert_array_equal(matrix.classes, np.arange(10))
        np.testing.assert_array_equal(matrix.outputs, Y)


@pytest.mark.parametrize("change", [(0, 0, 0.0), (0, 1, 1.0), (0, 0, 0.5), (0, 0, -1.0)])
def test_other_targets_have_no_labels(change):
    Y = one_hot([0, 1, 2, 1])
    Y[change[0], change[1]] = change[2]
    problem = Problem.from_data(np.ones((2, 4)), Y)
    assert problem.labels is None
    assert problem.classes is None


def test_white_data_stay_unchanged():
    rng = np.random.default_rng(12)
    X, Y = draw_orthonormal(rng, 30, 7).T, rng.standard_normal((2, 30))
    problem = Problem.from_data(X, Y)
    assert problem.whitened
    assert problem.whitening.method is None
    assert problem.whitening.matrix is None
    assert problem.whitening.rank == 7
    assert 0 < problem.whitening.error < 1e-14
    assert problem.inputs is not None
    np.testing.assert_array_equal(problem.transform(X), X)


def test_data_that_are_nearly_white_are_not_white():
    rng = np.random.default_rng(12)
    X, Y = draw_orthonormal(rng, 30, 7).T, rng.standard_normal((2, 30))
    nearly = Problem.from_data(X * (1 + 1e-11), Y)
    assert not nearly.whitened
    assert nearly.whitening is None


@pytest.mark.parametrize(
    ("X", "Y", "error", "message"),
    [
        (np.ones(4), np.ones((1, 4)), ShapeError, r"X \(raw inputs\) has shape \(4,\); wanted a matrix"),
        (np.ones((2, 0)), np.ones((1, 0)), ShapeError, "X .*empty"),
        (np.ones((2, 4)), np.ones((1, 3)), ShapeError, "X has 4 samples and Y has 3"),
        (np.ones((2, 4)), [0, 1, 1], ShapeError, "X has 4 samples and Y has 3"),
        (np.ones((2, 4)), np.ones(4), TypeError, r"Y \(a vector, so labels\) has .* wanted integers"),
        (np.ones((2, 4)), np.ones(4), TypeError, r"for regression .* of shape \(1, N\): Y\[None, :\]"),
        (np.ones((9, 2)), np.ones((9, 3)), ShapeError, r'layout="rows" would fit: 9 samples'),
        (np.ones((9, 2)), [0, 1, 2] * 3, ShapeError, r'Y has 9; .*layout="rows" would fit: 9 samples'),
        (np.ones((9, 2)), np.ones((8, 3)), ShapeError, "in layout 'columns'$"),
        (np.ones((2, 4)), np.ones((1, 4, 1)), ShapeError, "Y .*wanted a matrix"),
        (np.ones((2, 4)), [[1.0, 2.0], [3.0]], ShapeError, "Y .*rectangular"),
        (np.ones((2, 4), np.float16), np.ones((1, 4)), TypeError, "X .*float16"),
        (np.ones((2, 4), complex), np.ones((1, 4)), TypeError, "X .*complex"),
        (np.ones((2, 4)), np.full((1, 4), "a"), TypeError, "Y .*<U1"),
        (np.full((2, 4), None), np.ones((1, 4)), TypeError, "X .*not numeric"),
        (np.full((2, 4), 1e200), np.ones((1, 4)), ValueError, r"X is too large: X X\^T overflows"),
        (np.ones((2, 4)), np.full((1, 4), 1e200), ValueError, r"Y is too large: \|\|Y\|\|\^2 overflows"),
    ],
)
@pytest.mark.parametrize("whiten", [None, "pca"])
def test_errors_name_bad_data(X, Y, error, message, whiten):
    with pytest.raises(error, match=message):
        Problem.from_data(X, Y, whiten=whiten)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("whiten", [None, "zca"])
def test_data_that_are_not_finite_are_located(value, whiten, monkeypatch):
    monkeypatch.setattr(data_module, "_CHUNK_VALUES", 20)
    X, Y = np.random.default_rng(13).standard_normal((2, 3, 20))
    bad = X.copy()
    bad[1, 17] = value
    with pytest.raises(ValueError, match=rf"^X has .* not finite: {value} in component 1 of sample 17$"):
        Problem.from_data(bad, Y, whiten=whiten)
    bad = Y.copy()
    bad[2, 5] = value
    with pytest.raises(ValueError, match=r"^Y has .* not finite: .* in component 2 of sample 5$"):
        Problem.from_data(X.T, bad.T, whiten=whiten, layout="rows")
    with pytest.raises(ValueError, match="X has a value that is not finite"):
        Problem.from_data(X, Y, whiten=whiten).transform(np.full((3, 1), value))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"whiten": "svd"}, "whiten is 'svd'; wanted one of 'zca', 'pca', 'cholesky', None"),
        ({"reduction": "max"}, "reduction is 'max'; wanted one of 'sum', 'mean'"),
        ({"layout": "row"}, "layout is 'row'; wanted one of 'columns', 'rows'"),
        ({"rank_tolerance": 1e-3}, "rank_tolerance is set, but whiten is None"),
        ({"whiten": "zca", "rank_tolerance": -1.0}, "rank_tolerance .* is -1"),
        (
            {"whiten": "zca", "rank_tolerance": 1.0},
            r"rank_tolerance \(share of sigma_1\) is 1; wanted a number in \[0, 1\)",
        ),
    ],
)
def test_errors_name_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Problem.from_data(np.ones((2, 4)), np.ones((1, 4)), **settings)


# --------------------------------------------------------------------------------------------- whitening


@settings(deadline=None)
@given(
    dim_in=SIZES,
    n_samples=st.integers(1, 40),
    data=st.data(),
    seed=SEEDS,
    method=st.sampled_from(METHODS),
    chunk=st.sampled_from([7, 2**22]),
)
def test_whitening_reduces_to_the_rank_and_whitens(dim_in, n_samples, data, seed, method, chunk):
    rng = np.random.default_rng(seed)
    rank = data.draw(st.integers(1, min(dim_in, n_samples)))
    X = draw_matrix(rng, dim_in, n_samples, np.geomspace(1e3, 1, rank))
    Y = rng.standard_normal((2, n_samples))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "_CHUNK_VALUES", chunk)
        problem = Problem.from_data(X, Y, whiten=method)
        white, Z = problem.whitening, problem.inputs
    assert (white.method, white.rank, problem.dim_in) == (method, rank, rank)
    assert white.matrix.shape == (rank, dim_in)
    assert Z.shape == (rank, n_samples)
    # Rounding of T X, whose rows sum terms up to cond(X) = 1e3 times their result.
    allowed = 1e3 * tolerance(F64, dim_in)
    assert np.linalg.norm(Z @ Z.T - np.eye(rank)) / math.sqrt(rank) <= allowed
    assert white.error <= allowed
    assert relative_error(Z, white.matrix @ X) <= allowed
    assert relative_error(problem.target, Y @ Z.T, Y, Z) <= allowed
    assert white.condition_number == pytest.approx(1e6 if rank > 1 else 1, rel=1e-6)
    assert white.discarded <= gram_resolution(dim_in)
    # Whitening loses nothing: the best fit explains what the best fit of the raw inputs does.
    best = np.linalg.norm(Y - Y @ np.linalg.pinv(X, rcond=1e-8) @ X) ** 2
    assert 2 * problem.loss_floor / problem.loss_scale == pytest.approx(best, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("method", METHODS)
def test_whitening_methods_equal_their_definitions(method):
    rng = np.random.default_rng(14)
    X = draw_matrix(rng, 6, 30, np.linspace(5, 1, 6))
    gram = X @ X.T
    T = Problem.from_data(X, np.ones((1, 30)), whiten=method).whitening.matrix
    eigenvalues, vectors = np.linalg.eigh(gram)
    allowed = 25 * tolerance(F64, 30)  # cond(S) = 25
    if method == "zca":
        assert relative_error(T, (vectors / np.sqrt(eigenvalues)) @ vectors.T) < allowed
    elif method == "pca":
        lengths = np.linalg.norm(T, axis=1)
        np.testing.assert_allclose(lengths, 1 / np.sqrt(eigenvalues[::-1]), rtol=allowed)
        np.testing.assert_allclose(np.abs(T @ vectors[:, ::-1]), np.diag(lengths), atol=allowed)
        assert (np.max(T, axis=1) == np.max(np.abs(T), axis=1)).all()
    else:
        assert relative_error(T, np.linalg.inv(np.linalg.cholesky(gram))) < allowed
        np.testing.assert_array_equal(T, np.tril(T))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_samples", [30, 500])
def test_a_second_pass_reduces_the_whitening_error_to_the_root_of_the_condition_number(method, n_samples):
    rng = np.random.default_rng(15)
    condition = 1e5  # of X; of S = X X^T it is 1e10
    X = draw_matrix(rng, 20, n_samples, np.geomspace(condition, 1, 20))
    eigenvalues, vectors = np.linalg.eigh(X @ X.T)
    one_pass = (vectors / np.sqrt(eigenvalues)).T @ X
    assert np.linalg.norm(one_pass @ one_pass.T - np.eye(20)) > 1e-8
    white = Problem.from_data(X, np.ones((1, n_samples)), whiten=method).whitening
    assert white.error < condition * np.finfo(F64).eps
    assert white.condition_number == pytest.approx(condition**2, rel=1e-4)


@pytest.mark.parametrize("n_samples", [6, 60])
def test_rank_tolerance_drops_directions_and_reports_their_share(n_samples):
    rng = np.random.default_rng(16)
    values = np.array([10.0, 5.0, 1e-2, 1e-9])
    X, Y = draw_matrix(rng, 9, n_samples, values), np.ones((1, n_samples))
    ranks = {t: Problem.from_data(X, Y, whiten="pca", rank_tolerance=t).whitening for t in (None, 1e-2, 0.9)}
    assert [white.rank for white in ranks.values()] == [3, 2, 1]
    assert ranks[1e-2].discarded == pytest.approx(1e-4 / 125, rel=1e-3)
    assert ranks[0.9].discarded == pytest.approx(0.2, rel=1e-3)
    assert ranks[1e-2].condition_number == pytest.approx(4.0)


def test_rank_tolerance_below_rounding_is_refused_where_it_keeps_noise():
    rng = np.random.default_rng(17)
    X = draw_matrix(rng, 40, 100, [1.0, 0.5])
    with pytest.raises(ValueError, match=r"rank_tolerance is 1.0e-12.* noise; wanted about 9.6e-07 or more"):
        Problem.from_data(X, np.ones((1, 100)), whiten="zca", rank_tolerance=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_methods_coincide_where_the_rank_is_deficient(method):
    rng = np.random.default_rng(18)
    X, Y = draw_matrix(rng, 7, 25, [3.0, 2.0, 1.0]), rng.standard_normal((2, 25))
    principal = Problem.from_data(X, Y, whiten="pca").whitening.matrix
    np.testing.assert_array_equal(Problem.from_data(X, Y, whiten=method).whitening.matrix, principal)


def test_constant_and_repeated_pixels_are_dropped():
    rng = np.random.default_rng(19)
    X = rng.integers(0, 256, (5, 200), np.uint8)
    X = np.vstack([X, X[:2], np.zeros((3, 200), np.uint8)])
    assert Problem.from_data(X, np.arange(200) % 3, whiten="zca").dim_in == 5


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (1, 1)])
def test_zero_inputs_cannot_be_whitened(shape):
    with pytest.raises(ValueError, match=r"X \(raw inputs\) is zero"):
        Problem.from_data(np.zeros(shape), np.ones((1, shape[1])), whiten="zca")


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_whitening_does_not_depend_on_units(scale):
    rng = np.random.default_rng(20)
    X, Y = rng.standard_normal((4, 30)), rng.standard_normal((2, 30))
    small = Problem.from_data(X, Y, whiten="zca")
    other = Problem.from_data(scale * X, Y, whiten="zca")
    assert other.whitening.error < 1e-14
    assert relative_error(other.target, small.target) < tolerance(F64, 30) * np.linalg.cond(X)


@pytest.mark.parametrize("layout", ["columns", "rows"])
@pytest.mark.parametrize("whiten", [None, "zca"])
def test_transform_accepts_new_inputs_in_the_layout_of_the_data(layout, whiten):
    rng = np.random.default_rng(21)
    X, new = rng.integers(0, 9, (5, 40)), rng.integers(0, 9, (5, 3), np.uint8)
    turn = (lambda a: a.T) if layout == "rows" else (lambda a: a)
    problem = Problem.from_data(turn(X), np.arange(40) % 2, layout=layout, whiten=whiten)
    wanted = new if whiten is None else problem.whitening.matrix @ new
    got = problem.transform(turn(new))
    assert got.dtype == F64
    assert got.flags.c_contiguous
    assert relative_error(got, wanted) < tolerance(F64, 5)
    assert relative_error(problem.transform(turn(X)), problem.inputs) < tolerance(F64, 5)
    with pytest.raises(ShapeError, match=r"X \(raw inputs\) has shape .*; wanted \((5, n|n, 5)\)"):
        problem.transform(turn(np.ones((4, 3))))


def test_an_error_names_samples_in_rows_instead_of_columns():
    with pytest.raises(ShapeError, match=r'layout="columns" would fit: 4 samples'):
        Problem.from_data(np.ones((2, 4)), np.ones((3, 4)), layout="rows")
    with pytest.raises(TypeError, match=r"of shape \(N, 1\): Y\[:, None\]"):
        Problem.from_data(np.ones((4, 2)), np.ones(4), layout="rows")


def test_whitening_prints_in_one_line():
    X = np.diag([3.0, 1.0, 0.0]) @ np.random.default_rng(0).standard_normal((3, 50))
    white = Problem.from_data(X, np.arange(50) % 2, whiten="zca").whitening
    assert repr(white).startswith("Whitening(zca, rank 2 of 3, error ")
    assert len(repr(white)) < 110
    found = Problem.from_data(np.eye(3), np.eye(3)).whitening
    assert repr(found).startswith("Whitening(no transform, rank 3, error ")


def test_problems_without_data_have_no_samples():
    problem = Problem(np.ones((2, 3)))
    assert (problem.inputs, problem.outputs, problem.labels, problem.classes) == (None,) * 4
    assert (problem.n_samples, problem.reduction, problem.whitening) == (None,) * 3
    np.testing.assert_array_equal(problem.transform([[1], [2], [3]]), [[1], [2], [3]])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Problem(np.eye(2)),
        lambda: Problem(np.eye(2), np.eye(2), output_norm_squared=5),
        lambda: Problem.from_data(
            np.arange(12).reshape(3, 4) ** 2, [0, 1, 0, 1], whiten="zca", rank_tolerance=np.float32(1e-5)
        ),
        lambda: low_rank_recovery(5, 2),
        lambda: classification(np.int64(2), np.int32(3)),
    ],
)
def test_describe_is_json(make):
    problem = make()
    described = json.loads(json.dumps(problem.describe()))
    assert described["loss_scale"] == problem.loss_scale
    assert described["dim_in"] == problem.dim_in
    assert f"{problem.dim_in} -> {problem.dim_out}" in repr(problem)


# ------------------------------------------------------------------------------------- standard problems


def test_low_rank_recovery_in_the_published_setting():
    problem = low_rank_recovery(dim=30, rank=3, seed=0)
    assert problem.loss_scale == 1 / 900
    assert (problem.n_samples, problem.reduction, problem.whitened) == (30, "mean", True)
    assert isinstance(problem.target, LowRank)
    assert problem.target.shape == (30, 30)
    # The largest singular value of such a Gaussian is near 2 sqrt(30) = 10.95.
    assert ((problem.target.s > 8) & (problem.target.s < 12.5)).all()


def test_low_rank_recovery_with_summed_losses():
    assert low_rank_recovery(30, 3, reduction="sum").loss_scale == 1.0


def test_low_rank_recovery_depends_on_the_seed_alone():
    problem = low_rank_recovery(dim=30, rank=3, seed=0)
    np.testing.assert_array_equal(low_rank_recovery(30, 3, seed=0).target.U, problem.target.U)
    assert not np.array_equal(low_rank_recovery(30, 3, seed=1).target.U, problem.target.U)


def test_low_rank_recovery_truncates_one_gaussian():
    full, truncated = (low_rank_recovery(12, rank, seed=5).target for rank in (12, 4))
    np.testing.assert_array_equal(truncated.s, full.s[:4])
    residual = np.linalg.norm(full.dense() - truncated.dense(), 2)
    assert residual == pytest.approx(full.s[4])
    entries = np.concatenate([low_rank_recovery(20, 20, seed=s).target.dense().ravel() for s in range(20)])
    # Mean and variance of 8,000 standard normals, to 4 standard deviations.
    assert abs(entries.mean()) < 4 / math.sqrt(8000)
    assert abs(entries.var() - 1) < 4 * math.sqrt(2 / 8000)


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_large_recovery_is_stored_as_factors(rank):
    with measure_peak() as peak:
        problem = low_rank_recovery(dim=3000, rank=rank, seed=3)
    assert problem.target.shape == (3000, 3000)
    assert problem.target.rank == rank
    assert problem.loss_scale == 1 / 3000**2
    assert peak.bytes < 8 * 3000**2 / 10  # no d x d array
    # Near 2 sqrt(d), within the width d^(-1/6) of its fluctuations, generously.
    assert (np.abs(problem.target.s - 2 * math.sqrt(3000)) < 3).all()


def test_large_recovery_has_the_distribution_of_the_small_one(monkeypatch):
    def draws():
        targets = [low_rank_recovery(6, 3, seed=s).target for s in range(400)]
        singular_values = np.array([t.s for t in targets])
        corners = np.array([[t.dense()[0, 0], t.dense()[1, 0] * t.dense()[0, 1], t.U[0, 0]] for t in targets])
        return np.hstack([singular_values, singular_values**2, corners, corners**2])

    small = draws()
    monkeypatch.setattr(standard, "_DENSE_RECOVERY_DIM", 0)
    large = draws()
    # The sign of a column of U is a convention: only its square has a distribution.
    compared = [i for i in range(small.shape[1]) if i != 8]
    spread = np.sqrt((small.var(axis=0) + large.var(axis=0)) / 400)
    # 11 means over 400 draws each: 4 standard deviations.
    assert (np.abs(small.mean(axis=0) - large.mean(axis=0)) < 4 * spread)[compared].all()


def test_large_recovery_uses_the_singular_values_of_the_bidiagonal_matrix():
    core = pytest.importorskip("dlnfast._support.dispatch").core
    rng = np.random.default_rng(22)
    diagonal, superdiagonal = rng.uniform(0.1, 3, 50), rng.uniform(0.1, 3, 49)
    wanted = np.linalg.svd(np.diag(diagonal) + np.diag(superdiagonal, 1), compute_uv=False)
    np.testing.assert_allclose(
        core.bidiagonal_singular_values(diagonal, superdiagonal, 7), wanted[:7], rtol=tolerance(F64, 50)
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 0), ValueError, "dim is 0"),
        ((3, 4), ValueError, "rank is 4; wanted at most dim = 3"),
        ((3, -1), ValueError, "rank is -1"),
        ((3.0, 1), TypeError, "dim is 3.0"),
        ((3, 1, -1), ValueError, "seed is -1"),
        ((3, 1, 0, "max"), ValueError, "reduction is 'max'"),
    ],
)
def test_errors_name_bad_recovery_problems(arguments, error, message):
    with pytest.raises(error, match=message):
        low_rank_recovery(*arguments)


@pytest.mark.parametrize(
    ("n_classes", "samples_per_class", "dim"),
    [(5, 10, None), (5, 10, 50), (3, 7, 4), (3, 2, 11), (1, 1, 1), (1, 3, 2)],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_classification_has_orthonormal_samples(n_classes, samples_per_class, dim, reduction):
    problem = classification(n_classes, samples_per_class, dim, seed=2, reduction=reduction)
    n_samples = n_classes * samples_per_class
    dim = n_samples if dim is None else dim
    X, Y = problem.inputs, problem.outputs
    assert X.shape == (dim, n_samples)
    np.testing.assert_array_equal(Y, np.kron(np.eye(n_classes), np.ones((1, samples_per_class))))
    np.testing.assert_array_equal(problem.labels, np.repeat(np.arange(n_classes), samples_per_class))
    np.testing.assert_array_equal(problem.classes, np.arange(n_classes))
    assert problem.loss_scale == (1.0 if reduction == "sum" else 1 / (n_classes * n_samples))
    allowed = tolerance(F64, max(dim, n_samples)) * dim
    if n_samples >= dim:
        assert np.linalg.norm(X @ X.T - np.eye(dim)) < allowed
        assert problem.whitened
        assert problem.whitening.error < allowed
    else:
        assert np.linalg.norm(X.T @ X - np.eye(n_samples)) < allowed
        gram = problem.input_gram
        assert np.linalg.norm(gram @ gram - gram) < allowed
    np.testing.assert_allclose(problem.target, Y @ X.T, atol=allowed)
    if n_samples <= dim:  # X^T X = I: the data can be fitted, and every class weighs sqrt(n)
        np.testing.assert_allclose(problem.target_factors().s, math.sqrt(samples_per_class), rtol=allowed)
        assert problem.loss_floor < allowed**2


def test_classification_is_the_published_setting_and_depends_on_the_seed():
    problem = classification(n_classes=5, samples_per_class=10, dim=50)
    assert problem.loss_scale == 1 / 250
    assert not np.array_equal(problem.inputs, classification(5, 10, 50, seed=1).inputs)
    np.testing.assert_array_equal(problem.inputs, classification(5, 10).inputs)


def test_errors_name_bad_classification_problems():
    for arguments in ((0, 1), (1, 0), (2, 2, 0)):
        with pytest.raises(ValueError, match="is 0; wanted an integer of at least 1"):
            classification(*arguments)
    with pytest.raises(TypeError, match=r"samples_per_class is 2\.5"):
        classification(2, 2.5)
    with pytest.raises(ValueError, match="reduction is"):
        classification(2, 2, reduction="none")
