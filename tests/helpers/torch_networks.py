# SPDX-License-Identifier: MIT
"""Small PyTorch networks, adapters on them, and comparisons of networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is optional")

from torch import nn  # noqa: E402

import dlnfast.torch as dt  # noqa: E402


def make_two_layers(
    d_in: int,
    hidden: int,
    d_out: int,
    *,
    activation: nn.Module | None = None,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Return two linear layers with an activation between them, by default ReLU."""
    if seed is not None:
        torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(d_in, hidden), activation or nn.ReLU(), nn.Linear(hidden, d_out))
    return network.to(dtype)


def draw_rows(n: int, dim: int = 10, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return n standard normal samples, the same in every call."""
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=dtype)


def add_adapter(model: nn.Module, layers: Any = None, **settings: Any) -> dt.DeepLoRA:
    """Add an adapter that changes the model's output from the start."""
    return dt.DeepLoRA(model, layers, **{"rank": 2, "init": "random", "scale": 0.5, **settings})


def squared_error(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean squared error of a model on a batch of inputs and outputs."""
    return (model(batch[0]) - batch[1]).square().mean()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return ||found - wanted|| / ||wanted||."""
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def copy_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the parameters and buffers of a model."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Assert that two states have the same names and the same bits."""
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name
