# SPDX-License-Identifier: MIT
"""``dlnfast bench``: times beside other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._config.runs import write_json
from .._support.arrays import check_count
from .._support.files import translate_read_errors
from ..benchmarks import cases, record, tables
from ..benchmarks.peers import PEERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description and the arguments of the command."""
    parser.description = (
        "Time dlnfast beside NumPy and, where they are installed, PyTorch and JAX, in turns.\n"
        "All are checked to compute the same losses before they are timed."
    )
    parser.epilog = "\n".join(["cases:", *_case_lines()])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--case",
        dest="cases",
        choices=list(cases.CASES),
        metavar="CASE",
        nargs="+",
        action="extend",
        help=f"cases to measure, from the list below (default: {' '.join(cases.DEFAULT)})",
    )
    parser.add_argument(
        "--peers",
        choices=list(PEERS),
        metavar="PEER",
        nargs="+",
        default=list(PEERS),
        help=f"implementations to time: {', '.join(PEERS)} (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that everything runs")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds of turns (default: 5, quick 2)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="where to write results, machine and versions"
    )
    parser.add_argument("--read", type=Path, metavar="FILE.json", help="measure nothing, take such a file")
    parser.add_argument("--table", action="store_true", help="print Markdown tables of the results too")
    parser.set_defaults(timed=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    if arguments.read is not None:
        if arguments.cases or arguments.out or arguments.quick or arguments.repeats is not None:
            raise ValueError(
                "--read measures nothing; wanted no --case, --quick, --repeats or --out beside it"
            )
        results = cases.read_results(arguments.read)
        with translate_read_errors(arguments.read, "dlnfast bench"):
            text = tables.markdown(results)
        print(text)
        return 0
    repeats = 2 if arguments.quick else 5
    if arguments.repeats is not None:
        repeats = check_count(arguments.repeats, "repeats")
    options = cases.Options(repeats, arguments.quick, tuple(dict.fromkeys(arguments.peers)))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"quick": arguments.quick, "repeats": repeats, "results": []}
    for name in dict.fromkeys(arguments.cases or cases.DEFAULT):
        results["results"].append(cases.run_case(name, options))
        results["machine"] = record.machine()
        if arguments.out is not None:  # after every case, so that an interruption loses one only
            write_json(arguments.out, results)
    if arguments.table:
        print("\n" + tables.markdown(results) + "\n")
    print(record.describe_machine(results["machine"]))
    if arguments.out is not None:
        print(f"written: {arguments.out}")
    return 0


def _case_lines() -> list[str]:
    width = max(map(len, cases.CASES))
    lines = []
    for name in cases.CASES:
        summary = (cases.load_case(name).__doc__ or "").splitlines()[0].rstrip(".")
        lines.append(f"  {name:<{width}}  {summary[:1].lower()}{summary[1:]}")
    return lines
