# SPDX-License-Identifier: MIT
"""Files of `torch.save` with states of plain values and tensors, read with errors that say what failed."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import torch

from .._support.checksums import check_state_checksum
from .._support.files import is_machine_error

#: Errors of torch.load for files that are damaged, or have other content.
_UNREADABLE: Final = (
    RuntimeError,
    OSError,
    EOFError,
    pickle.UnpicklingError,
    TypeError,
    KeyError,
    ValueError,
)


def read_state_file(path: Path, kind: str, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the state in a file of `torch.save`, after a check of its checksum if it has one.

    Parameters
    ----------
    path : Path
    kind : str
        What the file holds, for the error.
    device : torch.device or str
        Where the tensors are put.

    Raises
    ------
    ValueError
        If the file is damaged or has other content. An error of the machine, such as a failing disk, is
        raised as it came.
    """
    try:
        with path.open("rb") as file:
            content = torch.load(cast(BinaryIO, _Readable(file)), map_location=device, weights_only=True)
        if not isinstance(content, dict):
            raise TypeError("it has other content")
        check_state_checksum(content)
    except _UNREADABLE as error:
        if is_machine_error(error):
            raise
        raise ValueError(f"{path} cannot be read as {kind}: {describe_load_error(error)}") from error
    return content


def describe_load_error(error: Exception) -> str:
    """Return the reason why `torch.load` refused a file, in one line.

    PyTorch advises to load objects of Python with ``weights_only=False``, which runs code in the file.
    """
    if not isinstance(error, pickle.UnpicklingError):
        return str(error).partition("\n")[0]
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found is None:
        return "it has another format"
    return f"it holds an object {found[1]}, not only tensors; save model.state_dict() instead of the model"


class _Readable:
    """A file for `torch.load` that offers no ``readinto``.

    If ``readinto`` fails, PyTorch calls ``read`` while the error is still set, and what is raised then may be
    any other error.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.readline, self.seek, self.tell = file.read, file.readline, file.seek, file.tell
