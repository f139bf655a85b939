# SPDX-License-Identifier: MIT
"""Every run of a batch equals the same run alone, whatever the other runs do."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.matrices import draw_low_rank
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast._training import batch as batch_module

F64 = np.float64
DIM = 16


def make_white_problem(rank, *, seed=0, dim_in=DIM):
    return dln.Problem(draw_low_rank(seed, DIM, dim_in, np.linspace(2, 1, rank)))


def assert_matches_single_runs(batch, singles, steps):
    for run, single in zip(batch, singles, strict=True):
        allowed = tolerance(single.config["dtype"], DIM, max(steps, 1))
        np.testing.assert_array_equal(run.steps, single.steps)
        np.testing.assert_allclose(run.loss, single.loss, rtol=0, atol=2 * allowed * single.loss[0])
        for layer in range(1, run.n_layers + 1):
            for step in run.steps:
                wanted = single.weights(layer, step)
                error = np.linalg.norm(run.weights(layer, step) - wanted)
                # A shrinking layer keeps the rounding errors of its initial size.
                largest = max(np.linalg.norm(w) for w in (wanted, single.weights(layer, 0)))
                assert error <= allowed * max(largest, 1e-300)
        assert run.config == single.config
        assert str(run.certificate) == str(single.certificate)


@settings(deadline=None, max_examples=40)
@given(
    rank=st.integers(0, 5),
    n_layers=st.integers(1, 4),
    n_runs=st.integers(1, 19),
    steps=st.integers(0, 40),
    every=st.integers(1, 13),
    dtype=st.sampled_from([F64, np.float32]),
    momentum=st.sampled_from([0.0, 0.7]),
    n_threads=st.sampled_from([1, 2, 7]),
    seed=st.integers(0, 99),
)
def test_every_run_of_a_batch_equals_a_single_run(
    rank, n_layers, n_runs, steps, every, dtype, momentum, n_threads, seed
):
    rng = np.random.default_rng(seed)
    problems = [make_white_problem(rank, seed=seed + i) for i in range(n_runs)]
    starts = [
        dln.orthogonal([DIM] * (n_layers + 1), rng.uniform(0.2, 0.8), seed + i, dtype=dtype)
        for i in range(n_runs)
    ]
    rates = rng.uniform(0.01, 0.1, (n_runs, n_layers))
    decays = rng.uniform(0.0, 0.01, n_runs)
    common = {"steps": steps, "momentum": momentum, "record": dln.Record(every=every), "n_threads": n_threads}
    batch = dln.train_batch(problems, starts, learning_rate=rates, weight_decay=decays, **common)
    singles = [
        dln.train(p, w, learning_rate=rate, weight_decay=decay, engine="reduced", **common)
        for p, w, rate, decay in zip(problems, starts, rates, decays, strict=True)
    ]
    assert_matches_single_runs(batch, singles, steps)
    np.testing.assert_array_equal(batch.loss, np.stack([run.loss for run in batch]))
    assert batch.outcomes == ["finished"] * n_runs


def test_runs_of_different_shapes_keep_their_order():
    """Depths, widths, ranks, inputs and kinds of weights may differ from run to run."""
    gram = np.diag(np.r_[np.full(10, 1.0), np.full(6, 2.0)])
    white = make_white_problem(2)
    problems = [
        white,
        make_white_problem(3),
        dln.Problem(make_white_problem(1).dense_target() @ gram, gram),
        white,
        make_white_problem(2, dim_in=9),
        white,
        make_white_problem(6),
    ]
    starts = [
        dln.orthogonal([DIM] * 4, 0.5),
        dln.orthogonal([DIM] * 3, 0.5),
        dln.orthogonal([DIM] * 4, 0.5),
        dln.orthogonal([DIM] * 4, 0.3, dtype=np.float32),
        dln.orthogonal([9, DIM, DIM, DIM], 0.5),
        dln.orthogonal([DIM] * 4, 0.5, 3, implicit=True),
        dln.orthogonal([DIM] * 4, 0.5, 4),
    ]
    rates = {"learning_rate": 0.05, "steps": 30, "record": dln.Record(every=10)}
    batch = dln.train_batch(problems, starts, **rates)
    again = [*starts[:5], dln.orthogonal([DIM] * 4, 0.5, 3, implicit=True), starts[6]]
    singles = [dln.train(p, w, engine="reduced", **rates) for p, w in zip(problems, again, strict=True)]
    assert_matches_single_runs(batch, singles, 30)
    assert [run.widths for run in batch] == [run.widths for run in singles]


def test_lazily_sampled_weights_and_rates_of_runs_of_different_depths():
    problem = make_white_problem(2)
    lazy_starts = [dln.orthogonal([DIM] * n, 0.5, n, implicit=True) for n in (4, 3)]
    rates = [[0.01, 0.02, 0.03], [0.04, 0.05]]
    batch = dln.train_batch(problem, lazy_starts, learning_rate=rates, steps=10)
    again = [dln.orthogonal([DIM] * n, 0.5, n, implicit=True) for n in (4, 3)]
    singles = [
        dln.train(problem, lazy_start, learning_rate=rate, steps=10, record=dln.Record(every=10))
        for lazy_start, rate in zip(again, rates, strict=True)
    ]
    assert_matches_single_runs(batch, singles, 10)


def test_one_problem_or_one_set_of_weights_serves_all_runs():
    problem, weights = make_white_problem(2), dln.orthogonal([DIM] * 4, 0.5)
    batch = dln.train_batch(problem, weights, learning_rate=[0.01, 0.02, 0.03], steps=20)
    singles = [
        dln.train(
            problem, weights, learning_rate=rate, steps=20, record=dln.Record(every=20), engine="reduced"
        )
        for rate in (0.01, 0.02, 0.03)
    ]
    assert_matches_single_runs(batch, singles, 20)
    one = dln.train_batch(problem, weights, learning_rate="auto", steps=20)
    assert len(one) == 1
    assert len(batch[1:]) == 2
    assert batch[-1] is batch[2]
    assert repr(batch).startswith("Batch(3 runs: 3 finished")
    assert len(dln.train_batch([], [], learning_rate=0.1, steps=3)) == 0


def test_a_run_that_diverges_leaves_the_others_alone():
    problem, weights = make_white_problem(2), dln.orthogonal([DIM] * 4, 0.5)
    rates = [0.05, 50.0, 0.05, 1e200, 0.05]
    batch = dln.train_batch(problem, weights, learning_rate=rates, steps=60, record=dln.Record(every=1))
    assert batch.outcomes == ["finished", "diverged", "finished", "diverged", "finished"]
    calm = dln.train(problem, weights, learning_rate=0.05, steps=60, engine="reduced")
    for i in (0, 2, 4):
        np.testing.assert_array_equal(batch.loss[i], batch.loss[0])
        np.testing.assert_allclose(batch.loss[i], calm.loss, rtol=1e-12)
    with pytest.raises(dln.DivergedError) as caught:
        dln.train(problem, weights, learning_rate=50.0, steps=60, engine="reduced")
    assert len(batch[1].loss) == caught.value.step
    assert np.isfinite(batch[1].loss).all()
    assert np.isinf(batch.loss[1, caught.value.step :]).all()
    assert np.isfinite(batch[1].singular_values(1)).all()
    assert not np.isnan(batch.loss).any()


def test_a_tolerance_stops_each_run_separately():
    problem, weights = make_white_problem(2), dln.orthogonal([DIM] * 4, 0.7)
    rates = {"steps": 3000, "tolerance": 1.0, "record": dln.Record(every=7)}
    batch = dln.train_batch(problem, weights, learning_rate=[0.05, 0.02, 1e-6], **rates)
    assert batch.outcomes == ["converged", "converged", "finished"]
    singles = [
        dln.train(problem, weights, learning_rate=rate, engine="reduced", **rates)
        for rate in (0.05, 0.02, 1e-6)
    ]
    for run, single in zip(batch, singles, strict=True):
        np.testing.assert_array_equal(run.steps, single.steps)
        np.testing.assert_allclose(run.loss, single.loss, rtol=1e-12)
    assert np.all(batch.loss[0, len(batch[0].loss) :] == batch[0].loss[-1])


def test_errors_name_bad_requests():
    problem, weights = make_white_problem(2), dln.orthogonal([DIM] * 4, 0.5)
    with pytest.raises(dln.ShapeError, match=r"problems: 2, learning_rate: 3"):
        dln.train_batch([problem] * 2, weights, learning_rate=[0.1, 0.2, 0.3], steps=1)
    with pytest.raises(dln.AssumptionError, match="scaled isometry") as caught:
        dln.train_batch(problem, [weights, dln.gaussian([DIM] * 4)], learning_rate=0.1, steps=1)
    assert caught.value.__notes__ == ["in run 1 of the batch"]
    with pytest.raises(TypeError, match="problems holds ndarray"):
        dln.train_batch([np.eye(3)], weights, learning_rate=0.1, steps=1)
    with pytest.raises(ValueError, match="momentum"):
        dln.train_batch(problem, weights, learning_rate=0.1, momentum=[0.5, 1.0], steps=1)
    with pytest.raises(ValueError, match="steps"):
        dln.train_batch(problem, weights, learning_rate=0.1, steps=-1)


def test_a_run_that_diverged_at_the_start_cannot_be_read():
    problem, weights = make_white_problem(2), dln.orthogonal([DIM] * 4, 0.5)
    diverged = dln.train_batch(problem, [[w * 1e60 for w in weights]], learning_rate=0.1, steps=3)
    assert diverged.outcomes == ["diverged"]
    with pytest.raises(ValueError, match="run 0 diverged at step 0"):
        diverged[0]


def test_runs_that_differ_in_rates_alone_share_a_closure(monkeypatch):
    problem = dln.low_rank_recovery(dim=12, rank=2, seed=0)
    networks = [dln.orthogonal([12] * 3, scale, seed=1) for scale in (0.5, 1.0)]
    asked = []
    original = batch_module.choose_engine

    def counted(*arguments):
        asked.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(batch_module, "choose_engine", counted)
    rates = [0.1, 0.2, 0.3]
    batch = dln.train_batch(problem, [w for w in networks for _ in rates], learning_rate=rates * 2, steps=20)
    assert len(asked) == 2
    for i, run in enumerate(batch):
        alone = dln.train(problem, networks[i // 3], learning_rate=rates[i % 3], steps=20, engine="reduced")
        np.testing.assert_allclose(run.loss, alone.loss, rtol=tolerance(np.float64, 12, 20))
