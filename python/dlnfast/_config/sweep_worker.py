# SPDX-License-Identifier: MIT
"""What a worker of `dlnfast.sweep` does: some runs of a grid, one after the other or side by side.

Nothing here knows of executors: a job goes in, a report comes out, and both are plain values.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from .._closure.certificate import Certificate
from .._closure.subspaces import Closure
from .._problem.problem import Problem
from .._support.arrays import FloatArray, check_choice
from .._support.checkpoint import tidy
from .._support.environment import environment
from .._support.errors import DivergedError, FolderInUseError
from .._support.files import (
    is_machine_error,
    parse_object,
    read_text,
    remove_parts,
    with_checksum,
    without_checksum,
    write_text_whole,
)
from .._support.locks import FolderLock
from .._training.batch import Plan, descend_together
from .._training.engines import choose_engine, with_caution
from .._training.request import Request, divergence_text
from .._training.train import train
from .._trajectory.trajectory import Trajectory
from . import runs, spec

__all__ = ["Item", "Job", "Report", "finished", "forget", "ready", "record", "row_of", "run_job", "start"]

SUMMARY: Final = "summary.json"
SPEC: Final = "spec.json"
RUN: Final = "run.npz"
#: A run that diverged is kept under another name, as by ``dlnfast train``.
DIVERGED_RUN: Final = "diverged.npz"
#: Names of the files in the folder of a run.
_OWN: Final = re.compile("|".join(map(re.escape, (SUMMARY, SPEC, RUN, DIVERGED_RUN))))
#: Seconds to wait for another sweep that writes the same run.
_PATIENCE: Final = 60.0

#: Cores up to this wide descend side by side (batch_descent.hpp).
_WIDEST_CORE: Final = 8
#: Wider networks are not looked at twice: their closure costs more than a batch saves.
_WIDEST: Final = 128
#: Runs of a batch before their pace is known: two registers of lanes in double precision.
_FEWEST: Final = 16
#: Bytes that the records of a batch may take.
_BATCH_BYTES: Final = 2**28
#: The share of a job's seconds that a batch should take: its results are written while the next one runs.
_BATCH_SHARE: Final = 0.05
#: Threads that wait for the disk. Files that are synchronised together cost little more than one.
_WRITERS: Final = 16
#: Seconds that a worker has to come to the end of its run when the sweep stops or its parent is gone.
_GRACE: Final = 2.0

_stopping = threading.Event()
#: The default executor's workers keep their threads from job to job.
_writers: ThreadPoolExecutor | None = None
#: What a run of a kind of batch took in this process, in seconds.
_pace: dict[Any, float] = {}


class Item(NamedTuple):
    """One run: the name of its folder and the sections of its specification."""

    hash: str
    sections: dict[str, dict[str, Any]]


class Job(NamedTuple):
    """Some runs, as a worker gets them.

    Attributes
    ----------
    items : tuple of Item
    directory : str or None
        Where the folders of runs are; None writes nothing.
    keep : bool
        Write trajectories too.
    retry : bool
        Do not take a failure that another process has written.
    n_threads : int
        For runs that do not say.
    seconds : float
        Begin no run after this.
    token : str
        Tells jobs apart for executors that answer equal calls from memory.
    """

    items: tuple[Item, ...]
    directory: str | None
    keep: bool
    retry: bool
    n_threads: int
    seconds: float
    token: str


class Report(NamedTuple):
    """What came of a job.

    Attributes
    ----------
    rows : list of (str, dict)
        Hash and row of every run that ended; where there is a directory, it is on the disk.
    left : tuple of Item
        Runs that were not begun.
    pid : int
    cpu_seconds : float
        Of the worker's process, since it began.
    run_seconds : float
        Making problems and weights, training, accuracies.
    seconds : float
        All of the job.
    """

    rows: list[tuple[str, dict[str, Any]]]
    left: tuple[Item, ...]
    pid: int
    cpu_seconds: float
    run_seconds: float
    seconds: float


# --------------------------------------------------------------------------------------------------
# Processes of the default executor
# --------------------------------------------------------------------------------------------------


def start(reader: Any) -> None:
    """Prepare a worker's process: Ctrl-C is for its parent, and it ends when `reader` comes to its end.

    The other end of that pipe is closed when the sweep stops, or by the parent's death, of whatever kind.
    """
    global _writers
    _writers = ThreadPoolExecutor(_WRITERS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _watch(reader: Any) -> None:
    reader.poll(None)
    _stopping.set()
    time.sleep(_GRACE)
    os._exit(1)  # a run that goes on for longer is abandoned; no file is ever half written


def ready() -> int:
    """Return the id of the process; it has imported everything when it does."""
    return os.getpid()


# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------


def finished(
    directory: str | os.PathLike[str], name: str, *, keep: bool, retry: bool
) -> dict[str, Any] | None:
    """Return the summary of a run that is finished, None for one that has to be run.

    That of a file that is damaged, or was changed, has to be run again.
    """
    try:
        summary = _checked_summary(parse_object(read_text(Path(directory, name, SUMMARY))))
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None
    done = summary["outcome"] in ("finished", "converged")
    if (retry and not done) or (keep and done and summary["file"] is None):
        return None
    tidy(Path(directory, name), _OWN)
    return summary


def _checked_summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary that `record` wrote, or raise."""
    summary = without_checksum(found)
    check_choice(summary["outcome"], "outcome", ("finished", "converged", "diverged", "failed"))
    for key in ("file", "error", "hash"):
        if not isinstance(summary[key], (str, type(None))):
            raise TypeError(f"{key} is {summary[key]!r}; wanted text")
    row_of(summary)
    return summary


