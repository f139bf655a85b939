# SPDX-License-Identifier: MIT
"""`MatrixCompletion`: recovery, arguments, errors, and use with scikit-learn."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
from helpers.optional_packages import import_sparse
from helpers.records import with_record

import dlnfast as dln
from dlnfast._completion import gradient_descent, variational
from dlnfast._completion.entries import Entries, fit_biases
from dlnfast._completion.estimator import NotFittedError


def noisy_ratings(shape=(50, 40), n=900, seed=0, noise=0.3):
    """Return pairs, noisy ratings, and the ratings without noise: biases plus rank 2."""
    rng = np.random.default_rng(seed)
    flat_indices = np.sort(rng.choice(shape[0] * shape[1], n, replace=False))
    pairs = np.column_stack(np.divmod(flat_indices, shape[1]))
    whole = 3 + 0.5 * rng.standard_normal((shape[0], 1)) + 0.5 * rng.standard_normal(shape[1])
    whole = whole + rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1])) / 2
    return pairs, whole[pairs[:, 0], pairs[:, 1]] + noise * rng.standard_normal(n), whole


def pairs_of(problem):
    return np.column_stack([problem.rows, problem.columns])


def make(**settings):
    """Return an estimator; ``layers__scale`` and the like set one of its options."""
    return dln.MatrixCompletion().set_params(**{"n_threads": 1} | settings)


def quick(**settings):
    """Return an estimator that takes few steps of gradient descent."""
    start = {"method": "gradient", "rank": 4, "weight_decay": 0.3, "steps": 200}
    return make(**start | {"layers__keep_trajectories": True} | settings)


def sweeping(**settings):
    """Return an estimator that makes few sweeps."""
    return make(**{"rank": 4, "steps": 8} | settings)


both = pytest.mark.parametrize("make_model", [quick, sweeping], ids=["gradient", "variational"])


# -------------------------------------------------------------------------------------------- recovery


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"biases": None},
        {"rank": 3, "biases": None},
        {"layers__dtype": "float32", "biases": None},
        {"method": "gradient"},
        {"method": "gradient", "biases": None},
        {"method": "gradient", "depth": 2, "biases": None},
        {"method": "gradient", "depth": 4, "biases": None},
        {"method": "gradient", "rank": 3, "biases": None},
        {"method": "gradient", "layers__dtype": "float32", "biases": None},
    ],
    ids=str,
)
def test_a_matrix_without_noise_is_recovered(settings):
    problem = dln.low_rank_completion(200, 3, 0.3)
    model = make(**settings).fit(pairs_of(problem), problem.values)
    truth = problem.truth.dense()
    unseen = np.ones(problem.shape, bool)
    unseen[problem.rows, problem.columns] = False
    error = np.linalg.norm((model.predict() - truth)[unseen]) / np.linalg.norm(truth[unseen])
    assert error < 1e-3
    if settings.get("biases", "both") is None:
        assert model.singular_values_[3:].sum() < 1e-3 * model.singular_values_[0]


def test_full_width_recovers_too():
    problem = dln.low_rank_completion(40, 2, 0.5)
    settings = {"layers__compress": False, "layers__keep_trajectories": True, "biases": None}
    model = make(method="gradient", **settings).fit(pairs_of(problem), problem.values)
    assert model.trajectories_[-1].config["widths"] == [40] * 4
    truth = problem.truth.dense()
    assert np.linalg.norm(model.predict() - truth) < 1e-3 * np.linalg.norm(truth)


@pytest.mark.parametrize("method", ["gradient", "variational"])
def test_noisy_ratings_are_predicted_better_than_by_biases(method):
    pairs, ratings, whole = noisy_ratings(n=1400)
    model = make(method=method).fit(pairs, ratings)
    biases = fit_biases(Entries(*pairs.T, ratings, whole.shape), "both", (3.0, 3.0))
    alone = biases.at(*np.indices(whole.shape).reshape(2, -1)).reshape(whole.shape)
    error, error_alone = (np.sqrt(np.mean((x - whole) ** 2)) for x in (model.predict(), alone))
    assert error < 0.5 * error_alone
    assert error < 0.3  # the noise of a single rating
    assert min(trial.rmse for trial in model.validation_) < error_alone
    assert model.n_steps_ > 0
    if method == "gradient":
        assert model.weight_decay_ in gradient_descent.DECAYS
    else:
        assert model.noise_variance_ == pytest.approx(0.3**2, rel=0.2)


@pytest.mark.parametrize("method", ["gradient", "variational"])
def test_predictions_for_pure_noise_have_a_small_spread(method):
    rng = np.random.default_rng(3)
    pairs = np.column_stack(np.divmod(rng.choice(3000, 400, replace=False), 60))
    ratings = 3 + rng.standard_normal(400)
    model = make(method=method, biases__penalty=30.0).fit(pairs, ratings)
    spread = np.std(model.predict())
    assert spread < 0.4


def test_the_factors_equal_the_end_of_the_trajectory():
    pairs, ratings, whole = noisy_ratings()
    model = quick(entries__weighting=(0, 0), stopping__validation_fraction=0.0).fit(pairs, ratings)
    low = model.row_factors_ @ model.column_factors_.T
    run = model.trajectories_[-1]
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


def test_weighting_weights_the_terms_of_the_loss():
    pairs, ratings, _ = noisy_ratings()
    p, q = 0.5, -0.3
    model = quick(entries__weighting=(p, q), stopping__validation_fraction=0.0)
    model.set_params(weight_decay=0.05, steps=500, rank=6).fit(pairs, ratings)
    i, j = pairs.T
    weights = np.bincount(i)[i] ** -p * np.bincount(j)[j] ** -q
    residual = ratings - model.mean_ - model.row_bias_[i] - model.column_bias_[j]
    scale = np.sqrt(np.mean(weights * residual**2))
    low = model.predict(pairs) - ratings + residual
    loss = np.mean(weights * (residual - low) ** 2) / scale**2 / 2
    np.testing.assert_allclose(model.trajectories_[-1].loss[-1], loss, rtol=1e-9)


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
def test_biases_equal_those_of_a_plain_loop(penalty):
    pairs, ratings, _ = noisy_ratings((6, 5), 18)
    found = fit_biases(Entries(*pairs.T, ratings, (7, 6)), "both", penalty)
    mean, a, b = loop_biases(pairs.tolist(), ratings.tolist(), (7, 6), penalty)
    assert found.mean == pytest.approx(mean)
    np.testing.assert_allclose(found.rows, a, atol=1e-8)
    np.testing.assert_allclose(found.columns, b, atol=1e-8)
    assert found.rows[6] == found.columns[5] == 0.0


@both
@pytest.mark.parametrize("which", ["rows", "columns", "mean", None])
def test_biases_can_be_restricted_to_rows_or_columns(which, make_model):
    pairs, ratings, _ = noisy_ratings()
    model = make_model(biases=which).fit(pairs, ratings)
    assert (model.mean_ == 0) == (which is None)
    assert bool(model.row_bias_.any()) == (which == "rows")
    assert bool(model.column_bias_.any()) == (which == "columns")
    assert model.biases_ == which


# --------------------------------------------------------------------------------------- forms of input


@both
def test_all_forms_of_input_agree(make_model):
    sparse = import_sparse()
    pairs, ratings, whole = noisy_ratings()
    ratings[5] = 0.0  # a rating like any other
    dense = np.full(whole.shape, np.nan)
    dense[tuple(pairs.T)] = ratings
    order = np.random.default_rng(0).permutation(len(pairs))
    stored = sparse.coo_array((ratings[order], tuple(pairs[order].T)), shape=whole.shape)
    expected = make_model().fit(pairs, ratings)
    scores = {(expected.score(pairs, ratings), expected.rmse(pairs, ratings))}
    for X, y in ((pairs[order].astype(np.int32), ratings[order].tolist()), (dense, None), (stored, None)):
        model = make_model(entries__shape=whole.shape).fit(X, y)
        np.testing.assert_array_equal(model.predict(), expected.predict())
        scores.add((round(model.score(X, y), 12), round(model.rmse(X, y), 12)))
    assert len({(round(a, 12), round(b, 12)) for a, b in scores}) == 1
    for X in (stored.tocsr(), sparse.csc_matrix(stored)):
        assert make_model().fit(X).rmse(X) == pytest.approx(expected.rmse(dense), rel=1e-12)


@both
def test_arguments_stay_unchanged(make_model):
    pairs, ratings, _ = noisy_ratings()
    before = pairs.copy(), ratings.copy()
    make_model().fit(pairs, ratings)
    np.testing.assert_array_equal(pairs, before[0])
    np.testing.assert_array_equal(ratings, before[1])


@both
def test_score_is_r_squared(make_model):
    pairs, ratings, _ = noisy_ratings()
    model = make_model().fit(pairs, ratings)
    error = model.predict(pairs) - ratings
    assert model.score(pairs, ratings) == pytest.approx(1 - np.mean(error**2) / np.var(ratings))
    assert model.rmse(pairs, ratings) == pytest.approx(np.sqrt(np.mean(error**2)))
    assert model.score(pairs[:1], ratings[:1]) == 0.0


def test_unseen_rows_and_columns_are_predicted_by_the_biases():
    pairs, ratings, whole = noisy_ratings()
    keep = (pairs[:, 0] != 3) & (pairs[:, 1] != 4)
    for settings in ({}, {"layers__compress": False}):
        model = quick(**settings).fit(pairs[keep], ratings[keep])
        assert model.shape_ == whole.shape
        for row in (3, 50, 10**12):
            assert model.predict([[row, 7]]) == model.mean_ + model.column_bias_[7]
        for column in (4, 40, 2**62):
            assert model.predict([[7, column]]) == model.mean_ + model.row_bias_[7]
        assert model.predict([[3, 4], [99, 99]]).tolist() == [model.mean_] * 2
        np.testing.assert_allclose(model.predict()[3], model.mean_ + model.column_bias_, rtol=1e-12)
    assert quick(entries__shape=(60, 45)).fit(pairs, ratings).predict().shape == (60, 45)


@both
def test_predictions_stay_within_the_clip(make_model):
    pairs, ratings, _ = noisy_ratings()
    assert make_model(entries__clip=(2.5, 3.5)).fit(pairs, ratings).predict().max() == 3.5
    model = make_model(entries__clip="range").fit(pairs, ratings)
    assert model.predict().min() >= ratings.min()
    assert model.predict(pairs).max() <= ratings.max()


def test_duplicate_ratings_are_refused_or_averaged():
    pairs, ratings, _ = noisy_ratings()
    twice = np.vstack([pairs, pairs[:3]]), np.concatenate([ratings + 1, ratings[:3] + 1])
    twice[1][:3] -= 1
    twice[1][-3:] += 1
    with pytest.raises(
        ValueError, match=r"X has \(0, \d+\) twice, rated .* or EntryOptions\(duplicates=\"mean\"\)"
    ):
        quick().fit(*twice)
    expected = quick().fit(pairs, ratings + 1).predict()
    np.testing.assert_allclose(quick(entries__duplicates="mean").fit(*twice).predict(), expected, rtol=1e-6)


@pytest.mark.parametrize("ratings", [[4.0] * 6, [0.0] * 6, [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]])
def test_ratings_of_biases_only(ratings):
    pairs = [[i, j] for i in range(3) for j in range(2)]
    model = make(method="gradient", biases__penalty=0.0).fit(pairs, ratings)
    np.testing.assert_allclose(model.predict(pairs), ratings, atol=1e-12)
    assert (model.trajectories_, model.n_steps_) == ([], 0)
    assert model.score(pairs, model.predict(pairs)) == 1.0


def test_a_single_rating_is_fitted():
    model = dln.MatrixCompletion().fit([[0, 0]], [4.5])
    assert model.predict().tolist() == [[4.5]]


# --------------------------------------------------------------------------- settings and determinism


@pytest.mark.parametrize("rating", [4.0, 0.0, -2.5])
def test_constant_ratings_need_no_directions(rating):
    model = make().fit([[i, j] for i in range(5) for j in range(4)], [rating] * 20)
    np.testing.assert_array_equal(model.predict(), np.full((5, 4), rating))
    assert (model.n_steps_, model.validation_) == (0, [])


@both
@pytest.mark.parametrize(
    "settings", [{}, {"layers__compress": False}, {"layers__dtype": np.float32}], ids=str
)
def test_the_seed_determines_the_fit(settings, make_model):
    pairs, ratings, _ = noisy_ratings()
    first, again, other = (make_model(seed=seed, **settings).fit(pairs, ratings) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.predict(), again.predict())
    assert first.validation_ == again.validation_
    assert first.validation_ != other.validation_


def test_biases_are_fitted_only_where_they_improve_predictions():
    pairs, ratings, _ = noisy_ratings()
    assert quick().fit(pairs, ratings).biases_ == "both"
    problem = dln.low_rank_completion(120, 2, 0.4)
    pairs = np.column_stack([problem.rows, problem.columns])
    model = make(method="gradient").fit(pairs, problem.values)
    assert model.biases_ is None
    assert problem.recovery_error(model.predict()) < 1e-4


def test_pairs_without_ratings_are_refused():
    triples = [(0, 0, 4.0), (0, 1, 3.0), (1, 0, 5.0), (2, 1, 1.0)]
    with pytest.raises(ValueError, match="looks like index pairs"):
        dln.MatrixCompletion().fit(triples)
    with pytest.raises(ValueError, match="looks like index pairs"):
        dln.MatrixCompletion().fit([t[:2] for t in triples])


def test_single_precision_is_close():
    pairs, ratings, _ = noisy_ratings()
    settings = {"stopping__validation_fraction": 0.0, "steps": 60}
    double = quick(**settings).fit(pairs, ratings)
    single = quick(layers__dtype="float32", **settings).fit(pairs, ratings)
    assert single.trajectories_[-1].config["dtype"] == "float32"
    # Small modes grow from the rounding of the start: differences in some of them reach a hundredth.
    apart = np.linalg.norm(single.predict() - double.predict()) / np.linalg.norm(double.predict())
    assert apart < 5e-3


@both
def test_scaled_ratings_give_scaled_predictions(make_model):
    pairs, ratings, _ = noisy_ratings()
    one, eight = (
        make_model(stopping__validation_fraction=0.0).fit(pairs, factor * ratings) for factor in (1, 8)
    )
    np.testing.assert_allclose(eight.predict(), 8 * one.predict(), rtol=1e-10)


def test_learning_rates_and_outer_factors_reach_the_run():
    pairs, ratings, _ = noisy_ratings()
    model = quick(layers=dln.LayerOptions(learning_rate=dln.Adaptive(safety=0.5), outer=0.1)).fit(
        pairs, ratings
    )
    assert model.trajectories_[-1].config["adaptive"]["safety"] == 0.5
    assert model.trajectories_[-1].config["learning_rate"] == [0.1, 1.0, 0.1]
    model = quick(layers__learning_rate=0.5, layers__outer=2.0, stopping__validation_fraction=0.0).fit(
        pairs, ratings
    )
    assert model.trajectories_[-1].config["learning_rate"] == [1.0, 0.5, 1.0]
    with pytest.raises(dln.DivergedError):
        quick(layers__learning_rate=1e9).fit(pairs, ratings)


def test_parameters_can_be_set_and_read():
    model = dln.MatrixCompletion(7, depth=2)
    settings = model.get_params(deep=False)
    assert (settings["rank"], settings["depth"], settings["biases"]) == (7, 2, "auto")
    assert len(settings) == 13
    assert dln.MatrixCompletion(**settings).get_params(deep=False) == settings
    assert model.set_params(rank=3, biases=None) is model
    assert repr(model) == "MatrixCompletion(rank=3, depth=2, biases=None)"
    with pytest.raises(ValueError, match="'ranks' is no setting of MatrixCompletion: biases, checkpoint"):
        model.set_params(ranks=3)


def test_single_options_are_read_and_set():
    model = dln.MatrixCompletion(layers=dln.LayerOptions(scale=0.1))
    deep = model.get_params()
    assert (deep["layers__scale"], deep["layers__outer"], deep["biases__kind"]) == (0.1, 1.0, "auto")
    model.set_params(layers__outer=2.0, biases="rows", biases__penalty=5.0)
    assert model.layers == dln.LayerOptions(scale=0.1, outer=2.0)
    assert model.biases == dln.BiasOptions("rows", 5.0)
    assert dln.MatrixCompletion().layers == dln.LayerOptions()  # the default is not changed
    assert dln.MatrixCompletion().set_params(**model.get_params()).get_params() == model.get_params()
    for name in ("layers__ranks", "rank__layers", "layers__"):
        with pytest.raises(ValueError, match=f"'{name}' is no setting of MatrixCompletion"):
            model.set_params(**{name: 1})


@pytest.mark.parametrize(
    ("keyword", "replacement"),
    [
        ("scale", "layers=LayerOptions(scale=...)"),
        ("compress", "layers=LayerOptions(compress=...)"),
        ("learning_rate", "layers=LayerOptions(learning_rate=...)"),
        ("bias_penalty", "biases=BiasOptions(penalty=...)"),
        ("patience", "stopping=StoppingOptions(patience=...)"),
        ("clip", "entries=EntryOptions(clip=...)"),
    ],
)
def test_keywords_of_0_1_0_raise_an_error_that_names_the_new_option(keyword, replacement):
    with pytest.raises(
        TypeError, match=re.escape(f"no keyword {keyword!r} since version 0.2.0: write {replacement}")
    ):
        dln.MatrixCompletion(**{keyword: 1})
    with pytest.raises(ValueError, match=re.escape(f"since version 0.2.0 write {replacement}")):
        dln.MatrixCompletion().set_params(**{keyword: 1})


def test_methods_before_fit_raise():
    for call in (
        lambda m: m.predict([[0, 0]]),
        lambda m: m.score([[0, 0]], [1]),
        lambda m: m.rmse([[0, 0]], [1]),
    ):
        with pytest.raises(NotFittedError, match=r"not fitted: call fit\(X, y\) first"):
            call(dln.MatrixCompletion())


@both
def test_a_fitted_estimator_can_be_pickled(make_model):
    pairs, ratings, _ = noisy_ratings()
    model = make_model().fit(pairs, ratings)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(), model.predict())


@pytest.mark.parametrize("settings", [{"steps": 2}, {"method": "gradient", "steps": 20}], ids=str)
def test_a_pickle_takes_little_more_than_the_factors(settings):
    generator = np.random.default_rng(0)
    pairs = np.unique(generator.integers(0, [2000, 1500], (40_000, 2)), axis=0)
    ratings = 3 + generator.standard_normal(len(pairs))
    model = make(
        rank=16,
        stopping__validation_fraction=0.0,
        **settings,
        **({"weight_decay": 0.0} if "method" in settings else {}),
    )
    model.fit(pairs, ratings)
    assert len(pickle.dumps(model)) < 1.5 * (model.row_factors_.nbytes + model.column_factors_.nbytes)


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
        (PAIRS, [1.0, np.nan, 3.0], ValueError, "wanted numbers: leave out unknown values, or mask them"),
        (PAIRS, [1.0, np.inf, 3.0], ValueError, "not finite: inf"),
        (PAIRS, np.array([1, "b", 2], object), TypeError, r"got ndarray with 'b' of type str at \(1,\)"),
        ({"a": 1}, None, dln.ShapeError, "X is dict; wanted a matrix"),
        (iter(PAIRS), RATINGS, dln.ShapeError, "X is list_iterator; wanted pairs"),
        (
            [["a", "x"], ["b", "y"]],
            None,
            TypeError,
            r'shape \(2, 2\), and y is None.*EntryOptions\(form="long"',
        ),
        ([["a", "x"], ["b"]], [1.0, 2.0], dln.ShapeError, "not a rectangular array"),
        ([[10**9, 0]], [1.0], ValueError, "reaches position 1000000000 of the rows .* pass strings or categ"),
        ([[0, 10**15]], [1.0], ValueError, "reaches position 1000000000000000 of the columns with 1 entries"),
        (PAIRS, ["a", "b", "c"], TypeError, "y"),
        ([[1.0, np.inf]], None, ValueError, "not finite: inf"),
        ([[0, 0], [1, -2], [1, 0]], RATINGS, ValueError, r"X\[1\] is \(1, -2\); wanted indices from 0"),
        ([[0.0, 0.5]], [1.0], TypeError, "X has dtype float64; wanted integers from 0, or ids"),
        ([[0, 0, 0]], [1.0], dln.ShapeError, r"X has shape \(1, 3\); wanted pairs"),
        ([0, 1], [1.0, 2.0], dln.ShapeError, r"X has shape \(2,\)"),
        ([1.0, 2.0], None, dln.ShapeError, r"X has shape \(2,\); wanted a matrix"),
        ([[1.0], [2.0, 3.0]], None, dln.ShapeError, "not a rectangular array"),
        ([["a"]], None, TypeError, "X has dtype"),
        ([[0, 0], [0, 0]], [1.0, 2.0], ValueError, r"\(0, 0\) twice, rated 1 and 2"),
    ],
)
def test_errors_name_bad_entries(X, y, error, message):
    with pytest.raises(error, match=message):
        dln.MatrixCompletion().fit(X, y)


def test_ratings_beside_a_sparse_matrix_are_refused():
    sparse = import_sparse()
    with pytest.raises(TypeError, match="y is set, but the sparse matrix X"):
        dln.MatrixCompletion().fit(sparse.eye_array(3), [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank": 3}, ValueError, "rank is 3; wanted at most 2, the smaller side of the 2 x 2 matrix"),
        ({"rank": 0}, ValueError, "rank is 0"),
        ({"rank": 2.5}, TypeError, "rank is 2.5"),
        ({"method": "als"}, ValueError, "method is 'als'; wanted one of 'variational', 'gradient'"),
        ({"depth": 3}, ValueError, 'depth is 3, but method "variational" has 2 layers'),
        ({"weight_decay": 0.1}, ValueError, 'weight_decay is 0.1, but method "variational" learns it'),
        ({"method": "gradient", "depth": 1}, ValueError, "depth is 1; wanted an integer of at least 2"),
        ({"stopping__budget": 0}, ValueError, "budget is 0"),
        ({"layers__outer": 0}, ValueError, "outer is 0"),
        ({"layers__scale": -1}, ValueError, "scale is -1"),
        ({"layers__learning_rate": "fast"}, ValueError, "learning_rate is 'fast'; wanted \"adaptive\""),
        ({"layers__learning_rate": 0}, ValueError, "learning_rate is 0"),
        (
            {"method": "gradient", "weight_decay": "some"},
            ValueError,
            "weight_decay is 'some'; wanted \"auto\" or a number",
        ),
        ({"method": "gradient", "weight_decay": -0.1}, ValueError, "weight_decay is -0.1"),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"stopping__tolerance": -1}, ValueError, "tolerance is -1"),
        (
            {"biases": "all"},
            ValueError,
            "biases is 'all'; wanted one of 'auto', 'both', 'rows', 'columns', 'mean', None",
        ),
        ({"biases__penalty": -1}, ValueError, "biases.penalty is -1"),
        ({"biases__penalty": (1, -1)}, ValueError, r"biases.penalty\[1\] is -1"),
        ({"biases__penalty": (1, 2, 3)}, TypeError, "biases.penalty is .*; wanted two numbers"),
        ({"entries__weighting": 0.5}, TypeError, "weighting is 0.5; wanted two numbers"),
        (
            {"stopping__validation_fraction": 1.0},
            ValueError,
            r"validation_fraction is 1; wanted a number in \[0, 1\)",
        ),
        ({"method": "gradient", "stopping__validation_fraction": 0}, ValueError, "nothing to choose it by"),
        ({"stopping__patience": 0}, ValueError, "patience is 0"),
        ({"stopping__record_every": 0}, ValueError, "record_every is 0"),
        ({"entries__clip": "all"}, ValueError, "clip is 'all'"),
        ({"entries__clip": (5, 1)}, ValueError, r"clip is \(5, 1\); wanted the lower bound first"),
        ({"entries__shape": (2, 1)}, ValueError, r"X reaches row 1 and column 1; entries.shape is \(2, 1\)"),
        ({"entries__shape": 2}, TypeError, "shape is 2; wanted two integers"),
        ({"entries__duplicates": "last"}, ValueError, "duplicates is 'last'; wanted one of 'error', 'mean'"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"layers": 3}, TypeError, "layers is int; wanted dlnfast.LayerOptions"),
        ({"biases": 3}, TypeError, "biases is int; wanted dlnfast.BiasOptions"),
        ({"n_threads": -1}, ValueError, "n_threads is -1"),
        ({"layers__dtype": "float16"}, TypeError, "dtype is float16; wanted float64 or float32"),
    ],
    ids=str,
)
def test_errors_name_bad_settings(settings, error, message):
    model = make(**settings)  # no error yet
    with pytest.raises(error, match=message):
        model.fit(PAIRS, RATINGS)


def test_errors_name_pairs_that_cannot_be_predicted():
    model = dln.MatrixCompletion().fit(PAIRS, RATINGS)
    with pytest.raises(ValueError, match="wanted indices from 0"):
        model.predict([[0, -1]])
    with pytest.raises(TypeError, match="wanted integers"):
        model.predict([[0.0, 1.0]])
    with pytest.raises(dln.ShapeError, match="wanted pairs"):
        model.predict([0, 1])


def test_predict_of_no_pairs_returns_an_empty_array():
    model = dln.MatrixCompletion().fit(PAIRS, RATINGS)
    assert model.predict(np.zeros((0, 2), int)).shape == (0,)
    assert model.predict([]).shape == (0,)


def test_a_matrix_of_another_shape_is_refused():
    with pytest.raises(dln.ShapeError, match=r"shape is \(3, 3\), but X has shape \(2, 2\)"):
        make(entries__shape=(3, 3)).fit(np.eye(2))
    matrix = np.random.default_rng(0).standard_normal((4, 3))
    model = dln.MatrixCompletion().fit(matrix)
    for part, message in (
        (matrix[2:], "X has 2 rows; wanted 4"),
        (np.eye(4), "X has 4 columns; wanted 3"),
    ):
        with pytest.raises(dln.ShapeError, match=f"{message}.*pass it pairs and ratings"):
            model.score(part)  # its rows would be taken for the first ones


@pytest.mark.parametrize(("dtype", "scales"), [("float32", (1e-12, 1e20)), ("float64", (1e-90, 1e90))])
def test_ratings_beyond_the_range_of_the_precision_are_refused(dtype, scales):
    pairs, ratings, _ = noisy_ratings()
    for scale in scales:
        with pytest.raises(
            ValueError, match=f"standard deviation .* in {dtype}: multiply them by a constant"
        ):
            make(layers__dtype=dtype).fit(pairs, scale * ratings)
    constant = make(layers__dtype=dtype).fit(pairs, np.full(len(pairs), scales[1]))
    np.testing.assert_allclose(constant.predict(pairs), scales[1])


def test_a_large_matrix_is_not_predicted_whole():
    wide = make(entries__shape=(2**15, 2**15)).fit(PAIRS, RATINGS)
    with pytest.raises(ValueError, match="X is None, but the matrix has 32768 x 32768 entries; wanted pairs"):
        wide.predict()


# ------------------------------------------------------------------------------------------- interruption


def interrupting(monkeypatch, at, of_calls):
    """Interrupt the run of one call of `train` at a step, as Ctrl-C does."""
    calls = []

    def train(*arguments, **options):
        calls.append(options["steps"])

        def press(step, loss):
            if len(calls) in of_calls and step >= at:
                raise KeyboardInterrupt

        return dln.train(*arguments, **with_record(options, callback=press))

    monkeypatch.setattr(gradient_descent, "train", train)
    return calls


def test_ctrl_c_in_the_last_run_keeps_the_learned_factors(monkeypatch):
    pairs, ratings, _ = noisy_ratings()
    settings = {"stopping__validation_fraction": 0.0, "steps": 160}
    interrupting(monkeypatch, 105, {1})
    model = quick(**settings)
    with pytest.raises(KeyboardInterrupt) as caught:
        model.fit(pairs, ratings)
    assert caught.value.__notes__[-1] == "the estimator is fitted, up to step 100"
    assert (model.n_steps_, model.trajectories_[-1].steps[-1]) == (100, 110)
    monkeypatch.undo()
    shorter = quick(**settings | {"steps": 100}).fit(pairs, ratings)
    np.testing.assert_allclose(model.predict(), shorter.predict(), rtol=1e-12)


def test_ctrl_c_while_settings_are_tried_keeps_the_best(monkeypatch):
    pairs, ratings, _ = noisy_ratings()
    interrupting(monkeypatch, 0, {4})
    model = make(method="gradient")
    with pytest.raises(KeyboardInterrupt):
        model.fit(pairs, ratings)
    assert 0 < model.n_steps_ <= 30
    assert model.rmse(pairs, ratings) < np.std(ratings)
    assert model.trajectories_ == []
    assert (model.weight_decay_, model.validation_) == (gradient_descent.DECAYS[0], [])


def test_ctrl_c_at_the_start_keeps_the_biases(monkeypatch):
    pairs, ratings, _ = noisy_ratings()
    interrupting(monkeypatch, 0, {1})
    model = make(method="gradient")
    with pytest.raises(KeyboardInterrupt):
        model.fit(pairs, ratings)
    assert model.n_steps_ == 0
    assert not model.row_factors_.any()
    assert model.predict([[0, 99]]) == model.mean_ + model.row_bias_[0]


@pytest.mark.parametrize("at", [1, 6, 20, 26])
def test_ctrl_c_between_sweeps_keeps_the_best_factors(at, monkeypatch):
    pairs, ratings, whole = noisy_ratings(n=1200)
    calls = []
    update = variational.Posterior._update_side

    def press(*arguments):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        update(*arguments)

    monkeypatch.setattr(variational.Posterior, "_update_side", press)
    model = make(rank=4, steps=9)
    with pytest.raises(KeyboardInterrupt) as caught:
        model.fit(pairs, ratings)
    assert caught.value.__notes__[-1] == f"the estimator is fitted, up to sweep {model.n_steps_}"
    assert (model.n_steps_ > 0) == (at > 1) == model.row_factors_.any()
    biases = fit_biases(Entries(*pairs.T, ratings, whole.shape), "both", (3.0, 3.0))
    alone = np.sqrt(np.mean((biases.at(*pairs.T) - ratings) ** 2))
    assert model.rmse(pairs, ratings) <= (alone * (1 + 1e-5) if at == 1 else 0.6 * alone)


# ------------------------------------------------------------------------------------------ scikit-learn


@pytest.fixture
def sklearn():
    return pytest.importorskip("sklearn", reason="scikit-learn is optional")


@pytest.mark.usefixtures("sklearn")
def test_scikit_learn_clones_the_estimator():
    from sklearn.base import clone, is_regressor

    model = quick(entries__clip=(0.5, 5.0))
    copy = clone(model)
    assert copy is not model
    assert copy.get_params() == model.get_params()
    assert is_regressor(model)


@pytest.mark.usefixtures("sklearn")
def test_scikit_learn_cross_validates_the_estimator():
    from sklearn.model_selection import KFold, cross_val_score

    pairs, ratings, _ = noisy_ratings()
    model, folds = quick(entries__clip=(0.5, 5.0)), KFold(3, shuffle=True, random_state=0)
    scores = cross_val_score(model, pairs, ratings, cv=folds)
    assert scores.shape == (3,)
    assert scores.min() > 0.3
    scores = cross_val_score(model, pairs, ratings, cv=folds, scoring="neg_root_mean_squared_error")
    assert scores.max() < 0


@pytest.mark.usefixtures("sklearn")
def test_scikit_learn_searches_over_settings_of_the_estimator():
    from sklearn.model_selection import GridSearchCV, KFold
    from sklearn.utils.validation import check_is_fitted

    pairs, ratings, _ = noisy_ratings()
    folds = KFold(3, shuffle=True, random_state=0)
    grid = {"rank": [1, 2], "biases": ["both", None], "layers__scale": [1e-3, 1e-2]}
    searched = GridSearchCV(quick(entries__clip=(0.5, 5.0)), grid, cv=folds).fit(pairs, ratings)
    assert searched.best_params_["biases"] in ("both", None)
    assert searched.best_estimator_.layers.scale == searched.best_params_["layers__scale"]
    check_is_fitted(searched.best_estimator_)
    assert searched.predict(pairs).shape == ratings.shape


def test_scikit_learn_is_not_loaded(run_python):
    program = (
        "import sys, dlnfast as dln\n"
        "dln.MatrixCompletion().fit([[0, 0], [0, 1], [1, 0], [1, 1]], [1, 2, 3, 5.])\n"
        "print('sklearn' in sys.modules, 'scipy' in sys.modules)"
    )
    assert run_python(program).split() == ["False", "False"]
