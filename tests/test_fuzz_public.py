# SPDX-License-Identifier: MIT
"""Every public function with arguments that are not what it wants: a typed error, or a finite result.

A call that is right is written down for each function; in every example one or two of its arguments are
replaced by something odd: of another type, shape, precision or memory layout, empty, infinite, huge.
"""

from __future__ import annotations

import dataclasses
import decimal
import fractions
import inspect
import linecache
import os
import signal
import tempfile
import threading
import types
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dlnfast as dln
from dlnfast._weights.implicit import ImplicitWeights

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")

DIM, DEPTH, N = 6, 3, 40
PACKAGE = str(Path(dln.__file__).parent)
#: What may be raised. DivergedError and FileNotFoundError say what happened, not what was wrong.
TYPED = (TypeError, ValueError, MemoryError, OverflowError, OSError, dln.DivergedError)
#: What is neither: mistakes of the package.
MISTAKES = (AttributeError, IndexError, KeyError, ZeroDivisionError, AssertionError, RecursionError)

# ------------------------------------------------------------------------------------------- right calls


def rng():
    return np.random.default_rng(0)


def problem():
    return dln.low_rank_recovery(DIM, 2)


def weights():
    return dln.orthogonal([DIM] * (DEPTH + 1), 0.7)


def completion():
    return dln.low_rank_completion(DIM, 2, 0.7)


def sensing():
    return dln.low_rank_sensing(DIM, 2, 30)


def run(engine="reduced", **options):
    return dln.train(problem(), weights(), learning_rate=0.3, steps=6, engine=engine, **options)


def followed():
    return run("dense", record=dln.Record(singular_values=2, tracking="dense"))


def tracker():
    result = dln.SVDTracker(k=2)
    result.update(matrix())
    return result


def matrix(rows=DIM, columns=DIM, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns))


def frame(columns=2, seed=0):
    return np.linalg.qr(matrix(DIM, columns, seed))[0]


def features():
    return {"features": matrix(4, 12), "labels": np.arange(12) % 3}


def samples():
    return {"X": matrix(DIM, N), "Y": np.arange(N) % 3}


def ratings():
    pairs = np.array([[i, j] for i in range(DIM) for j in range(DIM) if (i + j) % 3])
    return {"X": pairs, "y": np.sin(pairs.sum(axis=1))}


def fitted():
    return dln.MatrixCompletion(steps=5, rank=2).fit(**ratings())


def statistics():
    return dln.SufficientStatistics().add(**samples())


def descent(**more):
    return {"learning_rate": 0.1, "steps": 5, "weight_decay": 0.01, "momentum": 0.2, **more}


def base():
    return {
        "problem": {"kind": "low-rank-recovery", "dim": DIM, "rank": 2},
        "weights": {"depth": 2},
        "train": {"learning_rate": 0.1, "steps": 3},
    }


class Inline:
    """An executor that runs at once."""

    def submit(self, function, /, *arguments, **keywords):
        from concurrent.futures import Future

        future = Future()
        try:
            future.set_result(function(*arguments, **keywords))
        except Exception as error:
            future.set_exception(error)
        return future


def implicit():
    return dln.orthogonal([DIM] * (DEPTH + 1), 0.7, implicit=True)


def method(make, name, **arguments):
    """A call of a method of an object that is made anew."""
    return lambda: (getattr(make(), name), {k: v() if callable(v) else v for k, v in arguments.items()})


def function(call, **arguments):
    return lambda: (call, {k: v() if callable(v) else v for k, v in arguments.items()})


def recorded(call):
    """Return a function that takes the fields of `Record` beside the other arguments."""
    fields = [field.name for field in dataclasses.fields(dln.Record)]

    def run(**arguments):
        record = dln.Record(**{name: arguments.pop(name) for name in fields if name in arguments})
        return call(**arguments, record=record)

    return run


