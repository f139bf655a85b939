# SPDX-License-Identifier: MIT
"""Problems as named arrays and JSON values in files: pack, check and unpack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._problem.kinds import AnyProblem
from .._problem.low_rank import LowRank
from .._problem.observations import Completion, Observations, Sensing
from .._problem.problem import Problem
from .._problem.samples import SampleProblem
from .._support.arrays import FloatArray, check_scale
from .._support.errors import ShapeError
from .._support.file_checks import check_array
from .._support.files import Arrays


def _pack_target(target: LowRank | FloatArray, arrays: Arrays) -> None:
    if isinstance(target, LowRank):
        arrays["target_U"], arrays["target_s"], arrays["target_V"] = target.U, target.s, target.V
    else:
        arrays["target"] = target


def _unpack_target(arrays: Arrays) -> Any:
    if "target_U" in arrays:
        return LowRank(arrays["target_U"], arrays["target_s"], arrays["target_V"])
    return arrays.get("target")


def _pack_observations(problem: Observations, arrays: Arrays) -> dict[str, Any]:
    if problem.truth is not None:
        _pack_target(problem.truth, arrays)
    arrays |= problem.to_arrays()
    return {"loss_scale": problem.loss_scale, "kind": type(problem).__name__, "shape": problem.shape}


def _unpack_observations(
    meta: Mapping[str, Any], arrays: Arrays, description: Mapping[str, Any]
) -> Observations:
    kinds: dict[str, type[Completion | Sensing]] = {"Completion": Completion, "Sensing": Sensing}
    problem: Observations = kinds[meta["kind"]].from_arrays(
        arrays, tuple(meta["shape"]), loss_scale=meta["loss_scale"], truth=_unpack_target(arrays)
    )
    problem._restore(description)
    return problem


def pack_problem(problem: AnyProblem | None, arrays: Arrays) -> dict[str, Any] | None:
    """Add the arrays of a problem to the others; return its metadata, in JSON values."""
    if problem is None:
        return None
    if isinstance(problem, Observations):
        return _pack_observations(problem, arrays)
    if isinstance(problem, SampleProblem):
        settings, held = problem.to_arrays()
        arrays |= held
        return {"kind": type(problem).__name__, **settings}
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


def unpack_problem(meta: Mapping[str, Any], arrays: Arrays, description: Mapping[str, Any]) -> AnyProblem:
    """Return the problem that `pack_problem` packed.

    Parameters
    ----------
    meta : mapping
        Metadata, from `pack_problem`.
    arrays : dict of str to ndarray
        Arrays of the file.
    description : mapping
        Result of ``problem.describe()``.
    """
    if meta.get("kind") == "SampleProblem":
        return SampleProblem.from_arrays(meta, arrays)
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


def check_problem_metadata(
    meta: Mapping[str, Any], config: Mapping[str, Any], arrays: Mapping[str, Any]
) -> None:
    """Check the metadata of a problem, before arrays of the sizes it names are made.

    Raises
    ------
    ValueError
        If they do not fit the layers.
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
