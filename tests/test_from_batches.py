# SPDX-License-Identifier: MIT
"""Sufficient statistics of batches: exact sums, merges in any order, and the problems made of them."""

from __future__ import annotations

import itertools
import json
import operator
import pickle
from fractions import Fraction
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from helpers.data_folder import find_data_folder
from helpers.matrices import draw_matrix, draw_orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import Problem, SufficientStatistics
from dlnfast._config import spec
from dlnfast._problem.sums import NAMES
from dlnfast._support.errors import ShapeError

F64 = np.float64
METHODS = ["zca", "pca", "cholesky"]
SEEDS = st.integers(0, 10**6)
#: eps / 2^21: rounding error of products of leading and trailing parts, relative to the largest terms.
SUM_ERROR = np.finfo(F64).eps / 2**21


def pieces(X, Y, sizes):
    """Yield columns of both, `sizes` at a time."""
    ends = np.cumsum([0, *sizes])
    for begin, end in itertools.pairwise(ends):
        yield X[:, begin:end], Y[..., begin:end]


def in_batches(X, Y, **arguments):
    return Problem.from_batches(pieces(X, Y, [1, X.shape[1] - 1]), **arguments)


def random_sizes(rng, n_samples, n_batches):
    """Return sizes of batches, some of them 0 and 1."""
    cuts = np.sort(rng.integers(0, n_samples + 1, n_batches - 1))
    return np.diff([0, *cuts, n_samples])


def merged_at_random(rng, parts):
    parts = list(parts)
    while len(parts) > 1:
        i, j = sorted(rng.choice(len(parts), 2, replace=False))
        second, first = parts.pop(j), parts.pop(i)
        parts.append(first + second if rng.integers(2) else second + first)
    return parts[0]


def numbers(statistics):
    """Return all numbers of the statistics, values and corrections."""
    parts = {name: (sums.value, sums.correction) for name, sums in statistics._sums.items()}
    return {
        "n_samples": statistics.n_samples,
        "classes": None if statistics.classes is None else statistics.classes.tolist(),
        **{
            name: (value.tolist(), None if correction is None else correction.tolist())
            for name, (value, correction) in parts.items()
        },
    }


def rounded(statistics):
    return [statistics._sums[name].round() for name in NAMES]


def share(got, wanted):
    """||got - wanted|| / ||wanted||, 0 where both are 0."""
    difference = np.linalg.norm(np.asarray(got) - wanted)
    return difference / np.linalg.norm(wanted) if difference else 0.0


def exact_product(A, B):
    """Return A B^T and |A| |B|^T in rational numbers."""
    left, right = ([[Fraction(x) for x in row] for row in np.asarray(M, F64).tolist()] for M in (A, B))
    value = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in right] for a in left]
    size = [[sum(abs(x * y) for x, y in zip(a, b, strict=True)) for b in right] for a in left]
    return value, size


# ------------------------------------------------------------------------------------------------- sums


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, n_samples=st.integers(1, 60), n_batches=st.integers(1, 20), shift=st.sampled_from([0, 30]))
def test_sums_equal_rational_arithmetic(seed, n_samples, n_batches, shift):
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.integers(-6, 7, (3, 1))
    X, Y = scales * (rng.standard_normal((3, n_samples)) + shift), rng.standard_normal((2, n_samples))
    batches = pieces(X, Y, random_sizes(rng, n_samples, n_batches))
    found = merged_at_random(rng, [SufficientStatistics().add(*batch) for batch in batches])
    ones = np.ones((1, n_samples))
    wanted = {
        "input_gram": exact_product(X, X),
        "target": exact_product(Y, X),
        "input_sum": exact_product(X, ones),
        "output_sum": exact_product(Y, ones),
    }
    for name, (value, size) in wanted.items():
        sums = found._sums[name]
        values = np.atleast_2d(sums.value.T).T
        corrections = (
            np.zeros_like(values) if sums.correction is None else sums.correction.reshape(values.shape)
        )
        single = np.atleast_2d(sums.round().T).T
        for index in np.ndindex(values.shape):
            exact, absolute = value[index[0]][index[1]], size[index[0]][index[1]]
            represented = Fraction(float(values[index])) + Fraction(float(corrections[index]))
            # Leading parts are rounded relative to the largest entry of a row, not to each entry: at most N
            # times the sum of absolute values.
            largest = n_samples * absolute
            assert abs(represented - exact) <= Fraction(SUM_ERROR) * largest
            rounding = Fraction(float(np.spacing(abs(single[index])))) / 2
            assert abs(Fraction(float(single[index])) - exact) <= rounding + Fraction(SUM_ERROR) * largest
    squares = sum(Fraction(y) ** 2 for y in Y.ravel().tolist())
    assert abs(Fraction(found.output_norm_squared) - squares) <= squares * Fraction(float(np.finfo(F64).eps))


