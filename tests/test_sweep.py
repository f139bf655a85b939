# SPDX-License-Identifier: MIT
"""Sweeps: grids, runs equal to those of `train`, executors, interrupted sweeps."""

from __future__ import annotations

import contextlib
import csv
import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from helpers.executors import InlineExecutor
from helpers.optional_packages import import_pandas
from tolerances import tolerance

import dlnfast as dln
from dlnfast._config import sweep as sweep_module
from dlnfast._config.schema import SpecError
from dlnfast._config.sweep import _environment, _LocalProcesses
from dlnfast._support.threads import available_cores

BENCH = Path(__file__).parent.parent / "bench"
DIM, STEPS = 12, 60
BASE = {
    "problem": {"kind": "low-rank-recovery", "dim": DIM, "rank": 2},
    "weights": {"depth": 3, "scale": 0.5},
    "train": {"learning_rate": 1.0, "steps": STEPS, "record_every": 20},
}
#: Runs in batches, runs alone, diverging runs and, with decay, another recursion.
AXES = {
    "train.learning_rate": [0.5, 1e9],
    "weights.seed": range(3),
    "train.engine": ["auto", "dense"],
    "train.weight_decay": [0.0, 0.01],
}
TOML = """
[problem]
kind = "low-rank-recovery"
dim = 12
rank = 2
[weights]
depth = 3
[train]
learning_rate = 1.0
steps = 60
"""


class Polled:
    """A job like those of submitit: not a `concurrent.futures.Future`, and finished after some polls."""

    def __init__(self, function, *arguments):
        self.call, self.looks = (function, arguments), 0

    def done(self):
        self.looks += 1
        return self.looks > 2

    def result(self):
        return self.call[0](*self.call[1])

    def cancel(self):
        pass


class Polling:
    def submit(self, function, *arguments):
        return Polled(function, *arguments)


def outcome_rows(results):
    return [(row["hash"], row["outcome"], row["final_loss"], row["error"]) for row in results]


@pytest.fixture(scope="module")
def inline_results():
    return outcome_rows(dln.sweep(dln.SweepGrid(BASE, AXES), InlineExecutor()))


# Grids.


def test_a_grid_is_the_product_of_its_axes_in_their_order():
    grid = dln.SweepGrid(BASE, {"weights.seed": np.arange(2), "train.learning_rate": (0.5, 1.0, 2.0)})
    assert len(grid) == 6
    assert grid.names == ["weights.seed", "train.learning_rate"]
    assert grid[1] == {"weights.seed": 0, "train.learning_rate": 1.0}
    assert grid[3:5] == [
        {"weights.seed": 1, "train.learning_rate": 0.5},
        {"weights.seed": 1, "train.learning_rate": 1.0},
    ]
    assert repr(grid) == "SweepGrid(6 runs over weights.seed, train.learning_rate)"
    assert grid.items[4].sections["train"]["learning_rate"] == 1.0
    assert len({item.hash for item in grid.items}) == 6


def test_a_grid_may_be_a_list_of_changes():
    grid = dln.SweepGrid(BASE, [{"weights.depth": 2, "train.steps": 5}, {"weights.seed": 3}, {}])
    assert [item.sections["weights"]["depth"] for item in grid.items] == [2, 3, 3]
    assert grid.names == ["weights.depth", "train.steps", "weights.seed"]
    assert len(dln.SweepGrid(BASE)) == 1


@pytest.mark.parametrize(
    "table",
    [
        '[sweep]\n"weights.seed" = [0, 1]\n"train.learning_rate" = [0.5, 1]',
        "[sweep]\nweights.seed = [0, 1]\ntrain.learning_rate = [0.5, 1]",
        "[[sweep]]\nweights.seed = 0\ntrain.learning_rate = 0.5\n"
        "[[sweep]]\nweights.seed = 0\ntrain.learning_rate = 1\n"
        "[[sweep]]\nweights.seed = 1\ntrain.learning_rate = 0.5\n"
        "[[sweep]]\nweights.seed = 1\ntrain.learning_rate = 1",
    ],
)
def test_a_grid_from_a_file(tmp_path, table):
    spec_path = tmp_path / "spec.toml"
    spec_path.write_text(TOML + table)
    grid = dln.SweepGrid(spec_path)
    base = {**BASE, "weights": {"depth": 3}, "train": {"learning_rate": 1, "steps": STEPS}}
    same = dln.SweepGrid(base, {"weights.seed": [0, 1], "train.learning_rate": [0.5, 1.0]})
    assert list(grid) == list(same)
    assert [item.hash for item in grid.items] == [item.hash for item in same.items]
    changed = dln.SweepGrid(spec_path, changes=["train.steps=7", "output.directory=x"])
    assert {item.sections["train"]["steps"] for item in changed.items} == {7}
    assert changed.output["directory"] == "x"


