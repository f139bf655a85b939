# SPDX-License-Identifier: MIT
"""`sweep`: a grid of specifications, run on any executor and resumable."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import operator
import os
import re
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from .._support.arrays import as_list, check_count, check_path, check_scale, random_generator
from .._support.files import remove_parts, write_text_whole
from .._support.locks import FolderLock
from .._support.optional import import_optional
from .._support.threads import available_cores
from .._trajectory.load import load
from .._trajectory.trajectory import Trajectory
from .._weights.widths import check_distribution
from . import spec
from . import sweep_worker as _sweep_worker
from .schema import SpecError, read_toml
from .sweep_worker import Item, Job, Report

__all__ = ["SweepGrid", "SweepResults", "sweep"]

_SWEEP: Final = "sweep"
_RESULTS: Final = "results.csv"
#: The sections that determine the result of a run; [output] determines its path only.
_HASHED: Final = ("problem", "weights", "train")
#: Size of a chunk as a share of the remaining runs, divided by the number of workers.
_SHARE: Final = 1 / 3
#: Least duration of a chunk in seconds: far above the overhead of submitting it and writing its files.
_LEAST: Final = 0.05
#: Chunks in flight per worker: one runs, one waits.
_IN_FLIGHT: Final = 2
#: First and longest interval in seconds between two polls of futures that cannot be waited for.
_POLL: Final = (0.01, 2.0)
#: Variables that BLAS and OpenMP read when they are loaded.
_LIMITS: Final = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_RESUME: Final = "start it again to resume"
#: Seconds to wait while another sweep writes the table.
_PATIENCE: Final = 60.0
#: Most processes that a pool of `concurrent.futures` can have on Windows.
_MAX_WINDOWS_WORKERS: Final = 61


class _Executor(Protocol):
    def submit(self, fn: Any, /, *args: Any) -> Any: ...


# --------------------------------------------------------------------------------------------------
# Grids
# --------------------------------------------------------------------------------------------------


class SweepGrid(Sequence[dict[str, Any]]):
    """A grid of specifications that differ in some entries; all are checked at construction.

    Parameters
    ----------
    base : path or mapping
        A TOML file as for ``dlnfast train``, or its sections as a mapping. A section [sweep] in it holds
        axes: ``"train.learning_rate" = [0.1, 0.2]``; an array of tables [[sweep]] holds explicit changes.
    axes : mapping or sequence of mappings, optional
        Axes that replace [sweep]. A mapping of "section.key" to values: the grid is their product, the last
        axis fastest. Or a sequence of mappings of "section.key" to a value: a run for each.
    changes : iterable of str
        ``"section.key=value"``, as `spec.read_spec` takes them; for a path only.

    Attributes
    ----------
    names : list of str
        The entries that are swept.
    items : list of Item
        The runs: hash and complete sections.
    output : dict
        The section [output] of the base.

    Raises
    ------
    SpecError
        For unknown, missing and wrong entries of any run, and values out of their range; the message names
        the run.
    OSError
        If the file cannot be read.

    Notes
    -----
    The hash of a run covers its sections [problem], [weights] and [train] with the defaults filled in, as
    canonical JSON: equal numbers are written alike, and paths are absolute. It does not cover the contents of
    data files, nor options added after version 0.1.0 that have their default.

    Examples
    --------
    >>> import dlnfast as dln
    >>> base = {
    ...     "problem": {"kind": "low-rank-recovery", "dim": 30, "rank": 3},
    ...     "weights": {"depth": 3},
    ...     "train": {"learning_rate": 1.0, "steps": 50},
    ... }
    >>> grid = dln.SweepGrid(base, {"weights.seed": range(3), "train.learning_rate": [0.5, 1.0]})
    >>> len(grid), grid[1]
    (6, {'weights.seed': 0, 'train.learning_rate': 1.0})
    """

    def __init__(
        self,
        base: str | os.PathLike[str] | Mapping[str, Any],
        axes: Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Any]] | None = None,
        changes: Iterable[str] = (),
    ) -> None:
        folder = Path()
        if isinstance(base, Mapping):
            raw = {str(name): _values(section) for name, section in base.items()}
            if as_list(changes, "changes", "a list of key=value"):
                raise ValueError("changes are for a file; wanted them in the mapping itself")
        elif isinstance(base, (str, os.PathLike)):
            raw = read_toml(base, changes, paths=["problem.path"])
            folder = Path(base).parent
        else:
            raise TypeError(f"base is {type(base).__name__}; wanted a path or a mapping of sections")
        table = raw.pop(_SWEEP, None)
        self._changes = _expand(axes if axes is not None else _flatten(table))
        self.names = list(dict.fromkeys(name for change in self._changes for name in change))
        self.items: list[Item] = []
        for i, change in enumerate(self._changes):
            try:
                self.items.append(_make_item(raw, change, folder))
            except (ValueError, TypeError) as error:
                raise SpecError(f"{_describe(i, change)}: {error}") from error
        self.output = dict(self.items[0].sections["output"])

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self._changes)

    def __getitem__(self, index: Any) -> Any:
        """Return the changed entries of a run, or of several runs."""
        if isinstance(index, slice):
            return [dict(change) for change in self._changes[index]]
        return dict(self._changes[index])

    def __repr__(self) -> str:
        """Return the number of runs and the names of the swept entries."""
        return f"SweepGrid({len(self)} runs over {', '.join(self.names) or 'nothing'})"


def _describe(number: int, change: Mapping[str, Any]) -> str:
    entries = ", ".join(f"{name} = {value!r}" for name, value in change.items())
    return f"run {number} of the sweep ({entries})" if entries else f"run {number} of the sweep"


def _values(value: Any) -> Any:
    """Return plain Python values; iterables become lists."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _values(item) for key, item in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_values(item) for item in value]
    return value


