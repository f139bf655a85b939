# SPDX-License-Identifier: MIT
"""File operations that are tested under faults, and the conditions after each fault.

A case is an action in a folder, such as a checkpointed run. It runs first without faults, and then once for
every operation and kind of fault, or pair of them, from a new copy of the initial folder. Afterwards

* the error is the injected one, or there is none and the result is that without faults;
* the folder can be read: it has the old or the new content, or the first part of a run;
* the same call returns the result without faults, bit for bit;
* the folder contains the same files as without faults.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from faults import KINDS, Faults, Killed, count, injected
from helpers.executors import InlineExecutor
from helpers.records import merge_options, with_record
from helpers.runs import run_content, without_times

import dlnfast as dln


class Cut(Exception):
    """Raised to stop a run at some step, so that it can be resumed."""


@dataclass(frozen=True)
class Case:
    """An action in a folder.

    Attributes
    ----------
    name : str
    act : callable
        ``act(folder)`` runs the action, and returns a result that can be compared.
    prepare : callable
        ``prepare(folder)`` makes the initial content.
    read : callable
        ``read(folder)`` returns the content of the folder, None if there is none.
    accepts : callable
        ``accepts(found, before, after)`` returns whether the content is the old one, the new one, or a valid
        one between them. By default only the old and the new content are valid.
    tolerates : callable
        ``tolerates(result, after)`` returns whether a call may return this result after a fault without an
        error. By default only the result without faults is valid.
    errors : tuple of type
        Errors that it may raise instead of an injected OSError.
    locks : bool
        Whether it locks its folder while it writes. Without a lock, the temporary file of a killed process
        is not removed.
    forks : bool
        Whether it can run in a forked process, which has only one thread.
    kinds : tuple of str
        Faults to try.
    cost : int
        Factor of its run time relative to other cases; the number of faults is divided by it.
    """

    name: str
    act: Callable[[Path], Any]
    prepare: Callable[[Path], Any] = lambda folder: None
    read: Callable[[Path], Any] = lambda folder: None
    accepts: Callable[[Any, Any, Any], bool] = lambda found, before, after: found in (before, after)
    tolerates: Callable[[Any, Any], bool] = lambda result, after: result == after
    errors: tuple[type[Exception], ...] = ()
    locks: bool = True
    forks: bool = True
    kinds: tuple[str, ...] = KINDS
    cost: int = 1


@dataclass
class Tally:
    """Counts of the outcomes of the trials of a case."""

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
        folder = self._copy_template()
        self.after = case.act(folder)
        self.names = _relative_paths(folder)
        self.result = case.read(folder)
        self.operations = count(self._copy_template(), lambda: case.act(scratch / "trial"))
        self.tally = Tally(case.name, len(self.operations))

    def single(self, kind: str, number: int) -> None:
        """Make one operation fail."""
        self._try(kind, (number,))

    def double(self, kind: str, first: int, again: str, second: int) -> None:
        """Make one operation fail, and then one of the next call."""
        self._try(kind, (first,), again, (second,))

    def applies(self, kind: str) -> list[int]:
        """Return the operations at which a fault of this kind can happen."""
        probe = Faults(self.scratch, kind)
        return [n for n, (name, _) in enumerate(self.operations) if probe._applies(name)]

    def _try(self, kind: str, at: tuple[int, ...], again: str = "", second: tuple[int, ...] = ()) -> None:
        folder = self._copy_template()
        label = f"{self.case.name}: {kind} at {_describe(self.operations, at)}"
        try:
            if not self._run_with_faults(folder, kind, at):
                return
            self._check_readable(folder)
            if again:
                label += f", then {again} at operation {second[0]}"
                if not self._run_with_faults(folder, again, second):
                    return
                self._check_readable(folder)
                self.tally.doubles += 1
            else:
                self.tally.singles += 1
            self._check_repeated_call(folder, kinds={kind, again})
        except Exception as error:
            self.tally.losses.append(f"{label}: {type(error).__name__}: {error}")

    def kill(self, number: int) -> None:
        """Run the action in its own process, and kill the process at an operation."""
        folder = self._copy_template()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException), injected(folder, "kill", number, real=True):
                self.case.act(folder)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        label = f"{self.case.name}: SIGKILL at {_describe(self.operations, (number,))}"
        self.tally.kills += 1
        try:
            self._check_readable(folder)
            self._check_repeated_call(folder, kinds={"kill"})
        except Exception as error:
            self.tally.losses.append(f"{label}: {type(error).__name__}: {error}")

    def _run_with_faults(self, folder: Path, kind: str, at: tuple[int, ...]) -> bool:
        """Run the action with faults; return whether any occurred."""
        result = None
        is_finished = False
        faults = Faults(folder, kind, at)
        try:
            with warnings.catch_warnings(), faults:
                warnings.simplefilter("error")
                result = self.case.act(folder)
                is_finished = True
        except Killed:
            pass
        except KeyboardInterrupt:
            if not kind.startswith("interrupt"):
                raise
        except self.case.errors:
            if not faults.fired:
                raise
        except OSError as error:
            wanted = {"full": "ENOSPC"}.get(kind, kind)
            if error.errno is None or wanted != _name_of(error.errno):
                raise
        if is_finished and faults.fired and kind != "kill" and not self.case.tolerates(result, self.after):
            raise AssertionError("after the fault the call returned another result without an error")
        return faults.fired > 0

    def _check_readable(self, folder: Path) -> None:
        found = self.case.read(folder)
        if not self.case.accepts(found, self.before, self.result):
            raise AssertionError("the content is neither the old nor the new one")

    def _check_repeated_call(self, folder: Path, kinds: set[str]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = self.case.act(folder)
        self._check_same(again, self.after, "the result of the same call without faults")
        self._check_same(self.case.read(folder), self.result, "the content after it")
        names = _relative_paths(folder)
        if "kill" in kinds and not self.case.locks:
            names = {name for name in names if not name.endswith(".part")}
        if names != self.names:
            raise AssertionError(
                f"unexpected files: {sorted(names - self.names)}; missing: {sorted(self.names - names)}"
            )

    def _check_same(self, found: Any, wanted: Any, what: str) -> None:
        if found != wanted:
            raise AssertionError(f"{what} differs")

    def _copy_template(self) -> Path:
        folder = self.scratch / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.template, folder)
        return folder


def _name_of(code: int) -> str:
    import errno

    return errno.errorcode.get(code, str(code))


def _describe(operations: list[tuple[str, str]], at: tuple[int, ...]) -> str:
    return ", ".join(f"operation {n} ({' '.join(operations[n])})" for n in at)


def _relative_paths(folder: Path) -> set[str]:
    """Return the paths of all files and folders in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run_case(
    case: Case,
    scratch: Path,
    *,
    kinds: Iterable[str] = KINDS,
    every: int = 1,
    singles: int | None = None,
    doubles: int = 0,
    kills: int = 0,
    seed: int = 0,
) -> Tally:
    """Try a case with every kind of fault at every n-th operation.

    Parameters
    ----------
    case : Case
    scratch : Path
        An empty folder.
    kinds : iterable of str
    every : int
        1 tries every operation.
    singles : int, optional
        Number of random faults, instead of all of them.
    doubles, kills : int
        Number of random pairs of faults, and of random real kills.
    seed : int
    """
    with _without_fsync():
        return _run_case(case, scratch, kinds, every * case.cost, singles, doubles, kills, seed)


