# SPDX-License-Identifier: MIT
"""Entries and measurements of a matrix in the compiled core: against NumPy, and with bad arguments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.core_calls import dense_arguments, freeze, identity_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

F64 = np.float64
SIZES = st.sampled_from([0, 1, 2, 3, 5, 7, 13, 16, 17, 31, 64, 97])
RANKS = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 9, 10, 16, 17, 20, 31, 33, 64, 65, 70])
DENSITIES = st.sampled_from([0.0, 0.1, 0.5, 1.0])
DTYPES = st.sampled_from([np.float32, F64])
THREADS = st.sampled_from([1, 2, 7])
SEEDS = st.integers(0, 10**6)


def entries_of(core, mask, values):
    """Return ((start, index, values), the same by columns), sorted by the core from a random order."""
    rows, columns = (indices.astype(np.int64) for indices in np.nonzero(mask))
    order = np.random.default_rng(0).permutation(len(rows))
    rows, columns = rows[order], columns[order]
    (m, n), size = mask.shape, len(rows)
    by_rows = np.full(m + 1, -1), np.full(size, -1, np.int32), np.full(size, np.nan, values.dtype)
    assert core.sort_entries(rows, columns, values[rows, columns], m, n, *by_rows) == -1
    by_columns = np.full(n + 1, -1), np.full(size, -1, np.int32), np.full(size, np.nan, values.dtype)
    core.transpose_entries(by_rows, n, *by_columns)
    return by_rows, by_columns


def random_entries(core, rng, m, n, density, dtype):
    mask = rng.random((m, n)) < density
    if 0 < density < 1:  # full rows and columns, and empty ones
        mask[: m // 5], mask[:, : n // 5] = True, True
        mask[m - m // 5 :], mask[:, n - n // 5 :] = False, False
    values = rng.standard_normal((m, n)).astype(dtype)
    return mask, values, entries_of(core, mask, values)


# Sorting.


@settings(deadline=None, max_examples=40)
@given(m=SIZES, n=SIZES, density=DENSITIES, dtype=DTYPES, seed=SEEDS)
def test_entries_are_sorted_in_both_orders(core, m, n, density, dtype, seed):
    mask, values, orders = random_entries(core, np.random.default_rng(seed), m, n, density, dtype)
    for (start, index, known), observed, all_values in zip(
        orders, (mask, mask.T), (values, values.T), strict=True
    ):
        assert start.tolist() == [0, *np.cumsum(observed.sum(axis=1))]
        assert index.tolist() == np.nonzero(observed)[1].tolist()
        np.testing.assert_array_equal(known, all_values[observed])


@settings(deadline=None, max_examples=40)
@given(data=st.data(), dtype=DTYPES)
def test_the_error_names_the_first_bad_entry(core, data, dtype):
    index_pairs = st.tuples(st.integers(-1, 4), st.integers(-1, 5))
    drawn_pairs = data.draw(st.lists(index_pairs, max_size=12))
    wanted, seen = -1, set()
    for at, (i, j) in enumerate(drawn_pairs):
        if not (0 <= i < 4 and 0 <= j < 5) or (i, j) in seen:
            wanted = at
            break
        seen.add((i, j))
    row, col = (np.array([pair[axis] for pair in drawn_pairs], np.int64) for axis in (0, 1))
    n = len(row)
    out = np.zeros(5, np.int64), np.zeros(n, np.int32), np.zeros(n, dtype)
    assert core.sort_entries(row, col, np.ones(n, dtype), 4, 5, *out) == wanted


# Products with the residual.


def assert_residual_products(core, mask, values, entries, x, y, n_threads):
    dtype, k = x.dtype, len(x)
    wide_x, wide_y, wide_values = (array.astype(F64) for array in (x, y, values))
    error = np.where(mask, wide_x.T @ wide_y - wide_values, 0.0)
    # Each entry of E is off by rounding of what it is a difference of.
    size = np.where(mask, np.linalg.norm(wide_x, axis=0)[:, None] * np.linalg.norm(wide_y, axis=0), 0.0)
    size = np.linalg.norm(size) + np.linalg.norm(np.where(mask, wide_values, 0.0))
    allowed = tolerance(dtype, k + max(*mask.shape, 1))
    results = []
    for want_left, want_right in ((True, True), (True, False), (False, True), (False, False)):
        left, right = np.full(x.shape, np.nan, dtype), np.full(y.shape, np.nan, dtype)
        loss = core.residual_products(
            entries, x, y, left if want_left else None, right if want_right else None, n_threads
        )
        results.append((loss, left, right))
    loss, left, right = results[0]
    assert abs(loss - np.sum(error**2)) <= allowed * size**2
    assert np.linalg.norm(left - wide_y @ error.T) <= allowed * size * np.linalg.norm(wide_y)
    assert np.linalg.norm(right - wide_x @ error) <= allowed * size * np.linalg.norm(wide_x)
    # A result does not depend on the other outputs or on the number of threads.
    for other in results:
        assert other[0] == loss
    np.testing.assert_array_equal(results[1][1], left)
    np.testing.assert_array_equal(results[2][2], right)
    alone_left, alone_right = np.empty_like(left), np.empty_like(right)
    assert core.residual_products(entries, x, y, alone_left, alone_right, 1) == loss
    np.testing.assert_array_equal(alone_left, left)
    np.testing.assert_array_equal(alone_right, right)


@settings(deadline=None, max_examples=60)
@given(m=SIZES, n=SIZES, k=RANKS, density=DENSITIES, dtype=DTYPES, n_threads=THREADS, seed=SEEDS)
def test_residual_products_equal_numpy(core, m, n, k, density, dtype, n_threads, seed):
    rng = np.random.default_rng(seed)
    mask, values, entries = random_entries(core, rng, m, n, density, dtype)
    x, y = rng.standard_normal((k, m)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
    assert_residual_products(core, mask, values, entries, x, y, n_threads)


@settings(deadline=None, max_examples=20)
@given(m=SIZES, n=SIZES, k=RANKS, density=DENSITIES, dtype=DTYPES, n_threads=THREADS, seed=SEEDS)
def test_residual_products_of_a_zero_factor_equal_numpy(core, m, n, k, density, dtype, n_threads, seed):
    """Inner products with zeros are not computed."""
    rng = np.random.default_rng(seed)
    mask, values, entries = random_entries(core, rng, m, n, density, dtype)
    x, y = np.zeros((k, m), dtype), rng.standard_normal((k, n)).astype(dtype)
    assert_residual_products(core, mask, values, entries, x, y, n_threads)


def test_an_infinite_factor_beside_a_zero_factor_stays_visible(core):
    entries = by_rows(), by_columns()
    y = np.full((2, 4), np.inf)
    assert np.isnan(core.residual_products(entries, np.zeros((2, 3)), y, np.zeros((2, 3)), None))


@pytest.mark.parametrize("dtype", [np.float32, F64])
@pytest.mark.parametrize("n_threads", [1, 2, 7])
@pytest.mark.parametrize("shape", [(600, 800, 9), (2, 9000, 20), (9000, 2, 20), (500, 3000, 40)])
def test_residual_products_of_many_chunks_equal_numpy(core, shape, dtype, n_threads):
    rng = np.random.default_rng(0)
    m, n, k = shape
    mask, values, entries = random_entries(core, rng, m, n, 0.1, dtype)
    x, y = rng.standard_normal((k, m)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
    assert_residual_products(core, mask, values, entries, x, y, n_threads)


# The residual as a whole.


@settings(deadline=None, max_examples=40)
@given(m=SIZES, n=SIZES, density=DENSITIES, dtype=DTYPES, n_threads=THREADS, seed=SEEDS)
def test_masked_residuals_equal_numpy(core, m, n, density, dtype, n_threads, seed):
    rng = np.random.default_rng(seed)
    mask, values, entries = random_entries(core, rng, m, n, density, dtype)
    w, error = rng.standard_normal((m, n)).astype(dtype), np.full((m, n), np.nan, dtype)
    loss = core.masked_residual(entries, w, error, n_threads)
    # One subtraction each, rounded alike.
    np.testing.assert_array_equal(error, np.where(mask, w - values, dtype(0)))
    assert abs(loss - np.sum(error.astype(F64) ** 2)) <= tolerance(F64, max(m * n, 1)) * loss
    assert core.masked_residual(entries, w, error, 1) == loss


MEASURED = [(0, 3, 4), (1, 3, 4), (9, 5, 7), (40, 13, 17), (4, 0, 3), (300, 40, 50), (3, 300, 301)]


@pytest.mark.parametrize("dtype", [np.float32, F64])
@pytest.mark.parametrize("n_threads", [1, 2, 7])
@pytest.mark.parametrize("shape", MEASURED)
def test_measured_residuals_equal_numpy(core, shape, dtype, n_threads):
    rng = np.random.default_rng(1)
    q, m, n = shape
    b, values = rng.standard_normal((q, m * n)).astype(dtype), rng.standard_normal(q).astype(dtype)
    w, error = rng.standard_normal((m, n)).astype(dtype), np.full((m, n), np.nan, dtype)
    loss = core.measured_residual((b, values), w, error, n_threads)
    wide = b.astype(F64)
    r = wide @ w.astype(F64).ravel() - values
    size = np.linalg.norm(wide) * np.linalg.norm(w) + np.linalg.norm(values)
    allowed = tolerance(dtype, max(m * n + q, 1))
    assert abs(loss - np.sum(r**2)) <= allowed * size**2
    assert np.linalg.norm(error.ravel() - wide.T @ r) <= allowed * size * np.linalg.norm(wide)
    alone = np.empty_like(error)
    assert core.measured_residual((b, values), w, alone, 1) == loss
    np.testing.assert_array_equal(alone, error)


# Bad arguments: they raise, they never crash.


def integers(*values, dtype=np.int64):
    return np.array(values, dtype)


def by_rows(**changes):
    """Return four entries of a 3 x 4 matrix."""
    parts = {
        "start": integers(0, 2, 2, 4),
        "index": integers(0, 2, 1, 3, dtype=np.int32),
        "values": np.ones(4),
    }
    return tuple({**parts, **changes}.values())


def by_columns(**changes):
    parts = {
        "start": integers(0, 1, 2, 3, 4),
        "index": integers(0, 2, 0, 2, dtype=np.int32),
        "values": np.ones(4),
    }
    return tuple({**parts, **changes}.values())


def sort_entries(core, **changes):
    arguments = {
        "row": integers(0, 2, 1),
        "col": integers(1, 3, 0),
        "value": np.ones(3),
        "rows": 3,
        "cols": 4,
        "start": np.zeros(4, np.int64),
        "index": np.zeros(3, np.int32),
        "values": np.zeros(3),
    }
    return core.sort_entries(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"row": np.zeros(3, np.int32)}, TypeError, "row has dtype int32; wanted int64"),
        ({"col": np.zeros(3)}, TypeError, "col has dtype float64; wanted int64"),
        ({"value": np.zeros(3, int)}, TypeError, "value has dtype int64; wanted float64"),
        ({"value": np.ones(3, np.float32)}, TypeError, "values has dtype float64; wanted float32"),
        ({"values": np.ones(3, np.float32)}, TypeError, "values has dtype float32; wanted float64"),
        ({"start": np.zeros(4, np.int32)}, TypeError, "start has dtype int32"),
        ({"index": np.zeros(3, np.int64)}, TypeError, "index has dtype int64; wanted int32"),
        ({"row": integers(0, 1)}, ValueError, "col has 3 values; wanted 2"),
        ({"col": integers(0, 1)}, ValueError, "col has 2 values; wanted 3"),
        ({"value": np.ones(4)}, ValueError, "value has 4 values; wanted 3"),
        ({"row": np.zeros((3, 1), np.int64)}, ValueError, "row has 2 axes"),
        ({"row": np.zeros(6, np.int64)[::2]}, TypeError, "row is not C-contiguous"),
        ({"values": np.zeros(6)[::2]}, TypeError, "values is not C-contiguous"),
        ({"start": np.zeros(3, np.int64)}, ValueError, "start has the wrong shape"),
        ({"index": np.zeros(2, np.int32)}, ValueError, "index has the wrong shape"),
        ({"values": np.zeros(2)}, ValueError, "values has the wrong shape"),
        ({"start": freeze(np.zeros(4, np.int64))}, ValueError, "start is read-only"),
        ({"index": freeze(np.zeros(3, np.int32))}, ValueError, "index is read-only"),
        ({"values": freeze(np.zeros(3))}, ValueError, "values is read-only"),
        ({"rows": -1}, ValueError, "rows is -1"),
        ({"cols": -1}, ValueError, "cols is -1"),
        ({"rows": 2**31}, ValueError, "rows is 2147483648"),
        ({"rows": 2**63 - 1}, ValueError, "rows is 9223372036854775807"),
        ({"cols": 2**31}, ValueError, "cols is 2147483648"),
        ({"rows": 2**70}, TypeError, "rows is 1180591620717411303424; wanted an integer of 64 bits"),
        ({"row": None}, TypeError, "row is not a NumPy array"),
        ({"values": [0.0] * 3}, TypeError, "values is not a NumPy array"),
    ],
)
def test_errors_of_sort_entries_name_bad_arguments(core, changes, error, text):
    assert sort_entries(core) == -1
    with pytest.raises(error, match=text):
        sort_entries(core, **changes)


# Damage to entries, in either order.
DAMAGE = [
    ({"start": np.zeros(4, np.int32)}, TypeError, "dtype int32; wanted int64"),
    ({"index": np.zeros(4, np.int64)}, TypeError, "dtype int64; wanted int32"),
    ({"values": np.ones(4, np.float32)}, TypeError, "dtype float32; wanted float64"),
    ({"values": np.ones(4, int)}, TypeError, "dtype int64; wanted float64"),
    ({"values": np.ones(3)}, ValueError, "3 values; wanted 4"),
    ({"values": np.ones(8)[::2]}, TypeError, "not C-contiguous"),
    ({"values": np.ones((4, 1))}, ValueError, "2 axes"),
    ({"start": integers()}, ValueError, "is empty"),
    ({"start": None}, TypeError, "not a NumPy array"),
    ({"index": [0, 1, 2, 3]}, TypeError, "not a NumPy array"),
    ({"index": integers(0, 2, 4, 3, dtype=np.int32)}, ValueError, "an index outside the matrix"),
    ({"index": integers(0, 2, -1, 3, dtype=np.int32)}, ValueError, "an index outside the matrix"),
    ({"index": integers(0, 2, 2**31 - 1, 3, dtype=np.int32)}, ValueError, "an index outside the matrix"),
]
ROW_DAMAGE = [
    ({"start": integers(*start)}, ValueError, "starts that do not ascend")
    for start in (
        (1, 2, 2, 4),
        (-1, 2, 2, 4),
        (0, 3, 2, 4),
        (0, 2, 2, 5),
        (0, 2, 2, 3),
        (0, 2, -(2**63), 4),
        (0, 2**63 - 1, 2, 4),
        (0, 5, 5, 4),
    )
]


def transpose_entries(core, entries, **changes):
    arguments = {
        "cols": 4,
        "start": np.zeros(5, np.int64),
        "index": np.zeros(4, np.int32),
        "values": np.zeros(4),
    }
    return core.transpose_entries(entries, **{**arguments, **changes})


@pytest.mark.parametrize(("changes", "error", "text"), DAMAGE + ROW_DAMAGE)
def test_transposing_damaged_entries_is_an_error(core, changes, error, text):
    with pytest.raises(error, match=text):
        transpose_entries(core, by_rows(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"cols": 3}, ValueError, "an index outside the matrix"),
        ({"cols": 0}, ValueError, "an index outside the matrix"),
        ({"cols": 5}, ValueError, "start has the wrong shape"),
        ({"cols": -1}, ValueError, "cols is -1"),
        ({"cols": 2**63 - 1}, ValueError, "cols is 9223372036854775807"),
        ({"start": np.zeros(5, np.int32)}, TypeError, "start has dtype int32"),
        ({"start": np.zeros(4, np.int64)}, ValueError, "start has the wrong shape"),
        ({"index": np.zeros(3, np.int32)}, ValueError, "index has the wrong shape"),
        ({"values": np.zeros(3)}, ValueError, "values has the wrong shape"),
        ({"values": np.zeros(4, np.float32)}, TypeError, r"by_rows\[2\] has dtype float64"),
        ({"values": freeze(np.zeros(4))}, ValueError, "values is read-only"),
        ({"start": freeze(np.zeros(5, np.int64))}, ValueError, "start is read-only"),
    ],
)
def test_errors_of_transpose_entries_name_bad_arguments(core, changes, error, text):
    transpose_entries(core, by_rows())
    with pytest.raises(error, match=text):
        transpose_entries(core, by_rows(), **changes)


ORDERS = [
    (None, TypeError, None),
    ((by_rows(),), ValueError, r"not \(by_rows, by_columns\)"),
    ((by_rows(), by_columns(), by_rows()), ValueError, r"not \(by_rows, by_columns\)"),
    ((by_rows(), None), TypeError, r"observed\[1\] is not \(start, index, values\)"),
    ((by_rows(), list(by_columns())), TypeError, r"observed\[1\] is not \(start, index, values\)"),
    (((array for array in by_rows()), by_columns()), TypeError, r"observed\[0\] is not \(start, index"),
    ((by_rows()[:2], by_columns()), ValueError, r"observed\[0\] is not \(start, index, values\)"),
    ((by_rows(), by_rows()), ValueError, "an index outside the matrix|an entry"),
    ((by_columns(), by_rows()), ValueError, None),
    (
        (by_rows(start=integers(0, 2, 2, 3), index=by_rows()[1][:3], values=np.ones(3)), by_columns()),
        ValueError,
        "entries by columns has 4 values; wanted 3",
    ),
]
ORDERS += [((by_rows(**changes), by_columns()), *how) for changes, *how in DAMAGE + ROW_DAMAGE]
ORDERS += [((by_rows(), by_columns(**changes)), *how) for changes, *how in DAMAGE]


@pytest.mark.parametrize(("observed", "error", "text"), ORDERS)
def test_errors_name_damaged_entries(core, observed, error, text):
    x, y = np.ones((2, 3)), np.ones((2, 4))
    with pytest.raises(error, match=text):
        core.residual_products(observed, x, y, np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(error, match=text):
        core.masked_residual(observed, np.ones((3, 4)), np.zeros((3, 4)))


def residual_products(core, **changes):
    arguments = {
        "observed": (by_rows(), by_columns()),
        "x": np.ones((2, 3)),
        "y": np.ones((2, 4)),
        "left": np.zeros((2, 3)),
        "right": np.zeros((2, 4)),
    }
    return core.residual_products(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"x": np.ones((2, 4))}, ValueError, "left factor has shape"),
        ({"y": np.ones((2, 3))}, ValueError, "right factor has shape"),
        ({"y": np.ones((3, 4))}, ValueError, "right factor has shape"),
        ({"left": np.ones((2, 4))}, ValueError, "product with the right factor has shape"),
        ({"right": np.ones((2, 3))}, ValueError, "product with the left factor has shape"),
        ({"left": np.ones((3, 2)).T}, TypeError, "left is not C-contiguous"),
        ({"right": np.asfortranarray(np.ones((2, 4)))}, TypeError, "right is not C-contiguous"),
        ({"x": np.asfortranarray(np.ones((2, 3)))}, TypeError, "x is not C-contiguous"),
        ({"y": np.ones((4, 4))[::2]}, TypeError, "y is not C-contiguous"),
        ({"left": freeze(np.zeros((2, 3)))}, ValueError, "left is read-only"),
        ({"right": freeze(np.zeros((2, 4)))}, ValueError, "right is read-only"),
        ({"x": np.ones((2, 3), np.float32)}, TypeError, "dtype float64; wanted float32"),
        ({"y": np.ones((2, 4), np.float32)}, TypeError, "y has dtype float32"),
        ({"left": np.ones((2, 3), np.float32)}, TypeError, "left has dtype float32"),
        ({"x": np.ones(3)}, ValueError, "x has 1 axes"),
        ({"left": np.ones(3)}, ValueError, "left has 1 axes"),
        ({"right": [[0.0]]}, TypeError, "right is not a NumPy array"),
        ({"x": None}, TypeError, "x is not a NumPy array"),
        ({"n_threads": 2**40}, TypeError, "n_threads is 1099511627776; wanted an integer of 32 bits"),
    ],
)
def test_errors_of_residual_products_name_bad_arguments(core, changes, error, text):
    residual_products(core)
    with pytest.raises(error, match=text):
        residual_products(core, **changes)


@pytest.mark.parametrize(
    ("m", "out", "error", "text"),
    [
        (np.ones((4, 3)), np.zeros((3, 4)), ValueError, "the matrix has shape"),
        (np.ones((3, 4)), np.zeros((4, 3)), ValueError, "the residual has shape"),
        (np.ones((3, 4)), np.zeros((3, 4), np.float32), TypeError, "error has dtype float32"),
        (np.ones((3, 4), np.float32), np.zeros((3, 4)), TypeError, "wanted float32"),
        (np.ones((3, 4)), freeze(np.zeros((3, 4))), ValueError, "error is read-only"),
        (np.asfortranarray(np.ones((3, 4))), np.zeros((3, 4)), TypeError, "m is not C-contiguous"),
        (np.ones((3, 4)), np.zeros((4, 3)).T, TypeError, "error is not C-contiguous"),
        (np.ones(4), np.zeros((3, 4)), ValueError, "m has 1 axes"),
        (None, np.zeros((3, 4)), TypeError, "m is not a NumPy array"),
    ],
)
def test_errors_of_residuals_name_bad_arguments(core, m, out, error, text):
    with pytest.raises(error, match=text):
        core.masked_residual((by_rows(), by_columns()), m, out)
    # The measurements come first and choose the precision; entries leave it to the matrix.
    precision = np.float32 if "wanted float32" in text else F64
    with pytest.raises(error, match=text if "matrix has shape" not in text else "residual has shape"):
        core.measured_residual((np.ones((2, 12), precision), np.ones(2, precision)), m, out)


@pytest.mark.parametrize(
    ("measurements", "error", "text"),
    [
        ((np.ones((2, 11)), np.ones(2)), ValueError, "measurement operators has shape"),
        ((np.ones((2, 12)), np.ones(3)), ValueError, "3 values; wanted 2"),
        ((np.ones((2, 12)), np.ones((2, 1))), ValueError, r"measurements\[1\] has 2 axes"),
        ((np.ones((2, 3, 4)), np.ones(2)), ValueError, r"measurements\[0\] has 3 axes"),
        ((np.ones((2, 12), np.float32), np.ones(2)), TypeError, r"measurements\[1\] has dtype float64"),
        ((np.ones((2, 12)), np.ones(2, int)), TypeError, r"measurements\[1\] has dtype int64"),
        ((np.ones((12, 2)).T, np.ones(2)), TypeError, r"measurements\[0\] is not C-contiguous"),
        ((np.ones((2, 12)),), ValueError, r"not \(operators, values\)"),
        ((np.ones((2, 12)), None), TypeError, r"measurements\[1\] is not a NumPy array"),
        ([np.ones((2, 12)), np.ones(2)], TypeError, r"measurements is not \(operators, values\)"),
        (None, TypeError, None),
    ],
)
def test_errors_name_bad_measurements(core, measurements, error, text):
    with pytest.raises(error, match=text):
        core.measured_residual(measurements, np.ones((3, 4)), np.zeros((3, 4)))


# The engine that descends on them.

DIAGONAL = integers(0, 1, 2), integers(0, 1, dtype=np.int32), np.ones(2)
OBSERVATIONS = {
    "observed": {"observed": (DIAGONAL, DIAGONAL), "measurements": None},
    "measurements": {"observed": None, "measurements": (np.eye(4), np.ones(4))},
}


def descend_on_observations(core, **changes):
    arguments = dense_arguments() | {"observed": None, "measurements": None, "target": None}
    return core.dense_descent(identity_layers(), {**arguments, **changes})


@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_descent_on_observations_finishes(core, kind):
    assert descend_on_observations(core, **OBSERVATIONS[kind]) == ("finished", 3, 0)
    rate = np.full(3, np.nan)
    assert (
        descend_on_observations(core, **OBSERVATIONS[kind], safety=1.0, curvature=[1.0, 1.0], rate=rate)[0]
        == "finished"
    )
    assert np.all(rate > 0)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({}, ValueError, "target has shape"),
        ({"observed": (DIAGONAL, DIAGONAL), "measurements": (np.eye(4), np.ones(4))}, ValueError, "both"),
        ({"observed": (by_rows(), by_columns())}, ValueError, "observed has 3 values; wanted 2"),
        ({"observed": 3}, TypeError, "observed is not"),
        ({"observed": {0: DIAGONAL, 1: DIAGONAL}}, TypeError, "observed is not"),
        ({"observed": (DIAGONAL, list(DIAGONAL))}, TypeError, r"observed\[1\] is not"),
        ({"measurements": (np.ones((2, 5)), np.ones(2))}, ValueError, "measurements has shape"),
        ({"measurements": np.eye(4)}, TypeError, "measurements is not"),
        (
            OBSERVATIONS["observed"]
            | {"input_gram": np.eye(2), "input_factor": np.eye(2), "factor_target": np.eye(2)},
            ValueError,
            "input_gram is passed together with observations",
        ),
    ],
)
def test_errors_of_descent_name_bad_observations(core, changes, error, text):
    with pytest.raises(error, match=text):
        descend_on_observations(core, **changes)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"curvature": [1.0]}, ValueError),
        ({"curvature": [1.0] * 3}, ValueError),
        ({"curvature": 1.0}, TypeError),
        ({"safety": None}, TypeError),
        ({"rate": np.zeros(2)}, ValueError),
        ({"rate": np.zeros(3, np.float32)}, TypeError),
        ({"rate": freeze(np.zeros(3))}, ValueError),
        ({"rate": None}, TypeError),
    ],
)
def test_errors_of_descent_name_bad_rates(core, changes, error):
    arguments = OBSERVATIONS["observed"] | {"safety": 1.0, "curvature": [1.0, 1.0], "rate": np.zeros(3)}
    with pytest.raises(error):
        descend_on_observations(core, **{**arguments, **changes})


NASTY = """
import gc
import sys
import numpy as np
sys.path.insert(0, {tests!r})
from helpers.core_calls import dense_arguments
from helpers.core_modules import MODULES

