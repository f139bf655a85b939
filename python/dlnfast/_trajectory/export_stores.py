# SPDX-License-Identifier: MIT
"""Files with named arrays that grow along their first dimension: zarr of format 3 and HDF5."""

from __future__ import annotations

import asyncio
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol, Self

import numpy as np

from .._support.optional import import_optional
from .variables import Array, Variable

_CHUNK_BYTES: Final = 2**20
_MOST_ROWS: Final = 2**14


class Store(Protocol):
    """A context manager that writes named arrays, which grow along their first dimension.

    Parameters
    ----------
    path : Path
        File or folder to write, which does not exist.
    attributes : dict
        Attributes of the dataset, in JSON values.
    """

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None: ...

    def create(self, name: str, variable: Variable, first: Array) -> None:
        """Create an empty array with the dtype, and beyond the first dimension the shape, of `first`."""
        ...

    def append(self, name: str, values: Array) -> None:
        """Append entries along the first dimension of an array."""
        ...

    def fix(self, name: str, dim: str, values: Array) -> None:
        """Write an array of one dimension that does not grow."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None: ...


def _chunks(first: Array) -> tuple[int, ...]:
    """Return the shape of a chunk of about `_CHUNK_BYTES`, of one layer where a row is larger than that."""
    row = first.dtype.itemsize * int(np.prod(first.shape[1:]))
    if row <= _CHUNK_BYTES:
        return (min(max(_CHUNK_BYTES // row, 1), _MOST_ROWS), *first.shape[1:])
    return (1, 1, *first.shape[2:])


class ZarrStore:
    """A zarr group of format 3."""

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        self._library = import_optional("zarr", "exporting to zarr", "zarr")
        self._path = path
        self._group = self._library.open_group(path, mode="w", zarr_format=3, attributes=attributes)

    def create(self, name: str, variable: Variable, first: Array) -> None:
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
        if kind is not None:  # the group may be incomplete, and is removed
            return
        # xarray reads the consolidated metadata; other readers do not need them.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consolidated metadata")
            self._library.consolidate_metadata(self._path)

    def _wait(self) -> None:
        """Wait until zarr's thread has written all chunks, which it continues to do after an error."""

        async def wait() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)

        self._library.core.sync.sync(wait())


class _Sink(io.RawIOBase):
    """A new file for the HDF5 library, in which no write fails.

    After a failed write the library cannot close its file, and aborts the process when Python exits.
    Therefore the first error is stored for the caller to raise. The data of later writes are held in memory,
    where they can be read again: a few megabytes of metadata and open chunks, until the file is closed and
    removed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self._file = path.open("w+b", buffering=0)
        self._position = self._size = 0
        self._held: list[tuple[int, bytes]] = []

    def _attempt(self, action: Callable[[], object]) -> bool:
        """Return whether an action on the file succeeded; after the first failure no other is tried."""
        if self.error is None:
            try:
                action()
            except BaseException as error:  # also KeyboardInterrupt, as the caller is C code
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
        for position, part in self._held:
            first, last = max(position, begin), min(position + len(part), end)
            if first < last:
                view[first - begin : last - begin] = part[first - position : last - position]
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
        """Flush the file to the disk and close it."""
        if not self.closed:
            self._attempt(lambda: os.fsync(self._file.fileno()))
            self._file.close()
        super().close()


class HDF5Store:
    """An HDF5 file with named dimensions, as in netCDF 4."""

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        library = import_optional("h5netcdf", "exporting to HDF5", "hdf5")
        self._sink = _Sink(path)
        self._file = library.File(self._sink, "w")
        self._file.attrs.update(attributes)
        self._lengths: dict[str, int] = {}

    def create(self, name: str, variable: Variable, first: Array) -> None:
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
        dtype = import_optional("h5py", "exporting to HDF5", "hdf5").string_dtype() if text else values.dtype
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