def test_long_sums_lose_no_digits():
    # A plain sum of 2^15 equal chunks has an error of 1e-13; these sums equal exact arithmetic.
    X, Y = np.array([[0.1], [1 / 3]]), np.array([[0.7]])
    found = SufficientStatistics()
    for _ in range(2**9):
        found.add(X, Y)
    doubled = found
    for _ in range(6):
        doubled = doubled + doubled
    gram, _ = exact_product(X, X)
    for index in np.ndindex(2, 2):
        wanted = 2**15 * gram[index[0]][index[1]]
        assert doubled.input_gram[index] == float(wanted)
    assert doubled.n_samples == 2**15


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.bool_])
def test_sums_of_integers_are_exact(dtype):
    rng = np.random.default_rng(1)
    X, labels = rng.integers(0, 2 if dtype is np.bool_ else 250, (5, 5000)).astype(dtype), np.arange(5000) % 3
    found = SufficientStatistics().add_batches(pieces(X, labels, [1, 0, 2999, 2000]))
    wide = X.astype(np.int64)
    np.testing.assert_array_equal(found.input_gram, wide @ wide.T)
    np.testing.assert_array_equal(found.target, [wide[:, labels == k].sum(axis=1) for k in range(3)])
    np.testing.assert_array_equal(found.input_mean, wide.sum(axis=1) / 5000)
    assert found.output_norm_squared == 5000
    assert found._sums["input_gram"].round().dtype == F64


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, n_batches=st.integers(1, 12), labelled=st.booleans(), trees=st.integers(1, 3))
def test_any_order_and_any_tree_of_merges_agree(seed, n_batches, labelled, trees):
    rng = np.random.default_rng(seed)
    X = 10.0 ** rng.integers(-3, 4, (4, 1)) * rng.standard_normal((4, 50))
    Y = rng.integers(-2, 5, 50) if labelled else rng.standard_normal((3, 50))
    whole = SufficientStatistics().add(X, Y)
    for _ in range(trees):
        order = rng.permutation(50)
        batches = pieces(X[:, order], Y[..., order], random_sizes(rng, 50, n_batches))
        parts = [SufficientStatistics().add(*batch) for batch in batches]
        before = [numbers(part) for part in parts]
        found = merged_at_random(rng, parts)
        assert [numbers(part) for part in parts] == before
        assert found.n_samples == 50
        np.testing.assert_array_equal(found.classes, whole.classes)
        for got, wanted in zip(rounded(found), rounded(whole), strict=True):
            assert share(got, wanted) <= np.finfo(F64).eps


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, labelled=st.booleans())
def test_merging_commutes_bit_for_bit(seed, labelled):
    rng = np.random.default_rng(seed)
    parts = []
    for n_samples in rng.integers(0, 9, 2):
        Y = rng.integers(0, 4, n_samples) if labelled else rng.standard_normal((2, n_samples))
        batches = pieces(rng.standard_normal((3, n_samples)), Y, random_sizes(rng, n_samples, 3))
        parts.append(SufficientStatistics().add_batches(batches))
    a, b = parts
    assert numbers(a + b) == numbers(b + a) == numbers(a.copy().merge(b))
    if a.n_samples:
        assert (a + b).input_gram.tobytes() == (b + a).input_gram.tobytes()
        np.testing.assert_array_equal((a + b).input_gram, (a + b).input_gram.T)
    twice = a.copy()
    twice.merge(twice)
    assert numbers(twice) == numbers(a + a)


