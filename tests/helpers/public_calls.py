# SPDX-License-Identifier: MIT
"""A valid call of every public function: {name: function that returns the callable and its arguments}."""

from __future__ import annotations

import dataclasses
import tempfile

import numpy as np

import dlnfast as dln
from helpers.executors import InlineExecutor
from helpers.optional_packages import import_sparse

DIM, DEPTH, N_SAMPLES = 6, 3, 40


def make_generator():
    return np.random.default_rng(0)


def make_problem():
    return dln.low_rank_recovery(DIM, 2)


def make_weights():
    return dln.orthogonal([DIM] * (DEPTH + 1), 0.7)


def make_square_problem():
    return dln.Problem(make_matrix(DIM, DIM))


def make_balanced_weights():
    return dln.orthogonal([DIM] * 2, 0.3) + dln.orthogonal([DIM] * 2, 0.7, seed=1)


def make_kernel():
    return dln.theory.neural_tangent_kernel(make_weights())


def make_sample_problem():
    return dln.SampleProblem(**make_samples(), batch_size=3, label_noise=0.1, n_classes=DIM)


def make_completion():
    return dln.low_rank_completion(DIM, 2, 0.7)


def make_sensing():
    return dln.low_rank_sensing(DIM, 2, 30)


def make_run(engine="reduced", **options):
    return dln.train(make_problem(), make_weights(), learning_rate=0.3, steps=6, engine=engine, **options)


def make_tracked_run():
    return make_run("dense", record=dln.Record(singular_values=2, tracking="dense"))


def make_tracker():
    result = dln.SVDTracker(k=2)
    result.update(make_matrix())
    return result


def make_matrix(rows=DIM, columns=DIM, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns))


def make_orthonormal(columns=2, seed=0):
    return np.linalg.qr(make_matrix(DIM, columns, seed))[0]


def make_labelled_features():
    return {"features": make_matrix(4, 12), "labels": np.arange(12) % 3}


def make_samples():
    return {"X": make_matrix(DIM, N_SAMPLES), "Y": np.arange(N_SAMPLES) % 3}


def make_ratings():
    pairs = np.array([[i, j] for i in range(DIM) for j in range(DIM) if (i + j) % 3])
    return {"X": pairs, "y": np.sin(pairs.sum(axis=1))}


def fit_completion():
    return dln.MatrixCompletion(steps=5, rank=2).fit(**make_ratings())


def make_statistics():
    return dln.SufficientStatistics().add(**make_samples())


def descent_options(**more):
    return {"learning_rate": 0.1, "steps": 5, "weight_decay": 0.01, "momentum": 0.2, **more}


def make_specification():
    return {
        "problem": {"kind": "low-rank-recovery", "dim": DIM, "rank": 2},
        "weights": {"depth": 2},
        "train": {"learning_rate": 0.1, "steps": 3},
    }


def make_implicit_weights():
    return dln.orthogonal([DIM] * (DEPTH + 1), 0.7, implicit=True)


def with_record_fields(call):
    """Return a function that accepts the fields of `Record` as well as the other arguments of a call."""
    names = [field.name for field in dataclasses.fields(dln.Record)]

    def run(**arguments):
        record = dln.Record(**{name: arguments.pop(name) for name in names if name in arguments})
        return call(**arguments, record=record)

    return run


def call_of_options(name, make, **fields):
    """Return a fit of an estimator as a function of the fields of one of its option classes."""

    def fit(**options):
        return dln.MatrixCompletion(steps=5, rank=2, **{name: make(**options)}).fit(**make_ratings())

    return lambda: (fit, dict(fields))


def call_of_method(make, name, **arguments):
    """Return a call of a method of a new object."""
    return lambda: (getattr(make(), name), {k: v() if callable(v) else v for k, v in arguments.items()})


def call_of_function(call, **arguments):
    return lambda: (call, {k: v() if callable(v) else v for k, v in arguments.items()})


