# SPDX-License-Identifier: MIT
"""Small runs of every kind of file: the content of `tests/data/format-<n>`, and the code that wrote it.

    python tests/released_formats.py FOLDER

writes them with the imported version. The files of a released format are never replaced.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from helpers.interruption import StopTraining, stop_at
from helpers.records import merge_options, with_record

import dlnfast as dln

DATA = Path(__file__).parent / "data"
STOPPED_AT = 25


def reduced(**options):
    problem = dln.low_rank_recovery(6, 1, seed=1)
    weights = dln.orthogonal([6] * 3, seed=2)
    return dln.train(
        problem, weights, learning_rate=0.5, steps=40, n_threads=1, **with_record(options, every=8)
    )


def dense(**options):
    problem = dln.low_rank_recovery(5, 1, seed=3)
    weights = dln.gaussian([5, 4, 5], 0.3, seed=4)
    options = merge_options(
        {
            "engine": "dense",
            "record": dln.Record(singular_values=2, vectors=True, weights_every=20),
        },
        options,
    )
    return dln.train(
        problem, weights, learning_rate=0.2, steps=40, n_threads=1, **with_record(options, every=10)
    )


def lazily_sampled(**options):
    problem = dln.low_rank_recovery(30, 1, seed=5)
    weights = dln.orthogonal([30] * 3, seed=6, implicit=True)
    options = merge_options(
        {"record": dln.Record(singular_values=3, every=10), "learning_rate": 0.5, "steps": 20}, options
    )
    return dln.train(problem, weights, n_threads=1, **options)


def completion(**options):
    problem = dln.low_rank_completion(8, 1, observed=0.6, seed=7)
    weights = dln.gaussian([8, 3, 8], 0.3, seed=8)
    options = merge_options(
        {
            "record": dln.Record(singular_values=2, every=10),
            "learning_rate": "adaptive",
            "steps": 20,
        },
        options,
    )
    return dln.train(problem, weights, n_threads=1, **options)


def draw_samples():
    generator = np.random.default_rng(9)
    inputs = generator.standard_normal((5, 30))
    labels = np.arange(30) % 3
    return inputs, labels


def whitened(**options):
    inputs, labels = draw_samples()
    problem = dln.Problem.from_data(inputs, dln.one_hot(labels), whiten="zca", center=True)
    weights = dln.orthogonal([5, 5, 3], seed=10)
    return dln.train(
        problem, weights, learning_rate=0.1, steps=20, n_threads=1, **with_record(options, every=10)
    )


def statistics():
    return dln.SufficientStatistics().add(*draw_samples())


RUNS = {
    "reduced": reduced,
    "dense": dense,
    "law": lazily_sampled,  # the name of the released files
    "completion": completion,
    "whitened": whitened,
}
FOLDERS = {"reduced": reduced, "dense": dense, "completion": completion}


def write(folder: Path) -> None:
    """Write a file of every kind, and folders of finished and of stopped runs."""
    for name, make in RUNS.items():
        make().save(folder / f"{name}.npz")
    statistics().save(folder / "statistics.npz")
    for name, make in FOLDERS.items():
        make(checkpoint=dln.Checkpoint(folder / f"{name}-ended", every=15, seconds=60))
        try:
            make(
                checkpoint=dln.Checkpoint(folder / f"{name}-stopped", every=15, seconds=60),
                record=dln.Record(callback=stop_at(STOPPED_AT - 10)),
            )
        except StopTraining:
            continue
        raise AssertionError(f"{name} was not stopped")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    write(target)
    for path in sorted(target.rglob("*")):
        print(f"{path.stat().st_size:8} {path.relative_to(target)}")
