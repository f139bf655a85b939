# SPDX-License-Identifier: MIT
"""Files: .npz archives of arrays and JSON without pickle, and text.

Writing is atomic: a file appears whole or not at all (`atomic_path`). Reading checks sizes before it
allocates memory, and compares the content of an archive with the digest in its metadata (`read_whole`).
"""

from __future__ import annotations

import codecs
import ctypes
import errno
import io
import json
import math
import os
import re
import shutil
import stat
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from .._version import __version__
from .checksums import new_sha256

Arrays = dict[str, npt.NDArray[Any]]

#: Kinds of dtypes of arrays in files: booleans, numbers and text.
_KINDS: Final = "biufcSU"
#: Largest allowed size of the content of an archive, in sizes of the archive; or `_FREE_BYTES` if that is
#: more. With the memory of the checks, reading takes at most three times the size of the archive.
_EXPANSION: Final = 2.75
_FREE_BYTES: Final = 2**25
#: Largest allowed size of an archive's table of contents; or a third of the archive if that is more.
_DIRECTORY_BYTES: Final = 2**21
#: Largest allowed size of the header of an array.
_HEADER_BYTES: Final = 10_000
#: Bytes that are read or copied at a time.
_BLOCK: Final = 2**20
#: Number of attempts to remove an unfinished file.
_ATTEMPTS: Final = 3
#: Seconds for which Windows is asked to replace a file that another program has open, as virus scanners do.
_REPLACE_SECONDS: Final = 1.0
#: Errors that readers raise for archives that are damaged or lack an array.
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
#: Key of the metadata for the digest of all members.
_DIGEST: Final = "digest"
#: Keys of a JSON object for its checksum, and for the fact that it has one.
_CHECKSUM: Final = "checksum"
_HAS_CHECKSUM: Final = "has_checksum"
#: Temporary names that `atomic_path` yields: final name, id of the process, random number.
_PART = re.compile(r"(?P<name>.+)\.\d+\.[0-9a-f]{8}\.part")


class DamagedFileError(ValueError):
    """The content of a file is not the content that was written; reading it again does not help."""


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing, and rename it to `path` at the end of the block; see `atomic_path`.

    Parameters
    ----------
    path : Path
        Final path of the file.
    durable : bool
        Flush the content to the disk before the file is renamed, so that even after a power failure the file
        is either complete or absent.

    Raises
    ------
    OSError
        If the file cannot be written; `atomic_path` lists the cases.
    """
    with atomic_path(path, durable=durable) as temporary, temporary.open("wb") as file:
        yield file
        if durable:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def atomic_path(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to `path` at the end of the block.

    The block creates a file or a folder at the temporary path. After an error, it is removed. If `path` is a
    symbolic link, the target of the link is replaced. If `path` is a device, a FIFO or a descriptor
    (``/dev/stdout``), the complete content is copied into it. A new file has the permissions of the file that
    it replaces; hard links to that file keep the old content.

    Parameters
    ----------
    path : Path
        Final path of the file or folder.
    durable : bool
        Flush the folder to the disk after renaming.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist.
    IsADirectoryError
        If the path names no file, as ``.`` does, or names a folder and the block wrote a file.
    PermissionError
        If the folder, or the existing file, is read-only; on Windows, if a program has that file open.
    OSError
        If the name is too long, or the disk is full.
    """
    if not path.name or path.name == "..":
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    if _is_written_into(path):
        with _spooled_path(path) as temporary:
            yield temporary
        return
    target = _resolve_target(path)
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
            _replace_file(temporary, target)
    finally:
        _remove(temporary)
    if durable:
        _flush_folder(target.parent)


def _is_written_into(path: Path) -> bool:
    """Return whether the content has to be written into an existing device, FIFO, socket or descriptor."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return True
    # The descriptor of a regular file: renaming would create another file than the open one.
    link = path
    while link.is_symlink():
        if Path(os.path.realpath(link.parent)).parts[1:2] == ("proc",):
            return True
        link = link.parent / os.readlink(link)
    return False


@contextmanager
def _spooled_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and copy its content into a device or FIFO at the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "content"
        yield temporary
        if temporary.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a folder cannot be written into it", str(path))
        # Append: another process may write to the same regular file through /dev/stdout.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
        with temporary.open("rb") as source, os.fdopen(descriptor, "wb") as file:
            shutil.copyfileobj(source, file, _BLOCK)


def _resolve_target(path: Path) -> Path:
    """Follow symbolic links to the file that is written, and check that its folder exists."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, "its symbolic links form a loop", str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"it is a symbolic link to {target}, whose folder does not exist", str(path)
        )
    return target


def _check_writable(target: Path) -> None:
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "the folder cannot be written to", str(target.parent))
    if target.is_file() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the existing file is read-only", str(target))


def _max_name_bytes(folder: Path) -> int:
    """Return the largest allowed size of a file name."""
    if sys.platform != "win32":
        with suppress(ValueError, OSError):
            return os.pathconf(folder, "PC_NAME_MAX")
    return 255


