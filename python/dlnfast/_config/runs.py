# SPDX-License-Identifier: MIT
"""From a checked specification to results: problem and weights, the summary of a run, and JSON files.

`dlnfast train` and `dlnfast.sweep` share it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._problem.low_rank import as_dense
from .._problem.problem import Problem
from .._support.arrays import FloatArray
from .._support.environment import environment
from .._support.files import write_text_whole
from .._trajectory.trajectory import Trajectory
from .._weights.implicit import ImplicitWeights
from . import spec
from .spec import Samples, Spec

__all__ = [
    "Prepared",
    "accuracies",
    "prepare",
    "summarise",
    "to_json_values",
    "write_json",
]


@dataclass(frozen=True)
class Prepared:
    """A specification with its problem and its initial weights.

    Attributes
    ----------
    spec : Spec
    problem : Problem
    samples : dict of str to Samples
        Labelled samples by split; empty where the problem has none.
    weights : list of ndarray, or ImplicitWeights
    seconds : dict of str to float
        Time for "problem" and "weights".
    """

    spec: Spec
    problem: Problem
    samples: dict[str, Samples]
    weights: list[FloatArray] | ImplicitWeights
    seconds: dict[str, float]


def prepare(chosen: Spec) -> Prepared:
    """Make the problem and the weights of a specification.

    Raises
    ------
    OSError, ValueError, TypeError
        As `spec.make_problem` and `spec.make_weights` do.
    """
    start = time.perf_counter()
    problem, samples = spec.make_problem(chosen)
    made = time.perf_counter()
    weights = spec.make_weights(chosen, problem)
    seconds = {"problem": made - start, "weights": time.perf_counter() - made}
    return Prepared(chosen, problem, samples, weights, seconds)


def accuracies(prepared: Prepared, run: Trajectory) -> dict[str, dict[str, float]]:
    """Return the accuracies of the trained network and of least squares, for each split."""
    if not prepared.samples:
        return {}
    problem = prepared.problem
    matrices = {"network": run.end_to_end(), "least squares": as_dense(problem.least_squares)}
    return {split: spec.accuracy(problem, matrices, part) for split, part in prepared.samples.items()}


def summarise(run: Trajectory) -> dict[str, Any]:
    """Return the summary of a run, finished or not."""
    return {
        "engine": run.engine,
        "why": str(run.certificate),
        "config": {key: value for key, value in run.config.items() if key != "problem"},
        "steps": len(run.loss) - 1,
        "first_loss": run.loss[0],
        "final_loss": run.loss[-1],
        "loss_floor": None if run.problem is None else run.problem.loss_floor,
        "training_seconds": run.wall_time,
        "environment": environment(),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; NaN and infinity, which JSON lacks, become null."""
    write_text_whole(path, json.dumps(to_json_values(content), indent=1, allow_nan=False) + "\n")


def to_json_values(value: Any) -> Any:
    """Return a value in JSON-compatible types; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): to_json_values(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return to_json_values(value.tolist())
    if isinstance(value, np.generic):
        return to_json_values(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [to_json_values(item) for item in value]
    return value
