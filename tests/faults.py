# SPDX-License-Identifier: MIT
"""Faults at the n-th file operation: full disks, input/output errors, signals and kills.

`Faults` counts the file operations below a folder, and makes one or several of them fail. ``open`` returns
the usual buffered and text layers over a raw file whose every call counts as an operation. Functions of
``os`` and ``fcntl`` are replaced in their modules. A write that fails has written its first half. A simulated
kill is an exception after which every other operation raises too, so that no handler can clean up, and the
content of buffers is never written. At the end open files are closed, which releases their locks, as the
exit of a process does.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Kinds of faults.
KINDS = ("ENOSPC", "full", "EIO", "EACCES", "interrupt before", "interrupt after", "kill")
#: Operations that can fail on a full disk.
_ALLOCATES = frozenset({"create", "write", "fsync", "replace", "mkdir", "truncate", "link", "close written"})
#: Operations that can fail for missing permissions.
_NEEDS_RIGHTS = frozenset({"open", "create", "replace", "unlink", "listdir", "mkdir", "rmdir", "stat"})


class Killed(BaseException):
    """A simulated kill, after which no operation reaches the disk."""


@dataclass
class Faults:
    """Counts file operations below a folder, and makes some of them fail; a context manager.

    Parameters
    ----------
    root : Path
        Folder whose operations count; other operations are not changed.
    kind : str or None
        One of `KINDS`. None counts the operations without a fault.
    at : tuple of int
        Numbers of the operations that fail, from 0.
    real : bool
        Whether a kill is a SIGKILL of this process instead of a simulated one.
    """

    root: Path
    kind: str | None = None
    at: tuple[int, ...] = ()
    real: bool = False
    #: Name and path of every operation.
    operations: list[tuple[str, str]] = field(default_factory=list)
    #: Number of failed operations, including later ones on a full disk.
    fired: int = 0

    def __post_init__(self) -> None:
        self._root = os.path.abspath(self.root)
        self._killed = False
        self._full = False
        self._files: set[_RawFile] = set()
        self._descriptors: dict[int, str] = {}
        self._mutex = threading.RLock()

    # ------------------------------------------------------------------------------- one operation

    def operate(
        self, name: str, path: object, do: Callable[[], Any], partly: Callable[[], Any] | None = None
    ) -> Any:
        """Run an operation, or fail."""
        with self._mutex:
            if self._killed:
                raise Killed
            number = len(self.operations)
            self.operations.append((name, os.path.relpath(os.fspath(path), self._root)))
            chosen = number in self.at and self._applies(name)
            full = self._full and name in _ALLOCATES
            if chosen or full:
                self.fired += 1
        if not (chosen or full):
            return do()
        if self.kind == "interrupt before":
            raise KeyboardInterrupt
        if self.kind == "interrupt after":
            do()
            raise KeyboardInterrupt
        if partly is not None:
            partly()
        if self.kind == "kill":
            if self.real:
                os.kill(os.getpid(), signal.SIGKILL)
            self._killed = True
            raise Killed
        self._full = self.kind == "full"
        code = errno.ENOSPC if self.kind == "full" else getattr(errno, str(self.kind))
        raise OSError(code, os.strerror(code), os.fspath(path))

    def _applies(self, name: str) -> bool:
        if self.kind in ("ENOSPC", "full"):
            return name in _ALLOCATES
        if self.kind == "EACCES":
            return name in _NEEDS_RIGHTS
        if self.kind in ("interrupt before", "interrupt after"):
            # Handlers of signals run in the main thread.
            return threading.current_thread() is threading.main_thread()
        return True

    # ---------------------------------------------------------------------------- paths and open files

    def find_watched_path(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return the absolute path if it is below the root, else None."""
        if isinstance(path, int):
            return self._descriptors.get(path)
        text = os.fspath(path)
        if isinstance(text, bytes):
            text = os.fsdecode(text)
        if dir_fd is not None:
            folder = self._descriptors.get(dir_fd)
            return None if folder is None else os.path.join(folder, text)
        text = os.path.abspath(text)
        return text if text == self._root or text.startswith(self._root + os.sep) else None

    def add(self, file: _RawFile) -> None:
        self._files.add(file)
        self._descriptors[file.fileno()] = file.watched_path

    def remove(self, file: _RawFile, descriptor: int) -> None:
        self._files.discard(file)
        self._descriptors.pop(descriptor, None)

    # ------------------------------------------------------------------------------------- patching

    def __enter__(self) -> Faults:
        self._stack = contextlib.ExitStack()
        original_open = builtins.open

        def patched_open(file: Any, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
            watched_path = self.find_watched_path(file)
            if watched_path is None:
                return original_open(file, mode, *arguments, **settings)
            return _open(self, watched_path, file, mode, *arguments, **settings)

        for module in (builtins, io):
            self._replace(module, "open", patched_open)
        self._replace(os, "open", self._os_open(os.open))
        self._replace(os, "close", self._os_close(os.close))
        for name, operation in (
            ("unlink", "unlink"),
            ("remove", "unlink"),
            ("rmdir", "rmdir"),
            ("mkdir", "mkdir"),
            ("listdir", "listdir"),
            ("scandir", "listdir"),
            ("stat", "stat"),
            ("truncate", "truncate"),
            ("ftruncate", "truncate"),
            ("chmod", "chmod"),
        ):
            self._replace(os, name, self._of_path(operation, getattr(os, name)))
        for name, operation in (("replace", "replace"), ("rename", "replace"), ("link", "link")):
            self._replace(os, name, self._of_two_paths(operation, getattr(os, name)))
        self._replace(os, "fsync", self._of_path("fsync", os.fsync))
        self._replace(fcntl, "flock", self._of_file("lock", fcntl.flock))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for file in list(self._files):
            if self._killed:
                io.FileIO.close(file)
        if self._killed:
            for descriptor in list(self._descriptors):
                with contextlib.suppress(OSError):
                    os.close(descriptor)

    def _replace(self, module: Any, name: str, function: Any) -> None:
        self._stack.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, function)

    def _of_path(self, operation: str, function: Any) -> Any:
        def patched(path: Any = ".", *arguments: Any, dir_fd: int | None = None, **settings: Any) -> Any:
            watched_path = self.find_watched_path(path, dir_fd)
            if dir_fd is not None:
                settings["dir_fd"] = dir_fd
            if watched_path is None:
                return function(path, *arguments, **settings)
            return self.operate(operation, watched_path, lambda: function(path, *arguments, **settings))

        return patched

    def _of_two_paths(self, operation: str, function: Any) -> Any:
        def patched(source: Any, target: Any, **settings: Any) -> Any:
            watched_path = self.find_watched_path(target)
            if watched_path is None:
                return function(source, target, **settings)
            return self.operate(operation, watched_path, lambda: function(source, target, **settings))

        return patched

    def _of_file(self, operation: str, function: Any) -> Any:
        def patched(file: Any, *arguments: Any) -> Any:
            descriptor = file if isinstance(file, int) else file.fileno()
            watched_path = self.find_watched_path(descriptor)
            if watched_path is None:
                return function(file, *arguments)
            return self.operate(operation, watched_path, lambda: function(file, *arguments))

        return patched

    def _os_open(self, function: Any) -> Any:
        def patched(path: Any, flags: int, *arguments: Any, dir_fd: int | None = None, **more: Any) -> int:
            watched_path = self.find_watched_path(path, dir_fd)
            if watched_path is None:
                descriptor: int = function(path, flags, *arguments, dir_fd=dir_fd, **more)
                return descriptor

            def do() -> int:
                opened: int = function(path, flags, *arguments, dir_fd=dir_fd, **more)
                self._descriptors[opened] = watched_path
                return opened

            name = "create" if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) else "open"
            number: int = self.operate(name, watched_path, do)
            return number

        return patched

    def _os_close(self, function: Any) -> Any:
        def patched(descriptor: int) -> None:
            watched_path = self._descriptors.get(descriptor)
            if watched_path is None:
                function(descriptor)
                return
            if self._killed:
                raise Killed
            function(descriptor)  # the descriptor is free even after an error
            del self._descriptors[descriptor]
            self.operate("close", watched_path, lambda: None)

        return patched