def _temporary_name(target: Path) -> Path:
    """Return a new path in the folder of the target; a long name is cut to the allowed size."""
    ending = f".{os.getpid()}.{os.urandom(4).hex()}.part"
    room = _max_name_bytes(target.parent) - len(ending)
    stem = os.fsencode(target.name)
    if len(stem) > room:
        return target.with_name(stem[:room].decode("utf-8", "ignore") + ending)
    return target.with_name(target.name + ending)


def _copy_permissions(target: Path, temporary: Path) -> None:
    """Copy the permissions and, if allowed, the owner of the replaced file to the new one."""
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


def _replace_file(temporary: Path, target: Path) -> None:
    """Give the new file its name. Windows refuses this while any program has the old file open."""
    if sys.platform != "win32":
        temporary.replace(target)
        return
    deadline = time.monotonic() + _REPLACE_SECONDS
    while True:
        try:
            temporary.replace(target)
            return
        except PermissionError as error:
            if time.monotonic() >= deadline:
                text = "the existing file is open in a program, which has to close it first"
                raise PermissionError(errno.EACCES, text, str(target)) from error
            time.sleep(0.02)


def _exchange_folders(temporary: Path, target: Path) -> None:
    """Replace a folder by another one; the old one is removed after the new one has its name."""
    if _exchange_names(temporary, target):  # the temporary name is that of the old folder now
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
    """Exchange two names in one atomic operation; return False if the system has none."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def _remove(temporary: Path) -> None:
    """Remove an unfinished file or folder.

    Try again if the disk fails for a moment, if a thread of a library still writes into the folder, or if a
    signal arrives; its exception is raised at the end.
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
    """Flush the names in a folder to the disk; only POSIX systems can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_parts(folder: Path, names: re.Pattern[str]) -> None:
    """Remove the unfinished files of killed writers from a folder.

    The caller has to hold the lock of the folder: otherwise an unfinished file may belong to a running
    writer.

    Parameters
    ----------
    folder : Path
        Folder to clean.
    names : Pattern
        Pattern of the names of files that only the owner of the folder writes.
    """
    for name in os.listdir(folder):
        found = _PART.fullmatch(name)
        if found is not None and names.fullmatch(found["name"]):
            (folder / name).unlink(missing_ok=True)


def write_text_whole(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_file(path, durable=durable) as file:
        file.write(text.encode())


def write_whole(path: Path, kind: str, version: int, metadata: Mapping[str, Any], arrays: Arrays) -> None:
    """Write an archive of metadata, arrays and a digest of both atomically.

    `kind` and `version` name the format.
    """
    meta = {"format": kind, "format_version": version, "version": __version__, **metadata}
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            _write_member(archive, name, np.asarray(array))
        # The checksums of the zip format, of header and content; they are known once a member is written.
        sums = {info.filename.removesuffix(".npy"): info.CRC for info in archive.infolist()}
        meta[_DIGEST] = _digest(meta, sums)
        _write_member(archive, "meta", np.array(json.dumps(meta)))


def _write_member(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _digest(meta: Mapping[str, Any], sums: Mapping[str, int]) -> str:
    """Return a hash of the metadata and of the names and checksums of all members.

    Unlike the checksums of single members, it detects exchanged members.
    """
    known = json.loads(json.dumps({name: value for name, value in meta.items() if name != _DIGEST}))
    return new_sha256(json.dumps([known, sums], sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# Reading archives
# --------------------------------------------------------------------------------------------------


@contextmanager
def translate_read_errors(path: Path, kind: str) -> Iterator[None]:
    """Raise `DamagedFileError`, which names the file and its kind, for every error of a reader in the block.

    Errors of the machine (`is_machine_error`) are raised unchanged: reading the same file may succeed later.
    """
    outside = sys.exception()
    try:
        yield
    except Exception as error:  # damaged files make readers raise errors of any type
        # zipfile replaces errors of the disk by errors of its own.
        cause: BaseException | None = error
        while cause is not None and cause is not outside:
            if is_machine_error(cause):
                raise cause from None
            cause = cause.__context__
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise DamagedFileError(f"{path} is not a complete file of a {kind}: {reason}") from error


def is_machine_error(error: BaseException) -> bool:
    """Return whether the machine caused an error, not the content of a file or the request.

    These are errors of a full, failing or unreachable disk, missing permissions, and lack of memory.
    """
    if isinstance(error, OSError):
        # Readers of damaged files seek to impossible positions (EINVAL), or raise OSError themselves.
        return error.errno not in (None, errno.EINVAL)
    return isinstance(error, MemoryError)


def read_whole(path: Path, kind: str, version: int) -> tuple[dict[str, Any], Arrays]:
    """Read a file of `write_whole`, and return its metadata and arrays.

    Memory: the arrays. Arrays that are too large for the size of the file are refused before memory is
    allocated.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the file is of another kind, is damaged or changed, or was written by a newer version.
    """
    with path.open("rb") as stream, translate_read_errors(path, kind), open_archive(stream) as archive:
        names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        others = [info.filename for info in archive.infolist() if not info.filename.endswith(".npy")]
        if others:
            raise ValueError(f"it holds {others[0]!r}, which is no array")
        if "meta" not in names:
            raise ValueError(f"it is an .npz file of other arrays ({', '.join(names[:20])})")
        check_expansion(sum(info.file_size for info in archive.infolist()), path.stat().st_size)
        meta = parse_object(str(read_member(archive, "meta")[()]))
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
    """Read the named arrays of an .npz file that another program wrote.

    Parameters
    ----------
    path : Path
        Path of the file.
    names : sequence of str
        Names of the arrays; other arrays are not read.
    bounded : bool
        Refuse arrays that take more than 2.75 times the size of the file and more than 32 MB.

    Raises
    ------
    OSError
        If the file cannot be read.
    KeyError
        If an array is missing. Its arguments are the missing name and the names in the file.
    Exception
        One of `ARCHIVE_ERRORS` if the file is not an .npz file, or is damaged.
    """
    with path.open("rb") as stream, open_archive(stream) as archive:
        available = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        for name in names:
            if f"{name}.npy" not in archive.NameToInfo:
                raise KeyError(name, available)
        if bounded:
            check_expansion(
                sum(archive.getinfo(f"{name}.npy").file_size for name in names), path.stat().st_size
            )
        return {name: read_member(archive, name) for name in names}


@contextmanager
def open_archive(stream: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    """Yield a zip archive, after checks that its members are stored or deflated and have different names."""
    size = os.fstat(stream.fileno()).st_size
    if stream.read(4) != b"PK\x03\x04":
        raise ValueError("it is not an .npz file")
    # Check the size of the directory first: each of its entries takes some hundred bytes of memory.
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
    """Return the largest allowed size of the decompressed content of a file of `size` bytes."""
    return max(int(_EXPANSION * size), _FREE_BYTES)


def check_expansion(total: int, size: int) -> None:
    """Refuse content that is much larger than its file, before memory is allocated.

    Raises
    ------
    ValueError
        If `total` bytes are more than 2.75 times the `size` of the file and more than 32 MB.
    """
    if total > max_content(size):
        raise ValueError(f"its content would take {total} bytes, and the file has {size}")


def read_member(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """Read an array of an .npz file, and check its size, type and checksum.

    numpy.load trusts the header: it allocates the memory that the header declares, and stops at the declared
    end of the array. The zip format compares the checksum at the end of the member only, so numpy.load does
    not notice a header that a flipped bit has made shorter.
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
            _check_compressed(archive, info)  # before memory is allocated for bytes that may be missing
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
    """Read the header of an array: shape, whether it is in Fortran order, and dtype."""
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
    except Exception as error:  # Python's parser raises MemoryError and RecursionError for nested brackets
        reason = type(error).__name__
    raise ValueError(f"it has an array whose header is damaged: {reason}")


