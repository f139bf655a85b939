"""Does the theorem hold here, and in which bases? What is measured, what is said about it, what follows."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference
from dlnfast.closure import ERROR_PER_DEPARTURE, active_subspaces, check_assumptions, multiply

F64 = np.float64
DIM, RANK, CLASSES = 20, 3, 4


def square_case(seed=0, dim=DIM, rank=RANK, n_layers=3, scale=0.5, **options):
    return dln.low_rank_recovery(dim, rank, seed), dln.orthogonal(
        [dim] * (n_layers + 1), scale, seed, **options
    )


def wide_case(seed=0):
    rng = np.random.default_rng(seed)
    return dln.Problem(rng.standard_normal((CLASSES, DIM))), dln.orthogonal([DIM] * 3 + [CLASSES], 0.5, seed)


def names_of(checks):
    return [check.name for check in checks]


# What is measured.


@pytest.mark.parametrize(("make", "case", "n_rotations"), [(square_case, 1, 3), (wide_case, 2, 2)])
def test_a_case_of_the_theorem_passes_all_checks(make, case, n_rotations):
    found = check_assumptions(*make())
    assert found.hold
    assert found.failures == ()
    assert found.case == case
    rotations = [f"rotation of layer {layer}" for layer in range(1, n_rotations + 1)]
    assert names_of(found.checks) == ["shapes", "whitened inputs", *rotations]
    np.testing.assert_allclose(found.scales, 0.5, rtol=tolerance(F64, DIM))
    assert found.active_dim == (2 * RANK if case == 1 else 2 * CLASSES)
    assert found.expected_error < tolerance(F64, DIM)


@pytest.mark.parametrize(
    ("widths", "case"),
    [
        ([6, 6, 6], 1),
        ([6, 6], 1),
        ([6, 6, 2], 2),
        ([6, 2], 2),
        ([6, 6, 9], 0),
        ([6, 5, 6], 0),
        ([4, 6, 6], 0),
        ([8, 6, 6], 0),
        ([6, 6, 2, 2], 0),
    ],
)
def test_which_shapes_fit(widths, case):
    problem = dln.Problem(np.random.default_rng(0).standard_normal((widths[-1], widths[0])))
    found = check_assumptions(problem, dln.orthogonal(widths))
    assert found.case == case
    assert (found.checks[0].measured <= found.checks[0].limit) == (case > 0)
    assert str(widths) in found.checks[0].text
    assert 'engine="dense"' in found.checks[0].remedy


def test_long_lists_of_widths_are_shortened():
    problem, _ = square_case()
    text = check_assumptions(problem, dln.orthogonal([DIM] * 31)).checks[0].text
    assert f"[{DIM}, {DIM}, .., {DIM}, {DIM}] (30 layers)" in text


@pytest.mark.parametrize("noise", [0.0, 1e-14])
def test_rounding_is_no_departure(noise):
    problem, weights = square_case()
    weights[1] = weights[1] + 0.5 * noise * dln.gaussian([DIM, DIM], seed=9)[0]
    assert check_assumptions(problem, weights).hold


@pytest.mark.parametrize("departure", [1e-12, 1e-6, 1e-2])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_layer_that_is_no_rotation_is_measured(departure, layer):
    problem, weights = square_case()
    noise = dln.gaussian([DIM, DIM], seed=9)[0]
    weights[layer - 1] = weights[layer - 1] + 0.5 * departure * noise
    found = check_assumptions(problem, weights)
    assert names_of(found.failures) == [f"rotation of layer {layer}"]
    (failure,) = found.failures
    gram = weights[layer - 1].T @ weights[layer - 1] / found.scales[layer - 1] ** 2
    exact = np.linalg.norm(gram - np.eye(DIM)) / np.sqrt(DIM)
    # Estimated from 8 random directions, so to about a third.
    assert exact / 2 <= failure.measured <= 2 * exact
    assert failure.expected_error == pytest.approx(ERROR_PER_DEPARTURE * failure.measured)
    assert f"weights[{layer - 1}] (W_{layer})" in failure.text
    assert "orthogonal" in failure.remedy


@pytest.mark.parametrize("direction", range(3))
def test_a_departure_in_one_direction_is_seen(direction):
    problem, weights = square_case()
    weights[1] = weights[1].copy()
    weights[1][direction] *= 1 + 1e-6
    found = check_assumptions(problem, weights)
    assert names_of(found.failures) == ["rotation of layer 2"]
    exact = 2e-6 / np.sqrt(DIM)
    # The mean of eight chi-square numbers.
    assert 0.3 * exact <= found.failures[0].measured <= 3 * exact


@pytest.mark.parametrize("zero", [0, 2])
def test_a_zero_layer_is_no_rotation(zero):
    problem, weights = square_case()
    weights[zero] = np.zeros_like(weights[zero])
    found = check_assumptions(problem, weights)
    assert f"weights[{zero}] (W_{zero + 1})" in found.failures[0].text
    assert "is zero" in found.failures[0].text
    assert dln.train(problem, weights, learning_rate=0.1, steps=1).engine == "dense"


def test_inputs_that_are_not_white_are_measured():
    _, weights = square_case()
    gram = np.diag(np.linspace(1, 1.01, DIM))
    found = check_assumptions(dln.Problem(np.eye(DIM), gram), weights)
    assert names_of(found.failures) == ["whitened inputs"]
    (failure,) = found.failures
    assert failure.measured == pytest.approx(np.linalg.norm(gram - np.eye(DIM)) / np.sqrt(DIM))
    assert f"{failure.measured:.2e}" in failure.text
    assert "input_gram (S)" in failure.text
    assert 'whiten="zca"' in failure.remedy


def test_the_error_of_whitening_is_told():
    rng = np.random.default_rng(0)
    problem = dln.Problem.from_data(rng.standard_normal((DIM, 60)), np.arange(60) % 4, whiten="zca")
    found = check_assumptions(problem, dln.orthogonal([DIM] * 3 + [4]))
    assert found.hold
    assert f"{problem.whitening.error:.1e}" in found.checks[1].text


@pytest.mark.parametrize("departure", [1e-6, 1e-4, 1e-2])
def test_the_expected_error_is_that_of_a_reduced_run(departure):
    """What a run in the subspaces of the nearest rotations misses, once a mode is learned."""
    problem, weights = square_case(scale=0.7)
    problem = dln.Problem(problem.target, loss_scale=1.0)
    noise = dln.gaussian([DIM] * 4, 0.7 * departure, seed=9)
    rough = [w + e for w, e in zip(weights, noise, strict=True)]
    expected = check_assumptions(problem, rough).expected_error
    rates = {"learning_rate": 0.003, "steps": 100}
    reduced, dense = (dln.train(problem, w, **rates) for w in (weights, rough))
    assert (reduced.engine, dense.engine) == ("reduced", "dense")
    error = max(
        np.linalg.norm(reduced.weights(layer) - dense.weights(layer)) / np.linalg.norm(dense.weights(layer))
        for layer in (1, 2, 3)
    )
    # A figure of order: per unit of departure, 0.57 was measured for one layer's noise. Three add up here.
    assert expected / 5 <= error <= 5 * expected


def test_rounding_in_single_precision_is_no_departure():
    problem, weights = square_case(dtype=np.float32)
    assert check_assumptions(problem, weights).hold
    assert not check_assumptions(problem, [w.astype(F64) for w in weights]).hold


# What is chosen, and what is said about it.


def test_auto_takes_the_smaller_engine():
    assert dln.train(*square_case(), learning_rate=0.1, steps=1).engine == "reduced"
    # 2r = 14 of 20 dimensions: the reduced engine would be exact and no smaller.
    run = dln.train(*square_case(rank=7), learning_rate=0.1, steps=1)
    assert run.engine == "dense"
    assert "would not be smaller" in run.certificate.reason
    assert run.certificate.assumptions.hold
    forced = dln.train(*square_case(rank=7), learning_rate=0.1, steps=1, engine="reduced")
    assert forced.engine == "reduced"


def test_the_certificate_says_which_and_why():
    run = dln.train(*square_case(), learning_rate=0.1, steps=1)
    assert str(run.certificate).startswith(
        f"reduced engine: case 1 of the theorem holds, {2 * RANK} of {DIM} dimensions are active (expected "
    )
    assert 0 <= run.certificate.expected_error < tolerance(F64, DIM)
    run = dln.train(*wide_case(), learning_rate=0.01, steps=1)
    assert f"case 2 of the theorem holds, {2 * CLASSES} of {DIM}" in run.certificate.reason

    problem, weights = square_case()
    run = dln.train(problem, dln.gaussian([DIM] * 4), learning_rate=0.1, steps=1)
    assert str(run.certificate).startswith("dense engine: the theorem does not apply: weights[0] (W_1)")
    assert run.certificate.expected_error == 0.0
    run = dln.train(problem, weights, learning_rate=0.1, steps=1, engine="dense")
    assert run.certificate.assumptions is None
    assert str(run.certificate) == "dense engine: engine='dense' was asked for"


def test_one_line_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="dlnfast"):
        run = dln.train(*square_case(), learning_rate=0.1, steps=1)
    assert caplog.messages == [str(run.certificate)]


def test_a_forced_reduced_engine_says_every_obstacle():
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
def test_certificates_survive_json(engine, white):
    problem, weights = square_case()
    if not white:
        problem = dln.Problem(problem.target, 2 * np.eye(DIM))
    run = dln.train(problem, weights, learning_rate=0.1, steps=1, engine=engine)
    text = json.dumps(run.certificate.to_dict(), allow_nan=False)
    assert dln.Certificate.from_dict(json.loads(text)) == run.certificate


# The subspaces themselves.


def bases_of(problem, weights):
    found = active_subspaces(problem, weights, check_assumptions(problem, weights))
    bases = [np.eye(problem.dim_out) if basis is None else basis for basis in found.bases]
    return found, bases


def assert_invariant(problem, weights, found, bases):
    """Phi A_0 in A_L, Phi^T A_L in A_0, W_l A_{l-1} in A_l, W_l^T A_l in A_{l-1}."""
    allowed = tolerance(F64, problem.dim_in, len(weights)) * 10  # relative to 1, for 10 columns at most
    phi = problem.dense_target()
    phi = phi / max(np.linalg.norm(phi, 2), 1e-300)

    def outside(image, basis):
        return np.linalg.norm(image - basis @ (basis.T @ image))

    for basis in bases:
        assert np.linalg.norm(basis.T @ basis - np.eye(basis.shape[1])) <= allowed
    assert outside(phi @ bases[0], bases[-1]) <= allowed
    assert outside(phi.T @ bases[-1], bases[0]) <= allowed
    for layer, weight in enumerate(weights):
        size = max(np.linalg.norm(weight, 2), 1e-300)
        assert outside(weight @ bases[layer], bases[layer + 1]) <= allowed * size
        assert outside(weight.T @ bases[layer + 1], bases[layer]) <= allowed * size
        core = bases[layer + 1].T @ weight @ bases[layer]
        assert np.linalg.norm(found.cores[layer] - core) <= allowed * size
    assert np.linalg.norm(found.target - bases[-1].T @ problem.dense_target() @ bases[0]) <= allowed * (
        np.linalg.norm(problem.dense_target()) + 1e-300
    )


@settings(deadline=None, max_examples=50)
@given(
    dim=st.integers(1, 16),
    n_layers=st.integers(1, 5),
    classes=st.integers(1, 15),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_active_subspaces_are_invariant(dim, n_layers, classes, seed, data):
    square = classes >= dim
    dim_out = dim if square else classes
    rank = data.draw(st.integers(0, min(dim, dim_out)))
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((d, rank)))[0] for d in (dim_out, dim))
    phi = left * np.arange(rank, 0, -1.0) @ right.T
    problem = dln.Problem(phi)
    weights = dln.orthogonal([dim] * n_layers + [dim_out], 0.3 + np.arange(n_layers) / 3, seed)
    found, bases = bases_of(problem, weights)
    assert_invariant(problem, weights, found, bases)
    # In general position: 2r directions, or those of Phi and of the K rows of W_L.
    active = min(dim, 2 * rank if square else rank + dim_out)
    assert bases[0].shape[1] == active
    assert found.multiplicity == dim - active
    scales = (0.3 + np.arange(n_layers) / 3).tolist()
    wanted = scales if square else [*scales[:-1], 0.0]
    np.testing.assert_allclose(found.rho, wanted, rtol=tolerance(F64, dim))


@pytest.mark.parametrize("case", [1, 2])
def test_aligned_weights_have_the_smallest_subspaces(case):
    dim_out = DIM if case == 1 else CLASSES
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((d, RANK)))[0] for d in (dim_out, DIM))
    problem = dln.Problem(dln.LowRank(left, [3.0, 2.0, 1.0], right))
    weights = dln.aligned(problem, [DIM, DIM, DIM, dim_out], 0.5)
    found, bases = bases_of(problem, weights)
    assert_invariant(problem, weights, found, bases)
    assert bases[0].shape[1] == (RANK if case == 1 else CLASSES)


@pytest.mark.parametrize("last", ["zero", "rank 1", "far from orthogonal"])
def test_any_wide_last_layer_closes(last):
    problem, weights = wide_case()
    rng = np.random.default_rng(3)
    weights[-1] = {
        "zero": np.zeros((CLASSES, DIM)),
        "rank 1": np.outer(rng.standard_normal(CLASSES), rng.standard_normal(DIM)),
        "far from orthogonal": rng.standard_normal((CLASSES, DIM)) * np.logspace(0, -6, CLASSES)[:, None],
    }[last]
    found, bases = bases_of(problem, weights)
    assert_invariant(problem, weights, found, bases)
    assert bases[0].shape[1] == CLASSES + {"zero": 0, "rank 1": 1, "far from orthogonal": CLASSES}[last]


def test_they_are_those_of_the_reference():
    for problem, weights in (square_case(), wide_case()):
        found, bases = bases_of(problem, weights)
        plain = reference.active_subspaces(weights, [0.5] * 3, problem.dense_target())
        for ours, theirs in zip(bases, plain, strict=True):
            assert ours.shape == theirs.shape
            angles = reference.principal_angles(ours, theirs)
            # Directions of the union of two subspaces are known to rounding over their separation.
            assert angles.max() <= 100 * tolerance(F64, DIM)
        assert found.multiplicity == DIM - plain[0].shape[1]


def test_no_argument_is_changed():
    problem, weights = wide_case()
    before = [w.copy() for w in weights]
    bases_of(problem, weights)
    assert all(np.array_equal(a, b) for a, b in zip(before, weights, strict=True))


def test_multiply():
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