core = MODULES[sys.argv[1]]
n = 200

def observed():
    start = np.arange(n + 1)
    order = start, np.arange(n, dtype=np.int32), np.ones(n)
    return order, tuple(array.copy() for array in order)

kinds = {{
    "observed": lambda: {{"observed": observed(), "measurements": None}},
    "measurements": lambda: {{"observed": None, "measurements": (np.ones((3, n * n)), np.ones(3))}},
}}
for kind, make in kinds.items():
    arguments = dense_arguments(steps=40)
    for name in ("values", "left", "right", "snapshots"):
        arguments[name] = []
    arguments |= {{"target": None, "snapshot_every": 0, "n_threads": 2, **make()}}
    # Drop the only references during the run, and reuse their memory.
    litter = []
    def forget(step, loss):
        arguments.clear()
        litter.append([np.full(n, 2**40) for _ in range(20)])
        gc.collect()
    arguments["on_record"] = forget
    arguments["learning_rate"] = [1e-15, 1e-15]
    weights = [np.eye(n), np.eye(n)]
    loss = arguments["loss"]
    print(core.dense_descent(weights, arguments), np.ptp(loss) <= 1e-6 * loss[0])
print("alive")
"""


def test_observations_outlive_their_arguments(core_modules, run_python):
    """Test the best instruction-set level only: all share this code."""
    program = NASTY.format(tests=str(Path(__file__).parent))
    printed = run_python(program, list(core_modules)[-1])
    assert printed == "('finished', 40, 0) True\n" * 2 + "alive\n"
