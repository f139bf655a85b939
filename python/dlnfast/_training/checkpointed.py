# SPDX-License-Identifier: MIT
"""Runs of `train` that are written to a folder while they run, and resumed from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .._closure.certificate import Certificate, step_flops
from .._closure.subspaces import Closure
from .._problem.samples import SampleProblem
from .._support.checkpoint import Checkpoint, RunFolder, State
from .._support.checksums import compute_identity
from .._support.dispatch import core
from .._support.errors import DivergedError
from .._support.files import Arrays
from .._support.progress import ProgressBar
from .._trajectory.load import load_folder
from .._trajectory.states import find_record
from .._trajectory.trajectory import Trajectory
from .._weights.implicit import ImplicitWeights
from .callbacks import Callback, CallbackState, RecordCallback, bind_state, takes_state
from .jobs import Outputs, ResumableJob, bind_callback, core_arguments, make_trajectory
from .rates import divergence_text
from .request import Request
from .resumable import Records, ResumableWork, replay_records, run_resumable

#: Flop and byte budget between two flushes.
_FLUSH_FLOPS, _FLUSH_BYTES = 1e10, 2.0**28


def run_checkpointed(
    job: ResumableJob, request: Request, certificate: Certificate, bar: ProgressBar, checkpoint: Checkpoint
) -> Trajectory:
    """Run a job and write it to a folder, or resume the same run from the folder, or load it if finished."""
    work = CheckpointedRun(job, request, certificate, bar, checkpoint)
    run_resumable(work.folder, work, seconds=checkpoint.seconds)
    return _read_finished(work.folder, request)


class CheckpointedRun(ResumableWork):
    """A run of `train` as resumable work."""

    has_end_file = True
    how_to_resume = "train(.., checkpoint=..) or dlnfast resume"

    def __init__(
        self,
        job: ResumableJob,
        request: Request,
        certificate: Certificate,
        bar: ProgressBar,
        checkpoint: Checkpoint,
    ) -> None:
        self.job: ResumableJob = job
        self._request, self.certificate, self.bar = request, certificate, bar
        self.outputs = Outputs(request)
        self._resumed = False
        self._has_diverged = False
        start = make_trajectory(job, request, certificate, self.outputs, "unfinished", 0.0)
        # Lazily sampled weights may be too large for a file.
        run, arrays = start.to_arrays(weights=not isinstance(request.weights, ImplicitWeights))
        settings = request.settings(certificate.engine)
        # Problem and W(0) determine the invariant subspaces, up to rounding.
        other = ["basis_", "core_"]
        if request.default_weights_every is not None:  # which no setting asks for
            other.append("snapshots_")
        inputs = {name: array for name, array in arrays.items() if not name.startswith(tuple(other))}
        settings_of_identity = settings | {"problem": run["problem"]}
        self.folder = self.make_folder(checkpoint, settings_of_identity, inputs)
        if isinstance(request.weights, ImplicitWeights) and not self._is_former_folder(run["states"]["law"]):
            settings_of_identity["law"] = request.weights.describe()
            if run["states"]["law"] is None:  # earlier queries have determined numbers too
                inputs |= {name: array for name, array in arrays.items() if name.startswith("core_")}
            self.folder = self.make_folder(checkpoint, settings_of_identity, inputs)
        self._metadata = {
            "run": run,
            "settings": settings,
            "checkpoint": {"every": checkpoint.every, "seconds": checkpoint.seconds},
        }
        self._arrays = arrays

    def make_folder(self, checkpoint: Checkpoint, settings: dict[str, Any], inputs: Arrays) -> RunFolder:
        """Return the folder of the run with these settings and arrays."""
        return RunFolder(checkpoint.directory, compute_identity(settings, inputs))

    def _is_former_folder(self, distribution: dict[str, Any] | None) -> bool:
        """Return whether the folder has the same lazily sampled weights, in an identity without them.

        The identities of version 0.1.0 did not depend on lazily sampled weights.
        """
        if not self.folder.exists:
            return False
        metadata, _ = RunFolder(self.folder.path).request()
        found: object = metadata["run"]["states"].get("law")  # the name in files since version 0.1.0
        is_same = distribution is not None and found == distribution
        return is_same and metadata["identity"] == self.folder.identity

    def request(self) -> tuple[dict[str, Any], Arrays]:
        """Return problem, W(0) and settings, and the invariant subspaces of a reduced run."""
        return self._metadata, self._arrays | dict(self.job.space_arrays())

    def restore(self, storage: RunFolder) -> State | None:
        """Continue in the invariant subspaces of the folder, from its newest state."""
        self.job = self.job.replace_space(storage.request()[1])
        return super().restore(storage)

    def restore_state(self, state: State) -> None:
        """Continue from weights and optimizer state."""
        self.resume_at(state.step)
        self.job.restore(state.arrays)

    def resume_at(self, step: int) -> None:
        """Count the steps from one that an earlier call has reached."""
        self._resumed = True
        self.outputs.begin = step

    def advance(self, flush: Callable[[], None]) -> Mapping[str, Any]:
        """Let the engine run, which flushes every `Request.flush_every` steps."""
        outputs, request = self.outputs, self._request
        # Losses before those of the buffers; kept only for a callback that may ask for them.
        needs_losses = request.callback is not None and takes_state(request.callback)
        earlier: list[npt.NDArray[np.float64]] = []
        if needs_losses and self._resumed:
            earlier += [part["loss"] for part in self.folder.records()]
            earlier = [np.concatenate([np.empty(0), *earlier])[: outputs.begin]]
        on_record = bind_callback(self.job, request, self.certificate, outputs, earlier)
        if self._resumed and on_record is not None and request.callback is not None:
            on_record = self._replay(request.callback, on_record, outputs.begin)

        def on_flush(step: int) -> None:
            del step
            if needs_losses:
                earlier.append(outputs.loss[: outputs.n_losses].copy())
            flush()
            outputs.empty()

        arguments = core_arguments(request, outputs, self.bar, on_record, on_flush)
        outcome, step, layer = self.job.run(arguments)
        self._has_diverged = outcome == "diverged"
        return {"outcome": outcome, "step": step, "layer": layer}

    def state(self) -> State | None:
        """Return weights and optimizer state, between two steps."""
        if self._has_diverged or not self.outputs.between_steps:
            return None
        return State(self.outputs.last_step, 0.0, dict(self.job.state_arrays()))

    def records_since(self, step: int) -> Records | None:
        """Return losses, records and snapshots after a step."""
        outputs = self.outputs
        if outputs.last_step <= step or not (self._has_diverged or outputs.between_steps):
            return None
        run = make_trajectory(self.job, self._request, self.certificate, outputs, "unfinished", 0.0)
        # A resumed run computes the loss of its state again.
        return Records(outputs.last_step, _new_records(run, repeated=outputs.begin <= step))

    def partial_result(self) -> Trajectory:
        """Return the trajectory in the folder."""
        return _load(self.folder, self._request)

    def _replay(self, original: RecordCallback, callback: Callback, begin: int) -> Callback:
        """Replay saved records to the original callback, and return the one for the remaining steps."""
        last, answer = replay_records(bind_state(original, self._make_saved_state), self._saved_records())
        is_stopped = answer is True and last == begin

        def call_after_replay(step: int, loss: float) -> bool | None:
            # The first loss of a resumed run has been replayed.
            return is_stopped if step == begin else callback(step, loss)

        return call_after_replay

    def _make_saved_state(self, step: int, loss: float) -> CallbackState:
        """Return the state of a saved record."""

        def read() -> tuple[Trajectory, int]:
            return self._saved_run, find_record(self._saved_run.steps, step)

        return CallbackState(step, loss, lambda: self._saved_run.loss, read, is_replayed=True)

    @cached_property
    def _saved_run(self) -> Trajectory:
        """The run in the folder when it resumed; loaded once, if a callback asks for it."""
        return self.partial_result()

    def _saved_records(self) -> Iterator[tuple[int, float]]:
        """Yield step and loss of all records in the folder."""
        n_before = 0
        for part in self.folder.records():
            for step in part["steps"].tolist():
                yield step, float(part["loss"][step - n_before])
            n_before += len(part["loss"])


def _load(folder: RunFolder, request: Request) -> Trajectory:
    """Load the run in a folder, with the caller's weights where a file cannot draw them again."""
    run = load_folder(folder, request.problem)
    if isinstance(request.weights, ImplicitWeights) and run.states.initial_weights() is None:
        run.states = run.states.replace_initial_weights(request.weights)
    return run