def record(directory: str, item: Item, summary: Mapping[str, Any], run: Trajectory | None = None) -> None:
    """Write a run's folder; its summary, in values that JSON knows, comes last, and whole."""
    folder = Path(directory, item.hash)
    folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder, seconds=_PATIENCE):
        remove_parts(folder, _OWN)
        # The summary has the specification too: this copy need not be on the disk before it.
        write_text_whole(folder / SPEC, _json(item.sections), durable=False)
        if run is not None:
            run.save(folder / summary["file"], weights=item.sections["output"]["weights"])
        write_text_whole(folder / SUMMARY, _json(with_checksum(summary)))


def _json(content: Mapping[str, Any]) -> str:
    # In one line: Python's encoder is several times slower with indentation.
    return json.dumps(content, allow_nan=False) + "\n"


def row_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a table shows of a summary."""
    row = {
        "hash": summary["hash"],
        "outcome": summary["outcome"],
        "engine": summary.get("engine"),
        "steps": summary.get("steps"),
        "final_loss": None if summary["outcome"] == "diverged" else summary.get("final_loss"),
        "seconds": summary["seconds"],
        "error": summary["error"],
    }
    for split, found in summary.get("accuracy", {}).items():
        row[f"accuracy_{split}"] = found["network"]
    return row


def may_pass(error: BaseException) -> bool:
    """Return whether a run that failed so may be well at another time or on another machine.

    Full disks, missing files and rights, too little memory, packages that are not installed.
    """
    if is_machine_error(error) or isinstance(error, (ImportError, FolderInUseError)):
        return True
    # PyTorch has no MemoryError: its allocators raise RuntimeErrors of their own.
    text = str(error)
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text or "out of memory" in text
    )


def failure(item: Item, error: str, seconds: float) -> dict[str, Any]:
    """Return the summary of a run that left nothing but an error."""
    return {
        "hash": item.hash,
        "outcome": "failed",
        "error": error,
        "spec": item.sections,
        "seconds": seconds,
        "file": None,
        "environment": environment(),
    }


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def run_job(job: Job) -> Report:
    """Do the runs of a job, or those that its seconds allow."""
    return _Work(job).report()


def forget() -> None:
    """Let go of problems and weights."""
    for cache in (_problem, _weights, _closure):
        cache.cache_clear()


# Runs come in an order in which equal problems, and equal weights, follow each other.


@functools.lru_cache(maxsize=2)
def _problem(settings: str) -> tuple[Problem, dict[str, spec.Samples]]:
    return spec.make_problem(_partial(problem=settings))


@functools.lru_cache(maxsize=2)
def _weights(problem: str, settings: str) -> list[FloatArray]:
    return spec.make_weights(_partial(weights=settings), _problem(problem)[0])


@functools.lru_cache(maxsize=2)
def _closure(problem: str, weights: str, engine: str) -> tuple[Certificate, Closure | None]:
    return choose_engine(engine, _problem(problem)[0], _weights(problem, weights))


def _partial(problem: str = "{}", weights: str = "{}") -> spec.Spec:
    return spec.Spec(json.loads(problem), json.loads(weights), {}, {})


class _Begun(NamedTuple):
    """A run whose problem and weights are there."""

    item: Item
    prepared: runs.Prepared
    arguments: dict[str, Any]
    seconds: float


class _Work:
    """One job under way."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.begin = time.perf_counter()
        self.rows: list[tuple[str, dict[str, Any]]] = []
        self.run_seconds = 0.0
        self.waiting: dict[Any, list[tuple[_Begun, Plan]]] = {}
        self.written: deque[Future[None]] = deque()
        self.writers = _writers or ThreadPoolExecutor(_WRITERS)

    def report(self) -> Report:
        try:
            left = self._work_off()
            while self.written:
                self.written.popleft().result()
        finally:
            if self.writers is not _writers:
                self.writers.shutdown()
        return Report(
            rows=self.rows,
            left=left,
            pid=os.getpid(),
            cpu_seconds=time.process_time(),
            run_seconds=self.run_seconds,
            seconds=time.perf_counter() - self.begin,
        )

    def _work_off(self) -> tuple[Item, ...]:
        items = self.job.items
        left: tuple[Item, ...] = ()
        for i, item in enumerate(items):
            over = time.perf_counter() - self.begin > self.job.seconds
            if i > 0 and (over or _stopping.is_set()):
                left = items[i:]
                break
            if not self._was_done(item):
                self._begin(item)
        for kind in list(self.waiting):
            self._flush(kind)
        return left

    def _was_done(self, item: Item) -> bool:
        """Take the result of another process that was faster."""
        job = self.job
        if job.directory is None:
            return False
        summary = finished(job.directory, item.hash, keep=job.keep, retry=job.retry)
        if summary is None:
            return False
        self.rows.append((item.hash, row_of(summary)))
        return True

    def _begin(self, item: Item) -> None:
        """Run, or put to those that run together."""
        start = time.perf_counter()
        try:
            begun = self._prepared(item, start)
            plan = self._plan(begun)
        except Exception as error:
            self._failed(item, error, time.perf_counter() - start)
            return
        begun = begun._replace(seconds=time.perf_counter() - start)
        self.run_seconds += begun.seconds
        if plan is None:
            self._run(begun)
            return
        kind = _kind(plan)
        self.waiting.setdefault(kind, []).append((begun, plan))
        if len(self.waiting[kind]) >= self._most(plan, kind):
            self._flush(kind)

    def _prepared(self, item: Item, start: float) -> _Begun:
        sections = item.sections
        chosen = spec.Spec(**sections)
        keys = [json.dumps(sections[name], sort_keys=True) for name in ("problem", "weights")]
        problem, samples = _problem(keys[0])
        made = time.perf_counter()
        weights = _weights(*keys)
        seconds = {"problem": made - start, "weights": time.perf_counter() - made}
        arguments = spec.train_arguments(chosen)
        arguments["n_threads"] = arguments["n_threads"] or self.job.n_threads
        return _Begun(item, runs.Prepared(chosen, problem, samples, weights, seconds), arguments, 0.0)

    def _plan(self, begun: _Begun) -> Plan | None:
        """Return how a run goes in a batch; None where it does not.

        It depends on the run alone, so that a sweep gives the same whatever else is in it.
        """
        arguments, prepared = dict(begun.arguments), begun.prepared
        engine, device, optimizer = (arguments.pop(name) for name in ("engine", "device", "optimizer"))
        widths = [prepared.problem.dim_in, *map(len, prepared.weights)]
        if engine not in ("auto", "reduced") or device or optimizer != "gd" or max(widths) > _WIDEST:
            return None
        request = Request.checked(prepared.problem, prepared.weights, callback=None, **arguments)
        keys = [json.dumps(begun.item.sections[name], sort_keys=True) for name in ("problem", "weights")]
        certificate, space = _closure(*keys, engine)
        if space is None or max(max(core.shape) for core in space.cores) > _WIDEST_CORE:
            return None
        return Plan(request, with_caution(certificate, request), space)

    def _most(self, plan: Plan, kind: Any) -> int:
        """Return how many runs of a kind to take together."""
        request = plan.request
        numbers = request.steps + 1 + request.n_records * sum(core.size for core in plan.space.cores)
        memory = max(1, _BATCH_BYTES // (8 * numbers))
        if kind not in _pace:
            return min(memory, _FEWEST)
        return min(memory, max(_FEWEST, int(_BATCH_SHARE * self.job.seconds / _pace[kind])))

    def _flush(self, kind: Any) -> None:
        """Run those of a kind that wait, side by side."""
        together = self.waiting.pop(kind)
        if not self._run_together(kind, together):
            for one in together:  # what is too much for all may be well for each
                self._run_together(kind, [one])

    def _run_together(self, kind: Any, together: list[tuple[_Begun, Plan]]) -> bool:
        """Return whether the outcomes are there: several that fail are no outcome."""
        start = time.perf_counter()
        try:
            ends = descend_together([plan for _, plan in together])
        except Exception as error:
            if len(together) == 1:
                self._failed(together[0][0].item, error, time.perf_counter() - start)
            return len(together) == 1
        share = (time.perf_counter() - start) / len(together)
        _pace[kind] = share + sum(begun.seconds for begun, _ in together) / len(together)
        self.run_seconds += share * len(together)
        for (begun, plan), end in zip(together, ends, strict=True):
            diverged = end.outcome == "diverged"
            text = divergence_text(plan.request, end.step, end.layer) if diverged else None
            self._ended(begun, end.trajectory, end.outcome, text, share)
        return True

    def _run(self, begun: _Begun) -> None:
        """Train one run by itself."""
        prepared, start = begun.prepared, time.perf_counter()
        outcome, error_text = "diverged", None
        try:
            run: Trajectory | None = train(prepared.problem, prepared.weights, **begun.arguments)
            assert run is not None
            outcome = run.config["outcome"]
        except DivergedError as error:
            run, error_text = error.trajectory, str(error)
        except Exception as error:
            self._failed(begun.item, error, time.perf_counter() - start)
            return
        seconds = time.perf_counter() - start
        self.run_seconds += seconds
        self._ended(begun, run, outcome, error_text, seconds)

    def _ended(
        self, begun: _Begun, run: Trajectory | None, outcome: str, error: str | None, seconds: float
    ) -> None:
        start = time.perf_counter()
        item, prepared = begun.item, begun.prepared
        file = None
        if self.job.keep and self.job.directory is not None and run is not None:
            file = DIVERGED_RUN if outcome == "diverged" else RUN
        summary: dict[str, Any] = {
            "hash": item.hash,
            "outcome": outcome,
            "error": error,
            "spec": item.sections,
            "problem": prepared.problem.describe(),
            "preparation_seconds": prepared.seconds,
            "file": file,
        }
        try:
            if run is not None:
                summary |= runs.summarise(run)
                if outcome != "diverged" and (found := runs.accuracies(prepared, run)):
                    summary["accuracy"] = found
        except Exception as failure_:
            self._failed(item, failure_, begun.seconds + seconds)
            return
        spent = time.perf_counter() - start
        self.run_seconds += spent
        self._keep(item, summary | {"seconds": begun.seconds + seconds + spent}, run if file else None)

    def _failed(self, item: Item, error: Exception, seconds: float) -> None:
        self.run_seconds += seconds
        summary = failure(item, f"{type(error).__name__}: {error}", seconds)
        if may_pass(error):  # there is a row, but no summary: another sweep runs it again
            self.rows.append((item.hash, row_of(runs.plain(summary))))
        else:
            self._keep(item, summary, None)

    def _keep(self, item: Item, summary: dict[str, Any], run: Trajectory | None) -> None:
        """Have the run written while the next ones run."""
        summary = runs.plain(summary)
        self.rows.append((item.hash, row_of(summary)))
        if self.job.directory is None:
            return
        self.written.append(self.writers.submit(record, self.job.directory, item, summary, run))
        while run is not None and len(self.written) > _WRITERS:  # which may be large
            self.written.popleft().result()


def _kind(plan: Plan) -> Any:
    """Return what runs must share to descend side by side, each with the bits that it would have alone.

    The core takes another recursion, equal but for rounding, where some run has momentum, or decay.
    """
    request = plan.request
    return (
        plan.shape,
        request.steps,
        request.record_every,
        request.tolerance,
        request.n_threads,
        bool(np.any(request.momentum)),
        bool(np.any(request.weight_decay)),
        tuple(bool(family.coupling) for family in plan.space.families),
    )
