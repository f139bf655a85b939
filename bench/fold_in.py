# SPDX-License-Identifier: MIT
"""New users with a few ratings: `MatrixCompletion.fold_in` and `partial_fit`, beside a refit and biases.

    python bench/fold_in.py [--users 200] [--given 5] [--splits 5]

The ratings of some users are left out of a fit; a few of each are then added, and the others predicted. Uses
MovieLens in ``DLNFAST_DATA``, and a generated matrix of rank 5 with biases and noise.
"""

from __future__ import annotations

import argparse
import copy
import pickle
import time
from collections.abc import Callable

import numpy as np

import dlnfast as dln
from dlnfast._completion.entries import Entries, fit_biases
from dlnfast._datasets.ratings import load_movielens

NAMES = ("fold_in", "partial_fit", "refit", "biases")


def split(pairs: np.ndarray, n_users: int, given: int, seed: int) -> tuple[np.ndarray, ...]:
    """Return the entries of the other users, the given ones of the new users, and the held-out ones."""
    rng = np.random.default_rng(seed)
    is_new = np.isin(pairs[:, 0], rng.choice(pairs[:, 0].max() + 1, n_users, replace=False))
    order = rng.permutation(np.flatnonzero(is_new))
    order = order[np.argsort(pairs[order, 0], kind="stable")]
    users = pairs[order, 0]
    number = np.arange(len(order)) - np.searchsorted(users, users)
    return np.flatnonzero(~is_new), order[number < given], order[number >= given]


def timed(call: Callable[[], dln.MatrixCompletion]) -> tuple[dln.MatrixCompletion, float]:
    """Return a result, and the shortest of three times in milliseconds."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = call()
        times.append(1e3 * (time.perf_counter() - start))
    return result, min(times)


def measure(pairs: np.ndarray, ratings: np.ndarray, options: argparse.Namespace) -> None:
    """Print errors and times for every split, and their means."""
    shape = int(pairs[:, 0].max()) + 1, int(pairs[:, 1].max()) + 1
    settings = dln.EntryOptions(shape=shape)
    rows = []
    for seed in range(options.splits):
        old, given, held = split(pairs, options.users, options.given, seed)
        both = np.concatenate([old, given])
        base = dln.MatrixCompletion(entries=settings).fit(pairs[old], ratings[old])
        shift = np.array([shape[0], 0])
        new = pairs[given] + shift, ratings[given]
        folded, fold_time = timed(lambda base=base, new=new: base.fold_in(rows=new))
        added, add_time = timed(lambda base=base, new=new: copy.copy(base).partial_fit(*new))
        refit = dln.MatrixCompletion(entries=settings).fit(pairs[both], ratings[both])
        biases = fit_biases(Entries(*pairs[both].T, ratings[both], shape), "both", (3.0, 3.0))
        alone = biases.at(*pairs[held].T) - ratings[held]
        asked = pairs[held] + shift
        errors = [each.rmse(asked, ratings[held]) for each in (folded, added)]
        errors += [refit.rmse(pairs[held], ratings[held]), float(np.sqrt(np.mean(alone**2)))]
        rows.append([*errors, fold_time, add_time, 1e3 * refit.fit_seconds_])
        size = len(pickle.dumps(base)) / (base.row_factors_.nbytes + base.column_factors_.nbytes)
        text = "  ".join(f"{name} {error:.4f}" for name, error in zip(NAMES, errors, strict=True))
        print(f"split {seed}: {text}; pickle {size:.2f} times the factors", flush=True)
    mean = np.mean(rows, axis=0)
    text = "  ".join(f"{name} {error:.4f}" for name, error in zip(NAMES, mean[:4], strict=True))
    print(f"mean:    {text}; {mean[4]:.1f} ms, {mean[5]:.1f} ms, refit {mean[6]:.0f} ms")


def main() -> None:
    """Measure both data sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--given", type=int, default=5)
    parser.add_argument("--splits", type=int, default=5)
    options = parser.parse_args()
    users, items, stars, _, _ = load_movielens()
    print(f"MovieLens, {len(stars)} ratings")
    measure(np.column_stack([users, items]), stars, options)
    rng = np.random.default_rng(1)
    whole = rng.normal(size=(1000, 5)) @ rng.normal(size=(5, 400)) / np.sqrt(5)
    whole += 3 + 0.5 * rng.normal(size=(1000, 1)) + 0.5 * rng.normal(size=400)
    pairs = np.argwhere(rng.random(whole.shape) < 0.08)
    print(f"rank 5 with biases and noise 0.5, 1000 x 400, {len(pairs)} entries")
    measure(pairs, whole[tuple(pairs.T)] + 0.5 * rng.normal(size=len(pairs)), options)


if __name__ == "__main__":
    main()
