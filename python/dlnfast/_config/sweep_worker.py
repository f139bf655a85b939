# SPDX-License-Identifier: MIT
"""The workers of `dlnfast.sweep`: each does some runs of a grid, one after the other or as a batch.

This module does not depend on executors: a job goes in, a report comes out, and both are plain values.
"""

from __future__ import annotations

import contextlib
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
from dataclasses import replace
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
from .._training.choice import choose_engine
from .._training.options import Options
from .._training.rates import divergence_text, make_request, with_caution
from .._training.train import train
from .._trajectory.trajectory import Trajectory
from .._weights.implicit import ImplicitWeights
from . import runs, spec

__all__ = [
    "Item",
    "Job",
    "Report",
    "forget",
    "load_finished",
    "record",
    "report_ready",
    "row_of",
    "run_job",
    "start",
]

SUMMARY: Final = "summary.json"
SPEC: Final = "spec.json"
RUN: Final = "run.npz"
#: File of a diverged run, named as by ``dlnfast train``.
DIVERGED_RUN: Final = "diverged.npz"
#: Names of the files in the folder of a run.
_OWN: Final = re.compile("|".join(map(re.escape, (SUMMARY, SPEC, RUN, DIVERGED_RUN))))
#: Seconds to wait while another sweep writes the same run.
_PATIENCE: Final = 60.0

#: Largest width of cores in a batch (batch_descent.hpp).
_WIDEST_CORE: Final = 8
#: Largest width of networks in a batch: the closure of wider ones costs more than a batch saves.
_WIDEST: Final = 128
#: Size of a batch before its speed is known: two vector registers in double precision.
_FEWEST: Final = 16
#: Memory limit of the records of a batch, in bytes.
_BATCH_BYTES: Final = 2**28
#: Duration of a batch as a share of the job's: its results are written while the next batch runs.
_BATCH_SHARE: Final = 0.05
#: Number of writing threads. Synchronising several files together costs little more than one.
_WRITERS: Final = 16
#: Seconds in which a worker may finish its run after the sweep stops or its parent dies.
_GRACE: Final = 2.0

_stopping = threading.Event()
#: Writing threads, which the default executor's workers keep from job to job.
_writers: ThreadPoolExecutor | None = None
#: Seconds per run in this process, for each kind of batch.
_pace: dict[Any, float] = {}


class Item(NamedTuple):
    """One run: the name of its folder and the sections of its specification."""

    hash: str
    sections: dict[str, dict[str, Any]]


class Job(NamedTuple):
    """The runs that a worker gets in one call.

    Attributes
    ----------
    items : tuple of Item
    directory : str or None
        Folder of the run folders; None writes nothing.
    keep : bool
        Whether to write trajectories too.
    retry : bool
        Whether to repeat failures that another process has written.
    n_threads : int
        Number of threads of runs that do not set one.
    seconds : float
        Time after which no further run is started.
    token : str
        Unique text, for executors that cache the results of equal calls.
    """

    items: tuple[Item, ...]
    directory: str | None
    keep: bool
    retry: bool
    n_threads: int
    seconds: float
    token: str


class Report(NamedTuple):
    """The results of a job.

    Attributes
    ----------
    rows : list of (str, dict)
        Hash and row of every finished run, which is on the disk if there is a directory.
    left : tuple of Item
        Runs that were not started.
    pid : int
    cpu_seconds : float
        CPU time of the worker's process since its start.
    run_seconds : float
        Time for problems, weights, training and accuracies.
    seconds : float
        Time for the whole job.
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
    """Prepare a worker's process: it ignores Ctrl-C, and ends when the pipe of `reader` is closed.

    The other end is closed when the sweep stops or the parent dies.
    """
    global _writers
    _writers = ThreadPoolExecutor(_WRITERS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _watch(reader: Any) -> None:
    with contextlib.suppress(OSError):  # Windows reports the closed pipe as an error
        reader.poll(None)
    _stopping.set()
    time.sleep(_GRACE)
    os._exit(1)  # a longer run is abandoned; files appear whole or not at all


def report_ready() -> int:
    """Return the process id, once the process has imported everything."""
    return os.getpid()


# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------


def load_finished(
    directory: str | os.PathLike[str], name: str, *, keep: bool, retry: bool
) -> dict[str, Any] | None:
    """Return the summary of a finished run; None if the run has to be done.

    A run whose summary is damaged or was changed has to be done again.
    """
    try:
        summary = _check_summary(parse_object(read_text(Path(directory, name, SUMMARY))))
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None
    done = summary["outcome"] in ("finished", "converged")
    if (retry and not done) or (keep and done and summary["file"] is None):
        return None
    tidy(Path(directory, name), _OWN)
    return summary


def _check_summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary that `record` wrote, or raise."""
    summary = without_checksum(found)
    check_choice(summary["outcome"], "outcome", ("finished", "converged", "diverged", "failed"))
    for key in ("file", "error", "hash"):
        if not isinstance(summary[key], (str, type(None))):
            raise TypeError(f"{key} is {summary[key]!r}; wanted text")
    row_of(summary)
    return summary


