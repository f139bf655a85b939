# SPDX-License-Identifier: MIT
"""Initial factors of Deep LoRA, from the leading singular vectors of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from ..._problem.factors import LinearMap, leading_factors
from ..._problem.low_rank import LowRank
from ..._support.arrays import FloatArray
from ..._support.haar import haar, join_frames, signed_q
from .._reading import preserve_state
from .layers import Factors, Target

#: Function of the model and a batch that returns the loss, a scalar tensor.
Loss = Callable[[nn.Module, Any], torch.Tensor]

#: Error of the gradients' singular values relative to the largest; that of the vectors is its root.
_TOLERANCE: Final = 1e-6


def find_leading_gradients(
    model: nn.Module,
    targets: Sequence[Target],
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


def draw_frames(
    gradient: LowRank | None, target: Target, rank: int, generator: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Draw the frames right (rank, d_in) and left (d_out, rank), images of each other under a rotation E.

    For a square weight and a Haar distributed E, the right frame spans ``[V_g, E^T U_g]``, and the left frame
    is its image, ``left = E right^T``. The frames are drawn from their joint distribution without forming E:
    the image X of V_g is a uniform frame; the part of U_g outside of X has as its preimage a uniform frame F
    outside of V_g. So ``right = [V_g, F]^T`` and ``left = [X, orth((1 - X X^T) U_g)]``. Without a gradient
    both frames are uniform and independent.
    """
    if gradient is None:
        return haar(rank, target.d_in, generator), haar(target.d_out, rank, generator)
    v, u = signed_q(gradient.V.astype(np.float64)), gradient.U.astype(np.float64)
    n_right = v.shape[1]
    image = haar(target.d_out, n_right, generator)
    n_left = rank - n_right
    right = join_frames(v, generator.standard_normal((target.d_in, n_left)))
    left = join_frames(image, u[:, :n_left])
    return np.ascontiguousarray(right.T), left


def make_first_factors(
    target: Target,
    frames: tuple[FloatArray, FloatArray] | None,
    width: int,
    depth: int,
    scale: float,
    generator: np.random.Generator,
) -> Factors:
    """Make the factors: `depth` scaled identities between the frames, or `depth` scaled random frames."""
    framed = frames is not None
    if frames is not None:
        cores = np.tile(scale * np.eye(width), (depth, 1, 1))
    else:
        frames = scale * haar(width, target.d_in, generator), scale * haar(target.d_out, width, generator)
        cores = np.array([scale * haar(width, width, generator) for _ in range(depth - 2)])

    def tensor(array: FloatArray) -> torch.Tensor:
        return torch.as_tensor(array, dtype=target.dtype, device=target.weight.device)

    return Factors(tensor(frames[0]), tensor(cores) if len(cores) else None, tensor(frames[1]), framed)


class _GradientSum:
    """Sum of the gradients of one weight over batches, and its leading singular vectors."""

    def __init__(self, target: Target, rank: int) -> None:
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
        rows = grad.reshape(-1, self.target.d_out).to(self.target.dtype)
        if self.target.kind == "embedding":
            if self._sum is None:
                self._sum = rows.new_zeros(self.target.d_out, self.target.d_in)
            padding = getattr(self.target.module, "padding_idx", None)
            tokens = x.reshape(-1)
            if padding is not None:
                rows = rows.masked_fill((tokens == padding)[:, None], 0.0)
            self._sum.index_add_(1, tokens, rows.T)
        else:
            inputs = x.reshape(-1, self.target.d_in).to(self.target.dtype)
            self._sum = rows.T @ inputs if self._sum is None else self._sum.addmm_(rows.T, inputs)
        self.n_calls -= 1
        if self._at_once and self.n_calls == 0:
            self.reduce()

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
        self.found = leading_factors(_TensorMap(total.div_(size)), self.rank, _TOLERANCE)


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


class _TensorMap(LinearMap):
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
            f"a batch is {type(batch).__name__}; without a loss it has to be a mapping for model(**batch), "
            "which returns a loss"
        )
    result = model(**batch)
    value = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if value is None:
        raise ValueError("model(**batch) has no loss: add labels to the batches, or pass loss=")
    return value  # type: ignore[no-any-return]


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
