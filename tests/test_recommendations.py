# SPDX-License-Identifier: MIT
"""`MatrixCompletion` for recommenders: ids, tables, weights, new rows, recommendations, Ctrl-C."""

from __future__ import annotations

import copy
import datetime
import os
import pickle
import sys
import time
import warnings
from fractions import Fraction

import numpy as np
import pytest
from helpers.optional_packages import import_sparse
from tolerances import tolerance

import dlnfast as dln
from dlnfast._completion import estimator, fitted, search
from dlnfast._completion.entries import Entries, fit_biases
from dlnfast._completion.estimator import NotFittedError
from dlnfast._completion.recommend import Seen, best_columns

#: Results that pass through the eigenvectors of priors: errors of rounding times their condition numbers.
CLOSE = 1e-6


@pytest.fixture(scope="module")
def pandas():
    return pytest.importorskip("pandas", reason="pandas is optional")


@pytest.fixture(scope="module")
def polars():
    return pytest.importorskip("polars", reason="polars is optional")


def make_ratings(shape=(90, 60), share=0.4, seed=0, noise=0.3):
    """Return pairs sorted by rows, noisy ratings, and the ratings without noise: biases plus rank 2."""
    rng = np.random.default_rng(seed)
    whole = 3 + 0.5 * rng.standard_normal((shape[0], 1)) + 0.5 * rng.standard_normal(shape[1])
    whole = whole + rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1]))
    pairs = np.argwhere(rng.random(shape) < share)
    return pairs, whole[tuple(pairs.T)] + noise * rng.standard_normal(len(pairs)), whole


def make(**settings):
    return dln.MatrixCompletion().set_params(**{"n_threads": 1, "rank": 3} | settings)


def shift(pairs, rows, columns=0):
    """Return pairs with other positions."""
    return pairs + np.array([rows, columns])


def name_pairs(pairs):
    names = np.empty(pairs.shape, object)
    names[:, 0] = [f"user {i:03}" for i in pairs[:, 0]]
    names[:, 1] = [("item", int(j)) for j in pairs[:, 1]]
    return names


PAIRS, RATINGS, WHOLE = make_ratings()
NAMES = name_pairs(PAIRS)


@pytest.fixture(scope="module")
def model():
    return make().fit(PAIRS, RATINGS)


@pytest.fixture(scope="module")
def named():
    return make().fit(NAMES, RATINGS)


# ---------------------------------------------------------------------------------------------------- ids


def test_ids_of_any_type_give_the_fit_of_their_positions(model, named):
    assert model.row_ids_ is None
    assert model.column_ids_ is None
    assert named.row_ids_[:2].tolist() == ["user 000", "user 001"]
    assert named.shape_ == model.shape_
    np.testing.assert_array_equal(named.predict(), model.predict())
    np.testing.assert_array_equal(named.predict(NAMES), model.predict(PAIRS))
    order = np.random.default_rng(0).permutation(len(NAMES))
    np.testing.assert_array_equal(make().fit(NAMES[order], RATINGS[order]).predict(), model.predict())
    assert named.rmse(NAMES, RATINGS) == pytest.approx(model.rmse(PAIRS, RATINGS), rel=CLOSE)
    assert named.score(NAMES, RATINGS) == pytest.approx(model.score(PAIRS, RATINGS), rel=CLOSE)


def test_ids_may_be_on_one_side_only():
    mixed = NAMES.copy()
    mixed[:, 1] = PAIRS[:, 1]
    found = make().fit(mixed, RATINGS)
    assert found.column_ids_ is None
    assert found.row_ids_[0] == "user 000"
    lists = make(rank=1).fit([["a", 0], ["a", 1], ["b", 0], ["b", 2]], [1.0, 2.0, 3.0, 4.0])
    assert (lists.row_ids_.tolist(), lists.column_ids_) == (["a", "b"], None)


def test_unknown_ids_are_new_rows_and_columns(named):
    item = NAMES[0, 1]
    bias = named.column_bias_[list(named.column_ids_).index(item)]
    assert named.predict(_pairs(("nobody", item))) == named.mean_ + bias
    assert named.predict(_pairs(("nobody", "nothing"))) == named.mean_


def _pairs(*pairs):
    found = np.empty((len(pairs), 2), object)
    for i, pair in enumerate(pairs):
        found[i, 0], found[i, 1] = pair
    return found


