# SPDX-License-Identifier: MIT
"""What is written and read under faults, and what has to hold after each of them.

A case has something to do in a folder, such as a checkpointed run. It is done undisturbed first, and then
once for every operation and kind of fault, or pair of them, from a fresh copy of what was there before.
Afterwards

* the error is the injected one, or there is none and the result is that of the undisturbed case;
* what was there before can be read: the old or the new content, or the beginning of a run;
* the same call gives the result of the undisturbed case, bit for bit;
* the folder holds the files of the undisturbed case and no others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from faults import KINDS, Faults, Killed, count, injected

import dlnfast as dln

#: What the seconds of a run are called.
_TIMES = ("wall_time", "seconds", "training_seconds", "preparation_seconds", "fit_seconds_")


class Cut(Exception):
    """Ends a run at some step, so that it can go on."""


@dataclass(frozen=True)
class Case:
    """Something to do in a folder.

    Attributes
    ----------
    name : str
    act : callable
        ``act(folder)`` does it, and returns a result that can be compared.
    prepare : callable
        ``prepare(folder)`` makes what is there before.
    read : callable
        ``read(folder)`` returns what can be read there, None for nothing.
    accepts : callable
        ``accepts(found, before, after)``: whether this is the old content, the new one, or what is allowed
        between them. By default the old or the new one.
    alone : bool
        What a simulated kill leaves is known as that of a dead process: a lock says so.
    threads : bool
        It uses other threads, which a forked process does not have.
    """

    name: str
    act: Callable[[Path], Any]
    prepare: Callable[[Path], Any] = lambda folder: None
    read: Callable[[Path], Any] = lambda folder: None
    accepts: Callable[[Any, Any, Any], bool] = lambda found, before, after: found in (before, after)
    locks: bool = True
    threads: bool = False


@dataclass
class Tally:
    """What came of the trials of a case."""

    name: str
    n_operations: int = 0
    singles: int = 0
    doubles: int = 0
    kills: int = 0
    losses: list[str] = field(default_factory=list)


class Trials:
    """The trials of one case.

    Parameters
    ----------
    case : Case
    scratch : Path
        An empty folder.
    """

    def __init__(self, case: Case, scratch: Path) -> None:
        self.case, self.scratch = case, scratch
        self.template = scratch / "before"
        self.template.mkdir()
        case.prepare(self.template)
        self.before = case.read(self.template)
        place = self._fresh()
        self.after = case.act(place)
        self.names = _names(place)
        self.result = case.read(place)
        self.operations = count(self._fresh(), lambda: case.act(scratch / "trial"))
        self.tally = Tally(case.name, len(self.operations))

    def single(self, kind: str, number: int) -> None:
        """Let one operation fail."""
        self._try(kind, (number,))

    def double(self, kind: str, first: int, again: str, second: int) -> None:
        """Let one operation fail, and then one of the next call."""
        self._try(kind, (first,), again, (second,))

    def applies(self, kind: str) -> list[int]:
        """Return the operations at which a fault of this kind can happen."""
        probe = Faults(self.scratch, kind)
        return [n for n, (name, _) in enumerate(self.operations) if probe._applies(name)]

    def _try(self, kind: str, at: tuple[int, ...], again: str = "", second: tuple[int, ...] = ()) -> None:
        place = self._fresh()
        label = f"{self.case.name}: {kind} at {_at(self.operations, at)}"
        try:
            if not self._meets(place, kind, at):
                return
            self._check_readable(place)
            if again:
                label += f", then {again} at operation {second[0]}"
                if not self._meets(place, again, second):
                    return
                self._check_readable(place)
                self.tally.doubles += 1
            else:
                self.tally.singles += 1
            self._check_again(place, kinds={kind, again})
        except Exception as error:
            self.tally.losses.append(f"{label}: {type(error).__name__}: {error}")

    def kill(self, number: int) -> None:
        """Do it in a process of its own, and kill that at an operation."""
        place = self._fresh()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException), injected(place, "kill", number, real=True):
                self.case.act(place)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        label = f"{self.case.name}: SIGKILL at {_at(self.operations, (number,))}"
        self.tally.kills += 1
        try:
            self._check_readable(place)
            self._check_again(place, kinds=set())
        except Exception as error:
            self.tally.losses.append(f"{label}: {type(error).__name__}: {error}")

    def _meets(self, place: Path, kind: str, at: tuple[int, ...]) -> bool:
        """Do it with faults; return whether there were any."""
        result = None
        ended = False
        faults = Faults(place, kind, at)
        try:
            with warnings.catch_warnings(), faults:
                warnings.simplefilter("error")
                result = self.case.act(place)
                ended = True
        except Killed:
            pass
        except KeyboardInterrupt:
            if not kind.startswith("interrupt"):
                raise
        except OSError as error:
            wanted = {"full": "ENOSPC"}.get(kind, kind)
            if error.errno is None or wanted != _name_of(error.errno):
                raise
        if ended and faults.fired and kind != "kill":
            self._check_same(result, self.after, "the result of a call that met the fault and went on")
        return faults.fired > 0

    def _check_readable(self, place: Path) -> None:
        found = self.case.read(place)
        if not self.case.accepts(found, self.before, self.result):
            raise AssertionError("what can be read is neither what was there before nor what was to come")

    def _check_again(self, place: Path, kinds: set[str]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = self.case.act(place)
        self._check_same(again, self.after, "the result of the same call without faults")
        self._check_same(self.case.read(place), self.result, "what can be read in the end")
        names = _names(place)
        if "kill" in kinds and not self.case.locks:
            # This process, whose number the unfinished files bear, is alive.
            names = {name for name in names if not name.endswith(".part")}
        if names != self.names:
            raise AssertionError(
                f"left over: {sorted(names - self.names)}; missing: {sorted(self.names - names)}"
            )

    def _check_same(self, found: Any, wanted: Any, what: str) -> None:
        if found != wanted:
            raise AssertionError(f"{what} is another")

    def _fresh(self) -> Path:
        place = self.scratch / "trial"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.template, place)
        return place


def _name_of(code: int) -> str:
    import errno

    return errno.errorcode.get(code, str(code))


def _at(operations: list[tuple[str, str]], at: tuple[int, ...]) -> str:
    return ", ".join(f"operation {n} ({' '.join(operations[n])})" for n in at)


def _names(folder: Path) -> set[str]:
    """Return the paths of all files and folders in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run_case(
    case: Case,
    scratch: Path,
    *,
    kinds: Iterable[str] = KINDS,
    every: int = 1,
    doubles: int = 0,
    kills: int = 0,
    seed: int = 0,
) -> Tally:
    """Try a case with every kind of fault at every so-many-th operation.

    Parameters
    ----------
    case : Case
    scratch : Path
        An empty folder.
    kinds : iterable of str
    every : int
        1 tries every operation.
    doubles, kills : int
        Number of pairs of faults, and of real kills, at random.
    seed : int
    """
    with _no_synchronisation():
        return _run_case(case, scratch, kinds, every, doubles, kills, seed)


