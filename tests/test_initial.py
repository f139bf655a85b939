"""Initial weights: their laws, their scale, their seeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln

WIDTHS = st.lists(st.sampled_from([1, 2, 3, 5, 7, 13, 20, 31]), min_size=2, max_size=5)


@settings(deadline=None, max_examples=40)
@given(widths=WIDTHS, scale=st.floats(1e-6, 10.0), seed=st.integers(0, 2**64 - 1))
def test_orthogonal_layers_are_scaled_isometries(widths, scale, seed):
    weights = dln.orthogonal(widths, scale, seed)
    assert [w.shape for w in weights] == list(zip(widths[1:], widths[:-1], strict=True))
    for w in weights:
        small = w if w.shape[0] <= w.shape[1] else w.T
        error = np.linalg.norm(small @ small.T / scale**2 - np.eye(len(small)))
        assert error <= tolerance(np.float64, max(w.shape)) * np.sqrt(len(small))


@settings(deadline=None, max_examples=30)
@given(widths=WIDTHS, scale=st.floats(1e-3, 10.0), seed=st.integers(0, 1000))
def test_all_laws_have_the_same_size(widths, scale, seed):
    for law in (dln.orthogonal, dln.gaussian, dln.uniform):
        for w in law(widths, scale, seed):
            np.testing.assert_allclose(np.linalg.norm(w), scale * np.sqrt(min(w.shape)), rtol=1e-13)


def test_scales_per_layer_and_precisions():
    weights = dln.orthogonal([6, 6, 6], scale=[0.5, 2.0], dtype=np.float32)
    assert all(w.dtype == np.float32 and w.flags.c_contiguous for w in weights)
    np.testing.assert_allclose([np.linalg.norm(w, 2) for w in weights], [0.5, 2.0], rtol=1e-6)
    np.testing.assert_array_equal(dln.orthogonal([3, 3], scale=0.0)[0], np.zeros((3, 3)))


@pytest.mark.parametrize("law", [dln.orthogonal, dln.gaussian, dln.uniform])
def test_seeds(law):
    same, again, other = law([9, 9, 9], seed=3), law([9, 9, 9], seed=3), law([9, 9, 9], seed=4)
    np.testing.assert_array_equal(same, again)
    assert np.abs(same[0] - other[0]).max() > 0.1
    assert np.abs(same[0] - same[1]).max() > 0.1
    # A layer does not depend on how many others there are.
    np.testing.assert_array_equal(law([9, 9, 9, 4], seed=3)[:2], same)


def test_orthogonal_is_haar():
    # Moments of Haar's law on O(n): E tr Q = 0, E (tr Q)^2 = 1, E q_ij^2 = 1/n.
    draws = np.array([dln.orthogonal([5, 5], seed=s)[0] for s in range(3000)])
    traces = np.trace(draws, axis1=1, axis2=2)
    # Five standard errors: a false alarm once in two million seeds.
    assert abs(traces.mean()) < 5 / np.sqrt(3000)
    assert abs((traces**2).mean() - 1) < 5 * np.sqrt(2 / 3000)
    np.testing.assert_allclose((draws**2).mean(0), np.full((5, 5), 0.2), atol=5 * 0.3 / np.sqrt(3000))
    assert abs((np.linalg.det(draws) > 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(3000)


def test_uniform_and_gaussian_have_their_shape():
    w = dln.uniform([200, 200])[0]
    # A uniform variable lies within sqrt(3) standard deviations, all of its range in use.
    assert np.abs(w).max() <= np.sqrt(3 / 200) * 1.02
    assert np.abs(w).max() >= np.sqrt(3 / 200) * 0.98
    g = dln.gaussian([200, 200])[0] * np.sqrt(200)
    assert 3.5 < np.abs(g).max() < 6
    assert abs((g**4).mean() - 3) < 0.2


@pytest.mark.parametrize("widths", [[10, 10, 10, 10], [12, 8, 9, 10], [7, 15, 10]])
def test_aligned_layers_carry_v_to_u(widths):
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.standard_normal((widths[-1], 2)))[0]
    right = np.linalg.qr(rng.standard_normal((widths[0], 2)))[0]
    problem = dln.Problem(dln.LowRank(left, [3.0, 2.0], right))
    weights = dln.aligned(problem, widths, scale=0.5, seed=1)
    chain = np.linalg.multi_dot([*reversed(weights), right])
    np.testing.assert_allclose(chain, 0.5 ** len(weights) * left, atol=1e-14)
    for w in weights:
        small = w if w.shape[0] <= w.shape[1] else w.T
        np.testing.assert_allclose(small @ small.T, 0.25 * np.eye(len(small)), atol=1e-14)


def test_aligned_training_is_diagonal():
    problem = dln.low_rank_recovery(20, 2, seed=5)
    weights = dln.aligned(problem, [20] * 4, scale=0.7)
    run = dln.train(problem, weights, learning_rate=2.0, steps=60)
    factors, c = problem.target_factors(), problem.loss_scale
    s = np.full((3, 2), 0.7)
    for _ in range(60):
        error = s.prod(0) - factors.s
        s = s - c * 2.0 * error * np.array([np.delete(s, i, 0).prod(0) for i in range(3)])
    assert run.engine == "reduced"
    assert run.states.cores[0].shape[1:] == (2, 2)  # dimension r, not 2r
    np.testing.assert_allclose(run.active_singular_values(1)[-1], np.sort(s[0])[::-1], rtol=1e-12)


def test_aligned_needs_widths_that_fit():
    problem = dln.low_rank_recovery(8, 3)
    with pytest.raises(dln.ShapeError, match="below the target's rank 3"):
        dln.aligned(problem, [8, 2, 8])
    with pytest.raises(dln.ShapeError, match="the problem goes from 8 to 8"):
        dln.aligned(problem, [8, 8, 7])
