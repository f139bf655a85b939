# SPDX-License-Identifier: MIT
"""Reading of weights, plain and computed, without side effects on the model."""

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

#: Attributes in which layers of other packages store packed weights.
PACKED_ATTRIBUTES: Final = ("qweight", "W_q", "_packed_params")
#: Computed weights are read one at a time, because reading forks the global random state.
_ONE_AT_A_TIME: Final = threading.RLock()


def describe_computation(module: nn.Module, attribute: str = "weight") -> str | None:
    """Describe the computation of a tensor at every forward pass; return None for a parameter or buffer.

    Recognizes parametrizations (`torch.nn.utils.parametrize`) and the hooks of `torch.nn.utils.weight_norm`,
    `torch.nn.utils.spectral_norm` and `torch.nn.utils.prune`. Any other plain tensor instead of a parameter
    is described as "code of its own".
    """
    if parametrize.is_parametrized(module, attribute):
        steps: Any = module.parametrizations[attribute]  # type: ignore[index]
        return f"a parametrization ({', '.join(type(step).__name__.lstrip('_') for step in steps)})"
    for hook, name in _find_weight_hooks(module):
        if name == attribute:
            return f"a hook ({type(hook).__name__})"
    value = vars(module).get(attribute)
    return "code of its own" if isinstance(value, torch.Tensor) else None


def list_computed_attributes(module: nn.Module) -> list[str]:
    """Return the names of a module's tensors that parametrizations or known hooks compute."""
    by_hooks = [
        name for _, name in _find_weight_hooks(module) if isinstance(vars(module).get(name), torch.Tensor)
    ]
    if not parametrize.is_parametrized(module):
        return list(dict.fromkeys(by_hooks))
    return list(dict.fromkeys([*module.parametrizations, *by_hooks]))  # type: ignore[misc]


def is_hook_input(module: nn.Module, attribute: str) -> bool:
    """Return whether a hook computes another tensor from this parameter."""
    return any(
        attribute in (f"{name}_g", f"{name}_v", f"{name}_orig") and attribute != name
        for _, name in _find_weight_hooks(module)
    )


