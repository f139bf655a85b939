# SPDX-License-Identifier: MIT
"""Sections of TOML files: reading, checks whose messages name section.key, and help texts."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._support.files import read_text
from .._support.keys import Key

__all__ = ["SpecError", "check_names", "check_section", "describe_keys", "join_names", "read_toml"]


class SpecError(ValueError):
    """A specification has an unknown, missing or wrong entry; the message names section.key."""


def read_toml(
    path: str | os.PathLike[str], changes: Iterable[str] = (), paths: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the tables of a TOML file, with changes applied.

    Parameters
    ----------
    path : path
        The file.
    changes : iterable of str
        ``"section.key=value"`` with a TOML value. Other text counts as a string, in case the shell has
        removed the quotes.
    paths : iterable of str
        ``"section.key"`` of entries that are paths: relative ones in the file start from its folder, those in
        changes from the current one.

    Raises
    ------
    SpecError
        For text that is not TOML.
    OSError
        If the file cannot be read.
    """
    file = Path(path)
    try:
        raw = tomllib.loads(read_text(file))
    except RecursionError:
        raise SpecError(f"{file} is not a TOML file: it is nested too deeply") from None
    except ValueError as error:  # not TOML, not UTF-8, an integer of more digits than Python reads
        raise SpecError(f"{file} is not a TOML file: {error}") from None
    for entry in paths:
        section, _, key = entry.partition(".")
        table = raw.get(section)
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = str(file.parent / table[key])
    for change in changes:
        _apply(change, raw)
    return raw


def check_names(raw: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise `SpecError` for an entry that is not a section of one of these names."""
    known = list(names)
    for name, table in raw.items():
        if name not in known:
            raise SpecError(f"{name} is not a section; wanted {join_names(f'[{n}]' for n in known)}")
        if not isinstance(table, dict):
            raise SpecError(f"{name} is {table!r}; wanted a section, [{name}]")


def check_section(
    name: str, table: Mapping[str, Any], keys: Mapping[str, Key], which: str = ""
) -> dict[str, Any]:
    """Return a section with its defaults; raise `SpecError` for unknown, missing and wrong entries."""
    for key in table:
        if key not in keys:
            allowed = join_names(["kind", *keys] if name == "problem" else keys)
            raise SpecError(f"{name}.{key} is not a setting{which}; wanted {allowed}")
    result = {}
    for key, rule in keys.items():
        value = table.get(key)
        if value is None:
            if rule.required:
                raise SpecError(f"{name}.{key} is missing; wanted {rule.wanted}")
            value = rule.default
        elif not rule.accepts(value):
            raise SpecError(f"{name}.{key} is {value!r}; wanted {rule.wanted}")
        result[key] = value
    return result


def describe_keys(keys: Mapping[str, Key]) -> Iterator[str]:
    """Yield a line for each key with its allowed values and its default, and one with its help text."""
    width = max(map(len, keys))
    for key, rule in keys.items():
        status = f"default {json.dumps(rule.default)}"
        if rule.default is None:
            status = "required" if rule.required else "optional"
        yield f"  {key:<{width}}  {rule.wanted}; {status}"
        if rule.help:
            yield f"  {'':<{width}}    {rule.help}"


def _apply(change: str, raw: dict[str, Any]) -> None:
    name, equals, text = change.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise SpecError(f"--set has {change!r}; wanted section.key=value")
    try:
        value = tomllib.loads(f"value = {text.strip()}\n")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    table = raw.setdefault(section, {})
    if not isinstance(table, dict):
        raise SpecError(f"{section} is {table!r}; wanted a section, [{section}]")
    table[key] = value


def join_names(names: Iterable[str]) -> str:
    """Return names as a list in a message."""
    return "one of " + ", ".join(names)
