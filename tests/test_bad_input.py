"""Wrong requests get the right error, which names the argument; unusual ones get a correct result."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import dlnfast as dln
from dlnfast import _arrays

DIM = 12


@pytest.fixture
def problem():
    return dln.low_rank_recovery(DIM, 2, seed=1)


@pytest.fixture
def weights():
    return dln.orthogonal([DIM] * 4, scale=0.9, seed=1)


def run(problem, weights, **changes):
    return dln.train(problem, weights, **{"learning_rate": 1.0, "steps": 5, **changes})


WRONG_SETTINGS = [
    ({"learning_rate": -1.0}, ValueError, r"learning_rate \(eta\) is -1"),
    ({"learning_rate": np.nan}, ValueError, r"learning_rate \(eta\) is nan"),
    ({"learning_rate": np.inf}, ValueError, r"learning_rate \(eta\) is inf"),
    ({"learning_rate": "fast"}, TypeError, r"learning_rate \(eta\) is 'fast'"),
    ({"learning_rate": True}, TypeError, r"learning_rate \(eta\) is True"),
    ({"learning_rate": None}, TypeError, r"learning_rate \(eta\) is None"),
    ({"learning_rate": [1.0, 1.0]}, dln.ShapeError, r"learning_rate \(eta\) has 2 values; wanted .* \(3\)"),
    ({"learning_rate": [1.0, -1.0, 1.0]}, ValueError, r"learning_rate \(eta\)\[1\] is -1"),
    ({"weight_decay": -0.1}, ValueError, r"weight_decay \(lambda\) is -0.1"),
    ({"weight_decay": [0.1] * 4}, dln.ShapeError, r"weight_decay \(lambda\) has 4 values"),
    ({"momentum": 1.0}, ValueError, r"momentum \(mu\) is 1; wanted a number in \[0, 1\)"),
    ({"momentum": -0.5}, ValueError, r"momentum \(mu\) is -0.5"),
    ({"steps": -1}, ValueError, "steps is -1"),
    ({"steps": 1.5}, TypeError, "steps is 1.5"),
    ({"steps": True}, TypeError, "steps is True"),
    ({"steps": "10"}, TypeError, "steps is '10'"),
    ({"record_every": 0}, ValueError, "record_every is 0"),
    ({"record_every": 0.5}, TypeError, "record_every is 0.5"),
    ({"singular_values": "most"}, ValueError, "singular_values is 'most'"),
    ({"singular_values": -1}, ValueError, "singular_values is -1"),
    ({"singular_values": 0, "vectors": True}, ValueError, "vectors is True but singular_values"),
    ({"weights_every": 0}, ValueError, "weights_every is 0"),
    ({"tolerance": -1.0}, ValueError, "tolerance is -1"),
    ({"tolerance": np.nan}, ValueError, "tolerance is nan"),
    ({"n_threads": -1}, ValueError, "n_threads is -1"),
    ({"n_threads": 1.0}, TypeError, "n_threads is 1.0"),
    ({"callback": 3}, TypeError, "callback is int"),
    ({"engine": "fast"}, ValueError, "engine is 'fast'"),
    ({"optimizer": "Adam"}, dln.AssumptionError, "optimizer is 'Adam': .*invariant"),
    ({"optimizer": "rmsprop"}, dln.AssumptionError, "optimizer is 'rmsprop'"),
    ({"optimizer": "newton"}, ValueError, "optimizer is 'newton'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG_SETTINGS)
def test_wrong_settings(problem, weights, changes, error, message):
    with pytest.raises(error, match=message):
        run(problem, weights, **changes)


def replaced(weights, i, new):
    return [*weights[:i], new, *weights[i + 1 :]]


def test_wrong_problem(weights):
    with pytest.raises(TypeError, match="problem is ndarray"):
        run(np.eye(DIM), weights)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w: [], dln.ShapeError, "weights is empty"),
        (lambda w: 3, TypeError, "weights is int"),
        (lambda w: w[0], dln.ShapeError, "weights is one matrix"),
        (lambda w: [w[0], w[1][:, :-1], w[2]], dln.ShapeError, r"weights\[1\] \(W_2\) has shape \(12, 11\)"),
        (
            lambda w: [w[0][:, :-1], *w[1:]],
            dln.ShapeError,
            r"weights\[0\] \(W_1\) has shape .* the problem's d_x",
        ),
        (lambda w: [*w[:2], w[2][:-1]], dln.ShapeError, r"weights\[2\] \(W_3\) has 11 rows; wanted 12"),
        (lambda w: replaced(w, 1, w[1].ravel()), dln.ShapeError, r"weights\[1\] \(W_2\) has shape \(144,\)"),
        (lambda w: replaced(w, 1, w[1][:0]), dln.ShapeError, r"weights\[1\] \(W_2\) is empty"),
        (
            lambda w: replaced(w, 1, w[1].astype(np.float16)),
            TypeError,
            r"weights\[1\] \(W_2\) has dtype float16",
        ),
        (lambda w: replaced(w, 1, w[1] + 0j), TypeError, r"weights\[1\] \(W_2\) has dtype complex128"),
        (lambda w: replaced(w, 1, w[1].astype(np.float32)), TypeError, r"weights\[1\] \(W_2\) is float32"),
        (
            lambda w: replaced(w, 1, np.where(w[1] > 0.4, np.nan, w[1])),
            ValueError,
            r"weights\[1\].*not finite: nan",
        ),
        (
            lambda w: replaced(w, 2, np.where(w[2] > 0.4, np.inf, w[2])),
            ValueError,
            r"weights\[2\].*not finite: inf",
        ),
        (lambda w: replaced(w, 1, [[1.0], [1.0, 2.0]]), dln.ShapeError, r"weights\[1\] .*not a rectangular"),
        (lambda w: replaced(w, 1, [["a", "b"]]), TypeError, r"weights\[1\]"),
        (lambda w: replaced(w, 1, None), TypeError, r"weights\[1\]"),
    ],
)
def test_wrong_weights(problem, weights, change, error, message):
    with pytest.raises(error, match=message):
        run(problem, change(weights))


def layouts(w):
    wide = np.zeros((2 * DIM, 2 * DIM))
    wide[::2, ::2] = w
    frozen = w.copy()
    frozen.setflags(write=False)
    return {
        "fortran": np.asfortranarray(w),
        "transposed view": np.ascontiguousarray(w.T).T,
        "strided": wide[::2, ::2],
        "reversed": np.ascontiguousarray(w[::-1])[::-1],
        "read-only": frozen,
        "big-endian": w.astype(">f8"),
        "list": w.tolist(),
    }


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize(
    "layout", ["fortran", "transposed view", "strided", "reversed", "read-only", "big-endian", "list"]
)
def test_any_memory_layout_gives_the_same(problem, weights, engine, layout):
    expected = run(problem, weights, engine=engine)
    found = run(problem, [layouts(w)[layout] for w in weights], engine=engine)
    np.testing.assert_array_equal(found.loss, expected.loss)
    np.testing.assert_array_equal(found.weights(2), expected.weights(2))


def test_integers_count_as_float64(problem):
    found = run(problem, [np.eye(DIM, dtype=np.int64)] * 3)
    assert found.weights(1).dtype == np.float64


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_input_is_never_changed(problem, weights, engine, dtype):
    given = [w.astype(dtype) for w in weights]
    before = [w.copy() for w in given]
    run(problem, given, engine=engine, momentum=0.5, weight_decay=0.1)
    for w, old in zip(given, before, strict=True):
        np.testing.assert_array_equal(w, old)


def test_large_copies_are_announced(problem, weights, monkeypatch):
    monkeypatch.setattr(_arrays, "LARGE_COPY_BYTES", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(problem, weights)
    with pytest.warns(dln.CopyWarning, match=r"weights\[1\] \(W_2\): .*copied to a C-contiguous float64"):
        run(problem, replaced(weights, 1, np.asfortranarray(weights[1])))


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_divergence_is_an_error_that_keeps_the_trajectory(problem, weights, engine):
    with pytest.raises(dln.DivergedError, match=r"not finite at step \d+ .*lower learning_rate") as caught:
        run(problem, weights, learning_rate=1e4, steps=1000, engine=engine)
    error = caught.value
    assert isinstance(error, ArithmeticError)
    assert 1 <= error.layer <= 3
    kept = error.trajectory
    assert len(kept.loss) == error.step
    assert np.isfinite(kept.loss).all()
    assert np.isfinite(kept.singular_values(1)).all()
    assert kept.config["outcome"] == "diverged"
    assert np.isfinite(kept.weights(1, 0)).all()


def test_scalars_that_diverge_without_the_loss_are_noticed():
    # In case 2 the rest of a layer does not enter the loss; weight decay alone can blow it up.
    problem = dln.classification(2, 6)
    weights = dln.orthogonal([12, 12, 2], scale=0.5)
    with pytest.raises(dln.DivergedError, match=r"learning_rate \* weight_decay is .*above 2"):
        run(problem, weights, learning_rate=0.01, weight_decay=1e3, steps=1000, engine="reduced")


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_divergence_in_single_precision(problem, weights, engine):
    given = [w.astype(np.float32) for w in weights]
    with pytest.raises(dln.DivergedError):
        run(problem, given, learning_rate=1e4, steps=1000, engine=engine)


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_zero_steps(problem, weights, engine):
    found = run(problem, weights, steps=0, engine=engine)
    assert found.steps.tolist() == [0]
    np.testing.assert_allclose(found.loss, [problem.loss(found.end_to_end())], rtol=1e-13)
    np.testing.assert_allclose(found.weights(1), weights[0], atol=1e-14)


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_a_target_of_rank_zero(weights, engine):
    found = run(dln.Problem(np.zeros((DIM, DIM))), weights, learning_rate=0.01, steps=50, engine=engine)
    assert found.loss[-1] < found.loss[0]
    assert np.isfinite(found.singular_values(1)).all()
    assert found.rank == 0


@pytest.mark.parametrize("rank", [7, 12])
def test_a_rank_of_more_than_half_the_width(weights, rank):
    problem = dln.low_rank_recovery(DIM, rank)
    dense = run(problem, weights, steps=50)
    assert dense.engine == "dense"
    reduced = run(problem, weights, steps=50, engine="reduced")
    assert reduced.multiplicity(1) == 0
    np.testing.assert_allclose(reduced.loss, dense.loss, rtol=1e-12)


def test_a_network_of_width_one():
    problem = dln.Problem([[2.0]])
    found = run(problem, [[[0.5]], [[0.5]]], learning_rate=0.1, steps=200)
    np.testing.assert_allclose(found.end_to_end(), [[2.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.singular_values(0), "layer is 0"),
        (lambda r: r.singular_values(4), "layer is 4; wanted 1 to 3"),
        (lambda r: r.weights(1, 3), "step is 3, which is not among the recorded steps"),
        (lambda r: r.angles(1, side="top"), "side is 'top'"),
        (lambda r: r.angles(1, reference="start"), "reference is 'start'"),
        (lambda r: r.angles(1, reference=np.eye(3)), "reference has shape"),
        (lambda r: r.angles(1, reference="first_step"), "step is 1, which is not among the recorded"),
        (lambda r: r.features(1), "X is needed"),
        (lambda r: r.features(1, np.ones((3, 2))), "X has shape"),
        (lambda r: r.singular_vectors(1, "middle"), "side is 'middle'"),
    ],
)
def test_wrong_questions_to_a_trajectory(problem, weights, call, message):
    found = run(problem, weights, record_every=5)
    with pytest.raises(ValueError, match=message):
        call(found)


def test_questions_that_only_one_engine_answers(problem, weights):
    found = run(problem, weights, engine="dense", singular_values=None)
    for call in (found.rho, found.multiplicity, found.active_singular_values):
        with pytest.raises(ValueError, match="belongs to the reduced engine"):
            call(1)
    with pytest.raises(ValueError, match="no singular values were recorded"):
        found.singular_values(1)
    with pytest.raises(ValueError, match="no singular vectors were recorded"):
        found.angles(1)
    with pytest.raises(ValueError, match="weights were kept at"):
        found.weights(1, 3)


def test_the_reduced_engine_says_which_assumption_fails(problem, weights):
    cases = [
        (problem, dln.gaussian([DIM] * 4), r"weights\[0\] \(W_1\) is not a scaled rotation"),
        (problem, replaced(weights, 1, np.zeros((DIM, DIM))), r"weights\[1\] \(W_2\) .*it is zero"),
        (problem, dln.orthogonal([DIM, 20, DIM]), "neither case of the theorem"),
        (dln.Problem(np.eye(DIM), 2 * np.eye(DIM)), weights, r"input_gram \(S\) is not the identity"),
    ]
    for which, start, message in cases:
        with pytest.raises(dln.AssumptionError, match=message) as caught:
            run(which, start, engine="reduced")
        assert "engine=" in str(caught.value)
        assert run(which, start, learning_rate=0.01).engine == "dense"


def test_records_that_do_not_fit_the_memory(problem, weights):
    with pytest.raises(MemoryError, match="raise record_every"):
        run(problem, weights, engine="dense", steps=10**15)


@pytest.mark.parametrize("law", [dln.orthogonal, dln.gaussian, dln.uniform])
def test_wrong_requests_for_weights(law):
    for arguments, error, message in [
        (([4],), dln.ShapeError, "widths has 1 entries"),
        (([4, 0],), ValueError, r"widths\[1\] \(d_1\) is 0"),
        (([4, 2.5],), TypeError, r"widths\[1\] \(d_1\) is 2.5"),
        (([4, 4], -1.0), ValueError, r"scale \(eps\) is -1"),
        (([4, 4], [1.0, 1.0]), dln.ShapeError, r"scale \(eps\) has 2 values"),
        (([4, 4], 1.0, -3), ValueError, "seed is -3"),
        (([4, 4], 1.0, 0.5), TypeError, "seed is 0.5"),
    ]:
        with pytest.raises(error, match=message):
            law(*arguments)
    with pytest.raises(TypeError, match="dtype is float16"):
        law([4, 4], dtype=np.float16)
