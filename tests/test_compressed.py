# SPDX-License-Identifier: MIT
"""Compressed factorisations: their initial bases, the result of training, and frozen bases."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.matrices import draw_orthonormal
from helpers.records import with_record
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference
from dlnfast._completion.train_compressed import project
from dlnfast._training.curvature import curvatures

F64 = np.float64


def layers_of(run, step=-1):
    return [run.weights(layer, step) for layer in range(1, run.n_layers + 1)]


@pytest.fixture(scope="module")
def completion_problem():
    return dln.low_rank_completion(120, 3, 0.35, seed=1)


@pytest.fixture(scope="module")
def start():
    return dln.orthogonal([120] * 4, 1e-2, seed=2)


def test_the_gradient_basis_equals_its_definition(completion_problem, start):
    narrow = dln.compressed_weights(completion_problem, start, rank=3)
    assert [w.shape for w in narrow] == [(6, 120), (6, 6), (6, 6), (6, 6), (120, 6)]
    # By whole decompositions: the leading vectors of the gradient, and their images.
    product = reference.end_to_end(start)
    mask = completion_problem.backprojection().dense() != 0
    u, _, vt = np.linalg.svd(-reference.observed_residual(product, completion_problem.truth.dense(), mask))
    rotation = product / 1e-2**3
    basis = np.linalg.qr(np.hstack([vt[:3].T, rotation.T @ u[:, :3]]))[0]
    assert np.linalg.norm(narrow[0] - narrow[0] @ basis @ basis.T) < 1e-9
    assert np.linalg.norm(narrow[-1] - (rotation @ basis) @ (rotation @ basis).T @ narrow[-1]) < 1e-9
    # The product is that of the wide network inside these spaces.
    inside = reference.end_to_end(narrow)
    np.testing.assert_allclose(inside, product @ basis @ basis.T, atol=1e-9 * 1e-6)
    for core in narrow[1:-1]:
        np.testing.assert_allclose(core @ core.T, 1e-4 * np.eye(6), atol=tolerance(F64, 6))


def test_for_a_fully_observed_matrix_the_narrow_network_equals_the_wide_one():
    problem = dln.low_rank_recovery(60, 4, seed=3)
    weights = dln.orthogonal([60] * 4, 0.2, seed=4)
    settings = {"steps": 300, "learning_rate": 1.0}
    narrow = dln.train_compressed(problem, weights, rank=4, outer=0.0, **settings)
    wide = dln.train(problem, weights, **settings)
    # The difference is the product of the rotations outside, rho^3 each.
    missing = (60 - 8) * np.prod([wide.rho(layer) for layer in (1, 2, 3)], axis=0) ** 2
    at_records = wide.loss - problem.loss_scale / 2 * missing
    np.testing.assert_allclose(narrow.loss, at_records, rtol=1e-9)


def test_learned_bases_recover_where_frozen_bases_stall(completion_problem, start):
    options = {
        "rank": 3,
        "steps": 4000,
        "tolerance": 1e-18,
        "record": dln.Record(every=10**6, singular_values=None),
    }
    moving = dln.train_compressed(completion_problem, start, outer=0.01, **options)
    frozen = dln.train_compressed(completion_problem, start, outer=0.0, **options)
    assert completion_problem.recovery_error(layers_of(moving)) < 1e-6
    assert completion_problem.recovery_error(layers_of(frozen)) > 1e-2


def test_projecting_with_frozen_bases_changes_nothing(completion_problem, start, monkeypatch):
    options = {
        "rank": 3,
        "steps": 200,
        "learning_rate": 20.0,
        "outer": 0.0,
        "record": dln.Record(weights_every=100, singular_values=None),
    }
    projected = dln.train_compressed(completion_problem, start, **with_record(options, singular_values="all"))
    monkeypatch.setattr("dlnfast._completion.train_compressed._PROJECTION_FLOPS", 0.0)
    frozen = dln.train_compressed(completion_problem, start, **with_record(options, singular_values="all"))
    np.testing.assert_allclose(projected.loss, frozen.loss, rtol=1e-9)
    assert projected.widths == frozen.widths
    assert projected.config["learning_rate"] == frozen.config["learning_rate"]
    for layer in range(1, 6):
        for step in (0, 100, 200):
            np.testing.assert_allclose(projected.weights(layer, step), frozen.weights(layer, step), atol=1e-9)
        np.testing.assert_allclose(projected.singular_values(layer), frozen.singular_values(layer), atol=1e-9)


@pytest.mark.parametrize("kind", ["entries", "projected entries", "known target"])
def test_a_schedule_takes_the_steps_of_constant_rates_one_after_the_other(kind):
    """A cosine with weight decay and momentum of every step, without momentum as one run for each step."""
    problem = dln.low_rank_recovery(20, 2) if kind == "known target" else dln.low_rank_completion(20, 2, 0.6)
    weights, outer, steps = dln.orthogonal([20] * 3, 0.7), 0.0 if kind == "projected entries" else 0.3, 8
    rate, decay = dln.Schedule.cosine(20.0, steps, warmup=2), dln.Schedule.piecewise({0: 0.0, 4: 0.01})
    options = {"rank": 2, "outer": outer, "steps": steps}
    run = dln.train_compressed(problem, weights, learning_rate=rate, weight_decay=decay, **options)
    layers = dln.compressed_weights(problem, weights, rank=2)
    for eta, shrinking in zip(rate.values(steps), decay.values(steps), strict=True):
        lambdas = [shrinking if outer else 0.0, *[shrinking] * (len(layers) - 2), shrinking if outer else 0.0]
        etas = [outer * eta, *[eta] * (len(layers) - 2), outer * eta]
        layers = dln.train(
            problem, layers, learning_rate=etas, weight_decay=lambdas, steps=1, engine="dense"
        ).all_weights()
    for found, wanted in zip(run.all_weights(), layers, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance(F64, 20, steps))
    rates = dln.Schedule.from_dict(run.config["learning_rate"]).values(steps)
    np.testing.assert_allclose(rates[:, 1:-1], np.tile(rate.values(steps)[:, None], (1, len(layers) - 2)))
    np.testing.assert_allclose(rates[:, [0, -1]], outer * rates[:, [1, 1]])


@pytest.mark.parametrize("outer", [0.0, 0.1])
def test_a_constant_schedule_equals_the_constant(completion_problem, start, outer, tmp_path):
    """Momentum included, from a function, and in a file."""
    options = {"rank": 3, "steps": 30, "outer": outer}
    plain = dln.train_compressed(completion_problem, start, learning_rate=20.0, momentum=0.9, **options)
    rates = {"learning_rate": dln.Schedule(lambda t: 20.0), "momentum": dln.Schedule.piecewise({0: 0.9})}
    run = dln.train_compressed(completion_problem, start, **rates, **options)
    np.testing.assert_array_equal(run.loss, plain.loss)
    assert run.certificate.reason == plain.certificate.reason
    run.save(tmp_path / "run.npz")
    again = dln.load(tmp_path / "run.npz")
    assert again.config["momentum"] == run.config["momentum"]
    dln.train_compressed(completion_problem, start, **rates, **(options | {"steps": 0}))


@pytest.mark.parametrize("outer", [0.0, 0.1])
def test_a_schedule_of_a_compressed_run_has_one_rate_for_each_step(completion_problem, start, outer):
    options = {"rank": 3, "outer": outer}
    with pytest.raises(dln.ShapeError, match=r"learning_rate \(eta\) has rates of 3 layers; wanted one"):
        dln.train_compressed(
            completion_problem, start, learning_rate=dln.Schedule(np.ones((5, 3))), steps=5, **options
        )
    with pytest.raises(dln.ShapeError, match=r"learning_rate \(eta\): the schedule has 5 values"):
        dln.train_compressed(
            completion_problem, start, learning_rate=dln.Schedule(np.ones(5)), steps=6, **options
        )
    with pytest.raises(ValueError, match="steps is None"):
        dln.train_compressed(completion_problem, start, learning_rate=dln.Schedule([1.0]), **options)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "momentum"])
def test_turns_of_the_outer_layers_have_constant_rates(completion_problem, start, name):
    rates = {"learning_rate": 1.0, name: dln.Schedule.piecewise({0: 0.1})}
    with pytest.raises(
        TypeError, match=rf"{name} is Schedule.piecewise\(.*; wanted a number, or outer_every=1"
    ):
        dln.train_compressed(completion_problem, start, steps=8, outer_every=4, **rates)


def test_a_projected_run_is_saved_like_any(completion_problem, start, tmp_path):
    run = dln.train_compressed(
        completion_problem, start, rank=3, steps=50, outer=0.0, record=dln.Record(singular_values=2)
    )
    run.save(tmp_path / "run.npz")
    again = dln.load(tmp_path / "run.npz")
    np.testing.assert_array_equal(again.end_to_end(), run.end_to_end())
    np.testing.assert_array_equal(again.singular_values(1), run.singular_values(1))
    assert again.config["compressed"] == {
        "rank": 3,
        "basis": "gradient",
        "outer": 0.0,
        "outer_every": 1,
    }


@pytest.mark.parametrize("kind", ["entries", "measurements"])
def test_projected_outer_steps_equal_their_definition(kind):
    problem = dln.low_rank_completion(20, 2, 0.6) if kind == "entries" else dln.low_rank_sensing(20, 2, 300)
    weights = dln.orthogonal([20] * 3, 0.7)
    narrow = dln.compressed_weights(problem, weights, rank=2)
    eta, outer, turn = 0.2 / (problem.loss_scale * problem.density * problem.truth.s[0]), 0.1, 4
    run = dln.train_compressed(
        problem,
        weights,
        rank=2,
        learning_rate=eta,
        outer=outer,
        outer_every=turn,
        steps=10,
        weight_decay=0.01 / eta,
        record=dln.Record(every=10, weights_every=turn, singular_values=None),
    )
    layers = [w.copy() for w in narrow]
    decay, losses = 0.01 / eta, []
    for step in range(11):
        losses.append(problem.loss(layers))
        if step % turn == 0:
            np.testing.assert_allclose(layers_of(run, step)[0], layers[0], atol=1e-12)
            np.testing.assert_allclose(layers_of(run, step)[-1], layers[-1], atol=1e-12)
        gradients = dln.gradients(problem, layers)
        layers[1:-1] = [w - eta * (g + decay * w) for w, g in zip(layers[1:-1], gradients[1:-1], strict=True)]
        if (step + 1) % turn == 0 or step + 1 == 10:
            taken = turn if (step + 1) % turn == 0 else 10 % turn
            gradients = dln.gradients(problem, layers)
            for i in (0, -1):
                layers[i] = layers[i] - outer * eta * taken * (gradients[i] + decay * layers[i])
    np.testing.assert_allclose(run.loss, losses, rtol=1e-10)
    assert run.steps.tolist() == [0, 10]
    assert run.states.snapshot_steps.tolist() == [0, 4, 8]


def test_projected_outer_steps_converge_where_single_steps_do(completion_problem, start):
    options = {"rank": 3, "steps": 3000, "tolerance": 1e-16}
    runs = [dln.train_compressed(completion_problem, start, outer_every=n, **options) for n in (1, 10)]
    for run in runs:
        assert run.outcome == "converged"
        assert completion_problem.recovery_error(layers_of(run)) < 1e-5
    assert runs[1].rates.shape == (len(runs[1].loss) - 1,)
    with pytest.raises(ValueError, match="momentum"):
        dln.train_compressed(completion_problem, start, outer_every=2, momentum=0.5, **options)
    with pytest.raises(ValueError, match="singular_values"):
        dln.train_compressed(
            completion_problem, start, outer_every=2, **with_record(options, singular_values=3)
        )


@pytest.mark.parametrize(("outer", "outer_every"), [(0.0, 1), (0.1, 5)])
def test_a_diverged_run_has_the_full_network(completion_problem, start, outer, outer_every):
    with pytest.raises(dln.DivergedError) as caught:
        dln.train_compressed(
            completion_problem,
            start,
            rank=3,
            outer=outer,
            outer_every=outer_every,
            steps=20000,
            learning_rate=2000.0,
            record=dln.Record(every=5, singular_values=None),
        )
    run = caught.value.trajectory
    assert run.widths == [120, 6, 6, 6, 6, 120]
    assert run.problem is completion_problem
    assert np.all(np.isfinite(run.loss))


def test_the_defaults_converge(completion_problem, start):
    assert completion_problem.suggested_rank() == 3
    run = dln.train_compressed(completion_problem, start)
    assert run.outcome == "converged"
    assert run.config["compressed"]["rank"] == 3
    assert completion_problem.recovery_error(layers_of(run)) < 1e-6


def test_frozen_bases_stop_where_the_loss_stalls(completion_problem, start):
    stalled = dln.train_compressed(completion_problem, start, outer=0.0)
    assert stalled.outcome == "stopped"
    assert len(stalled.loss) < 20_000


def test_the_surrogate_basis_chooses_the_widths(completion_problem):
    surrogate = dln.train_compressed(completion_problem, basis="surrogate", outer=1.0, steps=10)
    assert surrogate.widths == [120, 6, 6, 120]


def test_a_rate_needs_steps(completion_problem, start):
    with pytest.raises(ValueError, match="steps is None"):
        dln.train_compressed(completion_problem, start, learning_rate=1.0)


def test_an_error_names_an_unknown_rank(completion_problem, start):
    with pytest.raises(ValueError, match='"auto"'):
        dln.train_compressed(completion_problem, start, rank="half")


@pytest.mark.parametrize("kind", ["entries", "measurements"])
def test_a_projection_keeps_the_loss(completion_problem, kind):
    rng = np.random.default_rng(0)
    problem = completion_problem if kind == "entries" else dln.low_rank_sensing(20, 2, 150)
    U, V = (draw_orthonormal(rng, d, 4) for d in problem.shape)
    small = project(problem, U, V[:, :3])
    assert small.shape == (4, 3)
    assert small.n_observations == 12
    for _ in range(3):
        X = rng.standard_normal((4, 3))
        assert small.loss(X) == pytest.approx(problem.loss(U @ X @ V[:, :3].T), rel=1e-12)


def test_the_surrogate_basis_equals_its_definition(completion_problem):
    narrow = dln.compressed_weights(completion_problem, rank=6, basis="surrogate", depth=4, scale=0.1)
    assert [w.shape for w in narrow] == [(6, 120), (6, 6), (6, 6), (120, 6)]
    u, _, vt = np.linalg.svd(completion_problem.backprojection().dense())
    np.testing.assert_allclose(np.abs(narrow[0] @ vt[:6].T), 0.1 * np.eye(6), atol=1e-8)
    np.testing.assert_allclose(np.abs(u[:, :6].T @ narrow[-1]), 0.1 * np.eye(6), atol=1e-8)
    run = dln.train_compressed(
        completion_problem, rank=6, basis="surrogate", outer=5.0, scale=1e-2, steps=20000, tolerance=1e-15
    )
    assert completion_problem.recovery_error(layers_of(run)) < 1e-5


def test_lazily_sampled_weights_of_any_width(completion_problem):
    wide = dln.low_rank_completion(2000, 2, 0.02, seed=5)
    lazy_weights = dln.orthogonal([2000] * 4, 1e-2, implicit=True)
    run = dln.train_compressed(
        wide,
        lazy_weights,
        rank=2,
        outer=0.1,
        steps=6000,
        tolerance=1e-13,
        record=dln.Record(every=10**6, singular_values=None),
    )
    assert run.widths == [2000, 4, 4, 4, 4, 2000]
    assert wide.recovery_error(layers_of(run)) < 1e-4


def test_sensing_problems_are_recovered():
    problem = dln.low_rank_sensing(30, 2, 500)
    weights = dln.orthogonal([30] * 4, 1e-1)
    run = dln.train_compressed(problem, weights, rank=2, steps=4000, outer=0.05, tolerance=1e-16)
    assert problem.recovery_error(layers_of(run)) < 1e-4


def test_float32_runs_recover(completion_problem):
    weights = dln.orthogonal([120] * 4, 1e-2, dtype=np.float32)
    run = dln.train_compressed(
        completion_problem, weights, rank=3, steps=3000, record=dln.Record(every=10**6, singular_values=None)
    )
    assert run.weights(1).dtype == np.float32
    assert completion_problem.recovery_error(layers_of(run)) < 1e-3


def test_curvatures_are_bounded_closely_from_above():
    rng = np.random.default_rng(4)
    mask = rng.random((15, 12)) < 0.5
    problem = dln.Completion.from_dense(np.ones((15, 12)), mask)
    U, V = (draw_orthonormal(rng, d, 3) for d in (15, 12))
    rows = np.einsum("ia,jb->ijab", U, V)[mask].reshape(-1, 9)
    left = [np.linalg.norm(V[mask[i]], 2) ** 2 for i in range(15)]
    right = [np.linalg.norm(U[mask[:, j]], 2) ** 2 for j in range(12)]
    exact = [np.linalg.norm(rows, 2) ** 2, max(left), max(right)]
    found = curvatures(problem, U, V)
    # From below by power iteration, with a tenth added.
    for value, wanted in zip(found, exact, strict=True):
        assert wanted <= value * 1.02
        assert value <= 1.1001 * wanted


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rank": 121}, ValueError, "rank .r_hat. is 121; wanted at most 120"),
        ({"rank": 0}, ValueError, "rank .r_hat. is 0"),
        ({"rank": 3, "basis": "random"}, ValueError, "basis is 'random'"),
        ({"rank": 3, "basis": "surrogate"}, ValueError, "takes depth and scale, not weights"),
        ({"rank": 3, "outer": -1.0}, ValueError, "outer .gamma. is -1"),
    ],
)
def test_errors_name_bad_arguments(completion_problem, start, options, error, text):
    with pytest.raises(error, match=text):
        dln.train_compressed(completion_problem, start, steps=1, **options)


def test_errors_name_bad_starting_weights(completion_problem):
    with pytest.raises(ValueError, match="weights are needed"):
        dln.train_compressed(completion_problem, rank=2, steps=1)
    with pytest.raises(dln.AssumptionError, match="do not close"):
        dln.compressed_weights(completion_problem, dln.gaussian([120] * 4, 1e-2), rank=2)
    with pytest.raises(TypeError, match="wanted a Completion, Sensing or Problem"):
        dln.compressed_weights("matrix", rank=2)
