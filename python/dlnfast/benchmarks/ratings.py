# SPDX-License-Identifier: MIT
"""The case `ratings`: held-out errors of `MatrixCompletion` and of tuned peers, with their times.

Peers have up to twelve candidate settings each. They are compared on an inner validation part of one
training part, that of the split with seed 100; the best ones are fitted on the training parts of three
other splits. `MatrixCompletion` has none: `fit` itself chooses, on entries of each training part that it
holds out. Peers that are packages (cmfrec, scikit-surprise, fancyimpute, scikit-learn) take part where they
are installed; the library implicit is not among them, because its models are for data without ratings.

As all splits are of one set of entries, most of the test entries of the three splits are among those that
chose the settings of the peers.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._completion.entries import Entries, fit_biases
from .._completion.estimator import MatrixCompletion
from .._completion.options import EntryOptions
from . import record
from .options import Options
from .rating_data import KINDS, SEEN, large_ratings, load_ratings, small_ratings

__all__ = ["large", "ratings"]

_Array = npt.NDArray[np.float64]
_Settings = Mapping[str, Any]
#: Predictions for (rows, columns).
_Predict = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], _Array]

_SPLITS: Final = (0, 1, 2)
_TUNING_SPLIT: Final = 100
_TEST: Final = 0.2
_VALIDATION: Final = 0.125
#: Ridge of the biases of peers that have biases below.
_PENALTY: Final = (3.0, 3.0)
#: Sweeps of ALS and SoftImpute among which validation chooses.
_SWEEPS: Final = 15
#: Largest number of columns for which columns are imputed one by one.
_FEW_COLUMNS: Final = 60


def ratings(options: Options) -> dict[str, Any]:
    """Compare held-out errors: `MatrixCompletion`, biases, ALS, SVD, SoftImpute and packages, tuned alike."""
    sets: dict[str, Entries] = {}
    if options.quick:
        sets["small"] = small_ratings()
    else:
        movielens = load_ratings()
        if movielens is None:
            print("  no MovieLens ratings: DLNFAST_DATA names no folder that has them")
        else:
            sets["MovieLens small"] = movielens
        for number, (name, draw) in enumerate(KINDS.items()):
            label = f"{name} (seen)" if name == SEEN else name
            sets[label] = draw(np.random.default_rng(1000 + number))
    rows = [row for name, whole in sets.items() for row in _compare(name, whole, options.quick)]
    _summarise(rows)
    return {"case": "ratings", "rows": rows}


def large(options: Options) -> dict[str, Any]:
    """Time fits of a million ratings beside a compiled ALS of the same rank; memory of ten million."""
    shape, n = ((2000, 500), 50_000) if options.quick else ((20_000, 5000), 1_000_000)
    known, held_out = _split(large_ratings(np.random.default_rng(0), shape, n), _TEST, 0)
    rows = []

    def run(name: str, fit: Callable[[], _Predict]) -> None:
        seconds, processor = time.perf_counter(), time.process_time()
        predict = fit()
        seconds, processor = time.perf_counter() - seconds, time.process_time() - processor
        row = {"name": name, "rmse": _rmse(predict, known, held_out)}
        rows.append(row | {"seconds": seconds, "processor_seconds": processor})
        print(
            f"{name:<34} RMSE {row['rmse']:.4f}  {seconds:6.1f} s, {processor:6.1f} s of processors",
            flush=True,
        )

    print(f"{shape[0]} x {shape[1]}, {known.values.size} ratings")
    model = _make_estimator(known, {})
    run("dlnfast", lambda: _fit_pairs(model, known))
    rank = max(trial.settings["rank"] for trial in model.validation_ if trial.rmse < np.inf)
    run(f"dlnfast, rank {rank} alone", lambda: _fit_pairs(_make_estimator(known, {"rank": rank}), known))
    if importlib.util.find_spec("cmfrec") is None:
        print("cmfrec is not installed")
    else:
        for penalty in (2.0, 6.0, 14.0, 30.0):
            settings = {"k": rank, "lambda_": penalty}
            run(f"cmfrec, rank {rank}, penalty {penalty:g}", partial(_fit_alone, known, settings))
    done = record.run_program(
        _LARGE, *((2000, 500, 50_000) if options.quick else (70_000, 10_000, 10_000_000))
    )
    done.check_returncode()
    memory: dict[str, Any] = json.loads(done.stdout)
    print(
        f"{memory['n']} ratings: {memory['seconds']:.0f} s, peak memory {memory['peak_bytes'] / 1e9:.2f} GB, "
        f"of which Python and the ratings in NumPy arrays {memory['data_bytes'] / 1e9:.2f} GB"
    )
    return {"case": "ratings-large", "shape": list(shape), "rows": rows, "memory": memory}


def _fit_alone(entries: Entries, settings: _Settings) -> _Predict:
    return _fit_cmfrec(entries, settings, None)[0]


#: A fit in a process of its own, for its peak memory.
_LARGE: Final = """
import json, sys, time
import numpy as np
import dlnfast as dln
from dlnfast.benchmarks import record
from dlnfast.benchmarks.rating_data import large_ratings
rows, columns, n = (int(word) for word in sys.argv[1:])
entries = large_ratings(np.random.default_rng(0), (rows, columns), n)
pairs, values = np.column_stack([entries.rows, entries.columns]), entries.values
del entries
record.forget_peak()
data = record.peak_bytes()
start = time.perf_counter()
model = dln.MatrixCompletion().fit(pairs, values)
print(json.dumps({"n": len(values), "seconds": time.perf_counter() - start, "data_bytes": data,
    "peak_bytes": record.peak_bytes(), "rank": len(model.singular_values_)}))
