# SPDX-License-Identifier: MIT
"""`row_posteriors` of the compiled core against NumPy, identities, and bad arguments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

F64 = np.float64


def padded(rank):
    return ((rank + 2) * (rank + 3) // 2 + 15) // 16 * 16


def pack(moments):
    """Return the lower triangles of matrices (n, K, K), padded with zeros."""
    n, size = moments.shape[:2]
    packed = np.zeros((n, padded(size - 2)), moments.dtype)
    rows, columns = np.tril_indices(size)
    packed[:, : len(rows)] = moments[:, rows, columns]
    return packed


def draw_case(rng, m, n, rank, dtype, density=0.5, weighted=False):
    """Return the arguments up to `uncertain`, as NumPy arrays of this precision, and the mask."""
    mask = rng.random((m, n)) < density
    values = rng.standard_normal((m, n))
    vectors = rng.standard_normal((n, rank + 2))
    vectors[:, rank] = 1.0
    spread = 0.3 * rng.standard_normal((n, rank + 2, rank + 2))
    spread[:, rank] = 0.0
    moments = vectors[:, :, np.newaxis] * vectors[:, np.newaxis] + spread @ spread.transpose(0, 2, 1)
    root = rng.standard_normal((rank + 1, rank + 1))
    prior = root @ root.T + np.eye(rank + 1)
    start = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int64)
    index = np.nonzero(mask)[1].astype(np.int32)
    entries = start, index, values[mask].astype(dtype)
    weights, precisions = rng.uniform(0.5, 2.0, n).astype(dtype), rng.uniform(0.5, 2.0, m).astype(dtype)
    shifts = rng.standard_normal((m, rank + 1)).astype(dtype)
    own = rng.uniform(0.2, 3.0, len(index)).astype(dtype) if weighted else None
    return entries, pack(moments).astype(dtype), weights, own, precisions, (prior.astype(dtype), shifts)


def unpack(packed, rank):
    size = rank + 2
    whole = np.zeros((len(packed), size, size))
    rows, columns = np.tril_indices(size)
    whole[:, rows, columns] = packed[:, : len(rows)]
    whole[:, columns, rows] = packed[:, : len(rows)]
    return whole


def reference(entries, others, weights, entry_weights, precisions, prior, uncertain):
    """Return the moments (m, K, K) and the expected errors, in float64 and with plain loops over rows."""
    start, index, values = entries
    precision, shifts = (np.asarray(x, F64) for x in prior)
    d = len(precision)
    moments = unpack(np.asarray(others, F64), d - 1)
    found, errors = np.zeros((len(start) - 1, d + 1, d + 1)), np.zeros(len(start) - 1)
    for i in range(len(errors)):
        columns, known = index[start[i] : start[i + 1]], values[start[i] : start[i + 1]].astype(F64)
        weight = weights[columns].astype(F64)
        if entry_weights is not None:
            weight *= entry_weights[start[i] : start[i + 1]]
        # h = (g, 1), and b is the last entry.
        gram = np.einsum("n,nab->ab", weight, moments[columns, :d, :d])
        target = np.einsum("n,na->a", weight * known, moments[columns, d - 1, :d])
        target -= np.einsum("n,na->a", weight, moments[columns, d, :d])
        covariance = np.linalg.inv(precision + precisions[i] * gram)
        mean = covariance @ (precisions[i] * target + shifts[i])
        second = np.outer(mean, mean) + (covariance if uncertain else 0.0)
        squares = weight @ (known**2 - 2 * known * moments[columns, d, d - 1] + moments[columns, d, d])
        errors[i] = squares - 2 * target @ mean + np.sum(gram * second)
        order = [*range(d - 1), d]
        found[i][np.ix_(order, order)] = second
        found[i][d - 1, order] = found[i][order, d - 1] = mean
        found[i][d - 1, d - 1] = 1.0
    return found, errors


@settings(deadline=None, max_examples=80)
@given(
    m=st.sampled_from([0, 1, 2, 7, 16, 17, 33]),
    n=st.sampled_from([0, 1, 3, 16, 31]),
    rank=st.sampled_from([0, 1, 2, 5, 7, 14, 15, 16, 31, 33]),
    density=st.sampled_from([0.0, 0.2, 0.9]),
    dtype=st.sampled_from([np.float32, F64]),
    threads=st.sampled_from([1, 2, 7]),
    uncertain=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_posteriors_equal_those_of_plain_loops(
    core, m, n, rank, density, dtype, threads, uncertain, weighted, seed
):
    case = draw_case(np.random.default_rng(seed), m, n, rank, dtype, density, weighted)
    moments, errors = np.full((m, padded(rank)), np.nan, dtype), np.full(m, np.nan)
    core.row_posteriors(*case, uncertain, moments, errors, threads)
    wanted, wanted_errors = reference(*case, uncertain)
    # The systems have condition numbers of up to a thousand here.
    allowed = 1e3 * tolerance(dtype, max(n * (rank + 2), 1))
    size = max(1.0, float(np.abs(wanted).max(initial=0.0)))
    np.testing.assert_allclose(unpack(moments, rank), wanted, rtol=0, atol=allowed * size)
    scale = max(1.0, float(np.abs(wanted_errors).max(initial=0.0)))
    np.testing.assert_allclose(errors, wanted_errors, rtol=0, atol=allowed * scale)
    assert not moments[:, (rank + 2) * (rank + 3) // 2 :].any()


@pytest.mark.parametrize("dtype", [np.float32, F64])
def test_threads_change_no_bit(core, dtype):
    case = draw_case(np.random.default_rng(0), 3000, 200, 9, dtype)
    results = []
    for threads in (1, 2, 7):
        moments, errors = np.zeros((3000, padded(9)), dtype), np.zeros(3000)
        core.row_posteriors(*case, True, moments, errors, threads)
        results.append((moments.tobytes(), errors.tobytes()))
    assert len(set(results)) == 1


def test_without_covariances_a_row_is_a_ridge_regression(core):
    rng = np.random.default_rng(1)
    m, n, rank, penalty = 11, 40, 3, 0.7
    vectors = rng.standard_normal((n, rank + 2))
    vectors[:, rank], vectors[:, rank + 1] = 1.0, 0.0
    values = rng.standard_normal((m, n))
    entries = np.arange(0, m * n + 1, n), np.tile(np.arange(n, dtype=np.int32), m), values.ravel()
    moments, errors = np.zeros((m, padded(rank))), np.zeros(m)
    others = pack(vectors[:, :, np.newaxis] * vectors[:, np.newaxis])
    prior = penalty * np.eye(rank + 1), np.zeros((m, rank + 1))
    core.row_posteriors(entries, others, np.ones(n), None, np.ones(m), prior, False, moments, errors)
    design = vectors[:, : rank + 1]
    solved = np.linalg.solve(design.T @ design + penalty * np.eye(rank + 1), design.T @ values.T).T
    found = unpack(moments, rank)
    np.testing.assert_allclose(found[:, rank, [*range(rank), rank + 1]], solved, atol=tolerance(F64, n))
    residual = values - solved @ design.T
    np.testing.assert_allclose(errors, np.sum(residual**2, axis=1), rtol=tolerance(F64, n))


def test_a_row_without_entries_has_its_prior(core):
    rank, mean = 2, np.array([[0.5, -1.0, 2.0]])
    root = np.random.default_rng(2).standard_normal((3, 3))
    covariance = root @ root.T + np.eye(3)
    precision = np.linalg.inv(covariance)
    entries = np.zeros(2, np.int64), np.zeros(0, np.int32), np.zeros(0)
    moments, errors = np.zeros((1, padded(rank))), np.ones(1)
    prior = precision, mean @ precision
    core.row_posteriors(
        entries, np.zeros((4, padded(2))), np.ones(4), None, np.ones(1), prior, True, moments, errors
    )
    found = unpack(moments, rank)[0]
    kept = [0, 1, 3]
    np.testing.assert_allclose(found[2, kept], mean[0], rtol=1e-13)
    np.testing.assert_allclose(found[np.ix_(kept, kept)], covariance + mean.T @ mean, rtol=1e-12)
    assert errors[0] == 0.0


def test_a_singular_system_stays_finite(core):
    rank = 3
    others = np.zeros((2, padded(rank)), np.float32)
    others[:, 9] = 1.0
    entries = np.array([0, 2]), np.array([0, 1], np.int32), np.ones(2, np.float32)
    tiny = np.full((4, 4), 1e-30, np.float32)  # rank one: rounding leaves no pivot
    moments, errors = np.zeros((1, padded(rank)), np.float32), np.zeros(1)
    prior = tiny, np.zeros((1, 4), np.float32)
    core.row_posteriors(
        entries, others, np.ones(2, np.float32), None, np.ones(1, np.float32), prior, False, moments, errors
    )
    assert np.isfinite(moments).all()


CHANGES = {
    "others": lambda a: a.__setitem__(1, a[1][:, :-1]),
    "weights": lambda a: a.__setitem__(2, a[2][:-1]),
    "entry_weights": lambda a: a.__setitem__(3, np.ones(3)),
    "precisions": lambda a: a.__setitem__(4, a[4][:-1]),
    r"prior\[0\]": lambda a: a.__setitem__(5, (a[5][0][:, :-1], a[5][1])),
    r"prior\[1\]": lambda a: a.__setitem__(5, (a[5][0], a[5][1][:-1])),
    "moments": lambda a: a.__setitem__(7, a[7][:-1]),
    "errors": lambda a: a.__setitem__(8, a[8][:-1]),
    "index outside": lambda a: a[0][1].__setitem__(0, 5),
    "starts that do not ascend": lambda a: a[0][0].__setitem__(1, 99),
}


@pytest.mark.parametrize("name", CHANGES)
def test_wrong_sizes_and_indices_are_errors(core, name):
    case = draw_case(np.random.default_rng(0), 6, 5, 2, F64, 0.9)
    arguments = [*case, True, np.zeros((6, padded(2))), np.zeros(6)]
    CHANGES[name](arguments)
    arguments = [np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x for x in arguments]
    if name == r"prior\[0\]":
        arguments[5] = np.ascontiguousarray(arguments[5][0]), arguments[5][1]
    with pytest.raises(ValueError, match=name):
        core.row_posteriors(*arguments)
