# SPDX-License-Identifier: MIT
"""Reader of safetensors files, one tensor at a time, without the package of that name.

A file is the size of its header in 8 bytes, little-endian; the header, a JSON object that maps names to
types, shapes and positions; and the data.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from .._support.files import parse_object, translate_read_errors

_KIND: Final = "safetensors checkpoint"
#: Key of the metadata, which is not a tensor.
METADATA: Final = "__metadata__"
#: Names of the types in a header, as far as PyTorch has them.
_DTYPES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a stored tensor; the type is None if PyTorch has no such type."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


def parse_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file of `size` bytes; return it with the position of the data.

    Raises
    ------
    ValueError
        If it is not a safetensors file.
    """
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise ValueError("it is no safetensors file")
    return parse_object(file.read(length).decode()), 8 + length


def allocate(length: int) -> torch.Tensor:
    """Return new memory as a tensor of bytes, in pages of its own.

    Pages go back to the system at once. The heap, in which many large tensors of different sizes leave gaps,
    would keep several times the memory of the largest one.
    """
    return torch.frombuffer(mmap.mmap(-1, max(length, 1)), dtype=torch.uint8)[:length]


class SafetensorsFile:
    """The tensors of one safetensors file, of which each is read on its own.

    Parameters
    ----------
    path : Path
        File to read.

    Raises
    ------
    DamagedFileError
        If the header does not describe the file.
    """

    makes_copies = True

    def __init__(self, path: Path) -> None:
        self.label = os.fspath(path)
        self._path = path
        self._positions: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        with translate_read_errors(path, _KIND), path.open("rb") as file:
            size = path.stat().st_size
            header, start = parse_header(file, size)
            header.pop(METADATA, None)
            for name, entry in header.items():
                self._add(name, entry, start, size)

    def _add(self, name: str, entry: Mapping[str, Any], start: int, size: int) -> None:
        shape = tuple(int(n) for n in entry["shape"])
        first, last = (int(n) for n in entry["data_offsets"])
        dtype = getattr(torch, _DTYPES.get(str(entry["dtype"]), ""), None)
        is_inside = 0 <= first <= last <= size - start and min(shape, default=0) >= 0
        if not is_inside or (dtype is not None and last - first != math.prod(shape) * dtype.itemsize):
            raise ValueError(f"tensor {name} is {entry['dtype']} {list(shape)} in bytes {first} to {last}")
        self.tensors[name] = TensorInfo(shape, dtype)
        self._positions[name] = start + first, last - first

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of the file, as a new one.

        Raises
        ------
        DamagedFileError
            If the file has become shorter.
        """
        position, length = self._positions[name]
        info = self.tensors[name]
        content = allocate(length)
        with translate_read_errors(self._path, _KIND), self._path.open("rb") as file:
            file.seek(position)
            if length and file.readinto(content.numpy().data) != length:
                raise ValueError(f"it ends within tensor {name}")
        if info.dtype is None:
            return content
        return content.view(info.dtype).reshape(info.shape)

    def release(self) -> None:
        """Do nothing: no part of the file is held in memory."""
