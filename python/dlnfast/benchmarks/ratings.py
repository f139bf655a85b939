# SPDX-License-Identifier: MIT
"""The case `ratings`: held-out error on MovieLens of `MatrixCompletion`, biases, ALS and the SVD.

Every method has the same number of candidate settings. They are compared on an inner validation part of one
training part, that of the split with seed 100; the best ones are fitted on the training parts of five
other splits. ALS finds its number of sweeps on the same validation part; `MatrixCompletion` finds its number
of steps on entries of each training part that it holds out itself.

As all splits are of one set of ratings, most of their test entries are among those that chose the settings:
alike for all methods. The row "default" chooses nothing there, but its defaults were found there too.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._completion.entries import Entries, fit_biases
from .._completion.estimator import MatrixCompletion
from .._completion.options import EntryOptions
from .._datasets.ratings import load_movielens
from .options import Options

__all__ = ["ratings"]

_Array = npt.NDArray[np.float64]
_Settings = Mapping[str, Any]
#: Predictions for (rows, columns); after how many steps or sweeps.
_Predict = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], _Array]

_SPLITS: Final = (0, 1, 2, 3, 4)
_TUNING_SPLIT: Final = 100
_TEST: Final = 0.2
_VALIDATION: Final = 0.125
_STARS: Final = (0.5, 5.0)
#: Ridge of the biases below the factors, as `MatrixCompletion` has it.
_PENALTY: Final = (3.0, 3.0)
#: Sweeps of ALS among which validation chooses.
_SWEEPS: Final = 15


def ratings(options: Options) -> dict[str, Any]:
    """Compare held-out errors on MovieLens ratings: `MatrixCompletion`, biases, ALS, SVD; tuned alike."""
    whole = _small_ratings() if options.quick else _movielens()
    if whole is None:
        reason = "no MovieLens ratings: DLNFAST_DATA names no folder that has them"
        print(f"  skipped: {reason}")
        return {"case": "ratings", "rows": [], "skipped": reason}
    splits = _SPLITS[:2] if options.quick else _SPLITS
    train, _ = _split(whole, _TEST, _TUNING_SPLIT)
    inner, validation = _split(train, _VALIDATION, 7)
    rows, columns = whole.shape
    print(f"{rows} x {columns}, {whole.values.size} ratings; {len(splits)} splits, 1/5 of each held out")
    print(f"{'':<24} {'RMSE':>7} {'std':>7} {'tuning':>8} {'fit':>7}  chosen")
    found = []
    for method in _METHODS:
        candidates = method.candidates[:2] if options.quick else method.candidates
        start = time.perf_counter()
        tried = [_try_settings(method, settings, inner, validation) for settings in candidates]
        tuning = time.perf_counter() - start
        _, chosen = min(tried, key=lambda pair: pair[0])
        errors, seconds = [], []
        for seed in splits:
            known, held_out = _split(whole, _TEST, seed)
            start = time.perf_counter()
            predict = method.fit(known, chosen, None)[0]
            seconds.append(time.perf_counter() - start)
            errors.append(_rmse(predict, held_out))
        row = {
            "name": method.name,
            "rmse": float(np.mean(errors)),
            "std": float(np.std(errors)),
            "errors": errors,
            "chosen": dict(chosen),
            "n_candidates": len(candidates),
            "validation": [{"settings": dict(settings), "rmse": error} for error, settings in tried],
            "tuning_seconds": tuning,
            "fit_seconds": float(np.median(seconds)),
        }
        found.append(row)
        text = ", ".join(f"{name}={value}" for name, value in chosen.items()) or "-"
        print(
            f"{method.name:<24} {row['rmse']:7.4f} {row['std']:7.4f} {tuning:6.1f} s "
            f"{row['fit_seconds']:5.2f} s  {text}",
            flush=True,
        )
    print("The same settings for all splits, chosen on an inner part of a sixth. Full-width layers of this")
    print("matrix would be 610 wide: the random ones here are narrower, to fit the time.")
    return {"case": "ratings", "shape": list(whole.shape), "n_ratings": whole.values.size, "rows": found}


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def _movielens() -> Entries | None:
    if not os.environ.get("DLNFAST_DATA") or not Path(os.environ["DLNFAST_DATA"]).exists():
        return None
    try:
        users, items, stars, user_ids, item_ids = load_movielens()
    except FileNotFoundError:
        return None
    return Entries(users, items, stars, (user_ids.size, item_ids.size))


def _small_ratings() -> Entries:
    """Return ratings of low rank with noise, for a quick test of the case."""
    rng = np.random.default_rng(0)
    shape, n = (70, 90), 1500
    index = rng.choice(shape[0] * shape[1], n, replace=False)
    i, j = index // shape[1], index % shape[1]
    left, right = rng.standard_normal((shape[0], 2)), rng.standard_normal((shape[1], 2))
    stars = 3 + np.sum(left[i] * right[j], axis=1) / 2 + 0.3 * rng.standard_normal(n)
    return Entries(i, j, np.clip(np.round(2 * stars) / 2, *_STARS), shape)


def _split(entries: Entries, share: float, seed: int) -> tuple[Entries, Entries]:
    order = np.random.default_rng(seed).permutation(entries.values.size)
    count = round(share * order.size)
    training, held_out = (
        Entries(entries.rows[part], entries.columns[part], entries.values[part], entries.shape)
        for part in (order[count:], order[:count])
    )
    return training, held_out


def _rmse(predict: _Predict, held_out: Entries) -> float:
    error = np.clip(predict(held_out.rows, held_out.columns), *_STARS) - held_out.values
    return float(np.sqrt(np.mean(error**2)))


# --------------------------------------------------------------------------------------------------
# Methods
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Method:
    """A method: its name, its fit, and candidate settings; `fit` may add the number of its steps to them."""

    name: str
    fit: Callable[[Entries, _Settings, Entries | None], tuple[_Predict, _Settings]]
    candidates: Sequence[_Settings]


def _try_settings(
    method: _Method, settings: _Settings, inner: Entries, validation: Entries
) -> tuple[float, _Settings]:
    predict, completed = method.fit(inner, settings, validation)
    return _rmse(predict, validation), completed


def _fit_biases(entries: Entries, settings: _Settings, _: Entries | None) -> tuple[_Predict, _Settings]:
    return fit_biases(entries, "both", (settings["users"], settings["items"])).at, settings


def _fit_svd(entries: Entries, settings: _Settings, _: Entries | None) -> tuple[_Predict, _Settings]:
    """Fill unknown entries with the means of the items, or with biases, and truncate the SVD."""
    which = "columns" if settings["filled_with"] == "item means" else "both"
    biases = fit_biases(entries, which, _PENALTY)
    residual = np.zeros(entries.shape)
    residual[entries.rows, entries.columns] = entries.values - biases.at(entries.rows, entries.columns)
    if which == "columns":  # centred by users too, so that the first singular vector is not spent on them
        count = np.bincount(entries.rows, minlength=entries.shape[0])
        mean = residual.sum(axis=1) / np.maximum(count, 1)
        residual -= mean[:, np.newaxis]
        biases = biases._replace(rows=mean)
        # Where nothing is known the filling is the item's mean: a residual of minus the user's.
    values, vectors = np.linalg.eigh(residual @ residual.T)
    left = vectors[:, np.argsort(values)[::-1][: settings["rank"]]]
    right = residual.T @ left
    return _add_factors(biases.at, left, right), settings


def _add_factors(base: _Predict, left: _Array, right: _Array) -> _Predict:
    return lambda i, j: base(i, j) + np.einsum("nk,nk->n", left[i], right[j])


def _fit_als(entries: Entries, settings: _Settings, validation: Entries | None) -> tuple[_Predict, _Settings]:
    """Alternating least squares below biases that are fitted again after every sweep.

    Zhou et al. 2008 (ALS-WR, with the penalty times the number of ratings) and without that weight. With
    `validation` the best number of sweeps is added to the settings.
    """
    k, penalty, weighted = settings["rank"], settings["penalty"], settings["weighted"]
    rng = np.random.default_rng(0)
    factors = [0.1 * rng.standard_normal((n, k)) for n in entries.shape]
    positions = entries.rows, entries.columns
    orders = [np.argsort(index, kind="stable") for index in positions]
    starts = [
        np.searchsorted(index[order], np.arange(n + 1))
        for index, order, n in zip(positions, orders, entries.shape, strict=True)
    ]
    biases = fit_biases(entries, "both", _PENALTY)
    best: tuple[float, int, _Predict] | None = None
    for sweep in range(1, settings.get("sweeps", _SWEEPS) + 1):
        residual = entries.values - biases.at(*positions)
        for side in (0, 1):
            _least_squares(
                factors[side],
                factors[1 - side][positions[1 - side][orders[side]]],
                residual[orders[side]],
                starts[side],
                penalty,
                weighted,
            )
        low = np.einsum("nk,nk->n", factors[0][positions[0]], factors[1][positions[1]])
        again = fit_biases(entries._replace(values=entries.values - low), "both", _PENALTY)
        biases = again
        if validation is not None:
            predict = _add_factors(biases.at, factors[0].copy(), factors[1].copy())
            error = _rmse(predict, validation)
            if best is None or error < best[0]:
                best = error, sweep, predict
    if best is None:
        return _add_factors(biases.at, *factors), settings
    return best[2], {**settings, "sweeps": best[1]}


def _least_squares(
    factors: _Array,
    others: _Array,
    residual: _Array,
    start: npt.NDArray[np.int64],
    penalty: float,
    weighted: bool,
) -> None:
    """Replace each row by the ridge regression of its residuals on the factors of the other side."""
    n, k = factors.shape
    gram, right = np.empty((n, k, k)), np.empty((n, k))
    for i in range(n):
        part = slice(start[i], start[i + 1])
        block = others[part]
        gram[i] = block.T @ block
        right[i] = residual[part] @ block
    count = np.diff(start)
    strength = penalty * np.maximum(count, 1) if weighted else np.full(n, penalty)
    gram[:, np.arange(k), np.arange(k)] += strength[:, np.newaxis]
    factors[:] = np.linalg.solve(gram, right[:, :, np.newaxis])[:, :, 0]


def _fit_estimator(entries: Entries, settings: _Settings, _: Entries | None) -> tuple[_Predict, _Settings]:
    # One thread: a step is short, and waits for whatever else holds the other cores.
    model = MatrixCompletion(entries=EntryOptions(clip=_STARS, shape=entries.shape), n_threads=1)
    model.set_params(**settings)
    model.fit(np.column_stack([entries.rows, entries.columns]), entries.values)

    def predict(i: npt.NDArray[np.int64], j: npt.NDArray[np.int64]) -> _Array:
        return np.asarray(model.predict(np.column_stack([i, j])), np.float64)

    return predict, settings


def _grid(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


#: Twelve candidates each.
_METHODS: Final = (
    _Method("biases alone", _fit_biases, _grid(users=(2, 4, 8, 16), items=(2, 3, 5))),
    _Method(
        "SVD, imputed", _fit_svd, _grid(filled_with=("item means", "biases"), rank=(2, 5, 10, 20, 40, 80))
    ),
    _Method(
        "ALS with biases",
        _fit_als,
        [
            *_grid(weighted=(False,), rank=(20, 40), penalty=(12.0, 14.0, 16.0)),
            *_grid(weighted=(True,), rank=(20, 40), penalty=(0.1, 0.15, 0.2)),
        ],
    ),
    _Method(
        "dlnfast, compressed",
        _fit_estimator,
        _grid(depth=(2, 3), rank=(16, 40), weight_decay=(0.7, 0.5, 0.35)),
    ),
    _Method(
        "dlnfast, random layers",
        _fit_estimator,
        _grid(
            layers__compress=(False,),
            rank=(64, 128),
            layers__scale=(3e-3, 1e-2),
            weight_decay=(0.5, 0.35, 0.2),
            steps=(300,),
        ),
    ),
    _Method("dlnfast, default", _fit_estimator, [{}]),
)
