# SPDX-License-Identifier: MIT
"""Find weights that other tensors share, or that other modules read directly."""

from __future__ import annotations

import dis
import inspect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final

import torch
from torch import nn

from ._names import named_layers

#: Attributes of a weight that do not depend on its values: ``self.fc.weight.dtype`` does not read the weight.
_PROPERTIES: Final = frozenset(
    {"data_ptr", "device", "dim", "dtype", "element_size", "get_device", "is_cuda", "is_floating_point"}
    | {"is_meta", "layout", "ndim", "ndimension", "nelement", "numel", "requires_grad", "shape", "size"}
)


@dataclass(frozen=True)
class WeightUse:
    """Uses of the weights of a model's layers, found by `find_weight_use`; all keys are ids of modules.

    Attributes
    ----------
    sharing : dict of int to tuple of str
        Names of tensors that share memory with the module's weight; the weight of another module is named by
        that module.
    readers : dict of int to Module
        Another module that reads the weight in its forward pass, whether it also calls the module or not.
    parent_names : dict of int to tuple of str
        Names under which parent modules register the module.
    attribute_readers : dict of int to (Module, str)
        Another module whose forward pass reads an attribute of the module, such as ``self.fc.weight.dtype``,
        and the attribute. Attributes that a `torch.nn.Sequential` has, too, do not count.
    """

    sharing: dict[int, tuple[str, ...]]
    readers: dict[int, nn.Module]
    parent_names: dict[int, tuple[str, ...]]
    attribute_readers: dict[int, tuple[nn.Module, str]]


def find_weight_use(model: nn.Module) -> WeightUse:
    """Find the weights of a model that are shared with other tensors, or read by other modules.

    Parameters
    ----------
    model : Module
        Model to inspect; it is not run.

    Returns
    -------
    WeightUse

    Notes
    -----
    Reads are found in the bytecode of ``forward`` and of the methods that it names: ``self.fc.weight`` and
    longer attribute paths, but not a weight that is reached through a variable or an index.
    `torch.nn.TransformerEncoderLayer` does not count as a reader: it calls its layers if one of them has a
    hook.
    """
    return WeightUse(
        _find_sharing(model), _find_readers(model), _find_parent_names(model), _find_attribute_readers(model)
    )


def _find_parent_names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    found: dict[int, list[str]] = defaultdict(list)
    for path, _, module in named_layers(model):
        for name, child in module._modules.items():
            if child is not None:
                found[id(child)].append(f"{path}.{name}".lstrip("."))
    return {key: tuple(names) for key, names in found.items()}


@dataclass(frozen=True)
class _TensorRange:
    """A tensor of a module, and its range of bytes in a storage: start included, end excluded."""

    name: str
    module: nn.Module
    attribute: str
    #: Device and address of the storage.
    storage: tuple[str, int]
    start: int
    end: int