RATES = {"loss_scale": 1.0, "learning_rate": 0.1}
CALLS = {
    "Adaptive": lambda: (
        lambda **law: dln.train(problem(), weights(), learning_rate=dln.Adaptive(**law), steps=3),
        {"safety": 1.0, "ratios": [1.0] * DEPTH, "curvature": [1.0] * DEPTH},
    ),
    "Checkpoint": function(dln.Checkpoint, directory="nowhere", every=3, seconds=1.0),
    "Completion": function(
        dln.Completion,
        rows=[0, 1, 2],
        columns=[1, 2, 0],
        values=[0.5, 1.0, -1.0],
        shape=(3, 3),
        reduction="mean",
        loss_scale=None,
        truth=lambda: np.eye(3),
    ),
    "Completion.backprojection": method(completion, "backprojection", weights=weights),
    "Completion.from_dense": function(
        dln.Completion.from_dense, matrix=matrix, mask=lambda: matrix() > 0, reduction="mean"
    ),
    "Completion.from_sparse": function(dln.Completion.from_sparse, matrix=lambda: sparse()),
    "Completion.loss": method(completion, "loss", W=matrix),
    "Completion.predict": method(completion, "predict", W=weights, rows=[0, 1], columns=[1, 2]),
    "Completion.recovery_error": method(completion, "recovery_error", W=matrix, normalization="relative"),
    "Completion.suggested_rank": method(completion, "suggested_rank", limit=4),
    "CompressedNetwork.apply": method(lambda: dln.compress(run()), "apply", X=matrix),
    "ImplicitWeights.apply": method(implicit, "apply", layer=1, X=matrix),
    "ImplicitWeights.apply_transpose": method(implicit, "apply_transpose", layer=1, Y=matrix),
    "ImplicitWeights.column": method(implicit, "column", layer=1, j=1),
    "ImplicitWeights.dense": method(implicit, "dense", layer=1),
    "ImplicitWeights.entry": method(implicit, "entry", layer=1, i=1, j=2),
    "ImplicitWeights.row": method(implicit, "row", layer=1, i=1),
    "LowRank": function(dln.LowRank, U=frame, s=lambda: np.array([2.0, 1.0]), V=lambda: frame(seed=1)),
    "LowRank.truncated": method(lambda: problem().target, "truncated", rank=1),
    "MatrixCompletion": lambda: (
        lambda **given: dln.MatrixCompletion(**given).fit(**ratings()),
        {
            "rank": 2,
            "depth": 2,
            "compress": True,
            "outer": 1.0,
            "scale": 1e-2,
            "learning_rate": "adaptive",
            "weight_decay": 0.1,
            "steps": 5,
            "tolerance": 1e-6,
            "biases": "both",
            "bias_penalty": 1.0,
            "weighting": (0.25, -0.25),
            "validation_fraction": 0.5,
            "patience": 2,
            "record_every": 2,
            "clip": "range",
            "shape": (DIM, DIM),
            "duplicates": "error",
            "seed": 0,
            "n_threads": 1,
            "dtype": "float64",
        },
    ),
    "MatrixCompletion.fit": lambda: (dln.MatrixCompletion(steps=4, rank=2).fit, ratings()),
    "MatrixCompletion.predict": method(fitted, "predict", X=[[0, 1], [5, 5]]),
    "MatrixCompletion.rmse": lambda: (fitted().rmse, ratings()),
    "MatrixCompletion.score": lambda: (fitted().score, ratings()),
    "Problem": function(
        dln.Problem, target=matrix, input_gram=lambda: np.eye(DIM), loss_scale=1.0, output_norm_squared=99.0
    ),
    "Problem.from_batches": lambda: (
        dln.Problem.from_batches,
        {
            "batches": [tuple(samples().values())],
            "whiten": "zca",
            "center": True,
            "reduction": "mean",
            "layout": "columns",
            "rank_tolerance": 1e-9,
        },
    ),
    "Problem.from_data": lambda: (
        dln.Problem.from_data,
        samples()
        | {
            "whiten": "zca",
            "center": True,
            "reduction": "mean",
            "layout": "columns",
            "rank_tolerance": 1e-9,
        },
    ),
    "Problem.loss": method(problem, "loss", W=matrix),
    "Problem.target_factors": method(problem, "target_factors", tolerance=0.1),
    "Problem.transform": method(
        lambda: dln.Problem.from_data(**samples(), whiten="zca"), "transform", X=lambda: matrix(DIM, 3)
    ),
    "SVDTracker": lambda: (
        lambda **given: dln.SVDTracker(**given).update(matrix()),
        {
            "k": 3,
            "mode": "auto",
            "tolerance": 0.05,
            "signed": True,
            "guards": 2,
            "refresh_every": 3,
            "failure": 1e-10,
            "cluster_tolerance": 1e-8,
            "max_sweeps": 2,
            "seed": 0,
            "n_threads": 1,
        },
    ),
    "SVDTracker.seed": method(tracker, "seed", right=frame),
    "SVDTracker.set_reference": method(tracker, "set_reference", left=frame, right=frame),
    "SVDTracker.update": method(tracker, "update", W=matrix, drift=0.5, squared_norm=None),
    "SVDTracker.update_low_rank": method(
        tracker,
        "update_low_rank",
        A=lambda: matrix(DIM, 1),
        B=lambda: matrix(DIM, 1),
        scale=0.5,
        factor=0.9,
    ),
    "Sensing": function(
        dln.Sensing,
        operators=lambda: rng().standard_normal((5, 3, 2)),
        values=lambda: np.arange(5.0),
        shape=(3, 2),
        reduction="sum",
        loss_scale=None,
        truth=lambda: np.ones((3, 2)),
    ),
    "Sensing.adjoint": method(sensing, "adjoint", r=lambda: np.ones(30)),
    "Sensing.apply": method(sensing, "apply", W=matrix),
    "Sensing.backprojection": method(sensing, "backprojection", weights=weights),
    "Sensing.loss": method(sensing, "loss", W=matrix),
    "Sensing.projected": method(sensing, "projected", U=frame, V=frame),
    "Sensing.recovery_error": method(sensing, "recovery_error", W=matrix, normalization="relative"),
    "Sensing.suggested_rank": method(sensing, "suggested_rank", limit=4),
    "SufficientStatistics": function(dln.SufficientStatistics, layout="columns"),
    "SufficientStatistics.add": lambda: (dln.SufficientStatistics().add, samples()),
    "SufficientStatistics.add_batches": lambda: (
        dln.SufficientStatistics().add_batches,
        {"batches": [tuple(samples().values())]},
    ),
    "SufficientStatistics.load": function(dln.SufficientStatistics.load, path="nowhere/sums.npz"),
    "SufficientStatistics.merge": lambda: (statistics().merge, {"other": statistics()}),
    "SufficientStatistics.problem": method(
        statistics, "problem", whiten="pca", center=False, reduction="sum", rank_tolerance=1e-9
    ),
    "SufficientStatistics.save": method(statistics, "save", path="nowhere/sums.npz"),
    "SweepGrid": lambda: (
        dln.SweepGrid,
        {"base": base(), "axes": {"weights.seed": [0, 1]}, "changes": ()},
    ),
    "SweepResults.load": lambda: (
        dln.sweep(base(), Inline(), directory=tempfile.mkdtemp(), keep_runs=True).load,
        {"index": 0},
    ),
    "TrackerRecord.branch": method(lambda: tracker().update(matrix()), "branch", number=0),
    "Trajectory.active_angles": method(run, "active_angles", layer=1, side="right", reference="limit"),
    "Trajectory.active_singular_values": method(run, "active_singular_values", layer=1),
    "Trajectory.all_weights": method(run, "all_weights", step=3),
    "Trajectory.angles": method(run, "angles", layer=1, side="right", reference="limit"),
    "Trajectory.branch_values": method(followed, "branch_values", layer=1),
    "Trajectory.branches": method(followed, "branches", layer=1),
    "Trajectory.clusters": method(followed, "clusters", layer=1),
    "Trajectory.end_to_end": method(run, "end_to_end", step=3),
    "Trajectory.energy_share": method(run, "energy_share", layer=1, k=2),
    "Trajectory.features": method(run, "features", layer=2, X=matrix, step=3),
    "Trajectory.layer": method(run, "layer", layer=1, step=3),
    "Trajectory.multiplicity": method(run, "multiplicity", layer=1),
    "Trajectory.ranks": method(run, "ranks", threshold=0.01, step=3, relative_to="all"),
    "Trajectory.rho": method(run, "rho", layer=1, family=0),
    "Trajectory.save": method(run, "save", path="nowhere/run.npz", weights=True),
    "Trajectory.singular_value_errors": method(run, "singular_value_errors", layer=1),
    "Trajectory.singular_values": method(run, "singular_values", layer=1),
    "Trajectory.singular_vectors": method(run, "singular_vectors", layer=1, side="left", step=3),
    "Trajectory.subspace_cosines": method(run, "subspace_cosines", layer=1, rank=2, side="left", step=3),
    "Trajectory.to_xarray": method(run, "to_xarray", variables=["loss"]),
    "Trajectory.tracking": method(followed, "tracking", layer=1),
    "Trajectory.weights": method(lambda: run("dense"), "weights", layer=1, step=0),
    "aligned": function(dln.aligned, problem=problem, widths=[DIM] * 3, scale=0.5, seed=0, dtype=np.float64),
    "classification": function(
        dln.classification, n_classes=3, samples_per_class=2, dim=6, seed=0, reduction="mean"
    ),
    "closure": function(dln.closure, problem=problem, weights=weights, largest_share=0.9),
    "compress": function(dln.compress, weights=weights, rank=2, tol=None, balanced=True),
    "compressed_weights": function(
        dln.compressed_weights,
        problem=completion,
        weights=weights,
        rank=2,
        basis="gradient",
        depth=3,
        scale=1e-3,
    ),
    "export": function(
        dln.export, source=run, path="nowhere/run.zarr", every=2, variables=["loss"], overwrite=False
    ),
    "gaussian": function(dln.gaussian, widths=[3, 4, 2], scale=0.5, seed=0, dtype=np.float32),
    "gradients": function(dln.gradients, problem=problem, weights=weights, n_threads=1),
    "load": function(dln.load, path="nowhere", every=2),
    "load_cifar10": function(dln.load_cifar10, path="nowhere", split="train", per_class=2),
    "load_fashion_mnist": function(dln.load_fashion_mnist, path="nowhere", split="train", per_class=2),
    "load_movielens": function(dln.load_movielens, path="nowhere"),
    "low_rank_completion": function(
        dln.low_rank_completion, dim=5, rank=2, observed=0.5, seed=0, reduction="mean"
    ),
    "low_rank_recovery": function(dln.low_rank_recovery, dim=5, rank=2, seed=0, reduction="mean"),
    "low_rank_sensing": function(
        dln.low_rank_sensing, dim=5, rank=2, n_measurements=9, seed=0, reduction="sum"
    ),
    "measures.balancedness": function(dln.measures.balancedness, weights=weights),
    "measures.compression": lambda: (dln.measures.compression, features()),
    "measures.discrimination": lambda: (dln.measures.discrimination, features()),
    "measures.effective_rank": function(dln.measures.effective_rank, matrix=matrix),
    "measures.energy_share": function(dln.measures.energy_share, matrix=matrix, k=2),
    "measures.image_angles": function(dln.measures.image_angles, W=matrix, start=matrix, vectors=frame),
    "measures.mode_strengths": function(dln.measures.mode_strengths, problem=problem, W=matrix),
    "measures.numerical_rank": function(
        dln.measures.numerical_rank, matrix=matrix, kind="nuclear", mass=0.9, threshold=0.1, shape=(DIM, DIM)
    ),
    "measures.schatten_norm": function(dln.measures.schatten_norm, matrix=matrix, p=1.5),
    "measures.sharpness": function(dln.measures.sharpness, problem=problem, weights=weights, tolerance=1e-3),
    "measures.stable_rank": function(dln.measures.stable_rank, matrix=matrix),
    "measures.subspace_angles": function(dln.measures.subspace_angles, U=frame, V=frame),
    "measures.subspace_cosine": function(dln.measures.subspace_cosine, U=frame, V=frame),
    "measures.vector_angles": function(dln.measures.vector_angles, vectors=frame, reference=frame, rank=1),
    "one_hot": function(dln.one_hot, labels=[0, 1, 2, 1], classes=[0, 1, 2]),
    "orthogonal": function(
        dln.orthogonal, widths=[3, 4, 2], scale=0.5, seed=0, implicit=False, dtype=np.float32
    ),
    "plots.linear_fit": function(dln.plots.linear_fit, layers=[1, 2, 3], values=[1.0, 2.0, 3.5]),
    "plots.log_linear_fit": function(dln.plots.log_linear_fit, layers=[1, 2, 3], values=[1.0, 0.5, 0.2]),
    "Record": lambda: (
        lambda **fields: run(record=dln.Record(**fields)),
        {"every": 2, "singular_values": 3, "vectors": False, "tracking": "auto", "progress": False},
    ),
    "resume": function(dln.resume, directory="nowhere", progress=False, callback=None),
    "sweep": lambda: (
        dln.sweep,
        # Without an executor it starts processes: see test_sweep.py.
        {"grid": base(), "executor": Inline(), "chunk_seconds": 1.0, "n_workers": 1, "retry_failed": False},
    ),
    "theory.aligned_modes": function(
        dln.theory.aligned_modes,
        singular_values=[1.0, 0.5],
        n_layers=2,
        steps=4,
        scale=0.5,
        loss_scale=1.0,
        learning_rate=0.1,
        weight_decay=0.01,
        momentum=0.1,
    ),
    "theory.compression_law": function(
        dln.theory.compression_law,
        layer=[1, 2],
        scale=0.1,
        n_layers=3,
        n_classes=3,
        samples_per_class=4,
        output_multiplier=1.0,
    ),
    "theory.default_learning_rate": function(
        dln.theory.default_learning_rate, problem=problem, n_layers=3, scale=0.5
    ),
    "theory.discrimination_law": function(
        dln.theory.discrimination_law, layer=[1, 2], least_squares=matrix, n_layers=3
    ),
    "theory.first_order_split": function(
        dln.theory.first_order_split, problem=problem, weights=weights, layer=1
    ),
    "theory.plateau_bounds": function(dln.theory.plateau_bounds, sigma=1.0, scale=0.1, n_layers=3, **RATES),
    "theory.rho_flow": function(dln.theory.rho_flow, time=[0.0, 1.0], scale=0.5, n_layers=3, **RATES),
    "theory.stability_threshold": function(
        dln.theory.stability_threshold, sigma=1.0, n_layers=3, loss_scale=1.0
    ),
    "train": function(
        recorded(dln.train),
        problem=problem,
        weights=weights,
        engine="auto",
        every=2,
        singular_values=2,
        vectors=False,
        tracking="auto",
        weights_every=None,
        tolerance=None,
        n_threads=1,
        checkpoint=None,
        callback=None,
        optimizer="gd",
        **descent(),
    ),
    "train, dense": function(
        recorded(dln.train),
        problem=problem,
        weights=weights,
        engine="dense",
        every=2,
        singular_values=2,
        vectors=True,
        tracking="dense",
        weights_every=2,
        tolerance=1e-9,
        **descent(),
    ),
    "train, observed": function(
        recorded(dln.train), problem=completion, weights=weights, singular_values=None, **descent()
    ),
    "train_batch": lambda: (
        recorded(dln.train_batch),
        {
            "problems": [problem()] * 2,
            "weights": [weights(), weights()],
            "every": 2,
            "singular_values": "all",
            "tolerance": 1e-9,
            "n_threads": 1,
            **descent(learning_rate=[0.1, 0.2]),
        },
    ),
    "train_compressed": function(
        recorded(dln.train_compressed),
        problem=completion,
        weights=weights,
        rank=2,
        steps=5,
        outer=0.01,
        outer_every=2,
        basis="gradient",
        depth=3,
        scale=1e-3,
        learning_rate="adaptive",
        weights_every=3,
        singular_values=None,
    ),
    "uniform": function(dln.uniform, widths=[3, 4, 2], scale=0.5, seed=0, dtype=np.float32),
}