def test_the_hash_depends_on_the_settings_that_change_the_result(tmp_path):
    def name(**changes):
        sections = {section: {**BASE[section], **changes.get(section, {})} for section in BASE}
        return dln.SweepGrid({**sections, "output": changes.get("output", {})}).items[0].hash

    # Part of the format: results of a sweep are found by it.
    assert name() == "b61143e3ac23b5e4"
    assert name(train={"learning_rate": 1}) == name(train={"momentum": 0}) == name()
    assert name(output={"directory": "elsewhere", "weights": False}) == name()
    assert name(train={"momentum": 0.5}) != name()
    assert name(weights={"seed": 1}) != name()
    assert name(weights={"implicit": False}) == name() != name(weights={"implicit": True})


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    np.savez(tmp_path / "data.npz", X=np.eye(3), Y=np.eye(3))
    tail = TOML.partition("rank = 2")[2]
    (tmp_path / "spec.toml").write_text(f"[problem]\nkind = 'npz'\npath = 'data.npz'{tail}")
    one = dln.SweepGrid(tmp_path / "spec.toml").items[0]
    monkeypatch.chdir(tmp_path)
    other = dln.SweepGrid("spec.toml", {"problem.path": ["data.npz"]}).items[0]
    assert one == other
    assert one.sections["problem"]["path"] == str(tmp_path / "data.npz")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"train.learning_rate": 0.5}, "sweep.train.learning_rate is 0.5; wanted a list of values"),
        ({"train.learning_rate": "auto"}, "wanted a list of values"),
        ({"train.learning_rate": []}, "sweep.train.learning_rate is empty"),
        ({"learning_rate": [1]}, "sweep.learning_rate is no entry of a specification"),
        ({"output.directory": ["a"]}, "sweep.output.directory is no entry"),
        ([], "axes is empty"),
        ({"train.rate": [1]}, r"run 0 of the sweep \(train.rate = 1\): train.rate is not a setting"),
        ({"train.steps": [1, 2.5]}, r"run 1 of the sweep \(train.steps = 2.5\): train.steps is 2.5"),
        ({"train.steps": [1, -1]}, "run 1 .*steps is -1"),
        ({"train.momentum": [0.0, 1.0]}, r"run 1 .*momentum \(mu\) is 1"),
        ({"train.learning_rate": [[1.0, 1.0]]}, r"learning_rate \(eta\) has 2 values"),
        ({"train.record_every": [0]}, "record_every"),
        ({"train.optimizer": ["adam"]}, "adam"),
        ({"train.device": ["cpu"]}, "train.device is 'cpu'"),
        ({"weights.scale": [-1.0]}, "scale"),
        ({"weights.scale": [[1.0, 1.0]]}, "scale"),
        ({"weights.seed": [-1]}, "seed is -1"),
        ({"problem.rank": [1, 13]}, "run 1 .*problem.rank is 13; wanted at most problem.dim = 12"),
        ({"problem.kind": ["npz"]}, "problem.dim is not a setting"),
    ],
)
def test_invalid_grids_raise_an_error_before_the_first_run(axes, message):
    with pytest.raises(SpecError, match=message):
        dln.SweepGrid(BASE, axes)


def test_errors_name_bad_arguments_of_a_grid():
    with pytest.raises(TypeError, match="base is int"):
        dln.SweepGrid(3)
    with pytest.raises(TypeError, match="axes is int"):
        dln.SweepGrid(BASE, 3)
    with pytest.raises(TypeError, match="axes holds int"):
        dln.SweepGrid(BASE, [3])
    with pytest.raises(ValueError, match="changes are for a file"):
        dln.SweepGrid(BASE, changes=["train.steps=3"])


def test_errors_name_bad_arguments_of_a_sweep():
    with pytest.raises(TypeError, match="executor is str; wanted an object with submit"):
        dln.sweep(BASE, "threads")
    with pytest.raises(ValueError, match="n_workers is 0"):
        dln.sweep(BASE, InlineExecutor(), n_workers=0)
    with pytest.raises(ValueError, match="chunk_seconds is 0"):
        dln.sweep(BASE, InlineExecutor(), chunk_seconds=0)


