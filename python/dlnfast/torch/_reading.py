# SPDX-License-Identifier: MIT
"""The values of weights, read without a trace: plain ones, computed ones, and what cannot be read."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

#: Attributes under which layers of other packages hold packed weights.
PACKED_ATTRIBUTES: Final = ("qweight", "W_q", "_packed_params")
#: Computed weights are read one at a time, because reading forks the global random state.
_ONE_AT_A_TIME: Final = threading.RLock()


def describe_computation(module: nn.Module, attribute: str = "weight") -> str | None:
    """Return what computes a tensor of a module at every forward pass; None for a parameter or buffer.

    Parametrizations (`torch.nn.utils.parametrize`), the hooks of `torch.nn.utils.weight_norm`,
    `torch.nn.utils.spectral_norm` and `torch.nn.utils.prune`, and, as "code of its own", everything else that
    leaves a plain tensor where a parameter would be.
    """
    if parametrize.is_parametrized(module, attribute):
        steps: Any = module.parametrizations[attribute]  # type: ignore[index]
        return f"a parametrization ({', '.join(type(step).__name__.lstrip('_') for step in steps)})"
    for hook, name in _find_weight_hooks(module):
        if name == attribute:
            return f"a hook ({type(hook).__name__})"
    held = vars(module).get(attribute)
    return "code of its own" if isinstance(held, torch.Tensor) else None


def list_computed_attributes(module: nn.Module) -> list[str]:
    """Return the names of a module's tensors that parametrizations or known hooks compute."""
    by_hooks = [
        name for _, name in _find_weight_hooks(module) if isinstance(vars(module).get(name), torch.Tensor)
    ]
    if not parametrize.is_parametrized(module):
        return list(dict.fromkeys(by_hooks))
    return list(dict.fromkeys([*module.parametrizations, *by_hooks]))  # type: ignore[misc]


def is_hook_input(module: nn.Module, attribute: str) -> bool:
    """Return whether a parameter is what a hook computes another tensor from."""
    return any(
        attribute in (f"{name}_g", f"{name}_v", f"{name}_orig") and attribute != name
        for _, name in _find_weight_hooks(module)
    )


def read_weight(module: nn.Module, attribute: str = "weight") -> torch.Tensor:
    """Return a weight as it is now, detached.

    A computed one is computed anew, as the module's forward pass in evaluation mode would: right after a step
    of an optimizer, too, when what a hook left is out of date. This changes nothing: buffers, training flags
    and all random states are afterwards as they were, and ``parametrize.cached()`` keeps nothing of it.

    Raises
    ------
    TypeError
        For a tensor that is computed by unknown code.
    """
    plain = module._parameters.get(attribute)
    if plain is not None:
        return plain.detach()
    modules = [module]
    if parametrize.is_parametrized(module):
        modules += module.parametrizations.modules()  # type: ignore[union-attr]
    with _ONE_AT_A_TIME, torch.no_grad(), isolate_modules(modules):
        if parametrize.is_parametrized(module, attribute):
            value = module.parametrizations[attribute]()  # type: ignore[index,operator]
        else:
            names = set()
            for hook, name in _find_weight_hooks(module):
                hook(module, ())
                names.add(name)
            if attribute not in names:
                raise TypeError(
                    f"{attribute} of {type(module).__name__} is a plain tensor that its own code computes; "
                    "wanted a parameter, a parametrization, or torch.nn.utils.weight_norm, spectral_norm or "
                    "prune"
                )
            value = getattr(module, attribute)
    result: torch.Tensor = value.detach()
    return result


def find_shape_tensor(module: nn.Module, attribute: str = "weight") -> torch.Tensor | None:
    """Return a tensor that has the shape of a weight, and is there without computing it; None if none is."""
    held: Any = module._parameters.get(attribute)
    if held is None and parametrize.is_parametrized(module, attribute):
        steps: Any = module.parametrizations[attribute]  # type: ignore[index]
        held = steps.original if steps.is_tensor and not steps.unsafe else None
    elif held is None:
        held = vars(module).get(attribute)
    return held if isinstance(held, torch.Tensor) else None


def explain_unreadable(module: nn.Module, attribute: str = "weight") -> str | None:
    """Return why a weight is no matrix of real floating-point numbers ("is torch.uint8"); None if it is one.

    Integers, truth values, complex and quantised numbers, 4-bit weights of bitsandbytes whatever their
    storage, floats of 8 bits (their scales are elsewhere), subclasses of tensors that hold other tensors,
    sparse and empty ones, and parameters of lazy modules.
    """
    if attribute in PACKED_ATTRIBUTES:
        return f"is packed ({type(module).__name__}.{attribute})"
    held: Any = module._parameters.get(attribute)
    if held is None:
        how = describe_computation(module, attribute)
        if how == "code of its own":
            return "is a plain tensor, which code of the layer's own computes"
        held = read_weight(module, attribute)
    if is_lazy(held):
        return "is not initialised yet (its module is lazy: run a batch through the model first)"
    if held.ndim < 2:
        return f"has shape {tuple(held.shape)}, as the shards of a weight have"
    if getattr(held, "quant_state", None) is not None:
        return f"is packed ({type(held).__name__})"
    if held.is_quantized or not held.dtype.is_floating_point:
        return f"is {held.dtype}"
    if torch.finfo(held.dtype).bits < 16:
        return f"is {held.dtype}, whose scale is elsewhere"
    if held.layout != torch.strided:
        return f"is sparse ({held.layout})"
    if _has_inner_tensors(held):
        return f"is packed ({type(held).__name__})"
    if held.numel() == 0:
        return f"is empty, with shape {tuple(held.shape)}"
    return None


