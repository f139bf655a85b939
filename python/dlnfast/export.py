# SPDX-License-Identifier: MIT
"""Runs for other programs: named arrays in xarray, zarr and HDF5, written part by part."""

from __future__ import annotations

import asyncio
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import numpy as np
import numpy.typing as npt

from ._arrays import (
    as_list,
    check_count,
    check_flag,
    check_path,
)
from ._optional import imported
from ._version import __version__
from .checkpoint import RunFolder
from .files import Arrays, placing
from .problem import Problem
from .svd_tracker import COMPLETENESS, TIERS
from .trajectory import (
    COLUMNS,
    DenseStates,
    ReducedStates,
    Trajectory,
    begun,
    grown_arrays,
    load,
    thinned,
    with_records,
)

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["export", "to_dataframe", "to_xarray"]

FORMAT_VERSION: Final = 1
_BLOCK_BYTES: Final = 2**24
_CHUNK_BYTES: Final = 2**20
_MOST_ROWS: Final = 2**14
_ZARR: Final = (".zarr",)
_HDF5: Final = (".h5", ".hdf5", ".nc")

Array = npt.NDArray[Any]

#: Dimensions that grow while a run goes on. Each has a coordinate of its own name.
_STEP, _LOSS_STEP, _RATE_STEP, _WEIGHT_STEP = ("step", "loss_step", "rate_step", "weight_step")
_GROWING: Final = {
    _STEP: "steps t of the records",
    _LOSS_STEP: "steps t of the loss",
    _RATE_STEP: "steps t that the rates were taken for",
    _WEIGHT_STEP: "steps t of the weights",
}
_LAYER: Final = (_STEP, "layer")
_VALUE: Final = (*_LAYER, "index")
_ACTIVE: Final = (*_LAYER, "active_index")


@dataclass(frozen=True)
class _Variable:
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


def _offered(run: Trajectory) -> dict[str, _Variable]:
    """Return the variables that a run has, by name."""
    found: dict[str, _Variable] = {}
    if len(run.loss) or not run.is_tracked:  # a tracked run may have none: an empty axis would hide all else
        found["loss"] = _Variable((_LOSS_STEP,), "loss of W(t)", lambda: run.loss)
    if run.rates is not None:
        rates = run.rates
        text = "what the learning rates were multiplied by"
        found["rates"] = _Variable((_RATE_STEP,), text, lambda: rates)

    def add(
        name: str, dims: tuple[str, ...], text: str, read: Callable[[int], Array], units: str = "1"
    ) -> None:
        def values() -> Array:
            return _beside([read(layer) for layer in range(1, run.n_layers + 1)])

        found[name] = _Variable(dims, text, values, units)

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
        add("weights", (_WEIGHT_STEP, "layer", "row", "column"), text, of_layers(states.snapshots))


def _chosen(run: Trajectory, names: Sequence[str] | None) -> dict[str, _Variable]:
    """Return the variables of these names."""
    offered = _offered(run)
    if names is None:
        return offered
    if isinstance(names, str):
        raise TypeError(f"variables is {names!r}; wanted a list of names")
    wanted = as_list(names, "variables", "a list of names")
    for name in wanted:
        if not isinstance(name, str) or name not in offered:
            raise ValueError(f"variables has {name!r}; this run has {', '.join(offered)}")
    return {name: offered[name] for name in wanted}


def _coordinate(run: Trajectory, dim: str, begin: int = 0) -> Array:
    """Return the coordinate of a dimension that grows, of what comes after `begin` others."""
    if dim == _STEP:
        return run.steps
    if dim == _WEIGHT_STEP:
        return run.states.snapshot_steps if isinstance(run.states, DenseStates) else np.empty(0, np.int64)
    if dim == _LOSS_STEP and run.is_tracked:
        return run.loss_steps
    count = 0 if run.rates is None else len(run.rates)
    return begin + np.arange(len(run.loss) if dim == _LOSS_STEP else count, dtype=np.int64)


def _along(run: Trajectory, dim: str) -> _Variable:
    return _Variable((dim,), _GROWING[dim], partial(_coordinate, run, dim))


def _fixed(run: Trajectory) -> dict[str, tuple[str, Array]]:
    """Return the coordinates that do not grow, with their dimensions."""
    found: dict[str, tuple[str, Array]] = {
        "layer": ("layer", np.arange(1, run.n_layers + 1)),
        "layer_name": ("layer", np.array(run.layer_names)),
    }
    families = run.states.families if isinstance(run.states, ReducedStates) else ()
    for name in ("first", "last", "multiplicity") if families else ():
        found[f"family_{name}"] = ("family", np.array([getattr(family, name) for family in families]))
    return found