def test_labels_have_a_row_for_every_class_of_any_batch():
    rng = np.random.default_rng(2)
    X, labels = rng.standard_normal((3, 12)), np.repeat([7, 3, 9, -1], 3)
    found = SufficientStatistics().add_batches(pieces(X, labels, [3, 3, 3, 3]))
    wanted = Problem.from_data(X, labels)
    np.testing.assert_array_equal(found.classes, [-1, 3, 7, 9])
    assert share(found.target, wanted.target) < tolerance(F64, 3)
    np.testing.assert_array_equal(found.problem().classes, wanted.classes)
    one_hot = SufficientStatistics().add_batches(pieces(X, dln.one_hot(labels), [5, 7]))
    np.testing.assert_array_equal(one_hot.classes, [0, 1, 2, 3])
    assert one_hot.add(X[:, :1], [[0.5], [0], [0], [0]]).classes is None


# ------------------------------------------------------------------------------------ problems of batches


@settings(deadline=None, max_examples=60)
@given(
    seed=SEEDS,
    dim_in=st.sampled_from([1, 2, 5, 11]),
    n_samples=st.integers(2, 40),
    method=st.sampled_from([None, *METHODS]),
    center=st.booleans(),
    layout=st.sampled_from(["columns", "rows"]),
    reduction=st.sampled_from(["sum", "mean"]),
    data=st.data(),
)
def test_the_problem_equals_that_of_the_data(
    seed, dim_in, n_samples, method, center, layout, reduction, data
):
    rng = np.random.default_rng(seed)
    rank = data.draw(st.integers(1, min(dim_in, n_samples - 1)))
    X = draw_matrix(rng, dim_in, n_samples, np.geomspace(10, 1, rank))
    if center:
        X = X - X.mean(axis=1, keepdims=True) + rng.standard_normal((dim_in, 1))
    spread = np.linalg.svd(X - X.mean(axis=1, keepdims=True) if center else X, compute_uv=False)
    condition = spread[0] / spread[spread > 1e-9].min(initial=spread[0])
    Y = rng.standard_normal((2, n_samples)) if seed % 2 else rng.integers(0, 3, n_samples)
    turn = (lambda a: a.T) if layout == "rows" else (lambda a: a)
    arguments = {"whiten": method, "center": center, "layout": layout, "reduction": reduction}
    wanted = Problem.from_data(turn(X), turn(Y), **arguments)
    batches = pieces(X, Y, random_sizes(rng, n_samples, 4))
    found = Problem.from_batches(((turn(x), turn(y)) for x, y in batches), **arguments)
    assert found.whitened == wanted.whitened
    assert (found.dim_in, found.dim_out, found.n_samples) == (wanted.dim_in, wanted.dim_out, n_samples)
    assert (found.loss_scale, found.reduction) == (wanted.loss_scale, reduction)
    np.testing.assert_array_equal(found.classes, wanted.classes)
    assert (found.inputs, found.outputs, found.labels) == (None, None, None)
    size = np.linalg.norm(X)
    allowed = 4 * tolerance(F64, n_samples * dim_in)
    assert abs(found.output_norm_squared - wanted.output_norm_squared) <= allowed * found.output_norm_squared
    length = np.sqrt(found.output_norm_squared)
    if method is None:
        if not found.whitened:
            assert np.linalg.norm(found.input_gram - wanted.input_gram) <= allowed * size**2
        assert np.linalg.norm(found.target - wanted.target) <= allowed * size * length
    else:
        # Rounding of T X, and of the axes of T where singular values are close: here 1 .. 10 or apart by
        # a centring that leaves them at random.
        assert found.whitening.rank == wanted.whitening.rank
        assert found.whitening.error <= 10 * condition * allowed
        T, R = found.whitening.matrix, wanted.whitening.matrix
        assert np.linalg.norm(T @ X - (T @ np.linalg.pinv(R)) @ R @ X) <= 1e3 * condition * allowed * (
            np.linalg.norm(T) * size
        )
    new = rng.standard_normal((dim_in, 3))
    assert found.transform(turn(new)).shape == wanted.transform(turn(new)).shape
    floor, other = found.loss_floor / found.loss_scale, wanted.loss_floor / found.loss_scale
    assert abs(floor - other) <= allowed * found.output_norm_squared


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_samples", [30, 500])
@pytest.mark.parametrize("condition", [1e2, 1e5])  # of X, the square of it of S
def test_whitening_from_sums_is_as_accurate_as_from_the_data(method, n_samples, condition):
    rng = np.random.default_rng(3)
    X, Y = (
        draw_matrix(rng, 20, n_samples, np.geomspace(condition, 1, 20)),
        rng.standard_normal((3, n_samples)),
    )
    wanted = Problem.from_data(X, Y, whiten=method)
    found = Problem.from_batches(pieces(X, Y, [11, n_samples - 11]), whiten=method)
    allowed = condition * np.finfo(F64).eps
    assert found.whitening.error < allowed
    Z = found.transform(X)
    assert np.linalg.norm(Z @ Z.T - np.eye(20)) / np.sqrt(20) < allowed
    assert found.whitening.condition_number == pytest.approx(condition**2, rel=1e-8)
    assert share(found.whitening.matrix, wanted.whitening.matrix) < allowed
    assert np.linalg.norm(found.target - wanted.target) < allowed * np.linalg.norm(Y)
    assert share(Z, wanted.transform(X)) < 4 * allowed


