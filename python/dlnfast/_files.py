"""Files of arrays: written as a whole or not at all, read without pickle."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ._version import __version__

Arrays = dict[str, npt.NDArray[Any]]
_Content = TypeVar("_Content")


def write_whole(path: Path, arrays: Arrays) -> None:
    """Write beside the final place and rename, so that no half file ever has the name."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_whole(
    path: Path, name: str, version: int, unpack: Callable[[dict[str, Any], Arrays], _Content]
) -> _Content:
    """Return what `unpack` makes of the JSON text "meta" and the arrays of a file.

    Parameters
    ----------
    path : Path
    name : str
        What ``meta["format"]`` has to be.
    version : int
        The largest ``meta["format_version"]`` that `unpack` knows.
    unpack : callable
        Gets both; whatever it raises counts as damage.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not such a file, is damaged, or was written by a newer version.
    """
    with path.open("rb") as stream:  # opened here, because numpy.load leaves a damaged file open
        try:
            if stream.read(4) != b"PK\x03\x04":  # numpy.load would take any other file for a pickle
                raise ValueError("it is not an .npz file")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                if "meta" not in file.files:
                    raise ValueError(f"it is an .npz file of other arrays ({', '.join(file.files)})")
                arrays = {key: file[key] for key in file.files}
            meta = json.loads(str(arrays["meta"]))
            if meta["format"] != name:
                raise ValueError(f"its format is {meta['format']!r}")
            if int(meta["format_version"]) <= version:
                return unpack(meta, arrays)
        except Exception as error:  # what damage makes the readers raise is not foreseeable
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is not a complete file of a {name}: {reason}") from error
    raise ValueError(
        f"{path} has format {meta['format_version']}, written by dlnfast {meta['version']}; "
        f"this is dlnfast {__version__}, which reads formats up to {version}"
    )
