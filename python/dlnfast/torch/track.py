# SPDX-License-Identifier: MIT
"""`track`: singular values of a model's layers during training by any program."""

from __future__ import annotations

import bisect
import contextlib
import math
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .._support.arrays import FloatArray, check_count, check_flag, check_scale
from .._support.checksums import add_state_checksum
from .._support.file_checks import translate_part_errors
from .._support.threads import MAX_THREADS
from .._tracking.svd_tracker import (
    SVDTracker,
    TrackerRecord,
    check_state,
    is_decomposed,
)
from .._trajectory.trajectory import Trajectory
from ._matrix_records import (
    MatrixRecords,
    build_trajectory,
    check_number_of_values,
    has_own_vectors,
    make_tracker,
)
from ._names import match_names
from ._reading import describe_computation, explain_unreadable
from ._steps import StepMonitor
from .layers import (
    PENULTIMATE,
    CopiedMatrix,
    LayerChoice,
    WeightMatrix,
    find_penultimate,
    list_matrices,
    weight_matrices,
)
from .operators import frobenius_norm, matrix_to_host
from .report import LayerRecord, Report, Reporter

Of = Literal["weights", "change"]

_Matrices = Sequence[WeightMatrix | CopiedMatrix]

#: A module, the name of one of its buffers, the buffer, and a copy of it.
_Buffer = tuple[nn.Module, str, torch.Tensor, torch.Tensor]

_STATE_VERSION = 1
_TRACKED: tuple[Of, ...] = ("weights", "change")
#: Number of entries from which a matrix is tracked by all threads; smaller ones are tracked in parallel.
_LARGE = 2**22


