# SPDX-License-Identifier: MIT
"""Leading singular vectors of the gradients of a loss with respect to weights, one gradient at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import nn

from .._problem.factors import LinearMap, leading_factors
from .._problem.low_rank import LowRank
from .._support.arrays import FloatArray
from ._reading import preserve_state

#: Function of the model and a batch that returns the loss, a scalar tensor.
Loss = Callable[[nn.Module, Any], torch.Tensor]

#: Modules of losses that take outputs and labels, not the model and a batch.
_LOSSES_OF_OUTPUTS: Final = ("torch.nn.functional", "torch.nn.modules.loss")

#: Error of the gradients' singular values relative to the largest; that of the vectors is its root.
_TOLERANCE: Final = 1e-6


class WatchedLayer(Protocol):
    """A layer with a weight of d_out rows and d_in columns, apart from its layout."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def kind(self) -> str:
        """One of "linear", "inputs first", "embedding" (with tokens as inputs) and "convolution"."""

    @property
    def d_out(self) -> int: ...
    @property
    def d_in(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype:
        """Precision of the gradient."""


def find_leading_gradients(
    model: nn.Module,
    targets: Sequence[WatchedLayer],
    batches: Any,
    loss: Loss | None,
    ranks: Sequence[int],
    memory: int,
) -> list[LowRank]:
    """Return the leading singular vectors of the gradient of each weight; `ranks` are their numbers.

    With one batch, every gradient is reduced as soon as it is complete. With several batches, gradients are
    summed in groups that fit into `memory` bytes, with one pass over the batches for each group.
    """
    each = _list_batches(batches)
    _check_loss_function(loss)
    compute_loss = _compute_model_loss if loss is None else loss
    sums = [_GradientSum(target, rank) for target, rank in zip(targets, ranks, strict=True)]
    for group in [sums] if len(each) == 1 else _group_by_memory(sums, memory):
        with _freeze_parameters(model):
            hooks = [entry.watch(at_once=len(each) == 1) for entry in group]
            try:
                for batch in each:
                    with torch.enable_grad():
                        value = compute_loss(model, batch)
                        _check_loss(value)
                        for entry in group:
                            entry.recomputes = entry.n_calls > 0
                        torch.autograd.backward(value)
                        for entry in group:
                            entry.recomputes = False
                    del value
            finally:
                for hook in hooks:
                    hook.remove()
        for entry in group:
            entry.reduce()
    return [entry.found for entry in sums if entry.found is not None]


class _GradientSum:
    """Sum of the gradients of one weight over batches, and its leading singular vectors."""

    def __init__(self, target: WatchedLayer, rank: int) -> None:
        self.target = target
        self.rank = rank
        self.found: LowRank | None = None
        #: Number of calls in the forward pass without a gradient yet.
        self.n_calls = 0
        #: Whether calls are recomputations of a checkpoint, which were counted in the forward pass.
        self.recomputes = False
        self._sum: torch.Tensor | None = None
        self._at_once = False

    @property
    def n_bytes(self) -> int:
        return self.target.d_out * self.target.d_in * self.target.dtype.itemsize

    def watch(self, *, at_once: bool) -> torch.utils.hooks.RemovableHandle:
        self._at_once = at_once
        return self.target.module.register_forward_hook(self._forward, with_kwargs=True)

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        del module
        if not torch.is_grad_enabled():  # the first pass of a reentrant checkpoint
            return None
        if not self.recomputes:
            self.n_calls += 1
        # The graph starts here if no parameter below this layer is trained.
        start = output if output.requires_grad else output.detach().requires_grad_()
        return _Tap.apply(  # type: ignore[no-untyped-call]
            start, (args[0] if args else next(iter(kwargs.values()))).detach(), self
        )

    def add(self, x: torch.Tensor, grad: torch.Tensor) -> None:
        if self.found is not None:
            raise RuntimeError(
                f"layer {self.target.name!r} is used again after its gradient was complete (a reentrant "
                "checkpoint of a shared layer); pass the batch twice, in a list"
            )
        kind, dtype = self.target.kind, self.target.dtype
        if kind == "convolution":
            part = self._differentiate_convolution(x, grad)
            self._sum = part if self._sum is None else self._sum.add_(part)
        elif kind == "embedding":
            rows = grad.reshape(-1, self.target.d_out).to(dtype)
            if self._sum is None:
                self._sum = rows.new_zeros(self.target.d_out, self.target.d_in)
            padding = getattr(self.target.module, "padding_idx", None)
            tokens = x.reshape(-1)
            if padding is not None:
                rows = rows.masked_fill((tokens == padding)[:, None], 0.0)
            self._sum.index_add_(1, tokens, rows.T)
        else:
            rows = grad.reshape(-1, self.target.d_out).to(dtype)
            inputs = x.reshape(-1, self.target.d_in).to(dtype)
            self._sum = rows.T @ inputs if self._sum is None else self._sum.addmm_(rows.T, inputs)
        self.n_calls -= 1
        if self._at_once and self.n_calls == 0:
            self.reduce()

    def _differentiate_convolution(self, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the weight of a convolution for one call, as a matrix."""
        layer: Any = self.target.module
        with torch.enable_grad():
            weight = torch.zeros(layer.weight.shape, dtype=self.target.dtype, device=grad.device)
            weight.requires_grad_()
            output = layer._conv_forward(x.to(weight.dtype), weight, None)
        (found,) = torch.autograd.grad(output, weight, grad.to(weight.dtype))
        return found.reshape(self.target.d_out, self.target.d_in)

    def reduce(self) -> None:
        if self.found is not None:
            return
        total, self._sum = self._sum, None
        size = 0.0 if total is None else float(torch.linalg.vector_norm(total, torch.inf))
        if total is None or size == 0.0:
            raise ValueError(
                f"the loss does not depend on layer {self.target.name!r}, or its gradient vanishes there; "
                'leave it out of layers, or use init="random"'
            )
        if not np.isfinite(size):
            raise ValueError(f"the gradient of layer {self.target.name!r} is not finite")
        self.found = leading_factors(TensorMap(total.div_(size)), self.rank, _TOLERANCE)


class _Tap(torch.autograd.Function):
    """Identity function that passes the inputs and gradients of a layer to a `_GradientSum`.

    Inputs are saved by autograd, so that checkpoints drop and recompute them. The output is a copy, because
    activations may change it in place.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, x: torch.Tensor, entry: _GradientSum) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.entry = entry
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.entry.add(ctx.saved_tensors[0], grad)
        return grad, None, None


class TensorMap(LinearMap):
    """A tensor on any device as a linear map on thin blocks."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.shape = int(matrix.shape[0]), int(matrix.shape[1])

    def apply(self, X: FloatArray) -> FloatArray:
        """Return ``X M^T``."""
        return self._to_host(self._to_block(X) @ self.matrix.T)

    def apply_transpose(self, X: FloatArray) -> FloatArray:
        """Return ``X M``."""
        return self._to_host(self._to_block(X) @ self.matrix)

    def dense(self) -> FloatArray:
        """Return M."""
        return self._to_host(self.matrix)

    def _to_block(self, X: FloatArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(X)).to(self.matrix)

    @staticmethod
    def _to_host(block: torch.Tensor) -> FloatArray:
        return np.asarray(block.cpu().numpy())


def _group_by_memory(sums: list[_GradientSum], memory: int) -> Iterator[list[_GradientSum]]:
    group: list[_GradientSum] = []
    for entry in sums:
        if group and sum(e.n_bytes for e in group) + entry.n_bytes > memory:
            yield group
            group = []
        group.append(entry)
    yield group


def _list_batches(batches: Any) -> list[Any]:
    if batches is None:
        raise ValueError('batches are needed for init="gradient": one batch, or a list of them')
    is_one_batch = isinstance(batches, (Mapping, torch.Tensor, tuple))
    each = [batches] if is_one_batch else list(batches)
    if not each:
        raise ValueError("batches is empty; wanted at least one batch")
    return each


def _compute_model_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"loss is None, and a batch is {type(batch).__name__}; wanted loss, a function (model, batch) -> "
            "Tensor, or a mapping for model(**batch), which returns a loss"
        )
    result = model(**batch)
    value = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if value is None:
        raise ValueError("model(**batch) has no loss: add labels to the batches, or pass loss=")
    return value  # type: ignore[no-any-return]


def _check_loss_function(loss: object) -> None:
    """Refuse losses of outputs and labels, such as those of `torch.nn`, before they are called."""
    if loss is None:
        return
    origin = loss if hasattr(loss, "__name__") else type(loss)
    if not callable(loss) or origin.__module__ in _LOSSES_OF_OUTPUTS:
        name = origin.__name__
        raise TypeError(
            f"loss is {name}; wanted a function of the model and a batch, such as "
            "lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])"
        )


def _check_loss(value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"loss returned {type(value).__name__}; wanted a tensor with one number")
    if value.numel() != 1:
        raise ValueError(f"loss returned a tensor of shape {tuple(value.shape)}; wanted one number")
    if not torch.isfinite(value.detach()).all():
        raise ValueError(f"the loss is {value.item()} at the start")
    if not value.requires_grad:
        raise ValueError("the loss depends on none of the chosen layers")


@contextmanager
def _freeze_parameters(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters in the block; at its end restore them, the model's state and random states."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with preserve_state(model):
        try:
            for p in trained:
                p.requires_grad_(False)
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)