@contextlib.contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Skip os.fsync: nothing here depends on what is on the disk when the machine stops, and it is slow."""
    before, os.fsync = os.fsync, lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = before


def _run_case(
    case: Case, scratch: Path, kinds: Iterable[str], every: int, doubles: int, kills: int, seed: int
) -> Tally:
    generator = random.Random(f"{case.name} {seed}")
    trials = Trials(case, scratch)
    chosen = {kind: trials.applies(kind) for kind in kinds}
    for kind, numbers in chosen.items():
        for number in numbers[generator.randrange(every) :: every]:
            trials.single(kind, number)
    usable = [kind for kind, numbers in chosen.items() if numbers]
    for _ in range(6 * doubles):
        if trials.tally.doubles >= doubles:
            break
        first, second = (generator.choice(usable) for _ in range(2))
        trials.double(first, generator.choice(chosen[first]), second, generator.choice(chosen[second]))
    for _ in range(0 if case.threads else kills):
        trials.kill(generator.randrange(len(trials.operations)))
    return trials.tally


# ------------------------------------------------------------------------------------------ contents


def arrays_of(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return arrays as values that can be compared."""
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}


def without_times(about: Any) -> Any:
    """Return values that JSON knows without those that say how long something took."""
    if isinstance(about, dict):
        return {name: without_times(value) for name, value in about.items() if name not in _TIMES}
    if isinstance(about, list):
        return [without_times(value) for value in about]
    return about


