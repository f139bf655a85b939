# SPDX-License-Identifier: MIT
"""Descent on a PyTorch device, for ``train(..., engine="torch")``: the steps of the dense engine.

The chain W_L ... W_1 is split at the same layer p as in ``cpp/include/dlnfast/dense_descent.hpp``, so that
every product has d_p rows or columns. A step is the same sum of the same products as there.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from .._problem.problem import Problem
from .._support.arrays import widths_of
from .._support.dispatch import core, is_forked
from .._tracking.svd_tracker import DEFAULTS, SVDTracker
from .._training.jobs import DenseJob, Outputs
from .._training.request import Request
from .._trajectory.layer_spectra import LayerTracking, split_tracker_record
from .._trajectory.states import States
from ._devices import use_exact_products
from ._optimizers import GradientRule, LayerRule, State, make_layer_rule
from ._rule import UpdateRule
from .operators import DeviceMatrix, frobenius_norm

if TYPE_CHECKING:
    from .._core import Outcome, Run

#: Number of steps that may be queued on an accelerator before the host waits for their losses.
_STEPS_AHEAD = 64
Count = core.Count
POLL_SECONDS = core.POLL_SECONDS


class TorchJob(DenseJob):
    """A run of the dense engine on a PyTorch device, with unsharded layers."""

    def __init__(self, request: Request, device: torch.device) -> None:
        super().__init__(request)
        self.device = device
        needs_each_loss = device.type == "cpu" or request.tolerance is not None
        self._descent: Descent | None = None
        # Other rules have states that a repeated step would change.
        self.steps_ahead = 1 if needs_each_loss or request.optimizer is not None else _STEPS_AHEAD
        #: State of the rule of each matrix on the host, which `run` reads and writes.
        self.rule_states = self.make_rule_states(self.weights)

    def make_rule_states(self, matrices: Sequence[npt.NDArray[Any]]) -> list[dict[str, npt.NDArray[Any]]]:
        """Return the state of the update rule of each matrix before the first step; none for "gd"."""
        rule = self.request.optimizer
        if rule is None:
            return []
        return [
            {name: tensor.numpy() for name, tensor in make_layer_rule(rule, torch.from_numpy(w))[1].items()}
            for w in matrices
        ]

    def state_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that change during the run: its state."""
        if not self.rule_states:
            return super().state_arrays()
        weights = {f"weight_{i}": w for i, w in enumerate(self.weights)}
        return weights | {
            f"rule_{name}_{i}": array
            for i, each in enumerate(self.rule_states)
            for name, array in each.items()
        }

    def run(self, arguments: Run) -> tuple[Outcome, int, int]:
        """Run the descent; return the outcome, the last step, and after a divergence the largest layer."""
        with torch.no_grad(), use_exact_products(self.device), _limit_threads(self.request.n_threads):
            descent = self.make_descent(arguments)
            for layer, velocity in zip(descent.parameters, self.optimizer.velocity, strict=False):
                layer.set_velocity(velocity)
            self._descent = descent
            try:
                return self._take_steps(descent, {**arguments})
            finally:
                self._descent = None
                self._copy_to_host(descent)

    def current_states(self, outputs: Outputs) -> tuple[States, npt.NDArray[np.int64]]:
        """Return states that end with the newest record, after its weights were copied to the host."""
        if self._descent is not None:
            self._copy_to_host(self._descent)
        return super().current_states(outputs)

    def make_descent(self, arguments: Run) -> Descent:
        """Return the descent from the current weights."""
        assert isinstance(self.request.problem, Problem)
        values = {**arguments, **self.request.problem.engine_arguments(self.request.dtype)}
        return StatisticsDescent(self.weights, values, self.device, self.request, self.rule_states)

    def record_descent(self, descent: Descent, number: int, loss: float) -> bool:
        """Write further entries of record `number`, none here; return False if one of them is not finite."""
        del descent, number, loss
        return True

    def _copy_to_host(self, descent: Descent) -> None:
        """Copy weights and velocities to the host."""
        for layer in descent.parameters:
            layer.copy_to_host()
        for on_host, state in zip(self.rule_states, descent.rule_states, strict=True):
            for name, tensor in state.items():
                torch.from_numpy(on_host[name]).copy_(tensor)

    def _take_steps(self, descent: Descent, arguments: dict[str, Any]) -> tuple[Outcome, int, int]:
        """Take the steps, in the order of ``cpp/src/descent.cpp``."""
        steps, every = self.request.steps, self.request.record_every
        weights_every = self.request.weights_every
        loss, counts = arguments["loss"], arguments["counts"]
        on_record, on_progress = arguments["on_record"], arguments["on_progress"]
        first, flush_every, on_flush = (arguments[name] for name in ("first", "flush_every", "on_flush"))
        tracked = [self._make_tracked_layer(i, descent.layers[i]) for i in range(len(self.values))]
        losses = _Losses(self.steps_ahead, descent)
        last_poll = time.perf_counter()
        descent.evaluate(losses.sums[0], first)
        step, n_new = first, 1  # n_new losses are unread, the last of them at `step`
        while True:
            begin = step + 1 - n_new
            new = losses.read(n_new)
            n_finite = n_new if np.isfinite(new).all() else int(np.argmin(np.isfinite(new)))
            loss[counts[Count.losses] : counts[Count.losses] + n_finite] = new[:n_finite]
            counts[Count.losses] += n_finite
            if n_finite < n_new:
                if n_finite < n_new - 1:
                    descent.repeat_from_saved(n_finite + 1, begin - 1)
                return "diverged", begin + n_finite, descent.largest_layer()

            counts[Count.between_steps] = 1
            now = float(new[-1])
            converged = now <= arguments["tolerance"]
            last = converged or step == steps
            at_record = last or step % every == 0 or step == first
            if at_record:
                if not self.record_descent(descent, int(counts[Count.records]), now):
                    counts[Count.losses] -= 1
                    counts[Count.between_steps] = 0
                    return "diverged", step, descent.largest_layer()
                for layer in tracked:
                    layer.record(int(counts[Count.records]))
                arguments["record_steps"][counts[Count.records]] = step
                counts[Count.records] += 1
            if weights_every is not None and step % weights_every == 0:
                for layer_snapshots, moved in zip(self.snapshots, descent.layers, strict=True):
                    torch.from_numpy(layer_snapshots[counts[Count.snapshots]]).copy_(moved.weight)
                counts[Count.snapshots] += 1
            answer = on_record(step, now) if at_record and on_record is not None else None
            if last:
                return "converged" if converged else "finished", step, 0
            if isinstance(answer, (bool, np.bool_)) and answer:
                return "stopped", step, 0
            if flush_every and step % flush_every == 0 and step != first:
                self._copy_to_host(descent)
                on_flush(step)
            if on_progress is not None and time.perf_counter() - last_poll >= POLL_SECONDS:
                on_progress(step, now)
                last_poll = time.perf_counter()

            until = min(steps, step + self.steps_ahead, _next_multiple(step, every))
            if weights_every is not None:
                until = min(until, _next_multiple(step, weights_every))
            if flush_every:
                until = min(until, _next_multiple(step, flush_every))
            n_new = until - step
            counts[Count.between_steps] = 0
            if n_new > 1:
                descent.save_state()
            for i in range(n_new):
                descent.update(step + i)
                descent.evaluate(losses.sums[i], step + i + 1)
            step = until

    def _make_tracked_layer(self, i: int, layer: DeviceLayer) -> _TrackedLayer:
        arrays = LayerTracking(
            self.errors[i], self.signs[i], self.branches[i], self.clusters[i], self.tracking[i]
        )
        vectors = (self.left[i], self.right[i]) if self.left else None
        return _TrackedLayer(layer, self.request, self.values[i], arrays, vectors)


