# SPDX-License-Identifier: MIT
"""Files with one JSON object per line and a checksum in each, to which finished work is appended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .files import decode_text, parse_object, with_checksum, without_checksum


def read_lines(
    path: Path, check: Callable[[dict[str, Any]], dict[str, Any]] = lambda record: record
) -> list[dict[str, Any]]:
    """Return the objects of a file in their order, each once; none where there is no file.

    Parameters
    ----------
    path : Path
        The file. An incomplete last line is left out; the next `append_line` removes it.
    check : callable
        Function that returns an object, or raises a ValueError, TypeError or KeyError.

    Raises
    ------
    ValueError
        If a line is damaged, naming its number, or `check` refuses it.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = content[: content.rfind(b"\n") + 1]
    records = []
    known: set[str] = set()
    # Not splitlines: JSON may hold other characters that end lines.
    for number, line in enumerate(decode_text(whole, path).split("\n")[:-1], 1):
        if line in known:  # a copied line
            continue
        known.add(line)
        try:
            records.append(check(without_checksum(parse_object(line))))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"line {number} of {path} is damaged: {error}") from error
    return records


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append an object with its checksum; its line is on the disk when this returns.

    Raises
    ------
    OSError
        If the line cannot be written. The file then has the lines that it had before.
    """
    line = json.dumps(with_checksum(record)).encode() + b"\n"
    # Unbuffered: a buffer would be written at closing even after an error.
    with path.open("a+b", buffering=0) as file:
        file.seek(0)
        end = file.read().rfind(b"\n") + 1  # of the last whole line
        file.truncate(end)
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.truncate(end)
            raise
