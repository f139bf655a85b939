# SPDX-License-Identifier: MIT
"""`train_sharded`: descent of the dense engine on layers with their rows distributed over processes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import numpy as np
import numpy.typing as npt
import torch

from .._closure.certificate import Certificate
from .._problem.low_rank import LowRank
from .._problem.problem import Problem
from .._support.arrays import FloatArray, per_layer
from .._support.checkpoint import Checkpoint, RunFolder, State
from .._support.checksums import compute_identity
from .._support.dispatch import core
from .._support.errors import DivergedError, ShapeError
from .._support.files import Arrays
from .._support.moved import refuse_keywords
from .._support.progress import ProgressBar
from .._tracking.svd_tracker import SVDTracker, TrackerRecord, is_decomposed
from .._training.callbacks import Callback, refuse_state
from .._training.checkpointed import CheckpointedRun, steps_between_flushes
from .._training.jobs import Outputs, ResumableJob, make_trajectory, run_job
from .._training.options import MOVED_OPTIONS, Options, PerLayer, Record
from .._training.rates import divergence_text, rates_at, with_caution
from .._training.request import Request
from .._training.resumable import run_resumable
from .._trajectory.dense import DenseStates
from .._trajectory.layer_spectra import COLUMNS, LayerTracking, split_tracker_record
from .._trajectory.load import join_records, replace_records
from .._trajectory.trajectory import Trajectory
from ._devices import use_exact_products
from ._rule import UpdateRule
from .operators import to_host
from .sharded import Peers, RowSharded

if TYPE_CHECKING:
    from .._core import Outcome, Run

Count = core.Count
logger = logging.getLogger("dlnfast")

#: Number of entries of a gradient that are computed at a time with weight decay.
_SCRATCH = 2**18
_NO_VALUES: Final = Record(singular_values=None)


@refuse_keywords(MOVED_OPTIONS)
def train_sharded(
    problem: Problem,
    weights: Sequence[RowSharded],
    *,
    learning_rate: PerLayer | str,
    steps: int,
    weight_decay: PerLayer = 0.0,
    momentum: PerLayer = 0.0,
    record: Record = _NO_VALUES,
    tolerance: float | None = None,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
) -> Trajectory:
    r"""Run full-batch gradient descent on layers that no single machine has to store.

    The recursion of `dlnfast.train`, up to rounding. All processes make the same call. Each process stores
    some rows of every layer, and updates them in place. Messages between processes are blocks (d_l, k), with
    k the width at which the chain is split, usually the smallest width.

    Parameters
    ----------
    problem : Problem
        Problem with S, Phi and c, the same on all processes. A `LowRank` target is never computed as a whole
        if the layers above the split are distributed. If inputs are not white, every process stores the
        d_x x d_x matrix S.
    weights : sequence of RowSharded
        Initial weights ``W_1(0), .., W_L(0)``, W_l of shape (d_l, d_{l-1}), all float64 or all float32, of
        one group, on devices of one type. Their rows *are changed*: they contain W_l at the end of the run.
    learning_rate : float or sequence of float, or "auto"
        Learning rate as for `dlnfast.train`.
    steps, weight_decay, momentum, tolerance
        Settings of the descent as for `dlnfast.train`.
    record : Record
        Recorded quantities, as for `dlnfast.train`, with a number of singular values or None. Vectors take
        k (d_l + d_{l-1}) numbers per record, on every process. The progress bar is on the terminal of process
        0. The callback is called on the processes that pass one; if it returns True on any process, the run
        stops on all.
    checkpoint : path or Checkpoint, optional
        Folder in which every process has a subfolder, for its rows and the records. The same call with as
        many processes resumes the run bit for bit, from the newest state that all processes have, or loads
        the finished run. All processes write their states at the same steps, and only there: an exception
        loses the steps after the last state.

    Returns
    -------
    Trajectory
        The same trajectory on every process, bit for bit except for `wall_time`. ``run.engine`` is "sharded".
        The final weights are in the shards, not in the trajectory.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For arguments that do not fit together, or that differ between processes.
    DivergedError
        On all processes, if the loss is not finite. The error contains the trajectory up to that step, and
        the shards contain the weights at that step.
    FolderInUseError
        If another run writes to the folder of `checkpoint`.
    RuntimeError
        If another process has raised an error, here or in its callback, or did not answer within the timeout
        of the group: ``init_process_group(timeout=...)``.

    Notes
    -----
    With p the split (`core.best_pivot`, from the widths alone) and k = d_p:

    * below it ``T_l = W_{p:l+1}^T`` of shape (d_l, k), from p down: ``T_{l-1} = W_l^T T_l``, one all-reduce;
      above it ``P_l = W_{l:p+1}``: ``P_l = W_l P_{l-1}``, one all-gather;
    * ``E = P_L T_0^T S - Phi``, of which each process computes the rows that it has of W_L (all of them if
      p = L), and the loss, one all-reduce of one number;
    * above, ``B_L = E T_0`` and ``B_{l-1} = W_l^T B_l``, one all-reduce; below, ``F_0 = E^T P_L`` and
      ``F_l = W_l F_{l-1}``, one all-gather;
    * ``G_l = c B_l P_{l-1}^T`` above and ``c T_l F_{l-1}^T`` below: each process has its rows of the first
      factor and all of the second, and updates its rows without a message.

    *Messages per step*: for each l = 0 .. L-1 except p one all-reduce or all-gather of (d_l, k) numbers in
    the forward pass, and one in the backward pass; one all-reduce of one number. These are 2 L - 1 messages,
    and 2 L if p = L, where T_{L-1} = W_L^T is gathered too and F_0 is known. Gathers of uneven shards are
    padded. Layers with learning rate 0 save the messages that only they need.
    *Memory of a process*: its rows, as much again for each layer with momentum, the blocks above, a gradient
    of 2^18 numbers with weight decay, its rows of Phi. A layer next to the split is such a block itself, so
    networks without a narrow width save no memory.
    *Records*, per layer: one all-reduce of two numbers, and one message for each product of the tracker. The
    change of the layer since the previous record is bounded by the sum of its steps, so no copy is stored. A
    layer with a side of at most 128, or 3 (singular_values + 8), is gathered and decomposed.
    *Flops*: those of the dense engine, divided by the number of processes.

    The recursion is that of Yaras et al., arXiv 2306.01154.

    Examples
    --------
    >>> import dlnfast as dln
    >>> problem = dln.classification(n_classes=3, samples_per_class=4, dim=12, seed=0)
    >>> shards = [dln.torch.RowSharded.from_rows(w) for w in dln.orthogonal([12, 12, 3], 0.5, seed=0)]
    >>> record = dln.Record(singular_values=2)
    >>> run = dln.torch.train_sharded(problem, shards, learning_rate="auto", steps=20, record=record)
    >>> run.engine, run.singular_values(1).shape, bool(run.loss[-1] < run.loss[0])
    ('sharded', (21, 2), True)
    """
    start = time.perf_counter()
    layers = _sharded_layers(weights)
    peers = layers[0].peers
    automatic = isinstance(learning_rate, str) and learning_rate == "auto"
    request: Request | None = None
    error: Exception | None = None
    shared_settings: dict[str, Any] = {}
    try:
        _check_chain(problem, layers)
        options = Options(
            learning_rate=learning_rate,
            steps=steps,
            weight_decay=weight_decay,
            momentum=momentum,
            record=record,
            tolerance=tolerance,
        ).checked(len(layers))
        request = _make_request(options, problem, layers)
        folder = None if checkpoint is None else Checkpoint.of(checkpoint)
        shared_settings = _list_shared_settings(request, automatic)
        shared_settings["checkpoint"] = None if folder is None else (folder.every, folder.seconds)
    except (TypeError, ValueError) as raised:
        error = raised
    peers.check_equal(error, shared_settings)
    assert request is not None
    if automatic:
        request = replace(request, learning_rate=_find_automatic_rates(request, layers))
    where = f"{peers.size} processes" if peers.size > 1 else "one process"
    certificate = with_caution(Certificate("sharded", f"the rows of every layer on {where}", None), request)
    logger.info("%s", certificate)
    with ProgressBar(request.steps, request.options.record.progress and peers.rank == 0) as bar:
        if folder is None:
            return run_job(_ShardedJob(request, layers), request, certificate, bar, start)
        request = replace(request, flush_every=folder.every or steps_between_flushes(request, None))
        work = _ShardedRun(_ShardedJob(request, layers), request, certificate, bar, folder)
        run_resumable(work.folder, work, seconds=folder.seconds)
        return work.load()


def _make_request(options: Options, problem: Problem, layers: list[RowSharded]) -> Request:
    """Return the request of checked options, or raise for options that layers in rows do not have.

    Its rates are zeros where they are automatic: they depend on all processes.
    """
    n_layers = len(layers)
    if isinstance(options.record.singular_values, str):
        raise TypeError("record.singular_values is 'all'; wanted a number or None")
    if options.record.weights_every is not None:
        raise ValueError("record.weights_every is set, but no process has whole weights; wanted None")
    if options.adaptive is not None:
        raise TypeError(f'learning_rate (eta) is {options.learning_rate!r}; wanted numbers or "auto"')
    options.refuse_schedules("train_sharded")
    automatic = isinstance(options.learning_rate, str)
    return Request(
        problem=problem,
        weights=[],
        options=options,
        widths=[layers[0].shape[1], *(layer.shape[0] for layer in layers)],
        dtype=np.dtype(layers[0].dtype),
        learning_rate=per_layer(0.0 if automatic else options.learning_rate, "learning_rate (eta)", n_layers),
        adaptive=None,
        weight_decay=per_layer(options.weight_decay, "weight_decay (lambda)", n_layers),
        momentum=per_layer(options.momentum, "momentum (mu)", n_layers, below=1.0),
        callback=refuse_state(options.record.callback, "train_sharded"),
        device=layers[0].rows.device.type,
    )


def _sharded_layers(weights: Sequence[RowSharded]) -> list[RowSharded]:
    layers = list(weights)
    if not layers:
        raise ShapeError("weights is empty; wanted W_1 .. W_L, at least one")
    for i, layer in enumerate(layers):
        if not isinstance(layer, RowSharded):
            raise TypeError(f"weights[{i}] (W_{i + 1}) is {type(layer).__name__}; wanted a RowSharded")
        if not layer.peers.is_same_as(layers[0].peers):
            raise ValueError(
                f"weights[{i}] (W_{i + 1}) has another group than weights[0]; wanted one for all"
            )
    return layers


def _check_chain(problem: Problem, layers: list[RowSharded]) -> None:
    if not isinstance(problem, Problem):
        raise TypeError(f"problem is {type(problem).__name__}; wanted a dlnfast.Problem")
    columns, origin = problem.dim_in, "problem.dim_in"
    for i, layer in enumerate(layers):
        title = f"weights[{i}] (W_{i + 1})"
        if layer.shape[1] != columns:
            raise ShapeError(f"{title} has shape {layer.shape}; wanted {columns} columns, {origin}")
        if layer.rows.dtype != layers[0].rows.dtype:
            raise TypeError(
                f"{title} is {layer.rows.dtype} but weights[0] is {layers[0].rows.dtype}; wanted one "
                "precision for all"
            )
        if layer.rows.device != layers[0].rows.device:
            raise ValueError(
                f"{title} is on {layer.rows.device} but weights[0] on {layers[0].rows.device}; wanted one "
                "device for all"
            )
        if not torch.isfinite(layer.local_norm()) and not bool(torch.isfinite(layer.rows).all()):
            raise ValueError(f"{title} has a value that is not finite in rows {layer.start} to {layer.stop}")
        columns, origin = layer.shape[0], f"the rows of weights[{i}]"
    if columns != problem.dim_out:
        raise ShapeError(
            f"weights[{len(layers) - 1}] (W_{len(layers)}) has {columns} rows; wanted {problem.dim_out}, "
            "problem.dim_out"
        )


def _list_shared_settings(request: Request, automatic: bool) -> dict[str, Any]:
    """Return the settings that must be equal on all processes."""
    described = request.describe("sharded", "")
    source = described.pop("problem")
    return {
        **described,
        "learning_rate": "auto" if automatic else described["learning_rate"],
        "singular_values": request.n_values,
        "vectors": request.vectors,
        "loss_scale": source["loss_scale"],
        "input_gram": source["input_gram"],
    }


def _find_automatic_rates(request: Request, layers: list[RowSharded]) -> npt.NDArray[np.float64]:
    """Return the learning rates of ``train(learning_rate="auto")``."""
    assert isinstance(request.problem, Problem)
    scales = [float(np.sqrt(layer.squared_norm() / min(layer.shape))) for layer in layers]
    return rates_at(request.problem, scales, request.weight_decay, request.momentum)


class _ShardedJob(ResumableJob):
    """A run on the rows of this process, and its records."""

    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, request: Request, shards: list[RowSharded]) -> None:
        self.request = request
        self.peers = shards[0].peers
        self.shards = shards
        n_values = 0 if request.n_values is None else request.n_values
        #: Number of singular values of each tracked layer.
        self.ranks = [min(n_values, *shard.shape) for shard in shards] if n_values else []
        #: One list of tracker records per tracked layer.
        self.found: list[list[TrackerRecord]] = [[] for _ in self.ranks]
        tracked = self.ranks if request.vectors else []
        self.left: list[list[FloatArray]] = [[] for _ in tracked]
        self.right: list[list[FloatArray]] = [[] for _ in tracked]
        self._descent: _Descent | None = None
        #: Velocities to resume from.
        self._velocities: dict[str, FloatArray] = {}

    def run(self, arguments: Run) -> tuple[Outcome, int, int]:
        """Run the descent; return the outcome, the last step, and after a divergence the largest layer."""
        request = self.request
        #: Whether any process has a callback, which may stop the run on all.
        self.has_callback = self._find_largest(0.0 if request.callback is None else 1.0) > 0
        with torch.no_grad(), use_exact_products(self.shards[0].rows.device):
            descent = _Descent(self.shards, request)
            self._descent = descent
            for name, velocity in self._velocities.items():
                held = descent.layers[int(name.rpartition("_")[2])].velocity
                assert held is not None
                held.copy_(torch.from_numpy(velocity))
            tracked = [_TrackedLayer(descent.layers[i], request, self, i) for i in range(len(self.ranks))]
            for layer in tracked:
                if not layer.is_whole:
                    layer.layer.measure_path()
            return self._follow(descent, tracked, arguments)

    def state_arrays(self) -> dict[str, FloatArray]:
        """Return this process's rows and velocities, the state of the run."""
        arrays = {f"weight_{i}": to_host(shard.rows) for i, shard in enumerate(self.shards)}
        if self._descent is not None:
            for i, layer in enumerate(self._descent.layers):
                if layer.velocity is not None:
                    arrays[f"velocity_{i}"] = to_host(layer.velocity)
        return arrays

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue from saved `state_arrays`."""
        with torch.no_grad():
            for i, shard in enumerate(self.shards):
                shard.rows.copy_(torch.from_numpy(arrays[f"weight_{i}"]))
        self._velocities = {name: array for name, array in arrays.items() if name.startswith("velocity_")}

    def clear_records(self) -> None:
        """Forget the records, which are written."""
        for found in self.found:
            found.clear()
        for vectors in (*self.left, *self.right):
            vectors.clear()

    def _follow(
        self, descent: _Descent, tracked: list[_TrackedLayer], arguments: Run
    ) -> tuple[Outcome, int, int]:
        """Take the steps, in the order of ``cpp/src/descent.cpp``."""
        request, counts, on_progress = self.request, arguments["counts"], arguments["on_progress"]
        first, flush_every, on_flush = arguments["first"], arguments["flush_every"], arguments["on_flush"]
        last_poll = time.perf_counter()
        step = first
        while True:
            now = descent.evaluate()
            if not np.isfinite(now):
                return "diverged", step, descent.largest_layer()
            arguments["loss"][counts[Count.losses]] = now
            counts[Count.losses] += 1
            counts[Count.between_steps] = 1
            converged = now <= arguments["tolerance"]
            last = converged or step == request.steps
            stopped = False
            if last or step % request.record_every == 0 or step == first:
                for layer in tracked:
                    layer.record()
                arguments["record_steps"][counts[Count.records]] = step
                counts[Count.records] += 1
                stopped = self._ask_callbacks(step, now, cast("Callback | None", arguments["on_record"]))
            if last:
                return "converged" if converged else "finished", step, 0
            if stopped:
                return "stopped", step, 0
            if on_flush is not None and flush_every and step % flush_every == 0 and step != first:
                on_flush(step)
                self.clear_records()
            if on_progress is not None and time.perf_counter() - last_poll >= core.POLL_SECONDS:
                on_progress(step, now)
                last_poll = time.perf_counter()
            counts[Count.between_steps] = 0
            descent.update()
            step += 1

    def _ask_callbacks(self, step: int, loss: float, callback: Callback | None) -> bool:
        """Return whether a callback of any process stops the run."""
        if not self.has_callback:
            return False
        answer: object = None
        error: BaseException | None = None
        if callback is not None:
            try:
                answer = callback(step, loss)
            except BaseException as raised:  # the other processes wait for an answer
                error = raised
        stops = isinstance(answer, (bool, np.bool_)) and bool(answer)
        most = self._find_largest(2.0 if error is not None else float(stops))
        if error is not None:
            raise error
        if most == 2.0:
            raise RuntimeError(f"the callback of another process raised at step {step}")
        return most == 1.0

    def _find_largest(self, number: float) -> float:
        return float(self.peers.largest_(self.shards[0].rows.new_tensor(number)))

    def states(self, outputs: Any, complete: bool) -> DenseStates:
        """Return the recorded states so far."""
        n, dtype = outputs.n_records, self.request.dtype

        def stack(blocks: list[list[FloatArray]], side: int) -> tuple[FloatArray, ...]:
            shapes = [(n, s.shape[side], k) for s, k in zip(self.shards, self.ranks, strict=False)]
            return tuple(
                np.array(each[:n], dtype=dtype).reshape(shape)
                for each, shape in zip(blocks, shapes, strict=False)
            )

        return DenseStates(
            values=tuple(
                np.array([np.abs(found.singular_values) for found in each[:n]], dtype=dtype).reshape(n, k)
                for each, k in zip(self.found, self.ranks, strict=True)
            ),
            left=stack(self.left, 0),
            right=stack(self.right, 1),
            snapshots=(),
            snapshot_steps=np.empty(0, dtype=np.int64),
            initial=None,
            final=None,
            tracking=tuple(
                _make_layer_tracking(each[:n], k, dtype)
                for each, k in zip(self.found, self.ranks, strict=True)
            ),
        )


def _make_layer_tracking(found: list[TrackerRecord], k: int, dtype: npt.DTypeLike) -> LayerTracking:
    if not found:
        numbers, ids = np.empty((0, k)), np.empty((0, k), dtype=np.int64)
        return LayerTracking(numbers, numbers, ids, ids, np.empty((0, len(COLUMNS))))
    rows = [split_tracker_record(each, dtype) for each in found]
    return LayerTracking(**{name: np.array([row[name] for row in rows]) for name in rows[0]})


class _ShardedRun(CheckpointedRun):
    """A checkpointed run of one process among others, which write their states at the same steps."""

    how_to_resume = "the same call on all processes"
    #: Whether all processes are at the same step, between two updates.
    _is_together = False
    job: _ShardedJob

    def make_folder(self, checkpoint: Checkpoint, settings: dict[str, Any], inputs: Arrays) -> RunFolder:
        """Return this process's folder; the initial rows are part of the identity."""
        peers = self.job.peers
        settings |= {"process": peers.rank, "processes": peers.size}
        directory = Path(checkpoint.directory) / f"process-{peers.rank:05d}"
        identity = compute_identity(settings, inputs | self.job.state_arrays())
        return RunFolder(directory, identity, "dlnfast sharded run")

    def find_largest(self, number: float) -> float:
        """Return the largest of all processes' numbers."""
        device = self.job.shards[0].rows.device
        return float(self.job.peers.largest_(torch.tensor(number, dtype=torch.float64, device=device)))

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Raise on all processes at the end of the block if one of them has raised inside."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        self.job.peers.exchange(error, {})

    def restore(self, storage: RunFolder) -> State | None:
        """Continue from the newest state that all processes have."""
        at_most: int | None = None
        while True:
            with self.raise_together():
                state = storage.newest(at_most)
            step = -1 if state is None else state.step
            at_most = -int(self.find_largest(-step))
            if self.find_largest(step) == at_most:
                break
        if state is not None:
            self.restore_state(state)
        return state

    def advance(self, flush: Callable[[], None]) -> Mapping[str, Any]:
        """Run, with states at flushes and at the end only: all processes are at the same step there."""

        def flush_together() -> None:
            self._is_together = True
            try:
                flush()
            finally:
                self._is_together = False

        outcome = super().advance(flush_together)
        self._is_together = True
        return outcome

    def state(self) -> State | None:
        """Return rows and velocities; None if other processes may be at another step."""
        return super().state() if self._is_together else None

    def partial_result(self) -> Trajectory:
        """Return the records in the folder."""
        return self._load("unfinished", 0.0)

    def load(self) -> Trajectory:
        """Load the finished run, and put the final rows into the shards."""
        with self.raise_together():
            end, state = self.folder.ending(), self.folder.newest()
            assert end is not None
            run = self._load(end["outcome"], end["seconds"])
            if state is not None and state.step == end["step"]:
                self.job.restore(state.arrays)
        if end["outcome"] == "diverged":
            step, layer = end["step"], end["layer"]
            text = divergence_text(self.job.request, step, layer)
            raise DivergedError(text, step=step, layer=layer, trajectory=run if len(run.loss) else None)
        return run

    def _load(self, outcome: str, seconds: float) -> Trajectory:
        empty = Outputs(self.job.request)
        header = make_trajectory(self.job, self.job.request, self.certificate, empty, outcome, seconds)
        parts = list(self.folder.records())
        return replace_records(header, join_records(parts)) if parts else header