"""


def _compare(name: str, whole: Entries, quick: bool) -> list[dict[str, Any]]:
    """Tune and fit every method on one set of entries."""
    splits = _SPLITS[:2] if quick else _SPLITS
    train, _ = _split(whole, _TEST, _TUNING_SPLIT)
    inner, validation = _split(train, _VALIDATION, 7)
    rows, columns = whole.shape
    print(
        f"\n{name}: {rows} x {columns}, {whole.values.size} entries; {len(splits)} splits, a fifth held out"
    )
    print(f"{'':<24} {'RMSE':>8} {'std':>7} {'tuning':>8} {'fit':>8}  chosen")
    found = []
    for method in _METHODS:
        if not method.suits(whole):
            continue
        candidates = method.candidates[:2] if quick else method.candidates
        start = time.perf_counter()
        tried = [_try_settings(method, settings, inner, validation) for settings in candidates]
        # Without a choice there is nothing to tune.
        tuning = time.perf_counter() - start if len(candidates) > 1 else 0.0
        _, chosen = min(tried, key=lambda pair: pair[0])
        errors, seconds = [], []
        for seed in splits:
            known, held_out = _split(whole, _TEST, seed)
            start = time.perf_counter()
            predict = method.fit(known, chosen, None)[0]
            seconds.append(time.perf_counter() - start)
            errors.append(_rmse(predict, known, held_out))
        row = {
            "data": name,
            "shape": list(whole.shape),
            "n_entries": whole.values.size,
            "name": method.name,
            "rmse": float(np.mean(errors)),
            "std": float(np.std(errors)),
            "errors": errors,
            "chosen": dict(chosen),
            "validation": [{"settings": dict(settings), "rmse": error} for error, settings in tried],
            "tuning_seconds": tuning,
            "fit_seconds": float(np.median(seconds)),
        }
        found.append(row)
        text = ", ".join(f"{key}={value}" for key, value in chosen.items()) or "-"
        print(
            f"{method.name:<24} {row['rmse']:8.4f} {row['std']:7.4f} {tuning:6.1f} s "
            f"{row['fit_seconds']:6.2f} s  {text}",
            flush=True,
        )
    return found


def _summarise(rows: list[dict[str, Any]]) -> None:
    """Print the error of `MatrixCompletion` relative to the best peer of each set."""
    ratios = []
    for name in dict.fromkeys(row["data"] for row in rows):
        errors = {row["name"]: row["rmse"] for row in rows if row["data"] == name}
        own = errors.pop(_OWN)
        peers = {key: error for key, error in errors.items() if not key.startswith("dlnfast")}
        best = min(peers, key=lambda key: peers[key])
        ratios.append(own / peers[best])
        print(f"{name}: {_OWN} {own:.4f}, best peer {best} {peers[best]:.4f}, ratio {ratios[-1]:.4f}")
    print(f"geometric mean of the ratios {float(np.exp(np.mean(np.log(ratios)))):.4f}")


def _split(entries: Entries, share: float, seed: int) -> tuple[Entries, Entries]:
    order = np.random.default_rng(seed).permutation(entries.values.size)
    count = round(share * order.size)
    training, held_out = (
        Entries(entries.rows[part], entries.columns[part], entries.values[part], entries.shape)
        for part in (order[count:], order[:count])
    )
    return training, held_out


def _rmse(predict: _Predict, known: Entries, held_out: Entries) -> float:
    """Return the held-out error of predictions within the range of the known entries."""
    predicted = np.clip(predict(held_out.rows, held_out.columns), known.values.min(), known.values.max())
    error = predicted - held_out.values
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
    #: Package that the method needs.
    needs: str | None = None
    #: Largest number of columns.
    most_columns: float = float("inf")

    def suits(self, entries: Entries) -> bool:
        """Return whether the method can be used here."""
        is_there = self.needs is None or importlib.util.find_spec(self.needs) is not None
        return is_there and entries.shape[1] <= self.most_columns


def _try_settings(
    method: _Method, settings: _Settings, inner: Entries, validation: Entries
) -> tuple[float, _Settings]:
    predict, completed = method.fit(inner, settings, validation)
    return _rmse(predict, inner, validation), completed


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
            error = _rmse(predict, entries, validation)
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


def _fit_soft_impute(
    entries: Entries, settings: _Settings, validation: Entries | None
) -> tuple[_Predict, _Settings]:
    """Soft-thresholded singular values of the filled matrix below biases (Mazumder et al. 2010).

    The threshold is relative to the largest singular value of the entries. Up to 60 singular vectors are
    kept, from products with those of the sweep before.
    """
    biases = fit_biases(entries, "both", _PENALTY)
    positions = entries.rows, entries.columns
    residual = entries.values - biases.at(*positions)
    filled = np.zeros(entries.shape)
    filled[positions] = residual
    k = min(60, *entries.shape)
    basis = np.linalg.qr(
        filled.T @ (filled @ np.random.default_rng(0).standard_normal((entries.shape[1], k)))
    )[0]
    threshold = settings["threshold"] * float(np.linalg.svd(filled @ basis, compute_uv=False)[0])
    best: tuple[float, int, _Predict] | None = None
    left = right = np.zeros((0, 0))
    for sweep in range(1, settings.get("sweeps", 4 * _SWEEPS) + 1):
        frame = np.linalg.qr(filled @ basis)[0]
        u, s, vt = np.linalg.svd(frame.T @ filled, full_matrices=False)
        s = np.maximum(s - threshold, 0.0)
        left, right, basis = (frame @ u) * s, vt.T, vt.T
        filled = left @ right.T
        filled[positions] = residual
        if validation is not None and sweep % 4 == 0:
            predict = _add_factors(biases.at, left, right)
            error = _rmse(predict, entries, validation)
            if best is None or error < best[0]:
                best = error, sweep, predict
    if best is None:
        return _add_factors(biases.at, left, right), settings
    return best[2], {**settings, "sweeps": best[1]}


def _fit_cmfrec(entries: Entries, settings: _Settings, _: Entries | None) -> tuple[_Predict, _Settings]:
    from cmfrec import CMF
    from scipy.sparse import coo_matrix

    model = CMF(method="als", niter=15, verbose=False, nthreads=2, **settings)
    model.fit(coo_matrix((entries.values, (entries.rows, entries.columns)), shape=entries.shape))
    return (lambda i, j: np.asarray(model.predict(user=i, item=j), np.float64)), settings


def _fit_surprise(entries: Entries, settings: _Settings, _: Entries | None) -> tuple[_Predict, _Settings]:
    import pandas as pd
    from surprise import SVD, Dataset, Reader

    frame = pd.DataFrame({"i": entries.rows, "j": entries.columns, "r": entries.values})
    reader = Reader(rating_scale=(float(entries.values.min()), float(entries.values.max())))
    model = SVD(random_state=0, **settings)
    data = Dataset.load_from_df(frame, reader).build_full_trainset()
    model.fit(data)

    def predict(i: npt.NDArray[np.int64], j: npt.NDArray[np.int64]) -> _Array:
        pairs = zip(i.tolist(), j.tolist(), strict=True)
        return np.array([model.predict(row, column).est for row, column in pairs])

    return predict, settings


def _fit_imputer(entries: Entries, settings: _Settings, _: Entries | None) -> tuple[_Predict, _Settings]:
    """Predict every column from all others by Bayesian ridge regression, in turns."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    matrix = np.full(entries.shape, np.nan)
    matrix[entries.rows, entries.columns] = entries.values
    filled = IterativeImputer(random_state=0, keep_empty_features=True, **settings).fit_transform(matrix)
    return (lambda i, j: filled[i, j]), settings