@contextlib.contextmanager
def _without_fsync() -> Iterator[None]:
    """Skip os.fsync, which is slow and matters only if the machine stops."""
    before, os.fsync = os.fsync, lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = before


def _run_case(
    case: Case,
    scratch: Path,
    kinds: Iterable[str],
    every: int,
    singles: int | None,
    doubles: int,
    kills: int,
    seed: int,
) -> Tally:
    generator = random.Random(f"{case.name} {seed}")
    trials = Trials(case, scratch)
    chosen = {kind: trials.applies(kind) for kind in kinds if kind in case.kinds}
    pairs = [
        (kind, number) for kind, ns in chosen.items() for number in ns[generator.randrange(every) :: every]
    ]
    if singles is not None:
        pairs = generator.sample(pairs, min(singles, len(pairs)))
    for kind, number in pairs:
        trials.single(kind, number)
    usable = [kind for kind, numbers in chosen.items() if numbers]
    doubles, kills = doubles // case.cost, kills // case.cost
    for _ in range(6 * doubles):
        if trials.tally.doubles >= doubles:
            break
        first, second = (generator.choice(usable) for _ in range(2))
        trials.double(first, generator.choice(chosen[first]), second, generator.choice(chosen[second]))
    for _ in range(kills if case.forks else 0):
        trials.kill(generator.randrange(len(trials.operations)))
    return trials.tally


