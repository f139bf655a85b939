# SPDX-License-Identifier: MIT
"""The loss of a problem to its own relative accuracy, on all engines, where S has less than full rank.

With S = F F^T and Phi = G F^T the loss is c/2 ||W F - G||_F^2 plus a floor: a sum of squares, so that it is
never negative, and what W does outside the range of S does not enter it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.matrices import draw_orthonormal
from helpers.optional_packages import import_torch
from helpers.records import with_record
from helpers.sample_losses import draw_few_samples, make_orthogonal_layers, true_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import Problem, reference

F32, F64 = np.float32, np.float64
SIZES = st.sampled_from([1, 2, 3, 5, 7, 11, 13, 24])


def assert_loss(run, X, Y, step=-1):
    problem = run.problem
    weights = [run.weights(layer, int(run.steps[step])) for layer in range(1, run.n_layers + 1)]
    true, unseen = true_loss(problem, weights, X, Y)
    # An eigenvalue of S is known to eps times the largest one.
    values = problem.gram_eigen[0]
    significant = values[values > 1e-10 * values[-1]]
    allowed = tolerance(weights[0].dtype, len(X)) * significant[-1] / significant[0]
    reported = float(run.loss[np.flatnonzero(run.loss_steps == run.steps[step])[0]])
    assert abs(reported - true) <= allowed * true + unseen + 2 * math.sqrt(true * unseen)
    return true


@pytest.mark.parametrize("engine", ["dense", "torch"])
@pytest.mark.parametrize("dim", [12, 40])
def test_the_loss_is_accurate_to_the_last_digits(engine, dim):
    if engine == "torch":
        import_torch()
    X, Y = draw_few_samples(dim, n_samples=dim // 3, n_outputs=3)
    problem = Problem.from_data(X, Y)
    options = {
        "learning_rate": "auto",
        "steps": 6000,
        "engine": engine,
        "record": dln.Record(every=500),
        "n_threads": 1,
    }
    run = dln.train(
        problem, make_orthogonal_layers(dim, n_outputs=3), **with_record(options, weights_every=500)
    )
    losses = [assert_loss(run, X, Y, step) for step in range(len(run.steps))]
    assert np.all(run.loss >= 0)
    assert min(losses) < 1e-26  # the loss was compared down to this value
    assert min(run.loss) < 1e-26


def test_the_small_kernels_and_the_large_ones_agree_with_the_samples():
    for dim, depth in ((5, 1), (5, 2), (30, 2), (34, 2)):
        X, Y = draw_few_samples(dim, n_samples=max(dim // 2, 1), n_outputs=2, seed=dim)
        problem = Problem.from_data(X, Y)
        weights = make_orthogonal_layers(dim, n_outputs=2, depth=depth)
        options = {
            "learning_rate": "auto",
            "steps": 3000,
            "record": dln.Record(every=1000, weights_every=1000),
        }
        run = dln.train(problem, weights, **options, engine="dense", n_threads=1)
        for step in range(len(run.steps)):
            assert_loss(run, X, Y, step)
        assert np.all(run.loss >= 0)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_the_loss_of_reduced_runs_and_batches_is_accurate(dtype):
    """Orthonormal samples, fewer than dimensions: S is a projector, and the subspaces close."""
    weights = dln.orthogonal([40] * 4, scale=0.5, seed=0, dtype=dtype)
    X, Y = draw_few_samples(40, n_samples=2, n_outputs=40, orthonormal=True)
    Y = np.linalg.qr(Y)[0] * [3.0, 2.0]
    problem = Problem.from_data(X, Y, reduction="sum")
    options = {"learning_rate": 0.05, "steps": 2000, "record": dln.Record(every=200)}
    run = dln.train(problem, weights, engine="reduced", **options)
    batch = dln.train_batch([problem] * 3, [weights] * 3, **options)
    for found in (run, *batch):
        assert found.engine == "reduced"
        assert np.all(found.loss >= 0)
        for step in range(len(found.steps)):
            assert_loss(found, X, Y, step)
    assert run.loss[-1] < (1e-26 if dtype == F64 else 1e-10)


def test_ranks_may_differ_within_a_batch():
    problems, data = [], []
    for n_samples in (3, 4):
        X, _ = draw_few_samples(40, n_samples=n_samples, n_outputs=1, orthonormal=True)
        Y = np.outer(draw_orthonormal(1, 40, 1)[:, 0], np.ones(n_samples))
        data.append((X, Y))
        problems.append(Problem.from_data(X, Y, reduction="sum"))
    weights = dln.orthogonal([40] * 4, scale=0.5, seed=0)
    batch = dln.train_batch(problems, weights, learning_rate=0.05, steps=500, record=dln.Record(every=100))
    for run, problem, (X, Y) in zip(batch, problems, data, strict=True):
        alone = dln.train(
            problem, weights, learning_rate=0.05, steps=500, record=dln.Record(every=100), engine="reduced"
        )
        np.testing.assert_allclose(run.loss, alone.loss, rtol=1e-10)
        for step in range(len(run.steps)):
            assert_loss(run, X, Y, step)


@pytest.mark.parametrize("engine", ["dense", "torch"])
def test_a_tolerance_stops_where_the_true_loss_reaches_it(engine):
    if engine == "torch":
        import_torch()
    X, Y = draw_few_samples(24, n_samples=7, n_outputs=3, repeated=True)
    problem = Problem.from_data(X, Y)
    options = {
        "learning_rate": "auto",
        "engine": engine,
        "tolerance": 1e-22,
        "record": dln.Record(every=1),
        "n_threads": 1,
    }
    run = dln.train(
        problem,
        make_orthogonal_layers(24, n_outputs=3),
        steps=20_000,
        **with_record(options, weights_every=1),
    )
    assert run.outcome == "converged"
    assert assert_loss(run, X, Y, -1) <= 1.001e-22
    assert assert_loss(run, X, Y, -2) > 0.999e-22


def test_the_loss_of_sharded_layers_is_accurate(run_python, tmp_path):
    import_torch()
    program = f"""