def _check_compressed(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Check that the content of a member is as long as it is declared, block by block."""
    count = 0
    with archive.open(info) as member:
        while part := member.read(_BLOCK):
            count += len(part)
    if count != info.file_size:
        raise ValueError(f"{info.filename} holds {count} bytes and is declared to hold {info.file_size}")


# --------------------------------------------------------------------------------------------------
# Text and JSON
# --------------------------------------------------------------------------------------------------


def decode_text(content: bytes, name: object) -> str:
    """Decode UTF-8 text, and drop a byte order mark.

    Raises
    ------
    ValueError
        If the text is in another encoding. The message names the encoding if it can be recognised, and
        `name`.
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
    """Read a text file; see `decode_text`.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If the file is not text in UTF-8.
    """
    return decode_text(path.read_bytes(), path)


def parse_object(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises
    ------
    ValueError
        If the text is not JSON, is not an object, or is nested too deeply.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"its JSON is {type(found).__name__}; wanted an object")
    return found


def checksum_of(content: Mapping[str, Any]) -> int:
    """Return the checksum of a JSON object, computed without its entry "checksum"."""
    others = {name: value for name, value in content.items() if name != _CHECKSUM}
    return zlib.crc32(json.dumps(others, sort_keys=True).encode())


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object with two more entries: a first one, "has_checksum", and a last one, the checksum.

    Without the first, damage to the name of the last would make the object look like one without a checksum.

    Raises
    ------
    TypeError
        If JSON cannot represent a value.
    """
    known: dict[str, Any] = json.loads(json.dumps({_HAS_CHECKSUM: True, **content}))
    return known | {_CHECKSUM: checksum_of(known)}


def without_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Check the checksum that `with_checksum` added, and return the object without it.

    Objects of dlnfast 0.1.0 may have no checksum; they are returned unchecked.

    Raises
    ------
    ValueError
        If the checksum does not match.
    """
    expected = content.get(_CHECKSUM)
    if expected != checksum_of(content) and (expected is not None or _HAS_CHECKSUM in content):
        raise ValueError("its checksum does not match")
    return {name: value for name, value in content.items() if name not in (_CHECKSUM, _HAS_CHECKSUM)}
