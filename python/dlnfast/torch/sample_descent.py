# SPDX-License-Identifier: MIT
"""Descent on samples, for a `SampleProblem`: mini-batches, label noise, cross-entropy, biases.

With the inputs Z_0 of a mini-batch, ``Z_l = W_l Z_{l-1} + b_l 1^T``. The gradient of the loss with respect to
Z_L is ``c D_L``, and ``D_{l-1} = W_l^T D_l``. The gradients of W_l and b_l are ``c D_l Z_{l-1}^T`` and
``c D_l 1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from .._problem.samples import SampleProblem
from .._support.arrays import aligned_copy
from .._training.jobs import OptimizerState, Outputs, allocate_records
from .._training.request import Request
from .._trajectory.samples import SampleStates
from ._rule import UpdateRule
from .descent import Descent, DeviceLayer, TorchJob

if TYPE_CHECKING:
    from .._core import Run

#: Largest number of samples of which the full loss is computed at a time.
_CHUNK_SAMPLES = 4096


class SampleJob(TorchJob):
    """A run of the torch engine on a `SampleProblem`, with full losses and biases at the records."""

    def __init__(self, request: Request, device: torch.device) -> None:
        super().__init__(request, device)
        assert isinstance(request.problem, SampleProblem)
        self.problem = request.problem
        #: b_1 .. b_L as columns; empty without biases.
        self.biases: list[npt.NDArray[Any]] = []
        if self.problem.has_biases:
            self.biases = [aligned_copy(np.zeros((len(w), 1), dtype=w.dtype)) for w in self.weights]
            self.optimizer = OptimizerState(request, self._matrices)
            self.rule_states = self.make_rule_states(self._matrices)
        n = request.n_records
        self.full_loss = allocate_records((n,), np.dtype(np.float64))
        self.bias_records = [allocate_records((n, len(b)), b.dtype) for b in self.biases]

    @property
    def _matrices(self) -> list[npt.NDArray[Any]]:
        return [*self.weights, *self.biases]

    def state_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that change during the run: its state."""
        return super().state_arrays() | {f"bias_{i}": b for i, b in enumerate(self.biases)}

    def make_descent(self, arguments: Run) -> SampleDescent:
        """Return the descent from the current weights and biases."""
        values = {**arguments, "loss_scale": self.problem.loss_scale}
        return SampleDescent(self._matrices, values, self.device, self.request, self.rule_states)

    def record_descent(self, descent: Descent, number: int, loss: float) -> bool:
        """Write the full loss and the biases; return whether the full loss is finite."""
        assert isinstance(descent, SampleDescent)
        full_loss = descent.full_loss() if self.problem.is_stochastic else loss
        self.full_loss[number] = full_loss
        for records, bias in zip(self.bias_records, descent.biases, strict=True):
            torch.from_numpy(records[number]).copy_(bias.weight[:, 0])
        return math.isfinite(full_loss)

    def states(self, outputs: Outputs, complete: bool) -> SampleStates:
        """Return the records so far, with the final weights of a finished run."""
        n = outputs.n_records
        return SampleStates.from_dense(
            super().states(outputs, complete),
            full_losses=self.full_loss[:n],
            biases=tuple(records[:n] for records in self.bias_records),
        )


