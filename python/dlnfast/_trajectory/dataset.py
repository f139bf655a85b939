# SPDX-License-Identifier: MIT
"""A run as named variables: xarray datasets and pandas frames."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from .._problem.problem import Problem
from .._support.arrays import as_list
from .._support.optional import import_optional
from .._tracking.svd_tracker import COMPLETENESS, TIERS
from .._version import __version__
from .states import COLUMNS, DenseStates, ReducedStates
from .trajectory import Trajectory

if TYPE_CHECKING:
    import pandas
    import xarray


FORMAT_VERSION: Final = 1
Array = npt.NDArray[Any]
#: Dimensions that grow while a run goes on. Each has a coordinate of its own name.
STEP, LOSS_STEP, RATE_STEP, WEIGHT_STEP = ("step", "loss_step", "rate_step", "weight_step")
GROWING: Final = {
    STEP: "steps t of the records",
    LOSS_STEP: "steps t of the loss",
    RATE_STEP: "steps t that the rates were taken for",
    WEIGHT_STEP: "steps t of the weights",
}
_LAYER: Final = (STEP, "layer")
_VALUE: Final = (*_LAYER, "index")
_ACTIVE: Final = (*_LAYER, "active_index")


@dataclass(frozen=True)
class Variable:
    """A variable of an export: its dimensions, what it is, and how its values are found."""

    dims: tuple[str, ...]
    text: str
    read: Callable[[], Array]
    units: str = "1"

    @property
    def attributes(self) -> dict[str, str]:
        return {"long_name": self.text, "units": self.units}


def _beside(arrays: Sequence[Array]) -> Array:
    """Return the arrays of the layers as one, along a new second axis, filled up with NaN or -1."""
    shape = tuple(max(sizes) for sizes in zip(*(a.shape[1:] for a in arrays), strict=True))
    dtype = np.result_type(*arrays)
    filler = np.nan if dtype.kind == "f" else -1
    result = np.full((len(arrays[0]), len(arrays), *shape), filler, dtype=dtype)
    for i, array in enumerate(arrays):
        place: tuple[Any, ...] = (slice(None), i, *(slice(size) for size in array.shape[1:]))
        result[place] = array
    return result


def list_variables(run: Trajectory) -> dict[str, Variable]:
    """Return the variables that a run has, by name."""
    found: dict[str, Variable] = {}
    if len(run.loss) or not run.is_tracked:  # a tracked run may have none: an empty axis would hide all else
        found["loss"] = Variable((LOSS_STEP,), "loss of W(t)", lambda: run.loss)
    if run.rates is not None:
        rates = run.rates
        text = "what the learning rates were multiplied by"
        found["rates"] = Variable((RATE_STEP,), text, lambda: rates)

    def add(
        name: str, dims: tuple[str, ...], text: str, read: Callable[[int], Array], units: str = "1"
    ) -> None:
        def values() -> Array:
            return _beside([read(layer) for layer in range(1, run.n_layers + 1)])

        found[name] = Variable(dims, text, values, units)

    if isinstance(run.states, ReducedStates):
        _add_reduced(run, run.states, add)
    else:
        _add_dense(run, run.states, add)
    return found


def _add_values(run: Trajectory, add: Callable[..., None]) -> None:
    add("singular_values", _VALUE, "singular values of W_l, descending", run.singular_values)


def _add_errors(run: Trajectory, add: Callable[..., None]) -> None:
    add("singular_value_errors", _VALUE, "bounds on the errors of singular_values", run.singular_value_errors)


def _add_reduced(run: Trajectory, states: ReducedStates, add: Callable[..., None]) -> None:
    if states.n_values != 0:
        _add_values(run, add)
        _add_errors(run, add)
    text = "singular values of W_l in the active subspaces, descending"
    add("active_singular_values", _ACTIVE, text, run.active_singular_values)
    for side in ("left", "right") if len(run.steps) else ():
        text = f"angles of the active {side} singular vectors to their limit for t -> 0+"
        add(f"active_{side}_angles", _ACTIVE, text, partial(run.active_angles, side=side), "rad")

    def scalars(layer: int) -> Array:
        result = np.full((len(run.steps), len(states.families)), np.nan)
        for family, column in states.scalars_of(layer).items():
            result[:, family] = states.rho[:, column]
        return result

    if states.families:
        add("rho", (*_LAYER, "family"), "scalar of what W_l does outside the active subspaces", scalars)


def _add_dense(run: Trajectory, states: DenseStates, add: Callable[..., None]) -> None:
    def of_layers(arrays: Sequence[Array]) -> Callable[[int], Array]:
        return lambda layer: arrays[layer - 1]

    if states.values:
        _add_values(run, add)
    tracking = states.tracking if states.values else ()
    if tracking:
        _add_errors(run, add)
        add("branches", _VALUE, "identities of singular_values; -1: none", run.branches)
        add("clusters", _VALUE, "values of one cluster share a number; -1: none", run.clusters)
        add("signs", _VALUE, "-1 where a followed branch is negative", of_layers([t.signs for t in tracking]))
    for name in COLUMNS if tracking else ():
        codes = {"tier": TIERS, "completeness": COMPLETENESS}.get(name, ())
        text = ", ".join([f"the tracker's {name}", *(f"{i}: {code}" for i, code in enumerate(codes))])
        columns = of_layers([t.column(name) for t in tracking])
        add(f"tracking_{name}", _LAYER, text, columns, "s" if name == "seconds" else "1")
    by_rank = bool(states.left) and isinstance(run.problem, Problem)
    by_tracker = run.is_tracked and bool(tracking) and tracking[0].angles is not None
    for side in ("left", "right") if len(run.steps) and (by_rank or by_tracker) else ():
        text = f"angles of the {side} singular vectors to the reference"
        add(f"{side}_angles", _VALUE, text, partial(run.angles, side=side), "rad")
        if by_tracker:
            text = f"largest angle between the span of the {side} singular vectors and the reference's"
            add(f"{side}_block_angles", _LAYER, text, partial(run.block_angles, side=side), "rad")
    for side, unit, vectors in (("left", "row", states.left), ("right", "column", states.right)):
        if vectors:
            add(f"{side}_vectors", (*_LAYER, unit, "index"), f"{side} singular vectors", of_layers(vectors))
    if states.snapshots:
        text = "W_l, the weights"
        add("weights", (WEIGHT_STEP, "layer", "row", "column"), text, of_layers(states.snapshots))


def select_variables(run: Trajectory, names: Sequence[str] | None) -> dict[str, Variable]:
    """Return the variables of these names."""
    offered = list_variables(run)
    if names is None:
        return offered
    if isinstance(names, str):
        raise TypeError(f"variables is {names!r}; wanted a list of names")
    wanted = as_list(names, "variables", "a list of names")
    for name in wanted:
        if not isinstance(name, str) or name not in offered:
            raise ValueError(f"variables has {name!r}; this run has {', '.join(offered)}")
    return {name: offered[name] for name in wanted}


def growing_coordinate(run: Trajectory, dim: str, begin: int = 0) -> Array:
    """Return the coordinate of a dimension that grows, of what comes after `begin` others."""
    if dim == STEP:
        return run.steps
    if dim == WEIGHT_STEP:
        return run.states.snapshot_steps if isinstance(run.states, DenseStates) else np.empty(0, np.int64)
    if dim == LOSS_STEP and run.is_tracked:
        return run.loss_steps
    count = 0 if run.rates is None else len(run.rates)
    return begin + np.arange(len(run.loss) if dim == LOSS_STEP else count, dtype=np.int64)


def coordinate_variable(run: Trajectory, dim: str) -> Variable:
    return Variable((dim,), GROWING[dim], partial(growing_coordinate, run, dim))


def fixed_coordinates(run: Trajectory) -> dict[str, tuple[str, Array]]:
    """Return the coordinates that do not grow, with their dimensions."""
    found: dict[str, tuple[str, Array]] = {
        "layer": ("layer", np.arange(1, run.n_layers + 1)),
        "layer_name": ("layer", np.array(run.layer_names)),
    }
    families = run.states.families if isinstance(run.states, ReducedStates) else ()
    for name in ("first", "last", "multiplicity") if families else ():
        found[f"family_{name}"] = ("family", np.array([getattr(family, name) for family in families]))
    return found


def describe_run(run: Trajectory) -> dict[str, Any]:
    return {
        "title": "dlnfast trajectory",
        "format_version": FORMAT_VERSION,
        "dlnfast_version": __version__,
        "engine": run.engine,
        "certificate": json.dumps(run.certificate.to_dict()),
        "config": json.dumps(run.config),
        "wall_time_seconds": float(run.wall_time),
    }


def to_xarray(run: Trajectory, variables: Sequence[str] | None = None) -> xarray.Dataset:
    """Return a run as an xarray.Dataset: see `Trajectory.to_xarray`."""
    library = import_optional("xarray", "to_xarray", "xarray")
    held = {name: (v.dims, v.read(), v.attributes) for name, v in select_variables(run, variables).items()}
    held = {name: entry for name, entry in held.items() if 0 not in entry[1].shape[1:]}
    used = {dim for dims, *_ in held.values() for dim in dims}
    coordinates: dict[str, Any] = {
        dim: (dim, growing_coordinate(run, dim), coordinate_variable(run, dim).attributes)
        for dim in GROWING
        if dim in used
    }
    coordinates |= {name: entry for name, entry in fixed_coordinates(run).items() if entry[0] in used}
    found: xarray.Dataset = library.Dataset(held, coordinates, describe_run(run))
    return found


def to_dataframe(run: Trajectory) -> pandas.DataFrame:
    """Return the records of a run as a pandas.DataFrame: see `Trajectory.to_dataframe`."""
    library = import_optional("pandas", "to_dataframe")
    offered = list_variables(run)
    held = {name: v.read() for name, v in offered.items() if v.dims in (_LAYER, _VALUE)}
    # Layers with fewer values than others have fewer rows.
    counts = [1] * run.n_layers
    if "singular_values" in held:
        counts = [run.singular_values(layer).shape[1] for layer in range(1, run.n_layers + 1)]
    layers = np.repeat(np.arange(run.n_layers), counts)
    indices = np.concatenate([np.arange(count) for count in counts])
    n, rows = len(run.steps), len(layers)

    def over_rows(per_record: Array) -> Array:
        return np.repeat(per_record, rows)

    columns: dict[str, Array] = {
        "step": over_rows(run.steps),
        "layer": np.tile(layers + 1, n),
        "layer_name": np.tile(np.array(run.layer_names, dtype=object)[layers], n),
    }
    if "singular_values" in held:
        columns["index"] = np.tile(indices, n)
    for dim, name in ((LOSS_STEP, "loss"), (RATE_STEP, "rates")):
        if name in offered:
            columns[name] = over_rows(
                _at_steps(run.steps, growing_coordinate(run, dim), offered[name].read())
            )
    for name, values in held.items():
        at = (slice(None), layers, indices) if offered[name].dims == _VALUE else (slice(None), layers)
        columns[name] = values[at].reshape(-1)
    found: pandas.DataFrame = library.DataFrame(columns)
    return found


def _at_steps(steps: Array, known: Array, values: Array) -> Array:
    """Return the values of these steps, NaN where there is none; `known` is ascending."""
    result = np.full(len(steps), np.nan)
    places = np.searchsorted(known, steps)
    there = places < len(known)
    there[there] = known[places[there]] == steps[there]
    result[there] = values[places[there]]
    return result
