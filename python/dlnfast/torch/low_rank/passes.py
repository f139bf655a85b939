# SPDX-License-Identifier: MIT
"""Forward passes over batches: the order of layers, and hooks that watch their calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._running import call_model, disable_compilation, find_device, move_inputs, preserve_model

#: Observer of a call: name of the layer, its input and its output.
Watch = Callable[[str, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Group:
    """Layers that are compressed at a time, because they have the same input.

    Attributes
    ----------
    names : list of str
        Names of the layers.
    is_called_once : bool
        Whether a forward pass calls each of them once.
    """

    names: list[str]
    is_called_once: bool


class _Stopped(BaseException):
    """End of a forward pass after the last layer that is watched; models do not catch it."""


@torch.no_grad()
def run_watched(
    model: nn.Module,
    inputs: Any,
    layers: Mapping[str, nn.Module],
    watch: Watch,
    *,
    n_calls: int | None = None,
) -> Any:
    """Run the model once in evaluation mode, and call `watch` after each call of a layer.

    Parameters
    ----------
    model : Module
        Model to run; modes, buffers and random states are restored afterwards.
    inputs : Tensor, tuple or dict
        Inputs of the model.
    layers : dict of str to Module
        Layers to watch, by name.
    watch : callable ``(name, input, output)``
        Observer. The output may be changed in place by the model later.
    n_calls : int, optional
        Number of calls of these layers after which the pass is stopped. Default: run the whole model.

    Returns
    -------
    Any
        Output of the model; None if the pass was stopped.
    """
    seen = 0

    def make_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal seen
            watch(name, args[0] if args else next(iter(kwargs.values())), output)
            seen += 1
            if seen == n_calls:
                raise _Stopped

        return hook

    handles = [
        module.register_forward_hook(make_hook(name), with_kwargs=True) for name, module in layers.items()
    ]
    try:
        with preserve_model(model, "eval"), disable_compilation():
            return call_model(model, inputs)
    except _Stopped:
        return None
    finally:
        for handle in handles:
            handle.remove()


def order_layers(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], name: str
) -> list[Group]:
    """Return groups of layers in the order of their first calls on the first batch.

    Consecutive layers with the same input, such as those of queries, keys and values, form one group. Layers
    that are not called on this batch are the last group.

    Parameters
    ----------
    model : Module
        Model to run.
    layers : dict of str to Module
        Layers, by name.
    batches : iterable
        Batches as `iterate_inputs` reads them.
    name : str
        Name of the argument with the batches, for messages.
    """
    groups: list[list[str]] = []
    counts: Counter[str] = Counter()
    previous: tuple[torch.Tensor, int | None] | None = None

    def watch(key: str, x: torch.Tensor, _: torch.Tensor) -> None:
        nonlocal previous
        version = None if x.is_inference() else x._version
        is_same = previous is not None and previous[0] is x and previous[1] == version
        previous = x, version
        if not counts[key]:
            if is_same:
                groups[-1].append(key)
            else:
                groups.append([key])
        counts[key] += 1

    run_watched(model, next(iter(iterate_inputs(batches, name, find_device(model)))), layers, watch)
    others = [key for key in layers if not counts[key]]
    return [
        Group(names, is_called_once=all(counts[key] == 1 for key in names))
        for names in (*groups, others)
        if names
    ]


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
