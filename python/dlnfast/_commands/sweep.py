# SPDX-License-Identifier: MIT
"""``dlnfast sweep``: a grid of specifications."""

from __future__ import annotations

import argparse
import signal

from .._config import spec
from .._config.sweep import SweepGrid, sweep
from .common import INTERRUPTED, add_specification, complain, make_folder


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a sweep as Ctrl-C does."""


def _terminate(*_: object) -> None:
    raise _Terminated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description and the arguments of the command."""
    parser.description = (
        "Train all runs of a grid. SPEC.toml is that of dlnfast train with a section [sweep] of\n"
        '"section.key" = [values], whose product is the grid, or an array of tables [[sweep]] with the\n'
        "changes of one run each. Writes a folder for every run, named by a hash of its settings, with\n"
        "spec.json and summary.json, and results.csv at the end. Finished runs are skipped: the same\n"
        "command resumes an interrupted sweep."
    )
    parser.epilog = spec.describe_settings()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_specification(parser)
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--keep-runs", action="store_true", help="write run.npz for every run too")
    parser.add_argument("--retry-failed", action="store_true", help="run failed and diverged runs again")
    parser.add_argument("--table", action="store_true", help="print a table of all runs")


def run(arguments: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    grid = SweepGrid(arguments.spec, changes=arguments.changes)
    folder = make_folder(arguments, grid.output["directory"])
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        results = sweep(
            grid,
            directory=folder,
            keep_runs=arguments.keep_runs,
            retry_failed=arguments.retry_failed,
            n_workers=arguments.workers,
            progress=True,
        )
    except KeyboardInterrupt as interrupt:
        status = 143 if isinstance(interrupt, _Terminated) else 130
        return complain(": ".join([INTERRUPTED, *getattr(interrupt, "__notes__", [])]), status)
    finally:
        # None stands for a handler that Python did not install, and could not put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
    if arguments.table:
        print(results.to_markdown())
    usage = results.usage
    print(f"sweep:    {results.counted()}")
    print(f"started:  {usage['started']} in {usage['wall']:.3g} s, {usage['workers']} workers")
    print(f"written:  {folder / 'results.csv'}")
    failed = [row for row in results if row["outcome"] == "failed"]
    return complain(f"{len(failed)} runs failed, one of them: {failed[0]['error']}", 1) if failed else 0
