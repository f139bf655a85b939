# SPDX-License-Identifier: MIT
"""`train_sharded`: the dense engine's descent on layers of which every process holds some rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from .._arrays import FloatArray
from .._dispatch import core
from .._errors import ShapeError
from ..closure import Certificate
from ..descent import Adaptive, Callback, PerLayer, Request, rates_at, run_job, with_caution
from ..problem import LowRank, Problem
from ..progress import ProgressBar
from ..svd_tracker import SVDTracker, TrackerRecord, is_decomposed
from ..trajectory import DenseStates, LayerTracking, Trajectory, tracking_rows
from ._rule import Rule
from .descent import POLL_SECONDS, Count, exact_products
from .operators import to_host
from .sharded import Peers, RowSharded

if TYPE_CHECKING:
    from .._core import Outcome, Run

logger = logging.getLogger("dlnfast")

#: Numbers of a gradient that are formed at a time, where weight decay has to be added to it.
_SCRATCH = 2**18


def train_sharded(
    problem: Problem,
    weights: Sequence[RowSharded],
    *,
    learning_rate: PerLayer | str,
    steps: int,
    weight_decay: PerLayer = 0.0,
    momentum: PerLayer = 0.0,
    record_every: int = 1,
    singular_values: int | None = None,
    vectors: bool = False,
    tolerance: float | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Trajectory:
    r"""Run full-batch gradient descent on layers that are larger than a machine; all processes call it alike.

    The recursion of `dlnfast.train`, to rounding. Each process holds some rows of every layer, and moves them
    in place; what travels are blocks (d_l, k) with k the width at which the chain is split, mostly the least
    of all.

    Parameters
    ----------
    problem : Problem
        S, Phi and c, the same on all processes. A `LowRank` target is never formed as a whole where the
        layers above the split have rows elsewhere; S is d_x x d_x on every process, where inputs are not
        white.
    weights : sequence of RowSharded
        ``W_1(0), .., W_L(0)``, W_l of shape (d_l, d_{l-1}), all float64 or all float32, of one group, on
        devices of one kind. Their rows *are changed*, and hold W_l at the end of the run.
    learning_rate : float or sequence of float, or "auto"
        As for `dlnfast.train`.
    steps, weight_decay, momentum, record_every, tolerance
        As for `dlnfast.train`.
    singular_values : int, optional
        How many of each layer to follow from record to record, with bounds on their errors.
    vectors : bool
        Keep their vectors too, k (d_l + d_{l-1}) numbers per record, on every process.
    progress : bool
        A bar on the terminal of process 0.
    callback : callable, optional
        ``callback(step, loss)`` at every record, on the processes that were given one; True on any of them
        ends the run on all.

    Returns
    -------
    Trajectory
        On every process the same, to the bit, but for `wall_time`. ``run.engine`` is "sharded". It holds no
        weights: the shards do.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For what does not fit, and for arguments that differ between processes.
    DivergedError
        On all processes: the loss stopped being finite. It holds the trajectory up to there; the shards hold
        what they had come to.
    RuntimeError
        Where another process has raised, here or in its callback. Or where a process is gone or did not
        answer within the timeout of the group: ``init_process_group(timeout=...)``.

    Notes
    -----
    With p the split (`core.best_pivot`, from the widths alone) and k = d_p:

    * below it ``T_l = W_{p:l+1}^T`` of shape (d_l, k), from p down: ``T_{l-1} = W_l^T T_l``, one all-reduce;
      above it ``P_l = W_{l:p+1}``: ``P_l = W_l P_{l-1}``, one all-gather;
    * ``E = P_L T_0^T S - Phi``, of which each process forms the rows that it has of W_L (all of them where
      p = L), and the loss, one all-reduce of one number;
    * above, ``B_L = E T_0`` and ``B_{l-1} = W_l^T B_l``, one all-reduce; below, ``F_0 = E^T P_L`` and
      ``F_l = W_l F_{l-1}``, one all-gather;
    * ``G_l = c B_l P_{l-1}^T`` above and ``c T_l F_{l-1}^T`` below: each process needs its rows of the first
      factor, and all of the second, so that it moves its rows without a message.

    *Messages per step*: for each l = 0 .. L-1 but p one all-reduce or all-gather of (d_l, k) numbers on the
    way to the loss, and one on the way back, so one for each time that a layer is read; one all-reduce of one
    number. That is 2 L - 1 in all, and 2 L where p = L, where T_{L-1} = W_L^T is gathered too and F_0 is
    known. Gathers of uneven shards are padded. Layers whose rate is 0 save those that lead nowhere else.
    *Memory of a process*: its rows, as much again for each layer with momentum, the blocks above, a gradient
    of 2^18 numbers with weight decay, its rows of Phi. A layer beside the split is a block of this kind
    itself, so that networks without a narrow width gain nothing.
    *At records*, per layer: one all-reduce of two numbers, and one message for each product that the tracker
    asks for; how far the layer has moved meanwhile is bounded by the sum of its steps, so no copy is kept. A
    layer with a side of at most 128, or 3 (singular_values + 8), is gathered and decomposed.
    *Flops*: those of the dense engine, divided by the number of processes.

    Yaras et al., arXiv 2306.01154, for what the engines have in common.

    Examples
    --------
    >>> import dlnfast as dln
    >>> problem = dln.classification(n_classes=3, samples_per_class=4, dim=12, seed=0)
    >>> shards = [dln.torch.RowSharded.from_rows(w) for w in dln.orthogonal([12, 12, 3], 0.5, seed=0)]
    >>> run = dln.torch.train_sharded(problem, shards, learning_rate="auto", steps=20, singular_values=2)
    >>> run.engine, run.singular_values(1).shape, bool(run.loss[-1] < run.loss[0])
    ('sharded', (21, 2), True)
    """
    start = time.perf_counter()
    layers = _sharded_layers(weights)
    peers = layers[0].peers
    automatic = isinstance(learning_rate, str) and learning_rate == "auto"
    request: Request | None = None
    error: Exception | None = None
    facts: dict[str, Any] = {}
    try:
        _check_chain(problem, layers)
        if isinstance(singular_values, str):
            raise TypeError(f"singular_values is {singular_values!r}; wanted a number or None")
        if isinstance(learning_rate, (str, Adaptive)) and not automatic:
            raise TypeError(f'learning_rate (eta) is {learning_rate!r}; wanted numbers or "auto"')
        request = Request.checked(
            problem,
            # What the checks ask for is shape and precision: these hold no numbers.
            [np.broadcast_to(np.zeros((), layer.dtype), layer.shape) for layer in layers],
            learning_rate=0.0 if automatic else learning_rate,
            steps=steps,
            weight_decay=weight_decay,
            momentum=momentum,
            record_every=record_every,
            singular_values=singular_values,
            vectors=vectors,
            weights_every=None,
            tolerance=tolerance,
            n_threads=0,
            callback=callback,
        )
        request = replace(request, device=layers[0].rows.device.type)
        facts = _facts(request, automatic)
    except (TypeError, ValueError) as raised:
        error = raised
    peers.agree_on(error, facts)
    assert request is not None
    if automatic:
        request = replace(request, learning_rate=_automatic_rates(request, layers))
    where = f"{peers.size} processes" if peers.size > 1 else "one process"
    certificate = with_caution(Certificate("sharded", f"the rows of every layer on {where}", None), request)
    logger.info("%s", certificate)
    with ProgressBar(request.steps, progress and peers.rank == 0) as bar:
        return run_job(_ShardedJob(request, layers), request, certificate, bar, start)


def _sharded_layers(weights: Sequence[RowSharded]) -> list[RowSharded]:
    layers = list(weights)
    if not layers:
        raise ShapeError("weights is empty; wanted W_1 .. W_L, at least one")
    for i, layer in enumerate(layers):
        if not isinstance(layer, RowSharded):
            raise TypeError(f"weights[{i}] (W_{i + 1}) is {type(layer).__name__}; wanted a RowSharded")
        if not layer.peers.same_as(layers[0].peers):
            raise ValueError(
                f"weights[{i}] (W_{i + 1}) has another group than weights[0]; wanted one for all"
            )
    return layers


def _check_chain(problem: Problem, layers: list[RowSharded]) -> None:
    if not isinstance(problem, Problem):
        raise TypeError(f"problem is {type(problem).__name__}; wanted a dlnfast.Problem")
    columns, whose = problem.dim_in, "problem.dim_in"
    for i, layer in enumerate(layers):
        title = f"weights[{i}] (W_{i + 1})"
        if layer.shape[1] != columns:
            raise ShapeError(f"{title} has shape {layer.shape}; wanted {columns} columns, {whose}")
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
        columns, whose = layer.shape[0], f"the rows of weights[{i}]"
    if columns != problem.dim_out:
        raise ShapeError(
            f"weights[{len(layers) - 1}] (W_{len(layers)}) has {columns} rows; wanted {problem.dim_out}, "
            "problem.dim_out"
        )


def _facts(request: Request, automatic: bool) -> dict[str, Any]:
    """Return what has to be the same on all processes."""
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


def _automatic_rates(request: Request, layers: list[RowSharded]) -> npt.NDArray[np.float64]:
    """Return what ``train(learning_rate="auto")`` takes."""
    assert isinstance(request.problem, Problem)
    scales = [float(np.sqrt(layer.squared_norm() / min(layer.shape))) for layer in layers]
    return rates_at(request.problem, scales, request.weight_decay, request.momentum)


class _ShardedJob:
    """A run on this process's rows, and what its records hold."""

    def __init__(self, request: Request, shards: list[RowSharded]) -> None:
        self.request = request
        self.peers = shards[0].peers
        self.shards = shards
        #: One list of records per tracked layer, one for each event.
        self.found: list[list[TrackerRecord]] = []
        self.left: list[list[FloatArray]] = []
        self.right: list[list[FloatArray]] = []

    def run(self, arguments: Run) -> tuple[Outcome, int, int]:
        """Descend; return the outcome, the last step, and the layer that grew most where it diverged."""
        request = self.request
        # Without knowing: another process may have a callback, which may end the run.
        self.asks = self._largest(0.0 if request.callback is None else 1.0) > 0
        with torch.no_grad(), exact_products(self.shards[0].rows.device):
            descent = _Descent(self.shards, request)
            tracked = [_TrackedLayer(layer, request) for layer in descent.layers if request.n_values != 0]
            for layer in tracked:
                if not layer.whole:
                    layer.layer.measure_path()
            self.found = [layer.found for layer in tracked]
            if request.vectors:
                self.left = [layer.left for layer in tracked]
                self.right = [layer.right for layer in tracked]
            return self._follow(descent, tracked, arguments)

    def _follow(
        self, descent: _Descent, tracked: list[_TrackedLayer], arguments: Run
    ) -> tuple[Outcome, int, int]:
        """Take the steps, in the order of ``cpp/src/descent.cpp``."""
        request, counts, on_progress = self.request, arguments["counts"], arguments["on_progress"]
        looked = time.perf_counter()
        step = 0
        while True:
            now = descent.evaluate()
            if not np.isfinite(now):
                return "diverged", step, descent.largest_layer()
            arguments["loss"][step] = now
            counts[Count.losses] = step + 1
            converged = now <= arguments["tolerance"]
            last = converged or step == request.steps
            stopped = False
            if last or step % request.record_every == 0:
                for layer in tracked:
                    layer.record()
                arguments["record_steps"][counts[Count.records]] = step
                counts[Count.records] += 1
                stopped = self._ask(step, now)
            if last:
                return "converged" if converged else "finished", step, 0
            if stopped:
                return "stopped", step, 0
            if on_progress is not None and time.perf_counter() - looked >= POLL_SECONDS:
                on_progress(step, now)
                looked = time.perf_counter()
            descent.update()
            step += 1

    def _ask(self, step: int, loss: float) -> bool:
        """Return whether a callback of any process ends the run."""
        if not self.asks:
            return False
        answer: object = None
        error: BaseException | None = None
        if self.request.callback is not None:
            try:
                answer = self.request.callback(step, loss)
            except BaseException as raised:  # the others wait for an answer
                error = raised
        ends = isinstance(answer, (bool, np.bool_)) and bool(answer)
        most = self._largest(2.0 if error is not None else float(ends))
        if error is not None:
            raise error
        if most == 2.0:
            raise RuntimeError(f"the callback of another process raised at step {step}")
        return most == 1.0

    def _largest(self, number: float) -> float:
        return float(self.peers.largest_(self.shards[0].rows.new_tensor(number)))

    def states(self, outputs: Any, complete: bool) -> DenseStates:
        """Return what was recorded so far."""
        n, dtype = outputs.n_records, self.request.dtype
        return DenseStates(
            values=tuple(
                np.array([np.abs(found.singular_values) for found in each[:n]], dtype=dtype)
                for each in self.found
            ),
            left=tuple(np.array(each[:n]) for each in self.left),
            right=tuple(np.array(each[:n]) for each in self.right),
            snapshots=(),
            snapshot_steps=np.empty(0, dtype=np.int64),
            initial=None,
            final=None,
            tracking=tuple(_tracking(each[:n]) for each in self.found),
        )


