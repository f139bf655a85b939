# SPDX-License-Identifier: MIT
"""`MatrixCompletion`: what it recovers, what it takes, what it refuses, and its place in scikit-learn."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from records import with_record

import dlnfast as dln
from dlnfast._completion import fitting
from dlnfast._completion.entries import Entries, fit_biases
from dlnfast._completion.estimator import NotFittedError


def noisy_ratings(shape=(50, 40), n=900, seed=0, noise=0.3):
    """Return pairs, ratings and what they would be without noise: biases and rank 2."""
    rng = np.random.default_rng(seed)
    place = np.sort(rng.choice(shape[0] * shape[1], n, replace=False))
    pairs = np.column_stack(np.divmod(place, shape[1]))
    whole = 3 + 0.5 * rng.standard_normal((shape[0], 1)) + 0.5 * rng.standard_normal(shape[1])
    whole = whole + rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1])) / 2
    return pairs, whole[pairs[:, 0], pairs[:, 1]] + noise * rng.standard_normal(n), whole


def pairs_of(problem):
    return np.column_stack([problem.rows, problem.columns])


def quick(**settings):
    return dln.MatrixCompletion(**{"rank": 4, "weight_decay": 0.3, "steps": 200, "n_threads": 1} | settings)


# -------------------------------------------------------------------------------------------- recovery


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"biases": None},
        {"depth": 2, "biases": None},
        {"depth": 4, "biases": None},
        {"rank": 3, "biases": None},
        {"dtype": "float32", "biases": None},
    ],
    ids=str,
)
def test_a_matrix_without_noise_is_recovered(settings):
    problem = dln.low_rank_completion(200, 3, 0.3)
    model = dln.MatrixCompletion(n_threads=1, **settings).fit(pairs_of(problem), problem.values)
    truth = problem.truth.dense()
    unseen = np.ones(problem.shape, bool)
    unseen[problem.rows, problem.columns] = False
    error = np.linalg.norm((model.predict() - truth)[unseen]) / np.linalg.norm(truth[unseen])
    assert error < 1e-3
    if settings.get("biases", "both") is None:
        assert model.singular_values_[3:].sum() < 1e-3 * model.singular_values_[0]


def test_full_width_recovers_too():
    problem = dln.low_rank_completion(40, 2, 0.5)
    model = dln.MatrixCompletion(compress=False, biases=None, n_threads=1).fit(
        pairs_of(problem), problem.values
    )
    assert model.trajectory_.config["widths"] == [40] * 4
    truth = problem.truth.dense()
    assert np.linalg.norm(model.predict() - truth) < 1e-3 * np.linalg.norm(truth)


def test_noisy_ratings_are_predicted_better_than_by_biases():
    pairs, ratings, whole = noisy_ratings(n=1400)
    model = dln.MatrixCompletion(n_threads=1).fit(pairs, ratings)
    biases = fit_biases(Entries(*pairs.T, ratings, whole.shape), "both", (3.0, 3.0))
    alone = biases.at(*np.indices(whole.shape).reshape(2, -1)).reshape(whole.shape)
    error, error_alone = (np.sqrt(np.mean((x - whole) ** 2)) for x in (model.predict(), alone))
    assert error < 0.5 * error_alone
    assert error < 0.3  # the noise of a single rating
    assert model.validation_
    assert model.weight_decay_ in fitting.DECAYS
    assert model.n_steps_ > 0


def test_pure_noise_leaves_the_biases_alone():
    rng = np.random.default_rng(3)
    pairs = np.column_stack(np.divmod(rng.choice(3000, 400, replace=False), 60))
    ratings = 3 + rng.standard_normal(400)
    model = dln.MatrixCompletion(bias_penalty=30.0, n_threads=1).fit(pairs, ratings)
    spread = np.std(model.predict())
    assert spread < 0.4


def test_the_factors_are_what_the_trajectory_ends_with():
    pairs, ratings, whole = noisy_ratings()
    model = quick(weighting=(0, 0), validation_fraction=0.0).fit(pairs, ratings)
    low = model.row_factors_ @ model.column_factors_.T
    run = model.trajectory_
    biases = fit_biases(Entries(*pairs.T, ratings, whole.shape), "both", (3.0, 3.0))
    residual = ratings - biases.at(*pairs.T)
    size = np.sqrt(np.mean(residual**2))
    np.testing.assert_allclose(low, size * run.end_to_end(), atol=1e-10)
    np.testing.assert_allclose(run.problem.values, residual / size, rtol=1e-12)
    assert (model.mean_, model.n_steps_) == (biases.mean, 200)
    np.testing.assert_array_equal(model.row_bias_, biases.rows)
    gram = model.row_factors_.T @ model.row_factors_
    np.testing.assert_allclose(gram, np.diag(model.singular_values_), atol=1e-10)
    np.testing.assert_allclose(model.column_factors_.T @ model.column_factors_, gram, atol=1e-10)


def test_weighting_weighs_the_loss():
    pairs, ratings, _ = noisy_ratings()
    p, q = 0.5, -0.3
    model = quick(weighting=(p, q), validation_fraction=0.0, weight_decay=0.05, steps=500, rank=6)
    model.fit(pairs, ratings)
    i, j = pairs.T
    weights = np.bincount(i)[i] ** -p * np.bincount(j)[j] ** -q
    residual = ratings - model.mean_ - model.row_bias_[i] - model.column_bias_[j]
    scale = np.sqrt(np.mean(weights * residual**2))
    low = model.predict(pairs) - ratings + residual
    loss = np.mean(weights * (residual - low) ** 2) / scale**2 / 2
    np.testing.assert_allclose(model.trajectory_.loss[-1], loss, rtol=1e-9)


# ---------------------------------------------------------------------------------------------- biases


def loop_biases(pairs, ratings, shape, penalty, sweeps=200):
    mean, a, b = sum(ratings) / len(ratings), [0.0] * shape[0], [0.0] * shape[1]
    for _ in range(sweeps):
        for own, other, side in ((b, a, 1), (a, b, 0)):
            for index in range(shape[side]):
                total, count = 0.0, 0
                for pair, rating in zip(pairs, ratings, strict=True):
                    if pair[side] == index:
                        total += rating - mean - other[pair[1 - side]]
                        count += 1
                own[index] = total / (count + penalty[side]) if count else 0.0
    return mean, a, b


@pytest.mark.parametrize("penalty", [(0.5, 2.0), (3.0, 0.0)])
def test_biases_are_those_of_a_plain_loop(penalty):
    pairs, ratings, _ = noisy_ratings((6, 5), 18)
    found = fit_biases(Entries(*pairs.T, ratings, (7, 6)), "both", penalty)
    mean, a, b = loop_biases(pairs.tolist(), ratings.tolist(), (7, 6), penalty)
    assert found.mean == pytest.approx(mean)
    np.testing.assert_allclose(found.rows, a, atol=1e-8)
    np.testing.assert_allclose(found.columns, b, atol=1e-8)
    assert found.rows[6] == found.columns[5] == 0.0


@pytest.mark.parametrize("which", ["rows", "columns", "mean", None])
def test_fewer_biases(which):
    pairs, ratings, _ = noisy_ratings()
    model = quick(biases=which).fit(pairs, ratings)
    assert (model.mean_ == 0) == (which is None)
    assert bool(model.row_bias_.any()) == (which == "rows")
    assert bool(model.column_bias_.any()) == (which == "columns")


# --------------------------------------------------------------------------------------- forms of input


def test_all_forms_of_input_agree():
    sparse = pytest.importorskip("scipy.sparse", reason="SciPy makes the sparse matrix")
    pairs, ratings, whole = noisy_ratings()
    ratings[5] = 0.0  # a rating like any other
    dense = np.full(whole.shape, np.nan)
    dense[tuple(pairs.T)] = ratings
    order = np.random.default_rng(0).permutation(len(pairs))
    stored = sparse.coo_array((ratings[order], tuple(pairs[order].T)), shape=whole.shape)
    expected = quick().fit(pairs, ratings)
    scores = {(expected.score(pairs, ratings), expected.rmse(pairs, ratings))}
    for X, y in ((pairs[order].astype(np.int32), ratings[order].tolist()), (dense, None), (stored, None)):
        model = quick(shape=whole.shape).fit(X, y)
        np.testing.assert_array_equal(model.predict(), expected.predict())
        scores.add((round(model.score(X, y), 12), round(model.rmse(X, y), 12)))
    assert len({(round(a, 12), round(b, 12)) for a, b in scores}) == 1
    for X in (stored.tocsr(), sparse.csc_matrix(stored)):
        assert quick().fit(X).rmse(X) == pytest.approx(expected.rmse(dense), rel=1e-12)


def test_what_is_given_is_not_changed():
    pairs, ratings, _ = noisy_ratings()
    before = pairs.copy(), ratings.copy()
    quick().fit(pairs, ratings)
    np.testing.assert_array_equal(pairs, before[0])
    np.testing.assert_array_equal(ratings, before[1])


def test_score_is_r_squared():
    pairs, ratings, _ = noisy_ratings()
    model = quick().fit(pairs, ratings)
    error = model.predict(pairs) - ratings
    assert model.score(pairs, ratings) == pytest.approx(1 - np.mean(error**2) / np.var(ratings))
    assert model.rmse(pairs, ratings) == pytest.approx(np.sqrt(np.mean(error**2)))
    assert model.score(pairs[:1], ratings[:1]) == 0.0


def test_unseen_rows_and_columns_get_what_is_known():
    pairs, ratings, whole = noisy_ratings()
    keep = (pairs[:, 0] != 3) & (pairs[:, 1] != 4)
    for settings in ({}, {"compress": False}):
        model = quick(**settings).fit(pairs[keep], ratings[keep])
        assert model.shape_ == whole.shape
        for row in (3, 50, 10**12):
            assert model.predict([[row, 7]]) == model.mean_ + model.column_bias_[7]
        for column in (4, 40, 2**62):
            assert model.predict([[7, column]]) == model.mean_ + model.row_bias_[7]
        assert model.predict([[3, 4], [99, 99]]).tolist() == [model.mean_] * 2
        np.testing.assert_allclose(model.predict()[3], model.mean_ + model.column_bias_, rtol=1e-12)
    assert quick(shape=(60, 45)).fit(pairs, ratings).predict().shape == (60, 45)


def test_predictions_stay_within_the_clip():
    pairs, ratings, _ = noisy_ratings()
    assert quick(clip=(2.5, 3.5)).fit(pairs, ratings).predict().max() == 3.5
    model = quick(clip="range").fit(pairs, ratings)
    assert model.predict().min() >= ratings.min()
    assert model.predict(pairs).max() <= ratings.max()


def test_duplicates():
    pairs, ratings, _ = noisy_ratings()
    twice = np.vstack([pairs, pairs[:3]]), np.concatenate([ratings + 1, ratings[:3] + 1])
    twice[1][:3] -= 1
    twice[1][-3:] += 1
    with pytest.raises(ValueError, match=r"X has \(0, \d+\) twice, rated .* or duplicates=\"mean\""):
        quick().fit(*twice)
    expected = quick().fit(pairs, ratings + 1).predict()
    np.testing.assert_allclose(quick(duplicates="mean").fit(*twice).predict(), expected, rtol=1e-6)


@pytest.mark.parametrize("ratings", [[4.0] * 6, [0.0] * 6, [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]])
def test_nothing_but_biases_to_learn(ratings):
    pairs = [[i, j] for i in range(3) for j in range(2)]
    model = dln.MatrixCompletion(bias_penalty=0.0).fit(pairs, ratings)
    np.testing.assert_allclose(model.predict(pairs), ratings, atol=1e-12)
    assert (model.trajectory_, model.n_steps_) == (None, 0)
    assert model.score(pairs, model.predict(pairs)) == 1.0


def test_a_single_rating():
    model = dln.MatrixCompletion().fit([[0, 0]], [4.5])
    assert model.predict().tolist() == [[4.5]]


# --------------------------------------------------------------------------- settings and determinism


@pytest.mark.parametrize("settings", [{}, {"compress": False}, {"dtype": np.float32}], ids=str)
def test_the_seed_decides(settings):
    pairs, ratings, _ = noisy_ratings()
    first, again, other = (quick(seed=seed, **settings).fit(pairs, ratings) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.predict(), again.predict())
    assert first.validation_ == again.validation_
    assert first.validation_ != other.validation_


def test_biases_are_fitted_where_they_predict():
    pairs, ratings, _ = noisy_ratings()
    assert quick().fit(pairs, ratings).biases_ == "both"
    problem = dln.low_rank_completion(120, 2, 0.4)
    pairs = np.column_stack([problem.rows, problem.columns])
    model = dln.MatrixCompletion(n_threads=1).fit(pairs, problem.values)
    assert model.biases_ is None
    assert problem.recovery_error(model.predict()) < 1e-4


def test_pairs_without_ratings_are_no_matrix():
    triples = [(0, 0, 4.0), (0, 1, 3.0), (1, 0, 5.0), (2, 1, 1.0)]
    with pytest.raises(ValueError, match="looks like places"):
        dln.MatrixCompletion().fit(triples)
    with pytest.raises(ValueError, match="looks like places"):
        dln.MatrixCompletion().fit([t[:2] for t in triples])


def test_single_precision_is_close():
    pairs, ratings, _ = noisy_ratings()
    settings = {"validation_fraction": 0.0, "steps": 60}
    double = quick(**settings).fit(pairs, ratings)
    single = quick(dtype="float32", **settings).fit(pairs, ratings)
    assert single.trajectory_.config["dtype"] == "float32"
    # Small modes grow from the rounding of the start: differences in some of them reach a hundredth.
    apart = np.linalg.norm(single.predict() - double.predict()) / np.linalg.norm(double.predict())
    assert apart < 5e-3


def test_scaled_ratings_give_scaled_predictions():
    pairs, ratings, _ = noisy_ratings()
    one, eight = (quick(validation_fraction=0.0).fit(pairs, factor * ratings) for factor in (1, 8))
    np.testing.assert_allclose(eight.predict(), 8 * one.predict(), rtol=1e-12)


def test_rates():
    pairs, ratings, _ = noisy_ratings()
    model = quick(learning_rate=dln.Adaptive(safety=0.5), outer=0.1).fit(pairs, ratings)
    assert model.trajectory_.config["adaptive"]["safety"] == 0.5
    assert model.trajectory_.config["learning_rate"] == [0.1, 1.0, 0.1]
    model = quick(learning_rate=0.5, outer=2.0, validation_fraction=0.0).fit(pairs, ratings)
    assert model.trajectory_.config["learning_rate"] == [1.0, 0.5, 1.0]
    with pytest.raises(dln.DivergedError):
        quick(learning_rate=1e9).fit(pairs, ratings)


def test_settings_come_and_go():
    model = dln.MatrixCompletion(7, depth=2)
    settings = model.get_params()
    assert (settings["rank"], settings["depth"], settings["biases"]) == (7, 2, "auto")
    assert dln.MatrixCompletion(**settings).get_params(deep=False) == settings
    assert model.set_params(rank=3, biases=None) is model
    assert repr(model) == "MatrixCompletion(rank=3, depth=2, biases=None)"
    with pytest.raises(ValueError, match="'ranks' is no setting of MatrixCompletion: bias_penalty, biases"):
        model.set_params(ranks=3)


def test_before_fit():
    for call in (
        lambda m: m.predict([[0, 0]]),
        lambda m: m.score([[0, 0]], [1]),
        lambda m: m.rmse([[0, 0]], [1]),
    ):
        with pytest.raises(NotFittedError, match=r"not fitted: call fit\(X, y\) first"):
            call(dln.MatrixCompletion())


def test_a_fitted_one_survives_pickling():
    pairs, ratings, _ = noisy_ratings()
    model = quick().fit(pairs, ratings)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(), model.predict())


PAIRS, RATINGS = [[0, 0], [0, 1], [1, 0]], [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("X", "y", "error", "message"),
    [
        (np.zeros((0, 2), int), [], ValueError, "X has no known entries"),
        (np.full((2, 3), np.nan), None, ValueError, "X has no known entries"),
        (PAIRS, [1.0, 2.0], ValueError, r"y \(ratings\) has 2 values; wanted 3"),
        (
            PAIRS,
            [1.0, np.nan, 3.0],
            ValueError,
            r"y \(ratings\) has a value that is not finite: nan at \(1,\)",
        ),
        (PAIRS, [1.0, np.inf, 3.0], ValueError, "not finite: inf"),
        (PAIRS, ["a", "b", "c"], TypeError, "y"),
        ([[1.0, np.inf]], None, ValueError, "not finite: inf"),
        ([[0, 0], [1, -2], [1, 0]], RATINGS, ValueError, r"X\[1\] is \(1, -2\); wanted places from 0"),
        ([[0.0, 0.5]], [1.0], TypeError, "X has dtype float64; wanted integers"),
        ([[0, 0, 0]], [1.0], dln.ShapeError, r"X has shape \(1, 3\); wanted pairs"),
        ([0, 1], [1.0, 2.0], dln.ShapeError, r"X has shape \(2,\)"),
        ([1.0, 2.0], None, dln.ShapeError, r"X has shape \(2,\); wanted a matrix"),
        ([[1.0], [2.0, 3.0]], None, dln.ShapeError, "not a rectangular array"),
        ([["a"]], None, TypeError, "X has dtype"),
        ([[0, 0], [0, 0]], [1.0, 2.0], ValueError, r"\(0, 0\) twice, rated 1 and 2"),
    ],
)
def test_bad_entries(X, y, error, message):
    with pytest.raises(error, match=message):
        dln.MatrixCompletion().fit(X, y)


def test_a_sparse_matrix_holds_its_own_ratings():
    sparse = pytest.importorskip("scipy.sparse", reason="SciPy makes the sparse matrix")
    with pytest.raises(TypeError, match="y is given with a sparse matrix X"):
        dln.MatrixCompletion().fit(sparse.eye_array(3), [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank": 3}, ValueError, "rank is 3; wanted at most 2, the smaller side of the 2 x 2 matrix"),
        ({"rank": 0}, ValueError, "rank is 0"),
        ({"rank": 2.5}, TypeError, "rank is 2.5"),
        ({"depth": 1}, ValueError, "depth is 1; wanted an integer of at least 2"),
        ({"outer": 0}, ValueError, "outer is 0"),
        ({"scale": -1}, ValueError, "scale is -1"),
        ({"learning_rate": "fast"}, ValueError, "learning_rate is 'fast'; wanted \"adaptive\""),
        ({"learning_rate": 0}, ValueError, "learning_rate is 0"),
        ({"weight_decay": "some"}, ValueError, "weight_decay is 'some'; wanted \"auto\" or a number"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay is -0.1"),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"tolerance": -1}, ValueError, "tolerance is -1"),
        (
            {"biases": "all"},
            ValueError,
            "biases is 'all'; wanted one of 'auto', 'both', 'rows', 'columns', 'mean', None",
        ),
        ({"bias_penalty": -1}, ValueError, "bias_penalty is -1"),
        ({"bias_penalty": (1, -1)}, ValueError, r"bias_penalty\[1\] is -1"),
        ({"bias_penalty": (1, 2, 3)}, TypeError, "bias_penalty is .*; wanted two numbers"),
        ({"weighting": 0.5}, TypeError, "weighting is 0.5; wanted two numbers"),
        ({"validation_fraction": 1.0}, ValueError, r"validation_fraction is 1; wanted a number in \[0, 1\)"),
        ({"validation_fraction": 0}, ValueError, "nothing to choose it by"),
        ({"patience": 0}, ValueError, "patience is 0"),
        ({"record_every": 0}, ValueError, "record_every is 0"),
        ({"clip": "all"}, ValueError, "clip is 'all'"),
        ({"clip": (5, 1)}, ValueError, r"clip is \(5, 1\); wanted the lower bound first"),
        ({"shape": (2, 1)}, ValueError, r"X reaches row 1 and column 1; shape is \(2, 1\)"),
        ({"shape": 2}, TypeError, "shape is 2; wanted two integers"),
        ({"duplicates": "last"}, ValueError, "duplicates is 'last'; wanted one of 'error', 'mean'"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"n_threads": -1}, ValueError, "n_threads is -1"),
        ({"dtype": "float16"}, TypeError, "dtype is float16; wanted float64 or float32"),
    ],
    ids=str,
)
def test_bad_settings(settings, error, message):
    model = dln.MatrixCompletion(**settings)  # says nothing yet
    with pytest.raises(error, match=message):
        model.fit(PAIRS, RATINGS)


def test_bad_requests():
    model = dln.MatrixCompletion().fit(PAIRS, RATINGS)
    with pytest.raises(ValueError, match="wanted places from 0"):
        model.predict([[0, -1]])
    with pytest.raises(TypeError, match="wanted integers"):
        model.predict([[0.0, 1.0]])
    with pytest.raises(dln.ShapeError, match="wanted pairs"):
        model.predict([0, 1])
    assert model.predict(np.zeros((0, 2), int)).shape == (0,)
    with pytest.raises(dln.ShapeError, match=r"shape is \(3, 3\), but X has shape \(2, 2\)"):
        dln.MatrixCompletion(shape=(3, 3)).fit(np.eye(2))
    wide = dln.MatrixCompletion(shape=(2**15, 2**15)).fit(PAIRS, RATINGS)
    with pytest.raises(ValueError, match="X is None, but the matrix has 32768 x 32768 entries; wanted pairs"):
        wide.predict()


# ------------------------------------------------------------------------------------------- interruption


def interrupting(monkeypatch, at, of_calls):
    """Let the run of one call of `train` be interrupted at a step, as Ctrl-C does."""
    calls = []

    def train(*arguments, **options):
        calls.append(options["steps"])

        def press(step, loss):
            if len(calls) in of_calls and step >= at:
                raise KeyboardInterrupt

        return dln.train(*arguments, **with_record(options, callback=press))

    monkeypatch.setattr(fitting, "train", train)
    return calls


def test_ctrl_c_in_the_last_run_keeps_what_was_learned(monkeypatch):
    pairs, ratings, _ = noisy_ratings()
    settings = {"validation_fraction": 0.0, "steps": 160}
    interrupting(monkeypatch, 105, {1})
    model = quick(**settings)
    with pytest.raises(KeyboardInterrupt) as caught:
        model.fit(pairs, ratings)
    assert caught.value.__notes__[-1] == "the estimator is fitted, up to step 100"
    assert (model.n_steps_, model.trajectory_.steps[-1]) == (100, 110)
    monkeypatch.undo()
    shorter = quick(**settings | {"steps": 100}).fit(pairs, ratings)
    np.testing.assert_allclose(model.predict(), shorter.predict(), rtol=1e-12)


def test_ctrl_c_while_settings_are_tried_keeps_the_best(monkeypatch):
    pairs, ratings, _ = noisy_ratings()
    interrupting(monkeypatch, 0, {4})
    model = dln.MatrixCompletion(n_threads=1)
    with pytest.raises(KeyboardInterrupt):
        model.fit(pairs, ratings)
    assert 0 < model.n_steps_ <= 30
    assert model.rmse(pairs, ratings) < np.std(ratings)
    assert model.trajectory_ is None


def test_ctrl_c_at_once_leaves_the_biases(monkeypatch):
    pairs, ratings, _ = noisy_ratings()
    interrupting(monkeypatch, 0, {1})
    model = dln.MatrixCompletion(n_threads=1)
    with pytest.raises(KeyboardInterrupt):
        model.fit(pairs, ratings)
    assert model.n_steps_ == 0
    assert not model.row_factors_.any()
    assert model.predict([[0, 99]]) == model.mean_ + model.row_bias_[0]


# ------------------------------------------------------------------------------------------ scikit-learn


def test_scikit_learn_clones_it_and_searches():
    pytest.importorskip("sklearn", reason="scikit-learn")
    from sklearn.base import clone, is_regressor
    from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
    from sklearn.utils.validation import check_is_fitted

    pairs, ratings, _ = noisy_ratings()
    model = quick(clip=(0.5, 5.0))
    copy = clone(model)
    assert copy is not model
    assert copy.get_params() == model.get_params()
    assert is_regressor(model)
    folds = KFold(3, shuffle=True, random_state=0)
    scores = cross_val_score(model, pairs, ratings, cv=folds)
    assert scores.shape == (3,)
    assert scores.min() > 0.3
    scores = cross_val_score(model, pairs, ratings, cv=folds, scoring="neg_root_mean_squared_error")
    assert scores.max() < 0
    search = GridSearchCV(model, {"rank": [1, 2], "biases": ["both", None]}, cv=folds).fit(pairs, ratings)
    assert search.best_params_["biases"] in ("both", None)
    check_is_fitted(search.best_estimator_)
    assert search.predict(pairs).shape == ratings.shape


def test_scikit_learn_is_not_loaded(run_python):
    program = (
        "import sys, dlnfast as dln\n"
        "dln.MatrixCompletion().fit([[0, 0], [0, 1], [1, 0], [1, 1]], [1, 2, 3, 5.])\n"
        "print('sklearn' in sys.modules, 'scipy' in sys.modules)"
    )
    assert run_python(program).split() == ["False", "False"]
