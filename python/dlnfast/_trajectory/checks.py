# SPDX-License-Identifier: MIT
"""Checks that the arrays of a stored run fit each other: shapes, types, order and finite values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._support.arrays import check_count, check_scale
from .._support.errors import ShapeError
from .._support.stored import check_array, translate_part_errors

if TYPE_CHECKING:
    from .states import DenseStates, LayerTracking, ReducedStates
    from .trajectory import Trajectory


def _check_steps(steps: Any, name: str, last: int | None = None) -> None:
    check_array(steps, name, (None,), "i")
    if len(steps) and steps[0] < 0:
        raise ValueError(f"{name} begins with {steps[0]}; wanted steps from 0")
    if np.any(steps[1:] <= steps[:-1]):
        raise ValueError(f"{name} does not increase")
    if last is not None and len(steps) and steps[-1] > last:
        raise ValueError(f"{name} ends with {steps[-1]}, but the losses with step {last}")


def check_run(run: Trajectory) -> None:
    """Raise unless the parts of a run fit each other.

    Raises
    ------
    ValueError
        The message names the array, what it is and what was wanted.
    """
    with translate_part_errors("it"):
        shapes = _check_config(run)
        _check_series(run)
        states: Any = run.states
        if hasattr(states, "cores"):
            _check_reduced(states, run, shapes)
        else:
            _check_dense(states, run, shapes)
        problem = run.problem
        if problem is not None and (problem.dim_out, problem.dim_in) != (shapes[-1][0], shapes[0][1]):
            raise ShapeError(
                f"the problem maps {problem.dim_in} to {problem.dim_out} dimensions, the layers "
                f"{shapes[0][1]} to {shapes[-1][0]}"
            )


def _check_config(run: Trajectory) -> list[tuple[int, int]]:
    config = run.config
    if "shapes" in config:
        sizes = [size for shape in config["shapes"] for size in shape]
        if len(config.get("layers", config["shapes"])) != len(config["shapes"]):
            raise ValueError("config.layers has another length than config.shapes")
    else:
        sizes = config["widths"]
        if len(sizes) < 2:
            raise ValueError(f"config.widths is {sizes}; wanted d_0 .. d_L")
    for size in sizes:
        check_count(size, "config.widths" if "widths" in config else "config.shapes")
    check_scale(run.wall_time, "wall_time")
    for name in ("engine", "reason"):
        if not isinstance(getattr(run.certificate, name), str):
            raise ValueError(f"certificate.{name} is {getattr(run.certificate, name)!r}; wanted text")
    return run.shapes


def _check_series(run: Trajectory) -> None:
    """Check what grows by the step. Losses of a model that another program trained may be anything."""
    check_array(run.loss, "loss", (None,), finite=not run.is_tracked, dtype=np.float64)
    check_array(run.loss_steps, "loss_steps", (len(run.loss),), "i")
    if run.is_tracked:
        _check_steps(run.loss_steps, "loss_steps")
        _check_steps(run.steps, "steps")
    else:
        _check_steps(run.steps, "steps", len(run.loss) - 1)
    if run.rates is not None:
        check_array(run.rates, "rates", (None,), dtype=np.float64)
        if len(run.rates) > len(run.loss):
            raise ShapeError(f"rates has shape {run.rates.shape}; wanted at most {len(run.loss)}")


def _check_reduced(states: ReducedStates, run: Trajectory, shapes: list[tuple[int, int]]) -> None:
    n_records, n_layers, widths = len(run.steps), len(shapes), run.widths
    precision = np.dtype(run.config["dtype"])
    if len(states.bases) != n_layers + 1 or len(states.cores) != n_layers:
        raise ShapeError(
            f"the run has {len(states.bases)} bases and {len(states.cores)} cores; wanted {n_layers + 1} and "
            f"{n_layers} for {n_layers} layers"
        )
    dims = []
    if isinstance(states.bases, tuple):
        for i, width in enumerate(widths):
            check_array(states.bases[i], f"basis_{i}", (width, None))
            dims.append(states.bases[i].shape[1])
    else:  # bases of lazily sampled weights are made when they are asked for
        dims = [states.cores[0].shape[2], *(core.shape[1] for core in states.cores)]
    for i, core in enumerate(states.cores):
        check_array(core, f"core_{i}", (n_records, dims[i + 1], dims[i]), dtype=precision)
    for i, (dim, width) in enumerate(zip(dims, widths, strict=True)):
        if dim > width:
            raise ShapeError(f"basis_{i} has {dim} columns; wanted at most {width}")
    check_array(states.target, "core_target", (dims[-1], dims[0]))
    if states.input_gram is not None:
        check_array(states.input_gram, "core_gram", (dims[0], dims[0]))
    _check_families(states, dims, widths)
    check_array(states.rho, "rho", (n_records, sum(len(f.rho) for f in states.families)), dtype=np.float64)
    if states.n_values is not None:
        check_count(states.n_values, "n_values", minimum=0)
    check_scale(states.loss_scale, "loss_scale")
    held = getattr(states.layers, "weights", None)
    if held is not None:
        _check_matrices(held, "initial", shapes)


def _check_families(states: ReducedStates, dims: Sequence[int], widths: Sequence[int]) -> None:
    n_layers = len(widths) - 1
    taken = [0] * n_layers
    for i, family in enumerate(states.families):
        name = f"families[{i}]"
        last = check_count(family.last, f"{name}.last", maximum=n_layers)
        first = check_count(family.first, f"{name}.first", maximum=last)
        check_count(family.multiplicity, f"{name}.multiplicity", maximum=max(widths))
        check_scale(family.coupling, f"{name}.coupling")
        for value in family.rho:
            check_scale(value, f"{name}.rho", minimum=-np.inf)
        if len(family.rho) != last - first + 1:
            raise ShapeError(f"{name}.rho has {len(family.rho)} values; wanted {last - first + 1}")
        for layer in range(first - 1, last):
            taken[layer] += family.multiplicity
    outside = [width - dim for width, dim in zip(widths, dims, strict=True)]
    for layer, (count, room) in enumerate(zip(taken, itertools.pairwise(outside), strict=True)):
        if count > min(room):
            raise ValueError(
                f"families: {count} directions run through layer {layer + 1}, which has {min(room)} outside "
                "the active subspaces"
            )


def _check_dense(states: DenseStates, run: Trajectory, shapes: list[tuple[int, int]]) -> None:
    n_records, n_layers = len(run.steps), len(shapes)
    for name in ("values", "left", "right", "snapshots", "tracking"):
        found = getattr(states, name)
        if len(found) not in (0, n_layers):
            raise ShapeError(f"{name} holds {len(found)} layers; wanted {n_layers}, or none")
    counts = []
    for i, (values, shape) in enumerate(zip(states.values, shapes, strict=False)):
        check_array(values, f"values_{i}", (n_records, None))
        counts.append(values.shape[1])
        if counts[i] > min(shape):
            raise ShapeError(f"values_{i} has {counts[i]} columns; wanted at most {min(shape)}")
    for name, side in (("left", 0), ("right", 1)):
        for i, vectors in enumerate(getattr(states, name)):
            check_array(vectors, f"{name}_{i}", (n_records, shapes[i][side], counts[i]))
    _check_steps(states.snapshot_steps, "snapshot_steps", None if run.is_tracked else len(run.loss) - 1)
    for i, snapshots in enumerate(states.snapshots):
        check_array(snapshots, f"snapshots_{i}", (len(states.snapshot_steps), *shapes[i]))
    for name in ("initial", "final"):
        if getattr(states, name) is not None:
            _check_matrices(getattr(states, name), name, shapes)
    for i, layer in enumerate(states.tracking):
        _check_tracking(layer, i, n_records, counts[i])


def _check_tracking(layer: LayerTracking, i: int, n_records: int, k: int) -> None:
    for name in ("errors", "signs", "branches", "clusters"):
        kinds = "i" if name in ("branches", "clusters") else "f"
        check_array(getattr(layer, name), f"tracking_{name}_{i}", (n_records, k), kinds, finite=False)
    if np.any(layer.branches < -1) or np.any(layer.clusters < -1):
        raise ValueError(f"tracking_branches_{i} or tracking_clusters_{i} is below -1")
    if not np.all(layer.errors >= 0):
        raise ValueError(f"tracking_errors_{i} has values that are no bounds")
    if not np.all(np.abs(layer.signs) == 1):
        raise ValueError(f"tracking_signs_{i} has other values than 1 and -1")
    check_array(layer.columns, f"tracking_columns_{i}", (n_records, None), finite=False)
    if layer.angles is not None:
        check_array(layer.angles, f"tracking_angles_{i}", (n_records, 2, k), finite=False)
    if layer.block_angles is not None:
        check_array(layer.block_angles, f"tracking_block_angles_{i}", (n_records, 2), finite=False)


def _check_matrices(matrices: Sequence[Any], name: str, shapes: list[tuple[int, int]]) -> None:
    if len(matrices) != len(shapes):
        raise ShapeError(f"{name} holds {len(matrices)} layers; wanted {len(shapes)}")
    for i, (matrix, shape) in enumerate(zip(matrices, shapes, strict=True)):
        check_array(matrix, f"{name}_{i}", shape)


def check_problem_metadata(
    meta: Mapping[str, Any], config: Mapping[str, Any], arrays: Mapping[str, Any]
) -> None:
    """Check what a problem is made of, before anything as large as it says is made.

    Raises
    ------
    ValueError
        If it does not fit the layers.
    """
    for name in ("output_norm_squared", "loss_floor"):
        if meta.get(name) is not None:
            check_scale(meta[name], f"problem.{name}", minimum=-np.inf)
    if "kind" in meta and list(meta["shape"]) != [config["widths"][-1], config["widths"][0]]:
        raise ShapeError(
            f"problem.shape is {meta['shape']}; wanted [{config['widths'][-1]}, {config['widths'][0]}]"
        )
    matrix, mean = arrays.get("whitening"), arrays.get("input_mean")
    if matrix is not None:
        check_array(matrix, "whitening", (config["widths"][0], None))
    if mean is not None:
        check_array(mean, "input_mean", (config["widths"][0] if matrix is None else matrix.shape[1],))
    if arrays.get("classes") is not None:
        check_array(arrays["classes"], "classes", (config["widths"][-1],), "iubU")
