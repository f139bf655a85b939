# SPDX-License-Identifier: MIT
"""The engines by name. An engine is imported when a run asks for it.

To add an engine, write a class as `engines.Engine` describes, and enter its module and its name here.
"""

from __future__ import annotations

from typing import Final

#: Name of an engine -> "module:class".
ENGINES: Final[dict[str, str]] = {
    "auto": "dlnfast._training.core_engines:AutomaticEngine",
    "reduced": "dlnfast._training.core_engines:ReducedEngine",
    "dense": "dlnfast._training.core_engines:DenseEngine",
    "torch": "dlnfast.torch.engine:TorchEngine",
}


def split_engine(text: str) -> tuple[str, str]:
    """Return the name of an engine and its device, which is empty without one."""
    name, _, device = text.partition(":")
    return name, device


def is_engine_name(text: object) -> bool:
    """Return whether this names an engine, with or without a device."""
    return isinstance(text, str) and split_engine(text)[0] in ENGINES and not text.endswith(":")


def check_engine_name(text: object) -> None:
    """Raise unless a value is the name of an engine."""
    if not is_engine_name(text):
        wanted = ", ".join(map(repr, ENGINES))
        raise ValueError(f"engine is {text!r}; wanted one of {wanted}, or 'torch:DEVICE'")
