# SPDX-License-Identifier: MIT
"""Read and write files: .npz archives of arrays and JSON without pickle, and text.

Writing: a file appears whole or not at all (`placing`). Reading: sizes are checked before memory is taken,
and the content of an archive is compared with the digest that it was written with (`read_whole`).
"""

from __future__ import annotations

import codecs
import ctypes
import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from .._version import __version__

Arrays = dict[str, npt.NDArray[Any]]

#: Kinds of dtypes that arrays in files may have: booleans, numbers and text.
_KINDS: Final = "biufcSU"
#: Members of an archive may take this many times its size once they are read, or `_FREE_BYTES`: with what
#: checks need beside them, three times.
_EXPANSION: Final = 2.75
_FREE_BYTES: Final = 2**25
#: An archive's table of contents may take this many bytes, or a third of the archive.
_DIRECTORY_BYTES: Final = 2**21
_HEADER_BYTES: Final = 10_000
_BLOCK: Final = 2**20
#: Times that the removal of an unfinished file is tried.
_ATTEMPTS: Final = 3
#: What readers raise for archives that are damaged, or lack an array.
ARCHIVE_ERRORS: Final = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    RuntimeError,  # encrypted members
    OverflowError,
)
#: Under this name the metadata hold the digest of all members.
_DIGEST: Final = "digest"
_CHECKSUM: Final = "checksum"
_HAS_CHECKSUM: Final = "has_checksum"
#: A name that `placing` yields: that of the final place, the process, and a random number.
_PART = re.compile(r"(?P<name>.+)\.\d+\.[0-9a-f]{8}\.part")


class DamagedFileError(ValueError):
    """What a file holds is not what was written; reading it again would not help."""


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Write beside the final place and rename, so that no half file ever has the name: see `placing`.

    Parameters
    ----------
    path : Path
    durable : bool
        Have the content on the disk before it gets its name: then the name is there only with the content,
        whatever happens to the machine.

    Raises
    ------
    OSError
        If the file cannot be written: `placing` names the cases.
    """
    with placing(path, durable=durable) as temporary, temporary.open("wb") as file:
        yield file
        if durable:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def placing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a name beside the final place; the file or folder of that name is renamed, or removed on errors.

    A symbolic link stays: its target is replaced. A device, a FIFO and a descriptor (``/dev/stdout``) stay
    too: the content is copied into them once it is complete. A file that is replaced hands its permissions
    on; other names of it (hard links) keep the old content.

    Parameters
    ----------
    path : Path
    durable : bool
        Flush the folder to the disk after the file has its name.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist.
    IsADirectoryError
        If the path names no file, as ``.`` does, or a folder where a file is written.
    PermissionError
        If the folder, or the file that is there, may not be written.
    OSError
        If the name is too long, or the disk is full.
    """
    if not path.name or path.name == "..":
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    if _is_written_into(path):
        with _copying_into(path) as temporary:
            yield temporary
        return
    target = _target_of(path)
    _check_writable(target)
    temporary = _temporary_name(target)
    try:
        yield temporary
        if temporary.is_dir() and target.is_dir():
            _exchange_folders(temporary, target)
        elif target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        else:
            _copy_permissions(target, temporary)
            temporary.replace(target)
    finally:
        _remove(temporary)
    if durable:
        _flush_folder(target.parent)


def _is_written_into(path: Path) -> bool:
    """Return whether a path is a device, a FIFO, a socket or an open descriptor."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return True
    # The descriptor of a regular file: a new file of its name would not be the one that is open.
    place = path
    while place.is_symlink():
        if Path(os.path.realpath(place.parent)).parts[1:2] == ("proc",):
            return True
        place = place.parent / os.readlink(place)
    return False


@contextmanager
def _copying_into(path: Path) -> Iterator[Path]:
    """Yield a temporary name; what is written there is copied into a device or FIFO."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "content"
        yield temporary
        if temporary.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a folder cannot be written into it", str(path))
        # Whoever has a regular file open as /dev/stdout goes on behind what is written here.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        with temporary.open("rb") as source, os.fdopen(descriptor, "wb") as file:
            shutil.copyfileobj(source, file, _BLOCK)