class _Layer:
    """The rows of a layer on this process, with their update rule, velocity and path length."""

    def __init__(self, shard: RowSharded, loss_scale: float, rates: tuple[float, float, float]) -> None:
        self.shard = shard
        self.weight = shard.rows
        self.rule = UpdateRule(loss_scale, rates, shard.dtype)
        self.velocity = torch.zeros_like(self.weight) if self.rule.has_momentum else None
        #: Norm of these rows at the last record, and sum of the norms of the steps since then; None unless
        #: `measure_path` was called. They stay on the device, so that no step waits for the host.
        self.norm: torch.Tensor | None = None
        self.path: torch.Tensor | None = None

    def measure_path(self) -> None:
        """Start to sum the norms of the steps, for `measure_movement`."""
        self.norm = self.shard.local_norm()
        self.path = torch.zeros_like(self.norm)

    def step_along(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Step along ``c left right^T``."""
        before = self._gradient_norm(left, right)
        across = right.T
        if self.rule.has_decay_term:
            n = max(1, _SCRATCH // self.weight.shape[1])
            for rows, own in zip(torch.split(self.weight, n), torch.split(left, n), strict=True):
                self.rule.step_along_sum(rows, own, across)
        else:
            self.rule.step_along_product(self.weight, self.velocity, left, across)
        self._advance(before)

    def step_along_block(self, block: torch.Tensor) -> None:
        """Step along ``c block``, which is as thin as the layer."""
        before = None if self.path is None else torch.linalg.vector_norm(block, dtype=torch.float64)
        self.rule.step_along(self.weight, self.velocity, block)
        self._advance(before)

    def _gradient_norm(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
        """Return a bound on ``||left right^T||_F`` with rounding, from k x k Gram matrices in float64."""
        if self.path is None or self.velocity is not None:
            return None
        a, b = left.double(), right.double()
        above, below = a.T @ a, b.T @ b
        sizes = above.trace() * below.trace()
        rounding = torch.finfo(torch.float64).eps * (len(a) + len(b) + len(above))
        exact = torch.sum(above * below).clamp_min(0.0) + rounding * sizes
        return exact.sqrt() + len(above) * torch.finfo(left.dtype).eps * sizes.sqrt()

    def _advance(self, gradient_norm: torch.Tensor | None) -> None:
        """Add a bound on the norm of the latest step to the path length."""
        if self.path is None or self.norm is None:
            return
        reach = self.norm + self.path  # a bound on ||W|| before the step
        if self.velocity is not None:
            moved = self.rule.rate * torch.linalg.vector_norm(self.velocity, dtype=torch.float64)
        else:
            assert gradient_norm is not None
            rule = self.rule
            moved = rule.rate * (rule.scale * gradient_norm + rule.decay * reach)
        # Both the step and the new W are rounded.
        rounding = 2 * torch.finfo(self.weight.dtype).eps * (reach + moved)
        self.path = self.path + moved + rounding

    def measure_movement(self) -> tuple[float, float]:
        """Return ``||W||_F^2`` and a bound on the change of W since the last call; one all-reduce."""
        assert self.path is not None
        norm = self.shard.local_norm()
        squares = self.shard.peers.sum_(torch.stack([norm, self.path]).square())
        self.norm, self.path = norm, torch.zeros_like(norm)
        squared_norm, moved = squares.tolist()
        return squared_norm, float(np.sqrt(moved)) * (1.0 + 1e-6)  # exceeds the rounding error


class _TrackedLayer:
    """Tracker of one layer's singular values, and its records."""

    def __init__(self, layer: _Layer, request: Request, job: _ShardedJob, index: int) -> None:
        self.layer = layer
        self._vectors = request.vectors
        # With one thread the tracker's own computations are equal on all processes, bit for bit.
        self.tracker = SVDTracker(job.ranks[index], n_threads=1)
        #: Whether the layer is gathered at records, because its tracker decomposes the whole matrix.
        self.is_whole = is_decomposed(layer.shard.shape, self.tracker.k)
        self._has_records = False
        self.found = job.found[index]
        if self._vectors:
            self.left, self.right = job.left[index], job.right[index]

    def record(self) -> None:
        """Update the tracker with the current weight, and record its results."""
        shard = self.layer.shard
        if self.is_whole:
            found = self.tracker.update(to_host(shard.peers.gather_rows(shard.rows, shard.counts)))
        else:
            squared_norm, moved = self.layer.measure_movement()
            drift = moved if self._has_records else None
            found = self.tracker.update(shard, drift=drift, squared_norm=squared_norm)
        self._has_records = True
        self.found.append(found)
        if self._vectors:
            self.left.append(self.tracker.left_vectors)
            self.right.append(self.tracker.right_vectors)


class _Descent:
    """The chain W_L ... W_1 split at p, its loss, and its gradient steps.

    Layers are counted from 1 and blocks from 0, as in the notes of `train_sharded`. A block of None is an
    identity.
    """

    def __init__(self, shards: list[RowSharded], request: Request) -> None:
        problem = request.problem
        assert isinstance(problem, Problem)
        rates = zip(
            request.learning_rate.tolist(),
            request.weight_decay.tolist(),
            request.momentum.tolist(),
            strict=True,
        )
        self.layers = [
            _Layer(shard, problem.loss_scale, rate) for shard, rate in zip(shards, rates, strict=True)
        ]
        self._shards = shards
        self._peers: Peers = shards[0].peers
        self._half_scale, self._floor = 0.5 * problem.loss_scale, problem.loss_floor
        self._n = len(shards)
        self._split = int(core.best_pivot(request.widths))
        trained = [number for number, layer in enumerate(self.layers, 1) if layer.rule.is_trained]
        #: The innermost trained layers below and above the split, at which the backward pass ends.
        self._last_below = max((layer for layer in trained if layer <= self._split), default=0)
        self._last_above = min((layer for layer in trained if layer > self._split), default=self._n + 1)

        top = shards[-1]
        #: Rows of E on this process, and those among them that count in its part of the loss.
        rows = slice(0, top.shape[0]) if self._split == self._n else slice(top.start, top.stop)
        self._counted = slice(top.start - rows.start, top.stop - rows.start)
        device = top.rows.device

        def copy_to_device(array: FloatArray) -> torch.Tensor:
            return torch.from_numpy(np.array(array, dtype=request.dtype, order="C")).to(device)

        self._target = copy_to_device(_take_rows(problem.target, rows))
        #: S, F and rows of G; None if S = F F^T is the identity.
        self._inputs: tuple[torch.Tensor, ...] | None = None
        if problem.input_gram is not None:
            assert problem.input_factor is not None
            assert problem.factor_target is not None
            arrays = (problem.input_gram, problem.input_factor, problem.factor_target[rows])
            self._inputs = tuple(copy_to_device(array) for array in arrays)

    def evaluate(self) -> float:
        """Return the loss, the same on all processes, and store the products for `update`."""
        n, split, shards = self._n, self._split, self._shards
        #: T_l for l = 0 .. p: all of T_0, the rows of this process of the others.
        self._lower: list[torch.Tensor | None] = [None] * (split + 1)
        for layer in range(split, 0, -1):
            shard, factor = shards[layer - 1], self._lower[layer]
            if factor is None:
                whole = self._peers.gather_rows(shard.rows, shard.counts).T
            else:
                whole = shard.transposed_times(factor)
            self._lower[layer - 1] = whole if layer == 1 else self._take_own_rows(whole, layer - 1)
        #: P_l for l = p .. L: all rows, except that of P_L only those of this process.
        self._upper: list[torch.Tensor | None] = [None] * (n - split + 1)
        for layer in range(split + 1, n + 1):
            shard, factor = shards[layer - 1], self._upper[layer - 1 - split]
            local = shard.rows if factor is None else shard.rows @ factor
            whole = local if layer == n else self._peers.gather_rows(local, shard.counts)
            self._upper[layer - split] = whole

        inner, outer = self._lower[0], self._upper[-1]
        if inner is None:
            assert outer is not None
            product = outer
        else:
            product = inner.T if outer is None else outer @ inner.T
        if self._inputs is None:
            residual = self._error = product - self._target
        else:
            gram, factor, factor_target = self._inputs
            self._error = product @ gram - self._target
            residual = product @ factor - factor_target
        own = residual[self._counted].reshape(-1)
        square = torch.dot(own, own).double()
        with np.errstate(over="ignore", invalid="ignore"):
            return float(self._half_scale * np.float64(self._peers.sum_(square)) + self._floor)

    def update(self) -> None:
        """Take one step from the weights of the latest `evaluate`."""
        below = self._error_below() if self._last_below > 0 else None
        if self._last_above <= self._n:
            self._step_above()
        if below is not None:
            self._step_below(below)

    def _error_below(self) -> torch.Tensor:
        """Return F_0."""
        outer = self._upper[-1]
        return self._error.T if outer is None else self._peers.sum_(self._error.T @ outer)

    def _step_above(self) -> None:
        inner = self._lower[0]
        error = self._error if inner is None else self._error @ inner
        for number in range(self._n, self._last_above - 1, -1):
            layer, right, left = self.layers[number - 1], self._upper[number - 1 - self._split], error
            if number > self._last_above:
                error = self._take_own_rows(layer.shard.transposed_times(left), number - 1)
            if not layer.rule.is_trained:
                continue
            if right is None:
                layer.step_along_block(left)
            else:
                layer.step_along(left, right)

    def _step_below(self, error: torch.Tensor) -> None:
        for number in range(1, self._last_below + 1):
            layer, left, right = self.layers[number - 1], self._lower[number], error
            if number < self._last_below:
                error = layer.shard.times(right)
            if not layer.rule.is_trained:
                continue
            if left is None:
                layer.step_along_block(right.T[layer.shard.start : layer.shard.stop])
            else:
                layer.step_along(left, right)

    def _take_own_rows(self, block: torch.Tensor, layer: int) -> torch.Tensor:
        """Return the rows of a block (d_l, k) for which this process has the rows of W_l."""
        shard = self._shards[layer - 1]
        return block[shard.start : shard.stop]

    def largest_layer(self) -> int:
        """Return the layer, counted from 1, with the largest entry; the first one if several overflowed."""
        sizes = [
            layer.weight.abs().max() if len(layer.weight) else layer.weight.new_zeros(())
            for layer in self.layers
        ]
        # Comparisons with NaN are false, so with NaN the maximum would depend on the order of the processes.
        largest = torch.nan_to_num(torch.stack(sizes), nan=float("inf"), posinf=float("inf"))
        return int(self._peers.largest_(largest).argmax()) + 1


def _take_rows(matrix: LowRank | FloatArray, rows: slice) -> FloatArray:
    if isinstance(matrix, LowRank):
        product: FloatArray = (matrix.U[rows] * matrix.s) @ matrix.V.T
        return product
    return matrix[rows]