@pytest.mark.parametrize("missing", [None, float("nan"), np.datetime64("NaT")], ids=str)
def test_a_missing_id_is_an_error_that_names_the_entry(missing):
    with pytest.raises(ValueError, match="X has no id of rows at 1: it is missing"):
        make().fit(_pairs(("a", "x"), (missing, "y"), ("b", "x")), [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="X has no id of columns at 2"):
        make().fit(_pairs(("a", "x"), ("c", "y"), ("b", missing)), [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (
            _pairs(("a", {}), ("b", "x")),
            TypeError,
            "X has {} of type dict as id of columns at 0; wanted a hash",
        ),
        (
            _pairs(("a", 0.5), ("b", 1)),
            TypeError,
            r"X \(second column\) has 0.5 of type float; wanted integers",
        ),
        (
            _pairs(("a", 1), (Fraction(1, 2), 1)),
            TypeError,
            r"X \(first column\) has Fraction\(1, 2\) of type",
        ),
        (_pairs(("a", True), ("b", False)), TypeError, "has True of type bool; wanted integers, or ids"),
        (_pairs(("a", 0.5), ("b", 1))[:, :1], dln.ShapeError, r"X has shape \(2, 1\)"),
        (_pairs(("a", 0), ("b", -1)), ValueError, r"X \(second column\) is -1 at 1; wanted indices from 0"),
        (_pairs(("a", "x"), ("a", "x")), ValueError, r"X has \('a', 'x'\) twice, rated 1 and 2"),
    ],
)
def test_errors_name_bad_ids(X, error, message):
    with pytest.raises(error, match=message):
        make().fit(X, [1.0, 2.0])


def test_ids_and_positions_are_not_mixed_up(model, named):
    with pytest.raises(
        TypeError, match="X has integers for rows; wanted ids, such as 'user 000', as `fit` had"
    ):
        named.predict(PAIRS)
    with pytest.raises(
        TypeError, match="X has rows with ids, such as 'user 000'; wanted integers, as `fit` had"
    ):
        model.predict(NAMES)
    with pytest.raises(ValueError, match=r"shape is .*, but X has ids, which determine it; wanted None"):
        make(entries__shape=(200, 100)).fit(NAMES, RATINGS)


# ------------------------------------------------------------------------------------------------- tables


def test_tables_of_pandas(pandas, named):
    table = pandas.DataFrame(
        {"user": NAMES[:, 0], "item": [f"item {j:02}" for j in PAIRS[:, 1]], "stars": RATINGS}
    )
    pairs = table[["user", "item"]]
    expected = named.predict(NAMES)
    for X, y in (
        (pairs, table["stars"]),
        (table, None),
        (pairs.astype("category"), table["stars"].astype("Float64")),
        (pairs.astype("string"), RATINGS),
    ):
        found = make().fit(X, y)
        np.testing.assert_allclose(found.predict(pairs), expected, rtol=CLOSE)
        assert found.rmse(X, y) == pytest.approx(named.rmse(NAMES, RATINGS), rel=CLOSE)
        assert found.row_ids_.tolist() == named.row_ids_.tolist()


def test_integers_in_a_table_are_positions_and_categories_are_ids(pandas, model):
    table = pandas.DataFrame(PAIRS, columns=["user", "item"])
    for kind in ("int32", "Int64"):
        found = make().fit(table.astype(kind), RATINGS)
        assert found.row_ids_ is None
        np.testing.assert_array_equal(found.predict(), model.predict())
    found = make().fit(table.add(1000).astype("category"), RATINGS)
    assert found.row_ids_.dtype == np.int64
    assert found.row_ids_[0] == 1000
    np.testing.assert_allclose(found.predict(PAIRS + 1000), model.predict(PAIRS), rtol=CLOSE)
    gap = table.astype("Int64")
    gap.iloc[4, 1] = pandas.NA
    with pytest.raises(ValueError, match="X has no id of columns at 4: it is missing"):
        make().fit(gap, RATINGS)
    with pytest.raises(ValueError, match="X has no id of columns at 4: it is missing"):
        make().fit(gap.astype({"item": "float64"}), RATINGS)


def test_a_wide_table_has_its_ids_in_index_and_columns(pandas, model):
    dense = np.full(WHOLE.shape, np.nan)
    dense[tuple(PAIRS.T)] = RATINGS
    wide = pandas.DataFrame(dense, [f"u{i}" for i in range(90)], [f"v{j}" for j in range(60)])
    for table in (wide, wide.astype("Float64")):
        found = make().fit(table)
        np.testing.assert_array_equal(found.predict(), model.predict())
        assert found.row_ids_.tolist() == list(wide.index)
        assert found.column_ids_.tolist() == list(wide.columns)
        assert found.rmse(table) == pytest.approx(found.rmse(dense))
        assert found.rmse(table.iloc[::-1, ::-1]) == pytest.approx(found.rmse(dense))
    plain = make().fit(pandas.DataFrame(dense))
    assert plain.row_ids_ is None
    np.testing.assert_array_equal(plain.predict(), model.predict())


def test_long_and_wide_tables_are_told_apart_or_refused(pandas):
    long = pandas.DataFrame(np.column_stack([PAIRS, RATINGS]), columns=["user", "item", "stars"])
    long = long.astype({"user": int, "item": int})
    with pytest.raises(
        ValueError, match=r'looks like index pairs.*entries.form "long" .* "wide" for a matrix'
    ):
        make().fit(long)
    found = make(entries__form="long").fit(long)
    np.testing.assert_array_equal(found.predict(), make().fit(PAIRS, RATINGS).predict())
    assert found.rmse(long) == pytest.approx(found.rmse(PAIRS, RATINGS))
    assert make(entries__form="wide").fit(long).shape_ == (len(PAIRS), 3)
    with pytest.raises(dln.ShapeError, match="X has 4 columns; wanted 3: row, column, rating"):
        make(entries__form="long").fit(long.assign(time=1))
    with pytest.raises(ValueError, match="looks like index pairs"):
        make().fit(long.assign(time=1))  # a file of ratings with their times
    for part in (pandas.concat([long, long.head(5)]), long.sample(frac=0.8, random_state=0)):
        with pytest.raises(ValueError, match="looks like index pairs"):
            make().fit(part)
    with pytest.raises(ValueError, match=r"X has \(4, 'b'\) twice"):
        make(rank=1).fit(pandas.DataFrame([[0.5, 1.0], [np.nan, 2.0]], index=[4, 4], columns=["a", "b"]))
    for table in (long.assign(user=NAMES[:, 0], time=1), long.assign(user=NAMES[:, 0], time=1).to_numpy()):
        with pytest.raises(
            TypeError, match=r"'user' has dtype .*; wanted three columns|with 'user 000' of type str"
        ):
            make().fit(table)
    with pytest.raises(ValueError, match=r"entries.form is 'tall'; wanted one of 'auto', 'long', 'wide'"):
        make(entries__form="tall").fit(long)


def test_tables_of_polars(polars, named):
    table = polars.DataFrame(
        {"user": NAMES[:, 0].tolist(), "item": [f"item {j:02}" for j in PAIRS[:, 1]], "stars": RATINGS}
    )
    for X, y in (
        (table.select("user", "item"), table["stars"]),
        (table, None),
        (table.with_columns(polars.col("user").cast(polars.Categorical)), None),
    ):
        found = make().fit(X, y)
        np.testing.assert_allclose(found.predict(X.select("user", "item")), named.predict(NAMES), rtol=CLOSE)
    gap = table.with_columns(polars.Series("user", [None, *NAMES[1:, 0].tolist()]))
    with pytest.raises(ValueError, match="X has no id of rows at 0"):
        make().fit(gap)
    dense = np.full(WHOLE.shape, np.nan)
    dense[tuple(PAIRS.T)] = RATINGS
    columns = {f"v{j}": [None if np.isnan(x) else x for x in dense[:, j]] for j in range(60)}
    wide = make().fit(polars.DataFrame(columns))
    assert (wide.row_ids_, wide.column_ids_.tolist()) == (None, list(columns))
    np.testing.assert_array_equal(wide.predict(), named.predict())
    numbers = polars.DataFrame(PAIRS, schema=["user", "item"])
    np.testing.assert_array_equal(
        make().fit(numbers, RATINGS).predict(), make().fit(PAIRS, RATINGS).predict()
    )


def test_unknown_ratings_of_a_polars_table_only_count_for_the_shape(polars):
    stars = RATINGS.tolist()
    stars[-1] = None
    found = make().fit(PAIRS, polars.Series(stars))
    np.testing.assert_array_equal(
        found.predict(), make(entries__shape=WHOLE.shape).fit(PAIRS[:-1], RATINGS[:-1]).predict()
    )


def test_masked_entries_are_unknown_and_explicit_zeros_known():
    sparse = import_sparse()
    ratings = RATINGS.copy()
    ratings[3] = 0.0
    masked = np.ma.masked_all(WHOLE.shape)
    masked[tuple(PAIRS.T)] = ratings
    stored = sparse.coo_array((ratings, tuple(PAIRS.T)), shape=WHOLE.shape)
    expected = make().fit(PAIRS, ratings).predict()
    np.testing.assert_array_equal(make().fit(masked).predict(), expected)
    np.testing.assert_array_equal(make().fit(stored).predict(), expected)


# ------------------------------------------------------------------------------------------------ weights


def test_equal_weights_change_nothing(model):
    for weight in (1.0, 4.0):
        found = make().fit(PAIRS, RATINGS, np.full(len(PAIRS), weight))
        np.testing.assert_allclose(found.predict(), model.predict(), rtol=1e-9)


def test_entries_of_weight_zero_are_left_out():
    weights = np.ones(len(PAIRS))
    weights[::7] = 0.0
    kept = weights > 0
    expected = make(entries__shape=WHOLE.shape).fit(PAIRS[kept], RATINGS[kept])
    found = make().fit(PAIRS, np.where(kept, RATINGS, 1e3), weights)
    np.testing.assert_allclose(found.predict(), expected.predict(), rtol=1e-9)


def test_weights_are_relative_precisions():
    rng = np.random.default_rng(5)
    is_noisy = rng.random(len(PAIRS)) < 0.5
    ratings = RATINGS + np.where(is_noisy, 2.0, 0.0) * rng.standard_normal(len(PAIRS))
    weights = np.where(is_noisy, 0.09 / 4.09, 1.0)
    errors = [
        np.sqrt(np.mean((make().fit(PAIRS, ratings, w).predict() - WHOLE) ** 2)) for w in (None, weights)
    ]
    assert errors[1] < 0.6 * errors[0]


def test_biases_with_weights_minimise_the_weighted_squares():
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.2, 3.0, len(PAIRS))
    weights /= weights.mean()
    found = fit_biases(Entries(*PAIRS.T, RATINGS, WHOLE.shape, weights), "both", (2.0, 1.0))
    residual = weights * (RATINGS - found.at(*PAIRS.T))
    np.testing.assert_allclose(np.bincount(PAIRS[:, 0], residual), 2.0 * found.rows, atol=1e-6)
    np.testing.assert_allclose(np.bincount(PAIRS[:, 1], residual), 1.0 * found.columns, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_core_weights_single_entries(core, dtype):
    rng = np.random.default_rng(1)
    n_rows, n_columns, k = 7, 9, 2
    mask = rng.random((n_rows, n_columns)) < 0.7
    index = [np.flatnonzero(row).astype(np.int32) for row in mask]
    start = np.concatenate([[0], np.cumsum([len(each) for each in index])])
    index = np.concatenate(index)
    values, entry_weights = rng.standard_normal(len(index)), rng.uniform(0.1, 2.0, len(index))
    length = 16
    others = np.zeros((n_columns, length), dtype)
    vectors = np.hstack(
        [rng.standard_normal((n_columns, k)), np.ones((n_columns, 1)), rng.standard_normal((n_columns, 1))]
    )
    outer = vectors[:, :, None] * vectors[:, None, :]
    others[:, :10] = outer[:, *np.tril_indices(k + 2)]
    weights, own = rng.uniform(0.5, 2.0, n_columns).astype(dtype), rng.uniform(0.5, 2.0, n_rows).astype(dtype)
    precision, shifts = np.eye(k + 1, dtype=dtype), np.zeros((n_rows, k + 1), dtype)
    moments, errors = np.zeros((n_rows, length), dtype), np.zeros(n_rows)
    core.row_posteriors(
        (start, index, values.astype(dtype)), others, weights, entry_weights.astype(dtype), own,
        (precision, shifts), False, moments, errors, 1,
    )  # fmt: skip
    for i in range(n_rows):
        part = slice(start[i], start[i + 1])
        h = vectors[index[part]][:, [0, 1, 2]].copy()
        w = own[i] * weights[index[part]] * entry_weights[part]
        target = values[part] - vectors[index[part], 3]
        mean = np.linalg.solve(np.eye(3) + (w * h.T) @ h, (w * h.T) @ target)
        np.testing.assert_allclose(
            moments[i, [3, 4, 9 - 1]], mean, rtol=40 * tolerance(dtype, 9), atol=40 * tolerance(dtype, 9)
        )
        expected = np.sum(weights[index[part]] * entry_weights[part] * (target - h @ mean) ** 2)
        assert errors[i] == pytest.approx(expected, rel=1e3 * tolerance(dtype, 9))
    with pytest.raises(ValueError, match="entry_weights"):
        core.row_posteriors(
            (start, index, values.astype(dtype)), others, weights, entry_weights[1:].astype(dtype), own,
            (precision, shifts), False, moments, errors, 1,
        )  # fmt: skip


def test_scores_are_weighted(model):
    weights = np.random.default_rng(0).uniform(0.0, 2.0, len(PAIRS))
    error = np.square(model.predict(PAIRS) - RATINGS)
    assert model.rmse(PAIRS, RATINGS, weights) == pytest.approx(np.sqrt(np.average(error, weights=weights)))
    spread = np.average(np.square(RATINGS - np.average(RATINGS, weights=weights)), weights=weights)
    expected = 1 - np.average(error, weights=weights) / spread
    assert model.score(PAIRS, RATINGS, sample_weight=weights) == pytest.approx(expected)


def test_weighted_duplicates_have_the_weighted_mean():
    twice = np.vstack([PAIRS, PAIRS[:1]])
    weights = np.ones(len(twice))
    weights[[0, -1]] = 0.5, 1.5
    ratings = np.append(RATINGS, RATINGS[0] + 4.0)
    found = make(entries__duplicates="mean").fit(twice, ratings, weights)
    single = RATINGS.copy()
    single[0] += 3.0
    np.testing.assert_allclose(found.predict(), make().fit(PAIRS, single).predict(), rtol=1e-9)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0], dln.ShapeError, r"sample_weight has 1 values; wanted \d+, one for each entry"),
        (-np.ones(len(PAIRS)), ValueError, "sample_weight is -1 at 0; wanted numbers of at least 0"),
        (np.zeros(len(PAIRS)), ValueError, "sample_weight is zero for all entries"),
        (np.full(len(PAIRS), np.nan), ValueError, "sample_weight has a value that is not finite"),
    ],
)
def test_errors_name_bad_weights(weights, error, message):
    with pytest.raises(error, match=message):
        make().fit(PAIRS, RATINGS, weights)


