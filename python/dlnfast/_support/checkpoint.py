# SPDX-License-Identifier: MIT
"""Runs that survive: a folder to which a run writes its records and its state, and from which it goes on.

The folder holds ``run.npz`` (the request: problem, W(0), settings; written once), ``records-<step>.npz``
(what was recorded up to that step since the file before), ``state-<step>.npz`` (everything that moves, of the
last two checkpoints) and, at the end, ``end.json``. Every file appears whole or not at all, so that the run
can be killed at any moment and read at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from .._version import __version__
from .arrays import check_count, check_path, check_scale
from .errors import FolderInUseError
from .files import (
    Arrays,
    DamagedFileError,
    decode_text,
    parse_object,
    read_whole,
    remove_parts,
    translate_read_errors,
    with_checksum,
    without_checksum,
    write_text_whole,
    write_whole,
)
from .locks import LOCK, FolderLock

__all__ = ["Checkpoint", "RunFolder", "State", "identity_of", "raise_on_sigterm", "tidy"]

FORMAT_VERSION: Final = 1
_KEPT: Final = 2
_STATE, _RECORDS = "state-", "records-"
_RUN, _END = "run.npz", "end.json"
#: Names of the files that the owner of a folder writes.
_OWN: Final = re.compile(
    rf"{re.escape(_RUN)}|{re.escape(_END)}|({_STATE}|{_RECORDS})\d+\.npz|{re.escape(LOCK)}"
)


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often a run is kept.

    Parameters
    ----------
    directory : path
        A folder for this run alone; it is made where it is missing. If it holds the same run already, that
        goes on; if it has ended, it is read.
    every : int, optional
        Steps between two writings of records, the most that a crash loses. By default what takes about
        a second, as far as that can be told from the sizes, or fills a quarter of a gigabyte.
    seconds : float
        Least time between two writings of the state, from which a run goes on.

    Notes
    -----
    The last two states are kept. Where the newest is damaged, the run goes on from the other. A folder has
    one owner at a time: a second run that writes to it gets a `FolderInUseError`. A folder whose owner was
    killed is free.
    """

    directory: str | os.PathLike[str]
    every: int | None = None
    seconds: float = 10.0

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.directory, (str, os.PathLike)):
            raise TypeError(f"checkpoint is {type(self.directory).__name__}; wanted a path or a Checkpoint")
        if self.every is not None:
            check_count(self.every, "checkpoint.every")
        check_scale(self.seconds, "checkpoint.seconds")

    @classmethod
    def of(cls, given: Any) -> Checkpoint:
        """Return what was given, a path as a Checkpoint.

        Parameters
        ----------
        given : path or Checkpoint
            Where to write.

        Returns
        -------
        Checkpoint
        """
        return given if isinstance(given, cls) else cls(given)


@dataclass(frozen=True)
class State:
    """Everything that moves, before the step that follows `step`.

    Attributes
    ----------
    step : int
        Of the weights; its loss is among the records already.
    seconds : float
        That the run has taken so far.
    arrays : dict of str to ndarray
    about : dict
        What else there is to know, in values that JSON knows.
    """

    step: int
    seconds: float
    arrays: Arrays
    about: dict[str, Any] = field(default_factory=dict)


def tidy(folder: Path, names: re.Pattern[str]) -> None:
    """Remove what killed owners have left in a finished folder, where that is possible.

    Parameters
    ----------
    folder : Path
    names : Pattern
        Matches the names of the files that only the owner of the folder writes.
    """
    with suppress(FolderInUseError, OSError):
        if any(name == LOCK or name.endswith(".part") for name in os.listdir(folder)):
            with FolderLock(folder):
                remove_parts(folder, names)