def test_the_rank_is_found_and_noise_is_refused():
    rng = np.random.default_rng(4)
    X, Y = draw_matrix(rng, 9, 60, [10.0, 5.0, 1e-2, 1e-9]), np.ones((1, 60))
    sums = SufficientStatistics().add_batches(pieces(X, Y, [20, 40]))
    for rank_tolerance in (None, 1e-2, 0.9):
        found = sums.problem(whiten="pca", rank_tolerance=rank_tolerance).whitening
        wanted = Problem.from_data(X, Y, whiten="pca", rank_tolerance=rank_tolerance).whitening
        assert found.rank == wanted.rank
        assert found.discarded == pytest.approx(wanted.discarded, rel=1e-9, abs=1e-15)
    flat = draw_matrix(rng, 40, 100, [1.0, 0.5])
    with pytest.raises(ValueError, match=r"rank_tolerance is 1.0e-12.* noise; wanted about 9.6e-07 or more"):
        Problem.from_batches([(flat, np.ones((1, 100)))], whiten="zca", rank_tolerance=1e-12)
    with pytest.raises(ValueError, match=r"X \(raw inputs\) is zero"):
        Problem.from_batches([(np.zeros((2, 5)), np.ones((1, 5)))], whiten="zca")


@pytest.mark.parametrize("make", [Problem.from_data, lambda X, Y, whiten: in_batches(X, Y, whiten=whiten)])
def test_outputs_that_are_fitted_exactly_are_not_refused(make):
    # ||Phi||^2 is ||Y||^2 up to the error of whitening, far above eps here.
    rng = np.random.default_rng(5)
    for _ in range(5):
        X = draw_matrix(rng, 10, 60, np.geomspace(3e5, 1, 10))
        assert make(X, rng.standard_normal((2, 10)) @ X, whiten="zca").loss_floor < 1e-10


@pytest.mark.parametrize("whiten", [None, "zca"])
def test_centring_subtracts_the_mean(whiten, tmp_path):
    rng = np.random.default_rng(6)
    X, Y = rng.standard_normal((4, 50)) + 3, rng.standard_normal((2, 50))
    plain = Problem.from_data(X - X.mean(axis=1, keepdims=True), Y, whiten=whiten)
    new = rng.standard_normal((4, 6))
    allowed = 4 * tolerance(F64, 50)
    for problem in (
        Problem.from_data(X, Y, whiten=whiten, center=True),
        Problem.from_batches(pieces(X, Y, [20, 30]), whiten=whiten, center=True),
    ):
        assert share(problem.input_mean, X.mean(axis=1)) < allowed
        assert share(problem.least_squares, plain.least_squares) < 10 * allowed
        assert problem.loss_floor == pytest.approx(plain.loss_floor, rel=1e-12)
        wanted = plain.transform(new - X.mean(axis=1, keepdims=True))
        assert share(problem.transform(new), wanted) < 10 * allowed
        if problem.inputs is not None:
            assert share(problem.inputs, plain.inputs) < 10 * allowed
        weights = dln.orthogonal([4, 4, 2], scale=0.1)
        run = dln.train(problem, weights, learning_rate=1e-2, steps=2)
        run.save(tmp_path / "run.npz")
        again = dln.load(tmp_path / "run.npz").problem
        np.testing.assert_array_equal(again.transform(new), problem.transform(new))
        assert again.describe() == problem.describe()


