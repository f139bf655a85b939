# SPDX-License-Identifier: MIT
"""Locks of folders: one object of one process writes to a folder at a time.

The lock is a file in the folder. Its owner holds an ``flock`` on the file (on Windows, a lock on one of its
bytes), which the operating system frees when the process exits for any reason, and removes the file at the
end. The file names the owner, for the error message of other processes. On file systems without ``flock`` the
existence of the file is the lock; another process takes it over if the owner is dead.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
import weakref
from pathlib import Path
from typing import IO, Any, Final

from .errors import FolderInUseError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

#: Name of the lock file.
LOCK: Final = "owner.lock"
#: Errors of `flock` on file systems without locks.
_UNSUPPORTED: Final = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})
#: Byte that is locked on Windows, far behind the name of the owner: no other process can read a locked byte.
_LOCKED_BYTE: Final = 2**30
#: Seconds between two attempts to take a lock.
_POLL: Final = 0.02
#: Seconds after which the owner of a lock file without a name counts as dead.
_UNSIGNED: Final = 10.0

_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """The lock of a folder, as a context manager.

    Parameters
    ----------
    folder : Path
        Folder to lock; it must exist on entry.
    seconds : float
        Time to wait for another owner to finish.

    Raises
    ------
    FolderInUseError
        On entry, if the folder has another owner that is alive.
    OSError
        On entry, if the lock file cannot be written.

    Notes
    -----
    The lock works between machines if the file system shares ``flock`` between them, as NFS does unless it is
    mounted without locks. On a file system without locks, only the owner's machine can find out whether the
    owner is alive: on other machines its lock is respected until the file is removed.
    """

    def __init__(self, folder: Path, *, seconds: float = 0.0) -> None:
        self.folder = folder
        self.path = folder / LOCK
        self.seconds = seconds
        self._file: IO[bytes] | None = None
        self._pid = 0
        self._has_flock = True

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock in this process; the child of a fork does not inherit it."""
        return self._file is not None and os.getpid() == self._pid

    def __enter__(self) -> FolderLock:
        """Take the lock."""
        deadline = time.monotonic() + self.seconds
        while not self._try():
            if time.monotonic() >= deadline:
                raise self._build_error()
            time.sleep(_POLL)
        return self

    def __exit__(self, *_: object) -> None:
        """Free the lock and remove its file."""
        file, self._file = self._file, None
        if file is None:  # in the child of a fork
            return
        try:
            if os.getpid() == self._pid:
                self._remove(file)
        finally:
            file.close()

    def _try(self) -> bool:
        """Take the lock if it is free; return whether it was."""
        while True:
            file, is_new = _open(self.path, "x+b"), True
            if file is None:
                file, is_new = _open(self.path, "r+b"), False
            if file is None:  # its owner has just removed it
                continue
            try:
                is_free = _flock(file)
                if is_free is None:  # no flock on this file system: the file itself is the lock
                    self._has_flock = False
                    is_free = is_new
                    if not is_new and _is_dead(_read_owner(file), file):
                        self._remove_dead(file)
                        continue
                if not is_free:
                    return False
                if not _is_same(file, self.path):  # its owner removed it before this process had the lock
                    continue
                self._sign(file)
                return True
            finally:
                if self._file is not file:
                    file.close()

    def _sign(self, file: IO[bytes]) -> None:
        """Write the name of this process into the lock file."""
        try:
            file.truncate(0)
            file.seek(0)
            file.write(json.dumps(_describe_process()).encode() + b"\n")
            self._pid, self._file = os.getpid(), file
            _held.add(self)
        except BaseException:
            self._file = None
            self._remove(file)
            raise

    def _remove(self, file: IO[bytes]) -> None:
        """Remove the lock file while the lock is held."""
        # A file that cannot be removed counts as that of a dead owner: the folder is free.
        with contextlib.suppress(OSError):
            if sys.platform == "win32":
                # Open files cannot be removed there: neither by this process, nor once the next owner has it.
                _unlock_byte(file, msvcrt)
                file.close()
                self.path.unlink()
            elif _is_same(file, self.path):
                self.path.unlink()

    def _remove_dead(self, file: IO[bytes]) -> None:
        """Remove the lock file of a dead owner, on a file system without locks."""
        aside = self.path.with_name(f"{LOCK}.{os.getpid()}.{os.urandom(4).hex()}.part")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            self.path.rename(aside)
            if not _is_same(file, aside):  # another process was faster: put its new lock back
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _build_error(self) -> FolderInUseError:
        """Return the error that names the owner."""
        owner: dict[str, Any] = {}
        for _ in range(5):  # an owner that has just taken the lock signs it a moment later
            with contextlib.suppress(OSError), self.path.open("rb") as file:
                owner = _read_owner(file)
            if owner:
                break
            time.sleep(_POLL)
        pid, host = owner.get("pid"), owner.get("host")
        who = f"process {pid} on {host}" if owner else "another process"
        if pid == os.getpid() and host == _host_name():
            who += " (another run of this process)"
        text = f"{self.folder} is in use by {who}; wait until it has finished, or choose another folder"
        if not self._has_flock:  # nobody removes the file of a dead owner on another machine
            text += f". If that process no longer exists, remove {self.path}"
        return FolderInUseError(
            text,
            directory=self.folder,
            pid=pid,
            host=host,
        )


