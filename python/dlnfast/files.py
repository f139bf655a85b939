# SPDX-License-Identifier: MIT
"""Files of arrays that appear whole or not at all: .npz and JSON, no pickle."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ._version import __version__

Arrays = dict[str, npt.NDArray[Any]]

#: A name that `placing` yields: that of the final place, the process, and a random number.
_PART = re.compile(r"(?P<name>.+)\.\d+\.[0-9a-f]{8}\.part")


class DamagedFileError(ValueError):
    """What a file holds is not what was written; reading it again would not help."""


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Write beside the final place and rename, so that no half file ever has the name.

    Parameters
    ----------
    path : Path
    durable : bool
        Have the content on the disk before it gets its name: then the name is there only with the content,
        whatever happens to the machine.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist.
    """
    with placing(path) as temporary, temporary.open("wb") as file:
        yield file
        if durable:
            file.flush()
            os.fsync(file.fileno())
    if durable:
        _flush_folder(path.parent)


@contextmanager
def placing(path: Path) -> Iterator[Path]:
    """Yield a name beside the final place; the file or folder of that name is renamed, or removed on errors.

    Parameters
    ----------
    path : Path

    Raises
    ------
    FileNotFoundError
        If the folder does not exist.
    """
    if not path.name or path.name == "..":
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Put the name on the disk too; not every system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_parts(folder: Path, names: re.Pattern[str]) -> None:
    """Remove the unfinished files that killed writers have left in a folder.

    Only for who holds the lock of the folder: an unfinished file may be that of a living writer.

    Parameters
    ----------
    folder : Path
    names : Pattern
        Matches the names of the files that only the owner of the folder writes.
    """
    for name in os.listdir(folder):
        found = _PART.fullmatch(name)
        if found is not None and names.fullmatch(found["name"]):
            (folder / name).unlink(missing_ok=True)


@contextmanager
def naming_damage(path: Path, kind: str) -> Iterator[None]:
    """Turn what a reader raises in the block into a `DamagedFileError` that names the file and its kind.

    Errors of the machine pass as they are: the same file may be read well a moment later.
    """
    outside = sys.exception()
    try:
        yield
    except Exception as error:  # what damage makes the readers raise is not foreseeable
        # zipfile hides an error of the disk behind one of the content.
        cause: BaseException | None = error
        while cause is not None and cause is not outside:
            if is_of_the_machine(cause):
                raise cause from None
            cause = cause.__context__
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise DamagedFileError(f"{path} is not a complete file of a {kind}: {reason}") from error


def is_of_the_machine(error: BaseException) -> bool:
    """Return whether an error says something of the machine, not of the file or the request.

    Such are full disks, failing or unreachable ones, missing rights, and too little memory.
    """
    if isinstance(error, OSError):
        # Readers of damaged files seek to impossible places (EINVAL), or raise OSErrors of their own.
        return error.errno not in (None, errno.EINVAL)
    return isinstance(error, MemoryError)


def write_text_whole(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text file whole."""
    with replacing(path, durable=durable) as file:
        file.write(text.encode())


def write_whole(path: Path, kind: str, version: int, about: Mapping[str, Any], arrays: Arrays) -> None:
    """Write arrays and what is known about them, of a format with a name and a version."""
    meta = {"format": kind, "format_version": version, "version": __version__, **about}
    with replacing(path) as file:
        np.savez(file, **arrays, meta=np.array(json.dumps(meta)))  # type: ignore[arg-type]


def read_whole(path: Path, kind: str, version: int) -> tuple[dict[str, Any], Arrays]:
    """Return what `write_whole` wrote: what is known about the arrays, and the arrays.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is another kind of file, is damaged, or was written by a newer version.
    """
    with path.open("rb") as stream, naming_damage(path, kind):
        if stream.read(4) != b"PK\x03\x04":
            raise ValueError("it is not an .npz file")
        stream.seek(0)
        with zipfile.ZipFile(stream) as file:
            arrays = {name.removesuffix(".npy"): _member(file, name) for name in file.namelist()}
        if "meta" not in arrays:
            raise ValueError(f"it is an .npz file of other arrays ({', '.join(arrays)})")
        meta: dict[str, Any] = json.loads(str(arrays.pop("meta")))
        if meta["format"] != kind:
            raise ValueError(f"its format is {meta['format']!r}")
        if int(meta["format_version"]) <= version:
            return meta, arrays
    raise ValueError(
        f"{path} has format {meta['format_version']}, written by dlnfast {meta['version']}; this is dlnfast "
        f"{__version__}, which reads formats up to {version}"
    )


def _member(file: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """Return an array of an .npz file.

    numpy.load stops where the array ends that the header declares. A header that a flipped bit has made
    shorter then goes unnoticed: the checksum is compared at the end of the member only.
    """
    with file.open(name) as member:
        array: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):
            raise ValueError(f"{name} is longer than its array")
    return array