def _target_of(path: Path) -> Path:
    """Return the file that a path stands for, symbolic links followed, and check that there is a place."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, "its symbolic links go round in circles", str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"it is a symbolic link to {target}, whose folder does not exist", str(path)
        )
    return target


def _check_writable(target: Path) -> None:
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "the folder cannot be written to", str(target.parent))
    if target.is_file() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the file that is there is read-only", str(target))


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, ValueError, OSError):
        return 255


def _temporary_name(target: Path) -> Path:
    """Return a new name beside the target, no longer than names may be."""
    ending = f".{os.getpid()}.{secrets.token_hex(4)}.part"
    room = _longest_name(target.parent) - len(ending)
    stem = os.fsencode(target.name)
    if len(stem) > room:
        return target.with_name(stem[:room].decode("utf-8", "ignore") + ending)
    return target.with_name(target.name + ending)


def _copy_permissions(target: Path, temporary: Path) -> None:
    """Give a new file the permissions and, where that is allowed, the owner of the one it replaces."""
    try:
        before = target.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(before.st_mode) or not temporary.is_file():
        return
    now = temporary.stat()
    if hasattr(os, "chown") and (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
        with suppress(PermissionError):
            os.chown(temporary, before.st_uid, before.st_gid)
    mode = before.st_mode & 0o777
    if now.st_mode & 0o777 != mode:
        temporary.chmod(mode)


def _exchange_folders(temporary: Path, target: Path) -> None:
    """Put a folder in the place of another one, which is removed when the new one has its name."""
    if _exchange_names(temporary, target):  # `placing` removes what has the temporary name now
        return
    before = _temporary_name(target)
    target.rename(before)
    try:
        temporary.rename(target)
    except BaseException:
        before.rename(target)
        raise
    _remove(before)


def _exchange_names(first: Path, second: Path) -> bool:
    """Exchange two names in one step, which no crash can interrupt; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def _remove(temporary: Path) -> None:
    """Remove an unfinished file or folder.

    Tried again where the disk fails for a moment, where a thread of a library still writes into the folder,
    and where a signal comes in between, which is raised at the end.
    """
    interrupt: BaseException | None = None
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink(missing_ok=True)
            break
        except OSError:
            if attempt == _ATTEMPTS and interrupt is None:
                raise
        except BaseException as error:  # KeyboardInterrupt and its like
            interrupt = error
    if interrupt is not None:
        raise interrupt


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