def _flatten(table: Any) -> Any:
    """Return [sweep] with "section.key" as names, quoted or not."""
    if table is None:
        return {}
    if isinstance(table, list):
        return [_flatten(change) for change in table]
    if not isinstance(table, Mapping):
        raise SpecError(f"sweep is {table!r}; wanted a section, [sweep], or an array of them, [[sweep]]")
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def _expand(axes: Any) -> list[dict[str, Any]]:
    """Return the changed entries of every run."""
    if isinstance(axes, Mapping):
        values = []
        for name, axis in axes.items():
            if isinstance(axis, (str, bytes, Mapping)) or not isinstance(axis, Iterable):
                raise SpecError(f"sweep.{name} is {axis!r}; wanted a list of values")
            values.append(_values(axis))
            if not values[-1]:
                raise SpecError(f"sweep.{name} is empty; wanted at least one value")
        names = [_check_entry(name) for name in axes]
        return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
    if isinstance(axes, (str, bytes)):
        raise TypeError(f"axes is {type(axes).__name__}; wanted a mapping, or a sequence of mappings")
    changes = []
    for change in as_list(axes, "axes", "a mapping, or a sequence of mappings"):
        if not isinstance(change, Mapping):
            raise TypeError(f"axes holds {type(change).__name__}; wanted mappings of section.key to a value")
        changes.append({_check_entry(name): _values(value) for name, value in change.items()})
    if not changes:
        raise SpecError("axes is empty; wanted at least one mapping")
    return changes


def _check_entry(name: Any) -> str:
    section, dot, key = str(name).partition(".")
    if not (section in _HASHED and dot and key):
        wanted = ", ".join(f"{known}.key" for known in _HASHED)
        raise SpecError(f"sweep.{name} is no entry of a specification; wanted one of {wanted}")
    return str(name)


def _make_item(raw: Mapping[str, Any], change: Mapping[str, Any], folder: Path) -> Item:
    """Return a checked run."""
    sections = {name: dict(table) if isinstance(table, dict) else table for name, table in raw.items()}
    for name, value in change.items():
        section, _, key = name.partition(".")
        table = sections.setdefault(section, {})
        if isinstance(table, dict):  # otherwise the check raises
            table[key] = str(folder / value) if name == "problem.path" and isinstance(value, str) else value
    chosen = spec.check_spec(sections)
    if chosen.problem.get("path") is not None:
        chosen.problem["path"] = os.path.abspath(chosen.problem["path"])
    _check_values(chosen)
    complete = chosen.to_dict()
    hashed = spec.settings_to_hash({name: complete[name] for name in _HASHED})
    text = json.dumps(_normalise_numbers(hashed), sort_keys=True)
    return Item(hashlib.sha256(text.encode()).hexdigest()[:16], complete)


