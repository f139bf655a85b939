# SPDX-License-Identifier: MIT
"""The compiled modules that were built and that this processor runs."""

from __future__ import annotations

import importlib
from types import ModuleType

from dlnfast import _cpu

_MODULE_OF_LEVEL = {"baseline": "_core", "v3": "_core_v3", "v4": "_core_v4"}


def _find_modules() -> dict[str, ModuleType]:
    found = {}
    for level in _cpu.supported_levels():
        try:
            module = importlib.import_module(f"dlnfast.{_MODULE_OF_LEVEL[level]}")
        except ModuleNotFoundError:  # a build of a single level
            continue
        found[module.build_info()["level"]] = module
    return found


#: {instruction-set level: module}
MODULES = _find_modules()
