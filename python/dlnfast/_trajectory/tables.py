# SPDX-License-Identifier: MIT
"""The records of a run as tables of pandas or polars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._support.arrays import check_choice
from .._support.optional import import_optional
from .dataset import list_variables, read_coordinate, select_variables
from .states import Run
from .variables import LOSS_STEP, OF_LAYERS, OF_VALUES, RATE_STEP, STEP, Array, Variable

_VALUES, _BOUNDS = "singular_values", "singular_value_errors"


def to_dataframe(run: Run, variables: Sequence[str] | None, form: str, library: str) -> Any:
    """Return the records of a run as a table: see `Trajectory.to_dataframe`."""
    check_choice(form, "form", ("long", "wide"))
    check_choice(library, "library", ("pandas", "polars"))
    package = import_optional(library, "to_dataframe")
    offered = select_variables(run, variables)
    columns = _list_rows(run, offered, variables) if form == "long" else _list_columns(run, offered)
    return package.DataFrame(columns)


def _list_rows(run: Run, offered: dict[str, Variable], wanted: Sequence[str] | None) -> dict[str, Array]:
    """Return the columns of a table with one row for every number."""
    chosen = {name: variable for name, variable in offered.items() if _has_rows(variable)}
    unfit = sorted(set(offered) - set(chosen)) if wanted is not None else []
    if unfit:
        raise ValueError(f"variables has {unfit[0]!r}, which has more than one number per singular value")
    if wanted is None:
        chosen.pop(_BOUNDS, None)  # a column of its own
    names = np.array(["", *run.layer_names])
    parts: list[dict[str, Array]] = []
    for name, variable in chosen.items():
        values = np.asarray(variable.read())
        indices = np.indices(values.shape)
        is_of_layers = len(variable.dims) > 1
        layer = indices[1] + 1 if is_of_layers else np.zeros_like(indices[0])
        part = {
            "step": read_coordinate(run, variable.dims[0])[indices[0]],
            "layer": layer,
            "layer_name": names[layer],
            "index": indices[2] if len(variable.dims) > 2 else np.zeros_like(layer),
            "quantity": np.full(values.shape, name),
            "value": values.astype(np.float64),
            "bound": _read_bounds(run, name, values.shape),
        }
        # NaN, and -1 for integers, is the padding of layers with fewer values.
        is_there = ~np.isnan(values) if values.dtype.kind == "f" else values != -1
        parts.append({column: array[is_there] for column, array in part.items()})
    if not parts:
        raise ValueError("the run has no numbers for a table: neither losses nor singular values")
    return {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}


def _has_rows(variable: Variable) -> bool:
    """Return whether a variable has one number per step, per layer, or per index in a layer."""
    dims = variable.dims
    return len(dims) == 1 or (dims[:2] == OF_LAYERS and len(dims) <= 3)


def _read_bounds(run: Run, name: str, shape: tuple[int, ...]) -> Array:
    """Return bounds on the errors of a variable, NaN where there are none."""
    bounds = list_variables(run).get(_BOUNDS) if name == _VALUES else None
    return np.full(shape, np.nan) if bounds is None else np.asarray(bounds.read(), dtype=np.float64)


def _list_columns(run: Run, offered: dict[str, Variable]) -> dict[str, Array]:
    """Return the columns of a table with one row for every singular value of every layer and record."""
    held = {name: v.read() for name, v in offered.items() if v.dims in (OF_LAYERS, OF_VALUES)}
    # Layers with fewer values than others have fewer rows.
    counts = [1] * run.n_layers
    if any(offered[name].dims == OF_VALUES for name in held):
        counts = [run.states.singular_values(index, run).shape[1] for index in range(run.n_layers)]
    layers = np.repeat(np.arange(run.n_layers), counts)
    indices = np.concatenate([np.arange(count) for count in counts])
    n, rows = len(run.steps), len(layers)

    def repeat_over_rows(per_record: Array) -> Array:
        return np.repeat(per_record, rows)

    columns: dict[str, Array] = {
        STEP: repeat_over_rows(run.steps),
        "layer": np.tile(layers + 1, n),
        "layer_name": np.tile(np.array(run.layer_names)[layers], n),
    }
    if any(offered[name].dims == OF_VALUES for name in held):
        columns["index"] = np.tile(indices, n)
    for dim, name in ((LOSS_STEP, "loss"), (RATE_STEP, "rates"), (LOSS_STEP, "times")):
        if name in offered:
            columns[name] = repeat_over_rows(
                _select_steps(run.steps, read_coordinate(run, dim), offered[name].read())
            )
    for name, values in held.items():
        at = (slice(None), layers, indices) if offered[name].dims == OF_VALUES else (slice(None), layers)
        columns[name] = values[at].reshape(-1)
    return columns


def _select_steps(steps: Array, known: Array, values: Array) -> Array:
    """Return the values of these steps, NaN where there is none; `known` is ascending."""
    result = np.full(len(steps), np.nan)
    positions = np.searchsorted(known, steps)
    is_known = positions < len(known)
    is_known[is_known] = known[positions[is_known]] == steps[is_known]
    result[is_known] = values[positions[is_known]]
    return result