def _attributes(run: Trajectory) -> dict[str, Any]:
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
    library = imported("xarray", "to_xarray", "xarray")
    held = {name: (v.dims, v.read(), v.attributes) for name, v in _chosen(run, variables).items()}
    held = {name: entry for name, entry in held.items() if 0 not in entry[1].shape[1:]}
    used = {dim for dims, *_ in held.values() for dim in dims}
    coordinates: dict[str, Any] = {
        dim: (dim, _coordinate(run, dim), _along(run, dim).attributes) for dim in _GROWING if dim in used
    }
    coordinates |= {name: entry for name, entry in _fixed(run).items() if entry[0] in used}
    found: xarray.Dataset = library.Dataset(held, coordinates, _attributes(run))
    return found


def to_dataframe(run: Trajectory) -> pandas.DataFrame:
    """Return the records of a run as a pandas.DataFrame: see `Trajectory.to_dataframe`."""
    library = imported("pandas", "to_dataframe")
    offered = _offered(run)
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
    for dim, name in ((_LOSS_STEP, "loss"), (_RATE_STEP, "rates")):
        if name in offered:
            columns[name] = over_rows(_at_steps(run.steps, _coordinate(run, dim), offered[name].read()))
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


# --------------------------------------------------------------------------------------------------
# Stores
# --------------------------------------------------------------------------------------------------


class _Store(Protocol):
    """Where named arrays grow along their first dimensions; a context manager."""

    def create(self, name: str, variable: _Variable, first: Array) -> None: ...

    def append(self, name: str, values: Array) -> None: ...

    def fix(self, name: str, dim: str, values: Array) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None: ...


