# SPDX-License-Identifier: MIT
"""Export runs to other programs, part by part: zarr and HDF5."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from .._support.arrays import check_count, check_flag, check_path
from .._support.checkpoint import RunFolder
from .._support.files import Arrays, atomic_path
from .dataset import (
    GROWING,
    LOSS_STEP,
    RATE_STEP,
    STEP,
    WEIGHT_STEP,
    coordinate_variable,
    describe_run,
    fixed_coordinates,
    growing_coordinate,
    list_variables,
    select_variables,
)
from .load import grown_arrays, load, read_header, thin_records, with_records
from .stores import HDF5Store, Store, ZarrStore
from .trajectory import Trajectory

_BLOCK_BYTES: Final = 2**24
_ZARR: Final = (".zarr",)
_HDF5: Final = (".h5", ".hdf5", ".nc")


def export(
    source: Trajectory | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    every: int = 1,
    variables: Sequence[str] | None = None,
    overwrite: bool = False,
) -> None:
    r"""Write what a run recorded as named arrays for other programs: zarr of format 3, or HDF5.

    ``xarray.open_zarr(path)`` and ``xarray.open_dataset(path, engine="h5netcdf")`` read it; it is
    `Trajectory.to_xarray`, larger than memory where it has to be.

    Parameters
    ----------
    source : Trajectory or path
        A run, its file, or the folder to which it is written, also while it goes on.
    path : path
        Ends in ``.zarr``, or in ``.h5``, ``.hdf5`` or ``.nc`` (HDF5 with named dimensions, which netCDF 4
        is). It appears whole or not at all.
    every : int
        Every so-many-th record and snapshot of the weights only, from the first, and the last of both.
    variables : sequence of str, optional
        Which of the variables; by default all that the run has.
    overwrite : bool
        Replace what is there. A zarr folder is removed as soon as the new one is complete.

    Raises
    ------
    FileExistsError
        If there is something, and `overwrite` is False.
    FileNotFoundError
        If there is no such run, or no folder to write to.
    ModuleNotFoundError
        Without zarr, or without h5netcdf and h5py.
    ValueError
        For another ending of `path`, a variable that the run does not have, and a source that `load` refuses.

    Notes
    -----
    Dimensions: ``step`` (the records), ``loss_step`` (every step), ``rate_step``, ``weight_step``, ``layer``
    (1 .. L), ``index`` (of singular values), ``active_index``, ``family``, ``row``, ``column``. What a layer
    has less of than another is filled up with NaN, or -1 for integers.

    =================================== ================================================================
    loss (loss_step), rates (rate_step) `Trajectory.loss`, `Trajectory.rates`
    singular_values, their _errors      (step, layer, index)
    branches, clusters, signs           (step, layer, index), where the dense engine or `track` recorded
    left_angles, right_angles           (step, layer, index), radians, to the limit; where vectors, or
                                        angles, were recorded
    left_block_angles, and right        (step, layer), radians, of a tracked model
    left_vectors, right_vectors         (step, layer, row or column, index)
    tracking_<column>                   (step, layer), see `Trajectory.tracking`
    active_singular_values              (step, layer, active_index), reduced engine; so are
                                        active_left_angles and active_right_angles
    rho                                 (step, layer, family), reduced engine; NaN where the family does
                                        not run through the layer
    weights                             (weight_step, layer, row, column), the snapshots
    =================================== ================================================================

    Attributes: ``engine``, ``certificate`` and ``config`` (JSON), ``wall_time_seconds``,
    ``dlnfast_version`` and ``format_version``.

    Memory: of a folder, what the run was asked for (problem and W(0)), one of its files of records (by
    default at most a quarter of a gigabyte) and a few blocks of 16 MB, whatever the length of the run. For
    very wide layers and the reduced engine, `variables` without ``singular_values`` is much smaller: the rest
    does not grow with the width.
    """
    place = check_path(path, "path")
    interval = check_count(every, "every")
    store: Callable[[Path, dict[str, Any]], ZarrStore | HDF5Store]
    if place.suffix in _ZARR:
        store = ZarrStore
    elif place.suffix in _HDF5:
        store = HDF5Store
    else:
        raise ValueError(f"path is {place}; wanted an ending of {', '.join(_ZARR + _HDF5)}")
    _check_room(place, check_flag(overwrite, "overwrite"))
    run, parts = _opened(source)
    about = describe_run(run) | {
        "coordinates": " ".join(name for name in fixed_coordinates(run) if name != "layer")
    }
    with atomic_path(place, durable=True) as temporary, store(temporary, about) as opened:
        _write(opened, run, thin_records(parts, interval), variables)


def _check_room(place: Path, overwrite: bool) -> None:
    if not place.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{place} is there already; wanted a new name, or overwrite=True")
    # A slip of the pen should not cost a folder of something else.
    if place.is_dir() and (place.suffix not in _ZARR or not (place / "zarr.json").is_file()):
        raise FileExistsError(f"{place} is a folder, but no zarr group of format 3; wanted a new name")


def _opened(source: Trajectory | str | os.PathLike[str]) -> tuple[Trajectory, Iterable[Arrays]]:
    """Return a run, with or without its records, and these part by part."""
    if not isinstance(source, Trajectory):
        place = check_path(source, "source")
        if place.is_dir():
            folder = RunFolder(place)
            return read_header(folder), folder.records()
        source = load(place)
    return source, [grown_arrays(source)]


#: For each dimension that grows, the array of a part that is as long.
_LENGTHS: Final = dict(zip(GROWING, ("steps", "loss", "rates", "snapshot_steps"), strict=True))


def _dimension(name: str) -> str:
    """Return which dimension an array of a part grows along."""
    if name.startswith("snapshot"):
        return WEIGHT_STEP
    return {"loss": LOSS_STEP, "loss_steps": LOSS_STEP, "rates": RATE_STEP}.get(name, STEP)


def _write(store: Store, head: Trajectory, parts: Iterable[Arrays], names: Sequence[str] | None) -> None:
    """Write the variables of the parts, and empty these."""
    empty = {name: array[:0] for name, array in grown_arrays(head).items()}
    first: Arrays = {}
    sizes: dict[str, dict[str, int]] = {}
    written = dict.fromkeys(GROWING, 0)
    for part in parts:
        if not sizes:
            first = {name: array[:1].copy() for name, array in part.items()}
            sizes = _create(store, with_records(head, empty | first), names)
        for dim, size in sizes.items():
            group = {name: part.pop(name) for name in list(part) if _dimension(name) == dim}
            written[dim] += _append(store, head, first, dim, size, group, written[dim])
            del group
    if not sizes:
        _create(store, with_records(head, empty), names)


def _append(
    store: Store,
    head: Trajectory,
    first: Arrays,
    dim: str,
    sizes: Mapping[str, int],
    group: Arrays,
    begin: int,
) -> int:
    """Write the variables that grow along a dimension, in blocks of what a part holds; return how much."""
    empty = {name: array[:0] for name, array in first.items()}
    count = len(group[_LENGTHS[dim]])
    place = begin
    for block in _blocks(group, count, sum(sizes.values())):
        # Angles are to the first record: it goes before each block that lacks it.
        before = int(dim == STEP and place > 0)
        if before:
            block = {name: np.concatenate([first[name], array]) for name, array in block.items()}
        run = with_records(head, empty | block)
        offered = list_variables(run)
        for name in sizes:
            store.append(name, offered[name].read()[before:])
        coordinate = growing_coordinate(run, dim, place)[before:]
        store.append(dim, coordinate)
        place += len(coordinate)
    return count


def _blocks(arrays: Arrays, count: int, row: int) -> Iterator[Arrays]:
    """Cut arrays of `count` rows into blocks, so that `row` bytes per row beside them stay few."""
    row += sum(array.nbytes for array in arrays.values()) // max(count, 1)
    step = max(_BLOCK_BYTES // row, 1)
    for begin in range(0, count, step):
        yield {name: array[begin : begin + step] for name, array in arrays.items()}


def _create(store: Store, run: Trajectory, names: Sequence[str] | None) -> dict[str, dict[str, int]]:
    """Make room for the variables; return, by the dimension that grows, their names and bytes per row."""
    made: dict[str, dict[str, int]] = {}
    dims: set[str] = set()
    for name, variable in select_variables(run, names).items():
        values = variable.read()
        if 0 in values.shape[1:]:
            continue
        store.create(name, variable, values)
        size = values.dtype.itemsize * int(np.prod(values.shape[1:]))
        made.setdefault(variable.dims[0], {})[name] = size
        dims.update(variable.dims)
    for dim in made:
        along = coordinate_variable(run, dim)
        store.create(dim, along, along.read())
    for name, (dim, values) in fixed_coordinates(run).items():
        if dim in dims:
            store.fix(name, dim, values)
    return made