def test_gradient_descent_refuses_weights():
    with pytest.raises(TypeError, match='sample_weight is set, but method "gradient" has no weights'):
        make(method="gradient").fit(PAIRS, RATINGS, np.ones(len(PAIRS)))


# ------------------------------------------------------------------------------- new rows and columns


def split_new_rows(pairs, ratings, new, given, seed=0):
    """Return masks of the entries of old rows, and of `given` entries, and the others, of new rows."""
    is_new = np.isin(pairs[:, 0], new)
    order = np.random.default_rng(seed).permutation(len(pairs))
    rank = np.empty(len(pairs), int)
    for row in new:
        mine = order[pairs[order, 0] == row]
        rank[mine] = np.arange(len(mine))
    return ~is_new, is_new & (rank < given), is_new & (rank >= given)


def root_mean_square(x):
    return np.sqrt(np.mean(np.square(x)))


def test_folded_rows_equal_those_of_the_fit(model):
    shifted = shift(PAIRS, len(WHOLE))
    found = model.fold_in(rows=(shifted, RATINGS))
    assert found.shape_ == (180, 60)
    assert model.shape_ == (90, 60)
    assert found.column_factors_ is model.column_factors_
    # The rows of the fit had the columns before its last half sweep, and counts in their prior.
    apart = root_mean_square(found.predict()[90:] - model.predict())
    assert apart < 0.05 * root_mean_square(RATINGS - model.predict(PAIRS))
    np.testing.assert_array_equal(found.predict()[:90], model.predict())
    turned = model.fold_in(columns=(shift(PAIRS, 0, 60), RATINGS))
    assert turned.shape_ == (90, 120)
    apart = root_mean_square(turned.predict()[:, 60:] - model.predict())
    assert apart < 0.05 * root_mean_square(RATINGS - model.predict(PAIRS))


