# SPDX-License-Identifier: MIT
"""The compiled modules that were built and that this processor runs."""

from __future__ import annotations

import importlib
from types import ModuleType

from dlnfast._support import dispatch


def _find_modules() -> dict[str, ModuleType]:
    names = dispatch.MODULE_OF_LEVEL
    return {
        level: importlib.import_module(f"dlnfast.{names[level]}") for level in dispatch.available_levels()
    }


#: {instruction-set level: module}
MODULES = _find_modules()
