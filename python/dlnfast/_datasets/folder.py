# SPDX-License-Identifier: MIT
"""The folder of the data sets, .npz files in it, and the error about missing files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .._support.arrays import check_path
from .._support.files import ARCHIVE_ERRORS, read_arrays


def npz_file(root: Path, name: str) -> Path:
    """Return the path of an .npz file: `root` itself if it is one, otherwise `name` in the folder `root`."""
    return root if root.suffix == ".npz" else root / name


def missing_data_error(
    title: str, root: Path, split: str, searched: Sequence[str], source: str
) -> FileNotFoundError:
    """Return the error that lists the searched paths and says where to download the files."""
    return FileNotFoundError(
        f"no {title} ({split}) at {root}; looked for {'; '.join(searched)}. Download {source}"
    )


def data_root(path: str | os.PathLike[str] | None, wanted: str) -> Path:
    """Return `path`, or by default the environment variable ``DLNFAST_DATA``.

    Raises
    ------
    FileNotFoundError
        If neither is set; `wanted` names the files in the message.
    """
    chosen = os.environ.get("DLNFAST_DATA") if path is None else path
    if chosen is None or (isinstance(chosen, str) and not chosen):
        raise FileNotFoundError(
            "no data folder: path is None and the environment variable DLNFAST_DATA is not set; wanted the "
            f"folder of {wanted}"
        )
    return check_path(chosen, "path")


def read_npz(path: Path, *keys: str) -> tuple[npt.NDArray[Any], ...]:
    """Read the arrays with these names; raise ValueError if the file is damaged or lacks one."""
    try:
        arrays = read_arrays(path, keys)
    except ARCHIVE_ERRORS as error:
        names = f"{', '.join(keys[:-1])} and {keys[-1]}"
        raise ValueError(f"{path} cannot be read as an .npz file with {names}: {error}") from error
    return tuple(arrays[key] for key in keys)