def _make_estimator(entries: Entries, settings: _Settings) -> MatrixCompletion:
    options = EntryOptions(clip="range", shape=entries.shape)
    return MatrixCompletion(entries=options).set_params(**settings)


def _fit_pairs(model: MatrixCompletion, entries: Entries) -> _Predict:
    model.fit(np.column_stack([entries.rows, entries.columns]), entries.values)
    return lambda i, j: np.asarray(model.predict(np.column_stack([i, j])), np.float64)


def _fit_estimator(entries: Entries, settings: _Settings, _: Entries | None) -> tuple[_Predict, _Settings]:
    return _fit_pairs(_make_estimator(entries, settings), entries), settings


def _grid(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


_OWN: Final = "dlnfast"

_METHODS: Final[tuple[_Method, ...]] = (
    _Method("biases alone", _fit_biases, _grid(users=(2, 4, 8, 16), items=(2, 3, 5))),
    _Method(
        "SVD, imputed", _fit_svd, _grid(filled_with=("item means", "biases"), rank=(2, 5, 10, 20, 40, 80))
    ),
    _Method(
        "ALS with biases",
        _fit_als,
        [
            *_grid(weighted=(False,), rank=(15, 60), penalty=(0.5, 2.0, 6.0, 14.0)),
            *_grid(weighted=(True,), rank=(15, 60), penalty=(0.03, 0.1)),
        ],
    ),
    _Method(
        "SoftImpute with biases", _fit_soft_impute, _grid(threshold=(0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01))
    ),
    _Method(
        "cmfrec",
        _fit_cmfrec,
        [
            *_grid(k=(15, 60), lambda_=(0.5, 2.0, 6.0, 14.0)),
            *_grid(k=(15, 60), lambda_=(0.03, 0.1), scale_lam=(True,)),
        ],
        needs="cmfrec",
    ),
    _Method(
        "surprise",
        _fit_surprise,
        _grid(n_factors=(50,), reg_all=(0.02, 0.05, 0.1, 0.2, 0.3, 0.5), n_epochs=(30, 80)),
        needs="surprise",
    ),
    _Method(
        "iterative imputer",
        _fit_imputer,
        _grid(max_iter=(10,)),
        needs="sklearn",
        most_columns=_FEW_COLUMNS,
    ),
    _Method("dlnfast, gradient", _fit_estimator, [{"method": "gradient"}]),
    _Method(_OWN, _fit_estimator, [{}]),
)