def sparse():
    scipy = pytest.importorskip("scipy.sparse", reason="SciPy makes the matrices")
    return scipy.csr_array(np.where(matrix() > 0, matrix(), 0.0))


# ------------------------------------------------------------------------------------------ odd arguments


class Subclass(np.ndarray):
    """An array that knows better."""


SCALARS = [
    None, "text", "auto", "", b"bytes", object(), {}, {1, 2}, [], (), [1, [2, 3]], [[1.0], [2.0, 3.0]],
    True, False, 3 + 4j, range(3), len, slice(2), Ellipsis, NotImplemented, np.nan, np.inf, -np.inf, 1e308,
    -1e308, 5e-324, -1, 0, 1, 2, 7, 2**40, 2**63, 2**100, -(2**63), 0.5, -0.5, 1.0, 3.7, "3", "nan",
    fractions.Fraction(1, 3), decimal.Decimal("0.1"), np.int8(3), np.uint64(2**63), np.float16(0.5),
    np.longdouble(0.5), np.datetime64("2020-01-01"), np.bool_(True), np.str_("x"), np.array(3),
    np.array(0.5), np.array(None), np.zeros(0), np.zeros((0, 3)), np.zeros((2, 2, 2)), np.ones(3),
    np.ones(3, dtype=np.int8), [0.1, 0.2, 0.3], [np.nan] * 3, ["a", "b", "c"], [None] * 3,
    memoryview(b"abc"), Path("nowhere"), ValueError, np.array([1, 2], dtype=object),
    np.array([(1, 2.0)], dtype="i4,f8"), np.zeros(3, dtype="M8[s]"),
]  # fmt: skip

