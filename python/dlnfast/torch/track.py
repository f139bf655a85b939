# SPDX-License-Identifier: MIT
"""`track`: the singular values of a model's layers while any program trains it."""

from __future__ import annotations

import bisect
import contextlib
import math
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .. import reference as plain
from .._closure.certificate import Certificate
from .._problem.factors import DenseMap, leading_factors
from .._support.arrays import FloatArray, check_count, check_flag, check_scale
from .._support.stored import translate_part_errors
from .._support.threads import MAX_THREADS
from .._tracking.svd_tracker import (
    DEFAULTS,
    SVDTracker,
    TrackerRecord,
    check_state,
    is_decomposed,
    with_state_checksum,
)
from .._trajectory.states import DenseStates, LayerTracking, tracking_rows
from .._trajectory.trajectory import Trajectory
from ._names import match_names
from ._reading import computed_by, unreadable
from ._steps import StepMonitor
from .layers import PENULTIMATE, LayerChoice, WeightMatrix, every_matrix, penultimate, weight_matrices
from .operators import frobenius_norm, host_matrix

Of = Literal["weights", "change"]

#: A module, the name of a buffer of it, that buffer, and a copy.
_Buffer = tuple[nn.Module, str, torch.Tensor, torch.Tensor]

_STATE_VERSION = 1
_WHAT: tuple[Of, ...] = ("weights", "change")
#: Rows of a record that are there on demand.
_VECTORS = ("left", "right")
#: Numbers in a matrix from which on it takes all threads. Smaller ones take one each, side by side.
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
    tolerance: float = DEFAULTS["tolerance"],
    seed: int = 0,
    n_threads: int = 0,
) -> SpectralTracker:
    """Follow the singular values of a model's weights, and of their change, while it is trained.

    Nothing in the training loop changes. A record is the state between two training steps: it becomes due
    after every so many steps of the optimizers that hold the weights, and is taken once the step is over,
    before an optimizer moves the weights again. Where weights are moved without an optimizer of PyTorch, call
    ``.advance()`` after every step.

    Parameters
    ----------
    model : Module
        Any. Which matrix is followed for every kind of layer says the table "The matrix of a layer" in the
        guide to networks.
    layers : str, regular expression, callable, sequence of them, or None
        Which: as for `weight_matrices`; None for all; "penultimate", the weight before the last one in the
        order of the forward pass, as the first gradients tell it (until then, and where the optimizers step
        within the backward pass, in the order of registration). Or the updates of adapters, by
        `DeepLoRA.updates` or `adapter_updates`.
    k : int or "all"
        How many singular values; at most all that a matrix has.
    every : int
        Records at steps 0, every, 2 every, .. and when tracking ends.
    change : bool
        Also follow W(t) - W(0), which takes a copy of W(0).
    vectors : bool
        Keep the singular vectors of every record, for `Trajectory.singular_vectors` and
        `Trajectory.subspace_cosines`: k (m + n) numbers each.
    optimizer : Optimizer, optional
        The only one whose steps are counted. By default all that hold one of the weights; see the notes.
    tolerance : float
        As for `SVDTracker`: where an error exceeds this share of the largest value, bounds are built anew.
    seed : int
        Of the random vectors behind the bounds.
    n_threads : int
        0: as many as PyTorch has. Matrices of less than 2^22 numbers are followed side by side, each by one
        thread; larger ones one after the other, by all threads.

    Returns
    -------
    SpectralTracker
        ``.trajectory()`` and ``.trajectory(of="change")`` at any time; ``.close()``, or a ``with`` block,
        ends it.

    Raises
    ------
    TypeError, ValueError
        For a choice that fits no weight, an optimizer that holds none, and settings out of their range. For a
        weight that is not finite at a record: while training, from the ``optimizer.step()`` that follows it,
        or from ``.trajectory()``, ``.finish_step()`` and ``.close()``.

    Warns
    -----
    RuntimeWarning
        When tracking ends though weights were trained and no step of an optimizer was seen, or while the
        model holds other weights than those of its last step; for a layer that was replaced.

    Notes
    -----
    A training step. Calls of ``Optimizer.step`` belong to one training step until an optimizer steps again,
    or a weight that was stepped receives a new gradient. So several optimizers in one loop, one for each
    parameter within the backward pass, and wrappers make one step together; optimizers of successive phases
    make successive steps, and so do those with a backward pass between them, as of a GAN (name one by
    `optimizer` to count its steps only). A call that a gradient scaler skips is no step. All followed weights
    of a record are of the same moment, with what is done to them after ``step()``: clipping, normalisation.

    Averaged weights. Records are those of the weights in the model when an optimizer steps. Copies with
    averages (EMA, SWA) are not followed; averages that are swapped into the model for an evaluation are not
    recorded, but end the tracking, and read `trajectory`, before they are swapped in for good, and before a
    best model is loaded. A schedule-free optimizer's weights are those of its training mode (y).

    Cost: 4 m n (k + 8) flops per record and m x n matrix, and the same for the change, plus the products that
    renew a bound (see `SVDTracker`). Weights on a device stay there, only blocks of k + 8 vectors travel, but
    for those that are decomposed as a whole: with a side of at most 128, or 3 (k + 8).
    Half precisions are read as float32. Memory: one copy of the tracked weights (``change=True``), about
    5 (k + 8) + 300 vectors of the lengths of each matrix's sides, and one matrix for each thread.

    The update of an adapter is followed as the product of its thin factors, without being formed where its
    sides are above 128; all its singular values are r.

    Under data parallelism every process tracks its own copy: start it in one. Weights that are sharded over
    processes (FSDP) are refused: `RowSharded` holds the values of such a matrix.

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
        seed=seed,
        n_threads=n_threads,
    )


class SpectralTracker:
    """The records so far, and the hooks that take them: see `track`.

    Attributes
    ----------
    matrices : list of WeightMatrix
        The followed weights, in the order of the records.
    step : int
        Training steps so far.
    seconds : float
        Time that the records took.
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
        tolerance: float = DEFAULTS["tolerance"],
        seed: int = 0,
        n_threads: int = 0,
    ) -> None:
        #: For "penultimate", until gradients tell the order of the layers.
        self._candidates = weight_matrices(model) if isinstance(layers, str) and layers == PENULTIMATE else []
        chosen = weight_matrices(model, self._candidates[-2:-1] or layers)
        self._change = check_flag(change, "change")
        self._vectors = check_flag(vectors, "vectors")
        self.step = 0
        self.seconds = 0.0
        self._failed = False
        if k != "all" and not isinstance(k, int):
            raise TypeError(f'k is {k!r}; wanted a number of singular values, or "all"')
        self._k = k if k == "all" else check_count(k, "k")
        self._every = check_count(every, "every")
        self._settings: dict[str, Any] = {
            "tolerance": check_scale(tolerance, "tolerance"),
            "seed": seed,
            "n_threads": check_count(n_threads, "n_threads", minimum=0, maximum=MAX_THREADS),
        }
        self._loss: dict[int, float] = {}
        #: Where each thread computes changes.
        self._buffers: dict[int, npt.NDArray[Any]] = {}
        self._follow(chosen)
        self._model = weakref.ref(model)
        #: Whether the record of the last step is to be taken once that step is over.
        self._is_due = False
        #: Copies of computed weights' buffers after a step whose record is due: forward passes move them.
        self._due_buffers: list[_Buffer] = []
        #: Versions of the weights' tensors when the last step was said to be finished.
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

    def __repr__(self) -> str:
        """Return what is followed, by whom it is stepped, and how far."""
        names = " and ".join(self._monitor.optimizer_names)
        steps = f"{self.step} steps" + (f" of {names}" if names else "")
        return f"SpectralTracker({len(self.matrices)} layers, {steps}, {len(self._steps)} records)"

    def _follow(self, matrices: list[WeightMatrix]) -> None:
        """Begin with these matrices, as they are now, and no records."""
        for matrix in matrices:
            _check_followed(matrix)
        self.matrices = matrices
        self._steps: list[int] = []
        self._start = [m.copy() for m in matrices] if self._change else None
        self._followed: dict[Of, list[_Followed]] = {
            of: [_Followed(self._new_tracker(m)) for m in matrices]
            for of in _WHAT
            if self._change or of == "weights"
        }

    def _new_tracker(self, matrix: WeightMatrix) -> SVDTracker:
        most = matrix.highest_rank
        settings: dict[str, Any] = {**self._settings, **({} if _is_large(matrix) else {"n_threads": 1})}
        return SVDTracker(most if isinstance(self._k, str) else min(self._k, most), **settings)

    # ------------------------------------------------------------------------------------- records

    def advance(self) -> None:
        """Count a training step that is over, and take a record if it is time: for weights moved by hand."""
        self._count_step()
        self._take_due()

    def finish_step(self) -> None:
        """Say that the training step is over: a record that is due is taken at once.

        Nobody needs to call this. It helps where the weights are about to be replaced, as when averages are
        swapped in, and it lets `close` notice when they were.

        Raises
        ------
        ValueError
            As for `record`.
        """
        self._take_due()
        self._finished = self._versions()

    def start_at(self, step: int) -> None:
        """Count steps from another one than 0, for a training that is resumed without its records.

        Parameters
        ----------
        step : int
            Steps that were taken before.

        Raises
        ------
        TypeError, ValueError
            For a number that is no step, and once steps were taken.
        """
        if self._steps != [0] or self.step:
            raise ValueError(f"start_at is for the start, but {self.step} steps were taken")
        self.step = check_count(step, "step", minimum=0)
        self._follow(self.matrices)
        self.record()

    def record(self) -> None:
        """Take a record of the weights as they are now, unless there is one of this step.

        Raises
        ------
        ValueError
            If a weight is not finite, naming its layer and step.
        """
        self._is_due = False
        if self._steps and self._steps[-1] == self.step:
            return
        self._find_replaced()
        start = time.perf_counter()
        jobs: list[tuple[int, Of]] = [(i, of) for i in range(len(self.matrices)) for of in self._followed]
        found = self._find(jobs)
        for i, of in jobs:  # all of them or none
            if isinstance(error := found[i, of], ValueError):
                self._failed = True
                raise ValueError(f"layer {self.matrices[i].name} at step {self.step}: {error}") from error
        for i, of in jobs:
            followed = self._followed[of][i]
            followed.append(found[i, of], self._vectors)
            if followed.reference is None and _is_split(found[i, of]):
                followed.refer_to(found[i, of], self.step, self._host(i, of))
        self._steps.append(self.step)
        self.seconds += time.perf_counter() - start

    def _take_due(self) -> None:
        # A schedule-free optimizer's averages are not the weights of a step.
        if self._is_due and self._averaging() is None:
            with _as_noted(self._due_buffers):
                self.record()

    def _computing_buffers(self) -> list[_Buffer]:
        """Return copies of buffers from which weights are computed, as spectral normalisation's vectors."""
        return [
            (module, name, buffer, buffer.clone())
            for matrix in self.matrices
            if computed_by(matrix.module, matrix.attribute) is not None
            for module in matrix.module.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def _drop_last(self) -> None:
        """Forget the record of a step that was not over."""
        self._steps.pop()
        for followed in (each for several in self._followed.values() for each in several):
            followed.drop_last(self.step)

    def _averaging(self) -> str | None:
        """Return the class of an optimizer that has put averages in the place of its weights."""
        for optimizer in self._monitor.optimizers:
            if any(group.get("train_mode") is False for group in optimizer.param_groups):
                return type(optimizer).__name__
        return None

    def _versions(self) -> list[int]:
        """Return what changes whenever a weight is written to."""
        return [p._version for module in self._watched_modules() for p in module.parameters()]

    def _find_replaced(self) -> None:
        """Follow layers that took the places of others in the model, or say that some are gone."""
        model = self._model()
        modules = None if model is None else set(model.modules())
        if model is None or modules is None or all(m.module in modules for m in self.matrices):
            return
        there = {m.name: m for m in every_matrix(model)}
        for i, matrix in enumerate(self.matrices):
            if matrix.module in modules or matrix.name in self._replaced:
                continue
            new = there.get(matrix.name)
            if new is not None and type(new) is type(matrix) and new.shape == matrix.shape:
                _check_followed(new)
                self.matrices[i] = new
                said = "its records go on with the new weight"
            else:
                self._replaced.add(matrix.name)
                said = "its further records are of the old weight, which nothing trains"
            warnings.warn(
                f"layer {matrix.name} was replaced in the model by step {self.step}: {said}",
                RuntimeWarning,
                stacklevel=4,
            )

    def _watched_modules(self) -> Iterable[nn.Module]:
        return dict.fromkeys(matrix.module for matrix in (*self.matrices, *self._candidates))

    def _count_step(self) -> None:
        """Count a training step; its record is taken when it is over."""
        self.step += 1
        self._finished = None
        self._is_due = self.step % self._every == 0
        self._due_buffers = self._computing_buffers() if self._is_due else []

    def _extend_step(self) -> None:
        """Take the record of this step anew: one more optimizer has moved weights in it."""
        self._finished = None
        if self.step and self._steps[-1] == self.step:
            self._drop_last()
            self._is_due = True

    def _end_step(self) -> None:
        """Take a record that is due; before the first step, find the penultimate layer."""
        if self._candidates:
            candidates, self._candidates = self._candidates, []
            last_but_one = penultimate(candidates, self._monitor.gradient_order)
            if last_but_one is not None and last_but_one.name != self.matrices[0].name:
                self._follow([last_but_one])  # no weight has moved since the start
                self.record()
        self._take_due()

    def _host(self, i: int, of: Of) -> FloatArray:
        """Return a weight or its change in float64."""
        matrix = self.matrices[i]
        now = host_matrix(matrix.matrix()).astype(np.float64)
        start = self._start_of(of, i)
        return now if start is None else now - host_matrix(matrix.start_matrix(start))

    def _find(self, jobs: list[tuple[int, Of]]) -> dict[tuple[int, Of], Any]:
        """Return what each tracker finds, or the error that it raises."""
        found: dict[tuple[int, Of], Any] = {}
        n_threads = self._settings["n_threads"] or torch.get_num_threads()

        def work(queue: deque[tuple[int, Of]]) -> None:
            while queue:
                try:
                    i, of = queue.popleft()
                except IndexError:  # another thread was faster
                    return
                try:
                    tracker, start = self._followed[of][i].tracker, self._start_of(of, i)
                    found[i, of] = self._update(tracker, self.matrices[i], start)
                except ValueError as error:
                    found[i, of] = error

        alone = {
            i
            for i, matrix in enumerate(self.matrices)
            if matrix.device.type != "cpu" or matrix.is_product or _is_large(matrix)
        }
        work(deque(job for job in jobs if job[0] in alone))
        # The largest first, so that no thread is left with one of them at the end.
        by_size = sorted(jobs, key=lambda job: -math.prod(self.matrices[job[0]].shape))
        rest = deque(job for job in by_size if job[0] not in alone)
        n_others = min(n_threads, len(rest)) - 1
        if n_others > 0:
            with ThreadPoolExecutor(n_others) as pool:
                others = [pool.submit(work, rest) for _ in range(n_others)]
                work(rest)
                for other in others:
                    other.result()
        else:
            work(rest)
        self._buffers.clear()  # the threads are gone
        return found

    def _start_of(self, of: Of, i: int) -> tuple[torch.Tensor, ...] | None:
        if of == "weights":
            return None
        assert self._start is not None
        device = self.matrices[i].device
        if self._start[i][0].device != device:  # the model has moved
            self._start[i] = tuple(tensor.to(device) for tensor in self._start[i])
        return self._start[i]

    def _update(
        self, tracker: SVDTracker, matrix: WeightMatrix, start: tuple[torch.Tensor, ...] | None
    ) -> TrackerRecord:
        # One that is decomposed anyway is brought to the host.
        if not is_decomposed(matrix.shape, tracker.k) and (matrix.is_product or matrix.device.type != "cpu"):
            return self._by_products(tracker, matrix, start)
        values = host_matrix(matrix.matrix())
        if start is None:
            return tracker.update(values)
        buffer = self._buffers.get(threading.get_ident())
        if buffer is None or buffer.size < values.size or buffer.dtype != values.dtype:
            buffer = self._buffers[threading.get_ident()] = np.empty(values.size, dtype=values.dtype)
        moved = buffer[: values.size].reshape(values.shape)
        # By NumPy: every thread that calls PyTorch would have a team of its own.
        return tracker.update(np.subtract(values, host_matrix(matrix.start_matrix(start)), out=moved))

    @staticmethod
    def _by_products(
        tracker: SVDTracker, matrix: WeightMatrix, start: tuple[torch.Tensor, ...] | None
    ) -> TrackerRecord:
        """Leave the matrix where it is, and let blocks of vectors travel."""
        operator = matrix.operator(start)
        return tracker.update(operator, squared_norm=operator.squared_norm())

    def follows(self, model: nn.Module) -> bool:
        """Return whether steps of this model's optimizer are counted.

        Parameters
        ----------
        model : Module

        Returns
        -------
        bool
        """
        modules = set(model.modules())
        held = any(matrix.module in modules for matrix in self.matrices)
        return self._monitor.is_active and held

    def is_recorded(self, step: int) -> bool:
        """Return whether there is a record of this step, or one is due.

        Parameters
        ----------
        step : int
            Steps of the optimizer so far.

        Returns
        -------
        bool
        """
        index = bisect.bisect_left(self._steps, step)
        is_taken = index < len(self._steps) and self._steps[index] == step
        return is_taken or (self._is_due and step == self.step)

    def log_loss(self, loss: float | torch.Tensor, step: int | None = None) -> None:
        """Keep a training loss beside the singular values, for `Trajectory.loss`.

        Parameters
        ----------
        loss : float or Tensor
            Reading a tensor waits for its device.
        step : int, optional
            The step that it belongs to: by default the number of steps taken, so that a loss computed before
            ``optimizer.step()`` belongs to the weights that gave it. Within a step, as from the closure of
            LBFGS, the first loss belongs to them, and the others are not kept.

        Raises
        ------
        TypeError, ValueError
            For a loss that is no finite number, and a step that was not taken.
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
            Of W(t), or of W(t) - W(0).

        Returns
        -------
        Trajectory
            Its layers are called as in `matrices`: ``run.singular_values("head")``, ``run.angles("head")``,
            and all displays of `dlnfast.plots` take names. Angles are those to the first record that has
            singular vectors of its own: step 0 but for weights that start as a scaled isometry, and for
            changes, where it is a later one, ``config["reference_steps"]``; 0 up to there. Vectors with the
            same index are compared; how good those of a record are, ``tracking(layer)["vector_error"]`` says.

        Raises
        ------
        ValueError
            For the change, if ``change=False`` was asked for.
        """
        self._take_due()
        if of not in self._followed:
            if of == "change":
                raise ValueError("of is 'change', which is not followed: change=False was asked for")
            raise ValueError(f"of is {of!r}; wanted 'weights' or 'change'")
        followed = self._followed[of]
        states = DenseStates(
            values=tuple(f.values() for f in followed),
            left=self._recorded(followed, "left"),
            right=self._recorded(followed, "right"),
            snapshots=(),
            snapshot_steps=np.empty(0, dtype=np.int64),
            initial=None,
            final=None,
            tracking=tuple(f.tracking() for f in followed),
        )
        what = "weights" if of == "weights" else "changes since the start"
        config = {
            "engine": "tracked",
            "of": of,
            "aliases": [list(m.aliases) for m in self.matrices],
            **self._identity(),
            "every": self._every,
            "steps": self.step,
            "optimizers": self._monitor.optimizer_names,
            "reference_steps": [f.reference_step for f in followed],
            **self._settings,
        }
        loss = sorted(self._loss.items())
        return Trajectory(
            steps=np.array(self._steps, dtype=np.int64),
            loss=np.array([value for _, value in loss], dtype=np.float64),
            loss_steps=np.array([step for step, _ in loss], dtype=np.int64),
            states=states,
            certificate=Certificate(
                "tracked", f"{what} of {len(followed)} layers of a model, every {self._every} steps"
            ),
            problem=None,
            config=config,
            wall_time=self.seconds,
        )

    def _recorded(self, followed: list[_Followed], side: str) -> tuple[FloatArray, ...]:
        return tuple(np.array(each.rows[side]) for each in followed) if self._vectors else ()

    # ----------------------------------------------------------------------------------- end, resume

    def close(self) -> None:
        """Take a last record, and follow the optimizers no longer. Closing twice does nothing.

        Raises
        ------
        ValueError
            As for `record`.

        Warns
        -----
        RuntimeWarning
            Where the last step has no record, as the model holds other weights now; where weights were
            trained, but no step of an optimizer was seen.
        """
        if not self._monitor.is_active:
            return
        averaging = self._averaging()
        self._monitor.remove()
        if self._failed:  # the weight that is not finite has been named
            return
        if self._steps == [self.step]:
            self._warn_if_trained()
        is_there = self._steps[-1] == self.step
        if not is_there and averaging is not None:
            said = f"{averaging} is in evaluation mode, and the model holds averages: close before"
        elif not is_there and self._finished is not None and self._finished != self._versions():
            said = "the weights were replaced after it, as by loading a best model"
        else:
            self.record()
            return
        if not is_there:
            self._is_due = False
            warnings.warn(f"step {self.step} has no record: {said}", RuntimeWarning, stacklevel=2)

    def _warn_if_trained(self) -> None:
        tensors = [p for module in self._watched_modules() for p in module.parameters()]
        records = [followed.tracker.record for followed in self._followed["weights"]]
        first = [0.0 if record is None else record.norm for record in records]
        moved = any(abs(now - then) > 1e-3 * then for now, then in zip(self._norms(), first, strict=True))
        if moved or any(p.grad is not None for p in tensors):
            warnings.warn(
                "no step of a torch.optim.Optimizer that holds a followed weight was seen: call advance() "
                "after every step, or track the model that is trained",
                RuntimeWarning,
                stacklevel=3,
            )

    def __enter__(self) -> SpectralTracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        elif not self._monitor.is_stepping:  # the last step was over; its weights may be anything, though
            with contextlib.suppress(ValueError):
                self._take_due()
        self._monitor.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the records, W(0) and the vectors to resume from: tensors and plain values, for torch.save.

        Returns
        -------
        dict
            ``torch.load(..., weights_only=True)`` reads it.
        """
        self._take_due()
        state = {
            "version": _STATE_VERSION,
            **self._identity(),
            "step": self.step,
            "steps": list(self._steps),
            "loss": dict(self._loss),
            "seconds": self.seconds,
            "start": None if self._start is None else [[t.clone() for t in s] for s in self._start],
            "norms": self._norms(),
            "followed": {of: [f.state_dict() for f in each] for of, each in self._followed.items()},
        }
        return with_state_checksum(state)

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same in a tracker that goes on."""
        return {
            "layers": [m.name for m in self.matrices],
            "shapes": [list(m.shape) for m in self.matrices],
            "k": self._k,
            "vectors": self._vectors,
        }

    def _norms(self) -> list[float]:
        return [frobenius_norm(m.matrix()) for m in self.matrices]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another tracker of the same layers was.

        The model must already have the weights that it had then. Branches keep their numbers, by the overlaps
        of the vectors.

        Parameters
        ----------
        state : dict
            What `state_dict` returned.

        Raises
        ------
        TypeError, ValueError
            If it is no such state, the layers, their shapes or k are not the same, the model has other
            weights than it had, or a newer version wrote it.
        """
        check_state(state, "followed", _STATE_VERSION)
        with translate_part_errors("state"):
            self._take_over(state)

    def _take_over(self, state: Mapping[str, Any]) -> None:
        """Check a state, and take it over once all of it can be read."""
        self._candidates, candidates = [], self._candidates
        for matrix in candidates:
            if list(match_names(state["layers"], [matrix.name]).values()) == [matrix.name]:
                self._follow([matrix])
                self.record()
        mine = {**self._identity(), "what is followed": sorted(self._followed)}
        theirs = {**state, "what is followed": sorted(state["followed"])}
        # A wrapper around the model changes no layer.
        same = match_names(theirs["layers"], mine["layers"])
        theirs["layers"] = [same.get(name, name) for name in theirs["layers"]]
        for name, value in mine.items():
            if theirs[name] != value:
                raise ValueError(f"state was taken with {name} {theirs[name]}; this tracker has {value}")
        for matrix, now, then in zip(self.matrices, self._norms(), state["norms"], strict=True):
            if abs(now - then) > 1e-3 * then:  # room for another precision
                raise ValueError(
                    f"layer {matrix.name} has the norm {now:.6g}, but had {then:.6g} when the state was "
                    "taken: load the model's weights first"
                )
        start = self._start
        if start is not None:
            pairs = zip(start, state["start"], strict=True)
            start = [tuple(tensor.to(own[0].device, own[0].dtype) for tensor in kept) for own, kept in pairs]
        step, seconds = int(state["step"]), float(state["seconds"])
        steps = [int(number) for number in state["steps"]]
        loss = {int(number): float(value) for number, value in state["loss"].items()}
        followed = {
            of: [
                _Followed.from_state_dict(state["followed"][of][i], 0 if _is_large(matrix) else 1, len(steps))
                for i, matrix in enumerate(self.matrices)
            ]
            for of in self._followed
        }
        self._start, self.step, self.seconds, self._steps, self._loss = start, step, seconds, steps, loss
        self._is_due, self._finished = False, None
        self._monitor.restart()
        for of, restored in followed.items():
            self._followed[of][:] = restored


@contextlib.contextmanager
def _as_noted(buffers: list[_Buffer]) -> Iterator[None]:
    """Put copies in the places of buffers that were written to since; replaced ones stay as they are."""
    moved = [
        (module, name, buffer, then)
        for module, name, buffer, then in buffers
        if module._buffers.get(name) is buffer and not torch.equal(buffer, then)
    ]
    for module, name, _, then in moved:
        module._buffers[name] = then
    try:
        yield
    finally:
        for module, name, buffer, _ in moved:
            module._buffers[name] = buffer


def _check_followed(matrix: WeightMatrix) -> None:
    """Refuse weights that cannot be read as one matrix of real numbers."""
    reason = None if matrix.is_product else unreadable(matrix.module, matrix.attribute)
    if reason is not None:
        raise TypeError(f"layer {matrix.name} {reason}; wanted real floating-point numbers")
    values = matrix.matrix()
    if hasattr(values, "device_mesh"):  # a DTensor, without importing what few installations have
        raise TypeError(
            f"layer {matrix.name} is a {type(values).__name__}, sharded over processes as FSDP2 does; wanted "
            "a whole weight: follow a model that is not sharded, or give the rows of each process to "
            "dlnfast.torch.RowSharded"
        )
    if values.is_meta:
        raise ValueError(f"layer {matrix.name} is on the meta device, where weights have no values")


def _is_split(found: TrackerRecord) -> bool:
    """Return whether a matrix has singular vectors of its own: it is not zero, and no scaled isometry."""
    values = np.abs(found.singular_values)
    if not found.norm > 0:
        return False
    spread = float(np.ptp(values)) if len(values) > 1 else float(values[0])
    return bool(spread > 64 * np.sqrt(len(values)) * np.finfo(np.float32).eps * float(values[0]))


def _is_large(matrix: WeightMatrix) -> bool:
    rows, columns = matrix.shape
    return rows * columns >= _LARGE


@dataclass
class _Followed:
    """The records of one matrix."""

    tracker: SVDTracker
    rows: dict[str, list[npt.NDArray[Any]]] = field(
        default_factory=lambda: {
            name: []
            for name in (
                "values",
                "errors",
                "signs",
                "branches",
                "clusters",
                "columns",
                "angles",
                "block_angles",
            )
        }
    )
    #: Left and right vectors of the first record that has some, and its step.
    reference: tuple[FloatArray, FloatArray] | None = None
    reference_step: int = -1

    def append(self, found: TrackerRecord, with_vectors: bool) -> None:
        vectors = self.tracker.left_vectors, self.tracker.right_vectors
        k = len(found.singular_values)
        angles, block = np.zeros((2, k)), np.zeros(2)
        if self.reference is not None:
            for side in range(2):
                now, then = (x[side].astype(np.float64) for x in (vectors, self.reference))
                angles[side] = plain.angle(now, then)
                block[side] = plain.principal_angles(now, then)[-1]
        row = {
            "values": np.abs(found.singular_values),
            **tracking_rows(found),
            "angles": angles,
            "block_angles": block,
        }
        if with_vectors:
            row |= dict(zip(_VECTORS, vectors, strict=True))
        for name, array in row.items():
            self.rows.setdefault(name, []).append(array)

    def drop_last(self, step: int) -> None:
        for rows in self.rows.values():
            rows.pop()
        if self.reference_step == step:
            self.reference, self.reference_step = None, -1

    def refer_to(self, found: TrackerRecord, step: int, matrix: FloatArray) -> None:
        """Measure angles to the vectors of this record, computed to rounding over their gaps."""
        self.reference_step = step
        if found.tier == "full":
            self.reference = self.tracker.left_vectors, self.tracker.right_vectors
            return
        factors = leading_factors(DenseMap(matrix), len(found.singular_values))
        self.reference = factors.U, factors.V

    def values(self) -> FloatArray:
        assert self.tracker._dtype is not None
        return np.array(self.rows["values"], dtype=self.tracker._dtype)

    def tracking(self) -> LayerTracking:
        held = {name: np.array(rows) for name, rows in self.rows.items() if name not in ("values", *_VECTORS)}
        return LayerTracking(**held)

    def state_dict(self) -> dict[str, Any]:
        def tensor(value: Any) -> Any:
            return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value

        pair = self.reference
        return {
            "rows": {name: tensor(np.array(rows)) for name, rows in self.rows.items()},
            "reference": None if pair is None else [tensor(x) for x in pair],
            "reference_step": self.reference_step,
            "tracker": {name: tensor(value) for name, value in self.tracker.state_dict().items()},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], n_threads: int, n_records: int) -> _Followed:
        pair = state["reference"]
        for name, rows in state["rows"].items():
            if len(rows) != n_records:
                raise ValueError(f"state has {len(rows)} records of {name}; wanted {n_records}")
        return cls(
            SVDTracker.from_state_dict(state["tracker"], n_threads=n_threads),
            rows={name: list(rows.numpy()) for name, rows in state["rows"].items()},
            reference=None if pair is None else (pair[0].numpy(), pair[1].numpy()),
            reference_step=int(state["reference_step"]),
        )
