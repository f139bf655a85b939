# SPDX-License-Identifier: MIT
"""Markdown tables from the result of a benchmark run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from .peers import LABELS
from .record import describe_machine, format_seconds

__all__ = ["markdown"]

_SYMBOLS: Final = {"dim": "d", "n_outputs": "K", "depth": "L", "n_samples": "N"}


def markdown(results: Mapping[str, Any]) -> str:
    """Return a table for every case of a result whose peers were compared.

    Parameters
    ----------
    results : mapping
        Content of a file from ``dlnfast bench --out``.

    Returns
    -------
    str
        Peers in rows, settings in columns: median seconds of a step (least .. largest); the machine below.
        Cases that compare no peers have no table.
    """
    return "\n\n".join(part for case in _flatten(results) for part in _case(case))


def _flatten(results: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for result in results["results"]:
        yield from result["sweeps"].values() if "sweeps" in result else [result]


def _case(result: Mapping[str, Any]) -> Iterator[str]:
    rows = result["rows"]
    if not rows or "setting" not in rows[0]:
        return
    kind = "bytes" if "bytes" in rows[0] else "seconds"
    yield f"**{result['case']}**{_describe_constant(rows)}: " + (
        "memory at its peak" if kind == "bytes" else "time of a step, median (least .. largest)"
    )
    names = dict.fromkeys(name for row in rows for name in (*row[kind], *row["skipped"]))
    lines = ["| | " + " | ".join(_heading(rows, row) for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    lines += [
        f"| {LABELS[name]} | " + " | ".join(_cell(row, kind, name) for row in rows) + " |" for name in names
    ]
    lines += _rates(rows)
    yield "\n".join(lines)
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, reason in row["skipped"].items():
            reasons.setdefault(reason, {})[LABELS[name]] = None
    foot = [f"Skipped: {', '.join(labels)} ({reason})." for reason, labels in reasons.items()]
    yield " ".join([*foot, describe_machine(result["machine"]) + f"; {_packages(result['machine'])}."])


def _packages(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)


def _list_varying(rows: Any) -> list[str]:
    names = [name for name in _SYMBOLS if len({row["setting"][name] for row in rows}) > 1]
    # N = d and K = d say nothing new beside d.
    if "dim" in names:
        names = [n for n in names if n == "dim" or any(r["setting"][n] != r["setting"]["dim"] for r in rows)]
    return names


def _heading(rows: Any, row: Mapping[str, Any]) -> str:
    if "n_threads" in row:
        return f"{row['n_threads']} threads" if row["n_threads"] > 1 else "1 thread"
    names = _list_varying(rows) or ["dim"]
    return ", ".join(f"{_SYMBOLS[name]} = {row['setting'][name]}" for name in names)


def _describe_constant(rows: Any) -> str:
    first, names = rows[0]["setting"], _list_varying(rows)
    parts = []
    for name, symbol in _SYMBOLS.items():
        if name in names:
            continue
        if name != "dim" and all(row["setting"][name] == row["setting"]["dim"] for row in rows):
            parts.append(f"{symbol} = d")
        else:
            parts.append(f"{symbol} = {first[name]}")
    return f", {', '.join(parts)}" if parts else ""


def _cell(row: Mapping[str, Any], kind: str, name: str) -> str:
    if name not in row[kind]:
        return "-"
    value = row[kind][name]
    if kind == "bytes":
        return f"{value / 1e6:.1f} MB"
    spread = " .. ".join(format_seconds(value[end]) for end in ("least", "largest"))
    return f"{format_seconds(value['median'])} ({spread})"


def _rates(rows: Any) -> list[str]:
    if "rate" not in rows[0]:
        return []
    kind = rows[0]["rate"]["kind"]
    unit, machine = ("GB/s", "triad") if kind == "triad" else ("GF/s", "numpy.matmul")
    lines = {f"{machine}, same run": [row["rate"]["machine_per_second"]["median"] for row in rows]}
    if all("dlnfast-dense" in row["rate"]["per_second"] for row in rows):
        of = rows[0]["rate"]["work"].split(":")[0]
        lines[f"dlnfast dense, of {of}"] = [row["rate"]["per_second"]["dlnfast-dense"] for row in rows]
    return [
        f"| {name} | " + " | ".join(f"{value / 1e9:.1f} {unit}" for value in values) + " |"
        for name, values in lines.items()
    ]