def _tracking(found: list[TrackerRecord]) -> LayerTracking:
    rows = [tracking_rows(each) for each in found]
    return LayerTracking(**{name: np.array([row[name] for row in rows]) for name in rows[0]})


class _Layer:
    """A process's rows of a layer, with its rates, its velocity, and how far they have moved."""

    def __init__(self, shard: RowSharded, loss_scale: float, rates: tuple[float, float, float]) -> None:
        self.shard = shard
        self.weight = shard.rows
        self.rule = Rule(loss_scale, rates, shard.dtype)
        self.velocity = torch.zeros_like(self.weight) if self.rule.inert else None
        #: The norm of these rows at the last record, and the sum of the norms of the steps since then; None
        #: where nobody asks. On the device, so that no step waits for the host.
        self.norm: torch.Tensor | None = None
        self.path: torch.Tensor | None = None

    def measure_path(self) -> None:
        """Begin to sum up the steps, for `drift`."""
        self.norm = self.shard.local_norm()
        self.path = torch.zeros_like(self.norm)

    def step_along(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Step along ``c left right^T``."""
        before = self._gradient_norm(left, right)
        across = right.T
        if self.rule.adds_decay:
            n = max(1, _SCRATCH // self.weight.shape[1])
            for rows, own in zip(torch.split(self.weight, n), torch.split(left, n), strict=True):
                self.rule.along_sum(rows, own, across)
        else:
            self.rule.along_product(self.weight, self.velocity, left, across)
        self._advance(before)

    def step_along_block(self, block: torch.Tensor) -> None:
        """Step along ``c block``, which is as thin as the layer."""
        before = None if self.path is None else torch.linalg.vector_norm(block, dtype=torch.float64)
        self.rule.along(self.weight, self.velocity, block)
        self._advance(before)

    def _gradient_norm(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
        """Return a bound on ``||left right^T||_F`` as it is computed: by k x k Gram matrices, in float64."""
        if self.path is None or self.velocity is not None:
            return None
        a, b = left.double(), right.double()
        above, below = a.T @ a, b.T @ b
        sizes = above.trace() * below.trace()
        rounding = torch.finfo(torch.float64).eps * (len(a) + len(b) + len(above))
        exact = torch.sum(above * below).clamp_min(0.0) + rounding * sizes
        return exact.sqrt() + len(above) * torch.finfo(left.dtype).eps * sizes.sqrt()

    def _advance(self, gradient_norm: torch.Tensor | None) -> None:
        """Add a bound on the norm of the step that was taken."""
        if self.path is None or self.norm is None:
            return
        reach = self.norm + self.path  # no larger was W before the step
        if self.velocity is not None:
            moved = self.rule.rate * torch.linalg.vector_norm(self.velocity, dtype=torch.float64)
        else:
            assert gradient_norm is not None
            rule = self.rule
            moved = rule.rate * (rule.scale * gradient_norm + rule.decay * reach)
        # W is rounded after the step, as is the sum that it moves along.
        rounding = 2 * torch.finfo(self.weight.dtype).eps * (reach + moved)
        self.path = self.path + moved + rounding

    def drift(self) -> tuple[float, float]:
        """Return ``||W||_F^2`` and a bound on how far W has moved since the last call: one all-reduce."""
        assert self.path is not None
        norm = self.shard.local_norm()
        squares = self.shard.peers.sum_(torch.stack([norm, self.path]).square())
        self.norm, self.path = norm, torch.zeros_like(norm)
        squared_norm, moved = squares.tolist()
        return squared_norm, float(np.sqrt(moved)) * (1.0 + 1e-6)  # more than rounding can take from it


class _TrackedLayer:
    """Follows the singular values of one layer from record to record."""

    def __init__(self, layer: _Layer, request: Request) -> None:
        self.layer = layer
        most = min(layer.shard.shape)
        self._vectors = request.vectors
        assert request.n_values is not None
        # One thread: what the tracker does besides the products is the same on all processes, to the bit.
        self.tracker = SVDTracker(min(request.n_values, most), n_threads=1)
        #: Gathered at records, because its tracker decomposes it anyway.
        self.whole = is_decomposed(layer.shard.shape, self.tracker.k)
        self.found: list[TrackerRecord] = []
        self.left: list[FloatArray] = []
        self.right: list[FloatArray] = []

    def record(self) -> None:
        """Find the singular values as they are now."""
        shard = self.layer.shard
        if self.whole:
            found = self.tracker.update(to_host(shard.peers.gather_rows(shard.rows, shard.counts)))
        else:
            squared_norm, moved = self.layer.drift()
            found = self.tracker.update(shard, drift=moved if self.found else None, squared_norm=squared_norm)
        self.found.append(found)
        if self._vectors:
            self.left.append(self.tracker.left_vectors)
            self.right.append(self.tracker.right_vectors)


class _Descent:
    """The chain W_L ... W_1 split at p, the loss at its weights, and the step of all of them.

    Layers count from 1 and blocks from 0, as in the notes of `train_sharded`; a block of None is an identity.
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
        moving = [layer for layer, held in enumerate(self.layers, 1) if held.rule.moves]
        #: The innermost layers that step, below the split and above it; errors go no further.
        self._last_below = max((layer for layer in moving if layer <= self._split), default=0)
        self._last_above = min((layer for layer in moving if layer > self._split), default=self._n + 1)

        top = shards[-1]
        #: Rows of E on this process, and those among them that it counts in the loss.
        rows = slice(0, top.shape[0]) if self._split == self._n else slice(top.start, top.stop)
        self._counted = slice(top.start - rows.start, top.stop - rows.start)
        device = top.rows.device

        def placed(array: FloatArray) -> torch.Tensor:
            return torch.from_numpy(np.array(array, dtype=request.dtype, order="C")).to(device)

        self._target = placed(_rows_of(problem.target, rows))
        #: S, F and rows of G, where S = F F^T is not the identity.
        self._inputs: tuple[torch.Tensor, ...] | None = None
        if problem.input_gram is not None:
            assert problem.input_factor is not None
            assert problem.factor_target is not None
            held = (problem.input_gram, problem.input_factor, problem.factor_target[rows])
            self._inputs = tuple(placed(array) for array in held)

    def evaluate(self) -> float:
        """Return the loss, the same on all processes; `update` goes on from the products."""
        n, split, shards = self._n, self._split, self._shards
        #: T_l: all of T_0, this process's rows of the others.
        self._lower: list[torch.Tensor | None] = [None] * (split + 1)
        for layer in range(split, 0, -1):
            shard, factor = shards[layer - 1], self._lower[layer]
            if factor is None:
                whole = self._peers.gather_rows(shard.rows, shard.counts).T
            else:
                whole = shard.transposed_times(factor)
            self._lower[layer - 1] = whole if layer == 1 else self._own_rows(whole, layer - 1)
        #: P_l, from l = p on: of P_L this process's rows.
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
        """Take one step from the weights of the last `evaluate`."""
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
        for layer in range(self._n, self._last_above - 1, -1):
            held, right, own = self.layers[layer - 1], self._upper[layer - 1 - self._split], error
            if layer > self._last_above:
                error = self._own_rows(held.shard.transposed_times(own), layer - 1)
            if not held.rule.moves:
                continue
            if right is None:
                held.step_along_block(own)
            else:
                held.step_along(own, right)

    def _step_below(self, error: torch.Tensor) -> None:
        for layer in range(1, self._last_below + 1):
            held, left, right = self.layers[layer - 1], self._lower[layer], error
            if layer < self._last_below:
                error = held.shard.times(right)
            if not held.rule.moves:
                continue
            if left is None:
                held.step_along_block(right.T[held.shard.start : held.shard.stop])
            else:
                held.step_along(left, right)

    def _own_rows(self, block: torch.Tensor, layer: int) -> torch.Tensor:
        """Return this process's rows of a block (d_l, k): those of W_l."""
        shard = self._shards[layer - 1]
        return block[shard.start : shard.stop]

    def largest_layer(self) -> int:
        """Return the layer, counted from 1, with the largest entry; the first where several overflowed."""
        sizes = [
            held.weight.abs().max() if len(held.weight) else held.weight.new_zeros(()) for held in self.layers
        ]
        # Comparisons with NaN are false: without this, what they give depends on the order of processes.
        largest = torch.nan_to_num(torch.stack(sizes), nan=float("inf"), posinf=float("inf"))
        return int(self._peers.largest_(largest).argmax()) + 1


def _rows_of(matrix: LowRank | FloatArray, rows: slice) -> FloatArray:
    if isinstance(matrix, LowRank):
        product: FloatArray = (matrix.U[rows] * matrix.s) @ matrix.V.T
        return product
    return matrix[rows]
