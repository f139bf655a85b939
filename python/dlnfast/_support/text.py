# SPDX-License-Identifier: MIT
"""Tables and counts in texts for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text with aligned columns, the first one to the left.

    Cells may have several lines, which are aligned at the last one: line breaks in the head keep columns of
    numbers narrow.
    """
    lines = [line for row in rows for line in _split_lines(row)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _split_lines(row: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the lines of a row, from the first one."""
    cells = [cell.split("\n")[::-1] for cell in row]
    return list(zip_longest(*cells, fillvalue=""))[::-1]


def format_count(count: int, singular: str, plural: str) -> str:
    """Return a number and what it counts, such as "1 matrix" and "2 matrices"."""
    return f"{count} {singular if count == 1 else plural}"