def test_errors_name_bad_specifications_of_a_sweep(tmp_path):
    with pytest.raises(SpecError, match="sweep is 3; wanted a section"):
        dln.sweep({**BASE, "sweep": 3}, InlineExecutor())
    problem = {"kind": "npz", "path": str(tmp_path / "none.npz")}
    with pytest.raises(SpecError, match="which is no file"):
        dln.sweep({**BASE, "problem": problem}, InlineExecutor())


# Results of runs.


def test_runs_equal_those_of_train():
    results = dln.sweep(dln.SweepGrid(BASE, AXES), InlineExecutor())
    assert len(results) == 24
    problem = dln.low_rank_recovery(DIM, 2)
    for row in results:
        start = dln.orthogonal([DIM] * 4, 0.5, row["weights.seed"])
        arguments = {name: row[f"train.{name}"] for name in ("learning_rate", "engine", "weight_decay")}
        if row["train.learning_rate"] > 1:
            with pytest.raises(dln.DivergedError) as caught:
                dln.train(problem, start, steps=STEPS, **arguments)
            assert (row["outcome"], row["final_loss"], row["error"]) == ("diverged", None, str(caught.value))
            continue
        run = dln.train(problem, start, steps=STEPS, **arguments)
        assert (row["outcome"], row["engine"], row["steps"]) == ("finished", run.engine, STEPS)
        assert row["error"] is None
        assert row["final_loss"] == pytest.approx(run.loss[-1], rel=tolerance(np.float64, DIM, STEPS))
    assert results.counted() == "24 runs: 12 diverged, 12 finished"


def test_runs_with_lazily_sampled_weights_equal_those_of_train():
    base = {**BASE, "weights": {**BASE["weights"], "implicit": True}}
    for row in dln.sweep(dln.SweepGrid(base, {"train.learning_rate": [0.5, 1.0]}), InlineExecutor()):
        start = dln.orthogonal([DIM] * 4, 0.5, implicit=True)
        rate = row["train.learning_rate"]
        run = dln.train(dln.low_rank_recovery(DIM, 2), start, learning_rate=rate, steps=STEPS)
        assert (row["outcome"], row["engine"], row["final_loss"]) == ("finished", "reduced", run.loss[-1])


def test_a_run_has_the_same_bits_whatever_runs_beside_it(inline_results):
    for i in (0, 5, 11):
        change = dln.SweepGrid(BASE, AXES)[i]
        assert outcome_rows(dln.sweep(dln.SweepGrid(BASE, [change]), InlineExecutor())) == [inline_results[i]]
    # A chunk that may start only one run returns the others.
    assert (
        outcome_rows(dln.sweep(dln.SweepGrid(BASE, AXES), InlineExecutor(), chunk_seconds=1e-9))
        == inline_results
    )


def test_runs_with_and_without_momentum_side_by_side_change_no_bit():
    axes = {"train.momentum": [0.0, 0.9], "weights.seed": range(4), "train.weight_decay": [0.0, 0.1]}
    grid = dln.SweepGrid(BASE, axes)
    together = outcome_rows(dln.sweep(grid, InlineExecutor()))
    alone = [outcome_rows(dln.sweep(dln.SweepGrid(BASE, [change]), InlineExecutor()))[0] for change in grid]
    assert together == alone


def test_runs_that_fail_are_recorded_and_do_not_stop_the_others(tmp_path):
    base = {**BASE, "weights": {"scale": 0.5}}
    axes = {"weights.widths": [[DIM] * 4, [DIM + 1] * 4], "train.engine": ["auto", "dense"]}
    grid = dln.SweepGrid(base, axes)
    results = dln.sweep(grid, InlineExecutor(), directory=tmp_path)
    assert [row["outcome"] for row in results] == ["finished", "finished", "failed", "failed"]
    for row in results[2:]:
        assert row["error"].startswith(("ShapeError: ", "ValueError: "))
        assert json.loads((tmp_path / row["hash"] / "summary.json").read_text())["error"] == row["error"]
    assert dln.sweep(grid, InlineExecutor(), directory=tmp_path).usage["started"] == 0
    again = dln.sweep(grid, InlineExecutor(), directory=tmp_path, retry_failed=True)
    assert again.usage["started"] == 2
    assert outcome_rows(again) == outcome_rows(results)


