# SPDX-License-Identifier: MIT
"""Construction of models from a seed, and of hidden layers as single modules; shared by all models."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import nn

from ..._support.arrays import check_choice, check_count, per_layer
from ..._support.errors import ShapeError
from ..._weights.initial import DISTRIBUTIONS
from ..._weights.widths import Scale
from ..initial import initialize_
from ..layers import weight_matrices

Device = torch.device | str | None

ACTIVATIONS: Final[dict[str, Callable[[], nn.Module]]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


@contextmanager
def construct(
    model: nn.Module, initial: str, scale: Scale, seed: int, dtype: torch.dtype | None, device: Device
) -> Iterator[None]:
    """Create the modules of a model in the block; then draw the weights and move the model to its device.

    Numbers are drawn on the CPU, so that a seed gives the same numbers on every device. The states of
    PyTorch's generators are preserved. On the meta device nothing is drawn.
    """
    check_choice(initial, "initial", (*DISTRIBUTIONS, "torch"))
    number = check_count(seed, "seed", minimum=0, maximum=2**64 - 1)
    # The device of an empty tensor accounts for the surrounding device context and the default device.
    target = torch.empty(0, device=device).device
    with torch.random.fork_rng(devices=[]), torch.device("meta" if target.type == "meta" else "cpu"):
        torch.default_generator.manual_seed(number)
        yield
    model.to(dtype=dtype)
    if initial == "torch":
        chosen = weight_matrices(model)
        with torch.no_grad():
            for matrix, factor in zip(chosen, per_layer(scale, "scale", len(chosen)), strict=True):
                getattr(matrix.module, matrix.attribute).mul_(float(factor))
    else:
        initialize_(model, initial, scale, number)
    model.to(device=target)


def make_hidden_layer(
    kind: str, linear: nn.Module, norm: nn.Module | None = None, activation: str | None = None
) -> nn.Sequential:
    """Return a linear map, its normalisation and its activation as one module."""
    parts: OrderedDict[str, nn.Module] = OrderedDict({kind: linear})
    if norm is not None:
        parts["norm"] = norm
    if activation is not None:
        parts["activation"] = ACTIVATIONS[activation]()
    return nn.Sequential(parts)


def flatten_inputs(x: torch.Tensor, dim_in: int) -> torch.Tensor:
    """Flatten inputs of shape (B, ..) to rows of d_0 values."""
    rows = x.flatten(1)
    if rows.shape[1] != dim_in:
        raise ShapeError(f"x has shape {tuple(x.shape)}; wanted {dim_in} values (d_0) per sample")
    return rows


def check_images(x: torch.Tensor, in_channels: int, image_size: int) -> None:
    """Raise ShapeError for inputs that are not (B, channels, size, size)."""
    if x.ndim != 4 or x.shape[1:] != (in_channels, image_size, image_size):
        raise ShapeError(
            f"x has shape {tuple(x.shape)}; wanted (B, {in_channels}, {image_size}, {image_size})"
        )
