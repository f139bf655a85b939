# SPDX-License-Identifier: MIT
"""Checkpoint folders: the files to which a run writes its records and its state, and from which it resumes.

The folder holds ``run.npz`` (the request: problem, W(0), settings; written once), ``records-<step>.npz``
(the records up to that step since the previous file), ``state-<step>.npz`` (everything that changes from
step to step, at the last two checkpoints) and, once the run is finished, ``end.json``. Each file appears
whole or not at all, so the run can be killed at any moment and read at any moment.

`dlnfast._training.resumable` decides when which of them is written.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

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

__all__ = ["Checkpoint", "RunFolder", "State", "raise_on_sigterm", "tidy"]

FORMAT_VERSION: Final = 1
#: Number of states in a folder.
_N_STATES: Final = 2
_STATE, _RECORDS = "state-", "records-"
_RUN, _END = "run.npz", "end.json"
#: Names of the files that the owner of a folder writes.
_OWN: Final = re.compile(
    rf"{re.escape(_RUN)}|{re.escape(_END)}|({_STATE}|{_RECORDS})\d+\.npz|{re.escape(LOCK)}"
)


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often a run is written to disk.

    Parameters
    ----------
    directory : path
        Folder for this run alone, created if missing. If it holds the same run, unfinished, the run resumes;
        if the run is finished, it is loaded.
    every : int, optional
        Number of steps between two flushes of the records, the most that a crash loses. Default: as many as
        take about a second, estimated from the sizes, or fill 256 MB.
    seconds : float
        Minimum time between two writes of the state, from which a run resumes.

    Notes
    -----
    The folder holds the last two states. If the newest is damaged, the run resumes from the other. A folder
    has one owner at a time: a second run that writes to it raises `FolderInUseError`. The folder of a killed
    process is free.
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
    def of(cls, target: Any) -> Checkpoint:
        """Convert a path to a Checkpoint; return a Checkpoint unchanged.

        Parameters
        ----------
        target : path or Checkpoint
            Folder to write to.

        Returns
        -------
        Checkpoint
        """
        return target if isinstance(target, cls) else cls(target)


@dataclass(frozen=True)
class State:
    """Everything that changes from step to step, as it is after `step` steps.

    Attributes
    ----------
    step : int
        Number of steps taken. The loss of this step is among the records already.
    seconds : float
        Run time so far.
    arrays : dict of str to ndarray
        Weights, optimizer state and the like.
    metadata : dict
        Everything else, as JSON values.
    """

    step: int
    seconds: float
    arrays: Arrays
    metadata: dict[str, Any] = field(default_factory=dict)


def tidy(folder: Path, names: re.Pattern[str], then: Callable[[], None] = lambda: None) -> None:
    """Remove the lock and the unfinished files of killed owners from a finished folder, if possible.

    Parameters
    ----------
    folder : Path
    names : Pattern
        Matches the names of the files that only the owner of the folder writes.
    then : callable
        Called while the folder is locked, to remove more.
    """
    with suppress(FolderInUseError, OSError):
        if any(name == LOCK or name.endswith(".part") for name in os.listdir(folder)):
            with FolderLock(folder):
                remove_parts(folder, names)
                then()


class RunFolder:
    """The checkpoint folder of one run.

    Parameters
    ----------
    directory : path
    identity : str, optional
        Hash of the request. A folder that holds another run is refused, both for reading and for writing.
        None: the identity found in the folder when it is first read.
    kind : str
        Kind of work in the folder, if it is not a run of `train`.

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
        self._lock = FolderLock(self.path)

    # ------------------------------------------------------------------------------------- ownership

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Own the folder within the block: hold its lock, and remove unfinished files of killed owners.

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
        """Remove the leftovers of killed owners from the folder of a finished run, if possible."""
        tidy(self.path, _OWN, self._remove_old_states)

    def _check_owned(self) -> None:
        if not self._lock.is_held:
            raise FolderInUseError(f"{self.path} is not owned by this process", directory=self.path)

    # -------------------------------------------------------------------------------- begin and end

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run."""
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
                f"checkpoint: {self.path} holds another run (started by dlnfast {meta['version']}); wanted "
                "the same problem, weights and settings, or another folder"
            )

    def begin(self, metadata: Mapping[str, Any], arrays: Arrays) -> None:
        """Write the request, or check that the folder holds the same one."""
        if self.exists:
            self.check_request()
            return
        self._check_owned()
        strangers = [name for name in os.listdir(self.path) if name.startswith((_STATE, _RECORDS, _END))]
        if strangers:
            raise ValueError(f"checkpoint: {self.path} has {strangers[0]} but no {_RUN}; wanted a new folder")
        metadata = {"identity": self.identity, **metadata}
        write_whole(self.path / _RUN, self.kind, FORMAT_VERSION, metadata, arrays)

    def request(self) -> tuple[dict[str, Any], Arrays]:
        """Load the request that `begin` wrote: metadata and arrays."""
        if not self.exists:
            raise FileNotFoundError(f"{self.path} holds no run: there is no {_RUN}")
        meta, arrays = read_whole(self.path / _RUN, self.kind, FORMAT_VERSION)
        if self.identity is None:
            self.identity = meta["identity"]
        return meta, arrays

    def end(self, outcome: Mapping[str, Any]) -> None:
        """Write the end file: outcome, last step, layer that diverged, run time."""
        self._check_owned()
        written: dict[str, Any] = {"format_version": FORMAT_VERSION, "version": __version__}
        written |= {"identity": self.identity, **outcome}
        write_text_whole(self.path / _END, json.dumps(with_checksum(written), indent=1) + "\n")

    def ending(self) -> dict[str, Any] | None:
        """Load the end file; None while the run is unfinished."""
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

    def newest(self, at_most: int | None = None) -> State | None:
        """Load the newest state that is not damaged; None if there is no state.

        Parameters
        ----------
        at_most : int, optional
            Last step that is wanted.

        Raises
        ------
        OSError
            If a state cannot be read at the moment.
        ValueError
            If it was written by a newer version.
        """
        for path in reversed(self._files(_STATE)):
            if at_most is not None and _step_of(path) > at_most:
                continue
            try:
                meta, arrays = self._read(path, "dlnfast state")
            except DamagedFileError as error:
                warnings.warn(f"{error}; resuming from the one before", RuntimeWarning, stacklevel=3)
                continue
            return State(int(meta["step"]), float(meta["seconds"]), arrays, meta)
        return None

    def go_back_to(self, step: int) -> None:
        """Remove the records and states after a step, which will be computed again, and all old states."""
        self._check_owned()
        (self.path / _END).unlink(missing_ok=True)
        for prefix in (_RECORDS, _STATE):
            for path in reversed(self._files(prefix)):  # so that readers never find a gap
                if _step_of(path) > step:
                    path.unlink()
        self._remove_old_states()

    def write_records(self, step: int, arrays: Arrays, metadata: Mapping[str, Any] | None = None) -> None:
        """Write a file with the records up to `step` since the previous file."""
        self._check_owned()
        known = {**(metadata or {}), "step": step, "identity": self.identity}
        write_whole(self._records_file(step), "dlnfast records", FORMAT_VERSION, known, arrays)

    def read_records(self, step: int) -> tuple[dict[str, Any], Arrays] | None:
        """Load one file of records, metadata and arrays; None if there is no such file."""
        try:
            return self._read(self._records_file(step), "dlnfast records")
        except FileNotFoundError:
            return None

    def _records_file(self, step: int) -> Path:
        return self.path / f"{_RECORDS}{step:015d}.npz"

    def write_state(self, state: State) -> None:
        """Write a state, and remove all but the last two."""
        self._check_owned()
        known = {**state.metadata, "step": state.step, "seconds": state.seconds, "identity": self.identity}
        path = self.path / f"{_STATE}{state.step:015d}.npz"
        write_whole(path, "dlnfast state", FORMAT_VERSION, known, state.arrays)
        self._remove_old_states()

    def _remove_old_states(self) -> None:
        for old in self._files(_STATE)[:-_N_STATES]:
            old.unlink(missing_ok=True)

    def records(self) -> Iterator[Arrays]:
        """Yield the records, file by file.

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
            except FileNotFoundError:  # a resumed run has removed it
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

    def _check_identity(self, path: Path, metadata: Mapping[str, Any]) -> None:
        # Files of 0.1.0 hold no identity.
        if self.identity is not None and metadata.get("identity", self.identity) != self.identity:
            raise DamagedFileError(f"{path} belongs to another run than {_RUN}")

    def _files(self, prefix: str) -> list[Path]:
        # os.listdir raises where pathlib's glob takes a folder that cannot be read for an empty one.
        names = (name for name in os.listdir(self.path) if name.startswith(prefix) and name.endswith(".npz"))
        return sorted(self.path / name for name in names if name[len(prefix) : -len(".npz")].isdigit())


def _step_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """End the block by an exception on SIGTERM, as Ctrl-C does: SystemExit with the code 143.

    A handler that Python did not install stays in place, because Python cannot restore it.
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