@pytest.mark.parametrize("distance", [1e2, 1e4])
def test_centring_sums_does_not_cancel(distance):
    # A plain X X^T - N m m^T would lose distance^2 eps: all digits at 1e8, the ones below 1e-8 at 1e4.
    rng = np.random.default_rng(7)
    X, Y = rng.standard_normal((5, 300)) + distance, rng.standard_normal((2, 300))
    found = Problem.from_batches(pieces(X, Y, [100, 200]), center=True, whiten="zca")
    exact = X - distance  # without rounding
    centred = exact - exact.mean(axis=1, keepdims=True)
    assert share(found.whitening.matrix, Problem.from_data(centred, Y, whiten="zca").whitening.matrix) < 1e-12
    white = found.whitening.matrix @ centred
    assert np.linalg.norm(white @ white.T - np.eye(5)) < 1e-12


def test_a_mean_far_beyond_the_spread_is_refused():
    X = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0 + 1e-12]])
    for inputs in (X, np.full((2, 3), 0.1)):
        sums = SufficientStatistics().add(inputs, np.ones((1, 3)))
        with pytest.raises(ValueError, match="subtract a vector near the mean from every batch"):
            sums.problem(center=True)


def test_white_data_are_recognised():
    rng = np.random.default_rng(8)
    X, Y = draw_orthonormal(rng, 40, 6).T, rng.standard_normal((2, 40))
    found = Problem.from_batches(pieces(X, Y, [10, 30]))
    assert found.whitened
    assert found.whitening.method is None


def test_later_batches_do_not_change_a_problem():
    rng = np.random.default_rng(9)
    X, Y = rng.standard_normal((3, 20)), rng.standard_normal((2, 20))
    sums = SufficientStatistics().add(X, Y)
    problem = sums.problem()
    before = problem.input_gram.copy(), problem.target.copy()
    sums.add(X, Y)
    np.testing.assert_array_equal(problem.input_gram, before[0])
    np.testing.assert_array_equal(problem.target, before[1])
    run = dln.train(problem, dln.orthogonal([3, 3, 2], scale=0.5), learning_rate=0.01, steps=3)
    assert run.loss[-1] < run.loss[0]


# ----------------------------------------------------------------------------------------- what batches are


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float64])
def test_batches_of_any_kind_are_read(dtype, tmp_path):
    rng = np.random.default_rng(10)
    X, labels = rng.integers(0, 200, (60, 5)).astype(dtype), rng.integers(0, 3, 60)
    wanted = SufficientStatistics("rows").add(X, labels)
    stored = np.memmap(tmp_path / "X", dtype=dtype, mode="w+", shape=X.shape)
    stored[:] = X
    stored.flush()
    mapped = np.memmap(tmp_path / "X", dtype=dtype, mode="r", shape=X.shape)
    halves = [(slice(0, 1), labels[:1]), (slice(1, 1), labels[:0]), (slice(1, 60), labels[1:])]
    for source in (X, mapped, X.tolist(), np.asfortranarray(X)):
        found = SufficientStatistics("rows")
        for part, Y in halves:
            if isinstance(source, list) and not len(Y):
                continue  # an empty list has no second dimension
            found.add(source[part], Y)
        assert [s.tolist() for s in rounded(found)] == [s.tolist() for s in rounded(wanted)]


def test_batches_of_tensors_are_read():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    rng = np.random.default_rng(11)
    X, labels = rng.standard_normal((30, 4)).astype(np.float32), rng.integers(0, 3, 30)
    data = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(labels))
    found = Problem.from_batches(torch.utils.data.DataLoader(data, batch_size=7), layout="rows")
    assert share(found.target, Problem.from_data(X, labels, layout="rows").target) < tolerance(F64, 30)
    found = Problem.from_batches([(torch.ones(4, 2, requires_grad=True), torch.ones(1, 2))])
    np.testing.assert_array_equal(found.target, np.full((1, 4), 2.0))


def test_a_problem_without_samples_is_refused():
    sums = SufficientStatistics()
    for X, Y in ((np.ones((3, 0)), np.ones((2, 0))), (np.ones((3, 0)), np.array([]))):
        assert sums.add(X, Y).n_samples == 0
    with pytest.raises(ValueError, match="there are no samples"):
        sums.problem()
    with pytest.raises(ValueError, match="there are no samples"):
        Problem.from_batches([])
    assert repr(sums) == "SufficientStatistics(0 samples, layout='columns')"


