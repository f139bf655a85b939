# SPDX-License-Identifier: MIT
"""Forward and backward passes of small networks as CUDA graphs: one launch instead of one for each kernel."""

from __future__ import annotations

import torch
from torch import nn


def capture_passes(model: nn.Module, inputs: torch.Tensor) -> None:
    """Capture forward and backward pass of a model on a GPU, for batches of one shape in training mode.

    Other batches, and all batches in evaluation mode, run uncaptured. On other devices nothing happens. The
    weights and buffers are those from before.

    Parameters
    ----------
    model : Module
        Model on its device, without hooks. Its parameters must stay where they are.
    inputs : Tensor, shape (B, ..)
        A batch on the device of the model.

    Notes
    -----
    `torch.cuda.make_graphed_callables` runs the model a few times before the capture; statistics of batch
    normalisation, which that changes, are restored. Gradients are exactly those of the uncaptured model.
    """
    if inputs.device.type != "cuda":
        return
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    eager, was_training, shape = model.forward, model.training, inputs.shape
    model.train()
    torch.cuda.make_graphed_callables(model, (inputs.clone(),))
    captured = model.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = captured(x) if x.shape == shape else eager(x)
        return result

    model.forward = forward  # type: ignore[method-assign, unused-ignore]
    model.train(was_training)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
