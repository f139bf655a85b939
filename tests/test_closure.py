# SPDX-License-Identifier: MIT
"""Closures of invariant subspaces: dimensions, assumptions, the report and the choice of engine."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from helpers.matrices import draw_orthonormal
from helpers.problems import draw_low_rank_target
from helpers.records import with_record
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference
from dlnfast._closure.certificate import ERROR_PER_DEPARTURE
from dlnfast._closure.closure import LARGEST_SHARE, closure
from dlnfast._support.products import multiply

F64 = np.float64
DIM, RANK, CLASSES = 20, 3, 4


def square_case(*, seed=0, dim=DIM, rank=RANK, n_layers=3, scale=0.5, **options):
    return dln.low_rank_recovery(dim, rank, seed), dln.orthogonal(
        [dim] * (n_layers + 1), scale, seed, **options
    )


def wide_case(seed=0):
    rng = np.random.default_rng(seed)
    return dln.Problem(rng.standard_normal((CLASSES, DIM))), dln.orthogonal([DIM] * 3 + [CLASSES], 0.5, seed)


def names_of(checks):
    return [check.name for check in checks]


def assumptions_of(problem, weights, **options):
    return closure(problem, weights, **options).assumptions


# The settings of the theory: name -> (problem, weights, dims, families as (first, last, multiplicity,
# coupling)).

D = 40


def spiked():
    spikes = np.random.default_rng(1).standard_normal((D, 2)) / np.sqrt(10)
    gram = np.eye(D) + spikes @ spikes.T
    return dln.Problem(draw_low_rank_target(D, D, rank=RANK).dense() @ gram, gram)


def orthonormal_samples(*, n_samples=25, dim_out=D):
    rng = np.random.default_rng(2)
    X = draw_orthonormal(rng, D, n_samples)
    Y = rng.standard_normal((dim_out, RANK)) @ rng.standard_normal((RANK, n_samples)) / 10
    return dln.Problem.from_data(X, Y, reduction="sum")


def uneven_samples(*, n_samples=8):
    """Return a problem on samples of very different lengths: their span is exact, powers of S are not."""
    rng = np.random.default_rng(5)
    X = 0.2 * rng.standard_normal((D, n_samples)) * np.logspace(0, -3, n_samples)
    return dln.Problem.from_data(X, rng.standard_normal((RANK, n_samples)), reduction="sum")


def three_eigenvalues():
    gram = np.diag(np.r_[np.full(20, 1.0), np.full(12, 2.0), np.full(8, 0.5)])
    return dln.Problem(draw_low_rank_target(D, D, rank=RANK).dense() @ gram, gram)


def make_recovery(dim_out, dim_in, *, rank=RANK):
    return dln.Problem(draw_low_rank_target(dim_out, dim_in, rank=rank))


def closure_case(name):
    problem, widths, dims, families = {
        "square": lambda: (make_recovery(D, D), [D] * 4, [6] * 4, [(1, 3, 34, 1.0)]),
        "two layers": lambda: (make_recovery(D, D), [D] * 3, [6] * 3, [(1, 2, 34, 1.0)]),
        "one layer": lambda: (make_recovery(D, D), [D] * 2, [6] * 2, [(1, 1, 34, 1.0)]),
        "S = 2 I": lambda: (
            dln.Problem(2 * draw_low_rank_target(D, D, rank=RANK).dense(), 2 * np.eye(D)),
            [D] * 4,
            [6] * 4,
            [(1, 3, 34, 2.0)],
        ),
        "spiked covariance": lambda: (spiked(), [D] * 4, [8] * 4, [(1, 3, 32, 1.0)]),
        "N < d orthonormal": lambda: (
            orthonormal_samples(),
            [D] * 4,
            [9] * 4,
            [(1, 3, 19, 1.0), (1, 3, 12, 0.0)],
        ),
        "N < d, wide target": lambda: (
            orthonormal_samples(dim_out=RANK),
            [D, D, D, RANK],
            [9, 9, 9, 3],
            [(1, 2, 31, 0.0)],
        ),
        "few samples": lambda: (
            uneven_samples(),
            [D, D, D, RANK],
            [11, 11, 11, 3],
            [(1, 2, 29, 0.0)],
        ),
        "three eigenvalues": lambda: (
            three_eigenvalues(),
            [D] * 4,
            [18] * 4,
            [(1, 3, 6, 2.0), (1, 3, 14, 1.0), (1, 3, 2, 0.5)],
        ),
        "d_x < d": lambda: (
            make_recovery(D, 20),
            [20, D, D, D],
            [6, 9, 9, 9],
            [(1, 3, 14, 1.0), (2, 3, 17, 0.0)],
        ),
        "d_x > d": lambda: (make_recovery(30, 50), [50, 30, 30, 30], [9, 6, 6, 6], [(1, 3, 24, 1.0)]),
        "tall last": lambda: (make_recovery(60, D), [D, D, D, 60], [6, 6, 6, 9], [(1, 3, 34, 1.0)]),
        "wide last, r < K": lambda: (
            make_recovery(25, D),
            [D, D, D, 25],
            [9, 9, 9, 6],
            [(1, 3, 19, 1.0), (1, 2, 12, 0.0)],
        ),
        "K": lambda: (make_recovery(4, D, rank=4), [D, D, D, 4], [8, 8, 8, 4], [(1, 2, 32, 0.0)]),
        "K, d_x < d": lambda: (
            make_recovery(4, 30, rank=4),
            [30, D, D, 4],
            [8, 12, 12, 4],
            [(1, 2, 22, 0.0), (2, 2, 6, 0.0)],
        ),
        "K, d_x > d": lambda: (make_recovery(4, 50, rank=4), [50, D, D, 4], [12, 8, 8, 4], [(1, 2, 32, 0.0)]),
        "valley": lambda: (make_recovery(D, 50), [50, 30, 30, D], [9, 6, 6, 9], [(1, 3, 24, 1.0)]),
        "staircase": lambda: (
            make_recovery(20, 60),
            [60, 50, 40, 20],
            [15, 12, 9, 6],
            [(1, 3, 14, 1.0), (1, 1, 7, 0.0), (1, 2, 17, 0.0)],
        ),
        "rank 0": lambda: (make_recovery(D, D, rank=0), [D] * 4, [0] * 4, [(1, 3, D, 1.0)]),
    }[name]()
    return problem, dln.orthogonal(widths, [0.6, 0.5, 0.7][: len(widths) - 1], 1), dims, families


SETTINGS = [
    "square",
    "two layers",
    "one layer",
    "S = 2 I",
    "spiked covariance",
    "N < d orthonormal",
    "N < d, wide target",
    "few samples",
    "three eigenvalues",
    "d_x < d",
    "d_x > d",
    "tall last",
    "wide last, r < K",
    "K",
    "K, d_x < d",
    "K, d_x > d",
    "valley",
    "staircase",
    "rank 0",
]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_closure_has_the_dimensions_of_the_theory(name):
    problem, weights, dims, families = closure_case(name)
    space = closure(problem, weights)
    assert space.holds, space.report()
    assert list(space.dims) == dims
    found = [(f.first, f.last, f.multiplicity, f.coupling) for f in space.families]
    assert [f[:3] for f in found] == [f[:3] for f in families]
    np.testing.assert_allclose([f[3] for f in found], [f[3] for f in families], atol=1e-12)
    assert_invariant(problem, weights, space)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("name", SETTINGS)
def test_reduced_runs_are_exact_in_every_setting(name, momentum):
    problem, weights, _, _ = closure_case(name)
    n_layers = len(weights)
    rates = {
        "learning_rate": [0.01, 0.008, 0.012][:n_layers],
        "weight_decay": [1e-3, 0.0, 2e-3][:n_layers],
        "momentum": momentum,
        "steps": 500,
        "record": dln.Record(every=25),
    }
    reduced = dln.train(problem, weights, engine="reduced", **rates)
    dense = dln.train(problem, weights, engine="dense", **with_record(rates, weights_every=25))
    if problem.target_factors().rank:
        assert dense.loss[-1] < 0.7 * dense.loss[0]
    np.testing.assert_allclose(reduced.loss, dense.loss, rtol=0, atol=1e-12 * dense.loss[0])
    rng = np.random.default_rng(3)
    for layer in range(1, n_layers + 1):
        for step in reduced.steps:
            wanted = dense.weights(layer, step)
            size = np.linalg.norm(wanted)
            assert np.linalg.norm(reduced.weights(layer, step) - wanted) <= 1e-12 * size
        # Operators give the same without the array.
        operator = reduced.layer(layer, 250)
        wanted = dense.weights(layer, 250)
        size = np.linalg.norm(wanted, 2)
        X, Y = rng.standard_normal((wanted.shape[1], 3)), rng.standard_normal((wanted.shape[0], 3))
        assert np.linalg.norm(operator @ X - wanted @ X) <= 1e-12 * size * np.linalg.norm(X)
        assert np.linalg.norm(operator.apply_transpose(Y) - wanted.T @ Y) <= 1e-12 * size * np.linalg.norm(Y)
        assert np.abs(operator.column(1) - wanted[:, 1]).max() <= 1e-12 * size
        assert np.abs(operator.row(2) - wanted[2]).max() <= 1e-12 * size
        assert abs(operator.entry(2, 1) - wanted[2, 1]) <= 1e-12 * size
        values = dense.singular_values(layer)
        np.testing.assert_allclose(reduced.singular_values(layer), values, rtol=0, atol=1e-12 * values.max())


def test_the_naive_basis_fails_where_the_closure_is_exact():
    """On a tall first layer, the 2r directions of the square case are not invariant."""
    problem, weights, _, _ = closure_case("d_x < d")
    factors = problem.target_factors()
    rotations = [w / e for w, e in zip(weights, [0.6, 0.5, 0.7], strict=True)]
    whole = rotations[2] @ rotations[1] @ rotations[0]
    naive = [np.linalg.qr(np.hstack([factors.V, whole.T @ factors.U]))[0]]
    for q in rotations:
        naive.append(np.linalg.qr(q @ naive[-1])[0])
    # The off-block energy: what the gradient of W_2 moves out of the bases.
    gradient = dln.gradients(problem, weights)[1]

    def off_block(below, above):
        image = gradient @ below
        return np.linalg.norm(image - above @ (above.T @ image)) / np.linalg.norm(image)

    assert off_block(naive[1], naive[2]) > 0.1
    space = closure(problem, weights)
    assert off_block(space.bases[1], space.bases[2]) <= 1e-14
    # A run in the naive bases, by the same reduced recursion, departs from the dense run.
    cores = [b.T @ w @ a for a, w, b in zip(naive, weights, naive[1:], strict=False)]
    small = dln.Problem(naive[-1].T @ problem.dense_target() @ naive[0])
    rates = {"learning_rate": 0.01, "steps": 200, "engine": "dense", "record": dln.Record(every=200)}
    inner = dln.train(small, cores, **rates)
    dense = dln.train(problem, weights, **rates)
    change = dense.weights(2) - weights[1]
    naive_change = naive[2] @ (inner.weights(2) - cores[1]) @ naive[1].T
    part = naive[2] @ (naive[2].T @ change @ naive[1]) @ naive[1].T
    assert np.linalg.norm(part - naive_change) > 0.05 * np.linalg.norm(change)


@pytest.mark.parametrize("name", SETTINGS)
def test_subspaces_equal_those_of_the_reference(name):
    problem, weights, _, _ = closure_case(name)
    space = closure(problem, weights)
    plain = reference.closed_subspaces(weights, problem.dense_target(), problem.input_gram)
    for ours, theirs in zip(space.bases, plain, strict=True):
        assert ours.shape == theirs.shape
        # Directions of a sum of subspaces are known to rounding over their separation.
        assert np.linalg.norm(ours - theirs @ (theirs.T @ ours)) <= 1e3 * tolerance(F64, D)


@settings(deadline=None, max_examples=60)
@given(
    dim=st.integers(1, 24),
    n_layers=st.integers(1, 4),
    classes=st.integers(1, 24),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([F64, np.float32]),
    data=st.data(),
)
def test_closed_subspaces_are_invariant(dim, n_layers, classes, seed, dtype, data):
    dim_out = dim if classes >= dim else classes
    rank = data.draw(st.integers(0, min(dim, dim_out)))
    problem = dln.Problem(draw_low_rank_target(dim_out, dim, rank=rank, seed=seed))
    scales = 0.3 + np.arange(n_layers) / 3
    weights = dln.orthogonal([dim] * n_layers + [dim_out], scales.tolist(), seed, dtype=dtype)
    space = closure(problem, weights, largest_share=1.0)
    assert space.holds, space.report()
    assert_invariant(problem, weights, space)
    if dim_out == dim and dtype is F64:
        # In general position; small overlaps may hide a direction in single precision.
        assert space.dims[0] == min(dim, 2 * rank)
    for family in space.families:
        np.testing.assert_allclose(
            family.rho, scales[family.first - 1 : family.last], rtol=4 * tolerance(dtype, dim)
        )


def assert_invariant(problem, weights, space):
    """Phi A_0 in A_L, Phi^T A_L in A_0, W_l A_{l-1} in A_l, W_l^T A_l in A_{l-1}, S A_0 in A_0."""
    dtype = weights[0].dtype
    # Directions below 1024 eps, the tolerance of the closure, are dropped.
    allowed = 1024 * np.finfo(dtype).eps * np.sqrt(max(*space.dims, 1))
    phi = problem.dense_target()
    phi = phi / max(np.linalg.norm(phi, 2), 1e-300)
    bases = [basis.astype(F64) for basis in space.bases]

    def outside(image, basis):
        return np.linalg.norm(image - basis @ (basis.T @ image))

    for basis in bases:
        assert np.linalg.norm(basis.T @ basis - np.eye(basis.shape[1])) <= tolerance(dtype, len(basis), 10)
    assert outside(phi @ bases[0], bases[-1]) <= allowed
    assert outside(phi.T @ bases[-1], bases[0]) <= allowed
    for layer, weight in enumerate(weights):
        size = max(np.linalg.norm(weight, 2), 1e-300)
        assert outside(weight @ bases[layer], bases[layer + 1]) <= allowed * size
        assert outside(weight.T @ bases[layer + 1], bases[layer]) <= allowed * size
        core = bases[layer + 1].T @ weight @ bases[layer]
        assert np.linalg.norm(space.cores[layer] - core) <= allowed * size
    if problem.input_gram is not None:
        gram = problem.input_gram / np.linalg.norm(problem.input_gram, 2)
        assert outside(gram @ bases[0], bases[0]) <= allowed
        assert np.linalg.norm(space.input_gram - bases[0].T @ problem.input_gram @ bases[0]) <= allowed
    target = bases[-1].T @ problem.dense_target() @ bases[0]
    assert np.linalg.norm(space.target - target) <= allowed * max(np.linalg.norm(target), 1e-300)
    assert max(space.residuals) <= allowed


# Special weights.


@pytest.mark.parametrize("case", [1, 2])
def test_aligned_weights_have_the_smallest_subspaces(case):
    dim_out = DIM if case == 1 else CLASSES
    problem = dln.Problem(draw_low_rank_target(dim_out, DIM, rank=RANK))
    weights = dln.aligned(problem, [DIM, DIM, DIM, dim_out], 0.5)
    space = closure(problem, weights)
    assert space.holds
    assert_invariant(problem, weights, space)
    assert space.dims == (RANK,) * 4
    # All matrices are diagonal, so only the modes of the target interact.
    product = space.cores[2] @ space.cores[1] @ space.cores[0]
    directions = space.bases[-1].T @ problem.target.U, space.bases[0].T @ problem.target.V
    modes = directions[0].T @ product @ directions[1]
    np.testing.assert_allclose(modes, 0.5**3 * np.eye(RANK), atol=tolerance(F64, DIM, 3))


@pytest.mark.parametrize("last", ["zero", "rank 1", "far from orthogonal"])
def test_any_wide_last_layer_has_a_closure(last):
    problem, weights = wide_case()
    rng = np.random.default_rng(3)
    weights[-1] = {
        "zero": np.zeros((CLASSES, DIM)),
        "rank 1": np.outer(rng.standard_normal(CLASSES), rng.standard_normal(DIM)),
        "far from orthogonal": rng.standard_normal((CLASSES, DIM)) * np.logspace(0, -3, CLASSES)[:, None],
    }[last]
    space = closure(problem, weights)
    assert_invariant(problem, weights, space)
    assert space.holds
    assert space.dims[0] == CLASSES + {"zero": 0, "rank 1": 1, "far from orthogonal": CLASSES}[last]


@pytest.mark.parametrize("end", ["last", "first"])
def test_a_thin_last_layer_that_is_not_an_isometry_is_included(end):
    """A target of rank r < K leaves K - r rows, in which a Gaussian layer is not an isometry."""
    rng = np.random.default_rng(4)
    if end == "last":
        problem, weights = make_recovery(6, D, rank=2), dln.orthogonal([D, D, D, 6], 0.5)
        weights[-1] = rng.standard_normal((6, D)) / 8
    else:
        problem, weights = make_recovery(D, 6, rank=2), dln.orthogonal([6, D, D, D], 0.5)
        weights[0] = rng.standard_normal((D, 6)) / 8
    space = closure(problem, weights)
    assert space.holds
    assert space.dims[-1 if end == "last" else 0] == 6
    rates = {"learning_rate": 0.05, "steps": 100, "record": dln.Record(every=100)}
    reduced = dln.train(problem, weights, engine="reduced", **rates)
    dense = dln.train(problem, weights, engine="dense", **rates)
    for layer in (1, 2, 3):
        wanted = dense.weights(layer)
        assert np.linalg.norm(reduced.weights(layer) - wanted) <= 1e-12 * np.linalg.norm(wanted)


def test_a_zero_layer_has_a_closure_and_stays_zero_outside():
    """Outside the active subspaces a layer that is zero stays zero, and its neighbours only decay."""
    problem, weights = square_case()
    weights[1] = np.zeros_like(weights[1])
    rates = {"learning_rate": 0.5, "steps": 50, "weight_decay": 1e-3}
    run = dln.train(problem, weights, engine="reduced", **rates)
    dense = dln.train(problem, weights, engine="dense", **rates)
    assert np.all(run.rho(2) == 0.0)
    for layer in (1, 2, 3):
        assert np.linalg.norm(run.weights(layer) - dense.weights(layer)) <= 1e-12


def test_a_trained_network_has_a_closure():
    """A second run starts from a scaled isometry plus what was learned, in the same subspaces."""
    problem, weights = make_recovery(D, D), dln.orthogonal([D] * 4, 0.5)
    rates = {"learning_rate": 0.02, "record": dln.Record(every=100)}
    first = dln.train(problem, weights, steps=100, **rates)
    again = dln.train(problem, [first.weights(layer) for layer in (1, 2, 3)], steps=100, **rates)
    whole = dln.train(problem, weights, steps=200, **rates)
    assert again.engine == "reduced"
    assert again.certificate.assumptions.dims == (2 * RANK,) * 4
    for layer in (1, 2, 3):
        wanted = whole.weights(layer)
        assert np.linalg.norm(again.weights(layer) - wanted) <= 1e-12 * np.linalg.norm(wanted)


# Measurements where no closure exists.


@pytest.mark.parametrize(("make", "n_rotations"), [(square_case, 3), (wide_case, 3)])
def test_a_network_that_satisfies_the_theorem_passes_all_checks(make, n_rotations):
    found = assumptions_of(*make())
    assert found.hold
    assert found.failures == ()
    rotations = [f"rotation of layer {layer}" for layer in range(1, n_rotations + 1)]
    assert names_of(found.checks) == [
        "shapes",
        "whitened inputs",
        *rotations,
        "rank of the target",
        "closure",
    ]
    assert found.dims == ((2 * RANK,) * 4 if make is square_case else (2 * CLASSES,) * 3 + (CLASSES,))
    assert found.expected_error < tolerance(F64, DIM)


@pytest.mark.parametrize(
    "widths",
    [
        [40, 40, 40],
        [40, 40],
        [40, 40, 4],
        [40, 4],
        [40, 40, 60],
        [40, 35, 40],
        [30, 40, 40],
        [60, 40, 40],
        [30, 40, 4],
        # A bulge this small is included as a whole.
        [40, 50, 48],
    ],
)
def test_shapes_without_a_large_bulge_have_a_closure(widths):
    space = closure(make_recovery(widths[-1], widths[0], rank=2), dln.orthogonal(widths))
    assert space.holds is True, space.report()


@pytest.mark.parametrize("widths", [[40, 60, 40], [40, 60, 80, 40]])
def test_a_bulge_has_no_closure_and_the_report_names_it(widths):
    space = closure(make_recovery(widths[-1], widths[0], rank=2), dln.orthogonal(widths))
    assert space.holds is False, space.report()
    (shapes, *_) = space.assumptions.failures
    assert shapes.name == "shapes"
    assert str(widths) in shapes.text
    assert "bulge" in shapes.text
    assert 'engine="dense"' in shapes.remedy


@pytest.mark.parametrize("widths", [[40, 60, 40], [40, 60, 80, 40]])
def test_a_bulge_is_trained_densely_or_refused(widths):
    problem = make_recovery(widths[-1], widths[0], rank=2)
    run = dln.train(problem, dln.orthogonal(widths), learning_rate=0.01, steps=2)
    assert run.engine == "dense"
    with pytest.raises(dln.AssumptionError, match="bulge"):
        dln.train(problem, dln.orthogonal(widths), learning_rate=0.01, steps=2, engine="reduced")


def test_inputs_that_mix_families_have_no_closure():
    """S has two eigenvalues outside the subspaces, which a wide first layer mixes."""
    gram = np.diag(np.r_[np.full(30, 1.0), np.full(30, 2.0)])
    problem = dln.Problem(draw_low_rank_target(40, 60, rank=2).dense() @ gram, gram)
    weights = dln.orthogonal([60, 40, 40])
    space = closure(problem, weights)
    assert not space.holds
    assert dln.train(problem, weights, learning_rate=0.01, steps=2).engine == "dense"


def test_long_lists_of_widths_are_abbreviated():
    problem, _ = square_case()
    text = assumptions_of(problem, dln.orthogonal([DIM] * 31)).checks[0].text
    assert f"[{DIM}, {DIM}, .., {DIM}, {DIM}] (30 layers)" in text


@pytest.mark.parametrize("noise", [0.0, 1e-14])
def test_rounding_does_not_count_as_a_departure_from_a_rotation(noise):
    problem, weights = square_case()
    weights[1] = weights[1] + 0.5 * noise * dln.gaussian([DIM, DIM], seed=9)[0]
    assert closure(problem, weights).holds


@pytest.mark.parametrize("departure", [1e-6, 1e-2])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_departure_of_a_layer_from_a_rotation_is_measured(departure, layer):
    problem, weights = square_case()
    noise = dln.gaussian([DIM, DIM], seed=9)[0]
    weights[layer - 1] = weights[layer - 1] + 0.5 * departure * noise
    found = assumptions_of(problem, weights)
    failure = found.failures[0]
    assert failure.name == f"rotation of layer {layer}"
    gram = weights[layer - 1].T @ weights[layer - 1] / 0.25
    exact = np.linalg.norm(gram - np.eye(DIM)) / np.sqrt(DIM)
    # Estimated from 8 random directions, so to about a third.
    assert exact / 2 <= failure.measured <= 2 * exact
    assert failure.expected_error == pytest.approx(ERROR_PER_DEPARTURE * failure.measured)
    assert f"weights[{layer - 1}] (W_{layer})" in failure.text
    assert "orthogonal" in failure.remedy


@pytest.mark.parametrize("direction", range(3))
def test_a_departure_in_one_direction_is_included_in_the_closure(direction):
    """A layer that is a rotation except for one direction has a closure with a few more directions."""
    problem, weights = square_case(dim=D)
    weights[1] = weights[1].copy()
    weights[1][direction] *= 1 + 1e-3
    space = closure(problem, weights)
    assert space.holds
    # The direction of the row, with a component along each of the 2r.
    assert space.dims == (2 * RANK + 1,) * 4
    assert_invariant(problem, weights, space)


def test_the_departure_of_inputs_from_white_is_measured():
    _, weights = square_case()
    gram = np.diag(np.linspace(1, 1.01, DIM))
    found = assumptions_of(dln.Problem(np.eye(DIM)[:, :2] @ np.eye(DIM)[:2] @ gram, gram), weights)
    failure = found.failures[0]
    assert failure.name == "whitened inputs"
    assert failure.measured == pytest.approx(np.linalg.norm(gram - np.eye(DIM)) / np.sqrt(DIM))
    assert f"{failure.measured:.2e}" in failure.text
    assert "input_gram (S)" in failure.text
    assert 'whiten="zca"' in failure.remedy


def test_the_error_of_whitening_is_reported():
    rng = np.random.default_rng(0)
    problem = dln.Problem.from_data(rng.standard_normal((DIM, 60)), np.arange(60) % 4, whiten="zca")
    found = assumptions_of(problem, dln.orthogonal([DIM] * 3 + [4]))
    assert found.hold
    assert f"{problem.whitening.error:.1e}" in found.checks[1].text


def test_a_target_of_high_rank_is_reported():
    rng = np.random.default_rng(0)
    noisy = draw_low_rank_target(D, D, rank=RANK).dense() + 1e-6 * rng.standard_normal((D, D))
    space = closure(dln.Problem(noisy), dln.orthogonal([D] * 4))
    (failure, _) = space.assumptions.failures
    assert failure.name == "rank of the target"
    assert space.assumptions.checks[0].holds
    assert f"rank above {D // 2} of {D}" in failure.text
    assert "truncated" in failure.remedy


def test_truncated_singular_values_of_the_target_are_reported():
    """Singular values at rounding level count as zero; the report states their effect on the weights."""
    found = assumptions_of(
        dln.Problem(draw_low_rank_target(D, D, rank=RANK).dense()), dln.orthogonal([D] * 4)
    )
    (check,) = [c for c in found.checks if c.name == "rank of the target"]
    assert check.holds
    assert f"rank {RANK} of {D}, the next singular value is" in check.text
    assert 0 < check.expected_error < 1e-14


@pytest.mark.parametrize("departure", [1e-6, 1e-4, 1e-2])
def test_the_expected_error_is_that_of_a_reduced_run(departure):
    """The error of a run in the subspaces of the nearest rotations, after a mode is learned."""
    problem, weights = square_case(scale=0.7)
    problem = dln.Problem(problem.target, loss_scale=1.0)
    noise = dln.gaussian([DIM] * 4, 0.7 * departure, seed=9)
    rough = [w + e for w, e in zip(weights, noise, strict=True)]
    expected = assumptions_of(problem, rough).expected_error
    rates = {"learning_rate": 0.003, "steps": 100}
    reduced, dense = (dln.train(problem, w, **rates) for w in (weights, rough))
    assert (reduced.engine, dense.engine) == ("reduced", "dense")
    error = max(
        np.linalg.norm(reduced.weights(layer) - dense.weights(layer)) / np.linalg.norm(dense.weights(layer))
        for layer in (1, 2, 3)
    )
    # An order of magnitude: 0.57 per unit of departure was measured for the noise of one layer. Three add up.
    assert expected / 5 <= error <= 5 * expected


def test_rounding_in_single_precision_does_not_count_as_a_departure():
    problem, weights = square_case(dtype=np.float32)
    assert closure(problem, weights).holds
    assert not closure(problem, [w.astype(F64) for w in weights]).holds


# The choice of engine, and its report.


def test_the_report_describes_every_assumption():
    space = closure(*square_case())
    text = space.report()
    for part in (
        f"{2 * RANK} of {DIM} dimensions are active",
        f"target (Phi) has rank {RANK} of {DIM}, exactly",
        "input_gram (S) is the identity",
        "weights[2] (W_3) is a scaled isometry",
        "residuals: forward",
        f"complement: one singular value of multiplicity {DIM - 2 * RANK} in layers 1 to 3",
        "with coupling s = 1",
        "expected relative error",
    ):
        assert part in text
    assert "FAILS" not in text
    problem, _ = square_case()
    text = closure(problem, dln.gaussian([DIM] * 4)).report()
    assert text.startswith("no small invariant subspaces were found")
    assert "FAILS  weights[0] (W_1) is not a scaled isometry" in text
    assert "-> start from dln.orthogonal(...)" in text


def test_auto_chooses_the_engine_with_the_smaller_step():
    assert dln.train(*square_case(), learning_rate=0.1, steps=1).engine == "reduced"
    # 2r = 14 of 20 dimensions: the reduced engine would be exact and no smaller.
    run = dln.train(*square_case(rank=7), learning_rate=0.1, steps=1)
    assert run.engine == "dense"
    assert f"within {int(LARGEST_SHARE * DIM)} dimensions" in run.certificate.reason
    forced = dln.train(*square_case(rank=7), learning_rate=0.1, steps=1, engine="reduced")
    assert forced.engine == "reduced"


def test_the_certificate_of_a_square_network_has_the_active_dimensions():
    run = dln.train(*square_case(), learning_rate=0.1, steps=1)
    assert str(run.certificate).startswith(
        f"reduced engine: the closure holds, {2 * RANK} of {DIM} dimensions are active (expected "
    )
    assert 0 <= run.certificate.expected_error < tolerance(F64, DIM)


def test_the_certificate_of_a_wide_last_layer_has_the_dimensions_of_each_width():
    run = dln.train(*wide_case(), learning_rate=0.01, steps=1)
    assert "the closure holds, [8, 8, 8, 4] of [20, 20, 20, 4]" in run.certificate.reason


def test_the_certificate_reports_why_there_is_no_closure():
    problem, _ = square_case()
    run = dln.train(problem, dln.gaussian([DIM] * 4), learning_rate=0.1, steps=1)
    assert str(run.certificate).startswith("dense engine: the theorem does not apply: weights[0] (W_1)")
    assert run.certificate.expected_error == 0.0


def test_the_certificate_reports_that_the_engine_was_requested():
    problem, weights = square_case()
    run = dln.train(problem, weights, learning_rate=0.1, steps=1, engine="dense")
    assert run.certificate.assumptions is None
    assert str(run.certificate) == "dense engine: engine='dense' was asked for"


def test_one_line_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="dlnfast"):
        run = dln.train(*square_case(), learning_rate=0.1, steps=1)
    assert caplog.messages == [str(run.certificate)]


def test_a_forced_reduced_engine_names_every_failed_assumption():
    weights = dln.gaussian([DIM] * 4)
    problem = dln.Problem(np.eye(DIM), np.diag(np.linspace(1, 2, DIM)))
    with pytest.raises(dln.AssumptionError) as caught:
        dln.train(problem, weights, learning_rate=0.1, steps=1, engine="reduced")
    text = str(caught.value)
    for part in (
        "input_gram (S)",
        "weights[0] (W_1)",
        "weights[1] (W_2)",
        "weights[2] (W_3)",
        "limit",
        "whiten",
        "dln.orthogonal",
        'engine="dense"',
        "would be wrong by about",
    ):
        assert part in text
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("engine", ["auto", "dense"])
@pytest.mark.parametrize("white", [True, False])
def test_certificates_can_be_stored_as_json(engine, white):
    problem, weights = square_case()
    if not white:
        problem = dln.Problem(problem.target, np.diag(np.linspace(1, 2, DIM)))
    run = dln.train(problem, weights, learning_rate=0.1, steps=1, engine=engine)
    text = json.dumps(run.certificate.to_dict(), allow_nan=False)
    assert dln.Certificate.from_dict(json.loads(text)) == run.certificate


def test_errors_name_bad_weights():
    problem, weights = square_case()
    broken = [weights[0], weights[1] * np.nan, weights[2]]
    with pytest.raises(ValueError, match=r"weights\[1\] \(W_2\)"):
        closure(problem, broken)
    with pytest.raises(dln.ShapeError, match=r"weights\[2\] \(W_3\)"):
        closure(problem, [*weights[:2], np.eye(DIM + 1, DIM)])
    with pytest.raises(TypeError, match=r"weights\[1\] \(W_2\) is float32"):
        closure(problem, [weights[0], weights[1].astype(np.float32), weights[2]])
    with pytest.raises(ValueError, match="largest_share"):
        closure(problem, weights, largest_share=-1.0)
    assert len(repr(closure(problem, weights))) < 200


def test_no_argument_is_changed():
    problem, weights = wide_case()
    before = [w.copy() for w in weights]
    closure(problem, weights)
    assert all(np.array_equal(a, b) for a, b in zip(before, weights, strict=True))


def test_multiply_equals_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 7)), rng.standard_normal((5, 3))
    allowed = tolerance(F64, 7) * np.linalg.norm(a) * np.linalg.norm(b)
    assert np.abs(multiply(a, b, transpose_a=True) - a.T @ b).max() <= allowed
    assert np.abs(multiply(a.T, b) - a.T @ b).max() <= allowed
    assert np.abs(multiply(a, a[:2], transpose_b=True) - a @ a[:2].T).max() <= allowed


def test_large_targets_of_low_rank_need_no_full_decomposition():
    rng = np.random.default_rng(0)
    problem = dln.Problem(rng.standard_normal((700, 4)) @ rng.standard_normal((4, 600)))
    assert not problem.rank_exceeds(4)
    assert problem.rank_exceeds(3)
    exact = np.linalg.svd(problem.target, compute_uv=False)[:4]
    np.testing.assert_allclose(problem.target_factors().s, exact, rtol=100 * tolerance(F64, 700))  # cond. 100
    full = dln.Problem(rng.standard_normal((600, 600)))
    assert full.rank_exceeds(150)
    assert full.target_factors().rank == 600


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-80, 1e80, 1e155])
def test_the_certificate_does_not_depend_on_the_scale_of_the_weights(scale):
    """Squares of such entries vanish or overflow; subspaces and residuals are relative."""
    problem = dln.low_rank_recovery(20, 2)
    plain = dln.closure(problem, dln.orthogonal([20] * 3, scale=1.0, seed=0))
    found = dln.closure(problem, dln.orthogonal([20] * 3, scale=scale, seed=0))
    assert found.holds
    assert found.dims == plain.dims
    assert [f.multiplicity for f in found.families] == [f.multiplicity for f in plain.families]
    np.testing.assert_allclose(found.families[0].rho, scale, rtol=tolerance(F64, 20))
    assert max(found.residuals) <= 4 * tolerance(F64, 20)


@pytest.mark.parametrize("dtype", [F64, np.float32])
def test_directions_outside_the_range_of_the_inputs_are_not_coupled(dtype):
    """Eigenvalues of S that are rounding are zero, and those inside the subspaces are not counted outside."""
    rng = np.random.default_rng(0)
    X = draw_orthonormal(rng, 40, 2)
    Y = draw_orthonormal(rng, 40, 2) * [3.0, 2.0]
    problem = dln.Problem.from_data(X, Y, reduction="sum")
    found = dln.closure(problem, dln.orthogonal([40] * 4, scale=0.5, seed=0, dtype=dtype))
    assert found.holds
    assert [(f.multiplicity, f.coupling) for f in found.families] == [(36, 0.0)]
