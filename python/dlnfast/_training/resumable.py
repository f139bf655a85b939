# SPDX-License-Identifier: MIT
"""Runs that are written to a folder while they go on, and resumed from it."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .._closure.certificate import Certificate, step_flops
from .._closure.operators import ExplicitLayers
from .._closure.subspaces import Closure
from .._support.checkpoint import Checkpoint, RunFolder, State, identity_of, raise_on_sigterm
from .._support.dispatch import core
from .._support.errors import DivergedError
from .._support.progress import ProgressBar
from .._trajectory.load import load_folder
from .._trajectory.states import DenseStates, ReducedStates
from .._trajectory.storage import record_arrays
from .._trajectory.trajectory import Trajectory
from .jobs import Outputs, ReducedJob, ResumableJob, core_arguments, make_trajectory
from .request import Callback, Request, divergence_text

#: What may be computed, and held, before a run that is kept writes it.
_FLUSH_FLOPS, _FLUSH_BYTES = 1e10, 2.0**28


def initial_weights(states: ReducedStates | DenseStates) -> Any:
    """Return what a run started from, as `train` takes it."""
    if isinstance(states, DenseStates):
        return states.initial
    return states.layers.weights if isinstance(states.layers, ExplicitLayers) else states.layers


def run_checkpointed(
    job: ResumableJob, request: Request, certificate: Certificate, bar: ProgressBar, kept: Checkpoint
) -> Trajectory:
    """Run with everything written to a folder, or go on with what is there."""
    outputs = Outputs(request)
    about, arrays = make_trajectory(job, request, certificate, outputs, "unfinished", 0.0).to_arrays()
    settings = request.settings(certificate.engine)
    # Subspaces follow from the rest, to rounding.
    given = {name: array for name, array in arrays.items() if not name.startswith(("basis_", "core_"))}
    folder = RunFolder(kept.directory, identity_of(settings | {"problem": about["problem"]}, given))
    if folder.exists:
        folder.check_request()
        if folder.ending() is not None:  # it is read, which needs no lock
            folder.tidy()
            return _read_finished(folder, request)
    if isinstance(job, ReducedJob):
        arrays |= job.space_arrays()
    beside = {"every": kept.every, "seconds": kept.seconds}
    with raise_on_sigterm(), folder.owned():
        folder.begin({"run": about, "settings": settings, "checkpoint": beside}, arrays)
        if folder.ending() is None:
            if isinstance(job, ReducedJob):
                job = job.within(folder.request()[1])
            _continue_run(job, request, certificate, bar, outputs, folder, kept.seconds)
    return _read_finished(folder, request)


def _continue_run(
    job: ResumableJob,
    request: Request,
    certificate: Certificate,
    bar: ProgressBar,
    outputs: Outputs,
    folder: RunFolder,
    seconds: float,
) -> None:
    """Go on from the newest state of a folder that this process owns, to the end of the run."""
    state = folder.newest()
    folder.go_back_to(-1 if state is None else state.step)
    if state is not None:
        outputs.begin = state.step
        job.motion.resumes = True
        for name, array in job.moving().items():
            array[...] = state.arrays[name]
        if request.callback is not None:
            request = replace(request, callback=_replay_saved_records(request.callback, folder, state.step))
    writer = _Writer(job, request, certificate, outputs, folder, state)

    def drain(step: int) -> None:
        writer.write_records()
        if folder.is_due(seconds):
            writer.write_state(step)
        outputs.empty()

    try:
        outcome, step, layer = job.run(core_arguments(request, outputs, bar) | {"on_drain": drain})
        writer.write_records()
        if outcome != "diverged":
            writer.write_state(step)
        folder.end({"outcome": outcome, "step": step, "layer": layer, "seconds": writer.seconds})
    except BaseException as error:
        if outputs.between_steps:
            writer.save(error)
        raise


class _Writer:
    """Writes what a run computes to its folder."""

    def __init__(
        self,
        job: ResumableJob,
        request: Request,
        certificate: Certificate,
        outputs: Outputs,
        folder: RunFolder,
        state: State | None,
    ) -> None:
        self.job, self.request, self.certificate = job, request, certificate
        self.outputs, self.folder = outputs, folder
        self.start = time.perf_counter() - (0.0 if state is None else state.seconds)
        #: Step of the last loss in the folder. A run that goes on computes the loss of its state once more.
        self.written = -1 if state is None else state.step

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, those before a resumption included."""
        return time.perf_counter() - self.start

    def write_records(self) -> None:
        """Write what was recorded since the last time; may be called again after any interruption."""
        outputs = self.outputs
        if outputs.last_step > self.written:
            found = make_trajectory(self.job, self.request, self.certificate, outputs, "unfinished", 0.0)
            records = _records(found, repeated=outputs.begin <= self.written)
            self.folder.write_records(outputs.last_step, records)
            self.written = outputs.last_step

    def write_state(self, step: int) -> None:
        """Write everything that moves."""
        self.folder.write_state(State(step, self.seconds, self.job.moving()))

    def save(self, error: BaseException) -> None:
        """Write everything up to the last step, and say on the error whether that worked."""
        step = self.outputs.last_step
        try:
            self.write_records()
            self.write_state(step)
            error.trajectory = load_folder(self.folder, self.request.problem)  # type: ignore[attr-defined]
        except Exception as failure:  # what ended the run is the error to raise
            self.folder.note_loss(error, failure)
        else:
            error.add_note(
                f"the run up to step {step} is kept in {self.folder.path}: train(.., checkpoint=..) or "
                "dlnfast resume goes on with it"
            )