import sys
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
import numpy as np, torch, torch.distributed as dist
import dlnfast as dln
from dlnfast.torch import RowSharded, train_sharded
from helpers.sample_losses import draw_few_samples, make_orthogonal_layers, true_loss
dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=0, world_size=1)
for outputs in (3, 12):
    X, Y = draw_few_samples(12, n_samples=4, n_outputs=outputs)
    problem = dln.Problem.from_data(X, Y)
    weights = make_orthogonal_layers(12, n_outputs=outputs)
    shards = [RowSharded(torch.tensor(w)) for w in weights]
    run = train_sharded(problem, shards, learning_rate="auto", steps=800)
    true, unseen = true_loss(problem, [shard.rows.numpy() for shard in shards], X, Y)
    print(run.loss[-1], true, unseen, run.loss.min())
dist.destroy_process_group()
"""
    for line in run_python(program, timeout=240).splitlines():
        reported, true, unseen, least = map(float, line.split())
        assert least >= 0
        assert abs(reported - true) <= 1e-9 * true + unseen + 2 * math.sqrt(true * unseen)


@settings(max_examples=60, deadline=None)
@given(
    dim=SIZES,
    rank=SIZES,
    outputs=SIZES,
    seed=st.integers(0, 2**31),
    size=st.sampled_from([0.0, 1e-14, 1e-7, 1.0, 1e4]),
)
def test_weights_in_null_directions_of_the_inputs_do_not_affect_the_loss(dim, rank, outputs, seed, size):
    rng = np.random.default_rng(seed)
    directions = draw_orthonormal(rng, dim, dim)
    rank = min(rank, dim)
    X = directions[:, :rank] * (1.1 + rng.random(rank))
    Y = rng.standard_normal((outputs, dim)) @ X
    problem = Problem.from_data(X, Y)
    W = problem.least_squares + size * rng.standard_normal((outputs, dim - rank)) @ directions[:, rank:].T
    unseen = tolerance(F64, dim) * (np.linalg.norm(W) + np.linalg.norm(problem.least_squares))
    # Eigenvectors of S, whose smallest eigenvalue is 1/4 of the largest at least.
    unseen *= 4 * np.linalg.norm(problem.input_factor)
    allowed = problem.loss_scale / 2 * unseen**2
    for found in (
        problem.loss(W) - problem.loss_floor,
        reference.loss([W], problem.dense_target(), problem.input_gram, problem.loss_scale),
    ):
        assert 0 <= found <= allowed


@settings(max_examples=40, deadline=None)
@given(
    dim=SIZES,
    rank=st.integers(0, 24),
    outputs=SIZES,
    n_layers=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    single=st.booleans(),
    n_threads=st.sampled_from([1, 2, 7]),
)
def test_the_kernels_accept_a_factor_of_any_rank(
    core_modules, dim, rank, outputs, n_layers, seed, single, n_threads
):
    rng = np.random.default_rng(seed)
    dtype = F32 if single else F64
    rank = min(rank, dim)
    widths = [dim] * n_layers + [outputs]
    G, *weights = (
        (rng.standard_normal(shape) / math.sqrt(shape[1] or 1)).astype(dtype)
        for shape in [(outputs, rank), *zip(widths[1:], widths, strict=False)]
    )
    F = draw_orthonormal(rng, dim, rank) * (0.5 + rng.random(rank))
    F = np.ascontiguousarray(F, dtype=dtype)
    values, expected = naive_descent(weights, F, G, steps := 4)
    for core in core_modules.values():
        ours = [w.copy() for w in weights]
        loss = descend(core, ours, F, G, steps, n_threads)
        # Sizes of F, G and the weights enter through products of all of them.
        size = (1 + max(values)) * (1 + np.linalg.norm(F)) * max(1, *(np.linalg.norm(w) for w in expected))
        allowed = tolerance(dtype, max(dim, outputs), steps) * size
        np.testing.assert_allclose(loss, values, atol=allowed)
        for found, wanted in zip(ours, expected, strict=True):
            assert np.linalg.norm(found - wanted) <= allowed


def naive_descent(weights, factor, target, steps):
    """Return the losses and the last weights, by `reference` where S = F F^T determines them."""
    F, G = factor.astype(F64), target.astype(F64)
    if F.shape[1] == 0:
        return [0.0] * (steps + 1), [w.astype(F64) for w in weights]
    rates = {"learning_rate": [0.05] * len(weights), "weight_decay": [0.0] * len(weights)}
    norm = float(np.sum(G**2))
    expected = list(
        reference.train_dense(
            weights, G @ F.T, input_gram=F @ F.T, loss_scale=0.5, steps=steps,
            momentum=[0.0] * len(weights), output_norm_squared=norm, **rates,
        )
    )  # fmt: skip
    return [loss for loss, _ in expected], expected[-1][1]


def descend(core, weights, factor, target, steps, n_threads):
    """Descend with the core's dense engine, in place; return the losses."""
    n_layers = len(weights)
    loss = np.zeros(steps + 1)
    arguments = {
        "target": target @ factor.T, "input_gram": factor @ factor.T, "input_factor": factor,
        "factor_target": target, "loss_scale": 0.5, "loss_floor": 0.0,
        "learning_rate": [0.05] * n_layers, "weight_decay": [0.0] * n_layers, "momentum": [0.0] * n_layers,
        "learning_rate_table": None, "weight_decay_table": None, "momentum_table": None, "optimizer": None,
        "left_factors": [], "right_factors": [],
        "steps": steps, "record_every": steps, "tolerance": -1.0, "n_threads": n_threads, "loss": loss,
        "record_steps": np.zeros(2, np.int64), "counts": np.zeros(5, np.int64), "first": 0, "flush_every": 0,
        "on_flush": None, "velocity": (), "compensation": (), "power_vectors": (), "on_record": None,
        "on_progress": None,
        "observed": None, "measurements": None, "snapshot_every": 0, "values": [],
        "errors": [], "signs": [], "branches": [], "clusters": [], "tracking": [], "left": [], "right": [],
        "snapshots": [], "tracker": core.TRACKER_DEFAULTS, "factored": False,
        "initial": [], "safety": 0.0, "curvature": (), "error_scale": 1.0, "rate": np.zeros(0),
        "velocity_norms": (),
    }  # fmt: skip
    assert core.dense_descent(weights, arguments)[0] == "finished"
    return loss