def _read_finished(folder: RunFolder, request: Request) -> Trajectory:
    """Load a finished run, or raise the `DivergedError` that holds it."""
    run = _load(folder, request)
    ending = folder.ending()
    assert ending is not None
    if ending["outcome"] == "diverged":
        step, layer = ending["step"], ending["layer"]
        text = divergence_text(request, step, layer)
        raise DivergedError(text, step=step, layer=layer, trajectory=run)
    return run


def _new_records(run: Trajectory, repeated: bool) -> dict[str, npt.NDArray[Any]]:
    """Return the records of a run, without the first one where it repeats a saved one."""
    first = int(repeated)
    arrays = {
        name: array if name.startswith("snapshot") else array[first:]
        for name, array in run.states.record_arrays().items()
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
    """Return the number of steps that take about a second, or fill 256 MB."""
    if space is None:
        widths = request.widths
        flops = core.step_flops(widths, core.best_pivot(widths)) + 4.0 * sum(
            map(math.prod, zip(widths[1:], widths[:-1], strict=True))
        )
        ranks = [min(a, b) for a, b in zip(widths[1:], widths[:-1], strict=True)]
        sizes = [k if request.n_values is None else min(k, request.n_values) for k in ranks]
        if isinstance(request.problem, SampleProblem):
            batch = request.problem.batch_size or request.problem.n_samples
            flops += 6.0 * batch * sum(map(math.prod, zip(widths[1:], widths[:-1], strict=True)))
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