def track(
    model: nn.Module,
    layers: LayerChoice = None,
    *,
    k: int | Literal["all"] = 8,
    every: int = 10,
    change: bool = True,
    vectors: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    tolerance: float | None = None,
    background: bool = False,
    seed: int = 0,
    n_threads: int = 0,
    report: Report | None = None,
) -> SpectralTracker:
    """Track the singular values of a model's weights, and of their change, during training.

    The training loop needs no changes. A record is the state between two training steps. It becomes due after
    every `every` steps of the optimizers that have the weights among their parameters, and is taken when the
    step is over, before an optimizer changes the weights again. If weights are changed without an optimizer
    of PyTorch, call ``.advance()`` after every step.

    Parameters
    ----------
    model : Module
        Model to track. The table "The matrix of a layer" in the guide to networks shows the matrix of each
        kind of layer.
    layers : str, regular expression, callable, sequence of them, or None
        Choice of weights as for `weight_matrices`; None: all. "penultimate" is the weight before the last one
        in the order of the forward pass, found from the order of the first gradients (until then, and if
        optimizers step within the backward pass, in the order of registration). Updates of adapters are
        chosen by `DeepLoRA.updates` or `adapter_updates`.
    k : int or "all"
        Number of singular values of each matrix, at most all.
    every : int
        Steps between two records, which are taken at steps 0, every, 2 every, .. and at the end.
    change : bool
        Whether to track W(t) - W(0), too, which needs a copy of W(0).
    vectors : bool
        Whether to record the singular vectors for `Trajectory.singular_vectors` and
        `Trajectory.subspace_cosines`, with k (m + n) numbers for each record and matrix.
    optimizer : Optimizer, optional
        Only optimizer whose steps are counted. Default: all optimizers of the weights; see the notes.
    tolerance : float, optional
        Error bound relative to the largest value, above which `SVDTracker` computes new bounds. Default: 1e-3
        for matrices in the host's memory with a side of at most 4096, otherwise 0.05.
    background : bool
        Whether a record only copies the matrices, and a thread computes it during the next steps. Worth it
        where training leaves cores idle, as on a GPU; on a processor that training keeps busy, steps become
        longer by what a record saves. At most one record is computed at a time: the next one waits for it.
        ``.seconds`` is the time that training was held up, ``.background_seconds`` that of the thread.
        A weight that is not finite is an error of the next record.
    seed : int
        Seed of the random test vectors used for the error bounds.
    n_threads : int
        Number of threads; 0: that of PyTorch, or one in the background. Matrices with fewer than 2^22 entries
        are tracked in parallel, by one thread each; larger ones one after the other, by all threads.
    report : Report, optional
        Sinks that receive the metrics of every record while the training runs, and alarms that warn or stop
        it.

    Returns
    -------
    SpectralTracker
        Tracker with ``.trajectory()`` and ``.trajectory(of="change")`` at any time. Tracking ends with
        ``.close()`` or at the end of a ``with`` block.

    Raises
    ------
    TypeError, ValueError
        For a choice that matches no weight, an optimizer without a tracked weight, an alarm for layers or
        changes that are not tracked, and settings out of their range. For a weight that is not finite at a
        record: during training from the next ``optimizer.step()``, otherwise from ``.trajectory()``,
        ``.finish_step()`` or ``.close()``.
    StopTraining
        For an alarm with the action "stop": from the next ``optimizer.step()``, before it changes weights, or
        from ``.finish_step()`` or ``.advance()``.

    Warns
    -----
    RuntimeWarning
        If tracking ends and weights were trained, but no step of an optimizer was seen; if it ends while the
        model contains other weights than those of its last step; for a layer that was replaced.

    Notes
    -----
    Training steps. Calls of ``Optimizer.step`` belong to one training step until an optimizer steps again, or
    a stepped weight receives a new gradient. So several optimizers in one loop, one optimizer for each
    parameter within the backward pass, and wrappers of optimizers make one step together. Optimizers of
    successive phases make successive steps, and so do optimizers with a backward pass between them, as in a
    GAN (pass one as `optimizer` to count only its steps). A call that a gradient scaler skips is no step. A
    record includes changes of the weights after ``step()``, such as clipping or normalisation.

    Averaged weights. A record contains the weights in the model at the end of a step. Copies with averages
    (EMA, SWA) are not tracked, and averages that are swapped into the model for an evaluation are not
    recorded. Close the tracker, and read `trajectory`, before averages are swapped in for good, and before a
    best model is loaded. Recorded weights of a schedule-free optimizer are those of its training mode (y).

    Cost per record and m x n matrix, and the same for its change: 4 m n (k + 8) flops and the ones for new
    bounds. In the host's memory these are mostly 1.3 s^2 l in double precision, for sides s <= l (see
    `SVDTracker`): less than a decomposition, which takes 3 s^2 l slower ones. Weights on other devices stay
    there, and only blocks of k + 8 vectors are copied, except for matrices that are decomposed as a whole:
    those with a side of at most 128, or 3 (k + 8). Half precisions are read as float32. Memory: one copy of
    the tracked weights (``change=True``), about 5 (k + 8) + 300 vectors of the lengths of each matrix's
    sides, and for each thread one matrix and one of s^2 numbers in double precision.

    The update of an adapter is tracked as the product of its thin factors. The product is computed only if a
    side is at most 128. It has r singular values.

    With data parallelism every process has a copy of the weights: track in one process. Weights that are
    sharded over processes (FSDP) are refused: use `RowSharded` for such a matrix.

    Examples
    --------
    >>> import torch
    >>> import dlnfast as dln
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with dln.torch.track(model, k=2, every=1) as tracked:
    ...     for _ in range(3):
    ...         loss = model(torch.ones(4, 8)).square().sum()
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...         optimizer.step()
    >>> tracked.trajectory().singular_values("0").shape
    (4, 2)
    """
    return SpectralTracker(
        model,
        layers,
        k=k,
        every=every,
        change=change,
        vectors=vectors,
        optimizer=optimizer,
        tolerance=tolerance,
        background=background,
        seed=seed,
        n_threads=n_threads,
        report=report,
    )


