# SPDX-License-Identifier: MIT
"""The folder that holds data sets, and errors about missing files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt

from .._support.arrays import check_path
from .._support.files import ARCHIVE_ERRORS, read_arrays

FASHION_NPZ: Final = "fashion_mnist_full.npz"


def npz_file(root: Path, name: str) -> Path:
    return root if root.suffix == ".npz" else root / name


def missing_data(title: str, root: Path, split: str, places: Sequence[str], source: str) -> FileNotFoundError:
    """Return the error that says where files were looked for, and where they are to be had."""
    return FileNotFoundError(
        f"no {title} ({split}) at {root}; looked for {'; '.join(places)}. Download {source}"
    )


_FASHION_FILES: Final = f"{FASHION_NPZ}, FashionMNIST/raw/*-ubyte(.gz) or the parquet files of Fashion-MNIST"


def data_root(path: str | os.PathLike[str] | None, holds: str = _FASHION_FILES) -> Path:
    """Return the folder or file that is meant: the environment variable ``DLNFAST_DATA`` by default."""
    chosen = os.environ.get("DLNFAST_DATA") if path is None else path
    if chosen is None or (isinstance(chosen, str) and not chosen):
        raise FileNotFoundError(
            "path is not given and the environment variable DLNFAST_DATA is not set: name the folder that "
            f"holds {holds}"
        )
    return check_path(chosen, "path")


def read_npz(path: Path, *keys: str) -> tuple[npt.NDArray[Any], ...]:
    try:
        arrays = read_arrays(path, keys)
    except ARCHIVE_ERRORS as error:
        listed = f"{', '.join(keys[:-1])} and {keys[-1]}"
        raise ValueError(f"{path} cannot be read as an .npz file with {listed}: {error}") from error
    return tuple(arrays[key] for key in keys)
