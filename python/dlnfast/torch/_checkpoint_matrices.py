# SPDX-License-Identifier: MIT
"""Matrices of checkpoints and adapters: which there are, and how each one is read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import torch

from .._support.arrays import FloatArray, is_finite
from .._support.errors import ShapeError
from ._checkpoint_adapters import LoRAFolder
from ._checkpoint_files import (
    Checkpoint,
    CheckpointLike,
    LazyTensors,
    StateDict,
    is_adapter,
    open_file,
)
from ._names import format_names, is_match, match_names, strip_wrapper_parts
from ._safetensors import TensorInfo
from .operators import get_numpy_dtype, matrix_to_host

Of = Literal["weights", "change", "step"]

#: Names, globs, a regular expression, a sequence of them, or None for all.
NameChoice = str | re.Pattern[str] | Sequence["str | re.Pattern[str]"] | None

#: Returns a quantised tensor, by its name in the checkpoint, as real numbers, or None to skip it.
Dequantize = Callable[[str, Mapping[str, torch.Tensor]], torch.Tensor | None]

_READABLE: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Rows times columns of the blocks in which an update is added to its base.
_BLOCK: Final = 2**20


# --------------------------------------------------------------------------------------------------
# Checkpoints as sources of matrices
# --------------------------------------------------------------------------------------------------


class Source(Protocol):
    """The matrices of one checkpoint."""

    label: str

    @property
    def makes_copies(self) -> bool:
        """Whether `read` returns arrays that nobody else refers to."""
        ...

    def read(self, matrix: CheckpointMatrix) -> FloatArray:
        """Return a matrix as an array, which may be a view of the caller's tensors."""
        ...

    def release(self) -> None:
        """Unmap all files."""
        ...


@dataclass(frozen=True)
class CheckpointMatrix:
    """A matrix in all checkpoints.

    Attributes
    ----------
    name : str
        Name of the layer.
    tensor : str
        Name of the tensor in the first checkpoint, or of the layer in an adapter.
    shape : (int, int)
        Rows and columns.
    dtype : dtype
        Precision in which it is tracked.
    rank : int or None
        Rank of the update of an adapter; None for a matrix that is stored as a whole.
    """

    name: str
    tensor: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    rank: int | None = None

    def is_product(self, of: Of) -> bool:
        """Return whether the matrix of this kind is known by its factors."""
        return self.rank is not None and of != "weights"

    def find_highest_rank(self, of: Of) -> int:
        """Return the largest possible rank of the matrix of this kind."""
        if self.rank is None or of == "weights":
            return min(self.shape)
        return min(*self.shape, self.rank * (2 if of == "step" else 1))


class _Stored:
    """A checkpoint whose tensors are the matrices."""

    def __init__(self, checkpoint: Checkpoint, dequantize: Dequantize | None) -> None:
        self.label = checkpoint.label
        self._checkpoint = checkpoint
        self._dequantize = dequantize
        #: Names of the tensors in this checkpoint, by those in the first one.
        self.names: dict[str, str] = {}
        self.skipped: list[str] = []
        self.matrices: dict[str, TensorInfo] = {}
        for name, info in checkpoint.tensors.items():
            self._add(name, info)

    def _add(self, name: str, info: TensorInfo) -> None:
        if info.dtype in _READABLE:
            if len(info.shape) >= 2 and min(info.shape) > 0:
                self.matrices[name] = info
            return
        if len(info.shape) < 2:
            return
        values = self._convert(name) if self._dequantize is not None else None
        if values is None:
            self.skipped.append(name)
        elif values.ndim >= 2 and values.numel():
            self.matrices[name] = TensorInfo(tuple(values.shape), values.dtype)

    def _convert(self, name: str) -> torch.Tensor | None:
        assert self._dequantize is not None
        values = self._dequantize(name, LazyTensors(self._checkpoint))
        if values is not None and (not isinstance(values, torch.Tensor) or values.dtype not in _READABLE):
            kind = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
            raise TypeError(
                f"dequantize returned {kind} for {name}; wanted a tensor of real numbers, or None"
            )
        return values

    @property
    def makes_copies(self) -> bool:
        return self._checkpoint.makes_copies and self._dequantize is None

    def find_name(self, tensor: str) -> str:
        """Return the name in this checkpoint of a tensor of the first one."""
        return self.names.get(tensor, tensor)

    def read(self, matrix: CheckpointMatrix) -> FloatArray:
        name = self.find_name(matrix.tensor)
        is_stored = self._checkpoint.tensors[name].dtype in _READABLE
        values = self._checkpoint.read(name) if is_stored else self._convert(name)
        if values is None or tuple(values.shape) != self.matrices[name].shape:
            raise ValueError(f"checkpoint {self.label}: dequantize returned another shape for {name}")
        array = matrix_to_host(values.reshape(matrix.shape))
        array = np.ascontiguousarray(array, dtype=matrix.dtype)
        if not is_finite(array):
            raise ValueError(f"checkpoint {self.label}: tensor {name} has values that are not finite")
        return array

    def release(self) -> None:
        self._checkpoint.release()


