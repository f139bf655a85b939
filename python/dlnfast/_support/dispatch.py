# SPDX-License-Identifier: MIT
"""The compiled core, `core`, in the build for this processor.

The same core is compiled once per instruction-set level (`_core`, `_core_v3`, `_core_v4`). The highest
level that the processor supports is imported; the environment variable ``DLNFAST_LEVEL`` selects another.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from .. import _cpu

if TYPE_CHECKING:
    from .. import _core as core

__all__ = ["available_levels", "core", "is_forked"]

_PROCESS = os.getpid()
_MODULES = {"baseline": "_core", "v3": "_core_v3", "v4": "_core_v4"}


def _import_level(level: str) -> Any:
    return importlib.import_module(f"..{_MODULES[level]}", __package__)


def available_levels() -> list[str]:
    """Return the levels that were built and that this processor supports, lowest first."""
    available = []
    for level in _cpu.supported_levels():
        try:
            module = _import_level(level)
        except ModuleNotFoundError:
            continue
        available.append(str(module.build_info()["level"]))
    return available


def is_forked() -> bool:
    """Return whether this process was forked after the import."""
    return os.getpid() != _PROCESS


def _load() -> Any:
    wanted = os.environ.get("DLNFAST_LEVEL")
    supported = _cpu.supported_levels()
    if wanted is None:
        for level in reversed(supported):
            try:
                return _import_level(level)
            except ModuleNotFoundError:
                continue
        raise ImportError("no compiled core of dlnfast was found; reinstall the package")
    if wanted not in _MODULES:
        raise ImportError(f"DLNFAST_LEVEL is {wanted!r}; wanted one of {', '.join(_MODULES)}")
    if wanted not in supported:
        raise ImportError(f"DLNFAST_LEVEL is {wanted!r}; this processor runs {', '.join(supported)}")
    try:
        return _import_level(wanted)
    except ModuleNotFoundError:
        raise ImportError(f"DLNFAST_LEVEL is {wanted!r}; this build does not have that level") from None


if not TYPE_CHECKING:
    core = _load()

# OpenMP's threads do not exist in the child of a fork: the child computes with one thread.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=core.forbid_threads)