def _next_multiple(step: int, every: int) -> int:
    return step - step % every + every


class _Losses:
    """Losses of the latest steps on the device before their scaling, and their conversion to losses."""

    def __init__(self, n: int, descent: Descent) -> None:
        self._sums = descent.layers[0].weight.new_empty(n)
        #: One scalar tensor per step, for `Descent.evaluate`.
        self.sums = self._sums.unbind()
        self._factor, self._floor = descent.loss_factor, descent.loss_floor

    @np.errstate(over="ignore", invalid="ignore")
    def read(self, n: int) -> npt.NDArray[np.float64]:
        """Return the first n losses, after the device has computed them."""
        sums = self._sums[:n].cpu().numpy().astype(np.float64)
        losses: npt.NDArray[np.float64] = self._factor * sums + self._floor
        return losses


class DeviceLayer:
    """One weight matrix on the device, with its update rule and, with momentum, its velocity."""

    def __init__(
        self,
        host: npt.NDArray[Any],
        device: torch.device,
        loss_scale: float,
        rates: tuple[float, float, float],
        request: Request,
    ) -> None:
        self.host = torch.from_numpy(host)
        #: Shares the memory of `host` if the device is the host.
        self.weight = _move_to_device(self.host, device)
        self.rule: UpdateRule | GradientRule
        if request.optimizer is None:
            self.rule = UpdateRule(loss_scale, rates, host.dtype, is_scheduled=request.is_scheduled)
        else:
            self.rule = GradientRule(loss_scale)
        #: The velocity; for another rule than gradient descent the gradient.
        self.velocity = torch.zeros_like(self.weight) if self.rule.has_momentum else None
        self.host_velocity: torch.Tensor | None = None

    def set_velocity(self, velocity: npt.NDArray[Any]) -> None:
        """Start from a velocity; `copy_to_host` writes the current one into the same array."""
        self.host_velocity = torch.from_numpy(velocity)
        if self.velocity is not None:
            self.velocity.copy_(self.host_velocity)

    def copy_to_host(self) -> None:
        """Copy the weight to the host, and the velocity into the array of `set_velocity`."""
        if self.host is not self.weight:
            self.host.copy_(self.weight)
        if self.velocity is not None and self.host_velocity is not None:
            self.host_velocity.copy_(self.velocity)