def test_runs_that_fail_for_lack_of_memory_are_repeated(tmp_path):
    grid = dln.SweepGrid(BASE, {"train.steps": [10, 10**15], "train.engine": ["auto", "dense"]})
    results = dln.sweep(grid, InlineExecutor(), directory=tmp_path)
    assert [row["outcome"] for row in results] == ["finished", "finished", "failed", "failed"]
    for row in results[2:]:
        assert row["error"].startswith("MemoryError: ")
        assert not (tmp_path / row["hash"]).exists()
    again = dln.sweep(grid, InlineExecutor(), directory=tmp_path)
    assert again.usage["started"] == 2
    assert outcome_rows(again) == outcome_rows(results)


@pytest.mark.parametrize(
    ("error", "is_run_again"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (MemoryError("too large"), True),
        (ModuleNotFoundError("No module named 'torch'"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("data that do not fit"), False),
    ],
)
def test_failures_of_the_machine_are_retried(error, is_run_again, tmp_path, monkeypatch):
    from dlnfast._config import sweep_worker as _sweep_worker

    def failing(*arguments, **settings):
        raise error

    grid = dln.SweepGrid(BASE, {"train.engine": ["dense"]})
    with monkeypatch.context() as patch:
        patch.setattr(_sweep_worker, "train", failing)
        (row,) = dln.sweep(grid, InlineExecutor(), directory=tmp_path)
    assert row["outcome"] == "failed"
    assert row["error"] == f"{type(error).__name__}: {error}"
    (again,) = dln.sweep(grid, InlineExecutor(), directory=tmp_path)
    assert again["outcome"] == ("finished" if is_run_again else "failed")
    (retried,) = dln.sweep(grid, InlineExecutor(), directory=tmp_path, retry_failed=True)
    assert retried["outcome"] == "finished"


@pytest.mark.parametrize("error", [BrokenProcessPool("a process died"), OSError(errno.ENOSPC, "full")])
def test_runs_of_killed_workers_are_repeated(error, tmp_path):
    class Dying(InlineExecutor):
        def submit(self, function, *arguments):
            future = Future()
            future.set_exception(error)
            return future

    grid = dln.SweepGrid(BASE, {"weights.seed": [0, 1]})
    with contextlib.suppress(RuntimeError):  # the executor is broken: the sweep ends there
        results = dln.sweep(grid, Dying(), directory=tmp_path)
        assert [row["outcome"] for row in results] == ["failed", "failed"]
    assert not list(tmp_path.glob("*/summary.json"))
    results = dln.sweep(grid, InlineExecutor(), directory=tmp_path)
    assert [row["outcome"] for row in results] == ["finished", "finished"]


def test_a_failed_write_of_the_table_loses_no_result(tmp_path, monkeypatch):
    from dlnfast._config import sweep as module

    def failing(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_text_whole", failing)
    with pytest.raises(OSError, match="No space") as caught:
        dln.sweep(dln.SweepGrid(BASE), InlineExecutor(), directory=tmp_path)
    assert [row["outcome"] for row in caught.value.results] == ["finished"]
    assert "results.csv is not written" in caught.value.__notes__[-1]


def test_temporary_files_of_killed_sweeps_are_removed(tmp_path):
    grid = dln.SweepGrid(BASE)
    folder = tmp_path / grid.items[0].hash
    for _ in range(2):  # of an unfinished run, and of a finished one
        folder.mkdir(exist_ok=True)
        for name in ("summary.json.17.0a1b2c3d.part", "owner.lock"):
            (folder / name).write_text("")
        dln.sweep(grid, InlineExecutor(), directory=tmp_path)
        assert {path.name for path in folder.iterdir()} == {"spec.json", "summary.json"}


def test_equal_runs_are_computed_once():
    results = dln.sweep(dln.SweepGrid(BASE, {"train.learning_rate": [1, 1.0, 0.5]}), InlineExecutor())
    assert results.usage["started"] == 2
    assert results[0]["hash"] == results[1]["hash"] != results[2]["hash"]


def test_accuracies_are_columns():
    base = {**BASE, "problem": {"kind": "classification", "n_classes": 3, "samples_per_class": 4, "dim": DIM}}
    results = dln.sweep(dln.SweepGrid(base, {"weights.seed": [0, 1]}), InlineExecutor())
    assert all(0 <= row["accuracy_train"] <= 1 for row in results)


# Folders.


@pytest.fixture(scope="module")
def sweep_with_runs(tmp_path_factory):
    """Return a grid, its results and the folder, with the runs."""
    folder = tmp_path_factory.mktemp("sweep")
    grid = dln.SweepGrid(BASE, AXES)
    return grid, dln.sweep(grid, InlineExecutor(), directory=folder, keep_runs=True), folder


def test_folders_contain_the_specifications_and_the_runs(sweep_with_runs):
    grid, results, directory = sweep_with_runs
    assert {path.name for path in directory.iterdir()} == {"results.csv", *(item.hash for item in grid.items)}
    for i, (item, row) in enumerate(zip(grid.items, results, strict=True)):
        folder = directory / item.hash
        run_file = "diverged.npz" if row["outcome"] == "diverged" else "run.npz"
        assert {path.name for path in folder.iterdir()} == {"spec.json", "summary.json", run_file}
        assert json.loads((folder / "spec.json").read_text()) == item.sections
        summary = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
        assert summary["spec"] == item.sections
        run = results.load(i)
        assert summary["final_loss"] == run.loss[-1]
        assert summary["steps"] == row["steps"] == len(run.loss) - 1
        assert summary["why"].startswith(run.engine)
        assert summary["environment"]["dlnfast"]["version"] == dln.__version__


def test_the_table_has_a_row_for_every_run(sweep_with_runs):
    grid, results, directory = sweep_with_runs
    with (directory / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["hash"] for row in table] == [item.hash for item in grid.items]
    assert float(table[0]["final_loss"]) == results[0]["final_loss"]


def test_finished_runs_are_not_repeated(tmp_path):
    part = dln.SweepGrid(BASE, {**AXES, "weights.seed": range(2)})
    dln.sweep(part, InlineExecutor(), directory=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/summary.json")}
    results = dln.sweep(dln.SweepGrid(BASE, AXES), InlineExecutor(), directory=tmp_path)
    assert results.usage["started"] == 8
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(ValueError, match=r"run 0 \(finished\) has no trajectory"):
        results.load(0)
    # Asking for trajectories repeats runs without one.
    with_runs = dln.sweep(dln.SweepGrid(BASE, AXES), InlineExecutor(), directory=tmp_path, keep_runs=True)
    assert with_runs.usage["started"] == 12  # diverged runs have a trajectory
    assert outcome_rows(with_runs) == outcome_rows(results)
    assert with_runs.load(0).loss[-1] == with_runs[0]["final_loss"]


def test_an_incomplete_summary_is_ignored(tmp_path, inline_results):
    grid = dln.SweepGrid(BASE, AXES)
    folder = tmp_path / grid.items[0].hash
    folder.mkdir()
    (folder / "summary.json").write_text('{"hash": ')
    assert outcome_rows(dln.sweep(grid, InlineExecutor(), directory=tmp_path)) == inline_results


def test_results_are_written_to_the_directory_of_the_specification(tmp_path):
    results = dln.sweep({**BASE, "output": {"directory": str(tmp_path / "there")}}, InlineExecutor())
    assert results.directory == tmp_path / "there"
    assert (tmp_path / "there" / "results.csv").is_file()


# Tables.


def test_results_are_formatted_as_tables():
    results = dln.sweep(dln.SweepGrid(BASE, {"weights.scale": [[0.5, 0.5, 1.0]]}), InlineExecutor())
    lines = results.to_markdown().splitlines()
    assert lines[0].startswith("| weights.scale | outcome | engine | steps | final_loss | seconds | error |")
    assert lines[2].startswith("| [0.5, 0.5, 1.0] | finished | reduced | 60 |")
    row = next(csv.DictReader(results.to_csv().splitlines()))
    assert json.loads(row["weights.scale"]) == [0.5, 0.5, 1.0]
    assert repr(results) == "SweepResults(1 runs: 1 finished)"


def test_results_become_a_pandas_table():
    pandas = import_pandas()
    results = dln.sweep(dln.SweepGrid(BASE, AXES), InlineExecutor())
    frame = results.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == results.columns
    assert frame["hash"].tolist() == [row["hash"] for row in results]


def test_an_error_names_a_missing_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    results = dln.sweep(BASE, InlineExecutor())
    with pytest.raises(ModuleNotFoundError, match=r"to_pandas .* needs pandas"):
        results.to_pandas()


# Executors.


def test_a_thread_pool_runs_a_sweep(inline_results):
    with ThreadPoolExecutor(3) as executor:
        results = dln.sweep(dln.SweepGrid(BASE, AXES), executor, n_workers=3, chunk_seconds=0.01)
        assert outcome_rows(results) == inline_results
        assert executor.submit(int, 3).result() == 3  # it stays open


def test_futures_need_only_done_and_result(inline_results):
    assert outcome_rows(dln.sweep(dln.SweepGrid(BASE, AXES), Polling())) == inline_results


def test_a_call_that_fails_is_traced_to_its_run(tmp_path, inline_results):
    grid = dln.SweepGrid(BASE, AXES)
    bad = grid.items[7].hash

    class Breaking(InlineExecutor):
        def submit(self, function, job):
            if any(item.hash == bad for item in job.items):
                function = [].pop
                return super().submit(lambda: function())
            return super().submit(function, job)

    results = dln.sweep(grid, Breaking(), directory=tmp_path)
    assert outcome_rows(results[:7]) == inline_results[:7]
    assert outcome_rows(results[8:]) == inline_results[8:]
    assert results[7]["outcome"] == "failed"
    assert results[7]["error"] == "IndexError: pop from empty list"
    assert (
        outcome_rows(dln.sweep(grid, InlineExecutor(), directory=tmp_path, retry_failed=True))
        == inline_results
    )


def test_a_closed_executor_is_an_error(tmp_path):
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="shutdown") as caught:
        dln.sweep(BASE, executor, directory=tmp_path)
    assert "0 of 1 runs of the sweep are finished" in caught.value.__notes__[-1]
    assert caught.value.results[0]["outcome"] is None


def test_the_default_executor_runs_processes(tmp_path, inline_results):
    before = dict(os.environ)
    results = dln.sweep(dln.SweepGrid(BASE, AXES), directory=tmp_path, keep_runs=True, n_workers=2)
    assert outcome_rows(results) == inline_results
    assert dict(os.environ) == before
    assert results.usage["workers"] == 2
    assert results.load(0).config["n_threads"] == (1 if available_cores() // 2 <= 1 else 0)
    assert 0 < results.usage["runs"] <= results.usage["jobs"]
    # A sweep that lacks one run has one worker, with as many threads as before.
    shutil.rmtree(tmp_path / results[0]["hash"])
    again = dln.sweep(dln.SweepGrid(BASE, AXES), directory=tmp_path, keep_runs=True, n_workers=2)
    assert (again.usage["workers"], again.usage["started"]) == (1, 1)
    assert again.load(0).config == results.load(1).config | {"weight_decay": [0.0] * 3}
    assert outcome_rows(again) == inline_results


@pytest.mark.parametrize(("cores", "workers", "limit", "passed"), [(4, 4, 1, 1), (4, 1, 4, 0), (6, 2, 3, 0)])
def test_a_run_of_a_sweep_may_use_fewer_threads_than_its_process(monkeypatch, cores, workers, limit, passed):
    """A number above 1 would be taken literally, so that a busy core slows every parallel region down."""
    seen = {}

    class Processes(InlineExecutor):
        def __init__(self, workers, most_threads):
            seen["limit"] = most_threads

        def open(self):
            pass

        def close(self):
            pass

        def submit(self, function, job):
            seen["passed"] = job.n_threads
            return super().submit(function, job)

    monkeypatch.setattr(sweep_module, "available_cores", lambda: cores)
    monkeypatch.setattr(sweep_module, "_LocalProcesses", Processes)
    dln.sweep(dln.SweepGrid(BASE, AXES), n_workers=workers)
    assert seen == {"limit": limit, "passed": passed}


def test_a_worker_that_dies_is_replaced(inline_results):
    """One of the processes is killed during the sweep: all runs finish."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("finds the workers in /proc")

    def kill_one():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for path in Path("/proc/self/task").glob("*/children"):
                for child in path.read_text().split():
                    command = Path("/proc", child, "cmdline").read_bytes()
                    if b"spawn_main" in command:
                        killed.append(int(child))
                        time.sleep(0.3)
                        os.kill(int(child), signal.SIGKILL)
                        return
            time.sleep(0.005)

    killed: list[int] = []
    grid = dln.SweepGrid(BASE, {"train.engine": ["dense"], "weights.seed": range(8), "train.steps": [20_000]})
    thread = threading.Thread(target=kill_one)
    thread.start()
    try:
        results = dln.sweep(grid, n_workers=1)
    except RuntimeError as error:  # killed before it was ready
        assert "did not start" in str(error)
        results = dln.sweep(grid, n_workers=1)
    finally:
        thread.join()
    assert killed
    assert outcome_rows(results) == outcome_rows(dln.sweep(grid, InlineExecutor()))


def test_dask_runs_a_sweep(tmp_path, inline_results):
    if importlib.util.find_spec("distributed") is None:
        pytest.skip("dask.distributed is not installed")
    script = tmp_path / "script.py"
    script.write_text(f"""
import json, sys
import dlnfast as dln
from distributed import Client, LocalCluster
if __name__ == "__main__":
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with cluster, Client(cluster) as client:
        grid = dln.SweepGrid({BASE!r}, {AXES!r})
        results = dln.sweep(grid, client.get_executor(), n_workers=2, chunk_seconds=0.02)
    print(json.dumps([[r["hash"], r["outcome"], r["final_loss"], r["error"]] for r in results]))
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [tuple(row) for row in json.loads(done.stdout)] == inline_results


def test_an_error_names_a_script_without_a_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import dlnfast as dln\ndln.sweep({BASE!r}, n_workers=1)\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert 'needs if __name__ == "__main__"' in done.stderr


def test_workers_share_the_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("MKL_NUM_THREADS", "many")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    limits = _LocalProcesses(1, 4).limits
    assert limits["OMP_NUM_THREADS"] == "2"  # the value set by the user, if it is less
    assert limits["MKL_NUM_THREADS"] == limits["OPENBLAS_NUM_THREADS"] == "4"
    with _environment(limits):
        assert os.environ["OPENBLAS_NUM_THREADS"] == "4"
    assert "OPENBLAS_NUM_THREADS" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert available_cores() >= 1


# Interrupted sweeps.


def command(spec, folder):
    return [sys.executable, "-m", "dlnfast", "sweep", str(spec), "--out", str(folder), "--workers", "2"]


@pytest.fixture
def long_sweep(tmp_path):
    """Return the file of a sweep of 400 runs that take a tenth of a second each."""
    spec_path = tmp_path / "spec.toml"
    text = TOML.replace("steps = 60", 'steps = 100_000\nrecord_every = 100_000\nengine = "dense"')
    spec_path.write_text(text + '[sweep]\n"weights.seed" = ' + str(list(range(400))))
    return spec_path


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_message_of_a_stopped_sweep_explains_how_to_resume(long_sweep, tmp_path, sent, status):
    folder = tmp_path / "out"
    process = subprocess.Popen(command(long_sweep, folder), stderr=subprocess.PIPE, start_new_session=True)
    while not any(folder.glob("*/summary.json")):
        assert process.poll() is None
        time.sleep(0.01)
    # Ctrl-C on a terminal reaches the workers too; the signal that stops a service reaches its parent only.
    os.killpg(process.pid, sent) if sent == signal.SIGINT else os.kill(process.pid, sent)
    message = process.communicate(timeout=60)[1].decode()
    assert process.returncode == status, message
    n_finished = len(list(folder.glob("*/summary.json")))
    assert 0 < n_finished < 400
    assert message.startswith(f"dlnfast: interrupted: {n_finished} of 400 runs of the sweep are finished")
    assert message.rstrip().endswith("start it again to resume")
    assert not list(folder.glob("*/*.part"))
    deadline = time.monotonic() + 30
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(process.pid)


def alive(group):
    """Return the processes of a group without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(path.parent.name)
    return found


def test_killed_sweeps_resume():
    """Two kills; ``python bench/kill_sweep.py`` makes fifty by default."""
    done = subprocess.run(
        [sys.executable, str(BENCH / "kill_sweep.py"), "--kills", "2", "--seeds", "2"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 kills")
    assert "all numbers equal bit for bit" in done.stdout


def test_two_processes_may_run_one_sweep(tmp_path):
    spec_path, folder = tmp_path / "spec.toml", tmp_path / "out"
    spec_path.write_text(
        TOML + f'[sweep]\n"weights.seed" = {list(range(60))}\n"train.engine" = ["auto", "dense"]'
    )
    both = [subprocess.Popen(command(spec_path, folder), stdout=subprocess.PIPE) for _ in range(2)]
    for process in both:
        assert b"120 runs: 120 finished" in process.communicate(timeout=120)[0]
        assert process.returncode == 0
    assert len(list(folder.glob("*/summary.json"))) == 120
    assert not list(folder.glob("**/*.part"))
    again = dln.sweep(spec_path, InlineExecutor(), directory=folder)
    assert again.usage["started"] == 0
    assert outcome_rows(again) == outcome_rows(dln.sweep(spec_path, InlineExecutor()))


class Least:
    """An executor with only the methods that `sweep` needs."""

    class Future:
        def __init__(self, answer):
            self.answer = answer

        def done(self):
            return True

        def result(self):
            return self.answer()

    def __init__(self, error=None, after=0):
        self.error, self.left = error, after

    def submit(self, function, *arguments):
        self.left -= 1
        if self.error is None or self.left >= 0:
            return self.Future(lambda: function(*arguments))
        return self.Future(self.fail)

    def fail(self):
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_sweeps_on_executors_without_cancel_can_be_interrupted(error, tmp_path):
    grid = dln.SweepGrid(BASE, {"weights.seed": range(6)})
    with pytest.raises(type(error)) as caught:
        dln.sweep(grid, Least(error, after=1), n_workers=1, directory=tmp_path)
    assert caught.value is error
    done = [row for row in caught.value.results if row["outcome"] == "finished"]
    assert 0 < len(done) < 6
    assert dln.sweep(grid, Least(), directory=tmp_path).counted() == "6 runs: 6 finished"


def test_futures_that_fail_to_cancel_do_not_hide_the_error():
    class Stubborn(Least):
        class Future(Least.Future):
            def cancel(self):
                raise RuntimeError("too late")

    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as caught:
        dln.sweep(dln.SweepGrid(BASE, {"weights.seed": range(6)}), Stubborn(error))
    assert caught.value is error


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held.replace('"final_loss": ', '"final_loss": 1'),
        lambda held: held.replace('"outcome": "finished"', '"outcome": "converged"'),
        lambda held: held.replace('"checksum"', '"checksom"'),
        lambda held: "[1, 2]",
        lambda held: held[: len(held) // 2],
        lambda held: "\N{BYTE ORDER MARK}" * 2 + held,
    ],
)
def test_runs_with_changed_summaries_are_repeated(change, tmp_path):
    grid = dln.SweepGrid(BASE, {"weights.seed": [0, 1]})
    first = dln.sweep(grid, InlineExecutor(), directory=tmp_path)
    path = tmp_path / first.rows[0]["hash"] / "summary.json"
    path.write_text(change(path.read_text()), encoding="utf-8")
    again = dln.sweep(grid, InlineExecutor(), directory=tmp_path)
    assert again.usage["started"] == 1
    assert outcome_rows(again) == outcome_rows(first)
    assert dln.sweep(grid, InlineExecutor(), directory=tmp_path).usage["started"] == 0


# The command line.


def test_the_command_line_prints_the_table_and_the_failures(tmp_path, capsys, monkeypatch):
    from dlnfast import cli
    from dlnfast._commands import sweep as command

    spec_path = tmp_path / "spec.toml"
    spec_path.write_text(TOML + '[sweep]\n"train.steps" = [5, 1_000_000_000_000_000]')

    def inline(grid, **settings):
        return dln.sweep(grid, InlineExecutor(), **settings)

    monkeypatch.setattr(command, "sweep", inline)
    arguments = [
        "sweep",
        str(spec_path),
        "--out",
        str(tmp_path / "out"),
        "--table",
        "--set",
        "weights.seed=3",
    ]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert "| 5 | finished | reduced | 5 |" in printed.out
    assert "sweep:    2 runs: 1 failed, 1 finished" in printed.out
    assert printed.err.startswith("dlnfast: 1 runs failed, one of them: MemoryError")


def test_the_command_line_names_the_run_with_a_bad_setting(tmp_path, capsys):
    from dlnfast import cli

    spec_path = tmp_path / "spec.toml"
    spec_path.write_text(TOML + '[sweep]\n"train.steps" = [5, 1_000_000_000_000_000]')
    assert cli.main(["sweep", str(spec_path), "--set", "train.momentum=2"]) == 2
    assert "run 0 of the sweep (train.steps = 5): momentum (mu) is 2" in capsys.readouterr().err
