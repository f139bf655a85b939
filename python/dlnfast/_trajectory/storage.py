# SPDX-License-Identifier: MIT
"""Problems, states and weights as named arrays and values that JSON knows, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy.typing as npt

from .._closure.certificate import Family
from .._closure.operators import ExplicitLayers, Layers
from .._closure.sampled import resample
from .._problem.low_rank import LowRank
from .._problem.observations import Completion, Observations, Sensing
from .._problem.problem import Problem
from .._support.arrays import FloatArray
from .._support.files import Arrays
from .._weights.implicit import ImplicitWeights
from .states import DenseStates, LayerTracking, ReducedStates


def record_arrays(states: ReducedStates | DenseStates) -> Arrays:
    """Return what grows while a run goes on, under the names that it has in files."""
    arrays: Arrays = {}
    if isinstance(states, ReducedStates):
        arrays["rho"] = states.rho
        _pack_list("core", states.cores, arrays)
        return arrays
    pack_dense(replace(states, initial=None, final=None), arrays, True)
    return arrays


def _pack_list(
    name: str, items: Sequence[FloatArray | None] | None, arrays: dict[str, npt.NDArray[Any]]
) -> list[bool] | None:
    """Put the items beside the others, and return which of them are there."""
    if items is None:
        return None
    for i, item in enumerate(items):
        if item is not None:
            arrays[f"{name}_{i}"] = item
    return [item is not None for item in items]


def _unpack_list(name: str, present: list[bool] | None, arrays: dict[str, npt.NDArray[Any]]) -> Any:
    if present is None:
        return None
    return tuple(arrays[f"{name}_{i}"] if there else None for i, there in enumerate(present))


def pack_reduced(states: ReducedStates, arrays: dict[str, npt.NDArray[Any]], weights: bool) -> dict[str, Any]:
    arrays["rho"] = states.rho
    arrays["core_target"] = states.target
    if states.input_gram is not None:
        arrays["core_gram"] = states.input_gram
    held = states.layers.weights if isinstance(states.layers, ExplicitLayers) and weights else None
    law = states.layers.describe() if isinstance(states.layers, ImplicitWeights) else None
    return {
        "engine": "reduced",
        "law": law,
        "bases": _pack_list("basis", None if law else states.bases, arrays),
        "cores": _pack_list("core", states.cores, arrays),
        "initial": _pack_list("initial", held, arrays),
        "families": [asdict(family) for family in states.families],
        "n_values": states.n_values,
        "loss_scale": states.loss_scale,
    }


def unpack_reduced(meta: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> ReducedStates:
    initial = _unpack_list("initial", meta["initial"], arrays)
    layers: Layers | None = None if initial is None else ExplicitLayers(initial)
    bases = _unpack_list("basis", meta["bases"], arrays)
    if meta["law"] is not None:
        layers, bases = resample(meta["law"], arrays["target_U"], arrays["target_V"])
    return ReducedStates(
        bases=bases,
        cores=_unpack_list("core", meta["cores"], arrays),
        families=tuple(Family(**{**f, "rho": tuple(f["rho"])}) for f in meta["families"]),
        rho=arrays["rho"],
        target=arrays["core_target"],
        input_gram=arrays.get("core_gram"),
        layers=layers,
        n_values=meta["n_values"],
        loss_scale=meta["loss_scale"],
    )


_DENSE_LISTS = ("values", "left", "right")
_TRACKING_ARRAYS = ("errors", "signs", "branches", "clusters", "columns")
_TRACKED_ANGLES = ("angles", "block_angles")


def pack_dense(states: DenseStates, arrays: dict[str, npt.NDArray[Any]], weights: bool) -> dict[str, Any]:
    arrays["snapshot_steps"] = states.snapshot_steps if weights else states.snapshot_steps[:0]
    meta: dict[str, Any] = {"engine": "dense"}
    for name in _DENSE_LISTS:
        meta[name] = _pack_list(name, getattr(states, name), arrays)
    meta["tracking"] = len(states.tracking)
    for i, layer in enumerate(states.tracking):
        for name in (*_TRACKING_ARRAYS, *_TRACKED_ANGLES):
            array = getattr(layer, name)
            if array is not None:
                arrays[f"tracking_{name}_{i}"] = array
    meta["snapshots"] = _pack_list("snapshots", states.snapshots if weights else (), arrays)
    meta["initial"] = _pack_list("initial", states.initial if weights else None, arrays)
    meta["final"] = _pack_list("final", states.final if weights else None, arrays)
    return meta


def unpack_dense(meta: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> DenseStates:
    lists = {
        name: _unpack_list(name, meta[name], arrays)
        for name in (*_DENSE_LISTS, "snapshots", "initial", "final")
    }
    tracking = tuple(
        LayerTracking(
            *(arrays[f"tracking_{name}_{i}"] for name in _TRACKING_ARRAYS),
            *(arrays.get(f"tracking_{name}_{i}") for name in _TRACKED_ANGLES),
        )
        for i in range(meta.get("tracking", 0))
    )
    return DenseStates(snapshot_steps=arrays["snapshot_steps"], tracking=tracking, **lists)


def _pack_target(target: LowRank | FloatArray, arrays: dict[str, npt.NDArray[Any]]) -> None:
    if isinstance(target, LowRank):
        arrays["target_U"], arrays["target_s"], arrays["target_V"] = target.U, target.s, target.V
    else:
        arrays["target"] = target


def _unpack_target(arrays: dict[str, npt.NDArray[Any]]) -> Any:
    if "target_U" in arrays:
        return LowRank(arrays["target_U"], arrays["target_s"], arrays["target_V"])
    return arrays.get("target")


def _pack_observations(problem: Observations, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    if problem.truth is not None:
        _pack_target(problem.truth, arrays)
    arrays |= problem.to_arrays()
    return {"loss_scale": problem.loss_scale, "kind": type(problem).__name__, "shape": problem.shape}


def _unpack_observations(
    meta: dict[str, Any], arrays: dict[str, npt.NDArray[Any]], description: Mapping[str, Any]
) -> Observations:
    kinds: dict[str, type[Completion | Sensing]] = {"Completion": Completion, "Sensing": Sensing}
    problem: Observations = kinds[meta["kind"]].from_arrays(
        arrays, tuple(meta["shape"]), loss_scale=meta["loss_scale"], truth=_unpack_target(arrays)
    )
    problem._restore(description)
    return problem


def pack_problem(
    problem: Problem | Observations | None, arrays: dict[str, npt.NDArray[Any]]
) -> dict[str, Any] | None:
    """Put what the problem holds beside the other arrays, and return what else defines it."""
    if problem is None:
        return None
    if isinstance(problem, Observations):
        return _pack_observations(problem, arrays)
    _pack_target(problem.target, arrays)
    if problem.input_gram is not None:
        arrays["input_gram"] = problem.input_gram
    if problem.whitening is not None and problem.whitening.matrix is not None:
        arrays["whitening"] = problem.whitening.matrix
    if problem.input_mean is not None:
        arrays["input_mean"] = problem.input_mean
    if problem.classes is not None:
        arrays["classes"] = problem.classes
    return {
        "loss_scale": problem.loss_scale,
        "output_norm_squared": problem.output_norm_squared,
        "loss_floor": problem.loss_floor,
    }


def unpack_problem(
    meta: dict[str, Any], arrays: dict[str, npt.NDArray[Any]], description: Mapping[str, Any]
) -> Problem | Observations:
    if "kind" in meta:
        return _unpack_observations(meta, arrays, description)
    problem = Problem(
        _unpack_target(arrays),
        arrays.get("input_gram"),
        meta["loss_scale"],
        output_norm_squared=meta["output_norm_squared"],
    )
    problem._restore(description, meta.get("loss_floor"), arrays)
    return problem