class _SideLayer:
    """A layer as a factor A of its side's product: A = W below the split, W^T above."""

    def __init__(self, layer: DeviceLayer, transposed: bool) -> None:
        self.layer = layer
        self.matrix = layer.weight.T if transposed else layer.weight
        velocity = layer.velocity
        self.velocity = velocity.T if velocity is not None and transposed else velocity
        self.inner, self.outer = self.matrix.shape
        self.gradient: torch.Tensor | None = None

    def set_scratch(self, scratch: torch.Tensor) -> None:
        """Store the gradient in shared scratch memory."""
        self.gradient = scratch[: self.inner * self.outer].view(self.inner, self.outer)

    def step_along_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Step along ``c left right``."""
        rule = self.layer.rule
        if self.gradient is not None:
            assert isinstance(rule, UpdateRule)
            rule.step_along_sum(self.matrix, left, right, out=self.gradient)
        else:
            rule.step_along_product(self.matrix, self.velocity, left, right)

    def step_along(self, block: torch.Tensor) -> None:
        """Step along ``c block``, which is overwritten."""
        self.layer.rule.step_along(self.matrix, self.velocity, block, out=block)


class _Side:
    """Layers on one side of the split as a product A_1 ... A_n with d_p rows, A_1 next to the split.

    With X_i = A_1 ... A_i and the error Y_n at the outer end, ``Y_{i-1} = Y_i A_i^T``. The gradient of A_i is
    ``c X_{i-1}^T Y_i``, that of A_1 is ``c Y_1``.
    """

    def __init__(self, layers: Sequence[DeviceLayer], transposed: bool, error: torch.Tensor) -> None:
        factors = [_SideLayer(layer, transposed) for layer in layers]
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

        moving = [i for i, layer in enumerate(layers) if layer.rule.is_trained]
        #: Whether any layer is trained; errors are multiplied no further inwards than the innermost of those.
        self.is_trained = bool(moving)
        end = moving[0] if moving else len(factors)
        largest = max((f.inner * f.outer for f in factors[1:] if f.layer.rule.has_decay_term), default=0)
        scratch = new(largest)
        buffers = new(2, k * max((f.outer for f in factors[:-1]), default=0))
        #: The layer, X_{i-1}^T, Y_i, A_i^T and Y_{i-1}.
        self._backward: list[
            tuple[_SideLayer, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
        ] = []
        for i in range(len(factors) - 1, max(end, 1) - 1, -1):
            factor = factors[i]
            if factor.layer.rule.has_decay_term:
                factor.set_scratch(scratch)
            inner = buffers[i % 2][: k * factor.inner].view(k, factor.inner) if i > end else None
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
            if factor.layer.rule.is_trained:
                factor.step_along_product(prefix, error)
        if self._innermost is not None:
            factor, error = self._innermost
            factor.step_along(error)


class Descent(ABC):
    """The matrices of a network on the device, their loss, and their steps: the part of all losses.

    Parameters
    ----------
    matrices : sequence of ndarray
        W_1 .. W_L on the host, followed by further matrices, with the rates of the layers in the same order.
    arguments : dict
        Rates of the layers, and the factor `loss_scale` of all gradients.
    device : torch.device
    request : Request
    rule_states : sequence of dict
        State of the update rule of each matrix on the host; empty for gradient descent.
    """

    #: The loss of a step is this factor times the number that `evaluate` writes, plus `loss_floor`.
    loss_factor: float
    loss_floor: float = 0.0

    def __init__(
        self,
        matrices: Sequence[npt.NDArray[Any]],
        arguments: dict[str, Any],
        device: torch.device,
        request: Request,
        rule_states: Sequence[dict[str, npt.NDArray[Any]]],
    ) -> None:
        names = ("learning_rate", "weight_decay", "momentum")
        rates = list(zip(*(arguments[name] for name in names), strict=True))
        self._n_layers = len(rates)
        #: All matrices.
        self.parameters = [
            DeviceLayer(host, device, arguments["loss_scale"], rates[i % len(rates)], request)
            for i, host in enumerate(matrices)
        ]
        #: The layers among them.
        self.layers = self.parameters[: len(rates)]
        self._request = request
        self._rules: list[LayerRule] = []
        #: State of the rule of each matrix; empty for gradient descent.
        self.rule_states: list[State] = []
        if request.optimizer is not None:
            for layer, on_host in zip(self.parameters, rule_states, strict=True):
                rule, state = make_layer_rule(request.optimizer, layer.weight)
                for name, tensor in state.items():
                    tensor.copy_(torch.from_numpy(on_host[name]))
                self._rules.append(rule)
                self.rule_states.append(state)
        self._states = [
            state
            for layer in self.parameters
            for state in (layer.weight, layer.velocity)
            if state is not None
        ]
        self._saved: list[torch.Tensor] = []

    @abstractmethod
    def evaluate(self, result: torch.Tensor, step: int) -> None:
        """Write the loss of a step before its scaling, a scalar, and prepare its gradients."""

    @abstractmethod
    def step_along_gradients(self) -> None:
        """Step with every matrix from the latest `evaluate`; other rules than "gd" store the gradients."""

    def update(self, step: int) -> None:
        """Take step number `step` from the weights of the latest `evaluate`."""
        if self._request.is_scheduled and not self._rules:
            for i, layer in enumerate(self.parameters):
                layer.rule.set_rates(*self._request.rates_at(step, i % self._n_layers))
        self.step_along_gradients()
        for i, (rule, layer, state) in enumerate(
            zip(self._rules, self.parameters, self.rule_states, strict=False)
        ):
            assert layer.velocity is not None
            rates = self._request.rates_at(step, i % self._n_layers)
            rule(layer.weight, layer.velocity, state, step, rates)

    def save_state(self) -> None:
        """Save weights and velocities, for `repeat_from_saved`."""
        if not self._saved:
            self._saved = [torch.empty_like(state) for state in self._states]
        for copy, state in zip(self._saved, self._states, strict=True):
            copy.copy_(state)

    def repeat_from_saved(self, n_steps: int, first: int) -> None:
        """Return to the saved weights, and take `n_steps` steps from there, beginning with step `first`."""
        for copy, state in zip(self._saved, self._states, strict=True):
            state.copy_(copy)
        result = self.layers[0].weight.new_empty(())
        for i in range(n_steps):
            self.evaluate(result, first + i)
            self.update(first + i)

    def largest_layer(self) -> int:
        """Return the layer, counted from 1, with the largest entry; the first one if several overflowed."""
        sizes = [float(layer.weight.abs().max()) for layer in self.layers]
        return int(np.argmax([size if np.isfinite(size) else np.inf for size in sizes])) + 1


class StatisticsDescent(Descent):
    """The descent of a `Problem`, from its sufficient statistics."""

    def __init__(
        self,
        weights: Sequence[npt.NDArray[Any]],
        arguments: dict[str, Any],
        device: torch.device,
        request: Request,
        rule_states: Sequence[dict[str, npt.NDArray[Any]]],
    ) -> None:
        super().__init__(weights, arguments, device, request, rule_states)
        self.loss_factor, self.loss_floor = 0.5 * arguments["loss_scale"], arguments["loss_floor"]
        self._target = torch.tensor(arguments["target"], device=device)
        #: S, F and G; None if S = F F^T is the identity.
        self._inputs: tuple[torch.Tensor, ...] | None = None
        if arguments["input_gram"] is not None:
            names = ("input_gram", "input_factor", "factor_target")
            self._inputs = tuple(torch.tensor(arguments[name], device=device) for name in names)

        widths = widths_of(weights)
        split = core.best_pivot(widths)
        below, above = self.layers[:split][::-1], self.layers[split:]
        new = self.layers[0].weight.new_empty
        self._error = new(widths[-1], widths[0])
        # Errors at the outer ends of the sides: P E and T E^T with P and T the products of the other side; E
        # or E^T itself if there is one side only.
        ends = (self._error, self._error.T)
        if below and above:
            ends = (new(widths[split], widths[0]), new(widths[split], widths[-1]))
        lower = _Side(below, False, ends[0]) if below else None
        upper = _Side(above, True, ends[1]) if above else None
        self._sides = [side for side in (lower, upper) if side is not None]
        #: Products of each step between the two sides.
        self._join: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._to_split: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        if lower is not None and upper is not None:
            self._product = new(widths[-1], widths[0])
            self._join = (upper.product.T, lower.product, self._product)
            if lower.is_trained:
                self._to_split.append((upper.product, self._error, ends[0]))
            if upper.is_trained:
                self._to_split.append((lower.product, self._error.T, ends[1]))
        else:
            self._product = upper.product.T if upper is not None else self._sides[0].product
        # W_{L:1} F - G, which is E if S = 1.
        self._residual = self._error if self._inputs is None else torch.empty_like(self._inputs[2])
        self._residuals = self._residual.view(-1)

    def evaluate(self, result: torch.Tensor, step: int) -> None:
        """Write ``||W_{L:1} F - G||^2``, and compute ``E = W_{L:1} S - Phi`` for `update`."""
        del step
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
        torch.dot(self._residuals, self._residuals, out=result)

    def step_along_gradients(self) -> None:
        """Step with every layer, or store the gradients."""
        for product, error, result in self._to_split:
            torch.mm(product, error, out=result)
        for side in self._sides:
            side.backward()


class _TrackedLayer:
    """Tracker of one layer's singular values, and the arrays of its records."""

    def __init__(
        self,
        layer: DeviceLayer,
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
        #: Whether every record decomposes the whole matrix on the host; otherwise the tracker uses products.
        self.is_whole = mode == "full" or (every and mode == "auto")
        self.tracker = SVDTracker(
            k,
            mode=mode,
            guards=0 if every and mode == "auto" else DEFAULTS["n_guards"],
            n_threads=request.n_threads,
        )
        self.before: torch.Tensor | None = None

    def record(self, number: int) -> None:
        """Update the tracker with the current weight, and write record `number`."""
        layer = self.layer
        drift = None if self.is_whole else self._measure_change()
        if layer.host is layer.weight or self.is_whole:
            layer.copy_to_host()
            found = self.tracker.update(layer.host.numpy(), drift=drift)
        else:
            matrix = DeviceMatrix(layer.weight)
            found = self.tracker.update(matrix, drift=drift, squared_norm=matrix.squared_norm())
        self.values[number] = np.abs(found.singular_values)
        for name, row in split_tracker_record(found, self.values.dtype).items():
            getattr(self.arrays, name)[number] = row
        if self.vectors is not None:
            left, right = self.vectors
            left[number] = self.tracker.left_vectors
            right[number] = self.tracker.right_vectors

    def _measure_change(self) -> float:
        """Return a bound on ``||W - W'||_F``, W' of the previous record; 0 at the first record."""
        weight = self.layer.weight
        if self.before is None:
            self.before = weight.clone()
            return 0.0
        moved = frobenius_norm(self.before.sub_(weight))
        self.before.copy_(weight)
        return moved * (1.0 + 1e-6)  # exceeds the rounding error of the norm


def _move_to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on the device; tests replace this function to separate it from the host."""
    return host.to(device)


@contextmanager
def _limit_threads(n_threads: int) -> Iterator[None]:
    """Run the block with `n_threads` threads of PyTorch; 0 keeps their number. After a fork use one thread.

    PyTorch's threads do not exist in a forked process, which would wait for them without end.
    """
    wanted = 1 if is_forked() else n_threads
    if wanted == 0:
        yield
        return
    previous = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