CHANGES = {
    "complex": lambda a: a + 1j,
    "objects": lambda a: a.astype(object),
    "booleans": lambda a: a > 0,
    "int8": lambda a: a.astype(np.int8),
    "uint64": lambda a: np.abs(a).astype(np.uint64),
    "float16": lambda a: a.astype(np.float16),
    "float32": lambda a: a.astype(np.float32),
    "longdouble": lambda a: a.astype(np.longdouble),
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "read-only": lambda a: _read_only(a),
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: a[::-1],
    "Fortran": lambda a: np.asfortranarray(a),
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "transposed": lambda a: a.T,
    "misaligned": lambda a: _misaligned(a),
    "one axis more": lambda a: a[np.newaxis],
    "one axis less": lambda a: a.reshape(-1),
    "no rows": lambda a: a[:0],
    "no columns": lambda a: a[..., :0],
    "one row less": lambda a: a[1:],
    "one column less": lambda a: a[..., 1:],
    "NaN": lambda a: _with(a, np.nan),
    "infinity": lambda a: _with(a, np.inf),
    "huge": lambda a: a * 1e300,
    "tiny": lambda a: a * 1e-310,
    "zeros": lambda a: a * 0,
    "negative": lambda a: -a,
    "masked": lambda a: np.ma.masked_greater(a, 0),
    "matrix": lambda a: a.view(np.matrix) if a.ndim == 2 else a,
    "subclass": lambda a: a.view(Subclass),
    "lists": lambda a: a.tolist(),
    "text": lambda a: a.astype(str),
    "generator": lambda a: (x for x in a),
    "bytes": lambda a: a.tobytes(),
}
LISTS = {
    "first missing": lambda x: x[1:],
    "last missing": lambda x: x[:-1],
    "twice": lambda x: [*x, *x],
    "none": lambda x: [],
    "nested": lambda x: [x],
    "tuple": tuple,
    "generator": lambda x: (item for item in x),
    "with None": lambda x: [*x[:-1], None],
    "with text": lambda x: [*x[:-1], "text"],
    "with NaN": lambda x: [*x[:-1], np.nan],
    "with huge": lambda x: [*x[:-1], 2**63],
    "with zero": lambda x: [*x[:-1], 0],
    "negative": lambda x: [*x[:-1], -3],
    "reversed": lambda x: list(reversed(x)),
    "dictionary": lambda x: dict(enumerate(x)),
}