def _replay_saved_records(callback: Callback, folder: RunFolder, begin: int) -> Callback:
    """Tell a callback of the records that are written, and return it as the rest of the run calls it."""
    answer: bool | None = None
    known: int | None = None  # the last step that it was told of
    n_before = 0
    for part in folder.records():
        for step in part["steps"].tolist():
            answer = callback(step, float(part["loss"][step - n_before]))
            known = step
        n_before += len(part["loss"])
    ended = answer is True and known == begin

    def rest(step: int, loss: float) -> bool | None:
        # The run begins with the last loss that was written.
        return ended if step == begin else callback(step, loss)

    return rest


def _read_finished(folder: RunFolder, request: Request) -> Trajectory:
    """Return the run of a folder that has ended, or raise the error that holds it."""
    run = load_folder(folder, request.problem)
    ending = folder.ending()
    assert ending is not None
    if ending["outcome"] == "diverged":
        step, layer = ending["step"], ending["layer"]
        text = divergence_text(request, step, layer)
        raise DivergedError(text, step=step, layer=layer, trajectory=run)
    return run


def _records(run: Trajectory, repeated: bool) -> dict[str, npt.NDArray[Any]]:
    """Return what was recorded, without what a run that goes on has recorded again."""
    first = int(repeated)
    arrays = {
        name: array if name.startswith("snapshot") else array[first:]
        for name, array in record_arrays(run.states).items()
    }
    arrays |= {"steps": run.steps[first:], "loss": run.loss[first:]}
    if run.rates is not None:
        arrays["rates"] = run.rates
    if repeated and "snapshot_steps" in arrays:
        again = int(np.sum(arrays["snapshot_steps"] == run.steps[0]))
        for name in arrays:
            if name.startswith("snapshot"):
                arrays[name] = arrays[name][again:]
    return arrays


def steps_between_flushes(request: Request, space: Closure | None) -> int:
    """Return how many steps take about a second, or fill a quarter of a gigabyte."""
    if space is None:
        widths = request.widths
        flops = core.step_flops(widths, core.best_pivot(widths)) + 4.0 * sum(
            map(math.prod, zip(widths[1:], widths[:-1], strict=True))
        )
        kept = [min(a, b) for a, b in zip(widths[1:], widths[:-1], strict=True)]
        sizes = [k if request.n_values is None else min(k, request.n_values) for k in kept]
        per_record = 8.0 * sum(5 * k + 14 for k in sizes)
        if request.vectors:
            per_record += 8.0 * sum(
                (a + b) * k for a, b, k in zip(widths[1:], widths[:-1], sizes, strict=True)
            )
    else:
        flops = step_flops(space.cores)
        per_record = 8.0 * sum(core_.size for core_ in space.cores)
    per_snapshot = 8.0 * sum(
        math.prod(shape) for shape in zip(request.widths[1:], request.widths[:-1], strict=True)
    )
    per_step = 16.0 + per_record / request.record_every
    per_step += per_snapshot / request.weights_every if request.weights_every else 0.0
    by_time, by_memory = _FLUSH_FLOPS / (flops + 1e3), _FLUSH_BYTES / per_step
    return int(np.clip(min(by_time, by_memory), 1, 2**20))
