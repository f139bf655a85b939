"""The theorem's conditions, measured, and the subspaces they give."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from tolerances import tolerance

import dlnfast as dln
from dlnfast.closure import (
    ERROR_PER_DEPARTURE,
    Certificate,
    active_subspaces,
    check_assumptions,
    multiply,
)


def spaces_of(problem, weights):
    return active_subspaces(problem, weights, check_assumptions(problem, weights))


def leaves(basis, vectors):
    """Return how far vectors lie outside the span of an orthonormal basis."""
    return np.linalg.norm(vectors - basis @ (basis.T @ vectors))


@pytest.mark.parametrize("n_layers", [1, 2, 3, 5])
def test_case_one_inclusions(n_layers):
    problem = dln.low_rank_recovery(40, 3, seed=2)
    weights = dln.orthogonal([40] * (n_layers + 1), scale=0.3, seed=2)
    found = spaces_of(problem, weights)
    target = problem.dense_target()
    limit = tolerance(np.float64, 40) * 10  # products of a few factors, in Frobenius norm
    for layer, w in enumerate(weights):
        below, above = found.bases[layer], found.bases[layer + 1]
        assert below.shape == (40, 6)
        assert np.linalg.norm(below.T @ below - np.eye(6)) < limit
        assert leaves(above, w @ below) < limit
        assert leaves(below, w.T @ above) < limit
    size = np.linalg.norm(target)
    assert leaves(found.bases[-1], target @ found.bases[0]) < limit * size
    assert leaves(found.bases[0], target.T @ found.bases[-1]) < limit * size
    # Nothing of the target is outside.
    inside = found.bases[-1] @ found.target @ found.bases[0].T
    assert np.linalg.norm(inside - target) < limit * size
    assert found.multiplicity == 34
    for core in found.cores:
        np.testing.assert_array_equal(core, 0.3 * np.eye(6))


@pytest.mark.parametrize("last", ["orthogonal", "gaussian", "zero"])
def test_case_two_inclusions(last):
    problem = dln.classification(3, 10, seed=1)
    weights = dln.orthogonal([30, 30, 30, 3], scale=0.5, seed=1)
    if last == "gaussian":
        weights[-1] = np.random.default_rng(0).standard_normal((3, 30))
    if last == "zero":
        weights[-1] = np.zeros((3, 30))
    found = spaces_of(problem, weights)
    assert found.bases[-1] is None
    assert found.bases[0].shape == (30, 3 if last == "zero" else 6)
    assert leaves(found.bases[0], problem.dense_target().T) < 1e-13
    whole = np.linalg.multi_dot(weights[::-1])
    assert leaves(found.bases[0], whole.T) < 1e-13
    np.testing.assert_allclose(found.cores[-1], weights[-1] @ found.bases[2], atol=1e-14)
    assert found.rho == (pytest.approx(0.5), pytest.approx(0.5), 0.0)


def test_dimensions_follow_from_the_target():
    weights = dln.orthogonal([40] * 3)
    for rank in (0, 1, 5, 10):
        assert spaces_of(dln.low_rank_recovery(40, rank), weights).bases[0].shape[1] == 2 * rank
    aligned_problem = dln.low_rank_recovery(40, 5)
    aligned = dln.aligned(aligned_problem, [40] * 3)
    assert spaces_of(aligned_problem, aligned).bases[0].shape[1] == 5


@pytest.mark.parametrize(("noise", "holds"), [(0.0, True), (1e-14, True), (1e-9, False), (1e-2, False)])
def test_departure_from_rotations_is_measured(noise, holds):
    problem = dln.low_rank_recovery(60, 2)
    weights = dln.orthogonal([60] * 4, scale=0.2)
    disturbance = np.random.default_rng(0).standard_normal((60, 60))
    weights[1] = weights[1] + noise * 0.2 * disturbance / np.linalg.norm(disturbance) * np.sqrt(60)
    found = check_assumptions(problem, weights)
    assert found.hold is holds
    if noise > 1e-10:
        (failure,) = found.failures
        assert failure.name == "rotation of layer 2"
        # ||W^T W / eps^2 - I||_F is about sqrt(2) times the relative noise; eight probes see it to a third.
        assert failure.measured == pytest.approx(np.sqrt(2) * noise, rel=0.4)


@pytest.mark.parametrize("noise", [1e-6, 1e-4, 1e-2])
def test_the_expected_error_is_the_measured_one(noise):
    problem = dln.low_rank_recovery(40, 2)
    clean = dln.orthogonal([40] * 4, scale=0.5)
    rng = np.random.default_rng(1)
    noisy = [w + 0.5 * noise * rng.standard_normal(w.shape) / np.sqrt(40) for w in clean]
    settings = {"learning_rate": 5.0, "steps": 100, "singular_values": None}
    reduced = dln.train(problem, clean, engine="reduced", **settings)
    dense = dln.train(problem, noisy, engine="dense", **settings)
    error = max(
        np.linalg.norm(reduced.weights(i) - dense.weights(i)) / np.linalg.norm(dense.weights(i))
        for i in (1, 2, 3)
    )
    predicted = max(
        ERROR_PER_DEPARTURE * check.measured for check in check_assumptions(problem, noisy).checks
    )
    # An estimate for users, not a bound: the right size is what it promises.
    assert 0.3 * predicted < error < 3 * predicted


def test_a_single_bad_direction_is_seen():
    problem, weights = dln.low_rank_recovery(100, 2), dln.orthogonal([100] * 3)
    x, y = np.zeros(100), np.zeros(100)
    x[3] = y[7] = 1.0
    weights[0] = weights[0] + 1e-8 * np.outer(y, x)
    assert not check_assumptions(problem, weights).hold


def test_single_precision_has_its_own_limits():
    problem = dln.low_rank_recovery(40, 2)
    weights = dln.orthogonal([40] * 3, dtype=np.float32)
    run = dln.train(problem, weights, learning_rate=1.0, steps=5)
    assert run.engine == "reduced"
    assert run.certificate.expected_error < 1e-5
    rounded = [w.astype(np.float64) for w in weights]
    assert dln.train(problem, rounded, learning_rate=1.0, steps=5).engine == "dense"


def test_the_choice_and_its_reason(caplog):
    problem, weights = dln.low_rank_recovery(20, 2), dln.orthogonal([20] * 3)
    with caplog.at_level(logging.INFO, logger="dlnfast"):
        run = dln.train(problem, weights, learning_rate=1.0, steps=1)
    assert [record.getMessage() for record in caplog.records] == [str(run.certificate)]
    assert str(run.certificate).startswith("reduced engine: case 1 of the theorem holds, 4 of 20")
    big = dln.train(dln.low_rank_recovery(20, 8), weights, learning_rate=1.0, steps=1)
    assert "would not be smaller" in str(big.certificate)
    asked = dln.train(problem, weights, learning_rate=1.0, steps=1, engine="dense")
    assert str(asked.certificate) == "dense engine: engine='dense' was asked for"
    odd = dln.train(problem, dln.orthogonal([20, 25, 20]), learning_rate=1.0, steps=1)
    assert "neither case of the theorem" in str(odd.certificate)
    for certificate in (run.certificate, big.certificate, asked.certificate, odd.certificate):
        assert Certificate.from_dict(certificate.to_dict()) == certificate


def test_large_targets_of_low_rank_need_no_full_decomposition():
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((700, 4)), rng.standard_normal((4, 600))
    problem = dln.Problem(factors[0] @ factors[1])
    assert not problem.rank_exceeds(4)
    assert problem.rank_exceeds(3)
    exact = np.linalg.svd(problem.target, compute_uv=False)[:4]
    np.testing.assert_allclose(problem.target_factors().s, exact, rtol=1e-12)
    full = dln.Problem(rng.standard_normal((600, 600)))
    assert full.rank_exceeds(150)
    assert full.target_factors().rank == 600


def test_multiply():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 7)), rng.standard_normal((5, 3))
    np.testing.assert_allclose(multiply(a, b, transpose_a=True), a.T @ b, atol=1e-14)
    np.testing.assert_allclose(multiply(a.T, b), a.T @ b, atol=1e-14)
    np.testing.assert_allclose(multiply(a, a[:2], transpose_b=True), a @ a[:2].T, atol=1e-14)