def _read_only(a):
    a = a.copy()
    a.setflags(write=False)
    return a


def _misaligned(a):
    raw = np.zeros(a.nbytes + 1, dtype=np.uint8)
    result = raw[1:].view(a.dtype).reshape(a.shape) if a.size else a
    result[...] = a
    return result


def _with(a, value):
    a = np.array(a, dtype=np.float64)
    if a.size:
        a.flat[a.size // 2] = value
    return a


def oddities(value):
    """Return what may stand in place of a value, by name."""
    found = {f"scalar {i} ({type(x).__name__})": (lambda x=x: x) for i, x in enumerate(SCALARS)}
    if isinstance(value, Inline):
        del found["scalar 0 (NoneType)"]
    if isinstance(value, np.ndarray):
        found |= {name: (lambda change=change: change(value)) for name, change in CHANGES.items()}
    if isinstance(value, (list, tuple)) and len(value):
        items = list(value)
        found |= {name: (lambda change=change: change(items)) for name, change in LISTS.items()}
        if isinstance(items[0], np.ndarray):
            for name, change in CHANGES.items():
                found[f"first {name}"] = lambda change=change: [change(items[0]), *items[1:]]
            found["all float32"] = lambda: [x.astype(np.float32) for x in items]
            found["stacked"] = lambda: np.stack(items) if len({x.shape for x in items}) == 1 else items
    return found


#: Results that may hold NaN or infinity, and why.
MAY_BE_INFINITE = {
    "Problem.loss": "that of a W whose squares overflow",
    "TrackerRecord.branch": "a branch that is gone is NaN",
    "SVDTracker": "gaps of the last value, and angles without a reference, are not known",
    "SVDTracker.update": "as above",
    "SVDTracker.update_low_rank": "as above",
    "Trajectory.branch_values": "a branch that was not there yet is NaN",
    "Trajectory.tracking": "as SVDTracker",
    "theory.stability_threshold": "nothing oscillates where there is nothing to learn",
    "theory.aligned_modes": "its modes may diverge",
    "theory.plateau_bounds": "a plateau of layers of zeros never ends",
    "theory.default_learning_rate": "as stability_threshold",
    "MatrixCompletion.score": "R^2 has no lower bound",
    "measures.discrimination": "classes of which some have no mean to compare",
}


def finite(result, depth=0):
    """Tell whether all numbers in a result are finite."""
    if isinstance(result, (float, np.floating)):
        return bool(np.isfinite(result))
    if isinstance(result, np.ndarray):
        return result.dtype.kind not in "fc" or bool(np.isfinite(result).all())
    if isinstance(result, dln.Trajectory):
        return finite(result.loss) and (not len(result.steps) or finite(values_of(result)))
    if depth > 3 or isinstance(result, (str, bytes, type, types.FunctionType, types.MethodType)):
        return True
    if isinstance(result, dln.Batch):
        # The loss of a run that diverged is infinite; its trajectory ends before.
        return all(finite(result[i]) for i, end in enumerate(result.outcomes) if end != "diverged")
    if isinstance(result, Mapping):
        return all(finite(item, depth + 1) for item in result.values())
    if isinstance(result, (list, tuple)):
        return all(finite(item, depth + 1) for item in result)
    if dataclasses.is_dataclass(result):
        names = [field.name for field in dataclasses.fields(result)]
        return all(finite(getattr(result, name), depth + 1) for name in names)
    return True


def values_of(trajectory):
    try:
        return [trajectory.singular_values(layer) for layer in range(1, trajectory.n_layers + 1)]
    except ValueError:  # none were asked for
        return []


def largest(arguments):
    """Return the size of the largest number among some arguments."""
    sizes = [0.0]
    for value in arguments.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            try:
                sizes.append(float(np.nanmax(np.abs(np.asarray(item, dtype=np.float64)))))
            except (TypeError, ValueError, OverflowError):
                continue
    return max(sizes)


class TooLongError(Exception):
    pass


@contextmanager
def time_limit(seconds):
    """Interrupt what takes too long; in the main thread, where signals come."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(number, at):
        raise TooLongError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def complaint(name, call, arguments):
    """Make the call; return what is wrong with what comes of it, None where nothing is."""
    try:
        with time_limit(10), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            warnings.simplefilter("ignore", dln.CopyWarning)
            result = call(**arguments)
    except MISTAKES as error:
        if isinstance(error, TYPED):  # NotFittedError is an AttributeError too
            return None
        return f"{type(error).__name__}: {error}"
    except TYPED as error:
        return None if is_raised_on_purpose(error) else f"raw {type(error).__name__}: {error}"
    except ModuleNotFoundError:
        return None  # an extra that is not installed
    except RuntimeWarning as warning:  # of NumPy; numbers beyond 1e154 have squares that overflow
        return None if "overflow" in str(warning) and largest(arguments) > 1e150 else f"warning: {warning}"
    except (Exception, TooLongError) as error:
        return f"{type(error).__name__}: {error}"
    if name not in MAY_BE_INFINITE and not finite(result):
        return "a result that is not finite"
    return None


def is_raised_on_purpose(error):
    """Tell whether an error comes from a `raise` of the package, or from the system by name of a file."""
    if isinstance(error, (OSError, MemoryError)):
        return True
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code, line = trace.tb_frame.f_code, trace.tb_lineno
    if not code.co_filename.startswith(PACKAGE):
        return False
    source = linecache.getline(code.co_filename, line).strip()
    # What the core says is as good as what the package says.
    return source.startswith("raise") or "core." in source or "_tracker." in source


# -------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, arguments = CALLS[name]()
    if "nowhere" in str(arguments):
        return  # it is about what is not there
    try:
        call(**arguments)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@settings(
    max_examples=int(os.environ.get("DLNFAST_FUZZ_EXAMPLES", "1500")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_odd_arguments_are_named_or_harmless(data, tmp_path_factory):
    name = data.draw(st.sampled_from(sorted(CALLS)), label="function")
    before = Path.cwd()
    os.chdir(tmp_path_factory.getbasetemp())
    try:
        call, arguments = CALLS[name]()
        count = data.draw(st.integers(1, min(2, len(arguments))), label="count")
        keys = st.lists(st.sampled_from(sorted(arguments)), min_size=count, max_size=count, unique=True)
        for key in data.draw(keys, label="arguments"):
            odd = oddities(arguments[key])
            choice = data.draw(st.sampled_from(sorted(odd)), label="oddity")
            try:
                replaced = odd[choice]()
            except (TypeError, ValueError, RuntimeWarning):  # not of every array
                continue
            # As many steps as that are no mistake: they take their time, until Ctrl-C.
            takes_time = replaced is None or isinstance(replaced, int)
            if (name, key) != ("train_compressed", "steps") or not takes_time:
                arguments[key] = replaced
        assert complaint(name, call, arguments) is None
    finally:
        os.chdir(before)


#: What is not in the table, and why.
NOT_CALLED = {
    "reference": "formulas as they stand in the papers, for those who compare with them: they check nothing",
    "figures": "see test_figures.py",
    "torch": "see the tests of its modules",
}
HOLDERS = {  # made by the package, not by its users
    "Batch", "Certificate", "Closure", "CompressedNetwork", "Family", "ImplicitWeights", "Ratings",
    "SweepResults", "TrackerRecord", "Trajectory",
}  # fmt: skip
OTHERS = {
    "AssumptionError", "CopyWarning", "DivergedError", "FolderInUseError", "ShapeError",  # errors
    "build_info", "set_num_threads",  # see test_threads.py
    # Of what other methods return, or for the modules of the package.
    "ImplicitWeights.basis", "ImplicitWeights.close", "LowRank.astype", "Problem.engine_arguments",
    "Problem.rank_exceeds", "Problem.dense_target", "Completion.engine_arguments", "Completion.entries",
    "Completion.from_arrays", "Completion.replaced", "Completion.target_values", "Sensing.engine_arguments",
    "Sensing.from_arrays", "Sensing.target_values", "SVDTracker.from_state_dict", "Certificate.from_dict",
    "Trajectory.from_arrays", "Trajectory.to_arrays", "MatrixCompletion.get_params", "Checkpoint.of",
    "Trajectory.block_angles",  # of tracked models: test_torch_track.py
    "MatrixCompletion.set_params",
}  # fmt: skip


def public():
    """Yield the names of all that users call with arguments."""
    for name in dln.__all__:
        if name in NOT_CALLED:
            continue
        thing = getattr(dln, name)
        if isinstance(thing, types.ModuleType):
            for inner in thing.__all__:
                if name != "plots" or not inspect.isclass(getattr(thing, inner)):  # see test_plots.py
                    found = getattr(thing, inner)
                    if not (inspect.isclass(found) and issubclass(found, tuple)):
                        yield f"{name}.{inner}"
            continue
        if name.startswith("__"):
            continue
        if name not in HOLDERS:
            yield name
        if inspect.isclass(thing) and not issubclass(thing, (Exception, Warning)):
            yield from methods(name, thing)
    yield from methods("ImplicitWeights", ImplicitWeights)


def methods(name, thing):
    for inner, call in inspect.getmembers(thing, callable):
        if inner.startswith("_") or inner in ("index", "count"):
            continue
        if set(inspect.signature(call).parameters) - {"self"}:
            yield f"{name}.{inner}"


def test_no_public_function_is_left_out():
    names = set(public())
    assert names - set(CALLS) - OTHERS == set()
    assert {name.partition(",")[0] for name in CALLS} - names == set()
    assert OTHERS - names == set()
