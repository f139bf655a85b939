# SPDX-License-Identifier: MIT
"""Layer names without the parts that model wrappers (DataParallel, torch.compile, FSDP, ..) add to them."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from torch import nn

#: Wrapper classes, which compute the same function as the model or layer inside: the Python module of the
#: class, the class, and the name of the child. Only loaded Python modules are looked up, because importing
#: some of them takes seconds.
_WRAPPERS: Final = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        "_fsdp_wrapped_module",
    ),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    ("lightning.fabric.wrappers", "_FabricModule", "_forward_module"),
)
_GLOB: Final = re.compile(r"[*?\[]")
_WRAPPED: Final = frozenset(child for _, _, child in _WRAPPERS)


def strip_wrapper_parts(name: str) -> str:
    """Return a name without all parts that can come from a wrapper: ``"module.fc"`` becomes ``"fc"``.

    Use it to compare two names of which one may belong to a wrapped model. If the model is at hand, use
    `named_layers`, which keeps the name of a child that is called ``module`` but is in no wrapper.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def named_layers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield ``(name, path, module)`` of all modules except wrappers, in the order of registration.

    The path is the name in ``model.named_modules()``. The name is the path without the parts that wrappers
    add; wrappers are recognized by their types.

    Raises
    ------
    ValueError
        If two modules have the same name.
    """
    names: dict[str, str] = {}
    paths: dict[str, str] = {}
    wrapped = {path: _find_wrapped_child(module) for path, module in model.named_modules()}
    for path, module in model.named_modules():
        parent, _, child = path.rpartition(".")
        if not path or wrapped[parent] == child:
            name = names.get(parent, "")
        else:
            name = f"{names[parent]}.{child}" if names[parent] else child
        names[path] = name
        if wrapped[path] is not None:
            continue
        if name in paths:
            raise ValueError(f"model has two modules named {name!r}: {paths[name]!r} and {path!r}")
        paths[name] = path
        yield name, path, module


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers, or the model itself if it has none."""
    while (child := _find_wrapped_child(model)) is not None:
        model = model.get_submodule(child)
    return model


def match_names(wanted: Iterable[str], available: Iterable[str]) -> dict[str, str]:
    """Map each wanted name to the available name of the same layer; names without a match are left out.

    Two names match if they are equal, or else if they are equal without the parts of wrappers (see
    `strip_wrapper_parts`).

    Raises
    ------
    ValueError
        If several available names match a wanted one.
    """
    known = dict.fromkeys(available)
    by_canonical: dict[str, list[str]] = {}
    for name in known:
        by_canonical.setdefault(strip_wrapper_parts(name), []).append(name)
    found: dict[str, str] = {}
    for name in wanted:
        matches = [name] if name in known else by_canonical.get(strip_wrapper_parts(name), [])
        if len(matches) > 1:
            raise ValueError(f"layer {name!r} can be {' or '.join(map(repr, matches))}; wanted one of these")
        if matches:
            found[name] = matches[0]
    return found


def match_every_name(wanted: Iterable[str], available: Iterable[str], argument: str) -> dict[str, str]:
    """Map each wanted name to an available one, as `match_names` does.

    Raises
    ------
    ValueError
        If a name has no match; the message begins with the argument and lists the names.
    """
    known = list(available)
    found = match_names(wanted, known)
    for name in wanted:
        if name not in found:
            raise ValueError(f"{argument}: {name!r} fits none of the weight matrices {format_names(known)}")
    return found


def _find_wrapped_child(module: nn.Module) -> str | None:
    """Return the name of the child that a wrapper contains; None if the module is no wrapper."""
    for where, kind, child in _WRAPPERS:
        wrapper = getattr(sys.modules.get(where), kind, None)
        if wrapper is not None and isinstance(module, wrapper) and child in module._modules:
            return child
    return None


def is_glob(choice: str) -> bool:
    """Return whether a choice of names has wildcards."""
    return _GLOB.search(choice) is not None


def is_match(name: str, choice: object) -> bool:
    """Return whether a name is chosen by a name, a glob, or a compiled regular expression.

    Raises
    ------
    TypeError
        If the choice is another object.
    """
    if isinstance(choice, re.Pattern):
        return choice.search(name) is not None
    if not isinstance(choice, str):
        raise TypeError(f"layers holds {type(choice).__name__}; wanted names, globs or regular expressions")
    return fnmatch.fnmatchcase(name, choice) if is_glob(choice) else name == choice


def format_names(names: Sequence[str]) -> str:
    """Return names as a list for messages; names in the middle of long lists are left out."""
    return ", ".join(names) if len(names) <= 12 else ", ".join([*names[:6], "..", *names[-3:]])
