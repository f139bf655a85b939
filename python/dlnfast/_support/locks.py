# SPDX-License-Identifier: MIT
"""Locks of folders: one object of one process writes to a folder at a time.

The lock is a file in the folder. Its owner holds an ``flock`` on the file, which the operating system frees
when the process ends, however it ends, and removes the file when it is done. The file names the owner, for
the error that others get. On file systems without such locks the existence of the file is the lock, which
is taken over from an owner that is found to be dead.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import sys
import time
import weakref
from pathlib import Path
from typing import IO, Any, Final

from .errors import FolderInUseError

if sys.platform != "win32":
    import fcntl

#: Name of the lock file.
LOCK: Final = "owner.lock"
#: Errors of `flock` on file systems that have no locks.
_UNSUPPORTED: Final = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})
#: Seconds between two attempts to take a lock.
_POLL: Final = 0.02
#: Seconds until a lock file that names nobody counts as that of a dead owner.
_NAMELESS: Final = 10.0

_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """The lock of a folder, as a context manager.

    Parameters
    ----------
    folder : Path
        The folder, which has to exist on entry.
    seconds : float
        How long to wait for another owner.

    Raises
    ------
    FolderInUseError
        On entry, if the folder has another owner that is alive.
    OSError
        On entry, if the lock file cannot be written.

    Notes
    -----
    Several machines exclude each other where the file system carries ``flock`` between them, as NFS does
    unless it is mounted without locks. Where it has no locks at all, the owner's machine cannot be asked
    from another one: the lock of an owner elsewhere then stands until its file is removed.
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
                raise self._refusal()
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
                if is_free is None:  # no locks here: the file itself is the lock
                    self._has_flock = False
                    is_free = is_new
                    if not is_new and _is_dead(_read_owner(file), file):
                        self._take_away(file)
                        continue
                if not is_free:
                    return False
                if not _is_same(file, self.path):  # its owner removed it before the lock was ours
                    continue
                self._sign(file)
                return True
            finally:
                if self._file is not file:
                    file.close()

    def _sign(self, file: IO[bytes]) -> None:
        """Name this process as the owner."""
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
        # A file that cannot be removed is free, like that of a dead owner.
        with contextlib.suppress(OSError):
            if _is_same(file, self.path):
                self.path.unlink()

    def _take_away(self, file: IO[bytes]) -> None:
        """Move the file of a dead owner out of the way, on a file system without locks."""
        aside = self.path.with_name(f"{LOCK}.{os.getpid()}.{secrets.token_hex(4)}.part")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            self.path.rename(aside)
            if not _is_same(file, aside):  # another process was faster, and the new lock is its own
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _refusal(self) -> FolderInUseError:
        """Return the error that names the owner."""
        owner: dict[str, Any] = {}
        for _ in range(5):  # an owner that has just taken the lock is about to sign
            with contextlib.suppress(OSError), self.path.open("rb") as file:
                owner = _read_owner(file)
            if owner:
                break
            time.sleep(_POLL)
        pid, host = owner.get("pid"), owner.get("host")
        who = f"process {pid} on {host}" if owner else "another process"
        if pid == os.getpid() and host == socket.gethostname():
            who += " (another run of this process)"
        text = f"{self.folder} is in use by {who}; wait until it has ended, or choose another folder"
        if not self._has_flock:  # the file of a dead owner on another machine stays
            text += f". If that process no longer exists, remove {self.path}"
        return FolderInUseError(
            text,
            directory=self.folder,
            pid=pid,
            host=host,
        )


def _open(path: Path, mode: str) -> IO[bytes] | None:
    """Return the open file; None where it exists and should not, or the other way round."""
    try:
        return path.open(mode, buffering=0)
    except (FileExistsError, FileNotFoundError):
        if not path.parent.is_dir():
            raise
        return None


def _flock(file: IO[bytes]) -> bool | None:
    """Try to lock an open file; return whether that worked, None where the file system has no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # some network file systems answer EACCES
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _is_same(file: IO[bytes], path: Path) -> bool:
    """Return whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _read_owner(file: IO[bytes]) -> dict[str, Any]:
    """Return what a lock file says of its owner; nothing where it is not yet, or no longer, there."""
    file.seek(0)
    try:
        owner = json.loads(file.read(4096))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _describe_process() -> dict[str, Any]:
    """Return what tells this process from all others, of this machine and of others."""
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "boot": _boot(), "started": _start_of(pid)}


def _is_dead(owner: dict[str, Any], file: IO[bytes]) -> bool:
    """Return whether the process that wrote a lock file is known to have ended."""
    if not owner:
        return time.time() - os.fstat(file.fileno()).st_mtime > _NAMELESS
    if owner.get("host") != socket.gethostname() or os.name != "posix":
        return False
    if owner.get("boot") != _boot():
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
    # The same number may have gone to another process since.
    return owner.get("started") != _start_of(pid)


def _boot() -> str | None:
    """Return what tells this boot of the machine from others; None where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _start_of(pid: int) -> int | None:
    """Return when a process started, in clock ticks since the boot; None for one that has ended."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, *rest = content.rpartition(b")")[2].split()  # the name before it may hold anything
    return None if state in (b"Z", b"X") else int(rest[18])


def _forget() -> None:
    """Close the lock files in the child of a fork: the locks belong to its parent."""
    for lock in list(_held):
        file, lock._file = lock._file, None
        if file is not None:
            file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
