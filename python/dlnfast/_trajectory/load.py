# SPDX-License-Identifier: MIT
"""Load runs from files and from checkpoint folders, whole or with fewer records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .._problem.observations import Observations
from .._problem.problem import Problem
from .._support.arrays import check_count, check_path
from .._support.checkpoint import RunFolder
from .._support.files import Arrays, naming_damage, read_whole
from .checks import check_run
from .states import COMPLETE, DenseStates, ReducedStates
from .storage import pack_dense, record_arrays, unpack_dense
from .trajectory import FORMAT, FORMAT_VERSION, Trajectory

#: What grows by the step, not by the record.
SERIES = ("loss", "loss_steps", "rates")


def load(path: str | os.PathLike[str], *, every: int = 1) -> Trajectory:
    """Read a run that `Trajectory.save` wrote, or what a run has written to its checkpoint's folder so far.

    Parameters
    ----------
    path : path
        The file, or the folder.
    every : int
        Hold every so-many-th record and snapshot of the weights only, from the first, and the last of both.
        The loss is held at every step.

    Returns
    -------
    Trajectory
        With its problem: its whitening, layout, classes and numbers, but without the samples that it was made
        from. ``problem.transform`` takes new inputs as before; ``problem.inputs``, ``outputs`` and ``labels``
        are None.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is not such a run, is damaged, or was written by a newer version.

    Notes
    -----
    Memory, for a folder: what the run was asked for (problem and W(0)), 8 bytes per step (16 where the
    learning rate adapts), the records that are held, and one of its files. `export` holds no more than the
    first and the last of these.
    """
    interval = check_count(every, "every")
    place = check_path(path, "path")
    if place.is_dir():
        return load_folder(RunFolder(place), every=interval)
    run = _from_file(place, *read_whole(place, FORMAT, FORMAT_VERSION))
    return (
        run
        if interval == 1
        else with_records(run, join_records(list(thin_records([grown_arrays(run)], interval))))
    )


def load_folder(
    folder: RunFolder, problem: Problem | Observations | None = None, every: int = 1
) -> Trajectory:
    """Return what a run has written to its folder so far, with every so-many-th record."""
    run = read_header(folder, problem)
    parts = list(thin_records(folder.records(), every))
    if not parts:
        return run
    with naming_damage(folder.path, FORMAT):
        run = with_records(run, join_records(parts))
        check_run(run)
    return run


def read_header(folder: RunFolder, problem: Problem | Observations | None = None) -> Trajectory:
    """Return the run of a folder without its records."""
    about, arrays = folder.request()
    run, states = dict(about["run"]), dict(about["run"]["states"])
    ending = folder.ending()  # before the records are looked for: then all of them are there
    run["config"] = run["config"] | {"outcome": "unfinished" if ending is None else ending["outcome"]}
    if ending is not None:
        run["wall_time"] = ending["seconds"]
    if states["engine"] == "dense" and ending is not None and ending["outcome"] in COMPLETE:
        state = folder.newest()
        if state is None or state.step != ending["step"]:
            raise ValueError(
                f"{folder.path} has no state of its last step, {ending['step']}, that can be read; without "
                "end.json the run goes on from what there is"
            )
        final = state.arrays
        n_layers = len(states["initial"])
        arrays |= {f"final_{i}": final[f"weight_{i}"] for i in range(n_layers)}
        states["final"] = [True] * n_layers
    return _from_file(folder.path, run | {"states": states}, arrays, problem)


def grown_arrays(run: Trajectory) -> Arrays:
    """Return all that grows while a run goes on, under the names that it has in files."""
    series = {"loss": run.loss, "loss_steps": run.loss_steps, "rates": run.rates}
    found = {name: array for name, array in series.items() if array is not None}
    return record_arrays(run.states) | {"steps": run.steps} | found


def with_records(run: Trajectory, arrays: Arrays) -> Trajectory:
    """Return a run with other `grown_arrays`; what is not among them is empty."""
    states: ReducedStates | DenseStates
    if isinstance(run.states, ReducedStates):
        cores = tuple(arrays[f"core_{i}"] for i in range(run.n_layers))
        states = replace(run.states, cores=cores, rho=arrays["rho"])
    else:
        held: Arrays = {}
        about = pack_dense(run.states, held, True)
        states = unpack_dense(about, held | arrays)
    return Trajectory(
        steps=arrays["steps"],
        loss=arrays["loss"],
        states=states,
        certificate=run.certificate,
        problem=run.problem,
        config=run.config,
        wall_time=run.wall_time,
        rates=arrays.get("rates"),
        loss_steps=arrays.get("loss_steps"),
    )


def thin_records(parts: Iterable[Arrays], every: int) -> Iterator[Arrays]:
    """Yield the parts with every so-many-th record and snapshot, from the first, and the last of both.

    The parts are emptied: two of them need not fit the memory.
    """
    if every == 1:
        yield from parts
        return
    seen: dict[str, int] = {}
    last: Arrays = {}
    for part in parts:
        kept = {}
        for name, array in part.items():
            if name in SERIES:
                kept[name], last[name] = array, array[:0].copy()
                continue
            place = seen.get(name, 0)
            seen[name] = place + len(array)
            kept[name] = array[-place % every :: every].copy()  # a view would hold the part
            if len(array):
                last[name] = array[-1:].copy() if (seen[name] - 1) % every else array[:0].copy()
            else:
                last.setdefault(name, array)
        part.clear()
        array = np.empty(0)  # the last one goes, too
        yield kept
    if any(map(len, last.values())):
        yield last


def join_records(parts: Sequence[Arrays]) -> Arrays:
    """Return the arrays of all parts, one after the other, and empty the parts: nothing is held twice."""
    return {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}


def _from_file(
    path: Path, about: Mapping[str, Any], arrays: Arrays, problem: Problem | Observations | None = None
) -> Trajectory:
    with naming_damage(path, FORMAT):
        return Trajectory.from_arrays(about, arrays, problem)