def write_text_whole(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text file whole."""
    with replacing(path, durable=durable) as file:
        file.write(text.encode())


def write_whole(path: Path, kind: str, version: int, about: Mapping[str, Any], arrays: Arrays) -> None:
    """Write arrays and their metadata, of a format with a name and a version, with a digest of both."""
    meta = {"format": kind, "format_version": version, "version": __version__, **about}
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            _write_member(archive, name, np.asarray(array))
        # The zip's own checksums, of header and content, which each member has by now.
        sums = {info.filename.removesuffix(".npy"): info.CRC for info in archive.infolist()}
        meta[_DIGEST] = _digest(meta, sums)
        _write_member(archive, "meta", np.array(json.dumps(meta)))


def _write_member(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _digest(meta: Mapping[str, Any], sums: Mapping[str, int]) -> str:
    """Return a hash of the metadata and of the checksums of all members, by name.

    A checksum by itself goes with its member where members are exchanged; this one does not.
    """
    known = json.loads(json.dumps({name: value for name, value in meta.items() if name != _DIGEST}))
    return hashlib.sha256(json.dumps([known, sums], sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# Reading archives
# --------------------------------------------------------------------------------------------------


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
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise DamagedFileError(f"{path} is not a complete file of a {kind}: {reason}") from error


def is_of_the_machine(error: BaseException) -> bool:
    """Return whether an error says something of the machine, not of the file or the request.

    Such are full disks, failing or unreachable ones, missing rights, and too little memory.
    """
    if isinstance(error, OSError):
        # Readers of damaged files seek to impossible places (EINVAL), or raise OSErrors of their own.
        return error.errno not in (None, errno.EINVAL)
    return isinstance(error, MemoryError)


def read_whole(path: Path, kind: str, version: int) -> tuple[dict[str, Any], Arrays]:
    """Return what `write_whole` wrote: the metadata and the arrays.

    Memory: the arrays. Larger ones than the file can hold are refused before any memory is taken.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is another kind of file, is damaged or was changed, or was written by a newer version.
    """
    with path.open("rb") as stream, naming_damage(path, kind), open_archive(stream) as archive:
        names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        strangers = [info.filename for info in archive.infolist() if not info.filename.endswith(".npy")]
        if strangers:
            raise ValueError(f"it holds {strangers[0]!r}, which is no array")
        if "meta" not in names:
            raise ValueError(f"it is an .npz file of other arrays ({', '.join(names[:20])})")
        check_expansion(sum(info.file_size for info in archive.infolist()), path.stat().st_size)
        meta = parsed_object(str(read_member(archive, "meta")[()]))
        if meta["format"] != kind:
            raise ValueError(f"its format is {meta['format']!r}")
        if int(meta["format_version"]) <= version:
            arrays = {name: read_member(archive, name) for name in names if name != "meta"}
            sums = {name: archive.getinfo(f"{name}.npy").CRC for name in arrays}
            # Files of dlnfast 0.1.0 have no digest.
            if meta.pop(_DIGEST, None) not in (None, _digest(meta, sums)):
                raise ValueError("an array or a setting in it is not the one that was written")
            return meta, arrays
    raise ValueError(
        f"{path} has format {meta['format_version']}, written by dlnfast {meta.get('version')}; this is "
        f"dlnfast {__version__}, which reads formats up to {version}"
    )


def read_arrays(path: Path, names: Sequence[str], *, bounded: bool = True) -> Arrays:
    """Return these arrays of an .npz file that another program wrote; others are not read.

    Parameters
    ----------
    path : Path
    names : sequence of str
    bounded : bool
        Refuse arrays that take more than 2.75 times the file and more than 32 MB.

    Raises
    ------
    OSError
        If the file cannot be read.
    KeyError
        If it lacks one of the arrays; its arguments are the name and those that are there.
    Exception
        One of `ARCHIVE_ERRORS` if it is no .npz file, or is damaged.
    """
    with path.open("rb") as stream, open_archive(stream) as archive:
        there = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        for name in names:
            if f"{name}.npy" not in archive.NameToInfo:
                raise KeyError(name, there)
        if bounded:
            check_expansion(
                sum(archive.getinfo(f"{name}.npy").file_size for name in names), path.stat().st_size
            )
        return {name: read_member(archive, name) for name in names}


@contextmanager
def open_archive(stream: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    """Yield a zip archive whose members are stored or deflated, each name once."""
    size = os.fstat(stream.fileno()).st_size
    if stream.read(4) != b"PK\x03\x04":
        raise ValueError("it is not an .npz file")
    # Every entry of the directory becomes an object of some hundred bytes: its size comes first.
    end = zipfile._EndRecData(stream)  # type: ignore[attr-defined]
    if end is None:
        raise ValueError("its directory is missing: the file is truncated")
    if end[5] > max(_DIRECTORY_BYTES, size // 3):
        raise ValueError(f"its directory takes {end[5]} bytes of {size}")
    with zipfile.ZipFile(stream) as archive:
        if len(archive.NameToInfo) != len(archive.filelist):
            raise ValueError("it holds two arrays of one name")
        for info in archive.infolist():
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{info.filename} is compressed by another method than deflate")
            if not 0 <= info.header_offset < size:
                raise ValueError(f"{info.filename} is said to begin at byte {info.header_offset} of {size}")
        yield archive


def max_content(size: int) -> int:
    """Return how many bytes a file of `size` bytes may hold once it is decompressed."""
    return max(int(_EXPANSION * size), _FREE_BYTES)


def check_expansion(total: int, size: int) -> None:
    """Refuse content that takes much more memory than its file has bytes, before memory is taken.

    Raises
    ------
    ValueError
        If `total` bytes are more than 2.75 times the `size` of the file, and more than 32 MB.
    """
    if total > max_content(size):
        raise ValueError(f"its content would take {total} bytes, and the file has {size}")


def read_member(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """Return an array of an .npz file, its size, type and checksum checked.

    numpy.load believes the header, takes as much memory as it declares, and stops where the array ends. A
    header that a flipped bit has made shorter then goes unnoticed: the checksum is compared at the end of the
    member only.
    """
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        shape, columns_first, dtype = _read_header(member)
        header = member.tell()
        size = math.prod(shape)
        if dtype.hasobject or dtype.kind not in _KINDS or (dtype.itemsize == 0 and size > 0):
            raise ValueError(f"{name} is an array of {dtype}; wanted numbers or text")
        if min(shape, default=0) < 0 or header + size * dtype.itemsize != info.file_size:
            raise ValueError(
                f"{name} is declared as {dtype} of shape {shape}, but {info.file_size - header} bytes"
            )
        if info.compress_type != zipfile.ZIP_STORED:
            _check_compressed(archive, info)  # no memory for bytes that are not there
        elif info.compress_size != info.file_size:
            raise ValueError(f"{name} is declared with two sizes")
        content = np.empty(size * dtype.itemsize, dtype=np.uint8)
        view = content.data
        done = 0
        while done < len(view):
            part = member.read(min(_BLOCK, len(view) - done))
            if not part:
                raise ValueError(f"{name} is shorter than its array")
            view[done : done + len(part)] = part
            done += len(part)
        if member.read(1):  # which compares the checksum
            raise ValueError(f"{name} is longer than its array")
    values = content.view(dtype)
    array: npt.NDArray[Any] = values.reshape(shape[::-1]).T if columns_first else values.reshape(shape)
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether in Fortran order, and dtype, by a header of at most `_HEADER_BYTES`."""
    readers = {
        b"\x93NUMPY\1\0": (2, np.lib.format.read_array_header_1_0),
        b"\x93NUMPY\2\0": (4, np.lib.format.read_array_header_2_0),
    }
    start = member.read(8)
    if start not in readers:
        raise ValueError(f"it has a member that begins with {start!r}: no array of numbers or text")
    width, reader = readers[start]
    length = member.read(width)
    if int.from_bytes(length, "little") > _HEADER_BYTES:
        raise ValueError(f"it has an array whose header takes more than {_HEADER_BYTES} bytes")
    content = io.BytesIO(length + member.read(int.from_bytes(length, "little")))
    try:
        return reader(content)
    except ValueError as error:
        reason = str(error)
    except Exception as error:  # Python's parser: MemoryError and RecursionError where brackets nest deeply
        reason = type(error).__name__
    raise ValueError(f"it has an array whose header is damaged: {reason}")


def _check_compressed(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Decompress a member without keeping it, and raise where it is not as long as it is declared."""
    count = 0
    with archive.open(info) as member:
        while part := member.read(_BLOCK):
            count += len(part)
    if count != info.file_size:
        raise ValueError(f"{info.filename} holds {count} bytes and is declared to hold {info.file_size}")


# --------------------------------------------------------------------------------------------------
# Text and JSON
# --------------------------------------------------------------------------------------------------


def decoded(content: bytes, name: object) -> str:
    """Return UTF-8 text, without the byte order mark that some editors begin it with.

    Raises
    ------
    ValueError
        If it is in another encoding; the message names it where it can be told.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{name} is UTF-16 or UTF-32; wanted UTF-8: save it in that encoding")
    if b"\0" in content[:1024]:
        raise ValueError(f"{name} holds zero bytes, as UTF-16 and binary files do; wanted text in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8: {error}") from error


def read_text(path: Path) -> str:
    """Return the content of a text file: see `decoded`.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is not text in UTF-8.
    """
    return decoded(path.read_bytes(), path)


def parsed_object(text: str) -> dict[str, Any]:
    """Return a JSON object.

    Raises
    ------
    ValueError
        For anything else, also for one that is nested too deeply.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"its JSON is {type(found).__name__}; wanted an object")
    return found


def checksum_of(content: Mapping[str, Any]) -> int:
    """Return a checksum of values that JSON knows, but for the one that they hold."""
    rest = {name: value for name, value in content.items() if name != _CHECKSUM}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the checksum of the rest as its last entry, and a first one that says so.

    Without the first, a changed name of the last would make the object one that never had a checksum.

    Raises
    ------
    TypeError
        For values that JSON does not know.
    """
    known: dict[str, Any] = json.loads(json.dumps({_HAS_CHECKSUM: True, **content}))
    return known | {_CHECKSUM: checksum_of(known)}


def without_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `with_checksum` was given.

    Raises
    ------
    ValueError
        If the checksum does not match. Files of dlnfast 0.1.0 have none in some places.
    """
    expected = content.get(_CHECKSUM)
    if expected != checksum_of(content) and (expected is not None or _HAS_CHECKSUM in content):
        raise ValueError("its checksum does not match")
    return {name: value for name, value in content.items() if name not in (_CHECKSUM, _HAS_CHECKSUM)}