class SampleDescent(Descent):
    """Weights, biases, activations of a mini-batch, and the gradients by backpropagation.

    Parameters
    ----------
    matrices : sequence of ndarray
        W_1 .. W_L, and b_1 .. b_L as columns if the problem has biases.
    arguments, device, request, rule_states
        As for `Descent`.
    """

    def __init__(
        self,
        matrices: Sequence[npt.NDArray[Any]],
        arguments: dict[str, Any],
        device: torch.device,
        request: Request,
        rule_states: Sequence[dict[str, npt.NDArray[Any]]],
    ) -> None:
        super().__init__(matrices, arguments, device, request, rule_states)
        problem = request.problem
        assert isinstance(problem, SampleProblem)
        self._problem = problem
        self.biases = self.parameters[self._n_layers :]
        dtype = self.layers[0].weight.dtype
        self._device, self._dtype = device, dtype
        # `evaluate` writes the mean of the losses of a mini-batch.
        self.loss_factor = problem.loss_scale * problem.n_samples
        self._inputs = torch.tensor(problem.inputs, dtype=dtype, device=device)
        clean = problem.labels if problem.outputs is None else problem.outputs
        self._clean_targets = self._move_targets(clean)
        self._evaluate_loss = {
            "squared": _squared_loss,
            "cross-entropy": _cross_entropy,
            "logistic": _logistic_loss,
        }[problem.loss_name]
        trained = [
            i
            for i, layer in enumerate(self.layers)
            if layer.rule.is_trained or (self.biases and self.biases[i].rule.is_trained)
        ]
        #: Innermost layer that is trained; errors are multiplied no further inwards.
        self._end = trained[0] if trained else self._n_layers
        #: Z_0 .. Z_{L-1} of the mini-batch, and D_L.
        self._activations: list[torch.Tensor] = []
        self._error = self._inputs

    def _move_targets(self, targets: Any) -> torch.Tensor:
        """Return targets on the device: labels of classes as integers, all else in the weights' precision."""
        dtype = torch.int64 if self._problem.loss_name == "cross-entropy" else self._dtype
        # A copy, because the array may be a read-only view.
        return torch.tensor(np.ascontiguousarray(targets), device=self._device).to(dtype)

    def _forward(self, values: torch.Tensor, kept: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Return the outputs of the network, and add the inputs of all layers to `kept`."""
        for i, layer in enumerate(self.layers):
            if kept is not None:
                kept.append(values)
            if self.biases:
                values = torch.addmm(self.biases[i].weight, layer.weight, values)
            else:
                values = layer.weight @ values
        return values

    def _read_batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of a step."""
        problem = self._problem
        inputs, targets = self._inputs, self._clean_targets
        if problem.batch_size is not None:
            which = torch.from_numpy(problem.batch(step)).to(self._device)
            inputs, targets = inputs.index_select(1, which), targets.index_select(-1, which)
        if problem.label_noise > 0:
            targets = self._move_targets(problem.targets(step))
        return inputs, targets

    def evaluate(self, result: torch.Tensor, step: int) -> None:
        """Write the mean loss of the mini-batch of a step, and keep its activations and D_L."""
        inputs, targets = self._read_batch(step)
        self._activations = []
        outputs = self._forward(inputs, self._activations)
        mean, self._error = self._evaluate_loss(outputs, targets)
        result.copy_(mean)
        n = inputs.shape[1]
        if n != self._problem.n_samples:
            self._error.mul_(self._problem.n_samples / n)

    def step_along_gradients(self) -> None:
        """Step with every layer, from the last one inwards, or store the gradients."""
        error = self._error
        for i in range(self._n_layers - 1, self._end - 1, -1):
            layer = self.layers[i]
            inner = layer.weight.T @ error if i > self._end else None
            if layer.rule.is_trained:
                _step_along_product(layer, error, self._activations[i].T)
            if self.biases and self.biases[i].rule.is_trained:
                bias = self.biases[i]
                gradient = error.sum(dim=1, keepdim=True)
                bias.rule.step_along(bias.weight, bias.velocity, gradient, out=gradient)
            if inner is not None:
                error = inner

    def full_loss(self) -> float:
        """Return the loss of all samples without label noise, summed in float64."""
        n = self._problem.n_samples
        total = 0.0
        for start in range(0, n, _CHUNK_SAMPLES):
            part = slice(start, min(start + _CHUNK_SAMPLES, n))
            outputs = self._forward(self._inputs[:, part])
            mean, _ = self._evaluate_loss(outputs, self._clean_targets[..., part])
            total += float(mean) * (part.stop - part.start)
        return float(self._problem.loss_scale * total)


def _step_along_product(layer: DeviceLayer, left: torch.Tensor, right: torch.Tensor) -> None:
    """Step along ``c left right``."""
    rule = layer.rule
    if rule.has_decay_term:
        assert isinstance(rule, UpdateRule)
        rule.step_along_sum(layer.weight, left, right)
    else:
        rule.step_along_product(layer.weight, layer.velocity, left, right)


def _squared_loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of ``1/2 ||z - y||^2``, and ``z - y``."""
    error = outputs - targets
    flat = error.reshape(-1)
    return torch.dot(flat, flat) * (0.5 / outputs.shape[1]), error


def _cross_entropy(outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of ``log sum_k exp(z_k) - z_y``, and the probabilities minus the one-hot columns."""
    logarithms = functional.log_softmax(outputs, dim=0)
    rows = labels.unsqueeze(0)
    mean = -logarithms.gather(0, rows).mean()
    error = logarithms.exp_()
    return mean, error.scatter_add_(0, rows, error.new_full((1, 1), -1.0).expand(rows.shape))


def _logistic_loss(outputs: torch.Tensor, signs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of ``log(1 + exp(-y z))``, and ``-y / (1 + exp(y z))``."""
    margins = outputs * signs
    return -functional.logsigmoid(margins).mean(), -signs * torch.sigmoid(-margins)