def read_weight(module: nn.Module, attribute: str = "weight") -> torch.Tensor:
    """Return the current value of a weight, detached.

    A computed weight is recomputed, as in a forward pass in evaluation mode: after a step of an optimizer the
    tensor that a hook has stored is out of date. Buffers, training flags and random states are restored
    afterwards, and the cache of ``parametrize.cached()`` is not used.

    Raises
    ------
    TypeError
        For a tensor that unknown code computes.
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
    """Return a stored tensor of the shape of a weight; None if the weight must be computed for its shape."""
    tensor: Any = module._parameters.get(attribute)
    if tensor is None and parametrize.is_parametrized(module, attribute):
        steps: Any = module.parametrizations[attribute]  # type: ignore[index]
        tensor = steps.original if steps.is_tensor and not steps.unsafe else None
    elif tensor is None:
        tensor = vars(module).get(attribute)
    return tensor if isinstance(tensor, torch.Tensor) else None


def explain_unreadable(module: nn.Module, attribute: str = "weight") -> str | None:
    """Explain why a weight is no matrix of real floating-point numbers; return None if it is one.

    The text continues a sentence with the layer as its subject: "is torch.uint8". Unreadable are integers,
    booleans, complex and quantised numbers, 4-bit weights of bitsandbytes, floats of 8 bits (their scales are
    stored elsewhere), tensor subclasses that contain other tensors, sparse and empty tensors, and parameters
    of lazy modules.
    """
    if attribute in PACKED_ATTRIBUTES:
        return f"is packed ({type(module).__name__}.{attribute})"
    weight: Any = module._parameters.get(attribute)
    if weight is None:
        if describe_computation(module, attribute) == "code of its own":
            return "is a plain tensor, which code of the layer's own computes"
        weight = read_weight(module, attribute)
    if is_lazy(weight):
        return "is not initialised yet (its module is lazy: run a batch through the model first)"
    if weight.ndim < 2:
        return f"has shape {tuple(weight.shape)}, as the shards of a weight have"
    if getattr(weight, "quant_state", None) is not None:
        return f"is packed ({type(weight).__name__})"
    if weight.is_quantized or not weight.dtype.is_floating_point:
        return f"is {weight.dtype}"
    if torch.finfo(weight.dtype).bits < 16:
        return f"is {weight.dtype}, whose scale is elsewhere"
    if weight.layout != torch.strided:
        return f"is sparse ({weight.layout})"
    if _has_inner_tensors(weight):
        return f"is packed ({type(weight).__name__})"
    if weight.numel() == 0:
        return f"is empty, with shape {tuple(weight.shape)}"
    return None


@contextmanager
def isolate_modules(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules compute in evaluation mode on copies of their tensors, and restore the originals after.

    Tensors and containers of all `modules` are copied, so use it for a few modules only. The originals
    are never written to. Random states of PyTorch, NumPy and Python are restored. State in objects other than
    the modules is not restored.
    """
    saved = [(module, dict(vars(module))) for module in dict.fromkeys(modules)]
    copies: dict[int, Any] = {}
    tensors = [tensor for module, _ in saved for tensor in _list_tensors(module)]
    with ExitStack() as stack:
        stack.enter_context(preserve_random_state(tensors))
        for kind in sorted({tensor.device.type for tensor in tensors} - {"meta"}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_disable_caches())
        try:
            for module, state in saved:
                vars(module).update({name: _copy_value(value, copies) for name, value in state.items()})
                vars(module)["training"] = False
            yield
        finally:
            for module, state in saved:
                for name in vars(module).keys() - state.keys():
                    del vars(module)[name]
                vars(module).update(state)


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Restore a model's buffers and attributes, and the random states, after the model has run in the block.

    Restored attributes are tensors, numbers, strings and random generators. Parameters, and train or eval
    modes, are left to the caller. Only changed values are written: writing to a tensor makes a backward pass
    fail that needs it.
    """
    # Lazy modules learn their sizes when they run.
    modules = [module for module in model.modules() if not isinstance(module, LazyModuleMixin)]
    holders: list[dict[str, Any]] = [each for module in modules for each in (module._buffers, vars(module))]
    saved: list[tuple[dict[str, Any], str, Any, Any]] = [
        (holder, name, value, value.clone() if isinstance(value, torch.Tensor) else value)
        for holder in holders
        for name, value in holder.items()
        if name != "training" and (value is None or isinstance(value, (torch.Tensor, int, float, str)))
    ]
    generators = [
        (value, value.get_state())
        for module in modules
        for value in vars(module).values()
        if isinstance(value, torch.Generator)
    ]
    # A cache would pass tensors without gradients to the next forward pass.
    with preserve_random_state([*model.parameters(), *model.buffers()]), _disable_caches():
        try:
            yield
        finally:
            for holder, name, value, before in saved:
                if isinstance(value, torch.Tensor) and not torch.equal(value, before):
                    with torch.no_grad():
                        value.copy_(before)
                if holder.get(name) is not value:
                    holder[name] = value
            for generator, state in generators:
                generator.set_state(state)


@contextmanager
def _disable_caches() -> Iterator[None]:
    """Switch off ``parametrize.cached()`` in the block."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


@contextmanager
def preserve_random_state(tensors: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Restore the global random states of PyTorch (CPU and the tensors' devices), NumPy and Python."""
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
    for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
        if isinstance(value, torch.Tensor) and not is_lazy(value):
            yield value


def _copy_value(value: Any, copies: dict[int, Any]) -> Any:
    """Copy a tensor, a random generator, or a container of these; return any other value itself."""
    if id(value) in copies:
        return copies[id(value)]
    result = value
    if isinstance(value, torch.Tensor) and not is_lazy(value):
        result = value.detach().clone()
    elif isinstance(value, torch.Generator):
        result = torch.Generator(value.device)
        result.set_state(value.get_state())
    elif isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
        result = copy.deepcopy(value)
    elif isinstance(value, (dict, list)):
        result = copies[id(value)] = copy.copy(value)  # before its contents, which may contain it
        for key in list(result) if isinstance(result, dict) else range(len(result)):
            result[key] = _copy_value(result[key], copies)
    elif type(value) is tuple:
        result = tuple(_copy_value(entry, copies) for entry in value)
    elif isinstance(value, set):
        result = copy.copy(value)
    copies[id(value)] = result
    return result


def _find_weight_hooks(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Yield each forward pre-hook that computes a tensor of the module, with the tensor's name, in order."""
    for hook in module._forward_pre_hooks.values():
        if hasattr(hook, "compute_weight") and isinstance(getattr(hook, "name", None), str):
            yield hook, hook.name  # type: ignore[attr-defined]
        elif hasattr(hook, "apply_mask") and isinstance(getattr(hook, "_tensor_name", None), str):
            yield hook, hook._tensor_name  # type: ignore[attr-defined]


def _has_inner_tensors(tensor: torch.Tensor) -> bool:
    """Return whether a tensor consists of other tensors, as torchao's do; a DTensor does not count."""
    if type(tensor) in (torch.Tensor, nn.Parameter) or "DTensor" in type(tensor).__name__:
        return False
    return hasattr(type(tensor), "__tensor_flatten__")
