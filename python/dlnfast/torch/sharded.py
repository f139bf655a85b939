# SPDX-License-Identifier: MIT
"""`RowSharded`: a matrix with its rows distributed over processes, for the tracker and the descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from .._support.arrays import FloatArray, as_array, check_count
from .._support.errors import ShapeError
from .._support.threads import build_info
from .operators import get_numpy_dtype, get_torch_dtype, to_device, to_host

#: Message of the error on all processes that did not fail themselves.
_PEER_FAILED = "another process of the group failed; {0}"


class Peers:
    """The processes of a group, and their collective operations; a group of one without `torch.distributed`.

    Parameters
    ----------
    group : ProcessGroup, optional
        Group of processes. Default: all processes, or this one if `torch.distributed` was not started.
    """

    def __init__(self, group: Any = None) -> None:
        started = dist.is_available() and dist.is_initialized()
        if group is not None and not started:
            raise ValueError(
                "group is set, but torch.distributed was not started: call init_process_group first"
            )
        self.group = group
        self.rank = dist.get_rank(group) if started else 0
        self.size = dist.get_world_size(group) if started else 1
        if self.rank < 0:
            raise ValueError("group does not hold this process; wanted one that it belongs to")

    def is_same_as(self, other: Peers) -> bool:
        """Return whether this is the same group, or both groups consist of this process only."""
        return self.group is other.group or self.size == other.size == 1

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum the tensors of all processes, in place, with bit for bit the same result; one all-reduce."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the elementwise maximum over all processes, in place; one all-reduce."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def gather_rows(self, local: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Concatenate the rows of all processes; one all-gather of blocks that are padded to the largest.

        With one process it returns the block itself.
        """
        if self.size == 1:
            return local
        most, n_columns = max(counts), local.shape[1]
        sent = local.contiguous()
        if len(local) < most:
            sent = torch.cat([sent, sent.new_zeros(most - len(sent), n_columns)])
        gathered = sent.new_empty(self.size * most, n_columns)
        parts = list(torch.split(gathered, most))
        dist.all_gather(parts, sent, group=self.group)
        if min(counts) == most:
            return gathered
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    def exchange(self, error: Exception | None, values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the values of all processes, or raise on all of them if one has an error.

        So no process waits for another one that has failed.

        Raises
        ------
        Exception
            Error of this process.
        RuntimeError
            If another process has an error.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return [values]
        answers: list[Any] = [None] * self.size
        text = None if error is None else f"process {self.rank} said {type(error).__name__}: {error}"
        dist.all_gather_object(answers, (text, dict(values)), group=self.group)
        if error is not None:
            raise error
        for other, _ in answers:
            if other is not None:
                raise RuntimeError(_PEER_FAILED.format(other))
        return [each for _, each in answers]

    def check_equal(self, error: Exception | None, values: Mapping[str, Any]) -> None:
        """Raise on all processes if one has an error, or if their values differ.

        Raises
        ------
        ValueError
            If a value differs; the message names it.
        Exception, RuntimeError
            The errors of `exchange`.
        """
        first, *others = self.exchange(error, values)
        for rank, other in enumerate(others, 1):
            for name, value in other.items():
                if value != first[name]:
                    raise ValueError(
                        f"{name} is {value!r} on process {rank} but {first[name]!r} on process 0; "
                        "wanted the same"
                    )


class RowSharded:
    """A matrix W with its rows distributed over processes; no process stores all of W.

    `SVDTracker.update` accepts it as a matrix, because the tracker only needs products with thin blocks. All
    processes of the group must make the same calls with the same blocks; they get the same results, bit for
    bit.

    Parameters
    ----------
    rows : Tensor, shape (m_i, n)
        Rows of this process, which follow those of the processes of lower rank; m_i may be 0. They are on any
        device that the group's backend supports. float64 and float32 are not copied: later changes of the
        tensor change W. Half precisions are copied to float32.
    group : ProcessGroup, optional
        Group of processes. Default: all processes, or this one if `torch.distributed` was not started.

    Attributes
    ----------
    rows : Tensor, shape (m_i, n)
        Rows of this process.
    start, stop : int
        Index of the first row of this process, and of the first one after them.
    shape : (int, int)
        Shape of W.
    dtype : dtype
        Precision, float64 or float32.
    counts : list of int
        Numbers of rows m_i of all processes.
    peers : Peers
        Processes of the group.

    Raises
    ------
    TypeError
        If `rows` is no tensor of real floating-point numbers, or precisions differ between processes.
    ShapeError
        For a tensor that is no matrix, different numbers of columns, and a matrix without entries.
    RuntimeError
        If another process raises one of these: all processes of the group fail together.

    Notes
    -----
    `matmat` takes one all-gather of the (m_i, p) products, padded to the largest m_i. `rmatmat` takes one
    all-reduce of an (n, p) block. The constructor gathers the shapes.

    Equal results bit for bit need a backend whose all-reduce gives all processes the same sum, such as Gloo
    or NCCL, and machines of one type: the constructor checks that all processes run the same build of the
    core. A missing or dead process is noticed after the timeout of the group,
    ``init_process_group(timeout=...)``, which is 30 minutes by default with Gloo.

    Examples
    --------
    >>> import torch
    >>> import dlnfast as dln
    >>> shard = dln.torch.RowSharded(torch.eye(200, dtype=torch.float64)[:, :150])  # the only process
    >>> record = dln.SVDTracker(k=2).update(shard, squared_norm=shard.squared_norm())
    >>> record.singular_values.round(6).tolist()
    [1.0, 1.0]
    """

    def __init__(self, rows: torch.Tensor, *, group: Any = None) -> None:
        self.peers = Peers(group)
        error: Exception | None = None
        values: dict[str, Any] = {}
        checked: torch.Tensor | None = None
        count = 0
        try:
            checked = _check_rows(rows)
            count = len(checked)
            values = {
                "dtype": get_numpy_dtype(checked.dtype).name,
                "columns": int(checked.shape[1]),
                **_describe_build(),
            }
        except (TypeError, ShapeError) as raised:
            error = raised
        answers = self.peers.exchange(error, {"rows": count, **values})
        self.counts = [int(each["rows"]) for each in answers]
        assert checked is not None
        self._check_equal(answers)
        if sum(self.counts) == 0:
            raise ShapeError("rows are empty on all processes; wanted a matrix with entries")
        self.rows = checked
        self.dtype = get_numpy_dtype(checked.dtype)
        self.shape = (sum(self.counts), int(checked.shape[1]))
        self.start = sum(self.counts[: self.peers.rank])
        self.stop = self.start + count

    @staticmethod
    def _check_equal(answers: list[Mapping[str, Any]]) -> None:
        for rank, each in enumerate(answers):
            for name, kind in (("columns", ShapeError), ("dtype", TypeError), ("core", ValueError)):
                if each[name] != answers[0][name]:
                    raise kind(
                        f"{name} is {each[name]} on process {rank} but {answers[0][name]} on process 0; "
                        "wanted the same"
                    )

    @classmethod
    def from_rows(
        cls,
        source: Any,
        shape: tuple[int, int] | None = None,
        *,
        dtype: npt.DTypeLike | None = None,
        device: torch.device | str | None = None,
        group: Any = None,
    ) -> RowSharded:
        """Distribute a matrix: each of P processes reads about m / P rows of it.

        Parameters
        ----------
        source : array_like, or callable
            Matrix of shape (m, n), such as an array, ``numpy.memmap``, tensor or HDF5 data set, of which only
            the rows of this process are read. Or a function ``source(start, stop)`` that returns the rows
            start .. stop - 1. If each row depends on its index only, the matrix does not depend on the number
            of processes.
        shape : (int, int), optional
            Shape of the matrix; needed if `source` is a function.
        dtype : dtype, optional
            Precision, float64 or float32. Default: that of the source.
        device : str or torch.device, optional
            Device of the rows.
        group : ProcessGroup, optional
            Group of processes, as for `RowSharded`.

        Returns
        -------
        RowSharded
            Matrix with its own copy of the rows. An array that a function returns is not copied if it owns
            its memory.

        Raises
        ------
        ShapeError, TypeError
            The errors of `RowSharded`, and for rows of another shape than requested.
        RuntimeError
            If another process raises an error.

        Examples
        --------
        >>> import numpy as np
        >>> import dlnfast as dln
        >>> def row(i):
        ...     return np.random.default_rng([7, i]).standard_normal(40)
        >>> def rows(start, stop):
        ...     return np.stack([row(i) for i in range(start, stop)])
        >>> dln.torch.RowSharded.from_rows(rows, (100, 40))
        RowSharded(shape (100, 40), float64, rows 0 to 100 on process 0 of 1)
        """
        peers = Peers(group)
        error: Exception | None = None
        local: Any = None
        try:
            m, n = _find_shape(source, shape)
            start, stop = m * peers.rank // peers.size, m * (peers.rank + 1) // peers.size
            if callable(source):
                # A function may not be able to return zero rows, so it is not called for them.
                read = source(start, stop) if stop > start else np.empty((0, n), dtype or np.float64)
            else:
                read = source[start:stop]
            local = _copy_if_shared(read, fresh=callable(source))
            if tuple(local.shape) != (stop - start, n):
                raise ShapeError(
                    f"rows {start} to {stop} of source have shape {tuple(local.shape)}; "
                    f"wanted ({stop - start}, {n})"
                )
            wanted = local.dtype if dtype is None else torch.from_numpy(np.empty(0, dtype=dtype)).dtype
            local = local.to(device=device, dtype=wanted)
        except Exception as raised:  # any error of a source: the other processes wait for this one
            error = raised
        peers.exchange(error, {})
        return cls(local, group=group)

    @classmethod
    def from_dtensor(cls, tensor: Any) -> RowSharded:
        """Make a sharded matrix from a ``torch.distributed.tensor.DTensor``, without a copy.

        Parameters
        ----------
        tensor : DTensor, shape (m, n)
            Tensor with the placement ``Shard(0)`` on a mesh with one axis, such as the parameters of a model
            under ``torch.distributed.fsdp.fully_shard``, outside of its forward and backward pass.

        Returns
        -------
        RowSharded
            Matrix that shares the DTensor's memory: it changes with steps of an optimizer, and
            `train_sharded` changes the model.

        Raises
        ------
        TypeError
            If `tensor` is no DTensor.
        ValueError
            For another placement.
        """
        for name in ("to_local", "placements", "device_mesh"):
            if not hasattr(tensor, name):
                raise TypeError(f"tensor is {type(tensor).__name__}; wanted a DTensor")
        placements, mesh = tuple(tensor.placements), tensor.device_mesh
        # is_shard is also true for `_StridedShard`, whose rows are not in order.
        if len(placements) != 1 or type(placements[0]).__name__ != "Shard" or placements[0].dim != 0:
            raise ValueError(f"tensor has the placements {placements}; wanted (Shard(dim=0),), one axis")
        group = mesh.get_group()
        if list(mesh.get_coordinate()) != [dist.get_rank(group)]:
            raise ValueError("the mesh of tensor numbers processes in another order than their group")
        with torch.no_grad():
            return cls(tensor.to_local(), group=group)

    def __repr__(self) -> str:
        """Return the shape and precision of the matrix, and the rows of this process."""
        return (
            f"RowSharded(shape {self.shape}, {self.dtype}, rows {self.start} to {self.stop} on process "
            f"{self.peers.rank} of {self.peers.size})"
        )

    # ------------------------------------------------------------------------------------- products

    def times(self, block: torch.Tensor) -> torch.Tensor:
        """Return ``W X``, (m, p) on all processes, for X of shape (n, p): one all-gather.

        Parameters
        ----------
        block : Tensor, shape (n, p)
            Block X, the same on all processes.

        Returns
        -------
        Tensor, shape (m, p)
        """
        return self.peers.gather_rows(self.rows @ block, self.counts)

    def transposed_times(self, local: torch.Tensor) -> torch.Tensor:
        """Return ``W^T Y``, (n, p) on all processes, from the rows of Y of each process: one all-reduce.

        Parameters
        ----------
        local : Tensor, shape (rows of this process, p)
            Rows of Y of this process.

        Returns
        -------
        Tensor, shape (n, p)
        """
        return self.peers.sum_(self.rows.T @ local)

    def matmat(self, X: npt.ArrayLike, /) -> FloatArray:
        """Return ``W X`` for X of shape (n, p), the same on all processes: one all-gather.

        Parameters
        ----------
        X : array_like, shape (n, p)
            Block of vectors as columns.

        Returns
        -------
        ndarray, shape (m, p)
        """
        with torch.no_grad():
            return to_host(self.times(to_device(X, self.dtype, self.rows.device)))

    def rmatmat(self, Y: npt.ArrayLike, /) -> FloatArray:
        """Return ``W^T Y`` for Y of shape (m, p), the same on all processes: one all-reduce.

        Parameters
        ----------
        Y : array_like, shape (m, p)
            Block of vectors as columns.

        Returns
        -------
        ndarray, shape (n, p)

        Raises
        ------
        TypeError, ValueError
            If Y is no array, or has missing values.
        """
        local = as_array(Y, "Y")[self.start : self.stop]
        with torch.no_grad():
            return to_host(self.transposed_times(to_device(local, self.dtype, self.rows.device)))

    def squared_norm(self) -> float:
        """Return ``||W||_F^2``, summed in float64: one all-reduce of one number."""
        return float(self.peers.sum_(self.local_norm().square()))

    def local_norm(self) -> torch.Tensor:
        """Return the Frobenius norm of the rows of this process, in float64."""
        norm: torch.Tensor = torch.linalg.vector_norm(self.rows, dtype=torch.float64)
        return norm


def _check_rows(rows: object) -> torch.Tensor:
    if not isinstance(rows, torch.Tensor) or not rows.dtype.is_floating_point:
        what = rows.dtype if isinstance(rows, torch.Tensor) else type(rows).__name__
        raise TypeError(f"rows is {what}; wanted a tensor of real floating-point numbers")
    if hasattr(rows, "placements"):
        raise TypeError("rows is a DTensor; wanted its local rows: RowSharded.from_dtensor")
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ShapeError(f"rows has shape {tuple(rows.shape)}; wanted a matrix (2 axes) with columns")
    checked: torch.Tensor = rows.detach().to(get_torch_dtype(rows.dtype))
    return checked


def _copy_if_shared(read: Any, fresh: bool) -> torch.Tensor:
    """Return rows as a tensor that shares no memory; `fresh` rows that own their memory are not copied."""
    if isinstance(read, torch.Tensor):
        detached: torch.Tensor = read.detach()
        return detached.contiguous() if fresh else detached.clone(memory_format=torch.contiguous_format)
    array = as_array(read, "source")
    is_usable = fresh and array.flags.owndata and array.flags.c_contiguous and array.flags.writeable
    if not (is_usable and array.dtype.isnative):
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(array)


def _describe_build() -> dict[str, str]:
    info = build_info()
    return {"core": f"{info['version']}, {info['level']}"}


def _find_shape(source: Any, shape: tuple[int, int] | None) -> tuple[int, int]:
    if callable(source) and shape is None:
        raise TypeError("source is a callable, but shape is None; wanted the shape of the matrix")
    found = tuple(getattr(source, "shape", ())) if shape is None else tuple(shape)
    if len(found) != 2:
        problem = f"has shape {found}" if hasattr(source, "shape") else f"is {type(source).__name__}"
        raise ShapeError(f"source {problem}; wanted a matrix (2 axes), or a callable and its shape")
    m, n = (check_count(size, "shape") for size in found)
    if not callable(source) and tuple(source.shape) != (m, n):
        raise ShapeError(f"source has shape {tuple(source.shape)}; wanted {(m, n)}")
    return m, n
