# SPDX-License-Identifier: MIT
"""Calls of the core's descent functions with small valid arguments, some of which a test replaces."""

from __future__ import annotations

import numpy as np

from dlnfast._support.dispatch import core as core_of_package

F64 = np.float64


def freeze(array):
    array.flags.writeable = False
    return array


def common_arguments(*, dtype=F64, steps=3, n_layers=2):
    return {
        "target": np.ones((2, 2), dtype),
        "input_gram": None,
        "input_factor": None,
        "factor_target": None,
        "loss_scale": 0.1,
        "loss_floor": 0.0,
        "observed": None,
        "measurements": None,
        "learning_rate": [0.1] * n_layers,
        "weight_decay": [0.0] * n_layers,
        "momentum": [0.0] * n_layers,
        "steps": steps,
        "record_every": 1,
        "tolerance": -1.0,
        "n_threads": 1,
        "loss": np.zeros(steps + 1),
        "record_steps": np.zeros(steps + 1, np.int64),
        "counts": np.zeros(5, np.int64),
        "first": 0,
        "flush_every": 0,
        "on_flush": None,
        "velocity": [],
        "compensation": [],
        "power_vectors": [],
        "learning_rate_table": None,
        "weight_decay_table": None,
        "momentum_table": None,
        "optimizer": None,
        "left_factors": [],
        "right_factors": [],
        "on_record": None,
        "on_progress": None,
        "safety": 0.0,
        "curvature": [],
        "error_scale": 1.0,
        "rate": np.zeros(0),
    }


N_COLUMNS = len(core_of_package.TRACKING_COLUMNS)
TRACKER_DEFAULTS = core_of_package.TRACKER_DEFAULTS


def dense_arguments(*, dtype=F64, steps=3):
    layers = range(2)
    return common_arguments(dtype=dtype, steps=steps) | {
        "snapshot_every": 1,
        "values": [np.zeros((steps + 1, 2), dtype) for _ in layers],
        "errors": [np.zeros((steps + 1, 2)) for _ in layers],
        "signs": [np.zeros((steps + 1, 2)) for _ in layers],
        "branches": [np.zeros((steps + 1, 2), np.int64) for _ in layers],
        "clusters": [np.zeros((steps + 1, 2), np.int64) for _ in layers],
        "tracking": [np.zeros((steps + 1, N_COLUMNS)) for _ in layers],
        "tracker": TRACKER_DEFAULTS | {"n_values": 1},
        "factored": True,
        "velocity_norms": [],
        "initial": [np.ones((2, 2), dtype) for _ in layers],
        "left": [np.zeros((steps + 1, 2, 2), dtype) for _ in layers],
        "right": [np.zeros((steps + 1, 2, 2), dtype) for _ in layers],
        "snapshots": [np.zeros((steps + 1, 2, 2), dtype) for _ in layers],
    }


def family(first=0, multiplicity=3.0, coupling=1.0, rho=(0.5, 0.5)):
    return {"first": first, "multiplicity": multiplicity, "coupling": coupling, "rho": rho}


def reduced_arguments(*, dtype=F64, steps=3):
    return common_arguments(dtype=dtype, steps=steps) | {
        "families": [family()],
        "scalars": None,
        "core_records": [np.zeros((steps + 1, 2, 2), dtype) for _ in range(2)],
        "rho_records": np.zeros((steps + 1, 2)),
    }


def identity_layers(dtype=F64):
    return [np.eye(2, dtype=dtype), np.eye(2, dtype=dtype)]


ARGUMENTS = {"dense_descent": dense_arguments, "reduced_descent": reduced_arguments}


ENTRIES = list(ARGUMENTS)


def call_descent(core, entry, weights=None, **changes):
    arguments = {**ARGUMENTS[entry](), **changes}
    return getattr(core, entry)(identity_layers() if weights is None else weights, arguments)


def call_batch_descent(core, cores=None, **changes):
    n, steps = 3, 4
    arguments = {
        "target": np.tile(np.eye(2), (n, 1, 1)),
        "input_gram": None,
        "input_factor": None,
        "factor_target": None,
        "families": [{"first": 0, "length": 2}],
        "rho": np.full((n, 2), 0.5),
        "multiplicity": np.full((n, 1), 3.0),
        "coupling": np.ones((n, 1)),
        "learning_rate": np.full((n, 2), 0.1),
        "weight_decay": np.zeros((n, 2)),
        "momentum": np.zeros((n, 2)),
        "loss_scale": np.ones((n, 1)),
        "loss_floor": np.zeros((n, 1)),
        "steps": steps,
        "record_every": 2,
        "tolerance": -1.0,
        "n_threads": 1,
        "loss": np.zeros((n, steps + 1)),
        "core_records": [np.zeros((n, 3, 2, 2)) for _ in range(2)],
        "rho_records": np.zeros((n, 3, 2)),
        "counts": np.zeros((n, 2), np.int64),
    }
    core_stacks = [np.tile(0.5 * np.eye(2), (n, 1, 1)) for _ in range(2)] if cores is None else cores
    return core.batch_descent(core_stacks, {**arguments, **changes})
