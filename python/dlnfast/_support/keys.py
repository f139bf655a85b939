# SPDX-License-Identifier: MIT
"""Keys of specifications: the values that an entry of a TOML table accepts, and their description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

__all__ = [
    "Key",
    "boolean",
    "choice",
    "integer",
    "is_integer",
    "is_list_of",
    "is_number",
    "named_table",
    "number",
    "per_layer",
    "rate",
    "string",
]


@dataclass(frozen=True)
class Key:
    """One entry of a table.

    Attributes
    ----------
    accepts : callable
        Returns whether a value is allowed.
    wanted : str
        The allowed values in words, for messages and ``--help``.
    default : object
        Value of a missing entry.
    required : bool
        Whether the entry must be there.
    help : str
        One sentence for ``--help``; empty for keys whose name says enough.
    """

    accepts: Callable[[Any], bool]
    wanted: str
    default: Any = None
    required: bool = False
    help: str = ""

    def explained(self, text: str) -> Key:
        """Return the key with a sentence for ``--help``."""
        return replace(self, help=text)


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is an integer or a float."""
    return is_integer(value) or isinstance(value, float)


def is_list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return the rule for nonempty lists of values that another rule accepts."""
    return lambda value: isinstance(value, list) and len(value) > 0 and all(accepts(v) for v in value)


def integer(default: int | None = None, *, required: bool = False) -> Key:
    """Return the key of an integer."""
    return Key(is_integer, "an integer", default, required)


def number(default: float | None = None) -> Key:
    """Return the key of a number."""
    return Key(is_number, "a number", default)


def per_layer(default: float | None = None, *, required: bool = False, auto: bool = False) -> Key:
    """Return the key of a number, or one for each layer."""
    many = is_list_of(is_number)
    wanted = "a number, or a list with one per layer" + (', or "auto"' if auto else "")
    return Key(lambda v: is_number(v) or many(v) or (auto and v == "auto"), wanted, default, required)


def rate(*, auto: bool = False) -> Key:
    """Return the key of a number, one for each layer, or the table of a schedule."""
    constant = per_layer(auto=auto)
    return Key(
        lambda v: constant.accepts(v) or (isinstance(v, dict) and "schedule" in v),
        f'{constant.wanted}, or a table such as {{schedule = "cosine", peak = 0.1, steps = 100}}',
    )


def named_table(*names: str) -> Key:
    """Return the key of a name, or of a table with a name and settings."""
    listed = ", ".join(f'"{name}"' for name in names)
    return Key(
        lambda v: isinstance(v, str) or (isinstance(v, dict) and isinstance(v.get("name"), str)),
        f'one of {listed}, or a table such as {{name = "muon", momentum = 0.9}}',
    )


def string(default: str | None = None, *, required: bool = False) -> Key:
    """Return the key of a string."""
    return Key(lambda v: isinstance(v, str), "a string", default, required)


def boolean(default: bool) -> Key:
    """Return the key of true or false."""
    return Key(lambda v: isinstance(v, bool), "true or false", default)


def choice(default: str, *names: str) -> Key:
    """Return the key of one of several strings."""
    return Key(lambda v: v in names, "one of " + ", ".join(f'"{name}"' for name in names), default)