def _chunks(first: Array) -> tuple[int, ...]:
    """Return the shape of a chunk of about `_CHUNK_BYTES`; layers are apart where they are larger."""
    row = first.dtype.itemsize * int(np.prod(first.shape[1:]))
    if row <= _CHUNK_BYTES:
        return (min(max(_CHUNK_BYTES // row, 1), _MOST_ROWS), *first.shape[1:])
    return (1, 1, *first.shape[2:])


class _ZarrStore:
    """A zarr group of format 3."""

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        self._library = imported("zarr", "exporting to zarr", "zarr")
        self._path = path
        self._group = self._library.open_group(path, mode="w", zarr_format=3, attributes=attributes)

    def create(self, name: str, variable: _Variable, first: Array) -> None:
        self._group.create_array(
            name,
            shape=(0, *first.shape[1:]),
            chunks=_chunks(first),
            dtype=first.dtype,
            dimension_names=variable.dims,
            attributes=variable.attributes,
        )

    def append(self, name: str, values: Array) -> None:
        self._group[name].append(values)

    def fix(self, name: str, dim: str, values: Array) -> None:
        dtype = str if values.dtype.kind == "U" else values.dtype
        array = self._group.create_array(name, shape=values.shape, dtype=dtype, dimension_names=[dim])
        array[:] = values

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._wait()
        if kind is not None:  # the group is removed, and may lack parts
            return
        # xarray looks for it; who does not know it reads the group without.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consolidated metadata")
            self._library.consolidate_metadata(self._path)

    def _wait(self) -> None:
        """Wait for chunks under way: after an error zarr leaves the others to its own thread."""

        async def wait() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)

        self._library.core.sync.sync(wait())


class _Sink(io.RawIOBase):
    """A new file for the HDF5 library, to which no write ever fails.

    After a failed write the library cannot close its file, and ends the process when Python ends. So the
    first error is kept for the caller to raise, and what the library writes after it is held in memory, where
    it can be read again: a few megabytes of metadata and open chunks, until the file is closed and removed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self._file = path.open("w+b", buffering=0)
        self._position = self._size = 0
        self._held: list[tuple[int, bytes]] = []

    def _attempt(self, action: Callable[[], object]) -> bool:
        """Return whether an action on the file succeeded; none is tried after the first that did not."""
        if self.error is None:
            try:
                action()
            except BaseException as error:  # Ctrl-C too: the library calls from C
                self.error = error
        return self.error is None

    def check(self) -> None:
        """Raise the first error."""
        if self.error is not None:
            raise self.error

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self._size = self._position if size is None else size
        self._attempt(lambda: self._file.truncate(self._size))
        return self._size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")

        def write() -> None:
            self._file.seek(self._position)
            done = 0
            while done < len(view):
                done += self._file.write(view[done:])

        if not self._attempt(write):
            self._held.append((self._position, bytes(view)))
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self._size - self._position), 0)
        begin, end = self._position, self._position + count
        view[:count] = self._content(begin, count)
        for place, part in self._held:
            first, last = max(place, begin), min(place + len(part), end)
            if first < last:
                view[first - begin : last - begin] = part[first - place : last - place]
        self._position = end
        return count

    def _content(self, begin: int, count: int) -> bytes:
        try:
            self._file.seek(begin)
            content = self._file.read(count) or b""
        except BaseException as error:
            self.error = self.error or error
            content = b""
        return content.ljust(count, b"\0")

    def close(self) -> None:
        """Close the file; it is on the disk if there was no error."""
        if not self.closed:
            self._attempt(lambda: os.fsync(self._file.fileno()))
            self._file.close()
        super().close()


class _HDF5Store:
    """An HDF5 file with named dimensions, as netCDF 4 has them."""

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        library = imported("h5netcdf", "exporting to HDF5", "hdf5")
        self._sink = _Sink(path)
        self._file = library.File(self._sink, "w")
        self._file.attrs.update(attributes)
        self._lengths: dict[str, int] = {}

    def create(self, name: str, variable: _Variable, first: Array) -> None:
        for dim, size in zip(variable.dims, (None, *first.shape[1:]), strict=True):
            self._file.dimensions.setdefault(dim, size)
        made = self._file.create_variable(
            name, variable.dims, first.dtype, chunks=_chunks(first), compression="gzip", shuffle=True
        )
        made.attrs.update(variable.attributes)
        self._lengths[name] = 0
        self._sink.check()

    def append(self, name: str, values: Array) -> None:
        array = self._file.variables[name]
        begin = self._lengths[name]
        end = self._lengths[name] = begin + len(values)
        dim = array.dimensions[0]
        if len(self._file.dimensions[dim]) < end:
            self._file.resize_dimension(dim, end)
        array[begin:end] = values
        self._sink.check()

    def fix(self, name: str, dim: str, values: Array) -> None:
        self._file.dimensions.setdefault(dim, len(values))
        text = values.dtype.kind == "U"
        dtype = imported("h5py", "exporting to HDF5", "hdf5").string_dtype() if text else values.dtype
        self._file.create_variable(name, (dim,), dtype)[:] = values.astype(object) if text else values
        self._sink.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self._file.close()
        finally:
            self._sink.close()
        self._sink.check()


# --------------------------------------------------------------------------------------------------
# Part by part
# --------------------------------------------------------------------------------------------------


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
    store: Callable[[Path, dict[str, Any]], _ZarrStore | _HDF5Store]
    if place.suffix in _ZARR:
        store = _ZarrStore
    elif place.suffix in _HDF5:
        store = _HDF5Store
    else:
        raise ValueError(f"path is {place}; wanted an ending of {', '.join(_ZARR + _HDF5)}")
    _check_room(place, check_flag(overwrite, "overwrite"))
    run, parts = _opened(source)
    about = _attributes(run) | {"coordinates": " ".join(name for name in _fixed(run) if name != "layer")}
    with placing(place, durable=True) as temporary, store(temporary, about) as opened:
        _write(opened, run, thinned(parts, interval), variables)


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
            return begun(folder), folder.records()
        source = load(place)
    return source, [grown_arrays(source)]


#: For each dimension that grows, the array of a part that is as long.
_LENGTHS: Final = dict(zip(_GROWING, ("steps", "loss", "rates", "snapshot_steps"), strict=True))


def _dimension(name: str) -> str:
    """Return which dimension an array of a part grows along."""
    if name.startswith("snapshot"):
        return _WEIGHT_STEP
    return {"loss": _LOSS_STEP, "loss_steps": _LOSS_STEP, "rates": _RATE_STEP}.get(name, _STEP)


def _write(store: _Store, head: Trajectory, parts: Iterable[Arrays], names: Sequence[str] | None) -> None:
    """Write the variables of the parts, and empty these."""
    empty = {name: array[:0] for name, array in grown_arrays(head).items()}
    first: Arrays = {}
    sizes: dict[str, dict[str, int]] = {}
    written = dict.fromkeys(_GROWING, 0)
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
    store: _Store,
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
        before = int(dim == _STEP and place > 0)
        if before:
            block = {name: np.concatenate([first[name], array]) for name, array in block.items()}
        run = with_records(head, empty | block)
        offered = _offered(run)
        for name in sizes:
            store.append(name, offered[name].read()[before:])
        coordinate = _coordinate(run, dim, place)[before:]
        store.append(dim, coordinate)
        place += len(coordinate)
    return count


def _blocks(arrays: Arrays, count: int, row: int) -> Iterator[Arrays]:
    """Cut arrays of `count` rows into blocks, so that `row` bytes per row beside them stay few."""
    row += sum(array.nbytes for array in arrays.values()) // max(count, 1)
    step = max(_BLOCK_BYTES // row, 1)
    for begin in range(0, count, step):
        yield {name: array[begin : begin + step] for name, array in arrays.items()}


def _create(store: _Store, run: Trajectory, names: Sequence[str] | None) -> dict[str, dict[str, int]]:
    """Make room for the variables; return, by the dimension that grows, their names and bytes per row."""
    made: dict[str, dict[str, int]] = {}
    dims: set[str] = set()
    for name, variable in _chosen(run, names).items():
        values = variable.read()
        if 0 in values.shape[1:]:
            continue
        store.create(name, variable, values)
        size = values.dtype.itemsize * int(np.prod(values.shape[1:]))
        made.setdefault(variable.dims[0], {})[name] = size
        dims.update(variable.dims)
    for dim in made:
        along = _along(run, dim)
        store.create(dim, along, along.read())
    for name, (dim, values) in _fixed(run).items():
        if dim in dims:
            store.fix(name, dim, values)
    return made