class RunFolder:
    """The folder of one run.

    Parameters
    ----------
    directory : path
    identity : str, optional
        Of the request: a folder that holds another run is refused, where it is read or begun. None: that of
        the folder, once read.
    kind : str
        What it holds, if not a run of `train`: something longer that goes on in pieces.

    Raises
    ------
    TypeError
        If `directory` is no path.
    """

    def __init__(
        self, directory: str | os.PathLike[str], identity: str | None = None, kind: str = "dlnfast run"
    ) -> None:
        self.path = check_path(directory, "directory")
        self.identity = identity
        self.kind = kind
        self._written = 0.0
        self._lock = FolderLock(self.path)

    # ------------------------------------------------------------------------------------- ownership

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Own the folder in the block: hold its lock, and remove unfinished files of killed owners.

        Raises
        ------
        FolderInUseError
            If another owner is alive.
        OSError
            If the folder or its lock cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock:
            remove_parts(self.path, _OWN)
            yield

    def tidy(self) -> None:
        """Remove what killed owners have left of a run that has ended, where that is possible."""
        tidy(self.path, _OWN)

    def note_loss(self, error: BaseException, failure: Exception) -> None:
        """Say on the error that ended a run that its last steps could not be written."""
        error.add_note(
            f"what the run computed since its last state in {self.path} is lost ({type(failure).__name__}: "
            f"{failure}); the same call computes it again"
        )

    def _check_owned(self) -> None:
        if not self._lock.is_held:
            raise FolderInUseError(f"{self.path} is not owned by this process", directory=self.path)

    # -------------------------------------------------------------------------------- begin and end

    @property
    def exists(self) -> bool:
        """Whether there is a run."""
        try:
            os.stat(self.path / _RUN)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def check_request(self) -> None:
        """Refuse a folder that holds another run."""
        meta, _ = self.request()
        if meta["identity"] != self.identity:
            raise ValueError(
                f"checkpoint: {self.path} holds another run (begun by dlnfast {meta['version']}); wanted "
                "the same problem, weights and settings, or another folder"
            )

    def begin(self, about: Mapping[str, Any], arrays: Arrays) -> None:
        """Write the request, or check that it is the one that is there."""
        if self.exists:
            self.check_request()
            return
        self._check_owned()
        strangers = [name for name in os.listdir(self.path) if name.startswith((_STATE, _RECORDS, _END))]
        if strangers:
            raise ValueError(f"checkpoint: {self.path} has {strangers[0]} but no {_RUN}; wanted a new folder")
        about = {"identity": self.identity, **about}
        write_whole(self.path / _RUN, self.kind, FORMAT_VERSION, about, arrays)

    def request(self) -> tuple[dict[str, Any], Arrays]:
        """Return what `begin` wrote."""
        if not self.exists:
            raise FileNotFoundError(f"{self.path} holds no run: there is no {_RUN}")
        meta, arrays = read_whole(self.path / _RUN, self.kind, FORMAT_VERSION)
        if self.identity is None:
            self.identity = meta["identity"]
        return meta, arrays

    def end(self, about: Mapping[str, Any]) -> None:
        """Say how the run ended."""
        self._check_owned()
        said = {"format_version": FORMAT_VERSION, "version": __version__, "identity": self.identity, **about}
        write_text_whole(self.path / _END, json.dumps(with_checksum(said), indent=1) + "\n")

    def ending(self) -> dict[str, Any] | None:
        """Return how it ended; None while it has not."""
        path = self.path / _END
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        with translate_read_errors(path, "dlnfast run"):
            found = parse_object(decode_text(content, "it"))
            newer = found.get("format_version", FORMAT_VERSION) > FORMAT_VERSION  # the first files had none
            if not newer:
                found = without_checksum(found)
            missing = {"outcome", "step", "layer", "seconds"} - found.keys()
            if not newer and missing:
                raise ValueError(f"it lacks {sorted(missing)}")
        if newer:
            raise ValueError(f"{path} was written by a newer version; this is dlnfast {__version__}")
        self._check_identity(path, found)
        return found

    # -------------------------------------------------------------------------- states and records

    def newest(self) -> State | None:
        """Return the newest state that is not damaged.

        Raises
        ------
        OSError
            If a state cannot be read at present.
        ValueError
            If it was written by a newer version.
        """
        for path in reversed(self._files(_STATE)):
            try:
                meta, arrays = self._read(path, "dlnfast state")
            except DamagedFileError as error:
                warnings.warn(f"{error}; going on from the one before", RuntimeWarning, stacklevel=3)
                continue
            return State(int(meta["step"]), float(meta["seconds"]), arrays, meta)
        return None

    def go_back_to(self, step: int) -> None:
        """Remove what comes after a step: it will be computed again."""
        self._check_owned()
        for prefix in (_RECORDS, _STATE):
            for path in reversed(self._files(prefix)):  # so that readers never find a gap
                if _step_of(path) > step:
                    path.unlink()

    def write_records(self, step: int, arrays: Arrays, about: Mapping[str, Any] | None = None) -> None:
        """Add what was recorded since the file before, up to `step`."""
        self._check_owned()
        known = {**(about or {}), "step": step, "identity": self.identity}
        write_whole(self._records_file(step), "dlnfast records", FORMAT_VERSION, known, arrays)

    def read_records(self, step: int) -> tuple[dict[str, Any], Arrays] | None:
        """Return what one such file holds; None where it is not there."""
        try:
            return self._read(self._records_file(step), "dlnfast records")
        except FileNotFoundError:
            return None

    def _records_file(self, step: int) -> Path:
        return self.path / f"{_RECORDS}{step:015d}.npz"

    def write_state(self, state: State) -> None:
        """Write a state and remove all but the last two."""
        self._check_owned()
        about = {**state.about, "step": state.step, "seconds": state.seconds, "identity": self.identity}
        path = self.path / f"{_STATE}{state.step:015d}.npz"
        write_whole(path, "dlnfast state", FORMAT_VERSION, about, state.arrays)
        for old in self._files(_STATE)[:-_KEPT]:
            old.unlink(missing_ok=True)
        self._written = time.monotonic()

    def is_due(self, seconds: float) -> bool:
        """Return whether the last state is so old."""
        return time.monotonic() - self._written >= seconds

    def records(self) -> Iterator[Arrays]:
        """Yield what was recorded, file by file.

        Raises
        ------
        ValueError
            If a file is damaged, of another run, or missing among the others.
        """
        n_losses = 0
        ending = self.ending()  # before the files are looked for: then all of them are there
        for path in self._files(_RECORDS):
            try:
                meta, arrays = self._read(path, "dlnfast records")
            except FileNotFoundError:  # a run that goes on has removed it
                break
            with translate_read_errors(path, "dlnfast records"):
                n_losses += len(arrays["loss"])
                if n_losses != meta["step"] + 1:
                    raise ValueError(f"it ends at step {meta['step']}, but a file before it is missing")
            yield arrays
        if ending is not None and n_losses != ending["step"] + (ending["outcome"] != "diverged"):
            raise ValueError(f"{self.path} lacks the last of the files of its records, {_RECORDS}<step>.npz")

    def _read(self, path: Path, kind: str) -> tuple[dict[str, Any], Arrays]:
        meta, arrays = read_whole(path, kind, FORMAT_VERSION)
        self._check_identity(path, meta)
        return meta, arrays

    def _check_identity(self, path: Path, about: Mapping[str, Any]) -> None:
        # The first folders said nothing of it.
        if self.identity is not None and about.get("identity", self.identity) != self.identity:
            raise DamagedFileError(f"{path} belongs to another run than {_RUN}")

    def _files(self, prefix: str) -> list[Path]:
        # os.listdir raises where pathlib's glob takes a folder that cannot be read for an empty one.
        names = (name for name in os.listdir(self.path) if name.startswith(prefix) and name.endswith(".npz"))
        return sorted(self.path / name for name in names if name[len(prefix) : -len(".npz")].isdigit())


def _step_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def identity_of(settings: Mapping[str, Any], arrays: Arrays) -> str:
    """Return a hash of settings and arrays that is the same for the same run only."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data.cast("B") if array.size else b"")
    return digest.hexdigest()


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block like Ctrl-C does, by an exception: SystemExit with the code 143.

    A handler that was not installed by Python stays as it is: Python could not put it back.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is None:
        yield
        return

    def stop(number: int, frame: object) -> None:
        del frame
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
