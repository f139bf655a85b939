# SPDX-License-Identifier: MIT
"""Forward passes of a model that leave it as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from ._reading import preserve_state

Mode = Literal["eval", "train", "keep"]


def find_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer; the host if it has none."""
    first = next(iter(model.parameters()), next(iter(model.buffers()), None))
    return torch.device("cpu") if first is None else first.device


def move_inputs(inputs: Any, device: torch.device) -> Any:
    """Move all tensors in nested mappings, tuples and lists; lists become tuples."""
    if isinstance(inputs, Mapping):
        return {name: move_inputs(part, device) for name, part in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(move_inputs(part, device) for part in inputs)
    return inputs.to(device) if isinstance(inputs, torch.Tensor) else inputs


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call the model with a tensor, a tuple of arguments, or a dict of named ones."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def disable_compilation() -> AbstractContextManager[Any]:
    """Run compiled models uncompiled in the block, because compiled code does not call new hooks."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):  # before PyTorch 2.6
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def preserve_model(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Set the mode of a model; restore modes, buffers and random states at the end of the block."""
    flags = [(module, module.training) for module in model.modules()]
    with preserve_state(model):
        try:
            if mode != "keep":
                model.train(mode == "train")
            yield
        finally:
            if mode != "keep":
                # The model's own method may do more than set flags. Then restore the flag of each module.
                model.train(flags[0][1])
                for module, training in flags:
                    module.training = training