def test_empty_batches_change_nothing():
    sums = SufficientStatistics()
    sums.add(np.ones((3, 1)), np.ones((2, 1)))
    before = numbers(sums)
    assert numbers(sums.add(np.ones((3, 0)), np.ones((2, 0)))) == before
    assert numbers(sums.merge(SufficientStatistics())) == before


X3, Y3 = np.ones((3, 4)), np.ones((2, 4))
BAD_BATCHES = [
    ((np.ones((4, 4)), Y3), ShapeError, r"X \(raw inputs\) has dimension 4; wanted 3, as before"),
    ((X3, np.ones((1, 4))), ShapeError, r"Y \(targets\) has dimension 1; wanted 2, as before"),
    ((X3, np.arange(4)), TypeError, r"Y \(targets\) are labels, a vector; wanted targets, a matrix"),
    ((X3, np.ones((2, 5))), ShapeError, "X has 4 samples and Y has 5"),
    ((np.ones(3), Y3), ShapeError, r"X \(raw inputs\) has shape \(3,\); wanted a matrix"),
    ((np.ones((0, 4)), Y3), ShapeError, "X .*empty"),
    ((np.ones((4, 0)), np.ones((2, 0))), ShapeError, "X .*dimension 4; wanted 3"),
    ((np.ones((3, 0)), np.ones((1, 0))), ShapeError, "Y .*dimension 1; wanted 2"),
    ((np.ones((3, 0)), np.ones((2, 1))), ShapeError, r"X has 0 samples and Y has shape \(2, 1\)"),
    ((np.full((3, 4), np.nan), Y3), ValueError, "X has a value that is not finite: nan in component 0 of"),
    ((X3, np.full((2, 4), np.inf)), ValueError, "Y has a value that is not finite: inf"),
    ((np.full((3, 4), 1e200), Y3), ValueError, r"X is too large: X X\^T overflows"),
    ((X3, np.full((2, 4), 1e200)), ValueError, r"Y is too large: \|\|Y\|\|\^2 overflows"),
    ((X3.astype(np.float16), Y3), TypeError, "X .*float16"),
    ((X3.astype(complex), Y3), TypeError, "X .*complex"),
    (([[1.0, 2.0], [3.0]], Y3), ShapeError, "X .*rectangular"),
    (X3, TypeError, "batch 1 is ndarray; wanted a pair"),
    (None, TypeError, "batch 1 is NoneType; wanted a pair"),
]


@pytest.mark.parametrize(("batch", "error", "message"), BAD_BATCHES)
def test_bad_batches_raise_an_error_that_names_them_and_change_nothing(batch, error, message):
    sums = SufficientStatistics()
    good = np.random.default_rng(12).standard_normal((5, 4))
    wanted = numbers(SufficientStatistics().add(good[:3], good[3:]))
    with pytest.raises(error, match=message) as caught:
        sums.add_batches([(good[:3], good[3:]), batch, (good[:3], good[3:])])
    assert str(caught.value).startswith("batch 1")
    assert numbers(sums) == wanted


def test_a_bad_value_in_a_late_chunk_changes_nothing():
    X = np.ones((2, 5000))
    X[1, 4321] = np.nan
    sums = SufficientStatistics().add(X[:, :10], np.arange(10) % 2)
    before = numbers(sums)
    with pytest.raises(ValueError, match="nan in component 1 of sample 4321"):
        sums.add(X, np.arange(5000) % 7)
    assert numbers(sums) == before
    big = SufficientStatistics().add(np.full((1, 1), 1.2e154), [0])
    before = numbers(big)
    with pytest.raises(ValueError, match="X is too large"):
        big.merge(big)
    assert numbers(big) == before


def test_statistics_that_do_not_fit_are_not_merged():
    sums = SufficientStatistics().add(X3, Y3)
    with pytest.raises(TypeError, match="other is Problem; wanted SufficientStatistics"):
        sums.merge(sums.problem())
    with pytest.raises(TypeError, match="unsupported operand"):
        sums + 1
    with pytest.raises(ValueError, match="other has layout 'rows'; wanted 'columns'"):
        sums.merge(SufficientStatistics("rows"))
    with pytest.raises(ShapeError, match=r"other \(inputs\) has dimension 4; wanted 3"):
        sums.merge(SufficientStatistics().add(np.ones((4, 2)), np.ones((2, 2))))
    with pytest.raises(TypeError, match=r"other \(targets\) are labels"):
        sums.merge(SufficientStatistics().add(X3, np.arange(4)))