def test_a_floor_below_the_resolution_of_the_statistics_is_zero():
    """||Y||^2 - ||G||^2 of data that are fitted exactly is rounding, which no tolerance would ever pass."""
    X, Y = draw_few_samples(30, n_samples=9, n_outputs=3)
    for norm in (float(np.sum(Y**2)), float(np.sum(Y**2)) * (1 + 1e-15)):
        problem = Problem(Y @ X.T, X @ X.T, output_norm_squared=norm)
        assert problem.loss_floor == 0.0
        assert problem.loss(problem.least_squares) == 0.0
    # A floor above the resolution stays.
    assert Problem(Y @ X.T, X @ X.T, output_norm_squared=2 * norm).loss_floor == pytest.approx(norm / 2)
    batches = [(X[:, :4], Y[:, :4]), (X[:, 4:], Y[:, 4:])]
    found = Problem.from_batches(batches)
    # Without the samples: to the precision of the sums, beyond that of float64.
    assert 0 <= found.loss_floor < 1e-25 * norm
    run = dln.train(
        found,
        make_orthogonal_layers(30, n_outputs=3),
        learning_rate="auto",
        steps=20_000,
        engine="dense",
        tolerance=1e-20,
        n_threads=1,
    )
    assert run.outcome == "converged"


def test_without_inputs_nothing_is_learned():
    problem = Problem(np.zeros((2, 5)), np.zeros((5, 5)), output_norm_squared=3.0)
    assert problem.input_factor.shape == (5, 0)
    run = dln.train(
        problem, make_orthogonal_layers(5, n_outputs=2, depth=2), learning_rate=0.1, steps=3, engine="dense"
    )
    np.testing.assert_array_equal(run.loss, [1.5] * 4)


def test_statistics_have_consistent_factors():
    X, Y = draw_few_samples(17, n_samples=5, n_outputs=3)
    problem = Problem.from_data(X, Y)
    F, G = problem.input_factor, problem.factor_target
    assert F.shape == (17, 5)
    assert G.shape == (3, 5)
    np.testing.assert_allclose(F @ F.T, problem.input_gram, atol=tolerance(F64, 17) * np.linalg.norm(X) ** 2)
    np.testing.assert_allclose(
        G @ F.T, problem.target, atol=tolerance(F64, 17) * np.linalg.norm(Y @ X.T) * 10
    )
    white = dln.low_rank_recovery(6, 1)
    assert white.input_factor is None
    assert white.factor_target is None
