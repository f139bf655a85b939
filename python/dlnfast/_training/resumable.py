# SPDX-License-Identifier: MIT
"""The driver of all resumable work: when records and states are written, and from where work resumes.

A kind of work (a run of `train`, a batch, a fit, a PyTorch training) is a `ResumableWork`: it returns its
state and restores it, returns the records since the last flush, and advances. `ResumableRun` does everything
else, in the same way for all kinds:

* a finished folder is loaded without its lock; every other folder is owned while the work runs;
* work resumes from the newest state that can be read; later files are removed;
* a flush writes the records first and then, if one is due, the state: a state never refers to records that
  are missing;
* on Ctrl-C, SIGTERM and every other exception, records and state are written, and a note on the exception
  says whether that succeeded.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from .._support.checkpoint import RunFolder, State, raise_on_sigterm
from .._support.files import Arrays

__all__ = [
    "Records",
    "ResumableRun",
    "ResumableWork",
    "StateStorage",
    "own_folder",
    "replay_records",
    "run_resumable",
]

Callback = Callable[[int, float], bool | None]


@dataclass(frozen=True)
class Records:
    """The records since the last flush.

    Attributes
    ----------
    step : int
        Number in the name of the file: the step of the last record.
    arrays : dict of str to ndarray
    metadata : dict
        Everything else, as JSON values.
    """

    step: int
    arrays: Arrays
    metadata: dict[str, Any] = field(default_factory=dict)


class StateStorage(Protocol):
    """Storage of the driver: a `RunFolder`, which documents the methods, or one file (`torch.Trainer`)."""

    path: Path

    @property
    def exists(self) -> bool: ...

    def check_request(self) -> None: ...
    def owned(self) -> AbstractContextManager[None]: ...
    def begin(self, metadata: Mapping[str, Any], arrays: Arrays) -> None: ...
    def newest(self) -> State | None: ...
    def go_back_to(self, step: int) -> None: ...
    def write_records(self, step: int, arrays: Arrays, metadata: Mapping[str, Any] | None = None) -> None: ...
    def write_state(self, state: State) -> None: ...
    def ending(self) -> dict[str, Any] | None: ...
    def end(self, outcome: Mapping[str, Any]) -> None: ...
    def tidy(self) -> None: ...


class ResumableWork(ABC):
    """One kind of work that can be interrupted, and resumed in another process."""

    #: Whether the end is a file of its own. Otherwise `restore` finds out whether the work is finished.
    has_end_file: ClassVar[bool] = False
    #: Whether there are states. Otherwise the records show the progress.
    has_states: ClassVar[bool] = True
    #: Whether other processes may write to the same storage, which is therefore locked and read again.
    is_locked: ClassVar[bool] = True
    #: Unit in which progress is counted, for messages.
    unit: ClassVar[str] = "step"
    #: Way to resume the work, for messages.
    how_to_resume: ClassVar[str] = "the same call"

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return False

    def request(self) -> tuple[dict[str, Any], Arrays]:
        """Return the request, which is written once: metadata and arrays."""
        return {}, {}

    @abstractmethod
    def advance(self, flush: Callable[[], None]) -> Mapping[str, Any] | None:
        """Work to the end, and call `flush` wherever records and state may be written.

        Returns
        -------
        mapping or None
            Content of the end file, if there is one.
        """

    def state(self) -> State | None:
        """Return everything that changes from step to step; None if there is no consistent state now."""
        return None

    def restore_state(self, state: State) -> None:
        """Continue from a state."""
        raise NotImplementedError

    def records_since(self, step: int) -> Records | None:
        """Return the records after a step, which have not been flushed; None if there are none."""
        return None

    def restore(self, storage: Any) -> State | None:
        """Continue from the newest state of a storage, and return it."""
        state: State | None = storage.newest()
        if state is not None:
            self.restore_state(state)
        return state

    def partial_result(self) -> Any:
        """Return the result so far, for the attribute ``trajectory`` of an exception."""
        return None

    # Work of several processes, each with a storage of its own, takes the same decisions in all of them.

    def find_largest(self, number: float) -> float:
        """Return the largest of the numbers that the processes of this work pass."""
        return number

    def raise_together(self) -> AbstractContextManager[None]:
        """Return a block after which every process raises if one of them has raised inside."""
        return nullcontext()


class ResumableRun:
    """The driver of one piece of work in its storage.

    Parameters
    ----------
    storage : StateStorage
    work : ResumableWork
    seconds : float
        Minimum time between two writes of the state.
    every : int
        A state is due at multiples of this step only, and at the end.
    """

    def __init__(
        self, storage: StateStorage, work: ResumableWork, *, seconds: float = 0.0, every: int = 1
    ) -> None:
        self.storage, self.work = storage, work
        self._interval, self._every = seconds, every
        self._last_write = -float("inf")
        self._start = time.perf_counter()
        #: Step of the last records in the storage, and step and finality of its newest state.
        self._flushed = -1
        self._saved: tuple[int, bool] | None = None

    @property
    def seconds(self) -> float:
        """Run time, including that before the work was resumed."""
        return time.perf_counter() - self._start

    def run(self) -> None:
        """Work to the end, from wherever an earlier call stopped."""
        storage, work = self.storage, self.work
        if self._is_finished(check=True):  # loading it needs no lock
            storage.tidy()
            return
        with ExitStack() as stack:
            stack.enter_context(raise_on_sigterm())
            with work.raise_together():
                stack.enter_context(storage.owned())
                storage.begin(*work.request())
            if work.is_locked and self._is_finished(check=False):  # another owner has just finished it
                return
            if work.has_end_file:
                self._restore()
            if work.has_states:
                with work.raise_together():
                    storage.go_back_to(self._flushed)
            try:
                outcome = work.advance(self.flush)
                self._finish(outcome)
            except BaseException as error:
                self._save(error)
                raise

    def flush(self) -> None:
        """Write the records since the last flush, and the state if one is due."""
        with self.work.raise_together():
            self._write_records()
        is_due = time.monotonic() - self._last_write >= self._interval
        if self.work.find_largest(float(is_due)) > 0:
            with self.work.raise_together():
                self._write_state(at_multiples=True)

    # ------------------------------------------------------------------------------------- helpers

    def _is_finished(self, *, check: bool) -> bool:
        work, is_finished = self.work, False
        with work.raise_together():
            if self.storage.exists:
                if check:
                    self.storage.check_request()
                is_finished = work.has_end_file and self.storage.ending() is not None
        if not work.has_end_file:
            self._restore()
            is_finished = work.is_finished
        return work.find_largest(float(not is_finished)) == 0

    def _restore(self) -> None:
        if not self.storage.exists:
            return
        state = self.work.restore(self.storage)
        if state is not None:
            self._start = time.perf_counter() - state.seconds
            self._flushed, self._saved = state.step, (state.step, self.work.is_finished)

    def _write_records(self) -> None:
        records = self.work.records_since(self._flushed)
        if records is not None:
            self.storage.write_records(records.step, records.arrays, records.metadata)
            self._flushed = records.step

    def _write_state(self, *, at_multiples: bool = False) -> None:
        state = self.work.state()
        if state is None:
            return
        wanted = state.step, self.work.is_finished
        if at_multiples and state.step % self._every != 0 and not self.work.is_finished:
            return
        if wanted != self._saved:
            self.storage.write_state(State(state.step, self.seconds, state.arrays, state.metadata))
            self._saved = wanted
        self._last_write = time.monotonic()

    def _finish(self, outcome: Mapping[str, Any] | None) -> None:
        with self.work.raise_together():
            self._write_records()
            self._write_state()
        if outcome is not None:
            with self.work.raise_together():
                self.storage.end({**outcome, "seconds": self.seconds})

    def _save(self, error: BaseException) -> None:
        """Write records and state after an exception, and add a note to it that says where they are."""
        path, work = self.storage.path, self.work
        try:
            self._write_records()
            self._write_state()
            partial = work.partial_result()
            if partial is not None:
                error.trajectory = partial  # type: ignore[attr-defined]
        except Exception as failure:  # the exception that stopped the work is the one to raise
            error.add_note(
                f"all work since the last state in {path} is lost ({type(failure).__name__}: "
                f"{failure}); the same call computes it again"
            )
            return
        if self._saved is not None:
            error.add_note(
                f"everything up to {work.unit} {self._saved[0]} is saved in {path}: {work.how_to_resume} "
                "resumes from there"
            )
        elif self._flushed >= 0:
            error.add_note(
                f"all finished parts are saved in {path}: {work.how_to_resume} computes the others"
            )


def run_resumable(
    storage: StateStorage | None, work: ResumableWork, *, seconds: float = 0.0, every: int = 1
) -> None:
    """Work to the end, from wherever an earlier call stopped; without storage from the start.

    Parameters
    ----------
    storage : StateStorage or None
        None: nothing is written.
    work : ResumableWork
    seconds, every
        As for `ResumableRun`.
    """
    if storage is None:
        work.advance(lambda: None)
    else:
        ResumableRun(storage, work, seconds=seconds, every=every).run()


@contextmanager
def own_folder(path: Path) -> Iterator[None]:
    """Own a folder whose subfolders hold resumable work, and let SIGTERM end the block by an exception."""
    with raise_on_sigterm(), RunFolder(path).owned():
        yield


def replay_records(
    callback: Callback, records: Iterable[tuple[int, float]]
) -> tuple[int | None, bool | None]:
    """Replay saved records to a callback.

    Parameters
    ----------
    callback : callable
        ``callback(step, loss)``, as for `train`.
    records : iterable of (int, float)
        Step and loss of each record.

    Returns
    -------
    step, answer
        The last step and the callback's answer to it; None and None if there are no records.
    """
    step, answer = None, None
    for step, loss in records:
        answer = callback(step, loss)
    return step, answer