def _open(path: Path, mode: str) -> IO[bytes] | None:
    """Open a file; return None if mode "x" finds it there, or another mode does not find it."""
    try:
        return path.open(mode, buffering=0)
    except (FileExistsError, FileNotFoundError):
        if not path.parent.is_dir():
            raise
        return None


def _flock(file: IO[bytes]) -> bool | None:
    """Try to lock an open file; return whether that worked, None if the file system has no locks."""
    if sys.platform == "win32":
        return _lock_byte(file, msvcrt)
    else:  # for type checkers, which look at one system at a time
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # some network file systems return EACCES
            return False
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return None
            raise
        return True


def _lock_byte(file: IO[bytes], windows: Any) -> bool | None:
    """Do what `_flock` does by the module ``msvcrt``, which is the argument."""
    file.seek(_LOCKED_BYTE)
    try:
        windows.locking(file.fileno(), windows.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EDEADLK):
            return False
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _unlock_byte(file: IO[bytes], windows: Any) -> None:
    """Free the lock at once; after closing the file, the system takes its time."""
    file.seek(_LOCKED_BYTE)
    windows.locking(file.fileno(), windows.LK_UNLCK, 1)


def _is_same(file: IO[bytes], path: Path) -> bool:
    """Return whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _read_owner(file: IO[bytes]) -> dict[str, Any]:
    """Read the description of the owner from a lock file; empty if it is not complete."""
    file.seek(0)
    try:
        owner = json.loads(file.read(4096))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _host_name() -> str:
    import socket  # not needed by programs that write no folders

    return socket.gethostname()


def _describe_process() -> dict[str, Any]:
    """Return facts that identify this process among all processes on all machines."""
    pid = os.getpid()
    boot, started = _read_boot_id(), _read_start_time(pid)
    return {"pid": pid, "host": _host_name(), "boot": boot, "started": started}


def _is_dead(owner: dict[str, Any], file: IO[bytes]) -> bool:
    """Return whether the process that wrote a lock file certainly exists no more."""
    if not owner:
        return time.time() - os.fstat(file.fileno()).st_mtime > _UNSIGNED
    if owner.get("host") != _host_name() or os.name != "posix":
        return False
    if owner.get("boot") != _read_boot_id():
        return True
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # a process of another user
        pass
    # The system may have reused the id for another process.
    return owner.get("started") != _read_start_time(pid)


def _read_boot_id() -> str | None:
    """Return the id of the current boot of the machine; None if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _read_start_time(pid: int) -> int | None:
    """Return the start time of a process, in clock ticks since the boot; None if it does not run."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, *others = content.rpartition(b")")[2].split()  # the name before it may contain any character
    return None if state in (b"Z", b"X") else int(others[18])


def _close_inherited_locks() -> None:
    """Close the lock files in the child of a fork: the locks belong to its parent."""
    for lock in list(_held):
        file, lock._file = lock._file, None
        if file is not None:
            file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited_locks)
