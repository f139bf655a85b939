# SPDX-License-Identifier: MIT
"""A run as named variables, and as an xarray dataset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .._support.arrays import as_list
from .._support.optional import import_optional
from .._version import __version__
from .states import Run
from .variables import (
    GROWING,
    LOSS_STEP,
    RATE_STEP,
    STEP,
    WEIGHT_STEP,
    Array,
    LayerVariables,
    Variable,
)

if TYPE_CHECKING:
    import xarray


FORMAT_VERSION: Final = 1


def list_variables(run: Run) -> dict[str, Variable]:
    """Return the variables that a run has, by name."""
    found: dict[str, Variable] = {}
    # A tracked run may have no losses; their empty axis would make tables of all variables empty.
    if len(run.loss) or run.states.has_every_loss:
        found["loss"] = Variable((LOSS_STEP,), "loss of W(t)", lambda: run.loss)
    if run.rates is not None:
        rates = run.rates
        text = "factor of the learning rates"
        found["rates"] = Variable((RATE_STEP,), text, lambda: rates)
    if run.times is not None:
        times = run.times
        found["times"] = Variable((LOSS_STEP,), "time of the gradient flow", lambda: times)
    of_layers = LayerVariables(run.n_layers)
    run.states.add_variables(of_layers, run)
    return found | of_layers


def select_variables(run: Run, names: Sequence[str] | None) -> dict[str, Variable]:
    """Return the variables of these names; all of them for None."""
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


def read_coordinate(run: Run, dim: str, begin: int = 0) -> Array:
    """Return the coordinate of a dimension that grows, without its first `begin` entries.

    Parameters
    ----------
    run : Trajectory
        Holds the entries from `begin` on.
    dim : str
        One of `GROWING`.
    begin : int
        Number of entries that other runs hold.
    """
    if dim == STEP:
        return run.steps
    if dim == WEIGHT_STEP:
        return run.states.snapshot_steps
    if dim == LOSS_STEP and not run.states.has_every_loss:
        return run.loss_steps
    count = 0 if run.rates is None else len(run.rates)
    return begin + np.arange(len(run.loss) if dim == LOSS_STEP else count, dtype=np.int64)


def make_coordinate(run: Run, dim: str) -> Variable:
    """Return the coordinate of a dimension that grows as a variable."""
    return Variable((dim,), GROWING[dim], partial(read_coordinate, run, dim))


def list_fixed_coordinates(run: Run) -> dict[str, tuple[str, Array]]:
    """Return the coordinates that do not grow, with their dimensions."""
    found: dict[str, tuple[str, Array]] = {
        "layer": ("layer", np.arange(1, run.n_layers + 1)),
        "layer_name": ("layer", np.array(run.layer_names)),
    }
    return found | run.states.coordinates()


def describe_run(run: Run) -> dict[str, Any]:
    """Return the attributes of a run's dataset."""
    return {
        "title": "dlnfast trajectory",
        "format_version": FORMAT_VERSION,
        "dlnfast_version": __version__,
        "engine": run.engine,
        "certificate": json.dumps(run.certificate.to_dict()),
        "config": json.dumps(run.config),
        "wall_time_seconds": float(run.wall_time),
    }


def to_xarray(run: Run, variables: Sequence[str] | None = None) -> xarray.Dataset:
    """Return a run as an xarray.Dataset: see `Trajectory.to_xarray`."""
    library = import_optional("xarray", "to_xarray", "xarray")
    held = {name: (v.dims, v.read(), v.attributes) for name, v in select_variables(run, variables).items()}
    held = {name: entry for name, entry in held.items() if 0 not in entry[1].shape[1:]}
    used = {dim for dims, *_ in held.values() for dim in dims}
    coordinates: dict[str, Any] = {
        dim: (dim, read_coordinate(run, dim), make_coordinate(run, dim).attributes)
        for dim in GROWING
        if dim in used
    }
    coordinates |= {name: entry for name, entry in list_fixed_coordinates(run).items() if entry[0] in used}
    found: xarray.Dataset = library.Dataset(held, coordinates, describe_run(run))
    return found