class SpectralTracker:
    """Tracker of a model's weights, with its records and hooks; made by `track`.

    Attributes
    ----------
    matrices : list of WeightMatrix
        Tracked weights, in the order of the records.
    step : int
        Number of training steps so far.
    seconds : float
        Total time for which the records held up the training.
    background_seconds : float
        Total time of the thread that computes records in the background.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerChoice = None,
        *,
        k: int | Literal["all"] = 8,
        every: int = 10,
        change: bool = True,
        vectors: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        tolerance: float | None = None,
        background: bool = False,
        seed: int = 0,
        n_threads: int = 0,
        report: Report | None = None,
    ) -> None:
        if report is not None and not isinstance(report, Report):
            raise TypeError(f"report is {report!r}; wanted a dlnfast.torch.Report")
        self._reporter = Reporter(report or Report())
        #: Candidates for "penultimate", until the first gradients show the order of the layers.
        self._candidates = weight_matrices(model) if isinstance(layers, str) and layers == PENULTIMATE else []
        chosen = weight_matrices(model, self._candidates[-2:-1] or layers)
        self._change = check_flag(change, "change")
        self._vectors = check_flag(vectors, "vectors")
        self.step = 0
        self.seconds = self.background_seconds = 0.0
        self._is_in_background = check_flag(background, "background")
        #: The step of a record that is computed in the background, its matrices, and what the thread found.
        self._pending: tuple[int, _Matrices, Future[_Found]] | None = None
        self._failed = False
        self._k = check_number_of_values(k)
        self._every = check_count(every, "every")
        self._settings: dict[str, Any] = {
            "tolerance": None if tolerance is None else check_scale(tolerance, "tolerance"),
            "seed": seed,
            "n_threads": check_count(n_threads, "n_threads", minimum=0, maximum=MAX_THREADS),
        }
        self._loss: dict[int, float] = {}
        #: Memory in which each thread computes changes, by thread.
        self._buffers: dict[int, npt.NDArray[Any]] = {}
        self._start_tracking(chosen)
        # Before the first gradients, "penultimate" can be any of the candidates.
        self._reporter.check_alarms([m.name for m in self._candidates or chosen], self._records)
        self._model = weakref.ref(model)
        #: Whether a record is due when the current step is over.
        self._is_due = False
        #: Buffers of computed weights after a step with a due record, copied because forward passes change
        #: them.
        self._due_buffers: list[_Buffer] = []
        #: Versions of the weights' tensors at the last call of `finish_step`.
        self._finished: list[int] | None = None
        self._replaced: set[str] = set()
        self._monitor = StepMonitor(
            self._watched_modules,
            self._count_step,
            self._extend_step,
            self._end_step,
            optimizer,
        )
        self.record()
        self._collect()  # errors of the first weights are those of this call

    def __repr__(self) -> str:
        """Return the numbers of layers, steps and records, and the optimizers."""
        names = " and ".join(self._monitor.optimizer_names)
        steps = f"{self.step} steps" + (f" of {names}" if names else "")
        n_records = len(self._steps) + (self._pending is not None)
        return f"SpectralTracker({len(self.matrices)} layers, {steps}, {n_records} records)"

    def _start_tracking(self, matrices: list[WeightMatrix]) -> None:
        """Start with these matrices, their current values, and no records."""
        for matrix in matrices:
            _check_trackable(matrix)
        self.matrices = matrices
        self._steps: list[int] = []
        self._start = [m.copy() for m in matrices] if self._change else None
        self._records: dict[Of, list[MatrixRecords]] = {
            of: [MatrixRecords(self._make_tracker(m)) for m in matrices]
            for of in _TRACKED
            if self._change or of == "weights"
        }

    def _make_tracker(self, matrix: WeightMatrix) -> SVDTracker:
        settings = {**self._settings, **({} if _is_large(matrix) else {"n_threads": 1})}
        is_array = _is_on_host(matrix)
        return make_tracker(matrix.shape, self._k, matrix.highest_rank, is_array=is_array, **settings)

    @property
    def model(self) -> nn.Module:
        """The tracked model.

        Raises
        ------
        RuntimeError
            If it does not exist any more: the tracker does not keep it alive.
        """
        model = self._model()
        if model is None:
            raise RuntimeError("the tracked model does not exist any more")
        return model

    def start_matrices(self) -> list[torch.Tensor]:
        """Return the tracked weights as they were at the start, as matrices, in the order of `matrices`.

        Raises
        ------
        ValueError
            After ``track(.., change=False)``.
        """
        if self._start is None:
            raise ValueError("the start is not known because of change=False")
        return [m.start_matrix(start) for m, start in zip(self.matrices, self._start, strict=True)]

    # ------------------------------------------------------------------------------------- records

    def advance(self) -> None:
        """Count a finished training step, and take a record if it is due.

        Needed only if weights are changed without an optimizer of PyTorch.

        Raises
        ------
        StopTraining
            For an alarm with the action "stop".
        """
        self._count_step()
        self._take_due_record()
        self._reporter.raise_stop()

    def finish_step(self) -> None:
        """Declare the training step finished, and take a due record at once.

        This is optional. Call it before weights are replaced, such as when averages are swapped in. It also
        lets `close` notice that they were replaced.

        Raises
        ------
        ValueError
            The errors of `record`.
        StopTraining
            For an alarm with the action "stop".
        """
        self._take_due_record()
        self._finished = self._read_versions()
        self._reporter.raise_stop()

    def start_at(self, step: int) -> None:
        """Set the number of the first step, for a training that is resumed without its records.

        Parameters
        ----------
        step : int
            Number of steps before.

        Raises
        ------
        TypeError, ValueError
            For a number that is no step, and after the first step.
        """
        self._collect()
        if self._steps != [0] or self.step:
            raise ValueError(f"start_at is for the start, but {self.step} steps were taken")
        self.step = check_count(step, "step", minimum=0)
        self._start_tracking(self.matrices)
        self.record()

    def record(self) -> None:
        """Take a record of the current weights, unless this step has one.

        Raises
        ------
        ValueError
            If a weight is not finite; the message names its layer and step.
        """
        self._is_due = False
        self._collect()
        if self._steps and self._steps[-1] == self.step:
            return
        self._find_replaced()
        start = time.perf_counter()
        n_threads = self._settings["n_threads"] or (1 if self._is_in_background else torch.get_num_threads())
        if self._is_in_background:
            matrices: _Matrices = [CopiedMatrix(matrix) for matrix in self.matrices]
            pool = ThreadPoolExecutor(1)
            self._pending = self.step, matrices, pool.submit(self._update_trackers, matrices, n_threads)
            pool.shutdown(wait=False)
        else:
            self._store(self.step, self.matrices, self._update_trackers(self.matrices, n_threads))
        self.seconds += time.perf_counter() - start

    def _collect(self) -> None:
        """Store the record that was computed in the background, if there is one."""
        if self._pending is None:
            return
        start = time.perf_counter()
        (step, matrices, future), self._pending = self._pending, None
        found = future.result()
        self._store(step, matrices, found)
        self.background_seconds += found.seconds
        self.seconds += time.perf_counter() - start

    def _store(self, step: int, matrices: _Matrices, found: _Found) -> None:
        for (i, _), error in found.records.items():  # before any is stored: all matrices or no record
            if isinstance(error, ValueError):
                self._failed = True
                raise ValueError(f"layer {matrices[i].name} at step {step}: {error}") from error
        for (i, of), result in found.records.items():
            assert isinstance(result, TrackerRecord)
            records = self._records[of][i]
            records.append(result, self._vectors)
            if records.reference is None and has_own_vectors(result):
                records.set_reference(result, step, self._to_host(matrices[i], i, of))
        is_first = not self._steps
        self._steps.append(step)
        if self._reporter.is_needed:
            self._reporter.report(
                [_describe(matrices[i].name, of, step, result) for (i, of), result in found.records.items()],
                is_first=is_first,
            )

    def _take_due_record(self) -> None:
        # In evaluation mode the model of a schedule-free optimizer contains averages, not weights of a step.
        if self._is_due and self._find_averaging_optimizer() is None:
            with _restore_buffers(self._due_buffers):
                self.record()

    def _copy_computing_buffers(self) -> list[_Buffer]:
        """Copy the buffers from which weights are computed, such as the vectors of spectral normalisation."""
        return [
            (module, name, buffer, buffer.clone())
            for matrix in self.matrices
            if describe_computation(matrix.module, matrix.attribute) is not None
            for module in matrix.module.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def _drop_last(self) -> None:
        """Remove the latest record, because its step was not over."""
        self._steps.pop()
        for records in (each for several in self._records.values() for each in several):
            records.drop_last(self.step)

    def _find_averaging_optimizer(self) -> str | None:
        """Return the class name of an optimizer that has replaced its weights by averages, or None."""
        for optimizer in self._monitor.optimizers:
            if any(group.get("train_mode") is False for group in optimizer.param_groups):
                return type(optimizer).__name__
        return None

    def _read_versions(self) -> list[int]:
        """Return the version counters of all tracked parameters, which grow with every write."""
        return [p._version for module in self._watched_modules() for p in module.parameters()]

    def _find_replaced(self) -> None:
        """Continue with layers that have replaced tracked ones in the model, and warn about them."""
        model = self._model()
        modules = None if model is None else set(model.modules())
        if model is None or modules is None or all(m.module in modules for m in self.matrices):
            return
        available = {m.name: m for m in list_matrices(model)}
        for i, matrix in enumerate(self.matrices):
            if matrix.module in modules or matrix.name in self._replaced:
                continue
            new = available.get(matrix.name)
            if new is not None and type(new) is type(matrix) and new.shape == matrix.shape:
                _check_trackable(new)
                self.matrices[i] = new
                consequence = "its records continue with the new weight"
            else:
                self._replaced.add(matrix.name)
                consequence = "its further records are of the old weight, which nothing trains"
            warnings.warn(
                f"layer {matrix.name} was replaced in the model by step {self.step}: {consequence}",
                RuntimeWarning,
                stacklevel=4,
            )

    def _watched_modules(self) -> Iterable[nn.Module]:
        return dict.fromkeys(matrix.module for matrix in (*self.matrices, *self._candidates))

    def _count_step(self) -> None:
        """Count a training step; a due record is taken when the step is over."""
        self.step += 1
        self._finished = None
        self._is_due = self.step % self._every == 0
        self._due_buffers = self._copy_computing_buffers() if self._is_due else []

    def _extend_step(self) -> None:
        """Discard the record of this step and take it later: one more optimizer has changed weights."""
        self._finished = None
        self._collect()
        if self.step and self._steps[-1] == self.step:
            self._drop_last()
            self._is_due = True

    def _end_step(self) -> None:
        """Take a due record; before the first step, find the penultimate layer."""
        if self._candidates:
            candidates, self._candidates = self._candidates, []
            last_but_one = find_penultimate(candidates, self._monitor.gradient_order)
            if last_but_one is not None and last_but_one.name != self.matrices[0].name:
                self._collect()
                self._start_tracking([last_but_one])  # no weight has changed since the start
                self.record()
        self._take_due_record()
        self._reporter.raise_stop()

    def _to_host(self, matrix: WeightMatrix | CopiedMatrix, i: int, of: Of) -> FloatArray:
        """Return the matrix of layer i, or its change, in float64."""
        now = matrix_to_host(matrix.matrix()).astype(np.float64)
        start = self._get_start(matrix, i, of)
        return now if start is None else now - matrix_to_host(matrix.start_matrix(start))

    def _update_trackers(self, matrices: _Matrices, n_threads: int) -> _Found:
        """Update all trackers; return the record of each, or the error that it raises."""
        start_time = time.perf_counter()
        jobs: list[tuple[int, Of]] = [(i, of) for i in range(len(matrices)) for of in self._records]
        found: dict[tuple[int, Of], TrackerRecord | ValueError] = {}

        def work(queue: deque[tuple[int, Of]]) -> None:
            while queue:
                try:
                    i, of = queue.popleft()
                except IndexError:  # another thread was faster
                    return
                try:
                    tracker, start = self._records[of][i].tracker, self._get_start(matrices[i], i, of)
                    found[i, of] = self._update(tracker, matrices[i], start)
                except ValueError as error:
                    found[i, of] = error

        alone = {i for i, matrix in enumerate(matrices) if not _is_on_host(matrix) or _is_large(matrix)}
        work(deque(job for job in jobs if job[0] in alone))
        # The largest first, so that the threads end at about the same time.
        by_size = sorted(jobs, key=lambda job: -math.prod(matrices[job[0]].shape))
        parallel = deque(job for job in by_size if job[0] not in alone)
        n_others = min(n_threads, len(parallel)) - 1
        if n_others > 0:
            with ThreadPoolExecutor(n_others) as pool:
                others = [pool.submit(work, parallel) for _ in range(n_others)]
                work(parallel)
                for other in others:
                    other.result()
        else:
            work(parallel)
        self._buffers.clear()  # the next record has other threads
        return _Found({job: found[job] for job in jobs}, time.perf_counter() - start_time)

    def _get_start(
        self, matrix: WeightMatrix | CopiedMatrix, i: int, of: Of
    ) -> tuple[torch.Tensor, ...] | None:
        if of == "weights":
            return None
        assert self._start is not None
        device = matrix.device
        if self._start[i][0].device != device:  # the model has moved
            self._start[i] = tuple(tensor.to(device) for tensor in self._start[i])
        return self._start[i]

    def _update(
        self,
        tracker: SVDTracker,
        matrix: WeightMatrix | CopiedMatrix,
        start: tuple[torch.Tensor, ...] | None,
    ) -> TrackerRecord:
        # A matrix that is decomposed as a whole is copied to the host.
        if not is_decomposed(matrix.shape, tracker.k) and not _is_on_host(matrix):
            return self._update_by_products(tracker, matrix, start)
        values = matrix_to_host(matrix.matrix())
        if start is None:
            return tracker.update(values)
        buffer = self._buffers.get(threading.get_ident())
        if buffer is None or buffer.size < values.size or buffer.dtype != values.dtype:
            buffer = self._buffers[threading.get_ident()] = np.empty(values.size, dtype=values.dtype)
        moved = buffer[: values.size].reshape(values.shape)
        # Subtract with NumPy: every Python thread that calls PyTorch starts a team of OpenMP threads.
        return tracker.update(np.subtract(values, matrix_to_host(matrix.start_matrix(start)), out=moved))

    @staticmethod
    def _update_by_products(
        tracker: SVDTracker,
        matrix: WeightMatrix | CopiedMatrix,
        start: tuple[torch.Tensor, ...] | None,
    ) -> TrackerRecord:
        """Update a tracker by products on the matrix's device; only blocks of vectors are copied."""
        operator = matrix.operator(start)
        return tracker.update(operator, squared_norm=operator.squared_norm())

    def follows(self, model: nn.Module) -> bool:
        """Return whether this tracker is active and tracks a weight of the model.

        Parameters
        ----------
        model : Module
            Model to test.

        Returns
        -------
        bool
        """
        modules = set(model.modules())
        has_tracked = any(matrix.module in modules for matrix in self.matrices)
        return self._monitor.is_active and has_tracked

    def is_recorded(self, step: int) -> bool:
        """Return whether there is a record of a step, or one is due.

        Parameters
        ----------
        step : int
            Number of training steps.

        Returns
        -------
        bool
        """
        self._collect()
        index = bisect.bisect_left(self._steps, step)
        is_taken = index < len(self._steps) and self._steps[index] == step
        return is_taken or (self._is_due and step == self.step)

    def log_loss(self, loss: float | torch.Tensor, step: int | None = None) -> None:
        """Store a training loss with the records, for `Trajectory.loss`.

        Parameters
        ----------
        loss : float or Tensor
            Training loss. Reading a tensor waits for its device.
        step : int, optional
            Number of steps of the weights with this loss. Default: the number of steps so far, which is right
            for a loss that is computed before ``optimizer.step()``. Within a step, as in the closure of
            LBFGS, only the first loss is stored.

        Raises
        ------
        TypeError, ValueError
            For a loss that is no finite number, and a step that was not taken yet.
        """
        if isinstance(loss, torch.Tensor) and loss.numel() != 1:
            raise ValueError(f"loss has shape {tuple(loss.shape)}; wanted one number")
        number = float(loss.detach()) if isinstance(loss, torch.Tensor) else loss
        value = check_scale(number, "loss", minimum=-np.inf)
        if step is not None and check_count(step, "step", minimum=0) > self.step:
            raise ValueError(f"step is {step}, but {self.step} steps were taken")
        if step is None and self._monitor.is_stepping and self.step in self._loss:
            return
        self._loss[self.step if step is None else step] = value

    def trajectory(self, of: Of = "weights") -> Trajectory:
        """Return the records so far.

        Parameters
        ----------
        of : {"weights", "change"}
            Matrices to return: W(t) or W(t) - W(0).

        Returns
        -------
        Trajectory
            Records, with the layer names of `matrices`: ``run.singular_values("head")``,
            ``run.angles("head")``, and all plots of `dlnfast.plots` take names. Angles compare singular
            vectors of equal index with a reference record, and are 0 before it. The reference is the first
            record with distinct singular vectors: step 0, or a later step for changes and for weights that
            start as a scaled isometry; see ``config["reference_steps"]``. ``tracking(layer)["vector_error"]``
            is the error of the vectors.

        Raises
        ------
        ValueError
            For "change" after ``track(.., change=False)``.
        """
        self._take_due_record()
        self._collect()
        if of not in self._records:
            if of == "change":
                raise ValueError("of is 'change', which is not tracked because of change=False")
            raise ValueError(f"of is {of!r}; wanted 'weights' or 'change'")
        records = self._records[of]
        description = "weights" if of == "weights" else "changes since the start"
        config = {
            "engine": "tracked",
            "of": of,
            "aliases": [list(m.aliases) for m in self.matrices],
            **self._describe_layers(),
            "every": self._every,
            "steps": self.step,
            "optimizers": self._monitor.optimizer_names,
            **self._settings,
        }
        return build_trajectory(
            [each.spectra() for each in records],
            self._steps,
            config,
            f"{description} of {len(records)} layers of a model, every {self._every} steps",
            seconds=self.seconds,
            losses=self._loss,
        )

    # ----------------------------------------------------------------------------------- end, resume

    def close(self) -> None:
        """Take a last record, and remove all hooks. A second call does nothing.

        Raises
        ------
        ValueError
            The errors of `record`.

        Warns
        -----
        RuntimeWarning
            If the last step has no record, because the model contains other weights now. If weights were
            trained, but no step of an optimizer was seen.
        """
        if not self._monitor.is_active:
            return
        averaging = self._find_averaging_optimizer()
        self._monitor.remove()
        self._collect()
        if self._failed:  # an error has already named the weight that is not finite
            return
        if self._steps == [self.step]:
            self._warn_if_trained()
        if self._steps[-1] == self.step:
            self._is_due = False
            return
        if averaging is not None:
            reason = f"{averaging} is in evaluation mode, and the model holds averages: close before"
        elif self._finished is not None and self._finished != self._read_versions():
            reason = "the weights were replaced after it, as by loading a best model"
        else:
            self.record()
            self._collect()
            return
        self._is_due = False
        warnings.warn(f"step {self.step} has no record: {reason}", RuntimeWarning, stacklevel=2)

    def _warn_if_trained(self) -> None:
        tensors = [p for module in self._watched_modules() for p in module.parameters()]
        latest = [records.tracker.record for records in self._records["weights"]]
        first = [0.0 if record is None else record.norm for record in latest]
        moved = any(
            abs(now - then) > 1e-3 * then for now, then in zip(self._compute_norms(), first, strict=True)
        )
        if moved or any(p.grad is not None for p in tensors):
            warnings.warn(
                "no step of a torch.optim.Optimizer that holds a tracked weight was seen: call advance() "
                "after every step, or track the model that is trained",
                RuntimeWarning,
                stacklevel=3,
            )

    def __enter__(self) -> SpectralTracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        if kind is None:
            self.close()
        elif not self._monitor.is_stepping:  # the last step is complete, but its weights may not be finite
            with contextlib.suppress(ValueError):
                self._take_due_record()
                self._collect()
        self._monitor.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from: the records, W(0) and the trackers' vectors.

        Returns
        -------
        dict
            Tensors and plain values for `torch.save`; ``torch.load(..., weights_only=True)`` reads it.
        """
        self._take_due_record()
        self._collect()
        state = {
            "version": _STATE_VERSION,
            **self._describe_layers(),
            "step": self.step,
            "steps": list(self._steps),
            "loss": dict(self._loss),
            "seconds": self.seconds,
            "start": None if self._start is None else [[t.clone() for t in s] for s in self._start],
            "norms": self._compute_norms(),
            "followed": {of: [r.state_dict() for r in each] for of, each in self._records.items()},
        }
        return add_state_checksum(state)

    def _describe_layers(self) -> dict[str, Any]:
        """Return the settings that must be equal in a tracker that resumes from a state of this one."""
        return {
            "layers": [m.name for m in self.matrices],
            "shapes": [list(m.shape) for m in self.matrices],
            "k": self._k,
            "vectors": self._vectors,
        }

    def _compute_norms(self) -> list[float]:
        return [frobenius_norm(m.matrix()) for m in self.matrices]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of another tracker of the same layers.

        Load the weights of the model first. Branches of singular values keep their numbers, which follow from
        the overlaps of the vectors.

        Parameters
        ----------
        state : dict
            Result of `state_dict`.

        Raises
        ------
        TypeError, ValueError
            For another object, other layers, shapes or k, weights of the model that differ from those of the
            state, and a state of a newer version.
        """
        check_state(state, "followed", _STATE_VERSION)
        self._collect()
        with translate_part_errors("state"):
            self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a state; nothing changes unless all of the state is valid."""
        self._candidates, candidates = [], self._candidates
        for matrix in candidates:
            if list(match_names(state["layers"], [matrix.name]).values()) == [matrix.name]:
                self._start_tracking([matrix])
                self.record()
                self._collect()
        own = {**self._describe_layers(), "tracked matrices": sorted(self._records)}
        saved = {**state, "tracked matrices": sorted(state["followed"])}
        # Layer names in a wrapped model match those in the plain one.
        renamed = match_names(saved["layers"], own["layers"])
        saved["layers"] = [renamed.get(name, name) for name in saved["layers"]]
        for name, value in own.items():
            if saved[name] != value:
                raise ValueError(f"state was taken with {name} {saved[name]}; this tracker has {value}")
        for matrix, now, then in zip(self.matrices, self._compute_norms(), state["norms"], strict=True):
            if abs(now - then) > 1e-3 * then:  # tolerates another precision
                raise ValueError(
                    f"layer {matrix.name} has the norm {now:.6g}, but had {then:.6g} when the state was "
                    "taken: load the model's weights first"
                )
        start = self._start
        if start is not None:
            pairs = zip(start, state["start"], strict=True)
            start = [
                tuple(tensor.to(mine[0].device, mine[0].dtype) for tensor in theirs) for mine, theirs in pairs
            ]
        step, seconds = int(state["step"]), float(state["seconds"])
        steps = [int(number) for number in state["steps"]]
        loss = {int(number): float(value) for number, value in state["loss"].items()}
        records = {
            of: [
                MatrixRecords.from_state_dict(
                    state["followed"][of][i], 0 if _is_large(matrix) else 1, len(steps)
                )
                for i, matrix in enumerate(self.matrices)
            ]
            for of in self._records
        }
        self._start, self.step, self.seconds, self._steps, self._loss = start, step, seconds, steps, loss
        self._is_due, self._finished = False, None
        self._monitor.restart()
        for of, restored in records.items():
            self._records[of][:] = restored


@contextlib.contextmanager
def _restore_buffers(buffers: list[_Buffer]) -> Iterator[None]:
    """Replace changed buffers by their copies in the block; buffers that were replaced since are left."""
    changed = [
        (module, name, buffer, then)
        for module, name, buffer, then in buffers
        if module._buffers.get(name) is buffer and not torch.equal(buffer, then)
    ]
    for module, name, _, then in changed:
        module._buffers[name] = then
    try:
        yield
    finally:
        for module, name, buffer, _ in changed:
            module._buffers[name] = buffer


def _check_trackable(matrix: WeightMatrix) -> None:
    """Raise TypeError or ValueError for a weight that cannot be read as one matrix of real numbers."""
    reason = None if matrix.is_product else explain_unreadable(matrix.module, matrix.attribute)
    if reason is not None:
        raise TypeError(f"layer {matrix.name} {reason}; wanted real floating-point numbers")
    values = matrix.matrix()
    if hasattr(values, "device_mesh"):  # a DTensor, without importing torch.distributed
        raise TypeError(
            f"layer {matrix.name} is a {type(values).__name__}, sharded over processes as FSDP2 does; wanted "
            "a whole weight: track a model that is not sharded, or pass the rows of each process to "
            "dlnfast.torch.RowSharded"
        )
    if values.is_meta:
        raise ValueError(f"layer {matrix.name} is on the meta device, where weights have no values")


def _is_on_host(matrix: WeightMatrix | CopiedMatrix) -> bool:
    """Return whether a matrix is read as an array; others are known by products on their device."""
    return matrix.device.type == "cpu" and not matrix.is_product


def _is_large(matrix: WeightMatrix | CopiedMatrix) -> bool:
    rows, columns = matrix.shape
    return rows * columns >= _LARGE


def _describe(layer: str, of: Of, step: int, found: TrackerRecord | ValueError) -> LayerRecord:
    """Return the record of one layer for sinks and alarms."""
    assert isinstance(found, TrackerRecord)
    values = np.abs(found.singular_values).astype(np.float64)
    # Rounding may make the norm smaller than that of the values; it is unknown for some operators.
    norm = max(found.norm if math.isfinite(found.norm) else 0.0, float(np.linalg.norm(values)))
    return LayerRecord(layer, of, step, values, norm)


class _Found(NamedTuple):
    """The records of all matrices and changes at one step, or the errors, and the seconds that they took."""

    records: dict[tuple[int, Of], TrackerRecord | ValueError]
    seconds: float
