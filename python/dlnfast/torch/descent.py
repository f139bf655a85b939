# SPDX-License-Identifier: MIT
"""The dense engine's descent on a PyTorch device: what ``train(..., engine="torch")`` runs.

The chain W_L ... W_1 is split where ``cpp/include/dlnfast/dense_descent.hpp`` splits it, so that every
product has d_p rows or columns with p the split; a step is the same sum of the same products.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from .._arrays import widths_of
from .._dispatch import core, is_forked
from ..descent import DenseJob, Request
from ..svd_tracker import DEFAULTS, SVDTracker
from ..trajectory import LayerTracking, tracking_rows
from ._rule import Rule
from .operators import DeviceMatrix, frobenius_norm

if TYPE_CHECKING:
    from .._core import Outcome, Run

#: So many steps may be queued on an accelerator before the host waits for their losses.
_STEPS_AHEAD = 64
Count = core.Count
POLL_SECONDS = core.POLL_SECONDS
_DTYPES = {"float64": torch.float64, "float32": torch.float32}


def find_device(device: object, dtype: npt.DTypeLike) -> torch.device:
    """Return the device that is meant, with its number.

    Parameters
    ----------
    device : str, torch.device or None
        None: PyTorch's default device.
    dtype : dtype
        What it has to compute in.

    Raises
    ------
    TypeError
        For what is neither a device nor the name of one.
    ValueError
        For a device that is not there, holds no numbers, or does not know the precision.
    """
    if device is not None and not isinstance(device, (str, torch.device)):
        raise TypeError(f'device is {device!r}; wanted a torch.device or its name, such as "cpu" or "cuda"')
    precision = np.dtype(dtype).name
    try:
        probe = torch.zeros(1, dtype=_DTYPES[precision], device=device)
        probe.item()
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device is {device!r}, on which PyTorch cannot hold {precision} numbers here ({reason}); wanted "
            'one such as "cpu" or "cuda"'
        ) from error
    return probe.device


class TorchJob(DenseJob):
    """A run of whole layers on a device, with the records of the dense engine."""

    def __init__(self, request: Request, device: torch.device) -> None:
        super().__init__(request)
        self.device = device
        waits = device.type == "cpu" or request.tolerance is not None
        self.steps_ahead = 1 if waits else _STEPS_AHEAD

    def run(self, arguments: Run) -> tuple[Outcome, int, int]:
        """Descend; return the outcome, the last step, and the layer that grew most where it diverged."""
        objective = self.request.problem.engine_arguments(self.request.dtype)
        whole: dict[str, Any] = {**arguments, **objective}
        with torch.no_grad(), exact_products(self.device), _team(self.request.n_threads):
            descent = _Descent(self.weights, whole, self.device)
            for layer, velocity in zip(descent.layers, self.motion.velocity, strict=False):
                layer.go_on_with(velocity)
            try:
                return self._follow(descent, whole)
            finally:
                self._store(descent)

    def _store(self, descent: _Descent) -> None:
        """Bring weights and velocities to the host."""
        for layer in descent.layers:
            layer.bring_home()

    def _follow(self, descent: _Descent, arguments: dict[str, Any]) -> tuple[Outcome, int, int]:
        """Take the steps, in the order of ``cpp/src/descent.cpp``."""
        steps, every, kept_every = self.request.steps, self.request.record_every, self.request.weights_every
        loss, counts = arguments["loss"], arguments["counts"]
        on_record, on_progress = arguments["on_record"], arguments["on_progress"]
        first, drain_every, on_drain = (arguments[name] for name in ("first", "flush_every", "on_flush"))
        tracked = [self._tracked(i, descent.layers[i]) for i in range(len(self.values))]
        losses = _Losses(self.steps_ahead, arguments, descent)
        looked = time.perf_counter()
        descent.evaluate(losses.squares[0])
        step, n_new = first, 1  # losses that are not read yet, the last of them at `step`
        while True:
            begin = step + 1 - n_new
            new = losses.read(n_new)
            n_finite = n_new if np.isfinite(new).all() else int(np.argmin(np.isfinite(new)))
            loss[counts[Count.losses] : counts[Count.losses] + n_finite] = new[:n_finite]
            counts[Count.losses] += n_finite
            if n_finite < n_new:
                if n_finite < n_new - 1:
                    descent.return_to(n_finite + 1)
                return "diverged", begin + n_finite, descent.largest_layer()

            counts[Count.between_steps] = 1
            now = float(new[-1])
            converged = now <= arguments["tolerance"]
            last = converged or step == steps
            at_record = last or step % every == 0 or step == first
            if at_record:
                for layer in tracked:
                    layer.record(int(counts[Count.records]))
                arguments["record_steps"][counts[Count.records]] = step
                counts[Count.records] += 1
            if kept_every is not None and step % kept_every == 0:
                for layer_snapshots, held in zip(self.snapshots, descent.layers, strict=True):
                    torch.from_numpy(layer_snapshots[counts[Count.snapshots]]).copy_(held.weight)
                counts[Count.snapshots] += 1
            answer = on_record(step, now) if at_record and on_record is not None else None
            if last:
                return "converged" if converged else "finished", step, 0
            if isinstance(answer, (bool, np.bool_)) and answer:
                return "stopped", step, 0
            if drain_every and step % drain_every == 0 and step != first:
                self._store(descent)
                on_drain(step)
            if on_progress is not None and time.perf_counter() - looked >= POLL_SECONDS:
                on_progress(step, now)
                looked = time.perf_counter()

            until = min(steps, step + self.steps_ahead, _next_multiple(step, every))
            if kept_every is not None:
                until = min(until, _next_multiple(step, kept_every))
            if drain_every:
                until = min(until, _next_multiple(step, drain_every))
            n_new = until - step
            counts[Count.between_steps] = 0
            if n_new > 1:
                descent.remember()
            for i in range(n_new):
                descent.update()
                descent.evaluate(losses.squares[i])
            step = until

    def _tracked(self, i: int, layer: _Layer) -> _TrackedLayer:
        arrays = LayerTracking(
            self.errors[i], self.signs[i], self.branches[i], self.clusters[i], self.tracking[i]
        )
        vectors = (self.left[i], self.right[i]) if self.left else None
        return _TrackedLayer(layer, self.request, self.values[i], arrays, vectors)


def _next_multiple(step: int, every: int) -> int:
    return step - step % every + every


class _Losses:
    """What the steps leave of their losses on the device, and its way to the host."""

    def __init__(self, n: int, arguments: dict[str, Any], descent: _Descent) -> None:
        self._squares = descent.layers[0].weight.new_empty(n)
        #: Where step after step puts ``||W_{L:1} F - G||^2``.
        self.squares = self._squares.unbind()
        self._half_scale = 0.5 * arguments["loss_scale"]
        self._floor = arguments["loss_floor"]

    @np.errstate(over="ignore", invalid="ignore")
    def read(self, n: int) -> npt.NDArray[np.float64]:
        """Return the first n losses; waits for the device."""
        squares = self._squares[:n].cpu().numpy().astype(np.float64)
        losses: npt.NDArray[np.float64] = self._half_scale * squares + self._floor
        return losses


class _Layer:
    """One weight matrix on the device, with its rates and, where it has momentum, its velocity."""

    def __init__(
        self,
        host: npt.NDArray[Any],
        device: torch.device,
        loss_scale: float,
        rates: tuple[float, float, float],
    ) -> None:
        self.host = torch.from_numpy(host)
        #: The same memory where the device is the host.
        self.weight = _placed(self.host, device)
        self.rule = Rule(loss_scale, rates, host.dtype)
        self.velocity = torch.zeros_like(self.weight) if self.rule.inert else None
        self.host_velocity: torch.Tensor | None = None

    def go_on_with(self, velocity: npt.NDArray[Any]) -> None:
        """Start from a velocity, which `bring_home` then writes."""
        self.host_velocity = torch.from_numpy(velocity)
        if self.velocity is not None:
            self.velocity.copy_(self.host_velocity)

    def bring_home(self) -> None:
        """Bring the weights, and a velocity that was given, to the host."""
        if self.host is not self.weight:
            self.host.copy_(self.weight)
        if self.velocity is not None and self.host_velocity is not None:
            self.host_velocity.copy_(self.velocity)


class _Descending:
    """A layer seen from the split: A = W below it, W^T above."""

    def __init__(self, layer: _Layer, transposed: bool) -> None:
        self.layer = layer
        self.matrix = layer.weight.T if transposed else layer.weight
        velocity = layer.velocity
        self.velocity = velocity.T if velocity is not None and transposed else velocity
        self.inner, self.outer = self.matrix.shape
        self.gradient: torch.Tensor | None = None

    def use(self, scratch: torch.Tensor) -> None:
        """Let the gradient stand there for as long as it is needed."""
        self.gradient = scratch[: self.inner * self.outer].view(self.inner, self.outer)

    def along_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Step along ``c left right``."""
        rule = self.layer.rule
        if self.gradient is not None:
            rule.along_sum(self.matrix, left, right, out=self.gradient)
        else:
            rule.along_product(self.matrix, self.velocity, left, right)

    def along(self, block: torch.Tensor) -> None:
        """Step along ``c block``, which is overwritten."""
        self.layer.rule.along(self.matrix, self.velocity, block, out=block)