def _find_sharing(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return the names of the tensors that share memory with each module's weight, by the module's id."""
    found: dict[int, tuple[str, ...]] = {}
    for group in _group_ranges(list(_list_ranges(model))):
        for weight in group:
            names = tuple(
                other.name
                for other in group
                if other is not weight and other.start < weight.end and weight.start < other.end
            )
            if weight.attribute == "weight" and names:
                found[id(weight.module)] = names
    return found


def _list_ranges(model: nn.Module) -> Iterator[_TensorRange]:
    for path, _, module in named_layers(model):
        for attribute, tensor in _list_tensors(module):
            name = path if path and attribute == "weight" else f"{path}.{attribute}".lstrip(".")
            storage, start, end = _find_memory(tensor)
            yield _TensorRange(name, module, attribute, (str(tensor.device), storage), start, end)


def _group_ranges(ranges: list[_TensorRange]) -> Iterator[list[_TensorRange]]:
    """Yield groups of ranges, such that ranges of different groups do not overlap."""
    group: list[_TensorRange] = []
    for each in sorted(ranges, key=lambda entry: (entry.storage, entry.start)):
        if group and (each.storage != group[0].storage or each.start >= max(r.end for r in group)):
            yield group
            group = []
        group.append(each)
    if group:
        yield group


def _list_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for holder in (module._parameters, module._buffers, vars(module)):
        for name, tensor in holder.items():
            if isinstance(tensor, torch.Tensor):
                yield name, tensor


def _find_memory(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return the address of a tensor's storage, and the range of its bytes there.

    A tensor without memory of its own, such as one on the device "meta", shares memory with itself only.
    """
    try:
        storage = tensor.untyped_storage().data_ptr()
        if storage and tensor.numel():
            size, start = tensor.element_size(), tensor.storage_offset()
            last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            return storage, int(start * size), int((start + last + 1) * size)
    except (NotImplementedError, RuntimeError, ValueError):
        pass
    return -id(tensor), 0, 1


def _find_attribute_readers(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    found: dict[int, tuple[nn.Module, str]] = {}
    paths: dict[type, list[tuple[str, ...]]] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in paths:
            paths[kind] = list(_find_paths_read(kind))
        for path in paths[kind]:
            target = module
            for name in path:
                child = target._modules.get(name)
                if child is None:
                    if target is not module and not hasattr(nn.Sequential, name) and name != "training":
                        found.setdefault(id(target), (module, name))
                    break
                target = child
    return found


def _find_readers(model: nn.Module) -> dict[int, nn.Module]:
    reads: dict[type, frozenset[tuple[str, ...]]] = {}
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in reads:
            reads[kind] = frozenset(_find_weights_read(kind))
        for path in reads[kind]:
            target: nn.Module | None = module
            for name in path:
                target = None if target is None else target._modules.get(name)
            if target is not None:
                found.setdefault(id(target), module)
    return found


def _find_weights_read(kind: type) -> Iterator[tuple[str, ...]]:
    """Yield the attribute paths of modules that have their weight read by the forward pass of a class."""
    for chain in _find_paths_read(kind):
        for i, name in enumerate(chain):
            if name == "weight" and i > 0 and not _PROPERTIES.intersection(chain[i + 1 : i + 2]):
                yield chain[:i]


def _find_paths_read(kind: type) -> Iterator[tuple[str, ...]]:
    """Yield the attribute paths that the forward pass of a class reads, and the methods that it names."""
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        method = waiting.pop()
        if method in seen or (method != "forward" and hasattr(nn.Module, method)):
            continue
        seen.add(method)
        for code in _find_code(kind, method):
            for chain in _find_attribute_paths(code, code.co_varnames[0]):
                waiting.append(chain[0])
                yield chain


def _find_code(kind: type, method: str) -> Iterator[CodeType]:
    """Yield the code of a method or property of a class and, if it calls ``super``, of the base classes."""
    for base in kind.__mro__:
        found: Any = vars(base).get(method)
        for inner in ("__func__", "fget", "func"):
            found = getattr(found, inner, found)
        code = getattr(inspect.unwrap(found), "__code__", None)
        if found is None or found is nn.TransformerEncoderLayer.forward:
            continue  # reads weights only if none of its layers has a hook
        if isinstance(code, CodeType) and code.co_argcount:
            yield code
        if not isinstance(code, CodeType) or "super" not in code.co_names:
            return


def _find_attribute_paths(code: CodeType, own: str) -> Iterator[tuple[str, ...]]:
    """Yield ``("a", "b")`` for each ``own.a.b`` in a function and in the functions inside of it."""
    chain: list[str] | None = None
    before: object = None
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if chain is not None and name in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(value)
            continue
        if chain:
            yield tuple(chain)
        chain = None
        # ``isinstance(own.a.b, ..)`` does not read the weight.
        is_type_check, before = before == "isinstance", value
        if is_type_check:
            continue
        if name.startswith("LOAD_") and ("FAST" in name or "DEREF" in name):
            # Python 3.13 has an instruction that loads two variables.
            loaded = value[-1] if isinstance(value, tuple) else value
            chain = [] if loaded == own else None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _find_attribute_paths(constant, own)