def test_a_folded_row_minimises_the_ridge_of_its_docstring(model):
    """With covariances and priors from the estimator, against a plain solution."""
    entries = np.column_stack([np.full(5, 90), [3, 9, 12, 30, 44]])
    values = np.array([1.0, 4.0, 2.0, 5.0, 3.0])
    found = model.fold_in(rows=(entries, values))
    state = model._fold_in
    prior, others = state.sides
    total, right = prior.precision.copy(), prior.precision @ prior.mean
    for (_, j), value in zip(entries, values, strict=True):
        known = others.counts[j] * others.noise_precisions[j] / state.noise
        covariance = np.linalg.inv(others.precision + known * prior.second_moment)
        h = np.append(model.column_factors_[j], 1.0)
        moment = np.outer(h, h)
        moment[:-1, :-1] += covariance[:-1, :-1]
        crossed = np.append(covariance[:-1, -1], 0.0)
        weight = others.noise_precisions[j] / state.noise
        total += weight * moment
        right += weight * (h * (value - model.mean_ - model.column_bias_[j]) - crossed)
    expected = np.linalg.solve(total, right)
    np.testing.assert_allclose(np.append(found.row_factors_[90], found.row_bias_[90]), expected, rtol=CLOSE)


@pytest.mark.parametrize("method", ["variational", "gradient"])
def test_new_rows_of_five_entries_are_almost_as_good_as_after_a_refit(method):
    pairs, ratings, whole = make_ratings((200, 100), 0.2, seed=3)
    new = np.arange(0, 200, 4)
    old, given, held = split_new_rows(pairs, ratings, new, 5)
    settings = {"method": method, "entries__shape": whole.shape, "rank": 4}
    if method == "gradient":
        settings |= {"steps": 60, "weight_decay": 0.2, "depth": 2, "stopping__validation_fraction": 0.0}
    base = make(**settings).fit(pairs[old], ratings[old])
    refit = make(**settings).fit(pairs[old | given], ratings[old | given])
    biases = fit_biases(Entries(*pairs[old | given].T, ratings[old | given], whole.shape), "both", (3.0, 3.0))
    folded = base.fold_in(rows=(shift(pairs[given], len(whole)), ratings[given]))
    error = folded.rmse(shift(pairs[held], len(whole)), ratings[held])
    assert error < 1.03 * refit.rmse(pairs[held], ratings[held])
    assert error < 0.9 * root_mean_square(biases.at(*pairs[held].T) - ratings[held])
    added = copy.deepcopy(base).partial_fit(pairs[given], ratings[given])
    assert added.rmse(pairs[held], ratings[held]) < 1.03 * refit.rmse(pairs[held], ratings[held])


@pytest.mark.skipif(not os.environ.get("DLNFAST_DATA"), reason="DLNFAST_DATA is not set")
def test_new_users_of_movielens():
    from dlnfast._datasets.ratings import load_movielens

    try:
        users, items, ratings, _, _ = load_movielens()
    except FileNotFoundError:
        pytest.skip("MovieLens is not in DLNFAST_DATA")
    pairs = np.column_stack([users, items])
    new = np.random.default_rng(0).choice(users.max() + 1, 200, replace=False)
    old, given, held = split_new_rows(pairs, ratings, new, 5)
    shape = int(users.max()) + 1, int(items.max()) + 1
    # All sweeps are made, without a search.
    settings = {"rank": 8, "steps": 10, "stopping__validation_fraction": 0.0, "entries__shape": shape}
    base = make(**settings).fit(pairs[old], ratings[old])
    both = old | given
    refit = make(**settings).fit(pairs[both], ratings[both])
    biases = fit_biases(Entries(*pairs[both].T, ratings[both], shape), "both", (3.0, 3.0))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        folded = base.fold_in(rows=(shift(pairs[given], shape[0]), ratings[given]))
        seconds.append(time.perf_counter() - start)
    error = folded.rmse(shift(pairs[held], shape[0]), ratings[held])
    assert error < 1.03 * refit.rmse(pairs[held], ratings[held])
    assert error < root_mean_square(biases.at(*pairs[held].T) - ratings[held])
    assert min(seconds) < 0.1


