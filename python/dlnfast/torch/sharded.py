# SPDX-License-Identifier: MIT
"""Matrices of which every process holds some rows, as the tracker and the descent see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from .._arrays import FloatArray, as_array, check_count
from .._errors import ShapeError
from .._threads import build_info
from .operators import get_numpy_dtype, get_torch_dtype, to_device, to_host

#: What a process puts in place of its own error where another one has failed.
_ELSEWHERE = "another process of the group failed; {0}"


class Peers:
    """The processes that hold a matrix together, and what they sum and gather; alone without a group.

    Parameters
    ----------
    group : ProcessGroup, optional
        By default all processes, or this one alone where `torch.distributed` was not started.
    """

    def __init__(self, group: Any = None) -> None:
        started = dist.is_available() and dist.is_initialized()
        if group is not None and not started:
            raise ValueError("group was given, but torch.distributed was not started: init_process_group")
        self.group = group
        self.rank = dist.get_rank(group) if started else 0
        self.size = dist.get_world_size(group) if started else 1
        if self.rank < 0:
            raise ValueError("group does not hold this process; wanted one that it belongs to")

    def is_same_as(self, other: Peers) -> bool:
        """Tell whether these are the same processes, for the same messages."""
        return self.group is other.group or self.size == other.size == 1

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add the tensors of all processes up, in place: one all-reduce. The same bits on all of them."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the largest of all processes' numbers, in place: one all-reduce."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def gather_rows(self, local: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Put the blocks of all processes below each other: one all-gather; shards are padded to the largest.

        Alone it is the block itself.
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

    def agree(self, error: Exception | None, facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Raise on all processes where one has an error; otherwise return what each of them says.

        So nobody waits for a process that has given up.

        Raises
        ------
        Exception
            This process's own error.
        RuntimeError
            Where another process has one.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return [facts]
        said: list[Any] = [None] * self.size
        text = None if error is None else f"process {self.rank} said {type(error).__name__}: {error}"
        dist.all_gather_object(said, (text, dict(facts)), group=self.group)
        if error is not None:
            raise error
        for other, _ in said:
            if other is not None:
                raise RuntimeError(_ELSEWHERE.format(other))
        return [each for _, each in said]

    def agree_on(self, error: Exception | None, facts: Mapping[str, Any]) -> None:
        """Raise as `agree` does, and where two processes say different things.

        Raises
        ------
        ValueError
            Naming what differs.
        """
        first, *others = self.agree(error, facts)
        for rank, other in enumerate(others, 1):
            for name, value in other.items():
                if value != first[name]:
                    raise ValueError(
                        f"{name} is {value!r} on process {rank} but {first[name]!r} on process 0; "
                        "wanted the same"
                    )


class RowSharded:
    """One process's rows of a matrix W that no process holds as a whole.

    `SVDTracker.update` takes it for the matrix: products with thin blocks are all that it needs. Every
    process of the group makes the same calls, with the same blocks; all get the same results, to the bit.

    Parameters
    ----------
    rows : Tensor, shape (m_i, n)
        The rows of this process, on any device that the group's backend serves; none (m_i = 0) will do. They
        follow those of the processes before. float64 or float32 is not copied, and what becomes of the tensor
        becomes of W; half precisions are copied to float32.
    group : ProcessGroup, optional
        By default all processes; this one alone where `torch.distributed` was not started.

    Attributes
    ----------
    rows : Tensor, shape (m_i, n)
        Those of this process.
    start, stop : int
        Which they are.
    shape : (int, int)
        Of W.
    dtype : dtype
        float64 or float32.
    counts : list of int
        m_i of all processes.
    peers : Peers
        The group.

    Raises
    ------
    TypeError
        For what is no tensor of real floating-point numbers, or mixed precisions.
    ShapeError
        For no matrix, different numbers of columns, and a matrix without entries.
    RuntimeError
        Where another process raises one of these: all processes of the group fail together.

    Notes
    -----
    `matmat`: one all-gather of the (m_i, p) products, padded to the largest m_i. `rmatmat`: one all-reduce of
    an (n, p) block. Making one gathers the shapes.

    "The same bits" needs a backend whose all-reduce gives all processes the same sum: Gloo and NCCL do. The
    processes run one and the same tracker, so let them be machines of one kind: the group is asked whether
    all run the same build of the core. A process that is not there, or has given up while the others wait for
    it, is noticed after the timeout of the group: ``init_process_group(timeout=...)``, 30 minutes by default
    with Gloo.

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
        facts: dict[str, Any] = {}
        checked: torch.Tensor | None = None
        count = 0
        try:
            checked = _check_rows(rows)
            count = len(checked)
            facts = {
                "dtype": get_numpy_dtype(checked.dtype).name,
                "columns": int(checked.shape[1]),
                **_describe_build(),
            }
        except (TypeError, ShapeError) as raised:
            error = raised
        said = self.peers.agree(error, {"rows": count, **facts})
        self.counts = [int(each["rows"]) for each in said]
        assert checked is not None
        self._check_alike(said)
        if sum(self.counts) == 0:
            raise ShapeError("rows are empty on all processes; wanted a matrix with entries")
        self.rows = checked
        self.dtype = get_numpy_dtype(checked.dtype)
        self.shape = (sum(self.counts), int(checked.shape[1]))
        self.start = sum(self.counts[: self.peers.rank])
        self.stop = self.start + count

    @staticmethod
    def _check_alike(said: list[Mapping[str, Any]]) -> None:
        for rank, each in enumerate(said):
            for name, kind in (("columns", ShapeError), ("dtype", TypeError), ("core", ValueError)):
                if each[name] != said[0][name]:
                    raise kind(
                        f"{name} is {each[name]} on process {rank} but {said[0][name]} on process 0; wanted "
                        "the same"
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
        """Take this process's share of a matrix: about m / P rows on each of P processes.

        Parameters
        ----------
        source : array_like, or callable
            Of shape (m, n): an array, a ``numpy.memmap``, a tensor, an HDF5 data set; no other rows are read.
            Or ``source(start, stop)``, which returns the rows start .. stop - 1. Where each row depends on
            nothing but its number, so does the matrix, whatever the number of processes.
        shape : (int, int), optional
            Of the matrix; a callable needs it.
        dtype : dtype, optional
            float64 or float32; that of the source by default.
        device : str or torch.device, optional
            Where the rows go.
        group : ProcessGroup, optional
            As for `RowSharded`.

        Returns
        -------
        RowSharded
            On memory of its own; an array that a callable returns is kept where it is no view.

        Raises
        ------
        ShapeError, TypeError
            As `RowSharded`; for rows that are not of the shape that was asked for.
        RuntimeError
            Where another process raises.

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
                # Not asked for no rows: there may be no way to make an array of them.
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
        except Exception as raised:  # whatever a source may raise: the other processes wait for this one
            error = raised
        peers.agree(error, {})
        return cls(local, group=group)

    @classmethod
    def from_dtensor(cls, tensor: Any) -> RowSharded:
        """Take the local rows of a ``torch.distributed.tensor.DTensor``, without a copy.

        Parameters
        ----------
        tensor : DTensor, shape (m, n)
            Placed as ``Shard(0)`` on a mesh with one axis: the parameters of a model under
            ``torch.distributed.fsdp.fully_shard``, outside of its forward and backward pass.

        Returns
        -------
        RowSharded
            Its `rows` are the DTensor's: what the optimizer does is seen, and what `train_sharded` does is
            done to the model.

        Raises
        ------
        TypeError
            For what is no DTensor.
        ValueError
            For another placement.
        """
        for name in ("to_local", "placements", "device_mesh"):
            if not hasattr(tensor, name):
                raise TypeError(f"tensor is {type(tensor).__name__}; wanted a DTensor")
        placements, mesh = tuple(tensor.placements), tensor.device_mesh
        # `_StridedShard`, of a mesh that is cut twice, says is_shard too, and its rows are not in order.
        if len(placements) != 1 or type(placements[0]).__name__ != "Shard" or placements[0].dim != 0:
            raise ValueError(f"tensor is placed as {placements}; wanted (Shard(dim=0),), one axis")
        group = mesh.get_group()
        if list(mesh.get_coordinate()) != [dist.get_rank(group)]:
            raise ValueError("the mesh of tensor counts processes in another order than their group")
        with torch.no_grad():
            return cls(tensor.to_local(), group=group)

    def __repr__(self) -> str:
        """Return the matrix, and which rows are here."""
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
            X, the same on all processes.

        Returns
        -------
        Tensor, shape (m, p)
        """
        return self.peers.gather_rows(self.rows @ block, self.counts)

    def transposed_times(self, local: torch.Tensor) -> torch.Tensor:
        """Return ``W^T Y``, (n, p) on all processes, for this one's rows of Y: one all-reduce.

        Parameters
        ----------
        local : Tensor, shape (rows of this process, p)
            This process's rows of Y.

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

        Returns
        -------
        ndarray, shape (n, p)

        Raises
        ------
        TypeError, ValueError
            For what is no array, or has missing values.
        """
        local = as_array(Y, "Y")[self.start : self.stop]
        with torch.no_grad():
            return to_host(self.transposed_times(to_device(local, self.dtype, self.rows.device)))

    def squared_norm(self) -> float:
        """Return ``||W||_F^2``, summed in float64: one all-reduce of one number."""
        return float(self.peers.sum_(self.local_norm().square()))

    def local_norm(self) -> torch.Tensor:
        """Return the Frobenius norm of this process's rows, in float64."""
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
    """Return rows on memory that nobody else writes to: without a copy where they were made for this."""
    if isinstance(read, torch.Tensor):
        detached: torch.Tensor = read.detach()
        return detached.contiguous() if fresh else detached.clone(memory_format=torch.contiguous_format)
    array = as_array(read, "source")
    kept = fresh and array.flags.owndata and array.flags.c_contiguous and array.flags.writeable
    if not (kept and array.dtype.isnative):
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(array)


def _describe_build() -> dict[str, str]:
    info = build_info()
    return {"core": f"{info['version']}, {info['level']}"}


def _find_shape(source: Any, shape: tuple[int, int] | None) -> tuple[int, int]:
    if callable(source) and shape is None:
        raise TypeError("source is a callable; wanted the shape of the matrix beside it")
    found = tuple(getattr(source, "shape", ())) if shape is None else tuple(shape)
    if len(found) != 2:
        what = f"has shape {found}" if hasattr(source, "shape") else f"is {type(source).__name__}"
        raise ShapeError(f"source {what}; wanted a matrix (2 axes), or a callable and its shape")
    m, n = (check_count(size, "shape") for size in found)
    if not callable(source) and tuple(source.shape) != (m, n):
        raise ShapeError(f"source has shape {tuple(source.shape)}; wanted {(m, n)}")
    return m, n