# ------------------------------------------------------------------------------------------- content


def is_first_part(found: Any, before: Any, after: Any) -> bool:
    """Return whether the content is the first part of the run `after`, and not shorter than `before`."""
    if found is None:
        return before is None
    for name, (dtype, shape, data) in found[1].items():
        if name.startswith("final"):  # only in finished runs
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
    """Return the content of a run in a folder."""
    try:
        return run_content(dln.load(folder / "run"), with_times=False)
    except FileNotFoundError:
        return None


def cut_at(step: int) -> Callable[[int, float], None]:
    """Return a callback that stops a run."""

    def callback(now: int, loss: float) -> None:
        del loss
        if now >= step:
            raise Cut

    return callback


# --------------------------------------------------------------------------------------------- cases


def _train(settings: dict[str, Any], callback: Any = None) -> Callable[[Path], Any]:
    problem, weights = dln.low_rank_recovery(6, 1), dln.orthogonal([6] * 3)
    options = merge_options(
        {
            "learning_rate": 0.3,
            "steps": 3,
            "n_threads": 1,
            "record": dln.Record(singular_values=None),
        },
        settings,
    )

    def act(folder: Path) -> Any:
        checkpoint = dln.Checkpoint(folder / "run", every=1, seconds=0)
        return run_content(
            dln.train(problem, weights, **with_record(options, callback=callback), checkpoint=checkpoint),
            with_times=False,
        )

    return act


DENSE = {"engine": "dense", "record": dln.Record(weights_every=1), "momentum": 0.5}


def training(name: str, settings: dict[str, Any], **more: Any) -> Iterator[Case]:
    """Yield a run from step 0, and a resumed one."""
    act = _train(settings)

    def prepare(folder: Path) -> None:
        with contextlib.suppress(Cut):
            _train(settings, cut_at(2))(folder)

    yield Case(f"train, {name}", act, read=read_run, accepts=is_first_part, **more)
    yield Case(f"train, {name}, resumed", act, prepare, read_run, is_first_part, **more)


def resuming() -> Case:
    """Return `resume`, which reads more than `train` does."""

    def prepare(folder: Path) -> None:
        with contextlib.suppress(Cut):
            _train(DENSE, cut_at(2))(folder)

    return Case(
        "resume",
        lambda folder: run_content(dln.resume(folder / "run"), with_times=False),
        prepare,
        read_run,
        is_first_part,
    )


def reading() -> Iterator[Case]:
    """Yield readers of a finished and of an unfinished run."""

    def prepare(folder: Path) -> None:
        with contextlib.suppress(Cut):
            _train(DENSE, cut_at(2))(folder)

    yield Case("load, unfinished", read_run, prepare, read_run)
    yield Case("load, finished", read_run, _train(DENSE), read_run)
    yield Case("train, finished: read", _train(DENSE), _train(DENSE), read_run)


# ----------------------------------------------------------------------- other engines and estimators


def in_three_states(name: str, act: Callable[[Path], Any], cut: Callable[[Path], Any]) -> Iterator[Case]:
    """Yield cases that start, resume and load the same work."""
    yield Case(name, act)
    yield Case(f"{name}, resumed", act, cut)
    yield Case(f"{name}, finished: read", act, act)


@contextlib.contextmanager
def cut_at_call(module: Any, name: str, number: int) -> Iterator[None]:
    """Make the n-th call of a function of a module, from 0, stop the work."""
    original, calls = getattr(module, name), []

    def counted(*arguments: Any, **settings: Any) -> Any:
        if len(calls) == number:
            raise Cut
        calls.append(number)
        return original(*arguments, **settings)

    setattr(module, name, counted)
    try:
        with contextlib.suppress(Cut):
            yield
    finally:
        setattr(module, name, original)


def batches() -> Iterator[Case]:
    """Yield a batch of runs in three files."""
    from dlnfast._training import batch as batch_module

    problem = dln.low_rank_recovery(6, 1)
    starts = [dln.orthogonal([6] * 3, scale=0.5, seed=seed) for seed in range(6)]

    def act(folder: Path) -> Any:
        checkpoint = dln.Checkpoint(folder / "batch", every=2)
        batch = dln.train_batch(
            problem,
            starts,
            learning_rate=0.3,
            steps=5,
            record=dln.Record(every=1),
            n_threads=1,
            checkpoint=checkpoint,
        )
        return batch.loss.tobytes(), batch.outcomes, [run_content(run, with_times=False) for run in batch]

    def cut(folder: Path) -> None:
        with cut_at_call(batch_module, "descend_together", 1):
            act(folder)

    yield from in_three_states("train_batch", act, cut)


