# SPDX-License-Identifier: MIT
"""Export runs to other programs, part by part: zarr and HDF5."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from .._support.arrays import check_count, check_flag, check_path
from .._support.checkpoint import RunFolder
from .._support.files import Arrays, atomic_path
from .dataset import (
    describe_run,
    list_fixed_coordinates,
    list_variables,
    make_coordinate,
    read_coordinate,
    select_variables,
)
from .export_stores import HDF5Store, Store, ZarrStore
from .load import list_records, load, read_header, replace_records, thin_records
from .trajectory import Trajectory
from .variables import GROWING, LOSS_STEP, RATE_STEP, STEP, WEIGHT_STEP

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
    r"""Write the records of a run as named arrays for other programs: zarr of format 3, or HDF5.

    ``xarray.open_zarr(path)`` and ``xarray.open_dataset(path, engine="h5netcdf")`` read the dataset of
    `Trajectory.to_xarray`. It is written part by part, so that it may be larger than memory.

    Parameters
    ----------
    source : Trajectory or path
        A run, its file, or the folder of a checkpointed run, also during the run.
    path : path
        Path that ends in ``.zarr``, or in ``.h5``, ``.hdf5`` or ``.nc`` (HDF5 with named dimensions, as in
        netCDF 4). The dataset appears whole or not at all.
    every : int
        Write every n-th record and snapshot of the weights, plus the last of each.
    variables : sequence of str, optional
        Names of the variables; by default all that the run has.
    overwrite : bool
        Replace an existing dataset. A zarr folder is removed as soon as the new one is complete.

    Raises
    ------
    FileExistsError
        If `path` exists and `overwrite` is False.
    FileNotFoundError
        If there is no such run, or no folder to write to.
    ModuleNotFoundError
        Without zarr, or without h5netcdf and h5py.
    ValueError
        For another extension of `path`, a variable that the run does not have, and a source that `load`
        refuses.

    Notes
    -----
    Dimensions: ``step`` (the records), ``loss_step`` (every step), ``rate_step``, ``weight_step``, ``layer``
    (1 .. L), ``index`` (of singular values), ``active_index``, ``family``, ``row``, ``column``. Layers with
    fewer values than others are padded with NaN, or -1 for integers.

    =================================== ================================================================
    loss (loss_step), rates (rate_step) `Trajectory.loss`, `Trajectory.rates`
    times (loss_step)                   `Trajectory.times`, of a gradient flow
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

    Memory: for a folder, the problem and W(0), one of its files of records (by default at most a quarter of a
    gigabyte) and a few blocks of 16 MB, whatever the length of the run. For very wide layers and the reduced
    engine, `variables` without ``singular_values`` is much smaller: the other variables do not grow with the
    width.
    """
    target = check_path(path, "path")
    interval = check_count(every, "every")
    store: type[Store]
    if target.suffix in _ZARR:
        store = ZarrStore
    elif target.suffix in _HDF5:
        store = HDF5Store
    else:
        raise ValueError(f"path is {target}; wanted an ending of {', '.join(_ZARR + _HDF5)}")
    _check_target(target, check_flag(overwrite, "overwrite"))
    run, parts = _open_source(source)
    metadata = describe_run(run) | {
        "coordinates": " ".join(name for name in list_fixed_coordinates(run) if name != "layer")
    }
    with atomic_path(target, durable=True) as temporary, store(temporary, metadata) as opened:
        _write(opened, run, thin_records(parts, interval), variables)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} is there already; wanted a new name, or overwrite=True")
    # A mistyped path must not remove a folder of other files.
    if target.is_dir() and (target.suffix not in _ZARR or not (target / "zarr.json").is_file()):
        raise FileExistsError(f"{target} is a folder, but no zarr group of format 3; wanted a new name")


def _open_source(source: Trajectory | str | os.PathLike[str]) -> tuple[Trajectory, Iterable[Arrays]]:
    """Return a run, with or without its records, and the records part by part."""
    if not isinstance(source, Trajectory):
        file = check_path(source, "source")
        if file.is_dir():
            folder = RunFolder(file)
            return read_header(folder), folder.records()
        source = load(file)
    return source, [list_records(source)]


#: For each dimension that grows, the array of a part that has its length.
_LENGTHS: Final = dict(zip(GROWING, ("steps", "loss", "rates", "snapshot_steps"), strict=True))


def _find_dimension(name: str) -> str:
    """Return the dimension along which an array of a part grows."""
    if name.startswith("snapshot"):
        return WEIGHT_STEP
    series = {"loss": LOSS_STEP, "loss_steps": LOSS_STEP, "times": LOSS_STEP, "rates": RATE_STEP}
    return series.get(name, STEP)


def _write(store: Store, head: Trajectory, parts: Iterable[Arrays], names: Sequence[str] | None) -> None:
    """Write the variables of the parts, and empty the parts."""
    empty = {name: array[:0] for name, array in list_records(head).items()}
    first: Arrays = {}
    sizes: dict[str, dict[str, int]] = {}
    written = dict.fromkeys(GROWING, 0)
    for part in parts:
        if not sizes:
            first = {name: array[:1].copy() for name, array in part.items()}
            sizes = _create(store, replace_records(head, empty | first), names)
        for dim, size in sizes.items():
            group = {name: part.pop(name) for name in list(part) if _find_dimension(name) == dim}
            written[dim] += _append(store, head, first, dim, size, group, written[dim])
            del group
    if not sizes:
        _create(store, replace_records(head, empty), names)


def _append(
    store: Store,
    head: Trajectory,
    first: Arrays,
    dim: str,
    sizes: Mapping[str, int],
    group: Arrays,
    begin: int,
) -> int:
    """Write the variables that grow along a dimension, block by block; return the number of new entries."""
    empty = {name: array[:0] for name, array in first.items()}
    count = len(group[_LENGTHS[dim]])
    position = begin
    for block in _cut_into_blocks(group, count, sum(sizes.values())):
        # Angles refer to the first record, which is therefore put before every other block.
        before = int(dim == STEP and position > 0)
        if before:
            block = {name: np.concatenate([first[name], array]) for name, array in block.items()}
        run = replace_records(head, empty | block)
        offered = list_variables(run)
        for name in sizes:
            store.append(name, offered[name].read()[before:])
        coordinate = read_coordinate(run, dim, position)[before:]
        store.append(dim, coordinate)
        position += len(coordinate)
    return count


def _cut_into_blocks(arrays: Arrays, count: int, row: int) -> Iterator[Arrays]:
    """Cut arrays of `count` rows into blocks of about `_BLOCK_BYTES`, with `row` more bytes per row."""
    row += sum(array.nbytes for array in arrays.values()) // max(count, 1)
    step = max(_BLOCK_BYTES // row, 1)
    for begin in range(0, count, step):
        yield {name: array[begin : begin + step] for name, array in arrays.items()}


def _create(store: Store, run: Trajectory, names: Sequence[str] | None) -> dict[str, dict[str, int]]:
    """Create the variables; return their names and bytes per row, by the dimension that grows."""
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
        along = make_coordinate(run, dim)
        store.create(dim, along, along.read())
    for name, (dim, values) in list_fixed_coordinates(run).items():
        if dim in dims:
            store.fix(name, dim, values)
    return made
