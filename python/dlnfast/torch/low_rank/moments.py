# SPDX-License-Identifier: MIT
"""Second moments of the inputs of layers on data, and errors of layers that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from .._running import call_model, disable_compilation, find_device, move_inputs, preserve_model
from .truncate import get_double_device

#: Most numbers of unfolded patches in memory at a time: 64 MB in float64.
_CHUNK: Final = 2**23

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Moment:
    """Sums over the N input vectors x of a layer; for convolutions these are the unfolded patches.

    Attributes
    ----------
    count : int
        Number N.
    total : Tensor of float64, shape (n,)
        Sum of x.
    second : Tensor of float64, shape (n, n) or (n,)
        Sum of ``x x^T``; the diagonal for embeddings, whose inputs are unit vectors.
    """

    count: int
    total: torch.Tensor
    second: torch.Tensor

    def center(self) -> torch.Tensor:
        """Return the sum of ``(x - mean) (x - mean)^T``; only for a moment that is no diagonal."""
        return self.second - torch.outer(self.total, self.total / self.count)

    def squared_output(self, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
        """Return the sum of ``||W x + b||^2``, for W (m, n) and b (m,) in float64."""
        weighted = weight * self.second if self.second.ndim == 1 else weight @ self.second
        result = float((weighted * weight).sum())
        if bias is not None:
            result += 2.0 * float(bias @ (weight @ self.total)) + self.count * float(bias @ bias)
        return max(result, 0.0)  # rounding


@torch.no_grad()
def collect_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], name: str
) -> dict[str, Moment]:
    """Return the moments of the inputs of layers, summed in float64 in one pass in evaluation mode.

    Layers that were not called are left out.

    Parameters
    ----------
    model : Module
        Model to run; it is restored afterwards.
    layers : dict of str to Module
        Layers to watch, by name.
    batches : iterable
        Batches as `iterate_inputs` reads them.
    name : str
        Name of the argument with the batches, for messages.

    Raises
    ------
    ValueError
        For inputs that are not finite, and if there is no batch.
    """
    sums: dict[str, _Sum] = {}

    def watch(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if key not in sums:
                sums[key] = _Sum(module)
            sums[key].add(args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(key), with_kwargs=True) for key, module in layers.items()
    ]
    try:
        for inputs in iterate_inputs(batches, name, find_device(model)):
            with preserve_model(model, "eval"), disable_compilation():
                call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for key, entry in sums.items():
        if not math.isfinite(float(entry.second.sum())):
            raise ValueError(f"{name}: the input of layer {key!r} is not finite")
    return {key: Moment(entry.count, entry.total, entry.second) for key, entry in sums.items()}


def list_batches(data: Any, name: str) -> Iterable[Any]:
    """Return a single batch, or any iterable of batches, as an iterable that allows several passes.

    A batch is a tensor (the input), a mapping (keywords of the model), or a tuple (inputs, labels). An
    iterator is read into a list.

    Raises
    ------
    TypeError
        For anything else.
    """
    if isinstance(data, (torch.Tensor, Mapping)) or type(data) is tuple:
        return [data]
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise TypeError(
            f"{name} is {type(data).__name__}; wanted a batch (a tensor, a mapping, or a tuple of inputs and "
            "labels) or an iterable of batches"
        )
    return list(data) if iter(data) is data else data


def iterate_inputs(batches: Iterable[Any], name: str, device: torch.device) -> Iterator[Any]:
    """Yield the inputs of each batch on the device, without labels.

    Raises
    ------
    TypeError
        For a batch of another kind.
    ValueError
        If there is no batch.
    """
    empty = True
    for batch in batches:
        empty = False
        inputs = batch
        if isinstance(batch, (tuple, list)):
            if len(batch) not in (1, 2):
                raise TypeError(
                    f"{name} has a batch of {len(batch)} parts; wanted (inputs, labels), where inputs may be "
                    "a tuple of several arguments"
                )
            inputs = batch[0]
        if not isinstance(inputs, (torch.Tensor, Mapping, tuple, list)):
            raise TypeError(
                f"{name} has a batch with inputs of type {type(inputs).__name__}; wanted a tensor, a "
                "mapping, or a tuple of arguments"
            )
        yield move_inputs(inputs, device)
    if empty:
        raise ValueError(f"{name} is empty; wanted at least one batch")


class _Sum:
    """Running sums of the inputs of one layer."""

    def __init__(self, module: nn.Module) -> None:
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        device = get_double_device(weight.device)
        self._module = module
        self._is_embedding = isinstance(module, nn.Embedding)
        if isinstance(module, nn.modules.conv._ConvNd):
            size = math.prod(weight.shape[1:])
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            size = weight.shape[0 if self._is_embedding else 1]
        else:  # weights with the inputs first
            size = weight.shape[0]
        self.count = 0
        self.total = torch.zeros(size, dtype=torch.float64, device=device)
        self.second = self.total.clone() if self._is_embedding else self.total.new_zeros(size, size)

    def add(self, x: torch.Tensor) -> None:
        """Add the inputs of one call; inputs of another width are left to the layer's own error."""
        if self._is_embedding:
            counts = torch.bincount(x.flatten().to(self.total.device), minlength=len(self.total)).double()
            self.count += x.numel()
            self.total += counts
            self.second += counts
            return
        if not self._has_wanted_width(x):
            return
        for rows in self._list_rows(x):
            values = rows.to(self.total)
            self.count += len(values)
            self.total += values.sum(0)
            self.second.addmm_(values.T, values)

    def _has_wanted_width(self, x: torch.Tensor) -> bool:
        if isinstance(self._module, nn.modules.conv._ConvNd):
            n_axes = len(self._module.kernel_size)
            return x.ndim > n_axes and x.shape[-n_axes - 1] == self._module.in_channels
        return x.ndim > 0 and x.shape[-1] == len(self.total)

    def _list_rows(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield input vectors as rows (k, n), in chunks that fit into the memory for patches."""
        size = len(self.total)
        if isinstance(self._module, nn.modules.conv._ConvNd):
            n_axes = len(self._module.kernel_size)
            samples = x.reshape(-1, *x.shape[-n_axes - 1 :])
            outputs = max(1, math.prod(x.shape[-n_axes:]) // math.prod(self._module.stride))
            step = max(1, _CHUNK // (size * outputs))
            for start in range(0, len(samples), step):
                yield unfold_patches(self._module, samples[start : start + step])
        else:
            rows = x.reshape(-1, size)
            step = max(1, _CHUNK // size)
            for start in range(0, len(rows), step):
                yield rows[start : start + step]


def unfold_patches(conv: nn.modules.conv._ConvNd, x: torch.Tensor) -> torch.Tensor:
    """Return the patches that a convolution without groups multiplies with its weight.

    Parameters
    ----------
    conv : Module
        Convolution with d axes.
    x : Tensor, shape (B, in, n_1, .., n_d)
        Inputs.

    Returns
    -------
    Tensor, shape (B o_1 .. o_d, in k_1 .. k_d)
        One row per sample and position of the output.
    """
    n_axes = len(conv.kernel_size)
    padding = conv._reversed_padding_repeated_twice
    if conv.padding_mode != "zeros":
        x = F.pad(x, padding, mode=conv.padding_mode)
    elif any(padding):
        x = F.pad(x, padding)
    steps = x.stride()[2:]
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    outputs = [(n - span) // step + 1 for n, span, step in zip(x.shape[2:], spans, conv.stride, strict=True)]
    view = x.as_strided(
        (len(x), *outputs, x.shape[1], *conv.kernel_size),
        (
            x.stride(0),
            *(s * step for s, step in zip(steps, conv.stride, strict=True)),
            x.stride(1),
            *(s * d for s, d in zip(steps, conv.dilation, strict=True)),
        ),
        x.storage_offset(),
    )
    return view.reshape(len(x) * math.prod(outputs), x.shape[1] * math.prod(conv.kernel_size[:n_axes]))