def compressed(name: str, **settings: Any) -> Iterator[Case]:
    """Yield a compressed run."""
    problem = dln.low_rank_completion(12, 1, observed=0.8)
    lazy_weights = dln.orthogonal([12] * 3, scale=1e-2, implicit=True)

    def train(folder: Path, **more: Any) -> Any:
        checkpoint = dln.Checkpoint(folder / "run", every=2, seconds=0)
        options = merge_options(
            {"rank": 1, "steps": 6, "record": dln.Record(every=2, singular_values=None), "n_threads": 1},
            settings,
            more,
        )
        return run_content(
            dln.train_compressed(problem, lazy_weights, **options, checkpoint=checkpoint), with_times=False
        )

    def prepare(folder: Path) -> None:
        with contextlib.suppress(Cut):
            train(folder, record=dln.Record(callback=cut_at(3)))

    yield from in_three_states(f"train_compressed, {name}", train, prepare)


def estimators() -> Iterator[Case]:
    """Yield fits that are interrupted in a run on held-out entries, or before the run on all entries."""
    from dlnfast._completion import gradient_descent

    generator = np.random.default_rng(0)
    pairs = np.argwhere(generator.random((8, 7)) < 0.8)
    known = np.outer(generator.random(8), generator.random(7))[tuple(pairs.T)]

    def act(folder: Path) -> Any:
        checkpoint = dln.Checkpoint(folder / "fits", every=2, seconds=0)
        stopping = dln.StoppingOptions(validation_fraction=0.4, record_every=2)
        layers = dln.LayerOptions(keep_trajectories=True)
        options = {"method": "gradient", "weight_decay": 0.1, "layers": layers, "stopping": stopping}
        model = dln.MatrixCompletion(rank=1, steps=4, **options, n_threads=1, checkpoint=checkpoint)
        model.fit(pairs, known)
        assert len(model.validation_) > 1  # runs on held-out entries, with and without decay
        runs = [run_content(run, with_times=False) for run in model.trajectories_]
        return model.validation_, model.row_factors_.tobytes(), model.column_factors_.tobytes(), runs

    def cut_at(call: int) -> Callable[[Path], None]:
        def cut(folder: Path) -> None:
            with cut_at_call(gradient_descent, "train", call):
                act(folder)

        return cut

    yield from in_three_states("MatrixCompletion", act, cut_at(1))
    yield Case("MatrixCompletion, resumed before its last run", act, cut_at(4))


# ------------------------------------------------------------------------------ sweeps and results


def sweeps() -> Case:
    """Return a sweep, whose runs fail if their files cannot be written."""
    base = {
        "problem": {"kind": "low-rank-recovery", "dim": 6, "rank": 1},
        "weights": {"depth": 2},
        "train": {"learning_rate": 0.3, "steps": 3, "n_threads": 1},
    }
    grid = dln.SweepGrid(base, {"weights.seed": [0, 1], "train.engine": ["reduced", "dense"]})

    def act(folder: Path) -> Any:
        results = dln.sweep(grid, InlineExecutor(), directory=folder / "sweep", keep_runs=True, n_workers=1)
        return [without_times(row) for row in results]

    def read(folder: Path) -> Any:
        found = {}
        for path in sorted((folder / "sweep").glob("*/summary.json")):
            summary = json.loads(path.read_text())
            run = run_content(dln.load(path.parent / summary["file"]), with_times=False)
            found[path.parent.name] = without_times(row_of(summary)), run
        return found

    def row_of(summary: dict[str, Any]) -> dict[str, Any]:
        return {name: summary[name] for name in ("hash", "outcome", "final_loss", "error")}

    def tolerates(rows: Any, after: Any) -> bool:
        return all(
            row == wanted
            or (row["outcome"] == "failed" and row["error"].startswith(("OSError", "Permission")))
            for row, wanted in zip(rows, after, strict=True)
        )

    def accepts(found: Any, before: Any, after: Any) -> bool:
        return before.items() <= found.items() <= after.items()

    return Case("sweep", act, read=read, accepts=accepts, tolerates=tolerates, forks=False)