def test_rows_are_folded_in_by_ids_and_as_matrices(pandas, named, model):
    entries = _pairs(
        ("new", ("item", 3)), ("new", ("item", 9)), ("other", ("item", 3)), ("new", ("item", 777))
    )
    values = [4.0, 1.0, 5.0, 2.0]
    found = named.fold_in(rows=(entries, values))
    assert found.row_ids_[-2:].tolist() == ["new", "other"]
    assert found.column_ids_ is named.column_ids_
    matrix = np.full((2, 60), np.nan)
    matrix[0, [3, 9]], matrix[1, 3] = (4.0, 1.0), 5.0
    plain = model.fold_in(rows=matrix)
    assert plain.shape_ == (92, 60)
    # The unknown item counts as a column without entries, which says something about the row's bias.
    np.testing.assert_allclose(
        found.predict(_pairs(("other", ("item", 5)))), plain.predict([[91, 5]]), rtol=CLOSE
    )
    assert found.predict(_pairs(("new", ("item", 5)))) != pytest.approx(
        plain.predict([[90, 5]])[0], rel=CLOSE
    )
    wide = pandas.DataFrame(matrix[:, [3, 9]], ["new", "other"], [("item", 3), ("item", 9)], dtype=float)
    wide.columns = wide.columns.to_flat_index()
    np.testing.assert_allclose(
        named.fold_in(rows=wide).predict(_pairs(("new", ("item", 5)))), plain.predict([[90, 5]]), rtol=CLOSE
    )


def test_known_rows_are_not_folded_in(model, named):
    with pytest.raises(ValueError, match="X has 4 among the new rows, which is known; wanted new ones"):
        model.fold_in(rows=([[4, 0], [95, 0]], [1.0, 2.0]))
    with pytest.raises(ValueError, match="X has 'user 004' among the new rows, which is known"):
        named.fold_in(rows=(_pairs(("user 004", ("item", 0)), ("new", ("item", 0))), [1.0, 2.0]))
    for given in ({}, {"rows": (PAIRS, RATINGS), "columns": (PAIRS, RATINGS)}):
        with pytest.raises(TypeError, match="fold_in got both or none of rows and columns"):
            model.fold_in(**given)


