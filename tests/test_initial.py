# SPDX-License-Identifier: MIT
"""Initial weights: shapes, norms, distributions, seeds and bad arguments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.matrices import draw_orthonormal, gram_error
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference

F64 = np.float64
WIDTHS = st.lists(st.sampled_from([1, 2, 3, 5, 8, 13]), min_size=2, max_size=6)
SEEDS = st.integers(0, 2**64 - 1)
DISTRIBUTIONS = {"orthogonal": dln.orthogonal, "gaussian": dln.gaussian, "uniform": dln.uniform}

# Number of samples of an entry for its mean, and number of standard errors allowed.
N_DRAWS, SIGMAS = 4000, 5


@settings(deadline=None)
@given(widths=WIDTHS, seed=SEEDS, scale=st.floats(1e-3, 1e3), dtype=st.sampled_from([np.float32, F64]))
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_layers_have_the_requested_shapes_norms_and_precision(distribution, widths, seed, scale, dtype):
    weights = DISTRIBUTIONS[distribution](widths, scale, seed, dtype=dtype)
    assert [w.shape for w in weights] == [(rows, cols) for cols, rows in itertools.pairwise(widths)]
    for weight in weights:
        assert weight.dtype == dtype
        assert weight.flags.c_contiguous
        norm = np.linalg.norm(weight.astype(F64))
        wanted = scale * np.sqrt(min(weight.shape))
        assert abs(norm - wanted) <= tolerance(dtype, weight.size) * wanted


@settings(deadline=None)
@given(widths=WIDTHS, seed=SEEDS, dtype=st.sampled_from([np.float32, F64]))
def test_orthogonal_layers_are_scaled_isometries(widths, seed, dtype):
    scales = 0.5 + np.arange(len(widths) - 1)
    for weight, scale in zip(dln.orthogonal(widths, scales, seed, dtype=dtype), scales, strict=True):
        dim = min(weight.shape)
        assert (
            np.linalg.norm(gram_error(weight, scale)) <= tolerance(dtype, max(weight.shape)) * scale**2 * dim
        )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_scales_may_differ_between_layers(distribution):
    scales = [0.1, 2.0, 30.0]
    single = DISTRIBUTIONS[distribution]([5, 4, 6, 3], 1.0, seed=7)
    for plain, scaled, scale in zip(
        single, DISTRIBUTIONS[distribution]([5, 4, 6, 3], scales, seed=7), scales, strict=True
    ):
        np.testing.assert_allclose(scaled, scale * plain, rtol=tolerance(F64, 1))
    assert all(not w.any() for w in DISTRIBUTIONS[distribution]([3, 3, 3], 0.0))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_layers_depend_on_the_seed_and_on_nothing_else(distribution):
    draw = DISTRIBUTIONS[distribution]
    first = draw([6, 6, 6, 6], seed=1)
    for other in (draw([6, 6, 6, 6], seed=1), draw([6, 6, 6], seed=1), draw([6, 6, 6, 2], seed=1)):
        np.testing.assert_array_equal(other[0], first[0])
        np.testing.assert_array_equal(other[1], first[1])
    layers = [*first, *draw([6, 6, 6, 6], seed=2), *draw([6, 6, 6, 6], seed=2**63)]
    for a, b in itertools.combinations(layers, 2):
        assert np.linalg.norm(a - b) > 0.1


@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4)])
def test_orthogonal_layers_are_haar_distributed(shape):
    """Moments of a Haar frame's entries: mean 0, E q^2 = 1/n, E q^4 = 3/(n (n + 2)), n the longer side."""
    rows, cols = shape
    n = max(shape)
    draws = np.array([dln.orthogonal([cols, rows], seed=seed)[0] for seed in range(N_DRAWS)])
    for power, wanted in ((1, 0.0), (2, 1 / n), (4, 3 / (n * (n + 2)))):
        spread = draws**power
        allowed = SIGMAS * spread.std(axis=0) / np.sqrt(N_DRAWS)
        assert np.all(np.abs(spread.mean(axis=0) - wanted) <= allowed)
    # The sign of a determinant is fair, so that reflections are drawn, too.
    if rows == cols:
        assert abs(np.mean(np.linalg.det(draws) > 0) - 0.5) <= SIGMAS * 0.5 / np.sqrt(N_DRAWS)


def test_gaussian_and_uniform_entries_have_their_shapes():
    """Kurtosis distinguishes them: 3 for the normal distribution, 9/5 for the uniform one."""
    normal, flat = (
        distribution([200, 200], seed=0)[0].ravel() for distribution in (dln.gaussian, dln.uniform)
    )
    for entries, kurtosis in ((normal, 3.0), (flat, 1.8)):
        assert abs(entries.mean()) <= SIGMAS / np.sqrt(200 * entries.size)
        got = np.mean(entries**4) / np.mean(entries**2) ** 2
        assert abs(got - kurtosis) <= SIGMAS * np.sqrt(96 / entries.size)
    assert np.abs(flat).max() <= np.sqrt(3 / 200) * 1.01  # uniform on [-a, a] has variance a^2 / 3