def results() -> Case:
    """Return a case that appends lines to a file of results."""
    from dlnfast._config.finetuning import Results
    from dlnfast._support.errors import DivergedError

    class Grid:
        def metadata(self) -> dict[str, Any]:
            return {"path": "model"}

    class Run:
        def __init__(self, seed: int) -> None:
            self.seed = seed

        def to_dict(self) -> dict[str, Any]:
            known = {"method": "lora", "rank": 8, "n_examples": 16, "learning_rate": 0.1}
            return known | {"seed": self.seed}

    def add(folder: Path, seeds: Iterable[int]) -> Any:
        found = Results(folder / "results.jsonl")
        for seed in seeds:
            if Run(seed).to_dict() not in [record["run"] for record in found.records]:
                error = DivergedError("the loss is not finite", step=1, layer=1)
                found.append_diverged(Grid(), Run(seed), error)  # type: ignore[arg-type]
        return found.records

    def accepts(found: Any, before: Any, after: Any) -> bool:
        return found == after[: len(found)] and len(found) >= len(before)

    return Case(
        "results.jsonl",
        lambda folder: add(folder, range(5)),
        lambda folder: add(folder, range(2)),
        lambda folder: Results(folder / "results.jsonl").records,
        accepts,
    )


# ------------------------------------------------------------------------------- files that are saved


def _runs() -> list[dln.Trajectory]:
    problem, weights = dln.low_rank_recovery(6, 1), dln.orthogonal([6] * 3)
    options = {"engine": "dense", "steps": 3, "n_threads": 1, "record": dln.Record(singular_values=2)}
    return [dln.train(problem, weights, learning_rate=rate, **options) for rate in (0.2, 0.3)]


def saving(name: str, save: Callable[[int, Path], Any], read: Callable[[Path], Any], **more: Any) -> Case:
    """Return a case that replaces a file or folder."""

    def act(folder: Path) -> Any:
        save(1, folder)
        return read(folder)

    return Case(name, act, lambda folder: save(0, folder), read, locks=False, **more)


def saved_files() -> Iterator[Case]:
    """Yield cases that save and export objects."""
    runs = _runs()
    yield saving(
        "Trajectory.save",
        lambda i, folder: runs[i].save(folder / "run.npz"),
        lambda folder: run_content(dln.load(folder / "run.npz"), with_times=False),
    )

    def statistics(i: int, folder: Path) -> None:
        found = dln.SufficientStatistics()
        found.add(np.arange(12.0).reshape(3, 4) + i, np.arange(8.0).reshape(2, 4))
        found.save(folder / "sums.npz")

    def read_statistics(folder: Path) -> Any:
        found = dln.SufficientStatistics.load(folder / "sums.npz")
        return {name: value.tobytes() for name, value in vars(found).items() if isinstance(value, np.ndarray)}

    yield saving("SufficientStatistics.save", statistics, read_statistics)

    with contextlib.suppress(ImportError):
        import h5py

        def read_hdf5(folder: Path) -> Any:
            with h5py.File(folder / "run.h5") as file:
                found = {name: file[name] for name in file}
                return {name: (str(v.dtype), v.shape, str(v[...].tolist())) for name, v in found.items()}

        yield saving(
            "export, HDF5",
            lambda i, folder: dln.export(runs[i], folder / "run.h5", overwrite=True),
            read_hdf5,
            cost=20,
        )


def zarr_exports() -> Iterator[Case]:
    """Yield an export to zarr, whose threads continue briefly after an error of one of them."""
    runs = _runs()
    with contextlib.suppress(ImportError):
        import zarr

        def read_zarr(folder: Path) -> Any:
            group = zarr.open_group(folder / "run.zarr", mode="r")
            return {name: np.asarray(array[...]).tobytes() for name, array in group.arrays()}

        yield saving(
            "export, zarr",
            lambda i, folder: dln.export(runs[i], folder / "run.zarr", overwrite=True),
            read_zarr,
            forks=False,
            # zarr waits for its threads. A simulated kill stops them, and after a signal they continue.
            kinds=("ENOSPC", "full", "EIO", "EACCES"),
            cost=20,
        )