def test_partial_fit_adds_entries_of_known_rows():
    pairs, ratings, whole = make_ratings((120, 80), 0.35, seed=7)
    order = np.random.default_rng(0).permutation(len(pairs))
    first, later = order[: len(order) * 2 // 3], order[len(order) * 2 // 3 :]
    unknown = np.ones(whole.shape, bool)
    unknown[tuple(pairs.T)] = False
    settings = {"entries__shape": whole.shape}
    errors = {}
    for name, found in {
        "before": make(**settings).fit(pairs[first], ratings[first]),
        "added": make(**settings).fit(pairs[first], ratings[first]).partial_fit(pairs[later], ratings[later]),
        "refit": make(**settings).fit(pairs, ratings),
    }.items():
        errors[name] = root_mean_square((found.predict() - whole)[unknown])
    assert errors["added"] < 1.1 * errors["refit"]
    assert errors["added"] - errors["refit"] < 0.3 * (errors["before"] - errors["refit"])


def test_partial_fit_adds_new_rows_and_columns_at_once(named):
    found = copy.deepcopy(named)
    entries = _pairs(
        ("user 003", "new item"), ("new", "new item"), ("new", ("item", 4)), ("user 005", ("item", 4))
    )
    assert found.partial_fit(entries, [5.0, 5.0, 1.0, 2.0]) is found
    assert found.shape_ == (91, 61)
    assert found.row_ids_[-1] == "new"
    assert found.column_ids_[-1] == "new item"
    level = found.column_bias_[-1]
    assert level > 0
    assert found.predict(_pairs(("user 008", "new item"))) > named.predict(_pairs(("user 008", "new item")))
    same = [i for i in range(90) if i not in (3, 5)]
    np.testing.assert_array_equal(found.row_factors_[same], named.row_factors_[same])


def test_partial_fit_of_an_unfitted_estimator_fits(model):
    np.testing.assert_array_equal(make().partial_fit(PAIRS, RATINGS).predict(), model.predict())


def test_entries_that_are_refused_leave_the_estimator_as_it_was(model):
    found = copy.deepcopy(model)
    before = pickle.dumps(found)
    for X, y in (([[0, -1]], [1.0]), ([[0, 1], [0, 1]], [1.0, 2.0]), ([[0, 1]], [np.inf]), (NAMES, RATINGS)):
        with pytest.raises((ValueError, TypeError)):
            found.partial_fit(X, y)
        with pytest.raises((ValueError, TypeError)):
            found.fold_in(rows=(X, y))
        with pytest.raises((ValueError, TypeError)):
            found.fit(X, y) if X is not NAMES else found.fit(X, y[1:])
    assert pickle.dumps(found) == before


@pytest.mark.parametrize(
    "settings", [{"biases": None}, {"biases": "columns"}, {"method": "gradient", "steps": 50}]
)
def test_models_without_some_biases_fold_in(settings):
    found = make(**settings).fit(PAIRS, RATINGS)
    folded = found.fold_in(rows=(shift(PAIRS, 90), RATINGS))
    if settings.get("biases", "auto") in (None, "columns"):
        assert np.abs(folded.row_bias_).max() < 1e-3
    assert folded.rmse(shift(PAIRS, 90), RATINGS) < 1.2 * found.rmse(PAIRS, RATINGS)


@pytest.mark.parametrize("ratings", [[0.0] * 6, [4.0] * 6, [1e-200] * 6, [1e50, 2e50] * 3])
def test_models_of_biases_alone_fold_in(ratings):
    pairs = [[i, j] for i in range(3) for j in range(2)]
    folded = make(rank=None).fit(pairs, ratings).fold_in(rows=([[3, 0], [3, 1]], ratings[:2]))
    assert np.isfinite(folded.predict()).all()
    np.testing.assert_allclose(folded.predict()[3], ratings[:2], rtol=0.5)


# ----------------------------------------------------------------------------------------- recommendations


def test_recommended_columns_have_the_largest_predictions(model, named):
    whole = model.predict()
    seen = PAIRS[PAIRS[:, 0] == 7, 1]
    columns, values = model.recommend(7, n=5, exclude_seen=False)
    np.testing.assert_array_equal(columns, np.argsort(-whole[7], kind="stable")[:5])
    np.testing.assert_allclose(values, whole[7, columns], rtol=1e-12)
    columns, values = model.recommend(7, n=60)
    assert len(columns) == 60 - len(seen)
    assert not set(columns) & set(seen)
    ids, named_values = named.recommend("user 007", n=60)
    assert {each[1] for each in ids} == set(columns)
    np.testing.assert_allclose(named_values, values, rtol=CLOSE)


def test_several_rows_are_recommended_at_once(model, named):
    columns, values = model.recommend([3, 7, 500], n=58)
    assert columns.shape == values.shape == (3, 58)
    for i, row in enumerate((3, 7)):
        single = model.recommend(row, n=58)[0]
        np.testing.assert_array_equal(columns[i, : len(single)], single)
        assert (columns[i, len(single) :] == -1).all()
        assert np.isnan(values[i, len(single) :]).all()
    np.testing.assert_array_equal(columns[2], np.argsort(-model.column_bias_, kind="stable")[:58])
    ids = named.recommend(["user 003", "nobody"], n=58)[0]
    assert ids[0, -1] is None
    assert ids[1, -1] is not None


def test_columns_seen_after_the_fit_are_excluded(model):
    found = model.fold_in(rows=([[90, 2], [90, 5]], [5.0, 4.0]))
    assert not {2, 5} & set(found.recommend(90, n=60)[0])
    assert {2, 5} <= set(found.recommend(90, n=60, exclude_seen=False)[0])
    later = copy.deepcopy(model).partial_fit([[7, 2]], [5.0])
    assert 2 not in later.recommend(7, n=60)[0]
    forgetful = make(entries__keep_seen=False).fit(PAIRS, RATINGS)
    with pytest.raises(ValueError, match=r"the fit had EntryOptions\(keep_seen=False\)"):
        forgetful.recommend(7)
    assert len(forgetful.recommend(7, exclude_seen=False)[0]) == 10


def test_similar_items_and_users_have_the_largest_cosines(model, named):
    for factors, call, by_id in (
        (model.column_factors_, model.similar_items, lambda: named.similar_items(("item", 4), 3)),
        (model.row_factors_, model.similar_users, lambda: named.similar_users("user 004", 3)),
    ):
        units = factors / np.linalg.norm(factors, axis=1, keepdims=True)
        cosines = units @ units[4]
        cosines[4] = -2.0
        found, values = call(4, 3)
        np.testing.assert_array_equal(found, np.argsort(-cosines)[:3])
        np.testing.assert_allclose(values, cosines[found], rtol=1e-12)
        assert [
            (each[1] if isinstance(each, tuple) else int(each.split()[1])) for each in by_id()[0]
        ] == found.tolist()
    assert model.similar_items([4, 6], 100)[0].shape == (2, 59)
    with pytest.raises(ValueError, match="column is 60, which `fit` does not know"):
        model.similar_items(60)
    with pytest.raises(ValueError, match="row is 'nobody', which `fit` does not know"):
        named.similar_users("nobody")
    with pytest.raises(ValueError, match="n is 0"):
        model.similar_items(4, 0)


def test_the_best_columns_of_ties_are_in_order():
    chosen, values = best_columns(
        np.zeros((1, 1)), np.zeros((6, 1)), np.array([1, 2, 2, 1, 2, 0.0]), 4, [np.array([1], np.int32)]
    )
    assert chosen.tolist() == [[2, 4, 0, 3]]
    assert values.tolist() == [[2.0, 2.0, 1.0, 1.0]]


def test_seen_columns_survive_a_pickle():
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, 50, 4000), rng.integers(0, 100_000, 4000)
    rows[rows == 7] = 8  # an empty row
    seen = Seen(rows, columns, 51)
    again = pickle.loads(pickle.dumps(seen))
    np.testing.assert_array_equal(again.start, seen.start)
    np.testing.assert_array_equal(again.index, seen.index)
    for row in (0, 7, 50, 60):
        assert again.columns_of(row).tolist() == sorted(set(columns[rows == row].tolist()))
    empty = pickle.loads(pickle.dumps(Seen(rows[:0], columns[:0], 3)))
    assert empty.columns_of(1).tolist() == []


@pytest.mark.parametrize("has_ids", [False, True])
def test_a_pickle_is_smaller_than_one_and_a_half_times_the_factors(has_ids):
    rng = np.random.default_rng(0)
    shape = 1500, 600
    pairs = np.argwhere(rng.random(shape) < 0.03)
    ratings = rng.standard_normal(len(pairs))
    X = name_pairs(pairs) if has_ids else pairs
    found = make(rank=16, steps=1, stopping__validation_fraction=0.0).fit(X, ratings)
    found.row_factors_, found.column_factors_ = (rng.standard_normal((n, 16)) for n in shape)
    data = pickle.dumps(found)
    limit = 1.5 if not has_ids else 1.75  # ids take their own space
    assert len(data) < limit * (found.row_factors_.nbytes + found.column_factors_.nbytes)
    again = pickle.loads(data)
    np.testing.assert_array_equal(again.predict(X[:50]), found.predict(X[:50]))
    np.testing.assert_array_equal(again.recommend(X[0, 0])[0], found.recommend(X[0, 0])[0])