class _Side:
    """The layers on one side of the split, from there outwards, as a product A_1 ... A_n of d_p rows.

    With X_i = A_1 ... A_i and the error Y_n at the outer end, ``Y_{i-1} = Y_i A_i^T``, and A_i descends along
    ``X_{i-1}^T Y_i``, A_1 along Y_1.
    """

    def __init__(self, layers: Sequence[_Layer], transposed: bool, error: torch.Tensor) -> None:
        factors = [_Descending(layer, transposed) for layer in layers]
        new = error.new_empty
        k = factors[0].inner
        #: X_n.
        self.product = factors[0].matrix
        #: X_{i-1}, A_i and X_i.
        self._forward: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for factor in factors[1:]:
            result = new(k, factor.outer)
            self._forward.append((self.product, factor.matrix, result))
            self.product = result

        moving = [i for i, layer in enumerate(layers) if layer.rule.moves]
        #: Whether any layer steps at all; nothing goes further inwards than to the innermost that does.
        self.moves = bool(moving)
        end = moving[0] if moving else len(factors)
        largest = max((f.inner * f.outer for f in factors[1:] if f.layer.rule.adds_decay), default=0)
        scratch = new(largest)
        turns = new(2, k * max((f.outer for f in factors[:-1]), default=0))
        #: The layer, X_{i-1}^T, Y_i, A_i^T and Y_{i-1}.
        self._backward: list[
            tuple[_Descending, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
        ] = []
        for i in range(len(factors) - 1, max(end, 1) - 1, -1):
            factor = factors[i]
            if factor.layer.rule.adds_decay:
                factor.use(scratch)
            inner = turns[i % 2][: k * factor.inner].view(k, factor.inner) if i > end else None
            self._backward.append((factor, self._forward[i - 1][0].T, error, factor.matrix.T, inner))
            error = error if inner is None else inner
        self._innermost = (factors[0], error) if end == 0 else None

    def forward(self) -> None:
        """Multiply the layers."""
        for prefix, factor, result in self._forward:
            torch.mm(prefix, factor, out=result)

    def backward(self) -> None:
        """Step with every layer, from the outer end inwards."""
        for factor, prefix, error, transpose, inner in self._backward:
            if inner is not None:
                torch.mm(error, transpose, out=inner)
            if factor.layer.rule.moves:
                factor.along_product(prefix, error)
        if self._innermost is not None:
            factor, error = self._innermost
            factor.along(error)


class _Descent:
    """The weights on the device, the loss at them and the step of all of them."""

    def __init__(
        self, weights: Sequence[npt.NDArray[Any]], arguments: dict[str, Any], device: torch.device
    ) -> None:
        rates = zip(arguments["learning_rate"], arguments["weight_decay"], arguments["momentum"], strict=True)
        self.layers = [
            _Layer(host, device, arguments["loss_scale"], rate)
            for host, rate in zip(weights, rates, strict=True)
        ]
        self._target = torch.tensor(arguments["target"], device=device)
        #: S, F and G, where S = F F^T is not the identity.
        self._inputs: tuple[torch.Tensor, ...] | None = None
        if arguments["input_gram"] is not None:
            names = ("input_gram", "input_factor", "factor_target")
            self._inputs = tuple(torch.tensor(arguments[name], device=device) for name in names)
        self._states = [
            state for layer in self.layers for state in (layer.weight, layer.velocity) if state is not None
        ]
        self._remembered: list[torch.Tensor] = []

        widths = widths_of(weights)
        split = core.best_pivot(widths)
        below, above = self.layers[:split][::-1], self.layers[split:]
        new = self.layers[0].weight.new_empty
        self._error = new(widths[-1], widths[0])
        # The errors of both sides: P E and T E^T with P and T the products of the sides, E and E^T themselves
        # where there is but one.
        ends = (self._error, self._error.T)
        if below and above:
            ends = (new(widths[split], widths[0]), new(widths[split], widths[-1]))
        lower = _Side(below, False, ends[0]) if below else None
        upper = _Side(above, True, ends[1]) if above else None
        self._sides = [side for side in (lower, upper) if side is not None]
        #: Products of each step beside those of the sides.
        self._join: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._to_split: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        if lower is not None and upper is not None:
            self._product = new(widths[-1], widths[0])
            self._join = (upper.product.T, lower.product, self._product)
            if lower.moves:
                self._to_split.append((upper.product, self._error, ends[0]))
            if upper.moves:
                self._to_split.append((lower.product, self._error.T, ends[1]))
        else:
            self._product = upper.product.T if upper is not None else self._sides[0].product
        # W_{L:1} F - G: with S = 1 it is E.
        self._residual = self._error if self._inputs is None else torch.empty_like(self._inputs[2])
        self._residuals = self._residual.view(-1)

    def evaluate(self, square: torch.Tensor) -> None:
        """Put ``||W_{L:1} F - G||^2`` there; `update` needs ``E = W_{L:1} S - Phi``."""
        for side in self._sides:
            side.forward()
        if self._join is not None:
            above, below, product = self._join
            torch.mm(above, below, out=product)
        if self._inputs is None:
            torch.sub(self._product, self._target, out=self._error)
        else:
            gram, factor, factor_target = self._inputs
            torch.mm(self._product, gram, out=self._error)
            self._error.sub_(self._target)
            torch.mm(self._product, factor, out=self._residual)
            self._residual.sub_(factor_target)
        torch.dot(self._residuals, self._residuals, out=square)

    def update(self) -> None:
        """Take one step from the weights of the last `evaluate`."""
        for product, error, result in self._to_split:
            torch.mm(product, error, out=result)
        for side in self._sides:
            side.backward()

    def remember(self) -> None:
        """Keep the weights of this step."""
        if not self._remembered:
            self._remembered = [torch.empty_like(state) for state in self._states]
        for copy, state in zip(self._remembered, self._states, strict=True):
            copy.copy_(state)

    def return_to(self, n_steps: int) -> None:
        """Go to so many steps after those that were kept last."""
        for copy, state in zip(self._remembered, self._states, strict=True):
            state.copy_(copy)
        square = self._error.new_empty(())
        for _ in range(n_steps):
            self.evaluate(square)
            self.update()

    def largest_layer(self) -> int:
        """Return the layer, counted from 1, with the largest entry; the first where several overflowed."""
        sizes = [float(layer.weight.abs().max()) for layer in self.layers]
        return int(np.argmax([size if np.isfinite(size) else np.inf for size in sizes])) + 1


class _TrackedLayer:
    """Follows the singular values of one layer and writes down what a record shows of them."""

    def __init__(
        self,
        layer: _Layer,
        request: Request,
        values: npt.NDArray[Any],
        arrays: LayerTracking,
        vectors: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None,
    ) -> None:
        self.layer = layer
        self.values, self.arrays, self.vectors = values, arrays, vectors
        k = values.shape[1]
        every = k == min(layer.weight.shape)
        mode = request.tracking
        #: Decomposed on the host at every record; otherwise the tracker asks for products.
        self.whole = mode == "full" or (every and mode == "auto")
        self.tracker = SVDTracker(
            k,
            mode=mode,
            guards=0 if every and mode == "auto" else DEFAULTS["n_guards"],
            n_threads=request.n_threads,
        )
        self.before: torch.Tensor | None = None

    def record(self, number: int) -> None:
        """Find the singular values as they are now."""
        layer = self.layer
        drift = None if self.whole else self._drift()
        if layer.host is layer.weight or self.whole:
            layer.bring_home()
            found = self.tracker.update(layer.host.numpy(), drift=drift)
        else:
            matrix = DeviceMatrix(layer.weight)
            found = self.tracker.update(matrix, drift=drift, squared_norm=matrix.squared_norm())
        self.values[number] = np.abs(found.singular_values)
        for name, row in tracking_rows(found).items():
            getattr(self.arrays, name)[number] = row
        if self.vectors is not None:
            left, right = self.vectors
            left[number] = self.tracker.left_vectors
            right[number] = self.tracker.right_vectors

    def _drift(self) -> float | None:
        """Return a bound on how far W has moved since the record before."""
        weight = self.layer.weight
        if self.before is None:
            self.before = weight.clone()
            return None
        moved = frobenius_norm(self.before.sub_(weight))
        self.before.copy_(weight)
        return moved * (1.0 + 1e-6)  # more than rounding can take from it


def _placed(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on the device: itself where that is the host, unless a test replaces this."""
    return host.to(device)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Multiply in the precision of the matrices, whatever PyTorch is set to outside."""
    settings: Any = torch.backends
    with torch.autocast(device.type, enabled=False):
        if hasattr(settings.cuda.matmul, "fp32_precision"):
            backends = (settings.cuda.matmul, settings.mkldnn.matmul)
            before = [backend.fp32_precision for backend in backends]
            try:
                for backend in backends:
                    backend.fp32_precision = "ieee"
                yield
            finally:
                for backend, precision in zip(backends, before, strict=True):
                    backend.fp32_precision = precision
        else:  # before PyTorch 2.9
            wanted = torch.get_float32_matmul_precision()
            try:
                torch.set_float32_matmul_precision("highest")
                yield
            finally:
                torch.set_float32_matmul_precision(wanted)


@contextmanager
def _team(n_threads: int) -> Iterator[None]:
    """Take a positive number of threads literally, and one after a fork.

    PyTorch's threads do not survive a fork, and a team of them would be waited for without end.
    """
    wanted = 1 if is_forked() else n_threads
    if wanted == 0:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