def _normalise_numbers(value: Any) -> Any:
    """Return a value in which equal numbers are written alike: 1.0 as 1."""
    if isinstance(value, dict):
        return {key: _normalise_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_normalise_numbers(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _check_values(chosen: spec.Spec) -> None:
    """Raise for values out of their range, as far as that is known before there are any data."""
    problem, weights = chosen.problem, chosen.weights
    depth = weights["depth"] if weights["widths"] is None else len(weights["widths"]) - 1
    check_distribution(weights["widths"] or [1] * (depth + 1), weights["scale"], weights["dtype"])
    for section in (problem, weights):
        random_generator(section.get("seed", 0), ("checked",))
    if problem["kind"] == "low-rank-recovery":
        dim = check_count(problem["dim"], "problem.dim")
        rank = check_count(problem["rank"], "problem.rank", minimum=0)
        if rank > dim:
            raise SpecError(f"problem.rank is {rank}; wanted at most problem.dim = {dim}")
    if problem["kind"] == "npz" and not os.path.isfile(problem["path"]):
        raise SpecError(f"problem.path is {problem['path']}, which is no file")
    spec.train_options(chosen).checked(depth)


# --------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------


class SweepResults(Sequence[dict[str, Any]]):
    """The results of a sweep: a row for every run, in the grid's order.

    Attributes
    ----------
    rows : list of dict
        The swept entries; hash, outcome ("finished", "converged", "diverged", "failed", or None for a run
        that is not finished), engine, steps, final_loss, seconds, error; accuracy_train and accuracy_test
        where the problem has labels.
    directory : Path or None
        Folder that holds the folders of the runs.
    usage : dict
        Seconds: "wall", from the first chunk that was handed out to the last that came back; "start", until
        the default executor's first worker was ready; "cpu", "runs" and "jobs", added up over the workers:
        of their processes, in runs, in chunks. And "workers", "started", the number of runs that were run.
    """

    def __init__(
        self, rows: list[dict[str, Any]], names: list[str], directory: Path | None, usage: dict[str, Any]
    ) -> None:
        self.rows = rows
        self.names = names
        self.directory = directory
        self.usage = usage

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Return a row, or several."""
        return self.rows[index]

    def __repr__(self) -> str:
        """Return the number of runs with each outcome."""
        return f"SweepResults({self.counted()})"

    def counted(self) -> str:
        """Return the number of runs of every outcome."""
        found = [row["outcome"] or "not run" for row in self.rows]
        counts = ", ".join(f"{found.count(outcome)} {outcome}" for outcome in sorted(set(found)))
        return f"{len(self)} runs: {counts}"

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in their order."""
        return list(dict.fromkeys(itertools.chain(self.names, *self.rows)))

    def load(self, index: int) -> Trajectory:
        """Return the trajectory of a run; for a diverged run the records before.

        Parameters
        ----------
        index : int
            Index of the run in the grid, from 0.

        Returns
        -------
        Trajectory

        Raises
        ------
        ValueError
            If the sweep has not saved it.
        """
        try:
            row = self.rows[operator.index(index)]
        except (TypeError, IndexError, OverflowError):
            raise ValueError(f"index is {index!r}; wanted one of {len(self.rows)} runs, from 0") from None
        if self.directory is not None:
            folder = self.directory / row["hash"]
            for name in (_sweep_worker.RUN, _sweep_worker.DIVERGED_RUN):
                if (folder / name).is_file():
                    return load(folder / name)
        outcome = row["outcome"] or "not run yet"
        raise ValueError(
            f"run {index} ({outcome}) has no trajectory; wanted a sweep with a directory and keep_runs=True"
        )

    def to_pandas(self) -> Any:
        """Return the rows as a pandas.DataFrame.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        pandas = import_optional("pandas", "to_pandas (rows has the same as a list of dicts)", "sweep")
        return pandas.DataFrame(self.rows, columns=self.columns)

    def to_markdown(self) -> str:
        """Return the rows as a Markdown table, without the hashes."""
        columns = [name for name in self.columns if name != "hash"]
        lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for row in self.rows:
            cells = [_cell(row.get(name)) for name in columns]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def to_csv(self) -> str:
        """Return the rows as CSV; lists are JSON in their cells."""
        columns, text = self.columns, io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for row in self.rows:
            values = (row.get(name) for name in columns)
            writer.writerow([json.dumps(v) if isinstance(v, (list, bool)) else v for v in values])
        return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


# --------------------------------------------------------------------------------------------------
# The sweep
# --------------------------------------------------------------------------------------------------


def sweep(
    grid: SweepGrid | str | os.PathLike[str] | Mapping[str, Any],
    executor: _Executor | None = None,
    *,
    directory: str | os.PathLike[str] | None = None,
    keep_runs: bool = False,
    retry_failed: bool = False,
    n_workers: int | None = None,
    chunk_seconds: float = 2.0,
    progress: bool = False,
) -> SweepResults:
    """Run every specification of a grid.

    Parameters
    ----------
    grid : SweepGrid, path or mapping
        Grid of runs; a path or a mapping is turned into a `SweepGrid`.
    executor : concurrent.futures.Executor, optional
        Anything with `submit` whose futures have `done` and `result`: threads, processes, dask.distributed,
        mpi4py.futures, submitit. It stays open. By default processes on this machine, started afresh (never
        forked), as many as there are cores; a script that calls `sweep` needs
        ``if __name__ == "__main__":`` then.
    directory : path, optional
        Folder of the runs, each in a folder named by its hash: ``spec.json``, and ``summary.json`` when it is
        finished. Finished runs are not run again. By default [output] directory;
        without either, nothing is written.
    keep_runs : bool
        Whether to write ``run.npz`` too (``diverged.npz`` for a diverged run), for `SweepResults.load`.
    retry_failed : bool
        Whether to run failed and diverged runs again, whatever the reason.
    n_workers : int, optional
        Processes of the default executor (on Windows at most 61); of another, how many calls it runs at once.
        By default as many as there are cores.
    chunk_seconds : float
        Longest time after the start of a chunk at which its next run may start, in seconds. Choose it large
        where a call takes long to start.
    progress : bool
        Whether to show a progress bar over the runs on a terminal.

    Returns
    -------
    SweepResults

    Raises
    ------
    SpecError
        For a grid with a mistake in any run, before anything runs.
    TypeError, ValueError
        For another argument out of its range.
    RuntimeError
        If the workers cannot be started.

    Notes
    -----
    A run that diverges or fails has a row that says so, and the other runs continue. A dead worker process is
    replaced, and the run that killed it is found and gets such a row. Failures for a reason of the machine (a
    full disk, too little memory, a signal, a package that is missing) are not written to the directory: the
    next sweep there runs these runs again.

    Runs of small networks whose dynamics close in at most 8 dimensions go through the engine of
    `train_batch`, those of equal shape side by side; every run has the same bits as alone. Each
    worker of the default executor has at most cores / workers threads, in NumPy's BLAS and in runs that set
    no number of threads; as in `train`, large runs use fewer while other programs use the cores.

    Several processes may run one sweep in one directory: they share finished runs, and may do a run
    twice. After Ctrl-C the workers get two seconds to finish, and the attribute ``results`` of the
    KeyboardInterrupt holds the results so far. A sweep that is killed loses only its unfinished runs.

    Examples
    --------
    >>> import dlnfast as dln
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> base = {
    ...     "problem": {"kind": "low-rank-recovery", "dim": 30, "rank": 3},
    ...     "weights": {"depth": 3},
    ...     "train": {"learning_rate": 1.0, "steps": 50},
    ... }
    >>> grid = dln.SweepGrid(base, {"weights.scale": [0.25, 0.5, 1.0]})
    >>> with ThreadPoolExecutor(2) as executor:
    ...     results = dln.sweep(grid, executor)
    >>> results
    SweepResults(3 runs: 3 finished)
    """
    if not isinstance(grid, SweepGrid):
        grid = SweepGrid(grid)
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise TypeError(f"executor is {type(executor).__name__}; wanted an object with submit")
    cores = available_cores()
    workers = cores if n_workers is None else check_count(n_workers, "n_workers")
    budget = check_scale(chunk_seconds, "chunk_seconds", strict=True)
    chosen = directory if directory is not None else grid.output["directory"]
    folder = None if chosen is None else check_path(chosen, "directory").absolute()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    unique = {item.hash: item for item in grid.items}
    rows: dict[str, dict[str, Any]] = {}
    if folder is not None:
        for name in unique:
            summary = _sweep_worker.load_finished(folder, name, keep=keep_runs, retry=retry_failed)
            if summary is not None:
                rows[name] = _sweep_worker.row_of(summary)
    todo = sorted((item for name, item in unique.items() if name not in rows), key=_order)
    most_threads = None
    if executor is None:
        # From the whole grid: a resumed sweep uses as many threads, so finished runs count too.
        most_threads = max(1, cores // min(workers, len(unique)))
        workers = max(1, min(workers, len(todo)))
        if sys.platform == "win32":
            workers = min(workers, _MAX_WINDOWS_WORKERS)
    sweeping = _Sweep(
        rows=rows,
        total=len(unique),
        directory=None if folder is None else str(folder),
        keep=keep_runs,
        retry=retry_failed,
        most_threads=most_threads,
        workers=workers,
        seconds=budget,
        executor=executor,
    )
    try:
        if todo:
            sweeping.run(todo, progress)
    except BaseException as error:
        error.add_note(f"{len(rows)} of {len(unique)} runs of the sweep are finished; {_RESUME}")
        error.results = _results(grid, rows, folder, sweeping.usage)  # type: ignore[attr-defined]
        raise
    finally:
        _sweep_worker.forget()
    results = _results(grid, rows, folder, sweeping.usage)
    if folder is not None:
        _write_table(folder, results)
    return results


def _write_table(folder: Path, results: SweepResults) -> None:
    """Write the table of a sweep; an error has the results as its attribute ``results``."""
    try:
        with FolderLock(folder, seconds=_PATIENCE):
            remove_parts(folder, re.compile(re.escape(_RESULTS)))
            write_text_whole(folder / _RESULTS, results.to_csv())
    except BaseException as error:
        error.add_note(f"the sweep is done, but {folder / _RESULTS} is not written; {_RESUME}")
        error.results = results  # type: ignore[attr-defined]
        raise


def _results(
    grid: SweepGrid, rows: Mapping[str, dict[str, Any]], folder: Path | None, usage: dict[str, Any]
) -> SweepResults:
    none = {"outcome": None}
    table = [
        {**change, "hash": item.hash, **rows.get(item.hash, none)}
        for change, item in zip(grid, grid.items, strict=True)
    ]
    return SweepResults(table, grid.names, folder, usage)


def _order(item: Item) -> tuple[Any, ...]:
    """Return the sorting key of a run: long runs first, then similar runs together."""
    problem, weights, train = (item.sections[name] for name in _HASHED)
    text = [json.dumps(part, sort_keys=True) for part in (problem, weights, train)]
    shape = (str(weights["depth"]), str(weights["widths"]), weights["dtype"], str(train["momentum"]))
    return (-train["steps"], problem["kind"], *shape, *text)


class _Broken(RuntimeError):
    """The executor cannot take further calls."""


class _Sweep:
    """A sweep in progress: queued runs, submitted chunks, and rows of finished runs."""

    def __init__(
        self,
        *,
        rows: dict[str, dict[str, Any]],
        total: int,
        directory: str | None,
        keep: bool,
        retry: bool,
        most_threads: int | None,
        workers: int,
        seconds: float,
        executor: _Executor | None,
    ) -> None:
        self.rows = rows
        self.total = total
        self.directory = directory
        self.keep = keep
        self.retry = retry
        # A run chooses its number of threads, up to the limit of its process, from the times of its steps: a
        # larger number than 1 is never passed on, because it would be taken literally on a busy machine too.
        self.n_threads = 1 if most_threads == 1 else 0
        self.workers = workers
        self.seconds = seconds
        self.local = None if most_threads is None else _LocalProcesses(workers, most_threads)
        self.executor = executor
        self.queue: deque[Item] = deque()
        #: Runs that a dead worker may have been running: each is repeated alone.
        self.suspects: deque[Item] = deque()
        self.flying: dict[Any, tuple[Item, ...]] = {}
        self.cpu: dict[int, float] = {}
        self.usage: dict[str, Any] = {
            "wall": 0.0,
            "start": 0.0,
            "cpu": 0.0,
            "runs": 0.0,
            "jobs": 0.0,
            "workers": workers,
            "started": 0,
        }

    def run(self, todo: Sequence[Item], progress: bool) -> None:
        """Run all of them."""
        self.queue.extend(todo)
        begin = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self.local is not None:
                stack.callback(self.local.close)
                self.local.open()
                self.usage["start"] = time.perf_counter() - begin
            bar = None
            if progress:
                from tqdm import tqdm

                done = len(self.rows)
                bar = stack.enter_context(
                    tqdm(total=self.total, initial=done, unit="run", disable=None, leave=False)
                )
            try:
                self._work_off(bar)
            except BaseException:
                self._give_up()
                raise
            finally:
                self.usage["wall"] = time.perf_counter() - begin

    def _work_off(self, bar: Any) -> None:
        while self.queue or self.suspects or self.flying:
            try:
                self._hand_out()
                for future in _wait_for_some(list(self.flying)):
                    self._collect(future)
            except _Broken as error:
                self._start_again(error)
            if bar is not None:
                bar.update(len(self.rows) - bar.n)

    def _hand_out(self) -> None:
        while self.suspects and not self.flying:
            self._submit((self.suspects.popleft(),))
        while self.queue and not self.suspects and len(self.flying) < _IN_FLIGHT * self.workers:
            self._submit(tuple(self.queue.popleft() for _ in range(self._size())))

    def _size(self) -> int:
        """Return the size of the next chunk; chunks shrink, so that all workers end together."""
        left, usage = len(self.queue), self.usage
        worth = _LEAST * usage["started"] / usage["jobs"] if usage["jobs"] > 0 else 1.0
        return math.ceil(min(max(_SHARE * left, worth * self.workers), left) / self.workers)

    def _submit(self, items: tuple[Item, ...]) -> None:
        job = Job(
            items, self.directory, self.keep, self.retry, self.n_threads, self.seconds, secrets.token_hex(8)
        )
        executor = self.local if self.local is not None else self.executor
        assert executor is not None
        try:
            self.flying[executor.submit(_sweep_worker.run_job, job)] = items
        except BaseException:
            self.queue.extendleft(reversed(items))
            raise

    def _collect(self, future: Any) -> None:
        from concurrent.futures import BrokenExecutor, CancelledError

        items = self.flying[future]
        try:
            report: Report = future.result()
        except BrokenExecutor as error:
            raise _Broken(f"the executor is broken: {error}") from error
        except CancelledError as error:
            raise RuntimeError("the executor cancelled runs") from error
        except Exception as error:
            del self.flying[future]
            if len(items) == 1:
                text = f"{type(error).__name__}: {error}"
                self._fail(items[0], text, for_good=not _sweep_worker.is_temporary(error))
            else:  # which of them it was?
                self.suspects.extend(items)
            return
        del self.flying[future]
        self.rows.update(report.rows)
        self.queue.extendleft(reversed(report.left))
        self.cpu[report.pid] = report.cpu_seconds
        self.usage["cpu"] = sum(self.cpu.values())
        self.usage["runs"] += report.run_seconds
        self.usage["jobs"] += report.seconds
        self.usage["started"] += len(report.rows)

    def _fail(self, item: Item, error: str, *, for_good: bool) -> None:
        summary = _sweep_worker.failure(item, error, 0.0)
        if self.directory is not None and for_good:
            _sweep_worker.record(self.directory, item, summary)
        self.rows[item.hash] = _sweep_worker.row_of(summary)

    def _start_again(self, error: _Broken) -> None:
        """Continue with new processes after one of them has died."""
        if self.local is None:
            raise error
        lost: list[tuple[Item, ...]] = []
        for future, items in list(self.flying.items()):
            try:
                future.exception()  # waits: the other futures of a broken pool finish soon
                self._collect(future)
            except _Broken:
                lost.append(items)
        self.flying.clear()
        if len(lost) == 1 and len(lost[0]) == 1:
            text = f"the worker process died ({error.__cause__})"
            self._fail(lost[0][0], text, for_good=False)  # a signal, or too little memory
        else:
            self.suspects.extend(item for items in lost for item in items)
        self.local.close()
        self.local.open()

    def _give_up(self) -> None:
        """Cancel chunks that have not started, and collect those that finish."""
        for future in self.flying:
            cancel = getattr(future, "cancel", None)  # an executor need not have it
            # The caller must see the error that stopped the sweep, not one of the executor.
            with contextlib.suppress(Exception):
                if callable(cancel):
                    cancel()
        if self.local is not None:
            self.local.close()
        for future in list(self.flying):
            with contextlib.suppress(BaseException):
                if future.done():
                    self._collect(future)


def _wait_for_some(futures: Sequence[Any]) -> list[Any]:
    """Wait until some futures are done, and return them."""
    from concurrent import futures as standard

    if not futures:
        return []
    if all(isinstance(future, standard.Future) for future in futures):
        return list(standard.wait(futures, return_when=standard.FIRST_COMPLETED).done)
    pause, longest = _POLL
    while not (found := [future for future in futures if future.done()]):
        time.sleep(pause)
        pause = min(2 * pause, longest)
    return found


class _LocalProcesses:
    """Spawned processes on this machine, which end together with this process."""

    def __init__(self, workers: int, most_threads: int) -> None:
        self.workers = workers
        self.limits = {name: str(_limit_threads(os.environ.get(name), most_threads)) for name in _LIMITS}
        self.pool: Any = None
        self.ends: tuple[Any, ...] = ()

    def open(self) -> None:
        import multiprocessing
        from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
        from concurrent.futures.process import BrokenProcessPool

        context = multiprocessing.get_context("spawn")
        self.ends = context.Pipe(duplex=False)
        self.pool = ProcessPoolExecutor(
            self.workers, mp_context=context, initializer=_sweep_worker.start, initargs=(self.ends[0],)
        )
        try:
            first = [self.submit(_sweep_worker.report_ready) for _ in range(self.workers)]
            for future in wait(first, return_when=FIRST_COMPLETED).done:
                future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "the workers of the sweep did not start; a script that calls sweep needs "
                'if __name__ == "__main__": around the call, and has to be a file'
            ) from error

    def submit(self, function: Any, *arguments: Any) -> Any:
        from concurrent.futures import BrokenExecutor

        # A process that starts now reads these before NumPy loads its BLAS.
        with _environment(self.limits), _block_interrupts():
            try:
                return self.pool.submit(function, *arguments)
            except BrokenExecutor as error:
                raise _Broken(str(error)) from error

    def close(self) -> None:
        """End the workers; each may finish its current run within two seconds."""
        if self.pool is None:
            return
        reader, writer = self.ends
        writer.close()
        self.pool.shutdown(wait=True, cancel_futures=True)
        reader.close()
        self.pool = None


@contextlib.contextmanager
def _block_interrupts() -> Iterator[None]:
    """Block SIGINT, so that processes started here inherit that and Ctrl-C reaches the parent only."""
    if sys.platform == "win32":
        yield
    else:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _limit_threads(setting: str | None, n_threads: int) -> int:
    """Return a number of threads, or a smaller one from an environment variable."""
    first = (setting or "").partition(",")[0]
    return min(int(first), n_threads) if first.isdecimal() and int(first) > 0 else n_threads


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that are started in the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