class _RawFile(io.FileIO):
    """A raw file whose calls are operations."""

    def __init__(
        self, faults: Faults, watched_path: str, file: Any, mode: str, closefd: bool, opener: Any
    ) -> None:
        self.faults, self.watched_path, self.was_written = faults, watched_path, False

        def do() -> None:
            io.FileIO.__init__(self, file, mode, closefd, opener)
            faults.add(self)

        if isinstance(file, int):  # the descriptor is open already
            do()
        else:
            faults.operate("open" if set(mode) <= {"r"} else "create", watched_path, do)

    def write(self, data: Any) -> int:
        self.was_written = True
        whole = io.FileIO.write
        half = memoryview(data).cast("B")[: memoryview(data).nbytes // 2]
        written: int = self.faults.operate(
            "write", self.watched_path, lambda: whole(self, data), lambda: whole(self, half)
        )
        return written

    def readinto(self, buffer: Any) -> Any:
        return self.faults.operate("read", self.watched_path, lambda: io.FileIO.readinto(self, buffer))

    def read(self, size: int = -1) -> Any:
        return self.faults.operate("read", self.watched_path, lambda: io.FileIO.read(self, size))

    def readall(self) -> Any:
        return self.faults.operate("read", self.watched_path, lambda: io.FileIO.readall(self))

    def truncate(self, size: int | None = None) -> Any:
        return self.faults.operate("truncate", self.watched_path, lambda: io.FileIO.truncate(self, size))

    def close(self) -> None:
        if self.closed or not hasattr(self, "watched_path"):
            super().close()
            return
        if self.faults._killed:
            raise Killed
        descriptor = self.fileno()
        self.faults.remove(self, descriptor)
        super().close()  # the descriptor is free even after an error
        self.faults.operate("close written" if self.was_written else "close", self.watched_path, lambda: None)

    def __del__(self) -> None:
        if self.faults._killed:
            io.FileIO.close(self)


def _open(
    faults: Faults,
    watched_path: str,
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Any = None,
) -> Any:
    """Open a file like the standard library, over a raw file whose calls are counted."""
    raw = _RawFile(faults, watched_path, file, "".join(sorted(set(mode) & set("rwxa+"))), closefd, opener)
    if buffering == 0:
        return raw
    size = io.DEFAULT_BUFFER_SIZE if buffering in (-1, 1) else buffering
    buffer: Any
    if "+" in mode:
        buffer = io.BufferedRandom(raw, size)
    elif "r" in mode:
        buffer = io.BufferedReader(raw, size)
    else:
        buffer = io.BufferedWriter(raw, size)
    if "b" in mode:
        return buffer
    return io.TextIOWrapper(buffer, encoding or "utf-8", errors, newline, buffering == 1)


def count(root: Path, action: Callable[[], Any]) -> list[tuple[str, str]]:
    """Return the operations of an action."""
    with Faults(root) as faults:
        action()
    return faults.operations


@contextlib.contextmanager
def injected(root: Path, kind: str, *at: int, real: bool = False) -> Iterator[Faults]:
    """Inject faults into the block, which stops at a simulated kill."""
    faults = Faults(root, kind, at, real)
    with contextlib.suppress(Killed), faults:
        yield faults