def command_line_training() -> Case:
    """Return ``dlnfast train``, which prints its errors."""
    from dlnfast.cli import main

    class Failed(Exception):
        pass

    spec = """
[problem]
kind = "low-rank-recovery"
dim = 6
rank = 1
[weights]
depth = 2
[train]
learning_rate = 0.3
steps = 3
n_threads = 1
"""

    def run(seed: int, folder: Path) -> None:
        spec_path = folder.parent / f"{folder.name}.toml"
        spec_path.write_text(spec)
        arguments = ["train", str(spec_path), "--out", str(folder / "out"), "--set", f"weights.seed={seed}"]
        with (
            open(os.devnull, "w") as null,
            contextlib.redirect_stdout(null),
            contextlib.redirect_stderr(null),
        ):
            if main(arguments) != 0:
                raise Failed

    def read(folder: Path) -> Any:
        try:
            return run_content(dln.load(folder / "out" / "run.npz"), with_times=False)
        except FileNotFoundError:
            return None

    def act(folder: Path) -> Any:
        run(1, folder)
        return read(folder)

    return Case("dlnfast train", act, lambda folder: run(0, folder), read, errors=(Failed,), locks=False)


def of_torch() -> Iterator[Case]:
    """Yield the cases that need PyTorch."""
    import torch
    from torch import nn

    from dlnfast.torch import DeepLoRA, Trainer
    from dlnfast.torch.models import MLP

    torch.set_num_threads(1)
    yield from training("torch", DENSE | {"engine": "torch"}, forks=False)

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 4, generator=generator)
    labels = torch.randint(3, (8,), generator=generator)

    def fit(folder: Path, epochs: int = 3) -> Any:
        model = MLP([4, 5, 3], seed=0)
        checkpoint_path = folder / "checkpoint.pt"
        history = Trainer(
            model,
            learning_rate=0.1,
            epochs=epochs,
            batch_size=4,
            schedule="constant",
            checkpoint=checkpoint_path,
        ).fit(inputs, labels)
        return history.loss, {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}

    yield Case("Trainer", fit, locks=False, forks=False)
    yield Case("Trainer, resumed", fit, lambda folder: fit(folder, 1), locks=False, forks=False)
    yield Case("Trainer, finished: read", fit, fit, locks=False, forks=False)
    yield from sharded()

    def adapted(i: int) -> DeepLoRA:
        torch.manual_seed(i)
        adapter = DeepLoRA(network(), rank=2, init="random")
        for parameter in adapter.parameters():
            parameter.data.normal_()
        return adapter

    def network() -> nn.Module:
        torch.manual_seed(9)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    adapters = [adapted(0), adapted(1)]

    def read(folder: Path) -> Any:
        found = DeepLoRA.load(network(), folder / "adapter.safetensors")
        return [parameter.detach().numpy().tobytes() for parameter in found.parameters()]

    yield saving(
        "DeepLoRA.save",
        lambda i, folder: adapters[i].save(folder / "adapter.safetensors"),
        read,
        forks=False,
    )


def sharded() -> Iterator[Case]:
    """Yield a run on sharded layers in one process, because other processes would wait for a killed one."""
    from dlnfast.torch import RowSharded, train_sharded

    problem, weights = dln.low_rank_recovery(6, 1), dln.orthogonal([6] * 3)
    options = {"learning_rate": 0.3, "momentum": 0.5, "steps": 3, "record": dln.Record(singular_values=None)}

    def train(folder: Path, callback: Any = None) -> Any:
        shards = [RowSharded.from_rows(layer) for layer in weights]
        checkpoint = dln.Checkpoint(folder / "run", every=1, seconds=0)
        run = train_sharded(
            problem,
            shards,
            **with_record(options, callback=callback, singular_values=None),
            checkpoint=checkpoint,
        )
        return run_content(run, with_times=False), [shard.rows.numpy().tobytes() for shard in shards]

    def cut(folder: Path) -> None:
        with contextlib.suppress(Cut):
            train(folder, cut_at(2))

    for case in in_three_states("train_sharded", train, cut):
        yield replace(case, forks=False)


def every_case(*, zarr: bool = False) -> Iterator[Case]:
    """Yield all cases; `zarr` includes the one that still leaves incomplete folders after some faults."""
    yield from training("dense", DENSE)
    yield from training("reduced", {})
    yield from training("adaptive", {"engine": "dense", "learning_rate": "adaptive"})
    yield resuming()
    yield from reading()
    yield from batches()
    yield from compressed("frozen bases", outer=0.0)
    yield from compressed("moving bases", outer=0.01)
    yield from compressed("in turns", outer=0.01, outer_every=2, learning_rate=0.05)
    yield from estimators()
    yield sweeps()
    yield results()
    yield from saved_files()
    if zarr:
        yield from zarr_exports()
    yield command_line_training()
    with contextlib.suppress(ImportError):
        yield from of_torch()