def call_of_rule(rule, **settings):
    """Return a run of `train` as a function of the settings of an update rule."""
    engine = "torch" if rule.is_entrywise else "auto"

    def run(**changed):
        optimizer = rule(**changed)
        return dln.train(
            make_problem(), make_weights(), learning_rate=0.01, steps=3, optimizer=optimizer, engine=engine
        )

    return lambda: (run, dict(settings))


RULES = {
    "Nesterov": {"momentum": 0.5},
    "Muon": {
        "momentum": 0.5,
        "nesterov": True,
        "method": "polar",
        "steps": 3,
        "coefficients": (3.0, -4.0, 2.0),
        "epsilon": 1e-7,
        "scale": "original",
        "rank_tolerance": 1e-8,
    },
    "SpectralSign": {"momentum": 0.5, "rank_tolerance": 1e-8},
    "Shampoo": {"epsilon": 1e-2, "decay": 0.9, "momentum": 0.5},
    "Adam": {"betas": (0.9, 0.99), "epsilon": 1e-8},
    "AdamW": {"betas": (0.9, 0.99), "epsilon": 1e-8},
}
RATES = {"loss_scale": 1.0, "learning_rate": 0.1}
CALLS = {
    "Adaptive": lambda: (
        lambda **options: dln.train(
            make_problem(), make_weights(), learning_rate=dln.Adaptive(**options), steps=3
        ),
        {"safety": 1.0, "ratios": [1.0] * DEPTH, "curvature": [1.0] * DEPTH},
    ),
    "Schedule": lambda: (
        lambda **options: dln.train(
            make_problem(), make_weights(), learning_rate=dln.Schedule(**options), steps=3
        ),
        {"rule": [0.1, 0.05, 0.02]},
    ),
    "Schedule.cosine": call_of_function(dln.Schedule.cosine, peak=0.1, steps=9, warmup=2, final=0.01),
    "Schedule.piecewise": call_of_function(dln.Schedule.piecewise, values={0: 0.1, 3: 0.01}),
    "Schedule.from_values": call_of_function(dln.Schedule.from_values, values=[0.1, 0.2]),
    "Schedule.from_dict": call_of_function(
        dln.Schedule.from_dict, definition={"schedule": "values", "values": [0.1]}
    ),
    "Schedule.resolve": call_of_method(lambda: dln.Schedule(lambda t: 0.1), "resolve", steps=3),
    "Schedule.values": call_of_method(lambda: dln.Schedule.cosine(0.1, 5), "values", steps=3, n_layers=2),
    **{
        f"optimizers.{name}": call_of_rule(getattr(dln.optimizers, name), **settings)
        for name, settings in RULES.items()
    },
    "optimizers.optimizer_from": call_of_function(dln.optimizers.optimizer_from, value="muon"),
    "BiasOptions": call_of_options("biases", dln.BiasOptions, kind="both", penalty=1.0),
    "Checkpoint": call_of_function(dln.Checkpoint, directory="nowhere", every=3, seconds=1.0),
    "Completion": call_of_function(
        dln.Completion,
        rows=[0, 1, 2],
        columns=[1, 2, 0],
        values=[0.5, 1.0, -1.0],
        shape=(3, 3),
        reduction="mean",
        loss_scale=None,
        truth=lambda: np.eye(3),
    ),
    "Completion.backprojection": call_of_method(make_completion, "backprojection", weights=make_weights),
    "Completion.from_dense": call_of_function(
        dln.Completion.from_dense, matrix=make_matrix, mask=lambda: make_matrix() > 0, reduction="mean"
    ),
    "Completion.from_sparse": call_of_function(dln.Completion.from_sparse, matrix=lambda: make_sparse()),
    "Completion.loss": call_of_method(make_completion, "loss", W=make_matrix),
    "Completion.predict": call_of_method(
        make_completion, "predict", W=make_weights, rows=[0, 1], columns=[1, 2]
    ),
    "Completion.recovery_error": call_of_method(
        make_completion, "recovery_error", W=make_matrix, normalization="relative"
    ),
    "Completion.suggested_rank": call_of_method(make_completion, "suggested_rank", limit=4),
    "CompressedNetwork.apply": call_of_method(lambda: dln.compress(make_run()), "apply", X=make_matrix),
    "EntryOptions": call_of_options(
        "entries",
        dln.EntryOptions,
        shape=(DIM, DIM),
        duplicates="error",
        weighting=(0.25, -0.25),
        clip="range",
    ),
    "ImplicitWeights.apply": call_of_method(make_implicit_weights, "apply", layer=1, X=make_matrix),
    "ImplicitWeights.apply_transpose": call_of_method(
        make_implicit_weights, "apply_transpose", layer=1, Y=make_matrix
    ),
    "ImplicitWeights.column": call_of_method(make_implicit_weights, "column", layer=1, j=1),
    "ImplicitWeights.dense": call_of_method(make_implicit_weights, "dense", layer=1),
    "ImplicitWeights.entry": call_of_method(make_implicit_weights, "entry", layer=1, i=1, j=2),
    "ImplicitWeights.row": call_of_method(make_implicit_weights, "row", layer=1, i=1),
    "LayerOptions": call_of_options(
        "layers",
        dln.LayerOptions,
        compress=True,
        outer=1.0,
        scale=1e-2,
        learning_rate="adaptive",
        dtype="float64",
    ),
    "LowRank": call_of_function(
        dln.LowRank, U=make_orthonormal, s=lambda: np.array([2.0, 1.0]), V=lambda: make_orthonormal(seed=1)
    ),
    "LowRank.truncated": call_of_method(lambda: make_problem().target, "truncated", rank=1),
    "MatrixCompletion": lambda: (
        lambda **options: dln.MatrixCompletion().set_params(**options).fit(**make_ratings()),
        {
            "rank": 2,
            "method": "gradient",
            "depth": 2,
            "layers__keep_trajectories": True,
            "layers__compress": True,
            "layers__outer": 1.0,
            "layers__scale": 1e-2,
            "layers__learning_rate": "adaptive",
            "layers__dtype": "float64",
            "weight_decay": 0.1,
            "steps": 5,
            "biases": "both",
            "biases__penalty": 1.0,
            "stopping__budget": 10.0,
            "stopping__tolerance": 1e-6,
            "stopping__validation_fraction": 0.5,
            "stopping__patience": 2,
            "stopping__record_every": 2,
            "entries__weighting": (0.25, -0.25),
            "entries__clip": "range",
            "entries__shape": (DIM, DIM),
            "entries__duplicates": "error",
            "seed": 0,
            "n_threads": 1,
        },
    ),
    "MatrixCompletion.fit": lambda: (dln.MatrixCompletion(steps=4, rank=2).fit, make_ratings()),
    "MatrixCompletion.fold_in": lambda: (
        lambda X, y: fit_completion().fold_in(rows=(X, y)),
        make_ratings() | {"X": make_ratings()["X"] + np.array([DIM, 0])},
    ),
    "MatrixCompletion.partial_fit": lambda: (
        dln.MatrixCompletion(steps=4, rank=2).partial_fit,
        make_ratings(),
    ),
    "MatrixCompletion.predict": call_of_method(fit_completion, "predict", X=[[0, 1], [5, 5]]),
    "MatrixCompletion.recommend": call_of_method(fit_completion, "recommend", row=1, n=2, exclude_seen=False),
    "MatrixCompletion.rmse": lambda: (fit_completion().rmse, make_ratings()),
    "MatrixCompletion.score": lambda: (fit_completion().score, make_ratings()),
    "MatrixCompletion.similar_items": call_of_method(fit_completion, "similar_items", column=1, n=2),
    "MatrixCompletion.similar_users": call_of_method(fit_completion, "similar_users", row=1, n=2),
    "SampleProblem": lambda: (
        dln.SampleProblem,
        {
            **make_samples(),
            "loss": "squared",
            "loss_scale": 1.0,
            "batch_size": 3,
            "label_noise": 0.1,
            "seed": 1,
            "biases": True,
            "n_classes": DIM,
        },
    ),
    "SampleProblem.batch": call_of_method(make_sample_problem, "batch", step=3),
    "SampleProblem.loss": call_of_method(
        make_sample_problem, "loss", weights=make_weights, biases=lambda: [np.ones(DIM)] * DEPTH
    ),
    "SampleProblem.targets": call_of_method(make_sample_problem, "targets", step=3),
    "Problem": call_of_function(
        dln.Problem,
        target=make_matrix,
        input_gram=lambda: np.eye(DIM),
        loss_scale=1.0,
        output_norm_squared=99.0,
    ),
    "Problem.from_batches": lambda: (
        dln.Problem.from_batches,
        {
            "batches": [tuple(make_samples().values())],
            "whiten": "zca",
            "center": True,
            "reduction": "mean",
            "layout": "columns",
            "rank_tolerance": 1e-9,
        },
    ),
    "Problem.from_data": lambda: (
        dln.Problem.from_data,
        make_samples()
        | {
            "whiten": "zca",
            "center": True,
            "reduction": "mean",
            "layout": "columns",
            "rank_tolerance": 1e-9,
        },
    ),
    "Problem.loss": call_of_method(make_problem, "loss", W=make_matrix),
    "Problem.target_factors": call_of_method(make_problem, "target_factors", tolerance=0.1),
    "Problem.transform": call_of_method(
        lambda: dln.Problem.from_data(**make_samples(), whiten="zca"),
        "transform",
        X=lambda: make_matrix(DIM, 3),
    ),
    "Record": lambda: (
        lambda **fields: make_run(record=dln.Record(**fields)),
        {"every": 2, "singular_values": 3, "vectors": False, "tracking": "auto", "progress": False},
    ),
    "Record.checked": call_of_method(lambda: dln.Record(every=2, singular_values=3), "checked", steps=5),
    "SVDTracker": lambda: (
        lambda **options: dln.SVDTracker(**options).update(make_matrix()),
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
    "SVDTracker.seed": call_of_method(make_tracker, "seed", right=make_orthonormal),
    "SVDTracker.set_reference": call_of_method(
        make_tracker, "set_reference", left=make_orthonormal, right=make_orthonormal
    ),
    "SVDTracker.update": call_of_method(make_tracker, "update", W=make_matrix, drift=0.5, squared_norm=None),
    "SVDTracker.update_low_rank": call_of_method(
        make_tracker,
        "update_low_rank",
        A=lambda: make_matrix(DIM, 1),
        B=lambda: make_matrix(DIM, 1),
        scale=0.5,
        factor=0.9,
    ),
    "Sensing": call_of_function(
        dln.Sensing,
        operators=lambda: make_generator().standard_normal((5, 3, 2)),
        values=lambda: np.arange(5.0),
        shape=(3, 2),
        reduction="sum",
        loss_scale=None,
        truth=lambda: np.ones((3, 2)),
    ),
    "Sensing.adjoint": call_of_method(make_sensing, "adjoint", r=lambda: np.ones(30)),
    "Sensing.apply": call_of_method(make_sensing, "apply", W=make_matrix),
    "Sensing.backprojection": call_of_method(make_sensing, "backprojection", weights=make_weights),
    "Sensing.loss": call_of_method(make_sensing, "loss", W=make_matrix),
    "Sensing.projected": call_of_method(make_sensing, "projected", U=make_orthonormal, V=make_orthonormal),
    "Sensing.recovery_error": call_of_method(
        make_sensing, "recovery_error", W=make_matrix, normalization="relative"
    ),
    "Sensing.suggested_rank": call_of_method(make_sensing, "suggested_rank", limit=4),
    "StoppingOptions": call_of_options(
        "stopping",
        dln.StoppingOptions,
        tolerance=1e-6,
        validation_fraction=0.5,
        patience=2,
        record_every=2,
    ),
    "SufficientStatistics": call_of_function(dln.SufficientStatistics, layout="columns"),
    "SufficientStatistics.add": lambda: (dln.SufficientStatistics().add, make_samples()),
    "SufficientStatistics.add_batches": lambda: (
        dln.SufficientStatistics().add_batches,
        {"batches": [tuple(make_samples().values())]},
    ),
    "SufficientStatistics.load": call_of_function(dln.SufficientStatistics.load, path="nowhere/sums.npz"),
    "SufficientStatistics.merge": lambda: (make_statistics().merge, {"other": make_statistics()}),
    "SufficientStatistics.problem": call_of_method(
        make_statistics, "problem", whiten="pca", center=False, reduction="sum", rank_tolerance=1e-9
    ),
    "SufficientStatistics.save": call_of_method(make_statistics, "save", path="nowhere/sums.npz"),
    "SweepGrid": lambda: (
        dln.SweepGrid,
        {"base": make_specification(), "axes": {"weights.seed": [0, 1]}, "changes": ()},
    ),
    "SweepResults.load": lambda: (
        dln.sweep(make_specification(), InlineExecutor(), directory=tempfile.mkdtemp(), keep_runs=True).load,
        {"index": 0},
    ),
    "TrackerRecord.branch": call_of_method(lambda: make_tracker().update(make_matrix()), "branch", number=0),
    "Trajectory.active_angles": call_of_method(
        make_run, "active_angles", layer=1, side="right", reference="limit"
    ),
    "Trajectory.active_singular_values": call_of_method(make_run, "active_singular_values", layer=1),
    "Trajectory.end_to_end_singular_values": call_of_method(make_run, "end_to_end_singular_values", k=2),
    "Trajectory.sharpness": call_of_method(make_run, "sharpness", k=1, tolerance=1e-6),
    "Trajectory.train_kernel": call_of_method(make_run, "train_kernel", k=1, tolerance=1e-6),
    "theory.power_iteration": call_of_function(
        dln.theory.power_iteration,
        problem=make_problem,
        weights=lambda: dln.orthogonal([DIM] * 3, 0.1),
        steps=3,
        learning_rate=0.1,
    ),
    "Trajectory.all_weights": call_of_method(make_run, "all_weights", step=3),
    "Trajectory.angles": call_of_method(make_run, "angles", layer=1, side="right", reference="limit"),
    "Trajectory.branch_values": call_of_method(make_tracked_run, "branch_values", layer=1),
    "Trajectory.branches": call_of_method(make_tracked_run, "branches", layer=1),
    "Trajectory.clusters": call_of_method(make_tracked_run, "clusters", layer=1),
    "Trajectory.end_to_end": call_of_method(make_run, "end_to_end", step=3),
    "Trajectory.energy_share": call_of_method(make_run, "energy_share", layer=1, k=2),
    "Trajectory.features": call_of_method(make_run, "features", layer=2, X=make_matrix, step=3),
    "Trajectory.intruder_directions": call_of_method(
        make_run, "intruder_directions", layer=1, threshold=0.5, side="left", step=3
    ),
    "Trajectory.layer_alignment": call_of_method(make_run, "layer_alignment", lower=1, upper=2, k=2),
    "Trajectory.noise_edge": call_of_method(make_run, "noise_edge", layer=1, entry_variance=0.1, level=0.1),
    "Trajectory.noise_variance": call_of_method(make_run, "noise_variance", layer=1),
    "Trajectory.rank_above_noise": call_of_method(
        make_run, "rank_above_noise", layer=1, entry_variance=0.1, level=0.1
    ),
    "Trajectory.layer": call_of_method(make_run, "layer", layer=1, step=3),
    "Trajectory.multiplicity": call_of_method(make_run, "multiplicity", layer=1),
    "Trajectory.neural_tangent_kernel": call_of_method(make_run, "neural_tangent_kernel", step=3),
    "Trajectory.ranks": call_of_method(make_run, "ranks", threshold=0.01, step=3, relative_to="all"),
    "Trajectory.rho": call_of_method(make_run, "rho", layer=1, family=0),
    "Trajectory.save": call_of_method(make_run, "save", path="nowhere/run.npz", weights=True),
    "Trajectory.singular_value_errors": call_of_method(make_run, "singular_value_errors", layer=1),
    "Trajectory.singular_values": call_of_method(make_run, "singular_values", layer=1),
    "Trajectory.singular_vectors": call_of_method(make_run, "singular_vectors", layer=1, side="left", step=3),
    "Trajectory.subspace_cosines": call_of_method(
        make_run, "subspace_cosines", layer=1, rank=2, side="left", step=3
    ),
    "Trajectory.to_dataframe": call_of_method(
        make_run, "to_dataframe", variables=["loss"], form="long", library="pandas"
    ),
    "Trajectory.to_xarray": call_of_method(make_run, "to_xarray", variables=["loss"]),
    "Trajectory.tracking": call_of_method(make_tracked_run, "tracking", layer=1),
    "Trajectory.weights": call_of_method(lambda: make_run("dense"), "weights", layer=1, step=0),
    "aligned": call_of_function(
        dln.aligned, problem=make_problem, widths=[DIM] * 3, scale=0.5, seed=0, dtype=np.float64
    ),
    "classification": call_of_function(
        dln.classification, n_classes=3, samples_per_class=2, dim=6, seed=0, reduction="mean"
    ),
    "closure": call_of_function(dln.closure, problem=make_problem, weights=make_weights, largest_share=0.9),
    "compress": call_of_function(dln.compress, weights=make_weights, rank=2, tol=None, balanced=True),
    "compressed_weights": call_of_function(
        dln.compressed_weights,
        problem=make_completion,
        weights=make_weights,
        rank=2,
        basis="gradient",
        depth=3,
        scale=1e-3,
    ),
    "export": call_of_function(
        dln.export, source=make_run, path="nowhere/run.zarr", every=2, variables=["loss"], overwrite=False
    ),
    "gaussian": call_of_function(dln.gaussian, widths=[3, 4, 2], scale=0.5, seed=0, dtype=np.float32),
    "flow": call_of_function(
        with_record_fields(dln.flow),
        problem=make_problem,
        weights=make_weights,
        times=[0.0, 1.0, 2.0],
        rtol=1e-8,
        atol=1e-9,
        weight_decay=0.01,
        engine="auto",
        singular_values=2,
        vectors=False,
        weights_every=None,
        max_steps=500,
        n_threads=1,
    ),
    "gradients": call_of_function(dln.gradients, problem=make_problem, weights=make_weights, n_threads=1),
    "load": call_of_function(dln.load, path="nowhere", every=2),
    "load_cifar10": call_of_function(dln.load_cifar10, path="nowhere", split="train", per_class=2),
    "load_fashion_mnist": call_of_function(
        dln.load_fashion_mnist, path="nowhere", split="train", per_class=2
    ),
    "load_movielens": call_of_function(dln.load_movielens, path="nowhere"),
    "low_rank_completion": call_of_function(
        dln.low_rank_completion, dim=5, rank=2, observed=0.5, seed=0, reduction="mean"
    ),
    "low_rank_recovery": call_of_function(dln.low_rank_recovery, dim=5, rank=2, seed=0, reduction="mean"),
    "low_rank_sensing": call_of_function(
        dln.low_rank_sensing, dim=5, rank=2, n_measurements=9, seed=0, reduction="sum"
    ),
    "measures.balancedness": call_of_function(dln.measures.balancedness, weights=make_weights),
    "measures.feature_compression": lambda: (dln.measures.feature_compression, make_labelled_features()),
    "measures.feature_discrimination": lambda: (
        dln.measures.feature_discrimination,
        make_labelled_features(),
    ),
    "measures.effective_rank": call_of_function(dln.measures.effective_rank, matrix=make_matrix),
    "measures.energy_share": call_of_function(dln.measures.energy_share, matrix=make_matrix, k=2),
    "measures.image_angles": call_of_function(
        dln.measures.image_angles, W=make_matrix, start=make_matrix, vectors=make_orthonormal
    ),
    "measures.intruder_directions": call_of_function(
        dln.measures.intruder_directions, vectors=make_orthonormal, base=make_orthonormal, threshold=0.3
    ),
    "measures.layer_alignment": call_of_function(dln.measures.layer_alignment, weights=make_weights, k=2),
    "measures.noise_bulk": call_of_function(dln.measures.noise_bulk, shape=(DIM, 9), entry_variance=0.5),
    "measures.noise_edge": call_of_function(
        dln.measures.noise_edge, shape=(DIM, 9), entry_variance=0.5, level=0.1
    ),
    "measures.noise_variance": call_of_function(
        dln.measures.noise_variance, matrix=make_matrix, shape=(DIM, DIM), norm=40.0, method="energy"
    ),
    "measures.rank_above_noise": call_of_function(
        dln.measures.rank_above_noise, matrix=make_matrix, shape=(DIM, DIM), norm=40.0, level=0.1
    ),
    "measures.rank_above_noise, of a known variance": call_of_function(
        dln.measures.rank_above_noise, matrix=[3.0, 1.0], entry_variance=0.1, shape=(DIM, DIM)
    ),
    "measures.spike_position": call_of_function(
        dln.measures.spike_position, planted=[2.0, 9.0], shape=(DIM, 9), entry_variance=0.5
    ),
    "measures.spike_strength": call_of_function(
        dln.measures.spike_strength, observed=[2.0, 9.0], shape=(DIM, 9), entry_variance=0.5
    ),
    "measures.spike_threshold": call_of_function(
        dln.measures.spike_threshold, shape=(DIM, 9), entry_variance=0.5, level=0.1
    ),
    "measures.mode_strengths": call_of_function(
        dln.measures.mode_strengths, problem=make_problem, W=make_matrix
    ),
    "measures.numerical_rank": call_of_function(
        dln.measures.numerical_rank,
        matrix=make_matrix,
        kind="nuclear",
        mass=0.9,
        threshold=0.1,
        shape=(DIM, DIM),
    ),
    "measures.schatten_norm": call_of_function(dln.measures.schatten_norm, matrix=make_matrix, p=1.5),
    "measures.sharpness": call_of_function(
        dln.measures.sharpness, problem=make_problem, weights=make_weights, tolerance=1e-3
    ),
    "measures.stable_rank": call_of_function(dln.measures.stable_rank, matrix=make_matrix),
    "measures.subspace_angles": call_of_function(
        dln.measures.subspace_angles, U=make_orthonormal, V=make_orthonormal
    ),
    "measures.subspace_cosine": call_of_function(
        dln.measures.subspace_cosine, U=make_orthonormal, V=make_orthonormal
    ),
    "measures.vector_angles": call_of_function(
        dln.measures.vector_angles, vectors=make_orthonormal, reference=make_orthonormal, rank=1
    ),
    "one_hot": call_of_function(dln.one_hot, labels=[0, 1, 2, 1], classes=[0, 1, 2]),
    "orthogonal": call_of_function(
        dln.orthogonal, widths=[3, 4, 2], scale=0.5, seed=0, implicit=False, dtype=np.float32
    ),
    "plots.linear_fit": call_of_function(dln.plots.linear_fit, layers=[1, 2, 3], values=[1.0, 2.0, 3.5]),
    "plots.log_linear_fit": call_of_function(
        dln.plots.log_linear_fit, layers=[1, 2, 3], values=[1.0, 0.5, 0.2]
    ),
    "resume": call_of_function(dln.resume, directory="nowhere", progress=False, callback=None),
    "sweep": lambda: (
        dln.sweep,
        # Without an executor it starts processes: see test_sweep.py.
        {
            "grid": make_specification(),
            "executor": InlineExecutor(),
            "chunk_seconds": 1.0,
            "n_workers": 1,
            "retry_failed": False,
        },
    ),
    "theory.NeuralTangentKernel.alignment": call_of_method(make_kernel, "alignment", other=make_kernel),
    "theory.NeuralTangentKernel.apply": call_of_method(make_kernel, "apply", direction=make_matrix),
    "theory.NeuralTangentKernel.at": call_of_method(make_kernel, "at", x=make_matrix, y=make_matrix),
    "theory.NeuralTangentKernel.inner": call_of_method(make_kernel, "inner", other=make_kernel),
    "theory.aligned_modes": call_of_function(
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
    "theory.balanced_flow": call_of_function(
        dln.theory.balanced_flow,
        problem=make_square_problem,
        weights=make_balanced_weights,
        times=[0.0, 1.0, 2.0],
    ),
    "theory.compression_law": call_of_function(
        dln.theory.compression_law,
        layer=[1, 2],
        scale=0.1,
        n_layers=3,
        n_classes=3,
        samples_per_class=4,
        output_multiplier=1.0,
    ),
    "theory.default_learning_rate": call_of_function(
        dln.theory.default_learning_rate, problem=make_problem, n_layers=3, scale=0.5
    ),
    "theory.discrimination_law": call_of_function(
        dln.theory.discrimination_law, layer=[1, 2], least_squares=make_matrix, n_layers=3
    ),
    "theory.escape_time": call_of_function(
        dln.theory.escape_time, sigma=1.0, initial=0.01, fraction=[0.5, 0.9], n_layers=3, loss_scale=1.0
    ),
    "theory.first_order_split": call_of_function(
        dln.theory.first_order_split, problem=make_problem, weights=make_weights, layer=1
    ),
    "theory.mode_strength": call_of_function(
        dln.theory.mode_strength, time=[0.0, 1.0], sigma=1.0, initial=0.01, n_layers=3, loss_scale=1.0
    ),
    "theory.neural_tangent_kernel": call_of_function(dln.theory.neural_tangent_kernel, weights=make_weights),
    "theory.plateau_bounds": call_of_function(
        dln.theory.plateau_bounds, sigma=1.0, scale=0.1, n_layers=3, **RATES
    ),
    "theory.rho_flow": call_of_function(dln.theory.rho_flow, time=[0.0, 1.0], scale=0.5, n_layers=3, **RATES),
    "theory.stability_threshold": call_of_function(
        dln.theory.stability_threshold, sigma=1.0, n_layers=3, loss_scale=1.0
    ),
    "train": call_of_function(
        with_record_fields(dln.train),
        problem=make_problem,
        weights=make_weights,
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
        **descent_options(),
    ),
    "train, dense": call_of_function(
        with_record_fields(dln.train),
        problem=make_problem,
        weights=make_weights,
        engine="dense",
        every=2,
        singular_values=2,
        vectors=True,
        tracking="dense",
        weights_every=2,
        tolerance=1e-9,
        **descent_options(),
    ),
    "train, observed": call_of_function(
        with_record_fields(dln.train),
        problem=make_completion,
        weights=make_weights,
        singular_values=None,
        **descent_options(),
    ),
    "train_batch": lambda: (
        with_record_fields(dln.train_batch),
        {
            "problems": [make_problem()] * 2,
            "weights": [make_weights(), make_weights()],
            "every": 2,
            "singular_values": "all",
            "tolerance": 1e-9,
            "n_threads": 1,
            **descent_options(learning_rate=[0.1, 0.2]),
        },
    ),
    "train_compressed": call_of_function(
        with_record_fields(dln.train_compressed),
        problem=make_completion,
        weights=make_weights,
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
    "uniform": call_of_function(dln.uniform, widths=[3, 4, 2], scale=0.5, seed=0, dtype=np.float32),
}


def make_sparse():
    return import_sparse().csr_array(np.where(make_matrix() > 0, make_matrix(), 0.0))