def test_methods_before_fit_raise():
    for call in (
        lambda m: m.recommend(0),
        lambda m: m.similar_items(0),
        lambda m: m.similar_users(0),
        lambda m: m.fold_in(rows=(PAIRS, RATINGS)),
    ):
        with pytest.raises(NotFittedError, match=r"not fitted: call fit\(X, y\) first"):
            call(dln.MatrixCompletion())


# ------------------------------------------------------------------------------------------ sorted folds


def test_sorted_folds_without_shuffling_warn_once():
    pytest.importorskip("sklearn", reason="scikit-learn is optional")
    from sklearn.model_selection import KFold, cross_val_score

    with pytest.warns(
        UserWarning, match=r"in rows without entries in `fit`.*KFold\(5, shuffle=True\)"
    ) as caught:
        cross_val_score(make(steps=2), PAIRS, RATINGS, cv=KFold(3))
    assert len(caught) == 3  # one for each of the estimators
    half = len(PAIRS) // 2
    found = make().fit(PAIRS[:half], RATINGS[:half])
    with pytest.warns(UserWarning, match="were sorted by rows"):
        found.predict(PAIRS[half:])
    found.predict(PAIRS[half:])  # pytest makes errors of warnings


def test_other_predictions_do_not_warn(model):
    from_shuffled = np.random.default_rng(0).permutation(len(PAIRS))[: len(PAIRS) // 2]
    make().fit(PAIRS[from_shuffled], RATINGS[from_shuffled]).predict(shift(PAIRS, 1000))
    model.predict([[1000, 3], [1001, 4]])  # a single request, not a fold
    model.predict(PAIRS)


# -------------------------------------------------------------------------------------------- interruption


def interrupt(monkeypatch, owner, name, call=1):
    calls = []
    original = getattr(owner, name)

    def press(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, press)


@pytest.mark.parametrize(
    ("owner", "name", "call", "stage"),
    [
        (fitted, "fit_biases", 1, "mean"),
        (fitted, "split_entries", 1, "biases"),
        (fitted, "CheckpointedFit", 1, "biases"),
        (search, "Posterior", 1, "biases"),
        (search.Posterior, "add_directions", 1, "biases"),
        (search.Posterior, "sweep", 1, "biases"),
        (search.Posterior, "sweep", 2, "search"),
        (search, "Posterior", 2, "search"),
        (search, "normalise_factors", 1, "biases"),
        (estimator, "Seen", 1, "last run"),
    ],
)
def test_ctrl_c_at_any_stage_leaves_a_fitted_estimator(monkeypatch, tmp_path, owner, name, call, stage):
    interrupt(monkeypatch, owner, name, call)
    found = make(rank=2)
    if name == "CheckpointedFit":
        found.set_params(checkpoint=tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:
        found.fit(NAMES, RATINGS)
    assert caught.value.__notes__[-1].startswith("the estimator is fitted, up to sweep")
    check_interrupted(found, stage)


def check_interrupted(found, stage):
    assert found.interrupted_ == stage
    assert (found.n_steps_ > 0) == (stage in ("search", "last run"))
    assert found.row_factors_.any() == (found.n_steps_ > 0)
    assert found.shape_ == WHOLE.shape
    assert found.rmse(NAMES, RATINGS) <= np.std(RATINGS) * (1 + 1e-9)
    assert len(found.recommend("user 003")[0]) == 10
    assert np.isfinite(found.fold_in(rows=(_pairs(("new", ("item", 3))), [4.0])).predict()).all()
    assert (found.biases_ == "mean") == (stage == "mean")


def test_ctrl_c_at_moments_between_all_calls_leaves_a_fitted_estimator():
    """An interrupt at the begin of the n-th call of a function of the package, for many n."""
    counts = {"calls": 0, "at": -1, "is_read": False}

    def trace(frame, event, _):
        code = frame.f_code
        if "dlnfast" not in code.co_filename:
            return None
        counts["is_read"] |= code.co_name == "prepare"
        if counts["is_read"]:
            counts["calls"] += 1
            if counts["calls"] == counts["at"]:
                raise KeyboardInterrupt
        return None

    def run(at):
        counts.update(calls=0, at=at, is_read=False)
        found = make(rank=1, steps=4)
        sys.settrace(trace)
        try:
            found.fit(NAMES, RATINGS)
        except KeyboardInterrupt:
            return found
        finally:
            sys.settrace(None)
        assert found.interrupted_ is None
        return found

    run(-1)
    total = counts["calls"]
    moments = {*range(1, 20), *np.linspace(20, total, 12).astype(int).tolist()}
    stages = set()
    for at in sorted(moments):
        found = run(at)
        check_interrupted(found, found.interrupted_) if found.interrupted_ else None
        stages.add(found.interrupted_)
    assert {"mean", "biases", "search", "last run"} <= stages


def test_a_later_fit_is_complete_again(monkeypatch):
    found = make()
    with monkeypatch.context() as patch:
        interrupt(patch, search.Posterior, "sweep", 3)
        with pytest.raises(KeyboardInterrupt):
            found.fit(PAIRS, RATINGS)
    assert found.interrupted_ == "search"
    assert found.fit(PAIRS, RATINGS).interrupted_ is None


# ------------------------------------------------------------------------------------------ scikit-learn

#: Checks of scikit-learn that do not depend on the meaning of X. The others pass a matrix of features with
#: one target for each row, which no completion can take: X holds pairs of indices, or is the matrix itself.
#: `check_parameters_default_constructible` allows numbers and strings only, not the frozen option classes.
CHECKS = (
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_sparse_array",
    "check_estimator_sparse_matrix",
    "check_estimator_tags_renamed",
    "check_estimators_unfitted",
    "check_fit1d",
    "check_get_params_invariance",
    "check_mixin_order",
    "check_no_attributes_set_in_init",
    "check_non_transformer_estimators_n_iter",
    "check_sample_weights_not_an_array",
    "check_sample_weights_pandas_series",
    "check_set_params",
    "check_supervised_y_no_nan",
    "check_valid_tag_types",
)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.filterwarnings("ignore")
def test_checks_of_scikit_learn(name):
    checks = pytest.importorskip("sklearn.utils.estimator_checks", reason="scikit-learn is optional")
    if not hasattr(checks, name):
        pytest.skip(f"this version of scikit-learn has no {name}")
    getattr(checks, name)("MatrixCompletion", make(rank=None))


def test_the_error_before_fit_is_that_of_scikit_learn():
    exceptions = pytest.importorskip("sklearn.exceptions", reason="scikit-learn is optional")
    with pytest.raises(exceptions.NotFittedError) as caught:
        make().predict([[0, 0]])
    assert isinstance(caught.value, NotFittedError)


def test_fits_do_not_depend_on_the_order_of_entries_or_predictions_on_their_subset(model):
    """As `check_methods_sample_order_invariance`, `_subset_invariance` and `check_fit_idempotent`."""
    order = np.random.default_rng(0).permutation(len(PAIRS))
    np.testing.assert_array_equal(make().fit(PAIRS[order], RATINGS[order]).predict(), model.predict())
    np.testing.assert_array_equal(model.predict(PAIRS[order]), model.predict(PAIRS)[order])
    np.testing.assert_array_equal(model.predict(PAIRS[5:9]), model.predict(PAIRS)[5:9])
    again = make().fit(PAIRS, RATINGS)
    np.testing.assert_array_equal(again.fit(PAIRS, RATINGS).predict(), model.predict())


def test_predictions_and_recommendations_change_no_attribute(model):
    """As `check_dict_unchanged`."""
    before = pickle.dumps(model)
    model.predict(PAIRS), model.recommend(3), model.similar_items(3), model.score(PAIRS, RATINGS)
    model.fold_in(rows=(shift(PAIRS, 90), RATINGS))
    assert pickle.dumps(model) == before


def test_read_only_input_is_accepted_and_left_alone(model):
    """As `check_readonly_memmap_input` and `check_sample_weights_not_overwritten`."""
    pairs, ratings, weights = PAIRS.copy(), RATINGS.copy(), np.full(len(PAIRS), 2.0)
    for array in (pairs, ratings, weights):
        array.setflags(write=False)
    found = make().fit(pairs, ratings, weights).partial_fit(shift(pairs[:3], 90), ratings[:3])
    assert found.shape_ == (91, 60)


# ------------------------------------------------------------------------------------------ what users pass


@pytest.mark.parametrize(
    "ids",
    [[("a", 1), ("b", 2)], [frozenset([1]), frozenset([2])], [datetime.date(2020, 1, 1), None], ["a", 7]],
)
def test_lists_of_pairs_may_have_ids_of_any_hashable_type(ids):
    pairs = [[ids[0], "x"], [ids[1], "x"], (ids[0], "y")]
    if None in ids:
        with pytest.raises(ValueError, match="X has no id of rows at 1: it is missing"):
            make(rank=None).fit(pairs, [1.0, 2.0, 3.0])
        return
    model = make(rank=None).fit(pairs, [1.0, 2.0, 3.0])
    assert set(model.row_ids_.tolist()) == set(ids)
    assert model.recommend(ids[1], 1)[0].tolist() == ["y"]
    np.testing.assert_array_equal(
        model.predict(pairs[:2]), model.predict([tuple(pair) for pair in pairs[:2]])
    )


def test_missing_ids_in_lists_are_named(named):
    with pytest.raises(ValueError, match="X has no id of columns at 0: it is missing"):
        named.predict([["user 000", None]])
    with pytest.raises(ValueError, match=r"^row has no id"):
        named.recommend(None)


def test_errors_of_recommendations_name_their_argument(model, named):
    with pytest.raises(TypeError, match=r"^row has integers; wanted ids, such as 'user 000', as `fit` had"):
        named.recommend(3)
    with pytest.raises(TypeError, match=r"^column has ids, such as 'a'; wanted integers, as `fit` had"):
        model.similar_items("a")


def test_lists_of_three_columns_are_long_if_stated(named):
    rows = [[*name, rating] for name, rating in zip(NAMES.tolist(), RATINGS, strict=True)]
    found = make(entries__form="long").fit(rows)
    np.testing.assert_allclose(found.predict(NAMES), named.predict(NAMES), rtol=CLOSE)
    with pytest.raises(dln.ShapeError, match="X has rows of 2 and of 3 items; wanted 3 in each"):
        make(entries__form="long").fit([*rows, rows[0][:2]])


def test_integers_that_are_probably_ids_are_reported(pandas):
    pairs = 5000 + PAIRS * 1000
    positions = "have no entries: the integers in X are positions from 0"
    with (
        pytest.warns(UserWarning, match=f"rows {positions}"),
        pytest.warns(UserWarning, match=f"columns {positions}"),
    ):
        make().fit(pairs, RATINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(entries__shape=(100000, 70000)).fit(pairs, RATINGS)
        model = make().fit(pandas.DataFrame(pairs).astype("category"), RATINGS)
    assert model.shape_ == (90, 60)
    before = copy.deepcopy(vars(make().fit(PAIRS, RATINGS)))
    known = make().fit(PAIRS, RATINGS)
    for add in (
        lambda: known.partial_fit([[10**8, 0]], [1.0]),
        lambda: known.fold_in(rows=([[10**8, 0]], [1.0])),
    ):
        with pytest.raises(ValueError, match="reaches position 100000000 of the rows"):
            add()
    np.testing.assert_array_equal(known.row_factors_, before["row_factors_"])


def test_settings_change_together_or_not_at_all():
    model = make(rank=2)
    for wrong, message in (
        ({"rank": 3, "foo": 1}, "'foo' is no setting"),
        (
            {"rank": 3, "layers__foo": 1},
            "'layers__foo' is no setting of MatrixCompletion: layers__compress, layers",
        ),
        ({"rank": 3, "budget": 1}, "; write stopping__budget"),
        ({"rank": 3, "clip": 1}, "since version 0.2.0 write .*, or here entries__clip"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_params(**wrong)
        assert model.rank == 2
    with pytest.raises(TypeError, match=r"no keyword 'budget': write stopping=StoppingOptions\(budget=...\)"):
        dln.MatrixCompletion(budget=1)


def test_folds_of_wide_tables_are_reported(pandas):
    wide = pandas.DataFrame(PAIRS, columns=["user", "item"]).assign(stars=RATINGS)
    wide = wide.pivot(index="user", columns="item", values="stars").rename(index="user {}".format)
    model = make().fit(wide.iloc[:60])
    with pytest.warns(UserWarning, match="In a cross-validation pass pairs and ratings"):
        model.score(wide.iloc[60:])