class _Adapted:
    """An adapter over its base, if there is one."""

    @property
    def makes_copies(self) -> bool:
        return True

    def __init__(self, adapter: LoRAFolder, base: _Stored | None) -> None:
        self.label = adapter.label
        self.adapter = adapter
        self._base = base

    def read(self, matrix: CheckpointMatrix) -> FloatArray:
        assert self._base is not None
        left, right = self.read_factors(matrix)
        weights = np.array(self._base.read(matrix))
        rows = max(1, _BLOCK // matrix.shape[1])
        for first in range(0, len(weights), rows):  # in float64, without a whole product
            block = weights[first : first + rows]
            product = left[first : first + rows] @ right
            block[...] = block + product.numpy()
        return weights

    def read_factors(self, matrix: CheckpointMatrix) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of the update in float64."""
        return self.adapter.read_factors(matrix.tensor)

    def release(self) -> None:
        self.adapter.file.release()
        if self._base is not None:
            self._base.release()


@dataclass(frozen=True)
class Sources:
    """The checkpoints, all of one kind, and the base."""

    stored: tuple[_Stored, ...]
    adapted: tuple[_Adapted, ...]
    base: _Stored | None

    @property
    def all(self) -> Sequence[Source]:
        """Checkpoints in their order, without the base."""
        return self.stored or self.adapted


def open_sources(
    entries: list[CheckpointLike], base: CheckpointLike | None, key: str | None, dequantize: Dequantize | None
) -> Sources:
    """Open all checkpoints."""

    def open_stored(entry: CheckpointLike, label: str) -> _Stored:
        if isinstance(entry, Mapping):
            return _Stored(StateDict(entry, label, key), dequantize)
        return _Stored(open_file(Path(entry), key), dequantize)

    if base is not None and not isinstance(base, (str, os.PathLike, Mapping)):
        raise TypeError(f"base is {type(base).__name__}; wanted a path or a state dict")
    if base is not None and not isinstance(base, Mapping) and is_adapter(Path(base)):
        raise ValueError(f"base is the adapter {os.fspath(base)}; wanted the checkpoint of a model")
    below = None if base is None else open_stored(base, "base")
    are_adapters = [not isinstance(entry, Mapping) and is_adapter(Path(entry)) for entry in entries]
    if any(are_adapters) and not all(are_adapters):
        other = entries[are_adapters.index(False)]
        label = "a state dict" if isinstance(other, Mapping) else os.fspath(other)
        raise ValueError(f"paths holds adapters, and {label}, which is none; wanted one kind")
    if all(are_adapters):
        folders = [LoRAFolder(Path(entry)) for entry in entries if not isinstance(entry, Mapping)]
        return Sources((), tuple(_Adapted(folder, below) for folder in folders), below)
    stored = tuple(open_stored(entry, f"state dict {i}") for i, entry in enumerate(entries))
    return Sources(stored, (), below)


# --------------------------------------------------------------------------------------------------
# Choice of matrices
# --------------------------------------------------------------------------------------------------


def find_matrices(
    sources: Sources, layers: NameChoice, kinds: tuple[Of, ...]
) -> tuple[list[CheckpointMatrix], list[str]]:
    """Return the chosen matrices, and the names of those that cannot be read."""
    if sources.adapted:
        return _find_adapted(sources, layers, kinds), []
    first = sources.stored[0]
    names = _shorten_names(list(first.matrices))
    chosen = _choose_names(layers, names, first.label)
    skipped = [name.removesuffix(".weight") for name in first.skipped]
    if layers is not None:
        skipped = [name for name in skipped if any(is_match(name, each) for each in _list_choices(layers))]
    for other in sources.stored[1:]:
        other.names = match_names(chosen.values(), other.matrices)
        _check_names(chosen, other, other.names)
        if layers is None:
            matched = set(other.names.values())
            surplus = [name for name in other.matrices if name not in matched]
            if surplus:
                raise ValueError(
                    f"checkpoint {other.label} has matrices that {first.label} lacks: "
                    f"{format_names(surplus)}; choose matrices by layers="
                )
    bases = []
    if sources.base is not None and "change" in kinds:
        sources.base.names = _match_base(chosen.values(), sources.base.matrices)
        _check_names(chosen, sources.base, sources.base.names)
        bases.append(sources.base)
    matrices = []
    for name, tensor in chosen.items():
        infos = [(each.label, each.matrices[each.find_name(tensor)]) for each in (*sources.stored, *bases)]
        matrices.append(_combine(name, tensor, infos))
    return matrices, skipped


def _find_adapted(sources: Sources, layers: NameChoice, kinds: tuple[Of, ...]) -> list[CheckpointMatrix]:
    """Return the chosen updates of adapters."""
    first = sources.adapted[0].adapter
    chosen = _choose_names(layers, {name: name for name in first.updates}, first.label)
    for source in sources.adapted:
        found = source.adapter
        missing = [name for name in chosen if name not in found.updates]
        if missing:
            raise ValueError(
                f"checkpoint {found.label} lacks matrices of {first.label}: {format_names(missing)}"
            )
        for name in chosen:
            shape, wanted = found.updates[name].shape, first.updates[name].shape
            if shape != wanted:
                raise ShapeError(
                    f"checkpoint {found.label}: update {name} has shape {shape}; wanted {wanted}"
                )
    base = sources.base if "weights" in kinds else None
    matrices = []
    if base is not None:
        full = _shorten_names(list(base.matrices))
        base.names = {name: full[short] for name, short in _match_base(chosen, full).items()}
        _check_names(chosen, base, base.names)
    for name in chosen:
        rank = max(source.adapter.updates[name].rank for source in sources.adapted)
        shape, dtype = first.updates[name].shape, np.dtype(np.float32)
        if base is not None:
            matrix = _combine(name, name, [(base.label, base.matrices[base.find_name(name)])])
            if matrix.shape != shape:
                raise ShapeError(f"base {base.label}: {name} has shape {matrix.shape}; wanted {shape}")
            dtype = matrix.dtype
        matrices.append(CheckpointMatrix(name, name, shape, dtype, rank))
    return matrices


def _combine(name: str, tensor: str, infos: list[tuple[str, TensorInfo]]) -> CheckpointMatrix:
    """Return the matrix that is stored in several checkpoints, in the most precise of their types."""
    label, first = infos[0]
    for other, info in infos[1:]:
        if info.shape != first.shape:
            raise ShapeError(
                f"checkpoint {other}: {name} has shape {info.shape}; wanted {first.shape}, as in {label}"
            )
    types = [get_numpy_dtype(info.dtype) for _, info in infos if info.dtype is not None]
    rows = first.shape[0]
    return CheckpointMatrix(name, tensor, (rows, int(np.prod(first.shape[1:]))), np.result_type(*types))


def _shorten_names(tensors: list[str]) -> dict[str, str]:
    """Return the tensors by the names of their layers, without ".weight" where that is unique."""
    names: dict[str, str] = {}
    for tensor in tensors:
        short = tensor.removesuffix(".weight")
        names[tensor if short != tensor and short in (*names, *tensors) else short] = tensor
    return names


def _list_choices(layers: NameChoice) -> Sequence[object]:
    if isinstance(layers, (str, re.Pattern)):
        return [layers]
    if not isinstance(layers, Sequence):
        raise TypeError(
            f"layers is {type(layers).__name__}; wanted a name, a glob, a compiled regular expression, or a "
            "sequence of them"
        )
    return layers


def _choose_names(layers: NameChoice, names: Mapping[str, str], label: str) -> dict[str, str]:
    """Return the chosen names with their tensors, in the order of the checkpoint."""
    if not names:
        raise ValueError(f"checkpoint {label} has no matrices of real floating-point numbers")
    if layers is None:
        return dict(names)
    chosen: set[str] = set()
    for choice in _list_choices(layers):
        found = {name for name, tensor in names.items() if is_match(name, choice) or is_match(tensor, choice)}
        if not found and isinstance(choice, str):
            found = {name for name in names if is_match(strip_wrapper_parts(name), choice)}
        if not found:
            wanted = choice.pattern if isinstance(choice, re.Pattern) else choice
            available = format_names(list(names))
            raise ValueError(
                f"layers: {wanted!r} fits none of the matrices in checkpoint {label}: {available}"
            )
        chosen |= found
    if not chosen:
        raise ValueError("layers is empty; wanted at least one name")
    return {name: tensor for name, tensor in names.items() if name in chosen}


def _match_base(wanted: Any, available: Mapping[str, Any]) -> dict[str, str]:
    """Map names to those in the base, which may have one more prefix, or one less, as of a head's model."""
    found = match_names(wanted, available)
    for name in wanted:
        if name not in found:
            near = [other for other in available if other.endswith(f".{name}") or name.endswith(f".{other}")]
            if len(near) == 1:
                found[name] = near[0]
    return found


def _check_names(chosen: Mapping[str, str], other: _Stored, names: Mapping[str, str]) -> None:
    missing = [name for name, tensor in chosen.items() if tensor not in names]
    if missing:
        raise ValueError(
            f"checkpoint {other.label} lacks the matrices {format_names(missing)}; choose others by layers="
        )