def record(directory: str, item: Item, summary: Mapping[str, Any], run: Trajectory | None = None) -> None:
    """Write a run's folder; the summary, in JSON-compatible values, is written last."""
    folder = Path(directory, item.hash)
    folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder, seconds=_PATIENCE):
        remove_parts(folder, _OWN)
        # The summary has the specification too, so this copy need not be synchronised.
        write_text_whole(folder / SPEC, _json(item.sections), durable=False)
        if run is not None:
            run.save(folder / summary["file"], weights=item.sections["output"]["weights"])
        write_text_whole(folder / SUMMARY, _json(with_checksum(summary)))


def _json(content: Mapping[str, Any]) -> str:
    # Without indentation, which makes Python's encoder several times slower.
    return json.dumps(content, allow_nan=False) + "\n"


def row_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table row of a summary."""
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


def is_temporary(error: BaseException) -> bool:
    """Return whether a failure may not recur at another time or on another machine.

    Such failures are full disks, missing files or rights, too little memory, and missing packages.
    """
    if is_machine_error(error) or isinstance(error, (ImportError, FolderInUseError)):
        return True
    # PyTorch has no MemoryError: its allocators raise RuntimeErrors of their own.
    text = str(error)
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text or "out of memory" in text
    )


def failure(item: Item, error: str, seconds: float) -> dict[str, Any]:
    """Return the summary of a run that failed without a trajectory."""
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
    """Do the runs of a job, as many as its time allows."""
    return _Work(job).report()


def forget() -> None:
    """Clear the cached problems, weights and closures."""
    for cache in (_problem, _weights, _closure):
        cache.cache_clear()


# Runs come in an order in which equal problems, and equal weights, follow each other.


@functools.lru_cache(maxsize=2)
def _problem(settings: str) -> tuple[Problem, dict[str, spec.Samples]]:
    return spec.make_problem(_make_partial_spec(problem=settings))


@functools.lru_cache(maxsize=2)
def _weights(problem: str, settings: str) -> list[FloatArray] | ImplicitWeights:
    return spec.make_weights(_make_partial_spec(weights=settings), _problem(problem)[0])


@functools.lru_cache(maxsize=2)
def _closure(problem: str, weights: str, engine: str) -> tuple[Certificate, Closure | None]:
    return choose_engine(engine, _problem(problem)[0], _weights(problem, weights))


def _make_partial_spec(problem: str = "{}", weights: str = "{}") -> spec.Spec:
    return spec.Spec(json.loads(problem), json.loads(weights), {}, {})


class _Pending(NamedTuple):
    """A run with its problem and weights."""

    item: Item
    prepared: runs.Prepared
    options: Options
    seconds: float


class _Work:
    """A job in progress."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.begin = time.perf_counter()
        self.rows: list[tuple[str, dict[str, Any]]] = []
        self.run_seconds = 0.0
        self.waiting: dict[Any, list[tuple[_Pending, Plan]]] = {}
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
            if not self._is_done(item):
                self._start(item)
        for kind in list(self.waiting):
            self._flush(kind)
        return left

    def _is_done(self, item: Item) -> bool:
        """Take over the result of another process, if there is one."""
        job = self.job
        if job.directory is None:
            return False
        summary = load_finished(job.directory, item.hash, keep=job.keep, retry=job.retry)
        if summary is None:
            return False
        self.rows.append((item.hash, row_of(summary)))
        return True

    def _start(self, item: Item) -> None:
        """Do a run, or put it into a batch."""
        start = time.perf_counter()
        try:
            pending = self._prepare(item, start)
            plan = self._plan(pending)
        except Exception as error:
            self._fail(item, error, time.perf_counter() - start)
            return
        pending = pending._replace(seconds=time.perf_counter() - start)
        self.run_seconds += pending.seconds
        if plan is None:
            self._run(pending)
            return
        kind = _batch_key(plan)
        self.waiting.setdefault(kind, []).append((pending, plan))
        if len(self.waiting[kind]) >= self._limit_batch(plan, kind):
            self._flush(kind)

    def _prepare(self, item: Item, start: float) -> _Pending:
        sections = item.sections
        chosen = spec.Spec(**sections)
        keys = [json.dumps(sections[name], sort_keys=True) for name in ("problem", "weights")]
        problem, samples = _problem(keys[0])
        made = time.perf_counter()
        weights = _weights(*keys)
        seconds = {"problem": made - start, "weights": time.perf_counter() - made}
        options = spec.train_options(chosen)
        options = replace(options, n_threads=options.n_threads or self.job.n_threads)
        return _Pending(item, runs.Prepared(chosen, problem, samples, weights, seconds), options, 0.0)

    def _plan(self, pending: _Pending) -> Plan | None:
        """Return the plan of a run in a batch; None if the run is done by itself.

        The plan depends on the run alone, so that every sweep gives the same numbers for it.
        """
        options, prepared = pending.options, pending.prepared
        if isinstance(prepared.weights, ImplicitWeights):
            return None
        widths = [prepared.problem.dim_in, *map(len, prepared.weights)]
        is_batched = options.engine in ("auto", "reduced") and not options.added()
        if not is_batched or max(widths) > _WIDEST:
            return None
        keys = [json.dumps(pending.item.sections[name], sort_keys=True) for name in ("problem", "weights")]
        request = make_request(options.checked(), prepared.problem, prepared.weights)
        certificate, space = _closure(*keys, options.engine)
        if space is None or max(max(core.shape) for core in space.cores) > _WIDEST_CORE:
            return None
        return Plan(request, with_caution(certificate, request), space)

    def _limit_batch(self, plan: Plan, kind: Any) -> int:
        """Return the largest number of runs in a batch."""
        request = plan.request
        numbers = request.steps + 1 + request.n_records * sum(core.size for core in plan.space.cores)
        memory = max(1, _BATCH_BYTES // (8 * numbers))
        if kind not in _pace:
            return min(memory, _FEWEST)
        return min(memory, max(_FEWEST, int(_BATCH_SHARE * self.job.seconds / _pace[kind])))

    def _flush(self, kind: Any) -> None:
        """Run a batch."""
        together = self.waiting.pop(kind)
        if not self._run_together(kind, together):
            for one in together:  # the memory may suffice for each run alone
                self._run_together(kind, [one])

    def _run_together(self, kind: Any, together: list[tuple[_Pending, Plan]]) -> bool:
        """Run a batch; return whether it has outcomes. A batch of several runs that fails has none."""
        start = time.perf_counter()
        try:
            ends = descend_together([plan for _, plan in together])
        except Exception as error:
            if len(together) == 1:
                self._fail(together[0][0].item, error, time.perf_counter() - start)
            return len(together) == 1
        share = (time.perf_counter() - start) / len(together)
        _pace[kind] = share + sum(pending.seconds for pending, _ in together) / len(together)
        self.run_seconds += share * len(together)
        for (pending, plan), end in zip(together, ends, strict=True):
            diverged = end.outcome == "diverged"
            text = divergence_text(plan.request, end.step, end.layer) if diverged else None
            self._finish(pending, end.trajectory, end.outcome, text, share)
        return True

    def _run(self, pending: _Pending) -> None:
        """Do one run without a batch."""
        prepared, start = pending.prepared, time.perf_counter()
        error_text = None
        outcome: str | None = "diverged"
        try:
            run: Trajectory | None = train(prepared.problem, prepared.weights, **pending.options.keywords())
            assert run is not None
            outcome = run.outcome
        except DivergedError as error:
            run, error_text = error.trajectory, str(error)
        except Exception as error:
            self._fail(pending.item, error, time.perf_counter() - start)
            return
        seconds = time.perf_counter() - start
        self.run_seconds += seconds
        self._finish(pending, run, outcome, error_text, seconds)

    def _finish(
        self,
        pending: _Pending,
        run: Trajectory | None,
        outcome: str | None,
        error: str | None,
        seconds: float,
    ) -> None:
        start = time.perf_counter()
        item, prepared = pending.item, pending.prepared
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
            self._fail(item, failure_, pending.seconds + seconds)
            return
        spent = time.perf_counter() - start
        self.run_seconds += spent
        self._save(item, summary | {"seconds": pending.seconds + seconds + spent}, run if file else None)

    def _fail(self, item: Item, error: Exception, seconds: float) -> None:
        self.run_seconds += seconds
        summary = failure(item, f"{type(error).__name__}: {error}", seconds)
        if is_temporary(error):  # there is a row, but no summary: another sweep runs it again
            self.rows.append((item.hash, row_of(runs.to_json_values(summary))))
        else:
            self._save(item, summary, None)

    def _save(self, item: Item, summary: dict[str, Any], run: Trajectory | None) -> None:
        """Write a run in another thread, while the next runs are done."""
        summary = runs.to_json_values(summary)
        self.rows.append((item.hash, row_of(summary)))
        if self.job.directory is None:
            return
        self.written.append(self.writers.submit(record, self.job.directory, item, summary, run))
        while run is not None and len(self.written) > _WRITERS:  # which may be large
            self.written.popleft().result()


def _batch_key(plan: Plan) -> Any:
    """Return a key that is equal for runs which can share a batch, each with the same bits as alone.

    With momentum or weight decay in any run the core takes another recursion, which rounds differently.
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