@settings(deadline=None)
@given(widths=WIDTHS, seed=st.integers(0, 999), data=st.data(), dtype=st.sampled_from([np.float32, F64]))
def test_aligned_layers_map_v_to_u(widths, seed, data, dtype):
    rank = data.draw(st.integers(0, min(widths)))
    rng = np.random.default_rng(seed)
    U, V = (draw_orthonormal(rng, dim, rank) for dim in (widths[-1], widths[0]))
    problem = dln.Problem(dln.LowRank(U, np.arange(rank, 0, -1.0), V))
    scales = 0.5 + np.arange(len(widths) - 1) / 4
    weights = dln.aligned(problem, widths, scales, seed, dtype=dtype)
    for weight, scale in zip(weights, scales, strict=True):
        assert weight.dtype == dtype
        assert np.linalg.norm(gram_error(weight, scale)) <= tolerance(
            dtype, max(weight.shape)
        ) * scale**2 * min(weight.shape)
    whole = reference.end_to_end([w.astype(F64) for w in weights]) / np.prod(scales)
    assert np.linalg.norm(whole @ V - U) <= tolerance(dtype, max(widths), len(widths)) * max(rank, 1)
    # The transpose maps U to V, so that the complement of U is not mixed into V.
    assert np.linalg.norm(whole.T @ U - V) <= tolerance(dtype, max(widths), len(widths)) * max(rank, 1)


def test_aligned_complements_are_random():
    problem = dln.low_rank_recovery(8, 2)
    one, two = (dln.aligned(problem, [8, 8, 8], seed=seed) for seed in (0, 1))
    assert all(np.linalg.norm(a - b) > 0.1 for a, b in zip(one, two, strict=True))
    same = dln.aligned(problem, [8, 8, 8], seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_aligned_complements_are_haar_distributed(missing):
    """On the complement of V, one layer is a Haar rotation onto that of U: E c = 0, E c^2 = 1/m."""
    dim, n_draws = 2 + missing, 1000
    problem = dln.low_rank_recovery(dim, 2, seed=1)
    factors = problem.target
    outer, inner = (np.linalg.svd(frame)[0][:, 2:] for frame in (factors.U, factors.V))
    draws = np.array(
        [outer.T @ dln.aligned(problem, [dim, dim], seed=seed)[0] @ inner for seed in range(n_draws)]
    )
    for power, wanted in ((1, 0.0), (2, 1 / missing)):
        moment = draws**power
        # The entries of a 1 x 1 rotation have the same square; rounding is all that they differ by.
        allowed = SIGMAS * moment.std(axis=0) / np.sqrt(n_draws) + tolerance(F64, dim)
        assert np.all(np.abs(moment.mean(axis=0) - wanted) <= allowed)


# Bad arguments.


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("widths", "options", "error", "text"),
    [
        ([5], {}, dln.ShapeError, "widths"),
        ([], {}, dln.ShapeError, "widths"),
        ([5, 0, 5], {}, ValueError, r"widths\[1\] \(d_1\) is 0"),
        ([5, -1], {}, ValueError, r"widths\[1\]"),
        ([5, 2.5], {}, TypeError, r"widths\[1\]"),
        ([5, True], {}, TypeError, r"widths\[1\]"),
        ([5, "5"], {}, TypeError, r"widths\[1\]"),
        ([5, 5], {"scale": -1.0}, ValueError, r"scale \(eps\)"),
        ([5, 5], {"scale": np.nan}, ValueError, r"scale \(eps\)"),
        ([5, 5], {"scale": "1"}, TypeError, r"scale \(eps\)"),
        ([5, 5], {"scale": [1.0, 1.0]}, dln.ShapeError, r"scale \(eps\) has 2 values"),
        ([5, 5], {"scale": [np.inf]}, ValueError, r"scale \(eps\)\[0\]"),
        ([5, 5], {"seed": -1}, ValueError, "seed"),
        ([5, 5], {"seed": 2**64}, ValueError, "seed"),
        ([5, 5], {"seed": 1.0}, TypeError, "seed"),
        ([5, 5], {"dtype": np.float16}, TypeError, "dtype is float16"),
        ([5, 5], {"dtype": np.int64}, TypeError, "dtype is int64"),
    ],
)
def test_errors_name_bad_arguments(distribution, widths, options, error, text):
    with pytest.raises(error, match=text):
        DISTRIBUTIONS[distribution](widths, **options)


def test_aligned_needs_widths_that_fit_the_problem():
    problem = dln.low_rank_recovery(8, 3)
    with pytest.raises(dln.ShapeError, match=r"widths.*from 7 to 8.*from 8 to 8"):
        dln.aligned(problem, [7, 8, 8])
    with pytest.raises(dln.ShapeError, match=r"widths has 2, below the target's rank 3"):
        dln.aligned(problem, [8, 2, 8])