def content(run: dln.Trajectory) -> Any:
    """Return all that a run holds."""
    about, arrays = run.to_arrays()
    return json.dumps(without_times(about), sort_keys=True), arrays_of(arrays)


def beginning(found: Any, before: Any, after: Any) -> bool:
    """Return whether something is the beginning of a run, no shorter than the one that was there."""
    if found is None:
        return before is None
    for name, (dtype, shape, data) in found[1].items():
        if name.startswith("final"):  # which a run has at its end only
            continue
        if name not in after[1]:
            return False
        if (dtype, shape[1:]) != (after[1][name][0], after[1][name][1][1:]):
            return False
        if not after[1][name][2].startswith(data):
            return False
        if before is not None and len(data) < len(before[1][name][2]):
            return False
    return True


def read_run(folder: Path) -> Any:
    """Return what can be read of a run in a folder."""
    try:
        return content(dln.load(folder / "run"))
    except FileNotFoundError:
        return None


def cut_at(step: int) -> Callable[[int, float], None]:
    """Return a callback that ends a run."""

    def callback(now: int, loss: float) -> None:
        del loss
        if now >= step:
            raise Cut

    return callback


# --------------------------------------------------------------------------------------------- cases


def _train(settings: dict[str, Any], callback: Any = None) -> Callable[[Path], Any]:
    problem, weights = dln.low_rank_recovery(6, 1), dln.orthogonal([6] * 3)
    options = {"learning_rate": 0.3, "steps": 3, "n_threads": 1, "singular_values": None} | settings

    def act(folder: Path) -> Any:
        where = dln.Checkpoint(folder / "run", every=1, seconds=0)
        return content(dln.train(problem, weights, **options, checkpoint=where, callback=callback))

    return act


DENSE = {"engine": "dense", "weights_every": 1, "momentum": 0.5}


def training(name: str, settings: dict[str, Any], **more: Any) -> Iterator[Case]:
    """Yield a run from its start, and one that goes on."""
    act = _train(settings)

    def prepare(folder: Path) -> None:
        with contextlib.suppress(Cut):
            _train(settings, cut_at(2))(folder)

    yield Case(f"train, {name}", act, read=read_run, accepts=beginning, **more)
    yield Case(f"train, {name}, resumed", act, prepare, read_run, beginning, **more)


def resuming() -> Case:
    """Return `resume`, which reads more than `train` does."""

    def prepare(folder: Path) -> None:
        with contextlib.suppress(Cut):
            _train(DENSE, cut_at(2))(folder)

    return Case("resume", lambda folder: content(dln.resume(folder / "run")), prepare, read_run, beginning)


def reading() -> Iterator[Case]:
    """Yield readers: of a run that has ended, and of one that has not."""

    def prepare(folder: Path) -> None:
        with contextlib.suppress(Cut):
            _train(DENSE, cut_at(2))(folder)

    yield Case("load, unfinished", read_run, prepare, read_run)
    yield Case("load, finished", read_run, _train(DENSE), read_run)
    yield Case("train, finished: read", _train(DENSE), _train(DENSE), read_run)