@contextmanager
def isolate_modules(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules compute in evaluation mode on copies of what they hold; afterwards all is as it was.

    Meant for a few modules: their tensors and containers are copied, so that nothing is written to the
    originals, not even for a moment. Random states, PyTorch's, NumPy's and Python's, are put back.
    State that other objects hold is not known here, and not kept.
    """
    kept = [(module, dict(vars(module))) for module in dict.fromkeys(modules)]
    copies: dict[int, Any] = {}
    tensors = [tensor for module, _ in kept for tensor in _list_tensors(module)]
    with ExitStack() as stack:
        stack.enter_context(preserve_random_state(tensors))
        for kind in sorted({tensor.device.type for tensor in tensors} - {"meta"}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_disable_caches())
        try:
            for module, state in kept:
                vars(module).update({name: _copy_value(value, copies) for name, value in state.items()})
                vars(module)["training"] = False
            yield
        finally:
            for module, state in kept:
                for name in vars(module).keys() - state.keys():
                    del vars(module)[name]
                vars(module).update(state)


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Let a model run, and put back buffers, random states, and what modules have as attributes.

    Of attributes, tensors, numbers and generators of random numbers. Parameters and train or eval modes are
    left to the caller. Only values that have changed are written, as writing to a tensor makes backward
    passes fail that need it.
    """
    # Lazy modules learn their sizes when they run.
    modules = [module for module in model.modules() if not isinstance(module, LazyModuleMixin)]
    holders: list[dict[str, Any]] = [held for module in modules for held in (module._buffers, vars(module))]
    kept: list[tuple[dict[str, Any], str, Any, Any]] = [
        (held, name, value, value.clone() if isinstance(value, torch.Tensor) else value)
        for held in holders
        for name, value in held.items()
        if name != "training" and (value is None or isinstance(value, (torch.Tensor, int, float, str)))
    ]
    generators = [
        (value, value.get_state())
        for module in modules
        for value in vars(module).values()
        if isinstance(value, torch.Generator)
    ]
    # A cache would hand on tensors without gradients to the next forward pass.
    with preserve_random_state([*model.parameters(), *model.buffers()]), _disable_caches():
        try:
            yield
        finally:
            for held, name, value, before in kept:
                if isinstance(value, torch.Tensor) and not torch.equal(value, before):
                    with torch.no_grad():
                        value.copy_(before)
                if held.get(name) is not value:
                    held[name] = value
            for generator, state in generators:
                generator.set_state(state)


@contextmanager
def _disable_caches() -> Iterator[None]:
    """Switch off ``parametrize.cached()``."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


@contextmanager
def preserve_random_state(tensors: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Put back the global random states of PyTorch, on the devices of these tensors too, NumPy and Python."""
    devices: dict[str, set[int]] = {}
    for tensor in tensors:
        if tensor.device.type not in ("cpu", "meta"):
            devices.setdefault(tensor.device.type, set()).add(tensor.device.index or 0)
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind, indices in devices.items():
            stack.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _list_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    for held in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
        if isinstance(held, torch.Tensor) and not is_lazy(held):
            yield held


def _copy_value(value: Any, copies: dict[int, Any]) -> Any:
    """Return a copy of a tensor, a generator of random numbers or a container of these; all else as it is."""
    if id(value) in copies:
        return copies[id(value)]
    made = value
    if isinstance(value, torch.Tensor) and not is_lazy(value):
        made = value.detach().clone()
    elif isinstance(value, torch.Generator):
        made = torch.Generator(value.device)
        made.set_state(value.get_state())
    elif isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
        made = copy.deepcopy(value)
    elif isinstance(value, (dict, list)):
        made = copies[id(value)] = copy.copy(value)  # before its contents, which may contain it
        for key in list(made) if isinstance(made, dict) else range(len(made)):
            made[key] = _copy_value(made[key], copies)
    elif type(value) is tuple:
        made = tuple(_copy_value(entry, copies) for entry in value)
    elif isinstance(value, set):
        made = copy.copy(value)
    copies[id(value)] = made
    return made


def _find_weight_hooks(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Yield the hooks before a forward pass that compute a tensor of the module, and its name, in order."""
    for hook in module._forward_pre_hooks.values():
        if hasattr(hook, "compute_weight") and isinstance(getattr(hook, "name", None), str):
            yield hook, hook.name  # type: ignore[attr-defined]
        elif hasattr(hook, "apply_mask") and isinstance(getattr(hook, "_tensor_name", None), str):
            yield hook, hook._tensor_name  # type: ignore[attr-defined]


def _has_inner_tensors(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is made of others, as torchao's are; sharded ones (DTensor) do not count."""
    if type(tensor) in (torch.Tensor, nn.Parameter) or "DTensor" in type(tensor).__name__:
        return False
    return hasattr(type(tensor), "__tensor_flatten__")