def test_an_error_names_an_unknown_layout():
    with pytest.raises(ValueError, match="layout is 'row'"):
        SufficientStatistics("row")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"whiten": "svd"}, "whiten is 'svd'"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"layout": "row"}, "layout is 'row'"),
        ({"rank_tolerance": 1e-3}, "whiten is None"),
        ({"whiten": "zca", "rank_tolerance": 1.0}, r"rank_tolerance .* is 1; wanted a number in \[0, 1\)"),
    ],
)
def test_settings_are_checked_before_the_data_are_read(arguments, message):
    batches = iter([(X3, Y3)])
    with pytest.raises(ValueError, match=message):
        Problem.from_batches(batches, **arguments)
    assert next(batches)[0] is X3
    if "layout" not in arguments:
        with pytest.raises(ValueError, match=message):
            SufficientStatistics().add(X3, Y3).problem(**arguments)


# -------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("labelled", [True, False])
def test_files_and_copies_are_equal_bit_for_bit(labelled, tmp_path):
    rng = np.random.default_rng(13)
    X, Y = rng.standard_normal((4, 30)), rng.standard_normal((2, 30))
    if labelled:
        Y = rng.integers(0, 5, 30)
    batches = list(pieces(X, Y, [5, 10, 15]))
    whole = SufficientStatistics().add_batches(batches)
    first_part = SufficientStatistics().add_batches(batches[:2])
    first_part.save(tmp_path / "sums.npz")
    again = SufficientStatistics.load(tmp_path / "sums.npz")
    assert numbers(again) == numbers(first_part)
    assert numbers(again.add(*batches[2])) == numbers(whole)
    assert numbers(pickle.loads(pickle.dumps(whole))) == numbers(whole)  # as when sent to another process
    with np.load(tmp_path / "sums.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
    SufficientStatistics("rows").save(tmp_path / "empty.npz")
    empty = SufficientStatistics.load(tmp_path / "empty.npz")
    assert (empty.n_samples, empty.layout) == (0, "rows")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.npz", "sums.npz"]


def test_errors_name_damaged_files(tmp_path):
    path = tmp_path / "sums.npz"
    SufficientStatistics().add(X3, Y3 / 3).save(path)
    content = path.read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.npz").write_text("nothing")
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays["meta"]))
    del meta["digest"]  # as in files of 0.1.0; with it every change is seen at once
    arrays["meta"] = np.array(json.dumps(meta))
    np.savez(tmp_path / "shape.npz", **{**arrays, "input_gram": np.ones((2, 2))})
    np.savez(tmp_path / "value.npz", **{**arrays, "target": np.full((2, 3), np.nan)})
    np.savez(tmp_path / "lacks.npz", **{k: v for k, v in arrays.items() if k != "output_sum"})
    dln.train(Problem(np.eye(2)), [np.eye(2)], learning_rate=0.1, steps=1).save(tmp_path / "run.npz")
    messages = {
        "half": "not a complete file of a dlnfast statistics",
        "text": "not an .npz file",
        "other": "other arrays",
        "shape": r"input_gram is float64 of shape \(2, 2\)",
        "value": "target has values that are not finite",
        "lacks": "it lacks 'output_sum'",
        "run": "its format is 'dlnfast trajectory'",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            SufficientStatistics.load(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError):
        SufficientStatistics.load(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        SufficientStatistics().save(tmp_path / "none" / "sums.npz")


def test_specifications_accept_shards(tmp_path):
    rng = np.random.default_rng(14)
    X, labels = rng.integers(0, 256, (4, 60), np.uint8), rng.integers(0, 3, 60)
    for index, (inputs, outputs) in enumerate(pieces(X, labels, [10, 25, 25])):
        np.savez(tmp_path / f"shard-{index}.npz", X=inputs, Y=outputs)
    text = '[problem]\nkind = "npz-shards"\npath = "{}"\nwhiten = "zca"\ncenter = true\n'
    other_sections = "[weights]\ndepth = 2\n[train]\nlearning_rate = 0.1\nsteps = 1\n"
    file = tmp_path / "spec.toml"
    file.write_text(text.format("shard-*.npz") + other_sections)
    problem, samples = spec.make_problem(spec.read_spec(file))
    assert samples == {}
    wanted = Problem.from_data(X, labels, whiten="zca", center=True)
    assert share(problem.target, wanted.target) < 1e-13
    np.testing.assert_array_equal(problem.input_mean, wanted.input_mean)
    file.write_text(text.format("none-*.npz") + other_sections)
    with pytest.raises(spec.SpecError, match="which no file matches"):
        spec.make_problem(spec.read_spec(file))


# ------------------------------------------------------------------------------------------ at larger sizes


def test_dask_computes_the_sums_of_an_array():
    dask = pytest.importorskip("dask", reason="needs dask")
    array = pytest.importorskip("dask.array", reason="needs dask")
    rng = np.random.default_rng(15)
    X, Y = rng.standard_normal((500, 6)), rng.standard_normal((500, 2))
    inputs, outputs = (array.from_array(a, chunks=(37, -1)) for a in (X, Y))

    @dask.delayed
    def summed(x, y):
        return SufficientStatistics(layout="rows").add(x, y)

    blocks = zip(inputs.to_delayed().ravel(), outputs.to_delayed().ravel(), strict=True)
    total = reduce(operator.add, [summed(x, y) for x, y in blocks])
    for scheduler in ("synchronous", "threads"):
        found = total.compute(scheduler=scheduler).problem(whiten="zca")
        wanted = Problem.from_data(X, Y, whiten="zca", layout="rows")
        assert share(found.target, wanted.target) < 4 * tolerance(F64, 500)


@pytest.fixture(scope="module")
def fashion():
    folder = find_data_folder("fashion_mnist_full.npz")
    return dln.load_fashion_mnist(folder)


@pytest.mark.parametrize("real", [False, True])
def test_fashion_mnist_in_a_hundred_pieces(fashion, real):
    images, labels = fashion
    if real:  # a part of it, in numbers that no sum adds exactly
        images, labels = images[::10] / 255, labels[::10]
    wanted = Problem.from_data(images, labels, layout="rows")
    rng = np.random.default_rng(16)
    sizes = random_sizes(rng, len(images), 100)
    parts = [SufficientStatistics("rows").add(x.T, y) for x, y in pieces(images.T, labels, sizes)]
    first = merged_at_random(rng, parts)
    for _ in range(1 if real else 2):
        other = merged_at_random(rng, [parts[i] for i in rng.permutation(100)])
        for one, another in zip(rounded(other), rounded(first), strict=True):
            assert share(one, another) < 1e-16
    found = first.problem()
    allowed = 0 if not real else 1e-15
    assert share(found.input_gram, wanted.input_gram) <= allowed
    assert share(found.target, wanted.target) <= allowed
    assert found.output_norm_squared == wanted.output_norm_squared
    if not real:
        return
    white = first.problem(whiten="zca")
    direct = Problem.from_data(images, labels, whiten="zca", layout="rows")
    print(f"whitened target: {share(white.target, direct.target):.1e}; {white.whitening}; {direct.whitening}")
    # cond(X) = 2.5e5: rounding of T X in `direct` is 6e-11 at most, and most of it averages out.
    assert share(white.target, direct.target) < 2e-12
    assert white.whitening.rank == direct.whitening.rank
    assert white.whitening.error < 1e-12


_STREAM = r"""
import re
from pathlib import Path
import numpy as np
from dlnfast import SufficientStatistics

def peak():  # MB; what getrusage says includes the process that started this one
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def batches(n):
    generator = np.random.default_rng(0)
    for _ in range(n):
        yield generator.random((32, 80_000)), generator.random((4, 80_000))

sums = SufficientStatistics().add_batches(batches(10))
few = peak()
sums.add_batches(batches(90))
print(few, peak(), sums.n_samples)
"""


def test_memory_does_not_grow_with_the_stream(run_python):
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc/self/status, which says how much memory a process took at most")
    # 100 batches of 23 MB: 2.3 GB in all.
    few, many, n_samples = map(float, run_python(_STREAM, timeout=300).split())
    print(f"peak {few:.0f} MB after 10 batches, {many:.0f} MB after 100")
    assert n_samples == 8_000_000
    assert many - few < 30
    assert many < 500
