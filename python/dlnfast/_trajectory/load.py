# SPDX-License-Identifier: MIT
"""Load runs from files and from checkpoint folders, whole or with fewer records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._problem.kinds import AnyProblem
from .._support.arrays import check_count, check_path
from .._support.checkpoint import RunFolder
from .._support.files import Arrays, read_whole, translate_read_errors
from .checks import check_run
from .states import COMPLETE
from .trajectory import FORMAT, FORMAT_VERSION, Trajectory, find_states_class

#: Arrays that grow by the step, not by the record.
SERIES = ("loss", "loss_steps", "rates", "times")


def load(path: str | os.PathLike[str], *, every: int = 1) -> Trajectory:
    """Load a run from a file of `Trajectory.save`, or from the folder of a checkpointed run.

    Parameters
    ----------
    path : path
        The file, or the folder, also during the run.
    every : int
        Load every n-th record and snapshot, plus the last of each. The loss is loaded at every step.

    Returns
    -------
    Trajectory
        With its problem: whitening, layout, classes and numbers, but without the samples of the data, except
        for a `SampleProblem`, which needs them.
        ``problem.transform`` takes new inputs as before; ``problem.inputs``, ``outputs`` and ``labels`` are
        None.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is not such a run, is damaged, or was written by a newer version.

    Notes
    -----
    Memory, for a folder: the problem and W(0), 8 bytes per step (16 where the learning rate adapts), the
    loaded records, and one of the folder's files. `export` holds no more than the first and the last of
    these.
    """
    interval = check_count(every, "every")
    source = check_path(path, "path")
    if source.is_dir():
        return load_folder(RunFolder(source), every=interval)
    run = _from_file(source, *read_whole(source, FORMAT, FORMAT_VERSION))
    if interval == 1:
        return run
    return replace_records(run, join_records(list(thin_records([list_records(run)], interval))))


def load_folder(folder: RunFolder, problem: AnyProblem | None = None, every: int = 1) -> Trajectory:
    """Return the run of a folder, with every n-th of the records so far.

    Parameters
    ----------
    folder : RunFolder
        Folder of a checkpointed run.
    problem : Problem, Completion or Sensing, optional
        The training problem, instead of the one in the folder.
    every : int
        See `load`.
    """
    run = read_header(folder, problem)
    parts = list(thin_records(folder.records(), every))
    if not parts:
        return run
    with translate_read_errors(folder.path, FORMAT):
        run = replace_records(run, join_records(parts))
        check_run(run, run.problem)
    return run


def read_header(folder: RunFolder, problem: AnyProblem | None = None) -> Trajectory:
    """Return the run of a folder without its records."""
    metadata, arrays = folder.request()
    run, states = dict(metadata["run"]), dict(metadata["run"]["states"])
    with translate_read_errors(folder.path, FORMAT):
        states_class = find_states_class(states["engine"], run["certificate"]["engine"])
    ending = folder.ending()  # before the records are listed: then all of them are there
    run["config"] = run["config"] | {"outcome": "unfinished" if ending is None else ending["outcome"]}
    if ending is not None:
        run["wall_time"] = ending["seconds"]
    if states_class.has_final_weights and ending is not None and ending["outcome"] in COMPLETE:
        state = folder.newest()
        if state is None or state.step != ending["step"]:
            raise ValueError(
                f"{folder.path} has no state of its last step, {ending['step']}, that can be read; without "
                "end.json the run resumes from the newest state there is"
            )
        states_class.add_final_weights(states, arrays, state.arrays)
    return _from_file(folder.path, run | {"states": states}, arrays, problem)


def list_records(run: Trajectory) -> Arrays:
    """Return all arrays that grow during a run, under their names in files."""
    series = {"loss": run.loss, "loss_steps": run.loss_steps, "rates": run.rates, "times": run.times}
    found = {name: array for name, array in series.items() if array is not None}
    return run.states.record_arrays() | {"steps": run.steps} | found


def replace_records(run: Trajectory, arrays: Arrays) -> Trajectory:
    """Return a run with other records, under the names of `list_records`."""
    return Trajectory(
        steps=arrays["steps"],
        loss=arrays["loss"],
        states=run.states.replace_records(arrays),
        certificate=run.certificate,
        problem=run.problem,
        config=run.config,
        wall_time=run.wall_time,
        rates=arrays.get("rates"),
        loss_steps=arrays.get("loss_steps"),
        times=arrays.get("times"),
    )


def thin_records(parts: Iterable[Arrays], every: int) -> Iterator[Arrays]:
    """Yield the parts with every n-th record and snapshot from the first on, plus the last of each.

    The parts are emptied, so that at most one of them is in memory.
    """
    if every == 1:
        yield from parts
        return
    seen: dict[str, int] = {}
    last: Arrays = {}
    for part in parts:
        selected = {}
        for name, array in part.items():
            if name in SERIES:
                selected[name], last[name] = array, array[:0].copy()
                continue
            position = seen.get(name, 0)
            seen[name] = position + len(array)
            selected[name] = array[-position % every :: every].copy()  # a view would hold the part
            if len(array):
                last[name] = array[-1:].copy() if (seen[name] - 1) % every else array[:0].copy()
            else:
                last.setdefault(name, array)
        part.clear()
        array = np.empty(0)  # the loop variable holds the last array of the part
        yield selected
    if any(map(len, last.values())):
        yield last


def join_records(parts: Sequence[Arrays]) -> Arrays:
    """Concatenate the arrays of all parts, and empty the parts, so that no array is in memory twice."""
    return {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}


def _from_file(
    path: Path, metadata: Mapping[str, Any], arrays: Arrays, problem: AnyProblem | None = None
) -> Trajectory:
    with translate_read_errors(path, FORMAT):
        return Trajectory.from_arrays(metadata, arrays, problem)
