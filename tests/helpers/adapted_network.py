# SPDX-License-Identifier: MIT
"""A network with all kinds of layers that Deep LoRA adapts, for tests in several processes."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

#: Names of the layers.
LAYERS = ("embedding", "linear", "conv")


class AdaptedNetwork(nn.Module):
    """Embedding, linear layer, and linear layer with inputs first, with the same weights in every process."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 12)
        self.conv = Conv1D(6, 12)

    def forward(self, x):
        return self.conv(torch.tanh(self.linear(self.embedding(x))))


def make_inputs():
    return torch.arange(20).reshape(4, 5)


def sum_of_squares(model, x):
    """Return a loss of a model and its inputs."""
    return model(x).square().sum()
